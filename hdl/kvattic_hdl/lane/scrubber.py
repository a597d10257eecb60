"""Clears a lane's arrival bits: those of jobs that are abandoned, and those of first passes that ended."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.shapes import Shapes

SETTLE_CYCLES = 4096
"""Cycles after which no beat of an abandoned job can be left inside of a lane."""


class Scrubber(wiring.Component):
    """Goes through the places of a job, one a cycle where `Arrivals` leaves it, and clears their arrival bits.

    An abandoned job: waits until nothing of it can be under way in the lane (`SETTLE_CYCLES`, without those in which
    the lane is held up) and all its walks have ended, clears its bits, and reports it abandoned.  A first pass: clears
    its bits when all of it came; until then they are needed, and from then on whatever comes again is told by that.
    It looks at one slot after the other, two cycles each.  Reset forgets what was begun.

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
    slot : Out(slot)
        Job that is looked at, or scrubbed.
    base : In(ring), places : In
        Its places, in the same cycle.
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
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        super().__init__({
            "start": In(slots),
            "failed": In(slots),
            "held": In(1),
            "holds": In(slots),
            "walked": In(slots),
            "came": In(slots),
            "slot": Out(shapes.slot),
            "base": In(shapes.ring),
            "places": In(shapes.place.width + 1),
            "scrub": Out(1),
            "scrub_first": Out(1),
            "scrub_ring": Out(shapes.ring),
            "scrubbed": In(1),
            "settled": Out(slots),
            "abandoned": Out(slots),
            "cleared": Out(slots),
        })

    def _settle(self, m: Module) -> Signal:
        """Returns whether nothing of the job that failed can be under way any more."""
        settle, settled, held = Signal(range(SETTLE_CYCLES + 1)), Signal(), Signal()
        m.d.comb += self.settled.eq(Mux(settled, self.failed, 0))
        m.d.sync += [settled.eq(settle == SETTLE_CYCLES), held.eq(self.held)]
        with m.If(~self.failed.any()):
            m.d.sync += [settle.eq(0), settled.eq(0)]
        with m.Elif(settle != SETTLE_CYCLES):
            m.d.sync += settle.eq(settle + ~held)
        return settled

    def elaborate(self, platform: object) -> Module:
        m = Module()
        settled = self._settle(m)
        # What is known of the slot, a cycle late.
        failed, abandoned, walked, came, holds, cleared = (Signal(name=f"slot_{name}") for name in (
            "failed", "abandoned", "walked", "came", "holds", "cleared"))
        m.d.sync += [known.eq(each.bit_select(self.slot, 1)) for known, each in (
            (failed, self.failed), (abandoned, self.abandoned), (walked, self.walked), (came, self.came),
            (holds, self.holds), (cleared, self.cleared))]
        wanted = Signal()
        m.d.comb += wanted.eq(Mux(failed, settled & walked & ~abandoned, came & holds & ~cleared))

        looked, busy = Signal(), Signal()   # what is known is of this slot; it is scrubbed
        left = Signal.like(self.places)
        leave, done = Signal(), Signal()
        with m.If(~busy):
            m.d.sync += [
                looked.eq(~looked),
                self.scrub_first.eq(~failed),
                self.scrub_ring.eq(self.base),
                left.eq(Mux(holds, self.places, 0)),
            ]
            with m.If(looked):
                m.d.sync += busy.eq(wanted)
                m.d.comb += leave.eq(~wanted)
        with m.Elif(~wanted | (failed == self.scrub_first)):   # it failed meanwhile, or another job began
            m.d.comb += leave.eq(1)
        with m.Elif(left == 0):
            m.d.comb += [leave.eq(1), done.eq(1)]
        with m.Else():
            m.d.comb += self.scrub.eq(1)
            with m.If(self.scrubbed):
                m.d.sync += [self.scrub_ring.eq(self.scrub_ring + 1), left.eq(left - 1)]
        with m.If(leave):
            m.d.sync += [
                busy.eq(0), looked.eq(0),
                self.slot.eq(Mux(self.slot == self.config.jobs_in_flight - 1, 0, self.slot + 1))]
        at = strobe(done, self.slot)
        m.d.sync += [
            self.cleared.eq((self.cleared | at) & ~self.start),
            self.abandoned.eq((self.abandoned | Mux(self.scrub_first, 0, at)) & ~self.start),
        ]
        return m
