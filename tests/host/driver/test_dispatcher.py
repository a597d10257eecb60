"""What is under way: rings, backlog, host memory, waiting, and everything that a device can do wrong."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from tests.host.driver.slow_device import SlowDevice

import kvattic
from kvattic import Future, Status
from kvattic.driver.device import Device, FlashOperation
from kvattic.driver.jobs import job_bytes
from kvattic.errors import (
    CapacityError,
    DeviceLostError,
    DeviceStatusError,
    DeviceTimeoutError,
    KvatticError,
    RequestError,
)
from kvattic.golden.device import GoldenDevice
from kvattic.golden.queues import Queue
from kvattic.spec.commands import Opcode
from kvattic.spec.config import TINY

PROBE = FlashOperation(Opcode.PROBE, 0, 0)
ERASE = FlashOperation(Opcode.ERASE, 0, 0)


def tokens_of(kv_heads, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, kv_heads, tokens, 32)).astype(np.float16)


def query_of(q_heads, n=1, seed=99):
    return np.random.default_rng(seed).standard_normal((q_heads, n, 32)).astype(np.float16)


def sequence_of(device, kv_heads=1, tokens=40, **options):
    sequence = device.create_sequence(kv_heads, capacity_tokens=4 * tokens, **options)
    sequence.prefill(*tokens_of(kv_heads, tokens))
    return sequence


def jobs_of(sequence, count):
    return [sequence.plan(query_of(1, seed=i)).jobs[0] for i in range(count)]


def expected(count):
    with Device(GoldenDevice(TINY)) as device:
        return [result.bits for result in device.run(jobs_of(sequence_of(device), count))]


def same(results, bits):
    return len(results) == len(bits) and all(np.array_equal(r.bits, b) for r, b in zip(results, bits, strict=True))


def idle(device):
    """Nothing is under way, and all of the host memory is free."""
    dispatcher = device.dispatcher
    assert not dispatcher.working
    assert not dispatcher.retiring
    return dispatcher._arena.free_pages == dispatcher._arena.pages


# Order, room, and how often the device is bothered.


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("entries", [2, 4, 256])
def test_completions_in_any_order(seed, entries):
    bits = expected(20)
    with Device(GoldenDevice(TINY, shuffle=seed), entries=entries) as device:
        jobs = jobs_of(sequence_of(device), 20)
        futures = device.submit(jobs[:10])
        erases = device.submit_operations([FlashOperation(Opcode.ERASE, i % 2, 6 << 5 | i // 2 % 4) for i in range(12)])
        futures += device.submit(jobs[10:])
        probes = device.submit_operations([FlashOperation(Opcode.PROBE, i % 2, 8 * i) for i in range(12)])
        kvattic.wait([*probes, *erases])
        assert {future.result().status for future in [*probes, *erases]} == {Status.OK}
        assert {future.result().queue for future in probes} == {0}
        assert {future.result().queue for future in erases} == {2}
        assert same([future.result() for future in reversed(futures)][::-1], bits)
        assert idle(device)


@pytest.mark.parametrize("entries", [2, 4, 64])
def test_rings_are_never_overrun(entries):
    bits = expected(100)
    transport = SlowDevice()
    with Device(transport, entries=entries) as device:
        jobs = jobs_of(sequence_of(device), 100)
        transport.forget()
        assert same(device.run(jobs), bits)
        assert transport.commands[1] == entries - 1
        assert idle(device)


def test_little_memory_holds_back_what_does_not_fit():
    """3,584 bytes beside the smallest rings: nine jobs, if they were alone."""
    bits = expected(30)
    transport = SlowDevice(memory_bytes=768 + 3584)
    with Device(transport) as device:
        assert device.dispatcher.arena_bytes == 3584
        jobs = jobs_of(sequence_of(device), 30)
        assert job_bytes(jobs[0], 32) == 384
        futures = device.submit(jobs)
        futures[3].result()
        assert same([future.result() for future in futures], bits)
        assert idle(device)


def test_many_commands_are_in_flight_by_default():
    transport = SlowDevice()
    with Device(transport) as device:
        futures = device.submit(jobs_of(sequence_of(device), 1100))
        assert device.in_flight == 1023
        futures[0].result()
        assert device.in_flight > 512


def test_one_doorbell_for_many_and_no_register_is_read():
    """All of 64 jobs at once; then half of what is under way wakes the host, and no more."""
    transport = SlowDevice()
    with Device(transport) as device:
        jobs = jobs_of(sequence_of(device), 64)
        transport.forget()
        device.run(jobs)
        assert transport.reads == []
        names = [name for name, _ in transport.writes]
        assert names.count("SUBMISSION_TAIL_1") == 1
        assert [value for name, value in transport.writes if name == "INTERRUPT_AFTER"] == [32, 16, 8, 4, 2, 1]
        assert transport.waits <= 8
        assert names.count("COMPLETION_HEAD_1") <= 8
        assert set(names) == {"SUBMISSION_TAIL_1", "COMPLETION_HEAD_1", "INTERRUPT_AFTER"}


def test_the_queue_does_not_run_dry_while_there_is_a_backlog():
    transport = SlowDevice()
    with Device(transport, entries=16) as device:
        jobs = jobs_of(sequence_of(device), 200)
        transport.forget()
        device.run(jobs)
        assert transport.dry <= 5           # at the end
        assert transport.waits <= 200 // 7 + 6
        assert device.counters()["CYCLES"] == 0


def test_identifiers_go_round_and_leave_out_the_unknown_one():
    with Device(SlowDevice(), entries=8) as device:
        jobs = jobs_of(sequence_of(device), 30)
        device.dispatcher._identifier = 0xFFF8
        found = [result.completion.identifier for result in device.run(jobs)]
        assert found == [*range(0xFFF8, 0xFFFF), *range(23)]
        # Those in flight are not given twice.
        futures = device.submit(jobs[:3])
        first = min(device.dispatcher._in_flight)
        device.dispatcher._identifier = first
        futures += device.submit(jobs[:3])
        assert len({future.result().completion.identifier for future in futures}) == 6


# Futures.


def test_a_future():
    transport = SlowDevice()
    with Device(transport) as device:
        job = jobs_of(sequence_of(device), 1)[0]
        heard = []
        (future,) = device.submit([job])
        assert isinstance(future, Future)
        future.add_done_callback(heard.append)
        transport.asleep = True
        assert not future.done()
        with pytest.raises(DeviceTimeoutError, match=r"only the host can change that|no interrupt can come"):
            future.result(timeout_s=10)
        transport.asleep = False
        device.reset()
        assert heard == [future]
        assert future.done()
        assert isinstance(future.exception(), DeviceTimeoutError)
        (future,) = device.submit([job])
        assert future.exception() is None
        future.add_done_callback(heard.append)
        assert heard[1] is future
        assert future.result() is future.result()


def test_patience_of_the_caller_is_not_that_with_the_device():
    class Sleepy(SlowDevice):
        def wait(self, timeout_s):
            if self.asleep:
                threading.Event().wait(timeout_s)
                raise DeviceTimeoutError("nothing came")
            super().wait(timeout_s)

    transport = Sleepy()
    with Device(transport) as device:
        futures = device.submit(jobs_of(sequence_of(device), 3))
        transport.asleep = True
        with pytest.raises(DeviceTimeoutError, match=r"not done within 0.02 s; 3 commands are under way, 0 wait"):
            futures[0].result(timeout_s=0.02)
        with pytest.raises(DeviceTimeoutError, match=r"not done within 0.02 s"):
            device.wait(futures, timeout_s=0.02)
        assert not futures[1].done()
        transport.asleep = False
        kvattic.wait(futures)
        assert all(future.exception() is None for future in futures)
        # Short ones add up to the device's.
        device.dispatcher.timeout_s = 0.5
        futures = device.submit(jobs_of(device._sequences[0], 1))
        transport.asleep = True
        with pytest.raises(DeviceTimeoutError, match=r"nothing came .1 commands .*call Device.reset"):
            for _ in range(50):
                try:
                    futures[0].result(timeout_s=0.05)
                except DeviceTimeoutError as error:
                    if "not done" not in str(error):
                        raise
        transport.asleep = False
        device.reset()


def test_slow_is_not_dead():
    """Fewer completions come within the device's patience than the interrupt line waits for."""
    class Snail(SlowDevice):
        steps = 0

        def _step(self):
            self.steps -= 1
            return self.steps >= 0 and super()._step()

        def wait(self, timeout_s):
            self.steps = 3
            super().wait(timeout_s)

    transport = Snail()
    with Device(transport) as device:
        jobs = jobs_of(sequence_of(device), 40)
        transport.forget()
        assert same(device.run(jobs, timeout_s=0.001), expected(40))
        assert transport.waits >= 40 // 3


