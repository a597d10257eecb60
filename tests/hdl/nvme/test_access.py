"""Owners: what each domain has, page by page, against a model written from the rules."""

import random
from dataclasses import replace

import pytest
from tests.hdl.compiled import simulation

from kvattic.spec.commands import DOMAINS, Grant, Mode
from kvattic.spec.config import PAPER, TINY
from kvattic.spec.layout import centroid_codewords, pack_entries, pack_sketches
from kvattic.spec.registers import MAX_REGIONS, QUEUES
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.nvme.access import Owners

FOUND_CYCLES, QUEUES_CYCLES, PAGE_CYCLES = 5, 2, 3
ODD = replace(TINY, part=replace(TINY.part, blocks=6))
"""Zones that are no power of two."""
ZONE = TINY.zone_pages
CHANNEL_LAYOUT = {"mode": Mode.FETCHED, "stripe_bits": (TINY.group_pages - 1).bit_length()}
CENTROID = CHANNEL_LAYOUT | {"mode": Mode.CENTROID}


class Model:
    """Owners of every page that there is."""

    def __init__(self, config):
        self.config = config
        self.zones, self.regions, self.allowed = [0] * config.part.blocks, [0] * MAX_REGIONS, [0] * DOMAINS

    def grant(self, kind, first, count, domain):
        if kind == Grant.QUEUES:
            self.allowed[domain] = first
        else:
            owners = self.zones if kind == Grant.ZONES else self.regions
            owners[first : first + count] = [domain] * count

    def flash(self, domain, page, pages=1):
        zones = {(page + i) >> self.config.zone_page_bits for i in range(pages)}
        return len(zones) == 1 and all(z < len(self.zones) and self.zones[z] == domain != 0 for z in zones)

    def dram(self, domain, page, pages, region_bits):
        ends = page, page + pages - 1
        return pages <= 1 << region_bits and all(
            end < 1 << 24 and end >> region_bits < MAX_REGIONS and self.regions[end >> region_bits] == domain != 0
            for end in ends)

    def stripe(self, domain, stripe, mode, stripe_bits, unit_bits, region_bits):
        pages = 1 << stripe_bits
        first = stripe["key_page"], stripe["value_page"]
        if stripe["dram"]:
            return all(self.dram(domain, page, pages, region_bits) for page in first)
        good = all(self.flash(domain, page, pages) for page in first)
        if mode == Mode.DENSE or not stripe["written"]:
            return good
        config, count = self.config, self.config.group_pages
        if mode in (Mode.CENTROID, Mode.CODES):
            codewords = (config.octets if mode == Mode.CODES
                         else centroid_codewords(config.tokens_per_codeword << unit_bits, config))
            count = (stripe["codeword"] + codewords - 1) // config.codewords_per_page + 1
        return good and self.flash(domain, stripe["sketch_page"], count)


