"""Area and clock of the RTL: Yosys module by module, a static timing estimate, nextpnr for what is routed."""
