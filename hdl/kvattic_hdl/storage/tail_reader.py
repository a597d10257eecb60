"""Serves lanes with codewords of the tail, which lies in device DRAM."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import EPOCH_BITS, Shapes

TAIL_CODEWORDS = 4
"""Tail codewords that are on their way to a lane."""


class TailReader(wiring.Component):
    """Offers the lanes' requests in turn, and gives each codeword that comes to the lane that asked for it.

    Latency: a request is offered two cycles after it came, at the earliest; a beat is given the cycle after its word
    came.  Throughput: a request every second cycle; a beat a cycle, over all lanes.  Ordering: codewords come and go in
    the order in which they were taken.  Reset forgets everything.

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
    arrived, data, last, bad : In
        Strobe: a word of a codeword; the last one; it was answered with an error.
    to : In(lane, tag)
        Whose the codeword is.
    codewords : Array of Out(stream of beat)
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
            "data": In(config.dram_beat_bytes * 8),
            "last": In(1),
            "bad": In(1),
            "to": In(data.StructLayout({"lane": shapes.lane, "tag": shapes.tag})),
            "codewords": Out(stream.Signature(shapes.beat)).array(config.lanes),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        room = Signal(range(TAIL_CODEWORDS + 1), init=TAIL_CODEWORDS)
        given = self._give(m)
        self._offer(m, room.any())
        m.d.sync += room.eq(room - self.take + given)
        return m

    def _offer(self, m: Module, room: Value) -> None:
        """A lane's requests wait here until they are welcome; one lane is looked at in each cycle."""
        config, shapes, request = self._config, self._shapes, self.request
        heads, valids = [], []
        for lane, tail in enumerate(self.tails):
            queue = SyncFIFOBuffered(width=shapes.request.size, depth=2 * config.codewords_per_page)
            m.submodules[f"tail_{lane}"] = queue
            m.d.comb += [
                queue.w_data.eq(tail.payload),
                queue.w_en.eq(tail.valid),
                tail.ready.eq(queue.w_rdy),
                queue.r_en.eq(self.take & (self.lane == lane)),
            ]
            heads.append(queue.r_data)
            valids.append(queue.r_rdy)
        slot = request.tag.slot
        m.d.comb += [
            request.eq(Array(heads)[self.lane]),
            self.wanted.eq(Array(valids)[self.lane] & room & (
                (request.tag.kind != Kind.VALUE) | self.value_open.bit_select(slot, 1)
                | (request.tag.epoch != self.epoch.as_value().word_select(slot, EPOCH_BITS)))),
        ]
        # On to the next lane where there is nothing to do, or after a codeword.
        with m.If(~self.wanted | self.take):
            m.d.sync += self.lane.eq(Mux(self.lane == config.lanes - 1, 0, self.lane + 1))

    def _give(self, m: Module) -> Value:
        """Codewords, in order, one beat of the lane at a time; strobe: one is given."""
        config, shapes = self._config, self._shapes
        beat_words = config.dram_beat_bytes // config.beat_bytes
        codeword_beats = config.codeword_bytes // config.beat_bytes
        burst = config.codeword_bytes // config.dram_beat_bytes
        sent_layout = data.StructLayout({"lane": shapes.lane, "tag": shapes.tag, "error": 1})
        m.submodules.tail_store = store = SyncFIFO(width=len(self.data), depth=TAIL_CODEWORDS * burst)
        m.submodules.sent = sent = SyncFIFO(width=sent_layout.size, depth=TAIL_CODEWORDS)
        to = data.View(sent_layout, sent.r_data)
        wrong = Signal()    # a beat of the codeword that is arriving was answered with an error
        count = Signal(range(codeword_beats))
        beat = Signal(shapes.beat)
        offered, accepted, flush = Signal(), Signal(), Signal()
        m.d.comb += [
            store.w_en.eq(self.arrived),
            store.w_data.eq(self.data),
            sent.w_en.eq(self.arrived & self.last),
            sent.w_data.eq(Cat(self.to, wrong | self.bad)),
            beat.tag.eq(to.tag),
            beat.error.eq(to.error),
            beat.data.eq(store.r_data.word_select(count[: ceil_log2(beat_words)], config.beat_bytes * 8)
                         if beat_words > 1 else store.r_data),
            beat.last.eq(count == config.beats_per_codeword - 1),
            # Padding behind the last token is read and not sent.
            flush.eq(sent.r_rdy & (count >= config.beats_per_codeword)),
            offered.eq(sent.r_rdy & ~flush),
            store.r_en.eq((accepted | flush) & (count % beat_words == beat_words - 1)),
            sent.r_en.eq((accepted | flush) & (count == codeword_beats - 1)),
            accepted.eq(offered & Array(codewords.ready for codewords in self.codewords)[to.lane]),
        ]
        with m.If(self.arrived):
            m.d.sync += wrong.eq((wrong | self.bad) & ~self.last)
        with m.If(accepted | flush):
            m.d.sync += count.eq(Mux(sent.r_en, 0, count + 1))
        for lane, codewords in enumerate(self.codewords):
            m.d.comb += [codewords.payload.eq(beat), codewords.valid.eq(offered & (to.lane == lane))]
        return sent.r_en
