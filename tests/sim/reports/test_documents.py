"""What the documents state is what is measured: of README.md and docs/measurements.md, as far as that is cheap.

The figure that needs the RTL is in tests/cosim/test_documents.py.
"""

import re
from itertools import combinations
from pathlib import Path

import pytest

from kvattic_sim.reports import documents, figures
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.benches import placement
from kvattic_sim.reports.documents import Stated, stale, stated

ROOT = Path(__file__).parents[3]
README, MEASUREMENTS, CONTROLLER = (ROOT / path for path in documents.DOCUMENTS)


@pytest.fixture
def document(tmp_path):
    """Figures of a text, as (key, number)."""

    def read(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return [(figure.key, figure.number) for figure in stated(path)]

    return read


# The documents.


def test_there_are_figures():
    assert len(stated(README)) >= 6 and len(stated(MEASUREMENTS)) >= 90 and len(stated(CONTROLLER)) >= 20


@pytest.mark.parametrize("path", [README, MEASUREMENTS, CONTROLLER], ids=lambda path: path.name)
def test_only_figures_of_the_benches_are_stated(path):
    assert {figure.key for figure in stated(path)} <= set(BARS)


def test_every_key_of_a_table_has_its_number():
    """A row whose number cannot be read would never be found stale."""
    read = {figure.key for figure in stated(MEASUREMENTS)}
    for line in MEASUREMENTS.read_text().splitlines():
        if line.startswith("|"):
            assert {key for key in re.findall(r"`([a-z]\w*(?:\.\w+)+)`", line) if key in BARS} <= read, line


def test_documents_agree_with_each_other_and_themselves():
    """Several roundings of one figure, in README, summary and section: each is within half a digit of the others."""
    found = [figure for path in (README, MEASUREMENTS, CONTROLLER) for figure in stated(path)]
    pairs = [(one, other) for one, other in combinations(found, 2) if one.key == other.key]
    assert len(pairs) >= 30
    for one, other in pairs:
        assert abs(one.number - other.number) <= (one.tolerance + other.tolerance) * 1.001, (one, other)


def test_placement_is_as_stated():
    measured = placement.write_amplification()
    found = [figure for path in (README, MEASUREMENTS) for figure in stated(path) if figure.key in measured]
    assert len(found) == 5
    assert stale(found, measured) == []


# How they are read.


def test_tables_with_a_column_measured(document):
    assert document(
        "| key | bar | measured |\n| --- | --- | --- |\n"
        "| `engine.single_channel.cycles`: 512 tokens | <= 17,000 | 16,768 (the beats alone: 16,384) |\n"
        "| `flash.column.read_efficiency`: one in 16 | >= 0.70 | **0.609**: short |\n"
        "| `flash.ecc.cost.1e-4`; corrected; `flash.ecc.retries.1e-4` | | 1.262; 34.7%; 0 |\n"
        "| the same: `.short` | | 5 |\n"
        "\n| other | value |\n| --- | --- |\n| `engine.dense.scaling` | 7 |\n"
    ) == [("engine.single_channel.cycles", 16768), ("flash.column.read_efficiency", 0.609)]


def test_keys_in_parts_of_a_row(document):
    assert document("| key | measured |\n|-|-|\n| `flash.a`; `flash.b` (so many) | 1.0; 2 |\n") == [
        ("flash.a", 1.0), ("flash.b", 2.0)]


def test_the_table_of_speed_ups(document):
    assert document(
        "| load and mode | bytes of dense | cycles | speed-up | bar | bus use |\n|-|-|-|-|-|-|\n"
        "| SparF: `sparse.speedup.random` | 0.184 | 591,298 | **3.85** | >= 4.0: **short** | 0.694 (bar 0.85) |\n"
    ) == [("sparse.bytes_ratio.random", 0.184), ("sparse.cycles.random", 591298), ("sparse.speedup.random", 3.85),
          ("sparse.bus_utilization.random", 0.694)]


def test_numbers_in_text_and_comments(document):
    assert document("| a | 97.6 % <!-- flash.a.b --> / 98.4 % <!-- flash.a.c --> |\n") == [
        ("flash.a.b", pytest.approx(0.976)), ("flash.a.c", pytest.approx(0.984))]
    assert document("Also `sparse.sparq_equal` 2.9e-15 (bar), and is 5.83e-8 <!-- accuracy.drift -->, ever") == [
        ("accuracy.drift", 5.83e-8), ("sparse.sparq_equal", 2.9e-15)]


@pytest.mark.parametrize("text, value, holds", [
    ("16,768", 16768, True),
    ("16,768", 16767, False),
    ("16,768", 16769, False),
    ("97.6 %", 0.97649, True),
    ("97.6 %", 0.97651, False),
    ("0.976", 0.9755, True),
    ("0.976", 0.97549, False),
    ("3.96e-8", 3.9649e-8, True),
    ("3.96e-8", 3.966e-8, False),
    ("2", 2.0, True),
    ("2", 3.0, False),
])
def test_a_number_stands_for_what_rounds_to_it(tmp_path, text, value, holds):
    page = tmp_path / "page.md"
    page.write_text(f"{text} <!-- some.key -->")
    (figure,) = stated(page)
    assert figure.holds(value) == holds
    assert (stale([figure], {"some.key": value}) == []) == holds


def test_a_stale_figure_is_named():
    figure = Stated("engine.single_channel.cycles", 16746, 0.5, "README.md:118")
    assert stale([figure], {"engine.single_channel.cycles": 16768}) == [
        "README.md:118: engine.single_channel.cycles is said to be 16746, and was measured as 16768"]
    assert stale([figure], {"engine.dense.scaling": 1.0}) == []


@pytest.mark.parametrize("measured, code", [(16768, 0), (16800, 1)])
def test_the_command(tmp_path, monkeypatch, capsys, measured, code):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("README.md").write_text("16,768 <!-- engine.single_channel.cycles -->\n")
    for path in documents.DOCUMENTS[1:]:
        path.write_text("nothing\n")
    monkeypatch.setattr(figures, "PATH", tmp_path / "bench.json")
    figures.record({"engine.single_channel.cycles": measured})
    assert documents.main() == code
    assert f"1 figures stated, 1 of them in {figures.PATH}, {code} stale" in capsys.readouterr().out
