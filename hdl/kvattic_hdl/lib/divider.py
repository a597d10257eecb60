"""Exact division of an accumulator by a denominator, rounded once to fp32."""

from functools import partial

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from kvattic.spec.formats import FP32_BIAS
from kvattic_hdl.lib.pipeline import later as pipeline_later
from kvattic_hdl.lib.pipeline import shift_up, tag_later

FP32_FRACTION_BITS = 23
DIGITS = 26
"""Quotient digits: the first may be zero, 24 are the significand, one is the guard bit."""


def normalised(bits: int) -> data.StructLayout:
    """Layout of a denominator of `bits` bits, shifted up until its top bit is set.

    `value` is zero if the denominator is; `zeros` is the number of places it was shifted.
    """
    return data.StructLayout({"value": bits, "zeros": unsigned(bits_for(bits - 1))})


class Normaliser(wiring.Component):
    """Shifts an unsigned number up until its top bit is set; one number at a time.

    A denominator serves a whole row of divisions, so this one is small instead of fast: it shifts
    by eight or by one place a cycle.  `o` is valid from 1 to ``bits // 8 + 8`` cycles after the
    number is taken (2 cycles at most for zero), in order.  Reset forgets the number in work.

    Parameters
    ----------
    bits : int
        Width of the number, at least 9.

    Members
    -------
    i : In(stream.Signature(unsigned(bits)))
        Number; taken while none is in work.
    o : Out(stream.Signature(normalised(bits)))
        The same number, normalised.

    Raises
    ------
    ValueError
        `bits` is below 9.
    """

    i: stream.Interface
    o: stream.Interface

    def __init__(self, bits: int) -> None:
        if bits < 9:
            raise ValueError(f"bits must be at least 9, not {bits!r}")
        self.bits = bits
        super().__init__(
            {
                "i": In(stream.Signature(unsigned(bits))),
                "o": Out(stream.Signature(normalised(bits))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        busy = Signal()
        value = Signal(self.bits, reset_less=True)
        zeros = Signal(bits_for(self.bits - 1), reset_less=True)
        nothing = Signal(reset_less=True)
        done = value[-1] | nothing
        m.d.comb += [
            self.i.ready.eq(~busy),
            self.o.valid.eq(busy & done),
            self.o.payload.value.eq(value),
            self.o.payload.zeros.eq(zeros),
        ]
        with m.If(~busy):
            m.d.sync += [
                busy.eq(self.i.valid),
                value.eq(self.i.payload),
                zeros.eq(0),
                nothing.eq(self.i.payload == 0),
            ]
        with m.Elif(done):
            m.d.sync += busy.eq(~self.o.ready)
        with m.Elif(value[-8:] == 0):
            m.d.sync += [value.eq(value << 8), zeros.eq(zeros + 8)]
        with m.Else():
            m.d.sync += [value.eq(value << 1), zeros.eq(zeros + 1)]
        return m


class Divider(wiring.Component):
    """Divides a signed number by an unsigned one of equal fixed point: nearest fp32, ties to even.

    Latency: `LATENCY` cycles, always.  Throughput: one quotient a cycle.  Order is kept.  There is
    no backpressure: whoever divides keeps a place for the result beforehand (the finisher has one
    for each element of the job). Reset empties the pipeline.  A quotient with a zero in numerator
    or denominator is +0; any other is in fp32's normal range.

    The quotient is exact up to its last digit: non-restoring division over the whole width, one
    digit a stage, and what remains decides between below, at and above a tie.

    Parameters
    ----------
    numerator_bits : int
        Width of the numerator, sign included.
    denominator_bits : int
        Width of the denominator.  The numerator may be at most 25 bits wider.
    tag : Shape
        Shape of what accompanies a division.

    Members
    -------
    i : In(stream.Signature(StructLayout, always_ready=True))
        `numerator` (signed), `denominator` (see `normalised`, which `Normaliser` makes) and `tag`.
    o : Out(stream.Signature(StructLayout, always_ready=True))
        `quotient` (bits of an fp32) and the `tag` of its operands.

    Raises
    ------
    ValueError
        A width for which the quotient could leave fp32's normal range or digits would be lost.
    """

    LATENCY = 5 + DIGITS + 2

    i: stream.Interface
    o: stream.Interface

    def __init__(
        self, numerator_bits: int, denominator_bits: int, tag: Shape | data.Layout
    ) -> None:
        if not 17 <= numerator_bits <= 100:
            raise ValueError(f"numerator_bits must be 17 to 100, not {numerator_bits!r}")
        if not 9 <= denominator_bits <= 100:
            raise ValueError(f"denominator_bits must be 9 to 100, not {denominator_bits!r}")
        if numerator_bits - denominator_bits >= DIGITS:
            raise ValueError(
                f"numerator_bits must be at most {DIGITS - 1} above denominator_bits "
                f"({denominator_bits!r}), not {numerator_bits!r}"
            )
        self.numerator_bits = numerator_bits
        self.denominator_bits = denominator_bits
        self.tag = tag
        super().__init__(
            {
                "i": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "numerator": signed(numerator_bits),
                                "denominator": normalised(denominator_bits),
                                "tag": tag,
                            }
                        ),
                        always_ready=True,
                    )
                ),
                "o": Out(
                    stream.Signature(
                        data.StructLayout({"quotient": 32, "tag": tag}), always_ready=True
                    )
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits, width = self.numerator_bits, self.denominator_bits
        given = self.i.payload

        # Only `valid` has a reset.
        valid = Signal(self.LATENCY)
        m.d.sync += valid.eq(Cat(self.i.valid, valid))
        tag = tag_later(m, given.tag, self.tag, self.LATENCY)
        later = partial(pipeline_later, m)

        # 1: magnitude (its width holds the magnitude of the most negative number, too).
        negative = given.numerator[-1]
        magnitude = later(Mux(negative, -given.numerator, given.numerator)[:bits], "magnitude")
        sign = later(negative, "sign", self.LATENCY - 1)

        # 2 to 5: without leading zeros.
        zeros, numerator = shift_up(m, magnitude, "numerator")

        denominator = later(given.denominator.value, "denominator", 5)
        denominator_zeros = later(given.denominator.zeros, "denominator_zeros", 4)
        exponent = Signal(8, reset_less=True)
        m.d.sync += exponent.eq(FP32_BIAS + bits - width + denominator_zeros - zeros)

        # One digit a stage.  A remainder is in [-denominator, denominator) and its sign says both
        # what the digit is and whether the next step adds or subtracts.
        operand = Cat(Const(0, max(0, width - bits)), numerator)
        rest = operand[:-width]
        zero = later(~(numerator[-1] & denominator[-1]), "zero", DIGITS + 1)
        exponent = later(exponent, "exponent", DIGITS)
        remainder = None
        digits = []
        for stage in range(DIGITS):
            if remainder is None:
                minuend, subtract = Cat(operand[-width:], Const(0, 1)), Const(1, 1)
            else:
                # The digit that comes down, while the numerator has any.
                down = rest[-1] if len(rest) else Const(0, 1)
                rest = rest[:-1]
                minuend, subtract = Cat(down, remainder[:-1]), ~remainder[-1]
            # The operation's carry enters through an additional low bit: one adder, one LUT for a
            # bit.
            flipped = Cat(denominator, Const(0, 1)) ^ subtract.replicate(width + 1)
            difference = (Cat(subtract, minuend) + Cat(subtract, flipped))[1 : width + 2]
            remainder = later(difference, f"remainder{stage}")
            denominator = later(denominator, f"denominator{stage}")
            if len(rest):
                rest = later(rest, f"rest{stage}")
            digits = [later(digit, f"digit{index}_{stage}") for index, digit in enumerate(digits)]
            digits.append(~remainder[-1])

        # What remains is nothing if the remainder is zero or, one subtraction too far, minus the
        # denominator: a + b == 0 without a carry chain.
        either = remainder | Cat(denominator, Const(0, 1))
        differs = (remainder ^ Cat(denominator, Const(0, 1)) ^ Cat(Const(0, 1), either[:-1])).any()
        inexact = Mux(remainder[-1], differs, remainder.any())
        quotient = Cat(reversed(digits))
        fraction = Signal(FP32_FRACTION_BITS, reset_less=True)
        guard = Signal(reset_less=True)
        sticky = Signal(reset_less=True)
        biased = Signal(8, reset_less=True)
        with m.If(quotient[-1]):
            m.d.sync += [
                Cat(guard, fraction).eq(quotient[1:-1]),
                sticky.eq(quotient[0] | inexact),
                biased.eq(exponent),
            ]
        with m.Else():
            m.d.sync += [
                Cat(guard, fraction).eq(quotient[:-2]),
                sticky.eq(inexact),
                biased.eq(exponent - 1),
            ]

        # A carry out of the fraction makes it zero and raises the exponent, as it should.
        result = Signal(32, reset_less=True)
        up = guard & (sticky | fraction[0])
        m.d.sync += result.eq(Mux(zero, 0, Cat((Cat(fraction, biased) + up)[:31], sign)))
        m.d.comb += [
            self.o.valid.eq(valid[-1]),
            self.o.payload.quotient.eq(result),
            self.o.payload.tag.eq(tag),
        ]
        return m
