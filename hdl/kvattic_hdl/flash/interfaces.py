"""Shapes of what passes between the blocks of a flash channel."""

from amaranth.hdl import unsigned
from amaranth.lib import data
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import PAGE_BITS, Shapes

CAUSE_BITS = 2
"""Bits of a `commands.MediaCause`; 0: none."""


class FlashShapes(Shapes):
    """`Shapes`, and those that only a flash channel knows.

    Attributes
    ----------
    codeword_index : Shape
        Number of a codeword inside of its page.
    level : Shape
        Read-retry setting; 0 is the default.
    header : StructLayout
        Announces a codeword that will come from the bus: tag, page, codeword, level, cause (`commands.MediaCause`; if
        it is not 0, no words follow: the codeword cannot be read).
    retry : StructLayout
        A codeword to be read again: tag, page, codeword, level (to be used).
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.codeword_index = unsigned(max(1, ceil_log2(config.codewords_per_page)))
        self.level = unsigned(bits_for(config.part.retry_levels))
        self.header = data.StructLayout({
            "tag": self.tag, "page": PAGE_BITS, "codeword": self.codeword_index, "level": self.level,
            "cause": CAUSE_BITS})
        self.retry = data.StructLayout({
            "tag": self.tag, "page": PAGE_BITS, "codeword": self.codeword_index, "level": self.level})
