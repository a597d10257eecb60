"""The drive's RTL in a simulator: test bench, transport, jobs, server."""
