"""The golden device at the level of registers, memory and commands."""

from dataclasses import replace

import numpy as np
import pytest
from tests.host.golden.queue_host import DOMAIN, Host

from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.golden import dense
from kvattic.golden.device import GoldenDevice
from kvattic.spec import layout
from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    FLASH_COMMAND,
    ROW,
    TABLE_ENTRY,
    TRAILER,
    CompletionFlag,
    MediaCause,
    Opcode,
    Status,
    fp32_bits,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import TINY
from kvattic.spec.layout import Block
from kvattic.spec.nand import TINY_PART
from kvattic.spec.registers import ID_MAGIC, REGISTERS, VERSION, Access, Control, StatusBit

QUERIES, RESULTS, TABLES, LIMIT, RINGS = 0x3000, 0x4000, 0x6000, 0x7000, 0x8000
ONE = fp32_bits(1.0)
TOKENS = TINY.tokens_per_page
PAGES = 10
"""Pages with ones that each channel has from page 0 on, over two dies with two planes each."""
DRAM = 20
"""DRAM page with ones."""


class Hosted(GoldenDevice):
    """A device with queues 0 and 1, of which 1 has a window of its own."""

    def __init__(self, config=TINY, *, window=(QUERIES, LIMIT), **options):
        super().__init__(config, **{"memory_bytes": 1 << 16, **options})
        self.host = Host(self, rings=RINGS, entries=32, window=window)
        self.host.open()


