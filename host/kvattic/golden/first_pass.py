"""Golden model of a sparse job's first pass: what it scores, and which units it selects.

Integers only, bit for bit as the hardware computes them; docs/sparse.md says what is computed and docs/numerics.md,
section 7, why.  `first_pass` runs the whole pass.  Its steps stand alone, too: `magnitudes`, `top_features`,
`approximate_scales`, `feature_sums`, `code_entries`, `code_sums`, `log2`, `references`, `probabilities`, `masses`,
`ranks`, `select`, `alphas`.

Shapes are named (rows, tokens, head_dim), where the tokens are those of all stripes of the job, whole stripes from
base_token on; a unit of selection is `unit_tokens` of them, and unit u begins with token base_token + u * unit_tokens.
Elements are uint16 bit patterns, intermediates int64.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.golden import dense
from kvattic.spec.blocks import Masks
from kvattic.spec.codes import KeyCodes
from kvattic.spec.commands import Mode
from kvattic.spec.elements import Bits, Booleans, Integers, special
from kvattic.spec.formats import (
    ALPHA_FRACTION,
    CODES_BITS,
    CODES_LIMIT,
    CODES_SHIFT,
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
    WEIGHT_ALIGNMENT,
    Element,
)
from kvattic.spec.layout import TOKEN_BITS

__all__ = [
    "ALPHA_ONE",
    "FORCED",
    "FirstPass",
    "Layout",
    "alphas",
    "approximate_scales",
    "attended_by",
    "check_job",
    "code_entries",
    "code_sums",
    "feature_sums",
    "first_pass",
    "first_special_token",
    "log2",
    "lowest",
    "magnitudes",
    "masses",
    "probabilities",
    "ranks",
    "references",
    "select",
    "top_features",
]

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


# Codes.


def code_entries(
    query: Bits, codes: KeyCodes, *, element: Element, scale_bits: int
) -> tuple[Integers, Booleans]:
    """What the codes of each pair of neighbouring features add to a score sum: q * base + q * step * code of both.

    Each product is truncated into the score window, then cut to CODES_FRACTION fractional bits, both towards zero, and
    clipped at CODES_LIMIT.  Codes of features of 1 bit have entries for 2 and 3, too.

    Args:
        query: uint16, (rows, head_dim).
        codes: their levels are looked at.
        element: format of query and levels.
        scale_bits: fp32 bit pattern of the scale; only its exponent is used here.

    Returns:
        (entries int64, (rows, stripes, head_dim / 2, 16), in CODES_BITS two's complement, of the codes c0 of the first
        and c1 of the second feature at 4 * c0 + c1; clipped bool, (rows, stripes): a product was clipped, or an entry
        does not fit and was wrapped).
    """
    exponent = dense.split_scale(scale_bits)[1]
    parts, clipped = [], np.zeros((len(query), len(codes.base)), np.bool_)
    for levels in (codes.base, codes.step):
        product, beyond = dense.window_products(query, levels, element=element, exponent=exponent)
        size = np.abs(product) >> CODES_SHIFT
        clipped |= (beyond | (size > CODES_LIMIT)).any(axis=2)
        parts.append(np.sign(product) * np.minimum(size, CODES_LIMIT))
    base, step = parts
    code = np.arange(4)
    each = base[..., None] + step[..., None] * code
    pairs = each[:, :, ::2, :, None] + each[:, :, 1::2, None, :]
    entries: Integers = pairs.reshape(*pairs.shape[:3], 16)
    wrapped = (entries + (1 << CODES_BITS - 1) & (1 << CODES_BITS) - 1) - (1 << CODES_BITS - 1)
    clipped |= (wrapped != entries).any(axis=(2, 3))
    return wrapped, clipped


def code_sums(entries: Integers, codes: KeyCodes) -> Integers:
    """Score sums of the tokens of whole stripes: the sum of their codes' entries.

    Args:
        entries: from `code_entries`.
        codes: their codes are looked at.

    Returns:
        int64, (rows, tokens), SCORE_WINDOW_FRACTION fractional bits.
    """
    rows, stripes, pairs, _ = entries.shape
    place = codes.codes[:, ::2].astype(np.int64) * 4 + codes.codes[:, 1::2]
    place = place.reshape(stripes, len(place) // max(stripes, 1), pairs)
    sums = np.empty((rows, *place.shape[:2]), np.int64)
    each = np.arange(pairs)
    for stripe in range(stripes):
        sums[:, stripe] = entries[:, stripe, each, place[stripe]].sum(axis=-1)
    return sums.reshape(rows, len(codes.codes)) << CODES_SHIFT


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
    result: Integers = significand << WEIGHT_ALIGNMENT >> exponent
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

    Only for the blended modes, and only if a unit is not selected; otherwise alpha is ALPHA_ONE.

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


# The pass.


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tokens of a job are grouped.

    Attributes:
        group_tokens: tokens of a stripe, `Config.group_tokens`.
        tokens_per_codeword: `Config.tokens_per_codeword`.
        mode: not DENSE.
        unit_bits: log2 of the codewords of a unit; 0 in SPARF and CODES.
    """

    group_tokens: int
    tokens_per_codeword: int
    mode: Mode
    unit_bits: int = 0

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit of selection."""
        return 1 if self.mode.by_token else self.tokens_per_codeword << self.unit_bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstPass:
    """What the first pass of a job computes and selects.  "scored" is units in CENTROID, else tokens.

    Attributes:
        layout: of the job.
        base_token: number of the first token.
        end_token: one past the last valid token.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those marked so.
        features: int64, (r,), ascending: features that the first pass reads; empty in CENTROID and CODES.
        scale_significand: int64, (rows,), of the approximate scale; the command's in CENTROID and CODES.
        scale_exponent: int64, (rows,), its exponent field.
        score_sums: int64, (rows, scored), SCORE_WINDOW_FRACTION fractional bits.
        clipped: bool, (rows, scored), a product was clipped; in CODES also of all tokens of the stripe.
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


