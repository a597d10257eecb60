"""The number formats: what the tables promise, and that every width holds what goes into it."""

from pathlib import Path

import numpy as np
import pytest

from kvattic.golden import dense
from kvattic.spec import formats
from kvattic.spec.formats import (
    EXP_C0_BITS,
    EXP_C1_BITS,
    EXP_C2_BITS,
    EXP_FRACTION,
    EXP_SEGMENTS,
    EXP_STEP_BITS,
    PRODUCT_BITS,
    QUERY_SHIFT,
    SCALE_BITS,
    SCALE_CHUNK_BITS,
    SCALED_SUM_BITS,
    SCORE_BITS,
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_MIN,
    SCORE_ROUND_SHIFT,
    SCORE_SUM_BITS,
    SCORE_WINDOW_BITS,
    SIGNIFICAND_BITS,
    VALUE_FRACTION,
    WEIGHT_ALIGNMENT,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
    WEIGHT_ROUND_SHIFT,
    Element,
    exp_table,
)

ONE = 1 << (WEIGHT_BITS - 1)


@pytest.fixture(scope="module")
def octave() -> tuple[dense.Integers, dense.Integers]:
    """(score, significand) for every score in [-1, 0): all fractions that there are."""
    score = np.arange(-(1 << SCORE_FRACTION), 0, dtype=np.int64)
    significand, exponent = dense.weights(score[None], np.array([0]))
    assert (exponent == 1).all()
    return score, significand[0]


# The exponential.


def test_table_widths() -> None:
    table = np.array(exp_table())
    assert table.shape == (EXP_SEGMENTS, 3)
    assert table.min() > 0
    for column, bits in enumerate((EXP_C0_BITS, EXP_C1_BITS, EXP_C2_BITS)):
        assert int(table[:, column].max()).bit_length() <= bits
    assert EXP_SEGMENTS << EXP_STEP_BITS == 1 << SCORE_FRACTION


def test_table_is_what_it_was() -> None:
    """The table's bits are results' bits: a change is a breaking change."""
    table = exp_table()
    assert table[0] == (1 << EXP_FRACTION, 726809, 3957)
    assert table[63] == (132771937, 1437961, 7829)
    assert sum(sum(row) for row in table) == 6229942974


def test_weights_are_within_six_tenths_of_a_step(
    octave: tuple[dense.Integers, dense.Integers],
) -> None:
    """Every fraction: the polynomial adds a tenth of a step to the half of correct rounding."""
    score, significand = octave
    # float64's own 2**x is good to 1e-16, a billionth of a step.
    exact = np.exp2(score / (1 << SCORE_FRACTION)) * 2.0**WEIGHT_BITS
    error = significand - exact
    assert np.abs(error).max() < 0.6
    # Hardly any bias, so that errors of many tokens do not add up.
    assert abs(error.mean()) < 0.01
    relative = significand / exact - 1
    assert np.abs(relative).max() < 2.8e-7
    assert np.sqrt(np.square(relative).mean()) < 1.05e-7


def test_weights_are_monotone(octave: tuple[dense.Integers, dense.Integers]) -> None:
    """No higher score has a lower weight, over every fraction and across the octave."""
    _, significand = octave
    assert (np.diff(significand) >= 0).all()
    assert significand[0] == ONE
    # The end of an octave is below the next one's beginning (2 * ONE of this octave).
    assert significand[-1] == 2 * ONE - 1


def test_powers_of_two_are_exact() -> None:
    """2**0 is 1 and 2**-n is 2**-n, down to 2**-63; below is zero."""
    last = (1 << WEIGHT_EXPONENT_BITS) - 1
    score = -np.arange(last + 3) << SCORE_FRACTION
    significand, exponent = dense.weights(score[None], np.array([0]))
    assert significand[0].tolist() == [ONE] * (last + 1) + [0, 0]
    assert exponent[0].tolist() == [*range(last + 1), 0, 0]


def test_least_weight() -> None:
    """The last score before zero still has a weight, of exponent 63; one step lower has none."""
    edge = -(63 << SCORE_FRACTION)
    significand, exponent = dense.weights(
        np.array([[edge, edge - 1, SCORE_MIN, SCORE_MASKED]]), np.array([0])
    )
    assert significand.tolist() == [[ONE, 0, 0, 0]]
    assert exponent.tolist() == [[63, 0, 0, 0]]


