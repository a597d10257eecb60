"""`Sequence.read`: K and V come back as they were written, from flash and from device DRAM."""

from dataclasses import replace

import numpy as np
import pytest

import kvattic
from kvattic.errors import DeviceStatusError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY
from kvattic.spec.formats import Element

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
                # Bits, but for the sign of zero.
                assert (np.where(expected == 0, 0, expected).view(np.uint16) == found.view(np.uint16)).all(), name
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


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["nan", "infinity"])
@pytest.mark.parametrize(("which", "status"), [(0, "NAN_KEY"), (1, "NAN_VALUE")], ids=["key", "value"])
def test_what_is_no_number_is_an_error(device, which, status, bits):
    data = np.zeros((2, HEADS, TOKENS, TINY.head_dim), np.uint16)
    data[which, 1, 40, 3] = bits
    with device.create_sequence(HEADS, capacity_tokens=TOKENS) as sequence:
        sequence.prefill(*data)
        with pytest.raises(DeviceStatusError, match=rf"KV head 1.*{status}.*token 40"):
            sequence.read(0, 39, 41)
        sequence.read(0, 48)    # the next stripe


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


def test_bf16_is_refused():
    config = replace(TINY, element=Element.BF16)
    with kvattic.Device(GoldenDevice(config)) as device, device.create_sequence(1, capacity_tokens=8) as sequence:
        sequence.prefill(*np.ones((2, 1, 8, config.head_dim), np.float32))
        with pytest.raises(RequestError, match="K and V of bf16 cannot be read back exactly"):
            sequence.read()
