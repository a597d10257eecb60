"""The figures that the documents state, by key, and whether they are still what was measured.

``python -m kvattic_sim.reports.documents`` compares README.md, docs/measurements.md and docs/controller.md with
build/bench.json and lists what is stale.  A figure is stated in one of three ways:

- in a table with a column `measured`: the row's first cell names the key, as `` `engine.dense.scaling` ``; of several
  parts, with semicolons between them, each has its own;
- in a table with a column `speed-up`: likewise, and the columns beside it are the other figures of the same run;
- right behind or before the number: `` `accuracy.drift` 5.83e-8 `` or ``97.6 % <!-- flash.dense.bus_utilization -->``.

A number stands for all that round to it.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvattic_sim.reports import figures

__all__ = ["DOCUMENTS", "Stated", "main", "stale", "stated"]

DOCUMENTS = (Path("README.md"), Path("docs") / "measurements.md", Path("docs") / "controller.md")
NUMBER = r"-?[\d,]*\d(?:\.\d+)?(?:e-?\d+)?"
KEY = r"[a-z]\w*(?:\.\w+)+"
_TEXT = re.compile(rf"`({KEY})` ({NUMBER})( ?%)?")
_COMMENT = re.compile(rf"({NUMBER})( ?%)? <!-- ({KEY}) -->")
_BESIDE = {"bytes of dense": "bytes_ratio", "cycles": "cycles", "speed-up": "speedup", "bus use": "bus_utilization"}
"""Columns of the table of speed-ups: the figure's name in place of `speedup` in the key."""


@dataclass(frozen=True, slots=True)
class Stated:
    """A figure in a document.

    Attributes:
        key: the figure's.
        number: what is said.
        tolerance: half of its last digit.
        place: file and line.
    """

    key: str
    number: float
    tolerance: float
    place: str

    def holds(self, value: float) -> bool:
        """Whether the value rounds to what is said."""
        # Half of a digit, and what floats lose of it.
        return abs(value - self.number) <= self.tolerance * (1 + 1e-9) + abs(self.number) * 1e-12


def _figure(key: str, text: str, percent: str | None, place: str) -> Stated:
    digits, _, exponent = text.replace(",", "").partition("e")
    scale = 10.0 ** int(exponent or 0) / (100 if percent else 1)
    _, _, fraction = digits.partition(".")
    return Stated(key, float(digits) * scale, 0.5 * 10.0 ** -len(fraction) * scale, place)


def _first(key: str, cell: str, place: str) -> Iterator[Stated]:
    """The first number of a cell; nothing if there is none."""
    if found := re.search(rf"({NUMBER})( ?%)?", cell.replace("**", "")):
        yield _figure(key, found[1], found[2], place)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _row(header: list[str], cells: list[str], place: str) -> Iterator[Stated]:
    """Figures of a row of a table."""
    if column := {"measured", "modelled"} & set(header):
        values = cells[header.index(column.pop())].split(";")
        for part, value in zip(cells[0].split(";"), values, strict=False):
            if key := re.search(rf"`({KEY})`", part):
                yield from _first(key[1], value, place)
    elif "speed-up" in header and (key := re.search(rf"`({KEY})`", cells[0])):
        for name, figure in _BESIDE.items():
            if name in header:
                yield from _first(key[1].replace("speedup", figure), cells[header.index(name)], place)


def stated(path: Path) -> list[Stated]:
    """All figures of a document, in its order.

    Args:
        path: of a Markdown file.
    """
    found: list[Stated] = []
    header: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        place = f"{path}:{number}"
        found += [_figure(match[3], match[1], match[2], place) for match in _COMMENT.finditer(line)]
        if not line.startswith("|"):
            header = []
            found += [_figure(match[1], match[2], match[3], place) for match in _TEXT.finditer(line)]
        elif not header:
            header = _cells(line)
        elif not set(line) <= set("| -:"):
            found += _row(header, _cells(line), place)
    return found


def stale(found: Iterable[Stated], known: Mapping[str, float | bool]) -> list[str]:
    """A line for each figure that is not what was measured; those that are not known are passed over."""
    return [f"{figure.place}: {figure.key} is said to be {figure.number:g}, and was measured as {known[figure.key]:g}"
            for figure in found if figure.key in known and not figure.holds(float(known[figure.key]))]


def main() -> int:
    """Compare the documents with build/bench.json."""
    known = figures.load()
    found = [figure for path in DOCUMENTS for figure in stated(path)]
    wrong = stale(found, known)
    for line in wrong:
        print(line)
    compared = sum(figure.key in known for figure in found)
    print(f"{len(found)} figures stated, {compared} of them in {figures.PATH}, {len(wrong)} stale")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
