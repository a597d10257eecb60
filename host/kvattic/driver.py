"""The host library: sequences of K and V in the device's flash, and attention over them.

`Device` works over any `Transport`.  `Sequence` writes K and V and plans attention.  The layer below are lists of
commands, in batches that fit the host memory: `Device.run` takes `Job`s and `Device.operate` takes `FlashOperation`s.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic import golden, layout
from kvattic.allocator import Allocation, DramAllocator, Remap, Wear, ZoneAllocator
from kvattic.commands import (
    COMMAND,
    COMPLETION,
    FLASH_COMMAND,
    LINE_BYTES,
    ROW,
    TABLE_ENTRY,
    TRAILER,
    TREE_BITS,
    Completion,
    CompletionFlag,
    Field,
    Kind,
    MediaCause,
    Opcode,
    Status,
    fp32_bits,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import ELEMENT_BYTES, PAGE_NUMBER_BITS, Config
from kvattic.errors import (
    CapacityError,
    ConfigMismatchError,
    DeviceBusyError,
    DeviceStatusError,
    DeviceTimeoutError,
    KvatticError,
    RequestError,
)
from kvattic.formats import SCORE_FRACTION, VALUE_FRACTION
from kvattic.layout import Block, PagePlace
from kvattic.registers import ID_MAGIC, VERSION, Control, StatusBit
from kvattic.transport import MAX_COMMANDS, Progress, Transport

__all__ = ["AttendPlan", "AttendResult", "Device", "FlashOperation", "Job", "JobResult", "Loss", "Sequence"]

DEFAULT_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 28
"""Device DRAM that a prefill uses at once, at most: enough to keep all dies busy for long."""
CHANNEL_KIND = 2
"""Beside `Kind`: K in the channel layout."""
MAX_STRIPES = (1 << 8 * COMMAND["stripes"].size) - 1
NO_ENTRY = (1 << 64) - 1
"""A table entry that the device refuses."""
PAGE_MASK = (1 << PAGE_NUMBER_BITS) - 1

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
    """

    opcode: Opcode
    channel: int
    page: int
    argument: int = 0


