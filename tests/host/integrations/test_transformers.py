"""transformers' models with K and V in the drive, against their own eager attention over rounded K and V."""

import copy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    pytest.skip(f"no {' and no '.join(missing)}: pip install 'kvattic[transformers]'", allow_module_level=True)

import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    MistralConfig,
)
from transformers.masking_utils import bidirectional_mask_function

import kvattic
from kvattic import TINY, CapacityError, ConfigError, KvatticError, Mode, RequestError
from kvattic.array import open_array
from kvattic.errors import RangeError
from kvattic.integrations.backend import attention
from kvattic.integrations.configuration import longest_window
from kvattic.integrations.masks import make_mask, read_mask
from kvattic.integrations.transformers import NAME, DriveCache, DriveLayer, config_for, round_to_storage
from kvattic.spec.formats import Element, KvFormat
from kvattic_sim.lm import huggingface as lm
from kvattic_sim.lm import model as numpy_lm
from kvattic_sim.reports.benches import generate as bench
from kvattic_sim.reports.benches.generate import ARCHITECTURES, RoundedCache, build, generate, prompts

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8)
"""TINY with room for several sequences."""


def small(heads=4, kv_heads=2, dim=32, layers=1, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, **changes)).eval()


def padded(lengths, width=30, seed=5):
    """Prompts of different lengths, padded on the left; and their mask."""
    tokens = torch.randint(2, 256, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


# The same tokens.


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_tokens_are_those_of_eager_attention(drive, name, seed):
    model, tokens = build(name, seed), prompts(name, seed)
    expected = generate(model, tokens, RoundedCache(model.config))
    assert len(set(expected[0].tolist())) > 8, "says nothing: the answer repeats itself"
    with DriveCache(drive(model), model.config, capacity_tokens=128, held_tokens=16) as cache:
        assert generate(model, tokens, cache).tolist() == expected.tolist()
        assert cache.sequences[0].length() == tokens.shape[1] + 63
        assert cache.sequences[0].flushed() > tokens.shape[1]


def test_the_projects_own_model_too(drive):
    model, tokens = build("lm"), prompts("lm", seed=1)
    with DriveCache(drive(model, "paper"), model.config, held_tokens=0) as cache:
        answer = generate(model, tokens, cache)
    assert answer.tolist() == generate(model, tokens, RoundedCache(model.config)).tolist()


def test_the_projects_own_model_is_the_one_in_numpy():
    text = numpy_lm.load_held_out().windows[0][:64].astype(np.int64)
    rounded, _ = numpy_lm.load().forward(text)
    with torch.no_grad():
        logits = lm.load()(torch.from_numpy(text)[None]).logits[0].numpy()
    # One rounds queries, keys and values to float16, the other does not.
    np.testing.assert_allclose(logits, rounded, atol=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_of_different_lengths(drive, name):
    model = build(name, seed=3)
    tokens, mask = padded([17, 30, 1])
    expected = generate(model, tokens, RoundedCache(model.config), mask=mask, new=20)
    with DriveCache(drive(model), model.config, capacity_tokens=64, held_tokens=0) as cache:
        assert generate(model, tokens, cache, mask=mask, new=20).tolist() == expected.tolist()
        assert [sequence.length() for sequence in cache.sequences] == [17 + 19, 30 + 19, 1 + 19], "padding was stored"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_are_verified_in_one_pass_and_removed_where_they_are_wrong(drive, name):
    model = build(name, seed=3)
    draft = copy.deepcopy(model)    # a draft model that is often right
    draft.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in draft.model.parameters():
            if parameter.ndim == 2:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    draft.generation_config.update(num_assistant_tokens=7, num_assistant_tokens_schedule="constant",
                                   assistant_confidence_threshold=0)
    tokens = prompts(name, seed=5)
    expected = generate(model, tokens, RoundedCache(model.config))
    device = drive(model, queries=8)
    with DriveCache(device, model.config, capacity_tokens=128, held_tokens=16) as cache:
        passes, crops = [], []
        attend_many, crop = device.attend_many, cache.crop
        device.attend_many = lambda plans: passes.append(plans[0]) or attend_many(plans)
        cache.crop = lambda tokens: crops.append(tokens) or crop(tokens)
        assert generate(model, tokens, cache, assistant_model=draft).tolist() == expected.tolist()
        assert cache.sequences[0].flushed() > tokens.shape[1], "nothing went to flash"
    assert min(crops) < -3, "no draft was removed"
    assert len(passes) < 60 * len(cache.layers), "no draft was accepted"
    full = [plan for plan in passes if plan.shape[1] == 8]
    assert full
    rows = 8 * model.config.num_attention_heads
    assert all(len(plan.jobs) == -(-rows // device.config.rows // plan.sequence.kv_heads) * plan.sequence.kv_heads
               for plan in full)


def test_a_conversation_goes_on(drive):
    model, first, second = small(layers=2), prompts("llama", seed=1), prompts("llama", seed=2)
    answers = []
    ours = DriveCache(drive(model), model.config, capacity_tokens=200, held_tokens=0)
    for cache in (RoundedCache(model.config), ours):
        said = torch.cat([first, generate(model, first, cache, new=20), second], dim=1)
        answers.append(generate(model, said, cache, new=20).tolist())
    assert answers[0] == answers[1]


def test_an_answer_can_be_taken_back(drive):
    model, tokens = small(), prompts("llama", seed=1)
    with DriveCache(drive(model), model.config, capacity_tokens=200) as cache:
        first = generate(model, tokens, cache, new=20)
        cache.crop(tokens.shape[1] - 1 - cache.get_seq_length())
        assert cache.get_seq_length() == cache.sequences[0].length() == tokens.shape[1] - 1
        assert generate(model, tokens, cache, new=20).tolist() == first.tolist()
        cache.crop(0)
        with pytest.raises(RequestError, match="crop takes minus the number"):
            cache.crop(10)


def test_batches_one_after_the_other(drive):
    model = small()
    device = drive(model)
    zones, pages = device.free_zones, device.free_dram_pages
    cache = DriveCache(device, model.config, capacity_tokens=100)
    for lengths in ([30], [4, 30]):
        tokens, mask = padded(lengths)
        expected = generate(model, tokens, RoundedCache(model.config), mask=mask, new=5)
        assert generate(model, tokens, cache, mask=mask, new=5).tolist() == expected.tolist()
        assert cache.batch_size == len(lengths)
        assert device.free_dram_pages < pages
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size, cache.sequences) == (0, -1, [])
        assert (device.free_zones, device.free_dram_pages) == (zones, pages)


def test_several_drives(drive):
    model, tokens = small(layers=2), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config), new=20)
    config = config_for(model, ROOMY)
    for split in ("heads", "context"):
        with open_array(["model", "model"], config) as array:
            cache = DriveCache(array, model.config, capacity_tokens=100, split=split)
            assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()
            with pytest.raises(RequestError, match="from a single drive only"):
                cache.crop(-1)
            with pytest.raises(RequestError, match="from a single drive only"):
                cache.activate_past_recording()


