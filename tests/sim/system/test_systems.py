"""All systems beside each other: order, limits, and what does not fit."""

from dataclasses import replace

import pytest

from kvattic.errors import CapacityError, RequestError
from kvattic_sim.system import steps
from kvattic_sim.system.parameters import GPUS, H100, PAPER_MACHINE, gpu, table
from kvattic_sim.system.step import Load, Step
from kvattic_sim.system.systems import BASELINES, KVATTIC, WITH_DRIVES, Study, load_of
from kvattic_sim.system.transformer import LLAMA3_8B, OPT_13B, OPT_30B
from kvattic_sim.system.worth import EXACT, LARGE_HOST, SPARSE, worth

STUDY = Study(model=OPT_13B, batches=(16,), drives=(1, 2), modes=("dense", "centroid"))


@pytest.fixture(scope="module")
def rows():
    return list(STUDY.rows())


def test_each_system_has_a_row(rows):
    assert [row.system for row in rows] == [*BASELINES, *(name for name in WITH_DRIVES for _ in (1, 2)), *[KVATTIC] * 4]
    assert all(not row.error and row.tokens_per_second > row.with_prefill > 0 for row in rows)
    assert [(row.mode, row.drives) for row in rows if row.system == KVATTIC] == [
        ("dense", 1), ("dense", 2), ("centroid", 1), ("centroid", 2)]


def test_parts_of_a_row_are_its_step(rows):
    for row in rows:
        parts = [row.kv_ms, row.arithmetic_ms, row.append_ms, row.host_ms, row.gpu_ms]
        whole = max(row.gpu_ms, sum(parts) - row.gpu_ms) if row.overlapped else sum(parts)
        assert row.step_ms == pytest.approx(whole)
        assert row.tokens_per_second == pytest.approx(1e3 * row.together / row.step_ms)


def test_the_host_makes_the_difference_that_it_says():
    direct, paper = (next(replace(STUDY, host=host, drives=(1,)).rows(baselines=False)) for host in ("direct", "paper"))
    assert paper.step_ms - direct.step_ms == pytest.approx(paper.host_ms - direct.host_ms)
    assert paper.host_ms == pytest.approx(1e3 * 16 * 40 * 270e-6)


def test_overlap_reads_weights_twice_and_hides_the_shorter():
    turn, both = (next(replace(STUDY, overlapped=how, drives=(1,)).rows(baselines=False)) for how in (False, True))
    assert both.gpu_ms == pytest.approx(2 * turn.gpu_ms)
    assert both.step_ms == pytest.approx(turn.step_ms - turn.gpu_ms)


def test_the_best_split_over_drives():
    assert steps.heads_of_a_drive(16, 40, 20) == 32
    assert steps.heads_of_a_drive(64, 8, 20) == 26      # five groups of four drives: 13 sequences, two heads
    assert steps.heads_of_a_drive(1, 8, 20) == 1
    assert steps.heads_of_a_drive(64, 40, 3) == 880     # by sequence; by head it would be 896


def test_a_prefill_waits_for_the_longer_of_computing_and_writing():
    load = Load(batch=8)
    alone = steps.prefill_seconds(OPT_13B, load, PAPER_MACHINE)
    assert steps.prefill_seconds(OPT_13B, load, PAPER_MACHINE, 10 * alone) == pytest.approx(10 * alone + alone / 40)
    assert steps.prefill_seconds(OPT_13B, load, PAPER_MACHINE, alone / 10) == pytest.approx(alone * (1 + 0.1 / 40))


def test_prompts_count_in_the_whole_rate():
    step = Step(load=Load(batch=2, prompt=10, new=5), parts={"kv": 1.0}, prefill=5.0)
    assert step.tokens_per_second_with_prefill == 1.0


def test_baselines_that_need_the_queries_take_the_better_order():
    step = steps.cpu_attention(OPT_13B, Load(batch=32), PAPER_MACHINE)
    turn = step.parts["kv"] + steps.gpu_seconds(OPT_13B, 32, PAPER_MACHINE.gpu)
    assert step.seconds <= turn
    assert not steps.cpu_attention(OPT_13B, Load(batch=1), PAPER_MACHINE).overlapped


