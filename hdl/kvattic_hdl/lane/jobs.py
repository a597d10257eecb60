"""The parameters of the jobs in flight, and each job's list of stripes, as a lane's blocks read them."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.commands import SKETCH_ENTRY, TABLE_ENTRY, Mode
from kvattic.spec.config import Config
from kvattic_hdl.lane.first_walker import first_stripe_shape, first_walk_shape
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.records import fields, table_entry
from kvattic_hdl.lib.shapes import PAGE_BITS, TOKEN_BITS, Shapes

BLOCK_WORDS = 512
"""Words of a block RAM, which a shorter list takes, too."""


def job_shape(config: Config) -> data.StructLayout:
    """All that a lane keeps of a job: what its walkers need, and fields of `Shapes.start`."""
    shapes = Shapes(config)
    names = ("tree_token", "k_offset", "scale", "read", *(
        ("mode", "unit_bits", "features", "local_token", "sinks") if config.sparse else ()))
    return data.StructLayout(
        {name: field.shape for name, field in shapes.walk} | {name: shapes.start[name].shape for name in names})


def job_readers(config: Config) -> dict[str, tuple[str, ...]]:
    """Who reads a job's parameters, and which of them."""
    walk = tuple(name for name, _ in Shapes(config).walk)
    readers: dict[str, tuple[str, ...]] = {
        "key": walk, "value": walk, "front": ("k_offset",), "faults": ("end_token",),
        "arrivals": ("epoch", "read"), "next": ("stripe_bits",), "score": ("scale", "tree_token")}
    if config.sparse:
        readers["arrivals"] += ("mode", "unit_bits", *(("sinks",) if config.codes else ()))
        readers["score"] += ("unit_bits",)
        readers["first"] = tuple(name for name, _ in first_walk_shape(config))
        readers["selector"] = ("mode", "unit_bits", "end_token", "local_token", "sinks", "stripes")
    return readers


