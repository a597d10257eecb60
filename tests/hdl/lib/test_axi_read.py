"""ReadLines and the record helpers."""

import random

import pytest
from amaranth.hdl import Const, Signal, signed
from amaranth.sim import Simulator
from tests.hdl.bench import WORDS, read_memory, simulate

from kvattic.spec.commands import COMMAND, TRAILER, Field, Record
from kvattic_hdl.lib.axi import ReadLines
from kvattic_hdl.lib.records import assemble, field_of_word, fields, word_of


def content(address: int) -> int:
    """What the memory holds: a word that depends on its address."""
    return (address * 0x9E3779B97F4A7C15 + 0x1234567) & ((1 << 64) - 1)


def read_all(dut, wanted, *, ask_stall=0.0, take_stall=0.0, **options):
    """The words that come for the lines wanted, and the cycles it took."""
    rng = random.Random(99)
    words, cycles = [], [0]

    async def ask(ctx):
        for line in wanted:
            while rng.random() < ask_stall:
                await ctx.tick()
            ctx.set(dut.lines.payload, line)
            ctx.set(dut.lines.valid, 1)
            await ctx.tick().until(dut.lines.ready)
            ctx.set(dut.lines.valid, 0)

    async def take(ctx):
        while len(words) < len(wanted) * WORDS:
            ready = rng.random() >= take_stall
            ctx.set(dut.words.ready, ready)
            _, _, valid, payload = await ctx.tick().sample(dut.words.valid, dut.words.payload)
            cycles[0] += 1
            if valid and ready:
                words.append((payload.data, payload.first, payload.last, payload.error))
        ctx.set(dut.words.ready, 0)
        assert ctx.get(dut.quiet)

    simulate(dut, ask, take, background=[read_memory(dut.bus, content, **options)])
    return words, cycles[0]


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("ask_stall", [0.0, 0.6])
@pytest.mark.parametrize("take_stall", [0.0, 0.4])
def test_words_come_in_order(stall, ask_stall, take_stall):
    rng = random.Random(5)
    wanted = [rng.getrandbits(58) for _ in range(25)]
    bad = set(wanted[3::7])
    words, _ = read_all(
        ReadLines(), wanted, ask_stall=ask_stall, take_stall=take_stall, stall=stall, bad={64 * line for line in bad}
    )
    assert words == [
        (content(line * 64 + 8 * i), i == 0, i == 7, line in bad)
        for line in wanted
        for i in range(WORDS)
    ]


def test_outstanding_is_used_and_bounded():
    log = {}
    _, cycles = read_all(ReadLines(), range(40), latency=50, log=log)
    assert log["most"] == 8
    assert cycles < 50 + 40 * 8 + 10  # 8 lines are 64 words: they cover a latency of 50
    log = {}
    read_all(ReadLines(outstanding=2), range(10), latency=50, log=log)
    assert log["most"] == 2


def test_stop_drops_what_was_asked_for():
    dut = ReadLines()

    async def bench(ctx):
        ctx.set(dut.words.ready, 0)
        ctx.set(dut.lines.valid, 1)
        for line in range(3):
            ctx.set(dut.lines.payload, line)
            await ctx.tick().until(dut.lines.ready)
        ctx.set(dut.stop, 1)
        assert not ctx.get(dut.quiet)
        for _ in range(100):
            assert not ctx.get(dut.lines.ready)
            assert not ctx.get(dut.words.valid)
            if ctx.get(dut.quiet):
                break
            await ctx.tick()
        assert ctx.get(dut.quiet)
        assert not ctx.get(dut.bus.arvalid)
        # Afterwards it works as if nothing had been.
        ctx.set(dut.stop, 0)
        ctx.set(dut.lines.payload, 77)
        await ctx.tick().until(dut.lines.ready)
        ctx.set(dut.lines.valid, 0)
        ctx.set(dut.words.ready, 1)
        (word,) = await ctx.tick().sample(dut.words.payload).until(dut.words.valid)
        assert word.data == content(77 * 64)
        assert word.first

    simulate(dut, bench, background=[read_memory(dut.bus, content, latency=9, stall=0.2)])


@pytest.mark.parametrize("outstanding", [0, -1, "8"])
def test_outstanding_is_checked(outstanding):
    with pytest.raises(ValueError, match="outstanding must be an int of at least 1"):
        ReadLines(outstanding=outstanding)


def evaluate(value):
    """A constant expression's bits."""
    dut = Signal(len(value))
    result = []

    async def bench(ctx):
        result.append(ctx.get(value))

    from amaranth.hdl import Module

    m = Module()
    m.d.comb += dut.eq(value)
    sim = Simulator(m)
    sim.add_testbench(bench)
    sim.run()
    return result[0]


def test_records_agree_with_the_host():
    values = {
        f.name: (0xA5A5_0123_4567_89AB * (i + 1)) % (1 << f.size * 8)
        for i, f in enumerate(COMMAND.fields)
    }
    packed = COMMAND.pack(**values)
    line = Const(int.from_bytes(packed, "little"), 512)
    for name, value in fields(COMMAND, line).items():
        assert evaluate(value) == values[name]
        field = COMMAND[name]
        word = Const(int.from_bytes(packed[word_of(field) * 8 :][:8], "little"), 64)
        assert evaluate(field_of_word(word, field)) == values[name]
    assembled = assemble(
        COMMAND, **{f.name: Const(values[f.name], f.size * 8) for f in COMMAND.fields}
    )
    assert evaluate(assembled) == int.from_bytes(packed, "little")


def test_assemble_extends_and_checks():
    line = assemble(TRAILER, denominator=Const(5, 50), maximum=Const(-7, signed(36)))
    assert len(line) == 512
    packed = evaluate(line).to_bytes(64, "little")
    assert int.from_bytes(packed[:8], "little", signed=True) == -7
    assert TRAILER.unpack(packed)["denominator"] == 5
    with pytest.raises(ValueError, match=r"Trailer\.maximum must be at most 64 bits, not 65"):
        assemble(TRAILER, maximum=Const(0, 65))
    with pytest.raises(KeyError):
        assemble(TRAILER, nothing=Const(0, 1))
    with pytest.raises(ValueError, match="line must be 512 bits for a Trailer, not 8"):
        fields(TRAILER, Const(0, 8))
    split = Record("Split", 64, (Field("a", 6, 4, ""),))
    with pytest.raises(ValueError, match="field must lie in one word"):
        word_of(split["a"])
