"""The golden device's queues, owners and admin commands: refusals, rings, interrupts, isolation, random commands."""

import random
from itertools import pairwise

import pytest
from tests.host.golden.queue_host import DOMAIN, REGION_BITS, Host

from kvattic.errors import DeviceTimeoutError
from kvattic.golden.device import GoldenDevice
from kvattic.golden.queues import Queue, Queues
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
    Grant,
    Mode,
    Opcode,
    Status,
    TableFlag,
    fp32_bits,
    fp32_block_bytes,
    query_row_bytes,
)
from kvattic.spec.config import TINY, Config
from kvattic.spec.layout import Block
from kvattic.spec.registers import COUNTERS, MAX_ENTRIES, MAX_REGIONS, QUEUES, Control, StatusBit

WINDOW = (0x1000, 0x8000)
QUERY, RESULT, TABLE, BLOCK = 0x1000, 0x2000, 0x3000, 0x4000
RINGS = 0x10000
MEMORY = 1 << 17
ZONE = 1 << TINY.zone_page_bits
PROBE = FLASH_COMMAND.pack(opcode=Opcode.PROBE)


def host_of(entries=8, shuffle=None, *, queues=(1, 2)):
    device = GoldenDevice(TINY, memory_bytes=MEMORY, dram_bytes=1 << 20, shuffle=shuffle)
    host = Host(device, rings=RINGS, entries=entries, window=WINDOW)
    host.open(queues)
    return host


@pytest.fixture
def host():
    return host_of()


def counters(identifier=0, **fields):
    return DATA_COMMAND.pack(**{"opcode": Opcode.COUNTERS, "identifier": identifier, "result": BLOCK, **fields})


def attend(mode=Mode.DENSE, **fields):
    sparse = {} if mode is Mode.DENSE else {"stripe_pages": TINY.group_pages, "top_units": 1}
    return COMMAND.pack(**{
        "opcode": Opcode.ATTEND, "mode": mode, "rows": 1, "stripe_pages": 1, "stripes": 1, "end_token": 16,
        "domain": DOMAIN, "scale": fp32_bits(1.0), "query": QUERY, "result": RESULT, "table": TABLE, **sparse,
        **fields})


def flash(opcode, **fields):
    return FLASH_COMMAND.pack(**{"opcode": opcode, "domain": DOMAIN, **fields})


def grant(kind, first, count, domain, **fields):
    return GRANT_COMMAND.pack(
        **{"opcode": Opcode.GRANT, "kind": kind, "first": first, "count": count, "domain": domain, **fields})


def table(host, *entries):
    host.device.write_memory(TABLE, b"".join(entries))


def ended(found):
    return [(c.status, c.where) for c in found]


def status(host):
    return StatusBit(host.device.read_register("STATUS"))


# Doorbells.


@pytest.mark.parametrize(("name", "value", "error"), [
    ("SUBMISSION_TAIL_3", 0, 3 << 24),                          # no such queue
    ("COMPLETION_HEAD_7", 1, 7 << 24 | 1 << 16 | 1),
    ("SUBMISSION_TAIL_1", 8, 1 << 24 | 8),                      # no such entry
    ("SUBMISSION_TAIL_1", 0x1234_0004, 1 << 24 | 4),
    ("SUBMISSION_TAIL_1", 0xFFFF_FFFF, 1 << 24 | 0xFFFF),
    ("COMPLETION_HEAD_1", 8, 1 << 24 | 1 << 16 | 8),
    ("COMPLETION_HEAD_1", 0x8000_0000, 1 << 24 | 1 << 16),
    ("SUBMISSION_TAIL_1", 1, 1 << 24 | 1),                      # behind what was fetched, before what is there: overrun
    ("SUBMISSION_TAIL_1", 0, 1 << 24),
    ("COMPLETION_HEAD_2", 4, 2 << 24 | 1 << 16 | 4),            # more than were posted
    ("COMPLETION_HEAD_2", 7, 2 << 24 | 1 << 16 | 7),
])
def test_refused_doorbells(host, name, value, error):
    """Of rings of eight entries, queue 1 has seven completions and commands 0 and 1 not fetched; 2 has three."""
    assert ended(host.run(1, counters())) == [(Status.OK, 0)]
    host.push(1, *[counters(i) for i in range(7)])
    host.ring(1)
    host.push(1, counters(7), counters(8))
    host.ring(1)
    host.push(2, *[counters(i) for i in range(3)])
    host.ring(2)
    before = host.device.read_register("FETCHED"), host.device.read_memory(0, MEMORY)
    device = host.device
    device.write_register(name, value)
    assert status(host) == StatusBit.READY | StatusBit.INVALID_DOORBELL
    assert device.read_register("DOORBELL_ERROR") == error
    # The first one stays until the bit is cleared.
    device.write_register("SUBMISSION_TAIL_5", 2)
    assert device.read_register("DOORBELL_ERROR") == error
    device.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    assert status(host) == StatusBit.READY
    device.write_register("SUBMISSION_TAIL_5", 2)
    assert device.read_register("DOORBELL_ERROR") == 5 << 24 | 2
    assert before == (device.read_register("FETCHED"), device.read_memory(0, MEMORY))
    assert [c.identifier for c in host.reap(1) + host.reap(1)] == list(range(9))
    assert len(host.reap(2)) == 3


def test_doorbells_that_change_nothing_are_fine(host):
    for name in ("SUBMISSION_TAIL_1", "COMPLETION_HEAD_1"):
        host.device.write_register(name, 0)
    host.push(1, *[counters()] * 3)
    host.ring(1)
    host.ring(1)
    host.reap(1)
    host.device.write_register("COMPLETION_HEAD_1", 3)
    assert status(host) == StatusBit.READY


# Rings.


@pytest.mark.parametrize("entries", [2, 4, 16])
@pytest.mark.parametrize("shuffle", [None, 1])
def test_rings_wrap(entries, shuffle):
    """Reaping goes by the phase; each completion tells a head within what was submitted."""
    host = host_of(entries, shuffle)
    start = host.device.read_register("FETCHED")
    found = []
    for number in range(5 * entries):
        host.push(1, counters(number))
        host.ring(1)
        host.device.wait(1)
        found += host.reap(1)
        assert found[-1].head == (number + 1) % entries
    assert [c.identifier for c in found] == list(range(5 * entries))
    assert {c.status for c in found} == {Status.OK}
    assert host.device.read_register("FETCHED") == start + 5 * entries


