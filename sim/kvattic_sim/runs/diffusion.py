"""Attention of diffusers' models in the drive, by diffusers' own registry of attention backends.

    with kvattic.open("model", config) as device, in_drive(device) as attention:
        output = transformer(...)
    print(attention.error)      # against the native backend

While the block lasts, what diffusers know as their native backend is the drive: K and V of each call are written, and
all rows attend them; but what a call gives a name (`kept`) is written once.  U-Nets do not ask the registry by
themselves: `kvattic_sim.runs.unet`.  It needs diffusers (the extra `diffusion`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.models import attention_dispatch
from numpy.typing import NDArray

from kvattic import Device, RequestError, Sequence
from kvattic.integrations.transformers import round_to_storage
from kvattic.spec.config import TINY
from kvattic.timing.cost import Cost
from kvattic_sim import oracle

__all__ = ["SMALL", "DriveAttention", "Spent", "in_drive", "rounded"]

Native = Callable[..., torch.Tensor]

SMALL = replace(TINY, rows=16, dies=8, part=replace(TINY.part, blocks=64))
"""Drive of the slices: room for their layers, and as many rows as there can be."""


@dataclass(slots=True)
class Spent:
    """What calls have cost.

    Attributes:
        calls: of a sample each.
        writes: calls whose K and V were written.
        attend: all attention; None before the first call.
        write: writing K and V; likewise.
    """

    calls: int = 0
    writes: int = 0
    attend: Cost | None = None
    write: Cost | None = None

    def wrote(self, cost: Cost) -> None:
        """Count a write."""
        self.writes += 1
        self.write = cost if self.write is None else self.write + cost

    def attended(self, cost: Cost) -> None:
        """Count a call."""
        self.calls += 1
        self.attend = cost if self.attend is None else self.attend + cost


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A sequence that stays, and the K and V that are in it, (heads, tokens, head_dim)."""

    sequence: Sequence
    key: NDArray[np.float32]
    value: NDArray[np.float32]


class DriveAttention:
    """A backend of diffusers: attention of each call in the drive, compared with the native backend.

    Args:
        device: the drive; its head_dim must be the model's.
        native: diffusers' own backend.

    Attributes:
        error: largest relative RMS of a call against the native backend over q, K and V rounded alike.
        tokens: of K and V, of each call.
        new: calls whose K and V are new.
        kept: calls that name what they attend (`kept=`).
    """

    def __init__(self, device: Device, native: Native) -> None:
        self.error = 0.0
        self.tokens: list[int] = []
        self.new, self.kept = Spent(), Spent()
        self._device, self._native = device, native
        self._sequences: dict[tuple[str, int], _Kept] = {}

    @property
    def attend(self) -> Cost | None:
        """What attention over new K and V has cost; None before the first call."""
        return self.new.attend

    @property
    def write(self) -> Cost | None:
        """What writing new K and V has cost; likewise."""
        return self.new.write

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                 scale: float | None = None, enable_gqa: bool = False, kept: str | None = None) -> torch.Tensor:
        """Attention of (batch, tokens, heads, head_dim).

        Args:
            query: of all positions.
            key: of all tokens.
            value: likewise.
            attn_mask: must be None.
            dropout_p: must be 0.
            is_causal: must be False.
            scale: of the scores; head_dim**-0.5 if None.
            enable_gqa: whether query heads share KV heads.
            kept: a name; K and V stay in the drive under it, and are written again only if they change.

        Raises:
            RequestError: a mask, dropout, or another head_dim than the drive's.
        """
        if attn_mask is not None or is_causal or dropout_p:
            raise RequestError("the drive attends all tokens here: without attn_mask, is_causal and dropout_p")
        config = self._device.config
        if query.shape[-1] != config.head_dim:
            raise RequestError(f"head_dim of the model is {query.shape[-1]}, the drive's {config.head_dim}; they must "
                               "be equal")
        query, key, value = (round_to_storage(x.float(), config.element) for x in (query, key, value))
        expected = self._native(query, key, value, scale=scale, enable_gqa=enable_gqa)
        arrays = [x.transpose(1, 2).numpy() for x in (query, key, value)]
        rows = [self._row(q, k, v, scale) if kept is None else self._kept_row((kept, row), q, k, v, scale)
                for row, (q, k, v) in enumerate(zip(*arrays, strict=True))]
        found = torch.from_numpy(np.stack(rows)).transpose(1, 2)
        self.error = max(self.error, oracle.relative_rms(found.numpy(), expected.numpy()))
        return found

    def free(self) -> None:
        """Give back what is kept."""
        while self._sequences:
            self._sequences.popitem()[1].sequence.free()

    def _row(self, query: Any, key: Any, value: Any, scale: float | None) -> Any:
        """Of one sample: arrays (heads, tokens, head_dim)."""
        with self._written(key, value, self.new) as sequence:
            return self._attend(sequence, query, scale, self.new)

    def _kept_row(self, name: tuple[str, int], query: Any, key: Any, value: Any, scale: float | None) -> Any:
        """The same over what is kept, as long as it does not change."""
        found = self._sequences.get(name)
        if found is None or not (np.array_equal(found.key, key) and np.array_equal(found.value, value)):
            if found is not None:
                del self._sequences[name]
                found.sequence.free()
            # Copies: the arrays are the model's.
            found = _Kept(self._written(key, value, self.kept), key.copy(), value.copy())
            self._sequences[name] = found
        return self._attend(found.sequence, query, scale, self.kept)

    def _written(self, key: Any, value: Any, spent: Spent) -> Sequence:
        heads, tokens, _ = key.shape
        sequence = self._device.create_sequence(heads, capacity_tokens=tokens)
        sequence.prefill(key, value)
        spent.wrote(sequence.statistics_by_part()["prefill"])
        return sequence

    def _attend(self, sequence: Sequence, query: Any, scale: float | None, spent: Spent) -> Any:
        self.tokens.append(sequence.length())
        result = sequence.attend(query, scale=scale)
        spent.attended(result.cost)
        return result.output


def rounded(native: Native, element: Any, *, dtype: torch.dtype = torch.float32) -> Native:
    """The native backend over q, K and V that are rounded to a storage format.

    Args:
        native: diffusers' own backend.
        element: the storage format.
        dtype: that it computes in.
    """
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                  scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        given = query.dtype
        query, key, value = (round_to_storage(x, element).to(dtype) for x in (query, key, value))
        return native(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                      enable_gqa=enable_gqa).to(given)

    return attention


@contextmanager
def in_drive(device: Device | None, element: Any = None, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """Let the drive be diffusers' native backend.

    Args:
        device: the drive; None: the native backend itself over numbers rounded to `element`, the reference.
        element: a storage format, without a device.
        dtype: that the reference computes in.

    Yields:
        `DriveAttention`, or the reference.
    """
    # diffusers have no public way to add a backend: theirs are an enumeration.
    registry, name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName.NATIVE
    native, constraints = registry._backends[name], registry._constraints[name]
    ours = rounded(native, element, dtype=dtype) if device is None else DriveAttention(device, native)
    registry.register(name)(ours)
    try:
        with attention_dispatch.attention_backend(name):
            yield ours
    finally:
        registry.register(name, constraints, supports_context_parallel=True)(native)
        if isinstance(ours, DriveAttention):
            ours.free()
