"""Loader: what lanes and later stages get from good and bad commands, under stalls."""

import random
import struct
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hdl.bench import read_memory
from tests.hdl.compiled import resettable, simulation

from kvattic.golden import first_pass
from kvattic.spec.commands import (
    COMMAND,
    DATA_COMMAND,
    FLASH_COMMAND,
    GRANT_COMMAND,
    QUEUE_COMMAND,
    READ_BYTES,
    READ_COMMAND,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    Mode,
    Opcode,
    Status,
    fp32_block_bytes,
    lines,
    query_row_bytes,
    read_token_bytes,
    result_row_bytes,
)
from kvattic.spec.config import BOARD, GQA, PAPER, TINY, Config
from kvattic.spec.formats import SCALE_BITS, SCORE_WINDOW_FRACTION, Element
from kvattic.spec.nand import PSLC, TINY_PART
from kvattic_hdl.frontend.checks import Window
from kvattic_hdl.frontend.loader import Loader
from kvattic_hdl.lib.shapes import K_OFFSET_BITS, Shapes, operation_code

BASE, LIMIT = 0x1_FFFF_0000, 0x2_0008_0000  # the window crosses a 32-bit boundary
TABLES = BASE + 0x20000
COMMANDS = 0x9_0000_0040
TOP = (1 << 24) - 1
LOADS = ("query", "record", "scale", "chosen", "stripe", "sketch")


@dataclass
class Host:
    """Host memory by words, lines that answer with an error, and what the Loader gave."""

    words: dict = field(default_factory=dict)
    bad: set = field(default_factory=set)
    loads: list = field(default_factory=list)
    starts: list = field(default_factory=list)
    jobs: list = field(default_factory=list)
    means: list = field(default_factory=list)
    flash: list = field(default_factory=list)
    admin: list = field(default_factory=list)
    when: list = field(default_factory=list)
    errors: int = 0
    last_load: int = -10

    def put(self, address, data):
        for i in range(0, len(data), 8):
            self.words[address + i] = int.from_bytes(data[i : i + 8], "little")


def fields_of(view, layout):
    return {name: view[name] for name, _ in layout}


def run(
    config,
    host,
    batches,
    *,
    latency=20,
    stall=0.0,
    seed=0,
    job_stall=0.0,
    hold=0,
    crowded=0,
    reset_between=False,
    cuts=(),
    queues=None,
    foreign=(),
    flash_ready=None,
    windows=None,
    domain_queues=0xFF,
    owned=(1, 1),
):
    """Run batches (counts of commands); `hold`: cycles until a slot is freed; `queues`: of each command.

    After a start the lanes have no room for another list for `crowded` cycles.

    The table's entries of the stripes `foreign` are not the domain's.  `flash_ready`: cycles in which flash commands
    are taken, all if not given.  `windows`: of queues that are created when the first admin command was taken.

    Before them the first batch is begun, and stopped and reset after so many cycles, for each of the `cuts`.
    """
    dut, sim = simulation(resettable, Loader, config)
    reset = dut.test_reset
    shapes = Shapes(config)
    rng = random.Random(seed)
    sim.add_clock(1e-6)
    cycle = [0]

    async def watch(ctx):
        while True:
            samples = await ctx.tick().sample(
                dut.load_valid,
                dut.load,
                dut.start_valid,
                dut.start,
                dut.mean_valid,
                dut.mean,
                dut.jobs.valid,
                dut.jobs.ready,
                dut.jobs.payload,
                dut.flash.valid,
                dut.flash.ready,
                dut.flash.payload,
                dut.admin.valid,
                dut.admin.ready,
                dut.admin.payload,
                dut.bus_error,
            )
            load_valid, load, start_valid, start, mean_valid, mean, *samples = samples[2:]
            job_valid, job_ready, job, flash_valid, flash_taken, flash, *samples = samples
            admin_valid, admin_ready, admin, error = samples
            cycle[0] += 1
            host.errors += error
            assert not (load_valid and start_valid), "a load together with start"
            assert not (start_valid and job_valid), "a job in the cycle of its start"
            assert not (load_valid and cycle[0] < full_until[0]), "a load without room"
            if load_valid:
                assert sum(load[name] for name in LOADS) == 1
                host.last_load = cycle[0]
                host.loads.append(fields_of(load, shapes.load))
            if mean_valid:
                assert not start_valid
                host.means.append((len(host.jobs), mean.slot, mean.index, mean.data))
            if start_valid:
                assert cycle[0] >= host.last_load + 2, "a start too early"
                host.starts.append((len(host.loads), fields_of(start, shapes.start)))
                host.when.append(cycle[0])
                full_until[0] = cycle[0] + crowded
            if job_valid and job_ready:
                host.jobs.append((len(host.starts), len(host.loads), fields_of(job, shapes.job)))
                freed.append(cycle[0] + hold)
            if admin_valid and admin_ready:
                host.admin.append(fields_of(admin, shapes.admin_command))
                created.append(admin.number)
            if flash_valid and flash_taken:
                values = {name: flash.operation[name] for name, _ in shapes.operation}
                values |= {"channel": flash.channel, "dram_page": flash.dram_page}
                host.flash.append((len(host.jobs), values))

    freed, created, full_until = deque(), deque(), [0]

    async def create(ctx):
        """What Admin says, some time after it took a CREATE_QUEUE."""
        while True:
            if created and windows is not None and created[0] in windows:
                await ctx.tick().repeat(3)
                ctx.set(dut.create_valid, 1)
                ctx.set(dut.create_queue, created[0])
                await ctx.tick()
                ctx.set(dut.create_valid, 0)
            if created:
                created.popleft()
            await ctx.tick()

    async def take(ctx, ready):
        while True:
            ctx.set(ready, rng.random() >= job_stall)
            await ctx.tick()

    async def take_jobs(ctx):
        await take(ctx, dut.jobs.ready)

    async def take_admin(ctx):
        await take(ctx, dut.admin.ready)

    async def take_flash(ctx):
        if flash_ready is None:
            await take(ctx, dut.flash.ready)
        while True:
            ctx.set(dut.flash.ready, cycle[0] in flash_ready)
            await ctx.tick()

    async def owners(ctx):
        """Says in the cycle behind an entry what is said of its stripe."""
        while True:
            _, _, valid, load, number, clear = await ctx.tick().sample(
                dut.load_valid, dut.load, dut.entry_number, dut.owner_clear)
            if clear:
                ctx.set(dut.not_owned, 0)
            elif valid and load.stripe and number in foreign and not ctx.get(dut.not_owned):
                ctx.set(dut.not_owned, 1)
                ctx.set(dut.not_owned_where, number)

    async def fetch(ctx, first, count):
        """Offers the lines of these commands, in order, but for those that are held where flash commands wait."""
        waiting = list(range(first, first + count))
        while waiting:
            held = ctx.get(dut.hold)
            candidates = waiting if flash_ready is not None else waiting[:1]
            number = next((n for n in candidates if not held >> queue_of(n) & 1), None)
            if number is None or rng.random() < stall:
                await ctx.tick()
                continue
            ctx.set(dut.fetch.payload.line, (COMMANDS >> 6) + number)
            ctx.set(dut.fetch.payload.queue, queue_of(number))
            ctx.set(dut.fetch.valid, 1)
            await ctx.tick().until(dut.fetch.ready)
            ctx.set(dut.fetch.valid, 0)
            waiting.remove(number)
            await ctx.tick().repeat(3)

    def queue_of(number):
        return queues[number] if queues else 0

    async def free(ctx):
        while True:
            ctx.set(dut.freed, bool(freed and freed[0] <= cycle[0]))
            ctx.set(dut.lists_room, cycle[0] >= full_until[0] or cycle[0] < full_until[0] - crowded + 4)
            if freed and freed[0] <= cycle[0]:
                freed.popleft()
            await ctx.tick()

    async def bench(ctx):
        ctx.set(dut.admin_base, BASE)
        ctx.set(dut.admin_limit, LIMIT)
        ctx.set(dut.domain_queues, domain_queues)
        ctx.set(dut.lists_room, 1)
        ctx.set(dut.page_owned, owned[0])
        ctx.set(dut.dram_owned, owned[1])
        ctx.set(dut.create_valid, 1)
        await ctx.tick()
        ctx.set(dut.create_valid, 0)
        await ctx.tick()    # the upper halves of the window's bounds
        ctx.set(dut.admin_base, 0)
        ctx.set(dut.admin_limit, 0)
        done = 0

        async def soft_reset():
            ctx.set(dut.stop, 1)
            while not ctx.get(dut.quiet):
                assert not ctx.get(dut.flash.valid), "a flash command that the reset would forget"
                await ctx.tick()
            ctx.set(reset, 1)
            await ctx.tick()
            ctx.set(reset, 0)
            ctx.set(dut.stop, 0)

        for cycles in cuts:
            begun = cycle[0]
            for number in range(batches[0]):
                ctx.set(dut.fetch.payload.line, (COMMANDS >> 6) + number)
                ctx.set(dut.fetch.valid, 1)
                while cycle[0] < begun + cycles:
                    taken = ctx.get(dut.fetch.ready)
                    await ctx.tick()
                    if taken:
                        break
                ctx.set(dut.fetch.valid, 0)
            while cycle[0] < begun + cycles:
                await ctx.tick()
            await soft_reset()
            for seen in (host.loads, host.starts, host.jobs, host.means, freed):
                seen.clear()
        for number, count in enumerate(batches):
            if reset_between and number:
                await soft_reset()
            await fetch(ctx, done, count)
            done += count
            while len(host.jobs) + len(host.flash) + len(host.admin) < done:
                await ctx.tick()
            while freed:
                await ctx.tick()
            await ctx.tick().repeat(3)
        await ctx.tick().repeat(20)
        assert not ctx.get(dut.bus.arvalid)
        assert ctx.get(dut.quiet)

    sim.add_testbench(
        read_memory(dut.bus, lambda address: host.words.get(address, 0), latency=latency, stall=stall, seed=seed,
                    bad=host.bad, response=3), background=True
    )
    sim.add_testbench(watch, background=True)
    sim.add_testbench(free, background=True)
    sim.add_testbench(take_jobs, background=True)
    sim.add_testbench(take_flash, background=True)
    sim.add_testbench(take_admin, background=True)
    sim.add_testbench(owners, background=True)
    if windows is not None:
        sim.add_testbench(create, background=True)
    sim.add_testbench(bench)
    sim.run()
    assert len(host.jobs) + len(host.flash) + len(host.admin) == sum(batches)