def test_masked_is_zero_even_below_a_saturated_score() -> None:
    """A masked token one step below a score that saturates at the bottom still has no weight."""
    significand, _ = dense.weights(np.array([[SCORE_MIN, SCORE_MASKED]]), np.array([SCORE_MIN]))
    assert significand.tolist() == [[ONE, 0]]


# Widths.


@pytest.mark.parametrize("element", Element)
def test_score_widths(element: Element) -> None:
    assert SCORE_MASKED == -(1 << (SCORE_BITS - 1)) == SCORE_MIN - 1
    assert SCORE_MAX == 1 - SCORE_MASKED - 2
    top = ((1 << PRODUCT_BITS) - 1) << element.encoding.product_shift
    assert top < 1 << element.encoding.value_window_bits
    assert top >> element.encoding.score_shift_min < 1 << SCORE_WINDOW_BITS
    assert 256 * ((1 << SCORE_WINDOW_BITS) - 1) < 1 << (SCORE_SUM_BITS - 1)
    # Three chunks take the whole of a sum that can be a score.
    assert 3 * SCALE_CHUNK_BITS >= SCALED_SUM_BITS
    # Every step of the rounding fits int64, the golden model's integer.
    assert SCALED_SUM_BITS - 2 * SCALE_CHUNK_BITS + SCALE_BITS + SCALE_CHUNK_BITS < 63


def test_sums_are_cut_only_beyond_the_scores() -> None:
    """A sum that does not fit saturates like the longest that does, whatever the scale's significand."""
    most = 1 << (SCALED_SUM_BITS - 1)
    sums = np.array([most - 1, most, most << 7, -most, -most - 1, -most << 7])
    for significand in (1 << (SCALE_BITS - 1), (1 << SCALE_BITS) - 1):
        scores, overflow = dense.scale_scores(sums, significand)
        assert scores.tolist() == [SCORE_MAX] * 3 + [SCORE_MIN] * 3
        assert overflow.all()


def test_shifts_of_the_formats() -> None:
    assert [element.encoding.product_shift for element in (Element.FP16, Element.BF16)] == [24, 28]
    assert QUERY_SHIFT == 11
    assert [element.encoding.score_shift_min for element in (Element.FP16, Element.BF16)] == [11, 15]
    assert SCORE_ROUND_SHIFT == 29
    assert WEIGHT_ROUND_SHIFT == 5
    assert WEIGHT_ALIGNMENT == 19
    assert [element.encoding.score_shift for element in (Element.FP16, Element.BF16)] == [35, 39]
    assert [element.encoding.score_offset for element in (Element.FP16, Element.BF16)] == [-149, -373]
    assert [element.encoding.value_shift for element in (Element.FP16, Element.BF16)] == [30, 146]
    assert all(element.encoding.value_window_bits <= dense.SHIFT_MAX for element in Element)
    assert PRODUCT_BITS == WEIGHT_BITS + SIGNIFICAND_BITS == 33


def test_value_products_of_fp16_never_clip() -> None:
    """No weight and fp16 value needs a left shift, so that fp16 never raises VALUE_OVERFLOW."""
    form = Element.FP16.encoding
    assert form.value_shift - form.exponent_max >= 0


def test_fp16_least_bits_of_values_are_kept() -> None:
    """A value of the least fp16 with weight 1 is a whole number of window steps: 2**16 of them."""
    high, low, overflow = dense.value_sums(
        np.array([[ONE]]), np.array([[0]]), np.array([[1]], np.uint16), element=Element.FP16
    )
    assert (high[0, 0], low[0, 0], overflow) == (0, 1 << (VALUE_FRACTION - 24), False)


@pytest.mark.parametrize(
    ("element", "offset", "exponent_max"), [(Element.FP16, 25, 30), (Element.BF16, 137, 254)]
)
def test_element_formats(element: Element, offset: int, exponent_max: int) -> None:
    form = element.encoding
    assert form.offset == offset
    assert form.exponent_max == exponent_max
    assert 1 + form.exponent_bits + form.fraction_bits == 16
    assert form.fraction_bits < SIGNIFICAND_BITS
    assert form.name == element.value


def test_every_constant_is_documented() -> None:
    """Each public constant stands in docs/numerics.md: the page cannot fall behind in silence."""
    page = (Path(__file__).parents[3] / "docs" / "numerics.md").read_text()
    constants = [name for name in dir(formats) if name.isupper() and not name.startswith("_")]
    missing = [name for name in constants if f"`{name}`" not in page]
    assert not missing
