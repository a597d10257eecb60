"""A lane: one flash channel's datapath, from its codewords to its share of each job's scores and sums."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY, Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.formats import (
    DIGIT_BITS,
    QUERY_SHIFT,
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    SIGNIFICAND_BITS,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
)
from kvattic_hdl.datapath.cell import ADDEND_STAGE, READ_STAGE, SUM_STAGE, Cell, accumulator_words, group_base
from kvattic_hdl.datapath.score import ScoreUnit, score_interval, scored_token
from kvattic_hdl.datapath.weights import WeightUnit
from kvattic_hdl.lane.first_pass import ChosenChannels, FirstPass
from kvattic_hdl.lane.intake import Intake
from kvattic_hdl.lane.reports import Reports
from kvattic_hdl.lane.score_ring import Lookup, ScoreRing
from kvattic_hdl.lane.scrubber import Scrubber
from kvattic_hdl.lane.walker import FirstWalker, Walker
from kvattic_hdl.lib.arithmetic import add_carry, decode, strobe, times
from kvattic_hdl.lib.exponential import Exponential
from kvattic_hdl.lib.interfaces import (
    ACCUMULATE_CYCLES,
    MISSING_BITS,
    SHIFT_BITS,
    TOKEN_BITS,
    Shapes,
)
from kvattic_hdl.lib.records import fields, table_entry
from kvattic_hdl.lib.stream_buffer import StreamBuffer
from kvattic_hdl.sparse.lane_topk import Selector
from kvattic_hdl.verilog.shared import shared


class Lane(wiring.Component):
    """Walks each job's pages on its channel, scores K codewords and sums V codewords as they come.

    Takes one beat each cycle, in any order of codewords, of any job in flight.  A V codeword is welcome only while its
    slot's `value_open` is set.  Nothing that a lane computes depends on the order.  What holds a beat back is told by
    `events`: the weight of its token, the score unit (where rows * score_interval exceeds beats_per_token, or for a
    token of a group that is harvested), or nothing at all being there.  A codeword with `error` counts as any other,
    but the job's report names it.  Reset abandons all jobs; `ready` returns when the memories are swept.

    A sparse job has a first pass, which scores what its mode reads of all its tokens, before its K pass; `first_done`
    tells its end.  Then its units are swept (see `selector.py`) until those that are selected are marked, and
    `select_valid` lets its K and V passes begin, which read codewords with selected tokens only.

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
        record of the slot would not undo.  Of a sparse job each entry is followed by its sketch's; row scales and
        chosen channels come behind the row records.
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
    first_done : Out(jobs_in_flight)
        The same for a sparse job's first pass: its scores are stored; or the job failed.
    first_slot, first_row : In, first_maximum : Out(score) two cycles later
    sweep_valid : In(1), sweep : In(sweep), sweep_done : Out(1)
        A sweep of the job of a slot whose first pass is done; its results are there when `sweep_done` returns.
    reference_write : In(1), reference_row : In(row), reference : In(score)
    sum_row : In(row), sum : Out(denominator) two cycles later
    bin : In, count : Out(unit_count) two cycles later
    unmarked : Out(1)
        The selector's; see there.
    select_valid : In(1), select_slot : In(slot)
        Strobe: the slot's selected tokens are marked, its K pass may begin.
    maximum_slot, maximum_row : In, maximum : Out(score) two cycles later
    maximum_write, maximum_new : In
        Gives the maximum over all lanes back, at the address of the same cycle.
    denominator_slot, denominator_row : In, denominator : Out two cycles later
    chain_i : In(stream of partial), chain_o : Out(stream of partial)
        Adds the lane's sums to each word that passes, and clears them.
    report_slot : In, report : Out(report) two cycles later
    missing_key, missing_value : Out(16)
        Codewords of `report_slot` that were asked for and not accounted for yet, two cycles later; the first pass's
        count as K.
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
            "first_done": Out(slots),
            "first_slot": In(shapes.slot),
            "first_row": In(shapes.row),
            "first_maximum": Out(shapes.score),
            "sweep_valid": In(1),
            "sweep": In(shapes.sweep),
            "sweep_done": Out(1),
            "reference_write": In(1),
            "reference_row": In(shapes.row),
            "reference": In(shapes.score),
            "sum_row": In(shapes.row),
            "sum": Out(shapes.denominator),
            "bin": In(DIGIT_BITS),
            "count": Out(shapes.unit_count),
            "unmarked": Out(1),
            "select_valid": In(1),
            "select_slot": In(shapes.slot),
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
        sparse = config.sparse

        # ---------------------------------------------------------------- jobs

        # The slot's list: number of stripes here, and whether the latest one is the job's last.
        entry = table_entry(self.load.data[: TABLE_ENTRY.size * 8])
        whole = entry["dram"] | entry["whole"]
        stripes = Signal(shapes.walk["stripes"].shape)
        tail, append = Signal(), Signal()
        m.d.comb += append.eq(self.load_valid & self.load.stripe & (entry["channel"] == self.channel))
        with m.If(append):
            m.d.sync += [stripes.eq(stripes + 1), tail.eq(self.load.last)]
        with m.If(self.load_valid & self.load.record):
            m.d.sync += stripes.eq(0)

        def listed(name: str, shape, value, number=stripes, valid=append):
            """For one property of the stripes: a memory whose address is Cat(number in the list, slot)."""
            memory = Memory(shape=shape, depth=slots << shapes.list_bits, init=[], attrs={"ram_style": "block"})
            m.submodules[name] = memory
            write = memory.write_port(domain="sync")
            m.d.comb += [
                write.en.eq(valid),
                write.addr.eq(Cat(number[: shapes.list_bits], self.load.slot)),
                Value.cast(write.data).eq(value),
            ]
            return memory

        job_shape = data.StructLayout({name: field.shape for name, field in shapes.walk} | {
            "tree_token": TOKEN_BITS,
            "k_offset": shapes.start["k_offset"].shape,
            "scale": shapes.start["scale"].shape,
        } | ({name: shapes.start[name].shape for name in ("mode", "unit_bits", "features", "local_token", "sinks")}
             if sparse else {}))
        job = Signal(job_shape)
        started, started_slot = Signal(), Signal(shapes.slot)
        m.d.sync += [
            started.eq(self.start_valid),
            started_slot.eq(self.start.slot),
            job.stripes.eq(stripes),
            job.tail.eq(tail),
        ]
        m.d.sync += [job[name].eq(self.start[name]) for name, _ in job_shape if name not in ("stripes", "tail")]

        is_sparse = (job.mode != Mode.DENSE) if sparse else Const(0)   # at `started`

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
        # A sparse job's K walk waits for its selection; younger dense jobs wait behind it.
        begun, selected, sparse_jobs = (Signal(slots, name=n) for n in ("begun", "selected", "sparse_jobs"))
        unselected = Signal(slots)
        for walker, name in ((key_walker, "key"), (value_walker, "value")):
            port = kept(f"{name}_jobs", *(field for field, _ in shapes.walk))
            stripe_port = listed(f"{name}_stripes", shapes.stripe,
                                 Cat(entry[f"{name}_page"], entry["dram"])).read_port(domain="sync")
            m.d.comb += [
                port.addr.eq(walker.slot),
                Value.cast(walker.job).eq(Value.cast(port.data)),
                stripe_port.addr.eq(walker.stripe_address),
                walker.stripe.eq(stripe_port.data),
                walker.failed.eq(self.failed.bit_select(walker.slot, 1)),
                walker.skip.eq(sparse_jobs.bit_select(walker.slot, 1)),
            ]
        m.d.comb += [
            begun.eq(strobe(started, started_slot)),
            selected.eq(strobe(self.select_valid, self.select_slot) if sparse else 0),
            key_walker.enable.eq(Mux(is_sparse, 0, begun) | selected),
            key_walker.expect.eq(unselected),
            value_walker.enable.eq(strobe(key_walker.end, key_walker.slot)),
        ]
        if sparse:
            m.d.sync += unselected.eq((unselected | Mux(is_sparse, begun, 0)) & ~selected)
            with m.If(started):
                m.d.sync += sparse_jobs.bit_select(started_slot, 1).eq(is_sparse)

        m.submodules.ring = ring = ScoreRing(config)

        # Whether the engine takes a request is known a cycle late: no path goes through a lane within a cycle.
        m.submodules.request_buffer = request_buffer = StreamBuffer(shapes.request)
        asked = request_buffer.i
        connect(m, request_buffer.o, flipped(self.requests))

        # K runs one job ahead of V: K0 K1 V0 K2 V1 ...; where K can't go on, V does.
        ahead = Signal(range(slots + 1))
        m.d.sync += ahead.eq(ahead + key_walker.end - value_walker.end)
        key_turn, first_turn, first_holds = Signal(), Signal(), Signal()
        key_fired, value_fired, first_fired = Signal(), Signal(), Signal()
        m.d.comb += [
            key_walker.room.eq(ring.room | key_walker.skip),
            key_turn.eq(key_walker.follow | (key_walker.requests.valid & ~value_walker.follow
                                             & ((ahead <= 1) | ~value_walker.requests.valid))),
            # A sparse job's V is asked for when it may come: until then it would hold dies that others could use, and
            # what lies between two of its reads is another job's.
            value_walker.room.eq(~value_walker.skip | self.value_open.bit_select(value_walker.slot, 1)),
            asked.valid.eq(first_turn | (~first_holds & Mux(
                key_turn, key_walker.requests.valid, value_walker.requests.valid))),
            asked.payload.eq(Mux(key_turn, key_walker.requests.payload, value_walker.requests.payload)),
            key_walker.requests.ready.eq(asked.ready & key_turn & ~first_turn & ~first_holds),
            value_walker.requests.ready.eq(asked.ready & ~key_turn & ~first_turn & ~first_holds),
            key_fired.eq(key_walker.requests.valid & key_walker.requests.ready),
            value_fired.eq(value_walker.requests.valid & value_walker.requests.ready),
        ]

        keys_walked = Signal(slots)
        m.d.comb += [
            ring.sparse.eq(sparse_jobs),
            ring.key_slot.eq(key_walker.slot),
            ring.key_begin.eq(key_walker.begin),
            ring.key_fired.eq(key_fired),
            ring.key_place.eq(key_walker.requests.payload.tag.place),
        ]

        # The first walker goes in front; it has the right of way as long as K has nothing to read after this job.  A
        # tail takes turns with the others, as it may wait for DRAM.
        if sparse:
            m.submodules.first_walker = first_walker = FirstWalker(config)
            first_job = kept("first_jobs", *(field for field, _ in first_walker.first_walk))
            first_ahead, dram_turn = Signal(range(slots + 1)), Signal()
            m.d.sync += dram_turn.eq(~dram_turn)
            m.d.sync += first_ahead.eq(first_ahead + first_walker.end - (key_walker.end & key_walker.skip))
            m.d.comb += [
                first_walker.enable.eq(begun),
                first_job.addr.eq(first_walker.slot),
                Value.cast(first_walker.job).eq(Value.cast(first_job.data)),
                first_walker.failed.eq(self.failed.bit_select(first_walker.slot, 1)),
                first_walker.keys_walked.eq(keys_walked.bit_select(first_walker.slot, 1)),
                ring.first_places.eq(first_job.data.stripes << ceil_log2(config.group_codewords)),
                ring.first_slot.eq(first_walker.slot),
                ring.first_begin.eq(first_walker.begin),
                first_walker.fits.eq(ring.first_room),
                key_walker.ring_base.eq(ring.base[Lookup.KEY]),
                value_walker.ring_base.eq(ring.base[Lookup.VALUE]),
                ring.slots[Lookup.KEY].eq(key_walker.slot),
                ring.slots[Lookup.VALUE].eq(value_walker.slot),
                first_holds.eq(first_walker.follow),
                first_turn.eq(
                    first_walker.requests.valid & ~key_walker.follow & ~value_walker.follow
                    & (first_holds | ~(key_walker.requests.valid | value_walker.requests.valid)
                       | Mux(first_walker.requests.payload.dram, dram_turn, first_ahead == 0))),
                first_walker.requests.ready.eq(asked.ready & first_turn),
                first_fired.eq(first_turn & asked.ready),
            ]
            with m.If(first_turn):
                m.d.comb += asked.payload.eq(first_walker.requests.payload)

            # Its lists: where a stripe's sketch lies (or K, of one that is attended whole), and the chosen channels.
            sketch = fields(SKETCH_ENTRY, self.load.data[: SKETCH_ENTRY.size * 8])
            appended, key_page, first_token, in_dram, is_whole = (
                Signal(), Signal(first_walker.stripe.page.shape()), Signal(TOKEN_BITS), Signal(), Signal())
            with m.If(self.load_valid & self.load.stripe):
                m.d.sync += [
                    appended.eq(append), key_page.eq(entry["key_page"]), first_token.eq(self.load.start),
                    in_dram.eq(entry["dram"]), is_whole.eq(whole)]
            written = Signal(first_walker.first_stripe)
            m.d.comb += [
                written.page.eq(Mux(is_whole, key_page, sketch["page"])),
                written.codeword.eq(Mux(is_whole, 0, sketch["codeword"])),
                written.dram.eq(in_dram),
                written.whole.eq(is_whole),
                written.token.eq(first_token),
            ]
            first_stripes = listed(
                "first_stripes", first_walker.first_stripe, written, (stripes - 1)[: shapes.list_bits],
                self.load_valid & self.load.sketch & appended).read_port(domain="sync")
            m.submodules.chosen = chosen = ChosenChannels(config)
            m.d.comb += [
                first_stripes.addr.eq(first_walker.stripe_address),
                first_walker.stripe.eq(first_stripes.data),
                chosen.load_valid.eq(self.load_valid),
                chosen.load.eq(self.load),
                chosen.address.eq(first_walker.chosen_address),
                first_walker.chosen.eq(chosen.channel),
            ]

        # ----------------------------------------------------- what is left to do

        m.submodules.scrubber = scrubber = Scrubber(config)
        active = Signal(slots)
        first_walked, keys_begun, values_walked = (
            Signal(slots, name=n) for n in ("first_walked", "keys_begun", "values_walked"))
        remains = Signal(slots)     # groups of its first pass
        channel_stored, channel_stored_slot = Signal(), Signal(shapes.slot)
        keys_left = Array(Signal(shapes.place.width + 1, name=f"keys_left_{s}") for s in range(slots))
        values_left = Array(Signal(shapes.place.width + 1, name=f"values_left_{s}") for s in range(slots))
        key_stored, value_stored = Signal(), Signal()
        key_stored_slot, value_stored_slot = Signal(shapes.slot), Signal(shapes.slot)
        for s in range(slots):
            key_up, key_down = Signal(name=f"key_up_{s}"), Signal(name=f"key_down_{s}")
            value_up, value_down = Signal(name=f"value_up_{s}"), Signal(name=f"value_down_{s}")
            m.d.comb += [
                key_up.eq(key_fired & (key_walker.slot == s)
                          | (first_fired & (first_walker.slot == s) if sparse else 0)),
                key_down.eq(key_stored & (key_stored_slot == s)),
                value_up.eq(value_fired & (value_walker.slot == s)),
                value_down.eq(value_stored & (value_stored_slot == s)),
            ]
            m.d.sync += [
                self.keys_done[s].eq(Mux(
                    self.failed[s], scrubber.abandoned[s], keys_walked[s] & (keys_left[s] == 0))),
                self.values_done[s].eq(Mux(
                    self.failed[s], scrubber.abandoned[s], values_walked[s] & (values_left[s] == 0))),
            ]
            if sparse:
                channel_down = Signal(name=f"channel_down_{s}")
                m.d.comb += channel_down.eq(channel_stored & (channel_stored_slot == s))
                m.d.sync += [
                    keys_left[s].eq(keys_left[s] + key_up - (key_down + channel_down)),
                    self.first_done[s].eq(first_walked[s] & (self.failed[s] | ~remains[s])),
                ]
                with m.If(first_walker.end & (first_walker.slot == s)):
                    m.d.sync += first_walked[s].eq(1)
                with m.If(first_walker.begin & (first_walker.slot == s)):
                    m.d.sync += active[s].eq(1)
            else:
                with m.If(key_up != key_down):
                    m.d.sync += keys_left[s].eq(keys_left[s] + Mux(key_up, 1, -1))
            with m.If(value_up != value_down):
                m.d.sync += values_left[s].eq(values_left[s] + Mux(value_up, 1, -1))
            with m.If(key_walker.begin & (key_walker.slot == s)):
                # A sparse job without places was given up before its first walk began.
                m.d.sync += [keys_begun[s].eq(1), active[s].eq(active[s] | ~sparse_jobs[s])]
            with m.If(key_walker.end & (key_walker.slot == s)):
                m.d.sync += keys_walked[s].eq(1)
            with m.If(value_walker.end & (value_walker.slot == s)):
                m.d.sync += values_walked[s].eq(1)
            with m.If(self.start_valid & (self.start.slot == s)):
                m.d.sync += [
                    active[s].eq(0), first_walked[s].eq(0), keys_begun[s].eq(0), keys_walked[s].eq(0),
                    values_walked[s].eq(0), keys_left[s].eq(0), values_left[s].eq(0), self.keys_done[s].eq(0),
                    self.values_done[s].eq(0), *([self.first_done[s].eq(0)] if sparse else []),
                ]

        m.d.comb += ring.done.eq(self.values_done & (scrubber.cleared | ~sparse_jobs))

        # -------------------------------------------------------------- intake

        # A V codeword's first weight is there this long after its header; the beats wait as long.
        m.submodules.intake = intake = Intake(
            config, 1 << (Exponential.LATENCY + 12 + rows - 1).bit_length())
        connect(m, flipped(self.codewords), intake.codewords)
        job_port = kept("intake_jobs", "epoch", "stripe_bits", *(("mode", "unit_bits") if sparse else ()))
        token_shape = data.StructLayout({"token": TOKEN_BITS} | ({"whole": 1} if sparse else {}))
        stripe_tokens = listed("stripe_tokens", token_shape, Cat(self.load.start, whole))
        stripe_token = stripe_tokens.read_port(domain="sync")
        m.d.comb += [
            job_port.addr.eq(intake.slot),
            ring.slots[Lookup.DOOR].eq(intake.slot),
            intake.epoch.eq(job_port.data.epoch),
            intake.active.eq((active & self.live).bit_select(intake.slot, 1)),
            intake.open.eq(self.value_open.bit_select(intake.slot, 1)),
            intake.failed.eq(self.failed.bit_select(intake.slot, 1)),
            intake.asked.eq(Mux(keys_begun.bit_select(intake.slot, 1), ring.asked[Lookup.DOOR], 0)),
            intake.ring_base.eq(ring.base[Lookup.DOOR]),
            intake.stripe_bits.eq(job_port.data.stripe_bits),
            intake.stripe_token.eq(stripe_token.data.token),
            stripe_token.addr.eq(intake.stripe_address),
            self.offender.eq(intake.offender),
        ]

        m.d.comb += [
            scrubber.start.eq(strobe(self.start_valid, self.start.slot)),
            scrubber.failed.eq(self.failed),
            scrubber.holds.eq(ring.holds),
            scrubber.walked.eq(keys_walked & values_walked & ~remains),
            scrubber.came.eq(sparse_jobs & self.first_done if sparse else 0),
            ring.slots[Lookup.FAILED].eq(scrubber.failed_slot),
            scrubber.failed_base.eq(ring.base[Lookup.FAILED]),
            scrubber.failed_places.eq(ring.taken[Lookup.FAILED]),
            intake.scrub.eq(scrubber.scrub),
            intake.scrub_first.eq(scrubber.scrub_first),
            intake.scrub_ring.eq(scrubber.scrub_ring),
            scrubber.scrubbed.eq(intake.scrubbed),
        ]

        if sparse:
            m.submodules.firsts = firsts = Memory(
                shape=data.StructLayout({"asked": shapes.place.width + 1, "group": len(intake.first_group)}),
                depth=slots, init=[], attrs={"ram_style": "distributed"})
            first_write, first_port = firsts.write_port(domain="sync"), firsts.read_port(domain="comb")
            first_group, first_base = Signal(len(intake.first_group)), Signal(shapes.ring)
            m.submodules.first_pass = first_pass = FirstPass(config)
            m.d.comb += [
                first_walker.room.eq(first_pass.room),
                first_pass.open.eq(first_walker.open),
                first_pass.close.eq(first_walker.close),
                first_pass.asked.eq(first_fired),
                first_pass.group.slot.eq(first_walker.slot),
                first_pass.group.ring.eq(first_base + first_walker.place),
                first_pass.group.token.eq(first_walker.token),
                first_pass.group.channels.eq(first_walker.channels),
                first_pass.given_up.eq(scrubber.settled),
                ring.slots[Lookup.FIRST].eq(scrubber.first_slot),
                scrubber.first_base.eq(ring.base[Lookup.FIRST]),
                scrubber.first_places.eq(ring.taken[Lookup.FIRST]),
                remains.eq(first_pass.remains),
                first_write.en.eq(first_walker.begin | first_fired),
                first_write.addr.eq(first_walker.slot),
                first_write.data.asked.eq(Mux(first_walker.begin, 0, first_walker.requests.payload.tag.place + 1)),
                first_write.data.group.eq(Mux(first_walker.begin, first_pass.next, first_group)),
                first_port.addr.eq(intake.slot),
                intake.first_asked.eq(first_port.data.asked),
                intake.first_group.eq(first_port.data.group),
                intake.first_done.eq(self.first_done.bit_select(intake.slot, 1)),
                intake.sparse.eq(job_port.data.mode != Mode.DENSE),
                intake.centroid.eq(job_port.data.mode == Mode.CENTROID),
                intake.unit_bits.eq(job_port.data.unit_bits),
                intake.stripe_whole.eq(stripe_token.data.whole),
            ]
            with m.If(first_walker.begin):
                m.d.sync += [first_group.eq(first_pass.next), first_base.eq(ring.head)]
            m.d.comb += [
                chosen.asked_slot.eq(intake.slot),
                chosen.asked_channel.eq(intake.channel),
                intake.chosen.eq(chosen.chosen),
            ]

        # --------------------------------------------------------------- issue

        m.submodules.weight_unit = weight_unit = WeightUnit(config, intake.header_depth)
        connect(m, intake.value_requests, weight_unit.requests)
        header = intake.headers.payload
        token_index = Signal(shapes.lane_token["index"].shape)
        beat_index = Signal(shapes.beat_index)
        first, last, last_token = Signal(), Signal(), Signal()
        waits_weight, waits_score, there, issue = Signal(), Signal(), Signal(), Signal()
        # A beat of a channel, instead of a token's; a token of a group that takes the place of a beat.
        channel, harvest = Signal(), Signal()
        m.d.comb += [
            first.eq(beat_index == 0),
            last.eq(~channel & (beat_index == config.beats_per_token - 1)),
            last_token.eq(token_index == config.tokens_per_codeword - 1),
            there.eq(intake.headers.valid & intake.beats.valid),
            issue.eq(there & ~waits_weight & ~waits_score & ~harvest),
            intake.beats.ready.eq(issue),
            intake.headers.ready.eq(issue & last & last_token),
        ]
        with m.If(issue & ~channel):
            m.d.sync += beat_index.eq(beat_index + 1)
            with m.If(last):
                m.d.sync += [beat_index.eq(0), token_index.eq(token_index + 1)]
                with m.If(last_token):
                    m.d.sync += token_index.eq(0)
        if sparse:
            word = Signal((config.group_words - 1).bit_length())
            last_word = Signal()
            m.d.comb += [channel.eq(header.channel), last_word.eq(channel & (word == config.group_words - 1))]
            with m.If(last_word):
                m.d.comb += intake.headers.ready.eq(issue)
            with m.If(issue & channel):
                m.d.sync += word.eq(word + 1)

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

        # The score unit takes a token every rows * interval cycles; tokens of K and of a harvest take turns.
        spacing = rows * score_interval(config)
        if spacing > config.beats_per_token or sparse:
            rest = Signal(range(spacing))
            scores = header.key & last
            m.d.comb += waits_score.eq(scores & (rest != 0))
            with m.If(issue & scores | harvest):
                m.d.sync += rest.eq(spacing - 1)
            with m.Elif(rest != 0):
                m.d.sync += rest.eq(rest - 1)
        if sparse:
            beat_turn = Signal()
            m.d.comb += [
                first_pass.harvest.ready.eq((rest == 0) & ~(there & scores & beat_turn)),
                harvest.eq(first_pass.harvest.valid & first_pass.harvest.ready),
            ]
            with m.If(harvest):
                m.d.sync += beat_turn.eq(1)
            with m.Elif(issue & scores):
                m.d.sync += beat_turn.eq(0)
            if config.group_words < ACCUMULATE_CYCLES:
                # The next codeword's beat may not follow so soon on the one that is added to the same word.
                apart = Signal(range(ACCUMULATE_CYCLES))
                with m.If(channel & (word == 0) & (apart != 0)):
                    m.d.comb += waits_score.eq(1)
                with m.If(issue & channel & (word == 0)):
                    m.d.sync += apart.eq(ACCUMULATE_CYCLES - 1)
                with m.Elif(apart != 0):
                    m.d.sync += apart.eq(apart - 1)

        # What rides along with a beat, or with a token of a harvest; `sums`: a beat that is added to word `address`.
        copy = Signal(range(max(2, shapes.copies)))
        depth = accumulator_words(config)
        ride = data.StructLayout({
            "valid": 1, "key": 1, "error": 1, "first": 1, "last": 1, "sums": 1, "address": ceil_log2(depth),
            "where": scored_token(shapes)} | ({
                "channel": 1, "harvest": 1, "clear": 1, "element": ceil_log2(elements)} if sparse else {}))
        levels = (elements - 1).bit_length()
        tree_stage = ADDEND_STAGE + levels
        pipe = [Signal(ride, name=f"ride_{i}") for i in range(max(tree_stage + 1, SUM_STAGE) + 1)]
        m.d.comb += [
            pipe[0].valid.eq(issue),
            pipe[0].key.eq(header.key),
            pipe[0].error.eq(header.error),
            pipe[0].first.eq(first),
            pipe[0].last.eq(last),
            pipe[0].sums.eq(issue & (~header.key | channel)),
            pipe[0].address.eq(Cat(
                Cat(beat_index[: ceil_log2(config.beats_per_token)], copy)[: shapes.drain_address.width], header.slot)),
            pipe[0].where.slot.eq(header.slot),
            pipe[0].where.ring.eq(header.ring),
            pipe[0].where.index.eq(token_index),
            pipe[0].where.token.eq(header.token + token_index),
            pipe[0].where.last.eq(last_token),
        ]
        if sparse:
            harvested = first_pass.harvest.payload
            m.d.comb += [
                pipe[0].channel.eq(channel),
                pipe[0].harvest.eq(harvest),
                pipe[0].element.eq(header.number),
                pipe[0].where.selected.eq(header.marks.bit_select(token_index, 1)),
                pipe[0].where.sketch.eq(header.first),
                pipe[0].where.centroid.eq(header.centroid),
                pipe[0].where.group.eq(header.group),
            ]
            with m.If(header.centroid):
                # Units whose scores are kept where the unit begins.
                m.d.comb += [
                    pipe[0].where.ring.eq(header.ring + (token_index << header.unit_bits)),
                    pipe[0].where.index.eq(0),
                    pipe[0].where.token.eq(
                        header.token + (times(token_index, config.tokens_per_codeword) << header.unit_bits)),
                ]
            with m.If(channel):
                m.d.comb += [
                    pipe[0].address.eq(group_base(config) + Cat(word, header.group)),
                    pipe[0].where.token.eq(header.token + Cat(Const(0, ceil_log2(elements)), word)),
                    pipe[0].where.last.eq(last_word),
                ]
            with m.If(harvest):
                m.d.comb += [
                    pipe[0].address.eq(group_base(config) + Cat(harvested.word, harvested.buffer)),
                    pipe[0].element.eq(harvested.element),
                    pipe[0].clear.eq(harvested.element.all()),
                    pipe[0].where.harvest.eq(1),
                    pipe[0].where.centroid.eq(0),
                    pipe[0].where.sketch.eq(0),
                    pipe[0].where.selected.eq(1),
                ]
                m.d.comb += [pipe[0].where[name].eq(harvested.where[name]) for name, _ in shapes.lane_token]
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
                port.addr.eq(Cat(Mux(channel, header.number[ceil_log2(elements) :], beat_index)[: len(beat_index)]
                                 if sparse else beat_index, header.slot)),
                write.addr.eq(Cat(self.load.beat, self.load.slot)),
                write.data.eq(self.load.data),
                write.en.eq(self.load_valid & self.load.query & (self.load.row == r)),
            ]
            query = port.data
            if sparse:
                # The element of the channel for all of its tokens.
                query = Signal(config.beat_bytes * 8, name=f"query_word_{r}")
                m.d.comb += query.eq(Mux(
                    pipe[1].channel, port.data.word_select(pipe[1].element, 16).replicate(elements), port.data))
            queries.append(query)
        beat_1 = Signal(config.beat_bytes * 8)
        m.d.sync += beat_1.eq(intake.beats.payload)

        scale_port = kept("k_offsets", "k_offset")
        m.d.comb += scale_port.addr.eq(pipe[1].where.slot)
        bases_2 = [Signal(signed(SHIFT_BITS), name=f"base_2_{r}") for r in range(rows if sparse else 1)]
        # K: -exponent = ~exponent + 1.
        key_base = element.score_shift + 1
        for r, base_2 in enumerate(bases_2):
            k_offset = scale_port.data.k_offset
            if sparse:
                # In the channel pass each row has a scale of its own.
                memory = Memory(shape=k_offset.shape(), depth=slots, init=[], attrs={"ram_style": "distributed"})
                m.submodules[f"row_offsets_{r}"] = memory
                port, write = memory.read_port(domain="comb"), memory.write_port(domain="sync")
                approximate = data.View(shapes.approximate, self.load.data[: shapes.approximate.size])
                m.d.comb += [
                    port.addr.eq(pipe[1].where.slot),
                    write.addr.eq(self.load.slot),
                    write.data.eq(approximate.k_offset),
                    write.en.eq(self.load_valid & self.load.scale & (self.load.row == r)),
                ]
                k_offset = Mux(pipe[1].channel, port.data, k_offset)
            m.d.sync += base_2.eq(Mux(pipe[1].key, key_base - k_offset, element.value_shift))
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
                        significand_a.eq(a.significand << QUERY_SHIFT),
                        sign.eq(a.sign ^ b.sign),
                        exponent_a.eq(~Cat(a.exponent, Const(0, 1)).as_signed()),
                    ]
                with m.Else():
                    m.d.sync += [
                        significand_a.eq(weights_1[r].significand),
                        sign.eq(b.sign),
                        exponent_a.eq(weights_1[r].exponent),
                    ]
                m.d.sync += shift_3.eq(bases_2[r if sparse else 0] + exponent_a - exponents_b[e])
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
        at_4, at_6, at_7 = pipe[READ_STAGE], pipe[ADDEND_STAGE], pipe[SUM_STAGE]
        value_6 = at_6.sums & ~at_6.key
        reads_4, writes_7 = at_4.sums, at_7.sums
        if sparse:
            reads_4, writes_7 = at_4.sums | at_4.harvest, at_7.sums | (at_7.harvest & at_7.clear)
        drained = self.chain_i.payload
        drain_address = Cat(drained.address, drained.slot)
        sweep = Signal(range(depth + 1))
        swept = Signal()
        m.d.comb += [
            swept.eq(sweep == depth),
            self.ready.eq(swept & intake.ready),
            drain_4.eq(self.chain_i.valid & ~reads_4 & ~drain_5 & ~drain_6 & ~drain_7 & ~self.chain_o.valid),
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
                self.chain_o.payload.slot.eq(drained.slot),
                self.chain_o.payload.address.eq(drained.address),
            ]
        drained_address = Signal.like(drain_address)
        with m.If(drain_6):
            m.d.sync += drained_address.eq(drain_address)
        read_address, write_address = Signal(ceil_log2(depth)), Signal(ceil_log2(depth))
        m.d.comb += [
            read_address.eq(Mux(reads_4, at_4.address, drain_address)),
            write_address.eq(at_7.address),
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
                    cell.accumulate.eq(at_6.sums),
                    cell.chain_i.eq(drained.data[r][e]),
                    self.chain_o.payload.data[r][e].eq(cell.chain_o),
                    cell.write.eq(writes_7 | drain_7 | ~swept),
                    cell.write_address.eq(write_address),
                ]
        m.d.comb += [
            value_stored.eq(at_7.sums & ~at_7.key & at_7.last & at_7.where.last),
            value_stored_slot.eq(at_7.where.slot),
        ]
        if sparse:
            m.d.comb += [
                channel_stored.eq(at_7.sums & at_7.channel & at_7.where.last),
                channel_stored_slot.eq(at_7.where.slot),
                first_pass.channel_stored.eq(channel_stored),
                first_pass.channel_group.eq(at_7.where.group),
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
            if sparse:
                # A harvested sum is there when a token's would be.
                words = [Signal(signed(SCORE_SUM_BITS), name=f"word_{r}_{i}") for i in range(levels + 1)]
                m.d.sync += words[0].eq(Array(cell.word for cell in cells[r])[at_6.element])
                m.d.sync += [b.eq(a) for a, b in zip(words, words[1:], strict=False)]
                with m.If(pipe[tree_stage + 1].harvest):
                    m.d.comb += [score_unit.sums[r].eq(words[-1]), score_unit.overflows[r].eq(0)]
        done = pipe[tree_stage + 1]
        score_job = kept("score_jobs", "scale", "tree_token", *(("unit_bits",) if sparse else ()))
        if sparse:
            m.d.comb += [
                score_unit.unit_bits.eq(score_job.data.unit_bits),
                score_unit.fresh_valid.eq(self.select_valid),
                score_unit.fresh_slot.eq(self.select_slot),
                score_unit.first_slot.eq(self.first_slot),
                score_unit.first_row.eq(self.first_row),
                self.first_maximum.eq(score_unit.first_maximum),
                first_pass.sketch_stored.eq(score_unit.stored_last & score_unit.stored_sketch),
                first_pass.sketch_group.eq(score_unit.stored_group),
                first_pass.harvested.eq(score_unit.stored_last & score_unit.stored_harvest),
            ]
        m.d.comb += [
            score_unit.valid.eq((done.valid & done.key & done.last)
                                | (done.harvest if sparse else 0)),
            score_unit.where.eq(done.where),
            score_job.addr.eq(score_unit.scale_slot),
            score_unit.scale.eq(score_job.data.scale),
            score_unit.tree_token.eq(score_job.data.tree_token),
            score_unit.load_valid.eq(self.load_valid),
            score_unit.load.eq(self.load),
            score_unit.maximum_slot.eq(self.maximum_slot),
            score_unit.maximum_row.eq(self.maximum_row),
            self.maximum.eq(score_unit.maximum),
            key_stored.eq(score_unit.stored_last & ~score_unit.stored_harvest),
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
            *([] if sparse else [score_read.addr.eq(weight_unit.score_address)]),
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

        # ----------------------------------------------------------- selection

        # Which tokens of each place of the ring are selected: one read port, for the door, then the walkers.
        if sparse:
            m.submodules.selector = selector = Selector(config)
            m.submodules.marks = marks = Memory(
                shape=config.tokens_per_codeword, depth=config.ring_codewords, init=[], attrs={"ram_style": "block"})
            mark_write, mark_read = marks.write_port(domain="sync"), marks.read_port(domain="sync")
            selector_job = kept("selector_jobs", "mode", "unit_bits", "end_token", "local_token", "sinks", "stripes")
            selector_stripe = stripe_tokens.read_port(domain="sync")
            m.d.comb += [
                mark_write.en.eq(selector.mark_valid),
                mark_write.addr.eq(selector.mark_ring),
                mark_write.data.eq(selector.mark_bits),
                mark_read.addr.eq(Mux(intake.mark_read, intake.mark_ring,
                                      Mux(key_walker.look, key_walker.look_ring, value_walker.look_ring))),
                intake.marks.eq(mark_read.data),
                key_walker.wanted.eq(mark_read.data.any()),
                value_walker.wanted.eq(mark_read.data.any()),
                key_walker.look_granted.eq(~intake.mark_read),
                value_walker.look_granted.eq(~intake.mark_read & ~key_walker.look),
                selector_job.addr.eq(selector.slot),
                ring.slots[Lookup.SELECTOR].eq(selector.slot),
                selector.ring_base.eq(ring.base[Lookup.SELECTOR]),
                selector_stripe.addr.eq(selector.stripe_address),
                selector.stripe_token.eq(selector_stripe.data.token),
                selector.stripe_whole.eq(selector_stripe.data.whole),
                selector.score_grant.eq(selector.score_ask & ~weight_unit.score_ask),
                selector.score.eq(weight_unit.score),
                score_read.addr.eq(Mux(weight_unit.score_ask, weight_unit.score_address, selector.score_address)),
                self.sweep_done.eq(selector.done),
            ]
            m.d.comb += [getattr(selector, name).eq(selector_job.data[name])
                         for name in ("mode", "unit_bits", "end_token", "local_token", "sinks", "stripes")]
            m.d.comb += [getattr(selector, name).eq(getattr(self, name))
                         for name in ("sweep_valid", "sweep", "reference_write", "reference_row", "reference",
                                      "sum_row", "bin")]
            m.d.comb += [getattr(self, name).eq(getattr(selector, name)) for name in ("sum", "count", "unmarked")]
        else:
            m.d.comb += [self.sweep_done.eq(1), self.first_done.eq(-1)]

        # ------------------------------------------------------------- reports

        m.submodules.reports = reports = Reports(config)
        at_2 = pipe[2]
        nan_job = kept("end_tokens", "end_token")
        any_clip = Cat(c.overflow for row in cells for c in row).any()
        value_clip, channel_clip = Signal(), Signal()
        clip_slot, report_slot = Signal(shapes.slot), Signal(shapes.slot)
        m.d.sync += [
            value_clip.eq(value_6 & any_clip),
            channel_clip.eq(at_6.sums & at_6.key & any_clip),
            clip_slot.eq(at_6.where.slot),
            report_slot.eq(self.report_slot),
            self.missing_key.eq(keys_left[report_slot]),
            self.missing_value.eq(values_left[report_slot]),
        ]
        m.d.comb += [
            nan_job.addr.eq(at_2.where.slot),
            reports.start.eq(strobe(self.start_valid, self.start.slot)),
            reports.valid.eq(at_2.valid),
            reports.slot.eq(at_2.where.slot),
            reports.token.eq(at_2.where.token),
            reports.end_token.eq(nan_job.data.end_token),
            reports.value.eq(~at_2.key),
            reports.error.eq(at_2.error),
            reports.special.eq(special_2),
            reports.score_overflow.eq(
                strobe(score_unit.overflow, score_unit.stored_slot) | strobe(channel_clip, clip_slot)),
            reports.value_overflow.eq(strobe(value_clip, clip_slot)),
            reports.duplicate.eq(strobe(intake.duplicate, intake.offender.slot)),
            reports.report_slot.eq(self.report_slot),
            self.report.eq(reports.report),
        ]
        if sparse:
            m.d.comb += [
                reports.channel.eq(at_2.channel),
                reports.sketch.eq(at_2.channel | at_2.where.sketch),
            ]

        # Why no beat was issued.
        any_key, any_value, any_open_value, any_selection = Signal(), Signal(), Signal(), Signal()
        values = [values_left[s] != 0 for s in range(slots)]
        m.d.sync += [
            any_selection.eq((unselected & self.first_done).any()),
            any_key.eq(Cat(keys_left[s] != 0 for s in range(slots)).any()),
            any_value.eq(Cat(values).any()),
            any_open_value.eq((Cat(values) & self.value_open).any()),
        ]
        events = self.events
        wanted = any_key | any_open_value
        m.d.comb += [
            events.beat.eq(issue),
            events.weights.eq(there & waits_weight & ~harvest),
            events.scores.eq((there & waits_score) | harvest),
            events.starved.eq(~there & ~harvest & wanted),
            events.barrier.eq(~there & ~harvest & ~wanted & (any_value | any_selection)),
            events.idle.eq(~there & ~harvest & ~wanted & ~(any_value | any_selection)),
            events.duplicate.eq(intake.duplicate),
            events.stale.eq(intake.stale),
            events.bad_tag.eq(intake.bad_tag),
        ]
        return m
