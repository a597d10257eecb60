"""Architectures of transformers: a slice of the survey, and what each kind needs of the backend."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pip install 'kvattic[transformers]'")
pytest.importorskip("transformers", reason="pip install 'kvattic[transformers]'")

import torch
import transformers
from transformers import DynamicCache, T5Config, XGLMConfig
from transformers.cache_utils import EncoderDecoderCache

from kvattic import TINY, CapacityError, ConfigError, RequestError, Sequence
from kvattic.integrations.configuration import latent_width, most_positions
from kvattic.integrations.masks import attended_tokens
from kvattic.integrations.transformers import NAME, DriveCache, DriveEncoderDecoderCache, DriveLayer, config_for
from kvattic.spec.formats import Element
from kvattic_sim.lm import support
from kvattic_sim.lm.families import architectures, build, shrink
from kvattic_sim.lm.support import Outcome, Verdict, examine
from kvattic_sim.reports import model_page
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache, generate

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

ALL = {one.name: one for one in architectures()}
PAGE = Path(__file__).parents[3] / model_page.PAGE
ROOMY = replace(TINY, dies=8)

SLICE = {
    "GptOssForCausalLM": "",                            # learned sinks
    "Qwen3NextForCausalLM": "1 of 4 layers in the drive, the others in transformers' own",
    "FalconH1ForCausalLM": "",                          # attention and a linear state in each layer
    "Gemma3nForCausalLM": "4 of 6 layers in the drive, the others in transformers' own",    # shared K and V
    "WhisperForConditionalGeneration": "self-attention and cross-attention in the drive",
    "T5ForConditionalGeneration": "cross-attention in the drive",
    "DoryForCausalLM": "",                              # passes twice through some layers
    "MoshiForCausalLM": "",                             # a window that its masks do not say
    "MllamaForCausalLM": "2 of 4 layers in the drive, the others in transformers' own",     # layers of pictures
    "GotOcr2ForConditionalGeneration": "",              # a part for pictures that computes attention by itself
    "Qwen2_5_VLForConditionalGeneration": "",           # positions in three dimensions
    "Blip2ForConditionalGeneration": "",                # a picture that must be there
    "VisionEncoderDecoderModel": "self-attention and cross-attention in the drive",
    "MusicgenForCausalLM": "",                          # a row of tokens for each codebook
    "DiaForConditionalGeneration": "self-attention and cross-attention in the drive",       # likewise; infinite logits
    "VibeVoiceForConditionalGeneration": "",            # sound from noise
    "VoxtralRealtimeForConditionalGeneration": "",      # sound beside its tokens
}
REFUSED = {
    "Gemma2ForCausalLM": "caps its scores (attn_logit_softcapping 50.0), the drive has no soft cap",
    "BloomForCausalLM": "ALiBi's bias",
    "DeepseekV3ForCausalLM": "latent attention, kv_lora_rank 32",
    "DeepseekV32ForCausalLM": "layer 0 is of the kind 'indexed_attention', which the drive lacks: each",
    "InklingForCausalLM": "the drive's attention has no position_bias, which this model needs",
    "DiffLlamaForCausalLM": "the model changes V after the DriveCache returned them",
    "BigBirdPegasusForCausalLM": "gives no attention mask and does not say that it is causal",
    "MambaForCausalLM": "the model has no attention, there is nothing for a drive",
    "MiniMaxForCausalLM": "takes a cache of its own only",
    "BltForCausalLM": "names attention heads of parts of the model alone (patcher_config, ",
    "BlipForConditionalGeneration": "BlipForConditionalGeneration computes attention by itself",
    "T5Gemma2ForConditionalGeneration": "attends its own and the encoder's tokens in a single softmax",
    "SpeechT5ForSpeechToText": "SpeechT5ForSpeechToText computes attention by itself",
    "Gemma4ForCausalLM": "head_dim is 512, the drive's is at most 256",
}


def tokens_of(lengths, width=30, seed=5):
    """Prompts of different lengths, padded on the left; and their mask."""
    tokens = torch.randint(2, 250, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


# The survey.


@pytest.mark.parametrize("name", SLICE)
def test_architectures_that_work(name):
    found = examine(ALL[name])
    assert (found.verdict, found.detail) == (Verdict.WORKS, SLICE[name])


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_are_refused_by_name(name):
    found = examine(ALL[name])
    assert found.verdict is Verdict.REFUSED
    assert REFUSED[name] in found.detail


def test_other_tokens_are_wrong(monkeypatch):
    attend = DriveLayer._attend_in_drive
    for name, share, message in (("LlamaForCausalLM", 0.0, "token "),
                                 ("OPTForCausalLM", 0.9, "logits differ by ")):  # the latter's tokens stay the same
        monkeypatch.setattr(DriveLayer, "_attend_in_drive",
                            lambda self, *given, share=share, **more: attend(self, *given, **more) * share)
        found = examine(ALL[name])
        assert found.verdict is Verdict.WRONG and found.detail.startswith(message)


def test_an_error_that_is_not_ours_is_wrong(monkeypatch):
    monkeypatch.setattr(DriveCache, "check_step", lambda *arguments: 1 // 0)
    found = examine(ALL["LlamaForCausalLM"])
    assert (found.verdict, found.detail.partition(":")[0]) == (Verdict.WRONG, "ZeroDivisionError")


def test_a_refusal_after_a_step_is_wrong(monkeypatch):
    def refuse(self, *given, **more):
        raise RequestError("too late")

    monkeypatch.setattr(DriveLayer, "_attend_in_drive", refuse)
    found = examine(ALL["LlamaForCausalLM"])
    assert (found.verdict, found.detail) == (Verdict.WRONG, "refused after 1 steps: too late")


def test_a_drive_that_is_full_says_nothing_about_a_model(monkeypatch):
    monkeypatch.setattr(support, "CAPACITY", 40)
    found = examine(ALL["LlamaForCausalLM"])
    assert found.verdict is Verdict.WRONG and found.detail.startswith("CapacityError: the sequence has room for 40")


def test_what_transformers_cannot_do_must_fail_without_us(monkeypatch):
    def fail(*given, **more):
        raise OSError("no")

    monkeypatch.setattr(support, "_expected", fail)
    for name, verdict, detail in (
            ("_expected", Verdict.WRONG, "the reference fails, eager attention alone does not: OSError: no"),
            ("_generate", Verdict.UNAVAILABLE, "eager attention: OSError: no"),
            ("build", Verdict.UNAVAILABLE, "OSError: no")):
        monkeypatch.setattr(support, name, fail)
        found = examine(ALL["LlamaForCausalLM"])
        assert (found.verdict, found.detail) == (verdict, detail)


def test_infinite_logits_must_be_in_the_same_places():
    logits = torch.tensor([[1.0, -torch.inf, 3.0]], dtype=torch.float64)
    assert support.difference(support.Answer([1], logits), support.Answer([1], logits)) is None
    assert support.difference(support.Answer([1], logits), support.Answer([1], logits.flip(1).roll(1, 1))) == (
        "logits are infinite in other places")


def test_the_page_is_of_the_installed_transformers():
    text = PAGE.read_text()
    if f"\n{model_page.version()} that generates text" not in text:
        pytest.skip(f"the page is of another version than {model_page.version()}: make models")
    assert model_page.listed(text) == sorted(ALL), "run make models"
    assert "| does anything else | 0 |" in text
    works = int(text.partition("| works: the same tokens | ")[2].partition(" ")[0])
    assert works >= 48
    assert len(model_page.listed(text.partition("\n## Not available")[2])) <= 5


def test_a_page_has_every_outcome():
    one = ALL["LlamaForCausalLM"]
    text = model_page.page([Outcome(one, Verdict.WORKS, ""), Outcome(ALL["MptForCausalLM"], Verdict.REFUSED, "a | b"),
                            Outcome(ALL["BltForCausalLM"], Verdict.UNAVAILABLE, "x" * 300 + " y")])
    assert "| MptForCausalLM | mpt | a \\| b |" in text and "## Wrong" not in text
    assert model_page.listed(text) == ["BltForCausalLM", "LlamaForCausalLM", "MptForCausalLM"]


# What the backend does for them.


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "Gemma3nForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM",
                                  "DoryForCausalLM", "MoshiForCausalLM"])
def test_batches_of_different_lengths_and_one_after_the_other(drive, name):
    model = build(ALL[name], 1)
    with DriveCache(drive(model), model.config, capacity_tokens=64, held_tokens=0) as cache:
        for lengths in ([30], [17, 30]):
            tokens, mask = tokens_of(lengths)
            expected = generate(model, tokens, RoundedCache(model.config), mask=mask, new=12)
            assert generate(model, tokens, cache, mask=mask, new=12).tolist() == expected.tolist()
            cache.reset()


def test_learned_sinks_take_their_share(drive):
    """Logits of a step whose sinks are large: what they take must be seen."""
    model = build(ALL["GptOssForCausalLM"], 2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks[:] = torch.tensor([-9.0, 0.0, 2.0, 5.0])
    tokens, _ = tokens_of([30])
    found = []
    with DriveCache(drive(model), model.config, capacity_tokens=64, held_tokens=0) as ours:
        for cache in (RoundedCache(model.config), ours):
            model.set_attn_implementation(NAME if cache is ours else REFERENCES[Element.FP16])
            with torch.no_grad():
                found.append([model(part, cache=cache).logits for part in (tokens, tokens[:, :1], tokens[:, 1:4])])
        for expected, got in zip(*found, strict=True):
            assert expected.std() > 0.1
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_learned_sinks_and_modes_that_blend(drive):
    model = build(ALL["GptOssForCausalLM"])
    tokens, _ = tokens_of([30])
    device = drive(model)
    message = r"layer 0: the model has learned sinks .* mode sparf blends in the mean"
    with (DriveCache(device, model.config, capacity_tokens=64, mode="sparf", features=8, top_units=8) as cache,
          pytest.raises(RequestError, match=message)):
        generate(model, tokens, cache, new=2)
    with DriveCache(device, model.config, capacity_tokens=64, mode="centroid", top_units=1000) as cache:
        expected = generate(model, tokens, RoundedCache(model.config), new=12)
        assert generate(model, tokens, cache, new=12).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM",
                                  "T5ForConditionalGeneration"])
def test_without_a_cache_of_the_drive_the_backend_gives_what_eager_attention_gives(name):
    model = build(ALL[name])
    tokens, mask = tokens_of([30, 21])
    inputs, seen = {"input_ids": tokens, "attention_mask": mask}, mask > 0
    if ALL[name].encoder:
        inputs["decoder_input_ids"], seen = tokens[:, :7], torch.ones(2, 7, dtype=torch.bool)
    logits = {}
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(**inputs).logits[seen]
    torch.testing.assert_close(logits[NAME], logits["eager"], rtol=1e-4, atol=1e-4)


def test_weights_that_are_asked_for_come_from_eager_attention():
    model = build(ALL["LlamaForCausalLM"])
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        found = model(tokens_of([30])[0], output_attentions=True).attentions
    assert found[0].shape == (1, 4, 30, 30)
    torch.testing.assert_close(found[0].sum(-1), torch.ones(1, 4, 30))


def test_an_assistant_model_shares_the_backend(drive):
    model = build(ALL["LlamaForCausalLM"])
    assistant = copy.deepcopy(model)
    tokens, _ = tokens_of([30])
    expected = generate(model, tokens, RoundedCache(model.config), new=12)
    assistant.set_attn_implementation(NAME)
    with DriveCache(drive(model, queries=8), model.config, capacity_tokens=64) as cache:
        assert generate(model, tokens, cache, new=12, assistant_model=assistant).tolist() == expected.tolist()


def test_states_of_linear_layers_cannot_go_back(drive):
    model = build(ALL["FalconH1ForCausalLM"])
    with DriveCache(drive(model), model.config, capacity_tokens=64) as cache:
        generate(model, tokens_of([30])[0], cache, new=2)
        assert not cache.is_croppable
        cache.crop(0)
        cache.layers[0].offload()
        cache.layers[0].prefetch()
        with pytest.raises(RequestError, match="layer 0 has the state of a linear layer too"):
            cache.layers[0].crop(-1)
        with pytest.raises(RequestError, match="layer 0 has the state of a linear layer, from which"):
            cache.crop(-1)
        assert cache.get_seq_length() == 31


def test_k_that_no_one_else_may_attend_again(drive):
    """Layers that share K and V attend those of this step, not of an earlier one."""
    model = build(ALL["LlamaForCausalLM"])
    with DriveCache(drive(model), model.config, capacity_tokens=64) as cache, torch.no_grad():
        model.set_attn_implementation(NAME)
        layer, attention = cache.layers[0], model.model.layers[0].self_attn
        first = layer.update(*torch.randn(2, 1, 4, 5, 32))
        query = torch.randn(1, 4, 5, 32)
        local = layer.attend(attention, query, *first, None, None)
        torch.testing.assert_close(layer.attend(attention, query, *first, None, None), local)
        second = layer.update(*torch.randn(2, 1, 4, 1, 32))
        one = layer.attend(attention, query[:, :, :1], *second, None, None)
        torch.testing.assert_close(layer.attend(attention, query[:, :, :1], *second, None, None), one)
        with pytest.raises(RequestError, match="K are not those that the DriveCache returned last"):
            layer.attend(attention, query, *first, None, None)
        assert cache.sequences[0].length() == 6


@pytest.mark.parametrize("name", ["FalconH1ForCausalLM", "Qwen3NextForCausalLM", "BartForConditionalGeneration",
                                  "Gemma3nForCausalLM"])
def test_beams(drive, name):
    """Rows are forked, whatever else a model's layers keep."""
    model, encoder = build(ALL[name], 1), ALL[name].encoder
    tokens, mask = tokens_of([30, 17])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 3,
               "eos_token_id": None, "pad_token_id": 0} | ({"decoder_start_token_id": 2} if encoder else {})
    theirs = RoundedCache(model.config)
    if encoder:
        theirs = EncoderDecoderCache(theirs, RoundedCache(model.config))
    model.set_attn_implementation(REFERENCES[Element.FP16])
    expected = model.generate(tokens, cache=theirs, **options)
    model.set_attn_implementation(NAME)
    device = drive(model)
    make = DriveEncoderDecoderCache if encoder else DriveCache
    with make(device, model.config, capacity_tokens=64, held_tokens=0) as cache:
        assert model.generate(tokens, cache=cache, **options).tolist() == expected.tolist()


