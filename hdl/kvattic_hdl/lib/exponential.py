"""2**x for x <= 0: from a score's distance to the maximum to a weight."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.formats import (
    EXP_C0_BITS,
    EXP_C1_BITS,
    EXP_C2_BITS,
    EXP_FRACTION,
    EXP_SEGMENTS,
    EXP_STEP_BITS,
    SCORE_BITS,
    SCORE_FRACTION,
    VALUE_FRACTION,
    WEIGHT_ALIGNMENT,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
    WEIGHT_ROUND_SHIFT,
    exp_table,
)


class Exponential(wiring.Component):
    """weight = 2**distance as a 1.21 significand and its own exponent; exactly 1 for distance 0.

    A quadratic in each of 64 segments (docs/numerics.md, section 4).  Latency `LATENCY` cycles, one input each cycle.

    Members
    -------
    distance : In(signed(37))
        score - maximum, not positive.
    masked : In(1)
        The weight is zero.
    significand : Out(22)
    exponent : Out(6)
        The weight is significand * 2**-(exponent + 21).
    """

    LATENCY = 7

    def __init__(self) -> None:
        super().__init__({
            "distance": In(signed(SCORE_BITS + 1)),
            "masked": In(1),
            "significand": Out(WEIGHT_BITS),
            "exponent": Out(WEIGHT_EXPONENT_BITS),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        coefficients = data.StructLayout({"c0": EXP_C0_BITS, "c1": EXP_C1_BITS, "c2": EXP_C2_BITS})
        table = Array(coefficients.const({"c0": c0, "c1": c1, "c2": c2}).as_bits() for c0, c1, c2 in exp_table())

        # distance = -exponent + fraction, with 0 <= fraction < 1.
        fraction = self.distance[:SCORE_FRACTION]
        whole = (-(self.distance >> SCORE_FRACTION))[: SCORE_BITS + 1 - SCORE_FRACTION]
        too_small = whole[WEIGHT_EXPONENT_BITS:].any()
        segment = Signal(range(EXP_SEGMENTS))
        steps = [Signal(EXP_STEP_BITS, name=f"step_{i}") for i in range(1, 5)]
        exponents = [Signal(WEIGHT_EXPONENT_BITS, name=f"exponent_{i}") for i in range(1, self.LATENCY)]
        zeros = Signal(self.LATENCY - 1)
        m.d.sync += [
            segment.eq(fraction[EXP_STEP_BITS:]),
            steps[0].eq(fraction[:EXP_STEP_BITS]),
            exponents[0].eq(whole),
            zeros.eq(Cat(self.masked | too_small, zeros)),
        ]
        m.d.sync += [b.eq(a) for a, b in zip(steps, steps[1:], strict=False)]
        m.d.sync += [b.eq(a) for a, b in zip(exponents, exponents[1:], strict=False)]

        # Stage 2: coefficients.  3, 4: c2*t.  4, 5: (c1 + c2*t)*t, each with a DSP slice's M register.
        c_2 = Signal(coefficients)
        c0s = [Signal(EXP_C0_BITS, name=f"c0_{i}") for i in range(3, 7)]
        c1s = [Signal(EXP_C1_BITS, name=f"c1_{i}") for i in range(3, 4)]
        square = Signal(EXP_C2_BITS + EXP_STEP_BITS)
        slope = Signal(EXP_C1_BITS + 1)
        line = Signal(EXP_C1_BITS + 1 + EXP_STEP_BITS)
        power = Signal(EXP_FRACTION + 2)
        m.d.sync += [
            c_2.eq(table[segment]),
            square.eq(c_2.c2 * steps[1]),
            c1s[0].eq(c_2.c1),
            slope.eq(c1s[0] + (square >> EXP_STEP_BITS)),
            line.eq(slope * steps[3]),
            c0s[0].eq(c_2.c0),
            c0s[1].eq(c0s[0]),
            c0s[2].eq(c0s[1]),
            power.eq(c0s[2] + (line >> EXP_STEP_BITS)),
        ]

        # Stage 7: round to the significand; the last step below 2.0 must not reach it.
        rounded = Signal(WEIGHT_BITS + 1)
        m.d.comb += rounded.eq((power + (1 << (WEIGHT_ROUND_SHIFT - 1))) >> WEIGHT_ROUND_SHIFT)
        m.d.sync += [
            self.significand.eq(Mux(rounded[-1], (1 << WEIGHT_BITS) - 1, rounded)),
            self.exponent.eq(exponents[-1]),
        ]
        with m.If(zeros[-1]):
            m.d.sync += [self.significand.eq(0), self.exponent.eq(0)]
        return m


def in_window(m: Module, exponential: Exponential) -> Signal:
    """The weight as a multiple of 2**-VALUE_FRACTION, truncated, two cycles later."""
    aligned = exponential.significand << WEIGHT_ALIGNMENT
    coarse, fixed = (Signal(VALUE_FRACTION + 1, name=n) for n in ("coarse", "fixed"))
    fine = Signal(2)
    m.d.sync += [
        coarse.eq(aligned >> (exponential.exponent[2:] << 2)),
        fine.eq(exponential.exponent[:2]),
        fixed.eq(coarse >> fine),
    ]
    return fixed
