"""The attention backend `kvattic`: what transformers call as the attention of a layer."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import output_capturing

from kvattic.errors import RequestError
from kvattic.integrations.cache import NAME
from kvattic.integrations.layer import MARK, DriveLayer, last_layer, not_traced
from kvattic.integrations.masks import make_mask

__all__ = ["attention", "register"]

_CHANGES = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments of an attention function that change its result in ways that the drive does not know."""

_COLLECTOR = "_active_collector"
"""What transformers has no public name for: what a model shall return."""


@not_traced
def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The backend: what transformers call as the attention of a layer."""
    layer = getattr(key, MARK, None)
    if not isinstance(layer, DriveLayer):
        pending = last_layer()
        if pending is not None and pending.unattended:
            raise pending.fail(RequestError(
                f"layer {pending.number}: the model changes K after the DriveCache returned them, before it attends "
                "them: such models are not supported"))
        raise RequestError(f"attn_implementation={NAME!r} attends K and V that a DriveCache returned, but there was "
                           "none: give the model, or generate(), cache=DriveCache(device, model.config)")
    if changes := [name for name in _CHANGES if kwargs.get(name) is not None]:
        raise layer.fail(RequestError(
            f"the drive's attention has no {', '.join(changes)}, which this model needs"))
    if kwargs.get("output_attentions") or "attentions" in (getattr(output_capturing, _COLLECTOR).get() or ()):
        raise layer.fail(RequestError(
            "output_attentions: the drive does not give attention weights; leave it out, or use "
            "attn_implementation='eager' without a DriveCache"))
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise layer.fail(RequestError(
            "the drive's attention has no gradient and no dropout: call model.eval(), and the model inside "
            "torch.no_grad()"))
    return layer.attend(module, query, key, value, attention_mask, scaling), None


def register() -> None:
    """Tell transformers of the backend and its masks."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
