"""From an arrived codeword of V to the weights of its tokens, one row after the other."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_BITS, SCORE_MASKED
from kvattic_hdl.lib.exponential import Exponential, in_window
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.lib.stream_buffer import Queue


def row_shape(config: Config) -> data.StructLayout:
    """Whose a weight is: row, slot."""
    shapes = Shapes(config)
    return data.StructLayout({"row": shapes.row, "slot": shapes.slot})


class Denominators(wiring.Component):
    """Sums the weights of each row of each slot: read and add in one cycle, write in the next.

    A row may come every other cycle.  Row records come before a job's weights, so that reset need not clear the sums.

    Parameters
    ----------
    config : Config

    Members
    -------
    valid : In(1), whose : In(`row_shape`), two cycles before `addend`
        There is a weight.
    addend : In(denominator)
    load_valid, load : In
        A row record resets the row's sum.
    denominator_slot, denominator_row : In
    denominator : Out(denominator), two cycles after the address
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "valid": In(1),
            "whose": In(row_shape(config)),
            "addend": In(shapes.denominator),
            "load_valid": In(1),
            "load": In(shapes.load),
            "denominator_slot": In(shapes.slot),
            "denominator_row": In(shapes.row),
            "denominator": Out(shapes.denominator),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes, row = self.shapes, row_shape(self.config)
        m.submodules.sums = sums = Memory(
            shape=shapes.denominator, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        old, seen = sums.read_port(domain="comb"), sums.read_port(domain="comb")
        write = sums.write_port(domain="sync")
        total = Signal(shapes.denominator)
        whose_1, whose_2, whose_3 = (Signal(row, name=f"whose_{i}") for i in (1, 2, 3))
        valid_1, valid_2, valid_3 = (Signal(name=f"valid_{i}") for i in (1, 2, 3))
        none_yet, first = Signal(shapes.row_words), Signal()   # first: of whose_2's row
        address = Signal(unsigned(row.size))
        m.d.comb += [
            old.addr.eq(whose_2.as_value()),
            write.addr.eq(whose_3.as_value()),
            write.data.eq(total),
            write.en.eq(valid_3),
            seen.addr.eq(address),
        ]
        m.d.sync += [
            whose_1.eq(self.whose),
            valid_1.eq(self.valid),
            whose_2.eq(whose_1),
            valid_2.eq(valid_1),
            # The row's weight before it may be on its way to `none_yet`.
            first.eq(none_yet.bit_select(whose_1.as_value(), 1) & ~(valid_3 & (whose_3 == whose_1))),
            total.eq(Mux(first, 0, old.data) + self.addend),
            whose_3.eq(whose_2),
            valid_3.eq(valid_2),
            address.eq(Cat(self.denominator_row, self.denominator_slot)),
            self.denominator.eq(Mux(none_yet.bit_select(address, 1), 0, seen.data)),
        ]
        with m.If(valid_3):
            m.d.sync += none_yet.bit_select(whose_3.as_value(), 1).eq(0)
        with m.If(self.load_valid & self.load.record):
            m.d.sync += none_yet.bit_select(Cat(self.load.row, self.load.slot), 1).eq(1)
        return m


class WeightUnit(wiring.Component):
    """Reads the scores of each V codeword's tokens and makes their weights, ahead of the codeword's beats.

    Keeps the final maxima (given back by the Maximum block) and adds each weight to its row's denominator.  Weights
    leave in the order of the requests, tokens in order, rows in order; one each cycle (every other cycle when there is
    one row), after about `Exponential.LATENCY + 6` cycles.

    Parameters
    ----------
    config : Config
    depth : int
        Requests that can wait.

    Members
    -------
    requests : In(stream of slot, ring)
        Codewords of V in the order of their arrival.
    score_address : Out
        Read address of the score memory: Cat(row, index, ring).
    score_ask : Out(1)
        `score_address` counts in this cycle.
    score : In(score), two cycles after the address
    weights : Out(stream of weight)
    maximum_slot, maximum_row, maximum_write, maximum_new : In
        Writes a final maximum.
    load_valid, load : In
        A row record resets the row's denominator.
    denominator_slot, denominator_row : In
    denominator : Out(denominator), two cycles after the address
    """

    def __init__(self, config: Config, depth: int) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self._depth = depth
        self.request = data.StructLayout({"slot": shapes.slot, "ring": shapes.ring})
        self.exponential = Exponential()
        self.denominators = Denominators(config)
        self.latency = 3 + Exponential.LATENCY   # from a token's row to its weight
        self.weights_buffered = max(16, 1 << (self.latency + 2 * config.rows - 1).bit_length())
        self.address_bits = (shapes.score_words - 1).bit_length()
        super().__init__({
            "requests": In(stream.Signature(self.request)),
            "score_address": Out(self.address_bits),
            "score_ask": Out(1),
            "score": In(shapes.score),
            "weights": Out(stream.Signature(shapes.weight)),
            "maximum_slot": In(shapes.slot),
            "maximum_row": In(shapes.row),
            "maximum_write": In(1),
            "maximum_new": In(shapes.score),
            "load_valid": In(1),
            "load": In(shapes.load),
            "denominator_slot": In(shapes.slot),
            "denominator_row": In(shapes.row),
            "denominator": Out(shapes.denominator),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.exponential = self.exponential
        m.submodules.denominators = self.denominators
        enter, whose = Signal(), Signal(row_shape(self.config))
        self._enter(m, enter, whose)

        # What accompanies a score on its way.
        rows: list[Any] = [Signal(whose.shape(), name=f"whose_{i}") for i in range(1, self.latency + 1)]
        valids = Signal(self.latency)
        m.d.sync += [rows[0].eq(whose), valids.eq(Cat(enter, valids))]
        m.d.sync += [b.eq(a) for a, b in zip(rows, rows[1:], strict=False)]
        self._compare(m, rows[0])
        self._deliver(m, valids[-1], rows[-1])
        return m

    def _enter(self, m: Module, enter: Signal, whose: Any) -> None:
        """Let one row of one token enter each cycle, as long as the FIFO will have room for it."""
        config, shapes = self.config, self.shapes
        m.submodules.queue = queue = SyncFIFOBuffered(width=self.request.size, depth=self._depth)
        request = data.View(self.request, queue.r_data)
        index, row = Signal(shapes.lane_token["index"].shape), Signal(shapes.row)
        room = Signal(range(self.weights_buffered + 1), init=self.weights_buffered)
        has_room = Signal(init=1)   # for one more, whatever enters in this cycle
        pause, taken = Signal(), Signal()
        m.d.comb += [
            queue.w_data.eq(self.requests.payload),
            queue.w_en.eq(self.requests.valid),
            self.requests.ready.eq(queue.w_rdy),
            enter.eq(queue.r_rdy & has_room & ~pause),
            taken.eq(self.weights.valid & self.weights.ready),
            whose.row.eq(row),
            whose.slot.eq(request.slot),
            self.score_ask.eq(enter),
            self.score_address.eq(Cat(
                row[: shapes.row.width if config.rows > 1 else 0],
                index[: config.slot_bits_per_codeword], request.ring)),
        ]
        if config.rows == 1:
            m.d.sync += pause.eq(enter)   # the denominator's update takes two cycles
        with m.If(enter):
            m.d.sync += row.eq(row + 1)
            with m.If(row == config.rows - 1):
                m.d.sync += [row.eq(0), index.eq(index + 1)]
                with m.If(index == config.tokens_per_codeword - 1):
                    m.d.sync += index.eq(0)
                    m.d.comb += queue.r_en.eq(1)
        m.d.sync += [room.eq(room - enter + taken), has_room.eq((room > 1) | taken)]

    def _compare(self, m: Module, whose: Any) -> None:
        """Cycle 2: the score, and its row's final maximum.  Cycle 3: their difference."""
        m.submodules.maxima = maxima = Memory(
            shape=self.shapes.score, depth=self.shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        write, read = maxima.write_port(domain="sync"), maxima.read_port(domain="comb")
        maximum = Signal(self.shapes.score)
        distance = Signal(signed(SCORE_BITS + 1))
        masked = Signal()
        m.d.comb += [
            write.addr.eq(Cat(self.maximum_row, self.maximum_slot)),
            write.en.eq(self.maximum_write),
            write.data.eq(self.maximum_new),
            read.addr.eq(whose.as_value()),
            self.exponential.distance.eq(distance),
            self.exponential.masked.eq(masked),
        ]
        m.d.sync += [
            maximum.eq(read.data),
            distance.eq(self.score - maximum),
            masked.eq(self.score == SCORE_MASKED),
        ]

    def _deliver(self, m: Module, valid: Value, whose: Any) -> None:
        """Hand the weight on, and add it to its row's denominator."""
        exponential, sums = self.exponential, self.denominators
        m.submodules.fifo = fifo = Queue(self.shapes.weight, self.weights_buffered)
        connect(m, fifo.o, flipped(self.weights))
        m.d.comb += [
            fifo.i.payload.significand.eq(exponential.significand),
            fifo.i.payload.exponent.eq(exponential.exponent),
            fifo.i.valid.eq(valid),
            sums.valid.eq(valid),
            sums.whose.eq(whose),
            sums.addend.eq(in_window(m, exponential)),
            sums.load_valid.eq(self.load_valid),
            sums.load.eq(self.load),
            sums.denominator_slot.eq(self.denominator_slot),
            sums.denominator_row.eq(self.denominator_row),
            self.denominator.eq(sums.denominator),
        ]
