"""The divider against exact integer and rational arithmetic."""

import random
import struct
from fractions import Fraction

import pytest
from amaranth.hdl import unsigned
from amaranth.sim import Simulator
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hdl.bench import pipelined, simulate

from kvattic.spec.config import PAPER, TINY
from kvattic_hdl.lib.divider import DIVISOR_TOP, RECIPROCAL_BITS, Divider, Normaliser, Reciprocal, normalised

A, D = PAPER.accumulator_bits, PAPER.denominator_bits
TAG_BITS = 16


def fp32_quotient(numerator: int, denominator: int) -> int:
    """Bits of the fp32 nearest to the quotient, ties to even; +0 if either is zero."""
    if not numerator or not denominator:
        return 0
    magnitude = abs(numerator)
    exponent = magnitude.bit_length() - denominator.bit_length()
    if magnitude << max(0, -exponent) < denominator << max(0, exponent):
        exponent -= 1
    shift = 23 - exponent
    quotient, rest = divmod(magnitude << max(0, shift), denominator << max(0, -shift))
    divisor = denominator << max(0, -shift)
    if 2 * rest > divisor or (2 * rest == divisor and quotient & 1):
        quotient += 1
    # A carry out of the fraction lands in the exponent.
    return (numerator < 0) << 31 | ((exponent + 127) << 23) + quotient - (1 << 23)


def fp32_value(bits: int) -> Fraction:
    """The number that these bits are."""
    return Fraction(struct.unpack("<f", struct.pack("<I", bits))[0])


def reciprocal(denominator: int, bits: int) -> int:
    """What the divider guesses with, for a normalised denominator."""
    return (1 << DIVISOR_TOP + RECIPROCAL_BITS - 1) // ((denominator << DIVISOR_TOP >> bits) + 1)


def divide(pairs, numerator_bits=A, denominator_bits=D, gaps=None):
    """Quotients of the pairs by the RTL; checks tags, order and latency."""
    dut = Divider(numerator_bits, denominator_bits, unsigned(TAG_BITS))
    payloads = []
    for tag, (numerator, denominator) in enumerate(pairs):
        zeros = denominator_bits - denominator.bit_length() if denominator else 0
        raw = (numerator & (1 << numerator_bits) - 1) | (denominator << zeros) << numerator_bits
        raw |= zeros << numerator_bits + denominator_bits
        raw |= reciprocal(denominator << zeros, denominator_bits) << (
            numerator_bits + normalised(denominator_bits).size)
        payloads.append(raw | tag << dut.i.payload.shape().size - TAG_BITS)
    return pipelined(dut, payloads, Divider.LATENCY, gaps)


def check(pairs, numerator_bits=A, denominator_bits=D, gaps=None):
    quotients = divide(pairs, numerator_bits, denominator_bits, gaps)
    for pair, quotient in zip(pairs, quotients, strict=True):
        assert quotient == fp32_quotient(*pair), (pair, hex(quotient))


def random_pair(rng, numerator_bits=A, denominator_bits=D):
    """Any number of bits is as likely as any other."""
    numerator = rng.getrandbits(rng.randint(1, numerator_bits - 1)) * rng.choice((1, -1))
    return numerator, rng.getrandbits(rng.randint(1, denominator_bits))


def near_tie(rng):
    """A quotient half-way between two fp32 numbers, or the least bit beside it."""
    odd = rng.getrandbits(23) << 1 | 1 << 24 | 1
    denominator = rng.getrandbits(rng.randint(1, 44)) | 1
    numerator = odd * denominator
    numerator <<= rng.randint(0, A - 1 - numerator.bit_length())
    numerator += rng.choice((-1, 0, 0, 1))
    places = rng.randint(0, D - denominator.bit_length())
    return numerator * rng.choice((1, -1)), denominator << places


@given(st.integers(-(1 << A - 1), (1 << A - 1) - 1), st.integers(1, (1 << D) - 1))
@settings(deadline=None, derandomize=True)
def test_reference_is_nearest(numerator, denominator):
    """The integer reference, itself against rational arithmetic."""
    bits = fp32_quotient(numerator, denominator)
    exact = Fraction(numerator, denominator)
    error = abs(fp32_value(bits) - exact)
    if numerator:
        for neighbour in (bits - 1, bits + 1):
            other = abs(fp32_value(neighbour) - exact)
            assert error < other or (error == other and bits % 2 == 0)


@pytest.mark.parametrize("seed", range(3))
def test_random(seed):
    rng = random.Random(seed)
    check([random_pair(rng) for _ in range(3500)], gaps=rng if seed == 1 else None)


