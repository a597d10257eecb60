"""Energy of what a drive does: published figures with their ranges, and their sum.  Always modelled, never measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvattic.spec.config import Config

__all__ = ["FIGURES", "Energy", "Figure", "Range", "Work", "energy_of"]


class Range(NamedTuple):
    """A quantity that is known roughly.

    Members:
        low, typical, high: its bounds, and what is likely.
    """

    low: float
    typical: float
    high: float

    def __mul__(self, factor: object) -> "Range":
        """The range of a multiple; factor: int or float."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return Range(self.low * factor, self.typical * factor, self.high * factor)


class Figure(NamedTuple):
    """What something costs.

    Members:
        unit: of the range.
        range: its values.
        source: where they come from, bound by bound.
    """

    unit: str
    range: Range
    source: str


_FPGA = ("the FPGA draws 14 times an ASIC's dynamic power (Kuon and Rose, Measuring the Gap Between FPGAs and ASICs, "
         "IEEE TCAD 26(2), 2007)")

FIGURES: Mapping[str, Figure] = {
    "array": Figure(
        "mW of a plane that reads, programs or erases", Range(14.4, 33.0, 165.0),
        "Numonyx NAND01G-B2B datasheet, tables 22 and 23, one current for read, program and erase: 8 mA at 1.8 V; 10 "
        "mA at 3.3 V (typical, 20 maximal). High: assumed, five times typical, because a page of 16 KB has eight times "
        "that die's bit lines; no public datasheet of a 3D die gives a current"),
    "bus": Figure(
        "pJ a bit on a flash bus", Range(4.0, 10.0, 20.0),
        "assumed: 1.2 V, half of the bits change, 10 to 55 pF of pads and traces of eight dies; no published figure "
        "found"),
    "ecc": Figure(
        "pJ a bit decoded or encoded", Range(2.74, 3.43, 48.0),
        "65 nm decoders for NAND: 2.74 (Lee et al., IEEE JSSC 48(10), 2013), 3.43 (Hwang et al., IEEE TCAS-I 66(11), "
        f"2019). High: {_FPGA}"),
    "dram": Figure(
        "pJ a bit of device DRAM", Range(3.9, 14.0, 40.0),
        "HBM2 3.9 and GDDR5 14.0 (O'Connor et al., Fine-Grained DRAM, MICRO 2017); 2.6 nJ for 64 bits (Horowitz, "
        "ISSCC 2014)"),
    "mac": Figure(
        "pJ a multiplication with its addition", Range(1.5, 4.6, 64.0),
        "45 nm (Horowitz, ISSCC 2014): fp16 1.1 + 0.4; fp32 3.7 + 0.9, taken as typical because the sums are wide. "
        f"High: {_FPGA}"),
    "link": Figure(
        "pJ a bit between host and drive", Range(2.0, 5.0, 12.0),
        "assumed: no published figure of a PCIe port found; it is below 1 percent of an answer's sum"),
    "static": Figure(
        "W of controller, DRAM and idle dies while the drive works", Range(0.28, 1.0, 3.18),
        "0.28: a Samsung 850 Pro awake and idle (measured by Tom's Hardware). 3.18: maximum of a Samsung 980 PRO's "
        "lowest active power state (AnandTech). Typical: assumed, between the two"),
}
"""What the parts of a drive cost, by the name of the part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What costs energy.

    Attributes:
        page_reads, page_programs, block_erases: of the planes.
        bus_bytes: on the flash buses, parity included; all of them are decoded or encoded.
        dram_bytes: into and out of device DRAM.
        link_bytes: between host and drive.
        macs: multiplications.
        seconds: that the drive works.
    """

    page_reads: int = 0
    page_programs: int = 0
    block_erases: int = 0
    bus_bytes: int = 0
    dram_bytes: int = 0
    link_bytes: int = 0
    macs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules, by part; modelled.

    Attributes:
        parts: read, program, erase, bus, ecc, dram, link, mac, static.
    """

    parts: Mapping[str, Range]

    @property
    def joules(self) -> Range:
        """The sum: low and high are what it is if all parts are at their bounds at once."""
        columns = zip(*self.parts.values(), strict=True)
        return Range(*(sum(column) for column in columns))


def energy_of(config: Config, work: Work) -> Energy:
    """What some work costs.

    Args:
        config: of the drive, whose part's times its arrays take.
        work: what was done.
    """
    part, pico = config.part, {name: figure.range * 1e-12 for name, figure in FIGURES.items()}
    # Milliwatts and nanoseconds are picojoules.
    return Energy({
        "read": pico["array"] * (work.page_reads * part.t_r),
        "program": pico["array"] * (work.page_programs * part.t_prog),
        "erase": pico["array"] * (work.block_erases * part.t_bers),
        "bus": pico["bus"] * (8 * work.bus_bytes),
        "ecc": pico["ecc"] * (8 * work.bus_bytes),
        "dram": pico["dram"] * (8 * work.dram_bytes),
        "link": pico["link"] * (8 * work.link_bytes),
        "mac": pico["mac"] * work.macs,
        "static": FIGURES["static"].range * work.seconds,
    })