@pytest.mark.parametrize("dim", [8, 24, 80])
def test_heads_that_are_smaller_than_the_drives(drive, dim):
    model, tokens = small(dim=dim), prompts("llama")
    device = drive(model, "paper")
    assert device.config.head_dim == {8: 32, 24: 32, 80: 80}[dim]
    with DriveCache(device, model.config, held_tokens=0) as cache:
        answer = generate(model, tokens, cache, new=20)
    assert answer.tolist() == generate(model, tokens, RoundedCache(model.config), new=20).tolist()


def test_bf16(drive):
    model, tokens = small(), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config, Element.BF16), new=20)
    assert expected.tolist() != generate(model, tokens, RoundedCache(model.config), new=20).tolist()
    with DriveCache(drive(model, element=Element.BF16), model.config, capacity_tokens=100, held_tokens=0) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()


def test_bf16_back_into_a_stripe_in_flash(drive):
    model, tokens = small(), prompts("llama")
    with DriveCache(drive(model, element=Element.BF16), model.config, capacity_tokens=200, held_tokens=0) as cache:
        expected = generate(model, tokens, cache, new=40).tolist()
        left = tokens.shape[1] - 1
        assert left % cache.sequences[0].stripe_tokens and left < cache.sequences[0].flushed()
        cache.crop(left - cache.get_seq_length())
        assert generate(model, tokens, cache, new=40).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(drive, dtype):
    model = small().to(dtype)
    device = drive(model)
    assert device.config.element is (Element.BF16 if dtype == torch.bfloat16 else Element.FP16)
    with DriveCache(device, model.config, capacity_tokens=100) as cache:
        assert generate(model, prompts("llama"), cache, new=5).shape == (1, 5)


def test_the_bench():
    shares = bench.match(seeds=1, new=4)
    assert shares == dict.fromkeys([*ARCHITECTURES, "lm"], 1.0)


# K and V of different widths; a range of tokens for each query.


@pytest.mark.parametrize("key, value", [(32, 16), (32, 24), (16, 32), (24, 40)])
def test_v_of_another_width_than_k(drive, key, value):
    torch.manual_seed(0)
    model = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=key, v_head_dim=value, layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense"] * 2, max_position_embeddings=128, initializer_range=0.15, pad_token_id=0,
        bos_token_id=None, eos_token_id=None)).eval()
    tokens, mask = padded([30, 17])
    expected = generate(model, tokens, RoundedCache(model.config), mask=mask, new=20)
    device = drive(model, replace(kvattic.GQA, channels=2))
    assert device.config.head_dim == (32 if max(key, value) <= 32 else 64)
    with DriveCache(device, model.config, held_tokens=0) as cache:
        assert generate(model, tokens, cache, mask=mask, new=20).tolist() == expected.tolist()


def gemma4(kv_heads=2):
    torch.manual_seed(0)
    return Gemma4ForCausalLM(Gemma4TextConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_global_key_value_heads=kv_heads, head_dim=32, global_head_dim=64, sliding_window=24,
        attention_k_eq_v=kv_heads != 2, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=256, max_position_embeddings=128,
        initializer_range=0.15, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()


def test_layers_of_different_widths(drive):
    model, tokens = gemma4(), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config), new=20)
    device = drive(model, replace(kvattic.GQA, channels=2))
    assert device.config.head_dim == 64
    with DriveCache(device, model.config, held_tokens=0) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()
    with pytest.raises(ConfigError, match="layers with 4 query and 1 KV heads and 4 query and 2 KV heads"):
        config_for(gemma4(kv_heads=1))


def llama4(chunk):
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, attention_chunk_size=chunk, moe_layers=[],
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], max_position_embeddings=256,
        initializer_range=0.15, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()


