"""Gathers what the lanes keep of a job: its denominators, its maxima and their reports."""

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import CompletionFlag
from kvattic.spec.config import Config
from kvattic_hdl.lib.divider import Normaliser, Reciprocal, divisor
from kvattic_hdl.lib.shapes import FAULTS, Shapes

LANE_FLAGS = tuple(flag.name.lower() for flag in CompletionFlag)
"""Flags that lanes report."""


def fault_order(report: Signal | data.View) -> Value:
    """A number that is the less the sooner this fault is reported."""
    return Cat(report.token, report.fault)


def trailer_layout(config: Config) -> data.StructLayout:
    """What is kept of a row for its trailer: the maximum and the sum of the denominators."""
    shapes = Shapes(config)
    return data.StructLayout({"maximum": shapes.score, "denominator": shapes.denominator})


class Gather(wiring.Component):
    """Sums a job's denominators over the lanes, combines their reports and keeps each row's trailer.

    Latency: ``rows * (lanes + 5)`` cycles from `begin` to `done`, or ``rows * Reciprocal.LATENCY`` where that is
    more, and then the cycles of `Normaliser` and `Reciprocal`, which work beside the sums, for one row.
    Throughput: one job at a time.  Ordering: rows ascend.  Reset: nothing is gathered.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    begin : In(1)
        Strobe: gather `job`, which is stable until the next `begin`.
    job : In(Shapes.job)
        The job.
    half : In(1)
        Half of the trailers that the job's are kept in.
    row : Out(Shapes.row)
        Row whose `denominators` and `final` are read; they come two cycles later, as do `reports`.
    denominators : In(ArrayLayout(Shapes.denominator, lanes))
        Denominator of each lane.
    final : In(Shapes.score)
        Maximum over all lanes.
    reports : In(ArrayLayout(Shapes.report, lanes))
        Report of each lane.
    kept : Out(1)
        High while what belongs to `row` is being kept.
    done : Out(1)
        All rows are gathered; read only after `begin`.
    report : Out(Shapes.report)
        The reports combined, once `done`.
    divisor_row, divisor : In, Out
        A row of the job, and its denominator one cycle later, normalised and with its reciprocal.
    trailer_address, trailer : In, Out
        Cat(row, half), and that row's trailer one cycle later.
    """

    begin: Signal
    job: data.View
    half: Signal
    row: Signal
    denominators: data.View
    final: Signal
    reports: data.View
    kept: Signal
    done: Signal
    report: data.View
    divisor_row: Signal
    divisor: data.View
    trailer_address: Signal
    trailer: data.View

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        self._row_bits = ceil_log2(config.rows)
        super().__init__({
            "begin": In(1),
            "job": In(shapes.job),
            "half": In(1),
            "row": Out(shapes.row),
            "denominators": In(data.ArrayLayout(shapes.denominator, config.lanes)),
            "final": In(shapes.score),
            "reports": In(data.ArrayLayout(shapes.report, config.lanes)),
            "kept": Out(1),
            "done": Out(1),
            "report": Out(shapes.report),
            "divisor_row": In(shapes.row),
            "divisor": Out(divisor(config.denominator_bits)),
            "trailer_address": In(self._row_bits + 1),
            "trailer": Out(trailer_layout(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lane = Signal(self._shapes.lane)
        choosing = Signal()
        total, report = self._combine(m, lane, choosing)
        taken = self._keep(m, total)

        with m.FSM(name="gather"):
            with m.State("IDLE"):
                m.d.sync += [self.row.eq(0), lane.eq(0), total.eq(0)]
                with m.If(self.begin):
                    m.d.sync += [report.fault.eq(len(FAULTS)), *(report[name].eq(0) for name in LANE_FLAGS)]
                    m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.next = "READ"
            with m.State("READ"):
                m.next = "CHOOSE"
            with m.State("CHOOSE"):
                m.d.comb += choosing.eq(1)
                m.d.sync += lane.eq(lane + 1)
                with m.If(lane == self._config.lanes - 1):
                    m.next = "ADD"
            with m.State("ADD"):
                m.next = "KEEP"
            with m.State("KEEP"):
                m.d.comb += self.kept.eq(1)
                with m.If(taken):
                    m.d.sync += [self.row.eq(self.row + 1), lane.eq(0), total.eq(0)]
                    with m.If(self.row == (self.job.rows - 1)[: len(self.row)]):
                        m.next = "IDLE"
                    with m.Else():
                        m.next = "ADDRESS"
        return m

    def _combine(self, m: Module, lane: Signal, choosing: Signal) -> tuple[Signal, data.View]:
        """The denominators of the lanes chosen, summed, and their reports, combined."""
        shapes = self._shapes
        # A lane's values are registered behind the multiplexer, and combined in the cycle after.
        chosen = Signal(shapes.denominator, reset_less=True)
        chosen_report = Signal(shapes.report, reset_less=True)
        chosen_valid = Signal()
        total = Signal(shapes.denominator, reset_less=True)
        report = Signal(shapes.report, reset_less=True)
        m.d.comb += self.report.eq(report)
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
        return total, report

    def _keep(self, m: Module, total: Signal) -> Signal:
        """Normalises and keeps what belongs to a row while `kept`; whether it is taken in this cycle."""
        config, job = self._config, self.job
        m.submodules.normaliser = normaliser = Normaliser(config.denominator_bits)
        m.submodules.reciprocal = reciprocal = Reciprocal(config.denominator_bits)
        m.submodules.denominators = denominators = Memory(
            shape=divisor(config.denominator_bits), depth=2**self._row_bits, init=[])
        m.submodules.trailers = trailers = Memory(
            shape=trailer_layout(config), depth=2 << self._row_bits, init=[])
        denominators_write, denominators_read = denominators.write_port(), denominators.read_port()
        trailers_write, trailers_read = trailers.write_port(), trailers.read_port()
        divisors = Signal(range(config.rows + 1))   # rows that can be divided by
        wiring.connect(m, normaliser.o, reciprocal.i)
        m.d.comb += [
            normaliser.i.payload.eq(total),
            normaliser.i.valid.eq(self.kept),
            reciprocal.o.ready.eq(1),
            denominators_write.addr.eq(divisors),
            denominators_write.data.eq(reciprocal.o.payload),
            denominators_write.en.eq(reciprocal.o.valid),
            denominators_read.addr.eq(self.divisor_row),
            self.divisor.eq(denominators_read.data),
            trailers_write.addr.eq(Cat(self.row[: self._row_bits], self.half)),
            trailers_write.data.maximum.eq(self.final),
            trailers_write.data.denominator.eq(total),
            trailers_write.en.eq(self.kept),
            trailers_read.addr.eq(self.trailer_address),
            self.trailer.eq(trailers_read.data),
            self.done.eq(divisors == job.rows),
        ]
        with m.If(reciprocal.o.valid):
            m.d.sync += divisors.eq(divisors + 1)
        with m.If(self.begin):
            m.d.sync += divisors.eq(0)
        return normaliser.i.ready
