"""Several golden devices as one array, against one device and against plain float64 attention."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.host.plain import mask_of, reference

from kvattic.array import ArrayFuture, DriveArray, open_array
from kvattic.driver.device import Device
from kvattic.driver.results import AttendResult
from kvattic.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    DeviceLostError,
    DeviceStatusError,
    DeviceTimeoutError,
    KvatticError,
    RequestError,
)
from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY
from kvattic.spec.elements import from_bits, to_bits

STRIPE = TINY.tokens_per_page
SHORT = replace(TINY, sparse=False, score_depth=16)     # 32 tokens for a job, so that sequences are split
BOUND = 1.5e-6
"""Largest difference between outputs of the same tokens merged in different ways, relative to the largest |v|: twice
the error of a weight (2.8e-7, docs/numerics.md) for numerator and denominator each, and fp32's."""
DIM = TINY.head_dim


def array_of(drives, config=TINY, **sizes):
    return DriveArray([Device(GoldenDevice(config, **sizes)) for _ in range(drives)])


def one_device(config=TINY, **sizes):
    return Device(GoldenDevice(config, **sizes))


def tensors(kv_heads, tokens, q_heads, n_queries, seed=0, config=TINY):
    """(key, value, query) in float32, exact in the storage format."""
    rng = np.random.default_rng(seed)
    return [from_bits(to_bits(rng.standard_normal((*shape, config.head_dim)), config.element), config.element)
            for shape in ((kv_heads, tokens), (kv_heads, tokens), (q_heads, n_queries))]


def assert_same_bits(left, right):
    np.testing.assert_array_equal(left.bits, right.bits)
    np.testing.assert_array_equal(left.maximum, right.maximum)
    np.testing.assert_array_equal(left.denominator, right.denominator)
    assert left.flags == right.flags
    assert len(left.completions) == len(right.completions)


def masks_for(length, n_queries, seed=0):
    rng = np.random.default_rng(seed)
    tree = rng.random((n_queries, min(9, length))) < 0.6
    start, end = rng.integers(0, length + 1, (2, n_queries))
    return [{}, {"causal": True}, {"window": 5}, {"tree": tree}, {"causal": True, "window": 11},
            {"tree": tree, "window": 7}, {"tree": tree, "causal": True, "window": 30}, {"start": start, "end": end},
            {"start": start, "tree": tree, "causal": True, "window": 9}]


# Split by heads.


@pytest.mark.parametrize(("drives", "kv_heads", "group"), [
    (1, 2, 1), (2, 2, 1), (2, 5, 1), (3, 5, 4), (3, 8, 2), (4, 4, 8), (5, 3, 1), (4, 1, 6)])
def test_heads_give_the_bits_of_one_device(drives, kv_heads, group):
    array, device = array_of(drives), one_device()
    key, value, query = tensors(kv_heads, 3 * STRIPE + 5, kv_heads * group, 3)
    with array, device:
        split = array.create_sequence(kv_heads, capacity_tokens=200, layers=2)
        whole = device.create_sequence(kv_heads, capacity_tokens=200, layers=2)
        for layer in range(2):
            for sequence in (split, whole):
                sequence.prefill(key + layer, value - layer, layer=layer)
            for masks in masks_for(split.length(layer), 3):
                assert_same_bits(split.attend(query, layer=layer, **masks), whole.attend(query, layer=layer, **masks))


def test_heads_are_dealt_evenly_and_in_turn():
    array = array_of(3)
    heads = [{share.drive: (share.heads.start, share.heads.stop) for share in sequence._shares.values()}
             for sequence in (array.create_sequence(n, capacity_tokens=8) for n in (5, 4, 2, 1, 3))]
    assert heads == [{0: (0, 2), 1: (2, 4), 2: (4, 5)}, {2: (0, 2), 0: (2, 3), 1: (3, 4)}, {0: (0, 1), 1: (1, 2)},
                     {2: (0, 1)}, {0: (0, 1), 1: (1, 2), 2: (2, 3)}]


def test_heads_with_appends_in_pieces():
    array, device = array_of(2), one_device()
    key, value, query = tensors(3, 70, 6, 1)
    split, whole = (a.create_sequence(3, capacity_tokens=70) for a in (array, device))
    at = 0
    for piece in (1, 2, 20, 7, 39, 1):
        for sequence in (split, whole):
            sequence.append(key[:, at : at + piece], value[:, at : at + piece])
        at += piece
        assert split.length() == at
        assert split.flushed() == whole.flushed()
        assert_same_bits(split.attend(query), whole.attend(query))
    with pytest.raises(CapacityError, match="room for 70 tokens; layer 0 holds 70, 1 more do not fit"):
        split.append(key[:, :1], value[:, :1])


