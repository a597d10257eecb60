"""A grid of configurations and workloads, each simulated or modelled: `kvattic sweep`.

    points = grid(PAPER, {"channels": [1, 2, 4]}, [(8, 2048)], ["dense"])
    for row in run(points, jobs=2):
        ...                                 # as they finish

Each point is built and run in a process of its own, or by a worker of a Dask cluster. An error at a point becomes its
row's `error`; the others go on. However `run` ends, it leaves no process behind.
"""

import contextlib
import csv
import importlib
import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

from kvattic import KvatticError, RequestError
from kvattic.support.files import whole, write_whole
from kvattic_sim.reports.points import Follow, measure
from kvattic_sim.reports.study import AXES, CHECKED, DATA, FIGURES, Figures, Point, Row, grid, parse_axis, sample
from kvattic_sim.rtl.jobs import JobError
from kvattic_sim.simulators.build import SimulationFailed, SimulatorError

__all__ = ["AXES", "CHECKED", "DATA", "FIGURES", "ClusterError", "Point", "Row", "grid", "measure",
           "parse_axis", "plot", "run", "run_on_dask", "sample", "save"]

Progress: TypeAlias = Callable[[int, str, int, int | None], None]
"""As `Follow`, with a point's number before it."""
Work: TypeAlias = Callable[[Point, Follow], Figures]


class ClusterError(KvatticError):
    """The Dask cluster cannot be reached."""


class _StoppedError(Exception):
    """The client of a Dask cluster has asked to stop."""


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
    """Draw one figure over one axis, a line for each combination of the other axes, with confidence intervals.

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
    lines: dict[str, list[tuple[Any, float, float]]] = {}
    for row in good:
        label = ", ".join(f"{name} {row.point.axes[name]}" for name in varying if name != x)
        place = row.point.axes[x]
        lines.setdefault(label, []).append((
            place if isinstance(place, int | float) else str(place), float(row.figures[y]),
            float(row.figures.get(f"{y}_ci", 0))))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, pairs in lines.items():
        at, heights, intervals = zip(*pairs, strict=True)
        # Confidence intervals where points were repeated.
        axis.errorbar(at, heights, intervals if any(intervals) else None, marker="o", capsize=3, label=label or None)
    axis.set_xlabel(x)
    axis.set_ylabel(f"{y}: {FIGURES[y]}{', modelled' * good[0].point.modelled}")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if any(lines):
        axis.legend(frameon=False)
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    plt.close(figure)
