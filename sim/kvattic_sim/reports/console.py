"""The console of the commands that need rich: tables on stdout, and what is going on."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

from kvattic.support.terminal import Telling
from kvattic_sim.simulators import progress

__all__ = ["building", "make_console", "phase"]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `run_command`; rich itself would exit with 1, as if a check had failed."""
        raise BrokenPipeError


def make_console(width: int = 160) -> Console:
    """A console on stdout.

    Args:
        width: columns if it is no terminal, such that nothing is cut.
    """
    return _Console(width=None if sys.stdout.isatty() else width)


@contextlib.contextmanager
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


@contextlib.contextmanager
def building(console: Console) -> Iterator[None]:
    """Show the stages of the builds in a block, each as a phase of its own.

    Stages overlap, since several modules are built at a time: the latest one that has begun is shown.
    """
    order = (progress.GENERATING, progress.VERILATING, progress.COMPILING)
    reached, begun = -1, 0

    with contextlib.ExitStack() as shown:
        show = shown.enter_context(phase(console, "building the drive"))

        def follow(stage: str, what: str) -> None:
            nonlocal reached, begun, show
            rank = order.index(stage)
            if rank > reached:
                shown.close()
                show = shown.enter_context(phase(console, stage))
                reached, begun = rank, 0
            if rank == reached:
                begun += 1
                show(f"{begun} files begun" if stage == progress.COMPILING else what)

        with progress.followed(follow):
            yield
