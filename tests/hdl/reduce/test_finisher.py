"""The finisher among behavioural lanes, chain and memory, with stalls everywhere."""

import random
import re
import struct
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from amaranth.back import rtlil
from tests.hdl.compiled import simulation
from tests.hdl.lib.test_axi_write import Bus
from tests.hdl.lib.test_divider import fp32_quotient
from tests.hdl.reduce import test_blend

from kvattic.spec.commands import COMPLETION, TRAILER, CompletionFlag, Mode, Status, result_row_bytes, unpack_state
from kvattic.spec.config import TINY, Config
from kvattic.spec.formats import SCORE_MASKED
from kvattic.spec.nand import TINY_PART
from kvattic.spec.registers import QUEUES
from kvattic_hdl.lib.divider import Divider, Reciprocal
from kvattic_hdl.lib.shapes import FAULTS, Shapes
from kvattic_hdl.reduce.finisher import Finisher

BASE = 0x1_2345_6780_0000 & ~63
RESULTS = 0xFEDC_0000_0000_0000
BLOCKS = 0xFEDD_0000_0000_0000
COUNTERS = ("cycle", "beats", "starved", "barrier", "weights", "scores", "idle")
STAMPS = ("fetched", "first_beat", "last_beat")
FLAGS = ("score_overflow", "value_overflow", "duplicate")

ONE_ROW = replace(TINY, rows=1, channels=1, jobs_in_flight=2)
COPIES = replace(TINY, rows=3, channels=3, beat_bytes=32, dram_beat_bytes=32)
LONG = replace(TINY, head_dim=64, jobs_in_flight=3)
ODD = Config(
    channels=5,
    rows=3,
    head_dim=80, sparse=False,
    beat_bytes=16,
    part=TINY_PART,
    codeword_bytes=512,
    score_depth=256,
)
BYTES = replace(
    TINY, rows=2, head_dim=96, kv="fp8_e4m3", sparse=False, beat_bytes=32, dram_beat_bytes=32, codeword_bytes=512)
"""Three beats a token, so that copies lie further apart than that."""


@dataclass
class Job:
    """A job as the lanes leave it behind, and how it should end."""

    identifier: int
    rows: int
    result: int
    queue: int = 0
    lanes: bool = True
    status: int = 0
    where: int = 0
    failed: bool = False
    bus_error: bool = False
    accumulators: list = field(default_factory=list)  # [lane][address][row][element]
    denominators: list = field(default_factory=list)  # [lane][row]
    maxima: list = field(default_factory=list)  # [row]
    reports: list = field(default_factory=list)  # [lane] of dict
    mode: Mode = Mode.DENSE
    alphas: list = field(default_factory=list)  # [row]
    mean: list = field(default_factory=list)  # [channel], bits of an fp32
    done_in: list = field(default_factory=list)  # [lane]: cycles until values_done


BLENDED = tuple(mode for mode in Mode if mode.blended)


def some_job(rng, config, number, kind, mode=Mode.DENSE):
    """A random job; kind says how it ends."""
    shapes = Shapes(config)
    size = result_row_bytes(config.head_dim) * config.rows
    rows = config.rows if number % 2 else rng.randint(1, config.rows)
    job = Job(identifier=rng.getrandbits(16), rows=rows, result=RESULTS + number * (size + 64), mode=mode)
    if kind == "empty":
        job.lanes, job.status, job.where = False, rng.choice((1, 2, 7, 11)), rng.getrandbits(32)
        return job
    if kind == "failed":
        job.failed, job.where = True, rng.getrandbits(32)
    job.bus_error = kind == "bus_error"
    bits = config.accumulator_bits - 1 - config.channels.bit_length() - shapes.copies

    def accumulator():
        return rng.getrandbits(rng.randint(1, bits)) * rng.choice(
            (1, -1, 0) if rng.random() < 0.1 else (1, -1)
        )

    for _ in range(config.channels):
        job.accumulators.append(
            [
                [
                    [accumulator() for _ in range(config.elements_per_beat)]
                    for _ in range(config.rows)
                ]
                for _ in range(shapes.copies * shapes.copy_words)
            ]
        )
        job.denominators.append(
            [
                rng.getrandbits(rng.randint(1, config.denominator_bits - 4))
                for _ in range(config.rows)
            ]
        )
        job.reports.append(
            {
                "fault": len(FAULTS),
                "token": rng.getrandbits(24),
                **{name: int(rng.random() < 0.1) for name in FLAGS},
            }
        )
        job.done_in.append(rng.randint(0, 30))
    job.maxima = [rng.randrange(SCORE_MASKED, -SCORE_MASKED) for _ in range(config.rows)]
    if kind == "no_token":
        job.maxima[0] = SCORE_MASKED
        for lane in range(config.channels):
            job.denominators[lane][0] = 0
            for word in job.accumulators[lane]:
                word[0] = [0] * config.elements_per_beat
    if kind in FAULTS or kind == "faults":
        for report in rng.sample(job.reports, rng.randint(1, config.channels)):
            report["fault"] = rng.randrange(len(FAULTS)) if kind == "faults" else FAULTS.index(kind)
    if mode in BLENDED:
        job.alphas = [test_blend.share(rng) for _ in range(config.rows)]
        # Near a row's quotients, so that both matter; each row has one, with other shares.
        quotients = [quotients_of(config, job, rng.randrange(rows)) for _ in range(config.head_dim)]
        job.mean = [test_blend.near(rng, quotient[channel], 20) for channel, quotient in enumerate(quotients)]
    return job


