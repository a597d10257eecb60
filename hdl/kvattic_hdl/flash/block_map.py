"""The map from a zone to the block that stands for it, in each plane of each die."""

from amaranth.hdl import Cat, Module, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.flash.runs import RunShapes


class BlockMap(wiring.Component):
    """Holds the difference to the identity, so that power-up contents of zeros mean that.  Reset changes nothing.

    Parameters
    ----------
    config : Config
    depth : int
        As of `RunShapes`.

    Members
    -------
    unit : In(unit), row : In(row)
        Plane and die, and the row whose zone is looked up.
    block : Out
        Its block, one cycle later; `row` must still be there.
    write : In(1), write_unit : In(unit), write_row : In(row), write_block : In
        Strobe: this block stands for the row's zone from now on.
    """

    def __init__(self, config: Config, depth: int) -> None:
        self.config = config
        self.shapes = shapes = RunShapes(config, depth)
        self.zone_bits = max(1, ceil_log2(config.part.blocks))
        super().__init__({
            "unit": In(shapes.unit_bits),
            "row": In(shapes.row),
            "block": Out(self.zone_bits),
            "write": In(1),
            "write_unit": In(shapes.unit_bits),
            "write_row": In(shapes.row),
            "write_block": In(self.zone_bits),
        })

    def _zone(self, row: Value) -> Value:
        return row[self.config.block_page_bits :][: self.zone_bits]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.differences = differences = Memory(
            shape=unsigned(self.zone_bits), depth=self.shapes.units << self.zone_bits, init=[])
        read, write = differences.read_port(), differences.write_port()
        m.d.comb += [
            read.addr.eq(Cat(self.unit, self._zone(self.row))),
            self.block.eq(read.data ^ self._zone(self.row)),
            write.en.eq(self.write),
            write.addr.eq(Cat(self.write_unit, self._zone(self.write_row))),
            write.data.eq(self.write_block ^ self._zone(self.write_row)),
        ]
        return m
