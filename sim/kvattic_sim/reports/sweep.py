"""A grid of configurations and workloads, each simulated: `kvattic sweep`.

    points = grid(PAPER, {"channels": [1, 2, 4]}, [(8, 2048)], ["dense"])
    for row in run(points, jobs=2):
        ...                                 # as they finish

Each point is built and run in a process of its own, or by a worker of a Dask cluster. An error at a point becomes its
row's `error`; the others go on. However `run` ends, it leaves no process behind.
"""

import contextlib
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

from kvattic import AttendResult, Config, Device, KvatticError, Mode, RequestError
from kvattic.spec.nand import NandPart, part
from kvattic.support.files import whole, write_whole
from kvattic_sim.rtl.jobs import JobError, report, run_on_model
from kvattic_sim.rtl.transport import NandSettings, RtlTransport
from kvattic_sim.simulators.build import SimulationFailed, Simulator, SimulatorError
from kvattic_sim.workloads import Attention, ModeSettings, Usage, measured, topical

__all__ = ["FIGURES", "ClusterError", "Point", "Row", "grid", "measure", "parse_axis", "plot", "run", "run_on_dask",
           "save"]

FIGURES = {
    "write_cycles": "cycles of writing K and V",
    "cycles": "cycles of one attention of all heads",
    "milliseconds": "the same at the configuration's clock",
    "bus_use": "share of the flash buses' time in which data moved, during attention",
    "lane_use": "share of the lanes' beats that carried data, from the first beat to the last",
    "die_use": "share of the dies' time in which their arrays were busy",
    "starved": "share of lane cycles without a beat although codewords were requested",
    "barrier": "share of lane cycles in which V waited for the maximum",
    "idle": "share of lane cycles without work",
    "flash_bytes": "bytes on the flash buses during attention, parity included",
    "kv_bytes": "bytes of K and V",
    "page_reads": "pages read from the arrays",
    "corrected": "codewords read with errors, all of them corrected",
    "bit_errors": "bits corrected",
    "retries": "codewords read again with a read-retry setting",
    "rel_rms": "relative RMS against float64 attention of all tokens, of data with topics (workloads.topical)",
    "equal_bits": "whether the results are the golden device's, bit for bit",
    "seconds": "time that simulating attention took",
}
"""What is measured at a point."""

Figures: TypeAlias = dict[str, float | bool]
Follow: TypeAlias = Callable[[str, int, int | None], None]
"""Called with what is being done, options much of it is done, and of options much, if that is known."""
Progress: TypeAlias = Callable[[int, str, int, int | None], None]
"""The same, with a point's number before it."""
Work: TypeAlias = Callable[["Point", Follow], Figures]


class ClusterError(KvatticError):
    """The Dask cluster cannot be reached."""


class _StoppedError(Exception):
    """The client of a Dask cluster has asked to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One place of the grid.

    Attributes:
        base: the configuration but for the settings.
        settings: fields of it that the point sets, by name: of `Config`, or part.FIELD of its part.
        heads: KV heads; as many query rows as the configuration has attend to each.
        tokens: of each head.
        mode: which tokens are attended, a name of `kvattic.Mode` in small letters.
        simulator: what runs it.
        bit_error_rate: raw bit errors of each read, over bits read.
        check: compare the results with the golden device and with float64.
    """

    base: Config
    settings: dict[str, Any]
    heads: int
    tokens: int
    mode: str = "dense"
    simulator: Simulator = Simulator.VERILATOR
    bit_error_rate: float = 1e-5
    check: bool = True

    @property
    def config(self) -> Config:
        """Its configuration.

        Raises:
            ConfigError: the settings do not fit together.
        """
        ours = {name: value for name, value in self.settings.items() if "." not in name}
        theirs = {name.removeprefix("part."): value for name, value in self.settings.items() if "." in name}
        if isinstance(ours.get("part"), str):
            ours["part"] = part(ours["part"])
        if theirs:
            ours["part"] = replace(ours.get("part", self.base.part), **theirs)
        return replace(self.base, **ours)

    @property
    def axes(self) -> dict[str, Any]:
        """What tells it from the other points: settings, heads, tokens, mode."""
        return {**self.settings, "heads": self.heads, "tokens": self.tokens, "mode": self.mode}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.axes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A point and its result.

    Attributes:
        number: of the point in its grid.
        point: the point.
        figures: see `FIGURES`; empty if there was an error.
        error: the error's message; empty if there was none.
    """

    number: int
    point: Point
    figures: Figures = field(default_factory=dict)
    error: str = ""

    def flat(self) -> dict[str, Any]:
        """Axes, figures and error side by side; a figure that is not known is None."""
        return {**self.point.axes, **{name: self.figures.get(name) for name in FIGURES}, "error": self.error}


# The grid.


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`channels=1,2,4` as a name and its values.

    Args:
        text: a field of `Config` (of `part` by the part's name) or part.FIELD, and values of its type.

    Raises:
        RequestError: the field does not exist, or a value is not of its type.
    """
    name, separator, values = text.partition("=")
    owner, key = (NandPart, name.removeprefix("part.")) if name.startswith("part.") else (Config, name)
    types = {one.name: one.type for one in fields(owner)}
    if not separator or not values or key not in types:
        raise RequestError(f"a setting must be FIELD=VALUE,VALUE,... with FIELD one of "
                           f"{', '.join(one.name for one in fields(Config))}, or part.FIELD, not {text!r}")
    return name, [_value(name, types[key], value.strip()) for value in values.split(",")]


