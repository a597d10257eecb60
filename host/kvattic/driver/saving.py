"""What is saved of sequences, and how it is checked that the flash still holds it; see manifest.py."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvattic.driver.manifest import Manifest, write_manifest
from kvattic.driver.media import Media
from kvattic.errors import ManifestError
from kvattic.placement.zones import Allocation
from kvattic.spec.commands import Kind

if TYPE_CHECKING:
    from kvattic.driver.sequence import Sequence

__all__ = ["Saver", "states_of"]

Arrays = dict[str, NDArray[Any]]


class Saver:
    """Writes manifests, and keeps the zones that they name from being erased.

    Args:
        media: of the drive.
    """

    def __init__(self, media: Media) -> None:
        self._media = media
        self._pins: dict[Path, Allocation] = {}

    @property
    def used(self) -> bool:
        """Whether it keeps anything."""
        return bool(self._pins)

    def save(self, path: Path, sequences: Series["Sequence"], next_head: int, note: Any) -> None:
        """Write a manifest of sequences for which nothing is under way.

        Args:
            path: the file.
            sequences: what it is of.
            next_head: number of the next sequence's first KV head.
            note: anything that can be JSON.

        Raises:
            OSError: it cannot be written; an earlier file is still there and still true.
        """
        flash, arrays = self._media.allocator.state()
        header: dict[str, Any] = {"flash": flash, "next_head": next_head, "note": note, "sequences": [], "probes": []}
        saved: Arrays = {f"flash.{name}": values for name, values in arrays.items()}
        found: list[NDArray[Any]] = []
        zones: set[int] = set()
        for number, sequence in enumerate(sequences):
            entry = sequence.describe()
            header["sequences"].append(entry)
            zones.update(zone for each in entry["zones"] for zone in each)
            for layer, state in enumerate(sequence.states()):
                saved |= {f"{number}.{layer}.{name}": values for name, values in state.items()}
            for place in sequence.probe_places():
                if (bits := sequence.probe(*place)) is not None:    # what cannot be read says nothing
                    header["probes"].append([number, *place])
                    found.append(bits)
        saved["probes"] = np.array(found, np.uint32)
        # Before the file is there: what it names must not be erased from then on.
        pin = self._media.allocator.pin(zones)
        try:
            write_manifest(path, self._media.config, header, saved)
        except BaseException:
            self._media.allocator.unpin(pin)
            raise
        before, self._pins[path] = self._pins.get(path), pin
        if before is not None:
            self._media.allocator.unpin(before)

    def check(self, path: Path, manifest: Manifest, sequences: Series["Sequence"]) -> None:
        """Read a little of each zone, and compare it with what was there when the manifest was written.

        Raises:
            ManifestError: it is not there any more.
        """
        for (number, *place), wanted in zip(manifest.header["probes"], manifest.arrays["probes"], strict=True):
            found = sequences[number].probe(*place)
            if found is None or not np.array_equal(found, wanted):
                layer, head, stripe, kind = place
                what = {Kind.SKETCH: "the mean keys", Kind.CODES: "the codes"}.get(Kind(kind), "V")
                raise ManifestError(
                    f"{path} does not say what this drive holds: {what} of sequence {number}, layer {layer}, KV head "
                    f"{head}, stripe {stripe} {'cannot be read' if found is None else 'changed'}; the file is of "
                    "another drive, or its flash has been erased since")

    def keep(self, path: Path, sequences: Series["Sequence"]) -> None:
        """Keep the zones of a manifest that was attached."""
        zones = {zone for sequence in sequences for each in sequence.describe()["zones"] for zone in each}
        self._pins[path] = self._media.allocator.pin(zones)

    def discard(self, path: Path) -> None:
        """Remove a manifest; what only it kept may be erased.

        Raises:
            OSError: it cannot be removed.
        """
        path.unlink(missing_ok=True)
        if (pin := self._pins.pop(path, None)) is not None:
            self._media.allocator.unpin(pin)


def states_of(manifest: Manifest, number: int, layers: int) -> list[Mapping[str, NDArray[Any]]]:
    """What a manifest holds of each layer of a sequence."""
    found: list[dict[str, NDArray[Any]]] = [{} for _ in range(layers)]
    for name, values in manifest.arrays.items():
        first, _, rest = name.partition(".")
        if first == str(number):
            layer, _, key = rest.partition(".")
            found[int(layer)][key] = values
    return list(found)
