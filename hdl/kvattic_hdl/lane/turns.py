"""The order of a lane's requests: which walker's is next."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes


class Turns(wiring.Component):
    """Merges the walkers' requests.

    K runs one job ahead of V: K0 K1 V0 K2 V1 ...; where K can't go on, V does.  The first pass goes in front; it has
    the right of way as long as K has nothing to read after its job.  Its tails take turns with the others, as they may
    wait for DRAM.  Nothing comes between a request and one that follows it in the same page.

    Parameters
    ----------
    config : Config

    Members
    -------
    key, value, first : In(stream of request)
        The walkers'.
    key_follow, value_follow, first_follow : In(1)
        The next request of this walker may follow its last one.
    key_end, value_end, first_end : In(1)
        Strobe: this walker has made all requests of a job.
    key_skip : In(1)
        The job of `key_end` is a sparse one.
    requests : Out(stream of request)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        request = stream.Signature(Shapes(config).request)
        super().__init__({
            "key": In(request),
            "value": In(request),
            "first": In(request),
            "key_follow": In(1),
            "value_follow": In(1),
            "first_follow": In(1),
            "key_end": In(1),
            "value_end": In(1),
            "first_end": In(1),
            "key_skip": In(1),
            "requests": Out(request),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        slots = self.config.jobs_in_flight
        requests = self.requests
        ahead = Signal(range(slots + 1))   # jobs by which K is ahead of V
        m.d.sync += ahead.eq(ahead + self.key_end - self.value_end)
        key_turn, first_turn = Signal(), Signal()
        m.d.comb += [
            key_turn.eq(self.key_follow | (self.key.valid & ~self.value_follow & ((ahead <= 1) | ~self.value.valid))),
            requests.valid.eq(
                first_turn | (~self.first_follow & Mux(key_turn, self.key.valid, self.value.valid))),
            requests.payload.eq(Mux(key_turn, self.key.payload, self.value.payload)),
            self.key.ready.eq(requests.ready & key_turn & ~first_turn & ~self.first_follow),
            self.value.ready.eq(requests.ready & ~key_turn & ~first_turn & ~self.first_follow),
        ]
        if self.config.sparse:
            first_ahead, dram_turn = Signal(range(slots + 1)), Signal()   # sparse jobs by which it is ahead of K
            m.d.sync += [
                dram_turn.eq(~dram_turn),
                first_ahead.eq(first_ahead + self.first_end - (self.key_end & self.key_skip)),
            ]
            m.d.comb += [
                first_turn.eq(
                    self.first.valid & ~self.key_follow & ~self.value_follow
                    & (self.first_follow | ~(self.key.valid | self.value.valid)
                       | Mux(self.first.payload.dram, dram_turn, first_ahead == 0))),
                self.first.ready.eq(requests.ready & first_turn),
            ]
            with m.If(first_turn):
                m.d.comb += requests.payload.eq(self.first.payload)
        return m
