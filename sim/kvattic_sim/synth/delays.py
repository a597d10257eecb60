"""Delays of primitives and nets, by family: the numbers of the timing estimate and where they come from.

A path is registers' clock to output, then for each step a net and a primitive, then a net and the end's setup time.
Yosys knows no places, so a net is estimated by its fan-out alone: ``net + spread * log2(sinks)`` ns. Nets that stay
inside a slice (LUT to flip-flop, LUT to carry or wide multiplexer, carry to carry) take `inside` ns.

xcup: UltraScale+ at -1, the slowest grade at 0.85 V. Slice and DSP: what Vivado 2021.2 prints for an xczu3eg-sbva484,
speed file "-1 PRODUCTION 1.29 08-03-2020", in published timing reports (futil's evaluation, July 2022): LUT 0.039 to
0.179 by pin (0.10 here), FDRE C to Q 0.095 to 0.097, its setup -0.027 (0 here), CARRY8 S to CO 0.21 to 0.25, CI to CO
0.116, CI to O 0.146, MUXF7 0.082, DSP48E2 multiplier 0.737, M register 0.059, ALU 0.699, output 0.141. Its routed
nets: 0.15 to 0.35 with one or two sinks, 0.27 with 19 or 73, 0.50 with 96, 0.01 to 0.06 inside a slice; so 0.25 +
0.035 log2. Two of these paths are a test of the estimator. Clock to output of the block RAM: 0.83 ns in a published
report of an Alveo U280 (-2L); 1.0 here, for -1. LUT RAM: the LUT's delay from its address, and 7-series' clock to
output scaled like a flip-flop's.

xc7: Artix-7 at -1. Yosys' cell library, which has these numbers from Project X-Ray's timing data base of the xc7a50t
(block RAM, DSP, carry, LUT RAM), LUT 0.124, FDRE C to Q 0.456, as Vivado's reports of -1 parts print (Xilinx DS181,
CLB and block RAM tables, has the same parameters by name: TILO, TCKO, TRCKO_DO). Routed nets in such reports (a
published SHA-256 on a Zynq-7000): 0.58 to 1.19 with one to seven sinks; so 0.55 + 0.07 log2.

ecp5: LFE5U at speed grade 8. Project Trellis' timing data base, ECP5/timing/speed_8/cells.json, which nextpnr uses
too. Its nets are fitted to nextpnr's routed results: docs/measurements.md has the ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays in nanoseconds.

    Attributes:
        lut, wide, wide_select: a LUT; a multiplexer of LUTs from its data inputs, and from its select input.
        carry_in, carry_out, carry: from an operand into a carry chain's cell to an output, from the chain to a sum, and
            through a cell.
        clock_to_out, setup, enable, reset: of a flip-flop: its output, and what its pins must come early.
        ram_read, ram_clock, ram_setup: LUT RAM: from the address, from the write clock, and of what is written.
        block_clock, block_register, block_setup: block RAM: its output without and with the output register.
        dsp_in, dsp_multiply, dsp_add, dsp_out: parts of a multiplier's time: into its first register, to the one behind
            the multiplication, from it through the adder, and out of the last.
        net, spread, inside: see the module.
    """

    lut: float
    wide: float
    wide_select: float
    carry_in: float
    carry_out: float
    carry: float
    clock_to_out: float
    setup: float
    enable: float
    reset: float
    ram_read: float
    ram_clock: float
    ram_setup: float
    block_clock: float
    block_register: float
    block_setup: float
    dsp_in: float
    dsp_multiply: float
    dsp_add: float
    dsp_out: float
    net: float
    spread: float
    inside: float


FAMILIES: Mapping[str, Delays] = {
    "xcup": Delays(
        lut=0.10, wide=0.08, wide_select=0.10, carry_in=0.25, carry_out=0.146, carry=0.116, clock_to_out=0.097,
        setup=0.0, enable=0.06, reset=0.08, ram_read=0.12, ram_clock=0.40, ram_setup=0.10, block_clock=1.0,
        block_register=0.30, block_setup=0.30, dsp_in=0.20, dsp_multiply=0.80, dsp_add=0.70, dsp_out=0.15, net=0.25,
        spread=0.035, inside=0.03),
    "xc7": Delays(
        lut=0.124, wide=0.223, wide_select=0.296, carry_in=0.55, carry_out=0.313, carry=0.114, clock_to_out=0.456,
        setup=0.03, enable=0.205, reset=0.524, ram_read=0.20, ram_clock=1.19, ram_setup=0.45, block_clock=2.454,
        block_register=0.882, block_setup=0.6, dsp_in=0.25, dsp_multiply=1.7, dsp_add=1.0, dsp_out=0.33, net=0.55,
        spread=0.07, inside=0.0),
    "ecp5": Delays(
        lut=0.18, wide=0.126, wide_select=0.193, carry_in=0.50, carry_out=0.349, carry=0.056, clock_to_out=0.395,
        setup=0.0, enable=0.0, reset=0.287, ram_read=0.18, ram_clock=0.717, ram_setup=0.27, block_clock=4.263,
        block_register=0.738, block_setup=0.26, dsp_in=0.042, dsp_multiply=1.985, dsp_add=1.113, dsp_out=0.578,
        net=0.75, spread=0.1, inside=0.0),
}
"""By family."""
