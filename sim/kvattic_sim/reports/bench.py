"""The benchmarks, `make bench`: measure, compare with the project's bars, keep in build/bench.json.

``python -m kvattic_sim.reports.bench [PREFIX]`` measures only what has keys with that prefix; without one, all but
``house.sim`` and ``house.test``, which take an hour. Each figure is kept as soon as it is known. Missing a bar is
reported and is not an error; a wrong result is.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvattic.errors import KvatticError, RequestError
from kvattic.support import terminal
from kvattic.support.terminal import Telling
from kvattic_sim.lm import evaluate, needle, real, sketch_error
from kvattic_sim.lm.smollm2 import WeightsError
from kvattic_sim.reports import figures, paper
from kvattic_sim.reports.benches import (
    accuracy,
    architectures,
    bad_blocks,
    beside,
    causal,
    cost,
    decode_ratio,
    engine,
    flash,
    host,
    house,
    kv_formats,
    latency,
    models,
    placement,
    serve,
    sparse,
    system,
    time_grid,
    workloads,
)
from kvattic_sim.reports.benches.engine import Bench, Lab, UnavailableError, WrongResultError
from kvattic_sim.reports.console import make_console
from kvattic_sim.rtl.jobs import JobError
from kvattic_sim.simulators.build import SimulationFailed, Simulator, SimulatorError

__all__ = ["BARS", "WIDTH", "Bar", "Report", "Verdict", "bar_text", "benches", "main", "number_text", "report", "run",
           "select", "verdict"]

Value = float | bool


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be.

    Attributes:
        relation: ``>=`` or ``<=``.
        limits: numbers, or keys of other figures; the figure should stand so to each of them.
        goal: aimed at, not required.
    """

    relation: str
    limits: tuple[float | str, ...]
    goal: bool = False


class Verdict(StrEnum):
    """How a figure stands to its bar."""

    MET = "met"
    SHORT = "short"
    REPORTED = "reported"
    """There is no bar, or the figure to compare with is not known."""


WIDTH = 150
"""Columns of the console, so that long keys are not cut where the output is a file."""
_STYLES = {Verdict.MET: "green", Verdict.SHORT: "bold red", Verdict.REPORTED: "dim"}

DATA_SETS = ("minilm", "fa3_2k", "fa3_32k")

