"""The locator polynomial of a codeword's wrong bits: Berlekamp and Massey's algorithm."""

from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Module, Mux, Signal, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.corrections import owner_shape
from kvattic_hdl.flash.division import product, squared, times
from kvattic_hdl.flash.single import SingleError


@dataclass(frozen=True)
class _Memories:
    """Read and write ports of a corrector's memories: syndromes (from 1 on), locator, and the locator before."""

    syndrome: Any
    syndrome_write: Any
    locator: Any
    locator_write: Any
    before: Any
    before_write: Any


class Locator(wiring.Component):
    """Finds the locator polynomial of one codeword at a time, and hands it to the search.

    Binary (every second step), without division, with one multiplier, one product a cycle, only as far as the number of
    errors needs.  Where the syndromes are powers of the first one, a single bit is wrong, and a table says which.  A
    codeword whose locator cannot be is hopeless: it is not searched.

    Parameters
    ----------
    config : Config
    channels : int
        As of `Corrector`.

    Members
    -------
    there : In(1), owner : In, odd : In, shift : Out(1), check : In(CRC_BITS), done : Out(1)
        The codeword, as of `Reception`.
    free : In(1)
        The search can take another one.
    load : Out(1), coefficient : Out
        Strobe: the locator's next coefficient, the highest one first, while the search is free.
    begin : Out(1)
        Strobe: the search may begin; the following is about it.
    new_owner : Out, length : Out
        Whose codeword it is; how many bits are wrong.
    unread : Out(CRC_BITS)
        Its check value, taken back over the whole data.
    known : Out(1), place : Out, right : Out(1)
        No coefficients were loaded, as a single bit is wrong: which one, and whether the check value agrees.
    hopeless : Out(1)
        No coefficients were loaded, as there are too many wrong bits.
    """

    def __init__(self, config: Config, channels: int) -> None:
        self.config = config
        self.single = SingleError(config)
        element, t = unsigned(code(config).field.m), config.ecc_t
        self.element = element
        self.filled = Signal(range(2 * t))
        self.step = Signal(range(t))                  # syndromes 2 * step + 1 and + 2 are taken
        self.exponent = Signal(range(2 * t + 2), init=1)    # by which the locator before is to be shifted
        self.scale = Signal(element, reset_less=True)
        self.discrepancy = Signal(element, reset_less=True)
        self.longer, self.second = Signal(), Signal()
        self.index = Signal(range(t + 1))             # of a coefficient
        self.a, self.b = Signal(element, reset_less=True), Signal(element, reset_less=True)
        self.sum = Signal(element, reset_less=True)
        self.several = Signal()                       # the syndromes are not those of a single wrong bit
        self.filling, self.finding = Signal(), Signal()   # in state FILL, DISCREPANCY
        self.multiply = Signal()                      # a and b are operands
        self.write = Signal()                         # their product completes a coefficient
        self.write_index = Signal(range(t + 1), reset_less=True)
        self.product = Signal(element)
        super().__init__({
            "there": In(1),
            "owner": In(owner_shape(channels)),
            "odd": In(element),
            "shift": Out(1),
            "check": In(CRC_BITS),
            "done": Out(1),
            "free": In(1),
            "load": Out(1),
            "coefficient": Out(element),
            "begin": Out(1),
            "new_owner": Out(owner_shape(channels)),
            "length": Out(range(t + 1)),
            "unread": Out(CRC_BITS),
            "known": Out(1),
            "place": Out(element),
            "right": Out(1),
            "hopeless": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.single = single = self.single
        m.d.comb += [
            single.syndrome.eq(self.odd),
            single.check.eq(self.unread),
            self.place.eq(single.place),
            self.right.eq(single.right),
            self.shift.eq(self.filling & ~self.filled[0]),
        ]
        memories = self._remember(m)
        with m.FSM():
            self._take_syndromes(m, memories)
            self._find_discrepancy(m, memories)
            self._update_locator(m, memories)
            self._hand_over(m, memories)
        return m

    def _remember(self, m: Module) -> _Memories:
        """Keep what is found, and sum products of its elements."""
        t, index = self.config.ecc_t, self.index

        def memory(name: str, depth: int) -> tuple[Any, Any]:
            m.submodules[name] = words = Memory(shape=self.element, depth=depth, init=[])
            return words.read_port(domain="comb"), words.write_port()

        syndrome, syndrome_write = memory("syndrome_memory", 2 * t)
        locator, locator_write = memory("coefficients", t + 1)
        before, before_write = memory("before", t + 1)
        m.d.comb += [
            self.product.eq(times(m, "multiplier", code(self.config).field, self.a, self.b)),
            syndrome.addr.eq(Mux(self.finding, 2 * self.step - index, self.filled >> 1)),
            locator.addr.eq(index),
            before.addr.eq(index - self.exponent),
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
        single, crc = self.single, code(self.config).crc
        # What the CRC would have to begin with, so that reading the wrong bits of the data makes `check` of it.
        unread = [crc.unshift(1 << bit, self.config.codeword_bytes * 8) for bit in range(CRC_BITS)]
        unread_check = product(m, "unread", self.check, unread, CRC_BITS)
        square = squared(m, "square", field, memories.syndrome.data)
        with m.State("IDLE"):
            m.d.sync += [
                filled.eq(0), self.new_owner.eq(self.owner), self.several.eq(0), self.sum.eq(0),
                self.unread.eq(unread_check)]
            with m.If(self.there):
                m.d.sync += self.filling.eq(1)
                m.next = "FILL"
        with m.State("FILL"):
            # Syndrome filled + 1: an odd one, or the square of the one of half its number.
            m.d.comb += [
                memories.syndrome_write.en.eq(1),
                memories.syndrome_write.data.eq(Mux(filled[0], square, self.odd)),
                memories.locator_write.addr.eq(0),
                memories.locator_write.data.eq(1),
                memories.locator_write.en.eq(1),
                memories.before_write.addr.eq(0),
                memories.before_write.data.eq(1),
                memories.before_write.en.eq(1),
                single.begin.eq(filled == 0),
            ]
            m.d.sync += [
                filled.eq(filled + 1), self.step.eq(0), self.exponent.eq(1), self.scale.eq(1), self.index.eq(0),
                self.several.eq(self.several | self.sum.any())]
            with m.If(filled == 0):
                m.d.sync += self.a.eq(self.odd)
            with m.Elif(filled == 1):
                m.d.sync += self.b.eq(square)
            with m.Elif(~filled[0]):
                # a: what was expected of the last odd syndrome; b: the first one's square.
                m.d.sync += [self.a.eq(self.product), self.sum.eq(self.product ^ self.odd)]
            with m.If(filled == 2 * t - 1):
                m.d.sync += self.filling.eq(0)
                m.d.comb += self.done.eq(1)
                m.next = "JUDGE"
        with m.State("JUDGE"):
            m.d.sync += [self.length.eq(0), self.sum.eq(0)]
            with m.If(single.ready):
                m.d.sync += self.finding.eq(1)
                m.next = "DISCREPANCY"
                with m.If(single.possible & ~self.several):
                    m.d.sync += self.finding.eq(0)
                    m.next = "HAND_OVER"
        with m.State("HAND_OVER"):
            m.d.comb += [self.begin.eq(1), self.known.eq(1)]
            with m.If(self.free):
                m.next = "IDLE"

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
                    self.a.eq(Mux(index < self.exponent, 0, memories.before.data)), self.b.eq(self.discrepancy),
                    self.write.eq(1), self.write_index.eq(index), index.eq(index - 1)]
                with m.If(index == 0):
                    m.next = "STEP"
        with m.State("STEP"):
            m.d.sync += [step.eq(step + 1), self.exponent.eq(self.exponent + 2), index.eq(0), self.sum.eq(0)]
            with m.If(self.longer):
                m.d.sync += [
                    self.length.eq(self._new_length()), self.scale.eq(self.discrepancy), self.exponent.eq(2)]
            m.d.sync += self.finding.eq(step != t - 1)
            m.next = "DISCREPANCY"
            with m.If(step == t - 1):
                m.d.sync += index.eq(t)
                m.next = "LOAD"

    def _hand_over(self, m: Module, memories: _Memories) -> None:
        index = self.index
        m.d.comb += self.coefficient.eq(Mux(index > self.length, 0, memories.locator.data))
        with m.State("LOAD"):
            # The last coefficient goes in first.
            with m.If(self.free):
                m.d.comb += self.load.eq(1)
                m.d.sync += index.eq(index - 1)
                with m.If(index == 0):
                    m.d.comb += self.begin.eq(1)
                    m.next = "IDLE"
        with m.State("GIVE_UP"):
            m.d.comb += [self.begin.eq(1), self.hopeless.eq(1)]
            with m.If(self.free):
                m.next = "IDLE"
