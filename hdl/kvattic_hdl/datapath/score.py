"""From a token's dot products to its scores: scale, round, mask, store, and keep the row's maximum."""

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import TREE_BITS
from kvattic.spec.config import Config
from kvattic.spec.formats import (
    SCALE_BITS,
    SCALED_SUM_BITS,
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_MIN,
    SCORE_SUM_BITS,
    SCORE_WINDOW_FRACTION,
)
from kvattic_hdl.lib.interfaces import TOKEN_BITS, Shapes

CHUNK_BITS = 17
"""The sum is multiplied in three chunks, each of which fits one DSP slice beside the scale's 24 bits."""
DROPPED_BITS = SCALE_BITS - 1 + SCORE_WINDOW_FRACTION - SCORE_FRACTION
"""Places that the scaled sum has below a score's least bit."""


def score_interval(config: Config) -> int:
    """Cycles that the score unit takes for a row: 3 with one multiplier where that keeps up with the beats, else 1.

    A harvest brings a token for each element of a word, so that with more than one row it would be held up for longer
    than its group's beats take.
    """
    keeps_up = config.rows * 3 <= config.beats_per_token and (config.rows == 1 or not config.sparse)
    return 3 if keeps_up else 1


def scored_token(shapes: Shapes) -> data.StructLayout:
    """A token on its way to its scores: `Shapes.lane_token`, and in a sparse configuration what is special about it.

    harvest: its sums are those of a group, the scale is the first pass's; `last` ends the group.  centroid: it stands
    for a unit.  sketch: it is scored in the first pass.  group: then its group's buffer.  selected: it may be attended.
    """
    config = shapes.config
    members = {name: field.shape for name, field in shapes.lane_token}
    if config.sparse:
        members |= {"harvest": 1, "centroid": 1, "sketch": 1, "selected": 1,
                    "group": (config.groups_in_flight - 1).bit_length()}
    return data.StructLayout(members)


