"""The golden model against a slow reference, at the edges of the formats, and its laws."""

import dataclasses
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.host.golden import reference

from kvattic.errors import RequestError
from kvattic.golden import dense
from kvattic.merge import merge
from kvattic.spec.commands import CompletionFlag, fp32_bits
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.elements import Bits, from_bits, to_bits
from kvattic.spec.formats import (
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_MIN,
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    VALUE_FRACTION,
    WEIGHT_BITS,
    Element,
)
from kvattic_sim.reports.benches import accuracy

ELEMENTS = pytest.mark.parametrize("element", list(Element))
LOG2E = 1.4426950408889634
ONE = {Element.FP16: 0x3C00, Element.BF16: 0x3F80}
INFINITY = {Element.FP16: 0x7C00, Element.BF16: 0x7F80}
LARGEST = {Element.FP16: 0x7BFF, Element.BF16: 0x7F7F}


def job(query: Bits, key: Bits, value: Bits, **changes: Any) -> dict[str, Any]:
    """Arguments of `attend`: everything attended, scale 1/sqrt(head_dim), unless changed."""
    rows, tokens = len(query), len(key)
    base = changes.get("base_token", 0)
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "element": Element.FP16,
        "scale_bits": fp32_bits(LOG2E / query.shape[1] ** 0.5),
        "start": np.zeros(rows, np.uint32),
        "end": np.full(rows, base + tokens, np.uint32),
        "tree": np.zeros(rows, np.uint32),
        "tree_token": base + tokens,
        "base_token": base,
        "end_token": base + tokens,
    }
    return arguments | changes


def gaussian(
    rows: int, tokens: int, head_dim: int, element: Element = Element.FP16, seed: int = 0
) -> tuple[Bits, Bits, Bits]:
    """q, k, v of unit variance."""
    rng = np.random.default_rng(seed)
    q, k, v = (to_bits(rng.standard_normal((n, head_dim)), element) for n in (rows, tokens, tokens))
    return q, k, v


def check(**arguments: Any) -> dense.Trace:
    """Golden model and reference agree on every intermediate; returns the trace."""
    trace = dense.attend(**arguments)
    expected = reference.attend(**arguments)
    for name, want in expected._asdict().items():
        got = getattr(trace, name)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == want, name
    return trace


def assert_same(a: dense.Trace, b: dense.Trace, names: tuple[str, ...]) -> None:
    for name in names:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


RESULTS = ("maximum", "denominator", "accumulator_high", "accumulator_low", "output")


# Against the reference.


