"""From a codeword of V at the door to the weights of its tokens, one row after the other."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_BITS, SCORE_MASKED
from kvattic_hdl.lib.exponential import Exponential, in_window
from kvattic_hdl.lib.interfaces import Shapes


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
        config, shapes = self.config, self.shapes
        latency = 3 + Exponential.LATENCY
        fifo_depth = max(16, 1 << (latency + 2 * config.rows - 1).bit_length())

        m.submodules.queue = queue = SyncFIFOBuffered(width=self.request.size, depth=self._depth)
        m.d.comb += [
            queue.w_data.eq(self.requests.payload),
            queue.w_en.eq(self.requests.valid),
            self.requests.ready.eq(queue.w_rdy),
        ]
        request = data.View(self.request, queue.r_data)

        # One row of one token enters each cycle, as long as the FIFO will have room for it.
        index, row = Signal(shapes.lane_token["index"].shape), Signal(shapes.row)
        room = Signal(range(fifo_depth + 1), init=fifo_depth)
        pause = Signal()
        enter = Signal()
        m.d.comb += [enter.eq(queue.r_rdy & (room != 0) & ~pause), self.score_ask.eq(enter)]
        if config.rows == 1:
            m.d.sync += pause.eq(enter)   # the denominator's update takes two cycles
        with m.If(enter):
            m.d.sync += row.eq(row + 1)
            with m.If(row == config.rows - 1):
                m.d.sync += [row.eq(0), index.eq(index + 1)]
                with m.If(index == config.tokens_per_codeword - 1):
                    m.d.sync += index.eq(0)
                    m.d.comb += queue.r_en.eq(1)
        taken = self.weights.valid & self.weights.ready
        m.d.sync += room.eq(room - enter + taken)
        m.d.comb += self.score_address.eq(Cat(
            row[: shapes.row.width if config.rows > 1 else 0],
            index[: config.slot_bits_per_codeword], request.ring))

        # Cycle 2: the score, and its row's final maximum.  Cycle 3: their difference.
        key_shape = data.StructLayout({"row": shapes.row, "slot": shapes.slot})
        keys = [Signal(key_shape, name=f"key_{i}") for i in range(1, latency + 1)]
        valids = Signal(latency)
        m.d.sync += [keys[0].row.eq(row), keys[0].slot.eq(request.slot), valids.eq(Cat(enter, valids))]
        m.d.sync += [b.eq(a) for a, b in zip(keys, keys[1:], strict=False)]

        m.submodules.maxima = maxima = Memory(
            shape=shapes.score, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        maximum_write = maxima.write_port(domain="sync")
        maximum_read = maxima.read_port(domain="comb")
        maximum = Signal(shapes.score)
        m.submodules.exponential = exponential = Exponential()
        distance = Signal(signed(SCORE_BITS + 1))
        masked = Signal()
        m.d.comb += [
            maximum_write.addr.eq(Cat(self.maximum_row, self.maximum_slot)),
            maximum_write.en.eq(self.maximum_write),
            maximum_write.data.eq(self.maximum_new),
            maximum_read.addr.eq(keys[0].as_value()),
            exponential.distance.eq(distance),
            exponential.masked.eq(masked),
        ]
        m.d.sync += [
            maximum.eq(maximum_read.data),
            distance.eq(self.score - maximum),
            masked.eq(self.score == SCORE_MASKED),
        ]

        m.submodules.fifo = fifo = SyncFIFOBuffered(width=shapes.weight.size, depth=fifo_depth)
        m.d.comb += [
            fifo.w_data.eq(Cat(exponential.significand, exponential.exponent)),
            fifo.w_en.eq(valids[-1]),
            self.weights.payload.eq(fifo.r_data),
            self.weights.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.weights.ready),
        ]

        # Denominators: shift, then add; read and add in one cycle, write in the next.
        m.submodules.denominators = sums = Memory(
            shape=shapes.denominator, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        old = sums.read_port(domain="comb")
        seen = sums.read_port(domain="comb")
        write = sums.write_port(domain="sync")
        addend = in_window(m, exponential)
        total = Signal(shapes.denominator)
        key_1, key_2, key_3 = (Signal(key_shape, name=f"sum_key_{i}") for i in (1, 2, 3))
        valid_1, valid_2, valid_3 = (Signal(name=f"sum_valid_{i}") for i in (1, 2, 3))
        fresh = Signal(shapes.row_words)
        m.d.comb += [
            old.addr.eq(key_2.as_value()),
            write.addr.eq(key_3.as_value()),
            write.data.eq(total),
            write.en.eq(valid_3),
        ]
        m.d.sync += [
            key_1.eq(keys[-1]),
            valid_1.eq(valids[-1]),
            key_2.eq(key_1),
            valid_2.eq(valid_1),
            total.eq(Mux(fresh.bit_select(key_2.as_value(), 1), 0, old.data) + addend),
            key_3.eq(key_2),
            valid_3.eq(valid_2),
        ]
        with m.If(valid_3):
            m.d.sync += fresh.bit_select(key_3.as_value(), 1).eq(0)
        with m.If(self.load_valid & self.load.record):
            m.d.sync += fresh.bit_select(Cat(self.load.row, self.load.slot), 1).eq(1)
        address = Signal(unsigned(key_shape.size))
        m.d.comb += seen.addr.eq(address)
        m.d.sync += [
            address.eq(Cat(self.denominator_row, self.denominator_slot)),
            self.denominator.eq(Mux(fresh.bit_select(address, 1), 0, seen.data)),
        ]
        return m
