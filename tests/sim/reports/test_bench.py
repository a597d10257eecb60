"""The bench runner with benches that only pretend to measure."""

import json
import math
from dataclasses import replace

import pytest

import kvattic
from kvattic.spec.config import TINY
from kvattic_sim.reports import bench, figures
from kvattic_sim.reports.bench import BARS, Bar, Verdict, benches, select, verdict
from kvattic_sim.reports.benches.engine import CASES, Bench, Case, UnavailableError, WrongResultError, check
from kvattic_sim.simulators.build import SimulatorError
from kvattic_sim.workloads import FLASH, STALLS, Usage, attend, decode

ISSUE_KEYS = {
    *(f"engine.dense.{name}" for name in ("utilization.paper", "utilization.gqa", "utilization.long", "scaling")),
    "engine.single_channel.cycles",
    *(f"accuracy.{kind}.{data}" for kind in ("rel_rms", "float32") for data in ("minilm", "fa3_2k", "fa3_32k")),
    "accuracy.drift",
    *(f"synth.engine.{name}" for name in ("lut", "lut_packed", "dsp", "bram36", "fmax.ecp5_mhz")),
    *(f"synth.{name}" for name in (
        "board.lut_packed", "channel.lut_packed", "fmax.xcup_mhz", "fmax.ecp5_mhz", "lut_per_byte_cycle")),
    "sim.speed_ratio",
    "sim.cycles_per_second.paper",
    "sim.cycles_per_second.ratio",
    "house.model.cpp_mb",
    "house.model.text_mb",
    "golden.ratio_to_numpy",
    "golden.batch_ratio",
    *(f"golden.decode_ratio.{name}" for name in ("lm", "opt125m", "llama1b")),
    *(f"flash.{name}" for name in (
        "dense.bus_utilization", "random_page.bus_utilization", "dense.bus_utilization.tlc",
        "dense.bus_utilization.lowlatency", "column.read_efficiency", "ecc.cost", "write.utilization",
        "write_amplification", "wear_spread", "bad_block_scan")),
}

