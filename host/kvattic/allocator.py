"""Page ranges on the channels: first fit over a sorted list of free ranges.

A range has the same page numbers on every channel, because a head's stripes go round all of them.
Zones, which follow erase blocks, replace this when the flash controller comes.
"""

from bisect import bisect_left

from kvattic.errors import CapacityError, RequestError

__all__ = ["PageAllocator"]


class PageAllocator:
    """Hands out ranges of page numbers.

    Args:
        pages: pages that each channel has, numbered from 0.

    Raises:
        RequestError: pages is not positive.
    """

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise RequestError(f"pages must be positive, not {pages}")
        self.pages = pages
        self._free: list[tuple[int, int]] = [(0, pages)]  # (first, count), sorted, never adjacent
        self._used: dict[int, int] = {}

    @property
    def free_pages(self) -> int:
        """Pages of each channel that are free, in ranges of any length."""
        return sum(count for _, count in self._free)

    @property
    def largest(self) -> int:
        """Length of the longest free range."""
        return max((count for _, count in self._free), default=0)

    def allocate(self, count: int) -> int:
        """First page of a range of `count` pages, the lowest that fits.

        Raises:
            RequestError: count is not positive.
            CapacityError: no free range is that long.
        """
        if count < 1:
            raise RequestError(f"a page range must have at least one page, not {count}")
        for index, (first, length) in enumerate(self._free):
            if length >= count:
                if length == count:
                    del self._free[index]
                else:
                    self._free[index] = (first + count, length - count)
                self._used[first] = count
                return first
        raise CapacityError(
            f"the flash is full: {count} consecutive pages of each channel are wanted, the longest "
            f"free range has {self.largest} ({self.free_pages} of {self.pages} are free); free a "
            f"sequence or ask for fewer tokens"
        )

    def free(self, first: int) -> None:
        """Give the range that begins at page `first` back.

        Raises:
            RequestError: no allocated range begins there.
        """
        count = self._used.pop(first, None)
        if count is None:
            raise RequestError(f"no allocated range begins at page {first}")
        index = bisect_left(self._free, (first, 0))
        if index < len(self._free) and first + count == self._free[index][0]:
            count += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == first:
            index -= 1
            before = self._free.pop(index)
            first, count = before[0], before[1] + count
        self._free.insert(index, (first, count))
