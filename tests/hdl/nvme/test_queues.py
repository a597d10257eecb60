"""Queues against a model that counts without wrapping, in every cycle of each test."""

import random
from collections import deque
from types import SimpleNamespace

import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.nvme.queues import Queues

SOON = 4
"""Cycles until an event shows in `busy` and in what `interrupts` says of queues with nothing under way."""
LATE = 40
"""Cycles until it shows in what `interrupts` says of INTERRUPT_AFTER."""
SUBMISSION, COMPLETION = 0x100_0000, 0x200_0000
OUTPUTS = ("refused", "refused_doorbell", "present", "under_way", "post_line", "post_phase", "post_head", "interrupts",
           "busy")


class Ring:
    """A queue: all numbers only grow; a ring's entry is a number modulo `entries`."""

    def __init__(self, entries=None, submission=0, completion=0):
        self.entries, self.submission, self.completion = entries, submission, completion
        self.present = entries is not None
        self.tail = self.fetched = self.place = self.posted = self.taken = 0

    @property
    def fetchable(self):
        return self.present and self.tail > self.fetched and self.fetched - self.taken < self.entries - 1

    @property
    def unread(self):
        # The host may have taken one before `posted`.
        return max(self.posted - self.taken, 0) if self.present else 0

    def judge(self, completion, value):
        """What a doorbell sets `taken` or the tail to, or None if it is refused."""
        if not self.present or value >= self.entries:
            return None
        if completion:
            taken = self.taken + (value - self.taken) % self.entries
            return taken if taken <= self.place else None
        tail = self.fetched + (value - self.fetched) % self.entries
        return tail if tail >= self.tail else None


class Past:
    """When what was true of a queue last, and when not."""

    def __init__(self):
        self.now = 0
        self.last = {}

    def note(self, **facts):
        self.now += 1
        for name, fact in facts.items():
            self.last[name, bool(fact)] = self.now

    def was(self, name, value, cycles):
        """In one of the last `cycles`; all was false before the first."""
        return self.last.get((name, bool(value)), -LATE if value else 0) > self.now - cycles


