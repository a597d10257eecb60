"""`agd`: what guidance costs a drive: two passes, a pair as rows of one job, or one adapted pass.

Classifier-free guidance evaluates a model twice, with its condition and without.  Adapter guidance distillation (AGD,
arXiv 2503.07274) trains adapters so that one evaluation does.  Here both attend shared keys: the conditional rows all
of them, the others what comes behind the condition's.  Two passes go over a sequence and its fork, which shares its
flash; a pair is two rows of the same jobs.

How much the pair saves depends on how many positions ask at once, so both ends are shown: one position, as in guided
decoding of text, and all positions of an image, as in a step of diffusion.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import kvattic
from kvattic import AttendResult, Config
from kvattic.spec.config import GQA
from kvattic.spec.elements import from_bits
from kvattic.timing import Layer, estimate
from kvattic.timing.cost import Cost
from kvattic_sim import oracle
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import Attending, modelled_run, options_of, run_of, stall_shares
from kvattic_sim.workloads import Attention, topical

__all__ = ["CONFIG", "IMAGE", "TEXT", "WAYS", "Guided", "diffusion_runs", "guided", "run"]

CONFIG = replace(GQA, head_dim=64)
HEADS, IMAGE, TEXT, LAYERS = 20, 1024, 77, 10
"""SDXL's deepest stage: 1,280 channels as 20 heads of 64; 32 x 32 of the latent's 128 x 128; CLIP's tokens."""
SOURCE = ("stabilityai/stable-diffusion-xl-base-1.0, unet/config.json (arXiv 2307.01952); AGD distils it (arXiv "
          "2503.07274)")
