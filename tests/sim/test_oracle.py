"""The golden model within the error bounds of docs/numerics.md; the oracle and the elements."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvattic.golden.dense import attended
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import VALUE_FRACTION, WEIGHT_BITS, Element
from kvattic_sim import oracle
from kvattic_sim.reports.benches import accuracy

ELEMENTS = pytest.mark.parametrize("element", list(Element))
BOUND = 5e-7
"""Law: relative RMS error against float64, on every data set."""


# Golden model against oracle.


@ELEMENTS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "heads"), [(2048, 8), (32768, 2)])
def test_flash_attention_3_data(tokens: int, heads: int, seed: int, element: Element) -> None:
    found = accuracy.errors(accuracy.fa3_heads(tokens, heads, element=element, seed=seed), element)
    assert found["rel_rms"] < BOUND
    assert found["rel_rms"] <= found["float32"]
    assert found["fp16"] > 10 * found["rel_rms"]


@ELEMENTS
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 256])
def test_every_head_dim(head_dim: int, element: Element) -> None:
    found = accuracy.errors(
        accuracy.fa3_heads(1024, 8, head_dim=head_dim, element=element), element
    )
    assert found["rel_rms"] < BOUND
    assert found["rel_rms"] <= found["float32"]


def test_real_model_data() -> None:
    found = accuracy.errors(accuracy.minilm_heads())
    assert found["rel_rms"] < BOUND
    assert found["rel_rms"] <= found["float32"]


def test_no_drift_with_length() -> None:
    """Constant scores: the sum of weights is exact; only the rounding to fp32 is left."""
    worst, exact = accuracy.drift()
    assert exact
    assert worst <= 2.0**-24


@pytest.mark.parametrize("tokens", accuracy.LENGTHS)
def test_constant_scores(tokens: int) -> None:
    query, key, value = next(accuracy.fa3_heads(tokens, 1))
    trace = accuracy.attend(query, np.repeat(key[:1], tokens, axis=0), value)
    assert trace.denominator.tolist() == [tokens << VALUE_FRACTION]
    assert set(trace.weight_significand[0].tolist()) == {1 << (WEIGHT_BITS - 1)}
    total = from_bits(value, Element.FP16).astype(np.float64).sum(axis=0)
    assert [int(a) for a in trace.accumulator[0]] == [int(x * 2.0**VALUE_FRACTION) for x in total]


def test_masks_together_with_the_golden_model() -> None:
    """Start, end and tree at once, against float64 with the oracle's own mask."""
    rows, tokens, base = 6, 200, 64
    query, key, value = next(accuracy.fa3_heads(tokens, 1, rows=rows, head_dim=64))
    rng = np.random.default_rng(2)
    limits: dict[str, Any] = {
        "start": rng.integers(0, base + 100, rows),
        "end": rng.integers(base + 100, base + tokens + 50, rows),
        "tree": rng.integers(0, 1 << 32, rows, dtype=np.uint64),
        "tree_token": base + 150,
        "base_token": base,
        "end_token": base + tokens - 3,
    }
    trace = accuracy.attend(query, key, value, **limits)
    visible = oracle.mask(**limits)
    assert trace.attended[:, : tokens - 3].tolist() == visible.tolist()
    assert not trace.attended[:, tokens - 3 :].any()
    q, k, v = (from_bits(x, Element.FP16) for x in (query, key[: tokens - 3], value[: tokens - 3]))
    want = oracle.attention(q, k, v, 64**-0.5, visible)
    assert oracle.relative_rms(trace.partial.output, want) < BOUND


@given(st.data())
def test_oracle_mask_is_the_golden_mask(data: st.DataObject) -> None:
    base = data.draw(st.integers(0, 80))
    tokens = data.draw(st.integers(1, 80))
    token = st.integers(0, base + tokens + 5)
    start, end = (np.array([data.draw(token)]) for _ in range(2))
    tree = np.array([data.draw(st.integers(0, (1 << 32) - 1))])
    tree_token, end_token = data.draw(token), data.draw(st.integers(base, base + tokens))
    limits = {"tree_token": tree_token, "base_token": base, "end_token": end_token}
    want = oracle.mask(start=start, end=end, tree=tree, **limits)
    got = attended(start, end, tree, tokens=end_token - base, **limits)
    np.testing.assert_array_equal(got, want)


# The oracle itself.