def test_a_copy_has_states_of_its_own(drive):
    model = build(ALL["FalconH1ForCausalLM"], 1)
    tokens, _ = tokens_of([30])
    model.set_attn_implementation(NAME)
    with DriveCache(drive(model), model.config, capacity_tokens=64, held_tokens=0) as cache, torch.no_grad():
        model(tokens, cache=cache)
        with copy.deepcopy(cache) as other:
            first = model(tokens[:, 3:4], cache=other).logits
            model(tokens[:, 5:6], cache=other)
        assert torch.equal(model(tokens[:, 3:4], cache=cache).logits, first)


@pytest.mark.parametrize("name", ["DoryForCausalLM", "MoshiForCausalLM"])
def test_a_copy_has_layers_and_windows_of_its_own(drive, name):
    model = build(ALL[name], 1)
    tokens, _ = tokens_of([30])
    expected = generate(model, tokens, RoundedCache(model.config), new=12)
    with DriveCache(drive(model), model.config, capacity_tokens=64) as cache:
        generate(model, tokens, cache, new=1)
        for _ in range(2):
            with copy.deepcopy(cache) as other:
                assert [layer.slot for layer in other.drive_layers] == list(range(len(other.drive_layers)))
                assert generate(model, torch.cat([tokens, expected[:, :1]], 1), other, new=11).tolist() == expected[
                    :, 1:].tolist()


