"""Copies of rows of a `DriveCache`: the same tokens as with transformers' own cache over K and V rounded alike."""

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic import TINY
from kvattic.array import open_array
from kvattic.integrations.transformers import NAME, DriveCache, config_for
from kvattic.spec.formats import Element
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8, part=replace(TINY.part, blocks=64))
MODES = {
    "dense": {},
    "sparf": {"mode": "sparf", "features": 16, "top_units": 1 << 9, "sinks": 0},
    "isolated": {"isolated": True},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()


@pytest.fixture
def drive(model):
    with kvattic.open("model", config_for(model, ROOMY)) as device:
        yield device


def texts(rows=1, count=40, seed=1):
    return torch.randint(2, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, cache, **options):
    model.set_attn_implementation(NAME if isinstance(cache, DriveCache) else REFERENCES[Element.FP16])
    torch.manual_seed(5)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        return model.generate(tokens, attention_mask=mask, cache=cache, **options)


@pytest.mark.parametrize("mode", ["dense", "isolated"])
@pytest.mark.parametrize("options", [
    {"num_beams": 3, "do_sample": False, "max_new_tokens": 40},
    {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 20},
    {"num_beams": 3, "do_sample": True, "max_new_tokens": 20},
    {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 20},
], ids=["beams", "returned", "sampled-beams", "returned-samples"])
def test_beams_and_samples(model, drive, options, mode):
    tokens = texts(rows=2)
    free = drive.free_zones, drive.free_dram_pages
    expected = run(model, tokens, RoundedCache(model.config), **options)
    with DriveCache(drive, model.config, capacity_tokens=100, held_tokens=8, **MODES[mode]) as cache:
        assert run(model, tokens, cache, **options).tolist() == expected.tolist()
        report = cache.report()
        assert report.rows == 2 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        assert report.append.written_bytes > 0
    assert (drive.free_zones, drive.free_dram_pages) == free


@pytest.mark.parametrize("mode", MODES)
def test_one_prefix_for_many_prompts(model, drive, mode):
    prefix, options = texts(count=70), MODES[mode]
    with DriveCache(drive, model.config, capacity_tokens=160, **options) as first:
        run(model, prefix, first, max_new_tokens=1)
        programs = drive.statistics().page_programs
        for seed in range(3):
            tokens = torch.cat([prefix, texts(count=9, seed=50 + seed)], dim=1)
            expected = run(model, tokens, RoundedCache(model.config), do_sample=False, max_new_tokens=30)
            with copy.deepcopy(first) as cache:
                assert drive.statistics().page_programs == programs or seed
                assert run(model, tokens, cache, do_sample=False, max_new_tokens=30).tolist() == expected.tolist()
            assert first.get_seq_length() == 70


@pytest.mark.parametrize("left", [64, 50])
def test_back_to_a_prefix(model, drive, left):
    """`crop` to what is in flash, at a stripe's end or not."""
    with DriveCache(drive, model.config, capacity_tokens=200, held_tokens=4) as cache:
        for seed in range(3):
            tokens = torch.cat([texts(count=left), texts(count=20, seed=seed + 9)], dim=1)
            expected = run(model, tokens, RoundedCache(model.config), do_sample=False, max_new_tokens=40)
            assert run(model, tokens, cache, do_sample=False, max_new_tokens=40).tolist() == expected.tolist()
            assert cache.sequences[0].flushed() > left
            cache.crop(left - cache.get_seq_length())
            assert cache.get_seq_length() == cache.sequences[0].length() == left
        assert cache.report().rows == 1
    assert drive.free_zones == drive.media.allocator.zones


def test_rows_are_repeated_and_selected(model, drive):
    tokens = texts(rows=2, count=30)
    ours, theirs = DriveCache(drive, model.config, capacity_tokens=100), RoundedCache(model.config)
    for cache in (ours, theirs):
        run(model, tokens, cache, max_new_tokens=1)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([5, 0, 1]))
    following = torch.cat([tokens[[1, 0, 0]], texts(rows=3, count=5, seed=3)], dim=1)
    answers = [run(model, following, cache, do_sample=False, max_new_tokens=30).tolist() for cache in (ours, theirs)]
    assert answers[0] == answers[1]
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([False, True, True]))
    assert ours.layers[1].batch_size == len(ours.sequences) == 2
    ours.reset()
    assert drive.free_zones == drive.media.allocator.zones


def test_guidance_with_two_caches(model, drive):
    """Classifier-free guidance: the logits of two texts that go on alike, each with a cache of its own."""
    def guided(make):
        with torch.no_grad():
            texts_, caches = [texts(count=40), texts(count=40)[:, -1:]], [make(), make()]
            found = []
            for _ in range(20):
                logits = [model(text, cache=cache).logits[:, -1].log_softmax(-1)
                          for text, cache in zip(texts_, caches, strict=True)]
                found.append(int((logits[1] + 1.5 * (logits[0] - logits[1])).argmax()))
                texts_ = [torch.tensor([[found[-1]]])] * 2
            return found

    model.set_attn_implementation(REFERENCES[Element.FP16])
    expected = guided(lambda: RoundedCache(model.config))
    model.set_attn_implementation(NAME)
    assert guided(lambda: DriveCache(drive, model.config, capacity_tokens=100)) == expected


@pytest.mark.parametrize("split", ["heads", "context"])
def test_beams_on_several_drives(model, split):
    tokens = texts()
    expected = run(model, tokens, RoundedCache(model.config), num_beams=3, do_sample=False, max_new_tokens=20)
    with (open_array(["model"] * 2, config_for(model, ROOMY)) as array,
          DriveCache(array, model.config, capacity_tokens=100, split=split) as cache):
        answer = run(model, tokens, cache, num_beams=3, do_sample=False, max_new_tokens=20)
    assert answer.tolist() == expected.tolist()


