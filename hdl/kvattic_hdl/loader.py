"""Fetches commands, queries and tables, checks them, loads and starts the lanes, hands flash commands over."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for, ceil_log2

from kvattic.commands import (
    COMMAND,
    FLASH_COMMAND,
    LINE_BYTES,
    ROW,
    TABLE_ENTRY,
    Field,
    Opcode,
    Status,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import ELEMENT_BYTES, Config
from kvattic.formats import SCORE_WINDOW_FRACTION

from .arithmetic import times
from .axi import AXI_READ, LINE_ADDRESS_BITS, LINE_WORDS, ReadLines
from .interfaces import (
    EPOCH_BITS,
    INDEX_BITS,
    K_OFFSET_BITS,
    OPCODE_BITS,
    PAGE_BITS,
    TOKEN_BITS,
    Shapes,
)
from .records import WORD_BYTES, field_of_word, fields, word_of

HALF = 32
"""Bits of an address that are added or compared in one cycle."""
SIZE_BITS = 20
"""Bits of a block's size."""
BLOCKS = ("query", "result", "table")
"""What a command's addresses are of; `where` of INVALID_ADDRESS is the number."""
OUTSTANDING = 16
"""Lines that are asked for and have not come, at most: covers a latency of about 128 cycles."""
WORD_ELEMENTS = WORD_BYTES // ELEMENT_BYTES
FP32_FRACTION, FP32_EXPONENT, FP32_BIAS = 23, 8, 127


def _reserved(field: Field) -> bool:
    return field.name == "flags" or field.name.startswith("reserved")


