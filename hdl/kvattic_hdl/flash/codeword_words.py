"""A decoder's words: those that come in are checked, kept until they leave, and patched meanwhile."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import Division, code
from kvattic_hdl.flash.corrections import CorrectorShapes
from kvattic_hdl.flash.division import ones
from kvattic_hdl.flash.interfaces import FlashShapes
from kvattic_hdl.flash.steps import CodeSteps, left_after, steps_signature, vector_of

BEATS_AHEAD = 4
"""Beats that wait behind the memory, so that its read port may be used for a correction meanwhile."""


def first_state(division: Division, codeword_bits: int, parity_bits: range) -> int:
    """State from which the division ends at zero for a right raw codeword, whose parity is stored inverted."""
    state = 0
    for bit in range(codeword_bits):
        state = division.shift(state ^ (bit in parity_bits))
    return division.unshift(state, codeword_bits)


class WordShapes(FlashShapes):
    """`FlashShapes`, and those of a decoder's inside.

    Attributes
    ----------
    buffer : Shape
        Number of a buffer.
    word : Shape
        A word of the bus.
    address : Shape
        Cat(beat of the codeword, buffer).
    leaving : StructLayout
        A buffer whose codeword is to leave; error: as error beats.
    """

    def __init__(self, config: Config, buffers: int) -> None:
        super().__init__(config)
        self.buffer = unsigned(ceil_log2(buffers))
        self.word = unsigned(config.word_bytes * 8)
        self.address = unsigned(ceil_log2(config.words_per_codeword) + self.buffer.width)
        self.leaving = data.StructLayout({"buffer": self.buffer, "error": 1})


class WordChecker(wiring.Component):
    """Takes the words that come in, and divides each codeword by the code's and the check value's generators.

    Parameters
    ----------
    config : Config
    buffers : int
    shares : bool
        As of `Decoder`.

    Members
    -------
    words : In(word_bytes * 8), words_valid : In(1)
        As of `Decoder`.
    buffers : In(stream of buffer)
        Which ones wait for words, in order; taken with the last word.
    seed : In(CRC_BITS)
        What the check value of the codeword begins with that the first of these waits for.
    store : Out(1), address : Out, word : Out(word_bytes * 8)
        Strobe: a word that carries tokens.
    last : Out(1)
        Strobe: the codeword's last word, two cycles after it came.
    ended : Out(1), ended_buffer : Out(buffer)
        Strobe, one cycle later: all of this buffer's codeword was seen; the following is about it.
    remainder, check : Out
        A problem's (see `CorrectorShapes`).
    clean, erased : Out(1)
        No bit of it is wrong; it is that of an erased page.
    """

    def __init__(self, config: Config, buffers: int, *, shares: bool = False) -> None:
        self.config = config
        self.shares = shares
        self.shapes = shapes = WordShapes(config, buffers)
        problem = CorrectorShapes(config).problem
        super().__init__({
            **({"steps": Out(steps_signature(config))} if shares else {}),
            "words": In(shapes.word),
            "words_valid": In(1),
            "buffers": In(stream.Signature(shapes.buffer)),
            "seed": In(CRC_BITS),
            "store": Out(1),
            "address": Out(shapes.address),
            "word": Out(shapes.word),
            "last": Out(1),
            "ended": Out(1),
            "ended_buffer": Out(shapes.buffer),
            "remainder": Out(problem["remainder"].shape),
            "check": Out(problem["check"].shape),
            "clean": Out(1),
            "erased": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_ = self.config, code(self.config)
        bits, beats, raw_words = config.word_bytes * 8, config.words_per_codeword, config.raw_codeword_words
        data_words = config.codeword_bytes // config.word_bytes
        padding = raw_words * bits - code_.code_bits
        origin = first_state(
            code_.parity, raw_words * bits, range(code_.message_bits, code_.code_bits))
        word, word_valid = Signal(bits, reset_less=True), Signal()
        index = Signal(range(raw_words))
        last, use = Signal(), Signal()
        first = Signal(init=1)                                # the next word is a codeword's first
        others = Signal(bits_for(config.raw_codeword_bytes))   # bytes that are not 0xFF
        check = Signal(CRC_BITS, reset_less=True)
        remainder = Signal(code_.parity.degree, reset_less=True)
        m.d.sync += [word.eq(self.words), word_valid.eq(self.words_valid)]
        m.d.comb += [
            use.eq(word_valid & self.buffers.valid),
            last.eq(index == raw_words - 1),
            self.last.eq(use & last),
            self.buffers.ready.eq(use & last),
            self.word.eq(word),
            self.store.eq(use & (index < beats)),
            self.address.eq(Cat(index[: ceil_log2(beats)], self.buffers.payload)),
            self.remainder.eq(remainder),
            self.check.eq(check),
            self.clean.eq(~(remainder.any() | check.any())),
            self.erased.eq(others <= config.ecc_t),
        ]
        masked = Mux(last, word & ((1 << bits - padding) - 1), word) if padding else word
        other = Cat(~word.word_select(i, 8).all() for i in range(config.word_bytes))
        if not self.shares:
            m.submodules.steps = own = CodeSteps(config)
        steps = self.steps if self.shares else own.users[0]
        divided, checked = Signal.like(remainder), Signal(CRC_BITS)
        m.d.comb += [
            divided.eq(Mux(first, origin, remainder)),
            checked.eq(Mux(first, self.seed, check)),
            steps.busy.eq(word_valid),
            steps.parity.eq(vector_of(divided, masked, word_valid)),
            steps.check.eq(vector_of(checked, word, word_valid)),
        ]
        m.d.sync += self.ended.eq(use & last)
        with m.If(use):
            m.d.sync += [
                index.eq(index + 1),
                remainder.eq(left_after(code_.parity, divided, bits) ^ steps.parity_product),
                others.eq(Mux(first, 0, others) + ones(other)),
                first.eq(last),
            ]
            with m.If(index < data_words):
                m.d.sync += check.eq(left_after(code_.crc, checked, bits) ^ steps.check_product)
            with m.If(index == data_words):
                m.d.sync += check.eq(check ^ word[:CRC_BITS])
            with m.If(last):
                m.d.sync += [index.eq(0), self.ended_buffer.eq(self.buffers.payload)]
        return m


class WordMemory(wiring.Component):
    """Keeps the words that carry tokens.  A patch takes the read port at once, the write port when it is free.

    Parameters
    ----------
    config : Config
    buffers : int

    Members
    -------
    store : In(1), store_address : In, word : In(word_bytes * 8)
        Strobe: a word that comes in; it is in the memory two cycles later.
    patches : In(stream of patch), patch_buffer : In(buffer)
        Wrong bits of this buffer's codeword.
    reading : Out(1)
        A patch reads in this cycle.
    fetch : In(1), fetch_address : In
        A word is read, unless `reading`.
    fetched : Out(word_bytes * 8)
        One cycle later.
    """

    def __init__(self, config: Config, buffers: int) -> None:
        self.config = config
        self.buffers = buffers
        self.shapes = shapes = WordShapes(config, buffers)
        super().__init__({
            "store": In(1),
            "store_address": In(shapes.address),
            "word": In(shapes.word),
            "patches": In(stream.Signature(CorrectorShapes(config).patch)),
            "patch_buffer": In(shapes.buffer),
            "reading": Out(1),
            "fetch": In(1),
            "fetch_address": In(shapes.address),
            "fetched": Out(shapes.word),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beat_bits = ceil_log2(self.config.words_per_codeword)
        m.submodules.words = words = Memory(shape=self.shapes.word, depth=self.buffers << beat_bits, init=[])
        write, read = words.write_port(), words.read_port()
        patch = self.patches.payload
        address = Cat(patch.index[:beat_bits], self.patch_buffer)
        patching, patched = Signal(), Signal()
        mended = Signal(self.shapes.word, reset_less=True)
        store, store_address = Signal(), Signal(self.shapes.address, reset_less=True)
        word = Signal(self.shapes.word, reset_less=True)
        m.d.sync += [store.eq(self.store), store_address.eq(self.store_address), word.eq(self.word)]
        m.d.comb += [
            write.en.eq(store | patched),
            write.addr.eq(Mux(store, store_address, address)),
            write.data.eq(Mux(store, word, mended)),
            read.addr.eq(Mux(self.fetch, self.fetch_address, address)),
            self.fetched.eq(read.data),
            self.patches.ready.eq(patched & ~store),
            self.reading.eq(self.patches.valid & ~patching & ~patched),
        ]
        m.d.sync += patching.eq(self.reading)
        with m.If(patching):
            m.d.sync += [mended.eq(read.data ^ patch.mask), patched.eq(1)]
        with m.Elif(~store):
            m.d.sync += patched.eq(0)
        return m


class Departure(wiring.Component):
    """Reads the beats of codewords that leave, one a cycle.

    Parameters
    ----------
    config : Config
    buffers : int

    Members
    -------
    leaving : In(stream of leaving)
        Codewords in the order in which they leave; taken with the last beat, whose buffer is free then.
    tag : In(tag)
        That of `leaving`, in the same cycle.
    busy : In(1)
        No word can be read in this cycle.
    fetch : Out(1), fetch_address : Out
        A word is read; comes as `fetched` one cycle later.
    fetched : In(word_bytes * 8)
    codewords : Out(stream of beat)
    """

    def __init__(self, config: Config, buffers: int) -> None:
        self.config = config
        self.shapes = shapes = WordShapes(config, buffers)
        super().__init__({
            "leaving": In(stream.Signature(shapes.leaving)),
            "tag": In(shapes.tag),
            "busy": In(1),
            "fetch": Out(1),
            "fetch_address": Out(shapes.address),
            "fetched": In(shapes.word),
            "codewords": Out(stream.Signature(shapes.channel_word)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes, beats = self.shapes, self.config.words_per_codeword
        m.submodules.beats = queue = SyncFIFO(width=shapes.channel_word.size, depth=BEATS_AHEAD)
        head = self.leaving.payload
        beat_index = Signal(range(beats))
        on_way = Signal()
        meant = Signal(data.StructLayout({"tag": shapes.tag, "last": 1, "error": 1}), reset_less=True)
        beat = Signal(shapes.channel_word)
        final = Signal()
        m.d.comb += [
            self.fetch.eq(self.leaving.valid & ~self.busy & (queue.level + on_way < BEATS_AHEAD)),
            self.fetch_address.eq(Cat(beat_index, head.buffer)),
            final.eq(beat_index == beats - 1),
            self.leaving.ready.eq(self.fetch & final),
            beat.tag.eq(meant.tag),
            beat.data.eq(Mux(meant.error, 0, self.fetched)),
            beat.last.eq(meant.last),
            beat.error.eq(meant.error),
            queue.w_data.eq(beat),
            queue.w_en.eq(on_way),
            self.codewords.valid.eq(queue.r_rdy),
            self.codewords.payload.eq(queue.r_data),
            queue.r_en.eq(self.codewords.ready),
        ]
        m.d.sync += [
            on_way.eq(self.fetch),
            meant.tag.eq(self.tag),
            meant.last.eq(final),
            meant.error.eq(head.error),
        ]
        with m.If(self.fetch):
            m.d.sync += beat_index.eq(Mux(final, 0, beat_index + 1))
        return m
