"""Codewords that the decoder wants again, on their way to the controller's machine."""

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.flash.interfaces import FlashShapes

RETRIES = 16
"""Depth of the queue of retries."""
RETRIES_HELD = 4
"""With so many retries waiting no new codeword is fetched, so that the decoder always finds room for another one."""


class RetryQueue(wiring.Component):
    """Queues retries.

    Parameters
    ----------
    config : Config

    Members
    -------
    retries : In(stream of retry)
    retry : Out(retry), there : Out(1)
        The oldest one, if there is one.
    take : In(1)
        Strobe: it is begun.
    full : Out(1)
        `RETRIES_HELD` waited, or more, one cycle ago.
    """

    def __init__(self, config: Config) -> None:
        self.shapes = shapes = FlashShapes(config)
        super().__init__({
            "retries": In(stream.Signature(shapes.retry)),
            "retry": Out(shapes.retry),
            "there": Out(1),
            "take": In(1),
            "full": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = SyncFIFOBuffered(width=self.shapes.retry.size, depth=RETRIES)
        m.d.comb += [
            queue.w_data.eq(self.retries.payload),
            queue.w_en.eq(self.retries.valid),
            self.retries.ready.eq(queue.w_rdy),
            self.retry.eq(queue.r_data),
            self.there.eq(queue.r_rdy),
            queue.r_en.eq(self.take),
        ]
        m.d.sync += self.full.eq(queue.r_level >= RETRIES_HELD)
        return m