TURNS = {
    "whole": torch.ones(3, 9, dtype=torch.int64),
    "padded on the left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]]),
    "padded in the middle": torch.tensor([[1] * 9, [1] + [0] * 4 + [1] * 4, [1, 1, 0, 1, 0, 0, 1, 1, 1]]),
    "padded on the right": torch.tensor([[1] * 9, [1] * 3 + [0] * 6, [1] * 8 + [0]]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("model", [lambda: build("mistral"), lambda: build("qwen2"), lambda: llama4(8), small],
                         ids=["window of 40", "window of 24", "chunks of 8", "all"])
def test_turns_of_different_lengths(drive, model, turn):
    """The next turns of a batch's conversations: every token's logits, and those of the answers."""
    model = model()
    tokens, first = padded([30, 21, 26])
    mask, more = torch.cat([first, TURNS[turn]], dim=1), padded([9] * 3, width=9, seed=7)[0]
    found, ours = [], DriveCache(drive(model), model.config, capacity_tokens=100, held_tokens=0)
    for cache in (RoundedCache(model.config), ours):
        model.set_attn_implementation(NAME if isinstance(cache, DriveCache) else bench.REFERENCES[Element.FP16])
        with torch.no_grad():
            model(tokens, attention_mask=first, cache=cache)
            logits = [model(more, attention_mask=mask, cache=cache).logits]
            for _ in range(6):
                grown = torch.cat([mask, torch.ones(3, len(logits), dtype=torch.int64)], dim=1)
                logits.append(model(more[:, :1], attention_mask=grown, cache=cache).logits)
        found.append(torch.cat([logits[0][TURNS[turn].bool()], *(one[:, 0] for one in logits[1:])]))
    assert found[1].std() > 0.1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-3)
    assert [sequence.length() for sequence in cache.sequences] == (mask.sum(dim=1) + 6).tolist(), "padding was stored"
    assert min(sequence.flushed() for sequence in cache.sequences) >= 16, "all is in device DRAM"


def test_tokens_that_attend_later_ones(drive):
    model = small()
    device = drive(model)
    key, value = torch.randn(2, 1, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(1))
    mask = masked(1, 3, 5, lambda row, query, place: True)
    module = model.model.layers[0].self_attn
    with DriveCache(device, model.config, capacity_tokens=100) as cache:
        for part in (slice(0, 5), slice(5, 8)):
            given = cache.layers[0].update(key[:, :, part], value[:, :, part])
            now = torch.zeros(1, 4, 5, 32) if part.start == 0 else query
            found, _ = attention(module, now, *given, None if part.start == 0 else mask)
    wide = [round_to_storage(states, Element.FP16).repeat_interleave(2, dim=1) for states in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(round_to_storage(query, Element.FP16), *wide)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    with DriveCache(device, model.config, capacity_tokens=100, mode="centroid", top_units=4) as cache, torch.no_grad():
        for part in (slice(0, 5), slice(5, 8)):
            given = cache.layers[0].update(key[:, :, part], value[:, :, part])
            if part.start == 0:
                attention(module, torch.zeros(1, 4, 5, 32), *given, None)
        with pytest.raises(RequestError, match="row 0 of the batch: a token attends later ones, which mode centroid"):
            attention(module, query, *given, mask)


# Sparse modes.


@pytest.mark.parametrize("options",
                         [{"mode": "sparf", "features": 32}, {"mode": "fetched", "features": 32, "unit_tokens": 8},
                                     {"mode": Mode.FETCHED, "features": 32}, {"mode": "centroid"}, {"mode": "codes"}])
def test_sparse_modes_that_attend_everything_are_dense(drive, options):
    model, tokens = small(), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config), new=20)
    with DriveCache(drive(model), model.config, capacity_tokens=100, top_units=1000, local_tokens=500, held_tokens=0,
                    **options) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"mode": "sparf", "features": 8, "top_units": 6, "local_tokens": 4},
                                     {"mode": "fetched", "features": 8, "top_units": 2, "local_tokens": 4},
                                     {"mode": "centroid", "top_units": 2, "local_tokens": 4},
                                     {"mode": "codes", "top_units": 6, "local_tokens": 4}])
def test_a_sparse_step_is_the_sequences_own(drive, options):
    model = build("qwen2")     # one layer has a window
    tokens, mask = padded([30, 21])
    device = drive(model)
    with DriveCache(device, model.config, capacity_tokens=100, held_tokens=0, **options) as cache:
        results = []
        attend_many = device.attend_many
        device.attend_many = lambda plans: results.append((plans, attend_many(plans))) or results[-1][1]
        generate(model, tokens, cache, mask=mask, new=12)
        for plans, _ in results:
            assert [plan.sequence for plan in plans] == cache.sequences
            assert {job.mode.name.lower() for plan in plans for job in plan.jobs} == {options["mode"]}
            assert all(job.top_units <= options["top_units"] for plan in plans for job in plan.jobs)
        sizes = [max(int((job.end - job.start).max()) for plan in plans for job in plan.jobs) for plans, _ in results]
        assert max(sizes[0::2]) != max(sizes[1::2]), "the window of one layer"


@pytest.mark.parametrize("options, message", [
    ({"mode": "quick"}, "mode must be one of dense, sparf, fetched, centroid, codes, not 'quick'"),
    ({"top_units": 4}, "mode dense attends all tokens"),
    ({"mode": "sparf", "features": 4}, r"mode sparf needs top_units \(the paper's k\)"),
    ({"mode": "fetched", "features": 4, "top_units": 2, "unit_tokens": 3}, "power of two"),
    ({"mode": "sparf", "top_units": 4}, r"features \(the paper's r\) must be an int from 1 to 32, not None"),
    ({"mode": "sparf", "top_units": 4, "features": 33},
     r"features \(the paper's r\) must be an int from 1 to 32, not 33"),
    ({"mode": "sparf", "top_units": 4, "features": 8, "unit_tokens": 8}, "mode sparf has no unit_tokens"),
    ({"mode": "centroid", "top_units": 4, "features": 8}, "mode centroid has no features"),
    ({"mode": "centroid", "top_units": 0}, r"top_units \(the paper's k\) must be an int from 1 to 65,535, not 0"),
    ({"mode": "centroid", "top_units": 2, "local_tokens": 99}, "local_tokens must be an int from 0 to 8, not 99"),
    ({"local_tokens": True}, "mode dense attends all tokens"),
    ({"sinks": 4}, "mode dense attends all tokens"),
    ({"mode": "codes", "top_units": 4, "features": 8}, "mode codes has no features"),
    ({"mode": "codes", "top_units": 4, "unit_tokens": 8}, "mode codes has no unit_tokens"),
    ({"mode": "codes", "top_units": 400, "sinks": 129}, "sinks must be an int from 0 to 64, not 129"),
    ({"mode": "centroid", "top_units": 4, "sinks": -1}, "sinks must be an int from 0 to 65,535, not -1"),
    ({"mode": "centroid", "top_units": 4, "sinks": 17},
     r"top_units \(the paper's k\) must be at least 5 for 17 sinks and the newest 0 tokens that are not held, in units "
     "of"),
    ({"mode": "centroid", "top_units": 4, "sinks": 8, "local_tokens": 6, "held_tokens": 0},
     "must be at least 5 for 8 sinks and"),
    ({"capacity_tokens": 0}, "capacity_tokens must be a positive int, not 0"),
    ({"capacity_tokens": 10.5}, "capacity_tokens must be a positive int, not 10.5"),
    ({"held_tokens": -1}, "held_tokens must be an int, 0 or more, not -1"),
    ({"held_tokens": True}, "held_tokens must be an int, 0 or more, not True"),
    ({"isolated": "yes"}, "isolated must be a bool, not 'yes'"),
])
def test_wrong_modes_and_numbers(drive, options, message):
    model = small()
    with pytest.raises(RequestError, match=message):
        DriveCache(drive(model), model.config, **options)


