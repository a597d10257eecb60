"""Sparse attention on the RTL, against the golden device: equal bits in any order, and an answer for every fault.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs), and most of them on the
golden device too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import (
    BLOCKS,
    DOMAIN,
    NAN,
    SHUFFLED,
    SIMULATORS,
    WINDOW,
    check_counters,
    differences,
    model,
    normal,
    observed,
    run_by_hand,
    simulate,
)

from kvattic.driver.device import Device
from kvattic.errors import DeviceStatusError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import COMMAND, LINE_BYTES, Mode, Opcode, Status, fp32_block_bytes, query_row_bytes
from kvattic.spec.config import TINY, Config
from kvattic.spec.formats import Element
from kvattic.spec.layout import pack_entries, pack_sketches
from kvattic.spec.nand import TINY_PART
from kvattic.spec.registers import StatusBit
from kvattic_sim.nand.twin import NandFaults
from kvattic_sim.rtl.jobs import run_in_simulation
from kvattic_sim.rtl.transport import AxiStalls, Fault, FaultKind, FlashSettings, NandSettings, Stall
from kvattic_sim.workloads import ModeSettings, live, random_life

GROUP = TINY.group_tokens
UNIT = TINY.tokens_per_codeword
TREE = [[True, False, True, False], [True, True, False, True], [False, False, False, True]]


def sparf(r: int, k: int, local_tokens: int = 0) -> dict[str, Any]:
    return {"mode": "sparf", "features": r, "top_units": k, "local_tokens": local_tokens}


def fetched(r: int, k: int, local_tokens: int = 0, unit_tokens: int = UNIT) -> dict[str, Any]:
    return {"mode": "fetched", "features": r, "top_units": k, "local_tokens": local_tokens, "unit_tokens": unit_tokens}


def centroid(k: int, local_tokens: int = 0, unit_tokens: int = UNIT) -> dict[str, Any]:
    return {"mode": "centroid", "top_units": k, "local_tokens": local_tokens, "unit_tokens": unit_tokens}


def codes(k: int, local_tokens: int = 0, sinks: int = 0) -> dict[str, Any]:
    return {"mode": "codes", "top_units": k, "local_tokens": local_tokens} | ({"sinks": sinks} if sinks else {})


CASES: dict[str, dict[str, Any]] = {
    "sparf": {"kv_heads": 3, "q_heads": 3, "tokens": [4 * GROUP], "how": sparf(4, 20)},
    "sparf, little": {"kv_heads": 1, "q_heads": 1, "tokens": [GROUP + 3], "how": sparf(2, 4)},
    "sparf, a tail": {"kv_heads": 2, "q_heads": 2, "tokens": [3 * GROUP + 17], "how": sparf(4, 20)},
    "sparf, one channel, one token": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP], "how": sparf(1, 1)},
    "sparf, all channels": {"kv_heads": 2, "q_heads": 2, "tokens": [2 * GROUP + 1], "how": sparf(TINY.head_dim, 9)},
    "sparf, all tokens": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP + 5], "how": sparf(4, 2 * GROUP + 5)},
    "sparf, local": {"kv_heads": 2, "q_heads": 2, "tokens": [3 * GROUP + 3], "how": sparf(4, 40, local_tokens=30)},
    "fetched": {"kv_heads": 3, "q_heads": 3, "tokens": [4 * GROUP], "how": fetched(4, 8)},
    "fetched, large units": {"kv_heads": 2, "q_heads": 4, "tokens": [3 * GROUP + 9],
                             "how": fetched(6, 5, local_tokens=20, unit_tokens=UNIT << TINY.unit_bits_max)},
    "centroid": {"kv_heads": 3, "q_heads": 3, "tokens": [4 * GROUP], "how": centroid(8)},
    "centroid, pages": {"kv_heads": 2, "q_heads": 4, "tokens": [3 * GROUP + 9],
                        "how": centroid(5, local_tokens=20, unit_tokens=UNIT << TINY.unit_bits_max)},
    "codes": {"kv_heads": 3, "q_heads": 3, "tokens": [4 * GROUP], "how": codes(20)},
    "codes, one head": {"kv_heads": 1, "q_heads": 1, "tokens": [GROUP + 3], "how": codes(4)},
    "codes, a tail, sinks": {"kv_heads": 2, "q_heads": 4, "tokens": [3 * GROUP + 17], "how": codes(40, 10, 5)},
    "codes, most sinks": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP], "how": codes(80, 3, GROUP // 2)},
    "codes, all tokens": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP + 5], "how": codes(2 * GROUP + 5)},
    "only a tail": {"kv_heads": 1, "q_heads": 2, "tokens": [GROUP - 1], "how": sparf(4, 3)},
    "only a tail, centroids": {"kv_heads": 1, "q_heads": 2, "tokens": [GROUP - 1], "how": centroid(3)},
    "one token": {"kv_heads": 1, "q_heads": 1, "tokens": [1], "how": fetched(2, 1)},
    "appended": {"kv_heads": 2, "q_heads": 2, "tokens": [GROUP - 3, 1, 1, 1, 2, GROUP, 7], "how": sparf(5, 30)},
    "appended, centroids": {"kv_heads": 2, "q_heads": 2, "tokens": [GROUP - 3, 1, 1, 1, 2, GROUP],
                            "how": centroid(9)},
    "gqa": {"kv_heads": 2, "q_heads": 4, "tokens": [3 * GROUP], "how": sparf(4, 24)},
    "sinks": {"kv_heads": 2, "q_heads": 4, "tokens": [4 * GROUP], "how": sparf(4, 40) | {"sinks": 17}},
    "sinks and local": {"kv_heads": 2, "q_heads": 2, "tokens": [3 * GROUP + 5],
                        "how": fetched(4, 30, local_tokens=40) | {"sinks": 9}},
    "sinks of a stripe": {"kv_heads": 1, "q_heads": 1, "tokens": [3 * GROUP],
                          "how": sparf(4, 200) | {"sinks": GROUP + 1}},
    "sinks, centroids": {"kv_heads": 2, "q_heads": 4, "tokens": [4 * GROUP], "how": centroid(8) | {"sinks": 6}},
    "causal": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP + 3], "queries": 5, "causal": True,
               "how": sparf(4, 24)},
    "causal, fetched": {"kv_heads": 2, "q_heads": 2, "tokens": [2 * GROUP - 2, 6], "queries": 6, "causal": True,
                        "how": fetched(4, 9)},
    "causal, centroids": {"kv_heads": 2, "q_heads": 2, "tokens": [2 * GROUP], "queries": 3, "causal": True,
                          "how": centroid(9)},
    "causal, codes": {"kv_heads": 2, "q_heads": 2, "tokens": [2 * GROUP - 2, 6], "queries": 6, "causal": True,
                      "how": codes(30, 0, 4)},
    "sliding, codes": {"kv_heads": 1, "q_heads": 2, "tokens": [3 * GROUP], "queries": 2, "causal": True, "window": 150,
                       "how": codes(30)},
    "sliding": {"kv_heads": 1, "q_heads": 2, "tokens": [3 * GROUP], "queries": 2, "causal": True, "window": 150,
                "how": fetched(4, 9)},
    "sliding, centroids": {"kv_heads": 1, "q_heads": 2, "tokens": [3 * GROUP], "queries": 2, "causal": True,
                           "window": 150, "how": centroid(9)},
    "tree": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP + 30], "queries": 3, "tree": TREE, "how": sparf(4, 24)},
    "tree, codes": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP + 30], "queries": 3, "tree": TREE,
                    "how": codes(24)},
    "equal codes": {"kv_heads": 2, "q_heads": 2, "tokens": [4 * GROUP], "how": codes(21), "constant": True},
    "large scale, codes": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP], "scale": 20.0, "how": codes(24)},
    "equal scores": {"kv_heads": 2, "q_heads": 2, "tokens": [4 * GROUP], "how": sparf(4, 21), "constant": True},
    "small scale": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP], "scale": 1e-6, "how": sparf(4, 24)},
    "large scale": {"kv_heads": 1, "q_heads": 2, "tokens": [2 * GROUP], "scale": 3000.0, "how": sparf(4, 24)},
}


def attend_case(device: Device, case: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Write, attend sparsely and densely in one batch, and free."""
    config, how = device.config, case["how"]
    kv_heads = case["kv_heads"]
    masks = {name: case[name] for name in ("causal", "window", "scale") if name in case}
    if "tree" in case:
        masks["tree"] = np.array(case["tree"])
    needs: dict[str, Any] = {"sparse": True}
    if how["mode"] == "centroid":
        needs = {"centroids": how["unit_tokens"]}
    elif how["mode"] == "codes":
        needs = {"codes": True}
    needs |= {"sinks": how["sinks"]} if "sinks" in how else {}
    with device.create_sequence(kv_heads, capacity_tokens=sum(case["tokens"]), **needs) as sequence:
        for piece, tokens in enumerate(case["tokens"]):
            key, value = (normal(config, seed + 10 * piece + i, kv_heads, tokens) for i in (100, 200))
            if case.get("constant"):
                key[:] = key[:, :1]
            sequence.append(key, value)
        query = normal(config, seed + 300, case["q_heads"], case.get("queries", 1))
        sparse, dense = sequence.plan(query, **masks, **how), sequence.plan(query, **masks)
        results = device.attend_many([sparse, dense, sparse])
        for result in results:
            check_counters(result.completions, config.lanes)
        return [observed(result) for result in results]


