"""TopK around real LaneTopKs: exact top-k, ties, alpha, order of jobs, against the golden model."""

from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib.wiring import Component
from amaranth.sim import Simulator
from tests.hdl.compiled import simulation
from tests.hdl.sparse.topk_bench import Lane, expect, make_job

from kvattic.golden.first_pass import ALPHA_ONE
from kvattic.spec.commands import Mode
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.formats import SCORE_MASKED, SCORE_MAX, SCORE_MIN
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.sparse.lane_topk import LaneTopK
from kvattic_hdl.sparse.topk import TopK

SPARF, FETCHED, CENTROID = Mode.SPARF, Mode.FETCHED, Mode.CENTROID
BROADCAST = ("sweep_valid", "sweep", "reference_write", "reference_row", "reference", "sum_row", "bin")


class Lanes(Component):
    """One TopK and a LaneTopK for each channel."""

    def __init__(self, config):
        self.selection = TopK(config)
        self.selectors = [LaneTopK(config) for _ in range(config.lanes)]
        super().__init__({})

    def elaborate(self, platform):
        m = Module()
        m.submodules.selection = self.selection
        for i, selector in enumerate(self.selectors):
            m.submodules[f"selector_{i}"] = selector
            m.d.comb += [getattr(selector, name).eq(getattr(self.selection, name)) for name in BROADCAST]
            m.d.comb += [
                self.selection.sweep_done[i].eq(selector.done),
                self.selection.sum[i].eq(selector.sum),
                self.selection.count[i].eq(selector.count),
                self.selection.unmarked[i].eq(selector.unmarked),
            ]
        return m


def lanes(config):
    """Lanes with their blocks' ports."""
    dut = Lanes(config)
    return dut, dut, [dut.selection, dut.selectors]


