"""Compiled components behave as in Amaranth's simulator, cycle by cycle, for all that tests do with them."""

import random

import pytest
from amaranth.hdl import Cat, Module, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from tests.hdl.compiled import resettable, simulation


class Colour(enum.Enum, shape=2):
    RED = 0
    GREEN = 2
    BLUE = 3


PIXEL = data.StructLayout({
    "colour": Colour, "place": signed(5), "pair": data.ArrayLayout(unsigned(7), 2), "flags": data.StructLayout({
        "first": 1, "rest": 3})})


class Toy(wiring.Component):
    """Each kind of port, and each way from an input to an output: at once, over a register, over a memory."""

    i: In(stream.Signature(PIXEL))
    o: Out(stream.Signature(PIXEL))
    narrow: In(signed(3), init=-2)
    word: In(16)
    double: In(64)
    wide: In(100)
    colour: In(Colour)
    sum: Out(signed(20))
    wide_sum: Out(101)
    cycle: Out(32)
    stored: Out(100)
    parts: Out(4).array(3)

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=unsigned(100), depth=8, init=range(8))
        write, read = memory.write_port(), memory.read_port()
        self.hidden = Signal(5, init=3)
        m.d.sync += [self.cycle.eq(self.cycle + self.step), self.hidden.eq(self.hidden + 1)]
        m.d.comb += [
            self.sum.eq(self.narrow + self.i.payload.place),
            self.wide_sum.eq(self.wide + self.double + self.word),
            write.data.eq(self.wide), write.addr.eq(self.word), write.en.eq(self.i.valid),
            read.addr.eq(self.word), read.en.eq(1), self.stored.eq(read.data),
            self.i.ready.eq(self.o.ready | ~self.o.valid),
            *(part.eq(self.word >> 4 * n) for n, part in enumerate(self.parts)),
        ]
        with m.If(self.i.ready):
            m.d.sync += [self.o.valid.eq(self.i.valid), self.o.payload.eq(self.i.payload)]
            m.d.sync += self.o.payload.colour.eq(self.colour)
        return m


def plain(value):
    """A value to compare: bits of views, members of enumerations as they are."""
    return (value.shape(), value.as_bits()) if isinstance(value, data.Const) else value


def trace(seed=1, cycles=120):
    """All that testbenches and a process see of random inputs, in the order in which they see it."""
    dut, simulator = simulation(Toy, 3)
    simulator.add_clock(1e-6)
    seen, rng, over = [], random.Random(seed), False

    def note(name, *values):
        seen.append((name, *map(plain, values)))

    async def drive(ctx):
        for _ in range(cycles):
            ctx.set(dut.i.payload, {"colour": rng.choice(list(Colour)), "place": rng.randrange(-16, 16),
                                    "pair": [rng.randrange(128), 5], "flags": {"rest": rng.randrange(8)}})
            note("at once", ctx.get(dut.sum))
            ctx.set(dut.narrow, rng.randrange(-4, 4))
            note("at once", ctx.get(dut.sum), ctx.get(dut.i.ready))
            ctx.set(dut.wide, rng.getrandbits(100))
            ctx.set(dut.double, rng.getrandbits(64))
            ctx.set(dut.word, rng.getrandbits(18))    # is cut
            ctx.set(dut.word[4:7], rng.getrandbits(3))
            ctx.set(dut.i.payload.flags.first, rng.getrandbits(1))
            ctx.set(dut.i.payload.pair[1], rng.getrandbits(7))
            ctx.set(dut.colour, rng.choice(list(Colour)))
            ctx.set(dut.i.valid, rng.getrandbits(1))
            note("wide", ctx.get(dut.wide_sum), ctx.get(dut.wide[37:80]), ctx.get(dut.stored), ctx.get(dut.word))
            note("views", ctx.get(dut.i.payload), ctx.get(dut.i.payload.place), ctx.get(dut.i.payload.colour))
            note("arrays", *map(ctx.get, dut.parts), ctx.get(dut.i.payload.pair), ctx.get(dut.colour))
            note("expression", ctx.get(dut.word + dut.narrow), ctx.get(Cat(dut.o.valid, dut.cycle)))
            note("tick", *await ctx.tick())
        ctx.set(dut.i.valid, 1)
        nonlocal over
        over = True

    async def watch(ctx):
        async for values in ctx.tick().sample(dut.sum, dut.o.payload, dut.cycle, dut.o.payload.flags.rest, dut.stored):
            note("watch", *values)
            note("then", ctx.get(dut.cycle), ctx.get(dut.o.valid))

    async def wait(ctx):
        while not over:
            note("until", *await ctx.tick().sample(dut.o.payload, dut.cycle).until(dut.o.valid & dut.o.ready))
            note("repeat", *await ctx.tick().sample(dut.cycle).repeat(3), ctx.get(dut.cycle))

    async def take(ctx):
        async for _, reset, cycle, valid in ctx.tick().sample(dut.cycle, dut.o.valid):
            note("process", cycle, valid, reset)
            ctx.set(dut.o.ready, cycle & 4 != 0)

    simulator.add_testbench(watch, background=True)
    simulator.add_testbench(drive)
    simulator.add_testbench(wait)
    simulator.add_process(take)
    simulator.run()
    return seen


