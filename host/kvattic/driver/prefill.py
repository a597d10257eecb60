"""`write_layers`: write a model's K and V to the drive while the model computes the next layer's."""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from numpy.typing import ArrayLike

from kvattic.errors import KvatticError, RequestError

__all__ = ["LayerKV", "write_layers"]

LayerKV: TypeAlias = tuple[int, ArrayLike, ArrayLike]
"""A layer's number, K and V."""


class _Answer(Protocol):
    """What is needed of `Future` and `ArrayFuture`."""

    def done(self) -> bool:
        """Whether it is there; takes completions."""
        ...

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for it."""
        ...


class _Target(Protocol):
    """What is needed of `Sequence` and `ArraySequence`."""

    def append_async(self, key: ArrayLike, value: ArrayLike, *, layer: int = 0) -> _Answer:
        """Begin to write tokens."""
        ...


def write_layers(sequence: _Target, layers: Iterable[LayerKV], *, in_flight: int = 2) -> int:
    """Write layers as they come.

    While the drive programs a layer, the next one is computed, by whatever `layers` does to get it.  Nothing runs in
    the background on the host: completions are taken between two layers, and a layer that needs several rounds (more
    tokens than device DRAM has room for) goes on then.

    Args:
        sequence: a `Sequence` or `ArraySequence`.
        layers: yields (layer, key, value), key and value (kv_heads, tokens, head_dim) as in `Sequence.append`, in any
            order of layers; tokens are appended to those that a layer has.
        in_flight: layers that are written at the same time, at most: each holds its K and V in memory.  One more is
            being computed.

    Returns:
        How many were written.

    Raises:
        RequestError: in_flight is not positive.
        KvatticError: what a layer's write reports; its notes name the layer.
        Exception: what `layers` raises.

    After an error nothing more is asked of `layers`, and nothing is under way: `Sequence.length` tells for each layer
    what it holds.
    """
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
        raise RequestError(f"in_flight must be a positive int, not {in_flight!r}")
    waiting: deque[tuple[int, _Answer]] = deque()
    written = 0
    try:
        for layer, key, value in layers:
            # Room for one more: wait for the oldest; take in passing what else is done.
            while waiting and (len(waiting) >= in_flight or waiting[0][1].done()):
                _finish(*waiting.popleft())
            try:
                answer = sequence.append_async(key, value, layer=layer)
            except KvatticError as error:
                error.add_note(f"layer {layer}")
                raise
            waiting.append((layer, answer))
            written += 1
        while waiting:
            _finish(*waiting.popleft())
    finally:
        for _, answer in waiting:
            with suppress(Exception):   # the first error is raised already
                answer.result()
        if isinstance(layers, Generator):
            layers.close()      # it may not be used up
    return written


def _finish(layer: int, answer: _Answer) -> None:
    """Wait for a layer."""
    try:
        answer.result()
    except KvatticError as error:
        error.add_note(f"layer {layer}")
        raise
