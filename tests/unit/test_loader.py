"""Loader: what lanes and later stages get from good and bad commands, under stalls."""

import random
import struct
from collections import deque
from dataclasses import dataclass, field

import pytest
from amaranth.hdl import ResetInserter, Signal
from amaranth.sim import Simulator
from hypothesis import given, settings
from hypothesis import strategies as st

from kvattic.commands import COMMAND, ROW, Opcode, Status, query_row_bytes, result_row_bytes
from kvattic.config import BOARD, GQA, TINY, Config
from kvattic.formats import SCORE_WINDOW_FRACTION, Element
from kvattic_hdl.interfaces import Shapes
from kvattic_hdl.loader import Loader, _Window

BASE, LIMIT = 0x1_FFFF_0000, 0x2_0004_0000  # the window crosses a 32-bit boundary
COMMANDS = 0x9_0000_0040
TOP = (1 << 24) - 1


@dataclass
class Host:
    """Host memory by words, lines that answer with an error, and what the Loader gave."""

    words: dict = field(default_factory=dict)
    bad: set = field(default_factory=set)
    loads: list = field(default_factory=list)
    starts: list = field(default_factory=list)
    jobs: list = field(default_factory=list)
    when: list = field(default_factory=list)
    errors: int = 0

    def put(self, address, data):
        for i in range(0, len(data), 8):
            self.words[address + i] = int.from_bytes(data[i : i + 8], "little")


def memory(bus, host, *, latency, stall, seed):
    """Answers reads in order."""
    rng = random.Random(seed)

    async def bench(ctx):
        queue = deque()  # (earliest cycle, data, response, last)
        cycle, shown = 0, False
        while True:
            ctx.set(bus.arready, rng.random() >= stall)
            if not shown and queue and queue[0][0] <= cycle and rng.random() >= stall:
                shown = True
                ctx.set(bus.rdata, queue[0][1])
                ctx.set(bus.rresp, queue[0][2])
                ctx.set(bus.rlast, queue[0][3])
            ctx.set(bus.rvalid, shown)
            _, _, arvalid, arready, araddr, rvalid, rready = await ctx.tick().sample(
                bus.arvalid, bus.arready, bus.araddr, bus.rvalid, bus.rready
            )
            cycle += 1
            if arvalid and arready:
                for i in range(8):
                    address = araddr + 8 * i
                    queue.append(
                        (
                            cycle + latency,
                            host.words.get(address, 0),
                            3 if araddr in host.bad else 0,
                            i == 7,
                        )
                    )
            if rvalid and rready:
                queue.popleft()
                shown = False

    return bench


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
    reset_between=False,
):
    """Run batches (counts of commands); `hold`: cycles until a slot is freed."""
    dut = Loader(config)
    shapes = Shapes(config)
    rng = random.Random(seed)
    reset = Signal()
    sim = Simulator(ResetInserter(reset)(dut))
    sim.add_clock(1e-6)
    cycle = [0]

    async def watch(ctx):
        record_jobs = []
        while True:
            samples = await ctx.tick().sample(
                dut.load_valid,
                dut.load,
                dut.start_valid,
                dut.start,
                dut.jobs.valid,
                dut.jobs.ready,
                dut.jobs.payload,
                dut.bus_error,
            )
            load_valid, load, start_valid, start, job_valid, job_ready, job, error = samples[2:]
            cycle[0] += 1
            host.errors += error
            assert not (load_valid and start_valid), "a load together with start"
            assert not (start_valid and job_valid), "a job in the cycle of its start"
            if load_valid:
                assert load.query + load.record == 1
                host.loads.append(fields_of(load, shapes.load))
            if start_valid:
                host.starts.append((len(host.loads), fields_of(start, shapes.start)))
                host.when.append(cycle[0])
            if job_valid and job_ready:
                host.jobs.append((len(host.starts), len(host.loads), fields_of(job, shapes.job)))
                record_jobs.append(job.slot)

    freed = deque()

    async def free(ctx):
        while True:
            ctx.set(dut.freed, bool(freed and freed[0] <= cycle[0]))
            if freed and freed[0] <= cycle[0]:
                freed.popleft()
            await ctx.tick()

    async def bench(ctx):
        ctx.set(dut.buffer_base, BASE)
        ctx.set(dut.buffer_limit, LIMIT)
        done = 0
        for number, count in enumerate(batches):
            if reset_between and number:
                ctx.set(dut.stop, 1)
                while not ctx.get(dut.quiet):
                    await ctx.tick()
                ctx.set(reset, 1)
                await ctx.tick()
                ctx.set(reset, 0)
                ctx.set(dut.stop, 0)
            ctx.set(dut.command_base, COMMANDS + 64 * done)
            ctx.set(dut.count, count)
            ctx.set(dut.batch_start, 1)
            await ctx.tick()
            ctx.set(dut.batch_start, 0)
            ctx.set(dut.count, 0)
            ctx.set(dut.command_base, 0)
            for _ in range(count):
                while rng.random() < job_stall:
                    await ctx.tick()
                ctx.set(dut.jobs.ready, 1)
                await ctx.tick().until(dut.jobs.valid)
                ctx.set(dut.jobs.ready, 0)
                freed.append(cycle[0] + hold)
            done += count
            while freed:
                await ctx.tick()
            await ctx.tick().repeat(3)
        await ctx.tick().repeat(20)
        assert not ctx.get(dut.bus.arvalid)
        assert ctx.get(dut.quiet)

    sim.add_testbench(
        memory(dut.bus, host, latency=latency, stall=stall, seed=seed), background=True
    )
    sim.add_testbench(watch, background=True)
    sim.add_testbench(free, background=True)
    sim.add_testbench(bench)
    sim.run()
    assert len(host.jobs) == sum(batches)


