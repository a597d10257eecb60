"""How the driver reaches a device: the same calls for the golden device and the RTL."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from kvattic.config import Config

__all__ = ["MAX_COMMANDS", "Progress", "Transport"]

MAX_COMMANDS = 65_535
"""Commands that one doorbell can announce (see registers.DOORBELL)."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called as progress(done, total) after each batch, both counted in jobs."""


class Transport(Protocol):
    """One device's registers, host memory and flash; every call blocks until it is done.

    Attributes:
        config: the configuration that the transport's own side was built from.  The driver compares
            its hash with the device's CONFIG_HASH register.
        memory_bytes: host memory that the device reaches by DMA, from address 0 on; the driver uses
            all of it.
        pages_per_channel: flash pages that each channel has.
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
    def pages_per_channel(self) -> int:
        """Flash pages of each channel."""
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

    def write_pages(self, channel: int, first_page: int, images: NDArray[Any]) -> None:
        """Put consecutive pages of one channel into flash, over what was there.

        This is the back door of the flash twin: it takes no device time and obeys no rule of NAND.
        The program commands that replace it come with the flash controller.

        Args:
            channel: flash channel.
            first_page: page number of images[0] on that channel.
            images: uint8, (pages, config.page_bytes).
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when STATUS.DONE is set.

        Args:
            timeout_s: patience in seconds of wall-clock time.

        Raises:
            DeviceTimeoutError: DONE was not set in that time.
        """
        ...
