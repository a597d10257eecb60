"""From a token's dot products to its scores: scale, round, mask, store, and keep the row's maximum."""

from typing import Any

from amaranth.hdl import C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import TREE_BITS
from kvattic.spec.config import Config
from kvattic.spec.formats import (
    SCALE_BITS,
    SCALE_CHUNK_BITS,
    SCALED_SUM_BITS,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_MIN,
    SCORE_ROUND_SHIFT,
    SCORE_SUM_BITS,
)
from kvattic_hdl.lib.shapes import TOKEN_BITS, Shapes


def score_interval(config: Config) -> int:
    """Cycles that the score unit takes for a row: 3 with one multiplier where that keeps up with the beats, else 1.

    A harvest brings a token for each element of a word, so that with more than one row, or groups of several channels,
    it would be held up for longer than its group's beats take.
    """
    alone = config.rows == 1 and config.lane_channels == 1
    return 3 if config.rows * 3 <= config.beats_per_token and (alone or not config.sparse) else 1


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
    """Multiplies a sum by the scale and rounds once: floor((sum * scale + half) / 2**SCORE_ROUND_SHIFT).

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
        middle_end = 2 * SCALE_CHUNK_BITS
        chunks = [kept[:SCALE_CHUNK_BITS], kept[SCALE_CHUNK_BITS:middle_end], kept[middle_end:].as_signed()]
        half = C(1 << (SCORE_ROUND_SHIFT - 1), SCORE_ROUND_SHIFT)
        product_bits = SCALE_CHUNK_BITS + 1 + SCALE_BITS + 1
        valid = Signal(self.LATENCY)
        m.d.sync += valid.eq(Cat(self.valid, valid[:-1]))
        m.d.comb += self.done.eq(valid[-1])

        if self._interval == 3:
            # The chunk of phase 0 enters with valid, those of phases 1 and 2 in the two cycles after it.
            chunk = Signal(signed(SCALE_CHUNK_BITS + 1))
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
                m.d.sync += total.eq(product + (total >> SCALE_CHUNK_BITS))
            with m.Elif(valid[3]):
                m.d.sync += total.eq((product << (2 * SCALE_CHUNK_BITS - SCORE_ROUND_SHIFT))
                                     + (total >> (SCORE_ROUND_SHIFT - SCALE_CHUNK_BITS)))
            m.d.comb += self.result.eq(total)
        else:
            scale = Signal(SCALE_BITS)
            parts = [Signal(signed(SCALE_CHUNK_BITS + 1), name=f"part_{i}") for i in range(3)]
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
                mixed.eq(middle + (low >> SCALE_CHUNK_BITS)),
                high_4.eq(high_3),
                self.result.eq((high_4 << (2 * SCALE_CHUNK_BITS - SCORE_ROUND_SHIFT))
                               + (mixed >> (SCORE_ROUND_SHIFT - SCALE_CHUNK_BITS))),
            ]
        return m


class Attendance(wiring.Component):
    """Says whether a row attends to a token: start <= token < end, the draft tree's bit, and that it is selected.

    Parameters
    ----------
    config : Config

    Members
    -------
    load_valid, load : In
        Row records.
    token : In(scored_token), row : In(row)
    tree_token : In(24), unit_bits : In
        Of the token's job, as of `ScoreUnit`.
    attended : Out(1), three cycles later
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "load_valid": In(1),
            "load": In(shapes.load),
            "token": In(scored_token(shapes)),
            "row": In(shapes.row),
            "tree_token": In(TOKEN_BITS),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "attended": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        token = self.token
        m.submodules.records = records = Memory(
            shape=data.StructLayout({"start": TOKEN_BITS, "end": TOKEN_BITS, "tree": TREE_BITS}),
            depth=self.shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        write, read = records.write_port(domain="sync"), records.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.load_valid & self.load.record),
            write.addr.eq(Cat(self.load.row, self.load.slot)),
            write.data.start.eq(self.load.start),
            write.data.end.eq(self.load.end),
            write.data.tree.eq(self.load.tree),
            read.addr.eq(Cat(self.row, token.slot)),
        ]
        record = Signal.like(read.data)
        token_1, draft = Signal(TOKEN_BITS), Signal(signed(TOKEN_BITS + 1))
        inside, sibling = Signal(), Signal()
        newest_1, selected_2 = token_1, 1
        if self.config.sparse:
            # A centroid is attended with the last token of its unit, too.  What was not selected is not attended.
            newest_1, selected_1, selected_2 = Signal(TOKEN_BITS), Signal(), Signal()
            within_unit = (self.config.tokens_per_codeword << self.unit_bits) - 1
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
            self.attended.eq(inside & sibling & selected_2),
        ]
        return m