def element_bits(element: Element) -> st.SearchStrategy[int]:
    """Any pattern, with the edges of the format far more often than by chance."""
    form = element.encoding
    edges = [
        0,
        1,
        (1 << form.fraction_bits) - 1,
        1 << form.fraction_bits,
        ONE[element],
        LARGEST[element],
        INFINITY[element],
        INFINITY[element] | 1,
    ]
    moderate = st.integers(
        ONE[element] - (6 << form.fraction_bits), ONE[element] + (4 << form.fraction_bits)
    )
    magnitude = st.one_of(st.sampled_from(edges), st.integers(0, 0x7FFF), moderate, moderate)
    return st.builds(lambda m, s: m | s << 15, magnitude, st.integers(0, 1))


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Small jobs with everything in them."""
    element = draw(st.sampled_from(list(Element)))
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    head_dim = draw(st.sampled_from([1, 2, 5, 8]))
    elements = element_bits(element)
    base = draw(st.integers(0, 3)) * 64
    token = st.integers(max(base - 2, 0), base + tokens + 2)
    per_row = hnp.arrays(np.uint32, rows, elements=token)
    fields = st.one_of(st.integers(100, 140), st.integers(1, 254))
    return {
        "query": draw(hnp.arrays(np.uint16, (rows, head_dim), elements=elements)),
        "key": draw(hnp.arrays(np.uint16, (tokens, head_dim), elements=elements)),
        "value": draw(hnp.arrays(np.uint16, (tokens, head_dim), elements=elements)),
        "element": element,
        "scale_bits": draw(fields) << 23 | draw(st.integers(0, (1 << 23) - 1)),
        "start": draw(st.one_of(st.just(np.zeros(rows, np.uint32)), per_row)),
        "end": draw(st.one_of(st.just(np.full(rows, base + tokens, np.uint32)), per_row)),
        "tree": draw(hnp.arrays(np.uint32, rows, elements=st.integers(0, (1 << 32) - 1))),
        "tree_token": draw(st.one_of(st.just(base + tokens), token)),
        "base_token": base,
        "end_token": draw(st.one_of(st.just(base + tokens), st.integers(base, base + tokens))),
    }


@settings(max_examples=300)
@given(jobs())
def test_agrees_with_the_reference(arguments: dict[str, Any]) -> None:
    check(**arguments)


@ELEMENTS
@pytest.mark.parametrize(
    ("rows", "tokens", "head_dim"), [(1, 300, 32), (3, 70, 64), (2, 33, 128), (1, 40, 256)]
)
def test_agrees_with_the_reference_on_ordinary_data(
    element: Element, rows: int, tokens: int, head_dim: int
) -> None:
    """Sizes beyond one summing group and beyond one cache block."""
    check(**job(*gaussian(rows, tokens, head_dim, element), element=element))


@ELEMENTS
def test_decode_of_every_pattern(element: Element) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = dense.decode(bits, element)
    want = [reference.number(int(b), element) for b in bits]
    assert got.special
    assert got.significand.tolist() == [x.significand for x in want]
    assert got.negative.tolist() == [x.negative for x in want]
    finite = np.array([not x.special for x in want])
    power = got.exponent.astype(int) - element.encoding.offset
    assert power[finite].tolist() == [x.power for x in want if not x.special]
    floats = np.ldexp(got.significand.astype(float), power) * np.where(got.negative, -1, 1)
    np.testing.assert_array_equal(floats[finite], from_bits(bits, element)[finite])


@given(st.integers(-(1 << 50) + 1, (1 << 50) - 1), st.integers(0, (1 << 23) - 1))
def test_round_scores_of_any_sum(total: int, fraction: int) -> None:
    scores, overflow = dense.round_scores(np.array([total]), 127 << 23 | fraction)
    exact = (total * (1 << 23 | fraction) + (1 << 28)) >> 29
    assert scores[0] == min(max(exact, SCORE_MIN), SCORE_MAX)
    assert overflow[0] == (not SCORE_MIN <= exact <= SCORE_MAX)


@given(st.integers(-(1 << 80), 1 << 80), st.integers(1, 1 << 55))
def test_divide_rounds_to_nearest_even(numerator: int, denominator: int) -> None:
    high, low = divmod(numerator, 1 << dense.LOW_BITS)
    got = dense.divide(np.array([[high]]), np.array([[low]]), np.array([denominator]))
    assert got.tolist() == [[reference.fp32(Fraction(numerator, denominator))]]


@pytest.mark.parametrize(
    ("numerator", "want"),
    [
        ((1 << 24) + 1, 0x4B800000),
        ((1 << 24) + 3, 0x4B800002),
        ((1 << 25) - 1, 0x4C000000),
        (1, 0x3F800000),
    ],
)
def test_divide_ties_and_carry(numerator: int, want: int) -> None:
    got = dense.divide(np.array([[0]]), np.array([[numerator]]), np.array([1]))
    assert got.tolist() == [[want]]


# Edges of the element formats.


@ELEMENTS
def test_subnormals_are_numbers(element: Element) -> None:
    """Keys and values of subnormals alone, with a query and a scale that make them matter."""
    rng = np.random.default_rng(1)
    fraction = 1 << element.encoding.fraction_bits
    key, value = (rng.integers(0, fraction, (20, 8)).astype(np.uint16) for _ in range(2))
    query = np.full((1, 8), LARGEST[element], np.uint16)
    scale = fp32_bits(256.0) if element is Element.FP16 else fp32_bits(1.0)
    trace = check(**job(query, key, value, element=element, scale_bits=scale))
    if element is Element.FP16:
        assert len(set(trace.scores[0].tolist())) > 10
        # The least fp16, 2**-24, is far above the value window's least bit.
        assert np.abs(trace.accumulator).min() >= 1 << (VALUE_FRACTION - 24)
    else:
        # bf16's reach below 2**-126: they are lost in the value window, and rightly so.
        assert not trace.output.any()


@ELEMENTS
def test_largest_values(element: Element) -> None:
    query, key, value = (np.full((n, 8), LARGEST[element], np.uint16) for n in (1, 5, 5))
    trace = check(**job(query, key, value, element=element))
    assert CompletionFlag.SCORE_OVERFLOW in trace.flags
    assert (CompletionFlag.VALUE_OVERFLOW in trace.flags) == (element is Element.BF16)
    if element is Element.FP16:
        np.testing.assert_array_equal(trace.output.view(np.float32), 65504.0)


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_sums_beyond_int64(sign: int) -> None:
    """300 of the largest fp16 with weight 1 take 65 bits; every step up to there is exact."""
    key = np.zeros((300, 2), np.uint16)
    value = np.full((300, 2), LARGEST[Element.FP16] | sign, np.uint16)
    trace = check(**job(key[:1], key, value))
    assert np.abs(trace.accumulator).min() == 300 * 65504 << VALUE_FRACTION > 1 << 64


def test_saturated_scores_both_ways() -> None:
    """Products inside the window whose sum is too large: clipped to the ends, and told."""
    query = to_bits(np.full((1, 256), 60.0), Element.FP16)
    key = to_bits(np.array([[60.0], [-60.0], [0.0]]) * np.ones((1, 256)), Element.FP16)
    trace = check(**job(query, key, key, scale_bits=fp32_bits(1.0)))
    assert trace.scores.tolist() == [[SCORE_MAX, SCORE_MIN, 0]]
    assert trace.score_overflow.tolist() == [[True, True, False]]
    assert trace.flags == CompletionFlag.SCORE_OVERFLOW


def test_score_overflow_only_from_attended_pairs() -> None:
    query, key = (to_bits(np.full((n, 32), 1.0), Element.FP16) for n in (2, 3))
    key[2] = LARGEST[Element.FP16]
    scale = fp32_bits(1.0)
    assert check(**job(query, key, key, scale_bits=scale, end=np.array([2, 2]))).flags == 0
    both = check(**job(query, key, key, scale_bits=scale, end=np.array([2, 3])))
    assert both.flags == CompletionFlag.SCORE_OVERFLOW


@ELEMENTS
def test_zeros_and_signed_zeros(element: Element) -> None:
    """-0 is 0: all scores are equal, the outputs are +0."""
    zeros = np.array([[0x8000, 0] * 4, [0, 0x8000] * 4, [0x8000] * 8], np.uint16)
    trace = check(**job(zeros, zeros, zeros, element=element))
    assert not trace.scores.any()
    assert not trace.output.any()
    assert trace.flags == 0


def test_equal_scores_weigh_exactly_one() -> None:
    query, _, value = gaussian(1, 50, 32)
    trace = check(**job(query, np.repeat(gaussian(1, 1, 32, seed=3)[1], 50, axis=0), value))
    assert trace.weight_significand.tolist() == [[1 << (WEIGHT_BITS - 1)] * 50]
    assert trace.denominator.tolist() == [50 << VALUE_FRACTION]


@ELEMENTS
def test_one_token_gives_its_value(element: Element) -> None:
    query, key, value = gaussian(2, 1, 32, element)
    trace = check(**job(query, key, value, element=element))
    np.testing.assert_array_equal(
        trace.output.view(np.float32), np.repeat(from_bits(value, element), 2, axis=0)
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129])
def test_page_edges(tokens: int) -> None:
    """What lies behind the last valid token of a page changes nothing, whatever it is."""
    query, key, value = gaussian(2, tokens, 32)
    padding = -tokens % PAPER.tokens_per_page
    exact = check(**job(query, key, value, base_token=64))
    rubbish = np.full((padding, 32), INFINITY[Element.FP16], np.uint16)
    valid = {"end_token": 64 + tokens, "tree_token": 64 + tokens}
    keys, values = np.vstack((key, rubbish)), np.vstack((value, rubbish))
    padded = dense.attend(**job(query, keys, values, base_token=64, **valid))
    assert_same(exact, padded, RESULTS)
    assert padded.nan_key is None
    assert padded.nan_value is None


# Masks.


def test_all_masked() -> None:
    query, key, value = gaussian(3, 10, 32)
    trace = check(**job(query, key, value, start=np.array([0, 5, 10]), end=np.array([10, 5, 20])))
    assert trace.maximum.tolist()[1:] == [SCORE_MASKED] * 2
    assert trace.denominator.tolist()[1:] == [0, 0]
    assert not trace.output[1:].any()
    assert trace.output[0].any()


def test_no_tokens() -> None:
    query, key, value = gaussian(2, 0, 32)
    trace = check(**job(query, key, value))
    assert trace.maximum.tolist() == [SCORE_MASKED] * 2
    assert not trace.output.any()


def test_causal_rows_see_what_single_rows_see() -> None:
    """Draft rows that end one after the other are the single rows over shorter caches."""
    query, key, value = gaussian(4, 40, 32)
    together = check(**job(query, key, value, end=np.array([37, 38, 39, 40])))
    for r in range(4):
        alone = dense.attend(**job(query[r : r + 1], key[: 37 + r], value[: 37 + r]))
        for name in RESULTS:
            np.testing.assert_array_equal(getattr(together, name)[r], getattr(alone, name)[0])


def test_sliding_window() -> None:
    query, key, value = gaussian(1, 200, 32)
    window = check(
        **job(query, key, value, base_token=64, start=np.array([164]), end=np.array([230]))
    )
    alone = dense.attend(**job(query, key[100:166], value[100:166]))
    assert_same(window, alone, RESULTS)


def test_tree_mask() -> None:
    """Each row sees the trunk and its own branch; drafts beyond the 32 are never seen."""
    query, key, value = gaussian(3, 60, 32)
    tree = np.array([0b1, 0b101, 1 << 31], np.uint32)
    trace = check(**job(query, key, value, tree=tree, tree_token=20))
    for r, drafts in enumerate(([0], [0, 2], [31])):
        assert trace.attended[r].nonzero()[0].tolist() == [*range(20), *(20 + d for d in drafts)]


# NaN and infinity.


@ELEMENTS
@pytest.mark.parametrize("extra", [0, 1, 0x8000])
def test_specials_are_reported(element: Element, extra: int) -> None:
    special = INFINITY[element] | extra
    query, key, value = gaussian(3, 80, 32, element)
    query[2, 7] = query[1, 9] = special
    key[70, 0] = key[33, 31] = special
    value[79, 5] = value[12, 5] = special
    trace = check(**job(query, key, value, element=element, base_token=128))
    assert trace.nan_query == (1 << 16 | 9)
    assert trace.nan_key == 128 + 33
    assert trace.nan_value == 128 + 12
    clean = dense.attend(**job(*gaussian(3, 80, 32, element), element=element, base_token=128))
    assert (clean.nan_query, clean.nan_key, clean.nan_value) == (None, None, None)


def test_specials_are_reported_where_no_row_looks() -> None:
    """The valid length decides, not the rows' masks: the device checks all that it reads."""
    query, key, value = gaussian(1, 10, 32)
    key[2, 3] = value[9, 0] = INFINITY[Element.FP16]
    trace = dense.attend(
        **job(query, key, value, start=np.array([5]), end=np.array([8]), end_token=9)
    )
    assert trace.nan_key == 2
    assert trace.nan_value is None


