"""The workloads of `kvattic run` and `kvattic chat`: each one's error against its reference.

All of them run on the golden device and the timing model, on one core; `kvattic run NAME --target sim:verilator` has
the slices on the RTL.
"""

from kvattic_sim.reports.benches.engine import Bench, Figures, Lab, UnavailableError

__all__ = ["BENCHES", "QUESTIONS"]

QUESTIONS = ("What is an attic?", "And what is kept in it?")
TOKENS = 64
_MISSING = "torch and transformers are not installed ({}): pip install 'kvattic[quality]'"


def chat(lab: Lab) -> Figures:
    """Share of the tokens of two answers, of one conversation, that are not those of eager attention."""
    try:
        from kvattic_sim.lm.smollm2 import WeightsError
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


BENCHES = (
    Bench(keys=("workload.chat",), measure=chat),
)
"""What the bench runner calls."""
