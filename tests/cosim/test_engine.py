"""The engine's RTL behind the unmodified driver, against the golden device: equal bits, whatever the order.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs), and most of them on the
golden device too.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tests.host.golden.queue_host import DOMAIN, Host

from kvattic.driver.device import Device
from kvattic.driver.dispatcher import ADMIN
from kvattic.driver.jobs import FlashOperation
from kvattic.errors import DeviceStatusError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import (
    COMMAND,
    DATA_COMMAND,
    FLASH_COMMAND,
    LINE_BYTES,
    QUEUE_COMMAND,
    Completion,
    CompletionFlag,
    Kind,
    Opcode,
    Status,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import TINY, Config
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import Element
from kvattic.spec.layout import pack_entries
from kvattic.spec.nand import TINY_PART
from kvattic.spec.registers import COUNTERS, StatusBit
from kvattic_sim.rtl.jobs import run_in_simulation
from kvattic_sim.rtl.transport import AxiStalls, Fault, FaultKind, FlashSettings, Stall
from kvattic_sim.simulators.build import icarus_available

PAGE = TINY.tokens_per_page
MEMORY = 1 << 20
TIMEOUT_CYCLES = 200_000
SHUFFLED = FlashSettings(latency=50, jitter=100, shuffle=True)

SIMULATORS = [
    "verilator",
    pytest.param("icarus", marks=pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")),
]


def simulate(config: Config, function: Any, simulator: str = "verilator", **options: Any) -> Any:
    """Run function(device, **arguments) on the RTL; `flash`, `stalls`, `progress` go to the simulation."""
    names = {"flash", "stalls", "progress"}
    settings = {"flash": FlashSettings()} | {key: options.pop(key) for key in names & set(options)}
    return run_in_simulation(
        config,
        function,
        options,
        simulator=simulator,
        memory_bytes=MEMORY,
        timeout_cycles=TIMEOUT_CYCLES,
        timeout_s=3600,
        **settings,
    ).result


def model(config: Config, function: Any, **arguments: Any) -> Any:
    """The same on the golden device."""
    return function(Device(GoldenDevice(config, memory_bytes=MEMORY)), **arguments)


def normal(config: Config, seed: int, *shape: int) -> Any:
    rng = np.random.default_rng(seed)
    return to_bits(rng.standard_normal((*shape, config.head_dim), np.float32), config.element)


def observed(result: Any) -> dict[str, Any]:
    """What must be equal of an AttendResult."""
    return {
        "bits": result.bits.copy(),
        "maximum": result.maximum,
        "denominator": result.denominator,
        "flags": [int(c.flags) for c in result.completions],
        "status": [int(c.status) for c in result.completions],
    }


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Places where two nests of dictionaries, lists and arrays differ."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        return [line for key in expected for line in differences(found[key], expected[key], f"{path} {key}")]
    if isinstance(expected, list | tuple) and any(isinstance(each, dict | list | tuple) for each in expected):
        if len(found) != len(expected):
            return [f"{path}: {len(found)} instead of {len(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (f, e) in pairs for line in differences(f, e, f"{path} {i}")]
    if np.array_equal(found, expected):
        return []
    where = np.argwhere(np.asarray(found) != np.asarray(expected))
    return [f"{path}: {len(where)} differ, first at {where[:1].tolist()}: {found} instead of {expected}"[:600]]


class OwnQueues(Host):
    """Queues beside the driver's, which its queue 0 creates; their rings and blocks lie in the last half of memory.

    Args:
        driver: the device.
        entries: of each ring.
        window: addresses that blocks of the commands may have, first and one past the last.
    """

    RINGS = 0x80000
    NUMBER = 3
    """The queue that is used where one is enough."""

    def __init__(self, driver: Device, *, entries: int = 64, window: tuple[int, int]) -> None:
        super().__init__(driver.transport, rings=self.RINGS, entries=entries, window=window)
        self.driver = driver

    def ok(self, line: bytes) -> None:
        """See `Host`."""
        assert (found := admin(self.driver, line)).status is Status.OK, found

    def wait(self, queue: int, count: int) -> list[Completion]:
        """So many completions of a queue, in their order."""
        transport, found = self.device, []
        mask = transport.read_register("INTERRUPT_MASK")
        transport.write_register("INTERRUPT_MASK", 1 << queue)
        while len(found) < count:
            transport.wait(600)
            found += self.reap(queue)
        transport.write_register("INTERRUPT_MASK", mask)
        assert len(found) == count, found
        return found

    def run(self, queue: int, *lines: bytes) -> list[Completion]:
        """The completions of commands, which get their numbers as identifiers, in the order of the commands."""
        assert len(lines) < self.entries
        self.push(queue, *numbered(lines))
        self.ring(queue)
        found = self.wait(queue, len(lines))
        assert sorted(c.identifier for c in found) == list(range(len(lines)))
        return sorted(found, key=lambda completion: completion.identifier)

    def delete(self, queue: int) -> None:
        """DELETE_QUEUE."""
        self.ok(QUEUE_COMMAND.pack(opcode=Opcode.DELETE_QUEUE, queue=queue))


def admin(device: Device, line: bytes) -> Completion:
    """Run a command in the driver's queue 0."""
    command = device.dispatcher.command(ADMIN, line, lambda completion, _: completion)
    device.dispatcher.submit([command])
    return device.dispatcher.finish(command.future)


def numbered(lines: Any) -> list[bytes]:
    """Commands with their numbers as identifiers."""
    return [line[:2] + number.to_bytes(2, "little") + line[4:] for number, line in enumerate(lines)]


def ended(completions: list[Completion]) -> list[list[int]]:
    """What must be equal of completions."""
    return [[c.queue, c.identifier, c.status, c.where, c.flags] for c in completions]


