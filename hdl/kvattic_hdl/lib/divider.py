"""Exact division of an accumulator by a denominator, rounded once to fp32."""

from functools import partial

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from kvattic.spec.formats import FP32_BIAS
from kvattic_hdl.lib.arithmetic import add_carry
from kvattic_hdl.lib.pipeline import later as pipeline_later
from kvattic_hdl.lib.pipeline import shift_up, tag_later

FP32_FRACTION_BITS = 23
STEP = 13
"""Bits of the quotient that one step gives."""
DIGITS = 2 * STEP + 1
"""Quotient digits: the first may be zero, 24 are the significand, one is the guard bit, one is spare."""
GUESS = STEP + 1
"""Bits of a step's guess: what a step leaves is less than twice the denominator."""
TOP = 16
"""Bits of an operand that are looked at for a guess, and one above them."""
DIVISOR_TOP = 20
"""Bits of a denominator that its reciprocal is of."""
RECIPROCAL_BITS = 19
"""Bits of a reciprocal, one before the point."""
DSP = 24
"""Bits of an unsigned factor that a DSP slice multiplies by `GUESS` bits."""


def normalised(bits: int) -> data.StructLayout:
    """Layout of a denominator of `bits` bits, shifted up until its top bit is set.

    `value` is zero if the denominator is; `zeros` is the number of places it was shifted.
    """
    return data.StructLayout({"value": bits, "zeros": unsigned(bits_for(bits - 1))})


def divisor(bits: int) -> data.StructLayout:
    """Layout of a denominator that can be divided by: `normalised`, and its `reciprocal` by `Reciprocal`."""
    return data.StructLayout({
        "value": bits, "zeros": normalised(bits)["zeros"].shape, "reciprocal": unsigned(RECIPROCAL_BITS)})


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


