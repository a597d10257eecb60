"""`Sequence.read`: K and V come back as they were written, from flash and from device DRAM."""

from dataclasses import replace

import numpy as np
import pytest

import kvattic
from kvattic.driver.jobs import ReadJob
from kvattic.errors import DeviceStatusError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import Status, read_token_bytes
from kvattic.spec.config import TINY
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element
from kvattic.spec.layout import Block, page_place, unpack_entries

HEADS, TOKENS, LAYERS = 2, 150, 2


def any_numbers(rng, *shape):
    """Every finite fp16 number may come, subnormal ones too; K and V, as floats."""
    bits = rng.integers(0, 1 << 16, (2, *shape), np.uint16)
    numbers = bits.view(np.float16)
    numbers[~np.isfinite(numbers)] = 1
    return numbers


@pytest.fixture(params=[1, 3], ids=["a row", "three rows"])
def device(request):
    config = replace(TINY, rows=request.param)
    with kvattic.Device(GoldenDevice(config)) as opened:
        yield opened


@pytest.mark.parametrize("options", [{}, {"sparse": True, "centroids": 8}, {"isolated": True}], ids=str)
def test_it_gives_what_was_written(device, options):
    rng = np.random.default_rng(0)
    data = [any_numbers(rng, HEADS, TOKENS, TINY.head_dim) for _ in range(LAYERS)]
    with device.create_sequence(HEADS, capacity_tokens=TOKENS, layers=LAYERS, **options) as sequence:
        for layer, (key, value) in enumerate(data):
            sequence.prefill(key[:, :60], value[:, :60], layer=layer)
            sequence.append_async(key[:, 60:], value[:, 60:], layer=layer)
        for layer, written in enumerate(data):
            for name, found, expected in zip(("key", "value"), sequence.read(layer), written, strict=True):
                assert found.dtype == np.float16 and found.shape == expected.shape, name
                assert (expected.view(np.uint16) == found.view(np.uint16)).all(), name
            assert 0 < sequence.flushed(layer) < TOKENS
            part = sequence.read(layer, 7, 71)
            assert all((half == whole[:, 7:71]).all() for half, whole in zip(part, written, strict=True))


def test_what_was_read_can_be_written_elsewhere(device):
    data = np.random.default_rng(1).standard_normal((2, HEADS, TOKENS, TINY.head_dim)).astype(np.float16)
    query = np.random.default_rng(2).standard_normal((HEADS, 1, TINY.head_dim)).astype(np.float16)
    with device.create_sequence(HEADS, capacity_tokens=TOKENS) as first:
        first.prefill(*data)
        with device.create_sequence(HEADS, capacity_tokens=TOKENS) as second:
            second.prefill(*first.read())
            assert (second.attend(query).bits == first.attend(query).bits).all()


def test_every_bit_pattern_comes_back(device):
    """NaN with what it carries, infinities, both zeros."""
    data = np.random.default_rng(3).integers(0, 1 << 16, (2, HEADS, TOKENS, TINY.head_dim), np.uint16)
    data[:, :, ::7, 3], data[:, :, ::5, 4] = 0x7E01, 0x8000
    with device.create_sequence(HEADS, capacity_tokens=TOKENS) as sequence:
        sequence.prefill(*data)
        for read in (sequence.read(), sequence.read_bits()):
            assert all((found.view(np.uint16) == written).all() for found, written in zip(read, data, strict=True))


@pytest.mark.parametrize("geometry", [
    {}, {"head_dim": 80, "codeword_bytes": 512, "sparse": False, "score_depth": 512},
    {"head_dim": 96, "codeword_bytes": 512, "sparse": False, "beat_bytes": 16, "score_depth": 512},
    {"channels": 1}, {"element": Element.BF16}], ids=str)
def test_all_ranges(geometry):
    """The first and the last token may be any; jobs begin with a page, and have as much as fits a quarter of memory."""
    config = replace(TINY, **geometry)
    data = np.random.default_rng(4).integers(0, 1 << 16, (2, 1, TOKENS, config.head_dim), np.uint16)
    with kvattic.Device(GoldenDevice(config, memory_bytes=1 << 16)) as device, \
            device.create_sequence(1, capacity_tokens=TOKENS) as sequence:
        sequence.prefill(*data)
        for first in (*range(20), 63, 64, 65, 149):
            for last in {first + 1, min(first + 9, TOKENS), TOKENS - 1, TOKENS}:
                if first < last <= TOKENS:
                    found = sequence.read_bits(0, first, last)
                    assert all((half == whole[:, first:last]).all() for half, whole in zip(found, data, strict=True))


