"""The golden device: registers, host memory, device DRAM and flash in NumPy, bit-exact but without time."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.golden import dense, sparse
from kvattic.golden.flash import Flash, FlashFaults, PowerCutError
from kvattic.golden.owners import Owners
from kvattic.golden.queues import Queue, Queues, RejectedError
from kvattic.spec import layout
from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    DATA_COMMAND,
    FLASH_COMMAND,
    FP32_SPECIAL,
    GRANT_COMMAND,
    IDENTIFY_BYTES,
    LINE_BYTES,
    QUEUE_COMMAND,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    TRAILER,
    CompletionFlag,
    Kind,
    MediaCause,
    Mode,
    Opcode,
    Record,
    Status,
    TableFlag,
    fp32_block_bytes,
    is_positive_normal,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import ELEMENT_BYTES, PAGE_NUMBER_BITS, Config
from kvattic.spec.layout import Block
from kvattic.spec.registers import COUNTERS, QUEUES, REGISTER_MAP, Access, Control, StatusBit

__all__ = ["FlashFaults", "GoldenDevice", "Traffic"]

_RECORDS: dict[int, Record] = {
    Opcode.ATTEND: COMMAND,
    **dict.fromkeys((Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP), FLASH_COMMAND),
    **dict.fromkeys((Opcode.IDENTIFY, Opcode.COUNTERS), DATA_COMMAND),
    **dict.fromkeys((Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE), QUEUE_COMMAND),
    Opcode.GRANT: GRANT_COMMAND,
}
_UNKNOWN_IDENTIFIER = 0xFFFF
"""Of a command whose line could not be read."""
_DOORBELLS = {
    f"{name}_{queue}": (queue, completion)
    for queue in range(QUEUES) for name, completion in (("SUBMISSION_TAIL", False), ("COMPLETION_HEAD", True))
}
"""(queue, whether it is of completions) by register."""
_ADMIN = ("ADMIN_SUBMISSION", "ADMIN_COMPLETION", "ADMIN_BASE", "ADMIN_LIMIT")
_OPERATIONS = {Opcode.PROGRAM: "PAGE_PROGRAMS", Opcode.ERASE: "BLOCK_ERASES", Opcode.PROBE: "PAGE_READS"}
"""What counts them."""


class _Ending(NamedTuple):
    """What goes into a command's completion."""

    queue: Queue
    identifier: int
    status: int
    where: int
    flags: int
    ordered: bool


class _Stripes(NamedTuple):
    """A job's table, taken apart: arrays of one entry a stripe.

    Members:
        entries: where K and V lie.
        sketch: what the first pass reads; of a dense job nothing that means anything.
        reserved: bool, whether a reserved bit of an entry is set.
    """

    entries: layout.Entries
    sketch: layout.Sketches
    reserved: NDArray[np.bool_]

    @property
    def tail(self) -> NDArray[np.bool_]:
        """Stripes that are attended whole."""
        whole: NDArray[np.bool_] = (self.entries.dram == 1) | (self.entries.whole == 1)
        return whole


@dataclass(slots=True)
class Traffic:
    """What jobs read, in codewords, by `Kind`.

    Attributes:
        flash: codewords that came over the flash buses.
        dram: codewords read from device DRAM.
        page_reads: pages read from the flash arrays: of each job, the pages of which it read anything.
    """

    flash: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    dram: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    page_reads: int = 0