class Reciprocal(wiring.Component):
    """Adds to a normalised denominator what the divider guesses with; one at a time.

    The reciprocal of value / 2**bits, which is between 1 and 2, never above it, and less than 2**-17 below.

    Latency: `LATENCY` cycles: a bit a cycle.  In order.  Reset forgets the number in work.

    Parameters
    ----------
    bits : int
        Width of the denominator.

    Members
    -------
    i : In(stream.Signature(normalised(bits)))
        Denominator; taken while none is in work.  The reciprocal of zero means nothing.
    o : Out(stream.Signature(divisor(bits)))
        The same, with its reciprocal.
    """

    LATENCY = RECIPROCAL_BITS + 1

    i: stream.Interface
    o: stream.Interface

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__({
            "i": In(stream.Signature(normalised(bits))),
            "o": Out(stream.Signature(divisor(bits))),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        busy, number = Signal(), Signal(normalised(self.bits), reset_less=True)
        left = Signal(range(RECIPROCAL_BITS + 1))
        # The top of the denominator, rounded up, so that the reciprocal is never too large.
        top = Signal(DIVISOR_TOP + 1)
        m.d.comb += top.eq(Cat(Const(0, max(0, DIVISOR_TOP - self.bits)), number.value)[-DIVISOR_TOP:] + 1)
        rest = Signal(DIVISOR_TOP, reset_less=True)
        quotient = Signal(RECIPROCAL_BITS, reset_less=True)
        less = Signal(signed(DIVISOR_TOP + 2))
        m.d.comb += [
            less.eq(Cat(Const(0, 1), rest) - top),
            self.i.ready.eq(~busy),
            self.o.valid.eq(busy & (left == 0)),
            self.o.payload.value.eq(number.value),
            self.o.payload.zeros.eq(number.zeros),
            self.o.payload.reciprocal.eq(quotient),
        ]
        with m.If(~busy):
            m.d.sync += [
                busy.eq(self.i.valid),
                number.eq(self.i.payload),
                rest.eq(1 << DIVISOR_TOP - 1),
                left.eq(RECIPROCAL_BITS),
            ]
        with m.Elif(left != 0):
            m.d.sync += [
                left.eq(left - 1),
                rest.eq(Mux(less[-1], Cat(Const(0, 1), rest), less)),
                quotient.eq(Cat(~less[-1], quotient)),
            ]
        with m.Elif(self.o.ready):
            m.d.sync += busy.eq(0)
        return m


class Divider(wiring.Component):
    """Divides a signed number by an unsigned one of equal fixed point: nearest fp32, ties to even.

    Latency: `LATENCY` cycles, always.  Throughput: one quotient every second cycle, in which `i` is ready.  Order is
    kept.  There is no backpressure from `o`: whoever divides keeps a place for the result beforehand (the finisher has
    one for each element of the job). Reset empties the pipeline.  A quotient with a zero in numerator or denominator is
    +0; any other is in fp32's normal range.

    The quotient is exact up to its last digit, in two steps of `STEP` bits, by the same hardware in turns: a step
    guesses its bits by the denominator's reciprocal, and subtracts the guess times the whole denominator.  A guess is
    never above the bits and at most one below, so one more subtraction at the end makes the quotient right, and what
    remains decides between below, at and above a tie.

    Why the guess is that good: an operand is below 2 (the denominator being d, 1/2 <= d < 1).  Its top misses less than
    2**-TOP of it, which is 2**(1-TOP) of the quotient; the reciprocal misses less than 2**-17, which is 2**-16.  By
    2**STEP these are below 1/4 + 1/8, and less than 1 falls to the bits below: less than 2 in all.

    Parameters
    ----------
    numerator_bits : int
        Width of the numerator, sign included.
    denominator_bits : int
        Width of the denominator.  The numerator may be at most 25 bits wider.
    tag : Shape
        Shape of what accompanies a division.
    steady : bool
        Whoever divides keeps the denominator at `i` as it is until the quotient is there, so that no stage has to.

    Members
    -------
    i : In(stream.Signature(StructLayout))
        `numerator` (signed), `denominator` (see `divisor`, which `Normaliser` and `Reciprocal` make) and `tag`.
    o : Out(stream.Signature(StructLayout, always_ready=True))
        `quotient` (bits of an fp32) and the `tag` of its operands.

    Raises
    ------
    ValueError
        A width for which the quotient could leave fp32's normal range or digits would be lost.
    """

    INTERVAL = 2
    """Cycles from one quotient to the next."""
    LOOP = 7
    """Cycles of a step; odd, as second steps have the cycles that first ones leave."""
    FIRST = 6
    """Cycles to the first step: the magnitude, without leading zeros, beside what is in work."""
    LATENCY = FIRST + 2 * LOOP + 4

    i: stream.Interface
    o: stream.Interface

    def __init__(
        self, numerator_bits: int, denominator_bits: int, tag: Shape | data.Layout, *, steady: bool = False
    ) -> None:
        if not 17 <= numerator_bits <= 100:
            raise ValueError(f"numerator_bits must be 17 to 100, not {numerator_bits!r}")
        if not 9 <= denominator_bits <= 100:
            raise ValueError(f"denominator_bits must be 9 to 100, not {denominator_bits!r}")
        if numerator_bits - denominator_bits >= DIGITS - 1:
            raise ValueError(
                f"numerator_bits must be at most {DIGITS - 2} above denominator_bits "
                f"({denominator_bits!r}), not {numerator_bits!r}"
            )
        self.numerator_bits = numerator_bits
        self.denominator_bits = denominator_bits
        self.tag = tag
        self.steady = steady
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({
                "numerator": signed(numerator_bits),
                "denominator": divisor(denominator_bits),
                "tag": tag,
            }))),
            "o": Out(stream.Signature(data.StructLayout({"quotient": 32, "tag": tag}), always_ready=True)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits, width = self.numerator_bits, self.denominator_bits
        given = self.i.payload
        later = partial(pipeline_later, m)

        # Only `valid` and whose cycle it is have a reset.
        valid = Signal(self.LATENCY)
        m.d.sync += [self.i.ready.eq(~self.i.ready), valid.eq(Cat(self.i.valid & self.i.ready, valid))]
        tag = tag_later(m, given.tag, self.tag, self.LATENCY)

        def kept(value: Value, name: str, stages: int) -> Value:
            return value if self.steady else later(value, name, stages)

        # 1: magnitude (its width holds the magnitude of the most negative number, too).
        negative = given.numerator[-1]
        magnitude = later(Mux(negative, -given.numerator, given.numerator)[:bits], "magnitude")
        sign = later(negative, "sign", self.LATENCY - 1)

        # 2 to 5: without leading zeros.
        zeros, numerator = shift_up(m, magnitude, "numerator")
        exponent = Signal(8, reset_less=True)
        m.d.sync += exponent.eq(
            FP32_BIAS + bits - width + kept(given.denominator.zeros, "denominator_zeros", 4) - zeros)
        denominator = kept(given.denominator.value, "denominator", self.FIRST - 1)
        zero = later(~(numerator[-1] & denominator[-1]), "zero", self.LATENCY - self.FIRST)
        exponent = later(exponent, "exponent", self.LATENCY - self.FIRST - 1)

        first_turn = self.i.ready if (self.FIRST - 1) % 2 == 0 else ~self.i.ready
        guess, divided, rest = self._step(
            m, numerator, denominator, kept(given.denominator.reciprocal, "reciprocal", self.FIRST - 1), first_turn)
        quotient, inexact = self._correct(m, guess, divided, rest)
        result = self._round(m, quotient, inexact, exponent, sign, zero)
        m.d.comb += [
            self.o.valid.eq(valid[-1]),
            self.o.payload.quotient.eq(result),
            self.o.payload.tag.eq(tag),
        ]
        return m

    def _step(self, m: Module, numerator: Value, denominator: Value, reciprocal: Value,
              first_turn: Value) -> tuple[Value, Value, Value]:
        """Both steps: (guess of any step, two cycles into it, and at its end the denominator, and what remains)."""
        bits, width = self.numerator_bits, self.denominator_bits
        later = partial(pipeline_later, m)

        def kept(value: Value, name: str, stages: int) -> Value:
            return value if self.steady else later(value, name, stages)

        # 0: an operand below two, and the digits behind it; the numerator, or what remains of the step before.
        upright = Cat(Const(0, max(0, width + 2 * STEP - bits)), numerator)[-width - 2 * STEP :]
        remaining = Signal(width + 1)
        operand = Signal(width + 1, reset_less=True)
        m.d.sync += operand.eq(Mux(first_turn, upright[2 * STEP :], remaining))
        behind = later(upright[: 2 * STEP], "behind")
        digits = later(Mux(first_turn, upright[STEP : 2 * STEP], later(behind[:STEP], "last_digits", self.LOOP - 1)),
                       "digits")
        dividing, guessing = denominator, reciprocal
        if not self.steady:
            dividing, guessing = Signal(width, reset_less=True), Signal(RECIPROCAL_BITS, reset_less=True)
            m.d.sync += [
                dividing.eq(Mux(first_turn, denominator, later(dividing, "dividing_again", self.LOOP - 1))),
                guessing.eq(Mux(first_turn, reciprocal, later(guessing, "guessing_again", self.LOOP - 1))),
            ]
        # 1, 2: guess; 3, 4: times the denominator; 5, 6: in one number; 7: subtract.
        top = Cat(digits, operand)[-TOP - 1 :]
        guess = later(top * guessing, "guess", 2)[TOP + RECIPROCAL_BITS - 1 - STEP :][:GUESS]
        divisor_now = kept(dividing, "divisor", 2)
        products = [later(guess * divisor_now[low : low + DSP], f"product_{low}", 2) for low in range(0, width, DSP)]
        number = width + 2   # bits that count: what remains is below 2 * 2**width
        total = later(products[0][:number], "total", 1)
        if len(products) > 1:
            total = later(Cat(products[0][:DSP], products[0][DSP:] + products[1])[:number], "total_1")
            above = [later(product, f"above_{place}") for place, product in enumerate(products[2:])]
            for place, product in enumerate(above, 2):
                total = Cat(total[: place * DSP], (total[place * DSP :] + product)[: max(0, number - place * DSP)])
        total = later(total, "total_2")
        minuend = later(Cat(digits, operand)[:number], "minuend", self.LOOP - 1)
        m.d.comb += remaining.eq(minuend - total)
        return guess, kept(divisor_now, "divisor_end", self.LOOP - 2), remaining

    def _correct(self, m: Module, guess: Value, denominator: Value, remaining: Value) -> tuple[Value, Value]:
        """The quotient and whether it is inexact, three cycles behind the last step's end."""
        later = partial(pipeline_later, m)
        rest = later(remaining, "rest")
        # A guess is two cycles into its step; here the end of the last step and two cycles more are over.
        first = later(guess, "first_guess", 2 * self.LOOP - 1)
        second = later(guess, "second_guess", self.LOOP - 1)
        less = Signal(signed(self.denominator_bits + 2), reset_less=True)
        m.d.sync += less.eq(rest - denominator)
        some = later(rest.any(), "some")
        quotient = later(add_carry(Cat(Const(0, STEP), first)[:DIGITS], second, ~less[-1])[:DIGITS], "quotient")
        return quotient, later(Mux(less[-1], some, less.any()), "inexact")

    def _round(self, m: Module, quotient: Value, inexact: Value, exponent: Value, sign: Value, zero: Value) -> Signal:
        """The fp32, two cycles later."""
        fraction = Signal(FP32_FRACTION_BITS, reset_less=True)
        guard = Signal(reset_less=True)
        sticky = Signal(reset_less=True)
        biased = Signal(8, reset_less=True)
        with m.If(quotient[-1]):
            m.d.sync += [
                Cat(guard, fraction).eq(quotient[2:-1]),
                sticky.eq(quotient[:2].any() | inexact),
                biased.eq(exponent),
            ]
        with m.Else():
            m.d.sync += [
                Cat(guard, fraction).eq(quotient[1:-2]),
                sticky.eq(quotient[0] | inexact),
                biased.eq(exponent - 1),
            ]
        # A carry out of the fraction makes it zero and raises the exponent, as it should.
        result = Signal(32, reset_less=True)
        up = guard & (sticky | fraction[0])
        m.d.sync += result.eq(Mux(zero, 0, Cat((Cat(fraction, biased) + up)[:31], sign)))
        return result
