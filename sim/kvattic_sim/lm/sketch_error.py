"""How far attention by codes, or by other sketches, is off a real model's, against what it moves and what it stores.

``python -m kvattic_sim.lm.sketch_error`` prints tables of bits, blocks and features, and of the methods beside them:
some minutes. It needs the extra `quality`.

SmolLM2-135M-Instruct attends 4,096 tokens of English text densely; its queries at a few positions are then attended by
each method in every layer and KV head, one selection for the group of three query heads. The error is the RMS of the
outputs' difference to dense attention over that of dense attention's outputs, over all of them together. With `SHORT`
lengths everything lies in flash; with `LONG` ones 255 tokens wait in device DRAM, as many as can, and every method
attends them exactly.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from kvattic_sim.lm.budgets import SINKS
from kvattic_sim.lm.evaluate import Head
from kvattic_sim.lm.methods import (
    CODEWORD_BYTES,
    ELEMENT_BYTES,
    GROUP,
    Centroid,
    Coded,
    Dense,
    Fetched,
    Quest,
    Sketched,
    Sparf,
    Stateless,
)
from kvattic_sim.lm.sketch import BITS, octets
from kvattic_sim.lm.smollm2 import Captured, capture
from kvattic_sim.reports import figures

__all__ = ["CODES", "KEYS", "LONG", "SHARES", "SHORT", "SKETCH", "Error", "at_equal_bytes", "errors", "footprint",
           "grid", "heads", "main", "measure", "ratio", "tables"]

Maker: TypeAlias = Callable[[float], Stateless]

TOKENS = 4096
SHORT = (3328, 3584, 3840, 4096)
LONG = tuple(length - 1 for length in SHORT)
SHARES = (8, 16, 32, 64)
"""Tokens in flash over tokens that are selected."""
SKETCH = Sketched(share=1 / 16, bits=2, block_tokens=256, sinks=SINKS)
"""2 bits for every feature, at other shares."""
CODES = Coded(share=1 / 16, sinks=SINKS, pairs=True)
"""What the figures `sparse.sketch` are of, at other shares: the drive's codes, K and V of a token in one codeword."""
REFERENCE = Sparf(features=8, share=1 / 16)
"""SparF beside it: r = d/8, k = S/16."""
KEYS = ("sparse.sketch.error_ratio", "sparse.sketch.error_ratio.elements", "sparse.sketch.error_ratio.long_tail",
        "sparse.sketch.footprint", "sparse.codes.error_ratio")
"""What `measure` returns."""


@dataclass(frozen=True, slots=True)
class Error:
    """Of one method.

    Attributes:
        error: relative RMS of the outputs.
        flash_bytes: moved, in whole codewords, over dense attention's.
        element_bytes: needed, if elements could be read singly, over dense attention's.
    """

    error: float
    flash_bytes: float
    element_bytes: float


def heads(captured: Captured, lengths: Sequence[int] = SHORT, every: int = 1) -> Iterator[Head]:
    """Decode steps of every layer and KV head, float32.

    Args:
        captured: what the model's attention was given.
        lengths: tokens that each step attends, its own the last of them.
        every: only one layer in so many.

    Raises:
        ValueError: a length is not among the tokens.
    """
    layers, kv_heads, tokens = captured.key.shape[:3]
    if not all(1 <= length <= tokens for length in lengths):
        raise ValueError(f"lengths must be from 1 to {tokens}, not {tuple(lengths)}")
    rows = captured.query.shape[1] // kv_heads
    at = np.array(lengths)
    for layer in range(0, layers, every):
        for head in range(kv_heads):
            query = captured.query[layer, head * rows : (head + 1) * rows][:, at - 1]
            yield Head(query.swapaxes(0, 1).astype(np.float32), captured.key[layer, head].astype(np.float32),
                       captured.value[layer, head].astype(np.float32), at)


