"""Which tokens of each place of the score ring are selected."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes


class Marks(wiring.Component):
    """A bit for each token of each place, with one read port: arriving codewords go first, the walkers take turns.

    Reset changes nothing: a job's marks are written before they are read.

    Parameters
    ----------
    config : Config

    Members
    -------
    write : In(1), write_ring : In(ring), write_marks : In(tokens_per_codeword)
    arrival : In(1), arrival_ring : In(ring)
        An arriving codeword wants those of this place.
    key : In(1), key_ring : In(ring), key_granted : Out(1)
    value : In(1), value_ring : In(ring), value_granted : Out(1)
        So does a walker; it is its turn.
    marks : Out(tokens_per_codeword), one cycle later
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        ring = Shapes(config).ring
        super().__init__({
            "write": In(1),
            "write_ring": In(ring),
            "write_marks": In(config.tokens_per_codeword),
            "arrival": In(1),
            "arrival_ring": In(ring),
            "key": In(1),
            "key_ring": In(ring),
            "key_granted": Out(1),
            "value": In(1),
            "value_ring": In(ring),
            "value_granted": Out(1),
            "marks": Out(config.tokens_per_codeword),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.marks = marks = Memory(
            shape=self.config.tokens_per_codeword, depth=self.config.ring_codewords, init=[],
            attrs={"ram_style": "block"})
        write, read = marks.write_port(domain="sync"), marks.read_port(domain="sync")
        value_turn = Signal()
        m.d.comb += [
            write.en.eq(self.write),
            write.addr.eq(self.write_ring),
            write.data.eq(self.write_marks),
            read.addr.eq(Mux(self.arrival, self.arrival_ring, Mux(self.key_granted, self.key_ring, self.value_ring))),
            self.marks.eq(read.data),
            self.key_granted.eq(~self.arrival & ~(self.value & (value_turn | ~self.key))),
            self.value_granted.eq(~self.arrival & ~(self.key & ~value_turn)),
        ]
        with m.If(~self.arrival):
            m.d.sync += value_turn.eq(~value_turn)
        return m