class Bench:
    """The component beside its model; every answer is looked at in the cycle in which it must be there."""

    def __init__(self, ctx, dut, config, rng):
        self.ctx, self.dut, self.rng, self.model = ctx, dut, rng, Model(config)

    async def grant(self, kind, first, count, domain):
        ctx, grant = self.ctx, self.dut.grant
        assert ctx.get(grant.ready)
        ctx.set(grant.payload, {"kind": kind, "first": first, "count": count, "domain": domain})
        ctx.set(grant.valid, 1)
        await ctx.tick()
        ctx.set(grant.valid, 0)
        ctx.set(grant.payload, {"kind": Grant.ZONES, "first": 0, "count": 3, "domain": 99})   # not looked at
        assert not ctx.get(grant.ready)
        await ctx.tick().repeat(1 if kind == Grant.QUEUES else count)
        assert ctx.get(grant.ready)
        self.model.grant(kind, first, count, domain)

    async def found(self, domain, stripes, *, mode=Mode.DENSE, stripe_bits=0, unit_bits=0, region_bits=0, gaps=0.0):
        """Numbers of the first foreign stripe: the model's, the component's."""
        ctx, dut = self.ctx, self.dut
        for name, value in (("domain", domain), ("mode", mode), ("stripe_bits", stripe_bits),
                            ("unit_bits", unit_bits), ("region_bits", region_bits)):
            ctx.set(getattr(dut, name), value)
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        await ctx.tick()
        good = []
        for number, given in enumerate(stripes):
            stripe = {"key_page": 0, "value_page": 0, "dram": 0, "sketch_page": 0, "codeword": 0, "written": 1} | given
            words = [pack_entries(0, stripe["key_page"], stripe["value_page"], stripe["dram"])]
            if mode != Mode.DENSE:
                words.append(pack_sketches(stripe["sketch_page"], stripe["codeword"], stripe["written"]))
            for sketch, word in enumerate(words):
                while self.rng.random() < gaps:
                    await ctx.tick()
                ctx.set(dut.entry_valid, 1)
                ctx.set(dut.entry, int(word))
                ctx.set(dut.sketch, sketch)
                ctx.set(dut.number, number)
                await ctx.tick()
                ctx.set(dut.entry_valid, 0)
                ctx.set(dut.entry, self.rng.getrandbits(64))
                ctx.set(dut.sketch, self.rng.getrandbits(1))
                ctx.set(dut.number, self.rng.getrandbits(16))
            good.append(self.model.stripe(domain, stripe, mode, stripe_bits, unit_bits, region_bits))
        await ctx.tick().repeat(FOUND_CYCLES - 1)
        found = ctx.get(dut.where) if ctx.get(dut.found) else None
        await ctx.tick().repeat(3)
        assert found == (ctx.get(dut.where) if ctx.get(dut.found) else None)
        return None if all(good) else good.index(False), found

    async def check(self, expected, domain, stripes, **parameters):
        model, found = await self.found(domain, stripes, **parameters)
        assert model == expected, "the model"
        assert found == expected

    async def pages(self, domain, page, dram_page, region_bits):
        ctx, dut, model = self.ctx, self.dut, self.model
        for name, value in (("domain", domain), ("page", page), ("dram_page", dram_page), ("region_bits", region_bits)):
            ctx.set(getattr(dut, name), value)
        await ctx.tick().repeat(QUEUES_CYCLES)
        assert ctx.get(dut.queues) == model.allowed[domain]
        await ctx.tick().repeat(PAGE_CYCLES - QUEUES_CYCLES)
        assert ctx.get(dut.page_owned) == model.flash(domain, page)
        assert ctx.get(dut.dram_owned) == model.dram(domain, dram_page, 1, region_bits)
        return ctx.get(dut.page_owned), ctx.get(dut.dram_owned)


def run(scenario, config=TINY, seed=1):
    dut, sim = simulation(Owners, config)

    async def testbench(ctx):
        await scenario(Bench(ctx, dut, config, random.Random(seed)))

    sim.add_clock(1e-6)
    sim.add_testbench(testbench)
    sim.run()


def test_at_power_up_nobody_owns_anything():
    async def scenario(bench):
        for domain in (0, 1, 255):
            assert await bench.pages(domain, 0, 0, 0) == (0, 0)
            await bench.check(0, domain, [{}, {}])
            await bench.check(0, domain, [{"dram": 1}])
            await bench.check(None, domain, [])

    run(scenario)


@pytest.mark.usefixtures("each_simulator")
def test_queues_of_a_domain():
    async def scenario(bench):
        await bench.grant(Grant.QUEUES, 0b1000_0010, 0, 1)
        await bench.grant(Grant.QUEUES, (1 << QUEUES) - 1, 0, 255)
        await bench.grant(Grant.QUEUES, 0b100, 0, 1)
        for domain in (0, 1, 2, 254, 255):
            await bench.pages(domain, 0, 0, 0)
        assert bench.model.allowed[1] == 0b100

    run(scenario)


def test_a_grant_gives_exactly_its_zones_and_regions():
    async def scenario(bench):
        await bench.grant(Grant.ZONES, 2, 3, 7)
        await bench.grant(Grant.REGIONS, MAX_REGIONS - 3, 3, 7)
        await bench.grant(Grant.ZONES, 3, 1, 0)
        for zone in range(TINY.part.blocks):
            for page in (zone * ZONE, zone * ZONE + ZONE - 1):
                owned, _ = await bench.pages(7, page, 0, 12)
                assert owned == (zone in (2, 4))
        for region in range(MAX_REGIONS - 5, MAX_REGIONS):
            for page in (region << 3, (region << 3) + 7):
                assert (await bench.pages(7, 0, page, 3))[1] == (region >= MAX_REGIONS - 3)
        assert await bench.pages(7, 1 << 23, 1 << 23, 0) == (0, 0)     # beyond all zones and regions
        assert await bench.pages(7, 0, MAX_REGIONS << 3, 3) == (0, 0)
        assert await bench.pages(6, 2 * ZONE, 0, 0) == (0, 0)

    run(scenario)


def test_domain_0_owns_nothing_though_nobody_else_does():
    async def scenario(bench):
        await bench.grant(Grant.ZONES, 0, 2, 3)
        await bench.grant(Grant.ZONES, 0, 1, 0)
        await bench.check(0, 0, [{}])
        assert await bench.pages(0, 0, 0, 0) == (0, 0)

    run(scenario)