@pytest.fixture
def device():
    """A device with ones in pages 0 to 9 of both channels and in page 20 of its DRAM."""
    device = Hosted(dram_bytes=32 * TINY.page_bytes)
    ones = layout.pack_pages(np.full((TOKENS, 32), 0x3C00, np.uint16), TINY)
    device.write_dram(DRAM * TINY.page_bytes, ones.tobytes())
    for channel in range(TINY.channels):
        for page in range(PAGES):
            assert flash(device, Opcode.PROGRAM, channel, page, DRAM).status is Status.OK
    table(device, [(i % 2, i // 2, 5 + i // 2, 0) for i in range(8)])
    return device


def table(device, entries, address=TABLES):
    """Write a table of (channel, key_page, value_page, flags)."""
    data = b"".join(TABLE_ENTRY.pack(channel=c, key_page=k, value_page=v, flags=f) for c, k, v, f in entries)
    device.write_memory(address, data)


def flash(device, opcode, channel=0, page=0, argument=0, **others):
    """The completion of one flash command."""
    admin = opcode in (Opcode.PROBE, Opcode.MAP)
    line = FLASH_COMMAND.pack(**{"opcode": opcode, "identifier": 5, "channel": channel, "page": page,
                                 "argument": argument, "domain": 0 if admin else DOMAIN, **others})
    return device.host.run(0 if admin else 1, line)[0]


def program(device, channel, page, bits, dram_page=30):
    """Write tokens into a page of flash, by way of the DRAM."""
    device.write_dram(dram_page * TINY.page_bytes, layout.pack_pages(bits, TINY).tobytes())
    assert flash(device, Opcode.PROGRAM, channel, page, dram_page).status is Status.OK


GOOD = {
    "opcode": Opcode.ATTEND,
    "identifier": 77,
    "rows": 2,
    "stripe_pages": 1,
    "stripes": 2,
    "table": TABLES,
    "end_token": 20,
    "domain": DOMAIN,
    "tree_token": 20,
    "scale": ONE,
    "query": QUERIES,
    "result": RESULTS,
}


def run(device, *commands):
    """Completions of commands (dictionaries of fields, or 64 bytes)."""
    return device.host.run(1, *(c if isinstance(c, bytes) else COMMAND.pack(**{**GOOD, **c}) for c in commands))


def test_registers_after_reset():
    device = GoldenDevice(TINY)
    for register in REGISTERS:
        expected = {"CONFIG_HASH": TINY.hash, "STATUS": StatusBit.READY}.get(
            register.name, register.reset
        )
        assert device.read_register(register.name) == expected
    assert device.read_register("ID") == ID_MAGIC
    assert device.read_register("VERSION") == VERSION


def test_access_rights():
    device = GoldenDevice(TINY)
    for register in REGISTERS:
        if register.name in ("CONTROL", "STATUS"):
            continue
        before = device.read_register(register.name)
        device.write_register(register.name, 0x40)
        assert device.read_register(register.name) == (
            0x40 if register.access is Access.RW else before
        )
    with pytest.raises(RequestError, match="no register 'NAME'; registers are ID, "):
        device.read_register("NAME")
    with pytest.raises(RequestError, match="TIMEOUT has 32 bits: 0x100000000 does not fit"):
        device.write_register("TIMEOUT", 1 << 32)
    with pytest.raises(RequestError, match="TIMEOUT has 32 bits"):
        device.write_register("TIMEOUT", -1)


def test_two_commands(device):
    before = device.read_register("COMPLETED")
    found = run(device, {}, {"identifier": 78, "rows": 1})
    assert [(c.status, c.identifier, c.where, c.flags) for c in found] == [
        (Status.OK, 77, 0, CompletionFlag(0)),
        (Status.OK, 78, 0, CompletionFlag(0)),
    ]
    assert device.read_register("STATUS") == StatusBit.READY
    assert device.read_register("COMPLETED") == device.read_register("FETCHED") == before + 2
    assert found[0].cycle == found[0].beats == found[0].idle == 0
    device.write_register("STATUS", StatusBit.READY)
    assert device.read_register("STATUS") == StatusBit.READY


def test_reset(device):
    """Registers and queues are gone; owners, flash and memory stay."""
    run(device, {})
    device.write_register("CONTROL", Control.RESET)
    assert device.read_register("CONTROL") == 0
    assert device.read_register("STATUS") == StatusBit.READY
    for name in ("ADMIN_SUBMISSION", "REGION_BITS", "FETCHED", "COMPLETED", "INTERRUPTS", "CODEWORDS"):
        assert device.read_register(name) == 0
    for queue in (0, 1):
        device.write_register(f"SUBMISSION_TAIL_{queue}", 0)
        assert device.read_register("STATUS") & StatusBit.INVALID_DOORBELL
        device.write_register("STATUS", StatusBit.INVALID_DOORBELL)
    assert device.read_memory(RINGS, 1) == bytes([Opcode.CREATE_QUEUE])
    device.host.admin()
    device.host.create(1)
    assert run(device, {})[0].status is Status.OK


def test_close(device):
    device.close()
    device.close()


INVALID = [
    ({"opcode": 0x80}, Status.INVALID_OPCODE, 0x80),
    ({"opcode": 0}, Status.INVALID_OPCODE, 0),
    ({"opcode": 0xFF}, Status.INVALID_OPCODE, 0xFF),
    ({"reserved0": 1}, Status.INVALID_FIELD, 0),
    ({"mode": 4}, Status.INVALID_FIELD, 0),
    ({"mode": 255}, Status.INVALID_FIELD, 0),
    ({"flags": 1}, Status.INVALID_FIELD, 0),
    ({"sinks": 1}, Status.INVALID_FIELD, 0),
    ({"features": 1}, Status.INVALID_FIELD, 0),
    ({"local_tokens": 1}, Status.INVALID_FIELD, 0),
    ({"top_units": 1}, Status.INVALID_FIELD, 0),
    ({"unit_bits": 1}, Status.INVALID_FIELD, 0),
    ({"stripe_pages": 0}, Status.INVALID_FIELD, 0),
    ({"stripe_pages": 3}, Status.INVALID_FIELD, 0),
    ({"stripe_pages": 32}, Status.INVALID_FIELD, 0),  # of four codewords each; the score buffer holds 64
    ({"rows": 0}, Status.INVALID_ROWS, 0),
    ({"rows": 3}, Status.INVALID_ROWS, 3),
    ({"end_token": 0}, Status.INVALID_LENGTH, 0),
    ({"base_token": 32, "end_token": 32}, Status.INVALID_LENGTH, 0),
    ({"base_token": 32, "end_token": 31}, Status.INVALID_LENGTH, 0),
    ({"stripes": 0}, Status.INVALID_LENGTH, 0),
    ({"stripes": 0, "end_token": 0}, Status.INVALID_LENGTH, 0),
    ({"stripes": 1}, Status.INVALID_LENGTH, 0),
    ({"stripes": 3}, Status.INVALID_LENGTH, 0),
    ({"end_token": 16}, Status.INVALID_LENGTH, 0),
    ({"end_token": 33}, Status.INVALID_LENGTH, 0),
    ({"stripes": 33, "end_token": 33 * TOKENS}, Status.INVALID_LENGTH, 0),  # 2 channels hold 16 stripes each
    ({"stripe_pages": 4, "stripes": 9, "end_token": 9 * 4 * TOKENS}, Status.INVALID_LENGTH, 0),
    ({"query": QUERIES + 32}, Status.INVALID_ADDRESS, 0),
    ({"query": QUERIES - 64}, Status.INVALID_ADDRESS, 0),
    ({"query": LIMIT - 2 * query_row_bytes(32) + 64}, Status.INVALID_ADDRESS, 0),
    ({"query": (1 << 64) - 64}, Status.INVALID_ADDRESS, 0),
    ({"result": RESULTS + 1}, Status.INVALID_ADDRESS, 1),
    ({"result": QUERIES - 64}, Status.INVALID_ADDRESS, 1),
    ({"result": LIMIT - 2 * result_row_bytes(32) + 64}, Status.INVALID_ADDRESS, 1),
    ({"table": TABLES + 8}, Status.INVALID_ADDRESS, 2),
    ({"table": QUERIES - 64}, Status.INVALID_ADDRESS, 2),
    ({"table": LIMIT}, Status.INVALID_ADDRESS, 2),
    ({"table": LIMIT - 64, "stripes": 9, "end_token": 9 * TOKENS}, Status.INVALID_ADDRESS, 2),
    ({"scale": 0}, Status.INVALID_SCALE, 0),
    ({"scale": 0x007F_FFFF}, Status.INVALID_SCALE, 0),
    ({"scale": 0x7F80_0000}, Status.INVALID_SCALE, 0),
    ({"scale": 0x8000_0000 | ONE}, Status.INVALID_SCALE, 0),
    ({"domain": 0}, Status.NOT_PERMITTED, 1),
    ({"domain": 2}, Status.NOT_PERMITTED, 1),
    ({"domain": 256 + DOMAIN}, Status.NOT_PERMITTED, 1),
    ({"domain": 0xFFFF}, Status.NOT_PERMITTED, 1),
    ({"domain": 1 << 31 | DOMAIN}, Status.NOT_PERMITTED, 1),
    ({"domain": 0xFFFF_FFFF}, Status.NOT_PERMITTED, 1),     # NVMe's "all namespaces"
]


@pytest.mark.parametrize(("command", "status", "where"), INVALID)
def test_invalid_commands_are_answered_and_the_next_is_served(device, command, status, where):
    before = device.read_memory(RESULTS, LIMIT - RESULTS)
    bad, good = run(device, command, {"rows": 1, "result": RESULTS + 0x800})
    assert (bad.status, bad.where, bad.identifier) == (status, where, 77)
    assert good.status is Status.OK
    assert device.read_memory(RESULTS, 0x800) == before[:0x800]


@pytest.mark.parametrize(
    "command",
    [
        {"query": LIMIT - 2 * query_row_bytes(32)},
        {"result": LIMIT - 2 * result_row_bytes(32)},
        {"table": LIMIT - 64, "stripes": 8, "end_token": 8 * TOKENS},
        {"end_token": 17},
        {"end_token": 32},
        {"base_token": 7, "end_token": 7 + 17},
        {"base_token": (1 << 24) - 33, "end_token": (1 << 24) - 1},
        {"scale": 0x0080_0000},
        {"scale": 0x7F7F_FFFF},
    ],
)
def test_the_last_valid_values(device, command):
    table(device, [(i % 2, i // 2, 5, 0) for i in range(8)], LIMIT - 64)
    assert run(device, command)[0].status is Status.OK


def test_the_longest_job(device):
    stripes = TINY.channels * TINY.ring_codewords // TINY.codewords_per_page
    table(device, [(i % 2, i // 2 % 5, 5 + i // 2 % 5, 0) for i in range(stripes)])
    assert run(device, {"stripes": stripes, "end_token": TINY.max_tokens})[0].status is Status.OK


@pytest.mark.parametrize(("entry", "where"), [
    ({"channel": 2}, 1), ({"channel": 255}, 1), ({"flags": 2}, 1), ({"flags": 4}, 1), ({"flags": 0x81}, 1),
    ({"channel": 0}, 16),
])
def test_bad_tables(device, entry, where):
    """Entry 16 is the seventeenth of channel 0 where all are there; the score buffer holds sixteen."""
    entries = [{"channel": 0, "key_page": 0, "value_page": 5, "flags": 0} for _ in range(18)]
    entries[1] |= entry
    device.write_memory(TABLES, b"".join(TABLE_ENTRY.pack(**e) for e in entries))
    (found,) = run(device, {"stripes": 18, "end_token": 18 * TOKENS})
    assert (found.status, found.where) == (Status.INVALID_TABLE, where)


def test_the_first_bad_entry_is_named_and_comes_before_nan_query(device):
    table(device, [(0, 0, 5, 0), (1, 0, 5, 0), (0, 0, 5, 4), (3, 0, 5, 0)])
    device.write_memory(QUERIES, b"\xff" * 2 * query_row_bytes(32))
    (found,) = run(device, {"stripes": 4, "end_token": 64})
    assert (found.status, found.where) == (Status.INVALID_TABLE, 2)
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.NAN_QUERY, 0)


def test_entries_behind_the_table_do_not_matter(device):
    table(device, [(0, 0, 5, 0), (1, 0, 5, 0), (9, 0, 0, 9)])
    assert run(device, {})[0].status is Status.OK


def test_the_lowest_status_is_reported(device):
    everything = {
        "opcode": 1,
        "mode": 9,
        "rows": 0,
        "end_token": 0,
        "query": 1,
        "result": 1,
        "table": 1,
        "scale": 0,
        "domain": 0,
    }
    order = [
        Status.INVALID_OPCODE,
        Status.INVALID_FIELD,
        Status.INVALID_ROWS,
        Status.INVALID_LENGTH,
        Status.INVALID_ADDRESS,
        Status.INVALID_ADDRESS,
        Status.INVALID_ADDRESS,
        Status.INVALID_SCALE,
        Status.NOT_PERMITTED,
    ]
    fields = list(everything)
    for index, status in enumerate(order):
        assert run(device, {name: everything[name] for name in fields[index:]})[0].status is status


def test_nan_precedence(device):
    key, value = np.full((2, 16, 32), 0x3C00, np.uint16)
    key[3, 0], key[9, 4], value[2, 31] = 0x7E00, 0xFC00, 0x7C00
    program(device, 0, 10, key)
    program(device, 0, 11, value)
    table(device, [(0, 10, 11, 0)])
    query = bytearray(2 * query_row_bytes(32))
    query[query_row_bytes(32) + 64 + 2 * 7 + 1] = 0x7C
    device.write_memory(QUERIES, bytes(query))
    one = {"base_token": 160, "stripes": 1}
    (found,) = run(device, {**one, "end_token": 176})
    assert (found.status, found.where) == (Status.NAN_QUERY, 1 * 65536 + 7)
    (found,) = run(device, {**one, "end_token": 176, "rows": 1})
    assert (found.status, found.where) == (Status.NAN_KEY, 163)
    (found,) = run(device, {**one, "end_token": 163, "rows": 1})
    assert (found.status, found.where) == (Status.NAN_VALUE, 162)
    (found,) = run(device, {**one, "end_token": 162, "rows": 1})
    assert found.status is Status.OK


# What cannot be read.


def media(device):
    """(channel, page, cause, codeword) of the media registers, which are freed for the next error."""
    assert device.read_register("STATUS") & StatusBit.MEDIA_ERROR
    error, cause = device.read_register("MEDIA_ERROR"), device.read_register("MEDIA_CAUSE")
    device.write_register("STATUS", StatusBit.MEDIA_ERROR)
    assert not device.read_register("STATUS") & StatusBit.MEDIA_ERROR
    return error >> 24, error & 0xFFFFFF, MediaCause(cause >> 16), cause & 0xFFFF


@pytest.mark.parametrize(("entries", "status", "where", "channel", "page"), [
    ([(0, 0, 5, 0), (1, 50, 5, 0)], Status.UNREADABLE_KEY, 32 + 16, 1, 50),
    ([(0, 50, 5, 0), (1, 51, 5, 0)], Status.UNREADABLE_KEY, 32, 0, 50),
    ([(0, 0, 60, 0), (1, 50, 60, 0)], Status.UNREADABLE_KEY, 48, 1, 50),
    ([(0, 0, 60, 0), (1, 1, 60, 0)], Status.UNREADABLE_VALUE, 32, 0, 60),
    ([(0, 0, 1, 0), (1, 1, PAGES, 0)], Status.UNREADABLE_VALUE, 48, 1, PAGES),
    ([(0, 0, 1, 0), (1, 0xFF, 1, 0)], Status.UNREADABLE_KEY, 48, 1, 0xFF),
])
def test_erased_pages_are_reported(device, entries, status, where, channel, page):
    table(device, entries)
    (found,) = run(device, {"base_token": 32, "end_token": 60})
    assert (found.status, found.where) == (status, where)
    assert media(device) == (channel, page, MediaCause.ERASED, 0)


def test_unreadable_codewords(device):
    """Pages 0 to 3 are on planes and dies of their own; four tokens lie in a codeword."""
    table(device, [(0, 0, 5, 0), (1, 1, 6, 0)])
    faults = device.faults.unreadable
    faults.add((Block(1, 0, 1, 0), 0, 2))           # page 1 of channel 1
    (found,) = run(device, {})
    assert found.status is Status.OK    # tokens 16 to 19 are codeword 0 of it
    (found,) = run(device, {"end_token": 16 + 9})
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, 16 + 8)
    assert media(device) == (1, 1, MediaCause.UNCORRECTABLE, 2)
    faults.add((Block(1, 0, 1, 0), 0, 0))
    faults.add((Block(0, 0, 1, 0), 1, 3))           # page 5 of channel 0
    (found,) = run(device, {"end_token": 16 + 9})
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, 16)
    faults -= {(Block(1, 0, 1, 0), 0, 0), (Block(1, 0, 1, 0), 0, 2)}
    (found,) = run(device, {"end_token": 16 + 9})
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 12)
    assert media(device) == (1, 1, MediaCause.UNCORRECTABLE, 0)     # the first since the bit was clear


def test_what_cannot_be_read_has_no_nan_and_comes_before_those_that_have(device):
    key = np.full((16, 32), 0x3C00, np.uint16)
    key[2, 0] = 0x7E00
    program(device, 0, 10, key)
    table(device, [(0, 10, 5, 0), (1, 0, 12, 0)])
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 16)
    device.faults.unreadable.add((Block(0, 1, 0, 0), 2, 0))
    table(device, [(0, 10, 5, 0), (1, 0, 6, 0)])
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, 0)
    device.faults.unreadable.clear()
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.NAN_KEY, 2)


def test_stripes_of_several_pages(device):
    """A stripe of two pages has the page behind its first one."""
    rng = np.random.default_rng(1)
    bits = rng.standard_normal((4, 2 * TOKENS, 32)).astype(np.float16).view(np.uint16)
    for page, tokens in enumerate(bits.reshape(8, TOKENS, 32)):
        program(device, 1, PAGES + page, tokens)
    table(device, [(1, 10, 12, 0), (1, 14, 16, 0)])
    command = {"rows": 1, "stripe_pages": 2, "stripes": 2, "end_token": 4 * TOKENS - 3, "tree_token": 4 * TOKENS}
    query = np.ones((1, 32), np.float16)
    device.write_memory(QUERIES, ROW.pack(end_token=1000) + query.tobytes().ljust(64, b"\0"))
    assert run(device, command)[0].status is Status.OK
    trace = dense.attend(
        query.view(np.uint16), np.concatenate(bits[::2]), np.concatenate(bits[1::2]), element=TINY.element,
        scale_bits=ONE, start=np.array([0]), end=np.array([1000]), tree=np.array([0]), tree_token=4 * TOKENS,
        base_token=0, end_token=4 * TOKENS - 3)
    assert device.read_memory(RESULTS, 128) == trace.output.astype("<u4").tobytes()
    # Page 13 is of V, token 16 of the first stripe.
    device.faults.unreadable.add((Block(1, 0, 1, 0), 3, 1))
    (found,) = run(device, command)
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 20)


def test_pages_behind_the_last_token_are_not_read(device):
    """A stripe of two pages of K and of V, of which the second ones are erased."""
    table(device, [(0, PAGES - 1, PAGES - 1, 0)])
    assert run(device, {"stripe_pages": 2, "stripes": 1, "end_token": TOKENS})[0].status is Status.OK
    found = run(device, {"stripe_pages": 2, "stripes": 1, "end_token": TOKENS + 1})[0]
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, TOKENS)


