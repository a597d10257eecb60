"""Where K and V lie: zones of flash, and ranges of device DRAM."""
