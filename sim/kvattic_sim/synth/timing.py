"""A small static timing analysis of mapped netlists: the longest paths between registers, across all modules.

What is left out: clock skew and uncertainty, placement, hold times, false paths. A port of the top counts as a
register just outside. `delays` states the model and its sources.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvattic_sim.synth.delays import FAMILIES, Delays
from kvattic_sim.synth.netlist import Bit, Cell, Netlist
from kvattic_sim.synth.primitives import CLOCKS, ends_of, is_carry, is_flip_flop, is_lut, is_wide
from kvattic_sim.synth.verilog import Module


@dataclass(frozen=True, slots=True)
class Path:
    """From a register to a register.

    Attributes:
        block: path of the instance that its end is in, "" for the top; names joined by dots.
        start, end: names of the registers, with the instance's path; of a memory its name.
        levels: LUTs (and reads of LUT RAM) on it.
        ns: the shortest clock period it allows.
        through: types of the primitives on it, in order.
    """

    block: str
    start: str
    end: str
    levels: int
    ns: float
    through: tuple[str, ...]

    @property
    def mhz(self) -> float:
        """The clock that it allows."""
        return 1000 / self.ns


@dataclass
class _Design:
    """All instances of a design on one set of nets."""

    parents: list[int] = field(default_factory=list)          # nets that were joined
    names: dict[int, str] = field(default_factory=dict)
    cells: list[tuple[str, Cell, dict[Bit, int]]] = field(default_factory=list)   # instance, primitive, its wires

    def net(self) -> int:
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def find(self, net: int) -> int:
        root = net
        while self.parents[root] != root:
            root = self.parents[root]
        while self.parents[net] != root:
            self.parents[net], net = root, self.parents[net]
        return root

    def join(self, a: int, b: int) -> None:
        self.parents[self.find(b)] = self.find(a)


def _place(design: _Design, modules: Mapping[str, Module], netlists: Mapping[str, Netlist], name: str, path: str,
           skipped: Callable[[str], bool]) -> dict[Bit, int]:
    """Add an instance and all below it; returns the nets of its wires."""
    netlist, instances = netlists[name], modules[name].instances
    nets: dict[Bit, int] = {}

    def net(bit: Bit) -> int:
        if bit not in nets:
            nets[bit] = design.net()
            if isinstance(bit, int) and bit in netlist.names:
                design.names[nets[bit]] = f"{path}.{netlist.names[bit]}" if path else netlist.names[bit]
        return nets[bit]

    for bits in netlist.ports.values():
        for bit in bits:
            net(bit)
    for cell in netlist.cells:
        wires: dict[Bit, int] = {bit: net(bit) for bits in cell.pins.values() for bit in bits if isinstance(bit, int)}
        if cell.name not in instances:
            design.cells.append((path, cell, wires))
            continue
        below = f"{path}.{cell.name}" if path else cell.name
        if skipped(below):
            continue
        child = instances[cell.name]
        inner = _place(design, modules, netlists, child, below, skipped)
        for port, bits in netlists[child].ports.items():
            for inside, outside in zip(bits, cell.pins.get(port, []), strict=False):
                if isinstance(inside, int) and isinstance(outside, int):
                    design.join(wires[outside], inner[inside])
    return nets


@dataclass(frozen=True, slots=True)
class _Step:
    """A way into a net: from another one through a primitive."""

    start: int
    delay: float
    levels: int
    kind: str


class _Analysis:
    """Arrival times of all nets."""

    def __init__(self, design: _Design, delays: Delays) -> None:
        self.design = design
        self.delays = delays
        self.sinks: dict[int, int] = defaultdict(int)
        self.kinds: dict[int, str] = {}             # of the primitive that drives a net
        self.ways: dict[int, list[_Step]] = defaultdict(list)
        self.arrival: dict[int, float] = {}
        self.levels: dict[int, int] = {}
        self.before: dict[int, _Step | None] = {}
        self.origin: dict[int, str] = {}            # name of the register that begins there
        self.captured: list[tuple[str, str, str, int, float]] = []   # instance, name and type of the end, net, setup
        self._collect()
        self._propagate()

    def _collect(self) -> None:
        find = self.design.find
        parts = []
        for path, cell, wires in self.design.cells:
            at = {bit: find(net) for bit, net in wires.items()}
            for port, bits in cell.pins.items():
                for bit in bits:
                    if bit in at and port in cell.outputs:
                        self.kinds[at[bit]] = cell.type
                    elif bit in at and not CLOCKS.fullmatch(port):
                        self.sinks[at[bit]] += 1
            parts.append((path, cell, at))
        for path, cell, at in parts:
            ends = ends_of(cell, self.delays)
            for bit, delay in ends.launched:
                if bit in at and self.arrival.get(at[bit], -1.0) < delay:
                    self.arrival[at[bit]], self.levels[at[bit]], self.before[at[bit]] = delay, 0, None
                    self.origin[at[bit]] = self._register(path, cell, at[bit])
            for arc in ends.arcs:
                if arc.start in at and arc.end in at:
                    delay = self._net(at[arc.start], cell.type) + arc.delay
                    self.ways[at[arc.end]].append(_Step(at[arc.start], delay, arc.levels, cell.type))
            driven = (at[bit] for port in cell.outputs for bit in cell.pins[port] if bit in at)
            end = self._register(path, cell, next(driven, -1))
            self.captured += [(path, end, cell.type, at[bit], setup) for _, bit, setup in ends.captured if bit in at]

    def _register(self, path: str, cell: Cell, net: int) -> str:
        name = self.design.names.get(net, cell.name) if is_flip_flop(cell.type) else cell.name
        name = name.removeprefix(path + ".")
        name = re.sub(r"(\[\d+\]|(\.\d+)+)$", "", name)
        return f"{path}.{name}" if path else name

    def _net(self, net: int, to: str) -> float:
        """Delay of a net to a primitive of this type."""
        d, start = self.delays, self.kinds.get(net, "")
        if to == "INV":                             # becomes part of what it drives
            return 0.0
        if (is_carry(to) and is_carry(start)) or (is_wide(to) and (is_lut(start) or is_wide(start))):
            return 0.0
        if self.sinks[net] == 1 and ((is_lut(start) and (is_flip_flop(to) or is_carry(to)))
                                     or ((is_carry(start) or is_wide(start)) and is_flip_flop(to))):
            return d.inside
        return d.net + d.spread * math.log2(max(1, self.sinks[net]))

    def _propagate(self) -> None:
        """Longest paths; combinational loops, which Yosys' mapping of unused logic may leave, are not followed."""
        after: dict[int, list[tuple[int, _Step]]] = defaultdict(list)
        missing: dict[int, int] = {}
        for end, steps in self.ways.items():
            missing[end] = len(steps)
            for step in steps:
                after[step.start].append((end, step))
        nets = {*self.kinds, *after}
        ready = [net for net in nets if not missing.get(net)]
        for net in ready:
            if net not in self.arrival:             # a port of the top, or a constant
                self.arrival[net], self.levels[net], self.before[net] = self.delays.clock_to_out, 0, None
                self.origin[net] = self.design.names.get(net, "constant")
        while ready:
            net = ready.pop()
            for end, step in after[net]:
                time = self.arrival[net] + step.delay
                if time > self.arrival.get(end, -1.0):
                    self.arrival[end], self.before[end] = time, step
                    self.levels[end] = self.levels[net] + step.levels
                missing[end] -= 1
                if not missing[end]:
                    ready.append(end)

    def paths(self) -> Iterator[Path]:
        """The longest path to each captured bit."""
        for path, end, kind, net, setup in self.captured:
            if net not in self.arrival:
                continue
            time = self.arrival[net] + self._net(net, kind) + setup
            through: list[str] = []
            start = net
            while (step := self.before[start]) is not None:
                through.append(step.kind)
                start = step.start
            yield Path(path, self.origin[start], end, self.levels[net], time, tuple(reversed(through)))


def analyse(modules: Mapping[str, Module], netlists: Mapping[str, Netlist], top: str, family: str,
            skipped: Callable[[str], bool] = lambda path: False) -> list[Path]:
    """The longest path into each register's pin, the longest first; of several from and to the same registers one.

    Args:
        modules: of the design.
        netlists: of each, mapped for the family.
        top: name of the module that contains all others.
        family: one of `FAMILIES`.
        skipped: instances (by path) that are left out, since they are equal to others.

    Raises:
        ValueError: there is no such family, or a primitive that is not known.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    design = _Design()
    _place(design, modules, netlists, top, "", skipped)
    best: dict[tuple[str, str], Path] = {}
    for path in _Analysis(design, FAMILIES[family]).paths():
        other = best.setdefault((path.start, path.end), path)
        if path.ns > other.ns:
            best[path.start, path.end] = path
    return sorted(best.values(), key=lambda path: -path.ns)


def within(paths: Sequence[Path], block: str) -> list[Path]:
    """Those of the paths whose end is in this block or below it, in their order."""
    return [path for path in paths if not block or path.block == block or path.block.startswith(block + ".")]
