"""Guidance: two passes, a pair, one adapted pass."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic import TINY
from kvattic_sim.runs import agd
from kvattic_sim.runs.outcome import How, Request


def test_a_pair_has_the_bits_of_two_passes_and_reads_half():
    found = agd.guided(TINY, heads=2, image=100, text=20)
    assert found.equal and 0 < found.error < 5e-7 and found.stalls == {}
    two, pair, one = (found.costs[way] for way in agd.WAYS)
    read = [sum(cost.flash_bytes.values()) + sum(cost.dram_bytes.values()) for cost in (two, pair, one)]
    assert read[1] == read[2] and read[0] == pytest.approx(2 * read[2], rel=0.1)
    assert two.cycles > 1.6 * pair.cycles and pair.cycles >= one.cycles > 0
    # The condition makes a difference.
    assert not np.array_equal(found.bits[0], found.bits[1])


def test_rows_without_the_condition_do_not_see_it(monkeypatch):
    found = agd.guided(TINY, heads=1, image=60, text=20)
    monkeypatch.setattr(agd, "_inputs", lambda *given, real=agd._inputs: changed(real(*given), 20))
    other = agd.guided(TINY, heads=1, image=60, text=20)
    assert not np.array_equal(found.bits[0], other.bits[0])
    assert np.array_equal(found.bits[1], other.bits[1])


def changed(given, text):
    attention, query = given
    value = attention.value.copy()
    value[:, :text] ^= 0x8000    # other signs
    return replace(attention, value=value), query


def test_a_step_of_diffusion_gains_nothing_from_a_pair():
    two, pair, one = (run for _, run in agd.diffusion_runs(TINY, heads=2, image=64, text=16))
    assert (two.cycles, two.bytes) == (pair.cycles, pair.bytes)
    assert two.bytes == 2 * one.bytes and two.cycles > 1.8 * one.cycles
    # Each job of two rows reads all of K and V, by whole codewords.
    assert one.bytes == 2 * 32 * 2 * 80 * TINY.token_bytes
    assert two.how is How.MODELLED


def test_what_it_says():
    found = agd.run(Request())
    assert found.good and found.bit_exact is None and len(found.runs) == 9
    assert found.figures["pair_has_the_bits_of_two_passes"] == 1
    assert 0.5 <= found.figures["modelled_cycles_of_a_pair_over_two_passes_1_position"] < 0.55
    assert found.figures["modelled_cycles_of_a_pair_over_two_passes_1024_positions"] == 1


def test_wrong_bits_fail(monkeypatch):
    real = agd.guided
    monkeypatch.setattr(agd, "guided", lambda *args, **options: replace(
        real(*args, **options), pair=np.zeros((2, 4, 1, 64), np.uint32)))
    found = agd.run(Request())
    assert found.bit_exact is False and not found.good
