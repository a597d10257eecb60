"""Forks: sequences that share what is in flash, against plain copies of the tokens."""

from dataclasses import replace

import numpy as np
import pytest

import kvattic
from kvattic.errors import CapacityError, DeviceStatusError, RequestError
from kvattic.golden.device import FlashFaults
from kvattic.spec.commands import Status
from kvattic.spec.config import TINY
from kvattic.spec.formats import Element

DIM, HEADS = 32, 2
KINDS = {
    "dense": ({}, {}),
    "isolated": ({"isolated": True}, {}),
    "sparf": ({"sparse": True}, {"mode": "sparf", "features": 8, "top_units": 4}),
    "centroid": ({"centroids": 16}, {"mode": "centroid", "top_units": 2}),
    "codes": ({"codes": True}, {"mode": "codes", "top_units": 12}),
}


def tokens(count, seed=0, layers=1):
    shape = (layers, 2, HEADS, count, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.fixture
def device():
    with kvattic.open("model", "tiny") as device:
        yield device


def state(device):
    return device.free_zones, device.free_dram_pages


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_by_itself(device, kind):
    options, how = KINDS[kind]
    before, kv = state(device), tokens(200)[0]
    query = tokens(1, 1)[0, 0]
    first = device.create_sequence(HEADS, capacity_tokens=400, **options)
    first.prefill(*kv[:, :, :150])
    fork = first.fork()
    assert fork.length() == 150 and fork.flushed() == first.flushed() > 0 and fork.domain == first.domain
    first.append(*tokens(50, 2)[0])
    fork.append(*kv[:, :, 150:])
    plain = device.create_sequence(HEADS, capacity_tokens=400, **options)
    plain.prefill(*kv[:, :, :150])
    plain.append(*kv[:, :, 150:])
    wanted = plain.attend(query, **how).bits
    np.testing.assert_array_equal(fork.attend(query, **how).bits, wanted)
    assert (first.attend(query, **how).bits != wanted).any()
    if "sparse" in options:
        np.testing.assert_array_equal(fork.mean_value(), plain.mean_value())
    first.free()
    np.testing.assert_array_equal(fork.attend(query, **how).bits, wanted)
    deeper = fork.fork()
    fork.free()
    np.testing.assert_array_equal(deeper.attend(query, **how).bits, wanted)
    deeper.free()
    plain.free()
    assert state(device) == before


def test_shared_stripes_are_written_and_counted_once(device):
    kv = tokens(128)[0]
    with device.create_sequence(HEADS, capacity_tokens=128) as first:
        first.prefill(*kv)
        assert first.flushed() == 128
        programs, written = device.statistics().page_programs, device.media.written_bytes
        with first.fork() as fork:
            assert fork.counters() == {"JOBS": 0, "TOKENS": 0, "PAGE_PROGRAMS": 0}
            assert fork.statistics().written_bytes == fork.statistics().page_programs == 0
            assert device.statistics().page_programs == programs and device.media.written_bytes == written
            fork.free()
        assert first.attend(tokens(1)[0, 0]).output.any()


def test_a_tail_is_copied_and_counted_for_the_fork(device):
    with device.create_sequence(HEADS, capacity_tokens=64) as first:
        first.prefill(*tokens(5)[0])
        with first.fork() as fork:
            assert fork.statistics().written_bytes == 2 * HEADS * device.config.page_bytes
            first.truncate(3)
            assert fork.length() == 5 and first.length() == 3
            fork.truncate(4)


def test_a_length_for_each_layer(device):
    kv = tokens(70, layers=2)
    with device.create_sequence(HEADS, capacity_tokens=100, layers=2) as first:
        for layer in range(2):
            first.prefill(*kv[layer], layer=layer)
        size = first.stripe_tokens
        with first.fork([size, 70]) as fork:
            assert [fork.length(layer) for layer in range(2)] == [size, 70]
        with first.fork(size, capacity_tokens=size) as fork:
            assert fork.capacity_tokens == size
            with pytest.raises(CapacityError, match="room for"):
                fork.append(*tokens(1)[0])
        for bad, message in ((71, "from 0 to 70"), (-1, "from 0 to 70"), (True, "layer 0"), ([1], "each of the 2")):
            with pytest.raises(RequestError, match=message):
                first.fork(bad)
        with pytest.raises(RequestError, match="capacity_tokens must be an int from 70"):
            first.fork(capacity_tokens=69)
    with pytest.raises(RequestError, match="freed"):
        first.fork()


def test_a_length_inside_of_a_stripe_in_flash():
    """The stripe is read and written anew."""
    for element in Element:
        with kvattic.open("model", replace(TINY, element=element)) as device:
            kv = tokens(70)[0]
            first = device.create_sequence(HEADS, capacity_tokens=100)
            first.prefill(*kv)
            assert first.flushed() == 64
            plain = device.create_sequence(HEADS, capacity_tokens=100)
            plain.prefill(*kv[:, :, :40])
            query = tokens(1, 1)[0, 0]
            np.testing.assert_array_equal(first.fork(40).attend(query).bits, plain.attend(query).bits)


def test_a_fork_without_room_leaves_nothing(device):
    small = device.create_sequence(HEADS, capacity_tokens=100)
    small.prefill(*tokens(5)[0])
    before = state(device)
    with pytest.raises(CapacityError, match="no room"):
        small.fork(capacity_tokens=1 << 22)
    held = device.media.dram.allocate(device.free_dram_pages - 1)
    with pytest.raises(CapacityError, match="DRAM is full"):
        small.fork()
    device.media.dram.free(held)
    assert state(device) == before


def test_forks_of_an_isolated_sequence_are_as_isolated(device):
    first = device.create_sequence(HEADS, capacity_tokens=100, isolated=True)
    first.prefill(*tokens(70)[0])
    fork = first.fork()
    first.free()
    assert fork.attend(tokens(1)[0, 0]).output.any()    # the domain is still permitted
    with device.create_sequence(HEADS, capacity_tokens=100, isolated=True) as other:
        assert other.domain != fork.domain
        job = replace(fork.plan(tokens(1)[0, 0]).jobs[0], domain=other.domain)
        assert device.run([job], check=False)[0].completion.status is Status.NOT_OWNED
        job = replace(job, domain=1)
        assert device.run([job], check=False)[0].completion.status is Status.NOT_OWNED
    fork.free()
    with pytest.raises(DeviceStatusError):
        device.run([replace(job, domain=fork.domain)])


def test_a_fork_after_a_loss_of_power(device):
    kv = tokens(70)[0]
    first = device.create_sequence(HEADS, capacity_tokens=100)
    first.prefill(*kv)
    fork = first.fork()
    device.transport.power_up()
    lost = device.recover()
    assert {loss.sequence for loss in lost} == {first, fork}
    flushed = fork.flushed()
    fork.append(*kv[:, :, flushed:])
    first.free()
    with device.create_sequence(HEADS, capacity_tokens=100) as plain:
        plain.prefill(*kv)
        query = tokens(1, 1)[0, 0]
        np.testing.assert_array_equal(fork.attend(query).bits, plain.attend(query).bits)


def test_a_fork_of_what_failed_to_reach_flash(device):
    """A stripe that is in flash for one head only is copied from DRAM, and written again by the fork."""
    faults: FlashFaults = device.transport.faults
    kv = tokens(70)[0]
    first = device.create_sequence(HEADS, capacity_tokens=100)
    faults.dead = {(1, die) for die in range(device.config.dies)}
    with pytest.raises(DeviceStatusError):
        first.prefill(*kv)
    length = first.length()
    faults.dead = set()
    fork = first.fork()
    assert fork.length() == length
    query = tokens(1, 1)[0, 0]
    np.testing.assert_array_equal(fork.attend(query).bits, first.attend(query).bits)
    first.free()
    assert fork.attend(query).output.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_any_tree_of_forks(kind, seed):
    """Random forks, appends, crops and frees against copies of the tokens; at the end nothing is left."""
    config = replace(TINY, part=replace(TINY.part, blocks=64))
    with kvattic.open("model", config) as device, kvattic.open("model", config) as other:
        grow_and_check(device, other, *KINDS[kind], np.random.default_rng(seed))


def grow_and_check(device, other, options, how, rng):
    before = state(device)
    root = device.create_sequence(HEADS, capacity_tokens=300, layers=2, **options)
    root.held_tokens = int(rng.integers(0, 40))
    live = [(root, [tokens(0)[0]] * 2)]
    query = tokens(1, 7)[0, 0]
    for step in range(60):
        index = int(rng.integers(len(live)))
        sequence, held = live[index]
        what = rng.choice(["append", "append", "fork", "cut", "crop", "free"])
        if what == "append":
            count = int(rng.integers(1, 40))
            if held[0].shape[2] + count <= sequence.capacity_tokens:
                for layer in range(2):
                    new = tokens(count, 100 * step + layer)[0]
                    append = sequence.append_async if rng.random() < 0.5 else sequence.append
                    append(*new, layer=layer)
                    held[layer] = np.concatenate([held[layer], new], axis=2)
        elif what == "fork" and len(live) < 6:
            live.append((sequence.fork(), list(held)))
        elif what == "cut" and len(live) < 6:
            length = int(rng.integers(0, held[0].shape[2] + 1))
            live.append((sequence.fork(length, capacity_tokens=300), [kv[:, :, :length] for kv in held]))
        elif what == "crop":
            for layer in range(2):
                low = max(sequence.flushed(layer), held[layer].shape[2] - 3)
                sequence.truncate(low, layer=layer)
                held[layer] = held[layer][:, :, :low]
        elif what == "free" and len(live) > 1:
            live.pop(index)[0].free()
        for one, kv in live:
            assert one.length() == kv[0].shape[2]
        sequence, held = live[int(rng.integers(len(live)))]
        layer = int(rng.integers(2))
        if (count := held[layer].shape[2]) > 3 * sequence.stripe_tokens:
            with other.create_sequence(HEADS, capacity_tokens=300, **options) as plain:
                plain.held_tokens = sequence.held_tokens
                plain.prefill(*held[layer])
                plan = dict(how)
                np.testing.assert_array_equal(sequence.attend(query, layer=layer).bits, plain.attend(query).bits)
                if plain.flushed() == sequence.flushed(layer) and count:
                    np.testing.assert_array_equal(
                        sequence.attend(query, layer=layer, **plan).bits, plain.attend(query, **plan).bits)
    for sequence, _ in live:
        sequence.free()
    assert state(device) == before