def test_wait_takes_futures_of_its_device():
    with Device(GoldenDevice(TINY)) as device, Device(SlowDevice()) as other:
        mine = device.submit(jobs_of(sequence_of(device), 3))
        others = other.submit(jobs_of(sequence_of(other), 3))
        with pytest.raises(RequestError, match="not a future of this device"):
            device.wait(others)
        with pytest.raises(RequestError, match="not a future of this device: 5"):
            device.wait([5])
        with pytest.raises(RequestError, match="wait takes futures, not 5"):
            kvattic.wait([5])
        kvattic.wait([])
        kvattic.wait([*others, *mine])
        assert all(future.finished for future in [*mine, *others])


def test_poll_takes_what_is_there():
    with Device(GoldenDevice(TINY)) as device:
        futures = device.submit(jobs_of(sequence_of(device), 3))
        assert not any(future.finished for future in futures)
        assert device.poll() == 3
        assert all(future.finished for future in futures)
        assert device.poll() == 0


def test_a_bad_job_fails_its_own_future():
    with Device(GoldenDevice(TINY)) as device:
        sequence = sequence_of(device, tokens=10)
        key = np.zeros((1, 5, 32), np.uint16)
        key[0, 2, 3] = 0x7C00
        bad = device.create_sequence(1, capacity_tokens=5)
        bad.prefill(key, key * 0)
        jobs = [*jobs_of(sequence, 1), *jobs_of(bad, 1), *jobs_of(sequence, 1)]
        futures = device.submit(jobs)
        assert isinstance(futures[1].exception(), DeviceStatusError)
        with pytest.raises(DeviceStatusError, match=r"job 1 of 3 .* failed: NAN_KEY"):
            futures[1].result()
        assert not futures[0].result().completion.where
        futures[2].result()
        (unchecked,) = device.submit(jobs[1:2], check=False)
        assert unchecked.result().completion.status is Status.NAN_KEY
        with pytest.raises(CapacityError, match=r"job 1 of 2 needs .* bytes of host memory"):
            device.submit([jobs[0], replace(jobs[0], query=np.zeros((1 << 17, 32), np.uint16))])
        assert idle(device)


