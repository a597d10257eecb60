"""How exact the golden model is, and how fast.

``python -m kvattic_sim.reports.benches.accuracy`` prints every figure; ``... widths`` the width study of
docs/numerics.md; ``... ratio`` the speed in this process (`golden_ratio` starts it with one BLAS
thread).
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.golden import dense
from kvattic.spec.commands import fp32_bits
from kvattic.spec.elements import Bits, from_bits, to_bits
from kvattic.spec.formats import VALUE_FRACTION, Element
from kvattic_sim import oracle
from kvattic_sim.data import load_minilm

__all__ = [
    "BENCHES",
    "accuracy",
    "drift",
    "errors",
    "fa3_heads",
    "golden_ratio",
    "large_score_heads",
    "large_scores",
    "minilm_heads",
    "widths",
]

Head = tuple[Bits, Bits, Bits]

LENGTHS = tuple(1 << n for n in range(6, 16))
"""64 to 32,768 tokens."""


def attend(
    query: Bits, key: Bits, value: Bits, element: Element = Element.FP16, **limits: Any
) -> dense.Trace:
    """The golden model with the usual scale; every token is attended but for `limits`."""
    rows, tokens = len(query), len(key)
    everything: dict[str, Any] = {
        "start": np.zeros(rows, np.int64),
        "end": np.full(rows, tokens),
        "tree": np.zeros(rows, np.int64),
        "tree_token": tokens,
        "base_token": 0,
        "end_token": tokens,
    }
    return dense.attend(
        query,
        key,
        value,
        element=element,
        scale_bits=fp32_bits(query.shape[1] ** -0.5 / math.log(2)),
        **everything | limits,
    )


def fa3_heads(
    tokens: int,
    heads: int,
    *,
    rows: int = 1,
    head_dim: int = 128,
    element: Element = Element.FP16,
    seed: int = 0,
    outliers: bool = True,
) -> Iterator[Head]:
    """(q, k, v) bit patterns of some heads of the FlashAttention-3 distribution.

    Args:
        tokens: of each head.
        heads: how many.
        rows: query rows of each head.
        head_dim: elements of a token.
        element: format to round to.
        seed: of the random numbers.
        outliers: False for plain N(0, 1).
    """
    rng = np.random.default_rng(seed)
    for _ in range(heads):
        query, key, value = (
            oracle.fa3((n, head_dim), rng, element)
            if outliers
            else to_bits(rng.standard_normal((n, head_dim)), element)
            for n in (rows, tokens, tokens)
        )
        yield query, key, value


def minilm_heads() -> Iterator[Head]:
    """(q, k, v) bit patterns of all heads of the MiniLM data: 512 rows, 512 tokens, head_dim 32."""
    data = load_minilm()
    for layer in range(len(data.q)):
        for head in range(data.q.shape[1]):
            query, key, value = (
                np.ascontiguousarray(x[layer, head]).view(np.uint16)
                for x in (data.q, data.k, data.v)
            )
            yield query, key, value


def errors(heads: Iterator[Head], element: Element = Element.FP16) -> dict[str, float]:
    """Relative RMS errors against float64 over all heads together.

    Args:
        heads: (q, k, v) bit patterns.
        element: their format.

    Returns:
        rel_rms (golden model), float32 (plain NumPy) and fp16 (GPU fashion).
    """
    results: dict[str, list[NDArray[np.float64]]] = {
        "exact": [],
        "rel_rms": [],
        "float32": [],
        "fp16": [],
    }
    for query, key, value in heads:
        q, k, v = (from_bits(x, element) for x in (query, key, value))
        scale = q.shape[1] ** -0.5
        results["exact"].append(oracle.attention(q, k, v, scale))
        results["rel_rms"].append(attend(query, key, value, element).partial.output)
        results["float32"].append(oracle.attention_fp32(q, k, v, scale).astype(np.float64))
        results["fp16"].append(oracle.attention_fp16(q, k, v, scale).astype(np.float64))
    exact = np.concatenate(results.pop("exact"))
    return {name: oracle.relative_rms(np.concatenate(got), exact) for name, got in results.items()}


def drift(head_dim: int = 128) -> tuple[float, bool]:
    """Equal scores over 64 to 32,768 tokens: the answer is the plain mean of V.

    Returns:
        (largest relative error of any output at any length, whether every sum of weights is
        exactly the number of tokens).
    """
    rng = np.random.default_rng(0)
    query = to_bits(rng.standard_normal((1, head_dim)), Element.FP16)
    token = to_bits(rng.standard_normal((1, head_dim)), Element.FP16)
    worst, exact = 0.0, True
    for tokens in LENGTHS:
        value = to_bits(rng.standard_normal((tokens, head_dim)), Element.FP16)
        trace = attend(query, np.repeat(token, tokens, axis=0), value)
        # Sums of 32,768 fp16 numbers are exact in float64.
        mean = from_bits(value, Element.FP16).astype(np.float64).sum(axis=0) / tokens
        worst = max(worst, float(np.abs(trace.partial.output[0] / mean - 1).max()))
        exact = exact and int(trace.denominator[0]) == tokens << VALUE_FRACTION
    return worst, exact


def accuracy() -> dict[str, float]:
    """Relative RMS errors of golden, float32 and fp16 attention on each data set, and the drift."""
    sets = {
        "minilm": minilm_heads(),
        "fa3_2k": fa3_heads(2048, 32),
        "fa3_32k": fa3_heads(32768, 8),
    }
    report = {}
    for name, heads in sets.items():
        for kind, error in errors(heads).items():
            report[f"accuracy.{kind}.{name}"] = error
    worst, exact = drift()
    report |= large_scores()
    return report | {"accuracy.drift": worst, "accuracy.drift_sum_exact": float(exact)}


def large_score_heads(common: float, element: Element, *, tokens: int = 1024, heads: int = 8, head_dim: int = 128,
                      seed: int = 0) -> Iterator[Head]:
    """(q, k, v) bit patterns whose scores have a common part, as biases of q and K make it, and a spread of a few bits.

    Args:
        common: that part, in the log2 domain; four features carry it.
        element: format to round to.
        tokens: of each head.
        heads: how many.
        head_dim: elements of a token.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    bias = math.sqrt(common * math.log(2) * math.sqrt(head_dim) / 4)
    for _ in range(heads):
        q, k, v = (rng.standard_normal((n, head_dim)) for n in (4, tokens, tokens))
        q[:, -4:] = k[:, -4:] = bias
        yield to_bits(q, element), to_bits(k, element), to_bits(v, element)


