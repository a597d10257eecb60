"""The cocotb side of test_flash_channel.py: one ideal flash twin, driven and observed where its clock falls."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

from kvattic.spec.commands import Kind, MediaCause, Opcode, Status
from kvattic.spec.config import TINY
from kvattic_hdl.lib.shapes import Shapes, operation_code

CONFIG = TINY
PAGES, FRAMES, QUEUE = 8, 8, 6
BEATS, WORDS = 20, 32  # twelve words of padding
CODEWORDS = CONFIG.codewords_per_page
SHAPES = Shapes(CONFIG)
SEED = 3


def tag(place: int, *, kind: Kind = Kind.KEY, slot: int = 0, epoch: int = 0) -> int:
    fields = {"place": place, "kind": kind, "slot": slot, "epoch": epoch}
    return sum(value << SHAPES.tag[name].offset for name, value in fields.items())


def request(tag_bits: int, page: int, codeword: int) -> int:
    fields = SHAPES.request
    return tag_bits << fields["tag"].offset | page << fields["page"].offset | codeword << fields["codeword"].offset


CONTENTS = np.random.default_rng(SEED).integers(0, 256, (PAGES * CODEWORDS, WORDS, CONFIG.beat_bytes), np.uint8)


def words(page: int, codeword: int) -> list[int]:
    """What the codeword's beats must carry."""
    return [int.from_bytes(word.tobytes(), "little") for word in CONTENTS[page * CODEWORDS + codeword, :BEATS]]


