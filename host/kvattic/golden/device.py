"""The golden device: registers, host memory, device DRAM and flash in NumPy, bit-exact; its time is modelled aside."""

import random
from collections import deque
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.golden.attention import Attention
from kvattic.golden.compiled import find_kernel
from kvattic.golden.flash import Flash, FlashFaults, PowerCutError
from kvattic.golden.image import FlashImage
from kvattic.golden.memory import HostMemory
from kvattic.golden.operations import Operations
from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue, Queues
from kvattic.golden.registers import Registers
from kvattic.golden.rejected import NO_FLAGS, RejectedError
from kvattic.golden.runs import Run, Runs
from kvattic.golden.storage import Storage, Traffic
from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMANDS,
    IDENTIFY_BYTES,
    LINE_BYTES,
    AttendCommand,
    Command,
    CompletionFlag,
    DataCommand,
    FlashCommand,
    GrantCommand,
    Opcode,
    QueueCommand,
    ReadCommand,
    Status,
    lines,
)
from kvattic.spec.config import Config
from kvattic.spec.elements import Bytes
from kvattic.spec.layout import Block
from kvattic.spec.registers import COUNTERS, QUEUES, Access, Control, StatusBit
from kvattic.timing.record import CommandRecord, Recorder
from kvattic.transport.base import check_range, find_register

__all__ = ["FlashFaults", "GoldenDevice", "Traffic"]

_UNKNOWN_IDENTIFIER = 0xFFFF
"""The identifier of a command whose line could not be read."""
_DOORBELLS = {
    f"{name}_{queue}": (queue, completion)
    for queue in range(QUEUES) for name, completion in (("SUBMISSION_TAIL", False), ("COMPLETION_HEAD", True))
}
"""(queue, whether it is a completion doorbell) by register."""
_ADMIN = ("ADMIN_SUBMISSION", "ADMIN_COMPLETION", "ADMIN_BASE", "ADMIN_LIMIT")


class _Ending(NamedTuple):
    """A command that has run, and what goes into its completion."""

    queue: Queue
    identifier: int
    status: Status
    where: int
    flags: CompletionFlag
    ordered: bool
    record: CommandRecord | None


