"""The blend of quotient and mean against exact rational arithmetic."""

import random
from fractions import Fraction

import pytest
from amaranth.hdl import unsigned
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hdl.bench import pipelined

from kvattic.golden import sparse
from kvattic_hdl.reduce.blend import Blend

ONE = 1 << 24
TAG_BITS = 16
LARGEST, LEAST = 0x7F7FFFFF, 0x00800000
SIGN = 1 << 31


def value(bits: int) -> Fraction:
    """The number that the bits of an fp32 are; subnormals count as zero."""
    field, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    assert field < 255
    magnitude = Fraction((1 << 23) + fraction) * Fraction(2) ** (field - 150) if field else Fraction(0)
    return -magnitude if bits & SIGN else magnitude


def nearest(number: Fraction) -> int:
    """Bits of the nearest fp32, ties to even; +0 for what is then below 2**-126 in magnitude."""
    if not number:
        return 0
    magnitude = abs(number)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    significand = round(magnitude / Fraction(2) ** (exponent - 23))      # of a Fraction: ties to even
    if significand == 1 << 24:
        significand, exponent = 1 << 23, exponent + 1
    assert 1 << 23 <= significand < 1 << 24 and exponent <= 127
    if exponent < -126:
        return 0
    return (number < 0) << 31 | (exponent + 127) << 23 | significand - (1 << 23)


def blended(quotient: int, mean: int, alpha: int) -> int:
    """Bits of the result, as the specification has it."""
    return nearest(Fraction(alpha, ONE) * value(quotient) + Fraction(ONE - alpha, ONE) * value(mean))


def run(operands, gaps=None):
    """Results of the RTL; checks tags, order and latency."""
    payloads = [quotient | mean << 32 | alpha << 64 | (tag & 0xFFFF) << 89
                for tag, (quotient, mean, alpha) in enumerate(operands)]
    return pipelined(Blend(unsigned(TAG_BITS)), payloads, Blend.LATENCY, gaps)


def check(operands, gaps=None):
    """The RTL and the golden model against the reference."""
    for (quotient, mean, alpha), result in zip(operands, run(operands, gaps), strict=True):
        expected = blended(quotient, mean, alpha)
        assert result == expected, (hex(quotient), hex(mean), alpha, hex(result), hex(expected))
        assert sparse.blend(alpha, quotient, mean) == expected


def fp32(rng, low=0, high=254):
    """Any fp32 whose exponent field is between these; often with many equal digits."""
    fraction = rng.getrandbits(23)
    shape = rng.random()
    if shape < 0.1:
        fraction = rng.choice((0, 1, 0x7FFFFF, 0x7FFFFE, 0x400000))
    elif shape < 0.2:
        fraction = fraction >> rng.randint(0, 22) << rng.randint(0, 22) & 0x7FFFFF
    return rng.getrandbits(1) << 31 | rng.randint(low, high) << 23 | fraction


def share(rng):
    """An alpha: any number of bits is as likely as any other, from either end."""
    part = rng.getrandbits(rng.randint(0, 24))
    return rng.choice((part, ONE - part))


def near(rng, bits, places):
    """An fp32 whose exponent is about `places` away, of any sign."""
    field = min(max((bits >> 23 & 0xFF) + rng.randint(-places, places), 0), 254)
    return fp32(rng, field, field)


def reference_is_nearest(number):
    bits = nearest(number)
    error = abs(value(bits) - number)
    for neighbour in (bits - 1, bits + 1):
        if neighbour & 0x7FFFFFFF in (LEAST - 1, LARGEST + 1):
            continue
        other = abs(value(neighbour) - number)
        assert error < other or (error == other and bits % 2 == 0)


@given(st.integers(LEAST, LARGEST), st.booleans(), st.integers(LEAST, LARGEST), st.booleans(), st.integers(0, ONE))
@settings(deadline=None, derandomize=True)
def test_reference_is_nearest(quotient, negative, mean, other_negative, alpha):
    """The reference itself, against the definition of nearest."""
    exact = (Fraction(alpha, ONE) * value(quotient | negative << 31)
             + Fraction(ONE - alpha, ONE) * value(mean | other_negative << 31))
    if abs(exact) >= Fraction(2) ** -126:
        reference_is_nearest(exact)


@pytest.mark.parametrize("seed", range(3))
def test_random(seed):
    """Exponents that are near each other, where both operands matter."""
    rng = random.Random(seed)
    operands = []
    for _ in range(2500):
        quotient = fp32(rng)
        operands.append((quotient, near(rng, quotient, rng.choice((1, 4, 30, 60))), share(rng)))
    check(operands, gaps=rng if seed == 1 else None)


def test_any_exponents():
    rng = random.Random(5)
    check([(fp32(rng), fp32(rng), share(rng)) for _ in range(1500)])


