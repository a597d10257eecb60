"""What the timing model counts in: a configuration's times in clock cycles, each with its source (docs/timing.md)."""

from dataclasses import dataclass

from kvattic.spec.config import Config
from kvattic.spec.scheduling import RUN_QUEUE_DEPTH

# Of the RTL, not fitted: parameters of its blocks, and cycles of their state machines as their sources count them.
DECISION, SEND, SHOW, PLAN, LOOK = 26, 9, 17, 30, 8
"""Cycles of the controller's machine: from the end of a run to its die's next command; between the commands of two
planes, and from ready to the first burst, but for LOOK; of planning a read, without its two looks at each plane; what
always passes between a time's end and a look at the die (Controller)."""
ROUND = 8
"""Dies of a drive in which the machine takes DECISION, SEND, SHOW and PLAN.  It goes from die to die, so it takes less
with fewer of them: a trace of the RTL with two has 7, 2, 4 and 7.  With sixteen it was no slower."""
STAGES = 30
"""Cycles of a codeword from the end of its last word on the bus to the first of its beats, and from its last beat to
the score or sum (Decoder, Arrivals, the lane's pipeline)."""
OPERATION = 60
"""Cycles in which a flash command is fetched and checked (Loader)."""

KEPT = 512
"""Units of several tokens, of one row, that a selection keeps from its MASS sweep on (LaneTopK)."""
COPY = 9
"""Cycles of the copier beside a codeword's words on the host's bus (Copier)."""

# Fitted: rounded so that few recorded points agree, and of little weight.
FETCH, LOAD = 30, 40
"""Cycles until a command's line has come; of checks, and until a block's first word comes.  Fitted to jobs alone."""
KEPT_ONE_IN = 13
"""Units of which a DIGIT sweep keeps one for the next; from the recorded latency of a selection, 2,433 cycles."""
SELECT, SELECT_ROW = 131, 126
"""Cycles of a selection beside its sweeps, and for each row: maxima, logarithm, counts.  Fitted to the two latencies of
SPARF in TopK's docstring, with one row and with eight."""
GATHER = 5
"""Cycles of a codeword in a lane's gather from its last word to its first beat, where a lane has several channels."""
HARVEST = 20
"""Cycles of a group of the first pass beside those of its tokens."""
COMPLETE = 40
"""Cycles from the last result line to the completion.  Fitted to jobs alone."""
DRAM_LATENCY = 60
"""Cycles from a request of the tail to its words, of which the simulated memory takes 30."""
BUFFERS = 8
"""Codewords that the lane may be behind before the bus stands.  Matters only where a lane is slower than its bus."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times in cycles, and counts, of a configuration; `times_of` makes it.

    Attributes:
        lanes, sweep_tokens: of the engine; tokens of a step of a selection's sweep.
        weighs_anew: a selection is of one row and keeps no masses.
        dies, planes: of a channel; of a die.
        page_mask: bits of a row that are the page of the block.
        separate: commands have pins of their own.
        depth, groups, ring, buffers: runs of a queue; groups in flight; codewords of the score ring; see `BUFFERS`.
        beats, codeword: of a codeword on its lane; on the bus.
        preamble, cycle: of a burst; of a command cycle.
        dbsy, t_r, t_prog, t_bers: what the array is busy for.
        between_planes, array: from a read's command to the next plane's; to the first burst.
        ccs, adl, status: from a command to data out, data in, and of a status byte.
        decision, planning: see `DECISION` and `PLAN`.
        arrival: from a codeword's last word on the bus to its scores or sums.
        harvest, token: of a group of the first pass, and of each of its tokens.
        fetch, load: see `FETCH`.
        rank, rank_row: of the choice of features, and for each row.
        select, select_row, alpha: of a selection; alpha of a row.
        maximum, gather_row, drain_row, drain, write_row, complete: of the stages behind the lanes.
        dram_codeword, dram_latency: of a codeword of the tail.
        page_codewords: of a page.
        operation: see `OPERATION`.
    """

    lanes: int
    sweep_tokens: int
    weighs_anew: bool
    dies: int
    planes: int
    page_mask: int
    separate: bool
    depth: int
    groups: int
    ring: int
    buffers: int
    beats: float
    codeword: float
    preamble: float
    cycle: float
    dbsy: float
    t_r: float
    t_prog: float
    t_bers: float
    between_planes: float
    array: float
    ccs: float
    adl: float
    status: float
    decision: float
    planning: float
    arrival: float
    harvest: float
    token: float
    fetch: float
    load: float
    rank: float
    rank_row: float
    select: float
    select_row: float
    alpha: float
    maximum: float
    gather_row: float
    drain_row: float
    drain: float
    write_row: float
    complete: float
    dram_codeword: float
    dram_latency: float
    page_codewords: int
    operation: float


