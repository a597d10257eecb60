"""K and V as they are stored (`Config.kv`): rounding to the stored format, and codes to elements and back, exactly.

Golden model, driver and results have K and V as bit patterns of the element (`Bits`) everywhere, of values that the
stored format has; codes are only in pages, in device DRAM and in what a READ writes.  A *code* is uint16, the bit
pattern of an element, or uint8 in the 8-bit formats.
"""

from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import RequestError
from kvattic.spec.elements import Bits, to_bits
from kvattic.spec.formats import Element, Fp8Format, KvFormat

__all__ = ["Codes", "code_values", "element_table", "first_foreign", "format_of", "narrow", "to_kv_bits", "widen"]

Codes: TypeAlias = NDArray[np.uint16] | NDArray[np.uint8]
"""K or V as stored: uint16, or uint8 in the 8-bit formats."""


class _Tables(NamedTuple):
    """Between codes and elements.

    Members:
        elements: uint16, (256,), the element of each code.
        codes: int16, (65536,), the code of each element; -1 where there is none.
    """

    elements: Bits
    codes: NDArray[np.int16]


def code_values(form: Fp8Format) -> NDArray[np.float32]:
    """The value of each code: float32, (256,), with NaN and, where the format has them, infinities."""
    code = np.arange(256, dtype=np.int64)
    field = code >> form.fraction_bits & (1 << form.exponent_bits) - 1
    fraction = code & (1 << form.fraction_bits) - 1
    significand = np.where(field > 0, fraction | 1 << form.fraction_bits, fraction)
    size = np.ldexp(significand.astype(np.float32), np.maximum(field, 1) - form.bias - form.fraction_bits)
    top = field == (1 << form.exponent_bits) - 1
    if form.infinities:
        size[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    else:
        size[top & (fraction == (1 << form.fraction_bits) - 1)] = np.nan
    values: NDArray[np.float32] = np.copysign(size, np.where(code >> 7, np.float32(-1), np.float32(1)))
    return values


@cache
def _tables(kv: KvFormat, element: Element) -> _Tables:
    form = kv.encoding
    assert form is not None
    values, code = code_values(form), np.arange(256)
    elements = to_bits(values, element)
    # A NaN keeps its fraction at the top of the element's, so that it comes back; one without any has the quiet bit.
    nan, wide = np.isnan(values), element.encoding
    payload = (code & (1 << form.fraction_bits) - 1) << wide.fraction_bits - form.fraction_bits
    ones = (1 << wide.exponent_bits) - 1 << wide.fraction_bits
    elements[nan] = (code >> 7 << 15 | ones | payload)[nan]
    codes = np.full(1 << 16, -1, np.int16)
    codes[elements] = code
    return _Tables(elements, codes)


def element_table(kv: KvFormat, element: Element) -> Bits | None:
    """The element of each code: uint16, (256,); None where codes are elements."""
    return None if kv.encoding is None else _tables(kv, element).elements


def widen(codes: Codes, kv: KvFormat, element: Element) -> Bits:
    """Elements of codes, exactly; NaN stays NaN, infinity infinity.

    Args:
        codes: uint16 or uint8 of any shape, as the format has them.
        kv: the stored format.
        element: of what.

    Returns:
        uint16 of the same shape.
    """
    if kv.encoding is None:
        return codes.astype(np.uint16, copy=False)
    return _tables(kv, element).elements[codes]


def narrow(bits: Bits, kv: KvFormat, element: Element) -> Codes:
    """Codes of elements: the inverse of `widen`.

    Args:
        bits: uint16 of any shape.
        kv: the stored format.
        element: what bits are.

    Returns:
        Little-endian uint16, or uint8, of the same shape.

    Raises:
        RequestError: an element's value is none of the stored format's.
    """
    if kv.encoding is None:
        return bits.astype("<u2", copy=False)
    codes = _tables(kv, element).codes[bits]
    if codes.size and codes.min() < 0:
        where = first_foreign(bits, kv, element)
        raise RequestError(f"elements of K and V must be numbers of {kv.value}, not the bit pattern "
                           f"{int(bits[where]):#06x} of {element.value}")
    return codes.astype(np.uint8)


def first_foreign(bits: Bits, kv: KvFormat, element: Element) -> tuple[int, ...] | None:
    """Where the first element is whose value the stored format does not have; None: there is none."""
    if kv.encoding is None:
        return None
    foreign = _tables(kv, element).codes[bits] < 0
    return tuple(int(i) for i in np.argwhere(foreign)[0]) if foreign.any() else None


def to_kv_bits(values: NDArray[Any], kv: KvFormat, element: Element) -> Bits:
    """Elements of the stored format's numbers that are nearest to `values`, rounded once, ties to even.

    Args:
        values: float16, float32 or float64, of any shape.
        kv: the stored format.
        element: of the result.

    Returns:
        uint16 of the same shape; too large values become infinities, or NaN in a format that has none; NaN stays NaN.

    Raises:
        TypeError: `values` is no array of these types.
    """
    form = kv.encoding
    if form is None:
        return to_bits(values, element)
    if values.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"values must be float16, float32 or float64, not {values.dtype}")
    with np.errstate(invalid="ignore"):     # NaN
        exact = values.astype(np.float64)
        # The step of the format's numbers around a value; scaling by a power of two is exact.
        exponent = np.maximum(np.frexp(exact)[1] - 1, 1 - form.bias) - form.fraction_bits
        rounded = np.ldexp(np.rint(np.ldexp(exact, -exponent)), exponent)
        beyond = np.abs(rounded) > form.largest
    rounded[beyond] = np.copysign(np.inf if form.infinities else np.nan, rounded[beyond])
    bits = to_bits(rounded, element)
    nan = np.isnan(rounded)
    if nan.any():
        quiet = _tables(kv, element).elements[0x7F]
        bits[nan] = quiet | np.signbit(rounded[nan]).astype(np.uint16) << np.uint16(15)
    return bits


_NAMES = {form.encoding.name: form for form in KvFormat if form.encoding is not None}


def format_of(values: Any) -> KvFormat | None:
    """The stored format that an array's or tensor's dtype is; None: it is another one."""
    name = str(getattr(values, "dtype", "")).removeprefix("torch.")
    return _NAMES.get(name)
