"""Golden model of the sparse modes: SPARF, FETCHED, CENTROID and CODES, bit for bit as the hardware computes them.

Integers only; docs/sparse.md says what is computed and docs/numerics.md, section 7, why.  `attend_sparse` runs a whole
job.  Its halves are for a device that reads codewords only once it knows which: `kvattic.golden.first_pass` scores and
selects, `second_pass` attends the selection, with the steps of `kvattic.golden.dense`, and blends (`blend`).

Shapes are named as in `kvattic.golden.first_pass`.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.golden import dense
from kvattic.golden.first_pass import (
    ALPHA_ONE,
    FirstPass,
    Layout,
    attended_by,
    check_job,
    first_pass,
    first_special_token,
    lowest,
)
from kvattic.spec.codes import KeyCodes
from kvattic.spec.commands import FP32_SPECIAL, CompletionFlag, Mode
from kvattic.spec.elements import Bits, Booleans, Integers
from kvattic.spec.formats import ALPHA_FRACTION, FP32_BIAS, SCALE_BITS, SCORE_MASKED, Element

__all__ = ["SparseTrace", "attend_sparse", "blend", "second_pass"]


def blend(alpha: int, quotient_bits: int, mean_bits: int) -> int:
    """The sum alpha * quotient + (1 - alpha) * mean, exactly, rounded once to fp32, ties to even.

    Args:
        alpha: 0 to ALPHA_ONE.
        quotient_bits: fp32 bit pattern, finite; subnormals count as zero.
        mean_bits: likewise.

    Returns:
        fp32 bit pattern: a normal number, or +0 where the rounded sum is below the least of them, 2**-126.
    """
    (a, x), (b, y) = _fp32(quotient_bits), _fp32(mean_bits)
    least = min(x, y)
    total = (alpha * a << (x - least)) + ((ALPHA_ONE - alpha) * b << (y - least))
    sign, size = (1 << 31, -total) if total < 0 else (0, total)
    drop = size.bit_length() - SCALE_BITS
    if drop > 0:
        kept, dropped, half = size >> drop, size & ((1 << drop) - 1), 1 << (drop - 1)
        kept += dropped > half or (dropped == half and kept & 1)
    else:
        kept = size << -drop
    # fp32 of kept * 2**(least + drop - ALPHA_FRACTION); the leading one of `kept` adds one to the exponent field.
    field = least + drop - ALPHA_FRACTION + (SCALE_BITS - 1) + FP32_BIAS
    result = ((field - 1) << (SCALE_BITS - 1)) + kept
    return sign | result if size and result >= 1 << (SCALE_BITS - 1) else 0


def _fp32(bits: int) -> tuple[int, int]:
    """(significand, power): the number is significand * 2**power; subnormals, infinity and NaN are zero."""
    hidden = 1 << (SCALE_BITS - 1)
    field = bits >> (SCALE_BITS - 1) & 0xFF
    significand = hidden | (bits & (hidden - 1)) if 0 < field < 0xFF else 0
    return -significand if bits >> 31 else significand, max(field, 1) - FP32_BIAS - (SCALE_BITS - 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseTrace:
    """Everything that a sparse job computes.

    Attributes:
        first: first pass and selection.
        exact: second pass over all tokens of the job: attended is the row's mask and the selection.  Of tokens that are
            not read score_sums is 0, and score_overflow False.  output is that before the blend, and flags, nan_key and
            nan_value are of this pass alone.
        output: uint32, (rows, head_dim), fp32 bit patterns.
        nan_query: row * 65536 + feature of the first NaN or infinity in q, or None.
        nan_mean: feature of the first NaN or infinity in the mean of V, or None.
        nan_key: the lowest token with a NaN or infinity in what was read of K, in either pass, or None.
        nan_value: the lowest token with a NaN or infinity in what was read of V, or None.
        flags: of both passes.
    """

    first: FirstPass
    exact: dense.Trace
    output: NDArray[np.uint32]
    nan_query: int | None
    nan_mean: int | None
    nan_key: int | None
    nan_value: int | None
    flags: CompletionFlag

    @property
    def maximum(self) -> Integers:
        """int64, (rows,), largest score of the second pass."""
        return self.exact.maximum

    @property
    def denominator(self) -> Integers:
        """int64, (rows,), sum of the weights of the second pass."""
        return self.exact.denominator


def second_pass(
    first: FirstPass,
    query: Bits,
    key: Bits,
    value: Bits,
    *,
    mean: NDArray[np.uint32] | None,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
) -> SparseTrace:
    """Second pass of a sparse job: exact attention over the selection, and the blend.

    Args:
        first: from `first_pass`.
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim); only tokens of `first.codewords` are looked at.
        value: uint16, (tokens, head_dim); likewise.
        mean: uint32, (head_dim,), fp32 bit patterns of the mean of V; CENTROID: None.
        element: storage format.
        scale_bits: as in `first_pass`, and so are the others.
        start: integers, (rows,).
        end: integers, (rows,).
        tree: integers, (rows,).
        tree_token: first token of the draft tree.

    Raises:
        RequestError: a type or shape is wrong.
    """
    base_token, end_token = first.base_token, first.end_token
    masks, _ = check_job(
        query, key, first.tail, layout=first.layout, scale_bits=scale_bits, start=start, end=end, tree=tree,
        tree_token=tree_token, base_token=base_token, end_token=end_token)
    _check_value(value, mean, key, first.layout.mode)
    mask = attended_by(masks, base_token=base_token, end_token=end_token, tokens=len(key)) & first.taken
    exact = _attend_selection(first, query, key, value, mask, element, scale_bits)
    return SparseTrace(
        first=first, exact=exact, output=exact.output if mean is None else _blend_rows(exact.output, first.alpha, mean),
        nan_query=exact.nan_query, nan_mean=None if mean is None else _first_special_mean(mean),
        nan_key=lowest(first.nan_key, exact.nan_key), nan_value=exact.nan_value,
        flags=exact.flags | (CompletionFlag.SCORE_OVERFLOW if first.score_overflow else CompletionFlag(0)))


def _check_value(value: Any, mean: Any, key: Bits, mode: Mode) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint16 or value.shape != key.shape:
        raise RequestError(f"value must be a uint16 array of shape {key.shape}")
    if mode is Mode.CENTROID:
        if mean is not None:
            raise RequestError("CENTROID takes no mean")
    elif not isinstance(mean, np.ndarray) or mean.dtype != np.uint32 or mean.shape != (key.shape[1],):
        raise RequestError(f"mean must be a uint32 array of shape {(key.shape[1],)}")


def _attend_selection(first: FirstPass, query: Bits, key: Bits, value: Bits, mask: Booleans, element: Element,
                      scale_bits: int) -> dense.Trace:
    """Attend what was read, and spread the intermediates over all tokens of the job."""
    read = first.read
    key, value, numbers = key[read], value[read], first.base_token + np.flatnonzero(read)
    seen = dense.attend_masked(query, key, value, mask[:, read], element=element, scale_bits=scale_bits)

    def everywhere(values: NDArray[Any], rest: int = 0) -> NDArray[Any]:
        whole = np.full(mask.shape, rest, values.dtype)
        whole[:, read] = values
        return whole

    return replace(
        seen, attended=mask, score_sums=everywhere(seen.score_sums), score_overflow=everywhere(seen.score_overflow),
        scores=everywhere(seen.scores, SCORE_MASKED), weight_significand=everywhere(seen.weight_significand),
        weight_exponent=everywhere(seen.weight_exponent),
        nan_key=first_special_token(key, numbers, element, first.end_token),
        nan_value=first_special_token(value, numbers, element, first.end_token))


def _blend_rows(output: NDArray[np.uint32], alpha: Integers, mean: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Each row of the output blended with the mean; an alpha of 1 leaves the row as it is."""
    blended = output.copy()
    for r, share in enumerate(alpha.tolist()):
        if share != ALPHA_ONE:
            blended[r] = [blend(share, *pair) for pair in zip(output[r].tolist(), mean.tolist(), strict=True)]
    return blended


