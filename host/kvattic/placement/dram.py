"""Device DRAM, handed out in ranges of pages to the domains that own its regions."""

from bisect import bisect_right
from collections.abc import Callable, Iterator

from kvattic.errors import RequestError
from kvattic.placement.domains import COMMON_DOMAIN, check_domain
from kvattic.placement.ranges import RangeAllocator, dram_full

__all__ = ["DomainDram"]


class DomainDram:
    """Hands out ranges of pages of device DRAM to domains.

    The device knows the owner of each *region* of 2**region_bits pages.  Domain 1 has what the others do not have.
    Another domain takes whole regions when what it has is not enough: as few as possible, and the last free ones.  As
    soon as nothing is allocated in one of its regions, the region goes back.

    Pages are not cleared here: before regions change their owner, either way, `released` is called with their first
    page and the number of pages, so that the driver can overwrite them with zeros.  If that fails they stay where they
    are, and the next call tries again.

    All regions belong to domain 1 at first; `send_owners` says so to the device.

    Args:
        pages: number of pages, which are numbered from 0; the last region may be shorter.
        region_bits: log2 of the pages of a region.
        grant: gives regions to a domain, on the device: first region, how many, domain.
        released: see above.

    Attributes:
        pages: as given.
        regions: how many there are.

    Raises:
        RequestError: pages or region_bits are negative.
    """

    def __init__(self, pages: int, region_bits: int, grant: Callable[[int, int, int], None] | None = None,
                 released: Callable[[int, int], None] | None = None) -> None:
        if region_bits < 0:
            raise RequestError(f"region_bits must not be negative, as {region_bits} is")
        self._common = RangeAllocator(pages)
        self.pages = pages
        self._bits = region_bits
        self.regions = -(-pages >> region_bits)
        self._grant = grant or (lambda first, count, domain: None)
        self._released = released or (lambda first, count: None)
        # Of those of other domains: whose they are, and their free and allocated pages.
        self._owners: dict[int, int] = {}
        self._others: dict[int, RangeAllocator] = {}
        self._unsent: set[int] = set()      # regions whose owner the device may not know

    def owner(self, region: int) -> int:
        """The domain that a region belongs to."""
        return self._owners.get(region, COMMON_DOMAIN)

    def send_owners(self) -> None:
        """Tell the device, which forgets them without power, the owners of all regions."""
        self._unsent = set(range(self.regions))
        self._send()

    @property
    def free_pages(self) -> int:
        """Pages of domain 1 that are free, in ranges of any length."""
        return self._common.free_pages

    @property
    def largest(self) -> int:
        """Length of the longest range that domain 1 can have."""
        return self._common.largest

    def largest_for(self, domain: int) -> int:
        """Length of the longest range that a domain can have."""
        if domain == COMMON_DOMAIN:
            return self.largest
        return max((count for _, count in self._reach(domain)), default=0)

    def allocate(self, count: int, domain: int = COMMON_DOMAIN) -> int:
        """First page of a range of `count` pages that a domain owns.

        Raises:
            RequestError: count is not positive, or the domain does not exist.
            CapacityError: no free range is that long.
        """
        check_domain(domain)
        if count < 1:
            raise RequestError(f"a page range must have at least one page, not {count}")
        self._give_back()
        self._send()
        if domain == COMMON_DOMAIN:
            return self._common.allocate(count)
        mine = self._others.get(domain)
        if mine is None or mine.largest < count:
            self._extend(domain, count)
            mine = self._others[domain]
        return mine.allocate(count)

    def free(self, first: int) -> None:
        """Give the range that begins at page `first` back.

        Raises:
            RequestError: no allocated range begins there.
        """
        self._others.get(self.owner(first >> self._bits), self._common).free(first)
        self._give_back()
        self._send()

    # Regions.

    def _pages_of(self, region: int) -> tuple[int, int]:
        """First page of a region, and how many it has."""
        first = region << self._bits
        return first, min(1 << self._bits, self.pages - first)

    def _whole(self) -> list[tuple[int, int]]:
        """The pages of domain 1's regions that are free: ranges, sorted."""
        found: list[tuple[int, int]] = []
        for first, count in self._common.free_ranges:
            begin = -(-first >> self._bits) << self._bits
            end = first + count if first + count == self.pages else first + count >> self._bits << self._bits
            if end > begin:
                found.append((begin, end - begin))
        return found

    def _reach(self, domain: int) -> list[tuple[int, int]]:
        """What a domain has free, together with the free regions: ranges, sorted, never adjacent."""
        mine = self._others[domain].free_ranges if domain in self._others else []
        ranges: list[tuple[int, int]] = []
        for first, count in sorted([*mine, *self._whole()]):
            if ranges and sum(ranges[-1]) == first:
                first, count = ranges[-1][0], ranges.pop()[1] + count
            ranges.append((first, count))
        return ranges

    def _begins(self, domain: int, count: int, ranges: list[tuple[int, int]]) -> Iterator[int]:
        """Places where `count` pages may begin, as many as are worth a look."""
        size = 1 << self._bits
        limits = {first: first + length - count for first, length in ranges}
        firsts = sorted(limits)

        def limit(page: int) -> int:
            return limits[firsts[bisect_right(firsts, page) - 1]]

        if domain in self._others:
            yield from (first for first, _ in self._others[domain].free_ranges if first <= limit(first))
        for first, length in self._whole():
            # Further down in these regions it is no better.
            top = min(limit(first), first + length - 1) >> self._bits << self._bits
            yield from range(top, max(first, top - count - size) - 1, -size)

    def _extend(self, domain: int, count: int) -> None:
        """Take the fewest regions with which a domain has `count` free pages in a row."""
        best: tuple[int, int, list[int]] | None = None
        ranges = self._reach(domain)
        for begin in self._begins(domain, count, ranges):
            over = range(begin >> self._bits, (begin + count - 1 >> self._bits) + 1)
            wanted = [region for region in over if self.owner(region) != domain]
            if best is None or (len(wanted), -begin) < best[:2]:
                best = len(wanted), -begin, wanted
        if best is None:
            raise dram_full(count, self.largest_for(domain), sum(length for _, length in ranges), self.pages)
        for region in best[2]:
            self._released(*self._pages_of(region))
        for region in best[2]:
            first, length = self._pages_of(region)
            self._common.cut(first, length)
            self._owners[region] = domain
            self._unsent.add(region)
            other = self._others.setdefault(domain, RangeAllocator(0))
            other.pages = self.pages
            other.join(first, length)
        self._send()

    def _give_back(self) -> None:
        """Regions of other domains in which nothing is allocated become domain 1's."""
        for region, domain in sorted(self._owners.items()):
            other, (first, count) = self._others[domain], self._pages_of(region)
            if not other.has(first, count):
                continue
            self._released(first, count)
            other.cut(first, count)
            del self._owners[region]
            self._unsent.add(region)
            if other.unused:
                del self._others[domain]
            self._common.join(first, count)

    def _send(self) -> None:
        """Tell the device the owners that it may not know yet."""
        while self._unsent:
            first = last = min(self._unsent)
            domain = self.owner(first)
            while last + 1 in self._unsent and self.owner(last + 1) == domain:
                last += 1
            self._grant(first, last + 1 - first, domain)
            self._unsent.difference_update(range(first, last + 1))