class GoldenDevice:
    """A `Transport` with the device behind it, in NumPy.

    A doorbell runs everything that can be run before it returns, in the order of fetching.  So nothing is ever under
    way between two calls, and STATUS.BUSY is never seen.  With `shuffle`, commands are under way for some time:
    doorbells and reads of registers and host memory each let the device go on by a few steps, `wait` until the
    interrupt line is up.  What it fetches, runs or completes next is random as far as the device's rules leave it open:
    queues are fetched from in turn, ATTENDs run and complete in order, flash commands of a channel begin in order, and
    admin commands run one after the other.

    There are no cycles: all counters of time, CYCLES among them, and the counter fields of the completions stay 0, and
    CODEWORD_TIMEOUT does not occur.  What is moved is counted: BEATS, FLASH_WORDS, CODEWORDS, UNREADABLE and PAGE_READS
    of the jobs' reads, as if nothing had to be read again, no page were read ahead and none twice for a job, and a lane
    used all of each codeword; these also by kind in `traffic`.  Likewise FLASH_WORDS and PAGE_PROGRAMS of PROGRAM,
    BLOCK_ERASES of ERASE, PAGE_READS of PROBE, as if no die were dead.

    A command is checked in this order, and the first that applies is reported: BUS_ERROR of its line, INVALID_OPCODE,
    NOT_PERMITTED (opcode), INVALID_FIELD; then

    - ATTEND: INVALID_ROWS, INVALID_LENGTH, INVALID_SELECTION (features, top_units, local_tokens, unit_bits),
      INVALID_ADDRESS (query, result, table), INVALID_SCALE, NOT_PERMITTED (domain), BUS_ERROR of the query block or the
      table, INVALID_TABLE, NOT_OWNED, NO_SKETCH, NAN_QUERY, NAN_MEAN, UNREADABLE_SKETCH, UNREADABLE_KEY,
      UNREADABLE_VALUE, NAN_KEY, NAN_VALUE, BUS_ERROR of the result;
    - PROGRAM, ERASE, PROBE, MAP: INVALID_PLACE, NOT_PERMITTED (domain), NOT_OWNED (flash, device DRAM), BUS_ERROR of a
      DRAM page that there is not, then how the part ends it;
    - IDENTIFY, COUNTERS: INVALID_ADDRESS, BUS_ERROR; the others as `Status` says.

    `where` is 0 where `Status` does not define it.  A command that does not end OK writes its completion only.

    A job reads only what it needs, and whatever it does not read may be erased, unreadable or NaN.  Codewords that
    cannot be read count as zeros in what follows, the selection of a sparse mode included.

    Flash obeys the rules of NAND: the pages of a block are programmed in order and each once, or the command ends
    with PROGRAM_FAILED and changes nothing.  A page can be read only under the number that it was programmed under
    (its check value says which); nothing else is ever read from it.

    MEDIA_ERROR and MEDIA_CAUSE name the first codeword of flash that could not be read since STATUS.MEDIA_ERROR was
    clear: first pass, K, V, the lowest token first.

    Args:
        config: geometry.
        memory_bytes: size of the host memory, which begins at address 0.
        dram_bytes: size of the device DRAM; it takes memory where it is written.
        faults: what goes wrong.
        shuffle: seed of what is random; None: nothing is.

    Attributes:
        faults: the same; the object is never another one.
        flash: its flash.
        traffic: what jobs read since power-up or the last reset.

    Raises:
        RequestError: a size is not positive.
    """

    def __init__(self, config: Config, *, memory_bytes: int = 1 << 24, dram_bytes: int = 1 << 30,
                 faults: FlashFaults | None = None, shuffle: int | None = None) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("dram_bytes", dram_bytes)):
            if value < 1:
                raise RequestError(f"{name} must be positive, not {value}")
        self.config = config
        self.memory_bytes = memory_bytes
        self.dram_bytes = dram_bytes
        self.faults = FlashFaults() if faults is None else faults
        self._memory = bytearray(memory_bytes)
        self._dram = np.zeros(dram_bytes, np.uint8)
        self.flash = Flash(config, self.faults)
        self._owners = Owners(config)
        self._powered = True
        self._random = None if shuffle is None else random.Random(shuffle)
        self._reset()

    def _reset(self) -> None:
        self._registers = {name: register.reset for name, register in REGISTER_MAP.items()}
        self.traffic = Traffic()
        self._queues = Queues()
        # What is under way, only with `shuffle`: commands by what serves them in order, and endings without completion.
        self._fetched: dict[Any, deque[tuple[Queue, bytes | None]]] = {}
        self._served: list[_Ending] = []
        self._registers["CONFIG_HASH"] = self.config.hash
        self._registers["STATUS"] = int(StatusBit.READY)

    def power_up(self) -> None:
        """The device after its supply came back: flash is what it was; DRAM, map, owners and registers are not."""
        self._powered = True
        self._dram = np.zeros(self.dram_bytes, np.uint8)
        self.flash.map.clear()
        self._owners = Owners(self.config)
        self._reset()

    # Transport.

    def read_register(self, name: str) -> int:
        """See `Transport`; a write-only register reads 0.

        Raises:
            RequestError: there is no such register.
        """
        self._go_on()
        if _register(name).access is Access.WO or not self._powered:
            return 0
        if name == "INTERRUPTS":
            return self._interrupts
        return self._registers[name] | (StatusBit.BUSY if name == "STATUS" and self._busy else 0)

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`; what is written to a read-only register is lost.

        Raises:
            RequestError: there is no such register, or the value does not fit it.
        """
        register = _register(name)
        if not 0 <= value < 1 << register.width:
            raise RequestError(f"{name} has {register.width} bits: {value:#x} does not fit")
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
            RequestError: outside of the host memory.
        """
        _check_range("host memory", self.memory_bytes, address, size)
        self._go_on()
        return bytes(self._memory[address : address + size])

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
        """
        _check_range("host memory", self.memory_bytes, address, len(data))
        self._memory[address : address + len(data)] = data

    def read_dram(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of the device DRAM.
        """
        _check_range("device DRAM", self.dram_bytes, address, size)
        return self._dram[address : address + size].tobytes()

    def write_dram(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the device DRAM.
        """
        _check_range("device DRAM", self.dram_bytes, address, len(data))
        self._dram[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.  This never waits: time passes only here and in other calls.

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
        """See `Transport`; there is nothing to give back."""

    # The device's side.

    @property
    def _busy(self) -> bool:
        return bool(self._fetched or self._served) or self._queues.fetchable

    @property
    def _interrupts(self) -> int:
        return self._queues.interrupts(self._registers["INTERRUPT_AFTER"] & 0xFFFF)

    def _ring(self, queue: int, completion: bool, value: int) -> None:
        """A doorbell."""
        registers = self._registers
        if not self._queues.doorbell(queue, value, completion=completion):
            if not registers["STATUS"] & StatusBit.INVALID_DOORBELL:
                registers["DOORBELL_ERROR"] = queue << 24 | completion << 16 | value & 0xFFFF
                registers["STATUS"] |= StatusBit.INVALID_DOORBELL
            return
        if self._random is not None:
            self._go_on()
        else:
            while self._step():
                pass

    def _go_on(self) -> None:
        """A few steps, where they are random."""
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
            if queue is not None:
                self._post(self._serve(queue, self._fetch(queue)))
            return queue is not None
        except PowerCutError:
            self._powered = False
            return False

    def _random_step(self, rng: random.Random) -> bool:
        fetched, served = self._fetched, self._served
        choices = [name for name, there in (
            ("fetch", self._queues.fetchable), ("serve", fetched), ("post", served)) if there]
        if not choices:
            return False
        choice = rng.choice(choices)
        if choice == "fetch" and (queue := self._queues.next()) is not None:
            line = self._fetch(queue)
            fetched.setdefault(_unit(line), deque()).append((queue, line))
        elif choice == "serve":
            unit = rng.choice(list(fetched))
            served.append(self._serve(*fetched[unit].popleft()))
            if not fetched[unit]:
                del fetched[unit]
        elif choice == "post":
            first = next((ending for ending in served if ending.ordered), None)
            ending = rng.choice([ending for ending in served if not ending.ordered or ending is first])
            served.remove(ending)
            self._post(ending)
        return True

    def _fetch(self, queue: Queue) -> bytes | None:
        """The next command's line; None: it cannot be read."""
        self._count("FETCHED")
        try:
            return self._dma_read(queue.fetch(), LINE_BYTES)
        except RejectedError:
            return None

    def _post(self, ending: _Ending) -> None:
        queue, identifier, status, where, flags, _ = ending
        self._dma_write(*queue.post(identifier, status, where, flags))
        self._count("COMPLETED")

    def _count(self, name: str) -> None:
        self._registers[name] = self._registers[name] + 1 & 0xFFFF_FFFF

    def _serve(self, queue: Queue, line: bytes | None) -> _Ending:
        """Run one command."""
        if line is None:
            return _Ending(queue, _UNKNOWN_IDENTIFIER, Status.BUS_ERROR, 0, 0, False)
        opcode, identifier = line[0], int.from_bytes(line[2:4], "little")
        status, where, flags = Status.OK, 0, CompletionFlag(0)
        try:
            if opcode not in _RECORDS:
                raise RejectedError(Status.INVALID_OPCODE, opcode)
            if opcode >= ADMIN_OPCODES and queue.number != 0:
                raise RejectedError(Status.NOT_PERMITTED, 0)
            command = _RECORDS[opcode].unpack(line)
            if any(value for name, value in command.items() if name == "flags" or name.startswith("reserved")):
                raise RejectedError(Status.INVALID_FIELD, 0)
            if opcode == Opcode.ATTEND:
                self._validate(command, queue)
                trace, unreadable = self._attend(command)
                flags = trace.flags
                _raise_first(*unreadable.items(), (Status.NAN_KEY, trace.nan_key), (Status.NAN_VALUE, trace.nan_value))
                if not self._dma_write(command["result"], self._pack_result(trace)):
                    raise RejectedError(Status.BUS_ERROR, 0)
            elif _RECORDS[opcode] is FLASH_COMMAND:
                self._operate(command, queue)
            else:
                self._administer(command, queue)
        except RejectedError as rejected:
            status, where = rejected.args
        return _Ending(queue, identifier, status, where, flags, opcode == Opcode.ATTEND)

    def _administer(self, command: dict[str, int], queue: Queue) -> None:
        """A command that concerns neither K and V nor flash."""
        match command["opcode"]:
            case Opcode.CREATE_QUEUE:
                self._queues.create(command)
            case Opcode.DELETE_QUEUE:
                if any(command[name] for name in ("entries", "submission", "completion", "base", "limit")):
                    raise RejectedError(Status.INVALID_FIELD, 0)
                self._queues.delete(command["queue"])
            case Opcode.GRANT:
                self._owners.grant(command)
            case Opcode.IDENTIFY:
                self._write_block(command, queue, self.config.to_json().encode().ljust(IDENTIFY_BYTES, b"\0"))
            case Opcode.COUNTERS:
                data = b"".join(self._registers[counter.name].to_bytes(8, "little") for counter in COUNTERS)
                self._write_block(command, queue, data.ljust(lines(len(data)) * LINE_BYTES, b"\0"))

    def _write_block(self, command: dict[str, int], queue: Queue, data: bytes) -> None:
        if not queue.holds(command["result"], len(data)):
            raise RejectedError(Status.INVALID_ADDRESS, 1)
        if not self._dma_write(command["result"], data):
            raise RejectedError(Status.BUS_ERROR, 0)

    @property
    def _region_bits(self) -> int:
        return self._registers["REGION_BITS"] & 0xF

    # Attention.

    def _validate(self, command: dict[str, int], queue: Queue) -> None:
        config = self.config
        mode, pages, stripes = command["mode"], command["stripe_pages"], command["stripes"]
        codewords = pages * config.codewords_per_page
        forbidden: list[str] = []
        if mode == Mode.DENSE:
            forbidden = ["features", "top_units", "local_tokens", "sinks", "unit_bits"]
        elif mode > max(Mode) or not config.sparse or pages != config.group_pages:
            raise RejectedError(Status.INVALID_FIELD, 0)
        elif mode == Mode.CENTROID:
            forbidden = ["features"]
        elif mode == Mode.SPARF:
            forbidden = ["unit_bits"]
        if any(command[name] for name in forbidden) or pages == 0 or pages & (pages - 1) or (
                codewords > config.ring_codewords):
            raise RejectedError(Status.INVALID_FIELD, 0)
        if not 1 <= command["rows"] <= config.rows:
            raise RejectedError(Status.INVALID_ROWS, command["rows"])
        tokens = command["end_token"] - command["base_token"]
        stripe = pages * config.tokens_per_page
        fitting = (stripes - 1) * stripe < tokens <= stripes * stripe
        if tokens <= 0 or not fitting or stripes > config.channels * (config.ring_codewords // codewords):
            raise RejectedError(Status.INVALID_LENGTH, 0)
        blended = mode in (Mode.SPARF, Mode.FETCHED)
        if mode != Mode.DENSE:
            unit_tokens = 1 if mode == Mode.SPARF else config.tokens_per_codeword << command["unit_bits"]
            for where, bad in enumerate((
                blended and not 1 <= command["features"] <= config.head_dim,
                not 1 <= command["top_units"] <= -(-tokens // unit_tokens),
                command["local_tokens"] > command["top_units"] * unit_tokens,
                command["unit_bits"] > config.unit_bits_max,
            )):
                if bad:
                    raise RejectedError(Status.INVALID_SELECTION, where)
        entry = TABLE_ENTRY.size if mode == Mode.DENSE else TABLE_ENTRY.size + SKETCH_ENTRY.size
        for where, name, size in (
            (0, "query", command["rows"] * query_row_bytes(config.head_dim)),
            (1, "result", command["rows"] * result_row_bytes(config.head_dim)),
            (2, "table", blended * fp32_block_bytes(config.head_dim) + stripes * entry),
        ):
            if not queue.holds(command[name], size):
                raise RejectedError(Status.INVALID_ADDRESS, where)
        if not is_positive_normal(command["scale"]):
            raise RejectedError(Status.INVALID_SCALE, 0)
        self._owners.check_permitted(command["domain"], queue.number)

    def _attend(self, command: dict[str, int]) -> tuple[dense.Trace | sparse.SparseTrace, dict[Status, int | None]]:
        """What golden says, with zeros for what cannot be read; and the first tokens of that."""
        config, rows = self.config, command["rows"]
        mode, stripes = Mode(command["mode"]), command["stripes"]
        data = self._dma_read(command["query"], rows * query_row_bytes(config.head_dim))
        # The table's lines are read whole.
        words = stripes if mode is Mode.DENSE else 2 * stripes
        before = fp32_block_bytes(config.head_dim) if mode in (Mode.SPARF, Mode.FETCHED) else 0
        table = self._dma_read(command["table"], before + lines(words * TABLE_ENTRY.size) * LINE_BYTES)
        entries = np.frombuffer(table, "<u8", words, before).astype(np.uint64).reshape(stripes, -1)
        mean = np.frombuffer(table, "<u4", config.head_dim).astype(np.uint32) if before else None
        flags = entries[:, 0] >> np.uint64(8 * TABLE_ENTRY["flags"].offset)
        if mode is Mode.DENSE:
            reserved = flags & ~np.uint64(TableFlag.DRAM) != 0
        else:
            # Codeword and `written` are looked at as numbers.
            sketch_reserved = entries[:, 1] >> np.uint64(8 * SKETCH_ENTRY["reserved"].offset)
            reserved = (flags & ~np.uint64(TableFlag.DRAM | TableFlag.WHOLE) != 0) | (sketch_reserved != 0)
        stripe = _Stripes(
            layout.unpack_entries(entries[:, 0]), layout.unpack_sketches(entries[:, -1]), reserved)
        self._check_table(command, stripe, mode)
        block = np.frombuffer(data, np.uint8).reshape(rows, -1)
        query = np.ascontiguousarray(block[:, ROW.size : ROW.size + config.head_dim * ELEMENT_BYTES]).view("<u2")
        # A query or mean with a NaN reaches no lane, so nothing is read for it.
        if (nan := dense.first_special(query, config.element)) is not None:
            raise RejectedError(Status.NAN_QUERY, nan[0] << 16 | nan[1])
        if mean is not None and (special := (mean & FP32_SPECIAL) == FP32_SPECIAL).any():
            raise RejectedError(Status.NAN_MEAN, int(special.argmax()))

        def column(name: str) -> NDArray[np.int64]:
            record = ROW[name]
            words = np.ascontiguousarray(block[:, record.offset : record.offset + record.size]).view("<u4")
            return words[:, 0].astype(np.int64)

        query = query.astype(np.uint16)
        job: dict[str, Any] = {
            "element": config.element, "scale_bits": command["scale"], "start": column("start_token"),
            "end": column("end_token"), "tree": column("tree"), "tree_token": command["tree_token"]}
        limits: dict[str, Any] = {"base_token": command["base_token"], "end_token": command["end_token"]}
        lost: dict[Status, int | None] = {}
        # Codewords behind the last token are not read.
        codewords = np.arange(-(-(command["end_token"] - command["base_token"]) // config.tokens_per_codeword))
        if mode is Mode.DENSE:
            key, lost[Status.UNREADABLE_KEY] = self._tokens(command, stripe, Kind.KEY, codewords)
            value, lost[Status.UNREADABLE_VALUE] = self._tokens(command, stripe, Kind.VALUE, codewords)
            return dense.attend(query, key, value, **job, **limits), lost

        tail = stripe.tail
        if mode is Mode.CENTROID:
            # Not looked at in the first pass.
            key = np.zeros((stripes * config.group_tokens, config.head_dim), np.uint16)
            sketch, gone = self._centroids(command, stripe)
        else:
            of_tail = codewords[tail[codewords // config.group_codewords]]
            sketch, gone = self._features(
                command, stripe, sparse.top_features(query, command["features"], config.element))
            key, gone_tail = self._tokens(command, stripe, Kind.SKETCH, of_tail)
            gone = min((token for token in (gone, gone_tail) if token is not None), default=None)
        lost[Status.UNREADABLE_SKETCH] = gone
        first = sparse.first_pass(
            query, key, sketch=sketch, tail=tail, features=command["features"], top_units=command["top_units"],
            local_tokens=command["local_tokens"], sinks=command["sinks"], **job, **limits, layout=sparse.Layout(
                group_tokens=config.group_tokens, tokens_per_codeword=config.tokens_per_codeword, mode=mode,
                unit_bits=command["unit_bits"]))
        key, lost[Status.UNREADABLE_KEY] = self._tokens(command, stripe, Kind.KEY, first.codewords)
        value, lost[Status.UNREADABLE_VALUE] = self._tokens(command, stripe, Kind.VALUE, first.codewords)
        return sparse.second_pass(first, query, key, value, mean=mean, **job), lost

    def _check_table(self, command: dict[str, int], stripe: "_Stripes", mode: Mode) -> None:
        """Refuse what is no channel or codeword, reserved bits, and more stripes than a channel has places for.

        Then what is not the domain's, then stripes that are not attended whole and of which the mode's first pass has
        nothing to read.
        """
        entries = stripe.entries
        places = self.config.ring_codewords // (command["stripe_pages"] * self.config.codewords_per_page)
        bad = (entries.channel >= self.config.channels) | stripe.reserved
        for channel in range(self.config.channels):
            bad[np.flatnonzero(entries.channel == channel)[places:]] = True
        if mode is not Mode.DENSE:
            # The feature layout begins with a page.
            codewords = self.config.codewords_per_page if mode is Mode.CENTROID else 1
            bad |= (stripe.sketch.written > 1) | (stripe.sketch.codeword >= codewords)
        if bad.any():
            raise RejectedError(Status.INVALID_TABLE, int(np.argmax(bad)))
        foreign = self._owners.first_foreign(command, entries, stripe.sketch, self._region_bits)
        if foreign is not None:
            raise RejectedError(Status.NOT_OWNED, foreign)
        missing = ~stripe.tail & (stripe.sketch.written == 0)
        if mode is not Mode.DENSE and missing.any():
            raise RejectedError(Status.NO_SKETCH, int(np.argmax(missing)))

    def _tokens(self, command: dict[str, int], stripe: "_Stripes", kind: Kind,
                codewords: NDArray[np.int64]) -> tuple[NDArray[np.uint16], int | None]:
        """K or V from base_token on, in whole stripes; and the first token that cannot be read.

        `codewords` are those that are read, ascending, counted from base_token; all others are zero.
        """
        config, count = self.config, command["stripe_pages"]
        per_page = config.codewords_per_page
        images = np.zeros((command["stripes"] * count * per_page, config.codeword_bytes), np.uint8)
        first_pages = stripe.entries.value_page if kind is Kind.VALUE else stripe.entries.key_page
        lost: int | None = None
        pages = np.unique(codewords // per_page)
        ends = np.searchsorted(codewords, np.append(pages, codewords[-1:] // per_page + 1) * per_page).tolist()
        for page, begin, end in zip(pages.tolist(), ends, ends[1:], strict=False):
            number, inside = divmod(page, count)
            wanted = codewords[begin:end]
            images[wanted], gone = self._read(
                kind, int(stripe.entries.channel[number]), int(first_pages[number]) + inside,
                wanted - page * per_page, dram=bool(stripe.entries.dram[number]))
            if gone is not None and lost is None:
                lost = command["base_token"] + int(wanted[gone]) * config.tokens_per_codeword
        return layout.unpack_pages(images.reshape(-1, config.page_bytes), config), lost

    def _sketch(self, kind: Kind, stripe: "_Stripes", number: int,
                codewords: NDArray[np.int64]) -> tuple[NDArray[np.uint8], int | None]:
        """Codewords of a stripe's sketch, (codewords, codeword_bytes), and which of them is the first that is lost."""
        found = np.zeros((len(codewords), self.config.codeword_bytes), np.uint8)
        page, codewords = np.divmod(codewords + int(stripe.sketch.codeword[number]), self.config.codewords_per_page)
        lost: int | None = None
        for each in np.unique(page).tolist():
            places = np.flatnonzero(page == each)
            found[places], gone = self._read(
                kind, int(stripe.entries.channel[number]), int(stripe.sketch.page[number]) + each, codewords[places],
                dram=False)
            if gone is not None and lost is None:
                lost = int(places[gone])
        return found, lost

    def _features(self, command: dict[str, int], stripe: "_Stripes",
                  features: NDArray[np.int64]) -> tuple[NDArray[np.uint16], int | None]:
        """Some features of K of the stripes outside of the tail, else zeros; first token of the first stripe lost."""
        size = self.config.group_tokens
        key = np.zeros((command["stripes"] * size, self.config.head_dim), np.uint16)
        lost: int | None = None
        for number in np.flatnonzero(~stripe.tail).tolist():
            found, gone = self._sketch(Kind.FEATURE, stripe, number, features)
            key[number * size : (number + 1) * size, features] = found.view("<u2").T
            if gone is not None and lost is None:
                lost = command["base_token"] + number * size
        return key, lost

    def _centroids(self, command: dict[str, int], stripe: "_Stripes") -> tuple[NDArray[np.uint16], int | None]:
        """Mean keys of all units, zero for those of the tail; first token of the first that is lost."""
        config = self.config
        units = config.group_codewords >> command["unit_bits"]
        codewords = np.arange(units // config.tokens_per_codeword)
        key = np.zeros((command["stripes"], units, config.head_dim), np.uint16)
        lost: int | None = None
        for number in np.flatnonzero(~stripe.tail).tolist():
            found, gone = self._sketch(Kind.SKETCH, stripe, number, codewords)
            used = np.ascontiguousarray(found[:, : config.tokens_per_codeword * config.token_bytes])
            key[number] = used.view("<u2").reshape(units, config.head_dim)
            if gone is not None and lost is None:
                unit = number * units + gone * config.tokens_per_codeword
                token = command["base_token"] + unit * (config.tokens_per_codeword << command["unit_bits"])
                lost = token if token < command["end_token"] else None   # what lies behind it matters to nobody
        return key.reshape(-1, config.head_dim), lost

    def _read(self, kind: Kind, channel: int, number: int, codewords: NDArray[np.int64], *,
              dram: bool) -> tuple[NDArray[np.uint8], int | None]:
        """Codewords of a page, zeros where they cannot be read; which of them is the first that cannot."""
        config = self.config
        number &= (1 << PAGE_NUMBER_BITS) - 1
        self._registers["BEATS"] += len(codewords) * config.beats_per_codeword
        if dram:
            self.traffic.dram[kind] += len(codewords)
            image = np.zeros(config.page_bytes, np.uint8)
            there = self._read_dram_page(image, number)
            gone = [] if there is None else np.flatnonzero(codewords >= there).tolist()
            return image.reshape(-1, config.codeword_bytes)[codewords], gone[0] if gone else None
        registers, count = self._registers, len(codewords)
        self.traffic.flash[kind] += count
        self.traffic.page_reads += 1
        registers["CODEWORDS"] += count
        registers["FLASH_WORDS"] += count * config.raw_codeword_words
        registers["PAGE_READS"] += 1
        found, gone, cause = self.flash.read_page(channel, number, codewords)
        registers["UNREADABLE"] += len(gone)
        if not gone:
            return found, None
        self._media_error(channel, number, int(codewords[gone[0]]), cause)
        return found, gone[0]

    def _read_dram_page(self, image: NDArray[np.uint8], page: int) -> int | None:
        """Fill in a page of DRAM; the first codeword that is not inside of it."""
        data = self._dram[page * self.config.page_bytes :][: self.config.page_bytes]
        codewords = len(data) // self.config.codeword_bytes
        data = data[: codewords * self.config.codeword_bytes]
        image[: len(data)] = data
        return None if codewords == self.config.codewords_per_page else codewords

    def _media_error(self, channel: int, page: int, codeword: int, cause: MediaCause) -> None:
        registers = self._registers
        if not registers["STATUS"] & StatusBit.MEDIA_ERROR:
            registers["MEDIA_ERROR"] = channel << 24 | page
            registers["MEDIA_CAUSE"] = cause << 16 | codeword
            registers["STATUS"] |= StatusBit.MEDIA_ERROR

    def _pack_result(self, trace: dense.Trace | sparse.SparseTrace) -> bytes:
        rows, dim = trace.output.shape
        block = np.zeros((rows, result_row_bytes(dim)), np.uint8)
        block[:, : dim * 4] = trace.output.astype("<u4").view(np.uint8)
        at = lines(dim * 4) * LINE_BYTES
        for name, values in (("maximum", trace.maximum), ("denominator", trace.denominator)):
            record = TRAILER[name]
            column = values.astype("<i8")[:, None].view(np.uint8)
            block[:, at + record.offset : at + record.offset + record.size] = column
        return block.tobytes()

    # Flash.

    def _operate(self, command: dict[str, int], queue: Queue) -> None:
        """One flash command."""
        config = self.config
        opcode, channel, number = Opcode(command["opcode"]), command["channel"], command["page"]
        owned = opcode is Opcode.PROGRAM or (opcode is Opcode.ERASE and queue.number != 0)
        if (command["argument"] and opcode in (Opcode.ERASE, Opcode.PROBE)) or (command["domain"] and not owned):
            raise RejectedError(Status.INVALID_FIELD, 0)
        if not self.flash.is_place(channel, number) or (
                opcode is Opcode.MAP and command["argument"] >= config.part.blocks):
            raise RejectedError(Status.INVALID_PLACE, 0)
        if owned:
            self._owners.check_permitted(command["domain"], queue.number)
            if not self._owners.owns_pages(command["domain"], number, 1):
                raise RejectedError(Status.NOT_OWNED, 0)
            if opcode is Opcode.PROGRAM and not self._owners.owns_dram(
                    command["domain"], command["argument"], 1, self._region_bits):
                raise RejectedError(Status.NOT_OWNED, 1)
        if opcode is Opcode.MAP:
            place = layout.page_place(number, config)
            self.flash.map[channel, place.zone, place.die, place.plane] = command["argument"]
            return
        image = None
        if opcode is Opcode.PROGRAM:
            image = np.zeros(config.page_bytes, np.uint8)
            if self._read_dram_page(image, command["argument"]) is not None:
                image = None
            self._registers["FLASH_WORDS"] += config.codewords_per_page * config.raw_codeword_words
        self._registers["FLASH_WORDS"] += 1     # of status, or the mark
        self._registers[_OPERATIONS[opcode]] += 1
        self.flash.operate(opcode, channel, number, image)

    def written(self) -> Iterator[tuple[Block, int, NDArray[np.uint8]]]:
        """See `Flash.written`."""
        return self.flash.written()

    # Host memory.

    def _dma_read(self, address: int, size: int) -> bytes:
        if address + size > self.memory_bytes:
            self._registers["STATUS"] |= StatusBit.BUS_ERROR
            raise RejectedError(Status.BUS_ERROR, 0)
        return bytes(self._memory[address : address + size])

    def _dma_write(self, address: int, data: bytes) -> bool:
        """Whether the host memory took it."""
        if address + len(data) > self.memory_bytes:
            self._registers["STATUS"] |= StatusBit.BUS_ERROR
            return False
        self._memory[address : address + len(data)] = data
        return True


def _unit(line: bytes | None) -> Any:
    """What serves commands in the order in which it gets them; an object of its own if nothing does."""
    if line is None or line[0] not in _RECORDS:
        return object()
    if _RECORDS[line[0]] is FLASH_COMMAND:
        return FLASH_COMMAND.unpack(line)["channel"]
    return "attention" if line[0] == Opcode.ATTEND else "admin"


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def _raise_first(*found: tuple[Status, int | None]) -> None:
    for status, where in found:
        if where is not None:
            raise RejectedError(status, where)


def _check_range(name: str, total: int, address: int, size: int) -> None:
    if address < 0 or size < 0 or address + size > total:
        raise RequestError(f"{name} is 0 to {total:#x}: {size} bytes at {address:#x} are not in it")


def _register(name: str) -> Any:
    try:
        return REGISTER_MAP[name]
    except KeyError:
        raise RequestError(f"there is no register {name!r}; registers are {', '.join(REGISTER_MAP)}") from None
