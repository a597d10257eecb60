"""Run a Python function with a `Device` over simulated RTL, in a simulator process of its own.

    def work(device, tokens):
        ...                       # any use of the host library; runs inside of the simulator process
        report("half way")        # reaches the caller's `progress` at once
        return results

    results = run_in_simulation(config, work, {"tokens": 100}, simulator=Simulator.VERILATOR)

Arguments and results cross by pickle, so they should be plain data, NumPy arrays, or classes of importable modules.
"""

import importlib
import importlib.util
import inspect
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvattic.spec.config import Config
from kvattic.support.files import write_whole
from kvattic_sim.rtl.transport import AxiStalls, FlashSettings, NandSettings
from kvattic_sim.simulators.build import (
    Model,
    Simulation,
    SimulationFailed,
    SimulationTimeout,
    Simulator,
    new_run_dir,
    start_model,
)

__all__ = ["JobError", "Outcome", "Request", "Run", "report", "run_in_simulation", "run_on_model"]

REQUEST, OUTCOME, PROGRESS = "request.pickle", "outcome.pickle", "progress.txt"
POLL_S = 0.05

Function = Callable[..., Any] | str

in_simulation = False
"""Whether this process is the simulator's, and its working directory the run's."""


class JobError(RuntimeError):
    """The function raised in the simulator process; the message has what and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the simulator process is to do (see `run_in_simulation`)."""

    config: Config
    module: str
    file: str
    name: str
    arguments: dict[str, Any]
    flash: FlashSettings | NandSettings
    stalls: AxiStalls
    memory_bytes: int
    timeout_cycles: int | None
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        result: what the function returned.
        error: its exception, if that could be pickled.
        message: the exception's traceback; empty if there was none.
        cycles: cycles simulated.
        seconds: real time that the function took.
    """

    result: Any = None
    error: Exception | None = None
    message: str = ""
    cycles: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        result: what the function returned.
        cycles: cycles simulated, reset included.
        seconds: real time that the function took, without build and start of the simulator.
        run_dir: the run's directory.
        waves: recorded waveform, or None.
    """

    result: Any
    cycles: int
    seconds: float
    run_dir: Path
    waves: Path | None


def report(line: str) -> None:
    """Send a line of progress to the caller of `run_in_simulation`; elsewhere, do nothing."""
    if not in_simulation:
        return
    with Path(PROGRESS).open("a") as file:
        file.write(line.replace("\n", " ") + "\n")


def resolve(request: Request) -> Callable[..., Any]:
    """Find the request's function, by its module's name or, where that is not importable, by its file.

    Raises:
        ImportError: the module cannot be loaded.
        AttributeError: it has no such function.
    """
    try:
        spec = importlib.util.find_spec(request.module)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and (not request.file or spec.origin == request.file):
        module = importlib.import_module(request.module)
    else:
        spec = importlib.util.spec_from_file_location(request.module, request.file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {request.file or request.module}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    found: Any = module
    for part in request.name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _locate(function: Function) -> tuple[str, str, str]:
    """(module, file, name) of a function, or of a text "module:name" or "path.py:name"."""
    if isinstance(function, str):
        place, separator, name = function.rpartition(":")
        if not separator:
            raise ValueError(f"function must be 'module:name' or 'path.py:name', not {function!r}")
        if place.endswith(".py"):
            return Path(place).stem, str(Path(place).resolve()), name
        return place, "", name
    if "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} must be a function of a module, not a local one")
    file = inspect.getsourcefile(function)
    module = "kvattic_job" if function.__module__ == "__main__" else function.__module__
    return module, str(Path(file).resolve()) if file else "", function.__qualname__


