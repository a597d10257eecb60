"""The allocators: zones of flash against the rules of NAND, ranges of DRAM against a plain map of pages."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvattic.allocator import DramAllocator, Remap, ZoneAllocator
from kvattic.config import PAPER, TINY
from kvattic.errors import CapacityError, RequestError
from kvattic.layout import Block, PagePlace, page_number, page_place
from kvattic.nand import TINY_PART

PLANES, DIES, PAGES, BLOCKS = TINY.part.planes, TINY.dies, TINY.part.pages, TINY.part.blocks
ZONE = PLANES * DIES * PAGES
"""Pages of a zone on each channel."""


class Flash:
    """Blocks as NAND has them: pages are programmed in order, each once; the map is the device's."""

    def __init__(self, config, worn=()):
        self.config = config
        self.worn = set(worn)
        self.map = {}
        self.next = {}
        self.erases = {}

    def block(self, channel, page):
        place = page_place(page, self.config)
        return Block(channel, place.die, place.plane, self.map.get((channel, *place._replace(page=0)), place.zone))

    def program(self, channel, page, run=1):
        for number in range(page, page + run):
            block, place = self.block(channel, number), page_place(number, self.config)
            assert place.zone < self.config.part.blocks
            assert place.page < self.config.part.pages
            assert self.next.get(block, 0) == place.page, f"{block}: page {place.page} is not the next one"
            self.next[block] = place.page + 1

    def erase(self, places):
        blocks = [self.block(channel, page) for channel, page in places]
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            self.erases[block] = self.erases.get(block, 0) + 1
            if block not in self.worn:
                self.next.pop(block, None)
        return [block not in self.worn for block in blocks]

    def remap(self, remaps):
        for channel, page, block in remaps:
            self.map[channel, *page_place(page, self.config)._replace(page=0)] = block


def allocator_of(config=TINY, *, flash=None, **options):
    flash = flash or Flash(config)
    made = ZoneAllocator(config, erase=flash.erase, remap=flash.remap, **options)
    made.send_remaps()
    return made, flash


def zone_of(page, config=TINY):
    return page_place(page, config).zone


# Order of pages.


def test_pages_follow_each_other_through_a_zone():
    allocator, _ = allocator_of()
    allocation = allocator.create([ZONE, ZONE])
    assert [allocator.take(allocation, 0) for _ in range(ZONE)] == list(range(ZONE))
    assert [allocator.take(allocation, 1) for _ in range(ZONE)] == list(range(ZONE))
    assert allocator.free_zones == allocator.zones - 1
    assert zone_of(allocator.take(allocation, 1)) == 1


