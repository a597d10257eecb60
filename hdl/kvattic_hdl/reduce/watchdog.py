"""Gives up on a job whose codewords never come."""

from functools import reduce
from operator import or_

from amaranth.hdl import Array, Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import MISSING_BITS, Shapes

SLOWNESS_BITS = 4
"""log2 of how much longer the timeout is while a die is busy."""


class Watchdog(wiring.Component):
    """Marks the oldest unfinished job as failed after `timeout` cycles without progress.

    Latency: about eight cycles from the timeout to `failed`.
    Throughput, ordering: one job is failed at a time; the next has to wait until that one is freed.
    Reset: nothing is failed.

    The oldest job is the one that the Finisher waits for; if the Finisher has none, the one that
    Maximum waits for; if that has none either, the one that TopK waits for.
    While the Finisher works on a job nothing is counted.  A job that gets on
    while its failure is being written down is not failed.  While a die is busy (an erase takes
    milliseconds) the cycles count one in 16, so that a die that is busy for ever hangs nothing.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    timeout : In(32)
        Cycles without progress; 0: never.
    progress : In(1)
        Something happened: a lane's beat, a handshake on AXI4, a job's start or completion, a word
        or a command cycle on a flash bus.
    activity : In(1)
        A die is busy.
    maximum_waiting, maximum_slot : In
        Maximum waits for the lanes' keys_done of this slot.
    finisher_waiting, finisher_slot : In
        The Finisher waits for the lanes' values_done of this slot.
    selection_waiting, selection_slot : In
        TopK waits for the lanes' first_done of this slot.
    selected : In(1)
        Strobe: TopK handed a job on (transfer on its `jobs_o`).
    handed : In(1)
        Strobe: Maximum handed a job on (transfer on its `jobs_o`).
    freed, freed_slot : In
        The Finisher's strobe: this slot is free again.
    first_done, keys_done, values_done : In(ArrayLayout(jobs_in_flight, lanes))
        From the lanes.
    missing_key, missing_value : In(ArrayLayout(16, lanes))
        From the lanes: codewords of `report_slot` still missing, two cycles after it.  Those of the first pass count as
        K.
    probing : Out(1)
        `report_slot` here must be the lanes' report_slot in this cycle; the Finisher does not need
        it then.
    report_slot : Out(Shapes.slot)
        See `probing`.
    failed : Out(jobs_in_flight)
        One bit for each slot: the job is abandoned; until the slot is freed.
    failed_slot : Out(Shapes.slot)
        The slot last failed.
    where : Out(32)
        The completion's `where` of the job last failed: lowest lane not done << 16 | kind << 15
        | codewords missing there.
    """

    timeout: Signal
    progress: Signal
    activity: Signal
    maximum_waiting: Signal
    maximum_slot: Signal
    finisher_waiting: Signal
    finisher_slot: Signal
    selection_waiting: Signal
    selection_slot: Signal
    selected: Signal
    handed: Signal
    freed: Signal
    freed_slot: Signal
    first_done: data.View
    keys_done: data.View
    values_done: data.View
    missing_key: data.View
    missing_value: data.View
    probing: Signal
    report_slot: Signal
    failed: Signal
    failed_slot: Signal
    where: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        done = data.ArrayLayout(config.jobs_in_flight, config.lanes)
        missing = data.ArrayLayout(MISSING_BITS + 1, config.lanes)
        super().__init__(
            {
                "timeout": In(32),
                "progress": In(1),
                "activity": In(1),
                "maximum_waiting": In(1),
                "maximum_slot": In(shapes.slot),
                "finisher_waiting": In(1),
                "finisher_slot": In(shapes.slot),
                "selection_waiting": In(1),
                "selection_slot": In(shapes.slot),
                "selected": In(1),
                "handed": In(1),
                "freed": In(1),
                "freed_slot": In(shapes.slot),
                "first_done": In(done),
                "keys_done": In(done),
                "values_done": In(done),
                "missing_key": In(missing),
                "missing_value": In(missing),
                "probing": Out(1),
                "report_slot": Out(shapes.slot),
                "failed": Out(config.jobs_in_flight),
                "failed_slot": Out(shapes.slot),
                "where": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        lanes, jobs = self._config.lanes, self._config.jobs_in_flight

        # Jobs that Maximum, or TopK, handed on and that are not freed yet.
        past_maximum, past_selection = Signal(range(jobs + 2)), Signal(range(jobs + 2))
        for past, handed in ((past_maximum, self.handed), (past_selection, self.selected)):
            with m.If(handed & ~self.freed):
                m.d.sync += past.eq(past + 1)
            with m.Elif(~handed & self.freed):
                m.d.sync += past.eq(past - 1)

        # Who may wait for lanes, and for what; the one whose jobs are oldest first.
        stages = (
            (self.finisher_waiting, self.finisher_slot, self.values_done),
            (self.maximum_waiting & (past_maximum == 0), self.maximum_slot, self.keys_done),
            (self.selection_waiting & (past_selection == 0), self.selection_slot, self.first_done),
        )
        waiting = Cat(wait for wait, _, _ in stages)

        count = Signal(32)
        armed, expired = Signal(), Signal()
        slow = Signal(SLOWNESS_BITS)
        m.d.sync += slow.eq(slow + 1)
        m.d.sync += armed.eq(
            waiting.any()
            & self.timeout.any()
            & ~self.progress
        )
        with m.If(~armed | self.progress):
            m.d.sync += [count.eq(0), expired.eq(0)]
        with m.Elif(~expired & (~self.activity | (slow == 0))):
            m.d.sync += [count.eq(count + 1), expired.eq(count >= self.timeout)]

        slot = self.report_slot
        stage = Signal(range(len(stages)))
        kind = Signal()
        not_done = Signal(lanes)
        lane = Signal(self._shapes.lane)
        left = Signal(MISSING_BITS + 1)
        # Before the FSM, so that a new failure wins: what was freed is then another slot.
        with m.If(self.freed & (self.freed_slot == self.failed_slot)):
            m.d.sync += self.failed.eq(0)

        with m.FSM(name="state"):
            with m.State("count"):
                with m.If(expired & armed & ~self.failed.any()):
                    for number, (wait, at, _) in reversed(list(enumerate(stages))):
                        with m.If(wait):
                            m.d.sync += [stage.eq(number), slot.eq(at), kind.eq(Kind.KEY if number else Kind.VALUE)]
                    m.next = "lanes"
            with m.State("lanes"):
                m.d.comb += self.probing.eq(1)
                with m.Switch(stage):
                    for number, (_, _, done) in enumerate(stages):
                        with m.Case(number):
                            m.d.sync += [not_done[i].eq(~done[i].bit_select(slot, 1)) for i in range(lanes)]
                m.next = "lowest"
            with m.State("lowest"):
                m.d.comb += self.probing.eq(1)
                for i in reversed(range(lanes)):
                    with m.If(not_done[i]):
                        m.d.sync += lane.eq(i)
                m.next = "missing"
            with m.State("missing"):
                # Two cycles after the slot was applied.
                m.d.comb += self.probing.eq(1)
                m.d.sync += left.eq(
                    Mux(kind, Array(self.missing_value)[lane], Array(self.missing_key)[lane])
                )
                m.next = "fail"
            with m.State("fail"):
                still = Signal()
                with m.Switch(stage):
                    for number, (wait, at, _) in enumerate(stages):
                        with m.Case(number):
                            m.d.comb += still.eq(wait & (at == slot))
                with m.If(still & armed & ~self.progress & not_done.any()):
                    saturated = Signal(MISSING_BITS)
                    m.d.comb += saturated.eq(
                        left[:MISSING_BITS]
                        | reduce(or_, left[MISSING_BITS:]).replicate(MISSING_BITS)
                    )
                    m.d.sync += [
                        self.failed.eq(1 << slot),
                        self.failed_slot.eq(slot),
                        self.where.eq(Cat(saturated, kind, lane)),
                    ]
                m.d.sync += [count.eq(0), expired.eq(0)]
                m.next = "count"
        return m
