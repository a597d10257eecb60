"""The page layout: elements, page images, placement."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvattic import layout
from kvattic.config import PAPER, TINY, Config
from kvattic.elements import from_bits
from kvattic.errors import RequestError
from kvattic.formats import Element

# Padding in each codeword (80 * 2 * 3 = 480 of 512), channels that are no power of two.
ODD = Config(channels=3, head_dim=80, page_bytes=2048, codeword_bytes=512, score_depth=1024)
CONFIGS = [TINY, ODD, PAPER]


def tokens_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 16, (count, config.head_dim), np.uint16)


@pytest.mark.parametrize("config", CONFIGS)
def test_each_element_lies_where_the_rule_says(config):
    tokens = tokens_of(config, config.tokens_per_page + 1)
    images = layout.pack_pages(tokens, config)
    expected = np.zeros((2, config.page_bytes), np.uint8)
    for t, token in enumerate(tokens):
        page, inside = divmod(t, config.tokens_per_page)
        codeword, slot = divmod(inside, config.tokens_per_codeword)
        for c, element in enumerate(token.tolist()):
            at = codeword * config.codeword_bytes + (slot * config.head_dim + c) * 2
            expected[page, at : at + 2] = (element & 0xFF, element >> 8)
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(CONFIGS), st.integers(0, 300))
def test_unpack_inverts_pack_and_adds_zeros(config, count):
    tokens = tokens_of(config, count)
    images = layout.pack_pages(tokens, config)
    assert images.shape == (layout.stripe_count(count, config), config.page_bytes)
    back = layout.unpack_pages(images, config)
    assert np.array_equal(back[:count], tokens)
    assert not back[count:].any()


@given(st.integers(1, 32), st.integers(0, 200), st.integers(0, 500), st.integers(1, 100))
def test_the_device_finds_every_stripe_from_home_and_page(channels, head, first, count):
    config = Config(channels=channels)
    base = 1000
    home, page = layout.job_place(first, head, base, config)
    index = np.arange(count)
    found = layout.device_place(index, home, page, config)
    truth = layout.place(first + index, head, base, config)
    assert np.array_equal(found.channel, truth.channel)
    assert np.array_equal(found.page, truth.page)
    assert 0 <= home < channels
    # commands.COMMAND: a lane's first page is `page`, one further for channels below home.
    for channel in set(truth.channel.tolist()):
        pages = truth.page[truth.channel == channel].tolist()
        assert pages[0] == page + (channel < home)
        assert all(after == before + 1 for before, after in pairwise(pages))


@given(st.integers(1, 32), st.integers(0, 200), st.integers(1, 300))
def test_a_head_keeps_inside_its_rows_and_no_two_stripes_share_a_page(channels, head, stripes):
    config = Config(channels=channels)
    places = layout.place(np.arange(stripes), head, 7, config)
    rows = layout.page_rows(stripes, head, config)
    assert places.page.min() >= 7
    assert places.page.max() == 7 + rows - 1
    assert len(set(zip(places.channel.tolist(), places.page.tolist(), strict=True))) == stripes
    assert places.channel[0] == head % channels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fp16_is_rounded_once_to_nearest_even(dtype):
    # Half way between 1 and 1 + 2**-10, and a little above, which only float64 holds.
    values = np.array([1 + 2**-11, 1 + 2**-11 + 2**-40, -0.0, 2**-24, 65504], dtype)
    bits = layout.storage_bits(values, Element.FP16)
    assert bits.tolist()[0] == 0x3C00
    assert bits.tolist()[1] == (0x3C01 if dtype is np.float64 else 0x3C00)
    assert bits.tolist()[2:] == [0x8000, 1, 0x7BFF]


def test_bf16_is_rounded_once_to_nearest_even():
    # The second lies above the half by less than float32 shows; the third below it.
    values = np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40, -3.0, 0.0, 2.0**-133])
    assert layout.storage_bits(values, Element.BF16).tolist() == [
        0x3F80,
        0x3F81,
        0x3F81,
        0xC040,
        0,
        1,
    ]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest(value):
    if abs(value) > 3.38e38:
        return
    bits = int(layout.storage_bits(np.array([value]), Element.BF16)[0])
    near = np.array([max(bits - 1, 0), bits, min(bits + 1, 0xFF7F)], np.uint16)
    error = np.abs(from_bits(near, Element.BF16).astype(np.float64) - value)
    assert error[1] == np.nanmin(error)


@pytest.mark.parametrize("element", list(Element))
def test_from_bits_inverts_storage_bits(element):
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(from_bits(bits, element))]
    assert np.array_equal(layout.storage_bits(from_bits(finite, element), element), finite)


@pytest.mark.parametrize("element", list(Element))
def test_bit_patterns_pass_unchanged(element):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(layout.storage_bits(bits, element), bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0])
def test_what_fp16_cannot_hold_is_named(bad):
    values = np.zeros((2, 3))
    values[1, 2] = bad
    with pytest.raises(RequestError, match=r"key\[1, 2\] is .* range of fp16"):
        layout.storage_bits(values, Element.FP16, "key")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39, 3.4e38])
def test_what_bf16_cannot_hold_is_named(bad):
    with pytest.raises(RequestError, match=r"values\[0\] is .* range of bf16"):
        layout.storage_bits(np.array([bad]), Element.BF16)


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.complex64, object, np.longdouble])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(RequestError, match="must be float16, float32 or float64, or uint16"):
        layout.storage_bits(np.zeros(3, dtype), Element.FP16)


def test_wrong_shapes_are_refused():
    with pytest.raises(RequestError, match=r"uint16 \(tokens, 32\), not uint16 \(4, 31\)"):
        layout.pack_pages(np.zeros((4, 31), np.uint16), TINY)
    with pytest.raises(RequestError, match=r"uint16 \(tokens, 32\), not float64"):
        layout.pack_pages(np.zeros((4, 32)), TINY)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"uint8 \(pages, 1024\), not uint8 \(1, 1000\)"):
        layout.unpack_pages(np.zeros((1, 1000), np.uint8), TINY)
