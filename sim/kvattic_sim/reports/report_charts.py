"""Charts of `make report` as inline SVG, whose colours the page's style sheet sets for light and dark.

All are 440 units wide, so that their text can be read on a phone; names stand above bars and points, not beside them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "Mark", "Points", "Span", "Track", "bars", "legend", "lines", "points", "short", "stacks",
           "timeline"]

WIDTH = 440
LEFT, RIGHT = 46, 12
"""Margins of charts with a y axis."""
ROW = 36
"""Height of a named bar or row of points."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of `bars`.

    Attributes:
        name: above it.
        value: its length.
        text: at the right.
        style: class of its colour, `s0` to `s9`.
        mark: what it should reach; None: nothing.
    """

    name: str
    value: float
    text: str
    style: str = "s0"
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of `points`.

    Attributes:
        value: where.
        style: class of its colour.
        name: what it is.
        radius: of its dot; where several are one, the largest first, so that all are seen.
    """

    value: float
    style: str
    name: str
    radius: float = 5.0


@dataclass(frozen=True, slots=True)
class Points:
    """A row of `points`.

    Attributes:
        name: above it.
        marks: its points.
        text: at the right.
        joined: a line runs from the least to the greatest.
    """

    name: str
    marks: tuple[Mark, ...]
    text: str = ""
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `lines`.

    Attributes:
        name: in the legend.
        points: (x, y).
        style: class of its colour.
        strong: it is drawn thick.
        level: it is a dashed line without points.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    strong: bool = False
    level: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """A time of a `Track`: from, to, class of its colour, whether it is thin, and what it is."""

    start: float
    end: float
    style: str
    thin: bool
    name: str


@dataclass(frozen=True, slots=True)
class Track:
    """A row of `timeline`."""

    name: str
    spans: tuple[Span, ...]


def short(value: float) -> str:
    """A number in about three digits."""
    if value != value or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _box(x: float, y: float, width: float, height: float, style: str, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height:.1f}" '
            f'class="fill {style}">{inner}</rect>')


def _dot(x: float, y: float, radius: float, style: str, tip: str) -> str:
    return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="fill {style}">'
            f"<title>{escape(tip)}</title></circle>")


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">' + "".join(parts)
            + "</svg>")


