"""Where sequences put K and V: the tail in DRAM, stripes in flash, their spread, faults, wear, loss of power."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvattic.driver.device import Device, FlashOperation, Loss
from kvattic.driver.diagnosis import where_unreadable
from kvattic.errors import CapacityError, ConfigError, DeviceStatusError, DeviceTimeoutError, KvatticError, RequestError
from kvattic.golden.device import FlashFaults, GoldenDevice
from kvattic.spec import codes, layout
from kvattic.spec.commands import Kind, Opcode, Status
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.layout import Block, PagePlace, page_number, page_place
from kvattic.spec.nand import TINY_PART
from kvattic_sim.reports.benches import placement

PAGE = TINY.tokens_per_page
SPARSE = 128
"""Tokens of a stripe with the feature layout: eight pages."""
ODD = Config(channels=3, rows=2, head_dim=80, sparse=False, part=TINY_PART, dies=2, codeword_bytes=512, score_depth=256)
WIDE = replace(TINY, part=TINY_PART.resized(1024, planes=4), dies=4, channels=3)
QUAD = replace(TINY, part=TINY_PART.resized(4096, pages=6), rows=1, score_depth=1024)   # two pages, of 64 tokens


class Spy(GoldenDevice):
    """A golden device that notes what crosses its DRAM window."""

    def __init__(self, config=TINY, **sizes):
        super().__init__(config, **sizes)
        self.writes = []

    def write_dram(self, address, data):
        self.writes.append((address, len(data)))
        super().write_dram(address, data)


def tokens_of(config, kv_heads, tokens, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, kv_heads, tokens, config.head_dim)
    return rng.standard_normal(shape).astype(np.float16).view(np.uint16)


def query_of(config, q_heads, n=1):
    return np.random.default_rng(99).standard_normal((q_heads, n, config.head_dim)).astype(np.float16)


def entries_of(sequence, layer=0):
    return layout.unpack_entries(sequence._writer.layers[layer].table)


def expected_bits(config, key, value, query, **arguments):
    """What a fresh device without any faults says, in one prefill."""
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(key.shape[0], capacity_tokens=key.shape[1])
        sequence.prefill(key, value)
        return sequence.attend(query, **arguments).bits


# The tail.


def test_only_the_new_tokens_cross_the_dram_window():
    """Three tokens of 160 bytes lie in a codeword of 512, two codewords in a page; two heads, K and V of each."""
    key, value = tokens_of(ODD, 2, 20)
    transport = Spy(ODD)
    sequence = Device(transport).create_sequence(2, capacity_tokens=100)
    at, base = 0, None
    for last in (1, 2, 5, 6, 10):
        transport.writes.clear()
        sequence.append(key[:, at:last], value[:, at:last])
        if last in (1, 10):     # a new tail: whole pages
            assert [size for _, size in transport.writes] == [4 * 1024]
            base = transport.writes[0][0]
        else:
            first, end = layout.token_offset(at, ODD), layout.token_offset(last - 1, ODD) + 160
            assert transport.writes == [(base + page * 1024 + first, end - first) for page in range(4)]
        at = last
    # Of a piece that goes on in another codeword: its last token, the rest of the codeword, and one more.
    assert layout.token_offset(3, ODD) - layout.token_offset(2, ODD) == 160 + 32
    data = np.frombuffer(transport.read_dram(base, 4 * 1024), np.uint8).reshape(2, 2, 1, 1024)
    for head in range(2):
        for kind, bits in ((Kind.KEY, key), (Kind.VALUE, value)):
            assert np.array_equal(data[head, kind], layout.pack_pages(bits[head, 6:10], ODD))


def test_a_tail_leaves_nothing_of_others_in_its_padding():
    """DRAM pages are used again; what is programmed from them holds this sequence's tokens and zeros."""
    with Device(GoldenDevice(ODD, dram_bytes=2 * 1024)) as device:
        with device.create_sequence(1, capacity_tokens=6) as other:
            other.append(*np.full((2, 1, 3, 80), 0xAAAA, np.uint16))
            device.transport.write_dram(0, b"\xaa" * 2048)
        sequence = device.create_sequence(1, capacity_tokens=6)
        for _ in range(6):
            sequence.append(*np.full((2, 1, 1, 80), 1, np.uint16))
        images = [image for _, _, image in device.transport.written()]
        assert len(images) == 2
        assert all(np.array_equal(image, layout.pack_pages(np.ones((6, 80), np.uint16), ODD)[0]) for image in images)


