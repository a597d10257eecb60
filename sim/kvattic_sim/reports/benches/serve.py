"""Serving: what sequences write that share their beginning."""

from typing import Any

import numpy as np

import kvattic
from kvattic.driver.device import Device
from kvattic.driver.sequence import Sequence
from kvattic.spec.config import PAPER
from kvattic_sim.reports.benches.engine import Bench, WrongResultError

__all__ = ["BENCHES", "FORK_KEYS", "fork_bytes"]

SEQUENCES, SHARED, OWN, KV_HEADS = 16, 1024, 64, 8
FORK_KEYS = ("serve.fork.bytes_ratio", "serve.fork.bytes_ratio.decoded")


def _written(device: Device) -> int:
    """Bytes that device DRAM and flash took so far: K and V go through both."""
    return device.media.written_bytes + device.statistics().page_programs * device.config.page_bytes


def fork_bytes() -> dict[str, float]:
    """Bytes written for sequences that share their first tokens, over those of as many that do not.

    They go on with a stripe of their own each, at once, or token by token, where the first token of a stripe writes its
    DRAM pages whole.

    Raises:
        WrongResultError: a fork attends something else than the sequence that shares nothing.
    """
    rng = np.random.default_rng(0)
    shared, *own = (rng.standard_normal((2, KV_HEADS, tokens, PAPER.head_dim)).astype(np.float16)
                    for tokens in (SHARED, *[OWN] * SEQUENCES))
    query = shared[0, :, :1]
    figures: dict[str, float] = {}
    for key, step in zip(FORK_KEYS, (OWN, 1), strict=True):
        outcomes: list[tuple[int, list[Any]]] = []
        for forked in (True, False):
            with kvattic.open("model", PAPER) as device:
                before, first = _written(device), device.create_sequence(KV_HEADS, capacity_tokens=SHARED + OWN)
                first.prefill(*shared)
                sequences: list[Sequence] = [first]
                for _ in range(SEQUENCES - 1):
                    if forked:
                        sequences.append(first.fork())
                    else:
                        sequences.append(device.create_sequence(KV_HEADS, capacity_tokens=SHARED + OWN))
                        sequences[-1].prefill(*shared)
                for sequence, kv in zip(sequences, own, strict=True):
                    for token in range(0, OWN, step):
                        sequence.append(*kv[:, :, token : token + step])
                written = _written(device) - before
                outcomes.append((written, [sequence.attend(query).bits for sequence in sequences]))
        (few, forks), (many, copies) = outcomes
        if not np.array_equal(forks, copies):
            raise WrongResultError("a fork attends something else than a sequence that shares nothing")
        figures[key] = few / many
    return figures


BENCHES = (Bench(keys=FORK_KEYS, measure=lambda lab: fork_bytes()),)
