"""K and V in 8 bits on the RTL, against the golden device: equal bits in every mode, and what is stored comes back.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs), and most of them on the
golden device too.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import SHUFFLED, check_counters, differences, model, normal, observed, simulate

import kvattic
from kvattic import selftest
from kvattic.driver.device import Device
from kvattic.spec.commands import Status
from kvattic.spec.config import TINY, Config
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.nand import TINY_PART
from kvattic.spec.stored import element_table, widen
from kvattic_sim.reports.benches.engine import Case, Lab
from kvattic_sim.reports.benches.kv_formats import speedup
from kvattic_sim.rtl.transport import AxiStalls, Stall

E4M3 = replace(TINY, kv=KvFormat.FP8_E4M3, score_depth=512)
E5M2 = Config(
    channels=4, lane_channels=2, rows=3, head_dim=64, element=Element.BF16, kv=KvFormat.FP8_E5M2, beat_bytes=16,
    part=TINY_PART.resized(2048), dies=2, dram_beat_bytes=32, codeword_bytes=256, score_depth=1024, jobs_in_flight=3,
    groups_in_flight=2)
"""bf16 beside 8 bits, four tokens in a codeword, lanes of two channels."""
REST = Config(
    channels=2, rows=1, head_dim=96, kv=KvFormat.FP8_E4M3, beat_bytes=32, sparse=False, part=TINY_PART, dies=2,
    dram_beat_bytes=32, codeword_bytes=512, score_depth=64)
"""Three beats a token, five tokens and a rest in a codeword."""
CONFIGS = {"e4m3": E4M3, "e5m2": E5M2, "rest": REST}


def numbers(config: Config, seed: int, heads: int, tokens: int) -> Any:
    """float32 of all the format's sizes, subnormals among them."""
    rng = np.random.default_rng(seed)
    shape = (heads, tokens, config.head_dim)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-10, 2, shape))).astype(np.float32)


def attend_all(device: Device) -> dict[str, Any]:
    """Dense and sparse attention over flash and tail, and what READ gives."""
    config, found = device.config, {}
    size = config.group_tokens if config.sparse else config.tokens_per_page
    unit = config.tokens_per_codeword
    modes = {"sparf": {"mode": "sparf", "features": 5, "top_units": 20, "local_tokens": 3},
             "fetched": {"mode": "fetched", "features": 4, "top_units": 8, "unit_tokens": unit},
             "centroid": {"mode": "centroid", "top_units": 7}}
    tokens, first = 2 * size + 7, 70 if config.sparse else 7
    key, value = (numbers(config, seed, 2, tokens) for seed in (1, 2))
    needs = {"sparse": True, "centroids": unit} if config.sparse else {}
    with device.create_sequence(2, capacity_tokens=tokens, **needs) as sequence:
        at = 0
        for piece in (first, 1, size - 4, tokens - first - size + 3):
            sequence.append(key[:, at : at + piece], value[:, at : at + piece])
            at += piece
            query = normal(config, 300 + at, 2 * config.rows, 2)
            plans = {"dense": sequence.plan(query), "causal": sequence.plan(query, causal=True, window=size + 1)}
            if config.sparse:
                plans |= {name: sequence.plan(query, **how) for name, how in modes.items()}
            for name, result in zip(plans, device.attend_many(list(plans.values())), strict=True):
                check_counters(result.completions, config.lanes)
                found[f"{at}, {name}"] = observed(result)
        for begin, end in ((5, tokens - 2), (tokens - 1, tokens)):
            found[f"read {begin}"] = dict(zip(("key", "value"), sequence.read_bits(0, begin, end), strict=True))
        found["as written"] = [np.array_equal(sequence.read(0)[0], widened(key, config))]
    return found