def test_what_a_later_pass_writes_is_refused(drive):
    device = drive(build(ALL["DoryForCausalLM"]))
    with pytest.raises(RequestError, match=r"attend K and V that a later pass writes .*; 'per_loop' works"):
        DriveCache(device, shrink(ALL["DoryForCausalLM"].config, recurrent_kv_cache_mode="last_loop"))


def test_k_and_v_of_a_picture_stay_in_this_machine(drive):
    model = build(ALL["MllamaForCausalLM"], 1)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                if hasattr(layer, name):
                    getattr(layer, name).fill_(1.0)     # zero in a new model
    tokens, picture = tokens_of([30])[0], torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(3))
    found = []
    with DriveCache(drive(model), model.config, capacity_tokens=64) as ours, torch.no_grad():
        for cache in (RoundedCache(model.config), ours):
            model.set_attn_implementation(NAME if cache is ours else REFERENCES[Element.FP16])
            logits = [model(tokens, cross_attention_states=picture, cross_attention_mask=torch.zeros(1, 1, 30, 9),
                            cache=cache).logits]
            if cache is ours:   # which the picture's layers of their own cache would not survive
                model(tokens[:, :1], cache=cache)
                cache.crop(-1)
            found.append([*logits, model(tokens[:, :1], cache=cache).logits])
        without = model(tokens, use_cache=False).logits
        assert [layer.get_seq_length() for layer in ours.layers] == [31, 9, 31, 9]
        ours.batch_repeat_interleave(2)
        assert ours.layers[1].keys.shape[0] == 2
        with pytest.raises(RequestError, match="some layers of this model are not in the drive"):
            ours.save("nowhere")
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)
    assert (found[0][0] - without).abs().max() > 0.1


