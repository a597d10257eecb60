"""Reads from device DRAM, and page writes and erases."""
