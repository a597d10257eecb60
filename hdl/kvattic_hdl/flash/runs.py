"""Requests of a channel on their way to its dies: merged into runs, which wait in a queue for each die and plane."""

from typing import Any

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config
from kvattic.spec.scheduling import GATHER_TICK_BITS, GATHER_TICKS, RUN_PATIENCE, RUN_QUEUE_DEPTH
from kvattic_hdl.flash.interfaces import FlashShapes
from kvattic_hdl.lib.shapes import PAGE_BITS


def join(*parts) -> Cat:
    """`Cat` of the (value, bits) pairs, each cut to so many bits; a part of no bits is left out."""
    return Cat(*(value[:bits] for value, bits in parts if bits))


class RunShapes(FlashShapes):
    """`FlashShapes`, and those of the controller's inside.

    A *unit* is a plane of a die: Cat(plane, die), the low bits of a page number.  A *row* is the rest of it: page of
    the block, zone.

    Attributes
    ----------
    die, plane, unit, row : Shape
        Unsigned numbers; of die, plane and unit at least one bit.
    run : StructLayout
        Consecutive codewords of a page, whose places are consecutive, too: row, tag and codeword of the first, codeword
        of the last, again (the same page as the run before it in its queue), stamp (counts runs; tells the older).
    """

    def __init__(self, config: Config, depth: int) -> None:
        super().__init__(config)
        self.depth = depth
        self.unit_bits = config.plane_bits + config.die_bits
        self.units = 1 << self.unit_bits
        self.die = unsigned(max(1, config.die_bits))
        self.plane = unsigned(max(1, config.plane_bits))
        self.unit = unsigned(max(1, self.unit_bits))
        self.row = unsigned(PAGE_BITS - self.unit_bits)
        self.stamp = unsigned(ceil_log2(self.units * depth) + 2)
        self.run = data.StructLayout({
            "row": self.row, "tag": self.tag, "codeword": self.codeword_index, "last": self.codeword_index, "again": 1,
            "stamp": self.stamp})


