"""The last step of SparF: a quotient and the mean of V, each by its share, rounded once to fp32."""

from dataclasses import dataclass
from functools import partial

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config
from kvattic.spec.formats import ALPHA_FRACTION
from kvattic_hdl.lib.divider import FP32_FRACTION_BITS
from kvattic_hdl.lib.pipeline import later as pipeline_later
from kvattic_hdl.lib.pipeline import shift_up, tag_later
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.reduce.drain import quotient_layout, result_place

ONE = 1 << ALPHA_FRACTION
SIGNIFICAND = FP32_FRACTION_BITS + 1
PRODUCT = SIGNIFICAND + ALPHA_FRACTION
"""Bits of a significand times a share, and of the sum of two of them: the shares add up to one."""
BELOW = 25
"""Places kept below the product of the larger exponent.

The other product, shifted right by at most that many places, stays exact.  Shifted further it is less than 2**22, and
the larger exponent's is 2**23 or more: the sum is above 2**22, its tie lies two places below the product's lowest bit,
and all below that matters only as zero or not.
"""
WINDOW = PRODUCT + BELOW
DSP = 17
"""Bits of a factor that a DSP slice multiplies by 24 bits."""


@dataclass
class _Term:
    """An operand of a product: its sign, its exponent's field, whether it is zero, its significand and its share."""

    sign: Signal
    exponent: Signal
    nothing: Signal
    significand: Signal
    share: Signal

    @property
    def factor(self) -> Value:
        """The significand, or zero."""
        return Mux(self.nothing, 0, self.significand)


