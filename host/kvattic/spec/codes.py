"""Codes: a copy of K of 2 bits for each feature, of which the mode CODES makes the scores of its first pass.

Levels
    A feature of a stripe has a *base* and a *step*, elements both; a key's estimate is base + step * code.  Most
    features have codes of 2 bits, the last few of each octet (`one_bit_features`) of 1 bit.

Octet
    A codeword of codes: features 8j .. 8j + 7 of the T = `Config.group_tokens` tokens of a stripe.  It has T - 16
    *fields* of 16 bits, little-endian, for tokens 0 .. T - 17, then 8 bases and 8 steps.

Field
    The codes of a token: of feature f of the octet at bit 2f, of the n last ones, of 1 bit each, at bits 16 - 2n and
    on.  So the n upper bits are *spare*.  They hold the fields of the last 16 tokens: with E elements to a beat,
    H = 16 / E and B = (T - 16) / 16, the n bits from bit n * j of the field of token T - 16 + h * E + i are the spare
    bits of the i-th field of beat h * B + j.  So the layout depends on `Config.elements_per_beat`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.config import OCTET_FEATURES, Config
from kvattic.spec.elements import Bits, Bytes, Integers, from_bits, to_bits
from kvattic.spec.formats import Element

__all__ = ["FOLDED_TOKENS", "KeyCodes", "check_codes", "decode", "encode", "one_bit_features", "pack", "unpack",
           "widths"]

FOLDED_TOKENS = 16
"""Tokens of a stripe whose fields lie in the spare bits of the others: their room is that of the levels."""
FIELD_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyCodes:
    """Codes of whole stripes of one head.

    Attributes:
        base: uint16, (stripes, head_dim), bit patterns: what code 0 stands for.
        step: uint16, (stripes, head_dim), bit patterns: what a code adds for each of its units.
        codes: uint8, (stripes * group_tokens, head_dim), 0 to 3, or to 1 in features of 1 bit.
    """

    base: Bits
    step: Bits
    codes: Bytes


def check_codes(config: Config) -> None:
    """Refuse a configuration without codes.

    Raises:
        ConfigError: says why.
    """
    if reason := config.why_no_codes:
        raise ConfigError(f"this configuration is without codes: {reason}")


def one_bit_features(config: Config) -> int:
    """Features of each octet, the last ones, whose codes have 1 bit."""
    return 512 // config.codeword_bytes


def widths(config: Config) -> Integers:
    """Bits of each feature's codes, int64, (head_dim,): 2 or 1."""
    octet = np.full(OCTET_FEATURES, 2, np.int64)
    octet[-one_bit_features(config) :] = 1
    return np.tile(octet, config.octets)


def encode(bits: Bits, config: Config, *, skip: int = 0) -> KeyCodes:
    """Codes of K: each feature's range in a stripe is cut into equal parts, whose centres are the levels.

    Attention sinks are left out of the range, which they would stretch; they have the nearest codes.  A stripe of
    nothing but sinks has their range.  A feature with a NaN or infinity in its range has a NaN for a base, which the
    device reports.

    Args:
        bits: uint16, (stripes * group_tokens, head_dim).
        config: geometry, with codes.
        skip: how many tokens at the beginning are sinks; none if it is negative.

    Raises:
        ConfigError: the configuration is without codes.
        RequestError: wrong dtype or shape, or tokens that are not whole stripes.
    """
    check_codes(config)
    size = config.group_tokens
    if bits.dtype != np.uint16 or bits.ndim != 2 or bits.shape[1] != config.head_dim or len(bits) % size:
        raise RequestError(f"codes are of uint16 (stripes * {size}, {config.head_dim}), not {bits.dtype} {bits.shape}")
    element, stripes = config.element, len(bits) // size
    keys = from_bits(bits, element).astype(np.float64).reshape(stripes, size, config.head_dim)
    sinks = np.clip(skip - size * np.arange(stripes), 0, size) % size
    counted = (np.arange(size) >= sinks[:, None])[:, :, None]
    low = np.where(counted, keys, np.inf).min(axis=1)
    high = np.where(counted, keys, -np.inf).max(axis=1)
    broken = ~np.isfinite(low) | ~np.isfinite(high)     # NaN stays NaN in both
    low[broken] = high[broken] = 0
    parts = 1 << widths(config)
    # Both lie within the elements' range.
    step, base = (to_bits(each, element) for each in ((high - low) / parts, low + (high - low) / parts / 2))
    width, first = (from_bits(each, element).astype(np.float64)[:, None] for each in (step, base))
    with np.errstate(invalid="ignore"):     # of NaN and infinity
        place = np.divide(keys - (first - width / 2), width, out=np.zeros_like(keys), where=width > 0)
        codes = np.nan_to_num(np.clip(np.floor(place), 0, parts - 1)).astype(np.uint8)
    base[broken] = _nan(element)
    return KeyCodes(base=base, step=step, codes=codes.reshape(bits.shape))


def _nan(element: Element) -> Bits:
    return to_bits(np.array([np.nan]), element)


def decode(codes: KeyCodes, config: Config) -> NDArray[np.float64]:
    """What the codes stand for, float64, (stripes * group_tokens, head_dim)."""
    base, step = (from_bits(each, config.element).astype(np.float64)[:, None] for each in (codes.base, codes.step))
    stripes = codes.codes.reshape(len(base), -1, config.head_dim)
    result: NDArray[np.float64] = (base + step * stripes).reshape(codes.codes.shape)
    return result


