"""Fetches commands, queries and tables, checks them, loads and starts the lanes, hands all other commands over."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    DATA_COMMAND,
    DIRECTION_BITS,
    FLASH_COMMAND,
    GRANT_COMMAND,
    IDENTIFY_BYTES,
    LINE_BYTES,
    QUEUE_COMMAND,
    ROW,
    STATUS_BITS,
    TABLE_ENTRY,
    Field,
    Opcode,
    Status,
    fp32_block_bytes,
    lines,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import ELEMENT_BYTES, Config
from kvattic.spec.registers import COUNTERS, QUEUES
from kvattic_hdl.frontend.checks import (
    HALF,
    SIZE_BITS,
    SPARSE_FIELDS,
    ModeCheck,
    NanCheck,
    SketchCheck,
    TableCheck,
    Window,
)
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.axi import AXI_READ, LINE_ADDRESS_BITS, LINE_WORDS, ReadLines
from kvattic_hdl.lib.interfaces import (
    EPOCH_BITS,
    K_OFFSET_BITS,
    OPCODE_BITS,
    PAGE_BITS,
    TOKEN_BITS,
    Shapes,
)
from kvattic_hdl.lib.records import WORD_BYTES, field_of_word, word_of
from kvattic_hdl.nvme.queues import FETCH
from kvattic_hdl.sparse.ranker import Ranker

FLASH_OPCODES = (Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP)
DATA_OPCODES = (Opcode.IDENTIFY, Opcode.COUNTERS)
QUEUE_OPCODES = (Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE)
UNKNOWN_IDENTIFIER = 0xFFFF
"""In the completion of a command that could not be read."""
OWNER_CYCLES = 5
"""From the last entry of a table on, until the owners' judgement is there."""
BLOCKS = ("query", "result", "table")
"""What a command's addresses are of; `where` of INVALID_ADDRESS is the number."""
OUTSTANDING = 16
"""Lines that are asked for and have not come, at most: covers a latency of about 128 cycles."""
WORD_ELEMENTS = WORD_BYTES // ELEMENT_BYTES
FP32_BITS, FP32_FRACTION, FP32_EXPONENT = 32, 23, 8


