"""log2 of a denominator, bit by bit."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic.spec.formats import LOG_BITS, SCORE_FRACTION, VALUE_FRACTION
from kvattic_hdl.lib.shapes import Shapes

LOGARITHM_BITS = 8 + SCORE_FRACTION
"""Bits of a logarithm of a denominator, sign included."""


class Logarithm(wiring.Component):
    """log2(value * 2**-VALUE_FRACTION), rounded down to `SCORE_FRACTION` bits of a mantissa of `LOG_BITS` bits.

    The mantissa (1 <= m < 2, truncated) is squared once for each fractional bit: is the square 2 or more, the bit is 1
    and the square is halved; each square is truncated.  docs/numerics.md, section 7.

    Latency: from `start` to `done` 2 + 4 * SCORE_FRACTION cycles (90), and one for each zero above the value's leading
    one.  One multiplier of half a mantissa's width.  One value at a time; reset forgets it.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : In(1)
        Strobe: `value` is given.  Not while another one is in work.
    value : In(denominator)
        Not zero.
    done : Out(1)
        Strobe: `result` is there, and stays until the next `start`.
    result : Out(signed(LOGARITHM_BITS))
        `SCORE_FRACTION` fractional bits, as in a score.
    """

    def __init__(self, config: Config) -> None:
        self._value_bits = config.denominator_bits
        super().__init__({
            "start": In(1),
            "value": In(Shapes(config).denominator),
            "done": Out(1),
            "result": Out(signed(LOGARITHM_BITS)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        width = max(self._value_bits, LOG_BITS)
        half = LOG_BITS // 2

        value = Signal(width)
        mantissa = Signal(LOG_BITS)
        exponent = Signal(range(width))
        bits = Signal(SCORE_FRACTION)
        bits_left = Signal(range(SCORE_FRACTION + 1))
        low, high = mantissa[:half], mantissa[half:]
        a, b = Signal(half), Signal(half)
        product = Signal(2 * half)
        lower = Signal(LOG_BITS + half + 2)    # the square without high * high
        upper = Signal(LOG_BITS)
        bit = upper[-1]
        m.d.sync += product.eq(a * b)
        m.d.comb += [
            upper.eq(lower[LOG_BITS:] + product),
            self.result.eq(Cat(bits, exponent - VALUE_FRACTION).as_signed()),
        ]
        m.d.sync += self.done.eq(0)
        with m.FSM(name="state"):
            with m.State("idle"):
                m.d.sync += [value.eq(self.value << (width - self._value_bits)), bits_left.eq(SCORE_FRACTION)]
                with m.If(self.start):
                    m.d.sync += exponent.eq(self._value_bits - 1)
                    m.next = "normalise"
            with m.State("normalise"):
                m.d.sync += mantissa.eq(value[-LOG_BITS:])
                with m.If(value[-1] | (exponent == 0)):
                    m.next = "low"
                with m.Else():
                    m.d.sync += [value.eq(value << 1), exponent.eq(exponent - 1)]
            with m.State("low"):
                m.d.comb += [a.eq(low), b.eq(low)]
                m.next = "middle"
            with m.State("middle"):
                m.d.comb += [a.eq(low), b.eq(high)]
                m.d.sync += lower.eq(product)
                m.next = "high"
            with m.State("high"):
                m.d.comb += [a.eq(high), b.eq(high)]
                m.d.sync += lower.eq(lower + (product << (half + 1)))
                m.next = "bit"
            with m.State("bit"):
                m.d.sync += [
                    mantissa.eq(Mux(bit, upper, Cat(lower[LOG_BITS - 1], upper))),
                    bits.eq(Cat(bit, bits)),
                    bits_left.eq(bits_left - 1),
                ]
                with m.If(bits_left == 1):
                    m.d.sync += self.done.eq(1)
                    m.next = "idle"
                with m.Else():
                    m.next = "low"
        return m
