"""The Amaranth RTL of kvattic: one lane for each flash channel, and what joins them."""

from kvattic_hdl.axi import AXI_READ, AXI_WRITE, axi_lite
from kvattic_hdl.engine import Engine
from kvattic_hdl.interfaces import EPOCH_BITS, Shapes
from kvattic_hdl.netlist import TOP, generate, verilog_text

__all__ = ["AXI_READ", "AXI_WRITE", "EPOCH_BITS", "TOP", "Engine", "Shapes", "axi_lite", "generate", "verilog_text"]