def times_of(config: Config) -> Times:
    """The times of a configuration."""
    part = config.part

    def cycles(nanoseconds: float) -> float:
        return nanoseconds * config.clock_mhz / 1000

    share = min(config.dies / ROUND, 1.0)
    decision = DECISION * share
    # A token takes its beats, or the score unit's cycles if these are more.
    alone = config.rows == 1 and config.lane_channels == 1
    token = 3 if alone and config.beats_per_token >= 3 else config.rows
    beats = config.tokens_per_codeword * max(config.beats_per_token, token)
    # A channel has its share of a lane that it has in common with others: of its time, score ring and groups.
    beats *= config.lane_channels
    gather = config.words_per_codeword + GATHER if config.lane_channels > 1 else 0
    return Times(
        lanes=config.lanes, sweep_tokens=config.sweep_tokens, weighs_anew=config.rows == 1,
        dies=config.dies, planes=part.planes, page_mask=(1 << config.block_page_bits) - 1,
        separate=part.separate_command_bus, depth=RUN_QUEUE_DEPTH,
        groups=max(1, config.groups_in_flight // config.lane_channels),
        ring=config.ring_codewords // config.lane_channels, buffers=BUFFERS, beats=beats,
        codeword=max(config.raw_codeword_bytes / part.bus_mts * config.clock_mhz, config.raw_codeword_words),
        preamble=cycles(part.t_pre), cycle=cycles(part.t_cad), dbsy=cycles(part.t_dbsy), t_r=cycles(part.t_r),
        t_prog=cycles(part.t_prog), t_bers=cycles(part.t_bers),
        between_planes=cycles(part.t_wb + part.t_dbsy + part.t_rr) + LOOK + SEND * share,
        array=cycles(part.t_wb + part.t_r + part.t_rr) + LOOK + SHOW * share, ccs=cycles(part.t_ccs),
        adl=cycles(part.t_adl + part.t_cad) + decision, status=cycles(part.t_whr + part.t_pre) + 2 * decision,
        decision=decision, planning=PLAN * share + 2 * part.planes, arrival=gather + config.beats_per_codeword + STAGES,
        harvest=HARVEST, token=token, fetch=FETCH, load=LOAD,
        # Ranker: 3 or 4 digits normally.
        rank=3.5 * (config.head_dim + 24) + 138, rank_row=2 * config.head_dim + 8,
        select=SELECT, select_row=SELECT_ROW, alpha=config.lanes + 5, maximum=6,
        # Gather: a row's reciprocal takes 20 cycles; the divider gives a quotient every second one.
        gather_row=max(config.lanes + 5, 20),
        drain_row=2 * config.head_dim, drain=46 if config.sparse else 31, write_row=config.head_dim / 2,
        complete=COMPLETE,
        # TailReader: a word of DRAM a cycle, and a beat of a lane, over all lanes.
        dram_codeword=max(config.codeword_bytes / config.dram_beat_bytes, config.codeword_bytes / config.word_bytes),
        dram_latency=DRAM_LATENCY,
        page_codewords=config.codewords_per_page, operation=OPERATION)
