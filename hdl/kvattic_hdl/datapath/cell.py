"""The multiply-shift-accumulate cell: one element of one query row."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic.spec.formats import (
    PRODUCT_BITS,
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    SIGNIFICAND_BITS,
    WEIGHT_BITS,
)
from kvattic_hdl.lib.arithmetic import add_carry
from kvattic_hdl.lib.shapes import ACCUMULATE_CYCLES, SHIFT_BITS, Shapes

PRODUCT_STAGE = 4
"""Operands are registered in stage 2, the product in stages 3 and 4 (a DSP slice's M and P registers)."""
ADDEND_STAGE = 6
"""The shifted magnitude is registered in stage 6."""
READ_STAGE = 4
"""The accumulator word of a V beat is addressed in stage 4, so that it meets its addend in stage 6."""
SUM_STAGE = 7
"""The new accumulator word is registered in stage 7 and written at its end."""
assert SUM_STAGE + 1 - READ_STAGE == ACCUMULATE_CYCLES


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
    a_significand : In(WEIGHT_BITS), stage 2
        q's significand left-aligned, or the weight's.
    b_significand : In(11), stage 2
        k's or v's.
    sign : In(1), stage 2
    shift : In(signed), stage 3
        Right shift from the window's top; below `score_shift_min` (K) or 0 (V) it is clipped.
    into_score : In(1), stage 3
        The product goes into the score window: a beat of K, or of a feature of K.
    addend : Out(SCORE_WINDOW_BITS), stage 6
        Magnitude of a K product.
    negative : Out(1), stage 6
        Sign of the product.
    overflow : Out(1), stage 6
        The product was clipped.
    read_address : In, stage 4
    drain : In(1), stage 6
        Add `chain_i` instead of the product, put the sum to `chain_o`, and clear the word.
    chain_i : In(accumulator), stage 6
    chain_o : Out(accumulator), stage 7 and then held
    accumulate : In(1), stage 6
        This is a beat of V, or of a feature of K: add the product to the word.
    write : In(1), stage 7
    write_address : In, stage 7
        Where the sum (or, after a drain, at the end of a harvest, or in a sweep, zero) is written.
    word : Out(signed(SCORE_SUM_BITS)), stage 6
        The word that was read, of a group's sums.  Only if `config.sparse`.
    """

    def __init__(self, config: Config) -> None:
        self.shapes = Shapes(config)
        self.sparse = config.sparse
        self.depth = accumulator_words(config)
        self.window_bits = config.element.encoding.value_window_bits
        self.headroom = config.element.encoding.product_shift
        self.key_clip = config.element.encoding.score_shift_min
        address = ceil_log2(self.depth)
        super().__init__({
            "a_significand": In(WEIGHT_BITS),
            "b_significand": In(SIGNIFICAND_BITS),
            "sign": In(1),
            "shift": In(signed(SHIFT_BITS)),
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
        } | ({"word": Out(signed(SCORE_SUM_BITS))} if config.sparse else {}))

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # Stages 2 to 4: multiply; at the same time clip the shift.
        product_3 = Signal(PRODUCT_BITS)
        product_4 = Signal(PRODUCT_BITS)
        m.d.sync += [
            product_3.eq(self.a_significand * self.b_significand),
            product_4.eq(product_3),
        ]
        sign_3, sign_4, sign_5 = (Signal(name=f"sign_{n}") for n in (3, 4, 5))
        clipped_4, clipped_5 = (Signal(name=f"clipped_{n}") for n in (4, 5))
        gone_4, gone_5 = (Signal(name=f"gone_{n}") for n in (4, 5))
        shift_4 = Signal(6)
        coarse_5 = Signal(2)
        m.d.sync += [
            sign_3.eq(self.sign),
            sign_4.eq(sign_3),
            sign_5.eq(sign_4),
            clipped_4.eq(0),
            gone_4.eq(0),
            shift_4.eq(self.shift[:6]),
        ]
        with m.If(self.into_score & (self.shift < self.key_clip)):
            m.d.sync += [shift_4.eq(self.key_clip), clipped_4.eq(1)]
        with m.Elif(self.shift < 0):
            m.d.sync += [shift_4.eq(0), clipped_4.eq(1)]
        with m.If(self.shift >= 64):
            m.d.sync += gone_4.eq(1)

        # Stages 4 to 6: shift right by 0 to 63, fine places first, so that the early stages are narrow.
        fine = Signal(PRODUCT_BITS + 3)
        mid = Signal(PRODUCT_BITS + 15)
        mid_5 = Signal(PRODUCT_BITS + 15)
        m.d.comb += [
            fine.eq((product_4 << 3) >> shift_4[0:2]),
            mid.eq((fine << 12) >> (shift_4[2:4] << 2)),
        ]
        m.d.sync += [
            mid_5.eq(mid),
            coarse_5.eq(shift_4[4:6]),
            clipped_5.eq(clipped_4 & product_4.any()),
            gone_5.eq(gone_4),
        ]
        magnitude = Signal(self.window_bits)
        magnitude_6 = Signal(self.window_bits)
        negative_6 = Signal()
        m.d.comb += magnitude.eq((mid_5 << (self.headroom - 15)) >> (coarse_5 << 4))
        m.d.sync += [
            magnitude_6.eq(magnitude),
            negative_6.eq(sign_5),
            self.overflow.eq(clipped_5),
        ]
        with m.If(gone_5):
            m.d.sync += magnitude_6.eq(0)
        m.d.comb += [
            self.addend.eq(magnitude_6[:SCORE_WINDOW_BITS]),
            self.negative.eq(negative_6),
        ]

        # Stages 4 to 7: read the word, add, write it back.
        m.submodules.accumulators = memory = Memory(
            shape=self.shapes.accumulator, depth=self.depth, init=[], attrs={"ram_style": "block"})
        read = memory.read_port(domain="sync")
        write = memory.write_port(domain="sync")
        word_6 = Signal(self.shapes.accumulator)
        operand = Signal(self.shapes.accumulator)
        total = Signal(self.shapes.accumulator)
        total_7 = Signal(self.shapes.accumulator)
        carry = Signal()
        m.d.comb += [
            read.addr.eq(self.read_address),
            carry.eq(negative_6 & ~self.drain),
            operand.eq(Mux(self.drain, self.chain_i,
                           (Cat(magnitude_6, 0) ^ negative_6.replicate(self.window_bits + 1)).as_signed())),
            total.eq(add_carry(word_6, operand, carry)),
            write.addr.eq(self.write_address),
            write.data.eq(total_7),
            write.en.eq(self.write),
        ]
        m.d.sync += [word_6.eq(read.data), total_7.eq(0)]
        with m.If(self.accumulate):
            m.d.sync += total_7.eq(total)
        with m.If(self.drain):
            m.d.sync += self.chain_o.eq(total)
        if self.sparse:
            m.d.comb += self.word.eq(word_6)
        return m