# Laws: order, lanes, merging.


@ELEMENTS
def test_order_of_tokens_does_not_matter(element: Element) -> None:
    query, key, value = gaussian(2, 100, 32, element)
    key[::7] <<= 1  # a wide spread of exponents
    first = dense.attend(**job(query, key, value, element=element))
    rng = np.random.default_rng(5)
    for _ in range(120):
        order = rng.permutation(100)
        other = dense.attend(**job(query, key[order], value[order], element=element))
        assert_same(first, other, RESULTS)


def test_order_of_channels_does_not_matter() -> None:
    query, key, value = gaussian(2, 50, 64)
    first = dense.attend(**job(query, key, value))
    order = np.random.default_rng(6).permutation(64)
    other = dense.attend(**job(query[:, order], key[:, order], value))
    assert_same(first, other, ("score_sums", "scores", *RESULTS))


@ELEMENTS
@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 32])
def test_splitting_over_lanes_gives_the_same_accumulators(element: Element, lanes: int) -> None:
    """Each lane's own sums, against the maximum of all, add up to the whole."""
    query, key, value = gaussian(2, 500, 32, element)
    whole = dense.attend(**job(query, key, value, element=element))
    stripe = np.arange(500) // TINY.tokens_per_page % lanes
    scale = fp32_bits(LOG2E / 32**0.5)
    lane_scores = []
    for lane in range(lanes):
        sums, _ = dense.score_sums(query, key[stripe == lane], element=element, scale_bits=scale)
        lane_scores.append(dense.round_scores(sums, scale)[0])
    maximum = np.max([s.max(axis=1, initial=SCORE_MASKED) for s in lane_scores], axis=0)
    denominator = np.zeros(2, np.int64)
    accumulator = np.zeros((2, 32), object)
    for lane, scores in enumerate(lane_scores):
        significand, exponent = dense.weights(scores, maximum)
        denominator += dense.denominators(significand, exponent)
        high, low, _ = dense.value_sums(
            significand, exponent, value[stripe == lane], element=element
        )
        accumulator += high.astype(object) * (1 << dense.LOW_BITS) + low.astype(object)
    np.testing.assert_array_equal(maximum, whole.maximum)
    np.testing.assert_array_equal(denominator, whole.denominator)
    np.testing.assert_array_equal(accumulator, whole.accumulator)


