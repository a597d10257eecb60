"""The golden model of the sparse modes: against a slow reference and SparQ, at its edges, and its laws."""

import dataclasses
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.host.golden import reference
from tests.host.golden.test_golden import ELEMENTS, INFINITY, LARGEST, LOG2E, Bits, element_bits

from kvattic.errors import RequestError
from kvattic.golden import dense, first_pass, sparse
from kvattic.golden.first_pass import ALPHA_ONE, FORCED
from kvattic.spec import codes, formats
from kvattic.spec.commands import CompletionFlag, Mode, fp32_bits
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import SCORE_FRACTION, SCORE_MASKED, SCORE_MAX, VALUE_FRACTION, Element
from kvattic.spec.layout import TOKEN_BITS
from kvattic_sim import oracle
from kvattic_sim.reports.benches import accuracy

MODES = pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CENTROID, Mode.CODES])
BLENDED = pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CODES])
FEATURED = pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED])
BOUND = 5e-7
"""Law: relative RMS error against float64, where both select the same."""


def fp32(values: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)


def means(key: Bits, unit_tokens: int, element: Element) -> Bits:
    values = from_bits(key, element).astype(np.float64)
    return to_bits(values.reshape(-1, unit_tokens, key.shape[1]).mean(axis=1), element)


def geometry(head_dim: int, group_tokens: int, element: Element) -> Config:
    """A drive with codes of such stripes."""
    like = {128: replace(TINY, beat_bytes=16), 256: PAPER}[group_tokens]
    return replace(like, head_dim=head_dim, element=element)


def coded(key: Bits, group_tokens: int, element: Element, sinks: int = 0) -> codes.KeyCodes:
    """Codes of stripes of 128 or 256 tokens."""
    return codes.encode(key, geometry(key.shape[1], group_tokens, element), skip=sinks)


def sketch_of(mode: Mode, key: Bits, unit_tokens: int, group_tokens: int, element: Element) -> Any:
    """What the first pass reads beside K; None in the modes that take K itself."""
    if mode is Mode.CODES:
        return coded(key, group_tokens, element)
    return means(key, unit_tokens, element) if mode is Mode.CENTROID else None


def job(mode: Mode, *, rows: int = 1, stripes: int = 4, head_dim: int = 32, group_tokens: int = 128,
        per_codeword: int = 4, unit_bits: int = 1, element: Element = Element.FP16, seed: int = 0,
        **changes: Any) -> dict[str, Any]:
    """Arguments of `attend_sparse`: half of the features, an eighth of the tokens; the last stripe is tail."""
    rng = np.random.default_rng(seed)
    tokens = stripes * group_tokens
    query = to_bits(rng.standard_normal((rows, head_dim)) * 2, element)
    key, value = (to_bits(rng.standard_normal((tokens, head_dim)), element) for _ in range(2))
    unit_bits = 0 if mode.by_token else unit_bits
    unit_tokens = 1 if mode.by_token else per_codeword << unit_bits
    tail = np.zeros(stripes, np.bool_)
    tail[-1] = True
    arguments: dict[str, Any] = {
        "query": query, "key": key, "value": value, "mode": mode, "group_tokens": group_tokens,
        "tokens_per_codeword": per_codeword, "features": head_dim // 2 if mode.featured else 0,
        "top_units": tokens // 8 // unit_tokens, "local_tokens": 0, "sinks": 0, "unit_bits": unit_bits,
        "mean": None if mode is Mode.CENTROID else fp32(from_bits(value, element).astype(np.float64).mean(axis=0)),
        "sketch": sketch_of(mode, key, unit_tokens, group_tokens, element), "tail": tail,
        "element": element, "scale_bits": fp32_bits(LOG2E / head_dim**0.5), "start": np.zeros(rows, np.int64),
        "end": np.full(rows, tokens), "tree": np.zeros(rows, np.int64), "tree_token": tokens, "base_token": 0,
        "end_token": tokens}
    return arguments | changes


def attend(arguments: dict[str, Any]) -> sparse.SparseTrace:
    return sparse.attend_sparse(**arguments)


def dense_trace(arguments: dict[str, Any], **changes: Any) -> dense.Trace:
    names = ("query", "key", "value", "element", "scale_bits", "start", "end", "tree", "tree_token", "base_token",
             "end_token")
    return dense.attend(**({name: arguments[name] for name in names} | changes))


def assert_dense(trace: sparse.SparseTrace, arguments: dict[str, Any]) -> None:
    """The job's result is that of dense attention, to the last bit."""
    want = dense_trace(arguments)
    for name in ("output", "maximum", "denominator"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(want, name), name)
    assert (trace.first.alpha == ALPHA_ONE).all()


def check(arguments: dict[str, Any]) -> sparse.SparseTrace:
    """Golden model and reference agree on every intermediate; returns the trace."""
    trace = attend(arguments)
    expected = reference.attend_sparse(**({"value_bits" if name == "value" else name: given
                                           for name, given in arguments.items()}))
    found = {
        "exact_scores": trace.exact.scores, "exact_maximum": trace.exact.maximum, "output": trace.output,
        "exact_denominator": trace.exact.denominator, "nan_key": trace.nan_key, "nan_value": trace.nan_value,
        "flags": trace.flags}
    for name, want in expected._asdict().items():
        got = found[name] if name in found else getattr(trace.first, name)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == want, name
    return trace


