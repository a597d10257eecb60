"""Rings, doorbells, turns and interrupts of the queues."""

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.lib.axi import LINE_ADDRESS_BITS

QUEUE_BITS = (QUEUES - 1).bit_length()
ENTRY_BITS = (MAX_ENTRIES - 1).bit_length()
"""Bits of an entry's number."""
AFTER_BITS = 16
"""Bits of INTERRUPT_AFTER."""
ERROR_BITS = 16
"""Bits of a refused doorbell's value that are kept."""

DOORBELL = data.StructLayout({"valid": 1, "completion": 1, "queue": QUEUE_BITS, "value": 32})
"""A doorbell was written: COMPLETION_HEAD if `completion`, else SUBMISSION_TAIL."""
CREATE = data.StructLayout(
    {
        "valid": 1,
        "queue": QUEUE_BITS,
        "entries_bits": ENTRY_BITS.bit_length(),  # log2 of a ring's entries, 1 to 12
        "submission": LINE_ADDRESS_BITS,
        "completion": LINE_ADDRESS_BITS,
    }
)
"""A queue is created, with these rings; bases are numbers of lines."""
REMOVE = data.StructLayout({"valid": 1, "queue": QUEUE_BITS})
"""A queue is removed."""
FETCH = data.StructLayout({"queue": QUEUE_BITS, "line": LINE_ADDRESS_BITS})
"""Where the next command stands."""


def _at(m: Module, memory: Memory, queue: Value) -> Value:
    """What the memory holds of a queue."""
    port = memory.read_port(domain="comb")
    m.d.comb += port.addr.eq(queue)
    return port.data


def _mask(bits: Value) -> Value:
    """Entries of a ring, less one."""
    return Cat(bits > i for i in range(ENTRY_BITS))


