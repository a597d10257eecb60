"""Joins attention over ranges of tokens, on the host and in float64: no part of the bit-exact model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.spec.formats import SCORE_FRACTION

__all__ = ["Partial", "merge"]


class Partial(NamedTuple):
    """Attention over one range of tokens, as `merge` takes and gives it.

    Members:
        output: float64, (rows, head_dim).
        maximum: int64, (rows,), largest score; SCORE_MASKED where the row attends nothing.
        denominator: float64, (rows,), sum of the weights in units of 2**-VALUE_FRACTION.
    """

    output: NDArray[np.float64]
    maximum: NDArray[np.int64]
    denominator: NDArray[np.float64]


def merge(partials: Sequence[Partial]) -> Partial:
    """Join attention over disjoint token ranges, as flash-decoding joins (out, lse).

    The formula is exact, so the result is the attention over all ranges, up to the rounding of the partial outputs.

    Args:
        partials: at least one, all of the same shapes.

    Raises:
        RequestError: the list is empty.
    """
    if not partials:
        raise RequestError("merge needs at least one partial result")
    maximum = np.max([part.maximum for part in partials], axis=0)
    output = np.zeros(partials[0].output.shape)
    denominator = np.zeros(maximum.shape)
    for part in partials:
        # An empty range has denominator 0, whatever its maximum.
        share = part.denominator * np.exp2((part.maximum - maximum) / (1 << SCORE_FRACTION))
        denominator += share
        output += share[:, None] * part.output
    # A row that attends nothing anywhere is zero.
    output /= np.where(denominator > 0, denominator, 1)[:, None]
    return Partial(output, maximum, denominator)
