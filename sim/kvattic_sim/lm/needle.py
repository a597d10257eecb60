"""Questions whose answer lies far back: one fact planted in a long text, asked for behind it.

``python -m kvattic_sim.lm.needle`` asks ten questions (3 minutes), ``... --tens 10`` all hundred: ten facts at ten
depths of texts of 800 to 4,000 tokens, each at one length. Each ten of them has every fact and depth once, and every
length twice. It needs the extra `quality`.

SmolLM2-135M-Instruct reads the text densely. The question behind it, the answer's beginning and the answer itself are
decode steps by the method, at 1/8 of dense attention's bytes; with ``--question dense`` the question is part of the
prompt, and only the answer is the method's. The model answers greedily; an answer counts if it has the fact's number
right behind its beginning. Whether it has is known from one pass over question and number: greedy decoding
writes the number exactly if each of its tokens is the likeliest one behind those before.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvattic_sim.lm.budgets import CONTENDERS, at_bytes
from kvattic_sim.lm.methods import Method
from kvattic_sim.lm.smollm2 import english
from kvattic_sim.reports import figures

if TYPE_CHECKING:       # torch is not at hand wherever the keys are
    from kvattic_sim.lm.decoding import Decoder, Prefix

__all__ = ["DEPTHS", "FACTS", "KEYS", "LENGTHS", "RATIO", "Fact", "Question", "Score", "ask", "main", "measure",
           "questions"]

RATIO = Fraction(1, 8)
LENGTHS = (800, 1600, 2400, 3200, 4000)
"""Tokens of text, the fact among them."""
DEPTHS = 10
BESIDE = ("sparf", "fetched", "centroid", "quest")
KEYS = ("sparse.sketch.needle", *(f"sparse.sketch.needle.{name}" for name in (*BESIDE, "dense")))
"""What `measure` returns; the last one is dense attention's share of right answers."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is planted.

    Attributes:
        begins: a sentence, which a number ends; the answer begins so, too.
        asks: for it.
        number: four digits.
    """

    begins: str
    asks: str
    number: str


FACTS = tuple(
    Fact(f"The {thing} is", f"What is the {thing}?", number)
    for thing, number in (
        ("secret code of the red door", "4917"), ("number of the train to Oslo", "6382"),
        ("price of the old violin", "2759"), ("password of the harbour office", "8046"),
        ("height of the northern tower", "1573"), ("weight of the bronze bell", "9264"),
        ("year of the great flood", "3618"), ("room number of Doctor Lindqvist", "7405"),
        ("telephone number of the bakery", "5291"), ("count of the sheep on the island", "1836"),
    ))


@dataclass(frozen=True, slots=True)
class Question:
    """A fact in a text.

    Attributes:
        fact: by its place in `FACTS`.
        depth: 0 to `DEPTHS` - 1: the fact lies so many tenths, and half of one, into the text.
        length: tokens of text.
    """

    fact: int
    depth: int
    length: int


def questions(tens: int) -> tuple[Question, ...]:
    """Tens of questions: in each every fact and every depth comes once, and every length twice.

    Args:
        tens: how many, from 1 to 10.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= tens <= DEPTHS:
        raise ValueError(f"tens must be from 1 to {DEPTHS}, not {tens}")
    return tuple(Question(fact, depth, LENGTHS[(fact + depth) % len(LENGTHS)])
                 for ten in range(tens) for fact in range(len(FACTS)) for depth in [(ten - 3 * fact) % DEPTHS])


