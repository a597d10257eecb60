"""Slices of workloads on the RTL."""

import numpy as np
import pytest

from kvattic import TINY
from kvattic_sim.runs import agd
from kvattic_sim.runs.outcome import How
from kvattic_sim.runs.slices import run_slice
from kvattic_sim.workloads import topical


@pytest.mark.slow
@pytest.mark.parametrize("drives", [1, 2])
def test_a_slice_has_the_golden_bits(drives):
    attention = topical(TINY, kv_heads=2, tokens=70, group=TINY.rows)
    found = run_slice(TINY, attention, "slice", target="sim:verilator", drives=drives)
    assert found.bit_exact is True and found.error < 5e-7
    assert found.run.how is How.MEASURED and found.run.cycles > 0
    assert found.run.limit.startswith(("lanes wait for", "flash buses"))
    modelled = run_slice(TINY, attention, "slice", drives=drives)
    assert found.run.bytes == modelled.run.bytes and found.error == modelled.error


@pytest.mark.slow
def test_a_pair_has_the_golden_bits():
    found, golden = (agd.guided(TINY, heads=2, image=60, text=20, target=target)
                     for target in ("sim:verilator", "model"))
    assert found.equal and np.array_equal(found.bits, golden.bits) and found.error < 5e-7
    two, pair, one = (found.costs[way] for way in agd.WAYS)
    assert not pair.modelled and one.cycles < two.cycles
    assert set(found.stalls) == set(agd.WAYS) and all(0 < sum(stalls.values()) < 1 for stalls in found.stalls.values())


@pytest.mark.slow
def test_a_draft_has_the_golden_bits():
    pytest.importorskip("torch", reason="needs the extra transformers")
    pytest.importorskip("transformers", reason="needs the extra transformers")
    from kvattic_sim.runs import dovetail

    found, golden = (dovetail.verify(TINY, ((0,),), heads=2, tokens=70, target=target)
                     for target in ("sim:verilator", "model"))
    assert found.equal and np.array_equal(found.together, golden.together) and found.error < 5e-7
    assert set(found.stalls) == {dovetail.ONE_PASS, dovetail.ONE_BY_ONE}