class RunningMaxima(wiring.Component):
    """Keeps the largest score of each row of each slot; SCORE_MASKED until a row's first one.

    Reads and compares in one cycle, writes in the next; the same row may come back in that one, and meets what is
    written.  Row records come before a job's scores, so that reset need not forget.

    Parameters
    ----------
    config : Config

    Members
    -------
    score_valid : In(1), score : In(score), slot : In(slot), row : In(row)
        An attended score.
    load_valid, load : In
        A row record forgets the row's maximum.
    forget_valid : In(1), forget_slot : In(slot)
        Strobe: forget the slot's maxima.
    first_slot, first_row : In, first_maximum : Out(score), two cycles later
    maximum_slot, maximum_row : In, maximum : Out(score), two cycles later
        Two read ports; the first one only if `config.sparse`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__({
            "score_valid": In(1),
            "score": In(shapes.score),
            "slot": In(shapes.slot),
            "row": In(shapes.row),
            "load_valid": In(1),
            "load": In(shapes.load),
            "forget_valid": In(1),
            "forget_slot": In(shapes.slot),
            "first_slot": In(shapes.slot),
            "first_row": In(shapes.row),
            "first_maximum": Out(shapes.score),
            "maximum_slot": In(shapes.slot),
            "maximum_row": In(shapes.row),
            "maximum": Out(shapes.score),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes = self.shapes
        m.submodules.maxima = maxima = Memory(
            shape=shapes.score, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
        old, update = maxima.read_port(domain="comb"), maxima.write_port(domain="sync")
        none_yet = Signal(shapes.row_words)
        here = Cat(self.row, self.slot)
        raised, raised_address, raised_score = Signal(), Signal(range(shapes.row_words)), Signal(shapes.score)
        m.d.comb += [
            old.addr.eq(here), update.addr.eq(raised_address), update.data.eq(raised_score), update.en.eq(raised)]
        again = Signal()
        m.d.comb += again.eq(raised & (raised_address == here))
        none = none_yet.bit_select(here, 1) & ~again
        m.d.sync += [
            raised.eq(self.score_valid & (none | (self.score > Mux(again, raised_score, old.data)))),
            raised_address.eq(here),
            raised_score.eq(self.score),
        ]
        with m.If(raised):
            m.d.sync += none_yet.bit_select(raised_address, 1).eq(0)
        with m.If(self.load_valid & self.load.record):
            m.d.sync += none_yet.bit_select(Cat(self.load.row, self.load.slot), 1).eq(1)
        readers = [("maximum_address", Cat(self.maximum_row, self.maximum_slot), self.maximum)]
        if self.config.sparse:
            readers.append(("first_address", Cat(self.first_row, self.first_slot), self.first_maximum))
            with m.If(self.forget_valid):
                m.d.sync += none_yet.word_select(self.forget_slot, 1 << shapes.row.width).eq(-1)
        for name, wanted, result in readers:
            read = maxima.read_port(domain="comb")
            address = Signal(range(shapes.row_words), name=name)
            found = Signal(shapes.score, name=f"{name}_found", reset_less=True)   # so that none is a register's reset
            m.d.comb += [read.addr.eq(address), result.eq(found)]
            m.d.sync += [address.eq(wanted), found.eq(read.data)]
            with m.If(none_yet.bit_select(address, 1)):
                m.d.sync += found.eq(SCORE_MASKED)
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
        self.scaler = Scaler(self.interval)
        self.attendance = Attendance(config)
        self.running_maxima = RunningMaxima(config)
        self.token: Any = Signal(scored_token(shapes))   # the token in work
        self.row = Signal(shapes.row)
        self.row_overflows = Signal(config.rows)         # of this row and those behind it
        # Everything that arrives with the scaled sum.
        self.passing = {name: scored_token(shapes)[name].shape for name in ("harvest", "sketch", "group")
                        if config.sparse}
        self.stage = data.StructLayout({
            "address": self.address_bits, "slot": shapes.slot, "row": shapes.row, "last": 1, "overflow": 1}
            | self.passing)
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
        for name in ("scaler", "attendance", "running_maxima"):
            m.submodules[name] = getattr(self, name)
        self._scale(m, *self._take(m))
        self._attend(m)
        self._finish(m, self._accompany(m))
        return m

    def _take(self, m: Module) -> tuple[Signal, Signal]:
        """Take a token; its sums move down one row at a time.

        Returns the row's sum, and whether it begins.
        """
        config, row = self.config, self.row
        sums = [Signal(signed(SCORE_SUM_BITS), name=f"sum_{r}") for r in range(config.rows)]
        overflows = self.row_overflows
        phase = Signal(range(self.interval))
        working, begin = Signal(), Signal()
        m.d.comb += begin.eq(working & (phase == 0))
        with m.If(working):
            with m.If(phase == self.interval - 1):
                m.d.sync += [phase.eq(0), row.eq(row + 1), overflows.eq(overflows >> 1)]
                m.d.sync += [low.eq(high) for low, high in zip(sums, sums[1:], strict=False)]
                with m.If(row == config.rows - 1):
                    m.d.sync += working.eq(0)
            with m.Else():
                m.d.sync += phase.eq(phase + 1)
        with m.If(self.valid):
            m.d.sync += [
                working.eq(1), row.eq(0), phase.eq(0), self.token.eq(self.where), overflows.eq(self.overflows)]
            m.d.sync += [r.eq(self.sums[i]) for i, r in enumerate(sums)]
        return sums[0], begin

    def _scale(self, m: Module, sum_: Signal, begin: Signal) -> None:
        """Scale each sum: by the job's scale, or after the feature pass by the row's."""
        shapes, token, scaler = self.shapes, self.token, self.scaler
        m.d.comb += [
            self.scale_slot.eq(token.slot),
            scaler.valid.eq(begin),
            scaler.sum.eq(sum_),
            scaler.scale.eq(self.scale),
        ]
        if self.config.sparse:
            m.submodules.scales = scales = Memory(
                shape=SCALE_BITS, depth=shapes.row_words, init=[], attrs={"ram_style": "distributed"})
            write, read = scales.write_port(domain="sync"), scales.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(self.load_valid & self.load.scale),
                write.addr.eq(Cat(self.load.row, self.load.slot)),
                write.data.eq(data.View(shapes.approximate, self.load.data[: shapes.approximate.size]).scale),
                read.addr.eq(Cat(self.row, token.slot)),
            ]
            with m.If(token.harvest):
                m.d.comb += scaler.scale.eq(read.data)

    def _attend(self, m: Module) -> None:
        """Meanwhile the mask."""
        attendance = self.attendance
        m.d.comb += [
            attendance.load_valid.eq(self.load_valid),
            attendance.load.eq(self.load),
            attendance.token.eq(self.token),
            attendance.row.eq(self.row),
            attendance.tree_token.eq(self.tree_token),
            attendance.unit_bits.eq(self.unit_bits),
        ]

    def _accompany(self, m: Module) -> tuple[Any, Signal]:
        """Delay what arrives with the scaled sum, and whether it is attended."""
        config, token, row = self.config, self.token, self.row
        stages: list[Any] = [Signal(self.stage, name=f"stage_{i}") for i in range(Scaler.LATENCY)]
        attended_4, attended_5 = Signal(), Signal()
        m.d.sync += [
            stages[0].address.eq(Cat(row[: self.shapes.row.width if config.rows > 1 else 0],
                                     token.index[: config.slot_bits_per_codeword], token.ring)),
            stages[0].slot.eq(token.slot),
            stages[0].row.eq(row),
            stages[0].last.eq(token.last & (row == config.rows - 1)),
            stages[0].overflow.eq(self.row_overflows[0]),
            attended_4.eq(self.attendance.attended),
            attended_5.eq(attended_4),
        ]
        m.d.sync += [stages[0][name].eq(token[name]) for name in self.passing]
        m.d.sync += [b.eq(a) for a, b in zip(stages, stages[1:], strict=False)]
        return stages[-1], attended_5

    def _finish(self, m: Module, arriving: tuple[Any, Signal]) -> None:
        """Saturate, mask, and raise the row's maximum."""
        scaler, maxima, (stage_5, attended_5) = self.scaler, self.running_maxima, arriving
        stage: Any = Signal(self.stage)
        score = Signal(self.shapes.score)
        done, clipped, used = Signal(), Signal(), Signal()
        m.d.sync += [
            done.eq(scaler.done),
            stage.eq(stage_5),
            score.eq(scaler.result),
            clipped.eq(stage_5.overflow),
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
            self.score_address.eq(stage.address),
            self.score.eq(score),
            maxima.score_valid.eq(done & used),
            maxima.score.eq(score),
            maxima.slot.eq(stage.slot),
            maxima.row.eq(stage.row),
            maxima.load_valid.eq(self.load_valid),
            maxima.load.eq(self.load),
        ]
        m.d.comb += [getattr(maxima, name).eq(getattr(self, name)) for name in (
            "forget_valid", "forget_slot", "first_slot", "first_row", "maximum_slot", "maximum_row")]
        m.d.comb += [self.maximum.eq(maxima.maximum), self.first_maximum.eq(maxima.first_maximum)]
        # A cycle behind the maximum, so that `stored_last` follows the last one's write.
        last, slot, overflow = Signal(), Signal(self.shapes.slot), Signal()
        m.d.sync += [
            last.eq(done & stage.last),
            slot.eq(stage.slot),
            overflow.eq(done & used & clipped),
            self.stored_last.eq(last),
            self.stored_slot.eq(slot),
            self.overflow.eq(overflow),
        ]
        for name, shape in self.passing.items():
            held = Signal(shape, name=f"{name}_held")
            m.d.sync += [held.eq(stage[name]), getattr(self, f"stored_{name}").eq(held)]
