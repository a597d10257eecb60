"""The page layout: elements, page images, stripes, page numbers, table entries."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvattic
from kvattic.array import open_array
from kvattic.errors import ConfigError, RequestError
from kvattic.spec import layout
from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY
from kvattic.spec.config import PAPER, TINY, Config
from kvattic.spec.elements import from_bits
from kvattic.spec.formats import Element
from kvattic.spec.nand import PSLC, TINY_PART

# Padding in each codeword (80 * 2 * 3 = 480 of 512), channels that are no power of two.
ODD = Config(channels=3, head_dim=80, sparse=False, part=TINY_PART.resized(2048), codeword_bytes=512, score_depth=1024)
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
    assert images.shape == (-(-count // config.tokens_per_page), config.page_bytes)
    back = layout.unpack_pages(images, config)
    assert np.array_equal(back[:count], tokens)
    assert not back[count:].any()


SPARSE = [TINY, PAPER, Config(head_dim=64), replace(TINY, part=TINY_PART.resized(4096, pages=6))]


@pytest.mark.parametrize(("config", "pages"), list(zip(SPARSE, (8, 4, 2, 2), strict=True)))
def test_each_channel_lies_where_the_rule_says(config, pages):
    assert layout.stripe_pages(config, sparse=True) == pages
    assert layout.stripe_pages(config, sparse=False) == 1
    tokens = tokens_of(config, 2 * config.codeword_bytes // 2)
    images = layout.pack_feature_pages(tokens, config)
    assert images.shape == (2 * pages, config.page_bytes)
    size = config.codeword_bytes // 2
    for stripe in range(2):
        for channel in range(config.head_dim):
            page, codeword = divmod(channel, config.codewords_per_page)
            data = images[stripe * pages + page, codeword * config.codeword_bytes :][: config.codeword_bytes]
            expected = tokens[stripe * size : (stripe + 1) * size, channel]
            assert np.array_equal(data.copy().view("<u2"), expected)
    used = config.head_dim * config.codeword_bytes
    assert not images.reshape(2, -1)[:, used:].any()
    assert np.array_equal(layout.unpack_feature_pages(images, config), tokens)


def test_configurations_without_a_feature_layout():
    with pytest.raises(ConfigError, match="without sparse attention: sparse must be True in it"):
        layout.stripe_pages(Config(head_dim=80, sparse=False), sparse=True)
    with pytest.raises(ConfigError, match="3 tokens of 160 bytes leave some of 512"):
        Config(head_dim=80)
    with pytest.raises(ConfigError, match=r"512 tokens each, not 0\.5"):
        Config(head_dim=32, part=PSLC.resized(32768), codeword_bytes=512)
    with pytest.raises(ConfigError, match=r"32 codewords of K, which must fit .* 16 codewords .score_depth 64"):
        replace(TINY, score_depth=64)
    with pytest.raises(RequestError, match="whole stripes of 128 tokens, not 130 tokens"):
        layout.pack_feature_pages(tokens_of(TINY, 130), TINY)
    with pytest.raises(RequestError, match="8 pages in a stripe: 9 are not whole stripes"):
        layout.unpack_feature_pages(np.zeros((9, 1024), np.uint8), TINY)


@given(st.integers(1, 32), st.integers(0, 200), st.integers(0, 500))
def test_stripes_go_round_the_channels_and_heads_begin_on_different_ones(channels, head, first):
    config = Config(channels=channels)
    found = layout.stripe_channel(first + np.arange(channels), head, config)
    assert sorted(found.tolist()) == list(range(channels))
    assert layout.stripe_channel(first, head + 1, config) == (found[0] + 1) % channels


@pytest.mark.parametrize("config", CONFIGS)
def test_a_token_begins_at_its_offset(config):
    tokens = tokens_of(config, 2 * config.tokens_per_page)
    data = layout.pack_pages(tokens, config).ravel()
    for t in range(len(tokens)):
        at = layout.token_offset(t, config)
        assert np.array_equal(data[at : at + config.token_bytes].copy().view("<u2"), tokens[t])


@pytest.mark.parametrize("config", [TINY, PAPER, Config(dies=1, part=TINY_PART.resized(16384, planes=1, pages=6))])
def test_page_numbers(config):
    """Planes first, then dies, pages of the block, zones; a block of 6 pages takes 8 numbers."""
    number = 0
    for zone in range(2):
        for page in range(1 << config.block_page_bits):
            for die in range(config.dies):
                for plane in range(config.part.planes):
                    place = layout.PagePlace(zone, page, die, plane)
                    assert layout.page_number(place, config) == number
                    assert layout.page_place(number, config) == place
                    number += 1
    assert number == 2 << config.zone_page_bits
    numbers = np.arange(number)
    assert np.array_equal(layout.page_number(layout.page_place(numbers, config), config), numbers)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**24 - 1), st.integers(0, 2**24 - 1),
                          st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=9))
def test_table_entries_are_as_the_record_says(entries):
    packed = layout.pack_entries(*np.array(entries).T)
    expected = b"".join(TABLE_ENTRY.pack(channel=c, key_page=k, value_page=v, flags=dram | whole << 1)
                        for c, k, v, dram, whole in entries)
    assert packed.astype("<u8").tobytes() == expected
    assert list(zip(*(column.tolist() for column in layout.unpack_entries(packed)), strict=True)) == entries


@pytest.mark.parametrize(("entry", "message"), [
    ((256, 0, 0, 0), "channel of a table entry must be 0 to 255, not 256 to 256"),
    ((0, -1, 0, 0), "key_page of a table entry must be 0 to 16777215, not -1 to -1"),
    ((0, 0, 1 << 24, 0), "value_page"),
    ((0, 0, 0, 2), "dram of a table entry must be 0 or 1, not 2 to 2"),
    ((0, 0, 0, -1), "dram"),
    ((0, 0, 0, 0, 256), "whole of a table entry must be 0 or 1"),
])
def test_table_entries_that_do_not_fit(entry, message):
    with pytest.raises(RequestError, match=message):
        layout.pack_entries(*entry)


@given(st.lists(st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 255), st.integers(0, 1)), min_size=1, max_size=9))
def test_sketch_entries_are_as_the_record_says(entries):
    packed = layout.pack_sketches(*np.array(entries).T)
    expected = b"".join(SKETCH_ENTRY.pack(page=p, codeword=c, written=w) for p, c, w in entries)
    assert packed.astype("<u8").tobytes() == expected
    assert list(zip(*(column.tolist() for column in layout.unpack_sketches(packed)), strict=True)) == entries


@pytest.mark.parametrize(("entry", "message"), [
    ((1 << 24, 0, 1), "page of a sketch entry must be 0 to 16777215, not 16777216 to 16777216"),
    ((0, 256, 1), "codeword of a sketch entry must be 0 to 255, not 256 to 256"),
    ((0, 0, -1), "written"),
])
def test_sketch_entries_that_do_not_fit(entry, message):
    with pytest.raises(RequestError, match=message):
        layout.pack_sketches(*entry)


# Centroids.


@pytest.mark.parametrize(("config", "units"), [
    # Units of so many tokens; codewords of a stripe's centroids, pages of one stripe's, of five stripes'.
    (TINY, {4: (8, 2, 10), 8: (4, 1, 5), 16: (2, 1, 3)}),
    (PAPER, {2: (64, 2, 10), 4: (32, 1, 5), 8: (16, 1, 3), 16: (8, 1, 2), 32: (4, 1, 1), 64: (2, 1, 1)}),
    (Config(head_dim=256), {1: (256, 8, 40), 2: (128, 4, 20), 32: (8, 1, 2)}),
    # A group of one page: its units are smaller than a page, so that their mean keys fill a codeword.
    (Config(head_dim=32), {8: (4, 1, 1), 16: (2, 1, 1), 32: (1, 1, 1)}),
])
def test_centroids_fill_codewords_and_share_pages(config, units):
    for unit, (codewords, one, five) in units.items():
        assert config.group_tokens // unit == codewords * config.tokens_per_codeword
        assert layout.unit_bits(unit, config) == (unit // config.tokens_per_codeword).bit_length() - 1
        assert layout.centroid_codewords(unit, config) == codewords
        assert layout.packed_pages(1, codewords, config) == one
        assert layout.packed_pages(np.array([0, 1, 5]), codewords, config).tolist() == [0, one, five]
        places = [layout.packed_place(i, codewords, config) for i in range(5)]
        assert [page * config.codewords_per_page + codeword for page, codeword in places] == [
            i * codewords for i in range(5)]
        assert all(0 <= codeword < config.codewords_per_page for _, codeword in places)
    least, most = config.tokens_per_codeword, config.tokens_per_codeword << config.unit_bits_max
    assert {min(units), max(units)} == {least, most}
    for bad in (least // 2, most * 2, least + 1 if least > 1 else 3, float(least), True, None, -least):
        with pytest.raises(RequestError, match=f"tokens from {least} .a codeword. to {most}, not {bad!r}"):
            layout.unit_bits(bad, config)


@pytest.mark.parametrize("element", list(Element))
def test_mean_keys_are_rounded_once(element):
    config = replace(TINY, element=element)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((128, 32)) * np.exp2(rng.integers(-12, 12, (128, 32)))
    bits = layout.storage_bits(values, element)
    exact = from_bits(bits, element).astype(np.float64)
    for unit in (4, 8, 16):
        found = layout.mean_keys(bits, unit, config)
        # fsum: the sum as if it were exact.
        means = [[math.fsum(exact[i : i + unit, c]) / unit for c in range(32)] for i in range(0, 128, unit)]
        assert np.array_equal(found, layout.storage_bits(np.array(means), element))
    # A tie, which fp16 arithmetic would lose on its way: 1 + 2**-11 goes to even, a little more goes up.
    ties = np.array([1, 1, 1, 1 + 2**-9, 1, 1, 1 + 2**-10, 1 + 2**-9])[:, None] * np.ones(32)
    found = layout.mean_keys(layout.storage_bits(ties, Element.FP16), 4, TINY)
    assert found[:, 0].tolist() == [0x3C00, 0x3C01]


def test_mean_keys_of_odd_input():
    infinite = np.full((4, 32), 0x7C00, np.uint16)
    infinite[1] = 0xFC00
    assert np.isnan(layout.mean_keys(infinite, 4, TINY).view(np.float16)).all()
    assert (layout.mean_keys(infinite[2:].repeat(2, axis=0), 4, TINY) == 0x7C00).all()
    with pytest.raises(RequestError, match="whole units of 8 tokens, not 12 tokens"):
        layout.mean_keys(np.zeros((12, 32), np.uint16), 8, TINY)
    with pytest.raises(RequestError, match=r"tokens must be uint16 \(tokens, 32\)"):
        layout.mean_keys(np.zeros((12, 31), np.uint16), 4, TINY)


# Elements.


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
    with pytest.raises(RequestError, match="must be float16, bfloat16, float32 or float64, or uint16"):
        layout.storage_bits(np.zeros(3, dtype), Element.FP16)


def test_wrong_shapes_are_refused():
    with pytest.raises(RequestError, match=r"uint16 \(tokens, 32\), not uint16 \(4, 31\)"):
        layout.pack_pages(np.zeros((4, 31), np.uint16), TINY)
    with pytest.raises(RequestError, match=r"uint16 \(tokens, 32\), not float64"):
        layout.pack_pages(np.zeros((4, 32)), TINY)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"uint8 \(pages, 1024\), not uint8 \(1, 1000\)"):
        layout.unpack_pages(np.zeros((1, 1000), np.uint8), TINY)


# ---------------------------------------------------------------- what callers hand over


@pytest.mark.parametrize("element", list(Element))
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_torch_are_numbers_as_well(element, kind):
    torch = pytest.importorskip("torch", reason="pip install 'kvattic[transformers]'")
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(getattr(torch, kind))
    exact = values.double().numpy()     # every kind fits float64
    expected = layout.storage_bits(exact, element)
    for tensor in (values, torch.nn.Parameter(values), values.t().contiguous().t(), values.clone().requires_grad_()):
        assert np.array_equal(layout.storage_bits(tensor, element), expected)
    if kind == "bfloat16" and element is Element.BF16:
        assert np.array_equal(layout.storage_bits(values, element), values.view(torch.int16).numpy().view(np.uint16))


def test_tensors_that_hold_no_such_numbers_are_refused():
    torch = pytest.importorskip("torch", reason="pip install 'kvattic[transformers]'")
    with pytest.raises(RequestError, match=r"q must be float16, bfloat16, .* not int64"):
        layout.storage_bits(torch.arange(3), Element.FP16, "q")
    with pytest.raises(RequestError, match="this tensor, bfloat16 on meta, has no numbers"):
        layout.storage_bits(torch.zeros(3, dtype=torch.bfloat16, device="meta"), Element.FP16)
    with pytest.raises(RequestError, match=r"values\[1\] is inf"):
        layout.storage_bits(torch.tensor([0.0, float("inf")], dtype=torch.bfloat16), Element.BF16)


def test_a_model_in_bfloat16_attends():
    """Prefill, append and attend, on one drive and on several."""
    torch = pytest.importorskip("torch", reason="pip install 'kvattic[transformers]'")
    config = replace(TINY, element="bf16")
    key = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    numbers = key.float().numpy()

    def attended(make, key):
        with make() as device, device.create_sequence(2, capacity_tokens=64) as sequence:
            sequence.prefill(key[:, :30], key[:, :30])
            sequence.append(key[:, 30:], key[:, 30:])
            return sequence.attend(key[:, :1])

    for make in (lambda: kvattic.open("model", config), lambda: open_array(["model"] * 2, config)):
        assert np.array_equal(attended(make, key).bits, attended(make, numbers).bits)


def test_other_libraries_bfloat16_is_known_by_its_name():
    types = pytest.importorskip("ml_dtypes")
    values = np.array([1.5, -3.0]).astype(types.bfloat16)
    assert np.array_equal(layout.storage_bits(values, Element.BF16), values.view(np.uint16))
