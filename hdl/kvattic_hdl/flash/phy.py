"""The PHY interface: what stands between a channel's controller and its NAND pins.

A vendor's ONFI PHY, or the behavioural NAND of the simulation, is its other side.  All signals are synchronous to the
controller's clock; the PHY keeps the pins' own timing (t_cad between cycles, pulse widths, the data rate), the
controller all times that span more than one cycle (t_wb, t_rr, t_ccs, t_adl, t_whr, ready/busy).
"""

from amaranth.hdl import unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config


class PhyShapes:
    """Shapes of the PHY interface for one configuration.

    Attributes
    ----------
    target : Shape
        Number of a die: which chip enable is low.
    cycle : StructLayout
        One command or address cycle: target, address (1: an address, 0: a command), byte.
    burst : StructLayout
        Announces a data burst: target, write (1: into the die), bytes.
    word : Shape
        `word_bytes` bytes of data, the first in the lowest bits; the last word of a burst may be partly used.
    """

    def __init__(self, config: Config) -> None:
        self.target = unsigned(max(1, ceil_log2(config.dies)))
        self.cycle = data.StructLayout({"target": self.target, "address": 1, "byte": 8})
        self.burst = data.StructLayout({
            "target": self.target, "write": 1,
            "bytes": unsigned(bits_for(config.page_bytes + config.part.spare_bytes))})
        self.word = unsigned(config.word_bytes * 8)


def phy_signature(config: Config) -> wiring.Signature:
    """The interface, seen from the controller.

    cycles : Out(stream of cycle)
        Taken when the cycle begins on the pins; the next one is taken `t_cad` later at the earliest.  Where commands
        share the bus with data (not `part.separate_command_bus`), none is taken while a burst moves.
    bursts : Out(stream of burst)
        Taken when the burst begins; not while another one moves, nor (on a shared bus) during a command cycle.  One
        that is offered before the last one ends, and has its target and direction, continues it: no pause, no `t_pre`.
    read : In(word), read_valid : In(1)
        Words of a read burst, at the bus rate, `ceil(bytes / word_bytes)` of them; they cannot be held back.
    write : Out(stream of word)
        Words of a write burst, taken at the bus rate; the burst pauses while none is offered.
    ready : In(dies)
        R/B_n of each die: 1 is ready.
    """
    shapes = PhyShapes(config)
    return wiring.Signature({
        "cycles": Out(stream.Signature(shapes.cycle)),
        "bursts": Out(stream.Signature(shapes.burst)),
        "read": In(shapes.word),
        "read_valid": In(1),
        "write": Out(stream.Signature(shapes.word)),
        "ready": In(config.dies),
    })
