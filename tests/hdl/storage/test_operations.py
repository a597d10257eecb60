"""Operations: each flash command reaches its channel once, each outcome comes back with the right place and status."""

import random

import pytest
from tests.hdl.bench import simulate

from kvattic.spec.commands import Opcode, Status
from kvattic.spec.config import TINY
from kvattic.spec.registers import QUEUES
from kvattic_hdl.lib.shapes import operation_code
from kvattic_hdl.storage.operations import Operations

COUNT = 40


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_commands_out_and_outcomes_back(stall):
    dut, rng = Operations(TINY), random.Random(1)
    commands = [
        {"channel": rng.randrange(TINY.channels), "opcode": rng.choice([Opcode.PROGRAM, Opcode.ERASE, Opcode.MAP]),
         "page": rng.randrange(TINY.pages_per_channel), "block": rng.randrange(8), "dram_page": rng.getrandbits(10),
         "queue": rng.randrange(QUEUES), "identifier": i}
        for i in range(COUNT)
    ]
    operations, fetches = ([[] for _ in range(TINY.channels)] for _ in range(2))
    ended = []

    async def ask(ctx):
        for c in commands:
            ctx.set(dut.commands.payload, {
                "channel": c["channel"], "dram_page": c["dram_page"],
                "operation": {"opcode": operation_code(c["opcode"]), "page": c["page"], "block": c["block"],
                              "identity": c["queue"] | c["identifier"] << 16}})
            ctx.set(dut.commands.valid, 1)
            await ctx.tick().until(dut.commands.ready)
            ctx.set(dut.commands.valid, 0)

    def channel(c):
        async def bench(ctx):
            rng, under_way = random.Random(c), []
            while True:
                take = rng.random() >= stall
                ctx.set(dut.operations[c].ready, take)
                back = dut.channel_outcomes[c]
                if under_way and rng.random() >= stall:
                    ctx.set(back.payload, under_way[0])
                    ctx.set(back.valid, 1)
                _, _, valid, operation, out, gone = await ctx.tick().sample(
                    dut.operations[c].valid, dut.operations[c].payload, back.valid, back.ready)
                if valid and take:
                    operations[c].append((operation.opcode, operation.page, operation.block))
                    under_way.insert(rng.randrange(len(under_way) + 1) if not out else 1, {
                        "identity": operation.identity, "page": operation.page,
                        "status": Status.OK if operation.page % 3 else Status.ERASE_FAILED})
                if out and gone:
                    del under_way[0]
                    ctx.set(back.valid, 0)

        return bench

    async def fetch(ctx):
        rng = random.Random(11)
        while True:
            ready = rng.random() >= stall
            ctx.set(dut.fetches.ready, ready)
            _, _, wanted, of = await ctx.tick().sample(dut.fetches.valid, dut.fetches.payload)
            if wanted and ready:
                fetches[of.channel].append((of.page.dram_page, of.page.page))

    async def take(ctx):
        rng = random.Random(9)
        assert ctx.get(dut.quiet)
        while len(ended) < COUNT:
            ready = rng.random() >= stall
            ctx.set(dut.outcomes.ready, ready)
            _, _, valid, payload, quiet = await ctx.tick().sample(
                dut.outcomes.valid, dut.outcomes.payload, dut.quiet)
            if valid:
                assert not quiet
            if valid and ready:
                ended.append(payload)
        ctx.set(dut.outcomes.ready, 0)
        await ctx.tick().repeat(3)
        assert ctx.get(dut.quiet)

    simulate(dut, ask, take, background=[fetch, *(channel(c) for c in range(TINY.channels))])
    for c in range(TINY.channels):
        mine = [k for k in commands if k["channel"] == c]
        assert operations[c] == [(operation_code(k["opcode"]), k["page"], k["block"]) for k in mine]
        assert fetches[c] == [(k["dram_page"], k["page"]) for k in mine if k["opcode"] == Opcode.PROGRAM]
    assert sorted(e.identifier for e in ended) == list(range(COUNT))
    for e in ended:
        command = commands[e.identifier]
        good = command["page"] % 3 != 0
        assert (e.queue, e.lines, e.result) == (command["queue"], 0, 0)
        assert e.status == (Status.OK if good else Status.ERASE_FAILED)
        assert e.where == (0 if good else command["channel"] << 24 | command["page"])


def test_a_page_that_was_not_read_is_not_programmed_well():
    """After an error of device DRAM a channel's operations end with BUS_ERROR, until none of any channel is left."""
    dut, seen = Operations(TINY), []

    async def give(ctx, channel):
        ctx.set(dut.commands.payload, {"channel": channel, "operation": {"opcode": operation_code(Opcode.ERASE)}})
        ctx.set(dut.commands.valid, 1)
        await ctx.tick().until(dut.commands.ready)
        ctx.set(dut.commands.valid, 0)

    async def end(ctx, channel):
        back = dut.channel_outcomes[channel]
        ctx.set(back.payload, {"identity": 3, "page": 5, "status": Status.OK})
        ctx.set(back.valid, 1)
        await ctx.tick().until(back.ready)
        ctx.set(back.valid, 0)
        payload, = await ctx.tick().sample(dut.outcomes.payload).until(dut.outcomes.valid)
        seen.append((payload.status, payload.where))

    async def scenario(ctx):
        ctx.set(dut.outcomes.ready, 1)
        for operations in dut.operations:
            ctx.set(operations.ready, 1)
        for channel in (1, 1, 1, 0):
            await give(ctx, channel)
        await end(ctx, 1)
        ctx.set(dut.failed, 0b10)
        await ctx.tick()
        ctx.set(dut.failed, 0)
        await end(ctx, 1)
        await end(ctx, 0)
        await give(ctx, 1)     # before the last one's end: nothing is forgotten
        await end(ctx, 1)
        await end(ctx, 1)
        await ctx.tick()
        assert ctx.get(dut.quiet)
        await give(ctx, 1)
        await end(ctx, 1)

    simulate(dut, scenario)
    good, bad = (Status.OK, 0), (Status.BUS_ERROR, 1 << 24 | 5)
    assert seen == [good, bad, good, bad, bad, good]