def test_heads_of_the_sparse_modes():
    array, device = array_of(2), one_device()
    key, value, query = tensors(3, 150, 6, 2)
    options = {"capacity_tokens": 200, "sparse": True, "centroids": TINY.tokens_per_codeword, "codes": True}
    split, whole = (a.create_sequence(3, **options) for a in (array, device))
    for sequence in (split, whole):
        sequence.prefill(key, value)
    np.testing.assert_array_equal(split.mean_value(), whole.mean_value())
    for choice in ({"mode": "sparf", "features": 8, "top_units": 20, "local_tokens": 3},
                   {"mode": "fetched", "features": 8, "top_units": 10},
                   {"mode": "centroid", "top_units": 10, "causal": True},
                   {"mode": "codes", "top_units": 20, "sinks": 3}):
        assert_same_bits(split.attend(query, **choice), whole.attend(query, **choice))


# Split by context.


def check_context(drives, length, pieces, kv_heads, group, n_queries, seed, layer=0, config=TINY):
    array, device = array_of(drives, config), one_device(config)
    key, value, query = tensors(kv_heads, length, kv_heads * group, n_queries, seed, config)
    split = array.create_sequence(kv_heads, capacity_tokens=length, layers=layer + 1, split="context")
    whole = device.create_sequence(kv_heads, capacity_tokens=length, layers=layer + 1)
    whole.prefill(key, value, layer=layer)
    at = 0
    for piece in pieces:
        split.append(key[:, at : at + piece], value[:, at : at + piece], layer=layer)
        at += piece
    assert split.length(layer) == at == length
    assert split.flushed(layer) == whole.flushed(layer)
    top = float(np.abs(value).max())
    for masks in masks_for(length, n_queries, seed):
        if masks.get("causal") and n_queries > length:
            continue
        result, single = (s.attend(query, layer=layer, **masks) for s in (split, whole))
        output, lse = reference(query, key, value, mask_of(length, n_queries, **masks))
        np.testing.assert_array_equal(result.maximum, single.maximum)
        assert np.abs(result.output - single.output).max() <= BOUND * top
        assert np.abs(result.output - output).max() <= BOUND * top
        there = np.isfinite(lse)
        np.testing.assert_array_equal(np.isfinite(result.lse), there)
        assert np.abs(result.lse[there] - lse[there]).max(initial=0) <= 2e-6
        norm = np.sqrt((output**2).mean())
        assert np.sqrt(((result.output - output) ** 2).mean()) <= 5e-7 * norm + 1e-30
    return split, whole, query


@pytest.mark.parametrize("config", [TINY, SHORT])
@pytest.mark.parametrize("drives", [1, 2, 3, 5])
def test_context_is_the_attention_of_one_device(drives, config):
    check_context(drives, 7 * STRIPE + 3, [2 * STRIPE + 1, 1, 3 * STRIPE, 2 * STRIPE + 1], 2, 3, 4, drives, 1, config)


@settings(max_examples=15)
@given(st.integers(1, 4), st.lists(st.integers(1, 3 * STRIPE), min_size=1, max_size=5), st.integers(1, 3),
       st.integers(1, 3), st.integers(1, 5), st.integers(0, 2))
def test_context_in_any_pieces(drives, pieces, kv_heads, group, n_queries, layer):
    check_context(drives, sum(pieces), pieces, kv_heads, group, n_queries, len(pieces), layer)


def test_context_with_few_tokens_gives_the_bits_of_one_device():
    split, whole, query = check_context(3, STRIPE - 1, [STRIPE - 1], 2, 2, 2, 0)
    assert_same_bits(split.attend(query), whole.attend(query))


def test_context_of_a_job_that_attends_nothing():
    array = array_of(2)
    sequence = array.create_sequence(1, capacity_tokens=40, split="context")
    key, value, query = tensors(1, 4, 1, 2)
    sequence.prefill(key, value)
    result = sequence.attend(query, tree=np.zeros((2, 4), bool))
    assert not result.output.any()
    assert not result.denominator.any()
    assert np.isneginf(result.lse).all()


