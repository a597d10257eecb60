"""The golden model again, slowly: plain Python integers and fractions, one element at a time.

Written from the definitions (value = significand * 2**exponent, windows as floors of exact
products), not from the golden model's shifts, so that the two agree only if both mean the same.
"""

from fractions import Fraction
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.spec import formats
from kvattic.spec.formats import Element


class Number(NamedTuple):
    """A decoded element: (-1)**negative * significand * 2**power."""

    negative: bool
    significand: int
    power: int
    special: bool


class Reference(NamedTuple):
    """The intermediates of `kvattic.golden.dense.Trace` as nested lists of Python integers."""

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
        # Two 11-bit significands and 24 more bits fill the 46-bit window but for its top bits.
        if power > 24 and product:
            clipped = True
        magnitude = floor_scaled(product, min(power, 24))
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
    """The job of `kvattic.golden.dense.attend`, with the same arguments."""
    q, k, v = (
        [[number(int(x), element) for x in row] for row in array] for array in (query, key, value)
    )
    scale_exponent = (scale_bits >> 23) - 127
    scale_significand = 1 << 23 | scale_bits & ((1 << 23) - 1)
    rows, tokens, head_dim = len(q), len(k), len(q[0])

    sums = [[score_sum(q[r], k[t], scale_exponent) for t in range(tokens)] for r in range(rows)]
    # floor(x / 2**29 + 1/2), exactly.
    exact = [[(s * scale_significand * 2 + (1 << 29)) // (1 << 30) for s, _ in row] for row in sums]
    low, high = -(1 << 40) + 1, (1 << 40) - 1
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
        [min(max(exact[r][t], low), high) if seen[r][t] else -(1 << 40) for t in range(tokens)]
        for r in range(rows)
    ]
    maximum = [max(row, default=-(1 << 40)) for row in scores]
    found = [
        [weight(scores[r][t] - maximum[r]) if seen[r][t] else (0, 0) for t in range(tokens)]
        for r in range(rows)
    ]

    denominator = [sum(floor_scaled(s, 40 - 21 - n) for s, n in row) for row in found]
    # A weight's 22 bits, a significand's 11, and the rest of the window: 57 bits for fp16, 61 for bf16.
    most = 24 if element is Element.FP16 else 28
    accumulator, value_overflow = [], False
    for r in range(rows):
        row = []
        for c in range(head_dim):
            total = 0
            for t in range(tokens):
                significand, n = found[r][t]
                product = significand * v[t][c].significand
                power = 40 - 21 - n + v[t][c].power
                if power > most and product:
                    value_overflow = True
                magnitude = floor_scaled(product, min(power, most))
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

    bad = [r * 65536 + c for r in range(rows) for c in range(head_dim) if q[r][c].special]
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


# Sparse attention: docs/sparse.md in plain Python.


class SparseReference(NamedTuple):
    """The intermediates of `first_pass.FirstPass` and of the second pass, as nested lists of Python integers."""

    features: list[int]
    scale_significand: list[int]
    scale_exponent: list[int]
    score_sums: list[list[int]]
    scores: list[list[int]]
    maximum: list[int]
    denominator: list[int]
    reference: list[int]
    probability: list[list[int]]
    mass: list[int]
    rank: list[int]
    valid: list[bool]
    selected: list[bool]
    taken: list[bool]
    alpha: list[int]
    codewords: list[int]
    exact_scores: list[list[int]]
    exact_maximum: list[int]
    exact_denominator: list[int]
    output: list[list[int]]
    nan_key: int | None
    nan_value: int | None
    flags: int


def magnitude(x: Number) -> int:
    """|x| in steps of 2**-24, below 2**40."""
    return min(int(abs(value(x)) * (1 << 24)), (1 << 40) - 1)


def approximate_scale(sizes: list[int], features: list[int], scale_bits: int) -> tuple[int, int]:
    """(significand, exponent field) of scale * sqrt(whole / part), every step truncated."""
    significand, field = 1 << 23 | scale_bits & ((1 << 23) - 1), scale_bits >> 23
    part, whole = sum(sizes[c] for c in features), sum(sizes)
    if part == 0:
        return significand, field
    root = isqrt((whole << 48) // part)
    exact = Fraction(significand, 1 << 23) * Fraction(root, 1 << 24)
    while exact >= 2:
        exact, field = exact / 2, field + 1
    return int(exact * (1 << 23)), field


def log2(denominator: int) -> int:
    """log2(denominator / 2**40) in steps of 2**-22: squaring a mantissa of 32 bits."""
    whole, mantissa = -40, Fraction(denominator)
    while mantissa >= 2:
        mantissa, whole = mantissa / 2, whole + 1
    result = 0
    mantissa = Fraction(int(mantissa * (1 << 31)), 1 << 31)
    for step in range(1, 23):
        mantissa = mantissa**2
        if mantissa >= 2:
            result += 1 << (22 - step)
            mantissa /= 2
        mantissa = Fraction(int(mantissa * (1 << 31)), 1 << 31)
    return (whole << 22) + result


def finite(bits: int) -> Fraction:
    """Value of an fp32; subnormals are zero."""
    field, fraction = bits >> 23 & 255, bits & ((1 << 23) - 1)
    size = Fraction(1 << 23 | fraction) * Fraction(2) ** (field - 150) if 0 < field < 255 else Fraction(0)
    return -size if bits >> 31 else size


def fp32_or_zero(exact: Fraction) -> int:
    """As `fp32`, +0 for what is below 2**-126 after its rounding."""
    least = Fraction(2) ** -126
    # Half a step below the least normal number rounds to it: 24 bits of significand count.
    if abs(exact) < least and not abs(exact) >= least - Fraction(2) ** -151:
        return 0
    return fp32(exact) if abs(exact) >= least else (exact < 0) << 31 | 1 << 23


def coded_sums(q: list[Number], base: list[Number], step: list[Number], codes: list[list[int]],
               exponent: int) -> tuple[list[int], bool]:
    """Score sums of a stripe's tokens by their codes, and whether anything was clipped."""
    clipped = False
    parts = []
    for levels in (base, step):
        row = []
        for a, b in zip(q, levels, strict=True):
            total, beyond = score_sum([a], [b], exponent)
            size = abs(total) // (1 << 20)
            clipped |= beyond or size >= 1 << 19
            size = min(size, (1 << 19) - 1)
            row.append(-size if total < 0 else size)
        parts.append(row)
    first, more = parts
    sums = [0] * len(codes)
    for at in range(0, len(q), 2):
        table = {}
        for c0 in range(4):
            for c1 in range(4):
                entry = first[at] + first[at + 1] + c0 * more[at] + c1 * more[at + 1]
                clipped |= not -(1 << 19) <= entry < 1 << 19
                table[c0, c1] = (entry + (1 << 19)) % (1 << 20) - (1 << 19)
        for i, token in enumerate(codes):
            sums[i] += table[token[at], token[at + 1]]
    return [total * (1 << 20) for total in sums], clipped


def attend_sparse(
    query: NDArray[np.uint16],
    key: NDArray[np.uint16],
    value_bits: NDArray[np.uint16],
    *,
    mode: int,
    group_tokens: int,
    tokens_per_codeword: int,
    features: int,
    top_units: int,
    local_tokens: int,
    sinks: int,
    unit_bits: int,
    mean: NDArray[np.uint32] | None,
    sketch: Any,
    tail: NDArray[np.bool_],
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> SparseReference:
    """The job of `kvattic.golden.sparse.attend_sparse`, with the same arguments; modes as numbers."""
    q, k, v = ([[number(int(x), element) for x in row] for row in array] for array in (query, key, value_bits))
    rows, tokens, head_dim = len(q), len(k), len(q[0])
    unit_tokens = 1 if mode in (1, 4) else tokens_per_codeword << unit_bits
    count = tokens // unit_tokens
    scale = (1 << 23 | scale_bits & ((1 << 23) - 1), scale_bits >> 23)
    masked, low, high = -(1 << 40), -(1 << 40) + 1, (1 << 40) - 1
    most = 24 if element is Element.FP16 else 28

    def late(token: int) -> bool:
        return bool(tail[token // group_tokens])

    def in_tree(r: int, token: int) -> bool:
        draft = token - tree_token
        return draft < 0 or (draft < 32 and bool(int(tree[r]) >> draft & 1))

    def sees(r: int, t: int) -> bool:
        token = base_token + t
        return int(start[r]) <= token < int(end[r]) and token < end_token and in_tree(r, token)

    def score(first: list[Number], second: list[Number], scale: tuple[int, int]) -> tuple[int, int, bool, bool]:
        total, clipped = score_sum(first, second, scale[1] - 127)
        exact = (total * scale[0] * 2 + (1 << 29)) // (1 << 30)
        return total, min(max(exact, low), high), clipped, not low <= exact <= high

    # First pass: (sum, score, clipped, saturated) of what is read, the masks, and what has a NaN.
    chosen: list[int] = []
    scales = [scale] * rows
    overflow = False
    bad: list[int] = []
    zero = (0, 0, False, False)
    if mode == 3:
        assert sketch is not None
        c = [[number(int(x), element) for x in row] for row in sketch]
        found = [[zero if late(u * unit_tokens) else score(row, c[u], scale) for u in range(count)] for row in q]
        seen = []
        for r in range(rows):
            row = []
            for u in range(count):
                first = base_token + u * unit_tokens
                row.append(not late(u * unit_tokens) and first | (unit_tokens - 1) >= int(start[r]) and
                           first < min(int(end[r]), end_token) and in_tree(r, first))
            seen.append(row)
        bad += [base_token + u * unit_tokens for u in range(count)
                if not late(u * unit_tokens) and any(x.special for x in c[u])]
    elif mode == 4:
        found = [[zero] * tokens for _ in range(rows)]
        sunk = sinks if base_token == 0 else 0
        for t in range(tokens):
            stripe = t // group_tokens
            if t % group_tokens == 0 and not late(t):
                levels = [[number(int(x), element) for x in of[stripe]] for of in (sketch.base, sketch.step)]
                if any(x.special for of in levels for x in of):
                    bad.append(base_token + t)
                sums = [coded_sums(row, *levels, sketch.codes[t : t + group_tokens].tolist(), scale[1] - 127)
                        for row in q]
                overflow |= any(clipped for _, clipped in sums)
                for r in range(rows):
                    for i, total in enumerate(sums[r][0]):
                        exact = (total * scale[0] * 2 + (1 << 29)) // (1 << 30)
                        found[r][t + i] = (total, min(max(exact, low), high), sums[r][1], not low <= exact <= high)
            # Sinks are scored with all of their codewords.
            if late(t) or t // tokens_per_codeword * tokens_per_codeword < sunk:
                for r in range(rows):
                    found[r][t] = score(q[r], k[t], scale)
                if any(x.special for x in k[t]):
                    bad.append(base_token + t)
        seen = [[sees(r, t) for t in range(tokens)] for r in range(rows)]
    else:
        sizes = [[magnitude(x) for x in row] for row in q]
        total = [sum(row[c] for row in sizes) for c in range(head_dim)]
        chosen = sorted(sorted(range(head_dim), key=lambda c: (-total[c], c))[:features])
        scales = [approximate_scale(row, chosen, scale_bits) for row in sizes]
        a = k if sketch is None else [[number(int(x), element) for x in row] for row in sketch]
        found = [[score(q[r], k[t], scale) if late(t) else
                  score([q[r][c] for c in chosen], [a[t][c] for c in chosen], scales[r])
                  for t in range(tokens)] for r in range(rows)]
        seen = [[sees(r, t) for t in range(tokens)] for r in range(rows)]
        overflow = any(found[r][t][2] and not late(t) for r in range(rows) for t in range(tokens))
        for t in range(tokens):
            read = k[t] if late(t) else [a[t][c] for c in chosen]
            if any(x.special for x in read):
                bad.append(base_token + t)
    scored = range(len(seen[0]))
    overflow |= any(seen[r][t] and (found[r][t][2] or found[r][t][3]) for r in range(rows) for t in scored)
    scores = [[found[r][t][1] if seen[r][t] else masked for t in scored] for r in range(rows)]
    maximum = [max(row) for row in scores]

    def sized(score: int, top: int) -> int:
        if score == masked:
            return 0
        significand, n = weight(score - top)
        return floor_scaled(significand, 40 - 21 - n)

    denominator = [sum(sized(s, maximum[r]) for s in scores[r]) for r in range(rows)]
    against = [min(maximum[r] + log2(denominator[r]), high) if denominator[r] else 0 for r in range(rows)]
    p = [[sized(s, against[r]) for s in scores[r]] for r in range(rows)]

    # Selection.
    def members(u: int) -> range:
        return range(u, u + 1) if mode == 3 else range(u * unit_tokens, (u + 1) * unit_tokens)

    mass = [min(sum(p[r][t] for r in range(rows) for t in members(u)) >> 10, (1 << 36) - 2) for u in range(count)]
    starts = [base_token + u * unit_tokens for u in range(count)]
    forced = [starts[u] + unit_tokens > max(end_token - local_tokens, 0) or starts[u] < sinks for u in range(count)]
    rank = [((1 << 36) - 1 if forced[u] else mass[u]) * (1 << 24) + (1 << 24) - 1 - starts[u] for u in range(count)]
    valid = [not late(u * unit_tokens) and starts[u] < end_token for u in range(count)]
    best = sorted((u for u in range(count) if valid[u]), key=lambda u: -rank[u])[:top_units]
    selected = [u in best for u in range(count)]
    taken = [(late(t) or selected[t // unit_tokens]) and base_token + t < end_token for t in range(tokens)]
    if mode == 3 or sum(valid) <= top_units:
        alpha = [1 << 24] * rows
    else:
        share = [sum(p[r][t] for t in range(tokens) if taken[t]) for r in range(rows)]
        alpha = [min((share[r] + (1 << 15)) >> 16, 1 << 24) if denominator[r] else 1 << 24 for r in range(rows)]

    # Second pass: the dense job over what is read, in which nobody attends what is not selected.
    codewords = sorted({t // tokens_per_codeword for t in range(tokens) if taken[t]})
    read = [t for t in range(tokens) if t // tokens_per_codeword in codewords and base_token + t < end_token]
    second = [[score(q[r], k[t], scale) for t in read] for r in range(rows)]
    attended = [[taken[t] and sees(r, t) for t in read] for r in range(rows)]
    flags = int(overflow or any(attended[r][i] and (second[r][i][2] or second[r][i][3])
                                for r in range(rows) for i in range(len(read))))
    exact = [[second[r][i][1] if attended[r][i] else masked for i in range(len(read))] for r in range(rows)]
    top = [max(row, default=masked) for row in exact]
    sums = [sum(sized(s, top[r]) for s in exact[r]) for r in range(rows)]
    output = []
    for r in range(rows):
        line = []
        for c in range(head_dim):
            accumulator = 0
            for i, t in enumerate(read):
                if exact[r][i] == masked:
                    continue
                significand, n = weight(exact[r][i] - top[r])
                product, power = significand * v[t][c].significand, 40 - 21 - n + v[t][c].power
                if power > most and product:
                    flags |= 2
                size = floor_scaled(product, min(power, most))
                accumulator += -size if v[t][c].negative else size
            quotient = finite(fp32(Fraction(accumulator, sums[r]))) if sums[r] else Fraction(0)
            other = Fraction(0) if mean is None else finite(int(mean[c]))
            share_of_it = Fraction(alpha[r], 1 << 24)
            line.append(fp32_or_zero(share_of_it * quotient + (1 - share_of_it) * other))
        output.append(line)
    bad += [base_token + t for t in read if any(x.special for x in k[t])]
    bad_values = [base_token + t for t in read if any(x.special for x in v[t])]
    whole = [[masked] * tokens for _ in range(rows)]
    for r in range(rows):
        for i, t in enumerate(read):
            whole[r][t] = exact[r][i]
    return SparseReference(
        features=chosen,
        scale_significand=[s for s, _ in scales],
        scale_exponent=[e for _, e in scales],
        score_sums=[[x[0] for x in row] for row in found],
        scores=scores,
        maximum=maximum,
        denominator=denominator,
        reference=against,
        probability=p,
        mass=mass,
        rank=rank,
        valid=valid,
        selected=selected,
        taken=taken,
        alpha=alpha,
        codewords=codewords,
        exact_scores=whole,
        exact_maximum=top,
        exact_denominator=sums,
        output=output,
        nan_key=min((t for t in bad if t < end_token), default=None),
        nan_value=min(bad_values, default=None),
        flags=flags,
    )
