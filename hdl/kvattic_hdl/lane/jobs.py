"""The parameters of the jobs in flight, and each job's list of stripes, as a lane's blocks read them."""

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
        "arrivals": ("epoch", "stripe_bits", "read"), "score": ("scale", "tree_token")}
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
    key, value, front, faults, arrivals, score, first, selector : Out, each with slot (In) and job (Out)
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

    A row record of the slot makes the list empty, a table entry with a channel of the lane is appended to it.

    Parameters
    ----------
    config : Config

    Members
    -------
    lane : In(lane)
        The lane's number, constant.
    load_valid, load : In
        Row records, table entries, and behind each of these its sketch's.
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
        # All stripes of a sparse job are groups.
        self.group_bits = ceil_log2(config.ring_codewords // config.group_codewords) if config.sparse else 0
        self.tokens = data.StructLayout({"token": TOKEN_BITS} | ({"whole": 1, "first": 1} if config.sparse else {}))
        readers = {"key": shapes.stripe, "value": shapes.stripe, "arrivals": self.tokens}
        if config.sparse:
            readers |= {"first": first_stripe_shape(config), "selector": self.tokens}
        super().__init__({
            "lane": In(shapes.lane),
            "load_valid": In(1),
            "load": In(shapes.load),
            "stripes": Out(shapes.walk["stripes"].shape),
            "tail": Out(1),
        } | {
            name: Out(wiring.Signature({"address": In(shapes.list_bits + shapes.slot.width), "stripe": Out(shape)}))
            for name, shape in readers.items()
        } | ({"sink_slot": In(shapes.slot), "sink_page": Out(PAGE_BITS)} if config.codes else {}))

    def elaborate(self, platform: object) -> Module:
        m = Module()
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
            self._list(m, name, place, append, self.stripes, self.shapes.list_bits)
        whole = entry["dram"] | entry["whole"]
        tokens = Cat(self.load.start, whole, self.load.start == 0)[: self.tokens.size]
        self._list(m, "arrivals", tokens, append, self.stripes, self.shapes.list_bits)
        if self.config.sparse:
            self._list(m, "selector", tokens, append, self.stripes, self.group_bits)
            self._list_first_pass(m, entry, append, whole)
        return m

    def _list(self, m: Module, reader: str, value: Value, valid: Value, number: Value, bits: int) -> None:
        """What a reader reads of the stripes: a memory for 2**bits of each slot, written at this number of the list."""
        port = getattr(self, reader)
        memory = Memory(shape=port.stripe.shape(), depth=self.config.jobs_in_flight << bits, init=[],
                        attrs={"ram_style": "block"})
        m.submodules[f"{reader}_stripes"] = memory
        write, read = memory.write_port(domain="sync"), memory.read_port(domain="sync")
        m.d.comb += [
            write.en.eq(valid),
            write.addr.eq(Cat(number[:bits], self.load.slot)),
            Value.cast(write.data).eq(value),
            read.addr.eq(Cat(port.address[:bits], port.address[self.shapes.list_bits :])),
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
                   self.group_bits)
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
