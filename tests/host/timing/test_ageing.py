"""What ageing costs: error rates as published, the binomial, retries, the corrector, and what lacks figures."""

import math
from dataclasses import replace

import pytest

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.ageing import TLC_72, Ageing, ageing_of
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.nand import LOW_LATENCY, MT29F128G08, PSLC, TLC
from kvattic.timing import Layer, estimate
from kvattic.timing.ageing import age, at_rber, code_bits, failure, needed_t, tolerated_rber

TLC_DRIVE = replace(PAPER, part=TLC)
DECODER = {1e-4: 109.46, 3e-4: 376.9}
"""Cycles for a codeword of each of four decoders that share a corrector, as measured on the RTL (docs/ecc.md)."""


def test_the_published_curve():
    assert TLC_72.rber(0, 0) == 1.48e-3
    assert TLC_72.rber(3000, 0) == pytest.approx(1.48e-3 + 3.9e-10 * 3000**2.05)
    year = TLC_72.rber(3000, 365) - TLC_72.rber(3000, 0)
    assert year == pytest.approx(6.28e-5 * 3000**0.14 * 8760**0.54)
    assert replace(TLC_72, unit_hours=24.0).rber(3000, 365) < TLC_72.rber(3000, 365) / 2
    assert TLC_72.rber(1000, 0, reads=1000) - TLC_72.rber(1000, 0) == pytest.approx(3.73e-9 * 1000**2.04, rel=1e-6)
    assert ageing_of(TLC) is TLC_72
    assert Ageing(name="bad", source="", fresh=0.4, wear=1.0).rber(3, 0) == 0.5


@pytest.mark.parametrize("cycles", [0, 1, 1500, 3000])
def test_flash_only_gets_worse(cycles):
    rates = [TLC_72.rber(cycles, days) for days in (0, 1, 30, 365)]
    assert rates == sorted(rates)
    assert TLC_72.rber(cycles, 1) <= TLC_72.rber(min(cycles + 100, 3000), 1)


@pytest.mark.parametrize("part", [PSLC, LOW_LATENCY, MT29F128G08], ids=lambda part: part.name)
def test_no_figures_are_made_up(part):
    with pytest.raises(ConfigError, match=f"{part.name}: there are no published figures of ageing for flash with"):
        ageing_of(part)
    config = PAPER if part is PSLC else replace(TLC_DRIVE, part=replace(TLC, name=part.name, cell_bits=part.cell_bits))
    with pytest.raises(ConfigError, match="three bits a cell"):
        age(config, 1, 1)
    assert age(config, 1, 1, ageing=TLC_72).rber == TLC_72.rber(1, 1)    # the caller's own


@pytest.mark.parametrize("config", [PAPER, TINY], ids=["paper", "tiny"])
@pytest.mark.parametrize("rber", [1e-4, 1e-3, 5e-3])
def test_the_binomial(config, rber):
    bits = code_bits(config)
    exact = 1 - sum(math.comb(bits, e) * rber**e * (1 - rber)**(bits - e) for e in range(config.ecc_t + 1))
    assert failure(config, rber) == pytest.approx(exact, rel=1e-6, abs=1e-13)


def test_the_table_of_the_docs():
    """docs/ecc.md, more than eight errors in a codeword of 4,224 bits."""
    assert code_bits(PAPER) == 4224
    for rber, share in ((1e-5, 1.1e-18), (1e-4, 8.0e-10), (3e-4, 7.4e-6), (1e-3, 0.029)):
        assert failure(PAPER, rber) == pytest.approx(share, rel=0.03)
    assert at_rber(PAPER, 1e-3).corrected + at_rber(PAPER, 1e-3).failed == pytest.approx(0.985, abs=0.001)


def test_no_errors_cost_nothing():
    aged = at_rber(PAPER, 0)
    assert (aged.factor, aged.retries, aged.lost, aged.page_us, aged.corrected) == (1, 0, 0, 0, 0)
    assert aged.slowed == PAPER
    assert aged.lost_a_year() == 0


