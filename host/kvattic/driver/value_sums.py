"""Running sums of V: what the mean of V over any range of a layer's tokens is made of."""

from collections import deque
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.spec.elements import Bits, from_bits
from kvattic.spec.formats import Element

__all__ = ["Doubles", "ValueSums"]

Doubles: TypeAlias = NDArray[np.float64]


class ValueSums:
    """Sums of V over the first tokens of a layer, in float64, one token after the other.

    So a sum depends on the tokens alone, not on the pieces in which they came.  Sums up to each stripe are kept for
    good (1/64 of the bytes of K and V at 256 tokens a stripe), and V of the newest tokens: as many as the newest
    append has, or a window that the sequence was created for.

    Args:
        kv_heads: KV heads of the layer.
        head_dim: elements of a token.
        stripe_tokens: tokens of a stripe.
        element: storage format of V.
        window: tokens whose V is always kept.

    Attributes:
        length: tokens that were added.
        total: float64, (kv_heads, head_dim), their sum.
    """

    def __init__(self, kv_heads: int, head_dim: int, stripe_tokens: int, element: Element, window: int = 0) -> None:
        self.length = 0
        self.total: Doubles = np.zeros((kv_heads, head_dim))
        self._stripe_tokens = stripe_tokens
        self._element = element
        self._window = self._kept = window
        self._stripes: list[Doubles] = []               # sums before each stripe that has begun
        self._recent: deque[tuple[int, Bits]] = deque()     # first token, V; without gaps, up to `length`

    def fork(self) -> "ValueSums":
        """The same sums, to go on with other tokens."""
        made = copy(self)   # sums and V are never changed in place, the lists of them are
        made.__dict__.update(_stripes=list(self._stripes), _recent=self._recent.copy())
        return made

    def state(self) -> dict[str, NDArray[Any]]:
        """What `resume` goes on from."""
        kept = [values for _, values in self._recent]
        heads, dim = self.total.shape
        return {"total": self.total, "stripes": np.array(self._stripes).reshape(-1, heads, dim),
                "kept": np.concatenate([*kept, np.zeros((heads, 0, dim), np.uint16)], axis=1)}

    def resume(self, length: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `state` after `length` tokens."""
        self.length, self.total = length, state["total"]
        self._stripes = list(state["stripes"])
        kept = state["kept"]
        self._kept = max(self._window, kept.shape[1])
        self._recent = deque([(length - kept.shape[1], kept)] if kept.shape[1] else [])

    def expect(self, tokens: int) -> None:
        """Begin an append of `tokens` tokens, whose V is kept until the next one."""
        self._kept = max(self._window, tokens)

    def add(self, values: Bits) -> None:
        """Add tokens: uint16, (kv_heads, tokens, head_dim)."""
        self._recent.append((self.length, np.ascontiguousarray(values)))
        at, count = 0, values.shape[1]
        while at < count:
            stripe, inside = divmod(self.length, self._stripe_tokens)
            if inside == 0:
                self._stripes[stripe:] = [self.total]
            last = min(at + self._stripe_tokens - inside, count)
            self.total = _accumulate(self.total, self._exact(values[:, at:last]))
            self.length += last - at
            at = last
        while self._recent and self._recent[0][0] + self._recent[0][1].shape[1] <= self.length - self._kept:
            self._recent.popleft()

    def truncate(self, length: int, values: Bits) -> None:
        """Forget all but the first tokens.

        Args:
            length: how many are left.
            values: uint16, (kv_heads, tokens, head_dim), those of them that begin the last stripe.
        """
        stripe, inside = divmod(length, self._stripe_tokens)
        if length < self.length:
            self.total = _accumulate(self._stripes[stripe], self._exact(values[:, :inside]))
            self.length = length
            del self._stripes[stripe + (inside > 0) :]
            while self._recent and self._recent[-1][0] + self._recent[-1][1].shape[1] > length:
                first, kept = self._recent.pop()
                if first < length:
                    self._recent.append((first, kept[:, : length - first]))

    def until(self, token: int, read: Callable[[int, int], Doubles]) -> Doubles:
        """Sum over the tokens before `token`: float64, (kv_heads, head_dim).

        Args:
            token: 0 to `length`.
            read: V of tokens that are not kept: from the first one to before the last one, float64,
                (kv_heads, tokens, head_dim).
        """
        if token == self.length:
            return self.total
        stripe = token // self._stripe_tokens
        return _accumulate(self._stripes[stripe], self.values(stripe * self._stripe_tokens, token, read))

    def values(self, first: int, last: int, read: Callable[[int, int], Doubles]) -> Doubles:
        """V of tokens, float64, (kv_heads, last - first, head_dim); arguments as in `until`."""
        begin = min(max(first, self._recent[0][0] if self._recent else self.length), last)
        parts = [read(first, begin)] if first < begin else []
        for start, kept in self._recent:
            if start >= last:
                break
            low, high = max(begin, start), min(last, start + kept.shape[1])
            if low < high:
                parts.append(self._exact(kept[:, low - start : high - start]))
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(self.total), 0, self.total.shape[1]))

    def _exact(self, values: Bits) -> Doubles:
        return from_bits(values, self._element).astype(np.float64)


def _accumulate(total: Doubles, values: Doubles) -> Doubles:
    """A sum, and then values one after the other: (kv_heads, head_dim) and (kv_heads, tokens, head_dim)."""
    with np.errstate(invalid="ignore"):
        sums: Doubles = np.add.accumulate(np.concatenate([total[:, None], values], axis=1), axis=1)
    return sums[:, -1].copy()