def _value(name: str, kind: Any, text: str) -> Any:
    booleans = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if kind is bool:
        if text.lower() not in booleans:
            raise RequestError(f"{name} must be one of {', '.join(booleans)}, not {text!r}")
        return booleans[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise RequestError(f"{name} must be {'an int' if kind is int else 'a number'}, not {text!r}") from None
    return text


def grid(base: Config, axes: Mapping[str, Sequence[Any]], workloads: Sequence[tuple[int, int]],
         modes: Sequence[str] = ("dense",), **common: Any) -> list[Point]:
    """All combinations, the last axis fastest.

    Args:
        base: the configuration but for the axes.
        axes: values of each setting (`parse_axis`).
        workloads: (heads, tokens).
        modes: see `Point`.
        common: further attributes of every point.

    Raises:
        RequestError: the mode does not exist, or a number is not positive.
    """
    known = [mode.name.lower() for mode in Mode]
    for mode in modes:
        if mode not in known:
            raise RequestError(f"mode must be one of {', '.join(known)}, not {mode!r}")
    for heads, tokens in workloads:
        if heads < 1 or tokens < 1:
            raise RequestError(f"a workload must have at least one head and one token, not {heads},{tokens}")
    combinations = itertools.product(itertools.product(*axes.values()), workloads, modes)
    return [Point(base=base, settings=dict(zip(axes, values, strict=True)), heads=heads, tokens=tokens, mode=mode,
                  **common) for values, (heads, tokens), mode in combinations]


# One point.


def workload(device: Device, attention: Attention, options: ModeSettings) -> tuple[AttendResult, Usage, Usage]:
    """Write K and V, and attend once: the result, what writing took, what attention took.

    This is the part that runs inside of the simulator.
    """
    if isinstance(device.transport, RtlTransport):
        device.transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    kv_heads, tokens, _ = attention.key.shape
    sequence = device.create_sequence(kv_heads, capacity_tokens=tokens, **options.sequence_arguments(device.config))
    report("step|writing")
    _, written = measured(device, lambda: sequence.prefill(attention.key, attention.value))
    report("step|attending")
    arguments = options.attend_arguments(device.config, tokens)
    result, used = measured(device, lambda: sequence.attend(attention.query, **arguments))
    return result, written, used


def measure(point: Point, follow: Follow = lambda what, done, total: None) -> Figures:
    """Build, run and check a point.

    Args:
        point: what to run.
        follow: told how far it is, in cycles.

    Raises:
        ConfigError: the configuration is invalid.
        KvatticError: it cannot serve the workload.
        SimulatorError, SimulationFailed, JobError: see `kvattic_sim.rtl.jobs`.
    """
    # Only the process that builds and checks needs this.
    from kvattic_sim.compare import equal_bits, oracle_errors
    from kvattic_sim.rtl.testbench import build_testbench

    config, options = point.config, ModeSettings(mode=point.mode)
    follow("building", 0, None)
    model = build_testbench(config, point.simulator)
    attention = topical(config, kv_heads=point.heads, tokens=point.tokens, group=config.rows)
    step = "starting"

    def heed(line: str) -> None:
        nonlocal step
        kind, _, rest = line.partition("|")
        step = rest if kind == "step" else step
        follow(step, int(rest) if kind == "cycles" else 0, None)

    result, written, used = run_on_model(
        model, config, workload, {"attention": attention, "options": options},
        flash=NandSettings(bit_error_rate=point.bit_error_rate), progress=heed).result
    slots = config.channels * used.cycles or 1
    figures: Figures = {
        "write_cycles": written.cycles,
        "cycles": used.cycles,
        "milliseconds": used.cycles / config.clock_mhz / 1e3,
        "bus_use": used.bus_use(config),
        "lane_use": used.lane_use(config.channels),
        "die_use": used.die_use(config),
        **{name: used.stalls[name] / slots for name in ("starved", "barrier", "idle")},
        "flash_bytes": used.flash["flash_words"] * config.beat_bytes,
        "kv_bytes": 2 * point.heads * point.tokens * config.token_bytes,
        **{name: used.flash[name] for name in ("page_reads", "corrected", "bit_errors", "retries")},
    }
    if point.check:
        follow("checking", 0, None)
        errors = oracle_errors(attention, result, config)[:, 0]
        figures["rel_rms"] = float((errors**2).mean() ** 0.5)
        figures["equal_bits"] = bool(equal_bits(attention, result, config, options).all())
    figures["seconds"] = used.seconds
    return figures


def _attempt(work: Work, number: int, point: Point, follow: Follow) -> Row:
    """The point's row, even if it fails."""
    try:
        return Row(number=number, point=point, figures=work(point, follow))
    except (KvatticError, SimulatorError, SimulationFailed, JobError) as error:
        return Row(number=number, point=point, error=str(error))
    except Exception as error:  # noqa: BLE001 - the row says what it was
        return Row(number=number, point=point, error=f"{type(error).__name__}: {error}")


def _impossible(number: int, point: Point) -> Row | None:
    """A row if the configuration is invalid."""
    try:
        _ = point.config
    except KvatticError as error:
        return Row(number=number, point=point, error=str(error))
    return None


# On this machine.


def _child(connection: Connection, work: Work, number: int, point: Point) -> None:
    """Run a point in this process; its compilers are in its process group, and simulators die with it."""
    from kvattic_sim.simulators.build import DIE_WITH_PARENT

    os.setsid()
    if DIE_WITH_PARENT is not None:
        DIE_WITH_PARENT()

    def follow(what: str, done: int, total: int | None) -> None:
        connection.send((what, done, total))

    with contextlib.suppress(BrokenPipeError):
        connection.send(_attempt(work, number, point, follow))


@dataclass(slots=True)
class _Running:
    number: int
    point: Point
    process: SpawnProcess
    connection: Connection

    def kill(self) -> None:
        """End it and everything it has started."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()     # if it had no group of its own yet
        self.process.join()
        self.connection.close()

    def receive(self) -> Row | tuple[str, int, int | None]:
        """Its next message; a row with an error if it has died."""
        try:
            message: Row | tuple[str, int, int | None] = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Row(number=self.number, point=self.point,
                       error=f"its process ended with status {self.process.exitcode} and without a result")
        return message


def run(points: Sequence[Point], *, jobs: int | None = None, work: Work = measure,
        progress: Progress | None = None) -> Iterator[Row]:
    """Run points in processes of their own.

    Args:
        points: to run.
        jobs: options many at a time; one for each processor if None.
        work: what to do at each: a function of a module.
        progress: called with a point's number, and what is being done there.

    Yields:
        The rows as they finish; those without a configuration first.

    Raises:
        RequestError: jobs is not positive.
    """
    if jobs is not None and jobs < 1:
        raise RequestError(f"jobs must be positive, not {jobs}")
    jobs = jobs or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    waiting: list[tuple[int, Point]] = []
    for number, point in enumerate(points):
        if (row := _impossible(number, point)) is not None:
            yield row
        else:
            waiting.append((number, point))
    waiting.reverse()
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, point = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, work, number, point), daemon=True)
                process.start()
                theirs.close()
                running[ours] = _Running(number, point, process, ours)
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                one = running[ready]
                match one.receive():
                    case Row() as row:
                        del running[ready]
                        one.kill()
                        yield row
                    case what, done, total:
                        if progress is not None:
                            progress(one.number, what, done, total)
    finally:
        for one in running.values():
            one.kill()


# On a Dask cluster.

STOP_S = 2.0
"""Seconds after which a worker looks again whether it should stop."""


def _distributed() -> Any:
    return importlib.import_module("distributed")


def _on_worker(number: int, point: Point, work: Work, flag: str) -> Row:
    """Run a point on a worker of the cluster."""
    event, looked = _distributed().Event(flag), 0.0

    def follow(what: str, done: int, total: int | None) -> None:
        nonlocal looked
        if time.monotonic() > looked + STOP_S:
            looked = time.monotonic()
            if event.is_set():
                raise _StoppedError("stopped")

    return _attempt(work, number, point, follow)


def run_on_dask(points: Sequence[Point], address: str, *, work: Work = measure, timeout_s: float = 10.0,
                progress: Progress | None = None) -> Iterator[Row]:
    """Run points on a Dask cluster, whose workers have this project installed.

    If the caller leaves early, waiting points are cancelled and running ones stop when they next report progress.

    Args:
        points: to run.
        address: of the scheduler, such as tcp://host:8786.
        work: as in `run`.
        timeout_s: patience with the scheduler at the beginning.
        progress: called with a point's number and "done" when it is.

    Yields:
        The rows as they finish; those without a configuration first.

    Raises:
        ClusterError: no scheduler answers at the address.
        ModuleNotFoundError: distributed is not installed (extra `cluster`).
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=timeout_s, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"there is no Dask scheduler at {address}: {error or type(error).__name__}") from error
    flag = f"kvattic-sweep-{uuid.uuid4()}"
    with client:
        futures = {}
        try:
            for number, point in enumerate(points):
                if (row := _impossible(number, point)) is not None:
                    yield row
                else:
                    futures[client.submit(_on_worker, number, point, work, flag, pure=False)] = number
            for future in distributed.as_completed(list(futures), loop=client.loop):
                number = futures.pop(future)
                try:
                    row = future.result()
                except Exception as error:  # noqa: BLE001 - the worker died, or cannot import this
                    row = Row(number=number, point=points[number], error=f"{type(error).__name__}: {error}")
                if progress is not None:
                    progress(number, "done", 0, None)
                yield row
        finally:
            if futures:
                distributed.Event(flag, client=client).set()
                client.cancel(list(futures))


