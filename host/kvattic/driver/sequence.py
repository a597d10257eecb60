"""`Sequence`: K and V of one sequence in the device's flash and DRAM, and the plans of attention over them."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Series
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.driver.futures import Future
from kvattic.driver.jobs import (
    MAX_SINKS,
    MAX_STRIPES,
    AttendPlan,
    AttendResult,
    Bits,
    Integers,
    Job,
    Part,
    check_integer,
    check_positive,
    end_block,
)
from kvattic.driver.value_sums import Doubles
from kvattic.driver.writer import NO_ENTRY, Store
from kvattic.errors import CapacityError, RequestError
from kvattic.spec import layout
from kvattic.spec.commands import COMMAND, TREE_BITS, Kind, Mode, fp32_bits, is_positive_normal
from kvattic.spec.elements import as_array
from kvattic.support.renamed import old_selection_keywords
from kvattic.transport.base import Progress

__all__ = ["Loss", "Sequence"]

MAX_UNITS = (1 << 8 * COMMAND["top_units"].size) - 1
MAX_LOCAL_TOKENS = (1 << 8 * COMMAND["local_tokens"].size) - 1


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


class Masks(NamedTuple):
    """Per query: int64 (n_queries,) each; a query with end <= start attends nothing."""

    start: Integers
    end: Integers
    tree: Integers
    tree_token: int


class _Selection(NamedTuple):
    """What a sparse mode attends; see `Sequence.attend`."""

    mode: Mode
    features: int
    top_units: int
    local_tokens: int
    sinks: int
    unit_tokens: int
    unit_bits: int


class Sequence(Store):
    """K and V of one sequence; made by `Device.create_sequence`.

    Usable as a context manager, which frees it at the end.

    Tokens that do not fill a stripe yet are in device DRAM, as pages that look as those in flash, and are attended
    there.  A full stripe is programmed from these pages, which are then given back, together with what its sequence has
    for the sparse modes (*sketches*): K in the feature layout, centroids.  What is in flash (`flushed`) survives a loss
    of the drive's power, what is in DRAM does not.

    Attributes:
        device: where it lives.
        number: of the sequence, counted over the device's life; messages name it.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
        sparse: K is written in the feature layout, too.
        centroids: tokens of the units whose mean keys are written, too; None: there are none.
        stripe_tokens: tokens of a stripe.
        domain: what the device takes for the owner of its flash and DRAM; its own if it is isolated.
        held_tokens: the newest tokens of each layer, which stay in device DRAM, where `truncate` can remove them; to be
            set before they are appended.
    """

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
        with self.device.lock:
            if self._freed:
                return
            self._freed = True
            try:
                self._finish_writes()
            finally:
                for layer in self._layers:
                    layer.table[:] = NO_ENTRY
                try:
                    for layer in self._layers:
                        self._give_back_dram(layer)
                finally:
                    self.device._release(self)

    def _lose_tails(self) -> Iterator[Loss]:
        """What was in DRAM is gone."""
        self._background.clear()    # losses say more
        for number, layer in enumerate(self._layers):
            tokens = layer.length - self.flushed(number)
            layer.length -= tokens
            if layer.sums is not None:
                layer.sums.truncate(layer.length, np.zeros((self.kv_heads, 0, self.device.config.head_dim), np.uint16))
            first = layer.length // self.stripe_tokens
            layer.table[:, first:] = NO_ENTRY
            for sketches in layer.sketches.values():
                sketches[:, first:] = 0
            layer.staged.clear()
            layer.placed.clear()
            if tokens:
                yield Loss(self, number, tokens)

    def _check_open(self) -> None:
        self.device._check_open()
        if self._freed:
            raise RequestError("the sequence was freed; create another one")

    def _check_use(self) -> None:
        self._check_open()
        self._raise_background()

    def length(self, layer: int = 0) -> int:
        """Tokens that a layer holds, in flash or DRAM; waits for those of appends that found no room in DRAM yet.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        with self.device.lock:
            self._check_use()
            self._check_layer(layer)
            self._settle(layer)
            return self._layers[layer].length

    def flushed(self, layer: int = 0) -> int:
        """The first tokens of a layer that are all in flash, programmed and acknowledged.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        with self.device.lock:
            length, staged = self.length(layer), self._layers[layer].staged
            return min(staged) * self.stripe_tokens if staged else length

    def mean_value(self, layer: int = 0) -> NDArray[np.float32]:
        """Mean of the stored V over all tokens of a layer, which sparf and fetched blend in for a query of all of them.

        It is a float64 sum, token by token, and rounded once.

        Returns:
            float32, (kv_heads, head_dim).

        Raises:
            RequestError: the layer has no tokens, or the sequence is without the feature layout.
        """
        with self.device.lock:
            length = self.length(layer)
            if not self.sparse:
                raise RequestError("the mean of V is kept with K in the feature layout only (sparse=True)")
            if length == 0:
                raise RequestError(f"layer {layer} has no tokens")
            mean: NDArray[np.float32] = self._means(layer, make_masks(length, 1))[0]
            return mean

    def counters(self) -> dict[str, int]:
        """What was done for this sequence so far, by name; also when it was freed.

        They are what the host knows of it; `Device.counters` has what the drive counts, of all sequences together.

        JOBS: jobs whose results were put together, each of the query rows of a KV head over a range of tokens.
        TOKENS: tokens that were written, of all layers; again if they were truncated and written anew.
        PAGE_PROGRAMS: flash pages that the drive programmed with its K, V and sketches; also those that failed, which
            are programmed again elsewhere.  What is in device DRAM only was not programmed yet.
        """
        with self.device.lock:
            return dict(self._counters)

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
        with self.device.lock:
            future = self._begin_prefill(key, value, layer, ahead=False)
        future.result()

    def prefill_async(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> Future[None]:
        """Begin to write the first tokens of a layer; see `append_async`.

        Raises:
            RequestError, CapacityError: see `prefill`.
        """
        with self.device.lock:
            return self._begin_prefill(key, value, layer, ahead=True)

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
            DeviceTimeoutError: see `Device`.

        After a CapacityError of DRAM nothing was written.  After an error of flash the layer holds the tokens that
        `length` says, all of which are attended; the next append tries again to move them to flash.
        """
        with self.device.lock:
            future = self._begin_append(key, value, layer, ahead=False)
        future.result()

    def append_async(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> Future[None]:
        """Begin to write the next tokens of a layer.

        When this returns they are in device DRAM, as far as there is room, and can be attended; full stripes are on
        their way to flash.  Whatever uses the layer afterwards (`append`, `attend`, `length`) comes after these tokens,
        and waits until all of them are in DRAM, but not for flash.

        Returns:
            Done when the tokens are written, and the stripes that they fill are in flash.  Its errors are those of
            `append`, but for those below; if nobody asks it for an error, the next call of this sequence raises it.

        Raises:
            RequestError: an array has a wrong shape, dtype or number in it.
            CapacityError: more tokens than capacity_tokens.
        """
        with self.device.lock:
            return self._begin_append(key, value, layer, ahead=True)

    def truncate(self, length: int, *, layer: int = 0) -> None:
        """Remove the last tokens of a layer; they must be in device DRAM still (`held_tokens`).

        Waits for everything that is under way.

        Args:
            length: tokens that are left.
            layer: which layer.

        Raises:
            RequestError: the layer has fewer tokens, or some of those to remove are in flash.
        """
        with self.device.lock:
            present = self.length(layer)
            state, dispatcher = self._layers[layer], self.device._dispatcher
            dispatcher.drive(lambda: not state.appends and not dispatcher.working)
            # A stripe of which something is in flash would be written twice.
            fixed = max([self.flushed(layer), *((stripe + 1) * self.stripe_tokens for stripe, _, _ in state.placed)])
            if isinstance(length, bool) or not isinstance(length, int | np.integer) or not (
                    length == present or fixed <= length < present):
                raise RequestError(
                    f"length must be an int from {fixed} to {present}, not {length!r}: layer {layer} has {present} "
                    f"tokens, the first {fixed} of which are in flash, where nothing can be removed; hold more of them "
                    "in DRAM (held_tokens)")
            if length < present:
                self._truncate(layer, int(length))

    def _begin_prefill(self, key: ArrayLike, value: ArrayLike, layer: int, *, ahead: bool) -> Future[None]:
        if length := self.length(layer):
            raise RequestError(
                f"layer {layer} has {length} tokens already: prefill is for the first, use append"
            )
        return self._begin_append(key, value, layer, ahead=ahead)

    def _begin_append(self, key: ArrayLike, value: ArrayLike, layer: int, *, ahead: bool) -> Future[None]:
        self._check_use()
        self._check_layer(layer)
        state = self._layers[layer]
        length = state.length + sum(append.left for append in state.appends)
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
        self.device._dispatcher.check()
        return self._begin(layer, np.stack([keys, values], axis=1), ahead=ahead)

    def _tokens(self, name: str, values: ArrayLike) -> Bits:
        array, dim = as_array(values), self.device.config.head_dim
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

    @old_selection_keywords
    def attend(
        self,
        query: ArrayLike,
        *,
        layer: int = 0,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        tree: ArrayLike | None = None,
        start: ArrayLike | None = None,
        end: ArrayLike | None = None,
        mode: Mode | str = Mode.DENSE,
        features: int | None = None,
        top_units: int | None = None,
        local_tokens: int = 0,
        sinks: int | None = None,
        unit_tokens: int | None = None,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> AttendResult:
        """Attention of queries over a layer's tokens: softmax(scale * q K^T) V, in dense mode.

        The device computes it from the stored 16-bit elements with fixed-point sums, rounded once
        to float32.  The query heads of a KV head and all queries share each pass over K and V,
        `Config.rows` at a time.  The masks are combined: a query attends what all of them allow.

        The sparse modes choose by a first pass over less than K which *units* of tokens are attended exactly:

        - ``sparf`` (SparF, SparQ): the units are single tokens.  `features` (the paper's r) features of q and K, those
          of the largest |q|, give approximate scores; the `top_units` (k) tokens of the largest approximate softmax are
          attended; the output is alpha * attention + (1 - alpha) * mean of V, alpha being their share in the
          approximate softmax.  The sequence must have been created with sparse=True.
        - ``fetched``: the same with a codeword for a unit, or several (`unit_tokens`), because that is what is read:
          all tokens of these codewords are attended and counted in alpha.
        - ``centroid``: the units are those whose mean keys were written (create_sequence(centroids=...)); those of
          the largest approximate softmax over mean keys are attended, without a blend.

        A query of these modes sees its own past alone: several queries with causal=True give, to the last bit, what
        each gives when its token is the newest (drafts in a chain likewise).  So each query selects for itself, and the
        mean of V is over the tokens that it may attend.  The stripe that is not full at its last token, and the
        `held_tokens` before it, are its *tail*: attended in any case, and not counted in `top_units`, whether they lie
        in device DRAM or not.  The query heads of a KV head share one selection (as in SparQ's form for GQA: |q| and
        the approximate softmax are summed over them), so they must fit a job of `Config.rows` rows.

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
            start: integers, (n_queries,), 0 to the layer's tokens: the first token that each query attends.
            end: likewise, one past the last token that each query attends; a query whose end is not behind its start
                attends nothing.
            mode: `commands.Mode` or its name in lower case.
            features: sparf, fetched: the paper's r, 1 to head_dim.
            top_units: sparse modes: the paper's k, how many units are attended: at least 1, and no more than there are.
                 A query that has fewer, because of causal, attends all of its units.
            local_tokens: sparse modes: the newest tokens of each query, which are attended in any case; units with any
                of them count among `top_units`, which must be as many.
            sinks: sparse modes: the first tokens of the sequence, which are attended in any case, too, and count
                likewise.  If None, those that the sequence was created with.
            unit_tokens: fetched, centroid: tokens of a unit, a power of two from a codeword's to a page's.  If None, a
                codeword's in fetched; in centroid those of the stored mean keys, and nothing else will do there.
            timeout_s: how long the device may send no completion; its own patience if None.
            progress: called now and then with (jobs done, jobs in all).

        Raises:
            RequestError: a wrong shape, dtype or number, an empty layer, a freed sequence, one that was created without
                what the mode reads, or in a sparse mode more tokens than the score buffers hold or more query heads for
                a KV head than a job has rows.
            RangeError: a score or a value is too large to be computed exactly.
            DeviceStatusError: the device reports an error, such as a NaN in K (which only bit
                patterns can bring in).
            DeviceTimeoutError, CapacityError: see `Device.run`.
        """
        with self.device.lock:
            plan = self.plan(query, layer=layer, scale=scale, causal=causal, window=window, tree=tree,
                             start=start, end=end, mode=mode, features=features, top_units=top_units,
                             local_tokens=local_tokens, sinks=sinks, unit_tokens=unit_tokens)
            waiting = self.device.submit(plan.jobs, check=False)
        return plan.finish(self.device._results(plan.jobs, waiting, timeout_s=timeout_s, progress=progress))

    @old_selection_keywords
    def attend_async(
        self,
        query: ArrayLike,
        *,
        layer: int = 0,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        tree: ArrayLike | None = None,
        start: ArrayLike | None = None,
        end: ArrayLike | None = None,
        mode: Mode | str = Mode.DENSE,
        features: int | None = None,
        top_units: int | None = None,
        local_tokens: int = 0,
        sinks: int | None = None,
        unit_tokens: int | None = None,
    ) -> Future[AttendResult]:
        """Begin an `attend` call over the tokens that were appended before; arguments and errors are its.

        Errors of the device are the future's, and so is a `RangeError`.  A sparse mode waits until the stripes that it
        chooses from are in flash.
        """
        with self.device.lock:
            plan = self.plan(query, layer=layer, scale=scale, causal=causal, window=window, tree=tree,
                             start=start, end=end, mode=mode, features=features, top_units=top_units,
                             local_tokens=local_tokens, sinks=sinks, unit_tokens=unit_tokens)
            return self.device.attend_async(plan)

    @old_selection_keywords
    def plan(
        self,
        query: ArrayLike,
        *,
        layer: int = 0,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        tree: ArrayLike | None = None,
        start: ArrayLike | None = None,
        end: ArrayLike | None = None,
        mode: Mode | str = Mode.DENSE,
        features: int | None = None,
        top_units: int | None = None,
        local_tokens: int = 0,
        sinks: int | None = None,
        unit_tokens: int | None = None,
    ) -> AttendPlan:
        """The jobs of an `attend` call, for `Device.attend_many`; arguments and errors are its."""
        with self.device.lock:
            masks = {"causal": causal, "window": window, "tree": tree, "start": start, "end": end}
            return self._plan(query, layer, scale, masks, (
                mode, features, top_units, local_tokens, sinks, unit_tokens))

    def _plan(self, query: ArrayLike, layer: int, scale: float | None, allowed: dict[str, Any],
              how: tuple[Mode | str, int | None, int | None, int, int | None, int | None]) -> AttendPlan:
        length, config = self.length(layer), self.device.config
        array, dim = as_array(query), config.head_dim
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
        bits = layout.storage_bits(array, config.element, "query").copy()   # jobs may be read much later
        scale_bits = _scale_bits(1 / math.sqrt(dim) if scale is None else scale)
        masks = make_masks(length, n_queries, **allowed)
        selection = self._selection(*how)

        # Rows by query, then by head of the group: so the windows of a job's rows lie close
        # together and less is read.
        group = q_heads // self.kv_heads
        rows = (
            bits.reshape(self.kv_heads, group, n_queries, dim)
            .swapaxes(1, 2)
            .reshape(self.kv_heads, -1, dim)
        )
        # A selection is of one query, and of all heads of the group.
        if selection is not None and group > config.rows:
            raise RequestError(
                f"mode {selection.mode.name.lower()} selects once for the {group} query heads of a KV head, which must "
                f"fit one job: this configuration has {config.rows} rows (Config.rows); take one with {group}, or "
                "attend densely")
        together = rows.shape[1] if selection is None else group
        start, end, draft = (np.repeat(per_query, group) for per_query in masks[:3])
        chunks = [slice(first, min(first + config.rows, begin + together))
                  for begin in range(0, rows.shape[1], together)
                  for first in range(begin, begin + together, config.rows)]
        cut = [Masks(start[chunk], end[chunk], draft[chunk], masks.tree_token) for chunk in chunks]
        if selection is not None:
            self._check_selection(selection, [self._range(part, length) for part in cut])
        means = None
        if selection is not None:
            self._settle_flash(layer, max(part.end.max() for part in cut))
            if selection.features:
                means = self._means(layer, masks).view(np.uint32)
        jobs: list[Job] = []
        parts: list[Part] = []
        for head in range(self.kv_heads):
            for chunk, part in zip(chunks, cut, strict=True):
                before = len(jobs)
                if selection is None:
                    jobs += self._jobs(layer, head, rows[head, chunk], scale_bits, part)
                else:
                    mean = None if means is None else means[chunk.start // group, head]
                    jobs.append(self._sparse_job(layer, head, rows[head, chunk], scale_bits, part, selection, mean))
                parts.append(Part(head, chunk, range(before, len(jobs))))
        return AttendPlan(sequence=self, shape=(q_heads, n_queries, dim), jobs=jobs, _parts=parts)

    @property
    def _most_tokens(self) -> int:
        """Tokens of a job: a lane's score buffer holds so many stripes, and they go round the lanes."""
        config = self.device.config
        places = config.ring_codewords // (self._pages * config.codewords_per_page)
        return min(config.channels * places, MAX_STRIPES) * self.stripe_tokens

    def _range(self, masks: Masks, length: int) -> tuple[int, int]:
        """Tokens from the first stripe on to the last one that any row attends; all `length` if there is none."""
        busy = masks.end > masks.start
        if not busy.any():
            return 0, length
        first, last = int(masks.start[busy].min()), int(masks.end[busy].max())
        return first - first % self.stripe_tokens, last

    def _jobs(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks) -> Iterator[Job]:
        """One dense job for each range of tokens that the score buffers hold."""
        first, last = self._range(masks, 1)
        for base in range(first, last, self._most_tokens):
            yield self._job(layer, head, query, scale_bits, masks, base, min(base + self._most_tokens, last))

    def _job(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks, base: int, stop: int) -> Job:
        """A dense job over tokens base to stop."""
        size = self.stripe_tokens
        return Job(
            query=query,
            # A row that attends nothing in this range has the empty window at its beginning.
            start=np.clip(masks.start, base, stop),
            end=np.clip(masks.end, base, stop),
            tree=masks.tree >> min(max(base - masks.tree_token, 0), TREE_BITS),
            table=self._layers[layer].table[head, base // size : -(-stop // size)],
            stripe_pages=self._pages,
            base_token=base,
            end_token=stop,
            # A tree that began before this range is cut, so that it begins inside or at the end.
            tree_token=min(max(masks.tree_token, base), stop),
            scale_bits=scale_bits,
            domain=self.domain,
            label=f"sequence {self.number}, layer {layer}, KV head {head}, tokens {base} to {stop - 1}",
        )

    # Sparse attention.

    def _whole_from(self, stop: int) -> int:
        """First token of the tail of a query whose last token is before `stop`: a stripe's first."""
        return max(stop - self.held_tokens, 0) // self.stripe_tokens * self.stripe_tokens

    def _settle_flash(self, layer: int, stop: int) -> None:
        """Let stripes on their way to flash come there, as far as they are no tail of queries before `stop`."""
        appends, limit = self._layers[layer].appends, self._whole_from(stop)
        if appends and self._unflushed(layer, limit):
            self.device._dispatcher.drive(lambda: not appends or not self._unflushed(layer, limit))

    def _means(self, layer: int, masks: Masks) -> NDArray[np.float32]:
        """Mean of V over what each query may attend: (n_queries, kv_heads, head_dim); zero where that is nothing."""
        sums = self._layers[layer].sums
        assert sums is not None
        known: dict[int, Doubles] = {}
        read = partial(self._read_values, layer)

        def until(token: int) -> Doubles:
            if token not in known:
                known[token] = sums.until(token, read)
            return known[token]

        means = np.zeros((len(masks.start), self.kv_heads, self.device.config.head_dim), np.float32)
        for mean, start, end, tree in zip(means, *(column.tolist() for column in masks[:3]), strict=True):
            drafts = [masks.tree_token + i for i in range(TREE_BITS) if tree >> i & 1]
            prefix = max(min(end, masks.tree_token), start)
            if not drafts and prefix == start:
                continue
            first = start if prefix > start else drafts[0]
            if [*range(prefix, end)] == drafts or (prefix == start and drafts == [*range(first, end)]):
                total = until(end) - until(first)   # of a chain of drafts, too, so that its bits are those of tokens
            else:
                total = until(prefix) - until(start)
                for draft in drafts:
                    total = total + sums.values(draft, draft + 1, read)[:, 0]
            mean[:] = total / (prefix - start + len(drafts))
        return means

    def _read_values(self, layer: int, first: int, last: int) -> Doubles:
        """V of tokens as the device has it, (kv_heads, tokens, head_dim): a query of one token gives its V exactly."""
        config, size = self.device.config, self.stripe_tokens
        scale_bits = _scale_bits(1.0)
        jobs: list[Job] = []
        for head in range(self.kv_heads):
            for base in range(first, last, config.rows):
                token = np.arange(base, min(base + config.rows, last))
                masks = Masks(token, token + 1, np.zeros_like(token), last)
                query = np.zeros((len(token), config.head_dim), np.uint16)
                jobs.append(self._job(layer, head, query, scale_bits, masks, base - base % size, int(token[-1]) + 1))
        found = [result.bits.view(np.float32) for result in self.device.run(jobs)]
        return np.concatenate(found).astype(np.float64).reshape(self.kv_heads, last - first, -1)

    def _selection(self, mode: Mode | str, features: int | None, top_units: int | None, local_tokens: int,
                   sinks: int | None, unit_tokens: int | None) -> _Selection | None:
        """What is asked for, as far as it can be checked without the tokens; None: dense."""
        config = self.device.config
        names = {one.name.lower(): one for one in Mode}
        found = names.get(mode) if isinstance(mode, str) else mode
        if not isinstance(found, Mode):
            raise RequestError(f"mode must be one of {', '.join(names)}, not {mode!r}")
        name = found.name.lower()
        uses = {
            "features": found in (Mode.SPARF, Mode.FETCHED),
            "top_units": found is not Mode.DENSE,
            "local_tokens": found is not Mode.DENSE,
            "sinks": found is not Mode.DENSE,
            "unit_tokens": found in (Mode.FETCHED, Mode.CENTROID),
        }
        given = {"features": features is not None, "top_units": top_units is not None,
                 "local_tokens": local_tokens != 0, "sinks": bool(sinks), "unit_tokens": unit_tokens is not None}
        for argument, used in uses.items():
            if given[argument] and not used:
                raise RequestError(f"mode {name} has no {argument}: it must not be given")
        if found is Mode.DENSE:
            return None
        if uses["features"] and not self.sparse:
            raise RequestError(f"mode {name} reads K in the feature layout, which this sequence was created without: "
                               "create it with sparse=True")
        if found is Mode.CENTROID and self.centroids is None:
            raise RequestError(f"mode {name} reads mean keys, which this sequence was created without: create it with "
                               "centroids=...")
        if uses["features"]:
            check_integer("features (the paper's r)", features, 1, config.head_dim)
        check_integer("top_units (the paper's k)", top_units, 1, MAX_UNITS)
        size = 1
        if found is Mode.FETCHED:
            size = config.tokens_per_codeword if unit_tokens is None else unit_tokens
        elif self.centroids is not None and found is Mode.CENTROID:
            size = self.centroids
            if unit_tokens not in (None, size):
                raise RequestError(f"unit_tokens must be {size}, of which the sequence's mean keys are, not "
                                   f"{unit_tokens!r}")
        unit_bits = 0 if found is Mode.SPARF else layout.unit_bits(size, config)
        assert top_units is not None
        check_integer("local_tokens", local_tokens, 0, min(top_units * size, MAX_LOCAL_TOKENS))
        sinks = self.sinks if sinks is None else sinks
        check_integer("sinks", sinks, 0, MAX_SINKS)
        return _Selection(found, features or 0, int(top_units), int(local_tokens), int(sinks), int(size), unit_bits)

    def _check_selection(self, selection: _Selection, ranges: Series[tuple[int, int]]) -> None:
        """Whether the tokens of all jobs fit the score buffers, and make as many units as are asked for."""
        name, size = selection.mode.name.lower(), selection.unit_tokens
        for base, stop in ranges:
            if stop - base > self._most_tokens:
                raise RequestError(
                    f"mode {name} takes at most {self._most_tokens:,} tokens, which the score buffers hold at once "
                    f"(Config.score_depth), not {stop - base:,} (tokens {base} to {stop - 1}); attend a window of "
                    "them, or densely")
        base, stop = max(ranges, key=lambda tokens: tokens[1] - tokens[0])
        most = -(-(stop - base) // size)
        if selection.top_units > most:
            raise RequestError(f"top_units (the paper's k) must be at most {most:,}, as tokens {base} to {stop - 1} "
                               f"make no more units of {size}, not {selection.top_units:,}")
        for base, stop in ranges:
            # What is attended whole comes on top of the units.
            end = min(stop, self._whole_from(stop))
            first, last = base // size, -(-end // size)
            local = selection.local_tokens
            newest = range(max(first, max(stop - local, 0) // size), last) if local else range(0)
            oldest = range(first, min(-(-selection.sinks // size), last))
            forced = len({*newest, *oldest})
            if selection.top_units < forced:
                raise RequestError(
                    f"top_units (the paper's k) must be at least {forced}, not {selection.top_units}: of {stop} tokens "
                    f"the first {selection.sinks} (sinks) and the newest {local} (local_tokens) lie in so many units "
                    f"of {size}")

    def _sparse_job(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks, selection: _Selection,
                    mean: NDArray[np.uint32] | None) -> Job:
        """A job of a sparse mode; it has all tokens of its rows."""
        state, size = self._layers[layer], self.stripe_tokens
        base, stop = self._range(masks, state.length)
        job = self._job(layer, head, query, scale_bits, masks, base, stop)
        top_units = min(selection.top_units, -(-(stop - base) // selection.unit_tokens))
        sketch = state.sketches[Kind.SKETCH if selection.mode is Mode.CENTROID else Kind.FEATURE]
        return replace(
            job,
            mode=selection.mode,
            features=selection.features,
            top_units=top_units,
            local_tokens=min(selection.local_tokens, top_units * selection.unit_tokens),
            sinks=selection.sinks,
            whole=max(self._whole_from(stop) - base, 0) // size,
            unit_bits=selection.unit_bits,
            mean=mean,
            sketch=sketch[head, base // size : -(-stop // size)],
            label=f"{job.label}, {selection.mode.name.lower()}",
        )


# Helpers.


def _scale_bits(scale: float) -> int:
    try:
        bits = fp32_bits(scale * math.log2(math.e))
    except (OverflowError, TypeError):
        bits = 0
    if not is_positive_normal(bits):
        raise RequestError(
            f"scale must be positive, and scale * log2(e) a normal fp32 (1.2e-38 to 3.4e38), not "
            f"{scale!r}"
        )
    return bits


def _bounds(name: str, values: ArrayLike | None, length: int, default: Integers) -> Integers:
    """The argument `start` or `end` of `Sequence.attend`; `default` if it was not given."""
    if values is None:
        return default
    bounds = np.asarray(values)
    if bounds.dtype.kind not in "iu" or bounds.shape != default.shape:
        raise RequestError(f"{name} must be integers (n_queries,) = {default.shape}, not {bounds.dtype} {bounds.shape}")
    for query in np.flatnonzero((bounds < 0) | (bounds > length))[:1]:
        raise RequestError(f"{name} must be 0 to {length}, the layer's tokens, not {bounds[query]} (query {query})")
    return bounds.astype(np.int64)


def make_masks(
    length: int, n_queries: int, causal: bool = False, window: int | None = None, tree: ArrayLike | None = None,
           start: ArrayLike | None = None, end: ArrayLike | None = None) -> Masks:
    """What each query attends: start to end, but from tree_token on only where a bit is set."""
    if causal and n_queries > length:
        raise RequestError(
            f"causal: the {n_queries} queries are the last tokens of the sequence, but the layer "
            f"has only {length}"
        )
    first = _bounds("start", start, length, np.zeros(n_queries, np.int64))
    last = _bounds("end", end, length, np.full(n_queries, length))
    if causal:
        last = np.minimum(last, length - n_queries + 1 + np.arange(n_queries))
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
    draft = draft & (tree_token + place >= first[:, None]) & (tree_token + place < last[:, None])
    prefix_end = np.minimum(last, tree_token)
    if window is not None:
        check_positive("window", window)
        window = min(int(window), length)   # int64 below holds it
        draft &= draft[:, ::-1].cumsum(axis=1)[:, ::-1] <= window
        first = np.maximum(prefix_end - (window - draft.sum(axis=1)), first)
    bits = (draft.astype(np.int64) << place).sum(axis=1)
    stop = np.maximum(prefix_end, np.where(draft, tree_token + place + 1, 0).max(axis=1, initial=0))
    # A query that attends nothing has an empty range, not one that ends before it begins.
    return Masks(np.minimum(first, stop), stop, bits, tree_token)
