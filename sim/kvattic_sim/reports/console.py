"""The console of the commands that need rich: tables on stdout, and what is going on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from kvattic.support.terminal import Telling

__all__ = ["make_console", "phase"]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """`terminal.run_command` knows what to do; rich itself would exit with 1, as if a check had failed."""
        raise BrokenPipeError


def make_console(width: int = 160) -> Console:
    """A console on stdout.

    Args:
        width: columns if it is no terminal, such that nothing is cut.
    """
    return _Console(width=None if sys.stdout.isatty() else width)


@contextmanager
def phase(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """A part of a long run: on a terminal a line that moves, otherwise plain lines on stderr (`Telling`).

    Args:
        console: of the command.
        what: the line.

    Yields:
        A function that takes how far it is.
    """
    with console.status(what) as status, Telling(quiet=console.is_terminal).phase(what) as note:
        def follow(detail: str) -> None:
            status.update(f"{what}: {detail}")
            note(detail)

        yield follow
