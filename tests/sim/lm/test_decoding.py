"""A real model's decode steps by any method: the model in torch, needles, bits per byte; on a tiny model."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvattic_sim.lm import decoding, needle, perplexity
from kvattic_sim.lm.decoding import Decoder
from kvattic_sim.lm.methods import Dense, HeavyHitters, Local, Sketched, Sparf
from kvattic_sim.lm.needle import FACTS, Question, Score
from kvattic_sim.reports.bench import BARS

VOCABULARY = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
                         initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model)


TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=600)


def behind(decoder, method, prefill=560, steps=20, queries=False):
    prefix = decoder.prefix(600, queries)
    decoder.prefill(prefix, TOKENS[:prefill])
    return decoder.decode(prefix, TOKENS[prefill : prefill + steps], method)


def test_dense_decoding_is_the_model(model, decoder):
    with torch.inference_mode():
        right = model(torch.from_numpy(TOKENS[None, :580])).logits[0, 560:].numpy()
    found = behind(decoder, Dense())
    # K and V are rounded to fp16.
    assert found.shape == right.shape and np.abs(found - right).max() < 0.01 * np.abs(right).max()


def test_steps_at_once_are_steps_one_by_one(decoder):
    method = Sparf(features=4, share=1 / 8)
    together = behind(decoder, method)
    prefix = decoder.prefix(600)
    decoder.prefill(prefix, TOKENS[:200])
    decoder.prefill(prefix, TOKENS[200:560])      # a prompt in parts is the prompt
    for at in range(560, 580):
        one = decoder.decode(prefix, TOKENS[at : at + 1], method)
        # fp16 may round a sum in another order the other way.
        assert np.abs(one[0] - together[at - 560]).max() < 0.01 * np.abs(one).max()
        prefix.tokens += 1


def test_a_method_changes_what_comes(decoder):
    dense = behind(decoder, Dense())
    errors = [np.abs(behind(decoder, Sketched(share=1 / 2**n, bits=4)) - dense).mean() for n in (0, 2, 4)]
    assert errors[0] < 1e-4 and errors == sorted(errors)


def test_heavy_hitters_see_the_queries_of_the_prompt(decoder):
    method = HeavyHitters(share=1 / 8)
    assert np.abs(behind(decoder, method, queries=True) - behind(decoder, method)).max() > 1e-3


def test_a_prefix_is_taken_from_another(decoder):
    one, other = decoder.prefix(580, queries=True), decoder.prefix(600, queries=True)
    decoder.prefill(other, TOKENS[:400])
    one.take(other, 100)
    decoder.prefill(one, TOKENS[100:560])
    assert np.abs(decoder.decode(one, TOKENS[560:580], Dense()) - behind(decoder, Dense())).max() < 1e-3
    with pytest.raises(ValueError, match="tokens must be from 0 to 400, not 401"):
        one.take(other, 401)
    with pytest.raises(ValueError, match="the prefix must have room for 581 tokens, not 580"):
        decoder.prefill(one, TOKENS[560:581])


# Needles.


class Tokenizer:
    """A token for each byte, and one for each special token."""

    def __call__(self, text, add_special_tokens=True):
        for number, special in enumerate(("<|im_start|>", "<|im_end|>")):
            text = text.replace(special, chr(number))
        return type("Encoding", (), {"input_ids": list(text.encode("latin-1"))})

    def decode(self, tokens):
        return bytes(tokens).decode("latin-1")


class Parrot:
    """A decoder that answers what was planted if its method attends that far back, at least to the number."""

    head_dim = 64

    def __init__(self):
        self.prompts = []

    def prefix(self, room):
        return type("Prefix", (), {"text": [], "room": room, "take": lambda self, other, tokens: setattr(
            self, "text", other.text[:tokens])})()

    def prefill(self, prefix, tokens):
        prefix.text = prefix.text + list(tokens)
        assert len(prefix.text) <= prefix.room

    def decode(self, prefix, tokens, method):
        text = bytes(prefix.text + list(tokens)).decode("latin-1")
        self.prompts.append(text)
        begins = next(fact.begins for fact in FACTS if text.count(fact.begins) == 2)
        reach = text if isinstance(method, Dense) else text[-400:]
        at = reach.find(begins)
        number = reach[at + len(begins) : at + len(begins) + 5] if text.count(begins) == 2 and at >= 0 else "     "
        number = number if number.strip().isdigit() else "     "
        logits = np.zeros((len(tokens), 256), np.float32)
        for place, letter in enumerate(number):
            logits[len(tokens) - 5 + place, ord(letter)] = 1
        return logits


TEXT = "All work and no play makes a dull boy. " * 40


@pytest.mark.parametrize("dense", [False, True])
def test_a_needle_is_found_if_it_is_attended(dense):
    parrot = Parrot()
    asked = (Question(0, 0, 800), Question(1, 9, 800), Question(2, 4, 1200))
    found = needle.ask(parrot, Tokenizer(), asked, {"dense": Dense(), "near": Local(share=0.1)}, TEXT, dense)
    assert found["dense"].right == (True, True, True) and found["near"].right == (False, True, False)
    assert found["near"].share == 1 / 3
    header, _, rest = parrot.prompts[0].partition("user\n")
    text = rest.partition(f"\n\n{FACTS[0].asks}\1\n\0assistant\n")[0]
    assert header.startswith("\0system\n") and len(text) == 800
    assert text.find(f"\n{FACTS[0].begins} {FACTS[0].number}.\n") == 40 and text[:40] == TEXT[:40]


def test_a_text_for_needles_is_long_enough():
    with pytest.raises(ValueError, match="text must have at least 4000 tokens, not 1560"):
        needle.ask(Parrot(), Tokenizer(), (Question(0, 0, 4000),), {}, TEXT)


def test_a_hundred_questions_and_ten():
    whole, some = needle.questions(10), needle.questions(1)
    assert len(whole) == 100 and len({(one.fact, one.depth) for one in whole}) == 100
    assert sorted(one.fact for one in some) == sorted(one.depth for one in some) == list(range(10))
    for asked in (whole, some):
        assert {sum(one.length == length for one in asked) for length in needle.LENGTHS} == {len(asked) // 5}
    assert whole[:10] == some
    with pytest.raises(ValueError, match="tens must be from 1 to 10, not 11"):
        needle.questions(11)
    assert len({fact.number for fact in FACTS}) == len({fact.begins for fact in FACTS}) == 10


def test_figures_of_needles(monkeypatch):
    right = {"dense": (True, True, False, True), "codes": (True, True, True, False), "sparf": (False,) * 4,
             "fetched": (True, False, False, False), "centroid": (False,) * 4, "quest": (True,) * 4}
    monkeypatch.setattr(decoding, "load", lambda: (Parrot(), Tokenizer()))
    monkeypatch.setattr(needle, "ask", lambda *arguments, **more: {key: Score(each) for key, each in right.items()})
    found = needle.measure()
    assert set(found) == set(needle.KEYS) <= set(BARS)
    assert found["sparse.sketch.needle"] == 1 and found["sparse.sketch.needle.fetched"] == pytest.approx(1 / 3)
    assert found["sparse.sketch.needle.dense"] == 0.75
    assert BARS["sparse.sketch.needle"].limits == (0.9,)


# Bits per byte.


def test_surprise_of_even_odds():
    assert perplexity.surprise(np.zeros((3, 8), np.float32), [1, 2, 3]) == pytest.approx(9)
    sure = np.array([[0, 1000, 0]], np.float32)
    assert perplexity.surprise(sure, [1]) == 0 and perplexity.surprise(sure, [0]) == pytest.approx(1000 / np.log(2))


def test_a_point_is_the_models_loss(model, decoder):
    prefix = decoder.prefix(600)
    decoder.prefill(prefix, TOKENS[:550])
    with torch.inference_mode():
        logits = model(torch.from_numpy(TOKENS[None, :599])).logits[0, 550:]
        loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(TOKENS[551:]), reduction="sum"))
    found = perplexity.point(decoder, prefix, TOKENS[550:], 98, Dense(), chunk=10)
    assert found.bits == pytest.approx(loss / np.log(2) / 98, rel=1e-3) and prefix.tokens == 550
    # Two layers, two heads, 49 steps, of which 256 or 512 tokens each are in flash.
    assert found.flash_bytes == found.element_bytes == 2 * 2 * 49 * 512 * 64


def test_bits_by_method(monkeypatch, decoder):
    monkeypatch.setattr(perplexity, "load", lambda: (decoder, Tokenizer()))
    monkeypatch.setattr(perplexity, "english", lambda: TEXT)
    ratios = (Fraction(1, 4), Fraction(1, 16))
    found = perplexity.measure(400, ("sketch", "h2o"), 2, steps=20, ratios=ratios)
    assert set(found) == {("dense", Fraction(1)), ("sketch", ratios[0]), *(("h2o", ratio) for ratio in ratios)}
    dense = found["dense", Fraction(1)]
    assert all(one.flash_bytes < dense.flash_bytes for key, one in found.items() if key[0] != "dense")
    assert dense.flash_bytes == 2 * 2 * 2 * 20 * 256 * 64
    with pytest.raises(ValueError, match="text must have at least 1601 tokens, not 1560"):
        perplexity.measure(400, (), 4)


def test_the_model_is_loaded_from_its_file(monkeypatch, tmp_path, model):
    path = tmp_path / "some.gguf"
    asked = []

    class From:
        def __init__(self, result):
            self.result = result

        def from_pretrained(self, folder, **keywords):
            asked.append((folder, keywords["gguf_file"]))
            return self.result

    monkeypatch.setattr("kvattic_sim.lm.smollm2.weights", lambda: path)
    monkeypatch.setattr("transformers.AutoTokenizer", From("tokenizer"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM", From(model))
    found, tokenizer = decoding.load()
    assert tokenizer == "tokenizer" and found.head_dim == 16 and asked == [(tmp_path, "some.gguf")] * 2
