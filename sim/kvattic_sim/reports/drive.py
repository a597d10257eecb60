"""The main job, `make sim`: attention of a real model on the simulated drive, checked bit for bit.

K and V go through the host library into NAND: page programs, ECC, zones.  Queries are answered from there.  First every
head of a MiniLM layer on real text; then a sequence's life with OPT-13B's geometry: prefill, decode steps whose new
tokens wait in device DRAM, freeing, and another sequence in the same flash.  Each result is compared with the golden
device (equal bits) and with float64 attention of all tokens.
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvattic
from kvattic import PRESETS, AttendResult, Config
from kvattic.spec.commands import Mode
from kvattic.spec.elements import from_bits
from kvattic.spec.nand import part
from kvattic.support.terminal import Telling, run_command
from kvattic_sim import oracle
from kvattic_sim.data import load_minilm
from kvattic_sim.nand import timeline
from kvattic_sim.reports.console import make_console, phase
from kvattic_sim.rtl.jobs import Run, run_on_model
from kvattic_sim.rtl.testbench import build_testbench
from kvattic_sim.rtl.transport import NandSettings
from kvattic_sim.simulators.build import Model, Simulator
from kvattic_sim.workloads import DENSE, Attention, How, Step, Usage, attend, decode, live, lives, minilm

MINILM = Config(channels=4, rows=8, head_dim=32, part=part("lowlatency"), dies=4)
"""MiniLM's geometry: eight queries share a pass; 4 KiB pages, so that 512 tokens use all channels, and a short tR,
for each pass reads the same few pages again."""

NAND = NandSettings(bit_error_rate=1e-5)
"""Dies as they are: some bits of every few pages are wrong."""

TRACE_PATH = Path("build") / "trace.json"
TRACE_HEADS = 4
APPENDED = 3
"""Tokens that are appended, one at a time."""


def oracle_errors(attention: Attention, result: AttendResult, config: Config) -> NDArray[np.float64]:
    """(kv_heads, 2): relative RMS and largest absolute error of each KV head against float64 attention."""
    kv_heads = len(attention.key)
    group = len(attention.query) // kv_heads
    errors = np.empty((kv_heads, 2))
    for head in range(kv_heads):
        rows = slice(head * group, (head + 1) * group)
        q, k, v = (from_bits(bits, config.element).astype(np.float64)
                   for bits in (attention.query[rows], attention.key[head], attention.value[head]))
        exact = oracle.attention(q.reshape(-1, config.head_dim), k, v, config.head_dim**-0.5)
        ours = result.output[rows].reshape(exact.shape)
        errors[head] = oracle.relative_rms(ours, exact), np.abs(ours - exact).max()
    return errors


def equal_bits(
    attention: Attention, result: AttendResult, config: Config, how: How = DENSE
) -> NDArray[np.bool_]:
    """(kv_heads,): the golden device gives the same outputs, maxima and denominators, to the last bit."""
    kv_heads, tokens, _ = attention.key.shape
    with (kvattic.open("model", config) as device,
          device.create_sequence(kv_heads, capacity_tokens=tokens, **how.sequence(config)) as sequence):
        sequence.prefill(attention.key, attention.value)
        golden = sequence.attend(attention.query, **how.attend(config, tokens))
    equal = (golden.bits == result.bits).all(axis=2) & (golden.maximum == result.maximum)
    equal &= golden.denominator == result.denominator
    heads: NDArray[np.bool_] = equal.reshape(kv_heads, -1).all(axis=1)
    return heads


COLUMNS = ("cycles", "bus use", "dies busy", "starved", "barrier", "idle", "corrected", "retries")
"""What every table says of the flash and the lanes."""


def cells(config: Config, usage: Usage) -> list[str]:
    """Values for `COLUMNS`."""
    slots = config.channels * usage.cycles or 1
    return [f"{usage.cycles:,}", f"{usage.bus_use(config):.1%}", f"{usage.die_use(config):.1%}",
            *(f"{usage.stalls[name] / slots:.1%}" for name in ("starved", "barrier", "idle")),
            f"{usage.flash['corrected']:,}", f"{usage.flash['retries']:,}"]


def show(console: Console, title: str, config: Config, attention: Attention, written: Usage, usage: list[Usage],
         errors: NDArray[np.float64], equal: NDArray[np.bool_]) -> None:
    """Print one line for writing, one for each batch (a KV head, or all of them), and their sum."""
    table = Table(title=title, title_justify="left")
    for column in ("heads", "queries", "tokens", *COLUMNS, "rel. RMS", "max error", "bit-exact"):
        table.add_column(column, justify="right")
    heads = len(attention.key) // len(usage)
    queries = attention.query.shape[0] * attention.query.shape[1] // len(attention.key)
    tokens = f"{attention.key.shape[1]:,}"

    def add(name: str, part: list[Usage], rows: slice) -> None:
        table.add_row(
            name, f"{queries * (rows.stop - rows.start):,}", tokens, *cells(config, Usage.sum(part)),
            f"{np.sqrt(np.square(errors[rows, 0]).mean()):.2e}", f"{errors[rows, 1].max():.1e}",
            "yes" if equal[rows].all() else "[red]NO[/]")

    table.add_row("write", "", tokens, *cells(config, written), "", "", "")
    table.add_section()
    for index, batch in enumerate(usage):
        rows = slice(index * heads, (index + 1) * heads)
        add(str(index) if heads == 1 else f"{rows.start}-{rows.stop - 1}", [batch], rows)
    if len(usage) > 1:
        table.add_section()
        add("all", usage, slice(0, len(attention.key)))
    console.print(table)


def simulate(console: Console, title: str, config: Config, attention: Attention, model: Model, heads_per_batch: int,
             processes: int, how: How = DENSE) -> bool:
    """Run one attention on the RTL, check and show it; whether all bits were equal.

    Args:
        console: where to.
        title: of the table.
        config: the model's.
        attention: the inputs.
        model: the compiled simulation.
        heads_per_batch: KV heads that are attended at once.
        processes: simulators that share the heads.
        how: which tokens are attended.
    """
    heads = len(attention.key)
    group = len(attention.query) // heads
    shares = [range(heads)[i * heads // processes : (i + 1) * heads // processes] for i in range(processes)]
    begin = time.perf_counter()
    done: dict[int, int] = {}
    with (
        Telling(quiet=console.is_terminal).phase(title) as note,
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
                note(f"{sum(done.values()):,} jobs done")

            part = Attention(query=attention.query[share.start * group : share.stop * group],
                             key=attention.key[share.start : share.stop],
                             value=attention.value[share.start : share.stop])
            arguments = {"attention": part, "heads_per_batch": heads_per_batch, "label": title, "how": how}
            return run_on_model(model, config, attend, arguments, flash=NAND, progress=follow)

        runs = list(pool.map(run, [share for share in shares if share]))
    seconds = time.perf_counter() - begin
    results: list[AttendResult] = [run.result[0] for run in runs]
    written = Usage.sum(run.result[1] for run in runs)
    usage: list[Usage] = [batch for run in runs for batch in run.result[2]]
    result = AttendResult(
        output=np.concatenate([r.output for r in results]), maximum=np.concatenate([r.maximum for r in results]),
        denominator=np.concatenate([r.denominator for r in results]),
        completions=[completion for r in results for completion in r.completions])
    with phase(console, "Checking against the golden model and float64"):
        errors = oracle_errors(attention, result, config)
        equal = equal_bits(attention, result, config, how)
    show(console, title, config, attention, written, usage, errors, equal)
    show_total(console, config, Usage.sum([written, *usage]), seconds, f"{len(runs)} x {model.simulator}", runs)
    return bool(equal.all())


def show_total(console: Console, config: Config, total: Usage, seconds: float, simulators: str,
               runs: list[Run]) -> None:
    """Print what a table's runs took, and where their waves are."""
    speed, milliseconds = total.cycles / total.seconds, total.cycles / config.clock_mhz / 1e3
    console.print(f"  {total.cycles:,} cycles in {seconds:.1f} s ({simulators}, {speed:,.0f}/s each); "
                  f"{milliseconds:.2f} ms at {config.clock_mhz:g} MHz\n", highlight=False)
    for run in runs:
        if run.waves:
            console.print(f"  waves: {run.waves}\n")


