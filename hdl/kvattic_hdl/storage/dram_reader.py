"""Reads codewords of device DRAM: the tail for the lanes, and the pages that are to be programmed."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.axi import ADDRESS_BITS, AXI_READ, BURST_INCR, CACHE_NORMAL, OKAY
from kvattic_hdl.lib.interfaces import EPOCH_BITS, PAGE_BITS, Shapes

OUTSTANDING = 8
"""Codewords that are asked for and have not come, at most: covers the memory's latency."""
TAIL_CODEWORDS = 4
"""Tail codewords that are on their way to a lane."""
PAGE_CODEWORDS = 4
"""Codewords buffered for each channel ahead of its encoder."""


def dram_signature(config: Config) -> wiring.Signature:
    """Read channels of AXI4, seen from the manager, `dram_beat_bytes` wide."""
    return wiring.Signature({
        name: In(config.dram_beat_bytes * 8) if name == "rdata" else member
        for name, member in AXI_READ.members.items()})


def fetch_layout() -> data.StructLayout:
    """A page to be programmed: its number in device DRAM, and the flash page that it is for."""
    return data.StructLayout({"dram_page": PAGE_BITS, "page": PAGE_BITS})


class DramReader(wiring.Component):
    """Serves lanes with codewords of DRAM pages, and flash channels with whole pages to be programmed.

    One burst is one codeword.  Tail codewords go first; they come out one at a time, a beat a cycle, to the lane that
    asked.  Page words come out on all channels side by side, a word a cycle each.  A tail codeword of V is read when
    it is welcome (`value_open`, `epoch`).  Reset forgets everything; reads under way must have ended.

    Parameters
    ----------
    config : Config

    Members
    -------
    tails : Array of In(stream of request)
        Codewords that each lane wants of DRAM.
    codewords : Array of Out(stream of beat)
        The same, for each lane; `error` where the memory answered with one.
    value_open, epoch : In
        As of the engine.
    fetches : Array of In(stream of fetch_layout)
        Pages that each channel will program, in order.
    page_words : Array of Out(stream of page_word)
        Their words, for each channel.
    failed : Out(channels)
        Strobe: the memory answered a read of the channel's page with an error.
    axi : Out(dram_signature)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        channels = config.channels
        super().__init__({
            "tails": In(stream.Signature(shapes.request)).array(channels),
            "codewords": Out(stream.Signature(shapes.beat)).array(channels),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "fetches": In(stream.Signature(fetch_layout())).array(channels),
            "page_words": Out(stream.Signature(shapes.page_word)).array(channels),
            "failed": Out(channels),
            "axi": Out(dram_signature(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        channels = range(config.channels)
        last_channel = config.channels - 1
        codeword_bits = ceil_log2(config.codeword_bytes)
        page_codeword_bits = ceil_log2(config.codewords_per_page)
        burst = config.codeword_bytes // config.dram_beat_bytes
        beat_words = config.dram_beat_bytes // config.beat_bytes
        dram_bits = config.dram_beat_bytes * 8

        # What is asked for, in the order of the answers.
        asked_layout = data.StructLayout({
            "program": 1, "channel": shapes.channel, "tag": shapes.tag, "page": PAGE_BITS})
        m.submodules.asked = asked = SyncFIFO(width=asked_layout.size, depth=OUTSTANDING)
        ask, answer = data.View(asked_layout, asked.w_data), data.View(asked_layout, asked.r_data)

        # ---------------------------------------------------------------- tails
        # A lane's requests wait here until they are welcome; one channel is looked at in each cycle.
        heads, takes = [], []
        for c in channels:
            queue = SyncFIFOBuffered(width=shapes.request.size, depth=2 * config.codewords_per_page)
            m.submodules[f"tail_{c}"] = queue
            request = self.tails[c]
            head = Signal(shapes.request, name=f"tail_head_{c}")
            m.d.comb += [
                queue.w_data.eq(request.payload),
                queue.w_en.eq(request.valid),
                request.ready.eq(queue.w_rdy),
                head.eq(queue.r_data),
            ]
            heads.append((queue.r_rdy, head))
            takes.append(queue.r_en)
        tail_at, page_at = Signal(shapes.channel), Signal(shapes.channel)
        tail = Signal(shapes.request)
        tail_there, tail_good, tail_take = Signal(), Signal(), Signal()
        tail_room = Signal(range(TAIL_CODEWORDS + 1), init=TAIL_CODEWORDS)
        slot = tail.tag.slot
        m.d.comb += [
            tail.eq(Array(head.as_value() for _, head in heads)[tail_at]),
            tail_there.eq(Array(valid for valid, _ in heads)[tail_at]),
            tail_good.eq(tail_there & tail_room.any() & (
                (tail.tag.kind != Kind.VALUE) | self.value_open.bit_select(slot, 1)
                | (tail.tag.epoch != self.epoch.as_value().word_select(slot, EPOCH_BITS)))),
        ]
        m.d.comb += [take.eq(tail_take & (tail_at == c)) for c, take in zip(channels, takes, strict=True)]

        # --------------------------------------------------------------- pages
        page_ready, page_heads, codeword_at, stores = [], [], [], []
        page_take = Signal()
        for c in channels:
            fetch = SyncFIFOBuffered(width=fetch_layout().size, depth=64)
            store = SyncFIFO(width=dram_bits + PAGE_BITS, depth=PAGE_CODEWORDS * burst)
            m.submodules[f"fetch_{c}"], m.submodules[f"store_{c}"] = fetch, store
            room = Signal(range(PAGE_CODEWORDS + 1), init=PAGE_CODEWORDS, name=f"room_{c}")
            index = Signal(range(config.codewords_per_page), name=f"codeword_{c}")
            taken = Signal(name=f"page_taken_{c}")
            given = Signal(name=f"given_{c}")
            out = Signal(range(config.codeword_bytes // config.beat_bytes), name=f"out_{c}")
            words = self.page_words[c]
            m.d.comb += [
                fetch.w_data.eq(self.fetches[c].payload),
                fetch.w_en.eq(self.fetches[c].valid),
                self.fetches[c].ready.eq(fetch.w_rdy),
                taken.eq(page_take & (page_at == c)),
                fetch.r_en.eq(taken & (index == config.codewords_per_page - 1)),
                words.valid.eq(store.r_rdy),
                words.payload.data.eq(
                    store.r_data.word_select(out[: ceil_log2(beat_words)], config.beat_bytes * 8)
                    if beat_words > 1 else store.r_data[:dram_bits]),
                words.payload.page.eq(store.r_data[dram_bits:]),
                store.r_en.eq(words.valid & words.ready & (out % beat_words == beat_words - 1)),
                given.eq(words.valid & words.ready & (out == config.codeword_bytes // config.beat_bytes - 1)),
            ]
            with m.If(words.valid & words.ready):
                m.d.sync += out.eq(Mux(given, 0, out + 1))
            with m.If(taken):
                m.d.sync += index.eq(Mux(index == config.codewords_per_page - 1, 0, index + 1))
            m.d.sync += room.eq(room - taken + given)
            page_heads.append(fetch.r_data)
            page_ready.append(fetch.r_rdy & room.any())
            codeword_at.append(index)
            stores.append(store)
        page = Signal(fetch_layout())
        page_good = Signal()
        m.d.comb += [
            page.eq(Array(page_heads)[page_at]),
            page_good.eq(Array(page_ready)[page_at]),
        ]

        # ------------------------------------------------------------ requests
        axi = self.axi
        free = Signal()
        wanted_page, wanted_codeword = Signal(PAGE_BITS), Signal(unsigned(max(1, page_codeword_bits)))
        m.d.comb += [
            free.eq((~axi.arvalid | axi.arready) & asked.w_rdy),
            tail_take.eq(free & tail_good),
            page_take.eq(free & ~tail_good & page_good),
            asked.w_en.eq(tail_take | page_take),
            ask.program.eq(page_take),
            ask.channel.eq(Mux(page_take, page_at, tail_at)),
            ask.tag.eq(tail.tag),
            ask.page.eq(page.page),
            wanted_page.eq(Mux(page_take, page.dram_page, tail.page)),
            wanted_codeword.eq(Mux(page_take, Array(codeword_at)[page_at], tail.codeword)),
            axi.arid.eq(0),
            axi.arlen.eq(burst - 1),
            axi.arsize.eq(ceil_log2(config.dram_beat_bytes)),
            axi.arburst.eq(BURST_INCR),
            axi.arcache.eq(CACHE_NORMAL),
        ]
        with m.If(axi.arready):
            m.d.sync += axi.arvalid.eq(0)
        with m.If(asked.w_en):
            m.d.sync += [
                axi.arvalid.eq(1),
                axi.araddr.eq(Cat(
                    Const(0, codeword_bits), wanted_codeword[:page_codeword_bits], wanted_page)[:ADDRESS_BITS]),
            ]
        # On to the next channel where there is nothing to do, or after a codeword.
        with m.If(~tail_good | tail_take):
            m.d.sync += tail_at.eq(Mux(tail_at == last_channel, 0, tail_at + 1))
        with m.If(~page_good | page_take):
            m.d.sync += page_at.eq(Mux(page_at == last_channel, 0, page_at + 1))

        # ------------------------------------------------------------- answers
        arrived = Signal()
        m.d.comb += [
            axi.rready.eq(1),        # room was set aside when it was asked for
            arrived.eq(axi.rvalid),
            asked.r_en.eq(arrived & axi.rlast),
        ]
        bad = axi.rresp != OKAY
        for c, store in zip(channels, stores, strict=True):
            here = arrived & answer.program & (answer.channel == c)
            m.d.comb += [
                store.w_en.eq(here),
                store.w_data.eq(Cat(axi.rdata, answer.page)),
                self.failed[c].eq(here & bad),
            ]

        # The tail's codewords, in order, one beat of the lane at a time.
        m.submodules.tail_store = tail_store = SyncFIFO(width=dram_bits, depth=TAIL_CODEWORDS * burst)
        sent_layout = data.StructLayout({"channel": shapes.channel, "tag": shapes.tag, "error": 1})
        m.submodules.sent = sent = SyncFIFO(width=sent_layout.size, depth=TAIL_CODEWORDS)
        to = data.View(sent_layout, sent.r_data)
        wrong = Signal()    # a beat of the codeword that is arriving was answered with an error
        count = Signal(range(config.codeword_bytes // config.beat_bytes))
        beat = Signal(shapes.beat)
        offered, accepted, flush = Signal(), Signal(), Signal()
        m.d.comb += [
            tail_store.w_en.eq(arrived & ~answer.program),
            tail_store.w_data.eq(axi.rdata),
            sent.w_en.eq(arrived & ~answer.program & axi.rlast),
            sent.w_data.eq(Cat(answer.channel, answer.tag, wrong | bad)),
            beat.tag.eq(to.tag),
            beat.error.eq(to.error),
            beat.data.eq(tail_store.r_data.word_select(count[: ceil_log2(beat_words)], config.beat_bytes * 8)
                         if beat_words > 1 else tail_store.r_data),
            beat.last.eq(count == config.beats_per_codeword - 1),
            # Padding behind the last token is read and not sent.
            flush.eq(sent.r_rdy & (count >= config.beats_per_codeword)),
            offered.eq(sent.r_rdy & ~flush),
            tail_store.r_en.eq((accepted | flush) & (count % beat_words == beat_words - 1)),
            sent.r_en.eq((accepted | flush) & (count == config.codeword_bytes // config.beat_bytes - 1)),
        ]
        with m.If(arrived & ~answer.program):
            m.d.sync += wrong.eq((wrong | bad) & ~axi.rlast)
        with m.If(accepted | flush):
            m.d.sync += count.eq(Mux(sent.r_en, 0, count + 1))
        m.d.sync += tail_room.eq(tail_room - tail_take + sent.r_en)
        ready = []
        for c in channels:
            m.d.comb += [
                self.codewords[c].payload.eq(beat),
                self.codewords[c].valid.eq(offered & (to.channel == c)),
            ]
            ready.append(self.codewords[c].ready)
        m.d.comb += accepted.eq(offered & Array(ready)[to.channel])
        return m

