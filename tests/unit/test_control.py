"""Batch state, counters, status bits, soft reset."""

import random

import pytest
from amaranth.sim import Simulator

from kvattic.config import TINY, Config
from kvattic.registers import REGISTER_MAP, StatusBit
from kvattic_hdl.control import FLASH_COUNTERS, STALLS, Control
from kvattic_hdl.interfaces import Shapes

CONTROL_RESET, CONTROL_IRQ = 1, 2
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


def starts(log):
    """Records each batch_start with its count."""

    async def watch(ctx, dut):
        while True:
            _, _, start, count, base = await ctx.tick().sample(
                dut.batch_start, dut.count, dut.command_base
            )
            if start:
                log.append((count, base))

    return watch


def test_a_batch():
    log = []

    async def bench(ctx, dut):
        assert await status(ctx, dut) == StatusBit.READY
        await write(ctx, dut, "COMMAND_BASE", 0xABCD_0040)
        await write(ctx, dut, "COMMAND_BASE", 0x12, half=1)
        for name, port in (
            ("COMPLETION_BASE", dut.completion_base),
            ("BUFFER_BASE", dut.buffer_base),
            ("BUFFER_LIMIT", dut.buffer_limit),
            ("TIMEOUT", dut.timeout),
        ):
            await write(ctx, dut, name, address(name) + 1)
            assert ctx.get(port) == address(name) + 1
        await write(ctx, dut, "CONTROL", CONTROL_IRQ)
        await write(ctx, dut, "DOORBELL", 3)
        assert ctx.get(dut.busy)
        for number in range(3):
            assert await status(ctx, dut) == StatusBit.READY | StatusBit.BUSY
            assert await read(ctx, dut, "COMPLETED") == number
            assert not ctx.get(dut.irq)
            await pulse(ctx, dut.completed)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.DONE
        assert await read(ctx, dut, "COMPLETED") == 3
        assert ctx.get(dut.irq)
        cycles = await read(ctx, dut, "CYCLES")
        await ctx.tick().repeat(5)
        assert cycles == await read(ctx, dut, "CYCLES") > 20
        await write(ctx, dut, "STATUS", StatusBit.DONE)
        assert await status(ctx, dut) == StatusBit.READY
        assert not ctx.get(dut.irq)
        # The next batch clears what the last one left, DONE included.
        await write(ctx, dut, "DOORBELL", 1)
        await pulse(ctx, dut.completed)
        await write(ctx, dut, "DOORBELL", 65535)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.BUSY
        assert await read(ctx, dut, "COMPLETED") == 0

    simulate(bench, background=starts(log))
    assert log == [(3, 0x12_ABCD_0040), (1, 0x12_ABCD_0040), (65535, 0x12_ABCD_0040)]


