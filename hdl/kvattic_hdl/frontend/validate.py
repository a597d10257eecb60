"""Judges a command by its fields, before anything that it names is read."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import (
    ADMIN_OPCODES,
    COMMAND,
    DOMAINS,
    FLASH_COMMAND,
    IDENTIFY_BYTES,
    LINE_BYTES,
    READ_BYTES,
    STATUS_BITS,
    Opcode,
    Status,
    lines,
    query_row_bytes,
    read_token_bytes,
    result_row_bytes,
)
from kvattic.spec.config import Config
from kvattic.spec.registers import COUNTERS, QUEUES
from kvattic_hdl.frontend.checks import HALF, SIZE_BITS, SPARSE_FIELDS, ModeCheck, Window
from kvattic_hdl.frontend.fetch import (
    LAYOUTS,
    LINE_ENTRIES,
    all_stripes,
    command_fields,
    mean_lines,
    table_line_bits,
)
from kvattic_hdl.frontend.hand_over import WINDOW
from kvattic_hdl.lib.arithmetic import pick, times
from kvattic_hdl.lib.shapes import K_OFFSET_BITS, TOKEN_BITS, Shapes

FLASH_OPCODES = (Opcode.PROGRAM, Opcode.ERASE, Opcode.PROBE, Opcode.MAP)
DATA_OPCODES = (Opcode.IDENTIFY, Opcode.COUNTERS)
QUEUE_OPCODES = (Opcode.CREATE_QUEUE, Opcode.DELETE_QUEUE)
DOMAIN_BITS = ceil_log2(DOMAINS)
BLOCKS = ("query", "result", "table")
"""What a command's addresses are of; `where` of INVALID_ADDRESS is the number."""
FP32_FRACTION, FP32_EXPONENT = 23, 8
ADDRESS_STEPS = 2 * len(BLOCKS)
JUDGE = ADDRESS_STEPS + 2
"""Steps of a command: the window takes three cycles."""
FLASH_JUDGE = 5
"""Steps of a flash command: the owners take three cycles."""
JUDGEMENT = data.StructLayout({"status": STATUS_BITS, "where": 32})
"""How a command fares."""