def large_scores() -> dict[str, float]:
    """Errors with a common part of the scores from 0 to 2**17: golden's largest, float32's least, over both formats."""
    worst, single = 0.0, math.inf
    for element in Element:
        for common in (0.0, *(2.0**power for power in range(9, 18))):
            found = errors(large_score_heads(common, element), element)
            worst, single = max(worst, found["rel_rms"]), min(single, found["float32"])
    return {"accuracy.large_scores": worst, "accuracy.large_scores.float32": single}


def _seconds(function: Callable[[], object], repeats: int = 5) -> float:
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


def _ratio() -> dict[str, float]:
    """The work of `golden_ratio`, in a process with one BLAS thread."""
    rng = np.random.default_rng(0)
    heads = [
        tuple(to_bits(rng.standard_normal((n, 128)), Element.FP16) for n in (1, 2048, 2048))
        for _ in range(40)
    ]

    def exact() -> None:
        for query, key, value in heads:
            attend(query, key, value)

    def single() -> None:
        for query, key, value in heads:
            q, k, v = (from_bits(x, Element.FP16) for x in (query, key, value))
            oracle.attention_fp32(q, k, v, 128**-0.5)

    floats = [tuple(from_bits(x, Element.FP16) for x in head) for head in heads]

    def converted() -> None:
        for q, k, v in floats:
            oracle.attention_fp32(q, k, v, 128**-0.5)

    golden_seconds, numpy_seconds, converted_seconds = map(_seconds, (exact, single, converted))
    return {
        "golden.ratio_to_numpy": golden_seconds / numpy_seconds,
        "golden.ratio_to_numpy_converted": golden_seconds / converted_seconds,
        "golden.seconds": golden_seconds,
    }


def golden_ratio() -> dict[str, float]:
    """Time of the golden model over that of float32 NumPy: 40 heads, 2,048 tokens, head_dim 128.

    One row each, both on one thread and from the same fp16 bit patterns; `..._converted` does not
    count NumPy's conversion to float32.  `golden.seconds` is the golden model's for the batch.
    """
    environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}
    output = subprocess.run(
        [sys.executable, "-m", "kvattic_sim.reports.benches.accuracy", "ratio"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    report: dict[str, float] = json.loads(output)
    return report


def _simulated(
    q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], bits: int
) -> NDArray[np.float64]:
    """float64 attention, but with scores rounded to `bits` fractional bits, weights to `bits` bits.

    The result is rounded to fp32.
    """
    scores = np.rint(q @ k.T * (q.shape[1] ** -0.5 / math.log(2)) * 2.0**bits) / 2.0**bits
    fraction, exponent = np.frexp(np.exp2(scores - scores.max(axis=1, keepdims=True)))
    weights = np.ldexp(np.rint(fraction * 2.0**bits), exponent - bits)
    result: NDArray[np.float64] = (
        (weights @ v / weights.sum(axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    )
    return result


def widths() -> dict[str, float]:
    """Errors in a float simulation with 20, 22 and 24 bits for the score's fraction and the weight.

    Keys are widths.<data>.<tokens>.<20, 22, 24, float32 or golden>.  Each is the median of the
    relative RMS error over 32 heads of one row: over all heads together, the few rows of the
    FlashAttention-3 data that one outlier dominates would hide the others.
    """
    report = {}
    for data, outliers in (("normal", False), ("fa3", True)):
        for tokens in (64, 512, 1024, 2048):
            found: dict[str, list[float]] = {}
            for head in fa3_heads(tokens, 32, outliers=outliers):
                q, k, v = (from_bits(x, Element.FP16).astype(np.float64) for x in head)
                scale = q.shape[1] ** -0.5
                exact = oracle.attention(q, k, v, scale)
                results = {str(bits): _simulated(q, k, v, bits) for bits in (20, 22, 24)}
                results["float32"] = oracle.attention_fp32(q, k, v, scale).astype(np.float64)
                results["golden"] = attend(*head).partial.output
                for name, got in results.items():
                    found.setdefault(name, []).append(oracle.relative_rms(got, exact))
            for name, errors_found in found.items():
                report[f"widths.{data}.{tokens}.{name}"] = float(np.median(errors_found))
    return report


BENCHES: dict[str, Callable[[], dict[str, float]]] = {"accuracy": accuracy, "golden": golden_ratio}
"""What the bench runner calls: prefix of the keys -> function."""


def main() -> None:
    """Print the figures as JSON."""
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    if what == "ratio":
        report = _ratio()
    elif what == "widths":
        report = widths()
    else:
        report = accuracy() | golden_ratio()
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