def _first_special_mean(mean: NDArray[np.uint32]) -> int | None:
    """The first feature with a NaN or infinity."""
    bad = (mean & np.uint32(FP32_SPECIAL)) == FP32_SPECIAL
    return int(bad.argmax()) if bad.any() else None


def attend_sparse(
    query: Bits,
    key: Bits,
    value: Bits,
    *,
    mode: Mode,
    group_tokens: int,
    tokens_per_codeword: int,
    features: int = 0,
    top_units: int,
    local_tokens: int = 0,
    sinks: int = 0,
    unit_bits: int = 0,
    mean: NDArray[np.uint32] | None = None,
    sketch: Bits | KeyCodes | None = None,
    tail: Booleans,
    element: Element,
    scale_bits: int,
    start: NDArray[Any],
    end: NDArray[Any],
    tree: NDArray[Any],
    tree_token: int,
    base_token: int,
    end_token: int,
) -> SparseTrace:
    """Attention of one sparse job, bit for bit as the engine computes it.

    Args:
        query: uint16, (rows, head_dim).
        key: uint16, (tokens, head_dim), whole stripes from base_token on.
        value: uint16, (tokens, head_dim).
        mode: not DENSE.
        group_tokens: tokens of a stripe (`Config.group_tokens`).
        tokens_per_codeword: `Config.tokens_per_codeword`.
        features: SPARF, FETCHED: how many the first pass reads.
        top_units: units to select; those of the tail come on top.
        local_tokens: newest tokens whose units come first.
        sinks: first tokens of the sequence whose units come first, too; in CODES they are scored exactly.
        unit_bits: FETCHED, CENTROID: log2 of a unit's codewords.
        mean: uint32, (head_dim,), fp32 bit patterns of the mean of V; CENTROID: None.
        sketch: CENTROID: uint16, (units, head_dim), mean keys of all units; CODES: the codes of all stripes (anything
            for those of the tail); in the other modes what the feature layout has, if that is not `key`.
        tail: bool, (stripes,), stripes that are attended whole: those in device DRAM, and those that a command says.
        element: storage format.
        scale_bits: fp32 bit pattern of softmax scale * log2(e): positive and normal.
        start: integers, (rows,), first token that each row attends.
        end: integers, (rows,), one past the last.
        tree: integers, (rows,), bit i: the row attends token tree_token + i.
        tree_token: first token of the draft tree; end_token where there is none.
        base_token: number of the first token given.
        end_token: one past the last valid token.

    Raises:
        RequestError: a type or shape is wrong, or a number is out of range.
    """
    layout = Layout(
        group_tokens=group_tokens, tokens_per_codeword=tokens_per_codeword, mode=Mode(mode), unit_bits=unit_bits)
    job: dict[str, Any] = {
        "element": element, "scale_bits": scale_bits, "start": start, "end": end, "tree": tree,
        "tree_token": tree_token}
    first = first_pass(
        query, key, sketch=sketch, layout=layout, base_token=base_token, end_token=end_token, tail=tail,
        features=features, top_units=top_units, local_tokens=local_tokens, sinks=sinks, **job)
    return second_pass(first, query, key, value, mean=mean, **job)
