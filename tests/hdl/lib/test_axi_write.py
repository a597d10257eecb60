"""WriteLines on a behavioural AXI4 memory, with stalls everywhere."""

import random

import pytest
from amaranth.sim import Simulator

from kvattic_hdl.lib.axi_write import WriteLines

STALLS = [0.0, 0.4, 0.8]


class Bus:
    """Write side of an AXI4 memory; call `step` once a cycle with what was on the wires."""

    def __init__(self, axi, rng, stall, bad=()):
        self.axi, self.rng, self.stall, self.bad = axi, rng, stall, set(bad)
        self.addresses, self.words, self.waiting = [], [], []
        self.lines = []
        """(address, bytes) in the order of writing."""
        self.answered = []
        """Addresses whose response has been taken."""
        self.outstanding_most = 0
        self.held = {}
        self.cycle = 0

    def signals(self):
        a = self.axi
        return (
            a.awvalid,
            a.awready,
            a.awaddr,
            a.wvalid,
            a.wready,
            a.wdata,
            a.wlast,
            a.bvalid,
            a.bready,
        )

    def drive(self, ctx):
        """Chooses this side's signals of the cycle that begins."""
        a = self.axi
        ctx.set(a.awready, self.rng.random() >= self.stall)
        ctx.set(a.wready, self.rng.random() >= self.stall)
        if not ctx.get(a.bvalid) and self.waiting and self.rng.random() >= self.stall:
            ctx.set(a.bvalid, 1)
            ctx.set(a.bresp, 2 if self.waiting[0] in self.bad else 0)

    def check_constants(self, ctx):
        a = self.axi
        assert ctx.get(a.awlen) == 7
        assert ctx.get(a.awsize) == 3
        assert ctx.get(a.awburst) == 1
        assert ctx.get(a.wstrb) == 0xFF
        assert ctx.get(a.awid) == 0

    def step(self, ctx, values):
        awvalid, awready, awaddr, wvalid, wready, wdata, wlast, bvalid, bready = values
        for name, valid, ready, payload in (
            ("aw", awvalid, awready, awaddr),
            ("w", wvalid, wready, (wdata, wlast)),
        ):
            if name in self.held:
                assert (valid, payload) == (1, self.held[name]), f"{name} changed while it waited"
            self.held.pop(name, None)
            if valid and not ready:
                self.held[name] = payload
        if awvalid and awready:
            assert awaddr % 64 == 0
            self.addresses.append(awaddr)
        if wvalid and wready:
            self.words.append(wdata)
            assert wlast == (len(self.words) % 8 == 0)
        if bvalid and bready:
            self.answered.append(self.waiting.pop(0))
            ctx.set(self.axi.bvalid, 0)
        while self.addresses and len(self.words) >= 8:
            line = b"".join(word.to_bytes(8, "little") for word in self.words[:8])
            self.words = self.words[8:]
            self.waiting.append(self.addresses.pop(0))
            self.lines.append((self.waiting[-1], line))
        self.outstanding_most = max(self.outstanding_most, len(self.waiting))


def run(
    lines, *, source_stall=0.0, bus_stall=0.0, outstanding=4, bad=(), stop_at=None, limit=20000
):
    """Writes the lines; returns the bus, the cycles it took and the number of error strobes."""
    rng = random.Random(5)
    dut = WriteLines(outstanding)
    bus = Bus(dut.axi, rng, bus_stall, bad)
    words = [
        (address, int.from_bytes(line[i : i + 8], "little"), i == 56)
        for address, line in lines
        for i in range(0, 64, 8)
    ]
    result = {}

    async def bench(ctx):
        position = errors = begun = 0
        for cycle in range(limit):
            if stop_at is not None and cycle == stop_at:
                ctx.set(dut.stop, 1)
                begun = position
            bus.drive(ctx)
            if position < len(words) and not ctx.get(dut.i.valid) and rng.random() >= source_stall:
                address, word, last = words[position]
                # The address counts with the first word only.
                ctx.set(
                    dut.i.payload,
                    {"address": address if position % 8 == 0 else 0, "data": word, "last": last},
                )
                ctx.set(dut.i.valid, 1)
            _, _, valid, ready, pending, idle, error, *rest = await ctx.tick().sample(
                dut.i.valid, dut.i.ready, dut.pending, dut.idle, dut.error, *bus.signals()
            )
            errors += error
            assert pending <= outstanding
            assert idle == (pending == 0)
            if valid and ready:
                position += 1
                ctx.set(dut.i.valid, 0)
            bus.step(ctx, rest)
            if stop_at is not None and cycle > stop_at and idle:
                assert position <= -(-begun // 8) * 8
                break
            if len(bus.answered) == len(lines):
                break
        else:
            raise AssertionError("the lines were not written")
        bus.check_constants(ctx)
        assert ctx.get(dut.idle)
        result.update(cycles=cycle, errors=errors)

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(bench)
    simulator.run()
    return bus, result["cycles"], result["errors"]


def some_lines(count):
    rng = random.Random(count)
    return [(rng.getrandbits(58) << 6, rng.randbytes(64)) for _ in range(count)]


@pytest.mark.parametrize("source_stall", STALLS)
@pytest.mark.parametrize("bus_stall", STALLS)
def test_lines_arrive(source_stall, bus_stall):
    lines = some_lines(12)
    bus, _, errors = run(lines, source_stall=source_stall, bus_stall=bus_stall)
    assert bus.lines == lines
    assert not errors


def test_one_word_a_cycle():
    lines = some_lines(20)
    _bus, cycles, _ = run(lines)
    assert cycles <= 20 * 8 + 4


@pytest.mark.parametrize("outstanding", [1, 3])
def test_outstanding(outstanding):
    bus, _, _ = run(some_lines(16), outstanding=outstanding, bus_stall=0.8)
    assert bus.outstanding_most <= outstanding


def test_errors_strobe():
    lines = some_lines(8)
    _, _, errors = run(lines, bad=[lines[2][0], lines[7][0]], bus_stall=0.3)
    assert errors == 2


@pytest.mark.parametrize("stop_at", [1, 9, 21, 40])
def test_stop(stop_at):
    """A line that is begun is ended, no other is begun."""
    lines = some_lines(20)
    bus, _, _ = run(lines, stop_at=stop_at, bus_stall=0.2)
    assert bus.lines == lines[: len(bus.lines)]
    assert len(bus.lines) < 8


def test_outstanding_is_checked():
    with pytest.raises(ValueError, match="outstanding must be at least 1, not 0"):
        WriteLines(0)
