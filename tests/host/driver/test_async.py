"""Futures of sequences: appends that overlap with attention, under asyncio and threads; errors, freeing, isolation."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.host.driver.slow_device import SlowDevice

import kvattic
from kvattic import Status
from kvattic.driver.device import Device, FlashOperation
from kvattic.errors import CapacityError, DeviceStatusError, DeviceTimeoutError, RequestError
from kvattic.golden.device import FlashFaults, GoldenDevice
from kvattic.spec import layout
from kvattic.spec.commands import Opcode
from kvattic.spec.config import TINY
from kvattic.spec.layout import Block

PAGE = TINY.tokens_per_page
SPARSE = TINY.group_tokens
SKETCHES = ({}, {"sparse": True}, {"centroids": 8}, {"sparse": True, "centroids": 8, "codes": True}, {"codes": True})


def tokens_of(kv_heads, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, kv_heads, tokens, 32)).astype(np.float16)


def query_of(q_heads, n=1, seed=99):
    return np.random.default_rng(seed).standard_normal((q_heads, n, 32)).astype(np.float16)


def dense_bits(key, value, query, config=TINY):
    with Device(GoldenDevice(config)) as device:
        sequence = device.create_sequence(key.shape[0], capacity_tokens=key.shape[1])
        sequence.prefill(key, value)
        return sequence.attend(query).bits


def idle(device):
    dispatcher = device.dispatcher
    assert not dispatcher.working
    assert not dispatcher.retiring
    assert not device.media.flushing
    return dispatcher._arena.free_pages == dispatcher._arena.pages


# Appends in the background.


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(["append", "append", "append_async", "append_async", "attend", "poll"]),
                          st.integers(0, 1), st.integers(1, 90)), min_size=1, max_size=14),
       st.sampled_from(SKETCHES), st.one_of(st.none(), st.integers(0, 99)), st.sampled_from([2, 8, 256]),
       st.sampled_from(["tight", "roomy", "isolated"]))
def test_any_mixture_gives_the_bits_of_the_synchronous_calls(steps, sketches, seed, entries, kind):
    """Appends and attends of two layers, in little DRAM, on a device that completes in any order."""
    config = replace(TINY, channels=3, part=TINY.part.resized(1024, blocks=24))
    dram_pages = (120 if sketches else 12) if kind == "tight" else 1024
    transport = SlowDevice(config, shuffle=seed, dram_bytes=dram_pages * 1024)
    key, value = tokens_of(2, 1300)
    query = query_of(2)
    with Device(transport, entries=entries) as device:
        sequence = device.create_sequence(2, layers=2, capacity_tokens=1300, isolated=kind == "isolated", **sketches)
        lengths, found, writes = [0, 0], [], []
        for what, layer, count in steps:
            at = lengths[layer]
            if what == "attend" and at:
                found.append((sequence.attend_async(query, layer=layer), at))
            elif what == "poll":
                device.poll()
            elif what.startswith("append"):
                tokens = key[:, at : at + count], value[:, at : at + count]
                done = getattr(sequence, what)(*tokens, layer=layer)
                writes += [] if done is None else [done]
                lengths[layer] += count
        device.wait(writes)
        assert [future.exception() for future in writes] == [None] * len(writes)
        for future, length in found:
            assert np.array_equal(future.result().bits, dense_bits(key[:, :length], value[:, :length], query, config))
        for layer, length in enumerate(lengths):
            assert sequence.length(layer) == length
            assert sequence.flushed(layer) == length // sequence.stripe_tokens * sequence.stripe_tokens
            if length:
                assert np.array_equal(sequence.attend(query, layer=layer).bits,
                                      dense_bits(key[:, :length], value[:, :length], query, config))
        tails = sum(length % sequence.stripe_tokens > 0 for length in lengths)
        if kind != "isolated":
            assert device.free_dram_pages == dram_pages - tails * 4 * sequence._shape.pages
        assert device.write_amplification == 1 or not any(length >= sequence.stripe_tokens for length in lengths)
        sequence.free()
        assert device.free_dram_pages == dram_pages
        assert device.free_zones == device.media.allocator.zones
        assert idle(device)


def test_an_append_returns_at_once():
    """The tokens are in DRAM and can be attended; the full stripe is on its way."""
    key, value = tokens_of(1, 40)
    transport = SlowDevice()
    with Device(transport) as device:
        sequence = device.create_sequence(1, capacity_tokens=100)
        transport.forget()
        future = sequence.append_async(key, value)
        assert transport.waits == 0
        assert (sequence.length(), sequence.flushed()) == (40, 0)
        assert device.in_flight == 4
        assert np.array_equal(sequence.attend(query_of(1)).bits, dense_bits(key, value, query_of(1)))
        assert future.result() is None
        assert sequence.flushed() == 32
        assert device.free_dram_pages == device.media.dram.pages - 2
        with pytest.raises(RequestError, match="has 40 tokens already"):
            sequence.prefill_async(key, value)


def test_decoding_does_not_wait_for_flash():
    """Token after token, while stripes before them are still on their way."""
    key, value = tokens_of(1, 5 * PAGE)
    transport = SlowDevice()
    with Device(transport) as device:
        sequence = device.create_sequence(1, capacity_tokens=5 * PAGE)
        transport.forget()
        futures = [sequence.append_async(key[:, t : t + 1], value[:, t : t + 1]) for t in range(5 * PAGE - 1)]
        assert transport.waits == 0
        assert sequence.length() == 5 * PAGE - 1
        result = sequence.attend_async(query_of(1))
        futures.append(sequence.append_async(key[:, -1:], value[:, -1:]))
        kvattic.wait(futures)
        assert sequence.flushed() == 5 * PAGE
        assert np.array_equal(result.result().bits, dense_bits(key[:, :-1], value[:, :-1], query_of(1)))
        assert device.free_dram_pages == device.media.dram.pages


def test_the_caller_may_use_its_arrays_again():
    key, value = tokens_of(2, 60)
    arrays = [array.view(np.uint16).copy() for array in (key, value, query_of(2, 8))]
    with Device(SlowDevice(dram_bytes=12 * 1024), entries=2) as device:
        sequence = device.create_sequence(2, capacity_tokens=60)
        write = sequence.append_async(*arrays[:2])
        result = sequence.attend_async(arrays[2])
        for array in arrays:
            array[:] = 0x7C00
        assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(2, 8)))
        write.result()
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))


def test_layers_are_written_while_others_are_computed():
    """Layer-wise prefill: the PROGRAMs of several layers are under way at once."""
    tokens = [tokens_of(2, 100, seed) for seed in range(4)]
    transport = SlowDevice()
    with Device(transport) as device:
        sequence = device.create_sequence(2, layers=4, capacity_tokens=100)
        transport.forget()
        futures = [sequence.prefill_async(*tokens[layer], layer=layer) for layer in range(4)]
        assert transport.waits == 0
        assert device.in_flight == 4 * 2 * 2 * 6
        results = [sequence.attend_async(query_of(2), layer=layer) for layer in range(4)]
        for layer, result in enumerate(results):
            assert np.array_equal(result.result().bits, dense_bits(*tokens[layer], query_of(2)))
        kvattic.wait(futures)
        assert [sequence.flushed(layer) for layer in range(4)] == [96] * 4


@pytest.mark.parametrize("sketches", SKETCHES)
def test_a_prefill_larger_than_dram(sketches):
    """What finds no room is written when stripes before it are in flash; whoever needs it waits for that."""
    key, value = tokens_of(2, 1000)
    transport = SlowDevice(dram_bytes=70 * 1024)
    with Device(transport) as device:
        sequence = device.create_sequence(2, capacity_tokens=1100, **sketches)
        future = sequence.prefill_async(key, value)
        assert not future.done()
        assert sequence._writer.layers[0].length < 1000
        more = sequence.append_async(key[:, :90], value[:, :90])
        with pytest.raises(CapacityError, match="holds 1090, 11 more do not fit"):
            sequence.append_async(key[:, :11], value[:, :11])
        result = sequence.attend(query_of(2))
        assert sequence.length() == 1090
        whole = [np.concatenate([array, array[:, :90]], axis=1) for array in (key, value)]
        assert np.array_equal(result.bits, dense_bits(*whole, query_of(2)))
        kvattic.wait([future, more])
        assert sequence.flushed() == 1090 // sequence.stripe_tokens * sequence.stripe_tokens
        assert idle(device)


def test_several_sequences_share_little_dram():
    """Each waits for the others' stripes to reach flash."""
    tokens = [tokens_of(1, 130, seed) for seed in range(4)]
    transport = SlowDevice(dram_bytes=6 * 1024)
    with Device(transport) as device:
        sequences = [device.create_sequence(1, capacity_tokens=130) for _ in tokens]
        futures = [sequence.append_async(*(array[:, :128] for array in each))
                   for sequence, each in zip(sequences, tokens, strict=True)]
        device.wait(futures)
        assert [future.exception() for future in futures] == [None] * 4
        assert [sequence.flushed() for sequence in sequences] == [128] * 4
        assert device.free_dram_pages == 6
        # But not for tails.
        for sequence, each in zip(sequences[:3], tokens, strict=False):
            sequence.append(*(array[:, 128:] for array in each))
        future = sequences[3].append_async(*(array[:, 128:] for array in tokens[3]))
        assert isinstance(future.exception(), CapacityError)
        assert sequences[3].length() == 128


