"""Ways to reach a drive: its registers and memory, in a simulator's process or behind a PCIe driver."""
