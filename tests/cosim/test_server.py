"""A simulated drive in a process of its own: used, closed, and killed from either side."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvattic.errors import DeviceLostError, DeviceTimeoutError, RequestError
from kvattic.spec.commands import DATA_COMMAND, Completion, Opcode, Status
from kvattic.spec.config import TINY, Config
from kvattic.spec.registers import StatusBit
from kvattic.transport.simulator import open_simulator
from kvattic_sim.simulators.build import icarus_available

MEMORY = 1 << 16
SECONDS = 300
"""In which whatever is left must end, on a slow machine, too."""


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(*pids: int) -> bool:
    """Whether processes end in time."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(params=["verilator", pytest.param("icarus", marks=[
    pytest.mark.icarus, pytest.mark.slow, pytest.mark.skipif(not icarus_available(), reason="needs Icarus Verilog")])])
def drive(request):
    """A transport that is open."""
    with open_simulator(request.param, TINY, memory_bytes=MEMORY) as transport:
        yield transport


@pytest.fixture
def verilated():
    """The same, under Verilator alone."""
    with open_simulator("verilator", TINY, memory_bytes=MEMORY) as transport:
        yield transport


def processes(transport) -> tuple[int, int]:
    """Process numbers of server and simulator."""
    server = transport._process._process.pid
    (simulator,) = children(server)
    return server, simulator


def identify(transport) -> Config:
    """Let the drive say what it is, by its admin queue."""
    transport.write_memory(0, DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, identifier=5, result=0x4000) + bytes(64 * 3))
    for name, value in (("SUBMISSION", 0), ("COMPLETION", 0x80), ("BASE", 0x4000), ("LIMIT", 0x8000), ("ENTRIES", 2)):
        transport.write_register(f"ADMIN_{name}", value)
    transport.write_register("INTERRUPT_MASK", 1)
    transport.write_register("SUBMISSION_TAIL_0", 1)
    transport.wait(SECONDS)
    found = Completion.unpack(transport.read_memory(0x80, 64))
    assert (found.status, found.identifier) == (Status.OK, 5)
    transport.write_register("COMPLETION_HEAD_0", 1)
    return Config.from_json(transport.read_memory(0x4000, 2048).rstrip(b"\0").decode())


def test_a_drive_is_used_and_closed(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pids = processes(drive)
    directory = drive._process.directory
    assert drive.read_register("CONFIG_HASH") == TINY.hash
    assert drive.read_register("STATUS") == StatusBit.READY
    assert identify(drive) == TINY
    data = os.urandom(5000)
    drive.write_dram(3, data)
    assert drive.read_dram(3, 5000) == data
    cycles = drive.cycles
    time.sleep(0.3)
    drive.read_memory(0, 64)
    drive.read_dram(0, 64)
    assert drive.cycles == cycles       # time stands still between two calls
    drive.close()
    assert gone(*pids)
    assert not directory.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RequestError, match="is closed"):
        drive.read_register("ID")


def test_runs_repeat_exactly():
    cycles = []
    for _ in range(2):
        with open_simulator("verilator", TINY, memory_bytes=MEMORY) as transport:
            identify(transport)
            transport.read_register("STATUS")
            cycles.append(transport.cycles)
    assert cycles[0] == cycles[1]


def test_wait_gives_up_and_beats(verilated):
    beats = []
    verilated.heartbeat = beats.append
    for seconds in (1.5, 15, 150):      # a slow machine needs more for the first one
        with pytest.raises(DeviceTimeoutError, match="raised no interrupt"):
            verilated.wait(seconds)
        if beats:
            break
    assert beats and beats == sorted(beats)
    assert identify(verilated) == TINY


@pytest.mark.parametrize("which", [0, 1], ids=["server", "simulator"])
def test_a_process_that_is_killed_in_a_wait_is_noticed(verilated, which):
    pids = processes(verilated)
    threading.Timer(0.5, lambda: os.kill(pids[which], signal.SIGKILL)).start()
    begin = time.monotonic()
    with pytest.raises(DeviceLostError, match=("signal 9", "status -9")[which]):
        verilated.wait(2 * SECONDS)
    assert time.monotonic() - begin < SECONDS
    assert gone(*pids)
    with pytest.raises(DeviceLostError):
        verilated.read_memory(0, 1)


def test_a_simulator_that_is_stuck_is_noticed(verilated):
    pids = processes(verilated)
    verilated.silence_s = 2.0
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(DeviceLostError, match="its process lives, but nothing came for 2 s"):
        verilated.read_register("STATUS")
    assert gone(*pids)


HOST = """
import sys
from kvattic.spec.config import TINY
from kvattic.transport.simulator import open_simulator
transport = open_simulator("verilator", TINY, memory_bytes=65536)
pid = transport._process._process.pid
print(pid, open(f"/proc/{pid}/task/{pid}/children").read(), transport._process.directory, flush=True)
transport.wait(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_host_that_ends_in_a_wait_takes_all_along(how):
    # Whoever runs the tests in the background may ignore SIGINT, and children inherit that.
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        server, simulator, directory = host.stdout.readline().split()
        assert alive(int(simulator))
        time.sleep(0.5)
        host.send_signal(how)
        assert host.wait(SECONDS) != 0
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    assert gone(int(server), int(simulator))
    end = time.monotonic() + SECONDS
    while Path(directory).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(directory).exists()


def test_a_run_directory_stays(tmp_path):
    with open_simulator("verilator", TINY, memory_bytes=MEMORY, flash="ideal", run_dir=tmp_path / "run") as transport:
        assert identify(transport) == TINY
    assert (tmp_path / "run" / "simulation.log").is_file()


def test_a_build_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceLostError, match=r"did not start: .*(compiler|Icarus)"):
        open_simulator("icarus", TINY, memory_bytes=MEMORY)
