"""Attention in plain float64, which the host library is compared with."""

import numpy as np


def reference(query, key, value, mask, scale=None):
    """(output, lse) in float64; mask bool (n_queries, tokens); scale 1/sqrt(head_dim) if None."""
    scale = 1 / np.sqrt(query.shape[2]) if scale is None else scale
    group = len(query) // len(key)
    key, value = (np.repeat(a.astype(np.float64), group, axis=0) for a in (key, value))
    scores = np.where(
        mask, scale * np.einsum("hqd,htd->hqt", query.astype(np.float64), key), -np.inf
    )
    top = scores.max(axis=2, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=2)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top[:, :, 0]
    output = np.einsum("hqt,htd->hqd", weights, value) / np.where(total, total, 1)[:, :, None]
    return output, lse


def mask_of(tokens, n_queries, causal=False, window=None, tree=None, start=None, end=None):
    """The masks' meaning, one query and token at a time."""
    mask = np.ones((n_queries, tokens), bool)
    for i in range(n_queries):
        for t in range(tokens):
            if (start is not None and t < start[i]) or (end is not None and t >= end[i]):
                mask[i, t] = False
            if causal and t >= tokens - n_queries + i + 1:
                mask[i, t] = False
            if tree is not None and t >= tokens - tree.shape[1]:
                mask[i, t] &= tree[i, t - (tokens - tree.shape[1])]
        if window is not None:
            mask[i, np.flatnonzero(mask[i])[:-window]] = False
    return mask
