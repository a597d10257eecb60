"""This drive in the system model: near what is modelled job by job, and refusals that say what would be right."""

from dataclasses import replace

import pytest

from kvattic.errors import CapacityError, ConfigError, RequestError
from kvattic.spec.config import PAPER, TINY
from kvattic.timing import Layer, estimate, seconds
from kvattic_sim.system.drive import MODES, TimedDrive, mode_of
from kvattic_sim.system.parameters import PAPER_MACHINE
from kvattic_sim.system.transformer import LLAMA3_8B, OPT_13B

DRIVE = TimedDrive()
HEADS = {"kv_heads": 160, "group": 1, "head_dim": 128}


def attend(mode, drive=DRIVE, **changes):
    return drive.attention_seconds(mode, **{**HEADS, "tokens": 768, **changes})


def test_whole_stripes_without_a_tail_take_what_the_timing_model_says():
    layer = Layer(PAPER, 40, 1024)
    alone = estimate(PAPER, layer.attend(), in_all=40).cycles
    assert DRIVE.job_cycles(mode_of("dense"), 40, 1, 16, 0) == alone


@pytest.mark.parametrize("mode", MODES)
def test_a_generation_takes_what_its_steps_take_on_average(mode):
    kind, stripe = mode_of(mode), 64 if mode == "dense" else 256
    # Tails of all lengths, half a stripe on average.
    lengths = [512 + 18 + 64 * i + 7 * i % 29 for i in range(8)]
    each = [DRIVE.job_cycles(kind, 128, 1, tokens // stripe, tokens % stripe) for tokens in lengths]
    mean = seconds(PAPER, sum(each) / len(each))
    assert attend(mode, kv_heads=128, tokens=sum(lengths) / len(lengths)) == pytest.approx(mean, rel=0.08)


@pytest.mark.parametrize("mode", MODES)
def test_more_work_takes_longer(mode):
    assert attend(mode, tokens=640) < attend(mode, tokens=3200)   # short ones wait for their tails
    assert attend(mode) < attend(mode, kv_heads=400)


def test_sparse_modes_are_faster_where_they_have_something_to_leave_out():
    dense = attend("dense", kv_heads=40, tokens=4096)
    assert all(attend(mode, kv_heads=40, tokens=4096) < dense / 2 for mode in MODES if mode != "dense")


def test_many_jobs_go_on_at_the_rate_of_a_sample():
    few, more, many = (attend("dense", kv_heads=n) for n in (1000, 2000, 3000))
    assert more - few == pytest.approx(many - more)


def test_a_group_shares_a_pass_and_a_large_one_takes_several():
    grouped = TimedDrive.for_model(LLAMA3_8B, tokens=2048)
    assert grouped.config.rows == 8
    assert attend("dense", grouped, group=4) < 1.1 * attend("dense", grouped, group=1)
    assert attend("dense", grouped, group=16) > 1.8 * attend("dense", grouped, group=8)


def test_dense_jobs_beyond_the_score_buffers_are_cut():
    small = TimedDrive(replace(PAPER, score_depth=2048))
    assert attend("dense", small, kv_heads=8, tokens=5000) > 1.8 * attend("dense", small, kv_heads=8, tokens=2500)


def test_score_buffers_grow_with_the_context_and_not_otherwise():
    assert TimedDrive.for_model(OPT_13B, tokens=65_536).config == PAPER
    assert TimedDrive.for_model(OPT_13B, tokens=65_537).config.score_depth == 2 * PAPER.score_depth


def test_writing_is_in_proportion_and_features_cost_half_as_much_again():
    dense, sparf, centroid = (DRIVE.write_seconds(mode, kv_heads=64, tokens=1024)
                              for mode in ("dense", "sparf", "centroid"))
    assert DRIVE.write_seconds("dense", kv_heads=128, tokens=512) == pytest.approx(dense)
    assert 1.2 * dense < sparf < 1.6 * dense
    assert centroid == pytest.approx(dense * (2 + 1 / 16) / 2)


def test_writing_is_near_what_the_timing_model_says_of_a_prefill():
    whole = seconds(PAPER, estimate(PAPER, (), Layer(PAPER, 96, 2048, features=True).prefill()).cycles)
    assert DRIVE.write_seconds("sparf", kv_heads=96, tokens=2048) == pytest.approx(whole, rel=0.05)


def test_what_a_head_takes():
    assert [DRIVE.stored_bytes(mode) for mode in MODES] == [512, 768, 768, 528, 544]
    assert DRIVE.tail_bytes("dense") == 2 * 16384
    assert DRIVE.tail_bytes("sparf") == 8 * 16384
    assert DRIVE.message_bytes("dense", 1, 1024) < 3000
    assert DRIVE.capacity(PAPER_MACHINE) == pytest.approx(2e12 / 3)     # one bit a cell
    assert TimedDrive.for_model(OPT_13B, tokens=2048, part="tlc").capacity(PAPER_MACHINE) == pytest.approx(2e12)


@pytest.mark.parametrize(("work", "kind", "message"), [
    (lambda: attend("fast"), RequestError, "no mode 'fast'; modes are dense, sparf, fetched, centroid"),
    (lambda: attend("dense", head_dim=64), RequestError, "head_dim must be the configuration's 128, not 64"),
    (lambda: attend("dense", kv_heads=0), RequestError, "kv_heads must be at least 1, not 0"),
    (lambda: attend("dense", tokens=0), RequestError, "tokens must be at least 1, not 0"),
    (lambda: attend("sparf", group=2), RequestError, "selects once for the 2 query heads .* has 1 rows"),
    (lambda: attend("sparf", tokens=70_000), CapacityError, "at most 65,536 tokens"),
    (lambda: attend("sparf", TimedDrive(replace(TINY, sparse=False)), head_dim=32), RequestError,
     "needs a configuration with sparse modes"),
    (lambda: TimedDrive(unit_tokens=3), RequestError, "unit_tokens must be a power of two from 2 to 64, not 3"),
    (lambda: TimedDrive.for_model(replace(OPT_13B, head_dim=48), tokens=1), ConfigError, "head_dim must be one of"),
    (lambda: TimedDrive.for_model(OPT_13B, tokens=1, part="tape"), ConfigError, "no NAND part 'tape'"),
])
def test_what_makes_no_sense_is_refused(work, kind, message):
    with pytest.raises(kind, match=message):
        work()
