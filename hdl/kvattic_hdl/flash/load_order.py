"""The order in which a channel's dies move their data."""

from amaranth.hdl import Array, Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config


class LoadOrder(wiring.Component):
    """Keeps the dies in the order in which they were loaded.

    The one that waits longest moves its data first, so that it reads again while the others' are moved, and what was
    asked for first arrives first.  Reset: in the order of their numbers.

    Parameters
    ----------
    config : Config

    Members
    -------
    loaded : In(1), loaded_die : In(die)
        Strobe: this die has been loaded; it is the last one now.
    place : In, die : Out(die)
        The die at this place, in the same cycle.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        die = max(1, ceil_log2(config.dies))
        super().__init__({"loaded": In(1), "loaded_die": In(die), "place": In(die), "die": Out(die)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        dies = self.config.dies
        order = Array(Signal(self.die.shape(), init=i, name=f"order_{i}") for i in range(dies))
        m.d.comb += self.die.eq(order[self.place])
        with m.If(self.loaded):
            moved = Const(0, 1)
            for i in range(dies):
                moved = moved | (order[i] == self.loaded_die)
                with m.If(moved):
                    m.d.sync += order[i].eq(order[i + 1] if i + 1 < dies else self.loaded_die)
        return m
