"""How the golden device's parts refuse a command."""

from kvattic.spec.commands import CompletionFlag, Status

__all__ = ["NO_FLAGS", "RejectedError", "raise_first"]

NO_FLAGS = CompletionFlag(0)


class RejectedError(Exception):
    """A command that does not end OK.

    Attributes:
        status: of its completion.
        where: likewise, see `Status`.
        flags: likewise; what had happened before.
    """

    def __init__(self, status: Status, where: int = 0, flags: CompletionFlag = NO_FLAGS) -> None:
        super().__init__(status, where, flags)
        self.status = status
        self.where = where
        self.flags = flags


def raise_first(*found: tuple[Status, int | None], flags: CompletionFlag = NO_FLAGS) -> None:
    """Refuse with the first of these statuses whose `where` is not None.

    Raises:
        RejectedError: there is one.
    """
    for status, where in found:
        if where is not None:
            raise RejectedError(status, where, flags)
