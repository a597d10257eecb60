"""Serves lanes with codewords of the tail, which lies in device DRAM."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import next_of
from kvattic_hdl.lib.shapes import EPOCH_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import StreamBuffer
from kvattic_hdl.storage.queue_set import QueueSet

TAIL_CODEWORDS = 4
"""Tail codewords that are on their way to a lane."""


class TailReader(wiring.Component):
    """Offers the lanes' requests in turn, and gives each codeword that comes to the lane that asked for it.

    Latency: a request is offered four cycles after it came, at the earliest.  Throughput: a request every fourth cycle;
    a word a cycle, over all lanes.  Ordering: codewords come and go in the order in which they were taken.  Reset
    forgets everything.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    tails : Array of In(stream of request)
        Codewords that each lane wants of DRAM.
    value_open, epoch : In
        As of the engine.
    wanted, request, lane : Out(1), Out(request), Out(lane)
        A request that is welcome and has room, and the lane that it is of.
    take : In(1)
        Strobe: it is read.
    arrived, last, bad : In
        Strobe: a row of a codeword; the last one; it was answered with an error.
    to : In(lane, tag)
        Whose the codeword is.
    words : In(stream of word_bytes * 8)
        What was read.
    codewords : Array of Out(stream of channel_word)
        The codewords, for each lane; `error` where the memory answered with one.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "tails": In(stream.Signature(shapes.request)).array(config.lanes),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "wanted": Out(1),
            "request": Out(shapes.request),
            "lane": Out(shapes.lane),
            "take": In(1),
            "arrived": In(1),
            "last": In(1),
            "bad": In(1),
            "words": In(stream.Signature(unsigned(config.word_bytes * 8))),
            "to": In(data.StructLayout({"lane": shapes.lane, "tag": shapes.tag})),
            "codewords": Out(stream.Signature(shapes.channel_word)).array(config.lanes),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        room = Signal(range(TAIL_CODEWORDS + 1), init=TAIL_CODEWORDS)
        given = self._give(m)
        self._offer(m, room.any())
        m.d.sync += room.eq(room - self.take + given)
        return m

    def _offer(self, m: Module, room: Value) -> None:
        """A lane's requests wait here until they are welcome; one lane is looked at, until another has one."""
        config, shapes, request = self._config, self._shapes, self.request
        m.submodules.requests = requests = QueueSet(shapes.request, config.lanes, 2 * config.codewords_per_page)
        valids = Signal(config.lanes)
        coming = Signal(shapes.lane)   # whose request may come in
        m.d.comb += [
            valids.eq(Cat(tail.valid for tail in self.tails)),
            requests.i.payload.queue.eq(coming),
            requests.i.payload.item.eq(Array(tail.payload.as_value() for tail in self.tails)[coming]),
            requests.i.valid.eq(valids.bit_select(coming, 1)),
            requests.queue.eq(self.lane),
            requests.pop.eq(self.take),
            request.eq(requests.head),
        ]
        for lane, tail in enumerate(self.tails):
            m.d.comb += tail.ready.eq(requests.i.ready & (coming == lane))
        with m.If(~requests.i.valid | ~requests.i.ready):
            m.d.sync += coming.eq(next_of(m, valids, coming, "next_lane"))
        # A lane is chosen, its first request is read, judged, and offered if it is welcome, which it stays.
        slot = request.tag.slot
        following = next_of(m, requests.waiting, self.lane, "following")
        with m.FSM(name="choice"):
            with m.State("CHOOSE"):
                m.d.sync += self.lane.eq(following)
                with m.If(requests.waiting.any()):
                    m.next = "READ"
            with m.State("READ"):
                m.next = "JUDGE"
            with m.State("JUDGE"):
                welcome = (request.tag.kind != Kind.VALUE) | self.value_open.bit_select(slot, 1) | (
                    request.tag.epoch != self.epoch.as_value().word_select(slot, EPOCH_BITS))
                m.d.sync += self.wanted.eq(welcome & room)
                m.next = "CHOOSE"
                with m.If(welcome & room):
                    m.next = "OFFER"
            with m.State("OFFER"):
                with m.If(self.take):
                    m.d.sync += self.wanted.eq(0)
                    m.next = "CHOOSE"

    def _give(self, m: Module) -> Value:
        """Codewords, in order, a word at a time; strobe: one is given."""
        config, shapes, words = self._config, self._shapes, self.words
        codeword_words = config.codeword_bytes // config.word_bytes
        sent_layout = data.StructLayout({"lane": shapes.lane, "tag": shapes.tag, "error": 1})
        m.submodules.sent = sent = SyncFIFO(width=sent_layout.size, depth=TAIL_CODEWORDS)
        to = data.View(sent_layout, sent.r_data)
        wrong = Signal()    # a row of the codeword that is arriving was answered with an error
        count = Signal(range(codeword_words))   # of words
        flush = Signal()
        # Words leave through a buffer: a lane's crossing takes one or not after it has looked at what is offered.
        m.submodules.out = out = StreamBuffer(data.StructLayout({"lane": shapes.lane, "word": shapes.channel_word}))
        word = out.i.payload.word
        m.d.comb += [
            sent.w_en.eq(self.arrived & self.last),
            sent.w_data.eq(Cat(self.to, wrong | self.bad)),
            word.tag.eq(to.tag),
            word.error.eq(to.error),
            word.data.eq(words.payload),
            word.last.eq(count == config.words_per_codeword - 1),
            # Padding behind the last token is read and not sent.
            flush.eq(count >= config.words_per_codeword),
            out.i.valid.eq(sent.r_rdy & words.valid & ~flush),
            out.i.payload.lane.eq(to.lane),
            out.o.ready.eq(Array(codewords.ready for codewords in self.codewords)[out.o.payload.lane]),
            words.ready.eq(sent.r_rdy & (flush | out.i.ready)),
            sent.r_en.eq(words.valid & words.ready & (count == codeword_words - 1)),
        ]
        with m.If(self.arrived):
            m.d.sync += wrong.eq((wrong | self.bad) & ~self.last)
        with m.If(words.valid & words.ready):
            m.d.sync += count.eq(Mux(sent.r_en, 0, count + 1))
        for lane, codewords in enumerate(self.codewords):
            m.d.comb += [
                codewords.payload.eq(out.o.payload.word),
                codewords.valid.eq(out.o.valid & (out.o.payload.lane == lane))]
        return sent.r_en
