"""How many drafted tokens a target accepts: the project's language model and the smaller one that drafts for it.

Decoding is greedy: a draft is accepted as far as it is what the target would have said.  So what a target says greedily
is all that is needed, and the rank that the draft gives to each of its tokens: as long as a draft is right, it has seen
the same text.  It needs torch and transformers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import kvattic
from kvattic.integrations.transformers import NAME, DriveCache, config_for
from kvattic.spec.elements import Booleans
from kvattic_sim.lm import huggingface
from kvattic_sim.lm.model import load_held_out
from kvattic_sim.reports.benches.generate import RoundedCache, generate

__all__ = ["TREE", "Assisted", "Tree", "ancestors", "assisted", "chain", "overlap", "ranks", "yield_of"]

Tree: TypeAlias = tuple[tuple[int, ...], ...]
"""Drafted tokens, each by the ranks on the way to it: (0,) is the draft's first choice, (1, 0) what it says behind its
second one.  Parents come first."""

TREE: Tree = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
"""Seven tokens, up to four deep: eight rows with the token before them."""
PROMPT, ANSWER = 384, 320


def chain(tokens: int) -> Tree:
    """A draft of so many tokens in a row."""
    return tuple((0,) * depth for depth in range(1, tokens + 1))


def ancestors(tree: Tree) -> Booleans:
    """Which of the token before the tree and its nodes each of them attends: bool, (nodes + 1, nodes + 1)."""
    paths: list[tuple[int, ...]] = [(), *tree]
    return np.array([[path[: len(other)] == other for other in paths] for path in paths])


def yield_of(ranks: NDArray[np.integer[Any]], tree: Tree) -> float:
    """Tokens for each pass of the target: those that are accepted, and the one that the target adds.

    Args:
        ranks: (texts, tokens): what rank the draft gave to each token of the target; 0 is its first choice.
        tree: what is drafted.
    """
    known = set(tree)
    tokens = passes = 0
    for text in ranks:
        place = 0
        while place < len(text):
            path: tuple[int, ...] = ()
            while place + len(path) < len(text) and (longer := (*path, int(text[place + len(path)]))) in known:
                path = longer
            place += len(path) + 1
            passes += 1
        tokens += len(text)
    return tokens / passes


def _models() -> tuple[Any, Any]:
    return huggingface.load("sdpa"), huggingface.load("sdpa", weights_file="draft.npz")


def ranks(texts: int = 32, prompt: int = PROMPT, answer: int = ANSWER) -> NDArray[np.int64]:
    """Ranks that the draft gives to the target's greedy answers to held-out text.

    Args:
        texts: windows of it.
        prompt: bytes of each.
        answer: bytes that the target says.

    Returns:
        int64, (texts, answer).
    """
    target, draft = _models()
    prompts = torch.from_numpy(load_held_out().windows[:texts, :prompt].astype(np.int64))
    with torch.inference_mode():
        said = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=answer,
                               do_sample=False, eos_token_id=None)
        logits = draft(said).logits[:, prompt - 1 : -1]
        own = logits.gather(2, said[:, prompt:, None])
        found: NDArray[np.int64] = (logits > own).sum(2).numpy()
    return found


def overlap(texts: int = 32, prompt: int = PROMPT, answer: int = ANSWER) -> float:
    """Share of sampled drafts that would be accepted on held-out text: the mean of the sum of min(p, q) of a token.

    Args:
        texts: windows of it.
        prompt: bytes that are skipped.
        answer: bytes that count.
    """
    windows = torch.from_numpy(load_held_out().windows[:texts, : prompt + answer].astype(np.int64))
    with torch.inference_mode():
        p, q = (model(windows).logits[:, prompt:].softmax(-1) for model in _models())
        return float(torch.minimum(p, q).sum(-1).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Assisted:
    """An answer with drafts, K and V of the target in the golden device.

    Attributes:
        unequal: share of its tokens that are not those of eager attention without drafts.
        passes: of the target, those over the prompt aside.
        tokens: of the answer.
    """

    unequal: float
    passes: int
    tokens: int


def assisted(drafted: int, new: int = 64, prompts: Iterable[int] = (0,),
             progress: Callable[[str], None] = lambda line: None) -> Assisted:
    """Generate with transformers' assisted generation: the draft proposes a chain, a pass of the drive verifies it.

    Args:
        drafted: tokens of a chain.
        new: tokens of an answer.
        prompts: numbers of held-out windows, whose first 150 bytes are prompts.
        progress: told what is being done.
    """
    target, draft = _models()
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafted, "constant"
    settings.assistant_confidence_threshold = 0.0
    windows = load_held_out().windows
    unequal, passes = [], 0
    for number in prompts:
        progress(f"prompt {number}: an answer with drafts, and one without")
        text = torch.from_numpy(windows[number % len(windows)][None, :150].astype(np.int64))
        expected = generate(target, text, RoundedCache(target.config), new=new)
        with (kvattic.open("model", config_for(target, queries=drafted + 1)) as device,
              DriveCache(device, target.config) as cache):
            target.set_attn_implementation(NAME)
            found = generate(target, text, cache, new=new, assistant_model=draft)
            passes += cache.report().steps
        unequal.append(float((found != expected).float().mean()))
    return Assisted(unequal=max(unequal), passes=passes, tokens=new * len(unequal))
