"""A lane against the golden model: every intermediate that leaves it, for shuffled codewords and several jobs."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from amaranth.sim import Simulator

from kvattic import golden
from kvattic.commands import Kind
from kvattic.config import Config
from kvattic.elements import to_bits
from kvattic.formats import SCORE_WINDOW_FRACTION
from kvattic_hdl.lane import Lane

CONFIGS = {
    "rows1": Config(channels=1, rows=1, head_dim=32, page_bytes=1024, codeword_bytes=256, score_depth=64),
    "rows2": Config(channels=1, rows=2, head_dim=64, page_bytes=1024, codeword_bytes=256, score_depth=64),
    "three_tokens": Config(channels=1, rows=3, head_dim=80, page_bytes=1024, codeword_bytes=512, score_depth=64),
    "wide": Config(channels=1, rows=2, head_dim=32, beat_bytes=32, page_bytes=512, codeword_bytes=64, score_depth=64),
    "bf16": Config(channels=1, rows=2, head_dim=32, element="bf16", beat_bytes=16, page_bytes=512,
                   codeword_bytes=128, score_depth=64),
}


@dataclass
class Job:
    """One job and what golden says about it."""

    element: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale_bits: int
    start: np.ndarray
    end: np.ndarray
    tree: np.ndarray
    tree_token: int
    base_token: int
    end_token: int

    @property
    def trace(self):
        return golden.attend(
            self.query, self.key, self.value, element=self.element, scale_bits=self.scale_bits, start=self.start,
            end=self.end, tree=self.tree, tree_token=self.tree_token, base_token=self.base_token,
            end_token=self.end_token)


def make_job(config: Config, rng: np.random.Generator, tokens: int) -> Job:
    shape = (tokens, config.head_dim)
    key, value = (to_bits(rng.standard_normal(shape).astype(np.float32), config.element) for _ in range(2))
    query = to_bits((3 * rng.standard_normal((config.rows, config.head_dim))).astype(np.float32), config.element)
    scale = np.float32(np.log2(np.e) / np.sqrt(config.head_dim))
    base = int(rng.integers(0, 3)) * config.tokens_per_page
    start = rng.integers(base, base + tokens, config.rows)
    end = rng.integers(start, base + tokens + 1)
    tree_token = base + max(0, tokens - int(rng.integers(0, 8)))
    return Job(element=config.element, query=query, key=key, value=value,
              scale_bits=int(scale.view(np.uint32)), start=start, end=end,
              tree=rng.integers(0, 1 << 32, config.rows, dtype=np.uint32), tree_token=tree_token, base_token=base,
              end_token=base + tokens)


def codeword_beats(config: Config, bits: np.ndarray, place: int) -> list[int]:
    tokens = config.tokens_per_codeword
    block = np.zeros((tokens, config.head_dim), np.uint16)
    part = bits[place * tokens : (place + 1) * tokens]
    block[: len(part)] = part
    raw = block.astype("<u2").tobytes()
    step = config.beat_bytes
    return [int.from_bytes(raw[i : i + step], "little") for i in range(0, len(raw), step)]


def run_lane(config: Config, jobs: list[Job], seed: int, gap: float, shuffle: bool) -> None:
    dut = Lane(config)
    element = config.element.encoding
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    rnd = random.Random(seed)
    slots = config.jobs_in_flight
    wanted: list[dict] = []
    sent: set = set()

    async def flash_requests(ctx):
        ctx.set(dut.requests.ready, 1)
        while True:
            _, _, valid, payload = await ctx.tick().sample(dut.requests.valid, dut.requests.payload)
            if valid:
                tag = payload.tag
                wanted.append({"slot": tag.slot, "epoch": tag.epoch, "kind": tag.kind, "place": tag.place,
                               "page": payload.page, "codeword": payload.codeword})

    async def flash_codewords(ctx):
        while True:
            opened = ctx.get(dut.value_open)
            choices = [w for w in wanted if w["kind"] == Kind.KEY or opened >> w["slot"] & 1]
            if not choices or rnd.random() < gap:
                await ctx.tick()
                continue
            want = rnd.choice(choices) if shuffle else choices[0]
            wanted.remove(want)
            job = jobs[want["page"] >> 16]
            page = want["page"] & 0x7FFF
            assert page * config.codewords_per_page + want["codeword"] == want["place"]
            identity = (want["page"], want["codeword"])
            assert identity not in sent
            sent.add(identity)
            assert bool(want["page"] & 0x8000) == (want["kind"] == Kind.VALUE)
            beats = codeword_beats(config, job.value if want["kind"] else job.key, want["place"])
            for i, beat in enumerate(beats):
                while rnd.random() < gap:
                    await ctx.tick()
                ctx.set(dut.codewords.payload.tag.slot, want["slot"])
                ctx.set(dut.codewords.payload.tag.epoch, want["epoch"])
                ctx.set(dut.codewords.payload.tag.kind, want["kind"])
                ctx.set(dut.codewords.payload.tag.place, want["place"])
                ctx.set(dut.codewords.payload.data, beat)
                ctx.set(dut.codewords.payload.last, i == len(beats) - 1)
                ctx.set(dut.codewords.valid, 1)
                await ctx.tick().until(dut.codewords.ready)
                ctx.set(dut.codewords.valid, 0)

    async def start(ctx, n):
        job, slot = jobs[n], n % slots
        step = config.beat_bytes
        for row in range(config.rows):
            ctx.set(dut.load, {"record": 1, "slot": slot, "row": row, "start": int(job.start[row]),
                               "end": int(job.end[row]), "tree": int(job.tree[row])})
            ctx.set(dut.load_valid, 1)
            await ctx.tick()
            raw = job.query[row].astype("<u2").tobytes()
            for beat in range(config.beats_per_token):
                data = int.from_bytes(raw[beat * step : (beat + 1) * step], "little")
                ctx.set(dut.load, {"query": 1, "slot": slot, "row": row, "beat": beat, "data": data})
                await ctx.tick()
        ctx.set(dut.load_valid, 0)
        exponent, fraction = job.scale_bits >> 23, job.scale_bits & 0x7FFFFF
        ctx.set(dut.start, {
            "slot": slot, "epoch": n // slots % 16, "home": 0, "key_page": n << 16, "value_page": n << 16 | 0x8000,
            "base_token": job.base_token, "end_token": job.end_token, "tree_token": job.tree_token,
            "k_offset": exponent - 127 + SCORE_WINDOW_FRACTION - 2 * element.offset, "scale": 1 << 23 | fraction})
        ctx.set(dut.start_valid, 1)
        await ctx.tick()
        ctx.set(dut.start_valid, 0)
        ctx.set(dut.live, ctx.get(dut.live) | 1 << slot)

    async def wait(ctx, signal, slot):
        for _ in range(20000):
            if ctx.get(signal) >> slot & 1:
                return
            await ctx.tick()
        raise AssertionError(f"{signal.name} of slot {slot} never came")

    started, freed = 0, 0

    async def loader(ctx):
        nonlocal started
        while not ctx.get(dut.ready):
            await ctx.tick()
        for n in range(len(jobs)):
            while n - freed >= slots:
                await ctx.tick()
            await start(ctx, n)
            started += 1

    async def maximum(ctx):
        for n, job in enumerate(jobs):
            slot = n % slots
            while started <= n:
                await ctx.tick()
            await ctx.tick()
            await wait(ctx, dut.keys_done, slot)
            trace = job.trace
            ctx.set(dut.maximum_slot, slot)
            for row in range(config.rows):
                ctx.set(dut.maximum_row, row)
                await ctx.tick().repeat(2)
                value = ctx.get(dut.maximum)
                assert value == int(trace.maximum[row]), f"maximum of job {n} row {row}"
                ctx.set(dut.maximum_new, value)
                ctx.set(dut.maximum_write, 1)
                await ctx.tick()
                ctx.set(dut.maximum_write, 0)
            ctx.set(dut.value_open, ctx.get(dut.value_open) | 1 << slot)

    async def finisher(ctx):
        nonlocal freed
        for n, job in enumerate(jobs):
            slot = n % slots
            while not ctx.get(dut.value_open) >> slot & 1:
                await ctx.tick()
            await wait(ctx, dut.values_done, slot)
            trace = job.trace
            ctx.set(dut.denominator_slot, slot)
            for row in range(config.rows):
                ctx.set(dut.denominator_row, row)
                await ctx.tick().repeat(2)
                assert ctx.get(dut.denominator) == int(trace.denominator[row]), f"denominator of job {n} row {row}"
            sums = np.zeros((config.rows, config.head_dim), object)
            for word in range(dut.shapes.drain_words):
                ctx.set(dut.chain_i.payload.slot, slot)
                ctx.set(dut.chain_i.payload.address, word)
                ctx.set(dut.chain_i.valid, 1)
                await ctx.tick().until(dut.chain_i.ready)
                ctx.set(dut.chain_i.valid, 0)
                ctx.set(dut.chain_o.ready, 1)
                (payload,) = await ctx.tick().sample(dut.chain_o.payload).until(dut.chain_o.valid)
                ctx.set(dut.chain_o.ready, 0)
                beat = word % config.beats_per_token
                for row in range(config.rows):
                    for e in range(config.elements_per_beat):
                        sums[row, beat * config.elements_per_beat + e] += payload.data[row][e]
            expected = trace.accumulator
            assert (sums == expected).all(), f"sums of job {n}"
            ctx.set(dut.report_slot, slot)
            await ctx.tick().repeat(2)
            report = ctx.get(dut.report)
            assert (report.nan_key, report.nan_value) == (trace.nan_key is not None, trace.nan_value is not None)
            if trace.nan_key is not None:
                assert report.nan_key_token == trace.nan_key
            if trace.nan_value is not None:
                assert report.nan_value_token == trace.nan_value
            assert report.score_overflow | report.value_overflow << 1 == int(trace.flags)
            assert not report.duplicate
            ctx.set(dut.value_open, ctx.get(dut.value_open) & ~(1 << slot))
            ctx.set(dut.live, ctx.get(dut.live) & ~(1 << slot))
            freed += 1

    async def events(ctx):
        async for _, _, e in ctx.tick().sample(dut.events):
            assert e.beat + e.starved + e.barrier + e.weights + e.scores + e.idle == 1
            assert not (e.duplicate or e.stale or e.bad_tag)

    sim.add_testbench(flash_requests, background=True)
    sim.add_testbench(flash_codewords, background=True)
    sim.add_testbench(events, background=True)
    sim.add_testbench(loader)
    sim.add_testbench(maximum)
    sim.add_testbench(finisher)
    sim.run()
    assert freed == len(jobs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("gap", "shuffle"), [(0.0, False), (0.3, True)])
def test_jobs(name: str, gap: float, shuffle: bool) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng(len(name))
    jobs = [make_job(config, rng, tokens) for tokens in (1, 37, config.max_tokens, 5, 16, 21)]
    run_lane(config, jobs, seed=1, gap=gap, shuffle=shuffle)