def test_what_cannot_be_read_counts_as_zero(device):
    """It overflows nothing."""
    huge = np.full((16, 32), 0x7BFF, np.uint16)
    program(device, 0, 10, huge)
    table(device, [(0, 10, 5, 0)])
    row = ROW.pack(end_token=1000) + huge[0].tobytes().ljust(64, b"\0")
    device.write_memory(QUERIES, row)
    command = {"rows": 1, "stripes": 1, "end_token": 4}
    assert run(device, command)[0].flags == CompletionFlag.SCORE_OVERFLOW
    device.faults.unreadable.add((Block(0, 1, 0, 0), 2, 0))
    found = run(device, command)[0]
    assert (found.status, found.flags) == (Status.UNREADABLE_KEY, CompletionFlag(0))


def test_dram_pages(device):
    table(device, [(0, DRAM, DRAM, 1), (1, 1, 6, 0)])
    assert run(device, {})[0].status is Status.OK
    assert run(device, {"rows": 1})[0].status is Status.OK
    flashed = device.read_memory(RESULTS, result_row_bytes(32))
    device.write_memory(RESULTS, bytes(result_row_bytes(32)))
    table(device, [(0, 0, 5, 0), (1, DRAM, DRAM, 1)])
    assert run(device, {"rows": 1})[0].status is Status.OK
    assert flashed == device.read_memory(RESULTS, result_row_bytes(32))
    table(device, [(0, 0, 5, 0), (1, DRAM, 32, 1)])     # there are pages 0 to 31
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 16)
    assert not device.read_register("STATUS") & StatusBit.MEDIA_ERROR


