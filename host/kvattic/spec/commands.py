"""Layout of everything that crosses host memory: commands, query blocks, results, completions, and their codes.

All integers are little-endian; every record is a whole number of 64-byte lines, which is the unit of the device's
AXI4 bursts.  RTL, driver, golden device and docs read these tables.

Queues have NVMe's shape: 64-byte submission entries that begin with opcode, flags, identifier and namespace (a domain
is one), rings with head and tail, doorbells, a phase bit that turns over with each round of the completion ring.  Where
a submission entry has an address or a number, NVMe has MPTR (bytes 16-23), PRP1 and PRP2 (24-39), or the command dwords
2, 3 and 10 to 15.  A completion has NVMe's fields in its first 16 bytes, and counters behind them up to a whole line,
which the device writes in one burst.  docs/queues.md lists the differences from NVMe.
"""

import functools
import struct
from dataclasses import dataclass, field, fields
from enum import IntEnum, IntFlag
from typing import Any, Self, cast

LINE_BYTES = 64
"""Unit of the device's AXI4 bursts, and alignment of every address in a command."""
RESERVED = "reserved, zero"
"""The meaning of a field that must be zero."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: name, byte offset, width in bytes, meaning."""

    name: str
    offset: int
    size: int
    doc: str

    @property
    def place(self) -> slice:
        """Its bytes in the record."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Record:
    """A fixed layout of `size` bytes; bytes that no field covers are reserved and zero."""

    name: str
    size: int
    fields: tuple[Field, ...]
    _by_name: dict[str, Field] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {found.name: found for found in reversed(self.fields)})

    def pack(self, **values: int) -> bytes:
        """The record's bytes; fields that are not given are zero.

        Raises:
            KeyError: the record has no such field.
            OverflowError: a value does not fit its field.
        """
        data = bytearray(self.size)
        self.put(data, **values)
        return bytes(data)

    def put(self, data: bytearray, **values: int) -> None:
        """Write fields into the bytes of a record; the others stay as they are.

        Raises:
            KeyError: the record has no such field.
            OverflowError: a value does not fit its field.
        """
        for name, value in values.items():
            found = self[name]
            data[found.offset : found.offset + found.size] = int(value).to_bytes(found.size, "little")

    def unpack(self, data: bytes) -> dict[str, int]:
        """All fields of the record as unsigned integers."""
        return {f.name: int.from_bytes(data[f.place], "little") for f in self.fields}

    def reserved_is_zero(self, data: bytes) -> bool:
        """Whether every reserved byte is zero."""
        return not any(any(data[f.place]) for f in self.fields if f.doc == RESERVED)

    def __getitem__(self, name: str) -> Field:
        found = self._by_name.get(name)
        if found is None:
            raise KeyError(f"{self.name} has no field {name!r}")
        return found


class Opcode(IntEnum):
    """What a command asks for.

    All are vendor specific in both of NVMe's command sets, admin and I/O.  The low two bits say which way data goes: 0
    none, 1 to the device, 2 from it, 3 both.
    """

    ATTEND = 0xC3
    """Attention of one job: the query rows that read one KV head (`COMMAND`)."""
    READ = 0xC7
    """Copy K and V of one KV head's tokens to host memory (`READ_COMMAND`); goes the way of an ATTEND."""
    PROGRAM = 0xC4
    """Write a page of device DRAM into a flash page (`FLASH_COMMAND`); pages of a block in order, each once."""
    ERASE = 0xC8
    """Erase the block that a flash page lies in (`FLASH_COMMAND`); in queue 0, whoever owns it."""
    COUNTERS = 0xC2
    """Write `registers.COUNTERS`, 8 bytes each, padded to whole lines (`DATA_COMMAND`).  Each is exact when it is read;
    while the drive works, they are read in different cycles."""
    PROBE = 0xF0
    """Look for the factory's mark of a bad block in a flash page (`FLASH_COMMAND`): one of `NandPart.marked_pages`."""
    MAP = 0xF4
    """Map a zone to another block on the die and plane of a flash page (`FLASH_COMMAND`)."""
    IDENTIFY = 0xE2
    """Write Config.to_json(), as UTF-8 padded with zeros to IDENTIFY_BYTES (`DATA_COMMAND`)."""
    CREATE_QUEUE = 0xE4
    """Create a pair of queues, empty (`QUEUE_COMMAND`)."""
    DELETE_QUEUE = 0xE8
    """Delete a pair of queues (`QUEUE_COMMAND`); commands that are not fetched yet are dropped."""
    GRANT = 0xEC
    """Give zones or regions of device DRAM to a domain, or a domain to queues (`GRANT_COMMAND`)."""


