"""Codewords from the flash bus: checks them, has them corrected, hands their tokens on."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import MediaCause
from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import Division, code
from kvattic_hdl.flash.corrector import Corrector, CorrectorShapes
from kvattic_hdl.flash.division import divided, ones
from kvattic_hdl.flash.encoder import seeded
from kvattic_hdl.flash.interfaces import CAUSE_BITS, FlashShapes

_BEATS_AHEAD = 4
"""Beats that wait behind the memory, so that its read port may be used for a correction meanwhile."""


def first_state(division: Division, codeword_bits: int, parity_bits: range) -> int:
    """State from which the division ends at zero for a right raw codeword, whose parity is stored inverted."""
    state = 0
    for bit in range(codeword_bits):
        state = division.shift(state ^ (bit in parity_bits))
    return division.unshift(state, codeword_bits)


class Decoder(wiring.Component):
    """Checks the codewords that come from the bus, and hands on the beats that carry tokens.

    A clean codeword leaves at one beat a cycle, the first 5 cycles after its last word came if nothing is before it.
    One with errors waits in its buffer for the corrector, which works on one at a time, while others pass.  So
    codewords leave in another order than they came in; the beats of one are never mixed with those of another.

    What becomes of a codeword:

    - clean (no bit of data, check value and parity is wrong), or corrected: its beats;
    - erased (at most ecc_t bytes are not 0xFF; looked for first): error beats, cause ERASED;
    - uncorrectable (too many errors, or the check value is wrong after the correction): `retry` with the next level,
      and its buffer is free; at the last level error beats, cause UNCORRECTABLE;
    - announced with a cause: error beats with this cause, and no words are expected.

    Throughput: a word in each cycle, for ever, if what leaves is taken and no errors need the corrector.  Reset forgets
    everything.

    Parameters
    ----------
    config : Config
        The configuration.
    buffers : int
        Codewords that are on their way from `header` to `codewords`, 2 or more.
    positions : int
        Bits of a codeword that the corrector searches in one cycle: 1, 2, 4 or 8.

    Members
    -------
    header : In(stream.Signature(shapes.header))
        Announces a codeword, before its first word or with it; taken while a buffer is free.
    words : In(beat_bytes * 8)
        A raw word of the oldest announced codeword that is not complete.
    words_valid : In(1)
        There is a word; it cannot be held back.
    codewords : Out(stream.Signature(shapes.beat))
        `beats_per_codeword` beats of each codeword; the data of error beats are zero.
    retry : Out(stream.Signature(shapes.retry))
        A codeword to be read again, `level` being the setting to use.
    codeword : Out(1)
        Strobe: the last word of a codeword came.
    corrected : Out(1)
        Strobe: a codeword was corrected.
    bit_errors : Out(range(ecc_t + 1))
        Bits that were wrong in it; 0 at other times.
    unreadable : Out(1)
        Strobe: a codeword is given up, its error beats will come.
    media_error : Out(shapes.media_error)
        Which one and why, with `unreadable`.

    Raises
    ------
    ValueError
        `buffers` is below 2.
    """

    header: stream.Interface
    codewords: stream.Interface
    retry: stream.Interface

    def __init__(self, config: Config, buffers: int = 8, positions: int = 8) -> None:
        if buffers < 2:
            raise ValueError(f"buffers must be at least 2, not {buffers!r}")
        self.config = config
        self.buffers = buffers
        self.positions = positions
        shapes = FlashShapes(config)
        super().__init__({
            "header": In(stream.Signature(shapes.header)),
            "words": In(config.beat_bytes * 8),
            "words_valid": In(1),
            "codewords": Out(stream.Signature(shapes.beat)),
            "retry": Out(stream.Signature(shapes.retry)),
            "codeword": Out(1),
            "corrected": Out(1),
            "bit_errors": Out(unsigned(bits_for(config.ecc_t))),
            "unreadable": Out(1),
            "media_error": Out(shapes.media_error),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_, shapes = self.config, code(self.config), FlashShapes(self.config)
        buffers = self.buffers
        bits = config.beat_bytes * 8
        beats = config.beats_per_codeword
        data_words = config.codeword_bytes // config.beat_bytes
        raw_words = config.raw_codeword_words
        buffer = unsigned(ceil_log2(buffers))
        beat_bits = ceil_log2(beats)
        header = self.header.payload

        def fifo(name: str, width: int) -> SyncFIFO:
            m.submodules[name] = queue = SyncFIFO(width=width, depth=buffers)
            return queue

        # ---- Buffers and what is known of their codewords. ----

        free = Signal(buffers, init=-1)
        allocated = Signal(buffer)
        for i in reversed(range(buffers)):
            with m.If(free[i]):
                m.d.comb += allocated.eq(i)
        take = Signal()
        release, released = Signal(), Signal(buffer)       # its last beat is on its way
        dropped = Signal()                                 # it is read again
        problem_buffer = Signal(buffer)                    # whose codeword the corrector works on
        m.d.sync += free.eq(
            (free | release.replicate(buffers) & (1 << released)[:buffers]
             | dropped.replicate(buffers) & (1 << problem_buffer)[:buffers])
            & ~(take.replicate(buffers) & (1 << allocated)[:buffers]))

        place = data.StructLayout({"page": header.page.shape(), "codeword": shapes.codeword_index})
        name = data.StructLayout({"tag": shapes.tag, "level": shapes.level})
        m.submodules.places = places = Memory(shape=place, depth=buffers, init=[])
        m.submodules.names = names = Memory(shape=name, depth=buffers, init=[])
        for memory, fields in ((places, ("page", "codeword")), (names, ("tag", "level"))):
            port = memory.write_port()
            m.d.comb += [port.addr.eq(allocated), port.en.eq(take)]
            m.d.comb += [port.data[f].eq(header[f]) for f in fields]
        incoming_place, ended_place = (places.read_port(domain="comb") for _ in range(2))
        leaving_name, problem_name = (names.read_port(domain="comb") for _ in range(2))

        m.submodules.words = words = Memory(shape=bits, depth=buffers << beat_bits, init=[])
        words_write, words_read = words.write_port(), words.read_port()

        # ---- Words that come in. ----

        incoming = fifo("incoming", buffer.width)                # buffers that wait for words, in order
        word, word_valid = Signal(bits, reset_less=True), Signal()
        index = Signal(range(raw_words))
        last, use = Signal(), Signal()
        ended = Signal()                                   # all words of a codeword were seen
        ended_buffer = Signal(buffer)
        others = Signal(bits_for(config.raw_codeword_bytes))   # bytes that are not 0xFF
        check = Signal(CRC_BITS, reset_less=True)
        padding = raw_words * bits - code_.code_bits
        parity_bits = range(code_.message_bits, code_.code_bits)
        origin = first_state(code_.parity, raw_words * bits, parity_bits)
        remainder = Signal(code_.parity.degree, init=origin)
        ended_remainder = Signal.like(remainder, init=0, reset_less=True)
        m.d.sync += [word.eq(self.words), word_valid.eq(self.words_valid)]
        m.d.comb += [
            use.eq(word_valid & incoming.r_rdy),
            last.eq(index == raw_words - 1),
            incoming.r_en.eq(use & last),
            incoming_place.addr.eq(incoming.r_data),
        ]
        following = Signal(code_.parity.degree)
        masked = Mux(last, word & ((1 << bits - padding) - 1), word) if padding else word
        other = Cat(~word.word_select(i, 8).all() for i in range(config.beat_bytes))
        m.d.comb += following.eq(divided(m, "parity", code_.parity, remainder, masked))
        m.d.sync += ended.eq(use & last)
        with m.If(use):
            m.d.sync += [
                index.eq(index + 1),
                remainder.eq(following),
                others.eq(Mux(index == 0, 0, others) + ones(other)),
            ]
            with m.If(index < data_words):
                seed = seeded(incoming_place.data.page, incoming_place.data.codeword)
                m.d.sync += check.eq(divided(m, "crc", code_.crc, Mux(index == 0, seed, check), word))
            with m.If(index == data_words):
                m.d.sync += check.eq(check ^ word[:CRC_BITS])
            with m.If(last):
                m.d.sync += [index.eq(0), remainder.eq(origin), ended_remainder.eq(following),
                             ended_buffer.eq(incoming.r_data)]

        # ---- What becomes of them. ----

        leaving_shape = data.StructLayout({"buffer": buffer, "error": 1})
        leaving = fifo("leaving", leaving_shape.size)
        pending = fifo("pending", buffer.width)                  # buffers that wait for the corrector
        m.submodules.problems = problems = Memory(shape=CorrectorShapes(config).problem, depth=buffers, init=[])
        problems_write, problems_read = problems.write_port(), problems.read_port(domain="comb")
        m.submodules.corrector = corrector = Corrector(config, self.positions)
        result = corrector.o.payload

        clean, erased = Signal(), Signal()
        refused = Signal()                                 # an announced codeword that cannot be read
        end, end_buffer, cause = Signal(), Signal(buffer), Signal(CAUSE_BITS)
        m.d.comb += [
            self.header.ready.eq(free.any() & ~ended),
            take.eq(self.header.valid & self.header.ready),
            refused.eq(take & (header.cause != 0)),
            incoming.w_en.eq(take & (header.cause == 0)),
            incoming.w_data.eq(allocated),
            clean.eq(~(ended_remainder.any() | check.any())),
            erased.eq(others <= config.ecc_t),
            problems_write.addr.eq(ended_buffer),
            problems_write.data.remainder.eq(ended_remainder),
            problems_write.data.check.eq(check),
            problems_write.en.eq(ended),
            pending.w_data.eq(ended_buffer),
            pending.w_en.eq(ended & ~clean & ~erased),
        ]

        at_corrector = Signal()
        again = Signal()                                   # result: not good, but there is another level
        given_up, given_up_buffer, given_up_cause = Signal(), Signal(buffer), Signal(CAUSE_BITS)
        m.d.comb += [
            problem_buffer.eq(pending.r_data),
            problem_name.addr.eq(problem_buffer),
            problems_read.addr.eq(problem_buffer),
            corrector.i.payload.eq(problems_read.data),
            corrector.i.valid.eq(pending.r_rdy & ~at_corrector),
            again.eq(~result.good & (problem_name.data.level < config.part.retry_levels)),
            corrector.o.ready.eq(Mux(again, ~self.retry.valid & ~given_up, ~ended & ~refused)),
            pending.r_en.eq(corrector.o.valid & corrector.o.ready),
            dropped.eq(pending.r_en & again),
        ]
        with m.If(corrector.i.valid & corrector.i.ready):
            m.d.sync += at_corrector.eq(1)
        with m.If(pending.r_en):
            m.d.sync += at_corrector.eq(0)

        with m.If(ended):
            m.d.comb += [
                end.eq(clean | erased),
                end_buffer.eq(ended_buffer),
                cause.eq(Mux(erased, MediaCause.ERASED, 0)),
            ]
        with m.Elif(refused):
            m.d.comb += [end.eq(1), end_buffer.eq(allocated), cause.eq(header.cause)]
        with m.Else():
            m.d.comb += [
                end.eq(pending.r_en & ~again),
                end_buffer.eq(problem_buffer),
                cause.eq(Mux(result.good, 0, MediaCause.UNCORRECTABLE)),
            ]
        m.d.comb += [leaving.w_en.eq(end), leaving.w_data.eq(Cat(end_buffer, cause != 0))]
        m.d.sync += [
            given_up.eq(end & (cause != 0)),
            given_up_buffer.eq(end_buffer),
            given_up_cause.eq(cause),
            self.codeword.eq(use & last),
            self.corrected.eq(pending.r_en & result.good),
            self.bit_errors.eq(Mux(pending.r_en & result.good, result.errors, 0)),
        ]
        m.d.comb += [
            ended_place.addr.eq(Mux(given_up, given_up_buffer, problem_buffer)),
            self.unreadable.eq(given_up),
            self.media_error.page.eq(ended_place.data.page),
            self.media_error.codeword.eq(ended_place.data.codeword),
            self.media_error.cause.eq(given_up_cause),
        ]
        with m.If(self.retry.ready):
            m.d.sync += self.retry.valid.eq(0)
        with m.If(dropped):
            m.d.sync += [
                self.retry.valid.eq(1),
                self.retry.payload.tag.eq(problem_name.data.tag),
                self.retry.payload.page.eq(ended_place.data.page),
                self.retry.payload.codeword.eq(ended_place.data.codeword),
                self.retry.payload.level.eq(problem_name.data.level + 1),
            ]

        # ---- Ports of the memory of words: a patch takes the read port at once, the write port when it is free. ----

        patch = corrector.patches
        incoming_data, patching, patched = Signal(), Signal(), Signal()
        mended = Signal(bits, reset_less=True)
        fetch = Signal()
        head = data.View(leaving_shape, leaving.r_data)
        beat_index = Signal(range(beats))
        m.d.comb += [
            incoming_data.eq(use & (index < beats)),
            words_write.en.eq(incoming_data | patched),
            words_write.addr.eq(Mux(incoming_data, Cat(index[:beat_bits], incoming.r_data),
                                    Cat(patch.payload.index[:beat_bits], problem_buffer))),
            words_write.data.eq(Mux(incoming_data, word, mended)),
            words_read.addr.eq(Mux(fetch, Cat(beat_index, head.buffer),
                                   Cat(patch.payload.index[:beat_bits], problem_buffer))),
            patch.ready.eq(patched & ~incoming_data),
        ]
        reading = Signal()
        m.d.comb += reading.eq(patch.valid & ~patching & ~patched)
        m.d.sync += patching.eq(reading)
        with m.If(patching):
            m.d.sync += [mended.eq(words_read.data ^ patch.payload.mask), patched.eq(1)]
        with m.Elif(~incoming_data):
            m.d.sync += patched.eq(0)

        # ---- Beats that leave. ----

        m.submodules.beats = queue = SyncFIFO(width=shapes.beat.size, depth=_BEATS_AHEAD)
        fetched = Signal()
        fetched_beat = Signal(data.StructLayout({"tag": shapes.tag, "last": 1, "error": 1}), reset_less=True)
        beat = Signal(shapes.beat)
        final = Signal()
        m.d.comb += [
            fetch.eq(leaving.r_rdy & ~reading & (queue.level + fetched < _BEATS_AHEAD)),
            final.eq(beat_index == beats - 1),
            leaving.r_en.eq(fetch & final),
            release.eq(fetch & final),
            released.eq(head.buffer),
            leaving_name.addr.eq(head.buffer),
            beat.tag.eq(fetched_beat.tag),
            beat.data.eq(Mux(fetched_beat.error, 0, words_read.data)),
            beat.last.eq(fetched_beat.last),
            beat.error.eq(fetched_beat.error),
            queue.w_data.eq(beat),
            queue.w_en.eq(fetched),
            self.codewords.valid.eq(queue.r_rdy),
            self.codewords.payload.eq(queue.r_data),
            queue.r_en.eq(self.codewords.ready),
        ]
        m.d.sync += [
            fetched.eq(fetch),
            fetched_beat.tag.eq(leaving_name.data.tag),
            fetched_beat.last.eq(final),
            fetched_beat.error.eq(head.error),
        ]
        with m.If(fetch):
            m.d.sync += beat_index.eq(Mux(final, 0, beat_index + 1))
        return m