BARS: dict[str, Bar | None] = {
    **{key: None for bench in (*engine.BENCHES, *bad_blocks.BENCHES, *flash.BENCHES, *sparse.BENCHES, *host.BENCHES,
                                       *models.BENCHES, *time_grid.BENCHES, *latency.BENCHES, *beside.BENCHES,
                                       *system.BENCHES, *cost.BENCHES, *serve.BENCHES, *architectures.BENCHES,
                                       *decode_ratio.BENCHES)
       for key in bench.keys},
    **dict.fromkeys(placement.KEYS),
    "engine.dense.utilization.paper": Bar(">=", (0.97,)),
    "engine.dense.utilization.gqa": Bar(">=", (0.97,)),
    "engine.dense.utilization.long": Bar(">=", (0.99,)),
    "engine.dense.scaling": Bar(">=", (0.97,)),
    "engine.single_channel.cycles": Bar("<=", (17_000,)),
    "flash.dense.bus_utilization": Bar(">=", (0.95,)),
    "flash.random_page.bus_utilization": Bar(">=", (0.90,)),
    "flash.column.read_efficiency": Bar(">=", (0.70,)),
    "flash.ecc.cost": Bar("<=", (1.01,)),
    "flash.write.utilization": Bar(">=", (0.9,)),
    "flash.write_amplification": Bar("<=", (1.0,)),
    "flash.bad_block_scan": Bar("<=", (0,)),
    "flash.wear_spread": Bar("<=", (2,)),
    causal.KEY: Bar(">=", (1.0,)),
    "sparse.speedup.random": Bar(">=", (4.0,)),
    "sparse.speedup.clustered": Bar(">=", (6.0,)),
    "sparse.bus_utilization": Bar(">=", (0.85,)),
    "sparse.centroid.speedup": Bar(">=", (6.5,)),
    **dict.fromkeys(real.KEYS),
    "sparse.centroid.real_error": Bar("<=", (0.2,)),
    **dict.fromkeys((*sketch_error.KEYS, *needle.KEYS)),
    "sparse.sketch.speedup.random": Bar(">=", (5.7,)),
    "sparse.sketch.speedup.clustered": Bar(">=", (7.0,)),
    "sparse.gqa.speedup": Bar(">=", (5.0,)),
    "sparse.sketch.error_ratio": Bar("<=", (0.55,)),
    "sparse.sketch.footprint": Bar("<=", (1.08,)),
    "sparse.sketch.needle": Bar(">=", (0.9,)),
    **dict.fromkeys(evaluate.KEYS),
    "sparse.fetched.error_ratio.lm": Bar("<=", (0.85,)),
    "sparse.fetched.error_ratio.minilm": Bar("<=", (0.85,)),
    "sparse.sparq_equal": Bar("<=", (1e-12,)),
    "host.commands_per_second_ratio": Bar("<=", (0.02,)),
    **dict.fromkeys(cost.NOTES_KEYS, Bar("<=", (1.2,))),
    "host.spec.cycles_ratio": Bar("<=", (0.15,)),
    "host.generate.match": Bar(">=", (1.0,)),
    "host.multi.scaling": Bar(">=", (3.8,)),
    "serve.fork.bytes_ratio": Bar("<=", (0.12,)),
    "serve.restore.match": Bar(">=", (1.0,)),
    "serve.models": Bar(">=", (48,)),
    "serve.models.wrong": Bar("<=", (0,)),
    "serve.models.not_examined": Bar("<=", (5,)),
    "serve.real_model": Bar(">=", (1.0,)),
    **{f"accuracy.rel_rms.{name}": Bar("<=", (5e-7, f"accuracy.float32.{name}")) for name in DATA_SETS},
    **{f"accuracy.{kind}.{name}": None for kind in ("float32", "fp16") for name in DATA_SETS},
    "accuracy.large_scores": Bar("<=", (5e-7, "accuracy.large_scores.float32")),
    "accuracy.large_scores.float32": None,
    "accuracy.drift": Bar("<=", (2.0**-24,)),  # the result's rounding to fp32 and nothing else, at any length
    "accuracy.drift_sum_exact": Bar(">=", (1,)),
    "golden.ratio_to_numpy": Bar("<=", (20,), goal=True),
    "golden.ratio_to_numpy_converted": None,
    **{f"golden.decode_ratio.{name}": Bar("<=", (1.5,)) for name in decode_ratio.MODELS},
    "golden.batch_ratio": Bar("<=", (5,)),
    "golden.seconds": None,
    "house.model.cpp_mb": Bar("<=", (20,)),
    "house.model.text_mb": Bar("<=", (3,)),
    "sim.cycles_per_second.ratio": Bar(">=", (2.5,)),
    "sim.speed_ratio": Bar(">=", (10,)),
    "sim.cycles_per_second.paper": Bar(">=", (20_000,), goal=True),
    "time.error.max": Bar("<=", (0.08,)),
    "time.error.mean": Bar("<=", (0.03,)),
    **{key: Bar("<=", (1e-5,)) for bench in workloads.BENCHES for key in bench.keys},
    **{f"format.{name}.speedup": Bar(">=", (least,)) for name, least in kv_formats.SPEEDUPS.items()},
    **{f"format.{name}.rel_rms": Bar("<=", (5e-7,)) for name in kv_formats.SPEEDUPS},
    **{f"format.{name}.reference": Bar(">=", (1.0,)) for name in kv_formats.SPEEDUPS},
    **dict.fromkeys(house.KEYS),
    "house.sim.cpu_ratio": Bar("<=", (0.33,)),
    "house.test.cpu_ratio": Bar("<=", (0.45,)),
    "house.largest_body": Bar("<=", (120,), goal=True),
    "system.paper.median": Bar("<=", (0.05,)),
    "system.paper.max": Bar("<=", (0.15,)),
    "synth.engine.lut": Bar("<=", (25_000,), goal=True),
    "synth.engine.lut_packed": Bar("<=", (30_000,), goal=True),
    "synth.engine.lutram": None,
    "synth.engine.ff": None,
    "synth.engine.dsp": Bar("<=", (64,), goal=True),
    "synth.engine.bram36": Bar("<=", (96,), goal=True),
    "synth.board.lut_packed": Bar("<=", (18_000,), goal=True),
    "synth.channel.lut": None,
    "synth.channel.lut_packed": Bar("<=", (4_500,), goal=True),
    **{f"synth.channel.{name}": None for name in ("lutram", "ff", "dsp", "bram36")},
    "synth.lut_per_byte_cycle": None,
    "synth.fmax.xcup_mhz": Bar(">=", (285,), goal=True),
    "synth.fmax.xc7_mhz": None,
    **{f"synth.{block}.fmax.{family}_mhz": None for block in ("engine", "channel") for family in ("xcup", "xc7")},
    "synth.fmax.ecp5_mhz": Bar(">=", (100,), goal=True),
    "synth.engine.fmax.ecp5_mhz": Bar(">=", (100,), goal=True),
    "synth.channel.fmax.ecp5_mhz": Bar(">=", (100,), goal=True),
    **{f"synth.{block}.fmax.ecp5_estimate_ratio": None for block in ("engine", "channel")},
}
"""Every figure's key, and its bar or goal, or None if it is only reported."""


