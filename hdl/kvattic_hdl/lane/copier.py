"""Copies K and V of READs: from the fronts of all lanes, a codeword at a time, to lines of host memory."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import LINE_BYTES, lines
from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.axi import DATA_BITS, LINE_ADDRESS_BITS, LINE_WORDS
from kvattic_hdl.lib.axi_write import WRITE_WORD
from kvattic_hdl.lib.records import WORD_BYTES
from kvattic_hdl.lib.shapes import TOKEN_BITS, Shapes
from kvattic_hdl.lib.stream_buffer import StreamBuffer

BEATS = 16
"""Beats that are kept: two lines of the narrowest, and those on their way when a lane is told to wait."""
LATE = 4
"""Beats that can be on their way then."""


def copy_link(config: Config) -> wiring.Signature:
    """Between a lane's front and the copier, as the front sees it; `valid` and `last` come a cycle after their beat.

    Members
    -------
    wants : Out(1)
        The front's next codeword is of a READ; its first beat waits for `ready`.
    slot, token, value : Out(slot), Out(24), Out(1)
        Its job, its first token, and whether it is of V; while `wants`.
    ready : In(1)
        A beat is taken in the next cycle; but none for two cycles behind a codeword's last one.
    data : Out(beat_bytes * 8)
        The front's next beat.
    valid : Out(1)
        The beat of the cycle before was taken.
    last : Out(1)
        It was the codeword's last one.
    """
    shapes = Shapes(config)
    return wiring.Signature({
        "wants": Out(1),
        "slot": Out(shapes.slot),
        "token": Out(TOKEN_BITS),
        "value": Out(1),
        "ready": In(1),
        "data": Out(config.beat_bytes * 8),
        "valid": Out(1),
        "last": Out(1),
    })


class Copier(wiring.Component):
    """Writes the codewords of READs that lanes have at their fronts, from one lane after the other.

    Latency: a line's first word is offered five cycles after its last beat was taken.  Throughput: a word a cycle, and
    about fifteen cycles between codewords.  Ordering: codewords as the lanes have them; a line is offered when all of
    it is there.  Tokens behind the job's last one are taken and dropped.  Reset drops what is under way: not while a
    line is begun.

    Parameters
    ----------
    config : Config

    Members
    -------
    start_valid, slot, result, tokens : In
        Strobe: this slot has a new job, with this target (an address) and so many tokens.
    lanes : Array of In(`copy_link`)
    o : Out(stream of WRITE_WORD)
        Words of lines; once one is offered, all of its line come without a pause.
    o_slot : Out(slot)
        Whose they are.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.token_lines = lines(config.token_bytes)    # of K or V
        super().__init__({
            "start_valid": In(1),
            "slot": In(shapes.slot),
            "result": In(64),
            "tokens": In(TOKEN_BITS),
            "lanes": In(copy_link(config)).array(config.lanes),
            "o": Out(stream.Signature(WRITE_WORD)),
            "o_slot": Out(shapes.slot),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.beats = beats = SyncFIFO(width=self.config.beat_bytes * 8, depth=BEATS)
        lane = Signal(self.shapes.lane)
        head, begin, ended = Signal(), Signal(), Signal()   # a codeword: looked at, begun, all its lines are offered
        token = Signal(TOKEN_BITS)
        value = Signal()
        slot = Signal(self.shapes.slot)
        self._receive(m, beats, lane, begin)
        links = Array(self.lanes)
        busy = Signal()
        with m.If(begin):
            m.d.sync += [
                busy.eq(1), head.eq(1), token.eq(links[lane].token), value.eq(links[lane].value),
                slot.eq(links[lane].slot)]
        with m.If(head):
            m.d.sync += head.eq(0)
        with m.If(ended):
            m.d.sync += busy.eq(0)
        m.d.comb += begin.eq(links[lane].wants & ~busy)
        self._send(m, beats, busy & ~head, head, token, value, slot, ended)
        return m

    def _receive(self, m: Module, beats: SyncFIFO, lane: Signal, begin: Signal) -> None:
        """Beats of the codeword of one lane; the next lane that wants is looked for while its last lines are sent."""
        links = Array(self.lanes)
        receiving, room = Signal(), Signal()
        data = Signal(self.config.beat_bytes * 8, reset_less=True)
        valid = links[lane].valid & receiving
        m.d.sync += [data.eq(links[lane].data), room.eq(beats.level < BEATS - LATE)]
        m.d.comb += [beats.w_en.eq(valid), beats.w_data.eq(data)]
        for number, link in enumerate(self.lanes):
            m.d.comb += link.ready.eq(receiving & room & (lane == number))
        with m.If(begin):
            m.d.sync += receiving.eq(1)
        with m.If(valid & links[lane].last):
            m.d.sync += receiving.eq(0)
        with m.If((~receiving & ~links[lane].wants) | (valid & links[lane].last)):
            m.d.sync += lane.eq(Mux(lane == self.config.lanes - 1, 0, lane + 1))

    def _send(self, m: Module, beats: SyncFIFO, busy: Signal, head: Signal, token: Signal, value: Signal,
              slot: Signal, ended: Signal) -> None:
        """Lines of the codeword; in the cycle after `head` `token` is the next one, and then the address is known."""
        config, lines_each = self.config, self.token_lines
        m.submodules.jobs = jobs = Memory(
            shape=LINE_ADDRESS_BITS + TOKEN_BITS, depth=config.jobs_in_flight, init=[],
            attrs={"ram_style": "distributed"})
        write, read = jobs.write_port(), jobs.read_port(domain="comb")
        result, tokens = read.data[:LINE_ADDRESS_BITS], read.data[LINE_ADDRESS_BITS:]
        m.d.comb += [
            write.en.eq(self.start_valid),
            write.addr.eq(self.slot),
            write.data.eq(Cat(self.result[-LINE_ADDRESS_BITS:], self.tokens)),
            read.addr.eq(slot),
        ]
        # A word of the line; the line of the token; the token of the codeword.
        word = Signal(range(LINE_WORDS))
        line, index = Signal(range(lines_each)), Signal(range(config.tokens_per_codeword))
        address = Signal(LINE_ADDRESS_BITS)
        lines_before, second = Signal(LINE_ADDRESS_BITS), Signal()   # those of earlier tokens; the cycle after `head`
        line_beats, beat_words = LINE_BYTES // config.beat_bytes, config.beat_bytes // WORD_BYTES
        last_words = (config.token_bytes // WORD_BYTES - 1) % LINE_WORDS + 1    # of a token's last line
        part = word[: ceil_log2(beat_words)]    # word of the beat
        word_data = beats.r_data if beat_words == 1 else beats.r_data.word_select(part, DATA_BITS)
        beat_end = Const(1) if beat_words == 1 else part == beat_words - 1
        last_line, going, padding = Signal(), Signal(), Signal()
        step = Signal()
        # Behind the job's last token: that which is sent, the next one (known long before it is sent).
        drop, drop_next = Signal(), Signal()
        # Addresses are kept beside: while a line's first word waits here, `address` does not change.
        shown = Signal(LINE_ADDRESS_BITS, reset_less=True)
        m.submodules.words = words = StreamBuffer(
            data.StructLayout({"data": DATA_BITS, "last": 1, "slot": self.shapes.slot}))
        need = Mux(last_line, -(-last_words // beat_words), line_beats)
        m.d.comb += [
            last_line.eq(line == lines_each - 1),
            padding.eq(last_line & (word >= last_words)),
            going.eq(busy & ~second & ((word != 0) | (beats.level >= need))),
            step.eq(going & (words.i.ready | drop)),
            words.i.valid.eq(going & ~drop),
            words.i.payload.last.eq(word == LINE_WORDS - 1),
            words.i.payload.data.eq(Mux(padding, 0, word_data)),
            words.i.payload.slot.eq(slot),
            words.o.ready.eq(self.o.ready),
            self.o.valid.eq(words.o.valid),
            self.o.payload.address.eq(Cat(Const(0, ceil_log2(LINE_BYTES)), shown)),
            self.o.payload.last.eq(words.o.payload.last),
            self.o.payload.data.eq(words.o.payload.data),
            self.o_slot.eq(words.o.payload.slot),
            beats.r_en.eq(step & ~padding & beat_end),
            ended.eq(step & (word == LINE_WORDS - 1) & last_line & (index == config.tokens_per_codeword - 1)),
        ]
        with m.If(~self.o.valid | (self.o.ready & self.o.payload.last)):
            m.d.sync += shown.eq(address)
        m.d.sync += drop_next.eq(token >= tokens)
        m.d.sync += [lines_before.eq(times(token, 2 * lines_each)), second.eq(head)]
        with m.If(head):
            m.d.sync += [drop.eq(token >= tokens), token.eq(token + 1)]
        with m.If(second):
            m.d.sync += address.eq(result + lines_before + Mux(value, lines_each, 0))
        with m.If(step):
            m.d.sync += word.eq(word + 1)
            with m.If(word == LINE_WORDS - 1):
                # Over the token's other half, to the next one.
                m.d.sync += [
                    address.eq(address + Mux(last_line, lines_each + 1, 1)), line.eq(Mux(last_line, 0, line + 1))]
                with m.If(last_line):
                    m.d.sync += [token.eq(token + 1), drop.eq(drop_next), index.eq(Mux(ended, 0, index + 1))]