def test_dram_comes_back_when_nobody_reads_it_any_more():
    """An attend that sees a stripe in DRAM is under way while the stripe reaches flash."""
    key, value = tokens_of(1, PAGE)
    transport = SlowDevice()
    with Device(transport) as device:
        sequence = device.create_sequence(1, capacity_tokens=PAGE)
        sequence.append(key[:, :-1], value[:, :-1])
        pages = device.free_dram_pages
        queues = transport._queues
        result = sequence.attend_async(query_of(1))
        write = sequence.append_async(key[:, -1:], value[:, -1:])
        # The device serves the flash commands first.
        queues._turn = 2
        transport.write_register("INTERRUPT_AFTER", 1)
        serve = transport._queues.next

        def flash_first():
            queues._turn = 2
            return serve()

        queues.next = flash_first
        write.result()
        assert sequence.flushed() == PAGE
        assert not result.finished
        assert device.free_dram_pages == pages
        assert np.array_equal(result.result().bits, dense_bits(key[:, :-1], value[:, :-1], query_of(1)))
        device.poll()
        assert device.free_dram_pages == pages + 2


# Errors.


def test_an_error_reaches_the_future():
    transport = SlowDevice(faults=FlashFaults(dead={(0, 1)}))
    with Device(transport) as device:
        sequence = device.create_sequence(2, capacity_tokens=100)
        key, value = tokens_of(2, 60)
        future = sequence.prefill_async(key[:, :50], value[:, :50])
        assert isinstance(future.exception(), DeviceStatusError)
        with pytest.raises(DeviceStatusError, match=r"PROGRAM failed: DIE_TIMEOUT: .* channel 0, die 1"):
            future.result()
        # All tokens are there, and the next append moves them.
        assert (sequence.length(), sequence.flushed()) == (50, 0)
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key[:, :50], value[:, :50], query_of(2)))
        assert sequence.append_async(key[:, 50:], value[:, 50:]).result() is None
        assert sequence.flushed() == 48
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))