class Model:
    """Follows the ports of `Queues` and checks them."""

    def __init__(self):
        self.rings = [Ring() for _ in range(QUEUES)]
        self.offered = None
        self.rung = None    # a doorbell acts a cycle after it was judged
        self.refused = deque([None] * 2)
        self.stable = 0    # cycles since what post_line depends on has changed
        self.heads = deque([0] * 2)
        self.waits = [0] * QUEUES
        """Cycles in which a line of this queue could have been offered and nothing was."""
        self.passed = [0] * QUEUES
        """Offers to others in which it could have been this queue's turn."""
        self.past = [Past() for _ in range(QUEUES)]
        self.post_queue = 0
        self.writing = None    # the queue between post and posted
        self.owed = [0] * QUEUES    # commands taken and without completion

    def cycle(self, i, o):
        """One cycle: the inputs, and the outputs in the same cycle."""
        self.check(i, o)
        if self.rung:
            setattr(*self.rung)
        self.rung = refusal = None
        if bell := i.doorbell:
            ring, completion, value = self.rings[bell["queue"]], bell["completion"], bell["value"]
            number = ring.judge(completion, value)
            if number is None:
                refusal = bell["queue"] << 24 | completion << 16 | value & 0xFFFF
            else:
                self.rung = ring, "taken" if completion else "tail", number
        self.refused.append(refusal)
        self.stable += 1
        if o.valid and i.ready:
            self.rings[o.queue].fetched += 1
            self.owed[o.queue] += 1
            self.offered = None
        if i.post:
            assert self.stable > 2
            assert self.writing is None
            self.writing = i.post_queue
            self.rings[i.post_queue].place += 1
            self.owed[i.post_queue] -= 1
            self.stable = 0
        if i.posted is not None:
            assert self.writing == i.posted
            self.rings[i.posted].posted += 1
            self.writing = None
        if i.remove is not None:
            self.rings[i.remove].present = False
        if i.create:
            queue, bits, submission, completion = i.create
            if o.under_way >> queue & 1:
                self.rings[queue].present = False
            else:
                self.rings[queue] = Ring(1 << bits, submission, completion)
                if queue == i.post_queue:
                    self.stable = 0

    def check(self, i, o):
        if i.post_queue != self.post_queue:
            self.post_queue, self.stable = i.post_queue, 0
        assert o.present == sum(ring.present << q for q, ring in enumerate(self.rings))
        # Doorbells.
        refusal = self.refused.popleft()
        assert o.refused == (refusal is not None)
        assert refusal in (None, o.refused_doorbell)
        # Fetching.
        could = [ring.fetchable and not i.hold >> q & 1 for q, ring in enumerate(self.rings)]
        if o.valid and self.offered is None:
            ring = self.rings[o.queue]
            assert ring.fetchable
            self.offered = (o.queue, o.line)
            assert o.line == ring.submission + ring.fetched % ring.entries
            self.passed = [n + 1 if can and q != o.queue else 0
                           for q, (n, can) in enumerate(zip(self.passed, could, strict=True))]
            # Seven in its turn, and one that had been chosen before it could have been.
            assert max(self.passed) <= QUEUES
        self.passed = [n if can else 0 for n, can in zip(self.passed, could, strict=True)]
        assert self.offered == ((o.queue, o.line) if o.valid else None)
        self.waits = [n + 1 if can and not o.valid else 0 for n, can in zip(self.waits, could, strict=True)]
        assert max(self.waits) <= 12
        # Completions.
        ring = self.rings[i.post_queue]
        head = self.heads.popleft()
        self.heads.append(ring.fetched)
        if self.stable >= 2 and ring.entries:
            assert o.post_line == ring.completion + ring.place % ring.entries
            assert o.post_phase == 1 - ring.place // ring.entries % 2
            if self.stable >= 3:
                assert o.post_head == head % ring.entries
        # State.
        for q, ring in enumerate(self.rings):
            under_way = ring.fetched > ring.posted or bool(o.valid and o.queue == q)
            unread, busy = ring.unread, under_way or ring.fetchable
            past = self.past[q]
            past.note(under_way=under_way, busy=busy, unread=unread > 0, alone=unread > 0 and not busy,
                      reached=unread >= max(1, i.interrupt_after))
            assert not ring.present or ring.fetched - ring.taken < ring.entries
            assert not under_way or o.under_way >> q & 1
            assert past.was("under_way", o.under_way >> q & 1, SOON)
            if o.interrupts >> q & 1:
                assert past.was("alone", 1, SOON) or (past.was("unread", 1, SOON) and past.was("reached", 1, LATE))
            else:
                assert past.was("alone", 0, SOON)
                assert past.was("reached", 0, LATE)
        if o.busy:
            assert any(past.was("busy", 1, SOON) for past in self.past)
        else:
            assert all(past.was("busy", 0, SOON) for past in self.past)


