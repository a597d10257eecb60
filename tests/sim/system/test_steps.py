"""Decode steps of whole systems: limits, monotony, and what does not fit."""

from dataclasses import replace

import pytest

from kvattic.errors import CapacityError, RequestError
from kvattic_sim.system import steps
from kvattic_sim.system.parameters import H100, PAPER_MACHINE, Machine
from kvattic_sim.system.steps import Load
from kvattic_sim.system.transformer import LLAMA3_70B_INT4, OPT_13B, OPT_30B

LOAD = Load(batch=16)


class Drive:
    """A drive that reads K and V at a given rate, whatever the mode."""

    def __init__(self, rate):
        self.rate = rate

    def attention_seconds(self, mode, *, kv_heads, group, head_dim, tokens):
        return 2 * 2 * kv_heads * head_dim * tokens / self.rate

    def write_seconds(self, mode, *, kv_heads, tokens):
        return 0.0

    def message_bytes(self, mode, group, tokens):
        return 0.0

    def stored_bytes(self, mode):
        return 512

    def tail_bytes(self, mode):
        return 0

    def capacity(self, machine):
        return 2e12


def test_a_step_attends_the_mean_length():
    assert Load(batch=1, prompt=1024, new=1024).tokens == 1535.5
    assert Load(batch=1, prompt=100, new=1).tokens == 100


def test_parts_add_up_or_overlap():
    step = steps.Step(load=LOAD, parts={"kv": 3.0, "gpu": 1.0})
    assert (step.seconds, step.tokens_per_second, step.share("kv")) == (4.0, 4.0, 0.75)
    assert replace(step, overlapped=True).seconds == 3.0
    assert steps.Step(load=LOAD, parts={"kv": 1.0, "gpu": 3.0}, overlapped=True).seconds == 3.0


def test_a_drive_at_its_rate_takes_what_its_bytes_take():
    step = steps.kvattic_drive(OPT_13B, LOAD, PAPER_MACHINE, Drive(10e9), mode="dense", host_s=0.0)
    assert step.parts["kv"] == pytest.approx(LOAD.kv_bytes(OPT_13B) / 10e9)
    assert step.parts["host"] == 0


@pytest.mark.parametrize("drives", [2, 4, 20, 40, 80])
def test_drives_share_the_heads_and_then_the_batch(drives):
    one = steps.kvattic_drive(OPT_13B, LOAD, PAPER_MACHINE, Drive(10e9), mode="dense")
    many = steps.kvattic_drive(OPT_13B, LOAD, PAPER_MACHINE, Drive(10e9), mode="dense", drives=drives)
    assert many.parts["kv"] == pytest.approx(one.parts["kv"] / drives)  # 40 heads


def test_the_fullest_drive_counts():
    step = steps.kvattic_drive(OPT_13B, LOAD, PAPER_MACHINE, Drive(10e9), mode="dense", drives=3)
    one = steps.kvattic_drive(OPT_13B, LOAD, PAPER_MACHINE, Drive(10e9), mode="dense")
    assert step.parts["kv"] == pytest.approx(one.parts["kv"] * 14 / 40)


def test_more_drives_and_sparser_reads_are_never_slower():
    for sparse in (False, True):
        rates = [steps.in_storage(OPT_13B, LOAD, PAPER_MACHINE, drives=n, sparse=sparse).tokens_per_second
                 for n in (1, 2, 4, 20)]
        assert rates == sorted(rates)
    dense, sparf = (steps.in_storage(OPT_13B, LOAD, PAPER_MACHINE, sparse=sparse) for sparse in (False, True))
    assert sparf.seconds < dense.seconds


def test_files_beyond_the_page_cache_are_slower():
    cached = steps.flexgen(OPT_13B, Load(batch=32), PAPER_MACHINE)
    larger = steps.flexgen(OPT_13B, Load(batch=64), PAPER_MACHINE)
    assert larger.parts["kv"] > 2 * cached.parts["kv"]


def test_direct_io_ends_at_the_link():
    rate = [steps.direct_io(OPT_13B, LOAD, PAPER_MACHINE, drives=n).tokens_per_second for n in (1, 3, 4, 8)]
    assert rate[1] == pytest.approx(3 * rate[0])
    assert rate[2] == rate[3] == pytest.approx(25 / 6.3 * rate[0])


def test_what_is_in_dram_is_read_faster_than_over_the_link():
    load = Load(batch=32)
    over_the_link = steps.deepspeed(OPT_13B, load, PAPER_MACHINE).seconds
    assert steps.cpu_attention(OPT_13B, load, PAPER_MACHINE).seconds < over_the_link
    assert steps.sparse_dram(OPT_13B, load, PAPER_MACHINE).seconds < over_the_link


def test_a_gpu_alone_decodes_in_waves():
    step = steps.gpu_alone(OPT_13B, Load(batch=64), PAPER_MACHINE)
    assert step.load.batch == 13  # of 1.68 GB each, in the 22.3 GB that the weights leave of 48


@pytest.mark.parametrize(("work", "message"), [
    (lambda: steps.in_storage(OPT_30B, LOAD, PAPER_MACHINE), "weights of OPT-30B take 59.* GB, 1 x A6000 has 48 GB"),
    (lambda: steps.deepspeed(OPT_13B, Load(batch=64), PAPER_MACHINE), "take 107 GB, the host has 96 GB"),
    (lambda: steps.sparse_dram(OPT_13B, Load(batch=40), PAPER_MACHINE), "take 101 GB, the host has 96 GB"),
    (lambda: steps.gpu_alone(LLAMA3_70B_INT4, Load(batch=1, prompt=32_000), PAPER_MACHINE),
     "one sequence of 33024 tokens"),
])
def test_what_does_not_fit_is_an_error(work, message):
    with pytest.raises(CapacityError, match=message):
        work()


def test_more_gpus_hold_more():
    two = replace(PAPER_MACHINE, gpu=replace(PAPER_MACHINE.gpu, count=2))
    assert steps.in_storage(OPT_30B, LOAD, two).seconds > 0
    larger = steps.gpu_alone(OPT_13B, LOAD, Machine(gpu=H100))
    assert larger.seconds < steps.gpu_alone(OPT_13B, LOAD, PAPER_MACHINE).seconds


@pytest.mark.parametrize(("fields", "message"), [
    ({"batch": 0}, "batch must be an integer of at least 1, not 0"),
    ({"batch": 1.5}, "batch must be an integer"),
    ({"batch": 1, "prompt": 0}, "prompt must be an integer"),
    ({"batch": 1, "new": True}, "new must be an integer"),
])
def test_a_load_without_sense_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        Load(**fields)


def test_no_drives_are_refused():
    with pytest.raises(RequestError, match="drives must be a positive integer, not 0"):
        steps.in_storage(OPT_13B, LOAD, PAPER_MACHINE, drives=0)