# What a device can do wrong.


class Liar(SlowDevice):
    """A device whose completions can be made wrong: `lie` gets each entry and returns what is written."""

    lie = None
    rings = 0

    def __init__(self):
        super().__init__()
        self.writes_truth = self.memory.dma_write
        self.memory.dma_write = self.dma_write

    def dma_write(self, address, data):
        if self.lie and len(data) == 64 and address < self.rings:
            data = self.lie(bytearray(data))
        return self.writes_truth(address, bytes(data))


def lying(lie):
    transport = Liar()
    device = Device(transport)
    sequence = sequence_of(device)
    transport.rings = device.dispatcher._base * 64
    transport.lie = lie
    return device, sequence


def other_identifier(entry):
    entry[12] ^= 0x40
    return entry


def other_queue(entry):
    entry[10] = 2
    return entry


def no_status(entry):
    entry[15] = 0x70
    return entry


@pytest.mark.parametrize(("lie", "message"), [
    (other_identifier, r"queue 1: a completion is for command \d+, which is not under way there"),
    (other_queue, "queue 1: a completion of queue 2 is in its ring, for command"),
    (no_status, "queue 1: a completion cannot be decoded: 00000000"),
])
def test_completions_that_make_no_sense(lie, message):
    device, sequence = lying(lie)
    futures = device.submit(jobs_of(sequence, 5))
    with pytest.raises(DeviceStatusError, match=message):
        futures[2].result()
    for future in futures:
        assert isinstance(future.exception(), DeviceStatusError)
    with pytest.raises(DeviceStatusError, match=message):
        device.submit(jobs_of(sequence, 1))
    with pytest.raises(DeviceStatusError, match=message):
        sequence.append(*tokens_of(1, 1))
    device.transport.lie = None
    device.reset()
    assert same(device.run(jobs_of(sequence, 5)), expected(5))
    assert idle(device)


def test_a_completion_that_came_twice():
    """The same identifier again, in the next entry."""
    seen = []

    def twice(entry):
        seen.append(bytes(entry[12:14]))
        entry[12:14] = seen[0]
        return entry

    device, sequence = lying(twice)
    futures = device.submit(jobs_of(sequence, 3))
    with pytest.raises(DeviceStatusError, match="not under way there"):
        device.wait([futures[2]])
        futures[2].result()
    assert futures[0].exception() is None