class Blend(wiring.Component):
    """``alpha * quotient + (1 - alpha) * mean``: the exact sum, rounded once to the nearest fp32, ties to even.

    Latency: `LATENCY` cycles, always.  Throughput: one result every second cycle, as both products have the same
    multipliers in turns.  Order is kept.  There is no backpressure from `o`.  Reset empties the pipeline.  Subnormal
    operands count as zero, of either sign; a result that is zero or, rounded, below 2**-126 in magnitude is +0.  With
    alpha = 1 the result is the quotient, whatever the mean.  Operands are finite.

    Parameters
    ----------
    tag : Shape
        Shape of what accompanies a result.

    Members
    -------
    i : In(stream.Signature(StructLayout))
        `quotient` and `mean` (bits of an fp32), `alpha` (0 to 2**24, which is 1) and `tag`; not ready in the cycle
        behind one that is taken.
    o : Out(stream.Signature(StructLayout, always_ready=True))
        `result` (bits of an fp32) and the `tag` of its operands.
    """

    LATENCY = 17

    i: stream.Interface
    o: stream.Interface

    def __init__(self, tag: Shape | data.Layout) -> None:
        self.tag = tag
        super().__init__({
            "i": In(stream.Signature(
                data.StructLayout({"quotient": 32, "mean": 32, "alpha": unsigned(ALPHA_FRACTION + 1), "tag": tag}))),
            "o": Out(stream.Signature(data.StructLayout({"result": 32, "tag": tag}), always_ready=True)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        given = self.i.payload

        # Only `valid` has a reset.
        valid = Signal(self.LATENCY)
        m.d.sync += valid.eq(Cat(self.i.valid & self.i.ready, valid))
        m.d.comb += self.i.ready.eq(~valid[0])
        tag = tag_later(m, given.tag, self.tag, self.LATENCY)
        later = partial(pipeline_later, m)

        terms, difference = self._terms(m, valid[0])
        first, second = terms
        swap = difference[-1]
        magnitude = Mux(swap, -difference, difference)[:8]
        # From 64 places on it matters no more by how many.
        places = later(Mux(magnitude[6:].any(), 63, magnitude[:6]), "places", 4)
        exponent = later(Mux(swap, second.exponent, first.exponent), "exponent", 13)
        top_sign = later(Mux(swap, second.sign, first.sign), "top_sign", 8)
        opposite = later(first.sign ^ second.sign, "opposite", 7)

        # 3: the one of the larger exponent, and then the other; 4: multiply; 5: add.
        turned = swap ^ valid[2]
        significand = later(Mux(turned, second.factor, first.factor), "significand")
        share = later(Mux(turned, second.share, first.share), "share")
        low = later(significand * share[:DSP], "low")
        high = later(significand * share[DSP:], "high")
        bottom = later((low + (high << DSP))[:PRODUCT], "product")
        top = later(bottom, "top", 4)

        # 7, 8, 9: the smaller one goes right by 16s, by 4s, by 1s; what falls out sticks to the lowest bit.
        def shift_down(value: Value, count: Value, unit: int, name: str) -> Value:
            result = Signal(WINDOW, name=f"{name}_result")
            with m.Switch(count):
                for number in range(1 << len(count)):
                    shift = min(number * unit, WINDOW)
                    with m.Case(number):
                        m.d.comb += result.eq(value >> shift)
                        if shift:
                            m.d.comb += result[0].eq(value[: shift + 1].any())
            return later(result, name)

        by_16s = shift_down(Cat(Const(0, BELOW), bottom), places[4:], 16, "down_16s")
        by_4s = shift_down(by_16s, later(places[2:4], "places_4s"), 4, "down_4s")
        aligned = shift_down(by_4s, later(places[:2], "places_1s", 2), 1, "down_1s")

        # 10: the sum, which may be below zero: the larger exponent need not have the larger product; 11: its magnitude.
        total = Signal(signed(WINDOW + 1), reset_less=True)
        flipped = Cat(aligned, Const(0, 1)) ^ opposite.replicate(WINDOW + 1)
        upright = Cat(Const(0, BELOW), top, Const(0, 1))
        m.d.sync += total.eq((Cat(opposite, upright) + Cat(opposite, flipped))[1 : WINDOW + 2])
        below = total[-1]
        sum_magnitude = later(Mux(below, -total, total)[:WINDOW], "sum_magnitude")
        sign = later(top_sign ^ below, "sign", 6)

        # 12 to 15: without leading zeros.
        zeros, normal = shift_up(m, sum_magnitude, "sum")
        zeros = later(zeros, "zeros")

        # 16: the exponent, and whether to round up, to even; 17: round.  A carry out of the fraction makes it zero and
        # raises the exponent, as it should; only then is it seen whether the number is below the normal ones.
        width = max(bits_for(255), len(zeros)) + 2
        biased = Signal(signed(width), reset_less=True)
        m.d.sync += biased.eq(exponent - zeros)
        lowest = WINDOW - SIGNIFICAND
        up = later(normal[lowest - 1] & (normal[: lowest - 1].any() | normal[lowest]), "up")
        significant = later(normal[lowest:], "significant")
        rounded = (Cat(significant[:-1], biased) + up)[: FP32_FRACTION_BITS + width]
        result = Signal(32, reset_less=True)
        number = rounded[FP32_FRACTION_BITS:].as_signed()
        m.d.sync += result.eq(Mux(significant[-1] & (number > 0), Cat(rounded[:31], sign), 0))
        m.d.comb += [
            self.o.valid.eq(valid[-1]),
            self.o.payload.result.eq(result),
            self.o.payload.tag.eq(tag),
        ]
        return m

    def _terms(self, m: Module, taken: Value) -> tuple[list[_Term], Signal]:
        """1: the operands; 2: both terms and by how much the first one's exponent is larger, kept for two cycles."""
        given = self.i.payload
        quotient, mean = (pipeline_later(m, given[name], name) for name in ("quotient", "mean"))
        alpha = pipeline_later(m, given.alpha, "alpha")
        terms, exponents = [], []
        for name, bits, share, none in (
            ("quotient", quotient, alpha, alpha == 0),
            ("mean", mean, (ONE - alpha)[: ALPHA_FRACTION + 1], alpha[-1]),
        ):
            field = bits[FP32_FRACTION_BITS:31]
            nothing = none | (field == 0)
            # That of a product that is zero is zero, so that it is not the larger one.
            exponent = Mux(nothing, 0, field)
            term = _Term(*(Signal(shape, name=f"{name}_{part}", reset_less=True) for part, shape in (
                ("sign", 1), ("exponent", 8), ("nothing", 1), ("significand", SIGNIFICAND), ("share", len(share)))))
            with m.If(taken):
                m.d.sync += [
                    term.sign.eq(bits[31]),
                    term.exponent.eq(exponent),
                    term.nothing.eq(nothing),
                    term.significand.eq(Cat(bits[:FP32_FRACTION_BITS], Const(1, 1))),
                    term.share.eq(share),
                ]
            terms.append(term)
            exponents.append(Cat(exponent, Const(0, 1)).as_signed())
        difference = Signal(signed(9), reset_less=True)
        with m.If(taken):
            m.d.sync += difference.eq(exponents[0] - exponents[1])
        return terms, difference


class MeanBlend(wiring.Component):
    """Keeps jobs' means of V and a job's alphas, and blends each quotient with those that belong to it.

    Latency: ``1 + Blend.LATENCY`` cycles, always.  Throughput: one result every second cycle.  Order is kept.  There is
    no backpressure.  Reset empties the pipeline; the mean and the alphas stay.

    Parameters
    ----------
    config : Config
        One with `sparse`.

    Members
    -------
    slot : In(Shapes.slot)
        Slot of the job whose quotients come.
    mean_valid, mean : In(1), In(Shapes.mean)
        A pair of the mean of V, kept for its slot.
    keep_alpha, alpha_row, alpha : In(1), In(Shapes.row), In(Shapes.alpha)
        While high, the row's alpha is kept.
    i : In(stream.Signature(quotient_layout, always_ready=True))
        The quotients of one job, not in two successive cycles.
    last_mean : Out(1)
        Strobe: the last element's mean is being read.
    o : Out(stream.Signature(quotient_layout, always_ready=True))
        The results.
    """

    slot: Signal
    mean_valid: Signal
    mean: data.View
    keep_alpha: Signal
    alpha_row: Signal
    alpha: Signal
    i: stream.Interface
    last_mean: Signal
    o: stream.Interface

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "slot": In(shapes.slot),
            "mean_valid": In(1),
            "mean": In(shapes.mean),
            "keep_alpha": In(1),
            "alpha_row": In(shapes.row),
            "alpha": In(shapes.alpha),
            "i": In(stream.Signature(quotient_layout(config), always_ready=True)),
            "last_mean": Out(1),
            "o": Out(stream.Signature(quotient_layout(config), always_ready=True)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self._config, self._shapes
        place = result_place(config)
        row_bits, pair_bits = ceil_log2(config.rows), ceil_log2(config.head_dim // 2)
        m.submodules.means = means = Memory(shape=64, depth=config.jobs_in_flight << pair_bits, init=[])
        m.submodules.alphas = alphas = Memory(shape=shapes.alpha, depth=1 << row_bits, init=[])
        means_write, means_read = means.write_port(), means.read_port()
        alphas_write, alphas_read = alphas.write_port(), alphas.read_port()
        given = self.i.payload
        quotient = Signal(32, reset_less=True)
        quotient_place = Signal(place, reset_less=True)
        quotient_valid = Signal()
        m.d.sync += [
            quotient.eq(given.result),
            quotient_place.eq(given.place),
            quotient_valid.eq(self.i.valid),
        ]
        m.submodules.blend = blend = Blend(place)
        m.d.comb += [
            means_write.addr.eq(Cat(self.mean.index[:pair_bits], self.mean.slot)),
            means_write.data.eq(self.mean.data),
            means_write.en.eq(self.mean_valid),
            means_read.addr.eq(Cat(given.place.element[1:], self.slot)),
            self.last_mean.eq(self.i.valid & given.place.last),
            alphas_write.addr.eq(self.alpha_row),
            alphas_write.data.eq(self.alpha),
            alphas_write.en.eq(self.keep_alpha),
            alphas_read.addr.eq(given.place.row),
            blend.i.valid.eq(quotient_valid),
            blend.i.payload.quotient.eq(quotient),
            blend.i.payload.mean.eq(means_read.data.word_select(quotient_place.element[0], 32)),
            blend.i.payload.alpha.eq(alphas_read.data),
            blend.i.payload.tag.eq(quotient_place),
            self.o.valid.eq(blend.o.valid),
            self.o.payload.result.eq(blend.o.payload.result),
            self.o.payload.place.eq(blend.o.payload.tag),
        ]
        return m
