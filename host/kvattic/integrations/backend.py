"""The attention backend `kvattic`: what transformers call as the attention of a layer."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import output_capturing

from kvattic.errors import RequestError
from kvattic.integrations.cache import NAME
from kvattic.integrations.layer import MARK, DriveLayer, last_layer, not_traced
from kvattic.integrations.local import attend_outside
from kvattic.integrations.masks import make_mask

__all__ = ["attention", "register"]

_CHANGES = {"softcap": "caps its scores (a soft cap)", "sinks": "has sinks that depend on the token",
            "position_bias": "adds a bias to its scores by position", "indices": "chooses the attended tokens itself",
            "block_indices": "chooses the attended tokens itself"}
"""Arguments of an attention function that change its result in ways that the drive does not know."""

_COLLECTOR = "_active_collector"
"""What transformers has no public name for: what a model shall return."""


@not_traced
def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The backend: attention in the drive if a `DriveCache` returned K and V, otherwise PyTorch's own."""
    layer = getattr(key, MARK, None)
    if not isinstance(layer, DriveLayer):
        pending = last_layer()
        if pending is not None and pending.unattended:
            raise pending.fail(RequestError(
                f"layer {pending.number}: the model changes K after the DriveCache returned them, before it attends "
                "them: such models are not supported"))
        return attend_outside(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                              options=kwargs)
    _check(layer, query, dropout, kwargs)
    return layer.attend(module, query, key, value, attention_mask, scaling, sinks=kwargs.get("s_aux"),
                        is_causal=kwargs.get("is_causal")), None


def _check(layer: DriveLayer, query: torch.Tensor, dropout: float, options: dict[str, Any]) -> None:
    """Refuse what the drive's attention lacks."""
    for name, words in _CHANGES.items():
        # T5's cross-attention has a bias that is zero.
        if (given := options.get(name)) is not None and not (name == "position_bias" and not given.any()):
            raise layer.fail(RequestError(
                f"layer {layer.number}: the drive's attention has no {name}, which this model needs: it {words}"))
    if options.get("output_attentions") or "attentions" in (getattr(output_capturing, _COLLECTOR).get() or ()):
        raise layer.fail(RequestError(
            "output_attentions: the drive does not give attention weights; leave it out, or use "
            "attn_implementation='eager' without a DriveCache"))
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise layer.fail(RequestError(
            "the drive's attention has no gradient and no dropout: call model.eval(), and the model inside "
            "torch.no_grad()"))


def register() -> None:
    """Tell transformers of the backend and its masks."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
