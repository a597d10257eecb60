"""The register bank against the table it is built from."""

import pytest
from amaranth.sim import Simulator
from hypothesis import given, settings
from hypothesis import strategies as st

from kvattic.spec.config import TINY
from kvattic.spec.registers import ADDRESS_BITS, DOORBELL_PAGE, DOORBELL_STRIDE, QUEUES, REGISTER_MAP, REGISTERS, Access
from kvattic_hdl.nvme.registers import CONSTANTS, FLASH_REGISTERS, RegisterBank

OKAY, SLVERR = 0, 2
PAGES = range(0, 1 << ADDRESS_BITS, DOORBELL_PAGE)
MAPPED = {r.address + 4 * half: (r, half) for r in REGISTERS for half in range(r.width // 32)}


def value_of(register):
    """What a register reads as here."""
    return (register.address * 0x0102_0304_0506_0708 + 1) % (1 << register.width)


def simulate(bench, *, dut=None):
    dut = dut or RegisterBank(TINY)
    sim = Simulator(dut)
    sim.add_clock(1e-6)

    async def main(ctx):
        await bench(ctx, dut)

    async def flash_counters(ctx):
        """The counters that are asked for by their number."""
        async for number, in ctx.changed(dut.flash_number):
            if number < len(FLASH_REGISTERS):
                ctx.set(dut.flash_counter, value_of(REGISTER_MAP[FLASH_REGISTERS[number]]))

    sim.add_process(flash_counters)
    sim.add_testbench(main)
    sim.run()


def words():
    """Addresses of all words that mean something, and of others that differ from them in few bits."""
    near = [*range(0, 0x400, 4), 0x400, 0x600, DOORBELL_STRIDE - 4, DOORBELL_STRIDE, DOORBELL_STRIDE + 4,
            DOORBELL_STRIDE + 0x400, DOORBELL_PAGE - 4]
    return sorted({page + offset for page in PAGES for offset in (near if page == 0 else (*near[:4], *near[-7:]))})


async def send(ctx, valid, ready, gap):
    """One transfer of a channel after `gap` cycles."""
    for _ in range(gap):
        await ctx.tick()
    ctx.set(valid, 1)
    await ctx.tick().until(ready)
    ctx.set(valid, 0)


async def write(ctx, dut, address, data, strobe=0b1111, *, address_gap=0, data_gap=0, answer_gap=0):
    """Write with AW and W in any relation; the answer, and strobes (a doorbell: queue and side) with data."""
    bus = dut.bus
    ctx.set(bus.awaddr, address)
    ctx.set(bus.wdata, data)
    ctx.set(bus.wstrb, strobe)
    seen, cycle, answered, first = [], 0, None, None
    address_done = data_done = False
    while answered is None:
        ctx.set(bus.awvalid, not address_done and cycle >= address_gap)
        ctx.set(bus.wvalid, not data_done and cycle >= data_gap)
        ctx.set(bus.bready, first is not None and cycle >= first + answer_gap)
        (
            _,
            _,
            awvalid,
            awready,
            wvalid,
            wready,
            bvalid,
            bready,
            bresp,
            strobes,
            word,
            bell,
        ) = await ctx.tick().sample(
            bus.awvalid,
            bus.awready,
            bus.wvalid,
            bus.wready,
            bus.bvalid,
            bus.bready,
            bus.bresp,
            dut.write.as_value(),
            dut.data,
            dut.doorbell,
        )
        address_done |= awvalid & awready
        data_done |= wvalid & wready
        if strobes:
            seen.append((strobes, word))
        if bell.valid:
            assert bell.value == word
            seen.append(((bell.queue, bell.completion), word))
        if bvalid:
            assert address_done
            assert data_done
            first = cycle if first is None else first
            if bready:
                answered = bresp
        cycle += 1
        assert cycle < 100
    ctx.set(bus.bready, 0)
    return answered, seen


async def read(ctx, dut, address, gap=0):
    bus = dut.bus
    ctx.set(bus.araddr, address)
    await send(ctx, bus.arvalid, bus.arready, 0)
    data = None
    for _ in range(gap + 4):
        if ctx.get(bus.rvalid):
            assert data in (None, ctx.get(bus.rdata))
            data = ctx.get(bus.rdata)
        await ctx.tick()
    ctx.set(bus.rready, 1)
    data, response = await ctx.tick().sample(bus.rdata, bus.rresp).until(bus.rvalid)
    ctx.set(bus.rready, 0)
    return data, response


def test_every_word_reads_as_the_table_says():
    async def bench(ctx, dut):
        for register in REGISTERS:
            if register.access in (Access.RO, Access.W1C) and register.name not in (*CONSTANTS, *FLASH_REGISTERS):
                ctx.set(dut.read[register.name.lower()], value_of(register))
        for address in words():
            data, response = await read(ctx, dut, address, gap=address % 3)
            if address not in MAPPED:
                assert (data, response) == (0, SLVERR)
                continue
            register, half = MAPPED[address]
            assert response == OKAY
            if register.name == "CONFIG_HASH":
                expected = TINY.hash
            elif register.name in CONSTANTS or register.access is Access.RW:
                expected = register.reset
            elif register.access is Access.WO:
                expected = 0
            else:
                expected = value_of(register)
            assert data == expected >> 32 * half & 0xFFFF_FFFF, register.name

    simulate(bench)


def test_a_counter_is_read_whole():
    async def bench(ctx, dut):
        cycles = REGISTER_MAP["CYCLES"].address
        ctx.set(dut.read.cycles, 0x1_FFFF_FFFF)
        assert await read(ctx, dut, cycles) == (0xFFFF_FFFF, OKAY)
        ctx.set(dut.read.cycles, 0x2_0000_0000)
        assert await read(ctx, dut, cycles + 4) == (1, OKAY)

    simulate(bench)


def test_looks_beside_the_bus():
    """A register is looked at in each cycle without the bus; its first cycle is never the bus's."""
    async def bench(ctx, dut):
        beats, cycles = REGISTER_MAP["BEATS"], REGISTER_MAP["CYCLES"]
        ctx.set(dut.read.beats, value_of(beats))
        ctx.set(dut.read.cycles, value_of(cycles))
        ctx.set(dut.look, beats.address // 4)
        for first in (0, 1):
            ctx.set(dut.bus.araddr, cycles.address)
            await send(ctx, dut.bus.arvalid, dut.bus.arready, 0)
            ctx.set(dut.look_first, first)
            await ctx.tick()
            assert ctx.get(dut.looking) == first
            if first:
                assert ctx.get(dut.looked) == value_of(beats)
                ctx.set(dut.look_first, 0)
                await ctx.tick()
                assert not ctx.get(dut.bus.rvalid)
            assert not ctx.get(dut.looking)
            await ctx.tick()
            assert ctx.get(dut.looking)
            assert ctx.get(dut.looked) == value_of(beats)
            assert ctx.get(dut.bus.rvalid)
            assert ctx.get(dut.bus.rdata) == value_of(cycles) & 0xFFFF_FFFF
            ctx.set(dut.bus.rready, 1)
            await ctx.tick()
            ctx.set(dut.bus.rready, 0)

    simulate(bench)


def test_unmapped_and_read_only_writes_change_nothing():
    async def bench(ctx, dut):
        before = ctx.get(dut.value.as_value())
        for address in words():
            register, _ = MAPPED.get(address, (None, 0))
            if register is None or register.access is Access.RO:
                answer = await write(ctx, dut, address, 0xFFFF_FFFF)
                assert answer == (SLVERR if register is None else OKAY, [])
        assert ctx.get(dut.value.as_value()) == before

    simulate(bench)


def test_strobes():
    async def bench(ctx, dut):
        for name, index in (("ADMIN_ENTRIES", "admin_entries"), ("STATUS", "status")):
            address = REGISTER_MAP[name].address
            answer, seen = await write(ctx, dut, address, 0x1234_5678, data_gap=2, answer_gap=3)
            only = dut.write.shape().const({index: 1}).as_value().value
            assert (answer, seen) == (OKAY, [(only, 0x1234_5678)])
            assert await write(ctx, dut, address, 0x1234_5678, 0b0101) == (
                OKAY,
                [(only, 0x0034_0078)],
            )
            assert await write(ctx, dut, address, 0x1234_5678, 0) == (OKAY, [])
            assert await read(ctx, dut, address) == (0, OKAY)

    simulate(bench)


@pytest.mark.parametrize("queue", range(QUEUES))
def test_doorbells(queue):
    async def bench(ctx, dut):
        for completion, name in enumerate(("SUBMISSION_TAIL", "COMPLETION_HEAD")):
            address = REGISTER_MAP[f"{name}_{queue}"].address
            what = (queue, completion)
            value = 0x8765_4321
            assert await write(ctx, dut, address, value, data_gap=2, answer_gap=3) == (OKAY, [(what, value)])
            assert await write(ctx, dut, address, value, 0b0011) == (OKAY, [(what, 0x4321)])
            assert await write(ctx, dut, address, value, 0) == (OKAY, [])
            assert await read(ctx, dut, address) == (0, OKAY)

    simulate(bench)


WRITES = st.lists(
    st.tuples(
        st.sampled_from([a for a, (r, _) in MAPPED.items() if r.access is Access.RW]),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 15),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    min_size=10,
    max_size=25,
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(WRITES)
def test_writes_keep_to_their_bytes(writes):
    async def bench(ctx, dut):
        model = {a: r.reset >> 32 * half & 0xFFFF_FFFF for a, (r, half) in MAPPED.items()}
        for address, data, strobe, address_gap, data_gap, answer_gap in writes:
            answer, seen = await write(
                ctx,
                dut,
                address,
                data,
                strobe,
                address_gap=address_gap,
                data_gap=data_gap,
                answer_gap=answer_gap,
            )
            assert (answer, seen) == (OKAY, [])
            for byte in range(4):
                if strobe >> byte & 1:
                    mask = 0xFF << 8 * byte
                    model[address] = model[address] & ~mask | data & mask
            assert (await read(ctx, dut, address)) == (model[address], OKAY)
            for register in REGISTERS:
                if register.access is Access.RW:
                    value = ctx.get(dut.value[register.name.lower()])
                    assert value & 0xFFFF_FFFF == model[register.address]
                    if register.width == 64:
                        assert value >> 32 == model[register.address + 4]

    simulate(bench)


def test_back_to_back_writes_and_clear():
    async def bench(ctx, dut):
        bus = dut.bus
        ctx.set(bus.bready, 1)
        ctx.set(bus.wstrb, 15)
        # Two addresses before any data: the second waits, nothing is lost.
        timeout, base = REGISTER_MAP["TIMEOUT"].address, REGISTER_MAP["ADMIN_BASE"].address
        ctx.set(bus.awaddr, timeout)
        await send(ctx, bus.awvalid, bus.awready, 0)
        ctx.set(bus.awaddr, base)
        ctx.set(bus.awvalid, 1)
        for _ in range(3):
            assert not ctx.get(bus.awready)
            await ctx.tick()
        ctx.set(bus.wdata, 11)
        await send(ctx, bus.wvalid, bus.wready, 0)
        await ctx.tick().until(bus.awready)
        ctx.set(bus.awvalid, 0)
        ctx.set(bus.wdata, 22)
        await send(ctx, bus.wvalid, bus.wready, 0)
        await ctx.tick().repeat(3)
        assert ctx.get(dut.value.timeout) == 11
        assert ctx.get(dut.value.admin_base) == 22
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        assert ctx.get(dut.value.timeout) == REGISTER_MAP["TIMEOUT"].reset
        assert ctx.get(dut.value.admin_base) == 0

    simulate(bench)


def test_config_is_checked():
    with pytest.raises(TypeError, match="config must be a Config, not 5"):
        RegisterBank(5)


def test_answers_that_nobody_takes_yet():
    """A second read or write that comes while an answer waits changes nothing of it."""

    async def bench(ctx, dut):
        bus = dut.bus
        ctx.set(dut.read.completed, 5)
        ctx.set(dut.read.tag_error, 6)
        addresses = [REGISTER_MAP[name].address for name in ("COMPLETED", "TAG_ERROR")] + [0xFC]
        ctx.set(bus.arvalid, 1)
        ctx.set(bus.araddr, addresses[0])
        await ctx.tick().until(bus.arready)
        for following, expected in zip(
            [*addresses[1:], 0], [(5, OKAY), (6, OKAY), (0, SLVERR)], strict=True
        ):
            ctx.set(bus.araddr, following)
            await ctx.tick().until(bus.rvalid)
            await ctx.tick().repeat(5)
            assert (ctx.get(bus.rdata), ctx.get(bus.rresp)) == expected
            ctx.set(bus.rready, 1)
            await ctx.tick()
            ctx.set(bus.rready, 0)
            assert not ctx.get(bus.rvalid)
            await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)

        doorbell = REGISTER_MAP["SUBMISSION_TAIL_5"].address
        answers, rung = [], []
        ctx.set(bus.wstrb, 15)
        targets = [0xF8, doorbell, 0xF8, doorbell]
        sent = [0, 0]
        for cycle in range(80):
            for channel, valid in enumerate((bus.awvalid, bus.wvalid)):
                ctx.set(valid, sent[channel] < len(targets))
            ctx.set(bus.awaddr, targets[min(sent[0], 3)])
            ctx.set(bus.wdata, 100 + sent[1])
            ctx.set(bus.bready, cycle % 10 == 9)
            _, _, aw, w, bvalid, bready, response, strobe, data = await ctx.tick().sample(
                bus.awvalid & bus.awready,
                bus.wvalid & bus.wready,
                bus.bvalid,
                bus.bready,
                bus.bresp,
                dut.doorbell.valid,
                dut.data,
            )
            sent[0] += aw
            sent[1] += w
            if bvalid and bready:
                answers.append(response)
            if strobe:
                rung.append(data)
        assert answers == [SLVERR, OKAY, SLVERR, OKAY]
        assert rung == [101, 103]

    simulate(bench)