def test_phases(host):
    """Bit 0 of `state`: 1 in the first round, 0 in the second, and so on."""
    phases = []
    for number in range(24):
        host.run(1, counters())
        at = host.completion(1) + number % 8 * LINE_BYTES + 14
        phases.append(host.device.read_memory(at, 1)[0] & 1)
    assert phases == [1] * 8 + [0] * 8 + [1] * 8


def test_a_full_completion_ring_stops_the_queue_alone(host):
    device = host.device
    start = device.read_register("COMPLETED")
    host.push(1, *[counters(i) for i in range(7)])
    host.ring(1)
    host.push(1, *[counters(i) for i in range(7, 14)])
    host.ring(1)
    assert device.read_register("COMPLETED") == device.read_register("FETCHED") == start + 7
    assert status(host) == StatusBit.READY      # what cannot be fetched keeps nothing busy
    assert device.read_register("INTERRUPTS") == 1 << 1
    assert ended(host.run(2, counters())) == [(Status.OK, 0)]
    device.write_register("COMPLETION_HEAD_1", 2)
    assert device.read_register("COMPLETED") == start + 7 + 1 + 2
    assert host.device.read_memory(host.completion(1) + 7 * LINE_BYTES + 12, 1)[0] == 7
    assert host.device.read_memory(host.completion(1) + 12, 1)[0] == 8      # the one of 0 is overwritten
    host.heads[1] = 2
    found = host.reap(1) + host.reap(1)
    assert [c.identifier for c in found] == list(range(2, 14))


def test_turns():
    """Queues take turns, one command each; those that have none are passed over."""
    queues = Queues()
    for number, tail in ((0, 2), (3, 4), (6, 1)):
        queues.pairs[number] = Queue(number, 8, 0, 0, 0, 0)
        assert queues.doorbell(number, tail, completion=False)
    order = []
    while (queue := queues.next()) is not None:
        queue.fetch()
        order.append(queue.number)
    assert order == [0, 3, 6, 0, 3, 3, 3]


# Queue 0.


@pytest.mark.parametrize("entries", [0, 1, 3, 6, 2 * MAX_ENTRIES, 0xFFFF_FFFF])
def test_an_illegal_size_removes_queue_0(host, entries):
    host.device.write_register("ADMIN_ENTRIES", entries)
    host.device.write_register("SUBMISSION_TAIL_0", 0)
    assert StatusBit.INVALID_DOORBELL in status(host)
    host.device.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    assert host.device.read_register("ADMIN_ENTRIES") == 0
    host.admin()
    host.ok(PROBE)
    assert ended(host.run(1, counters())) == [(Status.OK, 0)]   # the others never went


def test_queue_0_is_what_the_registers_said_when_it_was_created(host):
    device = host.device
    for name in ("SUBMISSION", "COMPLETION", "BASE", "LIMIT"):
        device.write_register(f"ADMIN_{name}", 0)
    line = DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, result=BLOCK)
    host.ok(line)
    # Anew: empty, and all registers count; low bits of the bases do not.
    device.write_memory(0x9000, bytes(0x800))
    device.write_register("ADMIN_SUBMISSION", 0x8000 + 63)
    device.write_register("ADMIN_COMPLETION", 0x9000 + 1)
    device.write_register("ADMIN_ENTRIES", 2)
    device.write_memory(0x8000, line)
    device.write_register("SUBMISSION_TAIL_0", 1)
    device.wait(1)
    data = device.read_memory(0x9000, LINE_BYTES)
    assert int.from_bytes(data[14:16], "little") == 7 << 9 | Status.INVALID_ADDRESS << 1 | 1
    assert int.from_bytes(data[8:10], "little") == 1


@pytest.mark.parametrize("entries", [2, MAX_ENTRIES])
def test_the_smallest_and_the_largest_ring(entries):
    device = GoldenDevice(TINY, memory_bytes=1 << 20)
    host = Host(device, rings=0x10000, entries=entries, window=WINDOW)
    host.admin()
    for _ in range(entries + 1):
        host.ok(PROBE)


# Commands of the queues.


def test_identify(host):
    host.ok(DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, result=WINDOW[1] - IDENTIFY_BYTES))
    text = host.device.read_memory(WINDOW[1] - IDENTIFY_BYTES, IDENTIFY_BYTES)
    assert Config.from_json(text.rstrip(b"\0").decode()) == TINY


