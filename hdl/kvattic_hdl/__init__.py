"""The Amaranth RTL of kvattic: one lane for each flash channel, and what joins them."""

from kvattic_hdl.engine import Engine
from kvattic_hdl.interfaces import Shapes
from kvattic_hdl.netlist import TOP, generate, verilog_text

__all__ = ["TOP", "Engine", "Shapes", "generate", "verilog_text"]
