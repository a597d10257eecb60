"""Adds check value and parity to the codewords that go into flash."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.interfaces import FlashShapes
from kvattic_hdl.flash.steps import CodeSteps, left_after, steps_signature, vector_of


def seeded(page: Value, codeword: Value) -> Value:
    """What the check value of a codeword begins with (`kvattic.spec.ecc.seed`)."""
    return ~(page ^ Cat(Const(0, CRC_BITS - len(codeword)), codeword[::-1]))[:CRC_BITS]


class Encoder(wiring.Component):
    """Adds check words to codewords on their way into flash.

    Latency 2 cycles.  One word a cycle: a codeword takes `raw_codeword_words` cycles, in the last of which no input is
    taken.  Order is kept.  Reset forgets everything; the next word is the first of a page.

    Parameters
    ----------
    config : Config
        The configuration.
    shares : bool
        There is a member steps, Out(steps_signature), through which they are made outside, for others, too; while it
        waits for them, no word is taken.

    Members
    -------
    i : In(stream.Signature(shapes.page_word))
        Words of whole pages, codeword by codeword; `page` is read with the first word of each codeword.
    o : Out(stream.Signature(unsigned(word_bytes * 8)))
        The same words, and behind each codeword its check words (docs/ecc.md).
    """

    i: stream.Interface
    o: stream.Interface

    def __init__(self, config: Config, *, shares: bool = False) -> None:
        self.config = config
        self.shares = shares
        shapes = FlashShapes(config)
        super().__init__({
            **({"steps": Out(steps_signature(config))} if shares else {}),
            "i": In(stream.Signature(shapes.page_word)),
            "o": Out(stream.Signature(config.word_bytes * 8)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_ = self.config, code(self.config)
        bits = config.word_bytes * 8
        words = config.codeword_bytes // config.word_bytes
        checks = config.raw_codeword_words - words
        data = self.i.payload.data

        word = Signal(bits, reset_less=True)
        word_valid = Signal()
        out_free = Signal()
        index = Signal(range(words))                        # of the word that comes next
        codeword = Signal(FlashShapes(config).codeword_index)
        check_index = Signal(range(checks))
        accept = Signal()
        fold = Signal()
        load_check = Signal()

        check = Signal(CRC_BITS, reset_less=True)
        parity = Signal(code_.parity.degree, reset_less=True)
        late = Signal(bits - CRC_BITS, reset_less=True)     # bits that the parity has not seen yet
        fresh = Signal()                                    # the next step is not a codeword's first
        seed = Signal(CRC_BITS)
        if not self.shares:
            m.submodules.steps = own = CodeSteps(config)
        steps = self.steps if self.shares else own.users[0]
        m.d.comb += [
            seed.eq(seeded(self.i.payload.page, codeword)),
            out_free.eq(~self.o.valid | self.o.ready),
            accept.eq(self.i.valid & self.i.ready),
        ]

        # The parity is 24 bits behind, so that its last step takes the check value.
        step = Signal(bits)
        folds = Signal()                                    # the check value is next
        m.d.comb += step.eq(Cat(late & fresh.replicate(len(late)), Mux(folds, check, data[:CRC_BITS])))
        divided = Signal.like(parity)
        m.d.comb += [
            divided.eq(parity & fresh.replicate(len(parity))),
            steps.busy.eq(accept | fold),
            steps.parity.eq(vector_of(divided, step, ~steps.waits)),
            steps.check.eq(vector_of(Mux(fresh, check, seed), data, ~steps.waits)),
        ]
        with m.If(accept | fold):
            m.d.sync += parity.eq(left_after(code_.parity, divided, bits) ^ steps.parity_product)
        with m.If(accept):
            m.d.sync += [
                check.eq(left_after(code_.crc, Mux(fresh, check, seed), bits) ^ steps.check_product),
                late.eq(data[CRC_BITS:]),
            ]

        with m.If(out_free):
            m.d.sync += [self.o.valid.eq(word_valid), self.o.payload.eq(word), word_valid.eq(0)]
        with m.If(load_check):
            tail = Cat(check, ~parity, Const(0, checks * bits - CRC_BITS - len(parity)))
            m.d.sync += [self.o.valid.eq(1), self.o.payload.eq(tail.word_select(check_index, bits))]
        with m.If(accept):
            m.d.sync += [word.eq(data), word_valid.eq(1), fresh.eq(1)]

        with m.FSM():
            with m.State("DATA"):
                m.d.comb += self.i.ready.eq((~word_valid | out_free) & ~steps.waits)
                with m.If(accept):
                    m.d.sync += index.eq(index + 1)
                    with m.If(index == words - 1):
                        m.d.sync += [index.eq(0), folds.eq(1)]
                        m.next = "FOLD"
            with m.State("FOLD"):
                m.d.comb += fold.eq(~steps.waits)
                with m.If(fold):
                    m.d.sync += [folds.eq(0), fresh.eq(0)]
                    if config.codewords_per_page > 1:
                        m.d.sync += codeword.eq(codeword + 1)
                    m.next = "CHECK"
            with m.State("CHECK"):
                with m.If(~word_valid & out_free):
                    m.d.comb += load_check.eq(1)
                    m.d.sync += check_index.eq(check_index + 1)
                    with m.If(check_index == checks - 1):
                        m.d.sync += check_index.eq(0)
                        m.d.comb += self.i.ready.eq(~steps.waits)
                        with m.If(accept):
                            m.d.sync += index.eq(1)
                        m.next = "DATA"
        return m
