"""Small models with random weights of every architecture of transformers that has attention.

`shrink` makes a configuration of any class small by the names of its fields, and its parts likewise: 2 to 8 layers, 4
heads of 32, 256 tokens.  What single architectures need besides is in two tables: fields, and sound to listen to.
No weights are downloaded.  Needs torch and transformers (the extra `transformers`).
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

__all__ = ["OWN_GENERATE", "Architecture", "architectures", "build", "inputs", "shrink", "usual"]

HEADS, HEAD_DIM, HIDDEN, VOCABULARY, POSITIONS = 4, 32, 128, 256, 512
WINDOW = 24
"""Sliding windows and chunks, so that answers leave them."""
MAX_LAYERS = 8
MOST_WEIGHTS = 20_000_000

_RULES: tuple[tuple[str, Any], ...] = (
    (r"(unpadded_|task_type_|decoder_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"encoder_hash_byte_group_vocab", 1000),
    (r"blank_token_id", VOCABULARY - 1),
    (r"codebook_(vocab_)?size", 64),
    (r"upsample_groups", HIDDEN),
    (r"num_filters", 8),
    (r"base_channels", 32),
    (r"hidden_size_per_layer_input", 16),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|attention_hidden_size|"
     r"(input|output)_embedding_size|lru_width|(encoder|decoder|audio|projector)_hidden_size|(cross_attention|cross|downsample)_hidden_size|"
     r"hidden_size_global|hidden_dim|adapter_input_size|adapter_out_dim|output_dim|vision_output_dim|"
     r"output_channels|mlp_dim|backbone_hidden_size|(out|text)_hidden_size|image_token_embed_dim|"
     r"projector_(in|out)put_dim|post_conv_(in|out)_channels|adapter_in_dim", HIDDEN),
    (r"image_size", 112),   # of patches of 14 and of 16
    (r"depth", 2),
    (r"(num_|n_)?((en|de)coder_)?(attention_)?heads?|num_(en|de)coder_attention_heads|"
     r"(swa|cross|encoder|decoder|speech_encoder)_(num_)?attention_heads|"
     r"(cross|encoder|decoder)_num_key_value_heads", HEADS),
    (r"head_dim|kv_channels|d_kv|dim_head|swa_head_dim|attention_head_size|v_head_dim|qk_head_dim|swa_v_head_dim|d_head|"
     r"cross_head_dim|indexer_head_dim",
     HEAD_DIM),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(num_|n_)?((hidden|encoder|decoder)_)?layers?|num_(en|de)coder_layers|num_blocks|"
     r"(encoder|decoder)_num_hidden_layers|(speech_encoder|t2u_encoder|t2u_decoder|num_global)_layers", 2),
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
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2}},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (64, 64)},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note_text": {
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32, "swa_head_dim": HEAD_DIM, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": HEAD_DIM},
    "longcat_flash": {"head_dim": 16},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM,
                       "indexer_budget": 16, "indexer_compress_ratio": 4},
    "gemma4_assistant": {"default": {"text_config": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": HIDDEN, "intermediate_size": HIDDEN // 4,
                                        "num_attention_heads": HEADS, "projector_hidden_size": HIDDEN}},
    "vibevoice": {"audio_bos_token_id": 4, "audio_eos_token_id": 5, "audio_token_id": 6, "pad_token_id": 0},
    "dia_decoder": {"eos_token_id": 252, "pad_token_id": 253, "bos_token_id": 254},
    "kyutai_speech_to_text": {"codebook_vocab_size": 65, "audio_bos_token_id": 64, "audio_pad_token_id": 2,
                              "pad_token_id": 2, "bos_token_id": 1},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "mllama_text_model": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    **{kind: {"depths": [1] * 7, "num_filters": 2} for kind in (
        "vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer")},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
       for kind in ("cosmos3_edge_text", "paddleocr_vl_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_omni_text",
                    "qwen3_omni_moe_text", "glm4v_text", "glm_ocr_text")},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]}}
       for kind in ("ernie4_5_vl_moe_text",)},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                                           "mrope_section": [4, 2, 2]}},
    "apertus1p5": {"image_token_offset": 128, "audio_token_offset": 192},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 1, "<|extra_200|>": VOCABULARY - 2}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": HIDDEN, "top_k_experts": 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4, 4]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 254, "vision_end_token_id": 254, "audio_start_token_id": 254},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 254, "vision_end_token_id": 254, "audio_start_token_id": 254},
    "florence_vision": {"embed_dim": (32, 64, 64, 128), "num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4),
                        "projection_dim": HIDDEN},
    "janus_vision_model": {"projection_dim": HIDDEN},
    "janus_vqgan": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64, "projection_dim": HIDDEN},
    "timm_wrapper": {"model_args": {"embed_dim": HIDDEN}, "hidden_size": HIDDEN},
    "blip_text_model": {"bos_token_id": 1, "sep_token_id": 2},
    **{kind: {"image_token_index": 254, "video_token_index": 254, "num_query_tokens": 4}
       for kind in ("blip-2", "instructblip", "instructblipvideo")},
    "kosmos-2": {"latent_query_num": 4},
    "step3p5": {"sliding_window": WINDOW},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
    "qwen2_vl_vision": {"embed_dim": HIDDEN},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN},
    "kosmos_2_text_model": {"embed_dim": HIDDEN}, "kosmos_2_5_text_model": {"embed_dim": HIDDEN},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (32, 32, 64, 64)},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    **{kind: {"is_decoder": True} for kind in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl")},
}
"""Fields that single architectures or their parts need besides, by model type; `default`: what their usual
configuration needs, which is not the class's own."""


