"""Compares results with the golden device, bit for bit, and with float64 attention."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvattic
from kvattic import AttendResult, Config
from kvattic.selftest import codes_reference
from kvattic.spec.elements import from_bits
from kvattic.spec.stored import to_kv_bits
from kvattic_sim import oracle
from kvattic_sim.workloads import DENSE, Attention, ModeSettings

__all__ = ["BOUND", "equal_bits", "exact_attention", "oracle_errors"]

Floats = NDArray[np.float64]

BOUND = 5e-7
"""Relative RMS against float64 that no result may exceed: docs/numerics.md."""
TIE = 1e-6
"""Masses of units whose difference is no larger may change places in the selection: they are rounded."""


def equal_bits(
    attention: Attention, result: AttendResult, config: Config, options: ModeSettings = DENSE
) -> NDArray[np.bool_]:
    """Whether the golden device gives the same outputs, maxima and denominators, to the last bit.

    Args:
        attention: the inputs.
        result: what a device made of them.
        config: the device's.
        options: which tokens were attended.

    Returns:
        bool, (kv_heads,).
    """
    kv_heads, tokens, _ = attention.key.shape
    with (kvattic.open("model", config) as device,
          device.create_sequence(kv_heads, capacity_tokens=tokens, **options.sequence_arguments(config)) as sequence):
        sequence.prefill(attention.key, attention.value)
        golden = sequence.attend(attention.query, **options.attend_arguments(config, tokens))
    equal = (golden.bits == result.bits).all(axis=2) & (golden.maximum == result.maximum)
    equal &= golden.denominator == result.denominator
    heads: NDArray[np.bool_] = equal.reshape(kv_heads, -1).all(axis=1)
    return heads


def oracle_errors(
    attention: Attention, result: AttendResult, config: Config, options: ModeSettings = DENSE
) -> Floats:
    """Relative RMS and largest absolute error of each KV head against float64 attention.

    Args:
        attention: the inputs.
        result: what a device made of them.
        config: the device's.
        options: which tokens float64 attends: all, or those that the mode should select.

    Returns:
        float64, (kv_heads, 2). Positions without an exact result do not count; NaN for a head of nothing else.
    """
    kv_heads = len(attention.key)
    exact = exact_attention(attention, config, options)
    errors = np.full((kv_heads, 2), np.nan)
    pairs = zip(exact.reshape(kv_heads, -1), result.output.reshape(kv_heads, -1), strict=True)
    for head, (wanted, ours) in enumerate(pairs):
        known = np.isfinite(wanted)
        if known.any():
            wanted, ours = wanted[known], ours[known]
            errors[head] = oracle.relative_rms(ours, wanted), np.abs(ours - wanted).max()
    return errors


def exact_attention(attention: Attention, config: Config, options: ModeSettings) -> Floats:
    """Float64 attention of the inputs, in any mode.

    In the sparse modes each position is a job of its own, which selects for the query heads of a KV head together; the
    tokens of a stripe that is not full are attended in any case.  In codes, selection and alpha are the golden model's:
    what is truncated of codes' scores is far more than of what is attended.

    Args:
        attention: the inputs; K and V are all that the sequence has.
        config: the device's.
        options: which tokens are attended.

    Returns:
        float64, (q_heads, positions, head_dim); NaN where two units are so equal that either may be selected.
    """
    kv_heads, _, head_dim = attention.key.shape
    group = len(attention.query) // kv_heads
    query, key, value = (from_bits(bits, config.element).astype(np.float64)
                         for bits in (attention.query, attention.key, attention.value))
    output = np.empty(query.shape)
    for head in range(kv_heads):
        rows = slice(head * group, (head + 1) * group)
        if options.mode == "dense":
            found = oracle.attention(query[rows].reshape(-1, head_dim), key[head], value[head], head_dim**-0.5)
            output[rows] = found.reshape(query[rows].shape)
            continue
        for position in range(query.shape[1]):
            output[rows, position] = _sparse(query[rows, position], key[head], value[head], config, options)
    return output


def _sparse(query: Floats, key: Floats, value: Floats, config: Config, options: ModeSettings) -> Floats:
    """One job of a sparse mode: (rows, head_dim)."""
    tokens, head_dim = key.shape
    wanted = options.attend_arguments(config, tokens)
    tail = np.arange(tokens) >= tokens // config.group_tokens * config.group_tokens
    common: dict[str, Any] = {"top_units": wanted["top_units"], "local_tokens": wanted["local_tokens"], "tail": tail}
    scale = head_dim**-0.5
    if options.mode == "codes":
        return codes_reference(query, key, value, config=config, top_units=wanted["top_units"],
                               local_tokens=wanted["local_tokens"])
    if options.mode == "sparf":
        found = oracle.sparf(query, key, value, scale, features=wanted["features"], **common)
    elif options.mode == "fetched":
        found = oracle.fetched(query, key, value, scale, features=wanted["features"],
                               unit_tokens=wanted["unit_tokens"], **common)
    else:
        # The device keeps mean keys as it keeps K.
        means = from_bits(to_kv_bits(oracle.mean_keys(key, wanted["unit_tokens"]), config.kv, config.element),
                          config.element)
        found = oracle.centroid(query, key, value, scale, centroids=means, unit_tokens=wanted["unit_tokens"], **common)
    unit = wanted.get("unit_tokens", 1)
    chosen, other = found.selected & ~found.forced, ~found.selected & ~tail[::unit]
    if chosen.any() and other.any() and found.mass[chosen].min() - found.mass[other].max() <= TIE:
        return np.full(query.shape, np.nan)
    return found.output
