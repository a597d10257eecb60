"""Number formats and fixed-point windows: the one source for golden model, RTL, driver and docs.

Every width of the datapath is stated here; docs/numerics.md proves what is lost at each end.

Elements
    An element of q is fp16 or bf16 (`Element`), and so is one of K or V unless `KvFormat` says otherwise; what is
    stored in 8 bits is widened to it exactly.  It is decoded exactly to
    ``(-1)**sign * significand * 2**(exponent - element.offset)`` with a significand of `SIGNIFICAND_BITS`.
    Subnormals are numbers.  NaN and infinity decode to zero and raise a flag.

Score window (log2 domain)
    Each product ``q[c] * k[c]`` is shifted by its own exponents and the exponent of the command's scale into a window
    with the least bit `2**-SCORE_WINDOW_FRACTION`; its magnitude is truncated.  The sum of all channels is multiplied
    once by the scale's 24-bit significand and rounded once (half up) to `SCORE_FRACTION` bits.

Weight
    ``2**(score - maximum)`` as `WEIGHT_BITS` of significand (1.x) with an exponent of its own; 1.0 is exact.

Value window
    Each product ``weight * v[c]`` and each weight is truncated in magnitude at `2**-VALUE_FRACTION`.
"""

from dataclasses import dataclass
from decimal import Decimal, localcontext
from enum import StrEnum
from functools import cache

SIGNIFICAND_BITS = 11
"""Bits of a decoded element's significand (fp16's; bf16's 8 are left-aligned)."""

SCALE_BITS = 24
"""Bits of the scale's significand: the command carries scale * log2(e) as an fp32."""
FP32_BIAS = 127
"""Bias of an fp32's exponent field."""

SCORE_FRACTION = 22
"""Fractional bits of a score (log2 domain)."""
SCORE_BITS = 41
"""Bits of a score, sign included: the range is -2**18 to 2**18 in steps of 2**-22."""
SCORE_MASKED = -(1 << (SCORE_BITS - 1))
"""The score that stands for 'not attended'; real scores saturate one step above it."""
SCORE_MIN = SCORE_MASKED + 1
SCORE_MAX = (1 << (SCORE_BITS - 1)) - 1

SCORE_WINDOW_FRACTION = 28
"""Fractional bits of a product q*k in the score window."""
SCORE_WINDOW_BITS = 46
"""Bits of a product's magnitude in the score window."""
SCORE_SUM_BITS = 55
"""Bits of the sum over at most 256 channels, sign included."""
SCALED_SUM_BITS = SCORE_WINDOW_BITS + 1
"""Bits of a sum that is scaled: one that does not fit makes a score beyond the range, whatever the scale."""
SCALE_CHUNK_BITS = 17
"""A sum is multiplied by the scale in three chunks of this width, each of which fits one DSP slice."""
SCORE_ROUND_SHIFT = SCALE_BITS - 1 + SCORE_WINDOW_FRACTION - SCORE_FRACTION
"""Bits that a scaled sum loses when it is rounded to a score."""

WEIGHT_BITS = 22
"""Bits of a weight's significand: 1.21, 1 for the maximum exactly."""
WEIGHT_EXPONENT_BITS = 6
"""A weight is significand * 2**-(exponent + 21); below 2**-63 it is zero."""

VALUE_FRACTION = 40
"""Fractional bits of the value window and of the denominator."""
WEIGHT_ALIGNMENT = VALUE_FRACTION - (WEIGHT_BITS - 1)
"""Left shift that aligns the significand of a weight of exponent 0 with the value window and the denominator."""
PRODUCT_BITS = WEIGHT_BITS + SIGNIFICAND_BITS
"""Bits of the cell's multiplier output."""
QUERY_SHIFT = WEIGHT_BITS - SIGNIFICAND_BITS
"""Left alignment of q's significand in the multiplier port that a weight uses in the V pass."""

# Sparse attention (docs/numerics.md, section 7).

