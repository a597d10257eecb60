"""Scales of K and V: what a stored 1.0 stands for, by layer and KV head.

The drive knows nothing of them.  Numbers are divided by them before they are rounded to the stored format; that of K
becomes a factor of the scale in a command, and that of V multiplies the outputs on the host.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.errors import RequestError

__all__ = ["Scales", "check_scales", "slice_heads"]

Scales: TypeAlias = tuple[tuple[float, ...], ...]
"""Of each layer, that of each KV head: numbers of fp32."""

LEAST = float(np.finfo(np.float32).tiny)


def check_scales(name: str, given: ArrayLike | None, layers: int, kv_heads: int) -> Scales | None:
    """The scales of a sequence.

    Args:
        name: of the argument.
        given: a number, or an array that broadcasts to (layers, kv_heads); rounded to fp32.
        layers: of the sequence.
        kv_heads: of a layer.

    Returns:
        None: all are 1.

    Raises:
        RequestError: another shape; or one that is zero, negative, infinite, NaN or no normal fp32.
    """
    if given is None:
        return None
    array = np.asarray(given)
    if array.dtype.kind not in "fiu":
        raise RequestError(f"{name} must be numbers, not {array.dtype}")
    try:
        with np.errstate(over="ignore"):
            scales: NDArray[Any] = np.broadcast_to(array.astype(np.float32), (layers, kv_heads))
    except ValueError:
        raise RequestError(f"{name} must be a number, or broadcast to (layers, kv_heads) = ({layers}, {kv_heads}), not "
                           f"{array.shape}") from None
    for layer, head in np.argwhere(~(np.isfinite(scales) & (scales >= LEAST)))[:1]:
        wrong = np.broadcast_to(array, scales.shape)[layer, head]
        raise RequestError(f"{name} of layer {layer}, KV head {head} must be positive, finite and a normal fp32, not "
                           f"{wrong}")
    return None if (scales == 1).all() else tuple(tuple(map(float, row)) for row in scales)


def slice_heads(name: str, given: ArrayLike | None, layers: int, kv_heads: int, heads: slice) -> Scales | None:
    """The scales of some of a sequence's KV heads; arguments and errors are those of `check_scales`."""
    scales = check_scales(name, given, layers, kv_heads)
    return None if scales is None else tuple(row[heads] for row in scales)
