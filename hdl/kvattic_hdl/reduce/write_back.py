"""Writes results and completions to host memory."""

from dataclasses import dataclass, field

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import COMPLETION, LINE_BYTES, STATUS_BITS, STATUS_TYPE, TRAILER, Status
from kvattic.spec.config import Config
from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.lib.axi import AXI_WRITE, DATA_BITS, LINE_ADDRESS_BITS, LINE_WORDS
from kvattic_hdl.lib.axi_write import WRITE_WORD, WriteLines
from kvattic_hdl.lib.records import assemble
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.lib.stream_buffer import StreamBuffer
from kvattic_hdl.nvme.counters import SNAPSHOT
from kvattic_hdl.nvme.stamps import STAMPS
from kvattic_hdl.reduce.drain import quotient_layout
from kvattic_hdl.reduce.gather import trailer_layout

BLOCK_BITS = 8
"""Of the number of a word of a block."""
BLOCK_LATENCY = 3
"""Cycles from the index of a word of a block to the word."""
PLACE_BITS = ceil_log2(LINE_WORDS)
"""Of the number of a word of a line."""
ENTRY = data.StructLayout({
    "queue": range(QUEUES),
    "status": STATUS_BITS,
    "where": 32,
    "flags": COMPLETION["flags"].size * 8,
    "identifier": 16,
    "stamps": STAMPS,
})
"""What a completion says of its command."""


def _words(line: Value) -> data.View:
    """A line as the words of the bus."""
    return data.View(data.ArrayLayout(DATA_BITS, LINE_WORDS), line)


@dataclass
class _Sending:
    """What is being sent: one of these is high while words of it are wanted."""

    rows: Signal = field(default_factory=lambda: Signal(name="sending_rows"))
    entry: Signal = field(default_factory=lambda: Signal(name="sending_entry"))
    block: Signal = field(default_factory=lambda: Signal(name="sending_block"))
    copy: Signal = field(default_factory=lambda: Signal(name="sending_copy"))

    def any(self) -> Value:
        """One of them is."""
        return self.rows | self.entry | self.block | self.copy


