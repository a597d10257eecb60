"""Decoding workloads: slices on small drives, the whole on the timing model."""

from dataclasses import replace

import numpy as np
import pytest

import kvattic
from kvattic import TINY, RequestError
from kvattic_sim.runs import decode, slices
from kvattic_sim.runs.decode import LLAMA2, LLAMA3, OPT
from kvattic_sim.runs.outcome import How, Request
from kvattic_sim.system.systems import Study
from kvattic_sim.workloads import topical


def small(heads=2, tokens=70):
    return topical(TINY, kv_heads=heads, tokens=tokens, group=TINY.rows)


def test_a_slice_is_a_decode_step():
    attention = small()
    found = slices.run_slice(TINY, attention, "slice")
    assert found.bit_exact is None and 0 < found.error < 5e-7
    assert found.run.how is How.MODELLED and found.run.cycles > 0
    # K and V of all tokens, those in flash and the tail.
    assert found.run.bytes >= 2 * 2 * 70 * TINY.token_bytes
    with kvattic.open("model", TINY) as device, device.create_sequence(2, capacity_tokens=70) as sequence:
        sequence.prefill(attention.key, attention.value)
        assert np.array_equal(sequence.attend(attention.query).bits, found.result.bits)


def test_a_slice_on_several_drives_is_compared_with_one():
    one, two = (slices.run_slice(TINY, small(), "slice", drives=drives) for drives in (1, 2))
    assert two.bit_exact is True and two.error == one.error
    assert two.run.bytes == one.run.bytes and two.run.cycles < one.run.cycles


def test_wrong_bits_are_seen(monkeypatch):
    monkeypatch.setattr(slices, "equal_bits", lambda *_: np.array([True, False]))
    assert slices.run_slice(TINY, small(), "slice", drives=2).bit_exact is False


def test_what_limits_it():
    assert slices.limit_of(0.95) == "flash buses, busy 95% of the time"
    assert slices.limit_of(0.3, {"starved": 0.6, "idle": 0.1}) == (
        "lanes wait for data from flash 60% of the time, buses are busy 30%")
    assert slices.limit_of(0.3, dies=0.2) == "latency: buses are busy 30% of the time, arrays 20%"


def test_the_share_of_the_bus_is_that_of_the_timing_model():
    from kvattic.timing import Layer, estimate

    found = estimate(TINY, Layer(TINY, 4, 64).attend())
    data = sum(found.bytes_by_kind.values()) - found.dram_codewords * TINY.codeword_bytes
    assert slices.bus_share(TINY, data, found.cycles) == pytest.approx(found.bus_use)
    assert slices.bus_share(TINY, 2 * data, found.cycles, drives=2) == pytest.approx(found.bus_use)


def test_the_whole_is_that_of_the_system_model():
    step, parts = decode.step_run(OPT, 4)
    row = next(Study(model=OPT.model, drives=(4,), modes=("dense",)).rows(baselines=False))
    assert decode.BATCH / step.seconds == pytest.approx(row.tokens_per_second)
    assert sum(parts.values()) == pytest.approx(1)
    assert step.how is How.MODELLED and step.limit == f"attention in the drives, {parts['kv']:.1%} of the step"


def test_a_layer_over_drives():
    one, four = decode.layer_run(LLAMA3, 1), decode.layer_run(LLAMA3, 4)
    model = LLAMA3.model
    assert one.bytes == four.bytes == 2 * model.kv_heads * LLAMA3.context * model.head_dim * 2
    assert 3 < one.cycles / four.cycles <= 4


@pytest.mark.parametrize("workload", [OPT, LLAMA2, LLAMA3], ids=lambda one: one.name)
def test_what_it_says(workload):
    found = decode.run(workload, Request())
    assert found.good and found.error < 5e-7 and found.bit_exact is None
    assert found.geometry["KV heads"] == workload.model.kv_heads
    assert "config.json" in found.source or "arXiv" in found.source
    slice_run, layer, step = found.runs
    assert slice_run.cycles < layer.cycles < step.cycles
    assert all(run.how is How.MODELLED and run.limit for run in found.runs)
    assert all(name.startswith("modelled") for name in found.figures)


@pytest.mark.parametrize(("drives", "target", "message"), [
    (0, "model", r"--drives of llama3-8b must be 1 to 8, its KV heads, which are dealt over them, not 0"),
    (9, "model", "must be 1 to 8, .* not 9"),
    (5, "sim:verilator", "--drives must be at most 4 with --target sim:verilator, where each is a process of its own"),
])
def test_wrong_numbers_of_drives(drives, target, message):
    with pytest.raises(RequestError, match=message):
        decode.run(LLAMA3, Request(target=target, drives=drives))


def test_an_outcome_that_is_not_good():
    found = decode.run(OPT, Request())
    assert not replace(found, error=2e-5).good
    assert not replace(found, error=float("nan")).good
    assert not replace(found, bit_exact=False).good
    assert replace(found, bit_exact=True).good
