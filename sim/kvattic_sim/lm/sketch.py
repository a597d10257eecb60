"""A sketch of K: a code of few bits for each element, of which a first pass makes its scores.

Codes are uniform between the least and the largest of a feature over a block of tokens, which are stored beside them,
so that no element is ever clipped. Attention sinks have keys unlike all others and would stretch every feature's range;
so they are left out of the statistics, and whoever reads a sketch attends them always.

`Sketch` is a study, of any number of bits and any size of blocks.  What the drive's mode CODES reads are `drive_codes`:
2 bits, blocks of 256, and one feature of eight with 1 bit, which makes room for the levels.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.spec import codes
from kvattic.spec.config import PAPER, Config
from kvattic.spec.elements import to_bits

__all__ = ["BITS", "BOUND_BYTES", "LEVELS", "Sketch", "drive_codes", "encode", "octets", "sketch_bytes"]

Floats = NDArray[np.floating[Any]]

BITS = (1, 2, 3, 4)
LEVELS = ("centres", "ends")
"""Where the levels of a range lie: each in the centre of an equal part of it, so that a step is the width shifted; or
the outer ones on its ends."""
BOUND_BYTES = 2
"""Of a least or a largest element, fp16 as K."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketch:
    """Codes of K, one head.

    Attributes:
        codes: uint8, (tokens, head_dim), from 0 to 2**bits - 1.
        low: float16, (blocks, head_dim): the least of each feature.
        high: float16, (blocks, head_dim): the largest.
        bits: of a code.
        block_tokens: tokens of a block; the last one may have fewer.
        levels: one of `LEVELS`.
    """

    codes: NDArray[np.uint8]
    low: NDArray[np.float16]
    high: NDArray[np.float16]
    bits: int
    block_tokens: int
    levels: str

    def decode(self, kind: Any = np.float64) -> Floats:
        """What the codes stand for: floats of type `kind`, (tokens, head_dim)."""
        kind = np.dtype(kind).type
        low, high = self.low.astype(kind), self.high.astype(kind)
        count = 1 << self.bits
        step = (high - low) / kind(count - 1 if self.levels == "ends" else count)
        first = low if self.levels == "ends" else low + step / 2
        blocks = np.arange(len(self.codes)) // self.block_tokens
        result: Floats = self.codes * step[blocks]
        result += first[blocks]
        return result

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: codes without gaps, and bounds."""
        return -(-self.codes.size * self.bits // 8) + BOUND_BYTES * (self.low.size + self.high.size)


def encode(key: Floats, *, bits: int, block_tokens: int, sinks: int = 0, levels: str = "centres") -> Sketch:
    """The sketch of one head's keys.

    Args:
        key: floats that fp16 holds, (tokens, head_dim).
        bits: of a code, one of `BITS`.
        block_tokens: tokens that share their bounds.
        sinks: the first tokens, which the bounds leave out and whose codes say nothing. A block of nothing but sinks
            has theirs.
        levels: one of `LEVELS`.

    Raises:
        ValueError: a parameter is none of those.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits}")
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(LEVELS)}, not {levels!r}")
    tokens = len(key)
    begins = np.arange(0, tokens, block_tokens)
    ends = np.minimum(begins + block_tokens, tokens)
    counted = np.where((begins < sinks) & (sinks < ends), sinks, begins)
    low, high = (of.reduceat(key, counted, axis=0).astype(np.float16) for of in (np.minimum, np.maximum))
    blocks = np.arange(tokens) // block_tokens
    kind = key.dtype.type
    first, width = low.astype(kind), (high.astype(kind) - low.astype(kind))
    # A feature that is the same in all tokens has code 0.
    unit = np.divide(kind(1), width, out=np.zeros_like(width), where=width > 0)
    place = (key - first[blocks]) * unit[blocks]
    top = (1 << bits) - 1
    # Halves go up, as adding a half and truncating does in hardware.
    codes = np.floor(place * kind(top) + kind(0.5)) if levels == "ends" else np.floor(place * kind(top + 1))
    return Sketch(codes=np.clip(codes, 0, top).astype(np.uint8), low=low, high=high, bits=bits,
                  block_tokens=block_tokens, levels=levels)


def sketch_bytes(tokens: NDArray[np.int64], features: int, bits: int, block_tokens: int) -> NDArray[np.int64]:
    """Bytes of codes and bounds of some features of whole blocks of tokens.

    Args:
        tokens: int64, any shape: how many.
        features: that are read.
        bits: of a code.
        block_tokens: tokens of a block, of which parts count as a whole for the bounds.

    Returns:
        int64, of the same shape.
    """
    codes = -(-tokens * (features * bits) // 8)
    return np.asarray(codes + -(-tokens // block_tokens) * (2 * BOUND_BYTES * features))


def drive_codes(key: Floats, sinks: int = 0) -> Floats:
    """What the drive's codes of one head's keys stand for (`kvattic.spec.codes`).

    Args:
        key: floats that fp16 holds, (tokens, head_dim), whole groups of 256 tokens.
        sinks: the first tokens, which the levels leave out.

    Returns:
        Floats of the same type and shape.

    Raises:
        kvattic.ConfigError: no drive with codes has such a head_dim.
    """
    config = _drive(key.shape[1])
    bits = to_bits(key, config.element)
    return codes.decode(codes.encode(bits, config, skip=sinks), config).astype(key.dtype)


def octets(head_dim: int) -> int:
    """Codewords of codes of a group."""
    return _drive(head_dim).octets


@cache
def _drive(head_dim: int) -> Config:
    return replace(PAPER, head_dim=head_dim)
