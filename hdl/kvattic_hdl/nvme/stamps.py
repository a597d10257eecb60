"""When the command of each job was requested, and when its first and its last beat moved."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import COMPLETION
from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

STAMPS = data.StructLayout({name: COMPLETION[name].size * 8 for name in ("fetched", "first_beat", "last_beat")})
"""What a completion says of its job; each wraps at its width."""
DELAY = 3
"""Cycles from an event to `cycle`, which `Counters` counts behind as many."""


def _delayed(m: Module, value: Value, cycles: int, name: str) -> Signal:
    """A signal, some cycles later."""
    for number in range(1, cycles + 1):
        later = Signal(value.shape(), name=f"{name}_{number}")
        m.d.sync += later.eq(value)
        value = later
    return value


class JobStamps(wiring.Component):
    """Notes the cycle of three events for each slot.

    Latency: an event is in `stamps` four cycles later, with the number of its own cycle.
    Throughput, ordering: all lanes in each cycle, a command a cycle; none.
    Reset: no slot has seen a beat.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    cycle : In(32)
        The counter CYCLES, in which an event's cycle is counted three cycles later.
    asked : In(1)
        Strobe: the next command is requested, maybe while the one before it is in hand.  This is `stamps.fetched`.
    fetched : In(1)
        Strobe: it is taken in hand.
    used, used_slot : In(1), In(slot)
        Strobe: the command in hand is the job of this slot.
    started, started_slot : In(1), In(slot)
        Strobe: its beats may come from now on.  A job that the lanes never see is not started.
    beats : In(lanes)
        Lanes that take a beat.
    beat_slots : In(ArrayLayout(slot, lanes))
        Whose beat it was, one cycle later.
    slot : In(slot)
        Slot of a job that was started and is done, or of one that is not started.
    stamps : Out(STAMPS)
        Its stamps, in the same cycle; of a job without a beat the last two are 0.
    """

    cycle: Signal
    asked: Signal
    fetched: Signal
    used: Signal
    used_slot: Signal
    started: Signal
    started_slot: Signal
    beats: Signal
    beat_slots: data.View
    slot: Signal
    stamps: data.View

    def __init__(self, config: Config) -> None:
        self._config = config
        slot = Shapes(config).slot
        super().__init__({
            "cycle": In(32),
            "asked": In(1),
            "fetched": In(1),
            "used": In(1),
            "used_slot": In(slot),
            "started": In(1),
            "started_slot": In(slot),
            "beats": In(config.lanes),
            "beat_slots": In(data.ArrayLayout(slot, config.lanes)),
            "slot": In(slot),
            "stamps": Out(STAMPS),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        slots = range(self._config.jobs_in_flight)
        noted = data.ArrayLayout(unsigned(32), len(slots))
        fetched, first, last = (Signal(noted, name=name, reset_less=True) for name in ("fetch", "first", "last"))
        seen = Signal(len(slots))
        requested, latest = Signal(32, reset_less=True), Signal(32, reset_less=True)
        with m.If(_delayed(m, self.asked, DELAY, "asked")):
            m.d.sync += requested.eq(self.cycle)
        # All as late as each other, so that they stay in order.
        with m.If(_delayed(m, self.fetched, DELAY, "fetched")):
            m.d.sync += latest.eq(requested)
        used = _delayed(m, self.used, DELAY, "used")
        used_slot = _delayed(m, self.used_slot, DELAY, "used_slot")
        started = _delayed(m, self.started, DELAY, "started")
        started_slot = _delayed(m, self.started_slot, DELAY, "started_slot")
        hit = self._hits(m)
        for slot in slots:
            with m.If(used & (used_slot == slot)):
                m.d.sync += fetched[slot].eq(latest)
            with m.If(hit[slot]):
                m.d.sync += [seen[slot].eq(1), last[slot].eq(self.cycle)]
                with m.If(~seen[slot]):
                    m.d.sync += first[slot].eq(self.cycle)
            with m.If(started & (started_slot == slot)):
                m.d.sync += seen[slot].eq(0)
        any_beat = seen.bit_select(self.slot, 1)
        m.d.comb += [
            self.stamps.fetched.eq(fetched[self.slot]),
            self.stamps.first_beat.eq(Mux(any_beat, first[self.slot], 0)),
            self.stamps.last_beat.eq(Mux(any_beat, last[self.slot], 0)),
        ]
        return m

    def _hits(self, m: Module) -> Signal:
        """Slots of which a lane took a beat `DELAY` cycles ago."""
        taken = _delayed(m, self.beats, 1, "taken")
        of_lane = [Mux(taken[lane], 1 << self.beat_slots[lane], 0) for lane in range(self._config.lanes)]
        hit = Signal(self._config.jobs_in_flight)
        lanes_hit = [Signal.like(hit, name=f"lane_{lane}_hit") for lane in range(self._config.lanes)]
        m.d.sync += [lane_hit.eq(hits) for lane_hit, hits in zip(lanes_hit, of_lane, strict=True)]
        m.d.sync += hit.eq(Cat(
            Cat(lane_hit[slot] for lane_hit in lanes_hit).any() for slot in range(len(hit))))
        return hit
