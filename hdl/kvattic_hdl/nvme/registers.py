"""The registers behind AXI4-Lite, built from the table in `kvattic.spec.registers`."""

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic.spec.registers import (
    ADDRESS_BITS,
    DOORBELL_PAGE,
    DOORBELLS,
    QUEUES,
    REGISTER_MAP,
    REGISTERS,
    Access,
    Register,
)
from kvattic_hdl.lib.arithmetic import pick
from kvattic_hdl.lib.axi import OKAY, SLVERR, axi_lite
from kvattic_hdl.nvme.queues import DOORBELL, QUEUE_BITS

WORD_BITS = 32
PAGE_WORDS = DOORBELL_PAGE * 8 // WORD_BITS
"""Words from one queue's doorbells to the next one's; the registers have the page before them."""
assert DOORBELLS == DOORBELL_PAGE
PAGE_REGISTERS = tuple(r for r in REGISTERS if r.address < DOORBELLS)
"""All but the doorbells."""
INDEX_BITS = max(r.address // 4 + r.width // WORD_BITS - 1 for r in PAGE_REGISTERS).bit_length()
"""Bits of the number of a word of `PAGE_REGISTERS`."""
FLASH_WORDS = REGISTER_MAP["FLASH_WORDS"].address
"""The first counter of the flash channels; behind it stand the others, of 64 bits each."""
GROUP_WORDS = 8
"""Words of which one is chosen in the first step of a read."""
CONSTANTS = ("ID", "VERSION", "CONFIG_HASH")
"""Registers whose value never changes: the bank knows them itself."""
FLASH_REGISTERS = tuple(r.name for r in PAGE_REGISTERS if r.address >= FLASH_WORDS)
"""Registers that are not here but are asked for by their number."""

READ_LAYOUT = data.StructLayout(
    {
        r.name.lower(): r.width
        for r in REGISTERS
        if r.access in (Access.RO, Access.W1C) and r.name not in CONSTANTS and r.name not in FLASH_REGISTERS
    }
)
"""Values that come from outside."""
VALUE_LAYOUT = data.StructLayout(
    {r.name.lower(): r.width for r in REGISTERS if r.access is Access.RW}
)
"""Registers that the bank stores."""
WRITE_LAYOUT = data.StructLayout(
    {r.name.lower(): 1 for r in PAGE_REGISTERS if r.access in (Access.WO, Access.W1C)}
)
"""Registers whose writing is an event; the doorbells are another."""


class _Place:
    """The word that an address names: `register` if `index` is one of `PAGE_REGISTERS`, or a doorbell, or nothing."""

    def __init__(self, word: Value) -> None:
        page, in_page = word[PAGE_WORDS.bit_length() - 1 :], word[: PAGE_WORDS.bit_length() - 1]
        self.index = in_page[:INDEX_BITS]
        self.register = ~page.any() & ~in_page[INDEX_BITS:].any()
        self.doorbell = page.any() & (page <= QUEUES) & ~in_page[:-1].any()   # the page's halves begin with them
        self.completion = in_page[-1]
        self.queue = (page - 1)[:QUEUE_BITS]


def at(register: Register) -> int:
    """Its word among those of `PAGE_REGISTERS`, below a one: Cat(_Place.index, _Place.register)."""
    return register.address // 4 | 1 << INDEX_BITS


class RegisterBank(wiring.Component):
    """AXI4-Lite subordinate for the table of registers.

    Latency: reads answer three cycles after ARVALID, four where `look_first` comes between; writes one cycle after both
    AW and W were taken.
    Throughput: one read and one write under way at a time, each independent of the other; AW and W
    may come in either order.
    Ordering: as on AXI4-Lite; none between reads and writes.
    Reset: all registers take their reset values.  `clear` does the same to the registers but leaves
    the bus's handshakes alone.

    Unmapped words are answered with SLVERR and change nothing; writes to read-only registers with
    OKAY.  Reading the low half of a 64-bit read-only register keeps its high half for the next read
    of a high half, so low-then-high is one consistent value.

    Parameters
    ----------
    config : Config
        Its hash is CONFIG_HASH.

    Members
    -------
    bus : In(axi_lite(ADDRESS_BITS))
        The bus.
    clear : In(1)
        Gives all stored registers their reset values.
    look, look_first : In, In(1)
        Number of a register's first word (its address divided by four) to be looked at beside the bus; it is another
        than in the cycle before, so that the bus waits.
    looking, looked : Out(1), Out(64)
        `looked` is what the register of `look` in the cycle before read as; else the bus has read in that cycle.
    read : In(READ_LAYOUT)
        What the read-only and write-one-to-clear registers read as.
    flash_number, flash_counter : Out, In(64)
        A number in `FLASH_REGISTERS`, and what that one reads as.
    value : Out(VALUE_LAYOUT)
        The read-write registers.
    write : Out(WRITE_LAYOUT)
        One-cycle strobe for each write-only and write-one-to-clear register but the doorbells.
    data : Out(32)
        What is being written while a bit of `write` is high; bytes without WSTRB are zero.
    doorbell : Out(DOORBELL)
        A doorbell is written, for one cycle and not in the next; its value is `data`.

    Raises
    ------
    TypeError
        `config` is not a Config.
    """

    bus: wiring.PureInterface
    clear: Signal
    look: Signal
    look_first: Signal
    looking: Signal
    looked: Signal
    read: data.View
    flash_number: Signal
    flash_counter: Signal
    value: data.View
    write: data.View
    doorbell: data.View
    data: Signal

    def __init__(self, config: Config) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, not {config!r}")
        self._config = config
        super().__init__(
            {
                "bus": In(axi_lite(ADDRESS_BITS)),
                "clear": In(1),
                "look": In(INDEX_BITS),
                "look_first": In(1),
                "looking": Out(1),
                "looked": Out(2 * WORD_BITS),
                "read": In(READ_LAYOUT),
                "flash_number": Out(range(len(FLASH_REGISTERS))),
                "flash_counter": In(2 * WORD_BITS),
                "value": Out(
                    VALUE_LAYOUT,
                    init={r.name.lower(): r.reset for r in REGISTERS if r.access is Access.RW},
                ),
                "write": Out(WRITE_LAYOUT),
                "data": Out(WORD_BITS),
                "doorbell": Out(DOORBELL),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        self._elaborate_read(m)
        self._elaborate_write(m)
        return m

    def _content(self, name: str) -> Value:
        """What the register reads as."""
        if name == "CONFIG_HASH":
            return Const(self._config.hash, WORD_BITS)
        if name in CONSTANTS:
            return Const(REGISTER_MAP[name].reset, WORD_BITS)
        if name in FLASH_REGISTERS:
            return self.flash_counter
        register = REGISTER_MAP[name]
        match register.access:
            case Access.RW:
                return Value.cast(self.value[name.lower()])
            case Access.WO:
                return Const(0, register.width)
            case _:
                return Value.cast(self.read[name.lower()])

    def _elaborate_read(self, m: Module) -> None:
        bus = self.bus
        word = Signal(ADDRESS_BITS - 2)
        place = _Place(word)
        pending, answering = Signal(), Signal()
        held_high = Signal(WORD_BITS)
        m.d.comb += bus.arready.eq(~pending & ~answering & ~bus.rvalid)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [word.eq(bus.araddr[2:]), pending.eq(1)]
        # One look at a word in each cycle: the bus's, or else that of `look`.
        asking = pending & ~self.look_first
        at_word = Signal(INDEX_BITS + 1)
        m.d.comb += [
            at_word.eq(Mux(asking, Cat(place.index, place.register), self.look | 1 << INDEX_BITS)),
            self.flash_number.eq(at_word[1:]),   # FLASH_WORDS is a multiple of 0x80
        ]
        m.d.sync += answering.eq(asking)
        with m.If(asking):
            m.d.sync += pending.eq(0)
        low, high, there, keeps, held = self._read_word(m, at_word)
        m.d.comb += [self.looking.eq(~answering), self.looked.eq(Cat(low, high))]
        with m.If(answering):
            m.d.sync += [
                bus.rvalid.eq(1),
                bus.rresp.eq(Mux(there | place.doorbell, OKAY, SLVERR)),
                bus.rdata.eq(Mux(held, held_high, Mux(there, low, 0))),
            ]
            with m.If(keeps):
                m.d.sync += held_high.eq(high)
        with m.If(bus.rvalid & bus.rready):
            m.d.sync += bus.rvalid.eq(0)

    def _read_word(self, m: Module, at_word: Signal) -> tuple[Value, ...]:
        """The word that was named in the cycle before, in two steps: one of each group of words, then one of these.

        Returns:
            (the word, the one behind it, there is such a word, its register's upper half is kept with it, it is read
            from what was kept).  Of a word that is not there the first two mean nothing.
        """
        flags = Signal(3)
        lows, highs = [], []
        groups = -(-(FLASH_WORDS // 4) // GROUP_WORDS) + 1    # the last one: what is asked for by its number
        for group in range(groups):
            lows.append(Signal(WORD_BITS, name=f"low_{group}", reset_less=True))
            highs.append(Signal(WORD_BITS, name=f"high_{group}", reset_less=True))
        m.d.sync += [lows[-1].eq(self.flash_counter[:WORD_BITS]), highs[-1].eq(self.flash_counter[WORD_BITS:])]
        m.d.sync += flags.eq(0)
        # Within its group a word is told by the low bits alone.
        inside: list[dict[int, tuple[Value, Value | None]]] = [{} for _ in range(groups - 1)]
        with m.Switch(at_word):
            for register in PAGE_REGISTERS:
                kept = register.width > WORD_BITS and register.access is Access.RO
                number, content = register.address // 4, self._content(register.name)
                if register.name not in FLASH_REGISTERS:
                    inside[number // GROUP_WORDS][number % GROUP_WORDS] = (
                        content[:WORD_BITS], content[WORD_BITS:] if kept else None)
                    if register.width > WORD_BITS and not kept:
                        inside[number // GROUP_WORDS][number % GROUP_WORDS + 1] = content[WORD_BITS:], None
                with m.Case(at(register)):
                    m.d.sync += flags.eq(0b011 if kept else 0b001)
                if register.width > WORD_BITS:
                    with m.Case(at(register) + 1):
                        m.d.sync += flags.eq(0b101 if kept else 0b001)
        for group, words in enumerate(inside):
            with m.Switch(at_word[: GROUP_WORDS.bit_length() - 1]):
                for number, (first, second) in words.items():
                    with m.Case(number):
                        m.d.sync += [lows[group].eq(first), highs[group].eq(0 if second is None else second)]
        of_group = Signal(range(groups))
        number = at_word[GROUP_WORDS.bit_length() - 1 : INDEX_BITS]
        m.d.sync += of_group.eq(Mux(number >= groups - 1, groups - 1, number))
        return pick(lows, of_group), pick(highs, of_group), flags[0], flags[1], flags[2]

    def _elaborate_write(self, m: Module) -> None:
        bus = self.bus
        word = Signal(ADDRESS_BITS - 2)
        place = _Place(word)
        wdata = Signal(WORD_BITS)
        wstrb = Signal(WORD_BITS // 8)
        address_held, data_held, act = Signal(), Signal(), Signal()
        mask = Cat(bit.replicate(8) for bit in wstrb)
        m.d.comb += [
            bus.awready.eq(~address_held),
            bus.wready.eq(~data_held),
            act.eq(address_held & data_held & (~bus.bvalid | bus.bready)),
            self.data.eq(wdata & mask),
            # A write without any byte is no write.
            self.doorbell.valid.eq(act & place.doorbell & wstrb.any()),
            self.doorbell.completion.eq(place.completion),
            self.doorbell.queue.eq(place.queue),
            self.doorbell.value.eq(self.data),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [word.eq(bus.awaddr[2:]), address_held.eq(1)]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [wdata.eq(bus.wdata), wstrb.eq(bus.wstrb), data_held.eq(1)]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(act):
            m.d.sync += [
                address_held.eq(0),
                data_held.eq(0),
                bus.bvalid.eq(1),
                bus.bresp.eq(Mux(place.doorbell, OKAY, SLVERR)),
            ]
            with m.Switch(Cat(place.index, place.register)):
                for register in PAGE_REGISTERS:
                    name = register.name.lower()
                    for half in range(register.width // WORD_BITS):
                        with m.Case(at(register) + half):
                            m.d.sync += bus.bresp.eq(OKAY)
                            match register.access:
                                case Access.RW:
                                    stored = Value.cast(self.value[name])[half * WORD_BITS :][
                                        :WORD_BITS
                                    ]
                                    for byte in range(WORD_BITS // 8):    # each enables its registers
                                        with m.If(wstrb[byte]):
                                            m.d.sync += stored.word_select(byte, 8).eq(wdata.word_select(byte, 8))
                                case Access.WO | Access.W1C:
                                    m.d.comb += self.write[name].eq(wstrb.any())
                                case Access.RO:
                                    pass
        # Last, so that it wins over a write of the same cycle.
        with m.If(self.clear):
            for register in PAGE_REGISTERS:
                if register.access is Access.RW:
                    m.d.sync += self.value[register.name.lower()].eq(register.reset)