PAPER, SCALING, SPEED = "engine.dense.utilization.paper", "engine.dense.scaling", "sim.speed_ratio"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The figures file of this test; a function that reads it."""
    monkeypatch.setattr(figures, "PATH", tmp_path / "build" / "bench.json")
    return lambda: json.loads(figures.PATH.read_text())


@pytest.fixture
def fake(monkeypatch, recorded):
    """Install fake benches, key -> figure or exception; returns the list of those that ran."""

    def install(**outcomes):
        ran = []

        def make(key, outcome):
            def measure(lab):
                ran.append(key)
                if isinstance(outcome, Exception):
                    raise outcome
                return {key: outcome}

            return Bench(keys=(key,), measure=measure)

        monkeypatch.setattr(bench, "benches", lambda: [make(k, v) for k, v in outcomes.items()])
        return ran

    return install


# ---------------------------------------------------------------- keys


def test_every_key_of_the_issue_has_its_place():
    measured = [key for b in benches() for key in b.keys]
    assert len(measured) == len(set(measured))
    assert set(BARS) >= ISSUE_KEYS
    assert set(BARS) - set(measured) == {key for key in BARS if key.startswith("synth.")}
    assert set(measured) <= set(BARS)


def test_bars_refer_to_figures_of_the_same_bench():
    for b in benches():
        for key in b.keys:
            others = [limit for limit in (BARS[key] or Bar(">=", ())).limits if isinstance(limit, str)]
            assert set(others) <= set(b.keys)


@pytest.mark.parametrize(
    "prefix, first_keys",
    [
        (PAPER, [PAPER]),
        ("engine.dense.utilization", [f"engine.dense.utilization.{case}" for case in CASES]),
        ("engine.dense.stalls.gqa.starved", ["engine.dense.utilization.gqa"]),
        ("engine.single", ["engine.single_channel.cycles"]),
        (SPEED, [SPEED]),
        ("sim.cycles_per_second", ["sim.cycles_per_second.paper", "sim.cycles_per_second.ratio"]),
        ("house.model", ["house.model.cpp_mb"]),
        ("accuracy.rel_rms.minilm", ["accuracy.rel_rms.minilm"]),
        ("golden", [*(f"golden.decode_ratio.{name}" for name in ("lm", "opt125m", "llama1b")),
                    "golden.ratio_to_numpy"]),
        ("golden.batch_ratio", ["golden.decode_ratio.opt125m"]),
        ("synth", []),
        ("nonsense", []),
    ],
)
def test_a_prefix_selects_what_can_give_its_keys(prefix, first_keys):
    assert [b.keys[0] for b in select(prefix, benches())] == first_keys


def test_no_prefix_selects_all_but_what_takes_very_long():
    every = benches()
    assert [b.keys[0] for b in every if b not in select("", every)] == ["house.sim.cpu_ratio", "house.test.cpu_ratio"]
    assert {"house.largest_body", "house.sim.cpu_ratio", "house.test.cpu_ratio"} <= {
        b.keys[0] for b in select("house.", every)}


# ---------------------------------------------------------------- bars


@pytest.mark.parametrize(
    "key, value, expected",
    [
        (PAPER, 0.97, Verdict.MET),
        (PAPER, 0.9699, Verdict.SHORT),
        (PAPER, math.nan, Verdict.SHORT),
        ("engine.single_channel.cycles", 17_000, Verdict.MET),
        ("engine.single_channel.cycles", 17_001, Verdict.SHORT),
        ("golden.ratio_to_numpy", 21.0, Verdict.SHORT),
        ("accuracy.drift_sum_exact", 1.0, Verdict.MET),
        ("accuracy.drift_sum_exact", True, Verdict.MET),
        ("accuracy.drift_sum_exact", 0.0, Verdict.SHORT),
        ("accuracy.fp16.minilm", 1e-4, Verdict.REPORTED),
        ("engine.dense.stalls.gqa.starved", 0.5, Verdict.REPORTED),
        ("unheard.of", 1.0, Verdict.REPORTED),
    ],
)
def test_verdict(key, value, expected):
    assert verdict(key, value, {}) is expected


@pytest.mark.parametrize(
    "value, float32, expected",
    [
        (4e-8, 3e-7, Verdict.MET),
        (4e-7, 3e-7, Verdict.SHORT),
        (6e-7, 9e-7, Verdict.SHORT),
        (6e-7, None, Verdict.SHORT),
        (4e-8, None, Verdict.REPORTED),
    ],
)
def test_a_bar_may_be_another_figure(value, float32, expected):
    known = {} if float32 is None else {"accuracy.float32.minilm": float32}
    assert verdict("accuracy.rel_rms.minilm", value, known) is expected


# ---------------------------------------------------------------- wrong results


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A case, its right results, and counters that fit."""
    monkeypatch.chdir(tmp_path)  # progress goes to a file there
    case = Case(config=TINY, kv_heads=2, tokens=40)
    attention = decode(TINY, kv_heads=2, tokens=40, group=TINY.rows)
    with kvattic.open("model", TINY) as device:
        result, *_ = attend(device, attention, 2, "jobs")
    cycles = case.beats // TINY.channels + 100
    stalls = dict.fromkeys(STALLS, 0) | {"idle": TINY.channels * cycles - case.beats}
    return case, result, Usage(
        cycles=cycles, window=9, beats=case.beats, stalls=stalls, flash=dict.fromkeys(FLASH, 0), seconds=1)


def test_a_right_result_passes(finished):
    case, _, usage = finished
    assert case.beats == 2 * 2 * 40 * 32 * 2 // 8
    check(*finished)
    assert usage.stalls["idle"] == 200


