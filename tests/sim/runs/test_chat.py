"""Chat with a small model of random weights, whose tokens are bytes."""

import io
import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra transformers")
pytest.importorskip("transformers", reason="needs the extra transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvattic import RequestError, cli  # noqa: E402
from kvattic_sim.runs import chat as chats  # noqa: E402

END = 0


class Letters:
    """A tokenizer: one token for each byte, and a template with the marks of SmolLM2's."""

    eos_token, eos_token_id = "\0", END

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        said = "".join(f"<|im_start|>{message['role']}\n{message['content']}\0\n" for message in messages)
        return f"<|im_start|>system\nBe brief\0\n{said}<|im_start|>assistant\n"

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, tokens, *, skip_special_tokens=True):
        return "".join(f"{int(token)} " for token in tokens if token != END)


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    return Letters(), LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.15, bos_token_id=None,
        eos_token_id=END, pad_token_id=END)).eval()


def test_two_turns_are_those_of_eager_attention(loaded):
    with chats.Chat(loaded, tokens=12) as chat:
        pieces = []
        first = chat.ask("What is it?", pieces.append)
        second = chat.ask("And that?")
        for answer in (first, second):
            assert answer.tokens == chat.reference(answer.prompt)
            assert chats.difference(answer.tokens, chat.reference(answer.prompt)) == 0
    assert len(pieces) > 1 and "".join(pieces) == first.text
    assert first.attended == 11     # the first token follows from the prompt, which the model attends
    # The second turn goes on from what is there, all but the first answer's last token; the rest comes to the drive.
    assert second.prompt[: len(first.prompt) + 12] == first.prompt + first.tokens
    assert bytes(second.prompt).count(b"Be brief") == 1
    assert second.attended == len(second.prompt) - len(first.prompt)


def test_what_an_answer_cost(loaded):
    with chats.Chat(loaded, tokens=6) as chat:
        answer = chat.ask("What is it?")
    found = answer.plain()
    assert found["time"] == found["energy"] == "modelled"
    assert found["ms_per_token"] > 0
    low, typical, high = (found["mj_per_token"][name] for name in ("low", "typical", "high"))
    assert 0 < low < typical < high
    # K and V of 2 layers, one head of 32, two bytes each, of 6 lengths; DRAM is read by codewords of 8 tokens.
    length = len(answer.prompt)
    least = 2 * 2 * 32 * 2 * sum(range(length + 1, length + 6)) / 5 / 1e3
    assert least <= found["dram_kb_per_token"] <= least + 2 * 2 * 512 / 1e3
    assert found["flash_kb_per_token"] == 0
    line = answer.cost_line()
    assert "6 tokens; the drive, a token:" in line and line.count("modelled") == 2
    json.dumps(found)


def test_an_answer_of_one_token_costs_the_drive_nothing(loaded):
    with chats.Chat(loaded, tokens=1) as chat:
        answer = chat.ask("What is it?")
    assert answer.attended == 0 and answer.milliseconds is None and answer.joules is None
    assert "attended none" in answer.cost_line()


def test_what_cannot_be_asked(loaded):
    with pytest.raises(RequestError, match="tokens of an answer must be at least 1, not 0"):
        chats.Chat(loaded, tokens=0)
    with chats.Chat(loaded, tokens=4) as chat:
        with pytest.raises(RequestError, match="the question is empty"):
            chat.ask("  ")
        with pytest.raises(RequestError, match=r"too long: \d+ tokens and an answer of 4, the model has 512 positions"):
            chat.ask("x" * 500)


def test_the_difference_counts_places():
    assert chats.difference([1, 2, 3], [1, 2, 3]) == 0
    assert chats.difference([1, 2, 4], [1, 2, 3]) == pytest.approx(1 / 3)
    assert chats.difference([1, 2], [1, 2, 3, 4]) == 0.5
    assert chats.difference([], []) == 0


@pytest.fixture
def small(monkeypatch, loaded):
    monkeypatch.setattr(chats.smollm2, "load", lambda: loaded)


def test_the_command_answers(capsys, small):
    assert cli.main(["chat", "--tokens", "5", "--check", "What", "is", "it?"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("[5 tokens") and out[-1] == "[100.0% of the tokens are those of eager attention]"


def test_the_command_prints_json_alone(capsys, small):
    assert cli.main(["chat", "--json", "--tokens", "5", "--check", "What is it?"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"] == "What is it?" and found["tokens"] == 5 and found["unequal_share"] == 0


def test_an_unequal_answer_is_one(capsys, small, monkeypatch):
    monkeypatch.setattr(chats.Chat, "reference", lambda self, prompt: (1, 2))
    assert cli.main(["chat", "--tokens", "5", "--check", "What is it?"]) == 1
    assert "[0.0% of the tokens are those of eager attention]" in capsys.readouterr().out


def test_each_line_of_the_input_is_a_question(capsys, small, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\nTwo?\n"))
    assert cli.main(["chat", "--tokens", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("> ")] == ["> One?", "> Two?"]
    assert sum("the drive, a token" in line for line in out) == 2


def test_json_needs_a_question(capsys, small):
    assert cli.main(["chat", "--json"]) == 2
    assert "give the question as an argument" in capsys.readouterr().err
