"""Turns wide words of device DRAM into words of the channels, for all channels side by side."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import pick
from kvattic_hdl.storage.queue_set import QueuePointers, queue_number

QUEUED_ROWS = 4
"""Rows on the way from the banks to a channel: one is given, one follows it, two cover the way."""
FIRST_TURNS = 4
"""Places by which the banks' words are turned in the first step, at most."""
LEAST_QUEUED = 16
"""Words on that way, at least."""


class RowStore(wiring.Component):
    """Keeps rows (words of the DRAM's port) for each channel and for the tail, and gives them as words of `word_bytes`.

    Word number b of all rows lies in bank b.  The channels have turns, a cycle each: a row that is begun in cycle t has
    its word b read in cycle t + b, so that rows of all channels leave side by side, each bank for another channel.  The
    tail shares the turns of every channel whose number is a multiple of a row's words, one of two where both want them.
    A short queue before each channel frees it of this rhythm.

    Latency: a row's first word is given four cycles after its turn.  Throughput: a row in a cycle; words out: one a
    cycle for each channel, as long as there are no more channels than words in a row, else that share of one; for the
    tail one a cycle where its turns are free.
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
        turn = Signal(range(self._turns))
        m.d.sync += turn.eq(turn + 1)
        m.submodules.pointers = pointers = QueuePointers(self._channels + 1, self._rows)
        able = Signal(self._turns)        # channels that a row can be begun for
        tail_able, tail_turn, tail_last, begun, tail_begun = (
            Signal(name=name) for name in ("tail_able", "tail_turn", "tail_last", "begun", "tail_begun"))
        may_begin = able.bit_select(turn, 1)
        m.d.comb += [
            pointers.push.eq(self.write),
            pointers.push_queue.eq(Mux(self.tail, self._channels, self.to)),
            tail_turn.eq(~turn[: ceil_log2(self._row_words)].any()),
            tail_begun.eq(tail_able & tail_turn & ~(may_begin & tail_last)),
            begun.eq(may_begin & ~tail_begun),
            pointers.pop.eq(begun | tail_begun),
            pointers.pop_queue.eq(Mux(tail_begun, self._channels, turn)),
        ]
        with m.If(begun & tail_turn | tail_begun):
            m.d.sync += tail_last.eq(tail_begun)
        words = self._words(m, self._banks(m, pointers), turn)
        for channel in range(self._channels):
            # In turn t bank b shows what was read for the channel whose turn was b + 1 before.
            shown = [Const((now - channel - 1) % self._turns < self._row_words, 1) for now in range(self._turns)]
            there = Signal(name=f"there_{channel}")
            active = Signal(name=f"active_{channel}")   # the row of its last turn is coming
            m.d.sync += there.eq(active & pick(shown, turn))
            with m.If(turn == channel):
                m.d.sync += active.eq(begun)
            room = self._queue(
                m, f"{channel}", self.words[channel], words[channel], there, begun & (turn == channel))
            m.d.sync += able[channel].eq(pointers.waiting[channel] & room)
        room = self._give_tail(m, words, turn, tail_turn, tail_begun)
        if self._row_words > 1:
            m.d.sync += tail_able.eq(pointers.waiting[-1] & room)
        else:
            m.d.comb += tail_able.eq(pointers.waiting[-1] & room)   # each cycle is its turn
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

    def _words(self, m: Module, read: list[Value], turn: Signal) -> list[Value]:
        """What the banks show, a cycle later, for a row that was begun in each turn.

        The words are turned in two steps with a register between them: in one, synthesis would take half as many LUTs
        more.
        """
        low, high = turn[: FIRST_TURNS.bit_length() - 1], turn[FIRST_TURNS.bit_length() - 1 :]
        rest = Const(0, 0)
        if len(high):
            rest = Signal(len(high))
            m.d.sync += rest.eq(high)
        turned = [Signal(self._word_bits, name=f"turned_{i}", reset_less=True) for i in range(self._turns)]
        steps = 1 << len(low)
        choices = [Signal(len(low), name=f"choice_{i}", init=i) for i in range(steps)]   # (i + turn) % steps
        m.d.sync += [choice.eq(choice + 1) for choice in choices]
        for i, word in enumerate(turned):
            # By bank % steps, each with its own counter: shared parts of these multiplexers would cost more than they
            # save.
            from_bank = {(i + by) % steps: read[(i + by) % self._turns % self._row_words] for by in range(steps)}
            m.d.sync += word.eq(pick([from_bank[bank] for bank in range(steps)], choices[i % steps]))
        words = [Signal(self._word_bits, name=f"word_{begun}") for begun in range(self._turns)]
        m.d.comb += [
            word.eq(pick([turned[(FIRST_TURNS * place - begun - 1) % self._turns] for place in range(1 << len(high))],
                         rest))
            for begun, word in enumerate(words)]
        return words

    def _give_tail(self, m: Module, words: list[Value], turn: Signal, tail_turn: Value, begun: Value) -> Signal:
        """The tail's words, one row behind another; whether there is room for a row more."""
        there = [Signal(name=f"tail_there_{i}") for i in range(2)]   # the row of its last turn is coming
        high = turn[ceil_log2(self._row_words) :]
        of_turn: list[Value] = [Const(0, 0)] * 2     # which of its turns that was
        if len(high):
            of_turn = [Signal(len(high), name=f"tail_turn_{i}") for i in range(2)]
            m.d.sync += of_turn[1].eq(of_turn[0])
        with m.If(tail_turn):
            m.d.sync += there[0].eq(begun)
            if len(high):
                m.d.sync += of_turn[0].eq(high)
        m.d.sync += there[1].eq(there[0])
        return self._queue(
            m, "tail", self.tail_words, pick(words[:: self._row_words], of_turn[1]), there[1], begun)

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
