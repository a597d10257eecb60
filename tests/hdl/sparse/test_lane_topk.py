"""LaneTopK against the golden model's sums, masses, ranks and marks."""

from dataclasses import replace

import numpy as np
import pytest
from tests.hdl.compiled import simulation
from tests.hdl.sparse.topk_bench import Lane, expect, make_job, marked

from kvattic.spec.commands import Mode
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.formats import DIGIT_BITS, SCORE_MASKED
from kvattic_hdl.lib.shapes import LENGTH_FORCED, RANK_BITS, Sweep
from kvattic_hdl.sparse.lane_topk import KEPT, LaneTopK

SPARF, FETCHED, CENTROID = Mode.SPARF, Mode.FETCHED, Mode.CENTROID


def simulate(config, seed, bench, kept=KEPT, **lane):
    dut, sim = simulation(LaneTopK, config, kept)
    model = Lane(dut, config, seed, **lane)
    sim.add_clock(1e-6)
    sim.add_testbench(model.run, background=True)

    async def run(ctx):
        await bench(ctx, dut, model)

    sim.add_testbench(run)
    sim.run()


async def sweep(ctx, dut, slot, op, bits=0, prefix=0):
    """Run a sweep; returns cycles from `sweep_valid` to `done`."""
    assert ctx.get(dut.done)
    ctx.set(dut.sweep, {"slot": slot, "op": op.value, "bits": bits, "prefix": prefix})
    ctx.set(dut.sweep_valid, 1)
    await ctx.tick()
    ctx.set(dut.sweep_valid, 0)
    ctx.set(dut.sweep, {"slot": slot ^ 1, "op": op.value ^ 3, "bits": bits ^ 5, "prefix": prefix ^ 12345})
    cycles = 1
    while not ctx.get(dut.done):
        await ctx.tick()
        cycles += 1
        assert cycles < 50_000
    return cycles


async def refer(ctx, dut, references):
    for row, value in enumerate(references):
        ctx.set(dut.reference_row, row)
        ctx.set(dut.reference, int(value))
        ctx.set(dut.reference_write, 1)
        await ctx.tick()
    ctx.set(dut.reference_write, 0)
    ctx.set(dut.reference, 0)


async def pipelined(ctx, address, output, numbers):
    """What `output` says two cycles after each of the addresses, one a cycle."""
    result = []
    for i in range(len(numbers) + 2):
        if i < len(numbers):
            ctx.set(address, numbers[i])
        if i >= 2:
            result.append(ctx.get(output))
        await ctx.tick()
    return result


async def histogram(ctx, dut):
    return await pipelined(ctx, dut.bin, dut.count, range(1 << DIGIT_BITS))


def digit(rank, bits):
    """The digit behind the top `bits`."""
    return (rank << DIGIT_BITS) >> (RANK_BITS - bits) & ((1 << DIGIT_BITS) - 1)


def above(rank, bits):
    """The top `bits`."""
    return rank >> (RANK_BITS - bits)


def prefix(rank, bits):
    """The same, and zeros behind them."""
    return above(rank, bits) << RANK_BITS - bits


def length(rank):
    mass = rank >> 24
    return LENGTH_FORCED if mass == 2**36 - 1 else mass.bit_length()


