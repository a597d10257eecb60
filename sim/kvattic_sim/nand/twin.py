"""Behavioural twin of one channel's NAND dies and PHY, cycle by cycle.

The reference for verilog/nand_channel.sv, and the other side of the PHY interface (`kvattic_hdl.flash.phy`) in unit
tests.  Both do the same in the same cycle; docs/nand.md says what.  `attach` plays the dies for an Amaranth component.

Internal times are ticks, 2**-20 of a cycle: the bus rate and t_cad are not whole cycles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from amaranth.hdl import ValueCastable

from kvattic.spec.config import Config
from kvattic.spec.nand import COLUMN_CYCLES, ROW_CYCLES, T_RST_IDLE, NandPart
from kvattic.support.files import write_whole

__all__ = [
    "FRACTION",
    "Event",
    "Fault",
    "NandChannel",
    "NandFaults",
    "PhyOutputs",
    "Timing",
    "Violation",
    "attach",
    "onfi_crc",
    "parameter_page",
    "read_id",
    "write_configuration",
]

FRACTION = 20
"""Bits of a tick below a cycle."""
ONE = 1 << FRACTION
NEVER = 1 << 62
FEATURES = (0x01, 0x02, 0x10, 0x89)
"""Features of a die: timing mode, NV-DDR2 configuration, drive strength, read retry."""
RETRY_FEATURE = 0x89
ID_BYTES = 8
PARAMETER_COPIES = 3
PARAMETER_BYTES = 256
ECC_BYTES = 512
"""Data bytes that the parameter page tells the ECC's bits for."""
ECC_BITS_MAX = 254
"""The most that it can tell: 255 points to an extended page, which no die has."""
NV_DDR2_MTS = (66, 80, 133, 166, 200, 266, 333, 400, 533, 667, 800)
"""ONFI's timing modes of NV-DDR2, in millions of transfers per second."""
VENDOR_REVISION_AT, READ_RETRY_AT = 164, 180
"""In the vendor's block: its revision, and how many read-retry settings there are, where Micron's dies have it."""
_MASK32 = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------- identity


def onfi_crc(data: bytes) -> int:
    """ONFI's CRC-16 of a parameter page: polynomial 8005h, first value 4F4Eh, most significant bit first."""
    crc = 0x4F4E
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8005 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


def read_id(address: int) -> bytes:
    """What a die answers to 90h: at 00h maker and device, at 20h ONFI's signature, else zeros."""
    if address == 0x20:
        return b"ONFI" + bytes(ID_BYTES - 4)
    if address == 0:
        return bytes([0x4B, 0x56, 0x41, 0x54, 0x01]) + bytes(ID_BYTES - 5)
    return bytes(ID_BYTES)


