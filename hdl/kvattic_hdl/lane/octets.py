"""Codes on their way through a lane's front: octets as they come, and the turns in which their beats are issued."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.codes import FOLDED_TOKENS, field_bits, level_beats, one_bit_features
from kvattic.spec.config import Config
from kvattic_hdl.datapath.codes import BANKS
from kvattic_hdl.lane.arrivals import beats_buffered
from kvattic_hdl.lib.shapes import Shapes


class OctetQueue(wiring.Component):
    """Takes octets out of the arriving beats, unfolds them, and keeps their fields until their tables are built.

    What is left in the stream are the octets' levels, and all beats of other codewords.  `Arrivals` counts the fields'
    places.  Latency of what is left: none.  Reset empties it.

    Parameters
    ----------
    config : Config

    Members
    -------
    begins, octet : In(1)
        The beat, if there is one, is its codeword's first; then: it is one of an octet.
    beats_i : In(stream of beat_bytes * 8 bits), beats_o : Out(likewise)
    take : In(1)
        Strobe: the next beat's fields are wanted; all beats of an octet are there when its levels are.
    fields : Out(array of field, by token), one cycle later
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.field = field_bits(config)
        self.fields_shape = data.ArrayLayout(self.field, config.elements_per_beat)
        beats = stream.Signature(config.beat_bytes * 8, always_ready=True)
        super().__init__({
            "begins": In(1),
            "octet": In(1),
            "beats_i": In(beats),
            "beats_o": Out(beats),
            "take": In(1),
            "fields": Out(self.fields_shape),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        beat, valid = self.beats_i.payload, self.beats_i.valid
        field_beats = (config.group_tokens - FOLDED_TOKENS) // config.elements_per_beat
        held, octet = Signal(), Signal()
        number = Signal(range(config.group_words))   # of the octet's beat; 0 again behind its last one
        levels = Signal()
        m.d.comb += [
            octet.eq(Mux(self.begins, self.octet, held)),
            self.beats_o.payload.eq(beat),
            self.beats_o.valid.eq(valid & (~octet | levels)),
        ]
        with m.If(valid):
            m.d.sync += held.eq(octet)
        with m.If(valid & octet):
            m.d.sync += [
                number.eq(number + 1),
                levels.eq((number >= field_beats - 1) & (number != config.group_words - 1)),
            ]
        # Whether there is a beat is known late: the octets' go on from registers.
        kept, kept_valid, kept_levels = Signal.like(beat, reset_less=True), Signal(), Signal()
        m.d.sync += [kept.eq(beat), kept_valid.eq(valid & octet), kept_levels.eq(levels)]
        folded = self._unfold(m, kept, kept_valid, kept_levels, field_beats)

        m.submodules.queue = queue = Memory(
            shape=self.fields_shape, depth=beats_buffered(config), init=[], attrs={"ram_style": "distributed"})
        write, read = queue.write_port(domain="sync"), queue.read_port(domain="comb")
        m.d.comb += [write.en.eq(kept_valid), Value.cast(write.data).eq(folded)]
        with m.If(~kept_levels):
            m.d.comb += Value.cast(write.data).eq(Cat(
                kept.word_select(e, 16)[: self.field] for e in range(config.elements_per_beat)))
        with m.If(write.en):
            m.d.sync += write.addr.eq(write.addr + 1)
        with m.If(self.take):
            m.d.sync += [self.fields.eq(read.data), read.addr.eq(read.addr + 1)]
        return m

    def _unfold(self, m: Module, beat: Signal, valid: Value, levels: Value, field_beats: int) -> Value:
        """Gather the spare bits of the beats; returns the fields that are made of them, in the place of levels."""
        config, spare, elements = self.config, one_bit_features(self.config), self.config.elements_per_beat
        runs = level_beats(config)
        run, left = Signal(range(max(2, runs))), Signal(range(field_beats // runs), init=field_beats // runs - 1)
        gathered = Array(Signal(self.fields_shape, name=f"gathered_{i}") for i in range(runs))
        with m.If(valid & ~levels):
            m.d.sync += left.eq(left - 1)
            with m.If(left == 0):
                m.d.sync += [left.eq(field_beats // runs - 1), run.eq(Mux(run == runs - 1, 0, run + 1))]
            for i, fields in enumerate(gathered):
                with m.If(run == i):
                    for e in range(elements):
                        m.d.sync += Value.cast(fields[e]).eq(
                            Cat(Value.cast(fields[e]), beat.word_select(e, 16)[self.field :])[spare:])
        place = Signal(range(max(2, runs)))   # of the levels that come
        with m.If(valid & levels):
            m.d.sync += place.eq(Mux(place == runs - 1, 0, place + 1))
        return Value.cast(gathered[place]) if runs > 1 else Value.cast(gathered[0])


class OctetTurns(wiring.Component):
    """Says when an octet's levels may be issued, and when its fields are.

    Its fields follow when its tables are built, in the order of the levels.  Reset forgets all octets.

    Parameters
    ----------
    config : Config
    build_cycles : int
        Of an octet's tables, from its last levels on.

    Members
    -------
    room : Out(1)
        There is a bank for another octet's tables, and no others are being built.
    levels_last : In(1), slot, group : In
        Strobe: an octet's last levels are issued; whose it is.
    built : In(1)
        Strobe: its tables can be read when fields that are issued two cycles later look them up.
    valid : Out(1)
        A beat of fields may be issued: of the octet's `octet_slot`, `octet_group`, `bank`, with word number `word`.
    issue : In(1)
        Strobe: it is.
    octet_slot, octet_group, bank, word : Out
    """

    def __init__(self, config: Config, build_cycles: int) -> None:
        self.config = config
        self._build_cycles = build_cycles
        shapes = Shapes(config)
        group = (config.groups_in_flight - 1).bit_length()
        self.octet = data.StructLayout({"slot": shapes.slot, "group": group})
        super().__init__({
            "room": Out(1),
            "levels_last": In(1),
            "slot": In(shapes.slot),
            "group": In(group),
            "built": In(1),
            "valid": Out(1),
            "issue": In(1),
            "octet_slot": Out(shapes.slot),
            "octet_group": Out(group),
            "bank": Out(range(BANKS)),
            "word": Out(ceil_log2(config.group_words)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        octets = Array(Signal(self.octet, name=f"octet_{i}") for i in range(BANKS))
        used, built = Signal(range(BANKS + 1)), Signal(range(BANKS + 1))
        newest, rest = Signal(range(BANKS)), Signal(range(self._build_cycles + 1))
        ends = Signal()
        m.d.comb += [
            ends.eq(self.issue & (self.word == self.config.group_words - 1)),
            self.octet_slot.eq(octets[self.bank].slot),
            self.octet_group.eq(octets[self.bank].group),
        ]
        m.d.sync += [
            used.eq(used + self.levels_last - ends),
            built.eq(built + self.built - ends),
            # Known a cycle late, but for what takes it away.
            self.valid.eq(((built != 0) & ~ends) | (built == BANKS)),
            self.room.eq((used != BANKS) & (rest == 0) & ~self.levels_last),
        ]
        with m.If(self.levels_last):
            m.d.sync += [
                octets[newest].slot.eq(self.slot), octets[newest].group.eq(self.group), newest.eq(newest + 1),
                rest.eq(self._build_cycles)]
        with m.Elif(rest != 0):
            m.d.sync += rest.eq(rest - 1)
        with m.If(self.issue):
            m.d.sync += self.word.eq(self.word + 1)
        with m.If(ends):
            m.d.sync += self.bank.eq(self.bank + 1)
        return m


def level_query_beat(config: Config, octet: Value, level: Value) -> Value:
    """The beat of q that goes with an octet's levels: its eight features, or the half of them that a beat has."""
    elements = config.elements_per_beat
    if elements == 4:
        return Cat(level[0], octet)
    return octet[1:] if elements == 16 else octet


def halves_taken(config: Config, octet: Value) -> Value:
    """Of a beat of q that has two octets' features: whether the levels take its upper half twice, or its lower one."""
    return Cat(octet[0], ~octet[0]) if config.elements_per_beat == 16 else Const(0, 2)