def test_a_die_is_taken_as_long_as_it_has_room():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, ZONE])
    pages = [allocator.take(allocation, 0, die=1) for _ in range(ZONE)]
    for page in pages:
        flash.program(0, page)
    dies = [page_place(page, TINY).die for page in pages]
    assert dies == [1] * (ZONE // 2) + [0] * (ZONE // 2)
    assert sorted(pages) == list(range(ZONE))


def test_a_die_is_found_also_where_a_zone_does_not_begin_at_the_first():
    allocator, _ = allocator_of(spare_blocks=BLOCKS - 1)
    first = allocator.create([1, 0])
    assert allocator.take(first, 0) == 0
    allocator.release(first)
    allocation = allocator.create([8, 0])
    assert page_place(allocator.take(allocation, 0), TINY).die == 1     # the less worn one
    for die in (0, 1, 0):
        assert page_place(allocator.take(allocation, 0, die=die), TINY).die == die


@pytest.mark.parametrize("config", [TINY, PAPER, replace(TINY, part=TINY_PART.resized(1024, pages=6), dies=4)])
@pytest.mark.parametrize("run", [1, 2, 4, 8, 16, 64])
def test_runs_are_consecutive_and_blocks_are_filled_in_order(config, run):
    row = config.part.planes * config.dies
    allocator, flash = allocator_of(config)
    limit = config.part.pages // max(1, run // row) * (row // min(run, row))
    if limit == 0:
        with pytest.raises(RequestError, match=f"a run must be .* at most {config.zone_pages}, not {run}"):
            allocator.create([1] * config.channels, run)
        return
    allocation = allocator.create([limit] * config.channels, run)
    random = Random(run)
    seen = set()
    for _ in range(min(limit, 300)):
        page = allocator.take(allocation, 1, die=random.choice([None, *range(config.dies)]))
        flash.program(1, page, run)
        assert not seen & set(range(page, page + run))
        seen |= set(range(page, page + run))
        assert len({zone_of(p, config) for p in range(page, page + run)}) == 1
    if limit <= 300:
        assert allocator.free_zones == allocator.zones - 1


def test_what_was_not_programmed_is_given_back():
    allocator, _ = allocator_of()
    allocation = allocator.create([ZONE + 10, 0])
    for _ in range(ZONE - 3):
        allocator.take(allocation, 0)
    pages = [allocator.take(allocation, 0) for _ in range(6)]
    for page in reversed(pages):
        allocator.give_back(allocation, 0, page)
    assert [allocator.take(allocation, 0) for _ in range(6)] == pages


def test_what_is_given_back_is_reserved_again():
    allocator, _ = allocator_of()
    allocator.create([(allocator.zones - 1) * ZONE, 0])
    allocation = allocator.create([ZONE - 1, 0])
    page = allocator.take(allocation, 0)
    allocator.give_back(allocation, 0, page)
    with pytest.raises(CapacityError, match="the flash is full"):
        allocator.create([2, 0])
    allocator.create([1, 0])


# Who shares zones.


def test_large_sequences_have_zones_of_their_own_and_small_ones_share():
    allocator, _ = allocator_of()
    first, second = allocator.create([ZONE, ZONE]), allocator.create([2 * ZONE + 10, 2 * ZONE + 10])
    small = [allocator.create([5, 5]) for _ in range(4)]
    zones = {0: [], 1: [], 2: []}
    for who, allocation, count in [(0, first, ZONE), (1, second, 2 * ZONE + 10), *((2, s, 5) for s in small)]:
        zones[who] += [zone_of(allocator.take(allocation, 1)) for _ in range(count)]
    # Zones 0 to 2 are owned; the rest of the second one, and the small ones, are together in zone 3.
    assert zones[0] == [0] * ZONE
    assert zones[1] == [1] * ZONE + [2] * ZONE + [3] * 10
    assert zones[2] == [3] * 20


def test_a_shared_zone_is_erased_when_its_last_user_is_gone():
    allocator, flash = allocator_of()
    users = [allocator.create([5, 5]) for _ in range(3)]
    for user in users:
        for _ in range(5):
            flash.program(0, allocator.take(user, 0))
    for user in users[:2]:
        allocator.release(user)
        assert not flash.erases
        assert allocator.free_zones == allocator.zones - 1
    allocator.release(users[2])
    assert allocator.free_zones == allocator.zones
    # Fifteen pages went over all four blocks of the row, on channel 0 alone.
    assert flash.erases == {Block(0, die, plane, 0): 1 for die in range(DIES) for plane in range(PLANES)}
    assert not flash.next


def test_runs_of_different_lengths_do_not_share():
    allocator, flash = allocator_of()
    ones, twos = allocator.create([3, 3]), allocator.create([3, 3], 2)
    pages = [(a, allocator.take(a, 0)) for a in (ones, twos, ones, twos, ones, twos)]
    for allocation, page in pages:
        flash.program(0, page, allocation.run)
    assert {zone_of(p) for a, p in pages if a is ones} & {zone_of(p) for a, p in pages if a is twos} == set()


def test_erase_before_reuse():
    allocator, flash = allocator_of(erase_on_free=False, spare_blocks=BLOCKS - 1)  # a single zone
    for _ in range(3):
        allocation = allocator.create([ZONE, 0])
        for _ in range(ZONE):
            flash.program(0, allocator.take(allocation, 0))
        erased = len(flash.erases)
        allocator.release(allocation)
        assert len(flash.erases) == erased
        assert allocator.free_zones == 1
    assert set(flash.erases.values()) == {2}


# Full.


def test_full_and_too_long():
    allocator, _ = allocator_of()
    zones = allocator.zones
    with pytest.raises(CapacityError, match=rf"longer than the device: it takes {zones * ZONE + 1} pages of a channel, "
                                            rf"the device has {zones} zones of {ZONE} pages"):
        allocator.create([0, zones * ZONE + 1])
    held = allocator.create([0, 3 * ZONE])
    with pytest.raises(CapacityError, match=rf"{zones - 2} zones of {ZONE} pages .* wanted; {zones} of {zones} are "
                                            r"free, and 3 of them reserved"):
        allocator.create([(zones - 2) * ZONE, 0])
    allocator.create([(zones - 3) * ZONE, 0])
    allocator.release(held)
    # Small ones count by pages: six of ten pages are two zones.
    small = [allocator.create([10, 10]) for _ in range(6)]
    with pytest.raises(CapacityError, match="2 zones"):
        allocator.create([2 * ZONE, 0])
    for allocation in small:
        allocator.release(allocation)
    allocator.create([2 * ZONE, 0])


def test_taking_more_than_was_reserved_ends_with_a_full_device():
    allocator, _ = allocator_of()
    allocation = allocator.create([1, 1])
    for _ in range(allocator.zones * ZONE):
        allocator.take(allocation, 0)
    with pytest.raises(CapacityError, match=f"the flash is full: all {allocator.zones} zones are in use; free"):
        allocator.take(allocation, 0)
    assert len({allocator.take(allocation, 1) for _ in range(allocator.zones * ZONE)}) == allocator.zones * ZONE


def test_bad_calls():
    allocator, _ = allocator_of()
    for run in (0, 3, 64):
        with pytest.raises(RequestError, match=f"a run must be 1, 2, 4, ... pages, and at most 32, not {run}"):
            allocator.create([1, 1], run)
    allocation = allocator.create([1, 1])
    allocator.release(allocation)
    with pytest.raises(RequestError, match="released already"):
        allocator.release(allocation)
    with pytest.raises(RequestError, match="spare_blocks must be 0 to 7, not 8"):
        ZoneAllocator(TINY, spare_blocks=8)
    with pytest.raises(RequestError, match="no block channel 2, die 0, plane 0, block 0: the drive has 2 channels, 2 "):
        ZoneAllocator(TINY, bad_blocks=[Block(2, 0, 0, 0)])


# Bad blocks.


def test_factory_bad_blocks_are_mapped_to_spares():
    bad = [Block(0, 1, 0, 3), Block(1, 0, 1, BLOCKS - 1)]   # a block of zone 3, and a spare
    allocator, flash = allocator_of(bad_blocks=bad)
    assert allocator.remaps == [Remap(0, page_number(PagePlace(3, 0, 1, 0), TINY), BLOCKS - 1)]
    assert flash.map == {(0, 3, 0, 1, 0): BLOCKS - 1}
    assert allocator.bad_blocks == bad
    assert allocator.holes == 0
    allocation = allocator.create([allocator.zones * ZONE] * 2)
    used = set()
    for channel in range(2):
        for _ in range(allocator.zones * ZONE):
            page = allocator.take(allocation, channel)
            flash.program(channel, page)
            assert allocator.block(channel, page) == flash.block(channel, page)
            used.add(flash.block(channel, page))
    assert not used & set(bad)


def test_without_a_spare_there_is_a_hole():
    bad = [Block(0, 1, 0, 3), Block(0, 1, 0, 4)]
    allocator, flash = allocator_of(bad_blocks=bad)
    assert allocator.holes == 1
    allocation = allocator.create([1, 1])
    pages = []
    with pytest.raises(CapacityError, match=r"all 7 zones are in use; 1 blocks are bad and have no spare left"):
        while True:
            pages.append(allocator.take(allocation, 0))
            flash.program(0, pages[-1])
    assert len(pages) == 7 * ZONE - PAGES
    assert allocator.block(0, page_number(PagePlace(4, 0, 1, 0), TINY)) is None


def test_a_failed_block_is_passed_over_and_replaced_when_its_zone_is_erased():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, 0])
    pages = [allocator.take(allocation, 0) for _ in range(5)]
    allocator.failed(0, pages[4])   # the second page of die 0, plane 0
    rest = [allocator.take(allocation, 0) for _ in range(ZONE - PAGES - 3)]
    assert all(page_place(page, TINY)[2:] != (0, 0) for page in rest)
    assert zone_of(rest[-1]) == 0
    assert zone_of(allocator.take(allocation, 0)) == 1
    assert flash.map == {}
    allocator.release(allocation)
    assert flash.map == {(0, 0, 0, 0, 0): BLOCKS - 1}
    assert allocator.bad_blocks == [Block(0, 0, 0, 0)]


