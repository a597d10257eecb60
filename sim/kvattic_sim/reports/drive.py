"""The main job, `make sim`: attention of a real model on the simulated drive, checked bit for bit.

K and V go through the host library into NAND: page programs, ECC, zones. Queries are answered from there.

By default it is a life of a sequence on a small drive: all heads of a MiniLM layer on real text are written and
attended, dense and sparse; decode steps follow, whose new tokens wait in device DRAM; then the flash is freed for
another layer. With ``--full`` it is every position of a layer on a larger drive, and then a life with OPT-13B's
geometry on the paper's.

Each result is compared with the golden device (equal bits) and with float64 attention.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvattic
from kvattic import PRESETS, TINY, AttendResult, Config
from kvattic.spec.commands import Mode
from kvattic.spec.nand import part
from kvattic.support.terminal import Telling, run_command
from kvattic_sim.compare import BOUND, equal_bits, oracle_errors
from kvattic_sim.data import load_minilm
from kvattic_sim.reports.console import building, make_console, phase
from kvattic_sim.rtl.jobs import Run, run_on_model
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.rtl.transport import NandSettings
from kvattic_sim.simulators.build import Model, Simulator
from kvattic_sim.workloads import (
    DENSE,
    Attention,
    Life,
    ModeSettings,
    Step,
    Usage,
    attend,
    cut,
    live,
    minilm,
    minilm_life,
    random_life,
)

__all__ = ["MINILM", "SMALL", "full_job", "main", "run_life", "small_job"]

SMALL = replace(TINY, part=replace(TINY.part, blocks=32, t_r=1_000, t_prog=3_000))
"""The default drive: two channels of two dies, with room for a MiniLM layer twice. It is compiled in a minute, and its
dies are faster than any real ones, so that few cycles are simulated in which nothing happens."""
MINILM = Config(channels=4, rows=8, head_dim=32, part=part("lowlatency"), dies=4)
"""MiniLM's geometry in the full job: eight queries share a pass; 4 KiB pages, so that 512 tokens use all channels, and
a short tR, for each pass reads the same few pages again."""
NAND = NandSettings(bit_error_rate=1e-5)
"""Dies as they are: some bits of every few pages are wrong."""
APPENDED = 2
"""Tokens that are appended, one at a time."""
SECOND_TOKENS = 128
"""Tokens of the next sequence in the small job."""

COLUMNS = ("cycles", "bus use", "dies busy", "starved", "barrier", "idle", "corrected", "retries")
"""What every table says of the flash and the lanes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much of the job is done: the whole, or what waves or a slow simulator allow.

    Attributes:
        heads: of the MiniLM layer.
        positions: of its text that ask dense.
        sparse_positions: likewise sparse, in the small job.
        decode_heads: of the life with OPT-13B's geometry, in the full job.
    """

    heads: int
    positions: int
    sparse_positions: int
    decode_heads: int


def cells(config: Config, usage: Usage) -> list[str]:
    """Values for `COLUMNS`."""
    slots = config.lanes * usage.cycles or 1
    return [f"{usage.cycles:,}", f"{usage.bus_use(config):.1%}", f"{usage.die_use(config):.1%}",
            *(f"{usage.stalls[name] / slots:.1%}" for name in ("starved", "barrier", "idle")),
            f"{usage.flash['corrected']:,}", f"{usage.flash['retries']:,}"]


def verdict(good: bool) -> str:
    """A cell that says whether bits are equal."""
    return "yes" if good else "[red]NO[/]"


def show_total(console: Console, config: Config, total: Usage, seconds: float, simulators: str,
               runs: Sequence[Run]) -> None:
    """Print what a table's runs took, and where their waves are."""
    speed, milliseconds = total.cycles / total.seconds, total.cycles / config.clock_mhz / 1e3
    console.print(f"  {total.cycles:,} cycles in {seconds:.1f} s ({simulators}, {speed:,.0f}/s each); "
                  f"{milliseconds:.2f} ms at {config.clock_mhz:g} MHz\n", highlight=False)
    for run in runs:
        if run.waves:
            console.print(f"  waves: {run.waves}\n")


def build(console: Console, config: Config, simulator: Simulator, *, waves: bool = False) -> Model:
    """Compile a drive, or take the one that was compiled before, and show the stages."""
    with building(console):
        return build_testbench(config, simulator, waves=waves)


# A life.


