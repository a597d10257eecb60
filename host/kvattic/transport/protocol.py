"""The messages between the host and a simulated drive: what both sides share.

A message is a header, `HEADER`, and a payload of plain structs (`Message`).  They go over a Unix socket in a directory
that both sides know.  The host's side is in simulator.py, the other one in kvattic_sim.rtl.server and
kvattic_sim.rtl.cocotb_server.
"""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from kvattic.errors import DeviceLostError, DeviceTimeoutError, KvatticError, RequestError

__all__ = [
    "FAILURES",
    "HEADER",
    "MAGIC",
    "MAX_PAYLOAD",
    "PROTOCOL",
    "REQUEST",
    "SOCKET",
    "Connection",
    "Failure",
    "Kind",
    "Message",
    "ProtocolError",
    "Role",
    "connect",
]

PROTOCOL = 1
"""Version of the messages; the two sides must agree."""
HEADER = struct.Struct("<4sHHQIQ")
"""Of a message: `MAGIC`, kind, 0, number of the request, bytes of the payload, cycles simulated so far."""
MAGIC = b"KVSM"
MAX_PAYLOAD = 1 << 22
"""Bytes of a payload, at most; what is longer goes in parts."""
SOCKET, REQUEST = "socket", "request.json"
"""Files in the directory that host and server share."""


class Role(IntEnum):
    """The sender of HELLO."""

    SERVER = 1
    SIMULATOR = 2


class Kind(IntEnum):
    """Kinds of messages, with their payloads."""

    HELLO = 1
    """First message of either connection: u16 role, u16 `PROTOCOL`."""
    PROGRESS = 2
    """Server: a line of text, UTF-8."""
    STARTED = 3
    """Server: the simulator runs; path of its log, UTF-8."""
    ENDED = 4
    """Server: the simulator could not be started, or has ended; why, UTF-8."""
    MEMORY = 5
    """Host, once: u64 size of host memory; the file comes along as ancillary data."""
    READY = 6
    """Simulator, once: the drive is reset; u64 size of device DRAM."""
    READ_REGISTER = 16
    """Host: u32 address.  The answer is VALUE."""
    WRITE_REGISTER = 17
    """Host: u32 address, u64 value.  The answer is DONE."""
    READ_DRAM = 18
    """Host: u64 address, u64 size.  The answer is DATA."""
    WRITE_DRAM = 19
    """Host: u64 address, then the bytes.  The answer is DONE."""
    WAIT = 20
    """Host: f64 seconds.  The answer is DONE.  Any further request ends it with DONE as well."""
    DONE = 32
    VALUE = 33
    """u64."""
    DATA = 34
    """Bytes."""
    FAILED = 35
    """u16 `Failure`, then the message, UTF-8."""
    HEARTBEAT = 36
    """Simulator: it works on a request.  Nothing."""


class Failure(IntEnum):
    """The exceptions that FAILED stands for."""

    REQUEST = 1
    TIMEOUT = 2
    LOST = 3


FAILURES: dict[Failure, type[KvatticError]] = {
    Failure.REQUEST: RequestError, Failure.TIMEOUT: DeviceTimeoutError, Failure.LOST: DeviceLostError}


class ProtocolError(Exception):
    """What came over the socket is not a message."""