# Against the reference.


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Small jobs with everything in them: groups of 8 tokens, codewords of 2."""
    element = draw(st.sampled_from(list(Element)))
    mode = draw(st.sampled_from(list(Mode)[1:]))
    rows, stripes, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5]))
    head_dim = 4 if mode is Mode.CODES else head_dim
    tokens = 8 * stripes
    unit_bits = 0 if mode.by_token else draw(st.integers(0, 2))
    unit_tokens = 1 if mode.by_token else 2 << unit_bits
    elements = element_bits(element)
    base = draw(st.sampled_from([0, 8, 64, 5, (1 << 24) - 64]))
    token = st.integers(max(base - 2, 0), base + tokens + 2)
    per_row = hnp.arrays(np.uint32, rows, elements=token)
    whole = hnp.arrays(np.uint16, (tokens, head_dim), elements=elements)
    centroids = hnp.arrays(np.uint16, (tokens // unit_tokens, head_dim), elements=elements)
    single = st.one_of(
        st.sampled_from([0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF, 1 << 31]),
        st.integers(0, (1 << 32) - 1).filter(lambda b: b >> 23 & 255 != 255))
    fields = st.one_of(st.integers(110, 130), st.integers(1, 254))
    if mode is Mode.CODES:
        levels = [draw(hnp.arrays(np.uint16, (stripes, head_dim), elements=elements)) for _ in range(2)]
        found = draw(hnp.arrays(np.uint8, (tokens, head_dim), elements=st.integers(0, 3)))
        sketch = codes.KeyCodes(base=levels[0], step=levels[1], codes=found)
    else:
        sketch = draw(st.one_of(st.none(), whole)) if mode.featured else draw(centroids)
    return {
        "query": draw(hnp.arrays(np.uint16, (rows, head_dim), elements=elements)),
        "key": draw(whole),
        "value": draw(whole),
        "mode": mode,
        "group_tokens": 8,
        "tokens_per_codeword": 2,
        "features": draw(st.integers(1, head_dim)) if mode.featured else 0,
        "top_units": draw(st.integers(1, tokens // unit_tokens)),
        "local_tokens": draw(st.one_of(st.just(0), st.integers(0, tokens))),
        "sinks": draw(st.one_of(st.just(0), st.integers(0, 4 if mode is Mode.CODES else tokens))),
        "unit_bits": unit_bits,
        "mean": draw(hnp.arrays(np.uint32, head_dim, elements=single)) if mode.blended else None,
        "sketch": sketch,
        "tail": draw(hnp.arrays(np.bool_, stripes)),
        "element": element,
        "scale_bits": draw(fields) << 23 | draw(st.integers(0, (1 << 23) - 1)),
        "start": draw(st.one_of(st.just(np.zeros(rows, np.uint32)), per_row)),
        "end": draw(st.one_of(st.just(np.full(rows, base + tokens, np.uint32)), per_row)),
        "tree": draw(hnp.arrays(np.uint32, rows, elements=st.integers(0, (1 << 32) - 1))),
        "tree_token": draw(st.one_of(st.just(base + tokens), token)),
        "base_token": base,
        "end_token": draw(st.one_of(st.just(base + tokens), st.integers(base + tokens - 7, base + tokens))),
    }


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_agrees_with_the_reference(arguments: dict[str, Any]) -> None:
    check(arguments)


@ELEMENTS
@MODES
@pytest.mark.parametrize(("rows", "seed"), [(1, 0), (2, 1), (2, 2)])
def test_agrees_with_the_reference_on_ordinary_data(mode: Mode, element: Element, rows: int, seed: int) -> None:
    arguments = job(mode, rows=rows, stripes=3, element=element, seed=seed, base_token=640, end_token=640 + 3 * 128 - 5,
                    tree_token=640 + 3 * 128 - 9, tree=np.arange(5, 5 + rows), start=np.arange(rows) * 700,
                    end=np.full(rows, 2000), local_tokens=20)
    trace = check(arguments)
    first = trace.first
    # The case is worth its name: something is selected, something is not, and neither has everything.
    assert 0 < first.selected.sum() < first.valid.sum()
    if mode is not Mode.CENTROID:
        assert (first.alpha < ALPHA_ONE).all() and (first.alpha > 0).all()
        assert (trace.output != trace.exact.output).any()


# Each step.


@ELEMENTS
def test_magnitudes_of_every_pattern(element: Element) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)[None]
    got = first_pass.magnitudes(bits, element)[0]
    assert got.tolist() == [reference.magnitude(reference.number(int(b), element)) for b in bits[0]]
    assert got.max() == (1 << formats.MAGNITUDE_BITS) - 1 if element is Element.BF16 else got.max() == 65504 << 24
    if element is Element.FP16:    # exact
        finite = np.isfinite(from_bits(bits, element)[0])
        assert (got[finite] == np.abs(from_bits(bits[:, finite], element)[0]) * 2.0**24).all()


def test_top_features_are_those_of_all_rows_and_ties_go_to_the_lower() -> None:
    query = to_bits(np.array([[1.0, -3.0, 2.0, 0.0, -2.0, 1.0], [1.0, 0.0, 0.0, 2.0, 0.0, -1.0]]), Element.FP16)
    # Sums: 2, 3, 2, 2, 2, 2.
    for r, want in enumerate(([1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]), 1):
        assert first_pass.top_features(query, r, Element.FP16).tolist() == want


def test_approximate_scale_by_hand() -> None:
    """A quarter of |q| in the chosen feature: the scale is twice as large; nothing in it: as it was."""
    query = to_bits(np.array([[1.0, -1.5, 1.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), Element.FP16)
    scale = 0x3FC00001
    significand, exponent = first_pass.approximate_scales(query, np.array([0]), Element.FP16, scale)
    assert significand.tolist() == [0xC00001] * 4
    assert exponent.tolist() == [128, 127, 127, 127]


@ELEMENTS
def test_approximate_scale_is_within_two_steps(element: Element) -> None:
    """Root and product are truncated to 24 bits each: relative error below 2**-22, never above the exact value."""
    query = to_bits(np.random.default_rng(3).standard_normal((64, 128)) * 5, element)
    features = first_pass.top_features(query, 16, element)
    scale_bits = fp32_bits(LOG2E / 128**0.5)
    significand, exponent = first_pass.approximate_scales(query, features, element, scale_bits)
    values = np.abs(from_bits(query, element).astype(np.float64))
    scale = float(np.array([scale_bits], np.uint32).view(np.float32)[0])
    want = scale * np.sqrt(values.sum(axis=1) / values[:, features].sum(axis=1))
    got = significand * 2.0 ** (exponent - 127 - 23)
    assert ((significand >> 23) == 1).all()
    assert (got <= want * (1 + 1e-12)).all()
    assert (got > want * (1 - 2.0**-22)).all()


def test_approximate_scale_may_leave_fp32() -> None:
    """The least and the largest ratio; what counts is the window's offset, which takes any exponent."""
    query = np.array([[1, *[LARGEST[Element.FP16]] * 255]], np.uint16)
    significand, exponent = first_pass.approximate_scales(query, np.array([0]), Element.FP16, 0x7F7FFFFF)
    exact = Fraction(0xFFFFFF, 1 << 23) * math.isqrt((255 * 65504 * (1 << 24) + 1) << 48) / (1 << 24)
    assert exponent[0] > 254
    assert significand[0] == int(exact / 2 ** (int(exponent[0]) - 254) * (1 << 23))
    sums, clipped = first_pass.feature_sums(query, query, np.array([0, 1]), exponent, Element.FP16)
    assert clipped.all() and sums.max() < 1 << 50