def element(rng, config):
    """A finite number's bits."""
    form = config.element.encoding
    return (
        rng.getrandbits(1) << 15
        | rng.randint(0, form.exponent_max) << form.fraction_bits
        | rng.getrandbits(form.fraction_bits)
    )


def good_command(rng, config, number=0, rows=None):
    """Fields of a valid command, and its rows: (start, end, tree, q)."""
    rows = rows or rng.randint(1, config.rows)
    length = rng.choice((1, config.max_tokens, rng.randint(1, config.max_tokens)))
    stripe = config.tokens_per_page
    base = rng.randint(0, ((1 << 24) - 1 - length) // stripe) * stripe
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
        "home": rng.randrange(config.channels),
        "key_page": rng.getrandbits(32),
        "value_page": rng.getrandbits(32),
        "base_token": base,
        "end_token": base + length,
        "tree_token": rng.choice((base + length, base, 0, 0xFFFF_FFFF, 1 << 24)),
        "scale": rng.randint(1, 254) << 23 | rng.getrandbits(23),
        "query": query,
        "result": result,
    }
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
    return command, block


def query_bytes(config, block):
    out = b""
    for start, end, tree, q in block:
        out += ROW.pack(start_token=start, end_token=end, tree=tree)
        out += struct.pack(f"<{config.head_dim}H", *q).ljust(
            query_row_bytes(config.head_dim) - 64, b"\0"
        )
    return out


def expected_start(config, command, slot, epoch):
    return {
        "slot": slot,
        "epoch": epoch,
        "home": command["home"],
        "key_page": command["key_page"],
        "value_page": command["value_page"],
        "base_token": command["base_token"],
        "end_token": command["end_token"],
        "tree_token": min(command["tree_token"], TOP),
        "k_offset": (command["scale"] >> 23)
        - 127
        + SCORE_WINDOW_FRACTION
        - 2 * config.element.encoding.offset,
        "scale": 1 << 23 | command["scale"] & (1 << 23) - 1,
    }


