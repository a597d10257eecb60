"""The corrector by itself: which bits it finds, what it gives up, and how long it takes."""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tests.hdl.compiled import simulation

from kvattic.spec import ecc
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.nand import PSLC
from kvattic_hdl.flash.corrections import CorrectorShapes
from kvattic_hdl.flash.corrector import Corrector

CONFIGS = {
    "tiny": TINY,
    "t1": replace(TINY, ecc_t=1),
    "t2": replace(TINY, ecc_t=2),
    "odd_parity": replace(TINY, head_dim=80, sparse=False, codeword_bytes=512, ecc_t=5),
    "paper": replace(PAPER.with_lane_channels(1), part=PSLC.resized(1024)),
}


@dataclass
class Answer:
    good: int
    errors: int
    bits: list[int]
    cycles: int


def problem(config: Config, bits: list[int], check: int = 0) -> dict[str, int]:
    """What a decoder sees of these wrong bits; `check` is added to the CRC's difference."""
    code, size = ecc.code(config), config.codeword_bytes
    wrong = np.zeros(config.raw_codeword_bytes * 8, np.uint8)
    wrong[bits] = 1
    raw = np.packbits(wrong, bitorder="little")
    remainder = code.parity.remainders(raw[:, None], np.zeros((code.parity.words, 1), np.uint64))
    state = code.crc.remainders(raw[:size, None], np.zeros((1, 1), np.uint64))
    received = int.from_bytes(raw[size : size + 3].tobytes(), "little")
    return {"remainder": sum(int(word) << 64 * i for i, word in enumerate(remainder[:, 0])),
            "check": int(state[0, 0]) ^ received ^ check}


def chunks_of(config: Config, values: dict[str, int]) -> list[int]:
    """What a channel sends of a problem."""
    remainder = range(CorrectorShapes(config).remainder_chunks)
    return [*(values["remainder"] >> 8 * i & 255 for i in reversed(remainder)),
            *(values["check"] >> 8 * i & 255 for i in range(3))]


async def send(ctx, channel, chunks: list[int]) -> None:
    """Ask for a correction, and send the problem when it is taken."""
    ctx.set(channel.wanted, 1)
    await ctx.tick().until(channel.taken)
    ctx.set(channel.wanted, 0)
    await ctx.tick()
    for chunk in chunks:
        ctx.set(channel.chunk, chunk)
        ctx.set(channel.chunk_valid, 1)
        await ctx.tick()
    ctx.set(channel.chunk_valid, 0)


async def receive(ctx, channel, bits: int, limit: int, ready: Any) -> Answer:
    """Take the patches of a codeword, and its end."""
    found, cycle = [], 0
    while True:
        now = ready(cycle)
        ctx.set(channel.patches.ready, now)
        *_, patch, payload, valid, result = await ctx.tick().sample(
            channel.patches.valid, channel.patches.payload, channel.ended, channel.result)
        cycle += 1
        if patch and now:
            found += [payload.index * bits + i for i in range(bits) if payload.mask >> i & 1]
        if valid:
            assert not patch, "a result before its last patch was taken"
            return Answer(result.good, result.errors, found, cycle)
        assert cycle < limit


def solve(config: Config, problems: list[dict[str, int]], ready: Any = lambda cycle: True, positions: int = 16,
          ) -> list[Answer]:
    dut, simulator = simulation(Corrector, config, 1, positions)
    answers = []
    bits = config.word_bytes * 8
    channel = dut.channels[0]

    async def sender(ctx):
        for number, values in enumerate(problems):
            await send(ctx, channel, chunks_of(config, values))
            while len(answers) <= number:
                await ctx.tick()

    async def bench(ctx):
        for _ in problems:
            answers.append(await receive(ctx, channel, bits, 10 * bits * config.raw_codeword_words, ready))

    simulator.add_clock(1e-6)
    simulator.add_testbench(sender)
    simulator.add_testbench(bench)
    simulator.run()
    return answers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("positions", [16, 8, 4])
def test_wrong_bits_are_found(name, positions):
    config, choose = CONFIGS[name], random.Random(f"{name} {positions}")
    t, n = config.ecc_t, ecc.code(config).code_bits
    cases = [sorted(choose.sample(range(n), weight)) for weight in (1, t, choose.randint(1, t), t, t + 1)]
    cases += [[0], [n - 1], list(range(t)), list(range(n - t, n)), [config.codeword_bytes * 8]]
    answers = solve(config, [problem(config, bits) for bits in cases], positions=positions)
    token_bits = config.beats_per_codeword * config.beat_bytes * 8
    for bits, answer in zip(cases, answers, strict=True):
        assert answer.good == (len(bits) <= t)
        if answer.good:
            assert answer.errors == len(bits)
            assert answer.bits == [bit for bit in bits if bit < token_bits]


