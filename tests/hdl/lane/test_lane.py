"""A lane against the golden model: every intermediate that leaves it, for shuffled codewords and several jobs.

The selection is the test's: a stand-in for the selector reads the first pass's scores and marks what the job says.
"""

import random
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from amaranth.hdl import Module
from tests.hdl.compiled import simulation

import kvattic_hdl.lane.back_end
import kvattic_hdl.lane.scrubber
from kvattic.golden import dense
from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY, CompletionFlag, Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import SCORE_MASKED, SCORE_WINDOW_FRACTION
from kvattic.spec.layout import kv_bits, pack_codes
from kvattic.spec.nand import TINY_PART
from kvattic.spec.stored import element_table
from kvattic_hdl.lane.lane import Lane
from kvattic_hdl.lib.shapes import FAULTS, Sweep
from kvattic_hdl.sparse.lane_topk import LaneTopK

CHANNELS, CHANNEL = 3, 1
SMALL = TINY_PART.resized(512, spare_bytes=256)

CONFIGS = {
    "rows1": Config(channels=CHANNELS, rows=1, head_dim=32, sparse=False, part=TINY_PART, codeword_bytes=256,
                    score_depth=64),
    "rows2": Config(channels=CHANNELS, rows=2, head_dim=64, sparse=False, part=TINY_PART, codeword_bytes=256,
                    score_depth=64),
    "three_tokens": Config(channels=CHANNELS, rows=3, head_dim=80, sparse=False, part=TINY_PART, codeword_bytes=512,
                           score_depth=64),
    "wide": Config(channels=CHANNELS, rows=2, head_dim=32, beat_bytes=32, part=SMALL, codeword_bytes=64,
                   score_depth=64),
    "bf16": Config(channels=CHANNELS, rows=2, head_dim=32, element="bf16", beat_bytes=16, part=SMALL,
                   codeword_bytes=128, score_depth=64),
    "one_codeword": Config(channels=CHANNELS, rows=1, head_dim=32, sparse=False, part=SMALL, codeword_bytes=512,
                           score_depth=64),
    "one_stripe": Config(channels=CHANNELS, rows=1, head_dim=32, sparse=False, part=TINY_PART, codeword_bytes=256,
                         score_depth=16, jobs_in_flight=3),
    "four_channels": Config(channels=8, lane_channels=4, beat_bytes=32, rows=1, head_dim=64, sparse=False,
                            part=TINY_PART, codeword_bytes=256, score_depth=64, jobs_in_flight=16),
    "e4m3": Config(channels=CHANNELS, rows=1, head_dim=96, kv="fp8_e4m3", beat_bytes=32, sparse=False, part=TINY_PART,
                   codeword_bytes=512, score_depth=64),     # three beats a token, five tokens and a rest a codeword
    "e5m2": Config(channels=CHANNELS, rows=2, head_dim=32, kv="fp8_e5m2", element="bf16", part=SMALL,
                   codeword_bytes=128, score_depth=128),
}
SPARSE = {
    "rows1": Config(channels=CHANNELS, rows=1, head_dim=32, part=SMALL, codeword_bytes=128, score_depth=256),
    "rows2": Config(channels=CHANNELS, rows=2, head_dim=32, part=SMALL, codeword_bytes=64, score_depth=128,
                    groups_in_flight=2, jobs_in_flight=3),
    "wide": Config(channels=CHANNELS, rows=2, head_dim=32, beat_bytes=32, part=SMALL, codeword_bytes=64,
                   score_depth=128),
    "bf16": Config(channels=CHANNELS, rows=3, head_dim=32, element="bf16", beat_bytes=16, part=SMALL,
                   codeword_bytes=128, score_depth=256),
    "four_channels": Config(channels=8, lane_channels=4, beat_bytes=32, rows=1, head_dim=32, part=SMALL,
                            codeword_bytes=128, score_depth=256, jobs_in_flight=16, groups_in_flight=16),
    "e4m3": Config(channels=CHANNELS, rows=2, head_dim=32, kv="fp8_e4m3", beat_bytes=16, part=SMALL, codeword_bytes=64,
                   score_depth=128),
    "e5m2": Config(channels=CHANNELS, rows=1, head_dim=64, kv="fp8_e5m2", part=SMALL, codeword_bytes=128,
                   score_depth=512),
}


class StandIn(LaneTopK):
    """The selector's ports, for the test to drive."""

    made: list

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        StandIn.made.append(self)

    def elaborate(self, platform: object) -> Module:
        return Module()


