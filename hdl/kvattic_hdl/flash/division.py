"""Linear maps over GF(2) as wiring: products with constant matrices, and steps of a `kvattic.ecc.Division`."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Value

from kvattic.ecc import Division, Field


def product(vector: Value, columns: Sequence[int], width: int) -> Value:
    """Sum over GF(2) of the columns (each of `width` bits) whose bit of `vector` is set."""
    if len(vector) != len(columns):
        raise ValueError(f"columns must be {len(vector)}, one for each bit, not {len(columns)}")
    rows = [sum((column >> row & 1) << i for i, column in enumerate(columns)) for row in range(width)]
    return Cat((vector & mask).xor() if mask else Const(0, 1) for mask in rows)


def divided(division: Division, state: Value, word: Value) -> Value:
    """State of a division after a word, bit 0 first."""
    bits = len(word)
    return (state >> bits)[: division.degree] ^ product(
        (word ^ state[:bits])[:bits], division.columns(bits), division.degree)


def ones(bits: Value) -> Value:
    """Number of bits that are set, added as a tree."""
    if len(bits) == 1:
        return bits
    half = len(bits) // 2
    return ones(bits[:half]) + ones(bits[half:])


def times_power(field: Field, value: Value, exponent: int) -> Value:
    """Product of a field element and 2**exponent."""
    return product(value, [field.power(exponent + i) for i in range(field.m)], field.m)


def times(field: Field, a: Value, b: Value) -> Value:
    """Product of two field elements."""
    bits = field.m
    turned = b[::-1]
    sums = []
    for power in range(2 * bits - 1):   # of all a[i] * b[power - i]
        low, high = max(0, power - bits + 1), min(bits, power + 1)
        sums.append((a[low:high] & turned[bits - 1 - power + low : bits - 1 - power + high]).xor())
    return product(Cat(sums), [field.power(i) for i in range(len(sums))], bits)


def squared(field: Field, a: Value) -> Value:
    """Square of a field element, which is linear."""
    return product(a, [field.power(2 * i) for i in range(field.m)], field.m)