def quotients_of(config, job, row):
    """Bits of one row's quotients."""
    shapes, quotients = Shapes(config), []
    denominator = sum(lane[row] for lane in job.denominators)
    for channel in range(config.head_dim):
        beat, element = divmod(channel, config.elements_per_beat)
        total = sum(
            lane[copy * shapes.copy_words + beat][row][element]
            for lane in job.accumulators
            for copy in range(shapes.copies)
        )
        quotients.append(fp32_quotient(total, denominator))
    return quotients


def expected_status(job):
    """(status, where) of the job's completion."""
    if not job.lanes:
        return job.status, job.where
    if job.failed:
        return Status.CODEWORD_TIMEOUT, job.where
    for fault, name in enumerate(FAULTS):
        tokens = [report["token"] for report in job.reports if report["fault"] == fault]
        if tokens:
            return Status[name.upper()], min(tokens)
    return (Status.BUS_ERROR if job.bus_error else Status.OK), 0


def expected_rows(config, job):
    """Bytes of the job's result block."""
    out = b""
    for row in range(job.rows):
        results = quotients_of(config, job, row)
        if config.sparse and job.mode in BLENDED:
            results = [
                test_blend.blended(quotient, mean, job.alphas[row])
                for quotient, mean in zip(results, job.mean, strict=True)
            ]
        out += b"".join(result.to_bytes(4, "little") for result in results)
        denominator = sum(lane[row] for lane in job.denominators)
        out += TRAILER.pack(maximum=job.maxima[row] & (1 << 64) - 1, denominator=denominator)
    return out


def snapshot_of(cycle):
    """Counters as they stand in this cycle: each tells the cycle, so that a mixture is seen."""
    return {
        name: cycle * (i + 3) & (1 << COMPLETION[name].size * 8) - 1
        for i, name in enumerate(COUNTERS)
    }


def stamps_of(identifier):
    """Times of a job."""
    return {name: identifier * (i + 5) + 1 for i, name in enumerate(STAMPS)}


def packed_snapshot(cycle):
    """The same as the bits of the finisher's input."""
    value = position = 0
    for name, count in snapshot_of(cycle).items():
        value |= count << position
        position += COMPLETION[name].size * 8
    return value


def flat_report(layout, report):
    return sum(report[name] << field.offset for name, field in layout)


def block_word(outcome, index):
    """Word of a command's block."""
    return (outcome["identifier"] + 1) * (index + 3) * 0x9E37_79B9_7F4A_7C15 & (1 << 64) - 1


