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
from transformers import LlamaConfig, LlamaForCausalLM

import kvattic
from kvattic import TINY, ConfigError, KvatticError, Mode, RequestError
from kvattic.array import open_array
from kvattic.formats import Element
from kvattic.huggingface import (
    NAME,
    DriveCache,
    DriveLayer,
    _attention,
    _mask,
    _read_mask,
    config_for,
    round_to_storage,
)
from kvattic_sim.benches import generate as bench
from kvattic_sim.benches.generate import ARCHITECTURES, RoundedCache, build, generate, prompts
from kvattic_sim.lm import huggingface as lm
from kvattic_sim.lm import model as numpy_lm

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ROOMY = replace(TINY, dies=8)
"""TINY with room for several sequences."""


@pytest.fixture
def drive():
    """Opens drives for a model."""
    devices = []

    def opened(model, base=ROOMY, **changes):
        devices.append(kvattic.open("model", config_for(model, base, **changes)))
        return devices[-1]

    yield opened
    for device in devices:
        device.close()


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
    with DriveCache(drive(model), model.config, capacity_tokens=128) as cache:
        assert generate(model, tokens, cache).tolist() == expected.tolist()
        assert cache.sequences[0].length() == tokens.shape[1] + 63
        assert cache.sequences[0].flushed() > tokens.shape[1]


def test_the_projects_own_model_too(drive):
    model, tokens = build("lm"), prompts("lm", seed=1)
    with DriveCache(drive(model, "paper"), model.config) as cache:
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
    with DriveCache(drive(model), model.config, capacity_tokens=64) as cache:
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
    for cache in (RoundedCache(model.config), DriveCache(drive(model), model.config, capacity_tokens=200)):
        said = torch.cat([first, generate(model, first, cache, new=20), second], dim=1)
        answers.append(generate(model, said, cache, new=20).tolist())
    assert answers[0] == answers[1]


def test_an_answer_can_be_taken_back(drive):
    model, tokens = small(), prompts("llama", seed=1)
    with DriveCache(drive(model), model.config, capacity_tokens=200) as cache:
        cache.activate_past_recording()
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
        assert device.free_zones < zones
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
    with DriveCache(device, model.config) as cache:
        answer = generate(model, tokens, cache, new=20)
    assert answer.tolist() == generate(model, tokens, RoundedCache(model.config), new=20).tolist()


def test_bf16(drive):
    model, tokens = small(), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config, Element.BF16), new=20)
    assert expected.tolist() != generate(model, tokens, RoundedCache(model.config), new=20).tolist()
    with DriveCache(drive(model, element=Element.BF16), model.config, capacity_tokens=100) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()


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


# Sparse modes.


@pytest.mark.parametrize("options", [{"mode": "sparf", "channels": 32}, {"mode": "fetched", "channels": 32, "unit": 8},
                                     {"mode": Mode.FETCHED, "channels": 32}, {"mode": "centroid"}])
def test_sparse_modes_that_attend_everything_are_dense(drive, options):
    model, tokens = small(), prompts("llama")
    expected = generate(model, tokens, RoundedCache(model.config), new=20)
    with DriveCache(drive(model), model.config, capacity_tokens=100, units=1000, local=500, **options) as cache:
        assert generate(model, tokens, cache, new=20).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"mode": "sparf", "channels": 8, "units": 6, "local": 4},
                                     {"mode": "fetched", "channels": 8, "units": 2, "local": 4},
                                     {"mode": "centroid", "units": 2, "local": 4}])
def test_a_sparse_step_is_the_sequences_own(drive, options):
    model = build("qwen2")     # one layer has a window
    tokens, mask = padded([30, 21])
    device = drive(model)
    with DriveCache(device, model.config, capacity_tokens=100, **options) as cache:
        results = []
        attend_many = device.attend_many
        device.attend_many = lambda plans: results.append((plans, attend_many(plans))) or results[-1][1]
        generate(model, tokens, cache, mask=mask, new=12)
        for plans, _ in results:
            assert [plan.sequence for plan in plans] == cache.sequences
            assert {job.mode.name.lower() for plan in plans for job in plan.jobs} == {options["mode"]}
            assert all(job.units <= options["units"] for plan in plans for job in plan.jobs)
        sizes = [max(int((job.end - job.start).max()) for plan in plans for job in plan.jobs) for plans, _ in results]
        assert max(sizes[0::2]) != max(sizes[1::2]), "the window of one layer"


