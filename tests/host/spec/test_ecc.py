"""The code against an independent library (bchlib, the Linux kernel's BCH), and its promises."""

import random
import sys
from dataclasses import replace
from typing import Any

import bchlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvattic.errors import ConfigError, RequestError
from kvattic.spec import ecc
from kvattic.spec.config import BOARD, CRC_BITS, PAPER, TINY, Config
from kvattic.spec.ecc import CRC_POLYNOMIAL, Division, Outcome
from kvattic.spec.nand import PSLC

CONFIGS = {
    "tiny": TINY,
    "paper": PAPER,
    "t4": replace(TINY, ecc_t=4),
    "t1": replace(TINY, ecc_t=1),
    "parity_of_odd_bits": replace(TINY, codeword_bytes=512, ecc_t=5),
    "wide": replace(PAPER.with_lane_channels(1), beat_bytes=32, part=PSLC.resized(4096)),
    "t40": replace(PAPER, codeword_bytes=1024, ecc_t=40),
    "t64": replace(PAPER, codeword_bytes=2048, ecc_t=64, part=PSLC.resized(16384, spare_bytes=4096)),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def pages_of(config: Config, rng: np.random.Generator, pages: int) -> tuple[Any, Any]:
    data = rng.integers(0, 256, (pages, config.page_bytes), dtype=np.uint8)
    return data, rng.integers(0, config.pages_per_channel, pages)


def flipped(config: Config, raw: np.ndarray, bits: dict[int, list[int]]) -> np.ndarray:
    """Pages with these bits of these codewords wrong."""
    codewords = raw.reshape(-1, config.raw_codeword_bytes).copy()
    for codeword, positions in bits.items():
        for position in positions:
            codewords[codeword, position // 8] ^= 1 << position % 8
    return codewords.reshape(raw.shape)


def crc_of(data: bytes, state: int) -> int:
    """Bit by bit, as the definition says; the remainder's highest power leaves first."""
    remainder = 0
    bits = [byte >> i & 1 for byte in data for i in range(8)] + [0] * CRC_BITS
    for i in range(CRC_BITS):
        bits[i] ^= state >> i & 1
    for bit in bits:
        remainder = remainder << 1 | bit
        if remainder >> CRC_BITS:
            remainder ^= CRC_POLYNOMIAL
    return int(f"{remainder:0{CRC_BITS}b}"[::-1], 2)


@ALL
def test_check_value_and_parity_are_those_of_the_definition_and_of_bchlib(config):
    rng = np.random.default_rng(1)
    data, numbers = pages_of(config, rng, 2)
    raw = ecc.encode(config, data, numbers)
    size, t, m = config.codeword_bytes, config.ecc_t, config.bch_m
    library = bchlib.BCH(t, m=m, swap_bits=True)
    assert library.prim_poly == ecc.PRIMITIVE[m]
    inverted = (1 << library.ecc_bits) - 1
    for i, codeword in enumerate(raw.reshape(-1, config.raw_codeword_bytes)):
        page, index = divmod(i, config.codewords_per_page)
        content = data[page].tobytes()[index * size : (index + 1) * size]
        check = crc_of(content, ecc.seed(int(numbers[page]), index)).to_bytes(3, "little")
        parity = int.from_bytes(library.encode(content + check), "little") ^ inverted
        want = content + check + parity.to_bytes(library.ecc_bytes, "little")
        assert codeword.tobytes() == want + bytes(config.raw_codeword_bytes - len(want))


@pytest.mark.parametrize("m, t", [(10, 8), (10, 20), (10, 40), (11, 64), (13, 8), (15, 64)])
def test_generator_is_that_of_bchlib(m, t):
    # A long code's generator has fewer bits than m * t where roots are conjugate: what a single 1 is divided to.
    library = bchlib.BCH(t, m=m, swap_bits=True)
    codeword_bytes = 1 << m - 4
    config = Config(codeword_bytes=codeword_bytes, head_dim=32, dram_beat_bytes=32, ecc_t=1, sparse=False)
    assert config.bch_m == m
    factors = {ecc.Field(m).minimal_polynomial(j) for j in range(1, 2 * t, 2)}
    generator = 1
    for factor in factors:
        generator = ecc._carryless(generator, factor)
    division = Division(generator)
    assert division.degree == library.ecc_bits
    assert library.encode(b"\x80") == division.columns(1)[0].to_bytes(library.ecc_bytes, "little")


@ALL
def test_errors_are_corrected_as_bchlib_corrects_them(config):
    rng, choose = np.random.default_rng(2), random.Random(2)
    data, numbers = pages_of(config, rng, 3)
    raw = ecc.encode(config, data, numbers)
    code, size, t = ecc.code(config), config.codeword_bytes, config.ecc_t
    library = bchlib.BCH(t, m=config.bch_m, swap_bits=True)
    count = 3 * config.codewords_per_page
    weights = [choose.choice([0, 1, 2, t - 1, t, t + 1, t + 2, 3 * t]) for _ in range(count)]
    weights[:4] = [0, 1, t, t + 1]
    bits = {i: choose.sample(range(code.code_bits), weight) for i, weight in enumerate(weights)}
    bits[1] = [code.code_bits - 1]
    bits[2] = [0, *choose.sample(range(1, code.code_bits), t - 1)]
    received = flipped(config, raw, bits)
    decoded = ecc.decode(config, received, numbers)
    inverted = (1 << library.ecc_bits) - 1
    miscorrected = 0
    for i, codeword in enumerate(received.reshape(-1, config.raw_codeword_bytes)):
        outcome, errors = decoded.outcome.flat[i], decoded.errors.flat[i]
        got = decoded.data.reshape(count, -1)[i]
        message = bytearray(codeword[: size + 3])
        parity = int.from_bytes(codeword[size + 3 :][: library.ecc_bytes].tobytes(), "little") & inverted ^ inverted
        parity_bytes = bytearray(parity.to_bytes(library.ecc_bytes, "little"))
        found = library.decode(message, parity_bytes)
        if weights[i] <= t:
            assert found == weights[i] == errors
            assert outcome == (Outcome.CORRECTED if weights[i] else Outcome.CLEAN)
            assert np.array_equal(got, data.reshape(count, -1)[i])
        else:
            assert outcome == Outcome.UNCORRECTABLE
            assert not got.any()
            miscorrected += found >= 0
    if t == 1:
        assert miscorrected, "the check value had nothing to find"


@ALL
def test_padding_does_not_matter(config):
    code = ecc.code(config)
    padding = range(code.code_bits, config.raw_codeword_bytes * 8)
    data, numbers = pages_of(config, np.random.default_rng(3), 1)
    raw = flipped(config, ecc.encode(config, data, numbers), {0: list(padding)})
    decoded = ecc.decode(config, raw, numbers)
    assert np.array_equal(decoded.data, data)
    assert not decoded.outcome.any()


@ALL
def test_erased_codewords_are_told_apart(config):
    t = config.ecc_t
    raw = np.full((3, config.raw_page_bytes), 0xFF, np.uint8)
    bits = random.Random(4).sample(range(config.raw_codeword_bytes), t + 1)
    raw = flipped(config, raw, {0: [8 * b + b % 8 for b in bits[:t]], 1: [8 * b + b % 8 for b in bits]})
    decoded = ecc.decode(config, raw, [0, 1, 2])
    outcome = decoded.outcome.ravel().tolist()
    assert outcome[0] == Outcome.ERASED
    assert outcome[1] == Outcome.UNCORRECTABLE
    assert set(outcome[2:]) == {Outcome.ERASED}
    assert not decoded.data.any() and not decoded.errors.any()


@ALL
def test_a_bus_that_is_stuck_at_zero_is_no_codeword_of_any_page(config):
    pages = min(config.pages_per_channel, (1 << 20) // config.page_bytes)
    numbers = np.linspace(0, config.pages_per_channel - 1, pages).astype(int)
    decoded = ecc.decode(config, np.zeros((len(numbers), config.raw_page_bytes), np.uint8), numbers)
    assert set(decoded.outcome.ravel().tolist()) == {Outcome.UNCORRECTABLE}


@ALL
def test_misplaced_codewords_are_found(config):
    data, numbers = pages_of(config, np.random.default_rng(5), 2)
    data[1], numbers[1] = data[0], numbers[0] ^ 1   # the same data twice: only the place differs
    raw = ecc.encode(config, data, numbers)
    assert set(ecc.decode(config, raw, numbers[::-1]).outcome.ravel().tolist()) == {Outcome.UNCORRECTABLE}
    if config.codewords_per_page > 1:
        turned = np.roll(raw.reshape(2, -1, config.raw_codeword_bytes), 1, axis=1).reshape(raw.shape)
        assert set(ecc.decode(config, turned, numbers).outcome.ravel().tolist()) == {Outcome.UNCORRECTABLE}


@pytest.mark.parametrize("config", [TINY, BOARD], ids=["tiny", "board"])
def test_each_place_has_a_seed_of_its_own(config):
    bits = (config.pages_per_channel - 1).bit_length() + (config.codewords_per_page - 1).bit_length()
    places = [(page, i) for page in range(0, config.pages_per_channel, 1 if bits < 16 else 97)
              for i in range(config.codewords_per_page)]
    seeds = {ecc.seed(page, i) for page, i in places}
    assert len(seeds) == len(places) or bits > CRC_BITS
    near = {ecc.seed(page, i) for page in range(512) for i in range(config.codewords_per_page)}
    assert len(near) == 512 * config.codewords_per_page


def test_the_check_value_finds_every_odd_number_of_wrong_bits():
    # (x + 1) divides the polynomial, so every multiple of it has an even number of ones.
    assert CRC_POLYNOMIAL.bit_count() % 2 == 0
    quotient, remainder = 0, CRC_POLYNOMIAL
    for i in reversed(range(CRC_BITS)):
        if remainder >> i + 1 & 1:
            quotient |= 1 << i
            remainder ^= 0b11 << i
    assert remainder == 0
    # The other factor is primitive: x has order 2**23 - 1, a number with the factors 47 and 178481.
    division, order = Division(quotient), (1 << 23) - 1
    assert order == 47 * 178481

    def power(exponent: int) -> int:
        result, base = 1, 2
        while exponent:
            if exponent & 1:
                result = modulo(ecc._carryless(result, base))
            base, exponent = modulo(ecc._carryless(base, base)), exponent >> 1
        return result

    def modulo(value: int) -> int:
        while value.bit_length() > division.degree:
            value ^= quotient << value.bit_length() - quotient.bit_length()
        return value

    assert division.degree == 23
    assert power(order) == 1
    assert power(47) != 1 and power(178481) != 1


@pytest.mark.parametrize("m", sorted(ecc.PRIMITIVE))
def test_polynomials_are_primitive(m):
    field = ecc.Field(m)
    assert len(set(field.powers.tolist())) == (1 << m) - 1
    assert 0 not in field.powers


@given(st.integers(0, (1 << 24) - 1), st.integers(0, 100), st.sampled_from([CRC_POLYNOMIAL, 0b1011, 0x1B3]))
@settings(max_examples=50)
def test_division_goes_forward_and_back(state, steps, polynomial):
    division = Division(polynomial)
    state &= (1 << division.degree) - 1
    assert division.unshift(division.shift(state, steps), steps) == state


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 24) - 1), st.sampled_from([8, 16, 24, 64]))
@settings(max_examples=50)
def test_division_by_words_is_division_by_bits(word, state, bits):
    division = Division(CRC_POLYNOMIAL)
    word &= (1 << bits) - 1
    one = state
    for i in range(bits):
        one = division.shift(one ^ (word >> i & 1))
    v, many = word ^ state & (1 << bits) - 1, state >> bits
    for i, column in enumerate(division.columns(bits)):
        many ^= column if v >> i & 1 else 0
    assert many == one


