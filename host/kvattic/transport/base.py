"""How the driver reaches a device: the same calls for the golden device, the RTL and a card."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

from kvattic.errors import RequestError
from kvattic.spec.config import Config
from kvattic.spec.registers import REGISTER_MAP, Register

__all__ = ["Progress", "Transport", "check_range", "find_register"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called as progress(done, total), both counted in jobs."""


class Transport(Protocol):
    """One device's registers, host memory and device DRAM; every call blocks until it is done.

    Flash is reached by commands alone.

    Attributes:
        config: the configuration that the transport's own side was built from.  The driver compares
            its hash with the device's CONFIG_HASH register.
        memory_bytes: host memory that the device reaches by DMA, from address 0 on; the driver uses
            all of it.
        dram_bytes: size of the device DRAM, in bytes from address 0 on; the driver uses all whole
            pages of it.
    """

    @property
    def config(self) -> Config:
        """What the transport's own side was built from."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Size of the host memory."""
        ...

    @property
    def dram_bytes(self) -> int:
        """Size of the device DRAM."""
        ...

    def read_register(self, name: str) -> int:
        """A register of `registers.REGISTERS`; 64-bit ones take two accesses, low first."""
        ...

    def write_register(self, name: str, value: int) -> None:
        """Write a register of `registers.REGISTERS`; 64-bit ones take two accesses, low first."""
        ...

    def read_memory(self, address: int, size: int) -> bytes:
        """`size` bytes of host memory."""
        ...

    def write_memory(self, address: int, data: bytes) -> None:
        """Put bytes into host memory."""
        ...

    def read_dram(self, address: int, size: int) -> bytes:
        """`size` bytes of device DRAM; see `write_dram`."""
        ...

    def write_dram(self, address: int, data: bytes) -> None:
        """Put bytes into device DRAM, at any address and of any length.

        This stands for the host's way into the drive's DRAM, a window of its PCIe address space or
        a DMA engine of the drive's controller, neither of which is part of the engine.  It takes no
        device time.  The bytes are there before a doorbell that is rung afterwards is served, and the
        driver writes no byte of DRAM that a command under way uses.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when the device's interrupt line is raised; at once if it is.

        The line is level-triggered: it is up while a queue of INTERRUPT_MASK wants it (see INTERRUPT_AFTER), so a
        wake-up cannot be lost.

        Args:
            timeout_s: seconds of wall-clock time to wait.

        Raises:
            DeviceTimeoutError: the line was not raised in that time.
            DeviceLostError: the device is gone.
        """
        ...

    def close(self) -> None:
        """Give back what the transport holds: files, memory, a simulator's process.  Closing twice is allowed."""
        ...


def find_register(name: str, value: int = 0) -> Register:
    """A register by its name.

    Args:
        name: of the register.
        value: what is to be written there.

    Raises:
        RequestError: the register does not exist, or the value does not fit it.
    """
    register = REGISTER_MAP.get(name)
    if register is None:
        raise RequestError(f"there is no register {name!r}; registers are {', '.join(REGISTER_MAP)}")
    if not 0 <= value < 1 << register.width:
        raise RequestError(f"{name} has {register.width} bits: {value:#x} does not fit")
    return register


def check_range(name: str, total: int, address: int, size: int) -> None:
    """Refuse bytes that are not in a memory.

    Args:
        name: of the memory.
        total: its size.
        address: of the first byte.
        size: how many.

    Raises:
        RequestError: some of them are outside.
    """
    if address < 0 or size < 0 or address + size > total:
        raise RequestError(f"{name} is 0 to {total:#x}: {size} bytes at {address:#x} are not in it")
