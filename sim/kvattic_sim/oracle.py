"""What attention should be: float64 attention, and the floating-point attentions to compare with.

Shapes are (rows, head_dim) for q and (tokens, head_dim) for k and v; everything is one KV head.

`sparf`, `fetched`, `centroid` and `codes` are the sparse modes as docs/sparse.md defines them, in float64, apart from
the golden model.  `sparq` is the algorithm that the first of them should be, written from its paper.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.spec.elements import to_bits
from kvattic.spec.formats import Element

__all__ = [
    "Sparse",
    "attention",
    "attention_fp16",
    "attention_fp32",
    "centroid",
    "codes",
    "fa3",
    "fetched",
    "mask",
    "mean_keys",
    "relative_rms",
    "sparf",
    "sparq",
]


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse:
    """Sparse attention with what it chose.

    Attributes:
        features: (r,), ascending: features that the first pass reads; none in `centroid` and `codes`.
        scale: float64, (rows,), each row's scale of the first pass.
        probability: float64, (rows, tokens), approximate softmax; in `centroid` (rows, units).
        mass: float64, (units,), its sum over the rows and the unit's tokens.
        forced: bool, (units,), units that hold a sink, touch the local window or are not full.
        selected: bool, (units,).
        attended: bool, (rows, tokens), what the second pass attends.
        alpha: float64, (rows,).
        exact: float64, (rows, head_dim), attention over what is selected.
        output: float64, (rows, head_dim), blended with the mean.
    """

    features: NDArray[np.int64]
    scale: NDArray[np.float64]
    probability: NDArray[np.float64]
    mass: NDArray[np.float64]
    forced: NDArray[np.bool_]
    selected: NDArray[np.bool_]
    attended: NDArray[np.bool_]
    alpha: NDArray[np.float64]
    exact: NDArray[np.float64]
    output: NDArray[np.float64]


def sparf(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    *,
    features: int,
    top_units: int,
    mean: NDArray[Any] | None = None,
    local_tokens: int = 0,
    sinks: int = 0,
    mask: NDArray[np.bool_] | None = None,
    tail: NDArray[np.bool_] | None = None,
) -> Sparse:
    """SPARF: tokens of the largest approximate mass, exact attention over them, blended with the mean of V.

    Args:
        q: floats, (rows, head_dim).
        k: floats, (tokens, head_dim).
        v: floats, (tokens, head_dim).
        scale: softmax scale, usually head_dim**-0.5.
        features: how many the first pass reads.
        top_units: tokens to select; those of the tail come on top.
        mean: floats, (head_dim,) or (rows, head_dim), the mean of V that is blended in; None: of what each row attends.
        local_tokens: the newest tokens, which are selected first.
        sinks: the first tokens, which are selected first, too.
        mask: bool, (rows, tokens), what each row attends; all of it if None.
        tail: bool, (tokens,), tokens that are scored exactly and always attended; none if None.
    """
    return fetched(q, k, v, scale, features=features, top_units=top_units, unit_tokens=1, mean=mean,
                   local_tokens=local_tokens, sinks=sinks,
                   mask=mask, tail=tail)


def fetched(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    *,
    features: int,
    top_units: int,
    unit_tokens: int,
    mean: NDArray[Any] | None = None,
    local_tokens: int = 0,
    sinks: int = 0,
    mask: NDArray[np.bool_] | None = None,
    tail: NDArray[np.bool_] | None = None,
) -> Sparse:
    """FETCHED: as `sparf`, with units of several tokens, all of which are attended and count in alpha.

    Args:
        q: as in `sparf`, and so are the others.
        k: floats, (tokens, head_dim).
        v: floats, (tokens, head_dim).
        scale: softmax scale.
        features: how many the first pass reads.
        top_units: units to select.
        unit_tokens: tokens of a unit; the last one may have fewer.
        mean: as in `sparf`.
        local_tokens: the newest tokens: units that touch them come first.
        sinks: the first tokens: units that hold one of them come first, too.
        mask: bool, (rows, tokens).
        tail: bool, (tokens,), whole units.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    seen, late = _everything(len(q), len(k), mask, tail)
    size = np.abs(q).sum(axis=0)
    chosen = np.array(sorted(sorted(range(len(size)), key=lambda c: (-size[c], c))[:features]))
    part, whole = np.abs(q[:, chosen]).sum(axis=1), np.abs(q).sum(axis=1)
    ratio = np.divide(whole, part, out=np.ones_like(whole), where=part > 0)
    scales = scale * np.sqrt(ratio)
    scores = np.where(late, q @ k.T * scale, q[:, chosen] @ k[:, chosen].T * scales[:, None])
    return _blended(q, k, v, scale, chosen, scales, scores, unit_tokens, top_units, mean, local_tokens, sinks, seen,
                    late)


