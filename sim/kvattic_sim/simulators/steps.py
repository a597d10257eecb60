"""Runs the commands of a build, side by side, such that they do not outlive this process."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from kvattic.support.files import named
from kvattic_sim.simulators import progress
from kvattic_sim.simulators.base import SimulatorError

__all__ = ["COMMANDS", "Group", "Steps", "cores", "ended_on_error", "tail", "wait_for_all"]


_LOG_LINES = 25


def tail(text: str) -> str:
    """The last lines of an output, indented for an error message."""
    lines = text.rstrip().splitlines()[-_LOG_LINES:]
    return "\n".join(f"  | {line}" for line in lines) if lines else "  | (no output)"


class Group:
    """A process group whose members do not outlive this process, whatever ends it.

    A compiler has children of its own (``g++`` has ``cc1plus``), so a signal to it is not enough, and
    a process that is killed can send none. A shell therefore leads the group. It waits for the end of
    a pipe of which this process has the other end, and then kills the group, itself included.

    A context manager; leaving it ends what still runs.

    Attributes:
        number: the group's, as :class:`subprocess.Popen` takes it in ``process_group``.
    """

    def __init__(self) -> None:
        self._leader = subprocess.Popen(
            ["/bin/sh", "-c", "read line; kill -9 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            process_group=0,
        )
        self.number = self._leader.pid
        self._owner = os.getpid()

    def end(self) -> None:
        """Kill what still runs in the group. Nothing can be started in it afterwards."""
        assert self._leader.stdin is not None
        self._leader.stdin.close()
        if os.getpid() == self._owner:  # a forked child must leave its parent's group alone
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.number, signal.SIGKILL)
            self._leader.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMMANDS = threading.BoundedSemaphore(cores())
"""Tools at work at the same time, in all builds of this process."""


class Steps:
    """Runs commands of one build, side by side where they may, and keeps a log of them.

    A context manager; leaving it ends commands that still run, unless their group is another one's.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], group: Group | None = None
    ) -> None:
        self.directory = directory
        self.log = directory / "build.log"
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._owns_group = group is None
        self.group = group or Group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_group:
            self.end()

    def end(self) -> None:
        """End what runs, all of the group."""
        self.group.end()

    def run(self, command: Sequence[str]) -> None:
        """Run a command, and keep what it prints in the log; raise SimulatorError if it fails."""
        with COMMANDS:
            verilates = Path(command[0]).name == "verilator_bin"
            if verilates or not self.directory.name.startswith("runtime-"):  # the library is compiled meanwhile
                progress.tell(progress.VERILATING if verilates else progress.COMPILING, Path(command[-1]).name)
            done = subprocess.run(
                command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                process_group=self.group.number,
            )
        with self._lock, named(self.log), self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}")
        if done.returncode:
            raise SimulatorError(
                f"{Path(command[0]).name} failed with status {done.returncode}; "
                f"the log is {self.log} and ends:\n{tail(done.stdout)}"
            )


@contextlib.contextmanager
def ended_on_error(steps: Steps) -> Iterator[None]:
    """End the commands that run before a pool of threads waits for them: Ctrl-C is not to take a minute."""
    try:
        yield
    except BaseException:
        steps.end()
        raise


def wait_for_all(jobs: Sequence["Future[None]"]) -> None:
    """Wait for all jobs, and raise the first one's exception; later jobs are not begun then."""
    error: BaseException | None = None
    for job in jobs:
        if error is None:
            try:
                job.result()
            except BaseException as exception:  # noqa: BLE001 - raised below
                error = exception
        else:
            job.cancel()
    if error is not None:
        raise error
