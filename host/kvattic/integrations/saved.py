"""Sequences that were saved, for the caches and stores that they are of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvattic.driver.device import Attached, Device
from kvattic.errors import RequestError

__all__ = ["attached"]


@contextmanager
def attached(device: Device, path: Path | str, kind: str, *, capacity_tokens: int | None = None) -> Iterator[Attached]:
    """Attach what was saved; if the block fails, its sequences are freed, and the manifest keeps what is in flash.

    Args:
        device: opened anew, see `Device.attach`.
        path: the manifest.
        kind: what it must be of, the item `kind` of its note.
        capacity_tokens: see `Device.attach`.

    Raises:
        RequestError: it is of something else.
        ManifestError, ConfigMismatchError, CapacityError, OSError: see `Device.attach`.
    """
    found = device.attach(path, capacity_tokens=capacity_tokens)
    try:
        if not isinstance(found.note, dict) or found.note.get("kind") != kind:
            raise RequestError(f"{path} is not of a {kind}")
        yield found
    except BaseException:
        for sequence in found.sequences:
            sequence.free()
        raise
