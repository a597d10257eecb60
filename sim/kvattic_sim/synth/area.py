"""Cells of Xilinx devices, counted."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvattic_sim.synth.netlist import Netlist
from kvattic_sim.synth.verilog import Module

LUTRAM_LUTS = {
    "RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM32X1S": 1, "RAM64X1S": 1,
    "RAM32M16": 8, "RAM64M8": 8, "RAM256X1D": 8, "RAM64X8SW": 8,
}
"""LUTs that a distributed-RAM primitive occupies (Xilinx UG474, table 2-2; UG574, table 2-2)."""


@dataclass(frozen=True, slots=True)
class Area:
    """Cells of one block, or of all.

    Attributes:
        lut: LUT primitives, each as one whatever its inputs, and the LUTs used as RAM or shift register.
        lut_packed: LUT sites after packing, estimated: a site holds two LUTs with at most five inputs together.
        lutram: of both, the LUTs used as RAM or shift register.
        ff: flip-flops.
        dsp: DSP48E1 or DSP48E2.
        bram36: block RAMs of 36 kbit; one of 18 kbit is a half.
    """

    lut: int
    lut_packed: int
    lutram: int
    ff: int
    dsp: int
    bram36: float

    @classmethod
    def of(cls, cells: Mapping[str, int]) -> "Area":
        """Count primitives, given as number by type."""
        memory = sum(n * LUTRAM_LUTS.get(c, 1) for c, n in cells.items() if re.match(r"RAM(32|64|128|256)|SRL", c))
        one, two, three, four, five, six = (cells.get(f"LUT{inputs}", 0) for inputs in range(1, 7))
        # A LUT4 takes a LUT1 along, a LUT3 a LUT2; what is left of LUT1 and LUT2 goes in pairs.
        left = max(0, one - four) + max(0, two - three)
        return cls(
            lut=one + two + three + four + five + six + memory,
            lut_packed=six + five + four + three + -(-left // 2) + memory,
            lutram=memory,
            ff=sum(n for c, n in cells.items() if re.fullmatch(r"FD[RSCP]E", c)),
            dsp=sum(n for c, n in cells.items() if c.startswith("DSP48")),
            bram36=sum(n / (2 if c.startswith("RAMB18") else 1) for c, n in cells.items() if c.startswith("RAMB")),
        )

    def __add__(self, other: "Area") -> "Area":
        """Of both together, packed apart."""
        return Area(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def cells_below(modules: Mapping[str, Module], netlists: Mapping[str, Netlist]) -> dict[str, Counter[str]]:
    """Number of primitives by type, of each module with all below it, by the module's name."""
    whole: dict[str, Counter[str]] = {}

    def visit(name: str) -> Counter[str]:
        if name not in whole:
            instances = modules[name].instances
            count = Counter(cell.type for cell in netlists[name].cells if cell.name not in instances)
            for child in instances.values():
                count.update(visit(child))
            whole[name] = count
        return whole[name]

    for name in modules:
        visit(name)
    return whole
