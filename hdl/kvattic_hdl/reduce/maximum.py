"""Combines the row maxima of all lanes and opens the V pass."""

from functools import reduce
from itertools import pairwise
from operator import and_

from amaranth.hdl import Array, Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes


class Maximum(wiring.Component):
    """Once all lanes have a job's scores: each row's largest, given back to all lanes.

    Latency: from the last lane's `keys_done` to `value_open`: lanes * rows + rows + 6 cycles.
    Throughput: one job at a time.
    Ordering: jobs leave in the order in which they came; a job without lanes waits for nothing.
    Reset: no job, nothing open.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    jobs_i, jobs_o : In, Out(stream of Shapes.job)
        Jobs in their order.  A job may come the cycle after its lanes were started, not earlier.
    keys_done : In(ArrayLayout(jobs_in_flight, lanes))
        From the lanes.
    maximum_slot, maximum_row : Out
        Address of the row maxima in all lanes.
    maximum : In(ArrayLayout(Shapes.score, lanes))
        Each lane's maximum, two cycles after the address.
    maximum_write : Out(1)
        `maximum_new` is written to all lanes at the address of this cycle.
    maximum_new : Out(Shapes.score)
        The maximum over all lanes.
    value_open : Out(jobs_in_flight)
        One bit for each slot: lanes hold the maxima and may work on V.
    freed, freed_slot : In
        Strobe: this slot is free again; closes it.
    final_slot, final_row : In
        Address of the combined maxima kept here.
    final : Out(Shapes.score)
        The combined maximum, two cycles after the address.
    waiting, waiting_slot : Out
        This block waits for the lanes' `keys_done` of this slot.
    """

    jobs_i: stream.Interface
    jobs_o: stream.Interface
    keys_done: data.View
    maximum_slot: Signal
    maximum_row: Signal
    maximum: data.View
    maximum_write: Signal
    maximum_new: Signal
    value_open: Signal
    freed: Signal
    freed_slot: Signal
    final_slot: Signal
    final_row: Signal
    final: Signal
    waiting: Signal
    waiting_slot: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__(
            {
                "jobs_i": In(stream.Signature(shapes.job)),
                "jobs_o": Out(stream.Signature(shapes.job)),
                "keys_done": In(data.ArrayLayout(config.jobs_in_flight, config.lanes)),
                "maximum_slot": Out(shapes.slot),
                "maximum_row": Out(shapes.row),
                "maximum": In(data.ArrayLayout(shapes.score, config.lanes)),
                "maximum_write": Out(1),
                "maximum_new": Out(shapes.score),
                "value_open": Out(config.jobs_in_flight),
                "freed": In(1),
                "freed_slot": In(shapes.slot),
                "final_slot": In(shapes.slot),
                "final_row": In(shapes.row),
                "final": Out(shapes.score),
                "waiting": Out(1),
                "waiting_slot": Out(shapes.slot),
            }
        )
        self._job = Signal(shapes.job, name="job")
        self._row, self._last_row = Signal(shapes.row, name="row"), Signal(shapes.row, name="last_row")

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        job, row, last_row = self._job, self._row, self._last_row
        all_done = Signal(self._config.jobs_in_flight)
        m.d.sync += all_done.eq(reduce(and_, (self.keys_done[i] for i in range(self._config.lanes))))
        lane, issue, give = Signal(self._shapes.lane), Signal(), Signal()
        m.submodules.finals = finals = Memory(
            shape=self._shapes.score, depth=self._config.jobs_in_flight << self._shapes.row.width, init=[])
        kept_last = self._compare(m, finals, issue, lane)
        give_last = self._give(m, finals, give)
        self._read_final(m, finals)
        m.d.comb += [
            self.maximum_slot.eq(job.slot),
            self.waiting_slot.eq(job.slot),
            self.jobs_o.payload.eq(job),
        ]

        with m.FSM(name="state"):
            with m.State("take"):
                m.d.comb += self.jobs_i.ready.eq(1)
                m.d.sync += [
                    job.eq(self.jobs_i.payload),
                    last_row.eq(self.jobs_i.payload.rows - 1),
                    lane.eq(0),
                    row.eq(0),
                ]
                with m.If(self.jobs_i.valid):
                    with m.If(self.jobs_i.payload.lanes):
                        m.next = "wait"
                    with m.Else():
                        m.next = "hand"
            with m.State("wait"):
                m.d.comb += self.waiting.eq(1)
                with m.If(all_done.bit_select(job.slot, 1)):
                    m.next = "read"
                    self._ask(m, issue, lane)
            with m.State("read"):
                self._ask(m, issue, lane)
            with m.State("drain"):
                with m.If(kept_last):
                    m.next = "give"
            with m.State("give"):
                m.d.comb += give.eq(1)
                m.d.sync += row.eq(row + 1)
                with m.If(row == last_row):
                    m.next = "hand"
            with m.State("hand"):
                # Not before value_open is set: the next job would take its slot.
                m.d.comb += self.jobs_o.valid.eq(~give_last)
                with m.If(self.jobs_o.ready & ~give_last):
                    m.next = "take"
        return m

    def _ask(self, m: Module, issue: Signal, lane: Signal) -> None:
        """Sends for one lane's maximum of one row; after the last one, waits for the result."""
        m.d.comb += issue.eq(1)
        m.d.sync += lane.eq(lane + 1)
        with m.If(lane == self._config.lanes - 1):
            m.d.sync += [lane.eq(0), self._row.eq(self._row + 1)]
            with m.If(self._row == self._last_row):
                m.d.sync += self._row.eq(0)
                m.next = "drain"

    def _read_final(self, m: Module, finals: Memory) -> None:
        """The port that the finisher reads."""
        # Few words, read at once: distributed RAM.
        read = finals.read_port(domain="comb")
        final_address = Signal(len(read.addr))
        m.d.comb += read.addr.eq(final_address)
        m.d.sync += [
            final_address.eq(Cat(self.final_row, self.final_slot)),
            self.final.eq(read.data),
        ]

    def _compare(self, m: Module, finals: Memory, issue: Signal, lane: Signal) -> Value:
        """The lanes' maxima, one at a time: address, (lanes' two cycles), choose, compare, keep; the last is kept."""
        shapes, last_lane = self._shapes, self._config.lanes - 1
        write = finals.write_port()
        step = data.StructLayout({"valid": 1, "lane": shapes.lane, "row": shapes.row, "final": 1})
        stages = [Signal(step, name=f"stage{i}") for i in range(4)]
        compared, kept = stages[2:]
        chosen, best = Signal(shapes.score), Signal(shapes.score)
        m.d.sync += [
            stages[0].valid.eq(issue),
            stages[0].lane.eq(lane),
            stages[0].row.eq(self._row),
            stages[0].final.eq((lane == last_lane) & (self._row == self._last_row)),
            *(after.eq(before) for before, after in pairwise(stages)),
            chosen.eq(Array(self.maximum)[stages[1].lane]),
        ]
        with m.If((compared.lane == 0) | (chosen > best)):
            m.d.sync += best.eq(chosen)
        m.d.comb += [
            write.addr.eq(Cat(kept.row, self._job.slot)),
            write.data.eq(best),
            write.en.eq(kept.valid & (kept.lane == last_lane)),
        ]
        return kept.valid & kept.final

    def _give(self, m: Module, finals: Memory, give: Signal) -> Signal:
        """Gives the maximum over all lanes back to them; strobe: that of the last row is given."""
        row, slot = self._row, self._job.slot
        back = finals.read_port(domain="comb")
        give_row = Signal(self._shapes.row)
        give_last = Signal()
        m.d.comb += [
            back.addr.eq(Cat(row, slot)),
            self.maximum_row.eq(Mux(self.maximum_write, give_row, row)),
        ]
        m.d.sync += [
            self.maximum_write.eq(give),
            self.maximum_new.eq(back.data),
            give_row.eq(row),
            give_last.eq(give & (row == self._last_row)),
        ]
        with m.If(self.freed):
            m.d.sync += self.value_open.bit_select(self.freed_slot, 1).eq(0)
        with m.If(give_last):
            m.d.sync += self.value_open.bit_select(slot, 1).eq(1)
        return give_last
