"""Logarithm against the golden model's, and its latency."""

import math
import random

import pytest
from amaranth.sim import Simulator

from kvattic.golden.first_pass import log2
from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_FRACTION, VALUE_FRACTION
from kvattic_hdl.lib.logarithm import Logarithm

CONFIG = Config()


def values():
    bits = CONFIG.denominator_bits
    yield from (1, 2, 3, (1 << bits) - 1)
    for e in range(bits):
        yield from (1 << e, max(1, (1 << e) - 1), min((1 << e) + 1, (1 << bits) - 1))
    # The mantissa's last bit, and the bits below it.
    for e in (40, 47, 55):
        for below in (-33, -32, -31, -30, -1):
            if e + below >= 0:
                yield from ((1 << e) + (1 << (e + below)), (1 << e) - 1 - (1 << (e + below)))
    rng = random.Random(7)
    for _ in range(200):
        yield rng.getrandbits(rng.randint(1, bits)) or 1
    for tokens in (2, 3, 1000, 4096, 32768):
        yield tokens << VALUE_FRACTION


def test_all_bits():
    dut = Logarithm(CONFIG)

    async def bench(ctx):
        for number, value in enumerate(values()):
            ctx.set(dut.value, value)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            ctx.set(dut.value, 0)
            cycles = 1
            while not ctx.get(dut.done):
                await ctx.tick()
                cycles += 1
                assert cycles < 1000
            assert ctx.get(dut.result) == log2(value), hex(value)
            leading_zeros = CONFIG.denominator_bits - value.bit_length()
            assert cycles == 2 + 4 * SCORE_FRACTION + leading_zeros
            if number % 3 == 0:    # the result stays
                await ctx.tick().repeat(3)
                assert not ctx.get(dut.done)
                assert ctx.get(dut.result) == log2(value)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("value", [1, 3 << 38, (1 << 40) - 1, 1 << 40, 0x1234_5678_9ABC, (1 << 56) - 1])
def test_golden_is_a_logarithm(value):
    exact = math.log2(value / 2**VALUE_FRACTION)
    assert log2(value) / 2**SCORE_FRACTION == pytest.approx(exact, abs=2.0**-SCORE_FRACTION * 1.01)
