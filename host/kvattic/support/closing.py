"""Objects that clean up at the end of a with block."""

from types import TracebackType
from typing import Self

from kvattic.errors import KvatticError

__all__ = ["Closing"]


class Closing:
    """A context manager that calls `_end_block` at the end; its KvatticError is dropped if the block itself failed.

    So what went wrong in the block is never hidden by what goes wrong in the clean-up after it.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._end_block()
        except KvatticError:
            if error is None:
                raise

    def _end_block(self) -> None:
        raise NotImplementedError
