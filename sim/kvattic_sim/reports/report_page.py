"""The page of `make report`: one HTML file that needs nothing else, no script, no font, no picture from elsewhere."""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from kvattic_sim.reports import report_charts, report_plots
from kvattic_sim.reports.paper_figures import Figure
from kvattic_sim.reports.report_content import MISSING, Entry, Modelled, Tabular, command, group_of
from kvattic_sim.reports.report_plots import Chart
from kvattic_sim.reports.report_style import CSS
from kvattic_sim.system.systems import Row

__all__ = ["Picture", "Stamp", "page"]

PAPER = "https://arxiv.org/abs/2409.04992"
VERDICTS = ("met", "short", "reported", MISSING)
SECTIONS = (("bars", "Bars"), ("plots", "Plots"), ("timeline", "Timeline"), ("area", "Area"), ("errors", "Errors"),
            ("systems", "Whole systems"), ("figures", "All figures"))


NAMED = 4
"""Missing keys that a chart names, at most; the list of all figures has all."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG, and where it comes from in words."""

    png: bytes
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Of what and when the page is.

    Attributes:
        version: of the project, with its commit where that is known.
        written: date and time of the page.
        source: the file of figures, and its date, in words.
    """

    version: str
    written: str
    source: str


# Pieces.


def _breaking(key: str) -> str:
    """Escaped text whose keys may be broken after a dot or an underscore; numbers stay whole."""
    return re.sub(r"([._])(?=[a-z])", r"\1<wbr>", escape(key))


def _table(head: Sequence[str], rows: Iterable[str], label: str, numbers: Iterable[int] = ()) -> str:
    """A table in a box of its own that scrolls; rows are HTML."""
    right = set(numbers)
    cells = "".join(f'<th scope="col"{" class=number" if at in right else ""}>{escape(name)}</th>'
                    for at, name in enumerate(head)).replace("class=number", 'class="number"')
    return (f'<div class="box" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{cells}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>")


def _bold(text: str) -> str:
    """Escaped text, with Markdown's ** as strong."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))


def _cells(cells: Sequence[str], numbers: Iterable[int] = (), long: Iterable[int] = ()) -> str:
    right, wide = set(numbers), set(long)

    def tag(at: int) -> str:
        kind = "number" if at in right else "long" if at in wide else "name" if at == 0 else ""
        return f'<td class="{kind}">' if kind else "<td>"

    return "<tr>" + "".join(f"{tag(at)}{_bold(cell)}</td>" for at, cell in enumerate(cells)) + "</tr>"


def _text_table(found: Tabular, label: str, *, names: int = 1) -> str:
    """A table whose first columns are names, and the others numbers."""
    numbers = range(names, len(found.head))
    return _table(found.head, (_cells(row, numbers) for row in found.rows), label, numbers)


def _entry(entry: Entry, *, anchor: bool = False) -> str:
    place = f' id="{escape(entry.key)}"' if anchor else ""
    order = f"<code>{escape(entry.command)}</code>" if entry.command else "not a figure of this version"
    return (f'<tr{place}><td class="entry"><code>{_breaking(entry.key)}</code></td>'
            f'<td class="number">{escape(entry.text)}</td>'
            f'<td class="verdict {escape(entry.verdict)}">{escape(entry.verdict)}</td>'
            f'<td class="bar">{_breaking(entry.bar)}</td><td>{escape(entry.how)}</td><td>{order}</td></tr>')


def _entries(found: Iterable[Entry], label: str, *, anchors: bool = False) -> str:
    return _table(("key", "value", "verdict", "bar", "how", "command"),
                  (_entry(entry, anchor=anchors) for entry in found), label, (1,))


def _tag(text: str) -> str:
    return f'<span class="tag">{escape(text)}</span>'


def _chart(chart: Chart, *, more: str = "") -> str:
    gap = ""
    if chart.missing:
        keys = [f"<code>{_breaking(key)}</code>" for key in chart.missing]
        more_keys = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        orders = dict.fromkeys(f"<code>{_breaking(command(key))}</code>" for key in chart.missing)
        gap = f'<p class="gap">Missing: {", ".join(keys[:NAMED])}{more_keys}. Run {", ".join(orders)}</p>'
    if chart.refused:
        keys = [f"<code>{_breaking(key)}</code>" for key in chart.refused]
        gap += f'<p class="gap">Not drawn, as they are no positive numbers: {", ".join(keys)}</p>'
    return (f'<figure><h3>{escape(chart.title)} {_tag(chart.how)}</h3>'
            f"<p>{escape(chart.note)}</p>{chart.svg}"
            f"{report_charts.legend(chart.legend) if chart.legend else ''}{gap}{more}</figure>")


def _section(name: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(dict(SECTIONS)[name])}</h2>{content}</section>'


def _counts(found: Iterable[Entry]) -> str:
    counts = Counter(entry.verdict for entry in found)
    return ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word])


# Sections.


