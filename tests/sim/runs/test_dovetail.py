"""Speculative decoding: what is drafted, how much of it is accepted, what a pass costs."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra transformers")
pytest.importorskip("transformers", reason="needs the extra transformers")

from kvattic import TINY
from kvattic_sim.runs import dovetail, drafts
from kvattic_sim.runs.drafts import TREE, ancestors, chain, yield_of
from kvattic_sim.runs.outcome import How, Request

FOUR = replace(TINY, rows=4)


def test_chains_and_trees():
    assert chain(3) == ((0,), (0, 0), (0, 0, 0))
    assert np.array_equal(ancestors(chain(3)), np.tri(4, dtype=bool))
    found = ancestors(((0,), (1,), (0, 0)))
    assert found.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    for path in TREE:       # each node's parent is there, before it
        assert path[:-1] in ((), *TREE[: TREE.index(path)])
    assert len(TREE) == 7


@pytest.mark.parametrize(("ranks", "tree", "expected"), [
    ([[0] * 10], chain(4), 5.0),                    # all are right: four and the target's own
    ([[3] * 6], chain(4), 1.0),                     # none is
    ([[0, 0, 5, 0, 0, 0, 0, 9]], chain(2), 8 / 3),  # 2 + 1, then 2 + 1, then 1 + 1
    ([[1, 0, 1, 0]], ((0,), (1,), (0, 0), (1, 0)), 2.0),    # the second choice, its child, the target's own; the rest
    ([[1, 0, 1, 0]], chain(2), 4 / 3),
])
def test_tokens_of_a_pass(ranks, tree, expected):
    assert yield_of(np.array(ranks), tree) == pytest.approx(expected)


@pytest.mark.parametrize("tree", [chain(3), ((0,), (1,), (0, 0))], ids=["chain", "tree"])
def test_one_pass_has_the_bits_of_a_pass_for_each_row(tree):
    found = dovetail.verify(FOUR, tree, heads=2, tokens=70)
    assert found.equal and 0 < found.error < 5e-7 and found.stalls == {}
    assert found.together.shape == (2, 4, 32)
    once, each = found.costs[dovetail.ONE_PASS], found.costs[dovetail.ONE_BY_ONE]
    assert each.cycles > 2 * once.cycles
    assert sum(each.flash_bytes.values()) == 4 * sum(once.flash_bytes.values())


def test_siblings_do_not_see_each_other():
    one, other = (dovetail.verify(FOUR, tree, heads=1, tokens=70) for tree in (chain(3), ((0,), (1,), (2,))))
    assert np.array_equal(one.together[:, :2], other.together[:, :2])
    assert not np.array_equal(one.together[:, 2], other.together[:, 2])


@pytest.mark.slow
def test_a_pass_of_more_rows_than_a_job_has_reads_twice():
    one, eight, nine = (dovetail.layer_run(rows, "a layer") for rows in (1, 8, 9))
    assert one.bytes == eight.bytes == nine.bytes / 2
    assert eight.cycles < 1.01 * one.cycles and nine.cycles > 1.9 * one.cycles
    assert one.how is How.MODELLED


@pytest.mark.slow
def test_what_drafts_add_to_a_step():
    alone, drafted = dovetail.step_parts(1, 4, 0, 1.0), dovetail.step_parts(8, 4, 7, 2.0)
    assert "draft" not in alone and drafted["draft"] > 0
    assert drafted["append"] == pytest.approx(2 * alone["append"])
    assert drafted["kv"] < 1.02 * alone["kv"] and drafted["host"] == alone["host"]


def test_the_draft_is_a_smaller_model_of_the_same_kind():
    target, draft = (drafts.huggingface.load(weights_file=name) for name in ("model.npz", "draft.npz"))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (target, draft)]
    assert sizes[1] < sizes[0] / 9
    assert target.config.vocab_size == draft.config.vocab_size == 256


def test_ranks_and_overlap_of_the_models():
    found = drafts.ranks(2, prompt=64, answer=24)
    assert found.shape == (2, 24) and found.min() == 0 and found.max() < 256
    # Much better than chance.
    assert (found == 0).mean() > 0.25
    assert 0.2 < drafts.overlap(2, prompt=64, answer=24) < 1


def test_drafts_change_no_token():
    found = drafts.assisted(4, new=12)
    assert found.unequal == 0 and found.tokens == 12 and 0 < found.passes <= 12


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(dovetail, "ranks", lambda: np.zeros((1, 40), np.int64))
    monkeypatch.setattr(dovetail, "overlap", lambda: 0.5)
    monkeypatch.setattr(dovetail, "assisted", lambda *_, **__: drafts.Assisted(unequal=0.0, passes=10, tokens=40))
    monkeypatch.setattr(dovetail, "CHAINS", (4, 8))


@pytest.mark.slow
def test_what_it_says(quick):
    found = dovetail.run(Request())
    assert found.good and found.bit_exact is None and len(found.runs) == 7
    figures = found.figures
    assert figures["measured_tokens_per_pass_chain_4"] == 5
    assert 4.9 < figures["modelled_speedup_of_attention_chain_4"] <= 5
    assert figures["modelled_speedup_of_attention_chain_8"] < 4.8       # nine rows are two passes
    assert 1 < figures["modelled_speedup_of_the_whole_chain_4_batch_1"] < 5
    assert figures["measured_tokens_per_pass_in_the_drive"] == 4
    assert all(name.startswith(("measured", "modelled", "unequal")) for name in figures)


@pytest.mark.slow
def test_an_unequal_token_fails(quick, monkeypatch):
    monkeypatch.setattr(dovetail, "assisted", lambda *_, **__: drafts.Assisted(unequal=0.1, passes=10, tokens=40))
    assert not dovetail.run(Request()).good
