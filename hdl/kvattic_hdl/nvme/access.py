"""Who owns the zones of flash and the regions of device DRAM, and which queues may name which owner."""

from itertools import pairwise

from amaranth.hdl import Const, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import DOMAINS, SKETCH_ENTRY, TABLE_ENTRY, Grant, Mode
from kvattic.spec.config import Config
from kvattic.spec.registers import MAX_REGIONS, QUEUES
from kvattic_hdl.lib.records import fields, table_entry
from kvattic_hdl.lib.shapes import GRANT, MODE_BITS, PAGE_BITS, Shapes

REGION_BITS_BITS = 4
"""Bits of the register REGION_BITS."""
DOMAIN_BITS = ceil_log2(DOMAINS)


class Owners(wiring.Component):
    """Keeps the owners, and finds the first stripe of a table that is not the domain's.

    A stripe in flash is the domain's if the zones of K and of V are, and neither run of its pages leaves its zone; one
    in device DRAM if the regions of the first and the last page of K and of V are, and it is no larger than a region.
    What the first pass of a sparse mode reads of a stripe in flash must be the domain's like the stripe.  What is no
    zone and no region is nobody's, and domain 0 owns nothing.  Entries that `TableCheck` and `SketchCheck` refuse are
    judged too, which means nothing.

    Latency: `found` and `where` five cycles after the last word, `queues` two, `page_owned` and `dram_owned` three.
    Throughput: a word a cycle; a zone or region a cycle of a grant.
    Reset: all owners are nobody at power-up.  This must not be under the soft reset; `clear` drops what is under way.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    grant : In(stream of interfaces.GRANT)
        A valid one; it is done when `ready` comes again.  Of QUEUES the low bits of `first` are the queues.
    region_bits : In(4)
        log2 of the pages of a region.
    domain : In(8)
        Who is asked about; stable until the answers are there.
    queues : Out(QUEUES)
        Two cycles after domain: the queues that may name it.
    entry_valid : In(1)
        A word of a table is given, in the order of the table; with any gaps.
    entry : In(64)
        It: a stripe's `commands.TABLE_ENTRY`.
    sketch : In(1)
        It is the `commands.SKETCH_ENTRY` of the stripe given last.
    number : In(16)
        The stripe's number.
    stripe_bits : In
        log2 of the pages of a stripe; this one and the next two are stable from two cycles before the first word on.
    mode, unit_bits : In
        The command's fields; they matter for sketches only.
    clear : In(1)
        Forget what was found, and the words under way, that of this cycle too.
    found : Out(1)
        Five cycles after the word: a stripe is not the domain's.
    where : Out(16)
        The first such stripe's number.
    page, dram_page : In(24)
        A flash page, a page of device DRAM.
    page_owned, dram_owned : Out(1)
        Three cycles after page, dram_page and domain are stable, and after the last word: they are the domain's.
    """

    grant: stream.Interface
    region_bits: Signal
    domain: Signal
    queues: Signal
    entry_valid: Signal
    entry: Signal
    sketch: Signal
    number: Signal
    stripe_bits: Signal
    mode: Signal
    unit_bits: Signal
    clear: Signal
    found: Signal
    where: Signal
    page: Signal
    dram_page: Signal
    page_owned: Signal
    dram_owned: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "grant": In(stream.Signature(GRANT)),
            "region_bits": In(REGION_BITS_BITS),
            "domain": In(DOMAIN_BITS),
            "queues": Out(QUEUES),
            "entry_valid": In(1),
            "entry": In(TABLE_ENTRY.size * 8),
            "sketch": In(1),
            "number": In(16),
            "stripe_bits": In(shapes.stripe_bits),
            "mode": In(MODE_BITS),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "clear": In(1),
            "found": Out(1),
            "where": Out(16),
            "page": In(PAGE_BITS),
            "dram_page": In(PAGE_BITS),
            "page_owned": Out(1),
            "dram_owned": Out(1),
        })
        self._granted = Signal(GRANT, name="granted")
        self._busy = Signal(name="busy")
        self._region_mask = Signal(PAGE_BITS, name="region_mask")   # bits of a page's number that tell its region

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._take_grant(m)
        allowed = self._owners(
            m, "allowed", Grant.QUEUES, DOMAINS, self._granted.domain, self._granted.first[:QUEUES]).read_port()
        m.d.comb += allowed.addr.eq(self.domain)
        m.d.sync += self.queues.eq(allowed.data)

        # What is the same for all words of a table.
        large, nobody = Signal(), Signal()
        m.d.sync += [
            large.eq(self.stripe_bits > self.region_bits),
            nobody.eq(self.domain == 0),
            self._region_mask.eq(~((1 << self.region_bits) - 1)),
        ]
        steps, more, first, last = self._find_runs(m)
        zone_owned, zone_fits, dram_owned = {}, {}, {}
        for name in first:
            first_page, dram_first, dram_last = first[name], first[name], last[name]
            if name == "key":
                # The single pages of flash and DRAM go the same way.
                word = steps[0].valid
                first_page = Mux(word, first_page, self.page)
                dram_first, dram_last = Mux(word, dram_first, self.dram_page), Mux(word, dram_last, self.dram_page)
            zone_owned[name], zone_fits[name] = self._ask_zones(m, name, first_page, first[name], more, nobody)
            dram_owned[name] = self._ask_regions(m, name, dram_first, dram_last, nobody)
        m.d.comb += [self.page_owned.eq(zone_owned["key"]), self.dram_owned.eq(dram_owned["key"])]

        # Step 5: the judgement.
        judged = steps[-1]
        bad = {name: judged.flash & ~(zone_owned[name] & zone_fits[name])
               | judged.dram & (large | ~dram_owned[name]) for name in first}
        with m.If(judged.valid & (bad["key"] | judged.value & bad["value"]) & ~self.found):
            m.d.sync += [self.found.eq(1), self.where.eq(judged.number)]
        with m.If(self.clear):
            m.d.sync += self.found.eq(0)
        return m

    def _take_grant(self, m: Module) -> None:
        """A grant: one zone or region a cycle."""
        granted, busy = self._granted, self._busy
        m.d.comb += self.grant.ready.eq(~busy)
        with m.If(self.grant.valid & ~busy):
            m.d.sync += [granted.eq(self.grant.payload), busy.eq(1)]
        with m.Elif(busy):
            m.d.sync += [
                granted.first.eq(granted.first + 1),
                granted.count.eq(granted.count - 1),
                busy.eq((granted.kind != Grant.QUEUES) & granted.count[1:].any()),
            ]

    def _owners(self, m: Module, name: str, kind: Grant, depth: int, address: Value, value: Value,
                enable: ValueLike = 1) -> Memory:
        """A copy of owners: a block RAM has one port to write and one to read."""
        m.submodules[name] = copy = Memory(shape=len(value), depth=depth, init=[])
        write = copy.write_port()
        m.d.comb += [
            write.addr.eq(address),
            write.data.eq(value),
            write.en.eq(self._busy & (self._granted.kind == kind) & enable),
        ]
        return copy

    def _find_runs(self, m: Module) -> tuple[list[data.View], Signal, dict[str, Signal], dict[str, Signal]]:
        """Step 1: the first and the last page of each run.

        Returns:
            (what a word is about at steps 1 to 4, pages of its run less one, first page and last page by name).
        """
        stripe_more = Signal(max(1, self._shapes.list_bits))   # pages of a stripe, less one
        m.d.sync += stripe_more.eq((1 << self.stripe_bits) - 1)
        stripe = table_entry(self.entry)
        pages = {"key": stripe["key_page"], "value": stripe["value_page"]}
        more_bits, sketch_more, is_sketch, flash = len(stripe_more), Const(0, 1), Const(0, 1), ~stripe["dram"]
        if self._config.sparse:
            is_sketch = self.sketch
            sketch_page, sketch_more, flash = self._find_sketch(m, stripe)
            pages["key"] = Mux(self.sketch, sketch_page, stripe["key_page"])
            more_bits = max(more_bits, len(sketch_more))
        about = data.StructLayout({"valid": 1, "number": 16, "flash": 1, "dram": 1, "value": 1})
        steps = [Signal(about, name=f"about_{i}") for i in range(1, 5)]
        more = Signal(more_bits)
        first = {name: Signal(PAGE_BITS, name=f"{name}_first") for name in pages}
        last = {name: Signal(PAGE_BITS + 1, name=f"{name}_last") for name in pages}
        m.d.sync += [
            steps[0].valid.eq(self.entry_valid),
            steps[0].number.eq(self.number),
            steps[0].flash.eq(flash),
            steps[0].dram.eq(~is_sketch & stripe["dram"]),
            steps[0].value.eq(~is_sketch),
            more.eq(Mux(is_sketch, sketch_more, stripe_more)),
            *(first[name].eq(page) for name, page in pages.items()),
            *(last[name].eq(page + stripe_more) for name, page in pages.items()),
            *(after.eq(before) for before, after in pairwise(steps)),
        ]
        with m.If(self.clear):
            m.d.sync += [step.valid.eq(0) for step in steps]
        return steps, more, first, last

    def _find_sketch(self, m: Module, stripe: dict[str, Value]) -> tuple[Value, Value, Value]:
        """A sketch: (its first page, the pages of its run less one, whether the word is about flash)."""
        config = self._config
        entry = fields(SKETCH_ENTRY, self.entry)
        dram = Signal()
        codewords = Signal(range(config.group_codewords))   # of a sketch, less one
        units = config.group_codewords // config.tokens_per_codeword
        with m.If(self.entry_valid & ~self.sketch):
            m.d.sync += dram.eq(stripe["dram"])
        m.d.sync += codewords.eq(config.group_codewords - 1)
        with m.If(self.mode == Mode.CENTROID):
            m.d.sync += codewords.eq((units >> self.unit_bits) - 1)
        if config.codes:
            with m.If(self.mode == Mode.CODES):
                m.d.sync += codewords.eq(config.octets - 1)
        # The whole codeword field counts: it is below codewords_per_page if `SketchCheck` lets it pass.
        more = (entry["codeword"] + codewords) >> ceil_log2(config.codewords_per_page)
        return entry["page"], more, Mux(self.sketch, entry["written"][0] & ~dram, ~stripe["dram"])

    def _ask_zones(self, m: Module, name: str, page: Value, run: Signal, more: Signal,
                   nobody: Signal) -> tuple[Signal, Signal]:
        """Steps 2, 3, 4 of flash: (the page's zone is the domain's, the run does not leave its zone)."""
        zone_bits, blocks = self._config.zone_page_bits, self._config.part.blocks
        block_bits = ceil_log2(blocks)
        zones = self._owners(
            m, f"{name}_zones", Grant.ZONES, blocks, self._granted.first[:block_bits], self._granted.domain).read_port()
        zone = Signal(block_bits, name=f"{name}_zone")
        there = [Signal(name=f"{name}_zone_there_{i}") for i in (2, 3)]
        fits = [Signal(name=f"{name}_fits_{i}") for i in (2, 3, 4)]
        owned = Signal(name=f"{name}_zone_owned")
        m.d.comb += zones.addr.eq(zone)
        m.d.sync += [
            zone.eq(page >> zone_bits),
            there[0].eq((page >> zone_bits) < blocks),
            fits[0].eq(((run[:zone_bits] + more) >> zone_bits) == 0),
            there[1].eq(there[0]),
            *(after.eq(before) for before, after in pairwise(fits)),
            owned.eq(there[1] & (zones.data == self.domain) & ~nobody),
        ]
        return owned, fits[-1]

    def _ask_regions(self, m: Module, name: str, first: Value, last: Value, nobody: Signal) -> Value:
        """Steps 2, 3, 4 of DRAM: the regions of both pages are the domain's."""
        # The two regions of a run are the same or neighbours (a larger run is refused), so that they never lie in the
        # same bank: bank 1 has the place of the first region, bank 0 it or the next one.
        region_bits = ceil_log2(MAX_REGIONS)
        low, more = first >> self.region_bits, Signal(name=f"{name}_more_regions")
        m.d.comb += more.eq(((first ^ last[:PAGE_BITS]) & self._region_mask).any())
        outside, at_end, goes_on, there = (
            Signal(name=f"{name}_{what}") for what in ("outside", "at_end", "goes_on", "region_there"))
        m.d.sync += [
            outside.eq(last[PAGE_BITS:].any() | low[region_bits:].any()),
            at_end.eq(low[:region_bits].all()),
            goes_on.eq(more),
            there.eq(~outside & ~(at_end & goes_on)),
        ]
        banks = []
        for bank in range(2):
            of_bank = f"{name}_regions_{bank}"
            position = self._granted.first[1:region_bits]
            regions = self._owners(
                m, of_bank, Grant.REGIONS, MAX_REGIONS // 2, position, self._granted.domain,
                self._granted.first[0] == bank).read_port()
            region, odd = Signal(len(position), name=f"{of_bank}_address"), Signal(name=f"{of_bank}_odd")
            asked = [Signal(name=f"{of_bank}_asked_{i}") for i in (2, 3)]
            good = Signal(name=f"{of_bank}_good")
            m.d.comb += regions.addr.eq(region + odd if bank == 0 else region)
            m.d.sync += [
                region.eq(low[1:region_bits]),
                odd.eq(low[0]),
                asked[0].eq((low[0] == bank) | more),
                asked[1].eq(asked[0]),
                good.eq(there & (~asked[1] | ((regions.data == self.domain) & ~nobody))),
            ]
            banks.append(good)
        return banks[0] & banks[1]
