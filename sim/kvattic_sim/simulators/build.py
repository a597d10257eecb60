"""Build and run a cocotb simulation, with compiled models cached by their content: the names for others.

``compile_model`` turns Verilog into a :class:`Model`; ``run_model`` runs cocotb tests on it::

    model = compile_model([rtl, bench], "bench", Simulator.VERILATOR)
    results = run_model(model, test_module="bench_tests")

Everything is written below :func:`default_build_root`: models to ``<toplevel>-<simulator>-<hash>/``, runs to
directories of their own below ``runs/``. The same content is compiled once, however many processes ask for it.
Whatever ends this process, compilers do not outlive it: see :class:`Group`.
"""

from kvattic_sim.simulators.base import (
    Model,
    Results,
    SimulationFailed,
    SimulationTimeout,
    Simulator,
    SimulatorError,
    TestResult,
)
from kvattic_sim.simulators.cache import CACHE, cache_errors, default_build_root, locked
from kvattic_sim.simulators.icarus import icarus_available
from kvattic_sim.simulators.models import compile_model
from kvattic_sim.simulators.process import DIE_WITH_PARENT, Simulation, new_run_dir, run_model, start_model
from kvattic_sim.simulators.steps import Group
from kvattic_sim.simulators.verilator import generated_files, prepare_runtime, verilator_environment

__all__ = [
    "CACHE",
    "DIE_WITH_PARENT",
    "Group",
    "Model",
    "Results",
    "Simulation",
    "SimulationFailed",
    "SimulationTimeout",
    "Simulator",
    "SimulatorError",
    "TestResult",
    "cache_errors",
    "compile_model",
    "default_build_root",
    "generated_files",
    "icarus_available",
    "locked",
    "new_run_dir",
    "prepare_runtime",
    "run_model",
    "start_model",
    "verilator_environment",
]
