"""Runs cocotb tests on a model, each run in a simulator process of its own."""

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvattic_sim.simulators.base import (
    Model,
    Results,
    SimulationFailed,
    SimulationTimeout,
    Simulator,
    SimulatorError,
    TestResult,
)
from kvattic_sim.simulators.cache import cache_errors, default_build_root
from kvattic_sim.simulators.icarus import icarus_available
from kvattic_sim.simulators.steps import tail

__all__ = ["DIE_WITH_PARENT", "RECORDINGS", "Simulation", "new_run_dir", "run_model", "start_model"]


def _find_prctl() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None

    def die_with_parent() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    return die_with_parent


DIE_WITH_PARENT = _find_prctl()


@functools.cache
def _gpi_users() -> str:
    import cocotb_tools.config
    import find_libpython

    library = find_libpython.find_libpython()
    if library is None:
        raise SimulatorError(
            f"cocotb needs Python's shared library and {sys.executable} has none; "
            "use a Python that was built with --enable-shared"
        )
    return f"{library};{cocotb_tools.config.pygpi_entry_point()}"


class Simulation:
    """A simulator process that runs. A context manager; leaving it kills what is still running.

    It is a process group of its own, and on Linux it also dies with the thread that started it.

    Attributes:
        model: the model that runs.
        run_dir: the directory that it runs in.
        log: the file that it prints to.
    """

    def __init__(
        self, model: Model, process: "subprocess.Popen[bytes]", run_dir: Path, log: Path
    ) -> None:
        self.model = model
        self.run_dir = run_dir
        self.log = log
        self._process = process
        self._owner = os.getpid()
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether the simulator still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the simulator and its children, if it still runs, and wait until it is gone.

        A forked child of the process that started it leaves it alone.
        """
        if self._process.returncode is None and os.getpid() == self._owner:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_tail(self) -> str:
        """Return the last lines that the simulator printed, indented for an error message."""
        try:
            return tail(self.log.read_text(errors="replace"))
        except OSError:
            return tail("")

    def wait(self, timeout_s: float | None = None) -> Results:
        """Wait for the end and return the results; see :func:`run_model`."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SimulationTimeout(
                f"the simulation of {self.model.toplevel} was killed after {timeout_s:g} s; "
                f"the log is {self.log} and ends:\n{self.log_tail()}"
            ) from None
        finally:
            self.kill()
        seconds = time.monotonic() - self._begin
        tests = _read_results(self.run_dir / "results.xml")
        if not tests:
            what = "ended without results" if tests is None else "ran no test"
            raise SimulatorError(
                f"the simulation of {self.model.toplevel} {what} (status {status}); "
                f"the log is {self.log} and ends:\n{self.log_tail()}"
            )
        recording = self.run_dir / RECORDINGS[self.model.simulator]
        results = Results(
            tests=tests,
            seconds=seconds,
            run_dir=self.run_dir,
            log=self.log,
            waves=recording if recording.is_file() else None,
        )
        if results.failed:
            first = results.failed[0]
            raise SimulationFailed(
                f"{len(results.failed)} of {len(tests)} cocotb tests failed, first {first.name}: "
                f"{first.message}\nthe log is {self.log}",
                results,
            )
        return results


RECORDINGS = {Simulator.VERILATOR: "waves.vcd", Simulator.ICARUS: "waves.fst"}


def _read_results(path: Path) -> tuple[TestResult, ...] | None:
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError):
        return None
    tests = []
    for case in root.iter("testcase"):
        status, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                status = "failed"
                parts = [child.get("message") or "", (child.text or "").strip()]
                message = next((part for part in parts if part), "no message")
            elif child.tag == "skipped" and status == "passed":
                status = "skipped"
        tests.append(
            TestResult(
                name=case.get("name", "?"),
                status=status,
                seconds=float(case.get("time") or 0),
                message=message,
            )
        )
    return tuple(tests)


def new_run_dir(prefix: str, root: Path | None = None) -> Path:
    """Make a directory for a run below ``runs`` of the build cache.

    Args:
        prefix: what its name begins with.
        root: the cache; :func:`default_build_root` if None.

    Raises:
        SimulatorError: the cache cannot be written.
    """
    root = root or default_build_root()
    runs = root / "runs"
    with cache_errors(root):
        runs.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=runs))


