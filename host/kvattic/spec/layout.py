"""The layout of K and V, one source for all sides: how a page looks, what a stripe is, how pages are numbered.

Token layout
    A codeword holds `Config.tokens_per_codeword` whole tokens of one head: token t's head_dim elements, 16 bits each,
    little-endian, in order; or 8 bits each (`Config.kv`).  What is left of the codeword is zero.  A page holds
    `Config.codewords_per_page` codewords, and so `Config.tokens_per_page` consecutive tokens of one head.
    K and V have pages of their own.

Feature layout
    K again, for sparse attention: a codeword holds one feature of `Config.group_tokens` consecutive tokens of one head,
    in order; a page holds codewords_per_page consecutive features of the same tokens.

Centroids
    For sparse attention without a second copy of K: a mean key for each unit of some codewords of K, in the token
    layout, as if it were a token.  The mean keys of a stripe fill whole codewords (`centroid_codewords`), which follow
    each other; those of several stripes share a page.

Codes
    For sparse attention by a copy of K of 2 bits (`kvattic.spec.codes`): a codeword of codes, an octet, has eight
    features of all tokens of a stripe.  Those of a stripe follow each other, and several stripes share a page, as
    centroids do.

Stripe
    The tokens of a head are cut into stripes: `stripe_pages` pages of K and as many of V, with consecutive page
    numbers each.  All pages of a stripe lie on one flash channel, or wait in device DRAM, where K and V look the same.
    A stripe is one page of tokens; for sparse attention, the tokens of a feature-layout codeword, and its
    feature-layout pages are as many as of K.  Stripes go round the channels (`stripe_channel`).

Page numbers
    The page number on a channel is, from the low bits on: plane, die, page of the block, zone (`page_number`).

docs/placement.md has the reasons and a picture.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY, Record, TableFlag
from kvattic.spec.config import Config
from kvattic.spec.elements import Bits, as_array, from_bits, special, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import Codes, first_foreign, format_of, narrow, to_kv_bits, widen

__all__ = [
    "TOKEN_BITS",
    "Block",
    "Entries",
    "PagePlace",
    "Sketches",
    "centroid_codewords",
    "kv_bits",
    "mark_whole",
    "mean_keys",
    "pack_codes",
    "pack_entries",
    "pack_feature_pages",
    "pack_pages",
    "pack_sketches",
    "packed_pages",
    "packed_place",
    "page_number",
    "page_place",
    "storage_bits",
    "stripe_channel",
    "stripe_pages",
    "token_offset",
    "unit_bits",
    "unpack_codes",
    "unpack_entries",
    "unpack_feature_pages",
    "unpack_pages",
    "unpack_sketches",
]

Pages: TypeAlias = NDArray[np.uint8]


TOKEN_BITS = 24
"""Bits of a token number inside the engine: a sequence's tokens are numbered below 2**24."""


class PagePlace(NamedTuple):
    """What a page number on a channel says; all may be arrays.

    Members:
        zone: zone, which the controller's map turns into a block of each plane.
        page: page of the block.
        die: die of the channel.
        plane: plane of the die.
    """

    zone: Any
    page: Any
    die: Any
    plane: Any


class Block(NamedTuple):
    """A physical block, the unit that wears out and goes bad.

    Members:
        channel: flash channel.
        die: die of the channel.
        plane: plane of the die.
        block: block of the plane.
    """

    channel: int
    die: int
    plane: int
    block: int

    def __str__(self) -> str:
        return f"channel {self.channel}, die {self.die}, plane {self.plane}, block {self.block}"


class Entries(NamedTuple):
    """Table entries taken apart (`commands.TABLE_ENTRY`), int64 arrays of one shape.

    Members:
        channel: whose lane attends the stripe.
        key_page: first page of K.
        value_page: first page of V.
        dram: where the pages lie: 1 in device DRAM, 0 in flash.
        whole: sparse modes: 1: the stripe is attended whole, as one in device DRAM always is.
    """

    channel: NDArray[np.int64]
    key_page: NDArray[np.int64]
    value_page: NDArray[np.int64]
    dram: NDArray[np.int64]
    whole: NDArray[np.int64]


class Sketches(NamedTuple):
    """Sketch entries taken apart (`commands.SKETCH_ENTRY`), int64 arrays of one shape.

    Members:
        page: first page of the feature layout, or page of the first codeword of centroids or codes.
        codeword: of that page; 0 for the feature layout.
        written: 1: the sketch was written.
    """

    page: NDArray[np.int64]
    codeword: NDArray[np.int64]
    written: NDArray[np.int64]