def simulate_life(console: Console, title: str, config: Config, model: Model, kv_heads: int, tokens: int,
                  appended: int, how: How = DENSE) -> bool:
    """Run a sequence's life on the RTL, check and show it; whether all bits were equal.

    Args:
        console: where to.
        title: of the table.
        config: the model's.
        model: the compiled simulation.
        kv_heads: KV heads of the sequence.
        tokens: of the prefill.
        appended: tokens that are appended, one at a time.
        how: which tokens are attended.
    """
    life = lives(config, kv_heads=kv_heads, tokens=tokens, group=config.rows, appended=appended, how=how)
    begin = time.perf_counter()
    with phase(console, title) as follow:
        run = run_on_model(model, config, live, {"life": life}, flash=NAND,
                           progress=lambda line: follow(line.partition("|")[2]))
    seconds = time.perf_counter() - begin
    with phase(console, "The same on the golden model"), kvattic.open("model", config) as device:
        expected = live(device, life)

    # What each attend attends: the first sequence with the tokens appended so far, at last the second one.
    grown = [life.first]
    for token in life.tokens:
        grown.append(Attention(query=token.query, key=np.concatenate([grown[-1].key, token.key], axis=1),
                               value=np.concatenate([grown[-1].value, token.value], axis=1)))
    attended = iter([*grown, life.second])
    table = Table(title=title, title_justify="left")
    for column in ("step", *COLUMNS, "pages read", "written", "erased", "rel. RMS", "bit-exact"):
        table.add_column(column, justify="left" if column == "step" else "right")
    good = True
    steps: list[Step] = run.result
    for step, golden in zip(steps, expected, strict=True):
        flash, checks = step.usage.flash, ["", ""]
        if step.result is not None and golden.result is not None:
            equal = all(np.array_equal(getattr(step.result, name), getattr(golden.result, name))
                        for name in ("bits", "maximum", "denominator"))
            good &= equal
            checks = [f"{np.sqrt(np.square(oracle_errors(next(attended), step.result, config)[:, 0]).mean()):.2e}",
                      "yes" if equal else "[red]NO[/]"]
        table.add_row(step.name, *cells(config, step.usage),
                      *(f"{flash[name]:,}" for name in ("page_reads", "page_programs", "block_erases")), *checks)
    console.print(table)
    total = Usage.sum(step.usage for step in steps)
    show_total(console, config, total, seconds, f"1 x {model.simulator}", [run])
    return good


