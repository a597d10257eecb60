"""Numbers of PyTorch as the drive holds them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvattic.spec.elements import any_special, from_bits, to_bits
from kvattic.spec.formats import Element

__all__ = ["round_to_storage", "some_tokens", "to_drive"]

_STORAGE = {Element.FP16: torch.float16, Element.BF16: torch.bfloat16}


def round_to_storage(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Numbers as the drive holds them, in their own type: rounded once to nearest, ties to even."""
    if values.dtype == torch.float64:   # which torch would round to float32 first
        exact = from_bits(to_bits(values.detach().cpu().numpy(), element), element)
        return torch.from_numpy(exact).to(values.device, values.dtype)
    return values.to(_STORAGE[element]).to(values.dtype)


def to_drive(values: torch.Tensor, dim: int, element: Element) -> NDArray[Any]:
    """(rows, heads, tokens, dim) for the drive, whose head_dim may be larger: the rest is zero.

    Args:
        values: of all rows of the batch; rounded once, as `round_to_storage` does.
        dim: the drive's head_dim.
        element: its storage format.

    Returns:
        Bit patterns; float32 if any number is not finite, so that whoever takes it says which one.
    """
    if values.requires_grad or values.device.type != "cpu":
        values = values.detach().to("cpu")
    if values.dtype == torch.float64:
        values = round_to_storage(values, element)
    array: NDArray[Any] = values.to(_STORAGE[element]).view(torch.int16).numpy().view(np.uint16)
    if any_special(array, element):
        array = values.to(torch.float32).numpy()
    missing = dim - array.shape[-1]
    return np.pad(array, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else array


def some_tokens(values: NDArray[Any], tokens: NDArray[np.intp]) -> NDArray[Any]:
    """Some tokens, ascending, of (heads, tokens, dim)."""
    return values if len(tokens) == values.shape[1] else values[:, tokens]
