"""The data of sweeps: sparse attention is nearly exact on it, as on a model's heads, and not on normal noise."""

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="pip install 'kvattic[sim]'")

import kvattic
from kvattic.spec.elements import from_bits
from kvattic_sim import oracle
from kvattic_sim.workloads import Attention, ModeSettings, decode, topical

HEADS, TOKENS = 2, 512
CONFIG = kvattic.Config(channels=2, rows=2, head_dim=128, dies=2)


def error(attention: Attention, mode: str) -> float:
    """Relative RMS of one mode against float64 attention of all tokens."""
    how = ModeSettings(mode=mode)
    with kvattic.open("model", CONFIG) as device, device.create_sequence(
            HEADS, capacity_tokens=TOKENS, **how.sequence_arguments(CONFIG)) as sequence:
        sequence.prefill(attention.key, attention.value)
        output = sequence.attend(attention.query, **how.attend_arguments(CONFIG, TOKENS)).output
    query, key, value = (from_bits(each, CONFIG.element).astype(np.float64)
                         for each in (attention.query, attention.key, attention.value))
    exact = np.stack([oracle.attention(query[head], key[head // CONFIG.rows], value[head // CONFIG.rows],
                                       CONFIG.head_dim**-0.5) for head in range(len(query))])
    return float(np.sqrt(np.square(output - exact).sum() / np.square(exact).sum()))


@pytest.mark.parametrize(("mode", "most"), [("dense", 5e-7), ("sparf", 0.1), ("fetched", 0.1), ("centroid", 0.15)])
def test_sparse_modes_find_what_matters_in_topical_data(mode, most):
    assert error(topical(CONFIG, kv_heads=HEADS, tokens=TOKENS, group=CONFIG.rows), mode) < most


def test_nothing_is_sparse_in_normal_noise():
    noise = decode(CONFIG, kv_heads=HEADS, tokens=TOKENS, group=CONFIG.rows)
    assert all(error(noise, mode) > 0.5 for mode in ("sparf", "fetched", "centroid"))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 333])
def test_topical_data_of_any_length(tokens):
    first, again = (topical(CONFIG, kv_heads=3, tokens=tokens, group=4, seed=5) for _ in range(2))
    assert first.query.shape == (12, 1, 128)
    assert first.key.shape == first.value.shape == (3, tokens, 128)
    for name in ("query", "key", "value"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert np.isfinite(from_bits(getattr(first, name), CONFIG.element)).all()
