"""Counters of what the lanes and the flash channels do."""

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import COMPLETION
from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

STALLS = ("starved", "barrier", "weights", "scores", "idle")
"""What a lane does in a cycle without a beat; with the beats they add up to all lane cycles."""
FLASH_COUNTERS = {
    "flash_words": "word",
    "flash_commands": "command",
    "die_busy": "dies_busy",
    "codewords": "codeword",
    "corrected": "corrected",
    "bit_errors": "bit_errors",
    "retries": "retry",
    "unreadable": "unreadable",
    "page_reads": "page_reads",
    "page_programs": "page_programs",
    "block_erases": "block_erases",
}
"""Registers that count what the flash channels do, and the member of `Shapes.flash_events` that each one adds up."""
SNAPSHOT = data.StructLayout(
    {name: COMPLETION[name].size * 8 for name in ("cycle", "beats", *STALLS)}
)
"""The counters of a completion, all of the same cycle; each wraps at its width."""
CYCLE_BITS = 48
"""Eleven days at 285 MHz; the registers are 64 bits wide, their upper bits zero."""


def total_of(numbers: Sequence[Value]) -> Value:
    """Sum of unsigned numbers, as a balanced tree."""
    values = [Value.cast(n) for n in numbers]
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


class Counters(wiring.Component):
    """Counts what the lanes did.

    Latency: an event is in its counter three cycles later.  Time is counted behind the same
    pipeline, so the counters are consistent in every cycle: beats and stalls add up to lanes
    times cycle.
    Throughput, ordering: all lanes in each cycle; none.
    Reset: all counters zero.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    events : In(ArrayLayout(Shapes.events, lanes))
        What each lane did in this cycle.
    counting : In(1)
        The drive has work: this cycle counts.
    cycle : Out(48)
        Cycles counted.
    first_beat, last_beat : Out(48)
        The cycle (the first is 1) of the first beat since `counting` rose last, and of the latest beat; 0: none.
    beats, starved, barrier, weights, scores, idle : Out
        Lane cycles of each kind.
    duplicates, stales : Out(32)
        Dropped codewords, also those that came while nothing counted.
    """

    events: data.View
    counting: Signal
    cycle: Signal
    first_beat: Signal
    last_beat: Signal
    beats: Signal
    starved: Signal
    barrier: Signal
    weights: Signal
    scores: Signal
    idle: Signal
    duplicates: Signal
    stales: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = Shapes(config)
        sum_bits = CYCLE_BITS + config.lanes.bit_length()
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.events, config.lanes)),
                "counting": In(1),
                "cycle": Out(CYCLE_BITS),
                "first_beat": Out(CYCLE_BITS),
                "last_beat": Out(CYCLE_BITS),
                "beats": Out(sum_bits),
                **{name: Out(sum_bits) for name in STALLS},
                "duplicates": Out(32),
                "stales": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        lanes = self._config.lanes
        now = Signal(3)  # `counting` beside the two registers before the counters, and a cycle later
        m.d.sync += now.eq(Cat(self.counting, now[:2]))
        counters = {
            "beat": (self.beats, True),
            "duplicate": (self.duplicates, False),
            "stale": (self.stales, False),
        }
        counters |= {name: (getattr(self, name), True) for name in STALLS}
        for name, (counter, gated) in counters.items():
            seen = Signal(lanes, name=f"{name}_seen")
            total = Signal(range(lanes + 1), name=f"{name}_total")
            happened = Cat(self.events[i][name] for i in range(lanes))
            m.d.sync += [
                seen.eq(Mux(self.counting, happened, 0) if gated else happened),
                total.eq(total_of(list(seen))),
                counter.eq(counter + total),
            ]
            if name == "beat":
                new_cycle = Signal(CYCLE_BITS)
                any_beat = Signal()
                m.d.comb += new_cycle.eq(self.cycle + now[1])
                m.d.sync += [any_beat.eq(seen.any()), self.cycle.eq(new_cycle)]
                begun = now[1] & ~now[2]
                with m.If(any_beat):
                    m.d.sync += self.last_beat.eq(new_cycle)
                with m.If(begun | (any_beat & ~self.first_beat.any())):
                    m.d.sync += self.first_beat.eq(Mux(any_beat, new_cycle, 0))
        return m


class FlashCounters(wiring.Component):
    """Counts what the flash channels did.

    Latency: an event is in its counter three cycles later.
    Throughput, ordering: all channels in each cycle; none.
    Reset: all counters zero.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    events : In(ArrayLayout(Shapes.flash_events, channels))
        What each channel did in this cycle.
    counting : In(1)
        The drive has work: this cycle counts.
    number : In(range(len(FLASH_COUNTERS)))
        Number of one of `FLASH_COUNTERS`.
    counter : Out(48)
        That one, in this cycle.
    """

    events: data.View
    counting: Signal
    number: Signal
    counter: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = Shapes(config)
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.flash_events, config.channels)),
                "counting": In(1),
                "number": In(range(len(FLASH_COUNTERS))),
                "counter": Out(CYCLE_BITS),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        seen = Signal.like(self.events)
        counting = Signal()
        m.d.sync += [seen.eq(self.events), counting.eq(self.counting)]
        counters = []
        for name, event in FLASH_COUNTERS.items():
            parts = [Value.cast(seen[i][event]) for i in range(self._config.channels)]
            # At most what all channels together can say in a cycle.
            total = Signal(range(len(parts) * ((1 << len(parts[0])) - 1) + 1), name=f"{name}_total")
            counter = Signal(CYCLE_BITS, name=name)
            m.d.sync += [total.eq(total_of(parts)), counter.eq(counter + total)]
            with m.If(~counting):
                m.d.sync += total.eq(0)
            counters.append(counter)
        m.d.comb += self.counter.eq(Array(counters)[self.number])
        return m