# Flash commands.


def test_programmed_pages_are_copies(device):
    device.write_dram(DRAM * TINY.page_bytes, bytes(TINY.page_bytes))
    images = [image for _, _, image in device.written()]
    assert len(images) == 2 * PAGES
    assert all((image.view(np.uint16) == 0x3C00).all() for image in images)


def test_pages_are_programmed_in_order_and_once(device):
    for page in (0, 8, 14):     # 0, 4, 8 are the first pages of plane 0, die 0; 2, 6, 10, 14 those of die 1
        found = flash(device, Opcode.PROGRAM, 1, page, DRAM)
        assert (found.status, found.where) == (Status.PROGRAM_FAILED, 1 << 24 | page)
    assert flash(device, Opcode.PROGRAM, 1, 10, DRAM).status is Status.OK
    assert flash(device, Opcode.PROGRAM, 1, 14, DRAM).status is Status.OK
    assert len(list(device.written())) == 2 * PAGES + 2


def test_erase(device):
    assert flash(device, Opcode.ERASE, 0, 4).status is Status.OK     # pages 0, 4 and 8
    table(device, [(0, 8, 5, 0), (1, 8, 5, 0)])
    (found,) = run(device, {})
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, 0)
    assert {(b, p) for b, p, _ in device.written() if b.channel == 0} == {
        (Block(0, die, plane, 0), page) for die, plane, page in
        [(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]}
    assert flash(device, Opcode.PROGRAM, 0, 0, DRAM).status is Status.OK


def test_map(device):
    """Zone 0 of channel 0, die 0, plane 0 gets block 6: what it held cannot be seen, not even through zone 6."""
    zone = 1 << TINY.zone_page_bits
    assert flash(device, Opcode.MAP, 0, 0, 6).status is Status.OK
    table(device, [(0, 0, 5, 0), (1, 0, 5, 0)])
    assert run(device, {})[0].status is Status.UNREADABLE_KEY
    assert media(device)[2] is MediaCause.ERASED
    program(device, 0, 0, np.full((16, 32), 0x4000, np.uint16))
    assert run(device, {})[0].status is Status.OK
    table(device, [(0, 6 * zone, 5, 0), (1, 0, 5, 0)])
    assert run(device, {})[0].status is Status.UNREADABLE_KEY
    # The block is there, but the page was written under another number.
    assert media(device) == (0, 6 * zone, MediaCause.UNCORRECTABLE, 0)
    assert flash(device, Opcode.MAP, 0, 0, 0).status is Status.OK
    table(device, [(0, 0, 5, 0), (1, 0, 5, 0)])
    assert run(device, {})[0].status is Status.OK


FLASH = {"opcode": Opcode.PROGRAM, "identifier": 5, "channel": 0, "page": 10, "argument": DRAM, "domain": DOMAIN}
INVALID_FLASH = [
    ({"flags": 1}, Status.INVALID_FIELD),
    ({"reserved0": 1}, Status.INVALID_FIELD),
    *(({f"reserved{i}": 1 << 63}, Status.INVALID_FIELD) for i in range(1, 7) if i != 4),
    ({"reserved4": 1 << 7}, Status.INVALID_FIELD),
    ({"opcode": Opcode.ERASE, "argument": 1}, Status.INVALID_FIELD),
    ({"opcode": Opcode.PROBE, "argument": 1, "domain": 0}, Status.INVALID_FIELD),
    ({"opcode": Opcode.PROBE, "argument": 1, "domain": 0, "channel": 2}, Status.INVALID_FIELD),
    ({"opcode": Opcode.PROBE, "argument": 0}, Status.INVALID_FIELD),
    ({"opcode": Opcode.MAP, "argument": 1}, Status.INVALID_FIELD),
    ({"channel": 2}, Status.INVALID_PLACE),
    ({"page": TINY.pages_per_channel}, Status.INVALID_PLACE),
    ({"page": (1 << 24) - 1}, Status.INVALID_PLACE),
    ({"page": TINY.pages_per_channel, "domain": 0}, Status.INVALID_PLACE),
    ({"opcode": Opcode.MAP, "argument": TINY.part.blocks, "domain": 0}, Status.INVALID_PLACE),
]


@pytest.mark.parametrize(("fields", "status"), INVALID_FLASH)
def test_invalid_flash_commands(device, fields, status):
    before = len(list(device.written()))
    fields = {**FLASH, **fields}
    (bad,) = device.host.run(0 if fields["opcode"] >= ADMIN_OPCODES else 1, FLASH_COMMAND.pack(**fields))
    (good,) = run(device, FLASH_COMMAND.pack(**{**FLASH, "identifier": 6}))
    assert (bad.status, bad.where, bad.identifier) == (status, 0, 5)
    assert (good.status, good.where, good.identifier) == (Status.OK, 0, 6)
    assert len(list(device.written())) == before + 1


def test_pages_that_pad_a_block_are_no_places():
    config = replace(TINY, part=TINY_PART.resized(1024, pages=6))
    device = Hosted(config)
    assert flash(device, Opcode.ERASE, 0, 6 << 2).status is Status.INVALID_PLACE
    assert flash(device, Opcode.ERASE, 0, 5 << 2).status is Status.OK


def test_a_dram_page_that_there_is_not(device):
    found = flash(device, Opcode.PROGRAM, 0, 10, 32)
    assert (found.status, found.where) == (Status.BUS_ERROR, 10)
    table(device, [(0, 10, 5, 0), (1, 0, 5, 0)])
    assert run(device, {})[0].status is Status.UNREADABLE_KEY


def test_faults(device):
    faults = device.faults
    bad = Block(1, 1, 0, 3)
    page = 3 << TINY.zone_page_bits | 2
    faults.bad.add(bad)
    for opcode, status in ((Opcode.PROBE, Status.BAD_BLOCK), (Opcode.PROGRAM, Status.PROGRAM_FAILED),
                           (Opcode.ERASE, Status.ERASE_FAILED)):
        found = flash(device, opcode, 1, page)
        assert (found.status, found.where) == (status, 1 << 24 | page)
    assert flash(device, Opcode.PROBE, 1, page + 1).status is Status.OK
    last = int(layout.page_number(layout.PagePlace(3, TINY.part.pages - 1, 1, 0), TINY))
    assert (found := flash(device, Opcode.PROBE, 1, last)).status is Status.BAD_BLOCK
    assert found.where == 1 << 24 | last
    middle = int(layout.page_number(layout.PagePlace(3, 2, 1, 0), TINY))
    assert flash(device, Opcode.PROBE, 1, middle).status is Status.OK     # its part has no marks there
    faults.worn.add(Block(0, 1, 0, 0))
    assert flash(device, Opcode.PROGRAM, 0, 10, DRAM).status is Status.PROGRAM_FAILED
    assert flash(device, Opcode.ERASE, 0, 2).status is Status.ERASE_FAILED
    table(device, [(0, 2, 6, 0), (1, 0, 5, 0)])
    assert run(device, {})[0].status is Status.OK   # what it held can be read
    faults.worn.clear()
    assert flash(device, Opcode.PROGRAM, 0, 10, DRAM).status is Status.PROGRAM_FAILED   # the page is used up
    assert flash(device, Opcode.PROGRAM, 0, 14, DRAM).status is Status.OK
    faults.program_fails.add((Block(0, 1, 0, 0), 4))
    assert flash(device, Opcode.PROGRAM, 0, 18, DRAM).status is Status.PROGRAM_FAILED
    faults.dead.add((1, 0))
    for opcode in (Opcode.PROBE, Opcode.PROGRAM, Opcode.ERASE):
        found = flash(device, opcode, 1, 5)
        assert (found.status, found.where) == (Status.DIE_TIMEOUT, 1 << 24 | 5)
    table(device, [(0, 2, 6, 0), (1, 2, 5, 0)])
    found = run(device, {})[0]
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 16)
    assert media(device) == (1, 5, MediaCause.DIE_TIMEOUT, 0)


