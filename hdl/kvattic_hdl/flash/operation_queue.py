"""Operations and the words of programs, on their way to the controller's machine."""

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

OPERATIONS = 64
"""Depth of the queue of operations."""


class OperationQueue(wiring.Component):
    """Queues operations; the one whose turn it is stands before the queue, so that the one after it can be seen.

    Parameters
    ----------
    config : Config

    Members
    -------
    operations : In(stream of operation)
    current : Out(operation), there : Out(1)
        The one whose turn it is, if there is one.
    following : Out(operation), following_there : Out(1)
        The one after it.
    take : In(1)
        Strobe: `current` is begun or answered; the next one is there two cycles later.
    """

    def __init__(self, config: Config) -> None:
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "operations": In(stream.Signature(shapes.operation)),
            "current": Out(shapes.operation),
            "there": Out(1),
            "following": Out(shapes.operation),
            "following_there": Out(1),
            "take": In(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = SyncFIFOBuffered(width=self.shapes.operation.size, depth=OPERATIONS)
        m.d.comb += [
            queue.w_data.eq(self.operations.payload),
            queue.w_en.eq(self.operations.valid),
            self.operations.ready.eq(queue.w_rdy),
            self.following.eq(queue.r_data),
            self.following_there.eq(queue.r_rdy),
            queue.r_en.eq(queue.r_rdy & ~self.there),
        ]
        with m.If(queue.r_en):
            m.d.sync += [self.current.eq(self.following), self.there.eq(1)]
        with m.Elif(self.take):
            m.d.sync += self.there.eq(0)
        return m


class ProgramWords(wiring.Component):
    """Hands the words of programs on, or throws those of one program away.

    Parameters
    ----------
    config : Config

    Members
    -------
    i : In(stream of word_bytes * 8 bits), o : Out(stream of word_bytes * 8 bits)
    discard : In(1)
        Strobe: the next program's words are not wanted, as its die is dead.
    discarding : Out(1)
        Some of them are still to come.
    """

    def __init__(self, config: Config) -> None:
        self.words = config.codewords_per_page * config.raw_codeword_words
        word = stream.Signature(config.word_bytes * 8)
        super().__init__({"i": In(word), "o": Out(word), "discard": In(1), "discarding": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left = Signal(range(self.words))        # after the next one
        m.d.comb += [
            self.o.payload.eq(self.i.payload),
            self.o.valid.eq(self.i.valid & ~self.discarding),
            self.i.ready.eq(self.o.ready | self.discarding),
        ]
        with m.If(self.discarding & self.i.valid):
            m.d.sync += [left.eq(left - 1), self.discarding.eq(left != 0)]
        with m.If(self.discard):
            m.d.sync += [left.eq(self.words - 1), self.discarding.eq(1)]
        return m
