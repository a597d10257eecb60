"""The channel controller against the Python twin of the NAND: every codeword once, no violation, busy buses."""

import random
from collections import Counter, deque
from dataclasses import dataclass, replace

import pytest
from tests.hdl.compiled import simulation

from kvattic.spec import config as presets
from kvattic.spec.commands import Kind, MediaCause, Opcode, Status
from kvattic_hdl.flash.controller import Controller
from kvattic_hdl.lib.shapes import operation_code
from kvattic_sim.nand.twin import NandChannel, NandFaults, attach


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
        self.dut, self.simulator = simulation(Controller, config, depth=depth)
        self.nand = NandChannel(config, seed=seed, faults=faults)
        self.rng = random.Random(seed)
        self.requests = deque()
        self.operations = deque()
        self.words = deque()
        self.retries = deque()
        self.word_gap = 0            # probability that no word is offered in a cycle
        self.outcomes_ready = 1.0
        self.gap = 0                 # the same for requests
        self.pace = 0                # cycles between two requests at least
        self.asked_at = []           # cycles in which requests were offered
        self.hold = 0                # outcomes before the first request
        self.in_flight = in_flight
        self.buffers = buffers
        self.drain = drain or config.raw_codeword_words   # cycles that the decoder keeps a buffer after its last word
        self.arrivals = []
        self.outcomes = []
        self.asked = 0
        self.commands = []           # (cycle, target, byte); no addresses
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
        operations = 0
        shown = {}

        def put(signal, value):
            if shown.get(id(signal)) != value:
                shown[id(signal)] = value
                ctx.set(signal, value)

        r, o = dut.requests, dut.operations
        r_valid, o_valid, words_valid, words_payload, retries_valid, headers_ready, outcomes_taken = (
            r.valid, o.valid, dut.words.valid, dut.words.payload, dut.retries.valid, dut.headers.ready,
            dut.outcomes.ready)    # looking them up takes as long as a cycle
        samples = (r.ready, o.ready, dut.words.ready, dut.outcomes.valid, dut.outcomes.payload, dut.headers.valid,
                   dut.headers.payload, dut.words_valid, dut.phy.read, dut.retries.ready, dut.phy.cycles.valid,
                   dut.phy.cycles.ready, dut.phy.cycles.payload, dut.phy.bursts.valid, dut.phy.bursts.ready, dut.events)
        requested = operated = offered = retried = None
        header_ready = outcomes_ready = 0
        put(dut.value_open, self.value_open)
        async for _, _, *values in ctx.tick().sample(*samples):
            (r_ready, o_ready, w_ready, out_valid, out, h_valid, header, word_valid, word, retry_ready, c_valid,
             c_ready, cycle, b_valid, b_ready, events) = values
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
                    self.commands.append((now, int(cycle.target), int(cycle.byte)))
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
                    len(self.outcomes) >= self.hold and (not self.gap or self.rng.random() >= self.gap)) and (
                    not self.pace or now >= self.pace * (len(self.asked_at) + 1)):
                requested = self.requests.popleft()
                self.asked_at.append(now)
                self.started += 1
                ctx.set(r.payload, {"tag": requested.tag(), "page": requested.page, "codeword": requested.codeword,
                                    "dram": 0})
            put(r_valid, requested is not None)
            if operated is None and self.operations:
                operated = self.operations.popleft()
                ctx.set(o.payload, {"opcode": operation_code(operated.opcode), "page": operated.page,
                                    "block": operated.block, "identity": operations})
                operations += 1
            put(o_valid, operated is not None)
            if offered is None and self.words and (not self.word_gap or self.rng.random() >= self.word_gap):
                offered = self.words.popleft()
                put(words_payload, offered)
            put(words_valid, offered is not None)
            if retried is None and self.retries:
                retried = self.retries.popleft()
                ctx.set(dut.retries.payload, {
                    "tag": retried.request().tag(), "page": retried.page, "codeword": retried.codeword,
                    "level": retried.level + 1})
            put(retries_valid, retried is not None)
            header_ready = int(buffers > 0)
            put(headers_ready, header_ready)
            outcomes_ready = int(self.outcomes_ready == 1.0 or self.rng.random() < self.outcomes_ready)
            put(outcomes_taken, outcomes_ready)

    def _arrived(self, header, data, now):
        tag = header.tag
        arrival = Arrival(*(int(x) for x in (header.page, header.codeword, tag.kind, tag.slot, tag.epoch, tag.place,
                                             header.level, header.cause)), now, data)
        if self.on_arrival and self.on_arrival(arrival):
            return
        self.arrivals.append(arrival)

    started = 0

    def run(self, *, outcomes=0, limit=100_000, vcd=None):
        """Until everything that was asked for came; then a little longer."""
        simulator = self.simulator
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
        return sum(b == byte for _, _, b in self.commands)

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


