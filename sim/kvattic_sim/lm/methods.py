"""Ways of attention in the drive: which tokens a decode step attends, what comes out, what flash moves for it.

One KV head of one sequence, and the query rows that share it. Token t's step attends tokens 0 to t. Of these, whole
groups of `GROUP` tokens are in flash; the rest, the tail, waits in device DRAM, is attended exactly by every method,
and costs no flash bytes. Only `Sparq`, the published algorithm, knows no tail.

A method chooses in the same way for all rows of a group, by the sum over the rows, so that what is read serves all of
them. Ties go to the lower index. Everything is computed in the type of the query, float32 or float64. Positions are
decode steps, many at once, each on its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvattic_sim.lm.sketch import drive_codes, encode, octets, sketch_bytes

__all__ = [
    "CODEWORD_BYTES",
    "ELEMENT_BYTES",
    "GROUP",
    "Centroid",
    "Coded",
    "Dense",
    "Fetched",
    "HeavyHitters",
    "Local",
    "Method",
    "Outcome",
    "PageSparf",
    "Quest",
    "Sketched",
    "Sparf",
    "Sparq",
    "Stateless",
    "largest",
    "share_of",
]

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]

CODEWORD_BYTES = 512
ELEMENT_BYTES = 2
GROUP = CODEWORD_BYTES // ELEMENT_BYTES
"""Tokens of one feature in a codeword of the feature layout."""
PAGE_BYTES = 4096
"""The paper's page."""
PAGE_FEATURES = 4
"""The paper's m: features in a page of its feature layout, which has 2 to 8."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What some decode steps gave.

    Members:
        output: floats, (positions, rows, head_dim).
        attended: bool, (positions, tokens): what was attended, the same for all rows.
        flash_bytes: int64, (positions,), bytes moved from flash, without parity.
        element_bytes: int64, (positions,), what would move if elements of tokens could be read singly.
        alpha: floats, (positions, rows), the weight of the attended tokens against the mean of V; 1 if not blended.
    """

    output: Floats
    attended: Mask
    flash_bytes: Counts
    element_bytes: Counts
    alpha: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """What every method begins with, of some decode steps."""

    query: Floats  # (positions, rows, head_dim)
    key: Floats  # (tokens, head_dim)
    value: Floats
    valid: Mask  # (positions, tokens): 0 to the step's own
    lengths: Counts  # (positions,): tokens of each
    flash: Counts  # (positions,): tokens of them that are in flash
    stored: Mask  # (positions, tokens): those
    exact: Floats  # (positions, rows, tokens): scores, -inf where not valid

    @classmethod
    def of(cls, query: Floats, key: Floats, value: Floats, lengths: Counts, tail: bool = True) -> "_Steps":
        tokens, head_dim = len(key), query.shape[-1]
        if query.ndim != 3 or key.shape != (tokens, head_dim) or value.shape != key.shape:
            raise ValueError(
                "query must be (positions, rows, head_dim), key and value (tokens, head_dim), "
                f"not {query.shape}, {key.shape} and {value.shape}"
            )
        if lengths.shape != query.shape[:1] or not ((lengths >= 1) & (lengths <= tokens)).all():
            raise ValueError(f"lengths must be one for each position of query, from 1 to {tokens}, not {lengths!r}")
        flash = lengths // GROUP * GROUP if tail else lengths
        index = np.arange(tokens)
        valid = index < lengths[:, None]
        exact = (query.reshape(-1, head_dim) @ key.T).reshape(*query.shape[:2], tokens)
        exact *= query.dtype.type(head_dim**-0.5)
        exact = np.where(valid[:, None], exact, query.dtype.type(-np.inf))
        return cls(query, key, value, valid, lengths, flash, index < flash[:, None], exact)

    @property
    def tail(self) -> Mask:
        """(positions, tokens): those in device DRAM."""
        return self.valid & ~self.stored

    def attend(self, attended: Mask) -> Floats:
        """Exact attention of the attended tokens alone, (positions, rows, head_dim)."""
        weights = _softmax(np.where(attended[:, None], self.exact, self.exact.dtype.type(-np.inf)))
        return _mix(weights, self.value)

    def touched(self, attended: Mask, unit: int) -> Counts:
        """Units of consecutive tokens in flash that hold an attended one, (positions,)."""
        inside = _units(attended & self.stored, unit)
        result: Counts = inside.any(axis=2).sum(axis=1)
        return result

    def mean_value(self) -> Floats:
        """Mean of V over each step's tokens, (positions, 1, head_dim)."""
        kind = self.value.dtype
        sums = np.cumsum(self.value, axis=0, dtype=np.float64)[self.lengths - 1]
        return np.asarray((sums / self.lengths[:, None]).astype(kind)[:, None])

    def outcome(self, attended: Mask, first_pass: Counts | int, second_pass: Counts) -> Outcome:
        """Exact attention of the attended tokens, without a blend; bytes that both passes move."""
        alpha = np.ones(self.query.shape[:2], self.query.dtype)
        return Outcome(output=self.attend(attended), attended=attended, flash_bytes=first_pass + second_pass,
                       element_bytes=first_pass + self.token_bytes(attended), alpha=alpha)

    def token_bytes(self, attended: Mask) -> Counts:
        """Bytes of K and V of the attended tokens in flash, (positions,)."""
        return np.asarray((attended & self.stored).sum(axis=1) * (2 * ELEMENT_BYTES * self.key.shape[1]))


