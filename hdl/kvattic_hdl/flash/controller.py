"""The controller of a flash channel: turns requests and flash operations into commands and data bursts of its dies."""

from typing import Any

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.scheduling import RUN_QUEUE_DEPTH
from kvattic_hdl.flash.block_map import BlockMap
from kvattic_hdl.flash.commands import push_states
from kvattic_hdl.flash.die_clocks import DieClocks
from kvattic_hdl.flash.load_order import LoadOrder
from kvattic_hdl.flash.machine import Blocks, DieMachine, Phase
from kvattic_hdl.flash.moves import give_up_states, move_states
from kvattic_hdl.flash.operation_queue import OperationQueue, ProgramWords
from kvattic_hdl.flash.operations import begin_states, end_states
from kvattic_hdl.flash.phy import phy_signature
from kvattic_hdl.flash.planner import plan_states, seek_states, skip_states
from kvattic_hdl.flash.retry import retry_states, timeout_states
from kvattic_hdl.flash.retry_queue import RetryQueue
from kvattic_hdl.flash.runs import RunQueues, RunShapes
from kvattic_hdl.flash.sequencers import Commander, Mover
from kvattic_hdl.flash.visits import visit_states
from kvattic_hdl.lib.shapes import EPOCH_BITS


class Controller(wiring.Component):
    """Keeps the dies of a channel busy, and its bus; docs/controller.md tells how.

    Each requested codeword arrives exactly once, in any order: a header, and its words from the PHY, or a header with a
    cause alone.  A V codeword is moved only while `value_open` has its slot's bit set or the slot's epoch is another
    one.  Operations begin in their order; those of different dies overlap.  Each has one outcome.

    Latency of a request on an idle channel: `patience` cycles of the queue at most, some ten of planning, the read.
    Reset: everything is forgotten but the map; each die is reset before it is used.

    Parameters
    ----------
    config : Config
    depth : int
        Runs of codewords that wait for each plane of each die.

    Members
    -------
    requests : In(stream of request)
        Codewords wanted of this channel's flash.
    value_open : In(jobs_in_flight)
    epoch : In(array of epochs, by slot)
    operations : In(stream of operation)
    words : In(stream of word_bytes * 8 bits)
        Raw pages of the PROGRAM operations, codeword by codeword, in the operations' order.
    outcomes : Out(stream of outcome)
    headers : Out(stream of header)
        Before each codeword, up to `Mover.HEADER_WORDS` words before the end of the last one; taken when the decoder
        has a buffer for it.
    words_valid : Out(1)
        The PHY's `read` is a word of a codeword: of the oldest header whose words have not all come.
    retries : In(stream of retry)
        The decoder has given up that codeword's buffer and wants it again.  It must never hold more than
        RETRIES - RETRIES_HELD - 1 buffers (see retry_queue.py).
    phy : Out(phy_signature)
    events : Out
        Fields word, command, dies_busy, retry, page_reads, page_programs, block_erases of `flash_events`.
    """

    def __init__(self, config: Config, depth: int = RUN_QUEUE_DEPTH) -> None:
        self.config = config
        self.depth = depth
        self.shapes = shapes = RunShapes(config, depth)
        self.events_shape = data.StructLayout({
            name: shapes.flash_events.members[name]
            for name in ("word", "command", "dies_busy", "retry", "page_reads", "page_programs", "block_erases")})
        super().__init__({
            "requests": In(stream.Signature(shapes.request)),
            "value_open": In(config.jobs_in_flight),
            "epoch": In(data.ArrayLayout(EPOCH_BITS, config.jobs_in_flight)),
            "operations": In(stream.Signature(shapes.operation)),
            "words": In(stream.Signature(config.word_bytes * 8)),
            "outcomes": Out(stream.Signature(shapes.outcome)),
            "headers": Out(stream.Signature(shapes.header)),
            "words_valid": Out(1),
            "retries": In(stream.Signature(shapes.retry)),
            "phy": Out(phy_signature(config)),
            "events": Out(self.events_shape),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        blocks = Blocks(
            queues=RunQueues(config, self.depth), clocks=DieClocks(config, sources=2), commander=Commander(config),
            mover=Mover(config), operations=OperationQueue(config), words=ProgramWords(config),
            retries=RetryQueue(config), order=LoadOrder(config), block_map=BlockMap(config, self.depth))
        for name in ("queues", "clocks", "commander", "mover", "operations", "words", "retries", "order", "block_map"):
            m.submodules[name] = getattr(blocks, name)
        self._connect(m, blocks)
        events: Any = Signal(self.events_shape)
        m.d.comb += [
            events.word.eq(self.phy.read_valid | (self.phy.write.valid & self.phy.write.ready)),
            events.command.eq(self.phy.cycles.valid & self.phy.cycles.ready),
            events.dies_busy.eq(sum(~self.phy.ready[i] for i in range(config.dies))),
        ]
        m.d.sync += self.events.eq(events)
        self._run(DieMachine(m, config, self.shapes, blocks, self, events, self.depth))
        return m

    def _connect(self, m: Module, blocks: Blocks) -> None:
        """Connect the blocks with the ports, and with each other."""
        clocks, commander, mover = blocks.clocks, blocks.commander, blocks.mover
        shared = not self.config.part.separate_command_bus
        connect(m, flipped(self.requests), blocks.queues.requests)
        connect(m, flipped(self.operations), blocks.operations.operations)
        connect(m, flipped(self.retries), blocks.retries.retries)
        connect(m, flipped(self.words), blocks.words.i)
        connect(m, blocks.words.o, mover.words)
        connect(m, commander.done, clocks.starts[0])
        connect(m, mover.written, clocks.starts[1])
        connect(m, commander.cycles, flipped(self.phy.cycles))
        connect(m, mover.bursts, flipped(self.phy.bursts))
        connect(m, mover.write, flipped(self.phy.write))
        connect(m, mover.headers, flipped(self.headers))
        m.d.comb += [
            clocks.ready.eq(self.phy.ready),
            mover.read.eq(self.phy.read),
            mover.read_valid.eq(self.phy.read_valid),
            self.words_valid.eq(mover.words_valid),
            # Commands go first; what is offered is not taken back.
            mover.allowed.eq(~commander.active if shared else 1),
            commander.allowed.eq(mover.clear if shared else 1),
        ]

    def _run(self, machine: DieMachine) -> None:
        """The machine: a visit to a die, and what it leads to."""
        m, store, cleared = machine.m, machine.store, machine.cleared
        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                m.d.comb += [store.en.eq(1), store.addr.eq(cleared)]   # `work` is all zeros: Phase.RESET
                m.d.sync += cleared.eq(cleared + 1)
                with m.If((cleared == self.config.dies - 1) & machine.queues.ready):
                    m.next = "VISIT"
                with m.Elif(cleared == self.config.dies - 1):
                    m.d.sync += cleared.eq(cleared)
            with m.State("STORE"):
                m.d.comb += store.en.eq(1)
                m.next = "VISIT"
            visit_states(machine)
            with m.State("RESET"):
                machine.command(0xFF, busy=self.config.part.t_rst, factor=1)
                m.d.sync += machine.work.phase.eq(Phase.RESETTING)
                m.next = "STORE"
            if self.config.cache_reads:
                skip_states(machine)
            plan_states(machine)
            seek_states(machine)
            push_states(machine)
            move_states(machine)
            give_up_states(machine)
            begin_states(machine)
            end_states(machine)
            retry_states(machine)
            timeout_states(machine)
