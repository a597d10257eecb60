"""What a format of K and V costs a real model: errors of attention and bits per byte, with and without a rotation.

``python -m kvattic_sim.lm.kv_formats`` prints the table and keeps the figures in build/bench.json; some minutes. It
needs the extra `quality`.

SmolLM2-135M-Instruct reads English text with K and V rounded as they would be stored, those of each token itself
included. q8_0 and q4_0 are rounded by GGUF's reference (`gguf.quants`), fp8 by torch, as vLLM stores them. The errors
are of the attention of every layer and KV head at a few positions, as in `sketch_error`, against dense attention over
K and V in fp16.

The rotation is an orthonormal Hadamard matrix: q and k are multiplied by it, which changes no score, and v, whose
outputs are turned back. It spreads an outlier over all features, so that the others of its block keep their bits.

All of this is arithmetic in NumPy and torch. Of these formats the drive stores those that docs/formats.md names.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvattic_sim.lm.evaluate import Head
from kvattic_sim.lm.methods import Dense, Sparf, Stateless
from kvattic_sim.lm.perplexity import surprise
from kvattic_sim.lm.sketch_error import SHORT, heads
from kvattic_sim.lm.smollm2 import Captured, capture, english, load
from kvattic_sim.reports import figures

__all__ = ["FORMATS", "ROWS", "Cost", "Format", "Stored", "bits_per_byte", "errors", "hadamard", "main"]

Floats = NDArray[np.float32]

TOKENS = 4096
COUNTED = 2048
"""The last tokens, whose bits count."""
FP8_SCALED = 448.0
"""The largest number of e4m3: what the largest of a head becomes where it is scaled."""
ROUNDS_DOWN = 2**-5
"""How far above fp8's largest number one may be that is rounded to it: less than half a step."""
SPARF = Sparf(features=8, share=1 / 16)
"""r = d/8, k = S/16."""


@dataclass(frozen=True, slots=True)
class Format:
    """How elements are stored.

    Attributes:
        bits: of an element, its share of the scales included, at 64 features.
        round: K or V of a layer, float32 (heads, tokens, head_dim), as they come back.
    """

    bits: float
    round: Callable[[Floats], Floats]


def _fp16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _fp8(name: str, scaled: bool = False) -> Callable[[Floats], Floats]:
    def rounded(values: Floats) -> Floats:
        import torch

        scale = np.abs(values).max(axis=(1, 2), keepdims=True) / np.float32(FP8_SCALED) if scaled else np.float32(1)
        kind = getattr(torch, name)
        parts = np.asarray(values / scale, np.float32)
        if np.abs(parts).max() > torch.finfo(kind).max * (1 + ROUNDS_DOWN):
            raise ValueError(f"{name} must hold all elements: one of {np.abs(parts).max():.0f} is too large")
        stored = torch.from_numpy(parts).to(kind).float().numpy()
        return np.asarray(stored * scale, np.float32)

    return rounded


