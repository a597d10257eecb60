"""Numbers of PyTorch as the drive holds them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvattic.spec.config import Config
from kvattic.spec.elements import any_special, from_bits, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import to_kv_bits

__all__ = ["round_to_kv", "round_to_storage", "some_tokens", "stand_for", "to_drive"]

_STORAGE = {Element.FP16: torch.float16, Element.BF16: torch.bfloat16}
_STORED = {KvFormat.FP8_E4M3: torch.float8_e4m3fn, KvFormat.FP8_E5M2: torch.float8_e5m2}


def round_to_storage(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Numbers as the drive holds them, in their own type: rounded once to nearest, ties to even."""
    if values.dtype == torch.float64:   # which torch would round to float32 first
        exact = from_bits(to_bits(values.detach().cpu().numpy(), element), element)
        return torch.from_numpy(exact).to(values.device, values.dtype)
    return values.to(_STORAGE[element]).to(values.dtype)


def round_to_kv(values: torch.Tensor, config: Config, scale: torch.Tensor | None = None) -> torch.Tensor:
    """K or V as numbers that the drive stores: divided by their scale, rounded once to nearest, ties to even.

    Args:
        values: (rows, kv_heads, tokens, elements).
        config: with the stored format.
        scale: what a stored 1.0 stands for, float32, (kv_heads,); None: 1.

    Returns:
        Of the same shape; not finite where a number is, or is too large for the format.
    """
    if scale is not None:
        wide = values if values.dtype == torch.float64 else values.float()
        values = wide / scale.to(wide.device, wide.dtype)[:, None, None]
    form = config.kv.encoding
    if form is None:
        return round_to_storage(values, config.element)
    if values.dtype == torch.float64:
        exact = from_bits(to_kv_bits(values.detach().cpu().numpy(), config.kv, config.element), config.element)
        return torch.from_numpy(exact).to(values.device)
    rounded = values.to(_STORED[config.kv]).float()
    if not form.infinities:     # what is too large may have become the largest number
        step = 2.0 ** ((1 << form.exponent_bits) - 1 - form.bias - form.fraction_bits)
        rounded = rounded.masked_fill(values.abs() > form.largest + step / 2, torch.nan)
    return rounded


def stand_for(stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What numbers that the drive stores stand for, in the model's type; arguments as of `round_to_kv`."""
    return (stored if scale is None else stored * scale.to(stored.device, stored.dtype)[:, None, None]).to(dtype)


def to_drive(values: torch.Tensor, dim: int, element: Element) -> NDArray[Any]:
    """(rows, heads, tokens, dim) for the drive, whose head_dim may be larger: the rest is zero.

    Args:
        values: of all rows of the batch; rounded once, as `round_to_storage` does.
        dim: the drive's head_dim.
        element: its storage format; K and V have been through `round_to_kv`.

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