# Encoder-decoder models.


def test_an_encoders_tokens_are_written_once_and_padding_is_not(drive):
    model = build(ALL["BartForConditionalGeneration"])
    tokens, mask = tokens_of([30, 17])
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False,
               "decoder_start_token_id": 2, "eos_token_id": None}
    model.set_attn_implementation(REFERENCES[Element.FP16])
    expected = model.generate(tokens, cache=EncoderDecoderCache(
        RoundedCache(model.config), RoundedCache(model.config)), **options)
    model.set_attn_implementation(NAME)
    device = drive(model)
    zones = device.free_zones
    with DriveEncoderDecoderCache(device, model.config, capacity_tokens=64, held_tokens=0) as cache:
        for _ in range(2):
            assert model.generate(tokens, cache=cache, **options).tolist() == expected.tolist()
            cross = cache.cross_attention_cache
            assert [sequence.length() for sequence in cross.sequences] == [30, 17]
            assert cross.report().tokens > 0
            cross.crop(-1)
            assert cross.sequences[0].length() == 30
            cache.reset()
            assert cross.layers[0].keys is None
    assert device.free_zones == zones


def test_an_encoders_mask_does_not_change(drive):
    model = build(ALL["BartForConditionalGeneration"])
    model.set_attn_implementation(NAME)
    tokens, mask = tokens_of([30])
    with DriveEncoderDecoderCache(drive(model), model.config, capacity_tokens=64) as cache, torch.no_grad():
        encoded = model.model.encoder(tokens, attention_mask=mask)
        model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=tokens[:, :2], cache=cache)
        other = mask.clone()
        other[0, 3] = 0
        with pytest.raises(RequestError, match="row 0 of the batch: the mask of the encoder's tokens is another one"):
            model(encoder_outputs=encoded, attention_mask=other, decoder_input_ids=tokens[:, 2:3], cache=cache)


