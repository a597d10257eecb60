"""From an `attend` call to jobs: options, masks, the selection of a sparse mode, and the jobs themselves."""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.driver.checks import as_member, check_integer, check_positive
from kvattic.driver.jobs import MAX_LOCAL_TOKENS, MAX_SINKS, MAX_STRIPES, MAX_UNITS, Job, PackedQueries, ReadJob
from kvattic.driver.results import Part
from kvattic.driver.shape import SequenceShape
from kvattic.driver.value_sums import Doubles
from kvattic.driver.writer import Layer
from kvattic.errors import RequestError
from kvattic.spec import layout
from kvattic.spec.blocks import Masks, Queries, pack_queries
from kvattic.spec.commands import ROW, TREE_BITS, Mode, fp32_bits, is_positive_normal, read_token_bytes
from kvattic.spec.config import ELEMENT_BYTES, Config
from kvattic.spec.elements import Bits, Integers, as_array

__all__ = ["AttendKeywords", "AttendOptions", "Planner", "Selection", "make_masks", "select"]

ReadValues: TypeAlias = Callable[[int, int, int], Doubles]
"""V of a layer's tokens, from the first to before the last one: float64, (kv_heads, tokens, head_dim)."""


class AttendKeywords(TypedDict, total=False):
    """The keywords of `attend`, `attend_async` and `plan`: the fields of `AttendOptions`, which explains them."""

    scale: float | None
    causal: bool
    window: int | None
    tree: ArrayLike | None
    start: ArrayLike | None
    end: ArrayLike | None
    mode: Mode | str
    features: int | None
    top_units: int | None
    local_tokens: int
    sinks: int | None
    unit_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttendOptions:
    """Which tokens the queries of a call attend, and how.

    Attributes:
        scale: factor of the scores, positive; 1/sqrt(head_dim) if None.
        causal: the queries belong to the last n_queries tokens; query i attends the tokens up to its own.
        window: each query attends only the last `window` of the tokens that the other masks leave it.
        tree: bool, (n_queries, n_draft), n_draft at most 32: which of the last n_draft tokens each query attends; all
            tokens before them are attended.
        start: integers, (n_queries,), 0 to the layer's tokens: the first token that each query attends.
        end: likewise, one past the last token that each query attends; a query whose end is not behind its start
            attends nothing.
        mode: `commands.Mode` or its name in lower case; always a `Mode` afterwards.
        features: sparf, fetched: the paper's r, 1 to head_dim.  (Codes reads all of them.)
        top_units: sparse modes: the paper's k, how many units are attended: at least 1, and no more than there are.
            A query that has fewer, because of causal, attends all of its units.
        local_tokens: sparse modes: the newest tokens of each query, which are always attended; units with any of them
            count among `top_units`, which must be as many.
        sinks: sparse modes: the first tokens of the sequence, which are always attended, too, and count likewise.  If
            None, those that the sequence was created with.  In codes at most half a stripe's tokens.
        unit_tokens: fetched, centroid: tokens of a unit, a power of two from a codeword's to a page's.  If None, a
            codeword's in fetched; in centroid those of the stored mean keys, and no other number is possible there.

    Raises:
        RequestError: the mode does not exist, or an option is given that it does not use.
    """

    scale: float | None = None
    causal: bool = False
    window: int | None = None
    tree: ArrayLike | None = None
    start: ArrayLike | None = None
    end: ArrayLike | None = None
    mode: Mode | str = Mode.DENSE
    features: int | None = None
    top_units: int | None = None
    local_tokens: int = 0
    sinks: int | None = None
    unit_tokens: int | None = None

    def __post_init__(self) -> None:
        mode = as_member("mode", self.mode, Mode)
        object.__setattr__(self, "mode", mode)
        sparse = mode is not Mode.DENSE
        if not sparse and self.features is None and self.top_units is None and self.local_tokens == 0 and (
                not self.sinks and self.unit_tokens is None):
            return
        for name, given, used in (
                ("features", self.features is not None, mode.featured),
                ("top_units", self.top_units is not None, sparse), ("local_tokens", self.local_tokens != 0, sparse),
                ("sinks", bool(self.sinks), sparse),
                ("unit_tokens", self.unit_tokens is not None, mode in (Mode.FETCHED, Mode.CENTROID))):
            if given and not used:
                raise RequestError(f"mode {mode.name.lower()} has no {name}: it must not be given")

    @property
    def mode_name(self) -> str:
        """The mode's name in lower case."""
        return as_member("mode", self.mode, Mode).name.lower()

    def masks(self, length: int, n_queries: int) -> Masks:
        """What each of a number of queries attends of a number of tokens."""
        return make_masks(length, n_queries, self.causal, self.window, self.tree, self.start, self.end)

    def scale_bits(self, head_dim: int, key_scale: float = 1.0) -> int:
        """The scale as a command has it: fp32 of scale * log2(e), times what a stored 1.0 of K stands for.

        Raises:
            RequestError: it is not a positive normal fp32.
        """
        scale = 1 / math.sqrt(head_dim) if self.scale is None else self.scale
        try:
            bits = _command_scale(scale * key_scale)
        except (OverflowError, TypeError):
            bits = 0
        if not is_positive_normal(bits):
            of_key = "" if key_scale == 1 else f" with a scale of K of {key_scale!r}"
            raise RequestError(f"scale must be positive, and scale * log2(e) a normal fp32 (1.2e-38 to 3.4e38), not "
                               f"{scale!r}{of_key}")
        return bits