def errors(every: Iterable[Head], methods: Mapping[str, Stateless]) -> dict[str, Error]:
    """Errors and bytes of methods.

    Args:
        every: decode steps.
        methods: by name.
    """
    wrong, size, dense_bytes = dict.fromkeys(methods, 0.0), 0.0, 0
    moved = {name: np.zeros(2, np.int64) for name in methods}
    for head in every:
        right = Dense().attend(head.query, head.key, head.value, head.lengths)
        size += float(np.square(right.output, dtype=np.float64).sum())
        dense_bytes += int(right.flash_bytes.sum())
        for name, method in methods.items():
            found = method.attend(head.query, head.key, head.value, head.lengths)
            wrong[name] += float(np.square(found.output - right.output, dtype=np.float64).sum())
            moved[name] += found.flash_bytes.sum(), found.element_bytes.sum()
    return {name: Error(math.sqrt(wrong[name] / size), *(float(x) / dense_bytes for x in moved[name]))
            for name in methods}


def at_equal_bytes(curve: Iterable[Error], wanted: float, elements: bool = False) -> float:
    """The error of a method where it moves a given number of bytes: between two points, by their squares.

    Args:
        curve: its points.
        wanted: bytes over dense attention's.
        elements: whether bytes are those of elements, not of codewords.

    Raises:
        ValueError: no two points have the bytes between them.
    """
    points = sorted((one.element_bytes if elements else one.flash_bytes, one.error) for one in curve)
    for (below, worse), (above, better) in zip(points, points[1:], strict=False):
        if below <= wanted <= above:
            part = (wanted - below) / (above - below) if above > below else 0.0
            return math.sqrt((1 - part) * worse**2 + part * better**2)
    raise ValueError(f"points must have {wanted:.3f} of the bytes between them, not {[one[0] for one in points]}")


def footprint(head_dim: int) -> float:
    """Bytes stored with the drive's codes over those of K and V alone."""
    return 1 + octets(head_dim) * CODEWORD_BYTES / (2 * ELEMENT_BYTES * GROUP * head_dim)


def _curve(apart: bool) -> dict[str, Stateless]:
    """SparF, with and without forced sinks, and codes at points that have its bytes between them.

    Args:
        apart: also codes as the drive reads K and V.
    """
    shares = [n / 256 for n in (6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56)]
    return {"sparf": REFERENCE, "sparf_sinks": replace(REFERENCE, sinks=SINKS),
            **{f"sketch_{share}": replace(CODES, share=share) for share in shares},
            **{f"codes_{share}": replace(CODES, share=share, pairs=False) for share in shares if apart}}


def ratio(found: Mapping[str, Error], elements: bool = False, name: str = "sketch") -> float:
    """A method's error over that of SparF, with or without forced sinks as it is better, at SparF's bytes.

    Args:
        found: errors of ``sparf``, ``sparf_sinks``, and of the method at some shares.
        elements: whether bytes are those of elements, not of codewords.
        name: how the method's names begin: ``sketch``, or ``codes`` as the drive reads K and V.
    """
    sparf = min(found["sparf"], found["sparf_sinks"], key=lambda one: one.error)
    wanted = sparf.element_bytes if elements else sparf.flash_bytes
    return at_equal_bytes((one for key, one in found.items() if key.startswith(name)), wanted, elements) / sparf.error