class Validate(wiring.Component):
    """Checks the fields of a command; the first that applies of what is listed at `Loader` is its judgement.

    Latency: `JUDGE` cycles after `checking` rises, of a flash command `FLASH_JUDGE`.  Throughput: one command at a
    time.  Ordering: none.  Reset: no command; the queues' windows stay.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    clear : In(1)
        The next command is not there yet.
    checking : In(1)
        High from the cycle after the command has come until `judged`.
    command, reserved, needless, queue, broken : In
        See `Fetch`; stable while `checking`.
    create_valid, create_queue, create_window : In(1), In(3), In(WINDOW)
        Strobe: this queue is created, and has this window, which stays for a cycle more; that of queue 0 is
        `admin_base` to `admin_limit`.
    admin_base, admin_limit : In(64)
        The registers.
    domain_queues : In(QUEUES)
        Queues that may name the command's domain.
    page_owned, dram_owned : In(1)
        The pages of a flash command are the domain's.
    judged : Out(1)
        The last cycle of checking: these are right:
    is_flash : Out(1)
        It is a flash command.
    is_read : Out(1)
        It is a READ: a job, dense and without rows.
    hand_over : Out(1)
        It is a good flash or admin command.
    judgement : Out(JUDGEMENT)
        What is wrong with it, or OK of a job; means nothing with `hand_over`.
    bad_block : Out(1)
        The block of an admin command is not aligned or not in the window.
    sparse, ranked : Out(1)
        The mode is none but DENSE; it is SPARF or FETCHED.  These and the following are about jobs.
    stripe_bits : Out(Shapes.stripe_bits)
        log2 of the pages of a stripe.
    stripe_tokens : Out(24)
        Tokens of a stripe.
    lane_limit : Out
        Stripes that a lane may have.
    table_lines : Out
        Lines of mean and table.
    k_offset : Out(signed(10))
        As in `Shapes.start`.
    """

    clear: Signal
    checking: Signal
    command: Signal
    reserved: Signal
    needless: Signal
    queue: Signal
    broken: Signal
    create_valid: Signal
    create_queue: Signal
    create_window: data.View
    admin_base: Signal
    admin_limit: Signal
    domain_queues: Signal
    page_owned: Signal
    dram_owned: Signal
    judged: Signal
    is_flash: Signal
    is_read: Signal
    hand_over: Signal
    judgement: data.View
    bad_block: Signal
    sparse: Signal
    ranked: Signal
    stripe_bits: Signal
    stripe_tokens: Signal
    lane_limit: Signal
    table_lines: Signal
    k_offset: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        shapes = Shapes(config)
        self._lane_stripes = config.ring_codewords // config.codewords_per_page
        super().__init__({
            "clear": In(1),
            "checking": In(1),
            "command": In(LINE_BYTES * 8),
            "reserved": In(len(LAYOUTS)),
            "needless": In(1),
            "queue": In(range(QUEUES)),
            "broken": In(1),
            "create_valid": In(1),
            "create_queue": In(range(QUEUES)),
            "create_window": In(WINDOW),
            "admin_base": In(64),
            "admin_limit": In(64),
            "domain_queues": In(QUEUES),
            "page_owned": In(1),
            "dram_owned": In(1),
            "judged": Out(1),
            "is_flash": Out(1),
            "is_read": Out(1),
            "hand_over": Out(1),
            "judgement": Out(JUDGEMENT),
            "bad_block": Out(1),
            "sparse": Out(1),
            "ranked": Out(1),
            "stripe_bits": Out(shapes.stripe_bits),
            "stripe_tokens": Out(TOKEN_BITS),
            "lane_limit": Out(bits_for(self._lane_stripes)),
            "table_lines": Out(table_line_bits(config)),
            "k_offset": Out(signed(K_OFFSET_BITS)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        fields = command_fields(self._config, COMMAND, self.command)
        opcode = fields["opcode"]
        # Every check is stable when the last step judges.
        is_data, is_queue, is_admin = (Signal(name=name) for name in ("is_data", "is_queue", "is_admin"))
        m.d.comb += [
            self.is_flash.eq(Cat(opcode == code for code in FLASH_OPCODES).any()),
            self.is_read.eq(opcode == Opcode.READ),
            is_data.eq(Cat(opcode == code for code in DATA_OPCODES).any()),
            is_queue.eq(Cat(opcode == code for code in QUEUE_OPCODES).any()),
            is_admin.eq(is_data | is_queue | (opcode == Opcode.GRANT)),
        ]
        length, bad_rows, bad_length, bad_scale, legal_stripes = self._check_job(m, fields)
        bad_mode, bad_selection, bad_selection_where = self._check_mode(m, fields, length)
        bad_address = self._check_addresses(m, fields, is_data, length)
        bad_place, not_domain, anybody, bad_flash = self._check_flash(m, fields)
        bad_opcode, not_permitted, bad_field = Signal(), Signal(), Signal()
        m.d.sync += [
            bad_opcode.eq(~self.is_flash & ~is_admin & ~self.is_read & (opcode != Opcode.ATTEND)),
            not_permitted.eq((opcode >= ADMIN_OPCODES) & (self.queue != 0)),
        ]
        reserved = {layout.name: flag for layout, flag in zip(LAYOUTS, self.reserved, strict=True)}
        with m.If(self.is_flash):
            m.d.sync += bad_field.eq(reserved["FlashCommand"] | bad_flash)
        with m.Elif(is_data):
            m.d.sync += bad_field.eq(reserved["DataCommand"])
        with m.Elif(is_queue):
            m.d.sync += bad_field.eq(reserved["QueueCommand"] | ((opcode == Opcode.DELETE_QUEUE) & self.needless))
        with m.Elif(is_admin):
            m.d.sync += bad_field.eq(reserved["GrantCommand"])
        with m.Elif(self.is_read):
            m.d.sync += bad_field.eq(reserved["ReadCommand"] | ~legal_stripes)
        with m.Else():
            m.d.sync += bad_field.eq(reserved["Command"] | bad_mode | ~legal_stripes)

        not_owned = ~self.page_owned | ((opcode == Opcode.PROGRAM) & ~self.dram_owned)
        good = ~self.broken & ~bad_opcode & ~not_permitted & ~bad_field
        m.d.comb += self.hand_over.eq(
            good & (is_admin | (self.is_flash & ~bad_place & (anybody | (~not_domain & ~not_owned)))))

        def refuse(condition: Value, status: Status, where: Value | int = 0) -> tuple:
            return condition, status, where

        address_where = Mux(bad_address[0], 0, Mux(bad_address[1], 1, 2))
        of_any = (
            refuse(self.broken, Status.BUS_ERROR),
            refuse(bad_opcode, Status.INVALID_OPCODE, opcode),
            refuse(not_permitted, Status.NOT_PERMITTED),
            refuse(bad_field, Status.INVALID_FIELD),
        )
        of_flash = (
            refuse(self.is_flash & bad_place, Status.INVALID_PLACE),
            refuse(self.is_flash & not_domain, Status.NOT_PERMITTED, 1),
            refuse(self.is_flash, Status.NOT_OWNED, self.page_owned),
        )
        of_job = (
            refuse(bad_rows, Status.INVALID_ROWS, fields["rows"]),
            refuse(bad_length, Status.INVALID_LENGTH),
            refuse(bad_selection, Status.INVALID_SELECTION, bad_selection_where),
            refuse(bad_address.any(), Status.INVALID_ADDRESS, address_where),
            refuse(bad_scale, Status.INVALID_SCALE),
            refuse(not_domain, Status.NOT_PERMITTED, 1),
        )
        for number, (condition, status, where) in enumerate((*of_any, *of_flash, *of_job)):
            with m.If(condition) if number == 0 else m.Elif(condition):
                m.d.comb += [self.judgement.status.eq(status), self.judgement.where.eq(where)]
        return m

    def _check_job(self, m: Module, fields: dict[str, Value]) -> tuple[Signal, Signal, Value, Signal, Value]:
        """Numbers of a job: (its tokens, bad rows, bad length, bad scale, the pages of a stripe are a legal number)."""
        config, lane_stripes = self._config, self._lane_stripes
        most_stripes = all_stripes(config)
        scale = fields["scale"]
        scale_exponent = scale[FP32_FRACTION:][:FP32_EXPONENT]
        stripes, stripe_pages = fields["stripes"], fields["stripe_pages"]
        legal_pages = [1 << i for i in range(len(stripe_pages)) if 1 << i <= lane_stripes]
        length = Signal(TOKEN_BITS + 1)
        token_bytes = read_token_bytes(config.head_dim, config.kv_element_bytes)
        last_page = Signal(TOKEN_BITS)  # whole pages * 2**-bits before the last token
        end_page = Signal(bits_for(most_stripes * config.tokens_per_page))
        bad_rows, bad_count, bad_length, too_much, bad_scale = (
            Signal(name=name) for name in ("bad_rows", "bad_count", "bad_length", "too_much", "bad_scale"))
        for i in range(len(legal_pages)):
            with m.If(stripe_pages[i]):
                m.d.sync += self.stripe_bits.eq(i)
        m.d.comb += self.table_lines.eq(
            ((Mux(self.sparse, stripes << 1, stripes) + LINE_ENTRIES - 1) >> ceil_log2(LINE_ENTRIES))
            + Mux(self.ranked, mean_lines(config), 0)
        )
        m.d.sync += [
            self.stripe_tokens.eq(config.tokens_per_page << self.stripe_bits),
            self.lane_limit.eq(lane_stripes >> self.stripe_bits),
            length.eq(fields["end_token"] - fields["base_token"]),
            # Stripes: stripes * 2**bits pages hold the tokens, one stripe less would not.
            last_page.eq((length[:TOKEN_BITS] - 1)[:TOKEN_BITS] >> self.stripe_bits),
            end_page.eq(times(stripes[: bits_for(most_stripes)], config.tokens_per_page)),
            bad_rows.eq(~self.is_read & ((fields["rows"] == 0) | (fields["rows"] > config.rows))),
            bad_count.eq(stripes > (most_stripes >> self.stripe_bits)),
            too_much.eq(self.is_read & (length > READ_BYTES // token_bytes)),
            bad_length.eq(
                length[TOKEN_BITS]
                | ~length.any()
                | (last_page >= end_page)
                | (last_page + config.tokens_per_page < end_page)
            ),
            bad_scale.eq(~self.is_read & (scale[-1] | ~scale_exponent.any() | scale_exponent.all())),
            self.k_offset.eq(scale_exponent + config.element.encoding.score_offset),
        ]
        legal = Cat(stripe_pages == pages for pages in legal_pages).any()
        return length, bad_rows, bad_count | bad_length | too_much, bad_scale, legal

    def _check_mode(self, m: Module, fields: dict[str, Value], length: Signal) -> tuple[Value, Value, Value]:
        """The mode: (a field that is bad, a selection that is bad, where); constants where only DENSE is built."""
        if not self._config.sparse:
            return Const(0, 1), Const(0, 1), Const(0, 1)
        m.submodules.mode_check = check = ModeCheck(self._config)
        m.d.comb += [check.length.eq(length), self.sparse.eq(check.sparse), self.ranked.eq(check.ranked)]
        for name in ("mode", "stripe_pages", *SPARSE_FIELDS):
            m.d.comb += getattr(check, name).eq(fields[name])
        return check.bad_field, check.bad, check.where

    def _check_flash(self, m: Module, fields: dict[str, Value]) -> tuple[Signal, Signal, Value, Value]:
        """A flash command: (bad place, domain that is not the queue's, owner does not matter, bad field)."""
        config = self._config
        flash = command_fields(config, FLASH_COMMAND, self.command)
        opcode, page, argument, domain = fields["opcode"], flash["page"], flash["argument"], flash["domain"]
        bad_place, not_domain = Signal(), Signal()
        places = [
            flash["channel"] >= config.channels,
            page >> config.zone_page_bits >= config.part.blocks,
            (opcode == Opcode.MAP) & (argument >= config.part.blocks),
        ]
        if config.part.pages < 1 << config.block_page_bits:
            block_page = page[config.plane_bits + config.die_bits :][: config.block_page_bits]
            places.append(block_page >= config.part.pages)
        erase, probe, map_block = (opcode == code for code in (Opcode.ERASE, Opcode.PROBE, Opcode.MAP))
        anybody = probe | map_block | (erase & (self.queue == 0))
        m.d.sync += [
            not_domain.eq(~self.domain_queues.bit_select(self.queue, 1) | fields["domain"][DOMAIN_BITS:].any()),
            bad_place.eq(Cat(places).any()),
        ]
        return bad_place, not_domain, anybody, ((erase | probe) & argument.any()) | (anybody & domain.any())

    def _check_addresses(self, m: Module, fields: dict[str, Value], is_data: Signal, length: Signal) -> Value:
        """Gives the halves of the addresses to the window, which says of each block that it is bad."""
        config = self._config
        rows = fields["rows"][: bits_for(config.rows)]
        token_bytes = read_token_bytes(config.head_dim, config.kv_element_bytes)
        sizes = {name: Signal(SIZE_BITS, name=f"{name}_size") for name in BLOCKS}
        m.d.sync += [
            sizes["query"].eq(Mux(
                is_data,    # whose result is at the same place
                Mux(fields["opcode"] == Opcode.IDENTIFY, IDENTIFY_BYTES, lines(8 * len(COUNTERS)) * LINE_BYTES),
                rows * query_row_bytes(config.head_dim))),
            # Too many tokens are found before.
            sizes["result"].eq(Mux(
                self.is_read, times(length[: bits_for(READ_BYTES // token_bytes)], token_bytes),
                rows * result_row_bytes(config.head_dim))),
            sizes["table"].eq(self.table_lines << ceil_log2(LINE_BYTES)),
        ]
        step = Signal(4)
        bounds = self._windows(m, step[0])
        m.submodules.window = window = Window(len(BLOCKS))
        with m.If(self.clear):
            m.d.sync += step.eq(0)
        with m.If(self.checking):
            m.d.sync += step.eq(step + 1)
        block = step[1:][: len(window.which)]
        m.d.comb += [
            self.judged.eq(self.checking & (step == Mux(self.is_flash, FLASH_JUDGE, JUDGE))),
            self.bad_block.eq(window.bad[BLOCKS.index("query")]),
            window.clear.eq(self.clear),
            window.valid.eq(self.checking & (step < ADDRESS_STEPS)),
            window.high.eq(step[0]),
            window.which.eq(block),
            window.base.eq(bounds["base"]),
            window.limit.eq(bounds["limit"]),
        ]
        with m.Switch(block):
            for number, name in enumerate(BLOCKS):
                with m.Case(number):
                    m.d.comb += [
                        window.size.eq(sizes[name]), window.address.eq(fields[name].word_select(step[0], HALF))]
        # A READ has no query.
        return window.bad & ~Cat(self.is_read, Const(0, len(BLOCKS) - 1))

    def _windows(self, m: Module, high: Value) -> dict[str, Value]:
        """Keeps the queues' windows: this half of each bound of the window of the command's queue."""
        # Halves are written one after the other, as they are read.
        second, queue = Signal(), Signal.like(self.create_queue)
        now = Signal.like(queue)
        m.d.sync += [second.eq(self.create_valid), queue.eq(self.create_queue)]
        m.d.comb += now.eq(Mux(second, queue, self.create_queue))
        bounds: dict[str, Value] = {}
        for name, admin in (("base", self.admin_base), ("limit", self.admin_limit)):
            m.submodules[f"{name}s"] = halves = Memory(
                shape=HALF, depth=2 * QUEUES, init=[], attrs={"ram_style": "distributed"})
            write, read = halves.write_port(), halves.read_port(domain="comb")
            created = self.create_window[name]
            m.d.comb += [
                write.en.eq(self.create_valid | second),
                write.addr.eq(Cat(second, now)),
                write.data.eq(pick(
                    [created[:HALF], created[HALF:], admin[:HALF], admin[HALF:]], Cat(second, now == 0))),
                read.addr.eq(Cat(high, self.queue)),
            ]
            bounds[name] = read.data
        return bounds
