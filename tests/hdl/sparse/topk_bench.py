"""A lane as its LaneTopK sees it, and what a selection must come to, for test_lane_topk.py and test_topk.py."""

from dataclasses import dataclass

import numpy as np

from kvattic.golden import dense, first_pass
from kvattic.spec.commands import Mode
from kvattic.spec.formats import SCORE_MASKED, SCORE_MAX, SCORE_MIN
from kvattic_hdl.lib.shapes import Shapes


@dataclass
class Job:
    """Scores int64 (rows, tokens), in CENTROID (rows, units); tail: bool (stripes,); tokens of whole stripes."""

    mode: Mode
    unit_bits: int
    base_token: int
    end_token: int
    local: int
    sinks: int
    tail: np.ndarray
    scores: np.ndarray
    units: int = 1

    @property
    def local_token(self):
        return max(self.end_token - self.local, 0)

    def unit_tokens(self, config):
        return 1 if self.mode is Mode.SPARF else config.tokens_per_codeword << self.unit_bits

    def step(self, config):
        """Tokens of a score."""
        return self.unit_tokens(config) if self.mode is Mode.CENTROID else 1


def random_scores(rng, shape, spread=3.0, masked=0.1):
    """Scores of which most have weights that count, some none, some are not attended."""
    scores = np.round(rng.normal(0, spread, shape) * 2**22).astype(np.int64)
    scores[rng.random(shape) < 0.05] -= 70 << 22
    scores[rng.random(shape) < 0.02] = SCORE_MIN
    scores[rng.random(shape) < masked] = SCORE_MASKED
    return scores


