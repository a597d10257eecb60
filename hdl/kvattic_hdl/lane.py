"""A lane: one flash channel's datapath, from its codewords to its share of each job's scores and sums."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.commands import TABLE_ENTRY, Kind
from kvattic.config import Config
from kvattic.formats import (
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    SIGNIFICAND_BITS,
    VALUE_FRACTION,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
)
from kvattic_hdl.arithmetic import add_carry, decode
from kvattic_hdl.cell import ADDEND_STAGE, HEADROOM, READ_STAGE, SUM_STAGE, Cell
from kvattic_hdl.exponential import Exponential
from kvattic_hdl.intake import Intake
from kvattic_hdl.interfaces import FAULT_BITS, FAULTS, MISSING_BITS, SHIFT_BITS, TOKEN_BITS, Shapes
from kvattic_hdl.records import fields
from kvattic_hdl.score import ScoreUnit, score_interval
from kvattic_hdl.shared import shared
from kvattic_hdl.walker import Walker
from kvattic_hdl.weights import WeightUnit

SETTLE_CYCLES = 4096
"""Cycles after which no beat of an abandoned job can be left inside of a lane."""


class Lane(wiring.Component):
    """Walks each job's pages on its channel, scores K codewords and sums V codewords as they come.

    Takes one beat each cycle, in any order of codewords, of any job in flight.  A V codeword is welcome only while its
    slot's `value_open` is set.  Nothing that a lane computes depends on the order.  What holds a beat back is told by
    `events`: the weight of its token, the score unit (only where rows * score_interval exceeds beats_per_token), or
    nothing at all being there.  A codeword with `error` counts as any other, but the job's report names it.  Reset
    abandons all jobs; `ready` returns when the memories are swept.

    Parameters
    ----------
    config : Config

    Members
    -------
    channel : In(channel)
        The lane's number, constant.
    codewords : In(stream of beat)
    requests : Out(stream of request)
    load_valid, load : In
        Row records, q, and then the table's entries, before `start`; until then they do nothing that the next row
        record of the slot would not undo.
    start_valid, start : In
        A job begins, a cycle or more after its last `load`; its slot must be free.
    live : In(jobs_in_flight)
        The slot's job is in flight: from its `start` until it is freed.
    value_open : In(jobs_in_flight)
        V codewords of the slot are welcome.
    failed : In(jobs_in_flight)
        The slot's job is being abandoned: nothing more is asked for, what comes is dropped.
    keys_done, values_done : Out(jobs_in_flight)
        All of the slot's K (V) codewords of this lane are accounted for; cleared by `start_valid`.
    maximum_slot, maximum_row : In, maximum : Out(score) two cycles later
    maximum_write, maximum_new : In
        Gives the maximum over all lanes back, at the address of the same cycle.
    denominator_slot, denominator_row : In, denominator : Out two cycles later
    chain_i : In(stream of partial), chain_o : Out(stream of partial)
        Adds the lane's sums to each word that passes, and clears them.
    report_slot : In, report : Out(report) two cycles later
    missing_key, missing_value : Out(16)
        Codewords of `report_slot` that were asked for and not accounted for yet, two cycles later.
    events : Out(events)
    offender : Out(tag)
        The tag that the events stale, bad_tag and duplicate are about.
    ready : Out(1)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        super().__init__({
            "channel": In(shapes.channel),
            "codewords": In(stream.Signature(shapes.beat)),
            "requests": Out(stream.Signature(shapes.request)),
            "load_valid": In(1),
            "load": In(shapes.load),
            "start_valid": In(1),
            "start": In(shapes.start),
            "live": In(slots),
            "value_open": In(slots),
            "failed": In(slots),
            "keys_done": Out(slots),
            "values_done": Out(slots),
            "maximum_slot": In(shapes.slot),
            "maximum_row": In(shapes.row),
            "maximum": Out(shapes.score),
            "maximum_write": In(1),
            "maximum_new": In(shapes.score),
            "denominator_slot": In(shapes.slot),
            "denominator_row": In(shapes.row),
            "denominator": Out(shapes.denominator),
            "chain_i": In(stream.Signature(shapes.partial)),
            "chain_o": Out(stream.Signature(shapes.partial)),
            "report_slot": In(shapes.slot),
            "report": Out(shapes.report),
            "missing_key": Out(MISSING_BITS + 1),
            "missing_value": Out(MISSING_BITS + 1),
            "events": Out(shapes.events),
            "offender": Out(shapes.tag),
            "ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        slots, rows, elements = config.jobs_in_flight, config.rows, config.elements_per_beat
        element = config.element.encoding

        # ---------------------------------------------------------------- jobs

        # The slot's list: number of stripes here, and whether the latest one is the job's last.
        entry = fields(TABLE_ENTRY, self.load.data[: TABLE_ENTRY.size * 8])
        stripes = Signal(shapes.walk["stripes"].shape)
        tail, append = Signal(), Signal()
        m.d.comb += append.eq(self.load_valid & self.load.stripe & (entry["channel"] == self.channel))
        with m.If(append):
            m.d.sync += [stripes.eq(stripes + 1), tail.eq(self.load.last)]
        with m.If(self.load_valid & self.load.record):
            m.d.sync += stripes.eq(0)

        def listed(name: str, shape, value):
            """Sync read port, address Cat(number, slot), for one property of the stripes."""
            memory = Memory(shape=shape, depth=slots << shapes.list_bits, init=[], attrs={"ram_style": "block"})
            m.submodules[name] = memory
            write = memory.write_port(domain="sync")
            m.d.comb += [
                write.en.eq(append),
                write.addr.eq(Cat(stripes[: shapes.list_bits], self.load.slot)),
                Value.cast(write.data).eq(value),
            ]
            return memory.read_port(domain="sync")

        job_shape = data.StructLayout({name: field.shape for name, field in shapes.walk} | {
            "tree_token": TOKEN_BITS,
            "k_offset": shapes.start["k_offset"].shape,
            "scale": shapes.start["scale"].shape,
        })
        job = Signal(job_shape)
        started, started_slot = Signal(), Signal(shapes.slot)
        m.d.sync += [
            started.eq(self.start_valid),
            started_slot.eq(self.start.slot),
            job.stripes.eq(stripes),
            job.tail.eq(tail),
        ]
        m.d.sync += [job[name].eq(self.start[name]) for name, _ in job_shape if name not in ("stripes", "tail")]

        def kept(name: str, *fields: str):
            """Comb read port for some fields of each slot's job, in a memory of its own: fields unread cost nothing."""
            memory = Memory(shape=data.StructLayout({f: job_shape[f].shape for f in fields}), depth=slots, init=[],
                            attrs={"ram_style": "distributed"})
            m.submodules[name] = memory
            write = memory.write_port(domain="sync")
            m.d.comb += [write.en.eq(started), write.addr.eq(started_slot)]
            m.d.comb += [write.data[f].eq(job[f]) for f in fields]
            return memory.read_port(domain="comb")

        # ------------------------------------------------------------- walkers

        key_walker = Walker(config, Kind.KEY)
        value_walker = Walker(config, Kind.VALUE)
        m.submodules.key_walker = key_walker
        m.submodules.value_walker = value_walker
        for walker, name in ((key_walker, "key"), (value_walker, "value")):
            port = kept(f"{name}_jobs", *(field for field, _ in shapes.walk))
            stripe_port = listed(f"{name}_stripes", shapes.stripe, Cat(entry[f"{name}_page"], entry["dram"][0]))
            m.d.comb += [
                port.addr.eq(walker.slot),
                Value.cast(walker.job).eq(Value.cast(port.data)),
                stripe_port.addr.eq(walker.stripe_address),
                walker.stripe.eq(stripe_port.data),
                walker.failed.eq(self.failed.bit_select(walker.slot, 1)),
            ]
        m.d.comb += [
            key_walker.enable.eq(started),
            key_walker.enable_slot.eq(started_slot),
            value_walker.enable.eq(key_walker.end),
            value_walker.enable_slot.eq(key_walker.slot),
        ]

        # K runs one job ahead of V: K0 K1 V0 K2 V1 ...; where K can't go on, V does.
        ahead = Signal(range(slots + 1))
        m.d.sync += ahead.eq(ahead + key_walker.end - value_walker.end)
        used = Signal(range(config.ring_codewords + 1))
        key_turn = Signal()
        key_fired, value_fired = Signal(), Signal()
        m.d.comb += [
            key_walker.room.eq(used != config.ring_codewords),
            key_turn.eq(key_walker.requests.valid & ((ahead <= 1) | ~value_walker.ready_to_ask)),
            value_walker.room.eq(1),
            self.requests.valid.eq(key_walker.requests.valid | value_walker.requests.valid),
            self.requests.payload.eq(Mux(key_turn, key_walker.requests.payload, value_walker.requests.payload)),
            key_walker.requests.ready.eq(self.requests.ready & key_turn),
            value_walker.requests.ready.eq(self.requests.ready & ~key_turn),
            key_fired.eq(key_walker.requests.valid & key_walker.requests.ready),
            value_fired.eq(value_walker.requests.valid & value_walker.requests.ready),
        ]

        # The score ring: a job takes the next places as its K codewords are asked for, and gives them back, in slot
        # order, when its V codewords are done.
        ring_shape = data.StructLayout({"base": shapes.ring, "asked": shapes.place.width + 1})
        m.submodules.rings = rings = Memory(
            shape=ring_shape, depth=slots, init=[], attrs={"ram_style": "distributed"})
        ring_write = rings.write_port(domain="sync")
        ring_head, ring_base = Signal(shapes.ring), Signal(shapes.ring)
        m.d.comb += [
            ring_write.addr.eq(key_walker.slot),
            ring_write.en.eq(key_walker.begin | key_fired),
            ring_write.data.base.eq(Mux(key_walker.begin, ring_head, ring_base)),
            ring_write.data.asked.eq(Mux(key_walker.begin, 0, key_walker.requests.payload.tag.place + 1)),
        ]
        with m.If(key_walker.begin):
            m.d.sync += ring_base.eq(ring_head)
        with m.If(key_fired):
            m.d.sync += ring_head.eq(ring_head + 1)

        # ----------------------------------------------------- what is left to do

        active = Signal(slots)
        holds = Signal(slots)
        keys_walked, values_walked = Signal(slots), Signal(slots)
        keys_left = Array(Signal(shapes.place.width + 1, name=f"keys_left_{s}") for s in range(slots))
        values_left = Array(Signal(shapes.place.width + 1, name=f"values_left_{s}") for s in range(slots))
        key_stored, value_stored = Signal(), Signal()
        key_stored_slot, value_stored_slot = Signal(shapes.slot), Signal(shapes.slot)
        abandoned = Signal(slots)
        for s in range(slots):
            key_up, key_down = Signal(name=f"key_up_{s}"), Signal(name=f"key_down_{s}")
            value_up, value_down = Signal(name=f"value_up_{s}"), Signal(name=f"value_down_{s}")
            m.d.comb += [
                key_up.eq(key_fired & (key_walker.slot == s)),
                key_down.eq(key_stored & (key_stored_slot == s)),
                value_up.eq(value_fired & (value_walker.slot == s)),
                value_down.eq(value_stored & (value_stored_slot == s)),
            ]
            m.d.sync += [
                self.keys_done[s].eq(Mux(self.failed[s], abandoned[s], keys_walked[s] & (keys_left[s] == 0))),
                self.values_done[s].eq(Mux(self.failed[s], abandoned[s], values_walked[s] & (values_left[s] == 0))),
            ]
            with m.If(key_up != key_down):
                m.d.sync += keys_left[s].eq(keys_left[s] + Mux(key_up, 1, -1))
            with m.If(value_up != value_down):
                m.d.sync += values_left[s].eq(values_left[s] + Mux(value_up, 1, -1))
            with m.If(key_walker.begin & (key_walker.slot == s)):
                m.d.sync += [active[s].eq(1), holds[s].eq(1)]
            with m.If(key_walker.end & (key_walker.slot == s)):
                m.d.sync += keys_walked[s].eq(1)
            with m.If(value_walker.end & (value_walker.slot == s)):
                m.d.sync += values_walked[s].eq(1)
            with m.If(self.start_valid & (self.start.slot == s)):
                m.d.sync += [
                    active[s].eq(0), keys_walked[s].eq(0), values_walked[s].eq(0), abandoned[s].eq(0),
                    keys_left[s].eq(0), values_left[s].eq(0), self.keys_done[s].eq(0), self.values_done[s].eq(0),
                ]

        oldest = Signal(shapes.slot)
        ring_read = rings.read_port(domain="comb")
        given_back = Signal(shapes.place.width + 1)
        give_back = Signal()
        m.d.comb += [
            ring_read.addr.eq(oldest),
            give_back.eq(holds.bit_select(oldest, 1) & self.values_done.bit_select(oldest, 1)),
            given_back.eq(Mux(give_back, ring_read.data.asked, 0)),
        ]
        m.d.sync += used.eq(used + key_fired - given_back)
        with m.If(give_back):
            m.d.sync += holds.bit_select(oldest, 1).eq(0)
        with m.If(give_back | (~holds.bit_select(oldest, 1) & holds.any())):
            m.d.sync += oldest.eq(Mux(oldest == slots - 1, 0, oldest + 1))

        # -------------------------------------------------------------- intake

        # A V codeword's first weight is there this long after its header; the beats wait as long.
        depth = 1 << (Exponential.LATENCY + 12 + rows - 1).bit_length()
        m.submodules.intake = intake = Intake(config, depth)
        connect(m, flipped(self.codewords), intake.codewords)
        job_port = kept("intake_jobs", "epoch", "stripe_bits")
        stripe_token = listed("stripe_tokens", TOKEN_BITS, self.load.start)
        ring_port = rings.read_port(domain="comb")
        m.d.comb += [
            job_port.addr.eq(intake.slot),
            ring_port.addr.eq(intake.slot),
            intake.epoch.eq(job_port.data.epoch),
            intake.active.eq((active & self.live).bit_select(intake.slot, 1)),
            intake.open.eq(self.value_open.bit_select(intake.slot, 1)),
            intake.failed.eq(self.failed.bit_select(intake.slot, 1)),
            intake.asked.eq(ring_port.data.asked),
            intake.ring_base.eq(ring_port.data.base),
            intake.stripe_bits.eq(job_port.data.stripe_bits),
            intake.stripe_token.eq(stripe_token.data),
            stripe_token.addr.eq(intake.stripe_address),
            self.offender.eq(intake.offender),
        ]

        # An abandoned job: wait until nothing of it can be under way in the lane, clear its arrival bits, report done.
        failed_slot = Signal(shapes.slot)
        settle = Signal(range(SETTLE_CYCLES + 1))
        scrubbed = Signal(shapes.place.width + 1)
        fail_port = rings.read_port(domain="comb")
        for s in range(slots):
            with m.If(self.failed[s]):
                m.d.comb += failed_slot.eq(s)
        m.d.comb += [
            fail_port.addr.eq(failed_slot),
            intake.scrub_ring.eq(fail_port.data.base + scrubbed),
        ]
        with m.If(self.failed.any() & ~abandoned.bit_select(failed_slot, 1)):
            with m.If(settle != SETTLE_CYCLES):
                m.d.sync += settle.eq(settle + 1)
            with m.Elif(scrubbed != Mux(holds.bit_select(failed_slot, 1), fail_port.data.asked, 0)):
                m.d.comb += intake.scrub.eq(1)
                with m.If(intake.scrubbed):
                    m.d.sync += scrubbed.eq(scrubbed + 1)
            with m.Elif(keys_walked.bit_select(failed_slot, 1) & values_walked.bit_select(failed_slot, 1)):
                m.d.sync += abandoned.bit_select(failed_slot, 1).eq(1)
        with m.Elif(~self.failed.any()):
            m.d.sync += [settle.eq(0), scrubbed.eq(0)]

        # --------------------------------------------------------------- issue

        m.submodules.weight_unit = weight_unit = WeightUnit(config, intake.header_depth)
        connect(m, intake.value_requests, weight_unit.requests)
        header = intake.headers.payload
        token_index = Signal(shapes.lane_token["index"].shape)
        beat_index = Signal(shapes.beat_index)
        first, last, last_token = Signal(), Signal(), Signal()
        waits_weight, waits_score, there, issue = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            first.eq(beat_index == 0),
            last.eq(beat_index == config.beats_per_token - 1),
            last_token.eq(token_index == config.tokens_per_codeword - 1),
            there.eq(intake.headers.valid & intake.beats.valid),
            issue.eq(there & ~waits_weight & ~waits_score),
            intake.beats.ready.eq(issue),
            intake.headers.ready.eq(issue & last & last_token),
        ]
        with m.If(issue):
            m.d.sync += beat_index.eq(beat_index + 1)
            with m.If(last):
                m.d.sync += [beat_index.eq(0), token_index.eq(token_index + 1)]
                with m.If(last_token):
                    m.d.sync += token_index.eq(0)

        # The weights of the next V token are gathered while the current ones are in use.
        weight_shape = data.ArrayLayout(shapes.weight, rows)
        gathered, weights_1 = Signal(weight_shape), Signal(weight_shape)
        gathered_rows = Signal(range(rows + 1))
        full, use, gather = Signal(), Signal(), Signal()
        m.d.comb += [
            full.eq(gathered_rows == rows),
            waits_weight.eq(~header.key & first & ~full),
            use.eq(issue & ~header.key & first),
            weight_unit.weights.ready.eq(~full | use),
            gather.eq(weight_unit.weights.valid & weight_unit.weights.ready),
        ]
        with m.If(use):
            m.d.sync += [weights_1.eq(gathered), gathered_rows.eq(gather)]
        with m.Else():
            m.d.sync += gathered_rows.eq(gathered_rows + gather)
        with m.If(gather):
            m.d.sync += gathered.as_value().eq(
                Cat(gathered.as_value(), weight_unit.weights.payload.as_value())[shapes.weight.size :])

        # The score unit takes a token every rows * interval cycles.
        spacing = rows * score_interval(config)
        if spacing > config.beats_per_token:
            rest = Signal(range(spacing))
            m.d.comb += waits_score.eq(header.key & last & (rest != 0))
            with m.If(issue & header.key & last):
                m.d.sync += rest.eq(spacing - 1)
            with m.Elif(rest != 0):
                m.d.sync += rest.eq(rest - 1)

        # What rides along with a beat.
        copy = Signal(range(max(2, shapes.copies)))
        ride = data.StructLayout({
            "valid": 1, "key": 1, "error": 1, "first": 1, "last": 1, "beat": shapes.beat_index,
            "copy": copy.shape(), "where": shapes.lane_token})
        levels = (elements - 1).bit_length()
        tree_stage = ADDEND_STAGE + levels
        pipe = [Signal(ride, name=f"ride_{i}") for i in range(max(tree_stage + 1, SUM_STAGE) + 1)]
        m.d.comb += [
            pipe[0].valid.eq(issue),
            pipe[0].key.eq(header.key),
            pipe[0].error.eq(header.error),
            pipe[0].first.eq(first),
            pipe[0].last.eq(last),
            pipe[0].beat.eq(beat_index),
            pipe[0].copy.eq(copy),
            pipe[0].where.slot.eq(header.slot),
            pipe[0].where.ring.eq(header.ring),
            pipe[0].where.index.eq(token_index),
            pipe[0].where.token.eq(header.token + token_index),
            pipe[0].where.last.eq(last_token),
        ]
        m.d.sync += [b.eq(a) for a, b in zip(pipe, pipe[1:], strict=False)]
        if shapes.copies > 1:
            with m.If(issue & last):
                m.d.sync += copy.eq(Mux(copy == shapes.copies - 1, 0, copy + 1))

        # ---------------------------------------------- stages 1 to 3: operands

        queries = []
        for r in range(rows):
            memory = Memory(shape=config.beat_bytes * 8, depth=slots << shapes.beat_index.width, init=[],
                            attrs={"ram_style": "block"})
            m.submodules[f"query_{r}"] = memory
            port, write = memory.read_port(domain="sync"), memory.write_port(domain="sync")
            m.d.comb += [
                port.addr.eq(Cat(beat_index, header.slot)),
                write.addr.eq(Cat(self.load.beat, self.load.slot)),
                write.data.eq(self.load.data),
                write.en.eq(self.load_valid & self.load.query & (self.load.row == r)),
            ]
            queries.append(port.data)
        beat_1 = Signal(config.beat_bytes * 8)
        m.d.sync += beat_1.eq(intake.beats.payload)

        scale_port = kept("k_offsets", "k_offset")
        m.d.comb += scale_port.addr.eq(pipe[1].where.slot)
        base_2 = Signal(signed(SHIFT_BITS))
        # K: the window's top is HEADROOM above an unshifted product; q's significand stands WEIGHT_BITS - 11 high, and
        # -exponent = ~exponent + 1.  V: the weight is significand * 2**-(exponent + WEIGHT_BITS - 1).
        key_base = HEADROOM + (WEIGHT_BITS - SIGNIFICAND_BITS) + 1
        value_base = HEADROOM - (VALUE_FRACTION - (WEIGHT_BITS - 1) - element.offset)
        m.d.sync += base_2.eq(Mux(pipe[1].key, key_base - scale_port.data.k_offset, value_base))
        special_2 = Signal(elements)
        cells = []
        for r in range(rows):
            cells.append([])
            for e in range(elements):
                cell, m.submodules[f"cell_{r}_{e}"] = shared(platform, "kvattic_cell", lambda: Cell(config))
                cells[r].append(cell)
        exponents_b = [Signal(element.exponent_bits, name=f"exponent_b_{e}") for e in range(elements)]
        for e in range(elements):
            b = decode(beat_1.word_select(e, 16), element)
            significand_b = Signal(SIGNIFICAND_BITS, name=f"significand_b_{e}")
            m.d.sync += [significand_b.eq(b.significand), exponents_b[e].eq(b.exponent), special_2[e].eq(b.special)]
            for r in range(rows):
                cell = cells[r][e]
                a = decode(queries[r].word_select(e, 16), element)
                significand_a = Signal(WEIGHT_BITS, name=f"significand_a_{r}_{e}")
                sign = Signal(name=f"sign_{r}_{e}")
                exponent_a = Signal(signed(max(element.exponent_bits, WEIGHT_EXPONENT_BITS) + 1),
                                    name=f"exponent_a_{r}_{e}")
                shift_3 = Signal(signed(SHIFT_BITS), name=f"shift_{r}_{e}")
                with m.If(pipe[1].key):
                    m.d.sync += [
                        significand_a.eq(a.significand << (WEIGHT_BITS - SIGNIFICAND_BITS)),
                        sign.eq(a.sign ^ b.sign),
                        exponent_a.eq(~Cat(a.exponent, Const(0, 1)).as_signed()),
                    ]
                with m.Else():
                    m.d.sync += [
                        significand_a.eq(weights_1[r].significand),
                        sign.eq(b.sign),
                        exponent_a.eq(weights_1[r].exponent),
                    ]
                m.d.sync += shift_3.eq(base_2 + exponent_a - exponents_b[e])
                m.d.comb += [
                    cell.a_significand.eq(significand_a),
                    cell.b_significand.eq(significand_b),
                    cell.sign.eq(sign),
                    cell.shift.eq(shift_3),
                    cell.key.eq(pipe[3].key),
                ]

        # ------------------------------------- stages 4 to 7: sums of V, and their drain

        drain_5, drain_6, drain_7 = (Signal(name=f"drain_{i}") for i in (5, 6, 7))
        drain_4 = Signal()
        value_4 = pipe[READ_STAGE].valid & ~pipe[READ_STAGE].key
        value_6 = pipe[ADDEND_STAGE].valid & ~pipe[ADDEND_STAGE].key
        value_7 = pipe[SUM_STAGE].valid & ~pipe[SUM_STAGE].key
        word = self.chain_i.payload

        def address(slot, beat, copy_):
            parts = [beat]
            if shapes.copies > 1:
                parts.append(copy_)
            low = Cat(*parts)
            return Cat(low[: shapes.drain_address.width], slot)

        drain_address = Cat(word.address, word.slot)
        sweep = Signal(range((slots << shapes.drain_address.width) + 1))
        swept = Signal()
        m.d.comb += [
            swept.eq(sweep == slots << shapes.drain_address.width),
            self.ready.eq(swept & intake.ready),
            drain_4.eq(self.chain_i.valid & ~value_4 & ~drain_5 & ~drain_6 & ~drain_7 & ~self.chain_o.valid),
            self.chain_i.ready.eq(drain_6),
        ]
        m.d.sync += [drain_5.eq(drain_4), drain_6.eq(drain_5), drain_7.eq(drain_6)]
        with m.If(~swept):
            m.d.sync += sweep.eq(sweep + 1)
        with m.If(self.chain_o.valid & self.chain_o.ready):
            m.d.sync += self.chain_o.valid.eq(0)
        with m.If(drain_6):
            m.d.sync += [
                self.chain_o.valid.eq(1),
                self.chain_o.payload.slot.eq(word.slot),
                self.chain_o.payload.address.eq(word.address),
            ]
        drained_address = Signal.like(drain_address)
        with m.If(drain_6):
            m.d.sync += drained_address.eq(drain_address)
        at_4, at_7 = pipe[READ_STAGE], pipe[SUM_STAGE]
        read_address, write_address = Signal.like(drain_address), Signal.like(drain_address)
        m.d.comb += [
            read_address.eq(Mux(value_4, address(at_4.where.slot, at_4.beat, at_4.copy), drain_address)),
            write_address.eq(address(at_7.where.slot, at_7.beat, at_7.copy)),
        ]
        with m.If(~swept):
            m.d.comb += write_address.eq(sweep)
        with m.Elif(drain_7):
            m.d.comb += write_address.eq(drained_address)
        for r in range(rows):
            for e, cell in enumerate(cells[r]):
                m.d.comb += [
                    cell.read_address.eq(read_address),
                    cell.drain.eq(drain_6),
                    cell.accumulate.eq(value_6),
                    cell.chain_i.eq(word.data[r][e]),
                    self.chain_o.payload.data[r][e].eq(cell.chain_o),
                    cell.write.eq(value_7 | drain_7 | ~swept),
                    cell.write_address.eq(write_address),
                ]
        m.d.comb += [
            value_stored.eq(value_7 & at_7.last & at_7.where.last),
            value_stored_slot.eq(at_7.where.slot),
        ]

        # ----------------------------------------- stages 6 on: sums of K, and scores

        m.submodules.score_unit = score_unit = ScoreUnit(config)
        clipped_6 = Signal(rows)
        for r in range(rows):
            # Sign and magnitude to two's complement: each negative addend owes one, paid by an adder's carry.
            terms = [(Cat(c.addend, Const(0, 1)) ^ c.negative.replicate(SCORE_WINDOW_BITS + 1)).as_signed()
                     for c in cells[r]]
            owed = [c.negative for c in cells[r]]
            for level in range(levels):
                sums = []
                for i in range(0, len(terms), 2):
                    total = Signal(signed(SCORE_WINDOW_BITS + 2 + level), name=f"tree_{r}_{level}_{i // 2}")
                    m.d.sync += total.eq(add_carry(terms[i], terms[i + 1], owed.pop(0)))
                    sums.append(total)
                delayed = [Signal(name=f"owed_{r}_{level}_{i}") for i in range(len(owed))]
                m.d.sync += [b.eq(a) for a, b in zip(owed, delayed, strict=True)]
                terms, owed = sums, delayed
            total = Signal(signed(SCORE_SUM_BITS), name=f"sum_{r}")
            old = Mux(pipe[tree_stage].first, 0, total)
            m.d.comb += clipped_6[r].eq(Cat(c.overflow for c in cells[r]).any())
            clips = [clipped_6[r]]
            for level in range(levels):
                clip = Signal(name=f"clip_{r}_{level}")
                m.d.sync += clip.eq(clips[-1])
                clips.append(clip)
            clipped = Signal(name=f"clipped_{r}")
            with m.If(pipe[tree_stage].valid):
                m.d.sync += [
                    total.eq(add_carry(old.as_signed(), terms[0], owed.pop(0))),
                    clipped.eq((clipped & ~pipe[tree_stage].first) | clips[-1]),
                ]
            m.d.comb += [score_unit.sums[r].eq(total), score_unit.overflows[r].eq(clipped)]
        done = pipe[tree_stage + 1]
        score_job = kept("score_jobs", "scale", "tree_token")
        m.d.comb += [
            score_unit.valid.eq(done.valid & done.key & done.last),
            score_unit.where.eq(done.where),
            score_job.addr.eq(score_unit.scale_slot),
            score_unit.scale.eq(score_job.data.scale),
            score_unit.tree_token.eq(score_job.data.tree_token),
            score_unit.load_valid.eq(self.load_valid),
            score_unit.load.eq(self.load),
            score_unit.maximum_slot.eq(self.maximum_slot),
            score_unit.maximum_row.eq(self.maximum_row),
            self.maximum.eq(score_unit.maximum),
            key_stored.eq(score_unit.stored_last),
            key_stored_slot.eq(score_unit.stored_slot),
        ]

        # The score memory joins K's end with V's beginning.
        m.submodules.scores = scores = Memory(
            shape=shapes.score, depth=shapes.score_words, init=[], attrs={"ram_style": "block"})
        score_write, score_read = scores.write_port(domain="sync"), scores.read_port(domain="sync")
        m.d.comb += [
            score_write.en.eq(score_unit.score_write),
            score_write.addr.eq(score_unit.score_address),
            score_write.data.eq(score_unit.score),
            score_read.addr.eq(weight_unit.score_address),
            weight_unit.maximum_slot.eq(self.maximum_slot),
            weight_unit.maximum_row.eq(self.maximum_row),
            weight_unit.maximum_write.eq(self.maximum_write),
            weight_unit.maximum_new.eq(self.maximum_new),
            weight_unit.load_valid.eq(self.load_valid),
            weight_unit.load.eq(self.load),
            weight_unit.denominator_slot.eq(self.denominator_slot),
            weight_unit.denominator_row.eq(self.denominator_row),
            self.denominator.eq(weight_unit.denominator),
        ]
        m.d.sync += weight_unit.score.eq(score_read.data)

        # ------------------------------------------------------------- reports

        # The lowest token of each slot and fault.  An unreadable codeword has no NaN: its data are zeros.
        fault_3, token_3, slot_3 = Signal(range(len(FAULTS))), Signal(TOKEN_BITS), Signal(shapes.slot)
        happened_3, inside_3 = Signal(), Signal()
        nan_job = kept("end_tokens", "end_token")
        m.d.comb += nan_job.addr.eq(pipe[2].where.slot)
        m.d.sync += [
            happened_3.eq((special_2.any() | pipe[2].error) & pipe[2].valid),
            inside_3.eq(pipe[2].where.token < nan_job.data.end_token),
            fault_3.eq(Cat(~pipe[2].key, ~pipe[2].error)),
            slot_3.eq(pipe[2].where.slot),
            token_3.eq(pipe[2].where.token),
        ]
        m.submodules.offenders = offenders = Memory(
            shape=TOKEN_BITS, depth=len(FAULTS) * slots, init=[], attrs={"ram_style": "distributed"})
        lowest = offenders.read_port(domain="comb")
        lower = offenders.write_port(domain="sync")
        flags_shape = data.StructLayout({
            "faults": len(FAULTS), "score_overflow": 1, "value_overflow": 1, "duplicate": 1})
        flags = [Signal(flags_shape, name=f"flags_{s}") for s in range(slots)]
        seen_3 = Array(kept.faults for kept in flags)[slot_3].bit_select(fault_3, 1)
        m.d.comb += [
            lowest.addr.eq(Cat(fault_3, slot_3)),
            lower.addr.eq(Cat(fault_3, slot_3)),
            lower.data.eq(token_3),
            lower.en.eq(happened_3 & inside_3 & (~seen_3 | (token_3 < lowest.data))),
        ]
        value_clip = Signal()
        value_clip_slot = Signal(shapes.slot)
        m.d.sync += [
            value_clip.eq(value_6 & Cat(c.overflow for row in cells for c in row).any()),
            value_clip_slot.eq(pipe[ADDEND_STAGE].where.slot),
        ]
        for s, kept in enumerate(flags):
            with m.If(lower.en & (slot_3 == s)):
                m.d.sync += kept.faults.bit_select(fault_3, 1).eq(1)
            with m.If(score_unit.overflow & (score_unit.stored_slot == s)):
                m.d.sync += kept.score_overflow.eq(1)
            with m.If(value_clip & (value_clip_slot == s)):
                m.d.sync += kept.value_overflow.eq(1)
            with m.If(intake.duplicate & (intake.offender.slot == s)):
                m.d.sync += kept.duplicate.eq(1)
            with m.If(self.start_valid & (self.start.slot == s)):
                m.d.sync += kept.as_value().eq(0)
        report_slot = Signal(shapes.slot)
        report_flags = Signal(flags_shape)
        fault = Signal(FAULT_BITS, init=len(FAULTS))
        reported = offenders.read_port(domain="comb")
        m.d.comb += report_flags.eq(Array(kept.as_value() for kept in flags)[report_slot])
        for number in reversed(range(len(FAULTS))):
            with m.If(report_flags.faults[number]):
                m.d.comb += fault.eq(number)
        m.d.comb += reported.addr.eq(Cat(fault[: ceil_log2(len(FAULTS))], report_slot))
        m.d.sync += [
            report_slot.eq(self.report_slot),
            self.report.fault.eq(fault),
            self.report.token.eq(reported.data),
            self.report.score_overflow.eq(report_flags.score_overflow),
            self.report.value_overflow.eq(report_flags.value_overflow),
            self.report.duplicate.eq(report_flags.duplicate),
            self.missing_key.eq(keys_left[report_slot]),
            self.missing_value.eq(values_left[report_slot]),
        ]

        # Why no beat was issued.
        any_key, any_value, any_open_value = Signal(), Signal(), Signal()
        values = [values_left[s] != 0 for s in range(slots)]
        m.d.sync += [
            any_key.eq(Cat(keys_left[s] != 0 for s in range(slots)).any()),
            any_value.eq(Cat(values).any()),
            any_open_value.eq((Cat(values) & self.value_open).any()),
        ]
        events = self.events
        wanted = any_key | any_open_value
        m.d.comb += [
            events.beat.eq(issue),
            events.weights.eq(there & waits_weight),
            events.scores.eq(there & waits_score),
            events.starved.eq(~there & wanted),
            events.barrier.eq(~there & ~wanted & any_value),
            events.idle.eq(~there & ~wanted & ~any_value),
            events.duplicate.eq(intake.duplicate),
            events.stale.eq(intake.stale),
            events.bad_tag.eq(intake.bad_tag),
        ]
        return m
