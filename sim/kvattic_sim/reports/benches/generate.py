"""Whether transformers generate the same tokens from K and V in the drive as from their own, rounded alike.

The reference is transformers' `eager` attention in float32, over K and V that `RoundedCache` rounds to the drive's
storage format, from queries that are rounded likewise, as the drive takes them.  It needs torch and transformers (the
extra `transformers`); ``python -m kvattic_sim.reports.benches.generate`` prints the figures, ``... 200`` those of
200 seeds, ``... 20 --sampled`` those of sampled answers.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import eager_mask

import kvattic
from kvattic.integrations.storage import round_to_kv, stand_for
from kvattic.integrations.transformers import NAME, DriveCache, config_for, round_to_storage
from kvattic.spec.config import Config
from kvattic.spec.formats import Element, KvFormat
from kvattic_sim.lm import huggingface as lm
from kvattic_sim.lm.model import load_held_out

__all__ = ["ARCHITECTURES", "REFERENCES", "RoundedCache", "Sampled", "build", "generate", "main", "match", "prompts",
           "sampled"]

REFERENCES = {element: f"eager_{element.value}_queries" for element in Element}
"""Names of the reference's attention backends, by storage format."""
_MARK = "_kvattic_rounded"
"""The attribute of K that a `RoundedCache` returned."""
TOKENS = 64
PROMPT = 30
SAMPLED_TOKENS = 200

_SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
# Weights of this size make answers that do not repeat themselves soon.
_SIZES_ROTARY: dict[str, Any] = _SIZES | {"intermediate_size": 256, "initializer_range": 0.15}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES_ROTARY, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_SIZES, ffn_dim=256, word_embed_proj_dim=128, init_std=0.15)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(
        **_SIZES_ROTARY, num_key_value_heads=2, use_sliding_window=True, sliding_window=24, max_window_layers=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES_ROTARY, num_key_value_heads=1, head_dim=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES_ROTARY, num_key_value_heads=4, sliding_window=40)),
}
"""Small models with random weights: grouped-query, multi-head and multi-query attention, windows in none, one or both
layers."""


def _rounded(element: Element) -> Callable[..., Any]:
    """The model's own eager attention, from rounded queries if a `RoundedCache` returned K: an encoder's are not."""

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        query = round_to_storage(query, element) if hasattr(key, _MARK) else query
        return eager(module, query, key, *arguments, **keywords)

    return attention


for _element, _name in REFERENCES.items():
    AttentionInterface.register(_name, _rounded(_element))
    AttentionMaskInterface.register(_name, eager_mask)


class RoundedCache(DynamicCache):
    """transformers' own cache, of K and V that are rounded to what the drive stores.

    Args:
        config: the model's.
        element: the drive's.
        kv: how it stores K and V.
        key_scale: what a stored 1.0 of K stands for, (layers, kv_heads), or None.
        value_scale: likewise of V.
    """

    def __init__(self, config: Any, element: Element = Element.FP16, kv: KvFormat = KvFormat.ELEMENT,
                 key_scale: torch.Tensor | None = None, value_scale: torch.Tensor | None = None) -> None:
        super().__init__(config=config)
        self._element = element
        self._drive = Config(element=element, kv=kv)
        self._scales = key_scale, value_scale

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *arguments: Any,
               **keywords: Any) -> Any:
        """Round them, and go on as usual."""
        scales = [None if scale is None else scale[layer_idx] for scale in self._scales]
        keys, values = (stand_for(round_to_kv(states, self._drive, scale), scale, states.dtype)
                        for states, scale in zip((key_states, value_states), scales, strict=True))
        found = super().update(keys, values, layer_idx, *arguments, **keywords)
        setattr(found[0], _MARK, True)
        return found


def build(name: str, seed: int = 0) -> Any:
    """A model: an architecture's with random weights, or `lm`, the project's own."""
    if name == "lm":
        return lm.load()
    torch.manual_seed(seed)
    return ARCHITECTURES[name]().eval()