class Loader(wiring.Component):
    """Fetches and checks commands, loads the lanes and starts the jobs, hands flash and admin commands over.

    Latency: for a job of one row about the memory's latency + 17 cycles of checking + a cycle for
    each word of its query block and its table.  The next command is requested right behind these,
    so its fetch costs its eight words only.  A flash command takes the memory's latency + 19 cycles.
    A CENTROID job has two words for each stripe.  SPARF and FETCHED take the `Ranker`'s digits, or a
    cycle for each word of mean and table if these take longer; the `Ranker`'s time from `go` to
    `done`; three cycles.
    Throughput: one word a cycle while a block arrives; one job at a time.
    Ordering: jobs leave in the order in which they are fetched, and so do flash and admin commands; a
    job's `start` comes two cycles or more after the last `load`, its record on `jobs` one cycle or
    more after its `start`.  A flash command that nobody takes waits beside, with its queue on `hold`.
    Reset: no command; the epoch goes on, so that codewords of jobs before the reset are recognised as
    stale.  Reads under way must have ended before: raise `stop` until `quiet`.

    A command that fails its checks becomes a job without lanes, of mode DENSE; so does one with a
    bad query block, mean or table.  The first that applies is reported: BUS_ERROR of the command
    line, INVALID_OPCODE, NOT_PERMITTED (opcode), INVALID_FIELD; for ATTEND: INVALID_ROWS,
    INVALID_LENGTH, INVALID_SELECTION (features, top_units, local_tokens, unit_bits), INVALID_ADDRESS (query,
    result, table), INVALID_SCALE, NOT_PERMITTED (domain), BUS_ERROR of query block, mean or table,
    INVALID_TABLE, NOT_OWNED, NO_SKETCH, NAN_QUERY, NAN_MEAN; for flash commands: INVALID_PLACE,
    NOT_PERMITTED (domain), NOT_OWNED.  `where` is zero for those that commands.Status gives none.
    Without `config.sparse` there is no mode but DENSE.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : Out(AXI_READ)
        Host memory.
    fetch : In(stream of FETCH)
        Line of the next command, and its queue; taken when the line has come.
    hold : Out(QUEUES)
        Offer nothing of these on `fetch`: a flash command of it waits for its channel, or its last command
        could be one.
    create_valid, create_queue : In(1), In(3)
        Strobe: this queue is created.  Its window is the one of the CREATE_QUEUE that was taken from
        `admin` last; that of queue 0 is `admin_base` to `admin_limit`.
    admin_base, admin_limit : In(64)
        The registers.
    domain, page, dram_page : Out(8), Out(24), Out(24)
        What the current command names, for `Owners`.
    domain_queues : In(QUEUES)
        Queues that may name the domain.
    page_owned, dram_owned : In(1)
        The pages of the flash command are the domain's.
    entry_number : Out(16)
        Number of the stripe that is being loaded.
    owner_clear : Out(1)
        A new table will come.
    not_owned, not_owned_where : In(1), In(16)
        An entry of the table is not the domain's; the first.
    load_valid, load : Out(1), Out(Shapes.load)
        Written to all lanes.
    start_valid, start : Out(1), Out(Shapes.start)
        Given to all lanes when everything is loaded.
    mean_valid, mean : Out(1), Out(Shapes.mean)
        Words of the mean of V of a SPARF or FETCHED job, before its `start`; also of one that fails later checks.
    jobs : Out(stream of Shapes.job)
        The jobs.
    flash : Out(stream of Shapes.flash_command)
        Flash commands that passed their checks; they take no slot.
    admin : Out(stream of Shapes.admin_command)
        The commands for `Admin`.
    freed : In(1)
        Strobe: a slot is free again.
    bus_error : Out(1)
        Strobe: a word was not answered with OKAY.
    stop : In(1)
        Start no read, drop what comes, hand no flash command over; a reset will follow.
    quiet : Out(1)
        No read is under way.
    """

    bus: wiring.PureInterface
    fetch: stream.Interface
    hold: Signal
    create_valid: Signal
    create_queue: Signal
    admin_base: Signal
    admin_limit: Signal
    domain: Signal
    page: Signal
    dram_page: Signal
    domain_queues: Signal
    page_owned: Signal
    dram_owned: Signal
    entry_number: Signal
    owner_clear: Signal
    not_owned: Signal
    not_owned_where: Signal
    load_valid: Signal
    load: data.View
    start_valid: Signal
    start: data.View
    mean_valid: Signal
    mean: data.View
    jobs: stream.Interface
    flash: stream.Interface
    admin: stream.Interface
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
                "fetch": In(stream.Signature(FETCH)),
                "hold": Out(QUEUES),
                "create_valid": In(1),
                "create_queue": In(range(QUEUES)),
                "admin_base": In(64),
                "admin_limit": In(64),
                "domain": Out(8),
                "page": Out(PAGE_BITS),
                "dram_page": Out(PAGE_BITS),
                "domain_queues": In(QUEUES),
                "page_owned": In(1),
                "dram_owned": In(1),
                "entry_number": Out(16),
                "owner_clear": Out(1),
                "not_owned": In(1),
                "not_owned_where": In(16),
                "load_valid": Out(1),
                "load": Out(shapes.load),
                "start_valid": Out(1),
                "start": Out(shapes.start),
                "mean_valid": Out(1),
                "mean": Out(shapes.mean),
                "jobs": Out(stream.Signature(shapes.job)),
                "flash": Out(stream.Signature(shapes.flash_command)),
                "admin": Out(stream.Signature(shapes.admin_command)),
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
        m.submodules.window = window = Window(len(BLOCKS))
        form = config.element.encoding
        m.submodules.check = check = NanCheck(
            bits=ELEMENT_BYTES * 8,
            fraction_bits=form.fraction_bits,
            exponent_bits=form.exponent_bits,
            elements=config.head_dim,
            rows=config.rows,
        )
        m.submodules.table_check = table_check = TableCheck(config)
        connect(m, read.bus, flipped(self.bus))
        word = read.words.payload
        taken = Signal()
        m.d.comb += [
            taken.eq(read.words.valid & read.words.ready),
            self.bus_error.eq(taken & word.error),
            read.stop.eq(self.stop),
            self.quiet.eq(read.quiet),
        ]

        # Fields that must be zero are not kept; all others are parts of the command's words.
        not_built = () if config.sparse else ("mode", *SPARSE_FIELDS)

        def is_reserved(field: Field) -> bool:
            return field.name == "flags" or field.name.startswith("reserved") or field.name in not_built

        layouts = (FLASH_COMMAND, DATA_COMMAND, QUEUE_COMMAND, GRANT_COMMAND, COMMAND)
        words = [Signal(WORD_BYTES * 8, name=f"command_{i}") for i in range(LINE_WORDS)]
        flash_command, _, queue_command, grant_command, command = (
            {f.name: field_of_word(words[word_of(f)], f) for f in layout.fields if not is_reserved(f)}
            for layout in layouts
        )
        broken = Signal()  # an error answer in this command's line, query block, mean or table
        # A reserved byte of this record was not zero.
        reserved = {layout.name: Signal(name=f"reserved_{layout.name}") for layout in layouts}
        status = Signal(STATUS_BITS)
        where = Signal(32)
        queue = Signal(range(QUEUES))

        # The mode: constants where only DENSE is built.
        length = Signal(TOKEN_BITS + 1)
        sparse = ranked = bad_mode = bad_selection = bad_selection_where = Const(0, 1)
        if config.sparse:
            m.submodules.mode_check = mode_check = ModeCheck(config)
            sparse, ranked, bad_mode = mode_check.sparse, mode_check.ranked, mode_check.bad_field
            bad_selection, bad_selection_where = mode_check.bad, mode_check.where
            m.d.comb += mode_check.length.eq(length)
            for name in ("mode", "stripe_pages", *SPARSE_FIELDS):
                m.d.comb += getattr(mode_check, name).eq(command[name])

        # Requests: the query block's lines, those of the mean and the table behind it, then the next command's.
        lane_stripes = config.ring_codewords // config.codewords_per_page
        all_stripes = config.channels * lane_stripes
        want_command = Signal(init=1)
        query_line, table_line = Signal(LINE_ADDRESS_BITS), Signal(LINE_ADDRESS_BITS)
        row_lines = query_row_bytes(config.head_dim) // LINE_BYTES
        line_entries = LINE_BYTES // TABLE_ENTRY.size
        query_left = Signal(range(config.rows * row_lines + 1))
        table_words = all_stripes * (2 if config.sparse else 1)
        mean_lines = fp32_block_bytes(config.head_dim) // LINE_BYTES if config.sparse else 0
        table_lines = Signal(bits_for(mean_lines - (-table_words // line_entries)))
        table_left = Signal.like(table_lines)
        wanted = Signal()
        m.d.comb += [
            read.lines.valid.eq(wanted | (want_command & self.fetch.valid)),
            read.lines.payload.eq(self.fetch.payload.line),
        ]
        for number, (line, left) in enumerate(
            ((query_line, query_left), (table_line, table_left))
        ):
            with m.If(left.any()) if number == 0 else m.Elif(left.any()):
                m.d.comb += [wanted.eq(1), read.lines.payload.eq(line)]
                with m.If(read.lines.ready):
                    m.d.sync += [line.eq(line + 1), left.eq(left - 1)]
        with m.If(read.lines.valid & read.lines.ready & ~wanted):
            m.d.sync += want_command.eq(0)

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
        is_flash, is_data, is_queue, is_admin = (
            Signal(name=name) for name in ("is_flash", "is_data", "is_queue", "is_admin"))
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
        m.d.comb += table_lines.eq(
            ((Mux(sparse, stripes << 1, stripes) + line_entries - 1) >> ceil_log2(line_entries))
            + Mux(ranked, mean_lines, 0)
        )
        m.d.sync += [
            sizes["query"].eq(Mux(
                is_data,    # whose result is at the same place
                Mux(opcode == Opcode.IDENTIFY, IDENTIFY_BYTES, lines(8 * len(COUNTERS)) * LINE_BYTES),
                rows * query_row_bytes(config.head_dim))),
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
                length[TOKEN_BITS]
                | ~length.any()
                | (last_page >= end_page)
                | (last_page + config.tokens_per_page < end_page)
            ),
            bad_scale.eq(scale[-1] | ~scale_exponent.any() | scale_exponent.all()),
            k_offset.eq(scale_exponent + config.element.encoding.score_offset),
        ]

        # Flash commands, and those that change or write what the drive knows of itself.
        bad_place, not_permitted, not_domain = (
            Signal(name=name) for name in ("bad_place", "not_permitted", "not_domain"))
        hand_over = Signal()
        page, argument = flash_command["page"], flash_command["argument"]
        admin_queue = queue == 0
        place_checks = [
            flash_command["channel"] >= config.channels,
            page >> config.zone_page_bits >= config.part.blocks,
            (opcode == Opcode.MAP) & (argument >= config.part.blocks),
        ]
        if config.part.pages < 1 << config.block_page_bits:
            block_page = page[config.plane_bits + config.die_bits :][: config.block_page_bits]
            place_checks.append(block_page >= config.part.pages)
        erase, probe, map_block = (opcode == code for code in (Opcode.ERASE, Opcode.PROBE, Opcode.MAP))
        # Who owns it does not matter.
        anybody = probe | map_block | (erase & admin_queue)
        deleted = [queue_command[name].any() for name in ("entries", "submission", "completion", "base", "limit")]
        m.d.comb += [
            is_flash.eq(Cat(opcode == code for code in FLASH_OPCODES).any()),
            is_data.eq(Cat(opcode == code for code in DATA_OPCODES).any()),
            is_queue.eq(Cat(opcode == code for code in QUEUE_OPCODES).any()),
            is_admin.eq(is_data | is_queue | (opcode == Opcode.GRANT)),
            self.domain.eq(command["domain"]),
            self.page.eq(page),
            self.dram_page.eq(argument),
        ]
        m.d.sync += [
            bad_opcode.eq(~is_flash & ~is_admin & (opcode != Opcode.ATTEND)),
            not_permitted.eq((opcode >= ADMIN_OPCODES) & ~admin_queue),
            not_domain.eq(
                ~self.domain_queues.bit_select(queue, 1) | command["domain"][len(self.domain) :].any()
            ),
            bad_place.eq(Cat(place_checks).any()),
        ]
        with m.If(is_flash):
            m.d.sync += bad_field.eq(
                reserved["FlashCommand"]
                | ((erase | probe) & argument.any())
                | (anybody & flash_command["domain"].any())
            )
        with m.Elif(is_data):
            m.d.sync += bad_field.eq(reserved["DataCommand"])
        with m.Elif(is_queue):
            m.d.sync += bad_field.eq(
                reserved["QueueCommand"] | ((opcode == Opcode.DELETE_QUEUE) & Cat(deleted).any()))
        with m.Elif(is_admin):
            m.d.sync += bad_field.eq(reserved["GrantCommand"])
        with m.Else():
            m.d.sync += bad_field.eq(
                reserved["Command"] | bad_mode | ~Cat(stripe_pages == pages for pages in legal_pages).any())
        not_owned = ~self.page_owned | ((opcode == Opcode.PROGRAM) & ~self.dram_owned)
        good = ~broken & ~bad_opcode & ~not_permitted & ~bad_field
        m.d.comb += hand_over.eq(
            good & (is_admin | (is_flash & ~bad_place & (anybody | (~not_domain & ~not_owned)))))

        # They wait in registers of their own, so that commands of other queues can pass.
        flash, admin = Signal(shapes.flash_command), Signal(shapes.admin_command)
        flash_valid, admin_valid = Signal(), Signal()
        flash_queue = Signal.like(queue)
        park_flash, park_admin = Signal(), Signal()
        m.d.comb += [
            self.flash.valid.eq(flash_valid & ~self.stop),
            self.flash.payload.eq(flash),
            self.admin.valid.eq(admin_valid),
            self.admin.payload.eq(admin),
            # Nobody knows yet whether the command that was fetched last will have to wait.
            self.hold.eq(Mux(flash_valid, 1 << flash_queue, 0) | Mux(want_command, 0, 1 << queue)),
        ]
        with m.If(self.flash.ready):
            m.d.sync += flash_valid.eq(0)
        with m.If(park_flash):
            m.d.sync += [
                flash_valid.eq(1),
                flash_queue.eq(queue),
                flash.channel.eq(flash_command["channel"]),
                flash.operation.opcode.eq(opcode[DIRECTION_BITS:][:OPCODE_BITS]),
                flash.operation.page.eq(page),
                flash.operation.block.eq(argument),
                flash.operation.identity.eq(
                    Cat(queue, Const(0, 16 - len(queue)), flash_command["identifier"])),
                flash.dram_page.eq(argument),
            ]
        window_shape = data.StructLayout({"base": 64, "limit": 64})
        given, taken_window = Signal(window_shape), Signal(window_shape)
        with m.If(self.admin.ready):
            m.d.sync += admin_valid.eq(0)
            with m.If(admin_valid):
                m.d.sync += taken_window.eq(given)
        with m.If(park_admin):
            m.d.sync += [
                admin_valid.eq(1),
                admin.opcode.eq(opcode),
                admin.queue.eq(queue),
                admin.identifier.eq(command["identifier"]),
                admin.number.eq(queue_command["queue"]),
                admin.entries.eq(queue_command["entries"]),
                admin.first.eq(grant_command["first"]),
                admin.count.eq(grant_command["count"]),
                admin.domain.eq(grant_command["domain"]),
                admin.submission.eq(queue_command["submission"]),
                admin.completion.eq(queue_command["completion"]),
                admin.bad_address.eq(window.bad[BLOCKS.index("query")]),
                given.base.eq(queue_command["base"]),
                given.limit.eq(queue_command["limit"]),
            ]

        # The window of each queue, in which its commands' blocks must lie.
        m.submodules.windows = windows = Memory(
            shape=window_shape, depth=QUEUES, init=[], attrs={"ram_style": "distributed"})
        window_write, window_read = windows.write_port(), windows.read_port(domain="comb")
        m.d.comb += [
            window_write.en.eq(self.create_valid),
            window_write.addr.eq(self.create_queue),
            window_write.data.eq(taken_window),
            window_read.addr.eq(queue),
        ]
        with m.If(self.create_queue == 0):
            m.d.comb += [
                window_write.data.base.eq(self.admin_base), window_write.data.limit.eq(self.admin_limit)]

        step = Signal(4)
        address_steps = 2 * len(BLOCKS)
        judge = address_steps + 2  # the window's three cycles
        flash_judge = 5  # the owners' three cycles
        block = step[1:][: len(window.which)]
        m.d.comb += [
            window.high.eq(step[0]),
            window.which.eq(block),
            window.base.eq(window_read.data.base.word_select(step[0], HALF)),
            window.limit.eq(window_read.data.limit.word_select(step[0], HALF)),
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

        # The table: an entry stands in `load` while it is checked.  A stripe may have a second one.
        entries_left = Signal(range(all_stripes + 1))
        entry_number = Signal(16)
        token = Signal(TOKEN_BITS)
        in_sketch = Signal()

        load = self.load
        m.d.comb += [
            table_check.valid.eq(self.load_valid & load.stripe),
            table_check.entry.eq(load.data),
            table_check.limit.eq(lane_limit),
            table_check.sparse.eq(sparse),
        ]
        m.d.comb += self.entry_number.eq(table_check.number)
        m.d.sync += [
            table_check.number.eq(entry_number),
            self.load_valid.eq(0),
            load.query.eq(0),
            load.record.eq(0),
            load.scale.eq(0),
            load.chosen.eq(0),
            load.stripe.eq(0),
            load.sketch.eq(0),
            load.slot.eq(slot),
            load.row.eq(row),
        ]
        m.d.comb += [
            self.start.slot.eq(slot),
            self.start.epoch.eq(epoch),
            self.start.stripe_bits.eq(stripe_bits),
            self.start.last_token.eq(load.start),  # the last one loaded
            self.start.end_token.eq(command["end_token"]),
            self.start.tree_token.eq(command["tree_token"]),
            self.start.k_offset.eq(k_offset),
            self.start.scale.eq(Cat(scale[:FP32_FRACTION], 1)),
            self.jobs.payload.slot.eq(slot),
            self.jobs.payload.lanes.eq(status == Status.OK),
            self.jobs.payload.queue.eq(queue),
            self.jobs.payload.identifier.eq(command["identifier"]),
            self.jobs.payload.rows.eq(rows),
            self.jobs.payload.result.eq(command["result"]),
            self.jobs.payload.status.eq(status),
            self.jobs.payload.where.eq(where),
        ]
        if config.sparse:
            local_token = Signal(TOKEN_BITS)
            before = command["end_token"][:TOKEN_BITS] - command["local_tokens"]
            m.d.sync += local_token.eq(Mux(before < 0, 0, before))
            m.d.comb += [
                self.start.mode.eq(command["mode"]),
                self.start.unit_bits.eq(command["unit_bits"]),
                self.start.features.eq(command["features"]),
                self.start.local_token.eq(local_token),
                self.start.sinks.eq(command["sinks"]),
                self.jobs.payload.mode.eq(Mux(status == Status.OK, command["mode"], 0)),
                self.jobs.payload.units.eq(command["top_units"]),
            ]
        else:
            m.d.comb += self.start.local_token.eq(command["end_token"])

        # What sparse jobs need beside.
        no_sketch = no_sketch_where = nan_mean = nan_mean_where = Const(0, 1)
        mean_words = config.head_dim * FP32_BITS // 8 // WORD_BYTES  # whole lines, as all head_dim
        mean_index = Signal(range(mean_words))
        m.d.sync += self.mean_valid.eq(0)
        if config.sparse:
            m.submodules.sketch_check = sketch_check = SketchCheck(config)
            m.submodules.mean_check = mean_check = NanCheck(
                bits=FP32_BITS,
                fraction_bits=FP32_FRACTION,
                exponent_bits=FP32_EXPONENT,
                elements=config.head_dim,
                rows=1,
            )
            m.submodules.ranker = ranker = Ranker(config)
            no_sketch, no_sketch_where = sketch_check.found, sketch_check.where
            nan_mean, nan_mean_where = mean_check.found, mean_check.channel
            m.d.comb += [
                sketch_check.ranked.eq(ranked),
                sketch_check.stripe.eq(self.load_valid & load.stripe),
                sketch_check.sketch.eq(self.load_valid & load.sketch),
                sketch_check.entry.eq(load.data),
                sketch_check.number.eq(table_check.number),
                sketch_check.clear.eq(table_check.clear),
                table_check.reject.eq(sketch_check.bad),
                mean_check.word.eq(word.data),
                mean_check.index.eq(mean_index),
                mean_check.clear.eq(check.clear),
                ranker.clear.eq(check.clear),
                ranker.valid.eq(check.valid & ranked),
                ranker.word.eq(word.data),
                ranker.rows.eq(rows),
                ranker.features.eq(command["features"]),
                ranker.scale.eq(self.start.scale),
                ranker.k_offset.eq(k_offset),
            ]
            m.d.sync += [
                self.mean.slot.eq(slot),
                self.mean.index.eq(mean_index),
                self.mean.data.eq(word.data),
            ]

        settle = Signal(range(OWNER_CYCLES + 1))

        def end_command() -> None:
            m.d.sync += [flag.eq(0) for flag in (broken, *reserved.values())]
            m.d.sync += position.eq(0)
            m.next = "command"

        with m.FSM(name="state"):
            with m.State("command"):
                m.d.comb += [
                    read.words.ready.eq(1),
                    window.clear.eq(1),
                    check.clear.eq(1),
                    table_check.clear.eq(1),
                    self.owner_clear.eq(1),
                ]
                m.d.sync += step.eq(0)
                with m.If(taken):
                    m.d.sync += [position.eq(position + 1), broken.eq(broken | word.error)]
                    with m.Switch(position):
                        for number in range(LINE_WORDS):
                            with m.Case(number):
                                m.d.sync += words[number].eq(word.data)
                                for layout in layouts:
                                    flag = reserved[layout.name]
                                    spare = [
                                        field_of_word(word.data, f).any()
                                        for f in layout.fields
                                        if is_reserved(f) and word_of(f) == number
                                    ]
                                    if spare:
                                        m.d.sync += flag.eq(flag | Cat(spare).any())
                    with m.If(word.last):
                        # Only now its entry is free for the host.
                        m.d.comb += self.fetch.ready.eq(1)
                        m.d.sync += [position.eq(0), queue.eq(self.fetch.payload.queue)]
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
                    m.next = "report"
                    with m.If(~hand_over):
                        m.d.sync += want_command.eq(1)
                    with m.If((slot == 0) & ~hand_over):
                        # Once for each turn round the slots, at its beginning: it also tells jobs
                        # after a reset from before.
                        m.d.sync += epoch.eq(epoch + 1)
                    with m.If(broken):
                        m.d.sync += [
                            status.eq(Status.BUS_ERROR), where.eq(0), command["identifier"].eq(UNKNOWN_IDENTIFIER)]
                    with m.Elif(bad_opcode):
                        m.d.sync += [status.eq(Status.INVALID_OPCODE), where.eq(opcode)]
                    with m.Elif(not_permitted):
                        m.d.sync += [status.eq(Status.NOT_PERMITTED), where.eq(0)]
                    with m.Elif(bad_field):
                        m.d.sync += [status.eq(Status.INVALID_FIELD), where.eq(0)]
                    with m.Elif(hand_over):
                        m.next = "park"
                    with m.Elif(is_flash):
                        with m.If(bad_place):
                            m.d.sync += [status.eq(Status.INVALID_PLACE), where.eq(0)]
                        with m.Elif(not_domain):
                            m.d.sync += [status.eq(Status.NOT_PERMITTED), where.eq(1)]
                        with m.Else():
                            m.d.sync += [status.eq(Status.NOT_OWNED), where.eq(self.page_owned)]
                    with m.Elif(bad_rows):
                        m.d.sync += [status.eq(Status.INVALID_ROWS), where.eq(command["rows"])]
                    with m.Elif(bad_count | bad_length):
                        m.d.sync += [status.eq(Status.INVALID_LENGTH), where.eq(0)]
                    with m.Elif(bad_selection):
                        m.d.sync += [
                            status.eq(Status.INVALID_SELECTION),
                            where.eq(bad_selection_where),
                        ]
                    with m.Elif(window.bad.any()):
                        m.d.sync += status.eq(Status.INVALID_ADDRESS)
                        for number in reversed(range(len(BLOCKS))):
                            with m.If(window.bad[number]):
                                m.d.sync += where.eq(number)
                    with m.Elif(bad_scale):
                        m.d.sync += [status.eq(Status.INVALID_SCALE), where.eq(0)]
                    with m.Elif(not_domain):
                        m.d.sync += [status.eq(Status.NOT_PERMITTED), where.eq(1)]
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
                            in_sketch.eq(0),
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
                            if config.sparse:
                                with m.If(ranked):
                                    m.next = "mean"
            with m.State("table"):
                # Until the checks are done an entry is loaded like a good one: without a `start` it
                # does nothing.
                m.d.comb += read.words.ready.eq(1)
                with m.If(taken):
                    m.d.sync += broken.eq(broken | word.error)
                    with m.If(entries_left.any()):
                        m.d.sync += [
                            self.load_valid.eq(1),
                            load.stripe.eq(~in_sketch),
                            load.sketch.eq(in_sketch),
                            load.last.eq(entries_left == 1),
                            load.data.eq(word.data),
                            load.start.eq(token),
                            in_sketch.eq(~in_sketch & sparse),
                        ]
                        with m.If(in_sketch | ~sparse):
                            m.d.sync += [
                                token.eq(token + stripe_tokens),
                                entries_left.eq(entries_left - 1),
                                entry_number.eq(entry_number + 1),
                            ]
                    with m.If(word.last & (entries_left <= 1)):
                        m.next = "settle"
            if config.sparse:
                with m.State("mean"):
                    m.d.comb += [read.words.ready.eq(1), mean_check.valid.eq(taken)]
                    with m.If(taken):
                        m.d.sync += [
                            broken.eq(broken | word.error),
                            self.mean_valid.eq(1),
                            mean_index.eq(mean_index + 1),
                        ]
                        with m.If(mean_index == mean_words - 1):
                            m.d.sync += mean_index.eq(0)
                            m.next = "table"
            with m.State("settle"):
                # The last entry of the table is being checked.
                m.d.sync += settle.eq(settle + 1)
                with m.If(settle == OWNER_CYCLES):
                    m.d.sync += settle.eq(0)
                    m.next = "decide"
            with m.State("decide"):
                m.next = "report"
                with m.If(broken):
                    m.d.sync += status.eq(Status.BUS_ERROR)
                with m.Elif(table_check.found):
                    m.d.sync += [status.eq(Status.INVALID_TABLE), where.eq(table_check.where)]
                with m.Elif(self.not_owned):
                    m.d.sync += [status.eq(Status.NOT_OWNED), where.eq(self.not_owned_where)]
                with m.Elif(no_sketch):
                    m.d.sync += [status.eq(Status.NO_SKETCH), where.eq(no_sketch_where)]
                with m.Elif(check.found):
                    m.d.sync += [
                        status.eq(Status.NAN_QUERY),
                        where.eq(
                            Cat(check.channel, Const(0, 16 - len(check.channel)), check.row_found)
                        ),
                    ]
                with m.Elif(nan_mean):
                    m.d.sync += [status.eq(Status.NAN_MEAN), where.eq(nan_mean_where)]
                with m.Else():
                    m.next = "start"
                    if config.sparse:
                        with m.If(ranked):
                            m.next = "rank"
            if config.sparse:
                with m.State("rank"):
                    m.d.comb += ranker.go.eq(1)
                    with m.If(ranker.chosen_valid):
                        m.d.sync += [
                            self.load_valid.eq(1),
                            load.chosen.eq(1),
                            load.data.eq(Cat(ranker.chosen, ranker.chosen_index)),
                        ]
                    with m.If(ranker.scale_valid):
                        m.d.sync += [
                            self.load_valid.eq(1),
                            load.scale.eq(1),
                            load.row.eq(ranker.scale_row),
                            load.data.eq(ranker.approximate),
                        ]
                    with m.If(ranker.done & ~self.load_valid):
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
            with m.State("park"):
                with m.If(Mux(is_flash, ~flash_valid | self.flash.ready, ~admin_valid | self.admin.ready)):
                    m.d.comb += [park_flash.eq(is_flash), park_admin.eq(~is_flash)]
                    m.d.sync += want_command.eq(1)
                    end_command()
        return m
