"""Queues filled by hand, without a driver: random commands, attacks, orders, resets; the RTL against the golden device.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs), and most of them on the
golden device too.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import OwnQueues, check_counters, differences, ended, normal

from kvattic.driver.device import Device
from kvattic.errors import DeviceTimeoutError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    DATA_COMMAND,
    FLASH_COMMAND,
    GRANT_COMMAND,
    IDENTIFY_BYTES,
    LINE_BYTES,
    QUEUE_COMMAND,
    READ_COMMAND,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    Completion,
    Grant,
    Mode,
    Opcode,
    Status,
    TableFlag,
    fp32_bits,
    fp32_block_bytes,
    query_row_bytes,
    read_token_bytes,
)
from kvattic.spec.config import TINY
from kvattic.spec.registers import MAX_REGIONS, Control, StatusBit
from kvattic_sim.rtl.jobs import run_in_simulation
from kvattic_sim.rtl.transport import AxiStalls, FlashSettings, NandSettings, Stall

DOMAIN, OTHER = 1, 2
REGION_BITS = 4
ZONE = 1 << TINY.zone_page_bits
STEP = 1 << TINY.plane_bits + TINY.die_bits
"""From a page number to the one of the next page of its block."""
MEMORY, DRAM = 1 << 19, 1 << 24
QUERIES, TABLES, COUNTS, TEXTS, RESULTS, TARGETS = 0x2000, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000
TARGET_BYTES = 48 * read_token_bytes(TINY.head_dim)
"""Of a READ of three stripes."""
MEAN_BYTES = fp32_block_bytes(TINY.head_dim)
PLACE_BYTES = MEAN_BYTES + 0x80
"""Of a table with a mean of V in front of it: a job without one begins behind that."""
WINDOW = (0x1000, 0x5F000)
RINGS = 0x60000
BURST_CYCLES = 40
"""Longer than the write of a line takes, stalls included."""
FAST = FlashSettings(latency=20, jitter=40, shuffle=True)


class Bare(OwnQueues):
    """All queues of a device, and no driver behind it.

    Args:
        device: whose transport to use; what its driver has set up is gone.
        sizes: entries of each queue's rings, where it is not 64.
    """

    def __init__(self, device: Device, sizes: dict[int, int] | None = None) -> None:
        super().__init__(device, window=WINDOW)
        self.rings = RINGS
        self.sizes = sizes or {}
        self.simulated = not isinstance(self.device, GoldenDevice)
        self.reset()
        self.device.write_memory(0, bytes(RINGS))    # the driver's rings

    def of(self, queue: int) -> None:
        """What follows is about this queue's rings."""
        self.entries = self.sizes.get(queue, 64)

    def clear(self, queue: int) -> None:
        """See `Host`."""
        self.of(queue)
        super().clear(queue)

    def create_line(self, queue: int, **changes: int) -> bytes:
        """See `Host`."""
        self.of(queue)
        return super().create_line(queue, **changes)

    def push(self, queue: int, *lines: bytes) -> None:
        """See `Host`."""
        self.of(queue)
        super().push(queue, *lines)

    def reap(self, queue: int, *, take: bool = True) -> list[Completion]:
        """See `Host`."""
        self.of(queue)
        found = super().reap(queue, take=False)
        if found and self.simulated:
            # The simulated memory gets a burst word by word: the counters come behind the phase bit.
            self.device.run_cycles(BURST_CYCLES)
        head = self.heads[queue]
        found = [Completion.unpack(self.device.read_memory(
            self.completion(queue) + (head + i) % self.entries * LINE_BYTES, LINE_BYTES)) for i in range(len(found))]
        if take and found:
            self.heads[queue] += len(found)
            self.device.write_register(f"COMPLETION_HEAD_{queue}", self.heads[queue] % self.entries)
        return found

    def run(self, queue: int, *lines: bytes) -> list[Completion]:
        """See `OwnQueues`."""
        self.of(queue)
        return super().run(queue, *lines)

    def submission(self, queue: int) -> int:
        """See `Host`; rings of different sizes do not meet."""
        return self.rings + queue * 0x2000

    def reset(self) -> None:
        """CONTROL.RESET and queue 0; the owners stay."""
        transport = self.device
        transport.write_register("CONTROL", Control.RESET)
        while not transport.read_register("STATUS") & StatusBit.READY:
            pass
        self.begin()

    def begin(self) -> None:
        """Queue 0."""
        self.admin()
        self.device.write_register("REGION_BITS", REGION_BITS)

    def ok(self, line: bytes) -> None:
        """See `Host`."""
        (found,) = self.run(0, line)
        assert found.status is Status.OK, found

    def nobody(self) -> None:
        """Nobody owns anything, and no queue may name any domain of the tests."""
        self.grant(Grant.ZONES, 0, TINY.part.blocks, 0)
        self.grant(Grant.REGIONS, 0, MAX_REGIONS, 0)
        for domain in (DOMAIN, OTHER):
            self.grant(Grant.QUEUES, 0, 0, domain)

    def settled(self) -> dict[str, int]:
        """What the registers say when everything is done."""
        read = self.device.read_register
        while read("STATUS") & StatusBit.BUSY:
            pass
        late = StatusBit.STALE_CODEWORD
        return {"status": read("STATUS") & ~late, "fetched": read("FETCHED"), "completed": read("COMPLETED"),
                "interrupts": read("INTERRUPTS"), "doorbell": read("DOORBELL_ERROR")}


def simulate(function: Any, flash: Any = FAST, timeout_s: float = 900, timeout_cycles: int = 500_000,
             **arguments: Any) -> Any:
    """Run function(device, **arguments) on the RTL."""
    return run_in_simulation(TINY, function, arguments, flash=flash, memory_bytes=MEMORY, dram_bytes=DRAM,
                             timeout_cycles=timeout_cycles, timeout_s=timeout_s).result


def model(function: Any, **arguments: Any) -> Any:
    """The same on the golden device."""
    return function(Device(GoldenDevice(TINY, memory_bytes=MEMORY, dram_bytes=DRAM)), **arguments)


