"""Ageing of flash as data: the raw bit-error rate over program/erase cycles, retention time and reads, as published.

A table of its own beside the parts, so that what is known of ageing is no part of a drive's identity (`Config.hash`).
Only published figures stand here. For a kind of cell without any, `ageing_of` says so; a caller with figures of its
own makes an `Ageing`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvattic.errors import ConfigError, RequestError
from kvattic.spec.nand import NandPart

__all__ = ["AGEING", "TLC_72", "YEAR_DAYS", "Ageing", "ageing_of"]

YEAR_DAYS = 365.0
"""Days for which a worn client drive must keep data without power, at 30 degrees (JESD218B, table 1; an enterprise
drive: three months at 40 degrees)."""
KINDS = {1: "one bit a cell (SLC, pSLC, low latency)", 2: "two bits a cell (MLC)", 3: "three bits a cell (TLC)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ageing:
    """Raw bit-error rate of a kind of flash: a sum of what is always there, wear, retention and read disturb.

    With c cycles, t units of time since the program, and r reads since then:
    ``fresh + wear * c**wear_power + retention * c**retention_cycles * t**retention_time
    + disturb * c**disturb_cycles * r**disturb_reads``.

    Attributes:
        name: what reports call it.
        source: where the figures come from.
        fresh: error rate of a page that was just programmed in a block that was never erased.
        wear, wear_power: of cycles.
        retention, retention_cycles, retention_time: of time.
        disturb, disturb_cycles, disturb_reads: of reads.
        unit_hours: hours of the unit of time.
        max_cycles, max_days, max_reads: up to where it holds; beyond it, `rber` refuses.

    Raises:
        ConfigError: a number is negative or not finite.
    """

    name: str
    source: str
    fresh: float
    wear: float = 0.0
    wear_power: float = 1.0
    retention: float = 0.0
    retention_cycles: float = 0.0
    retention_time: float = 1.0
    disturb: float = 0.0
    disturb_cycles: float = 0.0
    disturb_reads: float = 1.0
    unit_hours: float = 1.0
    max_cycles: int = 3_000
    max_days: float = YEAR_DAYS
    max_reads: float = 1_000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("name", "source"):
                _check(self.name, field.name, getattr(self, field.name), math.inf, ConfigError)
        if not self.unit_hours:
            raise ConfigError(f"{self.name}: unit_hours must be above 0")

    def rber(self, cycles: float, days: float, *, reads: float = 0.0) -> float:
        """Raw bit-error rate.

        Args:
            cycles: program/erase cycles of the block.
            days: since the page was programmed.
            reads: of the page since then.

        Raises:
            RequestError: a number is outside of the range for which there are figures.
        """
        for name, value, most in (("cycles", cycles, self.max_cycles), ("days", days, self.max_days),
                                  ("reads", reads, self.max_reads)):
            _check(self.name, name, value, most, RequestError)
        time = days * 24 / self.unit_hours
        total: float = (self.fresh + self.wear * cycles**self.wear_power
                        + self.retention * cycles**self.retention_cycles * time**self.retention_time
                        + self.disturb * cycles**self.disturb_cycles * reads**self.disturb_reads)
        return min(0.5, total)


def _check(owner: str, name: str, value: object, most: float, error: type[ConfigError | RequestError]) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most and value < math.inf
    if not good:
        limit = "finite" if most == math.inf else f"at most {most:,g}, where the figures end"
        raise error(f"{owner}: {name} must be a number from 0 on, {limit}, not {value!r}")


TLC_72 = Ageing(
    name="72-layer TLC",
    source="B. S. Kim, J. Choi, S. L. Min, Design Tradeoffs for SSD Reliability, FAST 2019: the sum of wear, retention "
           "and disturbance fitted to 72-layer TLC. The coefficients are those that a public implementation for MQSim "
           "quotes; the paper's table was not at hand. That implementation takes time in hours and the reads of a page "
           "on average; if days are meant, unit_hours is 24. Read at the default voltages, without tuning. Range: the "
           "cycles such parts are rated for, a year (JESD218B), 1,000 reads",
    fresh=1.48e-3, wear=3.90e-10, wear_power=2.05, retention=6.28e-5, retention_cycles=0.14, retention_time=0.54,
    disturb=3.73e-9, disturb_cycles=0.33, disturb_reads=1.71)
"""3D TLC, the only kind with a published curve over all three that could be read here."""

AGEING: Mapping[int, Ageing] = {3: TLC_72}
"""What is published, by bits of a cell."""


def ageing_of(part: NandPart) -> Ageing:
    """The ageing of a part's kind of cell.

    Args:
        part: the die.

    Raises:
        ConfigError: nothing is published for its kind.
    """
    try:
        return AGEING[part.cell_bits]
    except KeyError:
        kind = KINDS.get(part.cell_bits, f"{part.cell_bits} bits a cell")
        raise ConfigError(f"{part.name}: there are no published figures of ageing for flash with {kind}; there are for "
                          f"{', '.join(KINDS[bits] for bits in AGEING)}; give an Ageing, or a raw bit-error rate "
                          "(at_rber)") from None
