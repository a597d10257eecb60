"""Admin: every status of every command, what it makes others do, and the blocks that it writes."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.sim import Simulator

from kvattic.spec.commands import DOMAINS, IDENTIFY_BYTES, LINE_BYTES, Grant, Opcode, Status
from kvattic.spec.config import GQA, PAPER, TINY, Config
from kvattic.spec.registers import COUNTERS, MAX_ENTRIES, MAX_REGIONS, QUEUES
from kvattic_hdl.nvme.access import Owners
from kvattic_hdl.nvme.admin import SETTLE_CYCLES, Admin

WORDS = IDENTIFY_BYTES // 8
COUNTER_LINES = -(-8 * len(COUNTERS) // LINE_BYTES)
OTHER_OPCODE = 0xFF
"""The loader gives none such."""
TOP = (1 << 64) - LINE_BYTES
"""The last line's address."""


class Model:
    """The commands in words, and the queues that they create and remove."""

    def __init__(self, config):
        self.config = config
        self.present, self.under_way, self.deleted = 1, 0, 0   # bits; `deleted`: with QUEUE_BUSY

    def run(self, c):
        """Status, where, lines, and the effect: None, or what is created, removed or granted."""
        opcode, number = c["opcode"], c["number"]
        if opcode in (Opcode.IDENTIFY, Opcode.COUNTERS):
            if c["bad_address"]:
                return Status.INVALID_ADDRESS, 1, 0, None
            return Status.OK, 0, IDENTIFY_BYTES // LINE_BYTES if opcode == Opcode.IDENTIFY else COUNTER_LINES, None
        if opcode == Opcode.GRANT:
            return self.grant(c)
        if opcode not in (Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE):
            return Status.INVALID_OPCODE, opcode, 0, None
        bit = 1 << number
        if not 1 <= number < QUEUES:
            return Status.INVALID_QUEUE, 0, 0, None
        if opcode == Opcode.DELETE_QUEUE:
            if not (self.present | self.deleted) & bit:
                return Status.INVALID_QUEUE, 0, 0, None
            self.present &= ~bit
            busy = self.under_way & bit
            self.deleted = self.deleted & ~bit | busy
            return Status.QUEUE_BUSY if busy else Status.OK, 0, 0, ("remove", number)
        if (self.present | self.under_way) & bit:
            return Status.INVALID_QUEUE, 0, 0, None
        if c["entries"] not in [1 << i for i in range(1, 20)] or c["entries"] > MAX_ENTRIES:
            return Status.INVALID_QUEUE, 1, 0, None
        for where, name in ((2, "submission"), (3, "completion")):
            if c[name] % LINE_BYTES:
                return Status.INVALID_QUEUE, where, 0, None
        self.present |= bit
        self.deleted &= ~bit
        rings = c["submission"] // LINE_BYTES, c["completion"] // LINE_BYTES
        return Status.OK, 0, 0, ("create", number, c["entries"].bit_length() - 1, *rings)

    def grant(self, c):
        kind, first, count, domain = c["number"], c["first"], c["count"], c["domain"]
        if kind not in list(Grant):
            return Status.INVALID_GRANT, 0, 0, None
        if kind == Grant.QUEUES:
            bad = count or first >= 1 << QUEUES
        else:
            bad = not count or first + count > (self.config.part.blocks if kind == Grant.ZONES else MAX_REGIONS)
        if bad:
            return Status.INVALID_GRANT, 1, 0, None
        if domain >= DOMAINS or (kind == Grant.QUEUES and not domain):
            return Status.INVALID_GRANT, 2, 0, None
        return Status.OK, 0, 0, ("grant", kind, first, count, domain)