def random_codewords(bench, rng, count, pages):
    """Single codewords of random pages, and runs of them."""
    config = bench.config
    asked = []
    while len(asked) < count:
        page = rng.choice(pages)
        first = rng.randrange(config.codewords_per_page)
        for codeword in range(first, min(config.codewords_per_page, first + rng.choice((1, 1, 2, 5)))):
            asked.append(Request(page, codeword, place=len(asked) % (1 << place_bits(config))))
    return asked[:count]


def statuses(bench):
    """Status by identity; each operation has one outcome, for its own page."""
    assert len({i for i, _, _ in bench.outcomes}) == len(bench.outcomes)
    return {i: status for i, _, status in bench.outcomes}


TINY = replace(presets.TINY, part=replace(
    presets.TINY.part, t_r=1_200.0, t_prog=3_000.0, t_bers=5_000.0, t_rst=2_000.0, t_feat=400.0))
SEPARATE = replace(TINY, part=replace(TINY.part, separate_command_bus=True))
WIDE = replace(TINY, dies=4, part=replace(TINY.part, planes=4, pages=6))
NARROW = replace(TINY, dies=1, part=replace(TINY.part, planes=1))
SLOW_BUS = replace(TINY, beat_bytes=16, part=replace(TINY.part, bus_mts=333.0))
CACHED = replace(TINY, cache_reads=True)
CONFIGS = {"tiny": TINY, "cached": CACHED, "separate": SEPARATE, "wide": WIDE, "narrow": NARROW, "slow": SLOW_BUS}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def all_pages(bench, zones=2):
    """Page numbers of the first zones."""
    c = bench.config
    return [bench.page(die, plane, number, zone) for zone in range(zones) for number in range(c.part.pages)
            for die in range(c.dies) for plane in range(c.part.planes)]


def test_dense_pages(config):
    bench = Bench(config)
    asked = dense(bench, 24)
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    planes = config.part.planes
    assert bench.count(0x32) == 24 - 24 // planes
    assert bench.count(0x30) + bench.count(0x31) == 24 // planes
    if config is CACHED:
        # Each die's last batch is moved with 3Fh, all others by the next read.
        assert bench.count(0x30) == bench.count(0x3F) == config.dies
    assert bench.counts["page_reads"] == 24
    # In a page that is moved in order nothing has to be said between codewords.
    assert bench.count(0xE0) <= 24


def test_random_codewords(config):
    rng = random.Random(1)
    bench = Bench(config, in_flight=40, drain=90)
    bench.gap = 0.5
    asked = random_codewords(bench, rng, 100, all_pages(bench))
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)


@pytest.mark.usefixtures("each_simulator")
def test_a_page_in_the_register_is_not_read_again():
    bench = Bench(TINY)
    asked = [Request(5, codeword, place=i) for i, codeword in enumerate((2, 0, 3, 1, 1))]
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    assert bench.counts["page_reads"] == 1
    # A single-plane read begins at the first codeword wanted, so only the others need a change of column.
    assert bench.count(0x05) == 4 and bench.count(0x06) == 0


