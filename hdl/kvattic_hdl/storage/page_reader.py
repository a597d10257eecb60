"""Serves flash channels with the pages of device DRAM that are to be programmed."""

from amaranth.hdl import Array, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import next_of, strobe
from kvattic_hdl.lib.shapes import PAGE_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import StreamRegister
from kvattic_hdl.storage.queue_set import QueueSet

PAGE_CODEWORDS = 4
"""Codewords buffered for each channel ahead of its encoder."""
FETCHES = 64
"""Pages that wait for each channel."""


def page_layout() -> data.StructLayout:
    """A page to be programmed: its number in device DRAM, and the flash page that it is for."""
    return data.StructLayout({"dram_page": PAGE_BITS, "page": PAGE_BITS})


def fetch_layout(config: Config) -> data.StructLayout:
    """A page to be programmed, and the channel that it is for."""
    return data.StructLayout({"channel": Shapes(config).channel, "page": page_layout()})


class PageReader(wiring.Component):
    """Offers the codewords of pages to be programmed, channel by channel, and gives their words to the channels.

    Latency: a page is offered seven cycles after it came, at the earliest.  Throughput: a codeword every fourth cycle;
    a word a cycle for each channel.  Ordering: of each channel as they came.  Reset forgets everything.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    fetches : In(stream of fetch_layout)
        Pages that the channels will program, of each channel in order.
    wanted, page, codeword, channel : Out
        A codeword that has room: its page, its number in the page, and the channel that it is for.
    take : In(1)
        Strobe: it is read.
    bad, to : In(1), In(channel)
        Strobe: a row of a codeword of this channel was answered with an error.
    words : Array of In(stream of word_bytes * 8)
        What was read, for each channel.
    page_words : Array of Out(stream of page_word)
        The words, for each channel.
    failed : Out(channels)
        Strobe: the memory answered a read of the channel's page with an error.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "fetches": In(stream.Signature(fetch_layout(config))),
            "wanted": Out(1),
            "page": Out(page_layout()),
            "codeword": Out(unsigned(max(1, ceil_log2(config.codewords_per_page)))),
            "channel": Out(shapes.channel),
            "take": In(1),
            "bad": In(1),
            "to": In(shapes.channel),
            "words": In(stream.Signature(unsigned(config.word_bytes * 8))).array(config.channels),
            "page_words": Out(stream.Signature(shapes.page_word)).array(config.channels),
            "failed": Out(config.channels),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        channels = range(config.channels)
        # Behind a register, as it takes a cycle to see whether a channel's queue has room; that stays true meanwhile.
        room_known = Signal()
        m.submodules.given = given = StreamRegister(fetch_layout(config))
        connect(m, flipped(self.fetches), given.i)
        m.submodules.fetches = fetches = QueueSet(page_layout(), config.channels, FETCHES, checked=True)
        numbers = [Signal(range(config.codewords_per_page), name=f"codeword_{channel}") for channel in channels]
        able = Signal(config.channels)
        last, begins = Signal(), Signal()
        m.d.comb += [
            fetches.i.payload.queue.eq(given.o.payload.channel),
            fetches.i.payload.item.eq(given.o.payload.page),
            fetches.i.valid.eq(room_known),
            given.o.ready.eq(room_known),
            fetches.queue.eq(self.channel),
            fetches.pop.eq(self.take & last),
            self.page.eq(fetches.head),
            self.codeword.eq(Array(numbers)[self.channel]),
            last.eq(self.codeword == config.codewords_per_page - 1),
            begins.eq(self.take & (self.codeword == 0)),
            self.failed.eq(strobe(self.bad, self.to)),
        ]
        m.d.sync += room_known.eq(given.o.valid & ~room_known & fetches.i.ready)
        for channel in channels:
            here = self.channel == channel
            room = Signal(range(PAGE_CODEWORDS + 1), init=PAGE_CODEWORDS, name=f"room_{channel}")
            gone, full = self._give(m, channel, self.words[channel], begins & here)
            m.d.comb += able[channel].eq(
                fetches.waiting[channel] & room.any() & ~(full & (numbers[channel] == 0)))
            with m.If(self.take & here):
                m.d.sync += numbers[channel].eq(Mux(last, 0, self.codeword + 1))
            m.d.sync += room.eq(room - (self.take & here) + gone)
        self._choose(m, able)
        return m

    def _choose(self, m: Module, able: Value) -> None:
        """A channel is chosen, its page is read, its codeword is offered until it is taken."""
        known = Signal(self._config.channels)   # a cycle late, so nothing is chosen in the cycle after a codeword
        following = next_of(m, known, self.channel, "following")
        m.d.sync += known.eq(able)
        with m.FSM(name="choice"):
            with m.State("CHOOSE"):
                m.d.sync += self.channel.eq(following)
                with m.If(known.any()):
                    m.next = "READ"
            with m.State("READ"):
                m.d.sync += self.wanted.eq(1)
                m.next = "OFFER"
            with m.State("OFFER"):
                with m.If(self.take):
                    m.d.sync += self.wanted.eq(0)
                    m.next = "SETTLE"
            with m.State("SETTLE"):
                m.next = "CHOOSE"

    def _give(self, m: Module, channel: int, words: stream.Interface, begins: Value) -> tuple[Signal, Signal]:
        """Words of a channel's pages: (strobe: a codeword is given, a page that is begun waits behind another)."""
        config, out = self._config, self.page_words[channel]
        codeword_words = config.codeword_bytes // config.word_bytes
        page, page_there = Signal(PAGE_BITS, name=f"page_{channel}", reset_less=True), Signal(name=f"there_{channel}")
        following = Signal(PAGE_BITS, name=f"following_{channel}", reset_less=True)
        full = Signal(name=f"full_{channel}")
        beat = Signal(range(codeword_words), name=f"beat_{channel}")
        codeword = Signal(range(config.codewords_per_page), name=f"given_codeword_{channel}")
        given, ended = Signal(name=f"given_{channel}"), Signal(name=f"ended_{channel}")
        m.d.comb += [
            out.payload.data.eq(words.payload),
            out.payload.page.eq(page),
            out.valid.eq(words.valid & page_there),
            words.ready.eq(out.ready & page_there),
            given.eq(out.valid & out.ready & (beat == codeword_words - 1)),
            ended.eq(given & (codeword == config.codewords_per_page - 1)),
        ]
        with m.If(out.valid & out.ready):
            m.d.sync += beat.eq(beat + 1)   # codeword_words is a power of two
        with m.If(given):
            m.d.sync += codeword.eq(Mux(ended, 0, codeword + 1))
        with m.If(begins):
            m.d.sync += [following.eq(self.page.page), full.eq(1)]
        with m.If(~page_there | ended):
            m.d.sync += [page.eq(following), page_there.eq(full)]
            with m.If(~begins):
                m.d.sync += full.eq(0)
        return given, full
