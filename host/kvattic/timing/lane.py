"""A lane as the timing model sees it: walkers, score ring, groups of the first pass, and what has arrived."""

from collections import deque
from typing import Protocol

from kvattic.spec.scheduling import GATHER_TICK_BITS, GATHER_TICKS
from kvattic.timing.states import NEVER, JobState, OperationState
from kvattic.timing.times import Times
from kvattic.timing.work import FIRST, KEY, VALUE, Group

GATHER_CYCLES = 1 << GATHER_TICK_BITS


class Drive(Protocol):
    """What a lane and its channel want of the drive."""

    now: float

    def post(self, at: float, channel: int, what: int) -> None:
        """An event of a channel."""

    def lane_done(self, job: JobState, kind: int, at: float) -> None:
        """A lane has ended a pass of a job."""

    def operation_ended(self, operation: OperationState, at: float) -> None:
        """An operation's outcome is known."""

    def dram_read(self, at: float, codewords: int) -> float:
        """Read codewords of the tail; when the last one begins to come."""


class Entry:
    """A page that is wanted, in the queue of its plane.

    Attributes:
        job: whose it is.
        kind: FIRST, KEY or VALUE.
        row: page of the block and zone.
        runs: lengths in codewords of its runs.
        run: the one that is moved.
        left: codewords of it that are left.
        stamp: order in which it came.
        group: of the first pass; counts codewords that are missing.
    """

    __slots__ = ("group", "job", "kind", "left", "row", "run", "runs", "stamp")

    def __init__(self, job: JobState, kind: int, row: int, runs: tuple[int, ...], stamp: int,
                 group: list[int] | None) -> None:
        self.job = job
        self.kind = kind
        self.row = row
        self.runs = runs
        self.run = 0
        self.left = runs[0]
        self.stamp = stamp
        self.group = group


class Queues(Protocol):
    """What a lane wants of its channel: the queues of its planes (`Channel`)."""

    queues: list[deque[Entry]]
    queued: list[int]
    waiting: list[int]
    growing: list[float]
    active: list[int]