@pytest.mark.parametrize("cuts", [[], [100], [1, 2, 499], [0, 250, 250]])
def test_merge_gives_the_whole(cuts: list[int]) -> None:
    query, key, value = gaussian(3, 500, 32)
    whole = dense.attend(**job(query, key, value)).partial
    parts = []
    for first, last in zip([0, *cuts], [*cuts, 500], strict=True):
        parts.append(dense.attend(**job(query, key[first:last], value[first:last])).partial)
    merged = merge(parts)
    np.testing.assert_array_equal(merged.maximum, whole.maximum)
    np.testing.assert_allclose(merged.denominator, whole.denominator, rtol=1e-6)
    np.testing.assert_allclose(merged.output, whole.output, rtol=0, atol=3e-7)
    # What was merged can be merged again.
    np.testing.assert_allclose(merge([merged]).output, merged.output, rtol=1e-15)


def test_merge_of_empty_parts_is_zero() -> None:
    query, key, value = gaussian(2, 0, 32)
    empty = dense.attend(**job(query, key, value)).partial
    merged = merge([empty, empty])
    assert not merged.output.any()
    assert merged.maximum.tolist() == [SCORE_MASKED] * 2
    with pytest.raises(RequestError, match="at least one"):
        merge([])


# Widths that other modules promise.


