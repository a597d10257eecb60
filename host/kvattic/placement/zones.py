"""Zones of flash: the owners of pages, bad blocks, wear.

A *zone* is one block on every (channel, die, plane), all erased together.  Pages of a zone are taken in order and never
written twice; when all sequences that have pages in it are gone, it is erased as a whole.  So nothing is ever copied.
docs/placement.md explains the policy.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import CapacityError, RequestError
from kvattic.placement.domains import COMMON_DOMAIN, NOBODY, check_domain
from kvattic.spec.config import Config
from kvattic.spec.layout import Block, PagePlace, page_number, page_place

__all__ = ["Allocation", "Remap", "Wear", "ZoneAllocator"]

Erase: TypeAlias = Callable[[Sequence[tuple[int, int]]], Sequence[bool]]
"""Erases the blocks that (channel, page) lie in; whether each could be."""
Grant: TypeAlias = Callable[[Sequence[int], int], None]
"""Gives zones to a domain."""


class Remap(NamedTuple):
    """An entry of the device's map that must change.

    Members:
        channel: flash channel.
        page: a page number of the zone, die and plane.
        block: the block to be used there.
    """

    channel: int
    page: int
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wear:
    """Erases of the blocks in use.

    Attributes:
        minimum: of the least worn block.
        maximum: of the most worn block.
        mean: of all.
    """

    minimum: int
    maximum: int
    mean: float

    @property
    def spread(self) -> int:
        """Most minus fewest erases."""
        return self.maximum - self.minimum


@dataclass(slots=True, eq=False)
class Zone:
    """A zone that is not clean.

    A *row* is one page of each of its blocks on one channel.  A *column* is as many consecutive blocks of the row as a
    run of pages lies in.  The lists go round from the least worn die on, so that the first dies do not wear out first.

    Attributes:
        number: of the zone.
        domain: its owner.
        run: consecutive page numbers of each thing that is placed here.
        start: column that is used first.
        fill: for each channel and column, runs that were taken.
        limit: runs of a column.
        broken: (channel, block of the row) whose program failed.
        users: who has pages here.
    """

    number: int
    domain: int
    run: int
    start: int
    fill: list[list[int]]
    limit: int
    broken: set[tuple[int, int]] = field(default_factory=set)
    users: set["Allocation"] = field(default_factory=set)


@dataclass(slots=True)
class Stream:
    """Zones that are filled one after the other, and how far each channel has come."""

    zones: list[Zone]
    at: list[int]

    def remove(self, zone: Zone) -> None:
        """Forget a zone."""
        if zone in self.zones:
            index = self.zones.index(zone)
            del self.zones[index]
            self.at = [at - (at > index) for at in self.at]


@dataclass(slots=True, eq=False)
class Allocation:
    """What one sequence has in flash; made by `ZoneAllocator.create`.

    Attributes:
        domain: whose zones it fills.
        run: consecutive page numbers of each thing that it places.
        quota: zones that it fills alone.
        shared: for each channel, runs that are still to come into zones that it shares; negative if there were more.
        own: the zones that it fills alone.
        uses: numbers of the zones in which it has pages.
    """

    domain: int
    run: int
    quota: int
    shared: list[int]
    own: Stream
    uses: set[int] = field(default_factory=set)


class ZoneAllocator:
    """Hands out pages of zones; keeps bad blocks, wear and write amplification.

    A sequence has zones of its own for what fills them; the rest of it goes into zones that it shares with others of
    its domain whose runs are as long.  The least worn free zone is taken.  A zone without users is erased: at once with
    `erase_on_free`, otherwise before its next use.

    A bad block of a zone is replaced by a spare block of the same channel, die and plane; where no spare is left, the
    zone has a hole there, which is skipped.

    All zones belong to domain 1 at first (`send_owners` says so to the device).  A zone changes its owner when another
    domain takes it, and only when it is erased.  Where a block with data of a domain can be neither erased nor
    replaced, the zone never passes to another domain: domain 1 goes on using it, and that of any other domain is never
    used again.

    Args:
        config: geometry.
        erase: erases blocks of the device.
        remap: changes the device's map.
        grant: gives zones to a domain, on the device.
        bad_blocks: blocks that must not be used.
        spare_blocks: blocks of each plane that are kept as spares; if None, 2 percent of them and at least one.
        erase_on_free: see above.

    Attributes:
        zones: their number.
        pages_programmed: pages that were programmed, successfully or not (see `account`).
        pages_written: pages of the sequences' data among them.

    Raises:
        RequestError: a bad block or the number of spare blocks does not exist in this geometry.
    """

    def __init__(self, config: Config, *, erase: Erase | None = None,
                 remap: Callable[[Sequence[Remap]], None] | None = None, grant: Grant | None = None,
                 bad_blocks: Iterable[Block] = (), spare_blocks: int | None = None,
                 erase_on_free: bool = True) -> None:
        self.config = config
        part = config.part
        spares = max(1, -(-part.blocks // 50)) if spare_blocks is None else spare_blocks
        if not isinstance(spares, int) or not 0 <= spares < part.blocks:
            raise RequestError(f"spare_blocks must be 0 to {part.blocks - 1}, not {spares!r}")
        self.zones = part.blocks - spares
        self.erase_on_free = erase_on_free
        self.pages_programmed = 0
        self.pages_written = 0
        self._erase: Erase = erase or (lambda places: [True] * len(places))
        self._remap = remap or (lambda remaps: None)
        self._grant: Grant = grant or (lambda zones, domain: None)
        self._row = part.planes * config.dies
        self._bad = {Block(*block) for block in bad_blocks}
        for block in self._bad:
            limits = (config.channels, config.dies, part.planes, part.blocks)
            if not all(0 <= value < limit for value, limit in zip(block, limits, strict=True)):
                raise RequestError(f"there is no block {block}: the drive has {config.channels} channels, "
                                   f"{config.dies} dies, {part.planes} planes and {part.blocks} blocks")
        channels, row = config.channels, self._row
        # (zone, channel, block of the row): physical block, -1 where none is left.  Its spares, lowest last.
        self._map: NDArray[np.int64] = np.broadcast_to(
            np.arange(self.zones)[:, None, None], (self.zones, channels, row)).copy()
        self._spares = [[[b for b in range(part.blocks - 1, self.zones - 1, -1)
                          if Block(c, *self._split(r), b) not in self._bad] for r in range(row)]
                        for c in range(channels)]
        self._erases: NDArray[np.int64] = np.zeros((channels, row, part.blocks), np.int64)
        self._clean = set(range(self.zones))
        # Of zones that are not clean: which blocks were written, and which are bad, (channel, block of the row) each.
        self._dirty: dict[int, tuple[list[tuple[int, int]], set[tuple[int, int]]]] = {}
        self._open: dict[int, Zone] = {}
        self._shared: dict[tuple[int, int], Stream] = {}   # of (domain, run)
        self._owners = [COMMON_DOMAIN] * self.zones
        self._marked: set[int] = set()      # data are left in them, in a block that is out of use
        self._allocations: set[Allocation] = set()
        self._unsent: list[Remap] = []
        self._lost: set[tuple[int, int]] = set()   # (channel, die) that do not answer
        for block in sorted(self._bad):
            if block.block < self.zones:
                self._replace(block.block, block.channel, block.die * part.planes + block.plane)

    # Bad blocks.

    def _split(self, place: int) -> tuple[int, int]:
        return divmod(place, self.config.part.planes)

    def _page(self, zone: int, place: int, page: int = 0) -> int:
        die, plane = self._split(place)
        return int(page_number(PagePlace(zone, page, die, plane), self.config))

    def _place(self, page: int) -> tuple[int, int]:
        """(zone, block of the row) of a page number."""
        where = page_place(page, self.config)
        return where.zone, where.die * self.config.part.planes + where.plane

    def block(self, channel: int, page: int) -> Block | None:
        """The physical block that a page lies in; None at a hole."""
        zone, place = self._place(page)
        block = int(self._map[zone, channel, place]) if zone < self.zones else zone
        return None if block < 0 else Block(channel, *self._split(place), block)

    @property
    def bad_blocks(self) -> list[Block]:
        """All blocks that must not be used: the factory's and those that failed since."""
        return sorted(self._bad)

    @property
    def holes(self) -> int:
        """Blocks of zones that are bad and have no spare."""
        return int((self._map < 0).sum())

    @property
    def remaps(self) -> list[Remap]:
        """The entries of the device's map that differ from those after power-up."""
        where = np.argwhere((self._map != np.arange(self.zones)[:, None, None]) & (self._map >= 0)).tolist()
        return [Remap(c, self._page(z, p), int(self._map[z, c, p])) for z, c, p in where]

    def _replace(self, zone: int, channel: int, place: int) -> None:
        spares = self._spares[channel][place]
        if spares:
            self._map[zone, channel, place] = spares.pop()
            self._unsent.append(Remap(channel, self._page(zone, place), int(self._map[zone, channel, place])))
        else:
            self._map[zone, channel, place] = -1

    def send_remaps(self) -> None:
        """Tell the device which entries of its map have changed."""
        if self._unsent:
            self._remap(self._unsent)
            self._unsent = []

    def failed(self, channel: int, page: int) -> None:
        """Note that a page could not be programmed: its block takes no more, and is replaced at its zone's erase."""
        self.abandon(channel, page)
        zone, place = self._place(page)
        self._open[zone].broken.add((channel, place))

    def abandon(self, channel: int, page: int) -> None:
        """Note that a page may or may not be programmed: its block takes nothing more until its zone is erased."""
        number, place = self._place(page)
        zone = self._open[number]
        fill = zone.fill[channel]
        fill[(place // self._width(zone.run) - zone.start) % len(fill)] = zone.limit

    def lose_die(self, channel: int, die: int) -> None:
        """Note that a die does not answer: nothing more is placed there."""
        self._lost.add((channel, die))
        planes = self.config.part.planes
        closed = [zone for zone in range(self.zones) if zone not in self._open]
        for place in range(die * planes, (die + 1) * planes):
            self._spares[channel][place] = []
            self._map[closed, channel, place] = -1
            for number in self._open:
                self.abandon(channel, self._page(number, place))

    # Zones.

    def _width(self, run: int) -> int:
        """Blocks of a column."""
        return min(run, self._row)

    def _limit(self, run: int) -> int:
        """Runs of a column."""
        return self.config.part.pages // max(1, run // self._row)

    def _capacity(self, run: int) -> int:
        """Runs of a zone on each channel, if no block is missing."""
        return self._row // self._width(run) * self._limit(run)

    @property
    def free_zones(self) -> int:
        """Zones without users."""
        return self.zones - len(self._open) - len(self._sealed)

    @property
    def _sealed(self) -> set[int]:
        """Zones that are never used again: marked, and not domain 1's."""
        return {zone for zone in self._marked - self._open.keys() if self._owners[zone] != COMMON_DOMAIN}

    def owner(self, zone: int) -> int:
        """The domain that a zone belongs to; 0 if it is unknown, or the zone is never used again."""
        return self._owners[zone]

    def _give(self, zone: int, domain: int) -> None:
        if self._owners[zone] != domain:
            self._owners[zone] = NOBODY     # unknown if the device does not answer
            self._grant([zone], domain)
            self._owners[zone] = domain

    def send_owners(self) -> None:
        """Tell the device, which forgets them without power, the owners of all zones."""
        for domain in sorted(set(self._owners)):
            self._grant([zone for zone, owner in enumerate(self._owners) if owner == domain], domain)

    def _expel(self, domain: int) -> None:
        """Remove what is left of a domain's sequences, if all are gone, before its number is used again."""
        if domain == COMMON_DOMAIN or any(allocation.domain == domain for allocation in self._allocations):
            return
        mine = [zone for zone in self._dirty if self._owners[zone] == domain]
        if mine:
            self._clean_zones(sorted(mine))
        for zone in sorted(self._sealed):
            if self._owners[zone] == domain:
                self._give(zone, NOBODY)

    def _least_worn(self, zones: Collection[int]) -> int:
        """The zone whose blocks were erased least, the first one of several."""
        numbers = np.array(sorted(zones))
        return int(numbers[self._zone_erases(numbers).sum(axis=(1, 2)).argmin()])

    def _zone_erases(self, zones: NDArray[np.int64]) -> NDArray[np.int64]:
        """Erases of the blocks of zones, (zones, channels, row); 0 at holes."""
        blocks = self._map[zones]
        _, channels, rows = blocks.shape
        erases = self._erases[np.arange(channels)[:, None], np.arange(rows), np.maximum(blocks, 0)]
        return np.where(blocks < 0, 0, erases)

    def _take_zone(self, run: int, domain: int = COMMON_DOMAIN) -> Zone:
        self.send_remaps()
        while True:
            # Those that are marked serve domain 1 alone, which leaves the others what they have reserved.
            free = (self._clean | self._dirty.keys()) - self._marked
            if domain == COMMON_DOMAIN and (marked := self._marked - self._open.keys() - self._sealed):
                free = marked if len(free) <= self._wanted_by()[0] else free | marked
            if not free:
                holes = f"; {self.holes} blocks are bad and have no spare left" if self.holes else ""
                raise CapacityError(f"the flash is full: all {self.zones} zones are in use{holes}; free a sequence")
            number = self._least_worn(free)
            if number in self._dirty:
                self._clean_zones([number])
            if number not in self._marked or self._owners[number] == domain == COMMON_DOMAIN:
                break
        self._give(number, domain)
        width, limit = self._width(run), self._limit(run)
        columns = self._row // width
        # Begin at the least worn die; a column may be wider than a die.
        erases = self._zone_erases(np.array([number]))[0].sum(axis=0).reshape(self.config.dies, -1).sum(axis=1)
        start = int(erases.argmin()) * self.config.part.planes // width
        lost = (self._map[number] < 0).reshape(self.config.channels, columns, width).any(axis=2)
        fill = [[limit if lost[c, (k + start) % columns] else 0 for k in range(columns)]
                for c in range(self.config.channels)]
        self._clean.discard(number)
        self._open[number] = zone = Zone(number, domain, run, start, fill, limit)
        return zone

    def _close(self, zone: Zone) -> None:
        """Take back a zone without users."""
        del self._open[zone.number]
        for stream in self._shared.values():
            stream.remove(zone)
        width = self._width(zone.run)
        written: list[tuple[int, int]] = []
        for channel, fill in enumerate(zone.fill):
            for k, runs in enumerate(fill):
                first = (k + zone.start) % len(fill) * width
                if runs and (self._map[zone.number, channel, first : first + width] >= 0).all():
                    for place in range(first, first + width):
                        if (channel, self._split(place)[0]) in self._lost:
                            self._marked.add(zone.number)
                        else:
                            written.append((channel, place))
        for channel, die in self._lost:
            first = die * self.config.part.planes
            self._map[zone.number, channel, first : first + self.config.part.planes] = -1
        if written:
            self._dirty[zone.number] = (written, zone.broken)
        else:
            self._clean.add(zone.number)

    def _clean_zones(self, numbers: Sequence[int]) -> None:
        """Erase the written blocks of zones, and replace those that went bad."""
        where = [(number, channel, place) for number in numbers for channel, place in self._dirty[number][0]]
        erased = self._erase([(channel, self._page(number, place)) for number, channel, place in where])
        for (number, channel, place), good in zip(where, erased, strict=True):
            block = int(self._map[number, channel, place])
            if block < 0:
                self._marked.add(number)
                continue    # its die was lost during the erase
            self._erases[channel, place, block] += 1
            if not good or (channel, place) in self._dirty[number][1]:
                self._bad.add(Block(channel, *self._split(place), block))
                self._replace(number, channel, place)
                if not good and self._map[number, channel, place] < 0:
                    self._marked.add(number)
        for number in numbers:
            del self._dirty[number]
        self._clean.update(numbers)
        self.send_remaps()

    def clean(self) -> None:
        """Erase all zones without users that are not erased yet."""
        if self._dirty:
            self._clean_zones(sorted(self._dirty))

    def distrust(self) -> None:
        """Count no block as erased, because what the flash holds is unknown.

        Raises:
            RequestError: a zone has users.
        """
        if self._open:
            raise RequestError(f"{len(self._open)} zones are in use; free all sequences first, and discard what was "
                               "saved of them")
        self._clean = set()
        self._dirty = {zone: (self._mapped(zone), set()) for zone in range(self.zones)}

    # Sequences.

    def create(self, runs: Sequence[int], run: int = 1, *, domain: int = COMMON_DOMAIN) -> Allocation:
        """Reserve room for a sequence.

        If another domain than 1 has no allocation yet, what is left of earlier ones that had its number is erased.

        Args:
            runs: for each channel, how many runs it may place there.
            run: consecutive page numbers of each, a power of two.
            domain: zones are shared only within it.

        Raises:
            RequestError: run is not a power of two or longer than a zone, or the domain does not exist.
            CapacityError: not enough zones are free and not reserved for others.
        """
        check_domain(domain)
        if run < 1 or run & (run - 1) or self._limit(run) == 0:
            raise RequestError(f"a run must be 1, 2, 4, ... pages, and at most {self.config.zone_pages}, not {run}")
        capacity, most = self._capacity(run), max(runs)
        quota, rest = divmod(most, capacity)
        if quota + (rest > 0) > self.zones:
            raise CapacityError(
                f"the sequence is longer than the device: it takes {most * run:,} pages of a channel, the device has "
                f"{self.zones} zones of {capacity * run:,} pages on each channel")
        self._expel(domain)
        allocation = Allocation(domain, run, quota, [max(0, r - quota * capacity) for r in runs],
                                Stream([], [0] * self.config.channels))
        before, promised = self._wanted(), self._wanted_by()[0]
        self._allocations.add(allocation)
        wanted, unmarked = self._wanted(), len((self._clean | self._dirty.keys()) - self._marked)
        if wanted > self.free_zones or self._wanted_by()[0] > unmarked:
            self._allocations.discard(allocation)
            left, shared = self.free_zones - before, ""
            if domain != COMMON_DOMAIN and unmarked - promised < left:
                left = unmarked - promised
                shared = f", and {self.free_zones - unmarked} serve none but sequences that share zones"
            raise CapacityError(
                f"the flash is full: {wanted - before} more zones of {capacity * run:,} pages on each channel are "
                f"wanted, and of {self.zones} {max(left, 0)} are left: {self.zones - self.free_zones} are in use, and "
                f"{before} are reserved for tokens that sequences have room for and do not hold yet{shared}; free a "
                f"sequence or ask for fewer tokens")
        return allocation

    def _wanted(self) -> int:
        """Zones that are reserved and not open yet."""
        return sum(self._wanted_by())

    def _wanted_by(self) -> tuple[int, int]:
        """The zones of `_wanted`, for all domains but 1 together, and for domain 1."""
        wanted = [0, 0]
        shared: dict[tuple[int, int], NDArray[np.int64]] = {}
        for allocation in self._allocations:
            wanted[allocation.domain == COMMON_DOMAIN] += max(0, allocation.quota - len(allocation.own.zones))
            runs = shared.setdefault((allocation.domain, allocation.run), np.zeros(self.config.channels, np.int64))
            runs += np.maximum(allocation.shared, 0)
        for (domain, run), runs in shared.items():
            if (domain, run) in self._shared:
                stream = self._shared[domain, run]
                for channel, at in enumerate(stream.at):
                    runs[channel] -= sum(
                        zone.limit * len(zone.fill[channel]) - sum(zone.fill[channel]) for zone in stream.zones[at:])
            wanted[domain == COMMON_DOMAIN] += max(0, -(-int(runs.max()) // self._capacity(run)))
        return wanted[0], wanted[1]

    def take(self, allocation: Allocation, channel: int, *, die: int | None = None) -> int:
        """Page number of the next run on a channel.

        Without a die, runs follow each other through the page numbers of a zone.

        Args:
            allocation: whose.
            channel: where.
            die: where it should begin, if there is room.

        Raises:
            CapacityError: the flash is full.
        """
        run, width = allocation.run, self._width(allocation.run)
        stream = allocation.own
        while True:
            at = stream.at[channel]
            if stream is allocation.own and at == allocation.quota:
                stream = self._shared.setdefault((allocation.domain, run), Stream([], [0] * self.config.channels))
                at = stream.at[channel]
            if at == len(stream.zones):
                stream.zones.append(self._take_zone(run, allocation.domain))
            zone = stream.zones[at]
            fill = zone.fill[channel]
            k = fill.index(min(fill))
            if die is not None:
                planes = self.config.part.planes
                first = (die * planes // width - zone.start) % len(fill)
                here = fill[first : first + max(1, planes // width)]
                if min(here) < zone.limit:
                    k = first + here.index(min(here))
            if fill[k] < zone.limit:
                break
            stream.at[channel] += 1
        page = self._page(zone.number, (k + zone.start) % len(fill) * width, fill[k] * max(1, run // self._row))
        fill[k] += 1
        zone.users.add(allocation)
        allocation.uses.add(zone.number)
        if stream is not allocation.own:
            allocation.shared[channel] -= 1
        return page

    def give_back(self, allocation: Allocation, channel: int, page: int) -> None:
        """Undo the last `take` of a channel that was not undone: nothing was programmed there."""
        number, place = self._place(page)
        zone = self._open[number]
        fill = zone.fill[channel]
        fill[(place // self._width(zone.run) - zone.start) % len(fill)] -= 1
        for stream in (allocation.own, self._shared.get((zone.domain, zone.run))):
            if stream is not None and zone in stream.zones:
                stream.at[channel] = min(stream.at[channel], stream.zones.index(zone))
                if stream is not allocation.own:
                    allocation.shared[channel] += 1

    def share(self, allocation: Allocation, zones: Iterable[int]) -> None:
        """Make an allocation a user of zones in which others have pages, so that they are not erased before it is gone.

        Args:
            allocation: whose sequence reads these pages.
            zones: their numbers.

        Raises:
            RequestError: a zone is not in use, or belongs to another domain.
        """
        for number in zones:
            zone = self._open.get(number)
            if zone is None or zone.domain != allocation.domain:
                raise RequestError(f"zone {number} has no pages of domain {allocation.domain} that could be shared")
            zone.users.add(allocation)
            allocation.uses.add(number)

    def release(self, *allocations: Allocation) -> None:
        """Give back what a sequence has: zones without users are erased, now or later (`erase_on_free`).

        What is left free in a zone that it filled alone, and that others still read, is for all of its domain.

        Args:
            allocations: of the sequence.

        Raises:
            RequestError: one of them was released already, or belongs to another device.
        """
        if not self._allocations.issuperset(allocations):
            raise RequestError("this allocation was released already, or belongs to another device")
        for allocation in allocations:
            self._allocations.discard(allocation)
            for number in sorted(allocation.uses):
                zone = self._open[number]
                zone.users.discard(allocation)
                if not zone.users:
                    self._close(zone)
            for zone in allocation.own.zones:
                if self._open.get(zone.number) is not zone:
                    continue
                if not zone.users:      # opened, and without a page of its own
                    self._close(zone)
                else:
                    key = (allocation.domain, allocation.run)
                    self._shared.setdefault(key, Stream([], [0] * self.config.channels)).zones.append(zone)
        if self.erase_on_free:
            self.clean()

    # Outliving the process.

    def pin(self, zones: Iterable[int]) -> Allocation:
        """Keep zones in use from being erased until `unpin`, whoever is freed."""
        pin = Allocation(NOBODY, 1, 0, [0] * self.config.channels, Stream([], [0] * self.config.channels))
        for number in zones:
            self._open[number].users.add(pin)
            pin.uses.add(number)
        return pin

    def unpin(self, pin: Allocation) -> None:
        """Give pinned zones up: those without users are erased, now or later (`erase_on_free`)."""
        for number in sorted(pin.uses):
            zone = self._open[number]
            zone.users.discard(pin)
            if not zone.users:
                self._close(zone)
        pin.uses.clear()
        if self.erase_on_free:
            self.clean()

    @property
    def domains(self) -> set[int]:
        """The domains that have anything in flash."""
        return {zone.domain for zone in self._open.values()}

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What must not be forgotten about the flash: what can be JSON, and arrays; see `resume`."""
        header = {
            "zones": self.zones, "bad": sorted(map(list, self._bad)), "spares": self._spares, "owners": self._owners,
            "marked": sorted(self._marked), "lost": sorted(map(list, self._lost)),
            "open": {number: [zone.domain, zone.run, sorted(map(list, zone.broken))]
                     for number, zone in self._open.items()},
            "dirty": {number: sorted(map(list, broken)) for number, (_, broken) in self._dirty.items()}}
        return header, {"map": self._map, "erases": self._erases}

    def resume(self, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], used: Collection[int]) -> None:
        """Go on where another process stood, as far as that is known.  Nothing may have been placed yet.

        Zones that are used take nothing more, for it may have written on; all others are erased before they are used.

        Args:
            header: from `state`.
            arrays: likewise.
            used: zones that hold what is still wanted; each must be shared with an allocation afterwards.
        """
        self._bad = {Block(*block) for block in header["bad"]}
        self._spares = [[list(blocks) for blocks in row] for row in header["spares"]]
        self._owners, self._marked = list(header["owners"]), set(header["marked"])
        self._lost = {(channel, die) for channel, die in header["lost"]}
        self._map, self._erases = arrays["map"].copy(), arrays["erases"].copy()
        self._unsent = []
        opened = {int(number): entry for number, entry in header["open"].items()}
        broken = {int(number): {(c, p) for c, p in places} for number, places in header["dirty"].items()}
        for number, (domain, run, places) in opened.items():
            if number in used:
                columns, limit = self._row // self._width(run), self._limit(run)
                full = [[limit] * columns for _ in range(self.config.channels)]
                self._open[number] = Zone(number, domain, run, 0, full, limit, {(c, p) for c, p in places})
            else:
                broken[number] = {(c, p) for c, p in places}
        self._clean = set()
        self._dirty = {zone: (self._mapped(zone), broken.get(zone, set()))
                       for zone in range(self.zones) if zone not in self._open}

    def _mapped(self, zone: int) -> list[tuple[int, int]]:
        """(channel, block of the row) of all blocks of a zone that are there."""
        return [(int(c), int(p)) for c, p in np.argwhere(self._map[zone] >= 0)]

    # Figures.

    def account(self, programmed: int, written: int) -> None:
        """Count pages that were programmed, and pages of data that got their place."""
        self.pages_programmed += programmed
        self.pages_written += written

    @property
    def write_amplification(self) -> float:
        """Pages programmed for each page of data; NaN if there was none."""
        return self.pages_programmed / self.pages_written if self.pages_written else float("nan")

    @property
    def wear(self) -> Wear:
        """Erases of all blocks of the zones, as they are mapped now."""
        there = self._map >= 0
        erases = self._zone_erases(np.arange(self.zones))[there]
        return Wear(minimum=int(erases.min()), maximum=int(erases.max()), mean=float(erases.mean()))