class Lane:
    """Asks for what the jobs read, in the walkers' order, and counts what comes.

    Where several channels have a lane in common, each has its share of the score ring here.  The oldest job may take
    more: it fits the ring, but not always evenly.

    Args:
        number: of the channel.
        times: the configuration in cycles.
        jobs: in order; those that have begun.
        drive: what to tell of the end of a pass.
        channel: whose queues it fills.
    """

    def __init__(self, number: int, times: Times, jobs: list[JobState], drive: Drive, channel: Queues) -> None:
        self.number = number
        self.t = times
        self.jobs = jobs
        self.drive = drive
        self.channel = channel
        self.free = 0.0                          # the datapath has taken all beats so far
        self.stamp = 0
        self.ring_used = 0
        self.walk_job = [0, 0, 0]
        self.walk_group = [0, 0, 0]
        self.clock = [0.0, 0.0, 0.0]
        self.pending: list[tuple[float, JobState, int, Group] | None] = [None, None, None]
        self.blocked = -1                        # walker that waits for room in a queue
        self.room = False
        self.give_back = 0                       # next job to give its places back
        self.open_groups = 0
        self.harvest_free = 0.0
        self.first_groups: deque[tuple[JobState, list[int]]] = deque()
        self.tails: deque[tuple[JobState, int, int, list[int] | None]] = deque()

    # Walkers.

    def start_walks(self, now: float) -> None:
        """Choose what each walker that has nothing to do asks for next."""
        jobs, walk, clock, pending, t = self.jobs, self.walk_job, self.clock, self.pending, self.t
        known = len(jobs)
        lane = self.number
        # The first pass.
        while pending[FIRST] is None and walk[FIRST] < known:
            job = jobs[walk[FIRST]]
            if job.sparse:
                if job.loaded > now:
                    break
                work = job.lanes[lane]
                at = self.walk_group[FIRST]
                if at == 0 and not job.taken[lane]:
                    if self.ring_used + work.places > t.ring and self.give_back < walk[FIRST]:
                        break
                    self.ring_used += work.places
                    job.taken[lane] = True
                if at < len(work.first):
                    if self.open_groups >= t.groups:
                        break
                    group = work.first[at]
                    self.open_groups += group.opens
                    self.walk_group[FIRST] = at + 1
                    begin = max(now, clock[FIRST])
                    clock[FIRST] = begin + group.walk
                    pending[FIRST] = (clock[FIRST], job, FIRST, group)
                    break
                job.first_asked[lane] = True
                self._first_ended(job, max(now, clock[FIRST]))
            elif walk[KEY] <= walk[FIRST]:
                break
            walk[FIRST] += 1
            self.walk_group[FIRST] = 0
        # K and V: K runs one job ahead.
        while True:
            key = self._candidate(KEY, now) if pending[KEY] is None else None
            value = self._candidate(VALUE, now) if pending[VALUE] is None else None
            if key is None and value is None:
                break
            if key is not None and (value is None or key[0].sparse or walk[KEY] - walk[VALUE] <= 1):
                kind, (job, group) = KEY, key
            elif value is not None and pending[KEY] is not None and not value[0].sparse:
                break       # the port is in use
            else:
                assert value is not None
                kind, (job, group) = VALUE, value
            self.walk_group[kind] += 1
            clock[kind] = max(now, clock[kind]) + group.walk
            pending[kind] = (clock[kind], job, kind, group)
            if not job.sparse:
                clock[KEY] = clock[VALUE] = clock[kind]
                if kind == KEY:
                    self.ring_used += group.codewords
                break

    def _candidate(self, kind: int, now: float) -> tuple[JobState, Group] | None:
        """The next group of K or V that may be asked for."""
        lane, walk = self.number, self.walk_job
        while walk[kind] < (len(self.jobs) if kind == KEY else walk[KEY]):
            job = self.jobs[walk[kind]]
            if (job.selected if kind == KEY else job.opened if job.sparse else job.loaded) > now:
                return None
            work = job.lanes[lane]
            groups = work.keys if kind == KEY else work.values
            at = self.walk_group[kind]
            if at < len(groups):
                group: Group = groups[at]
                full = self.ring_used + group.codewords > self.t.ring and self.give_back < walk[KEY]
                if kind == KEY and not job.sparse and full:
                    return None
                return job, group
            walk[kind] += 1
            self.walk_group[kind] = 0
            asked = job.asked[kind - KEY]
            asked[lane] = True
            if job.left[kind][lane] == 0:
                self._pass_ended(job, kind, max(now, self.clock[kind], job.came[kind][lane]))
        return None

    def walked(self, now: float) -> None:
        """Put what walkers have found into the queues."""
        pending = self.pending
        if self.blocked >= 0:       # a full queue holds up all requests behind
            found = pending[self.blocked]
            assert found is not None
            if not self.room or not self._push(found, now):
                return
            pending[self.blocked] = None
            self.blocked = -1
        for kind in (FIRST, KEY, VALUE):
            found = pending[kind]
            if found is None or found[0] > now:
                continue
            if not self._push(found, now):
                self.blocked, self.room = kind, False
                return
            pending[kind] = None

    def _push(self, found: tuple[float, JobState, int, Group], now: float) -> bool:
        _, job, kind, group = found
        t, planes = self.t, self.t.planes
        depth = t.depth
        channel = self.channel
        queued = channel.queued
        for unit, _, runs in group.pages:
            if queued[unit] and queued[unit] + len(runs) > depth:
                return False
        left = None
        if kind == FIRST:
            left = [group.codewords, group.tokens, group.opens]
            self.first_groups.append((job, left))
        if group.dram:
            self.tails.append((job, kind, group.dram, left))
            self.serve_tails(now)
        for unit, row, runs in group.pages:
            if not runs:
                continue
            die = unit // planes
            bit = 1 << unit % planes
            if not channel.waiting[die] & bit:
                channel.waiting[die] |= bit
                channel.growing[die] = (now // GATHER_CYCLES + GATHER_TICKS) * GATHER_CYCLES
                if die not in channel.active:
                    channel.active.append(die)
            channel.queues[unit].append(Entry(job, kind, row, runs, self.stamp, left))
            queued[unit] += len(runs)
            self.stamp += 1
        if left is not None and left[0] == 0:
            self._harvest(now)
        return True

    def serve_tails(self, now: float) -> None:
        """Read codewords of DRAM in the order in which they were asked for; V waits for its job's maximum."""
        tails, t = self.tails, self.t
        while tails and (tails[0][1] != VALUE or tails[0][0].opened <= now):
            job, kind, codewords, group = tails.popleft()
            at = self.drive.dram_read(now, codewords)
            self.free = max(self.free + codewords * t.beats, at + t.beats)
            came = self.free - t.beats      # the last codeword, as those of flash, when its beats begin
            job.came[kind][self.number] = max(job.came[kind][self.number], came)
            self.arrived(job, kind, codewords, group, came)

    # What has arrived.

    def arrived(self, job: JobState, kind: int, codewords: int, group: list[int] | None, at: float) -> None:
        """Codewords of a pass have left the bus (or DRAM) for the lane."""
        if job.first_beat == NEVER:
            job.first_beat = at
        job.last_beat = max(job.last_beat, at)
        if group is not None:
            group[0] -= codewords
            if group[0] == 0:
                self._harvest(at)
            return
        left = job.left[kind]
        left[self.number] -= codewords
        if left[self.number] == 0 and job.asked[kind - KEY][self.number]:
            self._pass_ended(job, kind, max(at, job.came[kind][self.number]))

    def _harvest(self, at: float) -> None:
        """Score the tokens of complete groups, in their order."""
        while self.first_groups and self.first_groups[0][1][0] == 0:
            job, (_, tokens, opens) = self.first_groups.popleft()
            if tokens:
                self.harvest_free = max(self.harvest_free, at + self.t.arrival) + tokens * self.t.token + self.t.harvest
            done = max(self.harvest_free, at + self.t.arrival)
            job.first_end[self.number] = max(job.first_end[self.number], done)
            job.groups_left[self.number] -= 1
            self.drive.post(done, self.number, opens)
            self._first_ended(job, done)

    def group_freed(self) -> None:
        """A group's accumulators are free."""
        self.open_groups -= 1

    def _first_ended(self, job: JobState, at: float) -> None:
        lane = self.number
        if job.first_asked[lane] and job.groups_left[lane] == 0 and not job.first_done[lane]:
            job.first_done[lane] = True
            self.drive.lane_done(job, FIRST, max(at, job.first_end[lane]))

    def _pass_ended(self, job: JobState, kind: int, at: float) -> None:
        done = at + self.t.arrival
        if kind == VALUE:
            job.values_done[self.number] = True
            while self.give_back < len(self.jobs) and self.jobs[self.give_back].values_done[self.number]:
                self.ring_used -= self.jobs[self.give_back].lanes[self.number].places
                self.give_back += 1
        self.drive.lane_done(job, kind, done)

    def next_walk(self) -> float:
        """When the next walker has found something."""
        again = NEVER
        if self.blocked < 0:
            for found in self.pending:
                if found is not None and found[0] < again:
                    again = found[0]
        return again
