"""The score ring's places: handed out to jobs in slot order, and taken back."""

from enum import IntEnum

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes


class Lookup(IntEnum):
    """Who looks the places of a slot's job up."""

    ARRIVALS = 0
    """Of a codeword that arrives."""
    SCRUBBER = 1
    """Of a job whose arrival bits are cleared."""
    KEY = 2
    """Of a sparse job whose K is walked."""
    VALUE = 3
    """Likewise V."""
    SELECTOR = 4
    """Of a job whose units are gone through for the selection."""


class ScoreRing(wiring.Component):
    """Keeps where each job's places of the score ring begin, and how many it has; they follow each other in the ring.

    A dense job takes one place with each K codeword that is asked for, a sparse job all of its places when its first
    walk begins.  Whoever takes places must be the oldest job that has not got all of them.  They are given back in the
    same order.  What is looked up is there in the same cycle; whether there is room is said two cycles late, and not
    within two cycles after places were taken if it then hangs on these.  Reset empties the ring.

    Parameters
    ----------
    config : Config

    Members
    -------
    sparse : In(jobs_in_flight)
        The slot's job is a sparse one.
    key_slot : In(slot), key_begin : In(1)
        Strobe: the K walk of this slot's job begins.
    key_fired : In(1), key_place : In(place)
        Strobe: its codeword with this place is asked for.
    first_slot : In(slot), first_begin : In(1), first_places : In
        Strobe: this (sparse) slot's first walk begins; it takes so many places.
    room : Out(1), first_room : Out(1)
        There is room for one more place; for `first_places` of two cycles before.
    head : Out(ring)
        The next place.
    done : In(jobs_in_flight)
        The slot's job needs its places no longer.
    holds : Out(jobs_in_flight)
        The slot's job has places, or has at least begun to take some.
    slots : Array of In(slot), base : Array of Out(ring), asked, taken : Array of Out
        By `Lookup` (the first two if not `config.sparse`): a slot's first place, its last K
        codeword's place in the job + 1, and how many places it has.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lookups = lookups = len(Lookup) if config.sparse else 2
        self.shapes = shapes = Shapes(config)
        places = shapes.place.width + 1
        super().__init__({
            "sparse": In(config.jobs_in_flight),
            "key_slot": In(shapes.slot),
            "key_begin": In(1),
            "key_fired": In(1),
            "key_place": In(shapes.place),
            "first_slot": In(shapes.slot),
            "first_begin": In(1),
            "first_places": In(places),
            "room": Out(1),
            "first_room": Out(1),
            "head": Out(shapes.ring),
            "done": In(config.jobs_in_flight),
            "holds": Out(config.jobs_in_flight),
            "slots": In(shapes.slot).array(lookups),
            "base": Out(shapes.ring).array(lookups),
            "asked": Out(places).array(lookups),
            "taken": Out(places).array(lookups),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        places = shapes.place.width + 1
        m.submodules.begun = begun = Memory(
            shape=data.StructLayout({"base": shapes.ring, "taken": places}), depth=config.jobs_in_flight, init=[],
            attrs={"ram_style": "distributed"})
        m.submodules.asked = asked = Memory(
            shape=places, depth=config.jobs_in_flight, init=[], attrs={"ram_style": "distributed"})
        begin, ask = begun.write_port(domain="sync"), asked.write_port(domain="sync")
        dense, first_begin = Signal(), Signal()
        m.d.comb += [
            dense.eq(~self.sparse.bit_select(self.key_slot, 1)),
            first_begin.eq(self.first_begin if config.sparse else 0),
            begin.en.eq((self.key_begin & dense) | first_begin),
            begin.addr.eq(Mux(first_begin, self.first_slot, self.key_slot)),
            begin.data.base.eq(self.head),
            begin.data.taken.eq(self.first_places),
            ask.en.eq(self.key_begin | self.key_fired),
            ask.addr.eq(self.key_slot),
            ask.data.eq(Mux(self.key_begin, 0, self.key_place + 1)),
        ]

        def look_up(slot):
            """(base, asked, taken) of the slot."""
            where, count = begun.read_port(domain="comb"), asked.read_port(domain="comb")
            m.d.comb += [where.addr.eq(slot), count.addr.eq(slot)]
            taken = Mux(self.sparse.bit_select(slot, 1), where.data.taken, count.data)
            return where.data.base, count.data, taken

        for i in range(self.lookups):
            base, count, taken = look_up(self.slots[i])
            m.d.comb += [self.base[i].eq(base), self.asked[i].eq(count), self.taken[i].eq(taken)]

        used = Signal(range(config.ring_codewords + 1))
        new, given_back = Signal(places), Signal(places)
        oldest = Signal(shapes.slot)
        give_back = Signal()
        free, more_free, fits, taken, many_taken = (
            Signal(name=name) for name in ("free", "more_free", "fits", "taken", "many_taken"))
        takes = Signal()
        quiet = ~taken & ~takes
        m.d.comb += [
            takes.eq(first_begin | (self.key_fired & dense)),
            new.eq(Mux(first_begin, self.first_places, takes)),
            give_back.eq((self.holds & self.done).bit_select(oldest, 1)),
        ]
        m.d.sync += [
            free.eq(used != config.ring_codewords),
            more_free.eq(used < config.ring_codewords - 2),
            fits.eq(used + self.first_places <= config.ring_codewords),
            taken.eq(takes),
            many_taken.eq(first_begin),
            self.room.eq(~many_taken & ~first_begin & (more_free | (free & quiet))),
            self.first_room.eq(fits & quiet),
            given_back.eq(Mux(give_back, look_up(oldest)[2], 0)),
            used.eq(used + new - given_back),
            self.head.eq(self.head + new),
        ]
        with m.If(give_back):
            m.d.sync += self.holds.bit_select(oldest, 1).eq(0)
        with m.If(give_back | (~self.holds.bit_select(oldest, 1) & self.holds.any())):
            m.d.sync += oldest.eq(Mux(oldest == config.jobs_in_flight - 1, 0, oldest + 1))
        with m.If(self.key_begin & dense):
            m.d.sync += self.holds.bit_select(self.key_slot, 1).eq(1)
        with m.If(first_begin):
            m.d.sync += self.holds.bit_select(self.first_slot, 1).eq(1)
        return m