def verdict(key: str, value: Value, known: Mapping[str, Value]) -> Verdict:
    """How a figure stands to its bar.

    Args:
        key: the figure's.
        value: the figure.
        known: figures that the bar may refer to.
    """
    bar = BARS.get(key)
    if bar is None:
        return Verdict.REPORTED
    numbers = [known.get(limit) if isinstance(limit, str) else limit for limit in bar.limits]
    # Written so that a NaN meets nothing.
    good = [value >= limit if bar.relation == ">=" else value <= limit for limit in numbers if limit is not None]
    if not all(good):
        return Verdict.SHORT
    return Verdict.MET if len(good) == len(numbers) else Verdict.REPORTED


def _of_real_model(lab: Lab, measure: Callable[[Callable[[str], None]], dict[str, float]]) -> dict[str, float]:
    """Figures of a real model.

    Raises:
        UnavailableError: the packages or the weights are missing.
    """
    try:
        return measure(lambda line: lab.progress(line, 0, None))
    except ImportError as error:
        raise UnavailableError(f"{error}: pip install 'kvattic[quality]'") from error
    except WeightsError as error:
        raise UnavailableError(str(error)) from error


def benches() -> tuple[Bench, ...]:
    """Everything that can be measured here: placement, engine, flash path, sparse modes, host, accuracy, simulators."""

    def alone(prefix: str, function: Callable[[], dict[str, float]]) -> Bench:
        others = {key for bench in decode_ratio.BENCHES for key in bench.keys}    # of the golden device, not the model
        keys = tuple(key for key in BARS if (key == prefix or key.startswith(f"{prefix}.")) and key not in others)
        return Bench(keys=keys, measure=lambda lab: function())

    placing = Bench(keys=placement.KEYS, measure=lambda lab: placement.write_amplification())
    quality = Bench(keys=evaluate.KEYS, measure=lambda lab: evaluate.measure(
        plot=Path("build") / "lm_quality.png", progress=lambda line: lab.progress(line, 0, None)))
    reality = Bench(keys=real.KEYS, measure=lambda lab: _of_real_model(lab, real.measure))
    sketches = Bench(keys=sketch_error.KEYS, measure=lambda lab: _of_real_model(lab, sketch_error.measure))
    needles = Bench(keys=needle.KEYS, measure=lambda lab: _of_real_model(lab, needle.measure))
    evaluation = Bench(keys=paper.KEYS, measure=lambda lab: paper.measure())
    return (placing, *engine.BENCHES, *bad_blocks.BENCHES, *flash.BENCHES, *causal.BENCHES, *sparse.BENCHES,
            quality, reality, sketches, needles, evaluation, *system.BENCHES, *cost.BENCHES, *latency.BENCHES,
            *beside.BENCHES, *time_grid.BENCHES, *host.BENCHES, *serve.BENCHES, *architectures.BENCHES,
            *decode_ratio.BENCHES, *workloads.BENCHES, *kv_formats.BENCHES, *house.BENCHES, *models.BENCHES,
            *(alone(prefix, function) for prefix, function in accuracy.BENCHES.items()))


def select(prefix: str, available: Iterable[Bench]) -> list[Bench]:
    """Those that can give a figure whose key has the prefix; without one, not those that are measured by name alone."""
    return [bench for bench in available
            if any(key.startswith(prefix) for key in bench.keys) and (prefix or not bench.by_name)]


