"""Turns wide words of device DRAM into words of the channels, for all channels side by side."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.storage.queue_set import QueuePointers, queue_number

QUEUED_ROWS = 4
"""Rows on the way from the banks to a channel: one is given, one follows it, two cover the way."""
LEAST_QUEUED = 16
"""Words on that way, at least."""


class RowStore(wiring.Component):
    """Keeps rows (words of the DRAM's port) for each channel and for the tail, and gives them as words of `word_bytes`.

    Word number b of all rows lies in bank b.  The channels have turns, a cycle each: a row that is begun in cycle t has
    its word b read in cycle t + b, so that rows of all channels leave side by side, each bank for another channel.  The
    tail takes turns that no channel uses.  A short queue before each channel frees it of this rhythm.

    Latency: a row's first word is given three cycles after its turn.  Throughput: a row in a cycle; words out: one a
    cycle for each channel, as long as there are no more channels than words in a row, else that share of one; for the
    tail one a cycle where there are turns.
    Ordering: of each channel, and of the tail, as they came.  Reset empties it.

    Parameters
    ----------
    config : Config
        The configuration.
    rows : int
        Rows kept for each channel and for the tail, a power of two; whoever writes sees to it that there are never
        more.

    Members
    -------
    write, data, to, tail : In(1), In(dram_beat_bytes * 8), In(channel), In(1)
        Strobe: a row, and the channel that it is for, or that it is for the tail.
    words : Array of Out(stream of word_bytes * 8)
        The words, for each channel.
    tail_words : Out(stream of word_bytes * 8)
        The words of the tail.
    """

    write: Signal
    data: Signal
    to: Signal
    tail: Signal
    words: list[stream.Interface]
    tail_words: stream.Interface

    def __init__(self, config: Config, rows: int) -> None:
        self._channels, self._rows = config.channels, max(2, rows)
        self._word_bits = config.word_bytes * 8
        self._row_words = config.dram_beat_bytes // config.word_bytes
        # At least two, so that what is known of a channel is of after its last turn.
        self._turns = max(2, 1 << ceil_log2(max(self._channels, self._row_words)))
        words = stream.Signature(unsigned(self._word_bits))
        super().__init__({
            "write": In(1),
            "data": In(config.dram_beat_bytes * 8),
            "to": In(queue_number(config.channels)),
            "tail": In(1),
            "words": Out(words).array(config.channels),
            "tail_words": Out(words),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        channels = range(self._channels)
        turn = Signal(range(self._turns))
        m.d.sync += turn.eq(turn + 1)
        m.submodules.pointers = pointers = QueuePointers(self._channels + 1, self._rows)
        able = Signal(self._turns)        # channels that a row can be begun for
        tail_able, begun, tail_begun = Signal(), Signal(), Signal()
        m.d.comb += [
            pointers.push.eq(self.write),
            pointers.push_queue.eq(Mux(self.tail, self._channels, self.to)),
            begun.eq(able.bit_select(turn, 1)),
            tail_begun.eq(tail_able & ~begun),
            pointers.pop.eq(begun | tail_begun),
            pointers.pop_queue.eq(Mux(begun, turn, self._channels)),
        ]
        read = self._banks(m, pointers)
        for channel in channels:
            # In turn t bank b shows what was read for the channel whose turn was b + 1 before.
            shown = [(now - channel - 1) % self._turns for now in range(self._turns)]
            there = Signal(name=f"there_{channel}")
            word = Signal(self._word_bits, name=f"word_{channel}")
            active = Signal(name=f"active_{channel}")   # the row of its last turn is coming
            m.d.comb += [
                there.eq(active & Array(int(bank < self._row_words) for bank in shown)[turn]),
                word.eq(Array(read[bank % self._row_words] for bank in shown)[turn]),
            ]
            with m.If(turn == channel):
                m.d.sync += active.eq(begun)
            room = self._queue(m, f"{channel}", self.words[channel], word, there, begun & (turn == channel))
            m.d.sync += able[channel].eq(pointers.waiting[channel] & room)
        self._give_tail(m, read, pointers.waiting[-1], tail_able, tail_begun)
        return m

    def _banks(self, m: Module, pointers: QueuePointers) -> list[Value]:
        """What each bank's read port shows; a row's address goes from bank to bank, a cycle each."""
        address = Cat(pointers.pop_index, pointers.pop_queue)
        shown = []
        for bank in range(self._row_words):
            m.submodules[f"bank_{bank}"] = memory = Memory(
                shape=self._word_bits, depth=self._rows << len(pointers.pop_queue), init=[])
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.addr.eq(Cat(pointers.push_index, pointers.push_queue)),
                write.data.eq(self.data.word_select(bank, self._word_bits)),
                write.en.eq(self.write),
                read.addr.eq(address),
            ]
            shown.append(read.data)
            following = Signal(len(address), name=f"address_{bank}", reset_less=True)
            m.d.sync += following.eq(address)
            address = following
        return shown

    def _give_tail(self, m: Module, read: list[Value], waiting: Value, able: Signal, begun: Signal) -> None:
        """The tail's words, one row behind another."""
        active, bank = Signal(), Signal(range(max(2, self._row_words)))
        word = Signal(self._word_bits)
        m.d.comb += word.eq(Array(read)[bank])
        ended = bank == self._row_words - 1
        with m.If(begun):
            m.d.sync += [active.eq(1), bank.eq(0)]
        with m.Elif(active):
            m.d.sync += [active.eq(~ended), bank.eq(bank + 1)]
        room = self._queue(m, "tail", self.tail_words, word, active, begun)
        m.d.comb += able.eq(waiting & room & (~active | ended))

    def _queue(self, m: Module, name: str, out: stream.Interface, word: Value, there: Value, begun: Value) -> Signal:
        """Words from the banks to a stream; whether there is room for a row more."""
        row_words = self._row_words
        depth = max(QUEUED_ROWS * row_words, LEAST_QUEUED)
        m.submodules[f"queue_{name}"] = queue = Memory(shape=self._word_bits, depth=depth, init=[])
        write, read = queue.write_port(), queue.read_port(domain="comb")
        put, got = (Signal(range(2 * depth), name=f"{end}_{name}") for end in ("put", "got"))
        rows = Signal(range(depth // row_words + 1), name=f"rows_{name}")   # begun and not wholly given
        room, taken, given = (Signal(name=f"{what}_{name}") for what in ("room", "taken", "given"))
        m.d.comb += [
            write.addr.eq(put),
            write.data.eq(word),
            write.en.eq(there),
            read.addr.eq(got),
            out.payload.eq(read.data),
            out.valid.eq(put != got),
            taken.eq(out.valid & out.ready),
            given.eq(taken & (got[: ceil_log2(row_words)] == row_words - 1)),
            room.eq(rows != depth // row_words),
        ]
        m.d.sync += [put.eq(put + there), got.eq(got + taken), rows.eq(rows + begun - given)]
        return room
