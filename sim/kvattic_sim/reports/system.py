"""Whole systems beside each other, for `kvattic system`: what is asked, rows as CSV and JSON, a picture.

`python -m kvattic_sim.reports.system` prints two tables of docs/system.md: this drive in the paper's place, and where a
drive is worth it; it takes some minutes.  Everything is modelled.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from kvattic.errors import RequestError
from kvattic.support.files import write_whole
from kvattic.support.terminal import run_command
from kvattic_sim.system.drive import MODES
from kvattic_sim.system.parameters import PAPER_MACHINE, gpu
from kvattic_sim.system.systems import HOSTS, KVATTIC, Row, Study
from kvattic_sim.system.transformer import OPT_13B, load_model
from kvattic_sim.system.worth import EXACT, SPARSE, Worth, cases

__all__ = ["AXES", "COLUMNS", "FIELDS", "cells", "draw", "drive_page", "lines", "main", "numbers", "plot", "save",
           "study", "worth_page", "worth_row"]

FIELDS = tuple(field.name for field in fields(Row))
"""Columns of CSV and keys of JSON."""
COLUMNS = ("system", "drives", "batch", "context", "tokens/s", "with prefill", "step, ms", "KV", "GPU", "host",
           "prefill, s", "flash, GB", "DRAM, GB", "")
"""Heads of the table of `kvattic system`; flash and DRAM are those of a drive."""
AXES = ("drives", "batch", "context")
"""What a picture can have on its x axis."""
MOST_PANELS = 6
_COLORS = {
    "GPU alone": "black", "DRAM, CPU attention": "tab:green", "DRAM, CPU, SparQ": "limegreen",
    "DRAM to GPU, SparQ": "olive", "DeepSpeed (DRAM)": "tab:brown", "FlexGen (SSD)": "0.6", "FlexGen, SparQ": "0.45",
    "SSD, direct I/O": "tab:purple", "paper's drive, dense": "tab:orange", "paper's drive, SparF": "tab:red",
    "kvattic, dense": "lightskyblue", "kvattic, sparf": "tab:blue", "kvattic, fetched": "tab:cyan",
    "kvattic, centroid": "navy", "kvattic, codes": "slateblue",
}


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Args:
        text: such as 1,4,20.
        what: name of it, for the message.

    Raises:
        RequestError: they are no positive whole numbers.
    """
    try:
        found = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found):
        raise RequestError(f"{what} must be positive whole numbers, such as 1,4,20, not {text!r}")
    return tuple(dict.fromkeys(found))


def study(*, model: str, batch: str = "64", context: str = "2048", new: int = 1024, drives: str = "1,4,20",
          mode: str = ",".join(MODES), gpu_name: str = "a6000", gpus: int = 1, dram_gb: float = 96,
          host: str = "direct", overlapped: bool = False, part: str = "pslc", unit_tokens: int = 16) -> Study:
    """What the options of `kvattic system` ask for.

    Args:
        model: a known model's name, or the path of a Hugging Face config.json.
        batch: sequences, numbers between commas.
        context: tokens of each at the end, likewise.
        drives: how many, likewise.
        new: tokens of each context that are generated.
        mode: modes between commas.
        gpu_name: one of `kvattic_sim.system.parameters.GPUS`.
        gpus: how many of them.
        dram_gb: of the host, 10^9 bytes.
        host: `direct` or `paper`: software in front of this project's drives.
        overlapped: GPU and drives work at the same time.
        part: NAND part of this project's drives.
        unit_tokens: of CENTROID.

    Raises:
        RequestError: something is unknown, or no positive number.
    """
    if gpus < 1:
        raise RequestError(f"gpus must be at least 1, not {gpus}")
    if not dram_gb > 0:
        raise RequestError(f"the host's DRAM must be a positive number of GB, not {dram_gb:g}")
    machine = replace(PAPER_MACHINE, gpu=replace(gpu(gpu_name), count=gpus),
                      host=replace(PAPER_MACHINE.host, memory=1e9 * dram_gb))
    return Study(model=load_model(model), batches=numbers(batch, "batch"), contexts=numbers(context, "context"),
                 new=new, drives=numbers(drives, "drives"), modes=tuple(dict.fromkeys(mode.split(","))),
                 machine=machine, host=host, overlapped=overlapped, part=part, unit_tokens=unit_tokens)


def _short(value: float, digits: int = 3) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def cells(row: Row) -> list[str]:
    """A row of the table (`COLUMNS`); its last cell says that there is nothing, or how many sequences run at once."""
    note = "-" if row.error else f"{row.together} at once" if row.together < row.batch else ""
    return [row.name, str(row.drives or ""), str(row.batch), f"{row.context:,}",
            *(_short(value) for value in (
                row.tokens_per_second, row.with_prefill, row.step_ms, row.kv_ms + row.arithmetic_ms + row.append_ms,
                row.gpu_ms, row.host_ms, row.prefill_s, row.flash_gb, row.dram_gb)), note]


def save(rows: Iterable[Row], path: Path) -> None:
    """Write rows: CSV if the path ends in .csv, otherwise JSON."""
    found = [asdict(row) for row in rows]
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        write_whole(path, text.getvalue())
    else:
        write_whole(path, json.dumps(found, indent=2) + "\n")


# Pictures.


