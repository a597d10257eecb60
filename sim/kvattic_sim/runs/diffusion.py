"""Attention of diffusers' models in the drive, by diffusers' own registry of attention backends.

    with kvattic.open("model", config) as device, in_drive(device) as attention:
        output = transformer(...)
    print(attention.error)      # against the native backend

While the block lasts, what diffusers know as their native backend is the drive: K and V of each call are written, and
all rows attend them.  It needs diffusers (the extra `diffusion`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.models import attention_dispatch

from kvattic import Device, RequestError
from kvattic.integrations.transformers import round_to_storage
from kvattic.timing.cost import Cost
from kvattic_sim import oracle

__all__ = ["DriveAttention", "in_drive", "rounded"]

Native = Callable[..., torch.Tensor]


class DriveAttention:
    """A backend of diffusers: attention of each call in the drive, compared with the native backend.

    Args:
        device: the drive; its head_dim must be the model's.
        native: diffusers' own backend.

    Attributes:
        error: largest relative RMS of a call against the native backend over q, K and V rounded alike.
        tokens: of K and V, of each call.
        attend: what all attention has cost; None before the first call.
        write: what writing K and V has cost; likewise.
    """

    def __init__(self, device: Device, native: Native) -> None:
        self.error = 0.0
        self.tokens: list[int] = []
        self.attend: Cost | None = None
        self.write: Cost | None = None
        self._device, self._native = device, native

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                 scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        """Attention of (batch, tokens, heads, head_dim).

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
        rows = [self._row(q, k, v, scale) for q, k, v in zip(*arrays, strict=True)]
        found = torch.from_numpy(np.stack(rows)).transpose(1, 2)
        self.error = max(self.error, oracle.relative_rms(found.numpy(), expected.numpy()))
        return found

    def _row(self, query: Any, key: Any, value: Any, scale: float | None) -> Any:
        """Of one sample: arrays (heads, tokens, head_dim)."""
        heads, tokens, _ = key.shape
        self.tokens.append(tokens)
        with self._device.create_sequence(heads, capacity_tokens=tokens) as sequence:
            sequence.prefill(key, value)
            result = sequence.attend(query, scale=scale)
            written = sequence.statistics_by_part()["prefill"]
        self.attend = result.cost if self.attend is None else self.attend + result.cost
        self.write = written if self.write is None else self.write + written
        return result.output


def rounded(native: Native, element: Any) -> Native:
    """The native backend over q, K and V that are rounded to a storage format."""
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
                  scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        query, key, value = (round_to_storage(x, element) for x in (query, key, value))
        return native(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                      enable_gqa=enable_gqa)

    return attention


@contextmanager
def in_drive(device: Device | None, element: Any = None) -> Iterator[Any]:
    """Let the drive be diffusers' native backend.

    Args:
        device: the drive; None: the native backend itself over numbers rounded to `element`, the reference.
        element: a storage format, without a device.

    Yields:
        `DriveAttention`, or the reference.
    """
    # diffusers have no public way to add a backend: theirs are an enumeration.
    registry, name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName.NATIVE
    native, constraints = registry._backends[name], registry._constraints[name]
    ours = rounded(native, element) if device is None else DriveAttention(device, native)
    registry.register(name)(ours)
    try:
        with attention_dispatch.attention_backend(name):
            yield ours
    finally:
        registry.register(name, constraints, supports_context_parallel=True)(native)
