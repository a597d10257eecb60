"""One flash channel and its lane, event by event: walkers, queues of runs, dies, bus.

The unit of an event is a command or an uninterrupted stretch of codewords of one run, so a page that is read whole costs a
few events and a page of which single codewords are wanted one for each.
"""

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvattic.timing.times import Times
from kvattic.timing.work import FIRST, KEY, VALUE, Group

if TYPE_CHECKING:
    from kvattic.timing.drive import JobState, OperationState

IDLE, READING, ARRAY, LOADED, WRITE, WRITTEN, MORE, WORKING, STATUS = range(9)
"""Phases of a die; those from WRITE on are of operations."""
NEVER = float("inf")


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

    def __init__(self, job: "JobState", kind: int, row: int, runs: tuple[int, ...], stamp: int,
                 group: list[int] | None) -> None:
        self.job = job
        self.kind = kind
        self.row = row
        self.runs = runs
        self.run = 0
        self.left = runs[0]
        self.stamp = stamp
        self.group = group


class Channel:
    """A channel and its lane.

    The drive calls `wake` at the times that it returned or was told, and `job_loaded`, `job_selected`, `value_opened`
    when a job of all lanes gets that far; the channel calls the drive's `lane_done`.

    Args:
        number: of the channel.
        times: the configuration in cycles.
        jobs: in order; those that have begun.
        drive: what to tell of the end of a pass.
    """

    def __init__(self, number: int, times: Times, jobs: "list[JobState]", drive: Any) -> None:
        self.number = number
        self.t = times
        self.jobs = jobs
        self.drive = drive
        dies, planes = times.dies, times.planes
        self.planes = planes
        self.full = (1 << planes) - 1
        self.queues: list[deque[Entry]] = [deque() for _ in range(dies * planes)]
        self.queued = [0] * (dies * planes)      # runs in each queue
        self.waiting = [0] * dies                # planes with something to read
        self.growing = [0.0] * dies
        self.phase = [IDLE] * dies
        self.free = [0.0] * dies
        self.loaded = [0] * dies
        self.batch: list[list[int]] = [[] for _ in range(dies)]
        self.plane = [0] * dies
        self.aimed = [False] * dies
        self.near = [False] * dies
        self.order: list[int] = []
        self.active: list[int] = []              # dies that are not idle, or have something to read
        self.turn = 0
        self.command_end = 0.0
        self.data_end = 0.0
        self.move: list[Any] | None = None       # die, time of the first codeword, codewords, entry
        self.last_die = -1
        self.planned = -1                        # the die of the codeword that comes next
        self.next = NEVER
        self.stamp = 0
        # The lane.
        self.lane_free = 0.0
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
        # Operations.
        self.operations: deque[OperationState] = deque()
        self.done: list[list[OperationState]] = [[] for _ in range(dies)]    # those that a die works on
        self.operating: list[int] = []           # dies
        self.turned = [False] * dies             # the last was an operation: reads first
        self.writer = -1                         # the die whose page is sent
        self.words = times.page_codewords        # codewords of it that are left
        # Counters.
        self.codewords = 0
        self.commands = 0
        self.page_reads = 0
        self.page_programs = 0
        self.erases = 0
        self.die_busy = 0.0

    # Walkers.

    def _start_walks(self, now: float) -> None:
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
                    if self.ring_used + work.places > t.ring:
                        break
                    self.ring_used += work.places
                    job.taken[lane] = True
                if at < len(work.first):
                    if self.open_groups >= t.groups:
                        break
                    group = work.first[at]
                    self.open_groups += 1
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

    def _candidate(self, kind: int, now: float) -> "tuple[JobState, Group] | None":
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
                if kind == KEY and not job.sparse and self.ring_used + group.codewords > self.t.ring:
                    return None
                return job, group
            walk[kind] += 1
            self.walk_group[kind] = 0
            asked = job.asked[kind - KEY]
            asked[lane] = True
            if job.left[kind][lane] == 0:
                self._pass_ended(job, kind, max(now, self.clock[kind]))
        return None

    def _walked(self, now: float) -> None:
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

    def _push(self, found: "tuple[float, JobState, int, Group]", now: float) -> bool:
        _, job, kind, group = found
        t, planes = self.t, self.planes
        depth = t.depth
        queued = self.queued
        for unit, _, runs in group.pages:
            if queued[unit] and queued[unit] + len(runs) > depth:
                return False
        left = None
        if kind == FIRST:
            left = [group.codewords, group.tokens]
            self.first_groups.append((job, left))
        if group.dram:
            job_open = job.opened if kind == VALUE else 0.0
            at = self.drive.dram_read(max(now, job_open if job_open < NEVER else now), group.dram)
            self.lane_free = max(self.lane_free, at) + group.dram * t.beats
            self._arrived(job, kind, group.dram, left, self.lane_free)
        for unit, row, runs in group.pages:
            if not runs:
                continue
            die = unit // planes
            bit = 1 << unit % planes
            if not self.waiting[die] & bit:
                self.waiting[die] |= bit
                self.growing[die] = now + t.gather
                if die not in self.active:
                    self.active.append(die)
            self.queues[unit].append(Entry(job, kind, row, runs, self.stamp, left))
            queued[unit] += len(runs)
            self.stamp += 1
        if left is not None and left[0] == 0:
            self._harvest(now)
        return True

    # What has arrived.

    def _arrived(self, job: "JobState", kind: int, codewords: int, group: list[int] | None, at: float) -> None:
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
            self._pass_ended(job, kind, at)

    def _harvest(self, at: float) -> None:
        """Score the tokens of complete groups, in their order."""
        while self.first_groups and self.first_groups[0][1][0] == 0:
            job, (_, tokens) = self.first_groups.popleft()
            if tokens:
                self.harvest_free = max(self.harvest_free, at + self.t.arrival) + tokens * self.t.token + self.t.harvest
            done = max(self.harvest_free, at + self.t.arrival)
            job.first_end[self.number] = max(job.first_end[self.number], done)
            job.groups_left[self.number] -= 1
            self.drive.post(done, self.number, 1)
            self._first_ended(job, done)

    def group_freed(self) -> None:
        """A group's accumulators are free."""
        self.open_groups -= 1

    def _first_ended(self, job: "JobState", at: float) -> None:
        lane = self.number
        if job.first_asked[lane] and job.groups_left[lane] == 0 and not job.first_done[lane]:
            job.first_done[lane] = True
            self.drive.lane_done(job, FIRST, max(at, job.first_end[lane]))

    def _pass_ended(self, job: "JobState", kind: int, at: float) -> None:
        done = at + self.t.arrival
        if kind == VALUE:
            job.values_done[self.number] = True
            while self.give_back < len(self.jobs) and self.jobs[self.give_back].values_done[self.number]:
                self.ring_used -= self.jobs[self.give_back].lanes[self.number].places
                self.give_back += 1
        self.drive.lane_done(job, kind, done)

    # Dies and bus.

    def wake(self, now: float) -> float:
        """Do what is due; the time of the next call."""
        t = self.t
        self._walked(now)
        self._start_walks(now)
        self._walked(now)       # what costs no time
        move = self.move
        if move is not None and self.data_end <= now:
            self._finish_move(move)
            move = self.move = None
        again = NEVER
        phase, free, waiting = self.phase, self.free, self.waiting
        separate = t.separate
        command = -1
        active = self.active
        for die in active:
            p = phase[die]
            if p == ARRAY:
                if free[die] <= now:
                    phase[die] = p = LOADED
                    self.order.append(die)
                elif free[die] < again:
                    again = free[die]
            if p == IDLE:
                if waiting[die] and not self._claimed(die):
                    begin = free[die] if waiting[die] == self.full else max(free[die], self.growing[die])
                    if begin <= now:
                        self._plan(die, False)
                        p = phase[die]
                    elif begin < again:
                        again = begin
            if p == READING or p == LOADED and not self.aimed[die]:
                if free[die] <= now:
                    if command < 0 or (die - self.turn) % t.dies < (command - self.turn) % t.dies:
                        if p == READING or self._unparked(die):
                            command = die
                elif free[die] < again:
                    again = free[die]
        if self.operations or self.operating:
            operation, at = self._next_operation(now)
            if operation >= 0 and command < 0:
                command = operation
            again = min(again, at)
        # A command.
        if command >= 0:
            if self.command_end > now:
                again = min(again, self.command_end)
            elif move is not None and not separate:
                self._cut(move, now, 1)
            else:
                self._command(command, now)
                again = min(again, self.command_end)
                if separate:
                    return self.wake(now) if self.command_end <= now else min(again, self._data(now))
                return min(again, self._walk_time())
        elif self.command_end > now:
            again = min(again, self.command_end)
        return min(again, self._data(now), self._walk_time())

    def _walk_time(self) -> float:
        again = NEVER
        if self.blocked < 0:
            for found in self.pending:
                if found is not None and found[0] < again:
                    again = found[0]
        return again

    def _data(self, now: float) -> float:
        """Move data if the bus is free; when to look again."""
        t, move = self.t, self.move
        if not t.separate and self.command_end > now and move is None:
            return self.command_end
        if self.writer >= 0 and move is None and self.phase[self.writer] == WRITE and self.free[self.writer] <= now:
            return self._write(now)
        best = -1
        again = NEVER
        planned = self.planned
        if move is None and planned >= 0 and self.phase[planned] == LOADED and self.aimed[planned]:
            best = planned
        else:
            # What is moved next is chosen when the codeword before begins.
            before = now - t.codeword if move is None and self.data_end > now - 1 else now
            for die in self.order[:]:
                if self.aimed[die] and self._unparked(die):
                    if self.free[die] <= before:
                        best = die
                        break
                    if self.free[die] <= now:
                        if best < 0:
                            best = die
                    else:
                        again = min(again, self.free[die])
        if move is not None:
            if best >= 0 and move[3] is not None and best != move[0] and self.order.index(best) < self.order.index(move[0]):
                self._cut(move, now, 2)     # the next codeword is planned already
            return min(again, self.data_end) if self.data_end > now else now
        if best < 0:
            return again
        entry = self.queues[best * self.planes + self.plane[best]][0]
        begin = now
        if self.last_die != best or self.data_end < now - 1e-6:
            begin += t.preamble
        self.last_die = best
        self.planned = -1
        limit = self.lane_free - t.buffers * t.beats
        if limit > begin:
            return min(again, limit)
        self.move = [best, begin, entry.left, entry]
        self.data_end = begin + entry.left * t.codeword
        return min(again, self.data_end)

    def _cut(self, move: list[Any], now: float, ahead: int) -> None:
        """End what is moved at the next codeword's border, or the next but one."""
        word = self.t.codeword
        n = max(0, int((now - move[1]) / word - 1e-9)) + ahead
        if n < move[2]:
            move[2] = n
            self.data_end = move[1] + n * word

    def _finish_move(self, move: list[Any]) -> None:
        die, begin, n, entry = move
        if entry is None:
            self._finish_write(move)
            return
        t = self.t
        end = self.data_end
        self.codewords += n
        self.lane_free = max(self.lane_free, begin + t.codeword) + n * t.beats
        unit = die * self.planes + self.plane[die]
        first = begin + t.codeword + t.beats
        if first < entry.job.first_beat:
            entry.job.first_beat = first
        self._arrived(entry.job, entry.kind, n, entry.group, max(end, self.lane_free - t.beats))
        entry.left -= n
        if entry.left:
            self.planned = die
            return
        self.queued[unit] -= 1
        self.room = True
        entry.run += 1
        if entry.run < len(entry.runs):
            entry.left = entry.runs[entry.run]
            self.aimed[die] = False
            self.free[die] = end + t.decision
            return
        queue = self.queues[unit]
        queue.popleft()
        bit = 1 << self.plane[die]
        if not queue:
            self.waiting[die] &= ~bit
        elif queue[0].row == entry.row:
            self.aimed[die] = False
            self.free[die] = end + t.decision
            return
        self._plane_ended(die, bit, end)

    def _plane_ended(self, die: int, bit: int, end: float) -> None:
        left = self.loaded[die] & ~bit
        self.loaded[die] = left
        self.aimed[die] = False
        self.free[die] = end + self.t.decision
        if left:
            plane = self.plane[die]
            while not left >> plane & 1:
                plane = (plane + 1) % self.planes
            self.plane[die] = plane
            self.near[die] = False
            return
        self.order.remove(die)
        self.phase[die] = IDLE
        if not self.waiting[die]:
            self.active.remove(die)

    def _unparked(self, die: int) -> bool:
        """Whether the codeword that a loaded die is at may be moved; if not, look for another one."""
        queues, planes = self.queues, self.planes
        base = die * planes
        for _ in range(planes):
            entry = queues[base + self.plane[die]][0]
            if entry.kind != VALUE or entry.job.opened <= self.drive.now:
                return True
            # Another plane with something that may be moved.
            for plane in range(planes):
                if self.loaded[die] >> plane & 1:
                    other = queues[base + plane][0]
                    if other.kind != VALUE or other.job.opened <= self.drive.now:
                        self.plane[die] = plane
                        self.aimed[die] = self.near[die] = False
                        return True
            others = self.waiting[die] & ~self.loaded[die]
            for plane in range(planes):
                if others >> plane & 1:
                    other = queues[base + plane][0]
                    if other.kind != VALUE or other.job.opened <= self.drive.now:
                        self.order.remove(die)
                        self.loaded[die] = 0
                        self._plan(die, True)
                        return False
            return False
        return False

    def _plan(self, die: int, ungated: bool) -> None:
        """Choose the planes of the next read."""
        queues, planes = self.queues, self.planes
        base, waiting = die * planes, self.waiting[die]
        now = self.drive.now
        best: tuple[bool, int] | None = None
        page = 0
        mask = self.t.page_mask
        for plane in range(planes):
            if waiting >> plane & 1:
                entry = queues[base + plane][0]
                gated = entry.kind == VALUE and entry.job.opened > now
                if gated and ungated:
                    continue
                if best is None or (gated, entry.stamp) < best:
                    best = gated, entry.stamp
                    page = entry.row & mask
        mates = [plane for plane in range(planes)
                 if waiting >> plane & 1 and queues[base + plane][0].row & mask == page]
        self.batch[die] = mates
        self.loaded[die] = sum(1 << plane for plane in mates)
        self.phase[die] = READING
        self.turned[die] = False
        self.free[die] = now + self.t.planning

    def _command(self, die: int, now: float) -> None:
        """Play a die's next command."""
        t = self.t
        self.turn = die + 1
        p = self.phase[die]
        if p == READING:
            end = now + 7 * t.cycle
            self.commands += 7
            self.page_reads += 1
            self.command_end = end
            batch = self.batch[die]
            plane = batch.pop(0)
            if batch:
                self.free[die] = end + t.between_planes
                self.die_busy += t.dbsy
            else:
                self.free[die] = end + t.array
                self.die_busy += t.t_r
                self.phase[die] = ARRAY
                self.plane[die] = plane
                self.aimed[die] = True
                self.near[die] = True
        elif p == LOADED:
            cycles = 4 if self.near[die] else 7
            end = now + cycles * t.cycle
            self.commands += cycles
            self.command_end = end
            self.aimed[die] = self.near[die] = True
            self.free[die] = end + t.ccs
        else:
            cycles = self._operate(die, now)
            self.commands += cycles
            self.command_end = now + cycles * t.cycle

    # Operations.

    def operate(self, operation: "OperationState") -> None:
        """An operation comes behind those that wait; `wake` is due at its `arrived`."""
        self.operations.append(operation)

    def _joins(self, die: int, operation: "OperationState") -> bool:
        """Whether the next operation, or behind one of another die the next but one, goes on in another plane."""
        for other in islice(self.operations, 2):
            if other.arrived > self.drive.now:
                return False
            if other.die == die:
                return (other.program == operation.program and not self.loaded[die] >> other.plane & 1
                        and (not other.program or other.row & self.t.page_mask == operation.row & self.t.page_mask))
        return False

    def _claimed(self, die: int) -> bool:
        """The next operation waits for this die."""
        if not self.operations or self.writer >= 0:
            return False
        operation = self.operations[0]
        return operation.die == die and operation.arrived <= self.drive.now and not (
            self.turned[die] and self.waiting[die])

    def _next_operation(self, now: float) -> tuple[int, float]:
        """A die that may be given the next command of an operation; else when to look again."""
        again = NEVER
        if self.operations and self.writer < 0:
            operation = self.operations[0]
            die = operation.die
            if operation.arrived > now:
                again = operation.arrived
            elif self.phase[die] in (IDLE, MORE):
                if self.free[die] > now:
                    again = self.free[die]
                elif self.phase[die] == MORE or not (self.turned[die] and self.waiting[die]):
                    return die, again
        for die in self.operating:
            phase, free = self.phase[die], self.free[die]
            if phase in (WRITTEN, WORKING, STATUS):
                if free <= now:
                    return die, again
                again = min(again, free)
            elif phase == WRITE and free > now:
                again = min(again, free)
        return -1, again

    def _operate(self, die: int, now: float) -> int:
        """Play the next command of an operation; its cycles."""
        t, phase = self.t, self.phase[die]
        if phase in (IDLE, MORE):
            operation = self.operations.popleft()
            if phase == IDLE:
                self.loaded[die] = 0
                self.done[die] = []
                self.operating.append(die)
                self.turned[die] = True
            self.loaded[die] |= 1 << operation.plane
            self.done[die].append(operation)
            cycles = 6 if operation.program else 5
            end = now + cycles * t.cycle
            if operation.program:
                self.phase[die] = WRITE
                self.free[die] = end + t.adl
                self.writer = die
                self.page_programs += 1
            else:
                self.erases += 1
                self._busy(die, operation, end, t.t_bers)
        elif phase == WRITTEN:
            cycles, end = 1, now + t.cycle
            self.writer = -1
            self._busy(die, self.done[die][-1], end, t.t_prog)
        else:
            cycles = 4 if len(self.done[die]) > 1 else 1
            end = now + cycles * t.cycle
            first = next(i for i, o in enumerate(self.done[die]) if o.ended == NEVER)
            self.drive.operation_ended(self.done[die][first], end + t.status)
            self.free[die] = end + t.status
            self.phase[die] = STATUS
            if first == len(self.done[die]) - 1:
                self.phase[die] = IDLE
                self.operating.remove(die)
        return cycles

    def _busy(self, die: int, operation: "OperationState", end: float, time: float) -> None:
        """The die's array works, or waits for another plane."""
        t = self.t
        if self._joins(die, operation):
            self.phase[die] = MORE
            self.free[die] = end + t.between_planes
            self.die_busy += t.dbsy
        else:
            self.phase[die] = WORKING
            self.free[die] = end + t.array - t.t_r + time
            self.die_busy += time

    def _write(self, now: float) -> float:
        """Move a page's codewords into a die."""
        t, die = self.t, self.writer
        begin = now if self.last_die == die and self.data_end >= now - 1e-6 else now + t.preamble
        self.last_die = die
        self.move = [die, begin, self.words, None]
        self.data_end = begin + self.words * t.codeword
        return self.data_end

    def _finish_write(self, move: list[Any]) -> None:
        die, n = move[0], move[2]
        self.codewords += n
        self.words -= n
        if self.words == 0:
            self.words = self.t.page_codewords
            self.phase[die] = WRITTEN
            self.free[die] = self.data_end + self.t.decision
