"""A slice of the grid on which the timing model is held to the RTL: the tiny drive, whose RTL takes seconds."""

from dataclasses import replace

import pytest

from kvattic.spec.config import TINY
from kvattic_sim.reports import trials
from kvattic_sim.reports.benches import time_grid
from kvattic_sim.reports.benches.engine import Lab
from kvattic_sim.reports.trials import Append, Attend, Erase, Trial
from kvattic_sim.simulators.build import SimulatorError
from kvattic_sim.workloads import ModeSettings

TOLERANCE, MEAN = 0.08, 0.03
"""Those of the whole grid."""
SPARF = ModeSettings(mode="sparf", features=8, top_units=16)
FETCHED = ModeSettings(mode="fetched", features=8, top_units=4)
CENTROID = ModeSettings(mode="centroid", unit_tokens=16, top_units=2)
DRIVE = time_grid.Drive(name="tiny", config=TINY, frames=None, dram_bytes=None, trials=(
    Trial(heads=4, tokens=128, features=True, centroids=16, acts=(
        Attend(rows=2), Attend(settings=SPARF, rows=2), Attend(settings=FETCHED), Attend(settings=CENTROID, rows=2),
        Append(tokens=40, counted=False), Attend(settings=SPARF))),
    Trial(heads=4, tokens=64, acts=(Attend(batch=3, in_flight=8), Append(tokens=16), Erase(dies=2)))))


def fail(*arguments, **keywords):
    raise SimulatorError("no simulator")


@pytest.fixture(scope="module")
def expected():
    return trials.golden(DRIVE.config, DRIVE.trials)


def test_the_model_is_close_to_the_rtl(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(time_grid, "KEPT", tmp_path / "time_grid")
    said = []
    rows = list(time_grid.compare(DRIVE, Lab(say=said.append), expected))
    assert [str(row) for row in rows] == said[:-1]
    assert "cycles of the RTL in" in said[-1]
    # All acts but the append that fills no stripe.
    assert len(rows) == 6 + 4
    deviations = [abs(row.deviation) for row in rows]
    assert max(deviations) <= TOLERANCE, said
    assert sum(deviations) / len(rows) <= MEAN, said

    # What the RTL took is kept; the simulator does not run again.
    monkeypatch.setattr(time_grid, "run_on_model", None)
    said.clear()
    assert list(time_grid.compare(DRIVE, Lab(say=said.append), expected)) == rows
    assert "those of an earlier run" in said[0]

    # The bench itself: one drive fails, the other one's points are there, and the failure is not forgotten.
    broken = replace(DRIVE, name="broken", trials=DRIVE.trials[1:])
    monkeypatch.setattr(time_grid, "run_on_model", fail)
    monkeypatch.setattr(time_grid, "GRID", (broken, DRIVE))
    said.clear()
    with pytest.raises(SimulatorError, match="no simulator"):
        time_grid.error(Lab(say=said.append))
    assert said[0] == "broken: no simulator"
    assert said[2:] == [str(row) for row in rows]
    monkeypatch.setattr(time_grid, "GRID", (DRIVE,))
    found = time_grid.error(Lab(say=said.append))
    assert found == {"time.error.max": max(deviations), "time.error.mean": pytest.approx(sum(deviations) / len(rows)),
                     "time.error.points": len(rows)}
    assert (tmp_path / "time_grid.md").read_text().splitlines()[2:] == [str(row) for row in rows]
