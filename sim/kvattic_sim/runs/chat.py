"""`kvattic chat`: SmolLM2-135M-Instruct answers with its KV cache in the drive, and says what the answer cost.

    with Chat() as chat:
        answer = chat.ask("What is an attic?", print)
        print(answer.cost_line())

The drive is the golden device, so that its time and energy are modelled.  It needs the extra `quality`; weights come
from `kvattic_sim.lm.smollm2`.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import TextStreamer

import kvattic
from kvattic.errors import RequestError
from kvattic.integrations.transformers import NAME, DriveCache, config_for
from kvattic.spec.formats import Element
from kvattic.timing.cost import Cost
from kvattic.timing.energy import Range
from kvattic_sim.lm import smollm2
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache

__all__ = ["TOKENS", "Answer", "Chat", "difference"]

MODEL = "SmolLM2-135M-Instruct"
TOKENS = 128
"""Of an answer, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, and what the drive did for it; the model's own work is not in it.

    Attributes:
        question: what was asked.
        text: of the answer.
        prompt: token ids of everything before the answer.
        tokens: token ids of the answer.
        attended: tokens whose attention the drive computed: all that the cache took but the first turn's prompt, which
            the model attends by itself.
        attend: their attention.
        write: writing K and V of all tokens that are new, the prompt's too.
    """

    question: str
    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    attended: int
    attend: Cost
    write: Cost

    @property
    def milliseconds(self) -> float | None:
        """Of the drive for each token that it attended; None: there is none, or the drive keeps no time."""
        seconds = self.attend.seconds
        return None if seconds is None or not self.attended else 1e3 * seconds / self.attended

    @property
    def flash_kilobytes(self) -> float | None:
        """1,000 bytes read from flash for each token that it attended; None: there is none."""
        return sum(self.attend.flash_bytes.values()) / 1e3 / self.attended if self.attended else None

    @property
    def dram_kilobytes(self) -> float | None:
        """Likewise from the drive's DRAM, where the newest tokens wait until they fill a stripe."""
        return sum(self.attend.dram_bytes.values()) / 1e3 / self.attended if self.attended else None

    @property
    def joules(self) -> Range | None:
        """Energy of the attention of each token; modelled."""
        found = self.attend.joules
        return None if found is None or not self.attended else found * (1 / self.attended)

    @property
    def how(self) -> str:
        """Where the time comes from."""
        return "modelled" if self.attend.modelled else "measured"

    def cost_line(self) -> str:
        """What it cost, in one line."""
        if not self.attended:
            return f"{len(self.tokens)} tokens; the drive attended none, for the model attends a prompt by itself"
        energy, time = self.joules, self.milliseconds
        parts = [] if time is None else [f"{time:.3g} ms ({self.how})"]
        parts += [f"{self.flash_kilobytes:,.0f} KB from flash", f"{self.dram_kilobytes:,.0f} KB from DRAM"]
        if energy is not None:
            parts.append(f"{1e3 * energy.typical:.3g} mJ ({1e3 * energy.low:.2g} to {1e3 * energy.high:.2g}, modelled)")
        return f"{len(self.tokens)} tokens; the drive, a token: {', '.join(parts)}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        energy = self.joules
        return {
            "model": MODEL, "question": self.question, "answer": self.text, "prompt_tokens": len(self.prompt),
            "tokens": len(self.tokens), "attended_tokens": self.attended,
            "ms_per_token": self.milliseconds, "time": self.how,
            "flash_kb_per_token": self.flash_kilobytes,
            "dram_kb_per_token": self.dram_kilobytes,
            "mj_per_token": None if energy is None else {
                "low": 1e3 * energy.low, "typical": 1e3 * energy.typical, "high": 1e3 * energy.high},
            "energy": "modelled",
            "written_bytes": self.write.written_bytes, "page_reads": self.attend.page_reads,
        }


class _Streamer(TextStreamer):
    """Hands on text as soon as it cannot change any more."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer."""
        del stream_end
        if text:
            self._take(text)