def test_planes_that_are_asked_for_one_after_the_other_are_read_together():
    """As a walker asks that looks at all codewords of a page, and wants two of them."""
    bench = Bench(WIDE)
    bench.pace = 64
    asked = [Request(bench.page(die, plane, 3), codeword, place=8 * plane + codeword)
             for die in (1, 2, 1) for plane in range(4) for codeword in (1, 3)]
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    reads = [target for _, target, byte in bench.commands if byte == 0x30]
    assert reads in ([1, 2], [1, 2, 1])
    assert bench.count(0x32) == 3 * len(reads)


def test_a_plane_alone_does_not_wait_long_for_others():
    """Nor do others hold it back that come again and again: each plane only once."""
    bench = Bench(WIDE)
    bench.pace = 2_000
    asked = [Request(bench.page(2, plane, plane), 1, place=plane) for plane in (0, 3, 1)]
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    reads = [cycle for cycle, _, byte in bench.commands if byte == 0x30]
    for asked_at, read_at in zip(bench.asked_at, reads, strict=True):
        assert read_at - asked_at < 330    # 32 in front of the queue, 192 in it, 8 command cycles, decisions

    bench = Bench(WIDE, depth=4)
    bench.pace = 100
    asked = [Request(bench.page(0, i % 2, i % 6), i % 4, place=i) for i in range(20)]
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    first = next(cycle for cycle, _, byte in bench.commands if byte == 0x30)
    assert first < 850    # the die's own reset ends at 650


def test_one_buffer_and_a_slow_decoder():
    bench = Bench(TINY, buffers=1, drain=200)
    asked = dense(bench, 8)
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)


def test_full_queues_hold_requests_back():
    bench = Bench(TINY, depth=2)
    asked = [Request(bench.page(0, 0, i % 8), i % 4, place=i) for i in range(40)]
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)


def test_values_wait_for_their_gate(config):
    """V comes when its gate opens or the epoch goes on, not before; what waits behind it comes, too."""
    bench = Bench(config)
    slots = config.jobs_in_flight
    value, key = Kind.VALUE, Kind.KEY
    pages = all_pages(bench)[: 12]
    asked = []
    for i, page in enumerate(pages):
        asked += [Request(page, c, value, i % 2, 3, 4 * i + c) for c in range(2)]
    for i, page in enumerate(all_pages(bench)[12: 16]):
        asked += [Request(page, c, key, 2, 3, 4 * i + c) for c in range(4)]
    bench.value_open = 0
    bench.epochs = [3] * slots
    bench.open_at = {1: (0, [3] * slots), 8_000: (1, [3] * slots), 16_000: (1, [3, 4, 3, 3][:slots])}
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    for a in bench.arrivals:
        if a.kind:
            assert a.cycle > (8_000, 16_000)[a.slot]


def test_values_do_not_block_keys_of_another_plane():
    bench = Bench(TINY)
    first = [Request(bench.page(0, 0, 1), c, Kind.VALUE, 0, 0, c) for c in range(4)]
    bench.value_open = 0
    bench.open_at = {12_000: (1, [0] * 4)}
    later = [Request(bench.page(0, 1, 2), c, Kind.KEY, 1, 0, c) for c in range(4)]
    bench.ask(first + later)
    bench.run()
    bench.check(asked=first + later)
    assert all(a.cycle < 12_000 for a in bench.arrivals if a.kind == Kind.KEY)


@pytest.mark.slow
@pytest.mark.parametrize("separate, share", [(False, 0.87), (True, 0.98)], ids=["shared", "separate"])
def test_the_bus_is_busy(separate, share):
    """What is missing are command cycles: 14 of 25 ns for each page of 3 us, if they share the bus."""
    config = replace(presets.PAPER.with_lane_channels(1), dies=4, part=replace(
        presets.PAPER.part, page_bytes=4096, spare_bytes=552, planes=2, t_r=8_000.0, separate_command_bus=separate))
    bench = Bench(config)
    asked = dense(bench, 40)
    bench.ask(asked)
    bench.run()
    bench.check(asked=asked)
    assert bench.used() >= share