def lines(axes: Any, rows: Sequence[Row], x: str, *, styles: Any = None, suffix: str = "") -> None:
    """Draw tokens a second over an axis, a line for each system.

    A system without drives is level where drives are the axis.

    Args:
        axes: matplotlib's.
        rows: of one load but for the axis.
        x: one of `AXES`.
        styles: further arguments of each line.
        suffix: of each line's name.
    """
    from matplotlib.ticker import LogLocator

    everywhere = sorted({getattr(row, x) for row in rows} - {0})
    for name in dict.fromkeys(row.name for row in rows):
        points = [(getattr(row, x), row.tokens_per_second) for row in rows if row.name == name and not row.error]
        if not points:
            continue
        style = {"color": _COLORS.get(name), "label": name + suffix, "marker": "o", "markersize": 4,
                 "linewidth": 2 if name.startswith(KVATTIC) else 1.2, **(styles or {})}
        if x == "drives" and points[0][0] == 0:
            points = [(at, points[0][1]) for at in everywhere]
            style |= {"linestyle": "--", "marker": ""}
        points.sort()
        axes.plot(*zip(*points, strict=True), **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(everywhere, [f"{at:,}" for at in everywhere])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlabel({"drives": "drives", "batch": "batch", "context": "tokens of context"}[x])
    axes.set_ylabel("tokens/s, modelled")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Tokens a second of one load, a bar for each system."""
    good = [row for row in rows if not row.error]
    names = [f"{row.name} x {row.drives}" if row.drives else row.name for row in good]
    places = range(len(good))[::-1]
    bars = axes.barh(places, [row.tokens_per_second for row in good], color=[_COLORS.get(row.name) for row in good])
    axes.bar_label(bars, [_short(row.tokens_per_second) for row in good], padding=3, fontsize=8)
    axes.set_yticks(list(places), names)
    axes.set_xlabel("tokens/s, modelled")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def draw(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens a second: over drives, batch or context, whichever has several values first; else bars.

    Args:
        rows: of a study; those with an error are left out.
        path: PNG to write.

    Raises:
        RequestError: nothing fits, or the other two axes make more panels than can be read.
    """
    from matplotlib.figure import Figure

    good = [row for row in rows if not row.error]
    if not good:
        raise RequestError("there is nothing to draw: no system fits")
    # Systems without drives have none to count.
    several = {axis: len({getattr(row, axis) for row in good} - {0}) > 1 for axis in AXES}
    x = next((axis for axis in AXES if several[axis]), None)
    rest = [axis for axis in ("batch", "context") if axis != x]
    panels = list(dict.fromkeys(tuple(getattr(row, axis) for axis in rest) for row in good))
    if len(panels) > MOST_PANELS:
        raise RequestError(f"a picture has at most {MOST_PANELS} panels, not {len(panels)}: ask for fewer batches or "
                           "contexts, or write CSV")
    height = 4.6 if x else 1.2 + 0.3 * len(good) / len(panels)
    figure = Figure(figsize=(4.6 * len(panels) + 2.4, height), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=x is not None)[0]
    for axes, panel in zip(grid, panels, strict=True):
        here = [row for row in good if tuple(getattr(row, axis) for axis in rest) == panel]
        axes.set_title(", ".join(f"{axis} {value:,}" for axis, value in zip(rest, panel, strict=True)), fontsize=10)
        if x:
            lines(axes, here, x)
            axes.label_outer()
        else:
            _bars(axes, here)
    figure.suptitle(f"{good[0].model} on {good[0].gpu}, decoding, modelled", fontsize=11)
    if x:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    draw(figure, path)


# The page.


def drive_page() -> str:
    """The table of docs/system.md with this drive in the paper's place, in Markdown; takes seconds."""
    batches, drives = (64, 256), (1, 4, 20)
    tables: dict[str, list[str]] = {}
    for host in HOSTS:
        for row in Study(model=OPT_13B, batches=batches, drives=drives, host=host).rows(baselines=host == HOSTS[0]):
            if row.system == KVATTIC:
                tables.setdefault(f"{row.name}, host software: {host}", []).append(_short(row.tokens_per_second))
            elif row.drives:
                tables.setdefault(row.name, []).append(_short(row.tokens_per_second))
    head = [f"batch {batch}: {n} drive{'s' * (n > 1)}" for batch in batches for n in drives]
    return "\n".join([f"| | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|",
                      *(f"| {name} | {' | '.join(found)} |" for name, found in tables.items())]) + "\n"


def worth_row(found: Worth) -> str:
    """A case as a row of the table of docs/system.md."""
    def show(value: float | None, mode: str = "") -> str:
        return "-" if value is None else _short(value) + (f" {mode}" if mode else "")

    exact = [f"**{show(value)}**" if name == found.best_exact else show(value) for name, value in found.exact.items()]
    sparse = [f"**{show(value, found.modes.get(name, ''))}**" if name == found.best_sparse
              else show(value, found.modes.get(name, "")) for name, value in found.sparse.items()]
    return (f"| {found.model} | {found.context:,} | {found.batch} | {_short(found.kv_gb)} | "
            + " | ".join([*exact, *sparse]) + " |")


def worth_page() -> str:
    """The table of docs/system.md, in Markdown."""
    head = ["model", "context", "batch", "KV, GB", *EXACT, *(f"sparse: {name}" for name in SPARSE)]
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *map(worth_row, cases())]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; see the module's docstring."""
    argparse.ArgumentParser(prog="kvattic_sim.reports.system", description=__doc__).parse_args(arguments)
    print(drive_page())
    print(worth_page(), end="")


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.system"))