def test_runs_of_a_stripe_stay_in_their_zones():
    async def scenario(bench):
        await bench.grant(Grant.ZONES, 0, 4, 5)
        last = 4 * ZONE - 1
        await bench.check(None, 5, [{"key_page": last, "value_page": 0}, {"key_page": 0, "value_page": last}])
        await bench.check(1, 5, [{}, {"key_page": last + 1}, {"value_page": last + 1}])
        await bench.check(2, 5, [{}, {}, {"value_page": last + 1}])
        for name in ("key_page", "value_page"):
            # Both zones are the domain's; the run leaves the first one.
            await bench.check(None, 5, [{name: ZONE - 8}], stripe_bits=3)
            await bench.check(0, 5, [{name: ZONE - 7}], stripe_bits=3)
            await bench.check(0, 5, [{name: ZONE - 1}], stripe_bits=1)
            await bench.check(0, 5, [{name: (1 << 24) - 1}], stripe_bits=1)
            await bench.check(0, 5, [{name: (1 << 24) - 1}])

    run(scenario)


def test_a_zone_beyond_the_last_one_is_nobodys():
    async def scenario(bench):
        blocks = ODD.part.blocks
        await bench.grant(Grant.ZONES, 0, blocks, 1)
        for zone in range(8):
            await bench.check(None if zone < blocks else 0, 1, [{"key_page": zone * ZONE, "value_page": 0}])
            await bench.pages(1, zone * ZONE, 0, 0)

    run(scenario, ODD)


def test_runs_in_device_dram_have_the_regions_of_their_ends():
    async def scenario(bench):
        await bench.grant(Grant.REGIONS, 4, 2, 9)
        for name in ("key_page", "value_page"):
            def stripe(page, name=name):
                return [{"dram": 1, "key_page": 16, "value_page": 16} | {name: page}]

            region = {"stripe_bits": 2, "region_bits": 2}
            for page, good in ((12, 0), (15, 0), (16, 1), (17, 1), (19, 1), (20, 1), (21, 0), (23, 0), (24, 0)):
                await bench.check(None if good else 0, 9, stripe(page), **region)
            await bench.check(0, 9, stripe(16), stripe_bits=3, region_bits=2)   # larger than a region
            await bench.check(0, 9, stripe(4), stripe_bits=1, region_bits=0)
        await bench.check(None, 9, [{"dram": 1, "key_page": 4, "value_page": 5}])
        await bench.check(0, 9, [{"key_page": 4, "value_page": 5}])             # the same pages in flash

    run(scenario)


def test_the_end_of_device_dram():
    async def scenario(bench):
        await bench.grant(Grant.REGIONS, 0, MAX_REGIONS, 1)
        top = (1 << 24) - 1
        for bits in (0, 3, 11, 12, 13, 15):
            end = min(MAX_REGIONS << bits, 1 << 24)
            for page in (end - 1, end):
                if page <= top:
                    await bench.check(None if page < end else 0, 1, [{"dram": 1, "key_page": page}], region_bits=bits)
                    await bench.pages(1, 0, page, bits)
            if bits:
                await bench.check(None, 1, [{"dram": 1, "key_page": end - 2}], stripe_bits=1, region_bits=bits)
                await bench.check(0, 1, [{"dram": 1, "key_page": end - 1}], stripe_bits=1, region_bits=bits)

    run(scenario)


def test_sketches_in_the_feature_layout():
    async def scenario(bench):
        count = TINY.group_pages
        await bench.grant(Grant.ZONES, 0, 2, 5)
        await bench.grant(Grant.REGIONS, 0, 1, 5)
        for mode in (Mode.SPARF, Mode.FETCHED):
            parameters = CHANNEL_LAYOUT | {"mode": mode, "region_bits": 6}
            await bench.check(None, 5, [{"sketch_page": ZONE - count}, {"sketch_page": 2 * ZONE - count}], **parameters)
            await bench.check(0, 5, [{"sketch_page": ZONE - count + 1}], **parameters)
            await bench.check(1, 5, [{}, {"sketch_page": 2 * ZONE}], **parameters)
            await bench.check(None, 5, [{"sketch_page": 2 * ZONE, "written": 0}], **parameters)
            await bench.check(None, 5, [{"dram": 1, "sketch_page": 2 * ZONE}], **parameters)
            await bench.check(0, 5, [{"dram": 1, "key_page": 64}, {"sketch_page": 2 * ZONE}], **parameters)
            # The one before was in DRAM; this one's sketch counts.
            await bench.check(1, 5, [{"dram": 1}, {"sketch_page": 2 * ZONE}], **parameters)

    run(scenario)


