"""`Sequence`: K and V of one sequence in the device's flash and DRAM, and the plans of attention over them."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic import layout
from kvattic.allocator import Allocation
from kvattic.commands import COMMAND, COMPLETION, TREE_BITS, Completion, Kind, Opcode, Status, fp32_bits
from kvattic.errors import CapacityError, RequestError
from kvattic.jobs import (
    AttendPlan,
    AttendResult,
    Bits,
    Bytes,
    FlashOperation,
    Integers,
    Job,
    Part,
    check_positive,
    end_block,
    get_field,
)
from kvattic.transport import Progress

if TYPE_CHECKING:
    from kvattic.driver import Device

__all__ = ["Loss", "Sequence"]

CHUNK_BYTES = 1 << 28
"""Device DRAM that a prefill uses at once, at most: enough to keep all dies busy for long."""
CHANNEL_KIND = 2
"""Beside `Kind`: K in the channel layout."""
MAX_STRIPES = (1 << 8 * COMMAND["stripes"].size) - 1
NO_ENTRY = (1 << 64) - 1


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


class _Masks(NamedTuple):
    """Per query: int64 (n_queries,) each; a query with end <= start attends nothing."""

    start: Integers
    end: Integers
    tree: Integers
    tree_token: int


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
        device: "Device",
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
        end_block(self.free, error)

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
            for kind in (Kind.KEY, Kind.VALUE):
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
            done = get_field(entries, COMPLETION["done"]) == 1
            statuses = get_field(entries, COMPLETION["status"])
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
        parts: list[Part] = []
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
                parts.append(Part(head, chunk, range(before, len(jobs))))
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
        check_positive("window", window)
        draft &= draft[:, ::-1].cumsum(axis=1)[:, ::-1] <= window
        start = np.maximum(prefix_end - (window - draft.sum(axis=1)), 0)
    bits = (draft.astype(np.int64) << place).sum(axis=1)
    last = np.where(draft, tree_token + place + 1, 0).max(axis=1, initial=0)
    return _Masks(start, np.maximum(prefix_end, last), bits, tree_token)
