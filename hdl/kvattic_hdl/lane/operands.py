"""Stages 1 to 3 of a lane's front: the cells' operands, from beats, from q, and from weights."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic.spec.formats import (
    QUERY_SHIFT,
    SIGNIFICAND_BITS,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
)
from kvattic_hdl.lib.arithmetic import decode
from kvattic_hdl.lib.shapes import SHIFT_BITS, Shapes

ELEMENT_BITS = 16
"""Bits of an element of q, k or v."""


class Queries(wiring.Component):
    """Keeps q of each slot; reads a beat of all rows.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        Beats of q.
    slot : In(slot), beat : In
        What is read.
    feature : In(1), element : In, one cycle later
        The beat's element `element` is wanted in place of each of its elements.
    query : Out(rows of beats), one cycle after `slot`
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "slot": In(shapes.slot),
            "beat": In(shapes.beat_index),
            "feature": In(1),
            "element": In(max(1, (config.elements_per_beat - 1).bit_length())),
            "query": Out(config.beat_bytes * 8).array(config.rows),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        for r in range(config.rows):
            memory = Memory(
                shape=config.beat_bytes * 8, depth=config.jobs_in_flight << shapes.beat_index.width, init=[],
                attrs={"ram_style": "block"})
            m.submodules[f"query_{r}"] = memory
            read, write = memory.read_port(domain="sync"), memory.write_port(domain="sync")
            m.d.comb += [
                read.addr.eq(Cat(self.beat, self.slot)),
                write.addr.eq(Cat(self.load.beat, self.load.slot)),
                write.data.eq(self.load.data),
                write.en.eq(self.load_valid & self.load.query & (self.load.row == r)),
                self.query[r].eq(read.data),
            ]
            if config.sparse:
                element = read.data.word_select(self.element, ELEMENT_BITS)
                with m.If(self.feature):
                    m.d.comb += self.query[r].eq(element.replicate(config.elements_per_beat))
        return m


class ShiftBases(wiring.Component):
    """What each row's shifts begin with, before the operands' exponents: from the scale's exponent, or a constant.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        Row scales.
    slot : In(slot), into_score, feature : In(1)
        Of the beat in stage 1.
    k_offset : In
        The `Shapes.start` field of `slot`'s job.
    base : Out(bases), stage 2
        One for each row, or for all of them if not `config.sparse`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "slot": In(shapes.slot),
            "into_score": In(1),
            "feature": In(1),
            "k_offset": In(shapes.start["k_offset"].shape),
            "base": Out(signed(SHIFT_BITS)).array(config.rows if config.sparse else 1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        element = config.element.encoding
        # K: -exponent = ~exponent + 1.
        key_base = element.score_shift + 1
        for r, base in enumerate(self.base):
            k_offset = self.k_offset
            if config.sparse:
                # In the feature pass each row has a scale of its own.
                memory = Memory(shape=k_offset.shape(), depth=config.jobs_in_flight, init=[],
                                attrs={"ram_style": "distributed"})
                m.submodules[f"row_offsets_{r}"] = memory
                read, write = memory.read_port(domain="comb"), memory.write_port(domain="sync")
                approximate = data.View(shapes.approximate, self.load.data[: shapes.approximate.size])
                m.d.comb += [
                    read.addr.eq(self.slot),
                    write.addr.eq(self.load.slot),
                    write.data.eq(approximate.k_offset),
                    write.en.eq(self.load_valid & self.load.scale & (self.load.row == r)),
                ]
                k_offset = Mux(self.feature, read.data, k_offset)
            m.d.sync += base.eq(Mux(self.into_score, key_base - k_offset, element.value_shift))
        return m


class Operands(wiring.Component):
    """Decodes each beat of K, V or a sketch, and what it is multiplied by: q, or the rows' weights.

    A beat enters in each cycle; stage numbers count from its issue.  Registers only but for q: reset changes nothing.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        q and row scales.
    beat : In(beat_bytes * 8 bits), stage 0
    query_beat : In, query_slot : In(slot), stage 0
        The beat of q that goes with it.
    slot : In(slot), into_score, feature : In(1), element : In, stage 1
        Of `issue.stage_shape`.
    weights : In(array of weight, by row), stage 1
    k_offset : In, stage 1
        The `Shapes.start` field of `slot`'s job.
    special : Out(elements_per_beat), stage 2
        Elements of the beat that are NaN or infinity.
    significand_a, sign : Out(by row and element), significand_b : Out(by element), stage 2
    shift : Out(signed, by row and element), stage 3
        The cells' operands.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        rows, elements = config.rows, config.elements_per_beat
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "beat": In(config.beat_bytes * 8),
            "query_beat": In(shapes.beat_index),
            "query_slot": In(shapes.slot),
            "slot": In(shapes.slot),
            "into_score": In(1),
            "feature": In(1),
            "element": In(max(1, (elements - 1).bit_length())),
            "weights": In(data.ArrayLayout(shapes.weight, rows)),
            "k_offset": In(shapes.start["k_offset"].shape),
            "special": Out(elements),
            "significand_a": Out(WEIGHT_BITS).array(rows, elements),
            "sign": Out(1).array(rows, elements),
            "significand_b": Out(SIGNIFICAND_BITS).array(elements),
            "shift": Out(signed(SHIFT_BITS)).array(rows, elements),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        element, elements = config.element.encoding, config.elements_per_beat
        m.submodules.queries = queries = Queries(config)
        m.submodules.bases = bases = ShiftBases(config)
        m.d.comb += [
            queries.slot.eq(self.query_slot),
            queries.beat.eq(self.query_beat),
            queries.element.eq(self.element),
            bases.slot.eq(self.slot),
            bases.into_score.eq(self.into_score),
            bases.k_offset.eq(self.k_offset),
        ]
        for block in (queries, bases):
            m.d.comb += [
                block.load_valid.eq(self.load_valid), block.load.eq(self.load), block.feature.eq(self.feature)]
        beat_1 = Signal(config.beat_bytes * 8)
        m.d.sync += beat_1.eq(self.beat)
        for e in range(elements):
            b = decode(beat_1.word_select(e, ELEMENT_BITS), element)
            exponent_b = Signal(element.exponent_bits, name=f"exponent_b_{e}")
            m.d.sync += [
                self.significand_b[e].eq(b.significand), exponent_b.eq(b.exponent), self.special[e].eq(b.special)]
            for r in range(config.rows):
                a = decode(queries.query[r].word_select(e, ELEMENT_BITS), element)
                weight, significand_a, sign = self.weights[r], self.significand_a[r][e], self.sign[r][e]
                exponent_a = Signal(
                    signed(max(element.exponent_bits, WEIGHT_EXPONENT_BITS) + 1), name=f"exponent_a_{r}_{e}")
                with m.If(self.into_score):
                    m.d.sync += [
                        significand_a.eq(a.significand << QUERY_SHIFT),
                        sign.eq(a.sign ^ b.sign),
                        exponent_a.eq(~Cat(a.exponent, Const(0, 1)).as_signed()),
                    ]
                with m.Else():
                    m.d.sync += [
                        significand_a.eq(weight.significand),
                        sign.eq(b.sign),
                        exponent_a.eq(weight.exponent),
                    ]
                base = bases.base[r if config.sparse else 0]
                m.d.sync += self.shift[r][e].eq(base + exponent_a - exponent_b)
        return m
