"""Finds the wrong bits of codewords, for one channel or several: syndromes, locator polynomial, search.

Three stages, each of which works on a codeword of its own: syndromes.py (which codeword is next, its syndromes),
locator.py (Berlekamp and Massey's algorithm, and single.py for a single wrong bit) and search.py.
"""

from amaranth.hdl import Array, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from kvattic.spec.config import Config
from kvattic.spec.scheduling import CORRECTOR_POSITIONS
from kvattic_hdl.flash.corrections import corrections_signature
from kvattic_hdl.flash.locator import Locator
from kvattic_hdl.flash.search import Search
from kvattic_hdl.flash.syndromes import Reception

POSITIONS = (1, 2, 4, 8, 16)


class Corrector(wiring.Component):
    """Finds the wrong bits of codewords of several channels, in turn.

    Three steps: the odd syndromes from the remainder, 8 bits of it a cycle; the locator polynomial; a search through
    the bits in their order, `positions` a cycle, which ends with the last wrong one.  The check value is mended along
    with the search, so the data need not be read again.  Where a single bit is wrong the search begins at its word.
    Each step can have a codeword; those of a channel end in their order.

    A channel that wants a correction waits for at most one codeword of each other one, beside those that are worked on;
    no channel can hold up the others, as it takes patches and results whatever stands still behind it.  docs/ecc.md
    has the cycles of `paper`.  Reset forgets all codewords.

    Parameters
    ----------
    config : Config
        The configuration.
    channels : int
        How many share it.
    positions : int
        Bits that are searched in one cycle: 1, 2, 4, 8 or 16.

    Members
    -------
    channels : Array of In(corrections_signature)
        One for each channel.

    Raises
    ------
    ValueError
        `positions` is another number, or `channels` below 1.
    """

    def __init__(self, config: Config, channels: int = 1, positions: int = CORRECTOR_POSITIONS) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, not {channels!r}")
        self.config = config
        self.positions = positions
        self.reception = Reception(config, channels)
        self.locator = Locator(config, channels)
        self.search = Search(config, positions, channels)
        super().__init__({"channels": In(corrections_signature(config)).array(channels)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        reception, locator, search = self.reception, self.locator, self.search
        for name in ("reception", "locator", "search"):
            m.submodules[name] = getattr(self, name)
        for number, channel in enumerate(self.channels):
            mine = search.owner == number
            m.d.comb += [
                reception.wanted[number].eq(channel.wanted),
                reception.chunks[number].eq(channel.chunk),
                reception.chunks_valid[number].eq(channel.chunk_valid),
                channel.taken.eq(reception.taken[number]),
                channel.patches.payload.eq(search.patches.payload),
                channel.patches.valid.eq(search.patches.valid & mine),
                channel.result.eq(search.result),
                channel.ended.eq(search.ended & mine),
            ]
        m.d.comb += search.patches.ready.eq(Array(channel.patches.ready for channel in self.channels)[search.owner])
        for giver, taker, names in (
            (reception, locator, ("there", "owner", "odd", "check")),
            (locator, reception, ("shift", "done")),
            (locator, search, ("load", "coefficient", "begin", "new_owner", "length", "unread", "known", "place",
                               "right", "hopeless")),
            (search, locator, ("free",)),
        ):
            m.d.comb += [getattr(taker, name).eq(getattr(giver, name)) for name in names]
        return m
