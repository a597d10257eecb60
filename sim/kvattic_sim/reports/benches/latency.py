"""How long a command takes: a decode step of OPT-13B, modelled, and a smaller one on the RTL beside the model.

On the RTL, completions say when each command was requested and when its beats moved.
"""

from dataclasses import replace
from functools import partial

from kvattic import PAPER
from kvattic.spec.commands import Mode
from kvattic.timing import estimate
from kvattic_sim.reports.benches.decode_step import HEADS, WAYS, step_jobs
from kvattic_sim.reports.benches.engine import Bench, Figures, Lab
from kvattic_sim.reports.in_flight import QUANTILES, in_flight, latencies, quantiles
from kvattic_sim.reports.points import measure
from kvattic_sim.reports.study import Point

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


RTL_JOBS = 200
"""Commands that are simulated, all in flight at once: two are beyond the 99th percentile."""


def _follow(lab: Lab, how: str, what: str, done: int, total: int | None) -> None:
    lab.progress(f"latency, {how}: {what}", done, total)


def _beside_the_rtl(lab: Lab) -> Figures:
    """Quantiles of the same commands, measured and modelled, and the largest deviation of the latter."""
    point = Point(base=PAPER, settings={}, heads=HEADS, batch=RTL_JOBS // HEADS, tokens=TOKENS, check=False)
    found = {}
    for how, modelled in (("rtl", False), ("model", True)):
        found[how] = measure(replace(point, modelled=modelled), partial(_follow, lab, how))
    names = ("p50_us", "p99_us")
    figures: Figures = {f"latency.rtl.{name}": found["rtl"][name] for name in names}
    figures["latency.error"] = max(abs(found["model"][name] / found["rtl"][name] - 1) for name in names)
    return figures


BENCHES = (
    *(_bench(suffix, mode) for suffix, mode in WAYS.items()),
    Bench(keys=("latency.rtl.p50_us", "latency.rtl.p99_us", "latency.error"), measure=_beside_the_rtl),
)
"""What the bench runner calls."""