def test_counters(host):
    """In any queue; those of reading are not 0 after a job."""
    host.run(1, flash(Opcode.PROGRAM))
    table(host, TABLE_ENTRY.pack())
    assert ended(host.run(1, attend())) == [(Status.OK, 0)]
    for queue in (0, 1, 2):
        host.device.write_memory(BLOCK, b"\xFF" * 256)
        assert ended(host.run(queue, counters())) == [(Status.OK, 0)]
        data = host.device.read_memory(BLOCK, 256)
        values = [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(len(COUNTERS))]
        assert values == [host.device.read_register(counter.name) for counter in COUNTERS]
        size = -(-8 * len(COUNTERS) // LINE_BYTES) * LINE_BYTES
        assert data[8 * len(COUNTERS) :] == bytes(size - 8 * len(COUNTERS)) + b"\xFF" * (256 - size)
        assert sum(values) > 0


def test_counters_go_on_until_a_reset(host):
    """Whatever happens between: doorbells, times without work, COUNTERS itself, a power cut excepted."""
    device = host.device
    names = ("CODEWORDS", "PAGE_PROGRAMS", "BLOCK_ERASES", "PAGE_READS")

    def counted():
        return [device.read_register(name) for name in names]

    assert counted() == [0, 0, 0, 0]
    host.run(1, flash(Opcode.PROGRAM))
    assert counted() == [0, 1, 0, 0]
    assert device.read_register("FLASH_WORDS") == TINY.codewords_per_page * TINY.raw_codeword_words + 1
    table(host, TABLE_ENTRY.pack())
    for number in range(1, 4):
        host.run(1, attend())
        device.write_register("SUBMISSION_TAIL_1", host.tails[1])       # starts nothing
        device.write_register("SUBMISSION_TAIL_7", 0)
        host.run(2, counters())
        assert counted() == [8 * number, 1, 0, 2 * number]
        assert device.traffic.page_reads == 2 * number
    # What fails was done as well; what is refused was not.
    host.run(1, flash(Opcode.PROGRAM), flash(Opcode.ERASE), flash(Opcode.ERASE, channel=2))
    host.ok(PROBE)
    host.run(0, flash(Opcode.MAP, domain=0, argument=0))
    assert counted() == [24, 2, 1, 7]
    device.write_register("CONTROL", Control.RESET)
    assert counted() == [0, 0, 0, 0]
    assert device.traffic.page_reads == 0


def test_a_command_that_cannot_be_read(host):
    """A ring of which entry 0 is the last line of memory; its completion has identifier 0xFFFF."""
    host.create(3, submission=MEMORY - LINE_BYTES)
    host.device.write_memory(MEMORY - LINE_BYTES, counters(5))
    host.device.write_register("SUBMISSION_TAIL_3", 3)
    host.device.wait(1)
    found = host.reap(3)
    assert [(c.status, c.where, c.identifier) for c in found] == [
        (Status.OK, 0, 5), (Status.BUS_ERROR, 0, 0xFFFF), (Status.BUS_ERROR, 0, 0xFFFF)]
    assert StatusBit.BUS_ERROR in status(host)


def test_a_completion_that_cannot_be_written(host):
    host.create(3, completion=MEMORY - LINE_BYTES)
    before = host.device.read_register("COMPLETED")
    host.push(3, counters(5), counters(6))
    host.ring(3)
    assert status(host) == StatusBit.READY | StatusBit.BUS_ERROR
    assert host.device.read_register("COMPLETED") == before + 2
    assert host.device.read_memory(MEMORY - LINE_BYTES + 12, 1)[0] == 5
    host.device.write_register("COMPLETION_HEAD_3", 2)
    assert StatusBit.INVALID_DOORBELL not in status(host)


# Statuses.


IDENTIFY = {"opcode": Opcode.IDENTIFY, "result": BLOCK}
COUNT = {"opcode": Opcode.COUNTERS, "result": BLOCK}
CREATE = {"opcode": Opcode.CREATE_QUEUE, "queue": 3, "entries": 8, "submission": 0x10000, "completion": 0x11000,
          "limit": 1 << 16}
DELETE = {"opcode": Opcode.DELETE_QUEUE, "queue": 2}
ZONES = {"opcode": Opcode.GRANT, "kind": Grant.ZONES, "count": 1, "domain": 1}
REGIONS = {"opcode": Opcode.GRANT, "kind": Grant.REGIONS, "count": 1, "domain": 1}
TO_QUEUES = {"opcode": Opcode.GRANT, "kind": Grant.QUEUES, "first": 2, "domain": 1}
PROGRAM = {"opcode": Opcode.PROGRAM, "domain": DOMAIN}
ERASE = {"opcode": Opcode.ERASE, "domain": DOMAIN}
REFUSED = [
    # (record, good fields, queue, change, status, where)
    *((record, good, 1, {}, Status.NOT_PERMITTED, 0) for record, good in (
        (DATA_COMMAND, IDENTIFY), (QUEUE_COMMAND, CREATE), (QUEUE_COMMAND, DELETE), (GRANT_COMMAND, ZONES),
        (FLASH_COMMAND, {"opcode": Opcode.PROBE}), (FLASH_COMMAND, {"opcode": Opcode.MAP}))),
    # Who may not, learns nothing more; nobody may what there is not.
    (DATA_COMMAND, IDENTIFY, 1, {"flags": 1, "result": 1}, Status.NOT_PERMITTED, 0),
    (DATA_COMMAND, IDENTIFY, 1, {"opcode": 0xC6}, Status.INVALID_OPCODE, 0xC6),
    (DATA_COMMAND, IDENTIFY, 0, {"opcode": 0x85}, Status.INVALID_OPCODE, 0x85),
    # Reserved bytes.
    *((record, good, 0, {field.name: 1 << 8 * field.size - 1}, Status.INVALID_FIELD, 0)
      for record, good in ((DATA_COMMAND, IDENTIFY), (DATA_COMMAND, COUNT), (QUEUE_COMMAND, CREATE),
                           (QUEUE_COMMAND, DELETE), (GRANT_COMMAND, ZONES), (FLASH_COMMAND, {"opcode": Opcode.PROBE}))
      for field in record.fields if field.name == "flags" or field.name.startswith("reserved")),
    *((QUEUE_COMMAND, DELETE, 0, {name: 64}, Status.INVALID_FIELD, 0)
      for name in ("entries", "submission", "completion", "base", "limit")),
    (QUEUE_COMMAND, DELETE, 0, {"entries": 1, "queue": 9}, Status.INVALID_FIELD, 0),
    # Blocks.
    *((DATA_COMMAND, good, 0, {"result": result}, Status.INVALID_ADDRESS, 1) for good, size in (
        (IDENTIFY, IDENTIFY_BYTES), (COUNT, 192))
      for result in (0, BLOCK + 32, WINDOW[0] - 64, WINDOW[1] - size + 64, (1 << 64) - 64)),
    (DATA_COMMAND, COUNT, 2, {"result": WINDOW[1]}, Status.INVALID_ADDRESS, 1),
    # Queues.
    *((QUEUE_COMMAND, CREATE, 0, {"queue": queue, "entries": 0}, Status.INVALID_QUEUE, 0)
      for queue in (0, 1, 2, QUEUES, 255)),
    *((QUEUE_COMMAND, CREATE, 0, {"entries": entries, "submission": 1}, Status.INVALID_QUEUE, 1)
      for entries in (0, 1, 3, 9, 2 * MAX_ENTRIES)),
    (QUEUE_COMMAND, CREATE, 0, {"submission": 32, "completion": 1}, Status.INVALID_QUEUE, 2),
    (QUEUE_COMMAND, CREATE, 0, {"completion": 0x1001}, Status.INVALID_QUEUE, 3),
    *((QUEUE_COMMAND, DELETE, 0, {"queue": queue}, Status.INVALID_QUEUE, 0) for queue in (0, 3, QUEUES, 255)),
    # Grants.
    (GRANT_COMMAND, ZONES, 0, {"kind": 3, "count": 0, "domain": 256}, Status.INVALID_GRANT, 0),
    (GRANT_COMMAND, ZONES, 0, {"kind": 255}, Status.INVALID_GRANT, 0),
    (GRANT_COMMAND, ZONES, 0, {"count": 0, "domain": 256}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, ZONES, 0, {"count": TINY.part.blocks + 1}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, ZONES, 0, {"first": TINY.part.blocks}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, ZONES, 0, {"first": (1 << 24) - 1}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, ZONES, 0, {"domain": 256}, Status.INVALID_GRANT, 2),
    (GRANT_COMMAND, REGIONS, 0, {"count": 0}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, REGIONS, 0, {"first": MAX_REGIONS - 1, "count": 2}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, REGIONS, 0, {"domain": 0xFFFF}, Status.INVALID_GRANT, 2),
    (GRANT_COMMAND, TO_QUEUES, 0, {"count": 1}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, TO_QUEUES, 0, {"first": 1 << QUEUES, "domain": 0}, Status.INVALID_GRANT, 1),
    (GRANT_COMMAND, TO_QUEUES, 0, {"domain": 0}, Status.INVALID_GRANT, 2),
    (GRANT_COMMAND, TO_QUEUES, 0, {"domain": 256}, Status.INVALID_GRANT, 2),
    # Flash.
    (FLASH_COMMAND, PROGRAM, 1, {"channel": 2, "domain": 0}, Status.INVALID_PLACE, 0),
    *((FLASH_COMMAND, good, queue, {"domain": domain}, Status.NOT_PERMITTED, 1)
      for good, queue in ((PROGRAM, 0), (PROGRAM, 1), (ERASE, 1)) for domain in (0, 2, 255, 256 + DOMAIN)),
    (FLASH_COMMAND, ERASE, 0, {}, Status.INVALID_FIELD, 0),
    (FLASH_COMMAND, {"opcode": Opcode.PROBE}, 0, {"domain": 1}, Status.INVALID_FIELD, 0),
    (FLASH_COMMAND, {"opcode": Opcode.MAP}, 0, {"domain": 1, "channel": 9}, Status.INVALID_FIELD, 0),
]


@pytest.mark.parametrize(("record", "good", "queue", "change", "status", "where"), REFUSED)
def test_refused_commands_are_answered_and_the_next_is_served(host, record, good, queue, change, status, where):
    owners = host.device._owners
    before = host.device.read_memory(*WINDOW), owners.zones.tolist(), owners.regions.tolist(), list(owners.queues)
    line = record.pack(**{**good, "identifier": 99, **change})
    (found,) = host.run(queue, line)
    assert (found.status, found.where, found.identifier, found.queue) == (status, where, 99, queue)
    assert before == (host.device.read_memory(*WINDOW), owners.zones.tolist(), owners.regions.tolist(), owners.queues)
    if queue == 0 or good["opcode"] < 0xC0:
        line = record.pack(**{**good, **({"domain": 0} if good is ERASE and queue == 0 else {})})
        assert ended(host.run(queue, line)) == [(Status.OK, 0)]


def test_bus_errors_of_blocks(host):
    host.create(3, limit=1 << 20)
    for line in (counters(result=MEMORY), counters(result=MEMORY - 128)):
        assert ended(host.run(3, line)) == [(Status.BUS_ERROR, 0)]
        assert StatusBit.BUS_ERROR in status(host)
        host.device.write_register("STATUS", StatusBit.BUS_ERROR)
    host.device.write_register("ADMIN_LIMIT", 1 << 20)
    host.clear(0)
    host.device.write_register("ADMIN_ENTRIES", host.entries)
    line = DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, result=MEMORY - 1024)
    assert ended(host.run(0, line)) == [(Status.BUS_ERROR, 0)]


