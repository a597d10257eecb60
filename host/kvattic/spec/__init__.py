"""What the RTL, the golden device and the driver agree on: formats, commands, registers, layout."""
