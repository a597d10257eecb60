"""Golden model: one job (one KV head, some query rows), bit for bit as the hardware computes it.

Integers only; docs/numerics.md explains each step.  `attend` runs the whole job.  The steps stand alone, too, so that
tests of the RTL can drive each of them: `decode`, `score_sums`, `round_scores`, `attended`, `weights`, `denominators`,
`value_sums`, `divide`.  `kvattic.golden.first_pass` and `kvattic.golden.sparse` have the sparse modes.

Shapes are named (rows, tokens, head_dim).  Elements are uint16 bit patterns, intermediates int64.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.merge import Partial
from kvattic.spec.commands import TREE_BITS, CompletionFlag, is_positive_normal
from kvattic.spec.elements import Bits, Booleans, Integers, special
from kvattic.spec.formats import (
    EXP_STEP_BITS,
    FP32_BIAS,
    SCALE_BITS,
    SCALE_CHUNK_BITS,
    SCALED_SUM_BITS,
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_MIN,
    SCORE_ROUND_SHIFT,
    SIGNIFICAND_BITS,
    WEIGHT_ALIGNMENT,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
    WEIGHT_ROUND_SHIFT,
    Element,
    exp_table,
)

__all__ = [
    "LOW_BITS",
    "Decoded",
    "Trace",
    "attend",
    "attend_masked",
    "attended",
    "check_bits",
    "check_job",
    "decode",
    "denominators",
    "divide",
    "first_special",
    "round_scores",
    "scale_scores",
    "score_sums",
    "split_scale",
    "value_sums",
    "weights",
    "window_products",
    "window_sums",
]

SHIFT_MAX = 63
"""Largest right shift of the cell; the window is narrower, so this and all beyond give zero."""
LOW_BITS = 32
"""An accumulator is high * 2**LOW_BITS + low with 0 <= low < 2**LOW_BITS."""

_BLOCK_ELEMENTS = 1 << 15
"""Elements processed at a time: a few int64 arrays of this size fit the second-level cache."""


class Decoded(NamedTuple):
    """Elements in the form that the cells use; every array has the shape of the input.

    Members:
        negative: bool, the sign bit.
        significand: uint16, `SIGNIFICAND_BITS` wide; zero for NaN and infinity.
        exponent: uint16, the exponent field, 1 for subnormals.
        special: whether any element is NaN or infinity.
    """

    negative: Booleans
    significand: NDArray[np.uint16]
    exponent: NDArray[np.uint16]
    special: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Everything that a job computes, in the order of the hardware.

    Attributes:
        score_sums: int64, (rows, tokens), sums of the window products, with
            SCORE_WINDOW_FRACTION fractional bits.
        score_overflow: bool, (rows, tokens), a product or the score was clipped (also where the
            token is not attended).
        attended: bool, (rows, tokens).
        scores: int64, (rows, tokens), SCORE_FRACTION fractional bits; SCORE_MASKED where not
            attended.
        maximum: int64, (rows,), largest score, SCORE_MASKED if the row attends nothing.
        weight_significand: int64, (rows, tokens), 1.21 fixed point; 0: weight zero.
        weight_exponent: int64, (rows, tokens), the weight is
            significand * 2**-(exponent + WEIGHT_BITS - 1).
        denominator: int64, (rows,), VALUE_FRACTION fractional bits.
        accumulator_high: int64, (rows, head_dim), accumulator >> LOW_BITS; the whole accumulator
            has VALUE_FRACTION fractional bits.
        accumulator_low: int64, (rows, head_dim), the LOW_BITS below.
        output: uint32, (rows, head_dim), fp32 bit patterns.
        nan_query: row * 65536 + feature of the first NaN or infinity in q, or None.
        nan_key: the lowest token with a NaN or infinity in K, or None.
        nan_value: the lowest token with a NaN or infinity in V, or None.
        flags: SCORE_OVERFLOW and VALUE_OVERFLOW where they happened.
    """

    score_sums: Integers
    score_overflow: Booleans
    attended: Booleans
    scores: Integers
    maximum: Integers
    weight_significand: Integers
    weight_exponent: Integers
    denominator: Integers
    accumulator_high: Integers
    accumulator_low: Integers
    output: NDArray[np.uint32]
    nan_query: int | None
    nan_key: int | None
    nan_value: int | None
    flags: CompletionFlag

    @property
    def accumulator(self) -> NDArray[np.object_]:
        """The accumulators as Python integers, (rows, head_dim)."""
        high = self.accumulator_high.astype(object)
        total: NDArray[np.object_] = high * (1 << LOW_BITS) + self.accumulator_low.astype(object)
        return total

    @property
    def partial(self) -> Partial:
        """What `kvattic.merge.merge` takes."""
        return Partial(
            self.output.view(np.float32).astype(np.float64),
            self.maximum,
            self.denominator.astype(np.float64),
        )


