"""Numbers of PyTorch as the drive holds them."""

import numpy as np
import torch
from numpy.typing import NDArray

from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element

__all__ = ["round_to_storage", "to_drive"]

_STORAGE = {Element.FP16: torch.float16, Element.BF16: torch.bfloat16}


def round_to_storage(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Numbers as the drive holds them, in their own type: rounded once to nearest, ties to even."""
    if values.dtype == torch.float64:   # which torch would round to float32 first
        exact = from_bits(to_bits(values.detach().cpu().numpy(), element), element)
        return torch.from_numpy(exact).to(values.device, values.dtype)
    return values.to(_STORAGE[element]).to(values.dtype)


def to_drive(values: torch.Tensor, dim: int) -> NDArray[np.float32]:
    """(heads, tokens, dim) for the drive, whose head_dim may be larger: the rest is zero."""
    array: NDArray[np.float32] = values.detach().to("cpu", torch.float32).numpy()
    missing = dim - array.shape[-1]
    return np.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array
