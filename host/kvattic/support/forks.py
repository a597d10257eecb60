"""What a forked child may do with its parent's devices.

A child has copies of all objects of its parent, but there is only one simulator or card.  If both drove it, each would
take the other's answers.  So a transport to a shared device remembers its `Owner`, and refuses all other processes.  A
device in NumPy is copied whole, and its copy works.

A lock that another thread of the parent held during the fork would never be released in the child; `watch` replaces it.
"""

import os
from threading import RLock
from typing import Protocol
from weakref import WeakSet

from kvattic.errors import ForkedError

__all__ = ["Locked", "Owner", "watch"]


class Owner:
    """The process that made this object."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process

    def check(self, what: str) -> None:
        """Refuse other processes.

        Args:
            what: what is owned, for the message.

        Raises:
            ForkedError: this is another process.
        """
        if not self.here:
            raise ForkedError(
                f"{what} belongs to process {self._process}, which opened it, and not to its forked child "
                f"{os.getpid()}: open another device in the child, after the fork (the start methods 'spawn' and "
                "'forkserver' of multiprocessing copy no device)")


class Locked(Protocol):
    """An object with a lock that its caller may hold while another thread forks."""

    lock: RLock

    def forked_in_use(self) -> None:
        """In the child: another thread of the parent was using the object."""
        ...


_watched: "WeakSet[Locked]" = WeakSet()


def watch(one: Locked) -> None:
    """Make sure that its lock can be taken in a forked child."""
    _watched.add(one)


def _after_fork() -> None:
    for one in list(_watched):
        if one.lock.acquire(blocking=False):
            one.lock.release()
        else:
            one.lock = RLock()
            one.forked_in_use()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
