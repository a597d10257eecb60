"""The way to a card: regular files show offsets and sizes; a golden device behind four files shows the use."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from tests.host.golden.queue_host import Host
from tests.host.transport.forked import in_child

from kvattic.errors import DeviceLostError, DeviceTimeoutError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import DATA_COMMAND, Opcode, Status
from kvattic.spec.config import TINY, Config
from kvattic.spec.registers import ID_MAGIC, REGISTERS
from kvattic.transport import mmio as mmio_transport
from kvattic.transport.mmio import BOUNCE_BYTES, Use, open_mmio

MEMORY_BASE, MEMORY, DRAM_BASE, DRAM = 0x3000, 1 << 16, 0x80_0000, 1 << 22
WINDOWS = {"memory_base": MEMORY_BASE, "memory_bytes": MEMORY, "dram_base": DRAM_BASE, "dram_bytes": DRAM}


# ---------------------------------------------------------------- regular files


class Card:
    """Files that are there, and what is in them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "xdma0"
        self.registers = folder / "xdma0_user"
        self.memory = folder / "xdma0_h2c_0"
        self.registers.write_bytes(bytes(1 << 16))
        with self.memory.open("wb") as file:
            file.truncate(DRAM_BASE + DRAM)
        (folder / "xdma0_c2h_0").symlink_to(self.memory)
        os.mkfifo(folder / "xdma0_events_0")
        self.events = os.open(folder / "xdma0_events_0", os.O_RDWR)
        self.put(0, ID_MAGIC)

    def put(self, address: int, value: int) -> None:
        with self.registers.open("r+b") as file:
            file.seek(address)
            file.write(value.to_bytes(4, "little"))

    def get(self, address: int) -> int:
        return int.from_bytes(self.registers.read_bytes()[address : address + 4], "little")


@pytest.fixture
def card(tmp_path):
    card = Card(tmp_path)
    yield card
    os.close(card.events)


@pytest.mark.parametrize("mapped", [False, True])
def test_registers_lie_where_the_map_says(card, mapped):
    with open_mmio(card.path, TINY, map_registers=mapped, **WINDOWS) as transport:
        assert transport.read_register("ID") == ID_MAGIC
        for number, register in enumerate(REGISTERS):
            value = (0x1122_3344_5566_7700 + number) & (1 << register.width) - 1
            transport.write_register(register.name, value)
            assert transport.read_register(register.name) == value
            assert card.get(register.address) == value & 0xFFFF_FFFF
            if register.width == 64:
                assert card.get(register.address + 4) == 0x1122_3344


@pytest.mark.parametrize("size", [0, 1, 64, 4095, 4097, 3 * BOUNCE_BYTES + 5])
@pytest.mark.parametrize("address", [0, 1, 77, 4096])
def test_memory_lies_in_the_windows(card, size, address):
    data = os.urandom(size)
    with open_mmio(card.path, TINY, **WINDOWS) as transport:
        assert (transport.memory_bytes, transport.dram_bytes) == (MEMORY, DRAM)
        transport.write_dram(address, data)
        assert transport.read_dram(address, size) == data
        with card.memory.open("rb") as file:
            file.seek(DRAM_BASE + address - 1)
            assert file.read(size + 2) == b"\0" + data + b"\0"
            part = data[: MEMORY - address]
            transport.write_memory(address, part)
            assert transport.read_memory(address, len(part)) == part
            file.seek(MEMORY_BASE + address - 1)
            assert file.read(len(part) + 2) == b"\0" + part + b"\0"


def test_wait_needs_the_line_and_not_the_event(card, monkeypatch):
    monkeypatch.setattr(mmio_transport, "LOOK_S", 3600.0)   # it wakes by the event, or not at all
    with open_mmio(card.path, TINY, **WINDOWS) as transport:
        os.write(card.events, b"\1\0\0\0")      # an event of something that was taken already
        with pytest.raises(DeviceTimeoutError) as caught:
            transport.wait(0.2)
        assert str(caught.value) == ("the card raised no interrupt in 0.2 s: INTERRUPTS is 0x0, INTERRUPT_MASK 0x0")
        transport.write_register("INTERRUPT_MASK", 6)
        transport.write_register("INTERRUPTS", 1)
        with pytest.raises(DeviceTimeoutError):
            transport.wait(0)
        transport.write_register("INTERRUPTS", 3)
        transport.wait(0)
        transport.write_register("INTERRUPTS", 0)

        def rise():
            time.sleep(0.2)
            card.put(0x28, 2)
            os.write(card.events, b"\1\0\0\0")

        thread = threading.Thread(target=rise)
        thread.start()
        transport.wait(300)
        thread.join()