@pytest.mark.parametrize("held", [8, 64])
@pytest.mark.parametrize("options", [{"mode": "sparf", "features": 8, "top_units": 24},
                                     {"mode": "fetched", "features": 8, "top_units": 6},
                                     {"mode": "centroid", "top_units": 6},
                                     {"mode": "codes", "top_units": 24}])
def test_drafts_give_the_tokens_of_single_steps_in_sparse_modes(drive, options, held):
    model, tokens = small(layers=2), torch.cat([prompts("llama", seed=1), prompts("llama", seed=2)] * 2, dim=1)
    answers, passes = [], []
    device = drive(model, queries=8)
    attend_many = device.attend_many
    device.attend_many = lambda plans: passes.append(plans[0].shape[1]) or attend_many(plans)
    for drafts in ({}, {"prompt_lookup_num_tokens": 7}):
        with DriveCache(device, model.config, capacity_tokens=200, held_tokens=held, **options) as cache:
            answers.append(generate(model, tokens, cache, new=40, **drafts).tolist())
    assert answers[0] == answers[1]
    assert max(passes) > 1, "nothing was drafted"


@pytest.mark.parametrize("options, sinks", [
    ({"mode": "dense"}, 0),
    ({"mode": "sparf", "features": 8, "top_units": 64}, 16),
    ({"mode": "sparf", "features": 8, "top_units": 64, "sinks": 0}, 0),
    ({"mode": "sparf", "features": 8, "top_units": 64, "sinks": 40}, 40),
    ({"mode": "sparf", "features": 8, "top_units": 10, "local_tokens": 4, "held_tokens": 0}, 6),
    ({"mode": "sparf", "features": 8, "top_units": 10, "local_tokens": 4, "held_tokens": 4}, 10),
    ({"mode": "fetched", "features": 8, "top_units": 4, "local_tokens": 5, "held_tokens": 0}, 8),
    ({"mode": "centroid", "top_units": 2, "local_tokens": 8, "held_tokens": 0}, 0),
    ({"mode": "centroid", "top_units": 8, "unit_tokens": 8}, 16),
    ({"mode": "codes", "top_units": 64}, 16),
])
def test_the_first_tokens_are_attended_in_any_case(drive, options, sinks):
    model = build("mistral")    # with a window of 40
    tokens, mask = padded([17, 30, 1])
    device, asked = drive(model), []
    create = device.create_sequence
    device.create_sequence = lambda heads, **how: asked.append(how) or create(heads, **how)
    with DriveCache(device, model.config, capacity_tokens=100, **options) as cache:
        generate(model, tokens, cache, mask=mask, new=3)
        assert {sequence.sinks for sequence in cache.sequences} == {sinks}
    # How far back the mean of V over a window is wanted.
    assert {how.get("window") for how in asked} == {
        40 if options["mode"] in ("sparf", "fetched", "codes") else None}


def test_old_keywords_of_the_cache_warn(drive):
    model = small()
    with pytest.warns(DeprecationWarning, match="units is now top_units"):
        cache = DriveCache(drive(model), model.config, mode="centroid", units=4)
    assert cache.mode is Mode.CENTROID


def test_sinks_are_attended_in_a_long_row(drive):
    model, (tokens, mask) = small(), padded([60, 41], width=60)
    device = drive(model)
    with DriveCache(device, model.config, capacity_tokens=100, mode="sparf", features=4, top_units=16,
                    held_tokens=0) as cache:
        results = []
        attend_many = device.attend_many
        device.attend_many = lambda plans: results.append(plans) or attend_many(plans)
        generate(model, tokens, cache, mask=mask, new=4)
    assert {job.sinks for plans in results for plan in plans for job in plan.jobs} == {16}


def test_windows_that_means_are_wanted_of():
    assert longest_window(build("llama").config) is None
    assert longest_window(build("mistral").config) == 40
    assert longest_window(build("qwen2").config) == 24     # of one of its layers
    assert longest_window(llama4(8).config) == 8
    assert longest_window(MistralConfig(sliding_window=40, layer_types=["full_attention"] * 32)) is None


@pytest.mark.parametrize("options, message", [
    ({"capacity": 100}, "no option 'capacity'; those of its sequences are isolated, key_scale, value_scale$"),
    ({"mode": "fetched", "top_units": 4, "features": 8, "sparse": True}, "no option 'sparse'"),
    ({"layers": 3}, "no option 'layers'"),
    ({"split": "heads"}, "option 'split', which is for several drives only"),
])
def test_options_that_do_not_exist(drive, options, message):
    model = small()
    with pytest.raises(TypeError, match=message):
        DriveCache(drive(model), model.config, **options)


def test_options_of_several_drives():
    model = small()
    with open_array(["model", "model"], config_for(model, ROOMY)) as array:
        DriveCache(array, model.config, split="context", isolated=True)
        for options, message in (
                ({"split": "tokens"}, "split must be one of heads, context, not 'tokens'"),
                ({"split": "context", "mode": "centroid", "top_units": 4}, "mode centroid chooses from all tokens"),
                ({"held_tokens": 8}, "held_tokens: tokens can be removed from a single drive only")):
            with pytest.raises(RequestError, match=message):
                DriveCache(array, model.config, **options)
        with pytest.raises(TypeError, match=r"no option 'splits'; those of its .* are isolated, key_scale, .*, split$"):
            DriveCache(array, model.config, splits="heads")


