"""The timing model: recorded cycles, limits that nothing passes, and what must never make a drive slower."""

from dataclasses import replace

import numpy as np
import pytest
from tests.host.timing.recorded import POINTS

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.commands import Kind, Mode
from kvattic.spec.config import BOARD, GQA, PAPER, TINY
from kvattic.spec.formats import KvFormat
from kvattic.spec.nand import PARTS
from kvattic.timing import Job, Layer, Operation, Read, Stripe, attend_job, estimate, in_turn, job_of_reads, seconds


@pytest.mark.parametrize("point", [pytest.param(p, id=p.name) for p in POINTS if p.quick])
def test_the_rtl_took_as_long(point):
    assert abs(point.deviation()) <= point.tolerance


def dense(config, heads=8, tokens=1024, **how):
    return estimate(config, Layer(config, heads, tokens).attend(**how))


def sparse(config, mode=Mode.SPARF, heads=8, tokens=2048, **how):
    kept = {Mode.CENTROID: {"centroids": 64}, Mode.CODES: {"codes": True}}.get(mode, {"features": True})
    how = {"top_units": 8 if mode is Mode.CENTROID else tokens // 16, "features": 16 if mode.featured else 0} | how
    return estimate(config, Layer(config, heads, tokens, **kept).attend(mode=mode, **how))


# Limits.


@pytest.mark.parametrize("config", [PAPER, BOARD, GQA, replace(PAPER.with_lane_channels(1), channels=1)],
                         ids=("paper", "board", "gqa", "one"))
def test_no_bus_moves_more_than_it_can(config):
    found = dense(config)
    codewords = sum(found.codewords.values())
    least = codewords * config.raw_codeword_bytes / config.part.bus_mts * config.clock_mhz / config.channels
    assert least < found.cycles < 1.6 * least
    assert found.bus_use == pytest.approx(least / found.cycles)
    assert found.bus_use < found.bus_use_in_window < 1
    assert found.page_reads == codewords // config.codewords_per_page
    assert found.codewords == {"feature": 0, "codes": 0, "sketch": 0, "key": codewords // 2, "value": codewords // 2}


def test_one_plane_reads_no_faster_than_its_array():
    part = replace(PAPER.part, planes=1, name="one plane")
    config = replace(PAPER.with_lane_channels(1), channels=1, dies=1, part=part)
    pages = Layer(config, 4, 256).table(0)
    jobs = [attend_job(config, [s]) for s in pages]
    reads = 2 * len(jobs)
    page = config.raw_page_bytes / part.bus_mts * config.clock_mhz
    least = reads * (config.cycles(part.t_r) + page)
    assert least < estimate(config, jobs).cycles < 1.05 * least


def test_a_fast_bus_waits_for_the_lane():
    part = replace(PAPER.part, bus_mts=4800.0, separate_command_bus=True, t_cad=10.0, name="fast")
    config = replace(PAPER, part=part, dies=16)
    found = dense(config, heads=40)
    least = sum(found.codewords.values()) * config.raw_codeword_words / config.channels
    assert least < found.cycles < 1.15 * least


def test_a_job_alone_waits_for_two_reads():
    config = PAPER
    found = estimate(config, Layer(config, 1, 64).attend())
    read, move = config.cycles(config.part.t_r), 32 * 107.5
    # K and V lie on different dies, so V is in its registers when the maximum is known.
    assert read + 2 * move < found.cycles < read + 2 * move + 1200
    job, = found.jobs
    assert 0 == job.fetched < job.first_beat < job.last_beat < job.completed == found.cycles


@pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CENTROID])
@pytest.mark.parametrize("name", ["pslc", "tlc"])
def test_sparse_modes_read_less_and_are_faster(mode, name):
    config = replace(PAPER, part=PARTS[name])
    full = estimate(config, Layer(config, 8, 4096).attend())
    part = sparse(config, mode, tokens=4096, unit_tokens=64 if mode is Mode.CENTROID else 0,
                  top_units={Mode.SPARF: 256, Mode.FETCHED: 128, Mode.CENTROID: 8}[mode])
    assert part.flash_bytes < 0.25 * full.flash_bytes
    assert part.cycles < 0.6 * full.cycles
    first = "sketch" if mode is Mode.CENTROID else "feature"
    assert part.codewords[first] and part.codewords["key"] == part.codewords["value"]
    assert part.bytes_by_kind["key"] == part.codewords["key"] * config.codeword_bytes


