"""Gathers the codewords of a lane's channels, which come in words side by side, into the lane's beats."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

CODEWORDS = 4
"""Codewords of each channel that are kept, a power of two."""


class BeatOfWords(wiring.Component):
    """Makes a beat of `lane_channels` words of one channel.

    Latency none: a beat is there with its last word, which waits until it is taken.  Reset forgets a part of a beat.

    Parameters
    ----------
    config : Config

    Members
    -------
    words : In(stream of channel_word)
    beats : Out(stream of beat)
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        super().__init__({
            "words": In(stream.Signature(shapes.channel_word)),
            "beats": Out(stream.Signature(shapes.beat)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, word, beat = self._config, self.words.payload, self.beats.payload
        before = Signal((config.lane_channels - 1) * config.word_bytes * 8)
        count = Signal(range(config.lane_channels))
        complete = count == config.lane_channels - 1
        m.d.comb += [
            self.words.ready.eq(~complete | self.beats.ready),
            self.beats.valid.eq(complete & self.words.valid),
            beat.data.eq(Cat(before, word.data)),
            *(beat[name].eq(word[name]) for name in ("tag", "last", "error")),
        ]
        with m.If(self.words.valid & self.words.ready):
            m.d.sync += [count.eq(count + 1), before.eq(Cat(before, word.data)[config.word_bytes * 8 :])]
        return m


class CodewordGather(wiring.Component):
    """Takes a word of each channel a cycle, and gives whole codewords, a beat a cycle, channel by channel in turn.

    A beat is as wide as a word of each of the lane's channels, so that none of them is held back for long: a channel's
    beat waits at most `lane_channels` - 1 cycles for its turn to be stored, and codewords that follow each other
    without a gap wait once.  Latency: a codeword is offered three cycles after its last word came, at the earliest.
    Reset forgets all codewords.

    Parameters
    ----------
    config : Config
        One with `lane_channels` > 1.

    Members
    -------
    words : Array of In(stream of channel_word)
        From each of the lane's channels.
    beats : Out(stream of beat)
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        self._kept = data.StructLayout({"data": config.beat_bytes * 8, "tag": shapes.tag, "error": 1})
        self._place = data.StructLayout({
            "beat": ceil_log2(config.beats_per_codeword), "codeword": ceil_log2(CODEWORDS),
            "channel": ceil_log2(config.lane_channels)})
        super().__init__({
            "words": In(stream.Signature(shapes.channel_word)).array(config.lane_channels),
            "beats": Out(stream.Signature(shapes.beat)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        channels = range(self._config.lane_channels)
        m.submodules.store = store = Memory(
            shape=self._kept, depth=1 << self._place.size, init=[], attrs={"ram_style": "block"})
        whole = [Signal(range(CODEWORDS + 1), name=f"whole_{c}") for c in channels]   # codewords that are all there
        written, given = Signal(len(channels)), Signal(len(channels))                # strobes
        m.d.sync += [count.eq(count + written[c] - given[c]) for c, count in enumerate(whole)]
        self._store(m, store.write_port(), whole, written)
        self._give(m, store.read_port(), whole, given)
        return m

    def _store(self, m: Module, write: object, whole: list[Signal], written: Signal) -> None:
        """Store a beat of the channel whose turn it is."""
        channels = self._config.lane_channels
        turn = Signal(range(channels))
        at, kept = data.View(self._place, write.addr), write.data
        beats, numbers = [], []
        m.d.sync += turn.eq(turn + 1)
        for c, words in enumerate(self.words):
            m.submodules[f"beat_{c}"] = collect = BeatOfWords(self._config)
            connect(m, flipped(words), collect.words)
            number = Signal(data.StructLayout({name: self._place[name].shape for name in ("beat", "codeword")}),
                            name=f"number_{c}")
            taken = collect.beats.valid & collect.beats.ready
            m.d.comb += [
                collect.beats.ready.eq((turn == c) & (whole[c] != CODEWORDS)),
                written[c].eq(taken & collect.beats.payload.last),
            ]
            with m.If(taken):
                m.d.sync += number.beat.eq(number.beat + 1)
                with m.If(collect.beats.payload.last):
                    m.d.sync += [number.beat.eq(0), number.codeword.eq(number.codeword + 1)]
            beats.append(Cat(collect.beats.payload.as_value(), taken))
            numbers.append(number.as_value())
        beat, valid = Signal(Shapes(self._config).beat), Signal()
        m.d.comb += [
            Cat(beat.as_value(), valid).eq(Array(beats)[turn]),
            Cat(at.beat, at.codeword).eq(Array(numbers)[turn]),
            at.channel.eq(turn),
            write.en.eq(valid),
            *(kept[name].eq(beat[name]) for name, _ in self._kept),
        ]

    def _give(self, m: Module, read: object, whole: list[Signal], given: Signal) -> None:
        """Give codewords, one after the other."""
        channels, last_beat = self._config.lane_channels, self._config.beats_per_codeword - 1
        at, beat = data.View(self._place, read.addr), self.beats.payload
        source, next_source = Signal(range(channels)), Signal(range(channels))
        busy, more, end = Signal(), Signal(), Signal()
        number, following = Signal(self._place["beat"].shape), Signal(self._place["beat"].shape)
        final = Signal(init=last_beat == 0)        # `number` is the codeword's last
        codewords = Array(Signal(self._place["codeword"].shape, name=f"codeword_{c}") for c in range(channels))
        # The codeword that is being given counts until its end.
        there: list[Value] = [count > (busy & (source == c)) for c, count in enumerate(whole)]
        for distance in reversed(range(1, channels + 1)):
            for c in range(channels):
                with m.If((source == c) & there[(c + distance) % channels]):
                    m.d.comb += [next_source.eq((c + distance) % channels), more.eq(1)]
        m.d.comb += [
            at.channel.eq(source),
            at.codeword.eq(codewords[source]),
            at.beat.eq(number),
            read.en.eq(~self.beats.valid | self.beats.ready),
            *(beat[name].eq(read.data[name]) for name, _ in self._kept),
            end.eq(read.en & busy & final),
            following.eq(Mux(final, 0, number + 1)),
            given.eq(Mux(end, 1 << source, 0)),
        ]
        with m.If(read.en):
            m.d.sync += [self.beats.valid.eq(busy), beat.last.eq(final)]
            with m.If(busy):
                m.d.sync += [number.eq(following), final.eq(following == last_beat)]
        with m.If(end):
            m.d.sync += codewords[source].eq(codewords[source] + 1)
        with m.If(~busy | end):
            m.d.sync += [busy.eq(more), source.eq(Mux(more, next_source, source))]