def parameter_page(part: NandPart, ecc_bits: int, codeword_bytes: int = ECC_BYTES) -> bytes:
    """One copy of the part's ONFI parameter page, as of ONFI 4.0; times that do not fit are the largest possible.

    Args:
        part: what is told.
        ecc_bits: bit errors that must be corrected in each codeword.
        codeword_bytes: data bytes of a codeword.  The page tells the bits for 512 bytes, whatever a codeword is.
    """
    page = bytearray(PARAMETER_BYTES)

    def put(at: int, value: float, size: int) -> None:
        page[at : at + size] = min(math.ceil(value), (1 << 8 * size) - 1).to_bytes(size, "little")

    modes = sum(1 << mode for mode, rate in enumerate(NV_DDR2_MTS) if rate <= part.bus_mts)
    page[0:4] = b"ONFI"
    put(4, 0x03FE, 2)  # a bit for each revision: 1.0, 2.0 to 2.3, 3.0 to 3.2, 4.0
    # Features: multi-plane program and erase, multi-plane read, NV-DDR2.
    put(6, 1 << 3 | 1 << 6 | (modes != 0) << 10, 2)
    # Optional commands: program cache, read cache, get and set features, status enhanced, change read column enhanced.
    put(8, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, 2)
    put(14, PARAMETER_COPIES, 1)
    page[32:44] = b"KVATTIC".ljust(12)
    page[44:64] = part.name.upper().encode("ascii", "replace")[:20].ljust(20)
    put(64, 0x4B, 1)
    put(80, part.page_bytes, 4)
    put(84, part.spare_bytes, 2)
    put(92, part.pages, 4)
    put(96, part.blocks * part.planes, 4)
    put(100, 1, 1)  # LUNs
    put(101, COLUMN_CYCLES << 4 | ROW_CYCLES, 1)
    put(102, part.cell_bits, 1)
    put(103, max(1, part.blocks * part.planes // 50), 2)
    exponent = 0
    endurance = part.endurance
    while endurance > 255:
        endurance, exponent = endurance // 10, exponent + 1
    put(105, exponent << 8 | endurance, 2)  # value in the first byte, power of ten in the second
    put(107, 1, 1)
    put(110, 1, 1)  # programs of a page
    put(112, min(ecc_bits * ECC_BYTES / codeword_bytes, ECC_BITS_MAX), 1)
    put(113, part.row_plane_bits, 1)
    put(114, 1 << 1 | 1 << 2 | 1 << 4, 1)  # multi-plane: no block restrictions, program cache, read cache
    put(129, 1 << 0, 2)  # SDR: mode 0, in which each die wakes up
    put(133, part.t_prog / 1000, 2)
    put(135, part.t_bers / 1000, 2)
    put(137, part.t_r / 1000, 2)
    put(139, part.t_ccs, 2)
    put(142, modes & 0xFF, 1)
    put(152, part.t_r / 1000, 2)  # of several planes: they are read together
    put(154, part.t_adl, 2)
    put(162, modes >> 8, 1)
    put(VENDOR_REVISION_AT, 1, 2)
    put(READ_RETRY_AT, part.retry_levels + 1, 1)
    put(254, onfi_crc(bytes(page[:254])), 2)
    return bytes(page)


# ---------------------------------------------------------------------------------------------- faults


class Fault(IntEnum):
    """Kinds of an entry of the fault list, as verilog/nand_channel.sv numbers them."""

    FACTORY_BAD = 1
    GROWN_BAD = 2
    PROGRAM_FAIL = 3
    ERASE_FAIL = 4
    STUCK_BUSY = 5
    RETRY = 6
    STUCK_COLUMN = 7
    FACTORY_MARK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class NandFaults:
    """What is wrong with the dies of a channel.

    Attributes:
        bit_error_rate: probability that a bit is read wrong.
        retry_error_rate: the same at a read-retry level that is not the one that `retry` asks for.
        factory_bad: (die, plane, block), marked as bad in all pages in which the part may have its mark; or (die,
            plane, block, page), marked in this page alone.  Programs and erases fail.
        grown_bad: (die, plane, block, erases): after that many erases its programs and erases fail.
        program_fails: (die, plane, block, page): programs of this page fail; page None: of all its pages.
        erase_fails: (die, plane, block): erases of this block fail.
        stuck_busy: (die, n): its nth array operation (the first is 1) never ends; a reset does not help.
        retry: (die, plane, block, page, level): can be read at this read-retry level only; block, page None: all.
        stuck_columns: (die, plane, column, mask, value): bits `mask` of this byte of each page are read as in `value`.
        power_cuts: (cycle, cycles): power fails in this cycle (counted from `configure`) and stays off for `cycles`.
    """

    bit_error_rate: float = 0.0
    retry_error_rate: float = 0.01
    factory_bad: tuple[tuple[int, int, int] | tuple[int, int, int, int], ...] = ()
    grown_bad: tuple[tuple[int, int, int, int], ...] = ()
    program_fails: tuple[tuple[int, int, int, int | None], ...] = ()
    erase_fails: tuple[tuple[int, int, int], ...] = ()
    stuck_busy: tuple[tuple[int, int], ...] = ()
    retry: tuple[tuple[int, int, int | None, int | None, int], ...] = ()
    stuck_columns: tuple[tuple[int, int, int, int, int], ...] = ()
    power_cuts: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("bit_error_rate", "retry_error_rate"):
            if getattr(self, name) and not 1e-12 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0, or from 1e-12 to below 1, not {getattr(self, name)!r}")
        if list(self.power_cuts) != sorted(self.power_cuts):
            raise ValueError(f"power_cuts must be in the order of their cycles, not {self.power_cuts!r}")

    def entries(self, part: NandPart) -> list[tuple[int, int, int, int, int, int]]:
        """All but the power cuts as (kind, die, plane, block, page, value); -1 stands for any.

        Args:
            part: says in which pages its maker's marks are.
        """

        def some(value: int | None) -> int:
            return -1 if value is None else value

        return [
            *((Fault.FACTORY_BAD, d, p, b, -1, 0) for d, p, b, *_ in self.factory_bad),
            *((Fault.FACTORY_MARK, d, p, b, page, 0) for d, p, b, *pages in self.factory_bad
              for page in pages or part.marked_pages),
            *((Fault.GROWN_BAD, d, p, b, -1, n) for d, p, b, n in self.grown_bad),
            *((Fault.PROGRAM_FAIL, d, p, b, some(page), 0) for d, p, b, page in self.program_fails),
            *((Fault.ERASE_FAIL, d, p, b, -1, 0) for d, p, b in self.erase_fails),
            *((Fault.STUCK_BUSY, d, -1, -1, -1, n) for d, n in self.stuck_busy),
            *((Fault.RETRY, d, p, some(b), some(page), level) for d, p, b, page, level in self.retry),
            *((Fault.STUCK_COLUMN, d, p, column, mask, value) for d, p, column, mask, value in self.stuck_columns),
        ]


# ---------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A part's times in ticks of one clock, rounded down: waits of whole cycles, rounded up, always suffice."""

    t_r: int
    t_prog: int
    t_bers: int
    t_dbsy: int
    t_rcbsy: int
    t_pcbsy: int
    t_wb: int
    t_rr: int
    t_ccs: int
    t_adl: int
    t_whr: int
    t_cad: int
    t_pre: int
    t_feat: int
    t_rst: int
    t_rst_idle: int
    t_byte: int

    @classmethod
    def of(cls, config: Config) -> Timing:
        """Of the configuration's part, at its clock."""

        def ticks(nanoseconds: float) -> int:
            return math.floor(round(nanoseconds * config.clock_mhz / 1000, 6) * ONE)

        part = config.part
        names = (name for name in cls.__slots__ if name not in ("t_rst_idle", "t_byte"))
        # A word a cycle is the most that the interface moves.
        t_byte = max(round(config.clock_mhz / part.bus_mts * ONE), ONE // config.word_bytes)
        return cls(**{name: ticks(getattr(part, name)) for name in names},
                   t_rst_idle=ticks(min(T_RST_IDLE, part.t_rst)), t_byte=t_byte)


def write_configuration(path: Path, config: Config, *, faults: NandFaults | None = None, seed: int = 0,
                        trace: bool = False) -> None:
    """Write nand<channel>.cfg, which nand_channel.sv reads when `configure` changes: times, faults, trace or not."""
    faults = faults or NandFaults()
    timing = Timing.of(config)
    lines = [f"{name} {getattr(timing, name)}" for name in Timing.__slots__]
    lines += [f"seed {seed & _MASK32}", f"trace {int(trace)}"]
    lines += [f"bit_error_rate {faults.bit_error_rate!r}", f"retry_error_rate {faults.retry_error_rate!r}"]
    lines += ["parameters " + " ".join(map(str, parameter_page(config.part, config.ecc_t, config.codeword_bytes)))]
    lines += ["fault " + " ".join(str(int(value)) for value in entry) for entry in faults.entries(config.part)]
    lines += [f"power {cycle} {length}" for cycle, length in faults.power_cuts]
    write_whole(path, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------- reports


class Violation(StrEnum):
    """What a controller can do wrong.  The order is that of the numbers in verilog/nand_channel.sv, from 1."""

    NO_DIE = "there is no such die"
    NEEDS_RESET = "needs a reset (FFh) after power-up"
    UNKNOWN = "unknown command"
    BUSY = "cycle while busy"
    T_WB = "cycle before tWB is over"
    MOVING = "cycle while its data move"
    SEQUENCE = "command in the middle of another"
    NO_ADDRESS = "address that no command asked for"
    NO_CONFIRM = "confirmation without its command and addresses"
    RANGE = "address out of range"
    SAME_PLANE = "planes of a multi-plane operation must differ"
    OTHER_PAGE = "planes of a multi-plane operation must have the same page"
    NO_READ = "cache read without a read before it"
    LAST_PAGE = "sequential cache read beyond the block"
    ARRAY_BUSY = "array is busy with another operation"
    NOT_ERASED = "program of a page that is not erased"
    ORDER = "program out of order in its block"
    NOT_HELD = "selected page is not in the plane's register"
    DATA_BUSY = "data while busy"
    T_RR = "data before tRR is over"
    T_CCS = "data before tCCS is over"
    T_WHR = "data before tWHR is over"
    T_ADL = "data before tADL is over"
    NOTHING = "data out, but nothing to read"
    NO_PROGRAM = "data in, but nothing to write to"
    BEYOND = "burst beyond the data"
    EMPTY = "burst of no bytes"
    LEVEL = "read-retry level that the part does not have"
    FEATURE = "feature that the die does not have"


_NUMBERS = {violation: i for i, violation in enumerate(Violation, 1)}


class Event(NamedTuple):
    """Something that took time on a die or the bus, for timelines; start and end in cycles.

    kind: read, program, erase (of the array, as planned), reset, feature (of a die), command, in, out (of the bus).
    plane and page (`NandPart.page_index`) are -1 where they mean nothing.
    """

    start: int
    end: int
    die: int
    plane: int
    kind: str
    page: int


class PhyOutputs(NamedTuple):
    """What the PHY shows its controller in a cycle."""

    cycles_ready: int = 0
    bursts_ready: int = 0
    read: int = 0
    read_valid: int = 0
    write_ready: int = 0
    ready: int = 0


# ---------------------------------------------------------------------------------------------- dies


class _Operation(IntEnum):
    NONE = 0
    READ = 1
    PROGRAM = 2
    ERASE = 3


class _Out(IntEnum):
    NONE = 0
    STATUS = 1
    PLANE_STATUS = 2
    ID = 3
    PARAMETERS = 4
    FEATURE = 5
    REGISTER = 6


_ADDRESSES = {0x00: 5, 0x05: 2, 0x06: 5, 0x60: 3, 0x78: 3, 0x80: 5, 0x81: 5, 0x85: 2, 0x90: 1, 0xEC: 1, 0xEE: 1,
              0xEF: 1}
_CONFIRMS = (0x10, 0x11, 0x15, 0x30, 0x31, 0x32, 0x3F, 0xD0, 0xD1, 0xE0)
_DURING_CACHE_READ = (0x00, 0x05, 0x06, 0x31, 0x32, 0x3F, 0x70, 0x78, 0xE0)
_DURING_CACHE_PROGRAM = (0x10, 0x11, 0x15, 0x70, 0x78, 0x80, 0x81, 0x85)


@dataclass(slots=True)
class _Array:
    """An operation of the array: of all planes in `rows`."""

    kind: _Operation = _Operation.NONE
    start: int = 0
    end: int = 0
    rows: dict[int, int] | None = None
    failed: int = 0
    """Planes that fail, a bit each."""
    cached: bool = False
    """It was confirmed with 15h."""


class _Die:
    def __init__(self, part: NandPart, words: int, word_bytes: int) -> None:
        self.part = part
        self.registers = [np.full(words * word_bytes, 0xFF, np.uint8) for _ in range(part.planes)]
        self.operations = 0
        self.power_up()

    def power_up(self) -> None:
        """Everything that is lost with power."""
        self.needs_reset = True
        self.features = {address: [0, 0, 0, 0] for address in FEATURES}
        self.busy_from = self.busy_until = 0
        self.stuck = False
        self.forget()

    def forget(self) -> None:
        """Everything that a reset clears."""
        self.abandon()
        self.out = self.source = _Out.NONE  # what is read, and what 00h returns to
        self.out_plane = self.status_plane = self.column = self.out_address = 0
        self.program_row = self.program_plane = 0
        self.feature_bytes: list[int] = []
        self.held: list[int | None] = [None] * self.part.planes  # row whose page the register holds
        self.rows: dict[int, int] = {}  # of the last read
        self.last_plane = 0
        self.pending = False  # the last read is not in the registers yet
        self.failed = self.failed_before = 0
        self.before, self.array = _Array(), _Array()
        self.data_from, self.data_rule = 0, Violation.T_WHR

    def abandon(self) -> None:
        """End the sequence under way."""
        self.command = -1
        self.addresses: list[int] = []
        self.sequence_start = 0
        self.program_open = self.feature_open = False
        self.queue = _Operation.NONE
        self.queued: dict[int, int] = {}


class NandChannel:
    """The dies of one channel, and the PHY before them.

    `step` advances one cycle.  Until the first `step` all outputs are 0.  Each die wants FFh first.

    Args:
        config: geometry (`config.part`, `config.dies`), clock, bytes of a word.
        seed: of the bit errors and of what half-done operations leave behind.
        faults: what is wrong.
        channel: number in messages.
        recording: keep `events`.

    Attributes:
        violations: what the controller did wrong: channel, die, cycle, what, with the byte or number of bytes.
        events: what happened when (`Event`); commands from their first cycle to their last.
        now: the cycle that `step` simulates next.
        outputs: what the PHY shows in it.
        powered: false while power fails.
        words_moved, page_reads, page_programs, block_erases, program_failures, erase_failures, bit_flips: counters.
    """

    def __init__(self, config: Config, *, seed: int = 0, faults: NandFaults | None = None, channel: int = 0,
                 recording: bool = True) -> None:
        self.config = config
        self.part = config.part
        self.timing = Timing.of(config)
        self.channel = channel
        self.recording = recording
        self.word_bytes = config.word_bytes
        self.page_words = -(-self.part.raw_bytes // self.word_bytes)
        self.violations: list[str] = []
        self.events: list[Event] = []
        self.now = 0
        self.outputs = PhyOutputs()
        self.powered = True
        self.words_moved = self.page_reads = self.page_programs = self.block_erases = 0
        self.program_failures = self.erase_failures = self.bit_flips = 0
        self._pages: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self._next_page: dict[int, int] = {}  # of a block (index of its first page / pages)
        self._erases: dict[int, int] = {}
        self._garbage: set[int] = set()
        self.dies = [_Die(self.part, self.page_words, self.word_bytes) for _ in range(config.dies)]
        self._parameters = parameter_page(self.part, config.ecc_t, config.codeword_bytes) * PARAMETER_COPIES
        self._cycle_free = self._data_free = 0
        self._ready_at = 0
        self._ready = 0
        self._drop_burst()
        self._data_target = -1
        self.configure(faults or NandFaults(), seed)

    def configure(self, faults: NandFaults, seed: int = 0) -> None:
        """Other faults from now on; their cycles and array operations are counted from now."""
        self.faults = faults
        self.seed = seed & _MASK32
        self._entries = faults.entries(self.part)
        self._random = self._hash((self.channel + 1) * 0x9E3779B1 + self.seed) or 1
        cuts = [(self.now + cycle, self.now + cycle + length) for cycle, length in faults.power_cuts]
        self._power = [time for cut in cuts for time in cut]
        for die in self.dies:
            die.operations = 0

    # Contents.

    def load(self, address: tuple[int, int, int, int], data: bytes | np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Put raw bytes into page `address` (die, plane, block, page) as if it had been programmed; FFh behind them."""
        raw = np.frombuffer(bytes(data), np.uint8)
        if len(raw) > self.part.raw_bytes:
            raise ValueError(f"data must be at most {self.part.raw_bytes} bytes, not {len(raw)}")
        index = self._index(address)
        page = self._blank()
        page[: len(raw)] = raw
        self._pages[index] = page
        block, number = divmod(index, self.part.pages)
        self._next_page[block] = max(self._next_page.get(block, 0), number + 1)

    def dump(self, address: tuple[int, int, int, int]) -> bytes:
        """Raw bytes of a page in the array, without read errors."""
        return self._content(self._index(address))[: self.part.raw_bytes].tobytes()

    def erases(self, die: int, plane: int, block: int) -> int:
        """How often a block was erased."""
        return self._erases.get(self._index((die, plane, block, 0)) // self.part.pages, 0)

    def programmed(self, die: int, plane: int, block: int) -> int:
        """Pages of a block that were programmed since its last erase."""
        return self._next_page.get(self._index((die, plane, block, 0)) // self.part.pages, 0)

    def _index(self, address: tuple[int, int, int, int]) -> int:
        limits = (self.config.dies, self.part.planes, self.part.blocks, self.part.pages)
        if any(not 0 <= value < limit for value, limit in zip(address, limits, strict=True)):
            raise ValueError(f"die, plane, block, page must be below {limits}, not {address!r}")
        return self.part.page_index(*address)

    def _blank(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full(self.page_words * self.word_bytes, 0xFF, np.uint8)

    def _content(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        page = self._pages.get(index)
        if page is None:
            page = self._noise(index) if index // self.part.pages in self._garbage else self._blank()
        return page

    # Randomness: a hash for what has a place, a sequence for errors of reads.

    @staticmethod
    def _hash(value: int) -> int:
        value &= _MASK32
        value ^= value >> 16
        value = value * 0x7FEB352D & _MASK32
        value ^= value >> 15
        value = value * 0x846CA68B & _MASK32
        return value ^ value >> 16

    def _noise(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A page of noise that depends on seed and place alone."""
        chunks = np.arange(self.page_words * self.word_bytes // 4, dtype=np.uint32)
        x = chunks * np.uint32(0x85EBCA77) + np.uint32((index * 0x9E3779B1 + self.seed) & _MASK32)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
        return x.astype("<u4").view(np.uint8).copy()

    def _skip(self, rate: float) -> int:
        """Good bits before the next bad one."""
        x = self._random
        x ^= x << 13 & _MASK32
        x ^= x >> 17
        x ^= x << 5 & _MASK32
        self._random = x
        return int(min(math.log((x + 1) / 4294967296.0) * (1.0 / math.log(1.0 - rate)), 1e9))

    def _matching(self, kind: Fault, die: int, plane: int, block: int, page: int) -> Iterable[int]:
        """Values of the fault entries that meet a page."""
        for k, d, p, b, g, value in self._entries:
            if k == kind and d == die and p == plane and b in (-1, block) and g in (-1, page):
                yield value

    def _any(self, kind: Fault, die: int, plane: int, block: int, page: int) -> bool:
        return next(iter(self._matching(kind, die, plane, block, page)), None) is not None

    # The cycle.

    def step(self, cycle: tuple[int, int, int] | None = None, burst: tuple[int, int, int] | None = None,
             word: int | None = None, reset: bool = False) -> PhyOutputs:
        """Simulate cycle `now`, in which the controller offers what is given; return `outputs` of the next cycle.

        Args:
            cycle: (target, address, byte) on `cycles`; taken if `outputs.cycles_ready`.
            burst: (target, write, bytes) on `bursts`; taken if `outputs.bursts_ready`.
            word: on `write`; taken if `outputs.write_ready`.
            reset: the PHY forgets its burst; the dies keep what they have.
        """
        now = self.now << FRACTION
        after = now + ONE
        shown = self.outputs
        self.now += 1
        if self._power and self.now - 1 >= self._power[0]:
            self._switch_power(now)
        if reset:
            self._drop_burst()
            self._cycle_free = self._data_free = now
        else:
            if cycle is not None and shown.cycles_ready:
                start = max(self._cycle_free, now) if self._cycle_free <= now - ONE else self._cycle_free
                end = start + self.timing.t_cad
                self._cycle_free = end
                if not self.part.separate_command_bus:
                    self._data_free = end
                self._cycle(*cycle, start, end, max(start, now))
            if word is not None and shown.write_ready:
                self._take_word(word, now)
            if burst is not None and shown.bursts_ready:
                start = now if self._data_free <= now - ONE else self._data_free
                self._burst(*burst, start, max(start, now))
        read = read_valid = 0
        if self._left and not self._write and self._word_time <= after:
            read, read_valid = self._next_word(now), 1
        if self._ready_at <= after:
            self._update_ready(after)
        writing = self._left > 0 and self._write
        shared = not self.part.separate_command_bus
        self.outputs = PhyOutputs(
            int(not reset and self._cycle_free <= after and not (shared and writing)),
            int(not reset and self._data_free <= after and not writing),
            read,
            read_valid,
            int(writing and self._word_time <= after),
            self._ready,
        )
        return self.outputs

    def _update_ready(self, time: int) -> None:
        self._ready = 0
        self._ready_at = NEVER
        for i, die in enumerate(self.dies):
            if self.powered and not die.busy_from <= time < die.busy_until:
                self._ready |= 1 << i
            for edge in (die.busy_from, die.busy_until):
                if time < edge < self._ready_at:
                    self._ready_at = edge

    def _report(self, violation: Violation, die: int, detail: int, burst: bool = False) -> None:
        what = f"{detail} bytes" if burst else f"byte {detail:02x}h"
        self.violations.append(f"channel {self.channel} die {die} cycle {self.now - 1}: {violation} ({what})")

    def _record(self, start: int, end: int, die: int, plane: int, kind: str, page: int) -> None:
        if self.recording:
            self.events.append(Event(start >> FRACTION, end >> FRACTION, die, plane, kind, page))

    def _page_of(self, die: int, row: int) -> int:
        return self.part.page_index(die, *self.part.place(row))

    # Power.

    def _switch_power(self, now: int) -> None:
        del self._power[0]
        self.powered = not self.powered
        self._ready_at = 0
        if not self.powered:
            for i, die in enumerate(self.dies):
                self._interrupt(i, now)
                die.power_up()
            self._spoiled = True

    def _interrupt(self, i: int, now: int) -> None:
        """End a die's array operations before their time."""
        die = self.dies[i]
        for operation in (die.before, die.array):
            if operation.rows is None or operation.end <= now:
                continue
            for row in operation.rows.values():
                index = self._page_of(i, row)
                block, page = divmod(index, self.part.pages)
                if operation.kind is _Operation.PROGRAM and operation.start > now:
                    self._pages.pop(index, None)
                    self._next_page[block] = page
                elif operation.kind is _Operation.PROGRAM:
                    if index in self._pages:
                        self._pages[index] |= self._noise(index)
                elif operation.kind is _Operation.ERASE:
                    self._garbage.add(block)
                    for number in range(self.part.pages):
                        self._pages.pop(block * self.part.pages + number, None)
                    self._next_page[block] = self.part.pages

    # Bursts.

    def _drop_burst(self) -> None:
        self._left = self._bytes = self._word_time = self._data_end = 0
        self._write = False
        self._spoiled = False

    def _burst(self, target: int, write: int, length: int, start: int, at: int) -> None:
        """A burst begins: `start` on the bus, for which it may have waited; `at`: when it was taken, for the rules."""
        # One that follows the last burst at once, of the same die and direction, continues it.
        continues = target == self._data_target and bool(write) == self._write and start == self._data_end
        first = start if continues else start + self.timing.t_pre
        self._bytes, self._write = length, bool(write)
        self._left = -(-length // self.word_bytes)
        self._data_target = target
        self._burst_start = start
        self._spoiled = not self.powered
        violation = None
        if self.powered:
            if target >= len(self.dies):
                violation = Violation.NO_DIE
            elif length == 0:
                violation = Violation.EMPTY
            else:
                violation = (self._check_in if write else self._check_out)(self.dies[target], length, at)
            if violation is not None:
                self._report(violation, target, length, burst=True)
                self._spoiled = True
        if write:
            self._word_time = first
            self._data_end = NEVER if self._left else start
        else:
            self._word_time = first + self._word_ticks()
            self._data_free = first
            if self._left:
                before = (self._left - 1) * self.word_bytes
                last = max((length - before) * self.timing.t_byte, ONE)
                self._data_free += before * self.timing.t_byte + last
            if not self.part.separate_command_bus:
                self._cycle_free = self._data_free
            self._data_end = self._data_free
            if self._left:
                self._record(start, self._data_free, target, -1, "out", self._burst_page(target))

    def _word_ticks(self) -> int:
        """Time of the next word that is read: at least a cycle, also of a last word of a few bytes."""
        return max(min(self._bytes, self.word_bytes) * self.timing.t_byte, ONE)

    def _burst_page(self, target: int) -> int:
        if self._spoiled:
            return -1
        die = self.dies[target]
        if self._write:
            return self._page_of(target, die.program_row) if die.program_open else -1
        held = die.held[die.out_plane]
        return self._page_of(target, held) if die.out is _Out.REGISTER and held is not None else -1

    def _busy_rule(self, die: _Die, start: int) -> Violation | None:
        """What forbids data of a die that is, or was until lately, busy."""
        if start < die.busy_until:
            return Violation.DATA_BUSY if start >= die.busy_from else Violation.T_WB
        return None

    def _check_out(self, die: _Die, length: int, start: int) -> Violation | None:
        if die.needs_reset:
            return Violation.NEEDS_RESET
        if (die.command not in (-1, 0x00)) or die.addresses or die.program_open or die.feature_open:
            die.abandon()
            return Violation.SEQUENCE
        if die.out is _Out.NONE:
            return Violation.NOTHING
        if die.out not in (_Out.STATUS, _Out.PLANE_STATUS):
            violation = self._busy_rule(die, start)
            if violation is not None:
                return violation
            if die.out is not _Out.ID and start < die.busy_until + self.timing.t_rr and die.busy_until:
                return Violation.T_RR
        elif die.busy_from > start and die.busy_until > start:
            return Violation.T_WB
        if start < die.data_from:
            return die.data_rule
        if die.out in (_Out.STATUS, _Out.PLANE_STATUS):
            return None
        if die.out is _Out.REGISTER:
            if die.held[die.out_plane] is None:
                return Violation.NOTHING
            limit = self.part.raw_bytes
        else:
            limit = {_Out.ID: ID_BYTES, _Out.FEATURE: 4, _Out.PARAMETERS: len(self._parameters)}[die.out]
        return Violation.BEYOND if die.column + length > limit else None

    def _check_in(self, die: _Die, length: int, start: int) -> Violation | None:
        if die.needs_reset:
            return Violation.NEEDS_RESET
        if die.command != -1 or not (die.program_open or die.feature_open):
            die.abandon()
            return Violation.NO_PROGRAM
        violation = self._busy_rule(die, start)
        if violation is None and start < die.data_from:
            violation = die.data_rule
        if violation is None and die.program_open and die.column + length > self.part.raw_bytes:
            violation = Violation.BEYOND
        if violation is None and die.feature_open and length != 4:
            violation = Violation.BEYOND
        if violation is not None:
            die.abandon()
        return violation

    def _next_word(self, now: int) -> int:
        """The word of a read burst that is complete."""
        count = min(self._bytes, self.word_bytes)
        self._bytes -= count
        self._left -= 1
        if self._left:
            self._word_time += self._word_ticks()
        self.words_moved += 1
        data = bytearray(b"\xff" * self.word_bytes)
        if not self._spoiled:
            die = self.dies[self._data_target]
            if die.out in (_Out.STATUS, _Out.PLANE_STATUS):
                data[:] = bytes([self._status(die, now)]) * self.word_bytes
            else:
                source: Any
                if die.out is _Out.REGISTER:
                    source = die.registers[die.out_plane][die.column : die.column + count].tobytes()
                elif die.out is _Out.PARAMETERS:
                    source = self._parameters[die.column : die.column + count]
                elif die.out is _Out.ID:
                    source = read_id(die.out_address)[die.column : die.column + count]
                else:
                    source = bytes(die.features[die.out_address])[die.column : die.column + count]
                data[: len(source)] = source
                die.column += count
        return int.from_bytes(data, "little")

    def _take_word(self, word: int, now: int) -> None:
        start = now if self._word_time <= now - ONE else self._word_time
        count = min(self._bytes, self.word_bytes)
        self._bytes -= count
        self._left -= 1
        self._word_time = start + count * self.timing.t_byte
        self.words_moved += 1
        die = self.dies[self._data_target] if not self._spoiled else None
        if die is not None:
            data = np.frombuffer(word.to_bytes(self.word_bytes, "little"), np.uint8)[:count]
            if die.program_open:
                die.registers[die.program_plane][die.column : die.column + count] = data
                die.column += count
            elif die.feature_open:
                die.feature_bytes.extend(int(byte) for byte in data)
        if self._left == 0:
            end = self._word_time
            self._data_free = self._data_end = end
            if not self.part.separate_command_bus:
                self._cycle_free = end
            self._record(self._burst_start, end, self._data_target, -1, "in", self._burst_page(self._data_target))
            if die is not None and die.feature_open:
                self._set_feature(self._data_target, end)

    def _set_feature(self, i: int, end: int) -> None:
        die = self.dies[i]
        die.feature_open = False
        if die.out_address == RETRY_FEATURE and die.feature_bytes[0] > self.part.retry_levels:
            self._report(Violation.LEVEL, i, die.feature_bytes[0])
        else:
            die.features[die.out_address] = die.feature_bytes
        self._busy(die, end, end + self.timing.t_wb + self.timing.t_feat)
        self._record(die.busy_from, die.busy_until, i, -1, "feature", -1)

    def _status(self, die: _Die, now: int) -> int:
        busy = die.busy_from <= now < die.busy_until
        array = die.array.start <= now < die.array.end
        mask = 1 << die.status_plane if die.out is _Out.PLANE_STATUS else -1
        failed = die.array.failed & mask and now >= die.array.end
        before = die.before.cached and die.before.failed & mask and now >= die.array.start
        return 0x80 | (not busy) << 6 | (not busy and not array) << 5 | bool(before) << 1 | bool(failed)

    # Commands.

    def _busy(self, die: _Die, end: int, until: int) -> None:
        """Busy from tWB after the end of a cycle on."""
        die.busy_from = end + self.timing.t_wb
        die.busy_until = NEVER if die.stuck else until
        self._ready_at = 0

    def _cycle(self, target: int, address: int, byte: int, start: int, end: int, at: int) -> None:
        """A command or address cycle; `at` is when it was taken, for the rules."""
        if not self.powered:
            return
        if target >= len(self.dies):
            self._report(Violation.NO_DIE, target, byte)
            return
        die = self.dies[target]
        if not address and byte == 0xFF:
            self._reset(target, at, end)
            return
        violation = self._cycle_rule(die, target, address, byte, at)
        if violation is None:
            if address:
                violation = self._address(target, byte, end)
            elif byte in _CONFIRMS:
                violation = self._confirm(target, byte, end)
            else:
                violation = self._first(target, byte, start, end)
        if violation is not None:
            self._report(violation, target, byte)
            die.abandon()

    def _cycle_rule(self, die: _Die, target: int, address: int, byte: int, start: int) -> Violation | None:
        if die.needs_reset:
            return Violation.NEEDS_RESET
        if target == self._data_target and start < self._data_end:
            return Violation.MOVING
        if start < die.busy_until:
            if start < die.busy_from:
                return Violation.T_WB
            if not (die.command == 0x78 if address else byte in (0x70, 0x78)):
                return Violation.BUSY
        if not address:
            if byte not in _ADDRESSES and byte not in _CONFIRMS and byte != 0x70:
                return Violation.UNKNOWN
            if start < die.array.end and start >= die.busy_until:
                allowed = {_Operation.READ: _DURING_CACHE_READ, _Operation.PROGRAM: _DURING_CACHE_PROGRAM}
                if byte not in allowed.get(die.array.kind, ()):
                    return Violation.ARRAY_BUSY
        return None

    def _reset(self, target: int, start: int, end: int) -> None:
        die = self.dies[target]
        if target == self._data_target and start < self._data_end:
            self._report(Violation.MOVING, target, 0xFF)
            self._spoiled = True
        busy = start < die.busy_until
        working = busy or start < die.array.end
        since = die.busy_from
        self._interrupt(target, start)
        die.forget()
        die.needs_reset = False
        duration = self.timing.t_rst if working else self.timing.t_rst_idle
        self._busy(die, end, end + self.timing.t_wb + duration)
        if busy and since < die.busy_from:
            die.busy_from = since
        self._record(die.busy_from, die.busy_until, target, -1, "reset", -1)

    def _first(self, target: int, byte: int, start: int, end: int) -> Violation | None:
        """The first command of a sequence."""
        die = self.dies[target]
        if byte == 0x85:
            if die.command != -1 or not die.program_open:
                return Violation.NO_CONFIRM
        elif die.command not in (-1, 0x00) or die.addresses or die.program_open or die.feature_open:
            return Violation.SEQUENCE
        if byte == 0x81 and die.queue is not _Operation.PROGRAM:
            return Violation.NO_CONFIRM
        if die.queue is not _Operation.NONE:
            follows = {_Operation.READ: (0x00,), _Operation.PROGRAM: (0x80, 0x81, 0x85), _Operation.ERASE: (0x60,)}
            if byte not in (*follows[die.queue], 0x70, 0x78):
                return Violation.SEQUENCE
        die.sequence_start = start
        if byte == 0x70:
            die.command = -1
            die.out = _Out.STATUS
            die.data_from, die.data_rule = end + self.timing.t_whr, Violation.T_WHR
            self._record(start, end, target, -1, "command", -1)
            return None
        if byte == 0x00:
            die.out = die.source
            die.data_from, die.data_rule = end + self.timing.t_whr, Violation.T_WHR
        die.command = byte
        die.addresses = []
        return None

    def _address(self, target: int, byte: int, end: int) -> Violation | None:
        die = self.dies[target]
        if die.command == -1 or len(die.addresses) >= _ADDRESSES[die.command]:
            return Violation.NO_ADDRESS
        die.addresses.append(byte)
        if len(die.addresses) < _ADDRESSES[die.command]:
            return None
        if die.command in (0x00, 0x05, 0x06, 0x60):
            return None  # wait for the confirmation
        if (violation := self._addressed(target, die, byte, end)) is not None:
            return violation
        die.command = -1
        die.addresses = []
        self._record(die.sequence_start, end, target, -1, "command", -1)
        return None

    def _addressed(self, target: int, die: _Die, byte: int, end: int) -> Violation | None:
        """What the last address cycle does, of a sequence that needs no confirmation."""
        timing = self.timing
        match die.command:
            case 0x78:
                plane, _, _ = self.part.place(int.from_bytes(bytes(die.addresses), "little"))
                die.out, die.status_plane = _Out.PLANE_STATUS, plane
                die.data_from, die.data_rule = end + timing.t_whr, Violation.T_WHR
            case 0x80 | 0x81:
                return self._open_program(die, end)
            case 0x85:
                if self._column(die.addresses) >= self.part.raw_bytes:
                    return Violation.RANGE
                die.column = self._column(die.addresses)
                die.data_from, die.data_rule = end + timing.t_ccs, Violation.T_CCS
            case 0x90:
                die.out = die.source = _Out.ID
                die.out_address, die.column = byte, 0
                die.data_from, die.data_rule = end + timing.t_whr, Violation.T_WHR
            case 0xEC:
                if byte != 0:
                    return Violation.RANGE
                die.out = die.source = _Out.PARAMETERS
                die.column = die.data_from = 0
                self._busy(die, end, end + timing.t_wb + timing.t_r)
            case _:
                return self._open_feature(target, die, byte, end)
        return None

    def _open_program(self, die: _Die, end: int) -> Violation | None:
        row = self._row(die.addresses[2:])
        if row is None or self._column(die.addresses) >= self.part.raw_bytes:
            return Violation.RANGE
        die.program_open = True
        die.program_row = row
        die.program_plane = self.part.place(row)[0]
        die.column = self._column(die.addresses)
        die.registers[die.program_plane][:] = 0xFF
        die.held[die.program_plane] = None
        die.data_from, die.data_rule = end + self.timing.t_adl, Violation.T_ADL
        return None

    def _open_feature(self, target: int, die: _Die, byte: int, end: int) -> Violation | None:
        """Get or set a feature."""
        if byte not in FEATURES:
            return Violation.FEATURE
        die.out_address = byte
        if die.command == 0xEE:
            die.out = die.source = _Out.FEATURE
            die.column = die.data_from = 0
            self._busy(die, end, end + self.timing.t_wb + self.timing.t_feat)
            self._record(die.busy_from, die.busy_until, target, -1, "feature", -1)
        else:
            die.out = die.source = _Out.NONE
            die.feature_open = True
            die.feature_bytes = []
            die.data_from, die.data_rule = end + self.timing.t_adl, Violation.T_ADL
        return None

    @staticmethod
    def _column(addresses: list[int]) -> int:
        return addresses[0] | addresses[1] << 8

    def _row(self, addresses: list[int]) -> int | None:
        """The row of three address cycles, if the die has it."""
        row = int.from_bytes(bytes(addresses), "little")
        _, block, page = self.part.place(row)
        return row if block < self.part.blocks and page < self.part.pages else None

    def _confirm(self, target: int, byte: int, end: int) -> Violation | None:
        """The second command of a sequence, or 31h and 3Fh alone."""
        die = self.dies[target]
        command, addresses = die.command, die.addresses
        bare = (command == -1 or (command == 0x00 and not addresses)) and not die.program_open and not die.feature_open
        start = end - self.timing.t_cad if bare or byte in (0x10, 0x11, 0x15) else die.sequence_start
        if byte == 0xE0:
            return self._change_column(target, command != -1 and len(addresses) == _ADDRESSES[command], end)
        if byte == 0x3F or (byte == 0x31 and bare):
            if not bare or die.queue is not _Operation.NONE:
                return Violation.NO_CONFIRM
            return self._cache_read(target, byte == 0x31, start, end)
        confirmed = self._confirmed(die, byte)
        if isinstance(confirmed, Violation):
            return confirmed
        kind, row = confirmed
        plane, block, page = self.part.place(row)
        if (violation := self._queue_rule(die, kind, plane, page)) is not None:
            return violation
        if byte == 0x31 and not die.rows:
            return Violation.NO_READ
        die.queued[plane] = row
        column = self._column(addresses) if kind is _Operation.READ else 0
        self._record(start, end, target, -1, "command", self.part.page_index(target, plane, block, page))
        die.command, die.addresses, die.program_open = -1, [], False
        if byte in (0x11, 0x32, 0xD1):
            die.queue = kind
            self._busy(die, end, end + self.timing.t_wb + self.timing.t_dbsy)
            return None
        rows = dict(sorted(die.queued.items()))
        die.queue, die.queued = _Operation.NONE, {}
        if byte == 0x31:
            self._start_cache_read(target, rows, plane, end)
        elif kind is _Operation.READ:
            self._start_read(target, rows, plane, column, end)
        elif kind is _Operation.PROGRAM:
            self._program(target, rows, byte == 0x15, end)
        else:
            self._erase(target, rows, end)
        return None

    def _confirmed(self, die: _Die, byte: int) -> tuple[_Operation, int] | Violation:
        """The operation of a sequence that is complete, and its row."""
        complete = die.command != -1 and len(die.addresses) == _ADDRESSES[die.command]
        if byte in (0x10, 0x11, 0x15):
            if die.command != -1 or not die.program_open:
                return Violation.NO_CONFIRM
            return _Operation.PROGRAM, die.program_row
        if byte in (0xD0, 0xD1):
            if die.command != 0x60 or not complete:
                return Violation.NO_CONFIRM
            kind, row = _Operation.ERASE, self._row(die.addresses)
        else:  # 30h, 31h with an address, 32h
            if die.command != 0x00 or not complete:
                return Violation.NO_CONFIRM
            if self._column(die.addresses) >= self.part.raw_bytes:
                return Violation.RANGE
            kind, row = _Operation.READ, self._row(die.addresses[2:])
        return Violation.RANGE if row is None else (kind, row)

    def _queue_rule(self, die: _Die, kind: _Operation, plane: int, page: int) -> Violation | None:
        """What the planes that wait for a multi-plane operation allow."""
        if die.queue is _Operation.NONE:
            return None
        if die.queue is not kind:
            return Violation.SEQUENCE
        if plane in die.queued:
            return Violation.SAME_PLANE
        if kind is not _Operation.ERASE and self.part.place(next(iter(die.queued.values())))[2] != page:
            return Violation.OTHER_PAGE
        return None

    def _start_read(self, target: int, rows: dict[int, int], plane: int, column: int, end: int) -> None:
        die = self.dies[target]
        self._count_operation(target, die)
        begin = end + self.timing.t_wb
        die.before, die.array = _Array(), _Array(_Operation.READ, begin, begin + self.timing.t_r, rows)
        die.rows, die.last_plane, die.pending = rows, plane, False
        self._fill_registers(target)
        die.out = die.source = _Out.REGISTER
        die.column, die.data_from = column, 0
        self._run(target, die, end, die.array.end)

    def _count_operation(self, target: int, die: _Die) -> None:
        die.operations += 1
        if any(k == Fault.STUCK_BUSY and d == target and die.operations >= n for k, d, _, _, _, n in self._entries):
            die.stuck = True

    def _run(self, target: int, die: _Die, end: int, until: int) -> None:
        """The array works on die.array; busy until `until`."""
        self._busy(die, end, until)
        if die.stuck:
            die.array.end = NEVER
        kind = die.array.kind.name.lower()
        for plane, row in (die.array.rows or {}).items():
            self._record(die.array.start, die.array.end, target, plane, kind, self._page_of(target, row))

    def _change_column(self, target: int, complete: bool, end: int) -> Violation | None:
        die = self.dies[target]
        if die.command not in (0x05, 0x06) or not complete:
            return Violation.NO_CONFIRM
        column = self._column(die.addresses)
        page = -1
        if die.command == 0x06 or die.source is not _Out.PARAMETERS:
            plane = die.out_plane
            if die.command == 0x06:
                row = self._row(die.addresses[2:])
                if row is None:
                    return Violation.RANGE
                plane = self.part.place(row)[0]
                if die.held[plane] != row:
                    return Violation.NOT_HELD
            elif die.held[plane] is None:
                return Violation.NOTHING
            if column >= self.part.raw_bytes:
                return Violation.RANGE
            held = die.held[plane]
            assert held is not None
            page = self._page_of(target, held)
            die.source, die.out_plane = _Out.REGISTER, plane
        elif column >= len(self._parameters):
            return Violation.RANGE
        die.out, die.column = die.source, column
        die.data_from, die.data_rule = end + self.timing.t_ccs, Violation.T_CCS
        die.command, die.addresses = -1, []
        self._record(die.sequence_start, end, target, -1, "command", page)
        return None

    # Array operations.  What they do to contents is done at once; nothing can see it before they end.

    def _fill_registers(self, target: int) -> None:
        """The pages of the last read go into the registers."""
        die = self.dies[target]
        for plane, row in die.rows.items():
            self.page_reads += 1
            die.registers[plane][:] = self._sense(target, row)
            die.held[plane] = row
        die.out_plane = die.last_plane

    def _sense(self, target: int, row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        plane, block, page = self.part.place(row)
        data = self._content(self._page_of(target, row)).copy()
        if self._any(Fault.FACTORY_MARK, target, plane, block, page):
            data[self.part.mark_column] = 0
        rate = self.faults.bit_error_rate
        level = self.dies[target].features[RETRY_FEATURE][0]
        wanted = next(iter(self._matching(Fault.RETRY, target, plane, block, page)), None)
        if wanted is not None and wanted != level:
            rate = self.faults.retry_error_rate
        if rate > 0:
            position = self._skip(rate)
            while position < 8 * self.part.raw_bytes:
                data[position >> 3] ^= 1 << (position & 7)
                self.bit_flips += 1
                position += self._skip(rate) + 1
        for kind, d, p, column, mask, value in self._entries:
            if kind == Fault.STUCK_COLUMN and d == target and p == plane and column < self.part.raw_bytes:
                data[column] = int(data[column]) & ~mask & 0xFF | value & mask
        return data

    def _cache_read(self, target: int, more: bool, start: int, end: int) -> Violation | None:
        """31h alone and 3Fh."""
        die = self.dies[target]
        if not die.rows or not (more or die.pending):
            return Violation.NO_READ
        if more:
            rows = {plane: row + 1 for plane, row in die.rows.items()}
            if self.part.place(die.rows[die.last_plane])[2] + 1 >= self.part.pages:
                return Violation.LAST_PAGE
            page = self._page_of(target, rows[die.last_plane])
        else:
            page = -1
        die.command, die.addresses = -1, []
        self._record(start, end, target, -1, "command", page)
        if more:
            self._start_cache_read(target, rows, die.last_plane, end)
            return None
        begin = max(end + self.timing.t_wb, die.array.end)
        if die.pending:
            self._fill_registers(target)
        die.pending = False
        die.out = die.source = _Out.REGISTER
        die.column = die.data_from = 0
        self._busy(die, end, begin + self.timing.t_rcbsy)
        return None

    def _start_cache_read(self, target: int, rows: dict[int, int], plane: int, end: int) -> None:
        """The pages read last go into the registers, and the array reads on, once it is free."""
        die = self.dies[target]
        self._count_operation(target, die)
        begin = max(end + self.timing.t_wb, die.array.end)
        if die.pending:
            self._fill_registers(target)
        ready = begin + self.timing.t_rcbsy
        die.before, die.array = _Array(), _Array(_Operation.READ, ready, ready + self.timing.t_r, rows)
        die.rows, die.last_plane, die.pending = rows, plane, True
        die.out = die.source = _Out.REGISTER
        die.column = die.data_from = 0
        self._run(target, die, end, ready)

    def _program(self, target: int, rows: dict[int, int], cached: bool, end: int) -> None:
        die = self.dies[target]
        self._count_operation(target, die)
        begin = max(end + self.timing.t_wb, die.array.end)
        failed = 0
        for plane, row in rows.items():
            self.page_programs += 1
            _, block, page = self.part.place(row)
            index = self._page_of(target, row)
            where = index // self.part.pages
            following = self._next_page.get(where, 0)
            if page < following:
                self._report(Violation.NOT_ERASED, target, 0x15 if cached else 0x10)
            elif page > following:
                self._report(Violation.ORDER, target, 0x15 if cached else 0x10)
            self._next_page[where] = max(following, page + 1)
            if self._any(Fault.FACTORY_BAD, target, plane, block, page):
                failed |= 1 << plane
                continue
            data = self._content(index) & die.registers[plane]
            grown = any(self._erases.get(where, 0) >= n
                        for n in self._matching(Fault.GROWN_BAD, target, plane, block, page))
            if grown or self._any(Fault.PROGRAM_FAIL, target, plane, block, page):
                failed |= 1 << plane
                data = data | self._noise(index)
            self._pages[index] = data
        self.program_failures += failed.bit_count()
        die.before = die.array if die.array.kind is _Operation.PROGRAM else _Array()
        work = begin + (self.timing.t_pcbsy if cached else 0)
        die.array = _Array(_Operation.PROGRAM, work, work + self.timing.t_prog, rows, failed, cached)
        die.rows, die.pending = {}, False
        self._run(target, die, end, work if cached else die.array.end)

    def _erase(self, target: int, rows: dict[int, int], end: int) -> None:
        die = self.dies[target]
        self._count_operation(target, die)
        begin = end + self.timing.t_wb
        failed = 0
        for plane, row in rows.items():
            self.block_erases += 1
            _, block, page = self.part.place(row)
            where = self._page_of(target, row) // self.part.pages
            self._erases[where] = count = self._erases.get(where, 0) + 1
            if (count > self.part.endurance or self._any(Fault.FACTORY_BAD, target, plane, block, page)
                    or self._any(Fault.ERASE_FAIL, target, plane, block, page)
                    or any(count > n for n in self._matching(Fault.GROWN_BAD, target, plane, block, page))):
                failed |= 1 << plane
                continue
            self._garbage.discard(where)
            self._next_page[where] = 0
            for number in range(self.part.pages):
                self._pages.pop(where * self.part.pages + number, None)
        self.erase_failures += failed.bit_count()
        die.before = _Array()
        die.array = _Array(_Operation.ERASE, begin, begin + self.timing.t_bers, rows, failed)
        die.rows, die.pending = {}, False
        self._run(target, die, end, die.array.end)


# ---------------------------------------------------------------------------------------------- Amaranth


def attach(channel: NandChannel, phy: Any) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """A process that plays the dies for a member with `phy_signature`, seen from the controller.

    Give it to `Simulator.add_process`, or to `Simulator.add_testbench` with ``background=True``.  A reset of the sync
    domain resets the PHY, not the dies.
    """

    def value(member: Any) -> Any:
        return member.as_value() if isinstance(member, ValueCastable) else member

    from kvattic_hdl import PhyShapes

    shapes = PhyShapes(channel.config)
    bits = shapes.target.width
    target = (1 << bits) - 1

    async def process(ctx: Any) -> None:
        outputs = (phy.cycles.ready, phy.bursts.ready, phy.read, phy.read_valid, phy.write.ready, phy.ready)
        shown: list[int | None] = [None] * len(outputs)
        ticks = ctx.tick().sample(phy.cycles.valid, value(phy.cycles.payload), phy.bursts.valid,
                                  value(phy.bursts.payload), phy.write.valid, value(phy.write.payload))
        async for _, rst, has_cycle, cycle, has_burst, burst, has_word, word in ticks:
            after = channel.step(
                (cycle & target, cycle >> bits & 1, cycle >> bits + 1) if has_cycle else None,
                (burst & target, burst >> bits & 1, burst >> bits + 1) if has_burst else None,
                word if has_word else None,
                bool(rst),
            )
            for i, (signal, new) in enumerate(zip(outputs, after, strict=True)):
                if shown[i] != new:
                    shown[i] = new
                    ctx.set(signal, new)

    return process