def _top(found: Sequence[Entry], stamp: Stamp) -> str:
    counts = Counter(entry.verdict for entry in found)
    barred = [entry for entry in found if entry.bar]
    words = {"met": "bars met", "short": "short of their bar", "reported": "reported, without a bar",
             MISSING: f"missing, {sum(e.verdict == MISSING for e in barred)} of them with a bar"}
    tiles = "".join(f'<li><b class="{word}">{counts[word]}</b>{escape(text)}</li>' for word, text in words.items())
    return (f"<header><h1>kvattic: what was measured, and what is modelled</h1>"
            f'<p class="dim">Version {escape(stamp.version)}. Page of {escape(stamp.written)}. '
            f"{escape(stamp.source)}.</p>"
            "<p>kvattic computes LLM attention inside the flash drive that holds the KV cache. It implements "
            f'InstInfer (<a href="{PAPER}">arXiv 2409.04992</a>), "the paper" on this page.</p>'
            f'<ul class="tiles">{tiles}</ul>'
            "<p><b>Measured</b> figures come from running the RTL in a simulator, the golden device, which has the "
            "same bits, or the host library. <b>Modelled</b> ones come from the timing, energy and system models, and "
            "no hardware has shown them. <b>Synthesised</b> ones are what Yosys and nextpnr say. Nothing ran on a card "
            "yet.</p></header>")


def _bars(found: Sequence[Entry]) -> str:
    order = ("short", MISSING, "reported", "met")
    barred = sorted((entry for entry in found if entry.bar), key=lambda entry: order.index(entry.verdict))
    text = ("<p>Every figure that has a bar or a goal, those that fall short first. A goal is aimed at, not required. "
            "<i>Reported</i>: what the bar compares with is not known.</p>")
    return _section("bars", text + _entries(barred, "Figures with a bar"))


def _plots(known: dict[str, float | bool]) -> str:
    made = [report_plots.speed_up(known), report_plots.latency(known), report_plots.energy(known),
            report_plots.bus_use(known), report_plots.quality(known)]
    return _section("plots", f'<div class="charts">{"".join(map(_chart, made))}</div>')


def _timeline(modelled: Modelled, picture: Picture | None) -> str:
    charts = "".join(_chart(chart) for chart in report_plots.attends(modelled.attends))
    if picture is None:
        shown = '<p class="gap">Missing: what channels and dies do on the RTL. Run <code>make trace</code>.</p>'
    else:
        data = base64.b64encode(picture.png).decode()
        shown = (f'<figure><h3>Channels and dies {_tag("measured")}</h3><p>{escape(picture.origin)}</p>'
                 '<div class="picture" tabindex="0" role="region" aria-label="Timeline of channels and dies">'
                 '<img alt="What the buses of all channels and the dies of one channel do during an attend" '
                 f'src="data:image/png;base64,{data}"></div></figure>')
    text = ("<p>One attend of 4 heads over 2,048 tokens on the preset <code>paper</code>. First what the timing model "
            "says of each head's command; its sparse attend selects a sixteenth of the tokens at random. Then what "
            "buses and dies of the RTL did; the picture's title says of which drive.</p>")
    return _section("timeline", f'{text}<div class="charts">{charts}</div>{shown}')


def _area(found: Sequence[Entry], known: dict[str, float | bool]) -> str:
    rows = [entry for entry in found if entry.key.startswith("synth.")]
    return _section("area", f'<div class="charts">{_chart(report_plots.area(known))}</div>{_entries(rows, "Area")}')


def _errors(found: Sequence[Entry], known: dict[str, float | bool]) -> str:
    rows = [entry for entry in found if entry.key.startswith("accuracy.")]
    return _section("errors", f'<div class="charts">{_chart(report_plots.errors(known))}</div>'
                              f'{_entries(rows, "Errors")}')


