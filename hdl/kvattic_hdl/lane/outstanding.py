"""What each job still waits for: requests that are to be made, and codewords that are to be accounted for."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import MISSING_BITS, Shapes


def walk_events(config: Config) -> wiring.Signature:
    """A walker's strobes about the job of `slot`: it begins, all requests are made (end), one is taken (asked)."""
    return wiring.Signature({"slot": Out(Shapes(config).slot), "begin": Out(1), "end": Out(1), "asked": Out(1)})


def stored_event(config: Config) -> wiring.Signature:
    """Strobe: a codeword of the job of `slot` is accounted for."""
    return wiring.Signature({"valid": Out(1), "slot": Out(Shapes(config).slot)})


class Outstanding(wiring.Component):
    """Counts the codewords of each slot that were asked for and not accounted for, and tells when a pass is done.

    Those of the first pass count as K.  `start` makes the slot's counts zero.  Reset: likewise all of them.

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
    key_stored, value_stored, feature_stored : In(`stored_event`)
    active : Out(jobs_in_flight)
        A walk of the slot's job has begun.
    keys_begun, keys_walked, values_walked : Out(jobs_in_flight)
        Its K walk has begun; all K (V) requests are made.
    keys_done, values_done, first_done : Out(jobs_in_flight)
        As the lane's, one cycle later.
    keys_wait, values_wait : Out(jobs_in_flight)
        Codewords of K or of the first pass (of V) are outstanding.
    report_slot : In(slot)
    missing_key, missing_value : Out(16), two cycles later
        How many.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        count = shapes.place.width + 1
        self.keys_left = Array(Signal(count, name=f"keys_left_{s}") for s in range(slots))
        self.values_left = Array(Signal(count, name=f"values_left_{s}") for s in range(slots))
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
        first_walked = Signal(self.config.jobs_in_flight)
        for s in range(self.config.jobs_in_flight):
            self._count(m, s)
            self._follow_walks(m, s, first_walked)
            self._tell_done(m, s, first_walked)
            with m.If(self.start[s]):
                m.d.sync += [bits[s].eq(0) for bits in (
                    self.active, first_walked, self.keys_begun, self.keys_walked, self.values_walked, self.keys_done,
                    self.values_done, *([self.first_done] if self.config.sparse else []))]
                m.d.sync += [self.keys_left[s].eq(0), self.values_left[s].eq(0)]
        if not self.config.sparse:
            m.d.comb += self.first_done.eq(-1)

        report_slot = Signal(self.shapes.slot)
        m.d.comb += [
            self.keys_wait.eq(Cat(left != 0 for left in self.keys_left)),
            self.values_wait.eq(Cat(left != 0 for left in self.values_left)),
        ]
        m.d.sync += [
            report_slot.eq(self.report_slot),
            self.missing_key.eq(self.keys_left[report_slot]),
            self.missing_value.eq(self.values_left[report_slot]),
        ]
        return m

    def _count(self, m: Module, s: int) -> None:
        keys_left, values_left = self.keys_left[s], self.values_left[s]
        key_up, key_down, feature_down = (Signal(name=f"{name}_{s}") for name in ("key_up", "key_down", "feature_down"))
        value_up, value_down = Signal(name=f"value_up_{s}"), Signal(name=f"value_down_{s}")
        m.d.comb += [
            key_up.eq((self.key.asked & (self.key.slot == s)) | (self.first.asked & (self.first.slot == s))),
            key_down.eq(self.key_stored.valid & (self.key_stored.slot == s)),
            feature_down.eq(self.feature_stored.valid & (self.feature_stored.slot == s)),
            value_up.eq(self.value.asked & (self.value.slot == s)),
            value_down.eq(self.value_stored.valid & (self.value_stored.slot == s)),
        ]
        if self.config.sparse:
            m.d.sync += keys_left.eq(keys_left + key_up - (key_down + feature_down))
        else:
            with m.If(key_up != key_down):
                m.d.sync += keys_left.eq(keys_left + Mux(key_up, 1, -1))
        with m.If(value_up != value_down):
            m.d.sync += values_left.eq(values_left + Mux(value_up, 1, -1))

    def _follow_walks(self, m: Module, s: int, first_walked: Signal) -> None:
        if self.config.sparse:
            with m.If(self.first.end & (self.first.slot == s)):
                m.d.sync += first_walked[s].eq(1)
            with m.If(self.first.begin & (self.first.slot == s)):
                m.d.sync += self.active[s].eq(1)
        with m.If(self.key.begin & (self.key.slot == s)):
            # A sparse job without places was given up before its first walk began.
            m.d.sync += [self.keys_begun[s].eq(1), self.active[s].eq(self.active[s] | ~self.sparse[s])]
        with m.If(self.key.end & (self.key.slot == s)):
            m.d.sync += self.keys_walked[s].eq(1)
        with m.If(self.value.end & (self.value.slot == s)):
            m.d.sync += self.values_walked[s].eq(1)

    def _tell_done(self, m: Module, s: int, first_walked: Signal) -> None:
        m.d.sync += [
            self.keys_done[s].eq(Mux(
                self.failed[s], self.abandoned[s], self.keys_walked[s] & (self.keys_left[s] == 0))),
            self.values_done[s].eq(Mux(
                self.failed[s], self.abandoned[s], self.values_walked[s] & (self.values_left[s] == 0))),
        ]
        if self.config.sparse:
            m.d.sync += self.first_done[s].eq(first_walked[s] & (self.failed[s] | ~self.remains[s]))