@lru_cache(maxsize=4096)
def _command_scale(scale: float) -> int:
    return fp32_bits(scale * math.log2(math.e))


# Masks.


def make_masks(length: int, n_queries: int, causal: bool = False, window: int | None = None,
               tree: ArrayLike | None = None, start: ArrayLike | None = None, end: ArrayLike | None = None) -> Masks:
    """What each query attends: start to end, but from tree_token on only where a bit is set.

    Raises:
        RequestError: an argument has a wrong shape, dtype or number in it.
    """
    if causal and n_queries > length:
        raise RequestError(f"causal: the {n_queries} queries are the last tokens of the sequence, but the layer has "
                           f"only {length}")
    if tree is None and window is None and start is None and end is None:
        stop = length - n_queries + 1 + np.arange(n_queries) if causal else np.full(n_queries, length)
        return Masks(np.zeros(n_queries, np.int64), stop, np.zeros(n_queries, np.int64), length)
    first = _bounds("start", start, length, np.zeros(n_queries, np.int64))
    last = _bounds("end", end, length, np.full(n_queries, length))
    if causal:
        last = np.minimum(last, length - n_queries + 1 + np.arange(n_queries))
    draft = _draft(tree, length, n_queries)
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


def _bounds(name: str, values: ArrayLike | None, length: int, default: Integers) -> Integers:
    """The option `start` or `end`; `default` if it was not given."""
    if values is None:
        return default
    bounds = np.asarray(values)
    if bounds.dtype.kind not in "iu" or bounds.shape != default.shape:
        raise RequestError(f"{name} must be integers (n_queries,) = {default.shape}, not {bounds.dtype} {bounds.shape}")
    for query in np.flatnonzero((bounds < 0) | (bounds > length))[:1]:
        raise RequestError(f"{name} must be 0 to {length}, the layer's tokens, not {bounds[query]} (query {query})")
    return bounds.astype(np.int64)


def _draft(tree: ArrayLike | None, length: int, n_queries: int) -> NDArray[np.bool_]:
    """The option `tree`, checked; without draft tokens if it was not given."""
    if tree is None:
        return np.zeros((n_queries, 0), np.bool_)
    draft = np.array(tree)
    if draft.dtype != np.bool_ or draft.ndim != 2 or draft.shape[0] != n_queries:
        raise RequestError(f"tree must be bool (n_queries, n_draft) = ({n_queries}, 1 to {TREE_BITS}), not "
                           f"{draft.dtype} {draft.shape}")
    most = min(TREE_BITS, length)
    if not 1 <= draft.shape[1] <= most:
        raise RequestError(f"tree must have 1 to {most} draft tokens ({TREE_BITS} at most, and no more than the "
                           f"layer's {length} tokens), not {draft.shape[1]}")
    return draft


# The selection of a sparse mode.


class Selection(NamedTuple):
    """What a sparse mode selects; see `AttendOptions`."""

    mode: Mode
    features: int
    top_units: int
    local_tokens: int
    sinks: int
    unit_tokens: int
    unit_bits: int

    @property
    def name(self) -> str:
        """The mode's."""
        return self.mode.name.lower()