# Results.


def save(rows: Iterable[Row], path: Path) -> None:
    """Write rows, in the order of the grid: CSV if the path ends in .csv, otherwise JSON."""
    flat = [row.flat() for row in sorted(rows, key=lambda row: row.number)]
    if path.suffix == ".csv":
        with whole(path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in flat for name in row)))
            writer.writeheader()
            writer.writerows(flat)
    else:
        write_whole(path, json.dumps(flat, indent=2) + "\n")


def plot(rows: Iterable[Row], path: Path, *, x: str | None = None, y: str = "cycles") -> None:
    """Draw one figure over one axis, a line for each combination of the other axes.

    Args:
        rows: results of the points; those with an error are left out.
        path: PNG to write.
        x: an axis; if None, the first that has more than one value.
        y: one of `FIGURES`.

    Raises:
        RequestError: the axis or figure does not exist, or no row has it.
    """
    import matplotlib.pyplot as plt

    good = [row for row in sorted(rows, key=lambda row: row.number) if y in row.figures]
    if y not in FIGURES:
        raise RequestError(f"there is no figure {y!r}; figures are {', '.join(FIGURES)}")
    if not good:
        raise RequestError(f"no row has a figure {y} to draw")
    axes = list(good[0].point.axes)
    values = {name: list(dict.fromkeys(str(row.point.axes[name]) for row in good)) for name in axes}
    varying = [name for name in axes if len(values[name]) > 1]
    x = x or (varying[0] if varying else axes[0])
    if x not in axes:
        raise RequestError(f"there is no axis {x!r}; axes are {', '.join(axes)}")
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row in good:
        label = ", ".join(f"{name} {row.point.axes[name]}" for name in varying if name != x)
        lines.setdefault(label, []).append((row.point.axes[x], float(row.figures[y])))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, pairs in lines.items():
        axis.plot([p[0] for p in pairs], [p[1] for p in pairs], marker="o", label=label or None)
    axis.set_xlabel(x)
    axis.set_ylabel(f"{y}: {FIGURES[y]}")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if any(lines):
        axis.legend(frameon=False)
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    plt.close(figure)