@pytest.mark.slow
def test_cache_reads_hide_the_array():
    """One die, whose array takes as long as half of the data of a batch."""
    part = replace(presets.PAPER.part, page_bytes=4096, spare_bytes=552, planes=2, t_r=3_000.0, t_rcbsy=300.0)
    used = []
    for cache in (False, True):
        bench = Bench(replace(presets.PAPER.with_lane_channels(1), dies=1, part=part, cache_reads=cache))
        asked = dense(bench, 16)
        bench.ask(asked)
        bench.run()
        bench.check(asked=asked)
        used.append(bench.used())
    assert used[1] > used[0] + 0.1


# Operations.


def test_programs(config):
    bench = Bench(config)
    pages = all_pages(bench)[: 16]
    for page in pages:
        bench.stored.pop(page, None)
    bench.operate([bench.program(page) for page in pages])
    bench.run(outcomes=len(pages))
    assert statuses(bench) == dict.fromkeys(range(len(pages)), Status.OK)
    assert {page for _, page, _ in bench.outcomes} == set(pages)
    bench.check()
    raw = config.raw_page_bytes
    for page in pages:
        content = bench.nand.dump(bench.place(page))
        assert content[:raw] == bench.stored[page] and set(content[raw:]) <= {0xFF}
    assert bench.count(0x10) == 16 // config.part.planes
    assert bench.counts["programs"] == 16


def test_two_dies_in_turn_program_their_planes_together(config):
    """Each die's next plane comes after one of the other die; both make one command of all planes."""
    if config.dies < 2:
        pytest.skip("one die")
    bench = Bench(config)
    planes = config.part.planes
    pages = [bench.page(die, plane, number) for number in range(2) for plane in range(planes) for die in range(2)]
    for page in pages:
        bench.stored.pop(page, None)
    bench.operate([bench.program(page) for page in pages])
    bench.run(outcomes=len(pages))
    assert statuses(bench) == dict.fromkeys(range(len(pages)), Status.OK)
    bench.check()
    for page in pages:
        assert bench.nand.dump(bench.place(page)).startswith(bench.stored[page])
    assert bench.count(0x10) == 4
    assert bench.count(0x11) == len(pages) - 4


@pytest.mark.parametrize("name", ["tiny", "cached", "wide"])
def test_programs_and_erases_among_reads(name):
    config = CONFIGS[name]
    rng = random.Random(3)
    bench = Bench(config, in_flight=30, drain=80)
    bench.word_gap, bench.outcomes_ready = 0.3, 0.2
    asked = random_codewords(bench, rng, 60, all_pages(bench, 2))
    bench.ask(asked)
    fresh = [page for page in all_pages(bench, 4) if page >= bench.page(0, 0, 0, 2)]
    operations = [bench.program(page) for page in fresh[:12]]
    blocks = [bench.page(die, plane, 1, 4) for die in range(config.dies) for plane in range(config.part.planes)]
    for page in blocks:
        bench.fill(page)
    operations[6:6] = [Operation(Opcode.ERASE, page) for page in blocks]
    bench.operate(operations)
    bench.run(outcomes=len(operations))
    bench.check(asked=asked)
    assert set(statuses(bench).values()) == {Status.OK}
    assert len(bench.outcomes) == len(operations)
    for page in blocks:
        assert bench.nand.erases(*bench.place(page)[:3]) == 1
    for page in fresh[:12]:
        assert bench.nand.dump(bench.place(page)).startswith(bench.stored[page])
    assert bench.count(0xD1) == len(blocks) - config.dies and bench.count(0xD0) == config.dies


