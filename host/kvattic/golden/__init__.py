"""The golden model: the drive in NumPy, bit-exact."""
