"""Where compiled models are kept, and how several processes share it."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from kvattic.support.files import write_whole
from kvattic_sim.simulators.base import SimulatorError

__all__ = ["CACHE", "cache_errors", "default_build_root", "digest_of", "locked", "tag"]


CACHE = "KVATTIC_CACHE"
"""Environment variable that names the directory of the build cache."""
_FORMAT = 1  # raise it when the way models are built changes in a manner that the hash does not see


def default_build_root() -> Path:
    """Return where models are kept: ``sim`` below the directory that ``KVATTIC_CACHE`` names.

    Without that variable it is ``build/sim`` of the source tree if this runs from one that can be
    written, and otherwise ``sim`` below the user's cache directory by the platform's convention
    (under Linux ``$XDG_CACHE_HOME/kvattic``, or ``~/.cache/kvattic``). The current directory has no
    influence: an installed package compiles each configuration once, wherever it is used.
    """
    if place := os.environ.get(CACHE):
        return Path(place).expanduser().absolute() / "sim"
    tree = Path(__file__).resolve().parents[3]
    if (tree / "pyproject.toml").is_file():
        build = tree / "build"
        if os.access(build if build.exists() else tree, os.W_OK | os.X_OK):
            return build / "sim"
    return platformdirs.user_cache_path("kvattic", appauthor=False) / "sim"


@contextlib.contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turn OSErrors of a block into :class:`SimulatorError` that say where the build cache is.

    Args:
        root: the cache's directory, in which the block writes.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None or error.filename == str(root) else f": {error.filename}"
        raise SimulatorError(
            f"cannot write to the build cache in {root}{where}: {error.strerror or error}; "
            f"{CACHE} names another directory"
        ) from error


_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# What kvattic compiled; it may be deleted at any time.\n"


def tag(root: Path) -> None:
    """Mark a cache outside of a source tree, so that backups leave it out (bford.info/cachedir)."""
    tag = root / "CACHEDIR.TAG"
    if not tag.is_file():
        write_whole(tag, _TAG)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which other processes wait for, during a block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when this process dies


def digest_of(*parts: object) -> str:
    """The name of some content in the cache: equal for equal parts."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], default=str).encode()).hexdigest()[:16]