def test_delete(host):
    """Unread completions and commands that are not fetched do not matter."""
    host.push(2, *[counters(i) for i in range(7)])
    host.ring(2)
    host.push(2, counters(7))
    host.ring(2)
    host.ok(QUEUE_COMMAND.pack(**DELETE))
    assert host.device.read_register("INTERRUPTS") == 0
    for name in ("SUBMISSION_TAIL_2", "COMPLETION_HEAD_2"):
        host.device.write_register(name, 0)
        assert StatusBit.INVALID_DOORBELL in status(host)
        host.device.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    assert ended(host.run(0, QUEUE_COMMAND.pack(**DELETE))) == [(Status.INVALID_QUEUE, 0)]
    host.create(2)
    assert ended(host.run(2, counters())) == [(Status.OK, 0)]


def test_delete_of_a_queue_with_commands_under_way():
    """QUEUE_BUSY until all have completed; meanwhile nothing is fetched, and no such queue can be created."""
    seen = set()
    line = QUEUE_COMMAND.pack(**DELETE)
    for seed in range(30):
        host = host_of(8, seed)
        host.push(2, *[flash(Opcode.PROGRAM, page=page) for page in (0, 4, 8, 12, 16, 20, 24)])
        host.ring(2)
        found = host.run(0, *(
            QUEUE_COMMAND.pack(**QUEUE_COMMAND.unpack(each) | {"identifier": number})
            for number, each in enumerate((line, line, host.create_line(2, completion=0x8000), line))))
        found.sort(key=lambda completion: completion.identifier)
        seen.add(tuple(c.status for c in found))
        while StatusBit.BUSY in status(host):
            pass
        device = host.device
        assert device.read_register("FETCHED") == device.read_register("COMPLETED")
        assert {c.status for c in host.reap(2, take=False)} <= {Status.OK}     # in the old ring
        if found[-1].status is Status.QUEUE_BUSY:
            device.write_register("SUBMISSION_TAIL_2", 0)
            assert StatusBit.INVALID_DOORBELL in status(host)
            host.ok(line)
        assert ended(host.run(0, line)) == [(Status.INVALID_QUEUE, 0)]
        host.create(2)
        assert ended(host.run(2, counters())) == [(Status.OK, 0)]
    busy, refused, ok = Status.QUEUE_BUSY, Status.INVALID_QUEUE, Status.OK
    assert seen <= {(busy, busy, refused, busy), (busy, busy, refused, ok), (busy, busy, ok, ok), (busy, ok, ok, ok),
                    (ok, refused, ok, ok)}
    assert len(seen) > 3, seen


def test_queue_0_created_anew_with_commands_under_way():
    """Only removed: what is under way completes in the old ring."""
    host = host_of(8, 5)
    host.push(0, PROBE, PROBE, PROBE)
    host.ring(0)
    while host.device.read_register("FETCHED") == host.device.read_register("COMPLETED"):
        pass
    host.device.write_register("ADMIN_ENTRIES", 4)
    host.device.write_register("SUBMISSION_TAIL_0", 0)
    assert StatusBit.INVALID_DOORBELL in status(host)
    while StatusBit.BUSY in status(host):
        pass
    host.admin()
    host.ok(PROBE)


# Interrupts.


