"""The golden device's queues: rings, doorbells, who is fetched next, completions and interrupts, without time."""

import struct
from dataclasses import dataclass

from kvattic.spec.commands import LINE_BYTES, Status, pack_state
from kvattic.spec.registers import MAX_ENTRIES, QUEUES

__all__ = ["Queue", "Queues", "RejectedError"]

_COMPLETION = struct.Struct("<IIHHHH48x")
"""The fields of `COMPLETION` that the golden device fills."""


class RejectedError(Exception):
    """A command that ends with an error; args are (status, where)."""


@dataclass(slots=True, eq=False)
class Queue:
    """A pair of rings.

    Attributes:
        number: of the queue.
        entries: of each ring.
        submission: address of the submission ring.
        completion: address of the completion ring.
        base: first address that the blocks of its commands may use.
        limit: one past the last one.
        head: next submission entry to fetch.
        tail: one past the last submission entry that there is.
        posts: completions posted, of all rounds.
        unread: completions posted and not taken.
        under_way: commands fetched whose completions are not posted.
    """

    number: int
    entries: int
    submission: int
    completion: int
    base: int
    limit: int
    head: int = 0
    tail: int = 0
    posts: int = 0
    unread: int = 0
    under_way: int = 0

    def __post_init__(self) -> None:
        # The device sees whole lines: the low address bits are ignored.
        self.submission -= self.submission % LINE_BYTES
        self.completion -= self.completion % LINE_BYTES

    @property
    def is_ring(self) -> bool:
        """Whether rings may have so many entries."""
        return 2 <= self.entries <= MAX_ENTRIES and not self.entries & (self.entries - 1)

    @property
    def fetchable(self) -> bool:
        """Whether there is a command and its completion will have room."""
        return self.head != self.tail and self.under_way + self.unread < self.entries - 1

    def submit(self, tail: int) -> bool:
        """The doorbell SUBMISSION_TAIL; False: refused."""
        entries = self.entries
        if tail >= entries or (tail - self.head) % entries < (self.tail - self.head) % entries:
            return False
        self.tail = tail
        return True

    def take(self, head: int) -> bool:
        """The doorbell COMPLETION_HEAD; False: refused."""
        taken = (head - (self.posts - self.unread)) % self.entries
        if head >= self.entries or taken > self.unread:
            return False
        self.unread -= taken
        return True

    def fetch(self) -> int:
        """The address of the next command, which is under way from now on."""
        address = self.submission + self.head * LINE_BYTES
        self.head = (self.head + 1) % self.entries
        self.under_way += 1
        return address

    def post(self, identifier: int, status: int, where: int, flags: int) -> tuple[int, bytes]:
        """The address of a command's completion, and the completion."""
        turn, place = divmod(self.posts, self.entries)
        state = pack_state(status, turn & 1 ^ 1)
        self.posts += 1
        self.unread += 1
        self.under_way -= 1
        entry = _COMPLETION.pack(where, flags, self.head, self.number, identifier, state)
        return self.completion + place * LINE_BYTES, entry

    def wants_interrupt(self, after: int) -> bool:
        """Whether the host should look at the completions now."""
        return self.unread >= max(after, 1) or (self.unread > 0 and not self.under_way and not self.fetchable)

    def holds(self, address: int, size: int) -> bool:
        """Whether a block is aligned and inside of the window."""
        return not address % LINE_BYTES and self.base <= address and address + size <= self.limit


class Queues:
    """All pairs.

    Attributes:
        pairs: those that there are, by number.
        removed: those that were removed, but whose commands are under way, or were: they can be deleted again.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, Queue] = {}
        self.removed: dict[int, Queue] = {}
        self._turn = 0

    def doorbell(self, number: int, value: int, *, completion: bool) -> bool:
        """Ring a doorbell; False: refused."""
        queue = self.pairs.get(number)
        if queue is None:
            return False
        return queue.take(value) if completion else queue.submit(value)

    def next(self) -> Queue | None:
        """The queue whose turn it is to be fetched from, if any has something to fetch."""
        for step in range(QUEUES):
            number = (self._turn + step) % QUEUES
            queue = self.pairs.get(number)
            if queue is not None and queue.fetchable:
                self._turn = (number + 1) % QUEUES
                return queue
        return None

    @property
    def fetchable(self) -> bool:
        """Whether any queue has something to fetch."""
        return any(queue.fetchable for queue in self.pairs.values())

    def interrupts(self, after: int) -> int:
        """The register INTERRUPTS."""
        return sum(1 << number for number, queue in self.pairs.items() if queue.wants_interrupt(after))

    def _taken(self, number: int) -> bool:
        """Whether there is a queue of that number, or completions of one that was are to come."""
        return number in self.pairs or (number in self.removed and self.removed[number].under_way > 0)

    def create_admin(self, queue: Queue) -> None:
        """ADMIN_ENTRIES: queue 0 in place of the one that there is; while that has commands under way, only removed."""
        if (old := self.pairs.pop(0, None)) is not None:
            self.removed[0] = old
        if queue.is_ring and not self._taken(0):
            self.pairs[0] = queue

    def create(self, command: dict[str, int]) -> None:
        """CREATE_QUEUE."""
        number = command["queue"]
        queue = Queue(*(command[name] for name in ("queue", "entries", "submission", "completion", "base", "limit")))
        for where, bad in enumerate((
            not 1 <= number < QUEUES or self._taken(number),
            not queue.is_ring,
            command["submission"] % LINE_BYTES,
            command["completion"] % LINE_BYTES,
        )):
            if bad:
                raise RejectedError(Status.INVALID_QUEUE, where)
        self.removed.pop(number, None)
        self.pairs[number] = queue

    def delete(self, number: int) -> None:
        """DELETE_QUEUE."""
        queue = (self.pairs.pop(number, None) or self.removed.pop(number, None)) if number else None
        if queue is None:
            raise RejectedError(Status.INVALID_QUEUE, 0)
        if queue.under_way:
            self.removed[number] = queue
            raise RejectedError(Status.QUEUE_BUSY, 0)