MAGNITUDE_BITS = 40
"""Bits of |q[c]|, by which channels are ranked: clipped at the top."""
MAGNITUDE_FRACTION = 24
"""Fractional bits of it: every fp16 fits exactly, of bf16 what is finer is truncated."""
RATIO_FRACTION = 24
"""Fractional bits of sqrt(|q|_1 / |q_i|_1), by which the scale of the first pass is larger."""
LOG_BITS = 32
"""Bits of the mantissa that is squared, once for each fractional bit, to take log2 of a denominator."""
MASS_BITS = 36
"""Bits of a unit's approximate mass, by which units are ranked; all ones stands for a unit that must be taken."""
MASS_FRACTION = 30
"""Fractional bits of it."""
DIGIT_BITS = 6
"""Bits of a unit's rank (its mass, then the inverse of its first token's number) that one step of top-k decides."""
ALPHA_FRACTION = 24
"""Fractional bits of alpha, the share of the attended tokens in the approximate mass; 1 is exact."""

CODES_FRACTION = 8
"""Fractional bits of an entry of CODES: what two neighbouring features of a token add to its score sum."""
CODES_BITS = 20
"""Bits of an entry, sign included."""
CODES_SHIFT = SCORE_WINDOW_FRACTION - CODES_FRACTION
"""Bits that a product in the score window loses when it becomes part of an entry."""
CODES_SUM_BITS = CODES_BITS + 2
"""Bits of what a token's codes of an octet add to its score sum, sign included."""
CODES_LIMIT = (1 << (CODES_BITS - 1)) - 1
"""The largest magnitude of a product that becomes part of an entry; larger ones are clipped to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ElementFormat:
    """A 16-bit floating-point format of K, V and q.

    Attributes:
        name: `fp16` or `bf16`.
        exponent_bits: width of the exponent field.
        fraction_bits: width of the fraction field.
        bias: IEEE bias of the exponent field.
        value_window_bits: bits of a product weight*v's magnitude in the value window.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    value_window_bits: int

    @property
    def offset(self) -> int:
        """Value of an element is significand * 2**(exponent - offset), exponent being the field (1 if subnormal)."""
        return self.bias + SIGNIFICAND_BITS - 1

    @property
    def product_shift(self) -> int:
        """Left shift of the cell's product to the top of the value window, from where it is shifted right only."""
        return self.value_window_bits - PRODUCT_BITS

    @property
    def score_shift_min(self) -> int:
        """Smallest right shift of a product q*k from there: a smaller one would leave the score window."""
        return self.value_window_bits - SCORE_WINDOW_BITS

    @property
    def score_offset(self) -> int:
        """Place of a product q*k's least bit in the score window, where the exponent fields of q, k and scale are 0."""
        return SCORE_WINDOW_FRACTION - FP32_BIAS - 2 * self.offset

    @property
    def score_shift(self) -> int:
        """Right shift that brings a product q*k from there to the place 0; its own place makes the shift smaller."""
        return self.product_shift + QUERY_SHIFT

    @property
    def value_shift(self) -> int:
        """Right shift of a product weight*v from there; the weight's exponent makes it larger, v's field smaller."""
        return self.product_shift - (WEIGHT_ALIGNMENT - self.offset)

    @property
    def exponent_max(self) -> int:
        """The largest exponent field of a finite number."""
        return (1 << self.exponent_bits) - 2


class Element(StrEnum):
    """Names of the storage formats."""

    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def encoding(self) -> ElementFormat:
        """The bit fields of this format."""
        return _FORMATS[self]