def test_the_merge_does_not_depend_on_the_drive_that_is_first():
    array = array_of(3)
    key, value, query = tensors(2, 100, 2, 1)
    results = []
    for layer in range(3):
        sequence = array.create_sequence(2, capacity_tokens=100, layers=3, split="context")
        sequence.prefill(key, value, layer=layer)
        results.append(sequence.attend(query, layer=layer))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_stripes_go_round_the_drives():
    array = array_of(3)
    key, value, _ = tensors(1, 100, 1, 1)
    sequences = [array.create_sequence(1, capacity_tokens=100, layers=2, split="context") for _ in range(2)]
    held = []
    for sequence in sequences:
        for layer in range(2):
            sequence.prefill(key[:, : 4 * STRIPE + 1], value[:, : 4 * STRIPE + 1], layer=layer)
            held.append([sequence._shares[drive].sequence.length(layer) for drive in range(3)])
    two, most, one = 2 * STRIPE, STRIPE + 1, STRIPE
    assert held == [[two, most, one], [one, two, most], [one, two, most], [most, one, two]]


def test_a_short_sequence_leaves_drives_alone():
    array = array_of(4)
    sequence = array.create_sequence(1, capacity_tokens=STRIPE + 1, split="context")
    assert sorted(sequence._shares) == [0, 1]
    key, value, query = tensors(1, STRIPE + 1, 1, 1)
    sequence.prefill(key, value)
    assert sequence.length() == STRIPE + 1
    assert np.abs(sequence.attend(query).output - reference(query, key, value, True)[0]).max() < 1e-5


def test_context_cannot_choose():
    array = array_of(2)
    with pytest.raises(RequestError, match=r"modes that choose from all tokens, which no drive has .* split='heads'"):
        array.create_sequence(1, capacity_tokens=8, split="context", sparse=True)
    with pytest.raises(RequestError, match="use split='heads'"):
        array.create_sequence(1, capacity_tokens=8, split="context", centroids=8)
    sequence = array.create_sequence(1, capacity_tokens=8, split="context")
    key, value, query = tensors(1, 4, 1, 1)
    sequence.prefill(key, value)
    with pytest.raises(RequestError, match="mode sparf chooses from all tokens, which no drive of a sequence"):
        sequence.attend(query, mode="sparf", features=8, top_units=2)
    with pytest.raises(RequestError, match="mode dense has no top_units"):
        sequence.attend(query, top_units=3)
    with pytest.raises(RequestError, match="the mean of V is kept with"):
        sequence.mean_value()


# Several sequences, and futures.


@pytest.mark.parametrize("split", ["heads", "context"])
def test_many_sequences_at_once(split):
    array = array_of(2)
    plans, expected = [], []
    for number in range(4):
        key, value, query = tensors(2, 20 + 9 * number, 4, 1, number)
        sequence = array.create_sequence(2, capacity_tokens=100, split=split)
        sequence.prefill(key, value)
        plans.append(sequence.plan(query))
        expected.append(sequence.attend(query))
    results = array.attend_many(plans)
    waiting = array.attend_many_async(plans)
    for result, again, one in zip(results, waiting.result(), expected, strict=True):
        assert_same_bits(result, one)
        assert_same_bits(again, one)
    assert waiting.done()
    array.poll()
    with pytest.raises(RequestError, match="a plan belongs to a sequence of another array"):
        array_of(1).attend_many(plans)


def test_futures_of_an_array():
    array = array_of(3)
    key, value, query = tensors(3, 40, 3, 1)
    sequence = array.create_sequence(3, capacity_tokens=100)
    assert sequence.prefill_async(key, value).result() is None
    waiting = sequence.attend_async(query)
    called = []
    waiting.add_done_callback(called.append)
    result = waiting.result()
    assert isinstance(result, AttendResult)
    assert waiting.result() is result
    assert waiting.exception() is None
    assert called == [waiting]
    waiting.add_done_callback(called.append)
    assert called == [waiting, waiting]
    assert len(waiting.futures) == 3

    async def later():
        return await sequence.attend_async(query)

    assert_same_bits(asyncio.run(later()), result)
    empty = ArrayFuture([], lambda parts: parts)
    empty.add_done_callback(called.append)
    assert called[-1] is empty
    assert empty.done()
    assert empty.result() == []


# Errors.


