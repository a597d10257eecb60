"""Counters, status bits, interrupts, queue 0, soft reset."""

import random

import pytest
from amaranth.sim import Simulator

from kvattic.spec.config import TINY, Config
from kvattic.spec.registers import COUNTERS, REGISTER_MAP, StatusBit
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.nvme.control import Control
from kvattic_hdl.nvme.counters import FLASH_COUNTERS, STALLS
from kvattic_hdl.nvme.registers import FLASH_REGISTERS

CONTROL_RESET = 1
KINDS = ("beat", *STALLS)


def address(name):
    return REGISTER_MAP[name].address


async def write(ctx, dut, name, data, half=0):
    bus = dut.bus
    ctx.set(bus.awaddr, address(name) + 4 * half)
    ctx.set(bus.wdata, data)
    ctx.set(bus.wstrb, 15)
    ctx.set(bus.awvalid, 1)
    ctx.set(bus.wvalid, 1)
    await ctx.tick()
    ctx.set(bus.awvalid, 0)
    ctx.set(bus.wvalid, 0)
    ctx.set(bus.bready, 1)
    (response,) = await ctx.tick().sample(bus.bresp).until(bus.bvalid)
    ctx.set(bus.bready, 0)
    assert response == 0


async def read(ctx, dut, name):
    bus = dut.bus
    value = 0
    for half in range(REGISTER_MAP[name].width // 32):
        ctx.set(bus.araddr, address(name) + 4 * half)
        ctx.set(bus.arvalid, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        ctx.set(bus.rready, 1)
        data, response = await ctx.tick().sample(bus.rdata, bus.rresp).until(bus.rvalid)
        ctx.set(bus.rready, 0)
        assert response == 0
        value |= data << 32 * half
    return value


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


async def status(ctx, dut):
    return StatusBit(await read(ctx, dut, "STATUS"))


def simulate(bench, config=TINY, background=None):
    dut = Control(config)
    sim = Simulator(dut)
    sim.add_clock(1e-6)

    async def main(ctx):
        ctx.set(dut.lanes_ready, 1)
        await ctx.tick().repeat(2)
        await bench(ctx, dut)

    if background:

        async def behind(ctx):
            await background(ctx, dut)

        sim.add_testbench(behind, background=True)
    sim.add_testbench(main)
    sim.run()


async def begin(ctx, dut):
    """The drive gets work; until it counts."""
    ctx.set(dut.busy, 1)
    await ctx.tick().repeat(6)


async def end(ctx, dut):
    """The work is done: the cycle of the last completion, which counts, and that in which this is seen."""
    await pulse(ctx, dut.completed)
    ctx.set(dut.busy, 0)
    await ctx.tick()


def test_registers_and_status():
    async def bench(ctx, dut):
        assert await status(ctx, dut) == StatusBit.READY
        for name, port, half in (
            ("ADMIN_BASE", dut.admin_base, 1),
            ("ADMIN_LIMIT", dut.admin_limit, 1),
            ("TIMEOUT", dut.timeout, 0),
        ):
            await write(ctx, dut, name, address(name) + 1, half=half)
            assert ctx.get(port) >> 32 * half & 0xFFFF_FFFF == address(name) + 1
        await write(ctx, dut, "INTERRUPT_AFTER", 0x1_2345)
        await write(ctx, dut, "REGION_BITS", 0x1C)
        assert (ctx.get(dut.interrupt_after), ctx.get(dut.region_bits)) == (0x2345, 12)
        for number in range(3):
            await pulse(ctx, dut.fetched)
            ctx.set(dut.busy, 1)
            assert await status(ctx, dut) == StatusBit.READY | StatusBit.BUSY
            assert (await read(ctx, dut, "FETCHED"), await read(ctx, dut, "COMPLETED")) == (number + 1, number)
            await pulse(ctx, dut.completed)
            ctx.set(dut.busy, 0)
            assert await status(ctx, dut) == StatusBit.READY
        assert await read(ctx, dut, "COMPLETED") == 3
        ctx.set(dut.lanes_ready, 0)
        await ctx.tick().repeat(2)
        assert not ctx.get(dut.ready)
        assert await status(ctx, dut) == StatusBit(0)

    simulate(bench)


def test_interrupts():
    async def bench(ctx, dut):
        ctx.set(dut.interrupts, 0b1000_0110)
        assert await read(ctx, dut, "INTERRUPTS") == 0b1000_0110
        for mask, irq in ((0, 0), (0b0111_1001, 0), (0b0000_0010, 1), (0x180, 1), (0x100, 0)):
            await write(ctx, dut, "INTERRUPT_MASK", mask)
            await ctx.tick().repeat(2)
            assert ctx.get(dut.irq) == irq, mask
        await write(ctx, dut, "INTERRUPT_MASK", 0xFF)
        ctx.set(dut.interrupts, 0)
        await ctx.tick().repeat(2)
        assert not ctx.get(dut.irq)

    simulate(bench)


def test_queue_0():
    log = []

    async def watch(ctx, dut):
        while True:
            _, _, create, remove, bits = await ctx.tick().sample(dut.admin_create, dut.admin_remove, dut.admin_bits)
            if create or remove:
                log.append((create, remove, bits if create else None))

    async def bench(ctx, dut):
        for name, port in (("ADMIN_SUBMISSION", dut.admin_submission), ("ADMIN_COMPLETION", dut.admin_completion)):
            await write(ctx, dut, name, 0x1234_5640)
            await write(ctx, dut, name, address(name), half=1)
            assert ctx.get(port) == (address(name) << 32 | 0x1234_5640) >> 6
        for entries in (2, 4096, 1, 0, 3, 8192, 64, 0x1_0040, 1 << 31):
            await write(ctx, dut, "ADMIN_ENTRIES", entries)
            await ctx.tick().repeat(2)

    simulate(bench, background=watch)
    illegal = (0, 1, None)
    assert log == [(1, 0, 1), (1, 0, 12), *[illegal] * 4, (1, 0, 6), illegal, illegal]


def test_doorbells():
    log = []

    async def watch(ctx, dut):
        while True:
            _, _, doorbell = await ctx.tick().sample(dut.doorbell)
            if doorbell.valid:
                log.append((doorbell.queue, doorbell.completion, doorbell.value))

    async def bench(ctx, dut):
        await write(ctx, dut, "SUBMISSION_TAIL_0", 1)
        await write(ctx, dut, "COMPLETION_HEAD_5", 0xFFFF_FFFF)
        await write(ctx, dut, "SUBMISSION_TAIL_7", 0)
        ctx.set(dut.refused_doorbell, 0x0501_FFFF)
        await pulse(ctx, dut.refused)
        ctx.set(dut.refused_doorbell, 0x0700_0000)
        await pulse(ctx, dut.refused)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.INVALID_DOORBELL
        assert await read(ctx, dut, "DOORBELL_ERROR") == 0x0501_FFFF
        await write(ctx, dut, "STATUS", StatusBit.INVALID_DOORBELL)
        assert await status(ctx, dut) == StatusBit.READY
        await pulse(ctx, dut.refused)
        assert await read(ctx, dut, "DOORBELL_ERROR") == 0x0700_0000

    simulate(bench, background=watch)
    assert log == [(0, 0, 1), (5, 1, 0xFFFF_FFFF), (7, 0, 0)]


def random_events(rng, dut, channels, idle=False):
    """One cycle's events: exactly one of the six kinds for each lane."""
    events = []
    for _ in range(channels):
        kind = "idle" if idle else rng.choice(KINDS)
        events.append({kind: 1, "duplicate": rng.random() < 0.1, "stale": rng.random() < 0.1})
    return events


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_counters_and_snapshot(channels):
    config = Config(channels=channels)
    rng = random.Random(channels)
    names = ("cycle", "beats", *STALLS)

    def snapshot(ctx, dut):
        return {name: ctx.get(dut.snapshot[name]) for name in names}

    async def bench(ctx, dut):
        now = None
        for _ in range(2):
            sums = dict.fromkeys((*KINDS, "duplicate", "stale"), 0)
            beats_at = []
            # What comes before the work leaves no trace, but for dropped codewords.
            ctx.set(dut.events, random_events(rng, dut, channels))
            await ctx.tick().repeat(8)
            ctx.set(dut.events, [{"idle": 1}] * channels)
            await ctx.tick().repeat(3)
            before = snapshot(ctx, dut)
            assert before == (now or before)
            dropped = {name: await read(ctx, dut, name) for name in ("DUPLICATES", "STALES")}
            await begin(ctx, dut)
            await ctx.tick().repeat(4)
            base = snapshot(ctx, dut)
            assert base["cycle"] == before["cycle"] + 7 and base["idle"] == before["idle"] + 7 * channels
            history = []
            for _cycle in range(120):
                events = random_events(rng, dut, channels)
                ctx.set(dut.events, events)
                for event in events:
                    for name, value in event.items():
                        sums[name] += value
                await ctx.tick()
                beats_at.append(any("beat" in event for event in events))
                history.append(now := snapshot(ctx, dut))
                assert sum(v for n, v in now.items() if n != "cycle") == channels * now["cycle"]
            assert [now["cycle"] for now in history] == [base["cycle"] + 1 + i for i in range(120)]
            ctx.set(dut.events, [{"idle": 1}] * channels)
            await end(ctx, dut)
            ctx.set(dut.events, [{"beat": 1}] * channels)  # after the work: not counted
            await ctx.tick().repeat(6)
            # Two cycles were on their way to the counters when `base` was read, and two are those of `end`.
            assert await read(ctx, dut, "CYCLES") == base["cycle"] + 2 + 120 + 2
            sums["idle"] += (2 + 2) * channels
            for name in STALLS:
                assert await read(ctx, dut, name.upper()) - base[name] == sums[name], name
            assert await read(ctx, dut, "BEATS") - base["beats"] == sums["beat"]
            assert await read(ctx, dut, "DUPLICATES") - dropped["DUPLICATES"] == sums["duplicate"]
            assert await read(ctx, dut, "STALES") - dropped["STALES"] == sums["stale"]
            first, last = beats_at.index(True), max(i for i, beat in enumerate(beats_at) if beat)
            assert await read(ctx, dut, "FIRST_BEAT") == base["cycle"] + 2 + first + 1
            assert await read(ctx, dut, "LAST_BEAT") == base["cycle"] + 2 + last + 1
            now = snapshot(ctx, dut)
            counters = []
            for i in range(len(COUNTERS)):
                ctx.set(dut.counter_number, i)
                await ctx.tick()
                counters.append(ctx.get(dut.counter))
                assert ctx.get(dut.counter_there)
            assert counters == [await read(ctx, dut, register.name) for register in COUNTERS]

    simulate(bench, config)


def test_counters_go_on():
    """Over times without work, however short, which they do not count; FIRST_BEAT is that of the last work."""
    async def bench(ctx, dut):
        ctx.set(dut.events, [{"beat": 1}, {"idle": 1}])

        async def found():
            await ctx.tick().repeat(4)
            return [await read(ctx, dut, name) for name in ("CYCLES", "BEATS", "IDLE", "FIRST_BEAT", "LAST_BEAT")]

        total, one = 0, 7    # cycles from `begin` to `end`
        for idle in (20, 20, 1, 2, 3):
            await ctx.tick().repeat(idle)
            await begin(ctx, dut)
            await end(ctx, dut)
            total += one
            assert await found() == [total, total, total, total - one + 1, total]
        for idle in (1, 2, 3, 4, 1):
            await begin(ctx, dut)
            ctx.set(dut.busy, 0)
            await ctx.tick().repeat(idle)
            total += 6
        assert await found() == [total, total, total, total - 6 + 1, total]
        # Work without a beat has no first one.
        ctx.set(dut.events, [{"idle": 1}, {"idle": 1}])
        await begin(ctx, dut)
        await end(ctx, dut)
        assert await found() == [total + one, total, total + 2 * one, 0, total]

    simulate(bench)


@pytest.mark.parametrize("channels", [1, 5, 8])
def test_flash_counters(channels):
    config = Config(channels=channels)
    rng = random.Random(channels)
    layout = Shapes(config).flash_events

    def events(full=False):
        return [
            {
                name: (1 << field.width) - 1 if full else rng.getrandbits(field.width)
                for name, field in layout
                if full or rng.random() < 0.7
            }
            for _ in range(channels)
        ]

    async def bench(ctx, dut):
        sums = dict.fromkeys(FLASH_COUNTERS, 0)
        for batch in range(2):
            # What comes before the work leaves no trace.
            ctx.set(dut.flash_events, events(full=True))
            await ctx.tick().repeat(5)
            ctx.set(dut.flash_events, [{}] * channels)
            await ctx.tick().repeat(3)
            await begin(ctx, dut)
            for cycle in range(200):
                now = events(full=cycle == 17)
                if cycle == 199:    # the last cycle that counts is the one in which this is seen
                    ctx.set(dut.busy, 0)
                ctx.set(dut.flash_events, now)
                for name, event in FLASH_COUNTERS.items():
                    sums[name] += sum(channel.get(event, 0) for channel in now)
                await ctx.tick()
            ctx.set(dut.flash_events, events(full=True))
            await ctx.tick().repeat(5)
            for name, value in sums.items():
                assert await read(ctx, dut, name.upper()) == value > 40, (batch, name)

    simulate(bench, config)


def test_flash_counters_have_registers():
    names = {name.lower() for name in REGISTER_MAP}
    assert names >= set(FLASH_COUNTERS)
    assert tuple(name.upper() for name in FLASH_COUNTERS) == FLASH_REGISTERS
    flash = {r.name.lower() for r in REGISTER_MAP.values() if 0x100 <= r.address < 0x158}
    assert set(FLASH_COUNTERS) == flash
    assert set(FLASH_COUNTERS.values()) == {name for name, _ in Shapes(TINY).flash_events}


def test_media_errors():
    async def bench(ctx, dut):
        first = {"page": 0x12_3456, "codeword": 3, "cause": 2}
        other = {"page": 0xFF_FFFF, "codeword": 1, "cause": 1}

        async def events(channels, errors):
            ctx.set(dut.media_errors, errors)
            ctx.set(dut.flash_events, [{"unreadable": int(i in channels)} for i in range(2)])
            await ctx.tick()
            ctx.set(dut.flash_events, [{}, {}])

        await events((1,), [other, first])
        await events((0, 1), [other, other])
        media = StatusBit.MEDIA_ERROR
        assert await status(ctx, dut) == StatusBit.READY | media
        assert await read(ctx, dut, "MEDIA_ERROR") == 1 << 24 | 0x12_3456
        assert await read(ctx, dut, "MEDIA_CAUSE") == 2 << 16 | 3
        assert await read(ctx, dut, "UNREADABLE") == 0    # there is no work
        await write(ctx, dut, "STATUS", StatusBit.BAD_TAG)
        assert media in await status(ctx, dut)
        await write(ctx, dut, "STATUS", media)
        assert await status(ctx, dut) == StatusBit.READY
        await events((0, 1), [other, first])    # the lower channel wins
        await ctx.tick().repeat(2)
        assert await read(ctx, dut, "MEDIA_ERROR") == 0xFF_FFFF
        assert await read(ctx, dut, "MEDIA_CAUSE") == 1 << 16 | 1
        assert media in await status(ctx, dut)

    simulate(bench)


def test_bad_tags():
    async def bench(ctx, dut):
        ctx.set(dut.bad_tags, [0xABC, 0x12_3456])
        ctx.set(dut.events, [{"idle": 1}, {"idle": 1, "bad_tag": 1}])
        await ctx.tick()
        ctx.set(dut.bad_tags, [0xDEF, 0x77])
        ctx.set(dut.events, [{"bad_tag": 1}, {"bad_tag": 1}])
        await ctx.tick()
        ctx.set(dut.events, [{}, {}])
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.BAD_TAG
        assert await read(ctx, dut, "TAG_ERROR") == 1 << 24 | 0x12_3456
        await write(ctx, dut, "STATUS", StatusBit.BAD_TAG)
        assert await status(ctx, dut) == StatusBit.READY
        ctx.set(dut.events, [{"bad_tag": 1}, {"bad_tag": 1}])  # the lower channel wins
        await ctx.tick()
        ctx.set(dut.events, [{}, {}])
        await ctx.tick().repeat(2)
        assert await read(ctx, dut, "TAG_ERROR") == 0xDEF

    simulate(bench)


def test_error_bits_are_sticky():
    async def bench(ctx, dut):
        await pulse(ctx, dut.bus_error)
        ctx.set(dut.events, [{"stale": 1}, {}])
        await ctx.tick()
        ctx.set(dut.events, [{}, {}])
        both = StatusBit.BUS_ERROR | StatusBit.STALE_CODEWORD
        assert await status(ctx, dut) == StatusBit.READY | both
        assert await read(ctx, dut, "STALES") == 1
        await write(ctx, dut, "STATUS", StatusBit.BUS_ERROR | StatusBit.READY)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.STALE_CODEWORD
        await write(ctx, dut, "STATUS", StatusBit.STALE_CODEWORD)
        assert await status(ctx, dut) == StatusBit.READY

    simulate(bench)


def test_soft_reset():
    resets = []

    async def watch(ctx, dut):
        while True:
            _, _, reset, stop = await ctx.tick().sample(dut.reset, dut.stop)
            assert not reset or stop
            resets.append(reset)

    async def bench(ctx, dut):
        ctx.set(dut.quiet, 0)
        await write(ctx, dut, "ADMIN_BASE", 0x40)
        await write(ctx, dut, "TIMEOUT", 5)
        await pulse(ctx, dut.bus_error)
        ctx.set(dut.media_errors, [{"page": 7, "codeword": 1, "cause": 1}, {}])
        ctx.set(dut.flash_events, [{"unreadable": 1}, {"word": 1}])
        await pulse(ctx, dut.refused)
        await pulse(ctx, dut.fetched)
        await pulse(ctx, dut.completed)
        await begin(ctx, dut)
        await ctx.tick().repeat(9)
        assert await read(ctx, dut, "FLASH_WORDS") > 3
        assert await read(ctx, dut, "MEDIA_ERROR") == 7
        ctx.set(dut.events, [{"beat": 1}] * 2)
        await write(ctx, dut, "CONTROL", CONTROL_RESET)
        await ctx.tick().repeat(10)
        assert ctx.get(dut.stop)
        assert sum(resets) == 0
        assert StatusBit.READY not in await status(ctx, dut)
        assert not ctx.get(dut.ready)
        ctx.set(dut.quiet, 1)
        await ctx.tick().until(dut.reset)
        ctx.set(dut.busy, 0)
        ctx.set(dut.lanes_ready, 0)
        ctx.set(dut.events, [{}, {}])
        ctx.set(dut.flash_events, [{}, {}])
        await ctx.tick().repeat(3)
        assert sum(resets) == 1
        assert not ctx.get(dut.stop)
        assert await status(ctx, dut) == StatusBit(0)
        ctx.set(dut.lanes_ready, 1)
        await ctx.tick()
        assert await status(ctx, dut) == StatusBit.READY
        assert await read(ctx, dut, "TIMEOUT") == REGISTER_MAP["TIMEOUT"].reset
        for name in (
            "CONTROL",
            "ADMIN_BASE",
            "CYCLES",
            "BEATS",
            "FIRST_BEAT",
            "LAST_BEAT",
            "FETCHED",
            "COMPLETED",
            "FLASH_WORDS",
            "MEDIA_ERROR",
            "MEDIA_CAUSE",
        ):
            assert await read(ctx, dut, name) == 0, name
        assert await read(ctx, dut, "ID") == REGISTER_MAP["ID"].reset
        assert sum(resets) == 1

    simulate(bench, background=watch)