def test_a_block_that_cannot_be_erased_is_replaced():
    worn = Block(0, 1, 1, 0)
    allocator, flash = allocator_of(flash=Flash(TINY, worn=[worn]))
    allocation = allocator.create([ZONE, 0])
    for _ in range(ZONE):
        flash.program(0, allocator.take(allocation, 0))
    allocator.release(allocation)
    assert allocator.bad_blocks == [worn]
    assert flash.map == {(0, 0, 0, 1, 1): BLOCKS - 1}
    assert set(flash.next) == {worn}


def test_an_abandoned_block_is_not_bad():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, 0])
    page = allocator.take(allocation, 0)
    allocator.abandon(0, page)
    assert all(page_place(allocator.take(allocation, 0), TINY)[2:] != (0, 0) for _ in range(ZONE - PAGES))
    allocator.release(allocation)
    assert allocator.bad_blocks == []
    assert allocator.wear.minimum == 0
    assert flash.erases[Block(0, 0, 0, 0)] == 1


def test_a_lost_die_is_used_no_more():
    allocator, flash = allocator_of()
    allocation, other = allocator.create([4, 0]), allocator.create([ZONE, 0])
    for a in (allocation, other):
        allocator.take(a, 0)
    allocator.lose_die(0, 0)
    for _ in range(2):
        pages = [allocator.take(other, 0) for _ in range(ZONE)]
        assert {page_place(page, TINY).die for page in pages} == {1}
        allocator.release(other)
        other = allocator.create([ZONE, 0])
    assert not any(block.die == 0 for block in flash.erases)
    assert allocator.holes == PLANES * (allocator.zones - 1)
    assert allocator.bad_blocks == []
    allocator.release(allocation)
    assert allocator.holes == PLANES * allocator.zones
    assert {page_place(allocator.take(other, 1), TINY).die for _ in range(4)} == {0, 1}