@pytest.mark.usefixtures("each_simulator")
def test_failures_name_their_plane():
    """Of a multi-plane operation only the failing planes are reported."""
    faults = NandFaults(program_fails=((0, 1, 0, 0), (1, 0, 0, 0)), erase_fails=((0, 0, 3),))
    bench = Bench(TINY, faults=faults)
    pages = [bench.page(die, plane, 0) for die in range(2) for plane in range(2)]
    operations = [bench.program(page) for page in pages]
    operations += [Operation(Opcode.ERASE, bench.page(die, plane, 0, 3)) for die in range(2) for plane in range(2)]
    bench.operate(operations)
    bench.run(outcomes=8)
    assert bench.nand.violations == []
    bad = {(0, 1): Status.PROGRAM_FAILED, (1, 0): Status.PROGRAM_FAILED}
    assert statuses(bench) == {
        **{i: bad.get((i >> 1, i & 1), Status.OK) for i in range(4)},
        **{4 + i: Status.ERASE_FAILED if i == 0 else Status.OK for i in range(4)}}


@pytest.mark.parametrize("mark_byte", [0, 9])
def test_probe(mark_byte):
    """A mark is found in the page that is asked for and at the part's place in it."""
    config = replace(TINY, part=replace(TINY.part, mark_byte=mark_byte))
    bench = Bench(config, faults=NandFaults(factory_bad=((1, 0, 2), (0, 1, 2, 1))))
    operations = [Operation(Opcode.PROBE, bench.page(die, plane, page, zone))
                  for page in (0, 1, 7) for zone in (1, 2) for die in range(2) for plane in range(2)]
    bench.operate(operations)
    bench.run(outcomes=len(operations))
    assert bench.nand.violations == []
    found = statuses(bench)
    bad = {operations[i].page for i, status in found.items() if status is Status.BAD_BLOCK}
    assert bad == {bench.page(1, 0, 0, 2), bench.page(1, 0, 7, 2), bench.page(0, 1, 1, 2)}
    assert set(found.values()) == {Status.OK, Status.BAD_BLOCK}


@pytest.mark.parametrize("value, status", [
    (0xFF, Status.OK), (0xFE, Status.OK), (0x7D, Status.OK), (0xF8, Status.OK), (0xE3, Status.OK),
    (0xF0, Status.BAD_BLOCK), (0x55, Status.BAD_BLOCK), (0x96, Status.BAD_BLOCK), (0x0E, Status.BAD_BLOCK),
    (0x80, Status.BAD_BLOCK), (0x00, Status.BAD_BLOCK)])
def test_probe_counts_bits(value, status):
    """Bit errors do not make a good block bad, nor a mark unreadable: up to three of eight (four of a mark)."""
    column = TINY.part.mark_column
    bench = Bench(TINY, faults=NandFaults(stuck_columns=((1, 0, column, 0xFF, value),)))
    bench.operate([Operation(Opcode.PROBE, bench.page(die, 0, 0, 2)) for die in range(2)])
    bench.run(outcomes=2)
    assert statuses(bench) == {0: Status.OK, 1: status}


def test_map():
    """Reads, programs, erases and probes of a mapped zone go to its new block."""
    bench = Bench(TINY, faults=NandFaults(factory_bad=((1, 1, 7),)))
    bench.maps = {(2, 1, 1): 7, (2, 0, 1): 6, (5, 1, 0): 3}
    operations = [Operation(Opcode.MAP, bench.page(die, plane, 0, zone), block)
                  for (zone, die, plane), block in bench.maps.items()]
    operations += [Operation(Opcode.PROBE, bench.page(die, plane, 0, 2)) for die in range(2) for plane in range(2)]
    operations += [bench.program(bench.page(0, plane, 0, 2)) for plane in range(2)]
    bench.operate(operations)
    bench.run(outcomes=len(operations))
    assert statuses(bench) == {**dict.fromkeys(range(9), Status.OK), 6: Status.BAD_BLOCK}
    assert bench.nand.dump((0, 1, 6, 0)).startswith(bench.stored[bench.page(0, 1, 0, 2)])
    asked = dense(bench, 8, first=bench.page(0, 0, 2, 2)) + dense(bench, 4, first=bench.page(0, 0, 3, 5))
    again = Bench(TINY)
    again.maps = bench.maps
    again.operate(operations[:3])
    again.hold = 3
    again.ask(asked)
    again.run()
    again.check(asked=asked)


