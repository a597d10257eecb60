"""`koala`: a U-Net of latent diffusion, whose text stays the same in all steps while the picture's K and V do not.

KOALA (arXiv 2312.04005) cuts SDXL's U-Net down and distils it by the features of its self-attention.  diffusers' own
class with KOALA-700M's block layout, narrow and with random weights, denoises with its attention in the drive:
cross-attention reads K and V of the text, written once; self-attention writes those of all positions in each step.
The published geometry is modelled (`kvattic_sim.runs.koala_whole`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from numpy.typing import NDArray

import kvattic
from kvattic_sim import oracle
from kvattic_sim.runs.diffusion import SMALL, DriveAttention, Spent, in_drive
from kvattic_sim.runs.koala_whole import DRIVE, STAGES, STEPS, TEXT, WRITE_LIMIT, whole
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import options_of, run_of
from kvattic_sim.runs.unet import dispatch_unet

__all__ = ["CONFIG", "LAYOUT", "NARROW", "WIDTHS", "Denoised", "Slice", "denoise", "features_error", "references",
           "run", "save_features", "slice_of", "small"]

LAYOUT: Mapping[str, Any] = {
    "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time"}
"""KOALA-700M's blocks: of SDXL's, a layer for each block instead of two, 5 transformer layers instead of 10 in the
deepest stage, none in the middle."""
WIDTHS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 128}
"""The published widths, SDXL's; diffusers call the number of heads attention_head_dim."""
NARROW: Mapping[str, Any] = {
    "block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 64,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64, "norm_num_groups": 8, "sample_size": 16}
"""Those of the slice: heads of 32, a latent of 16 x 16."""
CONFIG = SMALL
"""Drive of the slice."""
SLICE_STEPS = 2
"""Denoising steps of the slice."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The narrow U-Net, and what it denoises.

    Attributes:
        model: UNet2DConditionModel of random weights; its attention goes through diffusers' registry.
        latents: (1, 4, 16, 16), noise.
        given: text and the like, arguments of the model in each step.
    """

    model: Any
    latents: Any
    given: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Denoised:
    """What the steps gave.

    Attributes:
        timesteps: float32, (steps,).
        predictions: of the noise, float32, (steps, 4, side, side).
        inputs: what the self-attention layers were given, by their name, float32, (steps, positions, features).
        features: what they gave, likewise: what self-attention distillation compares with the teacher's.
    """

    timesteps: NDArray[np.float32]
    predictions: NDArray[np.float32]
    inputs: Mapping[str, NDArray[np.float32]]
    features: Mapping[str, NDArray[np.float32]]

    def drift(self, reference: "Denoised") -> float:
        """How far the features of another run are away: the largest relative RMS of a layer in a step."""
        return max(_worst(found, reference.features[name]) for name, found in self.features.items())


def _worst(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest relative RMS of a step."""
    return max(float(oracle.relative_rms(mine, wanted)) for mine, wanted in zip(found, expected, strict=True))


def small() -> Slice:
    """The narrow U-Net with its inputs, seeded."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(in_channels=4, out_channels=4, **LAYOUT, **NARROW).eval()
    dispatch_unet(model)
    embedding = NARROW["projection_class_embeddings_input_dim"] - 6 * NARROW["addition_time_embed_dim"]
    return Slice(model, torch.randn(1, 4, NARROW["sample_size"], NARROW["sample_size"]), {
        "encoder_hidden_states": torch.randn(1, TEXT, NARROW["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, embedding), "time_ids": torch.randn(1, 6)}})


def denoise(given: Slice, steps: int = SLICE_STEPS, progress: Callable[[str], None] = lambda line: None) -> Denoised:
    """Denoise with whatever attention diffusers' registry has.

    Args:
        given: the U-Net and its inputs.
        steps: of the scheduler.
        progress: told what is being done.
    """
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    seen: dict[str, list[tuple[NDArray[np.float32], ...]]] = {}
    hooks = [layer.register_forward_hook(
        lambda layer, args, output, name=name: seen.setdefault(name, []).append(
            tuple(x[0].numpy().copy() for x in (args[0], output))))
        for name, layer in given.model.named_modules() if name.endswith("attn1")]
    latents, predictions = given.latents * scheduler.init_noise_sigma, []
    try:
        with torch.inference_mode():
            for number, step in enumerate(scheduler.timesteps, 1):
                progress(f"step {number} of {steps}")
                noise = given.model(scheduler.scale_model_input(latents, step), step, **given.given,
                                    return_dict=False)[0]
                predictions.append(noise[0].numpy().copy())
                latents = scheduler.step(noise, step, latents, return_dict=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    inputs, features = ({name: np.stack([step[which] for step in found]) for name, found in seen.items()}
                        for which in (0, 1))
    return Denoised(scheduler.timesteps.numpy().astype(np.float32), np.stack(predictions), inputs, features)


def features_error(given: Slice, found: Denoised) -> float:
    """The largest relative RMS of a layer's features in a step, against native attention given the same inputs.

    Args:
        given: the U-Net.
        found: what the drive gave.
    """
    with in_drive(None, CONFIG.element), torch.inference_mode():
        return max(_worst(found.features[name], given.model.get_submodule(name)(torch.from_numpy(inputs)).numpy())
                   for name, inputs in found.inputs.items())


def save_features(path: Path, found: Denoised) -> None:
    """Write the self-attention's features to an .npz: an array for each layer, and ``timesteps``.

    Args:
        path: of the file; one that is there is replaced.
        found: what the drive gave.
    """
    arrays: dict[str, Any] = {"timesteps": found.timesteps, **found.features}
    with path.open("wb") as file:    # NumPy would add a suffix to a path
        np.savez_compressed(file, **arrays)


def slice_of(target: str, progress: Callable[[str], None]) -> tuple[DriveAttention, Denoised]:
    """The narrow U-Net with its attention in the drive.

    Args:
        target: of `kvattic.open`.
        progress: told what is being done.

    Returns:
        The backend with its figures, what the steps gave.
    """
    with kvattic.open(target, CONFIG, **options_of(target, progress)) as device, in_drive(device) as attention:
        found = denoise(small(), progress=lambda line: progress(f"attention in the drive, {line}"))
    return attention, found


def references(found: Denoised) -> tuple[float, dict[str, float]]:
    """What native attention says to what the drive gave.

    Over several layers, a difference of 1e-7 moves some elements of q, K or V to the next fp16 number, which is 1e-3
    away: layers are compared over the same inputs, and how far whole runs drift apart is said beside it, of the drive
    and native attention, and of native attention in float64 and in float32.

    Args:
        found: what the drive gave.

    Returns:
        The error of the features, and the drifts by name.
    """
    given = small()
    with in_drive(None, CONFIG.element):
        native = denoise(given)
    with in_drive(None, CONFIG.element, torch.float64):
        exact = denoise(given)
    return features_error(given, found), {
        "drift_of_the_features_drive_to_native": found.drift(native),
        "drift_of_the_features_native_in_float64_to_native": exact.drift(native)}


def _slice_runs(attention: DriveAttention, how: How) -> list[Run]:
    """What self- and cross-attention of the slice took."""
    runs = []
    for what, spent in (("self-attention", attention.new), ("cross-attention", attention.kept)):
        attend, write = _both(spent)
        where = "in each step" if spent.writes == spent.calls else "once"
        runs += [run_of(f"slice, {SLICE_STEPS} steps: {what}", how, CONFIG, attend),
                 Run(what=f"slice: its K and V are written {where}", how=how, cycles=write.cycles or 0,
                     bytes=write.written_bytes, seconds=write.seconds or 0.0, limit=WRITE_LIMIT)]
    return runs


def _both(spent: Spent) -> tuple[Any, Any]:
    assert spent.attend is not None and spent.write is not None
    return spent.attend, spent.write


def run(request: Request) -> Outcome:
    """Denoise with the narrow U-Net, and model the published one.

    Args:
        request: what is asked for; `output` gets the self-attention's features.

    Raises:
        ModuleNotFoundError: torch or diffusers are not installed.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    attention, found = slice_of(request.target, request.progress)
    if request.output is not None:
        save_features(request.output, found)
    how, exact = How.MODELLED, None
    if request.target != "model":
        golden = slice_of("model", request.progress)[1]
        how, exact = How.MEASURED, bool(np.array_equal(found.predictions, golden.predictions)) and all(
            np.array_equal(mine, golden.features[name]) for name, mine in found.features.items())
    request.progress("native attention")
    error, drifts = references(found)
    request.progress("modelling a layer of each stage")
    runs, figures = whole()
    return Outcome(
        name="koala", target=request.target,
        geometry={"transformer layers": ", ".join(f"{stage.layers} of {stage.side} x {stage.side}" for stage in STAGES),
                  "heads": ", ".join(str(stage.heads) for stage in STAGES), "head_dim": DRIVE.head_dim,
                  "text tokens": TEXT, "steps of a picture": STEPS, "query rows of a job": DRIVE.rows,
                  "drive": "gqa with head_dim 64"},
        source="KOALA-700M (etri-vilab/koala-700m; arXiv 2312.04005), widths of stable-diffusion-xl-base-1.0 (arXiv "
               "2307.01952)",
        slice=f"diffusers' class with KOALA-700M's blocks, narrow, random weights: {len(found.features)} transformer "
              f"layers with heads of 32, a latent of 16 x 16, {TEXT} tokens of text, {SLICE_STEPS} steps; "
              f"{len(attention.tokens)} attention calls",
        reference="diffusers' native attention over q, K and V rounded alike: each call, and each self-attention "
                  "layer's features from the same inputs",
        error=max(attention.error, error), bit_exact=exact, runs=(*_slice_runs(attention, how), *runs),
        figures={"error_of_a_call": attention.error, "error_of_the_features": error, **drifts,
                 "counted_calls_of_cross_attention_in_the_slice": float(attention.kept.calls),
                 "counted_writes_of_the_text_in_the_slice": float(attention.kept.writes), **figures},
        notes=("self-attention's K and V live for one step, and each job of eight rows reads all of them: a GPU reads "
               "them once",
               f"{TEXT} tokens of text do not fill a stripe of {DRIVE.tokens_per_page}: they stay in the drive's DRAM, "
               "and nothing of them is programmed",
               "the GPU's seconds are those of its arithmetic, an A6000 at half of its peak"))