def check_counters(completions: list[Completion], lanes: int) -> None:
    """Each lane cycle is accounted for, in each completion."""
    for c in completions:
        assert c.beats + c.starved + c.barrier + c.weights + c.scores + c.idle == lanes * c.cycle, c


# ---------------------------------------------------------------- every kind of attention

TREE = [[True, False, True, False], [True, True, False, True], [False, False, False, True]]
CASES: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 3, "q_heads": 3, "tokens": [45]},
    "gqa": {"kv_heads": 2, "q_heads": 6, "tokens": [33]},
    "one token": {"kv_heads": 1, "q_heads": 1, "tokens": [1]},
    "one page": {"kv_heads": 1, "q_heads": 2, "tokens": [PAGE]},
    "one page and a token": {"kv_heads": 2, "q_heads": 2, "tokens": [PAGE + 1]},
    "appended": {"kv_heads": 2, "q_heads": 2, "tokens": [5, 1, 1, PAGE - 7, 3 * PAGE + 2]},
    "causal": {"kv_heads": 2, "q_heads": 2, "tokens": [2 * PAGE + 3], "queries": 5, "causal": True},
    "sliding": {"kv_heads": 1, "q_heads": 2, "tokens": [5 * PAGE + 1], "queries": 2, "causal": True, "window": 19},
    "tree": {"kv_heads": 1, "q_heads": 2, "tokens": [30], "queries": 3, "tree": TREE},
    "tree in a window": {"kv_heads": 1, "q_heads": 1, "tokens": [41], "queries": 3, "tree": TREE, "window": 7},
    "two layers": {"kv_heads": 1, "q_heads": 2, "tokens": [40], "layers": 2},
    "two token ranges": {"kv_heads": 1, "q_heads": 1, "tokens": [TINY.max_tokens + 37]},
    "small scale": {"kv_heads": 1, "q_heads": 2, "tokens": [70], "scale": 1e-6},
    "large scale": {"kv_heads": 1, "q_heads": 2, "tokens": [70], "scale": 3000.0},
    "large common part": {"kv_heads": 1, "q_heads": 2, "tokens": [70], "common": 2.0**17},
}


def biased(config: Config, bits: Any, case: dict[str, Any]) -> Any:
    """q or K whose last four channels make a part of the scores that all have in common, in the log2 domain."""
    if "common" in case:
        bias = (case["common"] * np.log(2) * config.head_dim**0.5 / 4) ** 0.5
        bits[..., -4:] = to_bits(np.array([bias]), config.element)
    return bits


