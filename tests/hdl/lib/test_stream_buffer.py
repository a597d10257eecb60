"""Streams registered in both directions: all payloads in order, at their rate, and no path through."""

import random

import pytest
from amaranth.sim import Simulator

from kvattic_hdl.lib.stream_buffer import Queue, StreamBuffer, StreamRegister

PAYLOADS = list(range(1, 200))


def passed(component: type[StreamBuffer | StreamRegister], offer: float, take: float) -> tuple[list[int], int]:
    """What comes out of a buffer, and in how many cycles; with probabilities that each side is willing in a cycle."""
    rng = random.Random(f"{offer} {take}")
    buffer = component(8)
    found: list[int] = []
    cycles = 0

    async def bench(ctx) -> None:
        nonlocal cycles
        waiting = list(PAYLOADS)
        while len(found) < len(PAYLOADS) and cycles < 5000:
            offered = bool(waiting) and (ctx.get(buffer.i.valid) or rng.random() < offer)
            ctx.set(buffer.i.valid, offered)
            ctx.set(buffer.i.payload, waiting[0] if offered else 0)
            ctx.set(buffer.o.ready, rng.random() < take)
            if offered and ctx.get(buffer.i.ready):
                waiting.pop(0)
                accepted = True
            else:
                accepted = False
            if ctx.get(buffer.o.valid & buffer.o.ready):
                found.append(ctx.get(buffer.o.payload))
            await ctx.tick()
            cycles += 1
            if accepted:
                ctx.set(buffer.i.valid, 0)

    simulator = Simulator(buffer)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return found, cycles


@pytest.mark.parametrize("component", [StreamBuffer, StreamRegister])
@pytest.mark.parametrize(("offer", "take"), [(1, 1), (0.5, 1), (1, 0.5), (0.3, 0.7), (0.8, 0.2)])
def test_all_payloads_come_out_in_order(component, offer, take):
    assert passed(component, offer, take)[0] == PAYLOADS


def test_a_payload_a_cycle_one_cycle_later():
    assert passed(StreamBuffer, 1, 1)[1] == len(PAYLOADS) + 1


def test_a_register_takes_a_payload_every_other_cycle():
    assert passed(StreamRegister, 1, 1)[1] == 2 * len(PAYLOADS)


@pytest.mark.parametrize("depth", [2, 4, 16])
@pytest.mark.parametrize(("offer", "take"), [(1, 1), (0.5, 1), (1, 0.5), (0.3, 0.7), (0.8, 0.2)])
def test_a_queue_keeps_all_that_its_writer_has_room_for(depth, offer, take):
    rng = random.Random(f"{depth} {offer} {take}")
    queue = Queue(8, depth)
    found: list[int] = []

    async def bench(ctx) -> None:
        waiting, inside, most = list(PAYLOADS), 0, 0
        for _ in range(5000):
            offered = bool(waiting) and inside < depth and rng.random() < offer
            ctx.set(queue.i.valid, offered)
            ctx.set(queue.i.payload, waiting[0] if offered else 0xAA)
            ctx.set(queue.o.ready, rng.random() < take)
            assert ctx.get(queue.o.valid) == (inside != 0)   # a cycle after it was written, at once
            if ctx.get(queue.o.valid & queue.o.ready):
                found.append(ctx.get(queue.o.payload))
                inside -= 1
            if offered:
                waiting.pop(0)
                inside += 1
            most = max(most, inside)
            await ctx.tick()
            if len(found) == len(PAYLOADS):
                break
        assert most == depth or offer <= take

    simulator = Simulator(queue)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert found == PAYLOADS
