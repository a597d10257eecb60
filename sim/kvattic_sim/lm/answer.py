"""SmolLM2-135M-Instruct answers with its KV cache in the drive, and by eager attention over K and V rounded alike.

``python -m kvattic_sim.lm.answer [TOKENS]`` prints the share of equal tokens and both times; minutes, and a download of
93 MB the first time (`smollm2`).  The drive is the golden device, on the same processor, so its seconds are those of a
simulation, not of a drive.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvattic
from kvattic.integrations.transformers import NAME, DriveCache, config_for
from kvattic.spec.formats import Element
from kvattic_sim.lm.decoding import one_thread
from kvattic_sim.lm.smollm2 import english, load
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache

__all__ = ["ANSWER", "PROMPT", "Comparison", "compare", "main"]

PROMPT, ANSWER = 1000, 200
"""Tokens."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same answer twice.

    Attributes:
        match: share of the tokens that are equal, place by place.
        seconds: of the whole generation with K and V in the golden device, the prompt included.
        eager_seconds: likewise with transformers' own cache and eager attention.
    """

    match: float
    seconds: float
    eager_seconds: float


def compare(tokens: int = ANSWER, prompt: int = PROMPT,
            progress: Callable[[str], None] = lambda line: None) -> Comparison:
    """Generate greedily both ways; one thread of PyTorch.

    Args:
        tokens: to generate.
        prompt: tokens of English text before them.
        progress: told what is being done.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    tokenizer, model = load()
    text = tokenizer(english(), return_tensors="pt").input_ids[:, :prompt]

    def answer(implementation: str, cache: Any) -> tuple[list[int], float]:
        model.set_attn_implementation(implementation)
        began = time.perf_counter()
        with torch.no_grad():
            found = model.generate(text, attention_mask=torch.ones_like(text), cache=cache, max_new_tokens=tokens,
                                   do_sample=False, eos_token_id=None)
        return found[0, prompt:].tolist(), time.perf_counter() - began

    with one_thread():
        progress(f"eager attention: {tokens} tokens after {prompt}")
        expected, eager_seconds = answer(REFERENCES[Element.FP16], RoundedCache(model.config))
        progress(f"the drive (golden device): {tokens} tokens after {prompt}")
        with (kvattic.open("model", config_for(model)) as device,
              DriveCache(device, model.config, capacity_tokens=prompt + tokens) as cache):
            found, seconds = answer(NAME, cache)
    equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    return Comparison(equal / tokens, seconds, eager_seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("tokens", nargs="?", type=int, default=ANSWER, help="to generate (default: %(default)s)")
    tokens = parser.parse_args(arguments).tokens
    if tokens < 1:
        parser.error(f"tokens must be at least 1, not {tokens}")
    found = compare(tokens, progress=print)
    print(f"equal tokens: {found.match:.3f}; {found.seconds:.1f} s with K and V in the golden device, "
          f"{found.eager_seconds:.1f} s by eager attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