class Bench:
    """Drives the ports, a cycle at a time, with the model beside them."""

    def __init__(self, ctx, dut):
        self.ctx, self.dut, self.model = ctx, dut, Model()
        self.post_queue = self.hold = 0
        self.after = 1
        self.refusals, self.lines = [], []

    async def cycle(self, *, doorbell=None, create=None, remove=None, ready=0, post=0, posted=None):
        ctx, dut = self.ctx, self.dut
        ctx.set(dut.doorbell, {"valid": 1, **doorbell} if doorbell else {"value": 5})
        names = ("queue", "entries_bits", "submission", "completion")
        ctx.set(dut.create, {"valid": 1, **dict(zip(names, create, strict=True))} if create else {})
        ctx.set(dut.remove, {} if remove is None else {"valid": 1, "queue": remove})
        ctx.set(dut.fetch.ready, ready)
        ctx.set(dut.post, post)
        ctx.set(dut.posted, posted is not None)
        ctx.set(dut.posted_queue, posted or 0)
        ctx.set(dut.post_queue, self.post_queue)
        ctx.set(dut.hold, self.hold)
        ctx.set(dut.interrupt_after, self.after)
        fetch = dut.fetch
        _, _, valid, queue, line, *rest = await ctx.tick().sample(
            fetch.valid, fetch.payload.queue, fetch.payload.line, *(getattr(dut, name) for name in OUTPUTS))
        out = SimpleNamespace(valid=valid, queue=queue, line=line, **dict(zip(OUTPUTS, rest, strict=True)))
        self.model.cycle(
            SimpleNamespace(doorbell=doorbell, create=create, remove=remove, ready=ready, post=post, posted=posted,
                            post_queue=self.post_queue, hold=self.hold, interrupt_after=self.after), out)
        if out.refused:
            self.refusals.append(out.refused_doorbell)
        if valid and ready:
            self.lines.append((queue, line))
        return out

    async def idle(self, cycles=8, **inputs):
        for _ in range(cycles):
            out = await self.cycle(**inputs)
        return out

    async def create(self, queue, entries, **inputs):
        bits = entries.bit_length() - 1
        await self.cycle(create=(queue, bits, SUBMISSION + (queue << 14), COMPLETION + (queue << 14)), **inputs)

    async def ring(self, queue, value, *, completion=0, legal=True):
        """A doorbell, and whether it must be taken."""
        before = len(self.refusals)
        await self.cycle(doorbell={"queue": queue, "completion": completion, "value": value})
        await self.idle(3)
        expected = [] if legal else [queue << 24 | completion << 16 | value & 0xFFFF]
        assert self.refusals[before:] == expected

    async def take(self, count):
        """The next `count` lines."""
        del self.lines[:]
        for _ in range(20 * count):
            await self.cycle(ready=1)
            if len(self.lines) == count:
                break
        assert len(self.lines) == count
        return list(self.lines)

    async def quiet(self, cycles=30):
        """No line is offered."""
        for _ in range(cycles):
            assert not (await self.cycle(ready=1)).valid

    async def finish(self, queue):
        """Write a completion: entry, phase, head."""
        self.post_queue = queue
        await self.idle(2)
        out = await self.cycle(post=1)
        await self.idle(2)
        await self.cycle(posted=queue)
        return out.post_line - COMPLETION - (queue << 14), out.post_phase, out.post_head

    async def interrupts(self):
        return (await self.idle(LATE + 2)).interrupts


def simulate(bench):
    dut, sim = simulation(Queues)
    sim.add_clock(1e-6)

    async def main(ctx):
        await bench(Bench(ctx, dut))

    sim.add_testbench(main)
    sim.run()


def entry(queue, index):
    return queue, SUBMISSION + (queue << 14) + index


