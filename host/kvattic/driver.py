"""The host library: sequences of K and V in the device's flash, and attention over them.

`Device` works over any `Transport`.  `Sequence` writes K and V and plans attention.  `Device.run`
is the layer below: a list of `Job` in, a list of `JobResult` out, in batches that fit the host
    memory.
"""

import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic import golden, layout
from kvattic.allocator import PageAllocator
from kvattic.commands import (
    COMMAND,
    COMPLETION,
    LINE_BYTES,
    ROW,
    TRAILER,
    TREE_BITS,
    Completion,
    CompletionFlag,
    Field,
    Kind,
    Opcode,
    Status,
    fp32_bits,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import ELEMENT_BYTES, Config
from kvattic.errors import (
    CapacityError,
    ConfigMismatchError,
    DeviceBusyError,
    DeviceStatusError,
    DeviceTimeoutError,
    RequestError,
)
from kvattic.formats import SCORE_FRACTION, VALUE_FRACTION
from kvattic.registers import ID_MAGIC, VERSION, Control, StatusBit
from kvattic.transport import MAX_COMMANDS, Progress, Transport

__all__ = ["AttendPlan", "AttendResult", "Device", "Job", "JobResult", "Sequence"]

DEFAULT_TIMEOUT_S = 60.0

Bits: TypeAlias = NDArray[np.uint16]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One command: query rows over a range of tokens of one KV head.  The device checks it.

    Attributes:
        query: uint16 bit patterns, (rows, head_dim).
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last token of each row.
        tree: integers below 2**32, (rows,), bit i: the row attends token tree_token + i.
        home: channel of the job's first stripe.
        key_page: page of the first K stripe (see `layout`).
        value_page: page of the first V stripe.
        base_token: number of the first stripe's first token.
        end_token: one past the last valid token.
        tree_token: first token of the draft tree, end_token where there is none.
        scale_bits: fp32 bit pattern of softmax scale * log2(e).
        label: names the job in error messages.
    """

    query: Bits
    start: NDArray[Any]
    end: NDArray[Any]
    tree: NDArray[Any]
    home: int
    key_page: int
    value_page: int
    base_token: int
    end_token: int
    tree_token: int
    scale_bits: int
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
    def partial(self) -> golden.Partial:
        """What `golden.merge` takes."""
        return golden.Partial(
            self.bits.view(np.float32).astype(np.float64),
            self.maximum,
            self.denominator.astype(np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendResult:
    """Attention of one call.

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


class _Part(NamedTuple):
    """Rows of a plan, and the jobs (one for each token range) that serve them."""

    kv_head: int
    rows: slice
    jobs: range


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendPlan:
    """The jobs of one attention call, not yet run.

    Made by `Sequence.plan`, run by `Device.attend_many`.  It covers the tokens
    that the sequence had when it was made.

    Attributes:
        sequence: whose tokens are attended.
        shape: (q_heads, n_queries, head_dim).
        jobs: all commands.
    """

    sequence: "Sequence"
    shape: tuple[int, int, int]
    jobs: list[Job]
    _parts: list[_Part]

    def finish(self, results: Series[JobResult]) -> AttendResult:
        """Put the jobs' results together, merging token ranges.

        Args:
            results: of `jobs`, in their order.
        """
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
                whole = golden.merge([results[job].partial for job in part.jobs])
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


class _Masks(NamedTuple):
    """Per query: int64 (n_queries,) each; a query with end <= start attends nothing."""

    start: Integers
    end: Integers
    tree: Integers
    tree_token: int


class Device:
    """A device over any transport: hands out its flash to sequences and runs their attention.

    Usable as a context manager.

    Args:
        transport: the way to the device.
        timeout_s: patience with the device, in seconds of wall-clock time.

    Raises:
        ConfigMismatchError: no kvattic device, another major version, or built from another
            configuration.
        DeviceTimeoutError: the device does not become ready.
    """

    def __init__(self, transport: Transport, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.transport = transport
        self.config: Config = transport.config
        self.timeout_s = timeout_s
        self._closed = False
        self._sequences: list[Sequence] = []
        self._next_head = 0
        if (magic := transport.read_register("ID")) != ID_MAGIC:
            raise ConfigMismatchError(
                f"this is no kvattic device: ID is {magic:#010x}, not {ID_MAGIC:#010x}"
            )
        if (version := transport.read_register("VERSION")) >> 16 != VERSION >> 16:
            raise ConfigMismatchError(
                f"the device has version {_version(version)}, this library needs {VERSION >> 16}.x"
            )
        if (found := transport.read_register("CONFIG_HASH")) != self.config.hash:
            raise ConfigMismatchError(
                f"the device was built from another configuration: CONFIG_HASH is {found:#010x}, "
                f"this library's is {self.config.hash:#010x} for {self.config.to_json()}"
            )
        self._allocator = PageAllocator(transport.pages_per_channel)
        self._wait_ready(timeout_s)

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all sequences and refuse all further calls.  Closing twice is no error."""
        for sequence in list(self._sequences):
            sequence.free()
        self._closed = True

    def reset(self) -> None:
        """Abort whatever the device does and wait until it is ready again.  Flash keeps its pages.

        Raises:
            DeviceTimeoutError: the device does not become ready.
        """
        self._check_open()
        self.transport.write_register("CONTROL", Control.RESET)
        self._wait_ready(self.timeout_s)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.transport.read_register("STATUS") & StatusBit.READY:
            if time.monotonic() > deadline:
                raise DeviceTimeoutError(
                    f"the device was not ready within {timeout_s:g} s (STATUS.READY is low)"
                )

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the device was closed; open it again")

    # Sequences.

    @property
    def free_pages(self) -> int:
        """Pages that are free on each channel."""
        return self._allocator.free_pages

    def create_sequence(
        self, kv_heads: int, *, capacity_tokens: int, layers: int = 1
    ) -> "Sequence":
        """Reserve flash for a sequence's K and V.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.

        Raises:
            RequestError: a number is not positive.
            CapacityError: the flash has no room, or the device cannot number that many tokens.
        """
        self._check_open()
        for name, value in (
            ("kv_heads", kv_heads),
            ("capacity_tokens", capacity_tokens),
            ("layers", layers),
        ):
            _check_positive(name, value)
        limit = (1 << layout.TOKEN_BITS) - 1
        if capacity_tokens > limit:
            raise CapacityError(
                f"capacity_tokens must be at most {limit:,}, not {capacity_tokens:,}: the device "
                f"numbers tokens with {layout.TOKEN_BITS} bits"
            )
        # Heads are numbered over all sequences, so that one-head sequences, too, start on
        # different channels.
        first_head = self._next_head
        stripes = layout.stripe_count(capacity_tokens, self.config)
        ranges: list[tuple[int, int]] = []
        try:
            for head in range(first_head, first_head + layers * kv_heads):
                rows = layout.page_rows(stripes, head, self.config)
                first = self._allocator.allocate(2 * rows)
                ranges.append((first, first + rows))
        except CapacityError as error:
            for first, _ in ranges:
                self._allocator.free(first)
            raise CapacityError(
                f"a sequence of {layers} layers, {kv_heads} KV heads and {capacity_tokens:,} "
                f"tokens has no room: {error}"
            ) from None
        self._next_head += layers * kv_heads
        sequence = Sequence(self, kv_heads, layers, capacity_tokens, first_head, ranges)
        self._sequences.append(sequence)
        return sequence

    def _release(self, sequence: "Sequence", ranges: list[tuple[int, int]]) -> None:
        for first, _ in ranges:
            self._allocator.free(first)
        self._sequences.remove(sequence)

    # Attention.

    def attend_many(
        self,
        plans: Series[AttendPlan],
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[AttendResult]:
        """Run several plans, of any sequences of this device, as one stream of jobs.

        Args:
            plans: from `Sequence.plan`.
            timeout_s: patience with each batch; the device's if None.
            progress: called after each batch with (jobs done, jobs in all).

        Raises:
            RequestError: a plan's sequence was freed or belongs to another device.
            DeviceStatusError: a job ended with a status other than OK.
            DeviceBusyError, DeviceTimeoutError, CapacityError: see `run`.
        """
        for plan in plans:
            plan.sequence._check_open()
            if plan.sequence.device is not self:
                raise RequestError("a plan belongs to a sequence of another device")
        results = self.run(
            [job for plan in plans for job in plan.jobs], timeout_s=timeout_s, progress=progress
        )
        finished, first = [], 0
        for plan in plans:
            finished.append(plan.finish(results[first : first + len(plan.jobs)]))
            first += len(plan.jobs)
        return finished

    def run(
        self,
        jobs: Series[Job],
        *,
        check: bool = True,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[JobResult]:
        """Run jobs, as many behind each doorbell as the host memory and the doorbell take.

        Args:
            jobs: the commands, in order.
            check: raise on the first status other than OK; otherwise the caller looks at the
                completions.
            timeout_s: patience with each batch; the device's if None.
            progress: called after each batch with (jobs done, jobs in all).

        Returns:
            The results, in the order of the jobs.

        Raises:
            CapacityError: one job alone does not fit the host memory.
            DeviceStatusError: a job ended with a status other than OK, or got no completion at all.
            DeviceBusyError: a batch is still running.
            DeviceTimeoutError: a batch did not end in time.
        """
        self._check_open()
        patience = self.timeout_s if timeout_s is None else timeout_s
        results: list[JobResult] = []
        for first, last in self._batches(jobs):
            for index, result in enumerate(self._run_batch(jobs[first:last], patience), first):
                if check and result.completion.status is not Status.OK:
                    name = f"job {index} of {len(jobs)}" + (
                        f" ({label})" if (label := jobs[index].label) else ""
                    )
                    raise DeviceStatusError(
                        f"{name} failed: {explain(result.completion)}", result.completion
                    )
                results.append(result)
            if progress is not None:
                progress(last, len(jobs))
        return results

    def _job_bytes(self, job: Job) -> int:
        dim = self.config.head_dim
        return 2 * LINE_BYTES + job.rows * (query_row_bytes(dim) + result_row_bytes(dim))

    def _batches(self, jobs: Series[Job]) -> Iterator[tuple[int, int]]:
        memory = self.transport.memory_bytes
        first, used = 0, 0
        for index, job in enumerate(jobs):
            size = self._job_bytes(job)
            if size > memory:
                raise CapacityError(
                    f"job {index} of {len(jobs)} needs {size:,} bytes of host memory, there are "
                    f"{memory:,}"
                )
            if used + size > memory or index - first == MAX_COMMANDS:
                yield first, index
                first, used = index, 0
            used += size
        if first < len(jobs):
            yield first, len(jobs)

    def _run_batch(self, jobs: Series[Job], timeout_s: float) -> list[JobResult]:
        transport, dim = self.transport, self.config.head_dim
        # Host memory: commands, completions (zeroed, so that `done` tells which were written),
        # queries, results.
        completions_at = len(jobs) * LINE_BYTES
        buffer = 2 * completions_at
        results_at = buffer + sum(job.rows for job in jobs) * query_row_bytes(dim)
        commands: list[bytes] = []
        queries: list[bytes] = []
        query, result = buffer, results_at
        for index, job in enumerate(jobs):
            try:
                commands.append(
                    COMMAND.pack(
                        opcode=Opcode.ATTEND,
                        identifier=index,
                        rows=job.rows,
                        home=job.home,
                        key_page=job.key_page,
                        value_page=job.value_page,
                        base_token=job.base_token,
                        end_token=job.end_token,
                        tree_token=job.tree_token,
                        scale=job.scale_bits,
                        query=query,
                        result=result,
                    )
                )
            except OverflowError:
                raise RequestError(
                    f"a number of job {index} does not fit its field of the command: {job}"
                ) from None
            queries.append(_pack_query(job))
            query += job.rows * query_row_bytes(dim)
            result += job.rows * result_row_bytes(dim)

        status = transport.read_register("STATUS")
        if status & StatusBit.BUSY:
            raise DeviceBusyError(
                "the device is still working on an earlier batch (STATUS.BUSY); wait for it or "
                "call Device.reset()"
            )
        if not status & StatusBit.READY:
            self._wait_ready(timeout_s)
        transport.write_memory(0, b"".join(commands) + bytes(completions_at) + b"".join(queries))
        transport.write_register(
            "STATUS", StatusBit.DONE | StatusBit.DOORBELL_WHILE_BUSY | StatusBit.BUS_ERROR
        )
        transport.write_register("COMMAND_BASE", 0)
        transport.write_register("COMPLETION_BASE", completions_at)
        transport.write_register("BUFFER_BASE", buffer)
        transport.write_register("BUFFER_LIMIT", result)
        transport.write_register("DOORBELL", len(jobs))
        if transport.read_register("STATUS") & StatusBit.DOORBELL_WHILE_BUSY:
            transport.write_register("STATUS", StatusBit.DOORBELL_WHILE_BUSY)
            raise DeviceBusyError(
                "the device refused the doorbell (STATUS.DOORBELL_WHILE_BUSY): another batch is "
                "running"
            )
        transport.wait(timeout_s)

        entries = transport.read_memory(completions_at, completions_at)
        data = transport.read_memory(results_at, result - results_at)
        after = StatusBit(transport.read_register("STATUS"))
        results: list[JobResult] = []
        at = 0
        for index, job in enumerate(jobs):
            entry = entries[index * LINE_BYTES : (index + 1) * LINE_BYTES]
            fields = COMPLETION.unpack(entry)
            if fields["done"] != 1 or fields["identifier"] != index:
                found = f"identifier {fields['identifier']}" if fields["done"] else "nothing"
                raise DeviceStatusError(
                    f"the device reports the batch done, but command {index} of {len(jobs)} has no "
                    f"completion: {found} is in its place, STATUS is {after!r}",
                    None,
                )
            size = job.rows * result_row_bytes(dim)
            results.append(
                _unpack_result(data[at : at + size], job.rows, dim, Completion.unpack(entry))
            )
            at += size
        if after & StatusBit.BUS_ERROR and all(
            r.completion.status is not Status.BUS_ERROR for r in results
        ):
            raise DeviceStatusError(
                "the host memory answered with an error (STATUS.BUS_ERROR): the results "
                "of this batch cannot be trusted",
                None,
            )
        return results


class Sequence:
    """K and V of one sequence in the device's flash; made by `Device.create_sequence`.

    Usable as a context manager, which frees it at the end.  Tokens that do not fill a page yet are
    kept on the host as well, because the page that they share is written anew with each append.

    Attributes:
        device: where it lives.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
    """

    def __init__(
        self,
        device: Device,
        kv_heads: int,
        layers: int,
        capacity_tokens: int,
        first_head: int,
        ranges: list[tuple[int, int]],
    ) -> None:
        self.device = device
        self.kv_heads = kv_heads
        self.layers = layers
        self.capacity_tokens = capacity_tokens
        self._first_head = first_head
        self._ranges = ranges  # (first K page, first V page) by layer * kv_heads + head
        self._freed = False
        self._lengths = [0] * layers
        empty = np.zeros((2, kv_heads, 0, device.config.head_dim), np.uint16)
        self._tails: list[Bits] = [empty] * layers  # (K or V, kv_heads, tokens, head_dim)

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    def free(self) -> None:
        """Give the flash back.  Freeing twice is no error, any other use afterwards is."""
        if not self._freed:
            self._freed = True
            self.device._release(self, self._ranges)

    def _check_open(self) -> None:
        self.device._check_open()
        if self._freed:
            raise RequestError("the sequence was freed; create another one")

    def length(self, layer: int = 0) -> int:
        """Tokens that a layer holds.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        self._check_open()
        self._check_layer(layer)
        return self._lengths[layer]

    def _check_layer(self, layer: int) -> None:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.layers:
            raise RequestError(f"layer must be 0 to {self.layers - 1}, not {layer!r}")

    # Writing.

    def prefill(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> None:
        """Write the first tokens of a layer.

        Args:
            key: (kv_heads, tokens, head_dim), float16, float32 or float64, rounded to the storage
                format, or uint16 bit patterns.
            value: the same.
            layer: which layer.

        Raises:
            RequestError: the layer has tokens already, or an array has a wrong shape, dtype or
                number in it.
            CapacityError: more tokens than capacity_tokens.
        """
        if length := self.length(layer):
            raise RequestError(
                f"layer {layer} has {length} tokens already: prefill is for the first, use append"
            )
        self.append(key, value, layer=layer)

    def append(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> None:
        """Write the next tokens of a layer.

        Appends in any pieces give the same pages as one prefill.

        Args:
            key: (kv_heads, n, head_dim), as in `prefill`.
            value: the same.
            layer: which layer.

        Raises:
            RequestError: an array has a wrong shape, dtype or number in it.
            CapacityError: more tokens than capacity_tokens.
        """
        length, config = self.length(layer), self.device.config
        keys, values = self._tokens("key", key), self._tokens("value", value)
        if keys.shape != values.shape:
            raise RequestError(
                f"key and value must have the same shape, not {keys.shape} and {values.shape}"
            )
        count = keys.shape[1]
        if length + count > self.capacity_tokens:
            raise CapacityError(
                f"the sequence has room for {self.capacity_tokens} tokens; layer {layer} holds "
                f"{length}, {count} more do not fit"
            )
        tokens = np.concatenate([self._tails[layer], np.stack([keys, values])], axis=2)
        first_stripe = length // config.tokens_per_page
        for head in range(self.kv_heads):
            number = layer * self.kv_heads + head
            for kind in Kind:
                self._write(
                    tokens[kind, head],
                    first_stripe,
                    self._first_head + number,
                    self._ranges[number][kind],
                )
        self._lengths[layer] = length + count
        rest = self._lengths[layer] % config.tokens_per_page
        self._tails[layer] = tokens[:, :, tokens.shape[2] - rest :].copy()

    def _tokens(self, name: str, values: ArrayLike) -> Bits:
        array, dim = np.asarray(values), self.device.config.head_dim
        if (
            array.ndim != 3
            or array.shape[0] != self.kv_heads
            or array.shape[2] != dim
            or array.shape[1] == 0
        ):
            raise RequestError(
                f"{name} must be (kv_heads, tokens, head_dim) = ({self.kv_heads}, at least 1, "
                f"{dim}), not {array.shape}"
            )
        return layout.storage_bits(array, self.device.config.element, name)

    def _write(self, tokens: Bits, first_stripe: int, head: int, base_page: int) -> None:
        config = self.device.config
        images = layout.pack_pages(tokens, config)
        places = layout.place(first_stripe + np.arange(len(images)), head, base_page, config)
        # Every channels-th stripe lies on the same channel, in consecutive pages.
        for i in range(min(len(images), config.channels)):
            self.device.transport.write_pages(
                int(places.channel[i]), int(places.page[i]), images[i :: config.channels]
            )

    # Attention.

    def attend(
        self,
        query: ArrayLike,
        *,
        layer: int = 0,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        tree: ArrayLike | None = None,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> AttendResult:
        """Attention of queries over a layer's tokens: softmax(scale * q K^T) V.

        The device computes it from the stored 16-bit elements with fixed-point sums, rounded once
        to float32.  The query heads of a KV head and all queries share each pass over K and V,
        `Config.rows` at a time.  The masks are combined: a query attends what all of them allow.

        Args:
            query: (q_heads, n_queries, head_dim), as key in `prefill`; q_heads a multiple of
                kv_heads, query head h reads KV head h // (q_heads // kv_heads).
            layer: which layer.
            scale: factor of the scores, positive; 1/sqrt(head_dim) if None.
            causal: the queries belong to the last n_queries tokens; query i attends the tokens up
                to its own.
            window: each query attends only the last `window` of the tokens that the other masks
                leave it.
            tree: bool, (n_queries, n_draft), n_draft at most 32: which of the last n_draft tokens
                each query attends; all tokens before them are attended.
            timeout_s: patience with each batch; the device's if None.
            progress: called after each batch with (jobs done, jobs in all).

        Raises:
            RequestError: a wrong shape, dtype or number, an empty layer, or a freed sequence.
            DeviceStatusError: the device reports an error, such as a NaN in K (which only bit
                patterns can bring in).
            DeviceBusyError, DeviceTimeoutError, CapacityError: see `Device.run`.
        """
        plan = self.plan(query, layer=layer, scale=scale, causal=causal, window=window, tree=tree)
        return self.device.attend_many([plan], timeout_s=timeout_s, progress=progress)[0]

    def plan(
        self,
        query: ArrayLike,
        *,
        layer: int = 0,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        tree: ArrayLike | None = None,
    ) -> AttendPlan:
        """The jobs of an `attend` call, for `Device.attend_many`; arguments and errors are its."""
        length, config = self.length(layer), self.device.config
        array, dim = np.asarray(query), config.head_dim
        if array.ndim != 3 or array.shape[2] != dim or 0 in array.shape:
            raise RequestError(
                f"query must be (q_heads, n_queries, head_dim) = (at least {self.kv_heads}, at "
                f"least 1, {dim}), not {array.shape}"
            )
        q_heads, n_queries = array.shape[:2]
        if q_heads % self.kv_heads:
            raise RequestError(
                f"q_heads must be a multiple of the sequence's {self.kv_heads} KV heads, "
                f"not {q_heads}"
            )
        if length == 0:
            raise RequestError(f"layer {layer} has no tokens: prefill it before attending")
        bits = layout.storage_bits(array, config.element, "query")
        scale_bits = _scale_bits(1 / math.sqrt(dim) if scale is None else scale)
        masks = _masks(length, n_queries, causal, window, tree)

        # Rows by query, then by head of the group: so the windows of a job's rows lie close
        # together and less is read.
        group = q_heads // self.kv_heads
        rows = (
            bits.reshape(self.kv_heads, group, n_queries, dim)
            .swapaxes(1, 2)
            .reshape(self.kv_heads, -1, dim)
        )
        start, end, draft = (np.repeat(per_query, group) for per_query in masks[:3])
        jobs: list[Job] = []
        parts: list[_Part] = []
        for head in range(self.kv_heads):
            for first in range(0, rows.shape[1], config.rows):
                chunk = slice(first, min(first + config.rows, rows.shape[1]))
                before = len(jobs)
                jobs += self._jobs(
                    layer,
                    head,
                    rows[head, chunk],
                    scale_bits,
                    _Masks(start[chunk], end[chunk], draft[chunk], masks.tree_token),
                )
                parts.append(_Part(head, chunk, range(before, len(jobs))))
        return AttendPlan(sequence=self, shape=(q_heads, n_queries, dim), jobs=jobs, _parts=parts)

    def _jobs(
        self, layer: int, head: int, query: Bits, scale_bits: int, masks: _Masks
    ) -> Iterator[Job]:
        """One job for each range of tokens that the score buffers hold."""
        config = self.device.config
        number = layer * self.kv_heads + head
        busy = masks.end > masks.start
        first = int(masks.start[busy].min(initial=1 << layout.TOKEN_BITS)) if busy.any() else 0
        last = int(masks.end[busy].max(initial=1))
        first -= first % config.tokens_per_page
        for base in range(first, last, config.max_tokens):
            stop = min(base + config.max_tokens, last)
            stripe = base // config.tokens_per_page
            home, key_page = layout.job_place(
                stripe, self._first_head + number, self._ranges[number][0], config
            )
            value_page = layout.job_place(
                stripe, self._first_head + number, self._ranges[number][1], config
            ).page
            # A tree that began before this range is cut, so that it begins inside or at the end.
            tree_token = min(max(masks.tree_token, base), stop)
            yield Job(
                query=query,
                # A row that attends nothing in this range has the empty window at its beginning.
                start=np.clip(masks.start, base, stop),
                end=np.clip(masks.end, base, stop),
                tree=masks.tree >> min(max(base - masks.tree_token, 0), TREE_BITS),
                home=home,
                key_page=key_page,
                value_page=value_page,
                base_token=base,
                end_token=stop,
                tree_token=tree_token,
                scale_bits=scale_bits,
                label=f"layer {layer}, KV head {head}, tokens {base} to {stop - 1}",
            )


# Helpers.


def explain(completion: Completion) -> str:
    """What a completion's status means, in words."""
    status, where = completion.status, completion.where
    texts: dict[Status, Callable[[], str]] = {
        Status.OK: lambda: "no error",
        Status.INVALID_OPCODE: lambda: f"there is no opcode {where:#04x}",
        Status.INVALID_FIELD: lambda: "a reserved byte is not zero, or home is no channel",
        Status.INVALID_ROWS: lambda: f"{where} query rows are none or more than the device has",
        Status.INVALID_LENGTH: lambda: "no token, or more tokens than the score buffers hold",
        Status.INVALID_ADDRESS: lambda: (
            f"the {'result' if where else 'query'} block is unaligned or out of the buffer window"
        ),
        Status.INVALID_SCALE: lambda: "scale is not a positive normal fp32",
        Status.NAN_QUERY: lambda: (
            f"NaN or infinity in query row {where >> 16}, channel {where & 0xFFFF}"
        ),
        Status.NAN_KEY: lambda: f"NaN or infinity in K at token {where}",
        Status.NAN_VALUE: lambda: f"NaN or infinity in V at token {where}",
        Status.CODEWORD_TIMEOUT: lambda: (
            f"channel {where >> 16} still owes {where & 0x7FFF} codewords of "
            f"{'V' if where >> 15 & 1 else 'K'}"
        ),
        Status.BUS_ERROR: lambda: "the host memory answered with an error",
    }
    return f"{status.name}: {texts[status]()}"


def _version(version: int) -> str:
    return f"{version >> 16}.{version & 0xFFFF}"


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name} must be a positive int, not {value!r}")


def _scale_bits(scale: float) -> int:
    try:
        bits = fp32_bits(scale * math.log2(math.e))
    except (OverflowError, TypeError):
        bits = 0
    if not 0x0080_0000 <= bits < 0x7F80_0000:
        raise RequestError(
            f"scale must be positive, and scale * log2(e) a normal fp32 (1.2e-38 to 3.4e38), not "
            f"{scale!r}"
        )
    return bits


def _masks(
    length: int, n_queries: int, causal: bool, window: int | None, tree: ArrayLike | None
) -> _Masks:
    """What each query attends: start to end, but from tree_token on only where a bit is set."""
    if causal and n_queries > length:
        raise RequestError(
            f"causal: the {n_queries} queries are the last tokens of the sequence, but the layer "
            f"has only {length}"
        )
    end = length - n_queries + 1 + np.arange(n_queries) if causal else np.full(n_queries, length)
    if tree is None:
        draft = np.zeros((n_queries, 0), np.bool_)
    else:
        draft = np.array(tree)
        if draft.dtype != np.bool_ or draft.ndim != 2 or draft.shape[0] != n_queries:
            raise RequestError(
                f"tree must be bool (n_queries, n_draft) = ({n_queries}, 1 to {TREE_BITS}), not "
                f"{draft.dtype} {draft.shape}"
            )
        if not 1 <= draft.shape[1] <= min(TREE_BITS, length):
            raise RequestError(
                f"tree must have 1 to {min(TREE_BITS, length)} draft tokens ({TREE_BITS} at most, "
                f"and no more than the layer's {length} tokens), not {draft.shape[1]}"
            )
    tree_token = length - draft.shape[1]
    place = np.arange(draft.shape[1])
    draft = draft & (place < (end - tree_token)[:, None])
    prefix_end = np.minimum(end, tree_token)
    start = np.zeros(n_queries, np.int64)
    if window is not None:
        _check_positive("window", window)
        draft &= draft[:, ::-1].cumsum(axis=1)[:, ::-1] <= window
        start = np.maximum(prefix_end - (window - draft.sum(axis=1)), 0)
    bits = (draft.astype(np.int64) << place).sum(axis=1)
    last = np.where(draft, tree_token + place + 1, 0).max(axis=1, initial=0)
    return _Masks(start, np.maximum(prefix_end, last), bits, tree_token)


def _put(block: NDArray[np.uint8], field: Field, values: NDArray[Any]) -> None:
    """Write an unsigned field into each row of a block of records."""
    column = np.ascontiguousarray(values).astype(f"<u{field.size}")
    block[:, field.offset : field.offset + field.size] = column[:, None].view(np.uint8)


def _pack_query(job: Job) -> bytes:
    """The query block: for each row its `ROW` record and q, padded to whole lines."""
    rows, dim = job.query.shape
    block = np.zeros((rows, query_row_bytes(dim)), np.uint8)
    _put(block, ROW["start_token"], job.start)
    _put(block, ROW["end_token"], job.end)
    _put(block, ROW["tree"], job.tree)
    block[:, ROW.size : ROW.size + dim * ELEMENT_BYTES] = np.ascontiguousarray(
        job.query, "<u2"
    ).view(np.uint8)
    return block.tobytes()


def _unpack_result(data: bytes, rows: int, dim: int, completion: Completion) -> JobResult:
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
