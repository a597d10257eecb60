"""What a lane has to say about each job: its first offender, and what was clipped or came twice."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.arithmetic import strobe
from kvattic_hdl.lib.shapes import FAULT_BITS, FAULTS, TOKEN_BITS, Shapes


class Faults(wiring.Component):
    """Keeps the lowest token of each fault for each slot, and the slot's flags; none of it depends on the order.

    Takes a beat each cycle; a beat can be read in a report three cycles later.  Reset clears the flags.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : In(jobs_in_flight)
        Strobes: a new job in this slot; forgets what was reported of the last one.
    valid : In(1)
        Strobe: there is a beat.
    slot : In(slot), token : In(24)
        Its job; its token, or the one of its first element if it is of a feature.
    end_token : In(24)
        From this token of the job on nothing is a fault.
    value, sketch, feature : In(1)
        It is of V; of the first pass; of a feature in the feature layout, with a token for each element.
    error : In(1)
        It cannot be read.  Then it has no NaN: its data are zeros.
    special : In(elements_per_beat)
        Its elements that are NaN or infinity.
    score_overflow, value_overflow, duplicate : In(jobs_in_flight)
        Strobes for a slot.
    report_slot : In(slot), report : Out(report), two cycles later
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        slots = config.jobs_in_flight
        super().__init__({
            "start": In(slots),
            "valid": In(1),
            "slot": In(shapes.slot),
            "token": In(TOKEN_BITS),
            "end_token": In(TOKEN_BITS),
            "value": In(1),
            "sketch": In(1),
            "feature": In(1),
            "error": In(1),
            "special": In(config.elements_per_beat),
            "score_overflow": In(slots),
            "value_overflow": In(slots),
            "duplicate": In(slots),
            "report_slot": In(shapes.slot),
            "report": Out(shapes.report),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, shapes = self.config, self.shapes
        slots = config.jobs_in_flight
        numbers = {name: number for number, name in enumerate(FAULTS)}

        # What it is, and which element's token.
        unreadable = Mux(self.value, numbers["unreadable_value"], numbers["unreadable_key"])
        which = Signal(ceil_log2(config.elements_per_beat))
        if config.sparse:
            unreadable = Mux(self.sketch, numbers["unreadable_sketch"], unreadable)
            with m.If(self.feature & ~self.error):
                for e in reversed(range(config.elements_per_beat)):
                    with m.If(self.special[e]):
                        m.d.sync += which.eq(e)
            with m.Else():
                m.d.sync += which.eq(0)
        fault_0, fault_1 = Signal(range(len(FAULTS))), Signal(range(len(FAULTS)))
        token_0, end_token_0, token_1 = (
            Signal(TOKEN_BITS, name=name) for name in ("token_0", "end_token_0", "token_1"))
        slot_0, slot_1 = Signal(shapes.slot), Signal(shapes.slot)
        happened_0, happened_1, inside_1 = Signal(), Signal(), Signal()
        m.d.sync += [
            happened_0.eq((self.special.any() | self.error) & self.valid),
            fault_0.eq(Mux(self.error, unreadable, Mux(self.value, numbers["nan_value"], numbers["nan_key"]))),
            slot_0.eq(self.slot),
            token_0.eq(self.token),
            end_token_0.eq(self.end_token),
        ]
        # Whether it counts.
        token = token_0 + which
        m.d.sync += [
            happened_1.eq(happened_0),
            inside_1.eq(token < end_token_0),
            fault_1.eq(fault_0),
            slot_1.eq(slot_0),
            token_1.eq(token),
        ]
        m.submodules.offenders = offenders = Memory(
            shape=TOKEN_BITS, depth=slots << len(fault_1), init=[], attrs={"ram_style": "distributed"})
        lowest = offenders.read_port(domain="comb")
        lower = offenders.write_port(domain="sync")
        # Which faults a slot has, if it has any; otherwise what stands there is an earlier job's.
        m.submodules.kept = kept = Memory(
            shape=len(FAULTS), depth=slots, init=[], attrs={"ram_style": "distributed"})
        old, keep = kept.read_port(domain="comb"), kept.write_port(domain="sync")
        some, seen_1 = Signal(slots), Signal(len(FAULTS))
        m.d.comb += [
            old.addr.eq(slot_1),
            seen_1.eq(Mux(some.bit_select(slot_1, 1), old.data, 0)),
            lowest.addr.eq(Cat(fault_1, slot_1)),
            lower.addr.eq(Cat(fault_1, slot_1)),
            lower.data.eq(token_1),
            lower.en.eq(happened_1 & inside_1 & (~seen_1.bit_select(fault_1, 1) | (token_1 < lowest.data))),
            keep.addr.eq(slot_1),
            keep.data.eq(seen_1 | (1 << fault_1)),
            keep.en.eq(lower.en),
        ]
        m.d.sync += some.eq((some | strobe(lower.en, slot_1)) & ~self.start)
        flags = {name: Signal(slots, name=f"{name}s") for name in ("score_overflow", "value_overflow", "duplicate")}
        m.d.sync += [flag.eq((flag | getattr(self, name)) & ~self.start) for name, flag in flags.items()]

        report_slot = Signal(shapes.slot)
        fault = Signal(FAULT_BITS, init=len(FAULTS))
        reported, reported_faults = offenders.read_port(domain="comb"), kept.read_port(domain="comb")
        m.d.comb += reported_faults.addr.eq(report_slot)
        for number in reversed(range(len(FAULTS))):
            with m.If(some.bit_select(report_slot, 1) & reported_faults.data[number]):
                m.d.comb += fault.eq(number)
        m.d.comb += reported.addr.eq(Cat(fault[: len(fault_1)], report_slot))
        m.d.sync += [
            report_slot.eq(self.report_slot),
            self.report.fault.eq(fault),
            self.report.token.eq(reported.data),
        ]
        m.d.sync += [self.report[name].eq(flag.bit_select(report_slot, 1)) for name, flag in flags.items()]
        return m