class Scaler(wiring.Component):
    """Multiplies a sum by the scale and rounds once: floor((sum * scale + half) / 2**DROPPED_BITS).

    Latency 5 cycles from the first; a new sum every `interval` cycles.

    Parameters
    ----------
    interval : int
        3: one multiplier, used for each chunk in turn.  1: three multipliers.

    Members
    -------
    valid : In(1)
        Strobe: `sum` and `scale` are given, and stay for `interval` cycles.
    sum : In(signed(SCORE_SUM_BITS))
    scale : In(24)
    done : Out(1)
        Strobe, `LATENCY` cycles after `valid`.
    result : Out(signed)
        The scaled sum, not saturated yet.
    """

    LATENCY = 5

    def __init__(self, interval: int) -> None:
        self._interval = interval
        super().__init__({
            "valid": In(1),
            "sum": In(signed(SCORE_SUM_BITS)),
            "scale": In(SCALE_BITS),
            "done": Out(1),
            "result": Out(signed(SCORE_SUM_BITS + 1)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A sum that is too long makes a score beyond the range with any scale, and so does the end that it is cut to.
        kept = Signal(signed(SCALED_SUM_BITS))
        above = self.sum[SCALED_SUM_BITS - 1 :]
        m.d.comb += kept.eq(Mux(above.any() & ~above.all(), Cat((~self.sum[-1]).replicate(SCALED_SUM_BITS - 1),
                                                               self.sum[-1]), self.sum))
        chunks = [kept[:CHUNK_BITS], kept[CHUNK_BITS : 2 * CHUNK_BITS], kept[2 * CHUNK_BITS :].as_signed()]
        half = C(1 << (DROPPED_BITS - 1), DROPPED_BITS)
        product_bits = CHUNK_BITS + 1 + SCALE_BITS + 1
        valid = Signal(self.LATENCY)
        m.d.sync += valid.eq(Cat(self.valid, valid[:-1]))
        m.d.comb += self.done.eq(valid[-1])

        if self._interval == 3:
            # The chunk of phase 0 enters with valid, those of phases 1 and 2 in the two cycles after it.
            chunk = Signal(signed(CHUNK_BITS + 1))
            scale = Signal(SCALE_BITS)
            product = Signal(signed(product_bits))
            total = Signal(signed(SCORE_SUM_BITS + 1))
            m.d.sync += [chunk.eq(chunks[0]), scale.eq(self.scale)]
            with m.If(valid[0]):
                m.d.sync += chunk.eq(chunks[1])
            with m.Elif(valid[1]):
                m.d.sync += chunk.eq(chunks[2])
            m.d.sync += product.eq(chunk * scale)
            # What falls below a later chunk's place is dropped only after it was added: floor of floor is floor.
            with m.If(valid[1]):
                m.d.sync += total.eq(product + half)
            with m.Elif(valid[2]):
                m.d.sync += total.eq(product + (total >> CHUNK_BITS))
            with m.Elif(valid[3]):
                m.d.sync += total.eq((product << (2 * CHUNK_BITS - DROPPED_BITS))
                                     + (total >> (DROPPED_BITS - CHUNK_BITS)))
            m.d.comb += self.result.eq(total)
        else:
            scale = Signal(SCALE_BITS)
            parts = [Signal(signed(CHUNK_BITS + 1), name=f"part_{i}") for i in range(3)]
            products = [Signal(signed(product_bits), name=f"product_{i}") for i in range(3)]
            low = Signal(signed(product_bits + 1))
            middle, high_3, high_4 = (Signal(signed(product_bits), name=n) for n in ("middle", "high_3", "high_4"))
            mixed = Signal(signed(product_bits + 1))
            m.d.sync += scale.eq(self.scale)
            for part, chunk_i, product_i in zip(parts, chunks, products, strict=True):
                m.d.sync += [part.eq(chunk_i), product_i.eq(part * scale)]
            m.d.sync += [
                low.eq(products[0] + half),
                middle.eq(products[1]),
                high_3.eq(products[2]),
                mixed.eq(middle + (low >> CHUNK_BITS)),
                high_4.eq(high_3),
                self.result.eq((high_4 << (2 * CHUNK_BITS - DROPPED_BITS))
                               + (mixed >> (DROPPED_BITS - CHUNK_BITS))),
            ]
        return m


class ScoreUnit(wiring.Component):
    """Turns the sums of one token (all rows) into scores, one row after the other.

    Takes a token every `rows * score_interval` cycles; the lane spaces them.  The scores appear in the score memory,
    and `stored` is strobed, a fixed number of cycles later; `stored_last` with the last row of a codeword's last token.
    Reset empties the pipeline; row records and maxima are written by `load` before a job starts.

    Parameters
    ----------
    config : Config

    Members
    -------
    valid : In(1)
        Strobe: `where`, `sums` and `overflows` hold a token.
    where : In(scored_token)
    sums : In, rows of signed(SCORE_SUM_BITS)
    overflows : In(rows)
        A product of the row was clipped.
    scale : In(24)
        The scale's significand for slot `scale_slot`.
    scale_slot : Out(slot)
    tree_token : In(24)
        First draft token for slot `scale_slot`.
    unit_bits : In
        log2 of the codewords of a unit for slot `scale_slot`.
    load_valid, load : In
        Row records and row scales (see `Shapes.load`).
    score_write : Out(1)
    score_address : Out
        Cat(row, index, ring): the score memory's write port.
    score : Out(score)
    stored_last : Out(1)
        Strobe: a codeword is accounted for, or a group is harvested.
    stored_slot : Out(slot)
    stored_harvest, stored_sketch : Out(1), stored_group : Out
        As in its `where`.
    forget_valid : In(1), forget_slot : In(slot)
        Strobe: forget the slot's maxima.
    first_slot, first_row : In, first_maximum : Out(score), two cycles later
        A second read port of the maxima.
    overflow : Out(1)
        Strobe: an attended score (of slot `stored_slot`) was clipped, or one of its products.
    maximum_slot, maximum_row : In
        Read address of the running maxima.
    maximum : Out(score), two cycles after the address
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.interval = score_interval(config)
        self.address_bits = (shapes.score_words - 1).bit_length()
        super().__init__({
            "valid": In(1),
            "where": In(scored_token(shapes)),
            "sums": In(data.ArrayLayout(signed(SCORE_SUM_BITS), config.rows)),
            "overflows": In(config.rows),
            "scale": In(SCALE_BITS),
            "scale_slot": Out(shapes.slot),
            "tree_token": In(TOKEN_BITS),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "load_valid": In(1),
            "load": In(shapes.load),
            "score_write": Out(1),
            "score_address": Out(self.address_bits),
            "score": Out(shapes.score),
            "stored_last": Out(1),
            "stored_slot": Out(shapes.slot),
            "stored_harvest": Out(1),
            "stored_sketch": Out(1),
            "stored_group": Out((config.groups_in_flight - 1).bit_length()),
            "forget_valid": In(1),
            "forget_slot": In(shapes.slot),
            "first_slot": In(shapes.slot),
            "first_row": In(shapes.row),
            "first_maximum": Out(shapes.score),
            "overflow": Out(1),
            "maximum_slot": In(shapes.slot),
            "maximum_row": In(shapes.row),
            "maximum": Out(shapes.score),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes, interval = self.config, self.shapes, self.interval
        sparse = config.sparse

        # The token in work: its sums move down one row at a time.
        token = Signal(scored_token(shapes))
        sums = [Signal(signed(SCORE_SUM_BITS), name=f"sum_{r}") for r in range(config.rows)]
        overflows = Signal(config.rows)
        row = Signal(shapes.row)
        phase = Signal(range(interval))
        working = Signal()
        begin = Signal()
        m.d.comb += begin.eq(working & (phase == 0))
        with m.If(working):
            with m.If(phase == interval - 1):
                m.d.sync += [phase.eq(0), row.eq(row + 1), overflows.eq(overflows >> 1)]
                m.d.sync += [low.eq(high) for low, high in zip(sums, sums[1:], strict=False)]
                with m.If(row == config.rows - 1):
                    m.d.sync += working.eq(0)
            with m.Else():
                m.d.sync += phase.eq(phase + 1)
        with m.If(self.valid):
            m.d.sync += [working.eq(1), row.eq(0), phase.eq(0), token.eq(self.where), overflows.eq(self.overflows)]
            m.d.sync += [r.eq(self.sums[i]) for i, r in enumerate(sums)]

        m.submodules.scaler = scaler = Scaler(interval)
        m.d.comb += [
            self.scale_slot.eq(token.slot),
            scaler.valid.eq(begin),
            scaler.sum.eq(sums[0]),
            scaler.scale.eq(self.scale),
        ]
        if sparse:
            m.submodules.scales = scales = Memory(
                shape=SCALE_BITS, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
            scale_write, scale_read = scales.write_port(domain="sync"), scales.read_port(domain="comb")
            m.d.comb += [
                scale_write.en.eq(self.load_valid & self.load.scale),
                scale_write.addr.eq(Cat(self.load.row, self.load.slot)),
                scale_write.data.eq(data.View(shapes.approximate, self.load.data[: shapes.approximate.size]).scale),
                scale_read.addr.eq(Cat(row, token.slot)),
            ]
            with m.If(token.harvest):
                m.d.comb += scaler.scale.eq(scale_read.data)

        # Meanwhile the mask: start <= token < end, and the draft tree's bit beyond tree_token.
        m.submodules.records = records = Memory(
            shape=data.StructLayout({"start": TOKEN_BITS, "end": TOKEN_BITS, "tree": TREE_BITS}),
            depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        write = records.write_port(domain="sync")
        read = records.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.load_valid & self.load.record),
            write.addr.eq(Cat(self.load.row, self.load.slot)),
            write.data.start.eq(self.load.start),
            write.data.end.eq(self.load.end),
            write.data.tree.eq(self.load.tree),
            read.addr.eq(Cat(row, token.slot)),
        ]
        record = Signal.like(read.data)
        token_1, draft = Signal(TOKEN_BITS), Signal(signed(TOKEN_BITS + 1))
        inside, sibling = Signal(), Signal()
        attended = Signal()
        newest_1, selected_1, selected_2 = token_1, 1, 1
        if sparse:
            # A centroid is attended with the last token of its unit, too.  What was not selected is not attended.
            newest_1, selected_1, selected_2 = Signal(TOKEN_BITS), Signal(), Signal()
            within_unit = (config.tokens_per_codeword << self.unit_bits) - 1
            m.d.sync += [
                newest_1.eq(token.token | Mux(token.centroid, within_unit, 0)),
                selected_1.eq(token.selected),
                selected_2.eq(selected_1),
            ]
        m.d.sync += [
            record.eq(read.data),
            token_1.eq(token.token),
            draft.eq(token.token - self.tree_token),
            inside.eq((newest_1 >= record.start) & (token_1 < record.end)),
            sibling.eq((draft < 0) | ((draft < TREE_BITS) & record.tree.bit_select(draft[:5], 1))),
            attended.eq(inside & sibling & selected_2),
        ]

        # Everything that arrives with the scaled sum.
        passing = {name: scored_token(shapes)[name].shape for name in ("harvest", "sketch", "group") if sparse}
        meta_shape = data.StructLayout({
            "address": self.address_bits, "slot": shapes.slot, "row": shapes.row, "last": 1, "overflow": 1} | passing)
        metas = [Signal(meta_shape, name=f"meta_{i}") for i in range(Scaler.LATENCY)]
        attended_4, attended_5 = Signal(), Signal()
        m.d.sync += [
            metas[0].address.eq(Cat(row[: shapes.row.width if config.rows > 1 else 0],
                                    token.index[: config.slot_bits_per_codeword], token.ring)),
            metas[0].slot.eq(token.slot),
            metas[0].row.eq(row),
            metas[0].last.eq(token.last & (row == config.rows - 1)),
            metas[0].overflow.eq(overflows[0]),
            attended_4.eq(attended),
            attended_5.eq(attended_4),
        ]
        m.d.sync += [metas[0][name].eq(token[name]) for name in passing]
        m.d.sync += [b.eq(a) for a, b in zip(metas, metas[1:], strict=False)]

        # Saturate, mask.
        meta = Signal(meta_shape)
        score = Signal(shapes.score)
        done, clipped, used = Signal(), Signal(), Signal()
        m.d.sync += [
            done.eq(scaler.done),
            meta.eq(metas[-1]),
            score.eq(scaler.result),
            clipped.eq(metas[-1].overflow),
            used.eq(attended_5),
        ]
        with m.If(scaler.result > SCORE_MAX):
            m.d.sync += [score.eq(SCORE_MAX), clipped.eq(1)]
        with m.Elif(scaler.result < SCORE_MIN):
            m.d.sync += [score.eq(SCORE_MIN), clipped.eq(1)]
        with m.If(~attended_5):
            m.d.sync += score.eq(SCORE_MASKED)
        m.d.comb += [
            self.score_write.eq(done),
            self.score_address.eq(meta.address),
            self.score.eq(score),
        ]

        # The running maximum: read and compare in one cycle, write in the next.  The same row comes back after two
        # cycles at the earliest.  `fresh` stands for SCORE_MASKED until a row's first score.
        m.submodules.maxima = maxima = Memory(
            shape=shapes.score, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        old = maxima.read_port(domain="comb")
        seen = maxima.read_port(domain="comb")
        update = maxima.write_port(domain="sync")
        fresh = Signal(shapes.row_words)
        here = Cat(meta.row, meta.slot)
        raised, raised_address, raised_score = Signal(), Signal(range(shapes.row_words)), Signal(shapes.score)
        last, slot, overflow = Signal(), Signal(shapes.slot), Signal()
        m.d.comb += [old.addr.eq(here), update.addr.eq(raised_address), update.data.eq(raised_score),
                     update.en.eq(raised)]
        m.d.sync += [
            raised.eq(done & used & (fresh.bit_select(here, 1) | (score > old.data))),
            raised_address.eq(here),
            raised_score.eq(score),
            last.eq(done & meta.last),
            slot.eq(meta.slot),
            overflow.eq(done & used & clipped),
            # One cycle later than `raised`, so that `stored_last` follows the last maximum's write.
            self.stored_last.eq(last),
            self.stored_slot.eq(slot),
            self.overflow.eq(overflow),
        ]
        for name in passing:
            held = Signal(meta_shape[name].shape, name=f"{name}_held")
            m.d.sync += [held.eq(meta[name]), getattr(self, f"stored_{name}").eq(held)]
        with m.If(raised):
            m.d.sync += fresh.bit_select(raised_address, 1).eq(0)
        with m.If(self.load_valid & self.load.record):
            m.d.sync += fresh.bit_select(Cat(self.load.row, self.load.slot), 1).eq(1)
        if sparse:
            first = maxima.read_port(domain="comb")
            first_address = Signal(range(shapes.row_words))
            m.d.comb += first.addr.eq(first_address)
            m.d.sync += [
                first_address.eq(Cat(self.first_row, self.first_slot)),
                self.first_maximum.eq(
                    Mux(fresh.bit_select(first_address, 1), Const(SCORE_MASKED, shapes.score), first.data)),
            ]
            with m.If(self.forget_valid):
                m.d.sync += fresh.word_select(self.forget_slot, 1 << shapes.row.width).eq(-1)
        address = Signal(range(shapes.row_words))
        m.d.comb += seen.addr.eq(address)
        m.d.sync += [
            address.eq(Cat(self.maximum_row, self.maximum_slot)),
            self.maximum.eq(Mux(fresh.bit_select(address, 1), Const(SCORE_MASKED, shapes.score), seen.data)),
        ]
        return m
