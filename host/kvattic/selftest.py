"""`kvattic selftest`: random K and V through a device, and every result checked.

Each case makes sequences of its own, writes them and attends.  A result is right if it is the golden device's, bit for
bit, and within `TOLERANCE` of float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.device import AttendResult, Device
from kvattic.driver.planning import AttendOptions
from kvattic.errors import DeviceLostError, KvatticError
from kvattic.golden.first_pass import ALPHA_ONE, Layout, first_pass
from kvattic.spec import codes, layout
from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.elements import Bits, from_bits, to_bits

__all__ = ["CASES", "TOLERANCE", "Check", "codes_reference", "reference", "run", "sparse_reference"]

TOLERANCE = 1e-6
"""Relative RMS against float64, ten times what the rounding to fp32 and the fixed-point sums make."""
HEADS = 2
"""KV heads of each sequence."""
DRAFTS = 5
"""Tokens of the draft tree."""

Floats: TypeAlias = NDArray[np.float64]
Found: TypeAlias = tuple[str, AttendResult, Floats]
"""What a case attended: name, result, and float64 attention (q_heads, n_queries, head_dim)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One result.

    Attributes:
        name: what was done.
        equal: all bits are those of the golden device; None: not compared, or no result.
        error: relative RMS against float64 attention; None: no result.
        message: why there is no result.
    """

    name: str
    equal: bool | None = None
    error: float | None = None
    message: str = ""

    @property
    def good(self) -> bool:
        """Whether the result is right."""
        return not self.message and self.equal is not False and (self.error is None or self.error <= TOLERANCE)


def reference(query: Floats, key: Floats, value: Floats, mask: NDArray[np.bool_] | None = None) -> Floats:
    """softmax(q K^T / sqrt(head_dim)) V in float64.

    Args:
        query: (q_heads, n_queries, head_dim); query head h reads KV head h // (q_heads // kv_heads).
        key: (kv_heads, tokens, head_dim).
        value: (kv_heads, tokens, head_dim).
        mask: (n_queries, tokens), what each query attends; all of it if None.
    """
    group = len(query) // len(key)
    keys, values = np.repeat(key, group, axis=0), np.repeat(value, group, axis=0)
    scores = query @ keys.swapaxes(1, 2) * query.shape[2] ** -0.5
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    result: Floats = _softmax(scores) @ values
    return result


def sparse_reference(
    query: Floats, key: Floats, value: Floats, *, config: Config, mode: str, unit_tokens: int, top_units: int,
    local_tokens: int, flushed: int, features: int = 0,
) -> Floats:
    """What a sparse mode gives, in float64; see `Sequence.attend`.

    Args:
        query: (q_heads, 1, head_dim).
        key: (kv_heads, tokens, head_dim).
        value: (kv_heads, tokens, head_dim).
        config: geometry, for the mean keys.
        mode: sparf, fetched, centroid or codes.
        unit_tokens: tokens of a unit.
        top_units: units that are attended beside the tail.
        local_tokens: newest tokens that are always attended.
        flushed: tokens in flash, whole units; the others are the tail.
        features: sparf, fetched: how many the first pass reads.
    """
    group, tokens, scale = len(query) // len(key), key.shape[1], query.shape[2] ** -0.5
    output = np.empty_like(query)
    for head in range(len(key)):
        rows = slice(head * group, (head + 1) * group)
        q, k, v = query[rows, 0], key[head], value[head]
        if mode == "codes":
            output[rows, 0] = codes_reference(q, k, v, config=config, top_units=top_units, local_tokens=local_tokens)
            continue
        exact = q @ k.T * scale
        if mode == "centroid":
            means = from_bits(layout.mean_keys(to_bits(k[:flushed].astype(np.float32), config.element), unit_tokens,
                                               config),
                              config.element)
            probability = _softmax(q @ means.T * scale)
            mass = probability.sum(axis=0)
        else:
            size = np.abs(q)
            chosen = np.sort(np.argsort(-size.sum(axis=0), kind="stable")[:features])
            scales = scale * np.sqrt(size.sum(axis=1) / size[:, chosen].sum(axis=1))
            scores = q[:, chosen] @ k[:, chosen].T * scales[:, None]
            scores[:, flushed:] = exact[:, flushed:]
            probability = _softmax(scores)
            mass = probability[:, :flushed].sum(axis=0).reshape(-1, unit_tokens).sum(axis=1)
        newest = (np.arange(len(mass)) + 1) * unit_tokens > tokens - local_tokens
        taken = np.zeros(tokens, np.bool_)
        for number in np.argsort(-np.where(newest, np.inf, mass), kind="stable")[:top_units]:
            taken[number * unit_tokens : (number + 1) * unit_tokens] = True
        taken[flushed:] = True
        output[rows, 0] = _softmax(np.where(taken, exact, -np.inf)) @ v
        if mode != "centroid" and not taken.all():
            alpha = (probability * taken).sum(axis=1, keepdims=True)
            output[rows, 0] = alpha * output[rows, 0] + (1 - alpha) * v.mean(axis=0)
    return output


def codes_reference(
    query: Floats, key: Floats, value: Floats, *, config: Config, top_units: int, local_tokens: int
) -> Floats:
    """What the mode codes gives for one KV head, in float64 but for selection and alpha, which are the golden model's.

    What is truncated of codes' scores is far more than of what is attended (docs/numerics.md).

    Args:
        query: (rows, head_dim).
        key: (tokens, head_dim); the stripe that is not full is the tail.
        value: (tokens, head_dim).
        config: geometry, with codes.
        top_units: tokens that are attended beside the tail.
        local_tokens: newest tokens that are always attended.

    Returns:
        (rows, head_dim).
    """
    tokens, head_dim = key.shape
    size, rows = config.group_tokens, np.ones(len(query), np.int64)
    stripes = -(-tokens // size)
    padded = to_bits(np.pad(key, ((0, stripes * size - tokens), (0, 0))), config.element)
    first = first_pass(
        to_bits(query, config.element), padded, sketch=codes.encode(padded, config), element=config.element,
        layout=Layout(group_tokens=size, tokens_per_codeword=config.tokens_per_codeword, mode=Mode.CODES),
        scale_bits=AttendOptions().scale_bits(head_dim), start=0 * rows, end=tokens * rows, tree=0 * rows,
        tree_token=tokens, base_token=0, end_token=tokens, tail=np.arange(stripes) == tokens // size, features=0,
        top_units=top_units, local_tokens=local_tokens)
    alpha = first.alpha[:, None] / float(ALPHA_ONE)
    scores = np.where(first.taken[:tokens], query @ key.T * head_dim**-0.5, -np.inf)
    result: Floats = alpha * (_softmax(scores) @ value) + (1 - alpha) * value.mean(axis=0)
    return result


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return result


class _Numbers:
    """Random numbers as they are stored: the same for each device with the same seed."""

    def __init__(self, config: Config, seed: int) -> None:
        self._config, self._rng = config, np.random.default_rng(seed)
        self.group = min(config.rows, 4)

    def tokens(self, count: int) -> tuple[Floats, Floats]:
        """K and V, (HEADS, count, head_dim)."""
        key, value = (layout.kv_bits(self._normal(HEADS, count), self._config) for _ in range(2))
        return self._exact(key), self._exact(value)

    def query(self, count: int = 1) -> Floats:
        """q, (HEADS * group, count, head_dim)."""
        return self._exact(to_bits(self._normal(HEADS * self.group, count), self._config.element))

    def _normal(self, heads: int, count: int) -> NDArray[np.float32]:
        return self._rng.standard_normal((heads, count, self._config.head_dim), np.float32)

    def _exact(self, bits: Bits) -> Floats:
        return from_bits(bits, self._config.element).astype(np.float64)


def _joined(*parts: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    return np.concatenate([k for k, _ in parts], axis=1), np.concatenate([v for _, v in parts], axis=1)


def _several(device: Device, numbers: _Numbers) -> Iterator[Found]:
    """Sequences of different lengths beside each other, in any order."""
    stripe = device.config.tokens_per_page
    lengths = (2 * stripe + 3, 1, stripe)
    stored = [numbers.tokens(length) for length in lengths]
    sequences = [device.create_sequence(HEADS, capacity_tokens=length) for length in lengths]
    for sequence, (key, value) in zip(sequences, stored, strict=True):
        sequence.prefill(key, value)
    for number in (2, 0, 1):
        query = numbers.query()
        yield f"dense, tokens: {lengths[number]}", sequences[number].attend(query), reference(query, *stored[number])
    for sequence in sequences:
        sequence.free()
    # The same flash for other tokens.
    key, value = numbers.tokens(lengths[0])
    with device.create_sequence(HEADS, capacity_tokens=lengths[0]) as sequence:
        sequence.prefill(key, value)
        query = numbers.query()
        yield "dense, flash used again", sequence.attend(query), reference(query, key, value)


def _appended(device: Device, numbers: _Numbers) -> Iterator[Found]:
    """Tokens that come one at a time, over the end of a stripe; and masks."""
    length = max(2 * device.config.tokens_per_page - 2, 1)
    stored = numbers.tokens(length)
    with device.create_sequence(HEADS, capacity_tokens=length + 4) as sequence:
        sequence.prefill(*stored)
        for count in range(1, 4):
            token = numbers.tokens(1)
            sequence.append(*token)
            stored, query = _joined(stored, token), numbers.query()
            yield f"dense, {count} appended", sequence.attend(query), reference(query, *stored)
        total, query = sequence.length(), numbers.query(3)
        token_number = np.arange(total)
        end = total - 2 + np.arange(3)[:, None]
        yield "dense, causal", sequence.attend(query, causal=True), reference(query, *stored, token_number < end)
        yield ("dense, window", sequence.attend(query, causal=True, window=7),
               reference(query, *stored, (token_number < end) & (token_number >= end - 7)))


def _tree(device: Device, numbers: _Numbers) -> Iterator[Found]:
    """Drafts, each of which attends its ancestors alone."""
    parents = (-1, 0, 0, 1, 2)
    tree = np.eye(DRAFTS, dtype=np.bool_)
    for draft, parent in enumerate(parents):
        if parent >= 0:
            tree[draft] |= tree[parent]
    length = max(device.config.tokens_per_page - 2, 1)     # the drafts lie on both sides of a stripe's end
    stored = numbers.tokens(length + DRAFTS)
    with device.create_sequence(HEADS, capacity_tokens=length + DRAFTS) as sequence:
        sequence.prefill(*stored)
        query = numbers.query(DRAFTS)
        mask = np.concatenate([np.ones((DRAFTS, length), np.bool_), tree], axis=1)
        yield f"dense, tree of {DRAFTS} drafts", sequence.attend(query, tree=tree), reference(query, *stored, mask)


def _sparse(device: Device, numbers: _Numbers) -> Iterator[Found]:
    """Each sparse mode with a selection, and with everything selected, which is dense attention."""
    config = device.config
    if not config.sparse:
        return
    least = config.tokens_per_codeword
    unit = min(max(16, least), least << config.unit_bits_max)
    units = {"sparf": 1, "fetched": least, "centroid": unit, **({"codes": 1} if config.codes else {})}
    # One stripe at least is in flash, and some tokens in DRAM.
    length = min(2 * config.group_tokens, config.max_tokens // config.group_tokens * config.group_tokens // 2) + 3
    stored = numbers.tokens(length)
    with device.create_sequence(HEADS, capacity_tokens=length, sparse=True, centroids=unit,
                                codes=config.codes) as sequence:
        sequence.prefill(*stored)
        for mode, size in units.items():
            flushed, query = sequence.flushed(), numbers.query()
            whole = flushed // size
            for count, name in ((max(whole // 4, 1), "a quarter"), (whole, "all")):
                arguments: dict[str, Any] = {"mode": mode, "top_units": count, "local_tokens": min(4, count * size)}
                if mode in ("sparf", "fetched"):
                    arguments["features"] = config.head_dim // 4
                # All that is in flash and all of the tail: that is dense attention.
                exact = reference(query, *stored) if name == "all" else sparse_reference(
                    query, *stored, config=config, unit_tokens=size, flushed=flushed, **arguments)
                yield f"{mode}, {name}", sequence.attend(query, **arguments), exact


CASES: dict[str, Callable[[Device, _Numbers], Iterator[Found]]] = {
    "several sequences": _several,
    "appended tokens": _appended,
    "draft tree": _tree,
    "sparse modes": _sparse,
}
"""What is done on the device; each case makes the sequences that it needs."""


def run(device: Device, golden: Device | None = None, *, seed: int = 0) -> Iterator[Check]:
    """Run all cases.

    Args:
        device: what is tested.  It must have room for some stripes.
        golden: a golden device of the same configuration; None: bits are not compared.
        seed: of the random numbers.

    Yields:
        A check of each result, as it comes.  A case that the device ends with an error yields that.

    Raises:
        DeviceLostError: the device is gone.
    """
    for name, case in CASES.items():
        found = case(device, _Numbers(device.config, seed))
        expected = case(golden, _Numbers(golden.config, seed)) if golden is not None else None
        while True:
            try:
                label, result, exact = next(found)
            except StopIteration:
                break
            except DeviceLostError:
                raise
            except KvatticError as error:
                yield Check(name=name, message=str(error))
                break
            equal = None
            if expected is not None:
                right = next(expected)[1]
                equal = all(np.array_equal(getattr(result, part), getattr(right, part))
                            for part in ("bits", "maximum", "denominator"))
            wrong = float(np.sqrt(np.square(result.output - exact).mean() / np.square(exact).mean()))
            yield Check(name=label, equal=equal, error=wrong)
