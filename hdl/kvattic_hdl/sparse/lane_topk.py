"""A lane's part in the selection: sweeps through the scores of a job's first pass for sums, masses and marks."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
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
from kvattic_hdl.lib.interfaces import LENGTH_FORCED, MODE_BITS, RANK_BITS, TOKEN_BITS, Shapes, Sweep


class Selector(wiring.Component):
    """Sweeps through the tokens (or units) of a job's stripes in this lane's list, for the central `Selection`.

    From `sweep_valid` to `done`, if every `score_ask` is granted (one that is not costs its cycle):

    ===== ================================ ==============================================================
    sweep cycles                           512 tokens in two stripes, one row
    ===== ================================ ==============================================================
    SUM   24 + a cycle for each score      536
    MASS  27 + a cycle for each score      539
    DIGIT 11 + a cycle for each unit       523 (SPARF)
    MARK  10 to 24 + a cycle for a token   522 to 536; in CENTROID 10 + a cycle for a codeword (266)
    ===== ================================ ==============================================================

    Scores are those before `end_token`, of each row that has a reference; those of stripes that are attended whole
    count in SUM and MARK only, in CENTROID never.  MARK reads the scores of selected tokens beside its walk, and waits
    where it has found many with many rows.  Tokens are walked in the order of the list; a stripe shorter than four
    steps takes four.  Reset forgets the sweep.

    Parameters
    ----------
    config : Config
        One with `sparse`.

    Members
    -------
    sweep_valid, sweep : In(1), In(Shapes.sweep)
        Strobe: begin this sweep.  Not before `done`.
    done : Out(1)
        Low from the cycle after `sweep_valid` until the sweep's results can be read.
    slot : Out(slot)
        The sweep's job; from the cycle after `sweep_valid` on.  The six members below are its parameters, in the same
        cycle, constant during the sweep.
    mode : In(2)
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
        Read address of the score memory: Cat(row, index, ring).
    score_ask, score_grant : Out(1), In(1)
        The address is wanted; it is taken in this cycle.
    score : In(score)
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

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.address_bits = (shapes.score_words - 1).bit_length()
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
            "score": In(shapes.score),
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

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        tokens, index_bits = config.tokens_per_codeword, config.slot_bits_per_codeword
        group_tokens = config.group_tokens
        group_bits = ceil_log2(group_tokens)
        position_bits = ceil_log2(config.ring_codewords * tokens)

        # ------------------------------------------------ walk: one step a token, a unit or a codeword

        # The job's parameters do not change during its sweep.
        sweep = Signal(shapes.sweep)
        centroid, marking, by_unit, massing = Signal(), Signal(), Signal(), Signal()
        unit_mask = Signal(group_bits)            # tokens of a unit - 1
        step = Signal(group_bits + 1)             # tokens of a step
        unit_mask_now = Mux(self.mode == Mode.SPARF, 0, ((tokens << self.unit_bits) - 1))
        m.d.comb += [
            self.slot.eq(sweep.slot),
            centroid.eq(self.mode == Mode.CENTROID),
            marking.eq(sweep.op == Sweep.MARK),
            massing.eq(sweep.op == Sweep.MASS),
            by_unit.eq((sweep.op == Sweep.DIGIT) | (centroid & ~marking)),
        ]
        m.d.sync += [
            unit_mask.eq(unit_mask_now),
            step.eq(Mux(by_unit, unit_mask + 1, Mux(centroid, tokens, 1))),
        ]

        # The next stripe stands ready: its address, its entry, the entry kept, its token's distance to the ends.
        index = Signal(shapes.list_bits)
        settled = Signal(3)
        stripe_token, stripe_whole = Signal(TOKEN_BITS), Signal()
        to_end, to_local, to_sinks = (
            Signal(signed(TOKEN_BITS + 1), name=f"to_{name}") for name in ("end", "local", "sinks"))
        m.d.comb += self.stripe_address.eq(Cat(index, self.slot))
        m.d.sync += [
            settled.eq(Cat(Const(1, 1), settled)),
            stripe_token.eq(self.stripe_token),
            stripe_whole.eq(self.stripe_whole),
            to_end.eq(self.end_token - stripe_token),
            to_local.eq(self.local_token - stripe_token),
            to_sinks.eq(self.sinks - stripe_token),
        ]

        def clamped(distance):
            """Tokens of the stripe below a limit that is so far from its first."""
            inside = Mux(distance[group_bits:-1].any(), group_tokens, distance[:group_bits])
            return Mux(distance[-1], 0, inside)

        running, begin = Signal(), Signal()
        left = Signal.like(self.stripes)
        within = Signal()
        base, whole = Signal(TOKEN_BITS), Signal()
        number = Signal(shapes.list_bits)
        offset, after = Signal(group_bits), Signal(group_bits + 2)   # token inside of the stripe, and the next one
        # Tokens before the end, before the local window, and that are sinks.
        limit, local_limit, sink_limit = (
            Signal(group_bits + 1, name=name) for name in ("limit", "local_limit", "sink_limit"))
        depth = 16
        room = Signal(range(depth + 1), init=depth)
        go, last_step, fetch, useful = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            go.eq(within & (room != 0)),
            after.eq(offset + step),
            last_step.eq(after >= Mux(marking, group_tokens, limit)),
            fetch.eq(running & ~begin & (left != 0) & settled[-1] & (~within | (go & last_step))),
            useful.eq(marking | ((to_end > 0) & ~(stripe_whole & (by_unit | massing)))),
        ]
        with m.If(go):
            m.d.sync += [offset.eq(after), within.eq(~last_step)]
        with m.If(fetch):
            m.d.sync += [
                base.eq(stripe_token),
                whole.eq(stripe_whole),
                limit.eq(clamped(to_end)),
                local_limit.eq(clamped(to_local)),
                sink_limit.eq(clamped(to_sinks)),
                number.eq(index),
                offset.eq(0),
                within.eq(useful),
                left.eq(left - 1),
                index.eq(index + 1),
                settled.eq(0),
            ]
        with m.If(begin):
            m.d.sync += left.eq(self.stripes)
        with m.Elif(~within & (left == 0)):
            m.d.sync += running.eq(0)
        m.d.sync += begin.eq(self.sweep_valid)
        with m.If(self.sweep_valid):
            m.d.sync += [sweep.eq(self.sweep), running.eq(1), index.eq(0), settled.eq(0)]

        # ------------------------------------------------ a step: what is known of its unit

        unit_offset = offset & ~unit_mask
        position = Cat(offset, number)[:position_bits]
        unit_position = Cat(unit_offset, number)[:position_bits]
        step_shape = data.StructLayout({
            "index": index_bits,
            "ring": shapes.ring,
            "position": position_bits,   # of the unit's first token, in the lane's list
            "first": 1,                  # the unit's first step
            "last": 1,                   # its last one
            "forced": 1,                 # of sinks, or reaches into the local window
            "whole": 1,
            "inside": 1,                 # before the end
        })
        step_1, step_2, step_3 = (Signal(step_shape, name=f"step_{i}", reset_less=True) for i in (1, 2, 3))
        valid_1, valid_2, valid_3 = (Signal(name=f"step_valid_{i}") for i in (1, 2, 3))
        token_1, token_2 = (Signal(TOKEN_BITS, name=f"unit_token_{i}", reset_less=True) for i in (1, 2))
        m.d.sync += [
            valid_1.eq(go),
            valid_2.eq(valid_1),
            valid_3.eq(valid_2),
            step_1.index.eq(offset[:index_bits]),
            step_1.ring.eq(self.ring_base + position[index_bits:]),
            step_1.position.eq(unit_position),
            step_1.first.eq(by_unit | ((offset & unit_mask) == 0)),
            step_1.last.eq(by_unit | ((offset & unit_mask) == unit_mask) | last_step),
            step_1.forced.eq(((offset | unit_mask) >= local_limit) | (unit_offset < sink_limit)),
            step_1.whole.eq(whole),
            step_1.inside.eq(offset < limit),
            token_1.eq(base + unit_offset),
            step_2.eq(step_1),
            step_3.eq(step_2),
            token_2.eq(token_1),
        ]

        # Masses, at the place of their unit's first token.
        m.submodules.masses = masses = Memory(
            shape=MASS_BITS, depth=1 << position_bits, init=[], attrs={"ram_style": "block"})
        mass_read, mass_write = masses.read_port(domain="sync"), masses.write_port(domain="sync")
        mass_2 = Signal(MASS_BITS, reset_less=True)
        m.d.comb += mass_read.addr.eq(unit_position)
        m.d.sync += mass_2.eq(mass_read.data)

        # Its rank against the prefix; and the digit behind it, out of the two aligned ones in which it stands.
        rank_2 = Cat(~token_2, mass_2)
        mask = Signal(RANK_BITS)
        aligned_number, aligned_shift = Signal(range(RANK_BITS // DIGIT_BITS + 1)), Signal(range(DIGIT_BITS + 1))
        padded = Cat(Const(0, 3 * DIGIT_BITS - RANK_BITS % DIGIT_BITS), rank_2)
        aligned = [padded[len(padded) - (i + 2) * DIGIT_BITS : len(padded) - i * DIGIT_BITS]
                   for i in range(RANK_BITS // DIGIT_BITS + 1)]
        selected, matches = Signal(), Signal()
        digit_3 = Signal(DIGIT_BITS)
        m.d.sync += [
            mask.eq(~(Const((1 << RANK_BITS) - 1) >> sweep.bits)),
            aligned_number.eq(Array(i // DIGIT_BITS for i in range(RANK_BITS + 1))[sweep.bits]),
            aligned_shift.eq(Array(DIGIT_BITS - i % DIGIT_BITS for i in range(RANK_BITS + 1))[sweep.bits]),
            selected.eq((rank_2 & mask) >= sweep.prefix),
            matches.eq(((rank_2 ^ sweep.prefix) & mask) == 0),
            digit_3.eq(Array(aligned)[aligned_number] >> aligned_shift),
        ]
        with m.If(~self.sweep_valid & ~begin):
            m.d.sync += sweep.prefix.eq(sweep.prefix & mask)    # once would do

        # ------------------------------------------------------------------ marks

        taken_3 = Signal()
        earlier = Signal(tokens)
        m.d.comb += taken_3.eq(step_3.inside & (step_3.whole | selected))
        m.d.sync += [
            self.mark_valid.eq(valid_3 & marking & (centroid | (step_3.index == tokens - 1))),
            self.mark_ring.eq(step_3.ring),
            self.mark_bits.eq(Mux(centroid, taken_3.replicate(tokens), Cat(earlier, taken_3)[1:])),
        ]
        with m.If(valid_3):
            m.d.sync += earlier.eq(Cat(earlier, taken_3)[1:])
        with m.If(self.sweep_valid):
            m.d.sync += self.unmarked.eq(0)
        with m.Elif(valid_3 & marking & step_3.inside & ~taken_3):
            m.d.sync += self.unmarked.eq(1)

        # --------------------------------------- tokens whose p is wanted, one row after the other

        push, enter, pop = Signal(), Signal(), Signal()
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=step_shape.size, depth=depth)
        m.d.comb += [
            push.eq(valid_3 & Mux(marking, taken_3 & ~centroid, sweep.op != Sweep.DIGIT)),
            fifo.w_en.eq(push),
            fifo.w_data.eq(step_3),
            fifo.r_en.eq(pop),
        ]
        m.d.sync += room.eq(room - go + (valid_3 & ~push) + pop)
        token = data.View(step_shape, fifo.r_data)
        row, last_row = Signal(shapes.row), Signal(shapes.row)
        at_last = Signal()
        m.d.comb += [
            self.score_ask.eq(fifo.r_rdy),
            enter.eq(self.score_ask & self.score_grant),
            at_last.eq(row == last_row),
            pop.eq(enter & at_last),
            self.score_address.eq(Cat(row[: shapes.row.width if config.rows > 1 else 0], token.index, token.ring)),
        ]
        with m.If(enter):
            m.d.sync += row.eq(Mux(at_last, 0, row + 1))
        m.submodules.references = references = Memory(
            shape=shapes.score, depth=1 << shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        reference_read, reference_write = references.read_port(domain="comb"), references.write_port(domain="sync")
        m.d.comb += [
            reference_write.addr.eq(self.reference_row),
            reference_write.data.eq(self.reference),
            reference_write.en.eq(self.reference_write),
        ]
        with m.If(self.reference_write):
            m.d.sync += last_row.eq(self.reference_row)

        # Cycle 2: score and reference.  3: their distance.  10: p as a float.  12: fixed point.
        latency = 3 + Exponential.LATENCY
        key_shape = data.StructLayout({
            "row": shapes.row, "position": position_bits, "first": 1, "last": 1, "forced": 1})
        keys = [Signal(key_shape, name=f"key_{i}", reset_less=True) for i in range(1, latency + 4)]
        valids = Signal(latency + 3)
        m.d.sync += [
            valids.eq(Cat(enter, valids)),
            keys[0].row.eq(row),
            keys[0].position.eq(token.position),
            keys[0].first.eq(token.first & (row == 0)),
            keys[0].last.eq(token.last & at_last),
            keys[0].forced.eq(token.forced),
        ]
        m.d.sync += [b.eq(a) for a, b in zip(keys, keys[1:], strict=False)]
        m.submodules.exponential = exponential = Exponential()
        reference = Signal(shapes.score)
        distance, is_masked = Signal(signed(SCORE_BITS + 1)), Signal()
        p = in_window(m, exponential)
        m.d.comb += [
            reference_read.addr.eq(keys[0].row),
            exponential.distance.eq(distance),
            exponential.masked.eq(is_masked),
        ]
        m.d.sync += [
            reference.eq(reference_read.data),
            distance.eq(self.score - reference),
            is_masked.eq(self.score == SCORE_MASKED),
        ]
        before, now = keys[latency + 1], keys[latency + 2]   # cycles 12 and 13
        before_valid, now_valid = valids[latency + 1], valids[latency + 2]

        # Each row's sum: read and add in one cycle, write in the next.
        m.submodules.sums = sums = Memory(
            shape=shapes.denominator, depth=1 << shapes.row.width, init=[], attrs={"ram_style": "distributed"})
        old, seen = sums.read_port(domain="comb"), sums.read_port(domain="comb")
        sum_write = sums.write_port(domain="sync")
        sum_fresh = Signal(1 << shapes.row.width)
        total = Signal(shapes.denominator)
        sum_row = Signal(shapes.row)
        # The same row comes in the next cycle if there is but one.
        again = now_valid & (now.row == before.row)
        m.d.comb += [
            old.addr.eq(before.row),
            sum_write.addr.eq(now.row),
            sum_write.data.eq(total),
            sum_write.en.eq(now_valid),
            seen.addr.eq(sum_row),
        ]
        m.d.sync += [
            total.eq(Mux(again, total, Mux(sum_fresh.bit_select(before.row, 1), 0, old.data)) + p),
            sum_row.eq(self.sum_row),
            self.sum.eq(Mux(sum_fresh.bit_select(sum_row, 1), 0, seen.data)),
        ]
        with m.If(now_valid):
            m.d.sync += sum_fresh.bit_select(now.row, 1).eq(0)
        with m.If(self.sweep_valid):
            m.d.sync += sum_fresh.eq(~0)

        # Each unit's mass.
        most = config.rows * (tokens << config.unit_bits_max)
        mass_sum = Signal(len(p) + ceil_log2(most))
        with m.If(before_valid):
            m.d.sync += mass_sum.eq(Mux(before.first, 0, mass_sum) + p)
        whole = mass_sum[VALUE_FRACTION - MASS_FRACTION :]
        top = (1 << MASS_BITS) - 2
        mass, mass_position, mass_valid = Signal(MASS_BITS), Signal(position_bits), Signal()
        mass_forced = Signal()
        m.d.sync += [
            mass_forced.eq(now.forced),
            mass_valid.eq(now_valid & now.last & massing),
            mass.eq(Mux(now.forced, top + 1, Mux(whole > top, top, whole))),
            mass_position.eq(now.position),
        ]
        length = Signal(range(LENGTH_FORCED + 1))
        for i in range(MASS_BITS):
            with m.If(mass[i]):
                m.d.comb += length.eq(i + 1)
        with m.If(mass_forced):
            m.d.comb += length.eq(LENGTH_FORCED)
        m.d.comb += [
            mass_write.en.eq(mass_valid),
            mass_write.addr.eq(mass_position),
            mass_write.data.eq(mass),
        ]

        # -------------------------------------------------------------- histogram

        m.submodules.histogram = histogram = Memory(
            shape=shapes.unit_count, depth=1 << DIGIT_BITS, init=[], attrs={"ram_style": "distributed"})
        count_old, count_seen = histogram.read_port(domain="comb"), histogram.read_port(domain="comb")
        count_write = histogram.write_port(domain="sync")
        count_fresh = Signal(1 << DIGIT_BITS)
        bin_1, bin_2, asked = Signal(DIGIT_BITS), Signal(DIGIT_BITS), Signal(DIGIT_BITS)
        bin_valid_1, bin_valid_2 = Signal(), Signal()
        count = Signal(shapes.unit_count)
        m.d.comb += [
            count_old.addr.eq(bin_1),
            count_write.addr.eq(bin_2),
            count_write.data.eq(count),
            count_write.en.eq(bin_valid_2),
            count_seen.addr.eq(asked),
        ]
        counted = Mux(count_fresh.bit_select(bin_1, 1), 0, count_old.data)
        m.d.sync += [
            bin_valid_1.eq(mass_valid | (valid_3 & matches & (sweep.op == Sweep.DIGIT))),
            bin_1.eq(Mux(massing, length, digit_3)),
            bin_valid_2.eq(bin_valid_1),
            bin_2.eq(bin_1),
            count.eq(Mux(bin_valid_2 & (bin_1 == bin_2), count, counted) + 1),
            asked.eq(self.bin),
            self.count.eq(Mux(count_fresh.bit_select(asked, 1), 0, count_seen.data)),
        ]
        with m.If(bin_valid_2):
            m.d.sync += count_fresh.bit_select(bin_2, 1).eq(0)
        with m.If(self.sweep_valid):
            m.d.sync += count_fresh.eq(~0)

        # ------------------------------------------------------------------ the end

        under_way = Cat(running, room != depth, valids, mass_valid, bin_valid_1, bin_valid_2, self.mark_valid)
        with m.If(self.sweep_valid):
            m.d.sync += self.done.eq(0)
        with m.Elif(~under_way.any()):
            m.d.sync += self.done.eq(1)
        return m
