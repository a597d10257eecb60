"""A simulated drive in a process of its own, as a `Transport`.

    transport = open_simulator("verilator", TINY)

starts `kvattic_sim.rtl.server`, which builds the model unless it is in the build cache, and runs it.  Host memory is
shared with the simulator; registers, device DRAM and the interrupt go over a Unix socket.  Simulated time stands still
between two calls, so a run repeats exactly; it passes in register accesses and in `wait`.

A forked child of the host's process gets a `ForkedError` from every call; closing its copy is harmless.

Nothing is left behind, whichever side ends first: shared memory has no name, the server watches its connection to this
process and kills the simulator and removes its files when it ends, and the simulator dies with the server.

The messages are in protocol.py.
"""

import contextlib
import importlib.util
import json
import math
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeAlias

from kvattic.errors import CapacityError, DeviceLostError, KvatticError, RequestError
from kvattic.spec.config import Config
from kvattic.support.files import write_whole
from kvattic.support.forks import Owner
from kvattic.transport.base import check_range, find_register
from kvattic.transport.protocol import (
    FAILURES,
    MAX_PAYLOAD,
    PROTOCOL,
    REQUEST,
    SOCKET,
    Connection,
    Failure,
    Kind,
    Message,
    ProtocolError,
    Role,
)

__all__ = ["SIMULATORS", "SimTransport", "open_simulator"]

SIMULATORS = ("verilator", "icarus")
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
"""Where the directory goes if the temporary directory is unsuitable."""
END_S = 8.0
"""Seconds that server and simulator have to end by themselves."""
END_REASON_S = 20.0
"""Seconds that the server has to tell why the simulator ended."""
IMAGE_END_S = 90.0
"""Seconds that server and simulator have to end if the flash is kept in a file."""

Progress: TypeAlias = Callable[[str], None]


def _server_command(directory: Path) -> list[str]:
    """The command that starts the server; -P keeps the current directory off its path."""
    if importlib.util.find_spec("kvattic_sim") is None:
        raise RequestError("the simulators need the package kvattic_sim, which is not installed: "
                           "pip install 'kvattic[sim]'")
    return [sys.executable, "-P", "-m", "kvattic_sim.rtl.server", str(directory)]


def _places() -> list[str]:
    """Places for the directory, the best one first."""
    named = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *SHORT_PLACES]
    return [place for place in dict.fromkeys(named) if place]


def _open_directory(request: dict[str, Any]) -> tuple[Path, socket.socket]:
    """A new directory with a socket and the request in it.

    A socket's path may have about a hundred bytes (not characters), and not every file system has sockets, or room: so
    several places are tried in turn.

    Raises:
        RequestError: no place is suitable.
    """
    failures = []
    for place in _places():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = None
        try:
            directory = Path(tempfile.mkdtemp(prefix="kvattic-sim-", dir=place))
            listener.bind(os.fsencode(directory / SOCKET))
            listener.listen(2)
            write_whole(directory / REQUEST, json.dumps(request))
            return directory, listener
        except BaseException as error:
            listener.close()
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            failures.append(f"{place}: {error.strerror or error}")
    raise RequestError("a simulated drive needs a directory that takes a few files and a Unix socket, with a path of "
                       f"at most some 60 bytes: set TMPDIR to one; tried were {'; '.join(failures)}")


class _Process:
    """The server and the directory that it shares with us."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.directory, self.listener = _open_directory(request)
        self.log = self.directory / "server.log"
        try:
            path = os.pathsep.join(each or os.getcwd() for each in sys.path)
            with self.log.open("wb") as log:
                # A session of its own: Ctrl-C is this process's business.
                self._process = subprocess.Popen(
                    _server_command(self.directory), env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        except BaseException:
            self.end(0)
            raise

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> str:
        """How it ended; waits a moment for the end."""
        try:
            code = 0 if self._process is None else self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "closed the connection but runs"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def end(self, patience_s: float) -> None:
        """Wait for its end, kill it after `patience_s` seconds, and remove the files."""
        self.listener.close()
        if self._process is not None:
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _tail(path: Path | None, lines: int = 15) -> str:
    """The last lines of a log, for a message."""
    try:
        text = path.read_text(errors="replace").rstrip() if path else ""
    except OSError:
        text = ""
    return "".join(f"\n  | {line}" for line in text.splitlines()[-lines:])


def _shared_memory(size: int) -> int:
    """A file without a name, as a descriptor: it need not be removed."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("kvattic host memory")
    else:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
    try:
        os.ftruncate(file, size)
    except BaseException:
        os.close(file)
        raise
    return file


