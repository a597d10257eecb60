"""Token ids of the intent task's prompts: a shared beginning, a question, an answer."""

from typing import Any

from kvattic_sim.lm.intents import SYSTEM

__all__ = ["Prompt"]

_MARK = "{the message}"
"""Stands for a message where the template of a chat is cut."""


class Prompt:
    """Prompts with the system prompt of the intent task.

    Args:
        tokenizer: of transformers, with a template of chats.
        system: what all prompts begin with.

    Attributes:
        shared: token ids of the beginning that all prompts share, up to the message.
        end: the token that ends an answer.
    """

    def __init__(self, tokenizer: Any, system: str = SYSTEM) -> None:
        self._tokenizer = tokenizer
        whole = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": _MARK}], add_generation_prompt=True,
            tokenize=False)
        before, _, self._after = whole.partition(_MARK)
        self.shared: list[int] = self._ids(before)
        self.end: int = tokenizer.eos_token_id

    def question(self, text: str) -> list[int]:
        """Token ids of a message, from behind the shared beginning to where the answer begins."""
        return self._ids(text + self._after)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, with the token that ends it."""
        return [*self._ids(text), self.end]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return found
