"""What tests of RTL share: running benches, a host memory that is read, pipelines of fixed latency."""

import random
from collections import deque

from amaranth.sim import Simulator

WORDS = 8
"""Of a line of host memory."""


def simulate(dut, *benches, background=()):
    """Run the benches to their end; those in the background end with them."""
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for bench in background:
        sim.add_testbench(bench, background=True)
    for bench in benches:
        sim.add_testbench(bench)
    sim.run()


def read_memory(bus, word, *, latency=5, stall=0.0, seed=0, bad=(), response=2, log=None):
    """A host memory that answers reads of lines in order.

    Args:
        bus: AXI4, as `ReadLines` drives it.
        word: function of an address, what the memory holds there.
        latency: cycles from an address to its first word.
        stall: probability that an address, or a word, waits in a cycle.
        seed: of the stalls.
        bad: addresses of lines that answer with an error.
        response: that error.
        log: gets under "most" the most lines that were under way at once.
    """
    rng = random.Random(seed)

    async def bench(ctx):
        queue = deque()  # (earliest cycle, data, response, last)
        cycle, shown, in_flight, most = 0, False, 0, 0
        while True:
            ctx.set(bus.arready, rng.random() >= stall)
            if not shown and queue and queue[0][0] <= cycle and rng.random() >= stall:
                shown = True
                ctx.set(bus.rdata, queue[0][1])
                ctx.set(bus.rresp, queue[0][2])
                ctx.set(bus.rlast, queue[0][3])
            ctx.set(bus.rvalid, shown)
            _, _, arvalid, arready, araddr, shape, rvalid, rready = await ctx.tick().sample(
                bus.arvalid, bus.arready, bus.araddr, bus.arlen, bus.rvalid, bus.rready
            )
            cycle += 1
            if arvalid and arready:
                assert shape == WORDS - 1
                assert araddr % (8 * WORDS) == 0
                assert ctx.get(bus.arsize) == 3
                assert ctx.get(bus.arburst) == 1
                in_flight += 1
                error = response if araddr in bad else 0
                queue += [(cycle + latency, word(araddr + 8 * i), error, i == WORDS - 1) for i in range(WORDS)]
            if rvalid and rready:
                in_flight -= queue.popleft()[3]
                shown = False
            if log is not None:
                most = max(most, in_flight)
                log["most"] = most

    return bench


def pipelined(dut, payloads, latency, gaps=None):
    """What comes out of a pipeline: the lowest 32 bits of each output; its tag lies above them and counts from 0.

    Checks tags, order and latency.

    Args:
        dut: has a stream `i`, whose payloads wait until it is ready, and a stream `o` that never waits.
        payloads: integers, one after the other.
        latency: cycles from a payload to what comes of it.
        gaps: a random generator, for cycles without a payload in between.
    """
    given_at, results = [], []
    tags = (1 << len(dut.o.payload.as_value()) - 32) - 1

    async def drive(ctx):
        cycle = 0
        for payload in payloads:
            while gaps is not None and gaps.random() < 0.3:
                ctx.set(dut.i.valid, 0)
                await ctx.tick()
                cycle += 1
            ctx.set(dut.i.payload.as_value(), payload)
            ctx.set(dut.i.valid, 1)
            while not ctx.get(dut.i.ready):
                await ctx.tick()
                cycle += 1
            await ctx.tick()
            cycle += 1
            given_at.append(cycle)
        ctx.set(dut.i.valid, 0)

    async def collect(ctx):
        cycle = 0
        async for _, _, valid, raw in ctx.tick().sample(dut.o.valid, dut.o.payload.as_value()):
            cycle += 1
            if valid:
                assert raw >> 32 == len(results) & tags
                assert cycle == given_at[len(results)] + latency
                results.append(raw & 0xFFFFFFFF)
            if len(results) == len(payloads):
                return

    simulate(dut, drive, collect)
    return results
