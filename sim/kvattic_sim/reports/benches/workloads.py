"""The workloads of `kvattic run` and `kvattic chat`: each one's error against its reference.

All of them run on the golden device and the timing model, on one core; `kvattic run NAME --target sim:verilator` has
the slices on the RTL.
"""

from kvattic_sim.lm.smollm2 import WeightsError
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError, WrongResultError
from kvattic_sim.runs import catalogue
from kvattic_sim.runs.outcome import Request

__all__ = ["BENCHES", "QUESTIONS"]

QUESTIONS = ("What is an attic?", "And what is kept in it?")
TOKENS = 64
_MISSING = "what it needs is not installed ({}): pip install 'kvattic[quality,diffusion]'"


def chat(lab: Lab) -> Figures:
    """Share of the tokens of two answers, of one conversation, that are not those of eager attention."""
    try:
        from kvattic_sim.runs.chat import Chat, difference
    except ImportError as error:
        raise UnavailableError(_MISSING.format(error)) from None
    try:
        lab.progress("chat: loading the model", 0, None)
        conversation = Chat(tokens=TOKENS)
    except ImportError as error:
        raise UnavailableError(_MISSING.format(error)) from None
    except WeightsError as error:
        raise UnavailableError(str(error)) from error
    shares = []
    with conversation:
        for question in QUESTIONS:
            lab.progress(f"chat: {question}", 0, None)
            answer = conversation.ask(question)
            shares.append(difference(answer.tokens, conversation.reference(answer.prompt)))
    return {"workload.chat": max(shares)}


def workload(name: str) -> Bench:
    """The error of a workload of `kvattic run`, against its reference."""
    key = f"workload.{name}"

    def measure(lab: Lab) -> Figures:
        try:
            found = catalogue.run(name, Request(progress=lambda line: lab.progress(f"{name}: {line}", 0, None)))
        except ImportError as error:
            raise UnavailableError(_MISSING.format(error)) from None
        except WeightsError as error:
            raise UnavailableError(str(error)) from error
        if found.bit_exact is False:
            raise WrongResultError(f"{name}: bits differ from the golden device's")
        return {key: found.error}

    return Bench(keys=(key,), measure=measure)


BENCHES = (
    *(workload(name) for name in catalogue.WORKLOADS),
    Bench(keys=("workload.chat",), measure=chat),
)
"""What the bench runner calls."""
