"""Last stage of a job: gathers and drains the lanes, blends, and writes back."""

from functools import reduce
from operator import and_

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.commands import CompletionFlag, Mode, Status
from kvattic.spec.config import Config
from kvattic.spec.formats import ALPHA_FRACTION
from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.lib.axi import AXI_WRITE, DATA_BITS, LINE_ADDRESS_BITS
from kvattic_hdl.lib.axi_write import WRITE_WORD
from kvattic_hdl.lib.shapes import FAULTS, Shapes
from kvattic_hdl.nvme.counters import SNAPSHOT
from kvattic_hdl.nvme.stamps import STAMPS
from kvattic_hdl.reduce.blend import MeanBlend
from kvattic_hdl.reduce.drain import Drain
from kvattic_hdl.reduce.gather import Gather
from kvattic_hdl.reduce.write_back import BLOCK_BITS, WriteBack


class Finisher(wiring.Component):
    """Ends the jobs, in order: drains the lanes, divides, writes results and completions.

    A job is gathered (denominators summed over the lanes, reports combined, trailers kept), drained
    (accumulators through the chain and the divider into one half of a buffer) and written (rows,
    then its completion once their responses have come).  While one job is written the next one is
    gathered and drained into the other half.

    In SPARF, FETCHED and CODES each quotient is blended with its feature of the mean of V, by the row's
    alpha; then the slot is freed when the last element's mean is read, else when the last
    accumulators are taken.  Without `config.sparse` there is neither a `Blend` nor a memory for
    means, and every mode is taken for DENSE.

    Latency: from `values_done` to a job's first line about as long as the throughput's interval.
    Throughput: a job each ``2 * rows * head_dim`` cycles (rows of the job; as many times more as
    there are copies of the accumulators) and about 30 (45 with `config.sparse`) and the longer of
    gathering (see `Gather`) and the first word's way through the lanes, unless writing takes longer.
    Ordering: completions of jobs in the order of `jobs`; those of other commands in the order of
    `outcomes`, between them, when no result is being written, each behind its block if it has one.
    Reset drops all jobs; raise `stop` and wait for `quiet` before it.

    Status: what the job came with; else CODEWORD_TIMEOUT if its slot has failed; else
    UNREADABLE_KEY, UNREADABLE_VALUE, NAN_KEY, NAN_VALUE; else BUS_ERROR (where 0) if a result line
    was answered with an error; else OK.
    Result rows are written only for jobs without an error.  Flags are those of the lanes, whatever
    the status.

    A READ goes the way of a job of one row, which is not written: its lines come beside (`copies`).
    BUS_ERROR of one of them is reported whatever the lanes say; NaN and clipping are nothing to it.
    Its slot is freed when its completion is handed over, as `copies` are told apart by their slots.

    Parameters
    ----------
    config : Config
        The configuration.
    outstanding : int
        Lines that may await their response on the bus.

    Members
    -------
    jobs : In(stream.Signature(shapes.job))
        Jobs in order; one is taken when the next may begin, after `freed`.
    outcomes : In(stream.Signature(shapes.ended))
        Flash and admin commands that have ended.
    copies, copies_slot : In(stream.Signature(WRITE_WORD)), In(shapes.slot)
        Lines of READs, and whose they are; see `WriteBack`.
    block_index, block_data : Out(8), In(64)
        Words of the block of the outcome taken last, three cycles after their index.
    values_done : In(ArrayLayout(unsigned(jobs_in_flight), lanes))
        From each lane: the slot's V codewords are accounted for.
    failed : In(jobs_in_flight)
        The slot's job is abandoned; read in the cycle of `freed`.
    failed_where : In(32)
        `where` of the failed job's completion; read in the cycle of `freed`.
    stamps : In(STAMPS)
        When things of the job of `waiting_slot` happened; read in the cycle of `freed` or in the next one.
    waiting : Out(1)
        Waits for `values_done` of `waiting_slot` from all lanes.
    waiting_slot : Out(shapes.slot)
        Slot that is waited for.
    denominator_slot, denominator_row : Out(shapes.slot), Out(shapes.row)
        Address of the denominators, for all lanes.
    denominators : In(ArrayLayout(shapes.denominator, lanes))
        Denominator of each lane, two cycles after its address.
    final_slot, final_row : Out(shapes.slot), Out(shapes.row)
        Address of the maximum over all lanes (the same as the denominators').
    final : In(shapes.score)
        That maximum, two cycles after its address.
    alpha : In(shapes.alpha)
        Share of the approximate mass that is attended, at the address of `final`, two cycles after
        it; only read for SPARF, FETCHED and CODES.
    mean_valid, mean : In(1), In(shapes.mean)
        A pair of the mean of V for its slot, to be kept until the slot is freed; all pairs come
        before the job's lanes can be done.
    report_slot : Out(shapes.slot)
        Slot of the reports.
    reports : In(ArrayLayout(shapes.report, lanes))
        Report of each lane, two cycles after `report_slot`.
    chain_head : Out(stream.Signature(shapes.partial))
        To the first lane: one word for each of the slot's accumulator words, data zero, copies of a
        beat in a row.
    chain_tail : In(stream.Signature(shapes.partial))
        From the last lane: the same words with the sums over all lanes.
    freed : Out(1)
        Strobe: the lanes' state of `freed_slot` is no longer needed.
    freed_slot : Out(shapes.slot)
        Slot that is free.
    post_queue : Out(3)
        Queue whose completion comes next.
    post_line, post_phase, post_head : In(58), In(1), In(12)
        Line and phase of its next entry, and the queue's fetch head, two cycles later.
    post : Out(1)
        Strobe: the entry is used.
    snapshot : In(SNAPSHOT)
        Counters in this cycle, for the completion.
    completed : Out(1)
        Strobe: a completion of `post_queue` is written and its response has come.
    write_error : Out(1)
        Strobe: a write was answered with an error.
    stop : In(1)
        While high no write is begun, and outcomes are taken and forgotten; a reset follows.
    quiet : Out(1)
        No write is under way.
    axi : Out(AXI_WRITE)
        The bus.
    """

    def __init__(self, config: Config, outstanding: int = 8) -> None:
        self._config = config
        self._outstanding = outstanding
        shapes = Shapes(config)
        super().__init__(
            {
                "jobs": In(stream.Signature(shapes.job)),
                "outcomes": In(stream.Signature(shapes.ended)),
                "values_done": In(
                    data.ArrayLayout(unsigned(config.jobs_in_flight), config.lanes)
                ),
                "failed": In(config.jobs_in_flight),
                "failed_where": In(32),
                "stamps": In(STAMPS),
                "waiting": Out(1),
                "waiting_slot": Out(shapes.slot),
                "denominator_slot": Out(shapes.slot),
                "denominator_row": Out(shapes.row),
                "denominators": In(data.ArrayLayout(shapes.denominator, config.lanes)),
                "final_slot": Out(shapes.slot),
                "final_row": Out(shapes.row),
                "final": In(shapes.score),
                "alpha": In(shapes.alpha),
                "mean_valid": In(1),
                "mean": In(shapes.mean),
                "report_slot": Out(shapes.slot),
                "reports": In(data.ArrayLayout(shapes.report, config.lanes)),
                "chain_head": Out(stream.Signature(shapes.partial)),
                "chain_tail": In(stream.Signature(shapes.partial)),
                "freed": Out(1),
                "freed_slot": Out(shapes.slot),
                "copies": In(stream.Signature(WRITE_WORD)),
                "copies_slot": In(shapes.slot),
                "block_index": Out(BLOCK_BITS),
                "block_data": In(DATA_BITS),
                "post_queue": Out(range(QUEUES)),
                "post_line": In(LINE_ADDRESS_BITS),
                "post_phase": In(1),
                "post_head": In(range(MAX_ENTRIES)),
                "post": Out(1),
                "snapshot": In(SNAPSHOT),
                "completed": Out(1),
                "write_error": Out(1),
                "stop": In(1),
                "quiet": Out(1),
                "axi": Out(AXI_WRITE),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, job = self._config, self.jobs.payload
        m.submodules.gather = gather = Gather(config)
        m.submodules.drain = drain = Drain(config)
        m.submodules.write_back = write_back = WriteBack(config, self._outstanding)
        half = Signal()  # of the buffers: that of the job in work

        self._connect_ports(m, gather, drain, write_back)
        m.d.comb += [
            gather.job.eq(job),
            gather.half.eq(half),
            drain.job.eq(job),
            drain.begin.eq(gather.begin),
            drain.gathered.eq(gather.done),
            gather.divisor_row.eq(drain.divisor_row),
            drain.divisor.eq(gather.divisor),
            write_back.job.eq(job),
            write_back.half.eq(half),
            gather.trailer_address.eq(write_back.trailer_address),
            write_back.trailer.eq(gather.trailer),
        ]
        slot_done = drain.drained  # the lanes' state is no longer needed
        if config.sparse:
            blended = (job.mode != Mode.DENSE) & (job.mode != Mode.CENTROID)
            slot_done = Mux(blended, self._blend(m, blended, gather, drain, write_back), drain.drained)
        else:
            connect(m, drain.o, write_back.result)

        divided = write_back.result.valid & write_back.result.payload.place.last
        all_done = self._lanes_done(m)
        abandoned = Signal()
        stamps = Signal(STAMPS, reset_less=True)
        abandoned_where = Signal(32, reset_less=True)
        # The slot may be used again before the completion is written, but not in the cycle after it is freed.
        passed_by, slot_left = Signal(), Signal()
        m.d.sync += slot_left.eq(slot_done)
        with m.If(passed_by | slot_left):
            m.d.sync += stamps.eq(self.stamps)
        self._judge(m, gather.report, abandoned, abandoned_where, write_back.entry)
        m.d.comb += write_back.entry.stamps.eq(stamps)
        with m.FSM(name="order"):
            with m.State("WAIT"):
                with m.If(self.jobs.valid):
                    with m.If(~job.lanes):
                        m.d.comb += [self.freed.eq(1), passed_by.eq(1)]
                        m.d.sync += abandoned.eq(0)
                        m.next = "HAND_OVER"
                    with m.Elif(all_done.bit_select(job.slot, 1)):
                        m.d.comb += gather.begin.eq(1)
                        m.next = "DRAIN"
                    with m.Else():
                        m.d.comb += self.waiting.eq(1)
            with m.State("DRAIN"):
                # The failed bit goes with the slot, so it is read now; it cannot rise for a job that waits no more.
                with m.If(slot_done):
                    m.d.comb += self.freed.eq(~job.read)
                    m.d.sync += [
                        abandoned.eq(self.failed.bit_select(job.slot, 1)),
                        abandoned_where.eq(self.failed_where),
                    ]
                with m.If(divided):
                    m.next = "HAND_OVER"
            with m.State("HAND_OVER"):
                with m.If(write_back.idle):
                    m.d.comb += [
                        write_back.hand_over.eq(1), self.freed.eq(job.read & job.lanes)]
                    m.d.sync += half.eq(half ^ job.lanes)
                    m.next = "TAKE"
            with m.State("TAKE"):   # a cycle late: whether it is handed over is known late
                m.d.comb += self.jobs.ready.eq(1)
                m.next = "WAIT"
        return m

    def _connect_ports(self, m: Module, gather: Gather, drain: Drain, write_back: WriteBack) -> None:
        """What passes between the ports and the parts as it is."""
        job = self.jobs.payload
        for port in (self.waiting_slot, self.freed_slot, self.denominator_slot, self.final_slot, self.report_slot):
            m.d.comb += port.eq(job.slot)
        m.d.comb += [
            self.denominator_row.eq(gather.row),
            self.final_row.eq(gather.row),
            gather.denominators.eq(self.denominators),
            gather.final.eq(self.final),
            gather.reports.eq(self.reports),
        ]
        connect(m, drain.chain_head, flipped(self.chain_head))
        connect(m, flipped(self.chain_tail), drain.chain_tail)
        connect(m, flipped(self.outcomes), write_back.outcomes)
        connect(m, write_back.axi, flipped(self.axi))
        connect(m, flipped(self.copies), write_back.copies)
        m.d.comb += write_back.copies_slot.eq(self.copies_slot)
        for name in ("block_data", "post_line", "post_phase", "post_head", "snapshot", "stop"):
            m.d.comb += getattr(write_back, name).eq(getattr(self, name))
        for name in ("block_index", "post_queue", "post", "completed", "write_error", "quiet"):
            m.d.comb += getattr(self, name).eq(getattr(write_back, name))

    def _lanes_done(self, m: Module) -> Signal:
        """Slots that all lanes are done with."""
        # A register is fast enough: a slot's bits are low long before its job comes here.
        all_done = Signal(self._config.jobs_in_flight)
        m.d.sync += all_done.eq(reduce(and_, (self.values_done[lane] for lane in range(self._config.lanes))))
        return all_done

    def _blend(self, m: Module, blended: Value, gather: Gather, drain: Drain, write_back: WriteBack) -> Signal:
        """Blends the quotients on their way; strobe: the last element's mean is being read."""
        m.submodules.blend = blend = MeanBlend(self._config)
        m.d.comb += [
            blend.slot.eq(self.jobs.payload.slot),
            blend.mean_valid.eq(self.mean_valid),
            blend.mean.eq(self.mean),
            blend.keep_alpha.eq(gather.kept),
            blend.alpha_row.eq(gather.row),
            blend.alpha.eq(Mux(blended, self.alpha, 1 << ALPHA_FRACTION)),
        ]
        connect(m, drain.o, blend.i)
        connect(m, blend.o, write_back.result)
        return blend.last_mean

    def _judge(self, m: Module, report: data.View, abandoned: Signal, abandoned_where: Signal,
               entry: data.View) -> None:
        """What the job's completion says."""
        job = self.jobs.payload
        m.d.comb += [
            entry.queue.eq(job.queue),
            entry.identifier.eq(job.identifier),
            entry.status.eq(job.status),
            entry.where.eq(job.where),
        ]
        with m.If(job.lanes & (job.status == Status.OK)):
            with m.If(abandoned):
                m.d.comb += [entry.status.eq(Status.CODEWORD_TIMEOUT), entry.where.eq(abandoned_where)]
            with m.Elif(report.fault < Mux(job.read, FAULTS.index("nan_key"), len(FAULTS))):
                m.d.comb += entry.where.eq(report.token)
                with m.Switch(report.fault):
                    for number, name in enumerate(FAULTS):
                        with m.Case(number):
                            m.d.comb += entry.status.eq(Status[name.upper()])
        flags = {flag.value.bit_length() - 1: report[flag.name.lower()] for flag in CompletionFlag}
        duplicate = CompletionFlag.DUPLICATE.bit_length() - 1
        m.d.comb += entry.flags.eq(
            Cat(job.lanes & (~job.read | (number == duplicate)) & flags.get(number, 0)
                for number in range(max(flags) + 1)))
