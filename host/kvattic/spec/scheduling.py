"""How a channel's controller gathers requests, and who shares a corrector: what RTL and timing models agree on."""

from kvattic.spec.config import Config

__all__ = [
    "CORRECTOR_CHANNELS", "CORRECTOR_POSITIONS", "GATHER_TICKS", "GATHER_TICK_BITS", "RUN_PATIENCE",
    "RUN_QUEUE_DEPTH", "channels_of_corrector"]

RUN_QUEUE_DEPTH = 16
"""Runs that the queue of a plane holds; a full one holds up all requests behind."""
RUN_PATIENCE = 32
"""Cycles that a run waits for a request that goes on with it."""
GATHER_TICK_BITS, GATHER_TICKS = 6, 3
"""A die waits for requests of its other planes: so many ticks of 2**GATHER_TICK_BITS cycles, or one less.

A walker that skips codewords takes two cycles for each codeword of a page, wanted or not, and so comes to the next
plane after about 64.
"""
CORRECTOR_CHANNELS = (4, 2, 1)
"""Channels that share a corrector: the first of these that divides their number."""
CORRECTOR_POSITIONS = 16
"""Bits of a codeword that a corrector's search looks at in a cycle."""


def channels_of_corrector(config: Config) -> int:
    """How many of a drive's channels share a corrector."""
    return next(count for count in CORRECTOR_CHANNELS if config.channels % count == 0)
