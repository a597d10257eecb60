"""What passes between a channel's decoder and the corrector that it shares with others, and the decoder's end of it."""

from typing import Any

from amaranth.hdl import Cat, Module, Shape, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import code

CHUNK_BITS = 8
"""Bits of a problem that go to the corrector in one cycle."""


def owner_shape(channels: int) -> Shape:
    """Of the number of a corrector's channel."""
    return unsigned(max(1, ceil_log2(channels)))


class CorrectorShapes:
    """Shapes at a corrector.

    Attributes
    ----------
    problem : StructLayout
        remainder: of the raw codeword (padding zero, parity not inverted) after a division by the generator; check: the
        CRC's state after the data, plus the CRC received.
    remainder_chunks, chunks : int
        Chunks of a problem's remainder; of the problem, which is sent so: the remainder, its highest bits first, then
        the check value, its lowest bits first.
    patch : StructLayout
        index: a word of the codeword's data; mask: bits of it that are wrong.
    result : StructLayout
        good: the codeword is right once its patches are applied; errors: bits that were wrong (if good).
    """

    def __init__(self, config: Config) -> None:
        degree = code(config).parity.degree
        self.problem = data.StructLayout({"remainder": degree, "check": CRC_BITS})
        self.remainder_chunks = -(-degree // CHUNK_BITS)
        self.chunks = self.remainder_chunks + CRC_BITS // CHUNK_BITS
        self.patch = data.StructLayout({
            "index": unsigned(bits_for(config.words_per_codeword - 1)), "mask": config.word_bytes * 8})
        self.result = data.StructLayout({"good": 1, "errors": unsigned(bits_for(config.ecc_t))})


def corrections_signature(config: Config) -> wiring.Signature:
    """The interface, seen from a channel; no path goes from one side to the other and back within a cycle.

    wanted : Out(1)
        A codeword waits for its correction, until it is `taken`.
    taken : In(1)
        Strobe: the problem is to be sent.
    chunk : Out(CHUNK_BITS), chunk_valid : Out(1)
        All of it, in successive cycles.
    patches : In(stream of patch)
        Wrong bits of the words that carry tokens, of the oldest codeword that was taken.  They come before it is known
        whether it can be corrected, and are taken within some cycles, whatever stands still behind the channel.
    result : In(result), ended : In(1)
        Strobe: the end of the oldest codeword that was taken, whose patches came before.
    """
    shapes = CorrectorShapes(config)
    return wiring.Signature({
        "wanted": Out(1),
        "taken": In(1),
        "chunk": Out(CHUNK_BITS),
        "chunk_valid": Out(1),
        "patches": In(stream.Signature(shapes.patch)),
        "result": In(shapes.result),
        "ended": In(1),
    })


class ProblemSender(wiring.Component):
    """Keeps the problems of a decoder's buffers, and sends one when the corrector takes it.

    Parameters
    ----------
    config : Config
    buffers : int

    Members
    -------
    store : In(1), store_buffer : In, problem : In(problem)
        Strobe: a buffer's problem, before its buffer is `buffer`.
    taken : In(1)
        Strobe: the problem of `buffer` is to be sent.
    buffer : In
        Whose problem that is; it does not change from `taken` to the end of `sending`.
    sending : Out(1)
        A problem is sent.
    chunk : Out(CHUNK_BITS), chunk_valid : Out(1)
        Of the problem; the first one two cycles after `taken`.
    """

    def __init__(self, config: Config, buffers: int) -> None:
        self.buffers = buffers
        self.shapes = shapes = CorrectorShapes(config)
        super().__init__({
            "store": In(1),
            "store_buffer": In(range(buffers)),
            "problem": In(shapes.problem),
            "taken": In(1),
            "buffer": In(range(buffers)),
            "sending": Out(1),
            "chunk": Out(CHUNK_BITS),
            "chunk_valid": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes = self.shapes
        m.submodules.problems = problems = Memory(shape=shapes.problem, depth=self.buffers, init=[])
        write = problems.write_port()
        read: Any = problems.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(self.store_buffer), write.data.eq(self.problem), write.en.eq(self.store),
            read.addr.eq(self.buffer)]
        padded = Signal(shapes.remainder_chunks * CHUNK_BITS)
        m.d.comb += padded.eq(read.data.remainder)
        ordered = Cat(*(padded.word_select(i, CHUNK_BITS) for i in reversed(range(shapes.remainder_chunks))),
                      read.data.check)
        number = Signal(range(shapes.chunks))
        m.d.sync += [self.chunk_valid.eq(self.sending), self.chunk.eq(ordered.word_select(number, CHUNK_BITS))]
        with m.If(self.taken):
            m.d.sync += [self.sending.eq(1), number.eq(0)]
        with m.Elif(self.sending):
            m.d.sync += number.eq(number + 1)
            with m.If(number == shapes.chunks - 1):
                m.d.sync += self.sending.eq(0)
        return m
