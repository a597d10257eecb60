"""The golden device at the level of registers, memory and commands."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic import golden, layout
from kvattic.commands import (
    COMMAND,
    COMPLETION,
    LINE_BYTES,
    Completion,
    CompletionFlag,
    Opcode,
    Status,
    fp32_bits,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import TINY
from kvattic.driver import Device
from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.golden_device import GoldenDevice
from kvattic.registers import ID_MAGIC, REGISTERS, VERSION, Access, Control, StatusBit

COMMANDS, COMPLETIONS, QUERIES, RESULTS, LIMIT = 0x1000, 0x2000, 0x3000, 0x5000, 0x7000
ONE = fp32_bits(1.0)


@pytest.fixture
def device():
    """A device with ones in pages 0 to 9 of both channels, and the registers set."""
    device = GoldenDevice(TINY, memory_bytes=1 << 16, pages_per_channel=100)
    ones = layout.pack_pages(np.full((10 * TINY.tokens_per_page, 32), 0x3C00, np.uint16), TINY)
    for channel in range(TINY.channels):
        device.write_pages(channel, 0, ones)
    for name, value in (
        ("COMMAND_BASE", COMMANDS),
        ("COMPLETION_BASE", COMPLETIONS),
        ("BUFFER_BASE", QUERIES),
        ("BUFFER_LIMIT", LIMIT),
    ):
        device.write_register(name, value)
    return device


GOOD = {
    "opcode": Opcode.ATTEND,
    "identifier": 77,
    "rows": 2,
    "key_page": 0,
    "value_page": 5,
    "end_token": 20,
    "tree_token": 20,
    "scale": ONE,
    "query": QUERIES,
    "result": RESULTS,
}


def run(device, *commands):
    """Completions of commands (dictionaries of fields, or 64 bytes)."""
    lines = [c if isinstance(c, bytes) else COMMAND.pack(**{**GOOD, **c}) for c in commands]
    device.write_memory(COMMANDS, b"".join(lines))
    device.write_register("STATUS", StatusBit.DONE)
    device.write_register("DOORBELL", len(lines))
    device.wait(1)
    data = device.read_memory(COMPLETIONS, LINE_BYTES * len(lines))
    assert all(COMPLETION.unpack(data[at:])["done"] for at in range(0, len(data), LINE_BYTES))
    return [Completion.unpack(data[at : at + LINE_BYTES]) for at in range(0, len(data), LINE_BYTES)]


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
        if register.name in ("CONTROL", "STATUS", "DOORBELL"):
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


def test_a_batch(device):
    found = run(device, {}, {"identifier": 78, "rows": 1})
    assert [(c.status, c.identifier, c.where, c.flags) for c in found] == [
        (Status.OK, 77, 0, CompletionFlag(0)),
        (Status.OK, 78, 0, CompletionFlag(0)),
    ]
    assert device.read_register("STATUS") == StatusBit.READY | StatusBit.DONE
    assert device.read_register("COMPLETED") == 2
    assert device.read_register("DOORBELL") == 0
    assert found[0].cycle == found[0].beats == found[0].idle == 0
    device.write_register("STATUS", StatusBit.DONE | StatusBit.READY)
    assert device.read_register("STATUS") == StatusBit.READY


def test_reset(device):
    run(device, {})
    device.write_register("CONTROL", Control.RESET)
    assert device.read_register("CONTROL") == 0
    assert device.read_register("STATUS") == StatusBit.READY
    assert device.read_register("COMMAND_BASE") == 0
    assert device.read_memory(COMMANDS, 1) == bytes([Opcode.ATTEND])


def test_irq_enable_is_kept():
    device = GoldenDevice(TINY)
    device.write_register("CONTROL", Control.IRQ_ENABLE)
    assert device.read_register("CONTROL") == Control.IRQ_ENABLE


def test_wait_without_a_batch():
    with pytest.raises(DeviceTimeoutError, match="ring the doorbell first"):
        GoldenDevice(TINY).wait(1)


@pytest.mark.parametrize("count", [0, 65_536])
def test_a_doorbell_out_of_range_is_refused(device, count):
    device.write_register("DOORBELL", count)
    assert device.read_register("STATUS") == StatusBit.READY | StatusBit.DOORBELL_WHILE_BUSY
    device.write_register("STATUS", StatusBit.DOORBELL_WHILE_BUSY)
    assert device.read_register("STATUS") == StatusBit.READY


RESERVED = COMMAND.pack(**GOOD, reserved2=1 << 63)
INVALID = [
    ({"opcode": 0x80}, Status.INVALID_OPCODE, 0x80),
    ({"flags": 1}, Status.INVALID_FIELD, 0),
    ({"reserved0": 0x100}, Status.INVALID_FIELD, 0),
    ({"reserved1": 1}, Status.INVALID_FIELD, 0),
    (RESERVED, Status.INVALID_FIELD, 0),
    ({"home": 2}, Status.INVALID_FIELD, 0),
    ({"rows": 0}, Status.INVALID_ROWS, 0),
    ({"rows": 3}, Status.INVALID_ROWS, 3),
    ({"end_token": 0}, Status.INVALID_LENGTH, 0),
    ({"base_token": 32, "end_token": 32}, Status.INVALID_LENGTH, 0),
    ({"base_token": 32, "end_token": 31}, Status.INVALID_LENGTH, 0),
    ({"end_token": TINY.max_tokens + 1}, Status.INVALID_LENGTH, 0),
    ({"base_token": (1 << 24) - 16, "end_token": 1 << 24}, Status.INVALID_LENGTH, 0),
    ({"base_token": 8, "end_token": 20}, Status.INVALID_LENGTH, 0),
    ({"query": QUERIES + 32}, Status.INVALID_ADDRESS, 0),
    ({"query": QUERIES - 64}, Status.INVALID_ADDRESS, 0),
    ({"query": LIMIT - 2 * query_row_bytes(32) + 64}, Status.INVALID_ADDRESS, 0),
    ({"query": (1 << 64) - 64}, Status.INVALID_ADDRESS, 0),
    ({"result": RESULTS + 1}, Status.INVALID_ADDRESS, 1),
    ({"result": QUERIES - 64}, Status.INVALID_ADDRESS, 1),
    ({"result": LIMIT - 2 * result_row_bytes(32) + 64}, Status.INVALID_ADDRESS, 1),
    ({"scale": 0}, Status.INVALID_SCALE, 0),
    ({"scale": 0x007F_FFFF}, Status.INVALID_SCALE, 0),
    ({"scale": 0x7F80_0000}, Status.INVALID_SCALE, 0),
    ({"scale": 0x8000_0000 | ONE}, Status.INVALID_SCALE, 0),
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
        {"end_token": TINY.tokens_per_page * 10, "value_page": 0, "tree_token": 160},
        {"scale": 0x0080_0000},
        {"scale": 0x7F7F_FFFF},
        {"home": 1},
    ],
)
def test_the_last_valid_values(device, command):
    assert run(device, command)[0].status is Status.OK


def test_the_lowest_status_is_reported(device):
    everything = {
        "opcode": 1,
        "flags": 1,
        "rows": 0,
        "end_token": 0,
        "query": 1,
        "result": 1,
        "scale": 0,
    }
    order = [
        Status.INVALID_OPCODE,
        Status.INVALID_FIELD,
        Status.INVALID_ROWS,
        Status.INVALID_LENGTH,
        Status.INVALID_ADDRESS,
        Status.INVALID_ADDRESS,
        Status.INVALID_SCALE,
    ]
    fields = list(everything)
    for index, status in enumerate(order):
        assert run(device, {name: everything[name] for name in fields[index:]})[0].status is status


def test_nan_precedence(device):
    key, value = np.full((2, 16, 32), 0x3C00, np.uint16)
    key[3, 0], key[9, 4], value[2, 31] = 0x7E00, 0xFC00, 0x7C00
    device.write_pages(0, 0, layout.pack_pages(key, TINY))
    device.write_pages(0, 5, layout.pack_pages(value, TINY))
    query = bytearray(2 * query_row_bytes(32))
    query[query_row_bytes(32) + 64 + 2 * 7 + 1] = 0x7C
    device.write_memory(QUERIES, bytes(query))
    (found,) = run(device, {"base_token": 160, "end_token": 176})
    assert (found.status, found.where) == (Status.NAN_QUERY, 1 * 65536 + 7)
    (found,) = run(device, {"base_token": 160, "end_token": 176, "rows": 1})
    assert (found.status, found.where) == (Status.NAN_KEY, 163)
    (found,) = run(device, {"base_token": 160, "end_token": 163, "rows": 1})
    assert (found.status, found.where) == (Status.NAN_VALUE, 162)
    (found,) = run(device, {"base_token": 160, "end_token": 162, "rows": 1})
    assert found.status is Status.OK


def test_erased_pages_are_reported(device):
    (found,) = run(device, {"key_page": 50})
    assert (found.status, found.where) == (Status.NAN_KEY, 0)


def test_bus_errors(device):
    device.write_register("BUFFER_LIMIT", 1 << 20)
    (found,) = run(device, {"query": 1 << 16})
    assert (found.status, found.where, found.identifier) == (Status.BUS_ERROR, 0, 77)
    assert device.read_register("STATUS") & StatusBit.BUS_ERROR
    device.write_register("STATUS", StatusBit.BUS_ERROR)
    assert not device.read_register("STATUS") & StatusBit.BUS_ERROR
    (found,) = run(device, {"result": 1 << 16})
    assert (found.status, found.where, found.identifier) == (Status.BUS_ERROR, 0, 77)
    assert device.read_register("STATUS") & StatusBit.BUS_ERROR
    device.write_register("STATUS", StatusBit.BUS_ERROR)
    device.write_register("COMMAND_BASE", 1 << 16)
    (found,) = run(device, {})
    assert (found.status, found.identifier) == (Status.BUS_ERROR, 0)


def test_rows_start_tree_and_windows_reach_the_golden_model():
    """A hand-made job, away from page 0 and channel 0, with base_token inside the sequence."""
    rng = np.random.default_rng(5)
    config = replace(TINY, channels=3)
    tokens = config.tokens_per_page
    key, value = rng.standard_normal((2, 5 * tokens, 32)).astype(np.float16).view(np.uint16)
    query = rng.standard_normal((2, 32)).astype(np.float16).view(np.uint16)
    transport = GoldenDevice(config)
    head, base = 4, {"key": 11, "value": 23}
    for bits, page in ((key, 11), (value, 23)):
        for stripe, image in enumerate(layout.pack_pages(bits, config)):
            place = layout.place(stripe, head, page, config)
            transport.write_pages(place.channel, place.page, image[None])
    device = Device(transport)
    from kvattic.driver import Job

    masks = {
        "start": np.array([2 * tokens + 3, 0]),
        "end": np.array([1 << 20, 4 * tokens]),
        "tree": np.array([0b1011, 0xFFFF_FFFF]),
    }
    common = {"base_token": 2 * tokens, "end_token": 5 * tokens - 2, "tree_token": 5 * tokens - 9}
    home, key_page = layout.job_place(2, head, base["key"], config)
    value_page = layout.job_place(2, head, base["value"], config).page
    (result,) = device.run(
        [
            Job(
                query=query,
                home=home,
                key_page=key_page,
                value_page=value_page,
                scale_bits=ONE,
                **masks,
                **common,
            )
        ]
    )
    trace = golden.attend(
        query,
        key[2 * tokens :],
        value[2 * tokens :],
        element=config.element,
        scale_bits=ONE,
        **masks,
        **common,
    )
    assert np.array_equal(result.bits, trace.output)
    assert np.array_equal(result.maximum, trace.maximum)
    assert np.array_equal(result.denominator, trace.denominator)
    assert trace.attended.sum(axis=1).tolist() == [3 * tokens - 9 - 3 + 3, 2 * tokens]


def test_flags_reach_the_completion():
    with (
        Device(GoldenDevice(TINY)) as device,
        device.create_sequence(1, capacity_tokens=4) as sequence,
    ):
        sequence.prefill(*np.full((2, 1, 4, 32), 60000.0))
        result = sequence.attend(np.full((1, 1, 32), 60000.0))
        assert result.flags == result.completions[0].flags == CompletionFlag.SCORE_OVERFLOW


def test_flags_are_kept_with_a_nan():
    with (
        Device(GoldenDevice(TINY)) as device,
        device.create_sequence(1, capacity_tokens=4) as sequence,
    ):
        key = np.full((1, 4, 32), 60000.0).astype(np.float16)
        key[0, 3] = np.nan
        sequence.prefill(key.view(np.uint16), np.ones((1, 4, 32)))
        (result,) = device.run(sequence.plan(np.full((1, 1, 32), 60000.0)).jobs, check=False)
        assert (result.completion.status, result.completion.where) == (Status.NAN_KEY, 3)
        assert result.completion.flags == CompletionFlag.SCORE_OVERFLOW


def test_low_bits_of_the_bases_are_ignored(device):
    device.write_register("COMMAND_BASE", COMMANDS + 63)
    device.write_register("COMPLETION_BASE", COMPLETIONS + 1)
    assert run(device, {})[0].status is Status.OK


def test_written_images_are_copies_and_are_replaced(device):
    image = np.full((1, TINY.page_bytes), 1, np.uint8)
    device.write_pages(0, 7, image)
    image[:] = 2
    assert device._pages[0, 7][0] == 1
    device.write_pages(0, 7, image)
    assert device._pages[0, 7][0] == 2


def test_bad_calls(device):
    image = np.zeros((2, TINY.page_bytes), np.uint8)
    with pytest.raises(RequestError, match="channel must be 0 to 1, not 2"):
        device.write_pages(2, 0, image)
    with pytest.raises(RequestError, match="pages are 0 to 99: 2 from 99 on"):
        device.write_pages(0, 99, image)
    with pytest.raises(RequestError, match="pages are 0 to 99: 2 from -1 on"):
        device.write_pages(0, -1, image)
    with pytest.raises(
        RequestError, match=r"images must be uint8 \(pages, 1024\), not uint8 \(2, 1000\)"
    ):
        device.write_pages(0, 0, image[:, :1000])
    with pytest.raises(RequestError, match="not float64"):
        device.write_pages(0, 0, image.astype(float))
    with pytest.raises(
        RequestError, match="host memory is 0 to 0x10000: 2 bytes at 0xffff are not in it"
    ):
        device.write_memory(0xFFFF, b"ab")
    with pytest.raises(RequestError, match="are not in it"):
        device.read_memory(-1, 1)
    for name in ("memory_bytes", "pages_per_channel"):
        with pytest.raises(RequestError, match=f"{name} must be positive, not 0"):
            GoldenDevice(TINY, **{name: 0})
