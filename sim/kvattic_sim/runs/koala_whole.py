"""The attention of KOALA-700M's published geometry in the drive: a layer, a step, a picture; modelled."""

import math
from dataclasses import dataclass, replace

import kvattic
from kvattic.spec.config import GQA
from kvattic.spec.layout import stripe_channel
from kvattic.timing import Estimate, Job, Layer, Stripe, attend_job, estimate
from kvattic_sim.runs.outcome import How, Run
from kvattic_sim.runs.slices import modelled_run
from kvattic_sim.system.drive import TimedDrive
from kvattic_sim.system.parameters import PAPER_MACHINE

__all__ = ["DRIVE", "LONG_TEXT", "STAGES", "STEPS", "TEXT", "WRITE_LIMIT", "Stage", "text_run", "whole"]

DRIVE = replace(GQA, head_dim=64)
"""Heads of SDXL have 64 features."""
TEXT, LONG_TEXT = 77, 512
"""Tokens: of CLIP, which SDXL and KOALA have; of longer encoders, such as FLUX's T5."""
STEPS = 10
"""Of a picture by KOALA-Lightning (github.com/youngwanLEE/sdxl-koala)."""
SAMPLE = 64
"""Jobs that are modelled one by one; the others go on at their rate."""
WRITE_LIMIT = "programming of the dies"


@dataclass(frozen=True, slots=True)
class Stage:
    """A resolution of the U-Net.

    Attributes:
        side: positions are side x side, for a picture of 1,024 x 1,024.
        heads: of each layer.
        layers: transformer layers, each with self- and cross-attention.
    """

    side: int
    heads: int
    layers: int

    @property
    def positions(self) -> int:
        """That ask, and whose K and V self-attention has."""
        return self.side * self.side


STAGES = (Stage(64, 10, 6), Stage(32, 20, 15))
"""Of the published geometry: a block down and two up, of 2 and 5 transformer layers."""


def _text_jobs(stage: Stage, tokens: int) -> list[Job]:
    """A job for each head over the text."""
    if tokens % DRIVE.tokens_per_page == 0:
        return list(Layer(DRIVE, stage.heads, tokens).attend(rows=DRIVE.rows))
    if tokens > DRIVE.tokens_per_page:
        raise kvattic.RequestError(f"a text must be shorter than a stripe of {DRIVE.tokens_per_page} tokens, or whole "
                                   f"stripes, not {tokens} tokens")
    return [attend_job(DRIVE, [Stripe(stripe_channel(0, head, DRIVE), 0, 0, tokens, dram=True)], rows=DRIVE.rows)
            for head in range(stage.heads)]


def _attended(stage: Stage, jobs: list[Job]) -> Estimate:
    """All positions of a layer attend, from a job of each head."""
    sample = (jobs * math.ceil(SAMPLE / len(jobs)))[:SAMPLE]
    return estimate(DRIVE, sample, in_all=stage.heads * math.ceil(stage.positions / DRIVE.rows))


def text_run(stage: Stage, tokens: int) -> tuple[Run, Estimate]:
    """All positions of a layer attend a text.

    Args:
        stage: of the layer.
        tokens: of the text: fewer than a stripe, which wait in device DRAM, or whole stripes.

    Raises:
        RequestError: the text ends inside of a stripe that is not its first.
    """
    found = _attended(stage, _text_jobs(stage, tokens))
    run = modelled_run(f"a layer of {stage.side} x {stage.side}: all positions attend {tokens} tokens of text", found)
    if found.dram_codewords:
        moved = found.dram_codewords * DRIVE.codeword_bytes / DRIVE.dram_beat_bytes / found.cycles
        run = replace(run, limit="latency: a head's text is in one stripe, which one lane attends; device DRAM is busy "
                                 f"{moved:.0%} of the time")
    return run, found


def whole() -> tuple[list[Run], dict[str, float]]:
    """The published geometry: a layer of each stage in a step, and what a step and a picture take; modelled."""
    runs: list[Run] = []
    drive, gpu = TimedDrive(DRIVE), PAPER_MACHINE.gpu
    total = dict.fromkeys(("self", "write", "cross", "gpu_self", "gpu_cross"), 0.0)
    own_bytes = text_bytes = 0
    rate = gpu.flops * gpu.flops_share
    for stage in STAGES:
        tokens, dim = stage.positions, DRIVE.head_dim
        found = _attended(stage, list(Layer(DRIVE, stage.heads, tokens).attend(rows=DRIVE.rows)))
        once = 2 * stage.heads * tokens * DRIVE.token_bytes
        write = drive.write_seconds("dense", kv_heads=stage.heads, tokens=tokens)
        text, crossed = text_run(stage, TEXT)
        place = f"a layer of {stage.side} x {stage.side}"
        runs += [modelled_run(f"{place}: all positions attend themselves", found),
                 Run(what=f"{place}: their K and V are written", how=How.MODELLED,
                     cycles=round(write * DRIVE.clock_mhz * 1e6), bytes=once, seconds=write, limit=WRITE_LIMIT), text]
        own_bytes += stage.layers * once
        text_bytes += stage.layers * 2 * stage.heads * TEXT * DRIVE.token_bytes
        flops = 4.0 * stage.heads * dim * tokens
        for name, seconds in (("self", found.seconds), ("write", write), ("cross", crossed.seconds),
                              ("gpu_self", flops * tokens / rate), ("gpu_cross", flops * TEXT / rate)):
            total[name] += stage.layers * seconds
    runs.append(text_run(STAGES[-1], LONG_TEXT)[0])
    return runs, {
        "counted_reads_of_each_byte_of_self_attention_s_k_and_v": STAGES[0].positions / DRIVE.rows,
        "counted_reads_of_each_byte_of_the_text_s_k_and_v_in_a_picture": STEPS * STAGES[0].positions / DRIVE.rows,
        "counted_mb_written_in_each_step": own_bytes / 1e6,
        "counted_mb_of_text_written_once": text_bytes / 1e6,
        "modelled_seconds_of_a_step_s_self_attention_in_the_drive": total["self"],
        "modelled_seconds_of_a_step_s_writes": total["write"],
        "modelled_seconds_of_a_step_s_cross_attention_in_the_drive": total["cross"],
        "modelled_seconds_of_a_step_s_self_attention_on_the_gpu": total["gpu_self"],
        "modelled_seconds_of_a_step_s_cross_attention_on_the_gpu": total["gpu_cross"]}