def test_an_error_that_nobody_asked_for_reaches_the_next_call():
    for use in (lambda s: s.append(*tokens_of(2, 1)), lambda s: s.attend(query_of(2)), lambda s: s.length(),
                lambda s: s.append_async(*tokens_of(2, 1)), lambda s: s.attend_async(query_of(2)),
                lambda s: s.flushed()):
        with Device(SlowDevice(faults=FlashFaults(dead={(0, 1)}))) as device:
            sequence = device.create_sequence(2, capacity_tokens=100)
            future = sequence.prefill_async(*tokens_of(2, 50))
            while not future.done():
                device.wait([device.dispatcher.barrier()])
            with pytest.raises(DeviceStatusError, match="PROGRAM failed: DIE_TIMEOUT"):
                use(sequence)
            sequence.append(*tokens_of(2, 1))
            assert sequence.flushed() == 48
            assert isinstance(future.exception(), DeviceStatusError)


def test_appends_behind_one_that_failed_go_on():
    transport = SlowDevice(faults=FlashFaults(dead={(0, 1)}))
    with Device(transport) as device:
        sequence = device.create_sequence(2, capacity_tokens=200)
        key, value = tokens_of(2, 160)
        futures = [sequence.append_async(key[:, at : at + 40], value[:, at : at + 40]) for at in range(0, 160, 40)]
        assert transport.waits < 20
        kvattic.wait(futures)
        assert isinstance(futures[0].exception(), DeviceStatusError)
        assert [future.exception() for future in futures[1:]] == [None] * 3
        assert (sequence.length(), sequence.flushed()) == (160, 160)
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))