def test_score_sums_fit_their_width() -> None:
    """All features clipped at the top of the window, for the largest head_dim."""
    bits = np.full((1, 256), LARGEST[Element.FP16], np.uint16)
    sums, overflow = dense.score_sums(bits, bits, element=Element.FP16, scale_bits=fp32_bits(1e30))
    assert overflow.all()
    assert 256 << (SCORE_WINDOW_BITS - 1) < sums[0, 0] < 1 << (SCORE_SUM_BITS - 1)


@pytest.mark.parametrize(
    "config", [TINY, PAPER, Config(channels=32, score_depth=65536, head_dim=32)]
)
@pytest.mark.parametrize(
    ("element", "bits", "score"),
    [
        (Element.FP16, LARGEST[Element.FP16], 0),
        (Element.FP16, LARGEST[Element.FP16], -1),
        (Element.BF16, 0x497F, 0),  # the largest that is not clipped at a weight of 1
        (Element.BF16, 0x49FF, -1),  # the largest that is not clipped at a weight just below 1
    ],
)
def test_accumulators_fit_the_configured_width(
    config: Config, element: Element, bits: int, score: int
) -> None:
    """Every token at the largest value, with the weight that makes the largest product."""
    config = replace(config, element=element)
    significand, exponent = dense.weights(np.array([[score]]), np.array([0]))
    value = np.array([[bits]], np.uint16)
    high, low, overflow = dense.value_sums(significand, exponent, value, element=element)
    assert not overflow
    largest = int(high[0, 0]) << dense.LOW_BITS | int(low[0, 0])
    assert dense.denominators(significand, exponent).max() <= 1 << VALUE_FRACTION
    assert config.max_tokens << VALUE_FRACTION < 1 << config.denominator_bits
    assert largest * config.max_tokens < 1 << (config.accumulator_bits - 1)
    assert largest * config.score_depth < 1 << (config.lane_accumulator_bits - 1)


