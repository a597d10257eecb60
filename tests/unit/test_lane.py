"""A lane against the golden model: every intermediate that leaves it, for shuffled codewords and several jobs."""

import random
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from amaranth.sim import Simulator

from kvattic import golden
from kvattic.commands import TABLE_ENTRY, CompletionFlag, Kind
from kvattic.config import Config
from kvattic.elements import to_bits
from kvattic.formats import SCORE_MASKED, SCORE_WINDOW_FRACTION
from kvattic.nand import TINY_PART
from kvattic_hdl.interfaces import FAULTS
from kvattic_hdl.lane import Lane

CHANNELS, CHANNEL = 3, 1
SMALL = TINY_PART.resized(512, spare_bytes=256)

CONFIGS = {
    "rows1": Config(channels=CHANNELS, rows=1, head_dim=32, part=TINY_PART, codeword_bytes=256, score_depth=64),
    "rows2": Config(channels=CHANNELS, rows=2, head_dim=64, part=TINY_PART, codeword_bytes=256, score_depth=64),
    "three_tokens": Config(channels=CHANNELS, rows=3, head_dim=80, sparse=False, part=TINY_PART, codeword_bytes=512, score_depth=64),
    "wide": Config(channels=CHANNELS, rows=2, head_dim=32, beat_bytes=32, part=SMALL, codeword_bytes=64,
                   score_depth=64),
    "bf16": Config(channels=CHANNELS, rows=2, head_dim=32, element="bf16", beat_bytes=16, part=SMALL,
                   codeword_bytes=128, score_depth=64),
    "one_codeword": Config(channels=CHANNELS, rows=1, head_dim=32, part=SMALL, codeword_bytes=512, score_depth=64),
    "one_stripe": Config(channels=CHANNELS, rows=1, head_dim=32, part=TINY_PART, codeword_bytes=256, score_depth=16,
                         jobs_in_flight=3),
}


@dataclass
class Job:
    """One job, and what golden says about the share of the lane with number `CHANNEL`."""

    config: Config
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
    stripe_bits: int
    table: list[dict] = field(default_factory=list)
    unreadable: set = field(default_factory=set)    # (kind, place) of this lane

    @property
    def stripe_tokens(self) -> int:
        return self.config.tokens_per_page << self.stripe_bits

    @cached_property
    def requests(self) -> dict:
        """(kind, place) -> (page, codeword, dram, the codeword's first token), of this lane."""
        config, result, place = self.config, {}, 0
        for number, entry in enumerate(self.table):
            if entry["channel"] != CHANNEL:
                continue
            first = self.base_token + number * self.stripe_tokens
            for codeword in range(config.codewords_per_page << self.stripe_bits):
                token = first + codeword * config.tokens_per_codeword
                if token < self.end_token:
                    page, column = divmod(codeword, config.codewords_per_page)
                    for kind, name in ((Kind.KEY, "key_page"), (Kind.VALUE, "value_page")):
                        result[kind, place] = ((entry[name] + page) % (1 << 24), column, entry["dram"], token)
                    place += 1
        return result

    def codeword_tokens(self, kind: int, place: int) -> slice:
        first = self.requests[kind, place][3] - self.base_token
        return slice(first, min(first + self.config.tokens_per_codeword, self.end_token - self.base_token))

    @cached_property
    def own(self) -> np.ndarray:
        """Which of the job's tokens are this lane's."""
        result = np.zeros(len(self.key), bool)
        for kind, place in self.requests:
            result[self.codeword_tokens(kind, place)] = True
        return result

    @cached_property
    def trace(self):
        """Of the whole job; codewords that cannot be read are zeros."""
        key, value = self.key.copy(), self.value.copy()
        for kind, place in self.unreadable:
            (value if kind else key)[self.codeword_tokens(kind, place)] = 0
        return golden.attend(
            self.query, key, value, element=self.config.element, scale_bits=self.scale_bits, start=self.start,
            end=self.end, tree=self.tree, tree_token=self.tree_token, base_token=self.base_token,
            end_token=self.end_token)

    @cached_property
    def maximum(self):
        return self.trace.scores[:, self.own].max(axis=1, initial=SCORE_MASKED)

    @cached_property
    def sums(self):
        """(denominators, accumulators, flags) of the lane."""
        trace, own = self.trace, self.own
        significand, exponent = trace.weight_significand[:, own], trace.weight_exponent[:, own]
        value = self.value.copy()
        for kind, place in self.unreadable:
            if kind:
                value[self.codeword_tokens(kind, place)] = 0
        high, low, overflow = golden.value_sums(significand, exponent, value[own], element=self.config.element)
        flags = CompletionFlag(0)
        if (trace.score_overflow & trace.attended)[:, own].any():
            flags |= CompletionFlag.SCORE_OVERFLOW
        if overflow:
            flags |= CompletionFlag.VALUE_OVERFLOW
        accumulator = high.astype(object) * (1 << golden.LOW_BITS) + low.astype(object)
        return golden.denominators(significand, exponent), accumulator, flags

    @property
    def fault(self) -> tuple[int, int | None]:
        """(its number in FAULTS, lowest token); a NaN is none in a codeword that cannot be read."""
        for number, (kind, unreadable) in enumerate(((0, True), (1, True), (0, False), (1, False))):
            tokens = [self.requests[k, place][3] for k, place in self.unreadable if k == kind] if unreadable else [
                self.base_token + i for i, bits in enumerate(self.value if kind else self.key)
                if self.own[i] and special(self.config, bits)]
            if tokens:
                return number, min(tokens)
        return len(FAULTS), None


