"""Chien's search for the wrong bits of a codeword, and the patches that mend them."""

from itertools import pairwise

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import exact_log2

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.corrections import CorrectorShapes, owner_shape
from kvattic_hdl.flash.division import divided, ones, product, times_power
from kvattic_hdl.lib.stream_buffer import Queue

WAITING = 8
"""Patches that may wait to be taken."""


class Search(wiring.Component):
    """Goes through the bits of a codeword in their order; ends when `length` wrong ones are found, or none is left.

    Chien's search: coefficient k of the locator, times 2**(k * i) at bit i; the bit is wrong where their sum is 0.

    Parameters
    ----------
    config : Config
    positions : int
        As of `Corrector`.
    channels : int
        As of `Corrector`.

    Members
    -------
    free : Out(1)
        It can be loaded, and begin.
    load, coefficient, begin, new_owner, length, unread, known, place, right, hopeless : In
        As of `Locator`.  Of a known bit the search begins at its word.
    patches : Out(stream of patch)
    ended : Out(1), result : Out(result)
        Strobe: the search is over, and all patches were taken; what it found.
    owner : Out
        Whose codeword patches and result are about.
    """

    def __init__(self, config: Config, positions: int, channels: int) -> None:
        self.config = config
        self.positions = positions
        shapes = CorrectorShapes(config)
        super().__init__({
            "free": Out(1),
            "load": In(1),
            "coefficient": In(code(config).field.m),
            "begin": In(1),
            "new_owner": In(owner_shape(channels)),
            "length": In(range(config.ecc_t + 1)),
            "unread": In(CRC_BITS),
            "known": In(1),
            "place": In(code(config).field.m),
            "right": In(1),
            "hopeless": In(1),
            "patches": Out(stream.Signature(shapes.patch)),
            "ended": Out(1),
            "result": Out(shapes.result),
            "owner": Out(owner_shape(channels)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_, positions = self.config, code(self.config), self.positions
        field = code_.field
        bits = config.word_bytes * 8
        groups = bits // positions                           # of a word

        searching, stalled = Signal(), Signal()
        moving = Signal()
        length, found = Signal(range(config.ecc_t + 1)), Signal(range(config.ecc_t + 1))
        hits = Signal(positions, reset_less=True)
        hits_valid = Signal()
        group = Signal(range(groups))
        index = Signal(range(config.raw_codeword_words))
        mask = Signal(bits, reset_less=True)
        word_hit = Signal()
        exhausted = Signal()
        check = Signal(CRC_BITS, reset_less=True)
        terms = [Signal(field.m, name=f"term_{k}", reset_less=True) for k in range(config.ecc_t + 1)]
        m.d.comb += moving.eq(searching & ~stalled)

        # Patches wait in a queue, so that the search's registers need not know in time whether one is taken.
        m.submodules.waiting = waiting = Queue(CorrectorShapes(config).patch, WAITING)
        connect(m, waiting.o, flipped(self.patches))
        level = Signal(range(WAITING + 1))
        m.d.sync += [
            level.eq(level + waiting.i.valid - (waiting.o.valid & waiting.o.ready)),
            stalled.eq(level >= WAITING - 2)]     # one more may come before that is known

        # First stage: the locator's values at the bits, as sums over two halves of its terms. Second: which are zero?
        known, right = Signal(), Signal()                    # the place is known, and the check value agrees
        armed = Signal()                                     # its bit has not been reached
        ahead = Signal(range(max(2, groups)))                # groups before it
        offset = Signal(range(max(2, positions)))
        bit_bits, word_bits = exact_log2(positions), exact_log2(bits)

        def columns(numbers: range) -> list[int]:
            return [sum(field.power(k * position + bit) << position * field.m for position in range(positions))
                    for k in numbers for bit in range(field.m)]

        middle = len(terms) // 2
        halves = [Signal(positions * field.m, name=f"half_{i}", reset_less=True) for i in range(2)]
        values_valid = Signal()
        # Sums stand outside of all conditions, which would become part of them.
        sums = [product(m, f"value_{i}", Cat(terms[k] for k in numbers), columns(numbers), positions * field.m)
                for i, numbers in enumerate((range(middle), range(middle, len(terms))))]
        following = [times_power(m, f"next_{k}", field, term, k * positions) for k, term in enumerate(terms) if k]
        with m.If(moving):
            m.d.sync += [half.eq(value) for half, value in zip(halves, sums, strict=True)]
            m.d.sync += [values_valid.eq(1), hits_valid.eq(values_valid)]
            m.d.sync += [term.eq(value) for term, value in zip(terms[1:], following, strict=True)]
            zeros = ((halves[0].word_select(k, field.m) == halves[1].word_select(k, field.m)) & ~known
                     for k in range(positions))
            reached = ((offset == k) & armed & (ahead == 0) for k in range(positions))
            m.d.sync += hits.eq(Cat(zeros) | Cat(reached))
            with m.If(values_valid):
                m.d.sync += ahead.eq(ahead - 1)
                with m.If(ahead == 0):
                    m.d.sync += armed.eq(0)

        # Third stage: which bits count, and where they are.
        last_group, last_word = Signal(), Signal()
        final, final_bits = divmod(code_.code_bits, positions)
        if final_bits == 0:
            final, final_bits = final - 1, positions
        # Bits behind the message do not count; that the check value is zero does not change when zeros pass.
        rest = CRC_BITS % positions
        data_words = config.codeword_bytes // config.word_bytes
        seen = Signal(data.StructLayout({
            "bits": positions, "message": positions, "any": 1, "ones": range(positions + 1), "index": index.shape(),
            "last_group": 1, "last_word": 1, "in_data": 1, "in_message": 1}), reset_less=True)
        seen_valid = Signal()
        here = Signal(positions)
        m.d.comb += [
            last_group.eq(group == groups - 1),
            last_word.eq((index == final // groups) & (group == final % groups)),
            here.eq(Mux(last_word, hits[:final_bits], hits)),
        ]
        with m.If(moving):
            m.d.sync += [
                seen_valid.eq(hits_valid), seen.bits.eq(here), seen.any.eq(here.any()), seen.ones.eq(ones(here)),
                seen.message.eq(
                    Mux((index == data_words) & (group == CRC_BITS // positions), hits[:rest], hits) if rest else hits),
                seen.index.eq(index), seen.last_group.eq(last_group), seen.last_word.eq(last_word),
                seen.in_data.eq(index < config.words_per_codeword),
                seen.in_message.eq(
                    (index < data_words) | (index == data_words) & (group < -(-CRC_BITS // positions))),
            ]
            with m.If(hits_valid):
                m.d.sync += group.eq(group + 1)
                with m.If(last_group):
                    m.d.sync += index.eq(index + 1)

        # Fourth stage: put the bits of a word together.
        hit = Signal()
        found_all, given_up = Signal(), Signal()
        m.d.comb += [
            hit.eq(word_hit | seen.any),
            found_all.eq((found == length) & ~word_hit & ~waiting.o.valid),
            given_up.eq(exhausted & (found != length) & ~waiting.o.valid),
            waiting.i.payload.index.eq(seen.index),
            waiting.i.payload.mask.eq(Cat(mask[positions:], seen.bits)),
        ]
        next_check = divided(m, "check", code_.crc, check, seen.message)
        with m.If(moving & seen_valid & ~exhausted):
            m.d.sync += [
                mask.eq(Cat(mask[positions:], seen.bits)),
                found.eq(found + seen.ones),
                word_hit.eq(hit & seen.in_data & ~seen.last_group),
                exhausted.eq(seen.last_word),
            ]
            with m.If(seen.in_message):
                m.d.sync += check.eq(next_check)
            m.d.comb += waiting.i.valid.eq(seen.last_group & seen.in_data & hit)
        m.d.comb += self.result.errors.eq(found)
        with m.If(self.load):
            m.d.sync += terms[0].eq(self.coefficient)
            m.d.sync += [high.eq(low) for low, high in pairwise(terms)]

        def begin() -> None:
            m.d.comb += self.free.eq(1)
            m.d.sync += [signal.eq(0) for signal in (
                found, values_valid, hits_valid, seen_valid, group, word_hit, exhausted)]
            m.d.sync += [
                self.owner.eq(self.new_owner), length.eq(Mux(self.known, 1, self.length)), check.eq(self.unread),
                known.eq(self.known), armed.eq(self.known), right.eq(self.right),
                index.eq(Mux(self.known, self.place >> word_bits, 0)),
                offset.eq(self.place[:bit_bits]), ahead.eq(self.place[bit_bits:word_bits]),
                self.result.good.eq(0)]
            m.next = "FREE"
            with m.If(self.begin):
                m.d.sync += searching.eq(~self.hopeless)
                m.next = "SEARCH"
                with m.If(self.hopeless):
                    m.next = "DONE"

        with m.FSM():
            with m.State("FREE"):
                begin()
            with m.State("SEARCH"):
                with m.If(found_all):
                    m.d.sync += self.result.good.eq(Mux(known, right, check == 0))
                with m.If(found_all | given_up):
                    m.d.sync += searching.eq(0)
                    m.next = "DONE"
            with m.State("DONE"):
                m.d.comb += self.ended.eq(1)
                begin()
        return m
