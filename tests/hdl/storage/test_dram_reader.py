"""DramReader and CodewordMerge: tails reach the lane that asked, pages the channel that programs them, bit for bit."""

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from tests.hdl.bench import simulate

from kvattic.spec.commands import Kind
from kvattic.spec.config import TINY, Config
from kvattic.spec.nand import TINY_PART
from kvattic_hdl.storage.dram_reader import OUTSTANDING, DramReader
from kvattic_hdl.storage.merge import CodewordMerge

CONFIGS = {
    "tiny": TINY,
    "one_beat_wide": Config(
        channels=1, head_dim=32, part=TINY_PART, dies=2, dram_beat_bytes=8, codeword_bytes=256, score_depth=256),
    "narrow": Config(
        channels=5, head_dim=32, sparse=False, part=TINY_PART, dies=2, dram_beat_bytes=16, codeword_bytes=256,
        score_depth=256),
    "padded": Config(
        channels=3, head_dim=80, sparse=False, part=TINY_PART.resized(2048), dies=2, dram_beat_bytes=64,
        codeword_bytes=512, score_depth=256),
    "lanes_of_two_channels": replace(TINY, channels=4, lane_channels=2, beat_bytes=16, dram_beat_bytes=16),
}
DRAM_PAGES = 6


def contents(config):
    return np.random.default_rng(7).integers(0, 256, DRAM_PAGES * config.page_bytes, np.uint8).tobytes()


