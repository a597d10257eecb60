"""transformers' models with K and V in 8 bits in the drive, against eager attention over K and V rounded alike."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig
from transformers.cache_utils import EncoderDecoderCache

import kvattic
from kvattic import TINY, ConfigError, RequestError
from kvattic.integrations.storage import round_to_kv, stand_for
from kvattic.integrations.transformers import NAME, DriveCache, DriveEncoderDecoderCache, PrefixStore, config_for
from kvattic.spec.elements import from_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import to_kv_bits
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache, build, generate, prompts

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

FP8 = [KvFormat.FP8_E4M3, KvFormat.FP8_E5M2]
SCALES = {"key_scale": torch.tensor([[0.5, 0.037], [1.7, 2.0]]), "value_scale": torch.tensor([[0.1, 1.0], [3.3, 0.25]])}
"""Of the small llama: by layer and KV head."""


@pytest.mark.parametrize("kv", FP8)
@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_greedy_tokens_are_those_of_eager_attention(drive, name, kv):
    model, tokens = build(name, seed=1), prompts(name, seed=1)
    expected = generate(model, tokens, RoundedCache(model.config, kv=kv))
    assert expected.tolist() != generate(model, tokens, RoundedCache(model.config)).tolist(), "rounding shows nowhere"
    with DriveCache(drive(model, kv=kv), model.config, capacity_tokens=128, held_tokens=16, kv=kv) as cache:
        assert generate(model, tokens, cache).tolist() == expected.tolist()
        assert cache.sequences[0].flushed() > tokens.shape[1]


@pytest.mark.parametrize("kv", KvFormat)
def test_scales_of_heads(drive, kv):
    """Also of a drive that stores elements, where a scale only changes what is rounded how."""
    model, tokens = build("llama", seed=1), prompts("llama", seed=1)
    expected = generate(model, tokens, RoundedCache(model.config, kv=kv, **SCALES))
    with DriveCache(drive(model, kv=kv), model.config, capacity_tokens=128, held_tokens=16, **SCALES) as cache:
        assert generate(model, tokens, cache).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, SCALES], ids=["one", "scales"])
def test_logits_are_those_of_eager_attention(drive, options):
    model, tokens = build("llama", seed=2), prompts("llama", seed=2)
    kv, found = KvFormat.FP8_E4M3, []
    with DriveCache(drive(model, kv=kv), model.config, capacity_tokens=128, **options) as ours, torch.no_grad():
        for name, cache in ((NAME, ours), (REFERENCES[Element.FP16], RoundedCache(model.config, kv=kv, **options))):
            model.set_attn_implementation(name)
            first = model(tokens[:, :25], cache=cache).logits
            found.append(torch.cat([first, *(model(tokens[:, i : i + 1], cache=cache).logits
                                             for i in range(25, 30))], dim=1))
    apart = (found[0] - found[1]).abs().amax(dim=2)
    assert apart.median() < 1e-5
    assert apart.max() < 1e-3, "a last bit of float32 may make a number round the other way"


def test_a_model_in_bfloat16(drive):
    model, tokens = build("llama", seed=1).to(torch.bfloat16), prompts("llama", seed=1)
    with DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128) as cache:
        assert cache.device.config.element is Element.BF16
        model.set_attn_implementation(NAME)
        assert len(generate(model, tokens, cache, new=20)[0]) == 20
        key, _ = cache.sequences[0].read(0, 0, 5)
        assert torch.equal(torch.from_numpy(key).to(torch.float8_e4m3fn).float(), torch.from_numpy(key))


@pytest.mark.parametrize("mode", [{"mode": "sparf", "features": 16, "top_units": 8},
                                  {"mode": "centroid", "top_units": 4}])
def test_sparse_steps_are_the_sequences_own(drive, mode):
    """What is selected of much is something else; attending all units is dense attention."""
    model, tokens = build("llama", seed=1), prompts("llama", seed=1)
    with DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128, **SCALES) as dense:
        expected = generate(model, tokens, dense, new=30).tolist()
    everything = mode | {"top_units": 120}
    with DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128, **everything, **SCALES) as cache:
        assert generate(model, tokens, cache, new=30).tolist() == expected
    with DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128, held_tokens=0, sinks=0, **mode,
                    **SCALES) as cache:
        assert len(generate(model, tokens, cache, new=30)[0]) == 30


def test_an_encoders_tokens_too(drive):
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=256, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128,
        init_std=0.15)).eval()
    tokens, kv = prompts("llama", seed=1), KvFormat.FP8_E4M3
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "decoder_start_token_id": 2,
               "eos_token_id": None}
    model.set_attn_implementation(REFERENCES[Element.FP16])
    expected = model.generate(tokens, cache=EncoderDecoderCache(
        RoundedCache(model.config, kv=kv), RoundedCache(model.config, kv=kv)), **options)
    model.set_attn_implementation(NAME)
    with DriveEncoderDecoderCache(drive(model, kv=kv), model.config, capacity_tokens=64, kv=kv) as cache:
        assert model.generate(tokens, cache=cache, **options).tolist() == expected.tolist()


# Rounding.


@pytest.mark.parametrize("kv", FP8)
def test_rounding_is_the_librarys(kv):
    rng = torch.Generator().manual_seed(0)
    shape = (1, 2, 500, 32)
    values = torch.randn(shape, generator=rng) * torch.exp2(torch.randint(-20, 3, shape, generator=rng))
    drive, scale = kvattic.Config(kv=kv), torch.tensor([0.037, 3.0])
    for given in (values, values.half(), values.bfloat16(), values.double()):
        wanted = from_bits(to_kv_bits(given.to(torch.float64).numpy(), kv, Element.FP16), Element.FP16)
        assert torch.equal(round_to_kv(given, drive).float(), torch.from_numpy(wanted))
        stored = round_to_kv(given, drive, scale)
        wide = given if given.dtype == torch.float64 else given.float()
        wanted = to_kv_bits((wide / scale[:, None, None].to(wide.dtype)).numpy(), kv, Element.FP16)
        assert torch.equal(stored.float(), torch.from_numpy(from_bits(wanted, Element.FP16)))
        assert stand_for(stored, scale, given.dtype).dtype == given.dtype
    assert not round_to_kv(torch.full((1, 2, 1, 1), 65_000.0), drive).isfinite().any()
    assert round_to_kv(torch.full((1, 2, 1, 1), kv.encoding.largest), drive).isfinite().all()


def test_numbers_that_do_not_fit(drive):
    model, tokens = build("llama", seed=1), prompts("llama", seed=1)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1e4
    with (DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128) as cache,
          pytest.raises(RequestError, match=r"key\[.* must be finite and within the range of fp8_e4m3, which a scale")):
        generate(model, tokens, cache)
    wide = {"key_scale": 1e4}
    with DriveCache(drive(model, kv="fp8_e4m3"), model.config, capacity_tokens=128, **wide) as cache:
        generate(model, tokens, cache, new=2)


# What does not go together.


def test_formats_that_the_drive_lacks(drive):
    model = build("llama")
    with pytest.raises(ConfigError, match=r"stores K and V as element, not fp8_e4m3: .*config_for\(model, kv='fp8"):
        DriveCache(drive(model), model.config, kv="fp8_e4m3")
    with pytest.raises(ConfigError, match="stores K and V as fp8_e5m2, not fp8_e4m3"):
        DriveCache(drive(model, kv="fp8_e5m2"), model.config, kv=KvFormat.FP8_E4M3)
    with pytest.raises(RequestError, match="kv must be one of element, fp8_e4m3, fp8_e5m2, not 'q8_0'"):
        DriveCache(drive(model), model.config, kv="q8_0")
    with pytest.raises(ConfigError, match=r"kv must be one of .*'fp8_e5m2'.*, not 'q8_0'"):
        config_for(model, kv="q8_0")
    with (DriveCache(drive(model, kv="fp8_e4m3"), model.config, key_scale=-1.0) as cache,
          pytest.raises(RequestError, match="key_scale of layer 0, KV head 0 must be positive")):
        generate(model, prompts("llama"), cache, new=2)


@pytest.mark.parametrize(("dim", "lane_channels"), [(128, 4), (80, 2), (32, 2)])
def test_configurations_for_models(dim, lane_channels):
    """A token must be whole beats, so that lanes have fewer channels for some heads."""
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, num_key_value_heads=2, head_dim=dim)
    found = config_for(config, kv="fp8_e4m3")
    assert (found.kv, found.head_dim, found.lane_channels) == (KvFormat.FP8_E4M3, dim, lane_channels)
    assert config_for(config).lane_channels == 4
    with pytest.raises(ConfigError, match="beat_bytes" if dim != 128 else "kv"):
        config_for(config, kv="fp8_e4m3" if dim != 128 else "fp8", beat_bytes=32)


# Texts that stay.


def test_a_cache_goes_on_after_the_process(tmp_path):
    model, tokens = build("llama", seed=1), prompts("llama", seed=1)
    model.set_attn_implementation(NAME)
    config = config_for(model, replace(TINY, dies=8), kv="fp8_e5m2")
    options = {"capacity_tokens": 200, "held_tokens": 8, **SCALES}
    with kvattic.open("model", config) as device, DriveCache(device, model.config, **options) as cache:
        expected = generate(model, tokens, cache, new=60).tolist()
    with kvattic.open("model", config, image=tmp_path / "flash") as device:
        cache = DriveCache(device, model.config, **options)
        first = generate(model, tokens, cache, new=30)
        cache.save(tmp_path / "cache")
    with (kvattic.open("model", config, image=tmp_path / "flash") as device,
          pytest.raises(RequestError, match=r"a sequence with key_scale .* does not fit this DriveCache, whose is N")):
        DriveCache.load(device, model.config, tmp_path / "cache", **{**options, "key_scale": None})
    with (kvattic.open("model", config, image=tmp_path / "flash") as device,
          DriveCache.load(device, model.config, tmp_path / "cache", **options) as cache):
        assert first.tolist()[0] == expected[0][:30]
        rest = generate(model, torch.cat([tokens, first], dim=1), cache, new=30)
        assert rest.tolist()[0] == expected[0][30:]


def test_prefixes_are_shared():
    model = build("llama", seed=1)
    model.set_attn_implementation(NAME)
    part = replace(TINY.part, blocks=64)
    tokens = torch.randint(2, 256, (1, 90), generator=torch.Generator().manual_seed(1))
    other = torch.cat([tokens[:, :70], tokens[:, :9]], dim=1)
    with kvattic.open("model", config_for(model, replace(TINY, dies=8, part=part), kv="fp8_e4m3")) as device:
        with DriveCache(device, model.config, capacity_tokens=200, **SCALES) as cache:
            expected = generate(model, other, cache, new=20).tolist()
        with PrefixStore(device, model, budget_tokens=4000, capacity_tokens=200, held_tokens=0, **SCALES) as store:
            store.generate(tokens, max_new_tokens=4, do_sample=False)
            found = store.generate(other, max_new_tokens=20, do_sample=False)
            assert found[:, other.shape[1] :].tolist() == expected
            assert store.statistics.matched_tokens == 70 // store.block_tokens * store.block_tokens > 0
