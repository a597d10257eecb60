"""Reads codewords of device DRAM: the tail for the lanes, and the pages that are to be programmed."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.axi import ADDRESS_BITS, AXI_READ, BURST_INCR, CACHE_NORMAL, OKAY
from kvattic_hdl.lib.shapes import EPOCH_BITS, PAGE_BITS, Shapes
from kvattic_hdl.storage.page_reader import PAGE_CODEWORDS, PageReader, fetch_layout
from kvattic_hdl.storage.row_store import RowStore
from kvattic_hdl.storage.tail_reader import TAIL_CODEWORDS, TailReader

KEPT_CODEWORDS = max(PAGE_CODEWORDS, TAIL_CODEWORDS)
"""Codewords kept for each channel's pages, and for the tail."""
OUTSTANDING = 8
"""Codewords that are asked for and have not come, at most: covers the memory's latency."""


def dram_signature(config: Config) -> wiring.Signature:
    """Read channels of AXI4, seen from the manager, `dram_beat_bytes` wide."""
    return wiring.Signature({
        name: In(config.dram_beat_bytes * 8) if name == "rdata" else member
        for name, member in AXI_READ.members.items()})


class DramReader(wiring.Component):
    """Serves lanes with codewords of DRAM pages, and flash channels with whole pages to be programmed.

    One burst is one codeword.  Tail codewords go first; they come out one at a time, a word a cycle, to the lane that
    asked.  Page words come out on all channels side by side, a word a cycle each.  A tail codeword of V is read when
    it is welcome (`value_open`, `epoch`).  Reset forgets everything; reads under way must have ended.

    Parameters
    ----------
    config : Config

    Members
    -------
    tails : Array of In(stream of request)
        Codewords that each lane wants of DRAM.
    codewords : Array of Out(stream of channel_word)
        The same, for each lane; `error` where the memory answered with one.
    value_open, epoch : In
        As of the engine.
    fetches : In(stream of fetch_layout)
        Pages that the channels will program, of each channel in order.
    page_words : Array of Out(stream of page_word)
        Their words, for each channel.
    failed : Out(channels)
        Strobe: the memory answered a read of the channel's page with an error.
    axi : Out(dram_signature)
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        channels, lanes = config.channels, config.lanes
        super().__init__({
            "tails": In(stream.Signature(shapes.request)).array(lanes),
            "codewords": Out(stream.Signature(shapes.channel_word)).array(lanes),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "fetches": In(stream.Signature(fetch_layout(config))),
            "page_words": Out(stream.Signature(shapes.page_word)).array(channels),
            "failed": Out(channels),
            "axi": Out(dram_signature(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self._config, self._shapes
        m.submodules.tails = tails = TailReader(config)
        m.submodules.pages = pages = PageReader(config)
        m.submodules.store = store = RowStore(config, KEPT_CODEWORDS * config.codeword_bytes // config.dram_beat_bytes)
        connect(m, flipped(self.fetches), pages.fetches)
        connect(m, store.tail_words, tails.words)
        for lane in range(config.lanes):
            connect(m, flipped(self.tails[lane]), tails.tails[lane])
            connect(m, tails.codewords[lane], flipped(self.codewords[lane]))
        for channel in range(config.channels):
            connect(m, store.words[channel], pages.words[channel])
            connect(m, pages.page_words[channel], flipped(self.page_words[channel]))
        m.d.comb += [
            tails.value_open.eq(self.value_open),
            tails.epoch.eq(self.epoch),
            self.failed.eq(pages.failed),
        ]
        # What is asked for, in the order of the answers; `to`: a page's channel, or a tail's lane.
        asked_layout = data.StructLayout({"program": 1, "to": shapes.channel, "tag": shapes.tag})
        m.submodules.asked = asked = SyncFIFO(width=asked_layout.size, depth=OUTSTANDING)
        self._ask(m, tails, pages, asked, data.View(asked_layout, asked.w_data))
        self._answer(m, tails, pages, store, asked, data.View(asked_layout, asked.r_data))
        return m

    def _ask(self, m: Module, tails: TailReader, pages: PageReader, asked: SyncFIFO, ask: data.View) -> None:
        """Reads a codeword of the tail, or else one of a page."""
        config, axi = self._config, self.axi
        codeword_bits = ceil_log2(config.codeword_bytes)
        page_codeword_bits = ceil_log2(config.codewords_per_page)
        free = Signal()
        wanted_page, wanted_codeword = Signal(PAGE_BITS), Signal(len(pages.codeword))
        m.d.comb += [
            free.eq((~axi.arvalid | axi.arready) & asked.w_rdy),
            tails.take.eq(free & tails.wanted),
            pages.take.eq(free & ~tails.wanted & pages.wanted),
            asked.w_en.eq(tails.take | pages.take),
            ask.program.eq(pages.take),
            ask.to.eq(Mux(pages.take, pages.channel, tails.lane)),
            ask.tag.eq(tails.request.tag),
            wanted_page.eq(Mux(pages.take, pages.page.dram_page, tails.request.page)),
            wanted_codeword.eq(Mux(pages.take, pages.codeword, tails.request.codeword)),
            axi.arid.eq(0),
            axi.arlen.eq(config.codeword_bytes // config.dram_beat_bytes - 1),
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

    def _answer(self, m: Module, tails: TailReader, pages: PageReader, store: RowStore, asked: SyncFIFO,
                answer: data.View) -> None:
        """Gives what comes to whom it was read for."""
        axi, bad = self.axi, self.axi.rresp != OKAY
        m.d.comb += [
            axi.rready.eq(1),        # room was set aside when it was asked for
            asked.r_en.eq(axi.rvalid & axi.rlast),
            store.write.eq(axi.rvalid),
            store.data.eq(axi.rdata),
            store.to.eq(answer.to),
            store.tail.eq(~answer.program),
            tails.arrived.eq(axi.rvalid & ~answer.program),
            tails.last.eq(axi.rlast),
            tails.bad.eq(bad),
            tails.to.lane.eq(answer.to),
            tails.to.tag.eq(answer.tag),
            pages.bad.eq(axi.rvalid & answer.program & bad),
            pages.to.eq(answer.to),
        ]