def run_life(console: Console, title: str, config: Config, model: Model, life: Life) -> bool:
    """Run a sequence's life on the RTL, compare and show it.

    Args:
        console: where to.
        title: of the table.
        config: the model's.
        model: the compiled simulation.
        life: the inputs.

    Returns:
        Whether all bits are equal and all errors within `BOUND`.
    """
    begin = time.perf_counter()
    with phase(console, "running") as note:
        step = ""

        def follow(line: str) -> None:
            nonlocal step
            kind, _, rest = line.partition("|")
            if kind == "step":
                number, steps, name = rest.split("|")
                step = f"step {number} of {steps}, {name}"
                note(step)
            else:
                note(f"{step}, {int(rest):,} cycles")

        run = run_on_model(model, config, live, {"life": life}, flash=NAND, progress=follow)
    seconds = time.perf_counter() - begin
    with phase(console, "comparing with the golden device and float64") as note:
        note("the same on the golden device")
        with kvattic.open("model", config) as device:
            expected = live(device, life)
        note("float64")
        good = show_life(console, title, config, life, run.result, expected)
    total = Usage.sum(step.usage for step in run.result)
    show_total(console, config, total, seconds, f"1 x {model.simulator}", [run])
    return good


def show_life(console: Console, title: str, config: Config, life: Life, steps: list[Step],
              expected: list[Step]) -> bool:
    """Print one line for each step; whether all bits are equal and all errors within `BOUND`."""
    attended = iter(life.attended())
    table = Table(title=title, title_justify="left")
    for column in ("step", *COLUMNS, "pages read", "written", "erased", "rel. RMS", "bit-exact"):
        table.add_column(column, justify="left" if column == "step" else "right")
    good = True
    for step, golden in zip(steps, expected, strict=True):
        flash, checks = step.usage.flash, ["", ""]
        if step.result is not None and golden.result is not None:
            equal = all(np.array_equal(getattr(step.result, name), getattr(golden.result, name))
                        for name in ("bits", "maximum", "denominator"))
            attention, options = next(attended)
            error = root_mean_square(oracle_errors(attention, step.result, config, options)[:, 0])
            good &= equal and not error > BOUND
            checks = [f"{error:.2e}", verdict(equal)]
        table.add_row(step.name, *cells(config, step.usage),
                      *(f"{flash[name]:,}" for name in ("page_reads", "page_programs", "block_erases")), *checks)
    console.print(table)
    return good


def root_mean_square(errors: NDArray[np.float64]) -> float:
    """Of the heads' relative errors; NaN, of a head without a comparison, counts for nothing."""
    known = errors[np.isfinite(errors)]
    return float(np.sqrt(np.square(known).mean())) if known.size else float("nan")


def small_job(console: Console, simulator: Simulator, size: Size, sparse: ModeSettings | None, *,
              waves: bool = False) -> bool:
    """A life of real numbers on the small drive; whether all is right.

    Args:
        console: where to.
        simulator: what runs it.
        size: how much of it.
        sparse: which tokens the sparse queries attend; None: there are none.
        waves: record waves.
    """
    model = build(console, SMALL, simulator, waves=waves)
    life = minilm_life(heads=size.heads, positions=size.positions, sparse_positions=size.sparse_positions,
                       appended=APPENDED, second_tokens=SECOND_TOKENS, sparse=sparse)
    asked = f"{size.positions} positions" + (f", {size.sparse_positions} of them {sparse.mode}" if sparse else "")
    title = f"A MiniLM layer on real text: {size.heads} heads, 512 tokens, {asked}"
    return run_life(console, title, SMALL, model, life)


# The full job.


