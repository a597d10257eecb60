"""The manifest: a file that says what a drive's flash holds, so that it can be used again after the process has ended.

It is a header, JSON, and arrays (NumPy's npz), behind a format version, a length and a checksum.  docs/host.md says
what is in it, and what becomes of an interrupted save, of another drive, and of one that went on without it.
"""

import io
import json
import os
import struct
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import ConfigMismatchError, ManifestError
from kvattic.spec.config import Config
from kvattic.support.files import whole

__all__ = ["FORMAT", "Manifest", "read_manifest", "write_manifest"]

FORMAT = 1
"""Version of the file's format; others are refused."""
_MAGIC = b"kvattic\n"
_FRONT = struct.Struct("<8sIIQ32s")     # magic, format, CONFIG_HASH, bytes that follow, their checksum
_HEADER = "header"

Arrays = Mapping[str, NDArray[Any]]


class Manifest(NamedTuple):
    """What a manifest says.

    Members:
        header: what can be JSON.
        arrays: the rest, by name.
    """

    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def write_manifest(path: Path, config: Config, header: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a manifest, all of it or nothing; when this returns, the file is on the disk.

    Args:
        path: the file; one that is there is replaced.
        config: of the drive.
        header: what can be JSON.
        arrays: the rest.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    text = json.dumps({**header, "config": config.to_json()}).encode()
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **{_HEADER: np.frombuffer(text, np.uint8), **dict(arrays)})
    body = packed.getvalue()
    front = _FRONT.pack(_MAGIC, FORMAT, config.hash, len(body), blake2b(body, digest_size=32).digest())
    with whole(path) as aside, aside.open("wb") as file:
        file.write(front + body)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)    # the new name, too
    finally:
        os.close(folder)


def read_manifest(path: Path, config: Config) -> Manifest:
    """Read a manifest.

    Args:
        path: the file.
        config: of the drive.

    Raises:
        ManifestError: the file is no manifest, is incomplete or damaged, or has another format.
        ConfigMismatchError: it is of a drive with another configuration.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if len(data) < _FRONT.size or data[: len(_MAGIC)] != _MAGIC:
        raise ManifestError(f"{path} is no manifest of a drive")
    _, version, hashed, size, digest = _FRONT.unpack_from(data)
    if version != FORMAT:
        raise ManifestError(f"{path} has format {version}, this library reads {FORMAT}: load it with the version that "
                            "wrote it")
    body = data[_FRONT.size :]
    if len(body) != size or blake2b(body, digest_size=32).digest() != digest:
        raise ManifestError(f"{path} is damaged: it has {len(body):,} bytes of {size:,}, and its checksum is "
                            f"{'wrong' if len(body) == size else 'not looked at'}")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
        header: dict[str, Any] = json.loads(arrays.pop(_HEADER).tobytes())
    except (ValueError, KeyError, BadZipFile) as error:
        raise ManifestError(f"{path} cannot be understood: {error}") from error
    if hashed != config.hash or header["config"] != config.to_json():
        raise ConfigMismatchError(f"{path} is of a drive with another configuration: {header['config']}, not "
                                  f"{config.to_json()}")
    return Manifest(header, arrays)
