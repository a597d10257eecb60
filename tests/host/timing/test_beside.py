"""Reads beside writes in the timing model, and the bench of what they cost each other."""

import pytest

from kvattic.errors import RequestError
from kvattic.spec.config import PAPER
from kvattic.timing import Layer, estimate
from kvattic_sim.reports import bench
from kvattic_sim.reports.benches import beside


@pytest.fixture
def small(monkeypatch):
    """A bench of eight commands, and writes that go on for longer."""
    monkeypatch.setattr(beside, "HEADS", 8)
    monkeypatch.setattr(beside, "BATCH", 1)
    monkeypatch.setattr(beside, "PREFILL_HEADS", 40)


def test_a_die_that_waits_for_its_gate_gives_way_to_its_program():
    """Otherwise a die that waits for a program of another plane keeps K from the job that the loaded die waits for."""
    layer = Layer(PAPER, heads=8, tokens=2048)
    found = estimate(PAPER, layer.attend(), layer.prefill())
    assert all(job.completed for job in found.jobs)
    assert len(found.operations) == found.page_programs == 8 * 2048 // PAPER.tokens_per_page * 2
    alone = estimate(PAPER, layer.attend())
    assert found.cycles > alone.cycles
    assert found.page_reads >= alone.page_reads     # those that were given up are read again


@pytest.mark.parametrize("way", beside.WAYS, ids=lambda way: way.mode.name)
def test_what_writes_cost_and_what_suspend_gives_back(small, way):
    figures = beside.measure(way)
    (of_way,) = (one for one in beside.BENCHES if f"beside.p99_us.alone{way.suffix}" in one.keys)
    assert set(figures) == set(of_way.keys)
    for load, least in (("stripes", 1.0), ("prefill", 1.1), ("erase", 1.1)):
        assert figures[f"beside.slowdown.{load}{way.suffix}"] > least, load
        assert figures[f"beside.p99_us.{load}{way.suffix}"] > figures[f"beside.p99_us.alone{way.suffix}"], load
    stripe = PAPER.tokens_per_page if way.suffix == "" else PAPER.group_tokens
    once, often = figures[f"beside.slowdown.stripes{way.suffix}"], figures[f"beside.slowdown.append{way.suffix}"]
    assert often - 1 == pytest.approx((once - 1) / stripe)      # a batch of one sequence
    now, like_mqsim, ideal = (figures[f"beside.{how}slowdown.erase{way.suffix}"]
                              for how in ("", "suspend.", "suspend.ideal."))
    assert now > like_mqsim > ideal > 0.99
    now, ideal = (figures[f"beside.{how}in_turn.prefill{way.suffix}"] for how in ("", "suspend.ideal."))
    assert 0.8 < now < 1.02 * ideal < 1.5


def test_the_loads(small):
    way = beside.WAYS[0]
    erases = beside.operations("erase", way, PAPER)
    assert len(erases) == PAPER.channels * PAPER.dies * PAPER.part.planes
    assert not any(one.program for one in erases)
    assert len(beside.operations("stripes", way, PAPER)) == 2 * 8
    assert len(beside.operations("stripes", beside.WAYS[1], PAPER)) == 3 * 8 * PAPER.group_pages
    ended = estimate(PAPER, way.jobs(PAPER), beside.operations("prefill", way, PAPER))
    assert max(ended.operations) > beside.attention(ended).cycles       # it goes on for longer than the step
    with pytest.raises(RequestError, match="load must be one of stripes, prefill, erase, not 'trim'"):
        beside.operations("trim", way, PAPER)


def test_the_bench_is_registered():
    assert {key for one in beside.BENCHES for key in one.keys} <= set(bench.BARS)
    assert len(bench.select("beside", bench.benches())) == len(beside.BENCHES)