def _decades(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high on a logarithmic axis, at most so many."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                 for step in steps if low * 0.999 <= step * 10.0 ** power <= high * 1.001]
        if len(found) <= most:
            break
    return found[::-(-len(found) // most)] if found else []


def _round_steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high on a linear axis, about as many."""
    raw = max(high - low, 1e-30) / most
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names beside their colours, as HTML that wraps.

    Args:
        entries: (class of the colour, name).
    """
    items = "".join(f'<li><span class="key {style}"></span>{escape(name)}</li>' for style, name in entries)
    return f'<ul class="legend">{items}</ul>'


def bars(items: Sequence[Bar], label: str, *, reference: tuple[float, str] | None = None) -> str:
    """Bars from zero, each with a tick where it should reach.

    Args:
        items: from above.
        label: what the chart shows, for those who cannot see it.
        reference: a dashed mark in all of them, and its name.
    """
    values = [value for item in items for value in (item.value, item.mark) if value is not None]
    high = max([*values, reference[0] if reference else 0.0, 1e-30])
    scale = (WIDTH - 4) / high
    top = 22 if reference else 4
    parts = []
    for number, item in enumerate(items):
        y = top + number * ROW
        parts += [_text(0, y + 12, item.name), _text(WIDTH, y + 12, item.text, "end", "strong"),
                  _box(0, y + 17, item.value * scale, 12, item.style, f"{item.name}: {item.text}")]
        if item.mark is not None:
            parts.append(_line(item.mark * scale, y + 15, item.mark * scale, y + 31, "mark"))
        if reference:
            parts.append(_line(reference[0] * scale, y + 14, reference[0] * scale, y + 32, "reference"))
    if reference:
        parts.append(_text(min(max(reference[0] * scale, 60), WIDTH - 60), 12, reference[1], "middle", "dim"))
    return _svg(top + len(items) * ROW, parts, label)


def points(rows: Sequence[Points], label: str, *, logarithmic: bool = True, unit: str = "",
           reference: tuple[float, str] | None = None, limits: tuple[float, float] | None = None) -> str:
    """Points on an axis, a row for each name.

    Args:
        rows: from above.
        label: what the chart shows.
        logarithmic: the axis; else linear.
        unit: below the axis.
        reference: a dashed mark in all rows, and its name.
        limits: of the axis; None: what the points need.
    """
    values = [mark.value for row in rows for mark in row.marks] + ([reference[0]] if reference else [])
    low, high = limits or (min(values), max(values))
    if logarithmic:
        low, high = low / 1.15, high * 1.15

    def place(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low))
        return 8 + share * (WIDTH - 16)

    top = 22 if reference else 4
    height = top + len(rows) * ROW
    ticks = _decades(low, high, 7) if logarithmic else _round_steps(low, high)
    parts = [_line(place(tick), top, place(tick), height, "grid") for tick in ticks]
    parts += [_text(place(tick), height + 14, short(tick), "middle", "dim") for tick in ticks]
    if reference:
        parts.append(_text(min(max(place(reference[0]), 60), WIDTH - 60), 12, reference[1], "middle", "dim"))
    for number, row in enumerate(rows):
        y = top + number * ROW
        parts += [_text(0, y + 12, row.name), _text(WIDTH, y + 12, row.text, "end", "strong")]
        if row.joined and len(row.marks) > 1:
            ends = [place(mark.value) for mark in row.marks]
            parts.append(_line(min(ends), y + 23, max(ends), y + 23, f"whisker {row.marks[0].style}"))
        if reference:
            parts.append(_line(place(reference[0]), y + 15, place(reference[0]), y + 31, "reference"))
        parts += [_dot(place(mark.value), y + 23, mark.radius, mark.style,
                       f"{row.name}, {mark.name}: {short(mark.value)}") for mark in row.marks]
    parts.append(_text(WIDTH, height + 30, unit, "end", "dim"))
    return _svg(height + (36 if unit else 20), parts, label)


def lines(found: Sequence[Line], label: str, *, x_name: str, y_name: str) -> str:
    """Lines over two logarithmic axes.

    Args:
        found: what is drawn.
        label: what the chart shows.
        x_name: below the axis.
        y_name: above the other.
    """
    xs = sorted({x for line in found for x, _ in line.points})
    ys = [y for line in found for _, y in line.points]
    low, high = min(ys) / 1.15, max(ys) * 1.15
    top, bottom = 24, 270
    span = math.log(xs[-1] / xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + math.log(x / xs[0]) / span * (WIDTH - LEFT - RIGHT - 8) + 4,
                bottom - math.log(y / low) / math.log(high / low) * (bottom - top))

    parts = [_text(0, 12, y_name, "start", "dim")]
    ticks = _decades(low, high, 8)
    for tick in ticks if len(ticks) > 2 else _round_steps(low, high):
        y = place(xs[0], tick)[1]
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 6, y + 4, short(tick), "end", "dim")]
    parts += [_text(place(x, low)[0], bottom + 16, f"{x:,.0f}", "middle", "dim") for x in xs]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, x_name, "middle", "dim"))
    for line in found:
        at = [place(x, y) for x, y in line.points]
        kind = " ".join(["stroke", line.style, *(["thick"] if line.strong else []), *(["level"] if line.level else [])])
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" class="{kind}"/>')
        if not line.level:
            parts += [_dot(*spot, 3.2, line.style, f"{line.name}, {x_name} {x:,.0f}: {short(y)}")
                      for spot, (x, y) in zip(at, line.points, strict=True)]
    return _svg(bottom + 40, parts, label)


def stacks(rows: Sequence[tuple[str, str, Sequence[float]]], styles: Sequence[str], names: Sequence[str],
           label: str) -> str:
    """Shares of a whole, a bar of equal length for each row.

    Args:
        rows: (name, text at the right, shares).
        styles: class of each share's colour.
        names: of the shares.
        label: what the chart shows.
    """
    parts = []
    for number, (name, text, shares) in enumerate(rows):
        y, x = 4 + number * ROW, 0.0
        parts += [_text(0, y + 12, name), _text(WIDTH, y + 12, text, "end", "strong")]
        for share, style, part in zip(shares, styles, names, strict=True):
            if share > 0:
                parts.append(_box(x, y + 17, share * WIDTH, 12, style, f"{name}, {part}: {share:.1%}"))
            x += share * WIDTH
    return _svg(4 + len(rows) * ROW, parts, label)


def timeline(tracks: Sequence[Track], end: float, unit: str, label: str) -> str:
    """What happened when, a row for each track.

    Args:
        tracks: from above.
        end: of the axis, which begins at 0.
        unit: of the axis.
        label: what the chart shows.
    """
    left = 58
    scale = (WIDTH - left - 14) / end
    height = 6 + 22 * len(tracks)
    ticks = _round_steps(0, end)
    parts = [_line(left + tick * scale, 2, left + tick * scale, height, "grid") for tick in ticks]
    parts += [_text(left + tick * scale, height + 14, short(tick), "middle", "dim") for tick in ticks]
    for number, track in enumerate(tracks):
        y = 4 + 22 * number
        parts.append(_text(0, y + 13, track.name))
        for span in track.spans:
            tall = 4 if span.thin else 14
            parts.append(_box(left + span.start * scale, y + 9 - tall / 2, (span.end - span.start) * scale, tall,
                              span.style, f"{track.name}, {span.name}: {span.start:.1f} to {span.end:.1f} {unit}"))
    parts.append(_text(WIDTH, height + 30, unit, "end", "dim"))
    return _svg(height + 36, parts, label)
