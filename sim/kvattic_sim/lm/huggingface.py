"""The project's language model as a transformers model, with the same weights: `load`.

It computes as `model.Decoder` does, but for the order of float32 sums, and that queries, keys and values are rounded to
float16 only where the attention or its cache does so.  It needs torch and transformers (the extra `transformers`).
"""

import io
from dataclasses import fields
from importlib import resources
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvattic_sim.lm.model import EPSILON, Shape

__all__ = ["load"]

_LAYER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""What transformers call a layer's weights."""


def load(attn_implementation: str = "eager", *, weights_file: str = "model.npz") -> Any:
    """The trained model of `model.npz`, or the smaller one that drafts for it, for inference in float32.

    Tokens are bytes; byte 0 parts files, and so is the end of a text.

    Args:
        attn_implementation: transformers' name of the attention backend.
        weights_file: `model.npz` or `draft.npz`.

    Returns:
        LlamaForCausalLM.
    """
    packed = resources.files(__package__).joinpath(weights_file).read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as file:
        arrays = dict(file)
    shape = Shape(**{field.name: int(arrays.pop(f"shape.{field.name}")) for field in fields(Shape)})
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=float(EPSILON),
        rope_parameters={"rope_type": "default", "rope_theta": float(shape.rope_base)},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation=attn_implementation,
    )
    weights = {"embedding": "model.embed_tokens", "norm": "model.norm"} | {
        f"{number}.{ours}": f"model.layers.{number}.{theirs}"
        for number in range(shape.layers) for ours, theirs in _LAYER.items()}
    state = {}
    for ours, theirs in weights.items():
        array = arrays[ours].astype(np.float32)
        # Matrices are (inputs, outputs) here, the embedding (vocabulary, width) in both.
        array = array.T if array.ndim == 2 and ours != "embedding" else array
        state[f"{theirs}.weight"] = torch.from_numpy(np.ascontiguousarray(array))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()
