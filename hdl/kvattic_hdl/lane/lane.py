"""A lane: the datapath of one or several flash channels, from codewords to a share of each job's scores and sums."""

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic_hdl.lane.back_end import TokenBackEnd, back_end_ports
from kvattic_hdl.lane.copier import copy_link
from kvattic_hdl.lane.front import Front
from kvattic_hdl.lib.shapes import Shapes


class Lane(wiring.Component):
    """Walks each job's pages on its channels, scores K codewords and sums V codewords as they come.

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
    lane : In(lane)
        The lane's number, constant.
    codewords : In(stream of beat)
    requests : Out(stream of request)
    load_valid, load : In
        Row records, q, and then the table's entries, before `start`; until then they do nothing that the next row
        record of the slot would not undo.  Of a sparse job each entry is followed by its sketch's; row scales and
        chosen features come behind the row records.
    start_valid, start : In
        A job begins, a cycle or more after its last `load`; its slot must be free.
    lists_room : Out(1)
        Another job's table may be loaded; known three cycles after a `start`.  Jobs are loaded one after the other.
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
    copy : Out(`copy_link`)
        Codewords of READs, to be copied.
    report_slot : In, report : Out(report) two cycles later
    missing_key, missing_value : Out(16)
        Codewords of `report_slot` that were asked for and not accounted for yet, two cycles later; the first pass's
        count as K.
    events : Out(events)
    beat_slot : Out(slot)
        Whose beat was taken in the cycle before.
    offender : Out(tag)
        The tag that the events stale, bad_tag and duplicate are about.
    ready : Out(1)
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        super().__init__(back_end_ports(config) | {
            "chain_i": In(stream.Signature(shapes.partial)),
            "chain_o": Out(stream.Signature(shapes.partial)),
            "copy": Out(copy_link(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.back_end = back_end = TokenBackEnd(self.config)
        m.submodules.front = front = Front(self.config)
        connect(m, front.back_end, back_end.front)
        connect(m, flipped(self.chain_i), front.chain_i)
        connect(m, front.chain_o, flipped(self.chain_o))
        connect(m, front.copy, flipped(self.copy))
        m.d.comb += [front.load_valid.eq(self.load_valid), front.load.eq(self.load)]
        for name, member in back_end_ports(self.config).items():
            inner, outer = getattr(back_end, name), getattr(self, name)
            if not member.is_port:
                connect(m, flipped(outer), inner)
            elif member.flow == In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)
        return m
