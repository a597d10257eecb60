"""What comes back: results of jobs, plans, and how the results of a plan's jobs become one."""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.accounts import JobAccount, attend_cost, times_of
from kvattic.driver.jobs import Job
from kvattic.errors import RangeError, RequestError
from kvattic.merge import Partial, merge
from kvattic.spec.blocks import Results, unpack_results
from kvattic.spec.commands import Completion, CompletionFlag, Mode
from kvattic.spec.elements import Bits, Integers
from kvattic.spec.formats import CODES_FRACTION, CODES_LIMIT, SCORE_FRACTION, SCORE_MAX, VALUE_FRACTION
from kvattic.timing import JobTimes
from kvattic.timing.cost import Cost

if TYPE_CHECKING:
    from kvattic.driver.sequence import Sequence

__all__ = ["AttendPlan", "AttendResult", "JobResult", "Part", "ReadResult", "check_range"]


class JobResult:
    """What the device wrote for one job; the arrays mean nothing unless completion.status is OK.

    Args:
        block: the result block, rows * result_row_bytes(dim) bytes; taken apart when it is looked at.
        rows: query rows.
        dim: head_dim.
        completion: the completion entry.
        account: what it cost; None: not known.

    Attributes:
        block, completion, account: the same.
    """

    __slots__ = ("_found", "_shape", "account", "block", "completion")

    def __init__(self, block: bytes, rows: int, dim: int, completion: Completion,
                 account: JobAccount | None = None) -> None:
        self.block = block
        self.completion = completion
        self.account = account
        self._shape = rows, dim
        self._found: Results | None = None

    @property
    def _results(self) -> Results:
        if self._found is None:
            self._found = unpack_results(self.block, *self._shape)
        return self._found

    @property
    def bits(self) -> NDArray[np.uint32]:
        """uint32, (rows, head_dim), fp32 bit patterns of the output."""
        return self._results.output

    @property
    def maximum(self) -> Integers:
        """int64, (rows,), largest score, log2 domain, SCORE_FRACTION fractional bits."""
        return self._results.maximum

    @property
    def denominator(self) -> NDArray[np.uint64]:
        """uint64, (rows,), sum of the weights, VALUE_FRACTION fractional bits."""
        return self._results.denominator

    @property
    def partial(self) -> Partial:
        """What `kvattic.merge.merge` takes."""
        return Partial(
            self.bits.view(np.float32).astype(np.float64),
            self.maximum,
            self.denominator.astype(np.float64),
        )


