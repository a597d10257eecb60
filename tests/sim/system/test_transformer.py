"""Geometry of transformers: what is known of the published models, and what a configuration must say."""

import json

import pytest

from kvattic.errors import RequestError
from kvattic_sim.system.transformer import (
    LLAMA2_13B,
    LLAMA3_8B,
    LLAMA3_70B_INT4,
    OPT_13B,
    OPT_30B,
    Transformer,
    load_model,
)

LLAMA3_CONFIG = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "hidden_act": "silu",
}


@pytest.mark.parametrize(("model", "billions"), [
    (OPT_13B, 12.9), (OPT_30B, 30.0), (LLAMA2_13B, 12.9), (LLAMA3_8B, 7.5), (LLAMA3_70B_INT4, 69.5)])
def test_matrices_have_as_many_weights_as_the_model_is_called(model, billions):
    assert model.weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_opt_13b_keeps_as_much_as_the_paper_says():
    # Table III: 1.34 GB for 64 x 1,024 tokens of one of 40 layers.
    assert OPT_13B.kv_bytes == 819_200
    assert 64 * 1024 * OPT_13B.kv_bytes / 40 == pytest.approx(1.34e9, rel=0.01)


def test_grouped_heads_and_packed_elements_keep_less():
    assert LLAMA3_8B.kv_bytes == 2 * 32 * 8 * 128 * 2
    fields = {name: getattr(LLAMA3_8B, name) for name in LLAMA3_8B.__slots__}
    assert Transformer(**{**fields, "kv_bits": 8.5}).kv_bytes == pytest.approx(LLAMA3_8B.kv_bytes * 8.5 / 16)


def test_attention_takes_a_flop_a_byte_without_groups():
    # Two products of two FLOP for each pair of 16-bit elements of K and V.
    assert OPT_13B.attention_flops(1000) == 1000 * OPT_13B.kv_bytes
    assert LLAMA3_8B.attention_flops(1000) == 4 * 1000 * LLAMA3_8B.kv_bytes


def test_a_hugging_face_configuration_is_understood():
    found = Transformer.from_config(LLAMA3_CONFIG, "Llama-3-8B")
    assert found == LLAMA3_8B


def test_an_opt_configuration_is_understood():
    found = Transformer.from_config({
        "_name_or_path": "OPT-13B", "model_type": "opt", "num_hidden_layers": 40, "num_attention_heads": 40,
        "hidden_size": 5120, "ffn_dim": 20480, "vocab_size": 50272, "activation_function": "relu"})
    assert found == OPT_13B


def test_a_configuration_without_layers_is_refused():
    with pytest.raises(RequestError, match="none of num_hidden_layers, n_layer"):
        Transformer.from_config({name: LLAMA3_CONFIG[name] for name in LLAMA3_CONFIG if name != "num_hidden_layers"})


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": 0}, "layers of x must be a positive integer, not 0"),
    ({"kv_heads": 3}, "q_heads of x must be a multiple of kv_heads, not 32 and 3"),
    ({"weight_bits": 0}, "weight_bits of x must be positive, not 0"),
])
def test_geometry_without_sense_is_refused(change, message):
    fields = {name: getattr(LLAMA3_8B, name) for name in LLAMA3_8B.__slots__}
    with pytest.raises(RequestError, match=message):
        Transformer(**{**fields, "name": "x", **change})


class Configured:
    """Like a configuration of transformers."""

    def to_dict(self):
        return LLAMA3_CONFIG


def test_a_configuration_object_is_understood():
    assert Transformer.from_config(Configured(), "Llama-3-8B") == LLAMA3_8B


def test_the_text_part_of_a_larger_configuration_counts():
    found = Transformer.from_config({"model_type": "both", "text_config": LLAMA3_CONFIG}, "Llama-3-8B")
    assert found == LLAMA3_8B


def test_models_are_known_by_name_or_by_the_path_of_a_configuration(tmp_path):
    assert load_model("OPT-13B") is OPT_13B and load_model("llama-3-70b-int4") is LLAMA3_70B_INT4
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3_CONFIG))
    found = load_model(str(folder))
    assert found.name == "own" and found.weights == LLAMA3_8B.weights
    assert load_model(str(folder / "config.json")) == found


@pytest.mark.parametrize(("text", "message"), [
    ("{", "must be a Hugging Face config.json"),
    ("[1]", "must be a JSON object, not list"),
    ("{}", "none of hidden_size, n_embd"),
])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        load_model(str(tmp_path))


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(RequestError, match=r"no model 'gpt-9'; models are opt-13b, opt-30b, .*path of a Hugging Face"):
        load_model("gpt-9")


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_local_experts": 8}, "it has experts.*num_local_experts"),
    ({"kv_lora_rank": 512}, "latent vector"),
    ({"sliding_window": 4096}, "a window of 4096 tokens"),
    ({"num_attention_heads": 0}, "heads must be positive integers, not 0"),
    ({"quantization_config": {"quant_method": "odd"}}, "quantization_config must say bits"),
])
def test_what_would_be_computed_wrong_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        Transformer.from_config({**LLAMA3_CONFIG, **fields})


def test_no_configuration_at_all_is_refused():
    with pytest.raises(RequestError, match="config must be a dictionary or a configuration of transformers, not 3"):
        Transformer.from_config(3)


def test_a_window_that_is_not_used_is_none():
    assert Transformer.from_config({**LLAMA3_CONFIG, "sliding_window": 4096, "use_sliding_window": False}).layers == 32


@pytest.mark.parametrize(("packed", "bits"), [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
    ({"quant_method": "awq", "bits": 4, "group_size": -1}, 4),
    ({"quant_method": "fp8"}, 8),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
])
def test_packed_weights_are_counted(packed, bits):
    assert Transformer.from_config({**LLAMA3_CONFIG, "quantization_config": packed}).weight_bits == bits
    assert Transformer.from_config({**LLAMA3_CONFIG, "quantization_config": packed}, weight_bits=6).weight_bits == 6


@pytest.mark.parametrize(("name", "fields", "expected"), [
    ("LlamaConfig", LLAMA3_CONFIG, LLAMA3_8B),
    ("OPTConfig", {"num_hidden_layers": 40, "num_attention_heads": 40, "hidden_size": 5120, "ffn_dim": 20480,
                   "vocab_size": 50272}, OPT_13B),
])
def test_configurations_of_transformers_are_understood(name, fields, expected):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)(**{key: value for key, value in fields.items() if key != "model_type"})
    assert Transformer.from_config(config, expected.name) == expected


@pytest.mark.parametrize("name", ["GPT2Config", "Qwen2Config", "Qwen3Config", "GemmaConfig", "PhiConfig",
                                  "FalconConfig"])
def test_other_configurations_of_transformers_make_a_transformer(name):
    transformers = pytest.importorskip("transformers")
    found = Transformer.from_config(getattr(transformers, name)())
    assert found.weights > 0 and found.kv_bytes > 0