def test_full_stripes_go_to_flash_and_give_their_dram_back():
    key, value = tokens_of(TINY, 3, 5 * PAGE)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(3, capacity_tokens=5 * PAGE, layers=2)
        pages = device.free_dram_pages
        for t in range(5 * PAGE):
            sequence.append(key[:, t : t + 1], value[:, t : t + 1], layer=1)
            assert sequence.flushed(1) == (t + 1) // PAGE * PAGE
            assert pages - device.free_dram_pages == (6 if (t + 1) % PAGE else 0)
            stripes = -(-(t + 1) // PAGE)
            dram = entries_of(sequence, 1).dram[:, :stripes]
            assert (dram == (np.arange(stripes) >= (t + 1) // PAGE)).all()
        assert sequence.flushed(0) == sequence.length(0) == 0
        assert device.write_amplification == 1
        assert len(list(device.transport.written())) == 2 * 3 * 5


def test_a_plan_follows_its_stripes():
    """Made while they are in DRAM, run when they are in flash and others use the DRAM."""
    key, value = tokens_of(TINY, 1, 2 * PAGE)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY)) as device:
        sequence, other = (device.create_sequence(1, capacity_tokens=2 * PAGE) for _ in range(2))
        sequence.append(key[:, : PAGE - 1], value[:, : PAGE - 1])
        plan = sequence.plan(query)
        before = device.attend_many([plan])[0].bits
        sequence.append(key[:, PAGE - 1 : PAGE], value[:, PAGE - 1 : PAGE])
        other.append(*np.full((2, 1, PAGE - 1, 32), 0x5555, np.uint16))
        assert np.array_equal(device.attend_many([plan])[0].bits, before)
        jobs = plan.jobs
        sequence.free()
        with pytest.raises(DeviceStatusError, match=r"INVALID_TABLE: entry 0 .*\(or the sequence was freed\)"):
            device.run(jobs)


def test_full_dram():
    key, value = tokens_of(TINY, 2, 3 * PAGE)
    with Device(GoldenDevice(TINY, dram_bytes=9 * 1024)) as device:
        first, second, third = (device.create_sequence(2, capacity_tokens=3 * PAGE) for _ in range(3))
        first.append(key[:, :1], value[:, :1])
        second.append(key[:, :20], value[:, :20])
        with pytest.raises(CapacityError, match=r"the device DRAM is full: 4 consecutive pages .* has 1 \(1 of 9 are"):
            third.append(key, value)
        assert third.length() == 0
        assert not third._writer.layers[0].staged
        # A tail that fills up needs no more DRAM, and gives its pages back for the next one.
        second.append(key[:, 20:33], value[:, 20:33])
        assert (second.length(), second.flushed()) == (33, 32)
        first.free()
        third.append(key, value)
        assert third.flushed() == 48
        with pytest.raises(CapacityError, match="a stripe of 5 KV heads takes 10 pages of device DRAM, which has 9"):
            device.create_sequence(5, capacity_tokens=1)


@pytest.mark.parametrize("pages", [4, 7, 12, 1000])
def test_prefill_goes_through_little_dram(pages):
    key, value = tokens_of(TINY, 2, 7 * PAGE + 3)
    query = query_of(TINY, 4, 3)
    with Device(Spy(TINY, dram_bytes=pages * 1024)) as device:
        sequence = device.create_sequence(2, capacity_tokens=200)
        sequence.prefill(key, value)
        assert sequence.flushed() == 7 * PAGE
        assert np.array_equal(sequence.attend(query, causal=True).bits,
                              expected_bits(TINY, key, value, query, causal=True))
        assert device.free_dram_pages == pages - 4


# The feature layout.


def stored(device, channel, page, count=1):
    """Images of consecutive pages of flash."""
    blocks = [device.media.allocator.block(channel, p) for p in range(page, page + count)]
    pages = [device.transport.flash.blocks[b].pages for b in blocks]
    return np.array([found[page_place(page + i, device.config).page].image for i, found in enumerate(pages)])


SKETCHES = [{}, {"sparse": True}, {"centroids": 16}, {"sparse": True, "centroids": 4, "codes": True}, {"codes": True}]
"""What a sequence may have beside K and V, of TINY."""
each_sketch = pytest.mark.parametrize("sketches", SKETCHES, ids=lambda sketches: "-".join(sketches) or "none")


def check_sketches(sequence, key, layer=0):
    """Whether flash holds what the sketch entries say, of all full stripes."""
    device, config, size = sequence.device, sequence.device.config, sequence.stripe_tokens
    pages, flushed = sequence._shape.pages, sequence.flushed(layer)
    entries = entries_of(sequence, layer)
    for kind, table in sequence._writer.layers[layer].sketches.items():
        found = layout.unpack_sketches(table)
        for head in range(sequence.kv_heads):
            for stripe in range(flushed // size):
                assert found.written[head, stripe] == 1
                channel, page = int(entries.channel[head, stripe]), int(found.page[head, stripe])
                codeword = int(found.codeword[head, stripe])
                tokens = key[head, stripe * size : (stripe + 1) * size]
                if kind is Kind.FEATURE:
                    images = stored(device, channel, page, pages)
                    assert codeword == 0
                    assert np.array_equal(layout.unpack_feature_pages(images, config), tokens)
                elif kind is Kind.CODES:
                    images = stored(device, channel, page, -(-(codeword + config.octets) // config.codewords_per_page))
                    octets = images.reshape(-1, config.codeword_bytes)[codeword : codeword + config.octets]
                    assert np.array_equal(octets, codes.pack(codes.encode(tokens, config), config)[0])
                else:
                    means = layout.mean_keys(tokens, sequence.centroids, config)
                    first = codeword * config.tokens_per_codeword
                    images = stored(device, channel, page, -(-(first + len(means)) // config.tokens_per_page))
                    assert np.array_equal(layout.unpack_pages(images, config)[first : first + len(means)], means)

@pytest.mark.parametrize("config", [TINY, QUAD, replace(WIDE, score_depth=512)], ids=["tiny", "quad", "wide"])
@settings(max_examples=10)
@given(pieces=st.lists(st.sampled_from([1, 60, 63, 64, 128, 200]), min_size=1, max_size=6))
def test_sparse_sequences_have_k_twice(config, pieces):
    total = sum(pieces)
    key, value = tokens_of(config, 2, total)
    query = query_of(config, 4)
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(2, capacity_tokens=total, sparse=True)
        size, pages = sequence.stripe_tokens, layout.stripe_pages(config, sparse=True)
        assert size == config.codeword_bytes // 2
        assert pages in (2, 8)
        at = 0
        for piece in pieces:
            sequence.append(key[:, at : at + piece], value[:, at : at + piece])
            at += piece
        assert sequence.flushed() == total // size * size
        bits = sequence.attend(query).bits
        entries, found = entries_of(sequence), layout.unpack_sketches(sequence._writer.layers[0].sketches[Kind.FEATURE])
        for head in range(2):
            for stripe in range(total // size):
                channel = int(entries.channel[head, stripe])
                here = key[head, stripe * size : (stripe + 1) * size]
                images = stored(device, channel, int(found.page[head, stripe]), pages)
                assert np.array_equal(layout.unpack_feature_pages(images, config), here)
                images = stored(device, channel, int(entries.key_page[head, stripe]), pages)
                assert np.array_equal(layout.unpack_pages(images, config), here)
        assert (found.written == (np.arange(found.written.shape[1]) < total // size)).all()
        assert not found.codeword.any()
        assert device.media.allocator.pages_written == 2 * 3 * pages * (total // size)
        assert device.write_amplification == 1 or total < size
    assert np.array_equal(bits, expected_bits(config, key, value, query))


def test_long_sparse_jobs_are_split_where_a_lane_is_full():
    """The score buffer holds 64 codewords, a stripe has 32: two stripes on each of two channels."""
    key, value = tokens_of(TINY, 1, 9 * SPARSE + 1)
    query = query_of(TINY, 1)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=9 * SPARSE + 1, sparse=True)
        sequence.prefill(key, value)
        plan = sequence.plan(query)
        assert [(job.base_token, job.end_token, len(job.table)) for job in plan.jobs] == [
            (0, 512, 4), (512, 1024, 4), (1024, 1153, 2)]
        result = device.attend_many([plan])[0]
        windowed = sequence.plan(query, window=129).jobs
        assert [(job.base_token, job.end_token, len(job.table)) for job in windowed] == [(8 * SPARSE, 1153, 2)]
    with Device(GoldenDevice(replace(TINY, score_depth=2048))) as device:
        sequence = device.create_sequence(1, capacity_tokens=9 * SPARSE + 1)
        sequence.prefill(key, value)
        whole = sequence.attend(query)
        assert len(whole.completions) == 1
    assert np.array_equal(result.maximum, whole.maximum)
    assert np.allclose(result.output, whole.output, rtol=1e-6, atol=1e-7)


def test_sparse_needs_a_fitting_geometry():
    with Device(GoldenDevice(ODD)) as device:
        with pytest.raises(ConfigError, match="without sparse attention: sparse must be True"):
            device.create_sequence(1, capacity_tokens=10, sparse=True)
        with pytest.raises(RequestError, match="sparse must be a bool, not 1"):
            device.create_sequence(1, capacity_tokens=10, sparse=1)


def test_sparse_stripes_go_through_little_dram():
    """K and V of a stripe of two heads take 32 pages; K again passes through in pieces of 8."""
    key, value = tokens_of(TINY, 2, 300)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY, dram_bytes=40 * 1024)) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True)
        sequence.append(key[:, :100], value[:, :100])
        sequence.append(key[:, 100:], value[:, 100:])
        assert sequence.flushed() == 256
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
    with Device(GoldenDevice(TINY, dram_bytes=39 * 1024)) as device:
        sequence = device.create_sequence(2, capacity_tokens=300, sparse=True)
        sequence.append(key[:, :100], value[:, :100])
        with pytest.raises(CapacityError, match="8 consecutive pages are wanted, the longest free range has 7"):
            sequence.append(key[:, 100:], value[:, 100:])
        assert sequence.length() == 100


# Centroids.


CENTROIDS = [(TINY, 4), (TINY, 8), (TINY, 16), (QUAD, 4), (QUAD, 32), (replace(WIDE, score_depth=512), 16)]


@pytest.mark.parametrize(("config", "unit"), CENTROIDS)
@pytest.mark.parametrize("sparse", [False, True])
@settings(max_examples=10, deadline=None)
@given(pieces=st.lists(st.sampled_from([1, 60, 63, 64, 128, 200]), min_size=1, max_size=6), heads=st.integers(1, 4))
def test_centroids_are_in_flash_with_their_stripes(config, unit, sparse, pieces, heads):
    total = sum(pieces)
    key, value = tokens_of(config, heads, total)
    query = query_of(config, heads)
    config = replace(config, part=config.part.resized(config.page_bytes, blocks=32))
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(heads, capacity_tokens=total, sparse=sparse, centroids=unit)
        at = 0
        for piece in pieces:
            sequence.append(key[:, at : at + piece], value[:, at : at + piece])
            at += piece
            check_sketches(sequence, key)
        # It takes no more than was reserved.
        assert all(min(allocation.shared) >= 0 for allocation in sequence._writer.allocations)
        assert sequence.flushed() == total // config.group_tokens * config.group_tokens
        bits = sequence.attend(query).bits
        assert device.write_amplification == 1 or total < config.group_tokens
        assert device.free_dram_pages == device.media.dram.pages - 2 * heads * sequence._shape.pages * bool(
            total % config.group_tokens)
    assert np.array_equal(bits, expected_bits(config, key, value, query))


@pytest.mark.parametrize(("unit", "decoded", "at_once"), [
    # Six heads, three to a channel; four stripes.  A stripe's centroids take 2 pages, 1 page, or half a page.
    (4, 4 * 6 * 2, 4 * 6 * 2), (8, 4 * 6, 4 * 6), (16, 4 * 2 * 2, 4 * 6 // 2)])
def test_stripes_that_are_written_together_share_pages(unit, decoded, at_once):
    config = replace(TINY, part=TINY_PART.resized(1024, blocks=64))
    key, value = tokens_of(config, 6, 4 * SPARSE)
    for pieces, pages in (([SPARSE] * 4, decoded), ([4 * SPARSE], at_once)):
        with Device(GoldenDevice(config)) as device:
            sequence = device.create_sequence(6, capacity_tokens=4 * SPARSE, centroids=unit)
            at = 0
            for piece in pieces:
                sequence.append(key[:, at : at + piece], value[:, at : at + piece])
                at += piece
            check_sketches(sequence, key)
            assert len(list(device.transport.written())) == 4 * 6 * 2 * 8 + pages
            if unit == 16 and len(pieces) == 1:
                # Both stripes of a head on a channel lie in one page: it is read once for both.
                found = layout.unpack_sketches(sequence._writer.layers[0].sketches[Kind.SKETCH])
                assert np.array_equal(found.page[:, :2], found.page[:, 2:])
                assert np.array_equal(found.codeword[:, 2:], found.codeword[:, :2] + 2)


@pytest.mark.parametrize("unit", [4, 8, 16])
@pytest.mark.parametrize(("kv_heads", "layers"), [(1, 1), (3, 1), (5, 2), (4, 3)])
def test_what_is_reserved_is_what_decoding_takes(unit, kv_heads, layers):
    """To the page: stripe by stripe, layer by layer, over several zones."""
    config = replace(TINY, channels=3, part=TINY_PART.resized(1024, blocks=64))
    with Device(GoldenDevice(config)) as device:
        device.create_sequence(1, capacity_tokens=1)
        sequence = device.create_sequence(kv_heads, capacity_tokens=7 * SPARSE + 5, layers=layers, sparse=True,
                                          centroids=unit)
        runs, pages = sequence._writer.allocations
        assert (runs.run, pages.run) == (8, 2 if unit == 4 else 1)
        free = device.free_zones - device.media.allocator._wanted()
        step = np.ones((kv_heads, SPARSE, 32), np.float16)
        for _ in range(7):
            for layer in range(layers):
                assert max(pages.shared) > 0
                sequence.append(step, step, layer=layer)
        for allocation in sequence._writer.allocations:
            assert allocation.shared == [0, 0, 0]
            assert len(allocation.own.zones) == allocation.quota
        assert device.free_zones - device.media.allocator._wanted() == free


def test_nothing_stays_reserved_when_centroids_find_no_room():
    """K and V take all zones; there is none for centroids."""
    with Device(GoldenDevice(TINY)) as device:
        tokens = 7 * 4 * 2 * SPARSE // 2
        before = device.media.allocator._wanted()
        with pytest.raises(CapacityError, match="has no room"):
            device.create_sequence(1, capacity_tokens=tokens, centroids=16)
        assert device.media.allocator._wanted() == before == 0
        device.create_sequence(1, capacity_tokens=tokens)


@pytest.mark.parametrize("bad", [2, 32, 6, 0, -4, True, 4.0, "8"])
def test_bad_centroids(bad):
    with Device(GoldenDevice(TINY)) as device:
        message = f"centroids: a unit must have a power of two of tokens from 4 .a codeword. to 16, not {bad!r}"
        with pytest.raises(RequestError, match=message):
            device.create_sequence(1, capacity_tokens=10, centroids=bad)
    with Device(GoldenDevice(ODD)) as device, pytest.raises(ConfigError, match="without sparse attention"):
        device.create_sequence(1, capacity_tokens=10, centroids=3)


def test_centroids_go_through_little_dram():
    """K and V of a stripe of three heads take 48 pages; two heads' centroids at once another 4."""
    key, value = tokens_of(TINY, 3, 300)
    query = query_of(TINY, 3)
    for unit, extra in ((4, 4), (8, 2), (16, 1)):
        with Device(GoldenDevice(TINY, dram_bytes=(48 + extra) * 1024)) as device:
            sequence = device.create_sequence(3, capacity_tokens=300, centroids=unit)
            sequence.append(key[:, :100], value[:, :100])
            sequence.append(key[:, 100:], value[:, 100:])
            assert sequence.flushed() == 256
            check_sketches(sequence, key)
            assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        with Device(GoldenDevice(TINY, dram_bytes=(48 + extra) * 1024 - 1)) as device:
            sequence = device.create_sequence(3, capacity_tokens=300, centroids=unit)
            sequence.append(key[:, :100], value[:, :100])
            with pytest.raises(CapacityError, match=f"{extra} consecutive pages are wanted, the longest"):
                sequence.append(key[:, 100:], value[:, 100:])
            assert sequence.length() == 100


@pytest.mark.parametrize("sketches", SKETCHES[1:], ids="-".join)
def test_prefill_with_sketches_goes_through_little_dram(sketches):
    """A stripe of three heads takes 48 pages; what its sketches pass through leaves less for further ones."""
    config = replace(TINY, part=TINY_PART.resized(1024, blocks=16))
    key, value = tokens_of(config, 3, 4 * SPARSE)
    for pages in (56, 72, 96, 97, 100, 144, 150, 192, 400):
        with Device(GoldenDevice(config, dram_bytes=pages * 1024)) as device:
            sequence = device.create_sequence(3, capacity_tokens=4 * SPARSE, **sketches)
            sequence.prefill(key, value)
            assert sequence.flushed() == 4 * SPARSE
            check_sketches(sequence, key)
            assert all(min(allocation.shared) >= 0 for allocation in sequence._writer.allocations)
            assert device.free_dram_pages == pages


# Spread.


def programs_of(monkeypatch, device):
    """A list that each batch of PROGRAM commands is added to, as (channel, page)."""
    batches = []
    submit = device.media.submit

    def spy(operations):
        batches.append([(o.channel, o.page) for o in operations if o.opcode is Opcode.PROGRAM])
        return submit(operations)

    monkeypatch.setattr(device.media, "submit", spy)
    return batches


def test_a_prefill_keeps_all_channels_busy_and_planes_together(monkeypatch):
    """WIDE: four planes, four dies: a head's K on a channel lies on the planes of one die, V on the next die's."""
    stripes = 4 * WIDE.channels
    key, value = tokens_of(WIDE, 3, stripes * PAGE)
    with Device(GoldenDevice(WIDE)) as device:
        batches = programs_of(monkeypatch, device)
        sequence = device.create_sequence(3, capacity_tokens=stripes * PAGE)
        sequence.prefill(key, value)
        (batch,) = batches
        # Round robin, and on each channel page after page, two dies plane by plane in turn.
        assert [channel for channel, _ in batch] == [i % 3 for i in range(2 * 3 * stripes)]
        for channel in range(3):
            pair = [plane + 4 * die for plane in range(4) for die in range(2)]
            assert [page for c, page in batch if c == channel] == [8 * i + p for i in range(stripes // 4) for p in pair]
        entries = entries_of(sequence)
        for head in range(3):
            for channel in range(3):
                here = entries.channel[head] == channel
                assert here.sum() == 4
                for pages in (entries.key_page, entries.value_page):
                    place = page_place(pages[head][here], WIDE)
                    assert len(set(place.die.tolist())) == len(set(place.page.tolist())) == 1
                    assert place.plane.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("config", "kv_heads", "layers"), [
    (WIDE, 1, 1), (WIDE, 3, 2), (WIDE, 4, 2), (replace(WIDE, channels=2), 4, 4), (TINY, 2, 1)])
def test_decoded_stripes_of_a_head_go_round_the_dies(config, kv_heads, layers):
    """Also where all heads and layers together fill whole rows, so that the next page would be on the same die."""
    rounds = 2 * config.dies
    total = rounds * config.channels * PAGE
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(kv_heads, capacity_tokens=total, layers=layers)
        step = np.ones((kv_heads, PAGE, 32), np.float16)
        for _ in range(total // PAGE):
            for layer in range(layers):
                sequence.append(step, step, layer=layer)
        for layer in range(layers):
            entries = entries_of(sequence, layer)
            for head in range(kv_heads):
                for channel in range(config.channels):
                    here = entries.channel[head] == channel
                    key_dies = page_place(entries.key_page[head][here], config).die
                    value_dies = page_place(entries.value_page[head][here], config).die
                    assert set(Counter(key_dies.tolist()).values()) == {2}
                    assert set(Counter(value_dies.tolist()).values()) == {2}
                    assert (np.diff(key_dies) % config.dies == 1).all()
                    assert (key_dies != value_dies).all()


def test_channels_carry_alike():
    """Heads of OPT-13B: 40 of them, 2,048 tokens, and then some."""
    config = replace(PAPER, part=PAPER.part.resized(1024), codeword_bytes=512, head_dim=32)
    with Device(GoldenDevice(config)) as device:
        tokens = 32 * config.tokens_per_page
        sequence = device.create_sequence(40, capacity_tokens=tokens)
        sequence.prefill(*np.ones((2, 40, tokens, 32), np.float16))
        load = Counter(block.channel for block, _, _ in device.transport.written())
        assert load == dict.fromkeys(range(8), 2 * 40 * 32 // 8)
        dies = Counter(block.die for block, _, _ in device.transport.written())
        assert max(dies.values()) == min(dies.values())


@pytest.mark.parametrize(("kv_heads", "layers"), [(1, 1), (3, 2), (4, 4), (8, 1)])
def test_decoded_centroids_of_a_head_go_round_the_dies(kv_heads, layers):
    config = replace(WIDE, channels=2, score_depth=512, part=TINY_PART.resized(1024, planes=4, blocks=32))
    rounds = 2 * config.dies
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(kv_heads, capacity_tokens=rounds * 2 * SPARSE, layers=layers, sparse=True,
                                          centroids=8)
        step = np.ones((kv_heads, SPARSE, 32), np.float16)
        for _ in range(rounds * 2):
            for layer in range(layers):
                sequence.append(step, step, layer=layer)
        for layer in range(layers):
            entries = entries_of(sequence, layer)
            found = layout.unpack_sketches(sequence._writer.layers[layer].sketches[Kind.SKETCH])
            for head in range(kv_heads):
                for channel in range(2):
                    dies = page_place(found.page[head][entries.channel[head] == channel], config).die
                    assert set(Counter(dies.tolist()).values()) == {2}
                    assert (np.diff(dies) % config.dies == 1).all()


# Faults.


@each_sketch
def test_any_page_may_fail(sketches):
    """Pages of all kinds: what they hold is placed elsewhere, centroids of other stripes that share the page, too."""
    key, value = tokens_of(TINY, 3, 2 * SPARSE)
    query = query_of(TINY, 3)
    bits = expected_bits(TINY, key, value, query)
    with Device(GoldenDevice(TINY)) as device:
        device.create_sequence(3, capacity_tokens=2 * SPARSE, **sketches).prefill(key, value)
        places = [(block, page) for block, page, _ in device.transport.written()]
    for place in places[::3]:
        with Device(GoldenDevice(TINY, faults=FlashFaults(program_fails={place}))) as device:
            sequence = device.create_sequence(3, capacity_tokens=2 * SPARSE, **sketches)
            sequence.prefill(key, value)
            assert sequence.flushed() == 2 * SPARSE
            check_sketches(sequence, key)
            assert np.array_equal(sequence.attend(query).bits, bits)
            assert device.write_amplification > 1


@each_sketch
def test_any_die_may_die(sketches):
    """Tokens on their way stay in DRAM; the next append places what is missing, centroids among it, on other dies."""
    config = replace(WIDE, score_depth=512)
    key, value = tokens_of(config, 4, 3 * SPARSE + 5)
    query = query_of(config, 4)
    for channel, die in ((0, 0), (0, 1), (1, 2), (2, 3)):
        with Device(GoldenDevice(config, faults=FlashFaults(dead={(channel, die)}))) as device:
            sequence = device.create_sequence(4, capacity_tokens=3 * SPARSE + 5, **sketches)
            errors = []
            while sequence.length() < key.shape[1]:
                try:
                    sequence.append(key[:, sequence.length() :], value[:, sequence.length() :])
                except DeviceStatusError as error:
                    errors.append(str(error))
                at = sequence.length()
                assert np.array_equal(sequence.attend(query).bits,
                                      expected_bits(config, key[:, :at], value[:, :at], query))
            assert len(errors) < 4
            assert all("DIE_TIMEOUT" in error for error in errors)
            assert sequence.flushed() == key.shape[1] // sequence.stripe_tokens * sequence.stripe_tokens
            check_sketches(sequence, key)
            assert not any((block.channel, block.die) == (channel, die) for block, _, _ in device.transport.written())


def test_what_finds_no_room_is_written_later_and_nothing_twice():
    """Centroids take the last zone, K and V find none: the stripe stays in DRAM, and is attended there."""
    key, value = tokens_of(TINY, 2, SPARSE + 1)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(2, capacity_tokens=SPARSE + 1, sparse=True, centroids=16)
        zones = [device.media.allocator._take_zone(8) for _ in range(6)]
        with pytest.raises(CapacityError, match="the flash is full: all 7 zones are in use"):
            sequence.append(key[:, :-1], value[:, :-1])
        assert (sequence.length(), sequence.flushed()) == (SPARSE, 0)
        assert len(list(device.transport.written())) == 2
        bits = sequence.attend(query).bits
        assert np.array_equal(bits, expected_bits(TINY, key[:, :-1], value[:, :-1], query))
        assert np.array_equal(sequence.attend(query, mode="centroid", top_units=1).bits, bits)      # all is tail
        for zone in zones:
            device.media.allocator._close(zone)
        sequence.append(key[:, -1:], value[:, -1:])
        assert sequence.flushed() == SPARSE
        check_sketches(sequence, key)
        assert len(list(device.transport.written())) == 2 + 2 * 3 * 8
        assert device.free_dram_pages == device.media.dram.pages - 32


def test_a_page_that_fails_is_placed_elsewhere():
    key, value = tokens_of(TINY, 2, 8 * PAGE)
    query = query_of(TINY, 2)
    faults = FlashFaults(program_fails={(Block(0, 0, 0, 0), 0), (Block(1, 1, 1, 0), 2)})
    with Device(GoldenDevice(TINY, faults=faults)) as device:
        sequence = device.create_sequence(2, capacity_tokens=8 * PAGE)
        sequence.prefill(key, value)
        assert sequence.flushed() == 8 * PAGE
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        assert device.write_amplification == 34 / 32
        assert device.bad_blocks == []
        sequence.free()
        assert device.bad_blocks == [Block(0, 0, 0, 0), Block(1, 1, 1, 0)]
        # The zone is used again, with spares in their places.
        for _ in range(2 * device.media.allocator.zones):
            with device.create_sequence(2, capacity_tokens=8 * PAGE) as sequence:
                sequence.prefill(key, value)
                assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        assert device.write_amplification < 34 / 32


@each_sketch
def test_worn_blocks_are_left_one_after_the_other(sketches):
    """Every third block fails, at a page of its own; attention never says anything wrong."""
    faults, errors = FlashFaults(), []
    with Device(GoldenDevice(TINY, faults=faults), spare_blocks=3) as device:
        query = query_of(TINY, 2)
        for seed in range(30):
            key, value = tokens_of(TINY, 2, 6 * PAGE + seed + 128 * bool(sketches), seed)
            faults.worn.add(Block(seed % 2, seed // 2 % 2, seed // 4 % 2, seed % 8))
            try:
                with device.create_sequence(2, capacity_tokens=key.shape[1], **sketches) as sequence:
                    sequence.prefill(key[:, :-5], value[:, :-5])
                    sequence.append(key[:, -5:], value[:, -5:])
                    assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
            except CapacityError as error:
                errors.append(str(error))
        assert len(device.bad_blocks) >= 4
    assert errors == []


def test_other_sequences_go_on_when_flash_is_full():
    faults = FlashFaults()
    with Device(GoldenDevice(TINY, faults=faults)) as device:
        key, value = tokens_of(TINY, 2, 60)
        good = device.create_sequence(2, capacity_tokens=60)
        good.prefill(key, value)
        faults.worn |= {Block(0, die, plane, block) for die in range(2) for plane in range(2) for block in range(8)}
        sequence = device.create_sequence(2, capacity_tokens=100)
        with pytest.raises(CapacityError, match="the flash is full: all 7 zones are in use"):
            sequence.prefill(*tokens_of(TINY, 2, 90, 1))
        # The tokens are in DRAM, and are attended.
        assert (sequence.length(), sequence.flushed()) == (80, 0)
        query = query_of(TINY, 2)
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, *tokens_of(TINY, 2, 90, 1)[:, :, :80],
                                                                         query))
        assert np.array_equal(good.attend(query).bits, expected_bits(TINY, key, value, query))


def test_what_finds_no_room_leaves_no_gap():
    """The pages that were taken before the flash was full are taken again, in order."""
    key, value = tokens_of(TINY, 2, 100)
    with Device(GoldenDevice(TINY), spare_blocks=6) as device:      # two zones of 32 pages on each channel
        first = device.create_sequence(2, capacity_tokens=480)
        first.prefill(*np.ones((2, 2, 480, 32), np.float16))        # 60 pages on each
        sequence = device.create_sequence(1, capacity_tokens=32)
        sequence._writer.layers[0], sequence.capacity_tokens = type(sequence._writer.layers[0])(
            table=np.zeros((1, 7), np.uint64), sketches={}, sums=None), 100   # more than it has reserved
        with pytest.raises(CapacityError, match="all 2 zones are in use"):
            sequence.append(key[:1], value[:1])
        assert (sequence.length(), sequence.flushed()) == (96, 0)
        third = device.create_sequence(1, capacity_tokens=32)
        third.append(key[1:, :32], value[1:, :32])
        assert third.flushed() == 32
        first.free()
        sequence.append(key[:1, 96:], value[:1, 96:])
        assert sequence.flushed() == 96
        query = query_of(TINY, 1)
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key[:1], value[:1], query))
        assert device.write_amplification == 1


def test_a_flush_that_failed_is_tried_again():
    faults = FlashFaults(dead={(0, 1)})
    key, value = tokens_of(TINY, 2, 3 * PAGE)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY, faults=faults)) as device:
        sequence = device.create_sequence(2, capacity_tokens=3 * PAGE)
        message = (r"PROGRAM failed: DIE_TIMEOUT: the die stays busy: "
                   r"channel 0, die 1, plane \d, block 0 \(zone 0\), page 0")
        with pytest.raises(DeviceStatusError, match=message) as error:
            sequence.prefill(key[:, :-1], value[:, :-1])
        assert error.value.completion.status is Status.DIE_TIMEOUT
        assert (sequence.length(), sequence.flushed()) == (2 * PAGE, 0)
        assert np.array_equal(sequence.attend(query).bits,
                              expected_bits(TINY, key[:, : 2 * PAGE], value[:, : 2 * PAGE], query))
        sequence.append(key[:, 2 * PAGE :], value[:, 2 * PAGE :])
        assert sequence.flushed() == 3 * PAGE
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        # Nothing else is placed on that die.
        with device.create_sequence(2, capacity_tokens=300) as other:
            other.prefill(*tokens_of(TINY, 2, 300, 1))
        assert not any(block.channel == 0 and block.die == 1 for block, _, _ in device.transport.written())


def test_a_die_that_dies_later():
    faults = FlashFaults()
    with Device(GoldenDevice(TINY, faults=faults)) as device:
        sequence, other = (device.create_sequence(1, capacity_tokens=10 * PAGE) for _ in range(2))
        sequence.prefill(*tokens_of(TINY, 1, 10 * PAGE))
        other.append(*tokens_of(TINY, 1, 3))
        faults.dead.add((1, 1))
        with pytest.raises(DeviceStatusError, match="UNREADABLE_KEY") as error:
            sequence.attend(query_of(TINY, 1))
        place = r"channel 1, die 1, plane \d, block 0 .zone 0., page \d, codeword 0 .DIE_TIMEOUT."
        assert re.search(place, str(error.value))
        assert other.attend(query_of(TINY, 1)).output.any()
        with pytest.raises(DeviceStatusError, match=r"ERASE failed: DIE_TIMEOUT: .* channel 1, die 1"):
            sequence.free()
        assert device.free_zones == device.media.allocator.zones
        other.append(*tokens_of(TINY, 1, 9 * PAGE))
        assert other.flushed() == 9 * PAGE


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [Kind.KEY, Kind.VALUE])
def test_what_cannot_be_read_is_named(sparse, kind):
    """Sequence, layer, head and token; channel, die, plane, block, page and codeword; and the cause."""
    with Device(GoldenDevice(TINY)) as device:
        device.create_sequence(1, capacity_tokens=5)
        sequence = device.create_sequence(3, capacity_tokens=300, layers=2, sparse=sparse)
        sequence.prefill(*tokens_of(TINY, 3, 300))
        sequence.prefill(*tokens_of(TINY, 3, 300), layer=1)
        token = 128 + 16 + 9            # second stripe when sparse, its page 1; codeword 2 of its page
        size = sequence.stripe_tokens
        entries = entries_of(sequence, 1)
        channel = int(entries.channel[2, token // size])
        page = int((entries.key_page, entries.value_page)[kind][2, token // size]) + token % size // PAGE
        block, place = device.media.allocator.block(channel, page), page_place(page, TINY)
        device.transport.faults.unreadable.add((block, place.page, 2))
        with pytest.raises(DeviceStatusError) as error:
            sequence.attend(query_of(TINY, 3), layer=1)
        name = "KV"[kind]
        assert str(error.value) == (
            "job 2 of 3 (sequence 1, layer 1, KV head 2, tokens 0 to 299) failed: "
            f"UNREADABLE_{kind.name}: {name} of token 152 on cannot be read: {block} (zone {place.zone}), "
            f"page {place.page}, codeword 2 (UNCORRECTABLE)")
        assert error.value.completion.where == 152
        # The next one is served, and so are other heads.
        jobs = sequence.plan(query_of(TINY, 3), layer=1).jobs
        statuses = [result.completion.status for result in device.run(jobs, check=False)]
        assert statuses == [Status.OK, Status.OK, Status[f"UNREADABLE_{kind.name}"]]
        # Not the first of its batch: its cause is not known, and nothing else is said to be it.
        jobs[0].table[0] = layout.pack_entries(entries.channel[0, 0], 6 << 5, 6 << 5, 0)   # nothing is there
        results = device.run(jobs, check=False)
        assert results[0].completion.status is Status.UNREADABLE_KEY
        assert re.search(r"codeword 2 \(not the first of the batch, which is page number 192 of channel \d\)$",
                         where_unreadable(jobs[2], results[2].completion, device.media))


def test_dram_that_there_is_not_is_nobodys():
    with Device(GoldenDevice(TINY)) as device:
        sequence = device.create_sequence(1, capacity_tokens=20)
        sequence.append(*tokens_of(TINY, 1, 10))
        sequence._writer.layers[0].table[0, 0] = layout.pack_entries(0, 1 << 23, 0, 1)
        with pytest.raises(DeviceStatusError, match=r"NOT_OWNED: what entry 0 of the table .* another domain"):
            sequence.attend(query_of(TINY, 1))


# Bad blocks.


def marked():
    return FlashFaults(bad={Block(0, 0, 0, 0), Block(1, 1, 1, 7), Block(1, 0, 1, 3)})


def test_a_scan_finds_the_factorys_marks():
    device = Device(GoldenDevice(TINY, faults=marked()), bad_blocks=[Block(0, 1, 0, 2)])
    assert device.scan_bad_blocks() == sorted(marked().bad)
    assert device.bad_blocks == sorted({*marked().bad, Block(0, 1, 0, 2)})
    assert device.scan_bad_blocks() == sorted(marked().bad)     # again, now through a map that is not plain
    key, value = tokens_of(TINY, 2, 220)
    query = query_of(TINY, 2)
    for _ in range(10):
        with device.create_sequence(2, capacity_tokens=220) as sequence:
            sequence.prefill(key, value)
            assert not {block for block, _, _ in device.transport.written()} & set(device.bad_blocks)
            assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
    assert device.write_amplification == 1
    with pytest.raises(RequestError, match="only before anything is written"):
        device.scan_bad_blocks()
    # A list that was kept does as well.
    with Device(GoldenDevice(TINY, faults=marked()), bad_blocks=device.bad_blocks) as other:
        sequence = other.create_sequence(2, capacity_tokens=220)
        sequence.prefill(key, value)
        assert other.write_amplification == 1
        with pytest.raises(RequestError, match="only before anything is written"):
            other.scan_bad_blocks()


@pytest.mark.parametrize("page", TINY.part.marked_pages)
def test_a_scan_finds_marks_in_each_of_the_parts_pages(page):
    faults = FlashFaults(bad=marked().bad, mark_pages={page})
    with Device(GoldenDevice(TINY, faults=faults)) as device:
        assert device.scan_bad_blocks() == sorted(faults.bad)
        assert device.bad_blocks == sorted(faults.bad)


def test_finding_marks_changes_nothing():
    known = [Block(0, 1, 0, 2)]
    with Device(GoldenDevice(TINY, faults=marked()), bad_blocks=known) as device:
        before = dict(device.transport.flash.map)
        assert before, "the known block is replaced"
        assert device.find_marks() == marked().bad
        assert device.bad_blocks == known
        assert device.transport.flash.map == before
        with device.create_sequence(2, capacity_tokens=220) as sequence:
            sequence.prefill(*tokens_of(TINY, 2, 220))
            with pytest.raises(RequestError, match="only before anything is written"):
                device.find_marks()


def test_a_scan_looks_only_where_the_part_has_marks():
    config = replace(TINY, part=replace(TINY.part, mark_pages=(0, 1)))
    faults = FlashFaults(bad=marked().bad, mark_pages={TINY.part.pages - 1, 2})
    with Device(GoldenDevice(config, faults=faults)) as device:
        assert device.scan_bad_blocks() == []
        faults.mark_pages = {1}
        assert device.scan_bad_blocks() == sorted(faults.bad)


def test_unknown_bad_blocks_do_no_harm():
    key, value = tokens_of(TINY, 2, 220)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY, faults=marked())) as device:
        for _ in range(10):
            with device.create_sequence(2, capacity_tokens=220) as sequence:
                sequence.prefill(key, value)
                assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        assert set(device.bad_blocks) <= marked().bad
        assert Block(0, 0, 0, 0) in device.bad_blocks


def test_a_scan_of_a_dead_die():
    device = Device(GoldenDevice(TINY, faults=FlashFaults(dead={(0, 0)})))
    with pytest.raises(DeviceStatusError, match=r"PROBE failed: DIE_TIMEOUT: .*: channel 0, die 0, plane 0, block 0"):
        device.scan_bad_blocks()


def test_flash_commands_of_the_caller():
    with Device(GoldenDevice(TINY, faults=marked())) as device:
        message = (r"PROBE failed: BAD_BLOCK: the block has the factory's mark of a bad block: "
                   r"channel 1, die 0, plane 1, block 3 \(zone 3\), page 0")
        probe = FlashOperation(Opcode.PROBE, 1, int(page_number(PagePlace(3, 0, 0, 1), TINY)))
        with pytest.raises(DeviceStatusError, match=message):
            device.operate([FlashOperation(Opcode.PROBE, 0, 3), probe])
        found = device.operate([FlashOperation(Opcode.PROBE, 0, 3), probe], check=False)
        assert [c.status for c in found] == [Status.OK, Status.BAD_BLOCK]
        assert device.operate([]) == []
        with pytest.raises(DeviceStatusError, match=r"MAP failed: INVALID_PLACE: .* no such channel, page or block$"):
            device.operate([FlashOperation(Opcode.MAP, 1, 3, 100)])
        for bad in (FlashOperation(Opcode.MAP, 256, 3, 0), FlashOperation(Opcode.MAP, 0, -1, 0),
                    FlashOperation(Opcode.MAP, 0, 0, 1 << 32), FlashOperation(Opcode.MAP, 0, 0, 1 << 70)):
            with pytest.raises(RequestError, match="does not fit its field"):
                device.operate([bad])


def test_flash_commands_as_many_at_a_time_as_there_is_room(monkeypatch):
    transport = GoldenDevice(TINY)
    tails = []
    write = transport.write_register
    with Device(transport, entries=8) as device:
        monkeypatch.setattr(transport, "write_register", lambda name, value: (
            tails.append(value) if name == "SUBMISSION_TAIL_0" else None, write(name, value)))
        device.operate([FlashOperation(Opcode.PROBE, i % 2, i) for i in range(25)])
    first = tails[0]
    assert [(tail - first) % 8 for tail in tails] == [0, 7, 6, 2]   # 7, 7, 7 and 4 of them


# Freeing.


def test_nothing_of_a_freed_sequence_is_left():
    secret = np.full((2, 2, 100, 32), 0x1234, np.uint16)
    with Device(GoldenDevice(TINY)) as device:
        with device.create_sequence(2, capacity_tokens=100) as sequence:
            sequence.prefill(*secret)
            assert any((image.view(np.uint16) == 0x1234).any() for _, _, image in device.transport.written())
        assert not list(device.transport.written())
    # Or later, but before anybody uses the pages again.
    with Device(GoldenDevice(TINY), erase_on_free=False) as device:
        with device.create_sequence(2, capacity_tokens=100) as sequence:
            sequence.prefill(*secret)
        assert list(device.transport.written())
        for _ in range(20):
            with device.create_sequence(2, capacity_tokens=100) as sequence:
                sequence.prefill(*np.zeros_like(secret))
        assert not any((image.view(np.uint16) == 0x1234).any() for _, _, image in device.transport.written())
        assert device.wear.maximum > 0


def test_a_used_drive_must_be_formatted():
    transport = GoldenDevice(TINY)
    key, value = tokens_of(TINY, 2, 200)
    Device(transport).create_sequence(2, capacity_tokens=200).prefill(key, value)
    device = Device(transport)
    sequence = device.create_sequence(2, capacity_tokens=200)
    device.format()
    assert not list(transport.written())
    sequence.prefill(key, value)
    query = query_of(TINY, 2)
    assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
    assert device.write_amplification == 1
    with pytest.raises(RequestError, match="zones are in use; free all sequences first"):
        device.format()


# Loss of power.


@pytest.mark.parametrize("after", [0, 1, 5, 17, 40, 47])
@each_sketch
def test_a_power_cut_loses_only_what_was_not_acknowledged(after, sketches):
    """Three batches of PROGRAM commands; the supply fails somewhere in them."""
    faults = FlashFaults()
    key, value = tokens_of(TINY, 2, 400)
    other_key, other_value = tokens_of(TINY, 1, 50, 1)
    with Device(GoldenDevice(TINY, faults=faults), timeout_s=0.01, bad_blocks=[Block(0, 0, 0, 0)]) as device:
        transport = device.transport
        other = device.create_sequence(1, capacity_tokens=50)
        other.append(other_key, other_value)
        assert other.flushed() == 48
        sequence = device.create_sequence(2, capacity_tokens=400, layers=2, **sketches)
        faults.power_cut = after + 5
        plan = other.plan(query_of(TINY, 1))
        done, pieces = 0, (128, 20, 110, 140)
        with pytest.raises(DeviceTimeoutError, match="its power is off"):
            for piece in pieces:
                sequence.append(key[:, done : done + piece], value[:, done : done + piece])
                done += piece
                flushed = sequence.flushed()
            assert faults.power_cut is None
        with pytest.raises(KvatticError):
            sequence.attend(query_of(TINY, 2))
        transport.power_up()
        losses = device.recover()
        assert transport.flash.map == {(0, 0, 0, 0): 7}
        size = sequence.stripe_tokens
        kept = sequence.length()
        assert kept == sequence.flushed() == kept // size * size
        assert kept >= (flushed if done else 0)
        lost = {(loss.sequence, loss.layer): loss.tokens for loss in losses}
        assert lost[other, 0] == 2
        assert lost[sequence, 0] > 0
        assert all(isinstance(loss, Loss) for loss in losses)
        assert device.free_dram_pages == device.media.dram.pages
        query = query_of(TINY, 2)
        if kept:
            assert np.array_equal(sequence.attend(query).bits,
                                  expected_bits(TINY, key[:, :kept], value[:, :kept], query))
        assert np.array_equal(other.attend(query[:1]).bits,
                              expected_bits(TINY, other_key[:, :48], other_value[:, :48], query[:1]))
        # A plan of before does not attend what others have in DRAM now.
        third = device.create_sequence(1, capacity_tokens=50)
        third.append(other_key[:, :5], other_value[:, :5])
        with pytest.raises(DeviceStatusError, match="INVALID_TABLE: entry 3"):
            device.attend_many([plan])
        # And on.
        sequence.append(key[:, kept:], value[:, kept:])
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        check_sketches(sequence, key)
        # Nothing was programmed out of order: no block is thought to be bad.
        for one in (other, third, sequence):
            one.free()
        assert device.bad_blocks == [Block(0, 0, 0, 0)]


def test_a_power_cut_while_erasing():
    faults = FlashFaults()
    key, value = tokens_of(TINY, 2, 200)
    query = query_of(TINY, 2)
    with Device(GoldenDevice(TINY, faults=faults), timeout_s=0.01) as device:
        sequence = device.create_sequence(2, capacity_tokens=200)
        sequence.prefill(key, value)
        faults.power_cut = 3
        with pytest.raises(DeviceTimeoutError, match="its power is off"):
            sequence.free()
        device.transport.power_up()
        assert device.recover() == []
        for _ in range(10):
            with device.create_sequence(2, capacity_tokens=200) as sequence:
                sequence.prefill(key, value)
                assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))
        assert not list(device.transport.written())
        assert device.write_amplification == 1


def test_an_error_in_a_with_block_is_not_hidden_by_the_end_of_it():
    with pytest.raises(ZeroDivisionError), Device(GoldenDevice(TINY), timeout_s=0.01) as device:
        sequence = device.create_sequence(2, capacity_tokens=200)
        sequence.prefill(*tokens_of(TINY, 2, 200))
        with sequence:
            device.transport._powered = False
            raise ZeroDivisionError


def test_completions_of_before_count_for_nothing():
    """A doorbell that is lost leaves old completions in host memory, which must not pass for new ones."""

    class Deaf(GoldenDevice):
        deaf = False

        def write_register(self, name, value):
            if not (self.deaf and name.startswith("SUBMISSION_TAIL")):
                super().write_register(name, value)

    transport = Deaf(TINY)
    key, value = tokens_of(TINY, 1, 3 * PAGE)
    with Device(transport, entries=2) as device:
        sequence = device.create_sequence(1, capacity_tokens=3 * PAGE)
        sequence.append(key[:, :PAGE], value[:, :PAGE])
        transport.deaf = True
        with pytest.raises(DeviceTimeoutError, match="ring a doorbell first"):
            sequence.append(key[:, PAGE : 2 * PAGE], value[:, PAGE : 2 * PAGE])
        assert (sequence.length(), sequence.flushed()) == (2 * PAGE, PAGE)
        transport.deaf = False
        with pytest.raises(DeviceTimeoutError, match=r"call Device.reset"):
            sequence.append(key[:, 2 * PAGE :], value[:, 2 * PAGE :])
        device.reset()
        query = query_of(TINY, 1)
        expected = expected_bits(TINY, key[:, : 2 * PAGE], value[:, : 2 * PAGE], query)
        assert np.array_equal(sequence.attend(query).bits, expected)
        sequence.append(key[:, 2 * PAGE :], value[:, 2 * PAGE :])
        assert sequence.flushed() == 3 * PAGE
        assert np.array_equal(sequence.attend(query).bits, expected_bits(TINY, key, value, query))


# The bench.


def test_the_bench_counts_what_happens():
    """A hundred sequences, eight at a time: everything is gone afterwards, nothing was written twice."""
    life = placement.live(batch=8, longest=6.0, sequences=100)
    assert (life.sequences, life.alive, life.amplification) == (100, 8, 1.0)
    assert 0 < life.spread <= 2
    assert 0.5 < life.erases < 2
    assert 0.1 < life.occupancy < 0.5


def test_the_bench_mixes_sequences_of_all_kinds():
    life = placement.live(batch=8, longest=6.0, sequences=60, mixed=True)
    assert (life.sequences, life.alive, life.amplification) == (60, 8, 1.0)
    assert 0 < life.spread <= 4
    assert life.erases > 0.3