class WriteBack(wiring.Component):
    """Keeps the results of two jobs; writes a job's rows, or a command's block, and then its completion.

    While it has nothing of its own to write, it writes the lines of READs, before anything else is begun.

    Latency: a line's first word appears on the bus three cycles after the command is taken.  Throughput: a word a
    cycle, of a block a word every second one; one command at a time.  Ordering: a job goes before an outcome; a
    completion is written once the responses of all that belongs to it have come.  Reset drops what is under way; raise
    `stop` and wait for `quiet` before it.

    Parameters
    ----------
    config : Config
        The configuration.
    outstanding : int
        Lines that may await their response on the bus.

    Members
    -------
    result : In(stream.Signature(quotient_layout, always_ready=True))
        Results, kept in `half`.
    half : In(1)
        Half of the buffer: that of the job whose results come, and that of the job handed over.
    copies : In(stream.Signature(WRITE_WORD))
        Lines of READs; once one is offered, all of its words come without a pause.
    copies_slot : In(Shapes.slot)
        The slot of their job, which stays its own until it is handed over.
    idle : Out(1)
        A job may be handed over; no line of a READ is offered.
    hand_over : In(1)
        Strobe, while `idle`: write the results and the completion of `job`, or that alone if its entry's status is not
        OK, the job is without lanes, or it is a READ.
    job : In(Shapes.job)
        The job.
    entry : In(ENTRY)
        What its completion says.
    outcomes : In(stream.Signature(Shapes.ended))
        Flash and admin commands that have ended.
    block_index, block_data : Out(8), In(64)
        Words of the block of the outcome taken last, three cycles after their index.
    trailer_address, trailer : Out, In(trailer_layout)
        Cat(row, half), and that row's trailer one cycle later.
    post_queue : Out(3)
        Queue whose completion comes next.
    post_line, post_phase, post_head : In(58), In(1), In(12)
        Line and phase of its next entry, and the queue's fetch head, two cycles later.
    post : Out(1)
        Strobe: the entry is used.
    snapshot : In(SNAPSHOT)
        Counters in this cycle, for the completion.
    completed : Out(1)
        Strobe: a completion of `post_queue` is written and its response has come.
    write_error : Out(1)
        Strobe: a write was answered with an error.
    stop : In(1)
        While high no write is begun, and outcomes are taken and forgotten; a reset follows.
    quiet : Out(1)
        No write is under way.
    axi : Out(AXI_WRITE)
        The bus.
    """

    result: stream.Interface
    half: Signal
    copies: stream.Interface
    copies_slot: Signal
    idle: Signal
    hand_over: Signal
    job: data.View
    entry: data.View
    outcomes: stream.Interface
    block_index: Signal
    block_data: Signal
    trailer_address: Signal
    trailer: data.View
    post_queue: Signal
    post_line: Signal
    post_phase: Signal
    post_head: Signal
    post: Signal
    snapshot: data.View
    completed: Signal
    write_error: Signal
    stop: Signal
    quiet: Signal
    axi: wiring.PureInterface

    def __init__(self, config: Config, outstanding: int = 8) -> None:
        self._config = config
        self._outstanding = outstanding
        self._shapes = shapes = Shapes(config)
        # Positions in the buffer: half, row, feature; each has its own bits, so that no address is multiplied.
        self._row_bits, self._pair_bits = ceil_log2(config.rows), ceil_log2(config.head_dim // 2)
        super().__init__({
            "result": In(stream.Signature(quotient_layout(config), always_ready=True)),
            "half": In(1),
            "copies": In(stream.Signature(WRITE_WORD)),
            "copies_slot": In(shapes.slot),
            "idle": Out(1),
            "hand_over": In(1),
            "job": In(shapes.job),
            "entry": In(ENTRY),
            "outcomes": In(stream.Signature(shapes.ended)),
            "block_index": Out(BLOCK_BITS),
            "block_data": In(DATA_BITS),
            "trailer_address": Out(self._row_bits + 1),
            "trailer": In(trailer_layout(config)),
            "post_queue": Out(range(QUEUES)),
            "post_line": In(LINE_ADDRESS_BITS),
            "post_phase": In(1),
            "post_head": In(range(MAX_ENTRIES)),
            "post": Out(1),
            "snapshot": In(SNAPSHOT),
            "completed": Out(1),
            "write_error": Out(1),
            "stop": In(1),
            "quiet": Out(1),
            "axi": Out(AXI_WRITE),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        row_words = self._config.head_dim // 2 + LINE_WORDS  # results, then the trailer
        entry = Signal(ENTRY, reset_less=True)
        composed = Signal(data.StructLayout({"counters": SNAPSHOT, "phase": 1, "head": range(MAX_ENTRIES)}),
                          reset_less=True)
        half = Signal(reset_less=True)
        last_row = Signal(self._shapes.row, reset_less=True)
        row = Signal(self._shapes.row)
        word = Signal(range(row_words))
        address = Signal(64, reset_less=True)
        sending = _Sending()
        block_there = Signal(BLOCK_LATENCY)  # all: block_data is that of block_index
        block_last = Signal(BLOCK_BITS, reset_less=True)
        error = Signal()
        slot, lost = Signal(self._shapes.slot, reset_less=True), Signal(self._config.jobs_in_flight)
        copied = Signal()   # `lost` counts: the job is a READ

        results = self._buffer(m, Cat(word[: self._pair_bits], row[: self._row_bits], half))
        step, asked, written = self._send(m, sending, word, address, results, self._completion(entry, composed))
        m.d.comb += [
            self.trailer_address.eq(Cat(row[: self._row_bits], half)),
            self.post_queue.eq(entry.queue),
            # Before a reset nothing is written, but flash commands that have begun must come to their end.
            self.outcomes.ready.eq(self.stop),
        ]
        self._note_errors(m, asked, sending.copy, error, lost)
        with m.FSM(name="write"):
            with m.State("IDLE"):
                # Jobs first: they come once in a while only.
                m.d.comb += [
                    sending.copy.eq(self.copies.valid),
                    self.copies.ready.eq(step),
                    self.idle.eq(~self.copies.valid),
                    self.outcomes.ready.eq((self.idle & ~self.hand_over) | self.stop),
                ]
                m.d.sync += [
                    entry.eq(self.entry),
                    address.eq(self.job.result),
                    half.eq(self.half),
                    last_row.eq(self.job.rows - 1),
                    slot.eq(self.job.slot),
                    copied.eq(self.job.read & self.hand_over),
                    row.eq(0),
                    word.eq(0),
                    self.block_index.eq(0),
                    block_there.eq(0),
                    block_last.eq((self.outcomes.payload.lines << PLACE_BITS) - 1),
                    error.eq(0),
                ]
                with m.If(self.hand_over):
                    with m.If(self.job.lanes & ~self.job.read & (self.entry.status == Status.OK)):
                        m.next = "ROWS"
                    with m.Else():
                        m.next = "PLACE"
                with m.Elif(self.outcomes.valid & self.idle):
                    ended = self.outcomes.payload
                    m.d.sync += [
                        *(entry[name].eq(ended[name]) for name in ("queue", "identifier", "status", "where")),
                        entry.flags.eq(0),
                        entry.stamps.eq(0),
                        address.eq(ended.result),
                    ]
                    m.next = "PLACE"
                    with m.If(ended.lines.any()):
                        m.next = "BLOCK"
            with m.State("BLOCK"):
                # A word every fourth cycle: it is read in between.
                m.d.comb += sending.block.eq(block_there.all())
                m.d.sync += block_there.eq(Cat(Const(1, 1), block_there))
                with m.If(step & block_there.all()):
                    m.d.sync += [self.block_index.eq(self.block_index + 1), block_there.eq(0)]
                    with m.If(self.block_index == block_last):
                        m.d.sync += word.eq(0)
                        m.next = "SETTLE"
            with m.State("ROWS"):
                m.d.comb += sending.rows.eq(1)
                with m.If(step & (word == row_words - 1)):
                    m.d.sync += [word.eq(0), row.eq(row + 1)]
                    with m.If(row == last_row):
                        m.next = "SETTLE"
            with m.State("SETTLE"):
                with m.If(written):
                    m.next = "COMPOSE"
            with m.State("PLACE"):
                # post_queue has just changed: its entry is known in two cycles.
                m.next = "SETTLE"
            with m.State("COMPOSE"):
                m.d.comb += self.post.eq(1)
                m.d.sync += [
                    composed.counters.eq(self.snapshot),
                    composed.phase.eq(self.post_phase),
                    composed.head.eq(self.post_head),
                    address.eq(Cat(Const(0, ceil_log2(LINE_BYTES)), self.post_line)),
                ]
                with m.If(copied):
                    m.d.sync += lost.bit_select(slot, 1).eq(0)
                with m.If(error | (copied & lost.bit_select(slot, 1))):
                    m.d.sync += [entry.status.eq(Status.BUS_ERROR), entry.where.eq(0)]
                m.next = "ENTRY"
            with m.State("ENTRY"):
                m.d.comb += sending.entry.eq(1)
                with m.If(step & (word == LINE_WORDS - 1)):
                    m.next = "FINISH"
            with m.State("FINISH"):
                with m.If(written):
                    m.d.comb += self.completed.eq(1)
                    m.next = "IDLE"
        return m

    def _note_errors(self, m: Module, asked: Signal, is_copy: Signal, error: Signal, lost: Signal) -> None:
        """Whose line it is that was answered with an error: the command's in hand, or the READ's of a slot."""
        # Lines are answered in their order; beside those of `WriteLines` one is on its way there.
        m.submodules.owners = owners = SyncFIFO(
            width=1 + self._shapes.slot.width, depth=1 << ceil_log2(self._outstanding + 2))
        # Long before the answer comes.
        m.d.sync += [owners.w_en.eq(asked), owners.w_data.eq(Cat(is_copy, self.copies_slot))]
        m.d.comb += owners.r_en.eq(self.axi.bvalid & self.axi.bready)
        with m.If(self.write_error):
            with m.If(owners.r_data[0]):
                m.d.sync += lost.bit_select(owners.r_data[1:], 1).eq(1)
            with m.Else():
                m.d.sync += error.eq(1)

    def _buffer(self, m: Module, address: Value) -> data.View:
        """The read port of the results, which come in the order of the chain and go out row by row."""
        m.submodules.results = results = Memory(
            shape=data.ArrayLayout(32, 2), depth=2 << self._row_bits + self._pair_bits, init=[])
        write, read = results.write_port(granularity=1), results.read_port()
        number, place = self.result.payload.result, self.result.payload.place
        m.d.comb += [
            write.addr.eq(Cat(place.element[1:], place.row, self.half)),
            write.data[0].eq(number),
            write.data[1].eq(number),
            write.en.eq(Mux(self.result.valid, Mux(place.element[0], 0b10, 0b01), 0)),
            read.addr.eq(address),
        ]
        return read

    def _completion(self, entry: data.View, composed: data.View) -> data.View:
        """The words of a completion."""
        return _words(assemble(
            COMPLETION,
            state=Cat(composed.phase, entry.status, Mux(entry.status == Status.OK, 0, STATUS_TYPE)),
            queue=entry.queue,
            head=composed.head,
            identifier=entry.identifier,
            flags=entry.flags,
            where=entry.where,
            **{name: composed.counters[name] for name in SNAPSHOT.members},
            **{name: entry.stamps[name] for name in STAMPS.members},
        ))

    def _send(self, m: Module, sending: _Sending, word: Signal, address: Signal, results: data.View,
              completion: data.View) -> tuple[Signal, Signal, Signal]:
        """Sends words through one register, beside the read port of the results.

        Returns:
            (step, asked, written): the register takes a word in this cycle; a line's last one; all that was sent is
            written.
        """
        m.submodules.lines = lines = WriteLines(self._outstanding)
        # So that nothing here hangs on the bus in the same cycle.
        m.submodules.words = words = StreamBuffer(WRITE_WORD)
        wiring.connect(m, wiring.flipped(self.axi), lines.axi)
        wiring.connect(m, words.o, lines.i)
        step, asked, written = Signal(), Signal(), Signal()
        out_valid = Signal()
        out_result = Signal(reset_less=True)
        out_other = Signal(DATA_BITS, reset_less=True)
        out_address = Signal(64, reset_less=True)
        out_last = Signal(reset_less=True)
        trailer = _words(assemble(TRAILER, maximum=self.trailer.maximum, denominator=self.trailer.denominator))
        place_in_line = word[:PLACE_BITS]
        copy, line_end = self.copies.payload, Signal()
        m.d.comb += [
            lines.stop.eq(self.stop),
            self.quiet.eq(lines.idle),
            self.write_error.eq(lines.error),
            results.en.eq(step),
            step.eq(~out_valid | words.i.ready),
            words.i.valid.eq(out_valid),
            words.i.payload.data.eq(Mux(out_result, results.data.as_value(), out_other)),
            words.i.payload.address.eq(out_address),
            words.i.payload.last.eq(out_last),
            written.eq(~out_valid & ~words.o.valid & lines.idle),
            line_end.eq(Mux(sending.copy, copy.last, place_in_line == LINE_WORDS - 1)),
            asked.eq(step & sending.any() & line_end),
        ]
        with m.If(step):
            m.d.sync += [
                out_valid.eq(sending.any()),
                out_result.eq(sending.rows & (word < self._config.head_dim // 2)),
                out_other.eq(Mux(
                    sending.copy | sending.block,
                    Mux(sending.copy, copy.data, self.block_data),
                    Mux(sending.rows, trailer[place_in_line], completion[place_in_line]))),
                out_address.eq(Mux(sending.copy, copy.address, address)),
                out_last.eq(line_end),
            ]
            with m.If(sending.any()):
                m.d.sync += word.eq(word + 1)
                with m.If(place_in_line == LINE_WORDS - 1):
                    m.d.sync += address.eq(address + LINE_BYTES)  # rows follow each other
        return step, asked, written
