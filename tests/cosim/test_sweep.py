"""`kvattic sweep` with real simulations: in processes of this machine, and on a Dask cluster."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvattic import TINY, cli
from kvattic_sim.reports import sweep

HEADS, TOKENS, TOO_MANY = 4, 256, 4096


def points(**common: Any) -> list[sweep.Point]:
    return sweep.grid(TINY, {"channels": [1, 2]}, [(HEADS, TOKENS), (HEADS, TOO_MANY)], **common)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[int, int], sweep.Row]:
    """On this machine, two at a time, by channels and tokens."""
    seen: list[tuple[int, str]] = []
    found = list(sweep.run(points(), jobs=2, progress=lambda number, what, done, total: seen.append((number, what))))
    steps = ("building", "writing", "attending", "checking")
    assert {(number, what) for number in (0, 2) for what in steps} <= set(seen)
    return {(row.point.settings["channels"], row.point.tokens): row for row in found}


def test_each_row_has_its_figures(rows: Any) -> None:
    assert len(rows) == 4
    for channels in (1, 2):
        row = rows[channels, TOKENS]
        figures = row.figures
        assert row.error == ""
        assert list(figures) == [name for name in sweep.FIGURES if name in figures]
        assert set(figures) == set(sweep.FIGURES)
        assert figures["equal_bits"] is True
        assert figures["rel_rms"] < 1e-6
        config = replace(TINY, channels=channels)
        assert figures["kv_bytes"] == 2 * HEADS * TOKENS * config.token_bytes
        # The whole of K and V, each codeword with its parity.
        assert figures["flash_bytes"] == figures["kv_bytes"] * config.raw_codeword_bytes // config.codeword_bytes
        # Each page once, but for the few that a die gave up for another one's codewords while V had to wait.
        pages = figures["kv_bytes"] // config.page_bytes
        assert pages <= figures["page_reads"] <= 1.02 * pages
        assert figures["milliseconds"] == pytest.approx(figures["cycles"] / config.clock_mhz / 1e3)
        assert 0.3 < figures["bus_use"] <= 1
        assert 0 < figures["die_use"] <= 1
        assert figures["write_cycles"] > 0
    assert rows[2, TOKENS].figures["cycles"] < 0.7 * rows[1, TOKENS].figures["cycles"]


def test_commands_take_their_time(rows: Any) -> None:
    for channels in (1, 2):
        figures = rows[channels, TOKENS].figures
        # The last command was fetched soon and waited for the others' data.
        assert 0.1 * figures["milliseconds"] < figures["p50_us"] / 1e3 < figures["p99_us"] / 1e3
        assert figures["p99_us"] <= figures["p999_us"] <= 1e3 * figures["milliseconds"]


def test_the_timing_model_is_near(rows: Any) -> None:
    """A study's axes on the RTL and in the model: layers, a batch of two lengths, one of two drives, random data."""
    found = list(sweep.run(points(modelled=True), jobs=2))
    for row in found:
        rtl = rows[row.point.settings["channels"], row.point.tokens]
        assert row.error == rtl.error
        for name in row.figures and ("cycles", "write_cycles", "p50_us", "p99_us"):
            assert row.figures[name] == pytest.approx(rtl.figures[name], rel=0.08), name
        for name in row.figures and ("flash_bytes", "kv_bytes"):
            assert row.figures[name] == rtl.figures[name]
    (studied,) = sweep.grid(TINY, {}, [(4, (64, 128))], ["sparf"], study={
        "features": [4], "top_units": [12], "layers": [2], "drives": [2], "data": ["random"], "seed": [7]})
    measured, modelled = sweep.measure(studied), sweep.measure(replace(studied, modelled=True))
    assert measured["equal_bits"] is True
    assert measured["rel_rms"] == modelled["rel_rms"]
    # The median lies between those of two lengths, so a command more of one of them moves it far.
    for name in ("cycles", "p99_us"):
        assert modelled[name] == pytest.approx(measured[name], rel=0.08), name


def test_what_has_no_room_is_a_row(rows: Any) -> None:
    for channels in (1, 2):
        assert rows[channels, TOO_MANY].figures == {}
        assert "zones" in rows[channels, TOO_MANY].error


def test_the_command_line_gives_the_same(rows: Any, tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    code = cli.main(["sweep", "--preset", "tiny", "--set", "channels=1,2", "--workload", f"{HEADS},{TOKENS}",
                     "--jobs", "2", "--json", str(file), "--plot", str(picture), "--y", "bus_use"])
    assert code == 0
    found = json.loads(file.read_text())
    assert [row["cycles"] for row in found] == [rows[channels, TOKENS].figures["cycles"] for channels in (1, 2)]
    assert picture.stat().st_size > 1000


@contextmanager
def cluster() -> Iterator[str]:
    """Address of a scheduler with a worker of two threads, all in this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None,
                                  protocol="tcp://") as local:
        yield local.scheduler_address


def test_a_dask_cluster_gives_the_same(rows: Any) -> None:
    with cluster() as address:
        found = list(sweep.run_on_dask(points(), address, timeout_s=300))
    assert len(found) == 4
    for row in found:
        here = rows[row.point.settings["channels"], row.point.tokens]
        assert row.error == here.error
        assert {**row.figures, "seconds": 0} == {**here.figures, "seconds": 0}


STARTED, STOPPED = threading.Event(), threading.Event()


def endless(point: sweep.Point, follow: Any) -> dict[str, float | bool]:
    """In place of a simulation that takes long, but for one channel."""
    if point.config.channels == 1:
        return {"cycles": 1}
    STARTED.set()
    try:
        while True:
            follow("working", 0, None)
            time.sleep(0.01)
    finally:
        STOPPED.set()


def test_a_dask_cluster_that_is_left_stops(monkeypatch: Any) -> None:
    monkeypatch.setattr(sweep, "STOP_S", 0.1)
    with cluster() as address:
        found = sweep.run_on_dask(sweep.grid(TINY, {"channels": [1, 2]}, [(1, 1)]), address, work=endless,
                                  timeout_s=300)
        assert next(found).figures == {"cycles": 1}
        assert STARTED.wait(300)
        assert not STOPPED.is_set()
        found.close()
        assert STOPPED.wait(300)