@dataclass
class Seen:
    """What came out: for each codeword its tag, its words, and the cycles of its beats."""

    tags: list[int] = field(default_factory=list)
    words: list[list[int]] = field(default_factory=list)
    cycles: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Cycles in which requests were taken."""


class Bench:
    """The twin after reset, with its first pages loaded."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.cycle = 0

    async def start(self, **settings: int) -> None:
        dut = self.dut
        for handle in dut:
            if handle._name in INPUTS:
                handle.value = 0
        dut.channel.value = 0
        dut.rst.value = 1
        Clock(dut.clk, 2, "ns", impl="gpi").start()
        await self.wait(3)
        dut.rst.value = 0
        dut.seed.value = SEED
        dut.configure.value = 1
        dut.value_open.value = (1 << CONFIG.jobs_in_flight) - 1
        await self.wait(2)
        for page in range(PAGES // 2):   # of two pages each: what the test before has left
            assert await self.operate(Opcode.ERASE, page) is Status.OK
        for page in range(PAGES):
            assert await self.operate(Opcode.PROGRAM, page, page) is Status.OK
        self.set(**settings)

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            getattr(self.dut, name).value = value

    async def operate(self, opcode: Opcode, page: int, contents: int | None = None) -> Status:
        """Do one operation; a PROGRAM takes page `contents` of CONTENTS."""
        dut, operation, outcome = self.dut, SHAPES.operation, SHAPES.outcome
        todo = [] if contents is None else [
            int.from_bytes(word.tobytes(), "little")
            for word in CONTENTS[contents * CODEWORDS : (contents + 1) * CODEWORDS].reshape(-1, CONFIG.beat_bytes)]
        dut.operation_valid.value = 1
        dut.operation_payload.value = (
            operation_code(opcode) << operation["opcode"].offset | page << operation["page"].offset
            | 0x1234 << operation["identity"].offset)
        dut.outcome_ready.value = 1
        offered = True
        for _ in range(4 * WORDS * CODEWORDS):
            if offered and int(dut.operation_ready.value):
                offered = False
                await self.wait(1)
                dut.operation_valid.value = 0
                continue
            dut.page_word_valid.value = bool(todo)
            if todo:
                dut.page_word_payload.value = todo[0] << SHAPES.page_word["data"].offset
                if int(dut.page_word_ready.value):
                    del todo[0]
            if int(dut.outcome_valid.value):
                found = outcome.from_bits(int(dut.outcome_payload.value))
                assert (found.identity, found.page) == (0x1234, page)
                assert not todo
                await self.wait(1)
                return Status(found.status)
            await self.wait(1)
        raise AssertionError("the operation did not end")

    async def wait(self, cycles: int) -> None:
        for _ in range(cycles):
            await FallingEdge(self.dut.clk)
            self.cycle += 1

    async def run(
        self, requests: list[int], cycles: int, ready: Callable[[], bool] = lambda: True, codewords: int | None = None
    ) -> Seen:
        """Offer the requests one after the other; stop after so many cycles or codewords."""
        dut, seen, beats, held = self.dut, Seen(), SHAPES.beat, None
        todo = list(requests)
        for _ in range(cycles):
            dut.request_valid.value = bool(todo)
            if todo:
                dut.request_payload.value = todo[0]
            taking = ready()
            dut.codeword_ready.value = taking
            # The twin's outputs are registers: what they show now, the coming edge transfers.
            if todo and dut.request_ready.value:
                seen.accepted.append(self.cycle)
                del todo[0]
            valid = bool(dut.codeword_valid.value)
            payload = int(dut.codeword_payload.value) if valid else None
            assert held is None or payload == held, "a beat changed or went before it was taken"
            held = payload if valid and not taking else None
            if payload is not None and taking:
                beat = beats.from_bits(payload)
                if not seen.words or len(seen.words[-1]) == BEATS:
                    seen.tags.append(payload >> beats["tag"].offset & (1 << SHAPES.tag.size) - 1)
                    seen.words.append([])
                    seen.cycles.append([])
                seen.words[-1].append(beat.data)
                seen.cycles[-1].append(self.cycle)
                assert beat.last == (len(seen.words[-1]) == BEATS)
            await self.wait(1)
            if codewords is not None and len(seen.words) == codewords and len(seen.words[-1]) == BEATS:
                break
        dut.request_valid.value = 0
        dut.codeword_ready.value = 0
        return seen


INPUTS = (
    *("rst", "request_valid", "request_payload", "codeword_ready", "value_open", "epoch"),
    *("latency", "jitter", "shuffle", "gap", "gap_pattern", "request_stall", "request_stall_pattern"),
    *("seed", "fault", "fault_number", "fault_value", "configure"),
    *("operation_valid", "operation_payload", "page_word_valid", "page_word_payload", "outcome_ready"),
)


def some(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """(tag, page, codeword) of different codewords."""
    generator = random.Random(seed)
    places = generator.sample(range(PAGES * CODEWORDS), count)
    return [(tag(i), place // CODEWORDS, place % CODEWORDS) for i, place in enumerate(places)]


def check(seen: Seen, wanted: list[tuple[int, int, int]], *, in_order: bool) -> None:
    expected = {t: words(page, codeword) for t, page, codeword in wanted}
    assert sorted(seen.tags) == sorted(expected)
    assert (seen.tags == [t for t, _, _ in wanted]) == in_order
    for t, found in zip(seen.tags, seen.words, strict=True):
        assert found == expected[t]


@cocotb.test()
async def full_rate(dut: Any) -> None:
    """Oldest first, each after the latency, not one bubble."""
    bench = Bench(dut)
    await bench.start(latency=40)
    wanted = some(12)
    seen = await bench.run([request(*w) for w in wanted], 1000, codewords=12)
    check(seen, wanted, in_order=True)
    cycles = [cycle for codeword in seen.cycles for cycle in codeword]
    assert cycles == list(range(cycles[0], cycles[0] + 12 * BEATS)), "there was a bubble"
    assert cycles[0] - seen.accepted[0] == 41
    assert seen.accepted[:QUEUE] == list(range(seen.accepted[0], seen.accepted[0] + QUEUE))
    assert seen.accepted[QUEUE] >= cycles[0], "the queue took more than it holds"
    assert int(dut.served.value) == 12


@cocotb.test()
async def stalls(dut: Any) -> None:
    """Backpressure, gaps and request stalls lose, change and repeat nothing."""
    bench = Bench(dut)
    generator = random.Random(SEED)
    await bench.start(latency=5, jitter=50, shuffle=1)
    for settings in ({}, {"gap": 128, "request_stall": 128}, {"gap_pattern": 7, "request_stall_pattern": 7}):
        bench.set(**{"gap": 0, "request_stall": 0, "gap_pattern": 0, "request_stall_pattern": 0} | settings)
        wanted = some(30, len(settings))
        seen = await bench.run(
            [request(*w) for w in wanted], 20_000, lambda: generator.random() < 0.5, codewords=30
        )
        check(seen, wanted, in_order=False)
    cycles = [cycle for codeword in seen.cycles for cycle in codeword]
    assert len({cycle % 4 for cycle in cycles}) > 1, "a held beat was taken in the same phase only"


@cocotb.test()
async def values_wait(dut: Any) -> None:
    """V codewords wait for their slot to open, unless they are of another epoch; K codewords pass them."""
    bench = Bench(dut)
    await bench.start(latency=3)
    bench.set(value_open=0b1101, epoch=5 << 4)  # slot 1 is closed, its epoch is 5
    blocked = (tag(0, kind=Kind.VALUE, slot=1, epoch=5), 0, 0)
    passing = [
        (tag(1, kind=Kind.VALUE, slot=1, epoch=4), 0, 1),
        (tag(2, slot=1, epoch=5), 0, 2),
        (tag(3, kind=Kind.VALUE, slot=2), 0, 3),
    ]
    seen = await bench.run([request(*w) for w in [blocked, *passing]], 500)
    check(seen, passing, in_order=True)
    bench.set(value_open=0b1111)
    seen = await bench.run([], 100)
    check(seen, [blocked], in_order=True)


async def with_fault(bench: Bench, fault: int, number: int, value: int = 0) -> Seen:
    dut = bench.dut
    dut.configure.value = 1 - int(dut.configure.value)
    bench.set(fault=fault, fault_number=number, fault_value=value)
    await bench.wait(1)
    return await bench.run([request(*w) for w in some(5)], 2000)


@cocotb.test()
async def faults(dut: Any) -> None:
    """Each fault hits the codeword of its number, and no other."""
    bench = Bench(dut)
    await bench.start(latency=10)
    tags = [t for t, _, _ in some(5)]
    assert (await with_fault(bench, 0, 0)).tags == tags
    assert (await with_fault(bench, 1, 3)).tags == tags[:2] + tags[3:]
    assert (await with_fault(bench, 2, 1)).tags == tags[:1] + tags
    assert (await with_fault(bench, 2, 1, 70)).tags == [*tags[:4], tags[0], tags[4]]
    seen = await with_fault(bench, 3, 2, 0b101)
    assert seen.tags == [tags[0], tags[1] ^ 0b101, *tags[2:]]
    assert seen.words[1] == words(*some(5)[1][1:])
    seen = await with_fault(bench, 4, 2, 300)
    assert seen.tags == [tags[0], *tags[2:], tags[1]]
    assert seen.cycles[4][0] - seen.cycles[0][-1] >= 300


@cocotb.test()
async def contents(dut: Any) -> None:
    """Pages are written once and in order until their block is erased; what was not written is an error."""
    bench = Bench(dut)
    await bench.start()
    assert await bench.operate(Opcode.PROGRAM, 5, 0) is Status.PROGRAM_FAILED   # a second time
    assert await bench.operate(Opcode.ERASE, 5) is Status.OK                    # pages 1 and 5
    assert await bench.operate(Opcode.PROGRAM, 5, 0) is Status.PROGRAM_FAILED   # page 1 goes before it
    erased, media = [], []
    dut.request_valid.value = 1
    dut.request_payload.value = request(tag(1), 5, 2)
    dut.codeword_ready.value = 1
    offered = True
    for _ in range(200):
        if offered and int(dut.request_ready.value):
            offered = False
            await bench.wait(1)
            dut.request_valid.value = 0
            continue
        if int(dut.media_valid.value):
            media.append(SHAPES.media_error.from_bits(int(dut.media_payload.value)))
        if int(dut.codeword_valid.value):
            erased.append(SHAPES.beat.from_bits(int(dut.codeword_payload.value)).error)
        await bench.wait(1)
    assert erased == [1] * BEATS
    assert [(m.page, m.codeword, m.cause) for m in media] == [(5, 2, MediaCause.ERASED)]
    assert await bench.operate(Opcode.PROGRAM, 1, 3) is Status.OK
    assert await bench.operate(Opcode.PROGRAM, 5, 2) is Status.OK
    seen = await bench.run([request(tag(0), 5, 1), request(tag(2), 1, 3)], 400, codewords=2)
    assert seen.words == [words(2, 1), words(3, 3)]
    assert await bench.operate(Opcode.MAP, 1) is Status.OK
    assert await bench.operate(Opcode.PROBE, 1) is Status.OK