def prompts(name: str, seed: int = 0) -> torch.Tensor:
    """A prompt: random tokens, or text that the project's own model has not seen; int64, (1, tokens)."""
    if name == "lm":
        windows = load_held_out().windows
        return torch.from_numpy(windows[seed % len(windows)][None, :150].astype(np.int64))
    return torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, tokens: torch.Tensor, cache: DriveCache | RoundedCache, *, new: int = TOKENS,
             mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The greedy continuation, or another one, from K and V in the drive or in the reference's cache.

    Args:
        model: its attention backend is set.
        tokens: (rows, tokens).
        cache: what the backend follows from.
        new: tokens to generate.
        mask: 0 where there is padding.
        options: of transformers' `generate`.

    Returns:
        int64, (rows, new).
    """
    model.set_attn_implementation(NAME if isinstance(cache, DriveCache) else REFERENCES[cache._element])
    mask = torch.ones_like(tokens) if mask is None else mask
    # All tokens count, also those behind the end of a text.
    answer = model.generate(tokens, attention_mask=mask, cache=cache, max_new_tokens=new,
                            **{"do_sample": False, "eos_token_id": None} | options)
    return torch.as_tensor(answer[:, tokens.shape[1] :])


def match(seeds: int = 4, new: int = TOKENS) -> dict[str, float]:
    """Share of the generated tokens that are equal, for each architecture and for the project's own model.

    Args:
        seeds: models with random weights and prompts, of each architecture; prompts of the project's own.
        new: tokens of each answer.
    """
    shares: dict[str, float] = {}
    for name in (*ARCHITECTURES, "lm"):
        equal = []
        for seed in range(seeds):
            model, tokens = build(name, seed), prompts(name, seed)
            expected = generate(model, tokens, RoundedCache(model.config), new=new)
            with (kvattic.open("model", config_for(model)) as device,
                  DriveCache(device, model.config, held_tokens=0) as cache):  # as much as can be comes from flash
                equal.append(generate(model, tokens, cache, new=new) == expected)
        shares[name] = torch.cat(equal).float().mean().item()
    return shares


class Sampled(NamedTuple):
    """A sampled answer from the drive beside the reference's, of the same draws.

    Members:
        model: its name.
        seed: of its weights, its prompt and the draws.
        place: of the first token that differs; None: none does.
        logits: the largest difference of logits before that token and at it.
        gap: by how much the draw preferred the reference's token there, as a difference of logarithms of probability.
    """

    model: str
    seed: int
    place: int | None
    logits: float
    gap: float | None


class _Draws(LogitsProcessor):
    """Notes each step's logits and the state of torch's random numbers before its draw."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Change nothing."""
        self.logits.append(scores[0].double())
        self.states.append(torch.get_rng_state())
        return scores

    def preferred(self, place: int) -> torch.Tensor:
        """What `torch.multinomial` takes the largest of: log probabilities less those of exponential numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states[place])
            drawn = torch.empty(1, len(self.logits[place])).exponential_()[0]
        return self.logits[place].log_softmax(-1) - drawn.double().log()


def sampled(name: str, seed: int, new: int = SAMPLED_TOKENS) -> Sampled:
    """Compare an answer that is sampled from the whole distribution with the reference's.

    Args:
        name: of the model, see `build`.
        seed: of its weights, its prompt and the draws.
        new: tokens of the answer.
    """
    model, tokens = build(name, seed), prompts(name, seed)
    answers, draws = [], (_Draws(), _Draws())
    with (kvattic.open("model", config_for(model)) as device,
          DriveCache(device, model.config, held_tokens=0) as ours):
        caches: tuple[DriveCache | RoundedCache, ...] = (RoundedCache(model.config), ours)
        for cache, noted in zip(caches, draws, strict=True):
            torch.manual_seed(seed)
            answers.append(generate(model, tokens, cache, new=new, do_sample=True, top_k=0,
                                    logits_processor=LogitsProcessorList([noted]))[0].tolist())
    place = next((place for place, (theirs, mine) in enumerate(zip(*answers, strict=True)) if theirs != mine), None)
    until = new if place is None else place + 1
    logits = max(float((mine - theirs).abs().max())
                 for mine, theirs in zip(draws[1].logits[:until], draws[0].logits[:until], strict=True))
    gap = None
    if place is not None:
        preferred = draws[0].preferred(place)
        gap = float(preferred[answers[0][place]] - preferred[answers[1][place]])
    return Sampled(name, seed, place, logits, gap)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print the share of equal tokens of each model.", allow_abbrev=False)
    parser.add_argument("seeds", nargs="?", type=int, default=4,
                        help="models and prompts of each architecture (default: %(default)s)")
    parser.add_argument("--sampled", action="store_true", help="print those of sampled answers that differ, instead")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"seeds must be at least 1, not {options.seeds}")
    if not options.sampled:
        print(json.dumps(match(options.seeds)))
        return
    found = [sampled(name, seed) for name in ARCHITECTURES for seed in range(options.seeds)]
    differ = [one for one in found if one.place is not None]
    print(f"{len(differ)} of {len(found)} answers of {SAMPLED_TOKENS} tokens differ; logits differ by at most "
          f"{max(one.logits for one in found):.1e}")
    for one in differ:
        print(f"{one.model}, seed {one.seed}: token {one.place}, logits {one.logits:.1e}, gap {one.gap:.1e}")


if __name__ == "__main__":
    main()