def test_wait_says_why_nothing_can_come(host):
    device = host.device
    with pytest.raises(DeviceTimeoutError, match="nothing is under way and no completion waits"):
        device.wait(1)
    device.write_register("INTERRUPT_MASK", 0b100)
    host.push(1, counters())
    host.ring(1)
    assert device.read_register("INTERRUPTS") == 0b10
    with pytest.raises(DeviceTimeoutError, match=r"queues \[1\] want .* masked: .* INTERRUPT_MASK, which is 0x4"):
        device.wait(1)
    device.write_register("INTERRUPT_MASK", 0b110)
    device.wait(1)
    device.wait(0)      # a level, not an edge
    host.reap(1)
    with pytest.raises(DeviceTimeoutError, match="ring a doorbell first"):
        device.wait(1)


@pytest.mark.parametrize("after", [0, 1, 3, 1 << 16 | 4])
def test_interrupt_after(after):
    """A queue wants an interrupt with so many completions, or with any when it can do no more; 16 bits count."""
    seen = set()
    for seed in range(10):
        host = host_of(8, seed)
        device = host.device
        device.write_register("INTERRUPT_AFTER", after)
        host.push(1, *[counters(i) for i in range(7)])
        host.ring(1)
        taken = 0
        while taken < 7:
            device.wait(1)
            assert device._interrupts == 0b10
            there = device._queues.pairs[1].unread
            assert there >= (after & 0xFFFF) or taken + there == 7
            seen.add(there)
            taken += len(host.reap(1))
        assert taken == 7
    assert min(seen) <= max(1, after & 0xFFFF)      # no later than it must


# Owners.


def test_zones():
    """Domain 2 has zone 3 of both channels and region 1; queue 1 may name domain 2, queue 2 may name domain 1."""
    host = isolated()
    mine = 3 * ZONE
    for page, argument, want in (
        (mine, 16, (Status.OK, 0)), (mine + ZONE, 16, (Status.NOT_OWNED, 0)), (mine - 1, 16, (Status.NOT_OWNED, 0)),
        (mine + 4, 32, (Status.NOT_OWNED, 1)), (mine + 4, 15, (Status.NOT_OWNED, 1)),
        (mine + ZONE, 32, (Status.NOT_OWNED, 0)), (mine + 4, (1 << 24) - 1, (Status.NOT_OWNED, 1)),
        (mine + 4, 31, (Status.OK, 0)),
    ):
        assert ended(host.run(1, flash(Opcode.PROGRAM, page=page, argument=argument, domain=2))) == [want]
    for page, want in ((mine + ZONE, (Status.NOT_OWNED, 0)), (mine - 1, (Status.NOT_OWNED, 0)), (mine, (Status.OK, 0))):
        assert ended(host.run(1, flash(Opcode.ERASE, page=page, domain=2))) == [want]
    assert ended(host.run(2, flash(Opcode.ERASE, page=mine))) == [(Status.NOT_OWNED, 0)]
    assert ended(host.run(2, flash(Opcode.ERASE, page=mine, domain=2))) == [(Status.NOT_PERMITTED, 1)]
    assert ended(host.run(1, flash(Opcode.ERASE, page=0))) == [(Status.NOT_PERMITTED, 1)]
    host.ok(flash(Opcode.ERASE, page=mine, domain=0))       # queue 0 asks nobody
    # To nobody: not even who had it may.
    host.grant(Grant.ZONES, 3, 1, 0)
    assert ended(host.run(1, flash(Opcode.ERASE, page=mine, domain=2))) == [(Status.NOT_OWNED, 0)]


def isolated(shuffle=None):
    host = host_of(8, shuffle)
    host.grant(Grant.ZONES, 3, 1, 2)
    host.grant(Grant.REGIONS, 1, 1, 2)
    host.grant(Grant.QUEUES, 0b010, 0, 2)
    host.grant(Grant.QUEUES, 0b100, 0, DOMAIN)
    return host


def test_after_power_up_nobody_has_anything():
    device = GoldenDevice(TINY, memory_bytes=MEMORY)
    host = Host(device, rings=RINGS, entries=8, window=WINDOW)
    host.admin()
    host.create(1)
    program = flash(Opcode.PROGRAM)
    assert ended(host.run(1, program)) == [(Status.NOT_PERMITTED, 1)]
    host.grant(Grant.QUEUES, 0b10, 0, DOMAIN)
    assert ended(host.run(1, program)) == [(Status.NOT_OWNED, 0)]
    host.grant(Grant.ZONES, 0, 1, DOMAIN)
    assert ended(host.run(1, program)) == [(Status.NOT_OWNED, 1)]
    host.grant(Grant.REGIONS, 0, 1, DOMAIN)
    assert ended(host.run(1, program)) == [(Status.OK, 0)]
    # A reset changes no owner, a new power-up all.
    device.write_register("CONTROL", Control.RESET)
    host.admin()
    host.create(1)
    assert ended(host.run(1, flash(Opcode.PROGRAM, page=4))) == [(Status.OK, 0)]
    device.power_up()
    host.admin()
    host.create(1)
    assert ended(host.run(1, flash(Opcode.PROGRAM, page=8))) == [(Status.NOT_PERMITTED, 1)]


def entry(key, value, dram=0, channel=0):
    return TABLE_ENTRY.pack(key_page=key, value_page=value, flags=TableFlag.DRAM * dram, channel=channel)


MINE = 3 * ZONE
LAST = MINE + ZONE - 1


@pytest.mark.parametrize(("pages", "bad"), [
    (1, (MINE - 1, MINE, 0)), (1, (MINE, MINE - 1, 0)), (1, (LAST + 1, MINE, 0)), (1, (MINE, LAST + 1, 0)),
    (2, (LAST, MINE, 0)), (2, (MINE, LAST, 0)), (4, (MINE, LAST - 2, 0)),
    (1, (TINY.part.blocks * ZONE, MINE, 0)), (1, (0xFFFFFF, MINE, 0)), (1, (16 * ZONE + MINE, MINE, 0)),
    (1, (15, 16, 1)), (1, (16, 15, 1)), (1, (32, 16, 1)), (1, (16, 32, 1)), (2, (31, 16, 1)), (2, (16, 15, 1)),
    (1, (0xFFFFFF, 16, 1)), (2, (16, 0xFFFFFF, 1)), (1, (MINE, MINE, 1)),
])
def test_tables_with_places_of_others(pages, bad):
    """Stripe 1 of two is not the domain's; nothing is read."""
    host = isolated()
    before = host.device.read_memory(RESULT, 1024)
    good = (MINE, LAST - pages + 1, 0)
    line = attend(stripe_pages=pages, stripes=2, end_token=32 * pages, domain=2)
    for entries, want in (((good, bad), 1), ((bad, good), 0), ((bad, bad), 0)):
        table(host, *(entry(*each) for each in entries))
        assert ended(host.run(1, line)) == [(Status.NOT_OWNED, want)]
    assert host.device.read_memory(RESULT, 1024) == before
    assert host.device.traffic.page_reads == 0
    # What is, is; and INVALID_TABLE comes first.
    table(host, entry(*good), entry(16, 32 - pages, 1))
    assert host.run(1, line)[0].status is Status.UNREADABLE_KEY
    table(host, entry(*bad), entry(*bad, channel=2))
    assert ended(host.run(1, line)) == [(Status.INVALID_TABLE, 1)]