def test_traces_are_amaranths(monkeypatch):
    compiled = trace()
    again = trace()
    monkeypatch.setattr("tests.hdl.compiled.use_amaranth", True)
    amaranth = trace()
    assert len(amaranth) > 1000
    assert {entry[0] for entry in amaranth} == {
        "at once", "wide", "views", "arrays", "expression", "tick", "watch", "then", "until", "repeat", "process"}
    for number, (here, there) in enumerate(zip(compiled, amaranth, strict=True)):
        assert here == there, number
    assert again == compiled, "a simulation begins with what the one before left"


def test_it_ends_with_the_last_testbench(each_simulator):
    dut, simulator = simulation(Toy, 1)
    simulator.add_clock(1e-6)
    ended = []

    def bench(name, cycles):
        async def run(ctx):
            for _ in range(cycles):
                await ctx.tick()
            ended.append((name, ctx.get(dut.cycle)))

        return run

    simulator.add_testbench(bench("behind", 1000), background=True)
    simulator.add_testbench(bench("long", 20))
    simulator.add_testbench(bench("short", 10))
    simulator.run()
    assert ended == [("short", 10), ("long", 20)]


def test_reset(each_simulator):
    dut, simulator = simulation(resettable, Toy, 2)
    simulator.add_clock(1e-6)

    async def bench(ctx):
        await ctx.tick().repeat(5)
        assert ctx.get(dut.cycle) == 10
        ctx.set(dut.test_reset, 1)
        await ctx.tick()
        assert ctx.get(dut.cycle) == 0

    simulator.add_testbench(bench)
    simulator.run()


def inside(step):
    """A toy with a signal from its inside."""
    toy = Toy(step)
    return toy, toy, lambda: [toy.hidden]


def test_what_is_exposed_can_be_read(each_simulator):
    dut, simulator = simulation(inside, 1)
    simulator.add_clock(1e-6)
    seen = []

    async def bench(ctx):
        for _ in range(3):
            seen.append(ctx.get(dut.hidden))
            await ctx.tick()

    simulator.add_testbench(bench)
    simulator.run()
    assert seen == [3, 4, 5]


@pytest.mark.parametrize("touch, message", [
    (lambda dut, ctx: ctx.get(dut.hidden), "is no port of the compiled component: expose it"),
    (lambda dut, ctx: ctx.set(dut.cycle, 1), "is driven by the component"),
    (lambda dut, ctx: ctx.set(dut.word + 1, 1), "only signals and parts of them can be set"),
    (lambda dut, ctx: ctx.tick("other"), "'other' does not exist"),
    (lambda dut, ctx: ctx.tick().repeat(0), "must be a positive integer")])
def test_mistakes(touch, message):
    dut, simulator = simulation(Toy, 4)

    async def bench(ctx):
        touch(dut, ctx)

    simulator.add_testbench(bench)
    with pytest.raises((LookupError, NameError, TypeError, ValueError), match=message):
        simulator.run()


def test_a_failing_testbench_fails_the_test(each_simulator):
    dut, simulator = simulation(Toy, 1)
    simulator.add_clock(1e-6)

    async def bench(ctx):
        await ctx.tick()
        assert ctx.get(dut.cycle) == 17

    simulator.add_testbench(bench, background=True)
    simulator.add_testbench(bench)
    with pytest.raises(AssertionError):
        simulator.run()
