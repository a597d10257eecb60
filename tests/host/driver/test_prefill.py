"""Layers that are written while the next one is computed, over the golden device."""

import numpy as np
import pytest

from kvattic.array import DriveArray
from kvattic.driver.device import Device
from kvattic.driver.prefill import write_layers
from kvattic.errors import CapacityError, DeviceLostError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY

STRIPE = TINY.tokens_per_page
TOKENS = 3 * STRIPE + 5


def tensors(layer, tokens=TOKENS, kv_heads=2):
    return np.random.default_rng(layer).standard_normal((2, kv_heads, tokens, TINY.head_dim)).astype(np.float32)


class Watched:
    """A sequence whose writes are noted, and how many of them were not done when the next one began."""

    def __init__(self, sequence, events):
        self.sequence = sequence
        self.events = events
        self.futures = []
        self.most = 0

    def append_async(self, key, value, *, layer=0):
        self.events.append(f"begin {layer}")
        future = self.sequence.append_async(key, value, layer=layer)
        self.futures.append(future)
        self.most = max(self.most, sum(not one.finished for one in self.futures))
        future.add_done_callback(lambda _: self.events.append(f"end {layer}"))
        return future


def computed(layers, events, look=lambda: None):
    """Layers as a model gives them."""
    for layer in layers:
        look()
        events.append(f"compute {layer}")
        yield layer, *tensors(layer)


def device_of(**options):
    return Device(GoldenDevice(TINY, shuffle=1, **options))


def test_a_layer_is_written_while_the_next_one_is_computed():
    device, events, under_way = device_of(), [], []
    programs = []
    write = device.transport.write_register

    def note(name, value):
        if name == "SUBMISSION_TAIL_2":
            programs.append(events[-1])
        write(name, value)

    device.transport.write_register = note
    sequence = device.create_sequence(2, capacity_tokens=TOKENS, layers=4)
    watched = Watched(sequence, events)
    assert write_layers(watched, computed(range(4), events, lambda: under_way.append(device.in_flight))) == 4
    # Each layer's pages are on their way before the next one is asked for, and nobody has waited for them.
    assert [event for event in programs if event.startswith("begin")] == [f"begin {layer}" for layer in range(4)]
    assert under_way[0] == 0
    assert all(under_way[1:])
    assert events.index("begin 0") < events.index("compute 1") < events.index("end 0")
    assert events.index("begin 1") < events.index("compute 2") < events.index("end 1")
    assert watched.most == 2
    assert device.in_flight == 0
    other = device.create_sequence(2, capacity_tokens=TOKENS)
    query = np.ones((2, 1, TINY.head_dim))
    for layer in range(4):
        assert sequence.length(layer) == TOKENS
        assert sequence.flushed(layer) == 3 * STRIPE
        if layer == 2:
            other.prefill(*tensors(layer))
            np.testing.assert_array_equal(sequence.attend(query, layer=layer).bits, other.attend(query).bits)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_so_many_layers_are_written_at_once(in_flight):
    device, events = device_of(), []
    watched = Watched(device.create_sequence(2, capacity_tokens=TOKENS, layers=6), events)
    write_layers(watched, computed(range(5, -1, -1), events), in_flight=in_flight)
    assert 1 <= watched.most <= in_flight
    assert all(future.finished for future in watched.futures)


def test_layers_of_an_array():
    array = DriveArray([device_of() for _ in range(2)])
    for split in ("heads", "context"):
        sequence = array.create_sequence(2, capacity_tokens=TOKENS, layers=3, split=split)
        seen = []
        layers = computed(range(3), [], lambda seen=seen: seen.append([device.in_flight for device in array.devices]))
        write_layers(sequence, layers)
        assert all(all(each) for each in seen[1:])
        assert [sequence.length(layer) for layer in range(3)] == [TOKENS] * 3


def test_more_tokens_than_dram_has_room_for():
    pages = 2 * 2 * 2       # of two stripes
    device = device_of(dram_bytes=pages * TINY.page_bytes)
    sequence = device.create_sequence(2, capacity_tokens=6 * STRIPE, layers=2)
    write_layers(sequence, ((layer, *tensors(layer, 6 * STRIPE)) for layer in range(2)))
    assert [sequence.flushed(layer) for layer in range(2)] == [6 * STRIPE] * 2


def test_what_the_model_raises():
    device, closed = device_of(), []
    sequence = device.create_sequence(2, capacity_tokens=TOKENS, layers=3)

    def layers():
        try:
            yield 0, *tensors(0)
            yield 1, *tensors(1)
            raise ZeroDivisionError
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError):
        write_layers(sequence, layers())
    assert closed
    assert device.in_flight == 0
    assert [sequence.length(layer) for layer in range(3)] == [TOKENS, TOKENS, 0]


def test_what_is_refused():
    device, events = device_of(), []
    sequence = device.create_sequence(2, capacity_tokens=TOKENS - 1, layers=3)
    with pytest.raises(CapacityError, match=f"room for {TOKENS - 1} tokens") as caught:
        write_layers(sequence, computed(range(3), events))
    assert caught.value.__notes__ == ["layer 0"]
    assert events == ["compute 0"]
    with pytest.raises(RequestError, match="layer must be 0 to 2, not 3"):
        write_layers(sequence, [(3, *tensors(3))])
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(RequestError, match=f"in_flight must be a positive int, not {wrong!r}"):
            write_layers(sequence, [], in_flight=wrong)
    assert write_layers(sequence, []) == 0


def test_a_device_that_is_gone():
    device, events = device_of(), []
    sequence = device.create_sequence(2, capacity_tokens=TOKENS, layers=5)

    def gone(*_):
        raise DeviceLostError("the simulator ended")

    def look():
        if "begin 1" in events:
            for name in ("read_memory", "write_memory", "wait", "read_register", "write_register", "write_dram"):
                setattr(device.transport, name, gone)

    watched = Watched(sequence, events)
    with pytest.raises(DeviceLostError, match="the simulator ended") as caught:
        write_layers(watched, computed(range(5), events, look))
    assert caught.value.__notes__[0].startswith("layer ")
    assert "compute 4" not in events
    assert all(future.finished for future in watched.futures)
