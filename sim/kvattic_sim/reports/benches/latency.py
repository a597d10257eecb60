"""How long a command takes, modelled: a decode step of OPT-13B with one and with 64 commands in flight.

The RTL's completions say when they were written but not when their command was fetched, so these are figures of the
timing model, which benches/time_grid.py holds to the RTL.
"""

from kvattic import PAPER
from kvattic.spec.commands import Mode
from kvattic.timing import estimate
from kvattic_sim.reports.benches.decode_step import HEADS, WAYS, step_jobs
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.reports.in_flight import QUANTILES, in_flight, latencies, quantiles

__all__ = ["BENCHES"]

TOKENS = 1024
BATCH = 32
"""1,280 commands: so many that one in a thousand is one of them."""
IN_FLIGHT = 64


def _bench(suffix: str, mode: Mode) -> Bench:
    """Latency in flight from the fetch and from the doorbell, and alone, in microseconds."""
    names = {kind: [f"latency.{kind}{name}_us{suffix}" for name in QUANTILES]
             for kind in ("", "doorbell.", "alone.")}

    def run(lab: Lab) -> Figures:
        lab.progress(f"latency, {mode.name.lower()}: timing model", 0, None)
        jobs = step_jobs(PAPER, BATCH * HEADS, TOKENS, mode)
        found, submitted = in_flight(PAPER, jobs, IN_FLIGHT)
        alone = [latency for job in jobs for latency in latencies(estimate(PAPER, [job]))]
        figures: Figures = {}
        for kind, values in (("", latencies(found)), ("doorbell.", latencies(found, submitted)), ("alone.", alone)):
            figures |= dict(zip(names[kind], quantiles(values).values(), strict=True))
        return figures

    return Bench(keys=tuple(key for keys in names.values() for key in keys), measure=run)


BENCHES = tuple(_bench(suffix, mode) for suffix, mode in WAYS.items())
"""What the bench runner calls."""
