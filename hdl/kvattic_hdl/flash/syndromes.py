"""What a corrector takes in: whose codeword is next, and the syndromes of its remainder."""

from itertools import pairwise

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code
from kvattic_hdl.flash.corrections import CHUNK_BITS, CorrectorShapes, owner_shape
from kvattic_hdl.flash.division import product, times_power


class Syndromes(wiring.Component):
    """Makes the syndromes of odd powers of a remainder, a chunk of it a cycle.

    Bit k of the remainder stands for 2**(-k - bits of the raw codeword), so that the first bit of the codeword has the
    locator 1, and bit i has 2**-i.

    Parameters
    ----------
    config : Config

    Members
    -------
    clear : In(1)
        A new codeword begins.
    chunk : In(CHUNK_BITS), chunk_valid : In(1)
        Of its remainder, the highest bits first.
    shift : In(1)
        Strobe: on to the next syndrome; not with a chunk.
    odd : Out
        The first one that was not shifted out yet.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__({
            "clear": In(1),
            "chunk": In(CHUNK_BITS),
            "chunk_valid": In(1),
            "shift": In(1),
            "odd": Out(code(config).field.m),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, code_ = self.config, code(self.config)
        field, t = code_.field, config.ecc_t
        raw_bits = config.raw_codeword_bytes * 8
        # Of the remainder's first bits, in all odd syndromes.
        columns = [sum(field.power(-(2 * k + 1) * (bit + raw_bits)) << k * field.m for k in range(t))
                   for bit in range(CHUNK_BITS)]
        weights = product(m, "weight", self.chunk, columns, t * field.m)
        odd = [Signal(field.m, name=f"odd_{2 * k + 1}", reset_less=True) for k in range(t)]
        m.d.comb += self.odd.eq(odd[0])
        # Outside of the condition, as that would become part of the sums.
        shifted = [times_power(m, f"syndrome_{2 * k + 1}", field, s, -(2 * k + 1) * CHUNK_BITS)
                   for k, s in enumerate(odd)]
        with m.If(self.chunk_valid):
            for k, s in enumerate(odd):
                m.d.sync += s.eq(shifted[k]
                                 ^ weights.word_select(k, field.m))
        with m.Elif(self.shift):
            m.d.sync += [low.eq(high) for low, high in pairwise(odd)]
        with m.If(self.clear):
            m.d.sync += [s.eq(0) for s in odd]
        return m


class Reception(wiring.Component):
    """Takes the problems of several channels in turn, and makes the syndromes of one while the one before is solved.

    A channel that wants a correction gets it after at most one of each other channel: the one that comes after the one
    served last goes first.

    Parameters
    ----------
    config : Config
    channels : int

    Members
    -------
    wanted : In(channels), taken : Out(channels), chunks : In(array of CHUNK_BITS), chunks_valid : In(channels)
        As of `corrections_signature`, by channel.
    there : Out(1)
        There is a problem; the following are about it.
    owner : Out
        Its channel.
    odd : Out, shift : In(1)
        As of `Syndromes`.
    check : Out(CRC_BITS)
        Its check value.
    done : In(1)
        Strobe: all of it was used.
    """

    def __init__(self, config: Config, channels: int) -> None:
        self.config = config
        self.channels = channels
        super().__init__({
            "wanted": In(channels),
            "taken": Out(channels),
            "chunks": In(data.ArrayLayout(CHUNK_BITS, channels)),
            "chunks_valid": In(channels),
            "there": Out(1),
            "owner": Out(owner_shape(channels)),
            "odd": Out(code(config).field.m),
            "shift": In(1),
            "check": Out(CRC_BITS),
            "done": In(1),
        })

    def _next(self, m: Module) -> Value:
        """The channel that is served next: of those that want it, the first one behind the last one."""
        chosen = Signal.like(self.owner)
        with m.Switch(self.owner):
            for last in range(self.channels):
                with m.Case(last):
                    for step in range(self.channels, 0, -1):      # what is assigned last counts
                        channel = (last + step) % self.channels
                        with m.If(self.wanted[channel]):
                            m.d.comb += chosen.eq(channel)
        return chosen

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes = CorrectorShapes(self.config)
        m.submodules.syndromes = syndromes = Syndromes(self.config)
        chosen = self._next(m)
        busy = Signal()
        # Registered: the channels may be far away, and the syndromes' network begins with it.
        chunk, chunk_valid = Signal(CHUNK_BITS, reset_less=True), Signal()
        number = Signal(range(shapes.chunks))
        of_remainder = number < shapes.remainder_chunks
        m.d.comb += [
            syndromes.clear.eq(~busy),
            syndromes.chunk.eq(chunk),
            syndromes.chunk_valid.eq(chunk_valid & of_remainder),
            syndromes.shift.eq(self.shift),
            self.odd.eq(syndromes.odd),
        ]
        m.d.sync += [
            self.taken.eq(0),
            chunk.eq(self.chunks[self.owner]),
            chunk_valid.eq(self.chunks_valid.bit_select(self.owner, 1)),
        ]
        with m.If(chunk_valid):
            m.d.sync += number.eq(number + 1)
            with m.If(~of_remainder):
                m.d.sync += self.check.eq(Cat(self.check[CHUNK_BITS:], chunk))
            with m.If(number == shapes.chunks - 1):
                m.d.sync += [number.eq(0), self.there.eq(1)]
        with m.If(self.done):
            m.d.sync += [self.there.eq(0), busy.eq(0)]
        with m.If(~busy & self.wanted.any()):
            m.d.sync += [busy.eq(1), self.owner.eq(chosen), self.taken.eq(1 << chosen)]
        return m