@pytest.mark.parametrize("opcode", [Opcode.PROGRAM, Opcode.ERASE])
def test_a_power_cut(device, opcode):
    fields = {"channel": 0, "page": 10, "domain": DOMAIN}
    first = FLASH_COMMAND.pack(**fields | {"opcode": Opcode.PROGRAM, "channel": 1, "argument": DRAM})
    line = FLASH_COMMAND.pack(**fields, opcode=opcode, argument=DRAM * (opcode is Opcode.PROGRAM))
    device.faults.power_cut = 1
    device.host.push(1, first, line, first)
    device.host.ring(1)
    with pytest.raises(DeviceTimeoutError, match="its power is off"):
        device.wait(1)
    assert device.read_register("ID") == 0
    assert len(device.host.reap(1)) == 1
    device.power_up()
    assert device.read_register("STATUS") == StatusBit.READY
    assert device.read_register("INTERRUPTS") == 0
    assert not any(device.read_dram(DRAM * TINY.page_bytes, TINY.page_bytes))
    device.host.admin()
    device.host.create(1)
    found = run(device, {})[0]
    assert (found.status, found.where) == (Status.NOT_PERMITTED, 1)     # the owners are gone
    device.write_register("CONTROL", Control.RESET)
    device.host.open()
    for key_page, good in ((2, opcode is Opcode.PROGRAM), (10, False), (3, True)):
        table(device, [(0, key_page, 5, 0), (1, 10, 5, 0)])
        assert (run(device, {})[0].status is Status.OK) == good