def test_programs_do_not_starve_reads_nor_reads_programs():
    bench = Bench(TINY, in_flight=64)
    asked = [replace(r, place=i % 64) for i, r in enumerate(dense(bench, 32) * 2)]
    bench.ask(asked)
    operations = [bench.program(page) for page in all_pages(bench, 4)[32 : 32 + 16]]
    for operation in operations:
        operation.page += bench.page(0, 0, 0, 2) - bench.page(0, 0, 0, 1)
    bench.operate(operations)
    bench.run(outcomes=len(operations))
    bench.check(asked=asked)
    assert len(bench.outcomes) == 16


# Faults.


def test_retries_at_their_level():
    faults = NandFaults(retry=((0, 0, None, None, 2), (1, 1, None, None, 1)), retry_error_rate=0.01)
    bench = Bench(TINY, faults=faults, buffers=4)
    asked = dense(bench, 12)
    size = TINY.raw_codeword_bytes
    levels = []

    def judge(arrival):
        """A decoder that corrects nothing."""
        if arrival.data == bench.stored[arrival.page][arrival.codeword * size :][:size]:
            levels.append((arrival.page, arrival.level))
            return False
        bench.retries.append(arrival)
        return True

    bench.on_arrival = judge
    bench.ask(asked)
    bench.run(limit=300_000)
    bench.check(asked=asked)
    expected = {(0, 0): 2, (1, 1): 1}
    for page, level in levels:
        assert level <= expected.get(bench.place(page)[:2], 0)
    assert sum(level == 2 for _, level in levels) >= 8
    assert bench.counts["retries"] >= 3 * 4 * 2
    # The default level is set again each time.
    assert bench.count(0xEF) == 2 * bench.counts["retries"]


@pytest.mark.parametrize("config", [TINY, CACHED], ids=["tiny", "cached"])
@pytest.mark.parametrize("operation", range(1, 5))
def test_stuck_die(config, operation):
    """Everything of a die that hangs is answered; the others go on."""
    bench = Bench(config, faults=NandFaults(stuck_busy=((1, operation),)), in_flight=64)
    rng = random.Random(operation)
    asked = random_codewords(bench, rng, 80, all_pages(bench, 2))
    bench.ask(asked)
    operations = [bench.program(bench.page(die, plane, 0, 3)) for die in (1, 0) for plane in range(2)]
    operations += [Operation(opcode, bench.page(die, plane, 0, 4)) for opcode in (Opcode.ERASE, Opcode.PROBE)
                   for die in (1, 0) for plane in range(2)]
    operations += [bench.program(bench.page(die, 0, 0, 5)) for die in (1, 0, 1, 0)]
    operations[-1].page = bench.page(0, 0, 1, 5)
    operations[-2].page = bench.page(1, 0, 1, 5)
    bench.operate(operations)
    bench.run(outcomes=len(operations), limit=150_000)
    bench.check(asked=asked)
    failed = {a.page for a in bench.arrivals if a.cause}
    assert {a.cause for a in bench.arrivals} == {0, MediaCause.DIE_TIMEOUT}
    assert {bench.place(page)[0] for page in failed} == {1}
    for i, status in statuses(bench).items():
        die = bench.place(operations[i].page)[0]
        assert status is Status.OK or (die == 1 and status is Status.DIE_TIMEOUT)
    assert statuses(bench)[len(operations) - 2] is Status.DIE_TIMEOUT
    assert statuses(bench)[len(operations) - 1] is Status.OK
