"""The drive as the timing model sees it: jobs in order through loader, lanes, selection, maximum and finisher."""

from collections.abc import Iterable
from heapq import heappop, heappush

from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.layout import page_place
from kvattic.timing.channel import Channel
from kvattic.timing.states import NEVER, JobState, OperationState
from kvattic.timing.times import COPY, KEPT, KEPT_ONE_IN, Times, times_of
from kvattic.timing.work import FIRST, KEY, VALUE, Job, Operation


class Drive:
    """Runs jobs through the drive's stages.

    Args:
        config: of the drive.
        jobs: in the order in which they are submitted.
    """

    def __init__(self, config: Config, jobs: Iterable[Job], operations: Iterable[Operation] = ()) -> None:
        self.config = config
        self.t: Times = times_of(config)
        self.waiting = iter(jobs)
        self.jobs: list[JobState] = []
        self.channels = [Channel(i, self.t, self.jobs, self) for i in range(config.channels)]
        self.events: list[tuple[float, int, int, int]] = []
        self.sequence = 0
        self.now = 0.0
        self.loader_free = self.selector_free = self.maximum_free = self.finisher_free = self.writer_free = 0.0
        self.dram_free = self.copier_free = 0.0
        self.at = [0, 0, 0]      # next job of selection, maximum, finisher
        self.operations: list[OperationState] = []
        for operation in operations:
            self.loader_free = max(self.loader_free, operation.submitted) + self.t.operation
            place = page_place(operation.page, config)
            state = OperationState(operation.channel, operation.program, place.die, place.plane,
                                   place.zone << config.block_page_bits | place.page, self.loader_free)
            self.operations.append(state)
            self.channels[operation.channel].operate(state)

    def post(self, at: float, channel: int, what: int) -> None:
        """An event of a channel: 0 wakes it, 1 also frees a group."""
        self.sequence += 1
        heappush(self.events, (at, self.sequence, channel, what))

    def post_all(self, at: float) -> None:
        """Wake all channels."""
        for channel in range(self.config.channels):
            self.post(at, channel, 0)

    def run(self) -> None:
        """Run until nothing is left to do."""
        self.loader_free = 0.0      # commands of other queues are fetched in turn
        for _ in range(self.config.jobs_in_flight):
            self._load(0.0)
        self.post_all(0.0)
        events, channels = self.events, self.channels
        while events:
            now, _, number, what = heappop(events)
            channel = channels[number]
            if what == 1:
                channel.lane.group_freed()
            elif what == 2:
                if channel.next != now:
                    continue
                channel.next = NEVER
            self.now = now
            again = max(channel.wake(now), now)
            if again < channel.next:
                channel.next = again
                self.post(again, number, 2)
        if any(job.completed == NEVER for job in self.jobs) or any(o.ended == NEVER for o in self.operations):
            raise AssertionError("the timing model stands still")

    def _load(self, now: float) -> None:
        """A slot is free: load the next job."""
        work = next(self.waiting, None)
        if work is None:
            return
        job = JobState(len(self.jobs), work, self.config.channels)
        t = self.t
        # A command is requested behind the blocks of the one before it, and then waits for a slot of its own.
        job.fetched = max(self.loader_free, work.submitted)
        begin = max(job.fetched, now) + t.fetch
        words = work.words
        if work.mode.featured:      # features are chosen beside the fetch of table and mean
            words = max(words, t.rank + t.rank_row * work.rows)
        job.loaded = begin + t.load + words
        self.loader_free = job.loaded - t.fetch
        if not job.sparse:
            job.selected = job.loaded
            job.first_done = [True] * self.config.channels
            job.lanes_left[FIRST] = 0
        self.jobs.append(job)
        self.post_all(job.loaded)

    def lane_done(self, job: JobState, kind: int, at: float) -> None:
        """A lane has ended a pass of a job."""
        job.end[kind] = max(job.end[kind], at)
        job.lanes_left[kind] -= 1
        if job.lanes_left[kind]:
            return
        if kind == FIRST:
            self._select()
        elif kind == KEY:
            self._maximum()
        else:
            self._finish()

    def _select(self) -> None:
        jobs, t = self.jobs, self.t
        while self.at[FIRST] < len(jobs) and jobs[self.at[FIRST]].lanes_left[FIRST] == 0:
            job = jobs[self.at[FIRST]]
            self.at[FIRST] += 1
            if job.sparse:
                begin = max(self.selector_free, job.end[FIRST])
                job.selected = self.selector_free = begin + selection(job, t)
                self.selector_free += t.alpha * job.rows
                self.post_all(job.selected)

    def _maximum(self) -> None:
        jobs, t = self.jobs, self.t
        while self.at[KEY] < len(jobs) and jobs[self.at[KEY]].lanes_left[KEY] == 0:
            job = jobs[self.at[KEY]]
            self.at[KEY] += 1
            rows = job.rows
            job.opened = max(self.maximum_free, job.end[KEY]) + rows * (self.config.lanes + 1) + t.maximum
            self.maximum_free = job.opened
            self.post_all(job.opened)

    def _finish(self) -> None:
        jobs, t = self.jobs, self.t
        while (self.at[VALUE] < len(jobs) and jobs[self.at[VALUE]].lanes_left[VALUE] == 0
               and jobs[self.at[VALUE]].opened < NEVER):
            job = jobs[self.at[VALUE]]
            self.at[VALUE] += 1
            begin = max(self.finisher_free, job.end[VALUE], job.opened, self._copy(job))
            freed = begin + t.gather_row * job.rows + t.drain_row * job.rows + t.drain
            self.finisher_free = freed
            self.writer_free = max(self.writer_free, freed) + (0 if job.work.copied else t.write_row * job.rows)
            job.completed = self.writer_free + t.complete
            self._load(freed)
            self.post_all(freed)

    def _copy(self, job: JobState) -> float:
        """When a READ is copied, by the copier that all lanes share; 0 of an ATTEND."""
        if not job.work.copied:
            return 0.0
        codewords = sum(group.codewords for lane in job.lanes for group in (*lane.keys, *lane.values))
        self.copier_free = max(self.copier_free, job.first_beat) + job.work.copied + COPY * codewords
        return self.copier_free

    def operation_ended(self, operation: OperationState, at: float) -> None:
        """An operation's outcome is known; its completion is written."""
        operation.ended = at + self.t.complete

    def dram_read(self, at: float, codewords: int) -> float:
        """Read codewords of the tail; when the last one begins to come."""
        self.dram_free = max(self.dram_free, at) + codewords * self.t.dram_codeword
        return self.dram_free + self.t.dram_latency - self.t.dram_codeword


def selection(job: JobState, t: Times) -> float:
    """Cycles of a job's selection (hdl: `LaneTopK`, `TopK`)."""
    channels, rows, mode = job.lanes, job.rows, job.work.mode
    lanes = [channels[number :: t.lanes] for number in range(t.lanes)]
    tokens = max(sum(channel.tokens for channel in lane) for lane in lanes)
    units = max(sum(channel.units for channel in lane) for lane in lanes)
    places = max(sum(channel.places for channel in lane) for lane in lanes)
    # A step takes several tokens, or as many units of one token.
    steps = tokens / t.sweep_tokens
    scores, marked = (units, places) if mode is Mode.CENTROID else (steps, steps)
    ranked = steps if mode.by_token else units
    if t.weighs_anew and mode is Mode.FETCHED and units > KEPT:
        ranked = steps
    # SUM and MASS; DIGIT over all units, then over those that it has kept; MARK.
    sweeps = 24 + 27 + 2 * scores * rows + 11 + ranked + 14 + units / KEPT_ONE_IN + 16 + marked
    return sweeps + t.select + t.select_row * rows
