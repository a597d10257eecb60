"""The encoder against the golden code."""

import random
from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Assert, Module, Mux, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.sim import Simulator

from kvattic.spec import ecc
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.nand import PSLC, TINY_PART
from kvattic_hdl.flash.division import product
from kvattic_hdl.flash.encoder import Encoder
from kvattic_hdl.flash.steps import CodeSteps

CONFIGS = {
    "tiny": TINY,
    "paper": replace(PAPER.with_lane_channels(1), part=PSLC.resized(2048)),
    "paper16": replace(PAPER.with_lane_channels(1), part=PSLC.resized(1024), beat_bytes=16),
    "paper32": replace(PAPER.with_lane_channels(1), part=PSLC.resized(1024), beat_bytes=32),
    "t4": replace(TINY, ecc_t=4),
    "t1_wide": replace(TINY, ecc_t=1, beat_bytes=16),
    "two_words": replace(TINY, part=TINY_PART.resized(1024, spare_bytes=1024), codeword_bytes=64, beat_bytes=32,
                         dram_beat_bytes=32, score_depth=512),
    "one_codeword": replace(TINY, part=TINY_PART.resized(512), codeword_bytes=512, ecc_t=5),
    "t14": replace(PAPER.with_lane_channels(1), part=PSLC.resized(1024, spare_bytes=512), codeword_bytes=1024,
                   ecc_t=14),
}
PATTERNS = {
    "none": lambda rng: lambda cycle: False,
    "1110": lambda rng: lambda cycle: cycle % 4 == 3,
    "random": lambda rng: lambda cycle: rng.random() < 0.4,
}


def words_of(raw: np.ndarray, config: Config) -> list[int]:
    step = config.beat_bytes
    content = raw.tobytes()
    return [int.from_bytes(content[i : i + step], "little") for i in range(0, len(content), step)]


class Beside(wiring.Component):
    """An encoder that shares its steps with another one, which goes first and makes steps of `vector` while `busy`."""

    def __init__(self, config: Config):
        self.config = config
        self.encoder = Encoder(config, shares=True)
        super().__init__({"i": In(self.encoder.i.signature.flip()), "o": Out(self.encoder.o.signature),
                          "busy": In(1), "vector": In(config.beat_bytes * 8)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.encoder = encoder = self.encoder
        m.submodules.steps = steps = CodeSteps(self.config, users=2)
        connect(m, flipped(self.i), encoder.i)
        connect(m, encoder.o, flipped(self.o))
        connect(m, encoder.steps, steps.users[1])
        other = steps.users[0]
        m.d.comb += [other.busy.eq(self.busy), other.parity.eq(Mux(self.busy, self.vector, 0)),
                     other.check.eq(Mux(self.busy, ~self.vector, 0))]
        m.d.sync += [Assert(~(encoder.steps.busy & self.busy)), Assert(~other.waits)]
        return m


def run(config: Config, pages: int, gap, stall, seed: int = 1, busy=None) -> list[int]:
    """Encodes random pages; returns the cycles in which words left.

    busy: whether another one makes a step in a cycle.
    """
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (pages, config.page_bytes), dtype=np.uint8)
    numbers = rng.integers(0, config.pages_per_channel, pages)
    want = words_of(ecc.encode(config, data, numbers), config)
    per_page = config.page_bytes // config.beat_bytes
    dut = Encoder(config) if busy is None else Beside(config)
    left, times = [], []

    async def step(ctx):
        cycle = 0
        while True:
            ctx.set(dut.busy, busy(cycle))
            ctx.set(dut.vector, int(rng.integers(1 << 62)))
            cycle += 1
            await ctx.tick()

    async def feed(ctx):
        cycle = 0
        for i, word in enumerate(words_of(data, config)):
            while gap(cycle):
                cycle += 1
                await ctx.tick()
            ctx.set(dut.i.payload, {"data": word, "page": int(numbers[i // per_page])})
            ctx.set(dut.i.valid, 1)
            while True:
                cycle += 1
                *_, ready = await ctx.tick().sample(dut.i.ready)
                if ready:
                    break
            ctx.set(dut.i.valid, 0)

    async def drain(ctx):
        cycle = 0
        while len(left) < len(want):
            ctx.set(dut.o.ready, not stall(cycle))
            *_, valid, ready, payload = await ctx.tick().sample(dut.o.valid, dut.o.ready, dut.o.payload)
            if valid and ready:
                left.append(payload)
                times.append(cycle)
            cycle += 1
            assert cycle < 20 * len(want), f"{len(left)} of {len(want)} words came"
        ctx.set(dut.o.ready, 1)
        for _ in range(20):
            *_, valid = await ctx.tick().sample(dut.o.valid)
            assert not valid, "a word too many"

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(feed)
    simulator.add_testbench(drain)
    if busy is not None:
        simulator.add_testbench(step, background=True)
    simulator.run()
    raw_words = config.raw_codeword_words
    wrong = [divmod(i, raw_words) for i, (a, b) in enumerate(zip(left, want, strict=True)) if a != b]
    assert not wrong, f"(codeword, word) that differ: {wrong[:10]}"
    return times


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_codewords_are_those_of_the_golden_code(config):
    times = run(config, 2, PATTERNS["none"](None), PATTERNS["none"](None))
    assert times == list(range(2, 2 + len(times))), "latency 2, then a word in each cycle"


@pytest.mark.parametrize("gap", PATTERNS)
@pytest.mark.parametrize("stall", PATTERNS)
@pytest.mark.parametrize("name", ["tiny", "paper16", "two_words"])
def test_stalls_change_nothing(name, gap, stall):
    rng = random.Random(f"{name} {gap} {stall}")
    run(CONFIGS[name], 1, PATTERNS[gap](rng), PATTERNS[stall](rng), seed=2)


@pytest.mark.parametrize("stall", PATTERNS)
@pytest.mark.parametrize("name", ["tiny", "paper16", "two_words"])
def test_an_encoder_waits_while_another_one_makes_steps(name, stall):
    rng = random.Random(f"{name} {stall}")
    run(CONFIGS[name], 1, PATTERNS["random"](rng), PATTERNS[stall](rng), seed=2, busy=lambda _: rng.random() < 0.6)


def test_reset_begins_a_page():
    config = CONFIGS["tiny"]
    data = np.random.default_rng(3).integers(0, 256, (1, config.page_bytes), dtype=np.uint8)
    want = words_of(ecc.encode(config, data, [5]), config)
    dut, reset = Encoder(config), Signal()

    async def bench(ctx):
        ctx.set(dut.o.ready, 1)
        ctx.set(dut.i.valid, 1)
        for cut in (3, 17, 18, 40, 60):
            for i in range(cut):
                ctx.set(dut.i.payload, {"data": i * 0x123456789, "page": 9})
                await ctx.tick()
            ctx.set(reset, 1)
            await ctx.tick()
            ctx.set(reset, 0)
            left, source = [], iter(words_of(data, config))
            word = next(source)
            while len(left) < len(want):
                ctx.set(dut.i.payload, {"data": word, "page": 5})
                *_, ready, valid, payload = await ctx.tick().sample(dut.i.ready, dut.o.valid, dut.o.payload)
                if ready:
                    word = next(source, 0)
                if valid:
                    left.append(payload)
            assert left == want

    simulator = Simulator(ResetInserter(reset)(dut))
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_columns_must_fit():
    with pytest.raises(ValueError, match="columns must be 4, one for each bit, not 3"):
        product(Module(), "name", Signal(4), [1, 2, 3], 2)