def test_sparse_modes_need_a_drive_that_has_them(drive):
    model = small(dim=80)
    with pytest.raises(ConfigError, match="mode centroid: the drive is without sparse attention"):
        DriveCache(drive(model, "paper"), model.config, mode="centroid", top_units=4)
    model = small()
    with pytest.raises(ConfigError, match="mode codes: the drive is without codes: kv must be element, not fp8_e4m3"):
        DriveCache(drive(model, kv=KvFormat.FP8_E4M3), model.config, mode="codes", top_units=4)
    with pytest.raises(TypeError, match="no option 'codes'"):
        DriveCache(drive(model), model.config, codes=True)


# What is computed where.


def test_the_first_tokens_are_attended_by_the_model_while_the_drive_writes(drive):
    model = small(layers=6)
    model.set_attn_implementation(NAME)
    device = drive(model)
    with DriveCache(device, model.config, capacity_tokens=100, held_tokens=0) as cache:
        writing, attends = [], []
        update = DriveLayer.update

        def watched(self, *arguments, **keywords):
            writing.append(sum(not write.finished for layer in cache.layers for write in layer._writes))
            return update(self, *arguments, **keywords)

        attend_many = device.attend_many
        device.attend_many = lambda plans: attends.append(len(plans)) or attend_many(plans)
        # The golden device ends a command when it is asked; a drive takes its time, which is as if nobody asked.
        device.poll = lambda: 0
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(DriveLayer, "update", watched)
            patch.setattr("kvattic.driver.futures.Future.done", lambda self: self._finished)
            model(prompts("llama"), cache=cache)
        assert not attends
        assert max(writing) >= 1, "each layer waited for its write"
        assert max(writing) <= 3
        cache.wait()
        assert not any(layer._writes for layer in cache.layers)
        assert [cache.sequences[0].length(layer) for layer in range(6)] == [30] * 6


def test_rounding_is_the_drives():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.tensor([1e-7, 6e-5, 65504])])
    for element, name in ((Element.FP16, np.float16), (Element.BF16, None)):
        rounded = round_to_storage(values, element)
        assert rounded.dtype == torch.float32
        bits = kvattic.spec.layout.storage_bits(values.numpy(), element)
        np.testing.assert_array_equal(kvattic.spec.elements.from_bits(bits, element), rounded.numpy())
        if name:
            np.testing.assert_array_equal(values.numpy().astype(name).astype(np.float32), rounded.numpy())


def test_float64_is_rounded_once():
    # Just above the middle between two numbers of the format; rounded to float32 first they would lie upon it.
    for element, digits in ((Element.FP16, 10), (Element.BF16, 7)):
        values = torch.tensor([1 + 2.0**-(digits + 1) + 2.0**-40, -1 - 2.0**-(digits + 1) - 2.0**-40,
                               1 + 3 * 2.0**-(digits + 1) - 2.0**-40], dtype=torch.float64)
        rounded = round_to_storage(values, element)
        assert rounded.dtype == torch.float64
        assert rounded.tolist() == [1 + 2.0**-digits, -1 - 2.0**-digits, 1 + 2.0**-digits]


def test_a_model_in_float64(drive):
    model, tokens = small().to(torch.float64), prompts("llama")
    with DriveCache(drive(model), model.config, capacity_tokens=100) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == generate(
            model, tokens, RoundedCache(model.config), new=20).tolist()


# Compiled models.


def test_compiled_models(drive):
    model, tokens = small(), prompts("llama")
    model.set_attn_implementation(NAME)
    device = drive(model)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    with DriveCache(device, model.config, capacity_tokens=100) as cache:
        expected = generate(model, tokens, cache, new=4).tolist()
        cache.reset()
        with torch.no_grad():
            plain = [model(tokens, cache=cache).logits, model(tokens[:, :1], cache=cache).logits]
        cache.reset()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for one, logits in zip((tokens, tokens[:, :1]), plain, strict=True):
                torch.testing.assert_close(compiled(one, cache=cache).logits, logits)
        cache.reset()
        assert compiled.generate(tokens, cache=cache, **options)[:, 30:].tolist() == expected
        cache.reset()
        model.compile(backend="eager")
        assert model.generate(tokens, cache=cache, **options)[:, 30:].tolist() == expected


# Masks.


def masked(rows, queries, past, attends):
    """A mask of (row, query's position, position) -> bool."""
    return torch.tensor([[[[attends(row, past + query, place) for place in range(past + queries)]
                           for query in range(queries)]] for row in range(rows)])


def causal(row, query, place):
    return place <= query


def before(*rows):
    return [np.array(row, np.bool_) for row in rows]


def bounds(rows):
    """Start and end of each row, as lists."""
    return [tuple(None if one is None else one.tolist() for one in pair)
            for pair in zip(rows.start, rows.end, strict=True)]


def test_a_mask_of_padding_and_windows():
    # Row 1 begins with two positions of padding, and has one in the middle.
    padding = (0, 1, 3)
    rows = read_mask(masked(2, 1, 5, lambda row, query, place: query - 3 < place <= query and (
        row == 0 or place not in padding)), before([1, 1, 1, 1, 1], [0, 0, 1, 0, 1]), 1)
    assert [new.tolist() for new in rows.new] == [[0], [0]]
    assert [kept.tolist() for kept in rows.kept] == [[True] * 6, [False, False, True, False, True, True]]
    assert bounds(rows) == [([3], None), ([1], None)]
    # The padding at the beginning does not matter to a window, whatever the number of queries.
    rows = read_mask(masked(2, 2, 5, lambda row, query, place: query - 3 < place <= query and place >= row),
                      before([1] * 5, [0, 1, 1, 1, 1]), 2)
    assert bounds(rows) == [([3, 4], None), ([2, 3], None)]


