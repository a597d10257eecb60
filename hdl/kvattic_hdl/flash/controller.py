"""The controller of a flash channel: turns requests and flash operations into commands and data bursts of its dies."""

from typing import Any

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind, MediaCause, Opcode, Status
from kvattic.spec.config import Config
from kvattic.spec.nand import MARK_ZEROS
from kvattic_hdl.flash.die_clocks import DieClocks
from kvattic_hdl.flash.phy import phy_signature
from kvattic_hdl.flash.runs import RunQueues, RunShapes
from kvattic_hdl.flash.sequencers import Addresses, Commander, Mover, Transfer
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.interfaces import EPOCH_BITS, OPCODE_BITS, PAGE_BITS, operation_code

RETRY_FEATURE = 0x89
"""Address of the feature that chooses a read-retry level."""
OPERATIONS, RETRIES = 64, 16
"""Depth of the queues of operations and of retries."""
RETRIES_HELD = 4
"""With so many retries waiting no new codeword is fetched, so that the decoder always finds room for another one."""
STATUS_FAIL = 0
"""Bit of a status byte: the operation failed."""


class Phase(enum.Enum, shape=5, view_class=None):
    """Where a die is."""

    RESET = 0
    """Wants its reset."""
    RESETTING = 1
    IDLE = 2
    READ = 3
    """Planes of `batch` have not got their read command yet."""
    ARRAY = 4
    """The array reads."""
    LOADED = 5
    """Pages of `loaded` stand in the registers and are moved."""
    NEXT = 6
    """Cache reads: `loaded` is moved, `ahead` is to follow it into the cache registers."""
    RELEASE = 7
    """Cache reads: one that is not wanted any more ends."""
    WRITE = 8
    """A page's data are moved into the die."""
    WRITTEN = 9
    """They have been."""
    MORE = 10
    """The next operation is another plane's, and joins."""
    WORKING = 11
    """The array programs or erases the planes of `loaded`."""
    STATUS = 12
    """A plane's status is to be asked for."""
    STATUS_READ = 13
    """It can be fetched."""
    PROBE = 14
    """A page that may have the mark of a bad block is read."""
    RESULT = 15
    """The byte that tells an operation's outcome is under way."""
    FAILED = 16
    """Operations of the planes of `loaded` are answered with DIE_TIMEOUT."""
    FEATURE = 17
    """A retry's level (or the default, after it) is to be set: command."""
    FEATURE_DATA = 18
    """Data."""
    FEATURE_SET = 19
    """Busy."""
    RETRY = 20
    """A retry's page is read."""
    RECOVER = 21
    """Reset after a timeout."""


class Trouble(enum.Enum, shape=2, view_class=None):
    """What a timeout interrupted."""

    NONE = 0
    READ = 1
    OPERATION = 2
    RETRY = 3


class Push(enum.Enum, shape=3, view_class=None):
    """Commands with a row address."""

    READ = 0
    COLUMN = 1
    PROGRAM = 2
    ERASE = 3
    STATUS = 4
    PROBE = 5
    RETRY = 6