def attended_by(masks: Masks, *, base_token: int, end_token: int, tokens: int, unit_tokens: int = 1) -> Booleans:
    """See `dense.attended`."""
    return dense.attended(
        masks.start, masks.end, masks.tree, tree_token=masks.tree_token, base_token=base_token, end_token=end_token,
        tokens=tokens, unit_tokens=unit_tokens)


class _Scored(NamedTuple):
    """What the first pass scores: see the attributes of `FirstPass`."""

    features: Integers
    scale_significand: Integers
    scale_exponent: Integers
    score_sums: Integers
    clipped: Booleans
    saturated: Booleans
    attended: Booleans
    scores: Integers
    score_overflow: bool
    nan_key: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """Checked arguments of `first_pass`."""

    query: Bits
    key: Bits
    layout: Layout
    element: Element
    scale_bits: int
    masks: Masks
    base_token: int
    end_token: int
    flash: Booleans

    def attended(self, tokens: int, unit_tokens: int = 1) -> Booleans:
        """bool, (rows, tokens): which row attends which token, or which unit."""
        return attended_by(
            self.masks, base_token=self.base_token, end_token=self.end_token, tokens=tokens, unit_tokens=unit_tokens)


def lowest(*tokens: int | None) -> int | None:
    """The lowest of some tokens; None stands for no token."""
    return min((token for token in tokens if token is not None), default=None)


def first_special_token(bits: Bits, numbers: Integers, element: Element, end_token: int) -> int | None:
    """The lowest token before end_token with a NaN or infinity.

    Args:
        bits: uint16, (tokens, head_dim).
        numbers: int64, (tokens,), their numbers.
        element: format of bits.
        end_token: one past the last valid token.
    """
    if not len(bits):
        return None
    found = numbers[special(bits, element).any(axis=1) & (numbers < end_token)]
    return int(found.min()) if len(found) else None


