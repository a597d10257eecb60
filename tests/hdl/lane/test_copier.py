"""The copier against what it is for: every token of every codeword at its place in host memory, in whole lines."""

import random
from collections import deque
from dataclasses import replace

import pytest
from tests.hdl.bench import simulate

from kvattic.spec.commands import LINE_BYTES, read_token_bytes
from kvattic.spec.config import TINY
from kvattic_hdl.lane.copier import Copier

CONFIGS = {
    "tiny": TINY,
    "one channel": replace(TINY, channels=1),
    "padded": replace(TINY, channels=3, head_dim=80, sparse=False, codeword_bytes=512, score_depth=512),
    "wide": replace(TINY, channels=2, head_dim=80, sparse=False, codeword_bytes=512, score_depth=512, beat_bytes=32,
                    dram_beat_bytes=32),
    "three lines": replace(TINY, head_dim=96, sparse=False, codeword_bytes=512, score_depth=512, beat_bytes=16),
    "half a line": replace(TINY, kv="fp8_e4m3"),
    "bytes": replace(TINY, head_dim=96, kv="fp8_e5m2", sparse=False, codeword_bytes=512, score_depth=512, beat_bytes=32,
                     dram_beat_bytes=32),
    "large": replace(TINY, head_dim=256, sparse=False, codeword_bytes=512, score_depth=512, beat_bytes=16),
}


class Front:
    """A lane's front as the copier sees it: shows codewords (slot, first token, value, bytes), gives beats when told.

    Args:
        link: of the copier.
        config: geometry.
        codewords: in their order.
        rng: of the stalls.
        stall: probability that a beat, or a codeword, waits in a cycle.
    """

    def __init__(self, link, config, codewords, rng, stall):
        self.link, self.config, self.rng, self.stall = link, config, rng, stall
        self.left = deque(codewords)

    async def bench(self, ctx):
        link, config, size = self.link, self.config, self.config.beat_bytes
        last_before, ready_before, beat = False, False, 0
        await ctx.tick().repeat(4)      # the jobs start before
        while True:
            shown = self.left[0] if self.left and (beat or self.rng.random() >= self.stall) else None
            ctx.set(link.wants, shown is not None)
            ctx.set(link.data, self.rng.getrandbits(8 * size))
            if shown:
                slot, token, value, data = shown
                ctx.set(link.slot, slot)
                ctx.set(link.token, token)
                ctx.set(link.value, value)
                ctx.set(link.data, int.from_bytes(data[beat * size :][:size], "little"))
            taken = shown is not None and ready_before and self.rng.random() >= self.stall
            *_, ready = await ctx.tick().sample(link.ready)
            last = taken and beat == config.beats_per_codeword - 1
            ready_before = ready and not last and not last_before
            last_before = last
            ctx.set(link.valid, taken)
            ctx.set(link.last, last_before)
            if taken:
                beat += 1
            if last_before:
                self.left.popleft()
                beat = 0


def run(config, stall, seed):
    """Codewords of two jobs on all lanes, in any order; the memory, what it must hold, and the cycles that it took."""
    rng = random.Random(seed)
    dut, size = Copier(config), read_token_bytes(config.head_dim, config.kv_element_bytes)
    per_codeword = config.tokens_per_codeword
    jobs = {slot: (0x1_0000_0000 * slot + 64 * rng.randrange(1 << 20), rng.randint(1, 9 * per_codeword))
            for slot in range(2)}
    codewords = [[] for _ in range(config.channels)]
    expected = {}
    for slot, (target, tokens) in jobs.items():
        for first in range(0, tokens, per_codeword):
            for value in range(2):
                data = rng.randbytes(per_codeword * config.token_bytes)
                codewords[rng.randrange(config.channels)].append((slot, first, value, data))
                for token in range(first, min(first + per_codeword, tokens)):
                    text = data[(token - first) * config.token_bytes :][: config.token_bytes]
                    expected[target + token * size + value * size // 2] = text.ljust(size // 2, b"\0")
    fronts = []
    for link, of_lane in zip(dut.lanes, codewords, strict=True):
        rng.shuffle(of_lane)
        fronts.append(Front(link, config, of_lane, random.Random(rng.random()), stall))
    lines, cycles = {}, 0

    async def host(ctx):
        nonlocal cycles
        for slot, (target, tokens) in jobs.items():
            for name, number in (("start_valid", 1), ("slot", slot), ("result", target), ("tokens", tokens)):
                ctx.set(getattr(dut, name), number)
            await ctx.tick()
        ctx.set(dut.start_valid, 0)
        line, wanted = [], sum(len(text) for text in expected.values()) // LINE_BYTES
        while len(lines) < wanted or any(front.left for front in fronts):
            ctx.set(dut.o.ready, rng.random() >= stall)
            o = dut.o
            _, _, valid, ready, payload, slot = await ctx.tick().sample(o.valid, o.ready, o.payload, dut.o_slot)
            cycles += 1
            assert cycles < 100_000
            assert valid or not line, "a line that is begun goes on"
            if valid and ready:
                assert payload.address >> 32 == slot or not line
                line.append((payload.address, payload.data))
                assert payload.last == (len(line) == 8)
                if payload.last:
                    address = line[0][0]
                    assert {each for each, _ in line} == {address} and address not in lines
                    lines[address] = b"".join(data.to_bytes(8, "little") for _, data in line)
                    line = []
        for _ in range(40):
            *_, valid = await ctx.tick().sample(dut.o.valid)
            assert not valid

    simulate(dut, host, background=[front.bench for front in fronts])
    found = {}
    for address, data in expected.items():
        found[address] = b"".join(lines.pop(address + at) for at in range(0, len(data), LINE_BYTES))
    assert not lines, "nothing else is written"
    assert found == expected
    return cycles, sum(len(data) for data in expected.values()) // 8, sum(map(len, codewords))


@pytest.mark.parametrize("stall", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_comes_to_its_place(name, stall):
    for seed in range(3):
        run(CONFIGS[name], stall, seed)


def test_speed():
    """A word a cycle, and what the docstring says between codewords."""
    cycles, words, codewords = run(TINY, 0.0, 7)
    assert cycles <= words + 16 * codewords + 10
