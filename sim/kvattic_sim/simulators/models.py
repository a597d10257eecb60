"""Compiles Verilog for a simulator, or returns the model that the same content gave before."""

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvattic.support.files import named
from kvattic_sim.simulators import separate
from kvattic_sim.simulators.base import TIMESCALE, Model, Simulator, SimulatorError
from kvattic_sim.simulators.cache import cache_errors, default_build_root, digest_of, locked, tag
from kvattic_sim.simulators.icarus import build_icarus
from kvattic_sim.simulators.steps import Steps
from kvattic_sim.simulators.verilator import (
    OPT_FAST,
    VERILATE_FLAGS,
    build_verilator,
    cocotb_libs,
    cxx_flags,
    tool_version,
    verilator_environment,
)

__all__ = ["compile_model"]


def _read(sources: Sequence[Path]) -> dict[str, bytes]:
    """The sources' contents by name, in their order."""
    contents: dict[str, bytes] = {}
    for source in sources:
        if source.name in contents:
            raise SimulatorError(f"two sources are called {source.name}; their names must differ")
        try:
            contents[source.name] = source.read_bytes()
        except OSError as error:
            raise SimulatorError(f"cannot read the source {source}: {error.strerror}") from error
    if not contents:
        raise SimulatorError("there are no sources to compile")
    return contents


def _copy(contents: Mapping[str, bytes], directory: Path) -> list[Path]:
    """Write the sources into a fresh directory of the build; their paths there."""
    shutil.rmtree(directory, ignore_errors=True)
    copies = directory / "src"
    copies.mkdir(parents=True)
    for name, data in contents.items():
        with named(copies / name):
            (copies / name).write_bytes(data)
    return [Path("src") / name for name in contents]


def compile_model(
    sources: Sequence[Path],
    toplevel: str,
    simulator: Simulator,
    *,
    parameters: Mapping[str, int] | None = None,
    waves: bool = False,
    timing: bool = False,
    public_modules: Sequence[str] = (),
    separate_modules: Sequence[str] = (),
    build_root: Path | None = None,
) -> Model:
    """Compile Verilog for one simulator, or return the model that the same content gave before.

    The content is: the sources' bytes and names in their order, the parameters, the options, the
    versions of the simulator, the compiler and cocotb. Files that the sources read with
    ``$readmemh`` or ``include`` are not seen: do not use them. Several processes may ask for the
    same model at the same time; one compiles, the others wait.

    Args:
        sources: Verilog or SystemVerilog files; their names must differ.
        toplevel: name of the top-level module.
        simulator: what to compile for.
        parameters: values of the top-level module's parameters.
        waves: compile so that waves can be recorded. That slows each run down, recording or not.
        timing: allow delays and event waits in the Verilog, which takes longer to compile
            (Verilator only; Icarus always allows them).
        public_modules: modules besides the top level whose signals Python may see (Verilator only;
            Icarus shows all).
        separate_modules: modules that are compiled by themselves, once for all their instances and for all models that
            have them; `kvattic_sim.simulators.separate` says what they must keep to. Not where waves are recorded
            or delays allowed, nor by Icarus: there the model is compiled as a whole.
        build_root: where to build; :func:`default_build_root` if None.

    Raises:
        SimulatorError: if a source cannot be read, a tool is missing, or the compilation fails. The
            message has the log's last lines, and the next call tries again.
    """
    simulator = Simulator(simulator)
    root = (build_root or default_build_root()).resolve()
    parameters = dict(parameters or {})
    contents = _read(sources)
    verilator = simulator is Simulator.VERILATOR
    if waves or timing or not verilator:
        separate_modules = ()
    digest = digest_of(
        [(name, hashlib.sha256(data).hexdigest()) for name, data in contents.items()],
        toplevel,
        sorted(parameters.items()),
        simulator,
        tool_version(simulator),
        importlib.metadata.version("cocotb"),
        waves,
        [
            [timing, sorted(public_modules), VERILATE_FLAGS, OPT_FAST],
            [separate_modules, hashlib.sha256(Path(separate.__file__).read_bytes()).hexdigest()],
            [cxx_flags(waves=waves, timing=timing), str(cocotb_libs())],
        ]
        if verilator
        else TIMESCALE,
    )
    directory = root / f"{toplevel}-{simulator}-{digest}"
    stamp = directory / ".finished"

    def model(*, cached: bool) -> Model:
        return Model(
            simulator=simulator, toplevel=toplevel, directory=directory, waves=waves, cached=cached
        )

    if stamp.is_file():
        return model(cached=True)
    with cache_errors(root), locked(root / f"{directory.name}.lock"):
        if stamp.is_file():
            return model(cached=True)
        tag(root)
        paths = _copy(contents, directory)
        with Steps(directory, verilator_environment() if verilator else os.environ) as steps:
            if verilator:
                build_verilator(
                    steps,
                    paths,
                    toplevel,
                    parameters,
                    public_modules,
                    separate_modules,
                    waves=waves,
                    timing=timing,
                    root=root,
                )
            else:
                build_icarus(steps, paths, toplevel, parameters, waves=waves)
        stamp.touch()
    return model(cached=False)
