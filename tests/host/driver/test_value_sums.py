"""Running sums of V: exact, whatever the pieces, and right for every range."""

import numpy as np
import pytest

from kvattic.driver.value_sums import ValueSums
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element

STRIPE, TOKENS = 16, 75


def make(element: Element = Element.FP16, window: int = 0) -> tuple[ValueSums, np.ndarray, np.ndarray]:
    """Sums of two heads, V as bits and V as numbers."""
    values = to_bits(np.random.default_rng(1).standard_normal((2, TOKENS, 4)) * 100, element)
    return ValueSums(2, 4, STRIPE, element, window), values, from_bits(values, element).astype(np.float64)


def running(exact: np.ndarray, token: int) -> np.ndarray:
    """The sum before a token, added up one token after the other."""
    total = np.zeros((2, 4))
    for each in range(token):
        total = total + exact[:, each]
    return total


def refuse(first: int, last: int) -> np.ndarray:
    raise AssertionError(f"V of {first} to {last} should be kept")


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("pieces", [[75], [1] * 75, [10, 30, 35], [16, 16, 16, 16, 11], [33, 1, 41]])
def test_sums_do_not_depend_on_the_pieces(element: Element, pieces: list[int]) -> None:
    sums, values, exact = make(element)
    at, asked = 0, []
    for piece in pieces:
        sums.expect(piece)
        sums.add(values[:, at : at + piece])
        at += piece

    def read(first: int, last: int) -> np.ndarray:
        asked.append((first, last))
        return exact[:, first:last]

    assert sums.length == TOKENS
    for token in range(TOKENS + 1):
        np.testing.assert_array_equal(sums.until(token, read), running(exact, token))
    # What the newest append brought is kept, and is not asked for.
    assert all(last <= TOKENS - pieces[-1] for _, last in asked)
    assert bool(asked) == (len(pieces) > 1)


def test_a_window_of_tokens_is_kept() -> None:
    sums, values, exact = make(window=30)
    for token in range(TOKENS):
        sums.expect(1)
        sums.add(values[:, token : token + 1])
    for token in range(TOKENS - 30 + STRIPE, TOKENS + 1):
        np.testing.assert_array_equal(sums.until(token, refuse), running(exact, token))
    np.testing.assert_array_equal(sums.values(TOKENS - 30, TOKENS, refuse), exact[:, -30:])


@pytest.mark.parametrize("length", [0, 5, 16, 31, 32, 74, 75])
def test_truncate_forgets_the_last_tokens(length: int) -> None:
    sums, values, exact = make()
    sums.expect(TOKENS)
    sums.add(values)
    first = length // STRIPE * STRIPE
    sums.truncate(length, values[:, first : first + STRIPE])
    np.testing.assert_array_equal(sums.total, running(exact, length))
    # Other tokens in their place.
    sums.expect(TOKENS - length)
    if length < TOKENS:
        sums.add(values[:, length:] ^ 0x8000)
    exact[:, length:] *= -1
    for token in range(TOKENS + 1):
        np.testing.assert_array_equal(sums.until(token, lambda a, b: exact[:, a:b]), running(exact, token))