def test_a_stripe_larger_than_a_region():
    host = isolated()
    host.grant(Grant.REGIONS, 0, 64, 2)
    table(host, entry(0, 8, 1))
    line = attend(stripe_pages=8, end_token=128, domain=2)
    for bits, want in ((3, Status.OK), (2, Status.NOT_OWNED), (1 << 4 | 3, Status.OK), (15, Status.OK)):
        host.device.write_register("REGION_BITS", bits)
        assert host.run(1, line)[0].status is want


def test_regions_beyond_the_last_one():
    """With small regions, there are fewer than pages."""
    host = isolated()
    host.device.write_register("REGION_BITS", 0)
    host.grant(Grant.REGIONS, 0, MAX_REGIONS, 2)
    for page, want in ((MAX_REGIONS - 1, Status.BUS_ERROR), (MAX_REGIONS, Status.NOT_OWNED)):
        # The last region is there, but no DRAM so large.
        found = host.run(1, flash(Opcode.PROGRAM, page=MINE, argument=page, domain=2))
        assert found[0].status is want
        assert (found[0].where == 1) == (want is Status.NOT_OWNED)


@pytest.mark.parametrize(("mode", "sketch", "bad"), [
    (Mode.SPARF, {"page": LAST - 7}, False), (Mode.SPARF, {"page": LAST - 6}, True),
    (Mode.SPARF, {"page": MINE - 1}, True),
    (Mode.FETCHED, {"page": LAST}, True), (Mode.FETCHED, {"page": 0xFFFFFF}, True),
    (Mode.CENTROID, {"page": LAST}, False), (Mode.CENTROID, {"page": LAST, "codeword": 1}, True),
    (Mode.CENTROID, {"page": LAST - 1, "codeword": 3}, False), (Mode.CENTROID, {"page": LAST + 1}, True),
    (Mode.CENTROID, {"page": MINE - 1, "codeword": 3}, True),
    (Mode.CODES, {"page": LAST}, False), (Mode.CODES, {"page": LAST, "codeword": 1}, True),
    (Mode.CODES, {"page": LAST - 1, "codeword": 3}, False), (Mode.CODES, {"page": MINE - 1, "codeword": 3}, True),
])
def test_sketches_of_others(mode, sketch, bad):
    """Four codewords of centroids, or of codes: a page, from codeword 0 on.  NOT_OWNED comes before NO_SKETCH."""
    host = isolated()
    assert TINY.group_pages == 8
    line = attend(mode, domain=2, features=mode.featured, stripes=2, end_token=256, unit_bits=int(not mode.by_token))
    mean = bytes(fp32_block_bytes(32)) * mode.blended
    good = entry(MINE, MINE + 8) + SKETCH_ENTRY.pack(page=MINE + 16, written=1)
    other = entry(MINE, MINE + 8) + SKETCH_ENTRY.pack(**sketch, written=1)
    table(host, mean, good, other)
    (found,) = host.run(1, line)
    assert (found.status, found.where) == (Status.NOT_OWNED, 1) if bad else found.status is Status.UNREADABLE_SKETCH
    table(host, mean, entry(MINE, MINE + 8) + SKETCH_ENTRY.pack(), other)
    assert ended(host.run(1, line)) == [(Status.NOT_OWNED, 1) if bad else (Status.NO_SKETCH, 0)]
    # Of a stripe in DRAM, or one that was not written, nothing is read.
    table(host, mean, good, entry(16, 24, 1) + SKETCH_ENTRY.pack(page=0, written=1))
    assert host.run(1, line)[0].status is Status.UNREADABLE_SKETCH
    table(host, mean, good, entry(MINE, MINE + 8) + SKETCH_ENTRY.pack(page=0))
    assert ended(host.run(1, line)) == [(Status.NO_SKETCH, 1)]


class Witness(GoldenDevice):
    """Notes the owners of all pages that are read or written, by a count of its own, which begins with DOMAIN."""

    def __init__(self):
        super().__init__(TINY, memory_bytes=MEMORY, dram_bytes=1 << 20)
        self.zones = [DOMAIN] * TINY.part.blocks
        self.regions = {}
        self.touched = set()
        self.reads = self.flash.read_page
        self.operates = self.flash.operate
        self.flash.read_page = self.read_page
        self.flash.operate = self.operate_page
        self.dram_pages = self.storage.dram_page
        self.storage.dram_page = self.read_dram_page

    def read_page(self, channel, number, codewords):
        self.touched.add(self.zones[number >> TINY.zone_page_bits])
        return self.reads(channel, number, codewords)

    def operate_page(self, opcode, channel, number, image):
        self.touched.add(self.zones[number >> TINY.zone_page_bits])
        return self.operates(opcode, channel, number, image)

    def read_dram_page(self, page):
        self.touched.add(self.regions.get(page >> REGION_BITS, DOMAIN))
        return self.dram_pages(page)