class Jobs(wiring.Component):
    """Keeps each job's parameters from the cycle after its `start`.

    Each reader has a memory of its own with the fields that it reads.  Reset forgets which jobs are sparse.

    Parameters
    ----------
    config : Config

    Members
    -------
    start_valid, start : In
        A job begins.
    stripes, tail : In
        Of its list, in the same cycle.
    begun : Out(jobs_in_flight), begun_sparse : Out(1)
        Strobes, one cycle later: the slot's job can be read from the next cycle on; it is a sparse one.
    sparse : Out(jobs_in_flight)
        The slot's job is a sparse one.
    key, value, front, faults, arrivals, next, score, first, selector : Out, each with slot (In) and job (Out)
        The job of the reader's slot, in the same cycle; see `job_readers`.  The last two only if `config.sparse`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        shape = job_shape(config)
        self.layouts = {
            reader: data.StructLayout({name: shape[name].shape for name in names})
            for reader, names in job_readers(config).items()}
        super().__init__({
            "start_valid": In(1),
            "start": In(shapes.start),
            "stripes": In(shapes.walk["stripes"].shape),
            "tail": In(1),
            "begun": Out(slots),
            "begun_sparse": Out(1),
            "sparse": Out(slots),
        } | {
            reader: Out(wiring.Signature({"slot": In(shapes.slot), "job": Out(layout)}))
            for reader, layout in self.layouts.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        job = Signal(job_shape(self.config))
        started, slot = Signal(), Signal(self.shapes.slot)
        m.d.sync += [
            started.eq(self.start_valid),
            slot.eq(self.start.slot),
            job.stripes.eq(self.stripes),
            job.tail.eq(self.tail),
        ]
        m.d.sync += [job[name].eq(self.start[name]) for name, _ in job.shape() if name not in ("stripes", "tail")]
        m.d.comb += self.begun.eq(strobe(started, slot))
        if self.config.sparse:
            m.d.comb += self.begun_sparse.eq(job.mode != Mode.DENSE)
            with m.If(started):
                m.d.sync += self.sparse.bit_select(slot, 1).eq(self.begun_sparse)
        for reader, layout in self.layouts.items():
            memory = Memory(shape=layout, depth=self.config.jobs_in_flight, init=[], attrs={"ram_style": "distributed"})
            m.submodules[f"{reader}_jobs"] = memory
            write, read = memory.write_port(domain="sync"), memory.read_port(domain="comb")
            port = getattr(self, reader)
            m.d.comb += [write.en.eq(started), write.addr.eq(slot), read.addr.eq(port.slot), port.job.eq(read.data)]
            m.d.comb += [write.data[name].eq(job[name]) for name, _ in layout]
        return m


class StripeLists(wiring.Component):
    """Keeps each slot's list of the job's stripes on this lane's channels, in their order.

    A row record makes the list that is being loaded empty, a table entry with a channel of the lane is appended to it,
    and `start` makes it the slot's; one job is loaded at a time.  Lists follow each other in a ring with room for twice
    the largest one: all that the score ring holds, and one that waits for it; more where a block RAM has the words.  A
    stripe of a sparse job takes the room of as many as it has pages, so what only sparse jobs have needs less depth.
    Lists are given back in the order in which their jobs started.  Reset forgets all of them.

    Parameters
    ----------
    config : Config

    Members
    -------
    lane : In(lane)
        The lane's number, constant.
    load_valid, load : In
        Row records, table entries, and behind each of these its sketch's.
    start_valid, start_slot, start_sparse : In(1), In(slot), In(1)
        Strobe: the slot's job begins; it is a sparse one.
    live : In(jobs_in_flight)
        The slot's job is in flight: from the cycle after its `start` until its list is needed no longer.
    room : Out(1)
        There is room for another list, however long; three cycles after `start`.
    stripes : Out, tail : Out(1)
        Stripes in the list that is being loaded; the last of them is the job's last one.
    key, value : Out, each with address (In) and stripe (Out)
        Of the stripe at Cat(number in the list, slot), one cycle later: where its K or V begins (`Shapes.stripe`).
    first : Out, likewise
        What the first pass reads of it (`first_stripe_shape`).  Only if `config.sparse`.
    arrivals, selector : Out, likewise
        Its first token, and (only if `config.sparse`) whether it is attended whole, and is the sequence's first one.
    sink_slot : In(slot), sink_page : Out
        The first page of K of that slot's sequence, in the same cycle, if its first stripe is in the list.  Only if
        `config.codes`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.tokens = data.StructLayout({"token": TOKEN_BITS} | ({"whole": 1} if config.sparse else {})
                                       | ({"first": 1} if config.codes else {}))
        readers = {"key": shapes.stripe, "value": shapes.stripe, "arrivals": self.tokens}
        if config.sparse:
            readers |= {"first": first_stripe_shape(config), "selector": self.tokens}
        super().__init__({
            "lane": In(shapes.lane),
            "load_valid": In(1),
            "load": In(shapes.load),
            "start_valid": In(1),
            "start_slot": In(shapes.slot),
            "start_sparse": In(1),
            "live": In(config.jobs_in_flight),
            "room": Out(1),
            "stripes": Out(shapes.walk["stripes"].shape),
            "tail": Out(1),
        } | {
            name: Out(wiring.Signature({"address": In(shapes.list_bits + shapes.slot.width), "stripe": Out(shape)}))
            for name, shape in readers.items()
        } | ({"sink_slot": In(shapes.slot), "sink_page": Out(PAGE_BITS)} if config.codes else {}))
        self._unit_bits = ceil_log2(config.group_pages) if config.sparse else 0    # log2 of the stripes of a unit
        self._units = 1 << shapes.list_bits - self._unit_bits                      # of the largest list
        # Units that there is room for: more than the largest list of each slot are never needed.
        slots = 1 << ceil_log2(config.jobs_in_flight)
        self._places = min(slots * self._units, max(2 * self._units, BLOCK_WORDS >> self._unit_bits))
        self._head = Signal(range(self._places), name="head")    # unit where the list begins that is being loaded

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.begins = begins = Memory(
            shape=self._head.shape(), depth=self.config.jobs_in_flight, init=[], attrs={"ram_style": "distributed"})
        self._begins = begins
        self._allocate(m, begins.write_port(domain="sync"))
        entry = table_entry(self.load.data[: TABLE_ENTRY.size * 8])
        append = Signal()
        here = self.shapes.lane_of(entry["channel"]) == self.lane
        m.d.comb += append.eq(self.load_valid & self.load.stripe & here)
        with m.If(append):
            m.d.sync += [self.stripes.eq(self.stripes + 1), self.tail.eq(self.load.last)]
        with m.If(self.load_valid & self.load.record):
            m.d.sync += self.stripes.eq(0)
        for name in ("key", "value"):
            place = Cat(entry[f"{name}_page"], entry["dram"], self.shapes.number_of_lane(entry["channel"]))
            self._list(m, name, place, append, self.stripes)
        whole = entry["dram"] | entry["whole"]
        tokens = Cat(self.load.start, whole, self.load.start == 0)[: self.tokens.size]
        self._list(m, "arrivals", tokens, append, self.stripes)
        if self.config.sparse:
            self._list(m, "selector", tokens, append, self.stripes, sparse=True)
            self._list_first_pass(m, entry, append, whole)
        return m

    def _allocate(self, m: Module, begin: Any) -> None:
        """Where each slot's list begins, and the room that is left."""
        slots, bits = self.config.jobs_in_flight, self._unit_bits
        units = range(self._units + 1)
        m.submodules.lengths = lengths = Memory(
            shape=units, depth=slots, init=[], attrs={"ram_style": "distributed"})
        write, read = lengths.write_port(domain="sync"), lengths.read_port(domain="comb")
        holds, oldest = Signal(slots), Signal(self.shapes.slot)    # slots that have a list; the oldest of them
        used = Signal(range(self._places + 1))
        length, new, given_back = Signal(units), Signal(units), Signal(units)
        give_back = Signal()
        m.d.comb += [
            begin.en.eq(self.start_valid),
            begin.addr.eq(self.start_slot),
            begin.data.eq(self._head),
            write.en.eq(self.start_valid),
            write.addr.eq(self.start_slot),
            length.eq(Mux(self.start_sparse, self.stripes, (self.stripes >> bits) + self.stripes[:bits].any())),
            write.data.eq(length),
            read.addr.eq(oldest),
            give_back.eq((holds & ~self.live).bit_select(oldest, 1)),
        ]
        m.d.sync += [
            new.eq(Mux(self.start_valid, length, 0)),
            given_back.eq(Mux(give_back, read.data, 0)),
            used.eq(used + new - given_back),
            self.room.eq(used <= self._places - self._units),
        ]
        with m.If(give_back):
            m.d.sync += holds.bit_select(oldest, 1).eq(0)
        with m.If(give_back | (~holds.bit_select(oldest, 1) & holds.any())):
            m.d.sync += oldest.eq(Mux(oldest == slots - 1, 0, oldest + 1))
        with m.If(self.start_valid):
            m.d.sync += [self._head.eq(self._head + length), holds.bit_select(self.start_slot, 1).eq(1)]

    def _list(self, m: Module, reader: str, value: Value, valid: Value, number: Value, *, sparse: bool = False) -> None:
        """What a reader reads of the stripes: a memory, written at this number of the list, a unit if `sparse`."""
        port, bits = getattr(self, reader), self.shapes.list_bits
        unit_bits = 0 if sparse else self._unit_bits
        number_bits = ceil_log2(self._units) + unit_bits
        memory = Memory(shape=port.stripe.shape(), depth=self._places << unit_bits, init=[],
                        attrs={"ram_style": "block"})
        m.submodules[f"{reader}_stripes"] = memory
        write, read, begin = (memory.write_port(domain="sync"), memory.read_port(domain="sync"),
                              self._begins.read_port(domain="comb"))
        m.d.comb += [
            write.en.eq(valid),
            # A table that is too long stays within what is free; it is refused.
            write.addr.eq((self._head << unit_bits) + number[:number_bits]),
            Value.cast(write.data).eq(value),
            begin.addr.eq(port.address[bits:]),
            read.addr.eq((begin.data << unit_bits) + port.address[:number_bits]),
            port.stripe.eq(read.data),
        ]

    def _list_first_pass(self, m: Module, entry: dict[str, Value], append: Signal, whole: Value) -> None:
        """Where a stripe's sketch lies, or K of one that is attended whole; the sketch's entry comes behind it."""
        sketch = fields(SKETCH_ENTRY, self.load.data[: SKETCH_ENTRY.size * 8])
        stripe = Signal(first_stripe_shape(self.config))
        appended, key_page, first_token = Signal(), Signal(stripe.page.shape()), Signal(TOKEN_BITS)
        in_dram, is_whole = Signal(), Signal()
        number_of_lane = self.shapes.number_of_lane(entry["channel"])
        of_lane = Signal(len(number_of_lane))
        with m.If(self.load_valid & self.load.stripe):
            m.d.sync += of_lane.eq(number_of_lane)
            m.d.sync += [
                appended.eq(append), key_page.eq(entry["key_page"]), first_token.eq(self.load.start),
                in_dram.eq(entry["dram"]), is_whole.eq(whole)]
        m.d.comb += [
            stripe.page.eq(Mux(is_whole, key_page, sketch["page"])),
            stripe.codeword.eq(Mux(is_whole, 0, sketch["codeword"])),
            stripe.dram.eq(in_dram),
            stripe.whole.eq(is_whole),
            stripe.token.eq(first_token),
        ]
        if self.config.lane_channels > 1:
            m.d.comb += stripe.of_lane.eq(of_lane)
        self._list(m, "first", stripe.as_value(), self.load_valid & self.load.sketch & appended, self.stripes - 1,
                   sparse=True)
        if self.config.codes:
            self._keep_sink_page(m, append & (self.load.start == 0), entry["key_page"])

    def _keep_sink_page(self, m: Module, valid: Value, page: Value) -> None:
        """Where K of the sequence's first tokens lies, beside what the first pass reads of their stripe."""
        m.submodules.sink_pages = pages = Memory(
            shape=PAGE_BITS, depth=self.config.jobs_in_flight, init=[], attrs={"ram_style": "distributed"})
        write, read = pages.write_port(domain="sync"), pages.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(valid),
            write.addr.eq(self.load.slot),
            write.data.eq(page),
            read.addr.eq(self.sink_slot),
            self.sink_page.eq(read.data),
        ]
