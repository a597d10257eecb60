"""When a die may be given its next command: waits, ready/busy, and how long a die may stay busy."""

from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config


class DieTimes:
    """The part's times as the clocks count them.

    Attributes
    ----------
    wait : Shape
        Cycles of a wait.
    limit : Shape
        Ticks that a die may stay busy.
    moved : int
        Cycles from a cycle after the PHY took the last word of a write burst until its last byte has left the pins.
    start : StructLayout
        What a clock is started with: die, wait (cycles before anything else), busy (1: then until the die is ready, and
        t_rr more), limit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        part = config.part
        self.tick_bits = max(4, bits_for(config.cycles(part.t_r)) - 3)
        self.moved = config.cycles(config.word_bytes * 1000 / part.bus_mts) + 2
        longest = max(part.t_wb, part.t_rr, part.t_ccs, part.t_adl, part.t_whr)
        self.wait = unsigned(bits_for(self.cycles(longest) + self.moved))
        busy = (part.t_r + part.t_rcbsy, part.t_prog, part.t_bers, part.t_dbsy, part.t_pcbsy, part.t_feat, part.t_rst)
        self.limit = unsigned(bits_for(max(self.ticks(time) for time in busy)))
        self.start = data.StructLayout({
            "die": unsigned(max(1, ceil_log2(config.dies))), "wait": self.wait, "busy": 1, "limit": self.limit})

    def cycles(self, nanoseconds: float) -> int:
        """A wait's cycles from a cycle after the taking of the last command cycle, which lasts t_cad itself."""
        return self.config.cycles(nanoseconds + self.config.part.t_cad)

    def ticks(self, nanoseconds: float, factor: int = 2) -> int:
        """Ticks from the last command cycle's taking on, by which a die is ready that takes so long `factor` times."""
        last = self.cycles(self.config.part.t_wb)    # until it is busy
        return (self.config.cycles(nanoseconds) * factor + last >> self.tick_bits) + 2


class DieClocks(wiring.Component):
    """A clock for each die.

    A die is `free` when its wait is over and, if it was started as busy, R/B_n has been high since and t_rr more has
    passed.  It is `overdue` when it has been busy for longer than its limit.  Reset: all are free.

    Parameters
    ----------
    config : Config
    sources : int
        Who can start a clock; they never start one die's in the same cycle.

    Members
    -------
    ready : In(dies)
        R/B_n.
    starts : array of In(stream of start)
        Taken at once.
    free, overdue : Out(dies)
    """

    def __init__(self, config: Config, sources: int) -> None:
        self.config = config
        self.times = DieTimes(config)
        super().__init__({
            "ready": In(config.dies),
            "starts": In(stream.Signature(self.times.start, always_ready=True)).array(sources),
            "free": Out(config.dies),
            "overdue": Out(config.dies),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, times = self.config, self.times
        prescaler = Signal(times.tick_bits)
        tick = Signal()
        m.d.sync += [prescaler.eq(prescaler + 1), tick.eq(prescaler == 0)]
        for die in range(config.dies):
            wait = Signal(times.wait, name=f"wait_{die}")
            limit = Signal(times.limit, name=f"limit_{die}")
            busy = Signal(name=f"busy_{die}")
            over = Signal(name=f"over_{die}")
            m.d.comb += [over.eq(wait == 0), self.free[die].eq(over & ~busy), self.overdue[die].eq(busy & (limit == 0))]
            with m.If(~over):
                m.d.sync += wait.eq(wait - 1)
            with m.Elif(busy & self.ready[die]):
                m.d.sync += [busy.eq(0), wait.eq(config.cycles(config.part.t_rr))]
            with m.If(tick & (limit != 0)):
                m.d.sync += limit.eq(limit - 1)
            for source in self.starts:
                with m.If(source.valid & (source.payload.die == die)):
                    m.d.sync += [
                        wait.eq(source.payload.wait), busy.eq(source.payload.busy), limit.eq(source.payload.limit),
                    ]
        return m