def memory(axi, config, *, stall=0.0, bad=(), log):
    """Device DRAM: answers in order, checks each burst."""
    rng, data = random.Random(3), contents(config)
    burst = config.codeword_bytes // config.dram_beat_bytes

    async def bench(ctx):
        queue, shown = deque(), False
        while True:
            ctx.set(axi.arready, rng.random() >= stall)
            if not shown and queue and rng.random() >= stall:
                shown = True
                at, last = queue[0]
                ctx.set(axi.rdata, int.from_bytes(data[at : at + config.dram_beat_bytes], "little"))
                ctx.set(axi.rresp, 2 if at // config.codeword_bytes in bad else 0)
                ctx.set(axi.rlast, last)
            ctx.set(axi.rvalid, shown)
            _, _, arvalid, arready, address, length, rvalid, rready = await ctx.tick().sample(
                axi.arvalid, axi.arready, axi.araddr, axi.arlen, axi.rvalid, axi.rready)
            if arvalid and arready:
                assert length + 1 == burst
                assert address % config.codeword_bytes == 0
                assert 1 << ctx.get(axi.arsize) == config.dram_beat_bytes
                queue.extend((address + i * config.dram_beat_bytes, i == burst - 1) for i in range(burst))
                log["most"] = max(log.get("most", 0), sum(last for _, last in queue))
            if rvalid and rready:
                queue.popleft()
                shown = False

    return bench


def offer(s, payloads):
    async def bench(ctx):
        for payload in payloads:
            ctx.set(s.payload, payload)
            ctx.set(s.valid, 1)
            await ctx.tick().until(s.ready)
            ctx.set(s.valid, 0)

    return bench


def collect(s, seen, count, stall, seed=0):
    async def bench(ctx):
        rng = random.Random(seed)
        while len(seen) < count:
            ready = rng.random() >= stall
            ctx.set(s.ready, ready)
            _, _, valid, payload = await ctx.tick().sample(s.valid, s.payload)
            if valid and ready:
                seen.append(payload)
        ctx.set(s.ready, 0)

    return bench


def asked(config, place, page, codeword, kind=Kind.KEY, slot=0, epoch=0):
    return {"tag": {"place": place, "kind": kind, "slot": slot, "epoch": epoch}, "page": page, "codeword": codeword,
            "dram": 1}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_tails_and_pages(name, stall):
    config = CONFIGS[name]
    dut, data, rng = DramReader(config), contents(CONFIGS[name]), random.Random(1)
    log, benches, tails, pages = {}, [], [], []
    fetches = [[(rng.randrange(DRAM_PAGES), rng.getrandbits(20)) for _ in range(3)] for _ in range(config.channels)]
    wanted = [[(i, rng.randrange(DRAM_PAGES), rng.randrange(config.codewords_per_page)) for i in range(12)]
              for _ in range(config.lanes)]
    words = config.page_bytes // config.word_bytes
    in_turns = [{"channel": c, "page": {"dram_page": d, "page": p}}
                for of_all in zip(*fetches, strict=True) for c, (d, p) in enumerate(of_all)]
    benches.append(offer(dut.fetches, in_turns))
    for lane in range(config.lanes):
        tails.append([])
        benches += [
            offer(dut.tails[lane], [asked(config, *w) for w in wanted[lane]]),
            collect(dut.codewords[lane], tails[lane], 12 * config.words_per_codeword, stall, lane),
        ]
    for c in range(config.channels):
        pages.append([])
        benches.append(collect(dut.page_words[c], pages[c], 3 * words, stall, c + 10))
    simulate(dut, *benches, background=[memory(dut.axi, config, stall=stall, log=log)])
    for lane in range(config.lanes):
        for i, (place, page, codeword) in enumerate(wanted[lane]):
            codeword_words = tails[lane][i * config.words_per_codeword : (i + 1) * config.words_per_codeword]
            at = page * config.page_bytes + codeword * config.codeword_bytes
            size = config.words_per_codeword * config.word_bytes
            found = b"".join(w.data.to_bytes(config.word_bytes, "little") for w in codeword_words)
            assert found == data[at : at + size]
            assert {w.tag.place for w in codeword_words} == {place}
            assert [w.last for w in codeword_words] == [0] * (len(codeword_words) - 1) + [1]
            assert not any(w.error for w in codeword_words)
    for c in range(config.channels):
        for i, (dram_page, page) in enumerate(fetches[c]):
            found = pages[c][i * words : (i + 1) * words]
            image = data[dram_page * config.page_bytes : (dram_page + 1) * config.page_bytes]
            assert b"".join(w.data.to_bytes(config.word_bytes, "little") for w in found) == image
            assert {w.page for w in found} == {page}
    assert 1 < log["most"] <= OUTSTANDING


def test_values_wait_until_they_are_welcome():
    """V of a closed slot waits and holds nobody else's up; another epoch's V is let go."""
    dut, log, early, late = DramReader(TINY), {}, [], []
    beats = TINY.beats_per_codeword

    async def scenario(ctx):
        ctx.set(dut.epoch[1], 5)
        for channel, request in ((0, asked(TINY, 1, 0, 0, Kind.VALUE, slot=1, epoch=5)),
                                 (1, asked(TINY, 2, 0, 1, Kind.VALUE, slot=1, epoch=4)),
                                 (1, asked(TINY, 3, 0, 2, Kind.KEY, slot=1, epoch=5))):
            s = dut.tails[channel]
            ctx.set(s.payload, request)
            ctx.set(s.valid, 1)
            await ctx.tick().until(s.ready)
            ctx.set(s.valid, 0)
        for c in range(2):
            ctx.set(dut.codewords[c].ready, 1)
        for cycle in range(800):
            if cycle == 400:
                ctx.set(dut.value_open, 0b10)
            for c in range(2):
                if ctx.get(dut.codewords[c].valid):
                    (early if cycle < 400 else late).append(ctx.get(dut.codewords[c].payload.tag.place))
            await ctx.tick()

    simulate(dut, scenario, background=[memory(dut.axi, TINY, log=log)])
    assert early == [2] * beats + [3] * beats
    assert late == [1] * beats


def test_memory_errors_are_told():
    """An error answer marks the tail's codeword, and strobes for the channel that programs."""
    dut, log, tails, failed = DramReader(TINY), {}, [], []
    per_page = TINY.codewords_per_page

    async def watch(ctx):
        while True:
            _, _, value = await ctx.tick().sample(dut.failed)
            if value:
                failed.append(value)

    words = []
    simulate(
        dut,
        offer(dut.tails[0], [asked(TINY, i, 0, i) for i in range(3)]),
        collect(dut.codewords[0], tails, 3 * TINY.beats_per_codeword, 0),
        offer(dut.fetches, [{"channel": 1, "page": {"dram_page": 1, "page": 9}}]),
        collect(dut.page_words[1], words, TINY.page_bytes // TINY.beat_bytes, 0),
        background=[watch, memory(dut.axi, TINY, bad=(1, per_page + 2), log=log)])
    errors = [beat.error for beat in tails]
    assert errors == [0] * TINY.beats_per_codeword + [1] * TINY.beats_per_codeword + [0] * TINY.beats_per_codeword
    assert set(failed) == {0b10}


def test_codewords_are_merged_whole():
    """Codewords of either side stay whole, under stalls on all sides; an idle side holds nobody up."""
    dut, seen = CodewordMerge(replace(TINY)), []
    beats, count = 3, 20

    def source(s, kind, seed):
        async def bench(ctx):
            rng = random.Random(seed)
            for place in range(count):
                for i in range(beats):
                    while rng.random() < 0.3:
                        await ctx.tick()
                    ctx.set(s.payload, {"tag": {"place": place, "kind": kind}, "data": i, "last": i == beats - 1})
                    ctx.set(s.valid, 1)
                    await ctx.tick().until(s.ready)
                    ctx.set(s.valid, 0)

        return bench

    simulate(dut, source(dut.first, 0, 1), source(dut.second, 1, 2), collect(dut.o, seen, 2 * count * beats, 0.3))
    order = []
    for i in range(0, len(seen), beats):
        codeword = seen[i : i + beats]
        assert len({(b.tag.kind, b.tag.place) for b in codeword}) == 1
        assert [b.data for b in codeword] == list(range(beats))
        order.append((codeword[0].tag.kind, codeword[0].tag.place))
    assert sorted(order) == [(k, p) for k in (0, 1) for p in range(count)]
    assert [p for k, p in order if k == 0] == list(range(count))
