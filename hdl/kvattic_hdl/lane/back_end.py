"""The token back end of a lane: what is asked for, what may come, and what becomes of each token's sums."""

from typing import Any

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import Config
from kvattic.spec.formats import DIGIT_BITS
from kvattic_hdl.datapath.score import ScoreUnit
from kvattic_hdl.datapath.weights import WeightUnit
from kvattic_hdl.lane.arrivals import Arrivals, headers_buffered
from kvattic_hdl.lane.faults import Faults
from kvattic_hdl.lane.first_pass import ChosenFeatures, FirstPass, FirstPlaces
from kvattic_hdl.lane.first_walker import FirstWalker
from kvattic_hdl.lane.front import front_link
from kvattic_hdl.lane.jobs import Jobs, StripeLists
from kvattic_hdl.lane.marks import Marks
from kvattic_hdl.lane.outstanding import Outstanding
from kvattic_hdl.lane.score_memory import ScoreMemory
from kvattic_hdl.lane.score_ring import Lookup, ScoreRing
from kvattic_hdl.lane.scrubber import Scrubber
from kvattic_hdl.lane.turns import Turns
from kvattic_hdl.lane.walker import Walker
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.shapes import MISSING_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import StreamRegister
from kvattic_hdl.sparse.lane_topk import LaneTopK


def back_end_ports(config: Config) -> dict[str, wiring.Member]:
    """The ports of a lane that are its back end's; `Lane` says what they mean."""
    shapes = Shapes(config)
    slots = config.jobs_in_flight
    return {
        "lane": In(shapes.lane),
        "codewords": In(stream.Signature(shapes.beat)),
        "requests": Out(stream.Signature(shapes.request)),
        "load_valid": In(1),
        "load": In(shapes.load),
        "start_valid": In(1),
        "start": In(shapes.start),
        "lists_room": Out(1),
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
        "report_slot": In(shapes.slot),
        "report": Out(shapes.report),
        "missing_key": Out(MISSING_BITS + 1),
        "missing_value": Out(MISSING_BITS + 1),
        "events": Out(shapes.events),
        "beat_slot": Out(shapes.slot),
        "offender": Out(shapes.tag),
        "ready": Out(1),
    }


