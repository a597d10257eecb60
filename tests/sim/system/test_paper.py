"""The paper's evaluation: the model stays as close to it as is stated, and every parameter says where it is from."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvattic_sim.reports import paper as report
from kvattic_sim.reports.console import make_console
from kvattic_sim.system import paper
from kvattic_sim.system.parameters import PAPER_MACHINE, Kind, table


def test_predictions_are_near_the_paper():
    median, largest = paper.summary(paper.compare())
    assert median <= 0.05
    assert largest <= 0.15


def test_what_is_far_off_has_a_reason():
    assert all(one.claim.reason for one in paper.compare() if abs(one.deviation) > 0.15)


def test_what_was_fitted_agrees_and_is_no_prediction():
    fitted = [one for one in paper.compare() if one.claim.fitted]
    assert len(fitted) == sum(kind is Kind.FITTED for *_, kind, _ in table(PAPER_MACHINE))
    assert all(abs(one.deviation) < 0.002 for one in fitted)


def test_the_model_depends_on_its_machine():
    slower = replace(PAPER_MACHINE, drive=replace(PAPER_MACHINE.drive, kv_rate=5e9))
    before, after = (paper.compare(machine)[0].ours for machine in (PAPER_MACHINE, slower))
    assert after < 0.8 * before


def test_every_parameter_has_a_source():
    rows = list(table(PAPER_MACHINE))
    assert len({name for name, *_ in rows}) == len(rows) >= 15
    assert all(source for *_, source in rows)


def test_the_page_has_the_tables():
    assert report.page() in (Path(__file__).parents[3] / "docs" / "system.md").read_text()


def test_the_report_is_kept(tmp_path, capsys):
    report.report(make_console(), tmp_path)
    shown = capsys.readouterr().out
    assert "20 drives over one, dense" in shown and "fitted" in shown
    rows = list(csv.DictReader((tmp_path / "paper.csv").open()))
    assert [row["figure"] for row in rows] == [claim.what for claim in paper.CLAIMS]
    kept = json.loads((tmp_path / "paper.json").read_text())
    assert kept[0]["model"] == pytest.approx(float(rows[0]["model"]))
    assert (tmp_path / "parameters.csv").stat().st_size > 1000
