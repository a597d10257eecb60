"""`Admin`: commands about the device itself: its configuration, its counters, and the owners of zones and regions."""

from collections.abc import Sequence as Series

from kvattic.driver.diagnosis import explain
from kvattic.driver.dispatcher import ADMIN, ATTEND, Dispatcher
from kvattic.errors import ConfigError, ConfigMismatchError, DeviceStatusError
from kvattic.spec.commands import DATA_COMMAND, GRANT_COMMAND, IDENTIFY_BYTES, LINE_BYTES, Grant, Opcode, Status, lines
from kvattic.spec.config import Config
from kvattic.spec.registers import COUNTERS, QUEUES

__all__ = ["Admin"]

ALL_QUEUES = (1 << QUEUES) - 1
COUNTER_BYTES = lines(8 * len(COUNTERS)) * LINE_BYTES


class Admin:
    """The device's own commands; each method waits for its completion.

    Args:
        dispatcher: of the device.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def identify(self) -> Config:
        """The configuration that the device was built from.

        Raises:
            ConfigMismatchError: the reply cannot be parsed.
            DeviceStatusError: the device reports an error.
        """
        data = self._read_block(ADMIN, Opcode.IDENTIFY, IDENTIFY_BYTES)
        try:
            return Config.from_json(data.rstrip(b"\0").decode())
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            raise ConfigMismatchError(f"the device's configuration cannot be parsed: {error}") from None

    def counters(self) -> dict[str, int]:
        """The counters (`registers.COUNTERS`) by their names, read by a command among the others.

        Raises:
            DeviceStatusError: the device reports an error.
        """
        data = self._read_block(ATTEND, Opcode.COUNTERS, COUNTER_BYTES)
        return {register.name: int.from_bytes(data[8 * i : 8 * i + 8], "little") for i, register in enumerate(COUNTERS)}

    def _read_block(self, queue: int, opcode: Opcode, size: int) -> bytes:
        """Run a data command; the block that it writes."""

        def fill(line: bytearray, address: int) -> bytes:
            DATA_COMMAND.put(line, result=address)
            return b""

        command = self._dispatcher.command(
            queue, DATA_COMMAND.pack(opcode=opcode), lambda completion, data: (completion, data), size, fill, (0, size))
        self._dispatcher.submit([command])
        completion, data = command.future.result()
        if completion.status is not Status.OK:
            raise DeviceStatusError(f"{opcode.name} failed: {explain(completion)}", completion)
        return data

    def permit(self, domain: int, permitted: bool) -> None:
        """Permit or forbid all queues to name a domain."""
        self.grant(Grant.QUEUES, ALL_QUEUES if permitted else 0, 0, domain)

    def grant(self, kind: Grant, first: int, number: int, domain: int) -> None:
        """Give queues, zones or regions to a domain, while all tasks are paused: allocators call this midway.

        Raises:
            DeviceStatusError: the thing or the domain does not exist.
        """
        command = self._dispatcher.command(
            ADMIN, GRANT_COMMAND.pack(opcode=Opcode.GRANT, kind=kind, first=first, count=number, domain=domain),
            lambda completion, _: completion)
        self._dispatcher.submit([command])
        completion = self._dispatcher.finish(command.future)
        if completion.status is not Status.OK:
            raise DeviceStatusError(f"GRANT of {kind.name.lower()} failed: {explain(completion)}", completion)

    def grant_zones(self, zones: Series[int], domain: int) -> None:
        """Give zones, ascending, to a domain."""
        cuts = [i for i in range(1, len(zones)) if zones[i] != zones[i - 1] + 1]
        for begin, end in zip([0, *cuts], [*cuts, len(zones)], strict=True):
            if begin < end:
                self.grant(Grant.ZONES, zones[begin], end - begin, domain)

    def grant_regions(self, first: int, number: int, domain: int) -> None:
        """Give regions of device DRAM to a domain."""
        self.grant(Grant.REGIONS, first, number, domain)
