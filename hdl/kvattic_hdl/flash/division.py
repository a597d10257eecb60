"""Linear maps over GF(2): products with constant matrices, steps of a `kvattic.spec.ecc.Division`, products in a field.

A product with a constant matrix is a sum of small tables, one for four bits of the vector.  Synthesis makes the same
XOR trees of them as of masked parities; a compiled simulation reads a table in one step, which is what its speed needs.
"""

from collections.abc import Sequence
from functools import reduce
from operator import xor

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib.memory import Memory

from kvattic.spec.ecc import Division, Field

TABLE_BITS = 4
WORD_BITS = 64
"""Of a table: what a simulator holds in one variable."""


def product(m: Module, name: str, vector: Value, columns: Sequence[int], width: int) -> Value:
    """Sum over GF(2) of the columns (each of `width` bits) whose bit of `vector` is set.

    The tables become submodules of `m` whose names begin with `name`.
    """
    if len(vector) != len(columns):
        raise ValueError(f"columns must be {len(vector)}, one for each bit, not {len(columns)}")
    words = []
    for low in range(0, width, WORD_BITS):
        bits = min(WORD_BITS, width - low)
        parts = []
        for start in range(0, len(vector), TABLE_BITS):
            part = [column >> low & (1 << bits) - 1 for column in columns[start : start + TABLE_BITS]]
            if not any(part):
                continue
            entries = [reduce(xor, (c for i, c in enumerate(part) if entry >> i & 1), 0)
                       for entry in range(1 << len(part))]
            m.submodules[f"{name}_{start}_{low}"] = table = Memory(shape=bits, depth=len(entries), init=entries)
            port = table.read_port(domain="comb")
            m.d.comb += port.addr.eq(vector[start : start + TABLE_BITS])
            parts.append(port.data)
        word = Signal(bits, name=f"{name}_{low}")
        m.d.comb += word.eq(reduce(xor, parts))
        words.append(word)
    return Cat(words)


def divided(m: Module, name: str, division: Division, state: Value, word: Value) -> Value:
    """State of a division after a word, bit 0 first."""
    bits = len(word)
    vector = Signal(bits, name=f"{name}_vector")
    m.d.comb += vector.eq(word ^ state[:bits])
    return (state >> bits)[: division.degree] ^ product(m, name, vector, division.columns(bits), division.degree)


def ones(bits: Value) -> Value:
    """Number of bits that are set, added as a tree."""
    if len(bits) == 1:
        return bits
    half = len(bits) // 2
    return ones(bits[:half]) + ones(bits[half:])


def times_power(m: Module, name: str, field: Field, value: Value, exponent: int) -> Value:
    """Product of a field element and 2**exponent."""
    return product(m, name, value, [field.power(exponent + i) for i in range(field.m)], field.m)


def times(m: Module, name: str, field: Field, a: Value, b: Value) -> Value:
    """Product of two field elements."""
    width = 2 * field.m - 1
    sums = Signal(width, name=f"{name}_sums")
    m.d.comb += sums.eq(reduce(xor, ((b << i)[:width] & a[i].replicate(width) for i in range(field.m))))
    high = product(m, name, sums[field.m :], [field.power(i) for i in range(field.m, width)], field.m)
    return sums[: field.m] ^ high


def squared(m: Module, name: str, field: Field, a: Value) -> Value:
    """Square of a field element, which is linear."""
    return product(m, name, a, [field.power(2 * i) for i in range(field.m)], field.m)