class World:
    """Everything around the finisher; one `run` is one simulation of batches of jobs.

    `flash` is the number of other commands among each batch's, some with a block.
    """

    def __init__(self, config, batches, *, seed=0, stall=0.0, lane_latency=5, flash=0):
        self.config, self.shapes, self.batches = config, Shapes(config), batches
        self.outcomes = [self.places(batch, flash, random.Random(seed), i) for i, batch in enumerate(batches)]
        self.posts = [0] * QUEUES
        self.post_queues = [0, 0]
        self.block = None
        self.rng, self.stall, self.lane_latency = random.Random(seed), stall, lane_latency
        self.dut, self.simulator = simulation(Finisher, config)
        jobs = [job for batch in batches for job in batch]
        bad = [
            job.result + (result_row_bytes(config.head_dim) if job.rows > 1 else 64)
            for job in jobs
            if job.bus_error
        ]
        self.bus = Bus(self.dut.axi, self.rng, stall, bad)
        self.cycle = 0
        self.slot_job = [None] * config.jobs_in_flight
        self.slot_job_before = list(self.slot_job)
        self.inputs = {}
        self.completed_at = []
        self.completed = []
        self.freed_at = []
        self.last_word_at = None
        self.write_errors = 0

    @staticmethod
    def places(batch, flash, rng, number):
        """Give all commands identifiers of their own, and queues; the other commands."""
        identifiers = rng.sample(range(number << 12, (number + 1) << 12), len(batch) + flash)
        for job in batch:
            job.identifier, job.queue = identifiers.pop(), rng.randrange(QUEUES)
        return [
            {
                "queue": rng.randrange(QUEUES),
                "identifier": identifier,
                "status": rng.choice((Status.OK, Status.PROGRAM_FAILED, Status.DIE_TIMEOUT)),
                "where": rng.getrandbits(32),
                "lines": lines,
                "result": BLOCKS + identifier * 0x1000 if lines else 0,
            }
            for identifier, lines in zip(identifiers, rng.choices((0, 0, 1, 4, 32), k=flash), strict=True)
        ]

    def run(self):
        simulator = self.simulator
        simulator.add_clock(1e-9)
        simulator.add_testbench(self.bench)
        simulator.run()
        self.check_memory()
        return self

    async def bench(self, ctx):
        number = 0
        for batch_number, batch in enumerate(self.batches):
            await self.tick(ctx)
            await self.run_batch(ctx, batch, number, self.outcomes[batch_number])
            number += len(batch)
        for _ in range(20):
            await self.tick(ctx)
        assert ctx.get(self.dut.quiet)

    @staticmethod
    def place(queue, number):
        """Line, phase and head of a queue's completion."""
        return (BASE >> 6) + queue * 0x400 + number, number * 5 >> 2 & 1, (number * 37 + queue) & 0xFFF

    def chance(self):
        return self.rng.random() >= self.stall

    async def tick(self, ctx):
        self.bus.drive(ctx)
        ctx.set(self.dut.snapshot.as_value(), packed_snapshot(self.cycle))
        # A job's stamps stay for a cycle after its slot is freed.
        slot = ctx.get(self.dut.waiting_slot)
        job = self.slot_job_before[slot] or self.slot_job[slot]
        self.slot_job_before = list(self.slot_job)
        ctx.set(self.dut.stamps, stamps_of(job.identifier if job else 0))
        values = await ctx.tick().sample(*self.sampled())
        self.bus.step(ctx, values[2 + self.own :])
        self.post(ctx, *values[2 + self.own - 3 : 2 + self.own])
        under_way = self.bus.addresses + self.bus.waiting
        if any(address < RESULTS for address in under_way):
            assert len(under_way) == 1, "a completion before its results are answered"
        self.cycle += 1
        return values[2 : 2 + self.own - 3]

    def post(self, ctx, queue, post, block_index):
        """What Queues and Admin do."""
        self.post_queues = [self.post_queues[1], queue]
        self.posts[queue] += post
        line, phase, head = self.place(self.post_queues[0], self.posts[self.post_queues[0]])
        ctx.set(self.dut.post_line, line)
        ctx.set(self.dut.post_phase, phase)
        ctx.set(self.dut.post_head, head)
        if self.block is not None:
            ctx.set(self.dut.block_data, block_word(self.block, block_index))

    def sampled(self):
        d = self.dut
        own = (
            d.jobs.valid,
            d.jobs.ready,
            d.waiting,
            d.waiting_slot,
            d.denominator_slot,
            d.denominator_row,
            d.final_slot,
            d.final_row,
            d.report_slot,
            d.chain_head.valid,
            d.chain_head.ready,
            d.chain_head.payload.slot,
            d.chain_head.payload.address,
            d.chain_tail.valid,
            d.chain_tail.ready,
            d.freed,
            d.freed_slot,
            d.completed,
            d.write_error,
            d.outcomes.valid,
            d.outcomes.ready,
            d.post_queue,
            d.post,
            d.block_index,
        )
        self.own = len(own)
        return own + self.bus.signals()

    async def run_batch(self, ctx, batch, number, outcomes, limit=60000):
        dut, config, shapes, _rng = self.dut, self.config, self.shapes, self.rng
        slots = config.jobs_in_flight
        self.slot_job = slot_job = [None] * slots  # what the lanes hold
        means = deque()  # (slot, index of a pair, data) that the loader hands out
        since = [0] * slots
        done = [0] * config.channels
        given = passed = freed = completed = ended = told = 0
        chain = deque()  # (cycle in which it may leave, slot, address, data)
        addresses = []
        later = {}  # addresses applied in the last cycle
        end = self.cycle + limit

        while completed + told < len(batch) + len(outcomes):
            assert self.cycle < end, "the batch did not end"
            # Slots get their jobs as soon as they are free, as the loader would do it.
            while given < len(batch) and given - freed < slots:
                slot = (number + given) % slots
                job = batch[given]
                slot_job[slot], since[slot] = job, self.cycle
                pairs = zip(job.mean[::2], job.mean[1::2], strict=True)
                means.extend((slot, i, low | high << 32) for i, (low, high) in enumerate(pairs))
                given += 1
            writes_mean = bool(means) and self.chance()
            if writes_mean:
                ctx.set(dut.mean, dict(zip(("slot", "index", "data"), means.popleft(), strict=True)))
            self.set(ctx, dut.mean_valid, writes_mean, "mean")
            for lane in range(config.channels):
                done[lane] = sum(
                    1 << slot
                    for slot, job in enumerate(slot_job)
                    if job is not None
                    and job.lanes
                    and self.cycle - since[slot] >= job.done_in[lane]
                    and all(slot != other for other, _, _ in means)
                )
                self.set(ctx, dut.values_done[lane], done[lane], ("done", lane))
            failed = sum(
                1 << slot for slot, job in enumerate(slot_job) if job is not None and job.failed
            )
            self.set(ctx, dut.failed, failed, "failed")
            oldest = next((job for job in batch[freed:] if job.failed), None)
            self.set(ctx, dut.failed_where, oldest.where if oldest and failed else 0xDEAD, "where")

            if passed < given and not ctx.get(dut.jobs.valid) and self.chance():
                job = batch[passed]
                ctx.set(
                    dut.jobs.payload,
                    {
                        "slot": (number + passed) % slots,
                        "lanes": job.lanes,
                        "mode": job.mode,
                        "queue": job.queue,
                        "identifier": job.identifier,
                        "rows": job.rows,
                        "result": job.result,
                        "status": job.status,
                        "where": 0 if job.lanes else job.where,
                    },
                )
                ctx.set(dut.jobs.valid, 1)
            if ended < len(outcomes) and not ctx.get(dut.outcomes.valid) and self.chance():
                ctx.set(dut.outcomes.payload, outcomes[ended])
                ctx.set(dut.outcomes.valid, 1)
            ctx.set(dut.chain_head.ready, len(chain) < config.channels + 1 and self.chance())
            if (
                chain
                and chain[0][0] <= self.cycle
                and not ctx.get(dut.chain_tail.valid)
                and self.chance()
            ):
                _, slot, address, words = chain[0]
                ctx.set(dut.chain_tail.payload, {"slot": slot, "address": address, "data": words})
                ctx.set(dut.chain_tail.valid, 1)

            (
                jobs_valid,
                jobs_ready,
                waiting,
                waiting_slot,
                d_slot,
                d_row,
                f_slot,
                f_row,
                r_slot,
                head_valid,
                head_ready,
                head_slot,
                head_address,
                tail_valid,
                tail_ready,
                is_freed,
                freed_slot,
                is_completed,
                error,
                outcome_valid,
                outcome_ready,
            ) = await self.tick(ctx)
            self.write_errors += error

            # Memories: two cycles from address to value.
            if later:
                self.answer(ctx, slot_job, later)
            later = {"denominator": (d_slot, d_row), "final": (f_slot, f_row), "report": r_slot}

            if waiting:
                assert jobs_valid
                assert slot_job[waiting_slot] is batch[passed]
            if head_valid and head_ready:
                job = slot_job[head_slot]
                assert job is batch[passed]
                assert all(value >> head_slot & 1 for value in done)
                addresses.append(head_address)
                words = [
                    [
                        sum(lane[head_address][row][e] for lane in job.accumulators)
                        for e in range(config.elements_per_beat)
                    ]
                    for row in range(config.rows)
                ]
                chain.append(
                    (
                        self.cycle + self.lane_latency * config.channels,
                        head_slot,
                        head_address,
                        words,
                    )
                )
            if tail_valid and tail_ready:
                chain.popleft()
                ctx.set(dut.chain_tail.valid, 0)
                self.last_word_at = self.cycle
            if is_freed:
                job = batch[freed]
                # With the last word, not later; or when its last quotient comes, whose mean is still needed.
                if job.lanes:
                    blended = config.sparse and job.mode in BLENDED
                    later_by = Divider.INTERVAL * config.elements_per_beat + 1 + Divider.LATENCY if blended else 0
                    assert self.cycle == self.last_word_at + later_by
                assert freed_slot == (number + freed) % slots
                assert slot_job[freed_slot] is job
                assert not chain
                if job.lanes:
                    assert addresses == [
                        c * shapes.copy_words + b for b in range(config.beats_per_token) for c in range(shapes.copies)
                    ]
                addresses = []
                slot_job[freed_slot] = None
                self.freed_at.append(self.cycle)
                freed += 1
            if jobs_valid and jobs_ready:
                assert freed == passed + 1
                passed += 1
                ctx.set(dut.jobs.valid, 0)
            if outcome_valid and outcome_ready:
                self.block = outcomes[ended]
                ended += 1
                ctx.set(dut.outcomes.valid, 0)
            if is_completed:
                assert not self.bus.waiting
                line = dict(self.bus.lines)[self.bus.answered[-1]]
                identifier = COMPLETION.unpack(line)["identifier"]
                # Jobs in their order, and other commands in theirs.
                if told < len(outcomes) and identifier == outcomes[told]["identifier"]:
                    assert told < ended
                    told += 1
                else:
                    assert identifier == batch[completed].identifier
                    assert completed < passed
                    completed += 1
                self.completed_at.append(self.cycle)
                self.completed.append(identifier)
        assert freed == passed == len(batch)

    def set(self, ctx, target, value, name):
        """Sets an input only when it changes, which is most of the simulation's time."""
        if self.inputs.get(name) != value:
            self.inputs[name] = value
            ctx.set(target, value)

    def answer(self, ctx, slot_job, addresses):
        """What the memories put out; where nobody should look it is all ones."""
        dut, layout, rows = self.dut, self.shapes.report, self.config.rows
        slot, row = addresses["denominator"]
        job = slot_job[slot] if slot_job[slot] is not None and slot_job[slot].lanes else None
        for lane in range(self.config.channels):
            value = (
                job.denominators[lane][row]
                if job and row < rows
                else (1 << dut.denominators[lane].shape().width) - 1
            )
            self.set(ctx, dut.denominators[lane], value, ("denominator", lane))
        slot, row = addresses["final"]
        job = slot_job[slot] if slot_job[slot] is not None and slot_job[slot].lanes else None
        self.set(ctx, dut.final, job.maxima[row] if job and row < rows else -1, "final")
        alpha = job.alphas[row] if job and job.alphas and row < rows else (1 << len(dut.alpha)) - 1
        self.set(ctx, dut.alpha, alpha, "alpha")
        slot = addresses["report"]
        job = slot_job[slot] if slot_job[slot] is not None and slot_job[slot].lanes else None
        for lane in range(self.config.channels):
            value = flat_report(layout, job.reports[lane]) if job else (1 << layout.size) - 1
            self.set(ctx, dut.reports[lane].as_value(), value, ("report", lane))

    def check_memory(self):
        """All that was written is what should be, where it should be, and once."""
        wanted = {}
        items = {}
        for batch_number, batch in enumerate(self.batches):
            for outcome in self.outcomes[batch_number]:
                items[outcome["identifier"]] = outcome
                for i in range(outcome["lines"]):
                    words = [block_word(outcome, 8 * i + j) for j in range(8)]
                    wanted[outcome["result"] + 64 * i] = struct.pack("<8Q", *words)
            for job in batch:
                items[job.identifier] = job
                status, _ = expected_status(job)
                if status in (Status.OK, Status.BUS_ERROR) and job.lanes:
                    block = expected_rows(self.config, job)
                    wanted |= {job.result + i: block[i : i + 64] for i in range(0, len(block), 64)}
        completions, posts = {}, [0] * QUEUES
        for identifier in self.completed:
            item = items.pop(identifier)
            queue = item["queue"] if isinstance(item, dict) else item.queue
            line, phase, head = self.place(queue, posts[queue])
            posts[queue] += 1
            completions[line << 6] = item, queue, phase, head
        assert not items and posts == self.posts
        written = dict(self.bus.lines)
        assert len(written) == len(self.bus.lines), "a line was written twice"
        assert written.keys() == wanted.keys() | completions.keys()
        for address, line in wanted.items():
            assert written[address] == line, hex(address)
        for address, (job, *place) in completions.items():
            values = COMPLETION.unpack(written[address])
            assert [values["queue"], values["state"] & 1, values["head"]] == place
            values["status"] = unpack_state(values["state"])
            if isinstance(job, dict):
                flags = 0
                assert {name: values[name] for name in ("identifier", "status", "where")} == {
                    name: job[name] for name in ("identifier", "status", "where")
                }
                assert not any(values[name] for name in STAMPS)
            else:
                flags = sum(
                    CompletionFlag[name.upper()]
                    for name in FLAGS
                    if job.lanes and any(report[name] for report in job.reports)
                )
                assert (values["status"], values["where"]) == expected_status(job)
                assert values["identifier"] == job.identifier
                assert {name: values[name] for name in STAMPS} == stamps_of(job.identifier)
            assert values["flags"] == flags
            cycle = values["cycle"] // 3
            assert {name: values[name] for name in COUNTERS} == snapshot_of(cycle)
            del values["status"]
            assert written[address] == COMPLETION.pack(**values)