def _speedups(known: dict[str, float | bool]) -> str:
    """system.speedup.* as a table: a row for what it is compared with, batch and drives; a column for each mode."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for key, value in known.items():
        if match := re.fullmatch(r"system\.speedup\.(\w+)\.b(\d+)\.d(\d+)\.(\w+)", key):
            rows.setdefault((match[1], match[2], match[3]), {})[match[4]] = report_charts.short(float(value))
    if not rows:
        return ('<p class="gap">Missing: <code>system.speedup.*</code>, this drive over FlexGen, direct I/O and the '
                "paper's drive. Run <code>make bench BENCH=system.speedup.</code></p>")
    names = {"flexgen": "FlexGen", "direct_io": "direct I/O from as many SSDs", "paper": "the paper's drive"}
    modes = list(dict.fromkeys(mode for found in rows.values() for mode in found))
    table = Tabular(("this drive over", "batch", "drives", *modes),
                    tuple((names.get(of[0], of[0]), *of[1:], *(found.get(mode, "-") for mode in modes))
                          for of, found in rows.items()))
    return _text_table(table, "Speed-up of this drive in a whole system")


def _rows_table(figure: Figure, rows: Sequence[Row]) -> str:
    """The numbers of a figure of lines."""
    if not figure.x:
        return ""
    xs = sorted({getattr(row, figure.x) for row in rows} - {0})
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        found.setdefault(row.name, {})[getattr(row, figure.x)] = (
            "-" if row.error else report_charts.short(row.tokens_per_second))
    table = Tabular((f"tokens/s by {figure.x}", *(f"{x:,}" for x in xs)),
                    tuple((name, *(at.get(x, at.get(0, "-")) for x in xs)) for name, at in found.items()))
    return f"<details><summary>The numbers</summary>{_text_table(table, figure.title)}</details>"


def _comparisons(modelled: Modelled) -> str:
    rows = [_cells((one.claim.what, one.claim.where, report_charts.short(one.claim.value),
                    report_charts.short(one.ours), f"{one.deviation:+.1%}",
                    "fitted" if one.claim.fitted else one.claim.reason), (2, 3, 4), (5,))
            for one in modelled.comparisons]
    return _table(("figure", "place", "paper", "model", "deviation", "reason"), rows, "The paper's figures", (2, 3, 4))


def _systems(modelled: Modelled, worth: Tabular | None, known: dict[str, float | bool]) -> str:
    figures = "".join(_chart(report_plots.systems(figure, rows), more=_rows_table(figure, rows))
                      for figure, rows in modelled.figures)
    parameters = _table(
        ("parameter", "value", "unit", "kind", "source"),
        (_cells((name, f"{value:.4g}", *rest), (1,), (4,)) for name, value, *rest in modelled.parameters),
        "Parameters", (1,))
    if worth is None:
        where = ('<p class="gap">Missing: the table of docs/system.md. '
                 "Run <code>python -m kvattic_sim.reports.system</code>.</p>")
    else:
        where = ("<p>Tokens a second, the fastest that attends everything and the fastest sparse one in bold; - does "
                 "not fit. As recorded in docs/system.md; <code>python -m kvattic_sim.reports.system</code> computes "
                 f"it anew, which takes minutes.</p>{_text_table(worth, 'Where a drive is worth it')}")
    return _section("systems", (
        "<p>All of this section is modelled: GPU, links, host and drives by docs/system.md, this project's drive by "
        "its timing model. <code>make paper</code> writes the numbers to build/paper.</p>"
        f'<div class="charts">{_chart(report_plots.comparison(modelled.comparisons))}{figures}</div>'
        f"<details><summary>The paper's figures beside the model's, as a table</summary>{_comparisons(modelled)}"
        "</details>"
        f"<details><summary>Parameters of the model, with their sources</summary>{parameters}</details>"
        "<h3>This drive in the paper's place</h3><p>OPT-13B, 1,024 tokens of prompt and as many generated: tokens a "
        f"second.</p>{_text_table(modelled.drive, 'This drive in the place of the paper')}"
        f"<h3>How many times as fast</h3><p>The same load, by <code>make bench BENCH=system.speedup.</code> Both "
        "sides have the same host software: the paper's beside FlexGen and the paper's drive, a driver in user space "
        "beside direct I/O. At batch 256 FlexGen has its best batch, 32. The paper's drive is dense beside dense, "
        "SparF beside the others.</p>"
        f"{_speedups(known)}<h3>Where a drive is worth it</h3>{where}"))


def _figures(found: Sequence[Entry]) -> str:
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(group_of(entry.key), []).append(entry)
    gaps: dict[str, list[Entry]] = {}
    for entry in found:
        if entry.verdict == MISSING:
            gaps.setdefault(entry.command, []).append(entry)
    missing = "<p>Nothing is missing.</p>"
    if gaps:
        rows = [f'<tr><td><code>{escape(order)}</code></td><td class="number">{len(keys)}</td>'
                f'<td class="long">{escape(keys[0].key)}{" and others" if len(keys) > 1 else ""}</td></tr>'
                for order, keys in gaps.items()]
        missing = (f"<details><summary><b class=\"missing\">What is missing, by the command that gives it</b>: "
                   f"{sum(map(len, gaps.values()))} figures</summary>"
                   f"{_table(('command', 'figures', 'such as'), rows, 'What is missing', (1,))}</details>")
    lists = "".join(f"<details><summary><b>{escape(title)}</b>: {_counts(group)}</summary>"
                    f"{_entries(group, title, anchors=True)}</details>" for title, group in groups.items())
    return _section("figures", f"<p>Every key of this version and of the file of figures.</p>{missing}{lists}")


def page(found: Sequence[Entry], modelled: Modelled, stamp: Stamp, *, picture: Picture | None,
         worth: Tabular | None) -> str:
    """The whole page.

    Args:
        found: every key, with its figure or without.
        modelled: what the models say.
        stamp: of what and when it is.
        picture: timeline of the RTL; None: there is none.
        worth: the table of where a drive is worth it; None: it was not found.
    """
    known = {entry.key: entry.value for entry in found if entry.value is not None}
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in SECTIONS)
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><title>kvattic: report</title>'
            f"<style>{CSS}</style></head><body>{_top(found, stamp)}"
            f'<nav aria-label="Sections"><div>{links}</div></nav><main>'
            + _bars(found) + _plots(known) + _timeline(modelled, picture) + _area(found, known) + _errors(found, known)
            + _systems(modelled, worth, known) + _figures(found)
            + "</main><footer>Written by <code>make report</code>. docs/measurements.md explains the figures, "
              "docs/timing.md, docs/cost.md and docs/system.md the models.</footer></body></html>\n")
