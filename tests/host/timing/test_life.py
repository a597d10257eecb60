"""Wear and life: bytes that a token programs, and the paper's endurance table."""

from dataclasses import replace

import numpy as np
import pytest

import kvattic
from kvattic.errors import ConfigError, RequestError
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.formats import KvFormat
from kvattic.timing.life import Life, programmed_bytes

OPT_13B = {"layers": 40, "kv_heads": 40}


def test_bytes_of_a_token():
    assert programmed_bytes(PAPER, **OPT_13B) == 40 * 40 * 128 * 2 * 2 == pytest.approx(0.78125 * 2**20)
    assert programmed_bytes(PAPER, **OPT_13B, features=True) == 1.5 * programmed_bytes(PAPER, **OPT_13B)
    means = programmed_bytes(PAPER, **OPT_13B, centroids=64) / programmed_bytes(PAPER, **OPT_13B)
    assert means == pytest.approx(1 + 1 / 128, rel=0.01)


def test_the_papers_endurance_table():
    """InstAttention: 3,000 erases, 4 drives of 2 TiB, 0.78 MB a token, K once; kept for weeks only: 6.67 times."""
    life = Life(token_bytes=0.78 * 2**20, capacity_bytes=2 << 40, erases=3000, drives=4)
    assert life.tokens / 1000 == pytest.approx(32_263_877, rel=1e-6)
    kept_for_weeks = Life(token_bytes=0.78 * 2**20, capacity_bytes=2 << 40, erases=3000, drives=4, retention=6.67)
    for years, users in ((5, 920), (3, 1530), (1, 4600)):
        assert kept_for_weeks.users(years, 128_000) == pytest.approx(users, rel=0.004)
    # With the second copy of K, which the paper does not count, two thirds of that.
    twice = Life(token_bytes=1.5 * 0.78 * 2**20, capacity_bytes=2 << 40, erases=3000, drives=4)
    assert twice.tokens == pytest.approx(life.tokens / 1.5)
    assert life.years(1000) == pytest.approx(life.tokens / 1000 / 86400 / 365)
    assert Life(token_bytes=1, capacity_bytes=1, erases=1, amplification=2).tokens == 0.5


@pytest.mark.parametrize("sketches", [{}, {"sparse": True}, {"sparse": True, "centroids": 8},
                                      {"sparse": True, "centroids": 8, "codes": True}])
def test_the_drive_programs_as_much(sketches):
    config = replace(TINY, dies=8)
    tokens, heads = 8 * config.group_tokens, 3
    with kvattic.open("model", config) as device:
        sequence = device.create_sequence(heads, capacity_tokens=tokens, **sketches)
        values = np.random.default_rng(0).standard_normal((heads, tokens, config.head_dim))
        sequence.prefill(values, values)
        found = sequence.statistics().programmed_bytes / tokens
    wanted = programmed_bytes(config, layers=1, kv_heads=heads, features="sparse" in sketches,
                              centroids=sketches.get("centroids"), codes="codes" in sketches)
    assert wanted <= found <= 1.05 * wanted     # the last page of centroids need not be full


@pytest.mark.parametrize("make, message", [
    (lambda: programmed_bytes(PAPER, layers=0, kv_heads=1), "layers must be a positive int, not 0"),
    (lambda: programmed_bytes(PAPER, layers=1, kv_heads=True), "kv_heads must be a positive int, not True"),
    (lambda: programmed_bytes(PAPER, layers=1, kv_heads=1, centroids=3), "3"),
    (lambda: Life(token_bytes=0, capacity_bytes=1, erases=1), "token_bytes must be a positive number, not 0"),
    (lambda: Life(token_bytes=1, capacity_bytes=1, erases=float("inf")), "erases must be a positive number"),
    (lambda: Life(token_bytes=1, capacity_bytes=1, erases=1, amplification=0.5), "amplification must be at least 1"),
    (lambda: Life(token_bytes=1, capacity_bytes=1, erases=1).years(0), "tokens_a_second must be a positive number"),
    (lambda: Life(token_bytes=1, capacity_bytes=1, erases=1).users(1, -1), "tokens_a_day must be a positive number"),
])
def test_numbers_without_meaning_are_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_codes_need_a_configuration_with_them():
    with pytest.raises(ConfigError, match="without codes: kv must be element, not fp8_e4m3"):
        programmed_bytes(replace(TINY, kv=KvFormat.FP8_E4M3), layers=1, kv_heads=1, codes=True)
    # A feature of a token has 2 bits, and the levels take their room from the last few of them.
    share = programmed_bytes(PAPER, layers=1, kv_heads=1, codes=True) / programmed_bytes(PAPER, layers=1, kv_heads=1)
    assert share == 1 + 1 / 16
