"""The build-and-run helper, on real simulators with a design of a few lines."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvattic.spec.config import TINY
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.simulators import cache
from kvattic_sim.simulators.build import (
    CACHE,
    Group,
    Model,
    SimulationFailed,
    SimulationTimeout,
    Simulator,
    SimulatorError,
    compile_model,
    default_build_root,
    icarus_available,
    new_run_dir,
    prepare_runtime,
    run_model,
    start_model,
    verilator_environment,
)

COUNTER = """
module counter #(parameter STEP = 1) (input clk, output reg [71:0] count);
  initial count = 0;
  always @(posedge clk) count <= count + STEP;
endmodule
"""

TESTS = """
import os
import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles

async def run(dut, cycles):
    Clock(dut.clk, 2, "ns", impl="gpi").start()
    await ClockCycles(dut.clk, cycles)

@cocotb.test()
async def counts(dut):
    await run(dut, 10)
    assert int(dut.count.value) in (9 * int(os.environ["STEP"]), 10 * int(os.environ["STEP"]))

@cocotb.test()
async def disagrees(dut):
    await run(dut, 10)
    assert int(dut.count.value) == 12345, "the counter is not at 12345"

@cocotb.test()
async def never_ends(dut):
    await run(dut, 10**12)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this session's own, with the sources and the models; xdist's workers share it.

    Verilator's run-time library is the one in build/, to save its time.
    """
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "build"
    (path / "sim").mkdir(parents=True, exist_ok=True)
    for name, text in {"counter.sv": COUNTER, "counter_tests.py": TESTS}.items():
        part = path / f"{name}.{os.getpid()}"
        part.write_text(text)
        part.replace(path / name)
    for waves in (False, True):
        library = prepare_runtime(waves=waves)
        with contextlib.suppress(FileExistsError):
            (path / "sim" / library.name).symlink_to(library)
    return path


@pytest.fixture(scope="module", params=list(Simulator))
def model(root: Path, request: pytest.FixtureRequest) -> Model:
    """Compile the counter for each simulator that is installed."""
    simulator: Simulator = request.param
    if simulator is Simulator.ICARUS and not icarus_available():
        pytest.skip("Icarus Verilog is not installed")
    return compile_counter(root, simulator)


def compile_counter(
    root: Path, simulator: Simulator, *, step: int = 3, waves: bool = False
) -> Model:
    return compile_model(
        [root / "counter.sv"],
        "counter",
        simulator,
        parameters={"STEP": step},
        waves=waves,
        build_root=root / "sim",
    )


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_runs_with_its_parameters(root: Path, model: Model) -> None:
    results = run_model(
        model,
        test_module="counter_tests",
        testcase="counts",
        env={"STEP": "3"},
        python_path=[root],
        timeout_s=1200,
    )
    assert [(test.name, test.status) for test in results.tests] == [("counts", "passed")]
    assert results.waves is None
    assert "counts" in results.log.read_text()


def test_same_content_is_compiled_once(root: Path, model: Model) -> None:
    log = (model.directory / "build.log").stat()
    again = compile_counter(root, model.simulator)
    assert again.cached
    assert again.directory == model.directory
    assert (model.directory / "build.log").stat() == log, "something was compiled"

    elsewhere = root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "counter.sv").write_text(COUNTER)
    moved = compile_model(
        [elsewhere / "counter.sv"],
        "counter",
        model.simulator,
        parameters={"STEP": 3},
        build_root=root / "sim",
    )
    assert moved.cached, "the place of a source is no part of its content"


def test_other_content_is_another_model(root: Path, model: Model) -> None:
    other = compile_counter(root, model.simulator, step=5)
    assert other.directory != model.directory
    run_model(
        other, test_module="counter_tests", testcase="counts", env={"STEP": "5"}, python_path=[root]
    )


BORDERS = """
module inner (input clk, input rst, input go, input [39:0] reference, input [99:0] wide, output reg [99:0] sum,
              output reg [39:0] last, output reg seen, output reg [7:0] steps);
  initial begin sum = 7; last = 0; seen = 0; steps = 3; end
  wire [99:0] next;
  adder add (.a(sum), .b(wide + {60'd0, reference}), .y(next));
  always @(posedge clk)
    if (rst) begin sum <= 7; last <= 0; seen <= 0; steps <= 3; end
    else if (go) begin sum <= next; last <= reference; seen <= 1; steps <= steps + 1; end
endmodule
module adder (input [99:0] a, input [99:0] b, output [99:0] y);
  assign y = a + b;
endmodule
module outer (input clk, input rst, input go, input [39:0] reference, output [99:0] sum, output [39:0] last,
              output seen, output [7:0] steps, output [7:0] after);
  wire [99:0] between;
  wire go_on;
  inner first (.clk(clk), .rst(rst), .go(go), .reference(reference), .wide({60'd1, reference}), .sum(between),
               .last(), .seen(go_on), .steps(after));
  inner second (.clk(clk), .rst(rst), .go(go_on), .reference(reference), .wide(between), .sum(sum), .last(last),
                .seen(seen), .steps(steps));
endmodule
"""

BORDER_TESTS = """
import random
import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

@cocotb.test()
async def shows(dut):
    rng = random.Random(1)
    dut.rst.value, dut.go.value, dut.reference.value = 1, 0, 0
    Clock(dut.clk, 2, "ns", impl="gpi").start(start_high=False)
    first, second = {"sum": 7, "last": 0, "seen": 0, "steps": 3}, {"sum": 7, "last": 0, "seen": 0, "steps": 3}
    def step(state, rst, go, reference, wide):
        if rst:
            return {"sum": 7, "last": 0, "seen": 0, "steps": 3}
        if not go:
            return state
        return {"sum": (state["sum"] + wide + reference) % 2**100, "last": reference, "seen": 1,
                "steps": (state["steps"] + 1) % 256}
    for cycle in range(400):
        await FallingEdge(dut.clk)
        assert {name: int(getattr(dut, name).value) for name in second} == second, cycle
        assert int(dut.after.value) == first["steps"]
        rst, go, reference = rng.random() < 0.05, rng.random() < 0.6, rng.getrandbits(40)
        dut.rst.value, dut.go.value, dut.reference.value = rst, go, reference
        second = step(second, rst, first["seen"], reference, first["sum"])
        first = step(first, rst, go, reference, 2**40 + reference)
"""


@pytest.fixture(scope="module")
def borders(root: Path) -> Callable[..., Model]:
    """Compiles two instances of a module between two tops' ports."""
    (root / "borders.sv").write_text(BORDERS)
    (root / "borders_tests.py").write_text(BORDER_TESTS)

    def build(source: Path = root / "borders.sv", **options: object) -> Model:
        simulator = options.pop("simulator", Simulator.VERILATOR)
        return compile_model([source], "outer", simulator, build_root=root / "sim", **options)

    return build


def run_borders(root: Path, model: Model) -> None:
    run_model(model, test_module="borders_tests", python_path=[root], timeout_s=1200)


def archives(root: Path) -> list[Path]:
    return sorted((root / "sim").glob("inner-verilator-*/objects.a"))


def test_a_separate_module_shows_what_it_shows_in_the_whole(root: Path, borders: Callable[..., Model]) -> None:
    whole, parted = borders(), borders(separate_modules=["inner"])
    assert whole.directory != parted.directory
    run_borders(root, whole)
    run_borders(root, parted)
    assert len(archives(root)) == 1
    assert "inner_step" in (parted.directory / "rest.sv").read_text()
    assert "module adder" not in (parted.directory / "rest.sv").read_text()


def test_a_separate_module_is_compiled_once_for_all_models(root: Path, borders: Callable[..., Model]) -> None:
    borders(separate_modules=["inner"])
    (found,) = archives(root)
    before = found.stat()
    other = root / "others.sv"
    other.write_text(BORDERS.replace("60'd1, reference", "60'd2, reference"))
    model = borders(other, separate_modules=["inner"])
    assert not model.cached
    assert archives(root) == [found]
    assert found.stat() == before
    with pytest.raises(SimulationFailed):
        run_borders(root, model)

    other.write_text(BORDERS.replace("steps + 1", "steps + 2"))
    with pytest.raises(SimulationFailed):
        run_borders(root, borders(other, separate_modules=["inner"]))
    assert len(archives(root)) == 2


def test_models_with_waves_and_those_of_icarus_are_one_piece(root: Path, borders: Callable[..., Model]) -> None:
    assert borders(separate_modules=["inner"], waves=True).directory == borders(waves=True).directory
    if icarus_available():
        model = borders(simulator=Simulator.ICARUS, separate_modules=["inner"])
        assert model.directory == borders(simulator=Simulator.ICARUS).directory
        run_borders(root, model)


def test_a_separate_module_must_be_there(borders: Callable[..., Model]) -> None:
    with pytest.raises(SimulatorError, match="no module nothing"):
        borders(separate_modules=["inner", "nothing"])


def test_failing_test_is_reported(root: Path, model: Model) -> None:
    with pytest.raises(SimulationFailed, match="the counter is not at 12345") as failure:
        run_model(
            model,
            test_module="counter_tests",
            testcase="disagrees",
            python_path=[root],
            timeout_s=1200,
        )
    assert "disagrees" in str(failure.value)
    assert [test.name for test in failure.value.results.failed] == ["disagrees"]


def test_unknown_test_is_an_error(root: Path, model: Model) -> None:
    with pytest.raises(SimulatorError, match="log is"):
        run_model(
            model,
            test_module="counter_tests",
            testcase="nonsense",
            python_path=[root],
            timeout_s=1200,
        )


def test_missing_test_module_is_an_error(root: Path, model: Model) -> None:
    with pytest.raises(SimulatorError, match="no_such_module"):
        run_model(model, test_module="no_such_module", python_path=[root], timeout_s=1200)


def test_timeout_kills(root: Path, model: Model) -> None:
    simulation = start_model(
        model, test_module="counter_tests", testcase="never_ends", python_path=[root]
    )
    with pytest.raises(SimulationTimeout, match=r"killed after 1\.5 s"):
        simulation.wait(1.5)
    assert not simulation.running


def test_interrupt_leaves_no_process(root: Path, model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117 - the order matters
        with start_model(
            model, test_module="counter_tests", testcase="never_ends", python_path=[root]
        ) as simulation:
            raise KeyboardInterrupt
    assert not simulation.running


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on Linux's prctl")
def test_simulator_dies_with_its_parent(root: Path, model: Model) -> None:
    script = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from kvattic_sim.simulators.build import Model, Simulator, start_model
        model = Model(simulator=Simulator({str(model.simulator)!r}), toplevel="counter",
                      directory=Path({str(model.directory)!r}))
        simulation = start_model(model, test_module="counter_tests", testcase="never_ends",
                                 python_path=[Path({str(root)!r})])
        print(simulation._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """)
    parent = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False
    )
    deadline = time.monotonic() + 300
    while _alive(int(parent.stdout)):
        assert time.monotonic() < deadline, "the simulator outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_several_runs_at_once(root: Path, model: Model) -> None:
    results = in_threads(
        3,
        lambda: (
            run_model(
                model,
                test_module="counter_tests",
                testcase="counts",
                env={"STEP": "3"},
                python_path=[root],
            ).run_dir
        ),
    )
    assert len(set(results)) == 3


def test_builders_at_once_share_one_build(root: Path, model: Model) -> None:
    models = in_threads(3, lambda: compile_counter(root, model.simulator, step=7))
    cached = [each.cached for each in models if isinstance(each, Model)]
    assert sorted(cached) == [False, True, True]


def test_broken_source_is_an_error_twice(root: Path, model: Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sv"
    broken.write_text("module broken(input clk);\n  assign nothing = ;\nendmodule\n")
    for _ in range(2):
        with pytest.raises(SimulatorError, match=r"broken\.sv:2"):
            compile_model([broken], "broken", model.simulator, build_root=root / "sim")


def test_missing_source_is_an_error(root: Path, model: Model) -> None:
    with pytest.raises(SimulatorError, match=r"cannot read the source .*nowhere\.sv"):
        compile_model([root / "nowhere.sv"], "nowhere", model.simulator, build_root=root / "sim")


def test_no_sources_and_equal_names_are_errors(root: Path) -> None:
    with pytest.raises(SimulatorError, match="no sources"):
        compile_model([], "counter", Simulator.VERILATOR)
    with pytest.raises(SimulatorError, match="names must differ"):
        compile_model([root / "counter.sv"] * 2, "counter", Simulator.VERILATOR)


def test_waves_are_recorded_on_demand(root: Path, model: Model) -> None:
    with pytest.raises(ValueError, match="compile_model"):
        run_model(model, test_module="counter_tests", waves=True)
    recording = compile_counter(root, model.simulator, waves=True)
    results = run_model(
        recording,
        test_module="counter_tests",
        testcase="counts",
        env={"STEP": "3"},
        python_path=[root],
        waves=True,
    )
    assert results.waves is not None
    assert results.waves.stat().st_size > 0
    assert results.waves.parent == results.run_dir


def test_missing_icarus_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    monkeypatch.setattr("kvattic_sim.simulators.models.tool_version", _uncached_tool_version())
    with pytest.raises(SimulatorError, match="apt-get install iverilog"):
        compile_counter(root, Simulator.ICARUS)


def _uncached_tool_version() -> Callable[[Simulator], str]:
    from kvattic_sim.simulators.verilator import tool_version

    function: Callable[[Simulator], str] = tool_version.__wrapped__
    return function


def test_delays_need_timing(tmp_path: Path, root: Path) -> None:
    source = tmp_path / "delay.sv"
    source.write_text(
        "module delay(output reg q);\n  initial begin q = 0; #5 q = 1; end\nendmodule\n"
    )
    with pytest.raises(SimulatorError, match="timing"):
        compile_model([source], "delay", Simulator.VERILATOR, build_root=root / "sim")


def test_verilator_environment() -> None:
    environment = verilator_environment()
    first = environment["PATH"].split(os.pathsep)[0]
    assert (Path(first) / "verilator_bin").is_file()
    assert Path(first).parent == Path(environment["VERILATOR_ROOT"])


# ---------------------------------------------------------------- the cache


def test_a_checkout_keeps_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.chdir(tmp_path)
    tree = Path(cache.__file__).resolve().parents[3]
    assert default_build_root() == tree / "build" / "sim"


def test_the_variable_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "here"))
    assert default_build_root() == tmp_path / "here" / "sim"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, "~/there")
    assert default_build_root() == tmp_path / "there" / "sim"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other platforms have other places")
def test_an_installed_package_has_a_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "site-packages" / "kvattic_sim" / "simulators" / "cache.py"))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        assert default_build_root() == tmp_path / "caches" / "kvattic" / "sim"
    # A source tree that cannot be written is as good as installed.
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "sim" / "kvattic_sim" / "simulators" / "cache.py"))
    assert default_build_root() == tmp_path / "build" / "sim"
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    assert default_build_root() == tmp_path / "caches" / "kvattic" / "sim"


def test_a_cache_that_cannot_be_written_is_named(
    root: Path, model: Model, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "sim"
    what = rf"cannot write to the build cache in {place}.*: Not a directory; KVATTIC_CACHE names another"
    with pytest.raises(SimulatorError, match=what):
        compile_model([root / "counter.sv"], "counter", model.simulator, build_root=place)
    with pytest.raises(SimulatorError, match=what):
        prepare_runtime(build_root=place)
    with pytest.raises(SimulatorError, match=what):
        new_run_dir("x-", place)
    with pytest.raises(SimulatorError, match=what):
        build_testbench(TINY, model.simulator, build_root=place)


def test_a_full_disk_names_the_file(
    root: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SimulatorError, match=rf"in {tmp_path}: {tmp_path}/\S+: No space left .*; KVATTIC_CACHE"):
            compile_model([root / "counter.sv"], "counter", model.simulator, build_root=tmp_path)


def test_backups_leave_the_cache_out(root: Path, model: Model) -> None:
    assert (root / "sim" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


# ---------------------------------------------------------------- the end

# In place of a compiler: it has a child, as g++ has cc1plus.
SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo slow 1; exit 0; }
sleep 600 &
echo $$ $! >> {pids}
wait
"""
BUILDER = """
import signal, sys
from pathlib import Path
from kvattic_sim.simulators.build import prepare_runtime
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored where tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)                # ignored behind nohup
prepare_runtime(build_root=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_compilers_end_with_the_process_that_began_them(tmp_path: Path, how: signal.Signals) -> None:
    compiler, pids = tmp_path / "g++", tmp_path / "pids"
    compiler.write_text(SLOW_COMPILER.replace("{pids}", str(pids)))
    compiler.chmod(0o755)
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(tmp_path / "cache")],
        env={**os.environ, "CXX": str(compiler), "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(map(_alive, started))
    process.send_signal(how)
    assert process.wait(300) != 0
    while any(map(_alive, started)):
        assert time.monotonic() < deadline + 300, "a compiler outlived the process that began it"
        time.sleep(0.02)


def test_a_forked_child_leaves_groups_and_simulations_alone(root: Path, model: Model) -> None:
    with (
        Group() as group,
        start_model(model, test_module="counter_tests", testcase="never_ends", python_path=[root]) as simulation,
    ):
        member = subprocess.Popen(["sleep", "600"], process_group=group.number)
        child = os.fork()
        if child == 0:
            simulation.kill()
            group.end()
            os._exit(0)
        os.waitpid(child, 0)
        assert simulation.running and member.poll() is None
    assert member.wait() == -signal.SIGKILL