@dataclass(frozen=True, slots=True)
class Score:
    """How a method answered, question by question.

    Attributes:
        right: bool for each.
    """

    right: tuple[bool, ...]

    @property
    def share(self) -> float:
        """Of right answers."""
        return sum(self.right) / len(self.right)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def ask(decoder: "Decoder", tokenizer: Any, asked: Sequence[Question], methods: Mapping[str, Method],
        text: str | None = None, question_dense: bool = False,
        progress: Callable[[str], None] = lambda line: None) -> dict[str, Score]:
    """Ask every question, of every method.

    Args:
        decoder: the model.
        tokenizer: the model's, with the special tokens of ChatML.
        asked: questions.
        methods: by name.
        text: long enough for all of them; `english` by default.
        question_dense: whether questions belong to the prompt.
        progress: told which question is asked.

    Raises:
        ValueError: the text is too short.
    """
    header = _tokens(tokenizer, "<|im_start|>system\nYou answer questions about a text.<|im_end|>\n<|im_start|>user\n")
    running = _tokens(tokenizer, english() if text is None else text)
    longest = max(one.length for one in asked)
    if len(running) < longest:
        raise ValueError(f"text must have at least {longest} tokens, not {len(running)}")
    room = len(header) + longest + 128
    plain, work = decoder.prefix(room), decoder.prefix(room)
    # What lies before a fact is the same in all of them.
    decoder.prefill(plain, [*header, *running[:longest]])
    right: dict[str, list[bool]] = {name: [] for name in methods}
    for at, one in enumerate(asked):
        so_far = ", ".join(f"{name} {sum(each)}" for name, each in right.items())
        progress(f"question {at + 1} of {len(asked)}, {one.length} tokens; right so far: {so_far}")
        fact = FACTS[one.fact]
        planted = _tokens(tokenizer, f"\n{fact.begins} {fact.number}.\n")
        place = (2 * one.depth + 1) * one.length // (2 * DEPTHS)
        work.take(plain, len(header) + place)
        decoder.prefill(work, [*planted, *running[place : one.length - len(planted)]])
        question = _tokens(tokenizer, f"\n\n{fact.asks}<|im_end|>\n<|im_start|>assistant\n{fact.begins}")
        answer = _tokens(tokenizer, f" {fact.number}")
        if question_dense:
            decoder.prefill(work, question[:-1])
            question = question[-1:]
        for name, method in methods.items():
            right[name].append(_answers(decoder, work, question, answer, method))
    return {name: Score(tuple(each)) for name, each in right.items()}


def _answers(decoder: "Decoder", prefix: "Prefix", question: list[int], answer: list[int], method: Method) -> bool:
    """Whether greedy decoding writes this answer."""
    logits = decoder.decode(prefix, [*question, *answer[:-1]], method)
    return bool((logits[len(question) - 1 :].argmax(axis=1) == np.array(answer)).all())


def _table(found: Mapping[str, Score], asked: Sequence[Question], title: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    table.add_column("right", justify="right")
    table.add_column("over dense", justify="right")
    for length in LENGTHS:
        table.add_column(f"{length:,}", justify="right")
    for name, score in found.items():
        by_length = [[right for right, one in zip(score.right, asked, strict=True) if one.length == length]
                     for length in LENGTHS]
        table.add_row(CONTENDERS[name][0] if name in CONTENDERS else name, f"{sum(score.right)} of {len(asked)}",
                      f"{_over(score, found['dense']):.2f}", *(f"{sum(each)} of {len(each)}" for each in by_length))
    return table


def _over(score: Score, dense: Score) -> float:
    return sum(score.right) / max(1, sum(dense.right))


def measure(progress: Callable[[str], None] = lambda line: None, console: Console | None = None, tens: int = 1,
            question_dense: bool = False, names: Iterable[str] = ("codes", *BESIDE)) -> dict[str, float]:
    """All figures of `KEYS`; prints a table if there is a console.

    Args:
        progress: told what is being done.
        console: for the table.
        tens: of questions.
        question_dense: whether questions belong to the prompt.
        names: methods beside dense, of `budgets.CONTENDERS`; those of the figures at least.

    Raises:
        ImportError: the extra `quality` is not installed.
        smollm2.WeightsError: the weights are not to be had.
    """
    from kvattic_sim.lm import decoding

    with decoding.one_thread():
        decoder, tokenizer = decoding.load()
        asked = questions(tens)
        methods = {name: at_bytes(name, Fraction(1) if name == "dense" else RATIO, decoder.head_dim)
                   for name in ("dense", *names)}
        found = ask(decoder, tokenizer, asked, methods, question_dense=question_dense, progress=progress)
    if console is not None:
        console.print(_table(found, asked, f"{len(asked)} questions at {RATIO} of the bytes, the question "
                                           f"{'read densely' if question_dense else 'by the method'}"))
    dense = found["dense"]
    return {"sparse.sketch.needle": _over(found["codes"], dense), "sparse.sketch.needle.dense": dense.share,
            **{f"sparse.sketch.needle.{name}": _over(found[name], dense) for name in BESIDE}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--tens", type=int, choices=range(1, DEPTHS + 1), default=1, metavar="N",
                        help="of questions, from 1 to 10 (default: %(default)s): 2 minutes each")
    parser.add_argument("--methods", nargs="+", choices=tuple(CONTENDERS), default=(), metavar="METHOD",
                        help=f"besides codes and {', '.join(BESIDE)}: of {', '.join(CONTENDERS)}")
    parser.add_argument("--question", choices=("method", "dense"), default="method",
                        help="how the question is read (default: %(default)s)")
    args = parser.parse_args(arguments)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    names = dict.fromkeys(("codes", *BESIDE, *args.methods))
    found = measure(lambda line: console.print(line, style="dim"), console, args.tens, args.question == "dense", names)
    if args.question == "method" and args.tens == 1:    # as `make bench` asks
        figures.record(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
