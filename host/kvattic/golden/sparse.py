"""Golden model of the sparse modes: SPARF, FETCHED and CENTROID, bit for bit as the hardware computes them.

Integers only; docs/sparse.md says what is computed and docs/numerics.md, section 7, why so.  `attend_sparse` runs a
whole job; `first_pass` and `second_pass` are its halves, for a device that reads codewords only when it knows which.
The steps stand alone, too: `magnitudes`, `top_features`, `approximate_scales`, `feature_sums`, `log2`, `references`,
`probabilities`, `masses`, `ranks`, `select`, `alphas`, `blend`.  What is the same as in dense attention stands in
`kvattic.golden.dense`.

Shapes are named (rows, tokens, head_dim), tokens being those of all stripes of the job, whole stripes from base_token
on; a unit of selection is `unit_tokens` of them, and unit u begins with token base_token + u * unit_tokens.  Elements
are uint16 bit patterns, intermediates int64.
"""

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.golden import dense
from kvattic.golden.dense import DENOMINATOR_SHIFT, Bits, Integers
from kvattic.spec.commands import FP32_SPECIAL, CompletionFlag, Mode
from kvattic.spec.elements import special
from kvattic.spec.formats import (
    ALPHA_FRACTION,
    LOG_BITS,
    MAGNITUDE_BITS,
    MAGNITUDE_FRACTION,
    MASS_BITS,
    MASS_FRACTION,
    RATIO_FRACTION,
    SCALE_BITS,
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    VALUE_FRACTION,
    Element,
)
from kvattic.spec.layout import TOKEN_BITS

__all__ = [
    "ALPHA_ONE",
    "FORCED",
    "First",
    "Layout",
    "SparseTrace",
    "alphas",
    "approximate_scales",
    "attend_sparse",
    "blend",
    "feature_sums",
    "first_pass",
    "log2",
    "magnitudes",
    "masses",
    "probabilities",
    "ranks",
    "references",
    "second_pass",
    "select",
    "top_features",
]

Booleans: TypeAlias = NDArray[np.bool_]

ALPHA_ONE = 1 << ALPHA_FRACTION
"""An alpha of 1: the mean of V has no part in the output."""
FORCED = (1 << MASS_BITS) - 1
"""The mass that stands for a unit of sinks or of the local window; real masses saturate one below it."""


# Features and scale of the first pass.


def magnitudes(query: Bits, element: Element) -> Integers:
    """|q[c]| with MAGNITUDE_FRACTION fractional bits: what is finer is truncated, what is larger clipped.

    Args:
        query: uint16, (rows, head_dim).
        element: its format.

    Returns:
        int64, (rows, head_dim), each below 2**MAGNITUDE_BITS; NaN and infinity are zero.
    """
    part = dense.decode(query, element)
    shift = part.exponent.astype(np.int64) - element.encoding.offset + MAGNITUDE_FRACTION
    significand = part.significand.astype(np.int64)
    # An 11-bit significand fills the magnitude with a left shift of 29; beyond that it is clipped anyway.
    left = significand << np.clip(shift, 0, MAGNITUDE_BITS)
    result: Integers = np.where(shift >= 0, left, significand >> np.clip(-shift, 0, 63))
    return np.minimum(result, (1 << MAGNITUDE_BITS) - 1)


def top_features(query: Bits, r: int, element: Element) -> Integers:
    """The r features with the largest sum of magnitudes over the rows; ties go to the lower feature.

    Args:
        query: uint16, (rows, head_dim).
        r: how many, 1 to head_dim.
        element: format of query.

    Returns:
        int64, (r,), numbers of features, ascending.
    """
    total = magnitudes(query, element).sum(axis=0)
    # A stable sort keeps equal ones in the order of their numbers.
    chosen: Integers = np.sort(np.argsort(-total, kind="stable")[:r]).astype(np.int64)
    return chosen


