"""Maximum against the plain maximum of what the lanes hold."""

import random

import pytest
from amaranth.sim import Simulator

from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_MASKED, SCORE_MAX, SCORE_MIN
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.reduce.maximum import Maximum


def make_config(channels, rows, jobs=3):
    return Config(channels=channels, rows=rows, jobs_in_flight=jobs)


def lanes(dut, config, held):
    """The lanes' memories of row maxima: two cycles of latency, written together."""

    async def bench(ctx):
        before = None
        while True:
            _, _, slot, row, write, new = await ctx.tick().sample(
                dut.maximum_slot, dut.maximum_row, dut.maximum_write, dut.maximum_new
            )
            if before is not None:
                ctx.set(dut.maximum, before)
            before = [
                held[channel].get((slot, row), SCORE_MASKED) for channel in range(config.channels)
            ]
            if write:
                for lane in held:
                    lane[slot, row] = new

    return bench


def score(rng):
    return rng.choice(
        (
            SCORE_MASKED,
            SCORE_MIN,
            SCORE_MAX,
            -1,
            0,
            rng.randint(SCORE_MIN, SCORE_MAX),
            rng.randint(-1000, 1000),
        )
    )


@pytest.mark.parametrize(
    ("channels", "rows"), [(1, 1), (1, 4), (2, 2), (3, 5), (8, 1), (8, 8), (32, 16)]
)
def test_jobs(channels, rows):
    config = make_config(channels, rows)
    dut = Maximum(config)
    rng = random.Random(channels * 100 + rows)
    held = [{} for _ in range(channels)]
    total = 7
    jobs = [
        {
            "slot": i % config.jobs_in_flight,
            "lanes": i not in (2, 3),
            "queue": rng.getrandbits(3),
            "identifier": i,
            "mode": rng.getrandbits(2),
            "read": rng.getrandbits(1),
            "units": rng.getrandbits(16),
            "rows": rng.randint(1, rows) if i else rows,
            "result": rng.getrandbits(64),
            "status": i,
            "where": rng.getrandbits(32),
        }
        for i in range(total)
    ]
    got = []
    shapes = Shapes(config)

    async def bench(ctx):
        for job in jobs:
            slot = job["slot"]
            ctx.set(dut.jobs_i.payload, job)
            ctx.set(dut.jobs_i.valid, 1)
            await ctx.tick().until(dut.jobs_i.ready)
            ctx.set(dut.jobs_i.valid, 0)
            opened = ctx.get(dut.value_open)
            assert not opened >> slot & 1
            expected = {}
            if job["lanes"]:
                for row in range(job["rows"]):
                    for channel in range(channels):
                        held[channel][slot, row] = score(rng)
                    expected[row] = max(lane[slot, row] for lane in held)
                order = list(range(channels))
                rng.shuffle(order)
                for channel in order:
                    await ctx.tick().repeat(rng.randint(1, 3))
                    assert ctx.get(dut.waiting)
                    assert ctx.get(dut.waiting_slot) == slot
                    assert not ctx.get(dut.value_open) >> slot & 1
                    ctx.set(dut.keys_done[channel], ctx.get(dut.keys_done[channel]) | 1 << slot)
                cycles = 0
                while not ctx.get(dut.value_open) >> slot & 1:
                    await ctx.tick()
                    cycles += 1
                assert cycles == channels * job["rows"] + job["rows"] + 6
                for lane in held:
                    assert {row: lane[slot, row] for row in expected} == expected
                assert not ctx.get(dut.waiting)
            while len(got) <= job["identifier"]:
                await ctx.tick()
            for row, value in expected.items():
                ctx.set(dut.final_slot, slot)
                ctx.set(dut.final_row, row)
                await ctx.tick().repeat(2)
                assert ctx.get(dut.final) == value
            # The last but one ends.
            old = (slot - 1) % config.jobs_in_flight
            ctx.set(dut.freed_slot, old)
            ctx.set(dut.freed, 1)
            await ctx.tick()
            ctx.set(dut.freed, 0)
            assert ctx.get(dut.value_open) == (1 << slot if job["lanes"] else 0)
            for channel in range(channels):
                ctx.set(dut.keys_done[channel], ctx.get(dut.keys_done[channel]) & ~(1 << old))

    async def take(ctx):
        while True:
            ctx.set(dut.jobs_o.ready, rng.random() < 0.6)
            _, _, valid, ready, payload, opened = await ctx.tick().sample(
                dut.jobs_o.valid, dut.jobs_o.ready, dut.jobs_o.payload, dut.value_open
            )
            if valid and ready:
                assert opened >> payload.slot & 1 == payload.lanes
                got.append({name: payload[name] for name, _ in shapes.job})

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(lanes(dut, config, held), background=True)
    sim.add_testbench(take, background=True)
    sim.add_testbench(bench)
    sim.run()
    assert got == jobs


def test_stale_done_is_not_taken():
    """keys_done of the slot's last job falls after `start`; the job may come in that very cycle."""
    config = make_config(2, 1, jobs=2)
    dut = Maximum(config)

    async def bench(ctx):
        ctx.set(dut.keys_done, [0b11, 0b11])
        await ctx.tick().repeat(3)
        # (start_valid in the cycle that ended here)
        ctx.set(dut.keys_done, [0b10, 0b10])
        ctx.set(dut.jobs_i.payload, {"slot": 0, "lanes": 1, "rows": 1})
        ctx.set(dut.jobs_i.valid, 1)
        await ctx.tick()
        ctx.set(dut.jobs_i.valid, 0)
        for _ in range(30):
            assert ctx.get(dut.waiting)
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
