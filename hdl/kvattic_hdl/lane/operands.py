"""Stages 1 to 4 of a lane's front: the cells' operands, from beats, from q, and from weights."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import OCTET_FEATURES, Config
from kvattic.spec.formats import QUERY_SHIFT, SIGNIFICAND_BITS, WEIGHT_BITS
from kvattic_hdl.datapath.cell import exponents_max, shift_start_bits
from kvattic_hdl.lib.arithmetic import decode, widen
from kvattic_hdl.lib.shapes import Shapes

ELEMENT_BITS = 16
"""Bits of an element of q; those of K and V have 8, or as many (`Config.kv`)."""


class Queries(wiring.Component):
    """Keeps q of each slot; reads a beat of all rows.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        Beats of q: the elements that go with a beat of K.
    slot : In(slot), beat : In
        What is read.
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
            "query": Out(config.query_beat_bytes * 8).array(config.rows),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        for r in range(config.rows):
            memory = Memory(
                shape=config.query_beat_bytes * 8, depth=config.jobs_in_flight << shapes.beat_index.width, init=[],
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
        return m


class ShiftBases(wiring.Component):
    """What each row's shifts begin with, before the exponents: from the scale's exponent, or a constant.

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
        element = config.element.encoding
        offset = shapes.start["k_offset"].shape
        reach = max(element.score_shift + (1 << offset.width - 1) + 1, element.value_shift)
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "slot": In(shapes.slot),
            "into_score": In(1),
            "feature": In(1),
            "k_offset": In(offset),
            "base": Out(signed(reach.bit_length() + 1)).array(config.rows if config.sparse else 1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        element = config.element.encoding
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
            # The exponent of q's element comes inverted: one more makes it negative.
            m.d.sync += base.eq(
                Mux(self.into_score, element.score_shift - k_offset + self.feature, element.value_shift))
        return m


class Operands(wiring.Component):
    """Decodes each beat of K, V or a sketch, and what it is multiplied by: q, or the rows' weights.

    A beat enters in each cycle; stage numbers count from its issue.  Registers only but for q: reset changes nothing.
    What all elements of a row have in common is decoded once: its weight, or in the feature pass the element of q.

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
        Of `issue.stage_shape`; each element of a beat of the feature pass is multiplied by element `element` of q.
    levels, swap : In(1), stage 1
        Both halves of the beat are levels of the same features: those of q's upper half if `swap`, or else of its lower
        half.  Only if `config.codes`.
    weights : In(array of weight, by row), stage 1
    k_offset : In, stage 1
        The `Shapes.start` field of `slot`'s job.
    special : Out(elements_per_beat), stage 2
        Elements of the beat that are NaN or infinity.
    significand_a, sign : Out(by row and element), significand_b : Out(by element), stage 3
    shift : Out(signed, by row and element), stage 4
        The cells' operands.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.encoding = config.element.encoding
        self.start_bits = shift_start_bits(self.encoding)
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
            "shift": Out(signed(self.start_bits + 1)).array(rows, elements),
        } | ({"levels": In(1), "swap": In(1)} if config.codes else {}))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queries = queries = Queries(self.config)
        m.submodules.bases = bases = ShiftBases(self.config)
        m.d.comb += [
            queries.slot.eq(self.query_slot),
            queries.beat.eq(self.query_beat),
            bases.slot.eq(self.slot),
            bases.into_score.eq(self.into_score),
            bases.feature.eq(self.feature),
            bases.k_offset.eq(self.k_offset),
        ]
        for block in (queries, bases):
            m.d.comb += [block.load_valid.eq(self.load_valid), block.load.eq(self.load)]
        # Each element of the beat has one of q of its own: not V, nor the feature pass.
        own_2 = Signal()
        m.d.sync += own_2.eq(self.into_score & ~self.feature)
        beat = self._decode_beat(m)
        for r in range(self.config.rows):
            base = bases.base[r if self.config.sparse else 0]
            self._decode_row(m, r, queries.query[r], base, own_2, beat)
        return m

    def _decode_beat(self, m: Module) -> list[tuple[Value, Value]]:
        """Stage 2: sign and exponent of each element of the beat; its significand goes on to stage 3."""
        beat_1 = Signal(self.config.beat_bytes * 8, reset_less=True)
        m.d.sync += beat_1.eq(self.beat)
        decoded: list[tuple[Value, Value]] = []
        for e in range(self.config.elements_per_beat):
            code = beat_1.word_select(e, self.config.kv_element_bytes * 8)
            b = decode(widen(code, self.config.kv, self.encoding), self.encoding)
            sign_2 = Signal(name=f"sign_b_{e}", reset_less=True)
            exponent_2 = Signal(self.encoding.exponent_bits, name=f"exponent_b_{e}", reset_less=True)
            significand_2 = Signal(SIGNIFICAND_BITS, name=f"significand_b_{e}", reset_less=True)
            m.d.sync += [
                sign_2.eq(b.sign), exponent_2.eq(b.exponent), self.special[e].eq(b.special),
                significand_2.eq(b.significand), self.significand_b[e].eq(significand_2)]
            with m.If(b.special):
                m.d.sync += significand_2.eq(0)
            decoded.append((sign_2, exponent_2))
        return decoded

    def _decode_row(self, m: Module, r: int, query: Value, base: Value, own: Value,
                    beat: list[tuple[Value, Value]]) -> None:
        """Stages 2 to 4: what a row's elements are multiplied by, and their shifts."""
        encoding, weight = self.encoding, self.weights[r]
        # Stage 2: what all elements have in common.
        significand_2, sign_2 = (Signal(bits, name=f"{name}_common_{r}", reset_less=True)
                                 for name, bits in (("significand", WEIGHT_BITS), ("sign", 1)))
        exponent_2 = Signal(signed(max(encoding.exponent_bits, len(weight.exponent)) + 1), name=f"exponent_common_{r}",
                            reset_less=True)
        m.d.sync += [significand_2.eq(weight.significand), sign_2.eq(0), exponent_2.eq(weight.exponent)]
        if self.config.sparse:
            one = decode(query.word_select(self.element, ELEMENT_BITS), encoding)
            with m.If(self.into_score):
                m.d.sync += [
                    significand_2.eq(one.significand << QUERY_SHIFT),
                    sign_2.eq(one.sign),
                    exponent_2.eq(Cat(~one.exponent, Const(1, 1)).as_signed()),
                ]
        query_2 = Signal(len(query), name=f"query_{r}", reset_less=True)
        m.d.sync += query_2.eq(query)
        if self.config.codes and self.config.elements_per_beat > OCTET_FEATURES:
            half = len(query) // 2
            with m.If(self.levels):
                m.d.sync += query_2.eq(Mux(self.swap, query[half:], query[:half]).replicate(2))

        # Stage 3: the shift without the exponents of K or V, and of q; where it is out of any reach it counts as there.
        begin = Signal(signed(len(base) + 1), name=f"begin_{r}")
        start_3 = Signal(self.start_bits, name=f"start_{r}", reset_less=True)
        m.d.comb += begin.eq(base + Mux(own, 0, exponent_2))
        m.d.sync += start_3.eq(begin)
        with m.If(begin < 0):
            m.d.sync += start_3.eq(0)
        with m.Elif(begin[self.start_bits :].any()):
            m.d.sync += start_3.eq(-1)
        low_3 = Signal(QUERY_SHIFT, name=f"significand_low_{r}", reset_less=True)   # q has none of these bits
        m.d.sync += low_3.eq(significand_2)
        with m.If(own):
            m.d.sync += low_3.eq(0)
        for e, (sign_b, exponent_b) in enumerate(beat):
            a = decode(query_2.word_select(e, ELEMENT_BITS), encoding)
            high_3 = Signal(SIGNIFICAND_BITS, name=f"significand_{r}_{e}", reset_less=True)
            exponents_3 = Signal(range(exponents_max(encoding) + 1), name=f"exponents_{r}_{e}", reset_less=True)
            m.d.comb += self.significand_a[r][e].eq(Cat(low_3, high_3))
            m.d.sync += [
                high_3.eq(Mux(own, a.significand, significand_2[QUERY_SHIFT:])),
                self.sign[r][e].eq(Mux(own, a.sign, sign_2) ^ sign_b),
                exponents_3.eq(Mux(own, a.exponent, 0) + exponent_b),
                self.shift[r][e].eq(start_3 - exponents_3),
            ]
