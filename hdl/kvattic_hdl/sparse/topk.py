"""Chooses each sparse job's units, over all lanes, between its first pass and its K pass."""

from dataclasses import dataclass
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
from kvattic_hdl.lib.logarithm import Logarithm
from kvattic_hdl.lib.shapes import LENGTH_FORCED, RANK_BITS, Shapes, Sweep


@dataclass(frozen=True)
class _Search:
    """The search for the digit at which enough units are found."""

    swept: Signal
    """All lanes have swept."""
    ask: Signal
    """Ask for the count of `bin`."""
    answered: Signal
    """The top bit: the count of `digit` is there, and so are:"""
    rest: Signal
    """Units wanted below this digit."""
    found: Signal
    """There are none: the rank is decided down to this digit."""
    exact: Signal
    """There are exactly none."""
    bits_next: Signal
    """Bits of the rank that are then decided."""
    prefix_next: Signal
    """They."""


class TopK(wiring.Component):
    """Sends the lanes' `LaneTopK`s through the scores of a job's first pass, and decides by what they find.

    The steps of a sparse job (docs/sparse.md): wait for the first pass in all lanes; each row's largest score; SUM,
    each row's denominator, and its log2; MASS, the units' ranks; a radix select from the highest digit down, exact,
    which ends as soon as a digit divides off the right number of units; MARK; `select_valid`; each row's alpha.  The
    first digit is the mass's length in bits, so that the next one begins where the masses in question do: most are far
    below 1, and 6 bits of a fixed place would tell nothing of them.

    Latency from the last `first_done` to `select_valid`, measured, 8 lanes of 512 tokens (sweeps: see `LaneTopK`):
    one row, SPARF, k a sixteenth of the tokens 2,433 cycles (two DIGIT sweeps, which is usual; the second one and any
    other goes through what the first has kept).  With eight rows SUM and MASS,
    a score a cycle, are 8,200 cycles.  Two lanes of 2,048 tokens, two in a step, take 4,578 for SPARF.  alpha is there
    lanes + 5 cycles a row after `select_valid`.
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
    first_done : In(ArrayLayout(jobs_in_flight, lanes))
        From the lanes: their first pass of the slot's job is over.
    first_slot, first_row : Out
        Address of the first pass's row maxima in all lanes.
    first_maximum : In(ArrayLayout(Shapes.score, lanes))
        Each lane's, two cycles later.
    sweep_valid, sweep : Out(1), Out(Shapes.sweep)
        Strobe, to all lanes.
    sweep_done : In(lanes)
        From the cycle after `sweep_valid`: the sweep's results can be read.
    reference_write, reference_row, reference : Out(1), Out(row), Out(Shapes.score)
        Strobe, to all lanes: what scores are compared with.  Rows come in ascending order, those of the job only.
    sum_row : Out(row)
    sum : In(ArrayLayout(Shapes.denominator, lanes))
        Each lane's sum of this row, two cycles later.
    bin : Out(DIGIT_BITS)
    count : In(ArrayLayout(Shapes.unit_count, lanes))
        Each lane's count of this digit, two cycles later.
    unmarked : In(lanes)
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
        lanes = config.lanes
        super().__init__({
            "jobs_i": In(stream.Signature(shapes.job)),
            "jobs_o": Out(stream.Signature(shapes.job)),
            "first_done": In(data.ArrayLayout(config.jobs_in_flight, lanes)),
            "first_slot": Out(shapes.slot),
            "first_row": Out(shapes.row),
            "first_maximum": In(data.ArrayLayout(shapes.score, lanes)),
            "sweep_valid": Out(1),
            "sweep": Out(shapes.sweep),
            "sweep_done": In(lanes),
            "reference_write": Out(1),
            "reference_row": Out(shapes.row),
            "reference": Out(shapes.score),
            "sum_row": Out(shapes.row),
            "sum": In(data.ArrayLayout(shapes.denominator, lanes)),
            "bin": Out(DIGIT_BITS),
            "count": In(data.ArrayLayout(shapes.unit_count, lanes)),
            "unmarked": In(lanes),
            "select_valid": Out(1),
            "select_slot": Out(shapes.slot),
            "failed": In(config.jobs_in_flight),
            "waiting": Out(1),
            "waiting_slot": Out(shapes.slot),
            "alpha_slot": In(shapes.slot),
            "alpha_row": In(shapes.row),
            "alpha": Out(shapes.alpha),
        })
        self._job = Signal(shapes.job, name="job")
        self._row, self._last_row = Signal(shapes.row, name="row"), Signal(shapes.row, name="last_row")
        self._best, self._total = Signal(shapes.score, name="best"), Signal(shapes.denominator, name="total")
        self._nothing = Signal(1 << shapes.row.width, name="nothing")  # rows of which no token has any weight
        self._keep_maximum, self._keep_alpha = Signal(name="keep_maximum"), Signal(name="keep_alpha")
        self._whole = Signal(config.jobs_in_flight, name="whole")  # slots whose alphas are 1
        self._op = Signal(Sweep, name="op")
        self._digit = Signal(DIGIT_BITS, name="digit")           # the one whose count is there
        self._bits = Signal(range(RANK_BITS + 1), name="bits")   # of the rank that are decided
        self._prefix = Signal(RANK_BITS, name="prefix")
        count_bits = shapes.unit_count.width + ceil_log2(lanes)
        units_bits = len(self._job.units)
        self._wanted = Signal(max(units_bits, count_bits) + 1, name="wanted")    # units still to be found

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        job = self._job
        m.d.comb += [
            self.jobs_o.payload.eq(job),
            *(slot.eq(job.slot) for slot in (self.first_slot, self.select_slot, self.waiting_slot)),
            *(row.eq(self._row) for row in (self.first_row, self.sum_row, self.reference_row)),
            self.sweep.slot.eq(job.slot),
            self.sweep.op.eq(self._op),
            self.sweep.bits.eq(self._bits),
            self.sweep.prefix.eq(self._prefix),
        ]
        lane, collected = self._collect(m)
        logarithm, level_row = self._refer(m)
        self._keep_alphas(m)
        search = self._search(m)
        all_done = Signal(self._config.jobs_in_flight)
        m.d.sync += all_done.eq(reduce(and_, (self.first_done[i] for i in range(self._config.lanes))))
        swept_op = Signal(Sweep)    # the last sweep, none before the first: tells what is collected
        unswept = Signal()          # no sweep yet

        with m.FSM(name="state"):
            self._take_jobs(m, all_done, lane, unswept)
            with m.State("collect"):
                m.d.sync += lane.eq(lane + 1)
                with m.If(collected):
                    m.d.sync += lane.eq(0)
                    with m.If(unswept):
                        m.next = "maximum"
                    with m.Elif(swept_op == Sweep.SUM):
                        m.next = "denominator"
                    with m.Else():
                        m.next = "alpha"
            with m.State("maximum"):
                m.d.comb += [self._keep_maximum.eq(1), self.reference_write.eq(1)]
                self._next_row(m)
                with m.If(self._row == self._last_row):
                    self._begin_sweep(m, Sweep.SUM)
            with m.State("denominator"):
                m.d.comb += logarithm.start.eq(self._total != 0)
                m.next = "logarithm"
                with m.If(self._total == 0):
                    m.d.sync += self._nothing.bit_select(self._row, 1).eq(1)
                    m.next = "level"
            with m.State("logarithm"):
                with m.If(logarithm.done):
                    m.next = "level"
            with m.State("level"):
                m.next = "refer"    # `level` is being added
            with m.State("refer"):
                m.d.comb += [self.reference_write.eq(1), self.reference.eq(level_row)]
                self._next_row(m)
                with m.If(self._row == self._last_row):
                    self._begin_sweep(m, Sweep.MASS)
            self._sweep(m, search, lane, swept_op, unswept)
            with m.State("alpha"):
                # What is kept follows `total` by a cycle, which `collect` has waited.
                m.d.comb += self._keep_alpha.eq(1)
                self._next_row(m)
                with m.If(self._row == self._last_row):
                    m.next = "hand"
            with m.State("hand"):
                m.d.comb += self.jobs_o.valid.eq(1)
                with m.If(self.jobs_o.ready):
                    m.next = "take"
        return m

    # ---- what the states share

    def _next_row(self, m: Module) -> None:
        """Goes on with the next row."""
        m.d.sync += self._row.eq(self._row + 1)
        m.next = "collect"

    def _collect_rows(self, m: Module, lane: Signal) -> None:
        """Goes on with the rows' maxima or sums of all lanes."""
        m.d.sync += [self._row.eq(0), lane.eq(0)]
        m.next = "collect"

    def _begin_sweep(self, m: Module, op: Sweep) -> None:
        """Goes on with this sweep."""
        m.d.sync += self._op.eq(op)
        m.next = "sweep"

    # ---- the states

    def _take_jobs(self, m: Module, all_done: Signal, lane: Signal, unswept: Signal) -> None:
        """States: take a job, wait for its first pass."""
        job, given = self._job, self.jobs_i.payload
        with m.State("take"):
            m.d.comb += self.jobs_i.ready.eq(1)
            m.d.sync += [
                job.eq(given),
                self._last_row.eq(given.rows - 1),
                self._wanted.eq(given.units),
                self._bits.eq(0),
                self._prefix.eq(0),
                unswept.eq(1),
                self._nothing.eq(0),
            ]
            with m.If(self.jobs_i.valid):
                m.d.sync += self._whole.bit_select(given.slot, 1).eq(1)
                with m.If(given.lanes & (given.mode != Mode.DENSE)):
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
                    self._collect_rows(m, lane)

    def _sweep(self, m: Module, search: _Search, lane: Signal, swept_op: Signal, unswept: Signal) -> None:
        """States: sweep, and see what comes of it."""
        op, job = self._op, self._job
        with m.State("sweep"):
            m.d.comb += self.sweep_valid.eq(1)
            m.d.sync += [swept_op.eq(op), unswept.eq(0), search.answered.eq(0)]
            m.next = "begun"
        with m.State("begun"):
            m.next = "sweeping"    # `swept` is still of the cycle before the sweep
        with m.State("sweeping"):
            for register in (self.bin, self._digit):
                m.d.sync += register.eq(Mux(op == Sweep.MASS, LENGTH_FORCED, (1 << DIGIT_BITS) - 1))
            with m.If(search.swept):
                with m.Switch(op):
                    with m.Case(Sweep.SUM):
                        self._collect_rows(m, lane)
                    with m.Case(Sweep.MARK):
                        m.d.comb += self.select_valid.eq(1)
                        with m.If(self.unmarked.any() & (job.mode != Mode.CENTROID)):
                            m.d.sync += self._whole.bit_select(job.slot, 1).eq(0)
                            self._collect_rows(m, lane)
                        with m.Else():
                            m.next = "hand"
                    with m.Default():
                        m.next = "count"
        with m.State("count"):
            m.d.comb += search.ask.eq(1)
            with m.If(search.answered[-1]):
                m.d.sync += self._digit.eq(self._digit - 1)
                with m.If(search.found):
                    m.d.sync += [self._bits.eq(search.bits_next), self._prefix.eq(search.prefix_next)]
                    with m.If((op == Sweep.MASS) & (self._digit == MASS_BITS)):
                        # Units that must be taken have this leading one too, and are counted again.
                        m.d.sync += self._wanted.eq(job.units)
                    with m.If(search.exact | (search.bits_next == RANK_BITS)):
                        self._begin_sweep(m, Sweep.MARK)
                    with m.Else():
                        self._begin_sweep(m, Sweep.DIGIT)
                with m.Else():
                    m.d.sync += self._wanted.eq(search.rest)
                    with m.If(self._digit == 0):
                        self._begin_sweep(m, Sweep.MARK)    # fewer units than are wanted: all of them

    # ---- the data path

    def _collect(self, m: Module) -> tuple[Signal, Value]:
        """A row of all lanes, one lane after the other: its largest maximum, the sum of its sums.

        Returns:
            (lane, collected): two cycles ahead of the lane that is chosen; the row is done.
        """
        shapes, lanes = self._shapes, self._config.lanes
        lane = Signal(range(lanes + 4))
        chosen_maximum, chosen_sum = Signal(shapes.score), Signal(shapes.denominator)
        choose = (lane - 2)[: shapes.lane.width]
        collected = lane == lanes + 3
        m.d.sync += [
            chosen_maximum.eq(Array(self.first_maximum)[choose]),
            chosen_sum.eq(Array(self.sum)[choose]),
        ]
        with m.If(~collected):
            m.d.sync += self._total.eq(Mux(lane == 3, 0, self._total) + chosen_sum)
            with m.If((lane == 3) | (chosen_maximum > self._best)):
                m.d.sync += self._best.eq(chosen_maximum)
        return lane, collected

    def _refer(self, m: Module) -> tuple[Logarithm, Signal]:
        """What scores are compared with: the row's largest one, then (the logarithm, the level of) its denominator."""
        shapes, row = self._shapes, self._row
        m.submodules.maxima = maxima = Memory(
            shape=shapes.score, depth=1 << shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        maxima_write, maxima_read = maxima.write_port(domain="sync"), maxima.read_port(domain="comb")
        m.submodules.logarithm = logarithm = Logarithm(self._config)
        level = Signal(signed(len(self._best) + 1))
        level_row = Signal(shapes.score)
        m.d.sync += level.eq(maxima_read.data + logarithm.result)
        m.d.comb += [
            maxima_write.addr.eq(row),
            maxima_write.data.eq(self._best),
            maxima_write.en.eq(self._keep_maximum),
            maxima_read.addr.eq(row),
            self.reference.eq(self._best),
            logarithm.value.eq(self._total),
            level_row.eq(Mux(self._nothing.bit_select(row, 1), 0, Mux(level > SCORE_MAX, SCORE_MAX, level))),
        ]
        return logarithm, level_row

    def _keep_alphas(self, m: Module) -> None:
        """alpha, by slot and row; 1 of the slots in `_whole`, whatever the memory says."""
        shapes, total = self._shapes, self._total
        m.submodules.alphas = alphas = Memory(
            shape=shapes.alpha, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        alpha_write, alpha_read = alphas.write_port(domain="sync"), alphas.read_port(domain="comb")
        one = 1 << ALPHA_FRACTION
        dropped = VALUE_FRACTION - ALPHA_FRACTION
        rounded = Signal(len(total) - dropped + 1)
        address = Signal(len(alpha_read.addr))
        m.d.comb += [
            alpha_write.addr.eq(Cat(self._row, self._job.slot)),
            alpha_write.data.eq(Mux(self._nothing.bit_select(self._row, 1) | (rounded > one), one, rounded)),
            alpha_write.en.eq(self._keep_alpha),
            alpha_read.addr.eq(address),
        ]
        m.d.sync += [
            rounded.eq((total + (1 << (dropped - 1))) >> dropped),
            address.eq(Cat(self.alpha_row, self.alpha_slot)),
            self.alpha.eq(Mux(self._whole.bit_select(address[shapes.row.width :], 1), one, alpha_read.data)),
        ]

    def _search(self, m: Module) -> _Search:
        """Asks for the counts of digits, from the largest down, and compares them with the units wanted."""
        counts = self._count(m)
        search = _Search(
            swept=Signal(name="swept"),
            ask=Signal(name="ask"),
            answered=Signal(2 + ceil_log2(self._config.lanes), name="answered"),
            rest=Signal(signed(len(self._wanted) + 1), name="rest"),
            found=Signal(name="found"),
            exact=Signal(name="exact"),
            bits_next=Signal.like(self._bits, name="bits_next"),
            prefix_next=Signal.like(self._prefix, name="prefix_next"),
        )
        m.d.sync += [
            search.swept.eq(self.sweep_done.all()),
            search.answered.eq(Cat(search.ask, search.answered)),
            self.bin.eq(self.bin - search.ask),
        ]
        m.d.comb += [
            search.rest.eq(self._wanted - counts),
            search.exact.eq(search.rest == 0),
            search.found.eq(search.answered[-1] & (search.exact | (search.rest < 0))),
        ]
        self._narrow(m, search.bits_next, search.prefix_next)
        return search

    def _count(self, m: Module) -> Value:
        """Counts of one digit over all lanes: a tree of registered adders."""
        counts: list[Value] = [self.count[i] for i in range(self._config.lanes)]
        for level in range(ceil_log2(len(counts))):
            pairs = []
            for j in range(0, len(counts), 2):
                pair = Signal(len(self.count[0]) + level + 1, name=f"count_{level}_{j // 2}")
                m.d.sync += pair.eq(sum(counts[j : j + 2]))
                pairs.append(pair)
            counts = pairs
        return counts[0]

    def _narrow(self, m: Module, bits_next: Signal, prefix_next: Signal) -> None:
        """What the digit found says of the rank: the length's leading one and the zeros above it, or the next bits."""
        digit, bits = self._digit, self._bits
        with m.If(self._op == Sweep.MASS):
            m.d.comb += [
                bits_next.eq(MASS_BITS - digit + (digit != 0)),
                prefix_next.eq((1 << digit >> 1) << (RANK_BITS - MASS_BITS)),
            ]
            with m.If(digit == LENGTH_FORCED):
                m.d.comb += [bits_next.eq(MASS_BITS), prefix_next.eq(((1 << MASS_BITS) - 1) << (RANK_BITS - MASS_BITS))]
        with m.Else():
            m.d.comb += [
                bits_next.eq(Mux(bits > RANK_BITS - DIGIT_BITS, RANK_BITS, bits + DIGIT_BITS)),
                prefix_next.eq(self._prefix | (((digit << RANK_BITS) >> bits) >> DIGIT_BITS)),
            ]