class Message(NamedTuple):
    """One message; the answer to a request has its number."""

    kind: Kind
    number: int
    payload: bytes
    cycles: int

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The payload as a struct.

        Raises:
            ProtocolError: it has another size.
        """
        if len(self.payload) != struct.calcsize(layout):
            raise ProtocolError(f"{self.kind.name} has {struct.calcsize(layout)} bytes, not {len(self.payload)}")
        return struct.unpack(layout, self.payload)

    @property
    def text(self) -> str:
        """The payload as text."""
        return self.payload.decode(errors="replace")


class Connection:
    """Messages over a stream socket.

    A call that is interrupted, by Ctrl-C for instance, loses nothing: what was not sent yet goes first the next time,
    and what was received stays.

    Attributes:
        socket: the socket.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.socket = stream
        stream.setblocking(False)
        self._unsent = memoryview(b"")
        self._received = bytearray()

    def drop(self) -> None:
        """Close this process's descriptor only: the other side sees no end while another process has one."""
        self.socket.close()

    def close(self) -> None:
        """Let the other side see the end; also wakes a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"", *, cycles: int = 0,
             timeout_s: float | None = None, files: Sequence[int] = ()) -> None:
        """Send a message.

        Args:
            kind: what it is.
            number: of the request that it is, or answers.
            payload: `MAX_PAYLOAD` bytes, at most.
            cycles: see `HEADER`.
            timeout_s: seconds that the other side may take nothing; None: any time.
            files: descriptors that go along, with a message without a predecessor that waits.

        Raises:
            OSError: the connection is lost.
            TimeoutError: nothing was taken in that time.
        """
        message = HEADER.pack(MAGIC, kind, 0, number, len(payload), cycles) + payload
        if files:
            sent = socket.send_fds(self.socket, [message], list(files))
            message = message[sent:]
        self._unsent = memoryview(bytes(self._unsent) + message) if self._unsent else memoryview(message)
        while self._unsent:
            if not select.select([], [self.socket], [], timeout_s)[1]:
                raise TimeoutError(f"nothing was taken for {timeout_s:g} s")
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.socket.send(self._unsent):]

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None where the connection ends.

        Raises:
            TimeoutError: nothing came in that time.
            ProtocolError: what came is not a message.
            OSError: the connection is lost.
        """
        while (message := self._take()) is None:
            if not self._has(timeout_s):
                raise TimeoutError(f"nothing came for {timeout_s:g} s")
            try:
                part = self.socket.recv(1 << 18)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                if self._received:
                    raise ProtocolError(f"the connection ended inside of a message, after {len(self._received)} bytes")
                return None
            self._received += part
        return message

    def receive_files(self, count: int) -> tuple[Message, list[int]]:
        """The first message of a connection, with its files.

        Raises:
            ProtocolError: it is not a message, or has another number of files.
        """
        select.select([self.socket], [], [])
        part, files, _, _ = socket.recv_fds(self.socket, HEADER.size, count)
        self._received += part
        message = self.receive()
        if message is None or len(files) != count:
            raise ProtocolError(f"a message with {count} files must come, not {message} with {len(files)}")
        return message, files

    def _has(self, timeout_s: float | None) -> bool:
        # A socket that was closed by another thread has no descriptor.
        if self.socket.fileno() < 0:
            raise ConnectionResetError("the connection is closed")
        return bool(select.select([self.socket], [], [], timeout_s)[0])

    def _take(self) -> Message | None:
        if len(self._received) < HEADER.size:
            return None
        magic, kind, zero, number, size, cycles = HEADER.unpack_from(self._received)
        if magic != MAGIC or zero or size > MAX_PAYLOAD or kind not in Kind.__members__.values():
            raise ProtocolError(f"no message begins with {bytes(self._received[: HEADER.size]).hex()}")
        end = HEADER.size + size
        if len(self._received) < end:
            return None
        payload = bytes(self._received[HEADER.size : end])
        del self._received[:end]
        return Message(Kind(kind), number, payload, cycles)

    @property
    def pending(self) -> bool:
        """Whether `receive` would return at once, with a message or at the end."""
        return len(self._received) >= HEADER.size or self._has(0)

    @property
    def ended(self) -> bool:
        """Whether the other side is gone and all its messages were taken."""
        try:
            return not self._received and self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def connect(directory: Path, role: Role) -> Connection:
    """The server's or the simulator's connection to the host.

    Args:
        directory: what host and server share.
        role: who connects.

    Raises:
        OSError: the host is not there.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.connect(os.fsencode(directory / SOCKET))
    connection = Connection(stream)
    connection.send(Kind.HELLO, payload=struct.pack("<HH", role, PROTOCOL))
    return connection
