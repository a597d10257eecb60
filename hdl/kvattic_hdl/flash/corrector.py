"""Finds the wrong bits of codewords, for one channel or several: syndromes, locator polynomial, search.

The parts stand in syndromes.py (which codeword is next, its syndromes), single.py (a single wrong bit) and search.py;
here is Berlekamp and Massey's algorithm, and the order of it all.
"""

from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Array, Module, Mux, Signal, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In

from kvattic.spec.config import Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.corrections import corrections_signature
from kvattic_hdl.flash.division import squared, times
from kvattic_hdl.flash.search import Search
from kvattic_hdl.flash.single import SingleError
from kvattic_hdl.flash.syndromes import Reception

POSITIONS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class _Memories:
    """Read and write ports of a corrector's memories: syndromes (from 1 on), locator, and the locator before."""

    syndrome: Any
    syndrome_write: Any
    locator: Any
    locator_write: Any
    before: Any
    before_write: Any


class Corrector(wiring.Component):
    """Finds the wrong bits of one codeword at a time, for several channels in turn.

    Three steps: the odd syndromes from the remainder, 8 bits of it a cycle; the locator polynomial with one
    multiplier, one product a cycle, only as far as the number of errors needs; a search through the bits in their
    order, `positions` a cycle, which ends with the last wrong one.  The check value is mended along with the search,
    so the data need not be read again.  Where the syndromes are powers of the first one, a single bit is wrong, and a
    table says which: the search begins at its word, without a locator.

    The next codeword is taken in, and its syndromes are made, while one is worked on.  Each channel that wants a
    correction waits for at most one codeword of each other one; no channel can hold up the others, as it takes patches
    and results whatever stands still behind it.  docs/ecc.md has the cycles of `paper`.  A codeword whose locator
    cannot be is given up without a search.  Reset forgets all codewords.

    Parameters
    ----------
    config : Config
        The configuration.
    channels : int
        How many share it.
    positions : int
        Bits that are searched in one cycle: 1, 2, 4, 8 or 16.

    Members
    -------
    channels : Array of In(corrections_signature)
        One for each channel.

    Raises
    ------
    ValueError
        `positions` is another number, or `channels` below 1.
    """

    def __init__(self, config: Config, channels: int = 1, positions: int = 8) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, not {channels!r}")
        self.config = config
        self.positions = positions
        self.reception = Reception(config, channels)
        self.single = SingleError(config)
        self.search = Search(config, positions)
        element, t = unsigned(code(config).field.m), config.ecc_t
        self.element = element
        self.owner = Signal.like(self.reception.owner)   # whose codeword is worked on
        self.length = Signal(range(t + 1))            # of the locator: the number of errors
        self.filled = Signal(range(2 * t))
        self.step = Signal(range(t))                  # syndromes 2 * step + 1 and + 2 are taken
        self.shift = Signal(range(2 * t + 2), init=1)
        self.scale = Signal(element, reset_less=True)
        self.discrepancy = Signal(element, reset_less=True)
        self.longer, self.second = Signal(), Signal()
        self.index = Signal(range(t + 1))             # of a coefficient
        self.a, self.b = Signal(element, reset_less=True), Signal(element, reset_less=True)
        self.sum = Signal(element, reset_less=True)
        self.known = Signal()                         # a single bit is wrong, whose place is known
        self.several = Signal()                       # the syndromes are not those of a single wrong bit
        # In state IDLE, FILL, DISCREPANCY, SEARCH.
        self.idle, self.filling = Signal(init=1), Signal()
        self.finding, self.searching = Signal(), Signal()
        self.multiply = Signal()                      # a and b are operands
        self.write = Signal()                         # their product completes a coefficient
        self.write_index = Signal(range(t + 1), reset_less=True)
        self.product = Signal(element)
        self.good, self.ended = Signal(), Signal()    # the codeword's end
        super().__init__({"channels": In(corrections_signature(config)).array(channels)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name in ("reception", "single", "search"):
            m.submodules[name] = getattr(self, name)
        self._connect(m)
        memories = self._remember(m)
        with m.FSM():
            self._take_syndromes(m, memories)
            self._find_discrepancy(m, memories)
            self._update_locator(m, memories)
            self._search_bits(m, memories)
        return m

    def _connect(self, m: Module) -> None:
        """Connect the parts with each other and with the channels."""
        reception, single, search = self.reception, self.single, self.search
        for number, channel in enumerate(self.channels):
            mine = self.owner == number
            m.d.comb += [
                reception.wanted[number].eq(channel.wanted),
                reception.chunks[number].eq(channel.chunk),
                reception.chunks_valid[number].eq(channel.chunk_valid),
                channel.taken.eq(reception.taken[number]),
                channel.patches.payload.eq(search.patches.payload),
                channel.patches.valid.eq(search.patches.valid & mine),
                channel.result.good.eq(self.good),
                channel.result.errors.eq(search.errors),
                channel.ended.eq(self.ended & mine),
            ]
        m.d.comb += [
            search.patches.ready.eq(Array(channel.patches.ready for channel in self.channels)[self.owner]),
            search.load.eq(self.idle),
            search.check.eq(reception.check),
            search.length.eq(self.length),
            search.searching.eq(self.searching),
            search.place.eq(single.place),
            single.syndrome.eq(reception.odd),
            single.check.eq(search.loaded),
            reception.shift.eq(self.filling & ~self.filled[0]),
        ]

    def _remember(self, m: Module) -> _Memories:
        """Keep what is found, and sum products of its elements."""
        t, index = self.config.ecc_t, self.index

        def memory(name: str, depth: int) -> tuple[Any, Any]:
            m.submodules[name] = words = Memory(shape=self.element, depth=depth, init=[])
            return words.read_port(domain="comb"), words.write_port()

        syndrome, syndrome_write = memory("syndrome_memory", 2 * t)
        locator, locator_write = memory("locator", t + 1)
        before, before_write = memory("before", t + 1)
        m.d.comb += [
            self.product.eq(times(m, "multiplier", code(self.config).field, self.a, self.b)),
            syndrome.addr.eq(Mux(self.finding, 2 * self.step - index, self.filled >> 1)),
            locator.addr.eq(index),
            before.addr.eq(index - self.shift),
            syndrome_write.addr.eq(self.filled),
            locator_write.addr.eq(self.write_index),
            locator_write.data.eq(self.sum ^ self.product),
            locator_write.en.eq(self.write),
            before_write.addr.eq(index),
            before_write.data.eq(Mux(index > self.length, 0, locator.data)),
        ]
        m.d.sync += [self.multiply.eq(0), self.write.eq(0)]
        with m.If(self.multiply):
            m.d.sync += self.sum.eq(self.sum ^ self.product)
        return _Memories(syndrome, syndrome_write, locator, locator_write, before, before_write)

    def _take_syndromes(self, m: Module, memories: _Memories) -> None:
        """Take the syndromes, and see whether a single bit is wrong: then each odd one is the first one's power."""
        field, t, filled = code(self.config).field, self.config.ecc_t, self.filled
        reception, single = self.reception, self.single
        square = squared(m, "square", field, memories.syndrome.data)
        with m.State("IDLE"):
            m.d.sync += [filled.eq(0), self.owner.eq(reception.owner), self.several.eq(0), self.sum.eq(0)]
            with m.If(reception.there):
                m.d.sync += [self.idle.eq(0), self.filling.eq(1)]
                m.next = "FILL"
        with m.State("FILL"):
            # Syndrome filled + 1: an odd one, or the square of the one of half its number.
            m.d.comb += [
                memories.syndrome_write.en.eq(1),
                memories.syndrome_write.data.eq(Mux(filled[0], square, reception.odd)),
                memories.locator_write.addr.eq(0),
                memories.locator_write.data.eq(1),
                memories.locator_write.en.eq(1),
                memories.before_write.addr.eq(0),
                memories.before_write.data.eq(1),
                memories.before_write.en.eq(1),
                single.begin.eq(filled == 0),
            ]
            m.d.sync += [
                filled.eq(filled + 1), self.step.eq(0), self.shift.eq(1), self.scale.eq(1), self.index.eq(0),
                self.several.eq(self.several | self.sum.any())]
            with m.If(filled == 0):
                m.d.sync += self.a.eq(reception.odd)
            with m.Elif(filled == 1):
                m.d.sync += self.b.eq(square)
            with m.Elif(~filled[0]):
                # a: what was expected of the last odd syndrome; b: the first one's square.
                m.d.sync += [self.a.eq(self.product), self.sum.eq(self.product ^ reception.odd)]
            with m.If(filled == 2 * t - 1):
                m.d.sync += self.filling.eq(0)
                m.d.comb += reception.done.eq(1)
                m.next = "JUDGE"
        with m.State("JUDGE"):
            m.d.sync += [self.length.eq(0), self.sum.eq(0), self.known.eq(0)]
            m.d.comb += [self.search.begin.eq(1), self.search.known.eq(1)]
            with m.If(single.ready & single.possible & ~self.several):
                m.d.sync += [self.length.eq(1), self.searching.eq(1), self.known.eq(1)]
                m.next = "SEARCH"
            with m.Elif(single.ready):
                m.d.sync += self.finding.eq(1)
                m.next = "DISCREPANCY"

    def _find_discrepancy(self, m: Module, memories: _Memories) -> None:
        """Add locator[i] * syndromes[2 * step - i], and see what the locator lacks."""
        t, index, step, length = self.config.ecc_t, self.index, self.step, self.length
        new_length = self._new_length()
        with m.State("DISCREPANCY"):
            m.d.sync += [
                self.a.eq(memories.locator.data), self.b.eq(memories.syndrome.data), self.multiply.eq(1),
                index.eq(index + 1)]
            with m.If(index == length):
                m.d.sync += self.finding.eq(0)
                m.next = "ADD"
        with m.State("ADD"):
            m.next = "DECIDE"
        with m.State("DECIDE"):
            m.d.sync += [
                self.discrepancy.eq(self.sum), self.sum.eq(0), self.longer.eq(0), index.eq(0), self.second.eq(0)]
            with m.If(self.sum == 0):
                m.next = "STEP"
            with m.Elif(length <= step):
                m.d.sync += [self.longer.eq(1), index.eq(new_length)]
                m.next = "UPDATE"
                with m.If(new_length > t):
                    m.next = "GIVE_UP"
            with m.Else():
                m.d.sync += index.eq(length)
                m.next = "UPDATE"

    def _new_length(self) -> Value:
        """Of the locator, where it must grow."""
        return (2 * self.step + 1 - self.length)[: len(self.filled)]

    def _update_locator(self, m: Module, memories: _Memories) -> None:
        """From the highest coefficient down: scale * locator[i] + discrepancy * before[i - shift]."""
        t, index, step = self.config.ecc_t, self.index, self.step
        with m.State("UPDATE"):
            m.d.sync += [self.multiply.eq(1), self.second.eq(~self.second)]
            with m.If(~self.second):
                m.d.sync += [
                    self.a.eq(Mux(index > self.length, 0, memories.locator.data)), self.b.eq(self.scale),
                    self.sum.eq(0)]
            with m.Else():
                m.d.comb += memories.before_write.en.eq(self.longer)
                m.d.sync += [
                    self.a.eq(Mux(index < self.shift, 0, memories.before.data)), self.b.eq(self.discrepancy),
                    self.write.eq(1), self.write_index.eq(index), index.eq(index - 1)]
                with m.If(index == 0):
                    m.next = "STEP"
        with m.State("STEP"):
            m.d.sync += [step.eq(step + 1), self.shift.eq(self.shift + 2), index.eq(0), self.sum.eq(0)]
            with m.If(self.longer):
                m.d.sync += [
                    self.length.eq(self._new_length()), self.scale.eq(self.discrepancy), self.shift.eq(2)]
            m.d.sync += self.finding.eq(step != t - 1)
            m.next = "DISCREPANCY"
            with m.If(step == t - 1):
                m.d.sync += index.eq(t)
                m.next = "LOAD"

    def _search_bits(self, m: Module, memories: _Memories) -> None:
        index, search = self.index, self.search
        m.d.comb += search.coefficient.eq(Mux(index > self.length, 0, memories.locator.data))
        with m.State("LOAD"):
            # The last coefficient goes in first.
            m.d.comb += [search.begin.eq(1), search.shift.eq(1)]
            m.d.sync += index.eq(index - 1)
            with m.If(index == 0):
                m.d.sync += self.searching.eq(1)
                m.next = "SEARCH"
        with m.State("SEARCH"):
            with m.If(search.found_all):
                m.d.sync += [
                    self.good.eq(Mux(self.known, self.single.right, search.right)), self.searching.eq(0)]
                m.next = "DONE"
            with m.Elif(search.given_up):
                m.d.sync += self.searching.eq(0)
                m.next = "GIVE_UP"
        with m.State("GIVE_UP"):
            m.d.sync += self.good.eq(0)
            m.next = "DONE"
        with m.State("DONE"):
            m.d.comb += self.ended.eq(1)
            m.d.sync += self.idle.eq(1)
            m.next = "IDLE"
