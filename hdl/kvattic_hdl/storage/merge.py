"""Joins two streams of codewords into one, whole codewords at a time."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes


class CodewordMerge(wiring.Component):
    """Lets codewords of `first` go before those of `second`, but never between the words of one.

    Latency none; a word a cycle.  Reset forgets which codeword is under way.

    Parameters
    ----------
    config : Config

    Members
    -------
    first, second : In(stream of channel_word)
    o : Out(stream of channel_word)
    """

    def __init__(self, config: Config) -> None:
        words = stream.Signature(Shapes(config).channel_word)
        super().__init__({"first": In(words), "second": In(words), "o": Out(words)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        inside, kept, second = Signal(), Signal(), Signal()
        m.d.comb += [
            second.eq(Mux(inside, kept, ~self.first.valid)),
            self.o.valid.eq(Mux(second, self.second.valid, self.first.valid)),
            self.o.payload.eq(Mux(second, self.second.payload.as_value(), self.first.payload.as_value())),
            self.first.ready.eq(self.o.ready & ~second),
            self.second.ready.eq(self.o.ready & second),
        ]
        # A word that is offered must stay until it is taken, so the choice is kept from the offer on.
        with m.If(self.o.valid):
            m.d.sync += [inside.eq(~(self.o.ready & self.o.payload.last)), kept.eq(second)]
        return m