def test_no_command_touches_what_is_not_its_domains():
    """Random places around the borders of zones and regions with random owners; and what is refused touches nothing."""
    rng = random.Random(3)
    device = Witness()
    host = Host(device, rings=RINGS, entries=8, window=WINDOW)
    host.open((1,))
    for domain in (2, 3):
        host.grant(Grant.QUEUES, 0b10, 0, domain)
    done = {Status.OK: 0, Status.NOT_OWNED: 0}
    for _ in range(2000):
        if rng.randrange(20) == 0:
            for zone in range(TINY.part.blocks):
                device.zones[zone] = rng.choice((0, 1, 1, 1, 1, 2))
                host.grant(Grant.ZONES, zone, 1, device.zones[zone])
            for region in range(8):
                device.regions[region] = rng.choice((0, 1, 1, 1, 1, 2))
                host.grant(Grant.REGIONS, region, 1, device.regions[region])

        def page():
            """Of flash; some before a border, or at it."""
            return max(0, rng.randrange(3) * ZONE - rng.choice((0, 0, 1, 4, 7, 8, 16)))

        def dram_page():
            return max(0, rng.randrange(8) * 16 - rng.choice((0, 0, 1, 7, 8)))

        def run():
            dram = rng.randrange(2)
            return entry(*((dram_page() if dram else page()) for _ in range(2)), dram, rng.randrange(2)), dram

        domain = rng.choice((1, 1, 1, 2, 3))
        mode = rng.choice(list(Mode))
        kind = rng.randrange(8)
        if kind == 0:
            line = flash(Opcode.PROGRAM, page=page(), argument=dram_page(), domain=domain)
        elif kind == 1:
            line = flash(Opcode.ERASE, page=page(), domain=domain)
        else:
            count = TINY.group_pages if mode else rng.choice((1, 2, 4, 8))
            stripes = rng.randrange(1, 3)
            words = []
            for _ in range(stripes):
                word, dram = run()
                words.append(word)
                if mode:
                    words.append(SKETCH_ENTRY.pack(
                        page=page(), codeword=rng.randrange(4) * (not mode.featured), written=1 - dram))
            table(host, bytes(fp32_block_bytes(32)) * mode.blended, *words)
            device.write_memory(QUERY, ROW.pack(end_token=1 << 16).ljust(256, b"\0"))
            line = attend(mode, stripe_pages=count, stripes=stripes, end_token=stripes * count * 16, domain=domain,
                          features=32 * mode.featured, top_units=16 * (mode is not Mode.DENSE))
        device.touched.clear()
        (found,) = host.run(1, line)
        if found.status is Status.NOT_OWNED:
            assert not device.touched
            done[Status.NOT_OWNED] += 1
        else:
            # That is also those that found nothing to read there.
            assert device.touched <= {domain}, (found, device.touched)
            done[Status.OK] += bool(device.touched)
    assert min(done.values()) > 300, done


def test_windows():
    """Two queues with a window each: blocks of one in the other's are refused."""
    host = isolated()
    host.create(3, base=0x8000, limit=0x9000)
    host.create(4, base=0x9000, limit=0xA000)
    host.grant(Grant.QUEUES, 0b11000, 0, DOMAIN)
    host.ok(grant(Grant.ZONES, 0, 1, DOMAIN))
    for queue, mine, other in ((3, 0x8000, 0x9000), (4, 0x9000, 0x8000)):
        fields = {"query": mine, "result": mine + 0x400, "table": mine + 0x800}
        host.device.write_memory(mine + 0x800, entry(0, 1))
        for where, name in enumerate(fields):
            assert ended(host.run(queue, attend(**fields | {name: other}))) == [(Status.INVALID_ADDRESS, where)]
        assert host.run(queue, attend(**fields))[0].status is Status.UNREADABLE_KEY
        last = mine + 0x1000 - query_row_bytes(32)
        assert host.run(queue, attend(**fields | {"query": last}))[0].status is Status.UNREADABLE_KEY
        assert ended(host.run(queue, attend(**fields | {"query": last + 64}))) == [(Status.INVALID_ADDRESS, 0)]
        assert ended(host.run(queue, counters(result=other))) == [(Status.INVALID_ADDRESS, 1)]
        assert ended(host.run(queue, counters(result=mine))) == [(Status.OK, 0)]


# Orders.


def test_orders_of_completion():
    """With `shuffle`: ATTENDs keep their order, pages of a block their order of programming; all else mixes."""
    mixed = late = 0
    for seed in range(20):
        host = host_of(16, seed)
        host.push(1, *[attend(rows=9, identifier=i) for i in range(8)])
        host.push(2, *[flash(Opcode.PROGRAM, page=4 * i, identifier=100 + i) for i in range(8)],
                  *[counters(200 + i) for i in range(4)])
        host.ring(1)
        host.ring(2)
        found = []
        while len(found) < 20:
            host.device.wait(1)
            found += host.reap(1) + host.reap(2)
        assert [c.identifier for c in found if c.queue == 1] == list(range(8))
        assert {c.status for c in found} == {Status.OK, Status.INVALID_ROWS}
        others = [c.identifier for c in found if c.queue == 2]
        assert sorted(others) == [*range(100, 108), *range(200, 204)]
        mixed += others != sorted(others)
        late += any(a.queue > b.queue for a, b in pairwise(found))
        assert not StatusBit.BUSY & status(host)
    assert mixed > 10
    assert late > 10


