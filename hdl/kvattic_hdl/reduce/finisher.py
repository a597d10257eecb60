"""Last stage of a job: drains the lanes, divides, writes the results and the completion."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import (
    COMPLETION,
    LINE_BYTES,
    STATUS_BITS,
    STATUS_TYPE,
    TRAILER,
    CompletionFlag,
    Mode,
    Status,
)
from kvattic.spec.config import Config
from kvattic.spec.formats import ALPHA_FRACTION
from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.lib.axi import AXI_WRITE, DATA_BITS, LINE_ADDRESS_BITS, LINE_WORDS
from kvattic_hdl.lib.axi_write import WriteLines
from kvattic_hdl.lib.divider import Divider, Normaliser, normalised
from kvattic_hdl.lib.interfaces import FAULTS, Shapes
from kvattic_hdl.lib.records import assemble
from kvattic_hdl.nvme.control import SNAPSHOT
from kvattic_hdl.reduce.blend import Blend

BLOCK_BITS = 8
"""Of the number of a word of a block."""
LANE_FLAGS = tuple(flag.name.lower() for flag in CompletionFlag)
"""Flags that lanes report."""


def _words(line: Value) -> data.View:
    """A line as the words of the bus."""
    return data.View(data.ArrayLayout(DATA_BITS, LINE_WORDS), line)


def fault_order(report: Signal | data.View) -> Value:
    """A number that is the less the sooner this fault is reported."""
    return Cat(report.token, report.fault)


class Finisher(wiring.Component):
    """Ends the jobs, in order: drains the lanes, divides, writes results and completions.

    A job is gathered (denominators summed over the lanes, reports combined, trailers kept), drained
    (accumulators through the chain and the divider into one half of a buffer) and written (rows,
    then its completion once their responses have come).  While one job is written the next one is
    gathered and drained into the other half.

    In SPARF and FETCHED each quotient is blended with its channel of the mean of V, by the row's
    alpha; then the slot is freed when the last element's mean is read, else when the last
    accumulators are taken.  Without `config.sparse` there is neither a `Blend` nor a memory for
    means, and every mode is taken for DENSE.

    Latency: from `values_done` to a job's first line about as long as the throughput's interval.
    Throughput: a job each ``rows * head_dim`` cycles (rows of the job; as many times more as there
    are copies of the accumulators) and about 40 (55 with `config.sparse`) and the longer of
    gathering (``rows * (channels + 5)``) and the first word's way through the lanes, unless writing
    takes longer.
    Ordering: completions of jobs in the order of `jobs`; those of other commands in the order of
    `outcomes`, between them, when no result is being written, each behind its block if it has one.
    Reset drops all jobs; raise `stop` and wait for `quiet` before it.

    Status: what the job came with; else CODEWORD_TIMEOUT if its slot has failed; else
    UNREADABLE_KEY, UNREADABLE_VALUE, NAN_KEY, NAN_VALUE; else BUS_ERROR (where 0) if a result line
    was answered with an error; else OK.
    Result rows are written only for jobs without an error.  Flags are those of the lanes, whatever
    the status.

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
    block_index, block_data : Out(8), In(64)
        Words of the block of the outcome taken last, one cycle after their index.
    values_done : In(ArrayLayout(unsigned(jobs_in_flight), channels))
        From each lane: the slot's V codewords are accounted for.
    failed : In(jobs_in_flight)
        The slot's job is abandoned; read in the cycle of `freed`.
    failed_where : In(32)
        `where` of the failed job's completion; read in the cycle of `freed`.
    waiting : Out(1)
        Waits for `values_done` of `waiting_slot` from all lanes.
    waiting_slot : Out(shapes.slot)
        Slot that is waited for.
    denominator_slot, denominator_row : Out(shapes.slot), Out(shapes.row)
        Address of the denominators, for all lanes.
    denominators : In(ArrayLayout(shapes.denominator, channels))
        Denominator of each lane, two cycles after its address.
    final_slot, final_row : Out(shapes.slot), Out(shapes.row)
        Address of the maximum over all lanes (the same as the denominators').
    final : In(shapes.score)
        That maximum, two cycles after its address.
    alpha : In(shapes.alpha)
        Share of the approximate mass that is attended, at the address of `final`, two cycles after
        it; only read for SPARF and FETCHED.
    mean_valid, mean : In(1), In(shapes.mean)
        A pair of the mean of V for its slot, to be kept until the slot is freed; all pairs come
        before the job's lanes can be done.
    report_slot : Out(shapes.slot)
        Slot of the reports.
    reports : In(ArrayLayout(shapes.report, channels))
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
        self.config = config
        self.outstanding = outstanding
        shapes = Shapes(config)
        super().__init__(
            {
                "jobs": In(stream.Signature(shapes.job)),
                "outcomes": In(stream.Signature(shapes.ended)),
                "values_done": In(
                    data.ArrayLayout(unsigned(config.jobs_in_flight), config.channels)
                ),
                "failed": In(config.jobs_in_flight),
                "failed_where": In(32),
                "waiting": Out(1),
                "waiting_slot": Out(shapes.slot),
                "denominator_slot": Out(shapes.slot),
                "denominator_row": Out(shapes.row),
                "denominators": In(data.ArrayLayout(shapes.denominator, config.channels)),
                "final_slot": Out(shapes.slot),
                "final_row": Out(shapes.row),
                "final": In(shapes.score),
                "alpha": In(shapes.alpha),
                "mean_valid": In(1),
                "mean": In(shapes.mean),
                "report_slot": Out(shapes.slot),
                "reports": In(data.ArrayLayout(shapes.report, config.channels)),
                "chain_head": Out(stream.Signature(shapes.partial)),
                "chain_tail": In(stream.Signature(shapes.partial)),
                "freed": Out(1),
                "freed_slot": Out(shapes.slot),
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
        config, shapes = self.config, Shapes(self.config)
        job = self.jobs.payload
        elements, beats = config.elements_per_beat, config.beats_per_token
        # Positions in the buffer: half, row, channel; each part has its own bits, so that no
        # address is multiplied.
        row_bits, pair_bits = ceil_log2(config.rows), ceil_log2(config.head_dim // 2)
        half = Signal()

        begin = Signal()  # gathering and draining start
        gathered = Signal()  # all denominators are normalised, all trailers kept
        blended = Signal()  # the job's quotients are blended with its mean
        drained = Signal()  # the last accumulators have been taken
        last_mean = Signal()  # the last element's mean is being read
        divided = Signal()  # the last result is being put into the buffer
        last_row = Signal(shapes.row)
        m.d.comb += last_row.eq(job.rows - 1)

        # ---- Order of a job. ----

        all_done = Signal(config.jobs_in_flight)
        done_here = Signal(config.jobs_in_flight)
        for lane in range(config.channels):
            following = Signal.like(done_here, name=f"done_to_{lane}")
            m.d.comb += following.eq(self.values_done[lane] & (done_here if lane else ~0))
            done_here = following
        # A register is fast enough: a slot's bits are low long before its job comes here.
        m.d.sync += all_done.eq(done_here)

        abandoned = Signal()
        abandoned_where = Signal(32, reset_less=True)
        writer_idle = Signal()
        hand_over = Signal()
        m.d.comb += [self.waiting_slot.eq(job.slot), self.freed_slot.eq(job.slot)]
        with m.FSM(name="order"):
            with m.State("WAIT"):
                with m.If(self.jobs.valid):
                    with m.If(~job.lanes):
                        m.d.comb += self.freed.eq(1)
                        m.d.sync += abandoned.eq(0)
                        m.next = "HAND_OVER"
                    with m.Elif(all_done.bit_select(job.slot, 1)):
                        m.d.comb += begin.eq(1)
                        m.next = "DRAIN"
                    with m.Else():
                        m.d.comb += self.waiting.eq(1)
            with m.State("DRAIN"):
                # The failed bit goes with the slot, so it is read now; it cannot rise for a job
                # that waits no more.
                with m.If(Mux(blended, last_mean, drained)):
                    m.d.comb += self.freed.eq(1)
                    m.d.sync += [
                        abandoned.eq(self.failed.bit_select(job.slot, 1)),
                        abandoned_where.eq(self.failed_where),
                    ]
                with m.If(divided):
                    m.next = "HAND_OVER"
            with m.State("HAND_OVER"):
                with m.If(writer_idle):
                    m.d.comb += [hand_over.eq(1), self.jobs.ready.eq(1)]
                    m.d.sync += half.eq(half ^ job.lanes)
                    m.next = "WAIT"

        # ---- Gathering. ----

        row = Signal(shapes.row)
        lane = Signal(shapes.channel)
        m.d.comb += [
            self.denominator_slot.eq(job.slot),
            self.denominator_row.eq(row),
            self.final_slot.eq(job.slot),
            self.final_row.eq(row),
            self.report_slot.eq(job.slot),
        ]

        m.submodules.normaliser = normaliser = Normaliser(config.denominator_bits)
        m.submodules.denominators = denominators = Memory(
            shape=normalised(config.denominator_bits), depth=2**row_bits, init=[]
        )
        denominators_write = denominators.write_port()
        denominators_read = denominators.read_port()
        m.submodules.trailers = trailers = Memory(
            shape=data.StructLayout({"maximum": shapes.score, "denominator": shapes.denominator}),
            depth=2 << row_bits,
            init=[],
        )
        trailers_write = trailers.write_port()
        trailers_read = trailers.read_port()

        # A lane's values are registered behind the multiplexer, and combined in the cycle after.
        chosen = Signal(shapes.denominator, reset_less=True)
        chosen_report = Signal(shapes.report, reset_less=True)
        choosing = Signal()
        chosen_valid = Signal()
        total = Signal(shapes.denominator, reset_less=True)
        report = Signal(shapes.report, reset_less=True)
        m.d.sync += [
            chosen.eq(self.denominators[lane]),
            chosen_report.eq(self.reports[lane]),
            chosen_valid.eq(choosing),
        ]
        with m.If(chosen_valid):
            m.d.sync += total.eq(total + chosen)
            # Reports are combined once more with each row, which changes nothing.
            # The least of (fault, token): the first of FAULTS, at its lowest token.
            with m.If(fault_order(chosen_report) < fault_order(report)):
                m.d.sync += [report.fault.eq(chosen_report.fault), report.token.eq(chosen_report.token)]
            for name in LANE_FLAGS:
                with m.If(chosen_report[name]):
                    m.d.sync += report[name].eq(1)

        normalised_rows = Signal(range(config.rows + 1))
        m.d.comb += [
            normaliser.i.payload.eq(total),
            normaliser.o.ready.eq(1),
            denominators_write.addr.eq(normalised_rows),
            denominators_write.data.eq(normaliser.o.payload),
            denominators_write.en.eq(normaliser.o.valid),
            trailers_write.addr.eq(Cat(row[:row_bits], half)),
            trailers_write.data.maximum.eq(self.final),
            trailers_write.data.denominator.eq(total),
            gathered.eq(normalised_rows == job.rows),
        ]
        with m.If(normaliser.o.valid):
            m.d.sync += normalised_rows.eq(normalised_rows + 1)
        with m.If(begin):
            m.d.sync += normalised_rows.eq(0)

        with m.FSM(name="gather"):
            with m.State("IDLE"):
                m.d.sync += [row.eq(0), lane.eq(0), total.eq(0)]
                with m.If(begin):
                    m.d.sync += report.fault.eq(len(FAULTS))
                    m.d.sync += [report[name].eq(0) for name in LANE_FLAGS]
                    m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.next = "READ"
            with m.State("READ"):
                m.next = "CHOOSE"
            with m.State("CHOOSE"):
                m.d.comb += choosing.eq(1)
                m.d.sync += lane.eq(lane + 1)
                with m.If(lane == config.channels - 1):
                    m.next = "ADD"
            with m.State("ADD"):
                m.next = "KEEP"
            with m.State("KEEP"):
                m.d.comb += [normaliser.i.valid.eq(1), trailers_write.en.eq(1)]
                with m.If(normaliser.i.ready):
                    m.d.sync += [row.eq(row + 1), lane.eq(0), total.eq(0)]
                    with m.If(row == last_row):
                        m.next = "IDLE"
                    with m.Else():
                        m.next = "ADDRESS"

        # ---- Draining: the chain's head. ----

        # Address of copy c of beat b is c * beats + b; copies of one beat follow each other.
        asking = Signal()
        ask_beat = Signal(shapes.beat_index)
        ask_copy = Signal(range(shapes.copies))
        address = Signal(shapes.drain_address)
        m.d.comb += [
            self.chain_head.valid.eq(asking),
            self.chain_head.payload.slot.eq(job.slot),
            self.chain_head.payload.address.eq(address),
        ]
        with m.If(begin):
            m.d.sync += [asking.eq(1), ask_beat.eq(0), ask_copy.eq(0), address.eq(0)]
        with m.Elif(asking & self.chain_head.ready):
            with m.If(ask_copy == shapes.copies - 1):
                m.d.sync += [ask_copy.eq(0), ask_beat.eq(ask_beat + 1), address.eq(ask_beat + 1)]
                with m.If(ask_beat == beats - 1):
                    m.d.sync += asking.eq(0)
            with m.Else():
                m.d.sync += [ask_copy.eq(ask_copy + 1), address.eq(address + beats)]

        # ---- Draining: the chain's tail, one row of a word at a time, then one element at a time.
        # ----

        tail = self.chain_tail
        position = data.StructLayout(
            {
                "row": shapes.row,
                "beat": shapes.beat_index,
                "copy": unsigned(len(ask_copy)),
                "last": 1,
            }
        )
        incoming = Signal(position)
        current = Signal(position, reset_less=True)
        current_valid = Signal()
        current_data = Signal(data.ArrayLayout(shapes.accumulator, elements), reset_less=True)
        element = Signal(range(elements))
        take = Signal()
        word_taken = Signal()
        m.d.comb += [
            take.eq(tail.valid & gathered & (~current_valid | (element == elements - 1))),
            word_taken.eq(take & (incoming.row == last_row)),
            tail.ready.eq(word_taken),
            incoming.last.eq(
                (incoming.row == last_row)
                & (incoming.beat == beats - 1)
                & (incoming.copy == shapes.copies - 1)
            ),
            drained.eq(take & incoming.last),
        ]
        with m.If(begin):
            m.d.sync += [incoming.row.eq(0), incoming.beat.eq(0), incoming.copy.eq(0)]
        with m.Elif(word_taken):
            m.d.sync += incoming.row.eq(0)
            with m.If(incoming.copy == shapes.copies - 1):
                m.d.sync += [incoming.copy.eq(0), incoming.beat.eq(incoming.beat + 1)]
            with m.Else():
                m.d.sync += incoming.copy.eq(incoming.copy + 1)
        with m.Elif(take):
            m.d.sync += incoming.row.eq(incoming.row + 1)
        with m.If(take):
            m.d.sync += [
                current_data.eq(tail.payload.data[incoming.row]),
                current.eq(incoming),
                current_valid.eq(1),
            ]
        with m.Elif(element == elements - 1):
            m.d.sync += current_valid.eq(0)
        with m.If(current_valid):
            m.d.sync += element.eq(element + 1)  # elements is a power of two

        # An element and its row's denominator, registered.
        chosen_element = Signal(shapes.accumulator, reset_less=True)
        place = data.StructLayout(
            {"element": unsigned(ceil_log2(config.head_dim)), "row": unsigned(row_bits), "last": 1}
        )
        chosen_place = Signal(place, reset_less=True)
        element_valid = Signal()
        element_copy = Signal(len(ask_copy), reset_less=True)
        m.d.sync += [
            chosen_element.eq(current_data[element]),
            chosen_place.element.eq(Cat(element, current.beat)),
            chosen_place.row.eq(current.row),
            chosen_place.last.eq(current.last & (element == elements - 1)),
            element_valid.eq(current_valid),
            element_copy.eq(current.copy),
        ]
        m.d.comb += denominators_read.addr.eq(current.row)

        m.submodules.divider = divider = Divider(
            config.accumulator_bits, config.denominator_bits, place
        )
        m.d.comb += [
            divider.i.payload.denominator.eq(denominators_read.data),
            divider.i.payload.tag.eq(chosen_place),
        ]
        if shapes.copies == 1:
            m.d.comb += [
                divider.i.valid.eq(element_valid),
                divider.i.payload.numerator.eq(chosen_element),
            ]
        else:
            # Few geometries have copies: they are summed one element at a time.  The same element
            # comes again after `elements` cycles or more, long after it is written.
            m.submodules.sums = sums = Memory(
                shape=shapes.accumulator, depth=elements << row_bits, init=[]
            )
            sums_write = sums.write_port()
            sums_read = sums.read_port()
            summed = Signal(shapes.accumulator)
            m.d.comb += [
                sums_read.addr.eq(Cat(element, current.row)),
                summed.eq(chosen_element + Mux(element_copy == 0, 0, sums_read.data)),
                sums_write.addr.eq(
                    Cat(chosen_place.element[: ceil_log2(elements)], chosen_place.row)
                ),
                sums_write.data.eq(summed),
                sums_write.en.eq(element_valid),
                divider.i.valid.eq(element_valid & (element_copy == shapes.copies - 1)),
                divider.i.payload.numerator.eq(summed),
            ]

        # ---- The buffer: quotients come in the order of the chain and go out row by row. ----

        m.submodules.results = results = Memory(
            shape=data.ArrayLayout(32, 2), depth=2 << row_bits + pair_bits, init=[]
        )
        results_write = results.write_port(granularity=1)
        results_read = results.read_port()
        done = Signal(data.StructLayout({"valid": 1, "result": 32, "place": place}))
        m.d.comb += [
            results_write.addr.eq(Cat(done.place.element[1:], done.place.row, half)),
            results_write.data[0].eq(done.result),
            results_write.data[1].eq(done.result),
            results_write.en.eq(Mux(done.valid, Mux(done.place.element[0], 0b10, 0b01), 0)),
            divided.eq(done.valid & done.place.last),
        ]
        if not config.sparse:
            m.d.comb += [
                done.valid.eq(divider.o.valid),
                done.result.eq(divider.o.payload.quotient),
                done.place.eq(divider.o.payload.tag),
            ]
        else:
            # ---- Blending: each quotient with its row's alpha and its channel's mean. ----
            m.d.comb += blended.eq((job.mode == Mode.SPARF) | (job.mode == Mode.FETCHED))
            m.submodules.means = means = Memory(
                shape=64, depth=config.jobs_in_flight << pair_bits, init=[]
            )
            means_write = means.write_port()
            means_read = means.read_port()
            m.submodules.alphas = alphas = Memory(shape=shapes.alpha, depth=1 << row_bits, init=[])
            alphas_write = alphas.write_port()
            alphas_read = alphas.read_port()
            divided_place = divider.o.payload.tag
            quotient = Signal(32, reset_less=True)
            quotient_place = Signal(place, reset_less=True)
            quotient_valid = Signal()
            m.d.sync += [
                quotient.eq(divider.o.payload.quotient),
                quotient_place.eq(divided_place),
                quotient_valid.eq(divider.o.valid),
            ]
            m.submodules.blend = blend = Blend(place)
            m.d.comb += [
                means_write.addr.eq(Cat(self.mean.index[:pair_bits], self.mean.slot)),
                means_write.data.eq(self.mean.data),
                means_write.en.eq(self.mean_valid),
                means_read.addr.eq(Cat(divided_place.element[1:], job.slot)),
                last_mean.eq(divider.o.valid & divided_place.last),
                alphas_write.addr.eq(row),
                alphas_write.data.eq(Mux(blended, self.alpha, 1 << ALPHA_FRACTION)),
                alphas_write.en.eq(trailers_write.en),
                alphas_read.addr.eq(divided_place.row),
                blend.i.valid.eq(quotient_valid),
                blend.i.payload.quotient.eq(quotient),
                blend.i.payload.mean.eq(means_read.data.word_select(quotient_place.element[0], 32)),
                blend.i.payload.alpha.eq(alphas_read.data),
                blend.i.payload.tag.eq(quotient_place),
                done.valid.eq(blend.o.valid),
                done.result.eq(blend.o.payload.result),
                done.place.eq(blend.o.payload.tag),
            ]

        # ---- Writing. ----

        status = Signal(STATUS_BITS)
        where = Signal(32)
        m.d.comb += [status.eq(job.status), where.eq(job.where)]
        with m.If(job.lanes & (job.status == Status.OK)):
            with m.If(abandoned):
                m.d.comb += [status.eq(Status.CODEWORD_TIMEOUT), where.eq(abandoned_where)]
            with m.Elif(report.fault < len(FAULTS)):
                m.d.comb += where.eq(report.token)
                with m.Switch(report.fault):
                    for number, name in enumerate(FAULTS):
                        with m.Case(number):
                            m.d.comb += status.eq(Status[name.upper()])
        flags = Signal(COMPLETION["flags"].size * 8)
        for flag in CompletionFlag:
            m.d.comb += flags[flag.value.bit_length() - 1].eq(job.lanes & report[flag.name.lower()])

        m.submodules.lines = lines = WriteLines(self.outstanding)
        wiring.connect(m, wiring.flipped(self.axi), lines.axi)
        m.d.comb += [
            lines.stop.eq(self.stop),
            self.quiet.eq(lines.idle),
            self.write_error.eq(lines.error),
        ]

        entry = Signal(
            data.StructLayout(
                {
                    "queue": range(QUEUES),
                    "status": STATUS_BITS,
                    "where": 32,
                    "flags": len(flags),
                    "identifier": 16,
                }
            ),
            reset_less=True,
        )
        counters = Signal(SNAPSHOT, reset_less=True)
        write_half = Signal(reset_less=True)
        write_last_row = Signal(shapes.row, reset_less=True)
        line_address = Signal(64, reset_less=True)
        error = Signal()

        # What is being sent: words of a row (results, then trailer) or of the completion; one
        # register behind it, beside the read port of the results.
        row_words = config.head_dim // 2 + LINE_WORDS
        send_row = Signal(shapes.row)
        word = Signal(range(row_words))
        sending_rows = Signal()
        sending_entry = Signal()
        sending_block = Signal()
        block_there = Signal()  # block_data is that of block_index
        block_last = Signal(BLOCK_BITS, reset_less=True)
        phase = Signal(reset_less=True)
        head = Signal.like(self.post_head, reset_less=True)
        step = Signal()
        out_valid = Signal()
        out_result = Signal(reset_less=True)
        out_other = Signal(DATA_BITS, reset_less=True)
        out_address = Signal(64, reset_less=True)
        out_last = Signal(reset_less=True)
        trailer = _words(
            assemble(
                TRAILER,
                maximum=trailers_read.data.maximum,
                denominator=trailers_read.data.denominator,
            )
        )
        completion = _words(
            assemble(
                COMPLETION,
                state=Cat(phase, entry.status, Mux(entry.status == Status.OK, 0, STATUS_TYPE)),
                queue=entry.queue,
                head=head,
                identifier=entry.identifier,
                flags=entry.flags,
                where=entry.where,
                **{name: counters[name] for name in SNAPSHOT.members},
            )
        )
        place_in_line = word[: ceil_log2(LINE_WORDS)]
        m.d.comb += [
            trailers_read.addr.eq(Cat(send_row[:row_bits], write_half)),
            results_read.addr.eq(Cat(word[:pair_bits], send_row[:row_bits], write_half)),
            results_read.en.eq(step),
            step.eq(~out_valid | lines.i.ready),
            lines.i.valid.eq(out_valid),
            lines.i.payload.data.eq(Mux(out_result, results_read.data.as_value(), out_other)),
            lines.i.payload.address.eq(out_address),
            lines.i.payload.last.eq(out_last),
        ]
        with m.If(step):
            m.d.sync += [
                out_valid.eq(sending_rows | sending_entry | sending_block),
                out_result.eq(sending_rows & (word < config.head_dim // 2)),
                out_other.eq(Mux(
                    sending_block,
                    self.block_data,
                    Mux(sending_rows, trailer[place_in_line], completion[place_in_line]))),
                out_address.eq(line_address),
                out_last.eq(place_in_line == LINE_WORDS - 1),
            ]
            with m.If(sending_rows | sending_entry | sending_block):
                m.d.sync += word.eq(word + 1)
                with m.If(place_in_line == LINE_WORDS - 1):
                    m.d.sync += line_address.eq(line_address + LINE_BYTES)  # rows follow each other

        written = Signal()
        m.d.comb += [written.eq(~out_valid & lines.idle), self.post_queue.eq(entry.queue)]
        with m.If(lines.error):
            m.d.sync += error.eq(1)
        # Before a reset nothing is written, but flash commands that have begun must come to their end.
        m.d.comb += self.outcomes.ready.eq(self.stop)
        with m.FSM(name="write"):
            with m.State("IDLE"):
                # Jobs first: they come once in a while only.
                m.d.comb += [writer_idle.eq(1), self.outcomes.ready.eq(~hand_over | self.stop)]
                m.d.sync += [
                    entry.queue.eq(job.queue),
                    entry.status.eq(status),
                    entry.where.eq(where),
                    entry.flags.eq(flags),
                    entry.identifier.eq(job.identifier),
                    line_address.eq(job.result),
                    write_half.eq(half),
                    write_last_row.eq(last_row),
                    send_row.eq(0),
                    word.eq(0),
                    self.block_index.eq(0),
                    block_there.eq(0),
                    block_last.eq((self.outcomes.payload.lines << ceil_log2(LINE_WORDS)) - 1),
                    error.eq(0),
                ]
                with m.If(hand_over):
                    with m.If(job.lanes & (status == Status.OK)):
                        m.next = "ROWS"
                    with m.Else():
                        m.next = "PLACE"
                with m.Elif(self.outcomes.valid):
                    ended = self.outcomes.payload
                    m.d.sync += [
                        *(entry[name].eq(ended[name]) for name in ("queue", "identifier", "status", "where")),
                        entry.flags.eq(0),
                        line_address.eq(ended.result),
                    ]
                    m.next = "PLACE"
                    with m.If(ended.lines.any()):
                        m.next = "BLOCK"
            with m.State("BLOCK"):
                # A word every second cycle: it is read in between.
                m.d.comb += sending_block.eq(block_there)
                m.d.sync += block_there.eq(1)
                with m.If(step & block_there):
                    m.d.sync += [self.block_index.eq(self.block_index + 1), block_there.eq(0)]
                    with m.If(self.block_index == block_last):
                        m.d.sync += word.eq(0)
                        m.next = "SETTLE"
            with m.State("ROWS"):
                m.d.comb += sending_rows.eq(1)
                with m.If(step & (word == row_words - 1)):
                    m.d.sync += [word.eq(0), send_row.eq(send_row + 1)]
                    with m.If(send_row == write_last_row):
                        m.next = "SETTLE"
            with m.State("SETTLE"):
                with m.If(written):
                    m.next = "COMPOSE"
            with m.State("PLACE"):
                # post_queue has just changed: its entry is known in two cycles.
                m.next = "SETTLE"
            with m.State("COMPOSE"):
                m.d.comb += self.post.eq(1)
                m.d.sync += [
                    counters.eq(self.snapshot),
                    phase.eq(self.post_phase),
                    head.eq(self.post_head),
                    line_address.eq(Cat(Const(0, ceil_log2(LINE_BYTES)), self.post_line)),
                ]
                with m.If(error):
                    m.d.sync += [entry.status.eq(Status.BUS_ERROR), entry.where.eq(0)]
                m.next = "ENTRY"
            with m.State("ENTRY"):
                m.d.comb += sending_entry.eq(1)
                with m.If(step & (word == LINE_WORDS - 1)):
                    m.next = "FINISH"
            with m.State("FINISH"):
                with m.If(written):
                    m.d.comb += self.completed.eq(1)
                    m.next = "IDLE"
        return m
