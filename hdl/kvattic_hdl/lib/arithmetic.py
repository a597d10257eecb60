"""Small combinational pieces: element decode, adders with carry-in, constant multiples, one of many, turns."""

from collections.abc import Sequence
from dataclasses import dataclass

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, Value, ValueLike

from kvattic.spec.formats import SIGNIFICAND_BITS, ElementFormat, KvFormat


@dataclass(frozen=True, slots=True)
class Decoded:
    """An element as (-1)**sign * significand * 2**(exponent - format.offset).

    Attributes
    ----------
    sign : Value, 1 bit
    significand : Value, 11 bits
        Zero for NaN and infinity.
    exponent : Value
        The exponent field; 1 for subnormals.
    special : Value, 1 bit
        NaN or infinity.
    """

    sign: Value
    significand: Value
    exponent: Value
    special: Value


def decode(bits: ValueLike, element: ElementFormat) -> Decoded:
    """Take the 16 bits of an element apart, exactly (docs/numerics.md, section 1)."""
    bits = Value.cast(bits)
    fraction = bits[: element.fraction_bits]
    field = bits[element.fraction_bits : element.fraction_bits + element.exponent_bits]
    normal = field.any()
    special = field.all()
    significand = Cat(fraction, normal) << (SIGNIFICAND_BITS - 1 - element.fraction_bits)
    return Decoded(
        sign=bits[-1],
        significand=Mux(special, 0, significand[:SIGNIFICAND_BITS]),
        exponent=Cat(field[0] | ~normal, field[1:]),
        special=special,
    )


def widen(code: ValueLike, kv: KvFormat, element: ElementFormat) -> Value:
    """The element that a code of K or V stands for, exactly (`kvattic.spec.stored.widen`)."""
    code, form = Value.cast(code), kv.encoding
    if form is None:
        return code
    fraction = code[: form.fraction_bits]
    field = code[form.fraction_bits : form.fraction_bits + form.exponent_bits]
    special = field.all() if form.infinities else field.all() & fraction.all()
    room = element.fraction_bits - form.fraction_bits
    wide_fraction, wide_field = Cat(Const(0, room), fraction), field
    if more := element.bias - form.bias:
        # What is subnormal here is normal there: its first one becomes the hidden bit.
        small, lead = Const(0, element.exponent_bits), Const(0, form.fraction_bits)
        for place in range(form.fraction_bits):
            found = fraction[place]
            small = Mux(found, more - (form.fraction_bits - 1 - place), small)
            lead = Mux(found, Cat(Const(0, form.fraction_bits - place), fraction[:place]), lead)
        normal = field.any()
        wide_fraction = Cat(Const(0, room), Mux(normal, fraction, lead)[: form.fraction_bits])
        wide_field = Mux(normal, field + more, small)[: element.exponent_bits]
    if element.exponent_bits > form.exponent_bits:
        wide_field = wide_field | special.replicate(element.exponent_bits)
    return Cat(wide_fraction, wide_field, code[-1])


def add_carry(a: ValueLike, b: ValueLike, carry: ValueLike) -> Value:
    """A + b + carry as one adder: the carry enters below the least bit."""
    a, b = Value.cast(a), Value.cast(b)
    wide_a = Cat(C(1, 1), a)
    wide_b = Cat(carry, b)
    if a.shape().signed:
        wide_a = wide_a.as_signed()
    if b.shape().signed:
        wide_b = wide_b.as_signed()
    return (wide_a + wide_b) >> 1


def times(value: ValueLike, factor: int) -> Value:
    """Value * factor by shifts and adds (factor is a small constant)."""
    value = Value.cast(value)
    terms = [value << bit for bit in range(factor.bit_length()) if factor >> bit & 1]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def pick(values: Sequence[ValueLike], number: Value) -> Value:
    """values[number] as a tree of two-way multiplexers; of a number beyond the last one any of them.

    An `Array` becomes a comparison for each element and an OR over all of them, which takes half as many LUTs more.
    """
    level = [Value.cast(value) for value in values]
    for bit in number:
        level = [Mux(bit, *reversed(pair)) if len(pair) > 1 else pair[0]
                 for pair in (level[at : at + 2] for at in range(0, len(level), 2))]
    return level[0]


def strobe(valid: ValueLike, number: ValueLike) -> Value:
    """The bit of this number, if it is valid; not `valid << number`, which is unknown while the number is."""
    return Mux(valid, 1 << Value.cast(number), 0)


def next_of(m: Module, wanted: Value, at: Value, name: str) -> Signal:
    """The number of the next bit behind number `at` that is set, round and round; 0 where none is."""
    count = len(wanted)
    behind = wanted & ~((2 << at) - 1)
    found = Signal(range(max(2, count)), name=name)
    for candidates in (wanted, behind[:count]):
        for number in reversed(range(count)):
            with m.If(candidates[number]):
                m.d.comb += found.eq(number)
    return found
