"""The golden device's flash: blocks, pages, the map from zones to blocks, and its faults."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvattic.golden.image import FlashImage, Record
from kvattic.golden.rejected import RejectedError
from kvattic.spec import layout
from kvattic.spec.commands import MediaCause, Opcode, Status
from kvattic.spec.config import Config
from kvattic.spec.layout import Block, PagePlace

__all__ = ["Flash", "FlashFaults", "PowerCutError"]


class PowerCutError(Exception):
    """The supply failed."""


class _Page(NamedTuple):
    """What was programmed: the data, or None if they are garbage, and the page number that they were written under."""

    image: NDArray[np.uint8] | None
    number: int


class _Block:
    """A block that is not erased: pages by their number in it, and the one that may be programmed next."""

    __slots__ = ("next", "pages")

    def __init__(self) -> None:
        self.next = 0
        self.pages: dict[int, _Page] = {}


@dataclass(slots=True)
class FlashFaults:
    """Faults of the golden device's flash; they may change at any time.

    Attributes:
        bad: blocks with the factory's mark: PROBE finds it, PROGRAM and ERASE fail.
        mark_pages: pages of a bad block that have the mark; None: all in which the part's maker may put one.
        worn: blocks whose PROGRAM and ERASE fail from now on; what they hold can be read.
        program_fails: single pages that fail to program, (block, page of the block).
        dead: (channel, die) of dies that stay busy: DIE_TIMEOUT, and nothing on them can be read.
        unreadable: codewords with too many bit errors, (block, page of the block, codeword).
        power_cut: flash commands after which the supply fails in the middle of the next one; None: it does not.  The
            device then does nothing until `GoldenDevice.power_up`.
    """

    bad: set[Block] = field(default_factory=set)
    mark_pages: set[int] | None = None
    worn: set[Block] = field(default_factory=set)
    program_fails: set[tuple[Block, int]] = field(default_factory=set)
    dead: set[tuple[int, int]] = field(default_factory=set)
    unreadable: set[tuple[Block, int, int]] = field(default_factory=set)
    power_cut: int | None = None


class Flash:
    """The flash of a drive.  It obeys the rules of NAND: the pages of a block are programmed in order and each once.

    Args:
        config: geometry.
        faults: its faults.
        image: the file that it is kept in; None: it ends with this object.

    Attributes:
        blocks: those that are not erased.
        map: (channel, zone, die, plane) to block, where zone and block have different numbers; `remap` and `forget_map`
            change it.
        version: another number after each change that makes a page unreadable, or another one's number.
    """

    def __init__(self, config: Config, faults: FlashFaults, image: FlashImage | None = None) -> None:
        self._config = config
        self._faults = faults
        self._image = image
        self.blocks: dict[Block, _Block] = {}
        for record in () if image is None else image.records():
            self._restore(record)
        self.map: dict[tuple[int, int, int, int], int] = {}
        self.version = 0

    def remap(self, channel: int, place: PagePlace, block: int) -> None:
        """Map the zone of a place, on its die and plane, to another block."""
        self.version += 1
        self.map[channel, place.zone, place.die, place.plane] = block

    def forget_map(self) -> None:
        """Map every zone to the block of its number."""
        self.version += 1
        self.map.clear()

    @property
    def has_read_faults(self) -> bool:
        """Whether any page that was programmed may be unreadable."""
        return bool(self._faults.dead or self._faults.unreadable)

    def address(self, channel: int, number: int) -> int | None:
        """Where the data of a page lie in this process, until `version` changes; None: they cannot be read.

        Faults are not looked at: see `has_read_faults`.
        """
        place = layout.page_place(number, self._config)
        written = self.blocks.get(self.block(channel, place))
        page = None if written is None else written.pages.get(place.page)
        if page is None or page.image is None or page.number != number:
            return None
        found: int = page.image.__array_interface__["data"][0]
        return found

    def _restore(self, record: Record) -> None:
        """Do what a record of the image says."""
        if record.page is None:
            self.blocks.pop(record.block, None)
            return
        found = self.blocks.setdefault(record.block, _Block())
        found.pages[record.page] = _Page(record.image, record.number)
        found.next = max(found.next, record.page + 1)

    def _keep(self, record: Record) -> None:
        if self._image is not None:
            self._image.write(record)

    def block(self, channel: int, place: PagePlace) -> Block:
        """The block that a place lies in."""
        zone = place.zone
        block = self.map.get((channel, zone, place.die, place.plane), zone) if self.map else zone
        return Block(channel, place.die, place.plane, block)

    def is_place(self, channel: int, number: int) -> bool:
        """Whether the page exists."""
        config, place = self._config, layout.page_place(number, self._config)
        return channel < config.channels and place.zone < config.part.blocks and place.page < config.part.pages

    def read_page(self, channel: int, number: int,
                  codewords: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int], MediaCause]:
        """Read codewords of a flash page.

        Args:
            channel: of the page.
            number: of the page.
            codewords: int64, their numbers in the page.

        Returns:
            uint8, (codewords, codeword_bytes), zeros where a codeword cannot be read; the indices of those; and why.
        """
        faults, size = self._faults, self._config.codeword_bytes
        place = layout.page_place(number, self._config)
        block = self.block(channel, place)
        written = self.blocks.get(block)
        page = None if written is None else written.pages.get(place.page)
        cause = MediaCause.UNCORRECTABLE
        if (channel, place.die) in faults.dead:
            page, cause = None, MediaCause.DIE_TIMEOUT
        elif page is None:
            cause = MediaCause.ERASED
        if page is None or page.image is None or page.number != number:
            return np.zeros((len(codewords), size), np.uint8), list(range(len(codewords))), cause
        found: NDArray[np.uint8] = page.image.reshape(-1, size)[codewords]
        gone: list[int] = []
        if faults.unreadable:
            gone = [i for i, each in enumerate(codewords.tolist()) if (block, place.page, each) in faults.unreadable]
            found[gone] = 0
        return found, gone, cause

    def operate(self, opcode: Opcode, channel: int, number: int, image: NDArray[np.uint8] | None) -> None:
        """PROGRAM, ERASE or PROBE of a page that exists; RejectedError says how the part ends it.

        Args:
            opcode: which of them.
            channel: of the page.
            number: of the page.
            image: PROGRAM: the data; None: they cannot be read.

        Raises:
            RejectedError: it failed.
            PowerCutError: the supply failed meanwhile.
        """
        faults, place = self._faults, layout.page_place(number, self._config)
        block, where = self.block(channel, place), channel << 24 | number
        cut = False
        if faults.power_cut is not None:
            cut, faults.power_cut = faults.power_cut == 0, faults.power_cut - 1 if faults.power_cut else None
        if (channel, place.die) in faults.dead:
            raise RejectedError(Status.DIE_TIMEOUT, where)
        if opcode is Opcode.PROGRAM:
            self._program(block, place.page, number, image, where, cut)
        elif opcode is Opcode.ERASE:
            self._erase(block, number, where, cut)
        else:
            self._probe(block, place.page, where)
        if cut:
            raise PowerCutError

    def _program(self, block: Block, page: int, number: int, image: NDArray[np.uint8] | None, where: int,
                 cut: bool) -> None:
        faults, found = self._faults, self.blocks.setdefault(block, _Block())
        if page != found.next:
            raise RejectedError(Status.PROGRAM_FAILED, where)
        found.next += 1
        failed = bool({block} & (faults.bad | faults.worn)) or (block, page) in faults.program_fails
        found.pages[page] = content = _Page(None if failed or cut else image, number)
        self._keep(Record(block, page, number, content.image))
        if cut:
            raise PowerCutError
        if failed:
            raise RejectedError(Status.PROGRAM_FAILED, where)
        if image is None:
            raise RejectedError(Status.BUS_ERROR, where)

    def _erase(self, block: Block, number: int, where: int, cut: bool) -> None:
        if block in self._faults.bad or block in self._faults.worn:
            raise RejectedError(Status.ERASE_FAILED, where)
        self.version += 1
        if cut:
            garbage = self.blocks.setdefault(block, _Block())
            garbage.pages = {page: _Page(None, number) for page in range(self._config.part.pages)}
            for page in garbage.pages:
                self._keep(Record(block, page, number))
            raise PowerCutError
        if self.blocks.pop(block, None) is not None:
            self._keep(Record(block))

    def _probe(self, block: Block, page: int, where: int) -> None:
        faults = self._faults
        marked = self._config.part.marked_pages if faults.mark_pages is None else faults.mark_pages
        if block in faults.bad and page in marked:
            raise RejectedError(Status.BAD_BLOCK, where)

    def written(self) -> Iterator[tuple[Block, int, NDArray[np.uint8]]]:
        """What a thief with a soldering iron would find: (block, page of the block, data) of each page."""
        for block, found in sorted(self.blocks.items()):
            for page, content in sorted(found.pages.items()):
                if content.image is not None:
                    yield block, page, content.image
