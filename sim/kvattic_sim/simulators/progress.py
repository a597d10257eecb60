"""Tells what a build does at the moment, to whoever follows it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["COMPILING", "GENERATING", "VERILATING", "Follower", "followed", "tell"]

GENERATING, VERILATING, COMPILING = "generating Verilog", "Verilating", "compiling"
"""Stages of a build, in their order."""

Follower = Callable[[str, str], None]
"""Called with a stage and what is at work there, from any thread, one call at a time."""

_followers: list[Follower] = []
_lock = threading.Lock()


def tell(stage: str, what: str) -> None:
    """Tell the followers that something has begun.

    Args:
        stage: one of the stages of this module.
        what: a file or module.
    """
    with _lock:
        for follower in _followers:
            follower(stage, what)


@contextmanager
def followed(follower: Follower) -> Iterator[None]:
    """Let a function follow all builds of this process during a block."""
    with _lock:
        _followers.append(follower)
    try:
        yield
    finally:
        with _lock:
            _followers.remove(follower)
