"""Tables of what codes add to score sums: built from an octet's levels, looked up for each of its tokens."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.codes import field_bits, level_beats, one_bit_features
from kvattic.spec.config import OCTET_FEATURES, Config
from kvattic.spec.formats import CODES_BITS, CODES_SHIFT, CODES_SUM_BITS, SCORE_WINDOW_BITS
from kvattic_hdl.lib.arithmetic import add_carry

FIELDS_STAGE = 6
"""The fields of a beat are registered in stage 6 of the front's pipeline, what the tables say of them in stage 7, and
their sum in stage 9, where it takes the place of a product."""
BANKS = 2
"""Tables that a row has of each pair of features: one is built while the other is in use."""
PAIRS = OCTET_FEATURES // 2
CODES = 4
"""Codes of a feature."""
ENTRIES = CODES * CODES
BUILD_CYCLES = ENTRIES + 2
"""Two bases are added, then an entry is written in each cycle."""
GUARD_BITS = 3
"""An entry is at most the sum of eight products."""


def pair_codes(config: Config, field: Value) -> list[Value]:
    """For each pair of features the two codes in a token's field, of two bits each: the entry's number."""
    narrow = one_bit_features(config)
    widths = [2] * (OCTET_FEATURES - narrow) + [1] * narrow
    starts = [sum(widths[:f]) for f in range(OCTET_FEATURES)]
    codes = [Cat(field[start : start + width], Const(0, 1))[:2] for start, width in zip(starts, widths, strict=True)]
    return [Cat(codes[2 * p], codes[2 * p + 1]) for p in range(PAIRS)]


class TableBuilder(wiring.Component):
    """Builds the tables of one row: of each pair of an octet's features all sums of two products.

    An entry differs from the one before it by one step, as the codes go up and down: 00 01 02 03 13 12 11 10 20 ...
    Reset ends what is being built.

    Parameters
    ----------
    config : Config

    Members
    -------
    levels : In(1), addend, negative : In(by element), overflow : In(1)
        Strobe: q times the octet's next levels, as the cells give them; one of them was clipped.
    write : Out(1), number : Out(4 bits), entries : Out(signed, by pair)
        An entry of each table.
    clipped : Out(1)
        With `write`: something of this octet was clipped, so far.
    written : Out(1)
        Strobe, with the last entry.
    soon : Out(1)
        Strobe: what is issued two cycles later finds all entries written.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__({
            "levels": In(1),
            "addend": In(SCORE_WINDOW_BITS).array(config.elements_per_beat),
            "negative": In(1).array(config.elements_per_beat),
            "overflow": In(1),
            "write": Out(1),
            "number": Out(range(ENTRIES)),
            "entries": Out(signed(CODES_BITS)).array(PAIRS),
            "clipped": Out(1),
            "written": Out(1),
            "soon": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        magnitudes, signs, complete = self._take_levels(m)
        cycle, building = Signal(range(BUILD_CYCLES)), Signal()
        at = Signal(range(ENTRIES))   # of the entry that is written
        second, turn = Signal(), Signal()
        m.d.comb += [
            at.eq(cycle - 2),
            second.eq(at[:2].all()),   # the next entry has the next code of the pair's second feature
            turn.eq(at[2]),            # that of the first one goes down
            self.number.eq(Cat(at[:2] ^ turn.replicate(2), at[2:])),
            self.write.eq(building & (cycle >= 2)),
            self.written.eq(building & (cycle == BUILD_CYCLES - 1)),
            self.soon.eq(building & (cycle == BUILD_CYCLES - 2 - FIELDS_STAGE)),
        ]
        with m.If(building):
            m.d.sync += [cycle.eq(Mux(self.written, 0, cycle + 1)), building.eq(~self.written)]
        with m.If(complete):
            m.d.sync += building.eq(1)
        bad = Signal(PAIRS)
        m.d.comb += self.clipped.eq(self._level_clipped | self._entry_clipped | bad.any())
        with m.If(self.write):
            m.d.sync += self._entry_clipped.eq(self._entry_clipped | bad.any())
        for p in range(PAIRS):
            value = Signal(signed(CODES_BITS + GUARD_BITS), name=f"value_{p}")
            bases, steps = (2 * p, 2 * p + 1), (OCTET_FEATURES + 2 * p, OCTET_FEATURES + 2 * p + 1)

            def choose(of: Any, bases: tuple[int, int] = bases, steps: tuple[int, int] = steps) -> Value:
                return Mux(self.write, Mux(second, of[steps[1]], of[steps[0]]), Mux(cycle[0], of[bases[1]],
                                                                                 of[bases[0]]))

            negative = Signal(name=f"negative_{p}")
            m.d.comb += [
                negative.eq(choose(signs) ^ (self.write & ~second & turn)),
                self.entries[p].eq(value),
                bad[p].eq(value[CODES_BITS - 1 :].any() & ~value[CODES_BITS - 1 :].all()),
            ]
            operand = Cat(choose(magnitudes) ^ negative.replicate(CODES_BITS - 1), negative).as_signed()
            start = Mux(building & (cycle != 0), value, 0)
            m.d.sync += value.eq(add_carry(start.as_signed(), operand, negative))
        return m

    def _take_levels(self, m: Module) -> tuple[list[Signal], list[Signal], Value]:
        """Keep the products of levels, cut to entries' precision: (magnitudes, signs, the last ones are taken)."""
        config, beats = self.config, level_beats(self.config)
        elements = config.elements_per_beat
        magnitudes = [Signal(CODES_BITS - 1, name=f"magnitude_{i}") for i in range(2 * OCTET_FEATURES)]
        signs = [Signal(name=f"sign_{i}") for i in range(2 * OCTET_FEATURES)]
        self._level_clipped, self._entry_clipped = Signal(name="level_clipped"), Signal(name="entry_clipped")
        turn, large = Signal(range(max(2, beats))), Signal(elements)
        complete = Signal()
        m.d.sync += complete.eq(self.levels & (turn == beats - 1))
        with m.If(self.levels):
            m.d.sync += [
                turn.eq(Mux(turn == beats - 1, 0, turn + 1)),
                self._level_clipped.eq((self._level_clipped & (turn != 0)) | self.overflow | large.any()),
                self._entry_clipped.eq(0),
            ]
        for i, (magnitude, sign) in enumerate(zip(magnitudes, signs, strict=True)):
            e = i % elements
            kept = self.addend[e][CODES_SHIFT:]
            if i < elements:
                m.d.comb += large[e].eq(kept[CODES_BITS - 1 :].any())
            with m.If(self.levels & (turn == i // elements)):
                m.d.sync += [magnitude.eq(kept | large[e].replicate(CODES_BITS - 1)), sign.eq(self.negative[e])]
        return magnitudes, signs, complete


class CodeTables(wiring.Component):
    """One row's tables of two octets, and what they say of a beat of fields.

    Parameters
    ----------
    config : Config

    Members
    -------
    levels, addend, negative, overflow : In, stage 9
        As `TableBuilder`'s.
    soon : Out(1)
        As `TableBuilder`'s.
    fields : In(array of field, by token), bank : In, stage 6
        Of the beat.
    valid : In(1), stage 8
        There is such a beat.
    sums : Out(signed, by token), stage 9
        What its codes add to each token's sum, in steps of 2**-CODES_FRACTION; zero without a beat.
    clipped : Out(by bank)
        Something of the bank's octet was clipped; from its beats' stage 9 on, until the next octet's tables are built.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        elements = config.elements_per_beat
        super().__init__({
            "levels": In(1),
            "addend": In(SCORE_WINDOW_BITS).array(elements),
            "negative": In(1).array(elements),
            "overflow": In(1),
            "soon": Out(1),
            "fields": In(data.ArrayLayout(field_bits(config), elements)),
            "bank": In(range(BANKS)),
            "valid": In(1),
            "sums": Out(signed(CODES_SUM_BITS)).array(elements),
            "clipped": Out(BANKS),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.builder = builder = TableBuilder(self.config)
        built_bank = Signal(range(BANKS))
        m.d.comb += [getattr(builder, name).eq(getattr(self, name)) for name in ("levels", "overflow")]
        for e in range(self.config.elements_per_beat):
            m.d.comb += [builder.addend[e].eq(self.addend[e]), builder.negative[e].eq(self.negative[e])]
        m.d.comb += self.soon.eq(builder.soon)
        with m.If(builder.written):
            m.d.sync += [built_bank.eq(built_bank + 1), self.clipped.bit_select(built_bank, 1).eq(builder.clipped)]
        reads = []
        for p in range(PAIRS):
            m.submodules[f"table_{p}"] = table = Memory(
                shape=signed(CODES_BITS), depth=BANKS * ENTRIES, init=[], attrs={"ram_style": "distributed"})
            write = table.write_port(domain="sync")
            reads.append([table.read_port(domain="comb") for _ in range(self.config.elements_per_beat)])
            m.d.comb += [
                write.en.eq(builder.write),
                write.addr.eq(Cat(builder.number, built_bank)),
                write.data.eq(builder.entries[p]),
            ]
        for e, sum_9 in enumerate(self.sums):
            entries = [Signal(signed(CODES_BITS), name=f"entry_{e}_{p}") for p in range(PAIRS)]
            halves = [Signal(signed(CODES_BITS + 1), name=f"half_{e}_{h}") for h in range(2)]
            for p, number in enumerate(pair_codes(self.config, Value.cast(self.fields[e]))):
                m.d.comb += reads[p][e].addr.eq(Cat(number, self.bank))
                m.d.sync += entries[p].eq(reads[p][e].data)
            m.d.sync += [
                halves[0].eq(entries[0] + entries[1]),
                halves[1].eq(entries[2] + entries[3]),
                sum_9.eq(halves[0] + halves[1]),
            ]
            with m.If(~self.valid):
                m.d.sync += sum_9.eq(0)
        return m
