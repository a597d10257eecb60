"""A lane's part in the selection: sweeps through the scores of a job's first pass for sums, masses and marks."""

from itertools import pairwise

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.formats import (
    DIGIT_BITS,
    MASS_BITS,
    MASS_FRACTION,
    SCORE_BITS,
    SCORE_MASKED,
    VALUE_FRACTION,
)
from kvattic_hdl.lib.exponential import Exponential, in_window
from kvattic_hdl.lib.shapes import LENGTH_FORCED, MODE_BITS, RANK_BITS, TOKEN_BITS, Shapes, Sweep
from kvattic_hdl.lib.stream_buffer import Queue
from kvattic_hdl.sparse.groups import GroupWalk, position_bits

DEPTH = 16
"""Steps that wait for their scores, where masses are kept."""
UNDER_WAY = 32
"""Steps on their way from the walk to their masses, where these are worked out anew: more than the way has cycles."""
KEPT = 512
"""Steps whose units are kept from one DIGIT sweep for the next: a block RAM's words."""
SETTLE = 4
"""Cycles from the begin of a sweep through the kept units to the first of them: mask and prefix stand."""
LATENCY = 3 + Exponential.LATENCY
"""From the grant of a score's address to p as a float."""


def latency(config: Config) -> int:
    """Cycles from the grant of scores' addresses to the sum of their p as floats, which takes one if they are many."""
    return LATENCY + (config.sweep_tokens > 1)


class _Listed:
    """Units that the last DIGIT sweep has kept.

    Attributes:
        complete: they are all that it has counted.
        running: a sweep goes through them.
        go, valid: those of a step are read; a cycle later `units` are there.
    """

    def __init__(self, units: data.StructLayout) -> None:
        self.complete, self.running, self.go, self.valid = (
            Signal(name=f"listed_{name}") for name in ("complete", "running", "go", "valid"))
        self.units = Signal(units, name="listed_units")


