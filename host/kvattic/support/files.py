"""Files that are written completely or not at all, and errors that name the file."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["named", "whole", "write_whole"]


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """A block in which an OSError that names no file, such as that of a full disk, gets this one's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it becomes `path` if the block succeeds, and is removed otherwise.

    So half a file is never seen, neither by a concurrent reader nor after a full disk.  The file's name ends as `path`
    does, because some tools tell a format by it.

    Args:
        path: the file to be written; its folder is made.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            aside.replace(path)
    except OSError as error:
        if error.filename == str(aside):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, all of it or nothing; see `whole`.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    with whole(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