def _score_centroids(job: _Job, sketch: Bits) -> _Scored:
    """CENTROID: the score of each unit's mean key, with the command's scale; units of the tail are not attended."""
    unit_tokens, rows = job.layout.unit_tokens, len(job.query)
    significand, exponent = (np.full(rows, part, np.int64) for part in dense.split_scale(job.scale_bits))
    in_flash = np.repeat(job.flash, job.layout.group_tokens // unit_tokens)
    numbers = job.base_token + np.arange(len(sketch), dtype=np.int64) * unit_tokens
    mask = job.attended(len(sketch), unit_tokens) & in_flash
    sums = np.zeros((rows, len(sketch)), np.int64)
    clipped = np.zeros(sums.shape, np.bool_)
    sums[:, in_flash], clipped[:, in_flash] = dense.score_sums(
        job.query, sketch[in_flash], element=job.element, scale_bits=job.scale_bits)
    scores, saturated = dense.round_scores(sums, job.scale_bits)
    return _Scored(
        np.zeros(0, np.int64), significand, exponent, sums, clipped, saturated, mask, scores,
        bool(((clipped | saturated) & mask).any()),
        first_special_token(sketch[in_flash], numbers[in_flash], job.element, job.end_token))


def _score_features(job: _Job, sketch: Bits, features: int) -> _Scored:
    """SPARF, FETCHED: approximate scores of tokens in flash, exact ones of the tail's."""
    chosen = top_features(job.query, features, job.element)
    significand, exponent = approximate_scales(job.query, chosen, job.element, job.scale_bits)
    in_flash = np.repeat(job.flash, job.layout.group_tokens)
    numbers = job.base_token + np.arange(len(job.key), dtype=np.int64)
    mask = job.attended(len(job.key))
    sums, scores = np.zeros((2, len(job.query), len(job.key)), np.int64)
    clipped, saturated = np.zeros((2, *sums.shape), np.bool_)
    sketch = sketch[in_flash]
    sums[:, in_flash], clipped[:, in_flash] = feature_sums(job.query, sketch, chosen, exponent, job.element)
    scores[:, in_flash], saturated[:, in_flash] = dense.scale_scores(sums[:, in_flash], significand[:, None])
    # In the feature layout every token of a codeword counts, even if no row attends it.
    overflow = bool(clipped.any())
    nan_key = first_special_token(sketch[:, chosen], numbers[in_flash], job.element, job.end_token)
    if not in_flash.all():
        tail = ~in_flash
        sums[:, tail], clipped[:, tail], scores[:, tail], saturated[:, tail] = _score_exactly(job, tail)
        nan_key = lowest(nan_key, first_special_token(job.key[tail], numbers[tail], job.element, job.end_token))
    overflow = overflow or bool(((clipped | saturated) & mask).any())
    return _Scored(chosen, significand, exponent, sums, clipped, saturated, mask, scores, overflow, nan_key)


def _score_exactly(job: _Job, tokens: Booleans) -> tuple[Integers, Booleans, Integers, Booleans]:
    """Exact scores of some tokens: (sums, clipped, scores, saturated), all (rows, tokens)."""
    sums, clipped = dense.score_sums(job.query, job.key[tokens], element=job.element, scale_bits=job.scale_bits)
    return sums, clipped, *dense.round_scores(sums, job.scale_bits)


def _score_codes(job: _Job, codes: KeyCodes, sinks: int) -> _Scored:
    """CODES: approximate scores of tokens in flash by their codes, exact ones of the tail's and of sinks."""
    size, rows = job.layout.group_tokens, len(job.query)
    significand, exponent = (np.full(rows, part, np.int64) for part in dense.split_scale(job.scale_bits))
    numbers = job.base_token + np.arange(len(job.key), dtype=np.int64)
    mask = job.attended(len(job.key))
    in_flash = np.repeat(job.flash, size)
    coded = KeyCodes(base=codes.base[job.flash], step=codes.step[job.flash], codes=codes.codes[in_flash])
    entries, clipped_codes = code_entries(job.query, coded, element=job.element, scale_bits=job.scale_bits)
    sums = np.zeros((rows, len(job.key)), np.int64)
    clipped = np.zeros(sums.shape, np.bool_)
    sums[:, in_flash], clipped[:, in_flash] = code_sums(entries, coded), np.repeat(clipped_codes, size, axis=1)
    scores, saturated = dense.round_scores(sums, job.scale_bits)
    # As in the feature layout every token of a codeword counts, even if no row attends it.
    overflow = bool(clipped_codes.any())
    levels = special(np.concatenate([coded.base, coded.step], axis=1), job.element).any(axis=1)
    nan_key = lowest(*numbers[::size][job.flash][levels].tolist())

    exact = ~in_flash
    if job.base_token == 0 and job.flash[:1].any():
        # Whole codewords, as they are read.
        exact[: -(-sinks // job.layout.tokens_per_codeword) * job.layout.tokens_per_codeword] = True
    if exact.any():
        sums[:, exact], clipped[:, exact], scores[:, exact], saturated[:, exact] = _score_exactly(job, exact)
        nan_key = lowest(nan_key, first_special_token(job.key[exact], numbers[exact], job.element, job.end_token))
    overflow = overflow or bool(((clipped | saturated) & mask).any())
    return _Scored(np.zeros(0, np.int64), significand, exponent, sums, clipped, saturated, mask, scores, overflow,
                   nan_key)


def first_pass(
    query: Bits,
    key: Bits,
    *,
    sketch: Bits | KeyCodes | None = None,
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
) -> FirstPass:
    """First pass of a sparse job, and the selection.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim), whole stripes from base_token on.  SPARF and FETCHED look at the tokens of the
            tail only, CODES also at sinks, CENTROID at none.
        sketch: SPARF, FETCHED: uint16, (tokens, head_dim), K as the feature layout has it, of which the chosen features
            of stripes in flash are looked at; `key` if None.  CENTROID: uint16, (units, head_dim), the units' mean
            keys, of which those of stripes in flash are looked at.  CODES: the codes of all stripes, of which those of
            stripes in flash are looked at.
        layout: mode and geometry.
        element: storage format of the three.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
        tree_token: first token of the draft tree; end_token where there is none.
        base_token: number of the first token given.
        end_token: one past the last valid token.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those marked so.
        features: how many the first pass reads, 1 to head_dim; 0 in CENTROID and CODES.
        top_units: units to select, at least 1.
        local_tokens: newest tokens whose units come first.
        sinks: first tokens of the sequence (from token 0 on) whose units come first, too; in CODES at most half of a
            stripe, and scored exactly.

    Raises:
        RequestError: a type or shape is wrong, or a number is out of range.
    """
    masks, tail = check_job(
        query, key, tail, layout=layout, scale_bits=scale_bits, start=start, end=end, tree=tree, tree_token=tree_token,
        base_token=base_token, end_token=end_token)
    if top_units < 1:
        raise RequestError(f"top_units must be at least 1, not {top_units}")
    head_dim, featured = key.shape[1], layout.mode.featured
    if not (1 <= features <= head_dim if featured else features == 0):
        raise RequestError(f"features must be {f'1 to {head_dim}' if featured else 0} in this mode, not {features}")
    if layout.mode is Mode.CODES and sinks > layout.group_tokens // 2:
        raise RequestError(f"sinks must be at most half a stripe, {layout.group_tokens // 2}, in CODES, not {sinks}")
    job = _Job(
        query=query, key=key, layout=layout, element=element, scale_bits=scale_bits, masks=masks, base_token=base_token,
        end_token=end_token, flash=~tail)

    scored = _score(job, sketch, features, sinks)
    scores = scored.scores
    scores[~scored.attended] = SCORE_MASKED
    maximum = scores.max(axis=1, initial=SCORE_MASKED)
    denominator = dense.denominators(*dense.weights(scores, maximum))
    reference = references(maximum, denominator)
    probability = probabilities(scores, reference)

    unit_tokens = layout.unit_tokens
    mass = masses(probability, 1 if layout.mode is Mode.CENTROID else unit_tokens)
    rank = ranks(mass, base_token=base_token, unit_tokens=unit_tokens, local_token=max(end_token - local_tokens, 0),
                 sinks=sinks)
    unit_token = base_token + np.arange(len(mass), dtype=np.int64) * unit_tokens
    valid = np.repeat(job.flash, layout.group_tokens // unit_tokens) & (unit_token < end_token)
    selected = select(rank, valid, top_units)
    taken = np.repeat(selected, unit_tokens) | np.repeat(tail, layout.group_tokens)
    taken[max(end_token - base_token, 0) :] = False
    alpha = np.full(len(query), ALPHA_ONE, np.int64)
    if layout.mode.blended and (valid & ~selected).any():
        alpha = alphas(probability, taken, denominator)
    return FirstPass(
        layout=layout, base_token=base_token, end_token=end_token, tail=tail, maximum=maximum, denominator=denominator,
        reference=reference, probability=probability, mass=mass, rank=rank, valid=valid, selected=selected, taken=taken,
        alpha=alpha, **scored._asdict())


def _score(job: _Job, sketch: Bits | KeyCodes | None, features: int, sinks: int) -> _Scored:
    """What the mode's first pass scores, by the sketch that it reads."""
    mode, (tokens, head_dim) = job.layout.mode, job.key.shape
    if mode is Mode.CODES:
        levels = (tokens // job.layout.group_tokens, head_dim)
        shapes = (levels, levels, (tokens, head_dim))
        if not isinstance(sketch, KeyCodes) or (
                sketch.base.shape, sketch.step.shape, sketch.codes.shape) != shapes:
            raise RequestError(f"sketch must be KeyCodes of {levels[0]} stripes of {head_dim} features")
        return _score_codes(job, sketch, sinks)
    if sketch is None and mode.featured:
        sketch = job.key
    shape = (tokens if mode.featured else tokens // job.layout.unit_tokens, head_dim)
    if not isinstance(sketch, np.ndarray) or sketch.dtype != np.uint16 or sketch.shape != shape:
        raise RequestError(f"sketch must be a uint16 array of shape {shape}")
    return _score_features(job, sketch, features) if mode.featured else _score_centroids(job, sketch)


def check_job(
    query: Bits, key: Bits, tail: Booleans, *, layout: Layout, scale_bits: int, start: NDArray[Any],
    end: NDArray[Any], tree: NDArray[Any], tree_token: int, base_token: int, end_token: int,
) -> tuple[Masks, Booleans]:
    """The masks with int64 arrays and the tail as bool, if the arguments fit together; they are those of `first_pass`.

    Raises:
        RequestError: a type or shape is wrong, or a number is out of range.
    """
    for name, array in (("query", query), ("key", key)):
        dense.check_bits(name, array)
    if key.shape[1] != query.shape[1]:
        raise RequestError(f"key must be (tokens, {query.shape[1]}), not {key.shape}")
    if layout.mode is Mode.DENSE:
        raise RequestError("mode must not be DENSE: see kvattic.golden.dense.attend")
    if layout.unit_bits < 0 or layout.group_tokens % layout.unit_tokens:
        raise RequestError(f"unit_bits must be such that units fill a stripe, not {layout.unit_bits}")
    if layout.mode.by_token and layout.unit_bits:
        raise RequestError(f"unit_bits must be 0 in {layout.mode.name}, not {layout.unit_bits}")
    tail = np.asarray(tail)
    if tail.dtype != np.bool_ or tail.shape != (len(key) // layout.group_tokens,) or len(key) % layout.group_tokens:
        raise RequestError(f"key must be whole stripes of {layout.group_tokens} tokens, and tail one bool for each")
    start, end, tree = dense.check_job(
        scale_bits, base_token, end_token, len(key), len(query), start=start, end=end, tree=tree)
    return Masks(start, end, tree, tree_token), tail
