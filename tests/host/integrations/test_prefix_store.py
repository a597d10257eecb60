"""`PrefixStore`: prompts that begin with stored texts, and what is kept of them."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic import TINY, CapacityError, RequestError
from kvattic.array import open_array
from kvattic.integrations.transformers import NAME, DriveCache, PrefixStore, config_for, digest_of
from kvattic.spec.formats import Element
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8, part=replace(TINY.part, blocks=64))
SEED = 5
"""Of what is sampled: one whose draws tell rounded queries, which the reference must have, from others."""


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture
def drive(model):
    with kvattic.open("model", config_for(model, ROOMY)) as device:
        yield device


def texts(rows=1, count=40, seed=1):
    return torch.randint(2, 256, (rows, count), generator=torch.Generator().manual_seed(seed))


def expected(model, tokens, **options):
    model.set_attn_implementation(REFERENCES[Element.FP16])
    torch.manual_seed(SEED)
    answer = model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=RoundedCache(model.config), **options)
    model.set_attn_implementation(NAME)
    return answer.tolist()


def store_of(drive, model, budget=10_000, **options):
    return PrefixStore(drive, model, budget_tokens=budget, **{"capacity_tokens": 250, "held_tokens": 0} | options)


@pytest.mark.parametrize("options", [
    {"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "samples"])
def test_prompts_that_go_on_from_a_text(model, drive, options):
    options = options | {"max_new_tokens": 20}
    prefix = texts(count=70)
    with store_of(drive, model) as store:
        block = store.block_tokens
        assert store.match(prefix[0]) == 0
        for turn in range(3):
            tokens = torch.cat([prefix, texts(count=11, seed=7 + turn)], dim=1)
            wanted = expected(model, tokens, **options)
            torch.manual_seed(SEED)
            assert store.generate(tokens, **options).tolist() == wanted
        found = store.statistics
        assert (found.lookups, found.hits, found.stored, found.texts) == (3, 2, 3, 3)
        assert found.matched_tokens == 2 * (70 // block * block) and found.asked_tokens == 3 * 81
        assert store.match(prefix[0]) == 70 // block * block
        assert found.tokens < sum(len(text.digests) for text in store._texts.values()) * block     # shared ones once
    assert drive.free_zones == drive.media.allocator.zones


def test_a_conversation_replaces_its_beginning(model, drive):
    with store_of(drive, model) as store:
        text = texts(count=40)
        for turn in range(3):
            text = store.generate(text, max_new_tokens=20, do_sample=False)
            text = torch.cat([text, texts(count=10, seed=turn + 20)], dim=1)
        assert store.statistics.texts == 1 and store.statistics.stored == 3 and store.statistics.hits == 2


def test_the_oldest_text_goes_first(model, drive):
    prompts = [texts(count=66, seed=seed) for seed in range(3)]
    with store_of(drive, model, budget=2 * 64) as store:
        assert 64 % store.block_tokens == 0
        for prompt in prompts[:2]:
            store.generate(prompt, max_new_tokens=1)
        with store.cache(prompts[0]):
            pass    # used again
        store.generate(prompts[2], max_new_tokens=1)
        assert [store.match(prompt) for prompt in prompts] == [64, 0, 64]
        assert store.statistics.evicted == 1 and store.statistics.tokens == 2 * 64
        store.clear()
        assert store.statistics.tokens == 0


def test_a_text_longer_than_the_budget_is_cut(model, drive):
    with store_of(drive, model, budget=40) as store:
        store.generate(texts(count=150), max_new_tokens=1)
        assert 0 < store.statistics.tokens <= 40


def test_a_full_drive_evicts(model):
    with (kvattic.open("model", config_for(model, TINY)) as device,
          store_of(device, model, capacity_tokens=200) as store):
        for seed in range(6):
            tokens = texts(count=100, seed=seed)
            try:
                store.generate(tokens, max_new_tokens=2)
            except CapacityError:   # the cache of a prompt that is not stored takes its room itself
                store.clear()
                store.generate(tokens, max_new_tokens=2)
        assert store.match(tokens[0]) > 0


def test_rows_share_what_all_have(model, drive):
    prefix = texts(count=64)
    tokens = torch.cat([prefix.expand(2, -1), texts(rows=2, count=9, seed=3)], dim=1)
    wanted = expected(model, tokens, max_new_tokens=10, do_sample=False)
    with store_of(drive, model) as store:
        store.generate(prefix, max_new_tokens=2)
        with store.cache(tokens) as cache:
            assert cache.get_seq_length() == 64
        assert store.generate(tokens, max_new_tokens=10, do_sample=False).tolist() == wanted
        other = torch.cat([tokens[:1], texts(count=73, seed=9)])
        with store.cache(other) as cache:
            assert cache.get_seq_length() == 0


@pytest.mark.parametrize("mode", ["sparf", "centroid", "codes"])
def test_sparse_modes(model, drive, mode):
    more = {"sparf": {"features": 16}, "centroid": {"unit_tokens": 16}, "codes": {}}[mode]
    options = {"mode": mode, "top_units": 4, **more}
    with store_of(drive, model, **options) as store:
        tokens = texts(count=150)
        answer = store.generate(tokens, max_new_tokens=10, do_sample=False)
        assert store.match(tokens[0]) > 0
        # What is stored has the sketches: an answer to the same prompt reads them.
        assert store.generate(tokens, max_new_tokens=10, do_sample=False).shape == answer.shape
        assert store.statistics.hits == 1
        with (DriveCache(drive, model.config, capacity_tokens=250) as dense,
              pytest.raises(RequestError, match="does not fit this DriveCache")):
            model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=dense, max_new_tokens=2)
            store.put(tokens[0], dense)


def test_models_are_told_apart(model, drive):
    other = small(seed=1)
    assert digest_of(model) == digest_of(small()) != digest_of(other)
    tokens = texts(count=70)
    with store_of(drive, model) as store:
        store.generate(tokens, max_new_tokens=1)
        with store.cache(tokens), store_of(drive, other, name=store.name) as same:
            assert same.match(tokens[0]) == 0   # a store knows its own texts only
            assert store.match(tokens[0]) == 64
    renamed = store_of(drive, model, name="mine")
    assert renamed.name == "mine"


def test_what_a_store_refuses(model, drive):
    with (open_array(["model"] * 2, config_for(model, ROOMY)) as array,
          pytest.raises(RequestError, match="single drive")):
        PrefixStore(array, model, budget_tokens=100)
    with pytest.raises(RequestError, match="must not be isolated"):
        store_of(drive, model, isolated=True)
    with pytest.raises(RequestError, match="budget_tokens must be a positive int"):
        store_of(drive, model, budget=0)
    with pytest.raises(TypeError, match="no option 'banana'"):
        store_of(drive, model, banana=1)
    hybrid = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32))
    hybrid.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(RequestError, match="some layers of this model are not in the drive"):
        store_of(drive, hybrid)
    tokens = texts(count=40)
    with store_of(drive, model) as store:
        for bad in (np.zeros(3), np.zeros((1, 0), int), np.zeros((1, 2, 3), int)):
            with pytest.raises(RequestError, match="tokens must be integers"):
                store.cache(bad)
        with pytest.raises(RequestError, match=r"integers \(tokens,\)"):
            store.match(texts(rows=2))
        with pytest.raises(RequestError, match="makes the cache itself"):
            store.generate(tokens, cache=None)
        with store.cache(tokens) as cache:
            with pytest.raises(RequestError, match="row must be an int"):
                store.put(tokens[0], cache)
            model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=cache, max_new_tokens=1)
            with pytest.raises(RequestError, match="holds 40 tokens in 40 positions, not these 50"):
                store.put(texts(count=50)[0], cache)
            with pytest.raises(RequestError, match="holds tokens already"):
                cache.adopt([])
        with (DriveCache(drive, model.config, capacity_tokens=100, isolated=True) as alone,
              pytest.raises(RequestError, match="not isolated")):
            model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=alone, max_new_tokens=1)
            store.put(tokens[0], alone)
        with drive.create_sequence(2, capacity_tokens=90, layers=2) as sequence:
            sequence.append(*np.zeros((2, 2, 3, 32), np.float16))
            cache = store.cache(tokens)
            with pytest.raises(RequestError, match="the same positions"):
                cache.adopt([sequence])