ADMIN_OPCODES = 0xE0
"""Opcodes from this one on are for queue 0 alone."""
DIRECTION_BITS = 2
"""Low bits of an opcode: the direction of the data."""


class Grant(IntEnum):
    """What GRANT gives."""

    ZONES = 0
    """Zones of flash, `first` and on, to the domain."""
    REGIONS = 1
    """Regions of device DRAM, 2**REGION_BITS pages each, to the domain."""
    QUEUES = 2
    """The domain to the queues whose bits are set in `first`: only their commands may name it.  `count` is zero."""


class Mode(IntEnum):
    """How ATTEND chooses the tokens that it attends; docs/sparse.md."""

    DENSE = 0
    """All of them."""
    SPARF = 1
    """The `top_units` tokens of the largest approximate mass, blended with the mean of V (SparF, SparQ)."""
    FETCHED = 2
    """Units of whole codewords of the largest approximate mass, all of whose tokens are attended; blended likewise."""
    CENTROID = 3
    """Units whose mean key scores highest, all of whose tokens are attended; not blended."""
    CODES = 4
    """As SPARF, but the first pass scores by codes of 2 bits of all features of K (`Config.codes`)."""

    @property
    def blended(self) -> bool:
        """Whether the output is blended with the mean of V, which stands in front of the table then."""
        return self in (Mode.SPARF, Mode.FETCHED, Mode.CODES)

    @property
    def featured(self) -> bool:
        """Whether the first pass reads features of K, chosen by the query."""
        return self in (Mode.SPARF, Mode.FETCHED)

    @property
    def by_token(self) -> bool:
        """Whether a unit of selection is a token."""
        return self in (Mode.SPARF, Mode.CODES)

    @property
    def sketch(self) -> "Kind":
        """What the first pass of a sparse mode reads of stripes that are not attended whole."""
        return {Mode.CENTROID: Kind.SKETCH, Mode.CODES: Kind.CODES}.get(self, Kind.FEATURE)