def select(options: AttendOptions, shape: SequenceShape) -> Selection | None:
    """What a call on a sequence selects, with all checks that need no tokens; None in dense mode.

    Raises:
        RequestError: the sequence was created without what the mode reads, or a number is out of range.
    """
    mode, config = options.mode, shape.config
    assert isinstance(mode, Mode)
    if mode is Mode.DENSE:
        return None
    name = mode.name.lower()
    if mode.featured and not shape.sparse:
        raise RequestError(f"mode {name} reads K in the feature layout, which this sequence was created without: "
                           "create it with sparse=True")
    if mode is Mode.CENTROID and shape.centroids is None:
        raise RequestError(f"mode {name} reads mean keys, which this sequence was created without: create it with "
                           "centroids=...")
    if mode is Mode.CODES and not shape.codes:
        raise RequestError(f"mode {name} reads codes, which this sequence was created without: create it with "
                           "codes=True")
    if mode.featured:
        check_integer("features (the paper's r)", options.features, 1, config.head_dim)
    check_integer("top_units (the paper's k)", options.top_units, 1, MAX_UNITS)
    size = unit_tokens(mode, options.unit_tokens, shape.centroids, config)
    unit_bits = 0 if mode.by_token else layout.unit_bits(size, config)
    assert options.top_units is not None
    check_integer("local_tokens", options.local_tokens, 0, min(options.top_units * size, MAX_LOCAL_TOKENS))
    sinks = shape.sinks if options.sinks is None else options.sinks
    check_integer("sinks", sinks, 0, config.codes_sinks_max if mode is Mode.CODES else MAX_SINKS)
    return Selection(mode, options.features or 0, int(options.top_units), int(options.local_tokens), int(sinks),
                     int(size), unit_bits)


def unit_tokens(mode: Mode, asked: int | None, centroids: int | None, config: Config) -> int:
    """Tokens of a unit of selection.

    Args:
        mode: a sparse mode.
        asked: the option `unit_tokens`.
        centroids: tokens of a mean key of the sequence.
        config: of the drive.

    Raises:
        RequestError: the stored mean keys have another number of tokens.
    """
    if mode is Mode.FETCHED:
        return config.tokens_per_codeword if asked is None else asked
    if mode is Mode.CENTROID and centroids is not None:
        if asked not in (None, centroids):
            raise RequestError(
                f"unit_tokens must be {centroids}, of which the sequence's mean keys are, not {asked!r}")
        return centroids
    return 1


# Jobs.


class _Piece(NamedTuple):
    """What the heads' dense jobs of some rows over a range of tokens share.

    Members:
        rows: which ones.
        job: one of them, without query, table and scale.
        stripes: of the table.
        label: the end of theirs.
        block: uint16, (kv_heads, rows, elements), their query blocks without q.
    """

    rows: slice
    job: Job
    stripes: slice
    label: str
    block: Bits

    def pack(self, query: Bits) -> bytes:
        """The query blocks, head after head, of uint16, (kv_heads, rows, head_dim)."""
        block = self.block.copy()
        first = ROW.size // ELEMENT_BYTES
        block[:, :, first : first + query.shape[2]] = query
        return block.tobytes()


class _Shared(NamedTuple):
    """What the dense jobs of a call share with those of the next one, in another layer.

    Members:
        masks: of the rows.
        chunks: rows of each job.
        counts: pieces of each chunk.
        pieces: of all of them, in order.
    """

    masks: Masks
    chunks: list[slice]
    counts: list[int]
    pieces: list[_Piece]


