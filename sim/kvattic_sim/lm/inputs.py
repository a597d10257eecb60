"""What small models of `families` generate from: random tokens, and sound or a picture of random numbers if need be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch

from kvattic_sim.lm.families import Architecture
from kvattic_sim.lm.recipes import PICTURE_TOKEN

__all__ = ["OWN_GENERATE", "inputs"]

Maker: TypeAlias = Callable[[torch.Generator, int], Any]
"""Makes an argument of `generate` for a prompt of so many tokens."""


def _numbers(*sizes: int) -> Maker:
    return lambda generator, _tokens: torch.randn(sizes, generator=generator)


def _patches(generator: torch.Generator, _tokens: int) -> torch.Tensor:
    """Pix2Struct's, each of which says its row and column first."""
    return torch.randn(1, 16, 770, generator=generator).index_fill(2, torch.tensor([0, 1]), 1.0)


class _Steps:
    """Makes VibeVoice's sound from noise: a few steps of any kind, in place of those of the package diffusers."""

    timesteps = torch.tensor([2.0, 1.0])

    def set_timesteps(self, **_options: Any) -> None:
        """Keep those."""

    def step(self, change: torch.Tensor, _time: torch.Tensor, sample: torch.Tensor) -> SimpleNamespace:
        """One step."""
        return SimpleNamespace(prev_sample=sample - 0.5 * change)


_PICTURE, _PICTURES = _numbers(1, 3, 112, 112), _numbers(1, 1, 3, 112, 112)

_INSTEAD: dict[str, tuple[str, Maker]] = {
    "canary": ("input_features", _numbers(1, 128, 16)),     # frames and mel bins, in the order of each
    "cohere_asr": ("input_features", _numbers(1, 128, 16)),
    "speech_to_text": ("input_features", _numbers(1, 128, 16)),
    "whisper": ("input_features", _numbers(1, 16, 128)),
    "seamless_m4t": ("input_features", _numbers(1, 64, 160)),
    "seamless_m4t_v2": ("input_features", _numbers(1, 64, 160)),
    "moonshine": ("input_values", _numbers(1, 16_000)),     # samples
    "moonshine_streaming": ("input_values", _numbers(1, 16_000)),
    "speecht5": ("input_values", _numbers(1, 16_000)),
    "speech-encoder-decoder": ("inputs", _numbers(1, 16_000)),
    "pix2struct": ("flattened_patches", _patches),
    "pp_formulanet": ("pixel_values", _PICTURE),
    "vision-encoder-decoder": ("pixel_values", _PICTURE),
}
"""What encoders read in place of tokens, by model type: its name, which is that of the model's main input."""

_BESIDE: dict[str, dict[str, Maker]] = {
    "blip": {"pixel_values": _PICTURE},
    "blip-2": {"pixel_values": _PICTURE},
    "idefics": {"pixel_values": _PICTURES,
                "image_attention_mask": lambda _, tokens: torch.ones(1, tokens, 1, dtype=torch.long)},
    "instructblip": {"pixel_values": _PICTURE, "qformer_input_ids": lambda *_: torch.arange(3, 11)[None]},
    "instructblipvideo": {"pixel_values": _PICTURES, "qformer_input_ids": lambda *_: torch.arange(3, 11)[None]},
    "kosmos-2": {"pixel_values": _PICTURE,
                 "image_embeds_position_mask": lambda _, tokens: (torch.arange(tokens) < 4)[None].long()},
    "kyutai_speech_to_text": {"input_values": _numbers(1, 1, 96_000)},
    "udop": {"bbox": lambda generator, tokens: torch.rand(1, tokens, 4, generator=generator).sort(-1).values},
    "vibevoice": {"noise_scheduler": lambda *_: _Steps()},
    "voxtral_realtime": {"input_features": _numbers(1, 16, 512)},
}
"""What models need beside their tokens, by model type: names and makers."""

_CODEBOOKS = {"musicgen", "musicgen_melody"}
"""Model types that read a row of tokens for each codebook, and look for the longest answer in their configuration."""

OWN_GENERATE = {"blip", "blip-2", "dia", "instructblip", "instructblipvideo", "kosmos-2"}
"""Model types that cannot do without a `generate` of their own."""


def inputs(architecture: Architecture, model: Any, tokens: int) -> dict[str, Any]:
    """What a model generates from.

    Args:
        architecture: of the model.
        model: built of it.
        tokens: of the prompt.

    Returns:
        Arguments of `generate`.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"decoder_start_token_id": 2} if architecture.encoder else {}
    name, make = _INSTEAD.get(architecture.model_type, ("", None))
    if make is not None and name == model.main_input_name:     # not of those that read text, or of a decoder alone
        return found | {name: make(generator, tokens)}
    found |= {name: make(generator, tokens) for name, make in _BESIDE.get(architecture.model_type, {}).items()}
    rows = 1
    if architecture.model_type in _CODEBOOKS:
        rows = model.config.num_codebooks
        model.generation_config.max_length = model.config.max_position_embeddings
    ids = torch.randint(3, PICTURE_TOKEN, (rows, tokens), generator=generator)
    ids[:, : getattr(model.config, "num_query_tokens", 0)] = PICTURE_TOKEN
    return found | {"input_ids": ids, "attention_mask": torch.ones(1, tokens, dtype=torch.long)}
