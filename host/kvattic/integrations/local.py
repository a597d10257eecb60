"""Attention by PyTorch itself: of prompts, and of everything whose K and V no drive holds."""

import sys
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvattic.errors import RequestError
from kvattic.integrations.masks import whole_mask

__all__ = ["attend_locally", "attend_outside"]


def attend_locally(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                   mask: torch.Tensor | None, *, scaling: float | None, sinks: torch.Tensor | None = None,
                   is_causal: bool | None = None) -> torch.Tensor:
    """Scaled-dot-product attention, with learned sinks if there are any.

    Args:
        module: the model's attention layer.
        query: (rows, q_heads, positions, head_dim).
        key: (rows, kv_heads, tokens, head_dim).
        value: (rows, kv_heads, tokens, elements of a head of V).
        mask: bool, or floats that are added to the scores; (rows, 1, positions, tokens); None: see `is_causal`.
        scaling: of the scores; None: head_dim**-0.5.
        sinks: (q_heads,), what each head adds to its softmax as the score of a token whose V is zero.
        is_causal: whether a mask that is None means causal; None: what the module says.

    Returns:
        (rows, positions, q_heads, elements of a head of V).
    """
    options: dict[str, Any] = {} if is_causal is None else {"is_causal": is_causal}
    if sinks is None:
        output: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling,
                                                      **options)[0]
        return output
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _mask_for(query, key, causal=bool(causal))
    # One token more, whose K and V are zero and whose score is the sink.
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.nn.functional.pad(states.repeat_interleave(groups, dim=1), (0, 0, 0, 1))
                  for states in (key, value))
    rows, heads, positions, _ = query.shape
    bias = _as_bias(mask, query.dtype).expand(rows, heads, positions, -1)
    own = sinks.detach().to(query).view(1, heads, 1, 1).expand(rows, heads, positions, 1)
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, torch.cat([bias, own], dim=-1),
                                                             scale=scaling)
    return found.transpose(1, 2).contiguous()


def attend_outside(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                   mask: torch.Tensor | None, *, scaling: float | None, dropout: float,
                   options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of K and V that no `DriveCache` returned, as without this backend.

    By PyTorch's scaled-dot-product attention, or by the model's own `eager_attention_forward` if it asks for what the
    former lacks: a soft cap, sinks, weights that are returned.

    Args:
        module: the model's attention layer.
        query: (rows, q_heads, positions, head_dim).
        key: (rows, kv_heads, tokens, head_dim).
        value: likewise.
        mask: see `attend_locally`.
        scaling: of the scores.
        dropout: of the weights.
        options: everything else that the model gives.

    Returns:
        The output, (rows, positions, q_heads, elements of a head of V), and the weights if they are wanted.

    Raises:
        RequestError: the model asks for what PyTorch's attention lacks, and has no eager attention of its own.
    """
    special = [name for name in ("softcap", "s_aux", "sinks", "output_attentions") if options.get(name) is not None]
    special = [name for name in special if options[name] is not False]
    if not special:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout,
                                                                  scaling=scaling, **options)
        return found
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if eager is None:
        raise RequestError(f"{type(module).__name__} asks for {', '.join(special)} without a DriveCache, which "
                           "PyTorch's attention lacks, and its model has no eager attention: use another attention "
                           "implementation, such as 'eager'")
    if mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = _mask_for(query, key, causal=bool(causal)) if causal else None
    if mask is not None:
        mask = _as_bias(mask, query.dtype)
    output, weights = eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)
    return output, weights


def _mask_for(query: torch.Tensor, key: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Bool, (1, 1, positions, tokens): the newest positions attend all before them, or simply all."""
    count, tokens = query.shape[2], key.shape[2]
    mask = whole_mask(count, tokens).to(query.device)
    return mask.tril(tokens - count) if causal else mask


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
