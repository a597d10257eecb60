"""A U-Net of diffusers with its attention in the drive, and what is kept of it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra diffusion")
pytest.importorskip("diffusers", reason="needs the extra diffusion")

from diffusers import UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402

import kvattic  # noqa: E402
from kvattic import RequestError  # noqa: E402
from kvattic_sim.runs import koala, unet  # noqa: E402
from kvattic_sim.runs.diffusion import in_drive  # noqa: E402
from kvattic_sim.runs.koala_whole import STAGES, TEXT  # noqa: E402
from kvattic_sim.runs.outcome import Request  # noqa: E402

CONFIG = koala.CONFIG


def heads(tokens, seed=0):
    return torch.randn(3, 1, tokens, 2, 32, generator=torch.Generator().manual_seed(seed))


def test_the_layout_is_the_published_one():
    with torch.device("meta"):
        model = UNet2DConditionModel(**koala.LAYOUT, **koala.WIDTHS)
    # 0.78 billion, 69 percent less than SDXL's 2.57 (arXiv 2312.04005).
    assert round(sum(x.numel() for x in model.parameters()) / 1e6) == 783
    layers = [model.get_submodule(name.removesuffix(".processor")) for name in model.attn_processors]
    assert sorted(layer.heads for layer in layers) == sorted(
        stage.heads for stage in STAGES for _ in range(2 * stage.layers))
    assert {layer.inner_dim // layer.heads for layer in layers} == {64}


def test_a_dispatched_layer_is_diffusers_own():
    torch.manual_seed(0)
    layer = Attention(query_dim=32, cross_attention_dim=48, heads=2, dim_head=32)
    x, text = torch.randn(1, 9, 32), torch.randn(1, 5, 48)
    with torch.inference_mode():
        layer.set_processor(AttnProcessor2_0())
        expected = layer(x, encoder_hidden_states=text)
        layer.set_processor(unet.Dispatched("layer"))
        assert torch.equal(layer(x, encoder_hidden_states=text), expected)


def test_a_layer_with_more_to_it_is_refused():
    layer = Attention(query_dim=32, heads=1, dim_head=32, norm_num_groups=4, residual_connection=True)
    layer.set_processor(unet.Dispatched("mid.attn"))
    with pytest.raises(RequestError, match=r"layer mid\.attn has group_norm, residual_connection; layers of a"):
        layer(torch.randn(1, 4, 32))


def test_what_is_kept_is_written_once_and_again_only_if_it_changes():
    query, key, value = heads(20)
    with kvattic.open("model", CONFIG) as device, in_drive(device) as attention:
        def ask(key, name):
            return dispatch_attention_fn(query, key, value, attention_kwargs={"kept": name})

        first = ask(key, "a")
        assert torch.equal(ask(key, "a"), first) and (attention.kept.writes, attention.kept.calls) == (1, 2)
        ask(key, "b")
        assert attention.kept.writes == 2
        other = ask(-key, "a")
        assert attention.kept.writes == 3 and not torch.equal(other, first)
        assert torch.equal(ask(key, "a"), first) and attention.kept.writes == 4
        assert attention.error < 1e-5 and attention.new.calls == 0
        # Names make no difference to what is computed.
        assert torch.equal(dispatch_attention_fn(query, key, value), first) and attention.new.writes == 1
    assert attention.kept.attend.cycles > 0 and attention.kept.write.page_programs > 0


def test_the_narrow_unet_is_that_of_native_attention():
    attention, found = koala.slice_of("model", lambda line: None)
    assert len(found.features) == 21 and attention.kept.writes == 21 and attention.kept.calls == 42
    assert attention.new.writes == attention.new.calls == 42
    assert set(attention.tokens) == {16, 64, TEXT}
    # Most of the text is in flash, for a stripe has 16 tokens here.
    assert sum(attention.kept.attend.flash_bytes.values()) > 3 * sum(attention.kept.attend.dram_bytes.values())
    error, drifts = koala.references(found)
    assert 0 < attention.error < 1e-5 and 0 < error < 1e-5
    drive, native = drifts.values()
    assert 0 < drive < 2 * native < 1e-3


def test_features_of_another_picture_are_not_equal():
    given = koala.small()
    with in_drive(None, CONFIG.element):
        found = koala.denoise(given, 1)
    name = next(iter(found.features))
    found.features[name][0, 3] += 1
    assert koala.features_error(given, found) > 1e-3


def test_what_it_says_and_writes(tmp_path):
    path = tmp_path / "features.npz"
    found = koala.run(Request(output=path))
    assert found.good and found.bit_exact is None and len(found.runs) == 11
    with np.load(path) as file:
        assert len(file.files) == 22 and file["timesteps"].shape == (2,)
        assert file["down_blocks.1.attentions.0.transformer_blocks.0.attn1"].shape == (2, 64, 64)
        assert file["up_blocks.0.attentions.1.transformer_blocks.4.attn1"].shape == (2, 16, 128)
