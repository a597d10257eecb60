"""U-Nets of diffusers through diffusers' registry of attention backends, which their own layers do not ask.

    dispatch_unet(model)
    with kvattic.open("model", config) as device, in_drive(device) as attention:
        model(latents, step, encoder_hidden_states=text)
    print(attention.kept.writes)    # of the text, however many steps there are

Self-attention has K and V of its own positions, new in each step.  Cross-attention has those of the text, which do not
depend on the step: they go by the name of their layer (`DriveAttention`'s `kept`).  It needs diffusers (the extra
`diffusion`).
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

from kvattic import RequestError

__all__ = ["Dispatched", "dispatch_unet"]

PLAIN = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
"""What diffusers' layers may have besides, and those of such U-Nets do not."""


class Dispatched:
    """An attention processor of diffusers whose attention goes through their registry.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of a layer.

        Args:
            attn: the layer, diffusers' `Attention`.
            hidden_states: (batch, positions, features).
            encoder_hidden_states: of the text; None: self-attention.
            attention_mask: for the backend, most of which refuse it.
            temb: not used by such layers.

        Raises:
            RequestError: the layer has norms or a residual connection of its own.
        """
        del temb
        if odd := [name for name in PLAIN if getattr(attn, name) not in (None, False)]:
            raise RequestError(f"layer {self.name} has {', '.join(odd)}; layers of a transformer block have none, and "
                               "only these can be dispatched")
        crossed = encoder_hidden_states is not None
        context = encoder_hidden_states if crossed else hidden_states
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (
            attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        # The registry drops arguments that a backend does not have.
        output = dispatch_attention_fn(query, key, value, attn_mask=attention_mask,
                                       attention_kwargs={"kept": self.name} if crossed else {})
        projected = attn.to_out[0](output.flatten(2).to(query.dtype))
        return attn.to_out[1](projected) / attn.rescale_output_factor


def dispatch_unet(model: UNet2DConditionModel) -> None:
    """Let all attention of a U-Net go through diffusers' registry."""
    model.set_attn_processor({name: Dispatched(name.removesuffix(".processor")) for name in model.attn_processors})
