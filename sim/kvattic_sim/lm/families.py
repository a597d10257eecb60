"""Small models with random weights of every architecture of transformers that has attention.

`shrink` makes a configuration of any class small by the names of its fields: 2 to 8 layers, 4 heads of 32, 256 tokens.
No weights are downloaded.  Needs torch and transformers (the extra `transformers`).
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
)

__all__ = ["Architecture", "architectures", "build", "shrink"]

HEADS, HEAD_DIM, HIDDEN, VOCABULARY, POSITIONS = 4, 32, 128, 256, 512
WINDOW = 24
"""Sliding windows and chunks, so that answers leave them."""
MAX_LAYERS = 8
MOST_WEIGHTS = 20_000_000

_RULES: tuple[tuple[str, Any], ...] = (
    (r"(unpadded_|task_type_|decoder_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"hidden_size_per_layer_input", 16),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|attention_hidden_size|"
     r"(input|output)_embedding_size|lru_width|(encoder|decoder)_hidden_size|cross_attention_hidden_size", HIDDEN),
    (r"(num_|n_)?((en|de)coder_)?(attention_)?heads?|num_(en|de)coder_attention_heads|"
     r"swa_num_attention_heads", HEADS),
    (r"head_dim|kv_channels|d_kv|dim_head|swa_head_dim|attention_head_size|v_head_dim|qk_head_dim|swa_v_head_dim|d_head",
     HEAD_DIM),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(num_|n_)?((hidden|encoder|decoder)_)?layers?|num_(en|de)coder_layers|num_blocks", 2),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|(expert_)?ffn_hidden_size|n_inner|d_ff|dim_ff|dff|d_inner|"
     r"feed_forward_size|router_hidden_size", HIDDEN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions|"
     r"max_(en|de)coder_position_embeddings|original_max_position_embeddings", POSITIONS),
    (r"max_source_positions", 64),
    (r"num_mel_bins", 16),
    (r"(num_|n_)(routed_|local_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups", 1),
    (r"(num_|n_|moe_num_)shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"zero_expert_num", 2),
    (r"sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|local_attention", WINDOW),
    (r"[qo]_lora_rank|kv_lora_rank", 32),
    (r"qk_(rope|nope)_head_dim", 16),
    (r"rotary_dim|input_feat_per_channel", 16),
    (r"index_head_dim", 32),
    (r"index_n_heads", 2),
    (r"index_topk", 16),
    (r"(mamba_d|ssm)_state(_size)?|state_size", 16),
    (r"mamba_(n_heads|num_heads)|n_mamba_heads|num_heads_mamba", 8),
    (r"mamba_(d_head|head_dim|headdim)", 32),
    (r"mamba_d_ssm", 256),
    (r"mamba_(n_groups|ngroups)", 1),
    (r"(mamba_)?chunk_size", 16),
    (r"(mamba_dt|time_step)_rank", 8),
    (r"linear_(key_|value_)?head_dim", 16),
    (r"linear_num_(key_)?heads", 2),
    (r"linear_num_value_heads", 4),
    (r"pad_token_id", 0),
    (r"(initializer_range|init_std|initializer_factor)", 0.15),
)
"""(names, what they become); the first one counts."""

_KEEP = {"chunk_size_feed_forward", "num_codebooks"}

_OWN: dict[str, dict[str, Any]] = {
    "cwm": {"bos_token_id": 1, "eos_token_id": 1},
    "moshi": {"bos_token_id": 1},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 6, "intermediate_size": [HIDDEN] * 6,
                     "layer_types": ["sliding_attention", "full_attention"] * 3,
                     "activation_sparsity_pattern": [0.0] * 6},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2, "head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2}},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "reformer": {"is_decoder": True},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    **{kind: {"is_decoder": True} for kind in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl")},
}
"""What single architectures need besides, by model type."""


class Architecture(NamedTuple):
    """A model that generates text.

    Members:
        name: of its class.
        model_type: of its configuration.
        model: the class.
        config: the class of its configuration.
        encoder: whether it has an encoder.
    """

    name: str
    model_type: str
    model: Any
    config: Any
    encoder: bool


def architectures() -> Iterator[Architecture]:
    """Every class that transformers have for generating text, once, by name within each mapping."""
    seen: set[str] = set()
    for encoder, mapping in ((False, MODEL_FOR_CAUSAL_LM_MAPPING), (True, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
                             (True, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING)):
        found = []
        for config in mapping:
            kinds = mapping[config]
            for model in kinds if isinstance(kinds, tuple) else (kinds,):
                found.append(Architecture(model.__name__, config.model_type, model, config, encoder))
        # First the configuration that a model is made for, then those that borrow it.
        found.sort(key=lambda one: (one.name, getattr(one.model, "config_class", None) is not one.config))
        for one in found:
            if one.name not in seen:
                seen.add(one.name)
                yield one


def _value(config: Any, name: str) -> Any:
    """A field's value; None if layers have their own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _small(name: str, value: Any) -> Any:
    """What a field becomes; None: it stays."""
    if name in _KEEP or isinstance(value, (bool, str, list, dict, tuple)) or value is None:
        return None
    return next((small for pattern, small in _RULES if re.fullmatch(pattern, name)), None)


def _chosen(kinds: list[Any]) -> list[int]:
    """A few layers among which is each kind: the first ones, if they have them all."""
    names = list(map(str, kinds))
    first = [names.index(name) for name in dict.fromkeys(names)]
    if max(first) < MAX_LAYERS:
        return list(range(min(max(2, max(first) + 1), len(names))))
    return sorted(first)


def shrink(config: Any, **more: Any) -> Any:
    """A small configuration of a class.

    Args:
        config: the class.
        more: fields to be set, last.

    Raises:
        Exception: whatever the class says if its fields do not go together.
    """
    default = config()
    names = {field.name for field in fields(config) if field.init}
    values = {name: _value(default, name) for name in names}
    small = {name: found for name, value in values.items() if (found := _small(name, value)) is not None}
    for name in ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups",
                 "num_global_key_value_heads"):
        if (heads := values.get(name)) is not None:
            small[name] = HEADS if heads == getattr(default, "num_attention_heads", None) else 2
    kinds = values.get("layer_types") or values.get("layers_block_type") or values.get("block_types")
    if kinds:
        chosen = _chosen(kinds)
        for name, value in values.items():
            if isinstance(value, list) and len(value) == len(kinds):
                small[name] = [value[number] for number in chosen]
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if name in small:
                small[name] = len(chosen)
    for name in ("bos_token_id", "eos_token_id"):
        if name in names:
            small[name] = None
    for name, part in (getattr(config, "sub_configs", None) or {}).items():
        if name in names:
            try:
                small[name] = shrink(part).to_dict()
            except Exception:  # noqa: BLE001  # a part that no default exists of
                continue
    small |= _OWN.get(config.model_type, {}) | more
    return config(**{name: value for name, value in small.items() if name in names})


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A small model with random weights, in float32, for inference.

    Args:
        architecture: what to build.
        seed: of the weights.

    Raises:
        Exception: whatever transformers say if they cannot build it.
    """
    config = shrink(architecture.config)
    with torch.device("meta"):  # which takes no memory
        size = sum(weight.numel() for weight in architecture.model(config).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"not small: {size / 1e6:,.0f} million weights, as its configuration shrinks by names of "
                         "fields alone")
    torch.manual_seed(seed)
    return architecture.model(shrink(architecture.config)).eval()