@pytest.mark.parametrize("attends, expected", [
    # A chunk that ends between the queries.
    (lambda row, query, place: place <= query and place >= query // 6 * 6, ([0, 6], None)),
    # A window over padding in the middle: in the tokens' own numbers it begins with the same one for both.
    (lambda row, query, place: query - 3 < place <= query and place != 3, ([3, 3], None)),
    # Tokens that attend later ones, as those of a picture do.
    (lambda row, query, place: True, (None, [7, 7])),
    (lambda row, query, place: place > query - 3, ([3, 4], [7, 7])),
], ids=["chunk", "padding", "later", "later in a window"])
def test_each_token_has_a_range_of_its_own(attends, expected):
    rows = read_mask(masked(1, 2, 5, attends), before([1, 1, 1, attends(0, 3, 3), 1]), 2)
    assert bounds(rows) == [expected]


def test_new_padding_takes_no_part():
    tokens = [1, 1, 0, 1, 0, 0, 1]
    rows = read_mask(masked(1, 4, 3, lambda row, query, place: query - 5 < place <= query and bool(tokens[place])),
                      before(tokens[:3]), 4)
    assert (rows.new[0].tolist(), rows.kept[0].tolist()) == ([0, 3], list(map(bool, tokens)))
    assert bounds(rows) == [([0, 2], None)]


def test_masks_without_a_window():
    kept = before([1] * 5, [1] * 5)
    everything = masked(2, 2, 5, causal)
    floats = torch.where(everything, 0.0, torch.finfo(torch.float32).min)
    for mask in (everything, floats, None, everything[:1]):
        rows = read_mask(mask, kept, 2)
        assert bounds(rows) == [(None, None)] * 2
        assert [new.tolist() for new in rows.new] == [[0, 1]] * 2
        assert [kept.tolist() for kept in rows.kept] == [[True] * 7] * 2


def test_the_first_tokens_may_have_any_mask():
    rows = read_mask(masked(1, 3, 0, lambda row, query, place: place != 1), before([]), 3)
    assert (rows.new[0].tolist(), bounds(rows)) == ([0, 2], [(None, None)])


def test_masks_that_the_drive_does_not_know():
    gap = masked(1, 2, 5, lambda row, query, place: place <= query and (query == 5 or place != 2))
    with pytest.raises(RequestError, match=r"row 0 of the batch: the drive attends a range .* mask of position 6 asks"):
        read_mask(gap, before([1] * 5), 2)
    everything = masked(2, 1, 3, causal)
    with pytest.raises(RequestError, match=r"row 1 of the batch: .* lets position 3 attend position 1, which was padd"):
        read_mask(everything, before([1, 1, 1], [1, 0, 1]), 1)


def test_a_mask_of_a_wrong_shape():
    with pytest.raises(RequestError, match=r"must be of shape \(1, 1, 2, 7\), the same for all heads, not \(1, 4, 2, "):
        read_mask(masked(1, 2, 5, causal).expand(1, 4, 2, 7), before([1] * 5), 2)


def test_masks_for_both_directions_are_those_of_encoders():
    both = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True,
            "allow_is_causal_skip": False, "q_length": 2, "kv_length": 3}
    assert make_mask(batch_size=1, **both) is None
    padding = torch.tensor([[True, True, False]])
    assert make_mask(batch_size=1, attention_mask=padding, **both).tolist() == [[[[True, True, False]] * 2]]


def test_masks_that_add_to_scores_are_refused():
    bias = torch.tensor([[[[0.0, -1.0]]]])
    with pytest.raises(RequestError, match="the attention mask adds a bias to the scores"):
        read_mask(bias, before([1]), 1)


# What is refused.


def test_without_its_cache_the_backend_is_pytorchs(drive):
    model, tokens = small(), prompts("llama")
    model.set_attn_implementation("sdpa")
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 20, "do_sample": False}
    expected, loss = model.generate(tokens, **options).tolist(), model(tokens, labels=tokens).loss
    model.set_attn_implementation(NAME)
    assert model.generate(tokens, **options).tolist() == expected
    # A cache of the drive that was given earlier does not matter.
    with DriveCache(drive(model), model.config, capacity_tokens=100) as cache:
        generate(model, tokens, cache, new=2)
        assert model.generate(tokens, **options).tolist() == expected
    found = model(tokens, labels=tokens).loss
    assert found == loss
    found.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_models_that_change_k_are_told_so(drive):
    model = small()
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    keys, values = cache.layers[0].update(*torch.zeros(2, 1, 2, 3, 32))
    with pytest.raises(RequestError, match="layer 0: the model changes K after the DriveCache returned them"):
        attention(None, torch.zeros(1, 4, 3, 32), keys * 2, values, None)
    with pytest.raises(RequestError, match=r"an earlier step of this DriveCache failed, .* RequestError: layer 0: "):
        cache.layers[0].update(*torch.zeros(2, 1, 2, 3, 32))


def test_the_cache_needs_its_backend(drive):
    model, tokens = small(layers=2), prompts("llama")
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    model.set_attn_implementation("eager")
    with pytest.raises(RequestError, match="layer 0: the K and V .* the model's attention is 'eager', call "
                                           r"model.set_attn_implementation\('kvattic'\); reset\(\)"):
        model.generate(tokens, cache=cache, max_new_tokens=3)
    cache.reset()
    assert generate(model, tokens, cache, new=3).shape == (1, 3)


_SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("model", [
    lambda: BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=2)),
    lambda: FalconForCausalLM(FalconConfig(**_SIZES)),
    lambda: FalconForCausalLM(FalconConfig(**_SIZES, alibi=True)),
], ids=["bloom", "falcon", "falcon with alibi"])
def test_models_without_the_attention_interface_are_told_so(drive, model):
    model = model().eval()
    with pytest.raises(RequestError, match=r"^\w+ForCausalLM computes attention by itself, without tr") as found:
        DriveCache(drive(model), model.config, capacity_tokens=100)
    alibi = model.config.model_type == "bloom" or model.config.alibi
    assert ("ALiBi" in str(found.value)) == alibi