def _softmax(scores: Floats) -> Floats:
    """Along the last axis; a row of nothing but -inf gives zeros."""
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    return np.asarray(weights)


def _mix(weights: Floats, value: Floats) -> Floats:
    return (weights.reshape(-1, len(value)) @ value).reshape(*weights.shape[:2], value.shape[1])


def _units(x: NDArray[Any], unit: int) -> NDArray[Any]:
    """(positions, tokens) as (positions, units, unit), zeros after the last token."""
    short = -x.shape[1] % unit
    if short:
        x = np.concatenate([x, np.zeros((len(x), short), x.dtype)], axis=1)
    return x.reshape(len(x), -1, unit)


def largest(x: Floats, count: NDArray[np.integer[Any]] | int) -> Mask:
    """The `count` largest of each row; of equal ones the first.

    Args:
        x: floats, (rows, entries); -inf is never taken.
        count: how many, for all rows or for each; all that there are if there are fewer.

    Returns:
        bool, (rows, entries).
    """
    result = np.zeros(x.shape, np.bool_)
    counts = np.minimum(np.broadcast_to(np.asarray(count), len(x)), x.shape[1])
    for n in np.unique(counts):
        if n > 0:
            at = np.flatnonzero(counts == n)
            rows = x[at]
            least = -np.partition(-rows, n - 1, axis=1)[:, n - 1 : n]
            above, equal = rows > least, rows == least
            missing = n - above.sum(axis=1, keepdims=True)
            result[at] = (above | (equal & (np.cumsum(equal, axis=1) <= missing))) & (rows > -np.inf)
    return result


def share_of(share: float, of: NDArray[np.integer[Any]], least: int = 1) -> Counts:
    """A share of each number, rounded (a half to even), and at least `least` where there is anything.

    Args:
        share: from 0 to 1.
        of: integers, of any shape.
        least: smallest result for a number above zero.

    Returns:
        int64, of the same shape.
    """
    result: Counts = np.where(of > 0, np.maximum(np.rint(share * of), least), 0).astype(np.int64)
    return result


class Method(ABC):
    """A way of attention; a method with all of its parameters."""

    name: ClassVar[str]

    @abstractmethod
    def decode(self, query: Floats, key: Floats, value: Floats, first: int) -> Outcome:
        """The decode steps of tokens `first` to the last.

        Args:
            query: floats, (tokens, rows, head_dim), before the scaling by head_dim**-0.5. Those before `first` are of
                the prefill; only `HeavyHitters` looks at them.
            key: floats, (tokens, head_dim).
            value: floats, (tokens, head_dim).
            first: first token to decode, from 0; those before it were prefilled.

        Returns:
            An outcome with a position for each token from `first`.

        Raises:
            ValueError: the shapes do not fit each other, or a parameter does not fit them.
        """