def trace(console: Console, config: Config, simulator: Simulator, how: How = DENSE) -> None:
    """A short decode step with a timeline of every channel and die: build/trace.json and build/trace.png."""
    with phase(console, "Compiling the drive (kept for the next run)"):
        model = build_testbench(config, simulator)
    attention = decode(config, kv_heads=TRACE_HEADS, tokens=2048, group=config.rows)
    with phase(console, "A decode step, traced"):
        run = run_on_model(model, config, attend, {"attention": attention, "heads_per_batch": TRACE_HEADS,
                                                   "label": "trace", "how": how}, flash=replace(NAND, trace=True))
    events = timeline.read(run.run_dir, config)
    timeline.write_perfetto(events, config, TRACE_PATH)
    # The picture shows the attention: from the first page read of the array on.
    first = next(event.start for event in events if event.kind is timeline.Kind.READ)
    last = max(event.end for event in events if event.kind is timeline.Kind.DATA_OUT)
    picture = TRACE_PATH.with_suffix(".png")
    title = (f"{TRACE_HEADS} heads x 2,048 tokens, {how.mode}, {config.channels} channels x {config.dies} dies, "
             f"{config.part.name}")
    timeline.draw(events, config, picture, first=first, last=last, title=title)
    console.print(f"{len(events):,} events: {TRACE_PATH} (open it in https://ui.perfetto.dev), {picture}")


