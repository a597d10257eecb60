"""Geometry of transformers: what is known of the published models, and what a configuration must say."""

import pytest

from kvattic.errors import RequestError
from kvattic_sim.system.transformer import LLAMA2_13B, LLAMA3_8B, LLAMA3_70B_INT4, OPT_13B, OPT_30B, Transformer

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
