"""NAND parts as data: geometry and timing of the flash chips that a drive is built from.

One source for the controller's waits (hdl), the behavioural model's busy times (sim) and the host's zones.  A part is
one target with one die (LUN); `Config.dies` of them share a channel.  Times are nanoseconds.

On the bus a page has a row address of three cycles, low byte first: page of the block in the lowest bits, the plane
right above it, the block above (ONFI's layout), and a column of two cycles: a byte of the page, spare included.
"""

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, Self

from kvattic.errors import ConfigError

__all__ = ["COLUMN_CYCLES", "MARK_ZEROS", "PARTS", "ROW_CYCLES", "T_RST_IDLE", "NandPart", "is_power_of_two", "part"]

COLUMN_CYCLES = 2
"""Address cycles of a column."""
ROW_CYCLES = 3
"""Address cycles of a row."""
MARK_ZEROS = 4
"""Zeros among a mark's eight bits that make a block bad (FFh: good, 00h: bad; both are read with bit errors)."""
T_RST_IDLE = 5_000.0
"""Reset of an idle die, at most (ONFI: 5 us)."""


def is_power_of_two(value: int) -> bool:
    """Whether the value is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NandPart:
    """One die, as its datasheet describes it.

    Attributes:
        name: what reports call it.
        source: where the figures come from.
        page_bytes: data bytes of a page, a power of two.
        spare_bytes: further bytes of a page, for parity and the factory's bad-block mark.
        planes: planes of a die, a power of two; they can read, program and erase the same page number together.
        blocks: blocks of a plane.
        pages: pages of a block, programmed in order.
        bus_mts: transfers per second on the 8-bit data bus, in millions: bytes per microsecond.
        separate_command_bus: commands and addresses have pins of their own (JESD230G SCA), so that they do not
            interrupt data; otherwise they share the bus (ONFI 4).
        t_r: array to page register.
        t_prog: page register to array.
        t_bers: block erase.
        t_dbsy: busy between the planes of a multi-plane command (ONFI tPLPBSY, tPLRBSY).
        t_rcbsy: busy time of a cache read, until the page read before can be moved.
        t_pcbsy: busy time of a cache program whose die's array was idle.
        t_wb: last command cycle to busy; before it, ready does not mean done.
        t_rr: ready to first data.
        t_ccs: change of column to data.
        t_adl: last address cycle to first data in.
        t_whr: command to status byte.
        t_cad: one command or address cycle.
        t_pre: preamble and postamble of a data burst.
        t_feat: set or get features.
        t_rst: reset of a busy die, at most.
        retry_levels: read-retry settings besides the default.
        endurance: erases that a block survives.
        cell_bits: bits stored in a cell.
        mark_pages: pages of a block in which the factory may mark it as bad, at least in one of them: 0 the first, 1
            the second, -1 the last.
        mark_byte: the byte of these pages' spare that is 00h then, and FFh in a good block.
    """

    name: str
    source: str
    page_bytes: int = 16384
    spare_bytes: int = 2208
    planes: int = 4
    blocks: int = 256
    pages: int = 256
    bus_mts: float = 1400.0
    separate_command_bus: bool = False
    t_r: float = 25_000.0
    t_prog: float = 200_000.0
    t_bers: float = 2_000_000.0
    t_dbsy: float = 500.0
    t_rcbsy: float = 3_000.0
    t_pcbsy: float = 3_000.0
    t_wb: float = 100.0
    t_rr: float = 20.0
    t_ccs: float = 300.0
    t_adl: float = 150.0
    t_whr: float = 80.0
    t_cad: float = 25.0
    t_pre: float = 15.0
    t_feat: float = 1_000.0
    t_rst: float = 500_000.0
    retry_levels: int = 3
    endurance: int = 30_000
    cell_bits: int = 1
    mark_pages: tuple[int, ...] = (0, -1)
    mark_byte: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "mark_byte":
                continue
            if field.type in (int, "int") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{self.name}: {field.name} must be a positive int, not {value!r}")
            if field.type in (float, "float"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                    raise ConfigError(f"{self.name}: {field.name} must be a positive number, not {value!r}")
                object.__setattr__(self, field.name, float(value))
        for name in ("page_bytes", "planes"):
            if not is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{self.name}: {name} must be a power of two, not {getattr(self, name)!r}")
        if self.raw_bytes > 1 << 8 * COLUMN_CYCLES:
            raise ConfigError(f"{self.name}: page_bytes must be such that a page and its spare have at most "
                              f"2**{8 * COLUMN_CYCLES} bytes, not {self.raw_bytes}")
        if self.row(0, self.blocks - 1, 0) >> 8 * ROW_CYCLES:
            raise ConfigError(f"{self.name}: blocks must be such that a row address has at most "
                              f"{8 * ROW_CYCLES} bits, not {self.blocks!r}")
        self._check_marks()

    def _check_marks(self) -> None:
        pages: Any = self.mark_pages
        if (not isinstance(pages, tuple | list) or not pages or any(type(page) is not int for page in pages)
                or not all(-self.pages <= page < self.pages for page in pages)):
            raise ConfigError(f"{self.name}: mark_pages must be pages of a block, 0 to {self.pages - 1}, or from the "
                              f"last one on -1 to {-self.pages}, at least one, not {pages!r}")
        object.__setattr__(self, "mark_pages", tuple(pages))
        if type(self.mark_byte) is not int or not 0 <= self.mark_byte < self.spare_bytes:
            raise ConfigError(f"{self.name}: mark_byte must be a byte of the spare, 0 to {self.spare_bytes - 1}, not "
                              f"{self.mark_byte!r}")

    @property
    def raw_bytes(self) -> int:
        """Bytes of a page, spare included."""
        return self.page_bytes + self.spare_bytes

    @property
    def mark_column(self) -> int:
        """Byte of a page that has the factory's mark."""
        return self.page_bytes + self.mark_byte

    @property
    def marked_pages(self) -> tuple[int, ...]:
        """`mark_pages` as numbers from 0 on, each once, in order."""
        return tuple(sorted({page % self.pages for page in self.mark_pages}))

    @property
    def row_page_bits(self) -> int:
        """Lowest bits of a row address: the page of the block."""
        return (self.pages - 1).bit_length()

    @property
    def row_plane_bits(self) -> int:
        """Next bits of a row address: the plane; above them stands the block."""
        return (self.planes - 1).bit_length()

    def row(self, plane: int, block: int, page: int) -> int:
        """Row address of a page."""
        return (block << self.row_plane_bits | plane) << self.row_page_bits | page

    def place(self, row: int) -> tuple[int, int, int]:
        """(plane, block, page) of a row address; block and page may not exist on the die."""
        above = row >> self.row_page_bits
        return above & self.planes - 1, above >> self.row_plane_bits, row & (1 << self.row_page_bits) - 1

    def address(self, plane: int, block: int, page: int, column: int = 0) -> bytes:
        """The five address cycles of a page and column."""
        return column.to_bytes(COLUMN_CYCLES, "little") + self.row(plane, block, page).to_bytes(ROW_CYCLES, "little")

    def page_index(self, die: int, plane: int, block: int, page: int) -> int:
        """Number of a physical page on its channel, counted without gaps: die, plane, block, page from high to low."""
        return ((die * self.planes + plane) * self.blocks + block) * self.pages + page

    def page_place(self, index: int) -> tuple[int, int, int, int]:
        """(die, plane, block, page) of a `page_index`."""
        block, page = divmod(index, self.pages)
        plane, block = divmod(block, self.blocks)
        die, plane = divmod(plane, self.planes)
        return die, plane, block, page

    def resized(self, page_bytes: int, **changes: Any) -> Self:
        """The same part with pages of another size, and as much spare in proportion; further fields as given."""
        spare = max(1, ceil(self.spare_bytes * page_bytes / self.page_bytes))
        return replace(self, **{"page_bytes": page_bytes, "spare_bytes": spare} | changes)


