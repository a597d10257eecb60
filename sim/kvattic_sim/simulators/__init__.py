"""Compiles models with Verilator or Icarus, keeps and runs them."""
