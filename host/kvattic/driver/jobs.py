"""What goes to the device: flash commands and jobs, and their bytes."""

from collections.abc import Sequence as Series
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.placement.domains import COMMON_DOMAIN
from kvattic.spec import layout
from kvattic.spec.blocks import Queries, pack_queries, pack_table, put_column
from kvattic.spec.commands import (
    COMMAND,
    FLASH_COMMAND,
    LINE_BYTES,
    READ_COMMAND,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    Mode,
    Opcode,
    fp32_block_bytes,
    lines,
    query_row_bytes,
    read_token_bytes,
    result_row_bytes,
)
from kvattic.spec.config import Config
from kvattic.spec.elements import Bits

__all__ = [
    "MAX_LOCAL_TOKENS",
    "MAX_SINKS",
    "MAX_STRIPES",
    "MAX_UNITS",
    "FlashOperation",
    "Job",
    "PackedQueries",
    "ReadJob",
    "check_blocks",
    "fill_command",
    "fill_read",
    "job_bytes",
    "pack_command",
    "pack_operations",
    "pack_read",
    "read_bytes",
    "table_bytes",
]

MAX_STRIPES = (1 << 8 * COMMAND["stripes"].size) - 1
MAX_UNITS = (1 << 8 * COMMAND["top_units"].size) - 1
MAX_LOCAL_TOKENS = (1 << 8 * COMMAND["local_tokens"].size) - 1
MAX_SINKS = (1 << 8 * COMMAND["sinks"].size) - 1
"""What the fields of a command hold, at most."""


class FlashOperation(NamedTuple):
    """One flash command.

    Members:
        opcode: PROGRAM, ERASE, PROBE or MAP.
        channel: flash channel.
        page: page number on the channel.
        argument: PROGRAM: page of device DRAM; MAP: block; otherwise 0.
        domain: PROGRAM, ERASE: owner of the places; ERASE: 0 skips the check.
    """

    opcode: Opcode
    channel: int
    page: int
    argument: int = 0
    domain: int = COMMON_DOMAIN