def test_doorbells_that_are_refused():
    log = []

    async def bench(ctx, dut):
        refused = StatusBit.DOORBELL_WHILE_BUSY
        for count in (0, 65536, 0x1_0001):
            await write(ctx, dut, "DOORBELL", count)
            assert await status(ctx, dut) == StatusBit.READY | refused
            await write(ctx, dut, "STATUS", refused)
        ctx.set(dut.lanes_ready, 0)
        await ctx.tick()
        await write(ctx, dut, "DOORBELL", 1)
        assert await status(ctx, dut) == refused
        await write(ctx, dut, "STATUS", refused)
        assert await status(ctx, dut) == StatusBit(0)
        ctx.set(dut.lanes_ready, 1)
        await ctx.tick()
        assert log == []
        await write(ctx, dut, "DOORBELL", 2)
        await write(ctx, dut, "DOORBELL", 7)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.BUSY | refused
        await pulse(ctx, dut.completed)
        await pulse(ctx, dut.completed)
        assert await status(ctx, dut) == StatusBit.READY | StatusBit.DONE | refused

    simulate(bench, background=starts(log))
    assert log == [(2, 0)]


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

    async def bench(ctx, dut):
        for _batch in range(2):
            sums = dict.fromkeys((*KINDS, "duplicate", "stale"), 0)
            beats_at = []
            history = []
            # What comes before the doorbell leaves no trace.
            ctx.set(dut.events, random_events(rng, dut, channels))
            await write(ctx, dut, "DOORBELL", 1)
            while not ctx.get(dut.busy):
                await ctx.tick()
            # One cycle or more of unknown events has been counted by `write` returning: begin from
            # what is counted.
            ctx.set(dut.events, [{"idle": 1}] * channels)
            await ctx.tick().repeat(5)
            base = {name: ctx.get(dut.snapshot[name]) for name in ("cycle", "beats", *STALLS)}
            late = {n: await read(ctx, dut, n) for n in ("DUPLICATES", "STALES")}
            elapsed = ctx.get(dut.snapshot.cycle) - base["cycle"]
            sums["idle"] = elapsed * channels
            for _cycle in range(120):
                events = random_events(rng, dut, channels)
                ctx.set(dut.events, events)
                for event in events:
                    for name, value in event.items():
                        sums[name] += value
                await ctx.tick()
                beats_at.append(any("beat" in event for event in events))
                snapshot = {n: ctx.get(dut.snapshot[n]) for n in ("cycle", "beats", *STALLS)}
                assert (
                    sum(v for n, v in snapshot.items() if n != "cycle")
                    == channels * snapshot["cycle"]
                )
                history.append(snapshot)
            assert history[50]["cycle"] - history[10]["cycle"] == 40
            ctx.set(dut.events, [{"idle": 1}] * channels)
            sums["idle"] += channels  # the cycle of `completed` itself
            await pulse(ctx, dut.completed)
            ctx.set(dut.events, [{"beat": 1}] * channels)  # after the batch: not counted
            await ctx.tick().repeat(4)
            # Three cycles were still on their way to the counters when `base` was read: idle ones,
            # as before and after.
            assert await read(ctx, dut, "CYCLES") - base["cycle"] == elapsed + 121 + 2
            sums["idle"] += 2 * channels
            for name in STALLS:
                assert await read(ctx, dut, name.upper()) - base[name] == sums[name], name
            assert await read(ctx, dut, "BEATS") - base["beats"] == sums["beat"]
            assert await read(ctx, dut, "DUPLICATES") - late["DUPLICATES"] == sums["duplicate"]
            assert await read(ctx, dut, "STALES") - late["STALES"] == sums["stale"]
            last = max(i for i, beat in enumerate(beats_at) if beat)
            assert await read(ctx, dut, "LAST_BEAT") == base["cycle"] + elapsed + 2 + last + 1

    simulate(bench, config)


