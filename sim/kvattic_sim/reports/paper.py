"""The paper's evaluation, computed: `make paper`.

Prints the parameters of the system model and every figure of the paper beside the model's, and keeps both as CSV and
JSON in build/paper, with this project's drive in the shape of the paper's figures, and pictures where matplotlib is
installed.  All of it is modelled, nothing is measured.
"""

import argparse
import csv
import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvattic.support.files import write_whole
from kvattic.support.terminal import Telling, run_command
from kvattic_sim.reports import paper_figures
from kvattic_sim.reports.console import make_console
from kvattic_sim.reports.figures import record
from kvattic_sim.system.paper import Comparison, compare, summary
from kvattic_sim.system.parameters import PAPER_MACHINE, table

__all__ = ["KEYS", "main", "measure", "page", "report"]

ROOT = Path("build") / "paper"
KEYS = ("system.paper.median", "system.paper.max")
"""Figures of the benchmarks; see `kvattic_sim.system.paper.summary`."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A figure of the paper beside the model's, as it is kept."""

    figure: str
    place: str
    paper: float
    model: float
    deviation: float
    fitted: bool
    reason: str

    @classmethod
    def of(cls, one: Comparison) -> "_Row":
        claim = one.claim
        return cls(claim.what, claim.where, claim.value, one.ours, one.deviation, claim.fitted, claim.reason)


FIELDS = ("figure", "place", "paper", "model", "deviation", "fitted", "reason")


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _show_parameters(console: Console) -> None:
    shown = Table(title="Parameters of the system model", title_justify="left")
    for column, justify in (("parameter", "left"), ("value", "right"), ("unit", "left"), ("kind", "left"),
                            ("source", "left")):
        shown.add_column(column, justify="right" if justify == "right" else "left")
    for name, value, unit, kind, source in table(PAPER_MACHINE):
        shown.add_row(name, f"{value:.4g}", unit, kind.value, escape(source))
    console.print(shown)


def _show_figures(console: Console, rows: Sequence[_Row]) -> None:
    shown = Table(title="The paper's evaluation, modelled", title_justify="left")
    for column in ("figure", "place"):
        shown.add_column(column)
    for column in ("paper", "model", "deviation"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for row in rows:
        style = "dim" if row.fitted else None
        shown.add_row(escape(row.figure), row.place, f"{row.paper:.3f}", f"{row.model:.3f}", f"{row.deviation:+.1%}",
                      "fitted" if row.fitted else escape(row.reason), style=style)
    console.print(shown)


def _plot(path: Path, rows: Sequence[_Row]) -> None:
    """Bars of the model's figure over the paper's, one for each figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.34 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))[::-1]
    colors = ["0.75" if row.fitted else "tab:orange" if row.reason else "tab:blue" for row in rows]
    axes.barh(places, [row.model / row.paper for row in rows], color=colors)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(places), [row.figure for row in rows])
    axes.set_xlabel("model over paper")
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("The paper's figures, modelled (grey: a parameter was fitted to it; orange: a reason is given)",
                    fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())


def page() -> str:
    """The two tables in Markdown, as docs/system.md has them."""
    lines = ["| figure | place | paper | model | deviation | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in map(_Row.of, compare()):
        lines.append(f"| {row.figure} | {row.place} | {row.paper:.3f} | {row.model:.3f} | {row.deviation:+.1%} | "
                     f"{'fitted' if row.fitted else row.reason} |")
    lines += ["", "| parameter | value | unit | kind | source |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {value:.4g} | {unit} | {kind} | {source} |"
              for name, value, unit, kind, source in table(PAPER_MACHINE)]
    return "\n".join(lines) + "\n"


def measure() -> dict[str, float]:
    """The figures by `KEYS`."""
    return dict(zip(KEYS, summary(compare()), strict=True))


def report(console: Console, folder: Path = ROOT) -> None:
    """Print both tables and keep them.

    Args:
        console: where they are printed.
        folder: where they are kept.
    """
    found = compare()
    rows = [_Row.of(one) for one in found]
    _show_parameters(console)
    _show_figures(console, rows)
    median, largest = summary(found)
    console.print(f"deviation of what is predicted: median {median:.3f}; largest without a reason {largest:.3f}")
    write_whole(folder / "paper.csv", _csv(FIELDS, [[getattr(row, name) for name in FIELDS] for row in rows]))
    write_whole(folder / "parameters.csv", _csv(("parameter", "value", "unit", "kind", "source"), table(PAPER_MACHINE)))
    kept = [{name: getattr(row, name) for name in FIELDS} for row in rows]
    write_whole(folder / "paper.json", json.dumps(kept, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(folder / "paper.png", rows)
    else:
        console.print("For pictures: pip install 'kvattic[figures]'", markup=False)
    console.print(f"Kept in {folder}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    argparse.ArgumentParser(prog="kvattic_sim.reports.paper", description=__doc__).parse_args(arguments)
    console = make_console()
    report(console)
    with Telling(quiet=console.is_terminal).phase("this drive in the paper's figures"):
        drawn = paper_figures.write(ROOT)
    console.print(f"This drive in the shape of the paper's figures: {ROOT}/figure*.csv, .json"
                  + (f", {', '.join(drawn)}" if drawn else ""), markup=False)
    record(measure())


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.paper"))
