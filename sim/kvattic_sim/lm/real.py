"""What sparse attention does to a real model's attention, and what attention sinks do to sparse attention.

``python -m kvattic_sim.lm.real`` prints the table and keeps the figures in build/bench.json; 3 minutes, and a download
of 93 MB the first time (`smollm2`).  The model runs densely over 4,096 tokens of English text; then each layer's
queries at a few positions attend the tokens up to their own in each way, in float64, one selection for the group of
three query heads of a KV head.  The error is the RMS of the output's difference to dense attention over that of dense
attention's output, over all positions, heads and layers together.

Nothing waits in device DRAM: the newest `LOCAL` tokens are among those that are counted, in every way.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvattic_sim import oracle
from kvattic_sim.lm.smollm2 import Captured, capture
from kvattic_sim.reports import figures

__all__ = ["KEYS", "SHARES", "WAYS", "Step", "Way", "errors", "main", "measure", "quest", "steps"]

Floats = NDArray[np.float64]

TOKENS = 4096
POSITIONS = (3839, 3967, 4031, 4095)
"""Decode steps, by the number of their token."""
LOCAL = 64
SINKS = 16
SHARES = (8, 16, 32)
"""Tokens in a sequence over tokens that are attended, sinks and newest among them."""
UNIT = 16
"""Tokens of a unit of centroids, and of a page of Quest."""
CODEWORD = 4
"""Tokens of a codeword, the units of fetched."""
FIRST_LAYERS = 2
"""Quest keeps that many dense."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A decode step of one KV head, float64.

    Attributes:
        query: (rows, head_dim), before the scaling.
        key: (tokens, head_dim).
        value: (tokens, head_dim).
    """

    query: Floats
    key: Floats
    value: Floats

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1 / math.sqrt(self.query.shape[1])

    def wanted(self, share: int, unit: int) -> int:
        """Units that are `1 / share` of the tokens."""
        return len(self.key) // share // unit


def quest(query: Floats, key: Floats, value: Floats, *, top_units: int, unit_tokens: int, local_tokens: int = 0,
          sinks: int = 0,
          rows: str = "softmax") -> Floats:
    """Quest (arXiv 2406.10774): pages of the highest upper bound of a score, exact attention over them.

    Args:
        query: (rows, head_dim).
        key: (tokens, head_dim).
        value: (tokens, head_dim).
        top_units: pages to attend.
        unit_tokens: tokens of a page; the last one may have fewer.
        local_tokens: the newest tokens, whose pages come first.
        sinks: the first tokens, whose pages come first.
        rows: how a page's bounds become one for the group: `softmax` over the pages, summed, or the plain `sum`.

    Returns:
        (rows, head_dim).
    """
    tokens = len(key)
    begins = np.arange(0, tokens, unit_tokens)
    low, high = np.minimum.reduceat(key, begins, axis=0), np.maximum.reduceat(key, begins, axis=0)
    bounds = (np.maximum(query, 0) @ high.T + np.minimum(query, 0) @ low.T) * query.shape[1] ** -0.5
    forced = (begins < sinks) | (begins + unit_tokens > tokens - local_tokens)
    if rows == "softmax":
        bounds = np.exp(bounds - bounds.max(axis=1, keepdims=True))
        bounds /= bounds.sum(axis=1, keepdims=True)
    rank = np.where(forced, np.inf, bounds.sum(axis=0))
    taken = np.zeros(len(begins), np.bool_)
    taken[np.argsort(-rank, kind="stable")[:top_units]] = True
    attended = np.repeat(taken, unit_tokens)[:tokens]
    return oracle.attention(query, key, value, query.shape[1] ** -0.5, np.broadcast_to(attended, (len(query), tokens)))


@dataclass(frozen=True, slots=True)
class Way:
    """A way of attention.

    Attributes:
        title: for people.
        first_pass: bytes that are read to choose, over those of dense attention.
        attend: (step, share, sinks) -> output.
    """

    title: str
    first_pass: str
    attend: Callable[[Step, int, int], Floats]


def _blended(attend: Callable[..., oracle.Sparse], unit: int, features: int, **more: Any) -> Callable[..., Floats]:
    def way(step: Step, share: int, sinks: int) -> Floats:
        return attend(step.query, step.key, step.value, step.scale, features=step.query.shape[1] // features,
                      top_units=step.wanted(share, unit), local_tokens=LOCAL, sinks=sinks, **more).output

    return way


def _centroid(unit: int) -> Callable[..., Floats]:
    def way(step: Step, share: int, sinks: int) -> Floats:
        # As they are stored.
        centroids = oracle.mean_keys(step.key, unit, sinks).astype(np.float16)
        return oracle.centroid(step.query, step.key, step.value, step.scale, centroids=centroids, unit_tokens=unit,
                               top_units=step.wanted(share, unit), local_tokens=LOCAL, sinks=sinks).output

    return way


def _quest(unit: int, rows: str) -> Callable[..., Floats]:
    def way(step: Step, share: int, sinks: int) -> Floats:
        return quest(step.query, step.key, step.value, top_units=step.wanted(share, unit), unit_tokens=unit,
                     local_tokens=LOCAL,
                     sinks=sinks, rows=rows)

    return way


WAYS = {
    "sparf": Way("SparF, r = d/8", "1/16", _blended(oracle.sparf, 1, 8)),
    "fetched": Way("fetched, r = d/8", "1/16", _blended(oracle.fetched, CODEWORD, 8, unit_tokens=CODEWORD)),
    "centroid": Way("centroid, units of 16", "1/32", _centroid(UNIT)),
    "quest": Way("Quest, pages of 16", "1/16", _quest(UNIT, "softmax")),
    "sparf_4": Way("SparF, r = d/4", "1/8", _blended(oracle.sparf, 1, 4)),
    "fetched_4": Way("fetched, r = d/4", "1/8", _blended(oracle.fetched, CODEWORD, 4, unit_tokens=CODEWORD)),
    "centroid_8": Way("centroid, units of 8", "1/16", _centroid(8)),
    "quest_sum": Way("Quest, pages of 16, bounds summed over the rows", "1/16", _quest(UNIT, "sum")),
    "quest_32": Way("Quest, pages of 32, bounds summed over the rows", "1/32", _quest(32, "sum")),
}
"""By key; those of the first four are figures, at the first share."""
FIGURES = ("sparf", "fetched", "centroid", "quest")
KEYS = tuple(f"sparse.{way}.real_error{end}" for way in FIGURES for end in ("", ".no_sinks"))
"""What `measure` returns."""


def steps(captured: Captured, positions: Sequence[int] = POSITIONS) -> Iterator[tuple[int, Step]]:
    """(layer, decode step) of every layer, KV head and position.

    Raises:
        ValueError: a position is not among the tokens.
    """
    layers, heads, tokens = captured.key.shape[:3]
    if not all(0 <= position < tokens for position in positions):
        raise ValueError(f"positions must be from 0 to {tokens - 1}, not {tuple(positions)}")
    rows = captured.query.shape[1] // heads
    for layer in range(layers):
        for head in range(heads):
            query, key, value = (x.astype(np.float64) for x in (
                captured.query[layer, head * rows : (head + 1) * rows], captured.key[layer, head],
                captured.value[layer, head]))
            for position in positions:
                yield layer, Step(query[:, position], key[: position + 1], value[: position + 1])


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums of squares by layer."""

    wrong: dict[int, float] = field(default_factory=dict)
    size: dict[int, float] = field(default_factory=dict)

    def add(self, layer: int, output: Floats, right: Floats) -> None:
        self.wrong[layer] = self.wrong.get(layer, 0.0) + float(np.square(output - right).sum())
        self.size[layer] = self.size.get(layer, 0.0) + float(np.square(right).sum())

    def error(self, dense_layers: int) -> float:
        wrong = sum(value for layer, value in self.wrong.items() if layer >= dense_layers)
        return math.sqrt(wrong / sum(self.size.values()))