def test_an_erase_that_raises_leaves_the_zone_to_be_erased():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, 0])
    for _ in range(ZONE):
        flash.program(0, allocator.take(allocation, 0))
    good, allocator._erase = allocator._erase, lambda places: 1 / 0
    with pytest.raises(ZeroDivisionError):
        allocator.release(allocation)
    assert flash.next
    assert allocator.free_zones == allocator.zones
    allocator._erase = good
    allocator.clean()
    assert not flash.next


def test_a_die_that_is_lost_while_its_blocks_are_erased():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, 0])
    for _ in range(ZONE):
        flash.program(0, allocator.take(allocation, 0))

    def erase(places):
        allocator.lose_die(0, 1)
        return [good and flash.block(c, p).die != 1 for (c, p), good in zip(places, flash.erase(places), strict=True)]

    allocator._erase = erase
    allocator.release(allocation)
    assert allocator.bad_blocks == []
    assert allocator.holes == PLANES * allocator.zones
    assert allocator.wear.maximum == 1


def test_a_map_that_was_not_taken_is_sent_again_before_anything_is_placed():
    allocator, flash = allocator_of(flash=Flash(TINY, worn=[Block(0, 0, 0, 0)]))
    allocation = allocator.create([ZONE, 0])
    flash.program(0, allocator.take(allocation, 0))
    good, allocator._remap = allocator._remap, lambda remaps: 1 / 0
    with pytest.raises(ZeroDivisionError):
        allocator.release(allocation)
    assert flash.map == {}
    allocation = allocator.create([ZONE, 0])
    with pytest.raises(ZeroDivisionError):
        allocator.take(allocation, 0)
    allocator._remap = good
    allocator.take(allocation, 0)
    assert flash.map == {(0, 0, 0, 0, 0): BLOCKS - 1}


def test_distrust_erases_everything():
    allocator, flash = allocator_of(bad_blocks=[Block(0, 0, 0, 2)])
    allocation = allocator.create([1, 1])
    allocator.take(allocation, 0)
    with pytest.raises(RequestError, match="1 zones are in use; free all sequences first"):
        allocator.distrust()
    allocator.release(allocation)
    flash.erases.clear()
    allocator.distrust()
    allocator.clean()
    assert len(flash.erases) == TINY.channels * DIES * PLANES * allocator.zones
    assert Block(0, 0, 0, 2) not in flash.erases
    assert Block(0, 0, 0, BLOCKS - 1) in flash.erases


# Wear.