def test_pages_that_fail_are_placed_elsewhere_in_the_background():
    faults = FlashFaults(program_fails={(Block(0, 0, 0, 0), 0), (Block(1, 1, 1, 0), 2)})
    with Device(SlowDevice(faults=faults, shuffle=5)) as device:
        sequence = device.create_sequence(2, capacity_tokens=8 * PAGE)
        key, value = tokens_of(2, 8 * PAGE)
        future = sequence.prefill_async(key, value)
        result = sequence.attend_async(query_of(2))
        future.result()
        assert sequence.flushed() == 8 * PAGE
        assert device.write_amplification == 34 / 32
        assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(2)))
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))


def test_arguments_are_checked_at_once():
    with Device(SlowDevice()) as device:
        sequence = device.create_sequence(2, capacity_tokens=20)
        with pytest.raises(RequestError, match="key must be"):
            sequence.append_async(*tokens_of(3, 4))
        with pytest.raises(CapacityError, match="room for 20 tokens"):
            sequence.prefill_async(*tokens_of(2, 21))
        with pytest.raises(RequestError, match="no tokens"):
            sequence.attend_async(query_of(2))
        with pytest.raises(RequestError, match="layer must be 0 to 0"):
            sequence.append_async(*tokens_of(2, 1), layer=1)
        assert sequence.length() == 0


def test_an_attend_that_fails():
    with Device(SlowDevice()) as device:
        sequence = device.create_sequence(1, capacity_tokens=20)
        key = np.zeros((1, 10, 32), np.uint16)
        key[0, 7, 3] = 0x7C00
        sequence.append_async(key, key * 0)
        future = sequence.attend_async(query_of(1))
        with pytest.raises(DeviceStatusError, match=r"job 0 of 1 \(sequence 0, .* failed: NAN_KEY: .* at token 7"):
            future.result()


@pytest.mark.parametrize("after", [0, 3, 9, 20])
def test_a_power_cut_with_work_in_the_background(after):
    faults = FlashFaults(power_cut=after)
    key, value = tokens_of(2, 300)
    transport = SlowDevice(faults=faults)
    with Device(transport) as device:
        sequence = device.create_sequence(2, capacity_tokens=600, layers=2)
        futures = [sequence.append_async(key[:, at : at + 100], value[:, at : at + 100], layer=layer)
                   for at in (0, 100) for layer in (0, 1)]
        futures.append(sequence.attend_async(query_of(2)))
        with pytest.raises(DeviceTimeoutError, match="its power is off"):
            futures[2].result()
        assert any(isinstance(future.exception(), DeviceTimeoutError) for future in futures)
        assert all(future.done() for future in futures)
        transport.power_up()
        losses = device.recover()
        for layer in (0, 1):
            kept = sequence.length(layer)
            assert kept == sequence.flushed(layer) == kept // PAGE * PAGE
            assert kept + sum(loss.tokens for loss in losses if loss.layer == layer) == 200
            sequence.append(key[:, kept:], value[:, kept:], layer=layer)
            assert np.array_equal(sequence.attend(query_of(2), layer=layer).bits,
                                  dense_bits(key, value, query_of(2)))
        assert idle(device)


# Freeing and closing meanwhile.


