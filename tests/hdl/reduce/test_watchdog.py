"""Watchdog: whom it fails, when, and what it says."""

import pytest
from amaranth.sim import Simulator

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.reduce.watchdog import Watchdog

CONFIG = Config(channels=3)
ALL = (1 << CONFIG.jobs_in_flight) - 1


def simulate(bench, missing=None):
    """`missing`: (kind, slot, channel) -> codewords, answered two cycles after report_slot."""
    dut = Watchdog(CONFIG)
    sim = Simulator(dut)
    sim.add_clock(1e-6)

    async def lanes(ctx):
        before = None
        while True:
            _, _, slot, probing = await ctx.tick().sample(dut.report_slot, dut.probing)
            if before is not None:
                for kind, port in ((Kind.KEY, dut.missing_key), (Kind.VALUE, dut.missing_value)):
                    ctx.set(
                        port,
                        [
                            (missing or {}).get((kind, before, c), 1000 + c)
                            if before >= 0
                            else 0xDEAD
                            for c in range(CONFIG.channels)
                        ],
                    )
            before = slot if probing else -1

    async def main(ctx):
        await bench(ctx, dut)

    sim.add_testbench(lanes, background=True)
    sim.add_testbench(main)
    sim.run()


async def wait(ctx, dut, limit=300):
    """Cycles until something is failed; None: nothing."""
    for cycle in range(limit):
        if ctx.get(dut.failed):
            return cycle
        await ctx.tick()
    return None


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


@pytest.mark.parametrize("timeout", [1, 20, 100])
def test_keys(timeout):
    async def bench(ctx, dut):
        ctx.set(dut.timeout, timeout)
        ctx.set(dut.keys_done, [ALL, ALL & ~0b100, ALL & ~0b100])
        await ctx.tick().repeat(timeout + 20)
        assert not ctx.get(dut.failed)  # nobody waits
        ctx.set(dut.maximum_slot, 2)
        ctx.set(dut.maximum_waiting, 1)
        cycles = await wait(ctx, dut)
        assert timeout <= cycles <= timeout + 10
        assert ctx.get(dut.failed) == 0b100
        assert ctx.get(dut.failed_slot) == 2
        assert ctx.get(dut.where) == 1 << 16 | 77
        # Nothing is failed on top of it, though the wait goes on.
        ctx.set(dut.keys_done, [ALL, ALL, ALL & ~0b100])
        await ctx.tick().repeat(timeout + 20)
        assert ctx.get(dut.where) == 1 << 16 | 77
        ctx.set(dut.maximum_waiting, 0)
        await pulse(ctx, dut.handed)
        await ctx.tick().repeat(timeout + 20)
        assert ctx.get(dut.failed) == 0b100  # until the slot is freed
        ctx.set(dut.freed_slot, 2)
        await pulse(ctx, dut.freed)
        assert not ctx.get(dut.failed)

    simulate(bench, {(Kind.KEY, 2, 1): 77, (Kind.KEY, 2, 2): 78})


def test_values_come_first_and_one_job_fails_at_a_time():
    async def bench(ctx, dut):
        ctx.set(dut.timeout, 30)
        await pulse(ctx, dut.handed)
        ctx.set(dut.keys_done, [ALL, ALL, ALL & ~0b1])
        ctx.set(dut.values_done, [ALL & ~0b1000, ALL & ~0b1000, ALL])
        ctx.set(dut.maximum_slot, 0)
        ctx.set(dut.maximum_waiting, 1)
        ctx.set(dut.finisher_slot, 3)
        ctx.set(dut.finisher_waiting, 1)
        assert await wait(ctx, dut) is not None
        assert ctx.get(dut.failed) == 0b1000
        assert ctx.get(dut.where) == Kind.VALUE << 15 | 0x7FFF  # saturated
        # The Finisher now works on it; the job behind has to wait.
        ctx.set(dut.finisher_waiting, 0)
        await ctx.tick().repeat(100)
        assert ctx.get(dut.failed) == 0b1000
        ctx.set(dut.freed_slot, 3)
        await pulse(ctx, dut.freed)
        assert not ctx.get(dut.failed)
        cycles = await wait(ctx, dut)
        assert 30 <= cycles <= 40
        assert ctx.get(dut.failed) == 0b0001
        assert ctx.get(dut.failed_slot) == 0
        assert ctx.get(dut.where) == 2 << 16 | 5

    simulate(bench, {(Kind.VALUE, 3, 0): 0x9000, (Kind.KEY, 0, 2): 5})