def test_the_least_worn_zone_and_die_come_first():
    allocator, flash = allocator_of()
    for _ in range(2 * allocator.zones * DIES):
        allocation = allocator.create([1, 1])
        for channel in range(2):
            for _ in range(PLANES):     # a die's planes
                flash.program(channel, allocator.take(allocation, channel))
        allocator.release(allocation)
    assert set(flash.erases.values()) == {2}
    assert len(flash.erases) == 2 * DIES * PLANES * allocator.zones
    assert (allocator.wear.minimum, allocator.wear.maximum, allocator.wear.mean, allocator.wear.spread) == (2, 2, 2, 0)


def test_write_amplification():
    allocator, _ = allocator_of()
    assert allocator.write_amplification != allocator.write_amplification  # NaN
    allocator.account(10, 10)
    assert allocator.write_amplification == 1
    allocator.account(10, 6)
    assert allocator.write_amplification == 20 / 16


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), st.booleans()), max_size=60),
       st.sampled_from([1, 2, 8]))
def test_random_lives_keep_the_rules(steps, run):
    """Sequences grow and go in any order, with blocks that fail: no page is used twice, blocks are filled in order."""
    flash = Flash(TINY)
    allocator, _ = allocator_of(flash=flash, spare_blocks=2)
    live = {}
    owner = {}
    for number, count, fails in steps:
        if number not in live:
            try:
                live[number] = allocator.create([count, 60 - count], run)
            except CapacityError:
                continue
        elif count % 5 == 0:
            allocator.release(live.pop(number))
            owner = {place: who for place, who in owner.items() if who != number}
        else:
            for i in range(count):
                try:
                    page = allocator.take(live[number], i % 2)
                except CapacityError:
                    break
                flash.program(i % 2, page, run)
                for p in range(page, page + run):
                    assert (i % 2, p) not in owner
                    owner[i % 2, p] = number
                if fails and i == 0:
                    allocator.failed(0, page)
        # Nothing of a zone without users is left.
        used = {page_place(page, TINY).zone for _, page in owner}
        assert allocator.zones - allocator.free_zones >= len(used)
        assert {block.block for block in flash.next} <= {
            flash.block(c, page).block for c, page in owner} | {
            b.block for b in flash.next if b in allocator.bad_blocks} | {
            b for zone in allocator._open for b in allocator._map[zone].ravel().tolist()}
    for allocation in live.values():
        allocator.release(allocation)
    assert not flash.next
    assert allocator.free_zones == allocator.zones


# DRAM.


def test_first_fit():
    allocator = DramAllocator(10)
    assert [allocator.allocate(n) for n in (3, 2, 4)] == [0, 3, 5]
    allocator.free(0)
    allocator.free(5)
    assert allocator.allocate(2) == 0
    assert allocator.allocate(2) == 5
    assert allocator.allocate(1) == 2


def test_neighbours_are_joined():
    allocator = DramAllocator(9)
    for _ in range(3):
        allocator.allocate(3)
    for first in (0, 6, 3):
        allocator.free(first)
    assert allocator.largest == allocator.free_pages == 9
    assert allocator.allocate(9) == 0


def test_full_dram():
    allocator = DramAllocator(4)
    allocator.allocate(1)
    second = allocator.allocate(1)
    allocator.allocate(1)
    allocator.free(second)
    with pytest.raises(CapacityError, match=r"2 consecutive pages .* longest free range has 1 \(2 of 4"):
        allocator.allocate(2)
    with pytest.raises(CapacityError, match=r"has 0 \(0 of 0"):
        DramAllocator(0).allocate(1)


def test_bad_dram_calls():
    allocator = DramAllocator(4)
    with pytest.raises(RequestError, match="at least one page, not 0"):
        allocator.allocate(0)
    with pytest.raises(RequestError, match="no allocated range begins at page 1"):
        allocator.free(1)
    first = allocator.allocate(1)
    allocator.free(first)
    with pytest.raises(RequestError, match="no allocated range begins at page 0"):
        allocator.free(first)
    with pytest.raises(RequestError, match="pages must not be negative, as -1 is"):
        DramAllocator(-1)


@given(st.lists(st.one_of(st.integers(1, 12), st.integers(-20, -1)), max_size=60))
def test_equals_a_map_of_pages(steps):
    """A positive step allocates that many pages, a negative one frees one of the ranges held."""
    size = 40
    allocator, owned = DramAllocator(size), [False] * size
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