class Chat:
    """A conversation whose K and V stay in the drive from turn to turn.

    Args:
        loaded: tokenizer and model; SmolLM2's by default.
        target: of `kvattic.open`.
        tokens: of an answer, at most.

    Raises:
        RequestError: tokens is not positive.
        WeightsError: the weights are not to be had.
    """

    def __init__(self, loaded: tuple[Any, Any] | None = None, *, target: str = "model", tokens: int = TOKENS) -> None:
        if tokens < 1:
            raise RequestError(f"the tokens of an answer must be at least 1, not {tokens}")
        self.tokenizer, self.model = loaded or smollm2.load()
        self.tokens = tokens
        self._target = target
        self._text: list[int] = []      # token ids of all turns so far
        self._stack = ExitStack()
        self._cache: Any = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            device = stack.enter_context(kvattic.open(self._target, config_for(self.model)))
            self._cache = stack.enter_context(DriveCache(device, self.model.config, held_tokens=0))
            # Nothing is taken back, so that all that fills a stripe can go to flash.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, question: str, take: Callable[[str], None] = lambda text: None) -> Answer:
        """Answer greedily.

        Args:
            question: of the user; the turns before are known.
            take: told the answer piece by piece, as it comes.

        Raises:
            RequestError: the question is empty, or the conversation has more tokens than the model has positions.
        """
        prompt = self._prompt(question)
        before = self._sums()
        found = self._generate(NAME, self._cache, prompt, _Streamer(self.tokenizer, take))
        self._text = prompt + found
        attended, attend, write = (now - then for now, then in zip(self._sums(), before, strict=True)
                                   ) if before else self._sums()
        return Answer(question=question, text=self.tokenizer.decode(found, skip_special_tokens=True),
                      prompt=tuple(prompt), tokens=tuple(found), attended=attended, attend=attend, write=write)

    def reference(self, prompt: Iterable[int]) -> tuple[int, ...]:
        """The answer by eager attention over K, V and queries rounded alike, without a drive.

        Args:
            prompt: token ids, such as `Answer.prompt`.
        """
        return tuple(self._generate(REFERENCES[Element.FP16], RoundedCache(self.model.config), list(prompt), None))

    def _prompt(self, question: str) -> list[int]:
        """Token ids of all turns and the question, ready for an answer."""
        if not question.strip():
            raise RequestError("the question is empty: ask for something")
        turn = self.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                                  tokenize=False)
        if self._text:
            # What the model has read must not change: the new turn comes behind it, and without a system prompt.
            turn = turn[turn.rindex("<|im_start|>user"):]
            ended = self._text[-1] == self.tokenizer.eos_token_id
            turn = ("\n" if ended else f"{self.tokenizer.eos_token}\n") + turn
        added: list[int] = self.tokenizer(turn, add_special_tokens=False).input_ids
        prompt = self._text + added
        most = self.model.config.max_position_embeddings
        if len(prompt) + self.tokens > most:
            raise RequestError(f"the conversation is too long: {len(prompt):,} tokens and an answer of {self.tokens:,}"
                               f", the model has {most:,} positions; begin a new one")
        return prompt

    def _generate(self, backend: str, cache: Any, prompt: list[int], streamer: Any) -> list[int]:
        text = torch.tensor([prompt])
        self.model.set_attn_implementation(backend)
        with torch.inference_mode():
            found = self.model.generate(text, attention_mask=torch.ones_like(text), cache=cache, streamer=streamer,
                                        max_new_tokens=self.tokens, do_sample=False)
        tokens: list[int] = found[0, len(prompt):].tolist()
        return tokens

    def _sums(self) -> tuple[Any, ...]:
        """Tokens that the drive attended, their attention, all writing; of all turns so far. Empty before the first."""
        if not self._text and not self._cache.sequences:
            return ()
        report = self._cache.report()
        return report.tokens, report.attend, report.prefill + report.append


def difference(found: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the tokens, place by place, that are not equal; those that one of them lacks are not.

    Args:
        found: token ids.
        expected: those that they should be.
    """
    length = max(len(found), len(expected))
    equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=False))
    return 1 - equal / length if length else 0.0