def make_job(config, rng, mode, *, stripes, unit_bits=0, rows=None, end=None, local=None, tail=None, base=None,
             units=None, scores=None, sinks=None):
    """A random job; what is given stays as given."""
    size = config.group_tokens
    base = int(rng.integers(0, 1000)) * size if base is None else base
    end = base + int(rng.integers((stripes - 1) * size + 1, stripes * size + 1)) if end is None else base + end
    local = int(rng.integers(0, (end - base) // 2 + 2)) if local is None else local
    tail = rng.random(stripes) < 0.3 if tail is None else np.array(tail, bool)
    job = Job(mode, unit_bits, base, end, local, sinks or 0, tail, np.zeros(0))
    step = job.step(config)
    rows = config.rows if rows is None else rows
    job.scores = random_scores(rng, (rows, stripes * size // step)) if scores is None else scores
    first = base + np.arange(stripes * size // step) * step
    job.scores[:, first >= end] = SCORE_MASKED
    if mode is Mode.CENTROID:
        job.scores[:, np.repeat(tail, size // step)] = SCORE_MASKED
    job.units = int(rng.integers(1, -(-(end - base) // job.unit_tokens(config)) + 1)) if units is None else units
    if sinks is None and rng.random() < 0.5:
        # A job from the sequence's beginning on, some of whose first tokens are sinks.
        job.base_token, job.end_token = 0, end - base
        job.sinks = int(rng.integers(0, stripes * size + 2))
    return job


@dataclass
class Expected:
    maximum: np.ndarray
    denominator: np.ndarray
    reference: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    valid: np.ndarray
    selected: np.ndarray
    taken: np.ndarray
    alpha: np.ndarray


def marked(config, job, selected):
    """Tokens of selected units and of the tail, before the end."""
    taken = np.repeat(selected, job.unit_tokens(config)) | np.repeat(job.tail, config.group_tokens)
    taken[job.end_token - job.base_token :] = False
    return taken


def expect(config, job, reference=None):
    """What the golden model makes of the job's scores; reference: in place of its own."""
    unit = job.unit_tokens(config)
    maximum = job.scores.max(axis=1, initial=SCORE_MASKED)
    denominator = dense.denominators(*dense.weights(job.scores, maximum))
    if reference is None:
        reference = first_pass.references(maximum, denominator)
    probability = first_pass.probabilities(job.scores, reference)
    mass = first_pass.masses(probability, unit // job.step(config))
    rank = first_pass.ranks(mass, base_token=job.base_token, unit_tokens=unit, local_token=job.local_token,
                        sinks=job.sinks)
    first = job.base_token + np.arange(len(mass)) * unit
    valid = np.repeat(~job.tail, config.group_tokens // unit) & (first < job.end_token)
    selected = first_pass.select(rank, valid, job.units)
    taken = marked(config, job, selected)
    alpha = np.full(len(maximum), first_pass.ALPHA_ONE)
    if job.mode is not Mode.CENTROID and (valid & ~selected).any():
        alpha = first_pass.alphas(probability, taken, denominator)
    return Expected(maximum, denominator, reference, probability, rank, valid, selected, taken, alpha)


class Lane:
    """Score memory, list and parameters around one LaneTopK.

    Scores of places where nothing was put are random.  `marks`: ring -> bits, of the last MARK sweep.
    """

    def __init__(self, dut, config, seed, grant=1.0):
        self.dut, self.config = dut, config
        self.shapes = Shapes(config)
        self.rng = np.random.default_rng(seed)
        self.grant = grant
        self.jobs, self.scores, self.marks = {}, {}, {}
        self.row_bits = self.shapes.row.width if config.rows > 1 else 0
        self.index_bits = config.slot_bits_per_codeword
        self.wide = config.sweep_tokens

    def put(self, slot, job, mine, ring_base):
        """The lane holds the stripes of numbers `mine` of this job."""
        config = self.config
        mine = [int(number) for number in mine]
        self.jobs[slot] = (job, mine, ring_base)
        step = job.step(config)
        per_stripe = config.group_tokens // step
        for place, number in enumerate(mine):
            for i in range(per_stripe):
                token = i * step
                if job.mode is Mode.CENTROID and job.tail[number]:
                    continue
                ring = self.ring(slot, place, token)
                for row in range(len(job.scores)):
                    address = ring << self.index_bits | token % config.tokens_per_codeword
                    word, side = divmod(address, self.wide)
                    self.scores[word << self.row_bits | row, side] = int(job.scores[row, number * per_stripe + i])

    def ring(self, slot, place, token):
        config = self.config
        codeword = place * config.group_codewords + token // config.tokens_per_codeword
        return (self.jobs[slot][2] + codeword) % config.ring_codewords

    def tokens(self, slot):
        """Numbers (inside of the job) of the lane's tokens, in the order of its list."""
        size = self.config.group_tokens
        return np.concatenate([np.arange(n * size, (n + 1) * size) for n in self.jobs[slot][1]] or [np.zeros(0, int)])

    def marked(self, slot):
        """What the last MARK sweep selected: bool, in the order of `tokens`.  Forgets the marks."""
        tpc = self.config.tokens_per_codeword
        job, mine, _ = self.jobs[slot]
        result = []
        for place in range(len(mine)):
            for token in range(0, self.config.group_tokens, tpc):
                bits = self.marks.pop(self.ring(slot, place, token))
                result += [bits >> i & 1 for i in range(tpc)]
        assert not self.marks, "marks at places that are not the job's"
        numbers = job.base_token + self.tokens(slot)
        return np.array(result, bool) & (numbers < job.end_token)

    async def run(self, ctx):
        """Testbench, in the background."""
        dut, config, rng = self.dut, self.config, self.rng
        # Drawn beforehand: a draw for each cycle would take longer than the simulation.
        length = 4099
        grants = rng.random(length) < self.grant
        noises = rng.integers(SCORE_MASKED, SCORE_MAX + 1, length).tolist()
        pending = []
        cycle = 0
        while True:
            cycle = (cycle + 1) % length
            granted, noise = bool(grants[cycle]), noises[cycle]
            ctx.set(dut.score_grant, granted)
            _, _, address, ask, stripe, slot, sweep, mark, ring, bits, sweep_slot = await ctx.tick().sample(
                dut.score_address, dut.score_ask, dut.stripe_address, dut.slot, dut.sweep_valid,
                dut.mark_valid, dut.mark_ring, dut.mark_bits, dut.sweep.slot)
            if mark:
                assert ring not in self.marks, "marked twice"
                self.marks[ring] = bits
            if sweep:
                self.marks.clear()
                slot = sweep_slot
                job, mine, ring_base = self.jobs[slot]
                ctx.set(dut.mode, job.mode)
                ctx.set(dut.unit_bits, job.unit_bits)
                ctx.set(dut.end_token, job.end_token)
                ctx.set(dut.local_token, job.local_token)
                ctx.set(dut.sinks, job.sinks)
                ctx.set(dut.stripes, len(mine))
                ctx.set(dut.ring_base, ring_base)
            if slot in self.jobs:
                job, mine, _ = self.jobs[slot]
                number = stripe & ((1 << self.shapes.list_bits) - 1)
                if number < len(mine) and stripe >> self.shapes.list_bits == slot:
                    ctx.set(dut.stripe_token, job.base_token + mine[number] * config.group_tokens)
                    ctx.set(dut.stripe_whole, int(job.tail[mine[number]]))
                else:
                    ctx.set(dut.stripe_token, int(rng.integers(1 << 24)))
                    ctx.set(dut.stripe_whole, int(rng.integers(2)))
            # Scores two cycles after their address; anything where nothing was asked.
            pending.append([self.scores.get((address, side), noise) if ask and granted else noise
                            for side in range(self.wide)])
            if len(pending) > 1:
                ctx.set(dut.scores, pending.pop(0))