def decode(bits: Bits, element: Element) -> Decoded:
    """Split elements: the value is significand * 2**(exponent - element.encoding.offset).

    Args:
        bits: uint16 of any shape.
        element: their format.
    """
    form = element.encoding
    ones = (1 << form.exponent_bits) - 1
    field = (bits >> np.uint16(form.fraction_bits)) & np.uint16(ones)
    normal = field != 0
    significand = bits & np.uint16((1 << form.fraction_bits) - 1)
    significand |= normal.astype(np.uint16) << np.uint16(form.fraction_bits)
    significand <<= np.uint16(SIGNIFICAND_BITS - 1 - form.fraction_bits)
    exponent = field + ~normal
    # Looking for the largest field first spares the common case the search.
    special = bits.size > 0 and int(field.max()) == ones
    if special:
        significand[field == ones] = 0
    return Decoded(bits >= 0x8000, significand, exponent, special)


def first_special(bits: Bits, element: Element) -> tuple[int, int] | None:
    """(row, feature) of the first NaN or infinity in row-major order.

    Args:
        bits: uint16, (rows, head_dim) or (tokens, head_dim).
        element: its format.
    """
    found = special(bits, element)
    if not found.any():
        return None
    row, feature = divmod(int(found.argmax()), bits.shape[1])
    return row, feature


def split_scale(scale_bits: int) -> tuple[int, int]:
    """(significand with its leading one, exponent field) of a normal fp32.

    Args:
        scale_bits: its bit pattern, positive.
    """
    hidden = 1 << (SCALE_BITS - 1)
    return hidden | (scale_bits & (hidden - 1)), scale_bits >> (SCALE_BITS - 1)


def _signs(negative: Booleans) -> Integers:
    """1 or -1."""
    return 1 - 2 * negative.astype(np.int64)