def new_lane(config: Config, selector: type[LaneTopK]) -> tuple:
    """A lane; its selector is what is patched in, and a stand-in's ports are the lane's as `test_selector`."""
    assert kvattic_hdl.lane.back_end.LaneTopK is selector
    lane = Lane(config)

    def stand_ins() -> list:
        lane.test_selector = StandIn.made[-1] if StandIn.made else None
        return StandIn.made[-1:]

    return lane, lane, stand_ins


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
    mode: Mode = Mode.DENSE
    unit_bits: int = 0
    chosen: list[int] = field(default_factory=list)
    approximate: list[int] = field(default_factory=list)    # each row's scale of the first pass, fp32
    selected: np.ndarray | None = None                      # of all tokens
    centroids: np.ndarray | None = None                     # a key for each unit of each stripe
    beyond: np.ndarray | None = None                        # K behind the last token, in its stripe
    lost: set = field(default_factory=set)                  # (kind, place) that never comes: the job fails

    @property
    def stripe_tokens(self) -> int:
        return self.config.tokens_per_page << self.stripe_bits

    @property
    def unit_tokens(self) -> int:
        return self.config.tokens_per_codeword << self.unit_bits

    @cached_property
    def requests(self) -> dict:
        """(kind, place) -> (page, codeword, dram, the codeword's first token), of this lane."""
        config, result = self.config, {}
        per_page = config.codewords_per_page
        place = 0
        for number, entry in enumerate(self.table):
            if entry["channel"] != CHANNEL:
                continue
            first = self.base_token + number * self.stripe_tokens
            for codeword in range(per_page << self.stripe_bits):
                token = first + codeword * config.tokens_per_codeword
                if token >= self.end_token:
                    continue
                page, column = divmod(codeword, per_page)
                where = place + codeword
                key = (entry["key_page"] + page) % (1 << 24), column, entry["dram"], token
                tokens = slice(token - self.base_token, token - self.base_token + config.tokens_per_codeword)
                if self.mode == Mode.DENSE or self.selected[tokens].any():
                    result[Kind.KEY, where] = key
                    result[Kind.VALUE, where] = (entry["value_page"] + page) % (1 << 24), *key[1:]
                if self.mode in (Mode.SPARF, Mode.FETCHED) and entry["whole"]:
                    result[Kind.SKETCH, where] = key
            sketch = entry["sketch_page"] * per_page + entry["sketch_codeword"]
            if self.mode in (Mode.SPARF, Mode.FETCHED) and not entry["whole"]:
                for c in self.chosen:
                    page, column = divmod(sketch + c, per_page)
                    result[Kind.FEATURE, place + c] = page % (1 << 24), column, 0, first
            if self.mode == Mode.CENTROID and not entry["whole"]:
                for j in range(self.stripe_tokens // self.unit_tokens // config.tokens_per_codeword):
                    page, column = divmod(sketch + j, per_page)
                    token = first + j * config.tokens_per_codeword * self.unit_tokens
                    result[Kind.SKETCH, place + j] = page % (1 << 24), column, 0, token
            place += per_page << self.stripe_bits
        return result

    def codeword_tokens(self, kind: int, place: int) -> slice:
        first = self.requests[kind, place][3] - self.base_token
        tokens = self.stripe_tokens if kind == Kind.FEATURE else self.config.tokens_per_codeword
        return slice(first, min(first + tokens, self.end_token - self.base_token))

    def codeword_elements(self, kind: int, place: int) -> np.ndarray:
        """What the codeword holds, flat."""
        config = self.config
        tokens = self.codeword_tokens(kind, place)
        if kind == Kind.FEATURE:
            channel = place % config.group_codewords
            known = self.key[tokens, channel]
            return np.concatenate([known, self.beyond[len(known) :, channel]])
        if kind == Kind.SKETCH and self.mode == Mode.CENTROID:
            unit = (self.requests[kind, place][3] - self.base_token) // self.unit_tokens
            return self.centroids[unit : unit + config.tokens_per_codeword].reshape(-1)
        block = np.zeros((config.tokens_per_codeword, config.head_dim), np.uint16)
        bits = (self.value if kind == Kind.VALUE else self.key)[tokens]
        block[: len(bits)] = bits
        return block.reshape(-1)

    @cached_property
    def own(self) -> np.ndarray:
        """Which of the job's tokens are this lane's, and attended at all."""
        result = np.zeros(len(self.key), bool)
        for number, entry in enumerate(self.table):
            if entry["channel"] == CHANNEL:
                result[number * self.stripe_tokens : (number + 1) * self.stripe_tokens] = True
        return result if self.selected is None else result & self.selected

    @cached_property
    def trace(self):
        """Of the whole job, selected or not; codewords that cannot be read are zeros."""
        key, value = self.key.copy(), self.value.copy()
        for kind, place in self.unreadable:
            if kind in (Kind.KEY, Kind.VALUE):
                (value if kind else key)[self.codeword_tokens(kind, place)] = 0
        return dense.attend(
            self.query, key, value, element=self.config.element, scale_bits=self.scale_bits, start=self.start,
            end=self.end, tree=self.tree, tree_token=self.tree_token, base_token=self.base_token,
            end_token=self.end_token)

    @cached_property
    def final(self):
        """Each row's maximum over what all lanes attend."""
        scores = self.trace.scores
        return (scores if self.selected is None else scores[:, self.selected]).max(axis=1, initial=SCORE_MASKED)

    @cached_property
    def first_pass(self):
        """(ring offset and index in the codeword, or None) -> each row's score in the first pass; and whether a product
        or an attended score was clipped."""
        config, scores, clipped = self.config, {}, False
        attended = self.trace.attended
        place = 0
        for number, entry in enumerate(self.table):
            if entry["channel"] != CHANNEL:
                continue
            start = number * self.stripe_tokens
            tokens = slice(start, min(start + self.stripe_tokens, len(self.key)))
            count = tokens.stop - tokens.start
            if self.mode == Mode.CENTROID and not entry["whole"]:
                units = self.stripe_tokens // self.unit_tokens
                key = self.centroids[start // self.unit_tokens :][:units].copy()
                for j in range(units // config.tokens_per_codeword):
                    if (Kind.SKETCH, place + j) in self.unreadable:
                        key[j * config.tokens_per_codeword : (j + 1) * config.tokens_per_codeword] = 0
                sums, overflow = dense.score_sums(self.query, key, element=config.element, scale_bits=self.scale_bits)
                first = self.base_token + start + self.unit_tokens * np.arange(units)
                draft = first - self.tree_token
                tree = self.tree.astype(np.int64)[:, None] >> np.clip(draft, 0, 31) & 1
                mask = ((first | (self.unit_tokens - 1)) >= self.start[:, None]) & (first < self.end[:, None]) & (
                    (draft < 0) | ((draft < 32) & (tree == 1)))
                rounded, saturated = dense.round_scores(sums, self.scale_bits)
                clipped |= bool(((overflow | saturated) & mask).any())
                rounded[~mask] = SCORE_MASKED
                for unit in range(units):
                    scores[place + (unit << self.unit_bits), 0] = rounded[:, unit]
            elif self.mode != Mode.CENTROID and entry["whole"]:
                key = self.key[tokens].copy()
                for codeword in range(config.group_codewords):
                    if (Kind.SKETCH, place + codeword) in self.unreadable:
                        key[codeword * config.tokens_per_codeword : (codeword + 1) * config.tokens_per_codeword] = 0
                sums, overflow = dense.score_sums(self.query, key, element=config.element, scale_bits=self.scale_bits)
                rounded, saturated = dense.round_scores(sums, self.scale_bits)
                clipped |= bool(((overflow | saturated) & attended[:, tokens]).any())
                rounded[~attended[:, tokens]] = SCORE_MASKED
                for t in range(count):
                    scores[place + t // config.tokens_per_codeword, t % config.tokens_per_codeword] = rounded[:, t]
            elif self.mode != Mode.CENTROID:
                key = np.concatenate([self.key[tokens], self.beyond[count:]])[:, self.chosen]
                for i, c in enumerate(self.chosen):
                    if (Kind.FEATURE, place + c) in self.unreadable:
                        key[:, i] = 0
                rows = []
                for r in range(config.rows):
                    sums, overflow = dense.score_sums(
                        self.query[r : r + 1, self.chosen], key, element=config.element,
                        scale_bits=self.approximate[r])
                    rounded, saturated = dense.round_scores(sums[:, :count], self.approximate[r])
                    clipped |= bool(overflow.any() or (saturated & attended[r, tokens]).any())
                    rows.append(np.where(attended[r, tokens], rounded[0], SCORE_MASKED))
                for t in range(count):
                    scores[place + t // config.tokens_per_codeword, t % config.tokens_per_codeword] = [
                        row[t] for row in rows]
            place += config.group_codewords
        return scores, clipped

    @cached_property
    def first_maximum(self):
        return np.array([*self.first_pass[0].values(), [SCORE_MASKED] * self.config.rows]).max(axis=0)

    @cached_property
    def maximum(self):
        return self.trace.scores[:, self.own].max(axis=1, initial=SCORE_MASKED)

    @cached_property
    def sums(self):
        """(denominators, accumulators, flags) of the lane."""
        trace, own = self.trace, self.own
        significand, exponent = dense.weights(trace.scores[:, own], self.final)
        value = self.value.copy()
        for kind, place in self.unreadable:
            if kind == Kind.VALUE:
                value[self.codeword_tokens(kind, place)] = 0
        # Tokens that come with selected ones have weight zero: without a share in the sums, and never clipped.
        high, low, overflow = dense.value_sums(significand, exponent, value[own], element=self.config.element)
        flags = CompletionFlag(0)
        if (trace.score_overflow & trace.attended)[:, own].any() or (self.mode != Mode.DENSE and self.first_pass[1]):
            flags |= CompletionFlag.SCORE_OVERFLOW
        if overflow:
            flags |= CompletionFlag.VALUE_OVERFLOW
        accumulator = high.astype(object) * (1 << dense.LOW_BITS) + low.astype(object)
        return dense.denominators(significand, exponent), accumulator, flags

    @property
    def fault(self) -> tuple[int, int | None]:
        """(its number in FAULTS, lowest token); a NaN is none in a codeword that cannot be read."""
        faults = {name: [] for name in FAULTS}
        for (kind, place), (_, _, _, token) in self.requests.items():
            name = "value" if kind == Kind.VALUE else "key"
            if (kind, place) in self.unreadable:
                faults["unreadable_" + ("sketch" if kind in (Kind.FEATURE, Kind.SKETCH) else name)].append(token)
                continue
            tokens = self.stripe_tokens if kind == Kind.FEATURE else self.config.tokens_per_codeword
            elements = self.codeword_elements(kind, place).reshape(tokens, -1)
            step = self.unit_tokens if (kind, self.mode) == (Kind.SKETCH, Mode.CENTROID) else 1
            faults[f"nan_{name}"] += [token + step * i for i, bits in enumerate(elements) if special(self.config, bits)]
        for number, name in enumerate(FAULTS):
            tokens = [token for token in faults[name] if token < self.end_token]
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
    key, value = (kv_bits(rng.standard_normal(shape), config) for _ in range(2))
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
              "dram": int(rng.integers(0, 2)), "whole": 0, "sketch_page": 0, "sketch_codeword": 0} for c in channels]
    return Job(config=config, query=query, key=key, value=value, scale_bits=int(scale.view(np.uint32)), start=start,
               end=end, tree=rng.integers(0, 1 << 32, config.rows, dtype=np.uint32), tree_token=tree_token,
               base_token=base, end_token=base + tokens, stripe_bits=bits, table=table)


def make_sparse(config: Config, rng: np.random.Generator, mode: Mode, tokens: int, spread: str, tails: str = "last",
                density: float = 0.2) -> Job:
    """`tails`: stripes that are attended whole, in DRAM or flash; `density`: share of the tokens that are selected."""
    shape = (tokens, config.head_dim)
    key, value = (kv_bits(rng.standard_normal(shape), config) for _ in range(2))
    query = to_bits((3 * rng.standard_normal((config.rows, config.head_dim))).astype(np.float32), config.element)
    scale = int(np.float32(np.log2(np.e) / np.sqrt(config.head_dim)).view(np.uint32))
    base = int(rng.integers(0, 1000))
    start = rng.integers(base, base + tokens, config.rows)
    stripes = -(-tokens // config.group_tokens)
    lane_stripes = config.ring_codewords // config.group_codewords
    while True:
        channels = {
            "here": np.full(stripes, CHANNEL),
            "elsewhere": rng.choice([0, 2], stripes),
            "random": rng.integers(0, CHANNELS, stripes),
        }[spread]
        if (channels == CHANNEL).sum() <= lane_stripes:
            break
    whole = {"none": np.zeros, "all": np.ones, "last": lambda n: np.arange(n) == n - 1,
            "random": lambda n: rng.integers(0, 2, n)}[tails](stripes)
    centroid = mode == Mode.CENTROID
    unit_bits = 0 if mode == Mode.SPARF else int(rng.integers(0, config.unit_bits_max + 1))
    codewords = config.codewords_per_page
    table = [{"channel": int(c), "key_page": int(rng.integers(0, 1 << 24)), "value_page": int(rng.integers(0, 1 << 24)),
              "dram": int(w and rng.integers(2)), "whole": int(w), "sketch_page": int(rng.integers(0, 1 << 24)),
              "sketch_codeword": int(rng.integers(0, codewords)) if centroid else 0}
             for c, w in zip(channels, whole, strict=True)]
    selected = rng.random(tokens) < density
    for number in np.flatnonzero(whole):
        selected[number * config.group_tokens : (number + 1) * config.group_tokens] = True
    units = stripes * config.group_codewords >> unit_bits
    chosen = sorted(int(c) for c in rng.permutation(config.head_dim)[: int(rng.integers(1, 9))])
    return Job(config=config, query=query, key=key, value=value, scale_bits=scale, start=start,
               end=rng.integers(start, base + tokens + 1), tree=rng.integers(0, 1 << 32, config.rows, dtype=np.uint32),
               tree_token=base + max(0, tokens - int(rng.integers(0, 8))), base_token=base, end_token=base + tokens,
               stripe_bits=(config.group_pages - 1).bit_length(), table=table, mode=mode, unit_bits=unit_bits,
               chosen=[] if centroid else chosen, selected=selected,
               approximate=[scale + int(x) for x in rng.integers(0, 3 << 23, config.rows)],
               centroids=kv_bits(rng.standard_normal((units, config.head_dim)), config),
               beyond=kv_bits(rng.standard_normal((config.group_tokens, config.head_dim)), config))


def codeword_beats(config: Config, elements: np.ndarray) -> list[int]:
    raw = pack_codes(elements, config).tobytes()
    step = config.beat_bytes
    return [int.from_bytes(raw[i : i + step], "little") for i in range(0, len(raw), step)]


@pytest.fixture(autouse=True)
def driven_selector(monkeypatch):
    """Lanes with a selector that the test drives; abandoned jobs settle sooner."""
    monkeypatch.setattr(kvattic_hdl.lane.back_end, "LaneTopK", StandIn)
    monkeypatch.setattr(kvattic_hdl.lane.scrubber, "SETTLE_CYCLES", 300)
    monkeypatch.setattr(StandIn, "made", [], raising=False)


def run_lane(config: Config, jobs: list[Job], seed: int, gap: float, shuffle: bool, rogues: float = 0,
             stand_in: bool = True) -> tuple[list, set]:
    """`rogues`: share of codewords with a wrong tag, all of which must be dropped."""
    dut, sim = simulation(new_lane, config, kvattic_hdl.lane.back_end.LaneTopK)
    element = config.element.encoding
    sim.add_clock(1e-6)
    rnd = random.Random(seed)
    slots = config.jobs_in_flight
    wanted: list[dict] = []
    asked: list[tuple] = []    # (job, kind, place)
    asked_here = asked
    delivered: list[dict] = []
    happened: list[str] = []   # events of a rogue
    doubled, told = set(), set()

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
            choices = [w for w in wanted if w["kind"] != Kind.VALUE or opened >> w["slot"] & 1]
            if not choices or rnd.random() < gap:
                await ctx.tick()
                continue
            while rogues and rnd.random() < rogues:
                await rogue(ctx)
            want = rnd.choice(choices) if shuffle else choices[0]
            wanted.remove(want)
            delivered.append(want)
            job, kind, place = jobs[want["job"]], want["kind"], want["place"]
            if (kind, place) in job.lost:
                continue
            beats = codeword_beats(config, job.codeword_elements(kind, place))
            error = (kind, place) in job.unreadable
            if error:
                beats = [rnd.choice((0, rnd.getrandbits(64), (1 << 8 * config.beat_bytes) - 1)) for _ in beats]
            if want["epoch"] != epochs[want["slot"]]:
                continue
            await send(ctx, want, beats, error)

    async def send(ctx, tag, beats, error=0):
        for i, beat in enumerate(beats):
            while rnd.random() < gap:
                await ctx.tick()
            for name in ("slot", "epoch", "kind", "place"):
                ctx.set(dut.codewords.payload.tag[name], tag[name])
            ctx.set(dut.codewords.payload.data, beat)
            ctx.set(dut.codewords.payload.error, error)
            ctx.set(dut.codewords.payload.last, i == len(beats) - 1)
            ctx.set(dut.codewords.valid, 1)
            await ctx.tick().until(dut.codewords.ready)
            ctx.set(dut.codewords.valid, 0)
            ctx.set(dut.codewords.payload.error, rnd.getrandbits(1))

    def verdict(ctx, tag) -> str:
        """What becomes of a codeword; "" where it might be taken."""
        slot, kind, place = tag["slot"], tag["kind"], tag["place"]
        job = jobs[slot_job[slot]]
        asked = [(k, p) for n, k, p in asked_here if n == slot_job[slot]]
        if not ctx.get(dut.live) >> slot & 1 or tag["epoch"] != epochs[slot]:
            return "stale"
        if not asked:
            return "stale or bad_tag"   # its first walk may have begun
        if kind == Kind.VALUE and not ctx.get(dut.value_open) >> slot & 1:
            return "bad_tag"
        if (kind, place) not in job.requests:
            # Of a dense job any K place below the last one asked for is one that was asked for.
            return "bad_tag"
        if any((w["slot"], w["epoch"], w["kind"], w["place"]) == (slot, tag["epoch"], kind, place) for w in delivered):
            return "duplicate"
        return "bad_tag" if kind != Kind.VALUE and (kind, place) not in asked else ""

    async def rogue(ctx):
        if delivered and rnd.random() < 0.5:
            tag = dict(rnd.choice(delivered[-60:]))
        else:
            slot = rnd.randrange(slots)
            tag = {"slot": slot, "epoch": epochs[slot] if rnd.random() < 0.9 else rnd.randrange(16),
                   "kind": rnd.randrange(4), "place": rnd.randrange(config.ring_codewords)}
        count = config.group_words if config.sparse and tag["kind"] == Kind.FEATURE else config.beats_per_codeword
        before = verdict(ctx, tag)
        if not before:
            return
        happened.clear()
        await send(ctx, tag, [rnd.getrandbits(8 * config.beat_bytes) for _ in range(count)])
        await ctx.tick().repeat(6)
        assert len(happened) == 1 and happened[0] in before + verdict(ctx, tag), f"{tag}: {before}, {happened}"
        if happened == ["duplicate"]:
            doubled.add(slot_job[tag["slot"]])
        told.add((tag["kind"], happened[0]))

    async def load(ctx, **values):
        ctx.set(dut.load, values)
        ctx.set(dut.load_valid, 1)
        await ctx.tick()
        ctx.set(dut.load_valid, 0)

    async def load_stripes(ctx, job, slot):
        for number, entry in enumerate(job.table):
            await load(ctx, stripe=1, slot=slot, start=(job.base_token + number * job.stripe_tokens) % (1 << 24),
                       last=number == len(job.table) - 1, data=int.from_bytes(TABLE_ENTRY.pack(
                           flags=entry["dram"] | (entry["whole"] if number % 2 else entry["whole"] - entry["dram"]) << 1
                           if job.mode != Mode.DENSE else entry["dram"],
                           **{name: entry[name] for name in ("channel", "key_page", "value_page")}), "little"))
            if job.mode != Mode.DENSE:
                await load(ctx, sketch=1, slot=slot, data=int.from_bytes(SKETCH_ENTRY.pack(
                    page=entry["sketch_page"], codeword=entry["sketch_codeword"],
                    written=1 - entry["whole"]), "little"))

    async def start(ctx, n):
        job, slot = jobs[n], n % slots
        step = config.query_beat_bytes
        await ctx.tick().repeat(3)
        while not ctx.get(dut.lists_room):
            await ctx.tick()
        if n % 3 == 1:    # a command for this slot that is rejected after its table was read
            await load_stripes(ctx, jobs[0], slot)
        for row in range(config.rows):
            await load(ctx, record=1, slot=slot, row=row, start=int(job.start[row]), end=int(job.end[row]),
                       tree=int(job.tree[row]))
            raw = job.query[row].astype("<u2").tobytes()
            for beat in range(config.beats_per_token):
                data = int.from_bytes(raw[beat * step : (beat + 1) * step], "little")
                await load(ctx, query=1, slot=slot, row=row, beat=beat, data=data)
        def scaled(bits):
            exponent, fraction = bits >> 23, bits & 0x7FFFFF
            return {"k_offset": exponent - 127 + SCORE_WINDOW_FRACTION - 2 * element.offset,
                    "scale": 1 << 23 | fraction}

        if job.chosen:
            for row, bits in enumerate(job.approximate):
                approximate = dut.shapes.approximate.const(scaled(bits)).as_bits()
                await load(ctx, scale=1, slot=slot, row=row, data=approximate)
            for index, channel in enumerate(job.chosen):
                await load(ctx, chosen=1, slot=slot, data=channel | index << 8)
        await load_stripes(ctx, job, slot)
        slot_job[slot] = n
        epochs[slot] = n // slots % 16
        ctx.set(dut.start, {
            "slot": slot, "epoch": n // slots % 16, "stripe_bits": job.stripe_bits,
            "last_token": job.base_token + (len(job.table) - 1) * job.stripe_tokens,
            "end_token": job.end_token, "tree_token": job.tree_token, "mode": job.mode, "unit_bits": job.unit_bits,
            "features": len(job.chosen), "local_token": job.end_token - 1} | scaled(job.scale_bits))
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
    epochs = [0] * slots
    selected_jobs = 0

    async def selection(ctx):
        """What the selector and the central selection do, for each sparse job in order."""
        nonlocal selected_jobs
        selector = dut.test_selector if config.sparse and stand_in else None
        for n, job in enumerate(jobs):
            slot = n % slots
            while started <= n:
                await ctx.tick()
            if job.mode != Mode.DENSE:
                await ctx.tick()
                if job.lost:
                    await fail(ctx, n, slot)
                await wait(ctx, dut.first_done, slot)
                if job.lost:
                    pass
                elif stand_in:
                    await check_first_pass(ctx, selector, n, slot)
                    await mark(ctx, selector, job, slot)
                else:
                    await sweep(ctx, job, slot)
                ctx.set(dut.select_slot, slot)
                ctx.set(dut.select_valid, 1)
                await ctx.tick()
                ctx.set(dut.select_valid, 0)
                ctx.set(dut.select_slot, (slot + 1) % slots)
            selected_jobs += 1

    async def fail(ctx, n, slot):
        """As the watchdog, when nothing happens any more."""
        quiet = 0
        while quiet < 400:
            quiet = 0 if ctx.get(dut.events.beat) else quiet + 1
            await ctx.tick()
        ctx.set(dut.report_slot, slot)
        await ctx.tick().repeat(3)
        assert ctx.get(dut.missing_key) == len(jobs[n].lost) > 0
        assert not ctx.get(dut.first_done) >> slot & 1
        ctx.set(dut.failed, 1 << slot)

    async def check_first_pass(ctx, stand_in, n, slot):
        job = jobs[n]
        own = [i for i, entry in enumerate(job.table) if entry["channel"] == CHANNEL]
        ctx.set(stand_in.slot, slot)
        ctx.set(dut.first_slot, slot)
        for row in range(config.rows):
            ctx.set(dut.first_row, row)
            await ctx.tick().repeat(2)
            assert ctx.get(dut.first_maximum) == int(job.first_maximum[row]), f"first maximum of job {n} row {row}"
        parameters = (stand_in.mode, stand_in.unit_bits, stand_in.end_token, stand_in.local_token, stand_in.stripes)
        assert tuple(ctx.get(p) for p in parameters) == (
            job.mode, job.unit_bits, job.end_token, job.end_token - 1, len(own))
        for i, number in enumerate(own):
            ctx.set(stand_in.stripe_address, slot << dut.shapes.list_bits | i)
            await ctx.tick()
            assert ctx.get(stand_in.stripe_token) == job.base_token + number * job.stripe_tokens
            assert ctx.get(stand_in.stripe_whole) == job.table[number]["whole"]
        base = ctx.get(stand_in.ring_base)
        row_bits = (config.rows - 1).bit_length()
        index_bits = config.slot_bits_per_codeword
        reads = [((base + place) % config.ring_codewords << index_bits | index, row, int(scores[row]))
                 for (place, index), scores in job.first_pass[0].items() for row in range(config.rows)]
        under_way = [None, None]
        ctx.set(stand_in.score_ask, 1)
        for address, row, expected in [*reads, (0, 0, None), (0, 0, None)]:
            word, side = divmod(address, config.sweep_tokens)
            ctx.set(stand_in.score_address, word << row_bits | row)
            granted = False
            while not granted:
                _, _, granted, scores = await ctx.tick().sample(stand_in.score_grant, stand_in.scores)
                before = under_way.pop(0)
                found = before is None or scores[before[1]] == before[3]
                assert found, f"first score of job {n}: {before}, base {base}"
                under_way.append((address, side, row, expected) if granted and expected is not None else None)
        ctx.set(stand_in.score_ask, 0)

    async def sweep(ctx, job, slot):
        """The lane's own selector: each row's sum, then everything is marked."""
        ctx.set(dut.first_slot, slot)
        for row in range(config.rows):
            ctx.set(dut.first_row, row)
            await ctx.tick().repeat(2)
            assert ctx.get(dut.first_maximum) == int(job.first_maximum[row])
            ctx.set(dut.reference_row, row)
            ctx.set(dut.reference, max(int(job.first_maximum[row]), SCORE_MASKED + 1))
            ctx.set(dut.reference_write, 1)
            await ctx.tick()
            ctx.set(dut.reference_write, 0)
        for op in (Sweep.SUM, Sweep.MARK):
            ctx.set(dut.sweep, {"slot": slot, "op": op.value})
            ctx.set(dut.sweep_valid, 1)
            await ctx.tick()
            ctx.set(dut.sweep_valid, 0)
            await ctx.tick().until(dut.sweep_done)
            scores = np.array(list(job.first_pass[0].values()))
            references = np.maximum(job.first_maximum, SCORE_MASKED + 1)
            expected = dense.denominators(*dense.weights(scores.T, references)) if len(scores) else [0] * config.rows
            for row in range(config.rows):
                ctx.set(dut.sum_row, row)
                await ctx.tick().repeat(2)
                assert ctx.get(dut.sum) == int(expected[row])
        assert not ctx.get(dut.unmarked)

    async def mark(ctx, stand_in, job, slot):
        place = 0
        for number, entry in enumerate(job.table):
            if entry["channel"] != CHANNEL:
                continue
            for codeword in range(config.group_codewords):
                token = number * job.stripe_tokens + codeword * config.tokens_per_codeword
                bits = job.selected[token : token + config.tokens_per_codeword]
                ctx.set(stand_in.mark_ring, (ctx.get(stand_in.ring_base) + place) % config.ring_codewords)
                ctx.set(stand_in.mark_bits, int(sum(int(bit) << i for i, bit in enumerate(bits))))
                ctx.set(stand_in.mark_valid, 1)
                await ctx.tick()
                ctx.set(stand_in.mark_valid, 0)
                place += 1

    async def loader(ctx):
        nonlocal started
        ctx.set(dut.lane, CHANNEL)
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
            while selected_jobs <= n:
                await ctx.tick()
            await ctx.tick()
            await wait(ctx, dut.keys_done, slot)
            ctx.set(dut.maximum_slot, slot)
            for row in range(config.rows):
                ctx.set(dut.maximum_row, row)
                await ctx.tick().repeat(2)
                value = ctx.get(dut.maximum)
                assert job.lost or value == int(job.maximum[row]), f"maximum of job {n} row {row}"
                ctx.set(dut.maximum_new, int(job.final[row]))
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
                value = ctx.get(dut.denominator)
                assert job.lost or value == int(denominators[row]), f"denominator of job {n} row {row}"
            sums = np.zeros((config.rows, config.head_dim), object)
            for word in range(dut.shapes.drain_words):
                ctx.set(dut.chain_i.payload.slot, slot)
                copy, beat = divmod(word, config.beats_per_token)
                ctx.set(dut.chain_i.payload.address, copy * dut.shapes.copy_words + beat)
                ctx.set(dut.chain_i.valid, 1)
                await ctx.tick().until(dut.chain_i.ready)
                ctx.set(dut.chain_i.valid, 0)
                ctx.set(dut.chain_o.ready, 1)
                (payload,) = await ctx.tick().sample(dut.chain_o.payload).until(dut.chain_o.valid)
                ctx.set(dut.chain_o.ready, 0)
                for row in range(config.rows):
                    for e in range(config.elements_per_beat):
                        sums[row, beat * config.elements_per_beat + e] += payload.data[row][e]
            assert job.lost or (sums == accumulators).all(), f"sums of job {n}"
            ctx.set(dut.report_slot, slot)
            await ctx.tick().repeat(2)
            report = ctx.get(dut.report)
            fault, token = job.fault
            if not job.lost:
                assert report.fault == fault, f"fault of job {n}"
                if token is not None:
                    assert report.token == token, f"token of job {n}"
                assert report.score_overflow | report.value_overflow << 1 == int(flags), f"flags of job {n}"
                assert report.duplicate == (n in doubled)
            ctx.set(dut.value_open, ctx.get(dut.value_open) & ~(1 << slot))
            ctx.set(dut.live, ctx.get(dut.live) & ~(1 << slot))
            ctx.set(dut.failed, ctx.get(dut.failed) & ~(1 << slot))
            freed += 1

    async def events(ctx):
        async for _, _, e in ctx.tick().sample(dut.events):
            assert e.beat + e.starved + e.barrier + e.weights + e.scores + e.idle == 1
            names = [name for name in ("duplicate", "stale", "bad_tag") if e[name]]
            happened.extend(names)
            assert not names or rogues or any(job.lost for job in jobs)

    sim.add_testbench(flash_requests, background=True)
    sim.add_testbench(flash_codewords, background=True)
    sim.add_testbench(events, background=True)
    sim.add_testbench(loader)
    sim.add_testbench(selection)
    sim.add_testbench(maximum)
    sim.add_testbench(finisher)
    sim.run()
    assert freed == len(jobs)
    # Every codeword was asked for once, in the order of its job and kind; the first pass before K, K before V.
    for n, job in enumerate(jobs):
        if job.lost:
            continue
        assert len([None for number, _, _ in asked if number == n]) == len(job.requests)
        for kind in Kind:
            places = [place for number, k, place in asked if (number, k) == (n, kind)]
            assert places == sorted(place for k, place in job.requests if k == kind)
        order = [{Kind.KEY: 1, Kind.VALUE: 2}.get(k, 0) for number, k, _ in asked if number == n]
        assert order == sorted(order)
    return asked, told


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


@pytest.mark.parametrize("name", ["rows2", "three_tokens", "bf16", "e4m3", "e5m2"])
def test_faults(name: str) -> None:
    """NaN and unreadable codewords: the first kind of fault is reported, at its lowest token."""
    config = CONFIGS[name]
    rng = np.random.default_rng(len(name))
    ring = config.ring_codewords * config.tokens_per_codeword
    form = config.element.encoding
    infinity = ((1 << form.exponent_bits) - 1) << form.fraction_bits
    if (elements := element_table(config.kv, config.element)) is not None:
        infinity = int(elements[0x7F])      # a NaN
    cases = (
        # (unreadable K, unreadable V, NaN in K, NaN in V): how many
        (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 2, 2), (1, 0, 0, 0), (0, 1, 0, 0), (2, 2, 1, 1), (0, 3, 2, 0), (3, 0, 0, 2),
        (0, 0, 0, 0))
    jobs = []
    for counts in cases:
        job = make_job(config, rng, ring // 2 + 1, "here" if len(jobs) < 6 else "random")
        places = len(job.requests) // 2
        for kind in (Kind.KEY, Kind.VALUE):
            job.unreadable |= {(kind, int(p)) for p in rng.permutation(places)[: counts[kind]]}
            bits = job.value if kind else job.key
            for token in rng.permutation(len(bits))[: counts[2 + kind]]:
                bits[token, rng.integers(config.head_dim)] = infinity | int(rng.integers(0, 2)) << 15
        jobs.append(job)
    assert {job.fault[0] for job in jobs} == set(range(1, len(FAULTS) + 1))
    run_lane(config, jobs, seed=2, gap=0.1, shuffle=True)


SPARSE_MODES = (Mode.SPARF, Mode.FETCHED, Mode.CENTROID)


def sparse_jobs(config: Config, rng: np.random.Generator) -> list[Job]:
    """Jobs of all modes, dense ones among them."""
    group = config.group_tokens
    ring = config.ring_codewords * config.tokens_per_codeword
    return [
        make_sparse(config, rng, Mode.SPARF, group + 7, "here", "last"),
        make_sparse(config, rng, Mode.CENTROID, group, "here", "none"),
        make_job(config, rng, 30, "here"),
        make_sparse(config, rng, Mode.FETCHED, 3 * group - 5, "random", "random"),
        make_sparse(config, rng, Mode.SPARF, min(ring, 3 * group), "here", "none", density=0.02),
        make_job(config, rng, 11, "here"),
        make_sparse(config, rng, Mode.SPARF, group + 3, "elsewhere", "none"),
        make_sparse(config, rng, Mode.CENTROID, 2 * group - 3, "here", "last"),
        make_sparse(config, rng, Mode.FETCHED, group - 9, "here", "all"),
        make_sparse(config, rng, Mode.SPARF, group - 2, "here", "none", density=0),
    ]


@pytest.mark.parametrize(("name", "gap", "shuffle"), [
    ("rows1", 0.1, True), ("rows2", 0.0, True), ("wide", 0.0, False), ("wide", 0.1, True), ("bf16", 0.0, True),
    ("e4m3", 0.1, True), ("e5m2", 0.0, True), ("four_channels", 0.0, True), ("four_channels", 0.0, False)])
def test_sparse(name: str, gap: float, shuffle: bool) -> None:
    """First pass, K and V of what is selected, of several jobs in flight."""
    config = SPARSE[name]
    run_lane(config, sparse_jobs(config, np.random.default_rng(len(name))), seed=1, gap=gap, shuffle=shuffle)


@pytest.mark.usefixtures("each_simulator")
def test_own_selector(monkeypatch) -> None:
    """The selector that the lane comes with finds the first pass's scores, and what it marks is read."""
    monkeypatch.setattr(kvattic_hdl.lane.back_end, "LaneTopK", LaneTopK)
    config = SPARSE["rows2"]
    rng = np.random.default_rng(7)
    jobs = [make_sparse(config, rng, mode, tokens, "here", "last", density=1) for mode, tokens in (
        (Mode.SPARF, config.group_tokens + 5), (Mode.FETCHED, 2 * config.group_tokens - 3),
        (Mode.SPARF, config.group_tokens))]
    run_lane(config, jobs, seed=4, gap=0.0, shuffle=True, stand_in=False)


def test_wrong_tags() -> None:
    """Duplicates, also behind the end of their pass; codewords that nobody asked for; of jobs that ended."""
    config = SPARSE["rows2"]
    jobs = sparse_jobs(config, np.random.default_rng(1))
    _, told = run_lane(config, jobs, seed=1, gap=0.0, shuffle=True, rogues=0.4)
    # Octets of codes come as features.
    kinds = set(Kind) - {Kind.CODES}
    assert told >= {(kind, event) for kind in kinds for event in ("duplicate", "bad_tag", "stale")}


def test_sparse_faults() -> None:
    """NaN and unreadable codewords in what is read, and only there; products and scores that are clipped."""
    config = SPARSE["rows2"]
    rng = np.random.default_rng(5)
    form = config.element.encoding
    infinity = ((1 << form.exponent_bits) - 1) << form.fraction_bits
    jobs = []
    for n in range(14):
        mode = SPARSE_MODES[n % 3]
        job = make_sparse(config, rng, mode, config.group_tokens + 13, "here", "last" if n % 2 else "none")
        first = [key for key in job.requests if key[0] in (Kind.FEATURE, Kind.SKETCH)]
        case = n // 3
        if case == 0 and first:
            job.unreadable = {first[int(i)] for i in rng.permutation(len(first))[:2]}
        if case in (0, 1, 3):
            for token in rng.permutation(len(job.key))[:5]:
                job.key[token, rng.integers(config.head_dim)] = infinity
            job.centroids[rng.integers(len(job.centroids)), 3] = infinity | 1 << 15
        if case == 2:    # only in what is not read, or in no token
            for c in set(range(config.head_dim)) - set(job.chosen):
                if mode != Mode.CENTROID and not n % 2:
                    job.key[~job.selected, c] = infinity
            job.beyond[:] = infinity
            job.beyond[: -3] = 0
        if case == 3:
            job.value[rng.integers(len(job.value)), 2] = infinity
            job.unreadable = {key for key in list(job.requests)[-6:] if key[0] == Kind.VALUE}
        if case == 4:
            job.approximate = [bits + (17 << 23) for bits in job.approximate]
        jobs.append(job)
    assert {job.fault[0] for job in jobs} >= {0, 2, 3, len(FAULTS)}
    assert any(job.first_pass[1] for job in jobs if job.chosen)
    run_lane(config, jobs, seed=2, gap=0.0, shuffle=True)


def test_lost_in_the_first_pass() -> None:
    """A job whose first pass never ends is given up; its slot, places and group buffers are as good as new."""
    config = SPARSE["rows2"]
    rng = np.random.default_rng(6)
    jobs = []
    for mode in (Mode.SPARF, Mode.FETCHED, Mode.CENTROID):
        tails = "last" if mode == Mode.FETCHED else "none"
        lost = make_sparse(config, rng, mode, 3 * config.group_tokens, "here", tails)
        first = [key for key in lost.requests if key[0] in (Kind.FEATURE, Kind.SKETCH)]
        lost.lost = set(first[1:3]) or set(first)
        jobs += [make_sparse(config, rng, mode, config.group_tokens + 4, "here"), lost,
                 make_sparse(config, rng, Mode.SPARF, 3 * config.group_tokens, "here", "none"),
                 make_job(config, rng, 21, "here")]
    run_lane(config, jobs, seed=3, gap=0.0, shuffle=True)
