"""Fetches commands and queries, checks them, and loads and starts the lanes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.commands import (
    COMMAND,
    LINE_BYTES,
    ROW,
    Field,
    Opcode,
    Status,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.config import ELEMENT_BYTES, Config
from kvattic.formats import SCORE_WINDOW_FRACTION

from .axi import AXI_READ, LINE_ADDRESS_BITS, LINE_WORDS, ReadLines
from .interfaces import EPOCH_BITS, K_OFFSET_BITS, TOKEN_BITS, Shapes
from .records import WORD_BYTES, field_of_word, word_of

HALF = 32
"""Bits of an address that are added or compared in one cycle."""
WORD_ELEMENTS = WORD_BYTES // ELEMENT_BYTES
FP32_FRACTION, FP32_EXPONENT, FP32_BIAS = 23, 8, 127


def _reserved(field: Field) -> bool:
    return field.name == "flags" or field.name.startswith("reserved")


class _Window(wiring.Component):
    """Whether an address is aligned and [address, address + size) inside of [base, limit).

    Addresses go through in halves, the low one first: three registered steps of 32 bits.

    Members
    -------
    valid, high, which : In(1)
        A half is given; it is the high one; it belongs to address 0 or 1.
    address, base, limit : In(32)
        The half.
    size : In(16)
        Bytes; only for the low half.
    clear : In(1)
        Forget both results.
    bad : Out(2)
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
                "which": In(1),
                "address": In(HALF),
                "base": In(HALF),
                "limit": In(HALF),
                "size": In(16),
                "clear": In(1),
                "bad": Out(2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        flags = data.StructLayout({"valid": 1, "high": 1, "which": 1})
        flags1, flags2 = Signal(flags), Signal(flags)
        address, base, limit1, limit2 = (
            Signal(HALF, name=n) for n in ("address1", "base1", "limit1", "limit2")
        )
        size = Signal(16)
        total = Signal(HALF)
        carry, below, over = Signal(), Signal(), Signal()
        unaligned = Signal(2)
        bad = Signal(2)
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


class Loader(wiring.Component):
    """Fetches and checks a batch's commands, loads q and rows into the lanes, starts the jobs.

    Latency: for a job of one row about the memory's latency + 15 cycles of checking + a cycle for
    each word of its query block.  The next command is requested right behind the query block, so
    its fetch costs its eight words only.
    Throughput: one word a cycle while a block arrives; one job at a time.
    Ordering: jobs leave in the order of the commands; a job's `start` comes one cycle or more after
    the last `load`, its record on `jobs` one cycle or more after its `start`.
    Reset: no batch; the epoch goes on, so that codewords of jobs before the reset are recognised as
    stale.  Reads under way must have ended before: raise `stop` until `quiet`.

    A command that fails its checks becomes a job without lanes; so does one whose query block has a
    NaN or an infinity, or met a bus error.  The first that applies is reported: BUS_ERROR of the
    command line, INVALID_OPCODE, INVALID_FIELD, INVALID_ROWS, INVALID_LENGTH, INVALID_ADDRESS
    (query before result), INVALID_SCALE, BUS_ERROR of the query block, NAN_QUERY.  `where` is zero
    for those that commands.Status gives none.

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
        Query and result blocks must be inside of this window.
    load_valid, load : Out(1), Out(Shapes.load)
        Written to all lanes.
    start_valid, start : Out(1), Out(Shapes.start)
        Given to all lanes when everything is loaded.
    jobs : Out(stream of Shapes.job)
        The jobs.
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
                "freed": In(1),
                "bus_error": Out(1),
                "stop": In(1),
                "quiet": Out(1, init=1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self._config, self._shapes
        m.submodules.read = read = ReadLines()
        m.submodules.window = window = _Window()
        m.submodules.check = check = _QueryCheck(config)
        connect(m, read.bus, flipped(self.bus))
        word = read.words.payload
        taken = Signal()
        m.d.comb += [
            taken.eq(read.words.valid & read.words.ready),
            self.bus_error.eq(taken & word.error),
            read.stop.eq(self.stop),
            self.quiet.eq(read.quiet),
        ]

        command = {
            f.name: Signal(f.size * 8, name=f"command_{f.name}")
            for f in COMMAND.fields
            if not _reserved(f)
        }
        broken = Signal()  # an error answer in this command's line or query block
        reserved = Signal()  # a reserved byte was not zero
        status = Signal(16)
        where = Signal(32)

        # Requests: the query block's lines, then the next command's.
        command_line = Signal(LINE_ADDRESS_BITS)
        commands_left = Signal(16)
        want_command = Signal()
        query_line = Signal(LINE_ADDRESS_BITS)
        row_lines = query_row_bytes(config.head_dim) // LINE_BYTES
        query_left = Signal(range(config.rows * row_lines + 1))
        query_wanted = Signal()
        m.d.comb += [
            query_wanted.eq(query_left.any()),
            read.lines.valid.eq(query_wanted | want_command),
            read.lines.payload.eq(Mux(query_wanted, query_line, command_line)),
        ]
        with m.If(read.lines.ready & read.lines.valid):
            with m.If(query_wanted):
                m.d.sync += [query_line.eq(query_line + 1), query_left.eq(query_left - 1)]
            with m.Else():
                m.d.sync += [command_line.eq(command_line + 1), want_command.eq(0)]
        with m.If(self.batch_start):
            m.d.sync += [
                command_line.eq(self.command_base[-LINE_ADDRESS_BITS:]),
                commands_left.eq(self.count - 1),
                want_command.eq(1),
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
        result_size, query_size = Signal(16), Signal(16)
        length = Signal(HALF + 1)
        bad_opcode, bad_field, bad_rows, bad_length, bad_scale, far_end, unaligned = (
            Signal(name=name)
            for name in (
                "bad_opcode",
                "bad_field",
                "bad_rows",
                "bad_length",
                "bad_scale",
                "far_end",
                "unaligned",
            )
        )
        scale = command["scale"]
        scale_exponent = scale[FP32_FRACTION:][:FP32_EXPONENT]
        rows = command["rows"][: bits_for(config.rows)]
        k_offset = Signal(signed(K_OFFSET_BITS))
        home_bad: Value = Const(0)
        if config.channels < 1 << len(command["home"]):
            home_bad = command["home"] >= config.channels
        stripe = config.tokens_per_page
        m.d.sync += [
            query_size.eq(rows * query_row_bytes(config.head_dim)),
            result_size.eq(rows * result_row_bytes(config.head_dim)),
            length.eq(command["end_token"] - command["base_token"]),
            far_end.eq(command["end_token"][TOKEN_BITS:].any()),
            # What is no power of two would take a division; the host's library looks after those.
            unaligned.eq(
                command["base_token"][: stripe.bit_length() - 1].any()
                if stripe & (stripe - 1) == 0
                else 0
            ),
            bad_opcode.eq(command["opcode"] != Opcode.ATTEND),
            bad_field.eq(reserved | home_bad),
            bad_rows.eq((command["rows"] == 0) | (command["rows"] > config.rows)),
            bad_length.eq(
                length[HALF]
                | ~length.any()
                | (length[:HALF] > config.max_tokens)
                | far_end
                | unaligned
            ),
            bad_scale.eq(scale[-1] | ~scale_exponent.any() | scale_exponent.all()),
            k_offset.eq(
                scale_exponent
                - FP32_BIAS
                + SCORE_WINDOW_FRACTION
                - 2 * config.element.encoding.offset
            ),
        ]
        step = Signal(3)
        judge = 6  # halves of addresses: steps 0 to 3; the window's three cycles
        half = Signal(2)
        m.d.comb += [
            half.eq(step),
            window.high.eq(half[0]),
            window.which.eq(half[1]),
            window.size.eq(Mux(window.which, result_size, query_size)),
            window.base.eq(self.buffer_base.word_select(half[0], HALF)),
            window.limit.eq(self.buffer_limit.word_select(half[0], HALF)),
            window.address.eq(
                Mux(window.which, command["result"], command["query"]).word_select(half[0], HALF)
            ),
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

        load = self.load
        m.d.sync += [
            self.load_valid.eq(0),
            load.query.eq(0),
            load.record.eq(0),
            load.slot.eq(slot),
            load.row.eq(row),
        ]
        tree_token = command["tree_token"]
        m.d.comb += [
            self.start.slot.eq(slot),
            self.start.epoch.eq(epoch),
            self.start.home.eq(command["home"]),
            self.start.key_page.eq(command["key_page"]),
            self.start.value_page.eq(command["value_page"]),
            self.start.base_token.eq(command["base_token"]),
            self.start.end_token.eq(command["end_token"]),
            self.start.tree_token.eq(Mux(tree_token[TOKEN_BITS:].any(), top, tree_token)),
            self.start.k_offset.eq(k_offset),
            self.start.scale.eq(Cat(scale[:FP32_FRACTION], 1)),
            self.jobs.payload.slot.eq(slot),
            self.jobs.payload.lanes.eq(status == Status.OK),
            self.jobs.payload.identifier.eq(command["identifier"]),
            self.jobs.payload.rows.eq(rows),
            self.jobs.payload.result.eq(command["result"]),
            self.jobs.payload.status.eq(status),
            self.jobs.payload.where.eq(where),
        ]

        def fetch_next() -> None:
            with m.If(commands_left.any()):
                m.d.sync += [want_command.eq(1), commands_left.eq(commands_left - 1)]

        with m.FSM(name="state"):
            with m.State("command"):
                m.d.comb += [read.words.ready.eq(1), window.clear.eq(1), check.clear.eq(1)]
                m.d.sync += step.eq(0)
                with m.If(taken):
                    m.d.sync += [position.eq(position + 1), broken.eq(broken | word.error)]
                    with m.Switch(position):
                        for number in range(LINE_WORDS):
                            here = [f for f in COMMAND.fields if word_of(f) == number]
                            spare = [
                                field_of_word(word.data, f).any() for f in here if _reserved(f)
                            ]
                            with m.Case(number):
                                m.d.sync += [
                                    command[f.name].eq(field_of_word(word.data, f))
                                    for f in here
                                    if not _reserved(f)
                                ]
                                if spare:
                                    m.d.sync += reserved.eq(reserved | Cat(spare).any())
                    with m.If(word.last):
                        m.d.sync += position.eq(0)
                        m.next = "check"
            with m.State("check"):
                m.d.comb += window.valid.eq(step <= 3)
                m.d.sync += [
                    step.eq(step + 1),
                    row.eq(rows),
                    beat.eq(0),
                    load.data.eq(0),
                    load.start.eq(0),
                    load.end.eq(0),
                ]
                with m.If(step == judge):
                    fetch_next()
                    m.next = "report"
                    with m.If(slot == 0):
                        # Once for each turn round the slots, at its beginning: it also tells jobs
                        # after a reset from before.
                        m.d.sync += epoch.eq(epoch + 1)
                    with m.If(broken):
                        m.d.sync += [status.eq(Status.BUS_ERROR), where.eq(0)]
                    with m.Elif(bad_opcode):
                        m.d.sync += [status.eq(Status.INVALID_OPCODE), where.eq(command["opcode"])]
                    with m.Elif(bad_field):
                        m.d.sync += [status.eq(Status.INVALID_FIELD), where.eq(0)]
                    with m.Elif(bad_rows):
                        m.d.sync += [status.eq(Status.INVALID_ROWS), where.eq(command["rows"])]
                    with m.Elif(bad_length):
                        m.d.sync += [status.eq(Status.INVALID_LENGTH), where.eq(0)]
                    with m.Elif(window.bad.any()):
                        m.d.sync += [status.eq(Status.INVALID_ADDRESS), where.eq(~window.bad[0])]
                    with m.Elif(bad_scale):
                        m.d.sync += [status.eq(Status.INVALID_SCALE), where.eq(0)]
                    with m.Else():
                        m.d.sync += [
                            status.eq(Status.OK),
                            where.eq(0),
                            query_line.eq(command["query"][-LINE_ADDRESS_BITS:]),
                            query_left.eq(rows * row_lines),
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
                            m.next = "settle"
            with m.State("settle"):
                # The check's second cycle.
                m.next = "decide"
            with m.State("decide"):
                m.next = "report"
                with m.If(broken):
                    m.d.sync += status.eq(Status.BUS_ERROR)
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
                    m.d.sync += [
                        slot.eq(Mux(slot == config.jobs_in_flight - 1, 0, slot + 1)),
                        broken.eq(0),
                        reserved.eq(0),
                        position.eq(0),
                    ]
                    m.next = "command"
        return m