# Bus errors.


def test_bus_errors():
    device = Hosted(window=(QUERIES, 1 << 20))
    (found,) = run(device, {"query": 1 << 16})
    assert (found.status, found.where, found.identifier) == (Status.BUS_ERROR, 0, 77)
    assert device.read_register("STATUS") & StatusBit.BUS_ERROR
    device.write_register("STATUS", StatusBit.BUS_ERROR)
    assert not device.read_register("STATUS") & StatusBit.BUS_ERROR
    assert flash(device, Opcode.PROGRAM).status is Status.OK
    table(device, [(0, 0, 0, 0)] * 2)
    for field in ("result", "table"):
        (found,) = run(device, {field: 1 << 16})
        assert (found.status, found.where, found.identifier) == (Status.BUS_ERROR, 0, 77)
        assert device.read_register("STATUS") & StatusBit.BUS_ERROR
        device.write_register("STATUS", StatusBit.BUS_ERROR)


def test_rows_start_tree_and_windows_reach_the_golden_model():
    """A hand-made job, away from page 0 and channel 0, with base_token inside the sequence."""
    rng = np.random.default_rng(5)
    config = replace(TINY, channels=3)
    tokens = config.tokens_per_page
    key, value = rng.standard_normal((2, 3 * tokens, 32)).astype(np.float16).view(np.uint16)
    query = rng.standard_normal((2, 32)).astype(np.float16).view(np.uint16)
    device = Hosted(config)
    zone = 4 << config.zone_page_bits
    places = [(2, zone + 1, zone + 4), (0, zone + 3, zone + 2), (1, zone, zone + 6)]
    images = [layout.pack_pages(bits, config) for bits in (key, value)]
    device.write_dram(0, np.concatenate(images).tobytes())
    for channel in range(3):
        pages = sorted((page, 3 * kind + stripe) for stripe, (c, *pair) in enumerate(places) if c == channel
                       for kind, page in enumerate(pair))
        # Page 4 of the zone is the second one of plane 0, die 0, as 6 is of plane 0, die 1.
        if channel == 2:
            pages.insert(0, (zone, 0))
        if channel == 1:
            pages.insert(1, (zone + 2, 0))
        for page, source in pages:
            assert flash(device, Opcode.PROGRAM, channel, page, source).status is Status.OK

    masks = {
        "start": np.array([2 * tokens + 3, 0]),
        "end": np.array([1 << 20, 4 * tokens]),
        "tree": np.array([0b1011, 0xFFFF_FFFF]),
    }
    common = {"base_token": 2 * tokens, "end_token": 5 * tokens - 2, "tree_token": 5 * tokens - 9}
    table(device, [(*place, 0) for place in places])
    device.write_memory(QUERIES, b"".join(
        ROW.pack(start_token=int(start), end_token=int(end), tree=int(tree)) + q.tobytes()
        for start, end, tree, q in zip(*masks.values(), query, strict=True)))
    assert run(device, {**common, "stripes": 3})[0].status is Status.OK
    trace = dense.attend(
        query,
        key,
        value,
        element=config.element,
        scale_bits=ONE,
        **masks,
        **common,
    )
    block = device.read_memory(RESULTS, 2 * result_row_bytes(32))
    rows = [block[: result_row_bytes(32)], block[result_row_bytes(32) :]]
    assert [row[:128] for row in rows] == [output.astype("<u4").tobytes() for output in trace.output]
    trailers = [TRAILER.unpack(row[128:]) for row in rows]
    assert [t["maximum"] - (t["maximum"] >> 63 << 64) for t in trailers] == trace.maximum.tolist()
    assert [t["denominator"] for t in trailers] == trace.denominator.tolist()
    assert trace.attended.sum(axis=1).tolist() == [3 * tokens - 9 - 3 + 3, 2 * tokens]