def test_wait_without_events_asks_the_registers(card):
    with open_mmio(card.path, TINY, event=None, **WINDOWS) as transport:
        transport.write_register("INTERRUPT_MASK", 1)
        threading.Timer(0.1, lambda: card.put(0x28, 1)).start()
        transport.wait(300)


def test_other_names(card, tmp_path):
    for old, new in (("user", "bar"), ("h2c_0", "down"), ("c2h_0", "up")):
        (tmp_path / f"xdma0_{old}").rename(tmp_path / new)
    (tmp_path / "up").unlink()
    (tmp_path / "up").symlink_to(tmp_path / "down")
    with open_mmio("/nowhere", TINY, registers=tmp_path / "bar", to_card=tmp_path / "down", from_card=tmp_path / "up",
                   event=None, **WINDOWS) as transport:
        assert transport.read_register("ID") == ID_MAGIC
        transport.write_memory(5, b"abc")
        assert transport.read_memory(5, 3) == b"abc"


def test_a_card_that_is_not_there(card, tmp_path):
    (tmp_path / "xdma0_c2h_0").unlink()
    count = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RequestError, match=r"cannot open .*/xdma0_c2h_0, the card's from card: No such file"):
        open_mmio(card.path, TINY, **WINDOWS)
    assert len(os.listdir("/proc/self/fd")) == count    # those that were opened before are closed


def test_close(card):
    count = len(os.listdir("/proc/self/fd"))
    transport = open_mmio(card.path, TINY, **WINDOWS)
    transport.close()
    transport.close()
    assert len(os.listdir("/proc/self/fd")) == count
    for call in (lambda: transport.read_register("ID"), lambda: transport.write_register("CONTROL", 1),
                 lambda: transport.read_memory(0, 0), lambda: transport.write_dram(0, b""), lambda: transport.wait(1)):
        with pytest.raises(RequestError, match="the card is closed"):
            call()


@pytest.mark.parametrize(("call", "text"), [
    (lambda t: t.read_register("NO"), "there is no register 'NO'; registers are ID, VERSION"),
    (lambda t: t.write_register("CONTROL", 1 << 32), "CONTROL has 32 bits: 0x100000000 does not fit"),
    (lambda t: t.read_memory(MEMORY - 1, 2), "host memory is 0 to 0x10000: 2 bytes at 0xffff are not in it"),
    (lambda t: t.write_memory(-1, b"x"), "host memory is 0 to 0x10000: 1 bytes at -0x1 are not in it"),
    (lambda t: t.read_dram(DRAM, 1), "device DRAM is 0 to 0x400000: 1 bytes at 0x400000 are not in it"),
    (lambda t: t.write_dram(DRAM, b"x"), "device DRAM is 0 to 0x400000: 1 bytes at 0x400000 are not in it"),
])
def test_bad_arguments(card, call, text):
    with open_mmio(card.path, TINY, **WINDOWS) as transport, pytest.raises(RequestError) as caught:
        call(transport)
    assert text in str(caught.value)


@pytest.mark.parametrize(("options", "text"), [
    ({"memory_base": 0x100}, "memory_base must be a multiple of 0x1000, not 0x100"),
    ({"dram_base": -0x1000}, "dram_base must be a multiple of 0x1000, not -0x1000"),
    ({"memory_bytes": 65}, "memory_bytes must be a positive multiple of 64, not 65"),
    ({"dram_bytes": 0}, "dram_bytes must be positive, not 0"),
    ({"memory_base": DRAM_BASE - 0x1000},
     "must not overlap: host memory 0x7ff000 to 0x80f000, device DRAM 0x800000 to 0xc00000"),
])
def test_bad_windows(options, text):
    with pytest.raises(RequestError) as caught:
        open_mmio("/nowhere", TINY, **{**WINDOWS, **options})
    assert text in str(caught.value)


# ---------------------------------------------------------------- a golden device behind the files


