"""What crosses to the device and back: flash commands, jobs, plans and their results; and what a status means."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import KvatticError, RangeError, RequestError
from kvattic.merge import Partial, merge
from kvattic.placement.allocator import COMMON_DOMAIN
from kvattic.spec import layout
from kvattic.spec.commands import (
    COMMAND,
    FLASH_COMMAND,
    LINE_BYTES,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    TRAILER,
    Completion,
    CompletionFlag,
    Field,
    Mode,
    Opcode,
    Status,
    fp32_block_bytes,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import ELEMENT_BYTES
from kvattic.spec.formats import SCORE_FRACTION, SCORE_MAX, VALUE_FRACTION

if TYPE_CHECKING:
    from kvattic.driver.sequence import Sequence

__all__ = ["AttendPlan", "AttendResult", "FlashOperation", "Job", "JobResult", "explain"]

MAX_STRIPES = (1 << 8 * COMMAND["stripes"].size) - 1
MAX_SINKS = (1 << 8 * COMMAND["sinks"].size) - 1

Bits: TypeAlias = NDArray[np.uint16]
Bytes: TypeAlias = NDArray[np.uint8]
Integers: TypeAlias = NDArray[np.int64]


class FlashOperation(NamedTuple):
    """One flash command.

    Members:
        opcode: PROGRAM, ERASE, PROBE or MAP.
        channel: flash channel.
        page: page number on the channel.
        argument: PROGRAM: page of device DRAM; MAP: block; otherwise 0.
        domain: PROGRAM, ERASE: owner of the places; ERASE: 0 if nobody shall ask for it.
    """

    opcode: Opcode
    channel: int
    page: int
    argument: int = 0
    domain: int = COMMON_DOMAIN


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
        local_tokens: newest tokens that are attended in any case; their units count among `top_units`.
        sinks: first tokens of the sequence that are attended in any case; likewise.
        whole: stripes of the table from this one on are attended whole, wherever they lie, and scored exactly in the
            first pass; they do not count in `top_units`.  Those in device DRAM are so in any case.
        unit_bits: FETCHED, CENTROID: log2 of the codewords of a unit.
        mean: SPARF, FETCHED: uint32, (head_dim,), fp32 bit patterns of the mean of V; None if there is none.
        sketch: uint64, an entry for each stripe (`layout.pack_sketches`); read like the table.  None in DENSE.
        domain: owner of all places that the table names.
        label: names the job in error messages.
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

    @property
    def rows(self) -> int:
        """Query rows."""
        return len(self.query)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobResult:
    """What the device wrote for one job; the arrays mean nothing unless completion.status is OK.

    Attributes:
        bits: uint32, (rows, head_dim), fp32 bit patterns of the output.
        maximum: int64, (rows,), largest score, log2 domain, SCORE_FRACTION fractional bits.
        denominator: uint64, (rows,), sum of the weights, VALUE_FRACTION fractional bits.
        completion: the completion entry.
    """

    bits: NDArray[np.uint32]
    maximum: Integers
    denominator: NDArray[np.uint64]
    completion: Completion

    @property
    def partial(self) -> Partial:
        """What `kvattic.merge.merge` takes."""
        return Partial(
            self.bits.view(np.float32).astype(np.float64),
            self.maximum,
            self.denominator.astype(np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendResult:
    """Attention of one call.

    In the sparse modes maximum, denominator and lse are of the tokens that were attended, with their exact scores, so
    less than those of all tokens.  In sparf and fetched the output is alpha * softmax(...) V over these tokens plus
    (1 - alpha) * mean of V, alpha being their share in the approximate softmax, which is not reported.  So results over
    parts of a sequence cannot be merged by lse in these two.

    Attributes:
        output: float32, (q_heads, n_queries, head_dim); zero where a query attends nothing.
        maximum: int64, (q_heads, n_queries), largest score, log2 domain, SCORE_FRACTION fractional
            bits; SCORE_MASKED where a query attends nothing.
        denominator: uint64, (q_heads, n_queries), sum of 2**(score - maximum), VALUE_FRACTION
            fractional bits.  The device's own integer when one job served the query; about 1e-7
            off it where token ranges were merged, as the weights' rounding differs.
        completions: one for each job, in the order of the jobs: by KV head, then query rows, then
            token range.
    """

    output: NDArray[np.float32]
    maximum: Integers
    denominator: NDArray[np.uint64]
    completions: list[Completion]

    @property
    def bits(self) -> NDArray[np.uint32]:
        """uint32, (q_heads, n_queries, head_dim), bit patterns of the output."""
        return self.output.view(np.uint32)

    @property
    def lse(self) -> NDArray[np.float64]:
        """float64, (q_heads, n_queries), log(sum of exp(scale * q.k)); -inf for no token."""
        with np.errstate(divide="ignore"):
            log2 = self.maximum / (1 << SCORE_FRACTION) + np.log2(self.denominator) - VALUE_FRACTION
        result: NDArray[np.float64] = log2 * math.log(2)
        return result

    @property
    def flags(self) -> CompletionFlag:
        """Everything that happened in any of the jobs."""
        flags = CompletionFlag(0)
        for completion in self.completions:
            flags |= completion.flags
        return flags


class Part(NamedTuple):
    """Rows of a plan, and the jobs (one for each token range) that serve them."""

    kv_head: int
    rows: slice
    jobs: range


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendPlan:
    """The jobs of one attention call, not yet run.

    Made by `Sequence.plan`, run by `Device.attend_many`.  It covers the tokens that the sequence had when it was made,
    wherever they lie when it is run.

    Attributes:
        sequence: whose tokens are attended.
        shape: (q_heads, n_queries, head_dim).
        jobs: all commands.
    """

    sequence: "Sequence"
    shape: tuple[int, int, int]
    jobs: list[Job]
    _parts: list[Part]

    def finish(self, results: Series[JobResult]) -> AttendResult:
        """Put the jobs' results together, merging token ranges.

        Args:
            results: of `jobs`, in their order.

        Raises:
            RangeError: a score or a value was too large to be computed exactly.
        """
        self.sequence._counters["JOBS"] += len(results)
        for job, result in zip(self.jobs, results, strict=True):
            check_range(job, result.completion.flags)
        q_heads, n_queries, head_dim = self.shape
        kv_heads = self.sequence.kv_heads
        rows = q_heads // kv_heads * n_queries
        bits = np.zeros((kv_heads, rows, head_dim), np.uint32)
        maximum = np.zeros((kv_heads, rows), np.int64)
        denominator = np.zeros((kv_heads, rows), np.uint64)
        for part in self._parts:
            place = (part.kv_head, part.rows)
            if len(part.jobs) == 1:
                one = results[part.jobs[0]]
                bits[place], maximum[place], denominator[place] = (
                    one.bits,
                    one.maximum,
                    one.denominator,
                )
            else:
                whole = merge([results[job].partial for job in part.jobs])
                bits[place] = whole.output.astype(np.float32).view(np.uint32)
                maximum[place] = whole.maximum
                denominator[place] = np.rint(whole.denominator).astype(np.uint64)
        # Rows are ordered by query, then by head of the group (see Sequence.plan).
        shape = (kv_heads, n_queries, q_heads // kv_heads)
        output = bits.reshape(*shape, head_dim).swapaxes(1, 2).reshape(self.shape).view(np.float32)
        return AttendResult(
            output=np.ascontiguousarray(output),
            maximum=maximum.reshape(shape).swapaxes(1, 2).reshape(self.shape[:2]).copy(),
            denominator=denominator.reshape(shape).swapaxes(1, 2).reshape(self.shape[:2]).copy(),
            completions=[result.completion for result in results],
        )


# Helpers of the driver.


def check_range(job: Job, flags: CompletionFlag) -> None:
    """Refuse a result that was cut at the top of a window.

    Raises:
        RangeError: says of which job and window.
    """
    name = job.label or "a job"
    if flags & CompletionFlag.SCORE_OVERFLOW:
        raise RangeError(f"{name}: a score, or the share of one feature in it, is beyond the drive's range: scale * "
                         f"log2(e) * q.k must be within {SCORE_MAX >> SCORE_FRACTION:,} either way; make q, K or the "
                         "scale smaller")
    if flags & CompletionFlag.VALUE_OVERFLOW:
        raise RangeError(f"{name}: V is beyond the drive's range, about a million (2**20) in bf16; make it smaller")


def explain(completion: Completion) -> str:
    """What a completion's status means, in words."""
    status, where = completion.status, completion.where
    texts: dict[Status, Callable[[], str]] = {
        Status.OK: lambda: "no error",
        Status.INVALID_OPCODE: lambda: f"there is no opcode {where:#04x}",
        Status.INVALID_FIELD: lambda: (
            "a reserved byte is not zero, the device has no such mode, a field is not zero that the mode has no use "
            "for, or stripe_pages is no power of two, more than the score buffer holds, or not a group in a sparse mode"
        ),
        Status.INVALID_ROWS: lambda: f"{where} query rows are none or more than the device has",
        Status.INVALID_LENGTH: lambda: (
            "no token, more tokens than the score buffers hold, or another number of stripes than they take"
        ),
        Status.INVALID_ADDRESS: lambda: (
            f"the {_name(where, 'query block', 'result block', 'table')} is unaligned or out of the buffer window"
        ),
        Status.INVALID_SCALE: lambda: "scale is not a positive normal fp32",
        Status.NAN_QUERY: lambda: (
            f"NaN or infinity in query row {where >> 16}, feature {where & 0xFFFF}"
        ),
        Status.NAN_KEY: lambda: f"NaN or infinity in K at token {where}",
        Status.NAN_VALUE: lambda: f"NaN or infinity in V at token {where}",
        Status.CODEWORD_TIMEOUT: lambda: (
            f"channel {where >> 16} still owes {where & 0x7FFF} codewords of "
            f"{'V' if where >> 15 & 1 else 'K (or of what the first pass reads)'}"
        ),
        Status.BUS_ERROR: lambda: "the host memory or the device DRAM answered with an error",
        Status.INVALID_TABLE: lambda: (
            f"entry {where} of the table names no channel, has a reserved bit set, or is one too many for its channel "
            "(or the sequence was freed)"
        ),
        Status.INVALID_PLACE: lambda: "there is no such channel, page or block",
        Status.UNREADABLE_KEY: lambda: f"K of token {where} on cannot be read",
        Status.UNREADABLE_VALUE: lambda: f"V of token {where} on cannot be read",
        Status.PROGRAM_FAILED: lambda: "the page was not programmed",
        Status.ERASE_FAILED: lambda: "the block was not erased",
        Status.BAD_BLOCK: lambda: "the block has the factory's mark of a bad block",
        Status.DIE_TIMEOUT: lambda: "the die stays busy",
        Status.INVALID_SELECTION: lambda: "the number of " + _name(
            where, "features is none or more than head_dim", "units is none or more than the tokens make",
            "local tokens is more than the units hold", "codewords of a unit is more than the device can have"),
        Status.NO_SKETCH: lambda: (
            f"the stripe of entry {where} was written without what the mode's first pass reads: K in the feature "
            "layout, or centroids"
        ),
        Status.NAN_MEAN: lambda: f"NaN or infinity in the mean of V, feature {where}: V holds one in this feature",
        Status.UNREADABLE_SKETCH: lambda: f"what the first pass reads for token {where} on cannot be read",
        Status.NOT_PERMITTED: lambda: _name(
            where, "the opcode is for queue 0 alone", "the domain is not given to the queue"),
        Status.NOT_OWNED: lambda: (
            f"what entry {where} of the table names is not the domain's (PROGRAM, ERASE: 0 the flash page, 1 the page "
            "of device DRAM)"
        ),
        Status.INVALID_QUEUE: lambda: "the queue's " + _name(
            where, "number is none that can be created or deleted", "entries are no power of two in range",
            "submission ring is unaligned", "completion ring is unaligned"),
        Status.QUEUE_BUSY: lambda: "commands of the queue are under way; delete it again later",
        Status.INVALID_GRANT: lambda: "there is no such " + _name(where, "kind", "zone, region or queue", "domain"),
    }
    return f"{status.name}: {texts[status]()}"