class GoldenDevice:
    """A `Transport` with the device behind it, in NumPy.

    A doorbell runs everything that can run before it returns, in the order of fetching, so nothing is in flight between
    two calls, and STATUS.BUSY is never seen.  With `shuffle`, commands stay in flight for some time: doorbells and
    reads of registers and host memory each advance the device by a few steps, `wait` until the interrupt line is up.
    What it fetches, runs or completes next is random as far as the device's rules leave it open: queues are fetched
    from in turn, ATTENDs and READs run and complete in order, flash commands of a channel begin in order, and admin
    commands run one after the other.

    Its registers know no cycles: all counters of time, CYCLES among them, and the counter fields of the completions
    stay 0, for they are what hardware measures, and CODEWORD_TIMEOUT does not occur.  How long commands would have
    taken is modelled (`kvattic.timing`) when somebody asks (`take_record`, `modelled_cycles`): those that one doorbell
    sets off, or that with `shuffle` are under way without a pause, are in flight together, from an idle drive on.  What
    is moved is counted: BEATS, FLASH_WORDS, CODEWORDS, UNREADABLE and PAGE_READS for the jobs' reads, as if nothing had
    to be read again, no page were read ahead or twice for a job, and a lane used all of each codeword; these also by
    kind in `traffic`.  Likewise FLASH_WORDS and PAGE_PROGRAMS for PROGRAM, BLOCK_ERASES for ERASE, PAGE_READS for
    PROBE, as if no die were dead.

    A command is checked in this order, and the first mistake is reported: BUS_ERROR of its line, INVALID_OPCODE,
    NOT_PERMITTED (opcode), INVALID_FIELD; then

    - ATTEND: INVALID_ROWS, INVALID_LENGTH, INVALID_SELECTION (features, top_units, local_tokens, unit_bits, sinks),
      INVALID_ADDRESS (query, result, table), INVALID_SCALE, NOT_PERMITTED (domain), BUS_ERROR of the query block or the
      table, INVALID_TABLE, NOT_OWNED, NO_SKETCH, NAN_QUERY, NAN_MEAN, UNREADABLE_SKETCH, UNREADABLE_KEY,
      UNREADABLE_VALUE, NAN_KEY, NAN_VALUE, BUS_ERROR of the result;
    - READ: INVALID_LENGTH, INVALID_ADDRESS (result, table), NOT_PERMITTED (domain), BUS_ERROR of the table,
      INVALID_TABLE, NOT_OWNED, BUS_ERROR of the result, UNREADABLE_KEY, UNREADABLE_VALUE;
    - PROGRAM, ERASE, PROBE, MAP: INVALID_PLACE, NOT_PERMITTED (domain), NOT_OWNED (flash, device DRAM), BUS_ERROR of a
      DRAM page that does not exist, then how the part ends it;
    - IDENTIFY, COUNTERS: INVALID_ADDRESS, BUS_ERROR; the others as `Status` says.

    `where` is 0 where `Status` does not define it.  A command that does not end OK writes only its completion; but a
    READ writes zeros for the codewords that cannot be read.

    A job reads only what it needs; whatever it does not read may be erased, unreadable or NaN.  Codewords that cannot
    be read count as zeros in what follows, the selection of a sparse mode included.

    Flash obeys the rules of NAND: the pages of a block are programmed in order and each once, or the command ends
    with PROGRAM_FAILED and changes nothing.  A page can be read only under the number that it was programmed under
    (its check value says which); nothing else is ever read from it.

    MEDIA_ERROR and MEDIA_CAUSE name the first codeword of flash that could not be read since STATUS.MEDIA_ERROR was
    clear: first pass, K, V, the lowest token first.

    Args:
        config: geometry.
        memory_bytes: size of the host memory, which begins at address 0.
        dram_bytes: size of the device DRAM; pages of it take memory once they are written.
        faults: what goes wrong.
        shuffle: seed of the random order; None: the order of fetching.
        timed: note what commands read and write, so that their time can be modelled.  A job takes some percent less
            time and memory without.
        kernel: what computes dense jobs, with the same bits: `c`, those that wait in a queue at once, in C; `numpy`,
            each alone, as with `shuffle` or faults of reading anyway; `auto`: C if there is a compiler, otherwise
            NumPy.  If None, the environment variable KVATTIC_KERNEL, or else `auto`.
        image: a file that the flash is kept in, from the first program on, so that it outlives the process; a drive
            that is opened on it again has what was programmed.

    Attributes:
        config, memory_bytes, dram_bytes: the same.
        faults: the same; the object is never replaced.
        flash: its flash.
        memory: its host memory.
        storage: its flash and device DRAM.
        traffic: what jobs read since power-up or the last reset.

    Raises:
        RequestError: a size is not positive, or there is no such kernel; or `c`, and it cannot be compiled; or the
            image is no such file or in use.
        ConfigMismatchError: the image is of a drive with another configuration.
        OSError: the image cannot be read or written.
    """

    def __init__(self, config: Config, *, memory_bytes: int = 1 << 24, dram_bytes: int = 1 << 30,
                 faults: FlashFaults | None = None, shuffle: int | None = None, timed: bool = True,
                 kernel: str | None = None, image: Path | str | None = None) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("dram_bytes", dram_bytes)):
            if value < 1:
                raise RequestError(f"{name} must be positive, not {value}")
        self.config = config
        self.memory_bytes = memory_bytes
        self.dram_bytes = dram_bytes
        self.faults = FlashFaults() if faults is None else faults
        self._image = None if image is None else FlashImage(image, config)
        self.flash = Flash(config, self.faults, self._image)
        self._registers = Registers(config)
        self.memory = HostMemory(memory_bytes, self._registers)
        self._recorder = Recorder(config, active=timed)
        self.storage = Storage(config, self.flash, dram_bytes, self._registers, self._recorder)
        self._owners = Owners(config)
        self._attention = Attention(config, self._registers, self.memory, self.storage, self._owners,
                                    self._recorder)
        self._operations = Operations(config, self._registers, self.storage, self._owners, self._recorder)
        found = find_kernel(kernel) if shuffle is None else None
        self._runs = None if found is None else Runs(config, self._registers, self.memory, self.storage, self._owners,
                                                     found)
        self._together = False  # all that waits is to be served, so that several commands can be at once
        self._powered = True
        self._random = None if shuffle is None else random.Random(shuffle)
        self._reset()

    def _reset(self) -> None:
        self._registers.reset()
        self._recorder.reset()
        self.storage.traffic = Traffic()
        self._queues = Queues()
        # What is in flight, only with `shuffle`: fetched commands by what runs them, and endings without completion.
        self._fetched: dict[Hashable, deque[tuple[Queue, bytes | None]]] = {}
        self._served: list[_Ending] = []

    def power_up(self) -> None:
        """Restore the supply: flash keeps its contents; DRAM, map, owners and registers are lost."""
        self._powered = True
        self.storage.clear_dram()
        self.flash.forget_map()
        self._owners.clear()
        self._reset()

    @property
    def traffic(self) -> Traffic:
        """What jobs read since power-up or the last reset."""
        return self.storage.traffic

    def written(self) -> Iterator[tuple[Block, int, Bytes]]:
        """See `Flash.written`."""
        return self.flash.written()

    # Transport.

    def read_register(self, name: str) -> int:
        """See `Transport`; a write-only register reads 0.

        Raises:
            RequestError: there is no such register.
        """
        self._advance()
        if find_register(name).access is Access.WO or not self._powered:
            return 0
        if name == "INTERRUPTS":
            return self._interrupts
        return self._registers[name] | (StatusBit.BUSY if name == "STATUS" and self._busy else 0)

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`; a write to a read-only register is ignored.

        Raises:
            RequestError: there is no such register, or the value does not fit it.
        """
        register = find_register(name, value)
        if not self._powered:
            return
        if name == "CONTROL" and value & Control.RESET:
            self._reset()
        elif name == "ADMIN_ENTRIES":
            self._queues.create_admin(Queue(0, value, *(self._registers[name] for name in _ADMIN)))
        elif name in _DOORBELLS:
            self._ring(*_DOORBELLS[name], value)
        elif name == "STATUS":
            self._registers[name] &= ~value | StatusBit.BUSY | StatusBit.READY
        elif register.access is Access.RW:
            self._registers[name] = value

    def read_memory(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: the range is not inside the host memory.
        """
        check_range("host memory", self.memory_bytes, address, size)
        self._advance()
        return self.memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: the range is not inside the host memory.
        """
        self.memory.write(address, data)

    def read_dram(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: the range is not inside the device DRAM.
        """
        return self.storage.read_dram(address, size)

    def write_dram(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: the range is not inside the device DRAM.
        """
        self.storage.write_dram(address, data)

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.  This never sleeps: time passes only here and in other calls.

        Raises:
            DeviceTimeoutError: the interrupt line is not up, and only the host can change that; or the power is off.
        """
        while not self._interrupts & self._registers["INTERRUPT_MASK"] and self._step():
            pass
        wanting, mask = self._interrupts, self._registers["INTERRUPT_MASK"]
        if not self._powered:
            raise DeviceTimeoutError("the device does not answer: its power is off")
        if wanting & mask:
            return
        if wanting:
            raise DeviceTimeoutError(
                f"queues {_bits(wanting)} want an interrupt, but all of them are masked: set their bits in "
                f"INTERRUPT_MASK, which is {mask:#x}")
        raise DeviceTimeoutError("no interrupt can come, for nothing is under way and no completion waits to be taken: "
                                 "ring a doorbell first")

    def close(self) -> None:
        """See `Transport`; only a file with the flash is released."""
        if self._image is not None:
            self._image.close()

    # Time, which is modelled.

    def take_record(self, queue: int, identifier: int) -> CommandRecord | None:
        """See `kvattic.timing.record.KeepsRecords`."""
        return self._recorder.take(queue, identifier)

    def modelled_cycles(self) -> int | None:
        """Cycles that the timing model gives for everything since the last reset; None if the device is not `timed`."""
        return self._recorder.cycles() if self._recorder.active else None

    # Steps.

    @property
    def _busy(self) -> bool:
        return bool(self._fetched or self._served) or self._queues.fetchable

    @property
    def _interrupts(self) -> int:
        return self._queues.interrupts(self._registers["INTERRUPT_AFTER"] & 0xFFFF)

    def _ring(self, queue: int, completion: bool, value: int) -> None:
        """A doorbell."""
        if not self._queues.doorbell(queue, value, completion=completion):
            self._registers.report(
                StatusBit.INVALID_DOORBELL, DOORBELL_ERROR=queue << 24 | completion << 16 | value & 0xFFFF)
        elif self._random is not None:
            self._advance()
        else:
            self._together = True
            try:
                while self._step():
                    pass
            finally:
                self._together = False

    def _advance(self) -> None:
        """Take a few steps, if their order is random; otherwise the doorbell took them all."""
        if self._random is not None and self._busy:
            for _ in range(self._random.randrange(4)):
                self._step()

    def _step(self) -> bool:
        """Do something; False: there is nothing to do."""
        if not self._powered:
            return False
        try:
            if self._random is not None:
                return self._random_step(self._random)
            queue = self._queues.next()
            if queue is None:
                return False
            run = None
            if self._together and self._runs is not None and not self._queues.others_fetchable(queue):
                run = self._runs.take(queue)
            if run is None:
                self._post(self._serve(queue, self._fetch(queue)))
            else:
                self._complete(queue, run)
            return True
        except PowerCutError:
            self._powered = False
            return False

    def _random_step(self, rng: random.Random) -> bool:
        steps = [name for name, possible in (
            ("fetch", self._queues.fetchable), ("serve", self._fetched), ("post", self._served)) if possible]
        if not steps:
            return False
        step = rng.choice(steps)
        if step == "fetch" and (queue := self._queues.next()) is not None:
            line = self._fetch(queue)
            self._fetched.setdefault(_served_by(line), deque()).append((queue, line))
        elif step == "serve":
            server = rng.choice(list(self._fetched))
            self._served.append(self._serve(*self._fetched[server].popleft()))
            if not self._fetched[server]:
                del self._fetched[server]
        elif step == "post":
            first = next((ending for ending in self._served if ending.ordered), None)
            ending = rng.choice([ending for ending in self._served if not ending.ordered or ending is first])
            self._served.remove(ending)
            self._post(ending)
        return True

    def _fetch(self, queue: Queue) -> bytes | None:
        """The next command's line; None: it cannot be read."""
        self._registers.count("FETCHED")
        try:
            return self.memory.dma_read(queue.fetch(), LINE_BYTES)
        except RejectedError:
            return None

    def _complete(self, queue: Queue, run: Run) -> None:
        """Fetch, serve and complete the commands of a run; most of it is done."""
        first, count = 0, len(run.done)
        while first < count:
            last = first
            while last < count and run.done[last] is not None:
                last += 1
            if last == first:
                self._post(self._serve(queue, self._fetch(queue)))
                last += 1
            else:
                self._complete_done(queue, run, range(first, last))
            first = last

    def _complete_done(self, queue: Queue, run: Run, members: range) -> None:
        """The same of some that are all done."""
        identifiers = run.identifiers[members.start : members.stop]
        pieces = queue.completions(len(members))
        entries = queue.post_many(identifiers)
        for begin, end in pieces:
            self.memory.dma_write(begin, entries[: end - begin])
            entries = entries[end - begin :]
        self._registers.count("FETCHED", len(members))
        self._registers.count("COMPLETED", len(members))
        for identifier, done in zip(identifiers, run.done[members.start : members.stop], strict=True):
            if done is not None:
                self._recorder.posted(queue.number, identifier, self._recorder.add_noted(*done))
        if not self._busy:
            self._recorder.end_batch()

    def _post(self, ending: _Ending) -> None:
        """Write a completion."""
        queue, identifier, status, where, flags, _, record = ending
        self.memory.dma_write(*queue.post(identifier, status, where, flags))
        self._registers.count("COMPLETED")
        self._recorder.posted(queue.number, identifier, record)
        if not self._busy:
            self._recorder.end_batch()

    # Commands.

    def _serve(self, queue: Queue, line: bytes | None) -> _Ending:
        """Run one command."""
        if line is None:
            return _Ending(queue, _UNKNOWN_IDENTIFIER, Status.BUS_ERROR, 0, NO_FLAGS, False, None)
        command = Command.unpack(line)
        status, where = Status.OK, 0
        try:
            flags = self._run(queue, command.opcode, line)
        except RejectedError as rejected:
            status, where, flags = rejected.status, rejected.where, rejected.flags
        return _Ending(queue, command.identifier, status, where, flags, command.opcode in (Opcode.ATTEND, Opcode.READ),
                       self._recorder.end_command())

    def _run(self, queue: Queue, opcode: int, line: bytes) -> CompletionFlag:
        if opcode not in COMMANDS:
            raise RejectedError(Status.INVALID_OPCODE, opcode)
        if opcode >= ADMIN_OPCODES and queue.number != 0:
            raise RejectedError(Status.NOT_PERMITTED)
        record, decoded = COMMANDS[opcode]
        if not record.reserved_is_zero(line):
            raise RejectedError(Status.INVALID_FIELD)
        match command := decoded.unpack(line):
            case AttendCommand():
                return self._attention.run(command, queue)
            case ReadCommand():
                self._attention.read(command, queue)
            case FlashCommand():
                self._operations.run(command, queue)
            case QueueCommand():
                self._queues.run(command)
            case GrantCommand():
                self._owners.grant(command)
            case DataCommand():
                self._write_block(command, queue)
        return NO_FLAGS

    def _write_block(self, command: DataCommand, queue: Queue) -> None:
        """IDENTIFY, COUNTERS."""
        if command.opcode == Opcode.IDENTIFY:
            data = self.config.to_json().encode().ljust(IDENTIFY_BYTES, b"\0")
        else:
            data = b"".join(self._registers[counter.name].to_bytes(8, "little") for counter in COUNTERS)
            data = data.ljust(lines(len(data)) * LINE_BYTES, b"\0")
        if not queue.holds(command.result, len(data)):
            raise RejectedError(Status.INVALID_ADDRESS, 1)
        if not self.memory.dma_write(command.result, data):
            raise RejectedError(Status.BUS_ERROR)


def _served_by(line: bytes | None) -> Hashable:
    """What runs this command after those that it got before; an object of its own if nothing does."""
    if line is None or line[0] not in COMMANDS:
        return object()
    _, decoded = COMMANDS[line[0]]
    command = decoded.unpack(line)
    if isinstance(command, FlashCommand):
        return command.channel
    return "attention" if isinstance(command, AttendCommand | ReadCommand) else "admin"


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