# Errors, and what the trace promises.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((1, 32))}, "query must be a uint16 array"),
        ({"key": [[1]]}, "key must be a uint16 array of two dimensions, not list"),
        ({"key": np.zeros((4, 16), np.uint16)}, "key and value must be"),
        ({"value": np.zeros((5, 32), np.uint16)}, "key and value must be"),
        ({"scale_bits": 0}, "positive normal fp32"),
        ({"scale_bits": 0x007FFFFF}, "positive normal fp32"),
        ({"scale_bits": 0x7F800000}, "positive normal fp32"),
        ({"scale_bits": 0xBF800000}, "positive normal fp32"),
        ({"end_token": 5}, "end_token must be at most"),
        ({"start": np.zeros(2, int)}, "start must be 1 integers"),
        ({"end": np.zeros(1)}, "end must be 1 integers"),
        ({"tree": 0}, "tree must be 1 integers"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        dense.attend(**(job(*gaussian(1, 4, 32)) | change))


def test_trace_shapes_and_inputs_untouched() -> None:
    arrays = gaussian(2, 7, 32)
    before = [a.copy() for a in arrays]
    for array in arrays:
        array.flags.writeable = False
    trace = dense.attend(**job(*arrays))
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    shapes = {(2,), (2, 7), (2, 32)}
    for field in dataclasses.fields(trace):
        if isinstance(array := getattr(trace, field.name), np.ndarray):
            assert array.shape in shapes, field.name
    assert trace.output.dtype == np.uint32
    assert trace.maximum.dtype == np.int64
    assert abs(trace.scores).max() < 40 << SCORE_FRACTION


@ELEMENTS
@pytest.mark.parametrize("common", [0.0, 2.0**13, 2.0**16, 2.0**17])
def test_a_common_part_of_the_scores_costs_nothing(element: Element, common: float) -> None:
    """Biases of q and K as Qwen2 has them: the spread of a few bits on top of them is as exact as without."""
    heads = list(accuracy.large_score_heads(common, element, tokens=300, heads=2))
    assert not any(accuracy.attend(*head, element).flags for head in heads)
    found = accuracy.errors(iter(heads), element)
    assert found["rel_rms"] <= min(5e-7, found["float32"])


def test_two_tokens_that_differ_by_two_nats() -> None:
    """q.k of 67,712, beyond fp16's largest number, and of 67,735."""
    query, key = to_bits(np.full((1, 128), 23.0), Element.FP16), np.full((2, 128), 23.0)
    key[1, 0] = 24.0
    value = to_bits(np.array([[0.0], [1.0]]) * np.ones((1, 128)), Element.FP16)
    trace = check(**job(query, to_bits(key, Element.FP16), value, scale_bits=fp32_bits(128**-0.5 / np.log(2))))
    assert trace.partial.output == pytest.approx(1 / (1 + np.exp(-23 / 128**0.5)), rel=3e-7)
    assert trace.flags == 0