class Bench:
    """Runs jobs through a TopK, one after the other; `latencies`: from the first pass's end to `select_valid`."""

    def __init__(self, config, seed, **lane):
        self.config = config
        self.dut, self.simulator = simulation(lanes, config)
        self.selection = self.dut.selection
        self.rng = np.random.default_rng(seed)
        self.lanes = [Lane(s, config, seed + i, **lane) for i, s in enumerate(self.dut.selectors)]
        self.maxima = [{} for _ in self.lanes]    # (slot, row): first maximum
        self.selected, self.sweeps, self.latencies = [], 0, []
        self.cycle = 0

    def simulate(self, jobs):
        sim = self.simulator
        sim.add_clock(1e-6)
        for lane in self.lanes:
            sim.add_testbench(lane.run, background=True)
        sim.add_testbench(self.answer, background=True)

        async def run(ctx):
            for number, job in enumerate(jobs):
                await self.job(ctx, number, job)

        sim.add_testbench(run)
        sim.run()

    async def answer(self, ctx):
        """The lanes' maxima, two cycles late; listens to the strobes."""
        dut, before = self.selection, None
        while True:
            _, _, slot, row, select, select_slot, sweep = await ctx.tick().sample(
                dut.first_slot, dut.first_row, dut.select_valid, dut.select_slot, dut.sweep_valid)
            self.cycle += 1
            if before is not None:
                ctx.set(dut.first_maximum, before)
            before = [held.get((slot, row), SCORE_MASKED) for held in self.maxima]
            if select:
                self.selected.append((self.cycle, select_slot))
            self.sweeps += sweep

    def spread(self, slot, job):
        """Deal the job's stripes out to the lanes, and put each lane's maxima there."""
        channels = self.config.lanes
        first = int(self.rng.integers(channels))
        stripe_of_score = np.repeat(np.arange(len(job.tail)), self.config.group_tokens // job.step(self.config))
        for i, lane in enumerate(self.lanes):
            mine = [n for n in range(len(job.tail)) if (first + n) % channels == i]
            lane.put(slot, job, mine, int(self.rng.integers(self.config.ring_codewords)))
            part = job.scores[:, np.isin(stripe_of_score, mine)]
            for row in range(self.config.rows):
                here = part[row] if row < len(part) else part[0]    # rows that are none must not matter
                self.maxima[i][slot, row] = int(here.max(initial=SCORE_MASKED))

    async def job(self, ctx, number, job, failed=False, lanes=1):
        """One job; its lanes' first passes end at random times.  None: a dense one."""
        dut, config = self.selection, self.config
        slot = number % config.jobs_in_flight
        rows = config.rows if job is None else len(job.scores)
        if job is not None:
            self.spread(slot, job)
        payload = {
            "slot": slot, "lanes": lanes, "queue": number % 8, "identifier": number + 1,
            "mode": Mode.DENSE if job is None else job.mode, "units": 0 if job is None else job.units, "rows": rows,
            "read": number % 2, "result": number << 40, "status": 3, "where": 4}
        ctx.set(dut.jobs_i.payload, payload)
        ctx.set(dut.jobs_i.valid, 1)
        await ctx.tick().until(dut.jobs_i.ready)
        ctx.set(dut.jobs_i.valid, 0)
        sweeps, selections, begun = self.sweeps, len(self.selected), self.cycle
        if job is not None and lanes:
            for lane in self.rng.permutation(config.lanes).tolist():
                await ctx.tick().repeat(int(self.rng.integers(1, 4)))
                assert ctx.get(dut.waiting)
                assert ctx.get(dut.waiting_slot) == slot
                assert self.sweeps == sweeps
                if failed:
                    ctx.set(dut.failed, 1 << slot)
                ctx.set(dut.first_done[lane], ctx.get(dut.first_done[lane]) | 1 << slot)
            begun = self.cycle
        while not ctx.get(dut.jobs_o.valid):
            await ctx.tick()
            assert self.cycle - begun < 100_000
        assert not ctx.get(dut.waiting)
        shapes = Shapes(config)
        got = ctx.get(dut.jobs_o.payload)
        assert {name: got[name] for name, _ in shapes.job} == payload
        await ctx.tick().repeat(int(self.rng.integers(1, 3)))
        assert ctx.get(dut.jobs_o.valid)
        ctx.set(dut.jobs_o.ready, 1)
        await ctx.tick()
        ctx.set(dut.jobs_o.ready, 0)
        alphas = []
        for row in range(rows):
            ctx.set(dut.alpha_slot, slot)
            ctx.set(dut.alpha_row, row)
            await ctx.tick().repeat(2)
            alphas.append(ctx.get(dut.alpha))
        for lane in range(config.lanes):
            ctx.set(dut.first_done[lane], ctx.get(dut.first_done[lane]) & ~(1 << slot))
        ctx.set(dut.failed, 0)
        if job is None or failed or not lanes:
            assert alphas == [ALPHA_ONE] * rows
            assert self.sweeps == sweeps
            assert len(self.selected) == selections + (failed and lanes)
            return
        self.check(slot, job, alphas)
        (cycle, selected_slot), = self.selected[selections:]
        assert selected_slot == slot
        self.latencies.append(cycle - begun)

    def check(self, slot, job, alphas):
        expected = expect(self.config, job)
        taken = np.zeros(len(job.tail) * self.config.group_tokens, bool)
        for lane in self.lanes:
            taken[lane.tokens(slot)] = lane.marked(slot)
        assert (taken == expected.taken).all()
        assert expected.selected.sum() == min(job.units, expected.valid.sum())
        assert alphas == expected.alpha.tolist()


ONE_ROW = replace(TINY, channels=3, rows=1, codeword_bytes=128, ecc_t=1, score_depth=128)
"""Two tokens in a codeword, 64 in a group, two groups in a lane."""
TWO_ROWS = replace(ONE_ROW, rows=2)


@pytest.mark.parametrize(
    ("config", "mode", "unit_bits", "grant"),
    [
        (ONE_ROW, SPARF, 0, 1.0),
        (replace(ONE_ROW, channels=1), SPARF, 0, 0.8),
        (ONE_ROW, FETCHED, 1, 0.6),
        (ONE_ROW, CENTROID, ONE_ROW.unit_bits_max, 1.0),
        (TWO_ROWS, SPARF, 0, 1.0),
        (TWO_ROWS, FETCHED, 0, 1.0),
        (TWO_ROWS, CENTROID, 0, 1.0),
        (replace(TWO_ROWS, rows=3, channels=2), FETCHED, 1, 1.0),
    ],
)
def test_random_jobs(config, mode, unit_bits, grant):
    """Any units, tails, ends and windows; the slots go round; dense jobs between them."""
    bench = Bench(config, 11, grant=grant)
    rng = np.random.default_rng(config.rows * 100 + mode * 10 + unit_bits)
    jobs = []
    for number in range(5):
        stripes = int(rng.integers(1, 2 * config.lanes + 1))
        rows = int(rng.integers(1, config.rows + 1)) if number % 2 else config.rows
        jobs.append(make_job(config, rng, mode, stripes=stripes, unit_bits=unit_bits, rows=rows))
    jobs[2:2] = [None]
    bench.simulate(jobs)


def test_edges():
    """Ties across lanes, one unit, fewer units than k, only a tail, rows that attend nothing, limits of scores."""
    config = ONE_ROW
    bench = Bench(config, 12)
    rng = np.random.default_rng(12)
    size = config.group_tokens

    def job(mode=SPARF, stripes=4, unit_bits=0, fill=None, **given):
        given.setdefault("tail", [0] * stripes)
        given.setdefault("end", stripes * size - 3)
        given.setdefault("local", 0)
        if fill is not None:
            step = config.tokens_per_codeword << unit_bits if mode is CENTROID else 1
            given["scores"] = np.full((1, stripes * size // step), fill)
        return make_job(config, rng, mode, stripes=stripes, unit_bits=unit_bits, **given)

    jobs = [
        job(fill=77, units=200),                              # all equal: the lowest tokens
        job(fill=77, units=200, local=50),
        job(fill=SCORE_MAX, units=3),
        job(fill=SCORE_MIN, units=1, mode=FETCHED),
        job(fill=SCORE_MASKED, units=7),                      # no denominator: alpha is 1
        job(fill=SCORE_MASKED, units=7, mode=CENTROID),
        job(units=1),
        job(units=4 * size - 3),                              # all
        job(units=4 * size - 4),                              # all but one
        job(units=300, tail=[1, 0, 0, 1]),                    # more than there are: tokens of the tail are no units
        job(units=100, tail=[1, 1, 1, 1]),
        job(units=2, mode=FETCHED, unit_bits=1, end=5, stripes=1),    # a part of the only two units
        job(units=1, end=1, stripes=1),
        job(units=64, local=64),                              # the window takes all of it
        job(units=65, local=64),
        job(units=9, mode=CENTROID, unit_bits=1, fill=-5),
    ]
    # Two values that tie at the border, in all lanes; and one token that has all of the mass.
    levels = rng.choice([0, -1 << 22, -2 << 22], (1, 4 * size))
    jobs.append(job(units=int((levels == 0).sum()) + 40, scores=levels))
    peak = np.full((1, 4 * size), -63 << 22)
    peak[0, 3 * size + 5] = 0
    jobs.append(job(units=1, scores=peak.copy()))
    jobs.append(job(units=2, scores=peak))
    # Scores that differ in their last bit only.
    jobs.append(job(units=100, scores=rng.integers(0, 2, (1, 4 * size))))
    bench.simulate(jobs)


def test_forced_units():
    """More units than k in the local window; masses as long as that of a forced unit."""
    config = TWO_ROWS
    bench = Bench(config, 16)
    rng = np.random.default_rng(16)
    size = config.group_tokens
    full = np.full((2, 2 * size), SCORE_MAX)
    given = {"stripes": 2, "tail": [0, 0], "sinks": 0}
    jobs = [
        make_job(config, rng, FETCHED, unit_bits=0, units=2, local=4, end=2 * size - 3, **given),
        make_job(config, rng, FETCHED, unit_bits=3, units=3, local=4, end=2 * size, scores=full.copy(), **given),
        make_job(config, rng, FETCHED, unit_bits=3, units=2, local=32, end=2 * size, scores=full.copy(), **given),
        make_job(config, rng, FETCHED, unit_bits=3, units=2, local=32, end=2 * size - 1, scores=full.copy(), **given),
    ]
    forced = [int((expect(config, job).valid & (expect(config, job).rank >> 24 == 2**36 - 1)).sum()) for job in jobs]
    assert forced == [3, 1, 2, 3]
    assert expect(config, jobs[1]).rank[0] >> 24 == 1 << 35
    bench.simulate(jobs)


def test_rows_differ():
    """One row attends nothing, one is sharp: alphas are each row's own."""
    config = replace(TINY, rows=3, channels=2)
    bench = Bench(config, 13)
    rng = np.random.default_rng(13)
    tokens = 2 * config.group_tokens
    scores = np.stack([np.full(tokens, SCORE_MASKED), rng.integers(-1 << 26, 0, tokens), np.zeros(tokens, int)])
    job = make_job(config, rng, SPARF, stripes=2, scores=scores, units=20, tail=[0, 0], end=200, local=5)
    expected = expect(config, job).alpha
    assert expected[0] == ALPHA_ONE
    assert len(set(expected.tolist())) == 3
    bench.simulate([job])


def test_failed_and_without_lanes():
    """A failed job is selected without a sweep; one without lanes is not waited for; both have alpha 1."""
    config = ONE_ROW
    bench = Bench(config, 14)
    rng = np.random.default_rng(14)

    def job():
        return make_job(config, rng, SPARF, stripes=2, units=10, tail=[0, 0], end=200, local=0)

    original = bench.job

    async def with_flags(ctx, number, job):
        flags = {1: {"failed": True}, 3: {"lanes": 0}}
        await original(ctx, number, job, **flags.get(number, {}))

    bench.job = with_flags
    bench.simulate([job() for _ in range(6)])
    assert len(bench.latencies) == 4


def test_stale_first_done_is_not_taken():
    """first_done of the slot's last job falls after `start`; the job may come in that very cycle."""
    config = ONE_ROW
    dut = TopK(config)

    async def bench(ctx):
        ctx.set(dut.first_done, [7, 7, 7])
        await ctx.tick().repeat(3)
        ctx.set(dut.first_done, [6, 6, 6])
        ctx.set(dut.jobs_i.payload, {"slot": 0, "lanes": 1, "rows": 1, "mode": SPARF, "units": 1})
        ctx.set(dut.jobs_i.valid, 1)
        await ctx.tick()
        ctx.set(dut.jobs_i.valid, 0)
        for _ in range(30):
            assert ctx.get(dut.waiting)
            assert not ctx.get(dut.sweep_valid)
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize(("config", "cycles"), [
    (replace(PAPER.with_lane_channels(1), score_depth=4096), 2433),
    (PAPER, 4578),
], ids=["8 lanes", "2 lanes"])
def test_latency(config, cycles):
    """The figures of the class's documentation: 4,096 tokens in all lanes, one row, k a sixteenth."""
    bench = Bench(config, 15)
    rng = np.random.default_rng(15)
    tokens = 16 * config.group_tokens
    jobs = [
        make_job(config, rng, SPARF, stripes=16, units=tokens // 16, tail=[0] * 16, end=tokens, local=0,
                 scores=np.round(rng.normal(0, 2, (1, tokens)) * 2**22).astype(np.int64)),
    ]
    bench.simulate(jobs)
    assert bench.sweeps == 5
    assert bench.latencies == [cycles]
