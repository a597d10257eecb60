"""The flash of a simulated drive in a file, so that it outlives the simulator."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvattic.spec.config import Config
from kvattic.support.files import whole

__all__ = ["FlashFile"]

Pages = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""Raw pages of a channel: their indices (`NandPart.page_index`), and their bytes, a row each."""


class FlashFile:
    """A file of raw pages, which one process has at a time; another one waits for it.

    Args:
        path: the file, which need not be there.
        config: of the drive.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self._path = path
        self._config = config
        # Beside it, because the file itself is replaced as a whole.
        self._lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def read(self) -> list[Pages] | None:
        """What it holds, of each channel; None: it is not there.

        Raises:
            RuntimeError: it is of a drive with another configuration.
        """
        if not self._path.exists():
            return None
        with np.load(self._path, allow_pickle=False) as packed:
            if (found := packed["config"].tobytes().decode()) != self._config.to_json():
                raise RuntimeError(f"{self._path} is the flash of a drive with another configuration: {found}")
            return [(packed[f"indices{each}"], packed[f"pages{each}"]) for each in range(self._config.channels)]

    def write(self, pages: Sequence[Pages]) -> None:
        """Replace it, as a whole, and let others have it."""
        arrays: dict[str, NDArray[Any]] = {"config": np.frombuffer(self._config.to_json().encode(), np.uint8)}
        for channel, (indices, data) in enumerate(pages):
            arrays |= {f"indices{channel}": indices, f"pages{channel}": data}
        with whole(self._path) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.close(self._lock)