def _name(where: int, *names: str) -> str:
    return names[min(where, len(names) - 1)]


def end_block(action: Callable[[], None], error: BaseException | None) -> None:
    """Clean up at the end of a with block; an error of that does not hide the one that ended the block."""
    try:
        action()
    except KvatticError:
        if error is None:
            raise


def table_bytes(job: Job) -> int:
    """Bytes of the job's table with what stands in front of it, in whole lines."""
    entry = TABLE_ENTRY.size if job.sketch is None else TABLE_ENTRY.size + SKETCH_ENTRY.size
    return _mean_bytes(job) + lines(len(job.table) * entry) * LINE_BYTES


def _mean_bytes(job: Job) -> int:
    """Bytes of the mean of V in front of the job's table, in whole lines."""
    return 0 if job.mean is None else fp32_block_bytes(job.mean.size)


def check_blocks(job: Job) -> None:
    """Whether a job's table, sketch and mean fit together, before it is submitted.

    Raises:
        RequestError: mean or sketch is not what the mode needs.
    """
    if job.sketch is not None and len(job.sketch) != len(job.table):
        raise RequestError(f"a job's sketch must have an entry for each of the {len(job.table)} stripes, not "
                           f"{len(job.sketch)}")
    wanted = job.query.shape[1] if job.mode in (Mode.SPARF, Mode.FETCHED) else 0
    given = 0 if job.mean is None else job.mean.size
    if given != wanted:
        raise RequestError(f"a job of mode {job.mode.name} must have a mean of V of {wanted} features (SPARF, FETCHED: "
                           f"head_dim, else none), not {given}")