@pytest.mark.slow
def test_a_full_drive_of_pages_is_encoded_without_a_loop_over_codewords():
    """82,000 codewords take 0.8 s on a machine of 2025: all at once, not one by one."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    rng = np.random.default_rng(6)
    data = rng.integers(0, 256, (2560, PAPER.page_bytes), dtype=np.uint8)
    ecc.encode(PAPER, data[:1], np.arange(1))   # makes the tables
    sys.setprofile(count)
    try:
        raw = ecc.encode(PAPER, data, np.arange(2560))
    finally:
        sys.setprofile(None)
    assert calls < 2560 * PAPER.codewords_per_page // 2
    raw.reshape(-1)[rng.integers(0, raw.size, int(raw.size * 8e-5))] ^= 4   # RBER 1e-5
    decoded = ecc.decode(PAPER, raw, np.arange(2560))
    assert np.array_equal(decoded.data, data)
    assert 2500 < (decoded.outcome == Outcome.CORRECTED).sum() < 4500


def test_arguments_are_checked():
    data = np.zeros((2, TINY.page_bytes), np.uint8)
    with pytest.raises(RequestError, match=r"pages must be uint8 of \(pages, 1024\), not uint16 of \(2, 1024\)"):
        ecc.encode(TINY, data.astype(np.uint16), [0, 1])
    with pytest.raises(RequestError, match=r"pages must be uint8 of \(pages, 1088\), not uint8 of \(2, 1024\)"):
        ecc.decode(TINY, data, [0, 1])
    with pytest.raises(RequestError, match="page_numbers must be 2 integers, one for each page, not int64 of"):
        ecc.encode(TINY, data, [0])
    with pytest.raises(RequestError, match=r"page_numbers must be 0 to \d+, not -1 to 1"):
        ecc.encode(TINY, data, [-1, 1])
    with pytest.raises(RequestError, match=r"page_numbers must be 0 to \d+, not 0 to \d+"):
        ecc.encode(TINY, data, [0, TINY.pages_per_channel])
    with pytest.raises(ConfigError, match=r"must need a field of 2\*\*5 to 2\*\*20, not 2\*\*21"):
        ecc.Field(21)
