"""QueueSet: each queue keeps its order, takes no more than fits, and loses nothing."""

import random
from collections import deque

import pytest
from amaranth.hdl import unsigned
from tests.hdl.bench import simulate

from kvattic_hdl.storage.queue_set import QueuePointers, QueueSet

DEPTH = 4


@pytest.mark.parametrize("queues", [1, 3, 8])
def test_queues(queues):
    dut, rng = QueueSet(unsigned(16), queues, DEPTH), random.Random(queues)
    model = [deque() for _ in range(queues)]
    seen = {"full": 0, "popped": 0}

    async def scenario(ctx):
        looked = None   # the queue looked at in the cycle before
        for number in range(4000):
            give, to, look = rng.random() < 0.6, rng.randrange(queues), rng.randrange(queues)
            waiting = ctx.get(dut.waiting)
            assert waiting == sum(1 << queue for queue in range(queues) if model[queue])
            if looked is not None and waiting >> looked & 1:
                look = looked
                assert ctx.get(dut.head) == model[look][0]
            pop = look == looked and waiting >> look & 1
            ctx.set(dut.i.payload, {"queue": to, "item": number})
            ctx.set(dut.i.valid, give)
            ctx.set(dut.queue, look)
            ctx.set(dut.pop, pop)
            assert ctx.get(dut.i.ready) == (len(model[to]) < DEPTH)
            taken = give and ctx.get(dut.i.ready)
            seen["full"] += give and not taken
            await ctx.tick()
            if pop:
                model[look].popleft()
                seen["popped"] += 1
            # A head that has just come, or moved up, is read in the next cycle.
            looked = look if model[look] and not pop and not (taken and to == look) else None
            if taken:
                model[to].append(number)

    simulate(dut, scenario)
    assert seen["full"] > 20 and seen["popped"] > 1000


@pytest.mark.parametrize("depth", [0, 1, 6])
def test_depth_is_checked(depth):
    with pytest.raises(ValueError, match=f"depth must be a power of two of at least 2, not {depth}"):
        QueuePointers(2, depth)
