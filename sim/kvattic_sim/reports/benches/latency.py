"""How long a command takes, modelled: a decode step of OPT-13B with one and with 64 commands in flight.

The RTL's completions say when they were written but not when their command was fetched, so these are figures of the
timing model, which benches/time_grid.py holds to the RTL.
"""

from dataclasses import dataclass

from kvattic import PAPER
from kvattic.spec.commands import Mode
from kvattic.timing import Job, Layer, estimate
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.reports.in_flight import QUANTILES, in_flight, latencies, quantiles

__all__ = ["BENCHES"]

HEADS, TOKENS = 40, 1024
BATCH = 32
"""1,280 commands: so many that one in a thousand is one of them."""
IN_FLIGHT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How the step is attended.

    Attributes:
        suffix: of the keys.
        mode: of the commands.
    """

    suffix: str
    mode: Mode

    def jobs(self) -> list[Job]:
        """The step's commands: all heads of all sequences of one layer."""
        layer = Layer(PAPER, BATCH * HEADS, TOKENS, features=self.mode is not Mode.DENSE)
        return list(layer.attend(mode=self.mode, features=PAPER.head_dim // 8, top_units=TOKENS // 16))


WAYS = (Way(suffix="", mode=Mode.DENSE), Way(suffix=".sparf", mode=Mode.SPARF))


def _bench(way: Way) -> Bench:
    """Latency in flight from the fetch and from the doorbell, and alone, in microseconds."""
    names = {kind: [f"latency.{kind}{name}_us{way.suffix}" for name in QUANTILES]
             for kind in ("", "doorbell.", "alone.")}

    def run(lab: Lab) -> Figures:
        lab.progress(f"latency, {way.mode.name.lower()}: timing model", 0, None)
        jobs = way.jobs()
        found, submitted = in_flight(PAPER, jobs, IN_FLIGHT)
        alone = [latency for job in jobs for latency in latencies(estimate(PAPER, [job]))]
        figures: Figures = {}
        for kind, values in (("", latencies(found)), ("doorbell.", latencies(found, submitted)), ("alone.", alone)):
            figures |= dict(zip(names[kind], quantiles(values).values(), strict=True))
        return figures

    return Bench(keys=tuple(key for keys in names.values() for key in keys), measure=run)


BENCHES = tuple(_bench(way) for way in WAYS)
"""What the bench runner calls."""
