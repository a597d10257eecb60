"""What a drive must be for a model of transformers: `config_for`, and what it reads of the model's configuration."""

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
)

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.config import HEAD_DIMS, MAX_ROWS, PAPER, Config, preset
from kvattic.spec.formats import Element, KvFormat

__all__ = ["check_model", "config_for", "heads_of", "latent_width", "longest_window", "most_positions"]

_WIDTHS = ("head_dim", "v_head_dim", "qk_head_dim", "swa_head_dim", "swa_v_head_dim", "global_head_dim")
"""Names that configurations have for what a head of K or V has of elements."""


def config_for(model: Any, base: Config | str = PAPER, *, queries: int = 1, **changes: Any) -> Config:
    """A drive's configuration that a model's attention fits.

    The head dimension is the smallest of the drive's that holds the model's K and V, the query rows those of a KV head
    (16 at most), the element bf16 for a model in bfloat16 and else fp16, in which K and V are stored unless `kv` says
    otherwise; the sparse modes are left out where the head dimension forbids them, and lanes have fewer channels where
    a token would not be whole beats of theirs.

    Args:
        model: a transformers model, or its configuration.
        base: everything else: a configuration, or the name of a preset.
        queries: tokens whose query rows share a pass over K and V; with a draft model, one more than it drafts at once.
        changes: fields of `Config`, which come last.

    Raises:
        ConfigError: no drive has such heads, or a field is not supported.
    """
    text = getattr(model, "config", model).get_text_config(decoder=True)
    heads, dim, kv_heads = heads_of(text)
    if heads % kv_heads:
        raise ConfigError(f"the model's {heads} query heads are no multiple of its {kv_heads} KV heads")
    base = preset(base) if isinstance(base, str) else base
    wanted: dict[str, Any] = {"head_dim": next((size for size in HEAD_DIMS if size >= dim), None),
                              "rows": min(heads // kv_heads * queries, MAX_ROWS)} | changes
    if wanted["head_dim"] is None:
        raise ConfigError(f"the model's head_dim is {dim}, the drive's is at most {HEAD_DIMS[-1]}")
    codeword = changes.get("codeword_bytes", base.codeword_bytes)
    kv = changes.get("kv", base.kv)
    if kv not in set(KvFormat):
        raise ConfigError(f"kv must be one of {[one.value for one in KvFormat]}, not {kv!r}")
    kv = KvFormat(kv)
    token = wanted["head_dim"] * kv.element_bytes if wanted["head_dim"] in HEAD_DIMS else 0
    if token > codeword:
        raise ConfigError(
            f"the model's head_dim is {dim}, for which a drive needs {wanted['head_dim']} (there are "
            f"{', '.join(map(str, HEAD_DIMS))}): a token has {token} bytes then, but this "
            f"base has codewords of {codeword}; take another base, such as 'paper'")
    if not {"lane_channels", "beat_bytes"} & set(changes):
        while base.lane_channels > 1 and (token % base.beat_bytes or token == base.beat_bytes):
            base = base.with_lane_channels(base.lane_channels // 2)
    dtype = getattr(model, "dtype", None) or getattr(text, "dtype", None)
    wanted = {"element": Element.BF16 if dtype == torch.bfloat16 else Element.FP16} | wanted
    try:
        return replace(base, **wanted)
    except ConfigError:
        if "sparse" in changes or not base.sparse:
            raise
        return replace(base, **wanted, sparse=False)


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, the elements of a head of K or V, whichever has more in any layer, KV heads.

    Raises:
        ConfigError: the layers differ in their heads, or there are none.
    """
    layers = getattr(config, "per_layer_config", None)  # of models whose layers differ
    count = getattr(config, "num_hidden_layers", None)
    each = [config] if layers is None or count is None else [layers[number] for number in range(count)]
    if any(getattr(one, "num_attention_heads", None) is None for one in each):
        parts = [name for name in getattr(config, "sub_configs", {})
                 if getattr(getattr(config, name, None), "num_attention_heads", None) is not None]
        if parts:
            raise ConfigError(f"{type(config).__name__}: the configuration names attention heads of parts of the model "
                              f"alone ({', '.join(parts)}); the drive's sequences are of a single decoder")
        raise ConfigError(f"{type(config).__name__}: the configuration names no attention heads (num_attention_heads): "
                          "the model has no attention, there is nothing for a drive")
    found = {(heads := int(one.num_attention_heads), int(getattr(one, "num_key_value_heads", None) or heads))
             for one in each}
    if len(found) > 1:
        raise ConfigError("a model whose layers differ in their heads is not supported, this one has layers with "
                          f"{' and '.join(f'{heads} query and {kv} KV heads' for heads, kv in sorted(found))}")
    [(heads, kv_heads)] = found
    return heads, max(_width(one, heads) for one in each), kv_heads


def _width(config: Any, heads: int) -> int:
    """Elements of a head of K or V of a layer, whichever has more."""
    dims = [int(dim) for name in _WIDTHS if (dim := getattr(config, name, None))]
    if not getattr(config, "head_dim", None):
        dims.append(config.hidden_size // heads)
    return max(dims)


def longest_window(config: Any) -> int | None:
    """Tokens of the longest range that a layer attends which does not begin with the first token."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return None
    sizes = [size for name in ("sliding_window", "attention_chunk_size") if (size := getattr(config, name, None))]
    return max(sizes, default=None)


_CAN_SET_ATTENTION = "_can_set_attn_implementation"
"""What transformers has no public name for: whether a model's attention can be exchanged."""

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length",
              "max_target_positions", "max_length")


def most_positions(config: Any) -> int:
    """The most tokens that a model is made for.

    Raises:
        RequestError: its configuration does not say.
    """
    for name in _POSITIONS:
        if isinstance(found := getattr(config, name, None), int) and found > 0:
            return found
    raise RequestError(f"{type(config).__name__} does not say how many tokens the model is made for: give "
                       "capacity_tokens")


def latent_width(config: Any, keys: tuple[int, ...]) -> int | None:
    """Elements of the compressed vector that a model with latent attention stores in place of K; None: K are K.

    Args:
        config: the model's.
        keys: the shape of what it stores as K, (rows, heads, tokens, elements).
    """
    rank = getattr(config, "kv_lora_rank", None)
    widths = (rank, getattr(config, "qk_rope_head_dim", None))
    return int(rank) if rank and keys[1] == 1 and keys[-1] in widths else None


def _classes(config: type) -> tuple[Any, ...]:
    """The models that generate text with a kind of configuration."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
                MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    found = [mapping.get(config, None) for mapping in mappings]
    return tuple(kind for kinds in found if kinds is not None
                 for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def check_model(config: Any, *, cross: bool = False) -> None:
    """Refuse a model whose configuration says that it needs what the drive lacks.

    Args:
        config: of the model or its decoder.
        cross: whether only its cross-attention is to be in the drive.

    Raises:
        RequestError: it computes attention by itself, has a soft cap, ALiBi, or a position bias.
    """
    text = config.get_text_config(decoder=True)
    name = type(text).__name__
    if cap := getattr(text, "attn_logit_softcapping", None):
        raise RequestError(f"{name}: the model caps its scores (attn_logit_softcapping {cap}), the drive has no soft "
                           "cap")
    # Of a model with parts, the text's part counts: others, such as one for pictures, have no cache.
    kinds = _classes(type(text)) or _classes(type(config))
    alibi = bool(getattr(text, "alibi", False)) or text.model_type in ("bloom", "mpt")
    if kinds and not any(getattr(kind, _CAN_SET_ATTENTION)() for kind in kinds):
        more = "; it adds ALiBi's bias to its scores, too, and the drive adds none" if alibi else ""
        raise RequestError(f"{kinds[0].__name__} computes attention by itself, without transformers' attention "
                           f"interface, and is not supported: nothing of it would come to the drive{more}")
    if text.model_type == "t5gemma2_decoder":
        raise RequestError(f"{name}: the model attends its own and the encoder's tokens in a single softmax, the drive "
                           "holds them apart")
    if cross:
        return
    if getattr(text, "recurrent_kv_cache_mode", None) == "last_loop" and text.n_recurrent_loops > 1:
        raise RequestError(f"{name}: passes of the model through its layers attend K and V that a later pass writes "
                           "(recurrent_kv_cache_mode 'last_loop'), the drive attends what is written; 'per_loop' works")
    if text.model_type == "minimax":
        raise RequestError(f"{name}: the model takes a cache of its own only, for the states of its linear layers")
    if alibi:
        raise RequestError(f"{name}: the model adds ALiBi's bias to its scores, the drive adds none")
    if getattr(text, "relative_attention_num_buckets", None):
        raise RequestError(f"{name}: the model adds a bias by position to its scores, the drive adds none; its "
                           "cross-attention alone can be in the drive: DriveEncoderDecoderCache with "
                           "self_attention=DynamicCache(config=...)")
