"""Layout of everything that crosses host memory: commands, query blocks, results, completions, and their codes.

All integers are little-endian; every record is a whole number of 64-byte lines, which is the unit of the device's
AXI4 bursts.  RTL, driver, golden device and docs read these tables.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

LINE_BYTES = 64
"""Unit of the device's AXI4 bursts, and alignment of every address in a command."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: name, byte offset, width in bytes, meaning."""

    name: str
    offset: int
    size: int
    doc: str


@dataclass(frozen=True, slots=True)
class Record:
    """A fixed layout of `size` bytes; bytes that no field covers are reserved and zero."""

    name: str
    size: int
    fields: tuple[Field, ...]

    def pack(self, **values: int) -> bytes:
        """The record's bytes; fields that are not given are zero."""
        out = bytearray(self.size)
        for name, value in values.items():
            field = self[name]
            out[field.offset : field.offset + field.size] = int(value).to_bytes(field.size, "little")
        return bytes(out)

    def unpack(self, data: bytes) -> dict[str, int]:
        """All fields of the record as unsigned integers."""
        return {f.name: int.from_bytes(data[f.offset : f.offset + f.size], "little") for f in self.fields}

    def __getitem__(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"{self.name} has no field {name!r}")


class Opcode(IntEnum):
    """What a command asks for."""

    ATTEND = 0x81
    """Attention of one job: the query rows that read one KV head."""


class Status(IntEnum):
    """How a command ended; `where` of the completion says which place."""

    OK = 0
    """The results are written."""
    INVALID_OPCODE = 1
    """where: the opcode."""
    INVALID_FIELD = 2
    """A reserved byte is not zero, or `home` is no channel."""
    INVALID_ROWS = 3
    """where: the number of rows."""
    INVALID_LENGTH = 4
    """No token, more tokens than the score buffers hold, token numbers beyond 24 bits, or base_token off its page."""
    INVALID_ADDRESS = 5
    """query or result not 64-byte aligned or not inside the buffer window; where: 0 query, 1 result."""
    INVALID_SCALE = 6
    """scale is not a positive normal fp32."""
    NAN_QUERY = 7
    """where: row * 65536 + channel of the first NaN or infinity in q."""
    NAN_KEY = 8
    """where: the lowest token with a NaN or infinity in K."""
    NAN_VALUE = 9
    """where: the lowest token with a NaN or infinity in V."""
    CODEWORD_TIMEOUT = 10
    """A codeword never came; where: channel * 65536 + kind * 32768 + codewords still missing there."""
    BUS_ERROR = 11
    """The host memory answered a read of the command or query, or a write of the result, with an error; where: 0."""


class CompletionFlag(IntFlag):
    """Things that happened although the command was served."""

    SCORE_OVERFLOW = 1
    """A product or a score was clipped at the top of its window (docs/numerics.md says to what)."""
    VALUE_OVERFLOW = 2
    """A product weight*v was clipped at the top of its window (bf16 only)."""
    DUPLICATE = 4
    """A codeword came twice; the second one was dropped."""


class Kind(IntEnum):
    """What a codeword holds."""

    KEY = 0
    """Tokens of K."""
    VALUE = 1
    """Tokens of V."""


COMMAND = Record("Command", LINE_BYTES, (
    Field("opcode", 0, 1, "`Opcode`"),
    Field("flags", 1, 1, "reserved, zero"),
    Field("identifier", 2, 2, "copied into the completion"),
    Field("rows", 4, 1, "query rows of this job, 1 to config.rows"),
    Field("home", 5, 1, "channel of the first stripe; stripe i is on channel (home + i) mod channels"),
    Field("reserved0", 6, 2, "reserved, zero"),
    Field("key_page", 8, 4, "page of the first K stripe on its channel; channels below home are one page further"),
    Field("value_page", 12, 4, "the same for V"),
    Field("base_token", 16, 4, "number of the first stripe's first token; a multiple of config.tokens_per_page"),
    Field("end_token", 20, 4, "one past the last valid token"),
    Field("tree_token", 24, 4, "first token of the draft tree (end_token where there is none)"),
    Field("scale", 28, 4, "fp32 of softmax scale * log2(e)"),
    Field("query", 32, 8, "address of the query block"),
    Field("result", 40, 8, "address of the result block"),
    Field("reserved1", 48, 8, "reserved, zero"),
    Field("reserved2", 56, 8, "reserved, zero"),
))

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
    Field("status", 0, 2, "`Status`"),
    Field("identifier", 2, 2, "of the command"),
    Field("flags", 4, 4, "`CompletionFlag`"),
    Field("where", 8, 4, "see `Status`"),
    Field("done", 12, 4, "1: this entry was written"),
    Field("cycle", 16, 8, "engine cycle of the completion, from the doorbell"),
    Field("beats", 24, 8, "lane beats used since the doorbell, all lanes"),
    Field("starved", 32, 4, "lane cycles since the doorbell without a beat although codewords were requested"),
    Field("barrier", 36, 4, "lane cycles in which V waited for the maximum"),
    Field("weights", 40, 4, "lane cycles in which a V beat waited for its weight"),
    Field("scores", 44, 4, "lane cycles in which a K beat waited for the score unit"),
    Field("idle", 48, 4, "lane cycles without work"),
))
"""beats + starved + barrier + weights + scores + idle = channels * cycle (modulo 2**32)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A decoded completion entry (see `COMPLETION`)."""

    status: Status
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

    @classmethod
    def unpack(cls, data: bytes) -> "Completion":
        """Decode 64 bytes."""
        values = COMPLETION.unpack(data)
        values.pop("done")
        status, flags = Status(values.pop("status")), CompletionFlag(values.pop("flags"))
        return cls(status=status, flags=flags, **values)


def lines(size: int) -> int:
    """Whole lines that `size` bytes take."""
    return -(-size // LINE_BYTES)


def query_row_bytes(head_dim: int) -> int:
    """Bytes of one row of a query block: its `ROW` record and its padded q."""
    return ROW.size + lines(head_dim * 2) * LINE_BYTES


def result_row_bytes(head_dim: int) -> int:
    """Bytes of one row of a result block: head_dim fp32 and the `TRAILER`."""
    return lines(head_dim * 4) * LINE_BYTES + TRAILER.size


def fp32_bits(value: float) -> int:
    """Bit pattern of the fp32 nearest to value."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