def test_freeing_waits_for_what_is_under_way():
    transport = SlowDevice(dram_bytes=40 * 1024)
    with Device(transport) as device:
        other = device.create_sequence(1, capacity_tokens=50)
        other.append(*tokens_of(1, 50))
        sequence = device.create_sequence(2, capacity_tokens=900)
        key, value = tokens_of(2, 600)
        writes = [sequence.append_async(key[:, at : at + 200], value[:, at : at + 200]) for at in (0, 200, 400)]
        assert sequence._writer.layers[0].length < 600
        running = other.attend_async(query_of(1))
        sequence.free()
        assert all(future.done() for future in writes)
        with pytest.raises(RequestError, match="the sequence was freed before these tokens were written"):
            writes[2].result()
        assert running.done()
        assert np.array_equal(running.result().bits, dense_bits(*tokens_of(1, 50), query_of(1)))
        assert device.free_dram_pages == 40 - 2
        assert device.free_zones == device.media.allocator.zones - 1
        assert {block.block for block, _, _ in transport.written()} == {0}
        with pytest.raises(RequestError, match="the sequence was freed"):
            sequence.append_async(key, value)
        assert idle(device)


def test_an_attend_of_a_freed_sequence_comes_first():
    with Device(SlowDevice(), entries=2) as device:
        sequence = device.create_sequence(4, capacity_tokens=50)
        key, value = tokens_of(4, 50)
        sequence.append_async(key, value)
        result = sequence.attend_async(query_of(4))
        sequence.free()
        assert result.done()
        assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(4)))


def test_closing_waits_too():
    device = Device(SlowDevice())
    sequence = device.create_sequence(2, capacity_tokens=100)
    key, value = tokens_of(2, 100)
    write, result = sequence.append_async(key, value), sequence.attend_async(query_of(2))
    device.close()
    assert write.done()
    assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(2)))
    with pytest.raises(RequestError, match="the device was closed"):
        sequence.attend_async(query_of(2))
    with pytest.raises(RequestError, match="the device was closed"):
        device.poll()


def test_dirty_zones_are_erased_in_the_middle_of_an_append():
    """Without erase_on_free a zone is erased when it is taken; others' work goes on before and after, not between."""
    key, value = tokens_of(2, 220)
    with Device(SlowDevice(shuffle=2), erase_on_free=False) as device:
        for _ in range(6):
            sequences = [device.create_sequence(2, capacity_tokens=220) for _ in range(3)]
            futures = [s.append_async(key[:, at : at + 55], value[:, at : at + 55])
                       for at in range(0, 220, 55) for s in sequences]
            results = [s.attend_async(query_of(2)) for s in sequences]
            kvattic.wait([*futures, *results])
            for s, result in zip(sequences, results, strict=True):
                assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(2)))
                s.free()
        assert device.write_amplification == 1
        assert device.wear.maximum > 0


# asyncio and threads.


def test_asyncio():
    key, value = tokens_of(2, 200)
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def client(device, number):
        sequence = device.create_sequence(2, capacity_tokens=200)
        found = []
        for at in range(0, 200, 50):
            write = sequence.append_async(key[:, at : at + 50], value[:, at : at + 50])
            found.append((await sequence.attend_async(query_of(2, seed=number))).bits)
            await write
        return found

    async def main():
        ticking = asyncio.create_task(tick())
        with Device(SlowDevice(shuffle=4)) as device:
            found = await asyncio.gather(*(client(device, number) for number in range(3)))
            bad = device.create_sequence(1, capacity_tokens=5)
            bad.append(np.full((1, 1, 32), 0x7C00, np.uint16), np.zeros((1, 1, 32), np.uint16))
            with pytest.raises(DeviceStatusError, match="NAN_KEY"):
                await bad.attend_async(query_of(1))
        ticking.cancel()
        return found

    found = asyncio.run(main())
    assert len(ticks) > 10
    for number, results in enumerate(found):
        for i, bits in enumerate(results):
            assert np.array_equal(bits, dense_bits(key[:, : 50 * i + 50], value[:, : 50 * i + 50],
                                                   query_of(2, seed=number)))


