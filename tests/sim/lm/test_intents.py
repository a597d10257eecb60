"""The intent task: templates, prompts, adapters, and weights as q8_0."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from kvattic_sim.lm import intents
from kvattic_sim.lm.intents import INTENTS, LANGUAGES, PRODUCTS, TEMPLATES, TEST, TRAIN, questions
from kvattic_sim.lm.prompts import Prompt


def test_every_language_has_every_intent():
    assert list(TEMPLATES) == list(LANGUAGES)
    for of_language in TEMPLATES.values():
        assert list(of_language) == list(INTENTS)
        assert {len(templates) for templates in of_language.values()} == {7}


def test_training_and_test_have_nothing_in_common():
    train, test = ({re.sub("|".join(PRODUCTS[part]) + r"|\d+", "_", one.text) for one in questions(part, rounds=3)}
                   for part in (TRAIN, TEST))
    assert len(train) == 200 and len(test) == 80 and not train & test
    assert not set(PRODUCTS[TRAIN]) & set(PRODUCTS[TEST])


def test_questions_are_seeded():
    assert list(questions(TEST)) == list(questions(TEST)) != list(questions(TEST, seed=1))
    assert len(list(questions(TRAIN, rounds=2))) == 400
    with pytest.raises(ValueError, match="part must be train or test, not 'all'"):
        next(questions("all"))


class Letters:
    """A tokenizer: one token for each byte."""

    eos_token_id = 0

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{one['role']}>{one['content']}\0" for one in messages) + "<assistant>"

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=list(text.encode()))


def test_a_prompt_is_cut_where_the_message_begins():
    prompt = Prompt(Letters(), "Sort.")
    assert bytes(prompt.shared) == b"<system>Sort.\0<user>"
    assert bytes(prompt.question("Hello?")) == b"Hello?\0<assistant>"
    assert bytes(prompt.answer("stock")) == b"stock\0"
    assert all(name in intents.SYSTEM for name in INTENTS)


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch", reason="needs the extra transformers")
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    torch.manual_seed(0)
    return lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=None, eos_token_id=0,
        pad_token_id=0)).eval()


def test_merged_adapters_are_adapters(model, tmp_path):
    import torch

    from kvattic_sim.lm import adapters

    tokens = torch.arange(1, 20)[None]
    adapted, plain = model(), model()
    plain.load_state_dict(adapted.state_dict())
    parameters = adapters.adapt(adapted, rank=4)
    assert len(parameters) == 2 * 7 * 2
    with torch.no_grad():
        assert torch.equal(adapted(tokens).logits, plain(tokens).logits)    # they begin as nothing
        for parameter in parameters:
            parameter.copy_((torch.randn_like(parameter) * 0.1).half().float())
        expected = adapted(tokens).logits
        adapters.save(adapted, tmp_path / "some.npz")
        found = adapters.load(tmp_path / "some.npz")
        assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-3)
        adapters.merge(plain, found)
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"the adapters are of layer model\.layers\.9\.q, which the model has not"):
        adapters.merge(plain, {f"model.layers.9.q.{which}": np.zeros((4, 4), np.float16) for which in ("up", "down")})
    name = next(name for name in found if name.endswith(".up")).removesuffix(".up")
    with pytest.raises(ValueError, match=r"must be of weights \(64, 64\), not \(3, 64\)"):
        adapters.merge(plain, {f"{name}.up": np.zeros((3, 4), np.float16), f"{name}.down": found[f"{name}.down"]})


def test_wrong_adapters_are_refused(model):
    import torch

    from kvattic_sim.lm import adapters

    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        adapters.adapt(model(), rank=0)
    with pytest.raises(ValueError, match="the model has no layer whose name ends with one of q_proj, k_proj"):
        adapters.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), rank=1)


def test_quantised_weights_are_gguf_s(model):
    gguf = pytest.importorskip("gguf", reason="needs the extra quality")
    from kvattic_sim.lm import adapters

    one = model()
    before = {name: value.detach().numpy().copy() for name, value in one.named_parameters()}
    size = adapters.quantise(one)
    matrices = [value for value in before.values() if value.ndim == 2]
    assert size == sum(value.size for value in matrices) // 32 * 34
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, value in one.named_parameters():
        found, was = value.detach().numpy(), before[name]
        if was.ndim == 1:
            assert np.array_equal(found, was)
        else:
            assert np.array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(was, kind), kind))
            assert 0 < np.linalg.norm(found - was) < 0.01 * np.linalg.norm(was)


def test_training_lowers_the_loss(model):
    from kvattic_sim.lm import train_intents
    from kvattic_sim.lm.intents import Question

    asked = [Question(language="en", intent=intent, text=text) for intent, text in (("stock", "Is it?"),
                                                                                   ("refund", "My money!"))]
    said = []
    one, prompt = model(), Prompt(Letters(), "Sort.")
    before = train_intents.loss_of(one, prompt, asked).item()
    train_intents.train(one, prompt, asked, steps=30, rank=4, batch=2, say=said.append)
    assert train_intents.loss_of(one, prompt, asked).item() < before - 0.1
    assert len(said) == 3 and "step   30: loss" in said[-1]
