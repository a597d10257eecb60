"""`OctetQueue` and `OctetTurns`: octets unfolded as `spec.codes` folds them; levels and fields in their turns."""

import random
from dataclasses import replace

import numpy as np
import pytest
from tests.hdl.bench import simulate

from kvattic.spec.codes import KeyCodes, field_bits, pack, widths
from kvattic.spec.config import GQA, PAPER, TINY, Config
from kvattic_hdl.lane.octets import OctetQueue, OctetTurns

CONFIGS = {"tiny": TINY, "two channels a lane": replace(TINY, lane_channels=2, beat_bytes=16), "gqa": GQA,
           "paper": PAPER}


def random_codes(rng: np.random.Generator, config: Config, stripes: int) -> KeyCodes:
    """Any codes, with finite levels."""
    levels = rng.integers(0, 0x7000, (2, stripes, config.head_dim), np.uint16)
    codes = rng.integers(0, 1 << widths(config), (stripes * config.group_tokens, config.head_dim)).astype(np.uint8)
    return KeyCodes(base=levels[0], step=levels[1], codes=codes)


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_are_unfolded(name: str) -> None:
    config = CONFIGS[name]
    rng, gaps = np.random.default_rng(1), random.Random(2)
    codes = random_codes(rng, config, 2)
    octets = pack(codes, config).reshape(-1, config.group_words, config.beat_bytes)[:3]
    dut = OctetQueue(config)
    left, fields = [], []

    async def give(ctx):
        async def beat(data, begins, octet):
            while gaps.random() < 0.3:
                await ctx.tick()
            ctx.set(dut.beats_i.payload, int.from_bytes(data.tobytes(), "little"))
            ctx.set(dut.beats_i.valid, 1)
            ctx.set(dut.begins, begins)
            ctx.set(dut.octet, octet)
            if ctx.get(dut.beats_o.valid):
                left.append(ctx.get(dut.beats_o.payload))
            await ctx.tick()
            ctx.set(dut.beats_i.valid, 0)
            ctx.set(dut.begins, 0)

        for number, octet in enumerate(octets):
            for i, data in enumerate(octet):
                await beat(data, i == 0, i == 0)
            for _ in range(len(octet)):
                ctx.set(dut.take, 1)
                await ctx.tick()
                ctx.set(dut.take, 0)
                fields.append([ctx.get(field) for field in ctx.get(dut.fields)])
            other = rng.integers(0, 256, config.beat_bytes, np.uint8)
            await beat(other, 1, 0)
            if number == 0:   # a codeword of two beats
                await beat(other, 0, 1)

    simulate(dut, give)
    size = 2 * 16 // config.beat_bytes
    assert len(left) == 3 * size + 4
    levels = np.concatenate([np.frombuffer(x.to_bytes(config.beat_bytes, "little"), "<u2") for x in left[:size]])
    assert (levels == np.concatenate([codes.base[0, :8], codes.step[0, :8]])).all()
    found = np.array(fields).reshape(3, config.group_tokens)
    assert found.max() < 1 << field_bits(config)
    for number in range(3):
        places = np.concatenate([[0], np.cumsum(widths(config)[:8])[:-1]])
        part = found[number][:, None] >> places & (1 << widths(config)[:8]) - 1
        assert (part == codes.codes[: config.group_tokens, 8 * number : 8 * number + 8]).all()


def test_turns() -> None:
    """Two octets are under way at most, their levels apart; fields follow in the order of levels, each word once."""
    build = 18
    dut = OctetTurns(PAPER, build)
    rng = random.Random(3)
    given, issued, levels_at = [], [], []

    async def bench(ctx):
        pending = []   # cycles at which tables are built
        for cycle in range(3000):
            built = bool(pending) and pending[0] <= cycle
            if built:
                pending.pop(0)
            ctx.set(dut.built, built)
            octet = (rng.randrange(16), rng.randrange(16))
            levels = ctx.get(dut.room) and rng.random() < 0.7
            ctx.set(dut.levels_last, levels)
            ctx.set(dut.slot, octet[0])
            ctx.set(dut.group, octet[1])
            if levels:
                assert len(given) - len(issued) // PAPER.group_words < 2
                assert not levels_at or cycle - levels_at[-1] > build
                levels_at.append(cycle)
                given.append(octet)
                pending.append(cycle + 21)
            issue = ctx.get(dut.valid) and rng.random() < 0.8
            ctx.set(dut.issue, issue)
            if issue:
                number, word = divmod(len(issued), PAPER.group_words)
                assert (ctx.get(dut.octet_slot), ctx.get(dut.octet_group)) == given[number]
                assert (ctx.get(dut.word), ctx.get(dut.bank)) == (word, number % 2)
                issued.append(cycle)
            await ctx.tick()

    simulate(dut, bench)
    assert len(given) > 100
