"""`TokenWriter`: K and V of one sequence, on their way from the host through device DRAM to flash.

Writing is work of many steps (`dispatcher.Steps`): tokens are put into DRAM, full stripes are programmed from there,
and their DRAM comes back when no command reads it any more.  The appends of a layer are flushed in order, one after the
other.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.accounts import PARTS, Tally
from kvattic.driver.dispatcher import Steps
from kvattic.driver.futures import Future
from kvattic.driver.media import Flush, Media, PageProgram
from kvattic.driver.shape import SequenceShape
from kvattic.driver.value_sums import ValueSums
from kvattic.errors import CapacityError, KvatticError, RequestError
from kvattic.placement.domains import COMMON_DOMAIN
from kvattic.placement.zones import Allocation
from kvattic.spec import codes, layout
from kvattic.spec.commands import Kind
from kvattic.spec.elements import Bits

__all__ = ["Append", "Layer", "TokenWriter"]

CHUNK_BYTES = 1 << 28
"""Device DRAM that a prefill uses at once, at most: enough to keep all dies busy for long."""
NO_ENTRY = (1 << 64) - 1
"""A table entry of a stripe that is not there: no command can use it."""


@dataclass(slots=True, eq=False)
class Append:
    """Tokens that are being written.

    Attributes:
        layer: where.
        tokens: (kv_heads, K or V, tokens, head_dim).
        ahead: put as much as possible into DRAM before anything is moved to flash.
        at: how many of them are in DRAM or flash.
        cancelled: the sequence was freed.
        future: done when all are written, and the stripes that they fill are in flash.
    """

    layer: int
    tokens: Bits
    ahead: bool
    at: int = 0
    cancelled: bool = False
    future: Future[None] | None = None

    @property
    def left(self) -> int:
        """Tokens that are not in DRAM yet."""
        return int(self.tokens.shape[2]) - self.at


@dataclass(slots=True, eq=False, kw_only=True)
class Layer:
    """K and V of one layer.

    Attributes:
        table: uint64, (kv_heads, stripes), where each stripe lies; jobs look into it.
        sketches: the same for what the sequence has of the feature layout (Kind.FEATURE), of centroids (Kind.SKETCH)
            and of codes (Kind.CODES); zero where it is not written.
        sums: of V, which the means that sparse modes blend in are made of; None: the sequence has no such modes.
        length: tokens.
        first_tokens: those of the first append, which is a prefill.
        staged: stripe to its first page of device DRAM, for those that are not in flash yet.  There they lie head by
            head, K then V.
        placed: (stripe, head, kind) to the first page and codeword, for what is in flash of stripes that are staged.
        appends: those that are not done, in order.
    """

    table: NDArray[np.uint64]
    sketches: dict[Kind, NDArray[np.uint64]]
    sums: ValueSums | None
    length: int = 0
    first_tokens: int = 0
    staged: dict[int, int] = field(default_factory=dict)
    placed: dict[tuple[int, int, Kind], tuple[int, int]] = field(default_factory=dict)
    appends: list["Append"] = field(default_factory=list)

    def in_flash(self, stripes: int) -> list[int]:
        """Those of the first stripes that are in flash with all that belongs to them."""
        return [stripe for stripe in range(stripes) if stripe not in self.staged]


class _Run(NamedTuple):
    """Consecutive pages of device DRAM that belong into consecutive pages of flash.

    Members:
        kind: what they hold.
        channel: flash channel.
        source: first page of DRAM.
        pages: how many.
        die: where they should lie, if that matters.
        holds: (stripe, head) of all that they hold: one, or of packed sketches several.
    """

    kind: Kind
    channel: int
    source: int
    pages: int
    die: int | None
    holds: list[tuple[int, int]]


class TokenWriter:
    """Where K and V of a sequence's layers lie, and how they get there.

    Args:
        media: the drive's flash and DRAM.
        shape: of the sequence.
        allocations: flash of K, V and the feature layout; of each packed sketch that it has.

    Attributes:
        shape, allocations: the same.
        layers: one for each layer.
        held_tokens: newest tokens of each layer that stay in DRAM.
        counters: see `Sequence.counters`.
        tallies: sums of what was done, by `accounts.PARTS`.
    """

    def __init__(self, media: Media, shape: SequenceShape, allocations: Series[Allocation]) -> None:
        self.shape = shape
        self.allocations = allocations
        self.counters = {"JOBS": 0, "TOKENS": 0, "PAGE_PROGRAMS": 0}
        self.tallies = {part: Tally(shape.config, modelled=media.dispatcher.models_time) for part in PARTS}
        self.held_tokens = 0
        self._media = media
        self._background: list[Future[None]] = []     # appends whose error may have to be raised
        places = (shape.kv_heads, -(-shape.capacity_tokens // shape.stripe_tokens))
        # Never moved, because jobs refer to them; memory is taken where it is written.
        self.layers = [Layer(table=np.zeros(places, np.uint64),
                             sketches={kind: np.zeros(places, np.uint64) for kind in shape.sketch_kinds},
                             sums=ValueSums(shape.kv_heads, shape.config.head_dim, shape.stripe_tokens,
                                            shape.config.element, shape.window or 0) if shape.blended else None)
                       for _ in range(shape.layers)]

    # Into DRAM.

    def begin(self, layer: int, tokens: Bits, *, ahead: bool) -> Future[None]:
        """Begin to write the next tokens of a layer."""
        state = self.layers[layer]
        append = Append(layer, tokens, ahead)
        before = state.appends[-1] if state.appends else None
        if self._is_plain(state, layer, tokens.shape[2]):
            done: Future[None] = Future(self._media.dispatcher)
            for _ in self._write_tail(layer, tokens):
                raise AssertionError("tokens behind the first ones of a stripe wait for nothing")
            self._count(layer, tokens[:, Kind.VALUE])
            done.set_result(None)
            return done
        if before is None and state.length == 0:
            state.first_tokens = tokens.shape[2]
        state.appends.append(append)
        append.future = task = self._media.dispatcher.start(self._write(append, before))
        self._background = [future for future in self._background if not future.finished or future.error is not None]
        self._background.append(task)
        return task

    def _is_plain(self, state: Layer, layer: int, count: int) -> bool:
        """Whether an append neither begins nor ends a stripe and nothing is under way: it is written at once."""
        inside = state.length % self.shape.stripe_tokens
        last = state.length + count - self.held_tokens      # of what is moved to flash
        return (not state.appends and state.sums is None and inside > 0 and inside + count < self.shape.stripe_tokens
                and not self.unflushed(layer, min(state.length, last)))

    def _write(self, append: Append, before: Append | None) -> Steps[None]:
        """Put tokens into DRAM, and move the stripes that they fill to flash."""
        try:
            yield from self._write_all(append, before)
        finally:
            append.at = append.tokens.shape[2]   # the rest of them will not come
            self.layers[append.layer].appends.remove(append)

    def _write_all(self, append: Append, before: Append | None) -> Steps[None]:
        layer, total = append.layer, append.tokens.shape[2]
        state = self.layers[layer]
        if before is not None and (before.left or not append.ahead):
            yield from self._after(append, before)
            before = None
        if state.sums is not None:
            state.sums.expect(total)
        begin = state.length
        last = begin + total - self.held_tokens     # of what is moved to flash
        pieces: list[tuple[Series[int], Bits | None]] = []   # in DRAM, to be moved
        if before is None:
            unflushed = self.unflushed(layer, min(begin, last))
            if not self.held_tokens:
                yield from self._flush(layer, unflushed)
            elif unflushed:
                pieces.append((unflushed, None))    # held until now: nothing failed, so the new tokens come first
        try:
            yield from self._check_dram(total, begin % self.shape.stripe_tokens)
        except CapacityError:
            if before is None:
                raise
            yield from self._after(append, before)
            before = None
            yield from self._check_dram(total, begin % self.shape.stripe_tokens)
        while append.left:
            if pieces and not (append.ahead and self._fits(layer)):
                yield from self._move_pieces(append, before, begin, pieces)
                before, pieces = None, []
            stripes, piece = yield from self._put_piece(append)
            ready = range(stripes.start, max(stripes.start, min(stripes.stop, last // self.shape.stripe_tokens)))
            if ready:
                pieces.append((ready, piece))
        if pieces:
            yield from self._move_pieces(append, before, begin, pieces)

    def _put_piece(self, append: Append) -> Steps[tuple[range, Bits | None]]:
        """Put the next tokens into DRAM: what ends the last stripe, or whole stripes, or what begins one.

        Returns:
            The stripes that they fill, and the tokens, if they begin with these stripes.
        """
        layer, size = append.layer, self.shape.stripe_tokens
        length = self.layers[layer].length
        inside = length % size
        if inside or append.left < size:
            piece = append.tokens[:, :, append.at : append.at + size - inside]
            yield from self._write_tail(layer, piece)
            stripes = range(length // size, length // size + (inside + piece.shape[2]) // size)
        else:
            room = min(self._media.dram.largest_for(self.shape.domain), CHUNK_BYTES // self.shape.config.page_bytes)
            fitting = room // (self.shape.kv_heads * (2 * self.shape.pages + self._passing(1)))
            piece = append.tokens[:, :, append.at : append.at + max(min(append.left // size, fitting), 1) * size]
            stripes = yield from self._stage(layer, piece)
        self._count(layer, piece[:, Kind.VALUE])
        append.at += piece.shape[2]
        return stripes, piece if inside == 0 else None

    def _move_pieces(self, append: Append, before: Append | None, begin: int,
                     pieces: Series[tuple[Series[int], Bits | None]]) -> Steps[None]:
        """Flush what was staged once the append before is done, and what that one left behind if it failed."""
        if before is not None:
            yield from self._after(append, before)
            last = begin + append.tokens.shape[2] - self.held_tokens
            yield from self._flush(append.layer, self.unflushed(append.layer, min(begin, last)))
        for stripes, tokens in pieces:
            self._check_wanted(append)
            yield from self._flush(append.layer, stripes, tokens)
        self._check_wanted(append)

    def _after(self, append: Append, before: Append) -> Steps[None]:
        """Wait for the end of the append before."""
        if before.future is not None:
            yield [before.future]
        self._check_wanted(append)

    def _check_wanted(self, append: Append) -> None:
        if append.cancelled:
            raise RequestError("the sequence was freed before these tokens were written")

    def unflushed(self, layer: int, length: int) -> list[int]:
        """Full stripes among the first tokens that are still in DRAM, because a flush failed."""
        return sorted(s for s in self.layers[layer].staged if (s + 1) * self.shape.stripe_tokens <= length)

    def finish_writes(self) -> None:
        """Wait for the end of what is under way, and begin no more of it."""
        appends = [append for state in self.layers for append in state.appends]
        for append in appends:
            append.cancelled = True
        dispatcher = self._media.dispatcher
        dispatcher.drive(lambda: not any(state.appends for state in self.layers) and not dispatcher.working)

    def settle(self, layer: int) -> None:
        """Go on with appends until all their tokens are in DRAM or flash."""
        appends = self.layers[layer].appends
        if any(append.left for append in appends):
            self._media.dispatcher.drive(lambda: not any(append.left for append in appends))

    def raise_unretrieved(self) -> None:
        """Raise the error of an append that was not retrieved from its future."""
        for future in self._background:
            if future.finished and (error := future.take_unretrieved_error()) is not None:
                raise error

    # Room in DRAM.

    def _check_dram(self, total: int, inside: int) -> Steps[None]:
        """Check that DRAM has room for what an append of `total` tokens needs at least; may wait for some."""
        needed = [] if inside else [self.shape.stripe_dram_pages]
        if self.shape.sketch_kinds and inside + total >= self.shape.stripe_tokens:
            needed.append(self._passing(-(-self.shape.kv_heads // self.shape.config.channels)))
        if self.shape.domain != COMMON_DOMAIN:
            needed = needed and [max(needed)]    # to try would move regions from one owner to another, and back
            if needed and needed[0] <= self._media.dram.largest_for(self.shape.domain):
                return
        dram, taken = self._media.dram, list[int]()
        try:
            for pages in needed:
                taken.append((yield from self._media.allocate_dram(pages, self.shape.domain)))
        finally:
            for page in taken:
                dram.free(page)

    def _fits(self, layer: int) -> bool:
        """Whether another stripe can be put into DRAM now, so that what follows still has room."""
        if self.layers[layer].length % self.shape.stripe_tokens:
            return True
        passing = self._passing(-(-self.shape.kv_heads // self.shape.config.channels))
        return self._media.dram.largest_for(self.shape.domain) >= self.shape.stripe_dram_pages + passing

    def _passing(self, heads: int) -> int:
        """Pages of DRAM that the sketches of a stripe pass through, with packed ones of `heads` heads at once."""
        shape = self.shape
        packed = [layout.packed_pages(heads, shape.packed_codewords(kind), shape.config) for kind in shape.packed_kinds]
        return max([shape.pages * shape.sparse, *map(int, packed)])

    def _count(self, layer: int, values: Bits) -> None:
        """Tokens were written: count them, and sum their V."""
        state = self.layers[layer]
        if state.sums is not None:
            state.sums.add(values)
        state.length += values.shape[1]
        self.counters["TOKENS"] += values.shape[1]

    def _write_tail(self, layer: int, tokens: Bits) -> Steps[None]:
        """Put tokens into the layer's last stripe in DRAM: whole pages if they are its first, else only their bytes."""
        config, state = self.shape.config, self.layers[layer]
        stripe, inside = divmod(state.length, self.shape.stripe_tokens)
        if inside == 0:
            padded = np.zeros((self.shape.kv_heads, 2, self.shape.stripe_tokens, config.head_dim), np.uint16)
            padded[:, :, : tokens.shape[2]] = tokens
            yield from self._stage(layer, padded, tokens.shape[2])
            return
        end = state.length + tokens.shape[2]
        size = self.shape.pages * config.page_bytes
        base = state.staged[stripe] * config.page_bytes
        first = layout.token_offset(inside, config)
        last = layout.token_offset(inside + tokens.shape[2] - 1, config) + config.token_bytes
        if tokens.shape[2] == 1 or config.tokens_per_codeword * config.token_bytes == config.codeword_bytes:
            # No gap is between them: they lie in DRAM as they are.
            packed, each = layout.pack_codes(tokens, config).tobytes(), tokens.shape[2] * config.token_bytes
            self._tally(layer, end).add_written(len(packed))
            for number, at in enumerate(range(0, len(packed), each)):
                self._media.write_dram(base + number * size + first, packed[at : at + each])
            return
        # Packed from the beginning of a codeword on; what is before the first token is cut off.
        lead = inside % config.tokens_per_codeword
        padded = np.zeros((lead + tokens.shape[2], config.head_dim), np.uint16)
        begin = layout.token_offset(inside - lead, config)
        for head in range(self.shape.kv_heads):
            for kind in (Kind.KEY, Kind.VALUE):
                padded[lead:] = tokens[head, kind]
                image = layout.pack_pages(padded, config).ravel()[first - begin : last - begin]
                self._write_dram(layer, end, base + (2 * head + kind) * size + first, image.tobytes())

    def _write_dram(self, layer: int, end: int, address: int, data: bytes) -> None:
        """Put bytes into DRAM, of tokens before `end`."""
        self._tally(layer, end).add_written(len(data))
        self._media.write_dram(address, data)

    def _tally(self, layer: int, end: int) -> Tally:
        """Where what is done for tokens before `end` is summed: those of a prefill apart."""
        return self.tallies["prefill" if end <= self.layers[layer].first_tokens else "append"]

    def _end(self, stripe: int) -> int:
        """The first token behind a stripe."""
        return (stripe + 1) * self.shape.stripe_tokens

    def _stage(self, layer: int, tokens: Bits, count: int | None = None) -> Steps[range]:
        """Put whole stripes into DRAM, of which `count` tokens, or all, are there; their numbers."""
        config, state = self.shape.config, self.layers[layer]
        first = state.length // self.shape.stripe_tokens
        end = state.length + (tokens.shape[2] if count is None else count)
        stripes = range(first, first + tokens.shape[2] // self.shape.stripe_tokens)
        shape = (self.shape.kv_heads, 2, len(stripes), self.shape.stripe_tokens, config.head_dim)
        by_stripe = np.ascontiguousarray(np.moveaxis(tokens.reshape(shape), 2, 0))
        images = layout.pack_pages(by_stripe.reshape(-1, config.head_dim), config)
        images = images.reshape(len(stripes), -1, config.page_bytes)
        bases = [(yield from self._media.allocate_dram(images.shape[1], self.shape.domain))]
        bases += [self._media.dram.allocate(images.shape[1], self.shape.domain) for _ in stripes[1:]]
        for stripe, image, base in zip(stripes, images, bases, strict=True):
            self._write_dram(layer, end, base * config.page_bytes, image.tobytes())
            state.staged[stripe] = base
            self._enter_staged(layer, stripe)
        return stripes

    # Forks.

    def zones(self, lengths: Series[int]) -> list[set[int]]:
        """Zones of the stripes that a fork with so many tokens of each layer shares, of each allocation."""
        bits = self.shape.config.zone_page_bits
        found: list[set[int]] = [set() for _ in self.allocations]
        for layer, length in enumerate(lengths):
            state = self.layers[layer]
            stripes = state.in_flash(length // self.shape.stripe_tokens)
            entries = layout.unpack_entries(state.table[:, stripes])
            found[0].update(np.concatenate([entries.key_page, entries.value_page], axis=None) >> bits)
            for kind in self.shape.sketch_kinds:
                pages = layout.unpack_sketches(state.sketches[kind][:, stripes]).page
                found[self.shape.allocation(kind)].update(pages.ravel() >> bits)
        return [set(map(int, zones)) for zones in found]

    def inherit(self, parent: "TokenWriter", lengths: Series[int]) -> Steps[None]:
        """Take over the first tokens of each layer of another sequence of the same shape, while nothing is under way.

        Stripes in flash are the same; what is in DRAM is copied, for its owner will go on writing there.

        Args:
            parent: of the other sequence.
            lengths: tokens of each layer.

        Raises:
            CapacityError: device DRAM is full; `release_dram` gives back what was copied.
        """
        self.held_tokens = parent.held_tokens
        for number, length in enumerate(lengths):
            mine, theirs = self.layers[number], parent.layers[number]
            shared = theirs.in_flash(length // self.shape.stripe_tokens)
            mine.table[:, shared] = theirs.table[:, shared]
            for kind in self.shape.sketch_kinds:
                mine.sketches[kind][:, shared] = theirs.sketches[kind][:, shared]
            stripes, inside = divmod(length, self.shape.stripe_tokens)
            for stripe in sorted(s for s in theirs.staged if s < stripes + (inside > 0)):
                yield from self._copy_staged(number, stripe, theirs.staged[stripe])
            mine.length = length
            if theirs.sums is not None:
                mine.sums = theirs.sums.fork()
                mine.sums.truncate(length, self._begun_values(number, length))

    def _copy_staged(self, layer: int, stripe: int, source: int) -> Steps[None]:
        """Copy a stripe that is in DRAM; what of it may be in flash already will be written again."""
        size = self.shape.config.page_bytes
        data = self._media.transport.read_dram(source * size, self.shape.stripe_dram_pages * size)
        yield from self._put_staged(layer, stripe, data)

    def _put_staged(self, layer: int, stripe: int, data: bytes) -> Steps[None]:
        """Put a stripe into DRAM that was there before."""
        media = self._media
        base = yield from media.allocate_dram(self.shape.stripe_dram_pages, self.shape.domain)
        self.layers[layer].staged[stripe] = base
        self.tallies["append"].add_written(len(data))
        media.write_dram(base * self.shape.config.page_bytes, data)
        self._enter_staged(layer, stripe)

    def _enter_staged(self, layer: int, stripe: int) -> None:
        """Let the table say where a stripe lies in DRAM."""
        state, heads = self.layers[layer], np.arange(self.shape.kv_heads)
        key_pages = state.staged[stripe] + 2 * heads * self.shape.pages
        state.table[:, stripe] = layout.pack_entries(
            self.shape.channel(layer, heads, stripe), key_pages, key_pages + self.shape.pages, 1)

    def _begun_values(self, layer: int, length: int) -> Bits:
        """V of the stripe in DRAM that so many tokens end in, (kv_heads, tokens, head_dim); none if it is full."""
        stripe, inside = divmod(length, self.shape.stripe_tokens)
        if not inside:
            return np.zeros((self.shape.kv_heads, 0, self.shape.config.head_dim), np.uint16)
        return np.stack([self.staged_tokens(layer, stripe, head, Kind.VALUE) for head in range(self.shape.kv_heads)])

    # Outliving the process.

    def state(self) -> list[dict[str, NDArray[Any]]]:
        """Where the tokens of each layer lie, and those in DRAM themselves; nothing may be under way.  For `resume`."""
        size = self.shape.config.page_bytes
        found: list[dict[str, NDArray[Any]]] = []
        for layer in self.layers:
            stripes, staged = -(-layer.length // self.shape.stripe_tokens), sorted(layer.staged)
            tails = [self._media.transport.read_dram(layer.staged[stripe] * size, self.shape.stripe_dram_pages * size)
                     for stripe in staged]
            entry = {"length": np.array(layer.length), "table": layer.table[:, :stripes].copy(),
                     "staged": np.array(staged, np.int64), "tails": np.frombuffer(b"".join(tails), np.uint8)}
            entry |= {f"sketch_{int(kind)}": sketches[:, :stripes].copy() for kind, sketches in layer.sketches.items()}
            if layer.sums is not None:
                entry |= {f"sums_{name}": values for name, values in layer.sums.state().items()}
            found.append(entry)
        return found

    def resume(self, layers: Series[Mapping[str, NDArray[Any]]]) -> Steps[None]:
        """Go on from a `state`.

        Raises:
            CapacityError: device DRAM is full; `release_dram` gives back what was taken.
        """
        for number, (mine, saved) in enumerate(zip(self.layers, layers, strict=True)):
            length, staged = int(saved["length"]), saved["staged"].tolist()
            shared = [s for s in range(length // self.shape.stripe_tokens) if s not in staged]
            mine.table[:, shared] = saved["table"][:, shared]
            for kind, sketches in mine.sketches.items():
                sketches[:, shared] = saved[f"sketch_{int(kind)}"][:, shared]
            size = self.shape.stripe_dram_pages * self.shape.config.page_bytes
            for stripe, data in zip(staged, saved["tails"].reshape(-1, size), strict=True):
                yield from self._put_staged(number, stripe, data.tobytes())
            mine.length = length
            if mine.sums is not None:
                mine.sums.resume(length, {name.removeprefix("sums_"): values for name, values in saved.items()
                                          if name.startswith("sums_")})

    # Moving to flash.

    def _flush(self, layer: int, stripes: Series[int], tokens: Bits | None = None) -> Steps[None]:
        """Program full stripes, and give their DRAM back.

        Args:
            layer: which layer.
            stripes: consecutive ones, staged.
            tokens: theirs, if at hand; otherwise DRAM is read for what the feature layout needs.
        """
        if not stripes:
            return
        with self._media.flush() as flush:
            yield from self._move(layer, stripes, tokens, flush)

    def _move(self, layer: int, stripes: Series[int], tokens: Bits | None, flush: Flush) -> Steps[None]:
        pages, dram = self.shape.pages, self._media.dram
        for kind in self.shape.packed_kinds:
            yield from self._write_packed(layer, kind, stripes, tokens, flush)
        items = [(stripe, head) for head in range(self.shape.kv_heads) for stripe in stripes]
        if not self.shape.sparse:
            yield from self._program(layer, list(self._runs(layer, items, {})))
            return
        # K in the feature layout passes through DRAM, too, as much at a time as there is room for.
        while items:
            room = min(len(items), dram.largest_for(self.shape.domain) // pages)
            now, items = items[: max(room, 1)], items[max(room, 1) :]
            base = yield from self._media.allocate_dram(len(now) * pages, self.shape.domain, flush)
            try:
                sources = {item: base + i * pages for i, item in enumerate(now)}
                images = np.concatenate([
                    layout.pack_feature_pages(self._keys(layer, *item, stripes, tokens), self.shape.config)
                    for item in now])
                self._write_dram(layer, self._end(now[0][0]), base * self.shape.config.page_bytes, images.tobytes())
                yield from self._program(layer, list(self._runs(layer, now, sources)))
            finally:
                dram.free(base)

    def _write_packed(self, layer: int, kind: Kind, stripes: Series[int], tokens: Bits | None,
                      flush: Flush) -> Steps[None]:
        """Program a packed sketch of full stripes; all that are written now share the pages of their channel."""
        config, state, dram = self.shape.config, self.layers[layer], self._media.dram
        codewords = self.shape.packed_codewords(kind)
        run_pages = layout.packed_pages(1, codewords, config)
        in_run = run_pages * config.codewords_per_page // codewords
        # Flash is reserved for each stripe and channel: what these take together is never torn apart.
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for stripe in stripes:
            for head in range(self.shape.kv_heads):
                if (stripe, head, kind) not in state.placed:
                    groups.setdefault((stripe, int(self.shape.channel(layer, head, stripe))), []).append((stripe, head))
        waiting = list(groups.items())
        while waiting:
            # As many as DRAM has room for.
            sizes = np.cumsum([layout.packed_pages(len(items), codewords, config) for _, items in waiting])
            fitting = max(int(np.searchsorted(sizes, dram.largest_for(self.shape.domain), "right")), 1)
            channels: dict[int, list[tuple[int, int]]] = {}
            for (_, channel), items in waiting[:fitting]:
                channels.setdefault(channel, []).extend(items)
            waiting = waiting[fitting:]
            base = source = yield from self._media.allocate_dram(int(sizes[fitting - 1]), self.shape.domain, flush)
            try:
                runs: list[_Run] = []
                for channel, items in channels.items():
                    items.sort(key=lambda item: (item[1], item[0]))     # a head's stripes beside each other
                    images = self._pack(kind, [
                        (self._keys(layer, *item, stripes, tokens),
                         self.shape.sinks - item[0] * self.shape.stripe_tokens) for item in items])
                    self._write_dram(layer, self._end(items[0][0]), source * config.page_bytes, images.tobytes())
                    single = len({head for _, head in items}) == len(items)
                    for i in range(0, len(items), in_run):
                        die = self.shape.die(layer, *items[i], kind) if single else None
                        runs.append(_Run(kind, channel, source, run_pages, die, items[i : i + in_run]))
                        source += run_pages
                yield from self._program(layer, runs)
            finally:
                dram.free(base)

    def _pack(self, kind: Kind, stripes: Series[tuple[Bits, int]]) -> layout.Pages:
        """Page images of a packed sketch of some stripes, each given as its K and how many of its tokens are sinks."""
        config = self.shape.config
        if kind is Kind.CODES:
            octets = [codes.pack(codes.encode(key, config, skip=sinks), config)[0] for key, sinks in stripes]
            pages = layout.packed_pages(len(stripes), config.octets, config)
            images = np.zeros((pages * config.codewords_per_page, config.codeword_bytes), np.uint8)
            images[: len(stripes) * config.octets] = np.concatenate(octets)
            return images.reshape(pages, config.page_bytes)
        unit = self.shape.centroids
        assert unit is not None
        return layout.pack_pages(np.concatenate(
            [layout.mean_keys(key, unit, config, skip=sinks) for key, sinks in stripes]), config)

    def _keys(self, layer: int, stripe: int, head: int, stripes: Series[int], tokens: Bits | None) -> Bits:
        """K of a full stripe that is staged."""
        if tokens is not None:
            first = (stripe - stripes[0]) * self.shape.stripe_tokens
            return tokens[head, Kind.KEY, first : first + self.shape.stripe_tokens]
        return self.staged_tokens(layer, stripe, head, Kind.KEY)

    def staged_tokens(self, layer: int, stripe: int, head: int, kind: Kind) -> Bits:
        """K or V of a stripe that is staged; behind the layer's last token there may be anything."""
        config, size = self.shape.config, self.shape.pages * self.shape.config.page_bytes
        base = self.layers[layer].staged[stripe] * config.page_bytes + (2 * head + kind) * size
        data = self._media.transport.read_dram(base, size)
        return layout.unpack_pages(np.frombuffer(data, np.uint8).reshape(self.shape.pages, -1), config)

    def _runs(self, layer: int, items: Series[tuple[int, int]], sources: dict[tuple[int, int], int]) -> Iterator[_Run]:
        """What must be programmed, but for packed sketches, in the order in which it takes places on each channel."""
        state = self.layers[layer]
        heads: dict[tuple[int, int], list[int]] = {}
        for stripe, head in items:
            heads.setdefault((int(self.shape.channel(layer, head, stripe)), head), []).append(stripe)
        # Stripes that take a whole die may follow each other head by head; smaller ones would lie in one multi-plane
        # read with V that waits for their K.
        in_turn = self.shape.pages >= self.shape.config.part.planes and len({stripe for stripe, _ in items}) > 1
        for (channel, head), stripes in heads.items():
            for kind in self.shape.kinds:
                if kind in self.shape.packed_kinds:
                    continue
                for stripe in stripes:
                    if (stripe, head, kind) in state.placed:
                        continue
                    # Several stripes: one after the other, through planes and then dies.  A single one, as they come
                    # from decoding: on another die than the one before of this head, V far from K.
                    source = sources[stripe, head] if kind is Kind.FEATURE else (
                        state.staged[stripe] + (2 * head + kind) * self.shape.pages)
                    die = self.shape.die(layer, stripe, head, kind) if len(stripes) == 1 and not in_turn else None
                    yield _Run(kind, channel, source, self.shape.pages, die, [(stripe, head)])

    def _program(self, layer: int, runs: list[_Run]) -> Steps[None]:
        """Program pages; what fails is placed elsewhere on its channel."""
        media = self._media
        lost: BaseException | None = None   # a die that does not answer
        while runs:
            try:
                places = self._take(runs)
            except CapacityError:
                if lost is not None:
                    raise lost from None    # why there is no room
                media.raise_die_error()
                raise
            owners = [i for i, run in enumerate(runs) for _ in range(run.pages)]
            report = yield from media.program(
                [PageProgram(run.channel, place + page, run.source + page)
                 for run, place in zip(runs, places, strict=True) for page in range(run.pages)], self.shape.domain)
            failed, dead = ({owners[page] for page in pages} for pages in (report.failed, report.dead))
            there = [i for i in range(len(runs)) if i not in failed]
            self.counters["PAGE_PROGRAMS"] += report.acknowledged
            self._tally(layer, self._end(runs[0].holds[0][0])).add_programs(report.passages, report.acknowledged)
            media.allocator.account(report.submitted, sum(runs[i].pages for i in there))
            for i in there:
                self._placed(layer, runs[i], places[i])
            lost = lost or report.die_error
            if report.error is not None:
                raise report.error
            runs = [runs[i] for i in sorted(failed - dead)]
        if lost is not None:
            raise lost
        media.raise_die_error()

    def _take(self, runs: Series[_Run]) -> list[int]:
        """First pages for runs: for all of them or none."""
        allocator, places = self._media.allocator, []
        try:
            for run in runs:
                places.append(allocator.take(self._allocation_of(run), run.channel, die=run.die))
        except BaseException:
            for run, place in reversed(list(zip(runs, places, strict=False))):
                allocator.give_back(self._allocation_of(run), run.channel, place)
            raise
        return places

    def _allocation_of(self, run: _Run) -> Allocation:
        return self.allocations[self.shape.allocation(run.kind)]

    def _placed(self, layer: int, run: _Run, place: int) -> None:
        """Note that a run is in flash; when all of a stripe is, for its head and for all heads, use that."""
        state, config = self.layers[layer], self.shape.config
        for index, (stripe, head) in enumerate(run.holds):
            page, codeword = 0, 0
            if run.kind in self.shape.packed_kinds:
                page, codeword = layout.packed_place(index, self.shape.packed_codewords(run.kind), config)
            state.placed[stripe, head, run.kind] = place + page, codeword
            if not all((stripe, head, kind) in state.placed for kind in self.shape.kinds):
                continue
            key_page, value_page = (state.placed[stripe, head, kind][0] for kind in (Kind.KEY, Kind.VALUE))
            state.table[head, stripe] = layout.pack_entries(run.channel, key_page, value_page, 0)
            for kind in self.shape.sketch_kinds:
                state.sketches[kind][head, stripe] = layout.pack_sketches(*state.placed[stripe, head, kind], 1)
            keys = [(stripe, head, kind) for head in range(self.shape.kv_heads) for kind in self.shape.kinds]
            if all(key in state.placed for key in keys):
                self._media.free_dram_later(state.staged.pop(stripe))
                for key in keys:
                    del state.placed[key]

    # Giving up tokens.

    def flushed(self, layer: int) -> int:
        """The first tokens of a layer that are all in flash, as far as is known."""
        state = self.layers[layer]
        return min(state.staged) * self.shape.stripe_tokens if state.staged else state.length

    def removable_from(self, layer: int) -> int:
        """First token that `truncate` can remove: a stripe with anything in flash would be written twice."""
        placed = self.layers[layer].placed
        return max([self.flushed(layer), *((stripe + 1) * self.shape.stripe_tokens for stripe, _, _ in placed)])

    def truncate(self, layer: int, length: int) -> None:
        """Forget the last tokens, all of which are in DRAM, when nothing is under way."""
        state = self.layers[layer]
        if state.sums is not None:
            state.sums.truncate(length, self._begun_values(layer, length))
        for gone in [staged for staged in state.staged if staged * self.shape.stripe_tokens >= length]:
            self._media.dram.free(state.staged.pop(gone))
        state.table[:, -(-length // self.shape.stripe_tokens) :] = NO_ENTRY
        state.length = length

    def release_dram(self) -> None:
        """Give all DRAM back, at the end of the sequence.

        Raises:
            KvatticError: what the device reports; the pages are free nevertheless.
        """
        for layer in self.layers:
            layer.table[:] = NO_ENTRY
        errors: list[KvatticError] = []
        for layer in self.layers:
            for page in layer.staged.values():
                try:
                    self._media.dram.free(page)
                except KvatticError as error:   # the device, which was to be told, failed; the page is free
                    errors.append(error)
            layer.staged.clear()
            layer.placed.clear()
        if errors:
            raise errors[0]

    def lose_tails(self) -> Iterator[tuple[int, int]]:
        """Forget what was in DRAM, which has lost its power; (layer, lost tokens) where there were any."""
        self._background.clear()    # losses say more
        for number, layer in enumerate(self.layers):
            self.settle(number)
            flushed = self.flushed(number)
            tokens = layer.length - flushed
            layer.length = flushed
            if layer.sums is not None:
                none = np.zeros((self.shape.kv_heads, 0, self.shape.config.head_dim), np.uint16)
                layer.sums.truncate(layer.length, none)
            first = layer.length // self.shape.stripe_tokens
            layer.table[:, first:] = NO_ENTRY
            for sketches in layer.sketches.values():
                sketches[:, first:] = 0
            layer.staged.clear()
            layer.placed.clear()
            if tokens:
                yield number, tokens