def test_flags_are_kept_with_a_nan(device):
    """Four tokens in device DRAM whose products overflow, the last of them with a NaN."""
    key = np.full((TOKENS, 32), 60000.0).astype(np.float16)
    key[3, 0] = np.nan
    device.write_dram(0, layout.pack_pages(key.view(np.uint16), TINY).tobytes())
    table(device, [(0, 0, DRAM, 1)])
    device.write_memory(QUERIES, ROW.pack(end_token=1000) + np.full(32, 60000.0, np.float16).tobytes())
    for end, status, where in ((3, Status.OK, 0), (4, Status.NAN_KEY, 3)):
        (found,) = run(device, {"rows": 1, "stripes": 1, "end_token": end})
        assert (found.status, found.where, found.flags) == (status, where, CompletionFlag.SCORE_OVERFLOW)


def test_bad_calls(device):
    with pytest.raises(RequestError, match="host memory is 0 to 0x10000: 2 bytes at 0xffff are not in it"):
        device.write_memory(0xFFFF, b"ab")
    with pytest.raises(RequestError, match=r"host memory .* are not in it"):
        device.read_memory(-1, 1)
    with pytest.raises(RequestError, match="device DRAM is 0 to 0x8000: 2 bytes at 0x7fff are not in it"):
        device.write_dram(0x7FFF, b"ab")
    with pytest.raises(RequestError, match=r"device DRAM .* are not in it"):
        device.read_dram(-1, 1)
    for name in ("memory_bytes", "dram_bytes"):
        with pytest.raises(RequestError, match=f"{name} must be positive, not 0"):
            GoldenDevice(TINY, **{name: 0})
