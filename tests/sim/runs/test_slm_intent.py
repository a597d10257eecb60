"""Questions behind a shared prompt, asked of a small model of random weights whose tokens are bytes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra transformers")
pytest.importorskip("transformers", reason="needs the extra transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvattic import TINY, RequestError, cli  # noqa: E402
from kvattic_sim.lm import adapters  # noqa: E402
from kvattic_sim.lm.intents import TEST, questions  # noqa: E402
from kvattic_sim.lm.prompts import Prompt  # noqa: E402
from kvattic_sim.runs import slm_intent  # noqa: E402
from kvattic_sim.runs.outcome import Request  # noqa: E402

ROOMY = replace(TINY, dies=8, part=replace(TINY.part, blocks=64))


class Letters:
    """A tokenizer: one token for each byte."""

    eos_token_id = 0

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        return "".join(f"<{one['role']}>{one['content']}\0" for one in messages) + "<assistant>"

    def __call__(self, text, *, add_special_tokens):
        return SimpleNamespace(input_ids=list(text.encode()))


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.15, bos_token_id=None,
        eos_token_id=0, pad_token_id=0)).eval()
    return slm_intent.Model(model, Prompt(Letters(), "Sort what customers write, by one word."))


@pytest.fixture(scope="module")
def asked():
    return list(questions(TEST))[::27]


@pytest.mark.parametrize("kv", slm_intent.KV)
def test_answers_are_those_of_eager_attention(given, asked, kv):
    config = slm_intent.drive_for(given.model, kv, ROOMY)
    assert (config.element, config.kv) == slm_intent.KV[kv]
    found = slm_intent.answer_in_drive(given, config, asked)
    eager = slm_intent.answer_eagerly(given, kv, asked)
    assert slm_intent.unequal(found, eager) == 0 and len(found.tokens) == len(asked) == 3
    # All but the last of the shared prompt's tokens, in whole blocks: a page of tokens each.
    block = 16 * 2 // config.kv.element_bytes
    assert found.shared_tokens == len(given.prompt.shared) // block * block >= 32


def test_a_shared_prompt_is_written_once(given, asked):
    config = slm_intent.drive_for(given.model, "fp16", ROOMY)
    found = slm_intent.answer_in_drive(given, config, asked)
    alone = slm_intent.answer_in_drive(given, config, asked, share=False)
    assert alone.prompt is None and slm_intent.unequal(alone, found) == 0
    token = 2 * 2 * config.token_bytes      # K and V of two layers with one head
    saved = alone.write.written_bytes - found.write.written_bytes
    assert saved >= len(asked) * found.shared_tokens * token
    assert found.prompt.page_programs > 0 and sum(found.attend.flash_bytes.values()) > 0


def test_unequal_answers_are_counted(given, asked):
    right = slm_intent.Answers(tokens=[tuple(given.prompt.answer(one.intent)) for one in asked])
    wrong = slm_intent.Answers(tokens=[*right.tokens[:-1], (1, 2)])
    assert slm_intent.unequal(right, right) == 0 and slm_intent.unequal(wrong, right) == pytest.approx(1 / 3)
    assert slm_intent.accuracy(given, asked, right) == 1
    assert slm_intent.accuracy(given, asked, wrong) == pytest.approx(2 / 3)


def test_a_slice_of_its_own_numbers(given, asked):
    found = slm_intent.sliced(given, "fp16", asked[0])
    assert 0 < found.error < 5e-7 and found.bit_exact is None
    assert f"layer 1, 1 KV heads x {given.tokens(asked[0]).shape[1]} tokens" in found.run.what


def test_a_format_that_the_drive_has_not_is_refused(given, capsys):
    with pytest.raises(RequestError, match="a format that the drive has, fp16, bf16, fp8_e4m3, fp8_e5m2, not 'q8_0'"):
        slm_intent.drive_for(given.model, "q8_0")
    with pytest.raises(RequestError, match="--kv must be a format that the drive has"):
        slm_intent.run(Request(kv="q9"))
    assert cli.main(["run", "agd", "--kv", "fp16"]) == 2
    assert "workload agd has K and V in the format of its drive; --kv is for slm-intent" in capsys.readouterr().err


def test_the_adapters_are_here():
    found = adapters.load(slm_intent.ADAPTERS)
    assert len(found) == 30 * 7 * 2 and slm_intent.ADAPTERS.stat().st_size < 2e6