def test_one_wrong_bit_is_found(finished):
    case, result, usage = finished
    result.bits[3, 0, 7] ^= 1
    with pytest.raises(WrongResultError, match="1 of 2 KV heads differ"):
        check(case, result, usage)


def test_wrong_counters_are_found(finished):
    case, result, usage = finished
    with pytest.raises(WrongResultError, match="BEATS is"):
        check(case, result, replace(usage, beats=usage.beats - 1))
    with pytest.raises(WrongResultError, match="add up"):
        check(case, result, replace(usage, cycles=usage.cycles + 1))


# ---------------------------------------------------------------- the file


def test_figures_are_merged(fake, recorded):
    figures.record({PAPER: 0.5, "other.key": 3.0, "accuracy.drift_sum_exact": True})
    fake(**{PAPER: 0.98})
    bench.main([])
    assert recorded() == {PAPER: 0.98, "other.key": 3.0, "accuracy.drift_sum_exact": True}


def test_each_bench_is_recorded_at_once(fake, recorded):
    class Interrupt(Exception):
        pass

    fake(**{PAPER: 0.98, SCALING: Interrupt(), SPEED: 20.0})
    with pytest.raises(Interrupt):
        bench.main([])
    assert recorded() == {PAPER: 0.98}


# ---------------------------------------------------------------- the command


def test_a_prefix_runs_only_its_own(fake, recorded, capsys):
    ran = fake(**{PAPER: 0.98, SCALING: 0.99, SPEED: 20.0})
    bench.main(["engine.dense"])
    assert ran == [PAPER, SCALING]
    assert set(recorded()) == {PAPER, SCALING}
    assert SPEED not in capsys.readouterr().out


def test_a_figure_that_falls_short_is_no_error(fake, recorded, capsys):
    fake(**{PAPER: 0.5, SCALING: 0.99})
    bench.main([])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "short" in lines[PAPER] and ">= 0.97" in lines[PAPER] and "0.5" in lines[PAPER]
    assert "met" in lines[SCALING]


@pytest.mark.parametrize("error", [WrongResultError("a bit differs"), SimulatorError("no compiler")])
def test_a_wrong_result_gives_no_figure_and_a_status(fake, recorded, capsys, error):
    ran = fake(**{PAPER: error, SCALING: 0.99})
    assert bench.main([]) == 1
    assert ran == [PAPER, SCALING]
    assert recorded() == {SCALING: 0.99}
    assert str(error) in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(fake, recorded, capsys):
    fake(**{SPEED: UnavailableError("Icarus Verilog is not installed"), SCALING: 0.99})
    bench.main([])
    assert recorded() == {SCALING: 0.99}
    out = capsys.readouterr().out
    assert f"{SPEED}: not measured: Icarus Verilog is not installed" in out


def test_a_bench_must_give_what_it_declares(monkeypatch, recorded, capsys):
    monkeypatch.setattr(bench, "benches", lambda: [Bench(keys=(PAPER, SPEED), measure=lambda lab: {PAPER: 1.0})])
    assert bench.main([]) == 1
    assert not figures.PATH.exists()


def test_synthesis_is_shown_if_it_was_made(fake, recorded, capsys):
    fake(**{PAPER: 0.98})
    bench.main(["synth"])
    out = capsys.readouterr().out
    assert "make synth" in out and "│" not in out
    figures.record({"synth.engine.lut": 40_000, "synth.engine.dsp": 64})
    bench.main(["synth"])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "short" in lines["synth.engine.lut"] and "goal <= 25,000" in lines["synth.engine.lut"]
    assert "met" in lines["synth.engine.dsp"]
    assert "synth.engine.fmax.ecp5_mhz" not in lines


def test_an_unknown_prefix_is_refused(fake, recorded, capsys):
    fake(**{PAPER: 0.98})
    with pytest.raises(SystemExit) as caught:
        bench.main(["nonsense"])
    assert caught.value.code == 2
    assert PAPER in capsys.readouterr().err