def _block_tokens(head_dim: int) -> int:
    return max(_BLOCK_ELEMENTS // head_dim, 1)


def _shift(window: Integers, shift: Integers, least: int, low: int, high: int) -> None:
    """Shift `window` right in place by `shift` clipped to [least, SHIFT_MAX].

    `shift` lies in [low, high] and is overwritten.
    """
    if low < least:
        np.maximum(shift, least, out=shift)
    if high > SHIFT_MAX:
        np.minimum(shift, SHIFT_MAX, out=shift)
    np.right_shift(window, shift, out=window)


def score_sums(
    query: Bits, key: Bits, *, element: Element, scale_bits: int
) -> tuple[Integers, Booleans]:
    """K pass: sum of q[c] * k[c] over all features, each product truncated into the score window.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim).
        element: format of both.
        scale_bits: fp32 bit pattern of the scale; only its exponent is used here.

    Returns:
        (sums int64, overflow bool), both (rows, tokens); overflow: a product was clipped at the
        window's top.
    """
    return window_sums(query, key, element=element, exponent=split_scale(scale_bits)[1])


def window_sums(
    query: Bits, key: Bits, *, element: Element, exponent: int | Integers
) -> tuple[Integers, Booleans]:
    """`score_sums` with the exponent of the scale alone, which may differ by row.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim).
        element: format of both.
        exponent: exponent field of the scale (an fp32's, so the bias is 127), or int64, (rows,); it
            may lie outside of fp32's range.

    Returns:
        (sums int64, overflow bool), both (rows, tokens); overflow: a product was clipped at the
        window's top.
    """
    rows, tokens, head_dim = query.shape[0], key.shape[0], key.shape[1]
    form = element.encoding
    offset = np.asarray(exponent)[..., None] + form.score_offset
    row = decode(query, element)
    row_sign = _signs(row.negative)
    shift_min = form.score_shift_min
    row_significand = row.significand.astype(np.int64) << form.score_shift
    row_shift = form.score_shift - offset - row.exponent.astype(np.int64)
    sums = np.zeros((rows, tokens), np.int64)
    overflow = np.zeros((rows, tokens), np.bool_)
    size = _block_tokens(head_dim)
    window_space, shift_space = np.empty((2, min(size, tokens), head_dim), np.int64)
    for first in range(0, tokens, size):
        part = decode(key[first : first + size], element)
        place = slice(first, first + len(part.negative))
        sign = _signs(part.negative)
        significand = part.significand.astype(np.int64)
        key_exponent = part.exponent.astype(np.int64)
        least, most = int(part.exponent.min()), int(part.exponent.max())
        window, shift = window_space[: len(sign)], shift_space[: len(sign)]
        for r in range(rows):
            np.multiply(significand, row_significand[r], out=window)
            np.subtract(row_shift[r], key_exponent, out=shift)
            low, high = int(row_shift[r].min()) - most, int(row_shift[r].max()) - least
            if low < shift_min:
                overflow[r, place] = ((shift < shift_min) & (window != 0)).any(axis=1)
            _shift(window, shift, shift_min, low, high)
            np.multiply(window, sign, out=window)
            np.einsum("tc,c->t", window, row_sign[r], out=sums[r, place])
    return sums, overflow


def window_products(
    query: Bits, key: Bits, *, element: Element, exponent: int
) -> tuple[Integers, Booleans]:
    """The addends of `window_sums`: each product q[c] * k[c], truncated into the score window.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim).
        element: format of both.
        exponent: exponent field of the scale (an fp32's, so the bias is 127).

    Returns:
        (products int64, overflow bool), both (rows, tokens, head_dim); overflow: it was clipped at the window's top.
    """
    form = element.encoding
    row, part = decode(query[:, None], element), decode(key, element)
    window = (row.significand.astype(np.int64) << form.score_shift) * part.significand
    shift = form.score_shift - (exponent + form.score_offset) - row.exponent.astype(np.int64) - part.exponent
    overflow = (shift < form.score_shift_min) & (window != 0)
    window >>= np.clip(shift, form.score_shift_min, SHIFT_MAX)
    return window * (_signs(row.negative) * _signs(part.negative)), overflow


def round_scores(sums: Integers, scale_bits: int) -> tuple[Integers, Booleans]:
    """Scale the sums by the scale's significand and round once, half up; saturate.

    Args:
        sums: int64 of any shape, at most SCORE_SUM_BITS wide.
        scale_bits: fp32 bit pattern of the scale; only its fraction is used here.

    Returns:
        (scores int64 in [SCORE_MIN, SCORE_MAX], overflow bool), both of the shape of sums.
    """
    return scale_scores(sums, split_scale(scale_bits)[0])


def scale_scores(sums: Integers, significand: int | Integers) -> tuple[Integers, Booleans]:
    """`round_scores` with the significand of the scale alone, which may differ by row.

    Args:
        sums: int64 of any shape, at most SCORE_SUM_BITS wide.
        significand: SCALE_BITS wide, leading one included; or int64 that broadcasts to sums, such as
            (rows, 1).

    Returns:
        (scores int64 in [SCORE_MIN, SCORE_MAX], overflow bool), both of the shape of sums.
    """
    # The product has 70 bits, so it is taken in three chunks; what falls out at the bottom of a
    # chunk lies below the result's least bit after the half was added: floor of floor is the floor.
    sums = np.clip(sums, -(1 << (SCALED_SUM_BITS - 1)), (1 << (SCALED_SUM_BITS - 1)) - 1)
    mask = (1 << SCALE_CHUNK_BITS) - 1
    carry = ((sums & mask) * significand + (1 << (SCORE_ROUND_SHIFT - 1))) >> SCALE_CHUNK_BITS
    carry += ((sums >> SCALE_CHUNK_BITS) & mask) * significand
    carry += (sums >> (2 * SCALE_CHUNK_BITS)) * significand << SCALE_CHUNK_BITS
    scores = carry >> (SCORE_ROUND_SHIFT - SCALE_CHUNK_BITS)
    overflow = (scores > SCORE_MAX) | (scores < SCORE_MIN)
    return np.clip(scores, SCORE_MIN, SCORE_MAX), overflow


def attended(
    start: Integers,
    end: Integers,
    tree: Integers,
    *,
    tree_token: int,
    base_token: int,
    end_token: int,
    tokens: int,
    unit_tokens: int = 1,
) -> Booleans:
    """Which row attends which token: the window, the valid length and the draft tree.

    Or which unit's mean key: its last token is not before the window, its first one inside, and in the tree.

    Args:
        start: int64, (rows,), first token of each row.
        end: int64, (rows,), one past the last token of each row.
        tree: int64, (rows,), bit i: this row attends token tree_token + i.
        tree_token: first draft token.
        base_token: number of the first token.
        end_token: one past the last valid token.
        tokens: how many tokens (or units) there are from base_token on.
        unit_tokens: tokens of a unit, a power of two.

    Returns:
        bool, (rows, tokens).
    """
    token = base_token + np.arange(tokens, dtype=np.int64) * unit_tokens
    draft = token - tree_token
    bit = tree[:, None] >> np.clip(draft, 0, TREE_BITS - 1) & 1
    in_tree = (draft < 0) | ((draft < TREE_BITS) & (bit != 0))
    window = (token | (unit_tokens - 1) >= start[:, None]) & (token < np.minimum(end, end_token)[:, None])
    result: Booleans = window & in_tree
    return result


def weights(scores: Integers, maximum: Integers) -> tuple[Integers, Integers]:
    """2**(score - maximum) of every score; zero below 2**-63 and where the score is SCORE_MASKED.

    Args:
        scores: int64, (rows, tokens).
        maximum: int64, (rows,), not below any score of its row.

    Returns:
        (significand, exponent), both int64, (rows, tokens); both zero for a zero weight.
    """
    below = scores - maximum[:, None]
    exponent = -(below >> SCORE_FRACTION)
    segment = below >> EXP_STEP_BITS & ((1 << (SCORE_FRACTION - EXP_STEP_BITS)) - 1)
    step = below & ((1 << EXP_STEP_BITS) - 1)
    table = np.array(exp_table(), np.int64)
    significand = table[:, 2][segment]
    for order in (1, 0):
        significand *= step
        significand >>= EXP_STEP_BITS
        significand += table[:, order][segment]
    significand += 1 << (WEIGHT_ROUND_SHIFT - 1)
    significand >>= WEIGHT_ROUND_SHIFT
    np.minimum(significand, (1 << WEIGHT_BITS) - 1, out=significand)
    zero = (exponent >= 1 << WEIGHT_EXPONENT_BITS) | (scores == SCORE_MASKED)
    significand[zero] = 0
    exponent[zero] = 0
    return significand, exponent


def denominators(significand: Integers, exponent: Integers) -> Integers:
    """Sum of the weights, each truncated at 2**-VALUE_FRACTION.

    Args:
        significand: int64, (rows, tokens), from `weights`.
        exponent: int64, (rows, tokens), from `weights`.

    Returns:
        int64, (rows,).
    """
    total: Integers = (significand << WEIGHT_ALIGNMENT >> exponent).sum(axis=1)
    return total


def value_sums(
    significand: Integers, exponent: Integers, value: Bits, *, element: Element
) -> tuple[Integers, Integers, bool]:
    """V pass: the sum of weight * v over all tokens, each product truncated into the value window.

    Args:
        significand: int64, (rows, tokens), from `weights`.
        exponent: int64, (rows, tokens), from `weights`.
        value: uint16, (tokens, head_dim).
        element: format of value.

    Returns:
        (high int64, low int64, overflow): the sums are high * 2**LOW_BITS + low, (rows, head_dim);
        overflow tells whether a product was clipped at the window's top.
    """
    rows, (tokens, head_dim) = significand.shape[0], value.shape
    form = element.encoding
    row_shift = form.value_shift + exponent
    # Tokens whose products one int64 can sum.
    together = 1 << (62 - form.value_window_bits)
    high = np.zeros((rows, head_dim), np.int64)
    low = np.zeros((rows, head_dim), np.int64)
    overflow = False
    size = _block_tokens(head_dim)
    window_space, shift_space = np.empty((2, min(size, tokens), head_dim), np.int64)
    for first in range(0, tokens, size):
        place = slice(first, min(first + size, tokens))
        used = [r for r in range(rows) if significand[r, place].any()]
        if not used:
            continue
        part = decode(value[place], element)
        sign = _signs(part.negative)
        part_significand = part.significand.astype(np.int64) << form.product_shift
        part_exponent = part.exponent.astype(np.int64)
        least, most = int(part.exponent.min()), int(part.exponent.max())
        window, shift = window_space[: len(sign)], shift_space[: len(sign)]
        for r in used:
            row = row_shift[r, place]
            np.multiply(part_significand, significand[r, place, None], out=window)
            np.subtract(row[:, None], part_exponent, out=shift)
            smallest, largest = int(row.min()) - most, int(row.max()) - least
            if smallest < 0:
                overflow = overflow or bool(((shift < 0) & (window != 0)).any())
            _shift(window, shift, 0, smallest, largest)
            np.multiply(window, sign, out=window)
            whole = len(window) // together * together
            for group in (
                window[:whole].reshape(-1, together, head_dim).sum(axis=1),
                window[whole:].sum(axis=0, keepdims=True),
            ):
                high[r] += (group >> LOW_BITS).sum(axis=0)
                low[r] += (group & ((1 << LOW_BITS) - 1)).sum(axis=0)
    high += low >> LOW_BITS
    low &= (1 << LOW_BITS) - 1
    return high, low, overflow


def _quotient(numerator: int, denominator: int) -> int:
    """fp32 bits nearest to numerator / denominator, ties to even; zero where either is zero."""
    if numerator == 0 or denominator == 0:
        return 0
    sign, numerator = (1 << 31, -numerator) if numerator < 0 else (0, numerator)
    # A quotient of 26 or 27 bits, and whether anything is left of it, are enough to round to 24.
    shift = 26 - numerator.bit_length() + denominator.bit_length()
    if shift > 0:
        quotient, rest = divmod(numerator << shift, denominator)
    else:
        quotient, rest = divmod(numerator, denominator << -shift)
    quotient = quotient << 1 | (rest != 0)
    shift += 1
    drop = quotient.bit_length() - 24
    kept, half = quotient >> drop, 1 << (drop - 1)
    dropped = quotient & ((1 << drop) - 1)
    kept += dropped > half or (dropped == half and kept & 1)
    # The top bit of `kept` always adds one to the exponent field; a carry out of it one more.
    return sign | ((drop - shift + SCALE_BITS - 1 + FP32_BIAS - 1) << (SCALE_BITS - 1)) + kept


def divide(high: Integers, low: Integers, denominator: Integers) -> NDArray[np.uint32]:
    """Accumulator / denominator as fp32, rounded once to nearest even.

    Zero over anything is +0, and so is anything over zero.

    Args:
        high: int64, (rows, head_dim), from `value_sums`.
        low: int64, (rows, head_dim), from `value_sums`.
        denominator: int64, (rows,).

    Returns:
        uint32, (rows, head_dim), fp32 bit patterns: zero or normal numbers.
    """
    output = np.empty(high.shape, np.uint32)
    for r, total in enumerate(denominator.tolist()):
        output[r] = [
            _quotient((upper << LOW_BITS) + lower, total)
            for upper, lower in zip(high[r].tolist(), low[r].tolist(), strict=True)
        ]
    return output


def check_bits(name: str, array: Any) -> Bits:
    """Refuse what is not a two-dimensional array of bit patterns; otherwise return it unchanged.

    Raises:
        RequestError: the dtype or the number of dimensions is wrong.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.uint16 or array.ndim != 2:
        found = (
            f"{array.dtype} {array.shape}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        raise RequestError(f"{name} must be a uint16 array of two dimensions, not {found}")
    return array


def check_job(
    scale_bits: int, base_token: int, end_token: int, tokens: int, rows: int, **per_row: Any
) -> tuple[Integers, ...]:
    """Check a job's numbers; the integers that are given for each row, as int64.

    Args:
        scale_bits: fp32 bit pattern.
        base_token: number of the first token given.
        end_token: one past the last valid token.
        tokens: how many are given.
        rows: query rows.
        per_row: integers, (rows,), by name.

    Raises:
        RequestError: they do not fit together.
    """
    if not is_positive_normal(scale_bits):
        raise RequestError(f"scale_bits must be a positive normal fp32, not {scale_bits:#010x}")
    if end_token > base_token + tokens:
        raise RequestError(f"end_token must be at most base_token + tokens = {base_token + tokens}, not {end_token}")
    return tuple(_per_row(name, values, rows) for name, values in per_row.items())


def _per_row(name: str, values: Any, rows: int) -> Integers:
    array = np.asarray(values)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise RequestError(
            f"{name} must be {rows} integers, one a row, not {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def attend(
    query: Bits,
    key: Bits,
    value: Bits,
    *,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> Trace:
    """Attention of one job, bit for bit as the engine computes it.

    Args:
        query: uint16, (rows, head_dim), bit patterns.
        key: uint16, (tokens, head_dim); its first row is token base_token.  Tokens from end_token
            on (a page's unused rest) are never attended, nor reported.
        value: uint16, (tokens, head_dim).
        element: storage format of the three.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
        tree_token: first token of the draft tree; end_token where there is none.
        base_token: number of the first token given.
        end_token: one past the last valid token.

    Returns:
        All intermediates.  NaN and infinity count as zero in them, and are named in nan_query,
        nan_key and nan_value.

    Raises:
        RequestError: a type or shape is wrong, the scale is no positive normal fp32, or end_token
            lies beyond the tokens given.
    """
    query, key, value = check_bits("query", query), check_bits("key", key), check_bits("value", value)
    rows, head_dim = query.shape
    if key.shape[1] != head_dim or value.shape != key.shape:
        raise RequestError(
            f"key and value must be (tokens, {head_dim}) both, not {key.shape} and {value.shape}"
        )
    start, end, tree = check_job(scale_bits, base_token, end_token, len(key), rows, start=start, end=end, tree=tree)
    mask = attended(
        start,
        end,
        tree,
        tree_token=tree_token,
        base_token=base_token,
        end_token=end_token,
        tokens=len(key),
    )
    trace = attend_masked(query, key, value, mask, element=element, scale_bits=scale_bits)
    valid = max(end_token - base_token, 0)
    nan_key = first_special(key[:valid], element)
    nan_value = first_special(value[:valid], element)
    return replace(
        trace,
        nan_key=None if nan_key is None else base_token + nan_key[0],
        nan_value=None if nan_value is None else base_token + nan_value[0],
    )


def attend_masked(
    query: Bits, key: Bits, value: Bits, mask: Booleans, *, element: Element, scale_bits: int
) -> Trace:
    """Attention over the tokens that a mask allows; nothing is checked, and nan_key and nan_value are None.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim).
        value: uint16, (tokens, head_dim).
        mask: bool, (rows, tokens), which row attends which token.
        element: storage format of the three.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
    """
    nan_query = first_special(query, element)
    sums, clipped = score_sums(query, key, element=element, scale_bits=scale_bits)
    scores, saturated = round_scores(sums, scale_bits)
    score_overflow = clipped | saturated
    scores[~mask] = SCORE_MASKED
    maximum = scores.max(axis=1, initial=SCORE_MASKED)
    significand, exponent = weights(scores, maximum)
    denominator = denominators(significand, exponent)
    high, low, value_overflow = value_sums(significand, exponent, value, element=element)

    flags = CompletionFlag(0)
    if (score_overflow & mask).any():
        flags |= CompletionFlag.SCORE_OVERFLOW
    if value_overflow:
        flags |= CompletionFlag.VALUE_OVERFLOW
    return Trace(
        score_sums=sums,
        score_overflow=score_overflow,
        attended=mask,
        scores=scores,
        maximum=maximum,
        weight_significand=significand,
        weight_exponent=exponent,
        denominator=denominator,
        accumulator_high=high,
        accumulator_low=low,
        output=divide(high, low, denominator),
        nan_query=None if nan_query is None else nan_query[0] << 16 | nan_query[1],
        nan_key=None,
        nan_value=None,
        flags=flags,
    )