class PackedQueries(NamedTuple):
    """A job's query block that was packed beforehand, and what it was packed from.

    Members:
        query, start, end, tree: the job's own arrays.
        data: the block.
    """

    query: Bits
    start: NDArray[Any]
    end: NDArray[Any]
    tree: NDArray[Any]
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One command: query rows over a range of tokens of one KV head.  The device checks it.

    Attributes:
        query: uint16 bit patterns, (rows, head_dim).
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last token of each row.
        tree: integers below 2**32, (rows,), bit i: the row attends token tree_token + i.
        table: uint64, an entry for each stripe (`layout.pack_entries`); read when the job enters the device's queue.
        stripe_pages: pages of K (and of V) in a stripe.
        base_token: number of the first stripe's first token.
        end_token: one past the last valid token.
        tree_token: first token of the draft tree, end_token where there is none.
        scale_bits: fp32 bit pattern of softmax scale * log2(e).
        mode: which tokens are attended; the fields below are for the sparse modes.
        features: SPARF, FETCHED: features that the first pass reads, the paper's r.
        top_units: units that are attended beside those of the tail, the paper's k.
        local_tokens: newest tokens that are always attended; their units count among `top_units`.
        sinks: first tokens of the sequence that are always attended; likewise.
        whole: stripes of the table from this one on are attended whole, wherever they lie, and scored exactly in the
            first pass; they do not count in `top_units`.  Those in device DRAM always are.
        unit_bits: FETCHED, CENTROID: log2 of the codewords of a unit.
        mean: uint32, (head_dim,), fp32 bit patterns of the mean of V; None in modes that do not blend it in.
        sketch: uint64, an entry for each stripe (`layout.pack_sketches`); read like the table.  None in DENSE.
        domain: owner of all places that the table names.
        label: names the job in error messages.
        packed: the query block, if it is packed already; it counts as long as it was packed from these very arrays.
    """

    query: Bits
    start: NDArray[Any]
    end: NDArray[Any]
    tree: NDArray[Any]
    table: NDArray[np.uint64]
    stripe_pages: int
    base_token: int
    end_token: int
    tree_token: int
    scale_bits: int
    mode: Mode = Mode.DENSE
    features: int = 0
    top_units: int = 0
    local_tokens: int = 0
    sinks: int = 0
    whole: int = MAX_STRIPES
    unit_bits: int = 0
    mean: NDArray[np.uint32] | None = None
    sketch: NDArray[np.uint64] | None = None
    domain: int = COMMON_DOMAIN
    label: str = ""
    packed: PackedQueries | None = None

    @property
    def rows(self) -> int:
        """Query rows."""
        return len(self.query)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadJob:
    """One READ: K and V of a range of tokens of one KV head, from the beginning of a page on.

    Attributes:
        table: uint64, an entry for each stripe that the tokens lie in; read when the job enters the device's queue.
        stripe_pages: pages of K (and of V) in a stripe.
        first_page: of the first stripe: with which the tokens begin.
        base_token: number of the first token.
        tokens: how many.
        domain: owner of all places that the table names.
        label: names the job in error messages.
    """

    table: NDArray[np.uint64]
    stripe_pages: int
    first_page: int
    base_token: int
    tokens: int
    domain: int = COMMON_DOMAIN
    label: str = ""

    def page_table(self, tokens_per_page: int) -> NDArray[np.uint64]:
        """The table of the command, uint64, an entry for each page: so that it can begin with any page of a stripe."""
        stripe, page = np.divmod(self.first_page + np.arange(-(-self.tokens // tokens_per_page)), self.stripe_pages)
        entries = layout.unpack_entries(self.table[stripe])
        return layout.pack_entries(entries.channel, entries.key_page + page, entries.value_page + page, entries.dram)


def read_bytes(job: ReadJob, config: Config) -> tuple[int, int]:
    """Bytes of a READ's table, in whole lines, and of what it writes."""
    entries = -(-job.tokens // config.tokens_per_page)
    size = read_token_bytes(config.head_dim, config.kv_element_bytes)
    return lines(entries * TABLE_ENTRY.size) * LINE_BYTES, job.tokens * size


def pack_read(job: ReadJob, config: Config) -> bytes:
    """The READ of a job, without addresses."""
    return READ_COMMAND.pack(
        opcode=Opcode.READ, domain=job.domain, tokens=job.tokens, stripe_pages=1,
        stripes=-(-job.tokens // config.tokens_per_page))


def fill_read(job: ReadJob, config: Config, line: bytearray, address: int) -> bytes:
    """Put the addresses of a READ's blocks, one after the other, into its command; returns the table, as of now."""
    size, _ = read_bytes(job, config)
    READ_COMMAND.put(line, table=address, result=address + size)
    return job.page_table(config.tokens_per_page).astype("<u8", copy=False).tobytes().ljust(size, b"\0")


def table_bytes(job: Job) -> int:
    """Bytes of the job's table with what stands in front of it, in whole lines."""
    return _table_bytes(len(job.table), job.sketch is not None, 0 if job.mean is None else job.mean.size)


@cache
def _table_bytes(stripes: int, sketches: bool, mean: int) -> int:
    entry = TABLE_ENTRY.size + SKETCH_ENTRY.size * sketches
    return fp32_block_bytes(mean) + lines(stripes * entry) * LINE_BYTES


def check_blocks(job: Job) -> None:
    """Check before submission that a job's table, sketch and mean fit together.

    Raises:
        RequestError: mean or sketch is not what the mode needs.
    """
    if job.mode is Mode.DENSE and job.sketch is None and job.mean is None:
        return
    if job.sketch is not None and len(job.sketch) != len(job.table):
        raise RequestError(f"a job's sketch must have an entry for each of the {len(job.table)} stripes, not "
                           f"{len(job.sketch)}")
    wanted = job.query.shape[1] if job.mode.blended else 0
    given = 0 if job.mean is None else job.mean.size
    if given != wanted:
        raise RequestError(f"a job of mode {job.mode.name} must have a mean of V of {wanted} features (SPARF, FETCHED: "
                           f"head_dim, else none), not {given}")


def job_bytes(job: Job, dim: int) -> int:
    """Host memory that the job's blocks take: queries, table and results."""
    return job.rows * _row_bytes(dim) + table_bytes(job)


@cache
def _row_bytes(dim: int) -> int:
    """Host memory that a row takes."""
    return query_row_bytes(dim) + result_row_bytes(dim)


def pack_command(job: Job) -> bytes:
    """The job's command, without addresses.

    Raises:
        OverflowError: a number does not fit its field.
    """
    return _pack_command(
        job.mode, job.rows, job.stripe_pages, len(job.table), job.base_token, job.end_token, job.domain, job.tree_token,
        job.scale_bits, job.features, job.top_units, job.local_tokens, job.sinks, job.unit_bits)


_PACKED = ("mode", "rows", "stripe_pages", "stripes", "base_token", "end_token", "domain", "tree_token", "scale",
           "features", "top_units", "local_tokens", "sinks", "unit_bits")


@lru_cache(maxsize=256)
def _pack_command(*values: int) -> bytes:
    """The command with these fields: the heads of a call share them."""
    return COMMAND.pack(opcode=Opcode.ATTEND, **dict(zip(_PACKED, values, strict=True)))


def fill_command(job: Job, dim: int, line: bytearray, address: int) -> bytes:
    """Put the addresses of a job's blocks into its command; returns the blocks that the device reads, as of now.

    Args:
        job: with its table.
        dim: head_dim.
        line: the command.
        address: of the blocks, one after the other.
    """
    table, size = address + job.rows * query_row_bytes(dim), table_bytes(job)
    COMMAND.put(line, query=address, table=table, result=table + size)
    packed = job.packed
    if (packed is not None and job.query is packed.query and job.start is packed.start and job.end is packed.end
            and job.tree is packed.tree):
        queries = packed.data
    else:
        queries = pack_queries(Queries(job.query, job.start, job.end, job.tree))
    if job.sketch is None and job.mean is None:
        return queries + job.table.astype("<u8", copy=False).tobytes().ljust(size, b"\0")
    # What the job attends whole is marked here, for the same stripe may be ranked in another job.
    entries = job.table if job.sketch is None else layout.mark_whole(job.table, job.whole)
    return queries + pack_table(entries, job.sketch, job.mean)


def pack_operations(operations: Series[FlashOperation]) -> list[bytes]:
    """The commands of flash operations.

    Raises:
        RequestError: a number does not fit its field of the command.
    """
    if not operations:
        return []
    fields = [FLASH_COMMAND[name] for name in FlashOperation._fields]
    try:
        numbers = np.array(operations, np.int64)
        fits = not ((numbers < 0) | (numbers >> [8 * field.size for field in fields] != 0)).any()
    except OverflowError:
        fits = False
    if not fits:
        raise RequestError("a number of a flash operation does not fit its field of the command")
    numbers[np.isin(numbers[:, 0], (Opcode.PROBE, Opcode.MAP)), -1] = 0     # in which no domain is asked
    block = np.zeros((len(operations), LINE_BYTES), np.uint8)
    for field, column in zip(fields, numbers.T, strict=True):
        put_column(block, field, column)
    return [line.tobytes() for line in block]