def test_attention_weights_are_refused(drive):
    for model in (small(), build("opt")):
        model.set_attn_implementation(NAME)
        cache = DriveCache(drive(model), model.config, capacity_tokens=100)
        message = "output_attentions: the drive does not give attention weights"
        with torch.no_grad(), pytest.raises(RequestError, match=message):
            model(prompts("llama"), cache=cache, output_attentions=True)
        cache.reset()
        with pytest.raises(RequestError, match=message):
            generate(model, prompts("llama"), cache, new=2, output_attentions=True, return_dict_in_generate=True)


def test_after_an_error_the_cache_says_which(drive):
    model, tokens = small(layers=2), prompts("llama")
    with DriveCache(drive(model), model.config, capacity_tokens=32) as cache:
        with pytest.raises(CapacityError, match="room for 32 tokens"):
            generate(model, tokens, cache, new=10)
        with pytest.raises(RequestError, match=r"an earlier step of this DriveCache failed, .*: reset\(\) it and begin "
                                               "again with the whole text.* CapacityError: .*room for 32 tokens"):
            generate(model, tokens, cache, new=2)
        cache.reset()
        assert generate(model, tokens, cache, new=2).shape == (1, 2)


def test_a_step_that_was_interrupted(drive):
    model, tokens = small(layers=2), prompts("llama")
    with DriveCache(drive(model), model.config, capacity_tokens=100) as cache:
        generate(model, tokens, cache, new=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.layers[1].input_layernorm, "forward", None)
            with torch.no_grad(), pytest.raises(TypeError):
                model(tokens[:, :1], cache=cache)
        message = "layer 1 holds 31 positions and gets 1 more, but layer 0 holds 33: an earlier step was interrupted"
        with torch.no_grad(), pytest.raises(RequestError, match=message):
            model(tokens[:, :1], cache=cache)


def overflowing():
    """A model whose scores no drive holds."""
    model = small(layers=2, attention_bias=True)
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.k_proj):
            projection.bias[:] = 5000.0
    return model


def test_scores_out_of_range_come_out_of_generate(drive):
    model = overflowing()
    with DriveCache(drive(model), model.config, capacity_tokens=100) as cache:
        with pytest.raises(RangeError, match=r"layer 1, row 0 of the batch: .*score"):
            generate(model, prompts("llama"), cache, new=3)
        with pytest.raises(RequestError, match=r"an earlier step of this DriveCache failed, .* RangeError: layer 1"):
            generate(model, prompts("llama"), cache, new=3)


def test_the_row_of_a_batch_is_named_that_is_out_of_range(drive):
    model = small()
    tokens, mask = padded([30, 21])
    device = drive(model)
    attend_many = device.attend_many

    def picky(plans):
        """A drive that finds sequence 1 out of range."""
        if any(plan.sequence.number == 1 for plan in plans):
            raise RangeError("KV head 1: too large")
        return attend_many(plans)

    with DriveCache(device, model.config, capacity_tokens=100) as cache:
        device.attend_many = picky
        with pytest.raises(RangeError, match=r"^layer 0, row 1 of the batch: KV head 1: too large$"):
            generate(model, tokens, cache, mask=mask, new=3)


def test_gradients_and_other_arithmetic_are_refused(drive):
    model, tokens = small(), prompts("llama")
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    with pytest.raises(RequestError, match=r"no gradient and no dropout: call model.eval\(\)"):
        model(tokens, cache=cache)
    cache.reset()
    keys, values = cache.layers[0].update(*torch.zeros(2, 1, 2, 1, 32))
    with pytest.raises(RequestError, match="the drive's attention has no softcap"):
        attention(None, torch.zeros(1, 4, 1, 32), keys, values, None, softcap=50.0)
    with pytest.raises(RequestError, match="K are not those that the DriveCache returned last"):
        cache.reset()
        cache.layers[0].update(*torch.zeros(2, 1, 2, 1, 32))
        attention(None, torch.zeros(1, 4, 1, 32), keys, values, None)


def test_batches_do_not_change_in_the_middle(drive):
    model = small()
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    generate(model, prompts("llama"), cache, new=2)
    with pytest.raises(RequestError, match="holds a batch of 1, not of 2"):
        cache.update(*torch.zeros(2, 2, 2, 1, 32), 0)


def test_what_cannot_be_copied_is_refused(drive):
    model, tokens = small(), prompts("llama")
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    cache.batch_select_indices(torch.tensor([0]))   # nothing is there: as transformers' own cache, nothing happens
    generate(model, tokens, cache, new=2)
    for rows in ([1], [-1]):
        with pytest.raises(RequestError, match="rows must be 0 to 0"):
            cache.reorder_cache(torch.tensor(rows))
    with pytest.raises(RequestError, match="at least one row"):
        cache.batch_select_indices(torch.tensor([False]))
    for call in (lambda layer: layer.batch_repeat_interleave(2), lambda layer: layer.batch_select_indices([0])):
        with pytest.raises(RequestError, match="for all layers together"):
            call(cache.layers[0])
    cache.update(*torch.zeros(2, 1, 2, 1, 32), 0)
    with pytest.raises(RequestError, match="between two steps"):
        copy.deepcopy(cache)
    cache.fail(ValueError("broken"))
    with pytest.raises(RequestError, match=r"an earlier step of this DriveCache failed \(ValueError: broken\)"):
        cache.fork()


def test_forks_without_room(drive):
    model = small()
    device = drive(model, TINY)
    cache = DriveCache(device, model.config, capacity_tokens=500)
    generate(model, prompts("llama"), cache, new=2)
    with pytest.raises(CapacityError, match="no room"):
        cache.batch_repeat_interleave(40)
    with pytest.raises(RequestError, match="failed"):
        cache.fork()
    cache.reset()
    assert device.free_zones == device.media.allocator.zones