ALL_KINDS = (
    "ok",
    "empty",
    "failed",
    "nan_key",
    "ok",
    "nan_value",
    "unreadable_key",
    "faults",
    "unreadable_value",
    "faults",
    "no_token",
    "empty",
    "empty",
    "bus_error",
    "failed",
    "ok",
)


def batch_of(config, kinds, seed, first=0, modes=(Mode.DENSE,)):
    rng = random.Random(seed)
    return [
        some_job(rng, config, first + number, kind, modes[number % len(modes)])
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("config", "stall"),
    [(TINY, 0.0), (TINY, 0.5), (ONE_ROW, 0.0), (COPIES, 0.3), (LONG, 0.0)],
    ids=["tiny", "tiny_stalls", "one_row", "copies", "long"],
)
def test_blended(config, stall):
    """All modes among each other: SPARF and FETCHED are blended, a slot's mean stays until it has been read."""
    kinds = ("ok", "ok", "ok", "no_token", "ok", "failed", "ok", "nan_value", "empty", "ok", "ok", "bus_error", "ok")
    modes = (Mode.SPARF, Mode.CODES, Mode.DENSE, Mode.FETCHED, Mode.CENTROID)
    batch = batch_of(config, kinds, 6, modes=modes)
    for job in batch:
        job.done_in = [0] * config.channels
    assert {job.mode for job in batch if expected_status(job)[0] == Status.OK} == set(Mode)
    plain = [expected_rows(config, replace(job, mode=Mode.DENSE)) for job in batch[:2]]
    assert plain != [expected_rows(config, job) for job in batch[:2]]
    World(config, [batch], stall=stall, seed=5, flash=2).run()


