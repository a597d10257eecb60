"""The channel controller against the Python twin of the NAND: every codeword once, no violation, busy buses."""

import random
from collections import Counter, deque
from dataclasses import dataclass, replace

import pytest
from amaranth.hdl import Signal
from amaranth.sim import Simulator

from kvattic.commands import Kind, MediaCause, Opcode, Status
from kvattic.config import PAPER, TINY, Config
from kvattic.nand import PSLC
from kvattic_hdl.flash.controller import Controller
from kvattic_hdl.interfaces import EPOCH_BITS
from kvattic_sim.nand_twin import NandChannel, NandFaults, attach

OPERATION_OPCODE_MASK = 7


@dataclass(frozen=True)
class Request:
    """A codeword wanted."""

    page: int
    codeword: int
    kind: int = 0
    slot: int = 0
    epoch: int = 0
    place: int = 0

    def tag(self):
        """As the header's tag."""
        return {"place": self.place, "kind": self.kind, "slot": self.slot, "epoch": self.epoch}


@dataclass(frozen=True)
class Arrival:
    """A codeword that came: its header and its bytes."""

    page: int
    codeword: int
    kind: int
    slot: int
    epoch: int
    place: int
    level: int
    cause: int
    cycle: int
    data: bytes

    def request(self):
        """What asked for it."""
        return Request(self.page, self.codeword, self.kind, self.slot, self.epoch, self.place)


@dataclass
class Operation:
    """A flash operation, and the raw page that it programs."""

    opcode: Opcode
    page: int
    block: int = 0
    data: bytes = b""


