"""The code that protects a codeword in flash: binary BCH over data and a check value (docs/ecc.md).

A raw codeword is, in the order of its bits,

    data (codeword_bytes) | CRC (24 bits) | parity (the degree of the generator) | zeros up to a whole beat.

Bits are taken byte by byte, each byte's lowest bit first; the first is the coefficient of the highest power.  So a
word of `beat_bytes` bytes, the first byte in its lowest bits, holds its bits in order from bit 0 on, and hardware
takes it in one step (`Division`).

The CRC is reflected CRC-24 (polynomial 0x864CFB, which OpenPGP uses), begun with `seed(page, codeword)`: it finds
miscorrections, and codewords that come from another place.  The parity is stored inverted, so that a bus that is
stuck at zero does not read as a codeword of zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.config import CRC_BITS, Config

__all__ = ["CRC_POLYNOMIAL", "Code", "Decoded", "Division", "Field", "Outcome", "code", "decode", "encode", "seed"]

Bytes: TypeAlias = NDArray[np.uint8]

CRC_POLYNOMIAL = 0x1864CFB
"""(x + 1) times a primitive polynomial of degree 23: it finds every odd number of wrong bits."""
PRIMITIVE = {
    5: 0x25, 6: 0x43, 7: 0x83, 8: 0x11D, 9: 0x211, 10: 0x409, 11: 0x805, 12: 0x1053, 13: 0x201B, 14: 0x402B,
    15: 0x8003, 16: 0x1002D, 17: 0x20009, 18: 0x40027, 19: 0x80027, 20: 0x100009,
}
"""Primitive polynomial of GF(2**m), by m; up to 15 those of the Linux kernel's BCH library."""
_BLOCK = 8192
"""Codewords that are worked on together: their state stays in the cache."""


def _reversed(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2) if bits else 0


def seed(page: int, codeword: int) -> int:
    """What the CRC of a codeword begins with; bit i is the coefficient of x**(23 - i).

    Two places of one drive have different seeds if page and codeword numbers take at most 24 bits together.
    """
    return ~(page ^ _reversed(codeword, CRC_BITS)) & (1 << CRC_BITS) - 1