def _int8(values: Floats) -> Floats:
    """A scale for each token and head."""
    scale = np.abs(values).max(axis=2, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
    return np.asarray(codes * scale, np.float32)


def _gguf(name: str) -> Callable[[Floats], Floats]:
    def rounded(values: Floats) -> Floats:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quantize

        kind = GGMLQuantizationType[name]
        return np.asarray(dequantize(quantize(np.ascontiguousarray(values, np.float32), kind), kind), np.float32)

    return rounded


FORMATS = {
    "fp16": Format(16, _fp16),
    "fp8_e4m3": Format(8, _fp8("float8_e4m3fn")),
    "fp8_e4m3, scaled": Format(8, _fp8("float8_e4m3fn", scaled=True)),
    "fp8_e5m2": Format(8, _fp8("float8_e5m2")),
    "int8": Format(8 + 32 / 64, _int8),
    "q8_0": Format(8.5, _gguf("Q8_0")),
    "q4_0": Format(4.5, _gguf("Q4_0")),
}
"""By name.  fp8's scale is 1, as the serving libraries' by default, or such that a head's largest element just fits;
int8's is an fp32 for each token and head."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How a sequence is stored.

    Attributes:
        key: one of `FORMATS`.
        value: likewise.
        rotated: by the Hadamard matrix before.
    """

    key: str
    value: str
    rotated: bool = False

    @property
    def bits(self) -> float:
        """Of an element, on average."""
        return (FORMATS[self.key].bits + FORMATS[self.value].bits) / 2

    @property
    def title(self) -> str:
        """Of a table's row."""
        return (self.key if self.key == self.value else f"K {self.key}, V {self.value}") + (
            ", rotated" if self.rotated else "")

    def store(self, query: Floats, key: Floats, value: Floats) -> tuple[Floats, Floats, Floats]:
        """(query, key, value), float32 (heads, tokens, head_dim), as attention meets them; outputs must be `turned`."""
        query, key, value = (turned(x) if self.rotated else x for x in (query, key, value))
        return _fp16(query), FORMATS[self.key].round(_fp16(key)), FORMATS[self.value].round(_fp16(value))


ROWS = (
    *(Stored(name, name, rotated) for name in FORMATS for rotated in (False, True) if not (name == "fp16" and rotated)),
    *(Stored("q8_0", "q4_0", rotated) for rotated in (False, True)),
)
"""Of the table."""


@cache
def hadamard(size: int) -> Floats:
    """The orthonormal Hadamard matrix of Sylvester's construction; its own inverse.

    Args:
        size: a power of two.

    Returns:
        float32, (size, size).
    """
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if len(matrix) != size:
        raise ValueError(f"size must be a power of two, not {size}")
    return np.asarray(matrix / math.sqrt(size), np.float32)


def turned(values: Floats) -> Floats:
    """Vectors times the Hadamard matrix: turned, or back again."""
    return np.asarray(values @ hadamard(values.shape[-1]), np.float32)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a row.

    Attributes:
        dense: relative RMS error of dense attention's outputs.
        sparf: of SparF's at `SPARF`.
        bits_per_byte: of the text.
    """

    dense: float
    sparf: float
    bits_per_byte: float


def errors(every: Iterator[Head], stored: Sequence[Stored]) -> list[tuple[float, float]]:
    """Relative RMS errors of dense attention and of SparF over stored K and V, against dense attention over fp16.

    Args:
        every: decode steps.
        stored: rows.
    """
    methods: tuple[Stateless, ...] = (Dense(), SPARF)
    wrong, size = np.zeros((len(stored), len(methods))), 0.0
    for head in every:
        right = Dense().attend(head.query, head.key, head.value, head.lengths).output
        size += float(np.square(right, dtype=np.float64).sum())
        for row, how in enumerate(stored):
            query, key, value = how.store(head.query, head.key[None], head.value[None])
            for column, method in enumerate(methods):
                found = method.attend(query, key[0], value[0], head.lengths).output
                found = turned(np.asarray(found, np.float32)) if how.rotated else found
                wrong[row, column] += float(np.square(found - right, dtype=np.float64).sum())
    return [(float(dense), float(sparf)) for dense, sparf in np.sqrt(wrong / size)]


def bits_per_byte(stored: Sequence[Stored], tokens: int = TOKENS, counted: int = COUNTED,
                  progress: Callable[[str], None] = lambda line: None) -> list[float]:
    """Bits per byte of the last tokens of the text, all K and V of the model stored so.

    Args:
        stored: rows; a forward pass for each.
        tokens: that the model reads.
        counted: the last ones of them.
        progress: told what is being done.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    current: list[Stored] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float,
               **rest: Any) -> tuple[Any, None]:
        del module, mask, rest
        arrays = current[-1].store(*(x[0].numpy() for x in (query, key, value)))
        output = torch.nn.functional.scaled_dot_product_attention(
            *(torch.from_numpy(x)[None] for x in arrays), is_causal=True, enable_gqa=True, scale=scaling)
        if current[-1].rotated:
            output = output @ torch.from_numpy(hadamard(output.shape[-1]))
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("kvattic_formats", attend)
    AttentionMaskInterface.register("kvattic_formats", lambda *arguments, **keywords: None)   # it is causal by itself
    tokenizer, model = load("kvattic_formats")
    numbers = tokenizer(english(), add_special_tokens=False, return_tensors="pt").input_ids[:, : tokens + 1]
    if numbers.shape[1] <= tokens:
        raise ValueError(f"text must have more than {tokens} tokens, not {numbers.shape[1]}")
    predicted = numbers[0, -counted:]
    size = len(tokenizer.decode(predicted).encode())
    found = []
    with torch.inference_mode():
        for how in stored:
            progress(f"{tokens} tokens, {how.title}")
            current.append(how)
            logits = model(numbers[:, :-1], use_cache=False, logits_to_keep=counted).logits[0]
            found.append(surprise(logits.numpy(), predicted.numpy()) / size)
    return found


def measure(captured: Captured | None = None, progress: Callable[[str], None] = lambda line: None,
            stored: Sequence[Stored] = ROWS, tokens: int = TOKENS) -> dict[Stored, Cost]:
    """Errors and bits of all rows.

    Args:
        captured: what the model's attention is given, if it is at hand.
        progress: told what is being done.
        stored: rows.
        tokens: that the model reads.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    if captured is None:
        progress(f"SmolLM2-135M reads {tokens:,} tokens")
        captured = capture(tokens)
    progress("errors of attention")
    wrong = errors(heads(captured, [length for length in SHORT if length <= tokens]), stored)
    bits = bits_per_byte(stored, tokens, min(COUNTED, tokens // 2), progress)
    return {how: Cost(*each, of) for how, each, of in zip(stored, wrong, bits, strict=True)}


def keys(found: dict[Stored, Cost]) -> dict[str, float]:
    """Figures of the rows whose K and V have one format."""
    result: dict[str, float] = {}
    for how, cost in found.items():
        if how.key == how.value and "," not in how.key:
            name = f"format.{how.key}" + (".rotated" if how.rotated else "")
            result |= {f"{name}.error": cost.dense, f"{name}.bits_per_byte": cost.bits_per_byte}
    return result


def _table(found: dict[Stored, Cost]) -> Table:
    table = Table(title=f"K and V of SmolLM2-135M in each format; bits per byte of {COUNTED:,} tokens behind as many")
    for column in ("K and V", "bits an element", "of fp16", "error, dense", "error, SparF S/16", "bits per byte"):
        table.add_column(column, justify="left" if column == "K and V" else "right")
    for how, cost in found.items():
        table.add_row(how.title, f"{how.bits:g}", f"{how.bits / 16:.3f}", f"{cost.dense:.4f}", f"{cost.sparf:.3f}",
                      f"{cost.bits_per_byte:.4f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.parse_args(arguments)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    found = measure(progress=lambda line: console.print(line, style="dim"))
    figures.record(keys(found))
    console.print(_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
