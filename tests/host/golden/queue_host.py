"""Queues set up by hand: what a driver does, without the driver."""

from collections.abc import Iterable

from kvattic.golden.device import GoldenDevice
from kvattic.spec.commands import GRANT_COMMAND, LINE_BYTES, QUEUE_COMMAND, Completion, Grant, Opcode, Status
from kvattic.spec.registers import MAX_REGIONS

REGION_BITS = 4
DOMAIN = 1
"""What `Host.open` gives everything to."""


class Host:
    """Rings of a device, by queue number; ring q lies at `rings + q * 2 * entries * 64`, completions behind commands.

    Args:
        device: it.
        rings: where the rings begin in host memory.
        entries: of each ring.
        window: first address of the blocks of the queues' commands, and one past the last.
    """

    def __init__(self, device: GoldenDevice, *, rings: int, entries: int, window: tuple[int, int]) -> None:
        self.device = device
        self.rings = rings
        self.entries = entries
        self.window = window
        self.tails: dict[int, int] = {}
        self.heads: dict[int, int] = {}
        """Completions taken, of all rounds."""

    def submission(self, queue: int) -> int:
        """Address of a queue's submission ring."""
        return self.rings + queue * 2 * self.entries * LINE_BYTES

    def completion(self, queue: int) -> int:
        """Address of a queue's completion ring."""
        return self.submission(queue) + self.entries * LINE_BYTES

    def clear(self, queue: int) -> None:
        """Rings as they must be for a new queue: no completion with phase 1."""
        self.device.write_memory(self.completion(queue), bytes(self.entries * LINE_BYTES))
        self.tails[queue] = self.heads[queue] = 0

    def admin(self) -> None:
        """Create queue 0."""
        self.clear(0)
        for name, value in (("SUBMISSION", self.submission(0)), ("COMPLETION", self.completion(0)),
                            ("BASE", self.window[0]), ("LIMIT", self.window[1]), ("ENTRIES", self.entries)):
            self.device.write_register(f"ADMIN_{name}", value)
        self.device.write_register("INTERRUPT_MASK", 0xFF)

    def create_line(self, queue: int, **changes: int) -> bytes:
        """CREATE_QUEUE."""
        return QUEUE_COMMAND.pack(**{
            "opcode": Opcode.CREATE_QUEUE, "queue": queue, "entries": self.entries,
            "submission": self.submission(queue), "completion": self.completion(queue), "base": self.window[0],
            "limit": self.window[1], **changes})

    def create(self, queue: int, **changes: int) -> None:
        """Create a queue."""
        self.clear(queue)
        self.ok(self.create_line(queue, **changes))

    def grant(self, kind: Grant, first: int, count: int, domain: int) -> None:
        """GRANT."""
        self.ok(GRANT_COMMAND.pack(opcode=Opcode.GRANT, kind=kind, first=first, count=count, domain=domain))

    def open(self, queues: Iterable[int] = (1,)) -> None:
        """Queue 0 and others, and everything to DOMAIN, which they all may name; 16 pages make a region."""
        self.admin()
        self.device.write_register("REGION_BITS", REGION_BITS)
        for queue in queues:
            self.create(queue)
        self.grant(Grant.ZONES, 0, self.device.config.part.blocks, DOMAIN)
        self.grant(Grant.REGIONS, 0, MAX_REGIONS, DOMAIN)
        self.grant(Grant.QUEUES, 0xFF, 0, DOMAIN)

    def push(self, queue: int, *lines: bytes) -> None:
        """Put commands into a ring, without the doorbell."""
        for line in lines:
            self.device.write_memory(self.submission(queue) + self.tails[queue] * LINE_BYTES, line)
            self.tails[queue] = (self.tails[queue] + 1) % self.entries

    def ring(self, queue: int) -> None:
        """The doorbell of commands."""
        self.device.write_register(f"SUBMISSION_TAIL_{queue}", self.tails[queue])

    def reap(self, queue: int, *, take: bool = True) -> list[Completion]:
        """The completions that are there, found by their phase; `take`: ring their doorbell."""
        found = []
        head = self.heads[queue]
        while len(found) < self.entries:
            turn, place = divmod(head, self.entries)
            data = self.device.read_memory(self.completion(queue) + place * LINE_BYTES, LINE_BYTES)
            if data[14] & 1 == turn & 1:
                break
            found.append(Completion.unpack(data))
            assert found[-1].queue == queue
            head += 1
        if take and found:
            self.heads[queue] = head
            self.device.write_register(f"COMPLETION_HEAD_{queue}", head % self.entries)
        return found

    def run(self, queue: int, *lines: bytes) -> list[Completion]:
        """Completions of commands, in order of completion; other queues' completions stay in their rings."""
        mask = self.device.read_register("INTERRUPT_MASK")
        self.device.write_register("INTERRUPT_MASK", 1 << queue)
        found: list[Completion] = []
        for at in range(0, len(lines), self.entries - 1):
            part = lines[at : at + self.entries - 1]
            self.push(queue, *part)
            self.ring(queue)
            while len(found) < at + len(part):
                self.device.wait(1)
                found += self.reap(queue)
        self.device.write_register("INTERRUPT_MASK", mask)
        return found

    def ok(self, line: bytes) -> None:
        """Run a command of queue 0, which must end OK."""
        (found,) = self.run(0, line)
        assert found.status is Status.OK, found
