"""The multiply-shift-accumulate cell: one element of one query row."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic.spec.formats import (
    CODES_SHIFT,
    CODES_SUM_BITS,
    PRODUCT_BITS,
    QUERY_SHIFT,
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    SIGNIFICAND_BITS,
    WEIGHT_BITS,
    ElementFormat,
)
from kvattic_hdl.lib.arithmetic import add_carry
from kvattic_hdl.lib.shapes import ACCUMULATE_CYCLES, Shapes

SHIFT_STAGE = 4
"""Operands are registered in stage 3, the shift in stage 4; the product in stages 6 and 7 (a DSP's M and P)."""
ADDEND_STAGE = 9
"""The shifted magnitude is registered in stage 9."""
READ_STAGE = 7
"""The accumulator word of a V beat is addressed in stage 7, so that it meets its addend in stage 9."""
SUM_STAGE = 10
"""The new accumulator word is registered in stage 10 and written at its end."""
assert SUM_STAGE + 1 - READ_STAGE == ACCUMULATE_CYCLES
GONE_SHIFT = 64
"""From this shift on nothing of a product is left in any window."""
FINE_BITS = 2
"""Low bits of the shift that are applied to an operand, in front of the multiplier."""


def exponents_max(element: ElementFormat) -> int:
    """The largest sum of two exponent fields."""
    return 2 * ((1 << element.exponent_bits) - 1)


def shift_start_bits(element: ElementFormat) -> int:
    """Bits of what the exponents are subtracted from, unsigned; its largest value stands for all above it."""
    return (GONE_SHIFT + exponents_max(element)).bit_length()


def group_base(config: Config) -> int:
    """Accumulator words of V, which stand before those of the groups."""
    return config.jobs_in_flight << Shapes(config).drain_address.width


def accumulator_words(config: Config) -> int:
    """Accumulator words of a cell: of V, and of the groups of the feature pass."""
    return group_base(config) + (config.groups_in_flight * config.group_words if config.sparse else 0)


class Cell(wiring.Component):
    """Multiplies two significands, shifts the product into its fixed-point window, and sums it.

    In a K pass (q times k) the shifted product leaves through `addend`, for the row's adder tree; in a V pass (weight
    times v) it is added to the accumulator word that `read_address` named.  The feature pass (one element of q times k
    of several tokens) does both: a product in the score window, added to a word of a group, behind those of V.  Stage
    numbers count from the issue of a beat (stage 0); the pipeline never stalls, one beat can enter in each cycle.  A
    word may be read again `ACCUMULATE_CYCLES` after it was.  Reset empties the pipeline, not the memory: the lane
    sweeps it.

    Parameters
    ----------
    config : Config

    Members
    -------
    a_significand : In(WEIGHT_BITS), stage 3
        q's significand left-aligned, or the weight's, whose top bit is set unless it is zero.
    b_significand : In(11), stage 3
        k's or v's.
    sign : In(1), stage 3
    shift : In(signed), stage 4
        Right shift from the window's top; below `score_shift_min` (K) or 0 (V) it is clipped.
    into_score : In(1), stage 4
        The product goes into the score window: a beat of K, or of a feature of K.
    addend : Out(SCORE_WINDOW_BITS), stage 9
        Magnitude of a K product.
    negative : Out(1), stage 9
        Sign of the product.
    overflow : Out(1), stage 9
        The product was clipped.
    read_address : In, stage 7
    drain : In(1), stage 8
        Add `chain_i` instead of the product, put the sum to `chain_o`, and clear the word.
    chain_i : In(accumulator), stage 9
    chain_o : Out(accumulator), stage 10 and then held
    accumulate : In(1), stage 9
        This is a beat of V, or of a feature of K: add the product to the word.
    write : In(1), stage 10
    write_address : In, stage 10
        Where the sum (or, after a drain, at the end of a harvest, or in a sweep, zero) is written.
    codes : In(1), stage 8; codes_sum : In(signed(CODES_SUM_BITS)), stage 9
        Instead of a product this is added to the word, `CODES_SHIFT` bits up; otherwise it is zero.  Only if
        `config.codes`.
    word : Out(signed(SCORE_SUM_BITS)), stage 9
        The word that was read, of a group's sums.  Only if `config.sparse`.
    """

    def __init__(self, config: Config) -> None:
        self.shapes = Shapes(config)
        self.sparse, self.codes_built = config.sparse, config.codes
        self.depth = accumulator_words(config)
        self.sum_bits = config.lane_accumulator_bits   # what the chain adds comes to more
        self.element = element = config.element.encoding
        self.window_bits = element.value_window_bits
        address = ceil_log2(self.depth)
        super().__init__({
            "a_significand": In(WEIGHT_BITS),
            "b_significand": In(SIGNIFICAND_BITS),
            "sign": In(1),
            "shift": In(signed(shift_start_bits(element) + 1)),
            "into_score": In(1),
            "addend": Out(SCORE_WINDOW_BITS),
            "negative": Out(1),
            "overflow": Out(1),
            "read_address": In(address),
            "drain": In(1),
            "chain_i": In(self.shapes.accumulator),
            "chain_o": Out(self.shapes.accumulator),
            "accumulate": In(1),
            "write": In(1),
            "write_address": In(address),
        } | ({"word": Out(signed(SCORE_SUM_BITS))} if config.sparse else {})
          | ({"codes": In(1), "codes_sum": In(signed(CODES_SUM_BITS))} if config.codes else {}))

    def elaborate(self, platform: object) -> Module:
        m = Module()

        magnitude, negative = self._multiply(m)
        m.d.comb += [
            self.addend.eq(magnitude[:SCORE_WINDOW_BITS]),
            self.negative.eq(negative),
        ]
        self._accumulate(m, magnitude, negative)
        return m

    def _clip(self, m: Module) -> tuple[Signal, Signal, Signal]:
        """Stage 4: the shift that is used, whether it was clipped, and whether it leaves nothing of a product."""
        element = self.element
        used, clipped, gone = Signal(6), Signal(), Signal()
        m.d.comb += [used.eq(self.shift[:6]), gone.eq(self.shift >= GONE_SHIFT)]
        if element.value_shift < element.exponent_max:
            with m.If(self.shift < 0):
                m.d.comb += [used.eq(0), clipped.eq(1)]
        with m.If(self.into_score & (self.shift < element.score_shift_min)):
            m.d.comb += [used.eq(element.score_shift_min), clipped.eq(1)]
        return used, clipped, gone

    def _multiply(self, m: Module) -> tuple[Signal, Signal]:
        """Multiply and shift: magnitude and sign of the product in its window, stage 9."""
        # Stage 4: clip.  The shift's low bits move an operand up, before the multiplication: that is narrower.
        used, clipped, gone = self._clip(m)
        highest = (1 << FINE_BITS) - 1
        a_4, a_5 = (Signal(WEIGHT_BITS, name=f"a_{n}", reset_less=True) for n in (4, 5))
        b_4 = Signal(SIGNIFICAND_BITS, reset_less=True)
        b_5 = Signal(SIGNIFICAND_BITS + highest, reset_less=True)
        nonzero_4, clipped_5 = Signal(reset_less=True), Signal()
        m.d.sync += [
            a_4.eq(self.a_significand),
            a_5.eq(a_4),
            b_4.eq(self.b_significand),
            b_5.eq((b_4 << highest) >> used[:FINE_BITS]),
            # A weight that is not zero has its top bit set, so that the bits that q has tell of both.
            nonzero_4.eq(self.a_significand[QUERY_SHIFT:].any() & self.b_significand.any()),
            clipped_5.eq(clipped & nonzero_4),
        ]

        # Stages 5 to 7: multiply.  7 to 9: shift right by the rest, 0 to 60, the narrow step first.
        bits = PRODUCT_BITS + highest
        product_6, product_7 = (Signal(bits, name=f"product_{n}", reset_less=True) for n in (6, 7))
        m.d.sync += [product_6.eq(a_5 * b_5), product_7.eq(product_6)]
        rests = [Signal(4, name=f"rest_{n}", reset_less=True) for n in (5, 6, 7)]
        m.d.sync += [rests[0].eq(used[FINE_BITS:]), rests[1].eq(rests[0]), rests[2].eq(rests[1])]
        mid_8 = Signal(bits + 12, reset_less=True)
        coarse_8 = Signal(2, reset_less=True)
        magnitude_9 = Signal(self.window_bits, reset_less=True)
        m.d.sync += [
            mid_8.eq((product_7 << 12) >> (rests[2][:2] << 2)),
            coarse_8.eq(rests[2][2:]),
            magnitude_9.eq((mid_8 << (self.element.product_shift - highest - 12)) >> (coarse_8 << 4)),
        ]

        # What accompanies the product.
        gones, clips, signs = ([Signal(name=f"{name}_{n}") for n in numbers] for name, numbers in (
            ("gone", (5, 6, 7, 8)), ("clip", (6, 7, 8)), ("sign", range(4, ADDEND_STAGE + 1))))
        with m.If(gones[-1] | (self.codes if self.codes_built else 0)):
            m.d.sync += magnitude_9.eq(0)
        m.d.sync += [b.eq(a) for values in ([gone, *gones], [clipped_5, *clips, self.overflow], [self.sign, *signs])
                     for a, b in zip(values, values[1:], strict=False)]
        if self.codes_built:
            with m.If(self.codes):
                m.d.sync += signs[-1].eq(0)
        return magnitude_9, signs[-1]

    def _accumulate(self, m: Module, magnitude: Signal, negative: Signal) -> None:
        """Read the word, add, write it back; stages 7 to 10."""
        m.submodules.accumulators = memory = Memory(
            shape=signed(self.sum_bits), depth=self.depth, init=[], attrs={"ram_style": "block"})
        read = memory.read_port(domain="sync")
        write = memory.write_port(domain="sync")
        word_9 = Signal(signed(self.sum_bits))
        operand = Signal(self.shapes.accumulator)
        total = Signal(self.shapes.accumulator)
        total_10 = Signal(self.shapes.accumulator)
        carry = Signal()
        drain = Signal()   # stage 9; a register for each cell, as many bits hang on it
        m.d.sync += drain.eq(self.drain)
        addend = Cat(magnitude, 0) ^ negative.replicate(self.window_bits + 1)
        if self.codes_built:   # one of both is zero
            codes_sum = Signal(signed(self.window_bits + 1))
            m.d.comb += codes_sum.eq(self.codes_sum << CODES_SHIFT)
            addend = addend | codes_sum.as_unsigned()
        m.d.comb += [
            read.addr.eq(self.read_address),
            carry.eq(negative & ~drain),
            operand.eq(Mux(drain, self.chain_i, addend.as_signed())),
            total.eq(add_carry(word_9, operand, carry)),
            write.addr.eq(self.write_address),
            write.data.eq(total_10),
            write.en.eq(self.write),
        ]
        m.d.sync += [word_9.eq(read.data), total_10.eq(0)]
        with m.If(self.accumulate):
            m.d.sync += total_10.eq(total)
        with m.If(drain):
            m.d.sync += self.chain_o.eq(total)
        if self.sparse:
            m.d.comb += self.word.eq(word_9)
