"""Requests commands and their blocks from host memory, and keeps the command in hand."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.spec.commands import (
    COMMAND,
    DATA_COMMAND,
    FLASH_COMMAND,
    GRANT_COMMAND,
    LINE_BYTES,
    QUEUE_COMMAND,
    READ_COMMAND,
    TABLE_ENTRY,
    Field,
    Record,
    fp32_block_bytes,
    query_row_bytes,
)
from kvattic.spec.config import Config
from kvattic.spec.registers import QUEUES
from kvattic_hdl.frontend.checks import SPARSE_FIELDS
from kvattic_hdl.lib.axi import AXI_READ, LINE_ADDRESS_BITS, LINE_WORD, LINE_WORDS, ReadLines
from kvattic_hdl.lib.records import WORD_BYTES, field_of_word, word_of
from kvattic_hdl.nvme.queues import FETCH

OUTSTANDING = 16
"""Lines that are asked for and have not come, at most: covers a latency of about 128 cycles."""
LAYOUTS = (FLASH_COMMAND, DATA_COMMAND, QUEUE_COMMAND, GRANT_COMMAND, READ_COMMAND, COMMAND)
"""What a command's line may be."""
CREATE_FIELDS = ("entries", "submission", "completion", "base", "limit")
"""Fields of a `QUEUE_COMMAND` that DELETE_QUEUE has no use for."""
UNKNOWN_IDENTIFIER = 0xFFFF
"""In the completion of a command that could not be read."""
LINE_ENTRIES = LINE_BYTES // TABLE_ENTRY.size