def test_heads_that_do_not_fit(drive):
    device = drive(small())
    with pytest.raises(RequestError, match="the model's head_dim is 64, the drive's 32"):
        DriveCache(device, small(dim=64).config)
    with pytest.raises(ConfigError, match="head_dim is 512, the drive's is at most 256"):
        config_for(small(dim=512))
    with pytest.raises(ConfigError, match=r"head_dim is 160, for which a drive needs 256 .* codewords of 256; take an"):
        config_for(small(dim=160), "tiny")
    assert config_for(small(dim=160), "paper").head_dim == 256
    with pytest.raises(ConfigError, match=r"head_dim must be one of .* not 160"):
        config_for(small(dim=160), head_dim=160)
    with pytest.raises(ConfigError, match="the model's 4 query heads are no multiple of its 3 KV heads"):
        config_for(small(kv_heads=3).config)


def test_layers_that_do_not_fit(drive):
    cache = DriveCache(drive(small()), small().config, capacity_tokens=100)
    for key, value, message in (
            ((1, 2, 3, 64), (1, 2, 3, 32), "layer 0: K has 64 elements a head, the drive's head_dim is 32"),
            ((1, 2, 3, 32), (1, 2, 3, 40), "layer 0: V has 40 elements a head, the drive's head_dim is 32"),
            ((1, 1, 3, 32), (1, 2, 3, 16), "layer 0: K and V must have the same heads and tokens")):
        with pytest.raises(RequestError, match=message):
            cache.layers[0].update(torch.zeros(key), torch.zeros(value))
    assert not cache.sequences
    cache = DriveCache(cache.device, small(layers=2).config, capacity_tokens=100)
    cache.start(1, 2)
    with pytest.raises(RequestError, match="layer 1 has 4 KV heads, the layers before it 2"):
        cache.layers[1].update(*torch.zeros(2, 1, 4, 3, 32))


def test_too_many_tokens(drive):
    model = small()
    cache = DriveCache(drive(model), model.config, capacity_tokens=32)
    with pytest.raises(KvatticError, match="room for 32 tokens"):
        generate(model, prompts("llama"), cache, new=10)
    cache.reset()
    with pytest.raises(KvatticError, match="has no room"):
        generate(model, prompts("llama"), DriveCache(drive(model), model.config, capacity_tokens=10**6), new=2)


def test_more_drafts_than_are_held(drive):
    """A layer alone is not forked."""
    model = small()
    with DriveCache(drive(model), model.config, capacity_tokens=200, held_tokens=4) as cache:
        generate(model, prompts("llama"), cache, new=20)
        with pytest.raises(RequestError, match=r"layer 0, row 0 of the batch: 40 tokens were to be removed, but only "
                                               r"the newest \d+ can be: others are in flash, .* held_tokens than 4"):
            cache.layers[0].crop(-40)
        assert cache.get_seq_length() == cache.sequences[0].length() == 49


def test_nothing_is_removed_of_any_row_if_it_cannot_be_of_all(drive):
    model = small()
    tokens, mask = padded([30, 60], width=60)
    with DriveCache(drive(model), model.config, capacity_tokens=200, held_tokens=32) as cache:
        generate(model, tokens, cache, mask=mask, new=2)
        before = [sequence.length() for sequence in cache.sequences]
        with pytest.raises(RequestError, match="row 1 of the batch: 58 tokens were to be removed"):
            cache.layers[0].crop(-58)
        assert [sequence.length() for sequence in cache.sequences] == before


def test_the_newest_tokens_are_held_from_the_first_one_on(drive):
    model, tokens = small(layers=2), prompts("llama")
    with DriveCache(drive(model), model.config, capacity_tokens=200) as cache:
        expected = generate(model, tokens, cache, new=10)
        cache.crop(-9)
        assert (cache.get_seq_length(), cache.sequences[0].length(1)) == (30, 30)
        cache.crop(-1)
        assert generate(model, tokens, cache, new=10).tolist() == expected.tolist()


def test_numbers_that_do_not_fit(drive):
    model = small()
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    keys, values = cache.layers[0].update(torch.full((1, 2, 3, 32), 7e4), torch.zeros(1, 2, 3, 32))
    with pytest.raises(RequestError, match="must be finite and within the range of fp16"):
        attention(None, torch.zeros(1, 4, 3, 32), keys, values, None)


# Configurations.


def test_configurations():
    gqa = small(heads=8, kv_heads=2, dim=64)
    assert (config_for(gqa).head_dim, config_for(gqa).rows, config_for(gqa).element) == (64, 4, Element.FP16)
    assert config_for(gqa, queries=3).rows == 12
    assert config_for(gqa, queries=8).rows == 16
    assert config_for(gqa, "gqa", rows=2) == replace(kvattic.GQA, rows=2, head_dim=64)
    assert config_for(gqa.config) == config_for(gqa)
    assert config_for(gqa).sparse
    assert not config_for(small(dim=80)).sparse
    with pytest.raises(ConfigError, match="sparse must be False"):
        config_for(small(dim=80), sparse=True)
    with pytest.raises(ConfigError, match="rows must be"):
        config_for(gqa, rows=17)


def test_transformers_own_questions(drive):
    model = small(layers=2)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    assert (len(cache), cache.is_compileable, cache.is_croppable, cache.is_sliding) == (2, False, True, [False, False])
    assert (cache.get_max_length(), cache.get_mask_sizes(3, 0), cache.is_initialized) == (100, (3, 0), False)
    generate(model, prompts("llama"), cache, new=3)
    assert (cache.get_seq_length(1), cache.get_mask_sizes(3, 1), cache.is_initialized) == (32, (35, 0), True)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert DriveCache(cache.device, model.config).capacity_tokens == 512


def test_the_example_runs():
    example = Path(__file__).parents[3] / "examples" / "generate.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens in the drive: 60" in done.stdout
