"""The command line, as far as it needs no simulator."""

import builtins
import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvattic
from kvattic import TINY, cli, selftest
from kvattic.errors import DeviceLostError, DeviceTimeoutError

ROOT = Path(__file__).parents[2]


def call(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line."""
    code = cli.main(list(arguments))
    done = capsys.readouterr()
    return code, done.out, done.err


def parsed(capsys: Any, *arguments: str) -> Any:
    """What a command prints with --json, which must be nothing else."""
    code, out, _ = call(capsys, "--json", *arguments)
    assert code == 0
    return json.loads(out)


@pytest.fixture(params=["rich", "plain"])
def tables(request: Any, monkeypatch: Any) -> str:
    """With and without rich."""
    if request.param == "plain":
        find = importlib.util.find_spec
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    return str(request.param)


# ---------------------------------------------------------------- the whole


def test_the_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"kvattic {kvattic.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("fly",), ("info", "--preset", "none"), ("sweep", "--workload", "3"),
                                       ("info", "--preset", "tiny", "--config", "x"), ("selftest", "--seed", "x")])
def test_wrong_usage_is_two(capsys, arguments):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "usage: kvattic" in err


def test_every_command_has_help(capsys):
    for name in ("info", "selftest", "bench", "trace", "verilog", "sweep", "run", "chat", "system"):
        code, out, _ = call(capsys, name, "--help")
        assert code == 0
        assert out.startswith(f"usage: kvattic {name}")


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kvattic", "info", "--preset", "tiny", "--json"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny"


def test_it_needs_numpy_alone():
    program = (
        "import sys\n"
        "from kvattic import cli\n"
        "assert cli.main(['--json', 'info', 'model', '--preset', 'tiny']) == 0\n"
        "assert cli.main(['--json', 'selftest']) == 0\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(tops & {'rich', 'amaranth', 'cocotb', 'matplotlib', 'kvattic_hdl', 'kvattic_sim'}), "
        "file=sys.stderr)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "host")})
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["testing model ...", "[]"]


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(f"{sys.executable} -m kvattic info | head -1; exit ${{PIPESTATUS[0]}}", shell=True,
                          capture_output=True, text=True, executable="/bin/bash")
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_ctrl_c_is_130(capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(selftest, "run", interrupted)
    assert call(capsys, "selftest") == (130, "", "testing model ...\ninterrupted\n")


@pytest.mark.parametrize(("module", "extra"), [("amaranth", "hdl"), ("rich", "sim"), ("distributed", "cluster"),
                                             ("torch", "quality")])
def test_a_missing_extra_is_named(capsys, monkeypatch, module, extra):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.inside")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    code, out, err = call(capsys, "bench")
    assert (code, out) == (2, "")
    assert f"needs {module}: pip install 'kvattic[{extra}]'" in err


def test_an_installation_without_the_simulator_says_so(capsys, monkeypatch):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert "needs kvattic_sim" in call(capsys, "bench")[2]
    assert "needs kvattic_hdl" in call(capsys, "verilog")[2]


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_geometry", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: builtins.__import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])


# ---------------------------------------------------------------- info


def test_info_tells_what_follows_from_a_configuration(capsys, tables):
    found = parsed(capsys, "info", "--preset", "tiny")
    assert found["hash"] == TINY.hash
    assert found["config"]["part"]["name"] == "tiny"
    # 2 channels, 2 dies, 2 planes, 8 blocks, 8 pages of 1 KiB
    assert found["flash"]["capacity, bytes"] == TINY.channels * TINY.zone_pages * TINY.part.blocks * TINY.page_bytes
    assert found["flash"]["capacity, tokens of one KV head"] * 2 * TINY.token_bytes == found["flash"]["capacity, bytes"]
    assert found["limits"]["tokens of a job"] == TINY.max_tokens
    assert found["bandwidth"]["flash buses, MB/s"] == TINY.channels * TINY.part.bus_mts
    code, out, _ = call(capsys, "info", "--preset", "tiny")
    assert code == 0
    for section in ("flash", "bandwidth", "limits"):
        assert section.capitalize() in out
        assert all(name in out for name in found[section])
    assert ("│" in out) == (tables == "rich")


def test_info_tells_what_a_device_says(capsys, tables):
    device = parsed(capsys, "info", "model", "--preset", "tiny")["device"]
    assert kvattic.Config.from_json(json.dumps(device["config"])) == TINY
    assert device["registers"]["CONFIG_HASH"] == TINY.hash
    assert "SUBMISSION_TAIL_0" not in device["registers"]     # it cannot be read
    assert "CYCLES" in device["counters"]
    out = call(capsys, "info", "model", "--preset", "tiny")[1]
    assert "CONFIG_HASH" in out
    assert "this configuration" in out


def test_info_reads_a_configuration(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(replace(TINY, channels=1, sparse=False).to_json())
    found = parsed(capsys, "info", "--config", str(file))
    assert (found["name"], found["config"]["channels"]) == ("mine", 1)
    assert "tokens of a stripe, sparse" not in found["limits"]


@pytest.mark.parametrize(("text", "message"), [
    ("{", "a configuration must be JSON"), ('{"channels": 99}', "channels must be 1 to 32, not 99"),
    (b"\xff", "is no text"), (None, "No such file"),
])
def test_a_bad_configuration_is_two(capsys, tmp_path, text, message):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = call(capsys, "info", "--config", str(file))
    assert (code, out) == (2, "")
    assert message in err


def test_missing_target_exits_2(capsys):
    code, out, err = call(capsys, "info", "nothing")
    assert (code, out) == (2, "")
    assert err.startswith("kvattic: ")
    assert "nothing" in err


# ---------------------------------------------------------------- selftest


def test_the_selftest_checks_every_mode(capsys, tables):
    found = parsed(capsys, "selftest", "model")
    assert found["passed"]
    names = [check["name"] for check in found["checks"]]
    assert {name.partition(",")[0] for name in names} == {"dense", "sparf", "fetched", "centroid", "codes"}
    assert "dense, tree of 5 drafts" in names
    assert "dense, 3 appended" in names
    assert all(check["error"] <= selftest.TOLERANCE for check in found["checks"])
    code, out, _ = call(capsys, "selftest")
    assert code == 0
    assert f"{len(names)} of {len(names)} results are right" in out


@pytest.mark.parametrize("config", [
    replace(TINY, element="bf16"), replace(TINY, head_dim=80, sparse=False), replace(TINY, rows=8, channels=1),
    replace(TINY, head_dim=256, codeword_bytes=512, sparse=False),
], ids=["bf16", "head_dim 80", "8 rows", "2 tokens of a page"])
def test_the_selftest_passes_on_other_configurations(config):
    with kvattic.open("model", config) as device, kvattic.open("model", config) as golden:
        checks = list(selftest.run(device, golden, seed=1))
    assert len(checks) == (18 if config.sparse else 10)
    assert [check for check in checks if not check.good or not check.equal] == []


def spoiled(monkeypatch: Any, what: Any) -> None:
    """Let every attend of a causal query do something wrong."""
    attend = kvattic.Sequence.attend

    def wrong(self: Any, query: Any, **arguments: Any) -> Any:
        result = attend(self, query, **arguments)
        return what(result) if arguments.get("causal") else result

    monkeypatch.setattr(kvattic.Sequence, "attend", wrong)


def test_a_wrong_result_is_one(capsys, monkeypatch):
    def more(result: Any) -> Any:
        return replace(result, output=result.output * np.float32(1.00001))

    spoiled(monkeypatch, more)
    code, out, _ = call(capsys, "selftest")
    assert code == 1
    assert "16 of 18 results are right" in out
    assert "WRONG" in out
    code, out, _ = call(capsys, "selftest", "--json")
    found = json.loads(out)
    assert (code, found["passed"]) == (1, False)
    assert [check["name"] for check in found["checks"] if not check["good"]] == ["dense, causal", "dense, window"]


def test_one_bit_is_wrong_beside_a_golden_device(monkeypatch):
    def turned(result: Any) -> Any:
        output = result.output.copy()
        output.view(np.uint32)[0, 0, 0] ^= 1
        return replace(result, output=output)

    with kvattic.open("model", TINY) as device, kvattic.open("model", TINY) as golden:
        good = kvattic.Sequence.attend
        spoiled(monkeypatch, turned)
        bad = kvattic.Sequence.attend
        monkeypatch.setattr(kvattic.Sequence, "attend",
                            lambda self, *a, **b: (bad if self.device is device else good)(self, *a, **b))
        checks = {check.name: check for check in selftest.run(device, golden)}
    assert not checks["dense, causal"].equal
    assert not checks["dense, causal"].good
    assert checks["dense, causal"].error <= selftest.TOLERANCE
    assert checks["dense, 3 appended"].good


def test_an_error_of_the_device_is_a_failed_check(capsys, monkeypatch):
    def fail(result: Any) -> Any:
        raise DeviceTimeoutError("it sleeps")

    spoiled(monkeypatch, fail)
    code, out, _ = call(capsys, "selftest", "--json")
    (bad,) = [check for check in json.loads(out)["checks"] if not check["good"]]
    assert (code, bad["name"], bad["message"]) == (1, "appended tokens", "it sleeps")


def test_a_device_that_is_gone_ends_the_selftest(capsys, monkeypatch):
    def gone(result: Any) -> Any:
        raise DeviceLostError("it is gone")

    spoiled(monkeypatch, gone)
    assert call(capsys, "selftest") == (2, "", "testing model ...\nkvattic: it is gone\n")


# ---------------------------------------------------------------- verilog, bench, trace


def test_verilog_is_written(capsys, tmp_path, monkeypatch):
    netlist = pytest.importorskip("kvattic_hdl.verilog.netlist")
    # The real text takes a while, and has its own tests.
    monkeypatch.setattr(netlist, "verilog_text", lambda config, top: f"module {top}(); // {config.channels}\n")
    found = parsed(capsys, "verilog", "--preset", "tiny", "-o", str(tmp_path))
    assert Path(found["verilog"]).read_text() == f"module {found['top']}(); // {TINY.channels}\n"
    assert kvattic.Config.from_json(Path(found["config"]).read_text()) == TINY
    assert Path(found["verilog"]).parent == tmp_path


def test_bench_measures_what_is_asked_for(capsys, monkeypatch):
    bench = pytest.importorskip("kvattic_sim.reports.bench")
    given: list[Any] = []

    def report(prefix: str, simulator: Any, console: Any) -> Any:
        given.append((prefix, simulator))
        console.print("a table")
        return bench.Report(figures={"engine.a": 1.5, "flash.b": float("nan")}, good=False)

    monkeypatch.setattr(bench, "report", report)
    code, out, _ = call(capsys, "bench", "engine", "--simulator", "icarus")
    assert (code, out, given[0]) == (1, "a table\n", ("engine", "icarus"))
    code, out, err = call(capsys, "bench", "--json")
    assert (code, json.loads(out), err) == (1, {"engine.a": 1.5, "flash.b": None}, "a table\n")
    assert given[1] == ("", "verilator")


def test_bench_refuses_an_unknown_prefix(capsys):
    pytest.importorskip("kvattic_sim.reports.bench")
    code, out, err = call(capsys, "bench", "nonsense")
    assert (code, out) == (2, "")
    assert "no figure's key begins with 'nonsense'" in err


def test_trace_draws_what_is_asked_for(capsys, monkeypatch):
    reports = pytest.importorskip("kvattic_sim.reports.trace")
    given: list[Any] = []

    def trace(config: Any, simulator: Any, options: Any, *, progress: Any) -> Any:
        given.append((config, simulator, options.mode))
        progress("drawing")
        return reports.Trace(3, Path("a.json"), Path("a.png"))

    monkeypatch.setattr(reports, "trace", trace)
    assert parsed(capsys, "trace", "--mode", "sparf", "--preset", "gqa") == {"trace": "a.json", "picture": "a.png"}
    assert given == [(kvattic.GQA, "verilator", "sparf")]
    code, out, err = call(capsys, "trace")
    assert (code, out) == (0, "3 events: a.json (open it in https://ui.perfetto.dev), a.png\n")
    assert err == "trace ...\n"


def test_an_error_of_the_simulator_is_two(capsys, monkeypatch):
    reports = pytest.importorskip("kvattic_sim.reports.trace")
    from kvattic_sim.simulators.build import SimulatorError

    def fail(*arguments: Any, **options: Any) -> None:
        raise SimulatorError("no compiler")

    monkeypatch.setattr(reports, "trace", fail)
    code, out, err = call(capsys, "trace")
    assert (code, out) == (2, "")
    assert err == "trace ...\nkvattic: no compiler\n"


# ---------------------------------------------------------------- sweep, with something quick in place of simulations


def quick(point: Any, follow: Any) -> dict[str, float | bool]:
    """In place of a simulation."""
    follow("working", 1, 2)
    if point.tokens == 13:
        raise RuntimeError("thirteen")
    if point.tokens == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"cycles": point.heads * point.tokens // point.config.channels, "bus_use": 0.5,
            "equal_bits": point.tokens != 15, "rel_rms": 1e-7}


def slow(point: Any, follow: Any) -> dict[str, float | bool]:
    """In place of a long simulation, which has a child, but for the points of one channel."""
    if point.config.channels > 1:
        child = subprocess.Popen(["sleep", "600"])
        with Path(os.environ["KVATTIC_TEST_PIDS"]).open("a") as file:
            file.write(f"{os.getpid()} {child.pid}\n")
        time.sleep(600)
    return {"cycles": 1}


@pytest.fixture
def swept(monkeypatch):
    """A sweep without simulations."""
    sweep = pytest.importorskip("kvattic_sim.reports.sweep")
    run = sweep.run
    monkeypatch.setattr(sweep, "run", lambda points, **options: run(points, **{**options, "work": quick}))
    return sweep


GRID = ("sweep", "--preset", "tiny", "--set", "channels=1,2", "--workload", "4,32", "--jobs", "2")


def test_a_sweep_has_a_row_for_each_combination(capsys, tmp_path, swept):
    code, out, err = call(capsys, *GRID, "--mode", "dense,sparf", "--csv", str(tmp_path / "a.csv"),
                          "--plot", str(tmp_path / "a.png"), "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["channels"], row["mode"]) for row in rows] == [
        (1, "dense"), (1, "sparf"), (2, "dense"), (2, "sparf")]
    assert [row["cycles"] for row in rows] == [128, 128, 64, 64]
    assert all(row["error"] == "" and row["page_reads"] is None for row in rows)
    with (tmp_path / "a.csv").open() as file:
        assert [row["cycles"] for row in csv.DictReader(file)] == [str(row["cycles"]) for row in rows]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "[4/4]" in err


def test_a_sweep_shows_a_table_and_writes_a_file(capsys, tmp_path, swept, tables):
    file = tmp_path / "deep" / "b.json"
    code, out, _ = call(capsys, *GRID[:3], "--workload", "4,32", "--jobs", "1", "--json", str(file))
    assert code == 0
    assert "Sweep over configuration tiny" in out
    (row,) = json.loads(file.read_text())
    assert row["cycles"] == 64
    assert len(list(file.parent.iterdir())) == 1


def test_what_fails_is_a_row(capsys, swept):
    code, out, _ = call(capsys, "--json", *GRID[:3], "--set", "head_dim=32,33", "--set", "part.blocks=4,-1",
                        "--workload", "4,32", "--workload", "4,13", "--workload", "4,14")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 12
    errors = {(row["head_dim"], row["part.blocks"], row["tokens"]): row["error"] for row in rows}
    assert errors[32, 4, 32] == ""
    assert errors[32, 4, 13] == "RuntimeError: thirteen"
    assert "ended with status -9 and without a result" in errors[32, 4, 14]
    assert "head_dim must be one of" in errors[33, 4, 32]
    assert "blocks must be a positive int" in errors[32, -1, 32]


def test_without_a_terminal_each_phase_of_a_point_is_said(capsys, swept, monkeypatch):
    def run(points: Any, *, progress: Any, **_: Any) -> Iterator[Any]:
        heard = threading.Event()
        write = sys.stderr.write

        def listen(text: str) -> int:
            if "7 cycles" in text:
                heard.set()
            return write(text)

        monkeypatch.setattr(sys.stderr, "write", listen)
        for number, point in enumerate(points):
            progress(number, "building", 0, None)
            progress(number, "attending", 7, None)
            assert heard.wait(300)      # it is still at it
            yield swept.Row(number=number, point=point, figures={"cycles": 1})

    monkeypatch.setattr(swept, "run", run)
    monkeypatch.setattr(cli.terminal, "EVERY_S", 0.01)
    code, _, err = call(capsys, *GRID)
    assert code == 0
    lines = err.splitlines()
    for channels in (1, 2):
        point = f"channels={channels} heads=4 tokens=32 mode=dense"
        assert [line for line in lines if point in line and line.endswith(("...", "done"))] == [
            f"{point}: building ...", f"{point}: attending ...", f"[{channels}/2] {point}: done"]
    assert re.search(r"channels=1 .*: attending: 7 cycles, \d+ s$", err, re.MULTILINE)


def test_wrong_bits_are_one_and_so_is_nothing_at_all(capsys, swept):
    assert call(capsys, *GRID[:3], "--workload", "4,15")[0] == 1
    code, out, _ = call(capsys, *GRID[:3], "--workload", "4,13")
    assert code == 1
    assert "heads=4 tokens=13 mode=dense: RuntimeError: thirteen" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (("--set", "channels"), "FIELD=VALUE"), (("--set", "wings=2"), "FIELD one of channels"),
    (("--set", "part.wings=2"), "FIELD one of"), (("--set", "channels=two"), "channels must be an int, not 'two'"),
    (("--set", "clock_mhz=fast"), "clock_mhz must be a number"), (("--set", "sparse=maybe"), "sparse must be one of"),
    (("--mode", "dense,quick"), "mode must be one of dense, sparf"), (("--workload", "0,5"), "at least one head"),
    (("--jobs", "0"), "jobs must be positive"), (("--y", "joy"), "--y must be one of write_cycles"),
    (("--x", "dies"), "--x must be one of channels, heads"),
])
def test_a_wrong_sweep_is_two(capsys, swept, arguments, message):
    code, out, err = call(capsys, *GRID[:-2], *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_settings_have_the_fields_types(swept):
    assert swept.parse_axis("clock_mhz=200,285") == ("clock_mhz", [200.0, 285.0])
    assert swept.parse_axis("cache_reads=yes,false") == ("cache_reads", [True, False])
    assert swept.parse_axis("part.t_r=1000") == ("part.t_r", [1000.0])
    (point,) = swept.grid(TINY, {"part": ["tiny"], "part.blocks": [4], "element": ["bf16"]}, [(1, 2)])
    assert point.config == replace(TINY, element="bf16", part=replace(TINY.part, blocks=4))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def started(path: Path, count: int) -> list[int]:
    """Process numbers of so many workers and their children."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        pids = [int(word) for word in path.read_text().split()] if path.exists() else []
        if len(pids) == 2 * count:
            return pids
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 300
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(map(gone, pids))


def test_a_sweep_that_is_left_ends_its_processes(tmp_path, monkeypatch):
    sweep = pytest.importorskip("kvattic_sim.reports.sweep")
    monkeypatch.setenv("KVATTIC_TEST_PIDS", str(tmp_path / "pids"))
    points = sweep.grid(TINY, {"channels": [1, 2, 4]}, [(1, 1)])
    with closing(sweep.run(points, jobs=3, work=slow)) as rows:
        assert next(rows).figures == {"cycles": 1}
        pids = started(tmp_path / "pids", 2)
        assert not any(map(gone, pids))
    assert all_gone(pids)


CTRL_C = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored where tests run in the background
sys.path.insert(0, sys.argv[1])
from kvattic import cli
from kvattic_sim import sweep
from test_cli import slow
run = sweep.run
sweep.run = lambda points, **options: run(points, **{**options, "work": slow})
if __name__ == "__main__":
    sys.exit(cli.main(["sweep", "--preset", "tiny", "--set", "channels=1,2,4", "--jobs", "2", "--json", sys.argv[2]]))
"""


def test_ctrl_c_ends_all_and_keeps_what_is_done(tmp_path):
    pytest.importorskip("kvattic_sim.reports.sweep")
    script, file = tmp_path / "script.py", tmp_path / "rows.json"
    script.write_text(CTRL_C)
    process = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), str(file)], stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, env={**os.environ, "KVATTIC_TEST_PIDS": str(tmp_path / "pids")})
    pids = started(tmp_path / "pids", 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "interrupted: 1 of 3 points are done" in errors
    assert [row["channels"] for row in json.loads(file.read_text())] == [1]
    assert all_gone(pids)


def test_a_sweep_needs_distributed_for_a_cluster(capsys, monkeypatch, swept):
    load = importlib.import_module

    def missing(name: str) -> Any:
        if name == "distributed":
            raise ModuleNotFoundError("No module named 'distributed'", name="distributed")
        return load(name)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    code, out, err = call(capsys, *GRID[:-2], "--dask", "tcp://127.0.0.1:1")
    assert (code, out) == (2, "")
    assert "pip install 'kvattic[cluster]'" in err


def test_missing_cluster_exits_2(capsys, swept, monkeypatch):
    pytest.importorskip("distributed")
    run = swept.run_on_dask
    monkeypatch.setattr(swept, "run_on_dask", lambda *a, **b: run(*a, **b, timeout_s=0.5))
    code, out, err = call(capsys, *GRID[:-2], "--dask", "tcp://127.0.0.1:1")
    assert (code, out) == (2, "")
    assert "there is no Dask scheduler at tcp://127.0.0.1:1" in err
