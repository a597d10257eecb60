"""A simulation server without a simulator, for test_sim_transport: `python fake_server.py MODE DIRECTORY`.

The golden device stands for the drive; MODE says what goes wrong.
"""

import mmap
import os
import struct
import sys
import time
from pathlib import Path

from kvattic.errors import DeviceTimeoutError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY
from kvattic.transport.protocol import MAGIC, PROTOCOL, SOCKET, Connection, Kind, Role, connect
from kvattic_sim.rtl.server import load_request, serve

DRAM_BYTES = 1 << 23
TURN_S = 0.02


class FakeDrive(GoldenDevice):
    """A golden device that takes its time in `wait`, and breaks where it is told to."""

    def __init__(self, mode: str, memory: mmap.mmap, connection: Connection) -> None:
        super().__init__(TINY, memory_bytes=len(memory), dram_bytes=DRAM_BYTES)
        self.memory.data = memory
        self.mode = mode
        self.connection = connection
        self.cycles = 0
        self.heartbeat = None

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`; TIMEOUT makes what MODE says happen."""
        self.cycles += 10
        if name == "TIMEOUT":
            match self.mode:
                case "die":
                    os._exit(3)
                case "silent":
                    time.sleep(600)
                case "defect":
                    raise ValueError("the NAND models saw violations")
                case "garbage":
                    self.connection.socket.setblocking(True)
                    self.connection.socket.sendall(b"GET / HTTP/1.0\r\n\r\n" * 4)
                case "cut":
                    self.connection.socket.sendall(MAGIC)
                    os._exit(0)
                case "wrong answer":
                    self.connection.send(Kind.VALUE, value, bytes(8))
                case "short answer":
                    self.connection.send(Kind.FAILED, value, b"\x09")
        super().write_register(name, value)

    def read_register(self, name: str) -> int:
        """See `Transport`."""
        if self.mode == "short value" and name == "TIMEOUT":
            self.connection.send(Kind.VALUE, 2, bytes(7))
        return super().read_register(name)

    def wait(self, timeout_s: float) -> None:
        """See `Transport`; with heartbeats."""
        turns = 0
        while True:
            try:
                return super().wait(timeout_s)
            except DeviceTimeoutError:
                # Turns are counted, so that a slow machine has as many chances to beat.
                if turns * TURN_S > timeout_s:
                    raise
            time.sleep(TURN_S)
            turns += 1
            self.cycles += 1000
            self.heartbeat(self.cycles)


def main(mode: str, directory: Path) -> None:
    """Be the server and the simulator in one."""
    if mode == "crash":
        sys.exit("no such luck")
    if mode == "stranger":
        import socket

        stream = socket.socket(socket.AF_UNIX)
        stream.connect(str(directory / SOCKET))
        stream.sendall(b"x" * 64)
        time.sleep(600)
    if mode == "old":
        import kvattic.transport.protocol

        kvattic.transport.protocol.PROTOCOL = PROTOCOL - 1
    server = connect(directory, Role.SERVER)
    server.send(Kind.PROGRESS, payload=b"building")
    request = load_request(directory)
    assert request["config"] == TINY
    if mode == "no build":
        server.send(Kind.ENDED, payload=b"Verilator is not installed")
        return
    log = directory / "simulation.log"
    log.write_text("a line of the log\n")
    server.send(Kind.STARTED, payload=os.fsencode(log))
    if mode == "never ready":
        time.sleep(600)
    connection = connect(directory, Role.SIMULATOR)
    message, (file,) = connection.receive_files(1)
    (size,) = message.unpack("<Q")
    drive = FakeDrive(mode, mmap.mmap(file, size), connection)
    connection.send(Kind.READY, payload=struct.pack("<Q", drive.dram_bytes), cycles=7)
    try:
        serve(connection, drive)
    except ValueError:
        server.send(Kind.ENDED, payload=b"the simulator ended (status 1)")
        raise


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