def attend_cases(device: Device, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All cases on one device, so that pages, slots and groups are used again."""
    return {name: attend_case(device, case, seed) for seed, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_equals_golden_device(simulator: str) -> None:
    # Icarus runs a hundred cycles a second.
    cases = CASES if simulator == "verilator" else {"sparf, little": CASES["sparf, little"]}
    found = simulate(TINY, attend_cases, simulator, cases=cases, flash=SHUFFLED)
    assert not differences(found, model(TINY, attend_cases, cases=cases))


def test_lanes_of_several_channels() -> None:
    config = replace(TINY, channels=4, lane_channels=2, beat_bytes=16)
    found = simulate(config, attend_cases, cases=CASES, flash=SHUFFLED)
    assert not differences(found, model(config, attend_cases, cases=CASES))


WIDE = Config(
    channels=3, rows=3, head_dim=64, element=Element.BF16, beat_bytes=16, part=TINY_PART.resized(2048), dies=2,
    dram_beat_bytes=32, codeword_bytes=256, score_depth=512, jobs_in_flight=3, groups_in_flight=2)
"""Another geometry: bf16, two tokens in a codeword, eight elements in a beat, three slots."""


def test_another_geometry() -> None:
    group = WIDE.group_tokens
    cases = {
        "sparf": {"kv_heads": 2, "q_heads": 4, "tokens": [4 * group + 9], "how": sparf(7, 33, local_tokens=5)},
        "fetched": {"kv_heads": 2, "q_heads": 6, "tokens": [4 * group], "how": fetched(5, 9, unit_tokens=4)},
        "centroid": {"kv_heads": 2, "q_heads": 4, "tokens": [4 * group + 1], "how": centroid(9, unit_tokens=8)},
        "codes": {"kv_heads": 2, "q_heads": 6, "tokens": [4 * group + 9], "how": codes(40, 5, 7)},
    }
    found = simulate(WIDE, attend_cases, flash=SHUFFLED, cases=cases)
    assert not differences(found, model(WIDE, attend_cases, cases=cases))


# ---------------------------------------------------------------- orders, stalls, resets

TWO = {"kv_heads": 2, "q_heads": 4, "tokens": [3 * GROUP + 17], "how": fetched(4, 9)}
TWO_BY_CODES = TWO | {"how": codes(30, 3, 6)}


def orders(device: Device, seeds: list[int]) -> tuple[list[Any], int]:
    """The same attention with codewords coming in other orders and at other paces; distinct results, and cycles."""
    rng, found, cycles = np.random.default_rng(1), [], set()
    for seed in seeds:
        device.transport.set_flash(FlashSettings(
            latency=int(rng.integers(0, 200)), jitter=int(rng.integers(0, 800)), shuffle=bool(rng.integers(4)),
            gap=Stall.RANDOM, stall_probability=int(rng.integers(0, 100)), seed=seed + 1))
        device.transport.set_stalls(AxiStalls.everywhere(Stall.RANDOM, seed=seed) if seed % 3 == 0 else AxiStalls())
        begin = device.transport.cycles
        found.append([attend_case(device, case) for case in (TWO, TWO_BY_CODES)])
        cycles.add(device.transport.cycles - begin)
        if len(found) > 1 and not differences(found[-1], found[0]):
            found.pop()
    return found, len(cycles)


@pytest.mark.campaign
def test_order_changes_no_bit(campaign: Callable[[int, int], int]) -> None:
    count = campaign(40, 8)
    found, cycles = simulate(TINY, orders, seeds=list(range(count)))
    assert len(found) == 1, differences(found[1], found[0])
    assert cycles > count // 2, "the orders were hardly different"
    assert not differences(found[0], [model(TINY, attend_case, case=case) for case in (TWO, TWO_BY_CODES)])


def resets(device: Device, delays: list[int]) -> dict[str, Any]:
    """Jobs that are cut off by a reset after some cycles, each time followed by whole ones."""
    transport, found = device.transport, {}
    for delay in delays:
        transport.set_flash(FlashSettings(latency=50, jitter=100, shuffle=True, seed=delay, gap=Stall.RANDOM))
        with device.create_sequence(2, capacity_tokens=3 * GROUP, sparse=True, codes=True) as sequence:
            sequence.prefill(normal(TINY, delay, 2, 3 * GROUP), normal(TINY, delay + 1, 2, 3 * GROUP))
            plans = [sequence.plan(normal(TINY, delay + 2, heads, 1), **how)
                     for heads, how in ((4, sparf(4, 20)), (4, codes(20, 0, 3)), (4, fetched(4, 9)), (6, {}))]
            waiting = device.submit([job for plan in plans * 2 for job in plan.jobs])
            transport.run_cycles(delay)
            assert transport.read_register("STATUS") & StatusBit.BUSY
            device.reset()
            for future in waiting:
                with pytest.raises(DeviceStatusError, match="the device was reset"):
                    future.result()
            found[str(delay)] = [attend_case(device, case, delay) for case in (TWO, TWO_BY_CODES)]
    return found


def test_reset_in_the_middle_of_work() -> None:
    delays = [100, 400, 700, 1000, 1300, 1700, 2100, 2500]
    expected = {str(delay): [model(TINY, attend_case, case=case, seed=delay) for case in (TWO, TWO_BY_CODES)]
                for delay in delays}
    assert not differences(simulate(TINY, resets, delays=delays), expected)


# ---------------------------------------------------------------- the whole drive


@pytest.mark.parametrize("mode", ["sparf", "fetched", "centroid", "codes"])
def test_a_life(mode: str) -> None:
    """Prefill, decode steps from the tail, a stripe that fills up, freeing and another sequence, behind NAND."""
    options = ModeSettings(mode=mode, features=4, top_units=5)
    # The third token fills a stripe.
    life = random_life(TINY, kv_heads=3, tokens=3 * GROUP - 2, group=2, appended=4, options=options)

    def run(device: Device) -> list[Any]:
        return whole_life(device, life)

    found = run_in_simulation(TINY, whole_life, {"life": life}, flash=NandSettings(bit_error_rate=1e-4),
                              memory_bytes=1 << 20, timeout_cycles=2_000_000, timeout_s=300).result
    expected = run(Device(GoldenDevice(TINY, memory_bytes=1 << 20)))
    assert not differences([o for _, o in found], [o for _, o in expected])


def whole_life(device: Device, life: Any) -> list[Any]:
    return [(step.name, observed(step.result)) for step in live(device, life) if step.result is not None]


def unreadable(device: Device) -> list[Any]:
    """A die whose pages cannot be read: jobs that need them say so, a job in DRAM alone does not."""
    found = []
    for needs, how in (({"sparse": True}, sparf(4, 20)), ({"centroids": UNIT}, centroid(9)),
                       ({"codes": True}, codes(20))):
        with device.create_sequence(2, capacity_tokens=3 * GROUP, **needs) as sequence:
            sequence.prefill(normal(TINY, 1, 2, 3 * GROUP), normal(TINY, 2, 2, 3 * GROUP))
            other = device.create_sequence(1, capacity_tokens=GROUP, **needs)
            other.prefill(normal(TINY, 7, 1, 40), normal(TINY, 8, 1, 40))
            jobs = [*sequence.plan(normal(TINY, 3, 4, 1), **how).jobs, *other.plan(normal(TINY, 9, 1, 1), **how).jobs]
            found.append([r.completion.status for r in device.run(jobs, check=False)])
            other.free()
    return found


def test_unreadable_sketches() -> None:
    lost = NandFaults(retry=tuple((die, plane, None, None, TINY.part.retry_levels + 1)
                                  for die in range(TINY.dies) for plane in range(TINY.part.planes)))
    found = run_in_simulation(TINY, unreadable, {}, flash=NandSettings(faults={0: lost}), memory_bytes=1 << 20,
                              timeout_cycles=2_000_000, timeout_s=300).result
    assert found == [[Status.UNREADABLE_SKETCH, Status.UNREADABLE_SKETCH, Status.OK]] * 3


# ---------------------------------------------------------------- what the flash side does wrong


def faults(device: Device, how: dict[str, Any], kind: FaultKind, numbers: list[int],
           value: int) -> list[dict[str, Any]]:
    """A fault at each of some codewords of a batch, then a whole batch."""
    transport, found = device.transport, []
    transport.write_register("TIMEOUT", 3000)
    with device.create_sequence(3, capacity_tokens=2 * GROUP, sparse=True, codes=True) as sequence:
        sequence.prefill(normal(TINY, 1, 3, 2 * GROUP), normal(TINY, 2, 3, 2 * GROUP))
        jobs = sequence.plan(normal(TINY, 3, 3, 1), **how).jobs
        for number in numbers:
            fault = Fault(kind=kind, number=number, channel=number % 2, value=value)
            transport.set_flash(FlashSettings(latency=30, jitter=60, shuffle=True, seed=number, fault=fault))
            transport.write_register("STATUS", 0xFFFF_FFFF)
            before = transport.read_register("DUPLICATES") + transport.read_register("STALES")
            results = device.run(jobs, check=False)
            check_counters([result.completion for result in results], TINY.lanes)
            transport.run_cycles(6000)
            seen = {"channel": number % 2, "completions": [r.completion for r in results],
                    "bits": [r.bits for r in results],
                    "late": transport.read_register("DUPLICATES") + transport.read_register("STALES") - before}
            transport.set_flash(FlashSettings())
            seen["after"] = [r.bits for r in device.run(jobs)]
            found.append(seen)
    return found


def faultless(device: Device, how: dict[str, Any]) -> list[Any]:
    with device.create_sequence(3, capacity_tokens=2 * GROUP, sparse=True, codes=True) as sequence:
        sequence.prefill(normal(TINY, 1, 3, 2 * GROUP), normal(TINY, 2, 3, 2 * GROUP))
        return [r.bits for r in device.run(sequence.plan(normal(TINY, 3, 3, 1), **how).jobs)]


@pytest.mark.parametrize("how", [sparf(4, 20), codes(20)], ids=["sparf", "codes"])
@pytest.mark.parametrize(("kind", "value"), [(FaultKind.DROP, 0), (FaultKind.DELAY, 8000), (FaultKind.DUPLICATE, 0)])
def test_flash_faults(kind: FaultKind, value: int, how: dict[str, Any]) -> None:
    """Codewords of the first pass, of K and of V that are lost, come late or come twice."""
    numbers = [1, 2, 3, 4, 7, 10, 15, 20, 27, 34]
    found = simulate(TINY, faults, how=how, kind=kind, numbers=numbers, value=value)
    expected = model(TINY, faultless, how=how)
    for seen in found:
        assert not differences(seen["after"], expected), seen
        lost = [c for c in seen["completions"] if c.status is not Status.OK]
        if kind is FaultKind.DUPLICATE:
            assert not lost, seen
            assert seen["late"] == 1, seen
        else:
            assert [c.status for c in lost] == [Status.CODEWORD_TIMEOUT], seen
            assert lost[0].where >> 16 == seen["channel"], seen
            assert lost[0].where & 0x7FFF == 1, seen
        for completion, bits, right in zip(seen["completions"], seen["bits"], expected, strict=True):
            assert completion.status is not Status.OK or np.array_equal(bits, right), seen


# ---------------------------------------------------------------- errors


def bad_commands(device: Device) -> dict[str, Any]:
    """Each mistake in a sparse command, between two good ones."""
    config, transport = device.config, device.transport
    tokens = 2 * GROUP + 5
    sequence = device.create_sequence(1, capacity_tokens=tokens, sparse=True, centroids=UNIT, codes=True)
    sequence.prefill(normal(config, 1, 1, tokens), normal(config, 2, 1, tokens))
    plain = device.create_sequence(1, capacity_tokens=tokens)
    plain.prefill(normal(config, 1, 1, tokens), normal(config, 2, 1, tokens))
    sparse_job = sequence.plan(normal(config, 3, 1, 1), **sparf(4, 20)).jobs[0]
    centroid_job = sequence.plan(normal(config, 3, 1, 1), **centroid(9)).jobs[0]
    codes_job = sequence.plan(normal(config, 3, 1, 1), **codes(20)).jobs[0]
    query = np.zeros((1, query_row_bytes(config.head_dim)), np.uint8)
    query[:, 4:8] = np.array([tokens], "<u4").view(np.uint8)
    query[0, LINE_BYTES : LINE_BYTES + 2 * config.head_dim] = sparse_job.query.view(np.uint8)[0]
    at = BLOCKS
    transport.write_memory(at, query.tobytes())

    def table(job: Any) -> Any:
        return np.stack([job.table, job.sketch], axis=1).ravel().astype("<u8")

    good_table, centroid_table, codes_table = table(sparse_job), table(centroid_job), table(codes_job)
    unwritten = good_table.copy()
    unwritten[3] = pack_sketches(0, 0, 0)     # of the second stripe, which is in flash
    channel = good_table.copy()
    channel[2] = pack_entries(config.channels, 0, 0, 0)
    mean = np.asarray(sparse_job.mean, "<u4").copy()
    bad_mean = mean.copy()
    bad_mean[7] = 0x7FC0_0000
    uncoded, codes_beyond, odd_features = codes_table.copy(), codes_table.copy(), good_table.copy()
    uncoded[3] = pack_sketches(0, 0, 0)
    # The last octet is in the next zone.
    codes_beyond[1] = pack_sketches((1 << config.zone_page_bits) - 1, config.codewords_per_page - config.octets + 1, 1)
    odd_features[1] = pack_sketches(int(good_table[1]) & 0xFF_FFFF, 1, 1)    # of the feature layout, within a page
    foreign, beyond, unwritten_and_foreign = good_table.copy(), good_table.copy(), unwritten.copy()
    page = config.part.blocks << config.zone_page_bits    # there is no such zone
    foreign[3] = pack_sketches(page, 0, 1)
    beyond[3] = pack_sketches((1 << config.zone_page_bits) - 1, 0, 1)    # a run that leaves its zone
    unwritten_and_foreign[4] = pack_entries(0, page, page, 0)
    for address, before, data in (
            (0x4000, mean, good_table), (0x4200, mean, unwritten), (0x4400, mean, channel), (0x4600, mean, foreign),
            (0x4800, mean, beyond), (0x4A00, mean, unwritten_and_foreign), (0x4C00, bad_mean, good_table),
            (0x4E00, mean[:0], centroid_table), (0x5000, mean, codes_table), (0x5200, mean, uncoded),
            (0x5400, mean, codes_beyond), (0x5600, mean, odd_features)):
        assert len(before.tobytes()) in (0, fp32_block_bytes(config.head_dim))
        transport.write_memory(at + address, before.tobytes() + data.tobytes())
    nan = query.copy()
    nan[0, LINE_BYTES + 6 : LINE_BYTES + 8] = np.array([NAN], "<u2").view(np.uint8)
    transport.write_memory(at + 0x1000, nan.tobytes())
    good = {
        "opcode": Opcode.ATTEND, "mode": Mode.SPARF, "domain": DOMAIN, "rows": 1, "stripe_pages": config.group_pages,
        "stripes": 3, "base_token": 0, "end_token": tokens, "tree_token": tokens, "scale": sparse_job.scale_bits,
        "query": at, "result": at + 0x2000, "table": at + 0x4000, "features": 4, "local_tokens": 0, "top_units": 20,
        "unit_bits": 0,
    }
    by_fetched = {"mode": Mode.FETCHED}
    by_centroid = {"mode": Mode.CENTROID, "table": at + 0x4E00, "features": 0, "top_units": 9}
    by_codes = {"mode": Mode.CODES, "table": at + 0x5000, "features": 0}
    units = -(-tokens // UNIT)
    mistakes: dict[str, dict[str, int]] = {
        "good fetched": by_fetched,
        "good centroid": by_centroid,
        "good codes": by_codes | {"sinks": GROUP // 2, "top_units": GROUP},
        "no such mode": {"mode": 5},
        "codes with features": by_codes | {"features": 4},
        "codes with units": by_codes | {"unit_bits": 1},
        "codes, sinks above": by_codes | {"sinks": GROUP // 2 + 1, "top_units": GROUP},
        "codes, k above": by_codes | {"top_units": tokens + 1},
        "no codes": by_codes | {"table": at + 0x5200},
        "codes beyond their zone": by_codes | {"table": at + 0x5400},
        "features within a page": {"table": at + 0x5600},
        "reserved": {"reserved0": 1},
        "small stripes": {"stripe_pages": config.group_pages // 2},
        "sparf with units": {"unit_bits": 1},
        "centroid with channels": by_centroid | {"features": 4},
        "r of zero": {"features": 0},
        "r above": {"features": config.head_dim + 1},
        "k of zero": {"top_units": 0},
        "k above the length": {"top_units": tokens + 1},
        "k of all": {"top_units": tokens},
        "fetched: k above": by_fetched | {"top_units": units + 1},
        "fetched: k of all": by_fetched | {"top_units": units},
        "centroid: k above": by_centroid | {"top_units": units + 1},
        "local above k": {"local_tokens": 21},
        "fetched: local above": by_fetched | {"top_units": 2, "local_tokens": 2 * UNIT + 1},
        "unit above": by_fetched | {"top_units": 3, "unit_bits": config.unit_bits_max + 1},
        "table unaligned": {"table": at + 0x4008},
        "mean above": {"table": WINDOW[1] - 64},
        "table above": {"table": WINDOW[1] - fp32_block_bytes(config.head_dim)},
        "no sketch": {"table": at + 0x4200},
        "sketch of nobody": {"table": at + 0x4600},
        "sketch beyond its zone": {"table": at + 0x4800},
        "no sketch, and foreign": {"table": at + 0x4A00},
        "domain": {"domain": DOMAIN + 1},
        "far domain": {"domain": 1 << 31 | DOMAIN},
        "channel": {"table": at + 0x4400},
        "nan in q": {"query": at + 0x1000},
        "nan in the mean": {"table": at + 0x4C00},
        "all wrong": {"mode": 5, "rows": 0, "features": 0, "top_units": 0, "table": 1},
        "nearly all wrong": {"features": 0, "top_units": 0, "table": at + 0x4201},
        "numbers of dense": {"mode": Mode.DENSE},
        "sinks of dense": {"mode": Mode.DENSE, "features": 0, "top_units": 0, "sinks": 1},
    }
    found: dict[str, Any] = {}
    for name, mistake in mistakes.items():
        lines = [COMMAND.pack(**{**good, **change}) for change in ({}, mistake, {})]
        transport.write_memory(at + 0x2000, bytes(0x1000))
        entries, status = run_by_hand(device, lines)
        found[name] = {"entries": entries, "status": status,
                       "result": np.frombuffer(transport.read_memory(at + 0x2000, 0x1000), np.uint8)}
    sequence.free()
    plain.free()
    return found


def test_mistakes_in_commands() -> None:
    found, expected = simulate(TINY, bad_commands, flash=SHUFFLED), model(TINY, bad_commands)
    assert not differences(found, expected)
    seen = {entry[2] for each in expected.values() for entry in each["entries"]}
    assert seen == {
        Status.OK, Status.INVALID_FIELD, Status.INVALID_SELECTION, Status.INVALID_ADDRESS,
        Status.NO_SKETCH, Status.INVALID_TABLE, Status.NAN_QUERY, Status.NAN_MEAN, Status.NOT_OWNED,
        Status.NOT_PERMITTED}


def special_tokens(device: Device) -> list[Any]:
    """NaN in K where only some codewords are read, and in V; each followed by a good job."""
    found = []
    tokens = 2 * GROUP + 9
    for head_token, channel in ((0, 0), (GROUP + 5, 31), (2 * GROUP + 3, 2)):
        for kind in range(2):
            arrays = [normal(TINY, i, 2, tokens) for i in (1, 2)]
            arrays[kind][0, head_token, channel] = NAN
            for needs, how in (({"sparse": True}, sparf(4, 20)), ({"sparse": True}, fetched(TINY.head_dim, 6)),
                               ({"centroids": UNIT}, centroid(9)), ({"codes": True}, codes(20, 0, 9))):
                with device.create_sequence(2, capacity_tokens=tokens, **needs) as sequence:
                    sequence.prefill(*arrays)
                    for result in device.run(sequence.plan(normal(TINY, 3, 2, 1), **how).jobs, check=False):
                        c = result.completion
                        found.append({"completion": [c.status, c.identifier, c.flags, c.where]})
                        if c.status is Status.OK:
                            found[-1]["bits"] = result.bits
    return found


def test_special_numbers_in_flash() -> None:
    found, expected = simulate(TINY, special_tokens, flash=SHUFFLED), model(TINY, special_tokens)
    assert not differences(found, expected)
    assert {each["completion"][0] for each in expected} >= {Status.OK, Status.NAN_KEY}
