"""The main job, `make sim`: attention of a real model on the simulated engine, checked bit for bit.

Q, K and V of MiniLM on real text go through the host driver to the RTL; then one decode step with OPT-13B's geometry.
Each result is compared with the golden model (equal bits) and with float64 attention.
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvattic
from kvattic import PRESETS, AttendResult, Config
from kvattic.elements import from_bits
from kvattic_sim import oracle
from kvattic_sim.build import Model, Simulator
from kvattic_sim.data import load_minilm
from kvattic_sim.jobs import Run, run_on_model
from kvattic_sim.rtl_transport import FlashSettings
from kvattic_sim.testbench import build_testbench
from kvattic_sim.workloads import STALLS, Attention, Usage, attend, decode, minilm

MINILM = Config(channels=4, rows=8, head_dim=32, page_bytes=4096)
"""MiniLM's geometry: eight queries share a pass; 4 KiB pages as in the paper, so that 512 tokens use all channels."""

FLASH = FlashSettings(latency=64, jitter=16, shuffle=True)
"""Codewords come at full lane rate, out of order."""


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


def equal_bits(attention: Attention, result: AttendResult, config: Config) -> NDArray[np.bool_]:
    """(kv_heads,): the golden device gives the same outputs, maxima and denominators, to the last bit."""
    kv_heads, tokens, _ = attention.key.shape
    with kvattic.open("model", config) as device, device.create_sequence(kv_heads, capacity_tokens=tokens) as sequence:
        sequence.prefill(attention.key, attention.value)
        golden = sequence.attend(attention.query)
    equal = (golden.bits == result.bits).all(axis=2) & (golden.maximum == result.maximum)
    equal &= golden.denominator == result.denominator
    heads: NDArray[np.bool_] = equal.reshape(kv_heads, -1).all(axis=1)
    return heads


def show(console: Console, title: str, config: Config, attention: Attention, usage: list[Usage],
         errors: NDArray[np.float64], equal: NDArray[np.bool_]) -> None:
    """Print one line for each batch (a KV head, or all of them), and their sum."""
    table = Table(title=title, title_justify="left")
    for column in ("heads", "queries", "tokens", "cycles", "bus use", *STALLS, "rel. RMS", "max error", "bit-exact"):
        table.add_column(column, justify="right")
    heads = len(attention.key) // len(usage)
    queries = attention.query.shape[0] * attention.query.shape[1] // len(attention.key)

    def add(name: str, part: list[Usage], rows: slice) -> None:
        cycles = sum(u.cycles for u in part)
        slots = config.channels * cycles
        window = config.channels * sum(u.window for u in part)
        table.add_row(
            name, f"{queries * (rows.stop - rows.start):,}", f"{attention.key.shape[1]:,}", f"{cycles:,}",
            f"{sum(u.beats for u in part) / window:.1%}",
            *(f"{sum(u.stalls[s] for u in part) / slots:.1%}" for s in STALLS),
            f"{np.sqrt(np.square(errors[rows, 0]).mean()):.2e}", f"{errors[rows, 1].max():.1e}",
            "yes" if equal[rows].all() else "[red]NO[/]")

    for index, batch in enumerate(usage):
        rows = slice(index * heads, (index + 1) * heads)
        add(str(index) if heads == 1 else f"{rows.start}-{rows.stop - 1}", [batch], rows)
    if len(usage) > 1:
        table.add_section()
        add("all", usage, slice(0, len(attention.key)))
    console.print(table)


