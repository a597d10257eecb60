"""Bookkeeping of a lane's first pass: its features, its open groups, what they wait for, when they are harvested."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lane.first_walker import sink_bits
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.shapes import TOKEN_BITS, Shapes

GENERATION_BITS = 4
"""Tells the chosen features of two jobs apart that used the same slot."""


def group_shape(config: Config) -> data.StructLayout:
    """What a group is about: slot, ring place of its first codeword, its first token, whether it is of features.

    sinks: codewords of K of its first tokens, which are scored exactly.
    """
    shapes = Shapes(config)
    return data.StructLayout(
        {"slot": shapes.slot, "ring": shapes.ring, "token": TOKEN_BITS, "features": 1}
        | ({"sinks": sink_bits(config)} if config.codes else {}))


def harvest_shape(config: Config) -> data.StructLayout:
    """A token of a group that is harvested: where, buffer, word and element (see `FirstPass.harvest`), sink."""
    return data.StructLayout({
        "where": Shapes(config).lane_token,
        "buffer": (config.groups_in_flight - 1).bit_length(),
        "word": (config.group_words - 1).bit_length(),
        "element": (config.elements_per_beat - 1).bit_length(),
    } | ({"sink": 1} if config.codes else {}))


class FirstPass(wiring.Component):
    """Keeps `groups_in_flight` groups, each in a buffer of its own, which take turns; they end in their order.

    A group collects codewords until it is closed and all that were asked for have come.  Then its tokens are harvested
    one by one if it is of features, and it ends when the last one's score is stored; any other ends at once.  A new
    group can be opened two cycles after the last one ended, at the earliest.  Reset forgets all groups.

    Parameters
    ----------
    config : Config

    Members
    -------
    room : Out(1)
        A buffer is free: `open` is allowed.
    next : Out(group)
        The buffer that the next group takes.
    open : In(1), group : In(`group_shape`)
        Strobe: a group begins.
    asked : In(1)
        Strobe: a codeword was asked for, of the group opened last.
    close : In(1)
        Strobe: nothing more of it is asked for.
    feature_stored, sketch_stored : In(1), feature_group, sketch_group : In(group)
        Strobes: a codeword of this buffer's group is accounted for.  A group has either the ones or the others, but
        for one with sinks.
    harvest : Out(stream of token, buffer, word, element)
        The next token of the oldest group: `Shapes.lane_token`, with `last` for the group's last one; its sums are
        element `element` of word `word` of buffer `buffer`, which is of no more use after its last element.  A `sink`
        has its score already.
    harvested : In(1)
        Strobe: the scores of a group's last token are stored.
    given_up : In(jobs_in_flight)
        Nothing of the slot's job will come any more: its groups count as complete.
    remains : Out(jobs_in_flight)
        Groups of the slot's job have not ended.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = Shapes(config)
        self._group = (config.groups_in_flight - 1).bit_length()
        super().__init__({
            "room": Out(1),
            "next": Out(self._group),
            "open": In(1),
            "group": In(group_shape(config)),
            "asked": In(1),
            "close": In(1),
            "feature_stored": In(1),
            "feature_group": In(self._group),
            "sketch_stored": In(1),
            "sketch_group": In(self._group),
            "harvest": Out(stream.Signature(harvest_shape(config))),
            "harvested": In(1),
            "given_up": In(config.jobs_in_flight),
            "remains": Out(config.jobs_in_flight),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        groups = range(config.groups_in_flight)

        # `newest` was opened last; the buffers' number is a power of two.
        newest, oldest = Signal(self._group), Signal(self._group)
        used, closed = Signal(len(groups)), Signal(len(groups))
        left = Array(Signal(bits_for(config.group_codewords), name=f"left_{g}") for g in groups)
        end = Signal()
        m.submodules.about = about = Memory(
            shape=group_shape(config), depth=len(groups), init=[], attrs={"ram_style": "distributed"})
        write, head, second = about.write_port(domain="sync"), about.read_port(domain="comb"), about.read_port(
            domain="comb")
        m.d.sync += self.room.eq(~used.bit_select(self.next, 1) & ~self.open)    # a cycle late
        m.d.comb += [
            write.en.eq(self.open),
            write.addr.eq(self.next),
            write.data.eq(self.group),
            head.addr.eq(oldest),
            second.addr.eq(oldest + 1),
        ]
        for g in groups:
            up, down = Signal(name=f"up_{g}"), Signal(range(3), name=f"down_{g}")
            feature, sketch = (stored & (group == g) for stored, group in (
                (self.feature_stored, self.feature_group), (self.sketch_stored, self.sketch_group)))
            m.d.comb += [
                up.eq(self.asked & (newest == g)),
                down.eq(feature + sketch if config.codes else feature | sketch),
            ]
            with m.If(up != down):
                m.d.sync += left[g].eq(left[g] + up - down)
            with m.If(self.close & (newest == g)):
                m.d.sync += closed[g].eq(1)
            with m.If(end & (oldest == g)):
                m.d.sync += [used[g].eq(0), closed[g].eq(0), left[g].eq(0)]
            with m.If(self.open & (self.next == g)):
                m.d.sync += used[g].eq(1)
        with m.If(self.open):
            m.d.sync += [newest.eq(self.next), self.next.eq(self.next + 1)]
        with m.If(end):
            m.d.sync += oldest.eq(oldest + 1)
        # Groups of a job follow each other.
        goes_on = used.bit_select(second.addr, 1) & (second.data.slot == head.data.slot)
        m.d.sync += self.remains.eq(
            (self.remains & ~strobe(end & ~goes_on, head.data.slot)) | strobe(self.open, self.group.slot))

        # The oldest group.
        token = self.harvest.payload
        count = Signal((config.group_tokens - 1).bit_length())
        ring, number = Signal(shapes.ring), Signal(TOKEN_BITS)
        index_bits = config.slot_bits_per_codeword
        element_bits = len(token.element)
        complete = Signal()
        # A cycle late, for it comes through wide choices; once a group is complete it remains so until its end.
        m.d.sync += complete.eq(
            closed.bit_select(oldest, 1) & ((left[oldest] == 0) | self.given_up.bit_select(head.data.slot, 1)) & ~end)
        m.d.comb += [
            token.where.slot.eq(head.data.slot),
            token.where.ring.eq(ring),
            token.where.index.eq(count[:index_bits]),
            token.where.token.eq(number),
            token.where.last.eq(count.all()),
            token.buffer.eq(oldest),
            token.word.eq(count[element_bits:]),
            token.element.eq(count[:element_bits]),
        ]
        if config.codes:
            m.d.comb += token.sink.eq(count[index_bits:] < head.data.sinks)
        with m.FSM(name="state"):
            with m.State("collect"):
                m.d.sync += [count.eq(0), ring.eq(head.data.ring), number.eq(head.data.token)]
                with m.If(complete):
                    with m.If(head.data.features):
                        m.d.sync += self.harvest.valid.eq(1)
                        m.next = "harvest"
                    with m.Else():
                        m.d.comb += end.eq(1)
            with m.State("harvest"):
                with m.If(self.harvest.ready):
                    m.d.sync += [
                        count.eq(count + 1),
                        number.eq(number + 1),
                        ring.eq(ring + count[:index_bits].all()),
                    ]
                    with m.If(token.where.last):
                        m.d.sync += self.harvest.valid.eq(0)
                        m.next = "store"
            with m.State("store"):
                with m.If(self.harvested):
                    m.d.comb += end.eq(1)
                    m.next = "collect"
        return m


class FirstPlaces(wiring.Component):
    """What was asked for of each slot's first pass, and which of the ring's places and buffers it has.

    Parameters
    ----------
    config : Config

    Members
    -------
    slot : In(slot), begin : In(1), asked : In(1), place : In(place)
        Strobes: the slot's first walk begins; the codeword with this place is asked for.
    next_ring : In(ring), next_group : In(group)
        The next free place, and the next group's buffer: the walk's first ones if it begins now.
    base : Out(ring)
        The first place of the walk that began last.
    asked_slot : In(slot)
    asked_places : Out, first_group : Out(group)
        The last place asked for in that slot's first pass, + 1; the buffer of its first group.  In the same cycle.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self._group = (config.groups_in_flight - 1).bit_length()
        super().__init__({
            "slot": In(shapes.slot),
            "begin": In(1),
            "asked": In(1),
            "place": In(shapes.place),
            "next_ring": In(shapes.ring),
            "next_group": In(self._group),
            "base": Out(shapes.ring),
            "asked_slot": In(shapes.slot),
            "asked_places": Out(shapes.place.width + 1),
            "first_group": Out(self._group),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.places = places = Memory(
            shape=data.StructLayout({"asked": self.shapes.place.width + 1, "group": self._group}),
            depth=self.config.jobs_in_flight, init=[], attrs={"ram_style": "distributed"})
        write, read = places.write_port(domain="sync"), places.read_port(domain="comb")
        group = Signal(self._group)
        m.d.comb += [
            write.en.eq(self.begin | self.asked),
            write.addr.eq(self.slot),
            write.data.asked.eq(Mux(self.begin, 0, self.place + 1)),
            write.data.group.eq(Mux(self.begin, self.next_group, group)),
            read.addr.eq(self.asked_slot),
            self.asked_places.eq(read.data.asked),
            self.first_group.eq(read.data.group),
        ]
        with m.If(self.begin):
            m.d.sync += [group.eq(self.next_group), self.base.eq(self.next_ring)]
        return m


class ChosenFeatures(wiring.Component):
    """The features that each slot's job reads in its first pass, by their number in the list and by themselves.

    A feature is chosen if its mark is of the slot's present generation, so that no list needs to be swept.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        A slot's list, behind its first row record, which makes it empty.
    address : In
        Cat(number in the list, slot).
    feature : Out, one cycle later
    asked_slot : In(slot), asked_feature : In
    chosen : Out(1), one cycle later
        That feature is in that slot's list.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.feature_bits = ceil_log2(config.head_dim)
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "address": In(self.feature_bits + shapes.slot.width),
            "feature": Out(self.feature_bits),
            "asked_slot": In(shapes.slot),
            "asked_feature": In(ceil_log2(config.group_codewords)),
            "chosen": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        slots, bits = self.config.jobs_in_flight, self.feature_bits
        load = self.load
        feature, number = load.data[:bits], load.data[8 : 8 + bits]
        m.submodules.features = features = Memory(
            shape=bits, depth=slots << bits, init=[], attrs={"ram_style": "block"})
        m.submodules.marks = marks = Memory(
            shape=GENERATION_BITS, depth=slots << bits, init=[], attrs={"ram_style": "block"})
        write, read = features.write_port(domain="sync"), features.read_port(domain="sync")
        mark, seen = marks.write_port(domain="sync"), marks.read_port(domain="sync")
        generations = Array(Signal(GENERATION_BITS, name=f"generation_{s}") for s in range(slots))
        generation, exists = Signal(GENERATION_BITS), Signal()
        with m.If(self.load_valid & load.record & (load.row == 0)):
            m.d.sync += generations[load.slot].eq(generations[load.slot] + 1)
        m.d.comb += [
            write.en.eq(self.load_valid & load.chosen),
            write.addr.eq(Cat(number, load.slot)),
            write.data.eq(feature),
            read.addr.eq(self.address),
            self.feature.eq(read.data),
            mark.en.eq(self.load_valid & load.chosen),
            mark.addr.eq(Cat(feature, load.slot)),
            mark.data.eq(generations[load.slot]),
            seen.addr.eq(Cat(self.asked_feature[:bits], self.asked_slot)),
            self.chosen.eq((seen.data == generation) & exists),
        ]
        m.d.sync += [generation.eq(generations[self.asked_slot]), exists.eq(self.asked_feature < self.config.head_dim)]
        return m
