"""When the command of each job was requested, and when its first and its last beat moved."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import COMPLETION
from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import pick, strobe
from kvattic_hdl.lib.shapes import Shapes

STAMPS = data.StructLayout({name: COMPLETION[name].size * 8 for name in ("fetched", "first_beat", "last_beat")})
"""What a completion says of its job; each wraps at its width."""
DELAY = 3
"""Cycles from an event to `cycle`, which `Counters` counts behind as many."""


def settle_cycles(config: Config) -> int:
    """Cycles in which each slot has its turns at the memories, one for its first beat and one for its last."""
    return 2 << ceil_log2(config.jobs_in_flight)


def _delayed(m: Module, value: Value, cycles: int, name: str) -> Signal:
    """A signal, some cycles later."""
    for number in range(1, cycles + 1):
        later = Signal(value.shape(), name=f"{name}_{number}")
        m.d.sync += later.eq(value)
        value = later
    return value


class JobStamps(wiring.Component):
    """Notes the cycle of three events for each slot.

    Latency: an event is in `stamps` four cycles later, with the number of its own cycle; a beat `settle_cycles` and one
    more.
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
        Slot of a job that was started and is done, or of one that is not started.  It takes the finisher longer to
        drain a job than its last beat takes to its stamp.
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
        config = self._config
        fetched_write, self_fetched = self._kept(m, "fetched")
        requested, latest = Signal(32, reset_less=True), Signal(32, reset_less=True)
        with m.If(_delayed(m, self.asked, DELAY, "asked")):
            m.d.sync += requested.eq(self.cycle)
        # All as late as each other, so that they stay in order.
        with m.If(_delayed(m, self.fetched, DELAY, "fetched")):
            m.d.sync += latest.eq(requested)
        m.d.comb += [
            fetched_write.addr.eq(_delayed(m, self.used_slot, DELAY, "used_slot")),
            fetched_write.data.eq(latest),
            fetched_write.en.eq(_delayed(m, self.used, DELAY, "used")),
        ]
        started = strobe(_delayed(m, self.started, DELAY, "started"),
                         _delayed(m, self.started_slot, DELAY, "started_slot"))
        seen = Signal(config.jobs_in_flight)
        hit = self._hits(m)
        m.d.sync += seen.eq((seen | hit) & ~started)
        any_beat = seen.bit_select(self.slot, 1)
        first, last = self._note(m, hit & ~seen, hit)
        m.d.comb += [
            self.stamps.fetched.eq(self_fetched),
            self.stamps.first_beat.eq(Mux(any_beat, first, 0)),
            self.stamps.last_beat.eq(Mux(any_beat, last, 0)),
        ]
        return m

    def _kept(self, m: Module, name: str) -> tuple[Any, Value]:
        """A number of 32 bits for each slot: (where it is written, that of `slot`)."""
        m.submodules[name] = memory = Memory(shape=32, depth=self._config.jobs_in_flight, init=[])
        read = memory.read_port(domain="comb")
        m.d.comb += read.addr.eq(self.slot)
        return memory.write_port(), read.data

    def _note(self, m: Module, first: Value, last: Value) -> list[Value]:
        """The cycles in which these happened last for `slot`; they may happen for any number of slots at once.

        A slot notes the lowest bits of the cycle, and they go on to the memory before they come again: the cycle was
        the last one with these bits.
        """
        slots = self._config.jobs_in_flight
        low_bits = settle_cycles(self._config).bit_length()    # those of two rounds of turns
        turn = Signal(range(settle_cycles(self._config)))
        noted = [[Signal(low_bits, name=f"{name}_{slot}", reset_less=True) for slot in range(slots)]
                 for name in ("first", "last")]
        low, high = self.cycle[:low_bits], self.cycle[low_bits:]
        bits, whole = Signal(low_bits, reset_less=True), Signal(32)
        of_turn = Signal.like(turn)     # whose bits those are
        m.d.sync += [
            turn.eq(turn + 1), of_turn.eq(turn),
            bits.eq(pick([pick(of_kind, turn[1:]) for of_kind in noted], turn[0]))]
        m.d.comb += whole.eq(Cat(bits, high - (bits > low)))
        found = []
        for number, (name, happens) in enumerate((("first", first), ("last", last))):
            new = Signal(slots, name=f"{name}_new")
            write, kept = self._kept(m, name)
            now = turn[0] == number
            m.d.sync += new.eq(new & ~strobe(now, turn[1:])[:slots] | happens)
            for slot in range(slots):
                with m.If(happens[slot]):
                    m.d.sync += noted[number][slot].eq(low)
            write_now = Signal(name=f"write_{name}")
            m.d.sync += write_now.eq(new.bit_select(turn[1:], 1) & now)
            m.d.comb += [
                write.addr.eq(of_turn[1:]),
                write.data.eq(whole),
                write.en.eq(write_now),
            ]
            found.append(kept)
        return found

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
