"""The benchmark of energy: its keys, and what must hold whatever the figures are."""

from kvattic.spec.commands import Mode
from kvattic.spec.config import PAPER
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.benches import cost


def test_energy_of_all_modes(monkeypatch):
    monkeypatch.setattr(cost, "SAMPLE", 8)
    monkeypatch.setattr(cost, "BATCH", 1)
    found = cost.energy()
    assert tuple(found) == cost.ENERGY_KEYS and set(found) <= set(BARS)
    for mode in cost.MODES:
        assert 0 < found[f"energy.token_mj.{mode}.low"] < found[f"energy.token_mj.{mode}"]
        assert found[f"energy.token_mj.{mode}"] < found[f"energy.token_mj.{mode}.high"]
    assert found["energy.token_mj.centroid"] < found["energy.token_mj.sparf"] < found["energy.token_mj.dense"]


def test_energy_counts_what_is_read():
    """Bus and ECC alone take as much for K and V of all tokens, in all layers."""
    data = cost.LAYERS * cost.HEADS * cost.TOKENS * 2 * PAPER.token_bytes
    bits = 8 * data * PAPER.raw_codeword_bytes / PAPER.codeword_bytes
    assert cost.token_energy(Mode.DENSE).typical > bits * (10 + 3.43) * 1e-12


def test_notes_are_measured(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    found = cost.notes()
    assert tuple(found) == cost.NOTES_KEYS and set(found) <= set(BARS)
    assert all(ratio > 0 for ratio in found.values())