def test_retries_are_those_of_the_parts_levels():
    aged = at_rber(PAPER, 1e-3)
    p = aged.failed
    assert PAPER.part.retry_levels == 3
    assert aged.retries == pytest.approx(p + p**2 + p**3)
    assert aged.lost == pytest.approx(p**4)
    better = at_rber(PAPER, 1e-3, retry_factor=0.5)
    q, r = failure(PAPER, 5e-4), failure(PAPER, 2.5e-4)
    assert better.retries == pytest.approx(p + p * q + p * q * r)
    assert better.lost < aged.lost
    one = replace(PAPER, part=replace(PSLC, retry_levels=1))
    assert at_rber(one, 1e-3).retries == pytest.approx(p)
    # An array read is most of a retry; two changes of the level come to it.
    assert aged.retry_us == pytest.approx(25 + 2 * 1 + 0.4, abs=1)
    assert aged.page_us == pytest.approx(32 * aged.retries * aged.retry_us)
    assert at_rber(TLC_DRIVE, 1e-3).retry_us == pytest.approx(aged.retry_us + 35)
    # At the worst every codeword is read at every level, and none is there.
    worst = at_rber(PAPER, 0.1)
    assert (worst.retries, worst.lost) == (pytest.approx(3), pytest.approx(1))


@pytest.mark.parametrize("rber", DECODER)
def test_the_corrector_is_as_slow_as_measured(rber):
    assert at_rber(PAPER, rber).codeword_cycles == pytest.approx(DECODER[rber], rel=0.03)


def test_the_timing_model_says_the_same_of_dense_attends():
    layer = Layer(PAPER, heads=8, tokens=2048)
    new = estimate(PAPER, layer.attend()).cycles
    for rber in (3e-4, 1e-3):
        aged = at_rber(PAPER, rber)
        old = estimate(aged.slowed, layer.attend()).cycles
        assert old / new == pytest.approx(aged.factor, rel=0.08)    # filling and draining take no longer


def test_lost_codewords():
    aged = at_rber(PAPER, 1e-3)
    assert aged.uber == aged.lost / 4096
    assert aged.lost_a_year(1.0) == pytest.approx(aged.lost * 365 * 86400)
    assert aged.lost_a_year() == pytest.approx(8 * 285e6 / aged.codeword_cycles * aged.lost * 365 * 86400)
    with pytest.raises(RequestError, match="codewords_a_second must not be negative, not -1"):
        aged.lost_a_year(-1)


def test_how_strong_a_code_must_be():
    rber = TLC_72.rber(0, 0)
    strong = needed_t(TLC_DRIVE, rber)
    assert at_rber(replace(TLC_DRIVE, ecc_t=strong), rber).uber <= 1e-15
    assert at_rber(replace(TLC_DRIVE, ecc_t=strong - 1), rber).uber > 1e-15
    assert strong > TLC_DRIVE.ecc_t
    assert needed_t(TLC_DRIVE, TLC_72.rber(3000, 365)) is None      # its parity does not fit the spare bytes
    assert needed_t(PAPER, 0.0) == 1


def test_which_error_rate_is_tolerated():
    lossless, as_fast = tolerated_rber(PAPER), tolerated_rber(PAPER, factor=1.01)
    assert at_rber(PAPER, lossless).uber <= 1e-15 < at_rber(PAPER, 1.01 * lossless).uber
    assert at_rber(PAPER, as_fast).factor <= 1.01 < at_rber(PAPER, 1.05 * as_fast).factor
    assert as_fast < lossless


@pytest.mark.parametrize("make, error, message", [
    (lambda: TLC_72.rber(-1, 0), RequestError, "cycles must be a number from 0 on, at most 3,000"),
    (lambda: TLC_72.rber(3001, 0), RequestError, "where the figures end, not 3001"),
    (lambda: TLC_72.rber(1, 366), RequestError, "days must be a number from 0 on, at most 365"),
    (lambda: TLC_72.rber(1, 1, reads=float("nan")), RequestError, "reads must be a number from 0 on"),
    (lambda: TLC_72.rber(True, 1), RequestError, "cycles must be a number"),
    (lambda: Ageing(name="x", source="", fresh=-1.0), ConfigError, "x: fresh must be a number from 0 on, finite"),
    (lambda: Ageing(name="x", source="", fresh=0.0, unit_hours=0.0), ConfigError, "unit_hours must be above 0"),
    (lambda: at_rber(PAPER, 0.6), RequestError, "rber must be from 0 to 0.5, not 0.6"),
    (lambda: at_rber(PAPER, True), RequestError, "rber must be from 0 to 0.5, not True"),
    (lambda: at_rber(PAPER, 0.1, retry_factor=2), RequestError, "retry_factor must be from 0 to 1, not 2"),
    (lambda: tolerated_rber(PAPER, factor=0.9), RequestError, "factor at least 1"),
    (lambda: tolerated_rber(PAPER, uber=0), RequestError, "uber must be positive"),
])
def test_numbers_without_meaning_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
