"""Stages 7 on of a lane's front: the accumulators' ports and their drain, and each row's sum of a K token."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_SUM_BITS, SCORE_WINDOW_BITS
from kvattic_hdl.datapath.cell import accumulator_words
from kvattic_hdl.lane.issue import stage_shape
from kvattic_hdl.lib.arithmetic import add_carry
from kvattic_hdl.lib.shapes import Shapes


class AccumulatorPorts(wiring.Component):
    """Says which word the cells' accumulators read and write: for a beat, for the drain, or to clear it after reset.

    The drain takes a word when no beat reads one, and only one at a time: it passes three cycles later.

    Parameters
    ----------
    config : Config

    Members
    -------
    reading, writing : In(`stage_shape`)
        What is in stage 7, and in stage 10.
    chain_i, chain_o : In, Out(stream of slot, address)
        Words that are drained, but for their data, which pass through the cells.
    read_address : Out, stage 7
    drain : Out(1), stage 8
    write : Out(1), write_address : Out, stage 10
        All cells' ports of these names.
    ready : Out(1)
        All words are cleared.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.depth = accumulator_words(config)
        address = ceil_log2(self.depth)
        word = data.StructLayout({"slot": shapes.slot, "address": shapes.drain_address})
        super().__init__({
            "reading": In(stage_shape(config)),
            "writing": In(stage_shape(config)),
            "chain_i": In(stream.Signature(word)),
            "chain_o": Out(stream.Signature(word)),
            "read_address": Out(address),
            "drain": Out(1),
            "write": Out(1),
            "write_address": Out(address),
            "ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        reading, writing = self.reading.accumulate, self.writing.accumulate
        if self.config.sparse:
            reading = reading | self.reading.harvest
            writing = writing | (self.writing.harvest & self.writing.clear)
        drained = self.chain_i.payload
        address = Cat(drained.address, drained.slot)
        drain_7, drain_8, drain_9, drain_10 = (Signal(name=f"drain_{i}") for i in (7, 8, 9, 10))
        address_10 = Signal.like(address)
        m.d.comb += [
            drain_7.eq(self.chain_i.valid & ~reading & ~drain_8 & ~drain_9 & ~drain_10 & ~self.chain_o.valid),
            self.read_address.eq(Mux(reading, self.reading.address, address)),
            self.drain.eq(drain_8),
            self.chain_i.ready.eq(drain_9),
        ]
        m.d.sync += [drain_8.eq(drain_7), drain_9.eq(drain_8), drain_10.eq(drain_9)]
        with m.If(self.chain_o.valid & self.chain_o.ready):
            m.d.sync += self.chain_o.valid.eq(0)
        with m.If(drain_9):
            m.d.sync += [
                self.chain_o.valid.eq(1),
                self.chain_o.payload.slot.eq(drained.slot),
                self.chain_o.payload.address.eq(drained.address),
                address_10.eq(address),
            ]

        cleared = Signal(range(self.depth + 1))
        m.d.comb += [
            self.ready.eq(cleared == self.depth),
            self.write.eq(writing | drain_10 | ~self.ready),
            self.write_address.eq(self.writing.address),
        ]
        with m.If(~self.ready):
            m.d.sync += cleared.eq(cleared + 1)
            m.d.comb += self.write_address.eq(cleared)
        with m.Elif(drain_10):
            m.d.comb += self.write_address.eq(address_10)
        return m


class RowSum(wiring.Component):
    """Sums the products of one query row: those of a beat in a tree, then beat by beat to the token's sum.

    Parameters
    ----------
    config : Config

    Members
    -------
    addend, negative : In(by element), overflow : In(1), stage 9
        The cells' outputs; one of them was clipped.
    word : In(signed(SCORE_SUM_BITS)), stage 9
        A token's sum out of an accumulator, in place of what is summed.
    valid, first : In(1), stage `tree_stage`
        There is a beat; it is its token's first one.
    harvest : In(1), stage `tree_stage` + 1
        There is a `word`.
    sum : Out(signed(SCORE_SUM_BITS)), clipped : Out(1), stage `tree_stage` + 1
        The token's sum so far, or the word; a product of it was clipped.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.levels = (config.elements_per_beat - 1).bit_length()
        super().__init__({
            "addend": In(SCORE_WINDOW_BITS).array(config.elements_per_beat),
            "negative": In(1).array(config.elements_per_beat),
            "overflow": In(1),
            "word": In(signed(SCORE_SUM_BITS)),
            "valid": In(1),
            "first": In(1),
            "harvest": In(1),
            "sum": Out(signed(SCORE_SUM_BITS)),
            "clipped": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # Sign and magnitude to two's complement: each negative addend owes one, paid by an adder's carry.
        terms = [(Cat(addend, Const(0, 1)) ^ negative.replicate(SCORE_WINDOW_BITS + 1)).as_signed()
                 for addend, negative in zip(self.addend, self.negative, strict=True)]
        owed = list(self.negative)
        for level in range(self.levels):
            sums = []
            for i in range(0, len(terms), 2):
                partial = Signal(signed(SCORE_WINDOW_BITS + 2 + level), name=f"tree_{level}_{i // 2}")
                m.d.sync += partial.eq(add_carry(terms[i], terms[i + 1], owed.pop(0)))
                sums.append(partial)
            delayed = [Signal(name=f"owed_{level}_{i}") for i in range(len(owed))]
            m.d.sync += [b.eq(a) for a, b in zip(owed, delayed, strict=True)]
            terms, owed = sums, delayed
        clips = [self.overflow, *(Signal(name=f"clip_{level}") for level in range(self.levels))]
        m.d.sync += [b.eq(a) for a, b in zip(clips, clips[1:], strict=False)]

        total, clipped = Signal(signed(SCORE_SUM_BITS)), Signal()
        old = Mux(self.first, 0, total)
        with m.If(self.valid):
            m.d.sync += [
                total.eq(add_carry(old.as_signed(), terms[0], owed.pop(0))),
                clipped.eq((clipped & ~self.first) | clips[-1]),
            ]
        m.d.comb += [self.sum.eq(total), self.clipped.eq(clipped)]
        if self.config.sparse:
            # A harvested sum is there when a token's would be.
            words = [Signal(signed(SCORE_SUM_BITS), name=f"word_{i}") for i in range(self.levels + 1)]
            m.d.sync += [b.eq(a) for a, b in zip([self.word, *words], words, strict=False)]
            with m.If(self.harvest):
                m.d.comb += [self.sum.eq(words[-1]), self.clipped.eq(0)]
        return m