def test_an_array_of_what():
    device = one_device()
    with pytest.raises(RequestError, match="an array needs at least one device"):
        DriveArray([])
    with pytest.raises(RequestError, match="the same device is in the array twice"):
        DriveArray([device, device])
    with pytest.raises(ConfigMismatchError, match="drive 1 has another configuration than drive 0: "):
        DriveArray([device, one_device(SHORT)])
    array = DriveArray([device])
    with pytest.raises(RequestError, match="split must be one of heads, context, not 'tokens'"):
        array.create_sequence(1, capacity_tokens=8, split="tokens")
    for name in ("kv_heads", "capacity_tokens", "layers"):
        with pytest.raises(RequestError, match=f"{name} must be a positive int, not 0"):
            array.create_sequence(**{"kv_heads": 1, "capacity_tokens": 8, "layers": 1, name: 0})


@pytest.mark.parametrize("split", ["heads", "context"])
def test_bad_calls(split):
    array = array_of(2)
    sequence = array.create_sequence(2, capacity_tokens=50, split=split)
    key, value, query = tensors(2, 40, 4, 1)
    with pytest.raises(RequestError, match="layer 0 has no tokens"):
        sequence.attend(query)
    sequence.prefill(key, value)
    with pytest.raises(RequestError, match="layer 0 has 40 tokens already: prefill is for the first, use append"):
        sequence.prefill(key, value)
    with pytest.raises(RequestError, match=rf"key must be .* = \(2, at least 1, {DIM}\), not \(1, 40, {DIM}\)"):
        sequence.append(key[:1], value)
    with pytest.raises(RequestError, match="key and value must have the same shape"):
        sequence.append(key, value[:, :3])
    with pytest.raises(CapacityError, match="room for 50 tokens; layer 0 holds 40, 40 more do not fit"):
        sequence.append(key, value)
    with pytest.raises(RequestError, match="layer must be 0 to 0, not 1"):
        sequence.length(1)
    with pytest.raises(RequestError, match="q_heads must be a multiple of the sequence's 2 KV heads, not 3"):
        sequence.attend(query[:3])
    with pytest.raises(RequestError, match="query must be"):
        sequence.attend(query[0])
    with pytest.raises(RequestError, match="scale must be positive"):
        sequence.attend(query, scale=-1.0)
    with pytest.raises(RequestError, match="window must be a positive int"):
        sequence.attend(query, window=0)


def test_no_room_on_one_drive_takes_none_on_the_others():
    # The second drive is full.
    array = array_of(2)
    free = [device.free_zones - device.media.allocator._wanted() for device in array.devices]
    zone = TINY.zone_pages * STRIPE * TINY.channels // 2
    array.devices[1].create_sequence(1, capacity_tokens=free[1] * zone)
    with pytest.raises(CapacityError, match=r"^drive 1: a sequence of 1 layers, 1 KV heads and .* has no room"):
        array.create_sequence(2, capacity_tokens=2 * zone)
    assert array.devices[0].free_zones - array.devices[0].media.allocator._wanted() == free[0]
    array.create_sequence(1, capacity_tokens=zone)


@pytest.mark.parametrize("split", ["heads", "context"])
def test_a_drive_that_fails_is_named(split):
    array = array_of(3)
    key, value, query = tensors(3, 5 * STRIPE, 3, 1)
    sequence = array.create_sequence(3, capacity_tokens=200, split=split)
    other = array.create_sequence(1, capacity_tokens=10)
    bits = to_bits(key, TINY.element)
    place = (1, 3) if split == "heads" else (0, STRIPE + 3)
    bits[(*place, 2)] = 0x7E00 if TINY.element.name == "FP16" else 0x7FC0
    sequence.prefill(bits, value)
    with pytest.raises(DeviceStatusError, match=r"^drive 1: .*NaN or infinity in K at token 3") as caught:
        sequence.attend(query)
    assert caught.value.completion.where == 3
    assert isinstance(caught.value.__cause__, DeviceStatusError)
    # The others go on.
    other.prefill(key[:1, :5], value[:1, :5])
    assert other.attend(query[:1]).output.shape == (1, 1, DIM)


def lose(device):
    """The device is gone."""
    def gone(*_, **__):
        raise DeviceLostError("the simulator ended")

    transport = device.transport
    for name in ("read_register", "write_register", "read_memory", "write_memory", "wait", "write_dram", "read_dram"):
        setattr(transport, name, gone)