class Status(IntEnum):
    """How a command ended; `where` of the completion says which place.  NVMe's status code, of type `STATUS_TYPE`."""

    OK = 0
    """The results are written."""
    INVALID_OPCODE = 1
    """where: the opcode."""
    INVALID_FIELD = 2
    """A reserved byte, or a field that mode or opcode does not use, is not zero; the mode does not exist (or is sparse
    and the configuration is not; or is CODES and the configuration is without codes); or stripe_pages is not a power of
    two, too large, or not what a sparse mode needs."""
    INVALID_ROWS = 3
    """where: the number of rows."""
    INVALID_LENGTH = 4
    """No tokens, or `stripes` is not the number of stripes that the tokens take.  READ: also more than `READ_BYTES`."""
    INVALID_ADDRESS = 5
    """query, result or table (with the mean of V) not 64-byte aligned or not inside the queue's window; where: 0 query,
    1 result, 2 table.  IDENTIFY, COUNTERS: result, likewise."""
    INVALID_SCALE = 6
    """scale is not a positive normal fp32."""
    NAN_QUERY = 7
    """where: row * 65536 + feature of the first NaN or infinity in q."""
    NAN_KEY = 8
    """where: the lowest token with a NaN or infinity in K.  ATTEND alone: a READ copies what is there."""
    NAN_VALUE = 9
    """where: the lowest token with a NaN or infinity in V; likewise."""
    CODEWORD_TIMEOUT = 10
    """A codeword never came; where: channel * 65536 + kind * 32768 + codewords still missing there."""
    BUS_ERROR = 11
    """The host memory answered a read of the command or query, or a write of the result, with an error; where: 0.  When
    it is the command that could not be read, its identifier is not known: it is 0xFFFF."""
    INVALID_TABLE = 12
    """A table entry names a channel that does not exist, has a reserved bit set (in DENSE also `whole`), or exceeds its
    lane's score buffer; where: the entry's number."""
    INVALID_PLACE = 13
    """A flash command names a channel, page or block that does not exist; where: 0."""
    UNREADABLE_KEY = 14
    """K cannot be read (see the register MEDIA_ERROR); where: first token of the lowest codeword that cannot."""
    UNREADABLE_VALUE = 15
    """The same for V."""
    PROGRAM_FAILED = 16
    """The part reports that a page was not programmed; where: channel * 2**24 + page."""
    ERASE_FAILED = 17
    """The part reports that a block was not erased; where: channel * 2**24 + page."""
    BAD_BLOCK = 18
    """PROBE found the factory's mark in the page; where: channel * 2**24 + page."""
    DIE_TIMEOUT = 19
    """A die stayed busy for longer than its part ever is; where: channel * 2**24 + page."""
    INVALID_SELECTION = 20
    """A field of a sparse mode is out of range; where: 0 features, 1 top_units (zero, or more than the tokens make),
    2 local_tokens (more than the units hold), 3 unit_bits, 4 sinks (CODES: more than half a stripe's tokens)."""
    NO_SKETCH = 21
    """A stripe in flash that is not attended whole lacks what the mode's first pass reads; where: number of its
    entry."""
    NAN_MEAN = 22
    """where: feature of the first NaN or infinity in the mean of V."""
    UNREADABLE_SKETCH = 23
    """K in the feature layout, a centroid, codes, or K of the tail or of sinks cannot be read in the first pass; where:
    first token of the lowest codeword, or stripe, that cannot."""
    NOT_PERMITTED = 24
    """where: 0 the opcode is for queue 0 alone; 1 the domain is not granted to the queue."""
    NOT_OWNED = 25
    """A place that is not the domain's, or does not exist.  where, ATTEND, READ: number of the first such table entry;
    PROGRAM, ERASE: 0 flash page, 1 page of device DRAM."""
    INVALID_QUEUE = 26
    """where: 0 queue (1 to QUEUES - 1; CREATE_QUEUE: it exists), 1 entries, 2 submission, 3 completion."""
    QUEUE_BUSY = 27
    """DELETE_QUEUE while its commands are in flight: nothing more is fetched; delete it again later.  where: 0."""
    INVALID_GRANT = 28
    """where: 0 kind, 1 first or count, 2 domain (1 to DOMAINS - 1)."""


STATUS_BITS, STATUS_TYPE_BITS = 8, 3
STATUS_TYPE = 7
"""NVMe's status code type of every status but OK: vendor specific.  That of OK is 0: generic, and so is its code."""
DOMAINS = 256
"""Domains that can own zones and regions; 0 stands for nobody."""
IDENTIFY_BYTES = 2048
READ_BYTES = 1 << 20
"""What a READ writes, at most."""


class TableFlag(IntFlag):
    """How a stripe is attended."""

    DRAM = 1
    """Its pages are pages of device DRAM, at page * config.page_bytes; else of the flash channel."""
    WHOLE = 2
    """Sparse modes: it is attended whole and scored exactly in the first pass, and does not count in `top_units`; a
    stripe in device DRAM is always so."""


class CompletionFlag(IntFlag):
    """Things that happened although the command was served."""

    SCORE_OVERFLOW = 1
    """A product or a score was clipped at the top of its window (docs/numerics.md says to what)."""
    VALUE_OVERFLOW = 2
    """A product weight*v was clipped at the top of its window (bf16 only)."""
    DUPLICATE = 4
    """A codeword came twice; the second one was dropped."""


