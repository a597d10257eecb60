"""The page walker: turns a job into the codeword requests of one lane, without host or firmware work."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.config import Config
from kvattic_hdl.interfaces import TOKEN_BITS, Shapes


class Walker(wiring.Component):
    """Requests the codewords of one kind (K or V) of each job, in slot order.

    One request a cycle; two cycles between jobs.  A job ends where the lane's next token is not below `end_token`
    (a lane may have none), or at once when it failed.  Reset forgets everything.

    Parameters
    ----------
    config : Config
    kind : commands.Kind

    Members
    -------
    enable : In(1)
        Strobe: the job of slot `enable_slot` may be walked.
    enable_slot : In(slot)
    slot : Out(slot)
        The job in work, or the next one.  `job` must hold its parameters in the same cycle.
    job : In(walk)
        See `Shapes.walk`: first page, first token of this lane, end, epoch.
    failed : In(1)
        The job in work is being abandoned.
    ready_to_ask : Out(1)
        `requests` is valid, or would be if `room` were given.
    room : In(1)
        A request may be made.
    requests : Out(stream of request)
    begin : Out(1)
        Strobe: the job of `slot` begins.
    end : Out(1)
        Strobe: all requests of the job of `slot` are made.
    """

    def __init__(self, config: Config, kind: int) -> None:
        self.config = config
        self.kind = kind
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "enable": In(1),
            "enable_slot": In(shapes.slot),
            "slot": Out(shapes.slot),
            "job": In(shapes.walk),
            "failed": In(1),
            "ready_to_ask": Out(1),
            "room": In(1),
            "requests": Out(stream.Signature(shapes.request)),
            "begin": Out(1),
            "end": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        enabled = Signal(config.jobs_in_flight)
        running = Signal()
        request = self.requests.payload
        token = Signal(TOKEN_BITS + 1)
        token_end = Signal(TOKEN_BITS)
        more = Signal()

        m.d.comb += [
            self.begin.eq(~running & enabled.bit_select(self.slot, 1)),
            more.eq((token < token_end) & ~self.failed),
            self.ready_to_ask.eq(running & more),
            self.end.eq(running & ~more),
            self.requests.valid.eq(self.ready_to_ask & self.room),
        ]
        # At the end of a page, on to this lane's next stripe, behind those of the other channels.
        fired = self.requests.valid & self.requests.ready
        page_end = request.codeword == config.codewords_per_page - 1
        others = (config.channels - 1) * config.tokens_per_page
        step = Mux(page_end, config.tokens_per_codeword + others, config.tokens_per_codeword)
        with m.If(self.begin | fired):
            m.d.sync += [
                request.page.eq(Mux(self.begin, self.job.page, request.page + page_end)),
                token.eq(Mux(self.begin, self.job.token, token + step)),
                request.codeword.eq(Mux(self.begin | page_end, 0, request.codeword + 1)),
                request.tag.place.eq(Mux(self.begin, 0, request.tag.place + 1)),
            ]
        with m.If(self.begin):
            m.d.sync += [
                running.eq(1),
                request.tag.kind.eq(self.kind),
                request.tag.slot.eq(self.slot),
                request.tag.epoch.eq(self.job.epoch),
                token_end.eq(self.job.end_token),
            ]
        with m.If(self.end):
            m.d.sync += [running.eq(0), enabled.bit_select(self.slot, 1).eq(0)]
        # On to the next slot; also past one whose job never came to the lanes.
        with m.If(self.end | (~running & ~self.begin & enabled.any())):
            m.d.sync += self.slot.eq(Mux(self.slot == config.jobs_in_flight - 1, 0, self.slot + 1))
        with m.If(self.enable):
            m.d.sync += enabled.bit_select(self.enable_slot, 1).eq(1)
        return m
