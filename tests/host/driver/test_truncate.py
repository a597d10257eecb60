"""Tokens that are held in device DRAM, and removed from there."""

import numpy as np
import pytest

import kvattic
from kvattic.errors import RequestError

DIM, HEADS = 32, 2
MODES = {
    "dense": ({}, {}),
    "sparf": ({"sparse": True}, {"mode": "sparf", "features": 8, "top_units": 12}),
    "centroid": ({"centroids": 16}, {"mode": "centroid", "top_units": 2}),
    "codes": ({"codes": True}, {"mode": "codes", "top_units": 12}),
}


def tokens(count, seed=0):
    return np.random.default_rng(seed).standard_normal((2, HEADS, count, DIM)).astype(np.float32)


@pytest.fixture
def device():
    with kvattic.open("model", "tiny") as device:
        yield device


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_left_is_as_if_nothing_else_had_been_there(device, mode, asynchronous):
    options, how = MODES[mode]
    rng = np.random.default_rng(1)
    right, wrong = tokens(300), tokens(300, seed=2)
    with (device.create_sequence(HEADS, capacity_tokens=300, **options) as sequence,
          device.create_sequence(HEADS, capacity_tokens=300, **options) as plain):
        sequence.held_tokens = 40
        append = sequence.append_async if asynchronous else sequence.append
        length = peak = 0
        while length < 250:
            good, bad = (int(n) for n in rng.integers(1, 20, 2))
            append(*np.concatenate([right[:, :, length : length + good], wrong[:, :, :bad]], axis=2))
            peak = max(peak, length + good + bad)
            length += good
            sequence.truncate(length)
            assert sequence.length() == length
            assert sequence.flushed() <= max(peak - 40, 0)
        assert sequence.flushed() > 0
        plain.prefill(*right[:, :, :length])
        query = tokens(1, seed=3)[0]
        # In the sparse modes what is in DRAM is attended in any case: the same stripes must be in flash.
        sequence.held_tokens = 0
        for each in (sequence, plain):
            each.append(*right[:, :, length : length + 1])
        assert sequence.flushed() == plain.flushed()
        np.testing.assert_array_equal(sequence.attend(query, **how).bits, plain.attend(query, **how).bits)
        assert sequence.flushed() // sequence.stripe_tokens == (length + 1) // sequence.stripe_tokens


def test_dram_comes_back(device):
    free = device.free_dram_pages
    with device.create_sequence(HEADS, capacity_tokens=300) as sequence:
        sequence.held_tokens = 300
        sequence.prefill(*tokens(200))
        assert sequence.flushed() == 0
        before = device.free_dram_pages
        sequence.truncate(3)
        assert device.free_dram_pages > before
        sequence.truncate(0)
        assert device.free_dram_pages == free
        sequence.append(*tokens(5))
        assert sequence.length() == 5


@pytest.mark.parametrize("length", [-1, 31, 101, 2.0, True])
def test_what_cannot_be_removed(device, length):
    with device.create_sequence(HEADS, capacity_tokens=300, layers=2) as sequence:
        sequence.held_tokens = 60
        sequence.prefill(*tokens(100), layer=1)
        assert sequence.flushed(1) == 32
        with pytest.raises(RequestError, match=r"length must be an int from 32 to 100, .* layer 1 has 100 tokens, the "
                                               r"first 32 of which are in flash"):
            sequence.truncate(length, layer=1)
        sequence.truncate(32, layer=1)
        assert sequence.length(1) == 32
        sequence.truncate(32, layer=1)


def test_all_tokens_in_flash_may_stay(device):
    with device.create_sequence(HEADS, capacity_tokens=300) as sequence:
        sequence.prefill(*tokens(64))
        sequence.truncate(64)
        with pytest.raises(RequestError, match="from 64 to 64"):
            sequence.truncate(63)


def test_a_stripe_that_is_partly_in_flash_stays(device):
    with device.create_sequence(HEADS, capacity_tokens=300) as sequence:
        sequence.prefill(*tokens(15))
        device.transport.faults.dead.update((0, die) for die in range(device.config.dies))
        with pytest.raises(kvattic.KvatticError):
            sequence.append(*tokens(5))
        with pytest.raises(RequestError, match="from 16 to "):
            sequence.truncate(3)


def test_a_layer_that_is_not_there(device):
    with (device.create_sequence(HEADS, capacity_tokens=300) as sequence,
          pytest.raises(RequestError, match="layer must be")):
        sequence.truncate(0, layer=1)
