"""The main job with the golden device in place of the simulation: what it shows, and what it calls wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cocotb", reason="pip install 'kvattic[sim]'")

import kvattic
from kvattic_sim.reports import drive
from kvattic_sim.rtl.jobs import Run
from kvattic_sim.simulators import progress
from kvattic_sim.simulators.build import Model, Simulator


@pytest.fixture
def golden(monkeypatch: Any) -> Any:
    """Install the golden device; a function may change the steps' results."""
    def install(change: Any = lambda result: result) -> None:
        def build_testbench(config: Any, simulator: Any, waves: bool = False) -> Model:
            for stage in (progress.GENERATING, progress.COMPILING, progress.VERILATING, progress.COMPILING):
                progress.tell(stage, "a file")
            return Model(simulator=simulator, toplevel="top", directory=Path())

        def run_on_model(model: Any, config: Any, function: Any, arguments: Any, **options: Any) -> Run:
            with kvattic.open("model", config) as device:
                result = function(device, **arguments)
            if isinstance(result, list):
                options["progress"]("step|1|9|prefill")
                options["progress"]("cycles|1234")
                result = [replace(step, result=step.result and change(step.result),
                                  usage=replace(step.usage, cycles=100, seconds=1.0)) for step in result]
            else:
                result = (change(result[0]), replace(result[1], cycles=100, seconds=1.0), result[2])
            return Run(result=result, cycles=100, seconds=1.0, run_dir=Path(), waves=None)

        monkeypatch.setattr(drive, "build_testbench", build_testbench)
        monkeypatch.setattr(drive, "run_on_model", run_on_model)
        monkeypatch.setattr(drive.signal, "signal", lambda *_: None)

    return install


def rows(out: str) -> dict[str, list[str]]:
    """Cells of a table's rows by the first one."""
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    return {cells[0]: cells[1:] for cells in found}


def test_the_small_job_names_its_phases_and_shows_each_step(golden: Any, capsys: Any) -> None:
    golden()
    assert drive.main(["--heads", "2", "--positions", "3"]) == 0
    done = capsys.readouterr()
    assert "2 heads, 512 tokens, 3 positions, 2 of them sparf" in done.out
    assert "All results are bit-exact." in done.out
    found = rows(done.out)
    assert [name for name in found if "attend" in name or "token" in name] == [
        "attend", "attend, sparf", "token 511", "token 512"]
    assert all(found[name][-1] == "yes" for name in ("attend", "attend, sparf", "token 511", "token 512"))
    assert found["free"][-1] == found["free"][-2] == ""
    assert done.err.splitlines() == [
        "building the drive ...", "generating Verilog ...", "compiling ...", "running ...",
        "comparing with the golden device and float64 ..."]


@pytest.mark.parametrize("mode", ["dense", "fetched", "centroid"])
def test_another_mode(golden: Any, capsys: Any, mode: str) -> None:
    golden()
    assert drive.main(["--heads", "1", "--positions", "1", "--mode", mode]) == 0
    assert ("attend, " in capsys.readouterr().out) == (mode != "dense")


def test_one_bit_is_an_error(golden: Any, capsys: Any) -> None:
    def turned(result: Any) -> Any:
        output = result.output.copy()
        output.view(np.uint32)[0, 0, 0] ^= 1
        return replace(result, output=output)

    golden(turned)
    assert drive.main(["--heads", "1", "--positions", "1"]) == 1
    out = capsys.readouterr().out
    assert "Some results are wrong." in out
    assert rows(out)["attend, sparf"][-1] == "NO"


def test_an_error_that_golden_device_and_drive_share_is_one(golden: Any, capsys: Any, monkeypatch: Any) -> None:
    golden()
    monkeypatch.setattr(drive, "BOUND", 1e-9)
    assert drive.main(["--heads", "1", "--positions", "1"]) == 1


def test_the_full_job_shows_each_head(golden: Any, capsys: Any, monkeypatch: Any) -> None:
    golden()
    monkeypatch.setattr(drive.os, "cpu_count", lambda: 2)
    assert drive.main(["--full", "--heads", "3", "--positions", "8", "--decode-heads", "0"]) == 0
    out = capsys.readouterr().out
    assert "MiniLM layer 0 on real text: 3 heads, 8 positions, 512 tokens" in out
    found = rows(out)
    assert [name for name in found if name.isdigit() or name in ("write", "all")] == ["write", "0", "1", "2", "all"]
    assert found["all"][0] == "24"
    assert found["all"][-1] == "yes"


@pytest.mark.parametrize(("arguments", "size"), [
    ([], (12, 4, 2, 0)), (["--full"], (12, 512, 0, 8)), (["--full", "--mode", "sparf"], (12, 64, 0, 8)),
    (["--simulator", "icarus"], (1, 2, 1, 0)), (["--waves"], (1, 2, 1, 0)), (["--waves", "--full"], (1, 16, 1, 0)),
    (["--heads", "3", "--positions", "5"], (3, 5, 2, 0)), (["--preset", "gqa", "--decode-heads", "2"], (12, 512, 0, 2)),
])
def test_how_much_is_done(monkeypatch: Any, arguments: list[str], size: tuple[int, ...]) -> None:
    given: list[Any] = []
    monkeypatch.setattr(drive.signal, "signal", lambda *_: None)
    for job in ("small_job", "full_job"):
        monkeypatch.setattr(drive, job, lambda console, simulator, size, *a, name=job, **b: given.append(
            (name, simulator, size)) or True)
    assert drive.main(arguments) == 0
    (name, simulator, found), = given
    assert name == ("full_job" if "--full" in arguments or "--preset" in arguments else "small_job")
    assert simulator is (Simulator.ICARUS if "icarus" in arguments else Simulator.VERILATOR)
    assert (found.heads, found.positions, found.sparse_positions, found.decode_heads) == size
