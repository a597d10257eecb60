"""Energy: each figure has a source and a range, and the sum is made of all parts."""

from dataclasses import fields
from pathlib import Path

import pytest

from kvattic.spec.config import PAPER, TINY
from kvattic.timing.cost import Cost
from kvattic.timing.energy import FIGURES, Energy, Range, Work, energy_of


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_range_and_a_source(name):
    figure = FIGURES[name]
    assert 0 < figure.range.low < figure.range.typical < figure.range.high
    assert "assumed" in figure.source or any(year in figure.source for year in ("2007", "2013", "2014", "2017", "2019"))


def test_nothing_costs_nothing():
    assert energy_of(PAPER, Work()).joules == (0, 0, 0)


@pytest.mark.parametrize("work", [field.name for field in fields(Work)])
def test_all_work_costs_something(work):
    energy = energy_of(PAPER, Work(**{work: 1}))
    assert 0 < energy.joules.low < energy.joules.typical < energy.joules.high
    double = energy_of(PAPER, Work(**{work: 2}))
    assert double.joules.typical == pytest.approx(2 * energy.joules.typical)


def test_arrays_cost_their_power_for_their_time():
    energy = energy_of(PAPER, Work(page_reads=1, page_programs=1, block_erases=1))
    milliwatts = FIGURES["array"].range.typical
    for name, nanoseconds in (("read", PAPER.part.t_r), ("program", PAPER.part.t_prog), ("erase", PAPER.part.t_bers)):
        assert energy.parts[name].typical == pytest.approx(milliwatts * 1e-3 * nanoseconds * 1e-9)


def test_bits_cost_what_their_way_costs():
    energy = energy_of(TINY, Work(bus_bytes=1000, dram_bytes=10, link_bytes=7, macs=3, seconds=2.0))
    assert energy.parts["bus"].typical == pytest.approx(8000 * 10e-12)
    assert energy.parts["ecc"].low == pytest.approx(8000 * 2.74e-12)
    assert energy.parts["dram"].high == pytest.approx(80 * 40e-12)
    assert energy.parts["link"].typical == pytest.approx(56 * 5e-12)
    assert energy.parts["mac"].typical == pytest.approx(3 * 4.6e-12)
    assert energy.parts["static"] == (0.56, 2.0, 6.36)
    assert energy.joules == Range(*(sum(part[i] for part in energy.parts.values()) for i in range(3)))


def test_a_cost_counts_parity_and_both_ways_of_what_is_programmed():
    cost = Cost(config=TINY, page_programs=2, written_bytes=2 * TINY.page_bytes, cycles=0)
    work = Work(page_programs=2, bus_bytes=2 * TINY.raw_page_bytes, dram_bytes=4 * TINY.page_bytes)
    assert cost.energy == energy_of(TINY, work)
    assert isinstance(cost.energy, Energy)


def test_ranges_multiply_with_numbers_only():
    assert Range(1, 2, 3) * 2 == Range(2, 4, 6)
    with pytest.raises(TypeError):
        Range(1, 2, 3) * "2"


def test_the_page_has_the_same_figures():
    page = (Path(__file__).parents[3] / "docs" / "cost.md").read_text()
    for name, (unit, values, source) in FIGURES.items():
        numbers = " | ".join(f"{value:g}" for value in values)
        assert f"| `{name}` | {unit} | {numbers} | {source} |" in page
