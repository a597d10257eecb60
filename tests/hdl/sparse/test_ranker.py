"""Ranker: chosen features and approximate scales against integer arithmetic."""

import math
import random
import struct
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from amaranth.sim import Simulator

from kvattic.golden import first_pass
from kvattic.spec.config import TINY, Config
from kvattic_hdl.sparse.ranker import Ranker, RowScale

ONE = 1 << 23   # significand of a scale of 1.0
PAPER = Config()
CONFIGS = {
    "fp16": replace(TINY, rows=1),
    "fp16_rows": replace(TINY, rows=3),
    "bf16": replace(TINY, rows=1, element="bf16"),
    "bf16_rows": replace(TINY, rows=4, element="bf16"),
    "wide": Config(channels=2, rows=2, head_dim=96, sparse=False),
}


def magnitude(config, bits):
    """Floor of |element| * 2**24, clipped; zero for what is not finite."""
    form = config.element.encoding
    exponent, fraction = bits >> form.fraction_bits & form.exponent_max + 1, bits & (1 << form.fraction_bits) - 1
    if exponent > form.exponent_max:
        return 0
    significand = fraction | (exponent > 0) << form.fraction_bits
    places = max(exponent, 1) - form.bias - form.fraction_bits + 24
    return min(significand << places if places >= 0 else significand >> -places, (1 << 40) - 1)


def choose(config, q, count):
    """The chosen features, ascending."""
    totals = [sum(magnitude(config, row[c]) for row in q) for c in range(config.head_dim)]
    return sorted(sorted(range(config.head_dim), key=lambda c: (-totals[c], c))[:count])