class _Window(wiring.Component):
    """Whether an address is aligned and [address, address + size) inside of [base, limit).

    Addresses go through in halves, the low one first: three registered steps of 32 bits.

    Members
    -------
    valid, high : In(1)
        A half is given; it is the high one.
    which : In(range(3))
        The address that it belongs to.
    address, base, limit : In(32)
        The half.
    size : In(20)
        Bytes; only for the low half.
    clear : In(1)
        Forget all results.
    bad : Out(3)
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

    def __init__(self) -> None:
        super().__init__(
            {
                "valid": In(1),
                "high": In(1),
                "which": In(range(len(BLOCKS))),
                "address": In(HALF),
                "base": In(HALF),
                "limit": In(HALF),
                "size": In(SIZE_BITS),
                "clear": In(1),
                "bad": Out(len(BLOCKS)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        flags = data.StructLayout({"valid": 1, "high": 1, "which": range(len(BLOCKS))})
        flags1, flags2 = Signal(flags), Signal(flags)
        address, base, limit1, limit2 = (
            Signal(HALF, name=n) for n in ("address1", "base1", "limit1", "limit2")
        )
        size = Signal(SIZE_BITS)
        total = Signal(HALF)
        carry, below, over = Signal(), Signal(), Signal()
        unaligned = Signal(len(BLOCKS))
        bad = Signal(len(BLOCKS))
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


class _QueryCheck(wiring.Component):
    """Finds the first NaN or infinity among a query's words; the words come in order.

    Members
    -------
    valid : In(1)
        A word of q.
    word : In(64)
        Its elements.
    row, index : In
        Its row, and its number in q.
    clear : In(1)
        Forget what was found.
    found, row_found, channel : Out
        Two cycles later: there was one; where.
    """

    valid: Signal
    word: Signal
    row: Signal
    index: Signal
    clear: Signal
    found: Signal
    row_found: Signal
    channel: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        words = config.head_dim // WORD_ELEMENTS
        super().__init__(
            {
                "valid": In(1),
                "word": In(64),
                "row": In(bits_for(config.rows)),
                "index": In(range(words)),
                "clear": In(1),
                "found": Out(1),
                "row_found": Out(bits_for(config.rows)),
                "channel": Out(range(words * WORD_ELEMENTS)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        form = self._config.element.encoding
        special = Signal(WORD_ELEMENTS)
        row, index = Signal.like(self.row), Signal.like(self.index)
        for i in range(WORD_ELEMENTS):
            exponent = self.word[i * 16 :][form.fraction_bits :][: form.exponent_bits]
            m.d.sync += special[i].eq(exponent.all() & self.valid)
        m.d.sync += [row.eq(self.row), index.eq(self.index)]
        with m.If(special.any() & ~self.found):
            m.d.sync += [self.found.eq(1), self.row_found.eq(row)]
            for i in reversed(range(WORD_ELEMENTS)):
                with m.If(special[i]):
                    m.d.sync += self.channel.eq(Cat(Const(i, bits_for(WORD_ELEMENTS - 1)), index))
        with m.If(self.clear):
            m.d.sync += self.found.eq(0)
        return m


class _TableCheck(wiring.Component):
    """Finds the first bad entry of a table; the entries come in order.

    Members
    -------
    valid : In(1)
        An entry is given.
    entry : In(64)
        It (`commands.TABLE_ENTRY`).
    number : In(16)
        Its number.
    limit : In
        Entries that a channel's lane has room for, at least one.
    clear : In(1)
        Forget what was found, and all entries.
    found : Out(1)
        In the next cycle: an entry names no channel, has a reserved bit set, or is one too many.
    where : Out(16)
        The first one's number.
    """

    valid: Signal
    entry: Signal
    number: Signal
    limit: Signal
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
                "clear": In(1),
                "found": Out(1),
                "where": Out(16),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        channels = self._config.channels
        entry = fields(TABLE_ENTRY, self.entry)
        # Entries of each channel so far; without a bit in `used` there is none.
        m.submodules.counts = counts = Memory(
            shape=self._count_bits, depth=channels, init=[], attrs={"ram_style": "distributed"}
        )
        read, write = counts.read_port(domain="comb"), counts.write_port()
        used = Signal(channels)
        count = Signal(self._count_bits)
        no_channel, bad = Signal(), Signal()
        m.d.comb += [
            no_channel.eq(entry["channel"] >= channels),
            read.addr.eq(entry["channel"]),
            count.eq(Mux(used.bit_select(read.addr, 1), read.data, 0)),
            bad.eq(no_channel | entry["dram"][1:].any() | (count >= self.limit)),
            write.addr.eq(read.addr),
            write.data.eq(count + 1),
            write.en.eq(self.valid),
        ]
        with m.If(write.en):
            m.d.sync += used.bit_select(read.addr, 1).eq(1)
        with m.If(self.valid & bad & ~self.found):
            m.d.sync += [self.found.eq(1), self.where.eq(self.number)]
        with m.If(self.clear):
            m.d.sync += [self.found.eq(0), used.eq(0)]
        return m


class Loader(wiring.Component):
    """Fetches and checks a batch's commands, loads the lanes and starts the jobs, hands flash commands over.

    Latency: for a job of one row about the memory's latency + 17 cycles of checking + a cycle for
    each word of its query block and its table.  The next command is requested right behind these,
    so its fetch costs its eight words only.  A flash command takes the memory's latency + 15 cycles.
    Throughput: one word a cycle while a block arrives; one job at a time.
    Ordering: jobs leave in the order of the commands, and so do flash commands; a job's `start`
    comes two cycles or more after the last `load`, its record on `jobs` one cycle or more after its
    `start`.
    Reset: no batch; the epoch goes on, so that codewords of jobs before the reset are recognised as
    stale.  Reads under way must have ended before: raise `stop` until `quiet`.

    A command that fails its checks becomes a job without lanes; so does one with a bad query block
    or table.  The first that applies is reported: BUS_ERROR of the command line, INVALID_OPCODE,
    INVALID_FIELD; for ATTEND: INVALID_ROWS, INVALID_LENGTH, INVALID_ADDRESS (query, result, table),
    INVALID_SCALE, BUS_ERROR of the query block or the table, INVALID_TABLE, NAN_QUERY; for flash
    commands: INVALID_PLACE.  `where` is zero for those that commands.Status gives none.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : Out(AXI_READ)
        Host memory.
    batch_start : In(1)
        Strobe: run the `count` commands from `command_base` on.  Only when all jobs of the last
        batch have ended.
    command_base : In(64)
        Address of the first command; its low six bits are ignored.
    count : In(16)
        Number of commands, at least 1.
    buffer_base, buffer_limit : In(64)
        Query blocks, result blocks and tables must be inside of this window.
    load_valid, load : Out(1), Out(Shapes.load)
        Written to all lanes.
    start_valid, start : Out(1), Out(Shapes.start)
        Given to all lanes when everything is loaded.
    jobs : Out(stream of Shapes.job)
        The jobs.
    flash : Out(stream of Shapes.flash_command)
        Flash commands that passed their checks; they take no slot.
    freed : In(1)
        Strobe: a slot is free again.
    bus_error : Out(1)
        Strobe: a word was not answered with OKAY.
    stop : In(1)
        Start no read, drop what comes; a reset will follow.
    quiet : Out(1)
        No read is under way.
    """

    bus: wiring.PureInterface
    batch_start: Signal
    command_base: Signal
    count: Signal
    buffer_base: Signal
    buffer_limit: Signal
    load_valid: Signal
    load: data.View
    start_valid: Signal
    start: data.View
    jobs: stream.Interface
    flash: stream.Interface
    freed: Signal
    bus_error: Signal
    stop: Signal
    quiet: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__(
            {
                "bus": Out(AXI_READ),
                "batch_start": In(1),
                "command_base": In(64),
                "count": In(16),
                "buffer_base": In(64),
                "buffer_limit": In(64),
                "load_valid": Out(1),
                "load": Out(shapes.load),
                "start_valid": Out(1),
                "start": Out(shapes.start),
                "jobs": Out(stream.Signature(shapes.job)),
                "flash": Out(stream.Signature(shapes.flash_command)),
                "freed": In(1),
                "bus_error": Out(1),
                "stop": In(1),
                "quiet": Out(1, init=1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self._config, self._shapes
        m.submodules.read = read = ReadLines(OUTSTANDING)
        m.submodules.window = window = _Window()
        m.submodules.check = check = _QueryCheck(config)
        m.submodules.table_check = table_check = _TableCheck(config)
        connect(m, read.bus, flipped(self.bus))
        word = read.words.payload
        taken = Signal()
        m.d.comb += [
            taken.eq(read.words.valid & read.words.ready),
            self.bus_error.eq(taken & word.error),
            read.stop.eq(self.stop),
            self.quiet.eq(read.quiet),
        ]

        # Fields at the same place of the two records share a register.
        stored = {
            (f.offset, f.size): f
            for f in (*FLASH_COMMAND.fields, *COMMAND.fields)
            if not _reserved(f)
        }
        registers = {
            place: Signal(f.size * 8, name=f"command_{f.name}") for place, f in stored.items()
        }
        command, flash_command = (
            {f.name: registers[f.offset, f.size] for f in layout.fields if not _reserved(f)}
            for layout in (COMMAND, FLASH_COMMAND)
        )
        broken = Signal()  # an error answer in this command's line, query block or table
        reserved = Signal()  # a reserved byte of COMMAND was not zero
        flash_reserved = Signal()  # of FLASH_COMMAND
        status = Signal(16)
        where = Signal(32)
        batch_index = Signal(INDEX_BITS)

        # Requests: the query block's lines, the table's, then the next command's.
        lane_stripes = config.ring_codewords // config.codewords_per_page
        all_stripes = config.channels * lane_stripes
        command_line = Signal(LINE_ADDRESS_BITS)
        commands_left = Signal(16)
        want_command = Signal()
        query_line, table_line = Signal(LINE_ADDRESS_BITS), Signal(LINE_ADDRESS_BITS)
        row_lines = query_row_bytes(config.head_dim) // LINE_BYTES
        line_entries = LINE_BYTES // TABLE_ENTRY.size
        query_left = Signal(range(config.rows * row_lines + 1))
        table_lines = Signal(bits_for(-(-all_stripes // line_entries)))
        table_left = Signal.like(table_lines)
        query_wanted, table_wanted = Signal(), Signal()
        m.d.comb += [
            query_wanted.eq(query_left.any()),
            table_wanted.eq(table_left.any()),
            read.lines.valid.eq(query_wanted | table_wanted | want_command),
            read.lines.payload.eq(
                Mux(query_wanted, query_line, Mux(table_wanted, table_line, command_line))
            ),
        ]
        with m.If(read.lines.ready & read.lines.valid):
            with m.If(query_wanted):
                m.d.sync += [query_line.eq(query_line + 1), query_left.eq(query_left - 1)]
            with m.Elif(table_wanted):
                m.d.sync += [table_line.eq(table_line + 1), table_left.eq(table_left - 1)]
            with m.Else():
                m.d.sync += [command_line.eq(command_line + 1), want_command.eq(0)]
        with m.If(self.batch_start):
            m.d.sync += [
                command_line.eq(self.command_base[-LINE_ADDRESS_BITS:]),
                commands_left.eq(self.count - 1),
                want_command.eq(1),
                batch_index.eq(0),
            ]

        # Slots.
        slot = Signal(shapes.slot)
        # Not reset: see the docstring.
        epoch = Signal(EPOCH_BITS, reset_less=True)
        free = Signal(range(config.jobs_in_flight + 1), init=config.jobs_in_flight)
        used = Signal()
        with m.If(used & ~self.freed):
            m.d.sync += free.eq(free - 1)
        with m.Elif(~used & self.freed):
            m.d.sync += free.eq(free + 1)

        # Checks; each is stable when the last step judges.
        sizes = {name: Signal(SIZE_BITS, name=f"{name}_size") for name in BLOCKS}
        length = Signal(HALF + 1)
        bad_opcode, bad_field, bad_rows, bad_count, bad_length, bad_scale = (
            Signal(name=name)
            for name in (
                "bad_opcode",
                "bad_field",
                "bad_rows",
                "bad_count",
                "bad_length",
                "bad_scale",
            )
        )
        scale = command["scale"]
        scale_exponent = scale[FP32_FRACTION:][:FP32_EXPONENT]
        rows = command["rows"][: bits_for(config.rows)]
        k_offset = Signal(signed(K_OFFSET_BITS))
        opcode = command["opcode"]

        # Stripes: stripes * 2**bits pages hold the tokens, one stripe less would not.
        stripes = command["stripes"]
        stripe_pages = command["stripe_pages"]
        legal_pages = [1 << i for i in range(len(stripe_pages)) if 1 << i <= lane_stripes]
        stripe_bits = Signal(shapes.stripe_bits)
        stripe_tokens = Signal(TOKEN_BITS)
        lane_limit = Signal(bits_for(lane_stripes))
        last_page = Signal(TOKEN_BITS)  # whole pages * 2**-bits before the last token
        end_page = Signal(bits_for(all_stripes * config.tokens_per_page))
        for i in range(len(legal_pages)):
            with m.If(stripe_pages[i]):
                m.d.sync += stripe_bits.eq(i)
        m.d.comb += table_lines.eq((stripes + line_entries - 1) >> ceil_log2(line_entries))
        m.d.sync += [
            sizes["query"].eq(rows * query_row_bytes(config.head_dim)),
            sizes["result"].eq(rows * result_row_bytes(config.head_dim)),
            sizes["table"].eq(table_lines << ceil_log2(LINE_BYTES)),
            stripe_tokens.eq(config.tokens_per_page << stripe_bits),
            lane_limit.eq(lane_stripes >> stripe_bits),
            length.eq(command["end_token"] - command["base_token"]),
            last_page.eq((length[:TOKEN_BITS] - 1)[:TOKEN_BITS] >> stripe_bits),
            end_page.eq(times(stripes[: bits_for(all_stripes)], config.tokens_per_page)),
            bad_rows.eq((command["rows"] == 0) | (command["rows"] > config.rows)),
            bad_count.eq(stripes > (all_stripes >> stripe_bits)),
            bad_length.eq(
                length[HALF]
                | ~length.any()
                | command["end_token"][TOKEN_BITS:].any()
                | (last_page >= end_page)
                | (last_page + config.tokens_per_page < end_page)
            ),
            bad_scale.eq(scale[-1] | ~scale_exponent.any() | scale_exponent.all()),
            k_offset.eq(
                scale_exponent
                - FP32_BIAS
                + SCORE_WINDOW_FRACTION
                - 2 * config.element.encoding.offset
            ),
        ]

        # Flash commands.
        is_flash, bad_place, hand_over = Signal(), Signal(), Signal()
        page, argument = flash_command["page"], flash_command["argument"]
        place_checks = [
            flash_command["channel"] >= config.channels,
            page >> config.zone_page_bits >= config.part.blocks,
            (opcode == Opcode.MAP) & (argument >= config.part.blocks),
            (opcode == Opcode.PROGRAM) & argument[PAGE_BITS:].any(),
        ]
        if config.part.pages < 1 << config.block_page_bits:
            block_page = page[config.plane_bits + config.die_bits :][: config.block_page_bits]
            place_checks.append(block_page >= config.part.pages)
        m.d.comb += [
            is_flash.eq(
                Cat(opcode == code for code in Opcode if code is not Opcode.ATTEND).any()
            ),
            hand_over.eq(is_flash & ~broken & ~bad_field & ~bad_place),
            self.flash.payload.channel.eq(flash_command["channel"]),
            self.flash.payload.operation.opcode.eq(opcode[:OPCODE_BITS]),
            self.flash.payload.operation.page.eq(page),
            self.flash.payload.operation.block.eq(argument),
            self.flash.payload.operation.identity.eq(
                Cat(batch_index, flash_command["identifier"])
            ),
            self.flash.payload.dram_page.eq(argument),
        ]
        m.d.sync += [
            bad_opcode.eq(~is_flash & (opcode != Opcode.ATTEND)),
            bad_field.eq(
                Mux(
                    is_flash,
                    flash_reserved
                    | (((opcode == Opcode.ERASE) | (opcode == Opcode.PROBE)) & argument.any()),
                    reserved | ~Cat(stripe_pages == pages for pages in legal_pages).any(),
                )
            ),
            bad_place.eq(Cat(place_checks).any()),
        ]

        step = Signal(4)
        address_steps = 2 * len(BLOCKS)
        judge = address_steps + 2  # the window's three cycles
        flash_judge = 2
        block = step[1:][: len(window.which)]
        m.d.comb += [
            window.high.eq(step[0]),
            window.which.eq(block),
            window.base.eq(self.buffer_base.word_select(step[0], HALF)),
            window.limit.eq(self.buffer_limit.word_select(step[0], HALF)),
        ]
        with m.Switch(block):
            for number, name in enumerate(BLOCKS):
                with m.Case(number):
                    m.d.comb += [
                        window.size.eq(sizes[name]),
                        window.address.eq(command[name].word_select(step[0], HALF)),
                    ]

        # One row of the query block.
        row_words = row_lines * LINE_WORDS
        head_words = ROW.size // WORD_BYTES
        query_words = config.head_dim // WORD_ELEMENTS
        beat_words = config.beat_bytes // WORD_BYTES
        row = Signal(range(config.rows + 1))
        position = Signal(range(row_words))
        index = Signal(range(query_words))  # word of q
        beat = Signal(shapes.beat_index)
        in_query = Signal()  # this position is a word of q
        part = Signal(range(max(2, beat_words)))  # word of the beat
        earlier = Signal(max(1, beat_words - 1) * 64)
        record = {f.name: Signal(f.size * 8, name=f"row_{f.name}") for f in ROW.fields}
        m.d.comb += [
            check.word.eq(word.data),
            check.row.eq(row),
            check.index.eq(index),
            check.valid.eq(taken & in_query),
        ]
        # Numbers of tokens are clamped to what the lanes take; end_token is below 2**24, so nothing
        # is at the top one.
        top = (1 << TOKEN_BITS) - 1
        row_start = Signal(TOKEN_BITS)
        row_end = Signal(TOKEN_BITS)
        m.d.sync += [
            row_start.eq(Mux(record["start_token"][TOKEN_BITS:].any(), top, record["start_token"])),
            row_end.eq(
                Mux(
                    record["end_token"] < command["end_token"],
                    record["end_token"],
                    command["end_token"],
                )
            ),
        ]

        # The table: an entry stands in `load` while it is checked.
        entries_left = Signal(range(all_stripes + 1))
        entry_number = Signal(16)
        token = Signal(TOKEN_BITS)

        load = self.load
        m.d.comb += [
            table_check.valid.eq(self.load_valid & load.stripe),
            table_check.entry.eq(load.data),
            table_check.limit.eq(lane_limit),
        ]
        m.d.sync += [
            table_check.number.eq(entry_number),
            self.load_valid.eq(0),
            load.query.eq(0),
            load.record.eq(0),
            load.stripe.eq(0),
            load.slot.eq(slot),
            load.row.eq(row),
        ]
        tree_token = command["tree_token"]
        m.d.comb += [
            self.start.slot.eq(slot),
            self.start.epoch.eq(epoch),
            self.start.stripe_bits.eq(stripe_bits),
            self.start.last_token.eq(load.start),  # the last one loaded
            self.start.end_token.eq(command["end_token"]),
            self.start.tree_token.eq(Mux(tree_token[TOKEN_BITS:].any(), top, tree_token)),
            self.start.k_offset.eq(k_offset),
            self.start.scale.eq(Cat(scale[:FP32_FRACTION], 1)),
            self.jobs.payload.slot.eq(slot),
            self.jobs.payload.lanes.eq(status == Status.OK),
            self.jobs.payload.index.eq(batch_index),
            self.jobs.payload.identifier.eq(command["identifier"]),
            self.jobs.payload.rows.eq(rows),
            self.jobs.payload.result.eq(command["result"]),
            self.jobs.payload.status.eq(status),
            self.jobs.payload.where.eq(where),
        ]

        def fetch_next() -> None:
            with m.If(commands_left.any()):
                m.d.sync += [want_command.eq(1), commands_left.eq(commands_left - 1)]

        def end_command() -> None:
            m.d.sync += [
                batch_index.eq(batch_index + 1),
                broken.eq(0),
                reserved.eq(0),
                flash_reserved.eq(0),
                position.eq(0),
            ]
            m.next = "command"

        with m.FSM(name="state"):
            with m.State("command"):
                m.d.comb += [
                    read.words.ready.eq(1),
                    window.clear.eq(1),
                    check.clear.eq(1),
                    table_check.clear.eq(1),
                ]
                m.d.sync += step.eq(0)
                with m.If(taken):
                    m.d.sync += [position.eq(position + 1), broken.eq(broken | word.error)]
                    with m.Switch(position):
                        for number in range(LINE_WORDS):
                            with m.Case(number):
                                m.d.sync += [
                                    registers[place].eq(field_of_word(word.data, f))
                                    for place, f in stored.items()
                                    if word_of(f) == number
                                ]
                                for layout, flag in (
                                    (COMMAND, reserved),
                                    (FLASH_COMMAND, flash_reserved),
                                ):
                                    spare = [
                                        field_of_word(word.data, f).any()
                                        for f in layout.fields
                                        if _reserved(f) and word_of(f) == number
                                    ]
                                    if spare:
                                        m.d.sync += flag.eq(flag | Cat(spare).any())
                    with m.If(word.last):
                        m.d.sync += position.eq(0)
                        m.next = "check"
            with m.State("check"):
                m.d.comb += window.valid.eq(step < address_steps)
                m.d.sync += [
                    step.eq(step + 1),
                    row.eq(rows),
                    beat.eq(0),
                    load.data.eq(0),
                    load.start.eq(0),
                    load.end.eq(0),
                ]
                with m.If(step == Mux(is_flash, flash_judge, judge)):
                    fetch_next()
                    m.next = "report"
                    with m.If((slot == 0) & ~hand_over):
                        # Once for each turn round the slots, at its beginning: it also tells jobs
                        # after a reset from before.
                        m.d.sync += epoch.eq(epoch + 1)
                    with m.If(broken):
                        m.d.sync += [status.eq(Status.BUS_ERROR), where.eq(0)]
                    with m.Elif(bad_opcode):
                        m.d.sync += [status.eq(Status.INVALID_OPCODE), where.eq(opcode)]
                    with m.Elif(bad_field):
                        m.d.sync += [status.eq(Status.INVALID_FIELD), where.eq(0)]
                    with m.Elif(is_flash):
                        m.d.sync += [status.eq(Status.INVALID_PLACE), where.eq(0)]
                        with m.If(hand_over):
                            m.next = "flash"
                    with m.Elif(bad_rows):
                        m.d.sync += [status.eq(Status.INVALID_ROWS), where.eq(command["rows"])]
                    with m.Elif(bad_count | bad_length):
                        m.d.sync += [status.eq(Status.INVALID_LENGTH), where.eq(0)]
                    with m.Elif(window.bad.any()):
                        m.d.sync += status.eq(Status.INVALID_ADDRESS)
                        for number in reversed(range(len(BLOCKS))):
                            with m.If(window.bad[number]):
                                m.d.sync += where.eq(number)
                    with m.Elif(bad_scale):
                        m.d.sync += [status.eq(Status.INVALID_SCALE), where.eq(0)]
                    with m.Else():
                        m.d.sync += [
                            status.eq(Status.OK),
                            where.eq(0),
                            query_line.eq(command["query"][-LINE_ADDRESS_BITS:]),
                            query_left.eq(rows * row_lines),
                            table_line.eq(command["table"][-LINE_ADDRESS_BITS:]),
                            table_left.eq(table_lines),
                            entries_left.eq(stripes),
                            entry_number.eq(0),
                            token.eq(command["base_token"]),
                        ]
                        m.next = "clear"
            with m.State("clear"):
                # The rows that this job has not are made empty, while its query block is on the
                # way.
                with m.If(free.any()):
                    with m.If(row == config.rows):
                        m.d.sync += [row.eq(0), beat.eq(0), index.eq(0), part.eq(0), in_query.eq(0)]
                        m.next = "query"
                    with m.Else():
                        # position 0: the record; 1: its q.
                        m.d.sync += [self.load_valid.eq(1), load.beat.eq(beat), position.eq(1)]
                        with m.If(position == 0):
                            m.d.sync += [load.record.eq(1), load.tree.eq(0)]
                        with m.Else():
                            m.d.sync += [load.query.eq(1), beat.eq(beat + 1)]
                            with m.If(beat == config.beats_per_token - 1):
                                m.d.sync += [beat.eq(0), row.eq(row + 1), position.eq(0)]
            with m.State("query"):
                m.d.comb += read.words.ready.eq(1)
                m.d.sync += [
                    load.start.eq(row_start),
                    load.end.eq(row_end),
                    load.tree.eq(record["tree"]),
                ]
                with m.If(taken):
                    m.d.sync += [position.eq(position + 1), broken.eq(broken | word.error)]
                    with m.Switch(position):
                        for number in sorted({word_of(f) for f in ROW.fields}):
                            with m.Case(number):
                                m.d.sync += [
                                    record[f.name].eq(field_of_word(word.data, f))
                                    for f in ROW.fields
                                    if word_of(f) == number
                                ]
                        with m.Case(head_words - 1):
                            # row_start and row_end have followed the first word long since.
                            m.d.sync += [self.load_valid.eq(1), load.record.eq(1), in_query.eq(1)]
                    with m.If(in_query):
                        m.d.sync += [
                            index.eq(index + 1),
                            part.eq(part + 1),
                            earlier.eq(Cat(earlier, word.data) >> 64),
                            load.data.eq(word.data if beat_words == 1 else Cat(earlier, word.data)),
                            load.beat.eq(beat),
                        ]
                        with m.If(part == beat_words - 1):
                            m.d.sync += [
                                self.load_valid.eq(1),
                                load.query.eq(1),
                                part.eq(0),
                                beat.eq(beat + 1),
                            ]
                        with m.If(index == query_words - 1):
                            m.d.sync += [index.eq(0), beat.eq(0), in_query.eq(0)]
                    with m.If(position == row_words - 1):
                        m.d.sync += [position.eq(0), row.eq(row + 1)]
                        with m.If(row == rows - 1):
                            m.next = "table"
            with m.State("table"):
                # Until the checks are done an entry is loaded like a good one: without a `start` it
                # does nothing.
                m.d.comb += read.words.ready.eq(1)
                with m.If(taken):
                    m.d.sync += broken.eq(broken | word.error)
                    with m.If(entries_left.any()):
                        m.d.sync += [
                            self.load_valid.eq(1),
                            load.stripe.eq(1),
                            load.last.eq(entries_left == 1),
                            load.data.eq(word.data),
                            load.start.eq(token),
                            token.eq(token + stripe_tokens),
                            entries_left.eq(entries_left - 1),
                            entry_number.eq(entry_number + 1),
                        ]
                    with m.If(word.last & (entries_left <= 1)):
                        m.next = "settle"
            with m.State("settle"):
                # The table's last entry is being checked.
                m.next = "decide"
            with m.State("decide"):
                m.next = "report"
                with m.If(broken):
                    m.d.sync += status.eq(Status.BUS_ERROR)
                with m.Elif(table_check.found):
                    m.d.sync += [status.eq(Status.INVALID_TABLE), where.eq(table_check.where)]
                with m.Elif(check.found):
                    m.d.sync += [
                        status.eq(Status.NAN_QUERY),
                        where.eq(
                            Cat(check.channel, Const(0, 16 - len(check.channel)), check.row_found)
                        ),
                    ]
                with m.Else():
                    m.next = "start"
            with m.State("start"):
                m.d.comb += self.start_valid.eq(1)
                m.next = "report"
            with m.State("report"):
                m.d.comb += self.jobs.valid.eq(free.any())
                with m.If(self.jobs.valid & self.jobs.ready):
                    m.d.comb += used.eq(1)
                    m.d.sync += slot.eq(Mux(slot == config.jobs_in_flight - 1, 0, slot + 1))
                    end_command()
            with m.State("flash"):
                m.d.comb += self.flash.valid.eq(1)
                with m.If(self.flash.ready):
                    end_command()
        return m
