"""How a channel's controller gathers requests: what its RTL and the timing model agree on."""

__all__ = ["GATHER_TICKS", "GATHER_TICK_BITS", "RUN_PATIENCE", "RUN_QUEUE_DEPTH"]

RUN_QUEUE_DEPTH = 16
"""Runs that the queue of a plane holds; a full one holds up all requests behind."""
RUN_PATIENCE = 32
"""Cycles that a run waits for a request that goes on with it."""
GATHER_TICK_BITS, GATHER_TICKS = 6, 3
"""A die waits for requests of its other planes: so many ticks of 2**GATHER_TICK_BITS cycles, or one less.

A walker that skips codewords takes two cycles for each codeword of a page, wanted or not, and so comes to the next
plane after about 64.
"""