def full_job(console: Console, simulator: Simulator, size: Size, options: ModeSettings, *, preset: str,
             layers: Sequence[int], waves: bool = False) -> bool:
    """Every position of MiniLM layers, and a life with OPT-13B's geometry; whether all is right.

    Args:
        console: where to.
        simulator: what runs it.
        size: how much of it.
        options: which tokens are attended.
        preset: configuration of the life.
        layers: of MiniLM.
        waves: record waves.
    """
    good, config = True, PRESETS[preset]
    suffix = "" if options == DENSE else f", {options.mode}"
    # The second model is compiled while the first one runs.
    with ThreadPoolExecutor(1) as builder:
        model = build(console, MINILM, simulator, waves=waves) if size.heads else None
        later = builder.submit(build_testbench, config, simulator) if size.decode_heads else None
        for layer in layers:
            if model is None:
                break
            title = (f"MiniLM layer {layer} on real text: {size.heads} heads, {size.positions} positions, "
                     f"512 tokens{suffix}")
            attention = cut(minilm(layer), heads=size.heads, positions=size.positions)
            good &= run_heads(console, title, MINILM, attention, model, options)
        if later is not None:
            with building(console):
                model = later.result()
            title = (f"A sequence with OPT-13B's geometry: {size.decode_heads} heads, head_dim 128, 2,048 tokens, "
                     f"preset {preset}{suffix}")
            life = random_life(config, kv_heads=size.decode_heads, tokens=2048, group=config.rows, appended=APPENDED,
                               options=options)
            good &= run_life(console, title, config, model, life)
    return good


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRuns:
    """Simulations that shared the heads of an attention, in the order of the heads.

    Attributes:
        runs: of `kvattic_sim.workloads.attend`.
        seconds: real time of all of them together.
    """

    runs: list[Run]
    seconds: float

    @property
    def result(self) -> AttendResult:
        """Of all heads."""
        results: list[AttendResult] = [run.result[0] for run in self.runs]
        return AttendResult(
            output=np.concatenate([r.output for r in results]), maximum=np.concatenate([r.maximum for r in results]),
            denominator=np.concatenate([r.denominator for r in results]),
            completions=[completion for r in results for completion in r.completions])

    @property
    def written(self) -> Usage:
        """Of writing K and V."""
        return Usage.sum(run.result[1] for run in self.runs)

    @property
    def heads(self) -> list[Usage]:
        """Of attention, by KV head."""
        return [usage for run in self.runs for usage in run.result[2]]


def run_heads(console: Console, title: str, config: Config, attention: Attention, model: Model,
              options: ModeSettings = DENSE) -> bool:
    """Run one attention on the RTL, head after head, compare and show it; whether all is right.

    Args:
        console: where to.
        title: of the table.
        config: the model's.
        attention: the inputs.
        model: the compiled simulation; each processor runs one on its share of the heads.
        options: which tokens are attended.
    """
    found = simulate_heads(console, title, config, attention, model, options)
    with phase(console, "comparing with the golden device and float64"):
        errors = oracle_errors(attention, found.result, config, options)
        equal = equal_bits(attention, found.result, config, options)
    show_heads(console, title, config, attention, found, errors, equal)
    total = Usage.sum([found.written, *found.heads])
    show_total(console, config, total, found.seconds, f"{len(found.runs)} x {model.simulator}", found.runs)
    return bool(equal.all()) and not root_mean_square(errors[:, 0]) > BOUND