class StandIn:
    """A card: the golden device, whose host memory and DRAM are windows of the card's memory.

    Like the driver, it takes registers 32 bits at a time, remembers that there was an interrupt until that is read,
    and may move fewer bytes than were asked for.
    """

    def __init__(self) -> None:
        self.device = GoldenDevice(TINY, memory_bytes=MEMORY, dram_bytes=DRAM)
        self.device.write_register("CONTROL", 0)
        self.line = False
        self.event = threading.Event()
        self.low: dict[str, int] = {}
        self.names = {r.address + offset: (r, offset) for r in REGISTERS for offset in range(0, r.width // 8, 4)}
        self.gone = False
        self.error: OSError | None = None
        self.opened: list[str] = []

    def open(self, path: Path, use: Use) -> "StandInFile":
        self.opened.append(path.name)
        return StandInFile(self, use)

    def watch(self) -> None:
        """An interrupt is a rise of the line."""
        device = self.device
        line = bool(device.read_register("INTERRUPTS") & device.read_register("INTERRUPT_MASK"))
        if line and not self.line:
            self.event.set()
        self.line = line

    def place(self, offset: int):
        """Which window, and where in it."""
        if MEMORY_BASE <= offset < MEMORY_BASE + MEMORY:
            return self.device.read_memory, self.device.write_memory, offset - MEMORY_BASE
        assert DRAM_BASE <= offset < DRAM_BASE + DRAM, hex(offset)
        return self.device.read_dram, self.device.write_dram, offset - DRAM_BASE


class StandInFile:
    def __init__(self, card: StandIn, use: Use) -> None:
        self.card = card
        self.use = use

    def read(self, offset: int, size: int) -> bytes:
        card = self.card
        if card.error:
            raise card.error
        if self.use is Use.EVENTS:
            assert card.event.wait(300)
            card.event.clear()
            return b"\1\0\0\0"
        if self.use is Use.REGISTERS:
            assert size == 4
            if card.gone:
                return b"\xff" * 4
            register, part = card.names[offset]
            return (card.device.read_register(register.name) >> 8 * part & 0xFFFF_FFFF).to_bytes(4, "little")
        assert self.use is Use.FROM_CARD
        read, _, at = card.place(offset)
        return read(at, min(size, 1000))

    def write(self, offset: int, data: memoryview) -> int:
        card = self.card
        if card.error:
            raise card.error
        if self.use is Use.TO_CARD:
            _, write, at = card.place(offset)
            write(at, bytes(data[:1000]))
            return len(data[:1000])
        assert self.use is Use.REGISTERS
        assert len(data) == 4
        register, part = card.names[offset]
        value = int.from_bytes(data, "little")
        if part == 0:
            card.low[register.name] = value
        if part == 4:
            value = value << 32 | card.low[register.name]
        if part or register.width == 32:
            card.device.write_register(register.name, value)
            card.watch()
        return 4

    def poll(self, timeout_s: float) -> bool:
        return self.card.event.wait(timeout_s)

    def close(self) -> None:
        self.use = None


@pytest.fixture
def stand_in():
    return StandIn()


@pytest.fixture
def transport(stand_in):
    with open_mmio("/dev/xdma3", TINY, channel=1, event=2, opener=stand_in.open, **WINDOWS) as transport:
        yield transport


def test_a_card_serves_commands(stand_in, transport):
    assert stand_in.opened == ["xdma3_user", "xdma3_h2c_1", "xdma3_c2h_1", "xdma3_events_2"]
    host = Host(transport, rings=0, entries=4, window=(0x4000, 0x8000))
    host.admin()
    for identifier in range(9):
        (found,) = host.run(0, DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, identifier=identifier, result=0x4000))
        assert (found.status, found.identifier) == (Status.OK, identifier)
    assert Config.from_json(transport.read_memory(0x4000, 2048).rstrip(b"\0").decode()) == TINY


def test_a_line_that_stays_up_needs_no_second_event(stand_in, transport):
    host = Host(transport, rings=0, entries=8, window=(0x4000, 0x8000))
    host.admin()
    host.push(0, *[DATA_COMMAND.pack(opcode=Opcode.IDENTIFY, identifier=i, result=0x4000) for i in range(3)])
    host.ring(0)
    transport.wait(300)
    transport.wait(300)
    assert len(host.reap(0)) == 3
    with pytest.raises(DeviceTimeoutError):
        transport.wait(0.1)


def test_a_card_that_falls_off_the_bus(stand_in, transport):
    stand_in.gone = True
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="the card is lost: INTERRUPTS and ID read as 0xffffffff"):
            transport.wait(5)
    stand_in.gone = False
    with pytest.raises(DeviceLostError, match="the card is lost: INTERRUPTS"):
        transport.read_memory(0, 4)


