"""One flash channel: controller, encoder and decoder between the engine's streams and the PHY."""

from amaranth.hdl import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic_hdl.flash.controller import Controller
from kvattic_hdl.flash.corrections import corrections_signature
from kvattic_hdl.flash.decoder import Decoder
from kvattic_hdl.flash.encoder import Encoder
from kvattic_hdl.flash.phy import phy_signature
from kvattic_hdl.flash.steps import CodeSteps
from kvattic_hdl.lib.shapes import EPOCH_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import StreamBuffer, StreamRegister


class FlashChannel(wiring.Component):
    """Reads codewords in whatever order keeps the bus busy, corrects them, and programs and erases.

    Every request is answered by one codeword, with `error` where it cannot be read.  Every operation has one outcome.

    Parameters
    ----------
    config : Config

    Members
    -------
    requests : In(stream of request)
    codewords : Out(stream of beat)
    value_open, epoch : In
        As of the engine: which V codewords may be sent.
    operations : In(stream of operation)
    page_words : In(stream of page_word)
    outcomes : Out(stream of outcome)
    events : Out(flash_events)
    media_error : Out(media_error)
        What `events.unreadable` is about, in the same cycle.
    corrections : Out(corrections_signature)
        To a `Corrector`, which it may share with other channels.
    phy : Out(phy_signature)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "requests": In(stream.Signature(shapes.request)),
            "codewords": Out(stream.Signature(shapes.channel_word)),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "operations": In(stream.Signature(shapes.operation)),
            "page_words": In(stream.Signature(shapes.page_word)),
            "outcomes": Out(stream.Signature(shapes.outcome)),
            "events": Out(shapes.flash_events),
            "media_error": Out(shapes.media_error),
            "corrections": Out(corrections_signature(config)),
            "phy": Out(phy_signature(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.controller = controller = Controller(self.config)
        m.submodules.encoder = encoder = Encoder(self.config, shares=True)
        m.submodules.decoder = decoder = Decoder(self.config, shares=True)
        m.submodules.steps = steps = CodeSteps(self.config, users=2)
        connect(m, decoder.steps, steps.users[0])
        connect(m, encoder.steps, steps.users[1])
        # No path goes through a channel within a cycle: from a request to `ready`, from the PHY to the page words.
        m.submodules.request_register = requests = StreamRegister(self.shapes.request)
        m.submodules.word_buffer = words = StreamBuffer(self.shapes.page_word)
        # Nor from the PHY through the mover into the encoder's network.
        m.submodules.raw_buffer = raw = StreamBuffer(self.config.word_bytes * 8)
        connect(m, flipped(self.requests), requests.i)
        connect(m, requests.o, controller.requests)
        connect(m, flipped(self.operations), controller.operations)
        connect(m, controller.outcomes, flipped(self.outcomes))
        connect(m, flipped(self.page_words), words.i)
        connect(m, words.o, encoder.i)
        connect(m, encoder.o, raw.i)
        connect(m, raw.o, controller.words)
        connect(m, controller.headers, decoder.header)
        connect(m, decoder.retry, controller.retries)
        connect(m, decoder.codewords, flipped(self.codewords))
        connect(m, decoder.corrections, flipped(self.corrections))
        connect(m, controller.phy, flipped(self.phy))
        events = self.events
        m.d.comb += [
            controller.value_open.eq(self.value_open),
            controller.epoch.eq(self.epoch),
            decoder.words.eq(controller.phy.read),
            decoder.words_valid.eq(controller.words_valid),
            self.media_error.eq(decoder.media_error),
        ]
        for source, names in (
            (controller.events, ("word", "command", "dies_busy", "retry", "page_reads", "page_programs",
                                 "block_erases")),
            (decoder, ("codeword", "corrected", "bit_errors", "unreadable")),
        ):
            m.d.comb += [events[name].eq(getattr(source, name)) for name in names]
        return m