# Waits of the bus protocol (t_wb, t_rr, t_ccs, t_adl, t_whr, t_feat, t_rst) are ONFI's for NV-DDR2 and NV-DDR3, t_cad
# is tWC of those modes, unless a part says otherwise: t_wb 100 ns at most, t_rr 20 ns, t_adl 150 ns, t_whr 80 ns,
# t_feat 1 us, t_rst 500 us at most.  t_ccs, which each die's parameter page tells, is typically 300 ns (ONFI lets a
# host that did not look assume no less than 500).  t_dbsy, t_rcbsy and t_pcbsy are typical, too.  `blocks` are those
# that a simulation keeps; dies have 500 to 4,000 in a plane.
#
# Marks of bad blocks stand in the first byte of the spare: of the first or the last page, unless a part says otherwise,
# which is ONFI's rule (its section on factory defect mapping; Cosmos+'s firmware looks in both, too).  Makers' rules
# are those that Linux keeps (drivers/mtd/nand/raw/nand_toshiba.c: first and second page of SLC; nand_samsung.c: last
# page of MLC); Micron's datasheets of MLC parts guarantee the mark in the first page.

PSLC = NandPart(
    name="pslc",
    source="3D TLC used with one bit a cell, no named datasheet: tR 25 us, tPROG 200 us and tBERS 2 ms are typical; "
           "16384 + 2208 bytes and 256 pages a block as OpenSSD firmware has for such a die in SLC mode")
