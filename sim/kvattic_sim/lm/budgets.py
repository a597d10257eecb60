"""Methods of attention at a given number of bytes, as the real model is given them.

Bytes are those of elements that a method needs, if they could be read singly, over dense attention's: a first pass, and
K and V of the tokens that it selects. So a method that moves whole codewords for single tokens is not charged for it;
`Outcome.flash_bytes` says what moves.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from kvattic_sim.lm.methods import (
    CODEWORD_BYTES,
    ELEMENT_BYTES,
    GROUP,
    Centroid,
    Coded,
    Dense,
    Fetched,
    HeavyHitters,
    Method,
    Quest,
    Sketched,
    Sparf,
    Sparq,
    Stateless,
)
from kvattic_sim.lm.sketch import BOUND_BYTES, octets

__all__ = ["CONTENDERS", "RATIOS", "SINKS", "Contender", "at_bytes", "possible", "sketch_first_pass"]

SINKS = 16
RATIOS = tuple(Fraction(1, 1 << n) for n in (2, 3, 4))
Contender = tuple[str, Callable[[int, Fraction], tuple[Fraction, Callable[[float], Method]]]]
"""A title, and of head_dim and the ratio of bytes: the first pass's bytes, and the method of a share of tokens."""


def sketch_first_pass(bits: int, block_tokens: int, part: Fraction = Fraction(1)) -> Fraction:
    """Bytes of a sketch over those of K and V.

    Args:
        bits: of a code.
        block_tokens: tokens that share their bounds.
        part: of the features.
    """
    return part * (Fraction(bits, 8) + Fraction(2 * BOUND_BYTES, block_tokens)) / (2 * ELEMENT_BYTES)


def _sketch(bits: int, block_tokens: int, part: Fraction = Fraction(1), **more: Any) -> Callable[..., Any]:
    def of(head_dim: int, ratio: Fraction) -> tuple[Fraction, Callable[[float], Method]]:
        del ratio
        features = None if part == 1 else int(part * head_dim)
        return sketch_first_pass(bits, block_tokens, part), lambda share: Sketched(
            share=share, bits=bits, block_tokens=block_tokens, features=features, sinks=SINKS, **more)

    return of


def _by_features(kind: Callable[..., Stateless]) -> Callable[..., Any]:
    # Half of the bytes for the first pass, as in `evaluate`.
    def of(head_dim: int, ratio: Fraction) -> tuple[Fraction, Callable[[float], Method]]:
        features = max(1, round(head_dim * ratio))
        return Fraction(features, 2 * head_dim), lambda share: kind(features=features, share=share)

    return of


def _by_units(kind: Callable[..., Stateless], entries: int, unit: int) -> Callable[..., Any]:
    def of(head_dim: int, ratio: Fraction) -> tuple[Fraction, Callable[[float], Method]]:
        del head_dim, ratio
        return Fraction(entries, 2 * unit), lambda share: kind(share=share, unit_tokens=unit, sinks=SINKS)

    return of


def _codes(head_dim: int, ratio: Fraction) -> tuple[Fraction, Callable[[float], Method]]:
    del ratio
    first_pass = Fraction(octets(head_dim) * CODEWORD_BYTES, 2 * ELEMENT_BYTES * GROUP * head_dim)
    return first_pass, lambda share: Coded(share=share, sinks=SINKS, pairs=True)


CONTENDERS: Mapping[str, Contender] = MappingProxyType({
    "codes": ("codes", _codes),
    "sketch": ("sketch, 2 bits", _sketch(2, 256)),
    "sketch_half": ("sketch, 2 bits of d/2 in runs of 8", _sketch(2, 256, Fraction(1, 2), feature_run=8)),
    "sketch_single": ("sketch, 2 bits of d/2", _sketch(2, 256, Fraction(1, 2))),
    "sketch_3": ("sketch, 3 bits of d/2", _sketch(3, 256, Fraction(1, 2))),
    "sketch_1": ("sketch, 1 bit", _sketch(1, 256)),
    "sparf": ("SparF", _by_features(Sparf)),
    "fetched": ("fetched", _by_features(Fetched)),
    "sparq": ("SparQ, in memory", _by_features(Sparq)),
    "centroid": ("centroid, units of 16", _by_units(Centroid, 1, 16)),
    "quest": ("Quest, pages of 16", _by_units(Quest, 2, 16)),
    "h2o": ("H2O", lambda head_dim, ratio: (Fraction(0), lambda share: HeavyHitters(share=share, heavy=0.5))),
})
"""By key. SparF, fetched and SparQ find sinks by themselves and are better without forced ones (docs/quality.md)."""


def at_bytes(name: str, ratio: Fraction, head_dim: int) -> Method:
    """A method that needs a part of dense attention's bytes.

    Args:
        name: one of `CONTENDERS`, or ``dense``.
        ratio: of the bytes; above 0, at most 1.
        head_dim: of the model.

    Raises:
        ValueError: there is no such method, or the ratio leaves no bytes for tokens.
    """
    if name == "dense":
        return Dense()
    first_pass, method = _parts(name, ratio, head_dim)
    share = ratio - first_pass
    if share <= 0:
        raise ValueError(f"ratio must be above {first_pass}, the first pass of {name}, not {ratio}")
    return method(float(share))


def possible(name: str, ratio: Fraction, head_dim: int) -> bool:
    """Whether a ratio of bytes leaves any for tokens; arguments as for `at_bytes`."""
    return name == "dense" or _parts(name, ratio, head_dim)[0] < ratio


def _parts(name: str, ratio: Fraction, head_dim: int) -> tuple[Fraction, Callable[[float], Method]]:
    if name not in CONTENDERS:
        raise ValueError(f"method must be one of dense, {', '.join(CONTENDERS)}, not {name!r}")
    return CONTENDERS[name][1](head_dim, ratio)
