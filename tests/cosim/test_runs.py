"""Slices of workloads on the RTL."""

import pytest

from kvattic import TINY
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
