"""What 8-bit formats of K and V bring and cost: speed over fp16, error over what is stored, and PyTorch's rounding.

Tokens a second are those of the RTL with the part's timing, on the paper's drive, all results compared bit for bit with
the golden device; the errors and the rounding are of the golden model and need no simulator.
"""

from dataclasses import replace
from typing import Any

import numpy as np

import kvattic
from kvattic import PAPER, Config, KvFormat
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.stored import narrow, to_kv_bits
from kvattic_sim import oracle
from kvattic_sim.reports.benches.engine import Bench, Case, Figures, Lab, UnavailableError
from kvattic_sim.reports.benches.flash import DENSE, run_drive

__all__ = ["BENCHES", "SPEEDUPS", "reference", "relative_rms", "speedup"]

SPEEDUPS = {"fp8_e4m3": 1.9, "fp8_e5m2": 1.9}
"""How many times fp16's tokens a second a format should give."""
HEADS, TOKENS, ROWS = 8, 2048, 4
PATTERNS = 2_000_000
"""float32 that are rounded beside all fp16."""


def speedup(lab: Lab, name: str, case: Case = DENSE) -> float:
    """Tokens a second of dense attention over those with K and V as elements.

    Args:
        lab: where.
        name: of the format.
        case: with a configuration that stores elements.

    Raises:
        WrongResultError: a bit or a counter is wrong.
    """
    stored = replace(case, config=replace(case.config, kv=KvFormat(name)))
    plain, found = (run_drive(lab, one.config.kv.value, one).dense.cycles for one in (case, stored))
    return plain / found


def relative_rms(name: str, config: Config = PAPER, tokens: int = TOKENS) -> float:
    """The larger error of normal data and of FlashAttention-3's with outliers, against float64 over what is stored.

    Args:
        name: of the format.
        config: else.
        tokens: of each head.
    """
    config = replace(config, kv=KvFormat(name))
    rng, worst = np.random.default_rng(0), 0.0
    with kvattic.open("model", config) as device:
        for outliers in (False, True):
            def numbers(*shape: int, outliers: bool = outliers) -> Any:
                plain = rng.standard_normal((*shape, config.head_dim))
                return from_bits(oracle.fa3(plain.shape, rng), config.element) if outliers else plain

            query = from_bits(to_bits(numbers(HEADS, ROWS), config.element), config.element)
            with device.create_sequence(HEADS, capacity_tokens=tokens) as sequence:
                sequence.prefill(numbers(HEADS, tokens), numbers(HEADS, tokens))
                key, value = (each.astype(np.float64) for each in sequence.read())
                output = sequence.attend(query).output
            exact = np.stack([oracle.attention(q, k, v, config.head_dim**-0.5)
                              for q, k, v in zip(query, key, value, strict=True)])
            worst = max(worst, oracle.relative_rms(output, exact))
    return worst


def reference(name: str, patterns: int = PATTERNS) -> float:
    """Share of the numbers in range whose codes are PyTorch's: of all fp16, and of random float32.

    Args:
        name: of the format.
        patterns: how many float32.

    Raises:
        UnavailableError: there is no PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(f"{error}: pip install 'kvattic[transformers]'") from error
    kv = KvFormat(name)
    assert kv.encoding is not None
    dtype = getattr(torch, kv.encoding.name)
    rng, equal, total = np.random.default_rng(0), 0, 0
    sized = rng.standard_normal(patterns) * np.exp2(rng.integers(-22, 17, patterns))
    for values in (np.arange(1 << 16, dtype=np.uint16).view(np.float16), sized.astype(np.float32)):
        with np.errstate(invalid="ignore"):
            values = values[np.abs(values) <= kv.encoding.largest]
        wanted = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
        for element in kvattic.Element:
            equal += int((narrow(to_kv_bits(values, kv, element), kv, element) == wanted).sum())
            total += len(values)
    return equal / total


def _exact(name: str) -> Bench:
    keys = (f"format.{name}.rel_rms", f"format.{name}.reference")
    return Bench(keys=keys, measure=lambda lab: {keys[0]: relative_rms(name), keys[1]: reference(name)})


def _fast(name: str) -> Bench:
    key = f"format.{name}.speedup"

    def measure(lab: Lab) -> Figures:
        return {key: speedup(lab, name)}

    return Bench(keys=(key,), measure=measure)


BENCHES = (*(_exact(name) for name in SPEEDUPS), *(_fast(name) for name in SPEEDUPS))
"""What the bench runner calls, short ones first."""