class MediaCause(IntEnum):
    """Why a codeword cannot be read."""

    UNCORRECTABLE = 1
    """More bit errors than the code corrects, at every read-retry setting; or another page's data."""
    ERASED = 2
    """Nothing was written there."""
    DIE_TIMEOUT = 3
    """The die stayed busy."""


class Kind(IntEnum):
    """What a codeword holds."""

    KEY = 0
    """Tokens of K."""
    VALUE = 1
    """Tokens of V."""
    FEATURE = 2
    """First pass: one feature of K, in the feature layout."""
    SKETCH = 3
    """First pass: centroids; or tokens of K that it scores exactly: of the tail and, in CODES, of sinks."""
    CODES = 4
    """First pass of CODES: an octet.  The engine's tags call it FEATURE, as that mode reads no features."""


def _at(offset: int, size: int, doc: str) -> Any:
    """A field of a command: where it lies and what it means."""
    return field(default=0, metadata={"place": slice(offset, offset + size), "doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A decoded command; those that derive from it name their fields, which are unsigned integers."""

    opcode: int = _at(0, 1, "`Opcode`")
    flags: int = _at(1, 1, RESERVED)
    identifier: int = _at(2, 2, "copied into the completion")

    @classmethod
    def unpack(cls, line: bytes) -> Self:
        """Decode a submission entry.

        Args:
            line: LINE_BYTES long.
        """
        places = _places(cast("Any", cls))   # mypy holds the class for unhashable
        return cls(**{name: int.from_bytes(line[place], "little") for name, place in places})


@functools.cache
def _places(command: type[Command]) -> tuple[tuple[str, slice], ...]:
    """Names and places of a command's fields."""
    return tuple((each.name, each.metadata["place"]) for each in fields(command))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendCommand(Command):
    """ATTEND: see `COMMAND`."""

    domain: int = _at(4, 4, "owner of all places that the table names (NVMe's NSID)")
    base_token: int = _at(8, 3, "number of the first stripe's first token")
    mode: int = _at(11, 1, "`Mode`")
    end_token: int = _at(12, 3, "one past the last valid token")
    rows: int = _at(15, 1, "query rows of this job, 1 to config.rows")
    table: int = _at(
        16, 8, "address of the table: for each stripe, in order, a `TABLE_ENTRY`, in sparse modes followed by a "
        "`SKETCH_ENTRY`; in SPARF, FETCHED and CODES the mean of V over all tokens stands in front of the entries: "
        "head_dim fp32, padded to whole lines")
    query: int = _at(24, 8, "address of the query block")
    result: int = _at(32, 8, "address of the result block")
    tree_token: int = _at(40, 3, "first token of the draft tree (end_token where there is none)")
    stripe_pages: int = _at(43, 1, "pages of K (and of V) in a stripe, a power of two")
    scale: int = _at(44, 4, "fp32 of softmax scale * log2(e)")
    stripes: int = _at(48, 2, "stripes in the table")
    features: int = _at(
        50, 2, "SPARF, FETCHED: features (components of q and K) that the first pass reads, the r of SparF; else 0")
    top_units: int = _at(
        52, 2, "sparse modes: units attended, the k of SparF; what is attended whole comes on top; else 0")
    local_tokens: int = _at(
        54, 2, "sparse modes: the newest tokens, attended in any case and counted in `top_units`; else 0")
    sinks: int = _at(
        56, 2, "sparse modes: the first tokens of the sequence, numbered from 0, attended in any case and counted in "
        "`top_units`; in CODES scored exactly, and at most half a stripe's; else 0")
    unit_bits: int = _at(58, 1, "FETCHED, CENTROID: log2 of the codewords of a unit; else 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCommand(Command):
    """READ: see `READ_COMMAND`."""

    domain: int = _at(4, 4, "owner of all places that the table names (NVMe's NSID)")
    tokens: int = _at(12, 3, "tokens that are copied, from the first stripe's first one on")
    table: int = _at(16, 8, "address of the table: a `TABLE_ENTRY` for each stripe, in order")
    result: int = _at(32, 8, "address of what is written")
    stripe_pages: int = _at(43, 1, "pages of K (and of V) in a stripe, a power of two")
    stripes: int = _at(48, 2, "stripes in the table")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashCommand(Command):
    """PROGRAM, ERASE, PROBE or MAP: see `FLASH_COMMAND`."""

    domain: int = _at(4, 4, "PROGRAM, ERASE: owner of the places; ERASE in queue 0, PROBE, MAP: zero")
    page: int = _at(40, 3, "page on the channel: plane, die, page of the block, zone, from the low bits on")
    channel: int = _at(43, 1, "flash channel")
    argument: int = _at(44, 3, "PROGRAM: page of device DRAM; MAP: block of the plane; otherwise zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCommand(Command):
    """IDENTIFY or COUNTERS: see `DATA_COMMAND`."""

    domain: int = _at(4, 4, "ignored: whoever may use the queue may ask")
    result: int = _at(24, 8, "address of what is written")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCommand(Command):
    """CREATE_QUEUE or DELETE_QUEUE: see `QUEUE_COMMAND`."""

    submission: int = _at(24, 8, "address of the submission ring, 64-byte aligned")
    completion: int = _at(32, 8, "address of the completion ring, 64-byte aligned")
    queue: int = _at(40, 1, "number of the pair")
    entries: int = _at(
        42, 2, "of each ring: a power of two, 2 to MAX_ENTRIES; DELETE_QUEUE: zero, as all but `queue`")
    base: int = _at(48, 8, "first address that the blocks of the queue's commands may use")
    limit: int = _at(56, 8, "one past the last address that they may use")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantCommand(Command):
    """GRANT: see `GRANT_COMMAND`."""

    domain: int = _at(4, 4, "to whom; 0, for zones and regions: to nobody")
    kind: int = _at(40, 1, "`Grant`")
    first: int = _at(41, 3, "first zone or region; or a bit for each queue")
    count: int = _at(44, 3, "how many zones or regions")


def _record(name: str, command: type[Command]) -> Record:
    """The layout of a command's line; what no field covers is reserved, in pieces inside of 8-byte words."""
    named = []
    for each in fields(command):
        place = each.metadata["place"]
        named.append(Field(each.name, place.start, place.stop - place.start, each.metadata["doc"]))
    filled: list[Field] = []
    at = reserved = 0
    for start, found in [*((each.offset, each) for each in named), (LINE_BYTES, None)]:
        while at < start:
            size = min(start, at // 8 * 8 + 8) - at
            filled.append(Field(f"reserved{reserved}", at, size, RESERVED))
            at, reserved = at + size, reserved + 1
        if found is not None:
            filled.append(found)
            at += found.size
    return Record(name, LINE_BYTES, tuple(filled))


COMMAND = _record("Command", AttendCommand)
"""ATTEND.  A stripe is stripe_pages * config.tokens_per_page consecutive tokens; in sparse modes config.group_tokens.

A unit of selection is a token in SPARF and CODES, 2**unit_bits consecutive codewords of a stripe in FETCHED and
CENTROID."""

READ_COMMAND = _record("ReadCommand", ReadCommand)
"""READ.  It writes K of the first token, then V of it, K of the second token and so on, each padded with zeros to whole
lines; elements as they are stored, of two bytes or one (`Config.kv`).  Tokens are numbered from 0, in `where` of its
completion, too."""

FLASH_COMMAND = _record("FlashCommand", FlashCommand)
"""PROGRAM, ERASE, PROBE, MAP.  They complete out of order; those of one channel begin in order."""

DATA_COMMAND = _record("DataCommand", DataCommand)
"""IDENTIFY, COUNTERS."""

QUEUE_COMMAND = _record("QueueCommand", QueueCommand)
"""CREATE_QUEUE, DELETE_QUEUE."""

GRANT_COMMAND = _record("GrantCommand", GrantCommand)
"""GRANT.  Takes effect for the commands that are fetched after its completion."""

COMMANDS: dict[int, tuple[Record, type[Command]]] = {
    Opcode.ATTEND: (COMMAND, AttendCommand),
    Opcode.READ: (READ_COMMAND, ReadCommand),
    **dict.fromkeys((Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP), (FLASH_COMMAND, FlashCommand)),
    **dict.fromkeys((Opcode.IDENTIFY, Opcode.COUNTERS), (DATA_COMMAND, DataCommand)),
    **dict.fromkeys((Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE), (QUEUE_COMMAND, QueueCommand)),
    Opcode.GRANT: (GRANT_COMMAND, GrantCommand),
}
"""Layout and decoded form by opcode."""

TABLE_ENTRY = Record("TableEntry", 8, (
    Field("key_page", 0, 3, "first page of the stripe's K"),
    Field("channel", 3, 1, "channel whose lane attends the stripe; in flash its pages lie there"),
    Field("value_page", 4, 3, "first page of its V"),
    Field("flags", 7, 1, "`TableFlag`"),
))
"""Where a stripe lies; its other pages follow the first ones."""

SKETCH_ENTRY = Record("SketchEntry", 8, (
    Field("page", 0, 3, "first page of K in the feature layout; or page of the first codeword of centroids or codes"),
    Field("codeword", 3, 1, "codeword of that page with which they begin: 0 for the feature layout"),
    Field("written", 4, 1, "1: the sketch was written; 0: it was not, which only a stripe attended whole may say"),
    Field("reserved", 5, 3, RESERVED),
))
"""What the first pass of a sparse mode reads of a stripe in flash, on its channel; further codewords follow."""

ROW = Record("Row", LINE_BYTES, (
    Field("start_token", 0, 4, "first token that this row attends"),
    Field("end_token", 4, 4, "one past the last token that this row attends"),
    Field("tree", 8, 4, "bit i: this row attends draft token tree_token + i; drafts beyond 32 are not attended"),
))
"""Head of each row of a query block; q follows, padded with zeros to whole lines."""

TREE_BITS = 32

TRAILER = Record("Trailer", LINE_BYTES, (
    Field("maximum", 0, 8, "largest score, signed, formats.SCORE_FRACTION fractional bits; SCORE_MASKED: no token"),
    Field("denominator", 8, 8, "sum of the weights, formats.VALUE_FRACTION fractional bits"),
))
"""Follows the head_dim fp32 outputs of each row of a result block."""

COMPLETION = Record("Completion", LINE_BYTES, (
    Field("where", 0, 4, "see `Status`"),
    Field("flags", 4, 4, "`CompletionFlag`"),
    Field("head", 8, 2, "submission entries of this queue before it are fetched"),
    Field("queue", 10, 2, "number of the queue"),
    Field("identifier", 12, 2, "of the command"),
    Field("state", 14, 2, "phase, 1 in the first round of the completion ring, then 0, and so on | `Status` << 1 | "
                          "status code type << 9: 0 of OK, 7 of all others"),
    Field("cycle", 16, 8, "the counter CYCLES at the completion"),
    Field("beats", 24, 8, "the counter BEATS"),
    Field("starved", 32, 4, "and so on: lane cycles without a beat although codewords were requested"),
    Field("barrier", 36, 4, "lane cycles in which V waited for the maximum"),
    Field("weights", 40, 4, "lane cycles in which a V beat waited for its weight"),
    Field("scores", 44, 4, "lane cycles in which a K beat waited for the score unit, or a READ's beat to be copied"),
    Field("idle", 48, 4, "lane cycles without work"),
    Field("fetched", 52, 4, "ATTEND, READ: CYCLES (its lower half) when the drive requested the command; others: 0"),
    Field("first_beat", 56, 4, "ATTEND, READ: likewise, at the first beat of it that a lane took; 0: none"),
    Field("last_beat", 60, 4, "ATTEND, READ: likewise, at the last one"),
))
"""beats + starved + barrier + weights + scores + idle = lanes * cycle (modulo 2**32).

A device without time of its own, such as the golden device, leaves all from `cycle` on 0.
"""


_COMPLETION = struct.Struct("".join(("<", *({2: "H", 4: "I", 8: "Q"}[f.size] for f in COMPLETION.fields))))
"""The same for `struct`, which is faster: the fields follow each other without a gap."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A decoded completion entry (see `COMPLETION`)."""

    status: Status
    queue: int
    head: int
    identifier: int
    flags: CompletionFlag
    where: int
    cycle: int
    beats: int
    starved: int
    barrier: int
    weights: int
    scores: int
    idle: int
    fetched: int
    first_beat: int
    last_beat: int

    @classmethod
    def unpack(cls, data: bytes) -> "Completion":
        """Decode 64 bytes.

        Raises:
            ValueError: there is no such status.
        """
        (where, flags, head, queue, identifier, state, cycle, beats, starved, barrier, weights, scores,
         idle, fetched, first_beat, last_beat) = _COMPLETION.unpack(data)
        return cls(unpack_state(state), queue, head, identifier, CompletionFlag(flags), where, cycle, beats, starved,
                   barrier, weights, scores, idle, fetched, first_beat, last_beat)


def pack_completion(*, where: int, flags: int, head: int, queue: int, identifier: int, state: int) -> bytes:
    """The bytes of a `COMPLETION` whose counters are zero."""
    return _COMPLETION.pack(where, flags, head, queue, identifier, state, *_NO_COUNTERS)


_NO_COUNTERS = (0,) * (len(COMPLETION.fields) - len(("where", "flags", "head", "queue", "identifier", "state")))


def pack_state(status: int, phase: int) -> int:
    """The field `state` of a completion."""
    kind = STATUS_TYPE if status != Status.OK else 0
    return (kind << STATUS_BITS | status) << 1 | phase


_STATES = {pack_state(status, 0) >> 1: status for status in Status}


def unpack_state(state: int) -> Status:
    """The status in the field `state` of a completion.

    Raises:
        ValueError: there is no such status.
    """
    status = _STATES.get(state >> 1)
    if status is None:
        raise ValueError(f"state must be a `Status` of its status code type and the phase, not {state:#06x}")
    return status


def lines(size: int) -> int:
    """Whole lines that `size` bytes take."""
    return -(-size // LINE_BYTES)


def query_row_bytes(head_dim: int) -> int:
    """Bytes of one row of a query block: its `ROW` record and its padded q."""
    return ROW.size + lines(head_dim * 2) * LINE_BYTES


def fp32_block_bytes(head_dim: int) -> int:
    """Bytes of head_dim fp32 padded to whole lines: the mean of V in front of a table, or the outputs of a row."""
    return lines(head_dim * 4) * LINE_BYTES


def table_bytes(mode: Mode, stripes: int, head_dim: int) -> int:
    """Bytes of a table, the mean of V in front of it included; the device reads whole lines of it."""
    entry = TABLE_ENTRY.size if mode is Mode.DENSE else TABLE_ENTRY.size + SKETCH_ENTRY.size
    return (fp32_block_bytes(head_dim) if mode.blended else 0) + stripes * entry


def result_row_bytes(head_dim: int) -> int:
    """Bytes of one row of a result block: head_dim fp32 and the `TRAILER`."""
    return fp32_block_bytes(head_dim) + TRAILER.size


def read_token_bytes(head_dim: int, element_bytes: int = 2) -> int:
    """Bytes that a READ writes for a token: K and V, each padded to whole lines.

    Args:
        head_dim: elements of a token.
        element_bytes: bytes that each takes where it is stored (`Config.kv_element_bytes`).
    """
    return 2 * lines(head_dim * element_bytes) * LINE_BYTES


def fp32_bits(value: float) -> int:
    """Bit pattern of the fp32 nearest to value."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


FP32_SPECIAL = 0x7F80_0000
"""Exponent field of an fp32 infinity or NaN."""


def is_positive_normal(bits: int) -> bool:
    """Whether the bit pattern is that of a positive normal fp32, as a command's scale must be."""
    return 0x0080_0000 <= bits < FP32_SPECIAL
