"""Between a lane, its flash channels and device DRAM: requests to where they lie, codewords back."""

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.storage.gather import CodewordGather
from kvattic_hdl.storage.merge import CodewordMerge

REQUESTS = 64
"""Requests that wait for each channel of a lane with several, so that one that is busy does not hold the others up."""


class LaneCrossing(wiring.Component):
    """Gives each request of a lane to its channel, or to device DRAM, and joins the codewords that come.

    Requests of a channel stay in their order; those of a lane with one channel pass in the same cycle, others wait in a
    queue for each channel.  Nothing here is reset with the engine: what was asked for comes.

    Parameters
    ----------
    config : Config

    Members
    -------
    requests : In(stream of request)
        The lane's.
    channel_requests : Array of Out(stream of request)
        Those of each of the lane's channels.
    tails : Out(stream of request)
        Those of device DRAM.
    words : Array of In(stream of channel_word)
        Codewords of each channel.
    tail_codewords : In(stream of channel_word)
        Codewords of device DRAM.  They come like those of the lane's first channel, and go before them.
    codewords : Out(stream of beat)
        All of them, one after the other.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        request, word = stream.Signature(shapes.request), stream.Signature(shapes.channel_word)
        super().__init__({
            "requests": In(request),
            "channel_requests": Out(request).array(config.lane_channels),
            "tails": Out(request),
            "words": In(word).array(config.lane_channels),
            "tail_codewords": In(word),
            "codewords": Out(stream.Signature(shapes.beat)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # In front of the gathering, where they are narrow.
        m.submodules.merge = merge = CodewordMerge(self._config)
        connect(m, flipped(self.tail_codewords), merge.first)
        connect(m, flipped(self.words[0]), merge.second)
        if self._config.lane_channels > 1:
            m.submodules.gather = gather = CodewordGather(self._config)
            connect(m, merge.o, gather.words[0])
            for outer, inner in zip(self.words[1:], gather.words[1:], strict=True):
                connect(m, flipped(outer), inner)
            connect(m, gather.beats, flipped(self.codewords))
            room, queues = self._queue(m)
        else:
            connect(m, merge.o, flipped(self.codewords))
            room, queues = self.channel_requests[0].ready, [self.channel_requests[0]]
        request = self.requests.payload
        m.d.comb += [
            self.tails.payload.eq(request),
            self.tails.valid.eq(self.requests.valid & request.dram),
            self.requests.ready.eq(Mux(request.dram, self.tails.ready, room)),
        ]
        for number, queue in enumerate(queues):
            here = request.of_lane == number if len(queues) > 1 else 1
            m.d.comb += [queue.payload.eq(request), queue.valid.eq(self.requests.valid & ~request.dram & here)]
        return m

    def _queue(self, m: Module) -> tuple[Signal, list[stream.Interface]]:
        """A queue for each channel: whether there is room in that of the request, and their inputs."""
        shape = Shapes(self._config).request
        inputs = []
        for number, requests in enumerate(self.channel_requests):
            m.submodules[f"queue_{number}"] = queue = SyncFIFOBuffered(width=shape.size, depth=REQUESTS)
            given = stream.Signature(shape).create(path=(f"asked_{number}",))
            m.d.comb += [
                queue.w_data.eq(given.payload),
                queue.w_en.eq(given.valid),
                given.ready.eq(queue.w_rdy),
                requests.payload.eq(queue.r_data),
                requests.valid.eq(queue.r_rdy),
                queue.r_en.eq(requests.ready),
            ]
            inputs.append(given)
        room = Signal()
        m.d.comb += room.eq(Array(given.ready for given in inputs)[self.requests.payload.of_lane])
        return room, inputs