@pytest.mark.parametrize("entries", [4, 64])
@pytest.mark.parametrize("broken", [{2}, {0}, {9}, {3, 4}, {0, 9}])
def test_commands_that_could_not_be_read(monkeypatch, entries, broken):
    """Their completions do not say which they were: those that are left when all others have answered."""
    transport = SlowDevice(shuffle=3)
    with Device(transport, entries=entries) as device:
        jobs = jobs_of(sequence_of(device), 10)
        fetched = []
        fetch = transport._fetch

        def spoiled(queue: Queue):
            line = fetch(queue)
            if queue.number != 1:
                return line
            fetched.append(line)
            return None if len(fetched) - 1 in broken else line

        monkeypatch.setattr(transport, "_fetch", spoiled)
        results = device.run(jobs, check=False)
        assert {i for i, r in enumerate(results) if r.completion.status is Status.BUS_ERROR} == broken
        good = [r for r in results if r.completion.status is Status.OK]
        assert same(good, [bits for i, bits in enumerate(expected(10)) if i not in broken])
        with pytest.raises(DeviceStatusError, match=r"job 0 of 1 .* BUS_ERROR"):
            fetched.clear()
            broken_before = set(broken)
            broken.clear()
            broken.add(0)
            try:
                device.run(jobs[:1])
            finally:
                broken.clear()
                broken.update(broken_before)
        monkeypatch.undo()
        assert same(device.run(jobs), expected(10))
        assert idle(device)


def test_reset_fails_what_is_under_way():
    transport = SlowDevice()
    with Device(transport, entries=4) as device:
        sequence = sequence_of(device)
        futures = device.submit(jobs_of(sequence, 10))
        result = sequence.attend_async(query_of(1))
        write = sequence.append_async(*tokens_of(1, 40))
        device.reset()
        for future in [*futures, result, write]:
            assert future.done()
            with pytest.raises(DeviceStatusError, match="the device was reset before the command ended"):
                future.result()
        assert idle(device)
        assert sequence.length() == 80
        assert sequence.flushed() == 32
        sequence.append(*tokens_of(1, 1))
        assert sequence.flushed() == 80


class Mortal(SlowDevice):
    """A device that is gone when it is told so, or after some more calls of one kind."""

    gone = False
    dies_at = None

    def _check(self, call):
        if call == self.dies_at:
            self.gone = True
        if self.gone:
            raise DeviceLostError("the simulator was killed")

    def wait(self, timeout_s):
        self._check("wait")
        super().wait(timeout_s)

    def read_memory(self, address, size):
        self._check("read_memory")
        return super().read_memory(address, size)

    def write_memory(self, address, data):
        self._check("write_memory")
        super().write_memory(address, data)

    def write_register(self, name, value):
        self._check("write_register")
        super().write_register(name, value)

    def write_dram(self, address, data):
        self._check("write_dram")
        super().write_dram(address, data)


@pytest.mark.parametrize("call", ["wait", "read_memory", "write_memory", "write_register", "write_dram"])
def test_a_device_that_is_gone(call):
    transport = Mortal()
    device = Device(transport)
    sequence = sequence_of(device)
    futures = [*device.submit(jobs_of(sequence, 3)), sequence.append_async(*tokens_of(1, 40))]
    assert not any(future.finished for future in futures)
    transport.dies_at = call
    with pytest.raises(DeviceLostError, match="the simulator was killed"):
        futures.append(sequence.append_async(*tokens_of(1, 20)))
        sequence.attend(query_of(1))
    for future in futures:
        assert future.done()
        assert isinstance(future.exception(), DeviceLostError)
    for use in (lambda: sequence.attend(query_of(1)), lambda: device.reset(), lambda: device.counters(),
                lambda: device.create_sequence(1, capacity_tokens=5, isolated=True), lambda: device.recover()):
        with pytest.raises(DeviceLostError, match="the simulator was killed"):
            use()
    with pytest.raises(KvatticError):
        device.close()
    with pytest.raises(RequestError, match="the device was closed"):
        device.run([])


def test_a_broken_device_says_so_under_poll_too():
    device, sequence = lying(other_queue)
    (future,) = device.submit(jobs_of(sequence, 1))
    device.transport._awake = True
    while device.transport._step():
        pass
    with pytest.raises(DeviceStatusError, match="a completion of queue 2"):
        device.poll()
    assert future.done()


def test_threads():
    """Four of them attend and append, each with a sequence of its own."""
    bits = {}

    def work(device, number):
        sequence = device.create_sequence(1, capacity_tokens=200)
        found = []
        for step in range(6):
            sequence.append(*tokens_of(1, 20 + number, 10 * number + step))
            found.append(sequence.attend(query_of(1)).bits)
        bits.setdefault(number, []).append(found)

    with Device(SlowDevice(shuffle=1)) as device:
        threads = [threading.Thread(target=work, args=(device, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert idle(device)
    for number in range(4):
        with Device(GoldenDevice(TINY)) as device:
            work(device, number)
    for number in range(4):
        one, other = bits[number]
        assert np.array_equal(one, other)