class Bench:
    """A controller, its dies, and a decoder and an encoder of a few lines."""

    def __init__(self, config, *, faults=None, depth=16, buffers=4, in_flight=10**9, seed=0, drain=None):
        self.config = config
        self.dut = Controller(config, depth=depth)
        self.nand = NandChannel(config, seed=seed, faults=faults)
        self.rng = random.Random(seed)
        self.requests = deque()
        self.operations = deque()
        self.words = deque()
        self.retries = deque()
        self.word_gap = 0            # probability that no word is offered in a cycle
        self.outcomes_ready = 1.0
        self.gap = 0                 # the same for requests
        self.in_flight = in_flight
        self.buffers = buffers
        self.drain = drain or config.raw_codeword_words   # cycles that the decoder keeps a buffer after its last word
        self.arrivals = []
        self.outcomes = []
        self.asked = 0
        self.commands = []           # (cycle, target, bytes of a command: byte, or (byte,) of an address)
        self.command_times = []
        self.counts = Counter()
        self.value_open = (1 << config.jobs_in_flight) - 1
        self.epochs = [0] * config.jobs_in_flight
        self.open_at = {}            # cycle -> (value_open, epochs)
        self.broken_gates = []
        self.cycle = 0
        self.stored = {}
        self.maps = {}
        self.on_arrival = None

    # What is where.

    def place(self, page):
        """(die, plane, block, page of the block) of a page number."""
        c = self.config
        plane = page & (1 << c.plane_bits) - 1
        die = page >> c.plane_bits & (1 << c.die_bits) - 1
        number = page >> c.plane_bits + c.die_bits & (1 << c.block_page_bits) - 1
        zone = page >> c.zone_page_bits
        return die, plane, self.maps.get((zone, die, plane), zone), number

    def page(self, die, plane, number, zone=0):
        """Page number."""
        c = self.config
        return ((zone << c.block_page_bits | number) << c.die_bits | die) << c.plane_bits | plane

    def fill(self, page):
        """Random contents, once."""
        if page not in self.stored:
            self.stored[page] = self.rng.randbytes(self.config.raw_page_bytes)
            self.nand.load(self.place(page), self.stored[page])
        return self.stored[page]

    def ask(self, requests):
        """Queue requests; their pages get contents."""
        for request in requests:
            self.fill(request.page)
            self.requests.append(request)
            self.asked += 1

    def operate(self, operations):
        """Queue operations and their words."""
        size = self.config.beat_bytes
        for operation in operations:
            self.operations.append(operation)
            data = operation.data
            if operation.opcode is Opcode.PROGRAM:
                assert len(data) == self.config.raw_page_bytes
                self.words.extend(int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size))

    def program(self, page):
        """A PROGRAM of random data."""
        data = self.rng.randbytes(self.config.raw_page_bytes)
        self.stored[page] = data
        return Operation(Opcode.PROGRAM, page, data=data)

    # The simulation.

    async def _play(self, ctx):
        dut, config = self.dut, self.config
        words = config.raw_codeword_words
        announced = deque()          # headers whose words are to come
        collected = []
        freed = deque()              # cycles in which a buffer becomes free
        buffers = self.buffers
        operations = outcomes_due = 0
        shown = {}

        def put(signal, value):
            if shown.get(id(signal)) != value:
                shown[id(signal)] = value
                ctx.set(signal, value)

        r, o = dut.requests, dut.operations
        samples = (r.ready, o.ready, dut.words.ready, dut.outcomes.valid, dut.outcomes.payload, dut.headers.valid,
                   dut.headers.payload, dut.words_valid, dut.phy.read, dut.retries.ready, dut.phy.cycles.valid,
                   dut.phy.cycles.ready, dut.phy.cycles.payload, dut.phy.bursts.valid, dut.phy.bursts.ready, dut.events)
        requested = operated = offered = retried = None
        header_ready = outcomes_ready = 0
        put(dut.value_open, self.value_open)
        async for _, _, *values in ctx.tick().sample(*samples):
            (r_ready, o_ready, w_ready, out_valid, out, h_valid, header, word_valid, word, retry_ready, c_valid, c_ready,
             cycle, b_valid, b_ready, events) = values
            self.cycle += 1
            now = self.cycle
            # What fired.
            if requested is not None and r_ready:
                requested = None
            if operated is not None and o_ready:
                operated = None
            if offered is not None and w_ready:
                offered = None
            if retried is not None and retry_ready:
                retried = None
                buffers += 1
            if out_valid and outcomes_ready:
                self.outcomes.append((int(out.identity), int(out.page), Status(out.status)))
            if c_valid and c_ready:
                self.counts["cycles"] += 1
                if not cycle.address:
                    self.commands.append((int(cycle.target), int(cycle.byte)))
                    self.command_times.append(now)
            self.counts["bursts"] += bool(b_valid and b_ready)
            if events.page_reads:
                self.counts["page_reads"] += int(events.page_reads)
            self.counts["programs"] += int(events.page_programs)
            self.counts["erases"] += int(events.block_erases)
            self.counts["retries"] += int(events.retry)
            if word_valid:
                assert announced, "a word without a header"
                collected.append(word)
                if len(collected) == words:
                    data = b"".join(w.to_bytes(config.beat_bytes, "little") for w in collected)
                    collected = []
                    self._arrived(announced.popleft(), data, now)
                    freed.append(now + self.drain)
            if h_valid and header_ready:
                buffers -= 1
                if header.cause:
                    self._arrived(header, b"", now)
                    freed.append(now + 1)
                else:
                    announced.append(header)
                tag = header.tag
                if int(tag.kind) and not self.value_open >> tag.slot & 1 and self.epochs[tag.slot] == tag.epoch:
                    self.broken_gates.append((now, header))
            while freed and freed[0] <= now:
                freed.popleft()
                buffers += 1
            # What is offered next.
            if now in self.open_at:
                self.value_open, self.epochs = self.open_at[now]
                put(dut.value_open, self.value_open)
                ctx.set(dut.epoch, self.epochs)
            in_flight = self.started - len(self.arrivals)
            if requested is None and self.requests and in_flight < self.in_flight and (
                    not self.gap or self.rng.random() >= self.gap):
                requested = self.requests.popleft()
                self.started += 1
                ctx.set(r.payload, {"tag": requested.tag(), "page": requested.page, "codeword": requested.codeword,
                                    "dram": 0})
            put(r.valid, requested is not None)
            if operated is None and self.operations:
                operated = self.operations.popleft()
                ctx.set(o.payload, {"opcode": operated.opcode & OPERATION_OPCODE_MASK, "page": operated.page,
                                    "block": operated.block, "identity": operations})
                operations += 1
            put(o.valid, operated is not None)
            if offered is None and self.words and (not self.word_gap or self.rng.random() >= self.word_gap):
                offered = self.words.popleft()
                put(dut.words.payload, offered)
            put(dut.words.valid, offered is not None)
            if retried is None and self.retries:
                retried = self.retries.popleft()
                ctx.set(dut.retries.payload, {
                    "tag": retried.request().tag(), "page": retried.page, "codeword": retried.codeword,
                    "level": retried.level + 1})
            put(dut.retries.valid, retried is not None)
            header_ready = int(buffers > 0)
            put(dut.headers.ready, header_ready)
            outcomes_ready = int(self.outcomes_ready == 1.0 or self.rng.random() < self.outcomes_ready)
            put(dut.outcomes.ready, outcomes_ready)
            del outcomes_due
            outcomes_due = 0

    def _arrived(self, header, data, now):
        tag = header.tag
        arrival = Arrival(*(int(x) for x in (header.page, header.codeword, tag.kind, tag.slot, tag.epoch, tag.place,
                                             header.level, header.cause)), now, data)
        if self.on_arrival and self.on_arrival(arrival):
            return
        self.arrivals.append(arrival)

    started = 0

    def run(self, *, outcomes=0, limit=200_000, vcd=None):
        """Until everything that was asked for came; then a little longer."""
        simulator = Simulator(self.dut)
        simulator.add_clock(1e-6)
        simulator.add_testbench(self._play, background=True)
        simulator.add_process(attach(self.nand, self.dut.phy))

        async def wait(ctx):
            while (len(self.arrivals) < self.asked or len(self.outcomes) < outcomes) and self.cycle < limit:
                await ctx.tick().repeat(50)
            await ctx.tick().repeat(300)

        simulator.add_testbench(wait)
        if vcd:
            with simulator.write_vcd(vcd):
                simulator.run()
        else:
            simulator.run()
        return self

    # The checks.

    def check(self, *, asked=None):
        """Each codeword once, with the right bytes; no violation; V held back."""
        assert self.nand.violations == []
        assert self.broken_gates == []
        size = self.config.raw_codeword_bytes
        for a in self.arrivals:
            if not a.cause:
                assert a.data == self.stored[a.page][a.codeword * size :][:size], a
        if asked is not None:
            assert len(self.arrivals) == len(asked)
            assert Counter(a.request() for a in self.arrivals) == Counter(asked)

    def count(self, byte):
        """Commands of that first or second byte."""
        return sum(b == byte for _, b in self.commands)

    def used(self, first=None):
        """Share of the raw bus time that moved codewords, from the first to the last arrival."""
        arrivals = self.arrivals
        span = arrivals[-1].cycle - arrivals[0].cycle
        codeword = self.config.raw_codeword_bytes * self.config.clock_mhz / self.config.part.bus_mts
        return (len(arrivals) - 1) * codeword / span


def dense(bench, pages, *, kind=0, slot=0, first=0):
    """All codewords of consecutive pages, as a walker asks."""
    config = bench.config
    return [Request(first + i // config.codewords_per_page, i % config.codewords_per_page, kind, slot,
                    place=i % (1 << place_bits(config))) for i in range(pages * config.codewords_per_page)]


def place_bits(config):
    """Bits of a place."""
    return max(1, (config.ring_codewords - 1).bit_length())


def test_dense_pages():
    bench = Bench(TINY)
    asked = dense(bench, 24)
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    assert bench.count(0x32) == 12 and bench.count(0x30) == 12
    assert bench.counts["page_reads"] == 24
