"""The benchmark of energy and latency: its keys, and what must hold whatever the figures are."""

import pytest

from kvattic.spec.commands import Mode
from kvattic.spec.config import PAPER
from kvattic.timing import Layer
from kvattic_sim.reports.bench import BARS
from kvattic_sim.reports.benches import worth


def test_energy_of_all_modes(monkeypatch):
    monkeypatch.setattr(worth, "SAMPLE", 8)
    monkeypatch.setattr(worth, "BATCH", 1)
    found = worth.energy()
    assert tuple(found) == worth.ENERGY_KEYS and set(found) <= set(BARS)
    for mode in worth.MODES:
        assert 0 < found[f"energy.token_mj.{mode}.low"] < found[f"energy.token_mj.{mode}"]
        assert found[f"energy.token_mj.{mode}"] < found[f"energy.token_mj.{mode}.high"]
    assert found["energy.token_mj.centroid"] < found["energy.token_mj.sparf"] < found["energy.token_mj.dense"]


def test_energy_counts_what_is_read():
    """Bus and ECC alone take as much for K and V of all tokens, in all layers."""
    data = worth.LAYERS * worth.HEADS * worth.TOKENS * 2 * PAPER.token_bytes
    bits = 8 * data * PAPER.raw_codeword_bytes / PAPER.codeword_bytes
    assert worth.token_energy(Mode.DENSE).typical > bits * (10 + 3.43) * 1e-12


def test_latency_grows_with_what_is_in_flight():
    jobs = list(Layer(PAPER, 40, 512).attend())
    alone, many = worth.latencies(jobs[:3], 1), worth.latencies(jobs, 24)
    assert len(alone) == 3 and len(many) == len(jobs) - 24
    assert PAPER.part.t_r / 1000 < max(alone) < min(many)


def test_keys_of_latency(monkeypatch):
    monkeypatch.setattr(worth, "latencies", lambda jobs, count: [float(count)] * len(jobs))
    monkeypatch.setattr(worth, "_jobs", lambda config, heads, mode: [None] * heads)
    found = worth.latency()
    assert tuple(found) == worth.LATENCY_KEYS and set(found) <= set(BARS)
    assert found["latency.p99_us.64.sparf"] == pytest.approx(64)


def test_notes_are_measured(monkeypatch):
    monkeypatch.setattr(worth, "ROUNDS", 2)
    found = worth.notes()
    assert tuple(found) == worth.NOTES_KEYS and set(found) <= set(BARS)
    assert all(0.3 < ratio < 3 for ratio in found.values())