_FORMATS = {
    Element.FP16: ElementFormat(name="fp16", exponent_bits=5, fraction_bits=10, bias=15, value_window_bits=57),
    Element.BF16: ElementFormat(name="bf16", exponent_bits=8, fraction_bits=7, bias=127, value_window_bits=61),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Format:
    """An 8-bit floating-point format of stored K and V (OCP 8-bit Floating Point Specification, revision 1.0).

    Attributes:
        name: as PyTorch and `KvFormat` have it.
        exponent_bits: width of the exponent field.
        fraction_bits: width of the fraction field.
        bias: of the exponent field.
        infinities: the largest exponent field stands for infinity and NaN, as in IEEE 754; otherwise it is one of
            numbers, and only all ones is NaN.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    infinities: bool

    @property
    def largest(self) -> float:
        """The largest number."""
        field = (1 << self.exponent_bits) - 1 - self.infinities
        fraction = (1 << self.fraction_bits) - 1 - (not self.infinities)
        return float(2.0 ** (field - self.bias) * (1 + fraction / (1 << self.fraction_bits)))


class KvFormat(StrEnum):
    """How K and V are stored in flash and device DRAM; `Config.kv`."""

    ELEMENT = "element"
    """As elements: fp16 or bf16, whatever q is."""
    FP8_E4M3 = "fp8_e4m3"
    """8 bits: sign, 4 of exponent, 3 of fraction; no infinity, up to 448."""
    FP8_E5M2 = "fp8_e5m2"
    """8 bits: sign, 5 of exponent, 2 of fraction; up to 57,344."""

    @property
    def encoding(self) -> Fp8Format | None:
        """The bit fields of what is stored; None: those of the element."""
        return _STORED.get(self)

    @property
    def element_bytes(self) -> int:
        """Bytes that an element of K or V takes where it is stored."""
        return 2 if self.encoding is None else 1


_STORED = {
    KvFormat.FP8_E4M3: Fp8Format(name="float8_e4m3fn", exponent_bits=4, fraction_bits=3, bias=7, infinities=False),
    KvFormat.FP8_E5M2: Fp8Format(name="float8_e5m2", exponent_bits=5, fraction_bits=2, bias=15, infinities=True),
}

EXP_SEGMENTS = 64
"""Segments of the quadratic 2**f table on [0, 1)."""
EXP_FRACTION = 26
"""Fractional bits of the table's coefficients and of the polynomial before its one rounding."""
EXP_STEP_BITS = SCORE_FRACTION - 6
"""Bits of the position inside a segment."""
EXP_C0_BITS, EXP_C1_BITS, EXP_C2_BITS = 27, 21, 13
"""Widths of the (all non-negative) coefficients."""
WEIGHT_ROUND_SHIFT = EXP_FRACTION - (WEIGHT_BITS - 1)
"""Bits that the polynomial loses when it is rounded to a weight's significand."""


@cache
def exp_table() -> tuple[tuple[int, int, int], ...]:
    """Coefficients (c0, c1, c2) of 2**f for each segment, as integers with `EXP_FRACTION` fractional bits.

    With t the position inside the segment, 0 <= t < 1:  2**f = c0 + c1*t + c2*t**2, a Chebyshev interpolation
    (largest error 1.3e-8 before the coefficients are rounded).  Computed in decimal arithmetic, so that every
    machine makes the same table.
    """
    with localcontext() as context:
        context.prec = 40
        root3 = Decimal(3).sqrt()
        nodes = [(1 - root3 / 2) / 2, Decimal("0.5"), (1 + root3 / 2) / 2]
        one = Decimal(1 << EXP_FRACTION)
        table = []
        for segment in range(EXP_SEGMENTS):
            y0, y1, y2 = (Decimal(2) ** ((segment + node) / EXP_SEGMENTS) for node in nodes)
            # Newton's divided differences, then expanded to powers of t.
            d01 = (y1 - y0) / (nodes[1] - nodes[0])
            d12 = (y2 - y1) / (nodes[2] - nodes[1])
            c2 = (d12 - d01) / (nodes[2] - nodes[0])
            c1 = d01 - c2 * (nodes[0] + nodes[1])
            c0 = y0 - d01 * nodes[0] + c2 * nodes[0] * nodes[1]
            table.append((int((c0 * one).to_integral_value()), int((c1 * one).to_integral_value()),
                          int((c2 * one).to_integral_value())))
    return tuple(table)