@pytest.mark.usefixtures("each_simulator")
def test_alpha_of_all_and_of_nothing():
    """Rows of one job with alpha 1, 0 and between: the quotient, the mean, a blend."""
    batch = batch_of(COPIES, ["ok"] * 4, 12, modes=[Mode.SPARF])
    for number, job in enumerate(batch):
        job.rows, job.alphas = 3, [1 << 24, 0, 1 << 23]
        job.alphas = job.alphas[number % 3:] + job.alphas[:number % 3]
        for row, alpha in enumerate(job.alphas):
            row_bytes = result_row_bytes(COPIES.head_dim)
            block = expected_rows(COPIES, job)[row * row_bytes :][: 4 * COPIES.head_dim]
            results = [int.from_bytes(block[i : i + 4], "little") for i in range(0, len(block), 4)]
            if alpha in (0, 1 << 24):
                assert results == (quotients_of(COPIES, job, row) if alpha else job.mean)
    World(COPIES, [batch], seed=7).run()


def test_without_sparse_nothing_is_blended():
    config = replace(TINY, sparse=False)
    batch = batch_of(config, ["ok"] * 3, 13, modes=BLENDED)
    World(config, [batch], seed=7).run()
    for name in ("blend", "means", "alphas"):
        assert re.search(rf"\\{name}\b", rtlil.convert(Finisher(TINY)))
        assert not re.search(rf"\\{name}\b", rtlil.convert(Finisher(config)))