def special(config: Config, bits: np.ndarray) -> bool:
    """A NaN or infinity is among them."""
    form = config.element.encoding
    ones = ((1 << form.exponent_bits) - 1) << form.fraction_bits
    return bool(((bits & ones) == ones).any())


def make_job(config: Config, rng: np.random.Generator, tokens: int, spread: str, single: bool = False) -> Job:
    """`spread`: how the stripes lie over the channels; `single`: stripes are single pages."""
    shape = (tokens, config.head_dim)
    key, value = (to_bits(rng.standard_normal(shape).astype(np.float32), config.element) for _ in range(2))
    query = to_bits((3 * rng.standard_normal((config.rows, config.head_dim))).astype(np.float32), config.element)
    scale = np.float32(np.log2(np.e) / np.sqrt(config.head_dim))
    base = int(rng.integers(0, 1000))
    start = rng.integers(base, base + tokens, config.rows)
    end = rng.integers(start, base + tokens + 1)
    tree_token = base + max(0, tokens - int(rng.integers(0, 8)))
    lane_stripes = config.ring_codewords // config.codewords_per_page
    while True:
        bits = 0 if single else int(rng.integers(0, lane_stripes.bit_length()))
        stripes = -(-tokens // (config.tokens_per_page << bits))
        channels = {
            "round": (np.arange(stripes) + int(rng.integers(CHANNELS))) % CHANNELS,
            "here": np.full(stripes, CHANNEL),
            "elsewhere": rng.choice([0, 2], stripes),
            "random": rng.integers(0, CHANNELS, stripes),
        }[spread]
        if (channels == CHANNEL).sum() <= lane_stripes >> bits:
            break
    table = [{"channel": int(c), "key_page": int(rng.integers(0, 1 << 24)), "value_page": int(rng.integers(0, 1 << 24)),
              "dram": int(rng.integers(0, 2))} for c in channels]
    return Job(config=config, query=query, key=key, value=value, scale_bits=int(scale.view(np.uint32)), start=start,
               end=end, tree=rng.integers(0, 1 << 32, config.rows, dtype=np.uint32), tree_token=tree_token,
               base_token=base, end_token=base + tokens, stripe_bits=bits, table=table)


def codeword_beats(config: Config, bits: np.ndarray) -> list[int]:
    block = np.zeros((config.tokens_per_codeword, config.head_dim), np.uint16)
    block[: len(bits)] = bits
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
    asked: list[tuple] = []    # (job, kind, place)

    async def flash_requests(ctx):
        ctx.set(dut.requests.ready, 1)
        while True:
            _, _, valid, payload = await ctx.tick().sample(dut.requests.valid, dut.requests.payload)
            if valid:
                tag = payload.tag
                n = slot_job[tag.slot]
                assert tag.epoch == n // slots % 16
                assert (payload.page, payload.codeword, payload.dram) == jobs[n].requests[tag.kind, tag.place][:3]
                wanted.append({"slot": tag.slot, "epoch": tag.epoch, "kind": tag.kind, "place": tag.place, "job": n})
                asked.append((n, tag.kind, tag.place))

    async def flash_codewords(ctx):
        while True:
            opened = ctx.get(dut.value_open)
            choices = [w for w in wanted if w["kind"] == Kind.KEY or opened >> w["slot"] & 1]
            if not choices or rnd.random() < gap:
                await ctx.tick()
                continue
            want = rnd.choice(choices) if shuffle else choices[0]
            wanted.remove(want)
            job, kind, place = jobs[want["job"]], want["kind"], want["place"]
            tokens = job.codeword_tokens(kind, place)
            beats = codeword_beats(config, (job.value if kind else job.key)[tokens])
            error = (kind, place) in job.unreadable
            if error:
                beats = [rnd.choice((0, rnd.getrandbits(64), (1 << 8 * config.beat_bytes) - 1)) for _ in beats]
            for i, beat in enumerate(beats):
                while rnd.random() < gap:
                    await ctx.tick()
                ctx.set(dut.codewords.payload.tag.slot, want["slot"])
                ctx.set(dut.codewords.payload.tag.epoch, want["epoch"])
                ctx.set(dut.codewords.payload.tag.kind, want["kind"])
                ctx.set(dut.codewords.payload.tag.place, want["place"])
                ctx.set(dut.codewords.payload.data, beat)
                ctx.set(dut.codewords.payload.error, error)
                ctx.set(dut.codewords.payload.last, i == len(beats) - 1)
                ctx.set(dut.codewords.valid, 1)
                await ctx.tick().until(dut.codewords.ready)
                ctx.set(dut.codewords.valid, 0)
                ctx.set(dut.codewords.payload.error, rnd.getrandbits(1))

    async def load(ctx, **values):
        ctx.set(dut.load, values)
        ctx.set(dut.load_valid, 1)
        await ctx.tick()
        ctx.set(dut.load_valid, 0)

    async def load_stripes(ctx, job, slot):
        for number, entry in enumerate(job.table):
            await load(ctx, stripe=1, slot=slot, start=(job.base_token + number * job.stripe_tokens) % (1 << 24),
                       last=number == len(job.table) - 1, data=int.from_bytes(TABLE_ENTRY.pack(**entry), "little"))

    async def start(ctx, n):
        job, slot = jobs[n], n % slots
        step = config.beat_bytes
        if n % 3 == 1:    # a command for this slot that is rejected after its table was read
            await load_stripes(ctx, jobs[0], slot)
        for row in range(config.rows):
            await load(ctx, record=1, slot=slot, row=row, start=int(job.start[row]), end=int(job.end[row]),
                       tree=int(job.tree[row]))
            raw = job.query[row].astype("<u2").tobytes()
            for beat in range(config.beats_per_token):
                data = int.from_bytes(raw[beat * step : (beat + 1) * step], "little")
                await load(ctx, query=1, slot=slot, row=row, beat=beat, data=data)
        await load_stripes(ctx, job, slot)
        exponent, fraction = job.scale_bits >> 23, job.scale_bits & 0x7FFFFF
        slot_job[slot] = n
        ctx.set(dut.start, {
            "slot": slot, "epoch": n // slots % 16, "stripe_bits": job.stripe_bits,
            "last_token": job.base_token + (len(job.table) - 1) * job.stripe_tokens,
            "end_token": job.end_token, "tree_token": job.tree_token,
            "k_offset": exponent - 127 + SCORE_WINDOW_FRACTION - 2 * element.offset, "scale": 1 << 23 | fraction})
        ctx.set(dut.start_valid, 1)
        await ctx.tick()
        ctx.set(dut.start_valid, 0)
        ctx.set(dut.start.slot, (slot + 1) % slots)
        ctx.set(dut.live, ctx.get(dut.live) | 1 << slot)

    async def wait(ctx, signal, slot):
        for _ in range(20000):
            if ctx.get(signal) >> slot & 1:
                return
            await ctx.tick()
        raise AssertionError(f"{signal.name} of slot {slot} never came")

    started, freed = 0, 0
    slot_job = [0] * slots

    async def loader(ctx):
        nonlocal started
        ctx.set(dut.channel, CHANNEL)
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
                assert value == int(job.maximum[row]), f"maximum of job {n} row {row}"
                ctx.set(dut.maximum_new, int(trace.maximum[row]))
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
            denominators, accumulators, flags = job.sums
            ctx.set(dut.denominator_slot, slot)
            for row in range(config.rows):
                ctx.set(dut.denominator_row, row)
                await ctx.tick().repeat(2)
                assert ctx.get(dut.denominator) == int(denominators[row]), f"denominator of job {n} row {row}"
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
            assert (sums == accumulators).all(), f"sums of job {n}"
            ctx.set(dut.report_slot, slot)
            await ctx.tick().repeat(2)
            report = ctx.get(dut.report)
            fault, token = job.fault
            assert report.fault == fault, f"fault of job {n}"
            if token is not None:
                assert report.token == token, f"token of job {n}"
            assert report.score_overflow | report.value_overflow << 1 == int(flags)
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
    # Every codeword was asked for once, in the order of its job and kind, and K comes before V.
    for n, job in enumerate(jobs):
        for kind in Kind:
            places = [place for number, k, place in asked if (number, k) == (n, kind)]
            assert places == list(range(len(job.requests) // 2))
        kinds = [k for number, k, _ in asked if number == n]
        assert kinds == sorted(kinds)
    return asked


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("gap", "shuffle"), [(0.0, False), (0.3, True)])
def test_jobs(name: str, gap: float, shuffle: bool) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng(len(name))
    ring = config.ring_codewords * config.tokens_per_codeword
    jobs = [make_job(config, rng, tokens, spread, single) for tokens, spread, single in (
        (1, "here", False), (37 % ring, "random", False), (ring, "here", True), (5, "elsewhere", False),
        (min(3 * ring, 150), "round", False), (21 % ring, "round", True), (ring // 2 + 1, "random", False))]
    run_lane(config, jobs, seed=1, gap=gap, shuffle=shuffle)


@pytest.mark.parametrize("name", ["rows2", "three_tokens", "bf16"])
def test_faults(name: str) -> None:
    """NaN and unreadable codewords: the first kind of fault is reported, at its lowest token."""
    config = CONFIGS[name]
    rng = np.random.default_rng(len(name))
    ring = config.ring_codewords * config.tokens_per_codeword
    form = config.element.encoding
    infinity = ((1 << form.exponent_bits) - 1) << form.fraction_bits
    cases = (
        # (unreadable K, unreadable V, NaN in K, NaN in V): how many
        (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 2, 2), (1, 0, 0, 0), (0, 1, 0, 0), (2, 2, 1, 1), (0, 3, 2, 0), (3, 0, 0, 2),
        (0, 0, 0, 0))
    jobs = []
    for counts in cases:
        job = make_job(config, rng, ring // 2 + 1, "here" if len(jobs) < 6 else "random")
        places = len(job.requests) // 2
        for kind in Kind:
            job.unreadable |= {(kind, int(p)) for p in rng.permutation(places)[: counts[kind]]}
            bits = job.value if kind else job.key
            for token in rng.permutation(len(bits))[: counts[2 + kind]]:
                bits[token, rng.integers(config.head_dim)] = infinity | int(rng.integers(0, 2)) << 15
        jobs.append(job)
    assert {job.fault[0] for job in jobs} == set(range(len(FAULTS) + 1))
    run_lane(config, jobs, seed=2, gap=0.1, shuffle=True)