def test_everything_selected_reads_k_and_v_whole():
    found = sparse(PAPER, top_units=2048)
    assert found.codewords["key"] == 8 * 2048 // 2
    assert found.cycles > estimate(PAPER, Layer(PAPER, 8, 2048, features=True).attend()).cycles


@pytest.mark.parametrize("name", PARTS)
def test_every_part(name):
    config = replace(PAPER, part=PARTS[name], sparse=False)
    if name == "tiny":
        config = replace(TINY, part=PARTS[name])
    layer = Layer(config, 4, 512)
    pages = estimate(config, layer.attend())
    assert pages.page_reads == 4 * 2 * 512 // config.tokens_per_page
    programs = estimate(config, (), layer.prefill())
    assert programs.page_programs == pages.page_reads == len(programs.operations)
    assert programs.cycles > config.cycles(config.part.t_prog)


# What never makes a drive slower (by more than the order of events may).


@pytest.mark.parametrize("faster", [
    {"channels": 16}, {"dies": 16}, {"jobs_in_flight": 16}, {"score_depth": 8192},
    {"part": replace(PAPER.part, t_r=10_000.0, name="fast array")},
    {"part": replace(PAPER.part, bus_mts=2000.0, name="fast bus")},
    {"part": replace(PAPER.part, separate_command_bus=True, name="separate bus")},
], ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("mode", [Mode.DENSE, Mode.SPARF])
def test_more_of_it_is_never_slower(faster, mode):
    slow = replace(PAPER, channels=8, dies=4, jobs_in_flight=8)
    fast = replace(slow, **faster)
    run = dense if mode is Mode.DENSE else sparse
    assert run(fast).cycles <= 1.03 * run(slow).cycles


def test_rows_share_a_pass():
    one, eight = dense(GQA, rows=1), dense(GQA, rows=8)
    assert eight.codewords == one.codewords
    assert one.cycles < eight.cycles < 1.1 * one.cycles
    # Two sweeps of the selection and the scores of the first pass take the rows in turn: 512 tokens on a lane.
    alone = [sparse(GQA, heads=1, tokens=4096, rows=rows).cycles for rows in (1, 8)]
    assert 7 * 2 * 512 < alone[1] - alone[0] < 7 * 5 * 512


# Tails, operations, many jobs.


def test_a_tail_in_dram_costs_little():
    layer = Layer(PAPER, 8, 2048)
    jobs = []
    for head in range(8):
        table = layer.table(head)
        jobs.append(attend_job(PAPER, [*table, table[0]._replace(tokens=30, dram=True)]))
    plain, tail = estimate(PAPER, layer.attend()), estimate(PAPER, jobs)
    assert tail.dram_codewords == 8 * 2 * 15
    assert tail.flash_bytes == plain.flash_bytes
    assert plain.cycles <= tail.cycles < 1.02 * plain.cycles


@pytest.mark.parametrize("tokens, jobs, recorded", [(120, 1, 2_338), (120, 8, 15_800), (40, 1, 1_058)])
def test_a_job_that_lies_in_dram_takes_its_beats(tokens, jobs, recorded):
    # Of the RTL, preset tiny: all lanes together get a beat a cycle, V behind the maximum.
    job = attend_job(TINY, [Stripe(0, 0, 0, tokens, dram=True)], rows=1, stripe_pages=8)
    found = estimate(TINY, [job] * jobs)
    assert found.cycles > jobs * 2 * tokens * TINY.beats_per_token
    assert found.cycles == pytest.approx(recorded, rel=0.05)
    assert found.flash_bytes == 0


@pytest.mark.parametrize("mode", [Mode.SPARF, Mode.CENTROID])
def test_whole_stripes_are_read_whole(mode):
    stripes = [Stripe(0, 0, 4, 256, sketch_page=8), Stripe(1, 0, 4, 100, whole=True), Stripe(2, 0, 0, 10, dram=True)]
    job = attend_job(PAPER, stripes, mode=mode, marked=np.zeros((3, 128), bool), features=range(16),
                     unit_tokens=64 if mode is Mode.CENTROID else 1, stripe_pages=4)
    found = estimate(PAPER, [job])
    assert found.codewords["key"] == found.codewords["value"] == 55
    assert found.dram_codewords == (15 if mode is Mode.SPARF else 10)
    assert found.codewords["sketch"] == (55 if mode is Mode.SPARF else 2)
    assert found.codewords["feature"] == (16 if mode is Mode.SPARF else 0)


def test_centroids_of_stripes_beside_each_other_are_one_run():
    # 256 tokens have four centroids of 64 tokens, of two codewords.
    beside = [Stripe(0, 4 * i, 4 * i + 64, 256, sketch_page=8, sketch_codeword=2 * i) for i in range(6)]
    apart = [stripe._replace(sketch_codeword=4 * i) for i, stripe in enumerate(beside)]
    marked = np.zeros((6, 128), bool)
    one, six = (attend_job(PAPER, stripes, mode=Mode.CENTROID, marked=marked, unit_tokens=64, stripe_pages=4)
                for stripes in (beside, apart))
    assert [group.pages[0].runs for group in one.lanes[0].first] == [(12,)]
    assert [group.pages[0].runs for group in six.lanes[0].first] == [(2,)] * 6
    assert estimate(PAPER, [one]).codewords == estimate(PAPER, [six]).codewords
    assert estimate(PAPER, [one]).command_cycles < estimate(PAPER, [six]).command_cycles
    reads = [Read(Kind.SKETCH, 0, 8, [2 * i, 2 * i + 1]) for i in range(6)]
    same = job_of_reads(PAPER, reads, [6 * 256, *[0] * 7], rows=1, mode=Mode.CENTROID, unit_tokens=64)
    assert same.lanes[0].first == one.lanes[0].first


def test_codes_read_octets_and_sinks():
    found = sparse(PAPER, Mode.CODES, sinks=5)
    # 8 heads, 8 stripes of 16 octets; 5 sinks in 3 codewords of 2 tokens.
    assert found.codewords["codes"] == 8 * 8 * 16 and found.codewords["feature"] == 0
    assert found.codewords["sketch"] == 8 * 3
    # Two stripes of a head have one page of codes, if they lie on one channel: here each has its own.
    assert sparse(PAPER, Mode.CODES, tokens=4096).page_reads < 2 * found.page_reads
    whole = [Stripe(0, 0, 4, 256, whole=True), Stripe(1, 0, 4, 256, sketch_page=8, sketch_codeword=16)]
    job = attend_job(PAPER, whole, mode=Mode.CODES, marked=np.zeros((2, 128), bool), sinks=5, stripe_pages=4)
    found = estimate(PAPER, [job])
    assert (found.codewords["codes"], found.codewords["sketch"]) == (16, 128)      # the sinks are of the tail
    group, = job.lanes[1].first
    assert (group.features, group.tokens, group.opens, group.pages[0].runs) == (True, 256, 1, (16,))


def test_octets_of_small_pages_are_one_group():
    """Four pages of four octets: one stripe's scores, when all have come."""
    config = replace(PAPER, part=replace(PAPER.part, page_bytes=2048, spare_bytes=256), score_depth=32768)
    stripe = Stripe(0, 0, 64, 256, sketch_page=8, sketch_codeword=2)
    marked = np.zeros((1, 128), bool)
    job = attend_job(config, [stripe], mode=Mode.CODES, marked=marked, stripe_pages=config.group_pages)
    groups = job.lanes[0].first
    assert sum(group.codewords for group in groups) == 16
    assert [group.tokens for group in groups] == [0] * (len(groups) - 1) + [256]
    reads = [Read(Kind.CODES, 0, 8 + i, list(range(2 if i == 0 else 0, 2 if i == 4 else 4))) for i in range(5)]
    same = job_of_reads(config, reads, [256, *[0] * 7], rows=1, mode=Mode.CODES)
    assert same.lanes[0].first == groups


def test_what_was_read_is_enough_of_codes():
    """What the golden device notes of jobs gives the times of their tables."""
    layer, marked = Layer(PAPER, 8, 4096, codes=True), np.zeros((16, 128), bool)
    marked[:, 5::9] = True
    by_table, by_reads = [], []
    for head in range(8):
        table = layer.table(head, Mode.CODES)
        by_table.append(attend_job(PAPER, table, mode=Mode.CODES, marked=marked, stripe_pages=4))
        reads = [Read(Kind.CODES, s.channel, s.sketch_page, range(s.sketch_codeword, s.sketch_codeword + 16))
                 for s in table]
        for kind, first in ((Kind.KEY, 1), (Kind.VALUE, 2)):
            reads += [Read(kind, s.channel, s[first] + page, (np.flatnonzero(marked[i, 32 * page :][:32])).tolist())
                      for i, s in enumerate(table) for page in range(4)]
        by_reads.append(job_of_reads(PAPER, reads, [512] * 8, rows=1, mode=Mode.CODES))
    assert [job.lanes for job in by_reads] == [job.lanes for job in by_table]
    # K of sinks is a group of its own.
    sinks = job_of_reads(PAPER, [Read(Kind.CODES, 0, 8, range(16)), Read(Kind.SKETCH, 0, 40, [0, 1])], [256, *[0] * 7],
                         rows=1, mode=Mode.CODES)
    assert [(group.codewords, group.features) for group in sinks.lanes[0].first] == [(16, True), (2, False)]


def test_what_was_read_is_enough():
    """A device that notes what it reads gives the same jobs as its table."""
    layer, rng = Layer(PAPER, 8, 2048, features=True), np.random.default_rng(0)
    by_table, by_reads = [], []
    for head in range(8):
        table, marked = layer.table(head), rng.random((8, 128)) < 0.1
        kept = sorted(rng.choice(128, 16, replace=False).tolist())
        by_table.append(attend_job(PAPER, table, mode=Mode.SPARF, marked=marked, features=kept, stripe_pages=4))
        reads = []
        for number, stripe in enumerate(table):
            for kind, first, wanted in ((Kind.FEATURE, stripe.sketch_page, kept),
                                        (Kind.KEY, stripe.key_page, np.flatnonzero(marked[number]).tolist()),
                                        (Kind.VALUE, stripe.value_page, np.flatnonzero(marked[number]).tolist())):
                for page in range(4):
                    here = [codeword % 32 for codeword in wanted if codeword // 32 == page]
                    if here:
                        reads.append(Read(kind, stripe.channel, first + page, here))
        by_reads.append(job_of_reads(PAPER, reads, [256] * 8, rows=1, mode=Mode.SPARF))
    table, reads = estimate(PAPER, by_table), estimate(PAPER, by_reads)
    assert reads.codewords == table.codewords
    assert reads.page_reads == table.page_reads
    assert reads.cycles == pytest.approx(table.cycles, rel=0.03)


def test_programs_and_reads_share_the_buses():
    layer = Layer(PAPER, 8, 512)
    reads, programs = estimate(PAPER, layer.attend()), estimate(PAPER, (), layer.prefill())
    both = estimate(PAPER, layer.attend(), layer.prefill())
    assert max(reads.cycles, programs.cycles) <= both.cycles
    assert max(job.completed for job in both.jobs) > reads.cycles
    assert both.written_codewords == programs.page_programs * PAPER.codewords_per_page


def test_erases_of_a_zone_take_two_rounds():
    # The first plane's command finds no other one to join, and the next one of its die waits for it.
    found = estimate(PAPER, (), in_turn(PAPER, [range(32)] * 8, program=False))
    assert found.block_erases == 256
    assert 2 < found.cycles / PAPER.cycles(PAPER.part.t_bers) < 2.05


def test_like_jobs_go_on_at_the_rate_of_the_first():
    jobs = list(Layer(PAPER, 96, 1024).attend())
    whole, part = estimate(PAPER, jobs), estimate(PAPER, jobs[:32], in_all=96)
    assert part.cycles == pytest.approx(whole.cycles, rel=0.01)
    assert part.codewords == whole.codewords
    assert len(part.jobs) == 32


def test_jobs_wait_for_their_submission():
    jobs = list(Layer(PAPER, 8, 256).attend())
    jobs[-1].submitted = 1_000_000.0
    found = estimate(PAPER, jobs)
    assert found.jobs[-1].fetched == 1_000_000
    assert max(job.completed for job in found.jobs[:-1]) < 100_000


def test_nothing_takes_no_time():
    found = estimate(PAPER)
    assert (found.cycles, found.seconds, found.bus_use, found.bus_use_in_window, found.die_use) == (0, 0, 0, 0, 0)


def test_cycles_are_seconds_at_the_clock():
    assert seconds(PAPER, 285_000_000) == 1.0
    found = dense(PAPER)
    assert found.seconds == found.cycles / 285e6


def test_the_same_work_takes_the_same_time():
    assert sparse(PAPER) == sparse(PAPER)
    assert sparse(PAPER, seed=1) != sparse(PAPER)


# Bad input.


@pytest.mark.parametrize("call, error, message", [
    (lambda: Layer(PAPER, 0, 64), RequestError, "heads must be a positive int, not 0"),
    (lambda: Layer(PAPER, 1, 2.5), RequestError, "tokens must be a positive int, not 2.5"),
    (lambda: Layer(PAPER, 1, 64, features=True), RequestError, "whole stripes of 256"),
    (lambda: Layer(replace(PAPER, sparse=False), 1, 256, features=True), ConfigError, "without sparse attention"),
    (lambda: list(Layer(PAPER, 1, 256).attend(mode=Mode.SPARF, features=16, top_units=16)), RequestError,
     "of a layer with features"),
    (lambda: list(Layer(PAPER, 1, 256, features=True).attend(mode=Mode.SPARF, features=129, top_units=16)),
     RequestError, "features must be 1 to 128"),
    (lambda: list(Layer(PAPER, 1, 256, features=True).attend(mode=Mode.SPARF, features=1, top_units=257)),
     RequestError, "top_units must be 1 to 256"),
    (lambda: list(Layer(PAPER, 1, 256, features=True).attend(mode=Mode.CODES, top_units=1)), RequestError,
     "mode codes reads codes, which this layer is without"),
    (lambda: Layer(replace(TINY, kv=KvFormat.FP8_E4M3), 1, 128, codes=True), ConfigError, "without codes: kv must be"),
    (lambda: list(Layer(PAPER, 1, 256, centroids=64).attend(mode=Mode.CENTROID, unit_tokens=32, top_units=1)),
     RequestError, "those of the centroids, 64"),
    (lambda: list(Layer(PAPER, 1, 256).attend(rows=2)), RequestError, "rows must be 1 to 1"),
    (lambda: attend_job(PAPER, [Stripe(8, 0, 1, 64)]), RequestError, "channel must be 0 to 7, not 8"),
    (lambda: attend_job(PAPER, [Stripe(0, 0, 1, 64)], mode=Mode.SPARF), RequestError, r"shape \(1, 32\), not None"),
    (lambda: attend_job(replace(PAPER, sparse=False), [], mode=Mode.SPARF), RequestError, "no sparse modes"),
    (lambda: job_of_reads(PAPER, [], [64], rows=1), RequestError, "each of the 8 channels, not 1"),
    (lambda: estimate(PAPER, [Job(1, Mode.DENSE, [])]), RequestError, "a lane for each of the 8 channels"),
    (lambda: estimate(PAPER, (), [Operation(8, 0)]), RequestError, "channel 0 to 7"),
    (lambda: estimate(PAPER, Layer(PAPER, 1, 64).attend(), in_all=9), RequestError, "in_all must be at least"),
    (lambda: estimate(PAPER, Layer(PAPER, 1, 64 * 8 * 129).attend()), RequestError, "fit the score buffer"),
])
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_die_that_gives_its_pages_up_is_not_forgotten():
    """Two jobs of which the model once stood still: the last die to plan anew was not woken."""
    config = replace(TINY, dies=8)
    flash = (  # by job and kind, the pages of channels 0 and 1 in turn, the first of them of channel `job`
        ((0, 0, 1, 1, 2, 20, 22, 38), (3, 2, 4, 3, 5, 28, 30, 30)),
        ((4, 6, 5, 7, 6, 20, 22, 23), (7, 8, 8, 9, 9, 28, 14, 31)))
    jobs = []
    for number, kinds in enumerate(flash):
        reads = []
        for kind, pages in zip((Kind.KEY, Kind.VALUE), kinds, strict=True):
            reads += [Read(kind, (i + number) % 2, page, range(4)) for i, page in enumerate(pages)]
            reads += [Read(kind, (i + number) % 2, i, range(4), True) for i in range(3)]
        jobs.append(job_of_reads(config, reads, [95, 80] if number == 0 else [80, 95], rows=1))
    assert [job.completed for job in estimate(config, jobs).jobs] == sorted(
        job.completed for job in estimate(config, jobs).jobs)