def pack(codes: KeyCodes, config: Config) -> Bytes:
    """The octets of whole stripes.

    Args:
        codes: of them.
        config: geometry, with codes.

    Returns:
        uint8, (stripes, octets, codeword_bytes).

    Raises:
        ConfigError: the configuration is without codes.
        RequestError: wrong shapes, or a code that its feature has not the bits for.
    """
    check_codes(config)
    size, octets, n = config.group_tokens, config.octets, one_bit_features(config)
    stripes = len(codes.base)
    if (codes.base.shape, codes.step.shape, codes.codes.shape) != (
            (stripes, config.head_dim),) * 2 + ((stripes * size, config.head_dim),):
        raise RequestError(f"codes must have {size} tokens of {config.head_dim} features for each stripe")
    if (codes.codes >= 1 << widths(config)).any():
        raise RequestError("a code must fit its feature: 0 to 3, or to 1 where it has 1 bit")
    parts = codes.codes.reshape(stripes, size, octets, OCTET_FEATURES).astype(np.uint16) << _places(n)
    fields = np.bitwise_or.reduce(parts, axis=-1).swapaxes(1, 2)
    data = np.zeros((stripes, octets, size), np.uint16)
    data[..., : size - FOLDED_TOKENS] = fields[..., : size - FOLDED_TOKENS]
    beats = _beats(data, config)
    folded = fields[..., size - FOLDED_TOKENS :].reshape(stripes, octets, -1, 1, config.elements_per_beat)
    beats |= (folded >> _shifts(beats.shape[3], n) & np.uint16((1 << n) - 1)) << np.uint16(FIELD_BITS - n)
    data[..., : size - FOLDED_TOKENS] = beats.reshape(stripes, octets, -1)
    levels = data[..., size - FOLDED_TOKENS :].reshape(stripes, octets, 2, OCTET_FEATURES)
    levels[:, :, 0], levels[:, :, 1] = (
        each.reshape(stripes, octets, OCTET_FEATURES) for each in (codes.base, codes.step))
    data[..., size - FOLDED_TOKENS :] = levels.reshape(stripes, octets, -1)
    return data.astype("<u2").view(np.uint8)


def unpack(octets: Bytes, config: Config) -> KeyCodes:
    """The codes of whole stripes: the inverse of `pack`.

    Args:
        octets: uint8, (stripes, octets, codeword_bytes).
        config: geometry, with codes.

    Raises:
        ConfigError: the configuration is without codes.
        RequestError: wrong dtype or shape.
    """
    check_codes(config)
    size, n = config.group_tokens, one_bit_features(config)
    if octets.dtype != np.uint8 or octets.ndim != 3 or octets.shape[1:] != (config.octets, config.codeword_bytes):
        raise RequestError(f"octets must be uint8 (stripes, {config.octets}, {config.codeword_bytes}), not "
                           f"{octets.dtype} {octets.shape}")
    data = np.ascontiguousarray(octets).view("<u2").astype(np.uint16)
    stripes = len(data)
    beats = _beats(data, config)
    spare = (beats >> np.uint16(FIELD_BITS - n)).astype(np.uint32) << _shifts(beats.shape[3], n).astype(np.uint32)
    fields = data.copy()
    fields[..., size - FOLDED_TOKENS :] = np.bitwise_or.reduce(spare, axis=3).reshape(stripes, config.octets, -1)
    places, masks = _places(n), np.uint16((1 << widths(config)[:OCTET_FEATURES]) - 1)
    codes = fields.swapaxes(1, 2)[..., None] >> places & masks
    base, step = (data[..., size - FOLDED_TOKENS :].reshape(stripes, config.octets, 2, OCTET_FEATURES)[:, :, i].reshape(
        stripes, -1) for i in range(2))
    return KeyCodes(base=base, step=step, codes=codes.reshape(-1, config.head_dim).astype(np.uint8))


def _places(n: int) -> NDArray[np.uint16]:
    """The lowest bit of each feature of an octet in a field."""
    wide = OCTET_FEATURES - n
    return np.array([2 * f for f in range(wide)] + [2 * wide + i for i in range(n)], np.uint16)


def _beats(data: NDArray[np.uint16], config: Config) -> NDArray[np.uint16]:
    """The fields of octets by the tokens whose fields their spare bits hold: (stripes, octets, h, beats, elements)."""
    each = config.elements_per_beat
    fields = data[..., : config.group_tokens - FOLDED_TOKENS]
    return fields.reshape(*data.shape[:2], FOLDED_TOKENS // each, -1, each)


def _shifts(beats: int, n: int) -> NDArray[np.uint16]:
    """Of the folded field, which bit is the first of the spare bits of each beat: (beats, 1)."""
    return np.minimum(n * np.arange(beats), FIELD_BITS - 1).astype(np.uint16)[:, None]


def field_bits(config: Config) -> int:
    """Bits of a token's field that are its own codes."""
    return FIELD_BITS - one_bit_features(config)


def level_beats(config: Config) -> int:
    """Beats of an octet's levels, and of the fields that are folded."""
    return 2 * OCTET_FEATURES // config.elements_per_beat
