"""READ in the engine's RTL, against the golden device: equal bytes and completions, beside ATTENDs whose bits stay.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs) and on the golden device.
"""

from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import (
    BLOCKS,
    CASES,
    ODD,
    PAGE,
    RING_STRIPES,
    SHUFFLED,
    WINDOW,
    attend_case,
    check_counters,
    differences,
    model,
    normal,
    observed,
    run_by_hand,
    simulate,
)
from tests.host.golden.queue_host import DOMAIN

import kvattic
from kvattic.driver.device import Device
from kvattic.driver.jobs import ReadJob
from kvattic.errors import DeviceStatusError
from kvattic.spec.commands import COMMAND, READ_COMMAND, Opcode, Status, read_token_bytes
from kvattic.spec.config import TINY
from kvattic.spec.layout import pack_entries
from kvattic.spec.registers import StatusBit
from kvattic_sim.rtl.transport import AxiStalls, Fault, FaultKind, FlashSettings, Stall

TARGET = 0x2000
"""Of READs by hand, behind BLOCKS."""


def patterns(config: Any, seed: int, *shape: int) -> Any:
    """Any bits, NaN and infinity among them."""
    return np.random.default_rng(seed).integers(0, 1 << 16, (*shape, config.head_dim), np.uint16)


def ranges(device: Device, tokens: int, places: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokens in flash and in DRAM, appended in pieces; what is read of them, and what is attended between."""
    config, found = device.config, {}
    key, value = (patterns(config, i, 2, tokens) for i in (1, 2))
    good = normal(config, 3, 2, tokens)
    with device.create_sequence(2, capacity_tokens=tokens) as odd, \
            device.create_sequence(2, capacity_tokens=tokens, isolated=True) as plain:
        for begin, end in ((0, 5), (5, tokens // 2), (tokens // 2, tokens)):
            odd.append(key[:, begin:end], value[:, begin:end])
            plain.append(good[:, begin:end], good[:, begin:end])
        for first, last in places:
            waiting = plain.attend_async(normal(config, 4, 2, 2)), plain.attend_async(normal(config, 5, 4, 1))
            read = odd.read_bits(0, first, last)
            assert (read[0] == key[:, first:last]).all() and (read[1] == value[:, first:last]).all(), (first, last)
            attended = [future.result() for future in waiting]
            for each in attended:
                check_counters(each.completions, config.channels)
            found[f"{first} to {last}"] = [*read, *(observed(each) for each in attended)]
    return found


@pytest.mark.parametrize(("config", "tokens"), [(TINY, 150), (ODD, 90)], ids=["tiny", "odd"])
def test_reads_what_was_written(config: Any, tokens: int) -> None:
    places = [(0, tokens), (1, 2), (tokens - 1, tokens), (7, 71), (tokens - 25, tokens - 3)]
    for stalls in (AxiStalls(), AxiStalls.everywhere(Stall.RANDOM, seed=3)):
        found = simulate(config, ranges, flash=SHUFFLED, stalls=stalls, tokens=tokens, places=places)
        assert not differences(found, model(config, ranges, tokens=tokens, places=places))


def mistakes(device: Device) -> dict[str, Any]:
    """Each mistake in a READ, between two good ones, and what they wrote."""
    config, transport, at, size = device.config, device.transport, BLOCKS, read_token_bytes(device.config.head_dim)
    with device.create_sequence(1, capacity_tokens=40) as sequence:
        sequence.prefill(patterns(config, 1, 1, 40), patterns(config, 2, 1, 40))    # two stripes in flash, and a tail
        table = sequence.states()[0]["table"][0]
        foreign = pack_entries(0, config.part.blocks << config.zone_page_bits, 0, 0)
        tables = {0x40: [table[0], config.channels << 24, table[2]], 0x80: [*table[:2], table[2] | 0x02 << 56],
                  0xC0: [0] * (RING_STRIPES + 1), 0x400: [foreign, *table[1:]], 0: table}
        for offset, entries in tables.items():
            transport.write_memory(at + offset, np.array(entries, "<u8").tobytes())
        good = {"opcode": Opcode.READ, "domain": DOMAIN, "tokens": 40, "table": at, "result": at + TARGET,
                "stripe_pages": 1, "stripes": 3}
        first, limit = WINDOW
        most = (1 << 20) // size
        changes: dict[str, dict[str, int]] = {
            "flags": {"flags": 1}, **{f"reserved {i}": {f"reserved{i}": 1} for i in range(7)},
            "no stripe pages": {"stripe_pages": 0}, "three stripe pages": {"stripe_pages": 3},
            "large stripes": {"stripe_pages": 128}, "no token": {"tokens": 0},
            "too few stripes": {"stripes": 2}, "too many stripes": {"stripes": 4},
            "more than is written": {"tokens": most + 1, "stripes": (most + 1) // PAGE + 1},
            "far token": {"tokens": (1 << 24) - 1},
            "table unaligned": {"table": at + 8}, "table above": {"table": limit},
            "table: channel": {"table": at + 0x40}, "table: reserved": {"table": at + 0x80},
            "table: too many on a channel": {"table": at + 0xC0, "stripes": RING_STRIPES + 1,
                                             "tokens": (RING_STRIPES + 1) * PAGE - 3},
            "table: no zone": {"table": at + 0x400},
            "result unaligned": {"result": at + TARGET + 1}, "result below": {"result": first - 64},
            "result above": {"result": limit - 40 * size + 64}, "result far": {"result": (1 << 64) - 64},
            **{f"domain {domain}": {"domain": domain} for domain in (0, DOMAIN + 1, 0x100 | DOMAIN, 0xFFFF_FFFF)},
            "at the end": {"result": limit - 40 * size}, "one token": {"tokens": 1, "stripes": 1},
            "a token of a codeword": {"tokens": 37},
        }
        right = READ_COMMAND.pack(**good)
        found: dict[str, Any] = {}
        for name, change in changes.items():
            transport.write_memory(at + TARGET, b"\xA5" * (limit - at - TARGET))
            line = READ_COMMAND.pack(**{**good, **change})
            lines = [line] if name in ("one token", "a token of a codeword") else [right, line, right]
            entries, status = run_by_hand(device, lines)
            found[name] = {"entries": entries, "status": status, "memory": np.frombuffer(
                transport.read_memory(at + TARGET, limit - at - TARGET), np.uint8)}
    return found


def test_mistakes() -> None:
    found, expected = simulate(TINY, mistakes, flash=SHUFFLED), model(TINY, mistakes)
    assert not differences(found, expected)
    seen = {name: each["entries"][-1 if len(each["entries"]) == 1 else 1][2] for name, each in expected.items()}
    assert {name for name, status in seen.items() if status is Status.OK} == {
        "at the end", "one token", "a token of a codeword"}
    assert set(seen.values()) == {
        Status.OK, Status.INVALID_FIELD, Status.INVALID_LENGTH, Status.INVALID_ADDRESS, Status.INVALID_TABLE,
        Status.NOT_PERMITTED, Status.NOT_OWNED}
    # Tokens behind the last one are not written.
    for name, tokens in (("one token", 1), ("a token of a codeword", 37)):
        assert (found[name]["memory"][tokens * read_token_bytes(TINY.head_dim) :] == 0xA5).all(), name


def bus_errors(device: Device) -> dict[str, Any]:
    """Tables and targets outside of the memory, beside other READs and ATTENDs whose targets are inside."""
    config, transport, at, size = device.config, device.transport, BLOCKS, read_token_bytes(device.config.head_dim)
    outside = transport.memory_bytes
    found: dict[str, Any] = {}
    with device.create_sequence(1, capacity_tokens=40) as sequence:
        sequence.prefill(normal(config, 1, 1, 40), normal(config, 2, 1, 40))
        query = normal(config, 3, 1, 1)
        job = sequence.plan(query).jobs[0]
        transport.write_memory(at, sequence.states()[0]["table"][0].astype("<u8").tobytes())
        good = {"opcode": Opcode.READ, "domain": DOMAIN, "tokens": 40, "table": at, "result": at + TARGET,
                "stripe_pages": 1, "stripes": 3}
        attend = COMMAND.pack(
            opcode=Opcode.ATTEND, rows=1, stripe_pages=1, stripes=3, end_token=40, tree_token=40, domain=DOMAIN,
            scale=job.scale_bits, query=at + 0x400, result=at + 0x600, table=at)
        transport.write_memory(at + 0x404, (40).to_bytes(4, "little"))
        transport.write_memory(at + 0x440, query.tobytes())
        right = READ_COMMAND.pack(**good)
        window = (WINDOW[0], outside + 0x10000)
        for name, change in (("table", {"table": outside}), ("target", {"result": outside}),
                             ("half a target", {"result": outside - 20 * size}),
                             ("a line", {"result": outside + 64 - 40 * size})):
            line = READ_COMMAND.pack(**{**good, **change})
            transport.write_memory(at + TARGET, bytes(40 * size))
            lines = [right, attend, line, right, attend, line, line, attend, right]
            entries, status = run_by_hand(device, lines, window)
            found[name] = [entries, status, transport.read_memory(at + TARGET, 40 * size)]
            found[f"after {name}"] = observed(sequence.attend(query))
    return found


def test_bus_errors() -> None:
    for stalls in (AxiStalls(), AxiStalls.everywhere(Stall.RANDOM, seed=5)):
        found = simulate(TINY, bus_errors, flash=SHUFFLED, stalls=stalls)
        expected = model(TINY, bus_errors)
        assert not differences(found, expected)
        for name in ("table", "target", "half a target", "a line"):
            assert [entry[2] for entry in expected[name][0]].count(Status.BUS_ERROR) == 3, name


def unreadable(device: Device) -> list[Any]:
    """Pages of K and of V that were never programmed among good ones: a READ says which, and copies the others."""
    config, transport, at, size = device.config, device.transport, BLOCKS, read_token_bytes(device.config.head_dim)
    found = []
    with device.create_sequence(1, capacity_tokens=64) as sequence:
        sequence.prefill(patterns(config, 1, 1, 64), patterns(config, 2, 1, 64))
        table = sequence.states()[0]["table"][0]
        empty = int(table[0]) & 0xFFFFFF | (1 << config.zone_page_bits) - 1     # the last one of the zone
        for lost in ((0,), (1,), (2, 0), (3, 1), ()):
            entries = np.array(table[:4], np.uint64)
            for place in lost:      # its V; and K, too, of the first one
                entries[place] = pack_entries(place % 2, *(
                    (empty, empty) if place == 0 else (int(entries[place]) & 0xFFFFFF, empty)), 0)
            transport.write_memory(at, entries.tobytes())
            line = READ_COMMAND.pack(opcode=Opcode.READ, domain=DOMAIN, tokens=60, table=at, result=at + TARGET,
                                     stripe_pages=1, stripes=4)
            transport.write_memory(at + TARGET, b"\xA5" * 60 * size)
            found.append([*run_by_hand(device, [line]), np.frombuffer(
                transport.read_memory(at + TARGET, 60 * size), np.uint8)])
    return found


def test_what_cannot_be_read_is_named() -> None:
    found, expected = simulate(TINY, unreadable, flash=SHUFFLED), model(TINY, unreadable)
    assert [[entry[2:4] for entry in each[0]] for each in expected] == [
        [[Status.UNREADABLE_KEY, 0]], [[Status.UNREADABLE_VALUE, 16]], [[Status.UNREADABLE_KEY, 0]],
        [[Status.UNREADABLE_VALUE, 16]], [[Status.OK, 0]]]
    # STATUS and MEDIA_ERROR name whichever came first.
    assert not differences([each[::2] for each in found], [each[::2] for each in expected])


def jobs_of(sequence: Any, tokens: int) -> list[ReadJob]:
    """READs of a layer's first tokens, one for each head."""
    return [ReadJob(table=table.copy(), stripe_pages=1, first_page=0, base_token=0, tokens=tokens)
            for table in sequence.states()[0]["table"]]


def cut_off(device: Device, delays: list[int]) -> list[Any]:
    """READs and ATTENDs that a reset cuts off, followed by whole work."""
    transport, found, under_way = device.transport, [], 0
    for delay in delays:
        transport.set_flash(FlashSettings(latency=50, jitter=100, shuffle=True, seed=delay, gap=Stall.RANDOM))
        transport.set_stalls(AxiStalls.everywhere(Stall.RANDOM, seed=delay) if delay % 2 else AxiStalls())
        with device.create_sequence(2, capacity_tokens=100) as sequence:
            sequence.prefill(normal(TINY, delay, 2, 83), normal(TINY, delay + 1, 2, 83))
            jobs = sequence.plan(normal(TINY, delay + 2, 6, 1)).jobs
            reads = jobs_of(sequence, 83)
            waiting = [*device.submit_reads(reads), *device.submit(jobs), *device.submit_reads(reads)]
            transport.run_cycles(delay)
            under_way += bool(transport.read_register("STATUS") & StatusBit.BUSY)
            device.reset()
            for future in waiting:
                with pytest.raises(DeviceStatusError, match="the device was reset"):
                    future.result()
            assert not transport.read_register("STATUS") & ~(StatusBit.READY | StatusBit.STALE_CODEWORD)
            found += [attend_case(device, CASES["gqa"], delay), *sequence.read_bits(0, 1, 83)]
    assert under_way == len(delays)
    return found


def test_reset_in_the_middle_of_work() -> None:
    delays = [1, 20, 60, 151, 200, 301, 400, 551, 700, 901, 1100]
    found, expected = simulate(TINY, cut_off, delays=delays), []
    for delay in delays:
        keys = [normal(TINY, delay + i, 2, 83)[:, 1:] for i in range(2)]
        expected += [model(TINY, attend_case, case=CASES["gqa"], seed=delay), *keys]
    assert not differences(found, expected)


def faults(device: Device, kind: FaultKind, numbers: list[int]) -> list[Any]:
    """A fault at each of some codewords of two READs and two ATTENDs, then all of them without one."""
    config, transport, found = device.config, device.transport, []
    transport.write_register("TIMEOUT", 1500)
    with device.create_sequence(2, capacity_tokens=60) as sequence:
        sequence.prefill(normal(config, 1, 2, 60), normal(config, 2, 2, 60))
        attends, reads = sequence.plan(normal(config, 3, 2, 1)).jobs, jobs_of(sequence, 60)

        def run() -> list[Any]:
            waiting = [*device.submit_reads(reads[:1]), *device.submit(attends, check=False),
                       *device.submit_reads(reads[1:])]
            device.dispatcher.drive_futures(waiting)
            done = [future.result() for future in waiting]
            completions = [each.completion for each in done]
            check_counters(completions, config.channels)
            return [[c.status, c.where >> 16 if c.status else 0] for c in completions], [
                done[0].key, done[0].value, done[1].bits, done[2].bits, done[3].key, done[3].value]

        for number in numbers:
            fault = Fault(kind=kind, number=number, channel=number % config.channels, value=0)
            # The host is slow, so that beats of READs are held up while a job is given up.
            transport.set_stalls(AxiStalls.everywhere(Stall.RANDOM, seed=number))
            transport.set_flash(FlashSettings(latency=30, jitter=60, shuffle=True, seed=number, fault=fault))
            found.append([number % config.channels, *run()])
            transport.run_cycles(6000)
            transport.set_flash(FlashSettings())
            transport.set_stalls(AxiStalls())
            found.append([-1, *run()])
    return found


@pytest.mark.parametrize("kind", [FaultKind.DROP, FaultKind.DUPLICATE])
def test_flash_faults(kind: FaultKind) -> None:
    found = simulate(TINY, faults, kind=kind, numbers=[1, 2, 3, 7, 8, 11, 16, 22, 23])
    _, _, right = found[-1]
    written = [normal(TINY, i, 2, 60) for i in (1, 2)]
    for place, expected in ((0, written[0][0]), (1, written[1][0]), (4, written[0][1]), (5, written[1][1])):
        assert (right[place] == expected).all()
    for channel, statuses, results in found:
        lost = [number for number, (status, _) in enumerate(statuses) if status is not Status.OK]
        if channel < 0 or kind is FaultKind.DUPLICATE:
            assert not lost, (channel, statuses)
        else:
            assert [statuses[number] for number in lost] == [[Status.CODEWORD_TIMEOUT, channel]], statuses
        of_job = [0, 0, 1, 2, 3, 3]
        for number, each, expected in zip(of_job, results, right, strict=True):
            assert number in lost or np.array_equal(each, expected), (channel, statuses)


def speed(device: Device, tokens: int) -> dict[str, int]:
    """Cycles of a dense ATTEND and of READs over the same tokens."""
    config, transport = device.config, device.transport
    with device.create_sequence(1, capacity_tokens=tokens) as sequence:
        sequence.prefill(normal(config, 1, 1, tokens), normal(config, 2, 1, tokens))
        sequence.attend(normal(config, 3, 1, 1))
        jobs, found = jobs_of(sequence, tokens), {}
        for name, work in (("attend", lambda: sequence.attend(normal(config, 3, 1, 1)).completions[0]),
                           ("read", lambda: device.read(jobs)[0].completion)):
            before = transport.read_register("CYCLES")
            found[name] = work().cycle - before
        return found


def test_speed() -> None:
    """A READ takes little more than its words on the host's bus, which all lanes share: one a cycle."""
    tokens = 256
    found = simulate(TINY, speed, tokens=tokens)
    words = tokens * read_token_bytes(TINY.head_dim) // 8
    assert words < found["read"] < 1.45 * words, found


def through_a_drive(target: str) -> tuple[Any, Any]:
    """What `Sequence.read` gives on a whole drive, and what it cost."""
    with kvattic.open(target, TINY) as device, device.create_sequence(2, capacity_tokens=400) as sequence:
        sequence.prefill(patterns(TINY, 1, 2, 400), patterns(TINY, 2, 2, 400))
        before = device.statistics()
        read = sequence.read(0, 9, 390)
        return read, device.statistics() - before


def test_a_whole_drive_gives_the_same_bits_at_the_modelled_cost() -> None:
    (found, cost), (expected, modelled) = through_a_drive("sim:verilator"), through_a_drive("model")
    for name, one, other, written in zip(
            ("key", "value"), found, expected, (patterns(TINY, i, 2, 400) for i in (1, 2)), strict=True):
        assert (one.view(np.uint16) == other.view(np.uint16)).all(), name
        assert (one.view(np.uint16) == written[:, 9:390]).all(), name
    for name in ("flash_bytes", "dram_bytes", "link_bytes", "macs"):
        assert getattr(cost, name) == getattr(modelled, name), name
    assert not cost.modelled and modelled.modelled
    assert cost.cycles == pytest.approx(modelled.cycles, rel=0.15)