"""A pSLC part at 25 us."""
TLC = NandPart(
    name="tlc",
    source="64-layer TLC: tR 60 us, tPROG 700 us (AnandTech on the Samsung 983 ZET, table of 3D NAND generations; "
           "tPROG is a page's share); tBERS 3.5 ms and 3,000 erases are typical; geometry as pslc with three pages a"
           " cell row; bus as pslc, so that only the array differs",
    pages=768, t_r=60_000.0, t_prog=700_000.0, t_bers=3_500_000.0, t_rcbsy=5_000.0, t_pcbsy=5_000.0, endurance=3_000,
    cell_bits=3)
"""A TLC part: 2.4 times the tR of the pSLC part, 3.5 times its tPROG."""
LOW_LATENCY = NandPart(
    name="lowlatency",
    source="like Kioxia's first XL-FLASH: 16 planes, 4 KB pages, tR 4 us (Tom's Hardware for the planes, design "
           "studies of in-flash computing for tR); tPROG 100 us is Samsung's Z-NAND, the like part (AnandTech on the "
           "983 ZET: tR 3 us, tPROG 100 us); tBERS 1 ms, t_dbsy and t_rcbsy are typical of SLC",
    page_bytes=4096, spare_bytes=256, planes=16, t_r=4_000.0, t_prog=100_000.0, t_bers=1_000_000.0, t_dbsy=200.0,
    t_rcbsy=1_000.0, t_pcbsy=1_000.0, endurance=50_000, mark_pages=(0, 1))
"""A low-latency SLC part."""
PAPER_DRIVE = NandPart(
    name="paper",
    source="the drive of InstAttention (HPCA 2025): 1.4 GB/s a channel and 4 KB pages; the paper gives no array "
           "times, those are pslc's",
    page_bytes=4096, spare_bytes=552, planes=4)
"""The paper's drive."""
MQSIM = NandPart(
    name="mqsim",
    source="MQSim's default set (Flash_Parameter_Set.cpp, ssdconfig.xml): 2 planes, 8 KB + 448 bytes, 256 pages, 333 "
           "MT/s, tR 75 us, tPROG 750 us, tBERS 3.8 ms, 10,000 erases",
    page_bytes=8192, spare_bytes=448, planes=2, bus_mts=333.0, t_r=75_000.0, t_prog=750_000.0, t_bers=3_800_000.0,
    t_rst=500_000.0, endurance=10_000, cell_bits=2)
"""MQSim's default."""
MQSIM_1000 = NandPart(
    name="mqsim_1000",
    source="the set on which MQSim's scheduler was measured: 1,000 MT/s, 16 KB pages, tR 50 "
           "us, 2 planes; the rest as mqsim",
    spare_bytes=896, planes=2, bus_mts=1000.0, t_r=50_000.0, t_prog=750_000.0, t_bers=3_800_000.0, endurance=10_000,
    cell_bits=2)
"""The geometry of the bar for random page reads."""
NVMEVIRT_970PRO = NandPart(
    name="nvmevirt_970pro",
    source="NVMeVirt, ssd_config.h, SAMSUNG_970PRO: 32 KB pages, 800 MB/s, tR 30.0 us (lower page) or 42.0 us "
           "(upper), here their mean, tPROG 185 us; its erase takes no time, here 3 ms",
    page_bytes=32768, spare_bytes=4416, planes=1, bus_mts=800.0, t_r=36_013.0, t_prog=185_000.0, t_bers=3_000_000.0,
    endurance=10_000, cell_bits=2, mark_pages=(-1,))
"""NVMeVirt's Samsung 970 PRO."""
NVMEVIRT_ZNS = NandPart(
    name="nvmevirt_zns",
    source="NVMeVirt, ssd_config.h, ZNS_PROTOTYPE (TLC): 64 KB pages, here 4 planes of 16 KB, 800 MB/s, tR 40.95 us,"
           " tPROG 1,913.64 us (there of three pages at once); its erase takes no time, here 3.5 ms",
    bus_mts=800.0, t_r=40_950.0, t_prog=1_913_640.0, t_bers=3_500_000.0, endurance=3_000, cell_bits=3)