class Queues(wiring.Component):
    """Keeps the queues' rings: checks doorbells, says which line to fetch next and where to post.

    Latency: a doorbell shows in `busy` three cycles later, in `fetch` six; `refused` comes two cycles after it.
    `present` follows `create` and `remove` at once.  `interrupts` falls three cycles after the doorbell that takes the
    last completion, and rises two after the `posted` that leaves nothing under way; it sees about ten cycles late that
    INTERRUPT_AFTER are reached no more, and at most 40 late whatever comes.
    Throughput: a doorbell every two cycles; a line every four.
    Ordering: queues take turns, one line each.  A doorbell in a later cycle than `create` meets the new queue.
    Reset: no queue is there; nothing is under way.

    A command is under way from the cycle in which its line is offered on `fetch` until `posted`; it counts as fetched,
    for `post_head` too, when the line is taken.  A line that is offered stays, whatever becomes of its queue.

    Each number of a ring has one writer: tail and `taken` belong to the doorbells, the head to `fetch`, the place of
    the next completion to `post`, the end of the unread ones to `posted`.  So nothing is lost when they meet.  `busy`
    and `interrupts` follow from numbers of one cycle and show no state that never was.

    Members
    -------
    doorbell : In(DOORBELL)
        Strobe: a doorbell; not in two successive cycles.
    refused : Out(1)
        Strobe: a doorbell was refused and changed nothing.
    refused_doorbell : Out(32)
        Which one, as DOORBELL_ERROR has it; valid in the cycle of `refused`.
    create : In(CREATE)
        Strobe: the queue is there, empty; it may have been there before.  If its commands are under way it is only
        removed: their completions belong to the old ring.
    remove : In(REMOVE)
        Strobe: nothing is fetched from the queue any more, its doorbells are refused, it wants no interrupt.  Commands
        that are under way still post to its ring.  Not in the same cycle as `create`.
    present : Out(QUEUES)
        The queue is there.
    under_way : Out(QUEUES)
        The queue has commands under way; never low too early.
    hold : In(QUEUES)
        Offer no line of these; one that is offered stays.
    fetch : Out(stream of FETCH)
        The next command's line.  After a transfer there is a pause of at least three cycles, so that `hold` can follow.
    post_queue : In(3)
        The queue to post to.
    post_line, post_phase, post_head : Out
        Line and phase bit of its next completion, and the fetch head that it tells: two cycles after the later of a
        change of `post_queue` and `post`.
    post : In(1)
        Strobe: a completion of `post_queue`, which has been stable for two cycles, takes that entry.  Not again before
        `posted`.
    posted, posted_queue : In
        Strobe: that completion is in host memory.  The host may have found it there, and taken it, since `post`.
    interrupt_after : In(16)
        The register INTERRUPT_AFTER.
    interrupts : Out(QUEUES)
        The queue wants an interrupt: it has completions that are not taken, `interrupt_after` of them or nothing under
        way and nothing to fetch.
    busy : Out(1)
        A command can be fetched (held or not) or is under way.
    """

    doorbell: data.View
    refused: Signal
    refused_doorbell: Signal
    create: data.View
    remove: data.View
    present: Signal
    under_way: Signal
    hold: Signal
    fetch: stream.Interface
    post_queue: Signal
    post_line: Signal
    post_phase: Signal
    post_head: Signal
    post: Signal
    posted: Signal
    posted_queue: Signal
    interrupt_after: Signal
    interrupts: Signal
    busy: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "doorbell": In(DOORBELL),
                "refused": Out(1),
                "refused_doorbell": Out(32),
                "create": In(CREATE),
                "remove": In(REMOVE),
                "present": Out(QUEUES),
                "under_way": Out(QUEUES),
                "hold": In(QUEUES),
                "fetch": Out(stream.Signature(FETCH)),
                "post_queue": In(QUEUE_BITS),
                "post_line": Out(LINE_ADDRESS_BITS),
                "post_phase": Out(1, init=1),
                "post_head": Out(ENTRY_BITS),
                "post": In(1),
                "posted": In(1),
                "posted_queue": In(QUEUE_BITS),
                "interrupt_after": In(AFTER_BITS),
                "interrupts": Out(QUEUES),
                "busy": Out(1),
            }
        )

        def numbers(name: str) -> Array:
            return Array(Signal(ENTRY_BITS, name=f"{name}_{q}") for q in range(QUEUES))

        self._tail, self._head = numbers("tail"), numbers("head")
        self._place = numbers("place")  # of the next completion
        self._phase = Array(Signal(init=1, name=f"phase_{q}") for q in range(QUEUES))
        self._written = numbers("written")  # completions in host memory, up to this one
        self._taken = numbers("taken")
        self._ahead = numbers("ahead")  # head + 1: where it is `taken`, the completion ring may be full
        self._new, self._gone = Signal(QUEUES, name="new"), Signal(QUEUES, name="gone")
        self._fetchable = Signal(QUEUES, name="fetchable")

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        new, gone = self._new, self._gone
        for q in range(QUEUES):
            created = self.create.valid & (self.create.queue == q)
            m.d.comb += [
                new[q].eq(created & ~self.under_way[q]),
                gone[q].eq(created | self.remove.valid & (self.remove.queue == q)),
            ]
        m.d.sync += self.present.eq(self.present & ~gone | new)
        # What `create` says and nothing else changes: small memories, one read port for each use.
        entries_bits = self._keep(m, "entries_bits", ENTRY_BITS.bit_length())
        submission = self._keep(m, "submission", LINE_ADDRESS_BITS)
        completion = self._keep(m, "completion", LINE_ADDRESS_BITS)
        reached = self._ring(m, entries_bits)
        self._follow(m, reached)
        offer, offered = self._fetch(m, entries_bits, submission)
        writing = self._post(m, entries_bits, completion)
        for q in range(QUEUES):
            # A line that is being offered counts at once: `create` must not come between.  Where the host takes a
            # completion before we hear that it is there, as many commands as the ring has entries may be under way.
            m.d.sync += self.under_way[q].eq(
                (self._head[q] != self._written[q]) | writing[q] | offered[q] | offer[q])
            # Last: a new queue is empty.
            numbers = self._tail, self._head, self._place, self._written, self._taken
            with m.If(new[q]):
                m.d.sync += [number[q].eq(0) for number in numbers]
                m.d.sync += [self._phase[q].eq(1), self._ahead[q].eq(1)]
        return m

    def _keep(self, m: Module, name: str, bits: int) -> Memory:
        """A member of `create`, by queue."""
        m.submodules[name] = memory = Memory(shape=unsigned(bits), depth=QUEUES, init=[])
        port = memory.write_port()
        m.d.comb += [port.addr.eq(self.create.queue), port.data.eq(self.create[name]), port.en.eq(self._new.any())]
        return memory

    def _follow(self, m: Module, reached: Signal) -> None:
        """What follows from the numbers, one cycle later, of the same cycle for all."""
        unread = Signal(QUEUES)
        for q in range(QUEUES):
            there = self.present[q] & ~self._gone[q]
            m.d.sync += [
                self._fetchable[q].eq(
                    there & (self._tail[q] != self._head[q]) & (self._ahead[q] != self._taken[q])),
                # The host may have taken the one that is being written already.
                unread[q].eq(there & (self._written[q] != self._taken[q]) & (self._place[q] != self._taken[q])),
            ]
        m.d.comb += [
            self.busy.eq((self._fetchable | self.under_way).any()),
            self.interrupts.eq(unread & (reached | ~(self._fetchable | self.under_way))),
        ]

    def _ring(self, m: Module, entries_bits: Memory) -> Signal:
        """Doorbells, in two steps: distances, then the decision; queues with enough unread completions.

        What fetches and completions change between the two cannot make a legal doorbell illegal.  The host may find a
        completion in its memory before we hear that it is there.  Where no doorbell comes, the same subtraction counts
        a queue's unread completions.
        """
        tail, head, taken = self._tail, self._head, self._taken
        bell, scan = self.doorbell, Signal(QUEUE_BITS)
        side, queue = Signal(), Signal(QUEUE_BITS)
        m.d.comb += [side.eq(bell.completion | ~bell.valid), queue.eq(Mux(bell.valid, bell.queue, scan))]
        start = Mux(side, taken[queue], head[queue])
        end = Mux(bell.valid, Mux(side, self._place[queue], tail[queue]), self._written[queue])
        bell_mask = _mask(_at(m, entries_bits, queue))
        ringing, counting, legal, late = (Signal(name=name) for name in ("ringing", "counting", "legal", "late"))
        rung = Signal(DOORBELL)
        # Distances in the ring, once they are masked.
        asked_raw, there_raw, mask = Signal(ENTRY_BITS), Signal(ENTRY_BITS), Signal(ENTRY_BITS)
        asked, there = asked_raw & mask, there_raw & mask
        m.d.sync += [
            ringing.eq(bell.valid),
            counting.eq(~bell.valid),
            rung.eq(bell),
            rung.queue.eq(queue),
            legal.eq(self.present.bit_select(queue, 1) & ~bell.value[ENTRY_BITS:].any()),
            late.eq(self._gone.bit_select(queue, 1)),  # it was the old ring's, and must not get into the new one
            asked_raw.eq(bell.value[:ENTRY_BITS] - start),
            there_raw.eq(end - start),
            mask.eq(bell_mask),
        ]
        good = Signal()
        m.d.comb += good.eq(
            legal & ~(rung.value[:ENTRY_BITS] & ~mask).any()
            & (Mux(rung.completion, there, asked) >= Mux(rung.completion, asked, there)))
        accepted = Signal(QUEUES)
        m.d.comb += accepted.eq((ringing & good & ~late) << rung.queue)
        for q in range(QUEUES):
            with m.If(accepted[q] & ~rung.completion):
                m.d.sync += tail[q].eq(rung.value)
            with m.If(accepted[q] & rung.completion):
                m.d.sync += taken[q].eq(rung.value)
        m.d.sync += [
            self.refused.eq(ringing & ~good),
            self.refused_doorbell.eq(
                Cat(rung.value[:ERROR_BITS], rung.completion, Const(0, 24 - ERROR_BITS - 1), rung.queue)
            ),
        ]
        reached = Signal(QUEUES)
        with m.If(counting):
            m.d.sync += reached.bit_select(rung.queue, 1).eq(there >= self.interrupt_after)
        self._scan(m, scan)
        return reached

    def _scan(self, m: Module, scan: Signal) -> None:
        """The queue whose completions are counted: in turn; first where a completion has been written."""
        turn, in_turn = Signal(QUEUE_BITS), Signal()
        next_turn = Signal(QUEUE_BITS)
        m.d.comb += next_turn.eq(turn + (in_turn & ~self.doorbell.valid))
        m.d.sync += turn.eq(next_turn)
        with m.If(self.posted):
            m.d.sync += [scan.eq(self.posted_queue), in_turn.eq(0)]
        with m.Elif(~self.doorbell.valid):
            m.d.sync += [scan.eq(next_turn), in_turn.eq(1)]

    def _fetch(self, m: Module, entries_bits: Memory, submission: Memory) -> tuple[Signal, Signal]:
        """Offers the next command's line: (the queue whose line is being chosen, whose is offered)."""
        head = self._head
        fetch = self.fetch
        line, next_head = Signal(LINE_ADDRESS_BITS), Signal(ENTRY_BITS)
        above = Signal(QUEUES)  # the queues behind the one whose turn was last
        offer, offered = Signal(QUEUES), Signal(QUEUES)
        wanted, held = Signal(QUEUES), Signal(QUEUES)
        m.d.sync += held.eq(self.hold)     # in time: it counts two cycles after a line is taken
        m.d.comb += wanted.eq(self._fetchable & ~held)
        chosen = fetch.payload.queue
        mask, next_ahead = _mask(_at(m, entries_bits, chosen)), Signal(ENTRY_BITS)
        gone = Signal(name="chosen_gone")
        m.d.comb += [
            next_ahead.eq((next_head + 1) & mask),
            gone.eq((self.create.valid & (self.create.queue == chosen))
                    | (self.remove.valid & (self.remove.queue == chosen)))]
        with m.FSM(name="fetch_state"):
            with m.State("choose"):
                for only in (wanted, wanted & above):
                    for q in reversed(range(QUEUES)):
                        with m.If(only[q]):
                            m.d.sync += chosen.eq(q)
                with m.If(wanted.any()):
                    m.next = "read"
            with m.State("read"):
                m.d.sync += [line.eq(_at(m, submission, chosen)), next_head.eq(head[chosen])]
                m.next = "offer"
            with m.State("offer"):
                # The choice may be out of date.
                m.next = "choose"
                with m.If(wanted.bit_select(chosen, 1) & ~gone):
                    m.d.comb += offer.eq(1 << chosen)
                    m.d.sync += [
                        fetch.valid.eq(1),
                        fetch.payload.line.eq(line + next_head),
                        next_head.eq(next_ahead),
                        offered.eq(offer),
                        above.eq(Cat(Const(0, 1), (chosen < q for q in range(1, QUEUES)))),
                    ]
                    m.next = "take"
            with m.State("take"):
                with m.If(fetch.ready):
                    m.d.sync += [fetch.valid.eq(0), offered.eq(0)]
                    for q in range(QUEUES):
                        with m.If(offered[q]):
                            m.d.sync += [head[q].eq(next_head), self._ahead[q].eq(next_ahead)]
                    m.next = "choose"
        return offer, offered

    def _post(self, m: Module, entries_bits: Memory, completion: Memory) -> Signal:
        """Places of completions; queues whose completion is being written."""
        place, phase, written = self._place, self._phase, self._written
        post_base, post_place = Signal(LINE_ADDRESS_BITS), Signal(ENTRY_BITS)
        post_phase, post_head = Signal(), Signal(ENTRY_BITS)
        post_mask = Signal(ENTRY_BITS)
        next_place = Signal(ENTRY_BITS)
        m.d.comb += next_place.eq((post_place + 1) & post_mask)
        m.d.sync += [
            post_mask.eq(_mask(_at(m, entries_bits, self.post_queue))),
            post_base.eq(_at(m, completion, self.post_queue)),
            post_place.eq(place[self.post_queue]),
            post_phase.eq(phase[self.post_queue]),
            post_head.eq(self._head[self.post_queue]),
            self.post_line.eq(post_base + post_place),
            self.post_phase.eq(post_phase),
            self.post_head.eq(post_head),
        ]
        writing = Signal(QUEUES)
        next_written = (written[self.posted_queue] + 1) & _mask(_at(m, entries_bits, self.posted_queue))
        for q in range(QUEUES):
            with m.If(self.post & (self.post_queue == q)):
                m.d.sync += [place[q].eq(next_place), phase[q].eq(post_phase ^ ~next_place.any()), writing[q].eq(1)]
            with m.Elif(self.posted & (self.posted_queue == q)):
                m.d.sync += writing[q].eq(0)
            with m.If(self.posted & (self.posted_queue == q)):
                m.d.sync += written[q].eq(next_written)
        return writing
