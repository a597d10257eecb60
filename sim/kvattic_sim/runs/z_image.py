"""`z-image`: a single-stream diffusion transformer, whose text, semantic and image tokens attend each other.

Z-Image (arXiv 2511.22699) has one stream of all tokens and no causal mask: in each step K and V of all tokens are new,
and all of them ask.  diffusers' own class with a small random configuration runs with its attention in the drive; the
published geometry is modelled.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel

import kvattic
from kvattic.spec.config import GQA
from kvattic.timing import Layer, estimate
from kvattic_sim import oracle
from kvattic_sim.runs.diffusion import SMALL, DriveAttention, in_drive
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import modelled_run, options_of, run_of
from kvattic_sim.system.drive import TimedDrive
from kvattic_sim.system.parameters import PAPER_MACHINE

__all__ = ["IMAGE", "TEXT", "run", "slice_of", "small", "step_runs"]

CONFIG = SMALL
"""Of the slice."""
LAYERS, REFINERS, HEADS, HEAD_DIM = 30, 2, 30, 128
"""Defaults of diffusers' class: dim 3,840, 30 heads, 30 layers."""
IMAGE, TEXT = 4096, 256
"""A picture of 1,024 x 1,024: latents of 128 x 128, two by two; tokens of text."""
SAMPLE = 64
WRITE_LIMIT = "programming of the dies"


def small() -> tuple[Any, dict[str, Any]]:
    """A transformer of random weights and what it gets: a picture to go by, its semantic tokens, text, and noise."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        siglip_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[256, 64, 64]).eval()
    picture, noise = torch.randn(2, 4, 1, 8, 8)
    return model, {
        "x": [[picture, noise]], "t": torch.tensor([0.5]), "image_noise_mask": [[0, 1]],
        "cap_feats": [[torch.randn(10, 16), torch.randn(6, 16)]], "siglip_feats": [[torch.randn(4, 4, 16), None]],
        "return_dict": False}


def _forward(model: Any, given: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return model(**given)[0][0].numpy()


def slice_of(target: str, progress: Callable[[str], None]) -> tuple[DriveAttention, float, Any]:
    """The small transformer with its attention in the drive.

    Args:
        target: of `kvattic.open`.
        progress: told what is being done.

    Returns:
        The backend with its figures, the relative RMS of the model's output against the native backend's, the output.
    """
    model, given = small()
    progress("the small transformer, native attention")
    with in_drive(None, CONFIG.element):
        expected = _forward(model, given)
    with kvattic.open(target, CONFIG, **options_of(target, progress)) as device, in_drive(device) as attention:
        progress("the small transformer, attention in the drive")
        found = _forward(model, given)
    return attention, float(oracle.relative_rms(found, expected)), found


def step_runs() -> tuple[list[Run], dict[str, float]]:
    """A layer of the published geometry in a step: its attention, and writing its K and V; modelled."""
    tokens, jobs_in_all = IMAGE + TEXT, HEADS * math.ceil((IMAGE + TEXT) / GQA.rows)
    jobs = (list(Layer(GQA, HEADS, tokens).attend(rows=GQA.rows)) * math.ceil(SAMPLE / HEADS))[:SAMPLE]
    found = estimate(GQA, jobs, in_all=jobs_in_all)
    once = 2 * HEADS * tokens * HEAD_DIM * 2
    write = TimedDrive(GQA).write_seconds("dense", kv_heads=HEADS, tokens=tokens)
    gpu = PAPER_MACHINE.gpu
    flops = 4.0 * HEADS * HEAD_DIM * tokens * tokens
    attend = modelled_run(f"a layer, {tokens:,} tokens: all of them attend", found)
    runs = [
        attend,
        Run(what=f"a layer, {tokens:,} tokens: K and V are written", how=How.MODELLED,
            cycles=round(write * GQA.clock_mhz * 1e6), bytes=once, seconds=write, limit=WRITE_LIMIT)]
    return runs, {"counted_reads_of_each_byte_of_k_and_v": attend.bytes / once,
                  "modelled_seconds_of_a_step_in_the_drive": (LAYERS + REFINERS) * (found.seconds + write),
                  "modelled_seconds_of_a_step_s_attention_on_the_gpu":
                      (LAYERS + REFINERS) * flops / (gpu.flops * gpu.flops_share)}


def run(request: Request) -> Outcome:
    """Run the small transformer, and model the published one.

    Args:
        request: what is asked for.

    Raises:
        ModuleNotFoundError: torch or diffusers are not installed.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    attention, difference, output = slice_of(request.target, request.progress)
    assert attention.attend is not None and attention.write is not None
    how, exact = How.MODELLED, None
    if request.target != "model":
        how, exact = How.MEASURED, bool(np.array_equal(output, slice_of("model", request.progress)[2]))
    write = attention.write
    runs = [
        run_of("slice, a forward pass: all rows attend", how, CONFIG, attention.attend),
        Run(what="slice, a forward pass: K and V are written", how=how, cycles=write.cycles or 0,
            bytes=write.written_bytes, seconds=write.seconds or 0.0, limit=WRITE_LIMIT)]
    request.progress("modelling a layer")
    whole, figures = step_runs()
    return Outcome(
        name="z-image", target=request.target,
        geometry={"layers": LAYERS, "refiner layers": REFINERS, "heads": HEADS, "head_dim": HEAD_DIM,
                  "image tokens": IMAGE, "text tokens": TEXT, "query rows of a job": GQA.rows, "drive": "gqa"},
        source="defaults of diffusers.ZImageTransformer2DModel (Tongyi-MAI/Z-Image-Turbo); arXiv 2511.22699",
        slice=f"diffusers' class with 2 layers, 2 heads of 32, random weights, {max(attention.tokens)} tokens of text, "
              f"semantics and picture in one stream; {len(attention.tokens)} attention calls",
        reference="diffusers' native attention over q, K and V rounded alike, call by call",
        error=max(attention.error, difference), bit_exact=exact, runs=(*runs, *whole),
        figures={"difference_of_the_model_s_output": difference, **figures},
        notes=("K and V are new in each step, and each job of eight rows reads all of them: a GPU reads them once",
               "the GPU's seconds are those of its arithmetic, an A6000 at half of its peak"))