class Loss(NamedTuple):
    """Tokens that were in device DRAM when it lost its power.

    Members:
        sequence: whose.
        layer: of which layer.
        tokens: how many of the last ones are gone.
    """

    sequence: "Sequence"
    layer: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One command: query rows over a range of tokens of one KV head.  The device checks it.

    Attributes:
        query: uint16 bit patterns, (rows, head_dim).
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last token of each row.
        tree: integers below 2**32, (rows,), bit i: the row attends token tree_token + i.
        table: uint64, an entry for each stripe (`layout.pack_entries`); read when the job is run.
        stripe_pages: pages of K (and of V) in a stripe.
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
    table: NDArray[np.uint64]
    stripe_pages: int
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
    """A device over any transport: hands out its flash and DRAM to sequences and runs their attention.

    Usable as a context manager.

    The library takes the flash for erased, as it comes from the factory; a drive that was used before must be
    `format`ted.  The tables that say where K and V lie are in this object alone.

    Args:
        transport: the way to the device.
        timeout_s: patience with the device, in seconds of wall-clock time.
        bad_blocks: blocks that must not be used, such as an earlier `scan_bad_blocks` found.
        spare_blocks: see `ZoneAllocator`.
        erase_on_free: erase flash as soon as no sequence uses it; otherwise before it is used again.

    Raises:
        ConfigMismatchError: no kvattic device, another major version, or built from another
            configuration.
        DeviceTimeoutError: the device does not become ready.
        RequestError: a bad block is none of the device's.
    """

    def __init__(self, transport: Transport, *, timeout_s: float = DEFAULT_TIMEOUT_S, bad_blocks: Iterable[Block] = (),
                 spare_blocks: int | None = None, erase_on_free: bool = True) -> None:
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
        self._numbers = count()
        self._spare_blocks, self._erase_on_free = spare_blocks, erase_on_free
        self._die_error: DeviceStatusError | None = None
        self._dram = DramAllocator(min(transport.dram_bytes // self.config.page_bytes, 1 << PAGE_NUMBER_BITS))
        self._allocator = self._new_allocator(bad_blocks)
        self._wait_ready(timeout_s)
        self._allocator.send_remaps()

    def _new_allocator(self, bad_blocks: Iterable[Block]) -> ZoneAllocator:
        return ZoneAllocator(self.config, erase=self._erase, remap=self._remap, bad_blocks=bad_blocks,
                             spare_blocks=self._spare_blocks, erase_on_free=self._erase_on_free)

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _end(self.close, error)

    def close(self) -> None:
        """Free all sequences and refuse all further calls.  Closing twice is no error."""
        try:
            for sequence in list(self._sequences):
                sequence.free()
        finally:
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

    # Flash.

    @property
    def free_zones(self) -> int:
        """Zones of flash that no sequence uses."""
        return self._allocator.free_zones

    @property
    def free_dram_pages(self) -> int:
        """Pages of device DRAM that are free."""
        return self._dram.free_pages

    @property
    def bad_blocks(self) -> list[Block]:
        """Blocks that are not used: the factory's that are known, and those that failed."""
        return self._allocator.bad_blocks

    @property
    def wear(self) -> Wear:
        """How often the blocks were erased."""
        return self._allocator.wear

    @property
    def write_amplification(self) -> float:
        """Pages programmed for each page of K and V that was written; NaN if there was none."""
        return self._allocator.write_amplification

    def scan_bad_blocks(self) -> list[Block]:
        """Look for the factory's marks in all blocks, and use none that has one.

        A mark is gone once its block was written; so scan a new drive, and keep the list.

        Returns:
            The blocks with a mark.

        Raises:
            RequestError: something was written already.
            DeviceStatusError: a die does not answer.
        """
        self._check_open()
        if self._sequences or self._allocator.pages_programmed:
            raise RequestError("the factory's marks of bad blocks can be read only before anything is written")
        config = self.config
        # Marks are found through the device's map, which must be what it is after power-up.
        self._operate_all([FlashOperation(Opcode.MAP, remap.channel, remap.page,
                                          layout.page_place(remap.page, config).zone)
                           for remap in self._allocator.remaps])
        blocks = [Block(channel, die, plane, block) for block in range(config.part.blocks) for die in range(config.dies)
                  for plane in range(config.part.planes) for channel in range(config.channels)]
        pages = [int(layout.page_number(PagePlace(b.block, 0, b.die, b.plane), config)) for b in blocks]
        completions = self.operate([FlashOperation(Opcode.PROBE, block.channel, page)
                                    for block, page in zip(blocks, pages, strict=True)], check=False)
        for completion in completions:
            if completion.status not in (Status.OK, Status.BAD_BLOCK):
                raise self._failure("PROBE", completion)
        found = [block for block, completion in zip(blocks, completions, strict=True)
                 if completion.status is Status.BAD_BLOCK]
        self._allocator = self._new_allocator({*self.bad_blocks, *found})
        self._allocator.send_remaps()
        return sorted(found)

    def format(self) -> None:
        """Erase all of the flash, because nobody knows what it holds.

        Raises:
            RequestError: a sequence is not freed.
            DeviceStatusError: a die does not answer.
        """
        self._check_open()
        self._allocator.distrust()
        self._allocator.clean()
        self._raise_die_error()

    def recover(self) -> list[Loss]:
        """Go on after the drive has lost its power: what was in flash is there, what was in its DRAM is not.

        Tokens that were not `Sequence.flushed` are removed from their sequences.

        Returns:
            What was lost, for each layer that lost something.

        Raises:
            DeviceTimeoutError: the device does not become ready.
            DeviceStatusError: the device reports an error.
        """
        self._check_open()
        self._wait_ready(self.timeout_s)
        self._remap(self._allocator.remaps)
        self._dram = DramAllocator(self._dram.pages)
        return [loss for sequence in self._sequences for loss in sequence._lose_tails()]

    def operate(self, operations: Series[FlashOperation], *, check: bool = True,
                timeout_s: float | None = None) -> list[Completion]:
        """Run flash commands, as many behind each doorbell as the host memory and the doorbell take.

        This is the layer below the sequences: what it does to their flash they do not know of.

        Args:
            operations: the commands; those of one channel begin in their order.
            check: raise on the first status other than OK; otherwise the caller looks at the completions.
            timeout_s: patience with each batch; the device's if None.

        Returns:
            The completions, in the order of the operations.

        Raises:
            RequestError: a number does not fit its field of the command.
            DeviceStatusError: an operation ended with a status other than OK, or got no completion at all.
            DeviceBusyError: a batch is still running.
            DeviceTimeoutError: a batch did not end in time.
        """
        self._check_open()
        entries, error = self._operate(operations, self.timeout_s if timeout_s is None else timeout_s)
        if error is not None:
            raise error
        completions = [Completion.unpack(entry.tobytes()) for entry in entries]
        if check:
            for operation, completion in zip(operations, completions, strict=True):
                if completion.status is not Status.OK:
                    raise self._failure(operation.opcode.name, completion)
        return completions

    def _operate_all(self, operations: Series[FlashOperation]) -> None:
        if operations:
            self.operate(operations)

    def _operate(self, operations: Series[FlashOperation], timeout_s: float) -> tuple[Bytes, BaseException | None]:
        """Completion entries, zero where there is none; and what ended it early, if anything."""
        entries = np.zeros((len(operations), LINE_BYTES), np.uint8)
        most = min(MAX_COMMANDS, self.transport.memory_bytes // (2 * LINE_BYTES))
        if most == 0:
            return entries, CapacityError(f"a flash command needs {2 * LINE_BYTES} bytes of host memory, there are "
                                          f"{self.transport.memory_bytes}")
        try:
            for first in range(0, len(operations), most):
                batch = operations[first : first + most]
                try:
                    numbers = np.array(batch, np.int64)
                    fits = not ((numbers < 0) | (numbers >> (8, 8, 32, 32) != 0)).any()
                except OverflowError:
                    fits = False
                if not fits:
                    raise RequestError("a number of a flash operation does not fit its field of the command")
                block = np.zeros((len(batch), LINE_BYTES), np.uint8)
                _put(block, FLASH_COMMAND["identifier"], np.arange(len(batch)))
                for name, column in zip(FlashOperation._fields, numbers.T, strict=True):
                    _put(block, FLASH_COMMAND[name], column)
                size = block.size
                self._check_idle(timeout_s)
                try:
                    self._ring(len(batch), block.tobytes() + bytes(size), 2 * size, 2 * size, timeout_s)
                finally:
                    # What was acknowledged before anything went wrong, was.
                    found = np.frombuffer(self.transport.read_memory(size, size), np.uint8).reshape(-1, LINE_BYTES)
                    good = (_get(found, COMPLETION["done"]) == 1) & (
                        _get(found, COMPLETION["identifier"]) == np.arange(len(batch)))
                    entries[first : first + len(batch)][good] = found[good]
                if not good.all():
                    missing = int(np.argmin(good))
                    raise DeviceStatusError(
                        f"the device reports the batch done, but flash command {missing} of {len(batch)} has no "
                        f"completion", None)
        except BaseException as error:  # noqa: BLE001, handed to the caller, who must first note what was done
            return entries, error
        return entries, None

    def _round_robin(self, channels: Series[int], pages: Series[int]) -> list[int]:
        """An order in which all channels work at once, and on each two dies take turns with their planes.

        The pages of each block stay in order.  A die is busy for a moment between two planes of one command; the other
        die's turn hides it.
        """
        channel, page = np.array(channels), np.array(pages)
        place = layout.page_place(page, self.config)
        by_channel = np.lexsort((place.die, place.plane, place.die // 2, place.page, place.zone, channel))
        rank = np.arange(len(channel)) - np.searchsorted(channel[by_channel], channel[by_channel])
        order: list[int] = by_channel[np.lexsort((channel[by_channel], rank))].tolist()
        return order

    def _erase(self, places: Series[tuple[int, int]]) -> list[bool]:
        """For the allocator: erase blocks; which could be."""
        if not places:
            return []
        order = self._round_robin([c for c, _ in places], [p for _, p in places])
        operations = [FlashOperation(Opcode.ERASE, *places[i]) for i in order]
        entries, error = self._operate(operations, self.timeout_s)
        if error is not None:
            raise error
        good = [False] * len(places)
        for i, entry in zip(order, entries, strict=True):
            completion = Completion.unpack(entry.tobytes())
            if completion.status is Status.DIE_TIMEOUT:
                self._lose_die("ERASE", completion)
            elif completion.status not in (Status.OK, Status.ERASE_FAILED):
                raise self._failure("ERASE", completion)
            good[i] = completion.status is Status.OK
        return good

    def _remap(self, remaps: Series[Remap]) -> None:
        """For the allocator: change the device's map."""
        self._operate_all([FlashOperation(Opcode.MAP, *remap) for remap in remaps])

    def _lose_die(self, what: str, completion: Completion) -> None:
        channel, page = completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK
        if self._die_error is None:
            self._die_error = self._failure(what, completion)
        self._allocator.lose_die(channel, int(layout.page_place(page, self.config).die))

    def _raise_die_error(self) -> None:
        """Report a die that did not answer, when all is noted that had to be."""
        error, self._die_error = self._die_error, None
        if error is not None:
            raise error

    def _failure(self, what: str, completion: Completion) -> DeviceStatusError:
        return DeviceStatusError(f"{what} failed: {explain(completion)}{self._where(completion)}", completion)

    def _where(self, completion: Completion) -> str:
        """The place that a flash command's completion names."""
        if completion.status in (Status.INVALID_OPCODE, Status.INVALID_FIELD, Status.INVALID_PLACE):
            return ""
        return ": " + self._describe(completion.where >> PAGE_NUMBER_BITS, completion.where & PAGE_MASK)

    def _describe(self, channel: int, page: int) -> str:
        """A page of flash, in words."""
        place = layout.page_place(page, self.config)
        block = self._allocator.block(channel, page)
        name = f"channel {channel}, die {place.die}, plane {place.plane}, no block" if block is None else str(block)
        return f"{name} (zone {place.zone}), page {place.page}"

    # Sequences.

    def create_sequence(self, kv_heads: int, *, capacity_tokens: int, layers: int = 1,
                        sparse: bool = False) -> "Sequence":
        """Reserve zones of flash for a sequence's K and V.

        Args:
            kv_heads: KV heads of a layer.
            capacity_tokens: tokens that it can hold at most.
            layers: layers, each with K and V of its own.
            sparse: write K in the channel layout, too.

        Raises:
            RequestError: a number is not positive.
            ConfigError: sparse, and the configuration cannot have the channel layout.
            CapacityError: flash or DRAM have no room, or the device cannot number that many tokens.
        """
        self._check_open()
        for name, value in (("kv_heads", kv_heads), ("capacity_tokens", capacity_tokens), ("layers", layers)):
            _check_positive(name, value)
        if not isinstance(sparse, bool):
            raise RequestError(f"sparse must be a bool, not {sparse!r}")
        limit = (1 << layout.TOKEN_BITS) - 1
        if capacity_tokens > limit:
            raise CapacityError(
                f"capacity_tokens must be at most {limit:,}, not {capacity_tokens:,}: the device "
                f"numbers tokens with {layout.TOKEN_BITS} bits"
            )
        config, pages = self.config, layout.stripe_pages(self.config, sparse=sparse)
        if 2 * pages * kv_heads > self._dram.pages:
            raise CapacityError(f"a stripe of {kv_heads} KV heads takes {2 * pages * kv_heads} pages of device DRAM, "
                                f"which has {self._dram.pages}")
        # Heads are numbered over all sequences, so that one-head sequences, too, start on
        # different channels.
        first_head = self._next_head
        stripes = capacity_tokens // (pages * config.tokens_per_page)
        rounds, rest = divmod(stripes, config.channels)
        heads = np.arange(first_head, first_head + layers * kv_heads)
        uneven = layout.stripe_channel(np.arange(rest)[:, None], heads, config)
        runs = (2 + sparse) * (np.bincount(uneven.ravel(), minlength=config.channels) + rounds * len(heads))
        try:
            allocation = self._allocator.create(runs.tolist(), pages)
        except CapacityError as error:
            raise CapacityError(
                f"a sequence of {layers} layers, {kv_heads} KV heads and {capacity_tokens:,} "
                f"tokens has no room: {error}"
            ) from None
        self._next_head += layers * kv_heads
        sequence = Sequence(self, next(self._numbers), kv_heads, layers, capacity_tokens, first_head, sparse,
                            allocation)
        self._sequences.append(sequence)
        return sequence

    def _release(self, sequence: "Sequence") -> None:
        self._sequences.remove(sequence)
        self._allocator.release(sequence._allocation)
        self._raise_die_error()

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
                        f"{name} failed: {explain(result.completion)}"
                        f"{self._unreadable(jobs[index], result.completion)}", result.completion)
                results.append(result)
            if progress is not None:
                progress(last, len(jobs))
        return results

    def _unreadable(self, job: Job, completion: Completion) -> str:
        """Where the codeword lies that could not be read, and why."""
        kinds = {Status.UNREADABLE_KEY: Kind.KEY, Status.UNREADABLE_VALUE: Kind.VALUE}
        if completion.status not in kinds:
            return ""
        config = self.config
        stripe, token = divmod(completion.where - job.base_token, job.stripe_pages * config.tokens_per_page)
        if not 0 <= stripe < len(job.table):
            return ""
        page, token = divmod(token, config.tokens_per_page)
        codeword = token // config.tokens_per_codeword
        entry = layout.unpack_entries(job.table[stripe : stripe + 1])
        channel = int(entry.channel[0])
        pages = entry.key_page if kinds[completion.status] is Kind.KEY else entry.value_page
        number = int(pages[0]) + page
        if entry.dram[0]:
            return f": device DRAM, page {number}, codeword {codeword}"
        read = self.transport.read_register
        first, cause = read("MEDIA_ERROR"), read("MEDIA_CAUSE")
        if (first, cause & 0xFFFF) == (channel << PAGE_NUMBER_BITS | number, codeword):
            why = MediaCause(cause >> 16).name
        else:
            where = f"page number {first & PAGE_MASK} of channel {first >> PAGE_NUMBER_BITS}"
            why = f"not the first of the batch, which is {where}"
        return f": {self._describe(channel, number)}, codeword {codeword} ({why})"

    def _job_bytes(self, job: Job) -> int:
        dim = self.config.head_dim
        return 2 * LINE_BYTES + job.rows * (query_row_bytes(dim) + result_row_bytes(dim)) + _table_bytes(job)

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
        # queries, tables, results.
        completions_at = len(jobs) * LINE_BYTES
        buffer = 2 * completions_at
        tables_at = buffer + sum(job.rows for job in jobs) * query_row_bytes(dim)
        results_at = tables_at + sum(_table_bytes(job) for job in jobs)
        commands: list[bytes] = []
        queries: list[bytes] = []
        tables: list[bytes] = []
        query, table, result = buffer, tables_at, results_at
        for index, job in enumerate(jobs):
            try:
                commands.append(
                    COMMAND.pack(
                        opcode=Opcode.ATTEND,
                        identifier=index,
                        rows=job.rows,
                        stripe_pages=job.stripe_pages,
                        stripes=len(job.table),
                        base_token=job.base_token,
                        end_token=job.end_token,
                        tree_token=job.tree_token,
                        scale=job.scale_bits,
                        query=query,
                        result=result,
                        table=table,
                    )
                )
            except OverflowError:
                raise RequestError(
                    f"a number of job {index} does not fit its field of the command: {job}"
                ) from None
            queries.append(_pack_query(job))
            tables.append(np.ascontiguousarray(job.table, "<u8").tobytes().ljust(_table_bytes(job), b"\0"))
            query += job.rows * query_row_bytes(dim)
            table += _table_bytes(job)
            result += job.rows * result_row_bytes(dim)
        image = b"".join((*commands, bytes(completions_at), *queries, *tables))
        self._check_idle(timeout_s)
        self._ring(len(jobs), image, buffer, result, timeout_s)

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


    def _check_idle(self, timeout_s: float) -> None:
        """Whether the device takes a batch; until then the host memory must not be touched."""
        status = self.transport.read_register("STATUS")
        if status & StatusBit.BUSY:
            raise DeviceBusyError(
                "the device is still working on an earlier batch (STATUS.BUSY); wait for it or "
                "call Device.reset()"
            )
        if not status & StatusBit.READY:
            self._wait_ready(timeout_s)

    def _ring(self, commands: int, image: bytes, buffer: int, limit: int, timeout_s: float) -> None:
        """Put commands, room for their completions and the rest into host memory, and have them run."""
        transport = self.transport
        transport.write_memory(0, image)
        transport.write_register(
            "STATUS",
            StatusBit.DONE | StatusBit.DOORBELL_WHILE_BUSY | StatusBit.BUS_ERROR | StatusBit.MEDIA_ERROR,
        )
        transport.write_register("COMMAND_BASE", 0)
        transport.write_register("COMPLETION_BASE", commands * LINE_BYTES)
        transport.write_register("BUFFER_BASE", buffer)
        transport.write_register("BUFFER_LIMIT", limit)
        transport.write_register("DOORBELL", commands)
        if transport.read_register("STATUS") & StatusBit.DOORBELL_WHILE_BUSY:
            transport.write_register("STATUS", StatusBit.DOORBELL_WHILE_BUSY)
            raise DeviceBusyError(
                "the device refused the doorbell (STATUS.DOORBELL_WHILE_BUSY): another batch is "
                "running"
            )
        transport.wait(timeout_s)


@dataclass(slots=True, eq=False)
class _Layer:
    """K and V of one layer.

    Attributes:
        table: uint64, (kv_heads, stripes), where each stripe lies; jobs look into it.
        channel_pages: int64, (kv_heads, stripes), first page of each stripe's K in the channel layout, -1 where it is
            not written; no stripes if there is no such layout.
        length: tokens.
        staged: stripe to its first page of device DRAM, for those that are not in flash yet.  There they lie head by
            head, K then V.
        placed: (stripe, head, kind) to the first page, for what is in flash of stripes that are staged.
    """

    table: NDArray[np.uint64]
    channel_pages: Integers
    length: int = 0
    staged: dict[int, int] = field(default_factory=dict)
    placed: dict[tuple[int, int, int], int] = field(default_factory=dict)


class _Run(NamedTuple):
    """Consecutive pages of device DRAM that belong into consecutive pages of flash."""

    stripe: int
    head: int
    kind: int
    channel: int
    source: int
    die: int | None


class Sequence:
    """K and V of one sequence; made by `Device.create_sequence`.

    Usable as a context manager, which frees it at the end.

    Tokens that do not fill a stripe yet are in device DRAM, as pages that look as those in flash, and are attended
    there.  A full stripe is programmed from these pages, which are then given back.  What is in flash (`flushed`)
    survives a loss of the drive's power, what is in DRAM does not.

    Attributes:
        device: where it lives.
        number: of the sequence, counted over the device's life; messages name it.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
        sparse: K is written in the channel layout, too.
        stripe_tokens: tokens of a stripe.
    """

    def __init__(
        self,
        device: Device,
        number: int,
        kv_heads: int,
        layers: int,
        capacity_tokens: int,
        first_head: int,
        sparse: bool,
        allocation: Allocation,
    ) -> None:
        self.device = device
        self.number = number
        self.kv_heads = kv_heads
        self.layers = layers
        self.capacity_tokens = capacity_tokens
        self.sparse = sparse
        self.stripe_tokens = allocation.run * device.config.tokens_per_page
        self._first_head = first_head
        self._allocation = allocation
        self._pages = allocation.run
        self._kinds = 2 + sparse
        self._freed = False
        stripes = -(-capacity_tokens // self.stripe_tokens)
        # Never moved, because jobs refer to it; memory is taken where it is written.
        self._layers = [_Layer(np.zeros((kv_heads, stripes), np.uint64),
                               np.full((kv_heads, stripes if sparse else 0), -1, np.int64)) for _ in range(layers)]

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _end(self.free, error)

    def free(self) -> None:
        """Give flash and DRAM back.  Freeing twice is no error, any other use afterwards is.

        Flash that no other sequence uses is erased (see `Device`).

        Raises:
            DeviceStatusError: a die does not answer; the sequence is free nevertheless.
        """
        if not self._freed:
            self._freed = True
            for layer in self._layers:
                layer.table[:] = NO_ENTRY
                self._give_back_dram(layer)
            self.device._release(self)

    def _give_back_dram(self, layer: _Layer) -> None:
        for page in layer.staged.values():
            self.device._dram.free(page)
        layer.staged.clear()
        layer.placed.clear()

    def _lose_tails(self) -> Iterator[Loss]:
        """What was in DRAM is gone."""
        for number, layer in enumerate(self._layers):
            tokens = layer.length - self.flushed(number)
            layer.length -= tokens
            layer.table[:, layer.length // self.stripe_tokens :] = NO_ENTRY
            layer.staged.clear()
            layer.placed.clear()
            if tokens:
                yield Loss(self, number, tokens)

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
        return self._layers[layer].length

    def flushed(self, layer: int = 0) -> int:
        """The first tokens of a layer that are all in flash, programmed and acknowledged.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        length, staged = self.length(layer), self._layers[layer].staged
        return min(staged) * self.stripe_tokens if staged else length

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

        Appends in any pieces hold the same as one prefill.

        Args:
            key: (kv_heads, n, head_dim), as in `prefill`.
            value: the same.
            layer: which layer.

        Raises:
            RequestError: an array has a wrong shape, dtype or number in it.
            CapacityError: more tokens than capacity_tokens, or device DRAM or flash are full.
            DeviceStatusError: a die does not answer.
            DeviceBusyError, DeviceTimeoutError: see `Device.operate`.

        After a CapacityError of DRAM nothing was written.  After an error of flash the layer holds the tokens that
        `length` says, all of which are attended; the next append tries again to move them to flash.
        """
        length, state = self.length(layer), self._layers[layer]
        keys, values = self._tokens("key", key), self._tokens("value", value)
        if keys.shape != values.shape:
            raise RequestError(
                f"key and value must have the same shape, not {keys.shape} and {values.shape}"
            )
        total = keys.shape[1]
        if length + total > self.capacity_tokens:
            raise CapacityError(
                f"the sequence has room for {self.capacity_tokens} tokens; layer {layer} holds "
                f"{length}, {total} more do not fit"
            )
        self._flush(layer, sorted(s for s in state.staged if (s + 1) * self.stripe_tokens <= length))
        self._check_dram(total, length % self.stripe_tokens)
        tokens = np.stack([keys, values], axis=1)   # (kv_heads, K or V, tokens, head_dim)
        at = 0
        while at < total:
            inside = state.length % self.stripe_tokens
            if inside or total - at < self.stripe_tokens:
                piece = tokens[:, :, at : at + self.stripe_tokens - inside]
                self._write_tail(layer, piece)
                stripe = state.length // self.stripe_tokens
                stripes = range(stripe, stripe + (inside + piece.shape[2]) // self.stripe_tokens)
            else:
                whole = (total - at) // self.stripe_tokens
                room = min(self.device._dram.largest, CHUNK_BYTES // self.device.config.page_bytes)
                fitting = room // (self.kv_heads * self._kinds * self._pages)
                piece = tokens[:, :, at : at + max(min(whole, fitting), 1) * self.stripe_tokens]
                stripes = self._stage(layer, piece)
            state.length += piece.shape[2]
            at += piece.shape[2]
            self._flush(layer, stripes, piece if inside == 0 else None)

    def _check_dram(self, total: int, inside: int) -> None:
        """Whether DRAM has room for what an append of so many tokens needs at least."""
        dram = self.device._dram
        needed = [] if inside else [2 * self.kv_heads * self._pages]
        if self.sparse and inside + total >= self.stripe_tokens:
            needed.append(self._pages)
        taken: list[int] = []
        try:
            for pages in needed:
                taken.append(dram.allocate(pages))
        finally:
            for page in taken:
                dram.free(page)

    def _write_tail(self, layer: int, tokens: Bits) -> None:
        """Put tokens into the layer's last stripe in DRAM: whole pages if they are its first, else only their bytes."""
        config, state = self.device.config, self._layers[layer]
        stripe, inside = divmod(state.length, self.stripe_tokens)
        if inside == 0:
            padded = np.zeros((self.kv_heads, 2, self.stripe_tokens, config.head_dim), np.uint16)
            padded[:, :, : tokens.shape[2]] = tokens
            self._stage(layer, padded)
            return
        write, size = self.device.transport.write_dram, self._pages * config.page_bytes
        base = state.staged[stripe] * config.page_bytes
        first = layout.token_offset(inside, config)
        last = layout.token_offset(inside + tokens.shape[2] - 1, config) + config.token_bytes
        # Packed from the beginning of a codeword on; what is before the first token is cut off.
        lead = inside % config.tokens_per_codeword
        padded = np.zeros((lead + tokens.shape[2], config.head_dim), np.uint16)
        begin = layout.token_offset(inside - lead, config)
        for head in range(self.kv_heads):
            for kind in Kind:
                padded[lead:] = tokens[head, kind]
                data = layout.pack_pages(padded, config).ravel()[first - begin : last - begin]
                write(base + (2 * head + kind) * size + first, data.tobytes())

    def _stage(self, layer: int, tokens: Bits) -> range:
        """Put whole stripes into DRAM; their numbers."""
        config, state = self.device.config, self._layers[layer]
        first = state.length // self.stripe_tokens
        stripes = range(first, first + tokens.shape[2] // self.stripe_tokens)
        shape = (self.kv_heads, 2, len(stripes), self.stripe_tokens, config.head_dim)
        by_stripe = np.ascontiguousarray(np.moveaxis(tokens.reshape(shape), 2, 0))
        images = layout.pack_pages(by_stripe.reshape(-1, config.head_dim), config)
        images = images.reshape(len(stripes), -1, config.page_bytes)
        heads = np.arange(self.kv_heads)
        for stripe, image in zip(stripes, images, strict=True):
            base = self.device._dram.allocate(len(image))
            self.device.transport.write_dram(base * config.page_bytes, image.tobytes())
            state.staged[stripe] = base
            key_pages = base + 2 * heads * self._pages
            state.table[:, stripe] = layout.pack_entries(
                self._channel(layer, heads, stripe), key_pages, key_pages + self._pages, 1)
        return stripes

    def _channel(self, layer: int, head: Any, stripe: Any) -> Any:
        return layout.stripe_channel(stripe, self._first_head + layer * self.kv_heads + head, self.device.config)

    # Moving to flash.

    def _flush(self, layer: int, stripes: Series[int], tokens: Bits | None = None) -> None:
        """Program full stripes, and give their DRAM back.

        Args:
            layer: which layer.
            stripes: consecutive ones, staged.
            tokens: theirs, if at hand; otherwise DRAM is read for what the channel layout needs.
        """
        if not stripes:
            return
        pages, dram = self._pages, self.device._dram
        items = [(stripe, head) for head in range(self.kv_heads) for stripe in stripes]
        if not self.sparse:
            self._program(layer, items, {})
            return
        # K in the channel layout passes through DRAM, too, as much at a time as there is room for.
        while items:
            room = min(len(items), dram.largest // pages)
            now, items = items[: max(room, 1)], items[max(room, 1) :]
            base = dram.allocate(len(now) * pages)
            try:
                sources = {item: base + i * pages for i, item in enumerate(now)}
                images = np.concatenate([self._channel_images(layer, *item, stripes, tokens) for item in now])
                self.device.transport.write_dram(base * self.device.config.page_bytes, images.tobytes())
                self._program(layer, now, sources)
            finally:
                dram.free(base)

    def _channel_images(self, layer: int, stripe: int, head: int, stripes: Series[int], tokens: Bits | None) -> Bytes:
        config, size = self.device.config, self._pages * self.device.config.page_bytes
        if tokens is None:
            base = self._layers[layer].staged[stripe] * config.page_bytes + 2 * head * size
            data = self.device.transport.read_dram(base, size)
            keys = layout.unpack_pages(np.frombuffer(data, np.uint8).reshape(self._pages, -1), config)
        else:
            first = (stripe - stripes[0]) * self.stripe_tokens
            keys = tokens[head, Kind.KEY, first : first + self.stripe_tokens]
        return layout.pack_channel_pages(keys, config)

    def _runs(self, layer: int, items: Series[tuple[int, int]], sources: dict[tuple[int, int], int]) -> Iterator[_Run]:
        """What must be programmed, in the order in which it takes its places on each channel."""
        config, state = self.device.config, self._layers[layer]
        heads: dict[tuple[int, int], list[int]] = {}
        for stripe, head in items:
            heads.setdefault((int(self._channel(layer, head, stripe)), head), []).append(stripe)
        for (channel, head), stripes in heads.items():
            for kind in range(self._kinds):
                for stripe in stripes:
                    if (stripe, head, kind) in state.placed:
                        continue
                    # Several stripes: one after the other, through planes and then dies.  A single one, as they come
                    # from decoding: on another die than the one before of this head, V far from K.
                    number = (self._first_head + layer * self.kv_heads + head) // config.channels
                    die = number + stripe // config.channels + kind * config.dies // self._kinds
                    source = sources[stripe, head] if kind == CHANNEL_KIND else (
                        state.staged[stripe] + (2 * head + kind) * self._pages)
                    yield _Run(stripe, head, kind, channel, source, die % config.dies if len(stripes) == 1 else None)

    def _program(self, layer: int, items: Series[tuple[int, int]], sources: dict[tuple[int, int], int]) -> None:
        """Program (stripe, head) items; what fails is placed elsewhere on its channel."""
        device, allocator = self.device, self.device._allocator
        runs = list(self._runs(layer, items, sources))
        error: BaseException | None = None
        while runs and error is None:
            try:
                places = self._take(runs)
            except CapacityError:
                device._raise_die_error()   # why there is no room
                raise
            numbers = [(i, page) for i in range(len(runs)) for page in range(self._pages)]
            order = device._round_robin([runs[i].channel for i, _ in numbers],
                                        [places[i] + page for i, page in numbers])
            numbers = [numbers[n] for n in order]
            entries, error = device._operate(
                [FlashOperation(Opcode.PROGRAM, runs[i].channel, places[i] + page, runs[i].source + page)
                 for i, page in numbers], device.timeout_s)
            good = [True] * len(runs)
            again = [True] * len(runs)
            done = _get(entries, COMPLETION["done"]) == 1
            statuses = _get(entries, COMPLETION["status"])
            for n in np.flatnonzero(~done | (statuses != Status.OK)).tolist():
                i, page = numbers[n]
                good[i] = False
                channel, number = runs[i].channel, places[i] + page
                if not done[n]:
                    allocator.abandon(channel, number)
                elif statuses[n] == Status.PROGRAM_FAILED:
                    allocator.failed(channel, number)
                elif statuses[n] == Status.DIE_TIMEOUT:
                    device._lose_die("PROGRAM", Completion.unpack(entries[n].tobytes()))
                    again[i] = False
                else:
                    allocator.abandon(channel, number)
                    error = error or device._failure("PROGRAM", Completion.unpack(entries[n].tobytes()))
            allocator.account(len(numbers), sum(good) * self._pages)
            for run, place, there in zip(runs, places, good, strict=True):
                if there:
                    self._placed(layer, run, place)
            runs = [run for run, there, retry in zip(runs, good, again, strict=True) if not there and retry]
        if error is not None:
            raise error
        device._raise_die_error()

    def _take(self, runs: Series[_Run]) -> list[int]:
        """First pages for runs: for all of them or none."""
        allocator, places = self.device._allocator, []
        try:
            for run in runs:
                places.append(allocator.take(self._allocation, run.channel, die=run.die))
        except BaseException:
            for run, place in reversed(list(zip(runs, places, strict=False))):
                allocator.give_back(self._allocation, run.channel, place)
            raise
        return places

    def _placed(self, layer: int, run: _Run, place: int) -> None:
        """Note that a run is in flash; when all of its stripe is, for this head and for all heads, use that."""
        state, stripe = self._layers[layer], run.stripe
        state.placed[stripe, run.head, run.kind] = place
        keys = [(stripe, run.head, kind) for kind in range(self._kinds)]
        if not all(key in state.placed for key in keys):
            return
        found = [state.placed[key] for key in keys]
        state.table[run.head, stripe] = layout.pack_entries(run.channel, found[Kind.KEY], found[Kind.VALUE], 0)
        if self.sparse:
            state.channel_pages[run.head, stripe] = found[CHANNEL_KIND]
        if all((stripe, head, kind) in state.placed for head in range(self.kv_heads) for kind in range(self._kinds)):
            self.device._dram.free(state.staged.pop(stripe))
            for head in range(self.kv_heads):
                for kind in range(self._kinds):
                    del state.placed[stripe, head, kind]

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
        config, table = self.device.config, self._layers[layer].table[head]
        size = self.stripe_tokens
        busy = masks.end > masks.start
        first = int(masks.start[busy].min(initial=1 << layout.TOKEN_BITS)) if busy.any() else 0
        last = int(masks.end[busy].max(initial=1))
        first -= first % size
        # A lane's score buffer holds so many stripes, and they go round the lanes.
        places = config.ring_codewords // (self._pages * config.codewords_per_page)
        most = min(config.channels * places, MAX_STRIPES) * size
        for base in range(first, last, most):
            stop = min(base + most, last)
            # A tree that began before this range is cut, so that it begins inside or at the end.
            tree_token = min(max(masks.tree_token, base), stop)
            yield Job(
                query=query,
                # A row that attends nothing in this range has the empty window at its beginning.
                start=np.clip(masks.start, base, stop),
                end=np.clip(masks.end, base, stop),
                tree=masks.tree >> min(max(base - masks.tree_token, 0), TREE_BITS),
                table=table[base // size : -(-stop // size)],
                stripe_pages=self._pages,
                base_token=base,
                end_token=stop,
                tree_token=tree_token,
                scale_bits=scale_bits,
                label=f"sequence {self.number}, layer {layer}, KV head {head}, tokens {base} to {stop - 1}",
            )


# Helpers.


def explain(completion: Completion) -> str:
    """What a completion's status means, in words."""
    status, where = completion.status, completion.where
    texts: dict[Status, Callable[[], str]] = {
        Status.OK: lambda: "no error",
        Status.INVALID_OPCODE: lambda: f"there is no opcode {where:#04x}",
        Status.INVALID_FIELD: lambda: (
            "a reserved byte is not zero, or stripe_pages is no power of two or more than the score buffer holds"
        ),
        Status.INVALID_ROWS: lambda: f"{where} query rows are none or more than the device has",
        Status.INVALID_LENGTH: lambda: (
            "no token, more tokens than the score buffers hold, or another number of stripes than they take"
        ),
        Status.INVALID_ADDRESS: lambda: (
            f"the {('query block', 'result block', 'table')[min(where, 2)]} is unaligned or out of the buffer window"
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
    }
    return f"{status.name}: {texts[status]()}"


def _end(action: Callable[[], None], error: BaseException | None) -> None:
    """Clean up at the end of a with block; an error of that does not hide the one that ended the block."""
    try:
        action()
    except KvatticError:
        if error is None:
            raise


def _table_bytes(job: Job) -> int:
    """Bytes of the job's table, in whole lines."""
    return lines(len(job.table) * TABLE_ENTRY.size) * LINE_BYTES


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


def _get(block: Bytes, field: Field) -> Integers:
    """An unsigned field of each row of a block of records."""
    column = np.ascontiguousarray(block[:, field.offset : field.offset + field.size])
    return column.view(f"<u{field.size}")[:, 0].astype(np.int64)


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