def _interrupted(*_: object) -> None:
    """Ctrl-C: end at once, whatever the threads wait for; simulators and compilers die with their parent."""
    try:
        Console().show_cursor(True)
    finally:
        os._exit(130)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulator", type=Simulator, default=Simulator.VERILATOR, choices=list(Simulator))
    parser.add_argument("--layers", type=int, nargs="*", default=[0], choices=load_minilm().layers,
                        help="MiniLM layers to run (0 and 5 are in the repository)")
    parser.add_argument("--heads", type=int, help="MiniLM heads to run; 0: none")
    parser.add_argument("--queries", type=int, help="query positions of each MiniLM head")
    parser.add_argument("--decode-heads", type=int, help="OPT-13B heads of the decode step (40 in the model); 0: none")
    parser.add_argument("--preset", default="paper", choices=[n for n, c in PRESETS.items() if c.head_dim == 128],
                        help="configuration of the sequence's life, or of the trace")
    parser.add_argument("--mode", default="dense", choices=[mode.name.lower() for mode in Mode],
                        help="which tokens are attended (docs/sparse.md)")
    parser.add_argument("--features", type=int, help="of the first pass, r (an eighth of head_dim)")
    parser.add_argument("--top-units", type=int, help="tokens, or units, attended, k (a sixteenth of the tokens)")
    parser.add_argument("--waves", action="store_true", help="record waves of a short run under build/")
    parser.add_argument("--trace", action="store_true", help="only a short decode step, with its timeline under build/")
    options = parser.parse_args(arguments)
    console = make_console()
    signal.signal(signal.SIGINT, _interrupted)
    opt = PRESETS[options.preset]
    how = How(mode=options.mode, features=options.features, top_units=options.top_units)
    suffix = "" if how == DENSE else f", {options.mode}"
    if options.trace:
        trace(console, opt, options.simulator, how)
        return
    # Icarus runs about a hundred cycles a second, and waves grow fast: a slice is all that makes sense by default.
    slice_only = options.waves or options.simulator is Simulator.ICARUS
    # In sparse modes each query is a job of its own, with its own selection.
    queries = 512 if how == DENSE else 64
    for name, whole, little in (("heads", 12, 1), ("queries", queries, 16), ("decode_heads", 8, 0)):
        if getattr(options, name) is None:
            setattr(options, name, little if slice_only else whole)
    if slice_only:
        console.print(f"A slice of the main job: {options.heads} heads, {options.queries} queries, "
                      f"{options.decode_heads} decode heads (--heads, --queries, --decode-heads change it).")

    good = True
    # The second model is compiled while the first one runs.
    with ThreadPoolExecutor(1) as builder:
        if options.heads:
            with phase(console, "Compiling the drive for MiniLM (kept for the next run)"):
                model = build_testbench(MINILM, options.simulator, waves=options.waves)
        later = builder.submit(build_testbench, opt, options.simulator) if options.decode_heads else None
        for layer in options.layers if options.heads else ():
            attention = minilm(layer)
            attention = Attention(query=attention.query[: options.heads, : options.queries],
                                  key=attention.key[: options.heads], value=attention.value[: options.heads])
            title = (f"MiniLM layer {layer} on real text: {options.heads} heads, {options.queries} positions, "
                     f"512 tokens{suffix}")
            processes = min(os.cpu_count() or 1, options.heads)
            good &= simulate(console, title, MINILM, attention, model, 1, processes, how)
        if later is not None:
            with phase(console, "Compiling the drive for OPT-13B's geometry (kept for the next run)"):
                model = later.result()
            title = (f"A sequence with OPT-13B's geometry: {options.decode_heads} heads, head_dim 128, 2,048 tokens, "
                     f"preset {options.preset}{suffix}")
            good &= simulate_life(console, title, opt, model, options.decode_heads, 2048, APPENDED, how)
    console.print("[bold green]All results are bit-exact.[/]" if good else "[bold red]Some results differ.[/]")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.drive"))
