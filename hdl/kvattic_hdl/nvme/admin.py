"""Executes the commands that are neither jobs nor flash commands: IDENTIFY, COUNTERS, queues and grants."""

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import DOMAINS, IDENTIFY_BYTES, LINE_BYTES, Grant, Opcode, Status, lines
from kvattic.spec.config import Config
from kvattic.spec.registers import COUNTERS, MAX_ENTRIES, MAX_REGIONS, QUEUES
from kvattic_hdl.lib.records import WORD_BYTES
from kvattic_hdl.lib.shapes import GRANT, QUEUE_BITS, Shapes
from kvattic_hdl.nvme.queues import CREATE, REMOVE

SETTLE_CYCLES = 5
"""From `create` or `remove` to the look at `present` and `under_way`."""
COUNTER_BYTES = 8
"""Of each counter in the block of COUNTERS."""
INVALID_ADDRESS_RESULT = 1
"""`where` of INVALID_ADDRESS: the result's."""


class Admin(wiring.Component):
    """Checks and executes commands one after the other.

    The loader has checked what all commands have in common, up to INVALID_FIELD.  The first that applies is reported.
    IDENTIFY, COUNTERS: INVALID_ADDRESS.  CREATE_QUEUE: INVALID_QUEUE (queue, entries, submission, completion).
    DELETE_QUEUE: INVALID_QUEUE (no such queue), QUEUE_BUSY; of a queue that this status was reported for it can be
    repeated.  GRANT: INVALID_GRANT (kind, first or count, domain); it ends when all is granted.

    Latency: a command is taken two cycles after it is offered.  Its outcome follows in the next cycle; of CREATE_QUEUE
    and DELETE_QUEUE five cycles after `create` or `remove`; of GRANT after all zones or regions are written.
    Throughput: one command at a time.
    Reset: nothing under way, no queue that DELETE_QUEUE could be repeated for.  A grant that `Owners` has taken goes
    on.

    Parameters
    ----------
    config : Config
        The configuration.

    Raises
    ------
    ValueError
        The configuration's text is too long for IDENTIFY.

    Members
    -------
    commands : In(stream of Shapes.admin_command)
        From the loader.
    outcomes : Out(stream of Shapes.ended)
        For the finisher.
    create : Out(queues.CREATE)
        Strobe, one cycle after the CREATE_QUEUE was taken.
    remove : Out(queues.REMOVE)
        Strobe, one cycle after the DELETE_QUEUE was taken.
    present, under_way : In(QUEUES)
        The queue is there; commands of it have been fetched, or will be although it is removed, and have no
        acknowledged completion.  Right at the latest three cycles after `create` or `remove`.
    grant : Out(stream of interfaces.GRANT)
        To `Owners`, which is done with it when it is ready again.
    block_index : In(range(IDENTIFY_BYTES // 8))
        Number of a word of the block that belongs to the last outcome taken.
    block_data : Out(64)
        Three cycles later: that word.  A counter is that of two cycles before, or of one earlier while the bus reads.
    counter_number, counter_first : Out, Out(1)
        Which of `registers.COUNTERS` is to be read; it is another than in the cycle before.
    counter_there, counter : In(1), In(64)
        `counter` is the value of that one of the cycle before.  Always so in the cycle after `counter_first`.
    """

    commands: stream.Interface
    outcomes: stream.Interface
    create: data.View
    remove: data.View
    present: Signal
    under_way: Signal
    grant: stream.Interface
    block_index: Signal
    block_data: Signal
    counter_number: Signal
    counter_first: Signal
    counter_there: Signal
    counter: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        text = config.to_json().encode()
        if len(text) > IDENTIFY_BYTES:
            raise ValueError(f"config.to_json() must be at most {IDENTIFY_BYTES} bytes, which IDENTIFY writes, not "
                             f"{len(text)}: give the part a shorter name")
        text = text.ljust(IDENTIFY_BYTES, b"\0")
        self._words = [int.from_bytes(text[i : i + WORD_BYTES], "little") for i in range(0, len(text), WORD_BYTES)]
        super().__init__({
            "commands": In(stream.Signature(shapes.admin_command)),
            "outcomes": Out(stream.Signature(shapes.ended)),
            "create": Out(CREATE),
            "remove": Out(REMOVE),
            "present": In(QUEUES),
            "under_way": In(QUEUES),
            "grant": Out(stream.Signature(GRANT)),
            "block_index": In(range(len(self._words))),
            "block_data": Out(WORD_BYTES * 8),
            "counter_number": Out(range(len(COUNTERS))),
            "counter_first": Out(1),
            "counter_there": In(1),
            "counter": In(COUNTER_BYTES * 8),
        })
        self._deleted = Signal(QUEUES, name="deleted")   # DELETE_QUEUE reported QUEUE_BUSY
        self._judging = Signal(name="judging")

    def elaborate(self, platform: object) -> Module:
        m = Module()
        command, ended = self.commands.payload, self.outcomes.payload
        of_counters = Signal()   # the outcome is that of COUNTERS
        counting = Signal()      # the block is that of COUNTERS
        settle = Signal(range(SETTLE_CYCLES))
        removing = Signal()
        self._read_block(m, counting)
        queue_checks = self._check_queue(m)
        grant_checks = self._check_grant(m)
        m.d.sync += [self.create.valid.eq(0), self.remove.valid.eq(0)]

        with m.FSM(name="state"):
            with m.State("idle"):
                m.d.sync += [
                    ended.queue.eq(command.queue),
                    ended.identifier.eq(command.identifier),
                    ended.status.eq(Status.OK),
                    ended.where.eq(0),
                    ended.lines.eq(0),
                    ended.result.eq(command.submission),
                    settle.eq(0),
                ]
                with m.If(self.commands.valid):
                    m.next = "check"
            with m.State("check"):
                m.next = "judge"
            with m.State("judge"):
                m.d.comb += [self._judging.eq(1), self.commands.ready.eq(1)]
                m.next = "end"
                with m.Switch(command.opcode):
                    for opcode, size in ((Opcode.IDENTIFY, IDENTIFY_BYTES),
                                         (Opcode.COUNTERS, len(COUNTERS) * COUNTER_BYTES)):
                        with m.Case(opcode):
                            m.d.sync += of_counters.eq(opcode == Opcode.COUNTERS)
                            with m.If(command.bad_address):
                                self._refuse(m, Status.INVALID_ADDRESS, INVALID_ADDRESS_RESULT)
                            with m.Else():
                                m.d.sync += ended.lines.eq(lines(size))
                    with m.Case(Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE):
                        self._change_queue(m, queue_checks, removing)
                    with m.Case(Opcode.GRANT):
                        self._give_grant(m, grant_checks)
                    with m.Default():   # does not happen: the loader ends it
                        m.d.sync += [ended.status.eq(Status.INVALID_OPCODE), ended.where.eq(command.opcode)]
            with m.State("settle"):
                m.d.sync += settle.eq(settle + 1)
                with m.If(settle == SETTLE_CYCLES - 1):
                    m.next = "end"
                    with m.If(removing):
                        busy = self.under_way.bit_select(self.remove.queue, 1)
                        m.d.sync += self._deleted.bit_select(self.remove.queue, 1).eq(busy)
                        with m.If(busy):
                            self._refuse(m, Status.QUEUE_BUSY, 0)
            with m.State("grant"):
                with m.If(self.grant.ready):
                    m.next = "end"
            with m.State("end"):
                m.d.comb += self.outcomes.valid.eq(1)
                with m.If(self.outcomes.ready):
                    m.d.sync += counting.eq(of_counters)
                    m.next = "idle"
        return m

    def _refuse(self, m: Module, status: Status, where: int) -> None:
        """The command ends so."""
        m.d.sync += [self.outcomes.payload.status.eq(status), self.outcomes.payload.where.eq(where)]

    def _read_block(self, m: Module, counting: Signal) -> None:
        """Words of the blocks."""
        m.submodules.identify = identify = Memory(
            shape=WORD_BYTES * 8, depth=len(self._words), init=self._words, attrs={"rom_style": "block"})
        read = identify.read_port()
        counter, counting_1 = Signal(COUNTER_BYTES * 8), Signal()
        # A cycle late: a counter is read far from here.
        index = Signal.like(self.block_index)
        number = index[: len(self.counter_number)]
        before = Signal.like(number)
        m.d.sync += [index.eq(self.block_index), counting_1.eq(counting), before.eq(number)]
        fresh = Signal()
        m.d.comb += fresh.eq(self.counter_there & (before < len(COUNTERS)))
        with m.If(fresh):
            m.d.sync += counter.eq(self.counter)
        with m.If(number >= len(COUNTERS)):   # what pads them
            m.d.sync += counter.eq(0)
        m.d.comb += [
            self.counter_number.eq(number),
            self.counter_first.eq(counting & (number != before)),
            read.addr.eq(index),
            self.block_data.eq(Mux(counting_1, counter, read.data)),
        ]

    # ---- checks: right two cycles after a command is offered

    def _check_queue(self, m: Module) -> dict[str, Signal]:
        """CREATE_QUEUE, DELETE_QUEUE: what is wrong, by name, and whether the queue is there or known."""
        command = self.commands.payload
        queue = command.number[:QUEUE_BITS]
        offset_bits = ceil_log2(LINE_BYTES)
        found = {name: Signal(name=name) for name in (
            "no_queue", "there", "known", "bad_entries", "bad_submission", "bad_completion")}
        entries_bits = Signal.like(self.create.entries_bits)
        m.d.sync += [
            found["no_queue"].eq((command.number == 0) | (command.number >= QUEUES)),
            found["there"].eq((self.present | self.under_way).bit_select(queue, 1)),
            found["known"].eq((self.present | self._deleted).bit_select(queue, 1)),
            found["bad_entries"].eq(1),
            found["bad_submission"].eq(command.submission[:offset_bits].any()),
            found["bad_completion"].eq(command.completion[:offset_bits].any()),
        ]
        for bits in range(1, ceil_log2(MAX_ENTRIES) + 1):
            with m.If(command.entries == 1 << bits):
                m.d.sync += [found["bad_entries"].eq(0), entries_bits.eq(bits)]
        with m.If(self._judging):
            m.d.sync += [
                self.create.queue.eq(queue),
                self.create.entries_bits.eq(entries_bits),
                self.create.submission.eq(command.submission[offset_bits:]),
                self.create.completion.eq(command.completion[offset_bits:]),
                self.remove.queue.eq(queue),
            ]
        return found

    def _check_grant(self, m: Module) -> tuple[Signal, Value, Signal]:
        """GRANT: (bad kind, bad range, bad domain)."""
        command = self.commands.payload
        to_queues = command.number == Grant.QUEUES
        bad_kind, bad_range, bad_domain, beyond = (
            Signal(name=name) for name in ("bad_kind", "bad_range", "bad_domain", "beyond"))
        end = Signal(len(command.first) + 1)
        m.d.comb += [
            self.grant.payload.kind.eq(command.number),
            self.grant.payload.first.eq(command.first),
            self.grant.payload.count.eq(command.count),
            self.grant.payload.domain.eq(command.domain),
        ]
        m.d.sync += [
            end.eq(command.first + command.count),
            beyond.eq(end > Mux(command.number == Grant.ZONES, self._config.part.blocks, MAX_REGIONS)),
            bad_kind.eq(command.number > max(Grant)),
            bad_range.eq(Mux(to_queues, command.count.any() | command.first[QUEUES:].any(), ~command.count.any())),
            bad_domain.eq((command.domain >= DOMAINS) | (to_queues & ~command.domain.any())),
        ]
        return bad_kind, bad_range | (beyond & ~to_queues), bad_domain

    # ---- parts of the state "judge"

    def _change_queue(self, m: Module, found: dict[str, Signal], removing: Signal) -> None:
        """CREATE_QUEUE, DELETE_QUEUE."""
        command = self.commands.payload
        delete = command.opcode == Opcode.DELETE_QUEUE
        with m.If(found["no_queue"] | Mux(delete, ~found["known"], found["there"])):
            self._refuse(m, Status.INVALID_QUEUE, 0)
        with m.Elif(delete):
            m.d.sync += [self.remove.valid.eq(1), removing.eq(1)]
            m.next = "settle"
        with m.Elif(found["bad_entries"]):
            self._refuse(m, Status.INVALID_QUEUE, 1)
        with m.Elif(found["bad_submission"]):
            self._refuse(m, Status.INVALID_QUEUE, 2)
        with m.Elif(found["bad_completion"]):
            self._refuse(m, Status.INVALID_QUEUE, 3)
        with m.Else():
            queue = command.number[:QUEUE_BITS]
            m.d.sync += [self.create.valid.eq(1), removing.eq(0), self._deleted.bit_select(queue, 1).eq(0)]
            m.next = "settle"

    def _give_grant(self, m: Module, found: tuple[Signal, Value, Signal]) -> None:
        """GRANT."""
        bad_kind, bad_range, bad_domain = found
        with m.If(bad_kind):
            self._refuse(m, Status.INVALID_GRANT, 0)
        with m.Elif(bad_range):
            self._refuse(m, Status.INVALID_GRANT, 1)
        with m.Elif(bad_domain):
            self._refuse(m, Status.INVALID_GRANT, 2)
        with m.Else():
            # It waits here for an older one that went on over a reset.
            m.d.comb += [self.grant.valid.eq(1), self.commands.ready.eq(self.grant.ready)]
            m.next = "judge"
            with m.If(self.grant.ready):
                m.next = "grant"
