"""Registers, status and counters: everything the host sees of the engine besides memory."""

from amaranth.hdl import Array, Cat, Elaboratable, Module, ResetInserter, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS, COUNTERS, MAX_ENTRIES, QUEUES, StatusBit
from kvattic.spec.registers import Control as ControlBit
from kvattic_hdl.lib.axi import LINE_ADDRESS_BITS, axi_lite
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.nvme.counters import SNAPSHOT, STALLS, Counters, FlashCounters
from kvattic_hdl.nvme.queues import DOORBELL
from kvattic_hdl.nvme.registers import RegisterBank

TAG_BITS = 24
CHANNEL_BITS = 8
"""Of the number of a flash channel, in TAG_ERROR and MEDIA_ERROR."""
ENTRIES_BITS = MAX_ENTRIES.bit_length() - 1


def bit(flag: int) -> int:
    """Number of the one bit that is set."""
    return flag.bit_length() - 1


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
    events : In(ArrayLayout(Shapes.events, lanes))
        What each lane did in this cycle.
    bad_tags : In(ArrayLayout(unsigned(24), lanes))
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
    counter_number, counter_first : In, In(1)
        Number of one of `registers.COUNTERS`; it is another than in the cycle before.
    counter_there, counter : Out(1), Out(64)
        `counter` is the value of that one of the cycle before; else the bus read a register in that cycle.
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
    counter_number: Signal
    counter_first: Signal
    counter_there: Signal
    counter: Signal
    snapshot: data.View

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        super().__init__(
            {
                "bus": In(axi_lite(ADDRESS_BITS)),
                "irq": Out(1),
                "events": In(data.ArrayLayout(shapes.events, config.lanes)),
                "bad_tags": In(data.ArrayLayout(TAG_BITS, config.lanes)),
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
                "counter_number": In(range(len(COUNTERS))),
                "counter_first": In(1),
                "counter_there": Out(1),
                "counter": Out(64),
                "snapshot": Out(SNAPSHOT),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.bank = bank = RegisterBank(self._config)
        counters, flash_counters = Counters(self._config), FlashCounters(self._config)
        m.submodules.counters = ResetInserter(self.reset)(counters)
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
        fetched, completed, counting = Signal(32), Signal(32), Signal()
        now_fetched, now_completed = Signal(), Signal()     # a cycle ago
        m.d.sync += [
            now_fetched.eq(self.fetched),
            now_completed.eq(self.completed),
            fetched.eq(fetched + now_fetched),
            completed.eq(completed + now_completed),
            counting.eq(self.busy),
            self.irq.eq((self.interrupts & bank.value.interrupt_mask).any()),
        ]
        m.d.comb += [
            counters.events.eq(self.events),
            counters.counting.eq(counting),
            flash_counters.events.eq(self.flash_events),
            flash_counters.counting.eq(counting),
            bank.read.interrupts.eq(self.interrupts),
            bank.read.fetched.eq(fetched),
            bank.read.completed.eq(completed),
        ]
        self._admin_queue(m, bank)
        status = self._status(m, bank)
        self._read_counters(m, bank, counters, flash_counters)
        for name in ("admin_base", "admin_limit", "timeout", "interrupt_after", "region_bits"):
            m.d.comb += getattr(self, name).eq(bank.value[name])
        # Last, so that it wins.
        with m.If(self.reset):
            for signal in (*status, fetched, completed, now_fetched, now_completed, counting, self.irq,
                           self.admin_create, self.doorbell):
                m.d.sync += Value.cast(signal).eq(0)
        return m

    def _admin_queue(self, m: Module, bank: RegisterBank) -> None:
        """Doorbells, and queue 0, which is created by a register."""
        sizes = [bank.data == 1 << bits for bits in range(1, ENTRIES_BITS + 1)]
        m.d.sync += [
            self.doorbell.eq(bank.doorbell),
            self.admin_create.eq(bank.write.admin_entries & Cat(sizes).any()),
            self.admin_remove.eq(bank.write.admin_entries & ~Cat(sizes).any()),
        ]
        for bits, this in enumerate(sizes, 1):
            with m.If(this):
                m.d.sync += self.admin_bits.eq(bits)
        m.d.comb += [
            self.admin_submission.eq(bank.value.admin_submission[-LINE_ADDRESS_BITS:]),
            self.admin_completion.eq(bank.value.admin_completion[-LINE_ADDRESS_BITS:]),
        ]

    def _status(self, m: Module, bank: RegisterBank) -> list[Signal]:
        """STATUS, and what its bits are about; the registers that a reset clears."""
        lanes, channels = range(self._config.lanes), range(self._config.channels)
        refused, bad_tag, bus_error, stale, media_bad = flags = [
            Signal(name=name) for name in ("refused_seen", "bad_tag", "bus_error_seen", "stale", "media_bad")]
        bits = (StatusBit.INVALID_DOORBELL, StatusBit.BAD_TAG, StatusBit.BUS_ERROR, StatusBit.STALE_CODEWORD,
                StatusBit.MEDIA_ERROR)
        doorbell_error = Signal(32)
        with m.If(bank.write.status):
            for state, flag in zip(flags, bits, strict=True):
                with m.If(bank.data[bit(flag)]):
                    m.d.sync += state.eq(0)
        with m.If(self.refused):
            m.d.sync += refused.eq(1)
            with m.If(~refused):
                m.d.sync += doorbell_error.eq(self.refused_doorbell)
        with m.If(self.bus_error):
            m.d.sync += bus_error.eq(1)
        with m.If(Cat(self.events[i].stale for i in lanes).any()):
            m.d.sync += stale.eq(1)
        tag_error, tag_seen = self._first_error(
            m, "tag", bad_tag, [(self.events[i].bad_tag, self.bad_tags[i]) for i in lanes], TAG_BITS)
        media = Shapes(self._config).media_error
        media_error, media_seen = self._first_error(
            m, "media", media_bad, [(self.flash_events[i].unreadable, self.media_errors[i]) for i in channels],
            media.size)

        read, codeword = bank.read, data.View(media, media_error[: media.size])
        for flag, source in ((StatusBit.BUSY, self.busy), (StatusBit.READY, self.ready),
                             *zip(bits, flags, strict=True)):
            m.d.comb += read.status[bit(flag)].eq(source)
        m.d.comb += [
            read.tag_error.eq(tag_error),
            read.doorbell_error.eq(doorbell_error),
            read.media_error.eq(Cat(codeword.page, media_error[media.size :])),
            read.media_cause.eq(codeword.codeword | codeword.cause << 16),
        ]
        return [*flags, doorbell_error, tag_error, tag_seen, media_error, media_seen]

    @staticmethod
    def _first_error(m: Module, name: str, flag: Signal, errors: list[tuple[Value, Value]],
                     bits: int) -> tuple[Signal, Signal]:
        """Sets `flag`, and keeps the first error since it was clear; the lowest channel where several come at once.

        Returns:
            (Cat(the error, its channel), a register that a reset clears).
        """
        about = data.StructLayout({"error": bits, "channel": CHANNEL_BITS})
        first, now = Signal(about, name=f"{name}_error"), Signal(about, name=f"{name}_now")
        seen = Signal(name=f"{name}_seen")
        lowest = Signal(range(max(2, len(errors))), name=f"{name}_lowest")
        for channel, (happened, _) in reversed(list(enumerate(errors))):
            with m.If(happened):
                m.d.comb += lowest.eq(channel)
        m.d.sync += [
            seen.eq(Cat(happened for happened, _ in errors).any()),
            now.error.eq(Array(Value.cast(error) for _, error in errors)[lowest]),
            now.channel.eq(lowest),
        ]
        with m.If(seen):
            m.d.sync += flag.eq(1)
            with m.If(~flag):
                m.d.sync += first.eq(now)
        return first.as_value(), seen

    def _read_counters(self, m: Module, bank: RegisterBank, counters: Counters, flash_counters: FlashCounters) -> None:
        """Counters as registers, in completions and for COUNTERS."""
        read = bank.read
        m.d.comb += [read.cycles.eq(counters.cycle), self.snapshot.cycle.eq(counters.cycle)]
        for name in ("beats", "first_beat", "last_beat", "duplicates", "stales", *STALLS):
            m.d.comb += read[name].eq(getattr(counters, name))
        m.d.comb += [flash_counters.number.eq(bank.flash_number), bank.flash_counter.eq(flash_counters.counter)]
        for name in ("beats", *STALLS):
            m.d.comb += self.snapshot[name].eq(getattr(counters, name))
        m.d.comb += [
            bank.look.eq(Array(register.address // 4 for register in COUNTERS)[self.counter_number]),
            bank.look_first.eq(self.counter_first),
            self.counter_there.eq(bank.looking),
            self.counter.eq(bank.looked),
        ]