def test_masks_of_encoders():
    assert [row.tolist() for row in attended_tokens(None, 2, 3)] == [[True] * 3] * 2
    floats = torch.tensor([[[[0.0, torch.finfo(torch.float32).min]]]])
    assert [row.tolist() for row in attended_tokens(floats, 2, 2)] == [[True, False]] * 2
    with pytest.raises(RequestError, match=r"must be of shape \(1, 1, positions, 3\), .* not \(1, 1, 1, 2\)"):
        attended_tokens(floats, 1, 3)
    with pytest.raises(RequestError, match="the positions of a step attend different tokens of the encoder"):
        attended_tokens(torch.ones(1, 1, 2, 2).tril().bool(), 1, 2)


def test_what_encoder_decoder_models_are_refused(drive):
    model = build(ALL["T5ForConditionalGeneration"])
    device = drive(model)
    with pytest.raises(RequestError, match=r"adds a bias by position to its scores.* self_attention=DynamicCache"):
        DriveEncoderDecoderCache(device, model.config, capacity_tokens=64)
    with pytest.raises(RequestError, match="capacity_tokens: options are for the decoder's own DriveCache"):
        DriveEncoderDecoderCache(device, model.config, self_attention=DynamicCache(config=model.config),
                                 capacity_tokens=64)
    with pytest.raises(RequestError, match="mode centroid: an encoder's tokens are attended densely"):
        DriveCache(device, model.config, cross=True, mode="centroid", top_units=4)


