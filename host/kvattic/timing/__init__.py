"""Predicts the cycles of the drive without its RTL."""