class LaneTopK(wiring.Component):
    """Sweeps through the tokens (or units) of a job's stripes in this lane's list, for the central `TopK`.

    From `sweep_valid` to `done`, if every `score_ask` is granted (one that is not costs its cycle):

    ===== ================================ ================================ ==================================
    sweep cycles, `Config.rows` of 1       512 tokens in two stripes        cycles, more rows; 512 tokens, one
    ===== ================================ ================================ ==================================
    SUM   24 + a cycle for each score      536                              23 + a cycle for each score; 535
    MASS  24 + a cycle for each score      536                              26 + a cycle for each score; 538
    DIGIT 26 + a cycle for each score      538                              11 + a cycle for each unit; 523
    MARK  25 + a cycle for each token      537                              10 to 23 + a cycle for each token
    ===== ================================ ================================ ==================================

    A DIGIT sweep through units that are kept takes 14 cycles + one for each, MARK in CENTROID 25 (10) + a cycle for a
    codeword.  A step takes `Config.sweep_tokens` tokens at once, whose scores lie side by side, or as many units of one
    token: it is a cycle for so many of them, and where they are several, sweeps that read scores take one more.

    Scores are those before `end_token`, of each row that has a reference; those of stripes that are attended whole
    count in SUM and MARK only, in CENTROID never.  With one row each sweep weighs the scores anew, for a unit's mass
    needs no place then.  With more, masses are kept by MASS; MARK reads the scores of selected tokens beside its walk,
    and waits where it has found many with many rows.

    A DIGIT sweep keeps the units that begin with its prefix (of one row, a MASS sweep all units), if they are of no
    more than `kept` steps; the next DIGIT sweep goes through these alone, so its prefix must begin with the one before.
    Tokens are walked in the order of the list; a stripe shorter than four steps takes four.  Reset forgets the sweep.

    Parameters
    ----------
    config : Config
        One with `sparse`.
    kept : int
        A power of two.

    Members
    -------
    sweep_valid, sweep : In(1), In(Shapes.sweep)
        Strobe: begin this sweep.  Not before `done`.  `bits` is 0 in MASS; behind `bits` the prefix is 0.
    done : Out(1)
        Low from the cycle after `sweep_valid` until the sweep's results can be read, and after reset until counts are
        cleared.
    slot : Out(slot)
        The sweep's job; from the cycle after `sweep_valid` on.  The six members below are its parameters, in the same
        cycle, constant during the sweep.
    mode : In(MODE_BITS)
    unit_bits : In
    end_token, local_token : In(24)
    sinks : In(16)
        Units that begin below this token come first, as those of the local window do.
    stripes : In
        Number of stripes in the lane's list.
    ring_base : In(ring)
        Place of the list's first codeword in the score ring; the others follow, `Config.group_codewords` a stripe.
    stripe_address : Out
        Cat(number in the list, slot) of a stripe.
    stripe_token, stripe_whole : In(24), In(1)
        Its first token, and whether it is attended whole; one cycle later.
    score_address : Out
        Of a word of the score memory: Cat(row, index, ring) of its first token, but for index's zeros.
    score_ask, score_grant : Out(1), In(1)
        The address is wanted; it is taken in this cycle.
    scores : In(array of score, by token)
        Two cycles after a granted address.
    mark_valid, mark_ring, mark_bits : Out(1), Out(ring), Out(tokens_per_codeword)
        Strobe, in a MARK sweep once for each place of the job's stripes, also of those beyond `end_token`: which tokens
        of the codeword at `mark_ring` are selected.  Bits of tokens from `end_token` on mean nothing.
    reference_write, reference_row, reference : In(1), In(row), In(score)
        Strobe: what the row's scores are compared with, from the next sweep on.  No score is above it.  Written for
        the job's rows in ascending order: the last one written is the last that sweeps go through.
    sum_row : In(row)
    sum : Out(denominator)
        That row's sum of the last SUM or MARK sweep, two cycles later.
    bin : In(DIGIT_BITS)
    count : Out(unit_count)
        Units with that length or digit in the last MASS or DIGIT sweep, two cycles later.
    unmarked : Out(1)
        The last MARK sweep left a unit unselected.
    """

    def __init__(self, config: Config, kept: int = KEPT) -> None:
        self.config = config
        self._kept = kept
        self._wide = wide = config.sweep_tokens
        self._wide_bits = ceil_log2(wide)
        self.shapes = shapes = Shapes(config)
        self.address_bits = (shapes.score_words // wide - 1).bit_length()
        super().__init__({
            "sweep_valid": In(1),
            "sweep": In(shapes.sweep),
            "done": Out(1, init=1),
            "slot": Out(shapes.slot),
            "mode": In(MODE_BITS),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "end_token": In(TOKEN_BITS),
            "local_token": In(TOKEN_BITS),
            "sinks": In(shapes.start["sinks"].shape),
            "stripes": In(shapes.walk["stripes"].shape),
            "ring_base": In(shapes.ring),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "stripe_whole": In(1),
            "score_address": Out(self.address_bits),
            "score_ask": Out(1),
            "score_grant": In(1),
            "scores": In(data.ArrayLayout(shapes.score, wide)),
            "mark_valid": Out(1),
            "mark_ring": Out(shapes.ring),
            "mark_bits": Out(config.tokens_per_codeword),
            "reference_write": In(1),
            "reference_row": In(shapes.row),
            "reference": In(shapes.score),
            "sum_row": In(shapes.row),
            "sum": Out(shapes.denominator),
            "bin": In(DIGIT_BITS),
            "count": Out(shapes.unit_count),
            "unmarked": Out(1),
        })
        self._sweep = Signal(shapes.sweep, name="sweep")
        self._centroid, self._marking, self._massing = (
            Signal(name=name) for name in ("centroid", "marking", "massing"))
        # One row's masses follow from its scores.
        self._keeps_masses = config.rows > 1
        # A step on its way to p, from the cycle after its scores' address was granted on.
        score = data.StructLayout(
            {"first": 1, "last": 1, "forced": wide, "counts": wide}
            | ({"row": shapes.row, "position": position_bits(config)} if self._keeps_masses else {}))
        self._latency = latency(config)
        most = config.rows * (config.tokens_per_codeword << config.unit_bits_max)    # p of a unit
        self._total_bits = VALUE_FRACTION + 1 + ceil_log2(most)
        self._entered = Signal(name="entered")
        self._scores = [Signal(score, name=f"score_{i}", reset_less=True) for i in range(1, self._latency + 4)]
        self._p = [Signal(VALUE_FRACTION + 1, name=f"p_{i}") for i in range(wide)]
        self._p_sum = Signal(VALUE_FRACTION + 1 + self._wide_bits, name="p_sum")
        self._before_valid, self._now_valid = Signal(name="before_valid"), Signal(name="now_valid")
        self._by_token = Signal(name="by_token")   # units are tokens
        self._more = Signal(config.unit_bits_max, name="more")   # codewords of a unit, less one
        self._begins = Signal(name="begins")       # the unit begins before the end
        # The step's units: which of them are there, their masses, and the first one's token; others follow it.
        units = data.StructLayout({
            "there": wide, "masses": data.ArrayLayout(MASS_BITS, wide), "token": TOKEN_BITS})
        self._units_2 = Signal(units, name="units_2", reset_less=True)
        self._listed = _Listed(units)
        # Units' masses that are ready.
        self._mass_valids, self._masses = (
            Signal(wide, name="mass_valids"), Signal(data.ArrayLayout(MASS_BITS, wide), name="masses"))
        self._mass_position = Signal(position_bits(config), name="mass_position")

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.walk = walk = GroupWalk(self.config)
        self._begin(m, walk)
        under_way = self._keep_masses(m, walk) if self._keeps_masses else self._weigh_again(m, walk)
        with m.If(self.sweep_valid):
            m.d.sync += self.done.eq(0)
        with m.Elif(~under_way.any()):
            m.d.sync += self.done.eq(1)
        return m

    def _keep_masses(self, m: Module, walk: GroupWalk) -> Value:
        """Sweeps that look masses up which MASS has kept; what of them is under way.

        Weighing the scores of several rows anew would take a cycle for each row.
        """
        listed = self._listed
        marking, massing, centroid = self._marking, self._massing, self._centroid
        m.d.comb += [
            walk.by_unit.eq((self._sweep.op == Sweep.DIGIT) | (centroid & ~marking)),
            walk.skip_whole.eq(walk.by_unit | massing),
        ]
        step_2, step_3 = (Signal(walk.step.shape(), name=f"step_{i}", reset_less=True) for i in (2, 3))
        valid_2, valid_3 = (Signal(name=f"step_valid_{i}") for i in (2, 3))
        m.d.sync += [
            valid_2.eq(walk.valid | listed.valid), valid_3.eq(valid_2), step_2.eq(walk.step), step_3.eq(step_2)]
        self._read_masses(m, walk)
        selected, matches, digits = self._rank(m)
        taken, counts, counted = (Signal(self._wide, name=name) for name in ("taken_3", "counts_3", "counted"))
        m.d.comb += [
            taken.eq(step_3.inside & (step_3.whole.replicate(self._wide) | selected)),
            counts.eq(Mux(marking, Mux(centroid, 0, taken), Mux(centroid, 1, step_3.inside))),
            counted.eq(Mux(valid_3 & (self._sweep.op == Sweep.DIGIT), matches, 0)),
        ]
        self._mark(m, valid_3, step_3, taken)

        push = Signal()
        m.d.comb += push.eq(valid_3 & Mux(marking, counts.any(), self._sweep.op != Sweep.DIGIT))
        room = self._queue(m, walk, push, step_3, counts, valid_3)
        valids = self._weigh(m)
        self._sum_rows(m)
        lengths = self._sum_masses(m)
        self._keep(m, counted)
        binned = [Mux(massing, length, digit) for length, digit in zip(lengths, digits, strict=True)]
        count_valids = self._count(m, self._mass_valids | counted, binned)

        return Cat(walk.running, listed.running, room != DEPTH, valids, self._mass_valids, count_valids,
                   self.mark_valid)

    def _weigh_again(self, m: Module, walk: GroupWalk) -> Value:
        """Sweeps that weigh the scores anew, of one row; what of them is under way.

        p comes out of the weighing in cycle `before`, a unit's total is there in cycle `now`, its mass in the next one.
        From there on stages are counted: ranks stand in stage 2 beside those of the list, what they say in stage 3.
        """
        listed, by_token, massing, now = self._listed, self._by_token, self._massing, self._scores[-1]
        in_digit = self._sweep.op == Sweep.DIGIT
        m.d.comb += [walk.by_unit.eq(self._centroid), walk.skip_whole.eq(massing | in_digit | self._centroid)]
        room, about = self._ask(m, walk)
        valids = self._weigh(m)
        totals, lengths = self._sum_units(m)
        ends, there = Signal(4), Signal(data.ArrayLayout(self._wide, 4))    # of units, by stage; 0: `now`
        token_1 = Signal(TOKEN_BITS, reset_less=True)
        m.d.comb += [
            ends[0].eq(self._now_valid & now.last),
            there[0].eq(Mux(ends[0], Mux(by_token, now.counts, self._begins), 0)),
            there[2].eq(self._units_2.there),
        ]
        m.d.sync += [
            ends[1:].eq(ends),
            there[1].eq(there[0]),
            there[3].eq(there[2]),
            token_1.eq(about.token),
            self._units_2.there.eq(there[1]),
            self._units_2.masses.eq(self._masses),
            self._units_2.token.eq(token_1),
        ]
        with m.If(listed.running):
            m.d.sync += self._units_2.eq(listed.units)
            with m.If(~listed.valid):
                m.d.sync += self._units_2.there.eq(0)
        selected, matches, digits = self._rank(m)
        # In MASS no bits of the rank are decided, and all units match.
        self._keep(m, Mux(massing | in_digit, matches, 0))
        binned = [Mux(massing, length, digit) for length, digit in zip(lengths, digits, strict=True)]
        count_valids = self._count(m, Mux(massing, there[1], Mux(in_digit, matches, 0)), binned)
        taken = self._take(m, about, selected)
        self._sum_taken(m, ends[0], totals, taken)
        self._mark_units(m, about, ends[3], there[3], taken)
        return Cat(walk.running, listed.running, listed.valid, room != UNDER_WAY, valids, ends, there[3], count_valids,
                   self.mark_valid)

    def _begin(self, m: Module, walk: GroupWalk) -> None:
        """Takes a sweep and sets the walk up; the job's parameters do not change during its sweep."""
        sweep, tokens = self._sweep, self.config.tokens_per_codeword
        m.d.comb += [
            self.slot.eq(sweep.slot),
            self._marking.eq(sweep.op == Sweep.MARK),
            self._massing.eq(sweep.op == Sweep.MASS),
            walk.begin.eq(self.sweep_valid & ~((self.sweep.op == Sweep.DIGIT) & self._listed.complete)),
            walk.all_tokens.eq(self._marking),
            self.stripe_address.eq(walk.stripe_address),
        ]
        for name in ("slot", "end_token", "local_token", "sinks", "stripes", "ring_base", "stripe_token",
                     "stripe_whole"):
            m.d.comb += getattr(walk, name).eq(getattr(self, name))
        unit_mask = Signal(len(walk.unit_mask))
        step_tokens = Signal(len(walk.step_tokens))
        in_unit = walk.by_unit & ~self._by_token
        m.d.sync += [
            self._by_token.eq((self.mode == Mode.SPARF) | (self.mode == Mode.CODES)),
            self._centroid.eq(self.mode == Mode.CENTROID),
            unit_mask.eq(Mux(self._by_token, 0, (tokens << self.unit_bits) - 1)),
            step_tokens.eq(Mux(in_unit, unit_mask + 1, Mux(self._centroid, tokens, self._wide))),
        ]
        m.d.comb += [
            self._more.eq(unit_mask[self.config.slot_bits_per_codeword :]),
            walk.unit_mask.eq(unit_mask),
            walk.step_tokens.eq(step_tokens),
        ]
        with m.If(self.sweep_valid):
            m.d.sync += sweep.eq(self.sweep)

    def _read_masses(self, m: Module, walk: GroupWalk) -> None:
        """Masses, side by side as scores are, each at the place of its unit's first token."""
        listed, step, bits = self._listed, walk.step, self._wide_bits
        first = Mux(self._by_token, step.inside, step.inside[0])
        m.d.sync += [self._units_2.there.eq(first), self._units_2.token.eq(walk.unit_token)]
        for i in range(self._wide):
            m.submodules[f"masses_{i}"] = masses = Memory(
                shape=MASS_BITS, depth=1 << position_bits(self.config) - bits, init=[], attrs={"ram_style": "block"})
            read, write = masses.read_port(domain="sync"), masses.write_port(domain="sync")
            m.d.comb += [
                read.addr.eq(walk.unit_position[bits:]),
                write.en.eq(self._mass_valids[i]),
                write.addr.eq(self._mass_position[bits:]),
                write.data.eq(self._masses[i]),
            ]
            m.d.sync += self._units_2.masses[i].eq(read.data)
        with m.If(listed.running):
            m.d.sync += self._units_2.eq(listed.units)

    def _rank(self, m: Module) -> tuple[Signal, Signal, list[Signal]]:
        """The units' ranks against the prefix: (at least it, there and begin with it, the digits behind it).

        The first one's answer is that of all tokens of a step within its unit.
        """
        sweep = self._sweep
        mask = Signal(RANK_BITS)
        aligned_number, aligned_shift = Signal(range(RANK_BITS // DIGIT_BITS + 1)), Signal(range(DIGIT_BITS + 1))
        selected, matches = Signal(self._wide), Signal(self._wide)
        digits = [Signal(DIGIT_BITS, name=f"digit_3_{i}") for i in range(self._wide)]
        m.d.sync += [
            mask.eq(~(Const((1 << RANK_BITS) - 1) >> sweep.bits)),
            aligned_number.eq(Array(i // DIGIT_BITS for i in range(RANK_BITS + 1))[sweep.bits]),
            aligned_shift.eq(Array(DIGIT_BITS - i % DIGIT_BITS for i in range(RANK_BITS + 1))[sweep.bits]),
        ]
        tokens = [Cat(Const(i, self._wide_bits), self._units_2.token[self._wide_bits :]) for i in range(self._wide)]
        ranks = [Cat(~token, mass) for token, mass in zip(tokens, self._units_2.masses, strict=True)]
        above = [rank >= sweep.prefix for rank in ranks]
        differences = [(rank ^ sweep.prefix) & mask for rank in ranks]
        # The tokens of a step differ in their lowest bits alone.
        same = ~differences[0][self._wide_bits : TOKEN_BITS].any()
        for i, (rank, different) in enumerate(zip(ranks, differences, strict=True)):
            matching = same & ~Cat(different[: self._wide_bits], different[TOKEN_BITS:]).any()
            # The digit comes out of the two aligned ones in which it stands.
            padded = Cat(Const(0, 3 * DIGIT_BITS - RANK_BITS % DIGIT_BITS), rank)
            aligned = [padded[len(padded) - (n + 2) * DIGIT_BITS : len(padded) - n * DIGIT_BITS]
                       for n in range(RANK_BITS // DIGIT_BITS + 1)]
            m.d.sync += [
                selected[i].eq(Mux(self._by_token, above[i], above[0])),
                matches[i].eq(self._units_2.there[i] & matching),
                digits[i].eq(Array(aligned)[aligned_number] >> aligned_shift),
            ]
        return selected, matches, digits

    def _keep(self, m: Module, counted: Value) -> None:
        """Keep the units that a DIGIT sweep counts (of one row: or MASS), for the next one; and go through them."""
        listed, count = self._listed, Signal(range(self._kept + 1))
        units_3 = Signal.like(self._units_2)
        m.submodules.units = units = Memory(
            shape=units_3.shape(), depth=self._kept, init=[], attrs={"ram_style": "block"})
        read, write = units.read_port(domain="sync"), units.write_port(domain="sync")
        at, left = Signal(range(self._kept)), Signal(range(self._kept + 1))
        settled = Signal(range(SETTLE + 1))
        is_digit = self.sweep.op == Sweep.DIGIT
        keeps = is_digit if self._keeps_masses else is_digit | (self.sweep.op == Sweep.MASS)
        m.d.comb += [
            listed.go.eq(listed.running & (settled == SETTLE) & (left != 0)),
            listed.units.eq(read.data),
            read.addr.eq(at),
            write.addr.eq(count),
            write.data.eq(units_3),
            write.data.there.eq(counted),
            write.en.eq(counted.any() & (count != self._kept)),
        ]
        m.d.sync += [units_3.eq(self._units_2), listed.valid.eq(listed.go)]
        with m.If(settled != SETTLE):
            m.d.sync += settled.eq(settled + 1)
        with m.If(listed.go):
            m.d.sync += [at.eq(at + 1), left.eq(left - 1)]
        # Until the last one's rank is there.
        with m.If((settled == SETTLE) & (left == 0) & ~listed.valid):
            m.d.sync += listed.running.eq(0)
        with m.If(counted.any()):
            m.d.sync += count.eq(count + (count != self._kept))
            with m.If(count == self._kept):
                m.d.sync += listed.complete.eq(0)
        with m.If(self.sweep_valid):
            m.d.sync += [
                listed.complete.eq(keeps), listed.running.eq(is_digit & listed.complete), left.eq(count),
                count.eq(0), at.eq(0), settled.eq(0)]

    def _ask(self, m: Module, walk: GroupWalk) -> tuple[Signal, data.View]:
        """Ask for each step's scores; the room for more steps, and what else there is to say of the one `now`."""
        wide, shapes, step = self._wide, self.shapes, walk.step
        asked = data.StructLayout({
            "ring": shapes.ring, "index": step.index.shape(), "first": 1, "last": 1, "forced": wide, "counts": wide})
        about = data.StructLayout({"token": TOKEN_BITS, "ring": shapes.ring, "whole": 1, "closes": 1})
        m.submodules.asks = asks = Queue(asked, UNDER_WAY)
        m.submodules.abouts = abouts = Queue(about, UNDER_WAY)
        enter = Signal()
        room = Signal(range(UNDER_WAY + 1), init=UNDER_WAY)
        ask, score = asks.o.payload, self._scores[0]
        m.d.comb += [
            walk.room.eq(room != 0),
            asks.i.valid.eq(walk.valid),
            asks.i.payload.counts.eq(step.inside & Mux(self._centroid, 1, (1 << wide) - 1)),
            *(asks.i.payload[name].eq(step[name]) for name in ("ring", "index", "first", "last", "forced")),
            abouts.i.valid.eq(walk.valid),
            abouts.i.payload.token.eq(walk.unit_token),
            abouts.i.payload.ring.eq(step.ring),
            abouts.i.payload.whole.eq(step.whole),
            abouts.i.payload.closes.eq(step.index == self.config.tokens_per_codeword - wide),   # the codeword
            self.score_ask.eq(asks.o.valid & ~self._pace(m, enter)),
            enter.eq(self.score_ask & self.score_grant),
            asks.o.ready.eq(enter),
            abouts.o.ready.eq(self._now_valid),
            self.score_address.eq(Cat(ask.index[self._wide_bits :], ask.ring)),
        ]
        m.d.sync += [
            room.eq(room - walk.go + self._now_valid),
            self._entered.eq(enter),
            *(score[name].eq(ask[name]) for name in ("first", "last", "forced", "counts")),
        ]
        return room, abouts.o.payload

    def _pace(self, m: Module, enter: Signal) -> Signal:
        """Units of centroids are marked a codeword a cycle, so they must not come faster: whether to wait."""
        left, waits = Signal.like(self._more), Signal()
        with m.If(enter):
            m.d.sync += [left.eq(self._more), waits.eq(self._marking & self._centroid & self._more.any())]
        with m.Elif(waits):
            m.d.sync += [left.eq(left - 1), waits.eq(left != 1)]
        return waits

    def _take(self, m: Module, about: data.View, selected: Signal) -> Signal:
        """Stage 3: which tokens (or units) are taken, or count because a SUM sweep counts all."""
        whole = Signal(3)
        taken = Signal(self._wide)
        m.d.sync += whole.eq(Cat(about.whole, whole))
        m.d.comb += taken.eq(selected | (whole[-1] | (self._sweep.op == Sweep.SUM)).replicate(self._wide))
        return taken

    def _sum_taken(self, m: Module, ends: Value, totals: list[Signal], taken: Signal) -> None:
        """The sum of p over what is taken, of the one row."""
        amounts = []
        for i, total in enumerate(totals):
            amount_1, amount_2, amount_3 = (
                Signal.like(total, name=f"amount_{stage}_{i}", reset_less=stage > 1) for stage in (1, 2, 3))
            m.d.sync += [amount_1.eq(total), amount_2.eq(amount_1), amount_3.eq(amount_2)]
            with m.If(~ends | (~self._by_token & (i > 0))):
                m.d.sync += amount_1.eq(0)
            amounts.append(Mux(taken[i], amount_3, 0))
        amount, total = Signal(self.shapes.denominator), Signal(self.shapes.denominator)
        m.d.sync += [amount.eq(sum(amounts)), total.eq(total + amount), self.sum.eq(total)]
        with m.If(self.sweep_valid):
            m.d.sync += total.eq(0)

    def _mark_units(self, m: Module, about: data.View, ends: Value, there: Value, taken: Signal) -> None:
        """Stage 3: hands out the marks of a unit at its end, a codeword a cycle, or of the tokens of a codeword."""
        tokens, by_token = self.config.tokens_per_codeword, self._by_token
        closes = Signal(3)
        rings = [Signal(self.shapes.ring, name=f"unit_ring_{i}", reset_less=True) for i in (1, 2, 3)]   # of its first
        m.d.sync += [closes.eq(Cat(about.closes, closes)), *(after.eq(before) for before, after in pairwise(rings))]
        with m.If(self._now_valid & self._scores[-1].first):
            m.d.sync += rings[0].eq(about.ring)
        earlier = Signal(tokens)
        collected = Cat(earlier, taken)[self._wide :]
        left = Signal.like(self._more)
        m.d.sync += [self.mark_valid.eq(left != 0), self.mark_ring.eq(self.mark_ring + 1), left.eq(left - (left != 0))]
        with m.If(ends):
            m.d.sync += earlier.eq(collected)
        with m.If(ends & self._marking & (~by_token | closes[-1])):
            m.d.sync += [
                self.mark_valid.eq(1),
                self.mark_ring.eq(rings[-1]),
                self.mark_bits.eq(Mux(by_token, collected, taken[0].replicate(tokens))),
                left.eq(self._more),
            ]
        with m.If(self.sweep_valid):
            m.d.sync += self.unmarked.eq(0)
        with m.Elif(self._marking & (there & ~taken).any()):
            m.d.sync += self.unmarked.eq(1)

    def _mark(self, m: Module, valid: Signal, step: data.View, taken: Signal) -> None:
        """Collects a codeword's marks and hands them out."""
        tokens, wide = self.config.tokens_per_codeword, self._wide
        earlier = Signal(tokens)
        collected = Cat(earlier, taken)[wide:]
        m.d.sync += [
            self.mark_valid.eq(valid & self._marking & (self._centroid | (step.index == tokens - wide))),
            self.mark_ring.eq(step.ring),
            self.mark_bits.eq(Mux(self._centroid, taken[0].replicate(tokens), collected)),
        ]
        with m.If(valid):
            m.d.sync += earlier.eq(collected)
        left_out = step.inside & ~taken
        with m.If(self.sweep_valid):
            m.d.sync += self.unmarked.eq(0)
        with m.Elif(valid & self._marking & Mux(self._centroid, left_out[0], left_out.any())):
            m.d.sync += self.unmarked.eq(1)

    def _queue(self, m: Module, walk: GroupWalk, push: Signal, step: data.View, counts: Signal,
               valid: Signal) -> Signal:
        """Steps of whose tokens p is wanted, one row after the other; the room that is left for more."""
        shapes = self.shapes
        enter, pop = Signal(), Signal()
        waiting = data.StructLayout({"step": step.shape(), "counts": self._wide})
        m.submodules.fifo = fifo = Queue(waiting, DEPTH)
        room = Signal(range(DEPTH + 1), init=DEPTH)
        token = fifo.o.payload.step
        row, last_row = Signal(shapes.row), Signal(shapes.row)
        at_last = Signal()
        m.d.comb += [
            walk.room.eq(room != 0),
            fifo.i.valid.eq(push),
            fifo.i.payload.step.eq(step),
            fifo.i.payload.counts.eq(counts),
            fifo.o.ready.eq(pop),
            self.score_ask.eq(fifo.o.valid),
            enter.eq(self.score_ask & self.score_grant),
            at_last.eq(row == last_row),
            pop.eq(enter & at_last),
            self.score_address.eq(Cat(
                row[: shapes.row.width if self.config.rows > 1 else 0], token.index[self._wide_bits :], token.ring)),
        ]
        with m.If(enter):
            m.d.sync += row.eq(Mux(at_last, 0, row + 1))
        with m.If(self.reference_write):
            m.d.sync += last_row.eq(self.reference_row)
        m.d.sync += [
            room.eq(room - (walk.go | self._listed.go) + (valid & ~push) + pop),
            self._entered.eq(enter),
            self._scores[0].row.eq(row),
            self._scores[0].position.eq(token.position),
            self._scores[0].first.eq(token.first & (row == 0)),
            self._scores[0].last.eq(token.last & at_last),
            self._scores[0].forced.eq(token.forced),
            self._scores[0].counts.eq(fifo.o.payload.counts),
        ]
        return room

    def _weigh(self, m: Module) -> Value:
        """P of the scores that come; the stages at which there are some."""
        # Cycle 2: scores and reference.  3: their distances.  10: p as floats.  12: fixed point.
        scores = self._scores
        later_valids = Signal(self._latency + 2)
        valids = Cat(self._entered, later_valids)
        m.d.sync += [later_valids.eq(valids), *(after.eq(before) for before, after in pairwise(scores))]
        reference = Signal(self.shapes.score)
        if self._keeps_masses:
            m.d.sync += reference.eq(self._reference(m, scores[0].row))
        else:
            with m.If(self.reference_write):
                m.d.sync += reference.eq(self.reference)
        m.d.comb += [
            self._before_valid.eq(valids[self._latency + 1]),
            self._now_valid.eq(valids[self._latency + 2]),
        ]
        weighed = []
        for i in range(self._wide):
            m.submodules[f"exponential_{i}" if self._wide > 1 else "exponential"] = exponential = Exponential()
            distance, is_masked = Signal(signed(SCORE_BITS + 1), name=f"distance_{i}"), Signal(name=f"is_masked_{i}")
            m.d.sync += [
                distance.eq(self.scores[i] - reference),
                is_masked.eq((self.scores[i] == SCORE_MASKED) | ~scores[1].counts[i]),
            ]
            m.d.comb += [exponential.distance.eq(distance), exponential.masked.eq(is_masked)]
            weighed.append(in_window(m, exponential))
        # Where masses are kept the sum is of tokens, too, for their row.
        summed = weighed if self._keeps_masses else [
            p if i == 0 else Mux(self._by_token, 0, p) for i, p in enumerate(weighed)]
        # With several of them their sum is registered, too.
        domain = m.d.sync if self._wide > 1 else m.d.comb
        domain += [self._p_sum.eq(sum(summed[1:], start=summed[0])),
                   *(p.eq(one) for p, one in zip(self._p, weighed, strict=True))]
        return valids

    def _reference(self, m: Module, row: Value) -> Value:
        """What scores of this row are compared with, in the same cycle."""
        m.submodules.references = references = Memory(
            shape=self.shapes.score, depth=1 << self.shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        read, write = references.read_port(domain="comb"), references.write_port(domain="sync")
        m.d.comb += [
            write.addr.eq(self.reference_row),
            write.data.eq(self.reference),
            write.en.eq(self.reference_write),
            read.addr.eq(row),
        ]
        return read.data

    def _sum_rows(self, m: Module) -> None:
        """Each row's sum: read and add in one cycle, write in the next."""
        shapes = self.shapes
        earlier, before, now = self._scores[-3:]   # cycles 11 to 13, or 12 to 14
        m.submodules.sums = sums = Memory(
            shape=shapes.denominator, depth=1 << shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        old, seen = sums.read_port(domain="comb"), sums.read_port(domain="comb")
        write = sums.write_port(domain="sync")
        untouched = Signal(1 << shapes.row.width)   # rows whose sum is zero, whatever the memory says
        total = Signal(shapes.denominator)
        row = Signal(shapes.row)
        # Of `before`: the same row comes in the next cycle if there is but one; none came yet.
        again, first = Signal(), Signal()
        m.d.comb += [
            old.addr.eq(before.row),
            write.addr.eq(now.row),
            write.data.eq(total),
            write.en.eq(self._now_valid),
            seen.addr.eq(row),
        ]
        m.d.sync += [
            again.eq(self._before_valid & (before.row == earlier.row)),
            first.eq(untouched.bit_select(earlier.row, 1) & ~(self._now_valid & (now.row == earlier.row))),
            total.eq(Mux(again, total, Mux(first, 0, old.data)) + self._p_sum),
            row.eq(self.sum_row),
            self.sum.eq(Mux(untouched.bit_select(row, 1), 0, seen.data)),
        ]
        with m.If(self._now_valid):
            m.d.sync += untouched.bit_select(now.row, 1).eq(0)
        with m.If(self.sweep_valid):
            m.d.sync += untouched.eq(~0)

    def _sum_masses(self, m: Module) -> list[Signal]:
        """The units' masses over all rows, to be kept, and their lengths in bits."""
        before, now = self._scores[-2:]
        m.d.sync += self._mass_position.eq(now.position)
        lengths = []
        for i in range(self._wide):
            total = Signal(self._total_bits, name=f"total_{i}")
            # A unit of many tokens has its mass in the first of the sums.
            addend = Mux(self._by_token, self._p[0], self._p_sum) if i == 0 else self._p[i]
            with m.If(self._before_valid):
                m.d.sync += total.eq(Mux(before.first, 0, total) + addend)
            ends = self._now_valid & now.last & self._massing
            m.d.sync += self._mass_valids[i].eq(ends & Mux(self._by_token, now.counts[i], i == 0))
            lengths.append(self._mass_and_length(m, i, total))
        return lengths

    def _sum_units(self, m: Module) -> tuple[list[Signal], list[Signal]]:
        """What p comes to in each unit, whether this begins before the end, and, a cycle later, masses and lengths."""
        before = self._scores[-2]
        totals = [Signal(self._total_bits if i == 0 else VALUE_FRACTION + 1, name=f"total_{i}")
                  for i in range(self._wide)]
        with m.If(self._before_valid):
            m.d.sync += [
                totals[0].eq(Mux(before.first, 0, totals[0]) + self._p_sum),
                # These are tokens.
                *(total.eq(p) for total, p in zip(totals[1:], self._p[1:], strict=True)),
            ]
            with m.If(before.first):
                m.d.sync += self._begins.eq(before.counts[0])
        return totals, [self._mass_and_length(m, i, total) for i, total in enumerate(totals)]

    def _mass_and_length(self, m: Module, i: int, total: Signal) -> Signal:
        """The mass of the i-th unit `now`, from its total; its length in bits; both a cycle later."""
        whole = total[VALUE_FRACTION - MASS_FRACTION :]
        top = (1 << MASS_BITS) - 2
        forced, mass = Signal(name=f"forced_{i}"), self._masses[i]
        now_forced = self._scores[-1].forced[i]
        m.d.sync += [forced.eq(now_forced), mass.eq(Mux(now_forced, top + 1, Mux(whole > top, top, whole)))]
        length = Signal(range(LENGTH_FORCED + 1), name=f"length_{i}")
        for bit in range(MASS_BITS):
            with m.If(mass[bit]):
                m.d.comb += length.eq(bit + 1)
        with m.If(forced):
            m.d.comb += length.eq(LENGTH_FORCED)
        return length

    def _count(self, m: Module, valids: Value, digits: list[Value]) -> Value:
        """Histogram of lengths or digits, in a part for each place of a step; the stages at which there is one.

        A count is of the sweep whose number stands beside it.  Each sweep clears a bin, so that each of them is cleared
        before the numbers come round again.  After reset all of them are: nobody knows what the memory says.
        """
        asked, number = Signal(DIGIT_BITS), Signal(DIGIT_BITS + 1)
        cleared = Signal(DIGIT_BITS + 1)
        clearing = ~cleared[-1]
        counted = data.StructLayout({"count": self.shapes.unit_count, "sweep": number.shape()})
        m.d.sync += [asked.eq(self.bin), number.eq(number + self.sweep_valid), cleared.eq(cleared + clearing)]
        counts, stages = [], []
        for i, digit in enumerate(digits):
            m.submodules[f"histogram_{i}"] = histogram = Memory(
                shape=counted, depth=1 << DIGIT_BITS, init=[], attrs={"ram_style": "distributed"})
            old, seen = histogram.read_port(domain="comb"), histogram.read_port(domain="comb")
            write = histogram.write_port(domain="sync")
            bin_1, bin_2 = Signal(DIGIT_BITS, name=f"bin_1_{i}"), Signal(DIGIT_BITS, name=f"bin_2_{i}")
            bin_valid_1, bin_valid_2 = Signal(name=f"bin_valid_1_{i}"), Signal(name=f"bin_valid_2_{i}")
            count = Signal(self.shapes.unit_count, name=f"count_{i}")
            m.d.comb += [
                old.addr.eq(bin_1),
                write.addr.eq(Mux(bin_valid_2, bin_2, Mux(clearing, cleared, number))),
                write.data.count.eq(Mux(bin_valid_2, count, 0)),
                write.data.sweep.eq(number),
                write.en.eq(bin_valid_2 | self.sweep_valid | clearing),
                seen.addr.eq(asked),
            ]
            before = Mux(old.data.sweep == number, old.data.count, 0)
            m.d.sync += [
                bin_valid_1.eq(valids[i]),
                bin_1.eq(digit),
                bin_valid_2.eq(bin_valid_1),
                bin_2.eq(bin_1),
                count.eq(Mux(bin_valid_2 & (bin_1 == bin_2), count, before) + 1),
            ]
            counts.append(Mux(seen.data.sweep == number, seen.data.count, 0))
            stages += [bin_valid_1, bin_valid_2]
        m.d.sync += self.count.eq(sum(counts))
        return Cat(stages, clearing)