def scale_of(part, whole, scale, k_offset):
    """Significand and k_offset of a row's first pass."""
    if part == 0:
        return scale, k_offset
    product = scale * math.isqrt((whole << 48) // part)
    length = product.bit_length()
    return product >> length - 24, k_offset + length - 48


def expected(config, q, count, scale, k_offset):
    chosen = choose(config, q, count)
    scales = []
    for row in q:
        m = [magnitude(config, element) for element in row]
        scales.append(scale_of(sum(m[c] for c in chosen), sum(m), scale, k_offset))
    return chosen, scales


@dataclass
class Job:
    """A query and what came of it."""

    q: list
    features: int
    scale: int = ONE
    k_offset: int = 0
    go: int = 0             # cycles from the last word to `go`
    gap: float = 0.0        # of no word
    abort: int | None = None   # cycles after which `clear` comes
    chosen: list = field(default_factory=list)
    scales: list = field(default_factory=list)
    cycles: int = 0         # from the last word to `done`


def run(config, jobs, *, seed=0):
    dut = Ranker(config)
    rng = random.Random(seed)

    async def bench(ctx):
        for job in jobs:
            ctx.set(dut.clear, 1)
            await ctx.tick().repeat(rng.randint(1, 3))
            ctx.set(dut.clear, 0)
            ctx.set(dut.go, 0)
            ctx.set(dut.rows, len(job.q))
            ctx.set(dut.features, job.features)
            ctx.set(dut.scale, job.scale)
            ctx.set(dut.k_offset, job.k_offset)
            words = struct.unpack(f"<{len(job.q) * config.head_dim // 4}Q",
                                  b"".join(struct.pack(f"<{config.head_dim}H", *row) for row in job.q))
            for word in words:
                while rng.random() < job.gap:
                    ctx.set(dut.valid, 0)
                    await ctx.tick()
                ctx.set(dut.valid, 1)
                ctx.set(dut.word, word)
                await ctx.tick()
            ctx.set(dut.valid, 0)
            while not ctx.get(dut.done) and job.cycles != job.abort:
                ctx.set(dut.go, job.cycles >= job.go)
                if job.cycles < job.go:
                    assert not ctx.get(dut.chosen_valid) and not ctx.get(dut.scale_valid)
                if ctx.get(dut.chosen_valid):
                    assert ctx.get(dut.chosen_index) == len(job.chosen)
                    assert not ctx.get(dut.scale_valid)
                    job.chosen.append(ctx.get(dut.chosen))
                if ctx.get(dut.scale_valid):
                    assert ctx.get(dut.scale_row) == len(job.scales)
                    job.scales.append((ctx.get(dut.approximate.scale), ctx.get(dut.approximate.k_offset)))
                await ctx.tick()
                job.cycles += 1
                assert job.cycles < 20_000

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


def check(config, jobs):
    for number, job in enumerate(jobs):
        if job.abort is None:
            chosen, scales = expected(config, job.q, job.features, job.scale, job.k_offset)
            assert job.chosen == chosen, (number, job.features)
            assert job.scales == scales, (number, job.features)


def element(rng, config, spread):
    """A finite number's bits; exponents of the `spread` lowest, around 1.0, or all."""
    form = config.element.encoding
    exponent = {
        "all": rng.randint(0, form.exponent_max),
        "low": rng.randint(0, 3),
        "near": rng.randint(form.bias - 5, form.bias + 2),
        "high": rng.randint(form.exponent_max - 1, form.exponent_max),
    }[spread]
    return rng.getrandbits(1) << 15 | exponent << form.fraction_bits | rng.getrandbits(form.fraction_bits)


def query(rng, config, rows, spread="near"):
    return [[element(rng, config, spread) for _ in range(config.head_dim)] for _ in range(rows)]


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_model(name):
    """The integers below are those of `kvattic.golden.first_pass`."""
    config = CONFIGS[name]
    rng = random.Random(name)
    for spread in ("near", "all", "low", "high"):
        q, count = query(rng, config, config.rows, spread), rng.randint(1, config.head_dim)
        bits = np.array(q, np.uint16)
        features = first_pass.top_features(bits, count, config.element)
        chosen, scales = expected(config, q, count, ONE | 0x1234, 130)
        assert features.tolist() == chosen
        significand, exponent = first_pass.approximate_scales(bits, features, config.element, 130 << 23 | 0x1234)
        assert list(zip(significand.tolist(), exponent.tolist(), strict=True)) == scales


@pytest.mark.parametrize("name", CONFIGS)
def test_random_queries(name):
    config = CONFIGS[name]
    rng = random.Random(name)
    counts = [1, config.head_dim, config.head_dim - 1, config.head_dim // 8, 2]
    jobs = [
        Job(query(rng, config, rng.randint(1, config.rows), spread),
            counts[i] if i < len(counts) else rng.randint(1, config.head_dim),
            scale=rng.choice((ONE, 2 * ONE - 1, ONE | rng.getrandbits(23))), k_offset=rng.randint(-372, 105),
            go=rng.choice((0, 0, 3000)), gap=rng.choice((0, 0, 0.7)))
        for i, spread in enumerate(("near", "near", "all", "high", "low", "all", "near"))
    ]
    run(config, jobs)
    check(config, jobs)


@pytest.mark.parametrize("name", CONFIGS)
def test_special_queries(name):
    """Ties, zeros, subnormals, the smallest part of the largest whole, negative zeros."""
    config = CONFIGS[name]
    form = config.element.encoding
    rng = random.Random(name)
    dim, rows = config.head_dim, config.rows
    one = form.bias << form.fraction_bits
    largest = (form.exponent_max + 1 << form.fraction_bits) - 1
    infinity = form.exponent_max + 1 << form.fraction_bits
    jobs = [
        Job([[one] * dim] * rows, 7),                                   # all equal: the lowest
        Job([[one | c % 2 << 15 for c in range(dim)]] * rows, dim),
        Job([[0x8000 * (c % 2) for c in range(dim)]] * rows, 5),        # zeros: the scale as it is
        Job([[0] * (dim - 1) + [1]] * rows, 1),                         # one subnormal
        Job([[rng.randint(0, 3) for _ in range(dim)] for _ in range(rows)], dim // 2),
        Job([[rng.choice((one, one + 1)) for _ in range(dim)] for _ in range(rows)], dim // 3),
        Job([[largest] * dim] * rows, 1, scale=2 * ONE - 1, k_offset=105),
        Job([[infinity, infinity + 1] * (dim // 2)] * rows, 3),         # as zeros
        Job([[one + c for c in reversed(range(dim))]] * rows, 4),
    ]
    if rows > 1:
        # A row all of whose magnitude, or none, is in the chosen features; the sums of all rows are equal.
        half = [one] * (dim // 2) + [0] * (dim // 2)
        jobs += [Job([half, half[::-1]], dim // 2), Job([half, [0] * dim], 3), Job([[0] * dim, half[::-1]], dim - 1)]
        # One unit more in the last row decides.
        jobs.append(Job([[one] * dim] * (rows - 1) + [[one] * (dim - 1) + [one + 1]], 1))
    run(config, jobs)
    check(config, jobs)


def test_clear_at_any_time():
    config = CONFIGS["fp16_rows"]
    rng = random.Random(5)
    jobs = []
    for cycles in (1, 20, 90, 101, 140, 180, 230, 300, 330, 360, 420):
        jobs.append(Job(query(rng, config, 3), 4, abort=cycles))
        jobs.append(Job(query(rng, config, 1), rng.randint(1, 32)))
    run(config, jobs)
    check(config, jobs)


def test_cycles():
    """For head_dim 128 and one row: normal queries, and some that take long."""
    rng = random.Random(1)
    normal = [Job([[struct.unpack("<H", struct.pack("<e", rng.gauss(0, 1)))[0] for _ in range(128)]], r)
              for r in (16, 32)]
    run(PAPER, normal)
    check(PAPER, normal)
    assert max(job.cycles for job in normal) <= 1000
    # A feature in each binade, so that many digits are live and the least ones decide.
    slow = Job([[min(c // 4, 29) << 10 | 0x3FF - (c % 4) * 0x55 for c in range(128)]], 127)
    rows = Job([[rng.getrandbits(15) % 0x7C00 >> row for _ in range(128)] for row in range(4)], 127)
    for config, job in ((PAPER, slow), (replace(PAPER, rows=4), rows)):
        run(config, [job])
        check(config, [job])
        assert job.cycles <= len(job.q) * 2 * (128 + 8) + 7 + 11 * (128 + 24) + 131


@pytest.mark.parametrize("bits", [45, 48])
def test_row_scale(bits):
    dut = RowScale(bits)
    rng = random.Random(bits)
    top = (1 << bits) - 1
    cases = [(0, 0, ONE), (0, top, ONE | 1), (1, top, 2 * ONE - 1), (1, 1, ONE), (top, top, 2 * ONE - 1), (1, 2, ONE),
             (1, 4, ONE + 1), (top - 1, top, ONE)]
    for _ in range(20):
        whole = rng.getrandbits(rng.randint(1, bits)) | 1
        cases.append((rng.randint(0, whole) >> rng.choice((0, 0, bits // 2)), whole, ONE | rng.getrandbits(23)))
    times = []

    async def bench(ctx):
        for part, whole, scale in cases:
            k_offset = rng.randint(-372, 105)
            ctx.set(dut.i.payload.part, part)
            ctx.set(dut.i.payload.whole, whole)
            ctx.set(dut.scale, scale)
            ctx.set(dut.k_offset, k_offset)
            ctx.set(dut.i.valid, 1)
            assert ctx.get(dut.i.ready)
            await ctx.tick()
            ctx.set(dut.i.valid, 0)
            cycles = 1
            while not ctx.get(dut.valid):
                assert not ctx.get(dut.i.ready)
                await ctx.tick()
                cycles += 1
            assert (ctx.get(dut.scale_o), ctx.get(dut.k_offset_o)) == scale_of(part, whole, scale, k_offset)
            times.append((cycles, part))
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
    steps = bits + bits % 2 + 48
    assert {cycles for cycles, part in times if not part} == {1}
    assert all(steps + 5 <= cycles <= steps + 5 + 24 for cycles, part in times if part)
