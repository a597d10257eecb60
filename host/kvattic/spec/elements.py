"""Floats to the 16-bit storage formats and back, and the array types of bit patterns and integers."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.spec.formats import Element

__all__ = ["Bits", "Booleans", "Bytes", "Integers", "any_special", "as_array", "from_bits", "special", "to_bits"]

Bits: TypeAlias = NDArray[np.uint16]
"""Elements as bit patterns."""
_MAGNITUDE = np.uint16(0x7FFF)
"""All but the sign."""
Integers: TypeAlias = NDArray[np.int64]
Booleans: TypeAlias = NDArray[np.bool_]
Bytes: TypeAlias = NDArray[np.uint8]


def as_array(values: Any) -> NDArray[Any]:
    """A caller's numbers as an array; torch's tensors of any device and dtype, too, without torch being imported.

    NumPy has no bfloat16: such numbers become float32, which holds them exactly.

    Raises:
        RequestError: a tensor has no numbers that could be read, such as one of the meta device.
    """
    if type(values) is np.ndarray and values.dtype.kind in "biuf":   # most are
        return values
    if any(each.__name__ == "Tensor" and each.__module__.partition(".")[0] == "torch" for each in type(values).__mro__):
        kind = str(values.dtype).removeprefix("torch.")
        try:
            tensor = values.detach().cpu()
            if kind == "bfloat16" or kind.startswith("float8"):
                tensor = tensor.float()
            return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise RequestError(f"this tensor, {kind} on {values.device}, has no numbers that NumPy can read: "
                               f"{str(error).partition(chr(10))[0]}") from error
    array = np.asarray(values)
    # Other libraries' bfloat16 and float8 (JAX's), by their names: the types are in a package of its own.
    return array.astype(np.float32) if array.dtype.name.startswith(("bfloat16", "float8")) else array


def to_bits(values: NDArray[Any], element: Element) -> NDArray[np.uint16]:
    """Bit patterns of the elements nearest to `values`, rounded once, ties to even.

    Args:
        values: float16, float32 or float64, of any shape.
        element: the format to round to.

    Returns:
        uint16 of the same shape; too large values become infinities, NaN stays NaN.

    Raises:
        TypeError: `values` is no array of these types.
    """
    values = np.asarray(values)
    if values.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"values must be float16, float32 or float64, not {values.dtype}")
    if element is Element.FP16:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.ascontiguousarray(values.astype(np.float16)).view(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.ascontiguousarray(values.astype(np.float32))
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # Rounding to float32 and then to bf16 would round twice.  An inexact float32 is moved to
        # its odd neighbour, which keeps what the second rounding needs to know.
        inexact = (single != values) & (bits & 1 == 0) & ~np.isnan(values)
        away = np.abs(single) > np.abs(values)
        bits = np.where(inexact, np.where(away, bits - 1, bits + 1), bits)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16], element: Element) -> NDArray[np.float32]:
    """The elements' values, exactly.

    Args:
        bits: uint16 of any shape.
        element: their format.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: `bits` is not uint16.
    """
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        raise TypeError(f"bits must be uint16, not {bits.dtype}")
    contiguous = np.ascontiguousarray(bits)
    if element is Element.FP16:
        return contiguous.view(np.float16).astype(np.float32)
    return (contiguous.astype(np.uint32) << 16).view(np.float32)


def special(bits: NDArray[np.uint16], element: Element) -> NDArray[np.bool_]:
    """Which elements are NaN or infinity.

    Args:
        bits: uint16 of any shape.
        element: their format.

    Returns:
        bool of the same shape.
    """
    ones = _special_from(element)
    found: NDArray[np.bool_] = (bits & ones) == ones
    return found


def any_special(bits: NDArray[np.uint16], element: Element) -> bool:
    """Whether any element is NaN or infinity; arguments are those of `special`."""
    return bool(np.maximum.reduce(bits & _MAGNITUDE, axis=None, initial=0) >= _special_from(element))


def _special_from(element: Element) -> np.uint16:
    """The exponent's ones: the least bit pattern of a NaN or infinity, but for the sign."""
    form = element.encoding
    return np.uint16(((1 << form.exponent_bits) - 1) << form.fraction_bits)
