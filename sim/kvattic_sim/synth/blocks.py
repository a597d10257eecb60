"""A design block by block: area of each, and its longest paths."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvattic.spec.config import Config
from kvattic_hdl import TOP, verilog_text
from kvattic_sim.synth.area import Area, cells_below
from kvattic_sim.synth.mapping import mapped_modules
from kvattic_sim.synth.timing import Path, analyse, within
from kvattic_sim.synth.verilog import Module, split

OPENED = 1500
"""LUTs from which a block's parts are shown."""
SHOWN = 50
"""LUTs from which a part is shown."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the table.

    Attributes:
        path: names of the instances from the top on, joined by dots.
        count: how many there are of it in its parent; lanes and channels are shown once.
        area: of one, with all below it.
    """

    path: str
    count: int
    area: Area


def _repeated(path: str) -> tuple[str, int] | None:
    """What a lane, a channel or a corrector is one of, and its number."""
    name = path.removesuffix(".instance")
    found = re.search(r"(?:^|\.)((?:lane|channel|corrector)_)(\d+)$", name)
    return (name[:found.start(2)], int(found.group(2))) if found else None


class Design:
    """The whole drive of a configuration, synthesised.

    Args:
        config: it.
        families: of devices, the first one for the area.
        note: is told how far it is.
    """

    def __init__(self, config: Config, families: Sequence[str] = ("xc7", "xcup"),
                 note: Callable[[str], None] = lambda _: None) -> None:
        self.modules: Mapping[str, Module] = split(verilog_text(config, TOP))
        self.families = tuple(families)
        self.config = config
        self.channels = config.channels
        self._netlists = {}
        for family in self.families:
            def follow(text: str, family: str = family) -> None:
                note(f"{family}, {text}")

            self._netlists[family] = mapped_modules(self.modules, family, follow)
        self._cells = cells_below(self.modules, self._netlists[self.families[0]])

    def _equal_to_another(self, path: str) -> bool:
        """Lanes between the first and the last, channels and correctors but the first: as the others are."""
        found = _repeated(path)
        if found is None:
            return False
        name, number = found
        return number > 0 and (name.endswith(("channel_", "corrector_")) or number < self.channels - 1)

    @cached_property
    def paths(self) -> Mapping[str, list[Path]]:
        """The longest paths, by family."""
        return {family: analyse(self.modules, self._netlists[family], TOP, family, self._equal_to_another)
                for family in self.families}

    def area(self, path: str) -> Area:
        """Of the instance at this path ("" for the drive), with all below it.

        Raises:
            KeyError: there is none.
        """
        return Area.of(self._cells[self._module(path)])

    def _module(self, path: str) -> str:
        name = TOP
        for part in path.split(".") if path else ():
            name = self.modules[name].instances[part]
        return name

    def worst(self, family: str, path: str) -> list[Path]:
        """The longest paths that end in a block, the longest first; of equal lanes the first and the last count."""
        return within(self.paths[family], path)

    def blocks(self, path: str) -> Iterator[Block]:
        """A block and its parts, those of large parts too, each before what is in it."""
        yield Block(path, 1, self.area(path))
        yield from self._parts(path)

    def _parts(self, path: str) -> Iterator[Block]:
        counts: dict[str, int] = {}
        parts = [(f"{path}.{name}" if path else name) for name in self.modules[self._module(path)].instances]
        for part in parts:
            if found := _repeated(part):
                counts[found[0]] = counts.get(found[0], 0) + 1
        for part in sorted(parts, key=lambda part: -self.area(part).lut):
            found = _repeated(part)
            area = self.area(part)
            if area.lut < SHOWN or (found and found[1]):
                continue
            wrapper = part.endswith(".instance")
            if not wrapper:
                yield Block(part, counts[found[0]] if found else 1, area)
            if area.lut >= OPENED or wrapper:
                yield from self._parts(part)