def test_asyncio_is_not_held_up_by_a_device_that_takes_its_time():
    class Late(SlowDevice):
        """Raises its interrupt line only when others have had their turn."""

        until = threading.Event()

        def wait(self, timeout_s):
            if not self.asleep or self.until.wait(timeout_s):
                super().wait(timeout_s)
            else:
                raise DeviceTimeoutError("not yet")

    async def main():
        transport = Late()
        with Device(transport) as device:
            sequence = device.create_sequence(1, capacity_tokens=50)
            sequence.append(*tokens_of(1, 50))
            transport.asleep = True
            result = asyncio.create_task(awaited(sequence.attend_async(query_of(1))))
            for _ in range(5):
                await asyncio.sleep(0.01)
                sequence.attend_async(query_of(1))      # takes the lock
            assert not result.done()
            transport.asleep = False
            transport.until.set()
            return (await result).bits

    async def awaited(future):
        return await future

    assert np.array_equal(asyncio.run(main()), dense_bits(*tokens_of(1, 50), query_of(1)))


def test_asyncio_and_a_dead_device():
    async def main():
        transport = SlowDevice()
        device = Device(transport)
        sequence = device.create_sequence(1, capacity_tokens=50)
        future = sequence.append_async(*tokens_of(1, 50))
        transport.asleep = True
        with pytest.raises(DeviceTimeoutError, match=r"call Device.reset"):
            await future

    asyncio.run(main())


def test_a_callback_may_begin_something():
    key, value = tokens_of(1, 60)
    with Device(SlowDevice()) as device:
        sequence = device.create_sequence(1, capacity_tokens=60)
        found = []

        def more(future):
            future.result()
            found.append(sequence.attend(query_of(1)).bits)
            found.append(sequence.attend_async(query_of(1)))

        write = sequence.append_async(key, value)
        write.add_done_callback(more)
        write.result()
        device.wait([write])
        assert np.array_equal(found[0], found[1].result().bits)


def test_many_threads_with_one_sequence():
    key, value = tokens_of(1, 300)
    errors = []
    with Device(SlowDevice(shuffle=9)) as device:
        sequence = device.create_sequence(1, capacity_tokens=300)
        sequence.append(key[:, :20], value[:, :20])
        expected = dense_bits(key[:, :20], value[:, :20], query_of(1))
        plan = sequence.plan(query_of(1))

        def attend():
            try:
                for _ in range(20):
                    assert np.array_equal(device.attend_many([plan])[0].bits, expected)
            except BaseException as error:  # noqa: BLE001, raised by the other thread
                errors.append(error)

        def append():
            try:
                for at in range(20, 300, 20):
                    sequence.append(key[:, at : at + 20], value[:, at : at + 20])
            except BaseException as error:  # noqa: BLE001, raised by the other thread
                errors.append(error)

        threads = [threading.Thread(target=target) for target in (attend, append, attend)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert np.array_equal(sequence.attend(query_of(1)).bits, dense_bits(key, value, query_of(1)))
        assert idle(device)


# Isolation.


@pytest.mark.parametrize("sketches", SKETCHES)
def test_an_isolated_sequence_gives_the_same_bits(sketches):
    key, value = tokens_of(2, 300)
    with Device(SlowDevice(shuffle=1)) as device:
        pages, zones = device.free_dram_pages, device.free_zones
        sequence = device.create_sequence(2, capacity_tokens=400, isolated=True, **sketches)
        assert sequence.domain == 2
        assert device.create_sequence(1, capacity_tokens=5).domain == 1
        futures = [sequence.append_async(key[:, at : at + 60], value[:, at : at + 60]) for at in range(0, 300, 60)]
        result = sequence.attend_async(query_of(2))
        kvattic.wait([*futures, result])
        assert np.array_equal(result.result().bits, dense_bits(key, value, query_of(2)))
        assert np.array_equal(sequence.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))
        sequence.free()
        assert (device.free_dram_pages, device.free_zones) == (pages, zones)
        # Its number, zones and DRAM are for others now.
        again = device.create_sequence(2, capacity_tokens=400, isolated=True, **sketches)
        assert again.domain == 2
        again.append(key, value)
        assert np.array_equal(again.attend(query_of(2)).bits, dense_bits(key, value, query_of(2)))


