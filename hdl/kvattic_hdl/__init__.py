"""The Amaranth RTL of kvattic: an engine with one lane for each flash channel, and the flash channels."""

from kvattic_hdl.drive import Drive
from kvattic_hdl.engine import Engine
from kvattic_hdl.flash.channel import FlashChannel
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.flash.phy import PhyShapes, phy_signature
from kvattic_hdl.lib.axi import AXI_READ, AXI_WRITE, axi_lite
from kvattic_hdl.lib.shapes import EPOCH_BITS, OPCODE_BITS, Shapes, operation_code
from kvattic_hdl.storage.dram_reader import dram_signature
from kvattic_hdl.verilog.netlist import TOP, TOPS, generate, verilog_text
from kvattic_hdl.verilog.shared import Netlist, ports

__all__ = [
    "AXI_READ",
    "AXI_WRITE",
    "EPOCH_BITS",
    "OPCODE_BITS",
    "TOP",
    "TOPS",
    "Corrector",
    "Drive",
    "Engine",
    "FlashChannel",
    "Netlist",
    "PhyShapes",
    "Shapes",
    "axi_lite",
    "dram_signature",
    "generate",
    "operation_code",
    "phy_signature",
    "ports",
    "verilog_text",
]