@ELEMENTS
def test_feature_sums_of_all_features_are_the_scores(element: Element) -> None:
    arguments = job(Mode.SPARF, rows=2, element=element)
    query, key, scale = arguments["query"], arguments["key"], arguments["scale_bits"]
    every = np.arange(query.shape[1])
    significand, exponent = first_pass.approximate_scales(query, every, element, scale)
    assert (exponent == scale >> 23).all()
    sums, clipped = first_pass.feature_sums(query, key, every, exponent, element)
    want, overflow = dense.score_sums(query, key, element=element, scale_bits=scale)
    np.testing.assert_array_equal(sums, want)
    np.testing.assert_array_equal(clipped, overflow)
    np.testing.assert_array_equal(
        dense.scale_scores(sums, significand[:, None])[0], dense.round_scores(sums, scale)[0])


def test_feature_sums_use_each_rows_own_scale() -> None:
    arguments = job(Mode.SPARF, rows=3)
    query, key = arguments["query"], arguments["key"]
    features, exponent = np.array([1, 4, 9]), np.array([120, 127, 131])
    sums, clipped = first_pass.feature_sums(query, key, features, exponent, Element.FP16)
    for r in range(3):
        one, over = dense.score_sums(query[r : r + 1, features], key[:, features], element=Element.FP16,
                                      scale_bits=int(exponent[r]) << 23)
        np.testing.assert_array_equal(sums[r], one[0])
        np.testing.assert_array_equal(clipped[r], over[0])


@given(st.integers(1, (1 << 64) - 1))
def test_log2_is_the_truncated_logarithm(denominator: int) -> None:
    got = first_pass.log2(denominator)
    assert got == reference.log2(denominator)
    # Python's own logarithm is good to 1e-14 here.
    exact = math.log2(denominator) - VALUE_FRACTION
    below = exact - got / (1 << SCORE_FRACTION)
    assert -1e-13 <= below < 2.0**-SCORE_FRACTION + 2.0**-28


@pytest.mark.parametrize("power", range(64))
def test_log2_of_powers_is_exact(power: int) -> None:
    assert first_pass.log2(1 << power) == (power - VALUE_FRACTION) << SCORE_FRACTION


def test_references() -> None:
    one = 1 << VALUE_FRACTION
    maximum = np.array([5 << SCORE_FRACTION, SCORE_MAX - 1, SCORE_MASKED])
    got = first_pass.references(maximum, np.array([4 * one, one * 2, 0]))
    assert got.tolist() == [7 << SCORE_FRACTION, SCORE_MAX, 0]


def test_probabilities_sum_to_one() -> None:
    """Up to the truncations of log2 and of each weight."""
    rng = np.random.default_rng(4)
    scores = rng.integers(-8 << SCORE_FRACTION, 8 << SCORE_FRACTION, (5, 1000))
    scores[:, ::7] = SCORE_MASKED
    maximum = scores.max(axis=1)
    against = first_pass.references(maximum, dense.denominators(*dense.weights(scores, maximum)))
    assert (against >= maximum).all()
    p = first_pass.probabilities(scores, against)
    assert not p[:, ::7].any()
    np.testing.assert_allclose(p.sum(axis=1) / 2.0**VALUE_FRACTION, 1, atol=3e-7)