@pytest.mark.parametrize("split", ["heads", "context"])
def test_a_drive_that_is_gone(split):
    array = array_of(3)
    key, value, query = tensors(3, 6 * STRIPE, 3, 1)
    sequence = array.create_sequence(3, capacity_tokens=200, split=split)
    sequence.prefill(key[:, : 3 * STRIPE], value[:, : 3 * STRIPE])
    lose(array.devices[1])
    with pytest.raises(DeviceLostError, match=r"^drive 1: the simulator ended"):
        sequence.attend(query)
    with pytest.raises(DeviceLostError, match=r"^drive 1: the simulator ended"):
        sequence.append(key[:, 3 * STRIPE :], value[:, 3 * STRIPE :])
    # What the drives have does not fit together now.
    for call in (sequence.length, lambda: sequence.attend(query), lambda: sequence.append(key, value)):
        with pytest.raises(RequestError, match=r"tokens of layer 0 that do not fit together \(drive 0: .*, drive 2: "):
            call()
    free = [device.free_zones for device in array.devices[::2]]
    with pytest.raises(KvatticError, match=r"^drive 1: "):
        sequence.free()
    sequence.free()
    assert [device.free_zones for device in array.devices[::2]] >= free
    assert all(not device._sequences for device in array.devices[::2])


def test_tokens_that_are_the_first_ones_count():
    # Of two more stripes the second one is not written: the layer has the first one.
    array = array_of(3)
    key, value, query = tensors(1, 4 * STRIPE, 1, 1)
    sequence = array.create_sequence(1, capacity_tokens=200, split="context")
    sequence.prefill(key[:, : 2 * STRIPE - 3], value[:, : 2 * STRIPE - 3])
    dram = array.devices[2].media.dram
    pages = dram.allocate(dram.largest)
    with pytest.raises(CapacityError, match=r"^drive 2: the device DRAM is full"):
        sequence.append(key[:, 2 * STRIPE - 3 : 2 * STRIPE + 5], value[:, 2 * STRIPE - 3 : 2 * STRIPE + 5])
    assert sequence.length() == 2 * STRIPE
    dram.free(pages)
    sequence.append(key[:, 2 * STRIPE :], value[:, 2 * STRIPE :])
    assert np.abs(sequence.attend(query).output - reference(query, key, value, True)[0]).max() < 1e-5


# Life.


@pytest.mark.parametrize("split", ["heads", "context"])
def test_free(split):
    array = array_of(2)
    key, value, query = tensors(2, 5 * STRIPE, 2, 1)
    zones, pages = ([getattr(d, name) for d in array.devices] for name in ("free_zones", "free_dram_pages"))
    with array.create_sequence(2, capacity_tokens=200, split=split) as sequence:
        sequence.prefill(key, value)
        plan = sequence.plan(query)
        assert [d.free_zones for d in array.devices] != zones
    assert [d.free_zones for d in array.devices] == zones
    assert [d.free_dram_pages for d in array.devices] == pages
    sequence.free()
    for call in (sequence.length, lambda: sequence.append(key, value), lambda: sequence.plan(query),
                 sequence.mean_value, lambda: array.attend_many([plan])):
        with pytest.raises(RequestError, match="the sequence was freed; create another one"):
            call()


def test_closing_an_array_closes_its_devices():
    with array_of(2) as array:
        sequence = array.create_sequence(2, capacity_tokens=20)
    array.close()
    with pytest.raises(RequestError, match="the sequence was freed"):
        sequence.length()
    for device in array.devices:
        with pytest.raises(RequestError, match="the device was closed"):
            device.create_sequence(1, capacity_tokens=1)
    with pytest.raises(RequestError, match="drive 0: the device was closed"):
        array.create_sequence(1, capacity_tokens=1)


def test_open_array():
    with open_array(["model"] * 3, "tiny") as array:
        assert array.drives == 3
        assert array.config == TINY
    with pytest.raises(RequestError, match=r"^drive 1: there is no target 'nonsense'"):
        open_array(["model", "nonsense"], TINY)
    with pytest.raises(RequestError, match="an array needs at least one device"):
        open_array([], TINY)
    with pytest.raises(ConfigError, match="nonsense"):
        open_array(["model"], "nonsense")


# Waiting.


