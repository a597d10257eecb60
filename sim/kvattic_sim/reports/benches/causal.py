"""Whether several positions of one call get the bits that each gets alone: drafts, chunks, windows, in all modes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.device import Device
from kvattic.driver.sequence import Sequence
from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY, Config
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import Element
from kvattic_sim.reports.benches.engine import Bench

__all__ = ["BENCHES", "KEY", "equal"]

KEY = "sparse.causal.equal"

MODES: dict[str, dict[str, Any]] = {
    "dense": {}, "sparf": {"features": 8, "top_units": 40, "local_tokens": 3},
    "fetched": {"features": 8, "top_units": 12, "unit_tokens": 8},
    "centroid": {"top_units": 9, "local_tokens": 17}, "codes": {"top_units": 40, "local_tokens": 3}}
FIRST, LAST = 240, 290
"""Positions of the trial: a stripe (128 tokens of `tiny`) ends among them."""
HELD = 32


@dataclass(frozen=True, slots=True)
class _Tokens:
    """K, V (1, tokens, head_dim) and q (2, tokens, head_dim) of some tokens, as bit patterns."""

    key: NDArray[np.uint16]
    value: NDArray[np.uint16]
    query: NDArray[np.uint16]

    def __getitem__(self, place: slice) -> "_Tokens":
        return _Tokens(self.key[:, place], self.value[:, place], self.query[:, place])

    def __add__(self, other: "_Tokens") -> "_Tokens":
        return _Tokens(*(np.concatenate([a, b], axis=1) for a, b in (
            (self.key, other.key), (self.value, other.value), (self.query, other.query))))


def _tokens(config: Config, seed: int) -> _Tokens:
    rng = np.random.default_rng(seed)
    return _Tokens(*(to_bits(rng.standard_normal((heads, LAST, config.head_dim)), config.element)
                     for heads in (1, 1, 2)))


def _begin(device: Device, right: _Tokens) -> Sequence:
    """A sequence with the first tokens, and room to take drafts back."""
    sequence = device.create_sequence(1, capacity_tokens=512, sparse=True, centroids=8, codes=True, sinks=5)
    sequence.held_tokens = HELD
    sequence.prefill(right.key[:, :FIRST], right.value[:, :FIRST])
    return sequence


def _drafts(sequence: Sequence, right: _Tokens, wrong: _Tokens, rng: np.random.Generator,
            options: dict[str, Any]) -> Iterator[NDArray[np.uint32]]:
    """Bits of right tokens, in calls of some of them and of drafts that are rejected, as a chain or as a tree's."""
    at = FIRST
    while at < LAST:
        good, bad = (int(count) for count in rng.integers(1, 9, 2))
        good = min(good, LAST - at)
        drafts = right[at : at + good] + wrong[at + good : at + good + bad]
        count = drafts.key.shape[1]
        sequence.append(drafts.key, drafts.value)
        mask: dict[str, Any] = {"causal": True} if rng.integers(2) else {"tree": np.tril(np.ones((count, count), bool))}
        yield sequence.attend(drafts.query, **mask, **options).bits[:, :good]
        at += good
        sequence.truncate(at)


def equal() -> dict[str, float]:
    """Share of positions with the bits of a call with one: drafts, accepted and rejected; windows; both formats."""
    good = total = 0
    for element in Element:
        config = replace(TINY, element=element)
        right, wrong = _tokens(config, 1), _tokens(config, 2)
        for mode, numbers in MODES.items():
            for seed, window in enumerate((None, 70)):
                options = {"mode": mode, "window": window, **numbers}
                with Device(GoldenDevice(config)) as device:
                    with _begin(device, right) as sequence:
                        want = []
                        for token in range(FIRST, LAST):
                            now = right[token : token + 1]
                            sequence.append(now.key, now.value)
                            want.append(sequence.attend(now.query, **options).bits)
                    with _begin(device, right) as sequence:
                        found = list(_drafts(sequence, right, wrong, np.random.default_rng(seed), options))
                same = (np.concatenate(found, axis=1) == np.concatenate(want, axis=1)).all(axis=(0, 2))
                good, total = good + int(same.sum()), total + len(same)
    return {KEY: good / total}


BENCHES = (Bench(keys=(KEY,), measure=lambda lab: equal()),)
"""What the bench runner calls."""
