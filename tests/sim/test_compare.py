"""Results against golden device and float64, in every mode; and what is wrong is found."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="pip install 'kvattic[sim]'")

import kvattic
from kvattic import TINY, AttendResult
from kvattic_sim.compare import BOUND, equal_bits, exact_attention, oracle_errors
from kvattic_sim.workloads import DENSE, Attention, ModeSettings, decode, live, minilm_life, topical

SPARSE = [ModeSettings(mode=mode) for mode in ("sparf", "fetched", "centroid", "codes")]
CONFIG = replace(TINY, part=replace(TINY.part, blocks=32))


def attended(attention: Attention, options: ModeSettings) -> AttendResult:
    heads, tokens, _ = attention.key.shape
    with (kvattic.open("model", CONFIG) as device,
          device.create_sequence(heads, capacity_tokens=tokens, **options.sequence_arguments(CONFIG)) as sequence):
        sequence.prefill(attention.key, attention.value)
        return sequence.attend(attention.query, **options.attend_arguments(CONFIG, tokens))


@pytest.mark.parametrize("options", [DENSE, *SPARSE], ids=lambda options: options.mode)
@pytest.mark.parametrize("tokens", [384, 333, 50])
def test_each_mode_is_compared_with_its_own_definition(options: ModeSettings, tokens: int) -> None:
    attention = topical(CONFIG, kv_heads=3, tokens=tokens, group=2)
    result = attended(attention, options)
    assert equal_bits(attention, result, CONFIG, options).all()
    assert np.nanmax(oracle_errors(attention, result, CONFIG, options)[:, 0]) < BOUND
    more = np.nanmax(oracle_errors(attention, result, CONFIG)[:, 0])
    # Among 50 tokens all stripes are tail, and everything is attended.
    assert (more > 1e-3) == (options != DENSE and tokens > 50)


def test_one_bit_and_one_head_are_told() -> None:
    attention = topical(CONFIG, kv_heads=3, tokens=200, group=2)
    result = attended(attention, DENSE)
    output = result.output.copy()
    output.view(np.uint32)[3, 0, 5] ^= 1
    assert equal_bits(attention, replace(result, output=output), CONFIG).tolist() == [True, False, True]
    output[3] *= 1.001
    errors = oracle_errors(attention, replace(result, output=output), CONFIG)
    assert (errors[:, 0] > BOUND).tolist() == [False, True, False]


def test_a_tie_has_no_exact_result() -> None:
    attention = decode(CONFIG, kv_heads=1, tokens=256, group=1)
    same = replace(attention, key=np.repeat(attention.key[:, :1], 256, axis=1))
    options = ModeSettings(mode="sparf")
    assert np.isnan(exact_attention(same, CONFIG, options)).all()
    assert np.isnan(oracle_errors(same, attended(same, options), CONFIG, options)).all()
    assert np.isfinite(exact_attention(same, CONFIG, DENSE)).all()


@pytest.mark.parametrize("sparse", [None, *SPARSE], ids=str)
def test_a_life_of_real_numbers(sparse: Any) -> None:
    life = minilm_life(heads=3, positions=4, sparse_positions=2, appended=2, second_tokens=64, sparse=sparse)
    with kvattic.open("model", CONFIG) as device:
        steps = live(device, life)
    assert len(steps) == life.steps
    names = [step.name for step in steps]
    asked = [] if sparse is None else [f"attend, {sparse.mode}"]
    assert names == ["prefill", "attend", *asked, "token 511", "token 512", "free", "prefill another", "attend"]
    results = [step.result for step in steps if step.result is not None]
    tokens = []
    for result, (attention, options) in zip(results, life.attended(), strict=True):
        tokens.append(attention.key.shape[1])
        assert np.nanmax(oracle_errors(attention, result, CONFIG, options)[:, 0]) < BOUND
    assert tokens == [510, *([] if sparse is None else [510]), 511, 512, 64]
