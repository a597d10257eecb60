"""Streams that are registered in both directions: they end every combinational path between their two sides."""

from typing import Any

from amaranth.hdl import Module, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class StreamBuffer(wiring.Component):
    """Keeps up to two payloads: `o.valid`, `o.payload` and `i.ready` come from registers.

    Latency one cycle, a payload a cycle.  Reset empties it.

    Parameters
    ----------
    shape : shape-like
        Of the payload.

    Members
    -------
    i : In(stream of shape)
    o : Out(stream of shape)
    """

    def __init__(self, shape: Any) -> None:
        self._shape = shape
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        spare = Signal(self._shape, reset_less=True)
        waiting = Signal()  # `spare` holds the payload after the one that is offered
        m.d.comb += self.i.ready.eq(~waiting)
        with m.If(~waiting):
            m.d.sync += spare.eq(self.i.payload)
        with m.If(self.o.ready | ~self.o.valid):
            m.d.sync += [self.o.valid.eq(waiting | self.i.valid), waiting.eq(0)]
            with m.If(waiting):
                m.d.sync += self.o.payload.eq(spare)
            with m.Else():
                m.d.sync += self.o.payload.eq(self.i.payload)
        with m.Elif(self.i.valid):
            m.d.sync += waiting.eq(1)
        return m


class StreamRegister(wiring.Component):
    """Keeps one payload; `o.valid`, `o.payload` and `i.ready` come from registers.

    Latency one cycle, a payload every other cycle.  Where requests come in a chosen order, each that waits here was
    chosen too early: so this, not `StreamBuffer`, is right for them.  Reset empties it.

    Parameters
    ----------
    shape : shape-like
        Of the payload.

    Members
    -------
    i : In(stream of shape)
    o : Out(stream of shape)
    """

    def __init__(self, shape: Any) -> None:
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid)
        with m.If(~self.o.valid):
            m.d.sync += [self.o.valid.eq(self.i.valid), self.o.payload.eq(self.i.payload)]
        with m.Elif(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        return m


class Queue(wiring.Component):
    """A FIFO in LUT RAM whose writer counts its places; `o.valid` comes from a register, `o.payload` out of the memory.

    Few levels of logic lie behind `o.ready`.  Latency one cycle, a payload a cycle.  Reset empties it.

    Parameters
    ----------
    shape : shape-like
        Of the payload.
    depth : int
        Places, a power of two, at least 2.

    Members
    -------
    i : In(stream of shape)
        Never waits: the writer sends no more than there is room for.
    o : Out(stream of shape)
    """

    def __init__(self, shape: Any, depth: int) -> None:
        self._shape = shape
        self._depth = depth
        super().__init__({
            "i": In(stream.Signature(shape, always_ready=True)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.words = words = Memory(
            shape=self._shape, depth=self._depth, init=[], attrs={"ram_style": "distributed"})
        write, read = words.write_port(domain="sync"), words.read_port(domain="comb")
        begin, end = Signal(range(self._depth)), Signal(range(self._depth))
        taken, last = Signal(), Signal()
        m.d.comb += [
            write.en.eq(self.i.valid),
            write.addr.eq(end),
            Value.cast(write.data).eq(Value.cast(self.i.payload)),
            read.addr.eq(begin),
            Value.cast(self.o.payload).eq(Value.cast(read.data)),
            taken.eq(self.o.valid & self.o.ready),
            last.eq((begin + 1)[: len(begin)] == end),
        ]
        # No sums with the strobes, which come late.
        with m.If(taken):
            m.d.sync += begin.eq(begin + 1)
        with m.If(self.i.valid):
            m.d.sync += end.eq(end + 1)
        m.d.sync += [
            self.o.valid.eq(self.i.valid | (self.o.valid & ~(taken & last))),
        ]
        return m
