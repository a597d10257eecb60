"""Fine-tune SmolLM2-135M-Instruct on the intent task by low-rank adapters; write `intents.npz`.

The loss is that of the answer's tokens alone.  The shared prompt is computed once for each batch, and its K and V are
those of all questions, as they are in the drive.  What it wrote as it ran is `intents.log` beside this file.

To run it, on one core for some minutes:
    .venv/bin/python -m kvattic_sim.lm.train_intents
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from kvattic_sim.lm import adapters, smollm2
from kvattic_sim.lm.intents import TRAIN, Question, questions
from kvattic_sim.lm.prompts import Prompt

__all__ = ["main", "train"]

HERE = Path(__file__).parent
SEED, RANK, BATCH, STEPS = 6, 3, 20, 84
RATE, WARM_STEPS, CLIP = 1.5e-3, 8, 1.0
IGNORED = -100
"""What torch's cross entropy leaves out."""


def batch_of(prompt: Prompt, chosen: Sequence[Question]) -> tuple[Any, Any, Any]:
    """Token ids behind the shared prompt, padded on the right, (rows, tokens); the next tokens of answers; the mask."""
    rows = [(prompt.question(one.text), prompt.answer(one.intent)) for one in chosen]
    longest = max(len(asked) + len(answer) for asked, answer in rows)
    tokens = torch.full((len(rows), longest), prompt.end)
    wanted = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, (asked, answer) in enumerate(rows):
        length = len(asked) + len(answer)
        tokens[row, :length] = torch.tensor(asked + answer)
        mask[row, :length] = 1
        wanted[row, len(asked) - 1 : length - 1] = torch.tensor(answer)
    return tokens, wanted, mask


def loss_of(model: Any, prompt: Prompt, chosen: Sequence[Question]) -> Any:
    """Mean cross entropy of the answers' tokens."""
    tokens, wanted, mask = batch_of(prompt, chosen)
    cache = DynamicCache(config=model.config)
    whole = torch.cat([torch.ones((len(chosen), len(prompt.shared)), dtype=torch.long), mask], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        model.model(torch.tensor([prompt.shared]), cache=cache, use_cache=True)
        cache.batch_repeat_interleave(len(chosen))
        states = model.model(tokens, attention_mask=whole, cache=cache, use_cache=True).last_hidden_state
        counted = wanted != IGNORED
        logits = model.lm_head(states[counted])     # of few tokens: the vocabulary is a sixth of the work
    return torch.nn.functional.cross_entropy(logits.float(), wanted[counted])


def train(model: Any, prompt: Prompt, chosen: Sequence[Question], *, steps: int = STEPS, rank: int = RANK,
          batch: int = BATCH, say: Callable[[str], None] = print) -> None:
    """Train adapters of a model, seeded.

    Args:
        model: of transformers; it gets adapters.
        prompt: that the questions share.
        chosen: questions with their answers.
        steps: of the optimiser.
        rank: of the adapters.
        batch: questions of a step.
        say: told the loss now and then.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    parameters = adapters.adapt(model, rank=rank)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    order: list[int] = []
    begin, sum_of = time.process_time(), 0.0
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.permutation(len(chosen)).tolist()
        taken, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(step / WARM_STEPS, (steps - step + 1) / (steps - WARM_STEPS + 1))
        loss = loss_of(model, prompt, [chosen[number] for number in taken])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sum_of += loss.item()
        if step % 10 == 0 or step == steps:
            say(f"{(time.process_time() - begin) / 60:5.2f} min of a core, step {step:4}: loss "
                f"{sum_of / (step % 10 or 10):.4f}")
            sum_of = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of intents.npz and intents.log")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer, model = smollm2.load("sdpa")
    with (args.output / "intents.log").open("w", encoding="utf-8") as log:
        def say(line: str) -> None:
            print(line, file=log, flush=True)
            print(line, flush=True)

        chosen = list(questions(TRAIN, rounds=4))
        say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, 1 thread")
        say(f"{len(chosen)} questions, {args.steps} steps of {BATCH}, rank {RANK} of {', '.join(adapters.TARGETS)}")
        train(model, Prompt(tokenizer), chosen, steps=args.steps, say=say)
    adapters.save(model, args.output / "intents.npz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