def _no_memory(size: int, error: Exception) -> CapacityError:
    return CapacityError(f"memory_bytes: this machine has no {size:,} bytes to share with the simulator: {error}")


class SimTransport:
    """A drive in a simulator's process (see `kvattic.transport.base.Transport`); made by `open_simulator`.

    Attributes:
        config: geometry.
        memory_bytes: host memory, from address 0 on.
        dram_bytes: size of device DRAM.
        cycles: cycles simulated when the simulator last said something.
        heartbeat: if set, called some times a second while `wait` waits, with the cycles since the start; it must not
            call the transport.
        silence_s: seconds without a message after which a busy simulator counts as lost.
    """

    def __init__(self, config: Config, *, memory_bytes: int, request: dict[str, Any], silence_s: float,
                 start_timeout_s: float, on_progress: Progress | None) -> None:
        self.config = config
        self.memory_bytes = memory_bytes
        self.dram_bytes = 0
        self.cycles = 0
        self.heartbeat: Callable[[int], None] | None = None
        self.silence_s = silence_s
        self._owner = Owner()
        self._lock = threading.Lock()
        self._number = 0
        self._lost = ""
        self._closed = False
        self._log: Path | None = None
        self._end_s = END_S if request["image"] is None else IMAGE_END_S
        self._server: Connection | None = None
        self._simulator: Connection | None = None
        try:
            file = _shared_memory(memory_bytes)
        except (OSError, OverflowError) as error:
            raise _no_memory(memory_bytes, error) from None
        try:
            try:
                self._memory = mmap.mmap(file, memory_bytes)
            except (OSError, OverflowError, ValueError) as error:
                raise _no_memory(memory_bytes, error) from None
            self._process = _Process(request)
            try:
                self._start(file, start_timeout_s, on_progress or (lambda line: None))
            except (OSError, ProtocolError) as error:
                failure = self._failure(str(error))
                self._disconnect()
                self._process.end(0)
                raise failure from None
            except BaseException:
                self._disconnect()
                self._process.end(0)
                raise
        finally:
            os.close(file)

    # Life.

    def _start(self, memory: int, timeout_s: float, progress: Progress) -> None:
        """Accept the connections of the server and of the simulator."""
        begin = told = time.monotonic()
        listener = self._process.listener
        simulator: Connection | None = None
        while True:
            now = time.monotonic()
            if now - begin > timeout_s:
                raise self._failure(f"the simulator was not ready after {timeout_s:g} s")
            if self._log is not None and now - told >= 1:
                told = now
                progress(f"starting the simulator: {now - begin:.0f} s")
            streams = [listener, *(each.socket for each in (self._server, simulator) if each is not None)]
            if not select.select(streams, [], [], 0.2)[0]:
                if self._server is None and not self._process.running:
                    raise self._failure(f"the simulation server {self._process.status}")
                continue
            if select.select([listener], [], [], 0)[0]:
                connection = Connection(listener.accept()[0])
                if self._greet(connection) is Role.SERVER:
                    self._server = connection
                else:
                    simulator = connection
                    simulator.send(Kind.MEMORY, payload=struct.pack("<Q", self.memory_bytes), files=[memory],
                                   timeout_s=self.silence_s)
            if self._server is not None and self._server.pending:
                self._note_server(self._server.receive(self.silence_s), progress)
            if simulator is not None and simulator.pending:
                message = simulator.receive(self.silence_s)
                if message is None:     # the server will say why
                    simulator.close()
                    simulator = None
                elif message.kind is Kind.READY:
                    (self.dram_bytes,) = message.unpack("<Q")
                    self.cycles, self._simulator = message.cycles, simulator
                    listener.close()
                    return

    def _greet(self, connection: Connection) -> Role:
        message = connection.receive(self.silence_s)
        if message is None or message.kind is not Kind.HELLO:
            raise self._failure(f"the simulation server began with {message}")
        role, version = message.unpack("<HH")
        if version != PROTOCOL or role not in Role.__members__.values():
            raise self._failure(f"kvattic and kvattic_sim do not fit: the messages have version {version}, "
                                f"{PROTOCOL} is needed")
        return Role(role)

    def _note_server(self, message: Message | None, progress: Progress) -> None:
        """Take a message of the server before the simulator is ready."""
        if message is None:
            raise self._failure(f"the simulation server {self._process.status}")
        if message.kind is Kind.ENDED:
            raise self._failure(message.text)
        if message.kind is Kind.PROGRESS:
            progress(message.text)
        self._note_log(message)

    def _note_log(self, message: Message) -> None:
        """Take the place of the simulator's log, if the server's message tells it.

        The simulator may be ready before this message is read.
        """
        if message.kind is Kind.STARTED:
            self._log = Path(os.fsdecode(message.payload))

    def _failure(self, what: str) -> DeviceLostError:
        """The error for a failed start."""
        return DeviceLostError(f"the simulated drive did not start: {what}"
                               f"{_tail(self._log) or _tail(self._process.log)}")

    def _disconnect(self) -> None:
        for connection in (self._simulator, self._server):
            if connection is not None:
                connection.close()

    def close(self) -> None:
        """See `Transport`.  Ends the simulator and, unless it has an image, its flash.  Any thread may call it."""
        if not self._closed:
            self._closed = True
            if self._owner.here:
                self._disconnect()
                self._process.end(self._end_s)
            else:
                # A forked child gives back its copies of descriptors and nothing else.
                self._process.listener.close()
                for connection in (self._simulator, self._server):
                    if connection is not None:
                        connection.drop()
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lose(self, what: str, *, known: bool = False) -> DeviceLostError:
        """Give the simulator up: it is gone, or its answers cannot be trusted; the error to raise.

        Args:
            what: what happened.
            known: this is the cause; otherwise the server is asked for it.
        """
        if self._closed:
            return DeviceLostError("the simulated drive was closed during the call")
        said = "" if known else self._end_reason(what)
        self._disconnect()
        self._lost = f"the simulated drive is lost: {said or what + _tail(self._log)}"
        self._process.end(END_S if said or known else 0)
        return DeviceLostError(self._lost)

    def _end_reason(self, what: str) -> str:
        """Why the simulator ended, from the server, or how the server ended; empty if the simulator still runs."""
        assert self._server is not None
        if self._simulator is not None and not self._simulator.ended:
            return ""
        with contextlib.suppress(OSError, TimeoutError, ProtocolError):
            while (message := self._server.receive(END_REASON_S)) is not None:
                if message.kind is Kind.ENDED:
                    return message.text
                self._note_log(message)
        if self._server.ended:
            return f"{what}; the simulation server {self._process.status}{_tail(self._log)}"
        return ""

    # Calls.

    def _check(self) -> None:
        self._owner.check("the simulated drive")
        if self._closed:
            raise RequestError("the simulated drive is closed")
        if self._lost:
            raise DeviceLostError(self._lost)

    def _call(self, kind: Kind, payload: bytes, answer: Kind) -> Message:
        """Send a request and wait for its answer."""
        self._owner.check("the simulated drive")    # before the lock, which a thread may have held that is not here
        with self._lock:
            self._check()
            connection = self._simulator
            assert connection is not None
            self._number = number = self._number + 1
            try:
                connection.send(kind, number, payload, timeout_s=self.silence_s)
                # Answers to calls that were interrupted come first.
                while (message := connection.receive(self.silence_s)) is None or message.number != number:
                    if message is None:
                        raise ConnectionResetError("the simulator closed the connection")
                    self._beat(message)
                self.cycles = message.cycles
                if message.kind is Kind.FAILED:
                    raise self._translate(message)
                if message.kind is not answer:
                    raise ProtocolError(f"{kind.name} was answered with {message.kind.name}")
                return message
            except TimeoutError as error:
                raise self._lose(f"its process lives, but {error}; a request is open: {kind.name}") from None
            except (OSError, ProtocolError, UnicodeError) as error:
                raise self._lose(str(error)) from None

    def _beat(self, message: Message) -> None:
        self.cycles = message.cycles
        if message.kind is Kind.HEARTBEAT and self.heartbeat is not None:
            self.heartbeat(message.cycles)

    def _translate(self, message: Message) -> KvatticError:
        number = int.from_bytes(message.payload[:2], "little")
        if len(message.payload) < 2 or number not in Failure.__members__.values():
            raise ProtocolError(f"FAILED came with {message.payload[:40]!r}")
        failure = Failure(number)
        text = message.payload[2:].decode(errors="replace")
        return self._lose(text, known=True) if failure is Failure.LOST else FAILURES[failure](text)

    # Transport.

    def read_register(self, name: str) -> int:
        """See `Transport`.

        Raises:
            RequestError: the register does not exist.
            DeviceLostError: the simulator is gone.
        """
        address = find_register(name).address
        (value,) = self._unpack(self._call(Kind.READ_REGISTER, struct.pack("<I", address), Kind.VALUE), "<Q")
        return int(value)

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`.

        Raises:
            RequestError: the register does not exist, or the value does not fit it.
            DeviceLostError: the simulator is gone.
        """
        address = find_register(name, value).address
        self._call(Kind.WRITE_REGISTER, struct.pack("<IQ", address, value), Kind.DONE)

    def read_memory(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
            DeviceLostError: the simulator is gone.
        """
        check_range("host memory", self.memory_bytes, address, size)
        self._check_alive()
        return self._memory[address : address + size]

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
            DeviceLostError: the simulator is gone.
        """
        check_range("host memory", self.memory_bytes, address, len(data))
        self._check_alive()
        self._memory[address : address + len(data)] = bytes(data)

    def _check_alive(self) -> None:
        """Notice the simulator's end for a caller that only polls host memory, which always answers."""
        self._check()
        assert self._simulator is not None
        if self._simulator.ended and self._lock.acquire(blocking=False):
            # Where another thread is in a call, that one finds out.
            try:
                self._check()
                raise self._lose("the simulator closed the connection")
            finally:
                self._lock.release()

    def read_dram(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of device DRAM.
            DeviceLostError: the simulator is gone.
        """
        check_range("device DRAM", self.dram_bytes, address, size)
        found = bytearray()
        for begin, part in _parts(address, size):
            message = self._call(Kind.READ_DRAM, struct.pack("<QQ", begin, part), Kind.DATA)
            if len(message.payload) != part:
                raise self._lose(f"READ_DRAM of {part} bytes was answered with {len(message.payload)}")
            found += message.payload
        return bytes(found)

    def write_dram(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of device DRAM.
            DeviceLostError: the simulator is gone.
        """
        check_range("device DRAM", self.dram_bytes, address, len(data))
        view = memoryview(data)
        for begin, part in _parts(address, len(data)):
            offset = begin - address
            self._call(Kind.WRITE_DRAM, struct.pack("<Q", begin) + view[offset : offset + part], Kind.DONE)

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.

        Raises:
            DeviceTimeoutError: the line was not raised in that time.
            DeviceLostError: the simulator is gone.
        """
        self._call(Kind.WAIT, struct.pack("<d", timeout_s), Kind.DONE)

    def _unpack(self, message: Message, layout: str) -> tuple[Any, ...]:
        try:
            return message.unpack(layout)
        except ProtocolError as error:
            raise self._lose(str(error)) from None


def _parts(address: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, size) of what goes in one message."""
    most = MAX_PAYLOAD - 8
    for begin in range(address, address + size, most):
        yield begin, min(most, address + size - begin)


def open_simulator(
    simulator: str,
    config: Config,
    *,
    memory_bytes: int = 1 << 24,
    dram_bytes: int | None = None,
    frames: int | None = None,
    flash: str = "nand",
    bit_error_rate: float = 0.0,
    seed: int = 1,
    timeout_cycles: int | None = None,
    waves: bool = False,
    run_dir: Path | str | None = None,
    image: Path | str | None = None,
    start_timeout_s: float = 1800.0,
    silence_s: float = 15.0,
    on_progress: Progress | None = None,
) -> SimTransport:
    """Build the simulation of a configuration unless it is there, start it, and return when the drive is ready.

    Its flash is erased, unless it has an `image`.  Close the transport at the end; a process that ends without takes
    the simulator with it.

    Args:
        simulator: `verilator`, or `icarus`, which needs no C++ compiler and is a hundred times slower.
        config: what to simulate.
        memory_bytes: size of the host memory, in whole lines of 64 bytes.
        dram_bytes: size of device DRAM; 16 MiB under Verilator, 1 MiB under Icarus by default.
        frames: pages whose contents each channel's flash can keep, fewer than it has; 128 MiB or 2 MiB of pages in all
            by default.
        flash: `nand`, the whole drive with dies behind its controllers, or `ideal`, the engine alone with flash that
            is always in time.
        bit_error_rate: raw bit errors of each read of a die, over bits read.
        seed: of the bit errors.
        timeout_cycles: cycles after which `wait` gives up, besides the caller's seconds.
        waves: record waves to `run_dir`; slow.
        run_dir: where the simulator runs, a directory that stays; a temporary one by default.
        image: a file with the flash's contents: read at the start if it is there, written at the end, also if this
            process is killed (but not if the simulator is); only one simulator uses it at a time.
        start_timeout_s: seconds that build and start may take.
        silence_s: seconds without a message after which a busy simulator counts as lost; it sends four a second.
        on_progress: called with a line about every second until the drive is ready.

    Raises:
        RequestError: the simulator or the kind of flash does not exist, a size is not positive, waves would be lost,
            kvattic_sim is not installed, or no directory can hold the socket to the simulator's process.
        CapacityError: this machine does not have that much memory.
        DeviceLostError: the build failed, or the simulator did not start.
    """
    if simulator not in SIMULATORS:
        raise RequestError(f"there is no simulator {simulator!r}; simulators are {', '.join(SIMULATORS)}")
    if flash not in ("nand", "ideal"):
        raise RequestError(f"flash must be 'nand' or 'ideal', not {flash!r}")
    if memory_bytes < 64 or memory_bytes % 64:
        raise RequestError(f"memory_bytes must be a positive multiple of 64, not {memory_bytes}")
    for name, value in (("dram_bytes", dram_bytes), ("frames", frames), ("timeout_cycles", timeout_cycles)):
        if value is not None and value < 1:
            raise RequestError(f"{name} must be positive, not {value}")
    for name, seconds in (("start_timeout_s", start_timeout_s), ("silence_s", silence_s)):
        if not 0 < seconds < math.inf:
            raise RequestError(f"{name} must be a positive number of seconds, not {seconds}")
    if not 0 <= bit_error_rate < 1 or (bit_error_rate and flash == "ideal"):
        raise RequestError(f"bit_error_rate must be 0 to 1, and 0 with ideal flash, not {bit_error_rate}")
    if image is not None and flash == "ideal":
        raise RequestError("ideal flash has no image: it must be 'nand'")
    if waves and run_dir is None:
        raise RequestError("waves need a run_dir, where they stay")
    request = {
        "simulator": simulator,
        "config": config.to_json(),
        "memory_bytes": memory_bytes,
        "dram_bytes": dram_bytes,
        "frames": frames,
        "flash": flash,
        "bit_error_rate": bit_error_rate,
        "seed": seed,
        "timeout_cycles": timeout_cycles,
        "waves": waves,
        "image": None if image is None else str(Path(image).resolve()),
        "run_dir": None if run_dir is None else str(Path(run_dir).resolve()),
    }
    return SimTransport(config, memory_bytes=memory_bytes, request=request, silence_s=silence_s,
                        start_timeout_s=start_timeout_s, on_progress=on_progress)