@pytest.mark.parametrize("options, message", [
    ({"mode": "quick"}, "mode must be one of dense, sparf, fetched, centroid, not 'quick'"),
    ({"units": 4}, "mode dense attends all tokens"),
    ({"mode": "sparf", "channels": 4}, r"mode sparf needs units \(the paper's k\)"),
    ({"mode": "fetched", "channels": 4, "units": 2, "unit": 3}, "power of two"),
])
def test_wrong_modes(drive, options, message):
    model = small()
    with pytest.raises(RequestError, match=message):
        DriveCache(drive(model), model.config, **options)


# What is computed where.


def test_the_first_tokens_are_attended_by_the_model_while_the_drive_writes(drive):
    model = small(layers=6)
    model.set_attn_implementation(NAME)
    device = drive(model)
    with DriveCache(device, model.config, capacity_tokens=100) as cache:
        writing, attends = [], []
        update = DriveLayer.update

        def watched(self, *arguments, **keywords):
            writing.append(sum(not write._finished for layer in cache.layers for write in layer._writes))
            return update(self, *arguments, **keywords)

        attend_many = device.attend_many
        device.attend_many = lambda plans: attends.append(len(plans)) or attend_many(plans)
        # The golden device ends a command when it is asked; a drive takes its time, which is as if nobody asked.
        device.poll = lambda: 0
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(DriveLayer, "update", watched)
            patch.setattr("kvattic.futures.Future.done", lambda self: self._finished)
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
        bits = kvattic.layout.storage_bits(values.numpy(), element)
        np.testing.assert_array_equal(kvattic.elements.from_bits(bits, element), rounded.numpy())
        if name:
            np.testing.assert_array_equal(values.numpy().astype(name).astype(np.float32), rounded.numpy())


# Masks.


def masked(rows, queries, past, attends):
    """A mask of (row, query's position, position) -> bool."""
    return torch.tensor([[[[attends(row, past + query, place) for place in range(past + queries)]
                           for query in range(queries)]] for row in range(rows)])


def causal(row, query, place):
    return place <= query


def before(*rows):
    return [np.array(row, np.bool_) for row in rows]


def test_a_mask_of_padding_and_windows():
    # Row 1 begins with two positions of padding, and has one in the middle.
    padding = (0, 1, 3)
    rows = _read_mask(masked(2, 1, 5, lambda row, query, place: query - 3 < place <= query and (
        row == 0 or place not in padding)), before([1, 1, 1, 1, 1], [0, 0, 1, 0, 1]), 1)
    assert [new.tolist() for new in rows.new] == [[0], [0]]
    assert [kept.tolist() for kept in rows.kept] == [[True] * 6, [False, False, True, False, True, True]]
    assert rows.window == [3, 2]
    # The padding at the beginning does not matter to a window, whatever the number of queries.
    rows = _read_mask(masked(2, 2, 5, lambda row, query, place: query - 3 < place <= query and place >= row),
                      before([1] * 5, [0, 1, 1, 1, 1]), 2)
    assert rows.window == [3, 3]


def test_masks_without_a_window():
    kept = before([1] * 5, [1] * 5)
    everything = masked(2, 2, 5, causal)
    floats = torch.where(everything, 0.0, torch.finfo(torch.float32).min)
    for mask in (everything, floats, None, everything[:1]):
        rows = _read_mask(mask, kept, 2)
        assert rows.window == [None, None]
        assert [new.tolist() for new in rows.new] == [[0, 1]] * 2
        assert [kept.tolist() for kept in rows.kept] == [[True] * 7] * 2


def test_the_first_tokens_may_have_any_mask():
    rows = _read_mask(masked(1, 3, 0, lambda row, query, place: place != 1), before([]), 3)
    assert (rows.new[0].tolist(), rows.window) == ([0, 2], [None])


@pytest.mark.parametrize("attends", [
    lambda row, query, place: True,                                    # later tokens
    lambda row, query, place: place <= query and place != 2,           # a gap
    lambda row, query, place: place <= query and place >= query // 6 * 6,    # a chunk that ends between the queries
    lambda row, query, place: query - 3 < place <= query and place != 3,     # a window over padding in the middle
], ids=["later", "gap", "chunk", "padding"])
def test_masks_that_the_drive_does_not_know(attends):
    with pytest.raises(RequestError, match="row 0 of the batch: the drive attends causally"):
        _read_mask(masked(1, 2, 5, attends), before([1, 1, 1, attends(0, 3, 3), 1]), 2)