class Deaf:
    """Keeps a device from hearing of new commands, for a while."""

    def __init__(self, device):
        self.transport = device.transport
        self.write, self.wait = self.transport.write_register, self.transport.wait
        self.kept = []
        self.transport.write_register = self.write_register
        self.transport.wait = self.wait_in_vain

    def write_register(self, name, value):
        if name == "SUBMISSION_TAIL_1":
            self.kept.append(value)
        else:
            self.write(name, value)

    def wait_in_vain(self, timeout_s):
        time.sleep(timeout_s)
        raise DeviceTimeoutError(f"no interrupt within {timeout_s:g} s")

    def hear(self):
        self.transport.write_register, self.transport.wait = self.write, self.wait
        for value in self.kept:
            self.write("SUBMISSION_TAIL_1", value)


@pytest.mark.parametrize("split", ["heads", "context"])
def test_all_drives_work_before_any_is_waited_for(split):
    array = DriveArray([Device(GoldenDevice(TINY, shuffle=i)) for i in range(3)])
    key, value, query = tensors(3, 6 * STRIPE, 3, 1)
    sequence = array.create_sequence(3, capacity_tokens=200, split=split)
    writing = sequence.prefill_async(key, value)
    assert all(device.in_flight for device in array.devices)
    attending = sequence.attend_async(query)
    assert not attending.done() or all(not device.in_flight for device in array.devices)
    result = attending.result()
    writing.result()
    assert np.abs(result.output - reference(query, key, value, True)[0]).max() < 1e-5


@pytest.mark.parametrize("deaf", [0, 1])
def test_patience(deaf):
    array = array_of(2)
    key, value, query = tensors(2, 20, 2, 1)
    sequence = array.create_sequence(2, capacity_tokens=20)
    sequence.prefill(key, value)
    expected = sequence.attend(query)
    stand_in = Deaf(array.devices[deaf])
    waiting = sequence.attend_async(query)
    assert not waiting.done()
    for _ in range(2):
        with pytest.raises(DeviceTimeoutError, match=r"the drives were not done within 0.02 s"):
            waiting.result(timeout_s=0.02)
    assert not array.devices[1 - deaf].in_flight
    stand_in.hear()
    assert_same_bits(waiting.result(), expected)


@pytest.mark.parametrize("number", [1, 3])
def test_a_drive_that_does_not_answer_is_named(number):
    array = DriveArray([Device(GoldenDevice(TINY), timeout_s=0.05) for _ in range(3)])
    key, value, query = tensors(3, 20, 3, 1)
    sequence = array.create_sequence(3, capacity_tokens=20)
    sequence.prefill(key, value)
    for device in array.devices[:number]:
        Deaf(device)
    waiting = sequence.attend_async(query)
    with pytest.raises(DeviceTimeoutError, match=r"^drive 0: no interrupt within .* call Device.reset") as caught:
        waiting.result()
    assert waiting.done()
    notes = getattr(caught.value, "__notes__", [])
    assert [note[:8] for note in notes] == [f"drive {drive}:" for drive in range(1, number)]


@pytest.mark.parametrize("split", ["heads", "context"])
def test_forks_share_on_every_drive(split):
    rng = np.random.default_rng(11)
    kv, other = (rng.standard_normal((2, 2, 90, 32)).astype(np.float16) for _ in range(2))
    query = rng.standard_normal((2, 1, 32)).astype(np.float16)
    with open_array(["model"] * 3, "tiny") as array:
        free = [(device.free_zones, device.free_dram_pages) for device in array.devices]
        first = array.create_sequence(2, capacity_tokens=120, layers=2, split=split)
        for layer in range(2):
            first.prefill(*kv[:, :, :70], layer=layer)
        size = first.stripe_tokens
        fork, cut = first.fork(), first.fork(size, capacity_tokens=120)
        assert [fork.length(layer) for layer in range(2)] == [70, 70] and cut.length() == size
        first.append(*other[:, :, :20])
        fork.append(*kv[:, :, 70:])
        cut.append(*kv[:, :, size:])
        with array.create_sequence(2, capacity_tokens=120, split=split) as plain:
            plain.prefill(*kv)
            wanted = plain.attend(query).output
        np.testing.assert_allclose(fork.attend(query).output, wanted, atol=1e-5)
        first.free()
        np.testing.assert_allclose(cut.attend(query).output, wanted, atol=1e-5)
        with pytest.raises(RequestError, match="length must be an int from 0 to 70"):
            fork.fork(91)
        if split == "context":
            with (array.create_sequence(2, capacity_tokens=4, split=split) as short,
                  pytest.raises(RequestError, match="has no share of drives")):
                short.fork(capacity_tokens=200)
        for sequence in (fork, cut):
            sequence.free()
        assert [(device.free_zones, device.free_dram_pages) for device in array.devices] == free
