"""The page layout, one source for all sides: how a page looks and where each token lies in flash.

Page
    A codeword holds `Config.tokens_per_codeword` whole tokens of one head: token t's head_dim
    elements, 16 bits each, little-endian, in order.  What is left of the codeword is zero.  A page
    holds `Config.codewords_per_page` codewords, and so `Config.tokens_per_page` consecutive tokens
    of one head: a *stripe*.  K and V have pages of their own.  Tokens that were not written are
    zero.

Placement
    Stripes go round the channels.  With ``u = stripe + head % channels`` the stripe lies on
    channel ``u % channels``, in page row ``u // channels``; its page on that channel is the head's
    base page (one for K, one for V) plus the row.  So heads start on different channels, and a
    head's pages are consecutive on each channel.

Start of a job
    A job reads stripes first, first + 1, ... and first need not be 0.  The device knows only the
    channel ``home`` of the job's first stripe and that stripe's page.  Let
    ``u0 = first + head % channels = row0 * channels + home``.  The job's stripe i has
    ``u = u0 + i = row0 * channels + (home + i)``.  As row0 * channels is a multiple of channels,

        channel = (home + i) % channels,    page = base + row0 + (home + i) // channels.

    The command therefore carries home = u0 % channels and key_page = base + row0.  A lane c >= home
    meets its first stripe at i = c - home, in row row0.  A lane c < home meets it at i = c +
    channels - home, where home + i = c + channels: one row further.  Each lane then takes its
    following pages one by one, for every channels-th stripe.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.config import ELEMENT_BYTES, Config
from kvattic.elements import to_bits
from kvattic.errors import RequestError
from kvattic.formats import Element

__all__ = [
    "TOKEN_BITS",
    "Place",
    "device_place",
    "job_place",
    "pack_pages",
    "page_rows",
    "place",
    "storage_bits",
    "stripe_count",
    "unpack_pages",
]

Bits: TypeAlias = NDArray[np.uint16]
Pages: TypeAlias = NDArray[np.uint8]


TOKEN_BITS = 24
"""Bits of a token number inside the engine: a sequence's tokens are numbered below 2**24."""


class Place(NamedTuple):
    """Where a page lies; both may be arrays.

    Members:
        channel: flash channel.
        page: page number on that channel.
    """

    channel: Any
    page: Any


# Elements.


def storage_bits(values: ArrayLike, element: Element, name: str = "values") -> Bits:
    """A caller's numbers in the storage format, checked.

    Args:
        values: float16, float32 or float64 of any shape, rounded once to nearest, ties to even; or
            uint16, which are taken as bit patterns already and not looked at.
        element: the storage format.
        name: what error messages call the array.

    Returns:
        uint16 bit patterns of the same shape, C-contiguous.

    Raises:
        RequestError: another dtype; or a number that is NaN, infinite or too large for the format.
    """
    array = np.asarray(values)
    if array.dtype == np.uint16:
        return np.ascontiguousarray(array, np.uint16)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(
            f"{name} must be float16, float32 or float64, or uint16 bit patterns of "
            f"{element.value}, not {array.dtype}"
        )
    bits = to_bits(array, element)
    form = element.encoding
    ones = np.uint16(((1 << form.exponent_bits) - 1) << form.fraction_bits)
    special = (bits & ones) == ones
    if special.any():
        where = tuple(int(i) for i in np.argwhere(special)[0])
        raise RequestError(
            f"{name}{list(where)} is {array[where]}: it must be finite and within the range of "
            f"{element.value}"
        )
    return bits


# Pages.


def stripe_count(tokens: int, config: Config) -> int:
    """Stripes that this many tokens take."""
    return -(-tokens // config.tokens_per_page)


def pack_pages(bits: Bits, config: Config) -> Pages:
    """Page images of consecutive tokens of one head, the first at the start of a stripe.

    Args:
        bits: uint16, (tokens, head_dim).
        config: geometry.

    Returns:
        uint8, (stripe_count(tokens), page_bytes).

    Raises:
        RequestError: wrong dtype or shape.
    """
    if bits.dtype != np.uint16 or bits.ndim != 2 or bits.shape[1] != config.head_dim:
        raise RequestError(
            f"tokens must be uint16 (tokens, {config.head_dim}), not {bits.dtype} {bits.shape}"
        )
    stripes = stripe_count(len(bits), config)
    tokens = np.zeros((stripes * config.tokens_per_page, config.head_dim), "<u2")
    tokens[: len(bits)] = bits
    used = config.tokens_per_codeword * config.token_bytes
    images = np.zeros((stripes, config.codewords_per_page, config.codeword_bytes), np.uint8)
    images[:, :, :used] = tokens.view(np.uint8).reshape(stripes, config.codewords_per_page, used)
    return images.reshape(stripes, config.page_bytes)


def unpack_pages(images: Pages, config: Config) -> Bits:
    """The tokens of consecutive stripes: the inverse of `pack_pages`.

    Args:
        images: uint8, (pages, page_bytes).
        config: geometry.

    Returns:
        uint16, (pages * tokens_per_page, head_dim).

    Raises:
        RequestError: wrong dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != config.page_bytes:
        raise RequestError(
            f"pages must be uint8 (pages, {config.page_bytes}), not {images.dtype} {images.shape}"
        )
    codewords = images.reshape(len(images), config.codewords_per_page, config.codeword_bytes)
    used = np.ascontiguousarray(
        codewords[:, :, : config.tokens_per_codeword * config.head_dim * ELEMENT_BYTES]
    )
    return used.view("<u2").astype(np.uint16).reshape(-1, config.head_dim)


# Placement.


def place(stripe: Any, head: int, base_page: int, config: Config) -> Place:
    """Where a stripe of a head lies.

    Args:
        stripe: number of the stripe, or an integer array of them.
        head: number of the head; any numbering will do that gives the heads that are read together
            different ones.
        base_page: first page of the head's K (or V), the same on all channels.
        config: geometry.
    """
    u = stripe + head % config.channels
    return Place(u % config.channels, base_page + u // config.channels)


def page_rows(stripes: int, head: int, config: Config) -> int:
    """Pages that a head's K (or V) takes on every channel, from its base page on."""
    return -(-(stripes + head % config.channels) // config.channels)


def job_place(stripe: int, head: int, base_page: int, config: Config) -> Place:
    """A command's (home, key_page or value_page) when `stripe` is the first that its job reads."""
    return place(stripe, head, base_page, config)


def device_place(index: Any, home: int, page: int, config: Config) -> Place:
    """Where the device, knowing a command's home and page, finds stripe(s) `index` of its job."""
    u = home + index
    return Place(u % config.channels, page + u // config.channels)