def all_stripes(config: Config) -> int:
    """Stripes of a job, at most."""
    return config.lanes * (config.ring_codewords // config.codewords_per_page)


def row_lines(config: Config) -> int:
    """Lines of a row of the query block."""
    return query_row_bytes(config.head_dim) // LINE_BYTES


def mean_lines(config: Config) -> int:
    """Lines of the mean of V, before the table."""
    return fp32_block_bytes(config.head_dim) // LINE_BYTES if config.sparse else 0


def table_line_bits(config: Config) -> int:
    """Bits of a number of lines of mean and table."""
    words = all_stripes(config) * (2 if config.sparse else 1)
    return bits_for(mean_lines(config) - (-words // LINE_ENTRIES))


def is_reserved(config: Config, field: Field) -> bool:
    """Whether a command's field must be zero."""
    not_built = () if config.sparse else ("mode", *SPARSE_FIELDS)
    return field.name == "flags" or field.name.startswith("reserved") or field.name in not_built


def command_fields(config: Config, record: Record, line: Value) -> dict[str, Value]:
    """Fields of a command's line that may be other than zero."""
    return {f.name: line[f.offset * 8 :][: f.size * 8] for f in record.fields if not is_reserved(config, f)}


class Fetch(wiring.Component):
    """Requests the blocks of the command in hand, then the next command, and keeps that one's line.

    Latency: one cycle from a request to ARVALID; none from R to `words`.  Throughput: one word a cycle.  Ordering: the
    query block, mean and table, the next command.  Reset: the first command is wanted.  Reads under way must have
    ended before: raise `stop` until `quiet`.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    bus : Out(AXI_READ)
        Host memory.
    stop : In(1)
        Start no read, drop what comes.
    quiet : Out(1)
        No read is under way.
    bus_error : Out(1)
        Strobe: a word was not answered with OKAY.
    fetch : In(stream of FETCH)
        Line of the next command, and its queue; taken when the line has come.
    want : In(1)
        Strobe: the next command may be requested.
    wanting : Out(1)
        It is not requested yet.
    asked : Out(1)
        Strobe: it is requested.
    ask : In(1)
        Strobe: request these blocks.
    query_line, query_lines, table_line, table_lines : In
        Their first lines, and their lines; `table_line` stays until all are requested.
    in_command : In(1)
        Words that come are the command's.
    fetched : Out(1)
        Strobe: its last word has come.
    words : Out(stream of LINE_WORD)
        The words of the blocks; take none while `in_command`.
    command : Out(512)
        The command's line; stable from the cycle after `fetched`.
    reserved : Out(len(LAYOUTS))
        For each of `LAYOUTS`: a byte that it reserves was not zero.
    needless : Out(1)
        What only CREATE_QUEUE has a use for among the fields of a `commands.QUEUE_COMMAND` was not zero.
    queue : Out(3)
        The command's queue.
    broken : Out(1)
        A word of the command or its blocks was not answered with OKAY.
    unreadable : In(1)
        Strobe: give the command the identifier of one that could not be read.
    clear : In(1)
        Strobe: forget `reserved`, `needless` and `broken`.
    """

    bus: wiring.PureInterface
    stop: Signal
    quiet: Signal
    bus_error: Signal
    fetch: stream.Interface
    want: Signal
    wanting: Signal
    asked: Signal
    ask: Signal
    query_line: Signal
    query_lines: Signal
    table_line: Signal
    table_lines: Signal
    in_command: Signal
    fetched: Signal
    words: stream.Interface
    command: Signal
    reserved: Signal
    needless: Signal
    queue: Signal
    broken: Signal
    unreadable: Signal
    clear: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        super().__init__({
            "bus": Out(AXI_READ),
            "stop": In(1),
            "quiet": Out(1, init=1),
            "bus_error": Out(1),
            "fetch": In(stream.Signature(FETCH)),
            "want": In(1),
            "wanting": Out(1, init=1),
            "asked": Out(1),
            "ask": In(1),
            "query_line": In(LINE_ADDRESS_BITS),
            "query_lines": In(range(config.rows * row_lines(config) + 1)),
            "table_line": In(LINE_ADDRESS_BITS),
            "table_lines": In(table_line_bits(config)),
            "in_command": In(1),
            "fetched": Out(1),
            "words": Out(stream.Signature(LINE_WORD)),
            "command": Out(unsigned(LINE_BYTES * 8)),
            "reserved": Out(len(LAYOUTS)),
            "needless": Out(1),
            "queue": Out(range(QUEUES)),
            "broken": Out(1),
            "unreadable": In(1),
            "clear": In(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.read = read = ReadLines(OUTSTANDING)
        connect(m, read.bus, flipped(self.bus))
        self._request(m, read)
        taken = read.words.valid & read.words.ready
        m.d.comb += [
            read.stop.eq(self.stop),
            self.quiet.eq(read.quiet),
            read.words.ready.eq(self.in_command | self.words.ready),
            self.words.valid.eq(read.words.valid),
            self.words.payload.eq(read.words.payload),
            self.bus_error.eq(taken & read.words.payload.error),
        ]
        with m.If(taken):
            m.d.sync += self.broken.eq(self.broken | read.words.payload.error)
        with m.If(self.clear):
            m.d.sync += self.broken.eq(0)
        self._keep(m, read.words.payload, taken & self.in_command)
        return m

    def _request(self, m: Module, read: ReadLines) -> None:
        """Requests: the query block's lines, those of the mean and the table behind it, then the next command's."""
        line = Signal(LINE_ADDRESS_BITS)
        query_left, table_left = Signal.like(self.query_lines), Signal.like(self.table_lines)
        query_wanted, table_wanted = Signal(), Signal()      # what is left is not 0
        wanted, to_table = Signal(), Signal()
        m.d.comb += [
            wanted.eq(query_wanted | table_wanted),
            read.lines.valid.eq(wanted | (self.wanting & self.fetch.valid)),
            read.lines.payload.eq(Mux(wanted, line, self.fetch.payload.line)),
            self.asked.eq(read.lines.valid & read.lines.ready & ~wanted),
            # The table's first line comes from the command, which stays until all its blocks have come.
            to_table.eq(Mux(self.ask, self.query_lines == 0, query_left == 1)),
        ]
        with m.If(wanted & read.lines.ready):
            m.d.sync += line.eq(Mux(to_table, self.table_line, line + 1))
            with m.If(query_wanted):
                m.d.sync += [query_left.eq(query_left - 1), query_wanted.eq(query_left != 1)]
            with m.Else():
                m.d.sync += [table_left.eq(table_left - 1), table_wanted.eq(table_left != 1)]
        with m.If(self.asked):
            m.d.sync += self.wanting.eq(0)
        with m.If(self.want):
            m.d.sync += self.wanting.eq(1)
        with m.If(self.ask):
            m.d.sync += [
                line.eq(Mux(to_table, self.table_line, self.query_line)),
                query_left.eq(self.query_lines),
                query_wanted.eq(self.query_lines != 0),
                table_left.eq(self.table_lines),
                table_wanted.eq(self.table_lines != 0),
            ]

    def _keep(self, m: Module, word: Value, taken: Value) -> None:
        """Keeps the words of a command, and whether what it reserves is zero."""
        position = Signal(range(LINE_WORDS))
        with m.If(self.clear):
            m.d.sync += [self.reserved.eq(0), self.needless.eq(0)]
        with m.If(self.unreadable):
            m.d.sync += command_fields(self._config, COMMAND, self.command)["identifier"].eq(UNKNOWN_IDENTIFIER)
        with m.If(taken):
            m.d.sync += position.eq(position + 1)
            with m.Switch(position):
                for number in range(LINE_WORDS):
                    with m.Case(number):
                        m.d.sync += self.command.word_select(number, WORD_BYTES * 8).eq(word.data)
                        for layout, flag in zip(LAYOUTS, self.reserved, strict=True):
                            spare = [
                                field_of_word(word.data, f).any()
                                for f in layout.fields
                                if is_reserved(self._config, f) and word_of(f) == number
                            ]
                            if spare:
                                m.d.sync += flag.eq(flag | Cat(spare).any())
                        create = [field_of_word(word.data, QUEUE_COMMAND[name]).any() for name in CREATE_FIELDS
                                  if word_of(QUEUE_COMMAND[name]) == number]
                        if create:
                            m.d.sync += self.needless.eq(self.needless | Cat(create).any())
            with m.If(word.last):
                # Only now its entry is free for the host.
                m.d.comb += [self.fetch.ready.eq(1), self.fetched.eq(1)]
                m.d.sync += [position.eq(0), self.queue.eq(self.fetch.payload.queue)]