def test_a_mask_of_a_wrong_shape():
    with pytest.raises(RequestError, match=r"must be of shape \(1, 1, 2, 7\), the same for all heads, not \(1, 4, 2, "):
        _read_mask(masked(1, 2, 5, causal).expand(1, 4, 2, 7), before([1] * 5), 2)


def test_masks_for_both_directions_are_refused():
    with pytest.raises(RequestError, match="attends causally: a model whose tokens attend later ones"):
        _mask(batch_size=1, q_length=1, kv_length=1, allow_is_bidirectional_skip=True)


# What is refused.


def test_the_backend_needs_its_cache(drive):
    model, tokens = small(), prompts("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(RequestError, match="give past_key_values=DriveCache"):
        model.generate(tokens, max_new_tokens=2)


def test_the_cache_needs_its_backend(drive):
    model, tokens = small(), prompts("llama")
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    model.set_attn_implementation("eager")
    with pytest.raises(RequestError, match="went to another attention backend; use it with attn_implementation='kva"):
        model.generate(tokens, cache=cache, max_new_tokens=3)
    cache.reset()
    assert generate(model, tokens, cache, new=3).shape == (1, 3)


def test_gradients_and_other_arithmetic_are_refused(drive):
    model, tokens = small(), prompts("llama")
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    with pytest.raises(RequestError, match=r"no gradient and no dropout: call model.eval\(\)"):
        model(tokens, cache=cache)
    cache.reset()
    keys, values = cache.layers[0].update(*torch.zeros(2, 1, 2, 1, 32))
    with pytest.raises(RequestError, match="the drive's attention has no softcap"):
        _attention(None, torch.zeros(1, 4, 1, 32), keys, values, None, softcap=50.0)
    with pytest.raises(RequestError, match="K are not those that the DriveCache returned last"):
        cache.layers[0]._given = None
        _attention(None, torch.zeros(1, 4, 1, 32), keys, values, None)


def test_batches_do_not_change_in_the_middle(drive):
    model = small()
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    generate(model, prompts("llama"), cache, new=2)
    with pytest.raises(RequestError, match="holds a batch of 1, not of 2"):
        cache.update(*torch.zeros(2, 2, 2, 1, 32), 0)


def test_what_would_copy_rows_is_refused(drive):
    model, tokens = small(), prompts("llama")
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    with pytest.raises(RequestError, match="no beam search"):
        generate(model, tokens, cache, new=4, num_beams=2)
    for call in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(RequestError, match="cannot be copied"):
            call()
    with pytest.raises(RequestError, match="cannot be copied: make another DriveCache"):
        copy.deepcopy(cache)


def test_heads_that_do_not_fit(drive):
    device = drive(small())
    with pytest.raises(RequestError, match="the model's head_dim is 64, the drive's 32"):
        DriveCache(device, small(dim=64).config)
    with pytest.raises(ConfigError, match="head_dim is 512, the drive's is at most 256"):
        config_for(small(dim=512))


def test_too_many_tokens(drive):
    model = small()
    cache = DriveCache(drive(model), model.config, capacity_tokens=32)
    with pytest.raises(KvatticError, match="room for 32 tokens"):
        generate(model, prompts("llama"), cache, new=10)
    cache.reset()
    with pytest.raises(KvatticError, match="has no room"):
        generate(model, prompts("llama"), DriveCache(drive(model), model.config, capacity_tokens=10**6), new=2)


def test_more_drafts_than_are_held(drive):
    model = small()
    with DriveCache(drive(model), model.config, capacity_tokens=200, held_tokens=4) as cache:
        cache.activate_past_recording()
        generate(model, prompts("llama"), cache, new=20)
        with pytest.raises(RequestError, match=r"in flash, where nothing can be removed; .*held_tokens"):
            cache.crop(-40)


def test_numbers_that_do_not_fit(drive):
    model = small()
    model.set_attn_implementation(NAME)
    cache = DriveCache(drive(model), model.config, capacity_tokens=100)
    keys, values = cache.layers[0].update(torch.full((1, 2, 3, 32), 7e4), torch.zeros(1, 2, 3, 32))
    with pytest.raises(RequestError, match="must be finite and within the range of fp16"):
        _attention(None, torch.zeros(1, 4, 3, 32), keys, values, None)


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
    example = Path(__file__).parents[2] / "examples" / "generate.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens in the drive: 60" in done.stdout
