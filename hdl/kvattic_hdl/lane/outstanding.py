"""What each job still waits for: requests that are to be made, and codewords that are to be accounted for."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.shapes import MISSING_BITS, Shapes


def waiting_scores(config: Config) -> int:
    """Codewords of K that may be stored and not counted yet, a power of two.

    A request comes every other cycle at most, and so does a codeword (it has two beats or more).  So both together are
    counted as they come, if it were not that K is stored later than V that was issued behind it: later by a row sum's
    levels, by the scaler and its neighbours, and by a row's time for each row.  In that time half as many codewords can
    gather.
    """
    later = 16 + 3 * config.rows
    return 1 << (later // 2 + 2).bit_length()


def walk_events(config: Config) -> wiring.Signature:
    """A walker's strobes about the job of `slot`: it begins, all requests are made (end), one is taken (asked)."""
    return wiring.Signature({"slot": Out(Shapes(config).slot), "begin": Out(1), "end": Out(1), "asked": Out(1)})


def stored_event(config: Config) -> wiring.Signature:
    """Strobe: a codeword of the job of `slot` is accounted for."""
    return wiring.Signature({"valid": Out(1), "slot": Out(Shapes(config).slot)})


class Outstanding(wiring.Component):
    """Counts the codewords of each slot that were asked for and not accounted for, and tells when a pass is done.

    Those of the first pass count as K.  `start` makes the slot's counts zero.  The counts stand in a memory, of which
    one is changed in a cycle: requests go first, so that no pass is done too early; what is accounted for waits, K for
    a few cycles where much comes at once.  Reset: nothing is outstanding.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : In(jobs_in_flight)
        Strobes: a job begins in the slot.
    sparse : In(jobs_in_flight)
        The slot's job is a sparse one.
    failed : In(jobs_in_flight)
        It is being abandoned.
    abandoned : In(jobs_in_flight)
        Nothing of it is under way any more.
    remains : In(jobs_in_flight)
        Groups of its first pass have not ended.
    key, value, first : In(`walk_events`)
        All of them together ask every other cycle at most, and not in the cycle of a walk's `end`.
    key_stored, value_stored, feature_stored : In(`stored_event`)
        Each every other cycle at most, value_stored and feature_stored together.
    active : Out(jobs_in_flight)
        A walk of the slot's job has begun.
    keys_begun, keys_walked, values_walked : Out(jobs_in_flight)
        Its K walk has begun; all K (V) requests are made.
    keys_done, values_done, first_done : Out(jobs_in_flight)
        As the lane's, one cycle later.
    keys_wait, values_wait : Out(jobs_in_flight)
        Codewords of K or of the first pass (of V) are outstanding; three cycles after the request, or a few after they
        are accounted for.
    report_slot : In(slot)
    missing_key, missing_value : Out(16), two cycles later
        How many.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        self.change = data.StructLayout({"slot": shapes.slot, "value": 1})   # whose count
        super().__init__({
            name: In(slots) for name in ("start", "sparse", "failed", "abandoned", "remains")
        } | {
            name: In(walk_events(config)) for name in ("key", "value", "first")
        } | {
            name: In(stored_event(config)) for name in ("key_stored", "value_stored", "feature_stored")
        } | {
            name: Out(slots) for name in (
                "active", "keys_begun", "keys_walked", "values_walked", "keys_done", "values_done", "first_done",
                "keys_wait", "values_wait")
        } | {
            "report_slot": In(shapes.slot),
            "missing_key": Out(MISSING_BITS + 1),
            "missing_value": Out(MISSING_BITS + 1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._count(m)
        self._follow_walks(m)
        return m

    def _next_change(self, m: Module) -> tuple[Signal, Signal, data.View]:
        """The change of this cycle, chosen in the one before.

        Returns whether there is one, whether it is a request, and whose count it changes.
        """
        slot = self.shapes.slot
        asked, whose = Signal(), Signal(self.change)
        m.d.sync += [
            asked.eq(self.key.asked | self.value.asked | self.first.asked),
            whose.value.eq(self.value.asked),
            whose.slot.eq(Mux(self.value.asked, self.value.slot,
                              Mux(self.key.asked, self.key.slot, self.first.slot))),
        ]
        # A codeword of V or of features waits for a request of its cycle; none comes in the next one.
        stored, stored_whose = Signal(), Signal(self.change)
        with m.If(self.value_stored.valid | self.feature_stored.valid):
            m.d.sync += [
                stored.eq(1),
                stored_whose.value.eq(self.value_stored.valid),
                stored_whose.slot.eq(Mux(self.value_stored.valid, self.value_stored.slot, self.feature_stored.slot)),
            ]
        with m.Elif(~asked):
            m.d.sync += stored.eq(0)

        depth = waiting_scores(self.config)
        m.submodules.scores = scores = Memory(shape=slot, depth=depth, init=[], attrs={"ram_style": "distributed"})
        write, read = scores.write_port(domain="sync"), scores.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.key_stored.valid), write.data.eq(self.key_stored.slot)]
        m.d.sync += write.addr.eq(write.addr + self.key_stored.valid)
        score = Signal()
        m.d.comb += score.eq((read.addr != write.addr) & ~asked & ~stored)
        m.d.sync += read.addr.eq(read.addr + score)

        valid, up, change = Signal(), Signal(), Signal(self.change)
        m.d.sync += [valid.eq(asked | stored | score), up.eq(asked)]
        with m.If(asked):
            m.d.sync += change.eq(whose)
        with m.Elif(stored):
            m.d.sync += change.eq(stored_whose)
        with m.Else():
            m.d.sync += [change.slot.eq(read.data), change.value.eq(0)]
        return valid, up, change

    def _count(self, m: Module) -> None:
        """Keep the counts.  Which ones are not zero is known beside them; what the memory has of the others is old."""
        slots, count = self.config.jobs_in_flight, self.shapes.place.width + 1
        m.submodules.counts = counts = Memory(
            shape=count, depth=2 * slots, init=[], attrs={"ram_style": "distributed"})
        write, left = counts.write_port(domain="sync"), counts.read_port(domain="comb")
        valid, up, change = self._next_change(m)
        waits = Mux(change.value, self.values_wait, self.keys_wait).bit_select(change.slot, 1)
        address = Cat(change.value, change.slot)
        old, last = Signal(count), Signal()
        m.d.comb += [
            old.eq(Mux(waits, left.data, 0)),
            last.eq(left.data == 1),
            left.addr.eq(address),
            write.addr.eq(address),
            write.en.eq(valid),
            write.data.eq(old + Cat(1, (~up).replicate(count - 1))),
        ]
        for wait, mine in ((self.keys_wait, ~change.value), (self.values_wait, change.value)):
            chosen = Signal(slots, name="changed_value" if wait is self.values_wait else "changed_key")
            m.d.comb += chosen.eq(strobe(valid & mine & (up | last), change.slot))
            m.d.sync += wait.eq(Mux(up, wait | chosen, wait & ~chosen) & ~self.start)

        report_slot = Signal(self.shapes.slot)
        m.d.sync += report_slot.eq(self.report_slot)
        for value, wait, missing in ((0, self.keys_wait, self.missing_key), (1, self.values_wait, self.missing_value)):
            read = counts.read_port(domain="comb")
            m.d.comb += read.addr.eq(Cat(value, report_slot))
            m.d.sync += missing.eq(Mux(wait.bit_select(report_slot, 1), read.data, 0))

    def _follow_walks(self, m: Module) -> None:
        """What of each job is asked for, and what is done."""
        key, value, first = self.key, self.value, self.first
        first_walked = Signal(self.config.jobs_in_flight)
        key_at, value_at, first_at = (Signal.like(self.start, name=f"{name}_at") for name in ("key", "value", "first"))
        m.d.comb += [at.eq(1 << walk.slot) for at, walk in ((key_at, key), (value_at, value), (first_at, first))]

        def begun(walk: Value, at: Value) -> Value:
            return Mux(walk, at, 0)

        # A sparse job without places was given up before its first walk began.
        active = self.active | begun(key.begin, key_at & ~self.sparse)
        if self.config.sparse:
            active = active | begun(first.begin, first_at)
            m.d.sync += [
                first_walked.eq((first_walked | begun(first.end, first_at)) & ~self.start),
                self.first_done.eq(first_walked & (self.failed | ~self.remains) & ~self.start),
            ]
        else:
            m.d.comb += self.first_done.eq(-1)
        m.d.sync += [
            self.active.eq(active & ~self.start),
            self.keys_begun.eq((self.keys_begun | begun(key.begin, key_at)) & ~self.start),
            self.keys_walked.eq((self.keys_walked | begun(key.end, key_at)) & ~self.start),
            self.values_walked.eq((self.values_walked | begun(value.end, value_at)) & ~self.start),
        ]
        for done, walked, wait in ((self.keys_done, self.keys_walked, self.keys_wait),
                                   (self.values_done, self.values_walked, self.values_wait)):
            # The last request of a walk counts a cycle after its end is known.
            counted = Signal.like(walked, name=f"counted_{walked.name}")
            m.d.sync += [
                counted.eq(walked & ~self.start),
                done.eq(((self.failed & self.abandoned) | (~self.failed & counted & ~wait)) & ~self.start),
            ]
