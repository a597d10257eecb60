"""Which architectures of transformers generate with K and V in the drive: works, or refused with a reason.

Each one's small random model (`families`) generates greedily on the golden device, and by its own eager attention
over K and V that are rounded alike.  The tokens must be equal, and the logits nearly so, which tells more where a
model's answer hardly depends on its attention; a model that cannot must be refused by one of kvattic's errors, before
its first step ends.  Anything else is a mistake of kvattic's and is called so, but for models that transformers
themselves cannot build or run here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache

import kvattic
from kvattic import TINY
from kvattic.errors import CapacityError, ConfigError, RequestError
from kvattic.integrations.transformers import NAME, DriveCache, DriveEncoderDecoderCache, config_for
from kvattic.spec.formats import Element
from kvattic_sim.lm.families import Architecture, architectures, build, usual
from kvattic_sim.lm.inputs import OWN_GENERATE, inputs
from kvattic_sim.reports.benches.generate import REFERENCES, RoundedCache

__all__ = ["Answer", "Outcome", "Verdict", "difference", "examine", "survey"]

PROMPT, ANSWER = 30, 16
"""Tokens: more together than `recipes.WINDOW`, and than a stripe of the drive."""
CAPACITY = 640
"""Tokens: some models (Evolla) put all of them into the cache anew at each step."""
TOLERANCE = 0.05
"""Logits may differ by this share of their standard deviation: a last bit that rounds an element of K the other way."""
DRIVE = replace(TINY, dies=8, part=replace(TINY.part, blocks=64))
"""TINY with room for several sequences."""


class Verdict(StrEnum):
    """What became of an architecture."""

    WORKS = "works"
    REFUSED = "refused"
    WRONG = "wrong"
    """Other tokens, an error that is not one of kvattic's, or a refusal after a token."""
    UNAVAILABLE = "unavailable"
    """transformers themselves cannot build it here, or not generate with their own eager attention."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found of an architecture.

    Attributes:
        architecture: which.
        verdict: what became of it.
        detail: the reason if it was refused or unavailable, what went wrong; otherwise what of it is in the drive.
    """

    architecture: Architecture
    verdict: Verdict
    detail: str


def _inputs(architecture: Architecture, model: Any) -> dict[str, Any]:
    """Arguments of `generate`."""
    return inputs(architecture, model, PROMPT) | {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER,
                                                  "do_sample": False}


class Answer(NamedTuple):
    """What a model says.

    Members:
        tokens: in each step.
        logits: float64, (tokens, vocabulary); of models with a row of tokens for each codebook, of all of them.
    """

    tokens: list[Any]
    logits: torch.Tensor


def _generate(model: Any, implementation: str, cache: Any, options: dict[str, Any]) -> Answer:
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)    # some make sound from noise
    # Not Whisper's own, which cuts long sound into pieces and hands on no logits; but Dia's, for its rows of tokens.
    generate, ends = GenerationMixin.generate, {"eos_token_id": None}
    if model.config.model_type in OWN_GENERATE:
        generate, ends = type(model).generate, {}
    with torch.no_grad():
        answer = generate(model, **options, **ends, cache=cache, output_logits=True, return_dict_in_generate=True)
    return Answer(answer.sequences[0, -ANSWER:].tolist(), torch.cat(answer.logits).double())


def difference(found: Answer, expected: Answer) -> str | None:
    """What is wrong with an answer; None: nothing.

    Args:
        found: the answer.
        expected: what it should be.
    """
    for place, (mine, wanted) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        if mine != wanted:
            return f"token {place} of {ANSWER} differs: {mine}, not {wanted}"
    finite = expected.logits.isfinite()     # some models forbid tokens by an infinite logit
    if not torch.equal(found.logits.isfinite(), finite):
        return "logits are infinite in other places"
    ours, theirs = found.logits[finite], expected.logits[finite]
    deviation = float((ours - theirs).abs().max() / theirs.std())
    return None if deviation <= TOLERANCE else f"logits differ by {deviation:.2g} of their standard deviation"


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _drive_cache(device: kvattic.Device, model: Any, *, encoder: bool) -> Any:
    """Everything in the drive; of a model with a position bias, its cross-attention alone."""
    if not encoder:
        return DriveCache(device, model.config, capacity_tokens=CAPACITY, held_tokens=0)
    own = None
    if getattr(model.config.get_text_config(decoder=True), "relative_attention_num_buckets", None):
        own = RoundedCache(model.config)
    options = {} if own is not None else {"capacity_tokens": CAPACITY, "held_tokens": 0}
    return DriveEncoderDecoderCache(device, model.config, self_attention=own, **options)