class Division:
    """Division of a bit stream by a polynomial over GF(2): the shift register of CRC and BCH encoders.

    The state is the remainder of (stream * x**degree); its bit i is the coefficient of x**(degree - 1 - i), so that it
    leaves in the order of the stream, bit 0 first.

    Attributes:
        polynomial: the divisor, bit i the coefficient of x**i.
        degree: its degree.
    """

    def __init__(self, polynomial: int) -> None:
        self.polynomial = polynomial
        self.degree = polynomial.bit_length() - 1
        self._taps = _reversed(polynomial & ~(1 << self.degree), self.degree)

    def shift(self, state: int, bits: int = 1) -> int:
        """The state after a number of zeros."""
        for _ in range(bits):
            state = state >> 1 ^ (self._taps if state & 1 else 0)
        return state

    def unshift(self, state: int, bits: int = 1) -> int:
        """The state before a number of zeros (the polynomial's constant term is 1)."""
        top = self.degree - 1
        for _ in range(bits):
            state = (state ^ self._taps) << 1 | 1 if state >> top else state << 1
        return state

    def columns(self, bits: int) -> list[int]:
        """What each bit of a word of so many bits adds to the state after it.

        With ``v = word ^ state``, of which the word's bits count: the next state is ``state >> bits`` and column i for
        each bit i of v.
        """
        columns = [self._taps]
        while len(columns) < bits:
            columns.insert(0, self.shift(columns[0]))
        return columns

    def remainders(self, stream: Bytes, state: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """States (64-bit words of them, streams) after the bytes (bytes, streams), from the states before."""
        words = len(state)
        tables = np.zeros((words, 256), np.uint64)
        for i, column in enumerate(self.columns(8)):
            chosen = (np.arange(256) >> i & 1).astype(bool)
            for word in range(words):
                tables[word, chosen] ^= np.uint64(column >> 64 * word & (1 << 64) - 1)
        state = state.copy()
        eight, rest = np.uint64(8), np.uint64(56)
        for byte in stream:
            index = state[0].astype(np.uint8) ^ byte
            for word in range(words):
                state[word] >>= eight
                if word + 1 < words:
                    state[word] |= state[word + 1] << rest
                state[word] ^= tables[word][index]
        return state

    @property
    def words(self) -> int:
        """64-bit words of a state."""
        return -(-self.degree // 64)


class Field:
    """Arithmetic in GF(2**m) on arrays.

    Attributes:
        m: the elements are m bits.
        polynomial: primitive polynomial; 2 is a primitive element.
        order: number of powers of 2.
        powers: powers[i] = 2**i.
        logarithms: of each element but 0.
    """

    def __init__(self, m: int) -> None:
        if m not in PRIMITIVE:
            raise ConfigError(f"codeword_bytes and ecc_t must need a field of 2**5 to 2**{max(PRIMITIVE)}, not 2**{m}")
        self.m = m
        self.polynomial = PRIMITIVE[m]
        self.order = (1 << m) - 1
        powers, value = [], 1
        for _ in range(self.order):
            powers.append(value)
            value = value << 1 ^ (self.polynomial if value >> m - 1 else 0)
        self.powers: NDArray[np.int64] = np.array(powers, np.int64)
        self.logarithms: NDArray[np.int64] = np.zeros(1 << m, np.int64)
        self.logarithms[self.powers] = np.arange(self.order)

    def power(self, exponent: int) -> int:
        """2**exponent, for any exponent."""
        return int(self.powers[exponent % self.order])

    def times(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Products, element by element."""
        product = self.powers[(self.logarithms[a] + self.logarithms[b]) % self.order]
        return np.where((a == 0) | (b == 0), 0, product)

    def minimal_polynomial(self, exponent: int) -> int:
        """The binary polynomial of least degree with the root 2**exponent."""
        roots, e = [], exponent % self.order
        while e not in roots:
            roots.append(e)
            e = 2 * e % self.order
        coefficients = [1]   # of a product over GF(2**m), lowest power first
        for e in roots:
            up = [0, *coefficients]
            scaled = self.times(np.array([*coefficients, 0]), np.array(self.power(e)))
            coefficients = [int(a ^ b) for a, b in zip(up, scaled, strict=True)]
        return sum(c << i for i, c in enumerate(coefficients))


class Outcome(IntEnum):
    """What became of a codeword that was read."""

    CLEAN = 0
    """No bit was wrong."""
    CORRECTED = 1
    """Wrong bits were found, all of them."""
    ERASED = 2
    """Nothing was written there: at most ecc_t bytes are not 0xFF."""
    UNCORRECTABLE = 3
    """Too many wrong bits, or the check value is wrong: another place's data."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What `decode` makes of pages; codewords stand in order.

    Attributes:
        data: (pages, page_bytes) bytes; those of codewords that cannot be read are zero.
        outcome: (pages, codewords_per_page) of `Outcome`.
        errors: (pages, codewords_per_page): bits that were corrected.
    """

    data: Bytes
    outcome: NDArray[np.uint8]
    errors: NDArray[np.int64]


class Code:
    """The code of one configuration.

    Attributes:
        config: the configuration.
        field: what the locators of wrong bits are elements of.
        crc: division that makes the check value.
        parity: division that makes the parity; its polynomial is the generator.
        message_bits: data and CRC.
        code_bits: data, CRC and parity; the bits behind are padding.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.field = Field(config.bch_m)
        self.crc = Division(CRC_POLYNOMIAL)
        generator, factors = 1, set()
        for j in range(1, 2 * config.ecc_t, 2):
            factors.add(self.field.minimal_polynomial(j))
        for factor in sorted(factors):
            generator = _carryless(generator, factor)
        self.parity = Division(generator)
        self.message_bits = config.codeword_bytes * 8 + CRC_BITS
        self.code_bits = self.message_bits + self.parity.degree

    def seeds(self, page_numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """What the check value of each codeword of each page begins with, in order: uint64, (1, codewords)."""
        indices = np.array([_reversed(i, CRC_BITS) for i in range(self.config.codewords_per_page)], np.int64)
        return (~(page_numbers[:, None] ^ indices) & (1 << CRC_BITS) - 1).astype(np.uint64).reshape(1, -1)

    def encode(self, data: Bytes, seeds: NDArray[np.uint64]) -> Bytes:
        """Raw codewords (codewords, bytes) of data (codewords, bytes) and the CRC's states before them."""
        config, size = self.config, self.config.codeword_bytes
        raw = np.zeros((len(data), config.raw_codeword_bytes), np.uint8)
        raw[:, :size] = data
        check = self.crc.remainders(np.ascontiguousarray(data.T), seeds)
        raw[:, size : size + 3] = _bytes(check)[:, :3]
        message = np.ascontiguousarray(raw[:, : size + 3].T)
        parity = self.parity.remainders(message, np.zeros((self.parity.words, len(data)), np.uint64))
        width = -(-self.parity.degree // 8)
        raw[:, size + 3 : size + 3 + width] = _bytes(parity)[:, :width] ^ self._inverted
        return raw

    @property
    def _inverted(self) -> Bytes:
        """Mask of the parity bits, in bytes from the parity's first."""
        degree = self.parity.degree
        return np.frombuffer(((1 << degree) - 1).to_bytes(-(-degree // 8), "little"), np.uint8)

    def decode(self, raw: Bytes, seeds: NDArray[np.uint64]) -> tuple[Bytes, NDArray[np.uint8], NDArray[np.int64]]:
        """(data, outcome, errors) of raw codewords (codewords, bytes)."""
        size, count = self.config.codeword_bytes, len(raw)
        erased = (raw != 0xFF).sum(axis=1) <= self.config.ecc_t
        message_size = size + CRC_BITS // 8
        received = raw[:, : message_size + len(self._inverted)].copy()
        received[:, message_size:] ^= self._inverted
        received[:, message_size:] &= self._inverted   # padding
        stream = np.ascontiguousarray(received.T)
        remainder = self.parity.remainders(stream, np.zeros((self.parity.words, count), np.uint64))
        data = received[:, :message_size].copy()
        outcome = np.full(count, Outcome.CLEAN, np.uint8)
        errors = np.zeros(count, np.int64)

        dirty = np.flatnonzero(remainder.any(axis=0) & ~erased)
        for part in np.array_split(dirty, -(-len(dirty) // 128)) if len(dirty) else ():
            found = self._errors(_bytes(remainder[:, part]))
            bits = np.unpackbits(data[part], axis=1, bitorder="little") ^ found[0][:, : self.message_bits]
            data[part] = np.packbits(bits, axis=1, bitorder="little")
            errors[part] = found[0].sum(axis=1)
            outcome[part] = np.where(found[1], Outcome.CORRECTED, Outcome.UNCORRECTABLE)
        check = self.crc.remainders(np.ascontiguousarray(data.T), seeds)
        outcome[check[0] != 0] = Outcome.UNCORRECTABLE
        outcome[erased] = Outcome.ERASED
        data[outcome >= Outcome.ERASED] = 0
        errors[outcome != Outcome.CORRECTED] = 0
        return data[:, :size], outcome, errors

    def _errors(self, remainders: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
        """(wrong bits as 0 or 1, whether the code says that they are all) for remainders (codewords, bytes)."""
        field, t, degree = self.field, self.config.ecc_t, self.parity.degree
        bits = np.unpackbits(remainders, axis=1, bitorder="little")[:, :degree].astype(np.int64)
        # The remainder's bit i stands for x**(degree - 1 - i); a stream of whole bytes was divided, and each of its
        # bits was raised by `degree`.
        syndromes = np.zeros((len(bits), 2 * t), np.int64)
        exponents = degree - 1 - np.arange(degree)
        for j in range(1, 2 * t + 1):
            values = field.powers[exponents * j % field.order]
            syndromes[:, j - 1] = np.bitwise_xor.reduce(bits * values, axis=1)
        locator, length = self._locator(syndromes)
        stream_bits = -(-self.code_bits // 8) * 8
        position = degree + stream_bits - 1 - np.arange(self.code_bits)   # exponent of each bit's locator
        value = np.broadcast_to(locator[:, :1], (len(bits), self.code_bits)).copy()
        logs = field.logarithms[locator]
        for i in range(1, min(t, int(length.max())) + 1):
            term = field.powers[(logs[:, i : i + 1] - i * position[None, :]) % field.order]
            value ^= np.where(locator[:, i : i + 1] == 0, 0, term)
        wrong = (value == 0).astype(np.uint8)
        return wrong, (length <= t) & (wrong.sum(axis=1) == length)

    def _locator(self, syndromes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(error-locator polynomials, their lengths): Berlekamp and Massey's algorithm without division."""
        field, count, steps = self.field, len(syndromes), syndromes.shape[1]
        locator = np.zeros((count, steps + 2), np.int64)
        locator[:, 0] = 1
        other, scale = locator.copy(), np.ones((count, 1), np.int64)
        length = np.zeros(count, np.int64)
        for k in range(steps):
            discrepancy = np.zeros((count, 1), np.int64)
            for i in range(k + 1):
                discrepancy[:, 0] ^= field.times(locator[:, i], syndromes[:, k - i])
            other = np.roll(other, 1, axis=1)
            other[:, 0] = 0
            following = field.times(locator, scale) ^ field.times(other, discrepancy)
            longer = ((discrepancy[:, 0] != 0) & (2 * length <= k))[:, None]
            other = np.where(longer, locator, other)
            scale = np.where(longer, discrepancy, scale)
            length = np.where(longer[:, 0], k + 1 - length, length)
            locator = following
        return locator, length


def _carryless(a: int, b: int) -> int:
    """Product of two polynomials over GF(2)."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = a << 1, b >> 1
    return product


def _bytes(states: NDArray[np.uint64]) -> Bytes:
    """States (64-bit words, streams) as (streams, bytes), bit 0 first."""
    return np.ascontiguousarray(states.T).astype("<u8").view(np.uint8).reshape(states.shape[1], -1)


@cache
def code(config: Config) -> Code:
    """The code of a configuration."""
    return Code(config)


def _page_numbers(config: Config, pages: Bytes, width: int, page_numbers: ArrayLike) -> NDArray[np.int64]:
    """Both arguments of `encode` and `decode`, checked."""
    numbers = np.asarray(page_numbers)
    if pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != width:
        raise RequestError(f"pages must be uint8 of (pages, {width}), not {pages.dtype} of {pages.shape}")
    if numbers.shape != (len(pages),) or not np.issubdtype(numbers.dtype, np.integer):
        raise RequestError(f"page_numbers must be {len(pages)} integers, one for each page, not {numbers.dtype} of "
                           f"{numbers.shape}")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < config.pages_per_channel:
        raise RequestError(f"page_numbers must be 0 to {config.pages_per_channel - 1}, not {int(numbers.min())} to "
                           f"{int(numbers.max())}")
    return numbers.astype(np.int64)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(count, start + _BLOCK))


def encode(config: Config, data: Bytes, page_numbers: ArrayLike) -> Bytes:
    """What pages look like in flash: (pages, raw_page_bytes).

    Args:
        config: the configuration.
        data: (pages, page_bytes) bytes.
        page_numbers: number of each page on its channel, which its check values depend on.

    Raises:
        RequestError: shapes or page numbers do not fit the configuration.
    """
    numbers = _page_numbers(config, data, config.page_bytes, page_numbers)
    the_code = code(config)
    codewords, seeds = data.reshape(-1, config.codeword_bytes), the_code.seeds(numbers)
    raw = np.empty((len(codewords), config.raw_codeword_bytes), np.uint8)
    for block in _blocks(len(codewords)):
        raw[block] = the_code.encode(codewords[block], seeds[:, block])
    return raw.reshape(len(data), config.raw_page_bytes)


def decode(config: Config, raw: Bytes, page_numbers: ArrayLike) -> Decoded:
    """What pages in flash say.

    Args:
        config: the configuration.
        raw: (pages, raw_page_bytes) bytes.
        page_numbers: number of each page on its channel.

    Raises:
        RequestError: shapes or page numbers do not fit the configuration.
    """
    numbers = _page_numbers(config, raw, config.raw_page_bytes, page_numbers)
    the_code = code(config)
    codewords, seeds = raw.reshape(-1, config.raw_codeword_bytes), the_code.seeds(numbers)
    data = np.empty((len(codewords), config.codeword_bytes), np.uint8)
    outcome = np.empty(len(codewords), np.uint8)
    errors = np.empty(len(codewords), np.int64)
    for block in _blocks(len(codewords)):
        data[block], outcome[block], errors[block] = the_code.decode(codewords[block], seeds[:, block])
    shape = (len(raw), config.codewords_per_page)
    return Decoded(data=data.reshape(len(raw), config.page_bytes), outcome=outcome.reshape(shape),
                   errors=errors.reshape(shape))
