"""Checks of arguments, each with one message for the whole library."""

from enum import Enum
from typing import Any, TypeVar

import numpy as np

from kvattic.errors import RequestError

__all__ = ["as_member", "check_integer", "check_positive"]

E = TypeVar("E", bound=Enum)


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Refuse what is not an int in a range.

    Raises:
        RequestError: names the argument and says what it was.
    """
    good = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not good or not least <= value <= most:
        raise RequestError(f"{name} must be an int from {least:,} to {most:,}, not {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive int.

    Raises:
        RequestError: names the argument and says what it was.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name} must be a positive int, not {value!r}")


def as_member(name: str, value: E | str, kind: type[E]) -> E:
    """A member of an enumeration, given itself or its name in lower case.

    Raises:
        RequestError: names the argument and lists what it may be.
    """
    members = {member.name.lower(): member for member in kind}
    found = members.get(value) if isinstance(value, str) else value
    if not isinstance(found, kind):
        raise RequestError(f"{name} must be one of {', '.join(members)}, not {value!r}")
    return found