def test_many_jobs_and_what_they_cost():
    """More tokens than the score buffers hold; bytes to the host are counted, and their time is modelled."""
    tokens = 3 * TINY.max_tokens + 5
    data = np.random.default_rng(5).standard_normal((2, 2, tokens, TINY.head_dim)).astype(np.float16)
    with kvattic.Device(GoldenDevice(TINY)) as device, device.create_sequence(2, capacity_tokens=tokens) as sequence:
        sequence.prefill(*data)
        before = device.statistics()
        found = sequence.read()
        cost = device.statistics() - before
        assert all((half == whole).all() for half, whole in zip(found, data, strict=True))
        target = 2 * tokens * read_token_bytes(TINY.head_dim)
        assert target < cost.link_bytes < 1.1 * target
        assert cost.macs == 0 and cost.cycles >= target / 8     # a word of the host's bus a cycle
        read = sum(cost.flash_bytes.values()) + sum(cost.dram_bytes.values())
        assert target <= read < 1.01 * target


@pytest.mark.parametrize(("which", "kind"), [(0, "K"), (1, "V")])
def test_a_page_that_cannot_be_read_is_named(which, kind):
    golden = GoldenDevice(TINY)
    with kvattic.Device(golden) as device, device.create_sequence(HEADS, capacity_tokens=TOKENS) as sequence:
        sequence.prefill(*np.ones((2, HEADS, TOKENS, TINY.head_dim), np.float16))
        page = TINY.tokens_per_page
        entries = unpack_entries(sequence.states()[0]["table"][1])
        place = page_place(int((entries.key_page, entries.value_page)[which][2]), TINY)
        block = Block(int(entries.channel[2]), place.die, place.plane, place.zone)
        golden.faults.unreadable.add((block, place.page, 0))
        with pytest.raises(DeviceStatusError, match=(
                rf"sequence {sequence.number}, layer 0, KV head 1, tokens {page} to {3 * page}\) failed: "
                rf"UNREADABLE_\w+: {kind} of token {2 * page} on cannot be read.*codeword 0")):
            sequence.read(0, page + 1, 3 * page + 1)
        sequence.read(0, 3 * page)


@pytest.mark.parametrize(("arguments", "text"), [
    ((0, 0, 151), "last must be an int from 1 to 150, not 151"),
    ((0, 0, 0), "last must be an int from 1 to 150, not 0"),
    ((0, 5, 5), "first must be an int from 0 to 4, not 5"),
    ((0, -1), "first must be an int from 0 to 149, not -1"),
    ((1,), "layer 1 has no tokens to read"), ((2,), "layer"), ((0, 0.5), "first must be an int"),
])
def test_tokens_that_are_not_there(device, arguments, text):
    with device.create_sequence(HEADS, capacity_tokens=TOKENS, layers=2) as sequence:
        sequence.prefill(*np.zeros((2, HEADS, TOKENS, TINY.head_dim), np.float16))
        with pytest.raises(RequestError, match=text):
            sequence.read(*arguments)
    with pytest.raises(RequestError, match="freed"):
        sequence.read()


def test_bf16_comes_back_as_float32():
    config = replace(TINY, element=Element.BF16)
    data = np.random.default_rng(6).standard_normal((2, 1, 80, config.head_dim)).astype(np.float32) * 1e-30
    data = from_bits(to_bits(data, Element.BF16), Element.BF16)
    with kvattic.Device(GoldenDevice(config)) as device, device.create_sequence(1, capacity_tokens=80) as sequence:
        sequence.prefill(*data)
        for found, written in zip(sequence.read(), data, strict=True):
            assert found.dtype == np.float32 and (found == written).all()
        with sequence.fork(37) as fork:     # inside of a stripe in flash
            assert (fork.read()[0] == data[0][:, :37]).all()


def test_nobody_elses_pages_are_read(device):
    """READ passes the check of owners: a job that names another domain's pages is refused."""
    with device.create_sequence(1, capacity_tokens=80, isolated=True) as mine, \
            device.create_sequence(1, capacity_tokens=80, isolated=True) as other:
        for sequence in (mine, other):
            sequence.prefill(*np.ones((2, 1, 80, TINY.head_dim), np.float16))
        table = other.states()[0]["table"][0]
        job = ReadJob(table=table, stripe_pages=1, first_page=0, base_token=0, tokens=20, domain=mine.domain)
        (result,) = device.read([job], check=False)
        assert result.completion.status is Status.NOT_OWNED and result.key.shape == (0, TINY.head_dim)
        with pytest.raises(DeviceStatusError, match="job 0 of 1 failed: NOT_OWNED"):
            device.read([job])
        assert device.read([replace(job, domain=other.domain)])[0].key.shape == (20, TINY.head_dim)
        with pytest.raises(RequestError, match="a number of job 0 does not fit"):
            device.read([replace(job, domain=-1)])