def errors(every: Iterator[tuple[int, Step]], ways: Mapping[str, Way] = WAYS, shares: Sequence[int] = SHARES,
           dense_layers: int = 0) -> dict[tuple[str, int, int, int], float]:
    """Relative RMS errors of outputs.

    Args:
        every: (layer, decode step).
        ways: by key.
        shares: tokens over attended tokens.
        dense_layers: besides all layers sparse, also with so many of the first ones dense.

    Returns:
        By way, share, sinks (`SINKS` or 0) and dense layers (0 and `dense_layers`).
    """
    sums: dict[tuple[str, int, int], _Sums] = {}
    for layer, step in every:
        right = oracle.attention(step.query, step.key, step.value, step.scale)
        for name, way in ways.items():
            for share in shares:
                for sinks in (SINKS, 0):
                    sums.setdefault((name, share, sinks), _Sums()).add(layer, way.attend(step, share, sinks), right)
    return {(*key, dense): found.error(dense) for key, found in sums.items() for dense in {0, dense_layers}}


def _table(found: Mapping[tuple[str, int, int, int], float]) -> Table:
    table = Table(title=f"SmolLM2-135M, {TOKENS:,} tokens: error of outputs with {SINKS} sinks attended; without")
    for column in ("way", "first pass", *(f"S/{share}" for share in SHARES), f"S/8, {FIRST_LAYERS} layers dense"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, way in WAYS.items():
        points = [(share, 0) for share in SHARES] + [(SHARES[0], FIRST_LAYERS)]
        table.add_row(way.title, way.first_pass, *(
            f"{found[name, share, SINKS, dense]:.3f}; {found[name, share, 0, dense]:.3f}" for share, dense in points))
    return table


def measure(progress: Callable[[str], None] = lambda line: None, console: Console | None = None) -> dict[str, float]:
    """All figures of `KEYS`; prints the table of all ways if there is a console.

    Args:
        progress: told what is being done.
        console: for the table.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    progress(f"SmolLM2-135M reads {TOKENS:,} tokens")
    captured = capture(TOKENS)
    progress(f"attention at {len(POSITIONS)} positions of {len(captured.key)} layers")
    if console is None:
        found = errors(steps(captured), {name: WAYS[name] for name in FIGURES}, SHARES[:1])
    else:
        found = errors(steps(captured), dense_layers=FIRST_LAYERS)
        console.print(_table(found))
        console.print(f"The model's loss on the text: {captured.loss:.3f} nats a token.")
    return {f"sparse.{name}.real_error{end}": found[name, SHARES[0], sinks, 0]
            for name in FIGURES for end, sinks in (("", SINKS), (".no_sinks", 0))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.parse_args(arguments)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    figures.record(measure(lambda line: console.print(line, style="dim"), console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
