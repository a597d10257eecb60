"""One flash channel and its lane, event by event: walkers, queues of runs, dies, bus.

The unit of an event is a command or an uninterrupted stretch of codewords of one run: a page that is read whole costs
a few events, a page of which single codewords are wanted one for each.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from kvattic.timing.lane import Drive, Entry, Lane
from kvattic.timing.states import NEVER, JobState, OperationState
from kvattic.timing.times import Times
from kvattic.timing.work import VALUE

IDLE, READING, ARRAY, LOADED, WRITE, WRITTEN, MORE, WORKING, STATUS = range(9)
"""Phases of a die; those from WRITE on are of operations."""


@dataclass(slots=True)
class Move:
    """A stretch of codewords on the bus: of a die, from a time on; of a page that is written if `entry` is None."""

    die: int
    begin: float
    codewords: int
    entry: Entry | None
    goes_on: bool = False
    """It was cut for a command; the codeword behind it is planned already."""


class Channel:
    """A channel and its lane.

    The drive calls `wake` at the time that the last call returned, and whenever something else has changed.

    Args:
        number: of the channel.
        times: the configuration in cycles.
        jobs: in order; those that have begun.
        drive: what to tell of the end of a pass.
    """

    def __init__(self, number: int, times: Times, jobs: list[JobState], drive: Drive) -> None:
        self.t = times
        self.drive = drive
        self.lane = Lane(number, times, jobs, drive, self)
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
        self.move: Move | None = None
        self.last_die = -1
        self.planned = -1                        # the die of the codeword that comes next
        self.next = NEVER
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

    # Dies and bus.

    def wake(self, now: float) -> float:
        """Do what is due; the time of the next call."""
        t = self.t
        lane = self.lane
        lane.serve_tails(now)
        lane.walked(now)
        lane.start_walks(now)
        lane.walked(now)        # what costs no time
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
                    self._unparked(die)
                    p = phase[die]
                elif free[die] < again:
                    again = free[die]
            if p == LOADED and self._gives_way(die):
                p = phase[die]
            if p == IDLE and waiting[die] and not self._claimed(die):
                begin = free[die] if waiting[die] == self.full else max(free[die], self.growing[die])
                if begin <= now:
                    self._plan(die, False)
                    p = phase[die]
                elif begin < again:
                    again = begin
            if p == READING or (p == LOADED and not self.aimed[die]):
                if free[die] <= now:
                    if ((command < 0 or (die - self.turn) % t.dies < (command - self.turn) % t.dies)
                            and (p == READING or self._unparked(die))):
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
                if not separate:
                    return min(again, lane.next_walk())
        elif self.command_end > now:
            again = min(again, self.command_end)
        return min(again, self._data(now), lane.next_walk())

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
            for die in self.order:
                if self.aimed[die] and now < self.free[die] < again:
                    again = self.free[die]
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
            if (best >= 0 and move.entry is not None and best != move.die
                    and self.order.index(best) < self.order.index(move.die)):
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
        limit = self.lane.free - t.buffers * t.beats
        if limit > begin:
            return min(again, limit)
        self.move = Move(best, begin, entry.left, entry)
        self.data_end = begin + entry.left * t.codeword
        return min(again, self.data_end)

    def _cut(self, move: Move, now: float, ahead: int) -> None:
        """End what is moved at the next codeword's border, or the next but one."""
        word = self.t.codeword
        n = max(0, int((now - move.begin) / word - 1e-9)) + ahead
        if n < move.codewords:
            move.codewords, move.goes_on = n, ahead == 1
            self.data_end = move.begin + n * word

    def _finish_move(self, move: Move) -> None:
        die, begin, n, entry = move.die, move.begin, move.codewords, move.entry
        if entry is None:
            self._finish_write(move)
            return
        t = self.t
        end = self.data_end
        self.codewords += n
        self.lane.free = max(self.lane.free, begin + t.codeword) + n * t.beats
        unit = die * self.planes + self.plane[die]
        first = begin + t.codeword + t.beats
        if first < entry.job.first_beat:
            entry.job.first_beat = first
        self.lane.arrived(entry.job, entry.kind, n, entry.group, max(end, self.lane.free - t.beats))
        entry.left -= n
        if entry.left:
            if move.goes_on:
                self.planned = die
            return
        self.queued[unit] -= 1
        self.lane.room = True
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
                        self.drive.post(self.free[die], self.lane.number, 0)    # nothing else may wake the channel
                        return False
            break
        if self.loaded[die] & self.loaded[die] - 1:
            self.aimed[die] = self.near[die] = False    # it turns from plane to plane meanwhile
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

    def operate(self, operation: OperationState) -> None:
        """An operation comes behind those that wait; `wake` is due at its `arrived`."""
        self.operations.append(operation)

    def _joins(self, die: int, operation: OperationState) -> bool:
        """Whether the next operation, or behind one of another die the next but one, goes on in another plane."""
        for other in islice(self.operations, 2):
            if other.arrived > self.drive.now:
                return False
            if other.die == die:
                return (other.program == operation.program and not self.loaded[die] >> other.plane & 1
                        and (not other.program or other.row & self.t.page_mask == operation.row & self.t.page_mask))
        return False

    def _next_is_of(self, die: int) -> bool:
        """The next operation is there, and this die's."""
        if not self.operations or self.writer >= 0:
            return False
        operation = self.operations[0]
        return operation.die == die and operation.arrived <= self.drive.now

    def _claimed(self, die: int) -> bool:
        """The next operation waits for this die."""
        return self._next_is_of(die) and not (self.turned[die] and self.waiting[die])

    def _gives_way(self, die: int) -> bool:
        """A loaded die whose codeword has to wait gives its pages up for the next operation, if that is its own."""
        if not self._next_is_of(die):
            return False
        entry = self.queues[die * self.planes + self.plane[die]][0]
        if entry.kind != VALUE or entry.job.opened <= self.drive.now:
            return False
        self.order.remove(die)
        self.loaded[die] = 0
        self.phase[die] = IDLE
        return True

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

    def _busy(self, die: int, operation: OperationState, end: float, time: float) -> None:
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
        self.move = Move(die, begin, self.words, None)
        self.data_end = begin + self.words * t.codeword
        return self.data_end

    def _finish_write(self, move: Move) -> None:
        die, n = move.die, move.codewords
        self.codewords += n
        self.words -= n
        if self.words == 0:
            self.words = self.t.page_codewords
            self.phase[die] = WRITTEN
            self.free[die] = self.data_end + self.t.decision