def attend(mode: Mode = Mode.DENSE, **fields: int) -> bytes:
    sparse = {} if mode is Mode.DENSE else {"stripe_pages": TINY.group_pages, "top_units": 1}
    return COMMAND.pack(**{
        "opcode": Opcode.ATTEND, "mode": mode, "rows": 1, "stripe_pages": 1, "stripes": 1, "end_token": 16,
        "domain": DOMAIN, "scale": fp32_bits(1.0), "query": QUERIES, "result": RESULTS, "table": TABLES, **sparse,
        **fields})


def flash(opcode: Opcode, **fields: int) -> bytes:
    return FLASH_COMMAND.pack(**{"opcode": opcode, "domain": 0 if opcode >= ADMIN_OPCODES else DOMAIN, **fields})


def counters(**fields: int) -> bytes:
    return DATA_COMMAND.pack(**{"opcode": Opcode.COUNTERS, "result": COUNTS, **fields})


def grant(kind: int, first: int, count: int, domain: int) -> bytes:
    return GRANT_COMMAND.pack(opcode=Opcode.GRANT, kind=kind, first=first, count=count, domain=domain)


def entry(key: int, value: int, dram: int = 0, channel: int = 0) -> bytes:
    return TABLE_ENTRY.pack(key_page=key, value_page=value, flags=TableFlag.DRAM * dram, channel=channel)


def query(seed: int, rows: int = 2, end: int = 1 << 20) -> bytes:
    """A query block of normal random numbers, whose rows attend everything."""
    block = b""
    for row in normal(TINY, seed, rows):
        block += (ROW.pack(end_token=end) + row.tobytes()).ljust(query_row_bytes(TINY.head_dim), b"\0")
    return block


# ---------------------------------------------------------------- anything at all

SIZES = {0: 16, 1: 16, 2: 2, 3: 64, 4: 8}
"""Entries of the queues' rings."""
WIDE = 4
"""Blocks of this queue's commands may lie beyond the end of memory."""


