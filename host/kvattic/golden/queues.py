"""The golden device's queues: rings, doorbells, fetching in turn, completions and interrupts, without time."""

from dataclasses import dataclass

from kvattic.golden.rejected import RejectedError
from kvattic.spec.commands import LINE_BYTES, Opcode, QueueCommand, Status, pack_completion, pack_state
from kvattic.spec.registers import MAX_ENTRIES, QUEUES

__all__ = ["Queue", "Queues"]


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
        tail: one past the last submission entry.
        posts: completions posted since the queue was created.
        unread: completions posted that the host has not taken.
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
        """Whether the number of entries is valid."""
        return 2 <= self.entries <= MAX_ENTRIES and not self.entries & (self.entries - 1)

    @property
    def fetchable(self) -> bool:
        """Whether a command waits and its completion will have room."""
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
        """Begin the next command; the address of its entry."""
        address = self.submission + self.head * LINE_BYTES
        self.head = (self.head + 1) % self.entries
        self.under_way += 1
        return address

    def post(self, identifier: int, status: int, where: int, flags: int) -> tuple[int, bytes]:
        """End a command; the address of its completion, and the completion."""
        address = self.completion + self.posts % self.entries * LINE_BYTES
        entry = self._completion(identifier, status, where, flags)
        self.posts += 1
        self.unread += 1
        self.under_way -= 1
        return address, entry

    # Several commands at once, whose rings are inside of the memory.

    def rings_inside(self, size: int) -> bool:
        """Whether both rings lie in a memory of `size` bytes."""
        return max(self.submission, self.completion) + self.entries * LINE_BYTES <= size

    @property
    def waiting(self) -> int:
        """Commands that could be fetched now, as far as their completions have room."""
        return min((self.tail - self.head) % self.entries, self.entries - 1 - self.under_way - self.unread)

    def submissions(self, count: int) -> list[tuple[int, int]]:
        """Where the next entries to fetch lie: (first address, address behind the last) of one or two pieces."""
        return self._in_ring(self.submission, self.head, count)

    def completions(self, count: int) -> list[tuple[int, int]]:
        """Likewise of the next completions."""
        return self._in_ring(self.completion, self.posts % self.entries, count)

    def _in_ring(self, base: int, first: int, count: int) -> list[tuple[int, int]]:
        behind = first + count - self.entries
        pieces = [(first, first + count)] if behind <= 0 else [(first, self.entries), (0, behind)]
        return [(base + begin * LINE_BYTES, base + end * LINE_BYTES) for begin, end in pieces]

    def post_many(self, identifiers: list[int]) -> bytes:
        """Fetch commands and end them, OK and without flags; the completions, for `completions`."""
        found = []
        for identifier in identifiers:
            self.head = (self.head + 1) % self.entries
            found.append(self._completion(identifier, Status.OK, 0, 0))
            self.posts += 1
        self.unread += len(identifiers)
        return b"".join(found)

    def _completion(self, identifier: int, status: int, where: int, flags: int) -> bytes:
        """The next completion."""
        state = pack_state(status, self.posts // self.entries & 1 ^ 1)
        return pack_completion(where=where, flags=flags, head=self.head, queue=self.number, identifier=identifier,
                               state=state)

    def wants_interrupt(self, after: int) -> bool:
        """Whether the host should look at the completions now."""
        return self.unread >= max(after, 1) or (self.unread > 0 and not self.under_way and not self.fetchable)

    def holds(self, address: int, size: int) -> bool:
        """Whether a block is aligned and inside the queue's window."""
        return not address % LINE_BYTES and self.base <= address and address + size <= self.limit


class Queues:
    """All pairs.

    Attributes:
        pairs: those that exist, by number.
        removed: those that were removed with commands in flight; they can be deleted again.
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
        """The queue to fetch from next, in turn; None if no queue has a command that can be fetched."""
        waiting = [number for number, queue in self.pairs.items() if queue.fetchable]
        if not waiting:
            return None
        number = min(waiting, key=lambda number: (number - self._turn) % QUEUES)
        self._turn = (number + 1) % QUEUES
        return self.pairs[number]

    @property
    def fetchable(self) -> bool:
        """Whether any queue has something to fetch."""
        return any(queue.fetchable for queue in self.pairs.values())

    def others_fetchable(self, but: Queue) -> bool:
        """Whether any other queue has something to fetch."""
        return any(queue.fetchable for queue in self.pairs.values() if queue is not but)

    def interrupts(self, after: int) -> int:
        """The register INTERRUPTS."""
        return sum(1 << number for number, queue in self.pairs.items() if queue.wants_interrupt(after))

    def _taken(self, number: int) -> bool:
        """Whether a queue of that number exists, or a removed one still has commands in flight."""
        return number in self.pairs or (number in self.removed and self.removed[number].under_way > 0)

    def create_admin(self, queue: Queue) -> None:
        """ADMIN_ENTRIES: replace queue 0; while the old one has commands in flight, only remove it."""
        if (old := self.pairs.pop(0, None)) is not None:
            self.removed[0] = old
        if queue.is_ring and not self._taken(0):
            self.pairs[0] = queue

    def run(self, command: QueueCommand) -> None:
        """CREATE_QUEUE, DELETE_QUEUE.

        Raises:
            RejectedError: it does not end OK.
        """
        if command.opcode == Opcode.CREATE_QUEUE:
            self._create(command)
        elif any((command.entries, command.submission, command.completion, command.base, command.limit)):
            raise RejectedError(Status.INVALID_FIELD)
        else:
            self._delete(command.queue)

    def _create(self, command: QueueCommand) -> None:
        number = command.queue
        queue = Queue(number, command.entries, command.submission, command.completion, command.base, command.limit)
        for where, bad in enumerate((
            not 1 <= number < QUEUES or self._taken(number),
            not queue.is_ring,
            command.submission % LINE_BYTES,
            command.completion % LINE_BYTES,
        )):
            if bad:
                raise RejectedError(Status.INVALID_QUEUE, where)
        self.removed.pop(number, None)
        self.pairs[number] = queue

    def _delete(self, number: int) -> None:
        queue = (self.pairs.pop(number, None) or self.removed.pop(number, None)) if number else None
        if queue is None:
            raise RejectedError(Status.INVALID_QUEUE, 0)
        if queue.under_way:
            self.removed[number] = queue
            raise RejectedError(Status.QUEUE_BUSY, 0)