def codes(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    *,
    estimate: NDArray[Any],
    top_units: int,
    mean: NDArray[Any] | None = None,
    local_tokens: int = 0,
    sinks: int = 0,
    codeword_tokens: int = 1,
    mask: NDArray[np.bool_] | None = None,
    tail: NDArray[np.bool_] | None = None,
) -> Sparse:
    """CODES: as `sparf`, but the first pass scores by what codes stand for, and sinks exactly.

    Args:
        q: as in `sparf`, and so are the others.
        k: floats, (tokens, head_dim).
        v: floats, (tokens, head_dim).
        scale: softmax scale.
        estimate: floats, (tokens, head_dim), base + step * code of each key.
        top_units: tokens to select; those of the tail come on top.
        mean: as in `sparf`.
        local_tokens: the newest tokens, which are selected first.
        sinks: the first tokens, which are selected first, too.
        codeword_tokens: tokens of a codeword, all of which are scored exactly if one is a sink.
        mask: bool, (rows, tokens).
        tail: bool, (tokens,).
    """
    q, k, v, estimate = (np.asarray(x, np.float64) for x in (q, k, v, estimate))
    seen, late = _everything(len(q), len(k), mask, tail)
    exactly = late | (np.arange(len(k)) // codeword_tokens * codeword_tokens < sinks)
    scores = q @ np.where(exactly[:, None], k, estimate).T * scale
    return _blended(q, k, v, scale, np.zeros(0, np.int64), np.full(len(q), scale), scores, 1, top_units, mean,
                    local_tokens, sinks, seen, late)


def _blended(
    q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], scale: float, features: NDArray[np.int64],
    scales: NDArray[np.float64], scores: NDArray[np.float64], unit_tokens: int, top_units: int,
    mean: NDArray[Any] | None, local_tokens: int, sinks: int, seen: NDArray[np.bool_], late: NDArray[np.bool_]
) -> Sparse:
    """Selection by approximate scores, (rows, tokens), exact attention over it, and the blend."""
    means = _mean(v, seen) if mean is None else np.broadcast_to(np.asarray(mean, np.float64), q.shape)
    probability = _probabilities(scores, seen)
    units_seen = _units(probability, unit_tokens)
    forced, selected = _choose(units_seen, unit_tokens, top_units, local_tokens, sinks, late)
    taken = np.repeat(selected, unit_tokens)[: len(k)] | late
    share = (probability * taken).sum(axis=1)
    # What attends nothing has no share in anything, and is zero.
    everything = not (~selected & ~late[::unit_tokens]).any()
    alpha = np.where(everything | ~seen.any(axis=1), 1.0, share)
    exact = attention(q, k, v, scale, seen & taken)
    return Sparse(
        features=features, scale=scales, probability=probability, mass=units_seen, forced=forced, selected=selected,
        attended=seen & taken, alpha=alpha, exact=exact, output=alpha[:, None] * exact + (1 - alpha[:, None]) * means)


def centroid(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scale: float,
    *,
    centroids: NDArray[Any],
    top_units: int,
    unit_tokens: int,
    local_tokens: int = 0,
    sinks: int = 0,
    mask: NDArray[np.bool_] | None = None,
    tail: NDArray[np.bool_] | None = None,
) -> Sparse:
    """CENTROID: units whose mean keys have the largest softmax, all of whose tokens are attended; not blended.

    Args:
        q: as in `fetched`, and so are the others.
        k: floats, (tokens, head_dim).
        v: floats, (tokens, head_dim).
        scale: softmax scale.
        centroids: floats, (units, head_dim), mean keys; see `mean_keys`.
        top_units: units to select.
        unit_tokens: tokens of a unit; the last one may have fewer.
        local_tokens: the newest tokens: units that touch them come first.
        sinks: the first tokens: units that hold one of them come first, too.
        mask: bool, (rows, tokens); a row scores the mean keys of units of which it attends any token.
        tail: bool, (tokens,), whole units, which are always attended and have no score.
    """
    q, k, v, centroids = (np.asarray(x, np.float64) for x in (q, k, v, centroids))
    seen, late = _everything(len(q), len(k), mask, tail)
    visible = _units(seen & ~late, unit_tokens, rows=True) > 0
    probability = _probabilities(q @ centroids.T * scale, visible)
    mass = probability.sum(axis=0)
    forced, selected = _choose(mass, unit_tokens, top_units, local_tokens, sinks, late)
    taken = np.repeat(selected, unit_tokens)[: len(k)] | late
    exact = attention(q, k, v, scale, seen & taken)
    return Sparse(
        features=np.zeros(0, np.int64), scale=np.full(len(q), scale), probability=probability, mass=mass, forced=forced,
        selected=selected, attended=seen & taken, alpha=np.ones(len(q)), exact=exact, output=exact)


