"""What is printed and kept: the drive's report, sweeps, synthesis, benchmarks, generated documents."""