def check_lanes(config, command, block, loads, slot):
    """What the lanes hold after these loads."""
    q, records = {}, {}
    for load in loads:
        assert load["slot"] == slot
        if load["query"]:
            q[load["row"], load["beat"]] = load["data"]
        else:
            records[load["row"]] = (load["start"], load["end"], load["tree"])
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


def check_good(config, host, jobs, epochs=None):
    """All of these (command, block) were loaded, started and handed on, in order."""
    assert len(host.starts) == len(host.jobs) == len(jobs)
    before = 0
    for number, ((command, block), (loads, start), (starts, loads_then, job)) in enumerate(
        zip(jobs, host.starts, host.jobs, strict=True)
    ):
        slot = number % config.jobs_in_flight
        check_lanes(config, command, block, host.loads[before:loads], slot)
        before = loads
        assert (starts, loads_then) == (number + 1, loads)
        assert start == expected_start(
            config, command, slot, (number // config.jobs_in_flight + 1) % 16
        )
        assert job == {
            "slot": slot,
            "lanes": 1,
            "identifier": command["identifier"],
            "rows": command["rows"],
            "result": command["result"],
            "status": Status.OK,
            "where": 0,
        }


def place(host, number, command, block, config):
    host.put(COMMANDS + 64 * number, COMMAND.pack(**command))
    host.put(command["query"], query_bytes(config, block))


CONFIGS = {
    "tiny": TINY,
    "paper": Config(),
    "gqa": GQA,
    "wide": Config(channels=3, rows=3, beat_bytes=32, head_dim=80, jobs_in_flight=3),
    "middle": Config(
        channels=32, rows=2, beat_bytes=16, head_dim=96, element=Element.BF16, jobs_in_flight=2
    ),
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
            command, block = good_command(rng, config, number)
            # Blocks apart from each other, so that all of them are in memory at once.
            if count > 1:
                command["query"] = BASE + 0x4000 * number
            jobs.append((command, block))
            place(host, number, command, block, config)
        run(
            config, host, [count], stall=stall, job_stall=stall, hold=40 if stall else 0, seed=count
        )
        check_good(config, host, jobs)
        assert host.errors == 0


def test_epochs_over_many_jobs_and_batches():
    rng = random.Random(4)
    host, jobs = Host(), []
    for number in range(70):
        command, block = good_command(rng, TINY, number, rows=1)
        command["query"] = BASE + 0x200 * number
        jobs.append((command, block))
        place(host, number, command, block, TINY)
    run(TINY, host, [3, 1, 66], latency=3)
    check_good(TINY, host, jobs)
    tags = [(start["slot"], start["epoch"]) for _, start in host.starts]
    assert len(set(tags[:64])) == 64


def test_a_reset_changes_the_epoch():
    rng = random.Random(4)
    host = Host()
    for number in range(9):
        command, block = good_command(rng, TINY, number, rows=1)
        command["query"] = BASE + 0x200 * number
        place(host, number, command, block, TINY)
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
        command, block = good_command(rng, config, number)
        command["query"] = BASE + 0x1000 * number
        place(host, number, command, block, config)
    run(config, host, [5], latency=latency)
    periods = [b - a for a, b in zip(host.when, host.when[1:], strict=False)]
    # 8 words of command, 40 of query block, 7 cycles of checks, 8 from state to state and through
    # the bus.
    assert max(periods) <= latency + 8 + 40 + 7 + 10, periods


def test_slots_run_out():
    config = BOARD
    rng = random.Random(2)
    host, jobs = Host(), []
    for number in range(9):
        command, block = good_command(rng, config, number)
        command["query"] = BASE + 0x1000 * number
        if number == 5:
            command["opcode"] = 7
        jobs.append((command, block))
        place(host, number, command, block, config)
    run(config, host, [9], latency=2, hold=1000)
    assert len(host.starts) == 8
    # The fifth job has to wait for the first one's slot, and so on.
    assert host.when[3] < 500 < 1000 < host.when[4]
    assert [job["lanes"] for _, _, job in host.jobs] == [1] * 5 + [0] + [1] * 3


def bad_commands(config):
    """(changes, status, where) for each way to fail."""
    query_bytes_, result_bytes = query_row_bytes(config.head_dim), result_row_bytes(config.head_dim)
    stripe = config.tokens_per_page
    cases = [
        ({"opcode": 0}, Status.INVALID_OPCODE, 0),
        ({"opcode": 0x80, "rows": 0}, Status.INVALID_OPCODE, 0x80),
        ({"flags": 1}, Status.INVALID_FIELD, 0),
        ({"flags": 0x80, "rows": 77}, Status.INVALID_FIELD, 0),
        ({"reserved0": 0x8000}, Status.INVALID_FIELD, 0),
        ({"reserved1": 1 << 63}, Status.INVALID_FIELD, 0),
        ({"reserved2": 1 << 17}, Status.INVALID_FIELD, 0),
        ({"home": config.channels}, Status.INVALID_FIELD, 0),
        ({"home": 255}, Status.INVALID_FIELD, 0),
        ({"rows": 0}, Status.INVALID_ROWS, 0),
        ({"rows": config.rows + 1}, Status.INVALID_ROWS, config.rows + 1),
        ({"rows": 255, "scale": 0}, Status.INVALID_ROWS, 255),
        ({"base_token": stripe, "end_token": stripe}, Status.INVALID_LENGTH, 0),
        ({"base_token": 2 * stripe, "end_token": stripe}, Status.INVALID_LENGTH, 0),
        ({"base_token": 0, "end_token": config.max_tokens + 1}, Status.INVALID_LENGTH, 0),
        ({"base_token": (1 << 24) - stripe, "end_token": 1 << 24}, Status.INVALID_LENGTH, 0),
        ({"base_token": 0xFFFF_FFFF // stripe * stripe, "end_token": 1}, Status.INVALID_LENGTH, 0),
        ({"base_token": 0, "end_token": 0xFFFF_FFFF, "query": 0}, Status.INVALID_LENGTH, 0),
        ({"rows": 1, "query": BASE + 32}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": BASE + 1, "result": 0}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": BASE - 64}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": LIMIT - query_bytes_ + 64}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": LIMIT}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": BASE + (1 << 33)}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": BASE & 0xFFFF_FFFF}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "query": (1 << 64) - 64}, Status.INVALID_ADDRESS, 0),
        ({"rows": 1, "result": BASE + 16}, Status.INVALID_ADDRESS, 1),
        ({"rows": 1, "result": LIMIT - result_bytes + 64, "scale": 0}, Status.INVALID_ADDRESS, 1),
        (
            {"rows": config.rows, "result": LIMIT - config.rows * result_bytes + 64},
            Status.INVALID_ADDRESS,
            1,
        ),
        ({"rows": 1, "result": BASE - 64}, Status.INVALID_ADDRESS, 1),
        ({"scale": 0}, Status.INVALID_SCALE, 0),
        ({"scale": 0x8000_0000 | 127 << 23}, Status.INVALID_SCALE, 0),
        ({"scale": 0x007F_FFFF}, Status.INVALID_SCALE, 0),
        ({"scale": 0x7F80_0000}, Status.INVALID_SCALE, 0),
        ({"scale": 0x7FC0_0000}, Status.INVALID_SCALE, 0),
    ]
    if stripe & (stripe - 1) == 0:
        cases.append(
            ({"base_token": stripe + 1, "end_token": stripe + 2}, Status.INVALID_LENGTH, 0)
        )
    return cases