def test_the_same_seed_is_the_same_order():
    def order(seed):
        host = host_of(16, seed)
        host.push(2, *[flash(Opcode.PROGRAM, page=i // 2, channel=i % 2, identifier=i) for i in range(12)])
        host.ring(2)
        found = []
        while len(found) < 12:
            host.device.wait(1)
            found += [c.identifier for c in host.reap(2)]
        return found

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(10)}) > 5


def test_a_reset_forgets_what_is_under_way():
    host = host_of(16, 1)
    host.push(2, *[flash(Opcode.PROGRAM, page=4 * i) for i in range(8)])
    host.ring(2)
    host.device.write_register("CONTROL", Control.RESET)
    assert status(host) == StatusBit.READY
    assert host.device.read_register("FETCHED") == host.device.read_register("COMPLETED") == 0
    host.open((2,))
    assert ended(host.run(2, counters())) == [(Status.OK, 0)]


def test_a_power_cut_under_way():
    host = host_of(16, 1)
    host.device.faults.power_cut = 3
    host.push(2, *[flash(Opcode.PROGRAM, page=4 * i) for i in range(8)])
    host.ring(2)
    found = []
    with pytest.raises(DeviceTimeoutError, match="its power is off"):
        while True:
            host.device.wait(1)
            found += host.reap(2)
    assert len(found) <= 3
    host.device.power_up()
    assert status(host) == StatusBit.READY
    assert len(list(host.device.written())) == 3


# Anything at all.


def anything(rng):
    """A command: valid, nearly valid, or noise."""
    kind = rng.randrange(13)
    domain = rng.choice((0, 1, 1, 1, 2, 2, 300))
    page = rng.choice((rng.randrange(8 * ZONE), rng.randrange(1 << 24)))
    address = rng.choice((QUERY, RESULT, TABLE, BLOCK, WINDOW[1] - 64, MEMORY, rng.randrange(1 << 17), 1 << 63))
    if kind == 0:
        line = rng.randbytes(LINE_BYTES)
    elif kind <= 4:
        mode = rng.choice(list(Mode))
        stripes = rng.randrange(1, 5)
        tokens = 16 if mode is Mode.DENSE else TINY.group_tokens
        line = attend(
            mode, rows=rng.choice((1, 1, 2, 3)), stripes=stripes, end_token=stripes * tokens - rng.randrange(3),
            domain=domain, result=rng.choice((RESULT, RESULT, address)), table=rng.choice((TABLE, TABLE, address)),
            features=mode.featured * 3, sinks=rng.choice((0, 3)) * (mode is not Mode.DENSE))
    elif kind <= 7:
        opcode = rng.choice((Opcode.PROGRAM, Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP))
        argument = rng.randrange(64) if opcode in (Opcode.PROGRAM, Opcode.MAP) else 0
        line = flash(opcode, channel=rng.randrange(3), page=page, argument=argument,
                     domain=0 if opcode >= ADMIN_OPCODES else domain)
    elif kind == 8:
        opcode = rng.choice((Opcode.IDENTIFY, Opcode.COUNTERS))
        line = DATA_COMMAND.pack(opcode=opcode, result=address)
    elif kind == 9:
        line = grant(rng.randrange(2), rng.randrange(20), rng.randrange(6), domain)
    elif kind == 11:
        stripes = rng.randrange(1, 5)
        line = READ_COMMAND.pack(
            opcode=Opcode.READ, domain=domain, stripe_pages=1, stripes=stripes, tokens=16 * stripes - rng.randrange(3),
            result=rng.choice((BLOCK, address)), table=rng.choice((TABLE, TABLE, address)))
    elif kind == 10:
        line = grant(Grant.QUEUES, rng.randrange(1 << 9), 0, domain)
    else:
        # Queues 5 to 7 come and go; the others stay.
        queue = rng.choice((0, 1, 5, 6, 7, 9))
        fields = {"opcode": Opcode.DELETE_QUEUE} if rng.randrange(2) else {
            "opcode": Opcode.CREATE_QUEUE, "entries": 4, "submission": 0x8000, "completion": 0x9000}
        line = QUEUE_COMMAND.pack(queue=queue if queue > 1 or "entries" in fields else 5, **fields)
    if rng.randrange(10) == 0:
        line = bytearray(line)
        line[rng.randrange(LINE_BYTES)] = rng.randrange(256)
        number = QUEUE_COMMAND["queue"].offset
        if line[0] == Opcode.DELETE_QUEUE and 1 <= line[number] <= 4:    # the queues under test stay
            line[number] = 5
    return bytes(line)


def some_table(rng):
    """Words of a table: noise, or entries of flash or device DRAM, with or without sketches."""
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.randbytes(8) for _ in range(8)]
    if kind == 1:
        return [entry(rng.randrange(2 * ZONE), rng.randrange(2 * ZONE), channel=rng.randrange(2)) for _ in range(8)]
    places = [rng.choice((16, 32, 40, 40, 2000)) for _ in range(2)]
    if kind == 2:
        return [entry(*places, 1)] * 8
    return [entry(*places, 1), SKETCH_ENTRY.pack(page=rng.randrange(ZONE), written=rng.randrange(2))] * 4


@pytest.mark.parametrize("shuffle", [None, 11])
def test_10000_random_commands(shuffle):
    """Each gets one completion with its identifier from its queue, whatever it is; never an exception."""
    rng = random.Random(12)
    host = Host(GoldenDevice(TINY, memory_bytes=MEMORY, dram_bytes=1 << 20, shuffle=shuffle), rings=RINGS, entries=16,
                window=WINDOW)
    queues = (0, 1, 2, 3, 4)
    host.open(queues[1:4])
    host.create(4, limit=1 << 20)
    host.grant(Grant.ZONES, 0, 3, 2)
    host.grant(Grant.REGIONS, 0, 2, 2)
    host.grant(Grant.QUEUES, 0b11, 0, 2)
    device = host.device
    device.faults.bad.add(Block(0, 0, 1, 5))
    device.faults.worn.add(Block(1, 1, 1, 1))
    device.faults.dead.add((1, 0))
    device.write_dram(0, rng.randbytes(40 * TINY.page_bytes))       # with NaNs; the pages behind them are zero
    waiting = {queue: set() for queue in queues}
    statuses = set()
    sent = 0
    while sent < 10_000 or any(waiting.values()):
        for queue in queues:
            room = min(15 - len(waiting[queue]), 10_000 - sent, rng.randrange(8))
            for _ in range(room):
                line = bytearray(anything(rng))
                line[2:4] = (sent & 0x7FFF).to_bytes(2, "little")
                waiting[queue].add(sent & 0x7FFF)
                host.push(queue, bytes(line))
                sent += 1
            if room:
                host.ring(queue)
        if rng.randrange(4) == 0:
            table(host, *some_table(rng) * 3)    # the first two thirds are a mean of V
        if rng.randrange(8) == 0:
            device.write_memory(QUERY, rng.choice((bytes(256), bytes(256), rng.randbytes(256))))
        if any(waiting.values()):
            device.wait(1)
        for queue in rng.sample(queues, 5):
            for completion in host.reap(queue):
                waiting[queue].remove(completion.identifier)
                statuses.add(completion.status)
    assert device.read_register("FETCHED") == device.read_register("COMPLETED") >= 10_000
    assert status(host) & ~StatusBit.MEDIA_ERROR & ~StatusBit.BUS_ERROR == StatusBit.READY
    # Nearly all there are, those of bad flash, of NaNs and of a missing host memory included.
    assert len(set(Status) - statuses) <= 6, statuses
    # And the device is as good as ever.
    device.write_register("CONTROL", Control.RESET)
    host.open((1,))
    page = 7 * ZONE + 2     # on die 1
    host.ok(flash(Opcode.MAP, page=page, argument=7, domain=0))
    host.ok(flash(Opcode.ERASE, page=page, domain=0))
    device.write_dram(0, bytes(TINY.page_bytes))
    assert ended(host.run(1, flash(Opcode.PROGRAM, page=page))) == [(Status.OK, 0)]
    table(host, entry(page, page))
    device.write_memory(QUERY, ROW.pack(end_token=16).ljust(query_row_bytes(32), b"\0"))
    assert ended(host.run(1, attend())) == [(Status.OK, 0)]
