"""Trials on the golden device: what jobs choose, where they read, and the points of the grid."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic.errors import RequestError
from kvattic.spec.commands import Mode
from kvattic.spec.config import TINY
from kvattic_sim.reports import trials
from kvattic_sim.reports.benches import time_grid
from kvattic_sim.reports.benches.engine import WrongResultError
from kvattic_sim.reports.in_flight import HOST_US
from kvattic_sim.reports.trials import Append, Attend, Done, Erase, Trial, acts_of, model_cycles
from kvattic_sim.workloads import ModeSettings

SPARF = ModeSettings(mode="sparf", features=5, top_units=16)
CENTROID = ModeSettings(mode="centroid", unit_tokens=16, top_units=2)
CODES = ModeSettings(mode="codes", top_units=16)
TRIAL = Trial(heads=2, tokens=256, features=True, centroids=16, acts=(
    Attend(), Attend(settings=SPARF), Attend(settings=CENTROID), Append(tokens=40, counted=False),
    Attend(settings=SPARF), Erase()))
DRIVE = time_grid.Drive(name="tiny", config=TINY, trials=(TRIAL,))


@pytest.fixture(scope="module")
def acts() -> list[Done]:
    return trials.golden(TINY, [TRIAL])[0]


def test_choices_are_what_the_golden_device_reads(acts):
    prefill, dense, sparf, centroid, _, tail, erase = acts
    assert [one.cycles for one in acts] == [0] * 7
    # 16 pages of 16 tokens, of K, V and K's features, for each of two heads; and centroids.
    assert sum(map(len, prefill.bursts)) >= 96
    assert not dense.bursts and dense.choices[0].marked is None
    assert [len(one.stripes) for one in dense.jobs] == [2, 2]
    for choice in sparf.choices:
        assert len(choice.features) == 5 and list(choice.features) == sorted(choice.features)
        # Sixteen tokens lie in 4 to 16 codewords.
        assert 4 <= choice.marked.sum() <= 16
    for choice in centroid.choices:
        assert not choice.features
        assert choice.marked.sum() == 2 * 16 // TINY.tokens_per_codeword
    assert [stripe.dram for stripe in tail.jobs[0].stripes] == [False, False, True]
    assert tail.jobs[0].stripes[2].tokens == 40
    assert tail.jobs[0].mode is Mode.SPARF
    assert len(erase.bursts[0]) == TINY.channels * TINY.part.planes


def test_choices_of_codes():
    trial = Trial(heads=2, tokens=256, codes=True, acts=(Attend(settings=CODES),))
    _, attend = trials.golden(TINY, [trial])[0]
    for choice in attend.choices:
        assert not choice.features
        assert 4 <= choice.marked.sum() <= 16
    assert model_cycles(TINY, Attend(settings=CODES), attend, attend.choices) > 0
    assert trial.name == "2 x 256, codes"


def test_selected_tokens_cost_the_model_less(acts):
    cycles = dict(zip(("prefill", "dense", "sparf", "centroid"), (
        model_cycles(TINY, act, done, done.choices)
        for act, done in zip(acts_of(TRIAL), acts, strict=True)), strict=False))
    assert cycles["centroid"] < cycles["dense"]
    assert cycles["prefill"] > cycles["dense"]


def test_commands_that_the_host_holds_back_never_end_earlier(acts):
    many = replace(acts[1], jobs=acts[1].jobs * 8, choices=acts[1].choices * 8)
    all_at_once = model_cycles(TINY, Attend(), many, many.choices)
    one_by_one = model_cycles(TINY, Attend(in_flight=1), many, many.choices)
    most = model_cycles(TINY, Attend(in_flight=len(many.jobs)), many, many.choices)
    assert most == all_at_once < one_by_one
    # Each but the first waits for the host's answer to the one before.
    assert one_by_one > 15 * HOST_US * TINY.clock_mhz


def test_a_wrong_bit_is_an_error(acts):
    right = replace(acts[1], cycles=1000)
    row = time_grid.rows_of(DRIVE, [acts], 0, 1, right)
    assert row.measured == 1000 and row.deviation == row.modelled / 1000 - 1
    assert str(row).startswith("| tiny, 2 x 256, features, centroids: dense | 1,000 | ")
    wrong = replace(right, bits=right.bits ^ np.uint32(1))
    with pytest.raises(WrongResultError, match="differs from the golden device"):
        time_grid.rows_of(DRIVE, [acts], 0, 1, wrong)
    with pytest.raises(WrongResultError, match="counted no cycles"):
        time_grid.rows_of(DRIVE, [acts], 0, 1, acts[1])
    assert time_grid.rows_of(DRIVE, [acts], 0, 4, acts[4]) is None


def test_bad_input_is_refused(acts):
    with pytest.raises(RequestError, match="choices must be those of the 2 jobs, not of 1"):
        model_cycles(TINY, Attend(), acts[1], acts[1].choices[:1])
    with pytest.raises(RequestError, match="dies must be 1 to 2, not 3"):
        trials.golden(TINY, [Trial(heads=1, tokens=16, acts=(Erase(dies=3),))])


def test_the_grid_has_what_it_is_for():
    points = [(drive, trial, act) for drive in time_grid.GRID for trial in drive.trials for act in acts_of(trial)
              if not (isinstance(act, Append) and not act.counted)]
    attends = [act for _, _, act in points if isinstance(act, Attend)]
    assert len(points) >= 40
    assert {act.settings.mode for act in attends} == {"dense", "sparf", "fetched", "centroid"}
    assert {drive.config.part.name for drive in time_grid.GRID} == {"pslc", "tlc", "lowlatency"}
    assert {trial.heads for _, trial, _ in points} >= {1, 40}
    assert {trial.tokens for _, trial, _ in points} >= {256, 8192}
    assert {act.rows for act in attends} == {1, 8}
    assert 64 in {act.in_flight for act in attends}
    kinds = {type(act).__name__ for _, _, act in points}
    assert kinds == {"Prefill", "Append", "Attend", "Erase"}