def approximate_scales(
    query: Bits, features: Integers, element: Element, scale_bits: int
) -> tuple[Integers, Integers]:
    """Each row's scale of the first pass: the command's times sqrt(|q|_1 / |q over the chosen features|_1).

    Args:
        query: uint16, (rows, head_dim).
        features: int64, (r,), the chosen features.
        element: format of query.
        scale_bits: the command's scale, an fp32 bit pattern.

    Returns:
        (significand, exponent), both int64, (rows,): SCALE_BITS wide with its leading one, and the exponent field with
        fp32's bias of 127, which may be above 254.  A row whose chosen features are all zero has the command's scale.
    """
    size = magnitudes(query, element)
    part, whole = size[:, features].sum(axis=1).tolist(), size.sum(axis=1).tolist()
    significand, field = dense.split_scale(scale_bits)
    significands, exponents = [], []
    for a, b in zip(part, whole, strict=True):
        product = significand * isqrt((b << 2 * RATIO_FRACTION) // a) if a else significand << RATIO_FRACTION
        bits = product.bit_length()
        significands.append(product >> (bits - SCALE_BITS))
        exponents.append(field + bits - SCALE_BITS - RATIO_FRACTION)
    return np.array(significands, np.int64), np.array(exponents, np.int64)


def feature_sums(
    query: Bits, key: Bits, features: Integers, exponent: Integers, element: Element
) -> tuple[Integers, Booleans]:
    """Feature pass: sum of q[c] * k[c] over the chosen features, each product truncated into the score window.

    `golden.scale_scores(sums, significand[:, None])` makes scores of them.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim); only the chosen features are looked at.
        features: int64, (r,), the chosen features.
        exponent: int64, (rows,), from `approximate_scales`.
        element: format of query and key.

    Returns:
        (sums int64, clipped bool), both (rows, tokens).
    """
    return dense.window_sums(query[:, features], key[:, features], element=element, exponent=exponent)


# Approximate softmax.


def log2(denominator: int) -> int:
    """log2 of a denominator, truncated to SCORE_FRACTION fractional bits by squaring a mantissa of LOG_BITS bits.

    Args:
        denominator: positive, VALUE_FRACTION fractional bits.
    """
    top = denominator.bit_length() - 1
    shift = LOG_BITS - 1 - top
    mantissa = denominator << shift if shift >= 0 else denominator >> -shift
    fraction = 0
    for _ in range(SCORE_FRACTION):
        square = mantissa * mantissa
        bit = square >> (2 * LOG_BITS - 1)
        mantissa = square >> (LOG_BITS - 1 + bit)
        fraction = fraction << 1 | bit
    return ((top - VALUE_FRACTION) << SCORE_FRACTION) + fraction


def references(maximum: Integers, denominator: Integers) -> Integers:
    """The score at which a row's approximate probability is 1: its maximum + log2(its denominator).

    Args:
        maximum: int64, (rows,), largest score of the first pass.
        denominator: int64, (rows,), sum of the first pass's weights; 0: the row attends nothing.

    Returns:
        int64, (rows,), at most SCORE_MAX, and not below any score of the row; 0 where the row attends nothing.
    """
    pairs = zip(maximum.tolist(), denominator.tolist(), strict=True)
    return np.array([min(top + log2(total), SCORE_MAX) if total else 0 for top, total in pairs], np.int64)


def probabilities(scores: Integers, reference: Integers) -> Integers:
    """2**(score - reference): the approximate softmax; zero where the score is SCORE_MASKED.

    Args:
        scores: int64, (rows, tokens).
        reference: int64, (rows,), from `references`.

    Returns:
        int64, (rows, tokens), VALUE_FRACTION fractional bits.
    """
    significand, exponent = dense.weights(scores, reference)
    result: Integers = significand << DENOMINATOR_SHIFT >> exponent
    return result


# Selection.


def masses(probability: Integers, unit_tokens: int) -> Integers:
    """Approximate mass of each unit: the sum over its tokens and over the rows, truncated and saturated.

    Args:
        probability: int64, (rows, units * unit_tokens), from `probabilities`; in CENTROID (rows, units).
        unit_tokens: tokens of a unit; in CENTROID 1, as one score stands for the unit.

    Returns:
        int64, (units,), MASS_FRACTION fractional bits, below FORCED.
    """
    total: Integers = probability.sum(axis=0).reshape(-1, unit_tokens).sum(axis=1)
    total >>= VALUE_FRACTION - MASS_FRACTION
    return np.minimum(total, FORCED - 1)


def ranks(mass: Integers, *, base_token: int, unit_tokens: int, local_token: int, sinks: int) -> Integers:
    """What units are chosen by: their mass, of equal ones the lower token; sinks and the local window above all.

    Args:
        mass: int64, (units,), from `masses`.
        base_token: first token of unit 0.
        unit_tokens: tokens of a unit.
        local_token: first token of the local window; end_token where there is none.
        sinks: first tokens of the sequence whose units come first, too.

    Returns:
        int64, (units,), all different, not negative, MASS_BITS + TOKEN_BITS wide.
    """
    first = base_token + np.arange(len(mass), dtype=np.int64) * unit_tokens
    mass = np.where((first + unit_tokens > local_token) | (first < sinks), FORCED, mass)
    result: Integers = mass << TOKEN_BITS | (~first & ((1 << TOKEN_BITS) - 1))
    return result


def select(rank: Integers, valid: Booleans, k: int) -> Booleans:
    """The k units of the largest rank, or all if there are fewer.

    Args:
        rank: int64, (units,), from `ranks`.
        valid: bool, (units,), which take part: those of stripes in flash with a token before the end.
        k: how many.

    Returns:
        bool, (units,).
    """
    chosen = valid.copy()
    if int(valid.sum()) > k:
        taken = rank[valid]
        chosen &= rank >= np.partition(taken, len(taken) - k)[len(taken) - k]
    return chosen


def alphas(probability: Integers, taken: Booleans, denominator: Integers) -> Integers:
    """Each row's alpha: the share of the tokens that are attended in the approximate softmax, rounded half up.

    Only for SPARF and FETCHED, and only if a unit is not selected; otherwise alpha is ALPHA_ONE.

    Args:
        probability: int64, (rows, tokens), from `probabilities`.
        taken: bool, (tokens,), tokens of selected units and of the tail.
        denominator: int64, (rows,), sum of the first pass's weights.

    Returns:
        int64, (rows,), ALPHA_FRACTION fractional bits; ALPHA_ONE where the row attends nothing.
    """
    total = probability[:, taken].sum(axis=1)
    drop = VALUE_FRACTION - ALPHA_FRACTION
    share = np.minimum((total + (1 << (drop - 1))) >> drop, ALPHA_ONE)
    result: Integers = np.where(denominator == 0, ALPHA_ONE, share)
    return result


def blend(alpha: int, quotient_bits: int, mean_bits: int) -> int:
    """The sum alpha * quotient + (1 - alpha) * mean, exactly, rounded once to fp32, ties to even.

    Args:
        alpha: 0 to ALPHA_ONE.
        quotient_bits: fp32 bit pattern, finite; subnormals count as zero.
        mean_bits: likewise.

    Returns:
        fp32 bit pattern: a normal number, or +0 where the rounded sum is below the least of them, 2**-126.
    """
    (a, x), (b, y) = _fp32(quotient_bits), _fp32(mean_bits)
    least = min(x, y)
    total = (alpha * a << (x - least)) + ((ALPHA_ONE - alpha) * b << (y - least))
    sign, size = (1 << 31, -total) if total < 0 else (0, total)
    drop = size.bit_length() - SCALE_BITS
    if drop > 0:
        kept, dropped, half = size >> drop, size & ((1 << drop) - 1), 1 << (drop - 1)
        kept += dropped > half or (dropped == half and kept & 1)
    else:
        kept = size << -drop
    # fp32 of kept * 2**(least + drop - ALPHA_FRACTION); the leading one of `kept` adds one to the exponent field.
    field = least + drop - ALPHA_FRACTION + (SCALE_BITS - 1) + 127
    result = ((field - 1) << (SCALE_BITS - 1)) + kept
    return sign | result if size and result >= 1 << (SCALE_BITS - 1) else 0


def _fp32(bits: int) -> tuple[int, int]:
    """(significand, power): the number is significand * 2**power; subnormals, infinity and NaN are zero."""
    hidden = 1 << (SCALE_BITS - 1)
    field = bits >> (SCALE_BITS - 1) & 0xFF
    significand = hidden | (bits & (hidden - 1)) if 0 < field < 0xFF else 0
    return -significand if bits >> 31 else significand, max(field, 1) - 127 - (SCALE_BITS - 1)


# Jobs.


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tokens of a job are grouped.

    Attributes:
        group_tokens: tokens of a stripe, `Config.group_tokens`.
        tokens_per_codeword: `Config.tokens_per_codeword`.
        mode: not DENSE.
        unit_bits: log2 of the codewords of a unit; 0 in SPARF.
    """

    group_tokens: int
    tokens_per_codeword: int
    mode: Mode
    unit_bits: int = 0

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit of selection."""
        return 1 if self.mode is Mode.SPARF else self.tokens_per_codeword << self.unit_bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class First:
    """The first pass of a job and what it selects.  "scored" is tokens in SPARF and FETCHED, units in CENTROID.

    Attributes:
        layout: of the job.
        base_token: number of the first token.
        end_token: one past the last valid token.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those that a command says.
        features: int64, (r,), ascending: features that the first pass reads; empty in CENTROID.
        scale_significand: int64, (rows,), of the approximate scale; the command's in CENTROID.
        scale_exponent: int64, (rows,), its exponent field.
        score_sums: int64, (rows, scored), SCORE_WINDOW_FRACTION fractional bits.
        clipped: bool, (rows, scored), a product was clipped.
        saturated: bool, (rows, scored), the score was clipped.
        attended: bool, (rows, scored), which row attends which; False in CENTROID for units of the tail.
        scores: int64, (rows, scored), SCORE_MASKED where not attended.
        maximum: int64, (rows,), SCORE_MASKED if the row attends nothing.
        denominator: int64, (rows,), VALUE_FRACTION fractional bits.
        reference: int64, (rows,), maximum + log2(denominator).
        probability: int64, (rows, scored), VALUE_FRACTION fractional bits.
        mass: int64, (units,), MASS_FRACTION fractional bits, without what is forced.
        rank: int64, (units,).
        valid: bool, (units,), units that take part in the ranking.
        selected: bool, (units,).
        taken: bool, (tokens,), tokens of selected units and of the tail, before end_token.
        alpha: int64, (rows,), ALPHA_FRACTION fractional bits.
        score_overflow: a product or an attended score was clipped in this pass.
        nan_key: the lowest token with a NaN or infinity in what this pass reads, or None.
    """

    layout: Layout
    base_token: int
    end_token: int
    tail: Booleans
    features: Integers
    scale_significand: Integers
    scale_exponent: Integers
    score_sums: Integers
    clipped: Booleans
    saturated: Booleans
    attended: Booleans
    scores: Integers
    maximum: Integers
    denominator: Integers
    reference: Integers
    probability: Integers
    mass: Integers
    rank: Integers
    valid: Booleans
    selected: Booleans
    taken: Booleans
    alpha: Integers
    score_overflow: bool
    nan_key: int | None

    @property
    def units(self) -> Integers:
        """Numbers of the selected units, ascending, counted from base_token."""
        return np.flatnonzero(self.selected)

    @property
    def codewords(self) -> Integers:
        """Codewords of K and of V that the second pass reads, ascending, counted from base_token."""
        return np.flatnonzero(self.taken.reshape(-1, self.layout.tokens_per_codeword).any(axis=1))

    @property
    def read(self) -> Booleans:
        """bool, (tokens,): tokens of these codewords, before end_token."""
        size = self.layout.tokens_per_codeword
        found = np.repeat(self.taken.reshape(-1, size).any(axis=1), size)
        found[max(self.end_token - self.base_token, 0) :] = False
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseTrace:
    """Everything that a sparse job computes.

    Attributes:
        first: first pass and selection.
        exact: second pass over all tokens of the job: attended is the row's mask and the selection.  Of tokens that are
            not read score_sums is 0, and score_overflow False.  output is that before the blend, and flags, nan_key and
            nan_value are of this pass alone.
        output: uint32, (rows, head_dim), fp32 bit patterns.
        nan_query: row * 65536 + feature of the first NaN or infinity in q, or None.
        nan_mean: feature of the first NaN or infinity in the mean of V, or None.
        nan_key: the lowest token with a NaN or infinity in what was read of K, in either pass, or None.
        nan_value: the lowest token with a NaN or infinity in what was read of V, or None.
        flags: of both passes.
    """

    first: First
    exact: dense.Trace
    output: NDArray[np.uint32]
    nan_query: int | None
    nan_mean: int | None
    nan_key: int | None
    nan_value: int | None
    flags: CompletionFlag

    @property
    def maximum(self) -> Integers:
        """int64, (rows,), largest score of the second pass."""
        return self.exact.maximum

    @property
    def denominator(self) -> Integers:
        """int64, (rows,), sum of the weights of the second pass."""
        return self.exact.denominator


def _lowest(*tokens: int | None) -> int | None:
    return min((token for token in tokens if token is not None), default=None)


def _first_token(bits: Bits, numbers: Integers, element: Element, end_token: int) -> int | None:
    """The lowest number before end_token whose bits have a NaN or infinity; numbers: int64, (tokens,)."""
    if not len(bits):
        return None
    found = numbers[special(bits, element).any(axis=1) & (numbers < end_token)]
    return int(found.min()) if len(found) else None


def first_pass(
    query: Bits,
    key: Bits,
    *,
    sketch: Bits | None = None,
    layout: Layout,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
    tail: Booleans,
    features: int,
    top_units: int,
    local_tokens: int,
    sinks: int = 0,
) -> First:
    """First pass of a sparse job, and the selection.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim), whole stripes from base_token on.  SPARF and FETCHED look at the tokens of the
            tail only, CENTROID at none.
        sketch: SPARF, FETCHED: uint16, (tokens, head_dim), K as the feature layout has it, of which the chosen features
            of stripes in flash are looked at; `key` if None.  CENTROID: uint16, (units, head_dim), the units' mean
            keys, of which those of stripes in flash are looked at.
        layout: mode and geometry.
        element: storage format of the three.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
        tree_token: first token of the draft tree; end_token where there is none.
        base_token: number of the first token given.
        end_token: one past the last valid token.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those that a command says.
        features: how many the first pass reads, 1 to head_dim; 0 in CENTROID.
        top_units: units to select, at least 1.
        local_tokens: newest tokens whose units come first.
        sinks: first tokens of the sequence (from token 0 on) whose units come first, too.

    Raises:
        RequestError: a type or shape is wrong, or a number is out of range.
    """
    start, end, tree, tail = _check(query, key, layout, scale_bits, start, end, tree, base_token, end_token, tail)
    tokens, head_dim = key.shape
    unit_tokens, flash = layout.unit_tokens, ~tail
    centroids = layout.mode is Mode.CENTROID
    if top_units < 1:
        raise RequestError(f"top_units must be at least 1, not {top_units}")
    if not (features == 0 if centroids else 1 <= features <= head_dim):
        raise RequestError(f"features must be {0 if centroids else f'1 to {head_dim}'} in this mode, not {features}")
    shape = (tokens // unit_tokens if centroids else tokens, head_dim)
    if sketch is None and not centroids:
        sketch = key
    if not isinstance(sketch, np.ndarray) or sketch.dtype != np.uint16 or sketch.shape != shape:
        raise RequestError(f"sketch must be a uint16 array of shape {shape}")

    rows = len(query)
    significand, exponent = (np.full(rows, part, np.int64) for part in dense.split_scale(scale_bits))
    chosen = np.zeros(0, np.int64)
    sums = np.zeros((rows, len(sketch)), np.int64)
    clipped, saturated = np.zeros((2, *sums.shape), np.bool_)
    scores = np.zeros_like(sums)
    limits: dict[str, Any] = {"tree_token": tree_token, "base_token": base_token, "end_token": end_token}
    numbers = base_token + np.arange(tokens, dtype=np.int64)
    # Token numbers and places (in `sketch`) of what is read of flash.
    if centroids:
        numbers = numbers[::unit_tokens]
        in_flash = np.repeat(flash, layout.group_tokens // unit_tokens)
        mask = dense.attended(start, end, tree, unit_tokens=unit_tokens, tokens=len(sketch), **limits) & in_flash
        sums[:, in_flash], clipped[:, in_flash] = dense.score_sums(
            query, sketch[in_flash], element=element, scale_bits=scale_bits)
        scores, saturated = dense.round_scores(sums, scale_bits)
        overflow = bool(((clipped | saturated) & mask).any())
        nan_key = _first_token(sketch[in_flash], numbers[in_flash], element, end_token)
    else:
        in_flash = np.repeat(flash, layout.group_tokens)
        mask = dense.attended(start, end, tree, tokens=tokens, **limits)
        chosen = top_features(query, features, element)
        significand, exponent = approximate_scales(query, chosen, element, scale_bits)
        sketch = sketch[in_flash]
        sums[:, in_flash], clipped[:, in_flash] = feature_sums(query, sketch, chosen, exponent, element)
        scores[:, in_flash], saturated[:, in_flash] = dense.scale_scores(sums[:, in_flash], significand[:, None])
        # Of the feature layout every token of a codeword counts, also those that no row attends.
        overflow = bool(clipped.any())
        nan_key = _first_token(sketch[:, chosen], numbers[in_flash], element, end_token)
        if tail.any():
            sums[:, ~in_flash], clipped[:, ~in_flash] = dense.score_sums(
                query, key[~in_flash], element=element, scale_bits=scale_bits)
            scores[:, ~in_flash], saturated[:, ~in_flash] = dense.round_scores(sums[:, ~in_flash], scale_bits)
            nan_key = _lowest(nan_key, _first_token(key[~in_flash], numbers[~in_flash], element, end_token))
        overflow = overflow or bool(((clipped | saturated) & mask).any())

    scores[~mask] = SCORE_MASKED
    maximum = scores.max(axis=1, initial=SCORE_MASKED)
    denominator = dense.denominators(*dense.weights(scores, maximum))
    reference = references(maximum, denominator)
    probability = probabilities(scores, reference)

    mass = masses(probability, 1 if centroids else unit_tokens)
    rank = ranks(mass, base_token=base_token, unit_tokens=unit_tokens, local_token=max(end_token - local_tokens, 0),
                 sinks=sinks)
    first = base_token + np.arange(len(mass), dtype=np.int64) * unit_tokens
    valid = np.repeat(flash, layout.group_tokens // unit_tokens) & (first < end_token)
    selected = select(rank, valid, top_units)
    taken = np.repeat(selected, unit_tokens) | np.repeat(tail, layout.group_tokens)
    taken[max(end_token - base_token, 0) :] = False
    alpha = np.full(rows, ALPHA_ONE, np.int64)
    if not centroids and (valid & ~selected).any():
        alpha = alphas(probability, taken, denominator)
    return First(
        layout=layout, base_token=base_token, end_token=end_token, tail=tail, features=chosen,
        scale_significand=significand, scale_exponent=exponent, score_sums=sums, clipped=clipped, saturated=saturated,
        attended=mask, scores=scores, maximum=maximum, denominator=denominator, reference=reference,
        probability=probability, mass=mass, rank=rank, valid=valid, selected=selected, taken=taken, alpha=alpha,
        score_overflow=overflow, nan_key=nan_key)


def second_pass(
    first: First,
    query: Bits,
    key: Bits,
    value: Bits,
    *,
    mean: NDArray[np.uint32] | None,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
) -> SparseTrace:
    """Second pass of a sparse job: exact attention over the selection, and the blend.

    Args:
        first: from `first_pass`.
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim); only tokens of `first.codewords` are looked at.
        value: uint16, (tokens, head_dim); likewise.
        mean: SPARF, FETCHED: uint32, (head_dim,), fp32 bit patterns of the mean of V; CENTROID: None.
        element: storage format.
        scale_bits: as in `first_pass`, and so are the others.
        start: integers, (rows,).
        end: integers, (rows,).
        tree: integers, (rows,).
        tree_token: first token of the draft tree.

    Raises:
        RequestError: a type or shape is wrong.
    """
    base_token, end_token = first.base_token, first.end_token
    start, end, tree, _ = _check(
        query, key, first.layout, scale_bits, start, end, tree, base_token, end_token, first.tail)
    rows, head_dim = query.shape
    tokens = len(key)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint16 or value.shape != key.shape:
        raise RequestError(f"value must be a uint16 array of shape {key.shape}")
    if first.layout.mode is Mode.CENTROID:
        if mean is not None:
            raise RequestError("CENTROID takes no mean")
    elif not isinstance(mean, np.ndarray) or mean.dtype != np.uint32 or mean.shape != (head_dim,):
        raise RequestError(f"mean must be a uint32 array of shape {(head_dim,)}")

    read = first.read
    key, value, numbers = key[read], value[read], base_token + np.flatnonzero(read)
    limits: dict[str, Any] = {"tree_token": tree_token, "base_token": base_token, "end_token": end_token}
    mask = dense.attended(start, end, tree, tokens=tokens, **limits) & first.taken
    seen = dense.attend_masked(query, key, value, mask[:, read], element=element, scale_bits=scale_bits)

    def everywhere(values: NDArray[Any], rest: int = 0) -> NDArray[Any]:
        whole = np.full((rows, tokens), rest, values.dtype)
        whole[:, read] = values
        return whole

    exact = replace(
        seen, attended=mask, score_sums=everywhere(seen.score_sums), score_overflow=everywhere(seen.score_overflow),
        scores=everywhere(seen.scores, SCORE_MASKED), weight_significand=everywhere(seen.weight_significand),
        weight_exponent=everywhere(seen.weight_exponent), nan_key=_first_token(key, numbers, element, end_token),
        nan_value=_first_token(value, numbers, element, end_token))

    output, nan_mean = exact.output, None
    if mean is not None:
        bad = (mean & np.uint32(FP32_SPECIAL)) == FP32_SPECIAL
        nan_mean = int(bad.argmax()) if bad.any() else None
        output = exact.output.copy()
        for r, alpha in enumerate(first.alpha.tolist()):
            # An alpha of 1 leaves the quotient as it is: zero or a normal number.
            if alpha != ALPHA_ONE:
                output[r] = [blend(alpha, *pair) for pair in zip(exact.output[r].tolist(), mean.tolist(), strict=True)]
    return SparseTrace(
        first=first, exact=exact, output=output, nan_query=exact.nan_query, nan_mean=nan_mean,
        nan_key=_lowest(first.nan_key, exact.nan_key), nan_value=exact.nan_value,
        flags=exact.flags | (CompletionFlag.SCORE_OVERFLOW if first.score_overflow else CompletionFlag(0)))


def attend_sparse(
    query: Bits,
    key: Bits,
    value: Bits,
    *,
    mode: Mode,
    group_tokens: int,
    tokens_per_codeword: int,
    features: int = 0,
    top_units: int,
    local_tokens: int = 0,
    sinks: int = 0,
    unit_bits: int = 0,
    mean: NDArray[np.uint32] | None = None,
    sketch: Bits | None = None,
    tail: Booleans,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> SparseTrace:
    """Attention of one sparse job, bit for bit as the engine computes it.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim), whole stripes from base_token on.
        value: uint16, (tokens, head_dim).
        mode: SPARF, FETCHED or CENTROID.
        group_tokens: tokens of a stripe (`Config.group_tokens`).
        tokens_per_codeword: `Config.tokens_per_codeword`.
        features: SPARF, FETCHED: how many the first pass reads.
        top_units: units to select; those of the tail come on top.
        local_tokens: newest tokens whose units come first.
        sinks: first tokens of the sequence whose units come first, too.
        unit_bits: FETCHED, CENTROID: log2 of a unit's codewords.
        mean: SPARF, FETCHED: uint32, (head_dim,), fp32 bit patterns of the mean of V.
        sketch: CENTROID: uint16, (units, head_dim), mean keys of all units (anything for those of the tail); in the
            other modes what the feature layout has, if that is not `key`.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those that a command says.
        element: storage format.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
        tree_token: first token of the draft tree; end_token where there is none.
        base_token: number of the first token given.
        end_token: one past the last valid token.

    Raises:
        RequestError: a type or shape is wrong, or a number is out of range.
    """
    layout = Layout(
        group_tokens=group_tokens, tokens_per_codeword=tokens_per_codeword, mode=Mode(mode), unit_bits=unit_bits)
    job: dict[str, Any] = {
        "element": element, "scale_bits": scale_bits, "start": start, "end": end, "tree": tree,
        "tree_token": tree_token}
    first = first_pass(
        query, key, sketch=sketch, layout=layout, base_token=base_token, end_token=end_token, tail=tail,
        features=features, top_units=top_units, local_tokens=local_tokens, sinks=sinks, **job)
    return second_pass(first, query, key, value, mean=mean, **job)


def _check(
    query: Bits, key: Bits, layout: Layout, scale_bits: int, start: NDArray[Any], end: NDArray[Any],
    tree: NDArray[Any], base_token: int, end_token: int, tail: Booleans,
) -> tuple[Integers, Integers, Integers, Booleans]:
    """The masks as int64 and the tail as bool, if everything fits together."""
    for name, array in (("query", query), ("key", key)):
        dense.check_bits(name, array)
    if key.shape[1] != query.shape[1]:
        raise RequestError(f"key must be (tokens, {query.shape[1]}), not {key.shape}")
    if layout.mode is Mode.DENSE:
        raise RequestError("mode must not be DENSE: see kvattic.golden.dense.attend")
    if layout.unit_bits < 0 or layout.group_tokens % layout.unit_tokens:
        raise RequestError(f"unit_bits must be such that units fill a stripe, not {layout.unit_bits}")
    if layout.mode is Mode.SPARF and layout.unit_bits:
        raise RequestError(f"unit_bits must be 0 in SPARF, not {layout.unit_bits}")
    tail = np.asarray(tail)
    if tail.dtype != np.bool_ or tail.shape != (len(key) // layout.group_tokens,) or len(key) % layout.group_tokens:
        raise RequestError(f"key must be whole stripes of {layout.group_tokens} tokens, and tail one bool for each")
    start, end, tree = dense.check_job(
        scale_bits, base_token, end_token, len(key), len(query), start=start, end=end, tree=tree)
    return start, end, tree, tail