@pytest.mark.parametrize("unit_bits", range(TINY.unit_bits_max + 1))
def test_centroids(unit_bits):
    codewords = centroid_codewords(TINY.tokens_per_codeword << unit_bits, TINY)

    async def scenario(bench):
        await bench.grant(Grant.ZONES, 0, 2, 5)
        for codeword in range(TINY.codewords_per_page):
            pages = (codeword + codewords - 1) // TINY.codewords_per_page + 1
            for page, good in ((ZONE - pages, True), (ZONE - pages + 1, pages == 1), (2 * ZONE - pages, True),
                               (2 * ZONE - pages + 1, False)):
                stripe = {"sketch_page": page, "codeword": codeword}
                await bench.check(None if good else 0, 5, [stripe], unit_bits=unit_bits, **CENTROID)

    run(scenario)


def test_what_was_found_is_forgotten_with_what_is_under_way():
    async def scenario(bench):
        ctx, dut = bench.ctx, bench.dut
        await bench.check(0, 1, [{}])
        for cycles in range(FOUND_CYCLES + 1):
            ctx.set(dut.entry_valid, 1)
            await ctx.tick()
            ctx.set(dut.entry_valid, 0)
            for _ in range(cycles):
                await ctx.tick()
            ctx.set(dut.clear, 1)
            await ctx.tick()
            ctx.set(dut.clear, 0)
            await ctx.tick().repeat(FOUND_CYCLES + 1)
            assert not ctx.get(dut.found)

    run(scenario)


@pytest.mark.parametrize("config", [TINY, ODD, PAPER], ids=["tiny", "odd", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_random_tables(config, seed):
    zone_pages, domains = 1 << config.zone_page_bits, (1, 2, 255)
    sparse_bits = (config.group_pages - 1).bit_length()
    all_bits = range(min(4, Shapes(config).list_bits + 1))

    async def scenario(bench):
        rng, seen = bench.rng, []
        for _ in range(60):
            kind = rng.choice(list(Grant))
            size = config.part.blocks if kind == Grant.ZONES else MAX_REGIONS
            first = rng.randrange(min(8, size))
            await bench.grant(kind, first, 0 if kind == Grant.QUEUES else rng.randrange(1, min(5, size - first) + 1),
                              rng.choice(domains) if kind == Grant.QUEUES or rng.random() < 0.9 else 0)
            region_bits = rng.choice((0, 1, 3, 4, 15))

            def flash_page():
                return max(0, min(config.part.blocks + 1, rng.randrange(10)) * zone_pages
                           + rng.choice((0, 0, 1, -1, -2, -4, -8, zone_pages // 2)))

            def dram_page(region_bits=region_bits):
                return max(0, (rng.randrange(10) << region_bits) + rng.choice((0, 0, 1, -1, -2, -3, 2)))

            owners = [i for i, owner in enumerate(bench.model.zones) if owner]
            for _ in range(4):
                domain, mode = rng.choice(domains), rng.choice(list(Mode))
                stripe_bits = rng.choice(all_bits) if mode == Mode.DENSE else sparse_bits
                unit_bits = rng.randrange(config.unit_bits_max + 1) if mode in (Mode.FETCHED, Mode.CENTROID) else 0
                mine = [i for i in owners if bench.model.zones[i] == domain]

                def good_page(mine=mine):
                    return rng.choice(mine) * zone_pages + rng.choice((0, 8, zone_pages - 8)) if mine else 0

                stripes = []
                for _ in range(rng.randrange(1, 7)):
                    dram, close = int(rng.random() < 0.3), rng.random() < 0.85
                    page = dram_page if dram else good_page if close else flash_page
                    stripes.append({
                        "dram": dram, "key_page": page(), "value_page": page(), "written": int(rng.random() < 0.8),
                        "sketch_page": good_page() if rng.random() < 0.9 else flash_page(),
                        "codeword": rng.randrange(config.codewords_per_page)
                        if mode in (Mode.CENTROID, Mode.CODES) else 0})
                expected, found = await bench.found(
                    domain, stripes, mode=mode, stripe_bits=stripe_bits, unit_bits=unit_bits, region_bits=region_bits,
                    gaps=rng.choice((0.0, 0.5)))
                assert found == expected, (domain, mode, stripes)
                seen.append(expected)
                await bench.pages(rng.choice((0, *domains)), flash_page(), dram_page(), region_bits)
        assert {None, 0, 1, 2, 3} <= set(seen)

    run(scenario, config, seed)


def test_without_sparse_modes_there_are_no_sketches():
    async def scenario(bench):
        await bench.grant(Grant.ZONES, 1, 1, 1)
        page = {"key_page": ZONE, "value_page": ZONE + 1}
        await bench.check(None, 1, [page, page])
        await bench.check(1, 1, [page, {"key_page": ZONE, "value_page": 0}])

    run(scenario, replace(TINY, sparse=False))
