"""`Cost`: what an answer, or much work, cost the drive: bytes, operations of its flash, cycles, energy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvattic.errors import RequestError
from kvattic.spec.commands import Kind
from kvattic.spec.config import Config
from kvattic.timing.energy import Energy, Range, Work, energy_of
from kvattic.timing.estimate import seconds

__all__ = ["KINDS", "Cost", "beside"]

KINDS = tuple(kind.name.lower() for kind in Kind)
"""Names of what jobs read: K, V, the feature layout of K, sketches (centroids, or K that a first pass scores exactly),
codes."""


def _none() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What something cost.

    Bytes and operations are counted; `cycles` are modelled if `modelled` is True, otherwise the drive's own; energy is
    always modelled (`kvattic.timing.energy`).

    Attributes:
        config: of the drive.
        flash_bytes: data bytes that jobs read from flash, by `KINDS`.
        dram_bytes: data bytes that jobs read from device DRAM, likewise.
        written_bytes: bytes that the host put into device DRAM: K, V and sketches on their way to flash.
        link_bytes: all bytes between host and drive: those, and commands, queries, tables, results and completions.
        page_reads: pages read from the flash arrays; None: not known, for hardware does not tell which pages a sparse
            job read (`Device.statistics` has the sum).
        page_programs, block_erases: operations of the planes.
        macs: multiplications.
        cycles: at the configuration's clock; None: the device keeps no time.
        modelled: whether `cycles` are the timing model's.
        drives: that worked side by side; each has static power.
    """

    config: Config
    flash_bytes: Mapping[str, int] = field(default_factory=_none)
    dram_bytes: Mapping[str, int] = field(default_factory=_none)
    written_bytes: int = 0
    link_bytes: int = 0
    page_reads: int | None = 0
    page_programs: int = 0
    block_erases: int = 0
    macs: int = 0
    cycles: int | None = 0
    modelled: bool = False
    drives: int = 1

    @property
    def seconds(self) -> float | None:
        """`cycles` at the configuration's clock; None if they are not known."""
        return None if self.cycles is None else seconds(self.config, self.cycles)

    @property
    def programmed_bytes(self) -> int:
        """Data bytes that were programmed."""
        return self.page_programs * self.config.page_bytes

    @property
    def energy(self) -> Energy | None:
        """What it took of energy, by part; None if pages or cycles are not known."""
        if self.page_reads is None or self.seconds is None:
            return None
        config = self.config
        codewords = sum(self.flash_bytes.values()) // config.codeword_bytes
        codewords += self.page_programs * config.codewords_per_page
        return energy_of(config, Work(
            page_reads=self.page_reads, page_programs=self.page_programs, block_erases=self.block_erases,
            bus_bytes=codewords * config.raw_codeword_bytes, link_bytes=self.link_bytes, macs=self.macs,
            # What is programmed is read from DRAM, where the host wrote it.
            dram_bytes=sum(self.dram_bytes.values()) + self.written_bytes + self.programmed_bytes,
            seconds=self.seconds * self.drives))

    @property
    def joules(self) -> Range | None:
        """The sum of `energy`."""
        found = self.energy
        return None if found is None else found.joules

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other.

        Raises:
            RequestError: they are of different configurations.
        """
        if not isinstance(other, Cost):
            return NotImplemented
        if other.config != self.config:
            raise RequestError("costs of drives with different configurations cannot be added")
        return self._combine(other, 1)

    def __sub__(self, earlier: "Cost") -> "Cost":
        """What came since: the difference of two sums of one device or sequence.

        Raises:
            RequestError: they are of different configurations.
        """
        if not isinstance(earlier, Cost):
            return NotImplemented
        if earlier.config != self.config:
            raise RequestError("costs of drives with different configurations cannot be subtracted")
        return self._combine(earlier, -1)

    def _combine(self, other: "Cost", sign: int) -> "Cost":
        def some(mine: int | None, theirs: int | None) -> int | None:
            return None if mine is None or theirs is None else mine + sign * theirs

        return replace(
            self,
            flash_bytes={kind: self.flash_bytes[kind] + sign * other.flash_bytes[kind] for kind in KINDS},
            dram_bytes={kind: self.dram_bytes[kind] + sign * other.dram_bytes[kind] for kind in KINDS},
            written_bytes=self.written_bytes + sign * other.written_bytes,
            link_bytes=self.link_bytes + sign * other.link_bytes,
            page_reads=some(self.page_reads, other.page_reads),
            page_programs=self.page_programs + sign * other.page_programs,
            block_erases=self.block_erases + sign * other.block_erases, macs=self.macs + sign * other.macs,
            cycles=some(self.cycles, other.cycles), modelled=self.modelled or other.modelled,
            drives=max(self.drives, other.drives))

    def __str__(self) -> str:
        read = sum(self.flash_bytes.values())
        time = "unknown time" if self.seconds is None else f"{1e3 * self.seconds:.4g} ms"
        energy, how = self.joules, "modelled" if self.modelled else "measured"
        joules = "" if energy is None else (
            f", {1e3 * energy.typical:.3g} mJ ({1e3 * energy.low:.3g} to {1e3 * energy.high:.3g}, modelled)")
        pages = "?" if self.page_reads is None else f"{self.page_reads:,}"
        return (f"{time} ({how}), {read / 1e6:.4g} MB from flash in {pages} page reads, "
                f"{sum(self.dram_bytes.values()) / 1e6:.4g} MB from DRAM, {self.page_programs:,} programs{joules}")


def beside(costs: Iterable[Cost]) -> Cost:
    """What drives cost that work at the same time: the longest time, and the sum of everything else.

    Args:
        costs: of each drive.

    Raises:
        RequestError: there are none, or they are of different configurations.
    """
    each = list(costs)
    if not each:
        raise RequestError("there must be the cost of at least one drive")
    total = sum(each[1:], each[0])
    times = [one.cycles for one in each]
    return replace(total, drives=sum(one.drives for one in each),
                   cycles=None if None in times else max(time for time in times if time is not None))