def test_progress_holds_it_off():
    async def bench(ctx, dut):
        ctx.set(dut.timeout, 20)
        ctx.set(dut.maximum_waiting, 1)
        for _ in range(20):
            await pulse(ctx, dut.progress)
            await ctx.tick().repeat(15)
            assert not ctx.get(dut.failed)
        assert await wait(ctx, dut) is not None

    simulate(bench)


@pytest.mark.parametrize("timeout", [1, 5, 20])
def test_busy_dies_make_it_slower(timeout):
    """Sixteen times, and no slower: one that is busy for ever hangs nothing."""

    async def bench(ctx, dut):
        ctx.set(dut.timeout, timeout)
        ctx.set(dut.maximum_waiting, 1)
        ctx.set(dut.activity, 1)
        cycles = await wait(ctx, dut, 1000)
        assert 16 * timeout <= cycles <= 16 * (timeout + 2) + 10
        # The time before it counts as ever.
        ctx.set(dut.maximum_waiting, 0)
        await pulse(ctx, dut.handed)
        await pulse(ctx, dut.freed)
        assert not ctx.get(dut.failed)
        ctx.set(dut.activity, 0)
        ctx.set(dut.maximum_waiting, 1)
        assert await wait(ctx, dut) <= timeout + 10

    simulate(bench)


def test_never():
    async def bench(ctx, dut):
        ctx.set(dut.timeout, 0)
        ctx.set(dut.maximum_waiting, 1)
        assert await wait(ctx, dut, 500) is None

    simulate(bench)


@pytest.mark.parametrize("after", range(8))
def test_a_job_that_gets_done_at_the_last_moment(after):
    """The wait ends some cycles after the timeout: failed before that, or not at all."""

    async def bench(ctx, dut):
        ctx.set(dut.timeout, 20)
        ctx.set(dut.maximum_waiting, 1)
        ctx.set(dut.maximum_slot, 1)
        await ctx.tick().until(dut.probing)
        for _ in range(after):
            if ctx.get(dut.failed):
                return
            await ctx.tick()
        if ctx.get(dut.failed):
            return
        ctx.set(dut.keys_done, [ALL] * 3)
        ctx.set(dut.maximum_waiting, 0)
        assert await wait(ctx, dut, 100) is None

    simulate(bench)


def test_the_finisher_at_work_is_no_timeout():
    async def bench(ctx, dut):
        ctx.set(dut.timeout, 20)
        await pulse(ctx, dut.handed)
        ctx.set(dut.maximum_waiting, 1)
        assert await wait(ctx, dut, 100) is None
        ctx.set(dut.freed_slot, 1)
        await pulse(ctx, dut.freed)
        assert await wait(ctx, dut, 100) is not None

    simulate(bench)


def test_first_pass():
    async def bench(ctx, dut):
        ctx.set(dut.timeout, 20)
        ctx.set(dut.first_done, [ALL & ~0b10, ALL, ALL & ~0b10])
        ctx.set(dut.selection_slot, 1)
        # A job is past TopK: that one is older, and nobody waits for it.
        await pulse(ctx, dut.selected)
        ctx.set(dut.selection_waiting, 1)
        await ctx.tick().repeat(60)
        assert not ctx.get(dut.failed)
        # Maximum waits for it: it fails, not the one that TopK waits for.
        ctx.set(dut.maximum_slot, 0)
        ctx.set(dut.keys_done, [ALL, ALL & ~1, ALL])
        ctx.set(dut.maximum_waiting, 1)
        assert await wait(ctx, dut) is not None
        assert ctx.get(dut.failed) == 1
        ctx.set(dut.maximum_waiting, 0)
        await pulse(ctx, dut.handed)
        ctx.set(dut.freed_slot, 0)
        await pulse(ctx, dut.freed)
        assert not ctx.get(dut.failed)
        # Now it is the oldest; its codewords count as K.
        assert await wait(ctx, dut) is not None
        assert ctx.get(dut.failed) == 0b10
        assert ctx.get(dut.where) == 0 << 16 | Kind.KEY << 15 | 5

    simulate(bench, missing={(Kind.KEY, 1, 0): 5})
