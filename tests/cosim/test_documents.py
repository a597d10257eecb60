"""The cycles that the documents state are those of the RTL today: of what is small enough to run in a test."""

from pathlib import Path

from kvattic_sim.reports import documents
from kvattic_sim.reports.benches.engine import Lab, single_channel

ROOT = Path(__file__).parents[2]


def test_cycles_are_as_stated():
    measured = single_channel(Lab())
    found = [figure for path in documents.DOCUMENTS for figure in documents.stated(ROOT / path)
             if figure.key in measured]
    pages = {figure.place.rpartition(":")[0] for figure in found}
    assert pages == {str(ROOT / "docs" / "measurements.md")}
    assert len(found) >= 2  # the summary and the section
    assert documents.stale(found, measured) == []
