"""Reads beside writes: the RTL of `tiny` attends alone, beside erases and beside a prefill, and so does the model.

``python -m tests.cosim.test_beside`` prints the cycles of both.
"""

import numpy as np
import pytest

import kvattic
from kvattic import timing
from kvattic.driver.jobs import FlashOperation
from kvattic.spec.commands import Opcode
from kvattic.spec.config import TINY
from kvattic_sim.reports.noted import Choice, NotedOperations, burst_of, note_job, timing_job

HEADS, TOKENS, QUERIES = 2, 256, 4
TOLERANCE = 0.2
"""Of a slow-down: `tiny` has two dies with arrays faster than any that can be bought, so each turn counts."""


def last_zone():
    """ERASEs of the last zone, in the driver's order."""
    first = TINY.pages_per_channel - TINY.zone_pages
    pages = [range(first, first + TINY.dies * TINY.part.planes)] * TINY.channels
    return [FlashOperation(Opcode.ERASE, one.channel, one.page, domain=0)
            for one in timing.in_turn(TINY, pages, program=False)]


def attended(device, sequence, query, beside):
    """Cycles until the last of some attends has ended, which begin right behind the load; and the job notes."""
    plans = [sequence.plan(one) for one in query]
    notes = [note_job(TINY, job) for plan in plans for job in plan.jobs]
    load = beside()
    answers = [device.attend_async(plan) for plan in plans]
    cycles = max(answer.result().cost.cycles for answer in answers)
    for future in load:
        future.result()
    return cycles, notes


def measured():
    """Cycles of the RTL and of the timing model, by load."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, HEADS, TOKENS, TINY.head_dim)).astype(np.float16)
    query = rng.standard_normal((QUERIES, HEADS, 1, TINY.head_dim)).astype(np.float16)
    rtl, model = {}, {}
    with kvattic.open("sim:verilator", TINY) as device:
        sequence = device.create_sequence(HEADS, capacity_tokens=TOKENS)
        sequence.prefill(key, value)
        writer = device.create_sequence(HEADS, capacity_tokens=TOKENS)
        noted = NotedOperations()
        noted.watch(device)
        for name, beside in (("alone", list), ("erase", lambda: device.submit_operations(last_zone())),
                             ("prefill", lambda: [writer.prefill_async(key, value)])):
            noted.take()
            rtl[name], notes = attended(device, sequence, query, beside)
            jobs = [timing_job(TINY, note, Choice()) for note in notes]
            operations = [one for burst in noted.take() for one in burst_of(burst)]
            found = timing.estimate(TINY, jobs, operations)
            model[name] = max(job.completed for job in found.jobs)
    return rtl, model


def test_the_model_knows_what_writes_cost_reads():
    rtl, model = measured()
    assert model["alone"] == pytest.approx(rtl["alone"], rel=0.1)
    for load in ("erase", "prefill"):
        slower, expected = rtl[load] / rtl["alone"], model[load] / model["alone"]
        assert slower > 1.05, load
        assert expected > 1.05, load
        assert expected == pytest.approx(slower, rel=TOLERANCE), load


def main():
    rtl, model = measured()
    for name, cycles in rtl.items():
        print(f"{name:8} RTL {cycles:,} ({cycles / rtl['alone']:.3f})  model {model[name]:,} "
              f"({model[name] / model['alone']:.3f})")


if __name__ == "__main__":
    main()