class Controller(wiring.Component):
    """Keeps the dies of a channel busy, and its bus; docs/controller.md tells how.

    Each requested codeword arrives exactly once, in any order: a header, and its words from the PHY, or a header with a
    cause alone.  A V codeword is moved only while `value_open` has its slot's bit set or the slot's epoch is another
    one.  Operations begin in their order; those of different dies overlap.  Each has one outcome.

    Latency of a request on an idle channel: `patience` cycles of the queue at most, some ten of planning, the read.
    Reset: everything is forgotten but the map; each die is reset before it is used.

    Parameters
    ----------
    config : Config
    depth : int
        Runs of codewords that wait for each plane of each die.

    Members
    -------
    requests : In(stream of request)
        Codewords wanted of this channel's flash.
    value_open : In(jobs_in_flight)
    epoch : In(array of epochs, by slot)
    operations : In(stream of operation)
    words : In(stream of beat_bytes * 8 bits)
        Raw pages of the PROGRAM operations, codeword by codeword, in the operations' order.
    outcomes : Out(stream of outcome)
    headers : Out(stream of header)
        Before each codeword, up to `Mover.HEADER_WORDS` words before the end of the last one; taken when the decoder
        has a buffer for it.
    words_valid : Out(1)
        The PHY's `read` is a word of a codeword: of the oldest header whose words have not all come.
    retries : In(stream of retry)
        The decoder has given up that codeword's buffer and wants it again.  It must never hold more than
        RETRIES - RETRIES_HELD - 1 buffers.
    phy : Out(phy_signature)
    events : Out
        Fields word, command, dies_busy, retry, page_reads, page_programs, block_erases of `flash_events`.
    """

    def __init__(self, config: Config, depth: int = 16) -> None:
        self.config = config
        self.depth = depth
        self.shapes = shapes = RunShapes(config, depth)
        self.events_shape = data.StructLayout({
            name: shapes.flash_events.members[name]
            for name in ("word", "command", "dies_busy", "retry", "page_reads", "page_programs", "block_erases")})
        super().__init__({
            "requests": In(stream.Signature(shapes.request)),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "operations": In(stream.Signature(shapes.operation)),
            "words": In(stream.Signature(config.beat_bytes * 8)),
            "outcomes": Out(stream.Signature(shapes.outcome)),
            "headers": Out(stream.Signature(shapes.header)),
            "words_valid": Out(1),
            "retries": In(stream.Signature(shapes.retry)),
            "phy": Out(phy_signature(config)),
            "events": Out(self.events_shape),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        part = config.part
        planes, plane_bits, die_bits = part.planes, config.plane_bits, config.die_bits
        page_bits = config.block_page_bits
        shared = not part.separate_command_bus

        m.submodules.queues = queues = RunQueues(config, self.depth)
        m.submodules.clocks = clocks = DieClocks(config, sources=2)
        m.submodules.commander = commander = Commander(config)
        m.submodules.mover = mover = Mover(config)
        connect(m, flipped(self.requests), queues.requests)
        connect(m, commander.done, clocks.starts[0])
        connect(m, mover.written, clocks.starts[1])
        connect(m, commander.cycles, flipped(self.phy.cycles))
        connect(m, mover.bursts, flipped(self.phy.bursts))
        connect(m, mover.write, flipped(self.phy.write))
        connect(m, mover.headers, flipped(self.headers))
        clock = clocks.times
        m.d.comb += [
            clocks.ready.eq(self.phy.ready),
            mover.read.eq(self.phy.read),
            mover.read_valid.eq(self.phy.read_valid),
            self.words_valid.eq(mover.words_valid),
            # Commands go first; what is offered is not taken back.
            mover.allowed.eq(~commander.active if shared else 1),
            commander.allowed.eq(mover.clear if shared else 1),
        ]

        # Words of programs of a dead die are thrown away.
        program_words = config.codewords_per_page * config.raw_codeword_words
        draining = Signal(range(program_words + 1))
        m.d.comb += [
            mover.words.payload.eq(self.words.payload),
            mover.words.valid.eq(self.words.valid & (draining == 0)),
            self.words.ready.eq(mover.words.ready | (draining != 0)),
        ]
        with m.If((draining != 0) & self.words.valid):
            m.d.sync += draining.eq(draining - 1)

        # Operations and retries.
        def parts(page: Value) -> tuple[Value, Value, Value]:
            """Plane, die and row of a page number."""
            return page[:plane_bits], page[plane_bits : plane_bits + die_bits], page[plane_bits + die_bits :]

        m.submodules.operation_queue = operation_queue = SyncFIFOBuffered(
            width=shapes.operation.size, depth=OPERATIONS)
        m.submodules.retry_queue = retry_queue = SyncFIFOBuffered(width=shapes.retry.size, depth=RETRIES)
        # The operation whose turn it is stands before the queue, so that the one after it can be seen.
        operation, following, retry = Signal(shapes.operation), Signal(shapes.operation), Signal(shapes.retry)
        operation_there, operation_taken = Signal(), Signal()
        with m.If(operation_queue.r_en):
            m.d.sync += operation.eq(following)
        with m.If(operation_queue.r_en | operation_taken):
            m.d.sync += operation_there.eq(operation_queue.r_en & operation_queue.r_rdy)
        m.d.comb += [
            operation_queue.w_data.eq(self.operations.payload),
            operation_queue.w_en.eq(self.operations.valid),
            self.operations.ready.eq(operation_queue.w_rdy),
            following.eq(operation_queue.r_data),
            operation_queue.r_en.eq(operation_queue.r_rdy & (~operation_there | operation_taken)),
            retry_queue.w_data.eq(self.retries.payload),
            retry_queue.w_en.eq(self.retries.valid),
            self.retries.ready.eq(retry_queue.w_rdy),
            retry.eq(retry_queue.r_data),
        ]
        operation_plane, operation_die, operation_row = parts(operation.page)
        again = Signal(shapes.retry)     # the retry at work
        again_plane, _, again_row = parts(again.page)
        retrying = Signal()
        retries_full = Signal()
        m.d.sync += retries_full.eq(retry_queue.r_level >= RETRIES_HELD)

        # The map, as the difference to the identity: power-up contents are zeros.
        zone_bits = max(1, ceil_log2(part.blocks))
        block = unsigned(zone_bits)
        m.submodules.blocks = blocks = Memory(shape=block, depth=shapes.units << zone_bits, init=[])
        block_read, block_write = blocks.read_port(), blocks.write_port()

        def zone_of(row: Value) -> Value:
            return row[page_bits : page_bits + zone_bits]

        # What is known of each die; one machine reads and writes it, die by die.
        context_shape = data.StructLayout({
            "phase": Phase,
            "loaded": planes,      # planes whose pages are in the registers or on their way; or of an operation
            "batch": planes,       # planes that have not got their command yet
            "ahead": planes,       # cache reads: planes that the array reads while `loaded` is moved
            "plane": shapes.plane,   # the run that is moved: its plane, row, next codeword's tag and number, last one's
            "row": shapes.row,
            "tag": shapes.tag,
            "codeword": shapes.codeword_index,
            "last": shapes.codeword_index,
            "aimed": 1,            # the next data of the die are that codeword
            "near": 1,             # the die's output is on plane `selected`
            "selected": shapes.plane,
            "failed": 1,           # a timeout: codewords of `loaded` are answered with headers alone
            "dead": 1,             # it did not come back from its reset
            "trouble": Trouble,
            "turn": 1,             # the last was an operation: reads first
            "tried": 1,            # while parked: look for other work, or at another plane, in turn
            "cached": 1,           # a cache read is what the array does
            "several": 1,          # a multi-plane operation: status plane by plane
            "opcode": OPCODE_BITS,
        })
        m.submodules.contexts = contexts = Memory(shape=context_shape, depth=config.dies, init=[])
        seen, store = contexts.read_port(domain="comb"), contexts.write_port()
        m.submodules.records = records = Memory(
            shape=data.StructLayout({"identity": shapes.identity, "page": PAGE_BITS}), depth=shapes.units, init=[])
        record, record_new = records.read_port(domain="comb"), records.write_port()

        work = Signal(context_shape)
        die = Signal(shapes.die)
        command_die, data_turn = Signal(shapes.die), Signal()
        here = Signal(shapes.die)
        # Dies in the order in which they were loaded: the one that waits longest moves its data first, so that it reads
        # again while the others' are moved, and what was asked for first arrives first.
        order = Array(Signal(shapes.die, init=i, name=f"order_{i}") for i in range(config.dies))
        data_place, loaded = Signal(shapes.die), Signal()
        with m.If(loaded):
            moved = Const(0, 1)
            for i in range(config.dies):
                moved = moved | (order[i] == here)
                follower = order[i + 1] if i + 1 < config.dies else here
                with m.If(moved):
                    m.d.sync += order[i].eq(follower)
        here_context = Signal(context_shape)
        held = Signal(config.dies)     # a command is on its way to the die
        m.d.comb += [seen.addr.eq(here), here_context.eq(seen.data), here.eq(die), store.addr.eq(die),
                     store.data.eq(work)]
        with m.If(commander.done.valid):
            m.d.sync += held.bit_select(commander.done.payload.die, 1).eq(0)

        def unit_of(plane: Value, of_die: Value) -> Value:
            return Cat(plane[:plane_bits], of_die[:die_bits])

        def page_of(plane: Value, of_die: Value, row: Value) -> Value:
            return Cat(plane[:plane_bits], of_die[:die_bits], row)

        def after(plane: Value) -> Value:
            """The next plane, cyclic."""
            return (plane + 1)[:plane_bits]

        def bit(plane: Value) -> Value:
            return (Const(1, planes) << plane)[:planes]

        def gated(tag: data.View) -> Value:
            return ((tag.kind == Kind.VALUE) & ~self.value_open.bit_select(tag.slot, 1)
                    & (self.epoch[tag.slot] == tag.epoch))

        run = queues.run
        unit = Signal(shapes.unit_bits)
        scan = Signal(range(planes + 1))
        planning = Signal()
        m.d.comb += [
            unit.eq(unit_of(Mux(planning, scan[:shapes.plane.width], work.plane), die)),
            queues.unit.eq(unit),
            record.addr.eq(unit),
            block_read.addr.eq(Cat(unit, zone_of(work.row))),
        ]
        waiting = Signal(planes)          # of `here`
        waiting_after = Signal()          # the looked-at queue was not empty, when `run` was addressed
        m.d.comb += waiting.eq(queues.waiting.word_select(here[:die_bits], planes))
        m.d.sync += waiting_after.eq(queues.waiting.bit_select(unit, 1))

        # Commands.
        job = commander.jobs.payload
        push = Signal(Push)
        row_address = Signal(24)
        m.d.comb += [
            row_address.eq(Cat(work.row[:page_bits], work.plane[:plane_bits],
                               (block_read.data ^ zone_of(work.row))[:zone_bits])),
            job.row.eq(row_address),
            job.start.die.eq(die),
        ]

        def command(first: int, busy: float | None = None, wait: float = part.t_wb, factor: int = 2) -> None:
            """Give the commander a job; further fields beside."""
            m.d.comb += [
                commander.jobs.valid.eq(1), job.first.eq(first), job.start.wait.eq(clock.cycles(wait)),
                job.start.busy.eq(busy is not None), job.start.limit.eq(clock.ticks(busy or 0, factor)),
            ]
            m.d.sync += held.bit_select(die, 1).eq(1)

        def row_command(addresses: Addresses, column: Value | int = 0, second: Value | int | None = None) -> None:
            m.d.comb += [job.addresses.eq(addresses), job.column.eq(column)]
            if second is not None:
                m.d.comb += [job.twice.eq(1), job.second.eq(second)]

        def busy_limit(time: float) -> None:
            m.d.comb += job.start.limit.eq(clock.ticks(time))

        # Bursts.
        burst = mover.jobs.payload
        m.d.comb += burst.die.eq(die)

        # Outcomes.
        outcome, outcome_free = self.outcomes, Signal()
        m.d.comb += outcome_free.eq(~outcome.valid)
        with m.If(outcome.valid & outcome.ready):
            m.d.sync += outcome.valid.eq(0)

        def answer(status: Value | Status, of: Any) -> None:
            m.d.sync += [
                outcome.valid.eq(1), outcome.payload.identity.eq(of.identity), outcome.payload.page.eq(of.page),
                outcome.payload.status.eq(status),
            ]

        events = Signal(self.events_shape)
        busy_dies = sum(~self.phy.ready[i] for i in range(config.dies))
        m.d.comb += [
            events.word.eq(self.phy.read_valid | (self.phy.write.valid & self.phy.write.ready)),
            events.command.eq(self.phy.cycles.valid & self.phy.cycles.ready),
            events.dies_busy.eq(busy_dies),
        ]
        m.d.sync += self.events.eq(events)

        # The machine.
        free, overdue, outstanding = Signal(), Signal(), Signal()
        context = here_context
        m.d.comb += [
            free.eq((clocks.free.bit_select(here, 1) | context.dead) & ~held.bit_select(here, 1)),
            overdue.eq(clocks.overdue.bit_select(here, 1) & ~held.bit_select(here, 1) & ~context.dead),
            outstanding.eq((mover.planned & (mover.planned_die == here)) | (mover.moving & (mover.moving_die == here))),
        ]
        parked = Signal()                 # the codeword aimed at may not be moved yet
        m.d.comb += parked.eq(gated(context.tag))
        writing, write_count = Signal(), Signal(shapes.codeword_index)   # a page's data are moved into a die
        byte_used = Signal()              # a byte is on its way
        has_work, operation_here, retry_here = Signal(), Signal(), Signal()
        operation_ready = Signal()
        m.d.comb += [
            has_work.eq(waiting.any()),
            operation_ready.eq(operation_there & outcome_free & ~writing & (draining == 0)),
            operation_here.eq(operation_ready & (operation_die == here[:die_bits])),
            retry_here.eq(retry_queue.r_rdy & ~retrying & (parts(retry.page)[1] == here[:die_bits])),
        ]

        # Whether the next operation, or with one of another die between them the next but one, is of the same kind, die
        # and page, in another plane: two dies that take turns hide each other's time between planes.
        joins = Signal()

        def joined(other: Any) -> Value:
            plane, of_die, row = parts(other.page)
            return (
                (other.opcode == work.opcode) & (of_die == die[:die_bits]) & ~work.loaded.bit_select(plane, 1)
                & ((row[:page_bits] == work.row[:page_bits]) | (other.opcode == operation_code(Opcode.ERASE))))

        m.d.comb += joins.eq(operation_there & (
            joined(operation)
            | (operation_queue.r_rdy & (operation_die != die[:die_bits]) & joined(following))))
        best, best_gated, best_stamp = Signal(), Signal(), Signal(shapes.stamp)
        best_page = Signal(page_bits)
        second_pass, among_others, look_ahead = Signal(), Signal(), Signal()
        candidate, candidate_gated = Signal(), Signal()
        scanned = Signal(shapes.plane)
        mates = Signal(planes)
        swept = Signal(range(config.dies))
        # Cache reads: how many runs of the page that is in its register stand before a plane's next page; 0: no such.
        skip = Signal(range(self.depth))
        skip_here, skip_new = None, None
        if config.cache_reads:
            m.submodules.skips = skips = Memory(shape=skip.shape(), depth=shapes.units, init=[])
            skip_here, skip_new = skips.read_port(domain="comb"), skips.write_port()
            m.d.comb += [skip_here.addr.eq(unit), skip_new.addr.eq(unit), skip_new.data.eq(skip)]
        sought = Mux(work.phase == Phase.READ, work.batch, work.loaded)
        rest = Signal(planes)
        claimed = Signal()                # an operation or a retry waits for the die
        m.d.comb += claimed.eq(retry_here | (operation_here & ~(context.turn & has_work)))
        m.d.comb += rest.eq(work.batch & ~bit(work.plane))

        with m.FSM(init="SWEEP"):
            with m.State("SWEEP"):
                m.d.comb += [store.en.eq(1), store.addr.eq(swept)]   # `work` is all zeros: Phase.RESET
                m.d.sync += swept.eq(swept + 1)
                with m.If((swept == config.dies - 1) & queues.ready):
                    m.next = "VISIT"
                with m.Elif(swept == config.dies - 1):
                    m.d.sync += swept.eq(swept)

            with m.State("STORE"):
                m.d.comb += store.en.eq(1)
                m.next = "VISIT"

            # Look at a die: in turn for what its bus could do, and for what its state wants.
            with m.State("VISIT"):
                m.d.comb += here.eq(Mux(data_turn, order[data_place], command_die))
                m.d.sync += [
                    data_turn.eq(~data_turn), work.eq(context), die.eq(here), scan.eq(0), best.eq(0), mates.eq(0),
                    second_pass.eq(0), among_others.eq(0), look_ahead.eq(0), candidate.eq(0),
                ]
                with m.If(data_turn):
                    with m.If(mover.jobs.ready):
                        with m.If(free & (context.phase == Phase.LOADED) & context.aimed & ~parked
                                  & (~retries_full | context.failed)):
                            m.next = "MOVE"
                        with m.Elif(free & (context.phase == Phase.WRITE) & self.words.valid):
                            m.next = "WRITE"
                        with m.Else():
                            m.d.sync += data_place.eq(data_place + 1)
                with m.Else():
                    m.d.sync += command_die.eq(command_die + 1)
                    with m.If(operation_ready & (operation.opcode == operation_code(Opcode.MAP))):
                        m.next = "MAP"
                    with m.Elif(overdue & commander.jobs.ready):
                        m.next = "TIMEOUT"
                    with m.Elif(free & ~outstanding & commander.jobs.ready):
                        with m.Switch(context.phase):
                            with m.Case(Phase.RESET):
                                m.next = "RESET"
                            with m.Case(Phase.RESETTING, Phase.RELEASE):
                                m.d.sync += work.phase.eq(Phase.IDLE)
                                m.next = "STORE"
                            with m.Case(Phase.IDLE):
                                with m.If(retry_here):
                                    m.next = "RETRY"
                                with m.Elif(claimed):
                                    m.next = "OPERATION"
                                with m.Elif(has_work & context.dead):
                                    m.next = "GIVE_UP"
                                with m.Elif(has_work & (waiting.all() | ~queues.growing.bit_select(here, 1))):
                                    m.next = "PLAN"
                            with m.Case(Phase.READ):
                                m.next = "SEEK"
                            with m.Case(Phase.ARRAY):
                                m.d.sync += work.phase.eq(Phase.LOADED)
                                m.d.comb += loaded.eq(1)
                                m.next = "AIM"
                                if config.cache_reads:
                                    with m.If(~context.cached & ~claimed):
                                        m.d.sync += look_ahead.eq(1)
                                        m.next = "SKIP"
                            with m.Case(Phase.NEXT):
                                if config.cache_reads:
                                    m.d.sync += [work.loaded.eq(context.ahead), work.ahead.eq(0), look_ahead.eq(1)]
                                    m.next = "SKIP"
                                    with m.If(claimed):
                                        m.next = "LAST"
                            with m.Case(Phase.LOADED):
                                with m.If((parked | retries_full) & (retry_here | (parked & operation_here))):
                                    m.next = "DROP"
                                with m.Elif(parked):
                                    m.d.sync += work.tried.eq(~context.tried)
                                    with m.If((waiting & ~context.loaded).any() & ~context.tried):
                                        m.d.sync += among_others.eq(1)
                                        m.next = "PLAN"
                                        with m.If(context.dead):
                                            m.next = "DROP"
                                    with m.Elif((context.loaded & ~bit(context.plane)).any()):
                                        m.d.sync += [work.plane.eq(after(context.plane)), work.aimed.eq(0)]
                                        m.next = "AIM"
                                    with m.Else():
                                        m.next = "STORE"
                                with m.Elif(~context.aimed):
                                    m.d.sync += push.eq(Push.COLUMN)
                                    m.next = "LOOKUP"
                            with m.Case(Phase.WRITTEN):
                                m.next = "WRITTEN"
                            with m.Case(Phase.MORE):
                                with m.If(operation_here):
                                    m.next = "OPERATION"
                            with m.Case(Phase.WORKING):
                                m.d.sync += work.phase.eq(Phase.STATUS)
                                m.next = "STORE"
                            with m.Case(Phase.STATUS):
                                m.next = "SEEK"
                            with m.Case(Phase.STATUS_READ, Phase.PROBE):
                                with m.If(~byte_used & mover.jobs.ready):
                                    m.next = "BYTE"
                            with m.Case(Phase.RESULT):
                                with m.If(outcome_free):
                                    m.next = "RESULT"
                            with m.Case(Phase.FAILED):
                                with m.If(outcome_free):
                                    m.next = "SEEK"
                            with m.Case(Phase.FEATURE):
                                m.next = "FEATURE"
                            with m.Case(Phase.FEATURE_DATA):
                                with m.If(mover.jobs.ready):
                                    m.next = "FEATURE_DATA"
                            with m.Case(Phase.FEATURE_SET):
                                m.next = "FEATURE_SET"
                            with m.Case(Phase.RETRY):
                                with m.If(mover.jobs.ready):
                                    m.next = "RETRY_MOVE"
                            with m.Case(Phase.RECOVER):
                                with m.If(mover.jobs.ready):
                                    m.next = "RECOVERED"

            with m.State("RESET"):
                command(0xFF, busy=part.t_rst, factor=1)
                m.d.sync += work.phase.eq(Phase.RESETTING)
                m.next = "STORE"

            if config.cache_reads:
                # For each plane with a page in its register: the first run of its next page.
                with m.State("SKIP"):
                    m.d.comb += planning.eq(1)
                    m.d.sync += skip.eq(1)
                    m.next = "SKIPPED"
                    with m.If(scan == planes):
                        m.d.sync += scan.eq(0)
                        m.next = "PLAN"
                    with m.Elif(~work.loaded.bit_select(scan[:shapes.plane.width], 1)):
                        m.d.sync += scan.eq(scan + 1)
                        m.next = "SKIP"
                with m.State("SKIPPED"):
                    m.d.comb += [planning.eq(1), queues.behind.eq(skip)]
                    m.next = "SKIP_SEEN"
                with m.State("SKIP_SEEN"):
                    m.d.comb += [planning.eq(1), skip_new.en.eq(1)]
                    with m.If(queues.there & run.again & (skip != self.depth - 1)):
                        m.d.sync += skip.eq(skip + 1)
                        m.next = "SKIPPED"
                    with m.Else():
                        with m.If(~queues.there | run.again):
                            m.d.comb += skip_new.data.eq(0)
                        m.d.sync += scan.eq(scan + 1)
                        m.next = "SKIP"
                with m.State("LAST"):
                    command(0x3F, busy=part.t_r + part.t_rcbsy)
                    m.d.sync += [work.cached.eq(1), work.aimed.eq(0), work.near.eq(0), work.phase.eq(Phase.ARRAY)]
                    m.next = "STORE"

            # Reads.  First pass: the oldest run that may be moved, else the oldest; second: planes with the same page.
            with m.State("PLAN"):
                m.d.comb += planning.eq(1)
                m.d.sync += [
                    scan.eq(scan + 1), scanned.eq(scan),
                    candidate.eq((scan != planes)
                                 & queues.waiting.bit_select(unit, 1)
                                 & ~(among_others & work.loaded.bit_select(scan[:shapes.plane.width], 1))),
                ]
                m.d.comb += candidate_gated.eq(gated(run.tag))
                if config.cache_reads:
                    with m.If(look_ahead & work.loaded.bit_select(scan[:shapes.plane.width], 1)):
                        m.d.comb += queues.behind.eq(skip_here.data)
                        with m.If(skip_here.data == 0):
                            m.d.sync += candidate.eq(0)
                older = (run.stamp - best_stamp)[shapes.stamp.width - 1]
                with m.If(~second_pass):
                    with m.If(candidate & (~best | (best_gated & ~candidate_gated)
                                           | ((best_gated == candidate_gated) & older))):
                        m.d.sync += [
                            best.eq(1), best_gated.eq(candidate_gated), best_stamp.eq(run.stamp),
                            best_page.eq(run.row),
                        ]
                    with m.If(scan == planes):
                        m.d.sync += [scan.eq(0), second_pass.eq(1), candidate.eq(0)]
                with m.Else():
                    with m.If(candidate & (run.row[:page_bits] == best_page)):
                        m.d.sync += mates.eq(mates | bit(scanned))
                    with m.If(scan == planes):
                        m.d.sync += candidate.eq(0)
                        m.next = "PLANNED"
                    with m.If(~best | (among_others & best_gated)):
                        m.next = "STORE"
                        if config.cache_reads:
                            with m.If(look_ahead):
                                m.next = "AIM"
                                with m.If(work.phase == Phase.NEXT):
                                    m.next = "LAST"
            with m.State("PLANNED"):
                m.d.sync += [
                    work.batch.eq(mates), work.aimed.eq(0), work.near.eq(0), work.failed.eq(0), work.turn.eq(0),
                    work.phase.eq(Phase.READ), work.cached.eq(look_ahead),
                ]
                with m.If(look_ahead):
                    m.d.sync += work.ahead.eq(mates)
                with m.Else():
                    m.d.sync += work.loaded.eq(mates)
                m.next = "SEEK"
                with m.If(among_others & work.ahead.any()):
                    m.d.sync += work.phase.eq(Phase.LOADED)
                    m.next = "DROP"
            with m.State("SEEK"):
                if config.cache_reads:
                    with m.If((work.phase == Phase.READ) & work.cached & work.loaded.bit_select(work.plane, 1)):
                        m.d.comb += queues.behind.eq(skip_here.data)
                with m.If(sought.bit_select(work.plane, 1)):
                    m.d.sync += push.eq(Mux(work.phase == Phase.READ, Push.READ, Push.STATUS))
                    m.next = "FETCH"
                    with m.If(work.phase == Phase.FAILED):
                        m.next = "RESULT"
                with m.Else():
                    m.d.sync += work.plane.eq(after(work.plane))
            with m.State("FETCH"):
                with m.If(work.phase == Phase.READ):
                    m.d.sync += [work.row.eq(run.row), work.codeword.eq(run.codeword)]
                m.next = "LOOKUP"
            with m.State("LOOKUP"):
                m.next = "PUSH"
            with m.State("PUSH"):
                m.next = "STORE"
                with m.Switch(push):
                    with m.Case(Push.READ):
                        # What is read last is what the die's output is on, from that column on.
                        command(0x00, busy=part.t_r)
                        row_command(Addresses.BOTH, times(work.codeword, config.raw_codeword_bytes),
                                    Mux(rest.any(), 0x32, Mux(work.cached, 0x31, 0x30)))
                        with m.If(rest.any()):
                            busy_limit(part.t_dbsy)
                        with m.Elif(work.cached):
                            busy_limit(part.t_r + part.t_rcbsy)
                        m.d.sync += [
                            work.batch.eq(rest), work.phase.eq(Mux(rest.any(), Phase.READ, Phase.ARRAY)),
                            work.aimed.eq(~work.cached), work.near.eq(~work.cached), work.selected.eq(work.plane),
                        ]
                        m.d.comb += events.page_reads.eq(1)
                    with m.Case(Push.COLUMN):
                        command(0x05, wait=part.t_ccs)
                        row_command(Addresses.COLUMN, times(work.codeword, config.raw_codeword_bytes), 0xE0)
                        with m.If(~work.near | (work.selected != work.plane)):
                            m.d.comb += [job.first.eq(0x06), job.addresses.eq(Addresses.BOTH)]
                        m.d.sync += [work.aimed.eq(1), work.near.eq(1), work.selected.eq(work.plane)]
                    with m.Case(Push.PROGRAM):
                        command(0x80, wait=part.t_adl)
                        row_command(Addresses.BOTH)
                        m.d.sync += [work.phase.eq(Phase.WRITE), writing.eq(1), write_count.eq(0)]
                    with m.Case(Push.ERASE):
                        command(0x60, busy=part.t_bers)
                        row_command(Addresses.ROW, second=Mux(joins, 0xD1, 0xD0))
                        with m.If(joins):
                            busy_limit(part.t_dbsy)
                        m.d.sync += [
                            work.phase.eq(Mux(joins, Phase.MORE, Phase.WORKING)), work.several.eq(work.several | joins)]
                        m.d.comb += events.block_erases.eq(1)
                    with m.Case(Push.STATUS):
                        command(0x70, wait=part.t_whr)
                        with m.If(work.several):
                            m.d.comb += job.first.eq(0x78)
                            row_command(Addresses.ROW)
                        m.d.sync += work.phase.eq(Phase.STATUS_READ)
                    with m.Case(Push.PROBE):
                        command(0x00, busy=part.t_r)
                        row_command(Addresses.BOTH, part.mark_column, 0x30)
                        m.d.sync += work.phase.eq(Phase.PROBE)
                        m.d.comb += events.page_reads.eq(1)
                    with m.Case(Push.RETRY):
                        command(0x00, busy=part.t_r)
                        row_command(Addresses.BOTH, times(again.codeword, config.raw_codeword_bytes), 0x30)
                        m.d.sync += work.phase.eq(Phase.RETRY)
                        m.d.comb += events.page_reads.eq(1)

            # The next run to be moved: of the plane `work.plane`, or of the next one with a page.
            with m.State("AIM"):
                with m.If(work.loaded.bit_select(work.plane, 1)):
                    m.next = "AIMED"
                with m.Else():
                    m.d.sync += work.plane.eq(after(work.plane))
            with m.State("AIMED"):
                m.d.sync += [
                    work.row.eq(run.row), work.tag.eq(run.tag), work.codeword.eq(run.codeword), work.last.eq(run.last),
                    work.aimed.eq(work.failed | (work.aimed & (work.codeword == run.codeword))),
                ]
                m.next = "STORE"

            with m.State("MOVE"):
                m.d.comb += [
                    mover.jobs.valid.eq(1),
                    burst.transfer.eq(Transfer.CODEWORD),
                    burst.header.tag.eq(work.tag),
                    burst.header.page.eq(page_of(work.plane, die, work.row)),
                    burst.header.codeword.eq(work.codeword),
                    burst.header.cause.eq(Mux(work.failed, MediaCause.DIE_TIMEOUT, 0)),
                    queues.step.eq(1),
                    queues.pop.eq(work.codeword == work.last),
                ]
                m.d.sync += [
                    work.codeword.eq(work.codeword + 1), work.tag.place.eq(work.tag.place + 1), data_place.eq(0)]
                m.next = "STORE"
                with m.If(queues.pop):
                    m.next = "POPPED"
            with m.State("POPPED"):
                m.next = "FOLLOWS"
            with m.State("FOLLOWS"):
                m.next = "STORE"
                with m.If(waiting_after & (run.row == work.row)):
                    m.d.sync += [
                        work.tag.eq(run.tag), work.codeword.eq(run.codeword), work.last.eq(run.last),
                        work.aimed.eq(work.failed | (run.codeword == work.last + 1)),
                    ]
                with m.Else():
                    left = work.loaded & ~bit(work.plane)
                    m.d.sync += [work.loaded.eq(left), work.aimed.eq(0)]
                    with m.If(left.any()):
                        m.next = "AIM"
                    with m.Else():
                        m.d.sync += [work.phase.eq(Mux(work.ahead.any(), Phase.NEXT, Phase.IDLE)), work.failed.eq(0)]

            # Its registers are wanted for something else; what was in them is read again later.
            with m.State("DROP"):
                m.d.sync += [work.loaded.eq(0), work.failed.eq(0), work.phase.eq(Phase.IDLE)]
                m.next = "STORE"
                if config.cache_reads:
                    with m.If(work.ahead.any()):
                        command(0x3F, busy=part.t_r + part.t_rcbsy)
                        m.d.sync += [work.ahead.eq(0), work.phase.eq(Phase.RELEASE)]
            with m.State("GIVE_UP"):
                m.d.sync += [work.loaded.eq(waiting), work.failed.eq(1), work.phase.eq(Phase.LOADED)]
                m.next = "AIM"

            # Operations.
            with m.State("MAP"):
                m.d.comb += [
                    block_write.addr.eq(Cat(unit_of(operation_plane, operation_die), zone_of(operation_row))),
                    block_write.data.eq(operation.block ^ zone_of(operation_row)),
                    block_write.en.eq(1),
                    operation_taken.eq(1),
                ]
                answer(Status.OK, operation)
                m.next = "VISIT"
            with m.State("OPERATION"):
                first = work.phase == Phase.IDLE
                m.d.comb += [
                    record_new.addr.eq(unit_of(operation_plane, operation_die)),
                    record_new.data.identity.eq(operation.identity),
                    record_new.data.page.eq(operation.page),
                    record_new.en.eq(1),
                    operation_taken.eq(1),
                ]
                m.d.sync += [
                    work.plane.eq(operation_plane), work.row.eq(operation_row), work.opcode.eq(operation.opcode),
                    work.loaded.eq(Mux(first, 0, work.loaded) | bit(operation_plane)), work.failed.eq(0),
                    work.several.eq(~first), work.turn.eq(1),
                ]
                m.next = "LOOKUP"
                with m.Switch(operation.opcode):
                    with m.Case(operation_code(Opcode.PROGRAM)):
                        m.d.sync += push.eq(Push.PROGRAM)
                    with m.Case(operation_code(Opcode.ERASE)):
                        m.d.sync += push.eq(Push.ERASE)
                    with m.Default():
                        m.d.sync += push.eq(Push.PROBE)
                with m.If(work.dead):
                    answer(Status.DIE_TIMEOUT, operation)
                    m.next = "VISIT"
                    with m.If(operation.opcode == operation_code(Opcode.PROGRAM)):
                        m.d.sync += draining.eq(program_words)
            with m.State("WRITE"):
                m.d.comb += [mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.WRITE)]
                m.d.sync += write_count.eq(write_count + 1)
                with m.If(write_count == config.codewords_per_page - 1):
                    m.d.sync += work.phase.eq(Phase.WRITTEN)
                m.next = "STORE"
            with m.State("WRITTEN"):
                command(0x10, busy=part.t_prog)
                with m.If(joins):
                    m.d.comb += job.first.eq(0x11)
                    busy_limit(part.t_dbsy)
                m.d.comb += events.page_programs.eq(1)
                m.d.sync += [
                    writing.eq(0), work.phase.eq(Mux(joins, Phase.MORE, Phase.WORKING)),
                    work.several.eq(work.several | joins)]
                m.next = "STORE"
            with m.State("BYTE"):
                m.d.comb += [mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.BYTE)]
                m.d.sync += [byte_used.eq(1), work.phase.eq(Phase.RESULT)]
                m.next = "STORE"
            with m.State("RESULT"):
                left = work.loaded & ~bit(work.plane)
                status = Signal(8)
                with m.If(work.phase == Phase.FAILED):
                    m.d.comb += status.eq(Status.DIE_TIMEOUT)
                with m.Elif(work.opcode == operation_code(Opcode.PROBE)):
                    # Neither a mark nor its absence is protected by a code: most of the bits decide.
                    zeros = sum(~mover.byte[i] for i in range(8))
                    m.d.comb += status.eq(Mux(zeros >= MARK_ZEROS, Status.BAD_BLOCK, Status.OK))
                with m.Elif(mover.byte[STATUS_FAIL]):
                    m.d.comb += status.eq(Mux(work.opcode == operation_code(Opcode.ERASE), Status.ERASE_FAILED,
                                              Status.PROGRAM_FAILED))
                answer(status, record.data)
                with m.If(work.phase == Phase.RESULT):
                    m.d.sync += [byte_used.eq(0), work.phase.eq(Phase.STATUS)]
                m.d.sync += work.loaded.eq(left)
                with m.If(~left.any()):
                    m.d.sync += work.phase.eq(Phase.IDLE)
                m.next = "STORE"

            # Read retry.
            with m.State("RETRY"):
                m.d.comb += [retry_queue.r_en.eq(1), events.retry.eq(1)]
                m.d.sync += [
                    again.eq(retry), retrying.eq(1), work.loaded.eq(0), work.phase.eq(Phase.FEATURE),
                    work.trouble.eq(Trouble.RETRY)]
                m.next = "STORE"
                with m.If(work.dead):
                    m.d.sync += work.phase.eq(Phase.RECOVER)
            with m.State("FEATURE"):
                command(0xEF, wait=part.t_adl)
                row_command(Addresses.COLUMN, RETRY_FEATURE)
                m.d.comb += job.short.eq(1)
                m.d.sync += work.phase.eq(Phase.FEATURE_DATA)
                m.next = "STORE"
            with m.State("FEATURE_DATA"):
                m.d.comb += [
                    mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.FEATURE), burst.header.level.eq(again.level)]
                m.d.sync += work.phase.eq(Phase.FEATURE_SET)
                m.next = "STORE"
            with m.State("FEATURE_SET"):
                m.d.sync += [work.plane.eq(again_plane), work.row.eq(again_row), push.eq(Push.RETRY)]
                m.next = "LOOKUP"
                with m.If(again.level == 0):
                    m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
                    m.next = "STORE"
            with m.State("RETRY_MOVE"):
                m.d.comb += [
                    mover.jobs.valid.eq(1), burst.transfer.eq(Transfer.CODEWORD), burst.header.tag.eq(again.tag),
                    burst.header.page.eq(again.page), burst.header.codeword.eq(again.codeword),
                    burst.header.level.eq(again.level), burst.header.cause.eq(
                        Mux(work.phase == Phase.RECOVER, MediaCause.DIE_TIMEOUT, 0)),
                ]
                m.d.sync += [again.level.eq(0), work.phase.eq(Phase.FEATURE)]
                with m.If(work.dead):
                    m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
                m.next = "STORE"

            # A die that stays busy: reset it; if that does not help either, it is dead.
            with m.State("TIMEOUT"):
                m.next = "STORE"
                with m.If((work.phase == Phase.RESETTING) | (work.phase == Phase.RECOVER)):
                    m.d.sync += [work.dead.eq(1), work.phase.eq(Phase.RECOVER)]
                    with m.If(work.phase == Phase.RESETTING):
                        m.d.sync += work.trouble.eq(Trouble.NONE)
                with m.Else():
                    command(0xFF, busy=part.t_rst, factor=1)
                    m.d.sync += work.phase.eq(Phase.RECOVER)
                    with m.Switch(work.phase):
                        with m.Case(Phase.READ, Phase.ARRAY):
                            m.d.sync += work.trouble.eq(Trouble.READ)
                        with m.Case(Phase.RELEASE):
                            m.d.sync += work.trouble.eq(Trouble.NONE)
                        with m.Case(Phase.FEATURE_SET, Phase.RETRY):
                            m.d.sync += work.trouble.eq(Trouble.RETRY)
                        with m.Default():
                            m.d.sync += work.trouble.eq(Trouble.OPERATION)
            with m.State("RECOVERED"):
                m.next = "STORE"
                with m.Switch(work.trouble):
                    with m.Case(Trouble.NONE):
                        m.d.sync += work.phase.eq(Phase.IDLE)
                    with m.Case(Trouble.READ):
                        m.d.sync += [
                            work.failed.eq(1), work.loaded.eq(work.loaded | work.ahead), work.ahead.eq(0),
                            work.batch.eq(0), work.phase.eq(Phase.LOADED)]
                        m.next = "AIM"
                    with m.Case(Trouble.OPERATION):
                        m.d.sync += work.phase.eq(Phase.FAILED)
                    with m.Case(Trouble.RETRY):
                        m.next = "RETRY_MOVE"
                        with m.If(again.level == 0):
                            m.d.sync += [retrying.eq(0), work.phase.eq(Phase.IDLE)]
                            m.next = "STORE"
        return m
