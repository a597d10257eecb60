"""What the timing model counts in: a configuration's times in clock cycles."""

from dataclasses import dataclass

from kvattic.spec.config import Config

GATHER = 160
"""Cycles that a die waits for requests of its other planes: 128 to 192 (hdl: RunQueues.growing)."""
DEPTH = 16
"""Runs of a plane's queue (hdl: RunQueues)."""
BUFFERS = 8
"""Codewords that may wait for the lane before the bus stands (hdl: Decoder)."""
DECISION, SEND, SHOW, PLAN = 20, 17, 25, 30
"""Cycles of the controller's machine: from the end of a run to its die's next command; between the commands of two
planes; from ready to the first burst; of planning a read, without its two looks at each plane."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times in cycles, and counts, of a configuration; made by `times_of`."""

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
    between_planes: float
    array: float
    ccs: float
    decision: float
    planning: float
    gather: float
    arrival: float
    harvest: float
    token: float
    fetch: float
    load: float
    maximum: float
    select: float
    select_row: float
    alpha: float
    gather_row: float
    drain_row: float
    drain: float
    write_row: float
    complete: float
    dram_codeword: float
    dram_latency: float
    page_codewords: int
    adl: float
    t_prog: float
    t_bers: float
    status: float
    operation: float


def times_of(config: Config) -> Times:
    """The times of a configuration."""
    part = config.part

    def cycles(nanoseconds: float) -> float:
        return nanoseconds * config.clock_mhz / 1000

    codeword = max(config.raw_codeword_bytes / part.bus_mts * config.clock_mhz, config.raw_codeword_words)
    return Times(
        dies=config.dies, planes=part.planes, page_mask=(1 << config.block_page_bits) - 1,
        separate=part.separate_command_bus, depth=DEPTH, groups=config.groups_in_flight, ring=config.ring_codewords,
        buffers=BUFFERS, beats=config.beats_per_codeword, codeword=codeword, preamble=cycles(part.t_pre),
        cycle=cycles(part.t_cad), dbsy=cycles(part.t_dbsy), t_r=cycles(part.t_r),
        between_planes=cycles(part.t_wb + part.t_dbsy + part.t_rr) + SEND,
        array=cycles(part.t_wb + part.t_r + part.t_rr) + SHOW,
        ccs=cycles(part.t_ccs), decision=DECISION, planning=PLAN + 2 * part.planes, gather=GATHER,
        arrival=config.beats_per_codeword + 30, harvest=20,
        token=3 if config.rows == 1 and config.beats_per_token >= 3 else config.rows,
        fetch=30, load=40, maximum=6, select=131, select_row=126, alpha=config.channels + 5,
        gather_row=config.channels + 5, drain_row=config.head_dim, drain=55 if config.sparse else 40,
        write_row=config.head_dim / 2, complete=40,
        dram_codeword=max(2, config.codeword_bytes / config.dram_beat_bytes), dram_latency=60,
        page_codewords=config.codewords_per_page, adl=cycles(part.t_adl + part.t_cad) + DECISION,
        t_prog=cycles(part.t_prog), t_bers=cycles(part.t_bers), status=cycles(part.t_whr + part.t_pre) + 2 * DECISION,
        operation=60)
