"""`Sequence`: K and V of one sequence in the device's flash and DRAM, and attention over them."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.driver.accounts import JobAccount, sum_of
from kvattic.driver.checks import check_integer
from kvattic.driver.futures import Future
from kvattic.driver.jobs import Job, ReadJob
from kvattic.driver.planning import AttendKeywords, AttendOptions, Planner, make_masks, select
from kvattic.driver.results import AttendPlan, AttendResult
from kvattic.driver.shape import SequenceShape
from kvattic.driver.value_sums import Doubles
from kvattic.driver.writer import TokenWriter
from kvattic.errors import CapacityError, RequestError
from kvattic.placement.domains import COMMON_DOMAIN
from kvattic.placement.zones import Allocation
from kvattic.spec import layout
from kvattic.spec.blocks import Masks
from kvattic.spec.commands import READ_BYTES, Kind, Status
from kvattic.spec.elements import Bits, as_array, from_bits
from kvattic.spec.formats import Element
from kvattic.support.closing import Closing
from kvattic.support.renamed import old_selection_keywords
from kvattic.timing.cost import Cost
from kvattic.transport.base import Progress

if TYPE_CHECKING:
    from kvattic.driver.device import Device

__all__ = ["Loss", "Sequence"]


class Loss(NamedTuple):
    """Tokens that were in device DRAM when it lost its power.

    Members:
        sequence: that lost them.
        layer: where.
        tokens: how many of the newest ones are gone.
    """

    sequence: "Sequence"
    layer: int
    tokens: int


class Sequence(Closing):
    """K and V of one sequence; made by `Device.create_sequence`.

    Usable as a context manager, which frees it at the end.

    Tokens that do not fill a stripe yet are in device DRAM, in pages of the same form as those of flash, and are
    attended there.  A full stripe is programmed from these pages, which are then given back, together with what its
    sequence has for the sparse modes (*sketches*): K in the feature layout, centroids, codes.  What is in flash
    (`flushed`) survives a loss of the drive's power, what is in DRAM does not.

    Attributes:
        device: where it lives.
        number: of the sequence, counted over the device's life; messages name it.
        kv_heads: KV heads of a layer.
        layers: layers, each with tokens of its own.
        capacity_tokens: tokens that each layer can hold.
        sparse: K is also written in the feature layout.
        centroids: tokens of the units whose mean keys are also written; None: there are none.
        codes: codes of K are also written.
        stripe_tokens: tokens of a stripe.
        sinks: first tokens that sparse modes always attend.
        domain: owner of its flash and DRAM, as the device knows it; if this one is isolated, its forks alone have it,
            too.
        held_tokens: how many of the newest tokens of each layer stay in device DRAM, where `truncate` can remove them;
            set it before they are appended.
    """

    def __init__(self, device: "Device", shape: SequenceShape, allocations: Series[Allocation]) -> None:
        self.device = device
        self.number = shape.number
        self.kv_heads = shape.kv_heads
        self.layers = shape.layers
        self.capacity_tokens = shape.capacity_tokens
        self.sparse = shape.sparse
        self.centroids = shape.centroids
        self.codes = shape.codes
        self.sinks = shape.sinks
        self.domain = shape.domain
        self.stripe_tokens = shape.stripe_tokens
        self._shape = shape
        self._writer = TokenWriter(device.media, shape, allocations)
        self._planner = Planner(shape, self._writer.layers)
        self._freed = False

    @property
    def held_tokens(self) -> int:
        """The newest tokens of each layer that stay in device DRAM."""
        return self._writer.held_tokens

    @held_tokens.setter
    def held_tokens(self, tokens: int) -> None:
        self._writer.held_tokens = tokens

    # Life.

    def _end_block(self) -> None:
        self.free()

    def free(self) -> None:
        """Give flash and DRAM back.  Freeing twice is allowed, any other use afterwards is an error.

        Flash that no other sequence uses is erased (see `Device`).

        Raises:
            DeviceStatusError: a die does not answer; the sequence is free all the same.
        """
        with self.device.lock:
            if self._freed:
                return
            self._freed = True
            try:
                self._writer.finish_writes()
            finally:
                try:
                    self._writer.release_dram()
                finally:
                    self.device.release(self, self._writer.allocations)

    def fork(self, length: int | Series[int] | None = None, *, capacity_tokens: int | None = None) -> "Sequence":
        """Another sequence that begins with this one's tokens, and goes on by itself.

        Stripes in flash are shared: nothing is written for them, and they are erased when the last sequence that reads
        them is freed, in any order.  What is in device DRAM is copied.  The fork has this one's domain, `held_tokens`,
        sketches and means.  Waits for everything that is under way.

        Args:
            length: how many of the first tokens it gets; for each layer, if they differ.  All if None.  If they end
                inside of a stripe in flash, which cannot be written on, its tokens are read (`read`) and written anew.
            capacity_tokens: tokens that each of its layers can hold; as many as this one's if None.  Flash is reserved
                for those that it does not share.

        Raises:
            RequestError: a number out of range, or a freed sequence.
            CapacityError: flash or DRAM have no room.
            DeviceStatusError: a stripe that is to be written anew cannot be read.
        """
        with self.device.lock:
            wanted = self._fork_lengths(length)
            lengths = [self._shared_length(layer, tokens) for layer, tokens in enumerate(wanted)]
            capacity = self.capacity_tokens if capacity_tokens is None else capacity_tokens
            check_integer("capacity_tokens", capacity, max(*wanted, 1), (1 << layout.TOKEN_BITS) - 1)
            # A stripe in DRAM is written by each; so is one behind it that came to flash before it.
            shared = [next((i for i, stripe in enumerate(stripes) if i != stripe), len(stripes)) for stripes in (
                state.in_flash(length // self.stripe_tokens)
                for state, length in zip(self._writer.layers, lengths, strict=True))]
            child = self.device.add_fork(self._shape, int(capacity), shared, self._writer.zones(lengths))
            try:
                child.inherit(self._writer, lengths)
                for layer, (tokens, shares) in enumerate(zip(wanted, lengths, strict=True)):
                    if shares < tokens:
                        child.append(*self.read_bits(layer, shares, tokens), layer=layer)
            except BaseException:
                child.free()
                raise
            return child

    @property
    def isolated(self) -> bool:
        """Whether it has a domain that no other sequence but its forks has."""
        return self.domain != COMMON_DOMAIN

    def places(self, layer: int = 0) -> set[int]:
        """A number for each stripe of a layer in flash; sequences that share a stripe have its number in common.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        with self.device.lock:
            state, stripes = self._writer.layers[layer], self.length(layer) // self.stripe_tokens
            return set(state.table[0, state.in_flash(stripes)].tolist())

    def inherit(self, parent: TokenWriter, lengths: Series[int]) -> None:
        """For `fork`: take over the first tokens of another sequence."""
        self.device.dispatcher.start(self._writer.inherit(parent, lengths)).result()

    def _fork_lengths(self, length: int | Series[int] | None) -> list[int]:
        """Tokens of each layer of a fork, once nothing is under way."""
        present = [self.length(layer) for layer in range(self.layers)]
        self._stand_still(*range(self.layers))
        wanted: list[Any] = present if length is None else (
            list(length) if isinstance(length, Series) else [length] * self.layers)
        if len(wanted) != self.layers:
            raise RequestError(f"length must be one number, or one for each of the {self.layers} layers, not "
                               f"{len(wanted)}")
        for layer, (tokens, most) in enumerate(zip(wanted, present, strict=True)):
            check_integer(f"length (layer {layer})", tokens, 0, most)
        return [int(tokens) for tokens in wanted]

    def _shared_length(self, layer: int, tokens: int) -> int:
        """How many of the first tokens a fork can take over as they are."""
        stripe, inside = divmod(tokens, self.stripe_tokens)
        return tokens if stripe in self._writer.layers[layer].staged else tokens - inside

    def save(self, path: Path | str, *, note: Any = None) -> None:
        """Write a manifest of this sequence alone; see `Device.save`."""
        self.device.save(path, [self], note=note)

    def settle(self) -> None:
        """For `Device.save`: wait for everything that is under way.

        Raises:
            KvatticError: an error of an append that was not retrieved.
        """
        self._stand_still(*range(self.layers))
        self._check_use()

    def describe(self) -> dict[str, Any]:
        """For `Device.save`: what it was created as, and its zones, by allocation; can be JSON."""
        shape = self._shape
        names = ["kv_heads", "layers", "capacity_tokens", "first_head", "sparse", "centroids", "sinks", "window",
                 "domain", "turn"]
        names += [name for name in ("key_scale", "value_scale") if getattr(shape, name) is not None]
        names += ["codes"] * shape.codes
        lengths = [state.length for state in self._writer.layers]
        return {**{name: getattr(shape, name) for name in names}, "held_tokens": self.held_tokens,
                "zones": [sorted(zones) for zones in self._writer.zones(lengths)]}

    def states(self) -> list[dict[str, NDArray[Any]]]:
        """For `Device.save`: where the tokens of each layer lie."""
        return self._writer.state()

    def resume(self, states: Series[Mapping[str, NDArray[Any]]]) -> None:
        """For `Device.attach`: go on from `states`."""
        self.device.dispatcher.start(self._writer.resume(states)).result()

    def abandon(self) -> None:
        """For `Device.attach`: forget everything, and erase nothing."""
        self._freed = True
        self._writer.release_dram()

    def probe_places(self) -> list[tuple[int, int, int, int]]:
        """For `Device.save`: places of the first and the last stripe in each zone that has V, mean keys or codes.

        Returns:
            (layer, KV head, stripe, `Kind`) of each.
        """
        bits, found = self.device.config.zone_page_bits, list[tuple[int, int, int, int]]()
        for layer, state in enumerate(self._writer.layers):
            stripes = np.array(state.in_flash(state.length // self.stripe_tokens), np.int64)
            places = {Kind.VALUE: layout.unpack_entries(state.table[:, stripes]).value_page}
            for kind in self._shape.packed_kinds:   # they lie in zones of their own
                places[kind] = layout.unpack_sketches(state.sketches[kind][:, stripes]).page
            for kind, pages in places.items():
                zones = pages.astype(np.int64) >> bits
                for zone in np.unique(zones).tolist():
                    heads, columns = np.nonzero(zones == zone)
                    order = np.argsort(pages[heads, columns], kind="stable")
                    found += [(layer, int(heads[at]), int(stripes[columns[at]]), int(kind))
                              for at in dict.fromkeys((int(order[0]), int(order[-1])))]
        return found

    def probe(self, layer: int, head: int, stripe: int, kind: int) -> NDArray[np.uint32] | None:
        """For `Device.save` and `attach`: what is at one of `probe_places`.

        Returns:
            Bit patterns of the stripe's first V, or of as much of its mean keys or codes, (head_dim,); None if it
            cannot be read.
        """
        config, state = self.device.config, self._writer.layers[layer]
        entry = layout.unpack_entries(state.table[head, stripe : stripe + 1])
        page, token = entry.value_page, 0
        if kind != Kind.VALUE:
            sketch = layout.unpack_sketches(state.sketches[Kind(kind)][head, stripe : stripe + 1])
            page, token = sketch.page, int(sketch.codeword[0]) * config.tokens_per_codeword
        # A READ gives whatever is stored like tokens.
        job = ReadJob(table=layout.pack_entries(entry.channel, page, page, 0), stripe_pages=1, first_page=0,
                      base_token=0, tokens=token + 1, domain=self.domain)
        (result,) = self.device.read([job], check=False)
        if result.completion.status is not Status.OK:
            return None
        return (from_bits(result.value[token], config.element) + np.float32(0)).view(np.uint32)    # -0 as 0

    def lose_tails(self) -> list[Loss]:
        """For `Device.recover`: forget what was in DRAM."""
        return [Loss(self, layer, tokens) for layer, tokens in self._writer.lose_tails()]

    def check_open(self) -> None:
        """Refuse to go on if the sequence was freed or its device closed.

        Raises:
            RequestError: it was.
        """
        self.device.check_open()
        if self._freed:
            raise RequestError("the sequence was freed; create another one")

    def _check_use(self) -> None:
        self.check_open()
        self._writer.raise_unretrieved()

    def scales(self, kind: Kind, layer: int = 0) -> NDArray[np.float32] | None:
        """What a stored 1.0 stands for: float32, (kv_heads,); None: 1.

        Args:
            kind: `Kind.KEY` or `Kind.VALUE`.
            layer: which layer.
        """
        found = self._shape.key_scale if kind is Kind.KEY else self._shape.value_scale
        return None if found is None else np.array(found[layer], np.float32)

    def length(self, layer: int = 0) -> int:
        """Tokens that a layer holds, in flash or DRAM; waits for those of appends that found no room in DRAM yet.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        with self.device.lock:
            self._check_use()
            self._check_layer(layer)
            self._writer.settle(layer)
            return self._writer.layers[layer].length

    def flushed(self, layer: int = 0) -> int:
        """The first tokens of a layer that are all in flash, programmed and acknowledged.

        Raises:
            RequestError: there is no such layer, or the sequence was freed.
        """
        with self.device.lock:
            self.length(layer)
            return self._writer.flushed(layer)

    def mean_value(self, layer: int = 0) -> NDArray[np.float32]:
        """Mean of the stored V over all tokens of a layer, which the blended modes use for a query of all of them.

        It is a float64 sum, token by token, and rounded once.

        Returns:
            float32, (kv_heads, head_dim).

        Raises:
            RequestError: the layer has no tokens, or the sequence has neither the feature layout nor codes.
        """
        with self.device.lock:
            length = self.length(layer)
            if not self._shape.blended:
                raise RequestError("the mean of V is kept with K in the feature layout or codes only (sparse=True, "
                                   "codes=True)")
            if length == 0:
                raise RequestError(f"layer {layer} has no tokens")
            mean: NDArray[np.float32] = self._planner.means(layer, make_masks(length, 1), self._read_values)[0]
            scale = self.scales(Kind.VALUE, layer)
            return mean if scale is None else mean * scale[:, None]

    def counters(self) -> dict[str, int]:
        """Counts of what was done for this sequence, by name; also after it was freed.

        The host counts them; `Device.counters` has what the drive counts, for all sequences together.

        JOBS: jobs whose results were put together, each of the query rows of a KV head over a range of tokens.
        TOKENS: tokens that were written, of all layers; again if they were truncated and written anew.
        PAGE_PROGRAMS: flash pages that the drive programmed with its K, V and sketches; also those that failed, which
            are programmed again elsewhere.  What is in device DRAM only was not programmed yet.
        """
        with self.device.lock:
            return dict(self._writer.counters)

    def statistics(self) -> Cost:
        """What the drive has done for this sequence so far: its attends and the programs of its pages.

        To know what something took, subtract two of them.  Cycles are sums of the time that each attend and each write
        took from its submission to its last completion, so that those which were under way together count each for
        itself; see `AttendResult.cost`.  Zones are erased for all sequences together: see `Device.statistics`.
        """
        with self.device.lock:
            return sum_of(self.statistics_by_part())

    def statistics_by_part(self) -> dict[str, Cost]:
        """The same by `accounts.PARTS`: the first append of each layer (prefill), later ones (append), attend."""
        with self.device.lock:
            return {part: tally.total() for part, tally in self._writer.tallies.items()}

    def count_jobs(self, jobs: int, accounts: Series[JobAccount] = ()) -> None:
        """For `AttendPlan.finish`: add to the counter JOBS and to the statistics."""
        self._writer.counters["JOBS"] += jobs
        if accounts:
            self._writer.tallies["attend"].add_attend(accounts)

    def _check_layer(self, layer: int) -> None:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.layers:
            raise RequestError(f"layer must be 0 to {self.layers - 1}, not {layer!r}")

    # Writing.

    def prefill(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> None:
        """Write the first tokens of a layer.

        Args:
            key: (kv_heads, tokens, head_dim), float16, float32 or float64, divided by the sequence's scale and
                rounded to what the drive stores (`Config.kv`); float8 of that format, or uint16 bit patterns of
                `Config.element`, are taken as they are.
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

        When this returns, the tokens that found room are in device DRAM and can be attended; full stripes are on their
        way to flash.  Later uses of the layer (`append`, `attend`, `length`) come after these tokens, and wait until
        all of them are in DRAM, but not for flash.

        Returns:
            Done when the tokens are written, and the stripes that they fill are in flash.  Its errors are those of
            `append`, except those below; an error that is not retrieved is raised by the next call of this sequence.

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
            self._stand_still(layer)
            fixed = self._writer.removable_from(layer)
            if isinstance(length, bool) or not isinstance(length, int | np.integer) or not (
                    length == present or fixed <= length < present):
                raise RequestError(
                    f"length must be an int from {fixed} to {present}, not {length!r}: layer {layer} has {present} "
                    f"tokens, the first {fixed} of which are in flash, where nothing can be removed; hold more of them "
                    "in DRAM (held_tokens)")
            if length < present:
                self._writer.truncate(layer, int(length))

    def _begin_prefill(self, key: ArrayLike, value: ArrayLike, layer: int, *, ahead: bool) -> Future[None]:
        if length := self.length(layer):
            raise RequestError(
                f"layer {layer} has {length} tokens already: prefill is for the first, use append"
            )
        return self._begin_append(key, value, layer, ahead=ahead)

    def _begin_append(self, key: ArrayLike, value: ArrayLike, layer: int, *, ahead: bool) -> Future[None]:
        self._check_use()
        self._check_layer(layer)
        state = self._writer.layers[layer]
        length = state.length + sum(append.left for append in state.appends)
        keys, values = self._tokens("key", Kind.KEY, layer, key), self._tokens("value", Kind.VALUE, layer, value)
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
        self.device.dispatcher.check()
        return self._writer.begin(layer, np.stack([keys, values], axis=1), ahead=ahead)

    def _tokens(self, name: str, kind: Kind, layer: int, values: ArrayLike) -> Bits:
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
        scale = self.scales(kind, layer)
        return layout.kv_bits(values, self.device.config, name, None if scale is None else scale[:, None, None])

    def read(self, layer: int = 0, first: int = 0, last: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V of tokens, to the last bit as they are stored.

        The drive's command READ reads them: past the same checks of owners and the same ECC as attention, at the speed
        of flash or of the host's link, and from the page of the first token on.  NaN and infinity, which only bit
        patterns can bring in, come back as they are.  Waits for appends that are under way.

        Args:
            layer: which layer.
            first: the first of the tokens.
            last: one past the last of them; None: all that there are.

        Returns:
            (key, value), (kv_heads, last - first, head_dim), as `append` takes them: float16, or float32 where the
            drive's elements are bf16, which NumPy does not have, or where the sequence has a scale, by which the
            stored numbers are multiplied.

        Raises:
            RequestError: the layer has no such tokens, or the sequence was freed.
            DeviceStatusError: a page of them cannot be read.
        """
        element = self.device.config.element

        def numbers(bits: Bits, kind: Kind) -> NDArray[Any]:
            scale = self.scales(kind, layer)
            if scale is not None:
                return from_bits(bits, element) * scale[:, None, None]
            return bits.view(np.float16) if element is Element.FP16 else from_bits(bits, element)

        key, value = self.read_bits(layer, first, last)
        return numbers(key, Kind.KEY), numbers(value, Kind.VALUE)

    def read_bits(self, layer: int = 0, first: int = 0, last: int | None = None) -> tuple[Bits, Bits]:
        """The same as bit patterns of `Config.element`, uint16, without scales.

        Arguments and errors are those of `read`.
        """
        with self.device.lock:
            length = self.length(layer)
            if length == 0:
                raise RequestError(f"layer {layer} has no tokens to read")
            check_integer("last", last := length if last is None else last, 1, length)
            check_integer("first", first, 0, last - 1)
            self._stand_still(layer)
            return self._read_bits(layer, int(first), int(last))

    # Attention.

    @old_selection_keywords
    def attend(self, query: ArrayLike, *, layer: int = 0, timeout_s: float | None = None,
               progress: Progress | None = None, **options: Unpack[AttendKeywords]) -> AttendResult:
        """Attention of queries over a layer's tokens: softmax(scale * q K^T) V, in dense mode.

        The device computes it from the stored elements with fixed-point sums, rounded once to float32; a scale of V
        multiplies that on the host.  The
        query heads of a KV head and all queries share each pass over K and V, `Config.rows` at a time.  The masks are
        combined: a query attends what all of them allow.

        The sparse modes choose by a first pass over less than K which *units* of tokens are attended exactly:

        - ``sparf`` (SparF, SparQ): the units are single tokens.  `features` (the paper's r) features of q and K, those
          of the largest |q|, give approximate scores; the `top_units` (k) tokens of the largest approximate softmax are
          attended; the output is alpha * attention + (1 - alpha) * mean of V, alpha being their share in the
          approximate softmax.  The sequence must have been created with sparse=True.
        - ``fetched``: the same with a codeword for a unit, or several (`unit_tokens`), because that is what is read:
          all tokens of these codewords are attended and counted in alpha.
        - ``centroid``: the units are those whose mean keys were written (create_sequence(centroids=...)); those of
          the largest approximate softmax over mean keys are attended, without a blend.
        - ``codes``: as sparf, but all features give the scores, by codes of 2 bits for each (create_sequence(
          codes=True)); sinks are scored exactly.

        A query of these modes sees its own past alone: several queries with causal=True give, to the last bit, what
        each gives when its token is the newest (drafts in a chain likewise).  So each query selects for itself, and the
        mean of V is over the tokens that it may attend.  The stripe that is not full at its last token, and the
        `held_tokens` before it, are its *tail*: always attended, and not counted in `top_units`, whether they lie in
        device DRAM or not.  The query heads of a KV head share one selection (as in SparQ's form for GQA: |q| and
        the approximate softmax are summed over them), so they must fit a job of `Config.rows` rows.

        Args:
            query: (q_heads, n_queries, head_dim), as key in `prefill`; q_heads a multiple of kv_heads, query head h
                reads KV head h // (q_heads // kv_heads).
            layer: which layer.
            timeout_s: how long the device may send no completion; its own timeout if None.
            progress: called now and then with (jobs done, jobs in all).
            options: scale, masks (causal, window, tree, start, end) and mode; see `AttendOptions`.

        Raises:
            RequestError: a wrong shape, dtype or number, an empty layer, a freed sequence, one that was created without
                what the mode reads, or in a sparse mode more tokens than the score buffers hold or more query heads for
                a KV head than a job has rows.
            RangeError: a score or a value is too large to be computed exactly.
            DeviceStatusError: the device reports an error, such as a NaN in K (which only bit patterns can bring in).
            DeviceTimeoutError, CapacityError: see `Device.run`.
        """
        with self.device.lock:
            plan = self.plan_with(query, AttendOptions(**options), layer=layer)
            waiting = self.device.submit(plan.jobs, check=False)
        return plan.finish(self.device.collect(plan.jobs, waiting, timeout_s=timeout_s, progress=progress))

    @old_selection_keywords
    def attend_async(self, query: ArrayLike, *, layer: int = 0,
                     **options: Unpack[AttendKeywords]) -> Future[AttendResult]:
        """Begin an `attend` call over the tokens that were appended before; arguments and errors are its.

        Errors of the device are the future's, and so is a `RangeError`.  A sparse mode waits until the stripes that it
        chooses from are in flash.
        """
        with self.device.lock:
            return self.device.attend_async(self.plan_with(query, AttendOptions(**options), layer=layer))

    @old_selection_keywords
    def plan(self, query: ArrayLike, *, layer: int = 0, **options: Unpack[AttendKeywords]) -> AttendPlan:
        """The jobs of an `attend` call, for `Device.attend_many`; arguments and errors are its."""
        return self.plan_with(query, AttendOptions(**options), layer=layer)

    def plan_with(self, query: ArrayLike, options: AttendOptions, *, layer: int = 0) -> AttendPlan:
        """The same as `plan`, with the options as one object."""
        with self.device.lock:
            length, planner, held = self.length(layer), self._planner, self.held_tokens
            bits = planner.check_query(query)
            if length == 0:
                raise RequestError(f"layer {layer} has no tokens: prefill it before attending")
            q_heads, n_queries, dim = bits.shape
            group = q_heads // self.kv_heads
            key_scale = self.scales(Kind.KEY, layer)
            scale_bits = ([options.scale_bits(dim)] * self.kv_heads if key_scale is None
                          else [options.scale_bits(dim, scale) for scale in key_scale.tolist()])
            masks = planner.masks(options, length, n_queries)
            selection, means = select(options, self._shape), None
            if selection is not None:
                planner.check_selection(selection, masks, group, length, held)
                self._settle_flash(layer, int(masks.end.max()))
                if selection.mode.blended:
                    means = planner.means(layer, masks, self._read_values)
            jobs, parts = planner.jobs(layer, bits, masks, scale_bits, selection, held, means)
            return AttendPlan(sequence=self, shape=(q_heads, n_queries, dim), jobs=jobs, parts=parts,
                              value_scale=self.scales(Kind.VALUE, layer))

    def dense_jobs(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks) -> list[Job]:
        """For arrays: dense jobs of rows of one KV head; see `planning.Planner`."""
        return list(self._planner.dense_jobs(layer, head, query, scale_bits, masks))

    def _stand_still(self, *layers: int) -> None:
        """Wait until nothing is under way: no append to these layers, and no task; their tables do not change then."""
        states, dispatcher = [self._writer.layers[layer] for layer in layers], self.device.dispatcher
        dispatcher.drive(lambda: not any(state.appends for state in states) and not dispatcher.working)

    def _settle_flash(self, layer: int, stop: int) -> None:
        """Let stripes on their way to flash arrive, as far as they are not the tail of queries before `stop`."""
        appends, limit = self._writer.layers[layer].appends, self._shape.whole_from(stop, self.held_tokens)
        if appends and self._writer.unflushed(layer, limit):
            self.device.dispatcher.drive(lambda: not appends or not self._writer.unflushed(layer, limit))

    def _read_values(self, layer: int, first: int, last: int) -> Doubles:
        """V of tokens as the device has it, (kv_heads, tokens, head_dim)."""
        return from_bits(self._read_bits(layer, first, last)[1], self.device.config.element).astype(np.float64)

    def _read_bits(self, layer: int, first: int, last: int) -> tuple[Bits, Bits]:
        """K and V of tokens, (kv_heads, tokens, head_dim)."""
        config = self.device.config
        # A part of the host memory, so that one can be filled while another one is taken.
        most = min(READ_BYTES, self.device.dispatcher.arena_bytes // 4)
        jobs = self._planner.read_jobs(layer, first, last, most)
        found = np.empty((2, self.kv_heads, last - first, config.head_dim), np.uint16)
        heads = len(jobs) // self.kv_heads
        for number, (job, result) in enumerate(zip(jobs, self.device.read(jobs), strict=True)):
            begin = max(first - job.base_token, 0)
            place = slice(job.base_token + begin - first, job.base_token + job.tokens - first)
            for bits, each in zip(found, (result.key, result.value), strict=True):
                bits[number // heads, place] = each[begin:]
        return found[0], found[1]
