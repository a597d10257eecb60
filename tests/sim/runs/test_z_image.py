"""A diffusion transformer of diffusers with its attention in the drive."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra diffusion")
pytest.importorskip("diffusers", reason="needs the extra diffusion")

from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402

import kvattic  # noqa: E402
from kvattic import RequestError  # noqa: E402
from kvattic_sim.runs import z_image  # noqa: E402
from kvattic_sim.runs.diffusion import in_drive  # noqa: E402
from kvattic_sim.runs.outcome import Request  # noqa: E402

CONFIG = z_image.CONFIG


def heads(tokens, seed=0, dim=32):
    return torch.randn(3, 2, tokens, 2, dim, generator=torch.Generator().manual_seed(seed))


def test_calls_of_diffusers_come_to_the_drive():
    query, key, value = heads(40)
    before = dispatch_attention_fn(query, key, value)
    with kvattic.open("model", CONFIG) as device, in_drive(device) as attention:
        found = dispatch_attention_fn(query, key, value)
    assert attention.tokens == [40, 40] and 0 < attention.error < 1e-5
    torch.testing.assert_close(found, before, rtol=0, atol=5e-3)     # of numbers that are not rounded
    assert attention.attend.cycles > 0 and attention.write.written_bytes > 0
    assert torch.equal(dispatch_attention_fn(query, key, value), before)     # the native backend is back


def test_the_native_backend_is_back_after_an_error():
    query, key, value = heads(8)
    before = dispatch_attention_fn(query, key, value)
    with kvattic.open("model", CONFIG) as device, in_drive(device):
        with pytest.raises(RequestError, match="without attn_mask, is_causal and dropout_p"):
            dispatch_attention_fn(query, key, value, is_causal=True)
        with pytest.raises(RequestError, match="head_dim of the model is 16, the drive's 32; they must be equal"):
            dispatch_attention_fn(*heads(8, dim=16))
    assert torch.equal(dispatch_attention_fn(query, key, value), before)


def test_the_small_transformer_is_that_of_native_attention():
    attention, difference, output = z_image.slice_of("model", lambda line: None)
    assert attention.error < 1e-5 and difference < 1e-5
    assert output.shape == (4, 1, 8, 8)
    # Two refiners of the text, or of the picture, alone; then all tokens in one stream.
    assert max(attention.tokens) > 64 and attention.tokens.count(max(attention.tokens)) == 2


def test_what_it_says():
    found = z_image.run(Request())
    assert found.good and found.bit_exact is None and len(found.runs) == 4
    assert found.figures["counted_reads_of_each_byte_of_k_and_v"] == (z_image.IMAGE + z_image.TEXT) / 8
    drive, gpu = (found.figures[f"modelled_seconds_of_a_step_{what}"] for what in ("in_the_drive",
                                                                                 "s_attention_on_the_gpu"))
    assert drive > 100 * gpu    # a drive is wrong for this, and the figures say so
