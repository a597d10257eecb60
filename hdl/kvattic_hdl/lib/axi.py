"""AXI4 and AXI4-Lite signatures (seen from the manager), and the reader of 64-byte lines."""

from amaranth.hdl import Const, Elaboratable, Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import LINE_BYTES

ADDRESS_BITS = 64
DATA_BITS = 64
LINE_WORDS = LINE_BYTES * 8 // DATA_BITS
"""Words of one line, and so beats of each burst."""
LINE_ADDRESS_BITS = ADDRESS_BITS - (LINE_BYTES - 1).bit_length()
"""Bits of a line's number: its address without the bits that are zero."""

OKAY, SLVERR = 0b00, 0b10
"""Responses."""
BURST_INCR = 0b01
BURST_LEN = LINE_WORDS - 1
BURST_SIZE = (DATA_BITS // 8 - 1).bit_length()
"""log2 of the bytes of one beat."""
CACHE_NORMAL = 0b0011
"""Normal memory, not cached, writes may be buffered."""

AXI_READ = wiring.Signature(
    {
        "arid": Out(1),
        "araddr": Out(ADDRESS_BITS),
        "arlen": Out(8),
        "arsize": Out(3),
        "arburst": Out(2),
        "arlock": Out(1),
        "arcache": Out(4),
        "arprot": Out(3),
        "arqos": Out(4),
        "arvalid": Out(1),
        "arready": In(1),
        "rid": In(1),
        "rdata": In(DATA_BITS),
        "rresp": In(2),
        "rlast": In(1),
        "rvalid": In(1),
        "rready": Out(1),
    }
)
"""Read channels of AXI4, 64-bit data and address, one-bit ID."""

AXI_WRITE = wiring.Signature(
    {
        "awid": Out(1),
        "awaddr": Out(ADDRESS_BITS),
        "awlen": Out(8),
        "awsize": Out(3),
        "awburst": Out(2),
        "awlock": Out(1),
        "awcache": Out(4),
        "awprot": Out(3),
        "awqos": Out(4),
        "awvalid": Out(1),
        "awready": In(1),
        "wdata": Out(DATA_BITS),
        "wstrb": Out(DATA_BITS // 8),
        "wlast": Out(1),
        "wvalid": Out(1),
        "wready": In(1),
        "bid": In(1),
        "bresp": In(2),
        "bvalid": In(1),
        "bready": Out(1),
    }
)
"""Write channels of AXI4, 64-bit data and address, one-bit ID."""


def axi_lite(address_bits: int) -> wiring.Signature:
    """AXI4-Lite with 32-bit data."""
    return wiring.Signature(
        {
            "awaddr": Out(address_bits),
            "awprot": Out(3),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata": Out(32),
            "wstrb": Out(4),
            "wvalid": Out(1),
            "wready": In(1),
            "bresp": In(2),
            "bvalid": In(1),
            "bready": Out(1),
            "araddr": Out(address_bits),
            "arprot": Out(3),
            "arvalid": Out(1),
            "arready": In(1),
            "rdata": In(32),
            "rresp": In(2),
            "rvalid": In(1),
            "rready": Out(1),
        }
    )


LINE_WORD = data.StructLayout({"data": DATA_BITS, "first": 1, "last": 1, "error": 1})
"""One word of a line: data, whether it is the line's first or last, whether the bus failed."""


class ReadLines(wiring.Component):
    """Reads 64-byte lines of host memory by one-line bursts.

    Latency: one cycle from `lines` to ARVALID; none from R to `words`.
    Throughput: one word a cycle.
    Ordering: words come in the order of the requests.
    Reset: while reads are under way a reset would leave their answers to the next user, so raise
    `stop` and wait for `quiet` before it.

    Parameters
    ----------
    outstanding : int
        Lines that are requested and not yet complete, at most.

    Members
    -------
    lines : In(stream of unsigned(58))
        Numbers of the lines wanted (address divided by 64).
    words : Out(stream of LINE_WORD)
        Eight words for each line; `error` is set on each word that was not answered with OKAY.
    stop : In(1)
        While high: no request is taken, and the words that still come are dropped.
    quiet : Out(1)
        Nothing is outstanding.
    bus : Out(AXI_READ)
        The read channels.

    Raises
    ------
    ValueError
        `outstanding` is not at least one.
    """

    lines: stream.Interface
    words: stream.Interface
    stop: Signal
    quiet: Signal
    bus: wiring.PureInterface

    def __init__(self, outstanding: int = 8) -> None:
        if not isinstance(outstanding, int) or outstanding < 1:
            raise ValueError(f"outstanding must be an int of at least 1, not {outstanding!r}")
        self._outstanding = outstanding
        super().__init__(
            {
                "lines": In(stream.Signature(unsigned(LINE_ADDRESS_BITS))),
                "words": Out(stream.Signature(LINE_WORD)),
                "stop": In(1),
                "quiet": Out(1, init=1),
                "bus": Out(AXI_READ),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        bus, words = self.bus, self.words
        line = Signal(LINE_ADDRESS_BITS)
        valid = Signal()
        count = Signal(range(self._outstanding + 1))
        index = Signal(range(LINE_WORDS))
        accept, complete = Signal(), Signal()

        # count covers a line from its acceptance on, so that `quiet` also waits for an AR that is
        # still pending.
        m.d.comb += [
            self.lines.ready.eq((~valid | bus.arready) & (count != self._outstanding) & ~self.stop),
            accept.eq(self.lines.valid & self.lines.ready),
            complete.eq(bus.rvalid & bus.rready & (index == LINE_WORDS - 1)),
            self.quiet.eq(count == 0),
        ]
        with m.If(accept):
            m.d.sync += [valid.eq(1), line.eq(self.lines.payload)]
        with m.Elif(bus.arready):
            m.d.sync += valid.eq(0)
        with m.If(accept & ~complete):
            m.d.sync += count.eq(count + 1)
        with m.Elif(~accept & complete):
            m.d.sync += count.eq(count - 1)
        with m.If(bus.rvalid & bus.rready):
            m.d.sync += index.eq(index + 1)

        m.d.comb += [
            bus.araddr.eq(line << (ADDRESS_BITS - LINE_ADDRESS_BITS)),
            bus.arlen.eq(Const(BURST_LEN)),
            bus.arsize.eq(Const(BURST_SIZE)),
            bus.arburst.eq(Const(BURST_INCR)),
            bus.arcache.eq(Const(CACHE_NORMAL)),
            bus.arvalid.eq(valid),
            words.payload.data.eq(bus.rdata),
            words.payload.first.eq(index == 0),
            words.payload.last.eq(index == LINE_WORDS - 1),
            words.payload.error.eq(bus.rresp != OKAY),
            words.valid.eq(bus.rvalid & ~self.stop),
            bus.rready.eq(words.ready | self.stop),
        ]
        return m
