"""Counts of what is outstanding, beside a model that counts at once: as fast as events may come, and in any order."""

import random
from collections import Counter

import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.config import TINY, Config
from kvattic.spec.nand import TINY_PART
from kvattic_hdl.lane.outstanding import Outstanding, waiting_scores

PART = TINY_PART.resized(512, spare_bytes=256)
CONFIGS = {
    "tiny": TINY,
    "slots3": Config(channels=2, rows=2, head_dim=32, part=PART, codeword_bytes=64, score_depth=128,
                     groups_in_flight=2, jobs_in_flight=3),
    "rows16": Config(channels=2, rows=16, head_dim=32, beat_bytes=32, part=PART, codeword_bytes=64, score_depth=256,
                     jobs_in_flight=16),
}
SETTLED = 80
"""Cycles after which all that waited is counted."""


def later(config: Config) -> int:
    """Cycles by which K is stored later than what was issued with it: what `waiting_scores` covers."""
    return 16 + 3 * config.rows


def plan(config: Config, rnd: random.Random, pairs: int) -> dict[int, list[tuple[str, int]]]:
    """(event, slot) by cycle: requests every other cycle, and codewords likewise as soon as they may be there.

    Runs of K, and of V or features behind them, so that what is stored late and what is stored early meets.
    """
    events: dict[int, list[tuple[str, int]]] = {}
    requests = []
    cycle = 0
    while len(requests) < pairs:
        kind = rnd.choice(("key", "value", "feature"))
        for _ in range(rnd.randrange(1, 60)):
            slot = rnd.randrange(config.jobs_in_flight)
            asked = {"key": rnd.choice(("key", "first")), "value": "value", "feature": "first"}[kind]
            events.setdefault(cycle, []).append((f"{asked}_asked", slot))
            requests.append((cycle, kind, slot))
            cycle += 2 if rnd.random() < 0.95 else rnd.randrange(3, 20)
    issued = rnd.randrange(2, 100)
    for asked, kind, slot in requests:
        issued = max(issued + 2, asked + 8)
        stored = issued + (later(config) if kind == "key" else 0)
        events.setdefault(stored, []).append((f"{kind}_stored", slot))
    return events


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_all_events_and_nothing_is_done_early(name, seed):
    config = CONFIGS[name]
    rnd = random.Random(seed)
    events = plan(config, rnd, 1500)
    dut, sim = simulation(Outstanding, config)
    sim.add_clock(1e-6)
    left = {"key": Counter(), "value": Counter()}
    slots = range(config.jobs_in_flight)

    async def bench(ctx):
        for walk in (dut.key, dut.value):           # all walks ended before, so that done tells of the counts alone
            for slot in slots:
                ctx.set(walk.slot, slot)
                ctx.set(walk.end, 1)
                await ctx.tick()
            ctx.set(walk.end, 0)
        history = []
        for cycle in range(max(events) + SETTLED):
            now = dict(events.get(cycle, []))
            assert len(now) == len(events.get(cycle, []))
            for event in ("key_asked", "value_asked", "first_asked"):
                walk = getattr(dut, event.split("_")[0])
                ctx.set(walk.asked, event in now)
                ctx.set(walk.slot, now.get(event, rnd.choice(slots)))
            for event in ("key_stored", "value_stored", "feature_stored"):
                stored = getattr(dut, event)
                ctx.set(stored.valid, event in now)
                ctx.set(stored.slot, now.get(event, rnd.choice(slots)))
            for event, slot in now.items():
                left["value" if event.startswith("value") else "key"][slot] += 1 if event.endswith("asked") else -1
            await ctx.tick()
            history.append({kind: {slot for slot in slots if counts[slot]} for kind, counts in left.items()})
            for kind, done, wait in (
                    ("key", dut.keys_done, dut.keys_wait), ("value", dut.values_done, dut.values_wait)):
                # What was and is outstanding is not done, from four cycles after the first request on.
                for slot in set.intersection(*(then[kind] for then in history[-4:])) if cycle > 3 else ():
                    assert not ctx.get(done) >> slot & 1, f"{kind} of slot {slot} done in cycle {cycle}"
                    assert ctx.get(wait) >> slot & 1
        assert not any(left["key"].values()) and not any(left["value"].values())
        for waits, done in ((dut.keys_wait, dut.keys_done), (dut.values_wait, dut.values_done)):
            assert ctx.get(waits) == 0
            assert ctx.get(done) == (1 << config.jobs_in_flight) - 1

    sim.add_testbench(bench)
    sim.run()


def test_missing_counts_and_a_new_job():
    config = CONFIGS["slots3"]
    dut, sim = simulation(Outstanding, config)
    sim.add_clock(1e-6)

    async def ask(ctx, walk, slot, times):
        for _ in range(times):
            ctx.set(walk.slot, slot)
            ctx.set(walk.asked, 1)
            await ctx.tick()
            ctx.set(walk.asked, 0)
            await ctx.tick()

    async def missing(ctx, slot):
        ctx.set(dut.report_slot, slot)
        await ctx.tick().repeat(2)
        return ctx.get(dut.missing_key), ctx.get(dut.missing_value)

    async def bench(ctx):
        await ask(ctx, dut.key, 0, 3)
        await ask(ctx, dut.first, 0, 4)
        await ask(ctx, dut.value, 0, 5)
        await ask(ctx, dut.value, 2, 6)
        await ctx.tick().repeat(4)
        assert [await missing(ctx, slot) for slot in range(3)] == [(7, 5), (0, 0), (0, 6)]
        ctx.set(dut.feature_stored.valid, 1)
        ctx.set(dut.key_stored.valid, 1)
        await ctx.tick()
        ctx.set(dut.feature_stored.valid, 0)
        ctx.set(dut.key_stored.valid, 0)
        await ctx.tick().repeat(6)
        assert await missing(ctx, 0) == (5, 5)
        ctx.set(dut.start, 1)                       # the job of slot 0 was abandoned; a new one begins with zero
        await ctx.tick()
        ctx.set(dut.start, 0)
        assert await missing(ctx, 0) == (0, 0)
        assert await missing(ctx, 2) == (0, 6)
        await ask(ctx, dut.key, 0, 2)
        await ctx.tick().repeat(4)
        assert await missing(ctx, 0) == (2, 0)

    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("name", CONFIGS)
def test_room_for_scores_covers_what_gathers(name):
    config = CONFIGS[name]
    assert waiting_scores(config) > later(config) // 2 + 2
