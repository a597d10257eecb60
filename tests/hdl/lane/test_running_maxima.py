"""RunningMaxima: the largest score of each row, however closely scores follow each other."""

from dataclasses import replace

import numpy as np
import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.config import TINY
from kvattic.spec.formats import SCORE_MASKED
from kvattic_hdl.datapath.score import RunningMaxima


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_may_come_in_each_cycle(rows):
    config = replace(TINY, rows=rows)
    dut, sim = simulation(RunningMaxima, config)
    rng = np.random.default_rng(rows)
    expected = {}

    async def bench(ctx):
        for slot in range(config.jobs_in_flight):
            for row in range(rows):
                ctx.set(dut.load, {"slot": slot, "row": row, "record": 1})
                ctx.set(dut.load_valid, 1)
                await ctx.tick()
        ctx.set(dut.load_valid, 0)
        for _ in range(2000):
            slot, row = int(rng.integers(2)), int(rng.integers(rows))
            score, valid = int(rng.normal(0, 1 << 24)), bool(rng.random() < 0.9)
            for signal, value in ((dut.slot, slot), (dut.row, row), (dut.score, score), (dut.score_valid, valid)):
                ctx.set(signal, value)
            await ctx.tick()
            if valid:
                expected[slot, row] = max(expected.get((slot, row), SCORE_MASKED), score)
            if rng.random() < 0.02:
                # Begun anew: the scores from here on are below many of those before.
                ctx.set(dut.score_valid, 0)
                ctx.set(dut.load, {"slot": slot, "row": row, "record": 1})
                ctx.set(dut.load_valid, 1)
                await ctx.tick().repeat(2)
                ctx.set(dut.load_valid, 0)
                expected[slot, row] = SCORE_MASKED
                await ctx.tick()
            if rng.random() < 0.05:
                ctx.set(dut.score_valid, 0)
                await ctx.tick()
                ctx.set(dut.maximum_slot, slot)
                ctx.set(dut.maximum_row, row)
                await ctx.tick().repeat(2)
                assert ctx.get(dut.maximum) == expected.get((slot, row), SCORE_MASKED)

    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
