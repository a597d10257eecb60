"""Finds the wrong bits of a codeword: syndromes, Berlekamp and Massey's algorithm, Chien's search."""

from itertools import pairwise

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
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
            "index": unsigned(bits_for(config.beats_per_codeword - 1)), "mask": config.beat_bytes * 8})
        self.result = data.StructLayout({"good": 1, "errors": unsigned(bits_for(config.ecc_t))})


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
        shapes = CorrectorShapes(config)
        super().__init__({
            "i": In(stream.Signature(shapes.problem)),
            "patches": Out(stream.Signature(shapes.patch)),
            "o": Out(stream.Signature(shapes.result)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_ = self.config, code(self.config)
        field, t = code_.field, config.ecc_t
        element = unsigned(field.m)
        raw_bits = config.raw_codeword_bytes * 8

        length = Signal(range(t + 1))     # of the locator: the number of errors
        begin = Signal()                  # the search begins in the next cycle
        searching = Signal()
        found_all = Signal()
        given_up = Signal()
        check = Signal(CRC_BITS, reset_less=True)

        # ---- Syndromes of odd powers.  Bit k of the remainder stands for 2**(-k - raw_bits), so that the first bit of
        # the codeword has the locator 1, and bit i has 2**-i. ----

        # What the CRC would have to begin with, so that reading the wrong bits of the data makes `check` of it.
        unread = [code_.crc.unshift(1 << bit, config.codeword_bytes * 8) for bit in range(CRC_BITS)]
        chunks = -(-code_.parity.degree // SYNDROME_BITS)
        remainder = Signal(chunks * SYNDROME_BITS, reset_less=True)
        chunk = Signal(range(chunks))
        # Of the remainder's first bits, in all odd syndromes.
        columns = [sum(field.power(-(2 * k + 1) * (bit + raw_bits)) << k * field.m for k in range(t))
                   for bit in range(SYNDROME_BITS)]
        weights = product(m, "weight", remainder[-SYNDROME_BITS:], columns, t * field.m)
        odd = [Signal(element, name=f"odd_{2 * k + 1}", reset_less=True) for k in range(t)]

        # ---- Memories of the locator's algorithm: syndromes (from 1 on), locator, and the locator before. ----

        def memory(name: str, depth: int):
            m.submodules[name] = words = Memory(shape=element, depth=depth, init=[])
            return words.read_port(domain="comb"), words.write_port()

        syndrome, syndrome_write = memory("syndromes", 2 * t)
        locator, locator_write = memory("locator", t + 1)
        before, before_write = memory("before", t + 1)

        filled = Signal(range(2 * t))
        step = Signal(range(t))               # syndromes 2 * step + 1 and + 2 are taken
        shift = Signal(range(2 * t + 2), init=1)
        scale = Signal(element, reset_less=True)
        discrepancy = Signal(element, reset_less=True)
        longer = Signal()
        i = Signal(range(t + 1))
        second = Signal()

        a = Signal(element, reset_less=True)
        b = Signal(element, reset_less=True)
        sum_ = Signal(element, reset_less=True)
        product_ = Signal(element)
        multiply = Signal()                   # a and b are operands
        write = Signal()                      # their product completes a coefficient
        write_index = Signal(range(t + 1), reset_less=True)
        m.d.comb += [
            product_.eq(times(m, "multiplier", field, a, b)),
            syndrome.addr.eq(filled >> 1),
            locator.addr.eq(i),
            before.addr.eq(i - shift),
            syndrome_write.addr.eq(filled),
            locator_write.addr.eq(write_index),
            locator_write.data.eq(sum_ ^ product_),
            locator_write.en.eq(write),
            before_write.addr.eq(i),
            before_write.data.eq(Mux(i > length, 0, locator.data)),
        ]
        m.d.sync += [multiply.eq(0), write.eq(0)]
        with m.If(multiply):
            m.d.sync += sum_.eq(sum_ ^ product_)

        new_length = Signal(range(2 * t))
        m.d.comb += new_length.eq(2 * step + 1 - length)

        # ---- Search: coefficient k of the locator, times 2**(k * i) at bit i. ----

        terms = [Signal(element, name=f"term_{k}", reset_less=True) for k in range(t + 1)]
        self._search(m, terms, check, length, begin, searching, found_all, given_up)

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.i.ready.eq(1)
                m.d.sync += [
                    remainder.eq(self.i.payload.remainder),
                    check.eq(product(m, "unread", self.i.payload.check, unread, CRC_BITS)),
                    chunk.eq(0),
                    filled.eq(0),
                    *(s.eq(0) for s in odd),
                ]
                with m.If(self.i.valid):
                    m.next = "SYNDROMES"
            with m.State("SYNDROMES"):
                m.d.sync += [remainder.eq(remainder << SYNDROME_BITS), chunk.eq(chunk + 1)]
                for k, s in enumerate(odd):
                    m.d.sync += s.eq(times_power(m, f"syndrome_{2 * k + 1}", field, s, -(2 * k + 1) * SYNDROME_BITS)
                                     ^ weights.word_select(k, field.m))
                with m.If(chunk == chunks - 1):
                    m.next = "FILL"
            with m.State("FILL"):
                # Syndrome filled + 1: an odd one, or the square of the one of half its number.
                m.d.comb += [
                    syndrome_write.en.eq(1),
                    syndrome_write.data.eq(Mux(filled[0], squared(m, "square", field, syndrome.data), odd[0])),
                    locator_write.addr.eq(0),
                    locator_write.data.eq(1),
                    locator_write.en.eq(1),
                    before_write.addr.eq(0),
                    before_write.data.eq(1),
                    before_write.en.eq(1),
                ]
                m.d.sync += [filled.eq(filled + 1), length.eq(0), step.eq(0), shift.eq(1), scale.eq(1), i.eq(0),
                             sum_.eq(0)]
                with m.If(~filled[0]):
                    m.d.sync += [low.eq(high) for low, high in pairwise(odd)]
                with m.If(filled == 2 * t - 1):
                    m.next = "DISCREPANCY"
            with m.State("DISCREPANCY"):
                m.d.comb += syndrome.addr.eq(2 * step - i)
                m.d.sync += [a.eq(locator.data), b.eq(syndrome.data), multiply.eq(1), i.eq(i + 1)]
                with m.If(i == length):
                    m.next = "ADD"
            with m.State("ADD"):
                m.next = "DECIDE"
            with m.State("DECIDE"):
                m.d.sync += [discrepancy.eq(sum_), sum_.eq(0), longer.eq(0), i.eq(0), second.eq(0)]
                with m.If(sum_ == 0):
                    m.next = "STEP"
                with m.Elif(length <= step):
                    m.d.sync += [longer.eq(1), i.eq(new_length)]
                    m.next = "UPDATE"
                    with m.If(new_length > t):
                        m.next = "GIVE_UP"
                with m.Else():
                    m.d.sync += i.eq(length)
                    m.next = "UPDATE"
            with m.State("UPDATE"):
                # From the highest coefficient down: scale * locator[i] + discrepancy * before[i - shift].
                m.d.sync += [multiply.eq(1), second.eq(~second)]
                with m.If(~second):
                    m.d.sync += [a.eq(Mux(i > length, 0, locator.data)), b.eq(scale), sum_.eq(0)]
                with m.Else():
                    m.d.comb += before_write.en.eq(longer)
                    m.d.sync += [a.eq(Mux(i < shift, 0, before.data)), b.eq(discrepancy), write.eq(1),
                                 write_index.eq(i), i.eq(i - 1)]
                    with m.If(i == 0):
                        m.next = "STEP"
            with m.State("STEP"):
                m.d.sync += [step.eq(step + 1), shift.eq(shift + 2), i.eq(0), sum_.eq(0)]
                with m.If(longer):
                    m.d.sync += [length.eq(new_length), scale.eq(discrepancy), shift.eq(2)]
                m.next = "DISCREPANCY"
                with m.If(step == t - 1):
                    m.d.sync += i.eq(t)
                    m.next = "LOAD"
            with m.State("LOAD"):
                # The last coefficient goes in first.
                m.d.comb += begin.eq(1)
                m.d.sync += [terms[0].eq(Mux(i > length, 0, locator.data)), i.eq(i - 1)]
                m.d.sync += [high.eq(low) for low, high in pairwise(terms)]
                with m.If(i == 0):
                    m.next = "SEARCH"
            with m.State("SEARCH"):
                m.d.comb += searching.eq(1)
                with m.If(found_all):
                    m.d.sync += self.o.payload.good.eq(check == 0)
                    m.next = "DONE"
                with m.Elif(given_up):
                    m.next = "GIVE_UP"
            with m.State("GIVE_UP"):
                m.d.sync += self.o.payload.good.eq(0)
                m.next = "DONE"
            with m.State("DONE"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(self.o.ready):
                    m.next = "IDLE"
        return m

    def _search(self, m: Module, terms: list[Signal], check: Signal, length: Signal, begin: Signal,
                searching: Signal, found_all: Signal, given_up: Signal) -> None:
        """The bits of the codeword in their order; ends when `length` wrong ones are found, or none is left."""
        config, code_, positions = self.config, code(self.config), self.positions
        field = code_.field
        bits = config.beat_bytes * 8
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

        # First stage: is the locator zero at one of the bits?
        stall = Signal()
        columns = [sum(field.power(k * position + bit) << position * field.m for position in range(positions))
                   for k in range(len(terms)) for bit in range(field.m)]
        values = product(m, "value", Cat(terms), columns, positions * field.m)
        with m.If(searching & ~stall):
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
        data_words = config.codeword_bytes // config.beat_bytes
        m.d.comb += [
            last_group.eq(group == groups - 1),
            last_word.eq((index == final // groups) & (group == final % groups)),
            here.eq(Mux(last_word, hits[:final_bits], hits)),
            in_data.eq(index < config.beats_per_codeword),
            in_message.eq((index < data_words) | (index == data_words) & (group < CRC_BITS // positions)),
            hit.eq(word_hit | here.any()),
            stall.eq(last_group & in_data & hit & patch.valid & ~patch.ready),
            found_all.eq((found == length) & ~word_hit & ~patch.valid),
            given_up.eq(exhausted & (found != length) & ~patch.valid),
        ]
        with m.If(patch.ready):
            m.d.sync += patch.valid.eq(0)
        with m.If(searching & hits_valid & ~stall & ~exhausted):
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
        with m.If(begin):
            m.d.sync += [found.eq(0), hits_valid.eq(0), group.eq(0), index.eq(0), word_hit.eq(0), exhausted.eq(0)]
        m.d.comb += self.o.payload.errors.eq(found)