_SOUND: dict[str, tuple[int, ...]] = {
    "canary": (1, 128, 16), "cohere_asr": (1, 128, 16), "speech_to_text": (1, 128, 16), "whisper": (1, 16, 128),
    "seamless_m4t": (1, 64, 160), "seamless_m4t_v2": (1, 64, 160),
    **dict.fromkeys(("moonshine", "moonshine_streaming", "speech-encoder-decoder", "speecht5"), (1, 16_000))}
"""Sizes of the sound that encoders need, by model type: samples, or frames and mel bins in the order of each."""

_BESIDE: dict[str, tuple[str, tuple[int, ...]]] = {
    "kyutai_speech_to_text": ("input_values", (1, 1, 96_000)), "voxtral_realtime": ("input_features", (1, 16, 512))}
"""Name and sizes of the sound that others need beside their tokens, by model type."""

_SEVERAL = {"idefics", "instructblipvideo"}
"""Model types that take several pictures for each text."""

OWN_GENERATE = {"dia", "blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2"}
"""Model types that cannot do without a `generate` of their own."""

_CODEBOOKS = {"musicgen", "musicgen_melody"}
"""Model types that read a row of tokens for each codebook."""


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
                             (True, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING), (True, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)):
        found = []
        for config in mapping:
            kinds = mapping[config]
            for model in kinds if isinstance(kinds, tuple) else (kinds,):
                own = config if getattr(model, "config_class", None) is None else model.config_class
                found.append(Architecture(model.__name__, config.model_type, model, own,
                                          encoder and own.is_encoder_decoder))
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
    if name.endswith("_per_layer_input") and not value:     # the model has no such inputs
        return None
    return next((small for pattern, small in _RULES if re.fullmatch(pattern, name)), None)


def _chosen(kinds: list[Any]) -> list[int]:
    """A few layers among which is each kind: the first ones, if they have them all."""
    names = list(map(str, kinds))
    first = [names.index(name) for name in dict.fromkeys(names)]
    if max(first) < MAX_LAYERS:
        return list(range(min(max(2, max(first) + 1), len(names))))
    return sorted(first)


def usual(config: Any) -> Any:
    """The configuration that a class has by default.

    Args:
        config: the class.

    Raises:
        Exception: whatever the class says if it has none.
    """
    return config(**_OWN.get(config.model_type, {}).get("default", {}))


def shrink(config: Any, default: Any = None, **more: Any) -> Any:
    """A small configuration of a class.

    Args:
        config: the class.
        default: a configuration of it to be made small, such as a part of another one; the class's default if None.
        more: fields to be set, last.

    Raises:
        Exception: whatever the class says if its fields do not go together.
    """
    own = _OWN.get(config.model_type, {})
    kinds_of = {field.name: str(field.type) for field in fields(config) if field.init}
    kept: dict[str, Any] = {}
    if default is None:
        default = usual(config)
    else:
        plain = config()
        kept = {name: found for name in kinds_of if (found := _value(default, name)) != _value(plain, name)}
    values = {name: _value(default, name) for name in kinds_of}
    small = kept | {name: found for name, value in values.items() if (found := _small(name, value)) is not None}
    for name in ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups",
                 "num_global_key_value_heads"):
        if (heads := values.get(name)) is not None:
            small[name] = HEADS if heads == getattr(default, "num_attention_heads", None) else 2
    small |= _few_layers(values, small)
    for name in ("bos_token_id", "eos_token_id"):
        if name in kinds_of:
            small[name] = None if "None" in kinds_of[name] else 1
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(type(value), value).to_dict()
    small |= {name: value for name, value in own.items() if name != "default"} | more
    return config(**{name: value for name, value in small.items() if name in kinds_of or name in own})


