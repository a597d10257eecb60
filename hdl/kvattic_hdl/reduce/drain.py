"""Drains the lanes' accumulators through their chain and divides them by their row's denominator."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import pick
from kvattic_hdl.lib.divider import Divider, divisor
from kvattic_hdl.lib.shapes import Shapes

QUARTER = 4
"""Elements of which one is chosen in a step."""


def result_place(config: Config) -> data.StructLayout:
    """Where a number belongs in a job's results; `last` with the last one that comes."""
    return data.StructLayout(
        {"element": unsigned(ceil_log2(config.head_dim)), "row": unsigned(ceil_log2(config.rows)), "last": 1})


def quotient_layout(config: Config) -> data.StructLayout:
    """A number of a job's results: bits of an fp32, and its place."""
    return data.StructLayout({"result": 32, "place": result_place(config)})


class Drain(wiring.Component):
    """Asks the lanes' chain for a job's accumulators and divides what comes, an element every second cycle.

    Latency: from an element's turn to its quotient ``2 + Divider.LATENCY`` cycles.  Throughput: an element every second
    cycle; one job at a time.  Ordering: beat by beat, copies of a beat in a row, rows of a word, elements of a row.
    Reset: nothing is drained.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    begin : In(1)
        Strobe: drain `job`, which is stable until the next `begin`.
    job : In(Shapes.job)
        The job.
    gathered : In(1)
        All its denominators can be read.
    chain_head : Out(stream.Signature(Shapes.partial))
        To the first lane: one word for each of the slot's accumulator words, data zero.
    chain_tail : In(stream.Signature(Shapes.partial))
        From the last lane: the same words with the sums over all lanes.
    divisor_row, divisor : Out(Shapes.row), In(divisor(denominator_bits))
        A row, and its denominator one cycle later.
    drained : Out(1)
        Strobe: the last accumulators are taken.
    o : Out(stream.Signature(quotient_layout, always_ready=True))
        The quotients.
    """

    begin: Signal
    job: data.View
    gathered: Signal
    chain_head: stream.Interface
    chain_tail: stream.Interface
    divisor_row: Signal
    divisor: data.View
    drained: Signal
    o: stream.Interface

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        self._position = data.StructLayout({
            "row": shapes.row, "beat": shapes.beat_index, "copy": range(shapes.copies), "last": 1})
        super().__init__({
            "begin": In(1),
            "job": In(shapes.job),
            "gathered": In(1),
            "chain_head": Out(stream.Signature(shapes.partial)),
            "chain_tail": In(stream.Signature(shapes.partial)),
            "divisor_row": Out(shapes.row),
            "divisor": In(divisor(config.denominator_bits)),
            "drained": Out(1),
            "o": Out(stream.Signature(quotient_layout(config), always_ready=True)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        place = result_place(self._config)
        m.submodules.divider = divider = Divider(
            self._config.accumulator_bits, self._config.denominator_bits, place,
            steady=self._config.rows == 1)   # one denominator for all of a job
        self._ask(m)
        # An element is chosen in the cycle before the divider takes it.
        self._divide(m, divider, *self._take(m, ~divider.i.ready))
        return m

    def _ask(self, m: Module) -> None:
        """Words for the head of the chain: copy c of beat b is at c * copy_words + b, copies of a beat in a row."""
        shapes, beats = self._shapes, self._config.beats_per_token
        asking = Signal()
        ask_beat = Signal(shapes.beat_index)
        ask_copy = Signal(range(shapes.copies))
        address = Signal(shapes.drain_address)
        m.d.comb += [
            self.chain_head.valid.eq(asking),
            self.chain_head.payload.slot.eq(self.job.slot),
            self.chain_head.payload.address.eq(address),
        ]
        with m.If(self.begin):
            m.d.sync += [asking.eq(1), ask_beat.eq(0), ask_copy.eq(0), address.eq(0)]
        with m.Elif(asking & self.chain_head.ready):
            with m.If(ask_copy == shapes.copies - 1):
                m.d.sync += [ask_copy.eq(0), ask_beat.eq(ask_beat + 1), address.eq(ask_beat + 1)]
                with m.If(ask_beat == beats - 1):
                    m.d.sync += asking.eq(0)
            with m.Else():
                m.d.sync += [ask_copy.eq(ask_copy + 1), address.eq(address + shapes.copy_words)]

    def _take(self, m: Module, step: Value) -> tuple[Signal, data.View, Signal, Signal]:
        """Takes one row of a word at a time: (valid, its position, its elements, number of the element in turn).

        Elements go in cycles of `step`.
        """
        config, shapes, tail = self._config, self._shapes, self.chain_tail
        elements = config.elements_per_beat
        last_row = Signal(shapes.row)
        incoming = Signal(self._position)
        current = Signal(self._position, reset_less=True)
        current_valid = Signal()
        current_data = Signal(data.ArrayLayout(shapes.accumulator, elements), reset_less=True)
        element = Signal(range(elements))
        take = Signal()
        word_taken = Signal()
        m.d.comb += [
            last_row.eq(self.job.rows - 1),
            take.eq(tail.valid & self.gathered & step & (~current_valid | (element == elements - 1))),
            word_taken.eq(take & (incoming.row == last_row)),
            tail.ready.eq(word_taken),
            incoming.last.eq(
                (incoming.row == last_row)
                & (incoming.beat == config.beats_per_token - 1)
                & (incoming.copy == shapes.copies - 1)
            ),
            self.drained.eq(take & incoming.last),
        ]
        with m.If(self.begin):
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
        with m.Elif(step & (element == elements - 1)):
            m.d.sync += current_valid.eq(0)
        with m.If(step & current_valid):
            m.d.sync += element.eq(element + 1)  # elements is a power of two
        return current_valid, current, current_data, element

    def _divide(self, m: Module, divider: Divider, current_valid: Signal, current: data.View, current_data: Signal,
                element: Signal) -> None:
        """Registers the element in turn and its row's denominator, and divides them."""
        config, shapes = self._config, self._shapes
        place = result_place(config)
        # One of each four in the cycle between, then one of these: in one step it would take half as many LUTs more.
        quarters = [Signal(shapes.accumulator, name=f"quarter_{i}", reset_less=True)
                    for i in range(-(-config.elements_per_beat // QUARTER))]
        chosen_element = Signal(shapes.accumulator, reset_less=True)
        m.d.sync += [
            quarter.eq(pick(current_data[i * QUARTER : (i + 1) * QUARTER], element[: QUARTER.bit_length() - 1]))
            for i, quarter in enumerate(quarters)]
        chosen_place = Signal(place, reset_less=True)
        element_valid = Signal()
        element_copy = Signal(range(shapes.copies), reset_less=True)
        with m.If(~divider.i.ready):
            m.d.sync += [
                chosen_element.eq(pick(quarters, element[QUARTER.bit_length() - 1 :])),
                chosen_place.element.eq(Cat(element, current.beat)),
                chosen_place.row.eq(current.row),
                chosen_place.last.eq(current.last & (element == config.elements_per_beat - 1)),
                element_valid.eq(current_valid),
                element_copy.eq(current.copy),
            ]
        m.d.comb += [
            self.divisor_row.eq(current.row),
            divider.i.payload.denominator.eq(self.divisor),
            divider.i.payload.tag.eq(chosen_place),
            self.o.valid.eq(divider.o.valid),
            self.o.payload.result.eq(divider.o.payload.quotient),
            self.o.payload.place.eq(divider.o.payload.tag),
        ]
        if shapes.copies == 1:
            m.d.comb += [divider.i.valid.eq(element_valid), divider.i.payload.numerator.eq(chosen_element)]
            return
        # Few geometries have copies: they are summed one element at a time.  The same element comes again after
        # `elements_per_beat` cycles or more, long after it is written.
        element_bits, row_bits = len(element), ceil_log2(config.rows)
        m.submodules.sums = sums = Memory(
            shape=shapes.accumulator, depth=config.elements_per_beat << row_bits, init=[])
        sums_write, sums_read = sums.write_port(), sums.read_port()
        summed = Signal(shapes.accumulator)
        m.d.comb += [
            sums_read.addr.eq(Cat(element, current.row)),
            summed.eq(chosen_element + Mux(element_copy == 0, 0, sums_read.data)),
            sums_write.addr.eq(Cat(chosen_place.element[:element_bits], chosen_place.row)),
            sums_write.data.eq(summed),
            sums_write.en.eq(element_valid & divider.i.ready),
            divider.i.valid.eq(element_valid & (element_copy == shapes.copies - 1)),
            divider.i.payload.numerator.eq(summed),
        ]
