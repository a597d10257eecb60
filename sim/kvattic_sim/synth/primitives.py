"""How time passes through a primitive: from which pin to which, where paths begin, where they end."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvattic_sim.synth.delays import Delays
from kvattic_sim.synth.netlist import Bit, Cell

CLOCKS = re.compile(r"C|CLK.*|WCLK|WCK")
_CARRY_IN = ("CI", "CIN", "CI_TOP")
_RAM_PAIRS = (("DOA", "ADDRA"), ("DOB", "ADDRB"), ("DOC", "ADDRC"), ("DOD", "ADDRD"), ("DOE", "ADDRE"),
              ("DOF", "ADDRF"), ("DOG", "ADDRG"), ("DOH", "ADDRH"), ("DPO", "DPRA"), ("SPO", "A"),
              ("DO", "RAD"), ("O", "A"))


@dataclass(frozen=True, slots=True)
class Arc:
    """From one bit to another, in `delay` ns; `levels` LUTs."""

    start: Bit
    end: Bit
    delay: float
    levels: int


@dataclass(frozen=True, slots=True)
class Ends:
    """What a primitive does to paths.

    Attributes:
        arcs: through it.
        launched: bits that it drives from a clock, with the delay after it.
        captured: (port, bit, setup time) of those that it takes in with a clock.
    """

    arcs: list[Arc]
    launched: list[tuple[Bit, float]]
    captured: list[tuple[str, Bit, float]]


def _inputs(cell: Cell) -> Iterator[tuple[str, Bit]]:
    for port, bits in cell.pins.items():
        if port not in cell.outputs and not CLOCKS.fullmatch(port):
            for bit in bits:
                yield port, bit


def _driven(cell: Cell) -> list[Bit]:
    return [bit for port in cell.outputs for bit in cell.pins[port]]


def is_lut(kind: str) -> bool:
    """Whether it is a LUT."""
    return re.fullmatch(r"LUT[1-6]", kind) is not None


def is_wide(kind: str) -> bool:
    """Whether it is a multiplexer of LUTs, which stands in their slice."""
    return kind in ("MUXF7", "MUXF8", "MUXF9", "PFUMX", "L6MUX21")


def is_carry(kind: str) -> bool:
    """Whether it is a piece of a carry chain."""
    return kind in ("CARRY4", "CARRY8", "CCU2C")


def is_flip_flop(kind: str) -> bool:
    """Whether it is a flip-flop."""
    return kind == "TRELLIS_FF" or re.fullmatch(r"FD[RSCP]E", kind) is not None


def _carry(cell: Cell, d: Delays) -> Ends:
    chain = {port: cell.pins[port] for port in cell.outputs}
    arcs = []
    for port, bit in _inputs(cell):
        through = port in _CARRY_IN
        for out, bits in chain.items():
            last = len(bits) - 1
            first = 0 if through or len(cell.pins[port]) == 1 else cell.pins[port].index(bit)
            for index in range(first, len(bits)):
                carried = out in ("CO", "COUT") and index == last
                delay = (d.carry if carried else d.carry_out) if through else d.carry_in
                arcs.append(Arc(bit, bits[index], delay, 0))
    return Ends(arcs, [], [])


def _memory(cell: Cell, d: Delays) -> Ends:
    """LUT RAM: reads at once, writes with the clock."""
    arcs = []
    read: set[str] = set()
    for out, address in _RAM_PAIRS:
        if out not in cell.outputs:
            continue
        for port, bits in cell.pins.items():
            if re.fullmatch(address + r"\d*", port):
                read.add(port)
                arcs += [Arc(bit, end, d.ram_read, 1) for bit in bits for end in cell.pins[out]]
    written = [(port, bit, d.ram_setup) for port, bit in _inputs(cell) if not port.startswith(("DPRA", "RAD"))]
    return Ends(arcs, [(bit, d.ram_clock) for bit in _driven(cell)], written)


def _block_memory(cell: Cell, d: Delays) -> Ends:
    def registered(port: str) -> bool:
        side = "A" if port.startswith(("DOA", "DOPA", "DOUTA", "DOUTPA")) else "B"
        value = cell.parameters.get(f"DO{side}_REG", cell.parameters.get(f"REGMODE_{side}", "0"))
        return value == "OUTREG" or value.strip("0") == "1"

    launched = [(bit, d.block_register if registered(port) else d.block_clock)
                for port in cell.outputs for bit in cell.pins[port]]
    return Ends([], launched, [(port, bit, d.block_setup) for port, bit in _inputs(cell)])


def _multiplier(cell: Cell, d: Delays) -> Ends:
    def used(name: str) -> bool:
        return cell.parameters.get(name, "0").strip("0") == "1"

    ecp5 = cell.type == "MULT18X18D"
    if ecp5:
        clocked = {key: cell.parameters.get(f"REG_{key}_CLK", "NONE") != "NONE"
                   for key in ("INPUTA", "INPUTB", "PIPELINE", "OUTPUT")}
        m, p = clocked["PIPELINE"], clocked["OUTPUT"]
    else:
        clocked, m, p = {}, used("MREG"), used("PREG")
    out = _driven(cell)
    arcs, captured = [], []
    fed = False
    for port, bit in _inputs(cell):
        name = re.sub(r"\d+$", "", port)
        operand = name in ("A", "B", "D")
        early = clocked.get(f"INPUT{name}", False) if ecp5 else operand and used(f"{name}REG")
        if operand and early:
            fed = True
            captured.append((port, bit, d.dsp_in))
        elif operand and m:
            captured.append((port, bit, d.dsp_in + d.dsp_multiply))
        elif name in ("A", "B", "C", "D", "PCIN"):
            if name == "C" and used("CREG"):
                captured.append((port, bit, d.dsp_in))
                continue
            delay = d.dsp_in + d.dsp_add + (d.dsp_multiply if operand else 0)
            if p:
                captured.append((port, bit, delay))
            else:
                arcs += [Arc(bit, end, delay + d.dsp_out, 0) for end in out]
        else:
            captured.append((port, bit, d.dsp_in))
    after = d.dsp_out + (0 if p else d.dsp_add + (0 if m else d.dsp_multiply))
    return Ends(arcs, [(bit, after) for bit in out] if p or m or fed else [], captured)


def ends_of(cell: Cell, d: Delays) -> Ends:
    """What a primitive does to paths.

    Args:
        cell: it.
        d: delays of its family.

    Raises:
        ValueError: it is not known.
    """
    kind = cell.type
    if is_lut(kind):
        return Ends([Arc(bit, end, d.lut, 1) for _, bit in _inputs(cell) for end in _driven(cell)], [], [])
    if kind == "INV":
        return Ends([Arc(bit, end, 0.0, 0) for _, bit in _inputs(cell) for end in _driven(cell)], [], [])
    if is_wide(kind):
        return Ends([Arc(bit, end, d.wide_select if port in ("S", "C0", "SD") else d.wide, 0)
                     for port, bit in _inputs(cell) for end in _driven(cell)], [], [])
    if is_carry(kind):
        return _carry(cell, d)
    if is_flip_flop(kind):
        setup = {"D": d.setup, "DI": d.setup, "M": d.setup, "CE": d.enable}
        return Ends([], [(bit, d.clock_to_out) for bit in _driven(cell)],
                    [(port, bit, setup.get(port, d.reset)) for port, bit in _inputs(cell)])
    if re.match(r"RAM(32|64|128|256)|TRELLIS_DPR|SRL", kind):
        return _memory(cell, d)
    if re.match(r"RAMB|DP16KD|PDPW16KD", kind):
        return _block_memory(cell, d)
    if re.match(r"DSP48|MULT18", kind):
        return _multiplier(cell, d)
    raise ValueError(f"no timing is known of {kind} ({cell.name}); add it to kvattic_sim.synth.primitives")
