"""Several queues that share one memory, where one item comes and one goes in a cycle."""

from typing import Any

from amaranth.hdl import Array, Cat, Module, Shape, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2


def queue_number(queues: int) -> range:
    """Shape of a queue's number; it has a bit even where there is one queue."""
    return range(max(2, queues))


class QueuePointers(wiring.Component):
    """Where the next item of each of several queues goes in, and where it comes out.

    Latency: an item can be popped from the cycle after its push on.  Throughput: a push and a pop a cycle.  Ordering:
    first in, first out, of each queue.  Reset empties all queues.

    Parameters
    ----------
    queues : int
        Number of queues.
    depth : int
        Items that each can hold, a power of two, at least 2.

    Members
    -------
    push, push_queue : In(1), In(queue_number)
        Strobe, only while `room`: an item goes into this queue.
    room : Out(1)
        `push_queue` has room.
    push_index : Out(range(depth))
        Its place in that queue.
    pop, pop_queue : In(1), In(queue_number)
        Strobe, only while it is `waiting`: the first item of this queue is gone.
    pop_index : Out(range(depth))
        Place of the first item of `pop_queue`.
    waiting : Out(queues)
        Queues that are not empty.

    Raises
    ------
    ValueError
        `depth` is not a power of two of at least 2.
    """

    push: Signal
    push_queue: Signal
    room: Signal
    push_index: Signal
    pop: Signal
    pop_queue: Signal
    pop_index: Signal
    waiting: Signal

    def __init__(self, queues: int, depth: int) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two of at least 2, not {depth!r}")
        self._queues, self._depth = queues, depth
        super().__init__({
            "push": In(1),
            "push_queue": In(queue_number(queues)),
            "room": Out(1),
            "push_index": Out(range(depth)),
            "pop": In(1),
            "pop_queue": In(queue_number(queues)),
            "pop_index": Out(range(depth)),
            "waiting": Out(queues),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A bit more than an index has: what is equal below it is full or empty.
        bits = ceil_log2(self._depth)
        pushed = [Signal(bits + 1, name=f"pushed_{queue}") for queue in range(self._queues)]
        popped = [Signal(bits + 1, name=f"popped_{queue}") for queue in range(self._queues)]
        end, begin, first = (Signal(bits + 1, name=name) for name in ("end", "begin", "first"))
        m.d.comb += [
            end.eq(Array(pushed)[self.push_queue]),
            begin.eq(Array(popped)[self.push_queue]),
            first.eq(Array(popped)[self.pop_queue]),
            self.room.eq((end ^ begin) != self._depth),
            self.push_index.eq(end),
            self.pop_index.eq(first),
            self.waiting.eq(Cat(a != b for a, b in zip(pushed, popped, strict=True))),
        ]
        for queue in range(self._queues):
            with m.If(self.push & (self.push_queue == queue)):
                m.d.sync += pushed[queue].eq(end + 1)
            with m.If(self.pop & (self.pop_queue == queue)):
                m.d.sync += popped[queue].eq(first + 1)
        return m


class QueueSet(wiring.Component):
    """Several queues in one block RAM.

    Latency: an item is `waiting` in the cycle after it came.  Throughput: an item in and an item out a cycle.
    Ordering: first in, first out, of each queue.  Reset empties all queues.

    Parameters
    ----------
    shape : shape-like
        Of an item.
    queues : int
        Number of queues.
    depth : int
        Items that each can hold, a power of two, at least 2.
    checked : bool
        See `i`.

    Members
    -------
    i : In(stream of queue, item)
        An item and the queue that it is for; it is taken where that queue has room.  Where that was looked up a cycle
        before (`checked`), `valid` comes with `ready` only, which does not depend on it.
    waiting : Out(queues)
        Queues that are not empty.
    queue : In(queue_number)
        Queue that is looked at.
    head : Out(shape)
        Its first item, one cycle later.
    pop : In(1)
        Strobe, only while it is `waiting`: the first item of `queue` is gone.
    """

    i: stream.Interface
    waiting: Signal
    queue: Signal
    head: Any
    pop: Signal

    def __init__(self, shape: Shape | data.Layout, queues: int, depth: int, *, checked: bool = False) -> None:
        self._shape, self._queues, self._depth, self._checked = shape, queues, depth, checked
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"queue": queue_number(queues), "item": shape}))),
            "waiting": Out(queues),
            "queue": In(queue_number(queues)),
            "head": Out(shape),
            "pop": In(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.pointers = pointers = QueuePointers(self._queues, self._depth)
        m.submodules.items = items = Memory(
            shape=self._shape, depth=self._depth << ceil_log2(self._queues), init=[])
        write, read = items.write_port(), items.read_port()
        number = ceil_log2(self._queues)
        m.d.comb += [
            pointers.push_queue.eq(self.i.payload.queue),
            pointers.push.eq(self.i.valid if self._checked else self.i.valid & pointers.room),
            self.i.ready.eq(pointers.room),
            write.addr.eq(Cat(pointers.push_index, self.i.payload.queue[:number])),
            write.data.eq(self.i.payload.item),
            write.en.eq(pointers.push),
            pointers.pop_queue.eq(self.queue),
            pointers.pop.eq(self.pop),
            read.addr.eq(Cat(pointers.pop_index, self.queue[:number])),
            self.head.eq(read.data),
            self.waiting.eq(pointers.waiting),
        ]
        return m
