"""Requests of a channel on their way to its dies: merged into runs, which wait in a queue for each die and plane."""

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.flash.interfaces import FlashShapes
from kvattic_hdl.lib.interfaces import PAGE_BITS

TICK_BITS, GATHER_TICKS = 6, 3
"""How long a die waits for requests of its other planes: so many ticks of 2**TICK_BITS cycles, or one less.

A walker that skips codewords takes two cycles for each codeword of a page, wanted or not, and so comes to the next
plane after about 64.
"""


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


class RunQueues(wiring.Component):
    """Merges requests into runs and queues these by unit.

    A request is merged with the one before when it wants the next codeword of the same page, with the next place and
    otherwise the same tag.  A run is queued when a request does not go on with it, when its page ends, or when none has
    come for `patience` cycles.  One request a cycle, two cycles more between runs; a unit whose queue is full holds up
    all requests behind.  Reset empties the queues, which takes a cycle for each; `ready` is low meanwhile.

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
        It was also the last one: the run is done.  Only with `step`.
    waiting : Out(units)
        Queues that are not empty.
    growing : Out(dies)
        A queue of the die that was empty has got a run within the last `GATHER_TICKS` ticks: those of the die's other
        planes may be on their way.
    ready : Out(1)
    """

    def __init__(self, config: Config, depth: int = 16, patience: int = 32) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth must be a power of two, at least 2, not {depth!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience!r}")
        self.config = config
        self.patience = patience
        self.shapes = shapes = RunShapes(config, depth)
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
        config, shapes = self.config, self.shapes
        pointer = unsigned(ceil_log2(shapes.depth) + 1)
        index_bits = ceil_log2(shapes.depth)
        done_bits = bits_for(config.codewords_per_page - 1)

        # Where each queue is written, and where it is read: the number of its first run, codewords of it that are done.
        cursor = data.StructLayout({"first": pointer, "done": done_bits})
        m.submodules.ends = ends = Memory(shape=pointer, depth=shapes.units, init=[])
        m.submodules.cursors = cursors = Memory(shape=cursor, depth=shapes.units, init=[])
        m.submodules.rows = rows = Memory(shape=shapes.row, depth=shapes.units, init=[])
        m.submodules.runs = runs = Memory(shape=shapes.run, depth=shapes.units * shapes.depth, init=[])
        end, end_here = ends.read_port(domain="comb"), ends.read_port(domain="comb")
        end_new = ends.write_port()
        first, here = cursors.read_port(domain="comb"), cursors.read_port(domain="comb")
        here_new = cursors.write_port()
        row_last, row_new = rows.read_port(domain="comb"), rows.write_port()
        out, into = runs.read_port(), runs.write_port()

        # In front: the open run.
        request = self.requests.payload
        opened = Signal()
        run = Signal(shapes.run)
        unit = Signal(shapes.unit_bits)
        next_place = Signal(shapes.place)
        idle = Signal(range(self.patience + 1))
        goes_on, close, push, full = Signal(), Signal(), Signal(), Signal()
        page = Cat(unit, run.row)
        m.d.comb += [
            goes_on.eq((request.page == page) & (request.codeword == (run.last + 1)[:run.last.shape().width])
                       & (run.last != config.codewords_per_page - 1)
                       & (request.tag.place == next_place) & (request.tag.kind == run.tag.kind)
                       & (request.tag.slot == run.tag.slot) & (request.tag.epoch == run.tag.epoch)),
            close.eq(opened & ((run.last == config.codewords_per_page - 1) | (idle == self.patience)
                               | (self.requests.valid & ~goes_on))),
            end.addr.eq(unit),
            first.addr.eq(unit),
            row_last.addr.eq(unit),
            full.eq((end.data - first.data.first)[:pointer.width] == shapes.depth),
            push.eq(close & ~full),
            self.requests.ready.eq(self.ready & (~opened | (goes_on & ~close))),
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
        with m.If(push):
            m.d.sync += [opened.eq(0), run.stamp.eq(run.stamp + 1)]
        m.d.comb += [
            into.addr.eq(Cat(end.data[:index_bits], unit)),
            into.data.eq(run),
            into.data.again.eq(row_last.data == run.row),
            into.en.eq(push),
            end_new.addr.eq(unit), end_new.data.eq(end.data + 1), end_new.en.eq(push),
            row_new.addr.eq(unit), row_new.data.eq(run.row), row_new.en.eq(push),
        ]

        # Behind: the first run, without what is done of it.
        done, number = Signal(done_bits), Signal(pointer)
        m.d.comb += [
            here.addr.eq(self.unit),
            end_here.addr.eq(self.unit),
            number.eq(here.data.first + self.behind),
            out.addr.eq(Cat(number[:index_bits], self.unit[:shapes.unit_bits])),
            self.run.eq(out.data),
            self.run.codeword.eq(out.data.codeword + done),
            self.run.tag.place.eq(out.data.tag.place + done),
            here_new.addr.eq(self.unit),
            here_new.en.eq(self.step),
            here_new.data.first.eq(here.data.first + self.pop),
        ]
        with m.If(~self.pop):
            m.d.comb += here_new.data.done.eq(here.data.done + 1)
        with m.If(self.behind == 0):
            m.d.sync += done.eq(here.data.done)
        with m.Else():
            m.d.sync += done.eq(0)
        m.d.sync += self.there.eq((end_here.data - here.data.first)[:pointer.width] > self.behind)
        with m.If(self.pop & ((end_here.data - here.data.first)[:pointer.width] == 1)):
            m.d.sync += self.waiting.bit_select(self.unit, 1).eq(0)
        with m.If(push):
            m.d.sync += self.waiting.bit_select(unit, 1).eq(1)

        # Only what was empty counts, so that a die waits for each of its planes once.
        tick = Signal(TICK_BITS)
        m.d.sync += tick.eq(tick + 1)
        for die in range(config.dies):
            age = Signal(range(GATHER_TICKS + 1), name=f"age_{die}")
            m.d.comb += self.growing[die].eq(age != 0)
            with m.If(push & (unit[config.plane_bits :] == die) & ~self.waiting.bit_select(unit, 1)):
                m.d.sync += age.eq(GATHER_TICKS)
            with m.Elif((tick == 0) & (age != 0)):
                m.d.sync += age.eq(age - 1)

        swept = Signal(shapes.unit_bits + 1)
        m.d.comb += self.ready.eq(swept[-1])
        with m.If(~self.ready):
            m.d.sync += swept.eq(swept + 1)
            m.d.comb += [
                end_new.addr.eq(swept), end_new.data.eq(0), end_new.en.eq(1),
                here_new.addr.eq(swept), here_new.data.eq(0), here_new.en.eq(1),
            ]
        return m