def _what(cache: Any) -> str:
    """What of a model is in the drive."""
    if isinstance(cache, EncoderDecoderCache):
        own = cache.self_attention_cache
        return f"{'self-attention and ' if isinstance(own, DriveCache) else ''}cross-attention in the drive"
    inside, every = len(cache.drive_layers), len(cache.layers)
    return "" if inside == every else f"{inside} of {every} layers in the drive, the others in transformers' own"


def examine(architecture: Architecture, seed: int = 0) -> Outcome:
    """Whether an architecture works.

    Args:
        architecture: which.
        seed: of its weights.
    """
    steps: list[None] = []
    try:
        model = build(architecture, seed)
        options = _inputs(architecture, model)
    except Exception as error:  # noqa: BLE001  # what transformers cannot build says nothing about kvattic
        return Outcome(architecture, Verdict.UNAVAILABLE, _say(error))
    try:
        if (reason := _too_large(architecture)) is not None:
            return Outcome(architecture, Verdict.REFUSED, reason)
        with (kvattic.open("model", config_for(model, DRIVE)) as device,
              _drive_cache(device, model, encoder=architecture.encoder) as cache):
            try:
                expected = _expected(model, options, architecture.encoder)
            except Exception as error:  # noqa: BLE001  # likewise, if their own cache and attention fail, too
                return _without_reference(architecture, model, options, error)
            with _counted(model, steps):
                found = _generate(model, NAME, cache, options)
            what = _what(cache)
    except (ConfigError, RequestError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, CapacityError):
            return Outcome(architecture, Verdict.WRONG, _say(error))    # which says nothing about the model
        if steps:
            return Outcome(architecture, Verdict.WRONG, f"refused after {len(steps)} steps: {reason}")
        return Outcome(architecture, Verdict.REFUSED, reason)
    except Exception as error:  # noqa: BLE001  # anything else is a mistake
        return Outcome(architecture, Verdict.WRONG, _say(error))
    if (wrong := difference(found, expected)) is not None:
        return Outcome(architecture, Verdict.WRONG, wrong)
    return Outcome(architecture, Verdict.WORKS, what)


@contextmanager
def _counted(model: Any, steps: list[None]) -> Iterator[None]:
    """Add an item for each step of a model that ends, and so may give a token."""
    hooks = [part.register_forward_hook(lambda *_: steps.append(None)) for part in model.modules()
             if isinstance(part, GenerationMixin)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_reference(architecture: Architecture, model: Any, options: dict[str, Any], error: Exception) -> Outcome:
    """What becomes of a model for which the reference fails: it depends on whether eager attention alone does."""
    try:
        _generate(model, "eager", None, options)
    except Exception as own:  # noqa: BLE001  # what transformers cannot generate says nothing about kvattic
        return Outcome(architecture, Verdict.UNAVAILABLE, f"eager attention: {_say(own)}")
    return Outcome(architecture, Verdict.WRONG, f"the reference fails, eager attention alone does not: {_say(error)}")


def _too_large(architecture: Architecture) -> str | None:
    """Why no drive has the heads of the configuration that the class has by default; None: one has."""
    try:
        config_for(usual(architecture.config))
    except ConfigError as error:
        return " ".join(str(error).split())
    except Exception:  # noqa: BLE001  # no default, or none that transformers can read
        return None
    return None


def _expected(model: Any, options: dict[str, Any], encoder: bool) -> Answer:
    """The answer by eager attention over rounded K and V, from rounded queries."""
    cache: Any = RoundedCache(model.config)
    if encoder:
        cache = EncoderDecoderCache(cache, RoundedCache(model.config))
    return _generate(model, REFERENCES[Element.FP16], cache, options)


def survey(which: Iterable[Architecture] | None = None,
           progress: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Examine architectures, one after the other.

    Args:
        which: all if None.
        progress: told each outcome.
    """
    outcomes = []
    for architecture in architectures() if which is None else which:
        outcomes.append(examine(architecture))
        progress(outcomes[-1])
    return outcomes