def test_sparse_attention_on_the_host_is_faster_than_dense():
    load = Load(batch=16)
    assert steps.sparse_cpu(OPT_13B, load, PAPER_MACHINE).seconds < steps.cpu_attention(
        OPT_13B, load, PAPER_MACHINE).seconds


def test_what_does_not_fit_is_a_row_that_says_so():
    study = Study(model=OPT_13B, batches=(2000,), drives=(1,), modes=("dense",))
    errors = {row.system: row.error for row in study.rows()}
    assert "take 3355 GB of a drive, which has 667 GB: with 1 drive, take more" in errors[KVATTIC]
    assert "of a drive, which has 2000 GB" in errors["paper's drive, dense"]
    assert "of a drive, which has 2000 GB" in errors["FlexGen (SSD)"]
    assert "the host has 96 GB" in errors["DRAM, CPU attention"]
    assert errors["GPU alone"] == ""


def test_shared_heads_are_not_the_papers():
    row = next(row for row in Study(model=LLAMA3_8B, batches=(2,), drives=(1,), modes=("dense",)).rows()
               if row.system == "paper's drive, dense")
    assert "Llama-3-8B has 8 KV heads for 32 query heads" in row.error


def test_a_model_that_fits_no_gpu_is_an_error():
    with pytest.raises(CapacityError, match=r"the weights of OPT-30B take 59.* GB, 1 x A6000 has 48 GB"):
        next(Study(model=OPT_30B).rows())


@pytest.mark.parametrize(("changes", "message"), [
    ({"drives": (0,)}, "drives must be a positive integer, not 0"),
    ({"batches": (-1,)}, "batch must be an integer of at least 1, not -1"),
    ({"batches": ()}, "batches must have at least one value"),
    ({"contexts": (0,)}, "context must be a positive integer, not 0"),
    ({"new": 0}, "new must be a positive integer, not 0"),
    ({"new": 2048}, "new must be less than context, .* not 2048 of 2048"),
    ({"modes": ("fast",)}, "no mode 'fast'; modes are dense, sparf, fetched, centroid"),
    ({"host": "none"}, "no host 'none'; hosts are direct, paper"),
    ({"machine": replace(PAPER_MACHINE, gpu=replace(H100, count=0))}, "GPUs must be at least 1, not 0"),
])
def test_a_study_without_sense_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        Study(model=OPT_13B, **changes)


def test_overlap_needs_two_sequences_and_the_drive_16_bits():
    load, drive = load_of(1, 2048, 1024), STUDY.drive()
    with pytest.raises(RequestError, match="batch must be at least 2, not 1"):
        replace(STUDY, overlapped=True).step(load, drive, "dense", 1)
    with pytest.raises(RequestError, match=r"kv_bits of OPT-13B must be 16, .* not 8"):
        replace(STUDY, model=replace(OPT_13B, kv_bits=8)).step(load, drive, "dense", 1)


def test_gpus_are_known_by_name_and_have_their_own_source():
    assert gpu("H100") is H100 and set(GPUS) == {"a6000", "a100", "h100"}
    sources = {name: source for name, *_, source in table(replace(PAPER_MACHINE, gpu=H100))}
    assert sources["gpu.bandwidth"] == "NVIDIA H100 SXM data sheet"
    assert sources["files.direct_rate"].endswith("(Samsung 980 PRO data sheet)")
    with pytest.raises(RequestError, match="no GPU 'voodoo'; GPUs are a6000, a100, h100"):
        gpu("voodoo")


def test_where_a_drive_is_worth_it():
    found = worth(replace(STUDY, drives=(4, 20)), 2048, 16)
    assert tuple(found.exact) == EXACT and tuple(found.sparse) == SPARSE
    assert found.kv_gb == pytest.approx(16 * 2048 * 819_200 / 1e9)
    assert found.best_exact == "H100 alone"     # one sequence fits: nothing beats the GPU's own memory
    assert set(found.modes) == {"4 drives", "20 drives"}
    assert LARGE_HOST.host.memory == 1e12
