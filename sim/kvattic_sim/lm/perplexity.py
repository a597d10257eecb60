"""What sparse attention costs a real model: bits per byte of English text against bytes moved.

``python -m kvattic_sim.lm.perplexity [--tokens 4096]`` prints the table; it needs the extra `quality`.

SmolLM2-135M-Instruct reads a window of `smollm2.english`, all but the last `STEPS` tokens densely; these are decode
steps by the method in every layer, the true tokens fed in, and count. Tokens behind the last whole group of 256 wait
in device DRAM, as in `methods`: every method but SparQ attends them exactly.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvattic_sim.lm.budgets import CONTENDERS, RATIOS, at_bytes, possible
from kvattic_sim.lm.decoding import Decoder, Prefix, Tokens, load, one_thread
from kvattic_sim.lm.methods import Method, Outcome
from kvattic_sim.lm.smollm2 import english

__all__ = ["STEPS", "Counted", "Point", "main", "point", "surprise"]

STEPS = 256
CONTEXTS = (2048, 4096)
CHUNK = 64
"""Decode steps at once; more of them need more memory and are no faster."""


class Counted(Method):
    """A method that adds up what it moves.

    Args:
        method: which.
    """

    name = "counted"

    def __init__(self, method: Method) -> None:
        self._method = method
        self.flash_bytes = 0
        self.element_bytes = 0

    def decode(self, query: Any, key: Any, value: Any, first: int) -> Outcome:
        """See `Method`."""
        outcome = self._method.decode(query, key, value, first)
        self.flash_bytes += int(outcome.flash_bytes.sum())
        self.element_bytes += int(outcome.element_bytes.sum())
        return outcome


@dataclass(frozen=True, slots=True)
class Point:
    """A method at a number of bytes.

    Attributes:
        bits: per byte of text.
        flash_bytes: moved.
        element_bytes: needed, if elements could be read singly.
    """

    bits: float
    flash_bytes: int
    element_bytes: int


def surprise(logits: NDArray[np.float32], tokens: Tokens) -> float:
    """Bits of some tokens by the logits of them.

    Args:
        logits: float32, (tokens, vocabulary).
        tokens: that came.
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    normal = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return float((normal - wide[np.arange(len(wide)), np.asarray(tokens)]).sum() / math.log(2))


def point(decoder: Decoder, prefix: Prefix, tokens: Tokens, size: int, method: Method, chunk: int = CHUNK) -> Point:
    """A method's bits per byte of text behind a prefix.

    Args:
        decoder: the model.
        prefix: room for the tokens but the last; with queries if the method looks at them.
        tokens: the prefix's last one, and those that are predicted.
        size: bytes of those that are predicted.
        method: which.
        chunk: decode steps at once; as many as there are if the method must see them all together.
    """
    counted = Counted(method)
    begin, bits = prefix.tokens, 0.0
    tokens = np.asarray(tokens)
    try:
        for first in range(0, len(tokens) - 1, chunk):
            part = tokens[first : min(first + chunk, len(tokens) - 1)]
            bits += surprise(decoder.decode(prefix, part, counted), tokens[first + 1 : first + 1 + len(part)])
            prefix.tokens += len(part)
    finally:
        prefix.tokens = begin
    return Point(bits / size, counted.flash_bytes, counted.element_bytes)


def _table(found: Mapping[tuple[str, Fraction], Point], tokens: int) -> Table:
    table = Table(title=f"Bits per byte in contexts of {tokens:,} tokens; flash bytes moved, over dense's")
    table.add_column("method")
    for ratio in RATIOS:
        table.add_column(str(ratio), justify="right")
    whole = found["dense", Fraction(1)]
    table.add_row("dense", *[f"{whole.bits:.4f}"] * len(RATIOS))
    for name, (title, _) in CONTENDERS.items():
        cells = []
        for ratio in RATIOS:
            one = found.get((name, ratio))
            cells.append(f"{one.bits:.4f} ({one.flash_bytes / whole.flash_bytes:.3f})" if one else "")
        if any(cells):
            table.add_row(title, *cells)
    return table


def measure(tokens: int, names: Sequence[str], windows: int, steps: int = STEPS, ratios: Sequence[Fraction] = RATIOS,
            progress: Callable[[str], None] = lambda line: None) -> dict[tuple[str, Fraction], Point]:
    """Points by method and ratio of bytes, dense at 1 among them.

    Args:
        tokens: of a context.
        names: of `budgets.CONTENDERS`.
        windows: how many contexts, one behind the other.
        steps: the last tokens of each, which are decoded.
        ratios: of the bytes.
        progress: told what is being done.

    Raises:
        ImportError: the extra `quality` is not installed.
        ValueError: the text is too short.
        smollm2.WeightsError: the weights are not to be had.
    """
    decoder, tokenizer = load()
    text = tokenizer(english(), add_special_tokens=False).input_ids
    if windows * tokens + 1 > len(text):
        raise ValueError(f"text must have at least {windows * tokens + 1} tokens, not {len(text)}")
    chosen = [("dense", Fraction(1)), *((name, ratio) for name in names for ratio in ratios
                                             if possible(name, ratio, decoder.head_dim))]
    sums: dict[tuple[str, Fraction], list[Point]] = {key: [] for key in chosen}
    for window in range(windows):
        part = text[window * tokens : (window + 1) * tokens + 1]
        prefix = decoder.prefix(tokens, queries="h2o" in names)
        progress(f"window {window + 1}: {tokens - steps} tokens densely")
        decoder.prefill(prefix, part[: tokens - steps])
        size = len(tokenizer.decode(part[tokens - steps + 1 :]).encode())
        for name, ratio in chosen:
            progress(f"window {window + 1}: {name}, {ratio}")
            method = at_bytes(name, ratio, decoder.head_dim)
            sums[name, ratio].append(point(decoder, prefix, part[tokens - steps :], size, method,
                                           steps if name == "h2o" else CHUNK))
    return {key: Point(sum(one.bits for one in each) / windows, sum(one.flash_bytes for one in each),
                       sum(one.element_bytes for one in each)) for key, each in sums.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--tokens", type=int, choices=CONTEXTS, default=CONTEXTS[0],
                        help="of a context (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens that are decoded (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="contexts, one behind the other (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS),
                        metavar="METHOD", help=f"of {', '.join(CONTENDERS)}; all by default")
    args = parser.parse_args(arguments)
    if not 1 <= args.steps < args.tokens:
        parser.error(f"--steps must be from 1 to {args.tokens - 1}, not {args.steps}")
    if args.windows < 1:
        parser.error(f"--windows must be at least 1, not {args.windows}")
    console = Console(width=130 if not sys.stdout.isatty() else None)
    with one_thread():
        found = measure(args.tokens, args.methods, args.windows, args.steps,
                        progress=lambda line: console.print(line, style="dim"))
    console.print(_table(found, args.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