def test_oracle_on_a_case_by_hand() -> None:
    """Two tokens whose scores differ by log(3): weights 1/4 and 3/4."""
    q, k = np.array([[1.0]]), np.array([[0.0], [math.log(3)]])
    v = np.array([[4.0], [8.0]])
    for attention in (oracle.attention, oracle.attention_fp32, oracle.attention_fp16):
        np.testing.assert_allclose(attention(q, k, v, 1.0), [[7.0]], rtol=1e-3)
        np.testing.assert_array_equal(attention(q, k, v, 1.0, np.array([[True, False]])), [[4.0]])
        np.testing.assert_array_equal(attention(q, k, v, 1.0, np.array([[False, False]])), [[0.0]])
    assert oracle.attention(q, k, v, 1.0).dtype == np.float64
    assert oracle.attention_fp32(q, k, v, 1.0).dtype == np.float32
    assert oracle.attention_fp16(q, k, v, 1.0).dtype == np.float16
    assert oracle.attention(q, k, v, 1.0)[0, 0] == pytest.approx(7.0, rel=1e-15)


def test_relative_rms() -> None:
    reference = np.array([3.0, 4.0])
    assert oracle.relative_rms(reference, reference) == 0
    assert oracle.relative_rms(np.array([3.0, 4.5]), reference) == pytest.approx(0.1)


@ELEMENTS
def test_fa3_distribution(element: Element) -> None:
    bits = oracle.fa3((1000, 1000), np.random.default_rng(0), element)
    values = from_bits(bits, element).astype(np.float64)
    assert values.mean() == pytest.approx(0, abs=0.005)
    assert values.var() == pytest.approx(1.1, abs=0.01)  # 1 + 0.001 * 100
    assert 3e-4 < (np.abs(values) > 6).mean() < 8e-4  # 0.001 * P(|N(0, 101)| > 6) = 5.5e-4
    np.testing.assert_array_equal(bits, oracle.fa3((1000, 1000), np.random.default_rng(0), element))


# Elements.


@ELEMENTS
def test_every_element_comes_back(element: Element) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bits(bits, element)
    number = ~np.isnan(values)
    for kind in (np.float32, np.float64):
        np.testing.assert_array_equal(to_bits(values[number].astype(kind), element), bits[number])
        with np.errstate(invalid="ignore"):  # signalling NaNs
            specials = values[~number].astype(kind)
        assert np.isnan(from_bits(to_bits(specials, element), element)).all()


def nearest(value: float, element: Element) -> int:
    """Round with exact fractions: among all finite patterns the nearest, the even one on a tie."""
    exact, top = abs(Fraction(value)), 0x7BFF if element is Element.FP16 else 0x7F7F
    low, high = 0, top

    def size(bits: int) -> Fraction:
        return Fraction(float(from_bits(np.array([bits], np.uint16), element)[0]))

    half_step = (size(top) - size(top - 1)) / 2
    if exact >= size(top) + half_step:
        return top + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= exact else (low, middle)
    below, above = exact - size(low), size(high) - exact
    return low if below < above or (below == above and low % 2 == 0) else high


@ELEMENTS
@given(st.data())
def test_rounding_is_to_nearest_even_and_once(element: Element, data: st.DataObject) -> None:
    """Any float64, and those a hair beside a tie, where rounding twice goes wrong."""
    bits = data.draw(st.integers(0, 0x7BFE))
    low, high = from_bits(np.array([bits, bits + 1], np.uint16), element).astype(np.float64)
    middle = (low + high) / 2
    beside = [middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)]
    for value in (data.draw(st.floats(-1e39, 1e39)), *beside):
        got = int(to_bits(np.array([value], np.float64), element)[0])
        assert got & 0x7FFF == nearest(float(value), element)
        assert got >> 15 == (math.copysign(1, value) < 0)


@ELEMENTS
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, -1e300, 3.4028235e38])
def test_too_large_becomes_infinity(element: Element, value: float) -> None:
    got = from_bits(to_bits(np.array(value), element), element)
    assert np.isinf(got)
    assert np.sign(got) == np.sign(value)


def test_conversions_want_the_right_types() -> None:
    with pytest.raises(TypeError, match="values must be float16, float32 or float64, not int64"):
        to_bits(np.array([1]), Element.FP16)
    with pytest.raises(TypeError, match="bits must be uint16, not int64"):
        from_bits(np.array([1]), Element.BF16)


def test_bf16_takes_any_layout() -> None:
    values: NDArray[np.float32] = np.arange(24, dtype=np.float32).reshape(4, 6).T
    for element in Element:
        np.testing.assert_array_equal(from_bits(to_bits(values, element), element), values)