def measure(progress: Callable[[str], None] = lambda line: None, captured: Captured | None = None) -> dict[str, float]:
    """All figures of `KEYS`.

    Args:
        progress: told what is being done.
        captured: of `TOKENS` tokens, if it is at hand.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    if captured is None:
        progress(f"SmolLM2-135M reads {TOKENS:,} tokens")
        captured = capture(TOKENS)
    progress(f"codes and SparF at {len(SHORT) + len(LONG)} positions of {len(captured.key)} layers")
    short, long = (errors(heads(captured, lengths), _curve(apart)) for lengths, apart in ((SHORT, True), (LONG, False)))
    return {"sparse.sketch.error_ratio": ratio(short), "sparse.sketch.error_ratio.elements": ratio(short, True),
            "sparse.sketch.error_ratio.long_tail": ratio(long),
            "sparse.sketch.footprint": footprint(captured.key.shape[3]),
            "sparse.codes.error_ratio": ratio(short, name="codes")}


def grid() -> dict[str, Maker]:
    """The methods of the tables, by title: each of a share of tokens, for head_dim 64."""

    def sketch(bits: int, block: int, part: Fraction, levels: str = "centres", **more: Any) -> Maker:
        return lambda share: Sketched(share=share, bits=bits, block_tokens=block, features=int(64 * part), sinks=SINKS,
                                      levels=levels, **more)

    found: dict[str, Maker] = {
        "exact scores": lambda share: Sparf(features=64, share=share, sinks=SINKS),
        "SparF, r = d/8": lambda share: Sparf(features=8, share=share),
        "SparF, r = d/8, sinks forced": lambda share: Sparf(features=8, share=share, sinks=SINKS),
        "SparF, r = d/4": lambda share: Sparf(features=16, share=share),
        "fetched, r = d/8": lambda share: Fetched(features=8, share=share),
        "centroid, units of 16": lambda share: Centroid(share=share, sinks=SINKS),
        "Quest, pages of 16": lambda share: Quest(share=share, sinks=SINKS),
        "codes (the drive's)": lambda share: Coded(share=share, sinks=SINKS),
        "codes, K and V of a token in one codeword": lambda share: Coded(share=share, sinks=SINKS, pairs=True),
    }
    parts = ((Fraction(1), ""), (Fraction(1, 2), " of d/2"), (Fraction(1, 4), " of d/4"))
    found |= {f"{bits} bits{words}, blocks of {block}": sketch(bits, block, part)
              for part, words in parts for bits in BITS for block in (64, 256)}
    found |= {f"2 bits of {words} in runs of 8, blocks of 256": sketch(2, 256, part, feature_run=8)
              for part, words in ((Fraction(3, 4), "3d/4"), (Fraction(1, 2), "d/2"))}
    found |= {f"{bits} bits, blocks of {block}, levels on the ends": sketch(bits, block, Fraction(1), "ends")
              for bits in (1, 2, 3, 4) for block in (64, 256)}
    found |= {f"{bits} bits, blocks of 256, sinks by their codes": sketch(bits, 256, Fraction(1), exact_sinks=False)
              for bits in (2, 4)}
    found["2 bits, blocks of 256, not blended"] = sketch(2, 256, Fraction(1), blend=False)
    return found


def tables(captured: Captured) -> Iterator[Table]:
    """Errors and bytes of everything in `grid`, without a tail and with a long one."""
    every = grid()
    methods = {f"{title}|{share}": of(1 / share) for title, of in every.items() for share in SHARES}
    for lengths, words in ((SHORT, "all tokens in flash"), (LONG, "255 tokens in device DRAM")):
        found = errors(heads(captured, lengths), methods)
        table = Table(title=f"Error (bytes needed; moved), {words}")
        for column in ("method", "first pass", *(f"S/{share}" for share in SHARES)):
            table.add_column(column, justify="left" if column == "method" else "right")
        for title in every:
            row = [found[f"{title}|{share}"] for share in SHARES]
            table.add_row(title, f"{row[0].element_bytes - 1 / SHARES[0]:.3f}", *(
                f"{one.error:.3f} ({one.element_bytes:.3f}; {one.flash_bytes:.3f})" for one in row))
        yield table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.parse_args(arguments)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(f"SmolLM2-135M reads {TOKENS:,} tokens", style="dim")
    captured = capture(TOKENS)
    found = measure(lambda line: console.print(line, style="dim"), captured)
    figures.record(found)
    for key, value in found.items():
        console.print(f"{key} {value:.3f}")
    for table in tables(captured):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
