"""The loader's checks: addresses, modes, NaN in q and in the mean of V, entries of tables."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import COMMAND, LINE_BYTES, READ_BYTES, SKETCH_ENTRY, TABLE_ENTRY, Mode
from kvattic.spec.config import Config
from kvattic.spec.layout import TOKEN_BITS
from kvattic_hdl.lib.records import WORD_BYTES, fields, table_entry
from kvattic_hdl.lib.shapes import Shapes

HALF = 32
"""Bits of an address that are added or compared in one cycle."""
SIZE_BITS = bits_for(READ_BYTES)
"""Bits of a block's size; what a READ writes is the largest."""
SPARSE_FIELDS = ("features", "top_units", "local_tokens", "sinks", "unit_bits")
"""Numbers of a command that DENSE has no use for."""


class Window(wiring.Component):
    """Whether an address is aligned and [address, address + size) inside of [base, limit).

    Addresses go through in halves, the low one first: three registered steps of 32 bits.

    Parameters
    ----------
    blocks : int
        Addresses to be told apart.

    Members
    -------
    valid, high : In(1)
        A half is given; it is the high one.
    which : In(range(blocks))
        The address that it belongs to.
    address, base, limit : In(32)
        The half.
    size : In(21)
        Bytes; only for the low half.
    clear : In(1)
        Forget all results.
    bad : Out(blocks)
        Results, three cycles after the high half.
    """

    valid: Signal
    high: Signal
    which: Signal
    address: Signal
    base: Signal
    limit: Signal
    size: Signal
    clear: Signal
    bad: Signal

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        super().__init__(
            {
                "valid": In(1),
                "high": In(1),
                "which": In(range(blocks)),
                "address": In(HALF),
                "base": In(HALF),
                "limit": In(HALF),
                "size": In(SIZE_BITS),
                "clear": In(1),
                "bad": Out(blocks),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        flags = data.StructLayout({"valid": 1, "high": 1, "which": range(self._blocks)})
        flags1, flags2 = Signal(flags), Signal(flags)
        address, base, limit1, limit2 = (
            Signal(HALF, name=n) for n in ("address1", "base1", "limit1", "limit2")
        )
        size = Signal(SIZE_BITS)
        total = Signal(HALF)
        carry, below, over = Signal(), Signal(), Signal()
        unaligned = Signal(self._blocks)
        bad = Signal(self._blocks)
        m.d.sync += [
            flags1.valid.eq(self.valid),
            flags1.high.eq(self.high),
            flags1.which.eq(self.which),
            address.eq(self.address),
            base.eq(self.base),
            limit1.eq(self.limit),
            size.eq(self.size),
            flags2.eq(flags1),
            limit2.eq(limit1),
        ]
        # Sum, and address < base.  The low half ignores what was left over from before.
        added = Signal(HALF + 1)
        lower = Signal(HALF + 1)
        higher = Signal(HALF + 1)
        m.d.comb += [
            added.eq(address + Mux(flags1.high, carry, size)),
            # The borrow goes in through a bit below, so that each is one carry chain.
            lower.eq((Cat(Const(0, 1), address) - Cat(below & flags1.high, base))[1:]),
            higher.eq((Cat(Const(0, 1), limit2) - Cat(over & flags2.high, total))[1:]),
        ]
        m.d.sync += [
            total.eq(added),
            carry.eq(added[HALF]),
            below.eq(lower[HALF]),
            over.eq(higher[HALF]),
        ]
        with m.If(flags1.valid & ~flags1.high):
            m.d.sync += unaligned.bit_select(flags1.which, 1).eq(
                address[: bits_for(LINE_BYTES - 1)].any()
            )
        with m.If(flags2.valid & flags2.high):
            # carry and below are now those of the high half.
            m.d.sync += bad.bit_select(flags2.which, 1).eq(carry | below | higher[HALF])
        m.d.comb += self.bad.eq(bad | unaligned)
        with m.If(self.clear):
            m.d.sync += [bad.eq(0), unaligned.eq(0)]
        return m


class NanCheck(wiring.Component):
    """Finds the first NaN or infinity among numbers that come in words, in order.

    Parameters
    ----------
    bits, fraction_bits, exponent_bits : int
        The numbers' format; above the exponent is the sign.
    elements : int
        Numbers of a row.
    rows : int
        Rows.

    Members
    -------
    valid : In(1)
        A word is given.
    word : In(64)
        Its numbers.
    row, index : In
        Its row, and its number in the row.
    clear : In(1)
        Forget what was found.
    found, row_found, feature : Out
        Two cycles later: there was one; where.
    """

    valid: Signal
    word: Signal
    row: Signal
    index: Signal
    clear: Signal
    found: Signal
    row_found: Signal
    feature: Signal

    def __init__(self, *, bits: int, fraction_bits: int, exponent_bits: int, elements: int, rows: int) -> None:
        self._bits = bits
        self._exponent = slice(fraction_bits, fraction_bits + exponent_bits)
        words = elements * bits // (WORD_BYTES * 8)
        super().__init__({
            "valid": In(1),
            "word": In(WORD_BYTES * 8),
            "row": In(bits_for(rows)),
            "index": In(range(words)),
            "clear": In(1),
            "found": Out(1),
            "row_found": Out(bits_for(rows)),
            "feature": Out(range(elements)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count = len(self.word) // self._bits
        special = Signal(count)
        row, index = Signal.like(self.row), Signal.like(self.index)
        for i in range(count):
            exponent = self.word.word_select(i, self._bits)[self._exponent]
            m.d.sync += special[i].eq(exponent.all() & self.valid)
        m.d.sync += [row.eq(self.row), index.eq(self.index)]
        with m.If(special.any() & ~self.found):
            m.d.sync += [self.found.eq(1), self.row_found.eq(row)]
            for i in reversed(range(count)):
                with m.If(special[i]):
                    m.d.sync += self.feature.eq(Cat(Const(i, bits_for(count - 1)), index))
        with m.If(self.clear):
            m.d.sync += self.found.eq(0)
        return m


class TableCheck(wiring.Component):
    """Finds the first bad entry of a table; the entries come in order.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    valid : In(1)
        An entry is given.
    entry : In(64)
        It (`commands.TABLE_ENTRY`).
    number : In(16)
        Its number.
    limit : In
        Entries that a lane has room for, at least one.
    sparse : In(1)
        Stripes may be attended whole.
    reject : In(1)
        Another check says that something else is wrong with this number.
    clear : In(1)
        Forget what was found, and all entries.
    found : Out(1)
        In the next cycle: an entry names no channel, has a reserved bit set, or is one too many; or is rejected.
    where : Out(16)
        The first one's number.
    """

    valid: Signal
    entry: Signal
    number: Signal
    limit: Signal
    sparse: Signal
    reject: Signal
    clear: Signal
    found: Signal
    where: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._count_bits = bits_for(config.ring_codewords // config.codewords_per_page)
        super().__init__(
            {
                "valid": In(1),
                "entry": In(TABLE_ENTRY.size * 8),
                "number": In(16),
                "limit": In(self._count_bits),
                "sparse": In(1),
                "reject": In(1),
                "clear": In(1),
                "found": Out(1),
                "where": Out(16),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        channels, lanes = self._config.channels, self._config.lanes
        entry = table_entry(self.entry)
        # Entries of each lane so far; without a bit in `used` there is none.
        m.submodules.counts = counts = Memory(
            shape=self._count_bits, depth=lanes, init=[], attrs={"ram_style": "distributed"}
        )
        read, write = counts.read_port(domain="comb"), counts.write_port()
        used = Signal(lanes)
        count = Signal(self._count_bits)
        no_channel, bad = Signal(), Signal()
        m.d.comb += [
            no_channel.eq(entry["channel"] >= channels),
            read.addr.eq(Shapes(self._config).lane_of(entry["channel"])),
            count.eq(Mux(used.bit_select(read.addr, 1), read.data, 0)),
            bad.eq(no_channel | entry["reserved"].any() | (entry["whole"] & ~self.sparse) | (count >= self.limit)),
            write.addr.eq(read.addr),
            write.data.eq(count + 1),
            write.en.eq(self.valid),
        ]
        with m.If(write.en):
            m.d.sync += used.bit_select(read.addr, 1).eq(1)
        with m.If((self.valid & bad | self.reject) & ~self.found):
            m.d.sync += [self.found.eq(1), self.where.eq(self.number)]
        with m.If(self.clear):
            m.d.sync += [self.found.eq(0), used.eq(0)]
        return m


class SketchCheck(wiring.Component):
    """Checks the sketch entries of a table, and finds the first stripe without one that is not attended whole.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    ranked : In(1)
        They are of the feature layout, not of codes or centroids.
    stripe, sketch : In(1)
        A stripe's `commands.TABLE_ENTRY` is given; its `commands.SKETCH_ENTRY`.
    entry : In(64)
        It.
    number : In(16)
        The stripe's number.
    clear : In(1)
        Forget what was found.
    bad : Out(1)
        In the same cycle as `sketch`: a reserved bit is set, or there is no such codeword.
    found : Out(1)
        In the next cycle: one says that it is not written, and its stripe is not attended whole.
    where : Out(16)
        The first such stripe's number.
    """

    ranked: Signal
    stripe: Signal
    sketch: Signal
    entry: Signal
    number: Signal
    clear: Signal
    bad: Signal
    found: Signal
    where: Signal

    def __init__(self, config: Config) -> None:
        self._codewords = config.codewords_per_page
        super().__init__({
            "ranked": In(1),
            "stripe": In(1),
            "sketch": In(1),
            "entry": In(SKETCH_ENTRY.size * 8),
            "number": In(16),
            "clear": In(1),
            "bad": Out(1),
            "found": Out(1),
            "where": Out(16),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        entry = fields(SKETCH_ENTRY, self.entry)
        whole, stripe = Signal(), table_entry(self.entry)
        with m.If(self.stripe):
            m.d.sync += whole.eq(stripe["dram"] | stripe["whole"])
        no_codeword = entry["codeword"] >= Mux(self.ranked, 1, self._codewords)
        m.d.comb += self.bad.eq(
            self.sketch & (entry["reserved"].any() | entry["written"][1:].any() | no_codeword))
        with m.If(self.sketch & ~entry["written"][0] & ~whole & ~self.found):
            m.d.sync += [self.found.eq(1), self.where.eq(self.number)]
        with m.If(self.clear):
            m.d.sync += self.found.eq(0)
        return m


class ModeCheck(wiring.Component):
    """Whether a command's mode and the numbers of its selection can be.

    All inputs are stable; everything is right five cycles after the last one.  The numbers mean something only if the
    field is not bad and the job has tokens.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    mode, stripe_pages, features, top_units, local_tokens, sinks, unit_bits : In
        The command's fields.
    length : In(24)
        Its tokens.
    sparse : Out(1)
        The mode is none but DENSE.
    ranked : Out(1)
        It is SPARF, FETCHED or CODES: there is a mean of V, and rows have a scale of the first pass.
    features_chosen : Out(1)
        It is SPARF or FETCHED: there are chosen features.
    bad_field : Out(1)
        There is no such mode, a field is given that it has no use for, or stripes are not groups.
    bad : Out(1)
        A number is none or too large.
    where : Out(3)
        The first such one: features, top_units, local_tokens, unit_bits, sinks.
    """

    mode: Signal
    stripe_pages: Signal
    features: Signal
    top_units: Signal
    local_tokens: Signal
    sinks: Signal
    unit_bits: Signal
    length: Signal
    sparse: Signal
    ranked: Signal
    features_chosen: Signal
    bad_field: Signal
    bad: Signal
    where: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        names = ("mode", "stripe_pages", *SPARSE_FIELDS)
        super().__init__({
            **{name: In(COMMAND[name].size * 8) for name in names},
            "length": In(TOKEN_BITS),
            "sparse": Out(1),
            "ranked": Out(1),
            "features_chosen": Out(1),
            "bad_field": Out(1),
            "bad": Out(1),
            "where": Out(3),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        given = {name: Signal(name=f"{name}_given") for name in SPARSE_FIELDS}
        of_mode = {mode: Signal(name=mode.name.lower()) for mode in Mode}
        by_token = of_mode[Mode.SPARF] | of_mode[Mode.CODES]
        m.d.comb += self.features_chosen.eq(of_mode[Mode.SPARF] | of_mode[Mode.FETCHED])
        m.d.sync += [
            *(signal.eq(self.mode == mode) for mode, signal in of_mode.items()),
            *(signal.eq(getattr(self, name).any()) for name, signal in given.items()),
            self.sparse.eq(self.mode.any()),
            self.ranked.eq(Cat(self.mode == mode for mode in Mode if mode.blended).any()),
            self.bad_field.eq(
                ~Cat(of_mode[mode] for mode in Mode if config.codes or mode is not Mode.CODES).any()
                | (of_mode[Mode.DENSE] & Cat(given.values()).any())
                | ((of_mode[Mode.CENTROID] | of_mode[Mode.CODES]) & given["features"])
                | (by_token & given["unit_bits"])
                | (self.sparse & (self.stripe_pages != config.group_pages))),
        ]

        # Units that the tokens make, less one, and whole units before the local window's first token, counted from the
        # end.  There may be up to 2**255 codewords in a unit: one is then enough.
        last, last_local = Signal(TOKEN_BITS), Signal.like(self.local_tokens)
        last_unit, last_local_unit = Signal.like(last), Signal.like(last_local)
        token_bits = ceil_log2(config.tokens_per_codeword)

        def unit_of(token):
            codeword = Mux(by_token, token, token >> token_bits)
            return Mux(self.unit_bits[5:].any(), 0, codeword >> self.unit_bits[:5])

        # One after the other: shifts by any number are large.
        turn, unit = Signal(), Signal.like(last)
        m.d.comb += unit.eq(unit_of(Mux(turn, last_local, last)))
        with m.If(turn):
            m.d.sync += last_local_unit.eq(unit)
        with m.Else():
            m.d.sync += last_unit.eq(unit)
        bad = Signal(5)
        m.d.sync += [
            last.eq(self.length - 1),
            last_local.eq(self.local_tokens - 1),
            turn.eq(~turn),
            bad.eq(Cat(
                self.features_chosen & (~given["features"] | (self.features > config.head_dim)),
                ~given["top_units"] | (self.top_units - 1 > last_unit),
                given["local_tokens"] & (last_local_unit >= self.top_units),
                self.unit_bits > config.unit_bits_max,
                of_mode[Mode.CODES] & (self.sinks > config.codes_sinks_max),
            ) & self.sparse.replicate(5)),
        ]
        m.d.comb += self.bad.eq(bad.any())
        for number in reversed(range(len(bad))):
            with m.If(bad[number]):
                m.d.comb += self.where.eq(number)
        return m