def mean_keys(k: NDArray[Any], unit_tokens: int, sinks: int = 0) -> NDArray[np.float64]:
    """Mean key of each unit of consecutive tokens.

    Attention sinks have keys unlike all others, and would hide what else is in their unit; so they are left out. A unit
    of nothing but sinks has the mean of them: it is always selected, whatever its score.

    Args:
        k: floats, (tokens, head_dim).
        unit_tokens: tokens of a unit; the last one may have fewer.
        sinks: the first tokens.

    Returns:
        float64, (units, head_dim).
    """
    k = np.asarray(k, np.float64)
    result = []
    for begin in range(0, len(k), unit_tokens):
        end = min(begin + unit_tokens, len(k))
        result.append(k[sinks if begin < sinks < end else begin : end].mean(axis=0))
    return np.array(result).reshape(-1, k.shape[1])


def _mean(v: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of V over what each row attends, (rows, head_dim); zero for a row that attends nothing."""
    result: NDArray[np.float64] = seen @ v / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    return result


def _everything(
    rows: int, tokens: int, mask: NDArray[np.bool_] | None, tail: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Mask and tail, where they are None: all, and none."""
    return (np.ones((rows, tokens), np.bool_) if mask is None else mask,
            np.zeros(tokens, np.bool_) if tail is None else tail)


def _probabilities(scores: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Softmax; zero for a row that sees nothing."""
    top = np.where(seen, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.where(seen, np.exp(np.where(seen, scores - np.where(np.isfinite(top), top, 0), -np.inf)), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    result: NDArray[np.float64] = weights / np.where(total > 0, total, 1)
    return result


def _units(values: NDArray[Any], unit_tokens: int, *, rows: bool = False) -> NDArray[np.float64]:
    """Sum of (rows, tokens) over each unit's tokens, and over the rows unless they are kept."""
    short = -values.shape[1] % unit_tokens
    padded = np.pad(values.astype(np.float64), ((0, 0), (0, short)))
    total: NDArray[np.float64] = padded.reshape(len(values), -1, unit_tokens).sum(axis=2)
    return total if rows else total.sum(axis=0)


def _choose(
    mass: NDArray[np.float64], unit_tokens: int, top_units: int, local_tokens: int, sinks: int, late: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(forced, selected): the units of the largest mass, the lower one of equals, forced ones before all others."""
    begin = np.arange(len(mass)) * unit_tokens
    forced = (begin < sinks) | (begin + unit_tokens > len(late) - local_tokens)
    candidates = [u for u in range(len(mass)) if not late[u * unit_tokens]]
    best = sorted(candidates, key=lambda u: (not forced[u], 0.0 if forced[u] else -mass[u], u))[:top_units]
    selected = np.zeros(len(mass), np.bool_)
    selected[best] = True
    return forced, selected


def sparq(
    q: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], mean: NDArray[Any], *, r: int, k: int,
    local_tokens: int = 0
) -> NDArray[np.float64]:
    """SparQ Attention, Algorithm 1 of arXiv 2312.04985, for a group of queries that share a KV head.

    Written from the paper and apart from everything else here.  In the grouped form |q| and the approximate scores are
    summed over the group before the two top-k, so that K and V are read once.

    Args:
        q: floats, (group, d_h).
        keys: floats, (S, d_h).
        values: floats, (S, d_h).
        mean: floats, (d_h,), the running mean of V.
        r: components of q.
        k: tokens.
        local_tokens: the paper's l: tokens of the local window, which are among the k.

    Returns:
        float64, (group, d_h).
    """
    q, keys, values, mean = (np.asarray(x, np.float64) for x in (q, keys, values, mean))
    tokens, d_h = keys.shape
    i1 = np.argpartition(np.abs(q).sum(axis=0), -r)[-r:]
    tau = np.sqrt(d_h * np.linalg.norm(q[:, i1], 1, axis=1) / np.linalg.norm(q, 1, axis=1))
    logits = np.einsum("gc,sc->gs", q[:, i1], keys[:, i1]) / tau[:, None]
    s_hat = np.exp(logits - logits.max(axis=1, keepdims=True))
    s_hat /= s_hat.sum(axis=1, keepdims=True)
    m = np.where(np.arange(1, tokens + 1) > tokens - local_tokens, 1.0, 0.0)
    i2 = np.argpartition((s_hat + m).sum(axis=0), -k)[-k:]
    alpha = s_hat[:, i2].sum(axis=1, keepdims=True)
    logits = np.einsum("gc,sc->gs", q, keys[i2]) / np.sqrt(d_h)
    s = np.exp(logits - logits.max(axis=1, keepdims=True))
    s /= s.sum(axis=1, keepdims=True)
    y: NDArray[np.float64] = alpha * (s @ values[i2]) + (1 - alpha) * mean
    return y


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
