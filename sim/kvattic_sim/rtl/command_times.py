"""When the drive fetched each ATTEND, and when it wrote its completion: seen on the host's memory bus.

The RTL's completions carry when they were written, but not when their command was fetched or its beats moved.
"""

from kvattic.spec.commands import COMMAND, COMPLETION, LINE_BYTES, Opcode
from kvattic_sim.rtl.transport import RtlTransport

__all__ = ["CommandTimes"]


class CommandTimes:
    """Notes ATTENDs from now on; `stop` ends it.

    Args:
        transport: of the simulated drive, whose queues must have been set up by the host library: their rings lie below
            the blocks of the commands (register ADMIN_BASE).

    Attributes:
        latencies: cycles from the read of a command's line to the last beat of its completion, in the order of the
            completions.
    """

    def __init__(self, transport: RtlTransport) -> None:
        self.latencies: list[int] = []
        self._transport = transport
        self._rings = transport.read_register("ADMIN_BASE")
        self._fetched: dict[int, int] = {}
        transport.watch_memory(self._heed)

    def stop(self) -> None:
        """Note nothing more."""
        self._transport.watch_memory(None)

    def _heed(self, write: bool, address: int, size: int) -> None:
        if address >= self._rings:
            return
        begin = address - address % LINE_BYTES
        if not write and address == begin:
            line = self._transport.read_memory(begin, LINE_BYTES)
            if line[COMMAND["opcode"].place] == bytes([Opcode.ATTEND]):
                self._fetched[_identifier(line, COMMAND["identifier"].place)] = self._transport.cycles
        elif write and address + size == begin + LINE_BYTES:
            line = self._transport.read_memory(begin, LINE_BYTES)
            # Completions of other commands have identifiers that no ATTEND under way has.
            fetched = self._fetched.pop(_identifier(line, COMPLETION["identifier"].place), None)
            if fetched is not None:
                self.latencies.append(self._transport.cycles - fetched)


def _identifier(line: bytes, place: slice) -> int:
    return int.from_bytes(line[place], "little")