class Bench:
    """The component, with queues and owners that answer by the model."""

    def __init__(self, ctx, dut, config, rng, counters):
        self.counters = counters
        self.ctx, self.dut, self.rng, self.model = ctx, dut, rng, Model(config)
        self.identifier = 0
        ctx.set(dut.present, self.model.present)

    async def command(self, opcode, **values):
        """Runs one; checks outcome and effects against the model and returns (status, where)."""
        ctx, dut, rng = self.ctx, self.dut, self.rng
        self.identifier = self.identifier + 1 & 0xFFFF
        c = {"opcode": opcode, "queue": rng.randrange(QUEUES), "identifier": self.identifier, "number": 0, "entries": 0,
             "first": 0, "count": 0, "domain": 0, "submission": 0, "completion": 0, "bad_address": 0} | values
        *expected, effect = self.model.run(c)
        ctx.set(dut.commands.payload, c)
        ctx.set(dut.commands.valid, 1)
        patience, grant_patience = rng.choice((0, 0, 1, 5)), rng.choice((0, 0, 2, 7))
        effects, taken, cycle, granted = [], None, 0, None
        ctx.set(dut.grant.ready, not grant_patience)
        while True:
            _, _, ready, create, remove, grant, grant_valid, valid, ended = await ctx.tick().sample(
                dut.commands.ready, dut.create, dut.remove, dut.grant.payload, dut.grant.valid, dut.outcomes.valid,
                dut.outcomes.payload)
            if taken is None and ready:
                taken = cycle
                ctx.set(dut.commands.valid, 0)
                ctx.set(dut.commands.payload, {"opcode": OTHER_OPCODE, "identifier": 0xFFFF})
            if create.valid:
                assert cycle == taken + 1
                effects.append(("create", create.queue, create.entries_bits, create.submission, create.completion))
                ctx.set(dut.present, self.model.present)
            if remove.valid:
                assert cycle == taken + 1
                effects.append(("remove", remove.queue))
                ctx.set(dut.present, self.model.present)
            if grant_valid:
                if ctx.get(dut.grant.ready):
                    effects.append(("grant", grant.kind, grant.first, grant.count, grant.domain))
                    granted = cycle
                    ctx.set(dut.grant.ready, 0)
                    grant_patience = rng.choice((1, 3))
                else:
                    assert not ready
            if grant_patience and not (grant_valid and granted == cycle):
                grant_patience -= 1
                if not grant_patience:
                    ctx.set(dut.grant.ready, 1)
            if granted is not None and not ctx.get(dut.grant.ready):
                assert not valid
            assert valid or not ctx.get(dut.outcomes.ready)
            if valid and not patience:
                break
            patience -= bool(valid)
            cycle += 1
            assert cycle < 60
        assert (ended.status, ended.where, ended.lines) == tuple(expected)
        assert (ended.queue, ended.identifier) == (c["queue"], c["identifier"])
        if ended.lines:
            assert ended.result == c["submission"]
        assert effects == ([effect] if effect else [])
        ctx.set(dut.outcomes.ready, 1)
        await ctx.tick()
        ctx.set(dut.outcomes.ready, 0)
        return ended.status, ended.where

    def under_way(self, queues):
        self.model.under_way = queues
        self.ctx.set(self.dut.under_way, queues)

    async def block(self, length=WORDS):
        """The block of the last outcome."""
        words = []
        for index in range(length):
            self.ctx.set(self.dut.block_index, index)
            await self.ctx.tick().repeat(3)
            await self.ctx.delay(2e-8)     # behind what `registers` answers
            words.append(self.ctx.get(self.dut.block_data))
        return words


def run(scenario, config=TINY, seed=1):
    dut = Admin(config)

    counters = [0] * len(COUNTERS)

    async def testbench(ctx):
        await scenario(Bench(ctx, dut, config, random.Random(seed), counters))

    async def registers(ctx):
        """Counters; in some cycles the bus reads others, but not where a counter is asked for first."""
        rng, there = random.Random(seed), True
        while True:
            _, _, number, first = await ctx.tick().sample(dut.counter_number, dut.counter_first)
            there = first or not there or rng.random() < 0.5   # the bus does not read twice in succession
            # Behind what the scenario changes in this cycle.
            await ctx.delay(1e-8)
            ctx.set(dut.counter_there, there)
            ctx.set(dut.counter, counters[number] if there and number < len(counters) else rng.getrandbits(64))

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(testbench)
    sim.add_testbench(registers, background=True)
    sim.run()


OK = (Status.OK, 0)
RINGS = {"entries": 16, "submission": 0x1000, "completion": 0x2000}