class ReadResult(NamedTuple):
    """What the device wrote for one READ; the arrays are empty unless completion.status is OK.

    Members:
        key, value: uint16, (tokens, head_dim), bit patterns.
        completion: the completion entry.
    """

    key: Bits
    value: Bits
    completion: Completion


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendResult:
    """Attention of one call.

    In the sparse modes maximum, denominator and lse are of the tokens that were attended, with their exact scores, so
    less than those of all tokens.  In sparf and fetched the output is alpha * softmax(...) V over these tokens plus
    (1 - alpha) * mean of V, where alpha is their share in the approximate softmax, which is not reported.  So results
    over parts of a sequence cannot be merged by lse in these two.

    Attributes:
        output: float32, (q_heads, n_queries, head_dim); zero where a query attends nothing.
        maximum: int64, (q_heads, n_queries), largest score, log2 domain, SCORE_FRACTION fractional
            bits; SCORE_MASKED where a query attends nothing.
        denominator: uint64, (q_heads, n_queries), sum of 2**(score - maximum), VALUE_FRACTION
            fractional bits.  The device's own integer when one job served the query; about 1e-7
            off it where token ranges were merged, as the weights' rounding differs.
        completions: one for each job, in the order of the jobs: by KV head, then query rows, then
            token range.
        accounts: likewise, what each job cost: what `cost` is made from.
    """

    output: NDArray[np.float32]
    maximum: Integers
    denominator: NDArray[np.uint64]
    completions: list[Completion]
    accounts: tuple[JobAccount, ...] = ()

    @property
    def cost(self) -> Cost:
        """What the drive did for this answer, and how long it took from its submission to its last completion.

        Of jobs that were in flight together with others, the time counts from the first doorbell of all.  On the golden
        device the time is modelled, when it is asked for; on hardware it is that of the completions.

        Raises:
            RequestError: no device has computed this result.
        """
        if not self.accounts:
            raise RequestError("this result has no cost: no device has computed it")
        return attend_cost(self.accounts)

    @property
    def times(self) -> list[JobTimes] | None:
        """Of each job in `completions`, when its command was fetched, its beats moved, and its completion was written.

        In cycles of the drive's counter CYCLES, which stands while the drive is idle; of several drives, each has its
        own.  None on a device that keeps no time of its own, as the golden one: `kvattic.timing` models it.
        """
        times = [times_of(completion) for completion in self.completions]
        return None if None in times else [each for each in times if each is not None]

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
        parts: which rows each of the jobs serves.
        value_scale: what a stored 1.0 of V stands for, float32, (kv_heads,), by which outputs are multiplied; None: 1.
    """

    sequence: "Sequence"
    shape: tuple[int, int, int]
    jobs: list[Job]
    parts: list[Part]
    value_scale: NDArray[np.float32] | None = None

    def finish(self, results: Series[JobResult]) -> AttendResult:
        """Put the jobs' results together, merging token ranges.

        Args:
            results: of `jobs`, in their order.

        Raises:
            RangeError: a score or a value was too large to be computed exactly.
        """
        accounts = tuple(result.account for result in results if result.account is not None)
        self.sequence.count_jobs(len(results), accounts)
        for job, result in zip(self.jobs, results, strict=True):
            if result.completion.flags:
                check_range(job, result.completion.flags)
        q_heads, n_queries, head_dim = self.shape
        kv_heads = self.sequence.kv_heads
        bits, maximum, denominator = self._rows(results, kv_heads, q_heads // kv_heads * n_queries)
        # Rows are ordered by query, then by head of the group (see `planning.Planner.plan`).
        shape = (kv_heads, n_queries, q_heads // kv_heads)
        outputs = bits.view(np.float32)
        if self.value_scale is not None:
            outputs = outputs * self.value_scale[:, None, None]
        output = outputs.reshape(*shape, head_dim).swapaxes(1, 2).reshape(self.shape)
        return AttendResult(
            output=np.ascontiguousarray(output),
            maximum=maximum.reshape(shape).swapaxes(1, 2).reshape(self.shape[:2]).copy(),
            denominator=denominator.reshape(shape).swapaxes(1, 2).reshape(self.shape[:2]).copy(),
            completions=[result.completion for result in results],
            accounts=accounts,
        )

    def _rows(self, results: Series[JobResult], kv_heads: int,
              rows: int) -> tuple[NDArray[np.uint32], Integers, NDArray[np.uint64]]:
        """Outputs, maxima and denominators by KV head and row."""
        head_dim, shape = self.shape[2], (kv_heads, rows)
        places = [part.kv_head * rows + part.rows.start for part in self.parts if len(part.jobs) == 1]
        if len(places) == len(results) == len(self.parts) and places == sorted(places):
            # Each job has the rows that follow those of the one before: all at once.
            found = unpack_results(b"".join([result.block for result in results]), kv_heads * rows, head_dim)
            return (found.output.reshape(*shape, head_dim), found.maximum.reshape(shape),
                    found.denominator.reshape(shape))
        bits = np.zeros((*shape, head_dim), np.uint32)
        maximum, denominator = np.zeros(shape, np.int64), np.zeros(shape, np.uint64)
        for part in self.parts:
            place = (part.kv_head, part.rows)
            if len(part.jobs) == 1:
                one = results[part.jobs[0]]
                bits[place], maximum[place], denominator[place] = one.bits, one.maximum, one.denominator
            else:
                whole = merge([results[job].partial for job in part.jobs])
                bits[place] = whole.output.astype(np.float32).view(np.uint32)
                maximum[place] = whole.maximum
                denominator[place] = np.rint(whole.denominator).astype(np.uint64)
        return bits, maximum, denominator


def check_range(job: Job, flags: CompletionFlag) -> None:
    """Refuse a result that was clipped at the top of a window.

    Raises:
        RangeError: names the job and the window.
    """
    name = job.label or "a job"
    if flags & CompletionFlag.SCORE_OVERFLOW:
        codes = (f", and by codes that of two neighbouring features within {CODES_LIMIT >> CODES_FRACTION:,}"
                 if job.mode is Mode.CODES else "")
        raise RangeError(f"{name}: a score, or the share of one feature in it, is beyond the drive's range: scale * "
                         f"log2(e) * q.k must be within {SCORE_MAX >> SCORE_FRACTION:,} either way{codes}; make q, K "
                         "or the scale smaller")
    if flags & CompletionFlag.VALUE_OVERFLOW:
        raise RangeError(f"{name}: V is beyond the drive's range, about a million (2**20) in bf16; make it smaller")