"""NVMeVirt's ZNS prototype."""
NVMEVIRT_ZN540 = NandPart(
    name="nvmevirt_zn540",
    source="NVMeVirt, ssd_config.h, WD_ZN540 (TLC): 32 KB pages, 450 MB/s, tR 58 us, tPROG 561 us (there of three "
           "pages at once); its erase takes no time, here 3.5 ms",
    page_bytes=32768, spare_bytes=4416, planes=1, bus_mts=450.0, t_r=58_000.0, t_prog=561_000.0, t_bers=3_500_000.0,
    endurance=3_000, cell_bits=3)
"""NVMeVirt's Western Digital ZN540."""
SIMPLESSD = NandPart(
    name="simplessd",
    source="SimpleSSD's default set: 2 planes, 16 KB pages, 400 MT/s, tR 40 to 65 us and "
           "tPROG 500 to 1,300 us by page type, here the middle of both, tBERS 3.5 ms",
    planes=2, bus_mts=400.0, t_r=52_500.0, t_prog=900_000.0, t_bers=3_500_000.0, endurance=3_000, cell_bits=2)
"""SimpleSSD's default."""
FEMU = NandPart(
    name="femu",
    source="FEMU, ftl.h: 4 KB pages, tR 40 us, tPROG 200 us, tBERS 2 ms; FEMU moves data in no time: 1,400 MT/s here",
    page_bytes=4096, spare_bytes=552, planes=1, t_r=40_000.0, t_prog=200_000.0, t_bers=2_000_000.0)
"""FEMU's default."""
MT29F128G08 = NandPart(
    name="mt29f128g08",
    source="Micron datasheet MT29F128G08CBECB (MLC, ONFI 3.2): 16384 + 1872 bytes, 512 pages, 2 planes of 1,048 "
           "blocks, NV-DDR2 mode 3 at 166 MT/s, tR 115 us (max), tPROG 1,600 us (typ), tBERS 3 ms (typ), 3,000 "
           "erases",
    spare_bytes=1872, planes=2, blocks=1048, pages=512, bus_mts=166.0, t_r=115_000.0, t_prog=1_600_000.0,
    t_bers=3_000_000.0, t_rcbsy=6_000.0, t_pcbsy=6_000.0, endurance=3_000, cell_bits=2, mark_pages=(0,))
"""A die with a public datasheet."""
COSMOS = NandPart(
    name="cosmos",
    source="Cosmos+ OpenSSD's firmware, memory map of its 16 KB MLC modules: 16384 + 1664 bytes, 256 pages; the "
           "firmware names no times: 200 MT/s (100 MHz, both edges) is assumed, the array's are mt29f128g08's",
    spare_bytes=1664, planes=2, bus_mts=200.0, t_r=115_000.0, t_prog=1_600_000.0, t_bers=3_000_000.0, t_rcbsy=6_000.0,
    t_pcbsy=6_000.0, endurance=3_000, cell_bits=2)
"""Cosmos+ OpenSSD."""
SCA = NandPart(
    name="sca",
    source="no part: a TLC die with JESD230G's separate command and address bus at 3,600 MT/s (that standard goes to"
           " 4,800; 3,600 is what the fastest die in production has); a cycle of 10 ns is assumed; array as tlc",
    separate_command_bus=True, bus_mts=3600.0, t_cad=10.0, pages=768, t_r=60_000.0, t_prog=700_000.0,
    t_bers=3_500_000.0, t_rcbsy=5_000.0, t_pcbsy=5_000.0, endurance=3_000, cell_bits=3)
"""A part with its own command bus."""
TINY_PART = NandPart(
    name="tiny", source="no part: small and fast, for tests", page_bytes=1024, spare_bytes=128, planes=2, blocks=8,
    pages=8, t_r=3_000.0, t_prog=10_000.0, t_bers=20_000.0, t_dbsy=200.0, t_rcbsy=400.0, t_pcbsy=400.0,
    t_rst=5_000.0)
"""Fast tests."""

PARTS = {p.name: p for p in (
    PSLC, TLC, LOW_LATENCY, PAPER_DRIVE, MQSIM, MQSIM_1000, NVMEVIRT_970PRO, NVMEVIRT_ZNS, NVMEVIRT_ZN540, SIMPLESSD,
    FEMU, MT29F128G08, COSMOS, SCA, TINY_PART)}


def part(name: str) -> NandPart:
    """The named part.

    Raises:
        ConfigError: there is no part of that name.
    """
    try:
        return PARTS[name]
    except KeyError:
        raise ConfigError(f"there is no NAND part {name!r}; parts are {', '.join(PARTS)}") from None
