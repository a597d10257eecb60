"""Codes: the layout of an octet, bit by bit, and the encoder."""

from dataclasses import replace

import numpy as np
import pytest

from kvattic.errors import ConfigError, RequestError
from kvattic.spec import codes
from kvattic.spec.config import BOARD, GQA, PAPER, TINY, Config
from kvattic.spec.elements import from_bits, special, to_bits
from kvattic.spec.formats import Element, KvFormat

CODES = replace(TINY, beat_bytes=16)
"""Codewords of 256 bytes."""
CONFIGS = pytest.mark.parametrize(
    "config", [CODES, GQA, PAPER, replace(CODES, beat_bytes=32, dram_beat_bytes=32), TINY],
    ids=["256 bytes", "512", "512 wide", "256 wide", "256 narrow"])


def some_codes(config: Config, stripes: int = 2, seed: int = 0) -> codes.KeyCodes:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 1 << 16, (2, stripes, config.head_dim)).astype(np.uint16)
    found = rng.integers(0, 1 << codes.widths(config), (stripes * config.group_tokens, config.head_dim))
    return codes.KeyCodes(base=levels[0], step=levels[1], codes=found.astype(np.uint8))


def field(octet: bytes, token: int, config: Config) -> int:
    """The field of a token, by the words of the module's docstring, without the spare bits."""
    n, size, each = codes.one_bit_features(config), config.group_tokens, config.elements_per_beat
    words = [int.from_bytes(octet[2 * i : 2 * i + 2], "little") for i in range(size - 16)]
    if token < size - 16:
        return words[token] & (1 << 16 - n) - 1
    half, place = divmod(token - (size - 16), each)
    beats = (size - 16) // 16
    bits = [words[(half * beats + j) * each + place] >> 16 - n for j in range(min(beats, (16 - n) // n))]
    return sum(spare << n * j for j, spare in enumerate(bits))


@CONFIGS
def test_an_octet_by_the_words(config: Config) -> None:
    given = some_codes(config)
    octets = codes.pack(given, config)
    assert octets.shape == (2, config.octets, config.codeword_bytes)
    n, size = codes.one_bit_features(config), config.group_tokens
    assert codes.widths(config).reshape(-1, 8).tolist() == [[2] * (8 - n) + [1] * n] * config.octets
    for stripe in range(2):
        for number in range(config.octets):
            octet = octets[stripe, number].tobytes()
            for token in range(size):
                got = field(octet, token, config)
                for f in range(8):
                    code = got >> (2 * f) & 3 if f < 8 - n else got >> (2 * (8 - n) + f - (8 - n)) & 1
                    assert code == given.codes[stripe * size + token, 8 * number + f]
            levels = np.frombuffer(octet[-32:], "<u2")
            assert levels[:8].tolist() == given.base[stripe, 8 * number : 8 * number + 8].tolist()
            assert levels[8:].tolist() == given.step[stripe, 8 * number : 8 * number + 8].tolist()


@CONFIGS
def test_unpack_is_the_inverse_of_pack(config: Config) -> None:
    given = some_codes(config, stripes=3)
    found = codes.unpack(codes.pack(given, config), config)
    for name in ("base", "step", "codes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name), name)


def test_every_bit_of_an_octet_is_used() -> None:
    for config in (CODES, PAPER):
        data = np.random.default_rng(1).integers(0, 256, (1, config.octets, config.codeword_bytes), np.uint8)
        again = codes.pack(codes.unpack(data, config), config)
        assert (again == data).all()


@pytest.mark.parametrize("element", list(Element))
def test_levels_are_the_centres_of_equal_parts(element: Element) -> None:
    config = replace(CODES, element=element)
    key = np.zeros((config.group_tokens, 32))
    key[:, 0] = np.arange(config.group_tokens) % 9      # 0 to 8
    key[:, 7] = np.arange(config.group_tokens) % 9 - 4  # of 1 bit
    found = codes.encode(to_bits(key, element), config)
    base, step = (from_bits(each, element)[0] for each in (found.base, found.step))
    assert (base[0], step[0], base[7], step[7]) == (1, 2, -2, 4)
    assert found.codes[:9, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert found.codes[:9, 7].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    # The same everywhere: no step.
    assert not found.codes[:, 1:7].any() and not step[1:7].any() and not base[1:7].any()


@pytest.mark.parametrize("element", list(Element))
def test_codes_are_the_nearest(element: Element) -> None:
    config = replace(CODES, element=element)
    rng = np.random.default_rng(2)
    bits = to_bits(rng.standard_normal((3 * config.group_tokens, 32)) * 3, element)
    found = codes.encode(bits, config, skip=200)
    key, error = from_bits(bits, element), codes.decode(found, config) - from_bits(bits, element)
    step = np.repeat(from_bits(found.step, element), config.group_tokens, axis=0)
    inside = np.arange(len(key)) >= 200
    assert (np.abs(error)[inside] <= step[inside] * 0.52).all()
    base = np.repeat(from_bits(found.base, element).astype(float), config.group_tokens, axis=0)
    parts = 1 << codes.widths(config)
    levels = base[..., None] + step[..., None] * np.minimum(np.arange(4), parts[:, None] - 1)
    np.testing.assert_allclose(np.abs(error), np.abs(levels - key[..., None]).min(axis=-1), atol=1e-6)


def test_sinks_do_not_stretch_the_range() -> None:
    rng = np.random.default_rng(3)
    key = rng.standard_normal((2 * CODES.group_tokens, 32))
    plain = codes.encode(to_bits(key, Element.FP16), CODES)
    key[:4] *= 50
    with_sinks = codes.encode(to_bits(key, Element.FP16), CODES, skip=4)
    stretched = codes.encode(to_bits(key, Element.FP16), CODES)
    step = from_bits(with_sinks.step, Element.FP16)
    assert (step <= from_bits(plain.step, Element.FP16)).all()
    assert (from_bits(stretched.step, Element.FP16)[0] > 4 * step[0]).any()
    # A stripe of nothing but sinks has their range.
    whole = codes.encode(to_bits(key, Element.FP16), CODES, skip=CODES.group_tokens)
    np.testing.assert_array_equal(whole.step, stretched.step)


def test_the_largest_range_stays_finite() -> None:
    key = np.zeros((CODES.group_tokens, 32))
    key[0], key[1] = 65504, -65504
    found = codes.encode(to_bits(key, Element.FP16), CODES)
    assert not special(found.base, Element.FP16).any() and not special(found.step, Element.FP16).any()
    assert found.codes[:2, [0, 7]].tolist() == [[3, 1], [0, 0]]


@pytest.mark.parametrize("broken", [0x7C00, 0xFC00, 0x7E00])
def test_nan_and_infinity_go_into_the_base(broken: int) -> None:
    bits = to_bits(np.random.default_rng(4).standard_normal((2 * CODES.group_tokens, 32)), Element.FP16)
    bits[140, 5] = broken
    found = codes.encode(bits, CODES)
    assert np.argwhere(special(found.base, Element.FP16)).tolist() == [[1, 5]]
    assert not special(found.step, Element.FP16).any()
    # Of a sink it matters to nobody: its score is exact.
    bits[3] = broken
    assert not special(codes.encode(bits, CODES, skip=4).base[0], Element.FP16).any()


def test_which_configurations_have_codes() -> None:
    assert [config.codes for config in (TINY, BOARD, PAPER, GQA, CODES)] == [True] * 5
    for config, why in (
            (replace(PAPER, codeword_bytes=1024, ecc_t=4), "codeword_bytes must be 256 or 512, not 1024"),
            (replace(PAPER, sparse=False), "sparse must be True"),
            (replace(PAPER, kv=KvFormat.FP8_E4M3), "kv must be element, not fp8_e4m3"),
            (replace(TINY, beat_bytes=16, codeword_bytes=128, head_dim=32),
             "codeword_bytes must be 256 or 512, not 128")):
        assert why in config.why_no_codes
        with pytest.raises(ConfigError, match=why):
            codes.encode(np.zeros((config.group_tokens, config.head_dim), np.uint16), config)


def test_refusals() -> None:
    good = some_codes(CODES)
    with pytest.raises(RequestError, match="codes are of uint16"):
        codes.encode(np.zeros((5, 32), np.uint16), CODES)
    bad = replace(good, codes=good.codes.copy())
    bad.codes[0, 7] = 2
    with pytest.raises(RequestError, match="a code must fit its feature"):
        codes.pack(bad, CODES)
    with pytest.raises(RequestError, match="codes must have 128 tokens"):
        codes.pack(replace(good, base=good.base[:1]), CODES)
    with pytest.raises(RequestError, match="octets must be uint8"):
        codes.unpack(np.zeros((1, 3, 256), np.uint8), CODES)