def simulate(console: Console, title: str, config: Config, attention: Attention, model: Model, heads_per_batch: int,
             processes: int) -> bool:
    """Run one attention on the RTL, check and show it; whether all bits were equal.

    Args:
        console: where to.
        title: of the table.
        config: the model's.
        attention: the inputs.
        model: the compiled simulation.
        heads_per_batch: KV heads behind one doorbell.
        processes: simulators that share the heads.
    """
    heads = len(attention.key)
    group = len(attention.query) // heads
    shares = [range(heads)[i * heads // processes : (i + 1) * heads // processes] for i in range(processes)]
    begin = time.perf_counter()
    with (
        Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} jobs"),
                 TimeElapsedColumn(), console=console, transient=True) as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        def run(share: range) -> Run:
            task = progress.add_task(f"heads {share.start} to {share.stop - 1}", total=None)

            def follow(line: str) -> None:
                _, done, total = line.split("|")
                progress.update(task, completed=int(done), total=int(total))

            part = Attention(query=attention.query[share.start * group : share.stop * group],
                             key=attention.key[share.start : share.stop],
                             value=attention.value[share.start : share.stop])
            arguments = {"attention": part, "heads_per_batch": heads_per_batch, "label": title}
            return run_on_model(model, config, attend, arguments, flash=FLASH, progress=follow)

        runs = list(pool.map(run, [share for share in shares if share]))
    seconds = time.perf_counter() - begin
    results: list[AttendResult] = [run.result[0] for run in runs]
    usage: list[Usage] = [batch for run in runs for batch in run.result[1]]
    result = AttendResult(
        output=np.concatenate([r.output for r in results]), maximum=np.concatenate([r.maximum for r in results]),
        denominator=np.concatenate([r.denominator for r in results]),
        completions=[completion for r in results for completion in r.completions])
    errors = oracle_errors(attention, result, config)
    equal = equal_bits(attention, result, config)
    show(console, title, config, attention, usage, errors, equal)
    cycles = sum(u.cycles for u in usage)
    speed = cycles / sum(u.seconds for u in usage)
    console.print(f"  {cycles:,} cycles in {seconds:.1f} s ({len(runs)} x {model.simulator}, {speed:,.0f}/s each); "
                  f"{cycles / config.clock_mhz / 1e3:.2f} ms at {config.clock_mhz:g} MHz\n", highlight=False)
    for one in runs:
        if one.waves:
            console.print(f"  waves: {one.waves}\n")
    return bool(equal.all())


def _interrupted(*_: object) -> None:
    """Ctrl-C: end at once, whatever the threads wait for; simulators and compilers die with their parent."""
    Console().show_cursor(True)
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
                        help="configuration of the decode step")
    parser.add_argument("--waves", action="store_true", help="record waves of a short run under build/")
    options = parser.parse_args(arguments)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    signal.signal(signal.SIGINT, _interrupted)
    # Icarus runs about a hundred cycles a second, and waves grow fast: a slice is all that makes sense by default.
    slice_only = options.waves or options.simulator is Simulator.ICARUS
    for name, whole, part in (("heads", 12, 1), ("queries", 512, 16), ("decode_heads", 8, 0)):
        if getattr(options, name) is None:
            setattr(options, name, part if slice_only else whole)
    if slice_only:
        console.print(f"A slice of the main job: {options.heads} heads, {options.queries} queries, "
                      f"{options.decode_heads} decode heads (--heads, --queries, --decode-heads change it).")

    good = True
    opt = PRESETS[options.preset]
    # The second model is compiled while the first one runs.
    with ThreadPoolExecutor(1) as builder:
        if options.heads:
            with console.status("Compiling the engine for MiniLM (kept for the next run)"):
                model = build_testbench(MINILM, options.simulator, waves=options.waves)
        later = builder.submit(build_testbench, opt, options.simulator) if options.decode_heads else None
        for layer in options.layers if options.heads else ():
            attention = minilm(layer)
            attention = Attention(query=attention.query[: options.heads, : options.queries],
                                  key=attention.key[: options.heads], value=attention.value[: options.heads])
            title = f"MiniLM layer {layer} on real text: {options.heads} heads, {options.queries} positions, 512 tokens"
            good &= simulate(console, title, MINILM, attention, model, 1, min(os.cpu_count() or 1, options.heads))
        if later is not None:
            with console.status("Compiling the engine for OPT-13B's geometry (kept for the next run)"):
                model = later.result()
            attention = decode(opt, kv_heads=options.decode_heads, tokens=2048, group=opt.rows)
            title = f"OPT-13B decode step: head_dim 128, 2,048 tokens, preset {options.preset}"
            good &= simulate(console, title, opt, attention, model, options.decode_heads, 1)
    console.print("[bold green]All results are bit-exact.[/]" if good else "[bold red]Some results differ.[/]")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