def test_ties():
    rng = random.Random(7)
    pairs = [near_tie(rng) for _ in range(800)]
    ties = 0
    for numerator, denominator in pairs:
        assert abs(numerator) < 1 << A - 1
        assert denominator < 1 << D
        ties += fp32_value(fp32_quotient(numerator, denominator)) != Fraction(
            numerator, denominator
        )
    assert ties > 500
    check(pairs)


def test_extremes():
    powers = [1 << i for i in range(A - 1)]
    edges = [0, 1, 3, (1 << A - 1) - 1, (1 << A - 1) - 2, 0xFFFFFF, 0x1FFFFFF, 0x3FFFFFF]
    numerators = [s * (n + d) for n in powers for s in (1, -1) for d in (-1, 0)]
    numerators += [s * n for n in edges for s in (1, -1)] + [-(1 << A - 1)]
    denominators = [0, 1, 3, (1 << D) - 1, (1 << D - 1) + 1]
    pairs = [(n, d) for n in numerators for d in denominators]
    pairs += [(n, 1 << i) for n in (1, -1, -(1 << A - 1), (1 << A - 1) - 1) for i in range(D)]
    check(pairs)


@given(
    st.lists(
        st.tuples(st.integers(-(1 << A - 1), (1 << A - 1) - 1), st.integers(0, (1 << D) - 1)),
        min_size=20,
        max_size=60,
    )
)
@settings(deadline=None, derandomize=True, max_examples=6)
def test_hypothesis(pairs):
    check(pairs)


@pytest.mark.parametrize(
    ("numerator_bits", "denominator_bits"),
    [(TINY.accumulator_bits, TINY.denominator_bits), (24, 40), (34, 9)],
)
def test_other_widths(numerator_bits, denominator_bits):
    rng = random.Random(numerator_bits)
    pairs = [random_pair(rng, numerator_bits, denominator_bits) for _ in range(400)]
    check(pairs, numerator_bits, denominator_bits)


@pytest.mark.parametrize("bits", [9, 56])
def test_normaliser(bits):
    rng = random.Random(bits)
    numbers = [0, 1, (1 << bits) - 1, 1 << bits - 1]
    numbers += [rng.getrandbits(rng.randint(1, bits)) for _ in range(100)]
    dut = Normaliser(bits)

    async def feed(ctx):
        for number in numbers:
            ctx.set(dut.i.payload, number)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def check_all(ctx):
        for number in numbers:
            while rng.random() < 0.3:
                await ctx.tick()
            ctx.set(dut.o.ready, 1)
            cycles = 0
            while not ctx.get(dut.o.valid):
                await ctx.tick()
                cycles += 1
            value = ctx.get(dut.o.payload)
            await ctx.tick()
            ctx.set(dut.o.ready, 0)
            assert cycles <= bits // 8 + 9
            assert value.value == number << (value.zeros if number else 0)
            assert not number or value.value >> bits - 1

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(feed)
    simulator.add_testbench(check_all)
    simulator.run()


@pytest.mark.parametrize("bits", [9, 20, 56])
def test_reciprocal(bits):
    rng = random.Random(bits)
    numbers = [1 << bits - 1, (1 << bits) - 1, (1 << bits - 1) + 1]
    numbers += [rng.getrandbits(bits) | 1 << bits - 1 for _ in range(60)]
    dut, seen = Reciprocal(bits), []

    async def feed(ctx):
        for number in numbers:
            ctx.set(dut.i.payload, {"value": number, "zeros": number % bits})
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)
            cycles = 0
            while not ctx.get(dut.o.valid):
                await ctx.tick()
                cycles += 1
            assert cycles == Reciprocal.LATENCY - 1
            for _ in range(rng.randrange(3)):
                await ctx.tick()
            seen.append(ctx.get(dut.o.payload))
            ctx.set(dut.o.ready, 1)
            await ctx.tick()
            ctx.set(dut.o.ready, 0)

    simulate(dut, feed)
    for number, found in zip(numbers, seen, strict=True):
        assert (found.value, found.zeros, found.reciprocal) == (number, number % bits, reciprocal(number, bits))
        exact = Fraction(1 << bits, number)
        assert exact - Fraction(1, 1 << 17) < Fraction(found.reciprocal, 1 << RECIPROCAL_BITS - 1) <= exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Divider(16, 16, unsigned(1)), "numerator_bits must be 17 to 100, not 16"),
        (lambda: Divider(20, 8, unsigned(1)), "denominator_bits must be 9 to 100, not 8"),
        (
            lambda: Divider(46, 20, unsigned(1)),
            r"numerator_bits must be at most 25 above denominator_bits \(20\), not 46",
        ),
        (lambda: Normaliser(8), "bits must be at least 9, not 8"),
    ],
)
def test_widths_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
