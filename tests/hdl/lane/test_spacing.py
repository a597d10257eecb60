"""Beats of the feature pass stay apart from those that are added to the same word, however they arrive."""

import random

import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.config import Config
from kvattic.spec.nand import TINY_PART
from kvattic_hdl.lane.issue import Spacing
from kvattic_hdl.lib.shapes import ACCUMULATE_CYCLES

PART = TINY_PART.resized(512, spare_bytes=256)


@pytest.mark.parametrize(("beat_bytes", "gap"), [(32, 0.0), (32, 0.4), (16, 0.0), (16, 0.4)])
def test_words_of_a_group(beat_bytes: int, gap: float) -> None:
    config = Config(channels=3, rows=2, head_dim=32, beat_bytes=beat_bytes, part=PART, codeword_bytes=64,
                    score_depth=128)
    dut, sim = simulation(Spacing, config)
    rnd = random.Random(beat_bytes)
    added = [-ACCUMULATE_CYCLES] * config.group_words
    waited = 0

    async def bench(ctx):
        nonlocal waited
        beat = 0
        for cycle in range(2000):
            word = beat % config.group_words
            there = rnd.random() >= gap
            ctx.set(dut.group_beat, there)
            ctx.set(dut.group_begin, there and word == 0)
            ctx.set(dut.word, word)
            issue = there and not ctx.get(dut.waits)
            ctx.set(dut.issue, issue)
            if issue:
                assert cycle - added[word] >= ACCUMULATE_CYCLES, f"word {word} in cycle {cycle}"
                added[word], beat = cycle, beat + 1
            waited += there and not issue
            await ctx.tick()
        assert beat > 500

    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
    # Words that take their turns come no faster than they can be added: nothing waits in vain.
    assert gap or waited == (2000 * (ACCUMULATE_CYCLES - config.group_words) // ACCUMULATE_CYCLES
                             if config.group_words < ACCUMULATE_CYCLES else 0)
