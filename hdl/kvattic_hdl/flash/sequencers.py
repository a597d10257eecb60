"""The two sequencers of a channel: one plays commands on the pins, the other one data bursts."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from kvattic.spec.config import Config
from kvattic.spec.nand import COLUMN_CYCLES, ROW_CYCLES
from kvattic_hdl.flash.die_clocks import DieTimes
from kvattic_hdl.flash.interfaces import FlashShapes
from kvattic_hdl.flash.phy import PhyShapes


class Addresses(enum.Enum, shape=2, view_class=None):
    """Address cycles between a command's first and second byte."""

    NONE = 0
    ROW = 1
    COLUMN = 2
    BOTH = 3


class Transfer(enum.Enum, shape=2, view_class=None):
    """What a data burst carries."""

    CODEWORD = 0
    """A codeword, to the decoder."""
    WRITE = 1
    """A codeword's worth of page data, into the die."""
    BYTE = 2
    """One byte: a status, a bad-block mark."""
    FEATURE = 3
    """The four bytes of a feature, the read-retry level in the first one."""


class Commander(wiring.Component):
    """Plays commands: first byte, address cycles, second byte; tells the die's clock when it is done.

    A command waits for `allowed` before its first cycle and is then played to its end; the next one is taken meanwhile.

    Parameters
    ----------
    config : Config

    Members
    -------
    jobs : In(stream of job)
        first, addresses (`Addresses`), column, row, twice (1: `second` follows), second, start (`DieTimes.start`).
        A single address cycle is a column of which only the lower byte is sent (`short`).
    allowed : In(1)
        No burst moves or is offered.
    active : Out(1)
        A command waits or is being played.
    cycles : Out(stream of PhyShapes.cycle)
    done : Out(stream of start)
        The last cycle was taken, a cycle ago.
    """

    def __init__(self, config: Config) -> None:
        self.times = DieTimes(config)
        self.phy = PhyShapes(config)
        self.job = data.StructLayout({
            "first": 8, "addresses": Addresses, "short": 1, "column": COLUMN_CYCLES * 8, "row": ROW_CYCLES * 8,
            "twice": 1, "second": 8, "start": self.times.start})
        super().__init__({
            "jobs": In(stream.Signature(self.job)),
            "allowed": In(1),
            "active": Out(1),
            "cycles": Out(stream.Signature(self.phy.cycle)),
            "done": Out(stream.Signature(self.times.start, always_ready=True)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waiting, current = Signal(self.job), Signal(self.job)
        waits = Signal()
        ended, taken = Signal(), Signal()
        m.d.comb += [
            self.jobs.ready.eq(~waits),
            self.cycles.payload.target.eq(current.start.die),
            taken.eq(self.cycles.valid & self.cycles.ready),
        ]
        m.d.sync += [self.done.payload.eq(current.start), self.done.valid.eq(ended)]
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [waiting.eq(self.jobs.payload), waits.eq(1)]
        with m.If(waits & (~self.active | ended)):
            m.d.sync += [current.eq(waiting), waits.eq(0), self.active.eq(1)]
        with m.Elif(ended):
            m.d.sync += self.active.eq(0)

        index = Signal(2)
        cycle = self.cycles.payload
        has_column = (current.addresses == Addresses.COLUMN) | (current.addresses == Addresses.BOTH)
        has_row = (current.addresses == Addresses.ROW) | (current.addresses == Addresses.BOTH)
        with m.FSM():
            with m.State("FIRST"):
                started = Signal()   # an offered cycle stays offered
                m.d.comb += [cycle.byte.eq(current.first), self.cycles.valid.eq(self.active & (self.allowed | started))]
                m.d.sync += [started.eq(self.cycles.valid & ~self.cycles.ready), index.eq(0)]
                with m.If(taken):
                    with m.If(has_column):
                        m.next = "COLUMN"
                    with m.Elif(has_row):
                        m.next = "ROW"
                    with m.Elif(current.twice):
                        m.next = "SECOND"
                    with m.Else():
                        m.d.comb += ended.eq(1)
            with m.State("COLUMN"):
                m.d.comb += [
                    cycle.address.eq(1), cycle.byte.eq(current.column.word_select(index[0], 8)),
                    self.cycles.valid.eq(1),
                ]
                with m.If(taken):
                    m.d.sync += index.eq(index + 1)
                    with m.If(index[0] | current.short):
                        m.d.sync += index.eq(0)
                        with m.If(has_row):
                            m.next = "ROW"
                        with m.Elif(current.twice):
                            m.next = "SECOND"
                        with m.Else():
                            m.d.comb += ended.eq(1)
                            m.next = "FIRST"
            with m.State("ROW"):
                m.d.comb += [
                    cycle.address.eq(1), cycle.byte.eq(current.row.word_select(index, 8)), self.cycles.valid.eq(1),
                ]
                with m.If(taken):
                    m.d.sync += index.eq(index + 1)
                    with m.If(index == ROW_CYCLES - 1):
                        with m.If(current.twice):
                            m.next = "SECOND"
                        with m.Else():
                            m.d.comb += ended.eq(1)
                            m.next = "FIRST"
            with m.State("SECOND"):
                m.d.comb += [cycle.byte.eq(current.second), self.cycles.valid.eq(1)]
                with m.If(taken):
                    m.d.comb += ended.eq(1)
                    m.next = "FIRST"
        return m


class Mover(wiring.Component):
    """Plays data bursts, each announced to the decoder if it brings a codeword.

    The next burst is prepared while one moves, its header handed over and the burst offered just before the end, so
    that bursts of the same die follow without a pause.  A burst waits for `allowed` and for a free decoder buffer.
    A codeword whose header has a cause has no burst.

    Parameters
    ----------
    config : Config

    Members
    -------
    jobs : In(stream of job)
        die, transfer (`Transfer`), header (of CODEWORD; its level is also that of FEATURE).
    allowed : In(1)
        A burst may be offered: no command waits for the bus.
    clear : Out(1)
        A command may be played: nothing is offered, and what moves has all but ended.
    headers : Out(stream of header)
    bursts : Out(stream of PhyShapes.burst)
    read_valid : In(1), read : In(word)
        From the PHY.
    write : Out(stream of word)
        To the PHY.
    words : In(stream of word)
        What WRITE carries.
    words_valid : Out(1)
        `read` is a word of a codeword.
    byte : Out(8)
        What the last BYTE brought; it stands when that is no longer under way.
    written : Out(stream of start)
        For the die's clock: a write burst ended, a cycle ago.
    planned, moving : Out(1)
        A burst is prepared; one moves.
    planned_die, moving_die : Out(die)
        Of which die.
    """

    HEADER_WORDS, OFFER_WORDS, CLEAR_WORDS = 16, 4, 2
    """Words left of a burst when the next one's header is shown, when that one is offered, when commands may go."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = FlashShapes(config)
        self.times = DieTimes(config)
        self.phy = PhyShapes(config)
        self.job = data.StructLayout({"die": self.phy.target, "transfer": Transfer, "header": shapes.header})
        super().__init__({
            "jobs": In(stream.Signature(self.job)),
            "allowed": In(1),
            "clear": Out(1),
            "headers": Out(stream.Signature(shapes.header)),
            "bursts": Out(stream.Signature(self.phy.burst)),
            "read": In(self.phy.word),
            "read_valid": In(1),
            "write": Out(stream.Signature(self.phy.word)),
            "words": In(stream.Signature(self.phy.word)),
            "words_valid": Out(1),
            "byte": Out(8),
            "written": Out(stream.Signature(self.times.start, always_ready=True)),
            "planned": Out(1),
            "planned_die": Out(self.phy.target),
            "moving": Out(1),
            "moving_die": Out(self.phy.target),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        plan, announced, offered = Signal(self.job), Signal(), Signal()
        transfer = Signal(Transfer)
        level = Signal(self.shapes.level)
        left = Signal(bits_for(config.raw_codeword_words + self.OFFER_WORDS))
        taken, word, moves = Signal(), Signal(), Signal()
        bursts = self.bursts
        codeword = plan.transfer == Transfer.CODEWORD
        writes = (plan.transfer == Transfer.WRITE) | (plan.transfer == Transfer.FEATURE)
        whole = codeword | (plan.transfer == Transfer.WRITE)
        same = (plan.transfer == transfer) & whole
        m.d.comb += [
            self.jobs.ready.eq(~self.planned),
            self.planned_die.eq(plan.die),
            self.headers.payload.eq(plan.header),
            self.headers.valid.eq(self.planned & codeword & ~announced & (left <= self.HEADER_WORDS)),
            bursts.valid.eq(self.planned & (announced | ~codeword)
                            & (offered | (self.allowed & Mux(same, left <= self.OFFER_WORDS, left == 0)))),
            bursts.payload.target.eq(plan.die),
            bursts.payload.write.eq(writes),
            bursts.payload.bytes.eq(Mux(whole, config.raw_codeword_bytes, Mux(writes, 4, 1))),
            taken.eq(bursts.valid & bursts.ready),
            self.clear.eq(~bursts.valid & (left <= self.CLEAR_WORDS)),
            word.eq(self.read_valid | (self.write.valid & self.write.ready)),
            self.words_valid.eq(self.read_valid & (transfer == Transfer.CODEWORD)),
        ]
        m.d.sync += offered.eq(bursts.valid & ~bursts.ready)
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [plan.eq(self.jobs.payload), self.planned.eq(1), announced.eq(0)]
        with m.If(self.headers.valid & self.headers.ready):
            m.d.sync += announced.eq(1)
            with m.If(plan.header.cause.any()):
                m.d.sync += self.planned.eq(0)
        with m.If(taken):
            m.d.sync += [
                self.planned.eq(0), transfer.eq(plan.transfer), self.moving_die.eq(plan.die),
                level.eq(plan.header.level),
            ]
        words = Mux(whole, config.raw_codeword_words, 1)
        m.d.sync += [
            left.eq(left + Mux(taken, words, 0) - word),
            moves.eq(taken | (moves & ~((left == 1) & word))),    # left != 0
        ]

        with m.If(transfer == Transfer.FEATURE):
            m.d.comb += [self.write.payload.eq(level), self.write.valid.eq(moves)]
        with m.Elif(transfer == Transfer.WRITE):
            m.d.comb += [
                self.write.payload.eq(self.words.payload),
                self.write.valid.eq(self.words.valid & moves),
                self.words.ready.eq(self.write.ready & moves),
            ]
        with m.If(self.read_valid & (transfer == Transfer.BYTE)):
            m.d.sync += self.byte.eq(self.read)
        feature = transfer == Transfer.FEATURE
        m.d.comb += self.moving.eq(moves)
        m.d.sync += [
            self.written.valid.eq(self.write.valid & self.write.ready & (left == 1)),
            self.written.payload.die.eq(self.moving_die),
            self.written.payload.wait.eq(
                Mux(feature, self.times.cycles(config.part.t_wb) + self.times.moved, self.times.moved)),
            self.written.payload.busy.eq(feature),
            self.written.payload.limit.eq(self.times.ticks(config.part.t_feat)),
        ]
        return m
