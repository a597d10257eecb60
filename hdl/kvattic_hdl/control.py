"""Registers, batch state and counters: everything the host sees of the engine besides memory."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Elaboratable, Module, ResetInserter, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.commands import COMPLETION
from kvattic.config import Config
from kvattic.registers import ADDRESS_BITS, StatusBit
from kvattic.registers import Control as ControlBit

from .axi import axi_lite
from .interfaces import PAGE_BITS, Shapes
from .register_bank import RegisterBank

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
COUNT_BITS = 16
"""Bits of the number of commands in a batch."""
TAG_BITS = 24


def bit(flag: int) -> int:
    """Number of the one bit that is set."""
    return flag.bit_length() - 1


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
    pipeline, so the counters are consistent in every cycle: beats and stalls add up to channels
    times cycle.
    Throughput, ordering: all lanes in each cycle; none.
    Reset: all counters zero.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    events : In(ArrayLayout(Shapes.events, channels))
        What each lane did in this cycle.
    start : In(1)
        Clears all counters.  Not sooner than two cycles after the last cycle that counted: those
        are on their way.
    counting : In(1)
        A batch runs: this cycle counts.
    cycle : Out(48)
        Cycles counted.
    first_beat, last_beat : Out(48)
        The cycle (the first is 1) of the first and of the latest beat; 0: no beat yet.
    beats, starved, barrier, weights, scores, idle : Out
        Lane cycles of each kind.
    duplicates, stales : Out(32)
        Dropped codewords since `start`, those that came after the batch included.
    """

    events: data.View
    start: Signal
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
        sum_bits = CYCLE_BITS + config.channels.bit_length()
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.events, config.channels)),
                "start": In(1),
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
        channels = self._config.channels
        now = Signal(2)  # `counting` beside the two registers before the counters
        m.d.sync += now.eq(Cat(self.counting, now[0]))
        counters = {
            "beat": (self.beats, True),
            "duplicate": (self.duplicates, False),
            "stale": (self.stales, False),
        }
        counters |= {name: (getattr(self, name), True) for name in STALLS}
        for name, (counter, gated) in counters.items():
            seen = Signal(channels, name=f"{name}_seen")
            total = Signal(range(channels + 1), name=f"{name}_total")
            gate = self.counting if gated else ~self.start
            m.d.sync += [
                seen.eq(
                    Cat(self.events[i][name] for i in range(channels)) & gate.replicate(channels)
                ),
                total.eq(total_of(list(seen))),
                counter.eq(counter + total),
            ]
            with m.If(self.start):
                m.d.sync += [total.eq(0), counter.eq(0)]
            if name == "beat":
                new_cycle = Signal(CYCLE_BITS)
                any_beat = Signal()
                m.d.comb += new_cycle.eq(self.cycle + now[1])
                m.d.sync += [any_beat.eq(seen.any()), self.cycle.eq(new_cycle)]
                with m.If(any_beat):
                    m.d.sync += self.last_beat.eq(new_cycle)
                    with m.If(~self.first_beat.any()):
                        m.d.sync += self.first_beat.eq(new_cycle)
                with m.If(self.start):
                    m.d.sync += [self.cycle.eq(0), self.first_beat.eq(0), self.last_beat.eq(0)]
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
    start : In(1)
        Clears all counters.  Not sooner than two cycles after the last cycle that counted: those
        are on their way.
    counting : In(1)
        A batch runs: this cycle counts.
    flash_words, flash_commands, die_busy, codewords, corrected, bit_errors, retries, unreadable : Out(48)
        The registers of that name.
    page_reads, page_programs, block_erases : Out(48)
        The registers of that name.
    """

    events: data.View
    start: Signal
    counting: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = Shapes(config)
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.flash_events, config.channels)),
                "start": In(1),
                "counting": In(1),
                **{name: Out(CYCLE_BITS) for name in FLASH_COUNTERS},
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        seen = Signal.like(self.events)
        counting = Signal()
        m.d.sync += [seen.eq(self.events), counting.eq(self.counting)]
        for name, event in FLASH_COUNTERS.items():
            counter = getattr(self, name)
            parts = [Value.cast(seen[i][event]) for i in range(self._config.channels)]
            # At most what all channels together can say in a cycle.
            total = Signal(range(len(parts) * ((1 << len(parts[0])) - 1) + 1), name=f"{name}_total")
            m.d.sync += [total.eq(total_of(parts)), counter.eq(counter + total)]
            with m.If(~counting):
                m.d.sync += total.eq(0)
            with m.If(self.start):
                m.d.sync += counter.eq(0)
        return m


class Control(wiring.Component):
    """The register bank, the state of the batch, the counters, the interrupt and the soft reset.

    Latency: a doorbell gives `batch_start` one cycle after the bank acts on the write.
    Throughput: one batch at a time; a doorbell of 0, of more than 65,535, while busy or not ready
    only sets STATUS.DOORBELL_WHILE_BUSY.
    Ordering: STATUS.DONE rises after the last `completed`.
    Reset: nothing runs.  A soft reset (CONTROL.RESET) raises `stop`, waits for `quiet`, gives one
    pulse of `reset`, and in that cycle clears registers, counters and state here too, CONTROL.RESET
    included.  This block must not be under the reset that `reset` drives: its bus would lose a
    handshake.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : In(axi_lite(9))
        The host's access.
    irq : Out(1)
        CONTROL.IRQ_ENABLE and STATUS.DONE.
    events : In(ArrayLayout(Shapes.events, channels))
        What each lane did in this cycle.
    bad_tags : In(ArrayLayout(unsigned(24), channels))
        The tag that a lane's `events.bad_tag` is about, in the same cycle.
    flash_events : In(ArrayLayout(Shapes.flash_events, channels))
        What each flash channel did in this cycle.
    media_errors : In(ArrayLayout(Shapes.media_error, channels))
        The codeword that a channel's `flash_events.unreadable` is about, in the same cycle.
    lanes_ready : In(1)
        All lanes have swept their memories.
    bus_error : In(1)
        Strobe: host memory answered a read or a write with an error.
    completed : In(1)
        Strobe: a completion is in host memory.
    quiet : In(1)
        No AXI4 transfer is under way.
    stop : Out(1)
        Start no AXI4 transfer, drop what comes: a reset will follow when all is quiet.
    reset : Out(1)
        Pulse: reset everything but this block.
    batch_start : Out(1)
        Strobe: run `count` commands at `command_base`.
    count : Out(16)
        Commands of the batch; valid in the cycle of `batch_start`.
    busy : Out(1)
        A batch runs.
    command_base, completion_base, buffer_base, buffer_limit : Out(64)
        The registers.
    timeout : Out(32)
        The register.
    snapshot : Out(SNAPSHOT)
        The counters of a completion, consistent in each cycle.
    """

    bus: wiring.PureInterface
    irq: Signal
    events: data.View
    bad_tags: data.View
    flash_events: data.View
    media_errors: data.View
    lanes_ready: Signal
    bus_error: Signal
    completed: Signal
    quiet: Signal
    stop: Signal
    reset: Signal
    batch_start: Signal
    count: Signal
    busy: Signal
    command_base: Signal
    completion_base: Signal
    buffer_base: Signal
    buffer_limit: Signal
    timeout: Signal
    snapshot: data.View

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        super().__init__(
            {
                "bus": In(axi_lite(ADDRESS_BITS)),
                "irq": Out(1),
                "events": In(data.ArrayLayout(shapes.events, config.channels)),
                "bad_tags": In(data.ArrayLayout(TAG_BITS, config.channels)),
                "flash_events": In(data.ArrayLayout(shapes.flash_events, config.channels)),
                "media_errors": In(data.ArrayLayout(shapes.media_error, config.channels)),
                "lanes_ready": In(1),
                "bus_error": In(1),
                "completed": In(1),
                "quiet": In(1),
                "stop": Out(1),
                "reset": Out(1),
                "batch_start": Out(1),
                "count": Out(COUNT_BITS),
                "busy": Out(1),
                "command_base": Out(64),
                "completion_base": Out(64),
                "buffer_base": Out(64),
                "buffer_limit": Out(64),
                "timeout": Out(32),
                "snapshot": Out(SNAPSHOT),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        channels = self._config.channels
        m.submodules.bank = bank = RegisterBank(self._config)
        counters = Counters(self._config)
        m.submodules.counters = ResetInserter(self.reset)(counters)
        flash_counters = FlashCounters(self._config)
        m.submodules.flash_counters = ResetInserter(self.reset)(flash_counters)
        connect(m, flipped(self.bus), bank.bus)

        # Soft reset: the bank's RESET bit stays until the pulse, which clears the bank.
        m.d.comb += [
            self.stop.eq(bank.value.control[bit(ControlBit.RESET)]),
            bank.clear.eq(self.reset),
        ]
        m.d.sync += self.reset.eq(self.stop & self.quiet & ~self.reset)

        # The batch.
        ready, done, refused, bad_tag, bus_error, stale, media_bad = (
            Signal(name=name)
            for name in ("ready", "done", "refused", "bad_tag", "bus_error_seen", "stale", "media_bad")
        )
        remaining = Signal(COUNT_BITS)
        completed = Signal(COUNT_BITS)
        legal = Signal()
        m.d.comb += [
            self.count.eq(bank.data),
            legal.eq(
                bank.data[:COUNT_BITS].any() & ~bank.data[COUNT_BITS:].any() & ready & ~self.busy
            ),
        ]
        # The start reaches every counter, so it comes out of a register; the bank holds the data
        # for that cycle too, and cannot act on another doorbell in it.
        m.d.sync += [
            self.batch_start.eq(bank.write.doorbell & legal),
            ready.eq(self.lanes_ready & ~self.stop & ~self.reset),
        ]
        with m.If(bank.write.status):
            clear = bank.data
            for state, flag in (
                (done, StatusBit.DONE),
                (refused, StatusBit.DOORBELL_WHILE_BUSY),
                (bad_tag, StatusBit.BAD_TAG),
                (bus_error, StatusBit.BUS_ERROR),
                (stale, StatusBit.STALE_CODEWORD),
                (media_bad, StatusBit.MEDIA_ERROR),
            ):
                with m.If(clear[bit(flag)]):
                    m.d.sync += state.eq(0)
        with m.If(self.completed & self.busy):
            m.d.sync += [remaining.eq(remaining - 1), completed.eq(completed + 1)]
            with m.If(remaining == 1):
                m.d.sync += [self.busy.eq(0), done.eq(1)]
        with m.If(bank.write.doorbell & ~legal):
            m.d.sync += refused.eq(1)
        with m.If(self.batch_start):
            m.d.sync += [self.busy.eq(1), done.eq(0), remaining.eq(self.count), completed.eq(0)]
        with m.If(self.bus_error):
            m.d.sync += bus_error.eq(1)
        with m.If(Cat(self.events[i].stale for i in range(channels)).any()):
            m.d.sync += stale.eq(1)

        # The first bad tag since BAD_TAG was clear; the lowest channel where several come at once.
        tag_error = Signal(32)
        tag_now = Signal(32)
        tag_seen = Signal()
        m.d.sync += tag_seen.eq(0)
        for i in reversed(range(channels)):
            with m.If(self.events[i].bad_tag):
                m.d.sync += [
                    tag_seen.eq(1),
                    tag_now.eq(Cat(self.bad_tags[i], Const(i, 32 - TAG_BITS))),
                ]
        with m.If(tag_seen):
            m.d.sync += bad_tag.eq(1)
            with m.If(~bad_tag):
                m.d.sync += tag_error.eq(tag_now)

        # The same of unreadable codewords.
        media = data.StructLayout({"error": Shapes(self._config).media_error, "channel": 32 - PAGE_BITS})
        media_error, media_now = Signal(media), Signal(media)
        media_seen = Signal()
        m.d.sync += media_seen.eq(0)
        for i in reversed(range(channels)):
            with m.If(self.flash_events[i].unreadable):
                m.d.sync += [media_seen.eq(1), media_now.error.eq(self.media_errors[i]), media_now.channel.eq(i)]
        with m.If(media_seen):
            m.d.sync += media_bad.eq(1)
            with m.If(~media_bad):
                m.d.sync += media_error.eq(media_now)

        m.d.sync += self.irq.eq(bank.value.control[bit(ControlBit.IRQ_ENABLE)] & done)

        # Last, so that it wins.
        with m.If(self.reset):
            m.d.sync += [
                signal.eq(0)
                for signal in (
                    self.busy,
                    self.batch_start,
                    done,
                    refused,
                    bad_tag,
                    bus_error,
                    stale,
                    media_bad,
                    remaining,
                    completed,
                    tag_error,
                    tag_seen,
                    media_error.as_value(),
                    media_seen,
                    self.irq,
                )
            ]

        m.d.comb += [
            counters.events.eq(self.events),
            counters.start.eq(self.batch_start),
            counters.counting.eq(self.busy),
            flash_counters.events.eq(self.flash_events),
            flash_counters.start.eq(self.batch_start),
            flash_counters.counting.eq(self.busy),
        ]
        read = bank.read
        for flag, source in (
            (StatusBit.BUSY, self.busy),
            (StatusBit.READY, ready),
            (StatusBit.DONE, done),
            (StatusBit.DOORBELL_WHILE_BUSY, refused),
            (StatusBit.BAD_TAG, bad_tag),
            (StatusBit.BUS_ERROR, bus_error),
            (StatusBit.STALE_CODEWORD, stale),
            (StatusBit.MEDIA_ERROR, media_bad),
        ):
            m.d.comb += read.status[bit(flag)].eq(source)
        m.d.comb += [
            read.tag_error.eq(tag_error),
            read.media_error.eq(Cat(media_error.error.page, media_error.channel)),
            read.media_cause.eq(media_error.error.codeword | media_error.error.cause << 16),
            read.completed.eq(completed),
            read.cycles.eq(counters.cycle),
            self.snapshot.cycle.eq(counters.cycle),
        ]
        for name in ("beats", "first_beat", "last_beat", "duplicates", "stales", *STALLS):
            m.d.comb += read[name].eq(getattr(counters, name))
        for name in FLASH_COUNTERS:
            m.d.comb += read[name].eq(getattr(flash_counters, name))
        for name in ("beats", *STALLS):
            m.d.comb += self.snapshot[name].eq(getattr(counters, name))
        for name in ("command_base", "completion_base", "buffer_base", "buffer_limit", "timeout"):
            m.d.comb += getattr(self, name).eq(bank.value[name])
        return m
