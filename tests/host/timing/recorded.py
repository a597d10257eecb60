"""Cycles that the RTL took, and the same work in the timing model; run as a script it prints them beside each other.

Where each figure stands: docs/timing.md.  Preset `paper` unless a point says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvattic.spec.commands import Mode
from kvattic.spec.config import GQA, PAPER
from kvattic.spec.elements import from_bits
from kvattic.spec.nand import part
from kvattic.timing import Estimate, Layer, estimate, in_turn

SEPARATE = replace(PAPER, part=replace(PAPER.part, name="pslc, separate command bus", separate_command_bus=True))
TLC = replace(PAPER, part=part("tlc"))
LOW_LATENCY = replace(PAPER, part=part("lowlatency"))


@dataclass(frozen=True)
class Point:
    """Something that was measured.

    Attributes:
        name: what it is.
        recorded: what the RTL gave.
        model: the same from the timing model.
        tolerance: share by which they may differ.
        quick: it takes the model well below a second.
    """

    name: str
    recorded: float
    model: Callable[[], float]
    tolerance: float = 0.01
    quick: bool = True

    def deviation(self):
        return self.model() / self.recorded - 1


def attended(config, heads, tokens, **how) -> Estimate:
    features, centroids = how.pop("keep_features", False), how.pop("centroids", 0)
    return estimate(config, Layer(config, heads, tokens, features=features, centroids=centroids).attend(**how))


def cycles(config, heads, tokens, share=1.0, **how):
    return lambda: attended(config, heads, tokens, **how).cycles * share


def inverse_use(config, heads, tokens):
    """Time for one unit of bus time, as the recorded bus uses give it."""
    return lambda: 1 / attended(config, heads, tokens).bus_use_in_window


def prefilled(config, heads, tokens, **how):
    return lambda: estimate(config, (), Layer(config, heads, tokens, **how).prefill()).cycles


def write_cycles(config, pages, utilization):
    """`flash.write.utilization` as cycles (kvattic_sim.reports.benches.flash)."""
    planes = config.dies * config.part.planes / (config.part.t_prog * config.clock_mhz / 1000)
    bus = config.part.bus_mts / config.clock_mhz / config.raw_page_bytes
    return pages / (config.channels * min(planes, bus) * utilization)


def chosen(run, mode, top_units, unit, features=16, heads=40, tokens=4096):
    """What the recorded runs' queries select, in floats: the inputs of `kvattic_sim.workloads`."""
    from kvattic_sim.workloads import clustered, decode

    shape = {"kv_heads": heads, "tokens": tokens}
    data = decode(PAPER, **shape) if run == 1 else clustered(PAPER, run=run, **shape)
    query = from_bits(data.query, PAPER.element)[:, 0]

    def choose(head):
        q, key = query[head], from_bits(data.key[head], PAPER.element)
        if mode is Mode.CENTROID:
            best, kept = (key @ q).reshape(-1, unit).mean(axis=1), []
        else:
            kept = np.sort(np.argsort(-abs(q), kind="stable")[:features])
            share = abs(q[kept]).sum() / abs(q).sum()
            scores = key[:, kept] @ q[kept] / np.sqrt(PAPER.head_dim * share)
            best, kept = np.exp(scores - scores.max()).reshape(-1, unit).sum(axis=1), kept.tolist()
        marked = np.zeros(len(best), bool)
        marked[np.argsort(-best, kind="stable")[:top_units]] = True
        return marked.repeat(unit), kept

    return choose


def selected(run, mode, top_units, unit, config=PAPER):
    def model():
        kept = {"centroids": unit} if mode is Mode.CENTROID else {"keep_features": True}
        return attended(config, 40, 4096, mode=mode, unit_tokens=unit, choose=chosen(run, mode, top_units, unit),
                        **kept).cycles
    return model


def zone_erase():
    """Queue 0 takes 255 commands, and the host hears of them when half have ended; the last one follows then."""
    operations = in_turn(PAPER, [range(32)] * PAPER.channels, program=False)
    ended = sorted(estimate(PAPER, (), operations[:255]).operations)
    operations[255].submitted = ended[255 // 2 - 1]
    return estimate(PAPER, (), operations).cycles


POINTS = [
    Point("dense, 40 heads x 4,096, features beside", 2_278_139, cycles(PAPER, 40, 4096, keep_features=True),
          quick=False),
    Point("dense, 160 x 1,024: cycles a job", 285e6 / 20_026.7, cycles(PAPER, 160, 1024, 1 / 160), quick=False),
    Point("dense, 8 x 2,048", 234_724, cycles(PAPER, 8, 2048)),
    Point("dense, 8 x 512", 66_810, cycles(PAPER, 8, 512), 0.02),
    Point("dense, 160 x 64: cycles a job", 285e6 / 263_953, cycles(PAPER, 160, 64, 1 / 160), 0.1),
    Point("dense, eight rows, 16 x 1,024, `gqa`", 235_908, cycles(GQA, 16, 1024)),
    Point("dense, 40 x 2,048: 1 / bus use", 1 / 0.97081, inverse_use(PAPER, 40, 2048)),
    Point("dense, 16 x 2,048, TLC: 1 / bus use", 1 / 0.97260, inverse_use(TLC, 16, 2048)),
    Point("dense, 16 x 2,048, low latency: 1 / bus use", 1 / 0.89506, inverse_use(LOW_LATENCY, 16, 2048), quick=False),
    Point("SPARF, random", 600_139, selected(1, Mode.SPARF, 256, 1), 0.03, quick=False),
    Point("FETCHED, random", 460_450, selected(1, Mode.FETCHED, 128, 2), 0.05, quick=False),
    Point("SPARF, runs of 8", 469_474, selected(8, Mode.SPARF, 256, 1), 0.05, quick=False),
    Point("FETCHED, runs of 8", 447_215, selected(8, Mode.FETCHED, 128, 2), 0.05, quick=False),
    Point("CENTROID, units of 64", 423_804, selected(64, Mode.CENTROID, 8, 64), 0.1, quick=False),
    Point("SPARF, random, separate bus", 532_028, selected(1, Mode.SPARF, 256, 1, SEPARATE), 0.15,
          quick=False),
    Point("SPARF, runs of 8, separate bus", 441_698, selected(8, Mode.SPARF, 256, 1, SEPARATE), 0.1,
          quick=False),
    Point("prefill, 40 x 2,048, K twice (older RTL)", write_cycles(PAPER, 3840, 0.908),
          prefilled(PAPER, 40, 2048, features=True), 0.02, quick=False),
    Point("prefill, 40 x 2,048", write_cycles(PAPER, 2560, 0.89657), prefilled(PAPER, 40, 2048), 0.02),
    Point("prefill, 16 x 2,048, TLC", write_cycles(TLC, 1024, 0.80179), prefilled(TLC, 16, 2048)),
    Point("prefill, 16 x 2,048, low latency", write_cycles(LOW_LATENCY, 4096, 0.78745),
          prefilled(LOW_LATENCY, 16, 2048)),
    Point("prefill, 8 x 2,048", 291_050, prefilled(PAPER, 8, 2048)),
    Point("prefill, 8 x 512", 160_633, prefilled(PAPER, 8, 512)),
    Point("erase, a zone", 1_715_214, zone_erase),
]

if __name__ == "__main__":
    for point in POINTS:
        model = point.model()
        figures = " | ".join(f"{x:,.0f}" if x > 10 else f"{x:.4f}" for x in (point.recorded, model))
        print(f"| {point.name} | {figures} | {model / point.recorded - 1:+.1%} |", flush=True)