def test_cancellation():
    """Products nearly equal, of opposite sign, at all distances of exponents that allow it."""
    rng = random.Random(6)
    operands = []
    small = 0
    while len(operands) < 1500:
        quotient, alpha = fp32(rng, 30, 220) & ~SIGN, share(rng)
        if not 0 < alpha < ONE:
            continue
        wanted = nearest(value(quotient) * Fraction(alpha, ONE - alpha)) if alpha else 0
        mean = (wanted + rng.choice((-2, -1, 0, 0, 1, 2))) | SIGN
        if not LEAST <= mean & ~SIGN <= LARGEST:
            continue
        flip = rng.getrandbits(1) << 31
        operands.append((quotient ^ flip, mean ^ flip, alpha))
        result = abs(value(blended(*operands[-1])))
        small += result < value(quotient) * Fraction(alpha, ONE) / (1 << 18)
    assert small > 500
    distances = {(q >> 23 & 0xFF) - (m >> 23 & 0xFF) for q, m, _ in operands}
    assert set(range(-24, 25)) <= distances
    check(operands)


def test_ties():
    """The mean's product half-way between two fp32 numbers; alone, or with a quotient far below that decides."""
    rng = random.Random(7)
    operands = []
    while len(operands) < 1200:
        factor = rng.getrandbits(rng.randint(2, 23)) | 1
        places = factor.bit_length() - rng.randint(0, 1)
        if not places:
            continue
        # All places of the product below an fp32's are to be 100...0.
        low = (1 << places - 1) * pow(factor, -1, 1 << places) % (1 << places)
        significand = (rng.getrandbits(23) | 1 << 23) >> places << places | low
        if (significand * factor).bit_length() != 24 + places:
            continue
        mean = rng.getrandbits(1) << 31 | rng.randint(150, 250) << 23 | significand - (1 << 23)
        part = Fraction(factor, ONE) * abs(value(mean))
        down = abs(value(nearest(part)) - part)
        assert down == Fraction(2) ** ((nearest(part) >> 23) - 151) or nearest(part) & 0x7FFFFF == 0
        quotient = rng.choice((0, 1)) * fp32(rng, 1, max(1, (mean >> 23 & 0xFF) - rng.randint(20, 140)))
        operands.append((quotient, mean, ONE - factor))
    assert sum(not quotient for quotient, _, _ in operands) > 400
    check(operands)
    check([(mean, quotient, ONE - alpha) for quotient, mean, alpha in operands])


def test_least_results():
    """Around 2**-126: rounded first, then held against it."""
    rng = random.Random(8)
    operands = [(fp32(rng, 0, 4), fp32(rng, 0, 4), share(rng)) for _ in range(1000)]
    operands += [(LEAST | sign, 0, ONE - low) for low in range(4) for sign in (0, SIGN)]
    operands += [(LEAST + 1 | sign, 0, ONE - low) for low in range(4) for sign in (0, SIGN)]
    operands += [(LEAST + low | sign, 0, ONE - 2 * low) for low in range(1000, 1050) for sign in (0, SIGN)]
    operands += [(LEAST, LEAST | SIGN, ONE // 2), (LEAST, LEAST, 12345), (LEAST - 1, LEAST - 1, 12345)]
    check(operands)
    assert blended(LEAST | SIGN, 0, ONE - 1) == 0
    # 2**-126 * (1 - 2**-26): rounded up to a normal number.
    assert Fraction(ONE - 2048, ONE) * value(LEAST + 1024) < value(LEAST)
    assert blended(LEAST + 1024, 0, ONE - 2048) == LEAST


def test_alpha_of_one_is_the_quotient():
    rng = random.Random(9)
    operands = [(fp32(rng, 1), fp32(rng), ONE) for _ in range(300)]
    operands += [(0, mean, ONE) for mean in (0, SIGN, LARGEST, LEAST - 1)]
    assert run(operands) == [quotient for quotient, _, _ in operands]
    # Whatever the mean: a dense job has none, and the memory is not cleared.
    assert run([(0x3FC00000, bits, ONE) for bits in (0x7F800000, 0xFFC00001, 0x7FFFFFFF)]) == [0x3FC00000] * 3


def test_alpha_of_zero_is_the_mean():
    rng = random.Random(10)
    means = [fp32(rng, 1) for _ in range(300)] + [0, SIGN, LEAST - 1, SIGN | LEAST - 1]
    results = run([(fp32(rng, 1), mean, 0) for mean in means])
    assert results == [mean if mean >> 23 & 0xFF else 0 for mean in means]


def test_equal_operands_stay():
    """A convex combination of equal numbers is that number: no carry is lost at the top."""
    rng = random.Random(11)
    operands = [(bits, bits, share(rng)) for bits in (LARGEST, LARGEST | SIGN, LEAST, 0x3F800000) for _ in range(20)]
    assert run(operands) == [bits for bits, _, _ in operands]
