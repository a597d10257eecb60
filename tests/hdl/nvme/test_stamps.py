"""JobStamps: a random course of jobs, beside the cycles of its events."""

import random
from dataclasses import dataclass, field

import pytest
from amaranth.sim import Simulator

from kvattic.spec.config import TINY, Config
from kvattic_hdl.nvme.stamps import DELAY, JobStamps, settle_cycles

CLOCK_STARTS = 0xFFFF_FF00
"""CYCLES in the first cycle: its lower half overflows on the way."""


@dataclass
class Cycle:
    """What happens in a cycle: strobes, the lanes' beats by slot, and stamps to be read."""

    asked: int = 0
    fetched: int = 0
    used: int = 0
    started: int = 0
    slot: int = 0
    beats: dict = field(default_factory=dict)
    read: tuple | None = None


def course(config, jobs, rng):
    """Random cycles: each slot gets job after job, with no, few or many beats, from several lanes at once."""
    cycles = []

    def at(cycle):
        while len(cycles) <= cycle:
            cycles.append(Cycle())
        return cycles[cycle]

    free = [0] * config.jobs_in_flight  # when the slot may have its next job
    now, last_fetched = 1, -1
    for job in range(jobs):
        slot = job % config.jobs_in_flight
        fetched = max(now + rng.randint(1, 3), free[slot])
        asked = rng.randint(last_fetched + 1, fetched - 1)  # also while the one before it is in hand
        started, used = (fetched + n for n in sorted(rng.sample(range(2, 9), 2)))
        beats = rng.choice((0, 1, 2, 20))
        at(asked).asked = at(fetched).fetched = 1
        at(used).used, at(used).slot = 1, slot
        # A job that no lane works on is only used.
        begin = started if beats else used
        at(begin).started, at(begin).slot = 1, slot
        taken = []
        for _ in range(beats):
            cycle, lane = begin + rng.randint(1, 40), rng.randrange(config.channels)
            if lane not in at(cycle).beats:
                at(cycle).beats[lane] = slot
                taken.append(cycle)
        times = (asked, min(taken), max(taken)) if taken else (asked, None, None)
        end = max([used, *(cycle + settle_cycles(config) + 1 for cycle in taken)]) + DELAY + 1
        while at(end).read:
            end += 1
        at(end).read = slot, [0 if time is None else CLOCK_STARTS + time & 0xFFFF_FFFF for time in times]
        free[slot], now, last_fetched = end + 1, used, fetched
    return cycles


@pytest.mark.parametrize("config", [TINY, Config(channels=3, jobs_in_flight=5)], ids=["tiny", "three lanes"])
def test_jobs_have_the_cycles_of_their_events(config):
    dut, checked = JobStamps(config), 0
    cycles = course(config, 200, random.Random(1))

    async def bench(ctx):
        nonlocal checked
        before = {}
        for number, cycle in enumerate(cycles):
            ctx.set(dut.cycle, CLOCK_STARTS + number - DELAY & 0xFFFF_FFFF)
            for name in ("asked", "fetched", "used", "started"):
                ctx.set(getattr(dut, name), getattr(cycle, name))
            # Where nothing happens, the numbers say nothing.
            ctx.set(dut.used_slot, cycle.slot if cycle.used else number % config.jobs_in_flight)
            ctx.set(dut.started_slot, cycle.slot if cycle.started else number % config.jobs_in_flight)
            ctx.set(dut.beats, sum(1 << lane for lane in cycle.beats))
            for lane in range(config.channels):
                ctx.set(dut.beat_slots[lane], before.get(lane, number % config.jobs_in_flight))
            before = cycle.beats
            if cycle.read:
                slot, expected = cycle.read
                ctx.set(dut.slot, slot)
                found = ctx.get(dut.stamps)
                assert [found.fetched, found.first_beat, found.last_beat] == expected
                checked += 1
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert checked == 200
