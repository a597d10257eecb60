"""Clears a lane's arrival bits: those of jobs that are abandoned, and those of first passes that ended."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

SETTLE_CYCLES = 4096
"""Cycles after which no beat of an abandoned job can be left inside of a lane."""


class Scrubber(wiring.Component):
    """Goes through the places of a job, one a cycle where `Arrivals` leaves it, and clears their arrival bits.

    An abandoned job: waits until nothing of it can be under way in the lane (`SETTLE_CYCLES`, without those in which
    the lane is held up), clears its bits, and
    then, when nothing of it is left, reports it abandoned.  A first pass: clears its bits when all of it came; until
    then they are needed, and from then on whatever comes again is told by that.  Reset forgets what was begun.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : In(jobs_in_flight)
        Strobes: a new job in this slot.
    failed : In(jobs_in_flight)
        The slot's job is being abandoned; one at a time.
    held : In(1)
        The lane's beats wait for the host memory.
    holds : In(jobs_in_flight)
        The slot's job has places.
    walked : In(jobs_in_flight)
        All walks of the slot's job have ended, and its groups.
    came : In(jobs_in_flight)
        The slot's job is sparse, and all of its first pass came.
    failed_slot, first_slot : Out(slot)
        Jobs that are scrubbed: abandoned; with a first pass that ended.
    failed_base, first_base : In(ring), failed_places, first_places : In
        Their places, in the same cycle.
    scrub : Out(1), scrub_first : Out(1), scrub_ring : Out(ring), scrubbed : In(1)
        The ports of `Arrivals`.
    settled : Out(jobs_in_flight)
        Nothing of the slot's abandoned job will come any more.
    abandoned : Out(jobs_in_flight)
        Nothing of it is left.
    cleared : Out(jobs_in_flight)
        The bits of the slot's first pass are clear.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        shapes = Shapes(config)
        slots, places = config.jobs_in_flight, shapes.place.width + 1
        self.shapes = shapes
        super().__init__({
            "start": In(slots),
            "failed": In(slots),
            "held": In(1),
            "holds": In(slots),
            "walked": In(slots),
            "came": In(slots),
            "failed_slot": Out(shapes.slot),
            "failed_base": In(shapes.ring),
            "failed_places": In(places),
            "first_slot": Out(shapes.slot),
            "first_base": In(shapes.ring),
            "first_places": In(places),
            "scrub": Out(1),
            "scrub_first": Out(1),
            "scrub_ring": Out(shapes.ring),
            "scrubbed": In(1),
            "settled": Out(slots),
            "abandoned": Out(slots),
            "cleared": Out(slots),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        slots, places = config.jobs_in_flight, self.failed_places.shape()

        settle = Signal(range(SETTLE_CYCLES + 1))
        place = Signal(places)
        failed = self.failed.any()
        m.d.comb += self.settled.eq(Mux(settle == SETTLE_CYCLES, self.failed, 0))
        m.d.sync += [self.abandoned.eq(self.abandoned & ~self.start), self.cleared.eq(self.cleared & ~self.start)]
        for s in range(slots):
            with m.If(self.failed[s]):
                m.d.comb += self.failed_slot.eq(s)
        all_clear, at_work = Signal(), Signal()
        m.d.comb += all_clear.eq(place == Mux(self.holds.bit_select(self.failed_slot, 1), self.failed_places, 0))
        with m.If(failed & ~self.abandoned.bit_select(self.failed_slot, 1)):
            with m.If(settle != SETTLE_CYCLES):
                m.d.sync += settle.eq(settle + ~self.held)
            with m.Elif(~all_clear):
                m.d.comb += at_work.eq(1)
                with m.If(self.scrubbed):
                    m.d.sync += place.eq(place + 1)
            with m.Elif(self.walked.bit_select(self.failed_slot, 1)):
                m.d.sync += [
                    self.abandoned.bit_select(self.failed_slot, 1).eq(1),
                    self.cleared.bit_select(self.failed_slot, 1).eq(1),
                ]
        with m.Elif(~failed):
            m.d.sync += [settle.eq(0), place.eq(0)]
        m.d.comb += [self.scrub.eq(at_work), self.scrub_ring.eq(self.failed_base + place)]

        if config.sparse:
            wanted, busy, first_place = Signal(slots), Signal(), Signal(places)
            m.d.comb += wanted.eq(self.came & self.holds & ~self.cleared & ~self.failed)
            with m.If(~busy):
                m.d.sync += [busy.eq(wanted.any()), first_place.eq(0)]
                for s in range(slots):
                    with m.If(wanted[s]):
                        m.d.sync += self.first_slot.eq(s)
            with m.Elif(~wanted.bit_select(self.first_slot, 1)):
                m.d.sync += busy.eq(0)
            with m.Elif(first_place == self.first_places):
                m.d.sync += [busy.eq(0), self.cleared.bit_select(self.first_slot, 1).eq(1)]
            with m.Elif(~at_work):
                m.d.comb += [
                    self.scrub.eq(1), self.scrub_first.eq(1), self.scrub_ring.eq(self.first_base + first_place)]
                with m.If(self.scrubbed):
                    m.d.sync += first_place.eq(first_place + 1)
        return m