# Elements.


def storage_bits(values: ArrayLike, element: Element, name: str = "values") -> Bits:
    """A caller's numbers in the storage format, checked.

    Args:
        values: float16, float32, float64 or bfloat16 of any shape, arrays or torch's tensors, rounded once to
            nearest, ties to even; or uint16, which are taken as bit patterns and not checked.
        element: the storage format.
        name: what error messages call the array.

    Returns:
        uint16 bit patterns of the same shape, C-contiguous.

    Raises:
        RequestError: another dtype; or a number that is NaN, infinite or too large for the format.
    """
    array = as_array(values)
    if array.dtype == np.uint16:
        return np.ascontiguousarray(array, np.uint16)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(f"{name} must be float16, bfloat16, float32 or float64, or uint16 bit patterns of "
                           f"{element.value}, not {array.dtype}")
    bits = to_bits(array, element)
    if (bad := special(bits, element)).any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RequestError(f"{name}{list(where)} is {array[where]}: it must be finite and within the range of "
                           f"{element.value}")
    return bits


def kv_bits(values: ArrayLike, config: Config, name: str = "values", scale: ArrayLike | None = None) -> Bits:
    """A caller's K or V as it is stored, checked.

    Args:
        values: float16, float32, float64 or bfloat16 of any shape, arrays or torch's tensors, rounded once to the
            nearest number of the stored format, ties to even; or in that format already: float8 where `Config.kv` is
            the same, or uint16, which are taken as bit patterns of `Config.element` and, where K and V are stored so,
            not checked.
        config: with the stored format.
        name: what error messages call the array.
        scale: what stands for a stored 1.0, of a shape that broadcasts; numbers are divided by it before they are
            rounded (in float32, float64 ones in float64), what is in the stored format already is not.  None: 1.0.

    Returns:
        uint16 bit patterns of `Config.element` of the same shape, C-contiguous.

    Raises:
        RequestError: another dtype; a number that is NaN, infinite or too large for the format; a bit pattern whose
            value the format does not have; or float8 of another format than the drive's 8-bit one.
    """
    kv, element = config.kv, config.element
    given = format_of(values)
    if given is not None and kv not in (given, KvFormat.ELEMENT):
        raise RequestError(f"{name} is {given.value}, but this drive stores K and V as {kv.value}, and formats cannot "
                           "be mixed: give numbers of 16 bits or more to have them rounded")
    array = as_array(values)
    if scale is not None and given is None and array.dtype in (np.float16, np.float32, np.float64):
        array = array / np.asarray(scale, np.promote_types(array.dtype, np.float32))
    if kv is KvFormat.ELEMENT:
        return storage_bits(array, element, name)
    if array.dtype == np.uint16:
        if (where := first_foreign(array, kv, element)) is not None:
            raise RequestError(f"{name}{list(where)} has the bit pattern {int(array[where]):#06x} of {element.value}, "
                               f"which is no number of {kv.value}: give floats to have them rounded")
        return np.ascontiguousarray(array, np.uint16)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(f"{name} must be float16, bfloat16, float32, float64 or {kv.value}, or uint16 bit patterns "
                           f"of {element.value}, not {array.dtype}")
    bits = to_kv_bits(array, kv, element)
    if (bad := special(bits, element)).any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RequestError(f"{name}{list(where)} is {array[where]}: it must be finite and within the range of "
                           f"{kv.value}, which a scale can bring it into (create_sequence)")
    return bits


# Pages.


