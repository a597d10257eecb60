"""KOALA's published geometry, modelled."""

import pytest

from kvattic import RequestError
from kvattic_sim.runs import koala_whole
from kvattic_sim.runs.koala_whole import STAGES, STEPS, TEXT, text_run, whole


def test_a_drive_is_wrong_for_it_and_the_figures_say_so():
    runs, figures = whole()
    assert len(runs) == 7
    assert figures["counted_reads_of_each_byte_of_self_attention_s_k_and_v"] == 512
    assert figures["counted_reads_of_each_byte_of_the_text_s_k_and_v_in_a_picture"] == 512 * STEPS
    # Writing is little beside reading again and again; a GPU reads once.
    drive, write, gpu = (figures[f"modelled_seconds_of_a_step_s_{what}"] for what in (
        "self_attention_in_the_drive", "writes", "self_attention_on_the_gpu"))
    assert drive > 100 * write and drive > 100 * gpu
    assert figures["counted_mb_written_in_each_step"] > 10 * figures["counted_mb_of_text_written_once"]


def test_bytes_are_those_of_the_geometry():
    for stage in STAGES:
        run, found = text_run(stage, TEXT)
        jobs = stage.heads * stage.positions // koala_whole.DRIVE.rows
        # 77 tokens are 20 codewords of four, of K and of V.
        assert found.dram_codewords == jobs * 2 * 20 and run.bytes == found.dram_codewords * 512
        assert "in one stripe, which one lane attends" in run.limit


def test_a_long_text_is_in_flash():
    run, found = text_run(STAGES[1], 512)
    assert found.dram_codewords == 0 and found.page_reads > 0 and "device DRAM" not in run.limit


def test_a_text_that_ends_inside_of_a_later_stripe_is_refused():
    with pytest.raises(RequestError, match="shorter than a stripe of 128 tokens, or whole stripes, not 200 tokens"):
        text_run(STAGES[0], 200)
