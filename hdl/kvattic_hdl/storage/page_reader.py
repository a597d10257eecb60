"""Serves flash channels with the pages of device DRAM that are to be programmed."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import PAGE_BITS, Shapes

PAGE_CODEWORDS = 4
"""Codewords buffered for each channel ahead of its encoder."""


def fetch_layout() -> data.StructLayout:
    """A page to be programmed: its number in device DRAM, and the flash page that it is for."""
    return data.StructLayout({"dram_page": PAGE_BITS, "page": PAGE_BITS})


class PageReader(wiring.Component):
    """Offers the codewords of pages to be programmed, channel by channel, and gives their words to the channels.

    Latency: a page is offered two cycles after it came, at the earliest; a word is given the cycle after it came.
    Throughput: a codeword a cycle; a word a cycle for each channel.  Ordering: of each channel as they came.  Reset
    forgets everything.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    fetches : Array of In(stream of fetch_layout)
        Pages that each channel will program, in order.
    wanted, page, codeword, channel : Out
        A codeword that has room: its page, its number in the page, and the channel that it is for.
    take : In(1)
        Strobe: it is read.
    arrived, data, bad : In
        Strobe: a word of a codeword; it was answered with an error.
    to, to_page : In(channel), In(24)
        Whose the word is, and the flash page that it is for.
    page_words : Array of Out(stream of page_word)
        The words, for each channel.
    failed : Out(channels)
        Strobe: the memory answered a read of the channel's page with an error.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "fetches": In(stream.Signature(fetch_layout())).array(config.channels),
            "wanted": Out(1),
            "page": Out(fetch_layout()),
            "codeword": Out(unsigned(max(1, ceil_log2(config.codewords_per_page)))),
            "channel": Out(shapes.channel),
            "take": In(1),
            "arrived": In(1),
            "data": In(config.dram_beat_bytes * 8),
            "bad": In(1),
            "to": In(shapes.channel),
            "to_page": In(PAGE_BITS),
            "page_words": Out(stream.Signature(shapes.page_word)).array(config.channels),
            "failed": Out(config.channels),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        pages, valids, numbers = [], [], []
        for channel in range(config.channels):
            fetch = SyncFIFOBuffered(width=fetch_layout().size, depth=64)
            m.submodules[f"fetch_{channel}"] = fetch
            room = Signal(range(PAGE_CODEWORDS + 1), init=PAGE_CODEWORDS, name=f"room_{channel}")
            number = Signal(range(config.codewords_per_page), name=f"codeword_{channel}")
            last = number == config.codewords_per_page - 1
            taken = Signal(name=f"page_taken_{channel}")
            given = self._give(m, channel)
            m.d.comb += [
                fetch.w_data.eq(self.fetches[channel].payload),
                fetch.w_en.eq(self.fetches[channel].valid),
                self.fetches[channel].ready.eq(fetch.w_rdy),
                taken.eq(self.take & (self.channel == channel)),
                fetch.r_en.eq(taken & last),
            ]
            with m.If(taken):
                m.d.sync += number.eq(Mux(last, 0, number + 1))
            m.d.sync += room.eq(room - taken + given)
            pages.append(fetch.r_data)
            valids.append(fetch.r_rdy & room.any())
            numbers.append(number)
        m.d.comb += [
            self.page.eq(Array(pages)[self.channel]),
            self.wanted.eq(Array(valids)[self.channel]),
            self.codeword.eq(Array(numbers)[self.channel]),
        ]
        # On to the next channel where there is nothing to do, or after a codeword.
        with m.If(~self.wanted | self.take):
            m.d.sync += self.channel.eq(Mux(self.channel == config.channels - 1, 0, self.channel + 1))
        return m

    def _give(self, m: Module, channel: int) -> Value:
        """Words of a channel's pages; strobe: a codeword is given."""
        config, words = self._config, self.page_words[channel]
        dram_words = config.dram_beat_bytes // config.word_bytes
        codeword_words = config.codeword_bytes // config.word_bytes
        burst = config.codeword_bytes // config.dram_beat_bytes
        data_bits = len(self.data)
        m.submodules[f"store_{channel}"] = store = SyncFIFO(
            width=data_bits + PAGE_BITS, depth=PAGE_CODEWORDS * burst)
        given = Signal(name=f"given_{channel}")
        out = Signal(range(codeword_words), name=f"out_{channel}")
        here = self.arrived & (self.to == channel)
        m.d.comb += [
            store.w_en.eq(here),
            store.w_data.eq(Cat(self.data, self.to_page)),
            self.failed[channel].eq(here & self.bad),
            words.valid.eq(store.r_rdy),
            words.payload.data.eq(
                store.r_data.word_select(out[: ceil_log2(dram_words)], config.word_bytes * 8)
                if dram_words > 1 else store.r_data[:data_bits]),
            words.payload.page.eq(store.r_data[data_bits:]),
            store.r_en.eq(words.valid & words.ready & (out % dram_words == dram_words - 1)),
            given.eq(words.valid & words.ready & (out == codeword_words - 1)),
        ]
        with m.If(words.valid & words.ready):
            m.d.sync += out.eq(Mux(given, 0, out + 1))
        return given
