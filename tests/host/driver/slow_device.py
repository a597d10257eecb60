"""A golden device that works only while the host waits for it."""

from kvattic.golden.device import GoldenDevice
from kvattic.spec.config import TINY


class SlowDevice(GoldenDevice):
    """Does nothing between two waits, and in each of them only what raises the interrupt line.

    Attributes:
        waits: how often the host waited.
        asleep: it does nothing then, either.
        reads: names of the registers that were read.
        writes: (name, value) of those that were written.
        commands: most commands that it had at any wait, by queue.
        dry: waits at whose end a queue had nothing left to do.
    """

    def __init__(self, config=TINY, **options):
        self.waits = self.dry = 0
        self.asleep = False
        self.reads, self.writes = [], []
        self.commands = {}
        self._awake = False
        super().__init__(config, **options)

    def forget(self):
        """Count from here."""
        self.waits = self.dry = 0
        self.reads.clear()
        self.writes.clear()
        self.commands.clear()

    def read_register(self, name):
        self.reads.append(name)
        return super().read_register(name)

    def write_register(self, name, value):
        self.writes.append((name, value))
        super().write_register(name, value)

    def _step(self):
        return self._awake and super()._step()

    def wait(self, timeout_s):
        self.waits += 1
        for number, queue in self._queues.pairs.items():
            has = queue.under_way + queue.unread + (queue.tail - queue.head) % queue.entries
            self.commands[number] = max(self.commands.get(number, 0), has)
        self._awake = not self.asleep
        try:
            super().wait(timeout_s)
        finally:
            self._awake = False
        self.dry += not self._queues.fetchable