@pytest.mark.parametrize("config", [TINY, PAPER, GQA])
def test_identify_writes_the_configuration(config):
    async def scenario(bench):
        assert await bench.command(Opcode.IDENTIFY, submission=TOP) == OK
        text = b"".join(word.to_bytes(8, "little") for word in await bench.block())
        assert len(text) == IDENTIFY_BYTES
        assert Config.from_json(text.rstrip(b"\0").decode()) == config

    run(scenario, config)


def test_counters_are_live_and_padded():
    async def scenario(bench):
        values = [bench.rng.getrandbits(64) for _ in COUNTERS]
        assert await bench.command(Opcode.COUNTERS, submission=0x40) == OK
        bench.counters[:] = values
        await bench.ctx.tick().repeat(2)
        padded = values + [0] * (COUNTER_LINES * LINE_BYTES // 8 - len(values))
        assert await bench.block(len(padded)) == padded
        bench.counters[:] = values[::-1]
        assert await bench.block(len(values)) == values[::-1]

    run(scenario)


def test_a_block_stays_until_the_next_outcome_is_taken():
    async def scenario(bench):
        ctx, dut = bench.ctx, bench.dut
        bench.counters[:] = [7] * len(COUNTERS)
        await ctx.tick().repeat(2)
        text = bench.model.config.to_json().encode()
        first = int.from_bytes(text[:8], "little")
        await bench.command(Opcode.COUNTERS)
        ctx.set(dut.commands.payload, {"opcode": Opcode.IDENTIFY})
        ctx.set(dut.commands.valid, 1)
        await ctx.tick().until(dut.commands.ready)
        ctx.set(dut.commands.valid, 0)
        await ctx.tick().repeat(5)
        assert ctx.get(dut.outcomes.valid)
        assert await bench.block(1) == [7]
        ctx.set(dut.outcomes.ready, 1)
        await ctx.tick()
        ctx.set(dut.outcomes.ready, 0)
        assert await bench.block(1) == [first]

    run(scenario)


@pytest.mark.parametrize("opcode", [Opcode.IDENTIFY, Opcode.COUNTERS])
def test_a_block_outside_of_the_window(opcode):
    async def scenario(bench):
        assert await bench.command(opcode, submission=0x41, bad_address=1) == (Status.INVALID_ADDRESS, 1)
        assert await bench.command(opcode, submission=0x40) == OK

    run(scenario)


def test_queues_are_created_once():
    async def scenario(bench):
        for number in range(1, QUEUES):
            assert await bench.command(Opcode.CREATE_QUEUE, number=number, **RINGS) == OK
            assert await bench.command(Opcode.CREATE_QUEUE, number=number, **RINGS) == (Status.INVALID_QUEUE, 0)
        for number in (0, QUEUES, QUEUES + 1, 128, 255):
            assert await bench.command(Opcode.CREATE_QUEUE, number=number, **RINGS) == (Status.INVALID_QUEUE, 0)

    run(scenario)


def test_rings_of_every_size():
    async def scenario(bench):
        most = MAX_ENTRIES
        for entries in (0, 1, 3, 6, most - 1, most + 1, most + 2, 2 * most, 1 << 15, 0xFFFF):
            assert await bench.command(Opcode.CREATE_QUEUE, number=3, **RINGS | {"entries": entries}) == (
                Status.INVALID_QUEUE, 1)
        for bits in range(1, MAX_ENTRIES.bit_length()):
            assert await bench.command(Opcode.CREATE_QUEUE, number=3, **RINGS | {"entries": 1 << bits}) == OK
            assert await bench.command(Opcode.DELETE_QUEUE, number=3) == OK

    run(scenario)


def test_rings_are_aligned_and_the_first_fault_is_reported():
    async def scenario(bench):
        for offset in (1, 2, 32, 63):
            for name, where in (("submission", 2), ("completion", 3)):
                assert await bench.command(Opcode.CREATE_QUEUE, number=1, **RINGS | {name: 0x1000 + offset}) == (
                    Status.INVALID_QUEUE, where)
        bad = {"entries": 5, "submission": 1, "completion": 1}
        assert await bench.command(Opcode.CREATE_QUEUE, number=0, **bad) == (Status.INVALID_QUEUE, 0)
        assert await bench.command(Opcode.CREATE_QUEUE, number=1, **bad) == (Status.INVALID_QUEUE, 1)
        assert await bench.command(Opcode.CREATE_QUEUE, number=1, **bad | {"entries": 4}) == (Status.INVALID_QUEUE, 2)
        top = {"entries": 2, "submission": TOP, "completion": TOP}
        assert await bench.command(Opcode.CREATE_QUEUE, number=1, **top) == OK

    run(scenario)


def test_a_queue_with_commands_under_way_is_deleted_twice():
    async def scenario(bench):
        delete, create = (Opcode.DELETE_QUEUE, Opcode.CREATE_QUEUE)
        no_queue, busy = (Status.INVALID_QUEUE, 0), (Status.QUEUE_BUSY, 0)
        for number in (0, 2, QUEUES, 2 + QUEUES):
            assert await bench.command(delete, number=number) == no_queue
        assert await bench.command(create, number=2, **RINGS) == OK
        bench.under_way(0b111)
        assert await bench.command(delete, number=2) == busy
        assert await bench.command(delete, number=2) == busy
        assert await bench.command(delete, number=1) == no_queue
        assert await bench.command(create, number=2, **RINGS) == no_queue   # its old commands are still there
        bench.under_way(0b011)
        assert await bench.command(delete, number=2) == OK
        assert await bench.command(delete, number=2) == no_queue

        # Created anew instead of deleted again: then it is a queue like any other.
        assert await bench.command(create, number=2, **RINGS) == OK
        bench.under_way(0b100)
        assert await bench.command(delete, number=2) == busy
        bench.under_way(0)
        assert await bench.command(create, number=2, **RINGS) == OK
        assert await bench.command(delete, number=2) == OK
        assert await bench.command(delete, number=2) == no_queue

    run(scenario)


def test_what_is_under_way_is_looked_at_after_fetching_has_stopped():
    """A command that is fetched at the moment of `remove` counts."""
    dut = Admin(TINY)

    async def scenario(ctx):
        ctx.set(dut.present, 0b11)
        ctx.set(dut.commands.payload, {"opcode": Opcode.DELETE_QUEUE, "number": 1})
        ctx.set(dut.commands.valid, 1)
        await ctx.tick().until(dut.commands.ready)
        ctx.set(dut.commands.valid, 0)
        assert ctx.get(dut.remove.valid)
        await ctx.tick().repeat(SETTLE_CYCLES - 1)
        ctx.set(dut.under_way, 0b10)
        await ctx.tick()
        assert ctx.get(dut.outcomes.valid)
        assert ctx.get(dut.outcomes.payload.status) == Status.QUEUE_BUSY

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(scenario)
    sim.run()


def test_grants():
    async def scenario(bench):
        blocks = TINY.part.blocks

        async def grant(kind, first, count, domain=1):
            return await bench.command(Opcode.GRANT, number=kind, first=first, count=count, domain=domain)

        bad_kind, bad_range, bad_domain = ((Status.INVALID_GRANT, where) for where in range(3))
        for kind, size in ((Grant.ZONES, blocks), (Grant.REGIONS, MAX_REGIONS)):
            for first, count in ((0, 1), (0, size), (size - 1, 1), (1, size - 1)):
                assert await grant(kind, first, count) == OK
                assert await grant(kind, first, count, 0) == OK
                assert await grant(kind, first, count, DOMAINS - 1) == OK
                for domain in (DOMAINS, DOMAINS + 1, 0xFFFF):
                    assert await grant(kind, first, count, domain) == bad_domain
            top = (1 << 24) - 1
            for first, count in ((0, 0), (0, size + 1), (size, 1), (size - 1, 2), (top, 1), (top, top), (1, top)):
                assert await grant(kind, first, count) == bad_range
                assert await grant(kind, first, count, DOMAINS) == bad_range
        for queues in (0, 1, (1 << QUEUES) - 1):
            assert await grant(Grant.QUEUES, queues, 0) == OK
        for queues, count in ((1 << QUEUES, 0), (1 << 23, 0), (1, 1), (1, 1 << 23)):
            assert await grant(Grant.QUEUES, queues, count) == bad_range
        for domain in (0, DOMAINS, 1 << 15):
            assert await grant(Grant.QUEUES, 1, 0, domain) == bad_domain
        for kind in (3, 4, 128, 255):
            assert await grant(kind, 0, 1, DOMAINS) == bad_kind

    run(scenario)


def test_an_unknown_opcode_does_no_harm():
    async def scenario(bench):
        assert await bench.command(OTHER_OPCODE) == (Status.INVALID_OPCODE, OTHER_OPCODE)
        assert await bench.command(Opcode.IDENTIFY) == OK

    run(scenario)


def test_a_grant_ends_when_the_owners_have_it_all():
    """With the real `Owners`: the outcome comes behind the last zone, and then it counts."""
    m, count = Module(), TINY.part.blocks
    m.submodules.admin, m.submodules.owners = admin, owners = Admin(TINY), Owners(TINY)
    wiring.connect(m, admin.grant, owners.grant)

    async def scenario(ctx):
        ctx.set(owners.domain, 9)
        ctx.set(owners.page, (count << TINY.zone_page_bits) - 1)
        ctx.set(admin.outcomes.ready, 1)
        for domain, owned in ((9, 1), (0, 0), (9, 1)):
            command = {"opcode": Opcode.GRANT, "number": Grant.ZONES, "count": count, "domain": domain}
            ctx.set(admin.commands.payload, command)
            ctx.set(admin.commands.valid, 1)
            await ctx.tick().until(admin.commands.ready)
            ctx.set(admin.commands.valid, 0)
            cycles = 0
            while not ctx.get(admin.outcomes.valid):
                await ctx.tick()
                cycles += 1
            assert cycles == count + 1
            await ctx.tick().repeat(3)
            assert ctx.get(owners.page_owned) == owned

    sim = Simulator(m)
    sim.add_clock(1e-6)
    sim.add_testbench(scenario)
    sim.run()


@pytest.mark.parametrize("config", [TINY, PAPER], ids=["tiny", "paper"])
@pytest.mark.parametrize("seed", range(2))
def test_random_commands(config, seed):
    async def scenario(bench):
        rng, seen = bench.rng, Counter()
        sizes = [1 << i for i in range(14)] * 3 + [3, 5000]
        for _ in range(600):
            bench.under_way(rng.getrandbits(QUEUES) & rng.getrandbits(QUEUES))
            opcode = rng.choice([Opcode.CREATE_QUEUE] * 3 + [Opcode.DELETE_QUEUE] * 2 + [Opcode.GRANT] * 4
                                + [Opcode.IDENTIFY, Opcode.COUNTERS])
            values = {"submission": rng.getrandbits(58) << 6, "bad_address": rng.getrandbits(1)}
            if opcode in (Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE):
                values |= {"number": rng.randrange(QUEUES + 1)}
            if opcode == Opcode.CREATE_QUEUE:
                values |= {"entries": rng.choice(sizes), "completion": rng.getrandbits(58) << 6}
                if rng.random() < 0.3:
                    values |= {rng.choice(["submission", "completion"]): rng.getrandbits(64)}
            if opcode == Opcode.GRANT:
                kind = rng.choice([*Grant, *Grant, 3])
                size = config.part.blocks if kind == Grant.ZONES else MAX_REGIONS
                values |= {"number": kind, "first": rng.randrange(size + 1), "count": rng.randrange(size // 2),
                           "domain": rng.choice([0, 1, 2, 255, 256, 511])}
                if kind == Grant.QUEUES:
                    values |= {"first": rng.getrandbits(QUEUES + rng.getrandbits(1)), "count": rng.choice([0, 0, 0, 1])}
            seen[await bench.command(opcode, **values)] += 1
        assert set(seen) == {
            OK, (Status.INVALID_ADDRESS, 1), (Status.QUEUE_BUSY, 0), *((Status.INVALID_QUEUE, i) for i in range(4)),
            *((Status.INVALID_GRANT, i) for i in range(3))}

    run(scenario, config, seed)


def test_a_configuration_that_identify_cannot_hold():
    name = "x" * (IDENTIFY_BYTES - len(TINY.to_json()) + len(TINY.part.name))
    Admin(replace(TINY, part=replace(TINY.part, name=name)))
    with pytest.raises(ValueError, match="must be at most 2048 bytes, which IDENTIFY writes, not 2049"):
        Admin(replace(TINY, part=replace(TINY.part, name=name + "x")))