class TokenBackEnd(wiring.Component):
    """Asks for each job's codewords, checks them as they come, and turns sums into scores and scores into weights.

    Everything here is about tokens or codewords, which come once in many cycles; beats are the front's.

    Parameters
    ----------
    config : Config

    Members
    -------
    lane, codewords, requests, load_valid, load, start_valid, start, live, value_open, failed : as `Lane`'s
    keys_done, values_done, first_done, first_slot, first_row, first_maximum : as `Lane`'s
    sweep_valid, sweep, sweep_done, reference_write, reference_row, reference, sum_row, sum : as `Lane`'s
    bin, count, unmarked, select_valid, select_slot : as `Lane`'s
    maximum_slot, maximum_row, maximum, maximum_write, maximum_new : as `Lane`'s
    denominator_slot, denominator_row, denominator : as `Lane`'s
    report_slot, report, missing_key, missing_value, events, beat_slot, offender : as `Lane`'s
    lists_room : as `Lane`'s
    ready : Out(1)
        The arrivals' bits are cleared.
    front : In(`front_link`)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.jobs = Jobs(config)
        self.lists = StripeLists(config)
        self.key_walker = Walker(config, Kind.KEY)
        self.value_walker = Walker(config, Kind.VALUE)
        self.turns = Turns(config)
        self.ring = ScoreRing(config)
        self.outstanding = Outstanding(config)
        self.arrivals = Arrivals(config)
        self.scrubber = Scrubber(config)
        self.score_unit = ScoreUnit(config)
        self.scores = ScoreMemory(config)
        self.weight_unit = WeightUnit(config, headers_buffered(config))
        self.faults = Faults(config)
        self.blocks = ["jobs", "lists", "key_walker", "value_walker", "turns", "ring", "outstanding", "arrivals",
                       "scrubber", "score_unit", "scores", "weight_unit", "faults"]
        if config.sparse:
            self.first_walker = FirstWalker(config)
            self.first_pass = FirstPass(config)
            self.first_places = FirstPlaces(config)
            self.chosen = ChosenFeatures(config)
            self.marks = Marks(config)
            self.selector = LaneTopK(config)
            self.blocks += ["first_walker", "first_pass", "first_places", "chosen", "marks", "selector"]
        self.unselected = Signal(config.jobs_in_flight)   # sparse jobs whose K pass waits for the selection
        super().__init__(back_end_ports(config) | {"front": In(front_link(config))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name in self.blocks:
            m.submodules[name] = getattr(self, name)
        self._begin_jobs(m)
        self._walk(m)
        self._check_arrivals(m)
        self._scrub(m)
        self._count(m)
        self._score(m)
        self._weigh(m)
        if self.config.sparse:
            self._walk_first_pass(m)
            self._collect_first_pass(m)
            self._select(m)
            self._look_marks_up(m)
        else:
            m.d.comb += self.sweep_done.eq(1)
        self._report(m)
        self._tell_events(m)
        return m

    def _begin_jobs(self, m: Module) -> None:
        """Keep each job's parameters and stripes.  A sparse job's K walk waits for its selection, and younger jobs."""
        jobs, lists = self.jobs, self.lists
        loaded = [lists, self.score_unit, self.weight_unit]
        m.d.comb += [
            jobs.start_valid.eq(self.start_valid),
            jobs.start.eq(self.start),
            jobs.stripes.eq(lists.stripes),
            jobs.tail.eq(lists.tail),
            lists.lane.eq(self.lane),
            lists.start_valid.eq(self.start_valid),
            lists.start_slot.eq(self.start.slot),
            lists.start_sparse.eq(self.start.mode != Mode.DENSE),
            lists.live.eq(self.live),
            self.lists_room.eq(lists.room),
        ]
        if self.config.sparse:
            loaded.append(self.chosen)
            selected = strobe(self.select_valid, self.select_slot)
            m.d.sync += self.unselected.eq((self.unselected | Mux(jobs.begun_sparse, jobs.begun, 0)) & ~selected)
        for block in loaded:
            m.d.comb += [block.load_valid.eq(self.load_valid), block.load.eq(self.load)]

    def _walk(self, m: Module) -> None:
        """Ask for the codewords of K and V."""
        jobs, lists, turns, ring = self.jobs, self.lists, self.turns, self.ring
        key_walker, value_walker = self.key_walker, self.value_walker
        for walker, job, stripes in ((key_walker, jobs.key, lists.key), (value_walker, jobs.value, lists.value)):
            m.d.comb += [
                job.slot.eq(walker.slot),
                walker.job.eq(job.job),
                stripes.address.eq(walker.stripe_address),
                walker.stripe.eq(stripes.stripe),
                walker.skip.eq(jobs.sparse.bit_select(walker.slot, 1)),
            ]
            # A cycle late: whether a request is made goes far.
            m.d.sync += walker.failed.eq(self.failed.bit_select(walker.slot, 1))
        selected = strobe(self.select_valid, self.select_slot) if self.config.sparse else Const(0)
        # These a cycle late, too: no request is made in a job's first cycle.
        key_skip = Signal()
        m.d.sync += [
            key_skip.eq(key_walker.skip),
            # A sparse job's V is asked for when it may come: until then it would hold dies that others could use, and
            # what lies between two of its reads is another job's.
            value_walker.room.eq(~value_walker.skip | self.value_open.bit_select(value_walker.slot, 1)),
        ]
        connect(m, key_walker.requests, turns.key)
        connect(m, value_walker.requests, turns.value)
        # Whether the engine takes a request is known a cycle late: no path goes through a lane within a cycle.
        m.submodules.request_register = request_register = StreamRegister(self.requests.payload.shape())
        connect(m, turns.requests, request_register.i)
        connect(m, request_register.o, flipped(self.requests))
        m.d.comb += [
            key_walker.enable.eq(Mux(jobs.begun_sparse, 0, jobs.begun) | selected),
            key_walker.expect.eq(self.unselected),
            key_walker.room.eq(ring.room | key_skip),
            value_walker.enable.eq(strobe(key_walker.end, key_walker.slot)),
            turns.key_follow.eq(key_walker.follow),
            turns.value_follow.eq(value_walker.follow),
            turns.key_end.eq(key_walker.end),
            turns.value_end.eq(value_walker.end),
            turns.key_skip.eq(key_skip),
            ring.sparse.eq(jobs.sparse),
            ring.key_slot.eq(key_walker.slot),
            ring.key_begin.eq(key_walker.begin),
            ring.key_fired.eq(key_walker.asked),
            ring.key_place.eq(key_walker.requests.payload.tag.place),
        ]

    def _walk_first_pass(self, m: Module) -> None:
        """Ask for what the first pass of sparse jobs reads."""
        jobs, lists, turns, ring, walker = self.jobs, self.lists, self.turns, self.ring, self.first_walker
        connect(m, walker.requests, turns.first)
        m.d.comb += [
            walker.enable.eq(jobs.begun),
            jobs.first.slot.eq(walker.slot),
            walker.job.eq(jobs.first.job),
            walker.keys_walked.eq(self.outstanding.keys_walked.bit_select(walker.slot, 1)),
            walker.fits.eq(ring.first_room),
            walker.room.eq(self.first_pass.room),
            lists.first.address.eq(walker.stripe_address),
            walker.stripe.eq(lists.first.stripe),
            self.chosen.address.eq(walker.chosen_address),
            walker.chosen.eq(self.chosen.feature),
            turns.first_follow.eq(walker.follow),
            turns.first_end.eq(walker.end),
            ring.first_places.eq(jobs.first.job.stripes << ceil_log2(self.config.group_codewords)),
            ring.first_slot.eq(walker.slot),
            ring.first_begin.eq(walker.begin),
        ]
        m.d.sync += walker.failed.eq(self.failed.bit_select(walker.slot, 1))
        if self.config.codes:
            m.d.comb += [lists.sink_slot.eq(walker.slot), walker.sink_page.eq(lists.sink_page)]

    def _check_arrivals(self, m: Module) -> None:
        """Let through what was asked for."""
        arrivals, ring, slot = self.arrivals, self.ring, self.arrivals.slot
        job, stripe = self.jobs.arrivals.job, self.lists.arrivals
        connect(m, flipped(self.codewords), arrivals.codewords)
        connect(m, arrivals.headers, flipped(self.front.headers))
        connect(m, arrivals.beats, flipped(self.front.beats))
        m.d.comb += [
            self.jobs.arrivals.slot.eq(slot),
            ring.slots[Lookup.ARRIVALS].eq(slot),
            arrivals.epoch.eq(job.epoch),
            arrivals.active.eq((self.outstanding.active & self.live).bit_select(slot, 1)),
            arrivals.open.eq(self.value_open.bit_select(slot, 1)),
            arrivals.failed.eq(self.failed.bit_select(slot, 1)),
            arrivals.begun.eq(self.outstanding.keys_begun.bit_select(slot, 1)),
            arrivals.asked.eq(ring.asked[Lookup.ARRIVALS]),
            arrivals.ring_base.eq(ring.base[Lookup.ARRIVALS]),
            self.jobs.next.slot.eq(arrivals.next_slot),
            arrivals.stripe_bits.eq(self.jobs.next.job.stripe_bits),
            arrivals.read.eq(job.read),
            arrivals.stripe_token.eq(stripe.stripe.token),
            stripe.address.eq(arrivals.stripe_address),
            arrivals.beat_taken.eq(self.front.beat_taken),
            self.offender.eq(arrivals.offender),
            self.ready.eq(arrivals.ready & self.front.ready),
        ]
        if self.config.sparse:
            m.d.comb += [
                self.first_places.asked_slot.eq(slot),
                arrivals.first_asked.eq(self.first_places.asked_places),
                arrivals.first_group.eq(self.first_places.first_group),
                arrivals.first_done.eq(self.first_done.bit_select(slot, 1)),
                arrivals.sparse.eq(job.mode != Mode.DENSE),
                arrivals.centroid.eq(job.mode == Mode.CENTROID),
                arrivals.unit_bits.eq(job.unit_bits),
                arrivals.stripe_whole.eq(stripe.stripe.whole),
                self.chosen.asked_slot.eq(slot),
                self.chosen.asked_feature.eq(arrivals.feature),
                arrivals.chosen.eq(self.chosen.chosen),
            ]
        if self.config.codes:
            m.d.comb += [
                arrivals.codes.eq(job.mode == Mode.CODES),
                arrivals.sinks.eq(job.sinks),
                arrivals.stripe_first.eq(stripe.stripe.first),
                arrivals.codes_taken.eq(self.front.codes_taken),
                self.front.heading.eq(arrivals.heading),
            ]

    def _scrub(self, m: Module) -> None:
        """Give the ring's places back, with their bits clear."""
        arrivals, ring, scrubber, outstanding = self.arrivals, self.ring, self.scrubber, self.outstanding
        m.d.comb += [
            scrubber.start.eq(strobe(self.start_valid, self.start.slot)),
            scrubber.failed.eq(self.failed),
            scrubber.held.eq(self.front.waits_copy),
            scrubber.holds.eq(ring.holds),
            scrubber.walked.eq(outstanding.keys_walked & outstanding.values_walked & ~outstanding.remains),
            scrubber.came.eq(self.jobs.sparse & self.first_done if self.config.sparse else 0),
            ring.slots[Lookup.SCRUBBER].eq(scrubber.slot),
            scrubber.base.eq(ring.base[Lookup.SCRUBBER]),
            scrubber.places.eq(ring.taken[Lookup.SCRUBBER]),
            arrivals.scrub.eq(scrubber.scrub),
            arrivals.scrub_first.eq(scrubber.scrub_first),
            arrivals.scrub_ring.eq(scrubber.scrub_ring),
            scrubber.scrubbed.eq(arrivals.scrubbed),
            ring.done.eq(self.values_done & (scrubber.cleared | ~self.jobs.sparse)),
        ]

    def _collect_first_pass(self, m: Module) -> None:
        """Keep the groups of the first pass until their tokens are scored."""
        first_pass, places, walker = self.first_pass, self.first_places, self.first_walker
        connect(m, first_pass.harvest, flipped(self.front.harvest))
        m.d.comb += [
            first_pass.open.eq(walker.open),
            first_pass.close.eq(walker.close),
            first_pass.asked.eq(walker.asked),
            first_pass.group.slot.eq(walker.slot),
            first_pass.group.ring.eq(places.base + walker.place),
            first_pass.group.token.eq(walker.token),
            first_pass.group.features.eq(walker.features),
            first_pass.given_up.eq(self.scrubber.settled),
            first_pass.feature_stored.eq(self.front.feature_stored),
            first_pass.feature_group.eq(self.front.stored_group),
            first_pass.sketch_stored.eq(self.score_unit.stored_last & self.score_unit.stored_sketch),
            first_pass.sketch_group.eq(self.score_unit.stored_group),
            first_pass.harvested.eq(self.score_unit.stored_last & self.score_unit.stored_harvest),
            places.slot.eq(walker.slot),
            places.begin.eq(walker.begin),
            places.asked.eq(walker.asked),
            places.place.eq(walker.requests.payload.tag.place),
            places.next_ring.eq(self.ring.head),
            places.next_group.eq(first_pass.next),
        ]
        if self.config.codes:
            m.d.comb += first_pass.group.sinks.eq(walker.sinks)

    def _count(self, m: Module) -> None:
        """Count what is outstanding."""
        outstanding, front, score_unit = self.outstanding, self.front, self.score_unit
        m.d.comb += [
            outstanding.start.eq(strobe(self.start_valid, self.start.slot)),
            outstanding.sparse.eq(self.jobs.sparse),
            outstanding.failed.eq(self.failed),
            outstanding.abandoned.eq(self.scrubber.abandoned),
            outstanding.key_stored.valid.eq(score_unit.stored_last & ~score_unit.stored_harvest),
            outstanding.key_stored.slot.eq(score_unit.stored_slot),
            outstanding.value_stored.valid.eq(front.value_stored),
            outstanding.value_stored.slot.eq(front.stored_slot),
            outstanding.report_slot.eq(self.report_slot),
            self.keys_done.eq(outstanding.keys_done),
            self.values_done.eq(outstanding.values_done),
            self.first_done.eq(outstanding.first_done),
            self.missing_key.eq(outstanding.missing_key),
            self.missing_value.eq(outstanding.missing_value),
        ]
        walks: list[tuple[Any, Walker | FirstWalker]] = [
            (outstanding.key, self.key_walker), (outstanding.value, self.value_walker)]
        if self.config.sparse:
            walks.append((outstanding.first, self.first_walker))
            m.d.comb += [
                outstanding.remains.eq(self.first_pass.remains),
                outstanding.feature_stored.valid.eq(front.feature_stored),
                outstanding.feature_stored.slot.eq(front.stored_slot),
            ]
        for walk, walker in walks:
            m.d.comb += [getattr(walk, name).eq(getattr(walker, name)) for name in ("slot", "begin", "end", "asked")]

    def _score(self, m: Module) -> None:
        """Turn the sums of K tokens, sketches and harvests into scores."""
        score_unit, job, scored = self.score_unit, self.jobs.score, self.front.scored
        m.d.comb += [
            score_unit.valid.eq(scored.valid & scored.into_score & scored.last),
            score_unit.where.eq(scored.where),
            score_unit.sums.eq(self.front.sums),
            score_unit.overflows.eq(self.front.clipped),
            job.slot.eq(score_unit.scale_slot),
            score_unit.scale.eq(job.job.scale),
            score_unit.tree_token.eq(job.job.tree_token),
            score_unit.maximum_slot.eq(self.maximum_slot),
            score_unit.maximum_row.eq(self.maximum_row),
            self.maximum.eq(score_unit.maximum),
        ]
        if self.config.sparse:
            harvested = scored.harvest & ~scored.sink if self.config.codes else scored.harvest
            m.d.comb += [
                score_unit.valid.eq((scored.valid & scored.into_score & scored.last) | harvested),
                score_unit.unit_bits.eq(job.job.unit_bits),
                score_unit.forget_valid.eq(self.select_valid),
                score_unit.forget_slot.eq(self.select_slot),
                score_unit.first_slot.eq(self.first_slot),
                score_unit.first_row.eq(self.first_row),
                self.first_maximum.eq(score_unit.first_maximum),
            ]

    def _weigh(self, m: Module) -> None:
        """Turn scores into weights.  The score memory joins K's end with V's beginning; the selector reads it, too."""
        score_unit, weight_unit = self.score_unit, self.weight_unit
        scores = self.scores
        connect(m, self.arrivals.value_requests, weight_unit.requests)
        connect(m, weight_unit.weights, flipped(self.front.weights))
        m.d.comb += [
            scores.write.eq(score_unit.score_write),
            scores.write_address.eq(score_unit.score_address),
            scores.write_score.eq(score_unit.score),
            scores.score_ask.eq(weight_unit.score_ask),
            scores.score_address.eq(weight_unit.score_address),
            weight_unit.score.eq(scores.score),
            weight_unit.maximum_slot.eq(self.maximum_slot),
            weight_unit.maximum_row.eq(self.maximum_row),
            weight_unit.maximum_write.eq(self.maximum_write),
            weight_unit.maximum_new.eq(self.maximum_new),
            weight_unit.denominator_slot.eq(self.denominator_slot),
            weight_unit.denominator_row.eq(self.denominator_row),
            self.denominator.eq(weight_unit.denominator),
            self.jobs.front.slot.eq(self.front.job_slot),
            self.front.k_offset.eq(self.jobs.front.job.k_offset),
        ]
        if self.config.sparse:
            m.d.comb += scores.word_address.eq(self.selector.score_address)

    def _select(self, m: Module) -> None:
        """Find the tokens that are selected."""
        selector, job, stripe, weight_unit = self.selector, self.jobs.selector, self.lists.selector, self.weight_unit
        m.d.comb += [
            job.slot.eq(selector.slot),
            self.ring.slots[Lookup.SELECTOR].eq(selector.slot),
            selector.ring_base.eq(self.ring.base[Lookup.SELECTOR]),
            stripe.address.eq(selector.stripe_address),
            selector.stripe_token.eq(stripe.stripe.token),
            selector.stripe_whole.eq(stripe.stripe.whole),
            selector.score_grant.eq(selector.score_ask & ~weight_unit.score_ask),
            selector.scores.eq(self.scores.word),
            self.sweep_done.eq(selector.done),
        ]
        m.d.comb += [getattr(selector, name).eq(job.job[name]) for name, _ in job.job.shape()]
        m.d.comb += [getattr(selector, name).eq(getattr(self, name))
                     for name in ("sweep_valid", "sweep", "reference_write", "reference_row", "reference", "sum_row",
                                  "bin")]
        m.d.comb += [getattr(self, name).eq(getattr(selector, name)) for name in ("sum", "count", "unmarked")]

    def _look_marks_up(self, m: Module) -> None:
        """Tell arrivals and walkers which tokens are selected."""
        marks, ring = self.marks, self.ring
        m.d.comb += [
            marks.write.eq(self.selector.mark_valid),
            marks.write_ring.eq(self.selector.mark_ring),
            marks.write_marks.eq(self.selector.mark_bits),
            marks.arrival.eq(self.arrivals.mark_read),
            marks.arrival_ring.eq(self.arrivals.mark_ring),
            self.arrivals.marks.eq(marks.marks),
            marks.key.eq(self.key_walker.look),
            marks.key_ring.eq(self.key_walker.look_ring),
            self.key_walker.look_granted.eq(marks.key_granted),
            marks.value.eq(self.value_walker.look),
            marks.value_ring.eq(self.value_walker.look_ring),
            self.value_walker.look_granted.eq(marks.value_granted),
        ]
        for walker, lookup in ((self.key_walker, Lookup.KEY), (self.value_walker, Lookup.VALUE)):
            m.d.comb += [
                ring.slots[lookup].eq(walker.slot),
                walker.ring_base.eq(ring.base[lookup]),
                walker.wanted.eq(marks.marks.any()),
            ]

    def _report(self, m: Module) -> None:
        """Keep what is wrong with each job."""
        faults, front, score_unit, arrivals = self.faults, self.front, self.score_unit, self.arrivals
        checked = front.checked
        m.d.comb += [
            self.jobs.faults.slot.eq(checked.where.slot),
            faults.start.eq(strobe(self.start_valid, self.start.slot)),
            faults.valid.eq(checked.valid),
            faults.slot.eq(checked.where.slot),
            faults.token.eq(checked.where.token),
            faults.end_token.eq(self.jobs.faults.job.end_token),
            faults.value.eq(~checked.into_score),
            faults.error.eq(checked.error),
            faults.special.eq(front.special),
            faults.score_overflow.eq(
                strobe(score_unit.overflow, score_unit.stored_slot)
                | strobe(front.feature_clipped, front.clipped_slot)),
            faults.value_overflow.eq(strobe(front.value_clipped, front.clipped_slot)),
            faults.duplicate.eq(strobe(arrivals.duplicate, arrivals.offender.slot)),
            faults.report_slot.eq(self.report_slot),
            self.report.eq(faults.report),
        ]
        if self.config.sparse:
            m.d.comb += [
                faults.feature.eq(checked.feature),
                faults.sketch.eq(checked.feature | checked.where.sketch),
            ]

    def _tell_events(self, m: Module) -> None:
        """Say why no beat was issued, and what was dropped."""
        events, outstanding, front, arrivals = self.events, self.outstanding, self.front, self.arrivals
        any_key, any_value, any_open_value, any_selection = (
            Signal(name=name) for name in ("any_key", "any_value", "any_open_value", "any_selection"))
        m.d.sync += [
            any_selection.eq((self.unselected & self.first_done).any()),
            any_key.eq(outstanding.keys_wait.any()),
            any_value.eq(outstanding.values_wait.any()),
            any_open_value.eq((outstanding.values_wait & self.value_open).any()),
        ]
        wanted = any_key | any_open_value
        waiting = any_value | any_selection
        m.d.comb += [
            events.beat.eq(front.beat_issued),
            events.weights.eq(front.waits_weight),
            events.scores.eq(front.waits_score | front.waits_copy),
            events.starved.eq(front.starves & wanted),
            events.barrier.eq(front.starves & ~wanted & waiting),
            events.idle.eq(front.starves & ~wanted & ~waiting),
            events.duplicate.eq(arrivals.duplicate),
            events.stale.eq(arrivals.stale),
            events.bad_tag.eq(arrivals.bad_tag),
            self.beat_slot.eq(front.job_slot),
        ]
