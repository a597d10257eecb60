"""Finds the wrong bits of a codeword: syndromes, Berlekamp and Massey's algorithm, Chien's search."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.division import divided, ones, product, squared, times, times_power

SYNDROME_BITS = 8
"""Bits of the remainder that all syndromes take in one cycle."""
POSITIONS = (1, 2, 4, 8)


class CorrectorShapes:
    """Shapes at a corrector.

    Attributes
    ----------
    problem : StructLayout
        remainder: of the raw codeword (padding zero, parity not inverted) after a division by the generator; check: the
        CRC's state after the data, plus the CRC received.
    patch : StructLayout
        index: a word of the codeword's data; mask: bits of it that are wrong.
    result : StructLayout
        good: the codeword is right once its patches are applied; errors: bits that were wrong (if good).
    """

    def __init__(self, config: Config) -> None:
        self.problem = data.StructLayout({"remainder": code(config).parity.degree, "check": CRC_BITS})
        self.patch = data.StructLayout({
            "index": unsigned(bits_for(config.words_per_codeword - 1)), "mask": config.word_bytes * 8})
        self.result = data.StructLayout({"good": 1, "errors": unsigned(bits_for(config.ecc_t))})


class Syndromes(wiring.Component):
    """Makes the syndromes of odd powers of a remainder, 8 bits of it a cycle.

    Bit k of the remainder stands for 2**(-k - bits of the raw codeword), so that the first bit of the codeword has the
    locator 1, and bit i has 2**-i.

    Parameters
    ----------
    config : Config

    Members
    -------
    load : In(1), remainder : In
        Strobe: of a new codeword.
    step : In(1)
        Strobe: take `SYNDROME_BITS` of it.
    last : Out(1)
        They are the last ones.
    shift : In(1)
        Strobe: on to the next syndrome.
    odd : Out
        The first one that was not shifted out yet.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__({
            "load": In(1),
            "remainder": In(code(config).parity.degree),
            "step": In(1),
            "last": Out(1),
            "shift": In(1),
            "odd": Out(code(config).field.m),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_ = self.config, code(self.config)
        field, t = code_.field, config.ecc_t
        raw_bits = config.raw_codeword_bytes * 8
        chunks = -(-code_.parity.degree // SYNDROME_BITS)
        remainder = Signal(chunks * SYNDROME_BITS, reset_less=True)
        chunk = Signal(range(chunks))
        # Of the remainder's first bits, in all odd syndromes.
        columns = [sum(field.power(-(2 * k + 1) * (bit + raw_bits)) << k * field.m for k in range(t))
                   for bit in range(SYNDROME_BITS)]
        weights = product(m, "weight", remainder[-SYNDROME_BITS:], columns, t * field.m)
        odd = [Signal(field.m, name=f"odd_{2 * k + 1}", reset_less=True) for k in range(t)]
        m.d.comb += [self.odd.eq(odd[0]), self.last.eq(chunk == chunks - 1)]
        with m.If(self.load):
            m.d.sync += [remainder.eq(self.remainder), chunk.eq(0), *(s.eq(0) for s in odd)]
        with m.If(self.step):
            m.d.sync += [remainder.eq(remainder << SYNDROME_BITS), chunk.eq(chunk + 1)]
            for k, s in enumerate(odd):
                m.d.sync += s.eq(times_power(m, f"syndrome_{2 * k + 1}", field, s, -(2 * k + 1) * SYNDROME_BITS)
                                 ^ weights.word_select(k, field.m))
        with m.If(self.shift):
            m.d.sync += [low.eq(high) for low, high in pairwise(odd)]
        return m


class Search(wiring.Component):
    """Goes through the bits of a codeword in their order; ends when `length` wrong ones are found, or none is left.

    Chien's search: coefficient k of the locator, times 2**(k * i) at bit i; the bit is wrong where their sum is 0.

    Parameters
    ----------
    config : Config
    positions : int
        As of `Corrector`.

    Members
    -------
    load : In(1), check : In(CRC_BITS)
        Strobe: a codeword's check value, as in its problem.
    shift : In(1), coefficient : In
        Strobe: the locator's next coefficient, the highest one first.
    length : In
        The number of errors.
    begin : In(1)
        Strobe, before the search.
    searching : In(1)
    patches : Out(stream of patch)
    found_all, given_up : Out(1)
        The search is over, and all patches were taken.
    right : Out(1), errors : Out
        Then: the check value is right; bits that were wrong.
    """

    def __init__(self, config: Config, positions: int) -> None:
        self.config = config
        self.positions = positions
        super().__init__({
            "load": In(1),
            "check": In(CRC_BITS),
            "shift": In(1),
            "coefficient": In(code(config).field.m),
            "length": In(range(config.ecc_t + 1)),
            "begin": In(1),
            "searching": In(1),
            "patches": Out(stream.Signature(CorrectorShapes(config).patch)),
            "found_all": Out(1),
            "given_up": Out(1),
            "right": Out(1),
            "errors": Out(range(config.ecc_t + 1)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_, positions = self.config, code(self.config), self.positions
        field = code_.field
        # What the CRC would have to begin with, so that reading the wrong bits of the data makes `check` of it.
        unread = [code_.crc.unshift(1 << bit, config.codeword_bytes * 8) for bit in range(CRC_BITS)]
        bits = config.word_bytes * 8
        groups = bits // positions                           # of a word

        found = Signal(range(config.ecc_t + 1))
        hits = Signal(positions, reset_less=True)
        hits_valid = Signal()
        group = Signal(range(groups))
        index = Signal(range(config.raw_codeword_words))
        mask = Signal(bits, reset_less=True)
        word_hit = Signal()
        exhausted = Signal()
        patch = self.patches
        check = Signal(CRC_BITS, reset_less=True)
        terms = [Signal(field.m, name=f"term_{k}", reset_less=True) for k in range(config.ecc_t + 1)]

        # First stage: is the locator zero at one of the bits?
        stall = Signal()
        columns = [sum(field.power(k * position + bit) << position * field.m for position in range(positions))
                   for k in range(len(terms)) for bit in range(field.m)]
        values = product(m, "value", Cat(terms), columns, positions * field.m)
        with m.If(self.searching & ~stall):
            m.d.sync += [hits.eq(Cat(values.word_select(k, field.m) == 0 for k in range(positions))), hits_valid.eq(1)]
            m.d.sync += [term.eq(times_power(m, f"next_{k}", field, term, k * positions))
                         for k, term in enumerate(terms) if k]

        # Second stage: put the bits of a word together.
        last_group, last_word = Signal(), Signal()
        final, final_bits = divmod(code_.code_bits, positions)
        if final_bits == 0:
            final, final_bits = final - 1, positions
        here = Signal(positions)
        hit = Signal()
        in_message, in_data = Signal(), Signal()
        data_words = config.codeword_bytes // config.word_bytes
        m.d.comb += [
            last_group.eq(group == groups - 1),
            last_word.eq((index == final // groups) & (group == final % groups)),
            here.eq(Mux(last_word, hits[:final_bits], hits)),
            in_data.eq(index < config.words_per_codeword),
            in_message.eq((index < data_words) | (index == data_words) & (group < CRC_BITS // positions)),
            hit.eq(word_hit | here.any()),
            stall.eq(last_group & in_data & hit & patch.valid & ~patch.ready),
            self.found_all.eq((found == self.length) & ~word_hit & ~patch.valid),
            self.given_up.eq(exhausted & (found != self.length) & ~patch.valid),
        ]
        with m.If(patch.ready):
            m.d.sync += patch.valid.eq(0)
        with m.If(self.searching & hits_valid & ~stall & ~exhausted):
            m.d.sync += [
                mask.eq(Cat(mask[positions:], here)),
                group.eq(group + 1),
                found.eq(found + ones(here)),
                word_hit.eq(hit & in_data & ~last_group),
                exhausted.eq(last_word),
            ]
            with m.If(in_message):
                m.d.sync += check.eq(divided(m, "check", code_.crc, check, here))
            with m.If(last_group):
                m.d.sync += index.eq(index + 1)
                with m.If(in_data & hit):
                    m.d.sync += [patch.valid.eq(1), patch.payload.index.eq(index),
                                 patch.payload.mask.eq(Cat(mask[positions:], here))]
        with m.If(self.begin):
            m.d.sync += [found.eq(0), hits_valid.eq(0), group.eq(0), index.eq(0), word_hit.eq(0), exhausted.eq(0)]
        m.d.comb += [self.errors.eq(found), self.right.eq(check == 0)]
        with m.If(self.load):
            m.d.sync += check.eq(product(m, "unread", self.check, unread, CRC_BITS))
        with m.If(self.shift):
            m.d.sync += terms[0].eq(self.coefficient)
            m.d.sync += [high.eq(low) for low, high in pairwise(terms)]
        return m


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
    """Finds the wrong bits of one codeword at a time.

    Three steps: the odd syndromes from the remainder, 8 bits of it a cycle; the locator polynomial with one
    multiplier, one product a cycle, only as far as the number of errors needs; a search through the bits in their
    order, `positions` a cycle, which ends with the last wrong one.  The check value is mended along with the search,
    so the data need not be read again.

    Latency: some ``r / 8 + 6 t + 10.5 e + e**2 / 2`` cycles for e errors and r bits of parity, then ``1 / positions``
    of the last wrong bit's number, and what `patches` is held back (docs/ecc.md has the cycles of `paper`).  A
    codeword whose locator cannot be is given up without a search.  Reset forgets the codeword in work.

    Parameters
    ----------
    config : Config
        The configuration.
    positions : int
        Bits that are searched in one cycle: 1, 2, 4 or 8.

    Members
    -------
    i : In(stream.Signature(shapes.problem))
        A codeword that is not clean; taken while none is in work.
    patches : Out(stream.Signature(shapes.patch))
        Wrong bits of the words that carry tokens.  They come before it is known whether the codeword can be corrected.
    o : Out(stream.Signature(shapes.result))
        The codeword's end, after its last patch was taken.

    Raises
    ------
    ValueError
        `positions` is another number.
    """

    i: stream.Interface
    patches: stream.Interface
    o: stream.Interface

    def __init__(self, config: Config, positions: int = 8) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        self.config = config
        self.positions = positions
        self.syndromes = Syndromes(config)
        self.search = Search(config, positions)
        element, t = unsigned(code(config).field.m), config.ecc_t
        self.element = element
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
        # In state IDLE, SYNDROMES, FILL, DISCREPANCY, SEARCH.
        self.idle, self.taking, self.filling = Signal(init=1), Signal(), Signal()
        self.finding, self.searching = Signal(), Signal()
        self.multiply = Signal()                      # a and b are operands
        self.write = Signal()                         # their product completes a coefficient
        self.write_index = Signal(range(t + 1), reset_less=True)
        shapes = CorrectorShapes(config)
        super().__init__({
            "i": In(stream.Signature(shapes.problem)),
            "patches": Out(stream.Signature(shapes.patch)),
            "o": Out(stream.Signature(shapes.result)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.syndromes = syndromes = self.syndromes
        m.submodules.search = search = self.search
        connect(m, search.patches, flipped(self.patches))
        m.d.comb += [
            syndromes.remainder.eq(self.i.payload.remainder),
            search.check.eq(self.i.payload.check),
            search.length.eq(self.length),
            self.o.payload.errors.eq(search.errors),
        ]
        memories = self._remember(m)
        with m.FSM():
            self._make_syndromes(m, memories)
            self._find_discrepancy(m, memories)
            self._update_locator(m, memories)
            self._search_bits(m, memories)
        return m

    def _remember(self, m: Module) -> _Memories:
        """Keep what is found, and sum products of its elements."""
        t, index = self.config.ecc_t, self.index

        def memory(name: str, depth: int) -> tuple[Any, Any]:
            m.submodules[name] = words = Memory(shape=self.element, depth=depth, init=[])
            return words.read_port(domain="comb"), words.write_port()

        syndrome, syndrome_write = memory("syndrome_memory", 2 * t)
        locator, locator_write = memory("locator", t + 1)
        before, before_write = memory("before", t + 1)
        product_ = Signal(self.element)
        m.d.comb += [
            product_.eq(times(m, "multiplier", code(self.config).field, self.a, self.b)),
            syndrome.addr.eq(Mux(self.finding, 2 * self.step - index, self.filled >> 1)),
            self.i.ready.eq(self.idle),
            self.syndromes.load.eq(self.idle),
            self.syndromes.step.eq(self.taking),
            self.syndromes.shift.eq(self.filling & ~self.filled[0]),
            self.search.load.eq(self.idle),
            self.search.searching.eq(self.searching),
            locator.addr.eq(index),
            before.addr.eq(index - self.shift),
            syndrome_write.addr.eq(self.filled),
            locator_write.addr.eq(self.write_index),
            locator_write.data.eq(self.sum ^ product_),
            locator_write.en.eq(self.write),
            before_write.addr.eq(index),
            before_write.data.eq(Mux(index > self.length, 0, locator.data)),
        ]
        m.d.sync += [self.multiply.eq(0), self.write.eq(0)]
        with m.If(self.multiply):
            m.d.sync += self.sum.eq(self.sum ^ product_)
        return _Memories(syndrome, syndrome_write, locator, locator_write, before, before_write)

    def _make_syndromes(self, m: Module, memories: _Memories) -> None:
        field, t, filled, syndromes = code(self.config).field, self.config.ecc_t, self.filled, self.syndromes
        with m.State("IDLE"):
            m.d.sync += filled.eq(0)
            with m.If(self.i.valid):
                m.d.sync += [self.idle.eq(0), self.taking.eq(1)]
                m.next = "SYNDROMES"
        with m.State("SYNDROMES"):
            with m.If(syndromes.last):
                m.d.sync += [self.taking.eq(0), self.filling.eq(1)]
                m.next = "FILL"
        with m.State("FILL"):
            # Syndrome filled + 1: an odd one, or the square of the one of half its number.
            m.d.comb += [
                memories.syndrome_write.en.eq(1),
                memories.syndrome_write.data.eq(
                    Mux(filled[0], squared(m, "square", field, memories.syndrome.data), syndromes.odd)),
                memories.locator_write.addr.eq(0),
                memories.locator_write.data.eq(1),
                memories.locator_write.en.eq(1),
                memories.before_write.addr.eq(0),
                memories.before_write.data.eq(1),
                memories.before_write.en.eq(1),
            ]
            m.d.sync += [
                filled.eq(filled + 1), self.length.eq(0), self.step.eq(0), self.shift.eq(1), self.scale.eq(1),
                self.index.eq(0), self.sum.eq(0)]
            with m.If(filled == 2 * t - 1):
                m.d.sync += [self.filling.eq(0), self.finding.eq(1)]
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
                m.d.sync += [self.o.payload.good.eq(search.right), self.searching.eq(0)]
                m.next = "DONE"
            with m.Elif(search.given_up):
                m.d.sync += self.searching.eq(0)
                m.next = "GIVE_UP"
        with m.State("GIVE_UP"):
            m.d.sync += self.o.payload.good.eq(0)
            m.next = "DONE"
        with m.State("DONE"):
            m.d.comb += self.o.valid.eq(1)
            with m.If(self.o.ready):
                m.d.sync += self.idle.eq(1)
                m.next = "IDLE"
