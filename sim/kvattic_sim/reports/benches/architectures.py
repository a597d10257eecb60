"""Models with their KV cache in the drive: how many architectures, and a real one."""

from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError

__all__ = ["BENCHES"]

_MISSING = "torch and transformers are not installed ({}): pip install 'kvattic[quality]'"


def architectures(lab: Lab) -> Figures:
    """How many architectures of transformers work, are refused by name, do something else, and cannot be examined."""
    try:
        from kvattic_sim.lm.support import Verdict, survey
    except ImportError as error:
        raise UnavailableError(_MISSING.format(error)) from None
    found = [outcome.verdict for outcome in survey(
        progress=lambda outcome: lab.progress(f"{outcome.architecture.name}: {outcome.verdict}", 0, None))]
    return {"serve.models": found.count(Verdict.WORKS), "serve.models.refused": found.count(Verdict.REFUSED),
            "serve.models.wrong": found.count(Verdict.WRONG),
            "serve.models.not_examined": found.count(Verdict.UNAVAILABLE)}


def real_model(lab: Lab) -> Figures:
    """SmolLM2's greedy tokens with K and V in the drive, beside those of eager attention over K and V rounded alike."""
    try:
        from kvattic_sim.lm.answer import compare
        from kvattic_sim.lm.smollm2 import WeightsError
    except ImportError as error:
        raise UnavailableError(_MISSING.format(error)) from None
    try:
        found = compare(progress=lambda line: lab.progress(line, 0, None))
    except ImportError as error:
        raise UnavailableError(_MISSING.format(error)) from None
    except WeightsError as error:
        raise UnavailableError(str(error)) from error
    return {"serve.real_model": found.match, "serve.real_model.seconds_ratio": found.seconds / found.eager_seconds}


BENCHES = (
    Bench(keys=("serve.models", "serve.models.refused", "serve.models.wrong", "serve.models.not_examined"),
          measure=architectures),
    Bench(keys=("serve.real_model", "serve.real_model.seconds_ratio"), measure=real_model),
)
"""What the bench runner calls."""
