"""The process between a host and a simulator: `python -m kvattic_sim.rtl.server DIRECTORY`.

Started by `kvattic.transport.simulator.open_simulator`, which waits at the socket in the directory, next to a request.
It builds the model, starts the simulator, whose Python (kvattic_sim.rtl.cocotb_server) connects to the host by itself,
and then watches both: when the simulator ends, it tells the host why; when the host ends, it ends everything and
removes the directory.  On Linux the simulator dies when this process does.

`serve` is what the simulator's side does: it lives here because it needs no simulator.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from kvattic.errors import DeviceTimeoutError, RequestError
from kvattic.spec.config import Config
from kvattic.spec.registers import REGISTERS
from kvattic.transport.base import Transport
from kvattic.transport.protocol import (
    MAX_PAYLOAD,
    REQUEST,
    Connection,
    Failure,
    Kind,
    Message,
    ProtocolError,
    Role,
    connect,
)
from kvattic_sim.simulators.build import Model, SimulationFailed, Simulator, SimulatorError, start_model

__all__ = ["DIRECTORY", "Served", "load_request", "main", "serve"]

DIRECTORY = "KVATTIC_SIM_DIRECTORY"
"""Environment variable that tells the simulator's Python the directory."""
POLL_S = 0.2
GRACE_S = 3.0
"""How long the simulator may take to end by itself when the host is gone, so that its waves are complete."""
IMAGE_GRACE_S = 60.0
"""The same, if it keeps its flash in a file."""
BEAT_S = 0.25

_NAMES = {register.address: register.name for register in REGISTERS}


class Served(Transport, Protocol):
    """What `serve` needs of a `kvattic_sim.rtl.transport.RtlTransport`."""

    heartbeat: Callable[[int], None] | None

    @property
    def cycles(self) -> int:
        """Cycles since the start."""
        ...


class _NextRequestError(Exception):
    """The host did not wait for the end of a WAIT."""


# ---------------------------------------------------------------- the simulator's side


