"""`Dispatcher`: owns the transport, its queues and the host memory, and tracks the commands under way.

Host memory has the rings of all queues first, then the *arena*, from which blocks are taken for the queries, tables and
results of the commands under way.  Commands that find no room wait in a backlog, in order.  docs/host.md explains it.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from threading import RLock
from typing import Any, Generic, TypeAlias, TypeVar

from kvattic.driver.accounts import Passage
from kvattic.driver.futures import Future, all_done
from kvattic.driver.rings import QueuePair
from kvattic.errors import (
    CapacityError,
    DeviceLostError,
    DeviceStatusError,
    DeviceTimeoutError,
    ForkedError,
    KvatticError,
    RequestError,
)
from kvattic.placement.ranges import RangeAllocator
from kvattic.spec.commands import (
    IDENTIFY_BYTES,
    LINE_BYTES,
    QUEUE_COMMAND,
    Completion,
    Opcode,
    Status,
    lines,
)
from kvattic.spec.registers import MAX_ENTRIES, Control, StatusBit
from kvattic.support import forks
from kvattic.timing.record import KeepsRecords
from kvattic.transport.base import Transport

__all__ = ["ADMIN", "ATTEND", "FLASH", "Command", "Dispatcher", "Steps", "Task"]

T = TypeVar("T")

ADMIN, ATTEND, FLASH = range(3)
"""The queues: 0 admin, 1 ATTEND and COUNTERS, 2 PROGRAM and ERASE."""
ADMIN_ENTRIES = 256
_NUMBERS = count()
UNKNOWN = 0xFFFF
"""Identifier of a completion whose command could not be read."""
FALSE_ALARMS = 16
"""How often in a row the interrupt line may be up without a completion: an earlier wake-up may come late."""
_IDENTIFIER = QUEUE_COMMAND["identifier"].place    # in every command

Steps: TypeAlias = Generator[Iterable[Future[Any]], None, T]
"""Work of many steps: yields the futures that it waits for, and checks itself whether they failed."""


@dataclass(slots=True, eq=False)
class Command(Generic[T]):
    """A command under way.

    Attributes:
        queue: number of the queue.
        line: what the device fetches, except for the identifier.
        finish: makes the future's value of the completion and the result block; what it raises is the future's error.
        size: bytes of the block of host memory that it needs.
        fill: called with `line` and the address of the block just before submission: writes the addresses into the
            line, and returns the bytes that the block begins with.
        result: (offset in the block, bytes) of what the device writes.
        future: its answer.
        serial: number in the order of submission; the dispatcher's.
        block: first line of the block in the arena, None if it has none; the dispatcher's.
        began: the last that was known of the device's counter CYCLES when it was submitted; the dispatcher's.
    """

    queue: int
    line: bytearray
    finish: Callable[[Completion, bytes], T]
    future: Future[T]
    size: int = 0
    fill: Callable[[bytearray, int], bytes] | None = None
    result: tuple[int, int] = (0, 0)
    serial: int = field(default=0, init=False)
    block: int | None = field(default=None, init=False)
    began: int = field(default=0, init=False)


class Task(Future[T]):
    """Work of many steps; the future of what it returns or raises."""

    def __init__(self, driver: "Dispatcher", steps: Steps[T]) -> None:
        super().__init__(driver)
        self._steps = steps
        self._missing = 0
        self._dispatcher = driver

    def step(self) -> None:
        """Run until it waits for a future."""
        if self.finished:
            return
        dispatcher = self._dispatcher
        try:
            with dispatcher.no_other_task():
                while True:
                    waiting = [future for future in next(self._steps) if not future.finished]
                    if waiting:
                        break
        except StopIteration as end:
            self.set_result(end.value)
            return
        except BaseException as error:
            self.set_exception(error)
            if isinstance(error, DeviceLostError):
                dispatcher.abandon(error)
            if not isinstance(error, Exception):
                raise
            return
        self._missing = len(waiting)
        for future in waiting:
            future.subscribe(self._count_down)

    def _count_down(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self.step()


class Dispatcher:
    """Submits commands and takes their completions.

    A failure of the device itself (no answer, an invalid answer, or it is gone) fails everything under way, and every
    further call until `reset`.

    Args:
        transport: the way to the device.
        timeout_s: seconds of wall-clock time without any completion after which the device counts as broken.
        entries: of the rings of queues 1 and 2, a power of two; less if the host memory is small.

    Attributes:
        transport, timeout_s: the same.
        lock: to be held while anything of the device is used.
        arena_bytes: host memory that a single command can have, at most.

    Raises:
        RequestError: entries is not a power of two from 2 to MAX_ENTRIES.
        CapacityError: the host memory does not hold even the smallest rings.
    """

    def __init__(self, transport: Transport, *, timeout_s: float, entries: int) -> None:
        if not isinstance(entries, int) or not 2 <= entries <= MAX_ENTRIES or entries & (entries - 1):
            raise RequestError(f"entries must be a power of two from 2 to {MAX_ENTRIES:,}, not {entries!r}")
        self.transport = transport
        self.timeout_s = timeout_s
        self.lock = RLock()
        self._sizes = [min(entries, ADMIN_ENTRIES), entries, entries]
        memory = transport.memory_bytes // LINE_BYTES
        while 2 * sum(self._sizes) > memory // 4 and max(self._sizes) > 2:
            largest = max(self._sizes)
            self._sizes = [min(size, largest // 2) for size in self._sizes]
        least = 2 * sum(self._sizes) + lines(IDENTIFY_BYTES)
        if memory < least:
            raise CapacityError(f"the library needs at least {least * LINE_BYTES:,} bytes of host memory, there are "
                                f"{transport.memory_bytes:,}")
        self._base = 2 * sum(self._sizes)
        self._lines = memory - self._base
        self.arena_bytes = self._lines * LINE_BYTES
        self._queues: list[QueuePair] = []
        self._backlog: list[deque[Command[Any]]] = [deque() for _ in self._sizes]
        self._in_flight: dict[int, Command[Any]] = {}   # by identifier, oldest first
        self._lost: list[list[Completion]] = [[] for _ in self._sizes]  # of commands that could not be read
        self._retiring: deque[tuple[int, Callable[[], object]]] = deque()
        self._retired: deque[Callable[[], object]] = deque()
        self._ready: deque[Callable[[], object]] = deque()
        self._serials = count(1)
        self._identifier = 0
        self._serial = 0
        self._in_step = 0           # steps of tasks that are running, one inside of the other
        self._tasks_paused = 0      # calls of `finish`
        self._threshold = 1
        self._stale_status = False  # MEDIA_ERROR or BUS_ERROR may be set in STATUS: cleared when the next work begins
        self._waited = 0.0      # seconds spent waiting since the last completion
        self._alarms = 0        # wake-ups since then
        self._broken: KvatticError | None = None
        self._arena = RangeAllocator(self._lines)
        self._cycles, self._beats = 0, 0    # as the last completion said
        self._number = next(_NUMBERS)
        self._records = transport if isinstance(transport, KeepsRecords) else None
        forks.watch(self)

    def forked_in_use(self) -> None:
        """See `forks.Locked`: this child's copy may be half changed."""
        self._broken = ForkedError("the device was in use by another thread when this process was forked: open another "
                                   "device here")

    # Life.

    def reset(self, ready: Callable[[], None]) -> None:
        """Abort whatever is under way, and set the queues up again.

        Args:
            ready: waits until the device is ready.

        Raises:
            DeviceLostError, DeviceTimeoutError, DeviceStatusError: the device does not come back.
        """
        with self.lock:
            self._break(DeviceStatusError("the device was reset before the command ended", None))
            self._broken = None
            try:
                self.transport.write_register("CONTROL", Control.RESET)
                ready()
                self._set_up()
            except KvatticError as error:
                self._broken = self._broken or error
                raise

    def _set_up(self) -> None:
        transport, at = self.transport, 0
        self._queues = []
        for number, entries in enumerate(self._sizes):
            self._queues.append(QueuePair(transport, number, entries, at * LINE_BYTES, (at + entries) * LINE_BYTES))
            at += 2 * entries
        self._arena = RangeAllocator(self._lines)
        self._threshold = 1
        self._cycles, self._beats = 0, 0
        self._stale_status = False
        self._waited, self._alarms = 0.0, 0
        base, limit = self._base * LINE_BYTES, (self._base + self._lines) * LINE_BYTES
        admin = self._queues[ADMIN]
        for name, value in (("ADMIN_SUBMISSION", admin.submission), ("ADMIN_COMPLETION", admin.completion),
                            ("ADMIN_BASE", base), ("ADMIN_LIMIT", limit), ("ADMIN_ENTRIES", admin.entries),
                            ("INTERRUPT_AFTER", self._threshold), ("INTERRUPT_MASK", (1 << len(self._sizes)) - 1)):
            transport.write_register(name, value)
        created = [self.command(ADMIN, QUEUE_COMMAND.pack(
            opcode=Opcode.CREATE_QUEUE, queue=queue.number, entries=queue.entries, submission=queue.submission,
            completion=queue.completion, base=base, limit=limit), lambda completion, _: completion)
            for queue in self._queues[1:]]
        self.submit(created)
        for command in created:
            completion = self.finish(command.future)
            if completion.status is not Status.OK:
                raise DeviceStatusError(f"the device did not create a queue: {completion.status.name}, where "
                                        f"{completion.where}", completion)

    def abandon(self, error: KvatticError) -> None:
        """Fail everything under way, and all further calls until `reset`."""
        with self.lock:
            self._break(error)

    def check(self) -> None:
        """Refuse to go on if the device cannot be used.

        Raises:
            DeviceTimeoutError, DeviceStatusError, DeviceLostError: what is wrong with it.
        """
        if self._broken is not None:
            raise _again(self._broken)

    # Submitting.

    def command(self, queue: int, line: bytes, finish: Callable[[Completion, bytes], T], size: int = 0,
                fill: Callable[[bytearray, int], bytes] | None = None, result: tuple[int, int] = (0, 0)) -> Command[T]:
        """A command with its future; see `Command`."""
        return Command(queue, bytearray(line), finish, Future(self), size, fill, result)

    def submit(self, commands: Iterable[Command[Any]]) -> None:
        """Put commands into their queues, or into the backlog.

        Raises:
            CapacityError: one needs a larger block than there is; none was submitted.
            DeviceTimeoutError, DeviceStatusError, DeviceLostError: see `check`.
        """
        with self.lock:
            self.check()
            commands = list(commands)
            for command in commands:
                if command.size > self.arena_bytes:
                    raise CapacityError(f"a command needs {command.size:,} bytes of host memory, there are "
                                        f"{self.arena_bytes:,}")
            for command in commands:
                self._backlog[command.queue].append(command)
            try:
                self._pump()
            except KvatticError as error:
                self._break(error)
                raise

    def start(self, steps: Steps[T]) -> Task[T]:
        """Begin work of many steps; it has run up to its first wait when this returns."""
        with self.lock:
            task = Task(self, steps)
            task.step()
            return task

    def _pump(self) -> None:
        """Move what finds room from the backlogs into the rings, and ring."""
        if self._stale_status and not self._in_flight and any(self._backlog):
            self._stale_status = False
            self.transport.write_register("STATUS", StatusBit.MEDIA_ERROR | StatusBit.BUS_ERROR)
        for queue, backlog, lost in zip(self._queues, self._backlog, self._lost, strict=True):
            # After a command that could not be read nothing more is sent, so that the one left over is known to be it.
            while backlog and queue.room and not lost:
                if not self._push(queue, backlog[0]):
                    break
                backlog.popleft()
            queue.ring()

    def _push(self, queue: QueuePair, command: Command[Any]) -> bool:
        """Put a command into its ring, unless there is no room for its block; whether it was."""
        if command.size:
            try:
                command.block = self._arena.allocate(lines(command.size))
            except CapacityError:
                return False
        if command.fill is not None:
            address = 0 if command.block is None else (self._base + command.block) * LINE_BYTES
            try:
                image = command.fill(command.line, address)
            except (RequestError, OverflowError) as error:
                self._give_back(command)
                command.future.set_exception(error)
                return True
            if image:
                self.transport.write_memory(address, image)
        while self._identifier in self._in_flight or self._identifier == UNKNOWN:
            self._identifier = (self._identifier + 1) & 0xFFFF
        command.line[_IDENTIFIER] = self._identifier.to_bytes(2, "little")
        command.serial = self._serial = next(self._serials)
        command.began = self._cycles
        self._in_flight[self._identifier] = command
        self._identifier = (self._identifier + 1) & 0xFFFF
        queue.push(bytes(command.line))
        return True

    def _give_back(self, command: Command[Any]) -> None:
        if command.block is not None:
            self._arena.free(command.block)
            command.block = None

    # Completions.

    @property
    def in_flight(self) -> int:
        """Commands that the device has."""
        return len(self._in_flight)

    @property
    def models_time(self) -> bool:
        """Whether the device has no time of its own, so that it is modelled from what it notes."""
        return self._records is not None

    @property
    def working(self) -> bool:
        """Whether any submitted command has not ended."""
        return bool(self._in_flight) or any(self._backlog)

    @property
    def waiting(self) -> int:
        """Commands in the backlog."""
        return sum(map(len, self._backlog))

    def poll(self) -> int:
        """Take the completions that have come, without waiting.

        Returns:
            How many there were.

        Raises:
            DeviceLostError: the device is gone.
        """
        with self.lock:
            if isinstance(self._broken, ForkedError):
                raise _again(self._broken)
            taken = self._reap() if self._in_flight else 0
            self._run_ready()
            return taken

    def _reap(self) -> int:
        taken = 0
        try:
            for queue in self._queues:
                if queue.outstanding:
                    for entry in queue.reap():
                        self._take(queue, entry)
                        taken += 1
                    self._settle_lost(queue)
            self._pump()
        except KvatticError as error:
            self._break(error)
            raise
        if taken:
            self._waited, self._alarms = 0.0, 0
        self._retire()
        return taken

    def _take(self, queue: QueuePair, entry: bytes) -> None:
        try:
            completion = Completion.unpack(entry)
        except ValueError:
            raise DeviceStatusError(f"queue {queue.number}: a completion cannot be decoded: {entry.hex()}",
                                    None) from None
        if completion.queue != queue.number:
            raise DeviceStatusError(f"queue {queue.number}: a completion of queue {completion.queue} is in its ring, "
                                    f"for command {completion.identifier}", completion)
        if completion.identifier == UNKNOWN:
            self._lost[queue.number].append(completion)
        else:
            command = self._in_flight.get(completion.identifier)
            if command is None or command.queue != queue.number:
                raise DeviceStatusError(
                    f"queue {queue.number}: a completion is for command {completion.identifier}, which is not under "
                    "way there", completion)
            self._end(completion.identifier, completion)

    def _settle_lost(self, queue: QueuePair) -> None:
        """Commands that are left when all others have answered are those that could not be read."""
        lost = self._lost[queue.number]
        if lost and queue.outstanding == 0:
            left = [i for i, command in self._in_flight.items() if command.queue == queue.number]
            for identifier, unread in zip(left, lost, strict=True):
                self._end(identifier, unread)
            lost.clear()

    def _end(self, identifier: int, completion: Completion) -> None:
        command = self._in_flight.pop(identifier)
        command.future.passage = self._passage(command, completion)
        offset, size = command.result
        data = b""
        if size and completion.status is Status.OK and command.block is not None:
            data = self.transport.read_memory((self._base + command.block) * LINE_BYTES + offset, size)
        self._give_back(command)
        if completion.status in (Status.BUS_ERROR, Status.UNREADABLE_KEY, Status.UNREADABLE_VALUE,
                                 Status.UNREADABLE_SKETCH):
            self._stale_status = True
        try:
            command.future.set_result(command.finish(completion, data))
        except KvatticError as error:
            command.future.set_exception(error)

    def _passage(self, command: Command[Any], completion: Completion) -> Passage:
        """When a command was under way, as its completion says, or what the device noted."""
        record, beats = None, 0
        if self._records is not None:
            record = self._records.take_record(command.queue, completion.identifier)
        self._cycles = max(self._cycles, completion.cycle)
        if command.queue == ATTEND:     # whose commands complete in order
            beats, self._beats = completion.beats - self._beats, completion.beats
        return Passage(self._number, command.began, completion.cycle, beats, record)

    # Afterwards.

    def defer(self, action: Callable[[], object]) -> None:
        """Call `action` once the completions at hand are taken."""
        self._ready.append(action)

    @contextmanager
    def no_other_task(self) -> Iterator[None]:
        """A block in which no deferred action, and so no other task, runs: for the step of a task."""
        self._in_step += 1
        try:
            yield
        finally:
            self._in_step -= 1

    @property
    def _may_run_action(self) -> bool:
        """Whether an action is due and none of the callers forbids it: an allocator that erases waits midway."""
        return bool(self._retired or self._ready) and not self._in_step and not self._tasks_paused

    def _run_ready(self) -> None:
        while self._may_run_action:
            (self._retired or self._ready).popleft()()

    def retire(self, action: Callable[[], object]) -> None:
        """Call `action` as soon as all commands that are in flight now have ended."""
        if self._in_flight:
            self._retiring.append((self._serial, action))
        else:
            self._retired.append(action)

    @property
    def retiring(self) -> bool:
        """Whether an action of `retire` is pending."""
        return bool(self._retiring or self._retired)

    def barrier(self) -> Future[None]:
        """Done when all commands that are in flight now have ended."""
        future: Future[None] = Future(self)
        self.retire(lambda: future.set_result(None))
        return future

    def _retire(self) -> None:
        oldest = next(iter(self._in_flight.values())).serial if self._in_flight else None
        while self._retiring and (oldest is None or self._retiring[0][0] < oldest):
            self._retired.append(self._retiring.popleft()[1])

    # Waiting.

    def finish(self, future: Future[T], timeout_s: float | None = None) -> T:
        """Wait for a command's future while all tasks are paused; its result.

        Raises:
            DeviceTimeoutError: no completion came in `timeout_s`, the device's timeout if None.
        """
        with self.lock:
            self._tasks_paused += 1
            try:
                self.drive(lambda: future.finished, patience_s=timeout_s)
            finally:
                self._tasks_paused -= 1
            return future.result()

    def drive(self, until: Callable[[], bool], timeout_s: float | None = None,
              patience_s: float | None = None) -> None:
        """Take completions until a condition holds.

        Args:
            until: the condition.
            timeout_s: seconds after which this call gives up; what is under way goes on.
            patience_s: seconds without any completion after which the device counts as broken; its timeout if None.

        Raises:
            DeviceTimeoutError: one of the two times is over.
            DeviceStatusError, DeviceLostError: the device does not work.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        patience = self.timeout_s if patience_s is None else patience_s
        while True:
            with self.lock:
                if self._run_once(until, patience, deadline):
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeviceTimeoutError(f"not done within {timeout_s:g} s; {self.in_flight} commands are under "
                                             f"way, {self.waiting} wait")
            time.sleep(0)   # let another thread have the lock

    def drive_futures(self, futures: Sequence[Future[Any]], patience_s: float | None = None,
                      progress: Callable[[int, int], object] | None = None) -> None:
        """Wait until all futures are done, or have failed.

        Args:
            futures: of this dispatcher.
            patience_s: as for `drive`.
            progress: called with the number of finished futures at the front, and of all, when that changes.

        Raises:
            DeviceTimeoutError, DeviceStatusError, DeviceLostError: see `drive`; not if it has failed all futures.
        """
        ready = all_done(futures, progress)
        try:
            self.drive(ready, patience_s=patience_s)
        except KvatticError:
            if not ready():
                raise

    def advance(self, until: Callable[[], bool], slice_s: float) -> None:
        """Take completions; if there are none, wait up to `slice_s` seconds for some."""
        with self.lock:
            self._run_once(until, self.timeout_s, time.monotonic() + slice_s)

    def _run_once(self, until: Callable[[], bool], patience_s: float, deadline: float | None) -> bool:
        """Take completions, and wait once if there are none; whether the condition holds now."""
        if isinstance(self._broken, ForkedError):
            raise _again(self._broken)
        self._run_ready()
        if until():
            return True
        self._ensure_in_flight()
        if not self._reap():
            self._wait_and_reap(patience_s, deadline)
        self._run_ready()
        return until()

    def _ensure_in_flight(self) -> None:
        """Submit what waits; raise if no completion can ever come."""
        if not self._in_flight:
            self._pump()
        if not self._in_flight:
            if self._broken is not None:
                raise _again(self._broken)
            raise KvatticError("deadlock: no command in flight can complete this wait")

    def _wait_and_reap(self, patience_s: float, deadline: float | None) -> None:
        """Wait for completions once, take them, and count the time if there are none."""
        begin = time.monotonic()
        rest = max(patience_s - self._waited, 0.0)
        if deadline is not None:
            rest = min(rest, max(deadline - begin, 0.0))
        self._wait(rest, begin, patience_s, deadline)
        if not self._reap():
            self._waited += time.monotonic() - begin

    def _wait(self, rest: float, begin: float, patience_s: float, deadline: float | None) -> None:
        """Wait for the interrupt line until the caller's deadline, or the end of patience with the device."""
        # Half of what is under way, so that the device never runs dry; a queue with nothing under way wakes at once.
        threshold = max(1, min(max(queue.outstanding for queue in self._queues) // 2, 0xFFFF))
        try:
            if threshold != self._threshold:
                self.transport.write_register("INTERRUPT_AFTER", threshold)
                self._threshold = threshold
            self.transport.wait(rest)
            self._alarms += 1
        except DeviceTimeoutError as error:
            now = time.monotonic()
            if deadline is not None and now >= deadline and self._waited + now - begin < patience_s:
                return
            if any(queue.peek() for queue in self._queues):
                return      # it works, but fewer completions came than the line waits for
            self._broke(DeviceTimeoutError(f"{error} ({self.in_flight} commands are under way, {self.waiting} "
                                           f"wait{self._diagnosis()}); call Device.reset()"))
        except DeviceLostError as error:
            self._broke(error)
        if self._alarms > FALSE_ALARMS and not any(queue.peek() for queue in self._queues):
            self._broke(DeviceStatusError(
                f"the device raises its interrupt, but none of the {self.in_flight} commands under way has a "
                f"completion{self._diagnosis()}", None))

    def _diagnosis(self) -> str:
        """What the registers of a device say that does not answer."""
        with suppress(KvatticError):
            status = StatusBit(self.transport.read_register("STATUS"))
            text = f"; STATUS is {status!r}"
            if status & StatusBit.INVALID_DOORBELL:
                text += f", DOORBELL_ERROR {self.transport.read_register('DOORBELL_ERROR'):#010x}"
            return text
        return ""

    # Failure.

    def _broke(self, error: KvatticError) -> None:
        self._break(error)
        raise error

    def _break(self, error: KvatticError) -> None:
        """Fail everything under way: the device cannot be trusted."""
        if self._broken is None:
            self._broken = error
        failed = [*self._in_flight.values(), *(command for backlog in self._backlog for command in backlog)]
        self._in_flight.clear()
        for backlog, lost in zip(self._backlog, self._lost, strict=True):
            backlog.clear()
            lost.clear()
        for queue in self._queues:
            queue.abandon()
        for command in failed:
            command.block = None
            command.future.set_exception(_again(error))
        self._retire()
        while self._may_run_action:
            with suppress(KvatticError):
                (self._retired or self._ready).popleft()()


def _again(error: KvatticError) -> KvatticError:
    """A copy of an error, for another future."""
    if isinstance(error, DeviceStatusError):
        return DeviceStatusError(str(error), error.completion)
    return type(error)(str(error))
