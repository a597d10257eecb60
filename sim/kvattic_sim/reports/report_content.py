"""What `make report` shows: the figures of build/bench.json with their bars, the system model's, a small attend.

Nothing here runs the RTL.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvattic import PAPER
from kvattic.errors import RequestError
from kvattic.spec.commands import Mode
from kvattic.timing import Estimate, Layer, estimate
from kvattic_sim.reports import paper_figures
from kvattic_sim.reports.bench import BARS, bar_text, benches, number_text, select, verdict
from kvattic_sim.reports.system import drive_page
from kvattic_sim.system.paper import Comparison, compare
from kvattic_sim.system.parameters import PAPER_MACHINE, table
from kvattic_sim.system.systems import Row

__all__ = ["GROUPS", "MISSING", "Entry", "Modelled", "Tabular", "command", "entries", "group_of", "markdown_table",
           "model", "read_figures"]

Value = float | bool

MISSING = "missing"
"""The verdict on a key that is not in build/bench.json."""
MODELLED = ("system.", "latency.", "energy.")
"""Keys of figures that no hardware gave, RTL or golden device: a model says them."""
SYNTHESISED = "synth."
GROUPS = {
    "engine": "Engine, behind ideal flash",
    "flash": "Flash",
    "sparse": "Sparse attention",
    "lm": "Quality of a language model",
    "accuracy": "Errors",
    "golden": "Golden device",
    "host": "Host",
    "latency": "Latency of commands",
    "energy": "Energy",
    "time": "Timing model",
    "system": "Whole systems",
    "sim": "Simulators",
    "house": "The house",
    "synth": "Area and clock",
}
"""Titles by the first word of a key."""
HEADS, TOKENS = 4, 2048
"""The small attend: as `make trace` simulates it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key, and what is known of it.

    Attributes:
        key: the figure's.
        value: the figure; None: it is missing.
        text: the figure as it is shown.
        bar: what it should be, in words; empty: it has no bar.
        verdict: `met`, `short`, `reported` or `missing`.
        how: `measured`, `modelled` or `synthesised`.
        command: what gives it; empty: this version has no such figure.
    """

    key: str
    value: Value | None
    text: str
    bar: str
    verdict: str
    how: str
    command: str


@dataclass(frozen=True, slots=True)
class Tabular:
    """A table as text: its head and its rows, each as long as the head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """What the models say; none of it is measured.

    Attributes:
        comparisons: the paper's figures beside the model's.
        parameters: (name, value, unit, kind, source) of the system model.
        figures: this drive in the shape of the paper's figures.
        drive: this drive in the paper's place.
        attends: a small attend by mode.
    """

    comparisons: Sequence[Comparison]
    parameters: Sequence[tuple[str, float, str, str, str]]
    figures: Sequence[tuple[paper_figures.Figure, Sequence[Row]]]
    drive: Tabular
    attends: Mapping[str, Estimate]


def read_figures(path: Path) -> dict[str, Value]:
    """The figures of a bench.json; none if there is no such file.

    Args:
        path: of the file.

    Raises:
        RequestError: it is no JSON object of numbers.
    """
    if not path.exists():
        return {}
    remedy = "move it away and run `make bench` again"
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} must be a JSON object of figures by key, not {type(found).__name__}: {remedy}")
    for key, value in found.items():
        if not isinstance(value, (int, float)):
            raise RequestError(f"{path}: {key} must be a number, true or false, not {value!r}: {remedy}")
    return found


@functools.cache
def command(key: str) -> str:
    """The command that gives a figure, and no other bench's where that can be said; empty: this version has none."""
    if key not in BARS:
        return ""
    if key.startswith(SYNTHESISED):
        return "make synth"
    words = key.split(".")
    available = _benches()
    bench = next(bench for bench in available if key in bench.keys)
    for count in range(1, len(words)):
        prefix = ".".join(words[:count]) + "."
        if select(prefix, available) == [bench] and sum(other.startswith(prefix) for other in bench.keys) > 1:
            return f"make bench BENCH={prefix}"
    return f"make bench BENCH={bench.keys[0]}"


_benches = functools.cache(benches)


def group_of(key: str) -> str:
    """The title under which a key is shown."""
    return GROUPS.get(key.partition(".")[0], "Others")


def entries(known: Mapping[str, Value]) -> list[Entry]:
    """Every key of this version, and every other one that is known, in the order of `GROUPS`.

    Args:
        known: figures by key.
    """
    order = {title: number for number, title in enumerate(GROUPS.values())}
    keys = sorted({**dict.fromkeys(BARS), **dict.fromkeys(known)},
                  key=lambda key: order.get(group_of(key), len(order)))
    return [_entry(key, known) for key in keys]


def _entry(key: str, known: Mapping[str, Value]) -> Entry:
    value = known.get(key)
    how = "modelled" if key.startswith(MODELLED) else "synthesised" if key.startswith(SYNTHESISED) else "measured"
    text, word = ("", MISSING) if value is None else (number_text(value), verdict(key, value, known).value)
    return Entry(key=key, value=value, text=text, bar=bar_text(BARS.get(key), known), verdict=word, how=how,
                 command=command(key))


def markdown_table(text: str, first: Sequence[str]) -> Tabular | None:
    """The first table of a Markdown text whose head begins with these cells; None: there is none.

    Args:
        text: of the document.
        first: cells.
    """
    found: list[tuple[str, ...]] = []
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))
        if not line.startswith("|"):
            if found:
                break
        elif found or cells[:len(first)] == tuple(first):
            found.append(cells)
    return Tabular(found[0], tuple(found[2:])) if found else None


def _attends() -> dict[str, Estimate]:
    """The timing model's estimates of a small attend: 4 heads, 2,048 tokens."""
    layer = Layer(PAPER, heads=HEADS, tokens=TOKENS, features=True)
    sparf = layer.attend(mode=Mode.SPARF, features=PAPER.head_dim // 8, top_units=TOKENS // 16)
    return {"dense": estimate(PAPER, layer.attend()), "SparF": estimate(PAPER, sparf)}


def model() -> Modelled:
    """Compute everything that is modelled; takes half a minute."""
    figures = [(figure, rows) for figure, rows in paper_figures.figures()]
    drive = markdown_table(drive_page(), ("",))
    if drive is None:
        raise AssertionError("drive_page() has no table")
    parameters = [(name, value, unit, str(kind), source) for name, value, unit, kind, source in table(PAPER_MACHINE)]
    return Modelled(comparisons=compare(), parameters=parameters, figures=figures, drive=drive, attends=_attends())