def pack_table(job: Job) -> bytes:
    """The job's table as the device reads it, padded to whole lines, behind the mean of V if there is one.

    What the job attends whole is marked here, for the same stripe may be ranked in another job.
    """
    columns = [job.table] if job.sketch is None else [layout.mark_whole(job.table, job.whole), job.sketch]
    mean = b"" if job.mean is None else np.asarray(job.mean).astype("<u4").tobytes().ljust(_mean_bytes(job), b"\0")
    return (mean + np.stack(columns, axis=1).astype("<u8").tobytes()).ljust(table_bytes(job), b"\0")


def job_bytes(job: Job, dim: int) -> int:
    """Host memory that the job's blocks take: queries, table and results."""
    return job.rows * (query_row_bytes(dim) + result_row_bytes(dim)) + table_bytes(job)


def pack_command(job: Job) -> bytes:
    """The job's command, without addresses.

    Raises:
        OverflowError: a number does not fit its field.
    """
    return COMMAND.pack(
        opcode=Opcode.ATTEND, mode=job.mode, rows=job.rows, stripe_pages=job.stripe_pages, stripes=len(job.table),
        base_token=job.base_token, end_token=job.end_token, domain=job.domain, tree_token=job.tree_token,
        scale=job.scale_bits, features=job.features, top_units=job.top_units, local_tokens=job.local_tokens,
        sinks=job.sinks,
        unit_bits=job.unit_bits)