def element(rng, config):
    """A finite number's bits."""
    form = config.element.encoding
    return (
        rng.getrandbits(1) << 15
        | rng.randint(0, form.exponent_max) << form.fraction_bits
        | rng.getrandbits(form.fraction_bits)
    )


def lane_stripes(config):
    return config.ring_codewords // config.codewords_per_page


def fit(config, command):
    """The command with as many stripes as its tokens take."""
    tokens = command["end_token"] - command["base_token"]
    stripes = -(-tokens // (config.tokens_per_page * command["stripe_pages"]))
    return command | {"stripes": min(max(stripes, 0), 0xFFFF)}


def some_table(rng, config, command):
    """Valid entries for all stripes."""
    limit = lane_stripes(config) // command["stripe_pages"]
    lanes = list(range(config.lanes)) * limit
    mode = command.get("mode", Mode.DENSE)
    rng.shuffle(lanes)
    table = Table(
        {
            "channel": lane + config.lanes * rng.randrange(config.lane_channels),
            "key_page": rng.getrandbits(24),
            "value_page": rng.getrandbits(24),
            "flags": rng.getrandbits(1 if mode == Mode.DENSE else 2),
        }
        for lane in lanes[: command["stripes"]]
    )
    if mode != Mode.DENSE:
        table.sketches = [
            {
                "page": rng.getrandbits(24),
                "codeword": rng.randrange(config.codewords_per_page) if mode == Mode.CENTROID else 0,
                "written": rng.getrandbits(1) if entry["flags"] else 1,
            }
            for entry in table
        ]
    if has_mean(command):
        table.mean = [rng.choice((0, 0x8000_0000, fp32(rng), fp32(rng))) for _ in range(config.head_dim)]
    return table


def has_mean(command):
    return command.get("mode", Mode.DENSE) in (Mode.SPARF, Mode.FETCHED)


def fp32(rng):
    """Bits of a finite fp32."""
    return rng.getrandbits(1) << 31 | rng.randrange(255) << 23 | rng.getrandbits(23)


class Table(list):
    """Entries; in sparse modes also sketch entries, and the mean of V as fp32 bits."""

    sketches = None
    mean = ()

    def __bytes__(self):
        records = [TABLE_ENTRY.pack(**entry) for entry in self]
        if self.sketches is not None:
            assert len(self.sketches) == len(self)
            records = [a + SKETCH_ENTRY.pack(**b) for a, b in zip(records, self.sketches, strict=True)]
        mean = struct.pack(f"<{len(self.mean)}I", *self.mean)
        return mean.ljust(fp32_block_bytes(len(self.mean)), b"\0") + b"".join(records)


def unit_tokens(config, command):
    return 1 if command["mode"] == Mode.SPARF else config.tokens_per_codeword << command.get("unit_bits", 0)


def selection(rng, config, mode, length):
    """A sparse command's own fields."""
    command = {"mode": mode, "stripe_pages": config.group_pages}
    if mode != Mode.SPARF:
        command["unit_bits"] = rng.randint(0, config.unit_bits_max)
    unit = unit_tokens(config, command)
    most = -(-length // unit)
    units = rng.choice((1, most, rng.randint(1, most)))
    most = min(units * unit, 0xFFFF)
    command |= {"top_units": units, "local_tokens": rng.choice((0, most, rng.randint(0, most))),
                "sinks": rng.choice((0, 0xFFFF, rng.getrandbits(16)))}
    if has_mean(command):
        command["features"] = rng.choice((1, config.head_dim, rng.randint(1, config.head_dim)))
    return command


def table_room(config):
    """Bytes that every table fits in."""
    return fp32_block_bytes(config.head_dim) + lines(config.lanes * lane_stripes(config) * 8) * 64


def good_command(rng, config, number=0, rows=None, mode=Mode.DENSE):
    """Fields of a valid command, its rows (start, end, tree, q), its table."""
    rows = rows or rng.randint(1, config.rows)
    length = rng.choice((1, config.max_tokens, rng.randint(1, config.max_tokens)))
    base = rng.randint(0, (1 << 24) - 1 - length)
    query = (
        BASE + 64 * rng.randint(0, 255)
        if rng.random() < 0.8
        else LIMIT - rows * query_row_bytes(config.head_dim)
    )
    result = BASE if rng.random() < 0.3 else LIMIT - rows * result_row_bytes(config.head_dim)
    command = {
        "opcode": Opcode.ATTEND,
        "identifier": rng.getrandbits(16),
        "rows": rows,
        "stripe_pages": 1 << rng.randrange(min(lane_stripes(config).bit_length(), 8)),
        "base_token": base,
        "end_token": base + length,
        "tree_token": rng.choice((base + length, base, 0, TOP, 1 << 23)),
        "scale": rng.randint(1, 254) << 23 | rng.getrandbits(23),
        "query": query,
        "result": result,
        "table": TABLES + number * table_room(config),
    }
    if mode != Mode.DENSE:
        command |= selection(rng, config, mode, length)
    command = fit(config, command)
    numbers = (0, base, base + length - 1, base + length, base + length + 1, 1 << 24, 0xFFFF_FFFF)
    block = [
        (
            rng.choice(numbers),
            rng.choice(numbers),
            rng.getrandbits(32),
            [element(rng, config) for _ in range(config.head_dim)],
        )
        for _ in range(rows)
    ]
    return command, block, some_table(rng, config, command)


def query_bytes(config, block):
    out = b""
    for start, end, tree, q in block:
        out += ROW.pack(start_token=start, end_token=end, tree=tree)
        out += struct.pack(f"<{config.head_dim}H", *q).ljust(
            query_row_bytes(config.head_dim) - 64, b"\0"
        )
    return out


def k_offset(config, exponent):
    return exponent - 127 + SCORE_WINDOW_FRACTION - 2 * config.element.encoding.offset


def expected_start(config, command, slot, epoch):
    return {
        "slot": slot,
        "epoch": epoch,
        "stripe_bits": command["stripe_pages"].bit_length() - 1,
        "last_token": command["base_token"]
        + (command["stripes"] - 1) * command["stripe_pages"] * config.tokens_per_page,
        "end_token": command["end_token"],
        "tree_token": command["tree_token"],
        "k_offset": k_offset(config, command["scale"] >> 23),
        "scale": 1 << 23 | command["scale"] & (1 << 23) - 1,
        "mode": command.get("mode", 0),
        "read": command["opcode"] == Opcode.READ,
        "unit_bits": command.get("unit_bits", 0),
        "features": command.get("features", 0),
        "local_token": max(0, command["end_token"] - command.get("local_tokens", 0)),
        "sinks": command.get("sinks", 0),
    }


def check_lanes(config, command, block, table, loads, slot):
    """What the lanes hold after these loads."""
    q, records, stripes, sketches, chosen, scales = {}, {}, [], [], [], {}
    for load in loads:
        assert load["slot"] == slot
        if load["stripe"]:
            stripes.append((load["data"], load["start"], load["last"]))
            continue
        if load["sketch"]:
            sketches.append(load["data"])
            assert len(sketches) == len(stripes)
            continue
        if load["chosen"]:
            assert load["data"] >> 8 == len(chosen)
            chosen.append(load["data"] & 0xFF)
            continue
        if load["scale"]:
            scales[load["row"]] = load["data"]
            continue
        assert not stripes  # a record would empty the lists
        if load["query"]:
            q[load["row"], load["beat"]] = load["data"]
        else:
            records[load["row"]] = (load["start"], load["end"], load["tree"])
    step = command["stripe_pages"] * config.tokens_per_page
    assert stripes == [
        (
            int.from_bytes(TABLE_ENTRY.pack(**entry), "little"),
            command["base_token"] + i * step,
            i == len(table) - 1,
        )
        for i, entry in enumerate(table)
    ]
    assert sketches == [int.from_bytes(SKETCH_ENTRY.pack(**entry), "little") for entry in table.sketches or ()]
    if has_mean(command):
        query = np.array([row[3] for row in block], np.uint16)
        best = first_pass.top_features(query, command["features"], config.element)
        assert chosen == best.tolist()
        significands, exponents = first_pass.approximate_scales(query, best, config.element, command["scale"])
        mask = (1 << K_OFFSET_BITS) - 1
        assert scales == {
            row: significand | (k_offset(config, exponent) & mask) << SCALE_BITS
            for row, (significand, exponent) in enumerate(zip(significands.tolist(), exponents.tolist(), strict=True))
        }
    else:
        assert not chosen and not scales
    per_beat = config.elements_per_beat
    assert len(q) == config.rows * config.beats_per_token
    assert len(records) == config.rows
    for row in range(config.rows):
        if row < len(block):
            start, end, tree, elements = block[row]
            assert records[row] == (min(start, TOP), min(end, command["end_token"]), tree)
        else:
            elements = [0] * config.head_dim
            assert records[row][:2] == (0, 0)
        for beat in range(config.beats_per_token):
            packed = struct.pack(f"<{per_beat}H", *elements[beat * per_beat :][:per_beat])
            assert q[row, beat] == int.from_bytes(packed, "little"), (row, beat)


def check_good(config, host, jobs, epochs=1):
    """All of these (command, block, table) were loaded, started and handed on, in order."""
    assert len(host.starts) == len(host.jobs) == len(jobs)
    before = 0
    for number, ((command, block, table), (loads, start), (starts, loads_then, job)) in enumerate(
        zip(jobs, host.starts, host.jobs, strict=True)
    ):
        slot = number % config.jobs_in_flight
        check_lanes(config, command, block, table, host.loads[before:loads], slot)
        before = loads
        assert (starts, loads_then) == (number + 1, loads)
        assert start == expected_start(
            config, command, slot, (number // config.jobs_in_flight + epochs) % 16
        )
        assert job == {
            "slot": slot,
            "lanes": 1,
            "queue": 0,
            "identifier": command["identifier"],
            "rows": command["rows"] or 1,
            "result": command["result"],
            "status": Status.OK,
            "where": 0,
            "mode": command.get("mode", 0),
            "read": command["opcode"] == Opcode.READ,
            "units": command.get("top_units", 0),
        }
        assert [mean[1:] for mean in host.means if mean[0] == number] == [
            (slot, i // 2, table.mean[i] | table.mean[i + 1] << 32) for i in range(0, len(table.mean), 2)
        ]


def good_read(rng, config, number):
    """A READ as a command of a job without rows, its table, and its line."""
    command, _, _ = good_command(rng, config, number)
    size = read_token_bytes(config.head_dim, config.kv_element_bytes)
    tokens = min(command["end_token"] - command["base_token"], (LIMIT - BASE) // size)
    command |= {"opcode": Opcode.READ, "rows": 0, "base_token": 0, "end_token": tokens, "tree_token": 0, "scale": 0,
                "query": 0, "result": LIMIT - tokens * size}
    command = fit(config, command)
    named = ("opcode", "identifier", "table", "result", "stripe_pages", "stripes")
    line = READ_COMMAND.pack(tokens=tokens, **{name: command[name] for name in named})
    return command, some_table(rng, config, command), line


def place(host, number, command, block, table, config):
    host.put(COMMANDS + 64 * number, COMMAND.pack(**command))
    host.put(command["query"], query_bytes(config, block))
    host.put(command["table"], bytes(table))
    assert command["query"] + len(block) * query_row_bytes(config.head_dim) <= LIMIT
    assert command["table"] + len(bytes(table)) <= LIMIT


CONFIGS = {
    "tiny": TINY,
    "paper": PAPER,
    "gqa": GQA,
    "wide": Config(
        channels=3,
        rows=3,
        beat_bytes=32,
        head_dim=80, sparse=False,
        jobs_in_flight=3,
        part=replace(PSLC, pages=200),
        score_depth=1024,
    ),
    "one": Config(
        channels=1,
        head_dim=32,
        part=TINY_PART,
        dies=1,
        codeword_bytes=256,
        score_depth=16,
        sparse=False,
    ),
    "middle": Config(
        channels=32,
        rows=2,
        beat_bytes=16,
        head_dim=64,
        element=Element.BF16,
        jobs_in_flight=2,
        score_depth=1024,
    ),
    "bytes": replace(TINY, kv="fp8_e4m3", rows=3),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stall", [0.0, 0.35])
def test_good_jobs(name, stall):
    """One job at a time in memory (blocks may overlap), then the lanes' view of each."""
    config = CONFIGS[name]
    rng = random.Random(name)
    for count in (1, 6):
        host, jobs = Host(), []
        for number in range(count):
            command, block, table = good_command(rng, config, number)
            # Blocks apart from each other, so that all of them are in memory at once.
            if count > 1:
                command["query"] = BASE + 0x4000 * number
            jobs.append((command, block, table))
            place(host, number, command, block, table, config)
        run(
            config, host, [count], stall=stall, job_stall=stall, hold=40 if stall else 0, seed=count
        )
        check_good(config, host, jobs)
        assert host.errors == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_among_jobs(name):
    """READs are dense jobs without rows, query and scale; ATTENDs beside them are as always."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host, jobs = Host(), []
    for number in range(5):
        if number % 2:
            command, table, line = good_read(rng, config, number)
            host.put(COMMANDS + 64 * number, line)
            host.put(command["table"], bytes(table))
            jobs.append((command, [], table))
        else:
            command, block, table = good_command(rng, config, number)
            command["query"] = BASE + 0x4000 * number
            jobs.append((command, block, table))
            place(host, number, command, block, table, config)
    run(config, host, [5], stall=0.2, job_stall=0.2, hold=40, seed=3)
    check_good(config, host, jobs)
    assert host.errors == 0


def bad_reads(config):
    """(changes of a READ of two pages and a token, status, where) for each way to fail."""
    size = read_token_bytes(config.head_dim, config.kv_element_bytes)
    room, most = lane_stripes(config), READ_BYTES // size
    field_, length, address = Status.INVALID_FIELD, Status.INVALID_LENGTH, Status.INVALID_ADDRESS
    cases = [
        ({"flags": 1}, field_, 0),
        *(({f"reserved{i}": 1}, field_, 0) for i in range(7)),
        ({"stripe_pages": 0, "tokens": 0}, field_, 0),
        ({"stripe_pages": 3}, field_, 0),
        ({"stripe_pages": min(2 * room, 255)}, field_, 0),
        ({"tokens": 0}, length, 0),
        ({"stripes": 2, "result": 1}, length, 0),
        ({"stripes": 4}, length, 0),
        ({"stripes": 0}, length, 0),
        ({"tokens": TOP}, length, 0),
        ({"result": BASE + 32}, address, 1),
        ({"result": BASE - 64, "table": BASE - 64}, address, 1),
        ({"result": LIMIT - (2 * config.tokens_per_page + 1) * size + 64}, address, 1),
        ({"result": LIMIT}, address, 1),
        ({"result": (1 << 64) - 64}, address, 1),
        ({"table": BASE + 8}, address, 2),
        ({"table": LIMIT}, address, 2),
    ]
    if most < config.max_tokens:
        stripes = -(-(most + 1) // config.tokens_per_page)
        cases += [({"tokens": most + 1, "stripes": stripes, "result": BASE - 64}, length, 0),
                  ({"tokens": most, "stripes": -(-most // config.tokens_per_page)}, address, 1)]
    return cases


@pytest.mark.parametrize("name", ["tiny", "wide", "middle", "paper", "bytes"])
def test_bad_reads(name):
    """Each between good ones: its job comes in its turn, the lanes are not started."""
    config = CONFIGS[name]
    host, cases = Host(), bad_reads(config)
    tokens = 2 * config.tokens_per_page + 1
    good = {"opcode": Opcode.READ, "tokens": tokens, "stripes": 3, "stripe_pages": 1, "table": TABLES,
            "result": LIMIT - tokens * read_token_bytes(config.head_dim, config.kv_element_bytes)}
    for number in range(2 * len(cases) + 1):
        change = cases[number // 2][0] if number % 2 else {}
        host.put(COMMANDS + 64 * number, READ_COMMAND.pack(**{**good, **change, "identifier": number}))
    for stripe in range(3):
        host.put(TABLES + 8 * stripe, TABLE_ENTRY.pack(channel=stripe % config.channels))
    run(config, host, [2 * len(cases) + 1], latency=4)
    for number, (_, _, job) in enumerate(host.jobs):
        assert job["identifier"] == number
        if number % 2:
            change, status, where = cases[number // 2]
            assert (job["lanes"], Status(job["status"]), job["where"]) == (0, status, where), change
        else:
            assert (job["lanes"], job["status"], job["where"], job["read"]) == (1, 0, 0, 1)
    assert len(host.starts) == len(cases) + 1


@pytest.mark.parametrize("name, count", [("tiny", 8), ("paper", 4), ("gqa", 1), ("middle", 4)])
@pytest.mark.parametrize("stall", [0.0, 0.35])
def test_sparse_jobs(name, count, stall):
    """Jobs of all modes, mixed: what the lanes and the finisher get, and when."""
    config = CONFIGS[name]
    rng = random.Random(name)
    modes = [Mode.SPARF, Mode.DENSE, Mode.FETCHED, Mode.CENTROID, Mode.SPARF, Mode.CENTROID, Mode.FETCHED, Mode.FETCHED]
    host, jobs = Host(), []
    for number in range(count):
        command, block, table = good_command(rng, config, number, mode=modes[number], rows=2 if name == "gqa" else None)
        command["query"] = BASE + 0x4000 * number
        jobs.append((command, block, table))
        place(host, number, command, block, table, config)
    run(config, host, [count], stall=stall, job_stall=stall, hold=40 if stall else 0, seed=count)
    check_good(config, host, jobs)
    assert host.errors == 0


def test_a_reset_at_any_time():
    """Stopped and reset in each state of a sparse job, then run from the beginning."""
    config = TINY
    rng = random.Random(12)
    host, jobs = Host(), []
    for number, mode in enumerate((Mode.SPARF, Mode.CENTROID, Mode.FETCHED)):
        command, block, table = good_command(rng, config, number, mode=mode)
        command |= {"query": BASE + 0x1000 * number}
        jobs.append((command, block, table))
        place(host, number, command, block, table, config)
    cuts = [*range(1, 120, 7), 150, 200, 250, 300, 330, 360, 390, 420]
    run(config, host, [3], latency=6, cuts=cuts)
    # Each turn that had begun has an epoch of its own.
    epochs = host.starts[0][1]["epoch"]
    check_good(config, host, jobs, epochs=epochs)


def test_time_of_a_sparse_job():
    config = PAPER
    rng = random.Random(1)
    host = Host()
    for number, mode in enumerate([Mode.CENTROID] * 3 + [Mode.SPARF] * 2):
        command, block, _ = good_command(rng, config, number, mode=mode)
        block[0] = (*block[0][:3], [struct.unpack("<H", struct.pack("<e", rng.gauss(0, 1)))[0] for _ in range(128)])
        command |= {"base_token": 77, "end_token": 77 + 4096, "top_units": 1, "local_tokens": 0,
                    "query": BASE + 0x1000 * number}
        command = fit(config, command)
        if mode == Mode.SPARF:
            command["features"] = 16
        place(host, number, command, block, some_table(rng, config, command), config)
    run(config, host, [5], latency=60)
    periods = [b - a for a, b in zip(host.when, host.when[1:], strict=False)]
    # As a dense job, with a table of two words for each of 16 stripes.
    assert max(periods[:2]) <= 60 + 8 + 40 + 32 + 9 + 15, periods
    # 17 words of the command and the query's head and cycles of checks, and the ranker's time.
    assert max(periods[2:]) <= 60 + 8 + 40 + 11 + 15 + 1000, periods


def test_epochs_over_many_jobs_and_batches():
    rng = random.Random(4)
    host, jobs = Host(), []
    for number in range(70):
        command, block, table = good_command(rng, TINY, number, rows=1)
        command["query"] = BASE + 0x200 * number
        jobs.append((command, block, table))
        place(host, number, command, block, table, TINY)
    run(TINY, host, [3, 1, 66], latency=3)
    check_good(TINY, host, jobs)
    tags = [(start["slot"], start["epoch"]) for _, start in host.starts]
    assert len(set(tags[:64])) == 64


def test_a_reset_changes_the_epoch():
    rng = random.Random(4)
    host = Host()
    for number in range(9):
        command, block, table = good_command(rng, TINY, number, rows=1)
        command["query"] = BASE + 0x200 * number
        place(host, number, command, block, table, TINY)
    run(TINY, host, [6, 1, 2], latency=3, reset_between=True)
    assert [(s["slot"], s["epoch"]) for _, s in host.starts] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (0, 2),
        (1, 2),
        (0, 3),
        (0, 4),
        (1, 4),
    ]


@pytest.mark.parametrize("latency", [5, 60])
def test_time_of_a_job(latency):
    config = Config()
    rng = random.Random(1)
    host = Host()
    for number in range(5):
        command, block, table = good_command(rng, config, number)
        command["query"] = BASE + 0x1000 * number
        command = fit(config, command | {"base_token": 77, "end_token": 2077, "stripe_pages": 1})
        table = some_table(rng, config, command)
        place(host, number, command, block, table, config)
    run(config, host, [5], latency=latency)
    periods = [b - a for a, b in zip(host.when, host.when[1:], strict=False)]
    # 8 words of command, 40 of query block, 32 of table, 9 cycles of checks, 9 from state to state
    # and through the bus.
    assert max(periods) <= latency + 8 + 40 + 32 + 9 + 15, periods


def run_all_but_one(count, bad, *, seed, **what):
    """Run so many commands with four slots, of which number `bad` is none; the host."""
    config, rng, host = replace(BOARD, jobs_in_flight=4), random.Random(seed), Host()
    for number in range(count):
        command, block, table = good_command(rng, config, number)
        command["query"] = BASE + 0x1000 * number
        if number == bad:
            command["opcode"] = 7
        place(host, number, command, block, table, config)
    run(config, host, [count], latency=2, **what)
    return host


@pytest.mark.usefixtures("each_simulator")
def test_slots_run_out():
    host = run_all_but_one(9, 5, seed=2, hold=1000)
    assert len(host.starts) == 8
    # The fifth job has to wait for the first one's slot, and so on.
    assert host.when[3] < 500 < 1000 < host.when[4]
    assert [job["lanes"] for _, _, job in host.jobs] == [1] * 5 + [0] + [1] * 3


def test_lists_run_out():
    """Nothing is loaded until the lanes have room for it; what was loaded is reported all the same."""
    host = run_all_but_one(5, 3, seed=3, crowded=700)
    assert [b - a > 700 for a, b in zip(host.when, host.when[1:], strict=False)] == [True] * 3
    assert [job["lanes"] for _, _, job in host.jobs] == [1] * 3 + [0, 1]


def bad_commands(config):
    """(changes, status, where) for each way to fail."""
    query_bytes_, result_bytes = query_row_bytes(config.head_dim), result_row_bytes(config.head_dim)
    page, room = config.tokens_per_page, lane_stripes(config)
    everything = config.lanes * room
    field_, length, address = Status.INVALID_FIELD, Status.INVALID_LENGTH, Status.INVALID_ADDRESS
    two = {"base_token": 5, "end_token": 6 + page}  # two pages with one token in the second one
    cases = [
        ({"opcode": 0}, Status.INVALID_OPCODE, 0),
        ({"opcode": 0x80, "rows": 0}, Status.INVALID_OPCODE, 0x80),
        ({"opcode": 0x83}, Status.INVALID_OPCODE, 0x83),
        ({"opcode": 0xC1}, Status.INVALID_OPCODE, 0xC1),
        ({"opcode": 0xC6}, Status.INVALID_OPCODE, 0xC6),
        ({"opcode": 0xE3}, Status.INVALID_OPCODE, 0xE3),
        ({"opcode": 0x01, "mode": 1}, Status.INVALID_OPCODE, 1),
        ({"flags": 1}, field_, 0),
        ({"flags": 0x40, "rows": 0}, field_, 0),
        ({"mode": 4}, field_, 0),
        ({"mode": 0x80, "rows": 77}, field_, 0),
        ({"mode": 1} if not config.sparse else {"mode": 255}, field_, 0),
        *(({name: 1 << 8 * COMMAND[name].size - 1}, field_, 0)
          for name in ("features", "local_tokens", "top_units", "sinks", "unit_bits")),
        ({"sinks": 1, "rows": 0}, field_, 0),
        ({"unit_bits": 1}, field_, 0),
        ({"reserved0": 1}, field_, 0),
        ({"reserved0": 1 << 39}, field_, 0),
        ({"stripe_pages": 0}, field_, 0),
        ({"stripe_pages": 3}, field_, 0),
        ({"stripe_pages": 0x81}, field_, 0),
        ({"stripe_pages": min(2 * room, 255)}, field_, 0),
        ({"rows": 0}, Status.INVALID_ROWS, 0),
        ({"rows": config.rows + 1}, Status.INVALID_ROWS, config.rows + 1),
        ({"rows": 255, "scale": 0}, Status.INVALID_ROWS, 255),
        ({"base_token": page, "end_token": page, "stripes": 1}, length, 0),
        ({"base_token": page, "end_token": page}, length, 0),
        ({"base_token": 2 * page, "end_token": page, "stripes": 1}, length, 0),
        ({"base_token": 0, "end_token": config.max_tokens + 1}, length, 0),
        ({"base_token": 0, "end_token": everything * page, "stripes": everything + 1}, length, 0),
        ({"base_token": TOP, "end_token": 1, "stripes": 1}, length, 0),
        ({"base_token": 0, "end_token": TOP, "query": 0}, length, 0),
        ({**two, "stripes": 0}, length, 0),
        ({**two, "stripes": 1}, length, 0),
        ({**two, "stripes": 3}, length, 0),
        ({**two, "stripes": 0x8002}, length, 0),
        ({"base_token": 0, "end_token": 2 * page, "stripes": 3}, length, 0),
        ({"rows": 1, "query": BASE + 32}, address, 0),
        ({"rows": 1, "query": BASE + 1, "result": 0}, address, 0),
        ({"rows": 1, "query": BASE - 64}, address, 0),
        ({"rows": 1, "query": LIMIT - query_bytes_ + 64}, address, 0),
        ({"rows": 1, "query": LIMIT}, address, 0),
        ({"rows": 1, "query": BASE + (1 << 33), "table": 1}, address, 0),
        ({"rows": 1, "query": BASE & 0xFFFF_FFFF}, address, 0),
        ({"rows": 1, "query": (1 << 64) - 64}, address, 0),
        ({"rows": 1, "result": BASE + 16}, address, 1),
        ({"rows": 1, "result": LIMIT - result_bytes + 64, "scale": 0}, address, 1),
        ({"rows": config.rows, "result": LIMIT - config.rows * result_bytes + 64}, address, 1),
        ({"rows": 1, "result": BASE - 64, "table": BASE - 64}, address, 1),
        ({"table": BASE + 8}, address, 2),
        ({"table": BASE - 64}, address, 2),
        ({"table": LIMIT, "scale": 0}, address, 2),
        ({"table": (1 << 64) - 64}, address, 2),
        ({"scale": 0}, Status.INVALID_SCALE, 0),
        ({"scale": 0x8000_0000 | 127 << 23}, Status.INVALID_SCALE, 0),
        ({"scale": 0x007F_FFFF}, Status.INVALID_SCALE, 0),
        ({"scale": 0x7F80_0000}, Status.INVALID_SCALE, 0),
        ({"scale": 0x7FC0_0000}, Status.INVALID_SCALE, 0),
    ]
    if everything > 8:
        cases.append(({"base_token": 3, "end_token": 4 + 8 * page, "table": LIMIT - 64}, address, 2))
    if room > 1:
        large = {"base_token": 9, "end_token": 9 + 2 * page, "stripe_pages": 2}
        cases += [
            ({**large, "stripes": 2}, length, 0),
            ({**large, "end_token": 10 + 2 * page, "stripes": 1}, length, 0),
            ({**large, "end_token": 9 + everything * page, "stripes": everything}, length, 0),
        ]
    return cases


@pytest.mark.parametrize("name", ["tiny", "wide", "middle", "one"])
def test_bad_commands(name):
    """Each bad command between good ones: its job comes in its turn, the lanes are not started."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host = Host()
    cases = bad_commands(config)
    jobs = []
    for number in range(2 * len(cases) + 1):
        command, _, _ = good_command(rng, config, rows=1)
        command |= {"query": BASE, "result": BASE + 0x8000, "table": TABLES, "stripe_pages": 1}
        command["end_token"] = command["base_token"] + min(
            command["end_token"] - command["base_token"], 3 * config.tokens_per_page, config.max_tokens
        )
        command = fit(config, command)
        if number % 2:
            change = cases[number // 2][0]
            command |= change
            if "end_token" in change and "stripes" not in change:
                command = fit(config, command)
        jobs.append(command)
        host.put(COMMANDS + 64 * number, COMMAND.pack(**command))
    host.put(BASE, query_bytes(config, [(0, 1, 0, [0x3C00] * config.head_dim)]))
    for stripe in range(config.lanes * lane_stripes(config)):
        host.put(TABLES + 8 * stripe, TABLE_ENTRY.pack(channel=stripe % config.channels))
    run(config, host, [len(jobs)], latency=4)
    for number, (command, (_, _, job)) in enumerate(zip(jobs, host.jobs, strict=True)):
        assert job["slot"] == number % config.jobs_in_flight
        assert job["identifier"] == command["identifier"]
        if number % 2:
            change, status, where = cases[number // 2]
            assert (job["lanes"], Status(job["status"]), job["where"]) == (0, status, where), change
        else:
            assert (job["lanes"], job["status"], job["where"]) == (1, 0, 0)
    assert len(host.starts) == len(cases) + 1


def bad_sparse_commands(config):
    """(mode, changes, status, where); the changes are from 300 tokens, 4 channels, 5 units of a codeword, 5 local."""
    field_, selection_, address = Status.INVALID_FIELD, Status.INVALID_SELECTION, Status.INVALID_ADDRESS
    sparf, fetched, centroid = Mode.SPARF, Mode.FETCHED, Mode.CENTROID
    codeword, most = config.tokens_per_codeword, config.unit_bits_max
    mean_bytes = fp32_block_bytes(config.head_dim)
    table_bytes = lines(16 * -(-300 // config.group_tokens)) * 64
    other = config.group_pages // 2
    cases = [
        (sparf, {"unit_bits": 1}, field_, 0),
        (sparf, {"unit_bits": 0x80, "rows": 0}, field_, 0),
        (centroid, {"features": 0x8000}, field_, 0),
        (5, {}, field_, 0),
        (0xFE, {}, field_, 0),
        *((mode, {"stripe_pages": other}, field_, 0) for mode in (sparf, fetched, centroid)),
        (fetched, {"stripe_pages": 2 * config.group_pages}, field_, 0),
        (sparf, {"reserved0": 1}, field_, 0),
        (sparf, {"rows": 0, "features": 0}, Status.INVALID_ROWS, 0),
        (sparf, {"end_token": 0, "features": 0}, Status.INVALID_LENGTH, 0),
        (fetched, {"stripes": 1, "top_units": 0}, Status.INVALID_LENGTH, 0),
        (sparf, {"features": 0, "top_units": 0, "local_tokens": 0xFFFF, "scale": 0}, selection_, 0),
        (fetched, {"features": config.head_dim + 1}, selection_, 0),
        (sparf, {"features": 0x8004}, selection_, 0),
        (centroid, {"top_units": 0, "local_tokens": 0}, selection_, 1),
        (sparf, {"top_units": 0, "scale": 0}, selection_, 1),
        (sparf, {"top_units": 301}, selection_, 1),
        (sparf, {"top_units": 0xFFFF, "local_tokens": 0xFFFF}, selection_, 1),
        (fetched, {"top_units": -(-300 // codeword) + 1}, selection_, 1),
        (centroid, {"unit_bits": most, "top_units": -(-300 // (codeword << most)) + 1, "local_tokens": 0xFFFF},
         selection_, 1),
        (centroid, {"unit_bits": 255, "top_units": 2}, selection_, 1),
        (centroid, {"unit_bits": 31, "top_units": 2}, selection_, 1),
        (sparf, {"local_tokens": 6, "scale": 0}, selection_, 2),
        (sparf, {"local_tokens": 0x8000}, selection_, 2),
        (fetched, {"local_tokens": 5 * codeword + 1, "unit_bits": 0, "query": 1}, selection_, 2),
        (centroid, {"local_tokens": (codeword << most) + 1, "unit_bits": most, "top_units": 1}, selection_, 2),
        (fetched, {"unit_bits": most + 1, "top_units": 1, "local_tokens": 0, "scale": 0}, selection_, 3),
        (centroid, {"unit_bits": 20, "top_units": 1, "local_tokens": 0xFFFF}, selection_, 3),
        (centroid, {"unit_bits": 0x80, "top_units": 1, "local_tokens": 0xFFFF}, selection_, 3),
        (sparf, {"table": BASE + 32}, address, 2),
        (sparf, {"table": BASE - 64, "scale": 0}, address, 2),
        (sparf, {"table": LIMIT - table_bytes - mean_bytes + 64}, address, 2),
        (fetched, {"table": LIMIT - table_bytes}, address, 2),
        (fetched, {"table": TABLES | 1 << 40}, address, 2),
        (centroid, {"table": LIMIT - table_bytes + 64}, address, 2),
        (sparf, {"table": 8, "query": 0}, address, 0),
        (sparf, {"scale": 0}, Status.INVALID_SCALE, 0),
        (centroid, {"scale": 255 << 23}, Status.INVALID_SCALE, 0),
        # And what is just right.
        (sparf, {"top_units": 300, "local_tokens": 300, "features": config.head_dim, "sinks": 0xFFFF,
                 "table": LIMIT - table_bytes - mean_bytes}, Status.OK, 0),
        (fetched, {"top_units": -(-300 // codeword), "features": 1}, Status.OK, 0),
        (centroid, {"top_units": 300 // codeword, "end_token": 307 - 300 % codeword, "unit_bits": 0}, Status.OK, 0),
        (centroid, {"unit_bits": most, "top_units": 1, "local_tokens": codeword << most}, Status.OK, 0),
        (centroid,
         {"base_token": 0, "end_token": 1, "unit_bits": most, "top_units": 1, "local_tokens": codeword << most},
         Status.OK, 0),
        (centroid, {"table": LIMIT - table_bytes}, Status.OK, 0),
    ]
    if other == 0:
        cases = [case for case in cases if case[1].get("stripe_pages") != 0]
    return cases


@pytest.mark.parametrize("name", ["tiny", "middle"])
def test_bad_sparse_commands(name):
    """Each check of the sparse fields, and which of two comes first."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host, cases = Host(), bad_sparse_commands(config)
    for number, (mode, change, _, _) in enumerate(cases):
        command, _, _ = good_command(rng, config, rows=1)
        command |= {"query": BASE, "result": BASE + 0x8000, "table": TABLES, "stripe_pages": config.group_pages}
        command |= {"mode": mode, "base_token": 7, "end_token": 307, "top_units": 5, "local_tokens": 5}
        if mode in (Mode.SPARF, Mode.FETCHED):
            command |= {"features": 4, "table": TABLES - fp32_block_bytes(config.head_dim)}
        command |= change
        if "stripes" not in change:
            command = fit(config, command)
        host.put(COMMANDS + 64 * number, COMMAND.pack(**command))
    host.put(BASE, query_bytes(config, [(0, 1, 0, [0x3C00] * config.head_dim)]))
    for table in (TABLES, LIMIT - lines(16 * -(-300 // config.group_tokens)) * 64):
        for stripe in range(config.lanes * lane_stripes(config) // config.group_pages):
            if table + 16 * stripe < LIMIT:
                host.put(table + 16 * stripe, TABLE_ENTRY.pack(channel=stripe % config.channels))
                host.put(table + 16 * stripe + 8, SKETCH_ENTRY.pack(written=1))
    # The means are zeros, as all memory.
    run(config, host, [len(cases)], latency=4)
    for (mode, change, status, where), (_, _, job) in zip(cases, host.jobs, strict=True):
        good = status is Status.OK
        assert (job["lanes"], Status(job["status"]), job["where"]) == (good, status, where), (mode, change)
        assert job["mode"] == (mode if good else Mode.DENSE)
    starts = [start for _, start in host.starts]
    assert [start["mode"] for start in starts] == [mode for mode, _, status, _ in cases if status is Status.OK]
    assert [start["local_token"] for start in starts[:1] + starts[4:5]] == [7, 0]


@pytest.mark.parametrize("name, stall", [("tiny", 0.0), ("tiny", 0.4), ("middle", 0.1)])
def test_bad_sketches_and_means(name, stall):
    """What is wrong with tables and means of sparse jobs, in the order of the statuses; a good job behind each."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host, jobs, expected = Host(), [], []
    last = config.head_dim - 1
    infinity, nan = 0x7F80_0000, 0xFFC0_0001
    table_, none = Status.INVALID_TABLE, Status.NO_SKETCH
    cases = [  # stripes' changed fields, mean's, q's, status, where
        ({2: {"reserved": 1 << 23}}, {}, {}, table_, 2),
        ({2: {"codeword": 255}}, {}, {}, table_, 2),
        ({1: {"written": 2}, 0: {"flags": 1, "written": 0}}, {}, {}, table_, 1),
        ({3: {"written": 0x81, "flags": 1}}, {}, {}, table_, 3),
        ({0: {"written": 0}, 3: {"reserved": 1}}, {}, {}, table_, 3),
        ({0: {"reserved": 1}, 1: {"channel": 255}}, {}, {}, table_, 0),
        ({1: {"reserved": 1}, 0: {"channel": 255}}, {}, {}, table_, 0),
        ({1: {"flags": 4, "written": 0}}, {0: nan}, {0: 0x7FFF}, table_, 1),
        ({1: {"flags": 2, "written": 0}, 2: {"flags": 0x82}}, {}, {}, table_, 2),
        ({1: {"flags": 2, "written": 0}, 2: {"written": 0}}, {}, {}, none, 2),
        ({1: {"written": 0}, 2: {"written": 0}, 0: {"written": 0, "flags": 1}}, {}, {}, none, 1),
        ({3: {"written": 0}}, {3: nan}, {3: 0x7FFF}, none, 3),
        ({}, {1: nan}, {last: 0x7FFF}, Status.NAN_QUERY, last),
        ({}, {0: infinity}, {}, Status.NAN_MEAN, 0),
        ({}, {last: infinity | 1 << 31, last - 1: nan}, {}, Status.NAN_MEAN, last - 1),
        ({}, {last: nan}, {}, Status.NAN_MEAN, last),
        ({0: {"reserved": 1}}, {1: nan, "line": 1}, {1: 0x7FFF}, Status.BUS_ERROR, 0),
        ({0: {"reserved": 1}, "line": 1}, {1: nan}, {}, Status.BUS_ERROR, 0),
        ({stripe: {"flags": stripe % 3 + 1, "written": 0} for stripe in range(4)}, {}, {}, Status.OK, 0),
    ]
    for number in range(2 * len(cases)):
        mode = (Mode.SPARF, Mode.FETCHED)[number % 2]
        stripes, mean, query, status, where = cases[number // 2] if number % 2 == 0 else ({}, {}, {}, Status.OK, 0)
        if number % 8 in (3, 5, 7) or not (mean or query or number % 4):
            mode = Mode.CENTROID
        command, block, _ = good_command(rng, config, number, rows=1, mode=mode)
        command |= {"base_token": 5, "end_token": 6 + 3 * config.group_tokens, "top_units": 1, "local_tokens": 0,
                    "query": BASE + 0x400 * number}
        if has_mean(command):
            command["features"] = rng.randint(1, 32)
        command = fit(config, command)
        assert command["stripes"] == 4
        table = some_table(rng, config, command)
        for at, change in stripes.items():
            if at == "line":
                host.bad.add(command["table"] + fp32_block_bytes(config.head_dim))
                continue
            table[at]["flags"], table.sketches[at]["written"] = 0, 1
            for field_, value in change.items():
                (table[at] if field_ in table[at] else table.sketches[at])[field_] = value
        for at, bits in mean.items():
            if at == "line":
                host.bad.add(command["table"] + fp32_block_bytes(config.head_dim) - 64)
            else:
                table.mean[at] = bits
        for at, bits in query.items():
            block[0][3][at] = bits
        jobs.append((command, block, table))
        expected.append((int(status is Status.OK), status, where))
        place(host, number, command, block, table, config)
    run(config, host, [len(jobs)], latency=4, stall=stall)
    assert [(job["lanes"], Status(job["status"]), job["where"]) for _, _, job in host.jobs] == expected
    # The good ones are loaded as ever, behind whatever the bad ones left.
    started = iter(host.starts)
    before = 0
    for number, ((command, block, table), (lanes, _, _), (_, loads, _)) in enumerate(
        zip(jobs, expected, host.jobs, strict=True)
    ):
        slot = number % config.jobs_in_flight
        if lanes:
            check_lanes(config, command, block, table, host.loads[before:loads], slot)
            assert next(started)[1] == expected_start(config, command, slot, (number // config.jobs_in_flight + 1) % 16)
        before = loads


@pytest.mark.parametrize("name", ["tiny", "wide", "middle", "one"])
def test_numbers_at_the_limits_are_taken(name):
    config = CONFIGS[name]
    rng = random.Random(name)
    page, room = config.tokens_per_page, lane_stripes(config)
    rows = config.rows
    host, jobs = Host(), []
    changes = [
        {"base_token": 0, "end_token": 1, "stripe_pages": 1},
        {"base_token": 0, "end_token": 1, "stripe_pages": room},
        {"base_token": 7, "end_token": 7 + config.max_tokens, "stripe_pages": 1},
        {"base_token": 7, "end_token": 7 + config.max_tokens, "stripe_pages": room},
        {"base_token": TOP - 1, "end_token": TOP},
        {"base_token": 1, "end_token": 1 + page, "stripe_pages": 1},
        {"base_token": 1, "end_token": 1 + room * page, "stripe_pages": room},
        {"scale": 1 << 23},
        {"scale": (255 << 23) - 1},
        {"rows": rows, "result": LIMIT - rows * result_row_bytes(config.head_dim)},
        {"rows": rows, "result": BASE},
        {"base_token": 0, "end_token": min(8 * page, config.max_tokens), "stripe_pages": 1, "table": LIMIT - 64},
    ]
    if config.lanes * room > 1:
        changes.append({"base_token": 1, "end_token": 2 + page, "stripe_pages": 1})
    for number, change in enumerate(changes):
        command, block, _ = good_command(rng, config, number, rows=rows)
        command["query"] = BASE + 0x2000 * number
        command = fit(config, command | change)
        table = some_table(rng, config, command)
        jobs.append((command, block, table))
        place(host, number, command, block, table, config)
    run(config, host, [len(jobs)], latency=4)
    check_good(config, host, jobs)


@pytest.mark.parametrize("name", ["tiny", "wide", "middle"])
def test_bad_tables(name):
    """The first bad entry is named, whatever is wrong behind it; the lanes are not started."""
    config = CONFIGS[name]
    rng = random.Random(name)
    room = lane_stripes(config)
    host, expected = Host(), []
    for number, case in enumerate(
        ("channel", "whole", "high", "crowd", "good", "crowd", "nan", "both", "line", "behind", "good")
    ):
        command, block, _ = good_command(rng, config, number, rows=1)
        pages = 1 << rng.randrange(min(room.bit_length() - 1, 8)) if case == "crowd" else 1
        limit = room // pages
        command |= {"query": BASE + 0x1000 * number, "stripe_pages": pages}
        stripes = min(config.lanes * limit, 2 * limit + 3)
        command["base_token"] = rng.randrange(1 << 20)
        command["end_token"] = command["base_token"] + stripes * pages * config.tokens_per_page
        command = fit(config, command)
        table = some_table(rng, config, command)
        at = rng.randrange(1, stripes)
        job = (0, Status.INVALID_TABLE, at)
        match case:
            case "channel":
                table[at]["channel"] = rng.choice((config.channels, 255, 128))
                table[-1]["flags"] = 2
            case "whole":   # which DENSE has not
                table[at]["flags"] = 2
                table[-1]["channel"] = 255
            case "high":
                table[at]["flags"] = 0x81
            case "crowd":
                channel = rng.randrange(config.channels)
                seen = 0
                for i, entry in enumerate(table):
                    if i <= at + limit and rng.random() < 0.9:
                        entry["channel"] = channel
                counts = dict.fromkeys(range(config.lanes), 0)
                for i, entry in enumerate(table):
                    lane = entry["channel"] % config.lanes
                    counts[lane] += 1
                    if counts[lane] > limit:
                        seen = i
                        break
                assert seen
                job = (0, Status.INVALID_TABLE, seen)
            case "nan":
                block[0][3][3] = 0x7FFF
                job = (0, Status.NAN_QUERY, 3)
            case "both":
                block[0][3][3] = 0x7FFF
                table[at]["channel"] = 255
            case "line":
                table[at]["channel"] = 255
                host.bad.add(command["table"])
                job = (0, Status.BUS_ERROR, 0)
            case "behind" | "good":
                job = (1, Status.OK, 0)
        expected.append(job)
        place(host, number, command, block, table, config)
        if case == "behind":
            for address in range(command["table"] + 8 * stripes, command["table"] + lines(8 * stripes) * 64, 8):
                host.put(address, b"\xff" * 8)
    run(config, host, [len(expected)], latency=4, stall=0.2)
    assert [(j["lanes"], Status(j["status"]), j["where"]) for _, _, j in host.jobs] == expected
    assert len(host.starts) == sum(lanes for lanes, _, _ in expected)


def flash_cases(config):
    """(fields, status) of flash commands."""
    part = config.part
    last = (part.blocks - 1) << config.zone_page_bits | (part.pages - 1) << config.plane_bits + config.die_bits
    last |= (1 << config.plane_bits + config.die_bits) - 1
    good, field_, place_ = Status.OK, Status.INVALID_FIELD, Status.INVALID_PLACE
    program, erase, probe, map_ = Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP
    cases = [
        ({"opcode": program}, good),
        ({"opcode": program, "page": last, "argument": (1 << 24) - 1, "channel": config.channels - 1}, good),
        ({"opcode": erase, "page": last}, good),
        ({"opcode": probe, "page": 1}, good),
        ({"opcode": map_, "page": last, "argument": part.blocks - 1}, good),
        ({"opcode": program, "channel": config.channels}, place_),
        ({"opcode": erase, "channel": 255}, place_),
        ({"opcode": probe, "page": (1 << 24) - 1}, place_ if config.pages_per_channel < 1 << 24 else good),
        ({"opcode": map_, "argument": part.blocks}, place_),
        ({"opcode": map_, "argument": 1 << 23}, place_),
        ({"opcode": erase, "argument": 1}, field_),
        ({"opcode": probe, "argument": 1 << 23}, field_),
        *(({"opcode": opcode, "domain": domain}, field_) for opcode in (erase, probe, map_)
          for domain in (1, 1 << 31)),
        ({"opcode": probe, "argument": 1, "channel": 255}, field_),
        ({"opcode": program, "flags": 1}, field_),
        ({"opcode": program, "reserved0": 1}, field_),
        ({"opcode": program, "reserved4": 1 << 7}, field_),
    ]
    cases += [({"opcode": program, f"reserved{i}": 1 << 63 - i}, field_) for i in range(7) if i != 4]
    if part.pages & part.pages - 1:
        bad = last & ~((1 << config.zone_page_bits) - 1) | part.pages << config.plane_bits + config.die_bits
        cases.append(({"opcode": program, "page": bad}, place_))
    return cases


@pytest.mark.parametrize("name", ["tiny", "wide", "paper", "one"])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_flash_commands(name, stall):
    """Good ones are handed over, bad ones become jobs without lanes, jobs between them are as ever."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host, jobs = Host(), []
    handed, rejected, kinds = [], [], []
    commands = flash_cases(config)
    rng.shuffle(commands)
    for number, (change, status) in enumerate(commands):
        identifier = rng.getrandbits(16)
        host.put(COMMANDS + 64 * len(kinds), FLASH_COMMAND.pack(identifier=identifier, **change))
        if status is Status.OK:
            opcode, page, argument = (change.get(n, 0) for n in ("opcode", "page", "argument"))
            handed.append(
                {
                    "opcode": operation_code(opcode),
                    "page": page,
                    "identity": identifier << 16,
                    "channel": change.get("channel", 0),
                }
                | ({"block": argument} if opcode == Opcode.MAP else {})
                | ({"dram_page": argument} if opcode == Opcode.PROGRAM else {})
            )
        else:
            rejected.append((len(kinds), identifier, status))
        kinds.append("flash" if status is Status.OK else "rejected")
        if number % 3 == 0:
            command, block, _ = good_command(rng, config, number, rows=1)
            command["query"] = BASE + 0x1000 * number
            command["end_token"] = command["base_token"] + 1
            command = fit(config, command)
            table = some_table(rng, config, command)
            jobs.append((len(kinds), command))
            place(host, len(kinds), command, block, table, config)
            kinds.append("job")
    run(config, host, [len(kinds)], latency=3, stall=stall, job_stall=stall, hold=30)
    assert [{n: v[n] for n in wanted} for wanted, (_, v) in zip(handed, host.flash, strict=True)] == handed
    # Slots and epochs as if the commands that were handed over had not been there.
    expected = sorted(
        [(i, identifier, status, 0) for i, identifier, status in rejected]
        + [(i, command["identifier"], Status.OK, 1) for i, command in jobs]
    )
    assert [
        (j["identifier"], Status(j["status"]), j["lanes"]) for _, _, j in host.jobs
    ] == [job[1:] for job in expected]
    assert [j["slot"] for _, _, j in host.jobs] == [
        i % config.jobs_in_flight for i in range(len(host.jobs))
    ]
    positions = [i for i, (_, _, _, lanes) in enumerate(expected) if lanes]
    assert [start["epoch"] for _, start in host.starts] == [
        (i // config.jobs_in_flight + 1) % 16 for i in positions
    ]
    # In the order of the commands, each after the jobs before it, when it does not have to wait.
    before = [kinds[:i].count("job") + kinds[:i].count("rejected") for i, k in enumerate(kinds) if k == "flash"]
    assert [count for count, _ in host.flash] == before or stall
    assert all(seen <= count for (seen, _), count in zip(host.flash, before, strict=True))


def ended(host):
    return [(j["queue"], j["identifier"], Status(j["status"]), j["where"]) for _, _, j in host.jobs]


def test_admin_commands():
    """They are handed over whole from queue 0; bad ones, and those from another queue, get a status."""
    rng = random.Random(3)
    create = {"opcode": Opcode.CREATE_QUEUE, "queue": 5, "entries": 64, "submission": 0x1_2345_6780, "base": 1,
              "completion": 0xFFFF_FFFF_FFFF_FFC0, "limit": 2}
    grant = {"opcode": Opcode.GRANT, "kind": 1, "first": TOP, "count": TOP - 1, "domain": 0x8000_01FF}
    data = {"opcode": Opcode.COUNTERS, "result": LIMIT - 256}
    field_, permitted = Status.INVALID_FIELD, Status.NOT_PERMITTED
    cases = [
        (QUEUE_COMMAND, create, 0, None),
        (QUEUE_COMMAND, {"opcode": Opcode.DELETE_QUEUE, "queue": 255}, 0, None),
        *((QUEUE_COMMAND, {"opcode": Opcode.DELETE_QUEUE, name: 1 << 8 * QUEUE_COMMAND[name].size - 1}, 0, (field_, 0))
          for name in ("entries", "submission", "completion", "base", "limit")),
        *((QUEUE_COMMAND, create | {name: 1}, 0, (field_, 0))
          for name in ("flags", *(f"reserved{i}" for i in range(5)))),
        (GRANT_COMMAND, grant, 0, None),
        *((GRANT_COMMAND, grant | {f"reserved{i}": 1 << 7}, 0, (field_, 0)) for i in range(7)),
        (DATA_COMMAND, data, 0, None),
        (DATA_COMMAND, data | {"opcode": Opcode.IDENTIFY}, 0, None),
        (DATA_COMMAND, data | {"domain": 0xFFFF_FFFF}, 0, None),
        (DATA_COMMAND, data | {"result": BASE + 32}, 0, None),
        *((DATA_COMMAND, data | {f"reserved{i}": 1 << 63}, 0, (field_, 0)) for i in range(6)),
        (DATA_COMMAND, data, 3, None),
        (DATA_COMMAND, data | {"opcode": Opcode.IDENTIFY}, 3, (permitted, 0)),
        (GRANT_COMMAND, grant, 3, (permitted, 0)),
        (QUEUE_COMMAND, create | {"flags": 1}, 3, (permitted, 0)),
        (FLASH_COMMAND, {"opcode": Opcode.PROBE}, 7, (permitted, 0)),
        (FLASH_COMMAND, {"opcode": Opcode.MAP, "reserved1": 1}, 1, (permitted, 0)),
        (FLASH_COMMAND, {"opcode": 0xFF}, 1, (Status.INVALID_OPCODE, 0xFF)),
    ]
    host, handed, rejected = Host(), [], []
    for number, (record, command, queue, error) in enumerate(cases):
        identifier = rng.getrandbits(16)
        host.put(COMMANDS + 64 * number, record.pack(**command, identifier=identifier))
        if error is not None:
            rejected.append((queue, identifier, *error))
            continue
        names = {"queue": "number", "kind": "number", "result": "submission"}
        handed.append({"opcode": command["opcode"], "queue": queue, "identifier": identifier} | {
            names.get(name, name): value for name, value in command.items() if name not in ("opcode", "base", "limit")})
    run(TINY, host, [len(cases)], latency=5, stall=0.2, job_stall=0.3, queues=[queue for _, _, queue, _ in cases])
    assert ended(host) == rejected
    # What its record has not means nothing.
    assert [{name: got[name] for name in want} for got, want in zip(host.admin, handed, strict=True)] == handed
    data = [a["bad_address"] for a in host.admin if a["opcode"] in (Opcode.COUNTERS, Opcode.IDENTIFY)]
    # IDENTIFY takes more than is left of the window; queue 3 has no window at all.
    assert data == [0, 1, 0, 1, 1]


def test_each_queue_has_its_window():
    """A window takes effect when its queue is created, for the commands of this queue alone."""
    host, config = Host(), TINY
    rng = random.Random(5)
    other = 0x7_0000_0000
    expected, queues = [], []

    def add(queue, base, status):
        command, block, _ = good_command(rng, config, rows=1)
        command |= {"query": base + 0x400 * len(queues), "result": base, "table": base + 0x8000 + 0x400 * len(queues)}
        command = fit(config, command | {"end_token": command["base_token"] + 1})
        host.put(COMMANDS + 64 * len(queues), COMMAND.pack(**command))
        host.put(command["query"], query_bytes(config, block))
        host.put(command["table"], bytes(some_table(rng, config, command)))
        queues.append(queue)
        expected.append(status)

    add(2, other, Status.INVALID_ADDRESS)
    for queue, base in ((2, other), (3, BASE)):
        host.put(COMMANDS + 64 * len(queues), QUEUE_COMMAND.pack(
            opcode=Opcode.CREATE_QUEUE, queue=queue, base=base, limit=base + 0x10000))
        queues.append(0)
        for _ in range(3):     # the window is there some cycles after the command was taken
            add(1, BASE, Status.INVALID_ADDRESS)
    for queue, base in ((2, other), (3, BASE), (0, BASE)):
        add(queue, base, Status.OK)
    for queue, base in ((2, BASE), (3, other), (0, other), (2, other - 64), (3, BASE + 0x10000)):
        add(queue, base, Status.INVALID_ADDRESS)
    run(config, host, [len(queues)], latency=5, queues=queues, windows={2, 3})
    assert [Status(j["status"]) for _, _, j in host.jobs] == expected


@pytest.mark.usefixtures("each_simulator")
def test_domains():
    """A queue may name a domain or not; a table's entries and the pages of flash commands are the domain's or not."""
    config, rng = TINY, random.Random(6)

    def attend(number, domain):
        command, block, table = good_command(rng, config, number, rows=1)
        command |= {"query": BASE + 0x1000 * number, "domain": domain}
        place(host, number, command, block, table, config)
        return command

    def results(**options):
        run(config, host, [1], latency=5, **options)
        assert not host.starts or options == {}
        return [(Status(j["status"]), j["where"]) for _, _, j in host.jobs] + [
            v["opcode"] for _, v in host.flash]

    for domain, options, expected in (
        (7, {}, (Status.OK, 0)),
        (7, {"domain_queues": 0xFE}, (Status.NOT_PERMITTED, 1)),
        (0x107, {}, (Status.NOT_PERMITTED, 1)),
        (7 | 1 << 31, {}, (Status.NOT_PERMITTED, 1)),
        (7, {"foreign": {0, 1}}, (Status.NOT_OWNED, 0)),
    ):
        host = Host()
        attend(0, domain)
        assert results(**options) == [expected], (domain, options)
    for opcode, options, expected in (
        (Opcode.PROGRAM, {}, operation_code(Opcode.PROGRAM)),
        (Opcode.PROGRAM, {"domain_queues": 0xFE}, (Status.NOT_PERMITTED, 1)),
        (Opcode.PROGRAM, {"owned": (0, 1)}, (Status.NOT_OWNED, 0)),
        (Opcode.PROGRAM, {"owned": (1, 0)}, (Status.NOT_OWNED, 1)),
        (Opcode.PROGRAM, {"owned": (0, 0)}, (Status.NOT_OWNED, 0)),
        (Opcode.ERASE, {"owned": (0, 0), "domain_queues": 0}, operation_code(Opcode.ERASE)),    # in queue 0
        (Opcode.PROBE, {"owned": (0, 0), "domain_queues": 0}, operation_code(Opcode.PROBE)),
        (Opcode.ERASE, {"owned": (0, 1), "queues": [1]}, (Status.NOT_OWNED, 0)),
        (Opcode.ERASE, {"owned": (1, 0), "queues": [1]}, operation_code(Opcode.ERASE)),
        (Opcode.ERASE, {"domain_queues": 0xFD, "queues": [1]}, (Status.NOT_PERMITTED, 1)),
    ):
        host = Host()
        host.put(COMMANDS, FLASH_COMMAND.pack(opcode=opcode))
        assert results(**options) == [expected], (opcode.name, options)


def test_a_flash_command_that_waits_holds_its_own_queue_only():
    host, config = Host(), TINY
    rng = random.Random(7)
    queues = [2, 2, 0, 0, 2, 0]
    for number, queue in enumerate(queues):
        if queue == 2:
            host.put(COMMANDS + 64 * number, FLASH_COMMAND.pack(opcode=Opcode.PROGRAM, identifier=number))
            continue
        command, block, _ = good_command(rng, config, number, rows=1)
        command |= {"query": BASE + 0x1000 * number, "end_token": command["base_token"] + 1}
        command = fit(config, command)
        place(host, number, command, block, some_table(rng, config, command), config)
    run(config, host, [len(queues)], latency=5, queues=queues, flash_ready=range(3000, 10000))
    assert [v["identity"] for _, v in host.flash] == [number << 16 | 2 for number in (0, 1, 4)]
    # All jobs were done before the first flash command was taken.
    assert [jobs for jobs, _ in host.flash] == [3, 3, 3]
    assert max(host.when) < 3000


@pytest.mark.parametrize("name", ["tiny", "gqa", "wide", "middle"])
def test_nan_in_a_query(name):
    config = CONFIGS[name]
    form = config.element.encoding
    rng = random.Random(name)
    host = Host()
    infinity = (form.exponent_max + 1) << form.fraction_bits
    last = config.head_dim - 1
    cases = [
        {(0, 0): infinity},
        {(0, last): infinity | 1},
        {(config.rows - 1, 5): infinity | 0x8000},
        {(0, 7): infinity, (0, 6): infinity, (1, 0): infinity},
        {(config.rows - 1, last): infinity | 3},
        {},
    ]
    for number, changes in enumerate(cases):
        command, block, table = good_command(rng, config, number, rows=config.rows)
        command["query"] = BASE + 0x1000 * number
        for (row, channel), bits in changes.items():
            block[row][3][channel] = bits
        place(host, number, command, block, table, config)
    # A NaN in a row that the last job has not is nobody's business.
    run(config, host, [len(cases)], latency=4, stall=0.2)
    assert len(host.starts) == 1
    for changes, (_, _, job) in zip(cases, host.jobs, strict=True):
        if changes:
            row, channel = min(changes)
            assert (job["lanes"], job["status"], job["where"]) == (
                0,
                Status.NAN_QUERY,
                row << 16 | channel,
            )
        else:
            assert (job["lanes"], job["status"]) == (1, Status.OK)


def test_bus_errors():
    config = TINY
    rng = random.Random(8)
    host = Host()
    for number in range(7):
        command, block, table = good_command(rng, config, number, rows=2)
        command["query"] = BASE + 0x1000 * number
        if number == 6:
            host.bad.add(command["table"] + lines(8 * len(table)) * 64 - 64)
        if number == 3:
            block[0][3][0] = 0x7C00  # what a bad bus says is no NaN
        place(host, number, command, block, table, config)
        if number in (1, 3):
            host.bad.add(command["query"] + (64, 192)[number == 3])
        if number == 4:
            host.bad.add(COMMANDS + 64 * number)
    host.put(COMMANDS + 64 * 7, FLASH_COMMAND.pack(opcode=Opcode.ERASE))
    host.bad.add(COMMANDS + 64 * 7)
    run(config, host, [8], latency=4, stall=0.2)
    assert [(j["lanes"], Status(j["status"]), j["where"]) for _, _, j in host.jobs] == [
        (0, Status.BUS_ERROR, 0) if n in (1, 3, 4, 6, 7) else (1, Status.OK, 0) for n in range(8)
    ]
    # Nobody knows whose command a line was that could not be read.
    assert [n for n, (_, _, j) in enumerate(host.jobs) if j["identifier"] == 0xFFFF] == [4, 7]
    assert host.errors == 5 * 8


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.randoms(use_true_random=False),
    st.integers(0, 40),
    st.sampled_from((0.0, 0.2, 0.6)),
    st.sampled_from((0.0, 0.7)),
    st.integers(0, 150),
    st.sampled_from(("tiny", "one", "wide")),
)
def test_any_stalls(rng, latency, stall, job_stall, hold, name):
    config = CONFIGS[name]
    host, jobs = Host(), []
    for number in range(5):
        mode = rng.choice([mode for mode in Mode if mode is not Mode.CODES]) if config.sparse else Mode.DENSE
        command, block, table = good_command(rng, config, number, mode=mode)
        command["query"] = BASE + 0x1000 * number
        jobs.append((command, block, table))
        place(host, number, command, block, table, config)
    run(
        config,
        host,
        [2, 3],
        latency=latency,
        stall=stall,
        job_stall=job_stall,
        hold=hold,
        seed=rng.getrandbits(16),
    )
    check_good(config, host, jobs)


@pytest.mark.usefixtures("each_simulator")
def test_window():
    """The check in halves against plain arithmetic, at and round every boundary."""
    dut, sim = simulation(Window, 3)
    rng = random.Random(3)
    top = 1 << 64

    def near(*values):
        return max(0, min(top - 64, rng.choice(values) // 64 * 64 + 64 * rng.randint(-1, 1)))

    async def bench(ctx):
        for _ in range(700):
            edge = rng.choice((1 << 32, 1 << 33, (1 << 63) + (1 << 32), top - 1, 0x1_2345_6780))
            sizes = [64 * rng.choice((rng.randint(1, 300), (1 << 14) - 1)) for _ in range(3)]
            limit = near(edge, edge + rng.choice(sizes), edge + (1 << 32))
            base = near(0, edge - (1 << 32), limit - rng.choice(sizes), edge)
            addresses = [
                near(limit - size, base, edge, edge - 64)
                | (rng.random() < 0.1) * rng.randint(0, 63)
                for size in sizes
            ]
            ctx.set(dut.valid, 1)
            for which in range(3):
                ctx.set(dut.which, which)
                ctx.set(dut.size, sizes[which])
                for high in range(2):
                    ctx.set(dut.high, high)
                    for port, value in (
                        (dut.address, addresses[which]),
                        (dut.base, base),
                        (dut.limit, limit),
                    ):
                        ctx.set(port, value >> 32 * high & 0xFFFF_FFFF)
                    await ctx.tick()
            ctx.set(dut.valid, 0)
            await ctx.tick().repeat(2)
            assert ctx.get(dut.bad) == sum(
                (address % 64 != 0 or address < base or address + size > limit) << which
                for which, (address, size) in enumerate(zip(addresses, sizes, strict=True))
            )

    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
