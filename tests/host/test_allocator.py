"""The page allocator: first fit, against a plain map of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvattic.allocator import PageAllocator
from kvattic.errors import CapacityError, RequestError


def test_first_fit():
    allocator = PageAllocator(10)
    assert [allocator.allocate(n) for n in (3, 2, 4)] == [0, 3, 5]
    allocator.free(0)
    allocator.free(5)
    assert allocator.allocate(2) == 0
    assert allocator.allocate(2) == 5
    assert allocator.allocate(1) == 2


def test_neighbours_are_joined():
    allocator = PageAllocator(9)
    for _ in range(3):
        allocator.allocate(3)
    for first in (0, 6, 3):
        allocator.free(first)
    assert allocator.largest == allocator.free_pages == 9
    assert allocator.allocate(9) == 0


def test_full():
    allocator = PageAllocator(4)
    allocator.allocate(1)
    second = allocator.allocate(1)
    allocator.allocate(1)
    allocator.free(second)
    with pytest.raises(CapacityError, match=r"2 consecutive .* longest free range has 1 \(2 of 4"):
        allocator.allocate(2)


def test_bad_calls():
    allocator = PageAllocator(4)
    with pytest.raises(RequestError, match="at least one page, not 0"):
        allocator.allocate(0)
    with pytest.raises(RequestError, match="no allocated range begins at page 1"):
        allocator.free(1)
    first = allocator.allocate(1)
    allocator.free(first)
    with pytest.raises(RequestError, match="no allocated range begins at page 0"):
        allocator.free(first)
    with pytest.raises(RequestError, match="positive, not 0"):
        PageAllocator(0)


@given(st.lists(st.one_of(st.integers(1, 12), st.integers(-20, -1)), max_size=60))
def test_equals_a_map_of_pages(steps):
    """A positive step allocates that many pages, a negative one frees one of the ranges held."""
    size = 40
    allocator, owned = PageAllocator(size), [False] * size
    held: dict[int, int] = {}
    for step in steps:
        if step > 0:
            fits = [i for i in range(size - step + 1) if not any(owned[i : i + step])]
            if fits:
                assert allocator.allocate(step) == fits[0]
                held[fits[0]] = step
                owned[fits[0] : fits[0] + step] = [True] * step
            else:
                with pytest.raises(CapacityError):
                    allocator.allocate(step)
        elif held:
            first = sorted(held)[-step % len(held)]
            allocator.free(first)
            count = held.pop(first)
            owned[first : first + count] = [False] * count
        assert allocator.free_pages == owned.count(False)
        runs = "".join("x" if page else "." for page in owned).split("x")
        assert allocator.largest == max(len(run) for run in runs)