def _few_layers(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Fields of a few layers, among which is each kind that a configuration has."""
    kinds = values.get("layer_types") or values.get("layers_block_type") or values.get("block_types")
    if not kinds:
        return {}
    chosen = _chosen(kinds)
    found: dict[str, Any] = {name: [value[number] for number in chosen] for name, value in values.items()
                             if isinstance(value, list) and len(value) == len(kinds)}
    found |= {name: len(chosen) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in small}
    if values.get("num_kv_shared_layers") == len(kinds):    # all of them
        found["num_kv_shared_layers"] = len(chosen)
    return found


class _Steps:
    """Makes VibeVoice's sound from noise: a few steps of any kind, in place of those of the package diffusers."""

    timesteps = torch.tensor([2.0, 1.0])

    def set_timesteps(self, **_options: Any) -> None:
        """Keep those."""

    def step(self, change: torch.Tensor, _time: torch.Tensor, sample: torch.Tensor) -> SimpleNamespace:
        """One step."""
        return SimpleNamespace(prev_sample=sample - 0.5 * change)


def inputs(architecture: Architecture, model: Any, tokens: int) -> dict[str, Any]:
    """What a model generates from: random tokens, or sound if it needs that.

    Args:
        architecture: of the model.
        model: built of it.
        tokens: of the prompt.

    Returns:
        Arguments of `generate`.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"decoder_start_token_id": 2} if architecture.encoder else {}
    kind = architecture.model_type
    if kind in _SOUND:
        name = getattr(model, "main_input_name", "input_ids")
        if name != "input_ids":     # not of those that read text, or of a decoder alone
            return found | {name: torch.randn(_SOUND[kind], generator=generator)}
    if kind in _BESIDE:
        name, sizes = _BESIDE[kind]
        found[name] = torch.randn(sizes, generator=generator)
    if kind == "vibevoice":
        found["noise_scheduler"] = _Steps()
    if getattr(model, "main_input_name", "") == "pixel_values" or kind in ("idefics",):
        sizes = (1, 3, 112, 112) if kind not in _SEVERAL else (1, 1, 3, 112, 112)
        found["pixel_values"] = torch.randn(sizes, generator=generator)
        if architecture.encoder:
            return found
        if kind.startswith("instructblip"):
            found["qformer_input_ids"] = torch.randint(3, VOCABULARY - 2, (1, 8), generator=generator)
    if kind == "pix2struct":
        return found | {"flattened_patches": torch.randn(1, 16, 770, generator=generator).index_fill(
            2, torch.tensor([0, 1]), 1.0)}
    if kind == "udop":
        found["bbox"] = torch.rand(1, tokens, 4, generator=generator).sort(-1).values
    if kind == "kosmos-2":
        found["image_embeds_position_mask"] = (torch.arange(tokens) < model.config.latent_query_num)[None].long()
    if kind == "idefics":
        found["image_attention_mask"] = torch.ones(1, tokens, 1, dtype=torch.long)
    rows = 1
    if kind in _CODEBOOKS:
        rows = model.config.num_codebooks
        model.generation_config.max_length = model.config.max_position_embeddings
    ids = torch.randint(3, VOCABULARY - 2, (rows, tokens), generator=generator)
    if count := getattr(model.config, "num_query_tokens", 0):
        ids[:, :count] = 254
    return found | {"input_ids": ids, "attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A small model with random weights, in float32, for inference.

    Args:
        architecture: what to build.
        seed: of the weights.

    Raises:
        Exception: whatever transformers say if they cannot build it.
    """
    with torch.device("meta"), _without_timm():     # the former takes no memory
        size = sum(weight.numel() for weight in architecture.model(shrink(architecture.config)).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"not small: {size / 1e6:,.0f} million weights, as its configuration shrinks by names of "
                         "fields alone")
    torch.manual_seed(seed)
    with _without_timm():
        return architecture.model(shrink(architecture.config)).eval()


def _without_timm() -> Any:
    """Build pictures' models of the package timm (Gemma 3n's) empty: they are large, and text does not come to them."""
    return patch.object(TimmWrapperModel, "__init__", PreTrainedModel.__init__)
