"""Stored formats of K and V: rounding as PyTorch's, codes and elements, and the errors."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic.errors import ConfigError, RequestError
from kvattic.spec import layout
from kvattic.spec.blocks import pack_tokens, unpack_tokens
from kvattic.spec.commands import read_token_bytes
from kvattic.spec.config import PAPER, PRESETS, TINY, Config
from kvattic.spec.elements import from_bits, special, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import code_values, element_table, first_foreign, narrow, to_kv_bits, widen

torch = pytest.importorskip("torch")

FP8 = [KvFormat.FP8_E4M3, KvFormat.FP8_E5M2]
DTYPES = {KvFormat.FP8_E4M3: torch.float8_e4m3fn, KvFormat.FP8_E5M2: torch.float8_e5m2}
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def floats():
    """float32 of all bit patterns, of the formats' sizes, and half-way between numbers of theirs."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 500_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    sized = (rng.standard_normal(300_000) * np.exp2(rng.integers(-22, 17, 300_000))).astype(np.float32)
    found = [patterns, sized]
    for kv in FP8:
        numbers = np.unique(code_values(kv.encoding)[:128])
        numbers = numbers[np.isfinite(numbers)].astype(np.float64)
        halves = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
        found += [halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(np.inf)), -halves]
    return np.concatenate(found)


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("kv", FP8)
def test_rounding_is_pytorchs(kv, element):
    """Over all numbers of fp16, and many of float32: everything in range, -0 and subnormals included."""
    for values in (HALVES, floats()):
        wanted = torch.from_numpy(values).to(DTYPES[kv])
        bits = to_kv_bits(values, kv, element)
        with np.errstate(invalid="ignore"):
            inside = np.abs(values) <= kv.encoding.largest
        assert np.array_equal(narrow(bits, kv, element)[inside], wanted.view(torch.uint8).numpy()[inside])
        assert np.array_equal(from_bits(bits, element)[inside], wanted.float().numpy()[inside])


@pytest.mark.parametrize("kv", FP8)
def test_float64_is_rounded_once(kv):
    """Just above a tie, by less than float32 can say."""
    values = np.array([1 + 2.0 ** -(kv.encoding.fraction_bits + 1) + 2.0**-40])
    step = 1 + 2.0**-kv.encoding.fraction_bits
    assert from_bits(to_kv_bits(values, kv, Element.FP16), Element.FP16)[0] == step
    with pytest.raises(TypeError, match="float16, float32 or float64, not int64"):
        to_kv_bits(np.arange(3), kv, Element.FP16)


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("kv", FP8)
def test_codes_widen_exactly_and_come_back(kv, element):
    codes = np.arange(256, dtype=np.uint8)
    bits = widen(codes, kv, element)
    assert np.array_equal(element_table(kv, element), bits)
    wanted = torch.from_numpy(codes).view(DTYPES[kv]).float().numpy()
    assert np.array_equal(from_bits(bits, element), wanted, equal_nan=True)
    assert np.array_equal(special(bits, element), ~np.isfinite(wanted))
    assert np.array_equal(narrow(bits, kv, element), codes)
    assert kv.encoding.largest == wanted[np.isfinite(wanted)].max()


def test_what_is_stored_as_elements_stays_as_it_is():
    bits = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(widen(bits, KvFormat.ELEMENT, Element.BF16), bits)
    assert narrow(bits, KvFormat.ELEMENT, Element.BF16).dtype == "<u2"
    assert first_foreign(bits, KvFormat.ELEMENT, Element.BF16) is None
    assert element_table(KvFormat.ELEMENT, Element.FP16) is None
    values = np.array([1 / 3, -0.0, 1e9])
    assert np.array_equal(to_kv_bits(values, KvFormat.ELEMENT, Element.BF16), to_bits(values, Element.BF16))


@pytest.mark.parametrize("kv", FP8)
def test_too_large_is_special(kv):
    bits = to_kv_bits(np.array([1e6, -1e6, np.inf, np.nan, -np.nan]), kv, Element.FP16)
    assert special(bits, Element.FP16).all()
    narrow(bits, kv, Element.FP16)      # all of them have codes


# What callers give.


@pytest.mark.parametrize("kv", FP8)
def test_kv_bits_takes_floats_float8_and_patterns(kv):
    config = replace(TINY, kv=kv)
    values = torch.randn(40, 32)
    wanted = values.to(DTYPES[kv])
    bits = layout.kv_bits(values, config)
    assert np.array_equal(from_bits(bits, Element.FP16), wanted.float().numpy())
    assert np.array_equal(layout.kv_bits(wanted, config), bits)
    assert np.array_equal(layout.kv_bits(bits, config), bits)
    assert np.array_equal(layout.kv_bits(values.double().numpy(), config), bits)
    # With a scale: numbers are divided by it, codes are not.
    assert np.array_equal(layout.kv_bits(values * 4, config, scale=4.0), bits)
    assert np.array_equal(layout.kv_bits(wanted, config, scale=4.0), bits)
    # Where elements are stored, float8 fits exactly.
    assert np.array_equal(from_bits(layout.kv_bits(wanted, TINY), Element.FP16), wanted.float().numpy())


