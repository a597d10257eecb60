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


def times_power(field: Field, value: Value, exponent: int) -> Value:
    """Product of a field element and 2**exponent."""
    return product(value, [field.power(exponent + i) for i in range(field.m)], field.m)
