"""An FPGA behind PCIe as a `Transport`: registers in a BAR, memory by the DMA engine of a Xilinx bridge.

    transport = open_mmio("/dev/xdma0", config, memory_base=0x0, dram_base=0x1_0000_0000)

The card is reached through the character devices of the XDMA driver (github.com/Xilinx/dma_ip_drivers), which it names
by the card's number; for /dev/xdma0:

========================  ============================================================================
/dev/xdma0_user           the bridge's AXI4-Lite master, on the engine's register port at address 0
/dev/xdma0_h2c_0          writes go to the card's memory, the offset being the AXI address
/dev/xdma0_c2h_0          reads from it
/dev/xdma0_events_0       readable once the user interrupt 0 came, which is the engine's `irq`
========================  ============================================================================

**Host memory is card memory.**  The engine's memory port is an AXI4 master, and this bridge gives a design no way into
the host's memory.  So queues, queries, tables and results lie in the card's own DRAM, in a window that the driver fills
and reads by DMA: the block design must let the engine's address 0 arrive where the bridge's DMA has `memory_base`, for
`memory_bytes`, and answer addresses behind it with an error.  In the same way address 0 of the engine's DRAM port is
`dram_base` of the bridge.  The driver's rules about order hold: a transfer to the card is over when its call returns,
so before any doorbell that is written afterwards; the engine's completion is in memory before its interrupt.

The interrupt line stays up until the host has taken what it tells of.  The bridge sends one message for each rise and
the driver remembers it; `wait` therefore looks at INTERRUPTS and INTERRUPT_MASK before it sleeps, and after it.

QDMA's driver names its devices differently and has no device for interrupts: give the names, `map_registers` with the
BAR's file in /sys/bus/pci/devices, and no events; `wait` then asks the registers again and again.

Nothing here was tried on a card: the tests have regular files, and a golden device behind the four files.
"""

import contextlib
import io
import mmap
import os
import select
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self, TypeAlias

from kvattic.errors import DeviceLostError, DeviceTimeoutError, RequestError
from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS, REGISTER_MAP
from kvattic.support.forks import Owner
from kvattic.transport.base import check_range, find_register

__all__ = ["CardFile", "MmioTransport", "Opener", "Use", "open_mmio"]

PAGE = 4096
BOUNCE_BYTES = 1 << 20
"""Of one transfer, at most."""
ALL_ONES = 0xFFFF_FFFF
"""What reads return when the card has left the bus."""
LOOK_S = 0.5
"""Seconds between two looks at the registers while sleeping for an interrupt: the card may go."""
POLL_S = 50e-6, 2e-3
"""Without interrupts, seconds between two looks: the first and the longest."""


class Use(StrEnum):
    """What one of the card's files is for."""

    REGISTERS = "registers"
    TO_CARD = "to_card"
    FROM_CARD = "from_card"
    EVENTS = "events"


class CardFile(Protocol):
    """One of the card's files.  An OSError of any call means that the card is gone."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, or fewer: registers 4, events 4."""
        ...

    def write(self, offset: int, data: memoryview) -> int:
        """Write bytes; how many were written."""
        ...

    def poll(self, timeout_s: float) -> bool:
        """Wait until there is something to read; whether there is."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


Opener: TypeAlias = Callable[[Path, Use], CardFile]
"""Opens one of the card's files; may raise OSError."""


class _File:
    """A file that reads and writes at offsets: registers, events, and all that behaves like a regular file."""

    def __init__(self, path: Path, flags: int) -> None:
        self.file = os.open(path, flags | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file, size, offset)

    def write(self, offset: int, data: memoryview) -> int:
        return os.pwrite(self.file, data, offset)

    def poll(self, timeout_s: float) -> bool:
        return bool(select.select([self.file], [], [], timeout_s)[0])

    def close(self) -> None:
        os.close(self.file)


class _EventFile(_File):
    """Events have no offset."""

    def read(self, offset: int, size: int) -> bytes:
        return os.read(self.file, size)


