"""Ranges of pages of a memory."""

from bisect import bisect_left, bisect_right

from kvattic.errors import CapacityError, RequestError

__all__ = ["RangeAllocator", "dram_full"]


class RangeAllocator:
    """Hands out ranges of pages of a memory: first fit over a sorted list of free ranges.

    Args:
        pages: number of pages, which are numbered from 0.

    Raises:
        RequestError: pages is negative.
    """

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise RequestError(f"pages must not be negative, as {pages} is")
        self.pages = pages
        self._free: list[tuple[int, int]] = [(0, pages)] if pages else []  # (first, count), sorted, never adjacent
        self._used: dict[int, int] = {}

    @property
    def free_ranges(self) -> list[tuple[int, int]]:
        """(first page, number of pages) of the free ranges: sorted, never adjacent."""
        return self._free

    @property
    def unused(self) -> bool:
        """Whether it has no pages, neither free nor allocated."""
        return not self._free and not self._used

    @property
    def free_pages(self) -> int:
        """Pages that are free, in ranges of any length."""
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
        for first, length in self._free:
            if length >= count:
                self.cut(first, count)
                self._used[first] = count
                return first
        raise dram_full(count, self.largest, self.free_pages, self.pages)

    def free(self, first: int) -> None:
        """Give the range that begins at page `first` back.

        Raises:
            RequestError: no allocated range begins there.
        """
        count = self._used.pop(first, None)
        if count is None:
            raise RequestError(f"no allocated range begins at page {first}")
        self.join(first, count)

    def cut(self, first: int, count: int) -> None:
        """Take pages, all of which must be free, off the list."""
        index = bisect_right(self._free, (first, self.pages)) - 1
        begin, length = self._free[index]
        rest = [(begin, first - begin), (first + count, begin + length - first - count)]
        self._free[index : index + 1] = [(page, pages) for page, pages in rest if pages]

    def join(self, first: int, count: int) -> None:
        """Put pages, none of which may be free, on the list."""
        index = bisect_left(self._free, (first, 0))
        if index < len(self._free) and first + count == self._free[index][0]:
            count += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == first:
            index -= 1
            before = self._free.pop(index)
            first, count = before[0], before[1] + count
        self._free.insert(index, (first, count))

    def has(self, first: int, count: int) -> bool:
        """Whether pages are all free."""
        index = bisect_right(self._free, (first, self.pages)) - 1
        return index >= 0 and sum(self._free[index]) >= first + count


def dram_full(count: int, largest: int, free: int, pages: int) -> CapacityError:
    """The error for a range that is not there."""
    return CapacityError(
        f"the device DRAM is full: {count} consecutive pages are wanted, the longest free range has {largest} "
        f"({free} of {pages} are free); free a sequence, or give the device more DRAM")
