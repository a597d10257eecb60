"""Pictures in the shape of the paper's figures, with this project's drive among its systems; for `make paper`.

The paper gives ratios, no axes, so its bars are not in them: its systems are drawn as the model has them.  Everything
is modelled.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvattic_sim.reports.system import draw, lines, save
from kvattic_sim.system.parameters import PAPER_MACHINE
from kvattic_sim.system.systems import KVATTIC, Row, Study
from kvattic_sim.system.transformer import LLAMA2_13B, OPT_13B, OPT_30B

__all__ = ["FIGURES", "Figure", "figures", "write"]

MODES = ("dense", "sparf", "centroid")
FLEXGEN_MOST = 64
"""The largest batch with which the paper's FlexGen has memory enough (figure 14)."""
_TWO_GPUS = replace(PAPER_MACHINE, gpu=replace(PAPER_MACHINE.gpu, count=2))


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the paper.

    Attributes:
        name: of its files.
        title: what it shows.
        study: loads and drives, with the paper's host software in front of all drives.
        x: the axis; empty for parts of a step.
    """

    name: str
    title: str
    study: Study
    x: str


def _paper(**how: object) -> Study:
    return Study(**{"model": OPT_13B, "modes": MODES, "host": "paper", "drives": (1,), **how})  # type: ignore[arg-type]


FIGURES = (
    Figure("figure14", "one drive, 1,024 + 1,024 tokens", _paper(batches=(4, 8, 16, 32, 64, 128, 256)), "batch"),
    Figure("figure15", "two drives, 1,024 + 1,024 tokens", _paper(batches=(4, 8, 16, 32, 64, 128, 256), drives=(2,)),
           "batch"),
    Figure("figure16", "one drive, two GPUs, 1,024 + 1,024 tokens",
           _paper(model=OPT_30B, batches=(4, 8, 16, 32, 64, 128), machine=_TWO_GPUS), "batch"),
    Figure("figure17", "one drive, 2,048 + 2,048 tokens",
           _paper(model=LLAMA2_13B, batches=(4, 8, 16, 32, 64, 128), contexts=(4096,), new=2048), "batch"),
    Figure("figure18_19", "parts of a step, batch 64", _paper(batches=(64,), drives=(1, 2)), ""),
    Figure("figure20a", "batch 256, 1,024 + 1,024 tokens", _paper(batches=(256,), drives=(1, 2, 4, 8, 12, 16, 20)),
           "drives"),
)
"""Figures 14 to 20a."""
_SHOWN = ("FlexGen (SSD)", "FlexGen, SparQ", "DeepSpeed (DRAM)", "SSD, direct I/O", "paper's drive, dense",
          "paper's drive, SparF")


def _kept(rows: Iterator[Row]) -> list[Row]:
    """Rows of the paper's systems and of this project's, FlexGen's up to its largest batch."""
    found = []
    for row in rows:
        if row.system.startswith("FlexGen") and row.batch > FLEXGEN_MOST and not row.error:
            row = replace(row, error=f"the paper's FlexGen has no memory for more than {FLEXGEN_MOST} prompts",
                          tokens_per_second=0.0, with_prefill=0.0)
        if row.system in _SHOWN or row.system == KVATTIC:
            found.append(row)
    return found


def figures() -> Iterator[tuple[Figure, list[Row]]]:
    """Each figure and its rows."""
    for figure in FIGURES:
        yield figure, _kept(figure.study.rows())


def _plot_lines(path: Path, figure: Figure, rows: list[Row]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8.2, 4.6), layout="constrained")
    axes = picture.subplots()
    lines(axes, rows, figure.x)
    picture.suptitle(f"{rows[0].model}, {figure.title}, host software of the paper (its figure "
                     f"{figure.name.removeprefix('figure')}; all modelled)", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    draw(picture, path)


PARTS = (("kv_ms", "K and V", "tab:blue"), ("arithmetic_ms", "arithmetic", "tab:cyan"),
         ("append_ms", "writing", "tab:red"), ("host_ms", "host", "tab:orange"), ("gpu_ms", "GPU", "0.5"))


def _plot_parts(path: Path, figure: Figure, rows: list[Row]) -> None:
    """Shares of a step's parts, a bar for each system."""
    from matplotlib.figure import Figure as Picture

    good = [row for row in rows if not row.error and not row.overlapped]
    names = [f"{row.name} x {row.drives}" if row.drives else row.name for row in good]
    places = range(len(good))[::-1]
    picture = Picture(figsize=(8.2, 0.34 * len(good) + 1.6), layout="constrained")
    axes = picture.subplots()
    left = [0.0] * len(good)
    for part, label, color in PARTS:
        shares = [getattr(row, part) / row.step_ms for row in good]
        axes.barh(places, shares, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for place, row in zip(places, good, strict=True):
        axes.text(1.01, place, f"{row.step_ms / 1e3:.2f} s", va="center", fontsize=8)
    axes.set_yticks(list(places), names)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(f"{rows[0].model}, {figure.title}, and its seconds (the paper's figures 18 and 19; all modelled)",
                     fontsize=10)
    picture.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    draw(picture, path)


def write(folder: Path) -> list[str]:
    """Write CSV and JSON of each figure, and a picture if matplotlib is installed.

    Args:
        folder: where.

    Returns:
        Names of the pictures; none without matplotlib.
    """
    drawn = []
    can_draw = importlib.util.find_spec("matplotlib") is not None
    for figure, rows in figures():
        save(rows, folder / f"{figure.name}.csv")
        save(rows, folder / f"{figure.name}.json")
        if can_draw:
            plot = _plot_lines if figure.x else _plot_parts
            plot(folder / f"{figure.name}.png", figure, rows)
            drawn.append(f"{figure.name}.png")
    return drawn