class RunMerger(wiring.Component):
    """Merges requests into runs.

    A request is merged with the one before when it wants the next codeword of the same page, with the next place and
    otherwise the same tag.  A run ends when a request does not go on with it, when its page ends, or when none has come
    for `patience` cycles.  One request a cycle, two cycles more between runs.  Reset forgets the open run and the last.

    Parameters
    ----------
    config : Config
    depth : int
        As of `RunShapes`.
    patience : int
        Cycles that a run waits for a request that goes on with it.

    Members
    -------
    enable : In(1)
        Requests may be taken.
    requests : In(stream of request)
    runs : Out(stream of run)
        Runs that have ended, from a register: comparing a request takes most of a cycle; `again` is not set.
    unit : Out
        That of the run.
    next_unit : Out
        That of the run that ends next; a cycle before it is `unit`.
    """

    def __init__(self, config: Config, depth: int, patience: int) -> None:
        self.config = config
        self.patience = patience
        self.shapes = shapes = RunShapes(config, depth)
        super().__init__({
            "enable": In(1),
            "requests": In(stream.Signature(shapes.request)),
            "runs": Out(stream.Signature(shapes.run)),
            "unit": Out(shapes.unit_bits),
            "next_unit": Out(shapes.unit_bits),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes, last_codeword = self.shapes, self.config.codewords_per_page - 1
        request = self.requests.payload
        run, unit = Signal(shapes.run), self.next_unit
        opened = Signal()
        next_place = Signal(shapes.place)
        idle = Signal(range(self.patience + 1))
        goes_on, close = Signal(), Signal()
        m.d.comb += [
            goes_on.eq((request.page == Cat(unit, run.row))
                       & (request.codeword == (run.last + 1)[:run.last.shape().width]) & (run.last != last_codeword)
                       & (request.tag.place == next_place) & (request.tag.kind == run.tag.kind)
                       & (request.tag.slot == run.tag.slot) & (request.tag.epoch == run.tag.epoch)),
            close.eq(opened & ((run.last == last_codeword) | (idle == self.patience)
                               | (self.requests.valid & ~goes_on))),
            self.requests.ready.eq(self.enable & (~opened | (goes_on & ~close))),
        ]
        with m.If(self.requests.valid & self.requests.ready):
            m.d.sync += [
                opened.eq(1), idle.eq(0), run.last.eq(request.codeword), next_place.eq(request.tag.place + 1),
            ]
            with m.If(~opened):
                m.d.sync += [
                    unit.eq(request.page), run.row.eq(request.page >> shapes.unit_bits), run.tag.eq(request.tag),
                    run.codeword.eq(request.codeword),
                ]
        with m.Elif(idle != self.patience):
            m.d.sync += idle.eq(idle + 1)
        with m.If(self.runs.ready):
            m.d.sync += self.runs.valid.eq(0)
        with m.If(close & ~self.runs.valid):
            m.d.sync += [
                opened.eq(0), run.stamp.eq(run.stamp + 1),
                self.runs.valid.eq(1), self.runs.payload.eq(run), self.unit.eq(unit)]
        return m


class RunQueues(wiring.Component):
    """Merges requests into runs and queues these by unit.

    A unit whose queue is full holds up all requests behind (see `RunMerger`).  Reset empties the queues, which takes a
    cycle for each; `ready` is low meanwhile.

    Parameters
    ----------
    config : Config
    depth : int
        Runs of each unit's queue, a power of two.
    patience : int
        Cycles that a run waits for a request that goes on with it.

    Members
    -------
    requests : In(stream of request)
    unit : In(unit)
        Which queue the following ports mean.
    behind : In
        How many runs stand before the wanted one.
    run : Out(run)
        One cycle after `unit` and `behind`: what is left of it.
    there : Out(1)
        With `run`: the queue has that many runs.
    step : In(1)
        The first run's first codeword is done.
    pop : In(1)
        It was also the last one: the run is done.  Counts only with `step`, where `unit` was the same a cycle before.
    waiting : Out(units)
        Queues that are not empty.
    growing : Out(dies)
        A queue of the die that was empty has got a run within the last `GATHER_TICKS` ticks: those of the die's other
        planes may be on their way.
    ready : Out(1)
    """

    def __init__(self, config: Config, depth: int = RUN_QUEUE_DEPTH, patience: int = RUN_PATIENCE) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two, at least 2, not {depth!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience!r}")
        self.config = config
        self.patience = patience
        self.shapes = shapes = RunShapes(config, depth)
        self.merger = RunMerger(config, depth, patience)
        super().__init__({
            "requests": In(stream.Signature(shapes.request)),
            "unit": In(shapes.unit),
            "behind": In(range(depth)),
            "run": Out(shapes.run),
            "there": Out(1),
            "step": In(1),
            "pop": In(1),
            "waiting": Out(shapes.units),
            "growing": Out(config.dies),
            "ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shapes = self.shapes
        m.submodules.merger = merger = self.merger
        connect(m, flipped(self.requests), merger.requests)
        m.d.comb += merger.enable.eq(self.ready)
        pointer = unsigned(ceil_log2(shapes.depth) + 1)
        done_bits = bits_for(self.config.codewords_per_page - 1)
        push = Signal()

        # Where each queue is written, and where it is read: the number of its first run, codewords of it that are done.
        cursor = data.StructLayout({"first": pointer, "done": done_bits})
        m.submodules.ends = ends = Memory(shape=pointer, depth=shapes.units, init=[])
        m.submodules.cursors = cursors = Memory(shape=cursor, depth=shapes.units, init=[])
        m.submodules.runs = runs = Memory(shape=shapes.run, depth=shapes.units * shapes.depth, init=[])
        end_new, cursor_new = ends.write_port(), cursors.write_port()
        self._write(m, push, ends.read_port(domain="comb"), end_new, cursors.read_port(domain="comb"),
                    runs.write_port())
        self._read(m, push, ends.read_port(domain="comb"), cursors.read_port(domain="comb"), cursor_new,
                   runs.read_port())
        self._grow(m, push)

        cleared = Signal(shapes.unit_bits + 1)
        m.d.comb += self.ready.eq(cleared[-1])
        with m.If(~self.ready):
            m.d.sync += cleared.eq(cleared + 1)
            m.d.comb += [
                end_new.addr.eq(cleared), end_new.data.eq(0), end_new.en.eq(1),
                cursor_new.addr.eq(cleared), cursor_new.data.eq(0), cursor_new.en.eq(1),
            ]
        return m

    def _write(self, m: Module, push: Signal, end: Any, end_new: Any, cursor: Any, into: Any) -> None:
        """Queue the runs that have ended."""
        shapes, unit, run = self.shapes, self.merger.unit, self.merger.runs.payload
        m.submodules.rows = rows = Memory(shape=shapes.row, depth=shapes.units, init=[])
        row_last, row_new = rows.read_port(domain="comb"), rows.write_port()
        # Whether the queue has room is looked up in the cycle before.  It cannot get full meanwhile.
        room = Signal()
        m.d.sync += room.eq(
            self.merger.runs.valid & ~push & ((end.data - cursor.data.first)[: len(end.data)] != shapes.depth))
        m.d.comb += [
            end.addr.eq(unit),
            cursor.addr.eq(unit),
            row_last.addr.eq(unit),
            self.merger.runs.ready.eq(room),
            push.eq(room),
            into.addr.eq(Cat(end.data[: ceil_log2(shapes.depth)], unit)),
            into.data.eq(run),
            into.data.again.eq(row_last.data == run.row),
            into.en.eq(push),
            end_new.addr.eq(unit), end_new.data.eq(end.data + 1), end_new.en.eq(push),
            row_new.addr.eq(unit), row_new.data.eq(run.row), row_new.en.eq(push),
        ]

    def _read(self, m: Module, push: Signal, end: Any, cursor: Any, cursor_new: Any, out: Any) -> None:
        """Show a queue's first run, without what is done of it, or a later one."""
        shapes = self.shapes
        done, number = Signal.like(cursor.data.done), Signal.like(cursor.data.first)
        waiting = (end.data - cursor.data.first)[: len(end.data)]
        m.d.comb += [
            cursor.addr.eq(self.unit),
            end.addr.eq(self.unit),
            number.eq(cursor.data.first + self.behind),
            out.addr.eq(Cat(number[: ceil_log2(shapes.depth)], self.unit[: shapes.unit_bits])),
            self.run.eq(out.data),
            self.run.codeword.eq(out.data.codeword + done),
            self.run.tag.place.eq(out.data.tag.place + done),
            cursor_new.addr.eq(self.unit),
            cursor_new.en.eq(self.step),
            cursor_new.data.first.eq(cursor.data.first + self.pop),
        ]
        with m.If(~self.pop):
            m.d.comb += cursor_new.data.done.eq(cursor.data.done + 1)
        with m.If(self.behind == 0):
            m.d.sync += done.eq(cursor.data.done)
        with m.Else():
            m.d.sync += done.eq(0)
        m.d.sync += self.there.eq(waiting > self.behind)
        # A cycle before `pop`, as `unit` does not change with it.
        only = Signal()
        m.d.sync += only.eq((waiting == 1) & ~(push & (self.merger.unit == self.unit[: shapes.unit_bits])))
        with m.If(self.step & self.pop & only):
            m.d.sync += self.waiting.bit_select(self.unit, 1).eq(0)
        with m.If(push):
            m.d.sync += self.waiting.bit_select(self.merger.unit, 1).eq(1)

    def _grow(self, m: Module, push: Signal) -> None:
        """Note which queues have got their first run lately, so that a die waits for each of its planes once."""
        unit = self.merger.unit
        tick = Signal(GATHER_TICK_BITS)
        first = Signal()          # of its queue, when the run ended: to look that up takes most of a cycle
        m.d.sync += tick.eq(tick + 1)
        with m.If(~self.merger.runs.valid):
            m.d.sync += first.eq(~self.waiting.bit_select(self.merger.next_unit, 1))
        for die in range(self.config.dies):
            age = Signal(range(GATHER_TICKS + 1), name=f"age_{die}")
            m.d.comb += self.growing[die].eq(age != 0)
            with m.If(push & first & (unit[self.config.plane_bits :] == die)):
                m.d.sync += age.eq(GATHER_TICKS)
            with m.Elif((tick == 0) & (age != 0)):
                m.d.sync += age.eq(age - 1)