def fill_command(job: Job, dim: int, line: bytearray, address: int) -> bytes:
    """Put the addresses of a job's blocks into its command; the blocks that the device reads, as they are now.

    Args:
        job: with its table.
        dim: head_dim.
        line: the command.
        address: of the blocks, one after the other.
    """
    for name, size in (("query", job.rows * query_row_bytes(dim)), ("table", table_bytes(job)),
                       ("result", job.rows * result_row_bytes(dim))):
        field = COMMAND[name]
        line[field.offset : field.offset + field.size] = address.to_bytes(field.size, "little")
        address += size
    return pack_query(job) + pack_table(job)


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
        put_field(block, field, column)
    return [line.tobytes() for line in block]


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Refuse what is not an int in a range.

    Raises:
        RequestError: names the argument and says what it was.
    """
    good = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not good or not least <= value <= most:
        raise RequestError(f"{name} must be an int from {least:,} to {most:,}, not {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive int.

    Raises:
        RequestError: names the argument and says what it was.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name} must be a positive int, not {value!r}")


def put_field(block: NDArray[np.uint8], field: Field, values: NDArray[Any]) -> None:
    """Write an unsigned field into each row of a block of records."""
    column = np.ascontiguousarray(values).astype("<u8")
    block[:, field.offset : field.offset + field.size] = column[:, None].view(np.uint8)[:, : field.size]


def pack_query(job: Job) -> bytes:
    """The query block: for each row its `ROW` record and q, padded to whole lines."""
    rows, dim = job.query.shape
    block = np.zeros((rows, query_row_bytes(dim)), np.uint8)
    put_field(block, ROW["start_token"], job.start)
    put_field(block, ROW["end_token"], job.end)
    put_field(block, ROW["tree"], job.tree)
    block[:, ROW.size : ROW.size + dim * ELEMENT_BYTES] = np.ascontiguousarray(
        job.query, "<u2"
    ).view(np.uint8)
    return block.tobytes()


def unpack_result(data: bytes, rows: int, dim: int, completion: Completion) -> JobResult:
    """A result block and its completion as arrays.

    Args:
        data: rows * result_row_bytes(dim) bytes.
        rows: query rows.
        dim: head_dim.
        completion: decoded.
    """
    block = np.frombuffer(data, np.uint8).reshape(rows, result_row_bytes(dim))

    def field(offset: int, dtype: str, count: int = 1) -> NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        return np.ascontiguousarray(block[:, offset : offset + size]).view(dtype)

    trailer = lines(dim * 4) * LINE_BYTES
    return JobResult(
        bits=field(0, "<u4", dim).astype(np.uint32),
        maximum=field(trailer + TRAILER["maximum"].offset, "<i8")[:, 0].astype(np.int64),
        denominator=field(trailer + TRAILER["denominator"].offset, "<u8")[:, 0].astype(np.uint64),
        completion=completion,
    )
