"""Verilog text of the RTL, as all tools take it."""