@pytest.mark.parametrize("name", ["tiny", "wide", "middle"])
def test_bad_commands(name):
    """Each bad command between good ones: its job comes in its turn, the lanes are not started."""
    config = CONFIGS[name]
    rng = random.Random(name)
    host = Host()
    cases = bad_commands(config)
    jobs = []
    for number in range(2 * len(cases) + 1):
        command, _ = good_command(rng, config, number, rows=1)
        command["query"], command["result"] = BASE, BASE + 0x8000
        if number % 2:
            command |= cases[number // 2][0]
        jobs.append(command)
        host.put(COMMANDS + 64 * number, COMMAND.pack(**command))
    host.put(BASE, query_bytes(config, [(0, 1, 0, [0x3C00] * config.head_dim)]))
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


@pytest.mark.parametrize("name", ["tiny", "wide", "middle"])
def test_numbers_at_the_limits_are_taken(name):
    config = CONFIGS[name]
    rng = random.Random(name)
    stripe = config.tokens_per_page
    rows = config.rows
    host, jobs = Host(), []
    for number, changes in enumerate(
        (
            {"base_token": 0, "end_token": 1},
            {"base_token": 0, "end_token": config.max_tokens},
            {"base_token": TOP // stripe * stripe, "end_token": TOP},
            {"scale": 1 << 23},
            {"scale": (255 << 23) - 1},
            {"rows": rows, "result": LIMIT - rows * result_row_bytes(config.head_dim)},
            {"rows": rows, "result": BASE},
            {"home": config.channels - 1},
        )
    ):
        command, block = good_command(rng, config, number, rows=rows)
        command["query"] = BASE + 0x1000 * number
        command |= changes
        if command["end_token"] <= command["base_token"]:
            command["base_token"] = command["end_token"] - 1
        jobs.append((command, block))
        place(host, number, command, block, config)
    run(config, host, [len(jobs)], latency=4)
    check_good(config, host, jobs)


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
        command, block = good_command(rng, config, number, rows=config.rows)
        command["query"] = BASE + 0x1000 * number
        for (row, channel), bits in changes.items():
            block[row][3][channel] = bits
        place(host, number, command, block, config)
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
    for number in range(6):
        command, block = good_command(rng, config, number, rows=2)
        command["query"] = BASE + 0x1000 * number
        if number == 3:
            block[0][3][0] = 0x7C00  # what a bad bus says is no NaN
        place(host, number, command, block, config)
        if number in (1, 3):
            host.bad.add(command["query"] + (64, 192)[number == 3])
        if number == 4:
            host.bad.add(COMMANDS + 64 * number)
    run(config, host, [6], latency=4, stall=0.2)
    assert [(j["lanes"], Status(j["status"]), j["where"]) for _, _, j in host.jobs] == [
        (0, Status.BUS_ERROR, 0) if n in (1, 3, 4) else (1, Status.OK, 0) for n in range(6)
    ]
    assert host.errors == 3 * 8


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.randoms(use_true_random=False),
    st.integers(0, 40),
    st.sampled_from((0.0, 0.2, 0.6)),
    st.sampled_from((0.0, 0.7)),
    st.integers(0, 150),
    st.sampled_from(("tiny", "middle", "wide")),
)
def test_any_stalls(rng, latency, stall, job_stall, hold, name):
    config = CONFIGS[name]
    host, jobs = Host(), []
    for number in range(5):
        command, block = good_command(rng, config, number)
        command["query"] = BASE + 0x1000 * number
        jobs.append((command, block))
        place(host, number, command, block, config)
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


def test_window():
    """The check in halves against plain arithmetic, at and round every boundary."""
    dut = _Window()
    rng = random.Random(3)
    top = 1 << 64

    def near(*values):
        return max(0, min(top - 64, rng.choice(values) // 64 * 64 + 64 * rng.randint(-1, 1)))

    async def bench(ctx):
        for _ in range(700):
            edge = rng.choice((1 << 32, 1 << 33, (1 << 63) + (1 << 32), top - 1, 0x1_2345_6780))
            sizes = [64 * rng.randint(1, 300) for _ in range(2)]
            limit = near(edge, edge + rng.choice(sizes), edge + (1 << 32))
            base = near(0, edge - (1 << 32), limit - rng.choice(sizes), edge)
            addresses = [
                near(limit - size, base, edge, edge - 64)
                | (rng.random() < 0.1) * rng.randint(0, 63)
                for size in sizes
            ]
            ctx.set(dut.valid, 1)
            for which in range(2):
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

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