def test_a_scale_is_divided_by_in_float32():
    config = replace(TINY, kv=KvFormat.FP8_E4M3)
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float16)
    scale = np.float32(0.0371)
    wanted = (torch.from_numpy(values).float() / float(scale)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(layout.pack_codes(layout.kv_bits(values, config, scale=scale), config), wanted)


@pytest.mark.parametrize(("kv", "bad", "limit"), [
    (KvFormat.FP8_E4M3, 465.0, "fp8_e4m3"), (KvFormat.FP8_E5M2, 61_440.0, "fp8_e5m2"),
    (KvFormat.FP8_E4M3, np.nan, "fp8_e4m3"), (KvFormat.FP8_E5M2, np.inf, "fp8_e5m2")])
def test_kv_bits_refuses_what_does_not_fit(kv, bad, limit):
    values = np.zeros((2, 32))
    values[1, 3] = bad
    with pytest.raises(RequestError, match=rf"key\[1, 3\] is .*finite and within the range of {limit}"):
        layout.kv_bits(values, replace(TINY, kv=kv), "key")


def test_kv_bits_refuses_other_patterns_formats_and_types():
    config = replace(TINY, kv=KvFormat.FP8_E4M3)
    patterns = to_bits(np.array([1.0, 1.0625]), Element.FP16)
    with pytest.raises(RequestError, match=r"key\[1\] has the bit pattern 0x3c40 of fp16, which is no number of fp8_e"):
        layout.kv_bits(patterns, config, "key")
    with pytest.raises(RequestError, match="value is fp8_e5m2, but this drive stores K and V as fp8_e4m3"):
        layout.kv_bits(torch.zeros(2).to(torch.float8_e5m2), config, "value")
    with pytest.raises(RequestError, match=r"key must be float16, .*fp8_e4m3, or uint16 bit patterns of fp16, not i"):
        layout.kv_bits(np.arange(3), config, "key")
    with pytest.raises(RequestError, match="must be numbers of fp8_e4m3, not the bit pattern 0x3c40 of fp16"):
        layout.pack_pages(np.full((1, 32), 0x3C40, np.uint16), config)


# Layouts.


@pytest.mark.parametrize("kv", FP8)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_pages_hold_twice_as_much(kv, head_dim):
    config = replace(TINY, kv=kv, head_dim=head_dim)
    assert config.tokens_per_page == 2 * replace(config, kv=KvFormat.ELEMENT).tokens_per_page
    assert config.group_tokens == config.codeword_bytes
    rng = np.random.default_rng(0)
    bits = to_kv_bits(rng.standard_normal((2 * config.group_tokens, head_dim)), kv, config.element)
    pages = layout.pack_pages(bits, config)
    assert pages[0, :head_dim].tolist() == narrow(bits[0], kv, config.element).tolist()
    assert np.array_equal(layout.unpack_pages(pages, config), bits)
    features = layout.pack_feature_pages(bits, config)
    assert features[0, : config.group_tokens].tolist() == narrow(
        bits[: config.group_tokens, 0], kv, config.element).tolist()
    assert np.array_equal(layout.unpack_feature_pages(features, config), bits)


def test_codewords_with_a_rest():
    config = replace(PAPER, kv=KvFormat.FP8_E5M2, head_dim=96, sparse=False)
    assert (config.tokens_per_codeword, config.words_per_codeword) == (5, 60)
    bits = to_kv_bits(np.random.default_rng(0).standard_normal((333, 96)), config.kv, config.element)
    found = layout.unpack_pages(layout.pack_pages(bits, config), config)
    assert np.array_equal(found[:333], bits) and not found[333:].any()


@pytest.mark.parametrize("kv", FP8)
def test_mean_keys_are_rounded_to_the_stored_format(kv):
    config = replace(TINY, kv=kv)
    values = np.random.default_rng(0).standard_normal((64, 32))
    bits = layout.kv_bits(values, config)
    means = from_bits(bits, config.element).astype(np.float64).reshape(8, 8, 32).mean(axis=1)
    assert np.array_equal(layout.mean_keys(bits, 8, config), to_kv_bits(means, kv, config.element))


@pytest.mark.parametrize("kv", KvFormat)
def test_what_a_read_writes(kv):
    config = replace(TINY, kv=kv)
    key, value = (layout.kv_bits(np.random.default_rng(i).standard_normal((7, 32)), config) for i in range(2))
    data = pack_tokens(key, value, config)
    assert len(data) == 7 * read_token_bytes(32, config.kv_element_bytes)
    for found, wanted in zip(unpack_tokens(data, config), (key, value), strict=True):
        assert np.array_equal(found, wanted)


# Configurations.


def test_presets_are_what_they_were():
    """CONFIG_HASH of the presets: drives and files made with another one do not fit."""
    assert {name: f"{config.hash:08x}" for name, config in PRESETS.items()} == {
        "tiny": "0ebff7eb", "board": "61f459dd", "paper": "546136e3", "gqa": "42b0885b"}


@pytest.mark.parametrize("kv", KvFormat)
def test_a_configuration_says_its_format(kv):
    config = Config(kv=str(kv))
    assert config.kv is kv
    assert Config.from_json(config.to_json()) == config
    assert ('"kv"' in config.to_json()) == (kv is not KvFormat.ELEMENT)
    assert config.elements_per_beat * 2 == config.query_beat_bytes


def test_configurations_that_cannot_be():
    with pytest.raises(ConfigError, match=r"kv must be one of \['element', 'fp8_e4m3', 'fp8_e5m2'\], not 'q8_0'"):
        Config(kv="q8_0")
    with pytest.raises(ConfigError, match=r"beat_bytes must be such that a token \(80 bytes at head_dim 80 and kv fp8"):
        replace(PAPER, kv="fp8_e4m3", head_dim=80, sparse=False)
    with pytest.raises(ConfigError, match="two beats, or more whole ones, not 32"):
        replace(PAPER, kv="fp8_e4m3", head_dim=32)
