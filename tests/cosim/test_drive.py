"""The whole drive, NAND to completion: equal bits through timing, ECC and retries, and an answer for every fault.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs), most of them on the golden
device too.  Whatever else a test looks at: the NAND models report every violation of the part's rules, which fails
the run.
"""

from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import CASES, attend_case, differences, normal, observed

from kvattic.driver.device import Device, FlashOperation
from kvattic.errors import DeviceStatusError, DeviceTimeoutError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import MediaCause, Opcode, Status
from kvattic.spec.config import TINY
from kvattic.spec.layout import page_place
from kvattic.spec.registers import StatusBit
from kvattic_sim.nand.twin import NandFaults
from kvattic_sim.reports.benches import bad_blocks
from kvattic_sim.rtl.jobs import run_in_simulation
from kvattic_sim.rtl.transport import NandSettings
from kvattic_sim.simulators.build import icarus_available
from kvattic_sim.workloads import live, measured, random_life

MEMORY = 1 << 20
PAGE = TINY.tokens_per_page
SIMULATORS = [
    "verilator",
    pytest.param("icarus", marks=pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")),
]
PART = TINY.part


def simulate(function: Any, simulator: str = "verilator", flash: NandSettings | None = None, **arguments: Any) -> Any:
    """Run function(device, **arguments) on the drive."""
    return run_in_simulation(
        TINY, function, arguments, simulator=simulator, flash=flash, memory_bytes=MEMORY,
        timeout_cycles=2_000_000, timeout_s=300).result


def model(function: Any, **arguments: Any) -> Any:
    """The same on the golden device."""
    return function(Device(GoldenDevice(TINY, memory_bytes=MEMORY)), **arguments)


def cases(device: Device, names: list[str]) -> dict[str, Any]:
    return {name: attend_case(device, CASES[name], seed) for seed, name in enumerate(names)}


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_equals_golden_device(simulator: str) -> None:
    # Icarus runs a hundred cycles a second.
    names = [n for n in CASES if simulator == "verilator" or n == "one page and a token"]
    assert not differences(simulate(cases, simulator, names=names), model(cases, names=names))


def whole_life(device: Device) -> list[Any]:
    life = random_life(TINY, kv_heads=3, tokens=5 * PAGE - 2, group=2, appended=4)   # the third token fills a stripe
    return [(step.name, observed(step.result)) for step in live(device, life) if step.result is not None]


def test_a_life() -> None:
    """Prefill, decode steps from the tail, a stripe that fills up, freeing, and another sequence."""
    found, expected = simulate(whole_life), model(whole_life)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert not differences([o for _, o in found], [o for _, o in expected])


def counted(device: Device) -> dict[str, dict[str, int]]:
    """What each step of a sequence's life made the counters grow, and what the sequence says in the end."""
    grown: dict[str, dict[str, int]] = {}
    last = device.counters()

    def look(step: str) -> None:
        nonlocal last
        now = device.counters()
        grown[step] = {name: now[name] - last[name] for name in now}
        last = now

    look("nothing")
    tokens = 2 * TINY.group_tokens + 20
    sequence = device.create_sequence(2, capacity_tokens=tokens, sparse=True, centroids=16)
    sequence.prefill(normal(TINY, 1, 2, tokens), normal(TINY, 2, 2, tokens))
    look("prefill")
    query = normal(TINY, 3, 4, 1)
    sequence.attend(query)
    look("dense")
    for mode, how in (("sparf", {"features": 5}), ("fetched", {"features": 5}), ("centroid", {})):
        sequence.attend(query, mode=mode, top_units=6, **how)
        look(mode)
    grown["sequence"] = sequence.counters()
    sequence.free()
    look("free")
    look("again nothing")
    return grown


def test_the_drive_counts_what_the_model_counts() -> None:
    """Cumulatively, over times without work: each step's own, whatever was counted before it."""
    found, expected = simulate(counted), model(counted)
    assert found.pop("sequence") == expected.pop("sequence") == {
        "JOBS": 8, "TOKENS": 2 * TINY.group_tokens + 20, "PAGE_PROGRAMS": found["prefill"]["PAGE_PROGRAMS"]}
    names = ("BEATS", "CODEWORDS", "FLASH_WORDS", "PAGE_PROGRAMS", "BLOCK_ERASES", "UNREADABLE")
    for step, grown in found.items():
        assert {name: grown[name] for name in names} == {name: expected[step][name] for name in names}, step
        assert grown["CYCLES"] > 0
    for step in ("nothing", "again nothing"):
        assert not any(found[step][name] for name in names)
    assert found["prefill"]["PAGE_PROGRAMS"] > 0 == found["dense"]["PAGE_PROGRAMS"]
    assert found["dense"]["BEATS"] > found["sparf"]["BEATS"] > 0


# ---------------------------------------------------------------- bit errors

TOKENS = 6 * PAGE + 3


def filled(device: Device, kv_heads: int = 2, seed: int = 1) -> Any:
    """A sequence of some stripes and a tail."""
    sequence = device.create_sequence(kv_heads, capacity_tokens=TOKENS)
    sequence.prefill(normal(TINY, seed, kv_heads, TOKENS), normal(TINY, seed + 1, kv_heads, TOKENS))
    return sequence


def attended(device: Device) -> Any:
    with filled(device) as sequence:
        return observed(sequence.attend(normal(TINY, 3, 4, 1)))


def with_usage(device: Device, times: int = 1) -> list[Any]:
    """Attend some times; results and what the flash counted."""
    with filled(device) as sequence:
        found = []
        for _ in range(times):
            result, usage = measured(device, lambda: sequence.attend(normal(TINY, 3, 4, 1)))
            found.append((observed(result), usage.flash))
        return found


def test_bit_errors_are_corrected() -> None:
    """One bit of 2,000: most codewords are read with errors, a few are read twice, nothing is wrong."""
    found, expected = simulate(with_usage, flash=NandSettings(bit_error_rate=5e-4), times=4), model(attended)
    for result, _ in found:
        assert not differences(result, expected)
    counts = {name: sum(flash[name] for _, flash in found) for name in found[0][1]}
    assert counts["corrected"] > counts["codewords"] / 3
    assert counts["bit_errors"] >= counts["corrected"]
    assert counts["unreadable"] == 0


def test_stuck_columns_are_corrected() -> None:
    faults = NandFaults(stuck_columns=tuple(
        (die, plane, 10 + 300 * i, 0xFF, 0x55) for die in range(2) for plane in range(2) for i in range(2)))
    ((result, flash),) = simulate(with_usage, flash=NandSettings(faults={0: faults}))
    assert not differences(result, model(attended))
    assert flash["corrected"] > 0
    assert flash["unreadable"] == 0


def test_read_retry() -> None:
    """Pages of die 1 can be read at level 2 only: every codeword of it is read three times, nothing is wrong."""
    retry = NandFaults(retry=tuple((1, plane, None, None, 2) for plane in range(PART.planes)))
    ((result, flash),) = simulate(with_usage, flash=NandSettings(faults={0: retry, 1: retry}))
    assert not differences(result, model(attended))
    assert flash["retries"] > 0
    assert flash["retries"] % 2 == 0
    assert flash["unreadable"] == 0


# ---------------------------------------------------------------- what cannot be read


def unreadable(device: Device, channel: int, die: int) -> dict[str, Any]:
    """A sequence with pages on a die that fails, and one without."""
    transport, found = device.transport, {}
    one, other = filled(device), device.create_sequence(1, capacity_tokens=PAGE)
    tail = PAGE - 1   # in device DRAM alone
    other.prefill(normal(TINY, 7, 1, tail), normal(TINY, 8, 1, tail))
    jobs = [*one.plan(normal(TINY, 3, 4, 1)).jobs, *other.plan(normal(TINY, 9, 1, 1)).jobs]
    transport.write_register("STATUS", 0xFFFF_FFFF)
    results = device.run(jobs, check=False)
    found["status"] = [r.completion.status for r in results]
    found["other"] = results[-1].bits
    found["register"] = (StatusBit(transport.read_register("STATUS")), transport.read_register("MEDIA_ERROR"),
                         transport.read_register("MEDIA_CAUSE"))
    try:
        one.attend(normal(TINY, 3, 4, 1))
    except DeviceStatusError as error:
        found["message"] = str(error)
    return found


def only_tail(device: Device) -> Any:
    other = device.create_sequence(1, capacity_tokens=PAGE)
    other.prefill(normal(TINY, 7, 1, PAGE - 1), normal(TINY, 8, 1, PAGE - 1))
    return other.attend(normal(TINY, 9, 1, 1)).bits[0]


def check_unreadable(found: dict[str, Any], cause: MediaCause) -> None:
    assert set(found["status"][:-1]) <= {Status.OK, Status.UNREADABLE_KEY, Status.UNREADABLE_VALUE}
    assert set(found["status"][:-1]) != {Status.OK}
    assert found["status"][-1] is Status.OK
    assert np.array_equal(found["other"], model(only_tail))
    status, place, why = found["register"]
    assert status & StatusBit.MEDIA_ERROR
    assert place >> 24 == 0
    assert page_place(place & 0xFF_FFFF, TINY).die == 1
    assert why >> 16 == cause
    for word in ("UNREADABLE", "channel 0", "die 1", "plane", "block", "page"):
        assert word in found["message"], found["message"]


def test_uncorrectable_pages() -> None:
    """No read-retry level helps: the job says which page, the others go on."""
    lost = NandFaults(retry=tuple((1, plane, None, None, PART.retry_levels + 1) for plane in range(PART.planes)))
    found = simulate(unreadable, flash=NandSettings(faults={0: lost}), channel=0, die=1)
    check_unreadable(found, MediaCause.UNCORRECTABLE)


def dead_die(device: Device) -> dict[str, Any]:
    """A die that stops answering after the prefill."""
    filled(device).free()
    stuck = NandFaults(stuck_busy=((1, 1),))
    one = filled(device)
    device.transport.set_flash(NandSettings(faults={0: stuck}))
    found: dict[str, Any] = {"status": []}
    other = device.create_sequence(1, capacity_tokens=PAGE)
    other.prefill(normal(TINY, 7, 1, PAGE - 1), normal(TINY, 8, 1, PAGE - 1))
    for _ in range(2):   # the second time the die is known to be dead
        device.transport.write_register("STATUS", 0xFFFF_FFFF)
        results = device.run([*one.plan(normal(TINY, 3, 4, 1)).jobs, *other.plan(normal(TINY, 9, 1, 1)).jobs],
                             check=False)
        found["status"] = [r.completion.status for r in results]
        found["other"] = results[-1].bits
        read = device.transport.read_register
        found["register"] = (StatusBit(read("STATUS")), read("MEDIA_ERROR"), read("MEDIA_CAUSE"))
    with pytest.raises(DeviceStatusError) as error:
        one.attend(normal(TINY, 3, 4, 1))
    found["message"] = str(error.value)
    with pytest.raises(DeviceStatusError, match="DIE_TIMEOUT"):   # its blocks there cannot be erased
        one.free()
    other.free()
    return found


def test_a_die_that_stays_busy() -> None:
    check_unreadable(simulate(dead_die), MediaCause.DIE_TIMEOUT)


def reuse(device: Device) -> list[Any]:
    """What a freed sequence leaves: nothing that could be read."""
    sequence = filled(device)
    jobs = sequence.plan(normal(TINY, 3, 4, 1)).jobs
    tables = [job.table.copy() for job in jobs]   # free() makes the sequence's own table useless
    sequence.free()
    old = [FlashOperation(Opcode.ERASE, 0, 0)]
    device.operate(old)
    for job, table in zip(jobs, tables, strict=True):
        job.table[:] = table
    return [r.completion.status for r in device.run(jobs, check=False)]


def test_nothing_of_a_freed_sequence_is_readable() -> None:
    found = simulate(reuse)
    assert set(found) == {Status.UNREADABLE_KEY}
    assert found == model(reuse)


# ---------------------------------------------------------------- programs and erases that fail


def failing(device: Device) -> dict[str, Any]:
    """Sequences come and go while blocks fail; everything that is attended is right."""
    found: dict[str, Any] = {"results": []}
    for _ in range(3):
        with filled(device) as sequence:
            found["results"].append(observed(sequence.attend(normal(TINY, 3, 4, 1))))
    found["bad"] = len(device.bad_blocks)
    return found


FAILURES = {
    "program": NandFaults(program_fails=((0, 1, 0, 1), (1, 0, 0, 0))),
    "grown": NandFaults(grown_bad=((1, 1, 0, 0), (0, 0, 0, 0))),
    "erase": NandFaults(erase_fails=((0, 0, 0), (1, 1, 0))),
}


@pytest.mark.parametrize("name", FAILURES)
def test_blocks_that_fail(name: str) -> None:
    found = simulate(failing, flash=NandSettings(faults={0: FAILURES[name], 1: FAILURES[name]}))
    expected = model(failing)
    assert not differences(found["results"], expected["results"])
    assert found["bad"] > 0
    assert expected["bad"] == 0


def factory(device: Device) -> dict[str, Any]:
    """Bad blocks are found by their marks, and not used."""
    bad = device.scan_bad_blocks()
    with filled(device) as sequence:
        return {"bad": sorted(map(tuple, bad)), "result": observed(sequence.attend(normal(TINY, 3, 4, 1)))}


def test_factory_bad_blocks() -> None:
    """Marked in all of the part's pages or in one of them, at a bit-error rate that the code handles with ease."""
    marks = {0: ((0, 1, 0), (1, 0, 5, 0)), 1: ((1, 1, 1, PART.pages - 1),)}
    settings = NandSettings(
        faults={c: NandFaults(factory_bad=blocks, bit_error_rate=1e-3) for c, blocks in marks.items()})
    found = simulate(factory, flash=settings)
    assert found["bad"] == sorted((c, *block[:3]) for c, blocks in marks.items() for block in blocks)
    assert not differences(found["result"], model(attended))


@pytest.mark.parametrize("rate, wrong", [(1e-3, False), (0.4, True)])
def test_scans_judge_rightly_at_what_the_code_can_bear(rate: float, wrong: bool) -> None:
    """As the bench does it; with errors enough blocks are lost and missed, so that it would be seen."""
    found = simulate(bad_blocks.scan, drives=3, bit_error_rate=rate, seed=1)
    assert (found.blocks, found.marked) == (3 * 64, 3 * 32)
    assert (found.lost > 0, found.missed > 0) == (wrong, wrong)


def power_cut(device: Device, after: int) -> dict[str, Any]:
    """Power fails while pages are programmed: what was acknowledged is there, the rest is not claimed."""
    kept, query = filled(device), normal(TINY, 3, 4, 1)
    device.transport.cut_power(after)
    lost = device.create_sequence(2, capacity_tokens=TOKENS)
    with pytest.raises(DeviceTimeoutError, match="lost its power"):
        lost.prefill(normal(TINY, 11, 2, TOKENS), normal(TINY, 12, 2, TOKENS))
    found: dict[str, Any] = {"flushed": [kept.flushed(), lost.flushed()]}
    device.recover()
    found["lengths"] = [kept.length(), lost.length()]
    found["kept"] = observed(kept.attend(query))
    if lost.length():
        found["lost"] = observed(lost.attend(query))
    return found


def before_the_cut(device: Device, flushed: list[int]) -> dict[str, Any]:
    """The same sequences, only as far as they were acknowledged."""
    found, query = {}, normal(TINY, 3, 4, 1)
    for name, seed, tokens in (("kept", 1, flushed[0]), ("lost", 11, flushed[1])):
        if tokens:
            key, value = (normal(TINY, s, 2, TOKENS)[:, :tokens] for s in (seed, seed + 1))
            with device.create_sequence(2, capacity_tokens=TOKENS) as sequence:
                sequence.prefill(key, value)
                found[name] = observed(sequence.attend(query))
    return found


@pytest.mark.parametrize("after", [3_000, 9_000])
def test_a_power_cut_loses_only_what_was_not_acknowledged(after: int) -> None:
    found = simulate(power_cut, after=after)
    assert found["lengths"] == found["flushed"]
    assert found["flushed"][0] == 6 * PAGE
    assert found["flushed"][1] < 6 * PAGE
    expected = model(before_the_cut, flushed=found["flushed"])
    assert not differences({name: found[name] for name in expected}, expected)