def test_first_beat_and_cycles_from_the_doorbell():
    async def bench(ctx, dut):
        ctx.set(dut.events, [{"idle": 1}] * 2)
        # The write by hand, so that every cycle is known.
        bus = dut.bus
        ctx.set(bus.awaddr, address("DOORBELL"))
        ctx.set(bus.wdata, 1)
        ctx.set(bus.wstrb, 15)
        ctx.set(bus.bready, 1)
        ctx.set(bus.awvalid, 1)
        ctx.set(bus.wvalid, 1)
        await ctx.tick()
        ctx.set(bus.awvalid, 0)
        ctx.set(bus.wvalid, 0)
        await ctx.tick()
        assert ctx.get(dut.batch_start)
        await ctx.tick()
        await ctx.tick().repeat(6)  # cycles 1 to 6
        ctx.set(dut.events, [{"idle": 1}, {"beat": 1}])
        await ctx.tick().repeat(3)  # 7 to 9
        ctx.set(dut.events, [{"idle": 1}] * 2)
        await ctx.tick().repeat(2)  # 10, 11
        await pulse(ctx, dut.completed)  # 12
        await ctx.tick().repeat(4)
        names = ("CYCLES", "FIRST_BEAT", "LAST_BEAT", "BEATS", "IDLE")
        assert [await read(ctx, dut, n) for n in names] == [12, 7, 9, 3, 21]

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
        for batch in range(2):
            # What comes before the doorbell leaves no trace.
            ctx.set(dut.flash_events, events(full=True))
            await ctx.tick().repeat(5)
            ctx.set(dut.flash_events, [{}] * channels)
            await ctx.tick().repeat(3)
            await write(ctx, dut, "DOORBELL", 1)
            assert ctx.get(dut.busy)
            sums = dict.fromkeys(FLASH_COUNTERS, 0)
            for cycle in range(200):
                now = events(full=cycle == 17)
                if cycle == 199:    # with the last completion, the last cycle that counts
                    ctx.set(dut.completed, 1)
                ctx.set(dut.flash_events, now)
                for name, event in FLASH_COUNTERS.items():
                    sums[name] += sum(channel.get(event, 0) for channel in now)
                await ctx.tick()
            ctx.set(dut.completed, 0)
            ctx.set(dut.flash_events, events(full=True))
            await ctx.tick().repeat(5)
            for name, value in sums.items():
                assert await read(ctx, dut, name.upper()) == value > 40, (batch, name)

    simulate(bench, config)


def test_flash_counters_have_registers():
    names = {name.lower() for name in REGISTER_MAP}
    assert names >= set(FLASH_COUNTERS)
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
        assert await read(ctx, dut, "UNREADABLE") == 0    # no batch runs
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
        await write(ctx, dut, "COMMAND_BASE", 0x40)
        await write(ctx, dut, "TIMEOUT", 5)
        await pulse(ctx, dut.bus_error)
        ctx.set(dut.media_errors, [{"page": 7, "codeword": 1, "cause": 1}, {}])
        ctx.set(dut.flash_events, [{"unreadable": 1}, {"word": 1}])
        await write(ctx, dut, "DOORBELL", 2)
        await ctx.tick().repeat(9)
        assert await read(ctx, dut, "FLASH_WORDS") > 3
        assert await read(ctx, dut, "MEDIA_ERROR") == 7
        ctx.set(dut.events, [{"beat": 1}] * 2)
        await write(ctx, dut, "CONTROL", CONTROL_RESET | CONTROL_IRQ)
        await ctx.tick().repeat(10)
        assert ctx.get(dut.stop)
        assert sum(resets) == 0
        assert StatusBit.READY not in await status(ctx, dut)
        await write(ctx, dut, "DOORBELL", 1)
        ctx.set(dut.quiet, 1)
        await ctx.tick().until(dut.reset)
        ctx.set(dut.lanes_ready, 0)
        ctx.set(dut.events, [{}, {}])
        ctx.set(dut.flash_events, [{}, {}])
        await ctx.tick().repeat(3)
        assert sum(resets) == 1
        assert not ctx.get(dut.stop)
        assert not ctx.get(dut.busy)
        assert await status(ctx, dut) == StatusBit(0)
        ctx.set(dut.lanes_ready, 1)
        await ctx.tick()
        assert await status(ctx, dut) == StatusBit.READY
        assert await read(ctx, dut, "TIMEOUT") == REGISTER_MAP["TIMEOUT"].reset
        for name in (
            "CONTROL",
            "COMMAND_BASE",
            "CYCLES",
            "BEATS",
            "FIRST_BEAT",
            "LAST_BEAT",
            "COMPLETED",
            "FLASH_WORDS",
            "MEDIA_ERROR",
            "MEDIA_CAUSE",
        ):
            assert await read(ctx, dut, name) == 0, name
        assert await read(ctx, dut, "ID") == REGISTER_MAP["ID"].reset
        await write(ctx, dut, "DOORBELL", 1)
        assert ctx.get(dut.busy)
        assert sum(resets) == 1

    simulate(bench, background=watch)