class _DmaFile(_File):
    """A DMA channel.

    Some engines want the same low address bits on both sides, so all goes through a buffer in which it lies as on the
    card.  Only read(2) and write(2) will do: the driver has no way to finish a preadv.
    """

    def __init__(self, path: Path, flags: int) -> None:
        super().__init__(path, flags)
        self._stream = io.FileIO(self.file, "r" if flags == os.O_RDONLY else "w", closefd=False)
        self._view = memoryview(mmap.mmap(-1, BOUNCE_BYTES + PAGE))

    def read(self, offset: int, size: int) -> bytes:
        begin = offset % PAGE
        view = self._view[begin : begin + min(size, BOUNCE_BYTES)]
        os.lseek(self.file, offset, os.SEEK_SET)
        return bytes(view[: self._stream.readinto(view) or 0])

    def write(self, offset: int, data: memoryview) -> int:
        begin, data = offset % PAGE, data[:BOUNCE_BYTES]
        view = self._view[begin : begin + len(data)]
        view[:] = data
        return super().write(offset, view)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _MappedFile:
    """Registers in a BAR that is mapped: each access is one load or store of 32 bits."""

    def __init__(self, path: Path) -> None:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_SYNC)
        try:
            self._map = mmap.mmap(file, 1 << ADDRESS_BITS)
        finally:
            os.close(file)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("I")

    def read(self, offset: int, size: int) -> bytes:
        return self._words[offset // 4].to_bytes(4, "little")

    def write(self, offset: int, data: memoryview) -> int:
        self._words[offset // 4] = int.from_bytes(data, "little")
        return 4

    def poll(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()


def _open_file(path: Path, use: Use) -> CardFile:
    """The opener for real files."""
    match use:
        case Use.REGISTERS:
            return _File(path, os.O_RDWR)
        case Use.EVENTS:
            return _EventFile(path, os.O_RDONLY)
        case Use.TO_CARD:
            return _DmaFile(path, os.O_WRONLY)
        case Use.FROM_CARD:
            return _DmaFile(path, os.O_RDONLY)


def _open_mapped(path: Path, use: Use) -> CardFile:
    """The same with the registers mapped."""
    return _MappedFile(path) if use is Use.REGISTERS else _open_file(path, use)


class MmioTransport:
    """A card (see `kvattic.transport.base.Transport`); made by `open_mmio`.  Any thread may call it.

    Attributes:
        config: what the card's design was built from.
        memory_bytes: host memory, a window of the card's memory.
        dram_bytes: size of device DRAM, another window.
    """

    def __init__(self, config: Config, *, paths: dict[Use, Path], opener: Opener, memory_base: int, memory_bytes: int,
                 dram_base: int, dram_bytes: int) -> None:
        self.config = config
        self.memory_bytes = memory_bytes
        self.dram_bytes = dram_bytes
        self._memory_base = memory_base
        self._dram_base = dram_base
        self._paths = paths
        self._owner = Owner()
        self._lock = threading.RLock()
        self._closed = False
        self._lost = ""
        self._files: dict[Use, CardFile] = {}
        for use, path in paths.items():
            try:
                self._files[use] = opener(path, use)
            except OSError as error:
                self.close()
                raise RequestError(f"cannot open {path}, the card's {use.replace('_', ' ')}: {error.strerror or error}"
                                   "; the XDMA driver of github.com/Xilinx/dma_ip_drivers makes it") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See `Transport`.  The card goes on with what it has; so does the parent of a forked child."""
        if not self._owner.here:
            self._lock = threading.RLock()      # a thread may have held it that is not here
        with self._lock:
            self._closed = True
            while self._files:
                with contextlib.suppress(OSError):
                    self._files.popitem()[1].close()

    def _check_owner(self) -> None:
        self._owner.check("the card")

    def _file(self, use: Use) -> CardFile:
        if self._closed:
            raise RequestError("the card is closed")
        if self._lost:
            raise DeviceLostError(self._lost)
        return self._files[use]

    def _lose(self, what: str) -> DeviceLostError:
        self._lost = f"the card is lost: {what}"
        return DeviceLostError(self._lost)

    def _failed(self, use: Use, offset: int, what: object) -> DeviceLostError:
        return self._lose(f"{self._paths[use]} at {offset:#x}: {what}")

    # Registers.

    def _read_word(self, address: int) -> int:
        try:
            data = self._file(Use.REGISTERS).read(address, 4)
        except OSError as error:
            raise self._failed(Use.REGISTERS, address, error.strerror or error) from None
        if len(data) != 4:
            raise self._failed(Use.REGISTERS, address, f"a register has 4 bytes, not {len(data)}")
        return int.from_bytes(data, "little")

    def _write_word(self, address: int, value: int) -> None:
        try:
            written = self._file(Use.REGISTERS).write(address, memoryview(value.to_bytes(4, "little")))
        except OSError as error:
            raise self._failed(Use.REGISTERS, address, error.strerror or error) from None
        if written != 4:
            raise self._failed(Use.REGISTERS, address, f"a register has 4 bytes, not {written}")

    def read_register(self, name: str) -> int:
        """See `Transport`.

        Raises:
            RequestError: the register does not exist.
            DeviceLostError: the card is gone.
        """
        self._check_owner()
        register = find_register(name)
        value = 0
        with self._lock:
            for offset in range(0, register.width // 8, 4):
                word = self._read_word(register.address + offset)
                if word == ALL_ONES and self._read_word(REGISTER_MAP["ID"].address) == ALL_ONES:
                    raise self._lose(f"{name} and ID read as {ALL_ONES:#x}, as those of a card that fell off the bus")
                value |= word << 8 * offset
        return value

    def write_register(self, name: str, value: int) -> None:
        """See `Transport`.

        Raises:
            RequestError: the register does not exist, or the value does not fit it.
            DeviceLostError: the card is gone.
        """
        register = find_register(name, value)
        self._check_owner()
        with self._lock:
            for offset in range(0, register.width // 8, 4):
                self._write_word(register.address + offset, value >> 8 * offset & ALL_ONES)

    # Memory.

    def _read(self, address: int, size: int) -> bytes:
        found = bytearray()
        self._check_owner()
        with self._lock:
            while len(found) < size:
                at = address + len(found)
                try:
                    part = self._file(Use.FROM_CARD).read(at, size - len(found))
                except OSError as error:
                    raise self._failed(Use.FROM_CARD, at, error.strerror or error) from None
                if not part:
                    raise self._failed(Use.FROM_CARD, at, f"{size - len(found)} bytes were asked for, none came")
                found += part
            self._file(Use.FROM_CARD)   # reading nothing is refused after the end, too
        return bytes(found)

    def _write(self, address: int, data: bytes) -> None:
        view = memoryview(data).cast("B")
        self._check_owner()
        with self._lock:
            self._file(Use.TO_CARD)
            while view:
                try:
                    written = self._file(Use.TO_CARD).write(address, view)
                except OSError as error:
                    raise self._failed(Use.TO_CARD, address, error.strerror or error) from None
                if not written:
                    raise self._failed(Use.TO_CARD, address, f"none of {len(view)} bytes was taken")
                address, view = address + written, view[written:]

    def read_memory(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
            DeviceLostError: the card is gone.
        """
        check_range("host memory", self.memory_bytes, address, size)
        return self._read(self._memory_base + address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of the host memory.
            DeviceLostError: the card is gone.
        """
        check_range("host memory", self.memory_bytes, address, len(data))
        self._write(self._memory_base + address, data)

    def read_dram(self, address: int, size: int) -> bytes:
        """See `Transport`.

        Raises:
            RequestError: outside of device DRAM.
            DeviceLostError: the card is gone.
        """
        check_range("device DRAM", self.dram_bytes, address, size)
        return self._read(self._dram_base + address, size)

    def write_dram(self, address: int, data: bytes) -> None:
        """See `Transport`.

        Raises:
            RequestError: outside of device DRAM.
            DeviceLostError: the card is gone.
        """
        check_range("device DRAM", self.dram_bytes, address, len(data))
        self._write(self._dram_base + address, data)

    # The interrupt.

    def wait(self, timeout_s: float) -> None:
        """See `Transport`.

        Raises:
            DeviceTimeoutError: the line was not raised in that time.
            DeviceLostError: the card is gone.
        """
        begin = time.monotonic()
        pause = POLL_S[0]
        while not self.read_register("INTERRUPTS") & self.read_register("INTERRUPT_MASK"):
            left = begin + timeout_s - time.monotonic()
            if left <= 0:
                raise DeviceTimeoutError(
                    f"the card raised no interrupt in {timeout_s:g} s: INTERRUPTS is "
                    f"{self.read_register('INTERRUPTS'):#x}, INTERRUPT_MASK {self.read_register('INTERRUPT_MASK'):#x}")
            if Use.EVENTS in self._paths:
                self._sleep(min(left, LOOK_S))
            else:
                time.sleep(min(left, pause))
                pause = min(pause * 2, POLL_S[1])

    def _sleep(self, seconds: float) -> None:
        """Sleep until the card's driver has seen an interrupt, and clear it there."""
        try:
            if self._file(Use.EVENTS).poll(seconds):
                with self._lock:        # the file may have been closed meanwhile
                    if not self._file(Use.EVENTS).read(0, 4):
                        raise self._failed(Use.EVENTS, 0, "it ended")
        except OSError as error:
            raise self._failed(Use.EVENTS, 0, error.strerror or error) from None


def open_mmio(
    path: Path | str,
    config: Config,
    *,
    memory_base: int = 0,
    memory_bytes: int = 1 << 26,
    dram_base: int = 1 << 32,
    dram_bytes: int = 1 << 30,
    channel: int = 0,
    event: int | None = 0,
    registers: Path | str | None = None,
    to_card: Path | str | None = None,
    from_card: Path | str | None = None,
    map_registers: bool = False,
    opener: Opener | None = None,
) -> MmioTransport:
    """Open a card.

    Args:
        path: what the names of the card's files begin with, such as /dev/xdma0.
        config: what the card's design was built from.
        memory_base: where the engine's address 0 lies in the address space of the card's DMA; see above.
        memory_bytes: size of that window, in whole lines of 64 bytes.
        dram_base: where address 0 of the engine's DRAM port lies.
        dram_bytes: size of that window.
        channel: which channels of the DMA engine to use.
        event: which user interrupt is the engine's; None: ask the registers instead.
        registers: the registers' file, if it has another name.
        to_card: the same for writing to the card's memory.
        from_card: the same for reading it.
        map_registers: map the registers' file instead of reading and writing it.
        opener: what opens the files, for other bridges and for tests.

    Raises:
        RequestError: a window is not possible, or a file cannot be opened.
    """
    for name, value in (("memory_base", memory_base), ("dram_base", dram_base)):
        if value < 0 or value % PAGE:
            raise RequestError(f"{name} must be a multiple of {PAGE:#x}, not {value:#x}")
    if memory_bytes < 64 or memory_bytes % 64:
        raise RequestError(f"memory_bytes must be a positive multiple of 64, not {memory_bytes}")
    if dram_bytes < 1:
        raise RequestError(f"dram_bytes must be positive, not {dram_bytes}")
    if memory_base < dram_base + dram_bytes and dram_base < memory_base + memory_bytes:
        raise RequestError(
            f"the windows must not overlap: host memory {memory_base:#x} to {memory_base + memory_bytes:#x}, "
            f"device DRAM {dram_base:#x} to {dram_base + dram_bytes:#x}")
    paths = {
        Use.REGISTERS: Path(registers or f"{path}_user"),
        Use.TO_CARD: Path(to_card or f"{path}_h2c_{channel}"),
        Use.FROM_CARD: Path(from_card or f"{path}_c2h_{channel}"),
    }
    if event is not None:
        paths[Use.EVENTS] = Path(f"{path}_events_{event}")
    return MmioTransport(
        config, paths=paths, opener=opener or (_open_mapped if map_registers else _open_file), memory_base=memory_base,
        memory_bytes=memory_bytes, dram_base=dram_base, dram_bytes=dram_bytes)
