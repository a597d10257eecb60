"""This project's drive in a system: what attention and writing take on it, by `kvattic.timing`.

    drive = TimedDrive.for_model(LLAMA3_8B, tokens=8192)
    drive.attention_seconds("sparf", kv_heads=64 * 8, group=4, head_dim=128, tokens=7680)

Everything is modelled.  Docs: docs/system.md says how it is sampled and how accurate that is.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from kvattic.errors import CapacityError, ConfigError, RequestError
from kvattic.spec.commands import Mode
from kvattic.spec.config import GQA, MAX_ROWS, PAPER, Config
from kvattic.spec.layout import stripe_channel, stripe_pages
from kvattic.spec.nand import part as nand_part
from kvattic.timing import Job, Layer, Stripe, attend_job, estimate, in_turn, seconds
from kvattic_sim.system.parameters import Machine
from kvattic_sim.system.transformer import Transformer

__all__ = ["MODES", "TimedDrive", "mode_of"]

MODES = tuple(mode.name.lower() for mode in Mode)
"""Names of the modes of attention."""
SAMPLE_TOKENS, MOST_JOBS, FEWEST_JOBS = 1 << 18, 128, 16
"""Tokens of all jobs that are modelled one by one, and how many jobs that may be; the others go on at their rate."""
SHORT_STRIPES = 16
"""Jobs of fewer whole stripes are interpolated between the numbers next to them; longer ones are scaled from the
nearest."""
WRITTEN_HEADS = (64, 128)
"""Heads of the two prefills whose difference is the rate of writing."""
WRITTEN_TOKENS = 2048


def mode_of(name: str) -> Mode:
    """The mode of a name in small letters.

    Raises:
        RequestError: there is no mode of that name.
    """
    if name not in MODES:
        raise RequestError(f"there is no mode {name!r}; modes are {', '.join(MODES)}")
    return Mode[name.upper()]


class _Sample(NamedTuple):
    """What a number of like jobs takes: `cycles` for the first `jobs`, `rate` for each further one."""

    jobs: int
    cycles: float
    rate: float

    def of(self, jobs: int) -> float:
        return self.cycles + (jobs - self.jobs) * self.rate


class TimedDrive:
    """A drive as `kvattic.timing` models it; it remembers what it has modelled.

    SPARF and FETCHED read an eighth of the features, and all sparse modes select at random, as nothing is known of
    what a model's queries select: SPARF and CODES a sixteenth of the tokens, FETCHED a sixteenth of the codewords,
    CENTROID an eighth of the units.  Clustered selections are faster.

    Args:
        config: of the drive.
        unit_tokens: tokens of a unit in CENTROID.
    """

    def __init__(self, config: Config = PAPER, *, unit_tokens: int = 16) -> None:
        least = config.tokens_per_codeword
        most = least << config.unit_bits_max if config.sparse else unit_tokens
        if unit_tokens < 1 or unit_tokens & (unit_tokens - 1) or not least <= unit_tokens <= most:
            raise RequestError(f"unit_tokens must be a power of two from {least} to {most}, not {unit_tokens!r}")
        self.config, self.unit_tokens = config, unit_tokens

    @classmethod
    def for_model(cls, model: Transformer, *, tokens: int, part: str = "pslc", unit_tokens: int = 16) -> "TimedDrive":
        """The preset that suits a model, with score buffers for its contexts and dies of a part.

        `paper` if each query head has K and V of its own, else `gqa` with rows for the group.

        Args:
            model: its head_dim and groups.
            tokens: of the longest sequence.
            part: name of the NAND part.
            unit_tokens: tokens of a unit in CENTROID.

        Raises:
            ConfigError: no configuration has such heads or such a part.
        """
        group = model.q_heads // model.kv_heads
        base = PAPER if group == 1 else replace(GQA, rows=GQA.rows if group <= GQA.rows else MAX_ROWS)
        dies = nand_part(part)
        try:
            config = replace(base, head_dim=model.head_dim, part=dies)
        except ConfigError:
            config = replace(base, head_dim=model.head_dim, part=dies, sparse=False)
        while config.sparse and config.max_tokens < tokens:
            config = replace(config, score_depth=2 * config.score_depth)
        return cls(config, unit_tokens=max(unit_tokens, config.tokens_per_codeword))

    @property
    def name(self) -> str:
        """For tables: part, rows, score buffers."""
        config = self.config
        return f"{config.part.name}, {config.rows} row{'s' * (config.rows > 1)}, {config.score_depth:,} scores a lane"

    # Space.

    def stored_bytes(self, mode: str) -> float:
        """Bytes of flash that a token of a KV head takes: K and V, and K's sketch."""
        token = self.config.token_bytes
        codes = self.config.octets * self.config.codeword_bytes / self.config.group_tokens / token
        sketches = {"dense": 0.0, "centroid": 1 / self.unit_tokens, "codes": codes}.get(mode, 1.0)
        return token * (2 + sketches)

    def tail_bytes(self, mode: str) -> int:
        """Bytes of device DRAM that the last stripe of a KV head takes."""
        return 2 * stripe_pages(self.config, sparse=mode != "dense") * self.config.page_bytes

    def message_bytes(self, mode: str, group: int, tokens: float) -> float:
        """Bytes that a job moves over the drive's link: command, q, new k and v, table, mean of V, result."""
        config, dim = self.config, self.config.head_dim
        rows = min(group, config.rows)
        stripes = math.ceil(tokens / self._stripe(mode))
        mean = 4 * dim if mode_of(mode).blended else 0
        return (64 + 16 + rows * 2 * dim + 2 * config.token_bytes + stripes * 8 * (1 + (mode != "dense")) + mean
                + rows * (4 * dim + 8))

    def _stripe(self, mode: str) -> int:
        """Tokens of a stripe."""
        return stripe_pages(self.config, sparse=mode != "dense") * self.config.tokens_per_page

    def capacity(self, machine: Machine) -> float:
        """Bytes of flash: cells of the machine's board, with as many bits as the part's cells have."""
        return machine.board.cell_capacity * self.config.part.cell_bits

    # Attention.

    def attention_seconds(self, mode: str, *, kv_heads: int, group: int, head_dim: int, tokens: float) -> float:
        """Seconds in which one drive attends, from idle to idle.

        Half of the last stripe lies in device DRAM on average.  Where the whole stripes before it are no
        whole number, it is between those of the two numbers next to it.

        Args:
            mode: one of `MODES`.
            kv_heads: KV heads, of all sequences.
            group: query heads of each, whose rows share a pass.
            head_dim: elements of a head.
            tokens: of each sequence.

        Raises:
            RequestError: there is no such mode, or the configuration is for other heads or has no sparse modes.
            CapacityError: a sparse job has more tokens than the score buffers hold.
        """
        kind = mode_of(mode)
        config = self.config
        if head_dim != config.head_dim:
            raise RequestError(f"head_dim must be the configuration's {config.head_dim}, not {head_dim}")
        for name, value in (("kv_heads", kv_heads), ("group", group), ("tokens", tokens)):
            if not value >= 1:
                raise RequestError(f"{name} must be at least 1, not {value!r}")
        jobs = kv_heads
        if kind is Mode.DENSE:
            # The driver cuts what does not fit into several jobs.
            parts = math.ceil(tokens / config.max_tokens)
            jobs, tokens = kv_heads * -(-group // config.rows) * parts, tokens / parts
        elif not config.sparse:
            raise RequestError(f"mode {mode} needs a configuration with sparse modes; head_dim {head_dim} has none")
        elif kind is Mode.CODES and not config.codes:
            raise RequestError(f"mode {mode} needs a configuration with codes: {config.why_no_codes}")
        elif group > config.rows:
            raise RequestError(f"mode {mode} selects once for the {group} query heads of a KV head, this configuration "
                               f"has {config.rows} rows (Config.rows)")
        elif tokens > config.max_tokens:
            raise CapacityError(f"mode {mode} takes at most {config.max_tokens:,} tokens, which the score buffers hold "
                                f"(Config.score_depth), not {tokens:,.0f}")
        return seconds(config, self._at(kind, jobs, min(group, config.rows), tokens))

    def _at(self, mode: Mode, jobs: int, rows: int, tokens: float) -> float:
        """Cycles of jobs whose tails are half a stripe on average."""
        stripe = self._stripe(mode.name.lower())
        stripes = max(tokens / stripe - 0.5, 0.0)
        # A tail needs its place in the score buffers, too.
        most = max(self.config.max_tokens // stripe - 1, 0)
        low = min(int(stripes), most)
        if low >= SHORT_STRIPES:
            near = min(round(stripes), most)
            return self._average(mode, jobs, rows, near) * (stripes + 0.5) / (near + 0.5)
        at = self._average(mode, jobs, rows, low)
        if stripes == low:
            return at
        return at + (self._average(mode, jobs, rows, low + 1) - at) * (stripes - low)

    def _average(self, mode: Mode, jobs: int, rows: int, stripes: int) -> float:
        """Cycles of jobs with a quarter and with three quarters of a stripe as tail, on average.

        A short tail is read beside the flash, a long one of a sparse job takes longer than the flash, so half a stripe
        takes less than tails of all lengths do on average.
        """
        stripe = self._stripe(mode.name.lower())
        return sum(self.job_cycles(mode, jobs, rows, stripes, stripe * part // 4) for part in (1, 3)) / 2

    def job_cycles(self, mode: Mode, jobs: int, rows: int, stripes: int, tail: int) -> float:
        """Cycles of jobs over whole stripes in flash and a tail in device DRAM, without interpolation.

        Args:
            mode: of the jobs.
            jobs: how many; beyond a sample they go on at its rate.
            rows: query rows of each.
            stripes: in flash, of each.
            tail: tokens in device DRAM, of each.
        """
        tokens = stripes * self._stripe(mode.name.lower()) + tail
        most = min(max(SAMPLE_TOKENS // max(tokens, 1), FEWEST_JOBS), MOST_JOBS)
        return _sample(self.config, self.unit_tokens, mode, rows, stripes, tail, min(jobs, most)).of(jobs)

    # Writing.

    def write_seconds(self, mode: str, *, kv_heads: int, tokens: float) -> float:
        """Seconds in which one drive writes `tokens` of each of `kv_heads`, with K's sketch and the erases.

        Args:
            mode: what is kept beside K and V: K by features in SPARF and FETCHED, mean keys in CENTROID, codes in
                CODES.
            kv_heads: KV heads, of all sequences.
            tokens: of each.
        """
        kind = mode_of(mode)
        pages = kv_heads * tokens * self.stored_bytes(mode) / self.config.page_bytes
        return seconds(self.config, pages * _page_cycles(self.config, kind.featured))


def _jobs(config: Config, unit: int, mode: Mode, rows: int, stripes: int, tail: int, heads: int) -> Iterator[Job]:
    """Jobs of some heads over whole stripes in flash and a tail in device DRAM."""
    sparse = mode is not Mode.DENSE
    pages = stripe_pages(config, sparse=sparse)
    whole = stripes * pages * config.tokens_per_page
    layer = Layer(config, heads, whole, features=mode.featured, centroids=unit if mode is Mode.CENTROID else 0,
                  codes=mode is Mode.CODES) if stripes else None
    width = 1 if mode.by_token else unit if mode is Mode.CENTROID else config.tokens_per_codeword
    share = 8 if mode is Mode.CENTROID else 16
    rng = np.random.default_rng(0)
    for head in range(heads):
        table = layer.table(head, mode) if layer else []
        if tail:
            table.append(Stripe(stripe_channel(stripes, head, config), 0, 0, tail, True))
        marked, chosen = None, []
        if sparse:
            count = whole // width
            picked = np.zeros(count, np.bool_)
            picked[rng.permutation(count)[: max(1, (whole + tail) // share // width)]] = True
            codewords = np.any(picked.repeat(width).reshape(-1, config.tokens_per_codeword), axis=1)
            marked = np.zeros((len(table), pages * config.codewords_per_page), np.bool_)
            marked[:stripes] = codewords.reshape(stripes, -1)
            if mode.featured:
                chosen = sorted(rng.choice(config.head_dim, config.head_dim // 8, replace=False).tolist())
        yield attend_job(config, table, rows=rows, mode=mode, marked=marked, features=chosen, unit_tokens=width,
                         stripe_pages=pages)


@cache
def _sample(config: Config, unit: int, mode: Mode, rows: int, stripes: int, tail: int, count: int) -> _Sample:
    """What `count` jobs take, and how they go on."""
    found = estimate(config, _jobs(config, unit, mode, rows, stripes, tail, count))
    ends = sorted(job.completed for job in found.jobs)
    # The middle, where the drive is neither filling nor draining.
    low, high = count // 4, count * 3 // 4
    rate = (ends[high] - ends[low]) / (high - low) if count >= FEWEST_JOBS else found.cycles / count
    return _Sample(count, found.cycles, rate)


@cache
def _page_cycles(config: Config, features: bool) -> float:
    """Cycles of writing a page, once a prefill is under way, with its share of the erase of a zone."""
    spans = []
    for heads in WRITTEN_HEADS:
        operations = Layer(config, heads, WRITTEN_TOKENS, features=features).prefill()
        spans.append((len(operations), estimate(config, (), operations).cycles))
    (few, less), (many, more) = spans
    planes = config.dies * config.part.planes
    erase = estimate(config, (), in_turn(config, [range(planes)] * config.channels, program=False)).cycles
    return (more - less) / (many - few) + erase / (config.channels * config.zone_pages)