def test_wrong_bits_whose_first_syndrome_is_zero():
    # The locator grows by three at once, over what the codeword before left in the memories.
    config, choose = TINY, random.Random(4)
    code, field = ecc.code(config), ecc.code(config).field
    n, bits = code.code_bits, config.raw_codeword_bytes * 8
    cases: list[list[int]] = []
    while len(cases) < 8:
        a, b = choose.sample(range(n), 2)
        value = int(field.powers[(bits - 1 - a) % field.order] ^ field.powers[(bits - 1 - b) % field.order])
        c = (bits - 1 - int(field.logarithms[value])) % field.order   # so that their locators add up to 0
        if c < n:
            cases += [choose.sample(range(n), config.ecc_t), sorted([a, b, c])]
    answers = solve(config, [problem(config, case) for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert (answer.good, answer.errors) == (1, len(case))


@pytest.mark.usefixtures("each_simulator")
def test_the_check_value_decides():
    cases = [([], 1), ([5], 0), ([5], 1 << 23), ([5, 2060], 0), ([5, 2060], 4)]
    answers = solve(TINY, [problem(TINY, bits, check) for bits, check in cases])
    assert [answer.good for answer in answers] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["tiny", "t2"])
def test_patches_may_be_held_back(name):
    config, choose = CONFIGS[name], random.Random(3)
    t, n = config.ecc_t, config.codeword_bytes * 8
    cases = [sorted(choose.sample(range(n), weight)) for weight in (t, t, t + 1, t + 1, t + 1, t + 1, t + 1)]
    problems = [problem(config, bits) for bits in cases]
    at_once = solve(config, problems)
    late = solve(config, problems, ready=lambda cycle: cycle % 600 == 599)
    assert [(a.good, a.errors, a.bits) for a in late] == [(a.good, a.errors, a.bits) for a in at_once]
    assert any(a.bits and not a.good for a in at_once), "no patch before a codeword is given up"


def test_a_wrong_bit_in_the_padding_is_no_answer():
    # Not a single bit of the code is wrong in the sense of the search: the locator points behind it.
    config = CONFIGS["odd_parity"]
    n = ecc.code(config).code_bits
    assert n % 8
    padding = [[bit] for bit in range(n, config.raw_codeword_bytes * 8)]
    answers = solve(config, [problem(config, bits) for bits in [[n - 1], *padding[:8]]])
    assert [answer.good for answer in answers] == [1] + [0] * 8


def test_cycles_are_those_of_the_documentation():
    config = CONFIGS["paper"]
    last = ecc.code(config).code_bits - 1
    cases = [list(range(weight)) for weight in range(1, 9)] + [[0, last], [0], [63], [last]]
    answers = solve(config, [problem(config, bits) for bits in cases])
    for e, answer in enumerate(answers[1:8], 2):
        assert answer.cycles == 90 + (21 * e + e * e) // 2   # the search of the first word, 10 cycles, included
    assert answers[8].cycles == 372
    assert all(46 <= answer.cycles <= 50 for answer in answers[9:])


@pytest.mark.parametrize("name", ["tiny", "odd_parity", "t1"])
def test_a_single_wrong_bit_anywhere(name):
    # Its place comes from a table, and what the check value must be from squaring: at all borders, and here and there.
    config, choose = CONFIGS[name], random.Random(5)
    code, data = ecc.code(config), config.codeword_bytes * 8
    token_bits = config.beats_per_codeword * config.beat_bytes * 8
    borders = {0, 1, 63, 64, data - 1, data, data + 23, data + 24, code.code_bits - 1, token_bits - 1}
    places = sorted(borders | set(choose.sample(range(code.code_bits), 30)))
    cases = [(place, wrong) for place in places for wrong in (0, 1 << choose.randrange(24))]
    answers = solve(config, [problem(config, [place], wrong) for place, wrong in cases])
    for (place, wrong), answer in zip(cases, answers, strict=True):
        assert answer.good == (wrong == 0), f"bit {place}, check value off by {wrong}"
        assert (answer.errors, answer.bits) == (1, [place] if place < token_bits else [])