def test_a_register_may_hold_ones(transport):
    transport.write_register("ADMIN_BASE", (1 << 64) - 1)
    assert transport.read_register("ADMIN_BASE") == (1 << 64) - 1


@pytest.mark.parametrize(("call", "text"), [
    (lambda t: t.read_register("STATUS"), "/dev/xdma3_user at 0x10: No such device"),
    (lambda t: t.write_register("ADMIN_BASE", 1), "/dev/xdma3_user at 0x40: No such device"),
    (lambda t: t.read_memory(64, 4), "/dev/xdma3_c2h_1 at 0x3040: No such device"),
    (lambda t: t.write_dram(1, b"x"), "/dev/xdma3_h2c_1 at 0x800001: No such device"),
])
def test_an_error_of_the_driver_means_that_the_card_is_lost(stand_in, transport, call, text):
    stand_in.error = OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    with pytest.raises(DeviceLostError) as caught:
        call(transport)
    assert str(caught.value) == f"the card is lost: {text}"
    stand_in.error = None
    with pytest.raises(DeviceLostError):
        call(transport)


@pytest.mark.parametrize(("use", "call", "text"), [
    (Use.REGISTERS, lambda t: t.read_register("STATUS"), "xdma3_user at 0x10: a register has 4 bytes, not 0"),
    (Use.REGISTERS, lambda t: t.write_register("CONTROL", 1), "xdma3_user at 0xc: a register has 4 bytes, not 0"),
    (Use.FROM_CARD, lambda t: t.read_dram(0, 9), "xdma3_c2h_1 at 0x800000: 9 bytes were asked for, none came"),
    (Use.TO_CARD, lambda t: t.write_memory(0, b"abc"), "xdma3_h2c_1 at 0x3000: none of 3 bytes was taken"),
    (Use.EVENTS, lambda t: t.wait(9), "xdma3_events_2 at 0x0: it ended"),
])
def test_files_that_end(stand_in, use, call, text):
    class Empty(StandInFile):
        def read(self, offset, size):
            return b""

        def write(self, offset, data):
            return 0

        def poll(self, timeout_s):
            return True

    def opener(path, wanted):
        return (Empty if wanted is use else StandInFile)(stand_in, wanted)

    with open_mmio("/dev/xdma3", TINY, channel=1, event=2, opener=opener, **WINDOWS) as transport, \
            pytest.raises(DeviceLostError, match=text):
        call(transport)


def test_close_while_another_thread_waits(transport):
    caught = []

    def wait():
        try:
            transport.wait(300)
        except RequestError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    transport.close()
    thread.join()
    assert caught == ["the card is closed"]


@pytest.mark.parametrize("locked", [False, True], ids=["", "in use"])
@pytest.mark.parametrize("call", [
    lambda t: t.read_register("ID"), lambda t: t.write_register("CONTROL", 1), lambda t: t.read_memory(0, 1),
    lambda t: t.write_memory(0, b"x"), lambda t: t.read_dram(0, 1), lambda t: t.write_dram(0, b"x"),
    lambda t: t.wait(600), lambda t: (t.close(), t.read_register("ID")),
])
def test_a_forked_child_is_refused_and_may_close(card, call, locked):
    with open_mmio(card.path, TINY, **WINDOWS) as transport:
        transport.write_memory(0, b"parent")
        held, release = threading.Event(), threading.Event()

        def hold():
            with transport._lock:
                held.set()
                release.wait()

        thread = threading.Thread(target=hold)
        if locked:
            thread.start()
            held.wait()
        said = in_child(lambda: call(transport))
        release.set()
        if locked:
            thread.join()
        assert said.startswith(f"ForkedError: the card belongs to process {os.getpid()}, which opened it")
        assert transport.read_memory(0, 6) == b"parent"
        assert transport.read_register("ID") == ID_MAGIC
