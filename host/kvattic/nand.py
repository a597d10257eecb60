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

__all__ = ["COLUMN_CYCLES", "PARTS", "ROW_CYCLES", "T_RST_IDLE", "NandPart", "part"]

COLUMN_CYCLES = 2
"""Address cycles of a column."""
ROW_CYCLES = 3
"""Address cycles of a row."""
T_RST_IDLE = 5_000.0
"""Reset of an idle die, at most (ONFI: 5 us)."""


def _is_power_of_two(value: int) -> bool:
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
        t_rcbsy: busy of a cache read, until the register before can be read.
        t_pcbsy: busy of a cache program, where the array was idle.
        t_wb: last command cycle to busy; no sooner does ready mean done.
        t_rr: ready to first data.
        t_ccs: change of column to data.
        t_adl: last address cycle to first data in.
        t_whr: command to status byte.
        t_cad: one command or address cycle.
        t_pre: preamble and postamble of a data burst.
        t_feat: set or get features.
        t_rst: reset of a busy die, at most.
        retry_levels: read-retry settings beside the default.
        endurance: erases that a block stands.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{self.name}: {field.name} must be a positive int, not {value!r}")
            if field.type in (float, "float"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                    raise ConfigError(f"{self.name}: {field.name} must be a positive number, not {value!r}")
                object.__setattr__(self, field.name, float(value))
        for name in ("page_bytes", "planes"):
            if not _is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{self.name}: {name} must be a power of two, not {getattr(self, name)!r}")
        if self.raw_bytes > 1 << 8 * COLUMN_CYCLES:
            raise ConfigError(f"{self.name}: page_bytes must be such that a page and its spare have at most "
                              f"2**{8 * COLUMN_CYCLES} bytes, not {self.raw_bytes}")
        if self.row(0, self.blocks - 1, 0) >> 8 * ROW_CYCLES:
            raise ConfigError(f"{self.name}: blocks must be such that a row address has at most "
                              f"{8 * ROW_CYCLES} bits, not {self.blocks!r}")

    @property
    def raw_bytes(self) -> int:
        """Bytes of a page, spare included."""
        return self.page_bytes + self.spare_bytes

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
        """(plane, block, page) of a row address; block and page may lie beyond what the die has."""
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


PSLC = NandPart(name="pslc", source="3D TLC used as SLC: tR 25 us")
"""A pSLC part at 25 us."""
TINY_PART = NandPart(
    name="tiny", source="no part: small and fast, for tests", page_bytes=1024, spare_bytes=128, planes=2, blocks=8,
    pages=8, t_r=3_000.0, t_prog=10_000.0, t_bers=20_000.0, t_dbsy=200.0, t_rcbsy=400.0, t_pcbsy=400.0,
    t_rst=5_000.0)
"""Fast tests."""

PARTS = {p.name: p for p in (PSLC, TINY_PART)}


def part(name: str) -> NandPart:
    """The named part.

    Raises:
        ConfigError: there is no part of that name.
    """
    try:
        return PARTS[name]
    except KeyError:
        raise ConfigError(f"there is no NAND part {name!r}; parts are {', '.join(PARTS)}") from None
