"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model's linear layers, and weights as q8_0 keeps them.

    model = adapt(model, rank=8)          # trained by lm/train_intents.py
    save(model, path)
    merge(model, load(path))              # into a model without adapters
    quantise(model)

It needs torch and, for `quantise`, gguf (the extra `quality`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["TARGETS", "LowRank", "adapt", "load", "merge", "quantise", "save"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers that get adapters, by the end of their names: all of a block."""
SCALE = 2.0
"""An adapter's product counts so many times, LoRA's alpha over the rank."""


class LowRank(torch.nn.Module):
    """A frozen linear layer, and two thin matrices whose product is added to its weights.

    Args:
        linear: the layer.
        rank: columns of `up`, rows of `down`.

    Attributes:
        down: (rank, inputs), random at first.
        up: (outputs, rank), zero at first.
    """

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features ** -0.5)
        self.up = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: Any) -> Any:
        """The layer with its adapter."""
        low = torch.nn.functional.linear(inputs, self.down)
        return self.linear(inputs) + torch.nn.functional.linear(low, self.up) * SCALE


def adapt(model: Any, *, rank: int) -> list[Any]:
    """Freeze a model, and give adapters to its `TARGETS`.

    Args:
        model: of torch; changed.
        rank: of the adapters.

    Returns:
        Their parameters.

    Raises:
        ValueError: the rank is not positive, or the model has no such layers.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]
    if not names:
        raise ValueError(f"the model has no layer whose name ends with one of {', '.join(TARGETS)}")
    for name in names:
        model.set_submodule(name, LowRank(model.get_submodule(name), rank))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(model: Any, path: Path) -> None:
    """Write a model's adapters to an .npz, in fp16."""
    arrays: dict[str, Any] = {f"{name}.{which}": getattr(layer, which).detach().to(torch.float16).numpy()
                              for name, layer in model.named_modules() if isinstance(layer, LowRank)
                              for which in ("down", "up")}
    np.savez(path, **arrays)


def load(path: Path) -> dict[str, NDArray[np.float16]]:
    """Adapters that `save` wrote: arrays by layer and matrix."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def merge(model: Any, adapters: Mapping[str, NDArray[np.float16]]) -> None:
    """Add adapters to the weights of a model.

    Args:
        model: without adapters; changed.
        adapters: of `load`.

    Raises:
        ValueError: an adapter is of another layer, or has another shape.
    """
    for name in [name.removesuffix(".up") for name in adapters if name.endswith(".up")]:
        up, down = (torch.from_numpy(adapters[f"{name}.{which}"].astype(np.float32)) for which in ("up", "down"))
        try:
            weight = model.get_submodule(name).weight
        except AttributeError:
            raise ValueError(f"the adapters are of layer {name}, which the model has not") from None
        if (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise ValueError(f"the adapter of {name} must be of weights {tuple(weight.shape)}, not "
                             f"{(up.shape[0], down.shape[1])}")
        with torch.no_grad():
            weight += (up @ down).to(weight.dtype) * SCALE


def quantise(model: Any) -> int:
    """Round all matrices of a model to what GGUF's q8_0 keeps of them: 32 int8 with an fp16 scale.

    Vectors stay as they are, as in GGUF files.

    Args:
        model: of torch, in float32; changed.

    Returns:
        Bytes of the quantised matrices.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind, size = GGMLQuantizationType.Q8_0, 0
    for parameter in model.parameters():    # one that layers share comes once
        if parameter.dim() == 2:
            blocks = quantize(parameter.detach().numpy(), kind)
            size += blocks.nbytes
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(dequantize(blocks, kind)))
    return size
