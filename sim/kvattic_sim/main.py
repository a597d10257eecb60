"""The main job, `make sim`: attention of a real model on the simulated engine, checked bit for bit.

Q, K and V of MiniLM on real text go through the host driver to the RTL; then one decode step with OPT-13B's geometry.
Each result is compared with the golden model (equal bits) and with float64 attention.
"""

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvattic
from kvattic import PRESETS, AttendResult, Config
from kvattic.elements import from_bits
from kvattic_sim import oracle
from kvattic_sim.build import Simulator
from kvattic_sim.data import load_minilm
from kvattic_sim.jobs import run_on_model
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
        window = sum(config.channels * (u.last_beat - u.first_beat + 1) for u in part)
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


def simulate(console: Console, title: str, config: Config, attention: Attention, heads_per_batch: int,
             simulator: Simulator, waves: bool) -> bool:
    """Run one attention on the RTL, check and show it; whether all bits were equal."""
    begin = time.perf_counter()
    with console.status(f"Building {simulator} model for {title} (cached for the next run)"):
        model = build_testbench(config, simulator, waves=waves)
    built = time.perf_counter() - begin
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} jobs"),
                  TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def follow(line: str) -> None:
            _, done, total = line.split("|")
            progress.update(task, completed=int(done), total=int(total))

        run = run_on_model(model, config, attend, {"attention": attention, "heads_per_batch": heads_per_batch,
                                                   "label": title}, flash=FLASH, progress=follow)
    result, usage = run.result
    errors = oracle_errors(attention, result, config)
    equal = equal_bits(attention, result, config)
    show(console, title, config, attention, usage, errors, equal)
    cycles, seconds = sum(u.cycles for u in usage), sum(u.seconds for u in usage)
    console.print(f"  model built in {built:.1f} s; {cycles:,} cycles in {seconds:.1f} s, {cycles / seconds:,.0f}/s; "
                  f"{cycles / config.clock_mhz / 1e3:.2f} ms at {config.clock_mhz:g} MHz\n", highlight=False)
    if run.waves:
        console.print(f"  waves: {run.waves}\n")
    return bool(equal.all())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulator", type=Simulator, default=Simulator.VERILATOR, choices=list(Simulator))
    parser.add_argument("--layers", type=int, nargs="*", default=[0], choices=load_minilm().layers,
                        help="MiniLM layers to run (0 and 5 are in the repository)")
    parser.add_argument("--heads", type=int, default=12, help="MiniLM heads to run; 0: none")
    parser.add_argument("--decode-heads", type=int, default=8, help="OPT-13B heads of the decode step (of 40); 0: none")
    parser.add_argument("--preset", default="paper", choices=[n for n, c in PRESETS.items() if c.head_dim == 128],
                        help="configuration of the decode step")
    parser.add_argument("--waves", action="store_true", help="record waves of a short run under build/")
    options = parser.parse_args(arguments)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    if options.waves:
        options.heads, options.decode_heads = min(options.heads, 1), 0

    good = True
    for layer in options.layers if options.heads else ():
        attention = minilm(layer)
        attention = Attention(query=attention.query[: options.heads], key=attention.key[: options.heads],
                              value=attention.value[: options.heads])
        if options.waves:
            attention = replace(attention, query=attention.query[:, :32])
        good &= simulate(console, f"MiniLM layer {layer}: each head, every position of 512 tokens of real text",
                         MINILM, attention, 1, options.simulator, options.waves)
    if options.decode_heads:
        config = PRESETS[options.preset]
        attention = decode(config, kv_heads=options.decode_heads, tokens=2048, group=config.rows)
        good &= simulate(console, f"OPT-13B decode step: head_dim 128, 2,048 tokens, preset {options.preset}", config,
                         attention, options.decode_heads, options.simulator, False)
    console.print("[bold green]All results are bit-exact.[/]" if good else "[bold red]Some results differ.[/]")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