class Planner:
    """Makes the jobs of a sequence.

    Args:
        shape: of the sequence.
        layers: where its stripes lie.
    """

    def __init__(self, shape: SequenceShape, layers: Series[Layer]) -> None:
        self._shape = shape
        self._layers = layers
        self._config = shape.config
        self._rows: tuple[Masks, int, Masks] | None = None
        self._shared: _Shared | None = None
        self._masks: tuple[tuple[int, int, bool, int | None], Masks] | None = None

    def _of_rows(self, masks: Masks, group: int) -> Masks:
        """`Masks.of_rows`, once for all layers that are asked with the same masks."""
        if self._rows is None or self._rows[0] is not masks or self._rows[1] != group:
            self._rows = masks, group, masks.of_rows(group)
        return self._rows[2]

    def masks(self, options: AttendOptions, length: int, n_queries: int) -> Masks:
        """`AttendOptions.masks`; the same object as before if they are those of the call before."""
        simple = options.tree is None and options.start is None and options.end is None
        key = (length, n_queries, options.causal, options.window)
        if simple and self._masks is not None and self._masks[0] == key:
            return self._masks[1]
        found = options.masks(length, n_queries)
        self._masks = (key, found) if simple else None
        return found

    def check_query(self, query: ArrayLike) -> Bits:
        """The query as bit patterns, (q_heads, n_queries, head_dim); a copy, for jobs may be read much later.

        Raises:
            RequestError: a wrong shape, dtype or number.
        """
        array, kv_heads, dim = as_array(query), self._shape.kv_heads, self._config.head_dim
        if array.ndim != 3 or array.shape[2] != dim or 0 in array.shape:
            raise RequestError(f"query must be (q_heads, n_queries, head_dim) = (at least {kv_heads}, at least 1, "
                               f"{dim}), not {array.shape}")
        if array.shape[0] % kv_heads:
            raise RequestError(f"q_heads must be a multiple of the sequence's {kv_heads} KV heads, not "
                               f"{array.shape[0]}")
        bits = layout.storage_bits(array, self._config.element, "query")
        return bits.copy() if np.may_share_memory(bits, array) else bits

    def chunks(self, selection: Selection | None, group: int, rows: int) -> list[slice]:
        """The rows of each job: of as many queries as fit, but of one query where it selects for itself.

        Args:
            selection: of a sparse mode, or None.
            group: query heads of a KV head.
            rows: of a KV head, all queries.

        Raises:
            RequestError: the heads that share a selection do not fit a job.
        """
        most = self._config.rows
        if selection is not None and group > most:
            raise RequestError(
                f"mode {selection.name} selects once for the {group} query heads of a KV head, which must fit one job: "
                f"this configuration has {most} rows (Config.rows); take one with {group}, or attend densely")
        together = rows if selection is None else group
        return [slice(first, min(first + most, begin + together)) for begin in range(0, rows, together)
                for first in range(begin, begin + together, most)]

    def jobs(self, layer: int, query: Bits, masks: Masks, scale_bits: Series[int],
             selection: Selection | None = None, held_tokens: int = 0,
             means: NDArray[np.float32] | None = None) -> tuple[list[Job], list[Part]]:
        """All jobs of a call, and which rows each of them serves.

        Args:
            layer: which layer.
            query: from `check_query`.
            masks: of the queries.
            scale_bits: of each KV head, see `Job`.
            selection: of a sparse mode, checked by `check_selection`; None: dense.
            held_tokens: see `check_selection`.
            means: of V, from `means`, where the mode blends one in.
        """
        kv_heads, (q_heads, n_queries, dim) = self._shape.kv_heads, query.shape
        group = q_heads // kv_heads
        # Rows by query, then by head of the group: so the windows of a job's rows lie close together and less is read.
        rows = query.reshape(kv_heads, group, n_queries, dim).swapaxes(1, 2).reshape(kv_heads, -1, dim)
        of_rows = self._of_rows(masks, group)
        if selection is None:
            return self._dense_parts(layer, rows, of_rows, scale_bits)
        chunks = self.chunks(selection, group, rows.shape[1])
        jobs: list[Job] = []
        parts: list[Part] = []
        for head in range(kv_heads):
            for chunk in chunks:
                mean = None if means is None else means[chunk.start // group, head].view(np.uint32)
                parts.append(Part(head, chunk, range(len(jobs), len(jobs) + 1)))
                jobs.append(self._sparse_job(layer, head, rows[head, chunk], scale_bits[head], of_rows.cut(chunk),
                                             selection, held_tokens, mean))
        return jobs, parts

    def _dense_parts(self, layer: int, rows: Bits, masks: Masks,
                     scale_bits: Series[int]) -> tuple[list[Job], list[Part]]:
        """Dense jobs of all heads.

        Args:
            layer: which layer.
            rows: uint16, (kv_heads, rows, head_dim).
            masks: of the rows of any head.
            scale_bits: of each head, see `Job`.
        """
        shared = self._shared
        if shared is None or shared.masks is not masks:
            chunks = self.chunks(None, 1, rows.shape[1])
            pieces = [self._piece(chunk, masks.cut(chunk), base, stop)
                      for chunk in chunks for base, stop in self._dense_ranges(masks.cut(chunk))]
            counts = [sum(piece.rows is chunk for piece in pieces) for chunk in chunks]
            self._shared = shared = _Shared(masks, chunks, counts, pieces)
        packed = [piece.pack(rows[:, piece.rows]) for piece in shared.pieces]
        table = self._layers[layer].table
        prefix = f"sequence {self._shape.number}, layer {layer}, KV head "
        jobs, parts = list[Job](), list[Part]()
        for head, own in enumerate(rows):
            before = len(jobs)
            for piece, blocks in zip(shared.pieces, packed, strict=True):
                first, query = piece.job, own[piece.rows]
                size = len(blocks) // len(rows)
                jobs.append(Job(
                    query=query, start=first.start, end=first.end, tree=first.tree, table=table[head, piece.stripes],
                    stripe_pages=first.stripe_pages, base_token=first.base_token, end_token=first.end_token,
                    tree_token=first.tree_token, scale_bits=scale_bits[head], domain=first.domain,
                    label=f"{prefix}{head}, {piece.label}",
                    packed=PackedQueries(query, first.start, first.end, first.tree,
                                         blocks[head * size : (head + 1) * size])))
            for chunk, count in zip(shared.chunks, shared.counts, strict=True):
                parts.append(Part(head, chunk, range(before, before + count)))
                before += count
        return jobs, parts

    def _piece(self, rows: slice, masks: Masks, base: int, stop: int) -> "_Piece":
        """What the heads' jobs of some rows over tokens base to stop share."""
        heads, count, dim = self._shape.kv_heads, len(masks.start), self._config.head_dim
        job = self._job(0, 0, np.zeros((count, dim), np.uint16), 0, masks, base, stop)
        for column in (job.start, job.end, job.tree):
            column.setflags(write=False)
        zeros = Queries(np.zeros((heads * count, dim), np.uint16),
                        *(np.tile(column, heads) for column in (job.start, job.end, job.tree)))
        size = self._shape.stripe_tokens
        return _Piece(rows, job, slice(base // size, -(-stop // size)), f"tokens {base} to {stop - 1}",
                      np.frombuffer(pack_queries(zeros), "<u2").reshape(heads, count, -1))

    @cached_property
    def _most_tokens(self) -> int:
        """Tokens that a job can have: the score buffers of all lanes together hold that many."""
        config = self._config
        places = config.ring_codewords // (self._shape.pages * config.codewords_per_page)
        return min(config.lanes * places, MAX_STRIPES) * self._shape.stripe_tokens

    def _range(self, masks: Masks, length: int) -> tuple[int, int]:
        """Tokens from the first stripe on to the last one that any row attends; all `length` if there is none."""
        busy = masks.end > masks.start
        if not busy.all():
            if not busy.any():
                return 0, length
            masks = Masks(masks.start[busy], masks.end[busy], masks.tree[busy], masks.tree_token)
        first, last = int(masks.start.min()), int(masks.end.max())
        return first - first % self._shape.stripe_tokens, last

    def dense_jobs(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks) -> Iterator[Job]:
        """Dense jobs of rows of one KV head: one for each range of tokens that the score buffers hold."""
        for base, stop in self._dense_ranges(masks):
            yield self._job(layer, head, query, scale_bits, masks, base, stop)

    def _dense_ranges(self, masks: Masks) -> Iterator[tuple[int, int]]:
        """Tokens of the dense jobs of some rows: the first one, and the one behind the last."""
        first, last = self._range(masks, 1)
        for base in range(first, last, self._most_tokens):
            yield base, min(base + self._most_tokens, last)

    def _job(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks, base: int, stop: int) -> Job:
        """A dense job over tokens base to stop."""
        shape, size = self._shape, self._shape.stripe_tokens
        return Job(
            query=query,
            # A row that attends nothing in this range has the empty window at its beginning.
            start=np.minimum(np.maximum(masks.start, base), stop),
            end=np.minimum(np.maximum(masks.end, base), stop),
            tree=masks.tree >> min(max(base - masks.tree_token, 0), TREE_BITS),
            table=self._layers[layer].table[head, base // size : -(-stop // size)],
            stripe_pages=shape.pages,
            base_token=base,
            end_token=stop,
            # A tree that began before this range is cut, so that it begins inside or at the end.
            tree_token=min(max(masks.tree_token, base), stop),
            scale_bits=scale_bits,
            domain=shape.domain,
            label=f"sequence {shape.number}, layer {layer}, KV head {head}, tokens {base} to {stop - 1}",
        )

    # Sparse jobs.

    def check_selection(self, selection: Selection, masks: Masks, group: int, length: int, held_tokens: int) -> None:
        """Check a selection against the tokens of each job.

        Args:
            selection: of a sparse mode.
            masks: of the queries.
            group: query heads of a KV head.
            length: tokens of the layer.
            held_tokens: newest tokens of each query that are its tail, beside those of the last stripe.

        Raises:
            RequestError: the tokens do not fit the score buffers, or make fewer units than are asked for, or
                `top_units` has no room for sinks and local tokens.
        """
        of_rows, size = masks.of_rows(group), selection.unit_tokens
        ranges = [self._range(of_rows.cut(chunk), length)
                  for chunk in self.chunks(selection, group, len(of_rows.start))]
        for base, stop in ranges:
            if stop - base > self._most_tokens:
                raise RequestError(
                    f"mode {selection.name} takes at most {self._most_tokens:,} tokens, which the score buffers hold "
                    f"at once (Config.score_depth), not {stop - base:,} (tokens {base} to {stop - 1}); attend a window "
                    "of them, or densely")
        base, stop = max(ranges, key=lambda tokens: tokens[1] - tokens[0])
        most = -(-(stop - base) // size)
        if selection.top_units > most:
            raise RequestError(f"top_units (the paper's k) must be at most {most:,}, as tokens {base} to {stop - 1} "
                               f"make no more units of {size}, not {selection.top_units:,}")
        for base, stop in ranges:
            # What is attended whole comes on top of the units.
            end = min(stop, self._shape.whole_from(stop, held_tokens))
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

    def _sparse_job(self, layer: int, head: int, query: Bits, scale_bits: int, masks: Masks, selection: Selection,
                    held_tokens: int, mean: NDArray[np.uint32] | None) -> Job:
        """A job of a sparse mode; it has all tokens of its rows."""
        state, size = self._layers[layer], self._shape.stripe_tokens
        base, stop = self._range(masks, state.length)
        job = self._job(layer, head, query, scale_bits, masks, base, stop)
        units = min(selection.top_units, -(-(stop - base) // selection.unit_tokens))
        sketch = state.sketches[selection.mode.sketch]
        return replace(
            job,
            mode=selection.mode,
            features=selection.features,
            top_units=units,
            local_tokens=min(selection.local_tokens, units * selection.unit_tokens),
            sinks=selection.sinks,
            whole=max(self._shape.whole_from(stop, held_tokens) - base, 0) // size,
            unit_bits=selection.unit_bits,
            mean=mean,
            sketch=sketch[head, base // size : -(-stop // size)],
            label=f"{job.label}, {selection.name}",
        )

    # K and V themselves.

    def read_jobs(self, layer: int, first: int, last: int, most_bytes: int) -> list[ReadJob]:
        """READs of K and V of tokens, which begin with the page of the first token.

        They are ordered by KV head, then by token.

        Args:
            layer: which layer.
            first: the first of the tokens.
            last: one past the last of them.
            most_bytes: what each may write, if that is a page's tokens or more.
        """
        config, shape = self._config, self._shape
        size = config.tokens_per_page
        # So many pages can lie on one channel.
        pages = min(most_bytes // (size * read_token_bytes(config.head_dim, config.kv_element_bytes)),
                    config.ring_codewords // config.codewords_per_page, MAX_STRIPES)
        jobs: list[ReadJob] = []
        for head in range(shape.kv_heads):
            for base in range(first - first % size, last, max(pages, 1) * size):
                stop = min(base + max(pages, 1) * size, last)
                stripe, inside = divmod(base, shape.stripe_tokens)
                jobs.append(ReadJob(
                    table=self._layers[layer].table[head, stripe : -(-stop // shape.stripe_tokens)],
                    stripe_pages=shape.pages, first_page=inside // size, base_token=base, tokens=stop - base,
                    domain=shape.domain,
                    label=f"sequence {shape.number}, layer {layer}, KV head {head}, tokens {base} to {stop - 1}"))
        return jobs

    # Means of V.

    def means(self, layer: int, masks: Masks, read: ReadValues) -> NDArray[np.float32]:
        """Mean of V over what each query may attend: (n_queries, kv_heads, head_dim); zero where that is nothing.

        Args:
            layer: which layer, of a sequence with the feature layout or codes.
            masks: of the queries.
            read: V of tokens that the host does not keep.
        """
        sums = self._layers[layer].sums
        assert sums is not None
        known: dict[int, Doubles] = {}
        read_layer = partial(read, layer)

        def until(token: int) -> Doubles:
            if token not in known:
                known[token] = sums.until(token, read_layer)
            return known[token]

        means = np.zeros((len(masks.start), self._shape.kv_heads, self._config.head_dim), np.float32)
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
                    total = total + sums.values(draft, draft + 1, read_layer)[:, 0]
            mean[:] = total / (prefix - start + len(drafts))
        return means
