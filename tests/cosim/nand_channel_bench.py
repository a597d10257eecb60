"""The cocotb side of test_nand_channel.py: NAND model and twin, given the same cycles, must show the same.

Scripts, one for each die, send random operations, mostly as they should be: some waits are too short, some bytes are
wrong.  What is offered depends on the twin alone; everything that the model shows is compared in each cycle.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, Timer

from kvattic.spec.config import TINY
from kvattic.spec.nand import TINY_PART
from kvattic_sim.nand.files import read_log, read_pages, read_trace, write_pages
from kvattic_sim.nand.twin import FRACTION, NandChannel, NandFaults, write_configuration

_QUICK = replace(TINY_PART, t_r=1_500.0, t_prog=4_000.0, t_bers=6_000.0, t_rst=3_000.0, t_feat=500.0, endurance=20)
CONFIGS = {
    "shared": replace(TINY, part=_QUICK, dies=4),
    # A word for each cycle at most, a last word that is half used, numbers that are no powers of two.
    "separate": replace(TINY, dies=2, beat_bytes=16, clock_mhz=199.0, part=replace(
        _QUICK, planes=4, spare_bytes=139, blocks=5, pages=6, bus_mts=3600.0, separate_command_bus=True, t_cad=7.0,
        mark_pages=(1, -1), mark_byte=21)),
    "one": replace(TINY, dies=1, part=replace(_QUICK, planes=1, bus_mts=533.0, t_cad=31.0)),
}
FRAMES = 400
CYCLES = int(os.environ.get("NAND_CYCLES", "120000"))
CONFIG = CONFIGS[os.environ.get("NAND_CONFIG", "shared")]
OUTPUTS = ("cycles_ready", "bursts_ready", "read_valid", "write_ready", "ready")
COUNTERS = ("words_moved", "page_reads", "page_programs", "block_erases", "program_failures", "erase_failures",
            "bit_flips", "powered")

Op = tuple[Any, ...]
"""("cycle", address, byte), ("burst", write, bytes), ("wait", cycles), ("ready",): what a script asks for."""


class Script:
    """Random operations of one die; `errors` is the share of steps that are wrong."""

    def __init__(self, channel: NandChannel, die: int, seed: int, errors: float) -> None:
        self.channel, self.die, self.errors = channel, die, errors
        self.config, self.part = channel.config, channel.config.part
        self.random = random.Random(seed)

    def __iter__(self) -> Iterator[Op]:
        """Without end."""
        yield from self.reset()
        kinds = (self.read, self.read, self.cache, self.cache, self.program, self.program, self.programs, self.erase,
                 self.status, self.identity, self.feature, self.junk)
        while True:
            kind = self.random.choices(kinds, (4, 4, 4, 4, 4, 4, 4, 3, 2, 1, 2, 30 * self.errors))[0]
            yield from kind()
            lost = self.channel.dies[self.die].needs_reset and self.channel.powered
            if self.random.random() < (0.7 if lost else 0.02):
                yield from self.reset()
            if self.random.random() < 0.3:
                yield ("wait", self.random.randrange(2000))

    # Pieces.

    def wrong(self) -> bool:
        return self.random.random() < self.errors

    def wait(self, name: str) -> Iterator[Op]:
        """t_<name> from the end of the last cycle, or less."""
        cycles = self.config.cycles(self.part.t_cad + getattr(self.part, f"t_{name}"))
        yield ("wait", self.random.randrange(cycles) if self.wrong() else cycles + self.random.choice((0, 0, 5)))

    def reset(self) -> Iterator[Op]:
        yield ("cycle", 0, 0xFF)
        yield from self.wait("wb")
        if not self.wrong():
            yield ("ready",)

    def busy(self, *, reading: bool = False) -> Iterator[Op]:
        yield from self.wait("wb")
        if self.random.random() < 0.2:
            yield from self.status()
        if not self.wrong():
            yield ("ready",)
        if (reading and self.random.random() < 0.1) or self.wrong():
            yield from self.status()
            yield from self.command(0x00)
            yield from self.wait("whr")

    def command(self, byte: int, address: bytes = b"", confirm: int | None = None) -> Iterator[Op]:
        if self.wrong() and self.random.random() < 0.2:
            byte ^= 1 << self.random.randrange(8)
        yield ("cycle", 0, byte)
        if self.wrong() and self.random.random() < 0.2:
            address = address[:-1]
        for a in address:
            yield ("cycle", 1, a)
        if confirm is not None:
            yield ("cycle", 0, confirm)

    def place(self, page: int | None = None) -> tuple[int, int, int]:
        part, r = self.part, self.random
        beyond = 1 if self.wrong() and self.random.random() < 0.2 else 0
        return (r.randrange(part.planes), r.randrange(part.blocks + beyond),
                r.randrange(part.pages + beyond) if page is None else page)

    def following(self, plane: int, block: int) -> int:
        """The page to be programmed next, mostly."""
        if self.wrong():
            return self.random.randrange(self.part.pages)
        return min(self.channel.programmed(self.die, plane, block), self.part.pages - 1)

    def places(self, count: int, page: int) -> list[tuple[int, int, int]]:
        planes = self.random.sample(range(self.part.planes), count)
        if self.wrong():
            planes[-1] = planes[0]
        return [(plane, self.random.randrange(self.part.blocks), page ^ int(self.wrong())) for plane in planes]

    def out(self, longest: int | None = None) -> Iterator[Op]:
        length = self.random.choice((1, 7, 8, 16, 33, 64, 264, 528, longest or self.part.raw_bytes))
        if self.wrong() and self.random.random() < 0.3:
            length = self.random.choice((0, self.part.raw_bytes + 1))
        elif longest is None:
            length = min(length, self.part.raw_bytes - self.channel.dies[self.die].column)
            if length <= 0:
                return
        else:
            length = min(length, longest)
        yield ("burst", 0, length)

    # Operations.

    def columns(self, places: list[tuple[int, int, int]]) -> Iterator[Op]:
        """Data of pages in the registers."""
        for _ in range(self.random.randrange(4)):
            column = self.random.randrange(self.part.raw_bytes + int(self.wrong()))
            if self.random.random() < 0.5:
                yield from self.command(0x05, column.to_bytes(2, "little"), 0xE0)
            else:
                place = self.place() if self.wrong() else self.random.choice(places)
                yield from self.command(0x06, self.part.address(*place, column), 0xE0)
            yield from self.wait("ccs")
            yield from self.out()
            if self.random.random() < 0.3:
                yield from self.out()

    def request(self, places: list[tuple[int, int, int]], confirm: int) -> Iterator[Op]:
        for place in places[:-1]:
            yield from self.command(0x00, self.part.address(*place), 0x32)
            yield from self.busy(reading=self.wrong())
        column = self.random.choice((0, 0, self.random.randrange(self.part.raw_bytes)))
        yield from self.command(0x00, self.part.address(*places[-1], column), confirm)
        yield from self.busy(reading=True)
        yield from self.wait("rr")

    def read(self) -> Iterator[Op]:
        places = self.places(self.random.randrange(1, self.part.planes + 1), self.random.randrange(self.part.pages))
        yield from self.request(places, 0x30)
        if self.random.random() < 0.5:
            yield from self.out()
        yield from self.columns(places)

    def cache(self) -> Iterator[Op]:
        count = self.random.randrange(1, self.part.planes + 1)
        places = self.places(count, self.random.randrange(self.part.pages))
        yield from self.request(places, 0x30)
        for _ in range(self.random.randrange(4)):
            if self.random.random() < 0.5:
                following = self.places(self.random.randrange(1, self.part.planes + 1),
                                        self.random.randrange(self.part.pages))
                yield from self.request(following, 0x31)
            elif places[0][2] + 1 < self.part.pages or self.wrong():
                following = [(plane, block, page + 1) for plane, block, page in places]
                yield from self.command(0x31)
                yield from self.busy(reading=True)
                yield from self.wait("rr")
            else:
                break
            if self.random.random() < 0.5:
                yield from self.out()
            yield from self.columns(places)
            places = following
        if self.channel.dies[self.die].pending != self.wrong():
            yield from self.command(0x3F)
            yield from self.busy(reading=True)
            yield from self.wait("rr")
            yield from self.columns(places)

    def fill(self, place: tuple[int, int, int], confirm: int, first: int = 0x80) -> Iterator[Op]:
        column = self.random.choice((0, 0, 8, self.random.randrange(self.part.raw_bytes)))
        yield from self.command(first, self.part.address(*place, column))
        yield from self.wait("adl")
        if self.random.random() < 0.9:
            yield ("burst", 1, self.random.randrange(1, self.part.raw_bytes - column + 1 + int(self.wrong())))
        if self.random.random() < 0.3:
            column = self.random.randrange(self.part.raw_bytes)
            yield from self.command(0x85, column.to_bytes(2, "little"))
            yield from self.wait("ccs")
            yield ("burst", 1, self.random.randrange(1, min(40, self.part.raw_bytes - column) + 1))
        yield ("cycle", 0, confirm)

    def program(self) -> Iterator[Op]:
        plane, block, _ = self.place()
        block = min(block, self.part.blocks - 1)
        if self.channel.programmed(self.die, plane, block) >= self.part.pages and not self.wrong():
            yield from self.erase([(plane, block, 0)])
        yield from self.fill((plane, block, self.following(plane, block)), 0x10)
        yield from self.busy()
        yield from self.status()

    def programs(self) -> Iterator[Op]:
        """Multi-plane and cache programs."""
        count = self.random.randrange(1, self.part.planes + 1)
        places = self.places(count, 0)
        rounds = self.random.randrange(1, 4)
        if not self.wrong():
            yield from self.erase(places)
        for i in range(rounds):
            places = [(plane, block, self.following(plane, block)) for plane, block, _ in places]
            places = [(plane, block, places[0][2]) for plane, block, _ in places]
            for j, place in enumerate(places):
                last = j == count - 1
                confirm = 0x11 if not last else 0x15 if i < rounds - 1 or self.wrong() else 0x10
                yield from self.fill(place, confirm, self.random.choice((0x80, 0x81)) if j else 0x80)
                yield from self.busy()
            if self.random.random() < 0.5:
                yield from self.status(places[-1])

    def erase(self, places: list[tuple[int, int, int]] | None = None) -> Iterator[Op]:
        if places is None:
            places = self.places(self.random.randrange(1, self.part.planes + 1), 0)
        for i, place in enumerate(places):
            confirm = 0xD0 if i == len(places) - 1 else 0xD1
            yield from self.command(0x60, self.part.address(*place)[2:], confirm)
            yield from self.busy()
        yield from self.status(places[-1])

    def status(self, place: tuple[int, int, int] | None = None) -> Iterator[Op]:
        if self.random.random() < 0.5:
            yield from self.command(0x78, self.part.address(*(place or self.place()))[2:])
        else:
            yield from self.command(0x70)
        yield from self.wait("whr")
        yield ("burst", 0, self.random.choice((1, 2, 20)))

    def identity(self) -> Iterator[Op]:
        if self.random.random() < 0.5:
            yield from self.command(0x90, bytes([self.random.choice((0, 0x20, 7))]))
            yield from self.wait("whr")
            yield from self.out(8)
        else:
            yield from self.command(0xEC, bytes([int(self.wrong())]))
            yield from self.busy(reading=True)
            yield from self.wait("rr")
            yield from self.out(768)
            yield from self.command(0x05, self.random.randrange(700).to_bytes(2, "little"), 0xE0)
            yield from self.wait("ccs")
            yield from self.out(68)

    def feature(self) -> Iterator[Op]:
        address = bytes([self.random.choice((0x01, 0x02, 0x10, 0x89, 0x89, 0x89))])
        yield from self.command(0xEF, address)
        yield from self.wait("adl")
        yield ("burst", 1, 4)
        yield ("wait", self.config.cycles(self.part.t_wb) + 20)
        yield ("ready",)
        yield from self.command(0xEE, address)
        yield from self.busy(reading=True)
        yield from self.wait("rr")
        yield from self.out(4)

    def junk(self) -> Iterator[Op]:
        for _ in range(self.random.randrange(1, 6)):
            known = (0x00, 0x05, 0x06, 0x10, 0x11, 0x15, 0x30, 0x31, 0x32, 0x3F, 0x60, 0x70, 0x78, 0x80, 0x81, 0x85,
                     0x90, 0xD0, 0xD1, 0xE0, 0xEC, 0xEE, 0xEF, self.random.randrange(256))
            yield self.random.choice([
                ("cycle", 0, self.random.choice(known)), ("cycle", 1, self.random.randrange(256)),
                ("burst", self.random.randrange(2), self.random.randrange(50)), ("wait", self.random.randrange(40))])
        yield ("cycle", 0, 0xFF)
        yield ("wait", 100)
        if self.random.random() < 0.9:
            yield ("ready",)


class Bench:
    """Model and twin side by side, in the working directory."""

    def __init__(self, dut: Any, seed: int, faults: NandFaults, errors: float) -> None:
        self.dut = dut
        self.random = random.Random(seed)
        self.seed, self.faults, self.errors = seed, faults, errors
        self.twin = NandChannel(CONFIG, seed=seed, faults=faults)
        self.scripts = [iter(Script(self.twin, die, 1000 * seed + die, errors)) for die in range(CONFIG.dies)]
        self.waiting: list[int] = [0] * CONFIG.dies
        """Cycle that a script waits for; negative: for R/B_n."""
        self.cycle: tuple[int, int, int] | None = None
        self.burst: tuple[int, int, int] | None = None
        self.todo: dict[str, list[tuple[int, int, int]]] = {"cycle": [], "burst": []}
        self.on_bus: int | None = None
        """The die whose burst moves."""
        self.set: dict[str, int] = {}
        self.inputs = {name: getattr(dut, name) for name in (
            "cycles_valid", "cycles_payload", "bursts_valid", "bursts_payload", "write_valid", "write_payload", "rst",
            "configure", "load", "dump")}
        self.outputs = [(name, getattr(dut, name)) for name in OUTPUTS]

    def drive(self, name: str, value: int) -> None:
        if self.set.get(name) != value:
            self.set[name] = value
            self.inputs[name].value = value

    async def start(self, clock: bool) -> None:
        pages = {}
        part = CONFIG.part
        for die in range(CONFIG.dies):
            for plane in range(part.planes):
                for block in range(part.blocks // 2):
                    for page in range(part.pages // 2 + block % 2):
                        data = self.random.randbytes(part.raw_bytes)
                        self.twin.load((die, plane, block, page), data)
                        pages[part.page_index(die, plane, block, page)] = data
        here = Path()
        write_pages(here, CONFIG, pages)
        write_configuration(here / "nand0.cfg", CONFIG, faults=self.faults, seed=self.seed, trace=True)
        self.dut.channel.value = 0
        for name in self.inputs:
            self.drive(name, 0)
        self.drive("configure", 1)
        self.drive("load", 1)
        if clock:
            self.dut.clk.value = 0
            await Timer(1, "ns")  # no edge is seen when the clock starts low
            Clock(self.dut.clk, 2, "ns", impl="gpi").start(start_high=False)

    def plan(self) -> None:
        """Let scripts that wait for nothing ask for the next thing."""
        now = self.twin.now
        for die, script in enumerate(self.scripts):
            state = self.waiting[die]
            if state is None:
                continue
            if state < 0:
                if not self.twin.outputs.ready >> die & 1 and now < -state:
                    continue
            elif now < state:
                continue
            op = next(script)
            if op[0] == "wait":
                self.waiting[die] = now + op[1]
            elif op[0] == "ready":
                self.waiting[die] = -(now + 40_000)  # a dead die is tried again some time
            else:
                self.waiting[die] = 1 << 60
                self.todo[op[0]].append((die, op[1], op[2]))

    def step(self) -> None:
        """Offer something in the coming cycle, to both."""
        self.plan()
        twin, target = self.twin, max(1, (CONFIG.dies - 1).bit_length())
        if self.cycle is None and self.todo["cycle"] and self.random.random() < 0.9:
            self.cycle = self.todo["cycle"].pop(self.random.randrange(len(self.todo["cycle"])))
        if self.burst is None and self.todo["burst"] and self.random.random() < 0.9:
            self.burst = self.todo["burst"].pop(self.random.randrange(len(self.todo["burst"])))
        word = self.random.getrandbits(CONFIG.beat_bytes * 8) if self.random.random() < 0.8 else None
        if word is not None and (self.errors == 0 or self.random.random() < 0.5):
            word &= ~0xFF | self.random.randrange(4)  # a retry level that there is
        reset = self.errors > 0 and self.random.random() < 0.0003
        for name, offer in (("cycles", self.cycle), ("bursts", self.burst)):
            self.drive(f"{name}_valid", int(offer is not None))
            if offer is not None:
                self.drive(f"{name}_payload", offer[0] | offer[1] << target | offer[2] << target + 1)
        self.drive("write_valid", int(word is not None))
        self.drive("write_payload", word or 0)
        self.drive("rst", int(reset))
        shown = twin.outputs
        twin.step(self.cycle, self.burst, word, reset)
        if not reset:
            if self.cycle is not None and shown.cycles_ready:
                self.waiting[self.cycle[0]] = twin.now
                self.cycle = None
            if self.burst is not None and shown.bursts_ready:
                # The script goes on when the burst is over, or does not wait for that.
                die = self.burst[0]
                if self.on_bus is not None:
                    self.waiting[self.on_bus] = twin.now
                self.on_bus, self.burst = die, None
                if self.errors > 0 and self.random.random() < 0.05:
                    self.waiting[die] = twin.now
                    self.on_bus = None
        if self.on_bus is not None and (twin._data_end <= twin.now << FRACTION or reset):
            self.waiting[self.on_bus] = twin.now
            self.on_bus = None

    async def run(self, cycles: int) -> None:
        for _ in range(cycles):
            self.step()
            await FallingEdge(self.dut.clk)
            expected = self.twin.outputs
            for name, handle in self.outputs:
                found = int(handle.value)
                assert found == getattr(expected, name), self.difference(name, found)
            if expected.read_valid:
                found = int(self.dut.read.value)
                assert found == expected.read, self.difference("read", found)

    def difference(self, name: str, found: int) -> str:
        wanted = getattr(self.twin.outputs, name)
        last = "\n".join(map(str, self.twin.events[-5:] + self.twin.violations[-3:]))
        return f"cycle {self.twin.now}: {name} is {found:#x}, the twin's {wanted:#x}; lately:\n{last}"

    async def finish(self) -> None:
        """Counters, messages, trace and contents are the same."""
        twin = self.twin
        before = len(twin.events), {i: data[: CONFIG.part.raw_bytes].tobytes() for i, data in twin._pages.items()}
        self.drive("dump", 1)
        await self.run(1)
        assert int(self.dut.load_errors.value) == 0
        assert int(self.dut.cycle.value) == twin.now
        for name in COUNTERS:
            assert int(getattr(self.dut, name).value) == getattr(twin, name), name
        assert read_log(Path()) == twin.violations
        assert int(self.dut.violations.value) == len(twin.violations)
        events = read_trace(Path())
        for i, (found, wanted) in enumerate(zip(events, twin.events, strict=False)):
            assert found == wanted, f"line {i + 1} of the trace"
        assert len(events) >= before[0]
        assert read_pages(Path(), CONFIG) == before[1]


@cocotb.test()
async def same_as_twin(dut: Any) -> None:
    """Whatever is sent; enough of each thing happens to mean something."""
    seed = int(os.environ.get("NAND_SEED", "1"))
    errors = float(os.environ.get("NAND_ERRORS", "0.02"))
    planes, blocks = CONFIG.part.planes, CONFIG.part.blocks
    last = CONFIG.dies - 1
    faults = NandFaults() if os.environ.get("NAND_FAULTS") == "none" else NandFaults(
        bit_error_rate=1e-4, retry_error_rate=5e-3, factory_bad=((0, 0, 1), (last, planes - 1, blocks - 1, 1)),
        grown_bad=((0, planes - 1, 2, 1),), program_fails=((0, 0, 3, 1), (last, 0, 2, None)),
        erase_fails=((0, 0, 0),), stuck_busy=((last, 60 if CONFIG.dies > 1 else 1_000_000),),
        retry=((0, 0, 0, None, 1), (0, planes - 1, None, 0, 2)),
        stuck_columns=((0, 0, 5, 0x3C, 0x18), (last, planes - 1, CONFIG.part.raw_bytes - 1, 0x81, 0x80)),
        power_cuts=((CYCLES // 3, 300), (CYCLES // 2, 1), (CYCLES * 2 // 3, 1000)))
    bench = Bench(dut, seed, faults, errors)
    await bench.start(clock=True)
    await bench.run(CYCLES)
    await bench.finish()
    twin = bench.twin
    dut._log.info("%d violations of %d kinds, %d reads, %d programs, %d erases, %d flips, %d events",
                  len(twin.violations), len({text.split(": ")[1].split(" (")[0] for text in twin.violations}),
                  twin.page_reads, twin.page_programs, twin.block_erases, twin.bit_flips, len(twin.events))
    amount = CYCLES * CONFIG.dies
    assert twin.page_reads > amount // 12_000 and twin.page_programs > amount // 30_000
    assert twin.block_erases >= amount // 100_000
    if errors == 0:
        assert twin.violations == [], "what is legal was called wrong"
    else:
        assert len(twin.violations) > CYCLES // 3000
