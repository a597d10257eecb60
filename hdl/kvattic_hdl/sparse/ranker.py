"""Chooses the features of a sparse job's first pass by |q|, and makes the scales that go with them."""

from itertools import pairwise

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value, signed
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import ELEMENT_BYTES, Config
from kvattic.spec.formats import MAGNITUDE_BITS, MAGNITUDE_FRACTION, RATIO_FRACTION, SCALE_BITS, SIGNIFICAND_BITS
from kvattic_hdl.lib.arithmetic import Decoded, decode
from kvattic_hdl.lib.records import WORD_BYTES
from kvattic_hdl.lib.shapes import K_OFFSET_BITS, Shapes

WORD_ELEMENTS = WORD_BYTES // ELEMENT_BYTES
DIGIT = 4
"""Bits of a feature's magnitude that one pass over all features decides."""
FEATURE_BITS = 8
"""Bits of a feature's number, and of its index among the chosen ones, in `Shapes.load`."""


class RowScale(wiring.Component):
    """A row's scale of the first pass: the job's scale times sqrt(whole / part).

    x = (whole << 48) // part, y = isqrt(x), product = scale * y, of which the first 24 bits are the new significand and
    the length says the exponent.  All three run digit by digit at the same time, from the top: the division gives a bit
    of x each cycle, the root takes them in pairs, the product is doubled for each bit of y.  A part of zero leaves the
    scale as it is.

    Latency: ``bits + 48`` (`bits` made even) + 5 cycles, and one for each zero at the top of the product, at most 24:
    from 101 to 125 cycles for 48 bits; one cycle if `part` is zero.  One row at a time, no backpressure at the output.
    Reset: nothing in work.

    Parameters
    ----------
    bits : int
        Width of the sums.

    Members
    -------
    i : In(stream of part, whole)
        Sum of the chosen features' magnitudes, and of all features'; part <= whole.
    scale, k_offset : In(24), In(signed(10))
        The job's, as in `Shapes.start`; stable while at work.
    valid : Out(1)
        Strobe: these are the row's:
    scale_o, k_offset_o : Out
    """

    i: stream.Interface
    scale: Signal
    k_offset: Signal
    valid: Signal
    scale_o: Signal
    k_offset_o: Signal

    def __init__(self, bits: int) -> None:
        self._bits = bits + bits % 2   # x comes in pairs of bits
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"part": bits, "whole": bits}))),
            "scale": In(SCALE_BITS),
            "k_offset": In(signed(K_OFFSET_BITS)),
            "valid": Out(1),
            "scale_o": Out(SCALE_BITS),
            "k_offset_o": Out(signed(K_OFFSET_BITS)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self._bits
        steps = bits + 2 * RATIO_FRACTION
        root_bits = steps // 2
        part, whole, rest = (Signal(bits, name=name) for name in ("part", "whole", "rest"))
        pair = Signal(2)
        count = Signal(range(steps + 1))
        dividing = count.any()

        # Division: a bit each cycle; behind the last bit of `whole` come zeros.
        shifted = Cat(whole[-1], rest)
        difference = Signal(bits + 2)
        m.d.comb += difference.eq(shifted - part)
        below = difference[-1]
        pair_valid = Signal()
        m.d.sync += pair_valid.eq(dividing & count[0])
        with m.If(dividing):
            m.d.sync += [
                count.eq(count - 1),
                rest.eq(Mux(below, shifted, difference)),
                whole.eq(whole << 1),
                pair.eq(Cat(~below, pair)),
            ]

        # Root: what remains is never above twice the root.
        root = Signal(root_bits)
        root_rest = Signal(root_bits + 1)
        widened = Cat(pair, root_rest)
        root_difference = Signal(root_bits + 4)
        m.d.comb += root_difference.eq(widened - Cat(Const(1, 2), root))
        root_below = root_difference[-1]
        root_valid, addend_valid = Signal(), Signal()
        m.d.sync += [root_valid.eq(pair_valid), addend_valid.eq(root_valid)]
        with m.If(pair_valid):
            m.d.sync += [
                root_rest.eq(Mux(root_below, widened, root_difference)),
                root.eq(Cat(~root_below, root)),
            ]

        # Product, and its length.
        product = Signal(root_bits + SCALE_BITS)
        k_offset = Signal(signed(K_OFFSET_BITS))
        addend = Signal(SCALE_BITS)
        m.d.sync += addend.eq(Mux(root[0], self.scale, 0))
        with m.If(addend_valid):
            m.d.sync += product.eq((product << 1) + addend)
        m.d.comb += [self.scale_o.eq(product[-SCALE_BITS:]), self.k_offset_o.eq(k_offset)]

        with m.FSM(name="state"):
            with m.State("idle"):
                given = self.i.payload
                m.d.comb += self.i.ready.eq(1)
                m.d.sync += [
                    part.eq(given.part), whole.eq(given.whole), rest.eq(0), root.eq(0), root_rest.eq(0), product.eq(0),
                    k_offset.eq(self.k_offset + (len(product) - SCALE_BITS - RATIO_FRACTION)),
                ]
                with m.If(self.i.valid):
                    with m.If(given.part.any()):
                        m.d.sync += count.eq(steps)
                        m.next = "divide"
                    with m.Else():
                        m.d.sync += [product.eq(self.scale << root_bits), k_offset.eq(self.k_offset)]
                        m.next = "normalise"
            with m.State("divide"):
                with m.If(~(dividing | pair_valid | root_valid | addend_valid)):
                    m.next = "normalise"
            with m.State("normalise"):
                m.d.comb += self.valid.eq(product[-1])
                m.d.sync += [product.eq(product << 1), k_offset.eq(k_offset - 1)]
                with m.If(product[-1]):
                    m.next = "idle"
        return m


class _Op(enum.Enum, shape=2, view_class=None):
    """What a pass over the features is for."""

    SCAN = 0    # sum over the rows, and see which digits are zero in all features
    COUNT = 1   # histogram of a digit
    SUM = 2     # one row's sums over the chosen features and over all


class Ranker(wiring.Component):
    """The features of the largest |q|, summed over the rows, and each row's scale for scores of these features alone.

    A feature's magnitude is |q| with 24 fractional bits, truncated, and clipped at 2**40 - 1; it is summed over the
    rows.  The `features` largest sums are chosen, equal ones from the lowest feature on.  A row's scale: `RowScale`.

    Passes over the features, one element a cycle: one for each row to sum them, while the query still comes; then
    digits of 4 bits from the top, each a pass and a look at up to 16 bins, until just `features` are at or above what
    is decided (digits that are zero in all features left cost a cycle); then, once `go` is high, one for each row,
    whose sums go to its scale while the next row is passed.

    Latency: from the last word of q to the last digit at most ``rows * head_dim + 7 + n * (head_dim + 24)`` cycles, n
    being 10 digits for one row and 11 for up to 16; normally n is 3 or 4.  From `go` to `done` at most
    ``rows * (head_dim + 8) + 131``.  In all for head_dim 128 and one row: 1,932 cycles at most, 650 to 1,000 normally.
    For eight rows some 2,400.
    Reset: as `clear`.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    clear : In(1)
        Forget everything: another query comes.
    valid, word : In(1), In(64)
        A word of q; they come in order, as many as `rows` have.
    rows, features : In
        Rows of the job; features to choose, 1 to head_dim.  Stable from the first word on.
    scale, k_offset : In(24), In(signed(10))
        The job's, as in `Shapes.start`; likewise.
    go : In(1)
        The results may come.
    chosen_valid, chosen, chosen_index : Out(1), Out(8), Out(8)
        A chosen feature and its index, ascending; never in a cycle with `scale_valid`.
    scale_valid, scale_row, approximate : Out(1), Out(Shapes.row), Out(Shapes.approximate)
        A row's scale; rows in order.
    done : Out(1)
        Everything was given; one cycle after the last scale, until `clear`.
    """

    clear: Signal
    valid: Signal
    word: Signal
    rows: Signal
    features: Signal
    scale: Signal
    k_offset: Signal
    go: Signal
    chosen_valid: Signal
    chosen: Signal
    chosen_index: Signal
    scale_valid: Signal
    scale_row: Signal
    approximate: data.View
    done: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        super().__init__({
            "clear": In(1),
            "valid": In(1),
            "word": In(WORD_BYTES * 8),
            "rows": In(bits_for(config.rows)),
            "features": In(bits_for(config.head_dim)),
            "scale": In(SCALE_BITS),
            "k_offset": In(signed(K_OFFSET_BITS)),
            "go": In(1),
            "chosen_valid": Out(1),
            "chosen": Out(FEATURE_BITS),
            "chosen_index": Out(FEATURE_BITS),
            "scale_valid": Out(1),
            "scale_row": Out(shapes.row),
            "approximate": Out(shapes.approximate),
            "done": Out(1),
        })
        self._op = Signal(_Op, name="op")
        self._row = Signal(range(config.rows), name="row")
        self._numbers = [Signal(range(config.head_dim), name=f"feature{stage}") for stage in range(6)]
        self._stages = Signal(5, name="stages")
        self._issue = Signal(name="issue")
        self._magnitudes = [Signal(MAGNITUDE_BITS, name=f"magnitude{stage}") for stage in (3, 4, 5)]
        key_bits = bits_for(config.rows * ((1 << MAGNITUDE_BITS) - 1))
        self._digits = -(-key_bits // DIGIT)
        self._total = Signal(key_bits, name="total")
        self._key = Signal(self._digits * DIGIT, name="key")  # a feature's sum
        # The digits that are decided: the bits in `mask` of `prefix`.
        self._prefix, self._mask = (Signal(self._digits * DIGIT, name=name) for name in ("prefix", "mask"))
        self._level = Signal(range(self._digits), init=self._digits - 1, name="level")   # the digit that comes next
        self._live = Signal(self._digits * DIGIT, name="live")
        self._equal, self._above = Signal(name="equal"), Signal(name="above")
        self._needed = Signal(bits_for(config.head_dim), name="needed")   # of those that equal the prefix so far
        self._left = Signal(bits_for(config.head_dim), name="left")
        sums_bits = MAGNITUDE_BITS + ceil_log2(config.head_dim)
        self._begins_row = Signal(name="begins_row")
        self._part, self._whole = Signal(sums_bits, name="part"), Signal(sums_bits, name="whole")

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        last_row = self._row == (self.rows - 1)[: len(self._row)]
        last_feature = self._numbers[0] == self._config.head_dim - 1
        element, address, written = self._read_query(m, last_feature)
        self._measure(m, element)
        self._sum_rows(m)
        digit = self._compare(m)
        used, bin_number, looking, members = self._count(m, digit)
        self._choose(m)
        row_scale = self._scale(m)
        looked, seen, seen_number = Signal(), Signal.like(members), Signal.like(bin_number)

        with m.FSM(name="state"):
            with m.State("pass"):
                m.d.comb += self._issue.eq((self._op != _Op.SCAN) | (address != written))
                with m.If(self._op == _Op.SCAN):
                    m.d.sync += self._needed.eq(self.features)
                with m.If(self._issue & last_feature):
                    with m.If((self._op == _Op.SCAN) & ~last_row):
                        m.d.sync += self._row.eq(self._row + 1)
                    with m.Else():
                        m.next = "drain"
            with m.State("drain"):
                with m.If(~self._stages.any()):
                    m.d.sync += bin_number.eq((1 << DIGIT) - 1)
                    with m.Switch(self._op):
                        with m.Case(_Op.SCAN):
                            m.next = "level"
                        with m.Case(_Op.COUNT):
                            m.d.sync += looking.eq(1)
                            m.next = "bins"
                        with m.Default():
                            m.next = "divide"
            with m.State("level"):
                m.d.sync += [address.eq(0), self._row.eq(0), used.eq(0)]
                with m.If(self._live.word_select(self._level, DIGIT).any()):
                    m.d.sync += [self._live.eq(0), self._op.eq(_Op.COUNT)]
                    m.next = "pass"
                with m.Else():
                    self._decide(m, 0)
                    with m.If(self._level == 0):
                        m.next = "ready"
            with m.State("bins"):   # one is looked at while the one before is judged
                m.d.sync += [looked.eq(1), bin_number.eq(bin_number - 1), seen.eq(members), seen_number.eq(bin_number)]
                with m.If(looked):
                    with m.If(seen < self._needed):
                        m.d.sync += self._needed.eq(self._needed - seen)
                    with m.Else():
                        m.d.sync += [looking.eq(0), looked.eq(0)]
                        self._decide(m, seen_number)
                        m.next = "level"
                        with m.If((seen == self._needed) | (self._level == 0)):
                            m.next = "ready"
            with m.State("ready"):
                m.d.sync += [self._op.eq(_Op.SUM), address.eq(0), self._row.eq(0)]
                with m.If(self.go):
                    self._begin_row(m)
            with m.State("divide"):
                m.d.comb += row_scale.i.valid.eq(1)
                with m.If(row_scale.i.ready):
                    m.d.sync += [self.scale_row.eq(self._row), self._row.eq(self._row + 1)]
                    self._begin_row(m)
                    with m.If(last_row):
                        m.next = "last"
            with m.State("last"):
                with m.If(row_scale.valid):
                    m.next = "done"
            with m.State("done"):
                m.d.comb += self.done.eq(1)
        # Behind all states, so that the registers' resets do it.
        with m.If(self._begins_row):
            m.d.sync += [self._left.eq(self._needed), self._part.eq(0), self._whole.eq(0)]
        return ResetInserter(self.clear)(m)

    # ---- what the states share

    def _decide(self, m: Module, value: Value | int) -> None:
        """Digit `level` of the threshold."""
        m.d.sync += [
            self._prefix.word_select(self._level, DIGIT).eq(value),
            self._mask.word_select(self._level, DIGIT).eq((1 << DIGIT) - 1),
            self._level.eq(self._level - 1),
        ]

    def _begin_row(self, m: Module) -> None:
        """Goes on with the sums of a row."""
        m.d.comb += self._begins_row.eq(1)
        m.next = "pass"

    # ---- the stages that features go through, one after the other

    def _read_query(self, m: Module, last_feature: Value) -> tuple[Decoded, Signal, Signal]:
        """0, 1: the element; (it, address of the word that is read next, words that are written)."""
        config, numbers = self._config, self._numbers
        element_bits = ceil_log2(WORD_ELEMENTS)
        words = config.rows * config.head_dim // WORD_ELEMENTS
        m.submodules.query = query = Memory(
            shape=WORD_BYTES * 8, depth=words, init=[], attrs={"ram_style": "distributed"} if words <= 64 else {})
        write, read = query.write_port(), query.read_port()
        written = Signal(range(query.depth + 1))
        address = Signal.like(written)
        m.d.comb += [
            write.addr.eq(written), write.data.eq(self.word), write.en.eq(self.valid), read.addr.eq(address),
        ]
        with m.If(self.valid):
            m.d.sync += written.eq(written + 1)
        m.d.sync += [
            self._stages.eq(Cat(self._issue, self._stages)),
            *(after.eq(before) for before, after in pairwise(numbers)),
        ]
        with m.If(self._issue):
            m.d.sync += numbers[0].eq(numbers[0] + 1)
            with m.If(last_feature):
                m.d.sync += numbers[0].eq(0)
            with m.If(numbers[0][:element_bits].all()):
                m.d.sync += address.eq(address + 1)
        word = read.data.word_select(numbers[1][:element_bits], ELEMENT_BYTES * 8)
        return decode(word, config.element.encoding), address, written

    def _measure(self, m: Module, element: Decoded) -> None:
        """1, 2: the magnitude, which is significand << places >> low."""
        form = self._config.element.encoding
        least = form.offset - MAGNITUDE_FRACTION   # exponent of an element whose significand is the magnitude
        low = SIGNIFICAND_BITS if least > 1 else 0
        places_max = MAGNITUDE_BITS - SIGNIFICAND_BITS + low
        places = Signal(range(places_max + 1))
        significand = Signal(SIGNIFICAND_BITS)
        clipped = Signal()
        nothing = element.exponent < least - low if least - low > 1 else Const(0, 1)
        m.d.sync += [
            places.eq(element.exponent - (least - low)),
            significand.eq(Mux(nothing, 0, element.significand)),
            clipped.eq(element.exponent > least - low + places_max
                       if form.exponent_max > least - low + places_max else Const(0, 1)),
        ]
        # A special's significand is zero, and so must be what is clipped.
        clip = clipped & significand.any()
        m.d.sync += [
            self._magnitudes[0].eq(
                ((significand << places) >> low)[:MAGNITUDE_BITS] | clip.replicate(MAGNITUDE_BITS)),
            *(after.eq(before) for before, after in pairwise(self._magnitudes)),
        ]

    def _sum_rows(self, m: Module) -> None:
        """3: the magnitude's sum over the rows: of those scanned so far, then of all."""
        magnitude, total, scan = self._magnitudes[0], self._total, self._op == _Op.SCAN
        m.d.sync += self._key.eq(total)
        if self._config.rows == 1:
            m.d.comb += total.eq(magnitude)
            return
        m.submodules.totals = totals = Memory(shape=len(total), depth=self._config.head_dim, init=[])
        write, read = totals.write_port(), totals.read_port()
        firsts = Signal(3)   # of the first row, at stages 1, 2 and 3
        m.d.sync += firsts.eq(Cat(self._row == 0, firsts))
        m.d.comb += [
            read.addr.eq(self._numbers[2]),
            total.eq(Mux(scan & firsts[2], 0, read.data) + Mux(scan, magnitude, 0)),
            write.addr.eq(self._numbers[3]),
            write.data.eq(total),
            write.en.eq(self._stages[2] & scan),
        ]

    def _compare(self, m: Module) -> Signal:
        """4: against the digits that are decided; the next digit."""
        key, mask = self._key, self._mask
        key5 = Signal.like(key)
        digit = Signal(DIGIT)
        m.d.sync += [
            key5.eq(key),
            digit.eq(key.word_select(self._level, DIGIT)),
            self._equal.eq(~((key ^ self._prefix) & mask).any()),
            self._above.eq((key & mask) > self._prefix),
        ]
        # 5: bits that are set in any key that is not decided.
        with m.If(self._stages[4] & self._equal):
            m.d.sync += self._live.eq(self._live | key5)
        return digit

    def _count(self, m: Module, digit: Signal) -> tuple[Signal, Signal, Signal, Signal]:
        """5, COUNT: histogram of the digit; (bins that are not zero, the bin looked at, while high, its count)."""
        count_bits = bits_for(self._config.head_dim)
        m.submodules.bins = bins = Memory(
            shape=count_bits, depth=1 << DIGIT, init=[], attrs={"ram_style": "distributed"})
        read, write = bins.read_port(domain="comb"), bins.write_port()
        used = Signal(1 << DIGIT)
        bin_number = Signal(DIGIT)
        looking = Signal()
        members = Signal(count_bits)
        m.d.comb += [
            read.addr.eq(Mux(looking, bin_number, digit)),
            members.eq(Mux(used.bit_select(read.addr, 1), read.data, 0)),
            write.addr.eq(read.addr),
            write.data.eq(members + 1),
            write.en.eq(self._stages[4] & self._equal & (self._op == _Op.COUNT)),
        ]
        with m.If(write.en):
            m.d.sync += used.bit_select(read.addr, 1).eq(1)
        return used, bin_number, looking, members

    def _choose(self, m: Module) -> None:
        """5, SUM: above the threshold, or equal to it and among the first ones."""
        chosen = Signal()
        equal = self._equal & self._left.any()
        m.d.comb += chosen.eq(self._above | equal)
        m.d.sync += [
            self.chosen_valid.eq(0),
            self.chosen.eq(self._numbers[5]),
            self.chosen_index.eq(self.chosen_index + self.chosen_valid),
        ]
        with m.If(self._stages[4] & (self._op == _Op.SUM)):
            m.d.sync += [
                self._left.eq(self._left - equal),
                self._part.eq(self._part + Mux(chosen, self._magnitudes[2], 0)),
                self._whole.eq(self._whole + self._magnitudes[2]),
                self.chosen_valid.eq(chosen & (self._row == 0)),
            ]

    def _scale(self, m: Module) -> RowScale:
        """The scale of a row whose sums are there."""
        m.submodules.row_scale = row_scale = RowScale(len(self._part))
        m.d.comb += [
            row_scale.i.payload.part.eq(self._part),
            row_scale.i.payload.whole.eq(self._whole),
            row_scale.scale.eq(self.scale),
            row_scale.k_offset.eq(self.k_offset),
            self.scale_valid.eq(row_scale.valid),
            self.approximate.scale.eq(row_scale.scale_o),
            self.approximate.k_offset.eq(row_scale.k_offset_o),
        ]
        return row_scale
