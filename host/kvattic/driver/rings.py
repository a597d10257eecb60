"""`QueuePair`: one submission and one completion ring in host memory, from the host's side."""

from collections.abc import Iterator

from kvattic.spec.commands import COMPLETION, LINE_BYTES
from kvattic.transport.base import Transport

__all__ = ["QueuePair"]

_STATE = COMPLETION["state"].offset


class QueuePair:
    """Commands go in by `push` and `ring`, completions come out by `reap`.

    At most entries - 1 commands are under way, so neither ring can overflow.

    Args:
        transport: the way to the device.
        number: of the pair.
        entries: of each ring, a power of two.
        submission: address of the submission ring.
        completion: address of the completion ring.

    Attributes:
        number, entries, submission, completion: the same.
        outstanding: commands that were pushed and whose completion was not reaped.
    """

    def __init__(self, transport: Transport, number: int, entries: int, submission: int, completion: int) -> None:
        self.number = number
        self.entries = entries
        self.submission = submission
        self.completion = completion
        self._transport = transport
        self.clear()

    def clear(self) -> None:
        """Start over, as the device does when it creates the pair: all entries of both rings are invalid."""
        self.outstanding = 0
        self._tail = self._head = 0
        self._phase = 1
        self._pushed: list[bytes] = []
        self._transport.write_memory(self.completion, bytes(self.entries * LINE_BYTES))

    def abandon(self) -> None:
        """Forget the commands that were pushed."""
        self.outstanding = 0
        self._pushed.clear()

    @property
    def room(self) -> int:
        """How many commands can be pushed now."""
        return self.entries - 1 - self.outstanding

    def push(self, line: bytes) -> None:
        """Add a command; the device sees it after the next `ring`."""
        assert self.room > 0 and len(line) == LINE_BYTES
        self._pushed.append(line)
        self.outstanding += 1

    def ring(self) -> None:
        """Put the pushed commands into the ring, and tell the device with one doorbell."""
        if not self._pushed:
            return
        lines, self._pushed = self._pushed, []
        inside = min(len(lines), self.entries - self._tail)
        for at, part in ((self._tail, lines[:inside]), (0, lines[inside:])):
            if part:
                self._transport.write_memory(self.submission + at * LINE_BYTES, b"".join(part))
        self._tail = (self._tail + len(lines)) % self.entries
        self._transport.write_register(f"SUBMISSION_TAIL_{self.number}", self._tail)

    def reap(self) -> list[bytes]:
        """Completion entries that came since the last call, oldest first; the device may then reuse their places."""
        found = list(self._take())
        if found:
            self._transport.write_register(f"COMPLETION_HEAD_{self.number}", self._head)
        return found

    def peek(self) -> bool:
        """Whether a completion has come."""
        return self.outstanding > 0 and self._transport.read_memory(
            self.completion + self._head * LINE_BYTES, LINE_BYTES)[_STATE] & 1 == self._phase

    def _take(self) -> Iterator[bytes]:
        while waiting := self.outstanding - len(self._pushed):
            count = min(waiting, self.entries - self._head)
            data = self._transport.read_memory(self.completion + self._head * LINE_BYTES, count * LINE_BYTES)
            for at in range(0, len(data), LINE_BYTES):
                if data[at + _STATE] & 1 != self._phase:
                    return
                self.outstanding -= 1
                self._head += 1
                yield data[at : at + LINE_BYTES]
            if self._head == self.entries:
                self._head = 0
                self._phase ^= 1
            else:
                return