SLICE_HEADS, SLICE_IMAGE = 4, 224
WAYS = ("two passes", "a pair", "one adapted pass")
SAMPLE = 64
"""Jobs of a step of diffusion that are modelled; the others go on at their rate."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guided:
    """One position, in all three ways.

    Attributes:
        bits: uint32, (2, heads, 1, head_dim): with the condition and without, of two passes.
        pair: of the pair.
        error: the worst head's relative RMS against float64, of both.
        costs: by way.
        stalls: of the lanes, by way, on the RTL; otherwise empty.
    """

    bits: NDArray[np.uint32]
    pair: NDArray[np.uint32]
    error: float
    costs: dict[str, Cost]
    stalls: dict[str, dict[str, float]]

    @property
    def equal(self) -> bool:
        """Whether the pair has the bits of two passes."""
        return bool(np.array_equal(self.bits, self.pair))


def _inputs(config: Config, heads: int, image: int, text: int) -> tuple[Attention, NDArray[np.uint16]]:
    """K, V and the queries, uint16, (heads, 2, head_dim): with the condition and without; synthetic."""
    attention = topical(config, kv_heads=heads, tokens=text + image)
    other = topical(config, kv_heads=heads, tokens=text + image, seed=1)
    return attention, np.concatenate([attention.query, other.query], axis=1)


def guided(config: Config, *, heads: int, image: int, text: int, target: str = "model",
           progress: Callable[[str], None] = lambda line: None) -> Guided:
    """Attend in all three ways.

    Args:
        config: of the drive, with two query rows at least.
        heads: KV heads.
        image: tokens that both attend.
        text: tokens before them, which the conditional rows attend alone.
        target: of `kvattic.open`.
        progress: told what is being done.
    """
    attention, query = _inputs(config, heads, image, text)
    progress(f"opening {target}")
    with (kvattic.open(target, config, **options_of(target, progress)) as device,
          device.create_sequence(heads, capacity_tokens=text + image) as sequence):
        progress("writing")
        sequence.prefill(attention.key, attention.value)
        with sequence.fork() as unconditional:
            attend = Attending(device, target)
            progress("attending: two passes")
            one = attend(sequence, query[:, :1])
            other = attend(unconditional, query[:, 1:], start=[text])
            progress("attending: a pair")
            pair = attend(sequence, query, start=[0, text])
    used = attend.used
    key, value, asked = (from_bits(bits, config.element).astype(np.float64)
                         for bits in (attention.key, attention.value, query))
    errors = [_error(result, asked[:, number], key[:, first:], value[:, first:])
              for number, (result, first) in enumerate(((one, 0), (other, text)))]
    return Guided(bits=np.stack([one.bits, other.bits]), pair=np.stack([pair.bits[:, :1], pair.bits[:, 1:]]),
                  error=max(errors),
                  costs=dict(zip(WAYS, (one.cost + other.cost, pair.cost, one.cost), strict=True)),
                  stalls=dict(zip(WAYS, (stall_shares(config, part) for part in (used[:2], used[2:], used[:1])),
                                  strict=True)) if used else {})


def _error(result: AttendResult, query: NDArray[np.float64], key: NDArray[np.float64],
           value: NDArray[np.float64]) -> float:
    """Relative RMS of the worst head; query is (heads, head_dim)."""
    scale = query.shape[-1] ** -0.5
    exact = [oracle.attention(q[None], k, v, scale) for q, k, v in zip(query, key, value, strict=True)]
    return max(oracle.relative_rms(mine, wanted) for mine, wanted in zip(result.output, exact, strict=True))


def diffusion_runs(config: Config, *, heads: int, image: int, text: int) -> list[tuple[str, Run]]:
    """A layer of a step of diffusion, where all positions of the image ask at once; modelled.

    Args:
        config: of the drive.
        heads: KV heads.
        image: tokens, and positions that ask.
        text: tokens before them.
    """
    one_of_each = list(Layer(config, heads, text + image).attend(rows=config.rows))
    jobs = (one_of_each * math.ceil(SAMPLE / heads))[:SAMPLE]
    runs = []
    for way, rows in zip(WAYS, (2 * image, 2 * image, image), strict=True):
        passes = heads * math.ceil(rows / config.rows)
        found = estimate(config, jobs, in_all=max(passes, len(jobs)))
        runs.append((way, modelled_run(f"a layer, {image:,} positions: {way}", found)))
    return runs


def _run_of(found: Guided, what: str, how: How, way: str) -> Run:
    return run_of(f"{what}: {way}", how, CONFIG, found.costs[way], stalls=found.stalls.get(way))


def run(request: Request) -> Outcome:
    """Run a slice, and model a layer for one position and for all of an image.

    Args:
        request: what is asked for.

    Raises:
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    config = CONFIG
    found = guided(config, heads=SLICE_HEADS, image=SLICE_IMAGE, text=TEXT, target=request.target,
                   progress=request.progress)
    how, exact = How.MODELLED, None if found.equal else False
    if request.target != "model":
        how = How.MEASURED
        golden = guided(config, heads=SLICE_HEADS, image=SLICE_IMAGE, text=TEXT)
        exact = found.equal and bool(np.array_equal(found.bits, golden.bits))
    request.progress("modelling a layer")
    whole = guided(config, heads=HEADS, image=IMAGE, text=TEXT)
    runs = [
        *(_run_of(found, "slice, 1 position", how, way) for way in WAYS),
        *(_run_of(whole, "a layer, 1 position", How.MODELLED, way) for way in WAYS),
        *(one for _, one in diffusion_runs(config, heads=HEADS, image=IMAGE, text=TEXT))]
    figures = {"pair_has_the_bits_of_two_passes": float(found.equal and whole.equal)}
    for first, name in ((3, "1_position"), (6, f"{IMAGE}_positions")):
        two, pair, adapted = runs[first : first + 3]
        figures |= {f"modelled_cycles_of_a_pair_over_two_passes_{name}": pair.cycles / two.cycles,
                    f"modelled_cycles_of_one_adapted_over_two_passes_{name}": adapted.cycles / two.cycles}
    return Outcome(
        name="agd", target=request.target,
        geometry={"heads": HEADS, "head_dim": config.head_dim, "image tokens": IMAGE, "text tokens": TEXT,
                  "layers of this kind in a block": LAYERS, "query rows of a job": config.rows,
                  "drive": "gqa with head_dim 64"},
        source=SOURCE, slice=f"{SLICE_HEADS} heads, {TEXT} tokens of the condition and {SLICE_IMAGE} shared ones, "
                             "synthetic (topical)",
        reference="float64 attention of each of the two passes, over the same fp16 K, V and queries",
        error=max(found.error, whole.error), bit_exact=exact, runs=tuple(runs), figures=figures,
        notes=("keys are shared: exact where K and V do not depend on the condition, otherwise the best that a pair "
               "can do", "the adapters' own arithmetic is the model's, not the drive's"))
