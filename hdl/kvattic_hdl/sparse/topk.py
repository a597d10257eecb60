"""Chooses each sparse job's units, over all lanes, between its first pass and its K pass."""

from functools import reduce
from operator import and_

from amaranth.hdl import Array, Cat, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.formats import ALPHA_FRACTION, DIGIT_BITS, MASS_BITS, SCORE_MAX, VALUE_FRACTION
from kvattic_hdl.lib.interfaces import LENGTH_FORCED, RANK_BITS, Shapes, Sweep
from kvattic_hdl.lib.logarithm import Logarithm


class Selection(wiring.Component):
    """Sends the lanes' `Selector`s through the scores of a job's first pass, and decides by what they find.

    The steps of a sparse job (docs/sparse.md): wait for the first pass in all lanes; each row's largest score; SUM,
    each row's denominator, and its log2; MASS, the units' ranks; a radix select from the highest digit down, exact,
    which ends as soon as a digit divides off the right number of units; MARK; `select_valid`; each row's alpha.  The
    first digit is the mass's length in bits, so that the next one begins where the masses in question do: most are far
    below 1, and 6 bits of a fixed place would tell nothing of them.

    Latency from the last `first_done` to `select_valid`, measured, 8 lanes of 512 tokens (sweeps: see `Selector`):
    one row, SPARF, k a sixteenth of the tokens 2,908 cycles (two DIGIT sweeps, which is usual; each more 600); FETCHED
    with units of a codeword 2,379; CENTROID likewise 1,577; eight rows, SPARF 10,959, of which SUM and MASS, a score a
    cycle, are 8,200.  alpha is there channels + 5 cycles a row after `select_valid`.
    Throughput: one job at a time, so a job for each latency.
    Ordering: jobs leave in the order in which they came; dense ones and those without lanes take two cycles.
    Reset: no job.

    Parameters
    ----------
    config : Config
        One with `sparse`.

    Members
    -------
    jobs_i, jobs_o : In, Out(stream of Shapes.job)
        A job may come the cycle after its lanes were started, not earlier.
    first_done : In(ArrayLayout(jobs_in_flight, channels))
        From the lanes: their first pass of the slot's job is over.
    first_slot, first_row : Out
        Address of the first pass's row maxima in all lanes.
    first_maximum : In(ArrayLayout(Shapes.score, channels))
        Each lane's, two cycles later.
    sweep_valid, sweep : Out(1), Out(Shapes.sweep)
        Strobe, to all lanes.
    sweep_done : In(channels)
        From the cycle after `sweep_valid`: the sweep's results can be read.
    reference_write, reference_row, reference : Out(1), Out(row), Out(Shapes.score)
        Strobe, to all lanes: what scores are compared with.  Rows come in ascending order, those of the job only.
    sum_row : Out(row)
    sum : In(ArrayLayout(Shapes.denominator, channels))
        Each lane's sum of this row, two cycles later.
    bin : Out(DIGIT_BITS)
    count : In(ArrayLayout(Shapes.unit_count, channels))
        Each lane's count of this digit, two cycles later.
    unmarked : In(channels)
        The lane's last MARK sweep left a unit unselected.
    select_valid, select_slot : Out(1), Out(slot)
        Strobe: the slot's marks are there; its K pass may begin.  Also for a job that has failed.
    failed : In(jobs_in_flight)
        The slot's job is being abandoned; it is not swept if it is known by the end of its first pass.
    waiting, waiting_slot : Out(1), Out(slot)
        This block waits for the lanes' `first_done` of this slot.
    alpha_slot, alpha_row : In
    alpha : Out(Shapes.alpha)
        That row's alpha, two cycles later; 1 unless the job is blended and left a unit unselected.
    """

    jobs_i: stream.Interface
    jobs_o: stream.Interface
    first_done: data.View
    first_slot: Signal
    first_row: Signal
    first_maximum: data.View
    sweep_valid: Signal
    sweep: data.View
    sweep_done: Signal
    reference_write: Signal
    reference_row: Signal
    reference: Signal
    sum_row: Signal
    sum: data.View
    bin: Signal
    count: data.View
    unmarked: Signal
    select_valid: Signal
    select_slot: Signal
    failed: Signal
    waiting: Signal
    waiting_slot: Signal
    alpha_slot: Signal
    alpha_row: Signal
    alpha: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        channels = config.channels
        super().__init__({
            "jobs_i": In(stream.Signature(shapes.job)),
            "jobs_o": Out(stream.Signature(shapes.job)),
            "first_done": In(data.ArrayLayout(config.jobs_in_flight, channels)),
            "first_slot": Out(shapes.slot),
            "first_row": Out(shapes.row),
            "first_maximum": In(data.ArrayLayout(shapes.score, channels)),
            "sweep_valid": Out(1),
            "sweep": Out(shapes.sweep),
            "sweep_done": In(channels),
            "reference_write": Out(1),
            "reference_row": Out(shapes.row),
            "reference": Out(shapes.score),
            "sum_row": Out(shapes.row),
            "sum": In(data.ArrayLayout(shapes.denominator, channels)),
            "bin": Out(DIGIT_BITS),
            "count": In(data.ArrayLayout(shapes.unit_count, channels)),
            "unmarked": In(channels),
            "select_valid": Out(1),
            "select_slot": Out(shapes.slot),
            "failed": In(config.jobs_in_flight),
            "waiting": Out(1),
            "waiting_slot": Out(shapes.slot),
            "alpha_slot": In(shapes.slot),
            "alpha_row": In(shapes.row),
            "alpha": Out(shapes.alpha),
        })

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config, shapes = self._config, self._shapes
        channels = config.channels
        job = Signal(shapes.job)
        centroid = Signal()
        row, last_row = Signal(shapes.row), Signal(shapes.row)
        m.d.comb += [
            self.jobs_o.payload.eq(job),
            self.first_slot.eq(job.slot),
            self.first_row.eq(row),
            self.sum_row.eq(row),
            self.select_slot.eq(job.slot),
            self.waiting_slot.eq(job.slot),
            centroid.eq(job.mode == Mode.CENTROID),
        ]
        all_done = Signal(config.jobs_in_flight)
        swept = Signal()
        m.d.sync += [
            all_done.eq(reduce(and_, (self.first_done[i] for i in range(channels)))),
            swept.eq(self.sweep_done.all()),
        ]

        # A row of all lanes, one lane after the other: its largest maximum, the sum of its sums.
        lane = Signal(range(channels + 4))    # two cycles ahead of the lane that is chosen
        chosen_maximum, best = Signal(shapes.score), Signal(shapes.score)
        chosen_sum, total = Signal(shapes.denominator), Signal(shapes.denominator)
        choose = (lane - 2)[: shapes.channel.width]
        collected = lane == channels + 3
        m.d.sync += [
            chosen_maximum.eq(Array(self.first_maximum)[choose]),
            chosen_sum.eq(Array(self.sum)[choose]),
        ]
        with m.If(~collected):
            m.d.sync += total.eq(Mux(lane == 3, 0, total) + chosen_sum)
            with m.If((lane == 3) | (chosen_maximum > best)):
                m.d.sync += best.eq(chosen_maximum)

        # What is kept of each row: its largest score; that no token has any weight.
        m.submodules.maxima = maxima = Memory(
            shape=shapes.score, depth=1 << shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        maxima_write, maxima_read = maxima.write_port(domain="sync"), maxima.read_port(domain="comb")
        nothing = Signal(1 << shapes.row.width)
        m.d.comb += [
            maxima_write.addr.eq(row),
            maxima_write.data.eq(best),
            maxima_read.addr.eq(row),
            self.reference_row.eq(row),
            self.reference.eq(best),
        ]
        m.submodules.logarithm = logarithm = Logarithm(config)
        m.d.comb += logarithm.value.eq(total)
        level = Signal(signed(len(best) + 1))
        level_row = Signal(shapes.score)
        m.d.sync += level.eq(maxima_read.data + logarithm.result)
        m.d.comb += level_row.eq(Mux(nothing.bit_select(row, 1), 0, Mux(level > SCORE_MAX, SCORE_MAX, level)))

        # alpha, by slot and row.
        m.submodules.alphas = alphas = Memory(
            shape=shapes.alpha, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        alpha_write, alpha_read = alphas.write_port(domain="sync"), alphas.read_port(domain="comb")
        whole = Signal(config.jobs_in_flight)    # 1, whatever the memory says
        one = 1 << ALPHA_FRACTION
        dropped = VALUE_FRACTION - ALPHA_FRACTION
        rounded = Signal(len(total) - dropped + 1)
        m.d.sync += rounded.eq((total + (1 << (dropped - 1))) >> dropped)
        address = Signal(len(alpha_read.addr))
        m.d.comb += [
            alpha_write.addr.eq(Cat(row, job.slot)),
            alpha_write.data.eq(Mux(nothing.bit_select(row, 1) | (rounded > one), one, rounded)),
            alpha_read.addr.eq(address),
        ]
        m.d.sync += [
            address.eq(Cat(self.alpha_row, self.alpha_slot)),
            self.alpha.eq(Mux(whole.bit_select(address[shapes.row.width :], 1), one, alpha_read.data)),
        ]

        # Counts of one digit over all lanes: a tree of registered adders.
        counts: list[Value] = [self.count[i] for i in range(channels)]
        levels = ceil_log2(channels)
        for i in range(levels):
            pairs = []
            for j in range(0, len(counts), 2):
                pair = Signal(len(self.count[0]) + i + 1, name=f"count_{i}_{j // 2}")
                m.d.sync += pair.eq(sum(counts[j : j + 2]))
                pairs.append(pair)
            counts = pairs
        ask, answered = Signal(), Signal(2 + levels)
        digit = Signal(DIGIT_BITS)               # the one whose count is there
        bits = Signal(range(RANK_BITS + 1))      # of the rank that are decided
        prefix = Signal(RANK_BITS)
        wanted = Signal(max(len(job.units), len(counts[0])) + 1)    # units still to be found
        rest = Signal(signed(len(wanted) + 1))
        found, exact = Signal(), Signal()
        m.d.sync += [answered.eq(Cat(ask, answered)), self.bin.eq(self.bin - ask)]
        m.d.comb += [
            rest.eq(wanted - counts[0]),
            exact.eq(rest == 0),
            found.eq(answered[-1] & (exact | (rest < 0))),
        ]

        op = Signal(Sweep)
        m.d.comb += [
            self.sweep.slot.eq(job.slot),
            self.sweep.op.eq(op),
            self.sweep.bits.eq(bits),
            self.sweep.prefix.eq(prefix),
        ]

        # What the digit found says of the rank: the length's leading one and the zeros above it, or the next bits.
        bits_next, prefix_next = Signal.like(bits), Signal.like(prefix)
        with m.If(op == Sweep.MASS):
            m.d.comb += [
                bits_next.eq(MASS_BITS - digit + (digit != 0)),
                prefix_next.eq((1 << digit >> 1) << (RANK_BITS - MASS_BITS)),
            ]
            with m.If(digit == LENGTH_FORCED):
                m.d.comb += [bits_next.eq(MASS_BITS), prefix_next.eq(((1 << MASS_BITS) - 1) << (RANK_BITS - MASS_BITS))]
        with m.Else():
            m.d.comb += [
                bits_next.eq(Mux(bits > RANK_BITS - DIGIT_BITS, RANK_BITS, bits + DIGIT_BITS)),
                prefix_next.eq(prefix | (((digit << RANK_BITS) >> bits) >> DIGIT_BITS)),
            ]

        def collect_rows() -> None:
            """Go on with the rows' maxima or sums of all lanes."""
            m.d.sync += [row.eq(0), lane.eq(0)]
            m.next = "collect"

        def sweep(next_op: Sweep) -> None:
            """Go on with this sweep."""
            m.d.sync += op.eq(next_op)
            m.next = "sweep"

        swept_op = Signal(Sweep)    # the last sweep, none before the first: tells what is collected
        fresh = Signal()            # no sweep yet

        with m.FSM(name="state"):
            with m.State("take"):
                m.d.comb += self.jobs_i.ready.eq(1)
                m.d.sync += [
                    job.eq(self.jobs_i.payload),
                    last_row.eq(self.jobs_i.payload.rows - 1),
                    wanted.eq(self.jobs_i.payload.units),
                    bits.eq(0),
                    prefix.eq(0),
                    fresh.eq(1),
                    nothing.eq(0),
                ]
                with m.If(self.jobs_i.valid):
                    m.d.sync += whole.bit_select(self.jobs_i.payload.slot, 1).eq(1)
                    with m.If(self.jobs_i.payload.lanes & (self.jobs_i.payload.mode != Mode.DENSE)):
                        m.next = "wait"
                    with m.Else():
                        m.next = "hand"
            with m.State("wait"):
                m.d.comb += self.waiting.eq(1)
                with m.If(all_done.bit_select(job.slot, 1)):
                    with m.If(self.failed.bit_select(job.slot, 1)):
                        m.d.comb += self.select_valid.eq(1)
                        m.next = "hand"
                    with m.Else():
                        collect_rows()
            with m.State("collect"):
                m.d.sync += lane.eq(lane + 1)
                with m.If(collected):
                    m.d.sync += lane.eq(0)
                    with m.If(fresh):
                        m.next = "maximum"
                    with m.Elif(swept_op == Sweep.SUM):
                        m.next = "denominator"
                    with m.Else():
                        m.next = "alpha"
            with m.State("maximum"):
                m.d.comb += [maxima_write.en.eq(1), self.reference_write.eq(1)]
                m.d.sync += row.eq(row + 1)
                m.next = "collect"
                with m.If(row == last_row):
                    sweep(Sweep.SUM)
            with m.State("denominator"):
                m.d.comb += logarithm.start.eq(total != 0)
                m.next = "logarithm"
                with m.If(total == 0):
                    m.d.sync += nothing.bit_select(row, 1).eq(1)
                    m.next = "level"
            with m.State("logarithm"):
                with m.If(logarithm.done):
                    m.next = "level"
            with m.State("level"):
                m.next = "refer"    # `level` is being added
            with m.State("refer"):
                m.d.comb += [self.reference_write.eq(1), self.reference.eq(level_row)]
                m.d.sync += row.eq(row + 1)
                m.next = "collect"
                with m.If(row == last_row):
                    sweep(Sweep.MASS)
            with m.State("sweep"):
                m.d.comb += self.sweep_valid.eq(1)
                m.d.sync += [swept_op.eq(op), fresh.eq(0), answered.eq(0)]
                m.next = "begun"
            with m.State("begun"):
                m.next = "sweeping"    # `swept` is still of the cycle before the sweep
            with m.State("sweeping"):
                for register in (self.bin, digit):
                    m.d.sync += register.eq(Mux(op == Sweep.MASS, LENGTH_FORCED, (1 << DIGIT_BITS) - 1))
                with m.If(swept):
                    with m.Switch(op):
                        with m.Case(Sweep.SUM):
                            collect_rows()
                        with m.Case(Sweep.MARK):
                            m.d.comb += self.select_valid.eq(1)
                            with m.If(self.unmarked.any() & ~centroid):
                                m.d.sync += whole.bit_select(job.slot, 1).eq(0)
                                collect_rows()
                            with m.Else():
                                m.next = "hand"
                        with m.Default():
                            m.next = "count"
            with m.State("count"):
                m.d.comb += ask.eq(1)
                with m.If(answered[-1]):
                    m.d.sync += digit.eq(digit - 1)
                    with m.If(found):
                        m.d.sync += [bits.eq(bits_next), prefix.eq(prefix_next)]
                        with m.If((op == Sweep.MASS) & (digit == MASS_BITS)):
                            # Units that must be taken have this leading one too, and are counted again.
                            m.d.sync += wanted.eq(job.units)
                        with m.If(exact | (bits_next == RANK_BITS)):
                            sweep(Sweep.MARK)
                        with m.Else():
                            sweep(Sweep.DIGIT)
                    with m.Else():
                        m.d.sync += wanted.eq(rest)
                        with m.If(digit == 0):
                            sweep(Sweep.MARK)    # fewer units than are wanted: all of them
            with m.State("alpha"):
                # `rounded` follows `total` by a cycle, which `collect` has waited.
                m.d.comb += alpha_write.en.eq(1)
                m.d.sync += row.eq(row + 1)
                m.next = "collect"
                with m.If(row == last_row):
                    m.next = "hand"
            with m.State("hand"):
                m.d.comb += self.jobs_o.valid.eq(1)
                with m.If(self.jobs_o.ready):
                    m.next = "take"
        return m
