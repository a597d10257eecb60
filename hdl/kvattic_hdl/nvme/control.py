"""Registers, status and counters: everything the host sees of the engine besides memory."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.commands import COMPLETION
from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS, COUNTERS, MAX_ENTRIES, QUEUES, StatusBit
from kvattic.spec.registers import Control as ControlBit
from kvattic_hdl.lib.axi import LINE_ADDRESS_BITS, axi_lite
from kvattic_hdl.lib.interfaces import PAGE_BITS, Shapes
from kvattic_hdl.nvme.queues import DOORBELL
from kvattic_hdl.nvme.registers import RegisterBank

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
TAG_BITS = 24
ENTRIES_BITS = MAX_ENTRIES.bit_length() - 1


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
        sum_bits = CYCLE_BITS + config.channels.bit_length()
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.events, config.channels)),
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
        now = Signal(3)  # `counting` beside the two registers before the counters, and a cycle later
        m.d.sync += now.eq(Cat(self.counting, now[:2]))
        counters = {
            "beat": (self.beats, True),
            "duplicate": (self.duplicates, False),
            "stale": (self.stales, False),
        }
        counters |= {name: (getattr(self, name), True) for name in STALLS}
        for name, (counter, gated) in counters.items():
            seen = Signal(channels, name=f"{name}_seen")
            total = Signal(range(channels + 1), name=f"{name}_total")
            happened = Cat(self.events[i][name] for i in range(channels))
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
    flash_words, flash_commands, die_busy, codewords, corrected, bit_errors, retries, unreadable : Out(48)
        The registers of that name.
    page_reads, page_programs, block_erases : Out(48)
        The registers of that name.
    """

    events: data.View
    counting: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = Shapes(config)
        super().__init__(
            {
                "events": In(data.ArrayLayout(self._shapes.flash_events, config.channels)),
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
        return m


class Control(wiring.Component):
    """The register bank, status, the counters, the interrupt line and the soft reset.

    Latency: a doorbell or ADMIN_ENTRIES acts one cycle after the bank takes the write.
    Throughput: a write each few cycles.
    Ordering: none.
    Reset: nothing runs.  A soft reset (CONTROL.RESET) raises `stop`, waits for `quiet`, gives one
    pulse of `reset`, and in that cycle clears registers, counters and state here too, CONTROL.RESET
    included.  This block must not be under the reset that `reset` drives: its bus would lose a
    handshake.

    The counters count while `busy` is high, and are cleared by a reset only.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : In(axi_lite(16))
        The host's access.
    irq : Out(1)
        A queue of INTERRUPT_MASK wants an interrupt.
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
    busy : In(1)
        A command is there that has no completion yet.
    fetched, completed : In(1)
        Strobe: a command is fetched; a completion is in host memory.
    interrupts : In(QUEUES)
        Queues that want an interrupt.
    refused, refused_doorbell : In(1), In(32)
        Strobe: a doorbell was refused; which (DOORBELL_ERROR).
    quiet : In(1)
        No AXI4 transfer is under way.
    stop : Out(1)
        Start no AXI4 transfer, drop what comes: a reset will follow when all is quiet.
    reset : Out(1)
        Pulse: reset everything but this block.
    ready : Out(1)
        Commands may be fetched.
    doorbell : Out(DOORBELL)
        A doorbell is rung.
    admin_create, admin_remove : Out(1)
        Strobe: create queue 0, with 2**`admin_bits` entries; remove it.
    admin_bits : Out(4)
        See above.
    admin_submission, admin_completion : Out(58)
        Lines of its rings.
    admin_base, admin_limit : Out(64)
        The registers.
    interrupt_after : Out(16)
        The register.
    region_bits : Out(4)
        The register.
    timeout : Out(32)
        The register.
    counters : Out(ArrayLayout(64, len(COUNTERS)))
        `registers.COUNTERS`.
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
    busy: Signal
    fetched: Signal
    completed: Signal
    interrupts: Signal
    refused: Signal
    refused_doorbell: Signal
    quiet: Signal
    stop: Signal
    reset: Signal
    ready: Signal
    doorbell: data.View
    admin_create: Signal
    admin_remove: Signal
    admin_bits: Signal
    admin_submission: Signal
    admin_completion: Signal
    admin_base: Signal
    admin_limit: Signal
    interrupt_after: Signal
    region_bits: Signal
    timeout: Signal
    counters: data.View
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
                "busy": In(1),
                "fetched": In(1),
                "completed": In(1),
                "interrupts": In(QUEUES),
                "refused": In(1),
                "refused_doorbell": In(32),
                "quiet": In(1),
                "stop": Out(1),
                "reset": Out(1),
                "ready": Out(1),
                "doorbell": Out(DOORBELL),
                "admin_create": Out(1),
                "admin_remove": Out(1),
                "admin_bits": Out(4),
                "admin_submission": Out(LINE_ADDRESS_BITS),
                "admin_completion": Out(LINE_ADDRESS_BITS),
                "admin_base": Out(64),
                "admin_limit": Out(64),
                "interrupt_after": Out(16),
                "region_bits": Out(4),
                "timeout": Out(32),
                "counters": Out(data.ArrayLayout(64, len(COUNTERS))),
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
        m.d.sync += [
            self.reset.eq(self.stop & self.quiet & ~self.reset),
            self.ready.eq(self.lanes_ready & ~self.stop & ~self.reset),
        ]

        # Queues.
        m.d.sync += self.doorbell.eq(bank.doorbell)
        sizes = [bank.data == 1 << bits for bits in range(1, ENTRIES_BITS + 1)]
        m.d.sync += [
            self.admin_create.eq(bank.write.admin_entries & Cat(sizes).any()),
            self.admin_remove.eq(bank.write.admin_entries & ~Cat(sizes).any()),
        ]
        for bits, this in enumerate(sizes, 1):
            with m.If(this):
                m.d.sync += self.admin_bits.eq(bits)
        m.d.comb += [
            self.admin_submission.eq(bank.value.admin_submission[-LINE_ADDRESS_BITS:]),
            self.admin_completion.eq(bank.value.admin_completion[-LINE_ADDRESS_BITS:]),
            self.interrupt_after.eq(bank.value.interrupt_after),
            self.region_bits.eq(bank.value.region_bits),
        ]
        fetched, completed = Signal(32), Signal(32)
        m.d.sync += [fetched.eq(fetched + self.fetched), completed.eq(completed + self.completed)]
        m.d.sync += self.irq.eq((self.interrupts & bank.value.interrupt_mask).any())

        # Status.
        refused, bad_tag, bus_error, stale, media_bad = (
            Signal(name=name)
            for name in ("refused_seen", "bad_tag", "bus_error_seen", "stale", "media_bad")
        )
        doorbell_error = Signal(32)
        with m.If(bank.write.status):
            clear = bank.data
            for state, flag in (
                (refused, StatusBit.INVALID_DOORBELL),
                (bad_tag, StatusBit.BAD_TAG),
                (bus_error, StatusBit.BUS_ERROR),
                (stale, StatusBit.STALE_CODEWORD),
                (media_bad, StatusBit.MEDIA_ERROR),
            ):
                with m.If(clear[bit(flag)]):
                    m.d.sync += state.eq(0)
        with m.If(self.refused):
            m.d.sync += refused.eq(1)
            with m.If(~refused):
                m.d.sync += doorbell_error.eq(self.refused_doorbell)
        with m.If(self.bus_error):
            m.d.sync += bus_error.eq(1)
        with m.If(Cat(self.events[i].stale for i in range(channels)).any()):
            m.d.sync += stale.eq(1)

        counting = Signal()
        m.d.sync += counting.eq(self.busy)

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

        # Last, so that it wins.
        with m.If(self.reset):
            m.d.sync += [
                signal.eq(0)
                for signal in (
                    refused,
                    doorbell_error,
                    bad_tag,
                    bus_error,
                    stale,
                    media_bad,
                    fetched,
                    completed,
                    counting,
                    tag_error,
                    tag_seen,
                    media_error.as_value(),
                    media_seen,
                    self.irq,
                    self.admin_create,
                    self.doorbell.as_value(),
                )
            ]

        m.d.comb += [
            counters.events.eq(self.events),
            counters.counting.eq(counting),
            flash_counters.events.eq(self.flash_events),
            flash_counters.counting.eq(counting),
        ]
        read = bank.read
        for flag, source in (
            (StatusBit.BUSY, self.busy),
            (StatusBit.READY, self.ready),
            (StatusBit.INVALID_DOORBELL, refused),
            (StatusBit.BAD_TAG, bad_tag),
            (StatusBit.BUS_ERROR, bus_error),
            (StatusBit.STALE_CODEWORD, stale),
            (StatusBit.MEDIA_ERROR, media_bad),
        ):
            m.d.comb += read.status[bit(flag)].eq(source)
        m.d.comb += [
            read.tag_error.eq(tag_error),
            read.doorbell_error.eq(doorbell_error),
            read.media_error.eq(Cat(media_error.error.page, media_error.channel)),
            read.media_cause.eq(media_error.error.codeword | media_error.error.cause << 16),
            read.interrupts.eq(self.interrupts),
            read.fetched.eq(fetched),
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
        for number, register in enumerate(COUNTERS):
            m.d.comb += self.counters[number].eq(read[register.name.lower()])
        for name in ("admin_base", "admin_limit", "timeout"):
            m.d.comb += getattr(self, name).eq(bank.value[name])
        return m