def run_in_simulation(
    config: Config,
    function: Function,
    arguments: Mapping[str, Any] | None = None,
    *,
    simulator: Simulator | str = Simulator.VERILATOR,
    flash: FlashSettings | NandSettings | None = None,
    stalls: AxiStalls | None = None,
    memory_bytes: int = 1 << 24,
    timeout_cycles: int | None = None,
    timeout_s: float | None = None,
    waves: bool = False,
    progress: Callable[[str], None] | None = None,
    run_dir: Path | None = None,
    frames: int | None = None,
    dram_bytes: int | None = None,
) -> Run:
    """Build the simulation of `config` unless it is there, and run ``function(device, **arguments)`` in it.

    Args:
        config: the engine's configuration.
        function: a function of a module, or "module:name" or "path.py:name".
        arguments: its keyword arguments; must pickle.
        simulator: which simulator.
        flash: how the dies behave (the whole drive is simulated), or how ideal flash twins do (the engine alone is);
            dies without faults by default.
        stalls: when the AXI channels pause.
        memory_bytes: size of the host memory.
        timeout_cycles: how long one wait for the drive may take, in cycles.
        timeout_s: how long the whole run may take, in seconds of real time; the build does not count.
        waves: record waves.
        progress: called with each line that the function gives to `report`.
        run_dir: the run's directory; a new one below ``build/sim/runs`` by default.
        frames: pages whose contents each channel can keep; see `build_testbench`.
        dram_bytes: size of device DRAM; see `build_testbench`.

    Raises:
        JobError: the function raised something that cannot be pickled.
        Exception: whatever else the function raised, with its traceback as a note.
        SimulatorError: the build failed, or the simulator ended without an outcome.
        SimulationTimeout: the run took too long.
    """
    from kvattic_sim.rtl.testbench import Flash, build_testbench  # the simulator's process needs no Amaranth

    kind = Flash.IDEAL if isinstance(flash, FlashSettings) else Flash.NAND
    model = build_testbench(config, simulator, kind, waves=waves, frames=frames, dram_bytes=dram_bytes)
    return run_on_model(
        model,
        config,
        function,
        arguments,
        flash=flash,
        stalls=stalls,
        memory_bytes=memory_bytes,
        timeout_cycles=timeout_cycles,
        timeout_s=timeout_s,
        progress=progress,
        run_dir=run_dir,
    )


def run_on_model(
    model: Model,
    config: Config,
    function: Function,
    arguments: Mapping[str, Any] | None = None,
    *,
    flash: FlashSettings | NandSettings | None = None,
    stalls: AxiStalls | None = None,
    memory_bytes: int = 1 << 24,
    timeout_cycles: int | None = None,
    timeout_s: float | None = None,
    progress: Callable[[str], None] | None = None,
    run_dir: Path | None = None,
) -> Run:
    """`run_in_simulation` on a model that `build_testbench` returned; records waves if it can."""
    module, file, name = _locate(function)
    request = Request(
        config=config,
        module=module,
        file=file,
        name=name,
        arguments=dict(arguments or {}),
        flash=flash or NandSettings(),
        stalls=stalls or AxiStalls(),
        memory_bytes=memory_bytes,
        timeout_cycles=timeout_cycles,
        timeout_s=timeout_s or 1e9,
    )
    if run_dir is None:
        run_dir = new_run_dir(f"{name}-{model.simulator}-")
    run_dir.mkdir(parents=True, exist_ok=True)
    for leftover in (OUTCOME, PROGRESS):
        (run_dir / leftover).unlink(missing_ok=True)
    write_whole(run_dir / REQUEST, pickle.dumps(request))
    with start_model(
        model, test_module="kvattic_sim.rtl.cocotb_jobs", run_dir=run_dir, waves=model.waves
    ) as simulation:
        _follow(simulation, run_dir / PROGRESS, progress, timeout_s)
        try:
            waves = simulation.wait(timeout_s).waves
        except SimulationFailed:
            waves = None
            if not (run_dir / OUTCOME).is_file():
                raise
    outcome: Outcome = pickle.loads((run_dir / OUTCOME).read_bytes())
    if outcome.error is not None:
        outcome.error.add_note(f"in the simulation in {run_dir}:\n{outcome.message}")
        raise outcome.error
    if outcome.message:
        raise JobError(f"{name} failed in the simulation in {run_dir}:\n{outcome.message}")
    return Run(
        result=outcome.result,
        cycles=outcome.cycles,
        seconds=outcome.seconds,
        run_dir=run_dir,
        waves=waves,
    )


def _follow(
    simulation: Simulation,
    path: Path,
    progress: Callable[[str], None] | None,
    timeout_s: float | None,
) -> None:
    """Hand the lines of progress over until the simulator ends."""
    begin, position, rest = time.monotonic(), 0, ""
    running = True
    while running:
        running = simulation.running
        if path.is_file():
            with path.open() as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *lines, rest = (rest + text).split("\n")
            if progress is not None:
                for line in lines:
                    progress(line)
        if timeout_s is not None and time.monotonic() - begin > timeout_s:
            raise SimulationTimeout(
                f"the simulation of {simulation.model.toplevel} was killed after {timeout_s:g} s; "
                f"the log is {simulation.log} and ends:\n{simulation.log_tail()}"
            )
        if running:
            time.sleep(POLL_S)