@pytest.mark.parametrize("stall", [0.0, 0.3, 0.8])
def test_all_statuses(stall):
    world = World(
        TINY, [batch_of(TINY, ALL_KINDS, 1)], stall=stall, seed=int(stall * 10), flash=20
    ).run()
    assert world.write_errors == 1


def test_which_fault_is_reported():
    """Many combinations over the lanes."""
    batch = batch_of(ODD, ["faults"] * 12, 9)
    for job in batch:
        job.rows = 1
    assert len({min(report["fault"] for report in job.reports) for job in batch}) > 2
    World(ODD, [batch], seed=1).run()


def test_flash_commands_alone():
    world = World(TINY, [[], []], stall=0.3, seed=2, flash=9).run()
    assert len(world.completed) == 18


def test_neither_jobs_nor_flash_commands_wait_for_all_of_the_others():
    jobs = batch_of(TINY, ["ok"] * 4, 8)
    for job in jobs:
        job.done_in = [0] * TINY.channels
    world = World(TINY, [jobs], seed=3, flash=40).run()
    at = [world.completed.index(job.identifier) for job in jobs]
    assert 0 < at[0] < at[-1] < 40


def test_a_flash_command_ends_while_a_job_waits_for_its_lanes():
    jobs = batch_of(TINY, ["ok"], 8)
    jobs[0].done_in = [4000] * TINY.channels
    world = World(TINY, [jobs], seed=3, flash=5).run()
    assert world.completed[-1] == jobs[0].identifier
    assert world.completed_at[-2] < 3900


