"""`CodeTables`: what an octet's codes add to score sums, against the numbers of docs/numerics.md."""

import random
from dataclasses import replace

import pytest
from tests.hdl.bench import simulate

from kvattic.spec.codes import field_bits, level_beats, one_bit_features
from kvattic.spec.config import GQA, PAPER, TINY, Config
from kvattic.spec.formats import CODES_BITS, CODES_LIMIT, CODES_SHIFT, SCORE_WINDOW_BITS
from kvattic_hdl.datapath.codes import BUILD_CYCLES, CodeTables

CONFIGS = {"tiny": TINY, "two channels a lane": replace(TINY, lane_channels=2, beat_bytes=16), "gqa": GQA,
           "paper": PAPER}


def expected(config: Config, products: list[int], field: int) -> tuple[int, bool]:
    """What a field adds, and whether anything of the octet is clipped."""
    cut = [min(abs(x) >> CODES_SHIFT, CODES_LIMIT) * (-1 if x < 0 else 1) for x in products]
    clipped = any(abs(x) >> CODES_SHIFT > CODES_LIMIT for x in products)
    narrow, total = one_bit_features(config), 0
    codes = []
    for f in range(8):
        width = 1 if f >= 8 - narrow else 2
        codes.append(field & (1 << width) - 1)
        field >>= width
    for p in range(0, 8, 2):
        def entry(low: int, high: int, p: int = p) -> int:
            return cut[p] + cut[p + 1] + low * cut[8 + p] + high * cut[9 + p]

        clipped |= any(not -(1 << CODES_BITS - 1) <= entry(i % 4, i // 4) < 1 << CODES_BITS - 1 for i in range(16))
        half = 1 << CODES_BITS - 1
        total += (entry(codes[p], codes[p + 1]) + half) % (2 * half) - half
    return total, clipped


@pytest.mark.parametrize("name", CONFIGS)
def test_sums(name: str) -> None:
    config = CONFIGS[name]
    rng = random.Random(4)
    dut = CodeTables(config)
    seen = []

    async def bench(ctx):
        for number in range(12):
            bits = rng.choice([CODES_SHIFT + 8, CODES_SHIFT + CODES_BITS - 4, CODES_SHIFT + CODES_BITS - 2,
                               SCORE_WINDOW_BITS])
            products = [rng.choice([-1, 1]) * rng.randrange(1 << bits) for _ in range(16)]
            elements = config.elements_per_beat
            for beat in range(level_beats(config)):
                ctx.set(dut.levels, 1)
                for e in range(elements):
                    product = products[beat * elements + e]
                    ctx.set(dut.addend[e], abs(product))
                    ctx.set(dut.negative[e], product < 0)
                await ctx.tick()
                ctx.set(dut.levels, 0)
                for _ in range(rng.randrange(3)):
                    await ctx.tick()
            for _ in range(BUILD_CYCLES + 2):
                await ctx.tick()
            for _ in range(6):
                fields = [rng.randrange(1 << field_bits(config)) for _ in range(elements)]
                for e, field in enumerate(fields):
                    ctx.set(dut.fields[e], field)
                ctx.set(dut.bank, number % 2)
                await ctx.tick()
                await ctx.tick()
                ctx.set(dut.valid, 1)
                await ctx.tick()
                ctx.set(dut.valid, 0)
                for e, field in enumerate(fields):
                    total, clipped = expected(config, products, field)
                    assert ctx.get(dut.sums[e]) == total
                    assert ctx.get(dut.clipped) >> number % 2 & 1 == clipped
                    seen.append(clipped)
                await ctx.tick()
                assert all(ctx.get(total) == 0 for total in dut.sums)

    simulate(dut, bench)
    assert any(seen) and not all(seen)
