"""StripeLists: lists of jobs in a ring, as readers see them, and the room that is left."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY
from kvattic.spec.config import TINY
from kvattic_hdl.lane.jobs import BLOCK_WORDS, StripeLists
from kvattic_hdl.lib.shapes import Shapes

SPARSE = replace(TINY, score_depth=4096)
DENSE = replace(SPARSE, sparse=False, jobs_in_flight=3)
GROUPED = replace(SPARSE, channels=4, lane_channels=2, beat_bytes=16)


@pytest.mark.parametrize("config", [SPARSE, DENSE, GROUPED], ids=["sparse", "dense", "two channels a lane"])
def test_lists(config):
    """Random jobs; some are refused after their table, which may be too long; lists wrap round the ring."""
    dut, sim = simulation(StripeLists, config)
    shapes, rng = Shapes(config), np.random.default_rng(3)
    most, slots, lane = 1 << shapes.list_bits, config.jobs_in_flight, 1
    unit = config.group_pages if config.sparse else 1
    places = min(most << (slots - 1).bit_length(), max(2 * most, BLOCK_WORDS))
    held = deque()      # (slot, the job is a sparse one, stripes of the lane)
    seen = set()

    async def load(ctx, **values):
        ctx.set(dut.load, values)
        ctx.set(dut.load_valid, 1)
        await ctx.tick()
        ctx.set(dut.load_valid, 0)

    async def load_table(ctx, slot, count, sparse):
        """A table with so many stripes in this lane; returns them."""
        await load(ctx, record=1, slot=slot)
        mine = []
        for number in range(2 * count):
            entry = {name: int(rng.integers(1 << 24)) for name in ("key_page", "value_page")}
            entry |= {"channel": int(rng.integers(config.channels // config.lanes)) * config.lanes + number % 2}
            dram, whole = int(rng.integers(2)), int(rng.integers(2))
            token = number * 64
            packed = TABLE_ENTRY.pack(flags=dram | whole << 1, **entry)
            await load(ctx, stripe=1, slot=slot, start=token, last=number == 2 * count - 1,
                       data=int.from_bytes(packed, "little"))
            sketch = {"page": int(rng.integers(1 << 24)), "codeword": 3}
            if sparse:
                await load(ctx, sketch=1, slot=slot,
                           data=int.from_bytes(SKETCH_ENTRY.pack(written=1, **sketch), "little"))
            if number % 2 == lane:
                mine.append(entry | {"dram": dram, "whole": dram | whole, "token": token, "sketch": sketch})
        return mine

    async def read(ctx, slot, number, stripe, sparse):
        for name in ("key", "value", "arrivals", *(("first", "selector") if sparse else ())):
            ctx.set(getattr(dut, name).address, number | slot << shapes.list_bits)
        await ctx.tick()
        for name in ("key", "value"):
            got = ctx.get(getattr(dut, name).stripe)
            assert (got.page, got.dram) == (stripe[f"{name}_page"], stripe["dram"])
            if config.lane_channels > 1:
                assert got.of_lane == stripe["channel"] // config.lanes
        assert ctx.get(dut.arrivals.stripe).token == stripe["token"]
        if sparse:
            first, swept = ctx.get(dut.first.stripe), ctx.get(dut.selector.stripe)
            assert (swept.token, swept.whole) == (stripe["token"], stripe["whole"])
            assert (first.token, first.whole) == (stripe["token"], stripe["whole"])
            assert first.page == (stripe["key_page"] if stripe["whole"] else stripe["sketch"]["page"])

    async def free(ctx):
        slot, _, _ = held.popleft()
        ctx.set(dut.live, ctx.get(dut.live) & ~(1 << slot))
        await ctx.tick().repeat(slots + 4)

    async def bench(ctx):
        ctx.set(dut.lane, lane)
        for job in range(60):
            slot = job % slots
            while len(held) == slots or any(slot == other for other, _, _ in held):
                await free(ctx)
            await ctx.tick().repeat(4)
            pages = sum(len(stripes) * unit if of_sparse else -(-len(stripes) // unit) * unit
                        for _, of_sparse, stripes in held)
            room = pages <= places - most
            assert ctx.get(dut.room) == room
            seen.add(room)
            while not ctx.get(dut.room):
                await free(ctx)
            refused = rng.random() < 0.2
            sparse = config.sparse and bool(rng.integers(2))
            limit = most // unit if sparse else most
            mine = await load_table(ctx, slot, int(rng.integers(limit + 1)) + (3 if refused else 0), sparse)
            if not refused:
                await ctx.tick()
                assert ctx.get(dut.stripes) == len(mine)
                ctx.set(dut.start_slot, slot)
                ctx.set(dut.start_sparse, sparse)
                ctx.set(dut.start_valid, 1)
                await ctx.tick()
                ctx.set(dut.start_valid, 0)
                ctx.set(dut.live, ctx.get(dut.live) | 1 << slot)
                held.append((slot, sparse, mine))
            for other, of_sparse, stripes in held:
                for number, stripe in enumerate(stripes):
                    await read(ctx, other, number, stripe, of_sparse)

    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
    assert seen == {True, False}
