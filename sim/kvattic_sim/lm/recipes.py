"""What makes configurations small: what their fields become, by name, and what single ones need besides.

A new architecture that `families` cannot build is a line here.
"""

from typing import Any

__all__ = ["HEADS", "HEAD_DIM", "HIDDEN", "KEEP", "MAX_LAYERS", "OWN", "PICTURE_TOKEN", "POSITIONS", "RULES",
           "VOCABULARY", "WINDOW"]

HEADS, HEAD_DIM, HIDDEN, VOCABULARY, POSITIONS = 4, 32, 128, 256, 512
WINDOW = 24
"""Sliding windows and chunks, so that answers leave them."""
MAX_LAYERS = 8
PICTURE_TOKEN = VOCABULARY - 2
"""Stands for a part of a picture; no prompt has it by chance."""

RULES: tuple[tuple[str, Any], ...] = (
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

KEEP = {"chunk_size_feed_forward", "num_codebooks"}
"""Fields that stay, whatever the rules say."""


def _rope(*sections: int) -> dict[str, Any]:
    """Rotary positions of several dimensions: how many pairs of elements each of them turns."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


OWN: dict[str, dict[str, Any]] = {
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
    "dia_decoder": {"eos_token_id": 252, "pad_token_id": 253, "bos_token_id": PICTURE_TOKEN},
    "kyutai_speech_to_text": {"codebook_vocab_size": 65, "audio_bos_token_id": 64, "audio_pad_token_id": 2,
                              "pad_token_id": 2, "bos_token_id": 1},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "mllama_text_model": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    **{kind: {"depths": [1] * 7, "num_filters": 2} for kind in (
        "vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer")},
    **{kind: {"rope_parameters": _rope(4, 6, 6)} for kind in (
        "cosmos3_edge_text", "paddleocr_vl_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_omni_text",
        "qwen3_omni_moe_text", "glm4v_text", "glm_ocr_text")},
    "ernie4_5_vl_moe_text": {"rope_parameters": _rope(6, 6, 4)},
    "glm4v_moe_text": {"rope_parameters": _rope(4, 2, 2) | {"partial_rotary_factor": 0.5}},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM, "rope_parameters": _rope(4, 4, 4, 4)},
    "hy_v4_vl_text": {"rope_parameters": _rope(4, 2, 2)},
    "apertus1p5": {"image_token_offset": 128, "audio_token_offset": 192},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 1, "<|extra_200|>": VOCABULARY - 2}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": HIDDEN, "top_k_experts": 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), dict.fromkeys(
        ("vision_start_token_id", "vision_end_token_id", "audio_start_token_id"), PICTURE_TOKEN)),
    "florence_vision": {"embed_dim": (32, 64, 64, 128), "num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4),
                        "projection_dim": HIDDEN},
    "janus_vision_model": {"projection_dim": HIDDEN},
    "janus_vqgan": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64, "projection_dim": HIDDEN},
    "timm_wrapper": {"model_args": {"embed_dim": HIDDEN}, "hidden_size": HIDDEN},
    "blip_text_model": {"bos_token_id": 1, "sep_token_id": 2},
    **{kind: {"image_token_index": PICTURE_TOKEN, "video_token_index": PICTURE_TOKEN, "num_query_tokens": 4}
       for kind in ("blip-2", "instructblip", "instructblipvideo")},
    "kosmos-2": {"latent_query_num": 4},
    "step3p5": {"sliding_window": WINDOW},
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
