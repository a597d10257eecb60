"""Hands flash commands to the channels, and collects how they ended."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from kvattic.spec.commands import STATUS_BITS, Opcode, Status
from kvattic.spec.config import Config
from kvattic.spec.registers import MAX_ENTRIES, QUEUES
from kvattic_hdl.lib.shapes import QUEUE_BITS, Shapes, operation_code
from kvattic_hdl.lib.stream_buffer import StreamRegister
from kvattic_hdl.storage.page_reader import fetch_layout

OUTSTANDING_BITS = bits_for(QUEUES * MAX_ENTRIES)
"""Bits of the number of operations under way: each has an entry of a completion ring."""


class Operations(wiring.Component):
    """Distributes operations to their channels in the order of the commands, and their outcomes to one stream.

    An operation waits where its channel takes no more, and those behind it with it.  Outcomes come in any order.
    Latency two cycles each way; one operation a cycle, and an outcome every other one.  Not to be reset while
    operations are under way: wait for `quiet`.

    Parameters
    ----------
    config : Config

    Members
    -------
    commands : In(stream of Shapes.flash_command)
        From the loader.
    operations : Array of Out(stream of operation)
        For each channel.
    fetches : Out(stream of fetch_layout)
        The pages of the PROGRAMs, of each channel in the same order.
    channel_outcomes : Array of In(stream of outcome)
        From each channel.
    outcomes : Out(stream of Shapes.ended)
        For the finisher; without a block.
    failed : In(channels)
        Strobe: a page of this channel could not be read from device DRAM.  What the channel ends from then on has
        failed, until no operation of any channel is under way.
    quiet : Out(1)
        No operation is under way.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        channels = config.channels
        super().__init__({
            "commands": In(stream.Signature(shapes.flash_command)),
            "operations": Out(stream.Signature(shapes.operation)).array(channels),
            "fetches": Out(stream.Signature(fetch_layout(config))),
            "channel_outcomes": In(stream.Signature(shapes.outcome)).array(channels),
            "outcomes": Out(stream.Signature(shapes.ended)),
            "failed": In(channels),
            "quiet": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        channels = range(config.channels)

        # Commands: a PROGRAM goes on when its operation and its fetch are both taken.
        m.submodules.queue = queue = SyncFIFOBuffered(width=shapes.flash_command.size, depth=4)
        command = Signal(shapes.flash_command)
        m.d.comb += [
            queue.w_data.eq(self.commands.payload),
            queue.w_en.eq(self.commands.valid),
            self.commands.ready.eq(queue.w_rdy),
            command.eq(queue.r_data),
        ]
        program = command.operation.opcode == operation_code(Opcode.PROGRAM)
        fetched = Signal()
        operation_ready = Signal()
        fetch_ready = Signal()
        m.d.comb += [
            operation_ready.eq(Array(s.ready for s in self.operations)[command.channel]),
            fetch_ready.eq(self.fetches.ready),
            self.fetches.payload.channel.eq(command.channel),
            self.fetches.payload.page.dram_page.eq(command.dram_page),
            self.fetches.payload.page.page.eq(command.operation.page),
            self.fetches.valid.eq(queue.r_rdy & program & ~fetched),
        ]
        begun = Signal()
        m.d.comb += [
            begun.eq(queue.r_rdy & (~program | fetched | fetch_ready) & operation_ready),
            queue.r_en.eq(begun),
        ]
        for c in channels:
            here = queue.r_rdy & (command.channel == c)
            m.d.comb += [
                self.operations[c].payload.eq(command.operation),
                self.operations[c].valid.eq(here & (~program | fetched | fetch_ready)),
            ]
        with m.If(begun):
            m.d.sync += fetched.eq(0)
        with m.Elif(queue.r_rdy & program & fetch_ready):
            m.d.sync += fetched.eq(1)

        # Outcomes: one channel is looked at in each cycle.  What a channel was given a wrong page for has failed.
        poisoned = Signal(config.channels)
        with m.If(self.quiet):
            m.d.sync += poisoned.eq(0)
        with m.Else():
            m.d.sync += poisoned.eq(poisoned | self.failed)
        at = Signal(shapes.channel)
        # What waits for the finisher: which of several it takes is decided late, and no channel should wait for that.
        # One of two cycles is enough: the finisher takes more than that for each.
        m.submodules.ended = ended_buffer = StreamRegister(shapes.ended)
        connect(m, ended_buffer.o, flipped(self.outcomes))
        held = ended_buffer.i.payload
        found = Signal(shapes.outcome)
        there, take = Signal(), Signal()
        status = Signal(STATUS_BITS)
        identity = found.identity
        m.d.comb += [
            found.eq(Array(s.payload.as_value() for s in self.channel_outcomes)[at]),
            there.eq(Array(s.valid for s in self.channel_outcomes)[at]),
            take.eq(there & ended_buffer.i.ready),
            status.eq(Mux((found.status == Status.OK) & poisoned.bit_select(at, 1), Status.BUS_ERROR, found.status)),
            ended_buffer.i.valid.eq(take),
            held.queue.eq(identity[:QUEUE_BITS]),
            held.identifier.eq(identity[16:]),
            held.status.eq(status),
            held.where.eq(Mux(status == Status.OK, 0, Cat(found.page, at, Const(0, 8 - len(at))))),
        ]
        for c in channels:
            m.d.comb += self.channel_outcomes[c].ready.eq(take & (at == c))
        with m.If(~there | take):
            m.d.sync += at.eq(Mux(at == config.channels - 1, 0, at + 1))

        under_way = Signal(OUTSTANDING_BITS)
        accepted, ended = Signal(), Signal()     # a cycle ago
        m.d.sync += [
            accepted.eq(self.commands.valid & self.commands.ready),
            ended.eq(self.outcomes.valid & self.outcomes.ready),
            under_way.eq(under_way + accepted - ended)]
        m.d.comb += self.quiet.eq((under_way == 0) & ~accepted)
        return m