def widened(values: Any, config: Config) -> Any:
    """Numbers as they are stored, as `Sequence.read` gives them."""
    bits = kvattic.spec.layout.kv_bits(values, config)
    return bits.view(np.float16) if config.element is Element.FP16 else (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_golden_device(name: str) -> None:
    config = CONFIGS[name]
    expected = model(config, attend_all)
    assert expected["as written"] == [True]
    for stalls in (AxiStalls(), AxiStalls.everywhere(Stall.RANDOM, seed=3))[: 2 if name == "e4m3" else 1]:
        assert not differences(simulate(config, attend_all, flash=SHUFFLED, stalls=stalls), expected)


def special_tokens(device: Device) -> list[dict[str, Any]]:
    """Each code of a NaN or infinity in K and in V; each followed by a good job."""
    config, found = device.config, []
    table = element_table(config.kv, config.element)
    assert table is not None
    form = config.element.encoding
    ones = ((1 << form.exponent_bits) - 1) << form.fraction_bits
    codes = np.flatnonzero(table & ones == ones)
    for number, bits in enumerate(table[codes]):
        tokens = [kvattic.spec.layout.kv_bits(numbers(config, i, 2, 60), config) for i in (1, 2)]
        tokens[number % 2][0, 7 * number + 1, 5 * number] = bits
        with device.create_sequence(2, capacity_tokens=60) as sequence:
            sequence.prefill(*tokens)
            for result in device.run(sequence.plan(normal(config, 3, 2, 1)).jobs, check=False):
                c = result.completion
                found.append({"completion": [c.status, c.identifier, c.flags, c.where]})
                if c.status is Status.OK:
                    found[-1]["bits"] = result.bits
            read = sequence.read_bits()
            assert all((one == other).all() for one, other in zip(read, tokens, strict=True))
    return found


@pytest.mark.parametrize(("name", "count"), [("e4m3", 2), ("e5m2", 8)])
def test_special_numbers(name: str, count: int) -> None:
    config = CONFIGS[name]
    found, expected = simulate(config, special_tokens, flash=SHUFFLED), model(config, special_tokens)
    assert not differences(found, expected)
    assert len(expected) == 2 * count
    assert {each["completion"][0] for each in expected} == {Status.OK, Status.NAN_KEY, Status.NAN_VALUE}


def through_a_drive(target: str) -> tuple[Any, Any, Any]:
    """Attention and `Sequence.read` on a whole drive, and what they cost."""
    rng = np.random.default_rng(0)
    key, value = (widen((rng.integers(0, 127, (2, 700, 32)) | rng.integers(0, 2, (2, 700, 32)) << 7).astype(np.uint8),
                        E4M3.kv, E4M3.element) for _ in range(2))
    with kvattic.open(target, E4M3) as device, device.create_sequence(2, capacity_tokens=700, sparse=True) as sequence:
        sequence.prefill(key, value)
        before = device.statistics()
        query = (rng.standard_normal((2, 1, 32)) / 300).astype(np.float32)
        result = sequence.attend(query)
        sparse = sequence.attend(query, mode="sparf", features=4, top_units=60)
        return (result.bits, sparse.bits, *sequence.read_bits(0, 9, 690)), (key, value), device.statistics() - before


def test_a_whole_drive_gives_the_same_bits_at_the_modelled_cost() -> None:
    (found, _, cost), (expected, written, modelled) = through_a_drive("sim:verilator"), through_a_drive("model")
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()
    for one, other in zip(found[2:], written, strict=True):
        assert (one == other[:, 9:690]).all()
    for name in ("flash_bytes", "dram_bytes", "link_bytes", "macs"):
        assert getattr(cost, name) == getattr(modelled, name), name
    assert not cost.modelled and modelled.modelled
    assert cost.cycles == pytest.approx(modelled.cycles, rel=0.15)


def test_the_benchs_speedup() -> None:
    """At a small size, where what does not depend on the format counts for more than in the paper's geometry."""
    case = Case(config=replace(TINY, score_depth=512), kv_heads=4, tokens=512)
    assert 1.5 < speedup(Lab(), "fp8_e4m3", case) < 2.05


def test_the_selftest_of_a_whole_drive() -> None:
    with kvattic.open("sim:verilator", E4M3) as device, kvattic.open("model", E4M3) as golden:
        checks = list(selftest.run(device, golden))
    assert len(checks) > 12 and all(check.equal and check.error <= 5e-7 for check in checks), checks
