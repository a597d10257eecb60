"""What attention should be: float64 attention, and the floating-point attentions to compare with.

Shapes are (rows, head_dim) for q and (tokens, head_dim) for k and v; everything is one KV head.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.elements import to_bits
from kvattic.formats import Element

__all__ = ["attention", "attention_fp16", "attention_fp32", "fa3", "mask", "relative_rms"]


def mask(
    *,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> NDArray[np.bool_]:
    """Which row attends which of the tokens from base_token to end_token.

    Written token by token from the words of the command's definition, apart from the golden model.

    Args:
        start: integers, (rows,), first token of each row.
        end: integers, (rows,), one past the last token of each row.
        tree: integers, (rows,), bit i: this row attends token tree_token + i.
        tree_token: first token of the draft tree.
        base_token: number of the first token.
        end_token: one past the last valid token.

    Returns:
        bool, (rows, end_token - base_token).
    """
    result = np.zeros((len(start), end_token - base_token), np.bool_)
    for row in range(len(start)):
        first = max(int(start[row]), base_token)
        last = min(int(end[row]), end_token)
        trunk = min(last, tree_token)
        if first < trunk:
            result[row, first - base_token : trunk - base_token] = True
        for draft in range(32):
            token = tree_token + draft
            if first <= token < last and int(tree[row]) >> draft & 1:
                result[row, token - base_token] = True
    return result


def _softmax(
    kind: type[np.floating[Any]],
    q: NDArray[Any],
    k: NDArray[Any],
    scale: float,
    mask: NDArray[np.bool_] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(unnormalised weights, their sums), computed in the type `kind`."""
    q, k = q.astype(kind), k.astype(kind)
    scores = (q @ k.T) * kind(scale)
    if mask is not None:
        scores = np.where(mask, scores, kind(-np.inf))
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    # A row that attends nothing: its weights are zero, not NaN.
    weights = np.exp(scores - np.where(np.isfinite(top), top, kind(0)))
    total = weights.sum(axis=1, keepdims=True)
    return weights, np.where(total > 0, total, kind(1))


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """softmax(scale * q @ k.T) @ v in float64.

    Args:
        q: floats, (rows, head_dim).
        k: floats, (tokens, head_dim).
        v: floats, (tokens, head_dim).
        scale: softmax scale, usually head_dim**-0.5.
        mask: bool, (rows, tokens), what each row attends; all of it if None.

    Returns:
        float64, (rows, head_dim); zero for a row that attends nothing.
    """
    weights, total = _softmax(np.float64, q, k, scale, mask)
    result: NDArray[np.float64] = weights @ v.astype(np.float64) / total
    return result


def attention_fp32(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The same in plain float32 NumPy: what a CPU does.  Arguments as for `attention`."""
    weights, total = _softmax(np.float32, q, k, scale, mask)
    result: NDArray[np.float32] = (weights @ v.astype(np.float32) / total).astype(np.float32)
    return result


def attention_fp16(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float16]:
    """The same as a GPU does it: float32 sums, weights rounded to fp16 before P @ V, fp16 output.

    Arguments as for `attention`.
    """
    weights, total = _softmax(np.float32, q, k, scale, mask)
    rounded = weights.astype(np.float16).astype(np.float32)
    result: NDArray[np.float16] = (rounded @ v.astype(np.float32) / total).astype(np.float16)
    return result


def relative_rms(a: NDArray[Any], reference: NDArray[Any]) -> float:
    """Root mean square of a - reference over that of reference, in float64.

    Args:
        a: floats.
        reference: floats of the same shape, not all zero.
    """
    exact = reference.astype(np.float64)
    return float(np.sqrt(np.square(a.astype(np.float64) - exact).mean() / np.square(exact).mean()))


def fa3(
    shape: tuple[int, ...], rng: np.random.Generator, element: Element = Element.FP16
) -> NDArray[np.uint16]:
    """FlashAttention-3's inputs with outliers: N(0, 1) + N(0, 100) * Bernoulli(0.001), rounded.

    100 is the variance: one entry of a thousand gets a normal term of standard deviation 10.

    Args:
        shape: of the result.
        rng: source of the numbers.
        element: format to round to.

    Returns:
        uint16 bit patterns.
    """
    outliers = rng.standard_normal(shape) * 10 * (rng.random(shape) < 0.001)
    return to_bits(rng.standard_normal(shape) + outliers, element)
