"""The golden model again, slowly: plain Python integers and fractions, one element at a time.

Written from the definitions (value = significand * 2**exponent, windows as floors of exact
products), not from the golden model's shifts, so that the two agree only if both mean the same.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic import formats
from kvattic.formats import Element


class Number(NamedTuple):
    """A decoded element: (-1)**negative * significand * 2**power."""

    negative: bool
    significand: int
    power: int
    special: bool


class Reference(NamedTuple):
    """The intermediates of `kvattic.golden.Trace` as nested lists of Python integers."""

    score_sums: list[list[int]]
    score_overflow: list[list[bool]]
    attended: list[list[bool]]
    scores: list[list[int]]
    maximum: list[int]
    weight_significand: list[list[int]]
    weight_exponent: list[list[int]]
    denominator: list[int]
    accumulator: list[list[int]]
    output: list[list[int]]
    nan_query: int | None
    nan_key: int | None
    nan_value: int | None
    flags: int


def number(bits: int, element: Element) -> Number:
    """Decode one element."""
    form = element.encoding
    sign, field = bits >> 15, bits >> form.fraction_bits & ((1 << form.exponent_bits) - 1)
    fraction = bits & ((1 << form.fraction_bits) - 1)
    aligned = 10 - form.fraction_bits
    if field == (1 << form.exponent_bits) - 1:
        return Number(bool(sign), 0, 0, True)
    if field:
        fraction += 1 << form.fraction_bits
    return Number(bool(sign), fraction << aligned, max(field, 1) - form.bias - 10, False)


def value(x: Number) -> Fraction:
    """The element's value."""
    return (-1 if x.negative else 1) * x.significand * Fraction(2) ** x.power


def floor_scaled(significand: int, power: int) -> int:
    """floor(significand * 2**power)."""
    return significand << power if power >= 0 else significand >> -power


def score_sum(query: list[Number], key: list[Number], scale_exponent: int) -> tuple[int, bool]:
    """Sum of the products in the score window, and whether one was clipped."""
    total, clipped = 0, False
    for q, k in zip(query, key, strict=True):
        product = q.significand * k.significand
        power = q.power + k.power + scale_exponent + 28
        # Two 11-bit significands and 20 more bits fill the 42-bit window but for its top bits.
        if power > 20 and product:
            clipped = True
        magnitude = floor_scaled(product, min(power, 20))
        total += -magnitude if q.negative != k.negative else magnitude
    return total, clipped


def weight(below: int) -> tuple[int, int]:
    """(significand, exponent) of 2**(below / 2**22), below <= 0."""
    exponent = -(below // (1 << 22))
    fraction = below % (1 << 22)
    c0, c1, c2 = formats.exp_table()[fraction // (1 << 16)]
    t = fraction % (1 << 16)
    polynomial = c0 + (c1 + c2 * t // (1 << 16)) * t // (1 << 16)
    significand = min((polynomial + 16) // 32, (1 << 22) - 1)
    return (significand, exponent) if exponent < 64 else (0, 0)


def fp32(quotient: Fraction) -> int:
    """Bit pattern of the fp32 nearest to the quotient; it must be zero or in the normal range."""
    if quotient == 0:
        return 0
    magnitude, power = abs(quotient), 0
    while magnitude * Fraction(2) ** -power >= 2:
        power += 1
    while magnitude * Fraction(2) ** -power < 1:
        power -= 1
    # Python rounds a fraction half to even.
    mantissa = round(magnitude * Fraction(2) ** (23 - power))
    if mantissa == 1 << 24:
        mantissa, power = 1 << 23, power + 1
    assert -126 <= power <= 127
    return (quotient < 0) << 31 | (power + 127) << 23 | (mantissa - (1 << 23))


def attend(
    query: NDArray[np.uint16],
    key: NDArray[np.uint16],
    value: NDArray[np.uint16],
    *,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> Reference:
    """The job of `kvattic.golden.attend`, with the same arguments."""
    q, k, v = (
        [[number(int(x), element) for x in row] for row in array] for array in (query, key, value)
    )
    scale_exponent = (scale_bits >> 23) - 127
    scale_significand = 1 << 23 | scale_bits & ((1 << 23) - 1)
    rows, tokens, channels = len(q), len(k), len(q[0])

    sums = [[score_sum(q[r], k[t], scale_exponent) for t in range(tokens)] for r in range(rows)]
    # floor(x / 2**29 + 1/2), exactly.
    exact = [[(s * scale_significand * 2 + (1 << 29)) // (1 << 30) for s, _ in row] for row in sums]
    low, high = -(1 << 35) + 1, (1 << 35) - 1
    clipped = [
        [sums[r][t][1] or not low <= exact[r][t] <= high for t in range(tokens)]
        for r in range(rows)
    ]

    def sees(r: int, t: int) -> bool:
        token = base_token + t
        if not int(start[r]) <= token < int(end[r]) or token >= end_token:
            return False
        draft = token - tree_token
        return draft < 0 or (draft < 32 and bool(int(tree[r]) >> draft & 1))

    seen = [[sees(r, t) for t in range(tokens)] for r in range(rows)]
    scores = [
        [min(max(exact[r][t], low), high) if seen[r][t] else -(1 << 35) for t in range(tokens)]
        for r in range(rows)
    ]
    maximum = [max(row, default=-(1 << 35)) for row in scores]
    found = [
        [weight(scores[r][t] - maximum[r]) if seen[r][t] else (0, 0) for t in range(tokens)]
        for r in range(rows)
    ]

    denominator = [sum(floor_scaled(s, 40 - 21 - n) for s, n in row) for row in found]
    accumulator, value_overflow = [], False
    for r in range(rows):
        row = []
        for c in range(channels):
            total = 0
            for t in range(tokens):
                significand, n = found[r][t]
                product = significand * v[t][c].significand
                power = 40 - 21 - n + v[t][c].power
                if power > 24 and product:
                    value_overflow = True
                magnitude = floor_scaled(product, min(power, 24))
                total += -magnitude if v[t][c].negative else magnitude
            row.append(total)
        accumulator.append(row)
    output = [
        [fp32(Fraction(a, denominator[r])) if denominator[r] else 0 for a in accumulator[r]]
        for r in range(rows)
    ]

    def first_token(numbers: list[list[Number]]) -> int | None:
        for t, row in enumerate(numbers):
            if base_token + t < end_token and any(x.special for x in row):
                return base_token + t
        return None

    bad = [r * 65536 + c for r in range(rows) for c in range(channels) if q[r][c].special]
    overflow = any(clipped[r][t] and seen[r][t] for r in range(rows) for t in range(tokens))
    return Reference(
        score_sums=[[s for s, _ in row] for row in sums],
        score_overflow=clipped,
        attended=seen,
        scores=scores,
        maximum=maximum,
        weight_significand=[[s for s, _ in row] for row in found],
        weight_exponent=[[n for _, n in row] for row in found],
        denominator=denominator,
        accumulator=accumulator,
        output=output,
        nan_query=bad[0] if bad else None,
        nan_key=first_token(k),
        nan_value=first_token(v),
        flags=overflow | value_overflow << 1,
    )
