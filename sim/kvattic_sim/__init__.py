"""Simulation of kvattic: oracle, NAND parts and models, building and running, reports."""
