"""A `DriveCache` and a `PrefixStore` that outlive the process."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic import TINY, RequestError
from kvattic.array import open_array
from kvattic.integrations.transformers import NAME, DriveCache, PrefixStore, config_for

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8, part=replace(TINY.part, blocks=64))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    made.set_attn_implementation(NAME)
    return made


def texts(rows=1, count=40, seed=1):
    return torch.randint(2, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, cache, new, mask=None):
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, cache=cache, do_sample=False, max_new_tokens=new)


def opened(model, folder):
    return kvattic.open("model", config_for(model, ROOMY), image=folder / "flash")


@pytest.mark.parametrize("options", [{}, {"mode": "sparf", "features": 16, "top_units": 8}, {"isolated": True}],
                         ids=["dense", "sparf", "isolated"])
def test_a_generation_goes_on(model, tmp_path, options):
    options = options | {"capacity_tokens": 200, "held_tokens": 8}
    tokens = texts(rows=2)
    mask = torch.ones_like(tokens)
    mask[1, :7], tokens[1, :7] = 0, 0
    with (kvattic.open("model", config_for(model, ROOMY)) as device,
          DriveCache(device, model.config, **options) as cache):
        expected = run(model, tokens, cache, 60, mask)
    device = opened(model, tmp_path)
    cache = DriveCache(device, model.config, **options)
    half = run(model, tokens, cache, 30, mask)
    cache.save(tmp_path / "saved", note=half.tolist())
    run(model, half, cache, 10, torch.cat([mask, torch.ones(2, 30, dtype=mask.dtype)], dim=1))
    device.transport.close()    # the process is gone
    with (opened(model, tmp_path) as device,
          DriveCache.load(device, model.config, tmp_path / "saved", **options) as cache):
        assert cache.get_seq_length() == 69 and cache.note == half.tolist()
        whole = torch.cat([mask, torch.ones(2, 30, dtype=mask.dtype)], dim=1)
        assert run(model, torch.tensor(cache.note), cache, 30, whole).tolist() == expected.tolist()
        assert cache.report().rows == 2


def test_a_store_comes_back(model, tmp_path):
    options = {"budget_tokens": 1000, "capacity_tokens": 200, "held_tokens": 0}
    prefix = texts(count=70)
    device = opened(model, tmp_path)
    store = PrefixStore(device, model, **options)
    for seed in range(2):
        store.generate(torch.cat([prefix, texts(count=9, seed=seed)], dim=1), max_new_tokens=3)
    before = store.statistics
    store.save(tmp_path / "saved")
    device.transport.close()
    tokens = torch.cat([prefix, texts(count=20, seed=5)], dim=1)
    with kvattic.open("model", config_for(model, ROOMY)) as other, DriveCache(
            other, model.config, capacity_tokens=200) as cache:
        expected = run(model, tokens, cache, 10)
    with opened(model, tmp_path) as device:
        with PrefixStore.load(device, model, tmp_path / "saved", **options) as store:
            assert (store.statistics.texts, store.statistics.tokens) == (before.texts, before.tokens)
            assert store.generate(tokens, max_new_tokens=10, do_sample=False).tolist() == expected.tolist()
            assert store.statistics.matched_tokens == 70 // store.block_tokens * store.block_tokens
        device.discard_saved(tmp_path / "saved")
        assert device.free_zones == device.media.allocator.zones


def test_what_does_not_fit_is_refused(model, tmp_path):
    with opened(model, tmp_path) as device, DriveCache(device, model.config, capacity_tokens=100) as cache:
        with pytest.raises(RequestError, match="nothing to save"):
            cache.save(tmp_path / "saved")
        run(model, texts(), cache, 3)
        cache.save(tmp_path / "saved")
        cache.update(*torch.zeros(2, 1, 2, 1, 32), 0)
        with pytest.raises(RequestError, match="between two steps"):
            cache.save(tmp_path / "saved")
    wrong = {
        "is not of a PrefixStore": lambda device: PrefixStore.load(device, model, tmp_path / "saved", budget_tokens=9),
        "with mode='dense', not 'sparf'": lambda device: DriveCache.load(
            device, model.config, tmp_path / "saved", capacity_tokens=100, mode="sparf", features=8, top_units=4),
        "does not fit this DriveCache": lambda device: DriveCache.load(
            device, LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
            tmp_path / "saved", capacity_tokens=100)}
    for message, load in wrong.items():
        with opened(model, tmp_path) as device, pytest.raises(RequestError, match=message):
            load(device)
    with opened(model, tmp_path) as device:     # and nothing was lost by that
        assert DriveCache.load(device, model.config, tmp_path / "saved", capacity_tokens=100).get_seq_length() == 42
    with opened(model, tmp_path) as device, PrefixStore(device, model, budget_tokens=100, name="one") as store:
        store.save(tmp_path / "store")
    for message, load in {
            "is not of a DriveCache": lambda device: DriveCache.load(device, model.config, tmp_path / "store"),
            "of another model: one, not two": lambda device: PrefixStore.load(
                device, model, tmp_path / "store", budget_tokens=100, name="two")}.items():
        with opened(model, tmp_path) as device, pytest.raises(RequestError, match=message):
            load(device)
    with (open_array(["model"] * 2, config_for(model, ROOMY)) as array,
          DriveCache(array, model.config, capacity_tokens=100) as cache):
        run(model, texts(), cache, 2)
        with pytest.raises(RequestError, match="on a single drive"):
            cache.save(tmp_path / "array")