def attend_case(device: Device, case: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Write, attend after each piece and on each layer, and free."""
    config = device.config
    kv_heads, layers = case["kv_heads"], case.get("layers", 1)
    masks = {name: case[name] for name in ("causal", "window", "scale") if name in case}
    if "tree" in case:
        masks["tree"] = np.array(case["tree"])
    found = []
    with device.create_sequence(kv_heads, capacity_tokens=sum(case["tokens"]), layers=layers) as sequence:
        for piece, tokens in enumerate(case["tokens"]):
            for layer in range(layers):
                key, value = (normal(config, seed + 10 * piece + layer + i, kv_heads, tokens) for i in (100, 200))
                sequence.append(biased(config, key, case), value, layer=layer)
        for layer in range(layers):
            query = biased(config, normal(config, seed + 300 + layer, case["q_heads"], case.get("queries", 1)), case)
            result = sequence.attend(query, layer=layer, **masks)
            check_counters(result.completions, config.lanes)
            found.append(observed(result))
    return found


def attend_cases(device: Device, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All cases on one device, so that pages are used again."""
    return {name: attend_case(device, case, seed) for seed, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_equals_golden_device(simulator: str) -> None:
    small = ("one token", "one page and a token", "tree in a window")
    cases = CASES if simulator == "verilator" else {name: CASES[name] for name in small}
    found = simulate(TINY, attend_cases, simulator, cases=cases, flash=SHUFFLED)
    assert not differences(found, model(TINY, attend_cases, cases=cases))


ODD = Config(
    channels=3, rows=3, head_dim=80, sparse=False, element=Element.BF16, beat_bytes=16,
    part=TINY_PART.resized(2048), dies=2, dram_beat_bytes=32, codeword_bytes=512, score_depth=64, jobs_in_flight=2,
)  # 3 tokens and 32 bytes of padding in a codeword


def extremes(device: Device) -> list[dict[str, Any]]:
    """Numbers at the ends of bf16's range, where scores and products leave their windows."""
    config, found = device.config, []
    rng = np.random.default_rng(5)
    for power in (-126, -60, 0, 30, 60, 127):
        key, value = rng.standard_normal((2, 1, 50, config.head_dim)) * 2.0**power / 4
        query = rng.standard_normal((3, 1, config.head_dim))
        with device.create_sequence(1, capacity_tokens=50) as sequence:
            sequence.prefill(key, value)
            # `attend` would refuse them.
            for result in device.run(sequence.plan(query).jobs):
                found.append({
                    "bits": result.bits.copy(), "maximum": result.maximum, "denominator": result.denominator,
                    "flags": [int(result.completion.flags)]})
    return found


def test_odd_geometry_and_bf16() -> None:
    arguments = {"cases": {name: CASES[name] for name in (
        "mha", "appended", "sliding", "tree", "two token ranges", "large common part")}}
    found = simulate(ODD, attend_cases, flash=SHUFFLED, **arguments)
    assert not differences(found, model(ODD, attend_cases, **arguments))
    found, expected = simulate(ODD, extremes, flash=SHUFFLED), model(ODD, extremes)
    assert not differences(found, expected)
    assert {flag for result in expected for flag in result["flags"]} > {0}, "no window was left"


@pytest.mark.parametrize(("channels", "lane_channels"), [(1, 1), (8, 1), (4, 2), (4, 4), (8, 4)])
def test_neither_channels_nor_lanes_change_a_bit(channels: int, lane_channels: int) -> None:
    cases = {"gqa": CASES["gqa"], "appended": CASES["appended"]}
    config = replace(TINY, channels=channels, lane_channels=lane_channels, beat_bytes=8 * lane_channels,
                     dram_beat_bytes=max(16, 8 * lane_channels))
    found = simulate(config, attend_cases, cases=cases, flash=SHUFFLED)
    assert not differences(found, model(TINY, attend_cases, cases=cases))


# ---------------------------------------------------------------- stalls and orders

FLASH_STALLS = ("codeword", "request")
AXI_STALLS = tuple(field.name for field in fields(AxiStalls) if field.name != "seed")


def stall_matrix(device: Device, stall: Stall) -> dict[str, Any]:
    """The same attention with a stall on each channel in turn, then on all at once."""
    transport, found = device.transport, {}
    for seed, name in enumerate(("none", *AXI_STALLS, *FLASH_STALLS, "all")):
        flash = FlashSettings(latency=50)
        if name in ("codeword", "all"):
            flash = replace(flash, gap=stall)
        if name in ("request", "all"):
            flash = replace(flash, request_stall=stall)
        transport.set_flash(flash)
        one = AxiStalls(seed=seed) if name not in AXI_STALLS else AxiStalls(**{name: stall}, seed=seed)
        transport.set_stalls(AxiStalls.everywhere(stall, seed=seed) if name == "all" else one)
        begin = transport.cycles
        found[name] = {"results": attend_case(device, CASES["gqa"]), "cycles": transport.cycles - begin}
    return found


@pytest.mark.parametrize("stall", [Stall.PATTERN, Stall.RANDOM])
def test_stalls_change_no_bit(stall: Stall) -> None:
    found = simulate(TINY, stall_matrix, stall=stall)
    expected = model(TINY, attend_case, case=CASES["gqa"])
    assert not differences({name: each["results"] for name, each in found.items()}, dict.fromkeys(found, expected))
    for name in ("memory_w", "memory_r", "codeword", "all"):  # the others hide behind what goes on meanwhile
        assert found[name]["cycles"] > found["none"]["cycles"], f"{name}: nothing was stalled"


def orders(device: Device, seeds: list[int]) -> tuple[list[dict[str, Any]], set[int]]:
    """The same attention with codewords coming in other orders; the results and the cycles that it took."""
    config, found, cycles = device.config, [], set()
    rng = np.random.default_rng(1)
    with device.create_sequence(2, capacity_tokens=100) as sequence:
        sequence.prefill(normal(config, 1, 2, 83), normal(config, 2, 2, 83))
        plan = sequence.plan(normal(config, 3, 4, 1))
        for seed in seeds:
            device.transport.set_flash(
                FlashSettings(
                    latency=int(rng.integers(0, 200)),
                    jitter=int(rng.integers(0, 800)),
                    shuffle=bool(rng.integers(4)),
                    gap=Stall.RANDOM,
                    stall_probability=int(rng.integers(0, 100)),
                    seed=seed + 1,
                )
            )
            result = device.attend_many([plan])[0]
            check_counters(result.completions, config.lanes)
            cycles.add(result.completions[-1].cycle)
            found.append(observed(result))
            if len(found) > 1 and not differences(found[-1], found[0]):
                found.pop()
    return found, cycles


@pytest.mark.campaign
def test_order_changes_no_bit(campaign: Callable[[int, int], int]) -> None:
    count = campaign(120, 16)
    found, cycles = simulate(TINY, orders, seeds=list(range(count)))
    assert len(found) == 1, differences(found[1], found[0])
    assert len(cycles) > count // 2, "the orders were hardly different"
    golden = model(TINY, attend_plain)
    assert not differences(found[0], golden)


def attend_plain(device: Device) -> dict[str, Any]:
    """What `orders` computes."""
    config = device.config
    with device.create_sequence(2, capacity_tokens=100) as sequence:
        sequence.prefill(normal(config, 1, 2, 83), normal(config, 2, 2, 83))
        return observed(sequence.attend(normal(config, 3, 4, 1)))


# ---------------------------------------------------------------- reset


def resets(device: Device, delays: list[int]) -> dict[str, Any]:
    """Work in all queues that a reset cuts off after some cycles, followed by whole work."""
    transport, found = device.transport, {}
    assert device.config == TINY
    under_way = 0
    for delay in delays:
        transport.set_flash(replace(SHUFFLED, seed=delay, gap=Stall.RANDOM))
        transport.set_stalls(AxiStalls.everywhere(Stall.RANDOM, seed=delay) if delay % 2 else AxiStalls())
        with device.create_sequence(2, capacity_tokens=100) as sequence:
            sequence.prefill(normal(TINY, delay, 2, 83), normal(TINY, delay + 1, 2, 83))
            plan = sequence.plan(normal(TINY, delay + 2, 6, 1))
            waiting = [
                *device.submit(plan.jobs * 3),
                # Pages that the sequence does not have, in its zone: they fail, or are never begun.
                *device.submit_operations([FlashOperation(Opcode.PROGRAM, c, 0, 0, domain=DOMAIN) for c in (0, 1, 0)]),
                *device.submit_operations([FlashOperation(Opcode.PROBE, c, 4) for c in (0, 1)])]
            transport.run_cycles(delay)
            begun = StatusBit(transport.read_register("STATUS")) & StatusBit.BUSY
            under_way += bool(begun)
            device.reset()
            for future in waiting:
                assert future.done()
                with pytest.raises(DeviceStatusError, match="the device was reset"):
                    future.result()
            # Codewords that were under way at the reset are dropped.
            assert not transport.read_register("STATUS") & ~(StatusBit.READY | StatusBit.STALE_CODEWORD)
            assert transport.read_register("FETCHED") == transport.read_register("COMPLETED")
            found[str(delay)] = attend_case(device, CASES["gqa"], delay)
            status = StatusBit(transport.read_register("STATUS"))
            assert not status & ~(StatusBit.READY | StatusBit.STALE_CODEWORD), status
    assert under_way == len(delays)
    return found


def test_reset_in_the_middle_of_work() -> None:
    delays = [1, 20, 60, 100, 151, 200, 301, 400, 551, 700, 901, 1100]
    found = simulate(TINY, resets, delays=delays)
    expected = {str(delay): model(TINY, attend_case, case=CASES["gqa"], seed=delay) for delay in delays}
    assert not differences(found, expected)


# ---------------------------------------------------------------- errors

NAN = 0x7E00
RING_STRIPES = TINY.ring_codewords // TINY.codewords_per_page
"""Stripes of a job that one channel's score buffer holds."""


WINDOW = (0xC8000, 0xD0000)
"""Where blocks of commands by hand may lie."""
BLOCKS = WINDOW[0]


def run_by_hand(device: Device, lines: list[bytes], window: tuple[int, int] = WINDOW,
                **changes: int) -> tuple[list[list[int]], int]:
    """Run commands in a new queue; what ends them, in their order, and STATUS.

    Args:
        device: where.
        lines: the commands.
        window: of the queue.
        changes: of the fields of CREATE_QUEUE.
    """
    queues = OwnQueues(device, window=window)
    queues.create(queues.NUMBER, **changes)
    device.transport.write_register("STATUS", 0xFFFF_FFFF)
    found = queues.run(queues.NUMBER, *lines)
    status = device.transport.read_register("STATUS")
    queues.delete(queues.NUMBER)
    check_counters(found, device.config.lanes)
    return ended(found), status & ~StatusBit.BUSY


def bad_commands(device: Device) -> dict[str, Any]:
    """Each mistake in a command, between two good ones."""
    config, transport = device.config, device.transport
    sequence = device.create_sequence(1, capacity_tokens=40)
    sequence.prefill(normal(config, 1, 1, 40), normal(config, 2, 1, 40))   # two stripes in flash, and a tail
    job = sequence.plan(normal(config, 3, 1, 1)).jobs[0]
    row = query_row_bytes(config.head_dim)
    query = np.zeros((2, row), np.uint8)
    query[:, 4:8] = np.array([40], "<u4").view(np.uint8)
    query[0, LINE_BYTES : LINE_BYTES + 2 * config.head_dim] = job.query.view(np.uint8)[0]
    at = BLOCKS
    transport.write_memory(at, query.tobytes())
    query[1, LINE_BYTES + 2 * 5 : LINE_BYTES + 2 * 6] = np.array([NAN], "<u2").view(np.uint8)
    query[1, LINE_BYTES + 2 * 7 : LINE_BYTES + 2 * 8] = np.array([NAN], "<u2").view(np.uint8)
    transport.write_memory(at + 0x1000, query.tobytes())
    full = [0 for _ in range(RING_STRIPES + 1)]     # entries on channel 0
    foreign = pack_entries(0, config.part.blocks << config.zone_page_bits, 0, 0)
    tables = {0x4000: job.table, 0x4040: [job.table[0], config.channels << 24, job.table[2]],
              0x4080: [*job.table[:2], job.table[2] | 0x02 << 56], 0x40C0: full, 0x4400: [foreign, *job.table[1:]]}
    for address, entries in tables.items():
        transport.write_memory(at + address, np.array(entries, "<u8").tobytes())
    good = {
        "opcode": Opcode.ATTEND, "rows": 1, "stripe_pages": 1, "stripes": 3, "base_token": 0, "end_token": 40,
        "tree_token": 40, "scale": job.scale_bits, "query": at, "result": at + 0x2000, "table": at + 0x4000,
        "domain": DOMAIN,
    }
    first, limit = WINDOW
    mistakes: dict[str, dict[str, int]] = {
        "opcode": {"opcode": 0x80},
        "mode": {"mode": 4},
        "reserved0": {"reserved0": 1 << 7},
        **{f"dense with {name}": {name: 1} for name in ("features", "local_tokens", "top_units", "sinks", "unit_bits")},
        "flags": {"flags": 1},
        "no stripe pages": {"stripe_pages": 0},
        "three stripe pages": {"stripe_pages": 3},
        "large stripes": {"stripe_pages": 128},
        "no rows": {"rows": 0},
        "too many rows": {"rows": config.rows + 1},
        "no token": {"end_token": 0},
        "end below base": {"base_token": 2 * config.tokens_per_page, "end_token": config.tokens_per_page},
        "too many tokens": {"end_token": config.max_tokens + 1, "stripes": config.max_tokens // PAGE + 1},
        "too few stripes": {"stripes": 2},
        "too many stripes": {"stripes": 4},
        "far token": {"base_token": (1 << 24) - 41, "end_token": (1 << 24) - 1},
        "table unaligned": {"table": at + 0x4008},
        "table above": {"table": limit},
        "table: channel": {"table": at + 0x4040},
        "table: reserved": {"table": at + 0x4080},
        "table: too many on a channel": {"table": at + 0x40C0, "stripes": RING_STRIPES + 1,
                                         "end_token": (RING_STRIPES + 1) * PAGE},
        "table: no zone": {"table": at + 0x4400},
        "query unaligned": {"query": at + 0x20},
        "query below": {"query": first - 64},
        "query above": {"query": limit - row + 64},
        "query far": {"query": (1 << 64) - 64},
        "result unaligned": {"result": at + 0x2001},
        "result below": {"result": first - 64},
        "result above": {"result": limit - result_row_bytes(config.head_dim) + 64},
        "scale zero": {"scale": 0},
        "scale subnormal": {"scale": 0x007F_FFFF},
        "scale infinite": {"scale": 0x7F80_0000},
        "scale negative": {"scale": 0xBF80_0000},
        **{f"domain {domain}": {"domain": domain} for domain in (0, DOMAIN + 1, 0x100 | DOMAIN, 0xFFFF_FFFF)},
        "nan in q": {"rows": 2, "query": at + 0x1000},
        "all wrong": {"opcode": 1, "mode": 4, "rows": 0, "end_token": 0, "query": 1, "scale": 0, "table": 1},
    }
    lines = {name: COMMAND.pack(**{**good, **change}) for name, change in mistakes.items()}
    for name, opcode, change in (
        ("channel", Opcode.PROGRAM, {"channel": config.channels}),
        ("page", Opcode.ERASE, {"page": config.pages_per_channel}),
        ("far page", Opcode.PROGRAM, {"page": (1 << 24) - 1}),
        ("argument", Opcode.ERASE, {"argument": 1}),
        ("flags", Opcode.ERASE, {"flags": 1}),
        ("domain", Opcode.ERASE, {"domain": DOMAIN + 1}),
        ("no domain", Opcode.PROGRAM, {"domain": 0}),
        ("far argument", Opcode.PROGRAM, {"argument": (1 << 24) - 1}),
        ("queue", Opcode.PROBE, {"domain": 0}),
        ("queue and domain", Opcode.MAP, {}),
        *((f"reserved {i}", Opcode.ERASE, {f"reserved{i}": 1}) for i in range(7)),
    ):
        lines[f"flash: {name}"] = FLASH_COMMAND.pack(**{"opcode": opcode, "domain": DOMAIN, **change})
    for name, change in (("unaligned", {"result": at + 32}), ("below", {"result": first - 64}),
                         ("above", {"result": limit}), ("reserved", {"reserved3": 1}),
                         ("identify", {"opcode": Opcode.IDENTIFY})):
        lines[f"counters: {name}"] = DATA_COMMAND.pack(**{"opcode": Opcode.COUNTERS, "result": at, **change})
    for opcode in (Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE, Opcode.GRANT):
        lines[opcode.name] = QUEUE_COMMAND.pack(opcode=opcode, queue=1)
    right = COMMAND.pack(**good)
    found: dict[str, Any] = {}
    for name, line in lines.items():
        transport.write_memory(at + 0x2000, bytes(0x1000))
        entries, status = run_by_hand(device, [right, line, right])
        found[name] = {"entries": entries, "status": status,
                       "result": np.frombuffer(transport.read_memory(at + 0x2000, 0x1000), np.uint8)}
    everything = [*lines.values()]
    found["all at once"] = {"entries": [
        entry for begin in (0, 60) for entry in run_by_hand(device, everything[begin : begin + 60])[0]]}
    # The same of queue 0, whose commands the driver has set up.
    found["queue 0"] = {"entries": [
        [c.queue, c.status, c.where, c.flags] for c in (admin(device, line) for line in (
            FLASH_COMMAND.pack(opcode=Opcode.PROBE, channel=config.channels),
            FLASH_COMMAND.pack(opcode=Opcode.MAP, argument=config.part.blocks),
            FLASH_COMMAND.pack(opcode=Opcode.PROBE, argument=1),
            FLASH_COMMAND.pack(opcode=Opcode.PROBE, domain=DOMAIN),
            FLASH_COMMAND.pack(opcode=Opcode.ERASE, domain=DOMAIN),
            FLASH_COMMAND.pack(opcode=Opcode.PROBE)))]}
    sequence.free()
    return found


@pytest.mark.parametrize("simulator", SIMULATORS[:1])
def test_mistakes_in_commands(simulator: str) -> None:
    found, expected = simulate(TINY, bad_commands, simulator, flash=SHUFFLED), model(TINY, bad_commands)
    assert not differences(found, expected)
    seen = {entry[2] for name, each in expected.items() if name != "queue 0" for entry in each["entries"]}
    assert seen == {
        Status.OK, Status.INVALID_OPCODE, Status.INVALID_FIELD, Status.INVALID_ROWS, Status.INVALID_LENGTH,
        Status.INVALID_ADDRESS, Status.INVALID_SCALE, Status.NAN_QUERY, Status.INVALID_TABLE, Status.INVALID_PLACE,
        Status.NOT_PERMITTED, Status.NOT_OWNED,
    }


def special_tokens(device: Device) -> list[dict[str, Any]]:
    """NaN and infinity in K, in V, in both, in and out of what a row attends; each followed by a good job."""
    config, found = device.config, []
    infinity = 0xFC00
    places: list[list[tuple[Kind, int, int, int]]] = [
        [(Kind.KEY, 0, 0, NAN)],
        [(Kind.KEY, 50, 31, infinity), (Kind.KEY, 49, 3, NAN)],
        [(Kind.VALUE, 59, 7, NAN), (Kind.VALUE, 31, 7, infinity)],
        [(Kind.KEY, 40, 1, NAN), (Kind.VALUE, 2, 1, NAN)],
    ]
    for specials in places:
        tokens = [normal(config, i, 2, 60) for i in (1, 2)]
        for kind, token, channel, bits in specials:
            tokens[kind][0, token, channel] = bits
        with device.create_sequence(2, capacity_tokens=60) as sequence:
            sequence.prefill(*tokens)
            jobs = sequence.plan(normal(config, 3, 2, 1)).jobs
            narrow = [replace(job, start=job.start + 20, end=job.end - 15) for job in jobs]
            for index, result in enumerate(device.run([*jobs, *narrow], check=False)):
                c = result.completion
                found.append({"completion": [c.status, c.identifier, c.flags, c.where]})
                if c.status is Status.OK:
                    found[-1] |= {"bits": result.bits, "index": index, "maximum": result.maximum}
    return found


def test_special_numbers_in_flash() -> None:
    found, expected = simulate(TINY, special_tokens, flash=SHUFFLED), model(TINY, special_tokens)
    assert not differences(found, expected)
    assert {each["completion"][0] for each in expected} == {Status.OK, Status.NAN_KEY, Status.NAN_VALUE}


def bus_errors(device: Device) -> dict[str, Any]:
    """Commands, queries, results, counters and completions outside of the memory, each followed by good work."""
    config, transport, at = device.config, device.transport, BLOCKS
    outside = transport.memory_bytes
    found: dict[str, Any] = {}
    with device.create_sequence(1, capacity_tokens=40) as sequence:
        sequence.prefill(normal(config, 1, 1, 40), normal(config, 2, 1, 40))
        query = normal(config, 3, 1, 1)
        job = sequence.plan(query).jobs[0]
        good = {
            "opcode": Opcode.ATTEND, "rows": 1, "stripe_pages": 1, "stripes": 3, "end_token": 40, "tree_token": 40,
            "scale": job.scale_bits, "query": at, "result": at + 0x2000, "table": at + 0x4000, "domain": DOMAIN,
        }
        transport.write_memory(at + 0x4000, job.table.astype("<u8").tobytes())
        window = (WINDOW[0], outside + 0x10000)
        count = {"opcode": Opcode.COUNTERS}
        for name, line in (
            ("query", COMMAND.pack(**{**good, "query": outside})),
            ("half a query", COMMAND.pack(**{**good, "query": outside - LINE_BYTES})),
            ("table", COMMAND.pack(**{**good, "table": outside})),
            ("result", COMMAND.pack(**{**good, "result": outside})),
            ("half a result", COMMAND.pack(**{**good, "result": outside - LINE_BYTES})),
            ("counters", DATA_COMMAND.pack(**count, result=outside)),
            ("half of the counters", DATA_COMMAND.pack(**count, result=outside - 2 * LINE_BYTES)),
        ):
            found[name] = run_by_hand(device, [line], window)
            found[f"after {name}"] = observed(sequence.attend(query))
        queues = OwnQueues(device, entries=4, window=window)
        for name, change in (("command", {"submission": outside - LINE_BYTES}),
                             ("completion", {"completion": outside})):
            # Entry 0 of the first one's commands can be read, of 1 and 2 nobody knows who they are.
            queues.create(3, **change)
            transport.write_register("STATUS", 0xFFFF_FFFF)
            transport.write_memory(outside - LINE_BYTES, DATA_COMMAND.pack(**count, identifier=5, result=at))
            before = transport.read_register("COMPLETED")
            queues.push(3, *[DATA_COMMAND.pack(**count, result=at)] * 3)
            queues.ring(3)
            for _ in range(1000):
                if not transport.read_register("STATUS") & StatusBit.BUSY:
                    break
            found[name] = [sorted(ended(queues.reap(3, take=False))), transport.read_register("STATUS"),
                           transport.read_register("COMPLETED") - before, transport.read_register("INTERRUPTS")]
            transport.write_register("COMPLETION_HEAD_3", 3)
            found[f"{name} taken"] = [transport.read_register("STATUS"), transport.read_register("INTERRUPTS")]
            queues.delete(3)
            found[f"after {name}"] = observed(sequence.attend(query))
    return found


def test_bus_errors() -> None:
    found, expected = simulate(TINY, bus_errors, flash=SHUFFLED), model(TINY, bus_errors)
    assert not differences(found, expected)
    broken = StatusBit.READY | StatusBit.BUS_ERROR
    for name in ("query", "half a query", "table", "result", "half a result", "counters", "half of the counters"):
        assert expected[name] == ([[3, 0, Status.BUS_ERROR, 0, 0]], broken), name
    lost = [3, 0xFFFF, Status.BUS_ERROR, 0, 0]
    assert expected["command"] == [[[3, 5, Status.OK, 0, 0], lost, lost], broken, 3, 1 << 3]
    assert expected["completion"] == [[], broken, 3, 1 << 3]
    assert expected["command taken"] == expected["completion taken"] == [broken, 0]


def doorbells(device: Device) -> dict[str, Any]:
    """Doorbells that must be refused, while the queues work and while they do not."""
    config, transport = device.config, device.transport
    refused = StatusBit.INVALID_DOORBELL
    found: dict[str, Any] = {}
    original = transport.write_register

    def ring(name: str, value: int) -> tuple[int, ...]:
        original("STATUS", refused)
        original(name, value)
        status = transport.read_register("STATUS") & refused
        return (status, transport.read_register("DOORBELL_ERROR"))

    with device.create_sequence(2, capacity_tokens=83) as sequence:
        sequence.prefill(normal(config, 1, 2, 83), normal(config, 2, 2, 83))
        plan = sequence.plan(normal(config, 3, 4, 1))
        device.run(plan.jobs)
        busy = []

        def more(name: str, value: int) -> None:
            original(name, value)
            if name == "SUBMISSION_TAIL_1" and not busy:
                busy.append(transport.read_register("STATUS") & StatusBit.BUSY)
                if busy[0]:    # most of them are not fetched
                    assert ring(name, value - 1) == (refused, 1 << 24 | value - 1)
                for other in (device.dispatcher._queues[1].entries, 0xFFFF_FFFF):
                    found[f"tail {other}"] = ring(name, other)
                found["no such queue"] = ring("SUBMISSION_TAIL_5", 1)
                found["nothing of it to take"] = ring("COMPLETION_HEAD_5", 0)
                found["not so many to take"] = ring("COMPLETION_HEAD_1", value + 1)
                found["no such entry"] = ring("COMPLETION_HEAD_1", 1 << 12)
                found["none is new"] = ring(name, value)
                found["the first stays"] = [ring("SUBMISSION_TAIL_6", 4), original("SUBMISSION_TAIL_7", 5),
                                            transport.read_register("DOORBELL_ERROR")]
                original("STATUS", refused)
                busy.append(transport.read_register("STATUS") & StatusBit.BUSY)

        transport.write_register = more
        results = [observed(each) for each in device.attend_many([plan] * 6)]
        transport.write_register = original
        found["result"] = results[0]
        assert not differences(results[1:], results[:1] * 5)
        found["busy"] = busy
        found["after"] = transport.read_register("STATUS") & ~StatusBit.BUSY
    queues, line = OwnQueues(device, entries=8, window=WINDOW), DATA_COMMAND.pack(opcode=Opcode.COUNTERS, result=BLOCKS)
    queues.create(3)
    queues.create(4)
    queues.run(3, line)
    # Now 3 has seven completions and commands 0 and 1 that are not fetched, 4 has three.
    queues.push(3, *[line] * 7)
    queues.ring(3)
    while transport.read_register("STATUS") & StatusBit.BUSY:
        pass
    queues.push(3, line, line)
    queues.ring(3)
    queues.push(4, *[line] * 3)
    queues.ring(4)
    while transport.read_register("STATUS") & StatusBit.BUSY:
        pass
    fetched = transport.read_register("FETCHED")
    found["idle"] = [ring(*each) for each in (
        ("SUBMISSION_TAIL_5", 0), ("COMPLETION_HEAD_7", 1), ("SUBMISSION_TAIL_3", 8),
        ("SUBMISSION_TAIL_3", 0x1234_0004), ("SUBMISSION_TAIL_3", 0xFFFF_FFFF), ("COMPLETION_HEAD_3", 8),
        ("COMPLETION_HEAD_3", 0x8000_0000), ("SUBMISSION_TAIL_3", 1), ("SUBMISSION_TAIL_3", 0),
        ("COMPLETION_HEAD_4", 4), ("COMPLETION_HEAD_4", 7), ("COMPLETION_HEAD_3", 1), ("SUBMISSION_TAIL_3", 2))]
    found["fetched"] = transport.read_register("FETCHED") - fetched
    # How far the device had fetched when it completed one is its own affair.
    heads = [completion.head for completion in (*queues.reap(3), *queues.wait(3, 2))]
    found["completed"] = [len(heads), heads[-1], len(queues.reap(4))]
    queues.delete(3)
    queues.delete(4)
    return found


def two_heads(device: Device) -> dict[str, Any]:
    config = device.config
    with device.create_sequence(2, capacity_tokens=83) as sequence:
        sequence.prefill(normal(config, 1, 2, 83), normal(config, 2, 2, 83))
        return observed(sequence.attend(normal(config, 3, 4, 1)))


def test_refused_doorbells() -> None:
    found, expected = simulate(TINY, doorbells), model(TINY, doorbells)
    assert found.pop("busy") == [StatusBit.BUSY] * 2
    expected.pop("busy")
    assert not differences(found.pop("result"), model(TINY, two_heads))
    expected.pop("result")
    assert not differences(found, expected)
    assert found["after"] == StatusBit.READY


# ---------------------------------------------------------------- what the flash side does wrong


def faults(device: Device, kind: FaultKind, values: list[int], numbers: list[int]) -> list[dict[str, Any]]:
    """A fault at each of some codewords of a batch of four jobs, then a whole batch."""
    config, transport, found = device.config, device.transport, []
    transport.write_register("TIMEOUT", 1500)
    with device.create_sequence(4, capacity_tokens=60) as sequence:
        sequence.prefill(normal(config, 1, 4, 60), normal(config, 2, 4, 60))
        jobs = sequence.plan(normal(config, 3, 4, 1)).jobs
        for value in values:
            for number in numbers:
                channel = number % config.channels
                fault = Fault(kind=kind, number=number, channel=channel, value=value)
                transport.set_flash(FlashSettings(latency=30, jitter=60, shuffle=True, seed=number, fault=fault))
                transport.write_register("STATUS", 0xFFFF_FFFF)
                before = {name: transport.read_register(name) for name in ("DUPLICATES", "STALES")}
                results = device.run(jobs, check=False)
                check_counters([result.completion for result in results], config.lanes)
                transport.run_cycles(6000)
                seen = {
                    "number": number,
                    "channel": channel,
                    "completions": [result.completion for result in results],
                    "bits": [result.bits for result in results],
                    "status": StatusBit(transport.read_register("STATUS")),
                    "duplicates": transport.read_register("DUPLICATES") - before["DUPLICATES"],
                    "stales": transport.read_register("STALES") - before["STALES"],
                    "tag_error": transport.read_register("TAG_ERROR"),
                }
                transport.set_flash(FlashSettings())
                seen["after"] = [result.bits for result in device.run(jobs)]
                found.append(seen)
    return found


def faultless(device: Device) -> list[Any]:
    config = device.config
    with device.create_sequence(4, capacity_tokens=60) as sequence:
        sequence.prefill(normal(config, 1, 4, 60), normal(config, 2, 4, 60))
        return [result.bits for result in device.run(sequence.plan(normal(config, 3, 4, 1)).jobs)]


CODEWORDS = 2 * 4 * (60 // PAGE * PAGE // TINY.tokens_per_codeword) // TINY.channels
"""Of each channel; the tails come from device DRAM."""
NUMBERS = [1, 2, 3, 7, 8, 11, 16, 22, 29, CODEWORDS - 1]


def check_lost(seen: dict[str, Any], expected: list[Any]) -> None:
    """One job timed out, for the right codeword; all others are right."""
    lost = [c for c in seen["completions"] if c.status is not Status.OK]
    assert [c.status for c in lost] == [Status.CODEWORD_TIMEOUT], seen
    assert lost[0].where >> 16 == seen["channel"], seen
    assert lost[0].where & 0x7FFF == 1, seen
    for completion, bits, right in zip(seen["completions"], seen["bits"], expected, strict=True):
        assert completion.status is not Status.OK or np.array_equal(bits, right), seen


@pytest.mark.parametrize("kind", list(FaultKind))
def test_flash_faults(kind: FaultKind) -> None:
    place_bits = (TINY.ring_codewords - 1).bit_length()
    values = {
        FaultKind.CORRUPT: [1 << place_bits - 1],  # a place that no job of this size has
        FaultKind.DELAY: [4000],
        FaultKind.DUPLICATE: [0, 300],
    }.get(kind, [0])
    found = simulate(TINY, faults, kind=kind, values=values, numbers=NUMBERS)
    expected = model(TINY, faultless)
    assert len(found) == len(NUMBERS) * len(values)
    for seen in found:
        assert not differences(seen["after"], expected), seen
        assert bool(seen["status"] & StatusBit.STALE_CODEWORD) == (seen["stales"] > 0), seen
        match kind:
            case FaultKind.DROP:
                check_lost(seen, expected)
                assert not seen["status"] & StatusBit.BAD_TAG, seen
                assert seen["duplicates"] == 0, seen
            case FaultKind.DELAY:
                check_lost(seen, expected)
                assert not seen["status"] & StatusBit.BAD_TAG, seen
                assert seen["duplicates"] == 0, seen
                assert seen["stales"] >= 1, seen  # V codewords of the job that was given up count, too
            case FaultKind.CORRUPT:
                check_lost(seen, expected)
                assert seen["status"] & StatusBit.BAD_TAG, seen
                assert seen["tag_error"] >> 24 == seen["channel"], seen
            case FaultKind.DUPLICATE:
                assert not differences(seen["bits"], expected), seen
                # The second one may also come when its job has ended.
                assert seen["duplicates"] + seen["stales"] == 1, seen
                flags = sorted(c.flags for c in seen["completions"])
                assert flags in ([0, 0, 0, CompletionFlag.DUPLICATE * seen["duplicates"]], [0, 0, 0, 0]), seen


def counters(device: Device) -> dict[str, Any]:
    """The counters before and after writing and attending, by the command COUNTERS; then the registers, idle."""
    config, transport = device.config, device.transport
    with device.create_sequence(2, capacity_tokens=83) as sequence:
        found: dict[str, Any] = {"begin": device.counters()}
        sequence.prefill(normal(config, 1, 2, 83), normal(config, 2, 2, 83))
        found |= {"written": device.counters(), "sequence": sequence.counters()}
        found["completions"] = sequence.attend(normal(config, 3, 4, 1)).completions
        found |= {"attended": device.counters(), "later": device.counters()}
        while transport.read_register("STATUS") & StatusBit.BUSY:
            pass
        return found | {"idle": {register.name: transport.read_register(register.name) for register in COUNTERS}}


def test_counters_go_on_and_add_up() -> None:
    found = simulate(TINY, counters)
    check_counters(found["completions"], TINY.lanes)
    last, idle = found["completions"][-1], found["idle"]
    looks = ("begin", "written", "attended", "later", "idle")
    for before, after in pairwise(found[name] for name in looks):
        assert list(before) == [register.name for register in COUNTERS]
        assert all(before[name] <= after[name] for name in before if name != "FIRST_BEAT")
        assert before["CYCLES"] < after["CYCLES"]    # COUNTERS, too, takes time
    stalls = ("STARVED", "BARRIER", "WEIGHTS", "SCORES", "IDLE")
    assert sum(idle[name] for name in ("BEATS", *stalls)) == TINY.channels * idle["CYCLES"]
    assert found["attended"]["CYCLES"] <= idle["CYCLES"] < found["attended"]["CYCLES"] + 1000
    codewords = 2 * 2 * -(-83 // TINY.tokens_per_codeword)  # K and V of two heads
    assert found["written"]["BEATS"] == 0 < found["attended"]["BEATS"] == idle["BEATS"] == last.beats
    assert idle["BEATS"] == codewords * TINY.beats_per_codeword
    # The last busy periods were those of the command COUNTERS, without a beat.
    assert idle["FIRST_BEAT"] == 0 < found["written"]["CYCLES"] < idle["LAST_BEAT"] < last.cycle
    pages = 2 * 2 * (83 // TINY.tokens_per_page)
    assert found["sequence"] == {"JOBS": 0, "TOKENS": 83, "PAGE_PROGRAMS": pages}


def fails(device: Device) -> None:
    raise ValueError("as it should")


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ValueError, match="as it should") as error:
        simulate(TINY, fails)
    assert "in fails" in "\n".join(error.value.__notes__)


def chatty(device: Device) -> None:
    from kvattic_sim.rtl.jobs import report

    for i in range(3):
        report(f"line {i}")


def test_progress_reaches_the_caller() -> None:
    lines: list[str] = []
    simulate(TINY, chatty, progress=lines.append)
    assert lines == ["line 0", "line 1", "line 2"]