def number_text(value: Value) -> str:
    """A figure as it is shown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def bar_text(bar: Bar | None, known: Mapping[str, Value]) -> str:
    """A bar as it is shown; empty for None.

    Args:
        bar: of a figure.
        known: figures that the bar may refer to.
    """
    if bar is None:
        return ""
    limits = []
    for limit in bar.limits:
        if isinstance(limit, str):
            limits.append(f"{limit} ({number_text(known[limit])})" if limit in known else limit)
        else:
            limits.append(number_text(limit))
    return ("goal " if bar.goal else "") + " and ".join(f"{bar.relation} {limit}" for limit in limits)


def show(console: Console, rows: Sequence[str], known: Mapping[str, Value]) -> None:
    """Print figures beside their bars.

    Args:
        console: where.
        rows: keys to print.
        known: all figures.
    """
    table = Table(title="Figures")
    for column in ("key", "value", "bar", ""):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=True)
    for key in rows:
        word = verdict(key, known[key], known)
        bar = escape(bar_text(BARS.get(key), known))
        table.add_row(key, number_text(known[key]), bar, f"[{_STYLES[word]}]{word}[/]")
    console.print(table)


def _measure(bench: Bench, lab: Lab) -> dict[str, float]:
    found = bench.measure(lab)
    if set(found) != set(bench.keys):
        raise WrongResultError(f"the bench declares {sorted(bench.keys)} and gave {sorted(found)}")
    return found


def run(selected: Sequence[Bench], simulator: Simulator, console: Console) -> Iterator[tuple[Bench, bool]]:
    """Measure one after the other, and keep each one's figures at once.

    Args:
        selected: what to measure.
        simulator: for the figures in cycles.
        console: for progress and for what goes wrong.

    Yields:
        Each bench that is done, and whether its figures are known; if not, the console says why.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")

        def follow(what: str, done: int, total: int | None) -> None:
            progress.update(task, description=f"  {what}", completed=done, total=total)
            note(f"{what}{f', {done:,} of {total:,}' if total else ''}")

        note: Callable[[str], None]
        telling = Telling(quiet=console.is_terminal)
        lab = Lab(simulator=simulator, progress=follow, say=lambda line: console.print(f"  {line}", markup=False))
        for number, bench in enumerate(selected, 1):
            name = f"{bench.keys[0]}{' ...' if len(bench.keys) > 1 else ''}"
            progress.reset(task, description=f"  {name}", total=None)
            begin = time.perf_counter()
            try:
                with telling.phase(f"[{number}/{len(selected)}] {name}") as note:
                    figures.record(_measure(bench, lab))
            except UnavailableError as error:
                console.print(f"[{number}/{len(selected)}] {name}: not measured: {error}", markup=False)
                continue
            except WrongResultError as error:
                console.print(f"[{number}/{len(selected)}] {name}: WRONG: {error}", markup=False)
                yield bench, False
            except (SimulatorError, SimulationFailed, JobError, KvatticError) as error:
                notes = "\n".join(getattr(error, "__notes__", []))
                console.print(f"[{number}/{len(selected)}] {name}: FAILED: {error}\n{notes}", markup=False)
                yield bench, False
            else:
                seconds = time.perf_counter() - begin
                console.print(f"[{number}/{len(selected)}] {name}: measured in {seconds:.1f} s", markup=False)
                yield bench, True


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What came of `report`.

    Attributes:
        figures: those that were measured now, and those of the last synthesis, by key.
        good: no result was wrong, and no bench failed.
    """

    figures: dict[str, Value]
    good: bool


def report(prefix: str, simulator: Simulator, console: Console) -> Report:
    """Measure figures, print them beside their bars, and keep them.

    Args:
        prefix: of the figures' keys; empty for all but those that take very long (`Bench.by_name`).
        simulator: for the figures in cycles, which are the same in both.
        console: where to print.

    Raises:
        RequestError: no figure's key begins with the prefix.
    """
    selected = select(prefix, benches())
    synthesis = [key for key in BARS if key.startswith("synth.") and key.startswith(prefix)]
    if not selected and not synthesis:
        raise RequestError(f"no figure's key begins with {prefix!r}; the keys are:\n  " + "\n  ".join(BARS))
    good = True
    rows: list[str] = []
    for bench, known in run(selected, simulator, console):
        good &= known
        rows += bench.keys if known else ()
    recorded = figures.load()
    rows += (there := [key for key in synthesis if key in recorded])
    if rows:
        show(console, rows, recorded)
    if there:
        console.print("synth.* are of the last `make synth`.", markup=False)
    if len(there) < len(synthesis):
        console.print("Run `make synth` for " + ", ".join(k for k in synthesis if k not in recorded) + ".",
                      markup=False)
    if selected:
        console.print(f"Kept in {figures.PATH}.", markup=False)
    return Report(figures={key: recorded[key] for key in rows}, good=good)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX",
                        help="such as engine.dense; by default all but house.sim and house.test, which take an hour")
    parser.add_argument("--simulator", type=Simulator, default=Simulator.VERILATOR, choices=list(Simulator),
                        help="for the figures in cycles, which are the same in both; sim.* do not heed it")
    options = parser.parse_args(arguments)
    try:
        done = report(options.prefix, options.simulator, make_console(WIDTH))
    except RequestError as error:
        parser.error(str(error))
    return 0 if done.good else 1


if __name__ == "__main__":
    sys.exit(terminal.run_command(main, "kvattic_sim.reports.bench"))