async def check(ctx, dut, model, slot, job, mine, rng, bits=(1, 7, 18, 23, 37, 58)):
    """All four sweeps of the job's stripes `mine`, which `model` holds already."""
    config = model.config
    rows = len(job.scores)
    all_of_it = expect(config, job)
    unit, step = job.unit_tokens(config), job.step(config)
    stripe_of_score = np.repeat(np.arange(len(job.tail)), config.group_tokens // step)
    here = np.isin(stripe_of_score, mine)
    units_here = np.isin(np.repeat(np.arange(len(job.tail)), config.group_tokens // unit), mine) & all_of_it.valid

    # Denominators.
    await refer(ctx, dut, all_of_it.maximum)
    await sweep(ctx, dut, slot, Sweep.SUM)
    part = replace(job, scores=np.where(here, job.scores, SCORE_MASKED))
    weight = expect(config, part, all_of_it.maximum).probability
    assert await pipelined(ctx, dut.sum_row, dut.sum, range(rows)) == weight.sum(axis=1).tolist()

    # Masses and ranks.
    await refer(ctx, dut, all_of_it.reference)
    await sweep(ctx, dut, slot, Sweep.MASS)
    ranks = all_of_it.rank[units_here]
    assert await histogram(ctx, dut) == np.bincount([length(int(r)) for r in ranks], minlength=64).tolist()
    some = [int(r) for r in rng.permutation(ranks)[:3]] or [0]
    # Of a rank ever more bits, as each sweep may go through what the one before has kept; another rank begins anew.
    for rank, numbers in zip(some, (bits, (23, 29, 60)), strict=False):
        await sweep(ctx, dut, slot, Sweep.MASS)
        for number in numbers:
            await sweep(ctx, dut, slot, Sweep.DIGIT, number, prefix(rank, number))
            same = [int(r) for r in ranks if above(int(r), number) == above(rank, number)]
            assert await histogram(ctx, dut) == np.bincount(
                [digit(r, number) for r in same], minlength=64).tolist(), number

    # Marks.
    for number, rank in [(0, some[0]), (RANK_BITS, some[0]), (int(rng.integers(1, RANK_BITS)), some[-1]),
                         (RANK_BITS, (1 << RANK_BITS) - 1)]:
        await sweep(ctx, dut, slot, Sweep.MARK, number, prefix(rank, number))
        chosen = all_of_it.valid & (np.array([above(int(r), number) for r in all_of_it.rank]) >= above(rank, number))
        taken = marked(config, job, chosen)
        assert ctx.get(dut.unmarked) == (units_here & ~chosen).any()
        if job.mode is not CENTROID:
            total = all_of_it.probability[:, taken & here].sum(axis=1)
            assert await pipelined(ctx, dut.sum_row, dut.sum, range(rows)) == total.tolist()
        assert (model.marked(slot) == taken[model.tokens(slot)]).all()


ONE_ROW = replace(TINY, rows=1, codeword_bytes=128, ecc_t=1, score_depth=128)
"""Two tokens in a codeword, 64 in a group, two groups in a lane."""
WHOLE = replace(ONE_ROW, codeword_bytes=64)
"""A codeword is one token."""
TWO_ROWS = replace(TINY, score_depth=256)
"""Four tokens in a codeword, 128 in a group, two groups in a lane."""
FIVE_ROWS = replace(ONE_ROW, rows=5)
PAIRS = replace(FIVE_ROWS, lane_channels=2, beat_bytes=16, dram_beat_bytes=16)
"""Two tokens in a codeword, which a sweep takes in one step."""
FOURS = replace(TWO_ROWS, channels=4, lane_channels=4, beat_bytes=32, dram_beat_bytes=32)
"""Four tokens in a codeword and in a step."""
HALVES = replace(TWO_ROWS, lane_channels=2, beat_bytes=16)
"""Four tokens in a codeword, which a sweep takes in two steps."""


@pytest.mark.parametrize(
    ("config", "mode", "unit_bits", "grant"),
    [
        (ONE_ROW, SPARF, 0, 1.0),
        (ONE_ROW, SPARF, 0, 0.4),
        (ONE_ROW, FETCHED, 0, 1.0),
        (ONE_ROW, FETCHED, ONE_ROW.unit_bits_max, 0.7),
        (ONE_ROW, CENTROID, 1, 0.7),
        (TWO_ROWS, SPARF, 0, 0.8),
        (TWO_ROWS, FETCHED, 1, 1.0),
        (TWO_ROWS, CENTROID, 0, 1.0),
        (TWO_ROWS, CENTROID, TWO_ROWS.unit_bits_max, 0.5),
        (FIVE_ROWS, FETCHED, FIVE_ROWS.unit_bits_max, 0.9),
        (WHOLE, SPARF, 0, 0.9),
        (WHOLE, FETCHED, 2, 1.0),
        (WHOLE, CENTROID, 0, 1.0),
        (PAIRS, SPARF, 0, 1.0),
        (PAIRS, FETCHED, PAIRS.unit_bits_max, 0.7),
        (PAIRS, CENTROID, 0, 0.7),
        (FOURS, SPARF, 0, 0.8),
        (FOURS, FETCHED, 0, 1.0),
        (FOURS, CENTROID, 1, 0.9),
        (HALVES, SPARF, 0, 1.0),
        (HALVES, FETCHED, HALVES.unit_bits_max, 0.8),
        (HALVES, CENTROID, 0, 1.0),
        *((replace(config, rows=1), mode, unit_bits, grant)
          for config, grant in ((PAIRS, 0.8), (FOURS, 1.0), (HALVES, 0.9))
          for mode, unit_bits in ((SPARF, 0), (FETCHED, 0), (FETCHED, config.unit_bits_max), (CENTROID, 1))),
    ],
)
@pytest.mark.parametrize("kept", [4, KEPT])
def test_sweeps(config, mode, unit_bits, grant, kept):
    """Random jobs: tail stripes and ends anywhere, fewer rows than there are, several slots; all units kept, or not."""
    lane_stripes = config.ring_codewords // config.group_codewords

    async def bench(ctx, dut, model):
        rng = np.random.default_rng(config.rows * 100 + mode * 10 + unit_bits)
        for number in range(3 if grant == 1 else 2):
            slot = int(rng.integers(config.jobs_in_flight))
            mine = np.flatnonzero(rng.random(2 * lane_stripes) < 0.6)[:lane_stripes]
            # The last one is in the lane's list, but for one job.
            stripes = int(mine.max(initial=0)) + 1 + (number == 2)
            rows = config.rows if number < 1 else int(rng.integers(1, config.rows + 1))
            job = make_job(config, rng, mode, stripes=stripes, unit_bits=unit_bits, rows=rows)
            model.put(slot, job, mine, int(rng.integers(config.ring_codewords)))
            await ctx.tick()
            await check(ctx, dut, model, slot, job, mine, rng)

    simulate(config, 1, bench, kept, grant=grant)


@pytest.mark.parametrize("config", [ONE_ROW, replace(PAIRS, rows=1), replace(FOURS, rows=1)])
@pytest.mark.parametrize("mode", [SPARF, FETCHED, CENTROID])
def test_edges(mode, config):
    """Nothing in the list; only a tail; all masked; all equal; ends in a unit and at its edges; local windows."""
    size, unit_bits = config.group_tokens, 0 if mode is SPARF else 1
    unit = 1 if mode is SPARF else config.tokens_per_codeword << unit_bits

    async def bench(ctx, dut, model):
        rng = np.random.default_rng(5)
        def job_of(stripes, tail, **given):
            return make_job(config, rng, mode, stripes=stripes, unit_bits=unit_bits, tail=tail, **given)

        jobs = [
            (job_of(2, [0, 0]), []),
            (job_of(2, [1, 1]), [0, 1]),
            (job_of(1, [0], end=1, local=0), [0]),
            (job_of(2, [0, 0], end=size + unit + 1, local=0), [0, 1]),
            (job_of(2, [1, 0], end=2 * size, local=unit), [0, 1]),
            (job_of(2, [0, 0], end=size + 7, local=size), [0, 1]),
            (job_of(1, [0], base=0, end=size, local=2 * size), [0]),
            (job_of(1, [0], base=(1 << 24) - 2 * size), [0]),
        ]
        for fill in (SCORE_MASKED, 12345):
            scores = np.full((1, 2 * size // (unit if mode is CENTROID else 1)), fill)
            jobs.append((job_of(2, [0, 0], scores=scores, local=9), [0, 1]))
        for number, (job, mine) in enumerate(jobs):
            slot = number % config.jobs_in_flight
            model.put(slot, job, mine, 100)
            await ctx.tick()
            await check(ctx, dut, model, slot, job, np.array(mine, int), rng, bits=(1, 54))

    simulate(config, 2, bench)


@pytest.mark.usefixtures("each_simulator")
def test_mass_saturates():
    """Masses of more than their format holds, which a reference at its own limit may bring about."""
    config = replace(FIVE_ROWS, rows=16)
    unit_bits = config.unit_bits_max

    async def bench(ctx, dut, model):
        rng = np.random.default_rng(9)
        scores = np.full((16, config.group_tokens), 1 << 22)
        job = make_job(config, rng, FETCHED, stripes=1, unit_bits=unit_bits, tail=[0], end=config.group_tokens,
                       local=1, scores=scores, sinks=0)
        model.put(0, job, [0], 0)
        await refer(ctx, dut, [1 << 22] * 16)
        await sweep(ctx, dut, 0, Sweep.MASS)
        expected = expect(config, job, np.full(16, 1 << 22))
        assert expected.rank[0] >> 24 == 2**36 - 2
        counts = await histogram(ctx, dut)
        assert counts[36:38] == [len(expected.rank) - 1, 1]
        # The forced one is above the others.
        await sweep(ctx, dut, 0, Sweep.MARK, 36, (2**36 - 1) << 24)
        assert model.marked(0).sum() == job.unit_tokens(config)

    simulate(config, 3, bench)


@pytest.mark.parametrize("config", [ONE_ROW, FIVE_ROWS])
def test_many_sweeps(config):
    """Counts of a sweep are none of those of earlier ones, however many these were."""

    async def bench(ctx, dut, model):
        rng = np.random.default_rng(6)
        jobs = [make_job(config, rng, SPARF, stripes=1, rows=1, tail=[0], local=0, sinks=0) for _ in range(2)]
        for slot, job in enumerate(jobs):
            model.put(slot, job, [0], config.group_codewords * slot)
        lengths = [[length(int(r)) for r in expect(config, job).rank[expect(config, job).valid]] for job in jobs]
        references = [expect(config, job).reference for job in jobs]
        for number in range(300):
            # Mostly the first one's, so that bins of the other are not touched for long.
            slot = int(number % 43 == 0)
            await refer(ctx, dut, references[slot])
            await sweep(ctx, dut, slot, Sweep.MASS)
            if number % 43 < 2 or number > 250:
                assert await histogram(ctx, dut) == np.bincount(lengths[slot], minlength=64).tolist(), number

    simulate(config, 5, bench)


@pytest.mark.parametrize(("rows", "figures"), [
    (1, [[536, 538, 536, 537], [152, 139, 152, 281]]),
    (2, [[535, 523, 538, 527], [151, 139, 154, 266]]),
])
def test_cycles(rows, figures):
    """The figures of the class's documentation: 512 tokens, a job of one row, the score memory free."""
    config = replace(PAPER.with_lane_channels(1), rows=rows)
    size = config.group_tokens
    cycles = {}

    async def bench(ctx, dut, model):
        rng = np.random.default_rng(4)
        job = make_job(config, rng, SPARF, stripes=2, rows=1, tail=[0, 0], end=2 * size, local=0, sinks=0)
        model.put(1, job, [0, 1], 0)
        await ctx.tick()
        expected = expect(config, job)
        await refer(ctx, dut, expected.reference)
        for op in (Sweep.SUM, Sweep.DIGIT, Sweep.MASS):
            cycles[op] = await sweep(ctx, dut, 1, op, 7 * (op is Sweep.DIGIT), 0)
        rank = int(expected.rank[0])
        again = [await sweep(ctx, dut, 1, Sweep.DIGIT, bits, prefix(rank, bits)) for bits in (20, 26, 60)]
        matching = sum(above(int(r), 20) == above(rank, 20) for r in expected.rank)
        threshold = int(np.sort(expected.rank)[-64])
        cycles[Sweep.MARK] = await sweep(ctx, dut, 1, Sweep.MARK, RANK_BITS, threshold)
        assert model.marked(1).sum() == 64

        # Through all units, then through those that the sweep before has kept.
        assert 512 < again[0] <= 523
        assert matching < again[1] <= matching + 14
        assert again[2] <= again[1]
        sparf = cycles.copy()
        job = make_job(config, rng, CENTROID, stripes=2, unit_bits=1, rows=1, tail=[0, 0], end=2 * size, local=0,
                       sinks=0)
        model.put(2, job, [0, 1], 0)
        await ctx.tick()
        for op in Sweep:
            cycles[op] = await sweep(ctx, dut, 2, op)
        assert [list(sparf.values()), list(cycles.values())] == figures

    simulate(config, 4, bench)