# Room.


@pytest.mark.parametrize("options", [{}, {"mode": "centroid", "top_units": 1000}])
def test_flash_is_reserved_as_tokens_come(drive, monkeypatch, options):
    monkeypatch.setattr("kvattic.integrations.cache.ROOM", 8)
    model = build(ALL["Qwen3ForCausalLM"])
    tokens, mask = tokens_of([30, 17])
    expected = generate(model, tokens, RoundedCache(model.config), mask=mask, new=60)
    device = drive(model, replace(ROOMY, dies=16))
    zones = device.free_zones
    with DriveCache(device, model.config, held_tokens=0, **options) as cache:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            model(tokens, attention_mask=mask, cache=cache)
        assert (cache.capacity_tokens, cache.sequences[0].capacity_tokens) == (512, 38)
        cache.reset()
        assert generate(model, tokens, cache, mask=mask, new=60).tolist() == expected.tolist()
        assert {one.capacity_tokens for one in cache.sequences} == {152}
        assert cache.report().tokens == 2 * 59
    assert device.free_zones == zones


def test_room_that_is_not_there_twice_over(drive, monkeypatch):
    """Where twice as much does not fit, what is needed may; and no row gets beyond the model's most positions."""
    monkeypatch.setattr("kvattic.integrations.cache.ROOM", 8)
    model = build(ALL["Qwen3ForCausalLM"])
    fork = Sequence.fork

    def tight(self, length=None, *, capacity_tokens=None):
        if capacity_tokens > 40:
            raise CapacityError("the flash is full")
        return fork(self, length, capacity_tokens=capacity_tokens)

    monkeypatch.setattr(Sequence, "fork", tight)
    tokens, _ = tokens_of([30])
    with DriveCache(drive(model), model.config) as cache:
        generate(model, tokens, cache, new=11)
        assert cache.sequences[0].capacity_tokens == 40
        with pytest.raises(CapacityError, match="the flash is full"):
            generate(model, torch.cat([tokens, tokens], dim=1), cache, new=2)
    with DriveCache(drive(model), model.config) as cache:
        cache.capacity_tokens = 38
        with pytest.raises(CapacityError, match="room for 38 tokens"):
            generate(model, tokens, cache, new=12)


# Configurations.


def test_configurations_are_read():
    assert most_positions(XGLMConfig(max_position_embeddings=99)) == 99
    with pytest.raises(RequestError, match="T5Config does not say how many tokens"):
        most_positions(T5Config())
    deepseek = shrink(ALL["DeepseekV3ForCausalLM"].config)
    assert latent_width(deepseek, (2, 1, 5, 32)) == 32
    assert latent_width(deepseek, (2, 4, 5, 32)) is None
    with pytest.raises(ConfigError, match="MambaConfig: the configuration names no attention heads"):
        config_for(transformers.MambaConfig())


def test_models_without_attention(drive):
    config = shrink(ALL["JambaForCausalLM"].config, attn_layer_period=9, attn_layer_offset=8)
    device = drive(build(ALL["LlamaForCausalLM"]))
    with pytest.raises(RequestError, match="JambaConfig: no layer of the model has attention"):
        DriveCache(device, config, capacity_tokens=64)