def simulate_heads(console: Console, title: str, config: Config, attention: Attention, model: Model,
                   options: ModeSettings) -> HeadRuns:
    """Run the heads of an attention, as many simulators at a time as there are processors."""
    heads = len(attention.key)
    group = len(attention.query) // heads
    processes = min(os.cpu_count() or 1, heads)
    shares = [range(heads)[i * heads // processes : (i + 1) * heads // processes] for i in range(processes)]
    begin = time.perf_counter()
    done: dict[int, int] = {}
    with (
        Telling(quiet=console.is_terminal).phase("running") as note,
        Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} jobs"),
                 TimeElapsedColumn(), console=console, transient=True) as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        def run(share: range) -> Run:
            task = progress.add_task(f"heads {share.start} to {share.stop - 1}", total=None)

            def follow(line: str) -> None:
                _, jobs, total = line.split("|")
                progress.update(task, completed=int(jobs), total=int(total))
                done[share.start] = int(jobs)
                note(f"{sum(done.values()):,} of {int(total) // len(share) * heads:,} jobs")

            share_of_it = Attention(query=attention.query[share.start * group : share.stop * group],
                                    key=attention.key[share.start : share.stop],
                                    value=attention.value[share.start : share.stop])
            arguments = {"attention": share_of_it, "heads_per_batch": 1, "label": title, "options": options}
            return run_on_model(model, config, attend, arguments, flash=NAND, progress=follow)

        return HeadRuns(runs=list(pool.map(run, shares)), seconds=time.perf_counter() - begin)


def show_heads(console: Console, title: str, config: Config, attention: Attention, found: HeadRuns,
               errors: NDArray[np.float64], equal: NDArray[np.bool_]) -> None:
    """Print one line for writing, one for each KV head, and the heads' sum."""
    table = Table(title=title, title_justify="left")
    for column in ("heads", "queries", "tokens", *COLUMNS, "rel. RMS", "max error", "bit-exact"):
        table.add_column(column, justify="right")
    heads = len(attention.key)
    queries = attention.query.shape[0] * attention.query.shape[1] // heads
    tokens = f"{attention.key.shape[1]:,}"

    def add(name: str, used: list[Usage], rows: slice) -> None:
        table.add_row(
            name, f"{queries * (rows.stop - rows.start):,}", tokens, *cells(config, Usage.sum(used)),
            f"{root_mean_square(errors[rows, 0]):.2e}", f"{np.fmax.reduce(errors[rows, 1]):.1e}",
            verdict(bool(equal[rows].all())))

    table.add_row("write", "", tokens, *cells(config, found.written), "", "", "")
    table.add_section()
    for head, usage in enumerate(found.heads):
        add(str(head), [usage], slice(head, head + 1))
    if heads > 1:
        table.add_section()
        add("all", found.heads, slice(0, heads))
    console.print(table)


# The command.


def _interrupted(*_: object) -> None:
    """Ctrl-C: end at once, whatever the threads wait for; simulators and compilers die with their parent."""
    try:
        Console().show_cursor(True)
    finally:
        os._exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulator", type=Simulator, default=Simulator.VERILATOR, choices=list(Simulator))
    parser.add_argument("--mode", choices=[mode.name.lower() for mode in Mode],
                        help="which tokens are attended (docs/sparse.md); by default dense, and in the small job sparf "
                             "too")
    parser.add_argument("--features", type=int, help="of the first pass, r (an eighth of head_dim)")
    parser.add_argument("--top-units", type=int, help="tokens, or units, attended, k (a sixteenth of the tokens)")
    parser.add_argument("--heads", type=int, choices=range(13), metavar="N", help="heads of a MiniLM layer (12)")
    parser.add_argument("--positions", type=int, choices=range(1, 513), metavar="N", help="positions that ask")
    parser.add_argument("--waves", action="store_true", help="record waves of a short run under build/")
    full = parser.add_argument_group("the full job")
    full.add_argument("--full", action="store_true", help="every position, and OPT-13B's geometry on the paper's drive")
    full.add_argument("--preset", choices=[n for n, c in PRESETS.items() if c.head_dim == 128],
                      help="configuration of the life with OPT-13B's geometry (paper); implies --full")
    full.add_argument("--layers", type=int, nargs="*", default=[0], choices=load_minilm().layers,
                      help="MiniLM layers (0)")
    full.add_argument("--decode-heads", type=int, metavar="N", help="KV heads of the life (8)")
    return parser


def _size(options: argparse.Namespace, full: bool) -> Size:
    """What the options ask for."""
    # Icarus runs some hundred cycles a second, and waves grow fast: a slice will do there.
    if options.waves or options.simulator is Simulator.ICARUS:
        default = Size(heads=1, positions=16 if full else 2, sparse_positions=1, decode_heads=0)
    elif full:
        # In the sparse modes each query is a job of its own, with its own selection.
        default = Size(heads=12, positions=512 if options.mode in (None, "dense") else 64, sparse_positions=0,
                       decode_heads=8)
    else:
        default = Size(heads=12, positions=4, sparse_positions=2, decode_heads=0)
    asked = {name: value for name in ("heads", "positions", "decode_heads")
             if (value := getattr(options, name)) is not None}
    return replace(default, **asked)


def main(arguments: list[str] | None = None) -> int:
    """Command line; its exit code: 1 if a result is wrong."""
    options = _parser().parse_args(arguments)
    console = make_console()
    signal.signal(signal.SIGINT, _interrupted)
    full = options.full or options.preset is not None
    size = _size(options, full)
    if options.waves or options.simulator is Simulator.ICARUS:
        console.print(f"A slice of the main job: {size.heads} heads, {size.positions} positions "
                      "(--heads, --positions, --decode-heads change it).")
    if full:
        mode = ModeSettings(mode=options.mode or "dense", features=options.features, top_units=options.top_units)
        good = full_job(console, options.simulator, size, mode, preset=options.preset or "paper",
                        layers=options.layers, waves=options.waves)
    else:
        sparse = ModeSettings(mode=options.mode or "sparf", features=options.features, top_units=options.top_units)
        good = small_job(console, options.simulator, size, None if sparse.mode == "dense" else sparse,
                         waves=options.waves)
    console.print("[bold green]All results are bit-exact.[/]" if good else "[bold red]Some results are wrong.[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.drive"))
