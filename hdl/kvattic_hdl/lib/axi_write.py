"""Writes lines of 64 bytes to host memory over the write half of AXI4."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic_hdl.lib.axi import (
    ADDRESS_BITS,
    AXI_WRITE,
    BURST_INCR,
    BURST_LEN,
    BURST_SIZE,
    CACHE_NORMAL,
    DATA_BITS,
    OKAY,
)

WRITE_WORD = data.StructLayout({"address": ADDRESS_BITS, "data": DATA_BITS, "last": 1})
"""A word of a line: the line's address (read with its first word), data, last of its line."""


class WriteLines(wiring.Component):
    """Writes a stream of 64-byte lines as AXI4 bursts of one line each.

    Latency: a line's first word appears on AW and W one cycle after it is taken; W never waits for
    AW's handshake, but the next line does.  Throughput: one word a cycle.  Ordering: one ID, so
    lines are written in order; up to `outstanding` of them are under way at once.  Reset forgets
    all that is under way: raise `stop` and wait for `idle` before it.

    Parameters
    ----------
    outstanding : int
        Lines that may await their response, at least 1.

    Members
    -------
    i : In(stream.Signature(WRITE_WORD))
        Lines, eight words each: `address` (a multiple of 64), `data`, `last` with the eighth word.
    stop : In(1)
        While high no line is begun; one that is begun still needs its words.
    axi : Out(AXI_WRITE)
        The bus.
    pending : Out(range(outstanding + 1))
        Lines begun whose response has not come.
    idle : Out(1)
        No line is under way: all responses have come.
    error : Out(1)
        Strobe: a response other than OKAY has come; in the last cycle in which `pending` counts its
        line.

    Raises
    ------
    ValueError
        `outstanding` is below 1.
    """

    i: stream.Interface
    stop: Signal
    axi: wiring.PureInterface
    pending: Signal
    idle: Signal
    error: Signal

    def __init__(self, outstanding: int = 8) -> None:
        if outstanding < 1:
            raise ValueError(f"outstanding must be at least 1, not {outstanding!r}")
        self.outstanding = outstanding
        super().__init__(
            {
                "i": In(stream.Signature(WRITE_WORD)),
                "stop": In(1),
                "axi": Out(AXI_WRITE),
                "pending": Out(range(outstanding + 1)),
                "idle": Out(1),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        axi = self.axi
        m.d.comb += [
            axi.awlen.eq(BURST_LEN),
            axi.awsize.eq(BURST_SIZE),
            axi.awburst.eq(BURST_INCR),
            axi.awcache.eq(CACHE_NORMAL),
            axi.wstrb.eq(~0),
            axi.bready.eq(1),
        ]

        first = Signal(init=1)
        may_begin = Signal()
        begin = Signal()
        m.d.comb += [
            may_begin.eq(
                (~axi.awvalid | axi.awready) & (self.pending != self.outstanding) & ~self.stop
            ),
            self.i.ready.eq((~axi.wvalid | axi.wready) & (~first | may_begin)),
            begin.eq(self.i.valid & self.i.ready & first),
        ]
        with m.If(axi.awready):
            m.d.sync += axi.awvalid.eq(0)
        with m.If(begin):
            m.d.sync += [axi.awvalid.eq(1), axi.awaddr.eq(self.i.payload.address)]
        with m.If(axi.wready):
            m.d.sync += axi.wvalid.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [
                axi.wvalid.eq(1),
                axi.wdata.eq(self.i.payload.data),
                axi.wlast.eq(self.i.payload.last),
                first.eq(self.i.payload.last),
            ]

        answered = axi.bvalid & axi.bready
        m.d.sync += self.pending.eq(self.pending + begin - answered)
        m.d.comb += [
            self.idle.eq(self.pending == 0),
            self.error.eq(answered & (axi.bresp != OKAY)),
        ]
        return m
