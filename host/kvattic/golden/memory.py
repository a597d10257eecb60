"""The golden device's host memory, as the host and the device's DMA see it."""

from collections.abc import Iterable, MutableSequence

from kvattic.golden.registers import Registers
from kvattic.golden.rejected import RejectedError
from kvattic.spec.commands import Status
from kvattic.spec.registers import StatusBit
from kvattic.transport.base import check_range

__all__ = ["HostMemory"]


class HostMemory:
    """Bytes from address 0 on.

    Args:
        size: how many.
        registers: of the device; STATUS.BUS_ERROR is set where DMA leaves the memory.

    Attributes:
        size: the same.
        data: the bytes; anything with slices, such as a shared mapping, can take their place.
    """

    def __init__(self, size: int, registers: Registers) -> None:
        self.size = size
        self.data: MutableSequence[int] = bytearray(size)
        self._registers = registers

    def read(self, address: int, size: int) -> bytes:
        """What the host reads.

        Raises:
            RequestError: the range is not inside the memory.
        """
        check_range("host memory", self.size, address, size)
        return bytes(self.data[address : address + size])

    def write(self, address: int, data: bytes) -> None:
        """What the host writes.

        Raises:
            RequestError: the range is not inside the memory.
        """
        check_range("host memory", self.size, address, len(data))
        self.data[address : address + len(data)] = data

    def dma_read(self, address: int, size: int) -> bytes:
        """What the device reads.

        Raises:
            RejectedError: BUS_ERROR, the range is not inside the memory.
        """
        if address + size > self.size:
            self._registers.report(StatusBit.BUS_ERROR)
            raise RejectedError(Status.BUS_ERROR)
        return bytes(self.data[address : address + size])

    def dma_write(self, address: int, data: bytes) -> bool:
        """Write for the device.

        Returns:
            Whether the memory took the data; otherwise they are lost.
        """
        if address + len(data) > self.size:
            self._registers.report(StatusBit.BUS_ERROR)
            return False
        self.data[address : address + len(data)] = data
        return True

    # Several places at once, all of which are inside the memory.

    def blocks(self, addresses: Iterable[int], size: int) -> list[bytes]:
        """What the device reads: blocks of `size` bytes."""
        data = self.data
        return [bytes(data[address : address + size]) for address in addresses]

    def scatter(self, addresses: Iterable[int], size: int, blocks: bytes) -> None:
        """Write for the device: blocks of `size` bytes, one after the other."""
        data = self.data
        for at, address in enumerate(addresses):
            data[address : address + size] = blocks[at * size : (at + 1) * size]