def start_model(
    model: Model,
    *,
    test_module: str,
    testcase: str | None = None,
    env: Mapping[str, str] | None = None,
    python_path: Sequence[Path] = (),
    run_dir: Path | None = None,
    waves: bool = False,
    log: Path | None = None,
) -> Simulation:
    """Start a cocotb test module on a model, and return without waiting for its end.

    The arguments are those of :func:`run_model`.
    """
    import cocotb_tools.config

    if waves and not model.waves:
        raise ValueError("waves=True must be given to compile_model before it is given to a run")
    if run_dir is None:
        run_dir = new_run_dir(f"{model.toplevel}-{test_module}-", model.directory.parent)
    run_dir = run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.xml").unlink(missing_ok=True)
    log = (log or run_dir / "simulation.log").resolve()
    log.parent.mkdir(parents=True, exist_ok=True)

    environment = {key: value for key, value in os.environ.items() if not key.startswith("COCOTB_")}
    environment |= {
        "COCOTB_ANSI_OUTPUT": "0",
        "COCOTB_RESULTS_FILE": str(run_dir / "results.xml"),
        # Rewriting assertions takes seconds for each simulation; what they compare is worth it in tests only.
        "COCOTB_REWRITE_ASSERTION_FILES": "test_*.py",
        "COCOTB_TEST_MODULES": test_module,
        "COCOTB_TOPLEVEL": model.toplevel,
        "GPI_USERS": _gpi_users(),
        "PYGPI_PYTHON_BIN": sys.executable,
        "PYTHONPATH": os.pathsep.join(
            [*map(str, python_path), *(path or os.getcwd() for path in sys.path)]
        ),
        "TOPLEVEL_LANG": "verilog",
    }
    if testcase is not None:
        environment["COCOTB_TEST_FILTER"] = rf"(^|\.){re.escape(testcase)}$"
    if model.simulator is Simulator.VERILATOR:
        environment["COCOTB_TRUST_INERTIAL_WRITES"] = "1"
        command = [str(model.directory / "simulation")]
        if waves:
            command += ["--trace", "--trace-file", RECORDINGS[model.simulator]]
    else:
        if not icarus_available():
            raise SimulatorError("Icarus Verilog is not installed: apt-get install iverilog")
        entry = cocotb_tools.config.lib_entry("vpi", "icarus")
        command = [
            "vvp",
            "-m",
            entry,
            str(model.directory / "simulation.vvp"),
            "-fst" if waves else "-none",
        ]
    environment |= env or {}

    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=run_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=DIE_WITH_PARENT,
            )
        except OSError as error:
            raise SimulatorError(f"cannot start {command[0]}: {error.strerror}") from error
    return Simulation(model, process, run_dir, log)


def run_model(
    model: Model,
    *,
    test_module: str,
    testcase: str | None = None,
    env: Mapping[str, str] | None = None,
    python_path: Sequence[Path] = (),
    run_dir: Path | None = None,
    waves: bool = False,
    timeout_s: float | None = None,
    log: Path | None = None,
) -> Results:
    """Run a cocotb test module on a model and return its results.

    Any number of runs of one model may go on at the same time. Whatever ends the call, a timeout or
    Ctrl-C included, no process is left behind.

    Args:
        model: what to run.
        test_module: the Python module with the cocotb tests, to be found on this process's
            ``sys.path``.
        testcase: name of the only test to run, or None for all.
        env: environment variables for the simulator, over this process's own.
        python_path: directories to search for modules before ``sys.path``.
        run_dir: directory to run in; a new one below ``runs`` of the build cache by default.
        waves: record waves; the model must have been compiled for it.
        timeout_s: kill the run after so many seconds of real time.
        log: file for what the simulator prints; ``simulation.log`` in the run directory by default.

    Raises:
        SimulationFailed: if a test failed; the message says which first, and why.
        SimulationTimeout: if the run took too long.
        SimulatorError: if it ended without results, or no test was selected.
        ValueError: if waves are wanted from a model that cannot record them.
    """
    with start_model(
        model,
        test_module=test_module,
        testcase=testcase,
        env=env,
        python_path=python_path,
        run_dir=run_dir,
        waves=waves,
        log=log,
    ) as simulation:
        return simulation.wait(timeout_s)