@pytest.mark.usefixtures("each_simulator")
def test_rings_wrap_and_phases_turn():
    async def test(b):
        await b.create(3, 4)
        posted = []
        for n in range(11):
            await b.ring(3, (n + 1) % 4)
            assert await b.take(1) == [entry(3, n % 4)]
            posted.append(await b.finish(3))
            await b.ring(3, (n + 1) % 4, completion=1)
        assert posted == [(n % 4, 1 - n // 4 % 2, (n + 1) % 4) for n in range(11)]
        assert b.refusals == []

    simulate(test)


def test_the_smallest_and_the_largest_ring():
    async def test(b):
        await b.create(1, 2)
        for n in range(5):
            await b.ring(1, 2, legal=False)
            await b.ring(1, (n + 1) % 2)
            await b.take(1)
            assert (await b.finish(1))[:2] == (n % 2, 1 - n // 2 % 2)
            await b.ring(1, (n + 1) % 2, completion=1)
        await b.create(7, MAX_ENTRIES)
        await b.ring(7, MAX_ENTRIES, legal=False)
        await b.ring(7, MAX_ENTRIES - 1)
        lines = await b.take(MAX_ENTRIES - 1)
        assert lines == [entry(7, n) for n in range(MAX_ENTRIES - 1)]
        await b.quiet()
        await b.ring(7, 1)    # the rest of the ring and round the corner
        await b.quiet()       # no completion has room
        await b.finish(7)
        await b.finish(7)
        await b.ring(7, 3, completion=1, legal=False)
        await b.ring(7, 2, completion=1)
        assert await b.take(2) == [entry(7, MAX_ENTRIES - 1), entry(7, 0)]

    simulate(test)


def test_doorbells_that_are_refused():
    async def test(b):
        for completion in (0, 1):
            await b.ring(2, 0, completion=completion, legal=False)    # no such queue
        await b.create(2, 8)
        for value in (8, 9, 0x1000, 0x1_0003, 0x8000_0003):
            for completion in (0, 1):
                await b.ring(2, value, completion=completion, legal=False)
        await b.quiet()
        await b.ring(2, 5)
        await b.ring(2, 4, legal=False)    # backwards: more than the ring holds
        await b.ring(2, 5)                 # nothing new
        await b.ring(2, 7)
        await b.take(3)
        await b.ring(2, 2)                 # entries 7, 0, 1
        await b.ring(2, 3, legal=False)    # it would be the fetch head: an empty ring
        await b.ring(2, 5, legal=False)
        await b.ring(2, 1, completion=1, legal=False)    # nothing is posted
        await b.ring(2, 0, completion=1)
        await b.finish(2)
        await b.ring(2, 2, completion=1, legal=False)
        await b.ring(2, 1, completion=1)
        await b.ring(2, 0, completion=1, legal=False)    # backwards
        assert await b.take(5) == [entry(2, n % 8) for n in range(3, 8)]

    simulate(test)


def test_a_completion_taken_before_its_write_is_answered():
    """The host found it in its memory: the doorbell is legal, and there is nothing to raise an interrupt for."""

    async def test(b):
        await b.create(4, 2)
        await b.ring(4, 1)
        await b.take(1)
        b.post_queue = 4
        await b.idle(2)
        await b.ring(4, 1, completion=1, legal=False)
        await b.cycle(post=1)
        await b.ring(4, 1, completion=1)
        await b.ring(4, 0, completion=1, legal=False)
        await b.ring(4, 0)    # the rings have room for the next one
        assert await b.take(1) == [entry(4, 1)]
        assert await b.interrupts() == 0
        await b.cycle(posted=4)
        assert await b.interrupts() == 0
        assert await b.finish(4) == (1, 1, 0)
        assert await b.interrupts() == 1 << 4
        await b.ring(4, 0, completion=1)
        assert await b.interrupts() == 0

    simulate(test)


def test_doorbells_every_other_cycle():
    """As fast as they may come, legal and not; each is judged by what the one before left."""

    async def test(b):
        await b.create(0, 16)
        await b.create(5, 16)
        for value in (1, 2, 1, 3, 15, 14):
            for queue in (0, 5):
                await b.cycle(doorbell={"queue": queue, "completion": 0, "value": value})
                await b.cycle()
        for value in (7, 3, 4):
            await b.cycle(doorbell={"queue": 0, "completion": 0, "value": value})
            await b.cycle()
        await b.idle(4)
        assert b.refusals == [1, 5 << 24 | 1, 14, 5 << 24 | 14, 7, 3, 4]

    simulate(test)


def test_a_full_completion_ring_stops_fetching():
    async def test(b):
        await b.create(4, 4)
        await b.create(6, 4)
        await b.ring(4, 3)
        await b.take(3)
        await b.ring(4, 2)
        await b.ring(6, 1)
        assert await b.take(1) == [entry(6, 0)]    # another queue goes on
        await b.quiet()
        for _ in range(3):
            await b.finish(4)
        await b.quiet()
        assert (await b.idle()).busy    # queue 6's command
        await b.finish(6)
        assert not (await b.idle()).busy    # nothing that could be fetched
        assert await b.interrupts() == 1 << 4 | 1 << 6
        await b.ring(4, 2, completion=1)
        assert await b.take(2) == [entry(4, 3), entry(4, 0)]
        await b.quiet()
        await b.ring(4, 3, completion=1)
        assert await b.take(1) == [entry(4, 1)]
        await b.quiet()

    simulate(test)


def test_queues_take_turns():
    async def test(b):
        for q in range(QUEUES):
            await b.create(q, 16)
        for q in range(QUEUES):
            await b.ring(q, 4)
        order = [q for q, _ in await b.take(4 * QUEUES)]
        turn = order[1:QUEUES + 1]
        assert sorted(turn) == list(range(QUEUES))
        assert order[1:3 * QUEUES] == (turn * 4)[:3 * QUEUES - 1]

    simulate(test)


def test_held_queues_are_passed_over():
    async def test(b):
        for q in (1, 2, 3):
            await b.create(q, 16)
        b.hold = 0b1010
        for q in (1, 2, 3):
            await b.ring(q, 5)
        assert await b.take(5) == [entry(2, n) for n in range(5)]
        await b.quiet()
        assert (await b.cycle()).busy
        b.hold = 0b1000
        await b.take(2)
        # Held from the cycle after a transfer on: no other line of it comes.
        b.hold = 0b1010
        await b.quiet()
        b.hold = 0b0010
        assert [q for q, _ in await b.take(5)] == [3] * 5
        b.hold = 0
        assert [q for q, _ in await b.take(3)] == [1] * 3

    simulate(test)


def test_an_offered_line_stays():
    async def test(b):
        await b.create(1, 8)
        await b.ring(1, 2)
        out = await b.idle()
        assert out.valid
        assert out.under_way == 2
        b.hold = 2
        await b.idle()
        await b.cycle(remove=1)
        out = await b.idle()
        assert out.valid
        assert (out.present, out.under_way, out.busy) == (0, 2, 1)
        assert await b.take(1) == [entry(1, 0)]
        b.hold = 0
        await b.quiet()
        assert await b.finish(1) == (0, 1, 1)
        out = await b.idle()
        assert (out.under_way, out.busy, out.interrupts) == (0, 0, 0)

    simulate(test)


def test_removed_with_commands_under_way_and_created_anew():
    async def test(b):
        await b.create(2, 4)
        await b.ring(2, 3)
        await b.take(2)
        await b.finish(2)
        assert (await b.idle()).under_way == 4
        await b.cycle(remove=2)
        out = await b.idle()
        await b.take(1)    # it had been offered
        assert (out.present, out.under_way, out.busy) == (0, 4, 1)
        for completion in (0, 1):
            await b.ring(2, 1, completion=completion, legal=False)
        # A queue whose commands are under way is not created, and its old ring stays.
        await b.cycle(create=(2, 3, 0x777, 0x888))
        assert (await b.idle()).present == 0
        assert [await b.finish(2) for _ in range(2)] == [(1, 1, 3), (2, 1, 3)]
        out = await b.idle()
        assert (out.present, out.under_way, out.busy, out.interrupts) == (0, 0, 0, 0)
        await b.create(2, 8)
        assert (await b.idle()).present == 4
        await b.ring(2, 1, completion=1, legal=False)
        assert await b.interrupts() == 0
        await b.ring(2, 7)
        assert await b.take(1) == [entry(2, 0)]
        assert await b.finish(2) == (0, 1, 1)
        # Anew while it is there with commands under way: removed.
        await b.create(2, 8)
        assert (await b.idle()).present == 0
        await b.take(1)
        await b.finish(2)
        await b.idle(2)
        # Anew while it is there, with unread completions and commands not fetched.
        await b.create(2, 8)
        b.hold = 4
        await b.ring(2, 7)
        b.hold = 0
        await b.create(2, 4)
        out = await b.idle()
        assert (out.present, out.busy, out.valid) == (4, 0, 0)

    simulate(test)


def test_interrupts():
    async def test(b):
        await b.create(0, 16)
        await b.create(5, 16)
        b.after = 3
        await b.ring(5, 6)
        await b.take(5)
        seen = []
        for _ in range(4):
            await b.finish(5)
            seen.append(await b.interrupts())
        assert seen == [0, 0, 32, 32]
        await b.ring(5, 2, completion=1)
        assert await b.interrupts() == 0    # two left, two under way
        await b.finish(5)
        assert await b.interrupts() == 32
        b.after = 4
        assert await b.interrupts() == 0
        await b.take(1)
        await b.finish(5)
        assert await b.interrupts() == 32   # four
        b.after = 0xFFFF
        assert await b.interrupts() == 32   # nothing under way
        await b.ring(0, 1)
        assert await b.interrupts() == 32   # another queue's matter
        await b.ring(5, 5, completion=1)
        assert await b.interrupts() == 32   # one left
        await b.ring(5, 7)                  # and a command to fetch
        assert await b.interrupts() == 0
        await b.ring(5, 6, completion=1)
        b.after = 0                         # as 1
        assert await b.interrupts() == 0
        await b.take(2)
        await b.finish(5)
        assert await b.interrupts() == 32
        await b.cycle(remove=5)
        assert (await b.idle(3)).interrupts == 0

    simulate(test)


def test_as_soon_as_promised():
    async def test(b):
        b.after = 8
        await b.create(1, 8)
        bell = {"queue": 1, "completion": 0, "value": 1}
        outs = [await b.cycle(doorbell=bell), *[await b.cycle() for _ in range(8)]]
        assert [out.busy for out in outs] == [0] * 3 + [1] * 6
        assert [out.valid for out in outs] == [0] * 6 + [1] * 3
        bell["value"] = 7
        outs = [await b.cycle(doorbell=bell, ready=1), *[await b.cycle(ready=1) for _ in range(16)]]
        assert [out.valid for out in outs] == [1, *[0] * 3] * 4 + [1]
        await b.idle(20, ready=1)
        for _ in range(6):
            await b.finish(1)
        b.post_queue = 1
        await b.idle(2)
        await b.cycle(post=1)
        outs = [await b.cycle(posted=1), *[await b.cycle() for _ in range(4)]]
        assert [out.interrupts for out in outs] == [0, 0, 2, 2, 2]
        assert [out.busy for out in outs] == [1, 1, 0, 0, 0]
        bell = {"queue": 1, "completion": 1, "value": 7}
        outs = [await b.cycle(doorbell=bell), *[await b.cycle() for _ in range(4)]]
        assert [out.interrupts for out in outs] == [2, 2, 2, 0, 0]

    simulate(test)


@pytest.mark.parametrize("first", ["create", "doorbell"])
@pytest.mark.parametrize("apart", range(5))
def test_a_doorbell_around_a_create(first, apart):
    """The old queue's doorbell never moves the new one's tail; the new one's is not lost."""

    async def test(b):
        await b.create(0, 8)
        b.hold = 1
        bell = {"queue": 0, "completion": 0, "value": 5}
        new = (0, 4, 0x55, 0x66)
        for cycle in range(6):
            early, late = cycle == 0, cycle == apart
            ring, create = (late, early) if first == "create" else (early, late)
            await b.cycle(doorbell=bell if ring else None, create=new if create else None)
        b.hold = 0
        if first == "create" and apart:
            assert await b.take(5) == [(0, 0x55 + n) for n in range(5)]
        await b.quiet()
        assert b.refusals == []

    simulate(test)


@pytest.mark.parametrize("ready", range(3))
@pytest.mark.parametrize("when", range(9))
def test_removed_or_created_anew_while_its_line_is_chosen(when, ready):
    """In each cycle from the doorbell on: offered and under way, or not offered at all."""

    async def test(b):
        for inputs in ({"remove": 6}, {"create": (6, 4, 0x55, 0x66)}):
            await b.create(6, 8)
            out = await b.cycle(doorbell={"queue": 6, "completion": 0, "value": 1})
            for cycle in range(20):
                out = await b.cycle(**(inputs if cycle == when else {}), ready=cycle % 3 == ready)
            assert not out.valid
            ring = b.model.rings[6]
            assert ring.present == ("create" in inputs and not b.model.owed[6])
            while b.model.owed[6]:
                b.post_queue = 6
                await b.idle(3)
                await b.cycle(post=1)
                await b.cycle(posted=6)
            await b.idle(3)

    simulate(test)


class Traffic:
    """Random users of all queues."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.pace = rng.choice([0.1, 0.4, 1])         # doorbells
        self.ready = rng.choice([0.05, 0.4, 1])
        self.post = rng.choice([0.05, 0.4, 1])
        self.churn = rng.choice([0, 0.005, 0.1])      # creates and removes
        self.wrong = rng.choice([0, 0.2])             # doorbells of any value
        self.held = rng.choice([0, 0, 0.02])
        self.used = rng.sample(range(QUEUES), rng.choice([1, 2, 4, 8]))
        self.most = rng.choice([2, 3, 12])            # log2 of the entries of rings

    def doorbell(self, model):
        rng = self.rng
        q = rng.choice(self.used)
        ring, completion = model.rings[q], rng.randrange(2)
        if rng.random() < self.wrong or not ring.entries:
            value = rng.choice([rng.getrandbits(32), rng.randrange(2 * (ring.entries or 8))])
        elif completion:
            value = rng.randint(ring.taken, ring.place) % ring.entries
        else:
            value = min(rng.randint(ring.tail, ring.fetched + ring.entries - 1), ring.tail + 5) % ring.entries
        return {"queue": q, "completion": completion, "value": value}

    async def run(self, b, cycles):
        rng, model = self.rng, b.model
        rung, state, wait, out = 0, "choose", 0, None
        for cycle in range(cycles):
            inputs = {"ready": rng.random() < self.ready}
            if cycle > rung and rng.random() < self.pace:
                inputs["doorbell"] = self.doorbell(model)
                rung = cycle + 1
            if rng.random() < self.churn or cycle < len(self.used):
                q = self.used[cycle % len(self.used)]
                idle = out is None or not (out.present | out.under_way) >> q & 1
                if idle or rng.random() < 0.2:
                    inputs["create"] = (q, rng.randint(1, self.most), *(rng.getrandbits(57) for _ in range(2)))
                else:
                    inputs["remove"] = q
            if rng.random() < self.held:
                b.hold = rng.getrandbits(QUEUES) & rng.getrandbits(QUEUES)
            if rng.random() < 0.002:
                b.after = rng.choice([0, 1, 2, 3, 5, 0x1000, 0xFFFF])
            # Completions in any order.
            owed = [q for q in range(QUEUES) if model.owed[q]]
            if state == "choose" and owed and rng.random() < self.post:
                b.post_queue = rng.choice(owed)
                state, wait = "post", 2 + rng.choice([0, 0, 3])
            elif state == "post" and wait == 0 and model.writing is None:
                inputs["post"] = 1
                state = "choose"
            if model.writing is not None and rng.random() < self.post:
                inputs["posted"] = model.writing
            wait -= wait > 0
            out = await b.cycle(**inputs)


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic(seed):
    async def test(b):
        await Traffic(seed).run(b, 1500)
        # Let all of it end.
        b.hold = 0
        for _ in range(40 * QUEUES):
            await b.idle(3, ready=1)
            model = b.model
            for q, ring in enumerate(model.rings):
                if model.writing is not None:
                    await b.cycle(posted=model.writing, ready=1)
                elif model.owed[q]:
                    b.post_queue = q
                    await b.idle(3, ready=1)
                    await b.cycle(post=1, ready=1)
                elif ring.unread:
                    await b.cycle(doorbell={"queue": q, "completion": 1, "value": ring.posted % ring.entries}, ready=1)
                    await b.cycle(ready=1)
        out = await b.idle()
        if max(ring.tail - ring.fetched for ring in b.model.rings) < 40:
            assert (out.busy, out.interrupts, out.under_way) == (0, 0, 0)

    simulate(test)
