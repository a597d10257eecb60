"""Dense jobs of one shape that are computed in one pass: what a kernel gets, and its results.

The results are those of `kvattic.golden.dense`, bit for bit.  A job of which the kernel cannot say that, or that ends
with anything but OK without flags, is left out (`DenseResults.clean`), and `dense.attend` computes it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.spec.config import Config
from kvattic.spec.elements import Bits, Booleans, Integers

__all__ = ["DenseJobs", "DenseResults"]


class DenseJobs(NamedTuple):
    """Jobs of one shape; all arrays are C-contiguous.

    Members:
        config: geometry and storage format.
        keys: int64, (jobs, pages), addresses in this process of the pages of K, in the token layout.
        values: int64, (jobs, pages), likewise of V.
        query: uint16, (jobs, rows, head_dim), bit patterns.
        start: int64, (jobs, rows), first token that each row attends.
        end: int64, (jobs, rows), one past the last.
        tree: int64, (jobs, rows), bit i: the row attends token tree_token + i.
        tokens: of each job, from base_token on; they fill all pages but the last.
        base_token: number of the first token.
        tree_token: first token of the draft tree.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
    """

    config: Config
    keys: Integers
    values: Integers
    query: Bits
    start: Integers
    end: Integers
    tree: Integers
    tokens: int
    base_token: int
    tree_token: int
    scale_bits: int


class DenseResults(NamedTuple):
    """What came of jobs.

    Members:
        output: uint32, (jobs, rows, head_dim), fp32 bit patterns.
        maximum: int64, (jobs, rows).
        denominator: int64, (jobs, rows).
        clean: bool, (jobs,); where it is False, the other arrays mean nothing.
    """

    output: NDArray[np.uint32]
    maximum: Integers
    denominator: Integers
    clean: Booleans

    def of(self, chosen: Booleans) -> "DenseResults":
        """Those of some of the jobs."""
        return DenseResults(self.output[chosen], self.maximum[chosen], self.denominator[chosen], self.clean[chosen])
