"""What ageing costs: read retries, time and lost codewords at a raw bit-error rate.  Always modelled, never measured.

Bits are wrong independently of each other, so the errors of a codeword are binomial. A retry reads the codeword again
with errors of its own, as the project's NAND model does; at each level the error rate is `retry_factor` times that of
the level before. A real die's levels move its thresholds instead, which helps far more against retention and not at all
against cells that are wrong at every threshold: of both, nothing is published for the presets' parts.

The time is analytic. Three things work side by side on a channel, and the slowest sets the pace of reads that keep the
bus busy: the bus, which moves each codeword and each retry; the corrector, which several channels share, and of whose
three stages each takes a codeword with errors at a time (docs/ecc.md); and the retries, one at a time on each channel
(docs/controller.md).
"""

import math
from dataclasses import dataclass, replace

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.ageing import YEAR_DAYS, Ageing, ageing_of
from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.scheduling import CORRECTOR_POSITIONS, channels_of_corrector

__all__ = ["CLIENT_UBER", "Aged", "age", "at_rber", "code_bits", "failure", "needed_t", "tolerated_rber"]

CLIENT_UBER = 1e-15
"""Uncorrectable errors that a client drive may have for each bit read (JESD218B, table 1; enterprise: 1e-16)."""
SECONDS_A_YEAR = YEAR_DAYS * 86_400
# Cycles of a corrector's stages (docs/ecc.md), beside what depends on the code: reception; locator, for one error;
# search, for one error and for more.
TAKE, LOCATE_ONE, SEARCH_ONE, SEARCH = 8, 3, 10.0, 10.0
AT_CORRECTOR = 2
"""Codewords of a channel that its corrector may have."""
FEATURE_BYTES = 4
"""Bytes of a set of features."""
MAX_T = 64
"""Largest `ecc_t` of a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aged:
    """A drive whose flash has some raw bit-error rate; modelled. `age` and `at_rber` make it.

    Attributes:
        config: of the drive.
        rber: raw bit-error rate at the default read level.
        corrected: share of the codewords with errors, but no more than the code corrects.
        failed: share that have more on the first read.
        retries: retries for each codeword that is wanted, on average.
        lost: share that no retry level reads.
        corrector_cycles: between two codewords of a channel, on average, for the corrector that it shares with others
            which read as much; retries included.
    """

    config: Config
    rber: float
    corrected: float
    failed: float
    retries: float
    lost: float
    corrector_cycles: float

    @property
    def retry_us(self) -> float:
        """Microseconds of one retry: level, array read, codeword, level."""
        part = self.config.part
        feature = 2 * part.t_cad + part.t_adl + FEATURE_BYTES / part.bus_mts * 1e3 + part.t_wb + part.t_feat
        read = 7 * part.t_cad + part.t_wb + part.t_r + part.t_rr + part.t_pre
        return (2 * feature + read) / 1e3 + self.config.raw_codeword_bytes / part.bus_mts

    @property
    def page_us(self) -> float:
        """Extra microseconds of a page that is read whole, on average: its retries one after the other."""
        return self.config.codewords_per_page * self.retries * self.retry_us

    @property
    def codeword_cycles(self) -> float:
        """Cycles for a codeword of reads that keep the bus busy: of the bus, the corrector or the retries, the most."""
        bus = _bus_cycles(self.config) * (1 + self.retries)
        return max(bus, self.corrector_cycles, self.retries * self.retry_us * self.config.clock_mhz)

    @property
    def factor(self) -> float:
        """Times as long as without errors that reads take that keep the bus busy, as dense attends do."""
        return self.codeword_cycles / _bus_cycles(self.config)

    @property
    def uber(self) -> float:
        """Lost codewords for each data bit that is read, as JESD218 counts; at most `CLIENT_UBER` is allowed."""
        return self.lost / (8 * self.config.codeword_bytes)

    @property
    def slowed(self) -> Config:
        """The configuration with a bus so slow that a codeword takes `codeword_cycles`, for `estimate`.

        Reads of any mode are then modelled at this age; programs, which have no errors, would take too long.
        """
        config = self.config
        if self.codeword_cycles <= _bus_cycles(config):
            return config
        mts = config.raw_codeword_bytes * config.clock_mhz / self.codeword_cycles
        return replace(config, part=replace(config.part, bus_mts=mts))

    def lost_a_year(self, codewords_a_second: float | None = None) -> float:
        """Codewords that are lost in a year of reading.

        Args:
            codewords_a_second: that the drive reads; None: as many as all channels can move at this age.

        Raises:
            RequestError: it is negative.
        """
        if codewords_a_second is None:
            codewords_a_second = self.config.channels * self.config.clock_mhz * 1e6 / self.codeword_cycles
        elif codewords_a_second < 0:
            raise RequestError(f"codewords_a_second must not be negative, not {codewords_a_second!r}")
        return self.lost * codewords_a_second * SECONDS_A_YEAR


def age(config: Config, cycles: float, days: float, *, reads: float = 0.0, ageing: Ageing | None = None,
        retry_factor: float = 1.0) -> Aged:
    """What a drive's age costs.

    Args:
        config: of the drive.
        cycles: program/erase cycles of the blocks that are read.
        days: since they were programmed.
        reads: of each page since then.
        ageing: of the flash; None: what is published for the part's kind of cell.
        retry_factor: error rate at a retry level over that of the level before, 0 to 1.

    Raises:
        ConfigError: nothing is published for such flash.
        RequestError: a number has no meaning, or is outside of the range for which there are figures.
    """
    known = ageing_of(config.part) if ageing is None else ageing
    return at_rber(config, known.rber(cycles, days, reads=reads), retry_factor=retry_factor)


def at_rber(config: Config, rber: float, *, retry_factor: float = 1.0) -> Aged:
    """What a raw bit-error rate costs.

    Args:
        config: of the drive.
        rber: raw bit-error rate at the default read level, 0 to 0.5.
        retry_factor: error rate at a retry level over that of the level before, 0 to 1.

    Raises:
        RequestError: a number is outside of its range.
    """
    for name, value, most in (("rber", rber, 0.5), ("retry_factor", retry_factor, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise RequestError(f"{name} must be from 0 to {most:g}, not {value!r}")
    failed = failure(config, rber)
    reached, retries, cycles = 1.0, 0.0, 0.0
    for level in range(config.part.retry_levels + 1):
        rate = rber * retry_factor**level
        retries += reached if level else 0.0
        cycles += reached * _corrector(config, rate)
        reached *= failure(config, rate)
    return Aged(config=config, rber=float(rber), corrected=1 - _none(config, rber) - failed, failed=failed,
                retries=retries, lost=reached, corrector_cycles=cycles)


def failure(config: Config, rber: float) -> float:
    """Probability that a codeword has more wrong bits than the code corrects.

    Args:
        config: of the drive; its `ecc_t` and codewords count.
        rber: raw bit-error rate.
    """
    return _above(code_bits(config), config.ecc_t, rber)


def code_bits(config: Config) -> int:
    """Bits of a codeword that the code covers: data, CRC, parity."""
    return 8 * config.codeword_bytes + CRC_BITS + config.bch_m * config.ecc_t


def needed_t(config: Config, rber: float, *, uber: float = CLIENT_UBER) -> int | None:
    """Least `ecc_t` with which a drive loses no more than it may, its retries included.

    Args:
        config: of the drive.
        rber: raw bit-error rate.
        uber: lost codewords for each data bit that is read.

    Returns:
        It, or None: no code whose parity fits the part's spare bytes is strong enough.
    """
    for t in range(1, MAX_T + 1):
        try:
            stronger = replace(config, ecc_t=t)
        except ConfigError:
            return None
        if at_rber(stronger, rber).uber <= uber:
            return t
    return None


def tolerated_rber(config: Config, *, uber: float = CLIENT_UBER, factor: float | None = None) -> float:
    """Highest raw bit-error rate at which a drive loses no more than it may.

    Args:
        config: of the drive.
        uber: lost codewords for each data bit that is read.
        factor: and reads take at most so many times as long; None: however long.

    Raises:
        RequestError: a limit is not positive, or the factor below 1.
    """
    if not uber > 0 or (factor is not None and factor < 1):
        raise RequestError(f"uber must be positive and factor at least 1, not {uber!r} and {factor!r}")
    low, high = 1e-12, 0.5
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        aged = at_rber(config, middle)
        good = aged.uber <= uber and (factor is None or aged.factor <= factor)
        low, high = (middle, high) if good else (low, middle)
    return low


def _bus_cycles(config: Config) -> float:
    return max(config.raw_codeword_bytes / config.part.bus_mts * config.clock_mhz, config.raw_codeword_words)


def _share(bits: int, errors: int, rber: float) -> float:
    """Probability of so many wrong bits."""
    if rber == 0:
        return float(errors == 0)
    log = math.lgamma(bits + 1) - math.lgamma(errors + 1) - math.lgamma(bits - errors + 1)
    return math.exp(log + errors * math.log(rber) + (bits - errors) * math.log1p(-rber))


def _above(bits: int, most: int, rber: float) -> float:
    """Probability of more than so many wrong bits: summed from below or above, where it is the smaller part."""
    if bits * rber > most + 1:
        return max(0.0, 1 - sum(_share(bits, errors, rber) for errors in range(most + 1)))
    total = 0.0
    for errors in range(most + 1, bits + 1):
        term = _share(bits, errors, rber)
        total += term
        if term <= 1e-17 * total:
            break
    return min(total, 1.0)


def _none(config: Config, rber: float) -> float:
    return _share(code_bits(config), 0, rber)


def _corrector(config: Config, rber: float) -> float:
    """Mean cycles between two codewords of a channel, for its corrector.

    One codeword is searched while the next one's locator is found, and neither goes on before the other is done.
    """
    bits, t = code_bits(config), config.ecc_t
    shares = [_share(bits, errors, rber) for errors in range(t + 1)]
    shares.append(failure(config, rber))          # those are searched to their end
    wrong = sum(shares[1:])
    if wrong == 0:
        return 0.0
    locate = [0.0, 2 * t + LOCATE_ONE, *(
        7 * t + 4 + (t + 2.5) * errors + errors * errors / 2 for errors in range(2, t + 2))]
    search = [0.0, SEARCH_ONE, *(
        t + SEARCH + errors / (errors + 1) * bits / CORRECTOR_POSITIONS for errors in range(2, t + 1))]
    search.append(t + SEARCH + bits / CORRECTOR_POSITIONS)
    pairs = sum(first * second * max(ahead, behind) for first, ahead in zip(shares[1:], search[1:], strict=True)
                for second, behind in zip(shares[1:], locate[1:], strict=True)) / wrong
    take = config.bch_m * t / 8 + TAKE
    alone = sum(share * (take + a + b) for share, a, b in zip(shares[1:], locate[1:], search[1:], strict=True))
    return max(channels_of_corrector(config) * pairs, alone / AT_CORRECTOR)
