"""The golden device's flash in a file: a log of what was programmed and erased, which outlives the process.

Each record is written at once and whole before the command completes, so that a killed process loses nothing that was
acknowledged; a record that is cut short at the end of the file is dropped.
"""

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvattic.errors import ConfigMismatchError, RequestError
from kvattic.spec.config import Config
from kvattic.spec.layout import Block

__all__ = ["FlashImage", "Record"]

_MAGIC = b"kvattic flash 1\n"
_SIZE = struct.Struct("<I")
_RECORD = struct.Struct("<BBBBIIIII")
"""Kind, channel, die, plane, block, page of the block, page number, bytes that follow, CRC-32 of all the others."""
_PROGRAM, _GARBAGE, _ERASE = range(1, 4)


class Record(NamedTuple):
    """A change of a block.

    Members:
        block: which.
        page: of the block, that was programmed; None: the block was erased.
        number: the page number that it was programmed under.
        image: uint8, (page_bytes,), what was programmed; None: garbage.
    """

    block: Block
    page: int | None = None
    number: int = 0
    image: NDArray[np.uint8] | None = None


class FlashImage:
    """A file with the contents of a flash.

    Args:
        path: the file; made if it is not there.  Only one process can have it at a time.
        config: of the drive.

    Raises:
        RequestError: another process has it, or it is no such file.
        ConfigMismatchError: it is of a drive with another configuration.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | str, config: Config) -> None:
        self._path = Path(path)
        self._front = _MAGIC + _SIZE.pack(len(text := config.to_json().encode())) + text
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(f"{path} is the flash of a device that is open already") from None
            self._check_front()
        except BaseException:
            os.close(self._file)
            raise

    def _check_front(self) -> None:
        size = os.fstat(self._file).st_size
        found = os.pread(self._file, len(self._front), 0)
        if found == self._front:
            return
        if size < len(self._front) and self._front.startswith(found):    # new, or cut short when it was
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, self._front, 0)
            return
        if not found.startswith(_MAGIC):
            raise RequestError(f"{self._path} is no file with the flash of a golden device")
        raise ConfigMismatchError(f"{self._path} is the flash of a drive with another configuration")

    def records(self) -> Iterator[Record]:
        """All changes, oldest first; what is behind the last whole one is removed."""
        at = len(self._front)
        while len(head := os.pread(self._file, _RECORD.size, at)) == _RECORD.size:
            kind, channel, die, plane, block, page, number, size, check = _RECORD.unpack(head)
            data = os.pread(self._file, size, at + _RECORD.size)
            if len(data) != size or crc32(data, crc32(head[:-4])) != check or kind not in (_PROGRAM, _GARBAGE, _ERASE):
                break
            at += _RECORD.size + size
            image = np.frombuffer(data, np.uint8).copy() if kind == _PROGRAM else None
            yield Record(Block(channel, die, plane, block), None if kind == _ERASE else page, number, image)
        os.ftruncate(self._file, at)
        os.lseek(self._file, at, os.SEEK_SET)

    def write(self, record: Record) -> None:
        """Add a change."""
        kind = _ERASE if record.page is None else _GARBAGE if record.image is None else _PROGRAM
        data = b"" if record.image is None else record.image.tobytes()
        block = record.block
        head = _RECORD.pack(kind, block.channel, block.die, block.plane, block.block, record.page or 0, record.number,
                            len(data), 0)[:-4]
        whole = head + struct.pack("<I", crc32(data, crc32(head))) + data
        if os.write(self._file, whole) != len(whole):
            raise OSError(f"{self._path} could not be written: the disk is full")


    def close(self) -> None:
        """Close the file.  Closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
