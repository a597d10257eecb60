"""The decoder against the golden code: what leaves, when, and what becomes of codewords that cannot be read."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tests.hdl.compiled import resettable, simulation

from kvattic.spec import ecc
from kvattic.spec.commands import MediaCause
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.ecc import Outcome
from kvattic.spec.nand import PSLC, TINY_PART
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.flash.decoder import Decoder

CONFIGS = {
    "tiny": TINY,
    "paper": replace(PAPER.with_lane_channels(1), part=PSLC.resized(2048)),
    "paper16": replace(PAPER.with_lane_channels(1), part=PSLC.resized(2048), beat_bytes=16),
    "paper32": replace(PAPER.with_lane_channels(1), part=PSLC.resized(2048), beat_bytes=32),
    "t4": replace(TINY, ecc_t=4),
    "t1": replace(TINY, ecc_t=1, beat_bytes=16),
    "padding_words": replace(TINY, head_dim=80, sparse=False, codeword_bytes=512, ecc_t=5),
    "two_words": replace(TINY, part=TINY_PART.resized(1024, spare_bytes=1024), codeword_bytes=64, beat_bytes=32,
                         dram_beat_bytes=32, score_depth=512),
    "one_codeword": replace(TINY, part=TINY_PART.resized(512), codeword_bytes=512, ecc_t=3),
}
ALL = pytest.mark.parametrize("name", CONFIGS)
PATTERNS: dict[str, Callable[[random.Random], Callable[[int], bool]]] = {
    "none": lambda rng: lambda cycle: False,
    "1110": lambda rng: lambda cycle: cycle % 4 == 3,
    "random": lambda rng: lambda cycle: rng.random() < 0.4,
}


@dataclass
class Codeword:
    """One that the bus brings: its raw bytes, and how it is announced."""

    raw: bytes
    page: int
    index: int
    level: int = 0
    cause: int = 0
    outcome: int = 0
    errors: int = 0
    data: bytes = b""


@dataclass
class Seen:
    """What a decoder did; numbers of codewords are those of their announcement."""

    beats: dict[int, list[Any]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)      # cycle of the first beat
    announced: dict[int, int] = field(default_factory=dict)  # cycle in which it was
    ended: dict[int, int] = field(default_factory=dict)      # cycle of the last word
    retries: list[Any] = field(default_factory=list)
    media: list[tuple[int, int, int]] = field(default_factory=list)
    strobes: dict[str, int] = field(default_factory=lambda: {"codeword": 0, "corrected": 0, "bit_errors": 0})
    cycles: int = 0


class Maker:
    """Makes codewords of random data and damages them."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.code, self.size = config, ecc.code(config), config.raw_codeword_bytes
        self.rng, self.choose = np.random.default_rng(seed), random.Random(seed)

    def make(self, errors: int = 0, bits: list[int] | None = None, erased: bool = False, misplaced: bool = False,
             level: int = 0, cause: int = 0) -> Codeword:
        config, size = self.config, self.size
        page = int(self.rng.integers(0, config.pages_per_channel))
        index = int(self.rng.integers(0, config.codewords_per_page))
        data = self.rng.integers(0, 256, (1, config.page_bytes), dtype=np.uint8)
        source = (page + 1) % config.pages_per_channel if misplaced else page
        pages = ecc.encode(config, data, [source])
        if erased:
            pages[:] = 0xFF
        if bits is None:
            bits = self.choose.sample(range(size * 8 if erased else self.code.code_bits), errors)
        for bit in bits:
            pages[0, index * size + bit // 8] ^= 1 << bit % 8
        decoded = ecc.decode(config, pages, [page])
        content = decoded.data[0, index * config.codeword_bytes :][: config.codeword_bytes]
        return Codeword(pages[0, index * size :][:size].tobytes(), page, index, level, cause,
                        int(decoded.outcome[0, index]), int(decoded.errors[0, index]), content.tobytes())

    def mixed(self, count: int) -> list[Codeword]:
        """All that can happen, in random order."""
        t, levels = self.config.ecc_t, self.config.part.retry_levels
        kinds: list[dict[str, Any]] = [
            {}, {}, {"errors": 1}, {"errors": t}, {"errors": self.choose.randint(1, t)}, {"errors": t + 1},
            {"errors": t + 2, "level": levels}, {"erased": True}, {"erased": True, "errors": t},
            {"misplaced": True, "level": levels - 1}, {"misplaced": True, "errors": 1, "level": levels},
            {"cause": int(MediaCause.DIE_TIMEOUT)}, {"bits": [0]}, {"bits": [self.code.code_bits - 1]},
            {"bits": [self.config.codeword_bytes * 8 - 1, self.config.codeword_bytes * 8][:t]},
            {"erased": True, "bits": [8 * i + i % 8 for i in self.choose.sample(range(self.size), t + 1)]},
        ]
        self.choose.shuffle(kinds)
        return [self.make(**kinds[i % len(kinds)]) for i in range(count)]


def words_of(content: bytes, config: Config) -> list[int]:
    step = config.beat_bytes
    return [int.from_bytes(content[i : i + step], "little") for i in range(0, len(content), step)]


def run(config: Config, codewords: list[Codeword], gap=None, stall=None, hold=None, retry_stall=None, ahead: int = 99,
        **parameters: int) -> Seen:
    """Sends codewords and collects what leaves, until all of them have.

    gap, stall, hold, retry_stall: whether no word comes, no beat is taken, nothing is announced, no retry is taken in a
    cycle.  ahead: codewords that are announced before their words at most.
    """
    never = PATTERNS["none"](random.Random())
    gap, stall, hold, retry_stall = (pattern or never for pattern in (gap, stall, hold, retry_stall))
    dut, simulator = simulation(Decoder, config, **parameters)
    seen = Seen()
    cycle = 0
    announced, arrived = 0, 0

    async def clock(ctx):
        nonlocal cycle
        async for *_, in ctx.tick():
            cycle += 1

    async def announce(ctx):
        nonlocal announced
        for number, codeword in enumerate(codewords):
            while hold(cycle) or number > arrived + ahead:
                await ctx.tick()
            payload = dut.header.payload
            ctx.set(payload, {"page": codeword.page, "codeword": codeword.index, "level": codeword.level,
                              "cause": codeword.cause})
            ctx.set(payload.tag.as_value(), number)
            ctx.set(dut.header.valid, 1)
            while True:
                *_, ready = await ctx.tick().sample(dut.header.ready)
                if ready:
                    break
            seen.announced[number] = cycle
            announced += 1
            ctx.set(dut.header.valid, 0)

    async def bus(ctx):
        nonlocal arrived
        for number, codeword in enumerate(codewords):
            while announced <= number:
                await ctx.tick()
            if not codeword.cause:
                for word in words_of(codeword.raw, config):
                    while gap(cycle):
                        await ctx.tick()
                    ctx.set(dut.words, word)
                    ctx.set(dut.words_valid, 1)
                    await ctx.tick()
                    ctx.set(dut.words_valid, 0)
                    ctx.set(dut.words, 0)
                seen.ended[number] = cycle
            arrived += 1

    async def take(ctx):
        current, idle = None, 0
        while True:
            now = not stall(cycle)
            ctx.set(dut.codewords.ready, now)
            *_, valid, beat = await ctx.tick().sample(dut.codewords.valid, dut.codewords.payload)
            if valid and now:
                number = beat.tag.as_bits()
                assert current in (None, number), "beats of two codewords are mixed"
                if current is None:
                    assert number not in seen.beats, f"codeword {number} left twice"
                    seen.order.append(number)
                    seen.first[number] = cycle
                seen.beats.setdefault(number, []).append(beat)
                current = None if beat.last else number
            over = len(seen.order) + len(seen.retries) == len(codewords) and current is None
            idle = idle + 1 if over else 0
            if idle == 30:
                seen.cycles = cycle
                return
            assert cycle < limit, f"left: {seen.order}, {len(seen.retries)} retries, of {len(codewords)}"

    async def take_retries(ctx):
        while True:
            now = not retry_stall(cycle)
            ctx.set(dut.retry.ready, now)
            *_, valid, payload = await ctx.tick().sample(dut.retry.valid, dut.retry.payload)
            if valid and now:
                seen.retries.append(payload)

    async def watch(ctx):
        signals = (dut.codeword, dut.corrected, dut.bit_errors, dut.unreadable, dut.media_error)
        async for *_, codeword, corrected, bit_errors, unreadable, error in ctx.tick().sample(*signals):
            seen.strobes["codeword"] += codeword
            seen.strobes["corrected"] += corrected
            seen.strobes["bit_errors"] += bit_errors
            assert corrected or not bit_errors
            if unreadable:
                seen.media.append((error.page, error.codeword, error.cause))

    limit = 2000 + len(codewords) * (10 * config.raw_codeword_bytes + 200)
    simulator.add_clock(1e-6)
    for testbench in (announce, bus, take):
        simulator.add_testbench(testbench)
    for testbench in (clock, take_retries, watch):
        simulator.add_testbench(testbench, background=True)
    simulator.run()
    return seen


def check(config: Config, codewords: list[Codeword], seen: Seen) -> None:
    """Everything that left is what it should be."""
    beats = config.beats_per_codeword
    retries, media, strobes = [], [], {"codeword": 0, "corrected": 0, "bit_errors": 0}
    for number, codeword in enumerate(codewords):
        cause, want = codeword.cause, words_of(codeword.data, config)[:beats]
        if not cause:
            strobes["codeword"] += 1
            if codeword.outcome == Outcome.CORRECTED:
                strobes["corrected"] += 1
                strobes["bit_errors"] += codeword.errors
            if codeword.outcome == Outcome.UNCORRECTABLE and codeword.level < config.part.retry_levels:
                retries.append((number, codeword.page, codeword.index, codeword.level + 1))
                assert number not in seen.beats
                continue
            cause = {Outcome.ERASED: MediaCause.ERASED, Outcome.UNCORRECTABLE: MediaCause.UNCORRECTABLE}.get(
                Outcome(codeword.outcome), 0)
        if cause:
            media.append((codeword.page, codeword.index, int(cause)))
            want = [0] * beats
        got = seen.beats[number]
        assert [beat.data for beat in got] == want, f"data of {number}, {codeword.outcome}, {codeword.errors} errors"
        assert [beat.last for beat in got] == [0] * (beats - 1) + [1]
        assert {beat.error for beat in got} == {int(bool(cause))}
    got = [(r.tag.as_bits(), r.page, r.codeword, r.level) for r in seen.retries]
    assert sorted(got) == retries
    assert sorted(seen.media) == sorted(media)
    assert seen.strobes == strobes


@ALL
def test_everything_that_can_happen(name):
    config = CONFIGS[name]
    maker = Maker(config, 1)
    codewords = maker.mixed(17)
    assert {c.outcome for c in codewords} == set(Outcome)
    check(config, codewords, run(config, codewords))


@pytest.mark.parametrize("gap", PATTERNS)
@pytest.mark.parametrize("stall", PATTERNS)
def test_stalls_change_nothing(gap, stall):
    rng = random.Random(f"{gap} {stall}")
    patterns = [PATTERNS[key](rng) for key in (gap, stall)]
    codewords = Maker(TINY, 2).mixed(17)
    check(TINY, codewords, run(TINY, codewords, *patterns, hold=PATTERNS[gap](rng), retry_stall=PATTERNS[stall](rng),
                               ahead=rng.choice([0, 1, 99])))


@pytest.mark.parametrize("buffers, positions", [(2, 8), (3, 4), (8, 1), (16, 2), (8, 16)])
def test_parameters(buffers, positions):
    codewords = Maker(CONFIGS["t4"], 3).mixed(17)
    check(CONFIGS["t4"], codewords, run(CONFIGS["t4"], codewords, buffers=buffers, positions=positions))


@pytest.mark.parametrize("name", ["tiny", "paper", "paper16", "paper32", "padding_words"])
def test_clean_codewords_pass_at_line_rate(name):
    config = CONFIGS[name]
    maker = Maker(config, 4)
    codewords = [maker.make() for _ in range(6)]
    seen = run(config, codewords)
    check(config, codewords, seen)
    assert seen.order == list(range(6))
    ends = [seen.ended[i] for i in range(6)]
    assert [b - a for a, b in pairwise(ends)] == [config.raw_codeword_words] * 5, "the bus was not full"
    assert {seen.first[i] - ends[i] for i in range(6)} == {5}


def test_clean_codewords_overtake_one_in_correction():
    config = CONFIGS["paper"]
    maker = Maker(config, 5)
    last_bit = config.codeword_bytes * 8 - 1
    codewords = [maker.make(), maker.make(bits=[0, last_bit]), *(maker.make() for _ in range(6))]   # a long search
    seen = run(config, codewords)
    check(config, codewords, seen)
    assert [n for n in seen.order if n != 1] == [0, 2, 3, 4, 5, 6, 7]
    assert seen.order.index(1) >= 6
    assert all(seen.first[n] - seen.ended[n] <= 5 + config.beats_per_codeword + 4 for n in seen.order if n != 1), \
        "a correction held others up"


def test_full_buffers_hold_headers_back_and_lose_nothing():
    config = CONFIGS["t4"]
    maker = Maker(config, 6)
    codewords = [maker.make(errors=i % 5) for i in range(12)]
    seen = run(config, codewords, stall=lambda cycle: cycle < 1500, buffers=4)
    check(config, codewords, seen)
    assert [n for n in seen.announced if seen.announced[n] < 1500] == [0, 1, 2, 3]


def test_an_output_that_stands_still_does_not_stop_corrections():
    # The corrector shares the memory's read port with the beats that leave.
    config = CONFIGS["t4"]
    maker = Maker(config, 7)
    codewords = [maker.make(), *(maker.make(errors=i) for i in (4, 3, 5, 2))]
    stop = 3000
    seen = run(config, codewords, stall=lambda cycle: cycle < stop)
    check(config, codewords, seen)
    after = [n for n in seen.order if seen.first[n] < stop + 5 * config.beats_per_codeword + 20]
    assert len(after) == 4, "corrections waited for the output"


def test_a_retry_that_is_not_taken_holds_only_the_corrector():
    config = CONFIGS["t4"]
    maker = Maker(config, 8)
    codewords = [maker.make(errors=5), maker.make(errors=5), maker.make(errors=1), *(maker.make() for _ in range(8))]
    assert [c.outcome for c in codewords[:3]] == [Outcome.UNCORRECTABLE] * 2 + [Outcome.CORRECTED]
    seen = run(config, codewords, retry_stall=lambda cycle: cycle < 1500)
    check(config, codewords, seen)
    assert all(seen.first[n] < 1000 for n in range(3, 11))
    assert seen.first[2] > 1500


def test_retries_beside_codewords_that_are_given_up_keep_their_place():
    # Both read the buffers' places; announcements with a cause come as fast as their few beats leave.
    config = CONFIGS["two_words"]
    maker = Maker(config, 12)
    timeout = int(MediaCause.DIE_TIMEOUT)
    codewords = [maker.make(errors=9) if i % 80 == 0 else maker.make(cause=timeout) for i in range(480)]
    seen = run(config, codewords, hold=PATTERNS["random"](random.Random(12)))
    check(config, codewords, seen)
    assert len(seen.retries) == 6


@pytest.mark.usefixtures("each_simulator")
def test_each_level_is_tried_once():
    config = CONFIGS["t4"]
    maker = Maker(config, 9)
    levels = config.part.retry_levels
    codewords = [maker.make(errors=5, level=level) for level in range(levels + 1)]
    seen = run(config, codewords)
    check(config, codewords, seen)
    assert [r.level for r in seen.retries] == list(range(1, levels + 1))
    assert seen.order == [levels]


def test_padding_bits_do_not_matter():
    for name in ("padding_words", "t1", "one_codeword"):
        config = CONFIGS[name]
        maker = Maker(config, 10)
        bits = range(maker.code.code_bits, config.raw_codeword_bytes * 8)
        assert len(bits) > 0
        codewords = [maker.make(bits=list(bits)), maker.make()]
        seen = run(config, codewords)
        check(config, codewords, seen)
        assert seen.order == [0, 1]
        assert seen.strobes["corrected"] == 0


def test_reset_forgets_everything():
    config = CONFIGS["t4"]
    maker = Maker(config, 11)
    clean, bad = maker.make(), maker.make(errors=4)
    dut, simulator = simulation(resettable, Decoder, config, buffers=4)
    reset = dut.test_reset

    async def send(ctx, codeword, words):
        ctx.set(dut.header.payload, {"page": codeword.page, "codeword": codeword.index})
        ctx.set(dut.header.valid, 1)
        await ctx.tick().until(dut.header.ready)
        ctx.set(dut.header.valid, 0)
        ctx.set(dut.words_valid, 1)
        for word in words_of(codeword.raw, config)[:words]:
            ctx.set(dut.words, word)
            await ctx.tick()
        ctx.set(dut.words_valid, 0)

    async def bench(ctx):
        for cut in (3, config.raw_codeword_words):
            for wait in (0, 3, 6, 30, 60, 90):
                await send(ctx, bad, config.raw_codeword_words)
                await send(ctx, clean, cut)
                for _ in range(wait):
                    await ctx.tick()
                ctx.set(reset, 1)
                await ctx.tick()
                ctx.set(reset, 0)
                ctx.set(dut.codewords.ready, 1)
                await send(ctx, clean, config.raw_codeword_words)
                got = []
                for _ in range(400):
                    *_, valid, beat = await ctx.tick().sample(dut.codewords.valid, dut.codewords.payload)
                    if valid:
                        got.append(beat.data)
                assert got == words_of(clean.data, config)
                ctx.set(dut.codewords.ready, 0)

    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="buffers must be at least 2, not 1"):
        Decoder(TINY, buffers=1)
    with pytest.raises(ValueError, match=r"positions must be one of \(1, 2, 4, 8, 16\), not 3"):
        Corrector(TINY, positions=3)