def pack_pages(bits: Bits, config: Config) -> Pages:
    """Page images, in the token layout, of consecutive tokens of one head, the first at the start of a page.

    Args:
        bits: uint16, (tokens, head_dim).
        config: geometry.

    Returns:
        uint8, (ceil(tokens / tokens_per_page), page_bytes); the rest of the last page is zero.

    Raises:
        RequestError: wrong dtype or shape, or a value that the stored format does not have.
    """
    _check_tokens(bits, config)
    pages = -(-len(bits) // config.tokens_per_page)
    codes = pack_codes(bits, config)
    tokens = np.zeros((pages * config.tokens_per_page, config.head_dim), codes.dtype)
    tokens[: len(bits)] = codes
    used = config.tokens_per_codeword * config.token_bytes
    if used == config.codeword_bytes:
        return tokens.view(np.uint8).reshape(pages, config.page_bytes)
    images = np.zeros((pages, config.codewords_per_page, config.codeword_bytes), np.uint8)
    images[:, :, :used] = tokens.view(np.uint8).reshape(pages, config.codewords_per_page, used)
    return images.reshape(pages, config.page_bytes)


def unpack_pages(images: Pages, config: Config) -> Bits:
    """The tokens of pages in the token layout: the inverse of `pack_pages`.

    Args:
        images: uint8, (pages, page_bytes).
        config: geometry.

    Returns:
        uint16, (pages * tokens_per_page, head_dim).

    Raises:
        RequestError: wrong dtype or shape.
    """
    _check_pages(images, config)
    codewords = images.reshape(len(images), config.codewords_per_page, config.codeword_bytes)
    used = np.ascontiguousarray(codewords[:, :, : config.tokens_per_codeword * config.token_bytes])
    return unpack_codes(used, config).reshape(-1, config.head_dim)


def pack_feature_pages(bits: Bits, config: Config) -> Pages:
    """Page images, in the feature layout, of K of whole stripes of one head.

    Args:
        bits: uint16, (stripes * group_tokens, head_dim).
        config: geometry.

    Returns:
        uint8, (stripes * stripe_pages(config, sparse=True), page_bytes).

    Raises:
        ConfigError: the configuration cannot have the feature layout.
        RequestError: wrong dtype or shape, tokens that are not whole stripes, or a value that the stored format does
            not have.
    """
    tokens = stripe_pages(config, sparse=True) * config.tokens_per_page
    _check_tokens(bits, config)
    if len(bits) % tokens:
        raise RequestError(f"the feature layout takes whole stripes of {tokens} tokens, not {len(bits)} tokens")
    stripes, codewords = len(bits) // tokens, tokens // config.tokens_per_codeword
    codes = pack_codes(bits, config)
    features = np.zeros((stripes, codewords, tokens), codes.dtype)
    features[:, : config.head_dim] = codes.reshape(stripes, tokens, config.head_dim).swapaxes(1, 2)
    return features.view(np.uint8).reshape(-1, config.page_bytes)


def unpack_feature_pages(images: Pages, config: Config) -> Bits:
    """The tokens of pages in the feature layout: the inverse of `pack_feature_pages`.

    Args:
        images: uint8, (stripes * stripe_pages(config, sparse=True), page_bytes).
        config: geometry.

    Returns:
        uint16, (stripes * group_tokens, head_dim).

    Raises:
        ConfigError: the configuration cannot have the feature layout.
        RequestError: wrong dtype or shape, or pages that are not whole stripes.
    """
    pages = stripe_pages(config, sparse=True)
    _check_pages(images, config)
    if len(images) % pages:
        raise RequestError(f"the feature layout has {pages} pages in a stripe: {len(images)} are not whole stripes")
    tokens = pages * config.tokens_per_page
    codes = np.ascontiguousarray(images).reshape(-1, pages * config.codewords_per_page, config.codeword_bytes)
    features = unpack_codes(np.ascontiguousarray(codes[:, : config.head_dim]), config)
    return np.ascontiguousarray(features.reshape(-1, config.head_dim, tokens).swapaxes(1, 2)).reshape(
        -1, config.head_dim)


def pack_codes(bits: Bits, config: Config) -> Codes:
    """K or V as it is stored: little-endian uint16, or uint8 in an 8-bit format, of the shape of `bits`.

    Args:
        bits: uint16 bit patterns of `Config.element`, of any shape.
        config: with the stored format.

    Raises:
        RequestError: a value that the stored format does not have.
    """
    return narrow(bits, config.kv, config.element)


def unpack_codes(data: Pages, config: Config) -> Bits:
    """Bit patterns of K or V from its bytes.

    Args:
        data: uint8, C-contiguous, (..., bytes).
        config: with the stored format.

    Returns:
        uint16, (..., elements).
    """
    return widen(data if config.kv_element_bytes == 1 else data.view("<u2"), config.kv, config.element)


def _check_tokens(bits: Bits, config: Config) -> None:
    if bits.dtype != np.uint16 or bits.ndim != 2 or bits.shape[1] != config.head_dim:
        raise RequestError(f"tokens must be uint16 (tokens, {config.head_dim}), not {bits.dtype} {bits.shape}")


def _check_pages(images: Pages, config: Config) -> None:
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != config.page_bytes:
        raise RequestError(f"pages must be uint8 (pages, {config.page_bytes}), not {images.dtype} {images.shape}")


# Stripes.


def stripe_pages(config: Config, *, sparse: bool) -> int:
    """Pages of K (and of V, and of the feature layout) in a stripe.

    Args:
        config: geometry.
        sparse: with the feature layout, centroids or both.

    Raises:
        ConfigError: the configuration is without sparse attention.
    """
    if not sparse:
        return 1
    if not config.sparse:
        raise ConfigError("this configuration is without sparse attention: sparse must be True in it")
    return config.group_pages


def stripe_channel(stripe: Any, head: Any, config: Config) -> Any:
    """Channel of a stripe.

    Args:
        stripe: number of the stripe, or an integer array of them.
        head: number of the head, or an array; any numbering will do in which heads that are read together differ.
        config: geometry.
    """
    return (stripe + head) % config.channels


def token_offset(token: int, config: Config) -> int:
    """Byte at which a token begins, counted from the beginning of its stripe's first page.

    Args:
        token: counted from the stripe's first one.
        config: geometry.
    """
    codeword, inside = divmod(token, config.tokens_per_codeword)
    return codeword * config.codeword_bytes + inside * config.token_bytes


# Centroids.


def unit_bits(unit_tokens: int, config: Config) -> int:
    """log2 of the codewords of a unit of selection.

    Args:
        unit_tokens: tokens of a unit.
        config: geometry, with sparse attention.

    Raises:
        RequestError: unit_tokens is not a valid size of a unit.
    """
    least, most = config.tokens_per_codeword, config.tokens_per_codeword << config.unit_bits_max
    good = isinstance(unit_tokens, int | np.integer) and not isinstance(unit_tokens, bool)
    if not good or not least <= unit_tokens <= most or unit_tokens & (unit_tokens - 1):
        raise RequestError(f"a unit must have a power of two of tokens from {least} (a codeword) to {most}, not "
                           f"{unit_tokens!r}")
    return int(unit_tokens // least).bit_length() - 1


def mean_keys(bits: Bits, unit_tokens: int, config: Config, *, skip: int = 0) -> Bits:
    """Mean keys of units: the float64 mean of the stored K, rounded once to the stored format.

    Attention sinks are left out: a model's first tokens have keys unlike all others.  A unit that consists of sinks
    keeps the mean of all its tokens; it is always selected.

    Args:
        bits: uint16, (units * unit_tokens, head_dim).
        unit_tokens: tokens of a unit.
        config: geometry.
        skip: how many tokens at the beginning are sinks; none if it is negative.

    Returns:
        uint16, (units, head_dim).

    Raises:
        RequestError: wrong dtype or shape, or tokens that are not whole units.
    """
    _check_tokens(bits, config)
    if len(bits) % unit_tokens:
        raise RequestError(f"mean keys take whole units of {unit_tokens} tokens, not {len(bits)} tokens")
    values = from_bits(bits, config.element).astype(np.float64).reshape(-1, unit_tokens, config.head_dim)
    with np.errstate(invalid="ignore"):     # infinities of both signs: the mean is NaN, which the device reports
        total = np.zeros((len(values), config.head_dim))
        sinks = np.clip(skip - unit_tokens * np.arange(len(values)), 0, unit_tokens) % unit_tokens
        for token in range(unit_tokens):    # in this order on every machine
            counted = sinks <= token
            total[counted] += values[counted, token]
        return to_kv_bits(total / (unit_tokens - sinks)[:, None], config.kv, config.element)


def centroid_codewords(unit_tokens: int, config: Config) -> int:
    """Codewords that the mean keys of a stripe fill, a power of two.

    Args:
        unit_tokens: tokens of a unit.
        config: geometry, with sparse attention.

    Raises:
        RequestError: unit_tokens is not a valid size of a unit.
    """
    return (config.group_codewords >> unit_bits(unit_tokens, config)) // config.tokens_per_codeword


# Packed sketches: centroids and codes, of which several stripes share pages.


def packed_pages(stripes: Any, codewords: int, config: Config) -> Any:
    """Pages that a packed sketch of some stripes takes.

    Args:
        stripes: how many, or an integer array.
        codewords: of each stripe, a power of two.
        config: geometry.
    """
    return -(-stripes * codewords // config.codewords_per_page)


def packed_place(index: int, codewords: int, config: Config) -> tuple[int, int]:
    """Page, and codeword of that page, at which the packed sketch of one of several stripes begins.

    Args:
        index: which of the stripes that share pages.
        codewords: of each stripe, a power of two.
        config: geometry.
    """
    return divmod(index * codewords, config.codewords_per_page)


# Page numbers.


def page_number(place: PagePlace, config: Config) -> Any:
    """The page number of a place; nothing is checked.

    Args:
        place: integers, or arrays of them.
        config: geometry.
    """
    block_page = place.zone << config.block_page_bits | place.page
    return (block_page << config.die_bits | place.die) << config.plane_bits | place.plane


def page_place(number: Any, config: Config) -> PagePlace:
    """Where the page of a number lies.

    Args:
        number: page number on a channel, or an array of them.
        config: geometry.
    """
    die = number >> config.plane_bits
    page = die >> config.die_bits
    return PagePlace(page >> config.block_page_bits, page & (1 << config.block_page_bits) - 1,
                     die & (1 << config.die_bits) - 1, number & (1 << config.plane_bits) - 1)


# Table entries.


def pack_entries(channel: ArrayLike, key_page: ArrayLike, value_page: ArrayLike, dram: ArrayLike,
                 whole: ArrayLike = 0) -> NDArray[np.uint64]:
    """Table entries (`commands.TABLE_ENTRY`), one for each stripe.

    Args:
        channel: whose lane attends the stripe; integers that fit the field, or arrays of them.
        key_page: first page of K; likewise.
        value_page: first page of V; likewise.
        dram: 1: the pages lie in device DRAM, 0: in flash; likewise.
        whole: sparse modes: 1: the stripe is attended whole; 0, or an array of both.

    Returns:
        uint64; little-endian in memory is what the device reads.

    Raises:
        RequestError: a number does not fit its field.
    """
    flags = np.zeros((), np.int64)
    for name, flag, given in (("dram", TableFlag.DRAM, dram), ("whole", TableFlag.WHOLE, whole)):
        array = np.asarray(given, np.int64)
        if ((array < 0) | (array > 1)).any():
            raise RequestError(f"{name} of a table entry must be 0 or 1, not {array.min()} to {array.max()}")
        flags = flags + array * int(flag)
    return _pack(TABLE_ENTRY, channel=channel, key_page=key_page, value_page=value_page, flags=flags)


def mark_whole(entries: NDArray[np.uint64], first: int) -> NDArray[np.uint64]:
    """A copy of table entries in which those from number `first` on are attended whole."""
    marked = entries.copy()
    marked[first:] |= np.uint64(TableFlag.WHOLE << 8 * TABLE_ENTRY["flags"].offset)
    return marked


def unpack_entries(entries: NDArray[np.uint64]) -> Entries:
    """The inverse of `pack_entries`; reserved bits are ignored."""
    *places, flags = _unpack(TABLE_ENTRY, ("channel", "key_page", "value_page", "flags"), entries)
    return Entries(*places, *((flags & flag != 0).astype(np.int64) for flag in (TableFlag.DRAM, TableFlag.WHOLE)))


def pack_sketches(page: ArrayLike, codeword: ArrayLike, written: ArrayLike) -> NDArray[np.uint64]:
    """Sketch entries (`commands.SKETCH_ENTRY`), one for each stripe.

    Args:
        page: first page of the feature layout, or page of the first codeword of centroids or codes; integers that fit
            the field, or arrays of them.
        codeword: of that page; likewise.
        written: 1: the sketch was written; likewise.

    Returns:
        uint64; little-endian in memory is what the device reads.

    Raises:
        RequestError: a number does not fit its field.
    """
    return _pack(SKETCH_ENTRY, page=page, codeword=codeword, written=written)


def unpack_sketches(entries: NDArray[np.uint64]) -> Sketches:
    """The inverse of `pack_sketches`; reserved bits are ignored."""
    return Sketches(*_unpack(SKETCH_ENTRY, Sketches._fields, entries))


def _pack(record: Record, **values: ArrayLike) -> NDArray[np.uint64]:
    """Records of 8 bytes, as integers."""
    result = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values.values())), np.uint64)
    kind = {"TableEntry": "table", "SketchEntry": "sketch"}[record.name]
    for name, given in values.items():
        field, array = record[name], np.asarray(given)
        if array.size and not 0 <= array.min() <= array.max() < 1 << 8 * field.size:
            raise RequestError(f"{name} of a {kind} entry must be 0 to {(1 << 8 * field.size) - 1}, not "
                               f"{array.min()} to {array.max()}")
        result |= array.astype(np.uint64) << np.uint64(8 * field.offset)
    return result


def _unpack(record: Record, names: tuple[str, ...], entries: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    return [(entries >> np.uint64(8 * field.offset) & np.uint64((1 << 8 * field.size) - 1)).astype(np.int64)
            for field in (record[name] for name in names)]
