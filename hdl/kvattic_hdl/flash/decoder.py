"""Codewords from the flash bus: checks them, has them corrected, hands their tokens on."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.spec.commands import MediaCause
from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.scheduling import CORRECTOR_POSITIONS
from kvattic_hdl.flash.codeword_words import Departure, WordChecker, WordMemory, WordShapes
from kvattic_hdl.flash.corrections import CorrectorShapes, ProblemSender, corrections_signature
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.flash.encoder import seeded
from kvattic_hdl.flash.interfaces import CAUSE_BITS, FlashShapes
from kvattic_hdl.flash.steps import steps_signature

AT_CORRECTOR = 2
"""Codewords of a channel that the corrector may have: while one is searched, the next one's locator is found."""


class BufferQueue(wiring.Component):
    """Queues what is known of buffers.  There is at most one entry for each, so that it is never full.

    Parameters
    ----------
    width : int
        Bits of an entry.
    depth : int
        Buffers.

    Members
    -------
    w_data : In(width), w_en : In(1)
    r_data : Out(width), r_rdy : Out(1)
        The oldest entry, a cycle after it was written.
    r_en : In(1)
        It is taken; only with `r_rdy`.
    """

    def __init__(self, width: int, depth: int) -> None:
        self.depth = depth
        super().__init__({"w_data": In(width), "w_en": In(1), "r_data": Out(width), "r_rdy": Out(1), "r_en": In(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.entries = entries = Memory(shape=self.r_data.shape(), depth=self.depth, init=[])
        write, read = entries.write_port(), entries.read_port(domain="comb")
        ends = []
        for port, step in ((write, self.w_en), (read, self.r_en)):
            round_ = Signal()      # changes with each way round the memory
            place = Signal(range(self.depth))
            with m.If(step):
                m.d.sync += place.eq(place + 1)
                with m.If(place == self.depth - 1):
                    m.d.sync += [place.eq(0), round_.eq(~round_)]
            m.d.comb += port.addr.eq(place)
            ends.append(Cat(place, round_))
        m.d.comb += [
            write.data.eq(self.w_data), write.en.eq(self.w_en),
            self.r_data.eq(read.data), self.r_rdy.eq(ends[0] != ends[1])]
        return m


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
        Bits of a codeword that the corrector searches in one cycle: 1, 2, 4, 8 or 16.
    shares : bool
        There are two members more: steps, Out(steps_signature), and corrections, Out(corrections_signature). Through
        them steps and corrections are made outside, for others, too; steps cannot wait.

    Members
    -------
    header : In(stream.Signature(shapes.header))
        Announces a codeword, before its first word or with it; taken while a buffer is free.
    words : In(word_bytes * 8)
        A raw word of the oldest announced codeword that is not complete.
    words_valid : In(1)
        There is a word; it cannot be held back.
    codewords : Out(stream.Signature(shapes.channel_word))
        `words_per_codeword` beats of each codeword; the data of error beats are zero.
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

    def __init__(self, config: Config, buffers: int = 8, positions: int = CORRECTOR_POSITIONS, *,
                 shares: bool = False) -> None:
        if buffers < 2:
            raise ValueError(f"buffers must be at least 2, not {buffers!r}")
        self.config = config
        self.buffers = buffers
        self.positions = positions
        self.inside = inside = WordShapes(config, buffers)
        self.shares = shares
        self.checker = WordChecker(config, buffers, shares=shares)
        self.memory = WordMemory(config, buffers)
        self.departure = Departure(config, buffers)
        self.sender = ProblemSender(config, buffers)
        # Buffers that wait for words, in order, with what their check value begins with; that leave; that the corrector
        # has not taken; that it has not finished; that it has, with its results.
        result = data.StructLayout({"buffer": inside.buffer, "found": CorrectorShapes(config).result})
        self.incoming, self.leaving, self.unsent, self.pending, self.results = (
            BufferQueue(width, depth) for width, depth in (
                (inside.buffer.width + CRC_BITS, buffers), (inside.leaving.size, buffers),
                (inside.buffer.width, buffers), (inside.buffer.width, buffers), (result.size, AT_CORRECTOR)))
        # The result that is used next: there is one, which; it is used in this cycle.
        self.finished, self.concluded = Signal(), Signal()
        self.result = Signal(CorrectorShapes(config).result, reset_less=True)
        # What becomes of a codeword in this cycle: it ends, with a cause if it cannot be read; or is read again.
        self.end, self.end_buffer, self.cause = Signal(), Signal(inside.buffer), Signal(CAUSE_BITS)
        self.again = Signal()                     # the corrector's result is not good, but there is another level
        self.dropped = Signal()                   # its codeword is read again
        self.problem_buffer = Signal(inside.buffer)   # whose codeword that is
        self.searched = Signal(inside.buffer)         # whose codeword the corrector searches
        self.allocated = Signal(inside.buffer)
        shapes = FlashShapes(config)
        super().__init__({
            **({"steps": Out(steps_signature(config)), "corrections": Out(corrections_signature(config))}
               if shares else {}),
            "header": In(stream.Signature(shapes.header)),
            "words": In(config.word_bytes * 8),
            "words_valid": In(1),
            "codewords": Out(stream.Signature(shapes.channel_word)),
            "retry": Out(stream.Signature(shapes.retry)),
            "codeword": Out(1),
            "corrected": Out(1),
            "bit_errors": Out(unsigned(bits_for(config.ecc_t))),
            "unreadable": Out(1),
            "media_error": Out(shapes.media_error),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name in ("checker", "memory", "departure", "sender", "incoming", "leaving", "unsent", "pending", "results"):
            m.submodules[name] = getattr(self, name)
        if self.shares:
            connect(m, self.checker.steps, flipped(self.steps))
            corrections = self.corrections
        else:
            m.submodules.corrector = own = Corrector(self.config, positions=self.positions)
            corrections = own.channels[0]
        take = Signal()
        m.d.comb += take.eq(self.header.valid & self.header.ready)
        self._allocate(m, take)
        ended_place, problem_name = self._remember(m, take)
        self._keep_words(m, corrections)
        self._decide(m, take)
        self._correct(m, take, corrections, problem_name)
        self._report(m, ended_place, problem_name)
        return m

    def _allocate(self, m: Module, take: Signal) -> None:
        """Give each announced codeword a buffer, until it has left or is to be read again."""
        buffers = self.buffers
        free = Signal(buffers, init=-1)
        for i in reversed(range(buffers)):
            with m.If(free[i]):
                m.d.comb += self.allocated.eq(i)

        def one(valid: Value, buffer: Value) -> Value:
            return valid.replicate(buffers) & (1 << buffer)[:buffers]

        release = self.departure.leaving.valid & self.departure.leaving.ready
        m.d.comb += self.header.ready.eq(free.any() & ~self.checker.ended)
        m.d.sync += free.eq(
            (free | one(release, self.departure.leaving.payload.buffer) | one(self.dropped, self.problem_buffer))
            & ~one(take, self.allocated))

    def _remember(self, m: Module, take: Signal) -> tuple[Any, Any]:
        """Keep what is known of each buffer's codeword.

        Returns the read ports for the place of one that has ended, and for the name of the corrector's.
        """
        shapes, header = self.inside, self.header.payload
        place = data.StructLayout({"page": header.page.shape(), "codeword": shapes.codeword_index})
        name = data.StructLayout({"tag": shapes.tag, "level": shapes.level})
        m.submodules.places = places = Memory(shape=place, depth=self.buffers, init=[])
        m.submodules.names = names = Memory(shape=name, depth=self.buffers, init=[])
        for memory, fields in ((places, ("page", "codeword")), (names, ("tag", "level"))):
            port = memory.write_port()
            m.d.comb += [port.addr.eq(self.allocated), port.en.eq(take)]
            m.d.comb += [port.data[f].eq(header[f]) for f in fields]
        ended_place = places.read_port(domain="comb")
        leaving_name, problem_name = (names.read_port(domain="comb") for _ in range(2))
        m.d.comb += [
            leaving_name.addr.eq(self.departure.leaving.payload.buffer),
            self.departure.tag.eq(leaving_name.data.tag),
            problem_name.addr.eq(self.problem_buffer),
        ]
        return ended_place, problem_name

    def _keep_words(self, m: Module, corrections: Any) -> None:
        """Words: from the bus to the memory, patched there, and on their way out."""
        checker, memory, departure = self.checker, self.memory, self.departure
        connect(m, departure.codewords, flipped(self.codewords))
        m.d.comb += [
            checker.words.eq(self.words),
            checker.words_valid.eq(self.words_valid),
            Cat(checker.buffers.payload, checker.seed).eq(self.incoming.r_data),
            checker.buffers.valid.eq(self.incoming.r_rdy),
            self.incoming.r_en.eq(checker.buffers.ready),
            memory.store.eq(checker.store),
            memory.store_address.eq(checker.address),
            memory.word.eq(checker.word),
            memory.patches.payload.eq(corrections.patches.payload),
            memory.patches.valid.eq(corrections.patches.valid),
            corrections.patches.ready.eq(memory.patches.ready),
            memory.patch_buffer.eq(self.searched),
            memory.fetch.eq(departure.fetch),
            memory.fetch_address.eq(departure.fetch_address),
            departure.busy.eq(memory.reading),
            departure.fetched.eq(memory.fetched),
            departure.leaving.payload.eq(self.leaving.r_data),
            departure.leaving.valid.eq(self.leaving.r_rdy),
            self.leaving.r_en.eq(departure.leaving.ready),
        ]

    def _decide(self, m: Module, take: Signal) -> None:
        """What becomes of a codeword whose words came, that is announced with a cause, or that the corrector had."""
        checker, header, result = self.checker, self.header.payload, self.result
        with m.If(checker.ended):
            m.d.comb += [
                self.end.eq(checker.clean | checker.erased),
                self.end_buffer.eq(checker.ended_buffer),
                self.cause.eq(Mux(checker.erased, MediaCause.ERASED, 0)),
            ]
        with m.Elif(take & (header.cause != 0)):
            m.d.comb += [self.end.eq(1), self.end_buffer.eq(self.allocated), self.cause.eq(header.cause)]
        with m.Else():
            m.d.comb += [
                self.end.eq(self.concluded & ~self.again),
                self.end_buffer.eq(self.problem_buffer),
                self.cause.eq(Mux(result.good, 0, MediaCause.UNCORRECTABLE)),
            ]
        leaving = data.View(self.inside.leaving, self.leaving.w_data)
        m.d.comb += [
            self.incoming.w_en.eq(take & (header.cause == 0)),
            self.incoming.w_data.eq(Cat(self.allocated, seeded(header.page, header.codeword))),
            self.leaving.w_en.eq(self.end),
            leaving.buffer.eq(self.end_buffer),
            leaving.error.eq(self.cause != 0),
        ]
        for queue in (self.unsent, self.pending):
            m.d.comb += [
                queue.w_data.eq(checker.ended_buffer),
                queue.w_en.eq(checker.ended & ~checker.clean & ~checker.erased),
            ]

    def _correct(self, m: Module, take: Signal, corrections: Any, problem_name: Any) -> None:
        """Give the corrector one codeword after the other, and have those that it gives up read again."""
        checker, unsent, pending, results, sender = (
            self.checker, self.unsent, self.pending, self.results, self.sender)
        there = Signal()                              # the sender's buffer is the first one that was not sent
        under_way = Signal(range(AT_CORRECTOR + 1))   # taken by the corrector, and their results were not used yet
        refused = take & (self.header.payload.cause != 0)
        m.d.comb += [
            sender.store.eq(checker.ended),
            sender.store_buffer.eq(checker.ended_buffer),
            sender.problem.remainder.eq(checker.remainder),
            sender.problem.check.eq(checker.check),
            sender.taken.eq(corrections.taken),
            unsent.r_en.eq(corrections.taken),
            corrections.wanted.eq(there & (under_way != AT_CORRECTOR)),
            corrections.chunk.eq(sender.chunk),
            corrections.chunk_valid.eq(sender.chunk_valid),
            pending.r_en.eq(corrections.ended),
            results.w_en.eq(corrections.ended),
            results.w_data.eq(Cat(self.searched, corrections.result)),
            results.r_en.eq(results.r_rdy & ~self.finished),
            self.again.eq(~self.result.good & (problem_name.data.level < self.config.part.retry_levels)),
            self.concluded.eq(self.finished & Mux(
                self.again, ~self.retry.valid & ~self.unreadable, ~checker.ended & ~refused)),
            self.dropped.eq(self.concluded & self.again),
        ]
        m.d.sync += [
            self.searched.eq(pending.r_data),
            under_way.eq(under_way + corrections.taken - self.concluded),
            there.eq(unsent.r_rdy & ~corrections.taken & ~sender.sending),
        ]
        with m.If(~corrections.taken & ~sender.sending):
            m.d.sync += sender.buffer.eq(unsent.r_data)
        with m.If(results.r_en):
            m.d.sync += [self.finished.eq(1), Cat(self.problem_buffer, self.result).eq(results.r_data)]
        with m.Elif(self.concluded):
            m.d.sync += self.finished.eq(0)

    def _report(self, m: Module, ended_place: Any, problem_name: Any) -> None:
        """Tell what was corrected, what is given up, and what is to be read again."""
        result, retry = self.result, self.retry.payload
        end_buffer, cause = Signal(self.inside.buffer), Signal(CAUSE_BITS)
        m.d.sync += [
            self.unreadable.eq(self.end & (self.cause != 0)),
            end_buffer.eq(self.end_buffer),
            cause.eq(self.cause),
            self.codeword.eq(self.checker.last),
            self.corrected.eq(self.concluded & result.good),
            self.bit_errors.eq(Mux(self.concluded & result.good, result.errors, 0)),
        ]
        m.d.comb += [
            ended_place.addr.eq(Mux(self.unreadable, end_buffer, self.problem_buffer)),
            self.media_error.page.eq(ended_place.data.page),
            self.media_error.codeword.eq(ended_place.data.codeword),
            self.media_error.cause.eq(cause),
        ]
        with m.If(self.retry.ready):
            m.d.sync += self.retry.valid.eq(0)
        with m.If(self.dropped):
            m.d.sync += [
                self.retry.valid.eq(1),
                retry.tag.eq(problem_name.data.tag),
                retry.page.eq(ended_place.data.page),
                retry.codeword.eq(ended_place.data.codeword),
                retry.level.eq(problem_name.data.level + 1),
            ]
