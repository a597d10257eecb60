"""The die at work: what is known of it, and what the controller's states have in common.

The controller is one state machine that goes from die to die.  Its states stand by topic in visits.py, planner.py,
commands.py, moves.py, operations.py and retry.py; what they share is a `DieMachine`.
"""

from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, enum
from amaranth.lib.memory import Memory

from kvattic.spec.commands import Kind, Opcode, Status
from kvattic.spec.config import Config
from kvattic_hdl.flash.block_map import BlockMap
from kvattic_hdl.flash.die_clocks import DieClocks
from kvattic_hdl.flash.load_order import LoadOrder
from kvattic_hdl.flash.operation_queue import OperationQueue, ProgramWords
from kvattic_hdl.flash.retry_queue import RetryQueue
from kvattic_hdl.flash.runs import RunQueues, RunShapes
from kvattic_hdl.flash.sequencers import Addresses, Commander, Mover
from kvattic_hdl.lib.shapes import OPCODE_BITS, PAGE_BITS, operation_code

ROW_ADDRESS_BITS = 24
"""Bits of a row address: page of the block, plane, block."""


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


def context_shape(shapes: RunShapes) -> data.StructLayout:
    """What is known of a die."""
    planes = shapes.config.part.planes
    return data.StructLayout({
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


@dataclass(frozen=True)
class Blocks:
    """The blocks that the machine works with."""

    queues: RunQueues
    clocks: DieClocks
    commander: Commander
    mover: Mover
    operations: OperationQueue
    words: ProgramWords
    retries: RetryQueue
    order: LoadOrder
    block_map: BlockMap


class DieMachine:
    """Signals that the machine's states share, and the jobs that they give.

    The contexts of all dies are in a memory: a visit takes one out into `work`, and the state STORE puts it back.  What
    is found of the die with it (`free` to `claimed`) is registered, too, and decided upon one cycle later.

    Parameters
    ----------
    m : Module
        The controller's.
    config : Config
    shapes : RunShapes
    blocks : Blocks
    controller : Component
        Its ports value_open, epoch and outcomes are used here.
    events : View
        Of the controller's `events_shape`: what happens in this cycle.
    depth : int
        Runs of each queue.
    """

    def __init__(self, m: Module, config: Config, shapes: RunShapes, blocks: Blocks, controller: Any, events: Any,
                 depth: int) -> None:
        self.m = m
        self.config = config
        self.shapes = shapes
        self.part = config.part
        self.controller = controller
        self.events = events
        self.depth = depth
        self.queues = blocks.queues
        self.clocks = blocks.clocks
        self.commander = blocks.commander
        self.mover = blocks.mover
        self.operations = blocks.operations
        self.words = blocks.words
        self.retries = blocks.retries
        self.order = blocks.order
        self.block_map = blocks.block_map
        self.run = self.queues.run
        self.job = self.commander.jobs.payload
        self.burst = self.mover.jobs.payload
        self.operation: Any = self.operations.current
        self._declare_context()
        self._declare_looks()
        self._declare_plan()
        self._address()
        self._judge()

    # Page numbers.

    def parts(self, page: Value) -> tuple[Value, Value, Value]:
        """Plane, die and row of a page number."""
        plane_bits, die_bits = self.config.plane_bits, self.config.die_bits
        return page[:plane_bits], page[plane_bits : plane_bits + die_bits], page[plane_bits + die_bits :]

    def unit_of(self, plane: Value, die: Value) -> Value:
        """Number of a plane of a die."""
        return Cat(plane[: self.config.plane_bits], die[: self.config.die_bits])

    def page_of(self, plane: Value, die: Value, row: Value) -> Value:
        """The page number."""
        return Cat(self.unit_of(plane, die), row)

    def after(self, plane: Value) -> Value:
        """The next plane, cyclic."""
        return (plane + 1)[: self.config.plane_bits]

    def bit(self, plane: Value) -> Value:
        """That plane's bit."""
        return (Const(1, self.part.planes) << plane)[: self.part.planes]

    def gated(self, tag: Any) -> Value:
        """The tag is of a V codeword that may not be moved yet."""
        value_open, epoch = self.controller.value_open, self.controller.epoch
        return (tag.kind == Kind.VALUE) & ~value_open.bit_select(tag.slot, 1) & (epoch[tag.slot] == tag.epoch)

    # Jobs for the blocks.

    def command(self, first: int, busy: float | None = None, wait: float | None = None, factor: int = 2) -> None:
        """Give the commander a job; further fields beside.  Times in nanoseconds; by default it waits t_wb."""
        clock = self.clocks.times
        self.m.d.comb += [
            self.commander.jobs.valid.eq(1), self.job.first.eq(first),
            self.job.start.wait.eq(clock.cycles(self.part.t_wb if wait is None else wait)),
            self.job.start.busy.eq(busy is not None), self.job.start.limit.eq(clock.ticks(busy or 0, factor)),
        ]
        self.m.d.sync += self.held.bit_select(self.die, 1).eq(1)

    def row_command(self, addresses: Addresses, column: Value | int = 0, second: Value | int | None = None) -> None:
        """Add address cycles, and a second byte, to the command."""
        self.m.d.comb += [self.job.addresses.eq(addresses), self.job.column.eq(column)]
        if second is not None:
            self.m.d.comb += [self.job.twice.eq(1), self.job.second.eq(second)]

    def busy_limit(self, time: float) -> None:
        """The die may stay busy for twice so many nanoseconds."""
        self.m.d.comb += self.job.start.limit.eq(self.clocks.times.ticks(time))

    def answer(self, status: Value | Status, of: Any) -> None:
        """Give the outcome of an operation, or of its record."""
        outcome = self.controller.outcomes
        self.m.d.sync += [
            outcome.valid.eq(1), outcome.payload.identity.eq(of.identity), outcome.payload.page.eq(of.page),
            outcome.payload.status.eq(status),
        ]

    # What the states share.

    def _declare_context(self) -> None:
        """One machine reads and writes what is known of each die, die by die."""
        m, config, shapes = self.m, self.config, self.shapes
        shape = context_shape(shapes)
        m.submodules.contexts = contexts = Memory(shape=shape, depth=config.dies, init=[])
        seen, self.store = contexts.read_port(domain="comb"), contexts.write_port()
        m.submodules.records = records = Memory(
            shape=data.StructLayout({"identity": shapes.identity, "page": PAGE_BITS}), depth=shapes.units, init=[])
        self.record, self.record_new = records.read_port(domain="comb"), records.write_port()
        self.work: Any = Signal(shape)            # of the die that was visited last: `die`
        self.die = Signal(shapes.die)
        self.here = Signal(shapes.die)            # the die that is visited next
        self.context: Any = Signal(shape)         # of `here`
        self.held = Signal(config.dies)           # a command is on its way to the die
        m.d.comb += [
            seen.addr.eq(self.here), self.context.eq(seen.data),
            self.store.addr.eq(self.die), self.store.data.eq(self.work)]
        with m.If(self.commander.done.valid):
            m.d.sync += self.held.bit_select(self.commander.done.payload.die, 1).eq(0)

    def _declare_looks(self) -> None:
        """Whose turn it is, and what is under way only once."""
        m, shapes = self.m, self.shapes
        self.command_die, self.data_turn, self.data_place = Signal(shapes.die), Signal(), Signal(shapes.die)
        self.cleared = Signal(range(self.config.dies))     # contexts cleared after reset
        self.push = Signal(Push)
        self.again: Any = Signal(shapes.retry)             # the retry at work
        self.retrying = Signal()
        self.writing, self.write_count = Signal(), Signal(shapes.codeword_index)   # a page's data go into a die
        self.byte_used = Signal()                          # a byte is on its way
        self.outcome_free = Signal()
        self.moves = Signal()                              # in state MOVE; the queues need it early in the cycle
        m.d.comb += [self.outcome_free.eq(~self.controller.outcomes.valid), self.queues.step.eq(self.moves)]
        m.d.sync += self.moves.eq(0)
        with m.If(self.controller.outcomes.valid & self.controller.outcomes.ready):
            m.d.sync += self.controller.outcomes.valid.eq(0)

    def _declare_plan(self) -> None:
        """The search for runs to read next: `scan` goes through the planes, `mates` are those found."""
        m, config, shapes = self.m, self.config, self.shapes
        self.planning = Signal()          # `unit` is plane `scan`, not the one at work: in SKIP... and PLAN
        self.scan, self.scanned = Signal(range(self.part.planes + 2)), Signal(shapes.plane)
        self.best, self.best_gated, self.best_stamp = Signal(), Signal(), Signal(shapes.stamp)
        self.best_page = Signal(config.block_page_bits)
        self.second_pass, self.among_others, self.look_ahead = Signal(), Signal(), Signal()
        self.candidate = Signal()
        # What was read of plane `scanned`, a cycle later.
        self.seen, self.seen_plane, self.seen_gated = Signal(), Signal(shapes.plane), Signal()
        self.seen_tag: Any = Signal(shapes.tag)
        m.d.comb += self.seen_gated.eq(self.gated(self.seen_tag))
        self.seen_stamp, self.seen_page = Signal(shapes.stamp), Signal(config.block_page_bits)
        self.mates = Signal(self.part.planes)
        # Cache reads: how many runs of the page that is in its register stand before a plane's next page; 0: no such.
        self.skip = Signal(range(self.depth))
        self.unit = Signal(shapes.unit_bits)
        self.skip_here: Any = None
        self.skip_new: Any = None
        if config.cache_reads:
            m.submodules.skips = skips = Memory(shape=self.skip.shape(), depth=shapes.units, init=[])
            self.skip_here, self.skip_new = skips.read_port(domain="comb"), skips.write_port()
            m.d.comb += [
                self.skip_here.addr.eq(self.unit), self.skip_new.addr.eq(self.unit),
                self.skip_new.data.eq(self.skip)]

    def _address(self) -> None:
        """Look at the unit of the work, or of the plan; its page's address is that of commands."""
        m, config, work, queues = self.m, self.config, self.work, self.queues
        page_bits = config.block_page_bits
        self.waiting = Signal(self.part.planes)   # of `die`, when it was visited
        self.waiting_after = Signal()             # the looked-at queue was not empty, when `run` was addressed
        self.goes_on = Signal()                   # the next run is of the same page
        self.next_codeword = Signal(self.shapes.codeword_index)   # first one of the run that was read
        row_address = Signal(ROW_ADDRESS_BITS)
        m.d.comb += [
            self.unit.eq(self.unit_of(Mux(self.planning, self.scan[: self.shapes.plane.width], work.plane), self.die)),
            queues.unit.eq(self.unit),
            self.record.addr.eq(self.unit),
            self.block_map.unit.eq(self.unit),
            self.block_map.row.eq(work.row),
            row_address.eq(Cat(work.row[:page_bits], work.plane[: config.plane_bits], self.block_map.block)),
            self.job.row.eq(row_address),
            self.job.start.die.eq(self.die),
            self.burst.die.eq(self.die),
            self.order.place.eq(self.data_place),
            self.order.loaded_die.eq(self.die),
        ]
        # A cycle late: `work` has not changed since the visit when a codeword is moved.
        m.d.sync += self.queues.pop.eq(work.codeword == work.last)
        m.d.sync += [self.order.loaded.eq(0), self.retries.take.eq(0)]
        m.d.sync += self.here.eq(Mux(self.data_turn, self.order.die, self.command_die))
        m.d.sync += self.waiting_after.eq(queues.waiting.bit_select(self.unit, 1))

    def _judge(self) -> None:
        """What can be done with `here`, and what waits for it."""
        m, config, mover, here, context = self.m, self.config, self.mover, self.here, self.context
        # Of the die in `work`, when it was visited.
        self.free, self.overdue, self.outstanding = Signal(), Signal(), Signal()
        self.parked = Signal()                    # the codeword aimed at may not be moved yet
        self.has_work, self.gathered, self.operation_ready = Signal(), Signal(), Signal()
        self.operation_here, self.retry_here = Signal(), Signal()
        self.claimed = Signal()                   # an operation or a retry waits for the die
        self.others_wait = Signal()               # planes that are not loaded have runs
        held = self.held.bit_select(here, 1)
        _, operation_die, _ = self.parts(self.operation.page)
        _, retry_die, _ = self.parts(self.retries.retry.page)
        waiting = self.queues.waiting.word_select(here[: config.die_bits], self.part.planes)
        ready = self.operations.there & self.outcome_free & ~self.writing & ~self.words.discarding
        operation = ready & (operation_die == here[: config.die_bits])
        retry = self.retries.there & ~self.retrying & (retry_die == here[: config.die_bits])
        self.look = [
            self.work.eq(context),
            self.die.eq(here),
            self.free.eq((self.clocks.free.bit_select(here, 1) | context.dead) & ~held),
            self.overdue.eq(self.clocks.overdue.bit_select(here, 1) & ~held & ~context.dead),
            self.outstanding.eq(
                (mover.planned & (mover.planned_die == here)) | (mover.moving & (mover.moving_die == here))
                | (mover.written.valid & (mover.written.payload.die == here))),
            self.parked.eq(self.gated(context.tag)),
            self.waiting.eq(waiting),
            self.has_work.eq(waiting.any()),
            self.gathered.eq(waiting.all() | ~self.queues.growing.bit_select(here, 1)),
            self.others_wait.eq((waiting & ~context.loaded).any()),
            self.operation_ready.eq(ready),
            self.operation_here.eq(operation),
            self.retry_here.eq(retry),
            self.claimed.eq(retry | (operation & ~(context.turn & waiting.any()))),
        ]
        self.joins, self.rest = Signal(), Signal(self.part.planes)
        self.sought = Mux(self.work.phase == Phase.READ, self.work.batch, self.work.loaded)
        m.d.sync += [
            # Whether the next operation, or with one of another die between them the next but one, is of the same kind,
            # die and page, in another plane: two dies that take turns hide each other's time between planes.  Of a
            # cycle ago: the work has stood for longer when that counts.
            self.joins.eq(self.operations.there & (
                self._joined(self.operation)
                | (self.operations.following_there & (operation_die != self.die[: config.die_bits])
                   & self._joined(self.operations.following)))),
        ]
        m.d.comb += self.rest.eq(self.work.batch & ~self.bit(self.work.plane))

    def _joined(self, other: Any) -> Value:
        """The operation is of the same kind, die and page as the one at work, in a plane that is not used yet."""
        page_bits = self.config.block_page_bits
        plane, die, row = self.parts(other.page)
        return (
            (other.opcode == self.work.opcode) & (die == self.die[: self.config.die_bits])
            & ~self.work.loaded.bit_select(plane, 1)
            & ((row[:page_bits] == self.work.row[:page_bits]) | (other.opcode == operation_code(Opcode.ERASE))))