def test_a_domain_reaches_nothing_of_another():
    """Jobs with another sequence's table; programs into its zone or from its DRAM; erasing it."""
    key, value = tokens_of(1, 40)
    with Device(SlowDevice()) as device:
        one, other, common = (device.create_sequence(1, capacity_tokens=100, isolated=i) for i in (True, True, False))
        for sequence in (one, other, common):
            sequence.append(key, value)
        assert [s.domain for s in (one, other, common)] == [2, 3, 1]
        job = other.plan(query_of(1)).jobs[0]
        tail = replace(other.plan(query_of(1), window=3).jobs[0])
        assert len(tail.table) == 1
        for domain, stolen in ((2, job), (1, job), (2, tail), (1, tail), (3, common.plan(query_of(1)).jobs[0])):
            with pytest.raises(DeviceStatusError, match="NOT_OWNED: what entry 0 of the table names"):
                device.run([replace(stolen, domain=domain)])
        with pytest.raises(DeviceStatusError, match="NOT_PERMITTED: the domain is not given to the queue"):
            device.run([replace(job, domain=4)])
        entries = layout.unpack_entries(other._writer.layers[0].table)
        page, channel = int(entries.key_page[0, 0]), int(entries.channel[0, 0])
        tail_page = int(entries.key_page[0, 2])
        for operation in (FlashOperation(Opcode.ERASE, channel, page, domain=2),
                          FlashOperation(Opcode.ERASE, channel, page),
                          FlashOperation(Opcode.PROGRAM, channel, page, tail_page, domain=1),
                          FlashOperation(Opcode.PROGRAM, channel, page, tail_page, domain=2)):
            assert device.operate([operation], check=False)[0].status is Status.NOT_OWNED
        mine = int(layout.unpack_entries(one._writer.layers[0].table).key_page[0, 0])
        (completion,) = device.operate([FlashOperation(Opcode.PROGRAM, channel, mine, tail_page, domain=2)],
                                       check=False)
        assert (completion.status, completion.where) == (Status.NOT_OWNED, 1)
        device.reset()
        assert np.array_equal(other.attend(query_of(1)).bits, dense_bits(key, value, query_of(1)))
        # What nobody owned in between is zero: no other tenant's tokens.
        page = int(entries.key_page[0, 2])
        other.free()
        assert not any(device.transport.read_dram(page * 1024, 1024))
        with pytest.raises(DeviceStatusError, match="NOT_PERMITTED"):
            device.run([job])


def test_isolated_sequences_over_a_loss_of_power():
    key, value = tokens_of(1, 40)
    transport = SlowDevice()
    with Device(transport) as device:
        sequence = device.create_sequence(1, capacity_tokens=100, isolated=True)
        sequence.append(key, value)
        transport.power_up()
        assert [loss.tokens for loss in device.recover()] == [8]
        assert np.array_equal(sequence.attend(query_of(1)).bits, dense_bits(key[:, :32], value[:, :32], query_of(1)))
        sequence.append(key[:, 32:], value[:, 32:])
        assert np.array_equal(sequence.attend(query_of(1)).bits, dense_bits(key, value, query_of(1)))
        sequence.free()
        assert device.free_dram_pages == device.media.dram.pages


def test_there_are_254_domains_for_isolated_sequences():
    part = TINY.part.resized(1024, blocks=300)
    with Device(GoldenDevice(replace(TINY, part=part))) as device:
        sequences = [device.create_sequence(1, capacity_tokens=5, isolated=True) for _ in range(254)]
        assert [sequence.domain for sequence in sequences] == list(range(2, 256))
        with pytest.raises(CapacityError, match="all 254 domains of isolated sequences are in use; free one"):
            device.create_sequence(1, capacity_tokens=5, isolated=True)
        sequences[7].free()
        assert device.create_sequence(1, capacity_tokens=5, isolated=True).domain == 9
        for bad in (1, None, "yes"):
            with pytest.raises(RequestError, match="isolated must be a bool"):
                device.create_sequence(1, capacity_tokens=5, isolated=bad)