class Anything:
    """Random commands: valid, nearly valid and noise, in rounds whose commands do not depend on each other's order.

    Args:
        rng: decides.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.next_page = {}    # of blocks, as far as PROGRAMs went in order
        self.slot = 0
        self.targets = 0    # of READs in this round

    def mostly(self, good: int, *bad: int) -> int:
        """The good one, or sometimes a bad one."""
        return good if self.rng.randrange(24) else self.rng.choice(bad)

    def address(self, good: int, *, write: bool = False) -> int:
        """Mostly a good address; nothing is read where several commands may write."""
        edge = WINDOW[1] - (LINE_BYTES if write else 0x400)
        return self.mostly(good, good + 32, 0, WINDOW[0] - 64, edge, WINDOW[1], MEMORY, 1 << 63,
                           (1 << 64) - 64)

    def domain(self) -> int:
        return self.mostly(DOMAIN, OTHER, OTHER, 0, 3, 0x100 | DOMAIN, 0xFFFF)

    def attend(self, dram: bool) -> bytes:
        rng = self.rng
        mode = rng.choice(list(Mode))
        stripes = rng.choice((1, 1, 2, 3))
        tokens = 16 if mode is Mode.DENSE else TINY.group_tokens
        kind = rng.randrange(6) if not dram else rng.choice((0, 1))
        fields = {} if mode is Mode.DENSE else {
            "top_units": self.mostly(rng.choice((1, 2, 5, 9)), 0, 500),
            "local_tokens": self.mostly(rng.choice((0, 0, 1)), 40),
            "unit_bits": self.mostly(rng.choice((0, 0, 1)), 5) if not mode.by_token else 0}
        return attend(
            mode, rows=self.mostly(rng.choice((1, 2)), 0, 3), stripes=self.mostly(stripes, 9),
            end_token=max(stripes * tokens - rng.randrange(20), 1), domain=self.domain(),
            query=self.address(QUERIES + self.mostly(rng.choice((0, 1, 2)), 3) * 0x100),
            result=self.address(RESULTS + self.slot * 0x200, write=True),
            table=self.address(
                TABLES + (2 * kind + (mode is not Mode.DENSE)) * PLACE_BYTES + (not mode.blended) * MEAN_BYTES),
            features=mode.featured * self.mostly(rng.choice((1, 3, 32)), 33), scale=fp32_bits(self.mostly(1, 0)),
            tree_token=rng.choice((0, 1 << 20)), **fields)

    def read(self, dram: bool) -> bytes:
        """A READ with a target of its own; none reaches the rings behind the window."""
        rng = self.rng
        stripes, kind = rng.choice((1, 1, 2, 3)), rng.randrange(6) if not dram else rng.choice((0, 1))
        target = TARGETS + self.targets * TARGET_BYTES
        self.targets += 1
        return READ_COMMAND.pack(
            opcode=Opcode.READ, domain=self.domain(), stripe_pages=1, stripes=self.mostly(stripes, 0, 9),
            tokens=max(stripes * 16 - rng.randrange(20), 1),
            table=self.address(TABLES + 2 * kind * PLACE_BYTES + MEAN_BYTES),
            result=self.mostly(target, target + 32, 0, WINDOW[0] - 64, MEMORY, 1 << 63, (1 << 64) - 64))

    def flash(self, valid: bool) -> bytes:
        """PROGRAM and ERASE, sometimes of a page that may be."""
        rng = self.rng
        opcode = rng.choice((Opcode.PROGRAM,) * 6 + (Opcode.ERASE,))
        channel, block = rng.randrange(2), rng.randrange(4) * ZONE + rng.randrange(STEP)
        page = self.next_page.get((channel, block), 0)
        domain = self.domain()
        if opcode is Opcode.PROGRAM:
            page += rng.choice((0,) * 12 + (1, 7))
            self.next_page[channel, block] = page + 1 if page < 7 else 0
        else:
            self.next_page[channel, block] = 0
        number = block + STEP * (page % 8)
        if not valid:
            channel, number, domain = rng.choice((
                (2, number, domain), (channel, 8 * ZONE, domain), (channel, rng.randrange(8 * ZONE, 1 << 24), domain),
                (channel, number, 0), (channel, 7 * ZONE, DOMAIN), (channel, number, 0x102)))
        argument = rng.randrange(64) if opcode is Opcode.PROGRAM else 0
        if not valid and rng.randrange(3) == 0:
            argument = rng.choice((1 << 23, 1 << 16, 4000))
            opcode = rng.choice((opcode, Opcode.ERASE))
        return flash(opcode, channel=channel, page=number, argument=argument, domain=domain)

    def data(self) -> bytes:
        rng = self.rng
        if rng.randrange(3):
            return counters(result=self.address(COUNTS + self.slot % 64 * 0x100, write=True))
        return DATA_COMMAND.pack(
            opcode=Opcode.IDENTIFY, result=self.address(TEXTS + self.slot % 16 * IDENTIFY_BYTES, write=True))

    def admin(self) -> bytes:
        """What changes who may do what; queues 5 to 7 come and go."""
        rng = self.rng
        kind = rng.randrange(8)
        if kind < 2:
            return grant(Grant.ZONES, rng.choice((0, 1, 2, 3, 5, 7, 8, 1 << 23)), rng.choice((0, 1, 1, 2, 9)),
                         rng.choice((0, DOMAIN, DOMAIN, OTHER, 255, 256)))
        if kind == 2:
            return grant(Grant.REGIONS, rng.choice((0, 1, 2, 3, MAX_REGIONS - 1, MAX_REGIONS)),
                         rng.choice((0, 1, 1, 2)), rng.choice((0, DOMAIN, DOMAIN, OTHER, 300)))
        if kind == 3:
            return grant(rng.choice((Grant.QUEUES, Grant.QUEUES, 3, 255)), rng.choice((0x1FF, 0xFF, 0b11010, 0b1010)),
                         rng.choice((0, 0, 0, 1)), rng.choice((0, DOMAIN, OTHER, OTHER, 256)))
        if kind == 4:
            return flash(Opcode.MAP, channel=rng.choice((0, 1, 2)), page=rng.choice((0, 5, 3)),
                         argument=rng.choice((0, 0, 8)))
        queue = rng.choice((5, 6, 7, 5, 6, 7, 0, 8, 255))
        if kind == 5:
            return QUEUE_COMMAND.pack(opcode=Opcode.DELETE_QUEUE, queue=queue, entries=rng.choice((0, 0, 0, 4)))
        return QUEUE_COMMAND.pack(
            opcode=Opcode.CREATE_QUEUE, queue=rng.choice((queue, queue, 1, 3)), entries=rng.choice((2, 4, 4096, 0, 3)),
            submission=rng.choice((0x1000, 0x1000, 0x1020)), completion=rng.choice((0x2000, 0x2000, 0x2001)))

    def noise(self) -> bytes:
        """Not a command; never one by chance that changes anything."""
        rng = self.rng
        line = bytearray(rng.randbytes(LINE_BYTES) if rng.randrange(2) else attend())
        line[0] = rng.choice((0, 1, 0x83, 0xC1, 0xC6, 0xE3, 0xFF, Opcode.ATTEND, Opcode.READ, Opcode.PROGRAM,
                              Opcode.ERASE, Opcode.GRANT, Opcode.CREATE_QUEUE, rng.randrange(256)))
        line[1] |= 1    # reserved in all records
        return bytes(line)

    def spoiled(self, line: bytes) -> bytes:
        """One byte of it is another, but of no address, so that nothing is written where another command reads."""
        spoiled = bytearray(line)
        spoiled[self.rng.choice([*range(1, 16), *range(40, 64)])] = self.rng.randrange(256)
        return bytes(spoiled)

    def line(self, queue: int, round_: str) -> bytes:
        """A command for a queue in a round of the kind `mixed`, `flash` or `admin`."""
        rng = self.rng
        self.slot = (self.slot + 1) % 256
        kind = rng.randrange(10)
        if queue == 0:
            if round_ == "admin":
                return self.spoiled(self.admin()) if kind == 0 else self.admin()
            if kind < 3:
                return self.data()
            if kind < 6:
                return flash(Opcode.PROBE, channel=rng.choice((0, 1, 1, 2)), page=rng.choice((0, 3, 200, 256)),
                             argument=rng.choice((0, 0, 0, 1)))
            return self.noise() if kind < 9 else attend(rows=0)
        if kind == 0:
            return rng.choice((self.noise(), flash(Opcode.PROBE), flash(Opcode.MAP), self.admin(), self.data()))
        if kind == 1:
            return self.data()
        if kind == 2 and rng.randrange(2) and round_ != "admin":
            return self.flash(valid=False)
        if round_ == "flash" and queue == 3:
            return self.flash(valid=True)
        if round_ == "admin":
            return attend(rows=rng.choice((0, 3, 255)), stripe_pages=rng.choice((1, 3)))
        reads = rng.randrange(4) == 0 and self.targets < (WINDOW[1] - TARGETS) // TARGET_BYTES
        line = (self.read if reads else self.attend)(dram=round_ == "flash")
        return self.spoiled(line) if kind == 4 else line


def some_table(rng: random.Random, kind: int, sparse: bool) -> bytes:
    """Words of a table: 0 and 1 in device DRAM, 2 and 3 in flash, 4 noise, 5 with an entry of another's."""
    pages = 8 if sparse else 1

    def stripe(number: int) -> bytes:
        channel = rng.randrange(2)
        # The first two zones hold data, the third does not at first.
        zone = rng.choice((0, 0, 0, 1, 2)) * ZONE
        places = [zone + pages * rng.randrange(ZONE // pages) for _ in range(2)]
        if kind < 2:
            places, channel = [pages * rng.randrange(64 // pages) for _ in range(2)], channel
        if kind == 5 and number == 1:
            places[rng.randrange(2)] = rng.choice((3 * ZONE, ZONE - 1 + (pages == 1), 8 * ZONE, 0xFFFFFF, 7 * ZONE))
        words = entry(*places, dram=int(kind < 2), channel=channel)
        if sparse:
            words += SKETCH_ENTRY.pack(
                page=rng.choice((0, 8, 8, 16, 20, 3 * ZONE)), codeword=rng.choice((0, 0, 0, 0, 3, 4)),
                written=rng.choice((1,) * 8 + (0, 2)))
        return words

    if kind == 4:
        return rng.randbytes(64)
    return b"".join(stripe(number) for number in range(3))


def mean_of_values(rng: random.Random) -> bytes:
    """Of a table; rarely one with an infinity."""
    mean = np.random.default_rng(3).standard_normal(TINY.head_dim).astype("<f4")
    if rng.randrange(24) == 0:
        mean[9] = np.inf
    return mean.tobytes().ljust(MEAN_BYTES, b"\0")


def prepare(host: Bare, rng: random.Random) -> None:
    """Data in DRAM and flash, blocks in host memory, owners."""
    device = host.device
    data = normal(TINY, 1, 64, TINY.page_bytes // 2 // TINY.head_dim).reshape(64, -1).view(np.uint8)
    image = bytearray(data.tobytes())
    image[40 * TINY.page_bytes : 41 * TINY.page_bytes] = rng.randbytes(TINY.page_bytes)    # with NaNs
    device.write_dram(0, bytes(image))
    host.nobody()
    for queue in (1, 2, 3, 4):
        host.create(queue, **({"limit": 1 << 21} if queue == WIDE else {}))
    owners(host)
    pages = [(channel, page) for page in range(2 * ZONE) for channel in range(2)]
    lines = [flash(Opcode.ERASE, channel=c, page=page) for c, page in pages if page % ZONE < STEP]
    lines += [flash(Opcode.PROGRAM, channel=c, page=page, argument=(page * 7 + c) % 40) for c, page in pages]
    for at in range(0, len(lines), 60):
        assert {c.status for c in host.run(3, *lines[at : at + 60])} == {Status.OK}
    device.write_memory(QUERIES, query(5).ljust(0x100, b"\0"))
    device.write_memory(QUERIES + 0x100, query(6, end=30).ljust(0x100, b"\0"))
    device.write_memory(QUERIES + 0x200, bytes(0x100))
    special = bytearray(query(7))
    special[query_row_bytes(32) + 64 + 11] = 0x7E    # in the second row
    device.write_memory(QUERIES + 0x300, bytes(special))


def owners(host: Bare) -> None:
    """Zones 0 to 2 are DOMAIN's, 3 OTHER's, 7 nobody's; regions likewise; queue 2 may name OTHER only."""
    for domain, zones, queues in ((DOMAIN, (0, 3), 0b11010), (OTHER, (3, 1), 0b11110)):
        host.grant(Grant.ZONES, *zones, domain)
        host.grant(Grant.REGIONS, *((0, 4) if domain == DOMAIN else (4, 4)), domain)
        host.grant(Grant.QUEUES, queues, 0, domain)
    host.grant(Grant.ZONES, 4, 4, 0)


def wrong_doorbells(host: Bare, rng: random.Random) -> list[int]:
    """Ring one that must be refused where nothing is under way; what the registers say."""
    device = host.device
    queue = rng.choice((0, 1, 2, 3, 4, 4, 5, 6, 7))
    entries = SIZES.get(queue, 4096)    # queues 5 to 7 may be there, and must not begin to work
    taken = host.heads[queue] % entries if queue in host.heads else 0
    if rng.randrange(2):
        name, value = "SUBMISSION_TAIL", rng.choice((entries, entries + 1, 4096, 1 << 16, 1 << 31))
    else:
        name = "COMPLETION_HEAD"
        value = rng.choice((entries, (taken + 1) % entries, (taken - 1) % entries, 0xFFFF_FFFF))
    device.write_register("STATUS", 0xFFFF_FFFF)
    device.write_register(f"{name}_{queue}", value)
    found = [device.read_register("STATUS") & StatusBit.INVALID_DOORBELL, device.read_register("DOORBELL_ERROR")]
    device.write_register("STATUS", 0xFFFF_FFFF)
    return found


def random_commands(device: Device, seed: int, count: int, stalls: bool = False) -> list[dict[str, Any]]:
    """Rounds of random commands in five queues; what each ended with."""
    rng = random.Random(seed)
    host = Bare(device, SIZES)
    sent = dict.fromkeys(SIZES, 0)
    prepare(host, rng)
    host.device.write_register("INTERRUPT_MASK", 0xFF)
    anything, rounds = Anything(rng), []
    while sum(sent.values()) < count:
        number = len(rounds)
        kind = rng.choice(("mixed", "mixed", "mixed", "flash", "admin"))
        found: dict[str, Any] = {"round": f"{number} {kind}", "doorbell": wrong_doorbells(host, rng)}
        host.device.write_register("INTERRUPT_AFTER", rng.choice((0, 1, 1, 2, 5)))
        if host.simulated and stalls:
            host.device.set_stalls(AxiStalls.everywhere(Stall.RANDOM, seed=number) if number % 3 == 0 else AxiStalls())
        if number % 8 == 0:
            owners(host)
        if number % 4 == 0:
            for place in range(12):
                table = mean_of_values(rng) + some_table(rng, place // 2, bool(place % 2))
                host.device.write_memory(TABLES + place * PLACE_BYTES, table.ljust(PLACE_BYTES, b"\0"))
        waiting, anything.targets = {}, 0
        for queue, entries in SIZES.items():
            size = rng.randrange(max(3 * entries // 2, 4)) if entries < 64 else rng.randrange(24)
            lines = [anything.line(queue, kind) for _ in range(size)]
            waiting[queue] = [line[:2] + i.to_bytes(2, "little") + line[4:] for i, line in enumerate(lines)]
        found["lines"] = {queue: [line.hex() for line in lines] for queue, lines in waiting.items()}
        found["completions"] = finish_all(host, waiting, rng.random())
        for queue, lines in waiting.items():
            sent[queue] += len(lines)
        found |= host.settled()
        assert found["fetched"] == found["completed"]
        found["memory"] = {first: host.device.read_memory(first, end - first) for first, end in (
            (0, COUNTS), (TEXTS, WINDOW[1] - LINE_BYTES))}    # where that ends, several commands may write
        rounds.append(found)
    return rounds


def finish_all(host: Bare, waiting: dict[int, list[bytes]], share: float) -> list[list[int]]:
    """Submit and complete all commands; what ended them, by queue and identifier."""
    found: list[Completion] = []
    pushed, taken = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)
    while any(taken[q] < len(lines) for q, lines in waiting.items()):
        for queue, lines in waiting.items():
            room = min(SIZES[queue] - 1 - (pushed[queue] - taken[queue]), len(lines) - pushed[queue])
            room = min(room, max(1, int(share * SIZES[queue])))
            if room > 0:
                host.push(queue, *lines[pushed[queue] : pushed[queue] + room])
                pushed[queue] += room
                host.ring(queue)
        host.device.wait(600)
        for queue in waiting:
            new = host.reap(queue)
            taken[queue] += len(new)
            found += new
    check_counters(found, TINY.lanes)
    for queue, lines in waiting.items():
        order = [c.identifier for c in found if c.queue == queue]
        assert sorted(order) == list(range(len(lines))), (
            f"queue {queue}: completions of {order}: {ended([c for c in found if c.queue == queue])}; commands "
            f"{[line.hex() for line in lines]}")
        jobs = [i for i in order if lines[i][0] in (Opcode.ATTEND, Opcode.READ)]
        assert jobs == sorted(jobs), f"queue {queue}: ATTENDs and READs out of order: {jobs}"
    return sorted(ended(found))


def check_rounds(found: list[dict[str, Any]], expected: list[dict[str, Any]], seed: int) -> set[int]:
    """Round by round; the statuses that there were."""
    statuses = set()
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        lines = there["lines"]
        for one, other in zip(here["completions"], there["completions"], strict=True):
            statuses.add(other[2])
            assert one == other, (f"seed {seed}, round {there['round']}: [queue, identifier, status, where, flags] "
                                  f"{one} instead of {other}: {lines[other[0]][other[1]]}")
        for key in ("doorbell", "status", "fetched", "completed", "interrupts"):
            assert here[key] == there[key], f"seed {seed}, round {there['round']}: {key}"
        for first, memory in there["memory"].items():
            places = np.flatnonzero(np.frombuffer(here["memory"][first], np.uint8) != np.frombuffer(memory, np.uint8))
            assert not len(places), f"seed {seed}, round {there['round']}: host memory at {first + places[0]:#x}"
    return statuses


@pytest.mark.campaign
@pytest.mark.parametrize(("seed", "counts", "stalls"), [(1, (10_000, 1_500), False), (2, (1_500, 500), True)],
                         ids=["at once", "stalls"])
def test_random_commands(
    seed: int, counts: tuple[int, int], stalls: bool, campaign: Callable[[int, int], int]
) -> None:
    """Each gets one completion, that of the golden device; nothing hangs, nothing else is written."""
    count = campaign(*counts)
    found = simulate(random_commands, seed=seed, count=count, stalls=stalls)
    statuses = check_rounds(found, model(random_commands, seed=seed, count=count), seed)
    never = {Status.CODEWORD_TIMEOUT, Status.ERASE_FAILED, Status.BAD_BLOCK, Status.DIE_TIMEOUT, Status.QUEUE_BUSY}
    missing = set(Status) - never - statuses
    assert not missing or count < 10_000, missing


def between_refused(device: Device) -> list[list[list[int]]]:
    """Sparse jobs on one channel, more tokens than it keeps scores for, with refused commands between them."""
    host = Bare(device)
    prepare(host, random.Random(1))

    def stripe(place: int, dram: int) -> bytes:
        return entry(place, place, dram, channel=1) + SKETCH_ENTRY.pack(page=8, written=1)

    host.device.write_memory(TABLES, mean_of_values(random.Random(1)) + stripe(16, 0))
    host.device.write_memory(TABLES + PLACE_BYTES, stripe(0, 1) * 2)
    refused = attend(rows=0)
    flash_job = {"rows": 2, "end_token": 124, "features": 32, "top_units": 1}
    slow = attend(Mode.FETCHED, **flash_job)
    wide = attend(Mode.CENTROID, stripes=2, end_token=250, table=TABLES + PLACE_BYTES, result=RESULTS + 0x400)
    after = attend(Mode.SPARF, **flash_job, result=RESULTS + 0x800)
    found = []
    for number in range(5):     # of the slot with which it begins
        for before in (0, 1):
            lines = [*[refused] * (before + number), slow, refused, wide, after, refused, slow, wide, after]
            found.append(ended(host.run(3, *lines)))
    return found


def test_refused_commands_between_sparse_jobs() -> None:
    """A slot that a refused command leaves empty may get a younger job before the walkers have come past it."""
    found, expected = simulate(between_refused, timeout_cycles=50_000), model(between_refused)
    assert found == expected
    assert {each[2] for run in expected for each in run} == {Status.OK, Status.INVALID_ROWS}


# ---------------------------------------------------------------- isolation


def victims(device: Device) -> dict[str, Any]:
    """A domain with data in flash, DRAM and host memory; another one's queue tries to reach them."""
    host = Bare(device)
    transport = host.device
    host.nobody()
    images = normal(TINY, 11, 32, TINY.page_bytes // 2 // TINY.head_dim).reshape(32, -1)
    transport.write_dram(0, images.view(np.uint8).tobytes())
    victim, thief = (0x20000, 0x24000), (0x28000, 0x2C000)
    host.create(4, base=victim[0], limit=victim[1])
    host.create(3, base=thief[0], limit=thief[1])
    for domain, queue, number in ((OTHER, 4, 3), (DOMAIN, 3, 2)):
        host.grant(Grant.ZONES, number, 1, domain)
        host.grant(Grant.REGIONS, domain - 1, 1, domain)
        host.grant(Grant.QUEUES, 1 << queue, 0, domain)
    mine, other = 2 * ZONE, 3 * ZONE
    pages = [STEP * page + unit for page in range(8) for unit in range(2)]
    for queue, domain, first, dram in ((4, OTHER, other, 16), (3, DOMAIN, mine, 0)):
        lines = [flash(opcode, channel=c, page=first + page, domain=domain, argument=argument)
                 for c in range(2) for opcode, each in ((Opcode.ERASE, pages[:2]), (Opcode.PROGRAM, pages))
                 for page, argument in zip(each, [0] * 2 if opcode is Opcode.ERASE else range(dram, dram + 16),
                                           strict=True)]
        assert {c.status for c in host.run(queue, *lines)} == {Status.OK}
    last = other + ZONE - 1

    def job(base: int, *entries: bytes, **fields: int) -> bytes:
        transport.write_memory(base, query(3).ljust(0x100, b"\0"))
        transport.write_memory(base + 0x400, b"".join(entries).ljust(LINE_BYTES, b"\0"))
        return attend(**{"stripes": len(entries), "end_token": 16 * len(entries), "query": base,
                         "table": base + 0x400, "result": base + 0x800, **fields})

    def asked() -> list[Any]:
        """What the victim sees of its data."""
        found = ended(host.run(4, job(victim[0], entry(other, other + 1, channel=1), entry(other + 4, other + 5),
                                      entry(16, 20, 1), domain=OTHER)))
        return [found, transport.read_memory(victim[0] + 0x800, 192), transport.read_dram(0, 32 * TINY.page_bytes)]

    found: dict[str, Any] = {"before": asked()}
    before = transport.read_memory(0, thief[0])
    base = thief[0]
    good = entry(mine, mine + 1)
    # Whatever the table says, what is not the domain's own is refused before anything is read.
    found["tables"] = []
    for name, entries, fields in (
        ("flash", (good, entry(mine, other)), {}),
        ("flash of another channel", (good, entry(other, mine, channel=1)), {}),
        ("flash beyond", (entry(mine, last + 1), good), {}),
        ("run into", (entry(other - 1, mine),), {"stripe_pages": 2, "end_token": 32}),
        ("dram", (good, entry(0, 16, 1)), {}),
        ("dram run into", (entry(15, 0, 1),), {"stripe_pages": 2, "end_token": 32}),
        ("dram far", (entry(0xFFFFFF, 0, 1),), {}), ("no such zone", (entry(8 * ZONE + mine, mine),), {}),
        ("good", (good,), {}),
    ):
        found["tables"].append([name, *ended(host.run(3, job(base, *entries, **fields)))])
    lines = {
        **{f"forged domain {domain:#x}": attend(query=base, table=base + 0x400, result=base + 0x800, domain=domain)
           for domain in (OTHER, 0, 0x100 | DOMAIN, 0x100 | OTHER, OTHER << 8, 0xFFFF)},
        **{f"{name} in the other's window": attend(**{
            "query": base, "table": base + 0x400, "result": base + 0x800, name: victim[0] + 0x800})
           for name in ("query", "table", "result")},
        "result before its window": attend(query=base, table=base + 0x400, result=base - 64),
        "result over the end": attend(query=base, table=base + 0x400, result=thief[1] - 128),
        "rings": attend(query=base, table=base + 0x400, result=RINGS),
        "counters there": counters(result=victim[0]),
        "counters to the rings": counters(result=host.completion(4)),
        **{f"program {name}": flash(Opcode.PROGRAM, **fields) for name, fields in (
            ("theirs", {"page": other + 2}), ("with their DRAM", {"page": mine + 2, "argument": 16}),
            ("as them", {"page": other + 2, "argument": 16, "domain": OTHER}), ("as nobody", {"page": 2, "domain": 0}),
            ("nobody's", {"page": 2}), ("with far DRAM", {"page": mine + 2, "argument": 0xFFFFFF}))},
        **{f"erase {name}": flash(Opcode.ERASE, **fields) for name, fields in (
            ("theirs", {"page": other}), ("as them", {"page": other, "domain": OTHER}),
            ("as nobody", {"page": other, "domain": 0}))},
        **{opcode.name: line for opcode, line in (
            (Opcode.IDENTIFY, DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, result=base)),
            (Opcode.GRANT, grant(Grant.ZONES, 3, 1, DOMAIN)), (Opcode.CREATE_QUEUE, host.create_line(5)),
            (Opcode.DELETE_QUEUE, QUEUE_COMMAND.pack(opcode=Opcode.DELETE_QUEUE, queue=4)),
            (Opcode.MAP, flash(Opcode.MAP, page=mine, argument=3)), (Opcode.PROBE, flash(Opcode.PROBE, page=other)))},
    }
    found["lines"] = dict(zip(lines, ended(host.run(3, *lines.values())), strict=True))
    found["doorbells"] = []
    for name in ("SUBMISSION_TAIL_5", "COMPLETION_HEAD_4"):
        transport.write_register(name, 63)
        found["doorbells"].append(transport.read_register("DOORBELL_ERROR"))
    found["untouched"] = transport.read_memory(0, thief[0]) == before
    found["after"] = asked()
    return found


@pytest.mark.parametrize("drive", [False, True])
def test_isolation(drive: bool) -> None:
    """Zones, regions, windows, rings and admin commands of others are out of reach, and untouched."""
    found, expected = simulate(victims, flash=NandSettings() if drive else FAST), model(victims)
    assert not differences(found, expected)
    assert expected["untouched"]
    assert expected["before"] == expected["after"]
    assert expected["before"][0] == [[4, 0, Status.OK, 0, 0]]
    assert {each[1][2] for each in expected["tables"][:-1]} == {Status.NOT_OWNED}
    assert expected["tables"][-1][1][2] is Status.OK
    refused = {Status.NOT_PERMITTED, Status.NOT_OWNED, Status.INVALID_ADDRESS, Status.INVALID_FIELD}
    assert {each[2] for each in expected["lines"].values()} <= refused


# ---------------------------------------------------------------- many at a time


def set_up(host: Bare, queues: tuple[int, ...] = (1, 2, 3)) -> None:
    """Queues that may do everything; tokens in device DRAM and a job on them."""
    transport = host.device
    host.nobody()
    for queue in queues:
        host.create(queue)
    host.grant(Grant.ZONES, 0, TINY.part.blocks, DOMAIN)
    host.grant(Grant.REGIONS, 0, MAX_REGIONS, DOMAIN)
    host.grant(Grant.QUEUES, 0xFF, 0, DOMAIN)
    images = normal(TINY, 11, 32, TINY.page_bytes // 2 // TINY.head_dim).reshape(32, -1)
    transport.write_dram(0, images.view(np.uint8).tobytes())
    transport.write_memory(QUERIES, query(3))
    transport.write_memory(TABLES, entry(0, 16, 1).ljust(LINE_BYTES, b"\0"))


def in_flight(device: Device) -> dict[str, Any]:
    """64 commands of three queues at once: pages are programmed meanwhile."""
    host = Bare(device)
    transport = host.device
    set_up(host)
    found: dict[str, Any] = {}
    transport.write_register("INTERRUPT_AFTER", 1)
    jobs = [attend(result=RESULTS + i * 0x200) for i in range(40)]
    pages = [flash(Opcode.PROGRAM, channel=i % 2, page=STEP * (i // 8) + i // 2 % 4, argument=i) for i in range(16)]
    reads = [counters(result=COUNTS + i * 0x100) for i in range(8)]
    waiting = {1: jobs, 2: pages, 3: reads}
    before = transport.read_register("COMPLETED")
    for queue, lines in waiting.items():
        host.push(queue, *(line[:2] + i.to_bytes(2, "little") + line[4:] for i, line in enumerate(lines)))
    for queue in (2, 1, 3):
        host.ring(queue)
    completions: list[Completion] = []
    while len(completions) < 64:
        transport.wait(600)
        for queue in waiting:
            completions += host.reap(queue)
    check_counters(completions, TINY.lanes)
    found["completed"] = transport.read_register("COMPLETED") - before
    found["all"] = sorted(ended(completions))
    found["order"] = [(c.queue, c.identifier) for c in completions]
    found["bits"] = transport.read_memory(RESULTS, 40 * 0x200)
    found["settled"] = host.settled() | {"fetched": 0, "completed": 0}
    # And what was programmed can be read.
    transport.write_memory(TABLES, (entry(0, STEP) + entry(1, 1 + STEP)).ljust(LINE_BYTES, b"\0"))
    found["read"] = [ended(host.run(1, attend(stripes=2, end_token=32))), transport.read_memory(RESULTS, 192)]
    return found


def test_64_commands_in_flight() -> None:
    """On the whole drive: jobs overtake pages that are being programmed, and stay in order themselves."""
    found, expected = simulate(in_flight, flash=NandSettings()), model(in_flight)
    order = found.pop("order")
    expected.pop("order")
    assert not differences(found, expected)
    assert {each[2] for each in expected["all"]} == {Status.OK}
    for queue in (1, 3):
        assert [i for q, i in order if q == queue] == list(range(40 if queue == 1 else 8))
    pages = [i for q, i in order if q == 2]
    assert pages != sorted(pages), "no page overtook another"
    # Rung first, and slow: nearly all jobs end before the last page.
    assert order.index((1, 20)) < order.index((2, pages[-1]))
    assert order.index((3, 7)) < order.index((2, pages[-1]))


def interrupts(device: Device) -> dict[str, Any]:
    """INTERRUPT_AFTER and INTERRUPT_MASK; a completion ring that nobody empties."""
    host = Bare(device, {1: 8, 2: 8})
    transport = host.device
    set_up(host, (1, 2))
    found: dict[str, Any] = {}
    read = transport.read_register

    def idle() -> int:
        while read("STATUS") & StatusBit.BUSY:
            pass
        return read("INTERRUPTS")

    def silent() -> bool:
        patience, transport.timeout_cycles = getattr(transport, "timeout_cycles", None), 2000
        try:
            transport.wait(600)
        except DeviceTimeoutError:
            return True
        finally:
            transport.timeout_cycles = patience
        return False

    reads = [counters(result=COUNTS)] * 7
    for after in (0, 1, 3, 7, 100):
        transport.write_register("INTERRUPT_AFTER", after)
        host.push(1, *reads)
        host.ring(1)
        taken = 0
        while taken < 7:
            transport.wait(600)
            assert read("INTERRUPTS") == 1 << 1
            there = len(host.reap(1))
            assert there >= min(after, 7 - taken), (after, there)
            taken += there
        found[f"after {after}"] = [taken, idle()]
    transport.write_register("INTERRUPT_AFTER", 1)
    transport.write_register("INTERRUPT_MASK", 1 << 2)
    host.push(1, *reads)
    host.ring(1)
    found["masked"] = [idle(), silent()]
    # Its completion ring is full: what is rung now must wait, but not the other queue's.
    host.push(1, *[counters(result=COUNTS + 0x100)] * 7)
    host.ring(1)
    before = read("FETCHED")
    found["full"] = [idle(), read("FETCHED") - before, read("STATUS"), silent()]
    host.push(2, *reads[:3])
    host.ring(2)
    transport.wait(600)
    found["other"] = [idle(), read("FETCHED") - before, len(host.reap(2))]
    found["quiet"] = [idle(), silent()]
    transport.write_register("INTERRUPT_MASK", 0b110)
    found["unmasked"] = silent()
    transport.write_register("COMPLETION_HEAD_1", (host.heads[1] + 2) % 8)
    host.heads[1] += 2
    found["two taken"] = [idle(), read("FETCHED") - before]
    found["rest"] = [len(host.reap(1)), idle(), read("FETCHED") - before]
    found["last"] = [len(host.reap(1)), idle(), read("FETCHED") - before, silent()]
    return found


def test_interrupts() -> None:
    found, expected = simulate(interrupts), model(interrupts)
    assert not differences(found, expected)
    assert expected["masked"] == [0b010, True]
    assert expected["full"] == [0b010, 0, StatusBit.READY, True]
    assert expected["other"] == [0b110, 3, 3]
    assert expected["last"][1:] == [0, 10, True]


# ---------------------------------------------------------------- ends in the middle of work


def good_work(host: Bare) -> list[Any]:
    """A page is erased, written and read, in queues that are there."""
    transport = host.device
    found = [ended(host.run(2, *(flash(opcode, page=7 * ZONE) for opcode in (Opcode.ERASE, Opcode.PROGRAM))))]
    transport.write_memory(TABLES, entry(7 * ZONE, 7 * ZONE).ljust(LINE_BYTES, b"\0"))
    transport.write_memory(RESULTS, bytes(192))
    found += [ended(host.run(1, attend())), ended(host.run(3, counters()))]
    return found


def deleted(device: Device) -> dict[str, Any]:
    """DELETE_QUEUE while pages are being programmed."""
    host = Bare(device)
    transport = host.device
    set_up(host)
    delete = QUEUE_COMMAND.pack(opcode=Opcode.DELETE_QUEUE, queue=2)
    pages = [flash(Opcode.PROGRAM, channel=i % 2, page=STEP * (i // 4) + i // 2 % 2, argument=i, identifier=i)
             for i in range(16)]
    host.push(2, *pages)
    host.ring(2)
    while transport.read_register("FETCHED") == transport.read_register("COMPLETED") and host.simulated:
        pass
    (first,) = host.run(0, delete)
    (create,) = host.run(0, host.create_line(2))
    transport.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    transport.write_register("SUBMISSION_TAIL_2", 0)
    refused = transport.read_register("STATUS") & StatusBit.INVALID_DOORBELL
    transport.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    # A queue that was removed raises no interrupt.
    while transport.read_register("STATUS") & StatusBit.BUSY:
        pass
    done = host.reap(2, take=False)
    interrupts = transport.read_register("INTERRUPTS")
    again = host.run(0, delete, delete)
    host.create(2)
    good = good_work(host)
    return {"first": first.status, "create": create.status, "refused": refused, "done": sorted(ended(done)),
            "interrupts": interrupts, "again": [c.status for c in again], "good": good, "settled": host.settled()}


def test_delete_with_work_under_way() -> None:
    found, expected = simulate(deleted, flash=NandSettings()), model(deleted)
    assert found["first"] is Status.QUEUE_BUSY
    assert found["create"] is Status.INVALID_QUEUE
    assert found["refused"]
    assert found["interrupts"] == 0
    # All that were fetched completed in the old ring; the others never were.
    assert 0 < len(found["done"]) < 16
    assert all(each in expected["done"] for each in found["done"])
    assert found["again"] == [Status.OK, Status.INVALID_QUEUE]
    assert found["good"] == expected["good"]


def cut(device: Device, delays: list[int], power: bool) -> dict[str, Any]:
    """Work in all queues, cut off by a reset or a loss of power after some cycles; then everything works."""
    host = Bare(device)
    transport = host.device
    set_up(host)
    found: dict[str, Any] = {"good": [], "lost": []}
    for number, delay in enumerate(delays):
        erase = [flash(Opcode.ERASE, channel=c, page=unit) for c in range(2) for unit in range(4)]
        assert {c.status for c in host.run(2, *erase)} == {Status.OK}
        pages = [flash(Opcode.PROGRAM, channel=i % 2, page=STEP * (i // 8) + i // 2 % 4, argument=i) for i in range(16)]
        host.push(2, *pages)
        host.push(1, *[attend(result=RESULTS + i * 0x200) for i in range(40)])
        host.push(3, *[counters()] * 20)
        host.push(0, *[flash(Opcode.PROBE, channel=i % 2, page=5 * ZONE) for i in range(6)])
        if power:
            transport.cut_power(delay)
        for queue in (2, 1, 3, 0):
            host.ring(queue)
        if power:
            with pytest.raises(DeviceTimeoutError, match="lost its power"):
                while True:
                    transport.wait(600)
                    for queue in range(4):
                        host.reap(queue)
            assert transport.read_register("STATUS") == StatusBit.READY
            assert transport.read_register("FETCHED") == transport.read_register("INTERRUPTS") == 0
            # The simulated drive is only reset, so that its table of owners is not that of a power-up; all is set anew.
            host.begin()
            set_up(host)
        else:
            transport.run_cycles(delay)
            found["lost"].append(transport.read_register("FETCHED") != transport.read_register("COMPLETED"))
            host.reset()
            assert transport.read_register("FETCHED") == transport.read_register("COMPLETED") == 0
            for queue in (1, 2, 3):
                host.create(queue)
        assert not transport.read_register("STATUS") & ~(StatusBit.READY | StatusBit.STALE_CODEWORD)
        found["good"].append(good_work(host))
        found[number] = host.settled() | {"fetched": 0, "completed": 0}
    return found


def untouched(device: Device) -> dict[str, Any]:
    """Good work only."""
    host = Bare(device)
    set_up(host)
    good = good_work(host)
    return {"good": good, "settled": host.settled() | {"fetched": 0, "completed": 0}}


@pytest.mark.parametrize(("power", "drive"), [(False, False), (False, True), (True, True)])
def test_cut_off_in_the_middle_of_work(power: bool, drive: bool) -> None:
    delays = [3000, 9000, 14_000] if power else [5, 60, 150, 400, 900, 1500, 2500, 4000]
    found = simulate(cut, flash=NandSettings() if drive else FAST, delays=delays, power=power)
    expected = model(untouched)
    for number, good in enumerate(found["good"]):
        assert not differences(good, expected["good"])
        assert not differences(found[number], expected["settled"])
    if not power:
        assert found["lost"].count(True) >= (len(delays) if drive else 4), "hardly anything was under way"