def test_masses_and_ranks() -> None:
    one = 1 << VALUE_FRACTION
    p = np.array([[one, 0, 1 << 10, 1 << 9, 0, 0, 64 * one, 0], [one // 2, 0, 0, 1 << 9, 0, 0, 0, 0]])
    mass = first_pass.masses(p, 2)
    assert mass.tolist() == [3 << 29, 2, 0, FORCED - 1]
    assert first_pass.masses(p[:, :4], 1).tolist() == [3 << 29, 0, 1, 1]
    rank = first_pass.ranks(mass, base_token=16, unit_tokens=2, local_token=1 << 24, sinks=0)
    low = (1 << 24) - 1
    assert rank.tolist() == [(m << 24) + low - first for m, first in zip(mass.tolist(), (16, 18, 20, 22), strict=True)]
    assert int(rank.max()).bit_length() <= formats.MASS_BITS + TOKEN_BITS
    # Tokens from 21 on are local: units 2 and 3 touch them.
    rank = first_pass.ranks(mass, base_token=16, unit_tokens=2, local_token=21, sinks=0)
    assert (rank >> 24).tolist() == [3 << 29, 2, FORCED, FORCED]
    # A unit that is not full is local, too, where its rest lies behind the end.
    assert first_pass.ranks(mass, base_token=16, unit_tokens=2, local_token=23, sinks=0)[3] >> 24 == FORCED
    assert first_pass.ranks(mass, base_token=16, unit_tokens=2, local_token=24, sinks=0)[3] >> 24 == FORCED - 1


@given(st.data())
def test_select_takes_the_largest(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    mass = np.array(data.draw(st.lists(st.sampled_from([0, 1, 2, FORCED - 1]), min_size=n, max_size=n)))
    valid = data.draw(hnp.arrays(np.bool_, n))
    k = data.draw(st.integers(1, n + 3))
    rank = first_pass.ranks(mass, base_token=0, unit_tokens=4, local_token=4 * n, sinks=0)
    chosen = first_pass.select(rank, valid, k)
    best = sorted(np.flatnonzero(valid).tolist(), key=lambda u: (-mass[u], u))[:k]
    assert np.flatnonzero(chosen).tolist() == sorted(best)
    # The same digit by digit, as hardware does it: from the top, the counts of a digit's values say where the k-th is.
    prefix, digits, missing = 0, 0, k
    alive = valid.copy()
    width = formats.DIGIT_BITS
    bits = formats.MASS_BITS + TOKEN_BITS
    padded = rank << -bits % width
    if int(valid.sum()) > k:
        while True:
            shift = bits + -bits % width - width * (digits + 1)
            digit = padded >> shift & ((1 << width) - 1)
            count = np.bincount(digit[alive], minlength=1 << width)
            value = next(d for d in range((1 << width) - 1, -1, -1) if count[d:].sum() >= missing)
            missing -= int(count[value + 1 :].sum())
            prefix, digits = prefix << width | value, digits + 1
            if count[value] == missing:
                break
            alive &= digit == value
        assert (chosen == (valid & (padded >> shift >= prefix))).all()
    else:
        assert (chosen == valid).all()


def test_alphas() -> None:
    one = 1 << VALUE_FRACTION
    p = np.array([[one // 4, one // 2, (1 << 15) - 1], [one // 4, one // 2, 1 << 15], [one, one, one], [0, 0, 0]])
    taken, denominator = np.array([True, False, True]), np.array([one, one, one, 0])
    quarter = ALPHA_ONE // 4
    assert first_pass.alphas(p, taken, denominator).tolist() == [quarter, quarter + 1, ALPHA_ONE, ALPHA_ONE]


FINITE = st.one_of(
    st.integers(0, (1 << 32) - 1).filter(lambda b: b >> 23 & 255 != 255),
    st.sampled_from([0, 1 << 31, 0x00800000, 0x80800000, 0x00800001, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x00FFFFFF]))


@settings(max_examples=500)
@given(st.one_of(st.integers(0, ALPHA_ONE), st.sampled_from([0, 1, ALPHA_ONE - 1, ALPHA_ONE])), FINITE, FINITE)
def test_blend_rounds_once(alpha: int, quotient: int, mean: int) -> None:
    share = Fraction(alpha, ALPHA_ONE)
    exact = share * reference.finite(quotient) + (1 - share) * reference.finite(mean)
    assert sparse.blend(alpha, quotient, mean) == reference.fp32_or_zero(exact)


@pytest.mark.parametrize(("alpha", "quotient", "mean", "want"), [
    (ALPHA_ONE, 0xC0490FDB, 0x7F7FFFFF, 0xC0490FDB),
    (0, 0x7F7FFFFF, 0xC0490FDB, 0xC0490FDB),
    (ALPHA_ONE // 2, 0x3F800000, 0xBF800000, 0),            # 1/2 - 1/2 is +0
    (ALPHA_ONE // 2, 0x3F800000, 0x3F800001, 0x3F800000),   # a tie, to even
    (ALPHA_ONE // 2, 0x3F800001, 0x3F800002, 0x3F800002),   # another
    (ALPHA_ONE // 2, 0x00800000, 0, 0),                     # 2**-127 is +0
    (ALPHA_ONE - 1, 0x80800000, 0, 0),                      # has 24 bits and is below 2**-126
    (ALPHA_ONE - 2, 0x80800001, 0, 0x80800000),             # has more, and rounds to it
    (ALPHA_ONE // 2, 0x7F7FFFFF, 0x7F7FFFFF, 0x7F7FFFFF),
    (ALPHA_ONE // 2, 0x3F800000, 0x007FFFFF, 0x3F000000),   # subnormals count as zero
    (ALPHA_ONE // 2, 0x3F800000, 0x7FC00000, 0x3F000000),   # and so does what the device refuses
    (1, 0x7F7FFFFF, 0x00800000, 0x737FFFFF),
])
def test_blend_by_hand(alpha: int, quotient: int, mean: int, want: int) -> None:
    assert sparse.blend(alpha, quotient, mean) == want


# Laws.


@ELEMENTS
@MODES
def test_all_units_give_dense_bits(mode: Mode, element: Element) -> None:
    arguments = job(mode, rows=2, element=element, end_token=500, top_units=10**6)
    assert_dense(attend(arguments), arguments)
    # Just enough is enough; one fewer is not.
    valid = int(attend(arguments).first.valid.sum())
    assert_dense(attend(arguments | {"top_units": valid}), arguments)
    less = attend(arguments | {"top_units": valid - 1})
    assert (less.output != dense_trace(arguments).output).any()
    assert (less.first.alpha < ALPHA_ONE).any() == (mode is not Mode.CENTROID)


@MODES
def test_a_sequence_that_is_all_tail_is_dense(mode: Mode) -> None:
    """Shorter than a group, say."""
    for stripes, end_token in ((1, 90), (3, 384)):
        arguments = job(mode, stripes=stripes, tail=np.ones(stripes, np.bool_), end_token=end_token, top_units=1,
                        local_tokens=1)
        trace = attend(arguments)
        assert_dense(trace, arguments)
        assert not trace.first.valid.any() and not trace.first.selected.any()
        assert trace.first.taken.sum() == end_token


@BLENDED
def test_tail_is_attended_and_counts_in_alpha(mode: Mode) -> None:
    arguments = job(mode, rows=2, tail=np.array([False, True, False, False]), top_units=2)
    trace = attend(arguments)
    first = trace.first
    assert trace.exact.attended[:, 128:256].all()
    assert int(first.selected.sum()) == 2
    assert not first.selected.reshape(4, -1)[1].any()
    of_tail = first.probability[:, 128:256].sum(axis=1)
    assert (first.alpha >= (of_tail >> 16) - 1).all()
    # Its scores are the exact ones.
    np.testing.assert_array_equal(first.scores[:, 128:256], dense_trace(arguments).scores[:, 128:256])


@FEATURED
def test_equal_scores_select_the_lowest_tokens(mode: Mode) -> None:
    arguments = job(mode, tail=np.zeros(4, np.bool_))
    arguments["key"] = np.repeat(arguments["key"][:1], 512, axis=0)
    trace = attend(arguments)
    chosen = trace.first.units
    assert chosen.tolist() == list(range(arguments["top_units"]))
    assert trace.first.alpha.tolist() == [ALPHA_ONE // 8]


def test_equal_codes_select_the_lowest_tokens() -> None:
    arguments = job(Mode.CODES, tail=np.zeros(4, np.bool_))
    sketch = arguments["sketch"]
    sketch.base[:], sketch.step[:], sketch.codes[:] = sketch.base[:1], sketch.step[:1], sketch.codes[:1]
    trace = attend(arguments)
    assert trace.first.units.tolist() == list(range(arguments["top_units"]))
    assert trace.first.alpha.tolist() == [ALPHA_ONE // 8]


def test_equal_centroids_select_the_lowest_units() -> None:
    arguments = job(Mode.CENTROID)
    arguments["sketch"] = np.repeat(arguments["sketch"][:1], 64, axis=0)
    assert attend(arguments).first.units.tolist() == list(range(arguments["top_units"]))


@MODES
def test_local_window_comes_first(mode: Mode) -> None:
    """The newest tokens of flash, wherever they stand in the ranking; a window with no room takes the oldest of it."""
    arguments = job(mode, tail=np.zeros(4, np.bool_), local_tokens=13, end_token=507)
    first = attend(arguments).first
    size = first.layout.unit_tokens
    touched = [u for u in range(len(first.mass)) if (u + 1) * size > 507 - 13 and u * size < 507]
    assert first.selected[touched].all()
    assert first.selected.sum() == arguments["top_units"]
    without = attend(arguments | {"local_tokens": 0, "end_token": 504}).first
    assert not without.selected[touched].all()
    few = attend(arguments | {"top_units": 1}).first
    assert few.units.tolist() == touched[:1]
    # A window as long as the sequence, and longer.
    for local in (507, 508, 65535):
        first = attend(arguments | {"local_tokens": local}).first
        assert first.units.tolist() == list(range(arguments["top_units"]))


@MODES
def test_sinks_come_first(mode: Mode) -> None:
    """The first tokens of the sequence, beside the local window; a job that begins behind them has none."""
    arguments = job(mode, tail=np.zeros(4, np.bool_), sinks=13, local_tokens=5)
    first = attend(arguments).first
    size = first.layout.unit_tokens
    touched = [u for u in range(len(first.mass)) if u * size < 13]
    assert first.selected[touched].all() and first.selected[-1]
    assert first.selected.sum() == arguments["top_units"]
    without = attend(arguments | {"sinks": 0}).first
    assert not without.selected[touched].all()
    moved = {"base_token": 512, "end_token": 1024, "start": np.full(1, 512), "end": np.full(1, 1024)}
    assert attend(arguments | moved).first.selected.tolist() == attend(
        arguments | moved | {"sinks": 0}).first.selected.tolist()


@MODES
def test_the_result_does_not_depend_on_the_order(mode: Mode) -> None:
    """Stripes dealt to lanes at random and in any order: what the lanes say together is what golden says."""
    arguments = job(mode, rows=2, stripes=8, local_tokens=9, tail=np.arange(8) == 5, end_token=8 * 128 - 3)
    want = attend(arguments).first
    size = want.layout.unit_tokens
    scored = 128 // size if mode is Mode.CENTROID else 128
    units = 128 // size
    rng = np.random.default_rng(11)
    for lanes in (1, 2, 3, 8):
        lane = rng.integers(0, lanes, 8)
        parts = []
        for number in range(lanes):
            stripes = rng.permutation(np.flatnonzero(lane == number))
            parts.append(((stripes[:, None] * scored + np.arange(scored)).ravel(),
                          (stripes[:, None] * units + np.arange(units)).ravel()))
        scores = [want.scores[:, places] for places, _ in parts]
        maximum = np.max([s.max(axis=1, initial=SCORE_MASKED) for s in scores], axis=0)
        assert maximum.tolist() == want.maximum.tolist()
        total = sum(dense.denominators(*dense.weights(s, maximum)) for s in scores)
        assert total.tolist() == want.denominator.tolist()
        against = first_pass.references(maximum, total)
        p = [first_pass.probabilities(s, against) for s in scores]
        mass = np.concatenate([first_pass.masses(each, 1 if mode is Mode.CENTROID else size) for each in p])
        place = np.concatenate([places for _, places in parts])
        assert mass.tolist() == want.mass[place].tolist()
        chosen = np.zeros(len(mass), np.bool_)
        chosen[place] = first_pass.select(want.rank[place], want.valid[place], arguments["top_units"])
        assert chosen.tolist() == want.selected.tolist()
        if mode is not Mode.CENTROID:
            share = sum(each[:, want.taken[places]].sum(axis=1) for each, (places, _) in zip(p, parts, strict=True))
            alpha = first_pass.alphas(share[:, None], np.array([True]), total)
            assert alpha.tolist() == want.alpha.tolist()


@MODES
def test_order_of_stripes_moves_nothing_but_the_ties(mode: Mode) -> None:
    """All stripes in another order: the same masses at other places, and the same output."""
    arguments = job(mode, rows=2, stripes=6, tail=np.arange(6) >= 4)
    order = np.array([3, 5, 0, 4, 1, 2])
    tokens = (order[:, None] * 128 + np.arange(128)).ravel()
    units = (order[:, None] * 16 + np.arange(16)).ravel()
    moved = arguments | {"key": arguments["key"][tokens], "value": arguments["value"][tokens],
                         "tail": arguments["tail"][order]}
    if mode is Mode.CENTROID:
        moved["sketch"] = arguments["sketch"][units]
    elif mode is Mode.CODES:
        sketch = arguments["sketch"]
        moved["sketch"] = codes.KeyCodes(
            base=sketch.base[order], step=sketch.step[order], codes=sketch.codes[tokens])
    a, b = attend(arguments), attend(moved)
    np.testing.assert_array_equal(a.output, b.output)
    np.testing.assert_array_equal(a.first.alpha, b.first.alpha)
    np.testing.assert_array_equal(a.first.taken[tokens], b.first.taken)


# What is read.


@MODES
def test_what_is_not_read_does_not_matter(mode: Mode) -> None:
    """NaN everywhere but in what the trace says is read."""
    arguments = job(mode, rows=2, top_units=3, end_token=509)
    nan = INFINITY[Element.FP16] | 1
    want = attend(arguments)
    first = want.first
    sketch = arguments["key"].copy() if mode.featured else arguments["sketch"]
    if mode is Mode.CODES:
        sketch.base[3:] = sketch.step[3:] = nan
    elif mode is Mode.CENTROID:
        sketch = sketch.copy()
        sketch[48:] = nan      # units of the tail
    else:
        sketch[:, [c for c in range(32) if c not in first.features]] = nan
        sketch[384:] = nan
    codewords = np.zeros(128, np.bool_)
    codewords[first.codewords] = True
    unread = ~np.repeat(codewords, 4)
    key, value = arguments["key"].copy(), arguments["value"].copy()
    key[unread], value[unread] = nan, nan
    key[509:], value[509:] = nan, nan
    got = attend(arguments | {"sketch": sketch, "key": key, "value": value})
    assert (got.nan_key, got.nan_value, got.nan_query, got.nan_mean) == (None,) * 4
    np.testing.assert_array_equal(got.output, want.output)
    # And each of them, if it is read, is found.
    token = int(first.codewords[0]) * 4
    for name, field in (("key", "nan_key"), ("value", "nan_value")):
        changed = arguments[name].copy()
        changed[token, 5] = nan
        extra = {"sketch": arguments["key"]} if mode.featured and name == "key" else {}
        assert getattr(attend(arguments | {name: changed} | extra), field) == token


@FEATURED
def test_nan_of_the_first_pass_is_named(mode: Mode) -> None:
    arguments = job(mode, end_token=509)
    feature = int(attend(arguments).first.features[3])
    for token, want in ((77, 77), (383, 383), (400, 400), (510, None)):
        sketch, key = arguments["key"].copy(), arguments["key"].copy()
        (key if token >= 384 else sketch)[token, feature] = 0xFC00
        assert attend(arguments | {"sketch": sketch, "key": key}).nan_key == want
    arguments["sketch"] = arguments["key"].copy()
    arguments["sketch"][300, feature] = arguments["sketch"][200, feature] = 0x7E00
    assert attend(arguments).nan_key == 200


def test_nan_of_a_centroid_is_named_by_its_units_first_token() -> None:
    arguments = job(Mode.CENTROID, base_token=1024, end_token=1024 + 509, end=np.array([2000]), tree_token=2000,
                    tail=np.zeros(4, np.bool_))
    for unit, want in ((0, 1024), (17, 1024 + 17 * 8), (63, 1024 + 63 * 8)):
        sketch = arguments["sketch"].copy()
        sketch[unit, 31] = 0x7C00
        assert attend(arguments | {"sketch": sketch}).nan_key == want
    assert attend(arguments | {"sketch": sketch, "end_token": 1024 + 504}).nan_key is None


@FEATURED
def test_overflow_flags_of_the_first_pass(mode: Mode) -> None:
    """A clipped product of the feature pass counts wherever it is; one of the tail or of K where it is attended."""
    arguments = job(mode, start=np.array([200]), end_token=500)
    assert attend(arguments).flags == CompletionFlag(0)
    feature = int(attend(arguments).first.features[0])
    big = arguments | {"query": arguments["query"].copy()}
    big["query"][0, feature] = 0x6400      # 1,024
    assert attend(big).flags == CompletionFlag(0)
    assert feature in attend(big).first.features
    for token, flagged in ((10, True), (300, True), (499, True), (505, False)):
        key = arguments["key"].copy()
        key[token, feature] = LARGEST[Element.FP16]
        assert (CompletionFlag.SCORE_OVERFLOW in attend(big | {"key": key}).flags) == flagged, token
    # Of flash, the whole codeword counts, also what lies behind the end.
    key = arguments["key"].copy()
    key[505, feature] = LARGEST[Element.FP16]
    assert CompletionFlag.SCORE_OVERFLOW in attend(big | {"key": key, "tail": np.zeros(4, np.bool_)}).flags


def test_rows_that_attend_nothing() -> None:
    """They have no part in the selection, and their output is zero; the other row's is as if it were alone."""
    for mode in (Mode.SPARF, Mode.FETCHED, Mode.CENTROID):
        arguments = job(mode, rows=2, end=np.array([512, 0]))
        both = attend(arguments)
        assert not both.output[1].any()
        assert both.first.alpha[1] == ALPHA_ONE and both.first.reference[1] == 0
        assert both.maximum[1] == SCORE_MASKED
        assert not both.first.probability[1].any()


def test_a_row_of_which_nothing_is_selected_is_the_mean() -> None:
    """Row 1 attends one token, which row 0 outweighs."""
    arguments = job(Mode.SPARF, rows=2, tail=np.zeros(4, np.bool_), top_units=1, start=np.array([0, 300]),
                    end=np.array([512, 302]))
    arguments["query"][0] = to_bits(np.full(32, 8.0), Element.FP16)
    arguments["key"][5] = to_bits(np.full(32, 8.0), Element.FP16)
    trace = attend(arguments)
    assert trace.first.units.tolist() == [5]
    assert trace.first.alpha[1] == 0
    np.testing.assert_array_equal(trace.output[1], arguments["mean"])


def test_mean_with_a_nan_is_named() -> None:
    arguments = job(Mode.FETCHED)
    assert attend(arguments).nan_mean is None
    for bits in (0x7F800000, 0xFF800000, 0x7FC00000):
        mean = arguments["mean"].copy()
        mean[[30, 7]] = bits
        assert attend(arguments | {"mean": mean}).nan_mean == 7


# Against the oracle.


def floats(arguments: dict[str, Any]) -> tuple[NDArray[np.float64], ...]:
    """q, k, v, and the tail by token, up to end_token."""
    end = arguments["end_token"]
    names = ("query", "key", "value")
    q, k, v = (from_bits(arguments[name], arguments["element"]).astype(np.float64) for name in names)
    return q, k[:end], v[:end], np.repeat(arguments["tail"], arguments["group_tokens"])[:end]


def exact(arguments: dict[str, Any]) -> oracle.Sparse:
    q, k, v, tail = floats(arguments)
    scale, mode = q.shape[1] ** -0.5, arguments["mode"]
    common: dict[str, Any] = {name: arguments[name] for name in ("top_units", "local_tokens", "sinks")} | {"tail": tail}
    unit_tokens = arguments["tokens_per_codeword"] << arguments["unit_bits"]
    if mode is Mode.CENTROID:
        centroids = from_bits(arguments["sketch"], arguments["element"])
        return oracle.centroid(q, k, v, scale, centroids=centroids, unit_tokens=unit_tokens, **common)
    common |= {"features": arguments["features"], "mean": arguments["mean"].view(np.float32)}
    if mode is Mode.CODES:
        del common["features"]
        estimate = codes.decode(arguments["sketch"], geometry(
            q.shape[1], arguments["group_tokens"], arguments["element"]))[: len(k)]
        return oracle.codes(q, k, v, scale, estimate=estimate, codeword_tokens=arguments["tokens_per_codeword"],
                            **common)
    if mode is Mode.SPARF:
        return oracle.sparf(q, k, v, scale, **common)
    return oracle.fetched(q, k, v, scale, unit_tokens=unit_tokens, **common)


def paper_job(mode: Mode, rows: int, element: Element, seed: int, data: str) -> dict[str, Any]:
    """An eighth of the bytes of 4,096 tokens, in the geometry of the paper's drive; the last group is the tail."""
    arguments = job(mode, rows=rows, stripes=16, head_dim=128, group_tokens=PAPER.group_tokens,
                    per_codeword=PAPER.tokens_per_codeword, unit_bits=2, element=element, seed=seed, features=0)
    if mode.featured:
        arguments["features"] = 16
    if data == "fa3":
        rng = np.random.default_rng(seed)
        for name, count in (("query", rows), ("key", 4096), ("value", 4096)):
            arguments[name] = oracle.fa3((count, 128), rng, element)
        arguments["sketch"] = sketch_of(mode, arguments["key"], 8, 256, element)
        if mode.blended:
            arguments["mean"] = fp32(from_bits(arguments["value"], element).astype(np.float64).mean(axis=0))
    return arguments | {"local_tokens": 16, "sinks": 16 * (seed % 2), "end_token": 4096 - 5}


@ELEMENTS
@pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CENTROID])
@pytest.mark.parametrize("data", ["normal", "fa3"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_error_against_float64(mode: Mode, element: Element, data: str, rows: int, seed: int) -> None:
    arguments = paper_job(mode, rows, element, seed, data)
    trace, want = attend(arguments), exact(arguments)
    first, units = trace.first, len(want.selected)
    assert first.features.tolist() == want.features.tolist()
    # The same selection, but for units whose masses differ by less than the masses' own error.
    mass = first.mass[:units] / 2.0**formats.MASS_FRACTION
    assert np.abs(mass - want.mass).max() < 5e-7
    other = first.selected[:units] != want.selected
    if other.any():
        least = want.mass[want.selected & ~want.forced].min()
        assert np.abs(want.mass[other] - least).max() < 1e-6
        pytest.skip("a tie within the error of the masses")
    assert first.selected[:units].tolist() == want.selected.tolist()
    assert np.abs(first.alpha / 2.0**formats.ALPHA_FRACTION - want.alpha).max() < 5e-7
    assert oracle.relative_rms(trace.exact.partial.output, want.exact) < BOUND
    assert oracle.relative_rms(trace.output.view(np.float32), want.output) < BOUND


SCORE_ERROR = 4 * 2.0**-formats.CODES_FRACTION
"""Bound of a feature's error in a score of CODES: base and three steps, each truncated; relative to 2**(the scale's
exponent)."""


def entry_error(head_dim: int) -> float:
    """The largest error of a score in nats: every truncation in the same direction."""
    scale = fp32_bits(LOG2E / head_dim**0.5)
    return head_dim * SCORE_ERROR * dense.split_scale(scale)[0] / (1 << 23) / LOG2E


@ELEMENTS
@pytest.mark.parametrize("data", ["normal", "fa3"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_codes_against_float64(element: Element, data: str, rows: int, seed: int) -> None:
    """Scores and alpha within what the truncation of entries explains; given the selection, as the other modes."""
    arguments = paper_job(Mode.CODES, rows, element, seed, data)
    trace, want = attend(arguments), exact(arguments)
    first = trace.first
    q, k, v, tail = floats(arguments)
    end, scale = len(k), q.shape[1] ** -0.5
    exactly = tail | (np.arange(end) < arguments["sinks"])
    estimate = codes.decode(arguments["sketch"], geometry(128, 256, element))[:end]
    scores = q @ np.where(exactly[:, None], k, estimate).T * scale
    error = np.abs(first.scores[:, :end] * (2.0**-SCORE_FRACTION / LOG2E) - scores)
    assert error[:, exactly].max() < 1e-5
    assert error.max() < entry_error(128)
    assert np.sqrt(np.square(error[:, ~exactly]).mean()) < 0.03
    # Most of the selection is the same, and alpha of the same selection is nearly so.
    taken = first.taken[:end]
    assert (first.selected[:end] & want.selected).sum() > 0.97 * want.selected.sum()
    share = (want.probability * taken).sum(axis=1)
    assert np.abs(first.alpha / 2.0**formats.ALPHA_FRACTION - share).max() < 0.01
    attention = oracle.attention(q, k, v, scale, np.broadcast_to(taken, (rows, end)))
    assert oracle.relative_rms(trace.exact.partial.output, attention) < BOUND
    alpha = first.alpha[:, None] / 2.0**formats.ALPHA_FRACTION
    blend = alpha * attention + (1 - alpha) * arguments["mean"].view(np.float32)
    assert oracle.relative_rms(trace.output.view(np.float32), blend) < BOUND


@pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CENTROID])
def test_error_on_real_model_data(mode: Mode) -> None:
    """All heads of the MiniLM data, four query rows each, an eighth of the tokens."""
    got, want, ties = [], [], 0
    for query, key, value in accuracy.minilm_heads():
        arguments = job(mode, rows=4, tail=np.zeros(4, np.bool_), local_tokens=8)
        arguments |= {"query": query[300:304], "key": key, "value": value}
        arguments["sketch"] = sketch_of(mode, key, 8, 128, Element.FP16)
        if mode.blended:
            arguments |= {"features": 8, "mean": fp32(from_bits(value, Element.FP16).astype(np.float64).mean(axis=0))}
        trace, oracles = attend(arguments), exact(arguments)
        if trace.first.selected.tolist() != oracles.selected.tolist():
            ties += 1
            continue
        got.append(trace.output.view(np.float32))
        want.append(oracles.output)
    assert ties <= 2
    assert oracle.relative_rms(np.array(got), np.array(want)) < BOUND


@pytest.mark.parametrize("seed", range(20))
def test_sparf_is_sparq(seed: int) -> None:
    """Bar sparse.sparq_equal: SPARF without a tail is Algorithm 1 of the SparQ paper, for one query and for a group."""
    rng = np.random.default_rng(seed)
    rows, d, tokens = (1, 4, 8)[seed % 3], (32, 64, 128)[seed % 3], int(rng.integers(200, 900))
    q, k, v = (rng.standard_normal((n, d)) * scale for n, scale in ((rows, 3.0), (tokens, 1.0), (tokens, 1.0)))
    r, units, local = d // 8, tokens // 16, seed % 2 * 8
    mean = v.mean(axis=0)
    want = oracle.sparq(q, k, v, mean, r=r, k=units, local_tokens=local)
    got = oracle.sparf(q, k, v, d**-0.5, features=r, top_units=units, local_tokens=local, mean=mean)
    assert got.selected.sum() == units and 0 < got.alpha.min() <= got.alpha.max() < 1
    np.testing.assert_allclose(got.output, want, rtol=0, atol=1e-12)
    assert np.abs(got.output - oracle.attention(q, k, v, d**-0.5)).max() > 1e-3


def test_oracle_with_all_channels_and_tokens_is_attention() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, 16)) for n in (2, 50, 50))
    want = oracle.attention(q, k, v, 0.25)
    for got in (
        oracle.sparq(q, k, v, np.ones(16), r=16, k=50),
        oracle.sparf(q, k, v, 0.25, features=3, top_units=50, mean=np.ones(16)).output,
        oracle.fetched(q, k, v, 0.25, features=3, top_units=13, unit_tokens=4, mean=np.ones(16)).output,
        oracle.centroid(q, k, v, 0.25, centroids=rng.standard_normal((13, 16)), top_units=13, unit_tokens=4).output,
        oracle.sparf(q, k, v, 0.25, features=3, top_units=1, mean=np.ones(16), tail=np.ones(50, np.bool_)).output,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


# Errors, and what the trace promises.


@pytest.mark.parametrize(("mode", "change", "message"), [
    (Mode.SPARF, {"mode": Mode.DENSE}, "mode must not be DENSE"),
    (Mode.SPARF, {"query": np.zeros((1, 32))}, "query must be a uint16 array"),
    (Mode.SPARF, {"key": np.zeros((512, 16), np.uint16)}, "key must be"),
    (Mode.SPARF, {"key": np.zeros((500, 32), np.uint16)}, "whole stripes of 128 tokens"),
    (Mode.SPARF, {"tail": np.zeros(3, np.bool_)}, "tail one bool for each"),
    (Mode.SPARF, {"tail": np.zeros(4, int)}, "tail one bool for each"),
    (Mode.SPARF, {"value": np.zeros((511, 32), np.uint16)}, "value must be"),
    (Mode.SPARF, {"features": 0}, "features must be 1 to 32 in this mode, not 0"),
    (Mode.SPARF, {"features": 33}, "features must be 1 to 32 in this mode, not 33"),
    (Mode.CENTROID, {"features": 1}, "features must be 0 in this mode, not 1"),
    (Mode.SPARF, {"top_units": 0}, "top_units must be at least 1, not 0"),
    (Mode.SPARF, {"unit_bits": 1}, "unit_bits must be 0 in SPARF, not 1"),
    (Mode.FETCHED, {"unit_bits": 6}, "unit_bits must be such that units fill a stripe, not 6"),
    (Mode.FETCHED, {"unit_bits": -1}, "unit_bits must be such that"),
    (Mode.SPARF, {"mean": None}, r"mean must be a uint32 array of shape \(32,\)"),
    (Mode.FETCHED, {"mean": np.zeros(31, np.uint32)}, "mean must be"),
    (Mode.FETCHED, {"mean": np.zeros(32, np.float32)}, "mean must be"),
    (Mode.CENTROID, {"mean": np.zeros(32, np.uint32)}, "CENTROID takes no mean"),
    (Mode.CENTROID, {"sketch": None}, r"sketch must be a uint16 array of shape \(64, 32\)"),
    (Mode.CENTROID, {"sketch": np.zeros((63, 32), np.uint16)}, "sketch must be"),
    (Mode.SPARF, {"sketch": np.zeros((64, 32), np.uint16)}, r"sketch must be a uint16 array of shape \(512, 32\)"),
    (Mode.CODES, {"features": 1}, "features must be 0 in this mode, not 1"),
    (Mode.CODES, {"unit_bits": 1}, "unit_bits must be 0 in CODES, not 1"),
    (Mode.CODES, {"sinks": 65}, "sinks must be at most half a stripe, 64, in CODES, not 65"),
    (Mode.CODES, {"sketch": None}, "sketch must be KeyCodes of 4 stripes of 32 features"),
    (Mode.CODES, {"sketch": np.zeros((512, 32), np.uint16)}, "sketch must be KeyCodes"),
    (Mode.SPARF, {"scale_bits": 0}, "positive normal fp32"),
    (Mode.SPARF, {"end_token": 513}, "end_token must be at most"),
    (Mode.SPARF, {"start": np.zeros(2, int)}, "start must be 1 integers"),
])
def test_wrong_arguments(mode: Mode, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        attend(job(mode) | change)


@MODES
def test_trace_shapes_and_inputs_untouched(mode: Mode) -> None:
    arguments = job(mode, rows=2)
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    trace = attend(arguments)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], name)
    units = 512 if mode.by_token else 64
    scored = 64 if mode is Mode.CENTROID else 512
    shapes = {
        "tail": (4,), "features": (arguments["features"],), "taken": (512,),
        **dict.fromkeys(("mass", "rank", "valid", "selected"), (units,)),
        **dict.fromkeys(("score_sums", "clipped", "saturated", "attended", "scores", "probability"), (2, scored)),
        **dict.fromkeys(("scale_significand", "scale_exponent", "maximum", "denominator", "reference", "alpha"), (2,)),
    }
    found = {f.name: array.shape for f in dataclasses.fields(trace.first)
             if isinstance(array := getattr(trace.first, f.name), np.ndarray)}
    assert found == shapes
    for field in dataclasses.fields(trace.exact):
        if isinstance(array := getattr(trace.exact, field.name), np.ndarray):
            assert array.shape in {(2,), (2, 512), (2, 32)}, field.name
    assert trace.output.shape == (2, 32) and trace.output.dtype == np.uint32
    assert trace.first.scale_significand.dtype == np.int64


def test_widths_hang_together() -> None:
    """A rank fits int64 with its digits padded, the masses of 16 rows fit, and so does the largest fp16 of q."""
    bits = formats.MASS_BITS + TOKEN_BITS
    assert bits + -bits % formats.DIGIT_BITS < 64
    assert first_pass.ranks(np.array([FORCED]), base_token=0, unit_tokens=1, local_token=9, sinks=0)[0] == (1 << 60) - 1
    assert 1 << formats.MASS_FRACTION < FORCED >> 5
    assert formats.MAGNITUDE_BITS - formats.MAGNITUDE_FRACTION == 16    # above fp16's largest, 65,504
    assert formats.LOG_BITS * 2 <= 64