@pytest.mark.parametrize("begun", [1, 2, 3, 6, 10])
def test_outcomes_are_taken_while_it_stops(begun):
    """Whatever it was doing: a reset waits for the flash commands that are under way, and nobody else takes them."""
    dut, simulator = simulation(Finisher, TINY)

    async def bench(ctx):
        ctx.set(dut.outcomes.valid, 1)
        ctx.set(dut.axi.awready, 1)
        ctx.set(dut.axi.wready, 1)
        await ctx.tick().repeat(begun)
        ctx.set(dut.stop, 1)
        for _ in range(30):
            assert ctx.get(dut.outcomes.ready)
            await ctx.tick()

    simulator.add_clock(1e-9)
    simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.parametrize("config", [ONE_ROW, COPIES, ODD, BYTES], ids=["one_row", "copies", "odd", "bytes"])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_geometries(config, stall):
    kinds = ("ok", "nan_key", "failed", "no_token", "ok")
    World(config, [batch_of(config, kinds, 2)], stall=stall, seed=3).run()


def test_copies_are_there():
    """The geometry with copies has them, the others have none."""
    assert Shapes(COPIES).copies == Shapes(BYTES).copies == 2
    assert {Shapes(config).copies for config in (TINY, ONE_ROW, ODD)} == {1}


@pytest.mark.usefixtures("each_simulator")
def test_jobs_after_a_pause():
    first = batch_of(TINY, ("ok", "empty", "ok"), 4)
    second = batch_of(TINY, ("empty", "ok"), 5, first=3)
    World(TINY, [first, second], seed=6, stall=0.2, flash=2).run()


@pytest.mark.parametrize("config", [TINY, ONE_ROW], ids=["tiny", "one_row"])
def test_throughput(config):
    """Jobs that are done follow each other at a quotient every second cycle and a small constant."""
    jobs = batch_of(config, ["ok"] * 4, 8)
    for job in jobs:
        job.rows, job.done_in = config.rows, [0] * config.channels
    world = World(config, [jobs], lane_latency=3).run()
    gaps = [b - a for a, b in zip(world.freed_at, world.freed_at[1:], strict=False)]
    gathering = max(config.rows * Reciprocal.LATENCY, config.channels * (config.rows + 3))
    assert max(gaps) <= Divider.INTERVAL * config.rows * config.head_dim + gathering + 80, gaps