def serve(connection: Connection, transport: Served) -> None:
    """Answer the host's requests until it closes the connection.

    Simulated time stands still while this waits for a request.

    Raises:
        ProtocolError: a request that this side does not understand; the host gets FAILED first.
        OSError: the host is gone in the middle of a request.
        Exception: the simulation failed; the host gets FAILED first.
    """
    last = 0.0

    def beat(cycles: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= BEAT_S:
            last = now
            connection.send(Kind.HEARTBEAT, cycles=cycles)
        if connection.pending:
            raise _NextRequestError

    transport.heartbeat = beat
    while (message := connection.receive()) is not None:
        last = time.monotonic()
        kind, payload, failure = Kind.DONE, b"", None
        try:
            kind, payload = _answer(message, transport)
        except _NextRequestError:
            pass
        except RequestError as error:
            kind, payload = _failed(Failure.REQUEST, error)
        except DeviceTimeoutError as error:
            kind, payload = _failed(Failure.TIMEOUT, error)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - raised below
            failure = error
            kind, payload = _failed(Failure.LOST, error)
        connection.send(kind, message.number, payload, cycles=transport.cycles)
        if failure is not None:
            raise failure


def _failed(failure: Failure, error: Exception) -> tuple[Kind, bytes]:
    return Kind.FAILED, struct.pack("<H", failure) + str(error).encode()[: MAX_PAYLOAD // 2]


def _answer(message: Message, transport: Served) -> tuple[Kind, bytes]:
    """Do what one request asks for."""
    kind, payload = message.kind, message.payload
    if kind is Kind.READ_REGISTER:
        (address,) = message.unpack("<I")
        return Kind.VALUE, struct.pack("<Q", transport.read_register(_name(address)))
    if kind is Kind.WRITE_REGISTER:
        address, value = message.unpack("<IQ")
        transport.write_register(_name(address), value)
    elif kind is Kind.READ_DRAM:
        address, size = message.unpack("<QQ")
        if size > MAX_PAYLOAD:
            raise ProtocolError(f"READ_DRAM of {size} bytes: {MAX_PAYLOAD} go in one message")
        return Kind.DATA, transport.read_dram(address, size)
    elif kind is Kind.WRITE_DRAM:
        if len(payload) < 8:
            raise ProtocolError(f"WRITE_DRAM has 8 bytes or more, not {len(payload)}")
        transport.write_dram(int.from_bytes(payload[:8], "little"), payload[8:])
    elif kind is Kind.WAIT:
        (timeout_s,) = message.unpack("<d")
        transport.wait(timeout_s)
    else:
        raise ProtocolError(f"{kind.name} is no request")
    return Kind.DONE, b""


def _name(address: int) -> str:
    try:
        return _NAMES[address]
    except KeyError:
        raise ProtocolError(f"there is no register at {address:#x}") from None


# ---------------------------------------------------------------- the server's process


def load_request(directory: Path) -> dict[str, Any]:
    """What the host asks for (see `kvattic.transport.simulator.open_simulator`); `config` is a `Config` already."""
    request: dict[str, Any] = json.loads((directory / REQUEST).read_text())
    return request | {"config": Config.from_json(request["config"])}


class _HostGoneError(Exception):
    """Nobody is interested any more."""


class _Host:
    """The connection to the host, which says nothing but can end."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._parent = os.getppid()

    def watch(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            _HostGoneError: the host is gone.
        """
        # A child that the host forked may hold the connection open.
        if os.getppid() != self._parent or (
                select.select([self.connection.socket], [], [], seconds)[0] and self.connection.ended):
            raise _HostGoneError

    def tell(self, kind: Kind, text: str) -> None:
        try:
            # Paths may contain bytes that are not text.
            self.connection.send(kind, payload=text.encode(errors="surrogateescape")[:MAX_PAYLOAD], timeout_s=10)
        except OSError:
            raise _HostGoneError from None


def _build(request: dict[str, Any], host: _Host) -> Model:
    """The model, built in a thread, so that the host's end is noticed."""
    from kvattic_sim.rtl.testbench import Flash, build_testbench

    result: list[Model | Exception] = []

    def work() -> None:
        try:
            result.append(build_testbench(
                request["config"], request["simulator"], Flash(request["flash"]), waves=request["waves"],
                frames=request["frames"], dram_bytes=request["dram_bytes"]))
        except Exception as error:  # noqa: BLE001 - raised below
            result.append(error)

    begin = told = time.monotonic()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        host.watch(POLL_S)
        if (now := time.monotonic()) - told >= 1:
            told = now
            host.tell(Kind.PROGRESS, f"building the model for {request['simulator']}: {now - begin:.0f} s")
    (found,) = result
    if isinstance(found, Exception):
        raise found
    return found


def _run(model: Model, request: dict[str, Any], directory: Path, host: _Host) -> None:
    """The simulator, until it ends or the host does."""
    run_dir = Path(request["run_dir"]) if request["run_dir"] else directory / "run"
    # The thread that starts it must stay, which this, the main one, does: see `Simulation`.
    with start_model(model, test_module="kvattic_sim.rtl.cocotb_server", env={DIRECTORY: str(directory)},
                     run_dir=run_dir, waves=request["waves"]) as simulation:
        try:
            host.tell(Kind.STARTED, str(simulation.log))
            while simulation.running:
                host.watch(POLL_S)
        except _HostGoneError:
            deadline = time.monotonic() + (IMAGE_GRACE_S if request["image"] else GRACE_S)
            while simulation.running and time.monotonic() < deadline:
                time.sleep(0.02)
            raise
        try:
            simulation.wait(1)
            text = "the simulator ended before the host asked for it"
        except (SimulatorError, SimulationFailed) as error:
            text = str(error)
        host.tell(Kind.ENDED, text)


def main(arguments: list[str]) -> int:
    """Serve one host; the process's status."""
    directory = Path(arguments[0])
    try:
        host = _Host(connect(directory, Role.SERVER))
    except OSError as error:
        print(f"nobody waits at {directory}: {error}", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        return 1
    try:
        request = load_request(directory)
        host.tell(Kind.PROGRESS, f"building the model for {Simulator(request['simulator'])}")
        _run(_build(request, host), request, directory, host)
    except _HostGoneError:
        shutil.rmtree(directory, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)    # with a compiler that may still run
    except Exception as error:  # noqa: BLE001 - the host's
        with contextlib.suppress(OSError):      # a disk may be full
            traceback.print_exc()
        with contextlib.suppress(_HostGoneError):
            host.tell(Kind.ENDED, str(error) or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
