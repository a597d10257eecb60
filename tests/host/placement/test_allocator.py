"""The allocators: zones of flash against the rules of NAND, ranges of DRAM against a plain map of pages."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvattic.errors import CapacityError, RequestError
from kvattic.placement.dram import DomainDram
from kvattic.placement.ranges import RangeAllocator
from kvattic.placement.zones import Remap, ZoneAllocator
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.layout import Block, PagePlace, page_number, page_place
from kvattic.spec.nand import TINY_PART

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
        self.owners = dict.fromkeys(range(config.part.blocks), 1)
        self.grants = []

    def block(self, channel, page):
        place = page_place(page, self.config)
        return Block(channel, place.die, place.plane, self.map.get((channel, *place._replace(page=0)), place.zone))

    def program(self, channel, page, run=1, domain=1):
        for number in range(page, page + run):
            block, place = self.block(channel, number), page_place(number, self.config)
            assert place.zone < self.config.part.blocks
            assert place.page < self.config.part.pages
            assert self.next.get(block, 0) == place.page, f"{block}: page {place.page} is not the next one"
            assert self.owners[place.zone] == domain
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

    def grant(self, zones, domain):
        """What a zone holds never changes hands."""
        for zone in zones:
            if domain != 0 and self.owners[zone] not in (None, domain):
                assert not self.holds(zone)
            self.owners[zone] = domain
        self.grants.append((list(zones), domain))

    def holds(self, zone):
        """Blocks of a zone that are written, as the device finds them."""
        pages = [page_number(PagePlace(zone, 0, die, plane), self.config) for die in range(self.config.dies)
                 for plane in range(self.config.part.planes)]
        blocks = {self.block(channel, page) for channel in range(self.config.channels) for page in pages}
        return blocks & self.next.keys()


def allocator_of(config=TINY, *, flash=None, **options):
    flash = flash or Flash(config)
    made = ZoneAllocator(config, erase=flash.erase, remap=flash.remap, grant=flash.grant, **options)
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
    with pytest.raises(CapacityError, match=rf"{zones - 2} more zones of {ZONE} pages .* wanted, and of {zones} "
                                            rf"{zones - 3} are left: 0 are in use, and 3 are reserved for tokens"):
        allocator.create([(zones - 2) * ZONE, 0])
    allocator.create([(zones - 3) * ZONE, 0])
    allocator.release(held)
    # Small ones count by pages: six of ten pages are two zones.
    small = [allocator.create([10, 10]) for _ in range(6)]
    with pytest.raises(CapacityError, match="2 more zones"):
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


# Domains.


def fill(allocator, flash, allocation, count=ZONE, channel=0):
    pages = [allocator.take(allocation, channel) for _ in range(count)]
    for page in pages:
        flash.program(channel, page, allocation.run, allocation.domain)
    return pages


def test_zones_are_shared_inside_of_a_domain_only():
    allocator, flash = allocator_of()
    users = {domain: [allocator.create([2, 2], domain=domain) for _ in range(2)] for domain in (1, 2, 9)}
    zones = {domain: {zone_of(page) for user in of for page in fill(allocator, flash, user, 2)}
             for domain, of in users.items()}
    assert zones == {1: {0}, 2: {1}, 9: {2}}
    assert flash.grants == [([1], 2), ([2], 9)]
    assert [allocator.owner(zone) for zone in range(4)] == [1, 2, 9, 1]
    # What was given back is reserved for the domain.
    page = allocator.take(users[2][0], 0)
    allocator.give_back(users[2][0], 0, page)
    assert allocator.take(users[2][1], 0) == page


@pytest.mark.parametrize("at_once", [True, False])
def test_a_zone_changes_its_owner_when_it_is_taken_and_erased(at_once):
    allocator, flash = allocator_of(erase_on_free=at_once, spare_blocks=BLOCKS - 1)    # a single zone
    for domain, grants in [(1, 0), (2, 1), (2, 1), (1, 2), (3, 3), (2, 4)]:
        allocation = allocator.create([ZONE, 0], domain=domain)
        fill(allocator, flash, allocation)
        assert allocator.owner(0) == flash.owners[0] == domain
        assert len(flash.grants) == grants
        allocator.release(allocation)
        assert bool(flash.next) is not at_once


def test_a_domain_number_is_used_again_with_nothing_left_of_before():
    allocator, flash = allocator_of(erase_on_free=False)
    first, second = (allocator.create([ZONE, 0], domain=2) for _ in range(2))
    common = allocator.create([ZONE, 0])
    for allocation in (first, second, common):
        fill(allocator, flash, allocation)
    allocator.release(first, common)
    allocator.create([1, 0], domain=2)      # of the same one: it trusts itself
    assert flash.holds(0)
    allocator.release(second, *[a for a in allocator._allocations if a.domain == 2 and a is not second])
    assert flash.holds(0)
    assert flash.holds(1)
    allocator.create([1, 0], domain=2)
    assert not flash.holds(0)
    assert not flash.holds(1)
    assert flash.holds(2)


def test_owners_are_sent_again():
    allocator, flash = allocator_of()
    fill(allocator, flash, allocator.create([1, 1], domain=7), 1)
    flash.owners = dict.fromkeys(flash.owners)      # nobody's, as after power-up
    allocator.send_owners()
    assert [flash.owners[zone] for zone in range(allocator.zones)] == [7] + [1] * (allocator.zones - 1)
    assert flash.grants[-2:] == [(list(range(1, allocator.zones)), 1), ([0], 7)]


def test_a_grant_that_raises_is_repeated():
    allocator, flash = allocator_of()
    allocation = allocator.create([ZONE, 0], domain=2)
    good, allocator._grant = allocator._grant, lambda zones, domain: 1 / 0
    with pytest.raises(ZeroDivisionError):
        allocator.take(allocation, 0)
    assert allocator.owner(0) == 0
    assert allocator.free_zones == allocator.zones
    allocator._grant = good
    common = allocator.create([ZONE, 0])
    assert zone_of(fill(allocator, flash, common)[0]) == 0
    assert flash.grants == [([0], 1)]
    assert zone_of(fill(allocator, flash, allocation)[0]) == 1


def test_what_cannot_be_erased_never_becomes_anothers():
    # No spares on this plane: a block that stays as it is, is reachable for ever.
    bad = [Block(0, 0, 0, BLOCKS - 1)]
    allocator, flash = allocator_of(flash=Flash(TINY, worn=[Block(0, 0, 0, zone) for zone in range(2)]), bad_blocks=bad)
    isolated = allocator.create([ZONE, 0], domain=2)
    common = allocator.create([ZONE, 0])
    assert zone_of(fill(allocator, flash, isolated)[0]) == 0
    assert zone_of(fill(allocator, flash, common)[0]) == 1
    allocator.release(isolated)
    allocator.release(common)
    assert flash.holds(0)
    assert flash.holds(1)
    assert allocator.free_zones == allocator.zones - 1
    # One for domain 1 alone, and one for nobody.
    with pytest.raises(CapacityError, match=rf"{allocator.zones - 1} more zones .* {allocator.zones - 2} are left: 1 "
                                                "are in use, .* and 1 serve none but sequences that share zones; free"):
        allocator.create([(allocator.zones - 1) * ZONE, 0], domain=3)
    isolated = allocator.create([(allocator.zones - 2) * ZONE, 0], domain=3)
    common = allocator.create([ZONE - PAGES, 0])
    assert {zone_of(page) for page in fill(allocator, flash, common, ZONE - PAGES)} == {1}
    pages = fill(allocator, flash, isolated, (allocator.zones - 2) * ZONE)
    assert {zone_of(page) for page in pages} == set(range(2, allocator.zones))
    assert allocator.owner(0) == 2
    # Nor has it those that get the number.
    with pytest.raises(CapacityError):
        allocator.create([1, 0], domain=2)
    assert allocator.owner(0) == flash.owners[0] == 0
    allocator.release(common)
    allocator.release(isolated)
    assert allocator.free_zones == allocator.zones - 1


@pytest.mark.parametrize("at_once", [True, False])
def test_data_on_a_lost_die_never_become_anothers(at_once):
    allocator, flash = allocator_of(erase_on_free=at_once)
    isolated, common = allocator.create([ZONE, 0], domain=2), allocator.create([ZONE, 0])
    for allocation in (isolated, common):
        fill(allocator, flash, allocation, 4)
    allocator.lose_die(0, 0)
    allocator.release(isolated, common)
    assert allocator.free_zones == allocator.zones - 1
    third = allocator.create([3 * ZONE // 2, 0], domain=3)
    zones = {zone_of(allocator.take(third, 0)) for _ in range(3 * ZONE // 2)}
    assert not zones & {0, 1}
    assert flash.holds(0)


def test_a_die_lost_while_an_isolated_zone_is_erased():
    allocator, flash = allocator_of(erase_on_free=False, spare_blocks=BLOCKS - 1)
    isolated = allocator.create([ZONE, 0], domain=2)
    fill(allocator, flash, isolated)
    allocator.release(isolated)

    def erase(places):
        allocator.lose_die(0, 1)
        return [good and flash.block(c, p).die != 1 for (c, p), good in zip(places, flash.erase(places), strict=True)]

    allocator._erase = erase
    common = allocator.create([1, 0])
    with pytest.raises(CapacityError, match="the flash is full"):
        allocator.take(common, 0)
    assert allocator.free_zones == 0
    assert flash.owners[0] == 2


def test_bad_domains():
    allocator, _ = allocator_of()
    for domain in (0, 256, -1, True, 1.0, None):
        with pytest.raises(RequestError, match=rf"domain must be an int from 1 to 255, not {domain!r}"):
            allocator.create([1, 1], domain=domain)
        with pytest.raises(RequestError, match=rf"domain must be an int from 1 to 255, not {domain!r}"):
            DomainDram(8, 2).allocate(1, domain)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 11)), max_size=80), st.booleans(),
       st.integers(0, 3))
def test_random_lives_of_domains(steps, at_once, worn):
    """What one domain wrote is never in a zone of another, whatever fails (see Flash.grant)."""
    flash = Flash(TINY, worn=[Block(0, die, 0, die) for die in range(worn % 3)])
    allocator, _ = allocator_of(flash=flash, spare_blocks=1, erase_on_free=at_once)
    live = {}
    for number, count, fails in steps:
        if number not in live:
            try:
                live[number] = allocator.create([count, 40 - count], domain=1 + number % 4)
            except CapacityError:
                continue
        elif count % 5 == 0:
            allocator.release(live.pop(number))
        else:
            for i in range(count):
                try:
                    page = allocator.take(live[number], i % 2)
                except CapacityError:
                    break
                flash.program(i % 2, page, 1, live[number].domain)
                if fails == 0 and i == 0:
                    allocator.failed(0, page)
        if fails == 1:
            allocator.lose_die(0, 1)
        for zone in range(allocator.zones):
            assert allocator.owner(zone) == flash.owners[zone]
    for allocation in live.values():
        allocator.release(allocation)
    for zone in allocator._clean - allocator._marked:
        assert not flash.holds(zone)


# DRAM.


def test_first_fit():
    allocator = RangeAllocator(10)
    assert [allocator.allocate(n) for n in (3, 2, 4)] == [0, 3, 5]
    allocator.free(0)
    allocator.free(5)
    assert allocator.allocate(2) == 0
    assert allocator.allocate(2) == 5
    assert allocator.allocate(1) == 2


def test_neighbours_are_joined():
    allocator = RangeAllocator(9)
    for _ in range(3):
        allocator.allocate(3)
    for first in (0, 6, 3):
        allocator.free(first)
    assert allocator.largest == allocator.free_pages == 9
    assert allocator.allocate(9) == 0


def test_full_dram():
    allocator = RangeAllocator(4)
    allocator.allocate(1)
    second = allocator.allocate(1)
    allocator.allocate(1)
    allocator.free(second)
    with pytest.raises(CapacityError, match=r"2 consecutive pages .* longest free range has 1 \(2 of 4"):
        allocator.allocate(2)
    with pytest.raises(CapacityError, match=r"has 0 \(0 of 0"):
        RangeAllocator(0).allocate(1)


def test_bad_dram_calls():
    allocator = RangeAllocator(4)
    with pytest.raises(RequestError, match="at least one page, not 0"):
        allocator.allocate(0)
    with pytest.raises(RequestError, match="no allocated range begins at page 1"):
        allocator.free(1)
    first = allocator.allocate(1)
    allocator.free(first)
    with pytest.raises(RequestError, match="no allocated range begins at page 0"):
        allocator.free(first)
    with pytest.raises(RequestError, match="pages must not be negative, as -1 is"):
        RangeAllocator(-1)


@given(st.lists(st.one_of(st.integers(1, 12), st.integers(-20, -1)), max_size=60))
def test_equals_a_map_of_pages(steps):
    """A positive step allocates that many pages, a negative one frees one of the ranges held."""
    size = 40
    allocator, owned = RangeAllocator(size), [False] * size
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


class Dram:
    """Owners of regions as the device has them, and whose data the pages hold."""

    def __init__(self, pages, region_bits):
        self.bits = region_bits
        self.owners = [0] * -(-pages >> region_bits)
        self.data = [0] * pages
        self.calls = []

    def grant(self, first, count, domain):
        for region in range(first, first + count):
            pages = self.data[region << self.bits : region + 1 << self.bits]
            assert self.owners[region] in (0, domain) or not any(pages)
            self.owners[region] = domain
        self.calls.append((first, count, domain))

    def released(self, first, count):
        self.data[first : first + count] = [0] * count
        self.calls.append((first, count))

    def write(self, first, count, domain):
        for page in range(first, first + count):
            assert self.owners[page >> self.bits] == domain
            self.data[page] = domain


def dram_of(pages, bits):
    dram = Dram(pages, bits)
    allocator = DomainDram(pages, bits, dram.grant, dram.released)
    allocator.send_owners()
    assert dram.calls == [(0, len(dram.owners), 1)] * (pages > 0)
    dram.calls.clear()
    return allocator, dram


def test_domains_take_whole_regions_and_give_them_back():
    allocator, dram = dram_of(32, 3)
    assert allocator.allocate(3) == 0
    first = allocator.allocate(9, 2)
    assert first == 16
    assert dram.calls == [(16, 8), (24, 8), (2, 2, 2)]
    assert (allocator.free_pages, allocator.largest, allocator.largest_for(2)) == (13, 13, 8)
    assert (allocator.largest_for(1), allocator.largest_for(3)) == (13, 8)
    dram.calls.clear()
    second = allocator.allocate(7, 2)           # in what it has
    assert second == 25
    third = allocator.allocate(1, 2)            # the next region
    assert third == 8
    assert dram.calls == [(8, 8), (1, 1, 2)]
    assert [allocator.owner(region) for region in range(4)] == [1, 2, 2, 2]
    dram.calls.clear()
    allocator.free(first)                       # the upper region has pages of the second range
    assert dram.calls == [(16, 8), (2, 1, 1)]
    allocator.free(third)
    allocator.free(second)
    assert dram.owners == [1, 1, 1, 1]
    assert allocator.free_pages == 29
    allocator.free(0)
    assert allocator.allocate(32) == 0


def test_a_region_that_a_domain_has_is_used_with_its_neighbour():
    allocator, dram = dram_of(32, 3)
    low = allocator.allocate(8)
    assert (low, allocator.allocate(6, 2)) == (0, 24)
    allocator.allocate(8, 3)                    # region 2, so that nothing joins region 3 from below
    assert allocator.allocate(2, 2) == 30
    assert allocator.allocate(4, 2) == 8
    allocator.free(low)
    assert allocator.allocate(8, 2) == 0        # region 0 alone: what is free of region 1 does not lie beside it
    assert dram.owners == [2, 2, 3, 2]
    allocator.free(8)
    assert dram.owners == [2, 1, 3, 2]
    assert allocator.allocate(8, 2) == 8
    with pytest.raises(CapacityError, match=r"1 consecutive pages .* longest free range has 0 \(0 of 32"):
        allocator.allocate(1)


def test_the_last_region_may_be_a_part_of_one():
    allocator, dram = dram_of(13, 2)
    assert allocator.regions == 4
    assert allocator.allocate(1, 2) == 12
    assert allocator.allocate(1, 2) == 8
    allocator.free(12)
    assert dram.calls == [(12, 1), (3, 1, 2), (8, 4), (2, 1, 2), (12, 1), (3, 1, 1)]
    assert allocator.largest_for(3) == 8
    with pytest.raises(CapacityError, match=r"9 consecutive pages are wanted, the longest free range has 8"):
        allocator.allocate(9, 4)


def test_hooks_that_raise_leave_regions_to_be_given_again():
    allocator, dram = dram_of(16, 2)
    allocator._grant = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        allocator.allocate(4, 2)
    allocator._grant = dram.grant
    assert allocator.allocate(16) == 0
    assert dram.owners == [1] * 4
    allocator.free(0)
    first = allocator.allocate(4, 2)
    dram.write(first, 4, 2)
    allocator._released = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        allocator.free(first)
    with pytest.raises(ZeroDivisionError):
        allocator.allocate(1, 3)
    assert dram.owners[3] == allocator.owner(3) == 2
    allocator._released = dram.released
    assert allocator.allocate(16) == 0
    assert not any(dram.data)
    assert dram.owners == [1] * 4


def test_bad_domain_dram_calls():
    allocator, _ = dram_of(16, 2)
    with pytest.raises(RequestError, match="at least one page, not 0"):
        allocator.allocate(0, 2)
    with pytest.raises(RequestError, match="no allocated range begins at page 12"):
        allocator.free(12)
    assert allocator.allocate(1, 2) == 12
    with pytest.raises(RequestError, match="no allocated range begins at page 13"):
        allocator.free(13)
    with pytest.raises(RequestError, match="pages must not be negative, as -1 is"):
        DomainDram(-1, 2)
    with pytest.raises(RequestError, match="region_bits must not be negative, as -1 is"):
        DomainDram(1, -1)
    assert DomainDram(0, 3).largest_for(2) == 0


@given(st.lists(st.tuples(st.integers(-20, 12), st.integers(1, 4)), max_size=60), st.integers(0, 3),
       st.integers(30, 41))
def test_domains_never_meet(steps, bits, size):
    allocator, dram = dram_of(size, bits)
    held = {}
    for step, domain in steps:
        if step > 0:
            largest = allocator.largest_for(domain)
            if step <= largest:
                first = allocator.allocate(step, domain)
                dram.write(first, step, domain)
                assert not any(first < f + c and f < first + step for f, (c, _) in held.items())
                held[first] = step, domain
            else:
                with pytest.raises(CapacityError, match=f"the longest free range has {largest} "):
                    allocator.allocate(step, domain)
        elif held:
            first = sorted(held)[-step % len(held)]
            allocator.free(first)
            del held[first]
        regions = {page >> bits: d for f, (c, d) in held.items() for page in range(f, f + c)}
        for region, owner in enumerate(dram.owners):
            assert allocator.owner(region) == owner
            assert regions.get(region, owner) == owner
            assert owner == 1 or region in regions
    for first in held:
        allocator.free(first)
    assert allocator.largest == size
