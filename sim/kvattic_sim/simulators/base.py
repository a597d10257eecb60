"""A simulator, a model compiled for it, the results of a run, and how they fail."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

__all__ = [
    "TIMESCALE",
    "Model",
    "Results",
    "SimulationFailed",
    "SimulationTimeout",
    "Simulator",
    "SimulatorError",
    "TestResult",
]


TIMESCALE = ("1ns", "1ps")


class Simulator(StrEnum):
    """A Verilog simulator that cocotb can drive."""

    VERILATOR = "verilator"
    ICARUS = "icarus"


class SimulatorError(RuntimeError):
    """A simulator is missing, rejected its input, or ended without results."""


class SimulationTimeout(SimulatorError):
    """A run took longer than it was allowed, and was killed."""


class SimulationFailed(AssertionError):
    """At least one cocotb test failed; the message has the first one's.

    Attributes:
        results: the results of the whole run.
    """

    def __init__(self, message: str, results: "Results") -> None:
        super().__init__(message)
        self.results = results


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A compiled simulation.

    Attributes:
        simulator: the simulator it is for.
        toplevel: name of the top-level module, which is the ``dut`` of the tests.
        directory: where it was built; the build's log is ``build.log`` there.
        waves: whether it was compiled so that waves can be recorded.
        cached: whether it was there already, so that nothing had to be compiled.
    """

    simulator: Simulator
    toplevel: str
    directory: Path
    waves: bool = False
    cached: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """The outcome of one cocotb test.

    Attributes:
        name: name of the test function.
        status: ``passed``, ``failed`` or ``skipped``.
        seconds: real time that it took.
        message: what went wrong, or the empty string.
    """

    name: str
    status: str
    seconds: float
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The outcome of one run.

    Attributes:
        tests: one entry for each test that was selected.
        seconds: real time of the run, start of the simulator included.
        run_dir: the directory that the simulator ran in.
        log: what it printed.
        waves: the recorded waveform (VCD for Verilator, FST for Icarus), or None.
    """

    tests: tuple[TestResult, ...]
    seconds: float
    run_dir: Path
    log: Path
    waves: Path | None = None

    @property
    def failed(self) -> tuple[TestResult, ...]:
        """The tests that failed."""
        return tuple(test for test in self.tests if test.status == "failed")