class Stateless(Method):
    """A method whose decode steps do not depend on each other."""

    @abstractmethod
    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """Some decode steps.

        Args:
            query: floats, (positions, rows, head_dim), before the scaling by head_dim**-0.5.
            key: floats, (tokens, head_dim).
            value: floats, (tokens, head_dim).
            lengths: integers, (positions,): each attends that many tokens, the first ones.

        Returns:
            An outcome with a position for each query.

        Raises:
            ValueError: the shapes do not fit each other, or a parameter does not fit them.
        """

    def decode(self, query: Floats, key: Floats, value: Floats, first: int) -> Outcome:
        """See `Method`."""
        return self.attend(query[first:], key, value, np.arange(first, len(key)) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Stateless):
    """All tokens."""

    name: ClassVar[str] = "dense"

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        return steps.outcome(steps.valid, 0, steps.flash * (2 * ELEMENT_BYTES * key.shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparf(Stateless):
    """SparF, Algorithm 1 of InstInfer, which is SparQ's (arXiv 2312.04985): top-r features, top-k tokens, mean V.

    Flash moves single codewords: of the feature layout r for each group, then the codewords of K and of V that hold a
    selected token.

    Members:
        features: r.
        share: k as a share of the tokens in flash; the tail comes on top.
        local: share of k that goes to the newest tokens in any case, if they are in flash.
        sinks: the first tokens, which are selected in any case and count in k.
    """

    name: ClassVar[str] = "sparf"
    features: int
    share: float
    local: float = 0.25
    sinks: int = 0

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        mass = _approximate(steps, self.features)
        wanted = share_of(self.share, steps.flash)
        attended = steps.tail | _choose(steps, mass, wanted, share_of(self.local, wanted, 0), 1, self.sinks)
        return _blend(steps, mass, attended, *self._bytes(steps, attended))

    def _bytes(self, steps: _Steps, attended: Mask) -> tuple[Counts, Counts]:
        """Of both passes."""
        return (_feature_codewords(steps, self.features) * CODEWORD_BYTES,
                2 * CODEWORD_BYTES * steps.touched(attended, _codeword_tokens(steps.key)))


def _codeword_tokens(key: Floats) -> int:
    """Tokens in a codeword of the token layout."""
    return CODEWORD_BYTES // (ELEMENT_BYTES * int(key.shape[1]))


def _feature_codewords(steps: _Steps, features: int) -> Counts:
    return features * (steps.flash // GROUP)


def _features(query: Floats, count: int, run: int = 1) -> Mask:
    """(positions, head_dim): the features of the largest |q|, summed over the rows and over runs of features."""
    if not 1 <= count <= query.shape[2]:
        raise ValueError(f"features must be from 1 to {query.shape[2]}, not {count}")
    if run < 1 or count % run or query.shape[2] % run:
        raise ValueError(f"feature_run must divide {count} and {query.shape[2]} features, not be {run}")
    size = np.abs(query).sum(axis=1)
    return np.repeat(largest(_units(size, run).sum(axis=2), count // run), run, axis=1)


def _approximate(steps: _Steps, features: int, key: Floats | None = None, sinks: int = 0, run: int = 1) -> Floats:
    """(positions, rows, tokens): softmax of approximate scores by K, or by what stands for it.

    Scores of the tail are exact, and so are those of the first tokens that are `sinks`.
    """
    query = steps.query
    key = steps.key if key is None else key
    kept = np.where(_features(query, features, run)[:, None], query, query.dtype.type(0))
    norm, kept_norm = np.abs(query).sum(axis=2), np.abs(kept).sum(axis=2)
    # A row whose kept features are all zero scores zero whatever the scale is.
    scale = np.sqrt(query.shape[2] * np.where(kept_norm > 0, kept_norm / np.where(norm > 0, norm, 1), 1))
    scores = (kept.reshape(-1, query.shape[2]) @ key.T).reshape(steps.exact.shape)
    scores /= scale[..., None].astype(query.dtype)
    approximate = steps.stored & (np.arange(len(key)) >= sinks)
    return _softmax(np.where(approximate[:, None], scores, steps.exact))


def _choose(steps: _Steps, mass: Floats, wanted: Counts, local: Counts, unit: int, sinks: int) -> Mask:
    """(positions, tokens): the tokens in flash of the `wanted` units of the largest mass, summed over the rows.

    Units that hold one of the `local` newest tokens of all, or of the `sinks` first ones, are taken before the others.
    """
    tokens = len(steps.key)
    summed = _units(np.where(steps.stored, mass.sum(axis=1), 0), unit).sum(axis=2)
    index = np.arange(tokens)
    forced = steps.stored & ((index >= (steps.lengths - local)[:, None]) | (index < sinks))
    rank = np.where(_units(forced, unit).any(axis=2), np.inf, summed)
    rank = np.where(_units(steps.stored, unit).any(axis=2), rank, -np.inf)
    return np.repeat(largest(rank, wanted), unit, axis=1)[:, :tokens] & steps.stored


def _blend(steps: _Steps, mass: Floats, attended: Mask, first_pass: Counts, second_pass: Counts) -> Outcome:
    """Attention of the attended tokens, weighted by their approximate mass against the mean of V."""
    alpha = np.where(attended[:, None], mass, 0).sum(axis=2)
    everything = (attended == steps.valid).all(axis=1)
    alpha = np.where(everything[:, None], 1, alpha).astype(mass.dtype)
    weight = alpha[..., None]
    output = weight * steps.attend(attended) + (1 - weight) * steps.mean_value()
    return Outcome(output=output, attended=attended, flash_bytes=first_pass + second_pass,
                   element_bytes=first_pass + steps.token_bytes(attended), alpha=alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSparf(Sparf):
    """SparF as the paper reads it: the same selection, but pages of 4 KiB move whole.

    A page holds `PAGE_FEATURES` features of K of 512 tokens; or 2,048 / head_dim tokens of K, or of V. A page of which
    only a part is written counts as that part.
    """

    name: ClassVar[str] = "pages"

    def _bytes(self, steps: _Steps, attended: Mask) -> tuple[Counts, Counts]:
        head_dim = steps.key.shape[1]
        chosen = _units(_features(steps.query, self.features), PAGE_FEATURES).any(axis=2).sum(axis=1)
        feature_bytes = chosen * steps.flash * (PAGE_FEATURES * ELEMENT_BYTES)
        tokens = PAGE_BYTES // (ELEMENT_BYTES * head_dim)
        return np.asarray(feature_bytes), 2 * PAGE_BYTES * steps.touched(attended, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparq(Stateless):
    """SparQ as published, in memory: no tail, k counts all tokens, and single elements can be read.

    Members:
        features: r.
        share: k as a share of all tokens.
        local: share of k that goes to the newest tokens in any case.
        sinks: as in `Sparf`.
    """

    name: ClassVar[str] = "sparq"
    features: int
    share: float
    local: float = 0.25
    sinks: int = 0

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths, tail=False)
        mass = _approximate(steps, self.features)
        wanted = share_of(self.share, steps.lengths)
        attended = _choose(steps, mass, wanted, share_of(self.local, wanted, 0), 1, self.sinks)
        return _blend(steps, mass, attended, self.features * steps.lengths * ELEMENT_BYTES, steps.token_bytes(attended))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched(Stateless):
    """SparF that attends all it reads: codewords of tokens are chosen, by their approximate mass.

    Members:
        features: r.
        share: codewords of K that are read, as a share of those in flash; the tail comes on top.
        local: share of them that goes to the newest tokens in any case, if they are in flash.
        unit_tokens: tokens of a unit; None: those of a codeword.
        sinks: the first tokens: units that hold one are selected in any case.
    """

    name: ClassVar[str] = "fetched"
    features: int
    share: float
    local: float = 0.25
    unit_tokens: int | None = None
    sinks: int = 0

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        codeword = _codeword_tokens(key)
        unit = _whole(self.unit_tokens or codeword, codeword)
        mass = _approximate(steps, self.features)
        wanted = share_of(self.share, steps.flash // unit)
        attended = steps.tail | _choose(steps, mass, wanted, share_of(self.local, wanted, 0) * unit, unit, self.sinks)
        return _blend(steps, mass, attended, _feature_codewords(steps, self.features) * CODEWORD_BYTES,
                      2 * CODEWORD_BYTES * steps.touched(attended, codeword))


def _whole(unit: int, codeword: int) -> int:
    """A unit of tokens, checked."""
    if unit % codeword or GROUP % unit:
        raise ValueError(f"unit_tokens must be whole codewords of {codeword} tokens that divide {GROUP}, not {unit}")
    return unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketched(Stateless):
    """Tokens chosen by scores of a low-bit sketch of K (`kvattic_sim.lm.sketch`), blended as SparF.

    K and V of one token lie side by side, so that the unit is a token and one codeword has both. The sketch's own pages
    are dense: codes and bounds of whole groups are read, or those of the chosen features if it is laid out by features.
    Sinks are scored exactly in the first pass, as the tail is: they hold so much of the weight that a wrong score of
    theirs makes alpha wrong. This is a study; what the drive does is `Coded`.

    Members:
        share: k as a share of the tokens in flash; the tail comes on top.
        bits: of a code.
        block_tokens: tokens that share their bounds; they divide a group.
        features: how many of them are read, chosen by SparF's rule; None: all.
        feature_run: they are chosen in runs of so many consecutive ones; 8 of 2 bits and 256 tokens fill a codeword.
        local: as in `Sparf`.
        sinks: the first tokens, which are selected in any case, count in k, and are left out of the bounds.
        exact_sinks: whether the first pass scores sinks exactly, not by their codes.
        levels: see `kvattic_sim.lm.sketch.LEVELS`.
        blend: whether the mean of V stands for what is not attended; without it the output is attention alone.
    """

    name: ClassVar[str] = "sketch"
    share: float
    bits: int = 2
    block_tokens: int = 256
    features: int | None = None
    feature_run: int = 1
    local: float = 0.25
    sinks: int = 16
    exact_sinks: bool = True
    levels: str = "centres"
    blend: bool = True

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        if GROUP % self.block_tokens:
            raise ValueError(f"block_tokens must divide {GROUP}, not {self.block_tokens}")
        steps = _Steps.of(query, key, value, lengths)
        features = key.shape[1] if self.features is None else self.features
        # Bounds of whole groups never change again; what is behind them is in the tail.
        whole = int(steps.flash.max())
        rough = np.zeros_like(key)
        if whole:
            rough[:whole] = encode(key[:whole], bits=self.bits, block_tokens=self.block_tokens, sinks=self.sinks,
                                   levels=self.levels).decode(key.dtype)
        exact = self.sinks if self.exact_sinks else 0
        mass = _approximate(steps, features, rough, exact, self.feature_run)
        wanted = share_of(self.share, steps.flash)
        attended = steps.tail | _choose(steps, mass, wanted, share_of(self.local, wanted, 0), 1, self.sinks)
        pair = max(1, _codeword_tokens(key) // 2)
        codewords = -(-2 * pair * ELEMENT_BYTES * key.shape[1] // CODEWORD_BYTES)
        first = sketch_bytes(steps.flash, features, self.bits, self.block_tokens)
        # For that they are read twice.
        first += -(-np.minimum(exact, steps.flash) // pair) * (codewords * CODEWORD_BYTES)
        second = codewords * CODEWORD_BYTES * steps.touched(attended, pair)
        return _blend(steps, mass, attended, first, second) if self.blend else steps.outcome(attended, first, second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded(Stateless):
    """The drive's mode CODES: tokens chosen by scores of codes of all features of K, blended as SparF.

    Codes are the drive's, of codewords of 512 bytes (`kvattic.spec.codes`); an octet of them is one codeword. The first
    pass scores the tail exactly, and the codewords that hold sinks. The truncation of codes' scores (docs/numerics.md)
    is left out.

    Members:
        share: k as a share of the tokens in flash; the tail comes on top.
        local: as in `Sparf`.
        sinks: the first tokens, which are selected in any case, count in k, and are left out of the levels.
        pairs: K and V of one token lie side by side, so that one codeword has both, as in `Sketched`; the drive reads a
            codeword of K and one of V.
    """

    name: ClassVar[str] = "codes"
    share: float
    local: float = 0.25
    sinks: int = 16
    pairs: bool = False

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        whole = int(steps.flash.max())
        rough = np.zeros_like(key)
        if whole:
            rough[:whole] = drive_codes(key[:whole], self.sinks)
        together = _codeword_tokens(key) // (2 if self.pairs else 1)
        mass = _approximate(steps, key.shape[1], rough, -(-self.sinks // together) * together)
        wanted = share_of(self.share, steps.flash)
        attended = steps.tail | _choose(steps, mass, wanted, share_of(self.local, wanted, 0), 1, self.sinks)
        first = steps.flash // GROUP * octets(key.shape[1]) - (-np.minimum(self.sinks, steps.flash) // together)
        second = steps.touched(attended, together) * (1 if self.pairs else 2)
        return _blend(steps, mass, attended, first * CODEWORD_BYTES, second * CODEWORD_BYTES)


class _ByUnit(Stateless):
    """Units of tokens chosen by a score that is read for each; all of their tokens attended, no blend.

    A group of query rows takes a softmax for each row over the units, and sums it over the rows; or, with `rows` "sum",
    it sums the scores themselves.
    """

    unit_tokens: int
    share: float
    rows: str
    sinks: int
    entries: ClassVar[int]  # vectors of head_dim that are read for each unit

    @abstractmethod
    def _scores(self, query: Floats, units: Floats) -> Floats:
        """(positions, rows, units) for keys in units, (units, unit, head_dim)."""

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        codeword, head_dim = _codeword_tokens(key), key.shape[1]
        unit = _whole(self.unit_tokens, codeword)
        whole = len(key) // unit
        present: Mask = np.asarray(_units(steps.stored, unit).any(axis=2))
        scores = np.full((*steps.query.shape[:2], present.shape[1]), -np.inf, query.dtype)
        scores[..., :whole] = self._scores(steps.query, key[: whole * unit].reshape(whole, unit, head_dim))
        scores *= query.dtype.type(head_dim**-0.5)
        if self.rows not in ("softmax", "sum"):
            raise ValueError(f"rows must be 'softmax' or 'sum', not {self.rows!r}")
        masked = np.where(present[:, None], scores, query.dtype.type(-np.inf))
        mass = (_softmax(masked) if self.rows == "softmax" else masked).sum(axis=1)
        mass = np.where(np.arange(present.shape[1]) * unit < self.sinks, np.inf, mass)
        chosen = largest(np.where(present, mass, -np.inf), share_of(self.share, steps.flash // unit))
        attended = steps.tail | (np.repeat(chosen, unit, axis=1)[:, : len(key)] & steps.stored)
        described = -(-GROUP // unit * self.entries * head_dim * ELEMENT_BYTES // CODEWORD_BYTES)
        return steps.outcome(attended, steps.flash // GROUP * (described * CODEWORD_BYTES),
                             2 * CODEWORD_BYTES * steps.touched(attended, codeword))


@dataclass(frozen=True, slots=True, kw_only=True)
class Centroid(_ByUnit):
    """Units of tokens chosen by their mean key.

    Members:
        share: units that are read, as a share of those in flash; the tail comes on top.
        unit_tokens: tokens of a unit.
        rows: how the scores of a group's rows become one: "softmax" over the units, summed, or their plain "sum".
        sinks: the first tokens: left out of the means, and units that hold one are selected in any case.
    """

    name: ClassVar[str] = "centroid"
    entries: ClassVar[int] = 1
    share: float
    unit_tokens: int = 16
    rows: str = "softmax"
    sinks: int = 0

    def _scores(self, query: Floats, units: Floats) -> Floats:
        means = units.mean(axis=1)
        cut, within = divmod(self.sinks, self.unit_tokens)
        if within and cut < len(units):
            means[cut] = units[cut, within:].mean(axis=0)
        means = means.astype(np.float16).astype(query.dtype)
        return np.asarray(query @ means.T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(_ByUnit):
    """Quest (arXiv 2406.10774): pages of tokens chosen by an upper bound of their scores, from each feature's bounds.

    Members:
        share: pages that are read, as a share of those in flash; the tail comes on top.
        unit_tokens: tokens of a page.
        rows: as in `Centroid`.
        sinks: the first tokens: pages that hold one are selected in any case.
    """

    name: ClassVar[str] = "quest"
    entries: ClassVar[int] = 2
    share: float
    unit_tokens: int = 16
    rows: str = "softmax"
    sinks: int = 0

    def _scores(self, query: Floats, units: Floats) -> Floats:
        return np.asarray(np.maximum(query, 0) @ units.max(axis=1).T + np.minimum(query, 0) @ units.min(axis=1).T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Local(Stateless):
    """The tail, the newest tokens in flash, and the first ones (StreamingLLM).

    Members:
        share: tokens that are read, as a share of those in flash; the tail comes on top.
        sinks: how many of them are the first tokens.
    """

    name: ClassVar[str] = "local"
    share: float
    sinks: int = 0

    def attend(self, query: Floats, key: Floats, value: Floats, lengths: Counts) -> Outcome:
        """See `Stateless`."""
        steps = _Steps.of(query, key, value, lengths)
        index = np.arange(len(key))
        wanted = share_of(self.share, steps.flash)
        sinks = np.minimum(self.sinks, wanted)
        chosen = (index < sinks[:, None]) | (index >= (steps.flash - (wanted - sinks))[:, None])
        attended = steps.tail | (chosen & steps.stored)
        return steps.outcome(attended, 0, 2 * CODEWORD_BYTES * steps.touched(attended, _codeword_tokens(key)))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeavyHitters(Method):
    """H2O (arXiv 2306.14048): the tokens that gathered most attention so far, and the newest.

    What is dropped is gone: it gathers nothing more and never comes back. A token enters when its group is written to
    flash; until then it is in the tail.

    Members:
        share: tokens that are kept, as a share of those in flash; the tail comes on top.
        heavy: share of them that goes to the heavy hitters; half of them in the paper.
    """

    name: ClassVar[str] = "h2o"
    share: float
    heavy: float = 0.5

    def decode(self, query: Floats, key: Floats, value: Floats, first: int) -> Outcome:
        """See `Method`."""
        steps = _Steps.of(query[first:], key, value, np.arange(first, len(key)) + 1)
        gathered = np.zeros(len(key))
        if first:
            # Of the prefill, in which everything is attended.
            past = _Steps.of(query[:first], key[:first], value[:first], np.arange(first) + 1)
            gathered[:first] = _softmax(past.exact).sum(axis=(0, 1), dtype=np.float64)
        wanted = share_of(self.share, steps.flash)
        attended = np.zeros_like(steps.valid)
        kept = np.zeros(len(key), np.bool_)
        known = 0  # tokens in flash that were considered
        for at, flash in enumerate(steps.flash):
            if flash != known or at == 0:
                kept[known:flash] = True
                known = int(flash)
                recent = int(wanted[at]) - int(wanted[at] * self.heavy + 0.5)
                heavy = np.where(kept, gathered, -np.inf)
                heavy[known - recent :] = -np.inf
                chosen = largest(heavy[None], int(wanted[at]) - recent)[0]
                chosen[known - recent : known] = kept[known - recent : known]
                kept &= chosen
            attended[at] = kept | steps.tail[at]
            row = np.where(attended[at], steps.exact[at], -np.inf)
            gathered += _softmax(row).sum(axis=0)
        return steps.outcome(attended, 0, 2 * CODEWORD_BYTES * steps.touched(attended, _codeword_tokens(key)))
