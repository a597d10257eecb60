"""The axes of a study, and points from the timing model; no simulator."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kvattic import TINY, RequestError, cli
from kvattic_sim.reports import points, study, sweep
from kvattic_sim.reports.points import inputs, load_of, measure

BASE = {"base": TINY, "settings": {}, "heads": 4, "tokens": 128, "modelled": True, "check": False}


def point(**changes):
    return study.Point(**{**BASE, **changes})


# The grid.


def test_axes_of_a_study_come_last_and_are_shown():
    found = study.grid(TINY, {"channels": [1, 2]}, [(4, 128)], ["sparf"], study={"features": [4, 8], "seed": [0, 5]})
    assert len(found) == 8
    assert [(one.features, one.seed) for one in found[:4]] == [(4, 0), (4, 5), (8, 0), (8, 5)]
    assert list(found[0].axes) == ["channels", "heads", "tokens", "mode", "features", "seed"]
    assert str(found[1]) == "channels=1 heads=4 tokens=128 mode=sparf features=4 seed=5"
    assert found[3].options.features == 8


def test_a_mode_has_one_point_for_what_it_does_not_use():
    found = study.grid(TINY, {}, [(4, 128)], ["dense", "sparf", "centroid"],
                       study={"features": [4, 8], "top_units": [2, 3, 4]})
    assert [(one.mode, one.features, one.top_units) for one in found] == [
        ("dense", None, None), *(("sparf", r, k) for r in (4, 8) for k in (2, 3, 4)),
        *(("centroid", None, k) for k in (2, 3, 4))]


def test_a_mix_of_lengths_is_a_batch():
    (one,) = study.grid(TINY, {}, [(4, (128, 256))])
    assert (one.batch, one.lengths, one.tokens, one.axes["tokens"]) == (2, [128, 256], 256, "128+256")
    (one,) = study.grid(TINY, {}, [(4, (128, 256))], study={"batch": [3]})
    assert one.lengths == [128, 256, 128]


def test_the_same_points_are_checked_each_time():
    assert study.sample(3, 5) == [0, 1, 2]
    first = study.sample(32, 4)
    assert first == study.sample(32, 4) == sorted(set(first))
    assert len(first) == 4


@pytest.mark.parametrize(("arguments", "message"), [
    ({"study": {"wings": [2]}}, "an axis must be one of features, top_units, layers"),
    ({"study": {"data": ["poems"]}}, "data must be one of topical, random, clustered, minilm, not 'poems'"),
    ({"study": {"layers": [0]}}, "layers must be a positive int, not 0"),
    ({"study": {"batch": [2.5]}}, "batch must be a positive int, not 2.5"),
    ({"study": {"seed": [-1]}}, "seed must be an int from 0 on, not -1"),
    ({"workloads": [(4, (16, 32, 48))], "study": {"batch": [2]}}, "batch must be at least 3"),
    ({"workloads": [(4, ())]}, "at least one head and one token"),
    ({"workloads": [(4, (16, 0))]}, "at least one head and one token, not 4,16.0"),
    ({"repeat": 0}, "repeat must be positive, not 0"),
])
def test_a_wrong_study_is_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        study.grid(TINY, {}, **{"workloads": [(4, 128)], **arguments})


def test_as_many_points_as_are_checked():
    with pytest.raises(RequestError, match="points to check must be at least 1, not 0"):
        study.sample(4, 0)


# Data.


def test_drives_share_the_heads():
    whole = inputs(TINY, load_of(point()), 0, 0)
    share = inputs(TINY, load_of(point(drives=3)), 0, 0)
    assert load_of(point(drives=3)).own_heads == 2
    np.testing.assert_array_equal(share.key, whole.key[[0, 3]])
    np.testing.assert_array_equal(share.query, whole.query[[0, 1, 6, 7]])


def test_data_differ_by_kind_layer_sequence_and_seed():
    seen = set()
    for data in study.DATA:
        for changes in ({}, {"layer": 1}, {"sequence": 1}, {"seed": 1}):
            load = load_of(point(data=data, batch=2, layers=2, seed=changes.get("seed", 0)))
            found = inputs(TINY, load, changes.get("layer", 0), changes.get("sequence", 0))
            assert found.key.shape == found.value.shape == (4, 128, 32)
            assert found.query.shape == (8, 1, 32)
            if data != "minilm":    # which has few layers
                seen.add(found.key.tobytes())
    assert len(seen) == 3 * 4


@pytest.mark.parametrize(("changes", "message"), [
    ({"drives": 5}, "drives must be at most the 4 heads"),
    ({"data": "minilm", "heads": 13}, "minilm have 12 heads and 512 tokens, not 13 and 128"),
    ({"data": "minilm", "tokens": 513}, "minilm have 12 heads and 512 tokens, not 4 and 513"),
    ({"data": "minilm", "settings": {"element": "bf16"}}, "have head_dim 32 and elements fp16, not 32 and bf16"),
    ({"data": "minilm", "settings": {"kv": "fp8_e4m3"}}, "are stored as they are, with kv element, not fp8_e4m3"),
])
def test_data_that_there_are_not_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        measure(point(**changes))


# Points from the timing model.


def test_a_modelled_point_says_what_the_model_knows():
    figures = measure(point(check=True))
    assert set(figures) == {"write_cycles", "cycles", "milliseconds", "p50_us", "p99_us", "p999_us", "bus_use",
                            "die_use", "flash_bytes", "kv_bytes", "page_reads", "rel_rms", "seconds"}
    assert figures["kv_bytes"] == 2 * 4 * 128 * TINY.token_bytes
    assert figures["flash_bytes"] == figures["kv_bytes"] * TINY.raw_codeword_bytes // TINY.codeword_bytes
    assert figures["milliseconds"] == pytest.approx(figures["cycles"] / TINY.clock_mhz / 1e3)
    assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["p999_us"] <= 1e3 * figures["milliseconds"]
    assert figures["rel_rms"] < 1e-6
    row = study.Row(number=0, point=point(), figures=figures)
    assert row.flat()["how"] == "modelled"
    assert row.flat()["deviation"] is row.flat()["measured_cycles"] is row.flat()["lane_use"] is None
    checked = replace(row, measured={"cycles": figures["cycles"] / 1.1, "p50_us": 3.0})
    assert checked.flat()["deviation"] == pytest.approx(0.1)
    assert checked.flat()["measured_p50_us"] == 3.0
    assert "deviation" not in replace(row, point=point(modelled=False)).flat()


def test_layers_follow_each_other_and_sequences_share_a_stream():
    one, layers, batch = (measure(point(**changes))["cycles"] for changes in ({}, {"layers": 2}, {"batch": 2}))
    assert layers == pytest.approx(2 * one, rel=0.05)
    assert 1.5 * one < batch <= layers
    two = measure(point(drives=2))
    assert two["cycles"] < 0.7 * one
    assert two["kv_bytes"] == measure(point())["kv_bytes"]


def test_more_features_and_units_cost_more():
    least = measure(point(mode="sparf", features=4, top_units=8))
    assert measure(point(mode="sparf", features=16, top_units=8))["flash_bytes"] > least["flash_bytes"]
    assert measure(point(mode="sparf", features=4, top_units=64))["flash_bytes"] > least["flash_bytes"]


def test_repeats_have_confidence_intervals():
    seeds = [measure(point(mode="sparf", data="random", seed=seed)) for seed in range(3)]
    together = measure(point(mode="sparf", data="random", repeat=3))
    cycles = [one["cycles"] for one in seeds]
    assert len(set(cycles)) > 1
    assert together["cycles"] == round(sum(cycles) / 3)
    # Student's t of two degrees of freedom.
    assert together["cycles_ci"] == pytest.approx(4.303 * np.std(cycles, ddof=1) / 3**0.5)
    assert together["write_cycles_ci"] == 0
    assert "seconds_ci" not in together
    row = study.Row(number=0, point=point(repeat=3), figures=together)
    assert row.flat()["cycles_ci"] == together["cycles_ci"]
    many = points.STUDENT
    assert list(many) == sorted(many, reverse=True) and many[-1] > 1.96


# The command line.


def test_the_command_models_and_checks(capsys, tmp_path, monkeypatch):
    """In place of the RTL something that takes a tenth less; one of its points fails."""
    def fake(some, **options):
        for number, one in enumerate(some):
            if not one.modelled and one.seed == 3:
                yield study.Row(number=number, point=one, error="no simulator")
                continue
            figures = measure(replace(one, modelled=True))
            yield study.Row(number=number, point=one, figures=figures if one.modelled else {
                **figures, "cycles": figures["cycles"] / 1.1, "equal_bits": True})

    monkeypatch.setattr(sweep, "run", fake)
    call = ["sweep", "--preset", "tiny", "--workload", "2,64", "--seed", "1,2", "--model", "--json"]
    assert cli.main([*call, "--check", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["how"] for row in rows] == ["modelled"] * 2
    assert sorted(row["deviation"] is None for row in rows) == [False, True]
    assert next(row for row in rows if row["deviation"])["deviation"] == pytest.approx(0.1)
    call[6] = "3"
    assert cli.main([*call, "--check", "1"]) == 1
    assert "seed=3, on the RTL: no simulator" in capsys.readouterr().err
    picture = tmp_path / "rows.png"
    assert cli.main([*call[:-1], "--repeat", "2", "--plot", str(picture)]) == 0
    found = capsys.readouterr().out
    assert "cycles_ci" in found and "modelled" in found
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(("arguments", "message"), [
    (("--check", "2"), "it needs --model"), (("--model", "--check", "0"), "points to check must be at least 1"),
    (("--features", "x"), "must be ints with commas between them, not 'x'"),
    (("--data", "poems"), "data must be one of"), (("--workload", "4,16+x"), "HEADS,TOKENS+TOKENS"),
    (("--repeat", "0"), "repeat must be positive"), (("--x", "batch"), "--x must be one of heads, tokens, mode"),
])
def test_a_wrong_study_is_two(capsys, arguments, message):
    assert cli.main(["sweep", "--preset", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
