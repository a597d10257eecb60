"""What all command lines of the project share: streams, exit codes, and lines of progress.

    sys.exit(run_command(main, "kvattic"))

Exit codes: 0 success; 1 a check failed; 2 wrong usage, or an error, whose message goes to stderr; 130 Ctrl-C; 141 the
reader of the output has closed it.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from kvattic.errors import KvatticError

__all__ = ["EVERY_S", "Telling", "mend_streams", "run_command"]

EVERY_S = 20.0
"""Seconds between two lines of `Telling`, at most."""
FAILED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def mend_streams() -> None:
    """Where standard input, output or error is closed, let it be /dev/null.

    Python has None for such a stream, and the next file that is opened would get its descriptor: what is meant for
    the terminal would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)   # the lowest number that is free, and those below are not
            os.set_inheritable(null, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open


def run_command(work: Callable[[], int | None], name: str) -> int:
    """Run a command; its exit code.

    Args:
        work: what to do; returns the exit code, None for 0.
        name: of the command, for messages.
    """
    try:
        mend_streams()
        code = work() or 0
        sys.stdout.flush()
        return code
    except SystemExit as error:
        if isinstance(error.code, str):
            return _error(name, error.code)
        return error.code or 0
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None and not _takes_more(sys.stdout):
            _discard(sys.stdout)
            return _error(name, f"cannot write to standard output: {error.strerror or error}")
        return _error(name, error)
    except KvatticError as error:
        return _error(name, error)
    except Exception as error:
        # Their modules cannot be imported here: a simulator that is missing or fails, a job that failed in it.
        if type(error).__module__.partition(".")[0] not in ("kvattic_sim", "kvattic_hdl"):
            raise
        return _error(name, error)


def _error(name: str, message: object) -> int:
    _say(f"{name}: {message}")
    return FAILED


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _takes_more(stream: TextIO) -> bool:
    """Whether an error without a file's name was not this stream's."""
    try:
        print(file=stream, flush=True)
    except OSError:
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Point a stream whose reader is gone to /dev/null, or Python would complain when it closes it."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Telling:
    """Prints what a long run does, where no terminal shows it.

    A line when a phase begins, and one at least every half minute while it lasts: so a log tells a run that works from
    one that hangs.

    Args:
        quiet: say nothing, for a terminal shows it.
        stream: where to; stderr if None.
        every_s: seconds between two lines of a phase; `EVERY_S` if None.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, every_s: float | None = None) -> None:
        self._quiet = quiet
        self._stream = stream
        self._every_s = EVERY_S if every_s is None else every_s

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[Callable[[str], None]]:
        """A part of the run; gives a function that takes how far it is, for the next line.

        Args:
            what: the line.
        """
        detail = ""

        def note(text: str) -> None:
            nonlocal detail
            detail = text

        if self._quiet:
            yield note
            return
        begin, ended = time.monotonic(), threading.Event()

        def tell() -> None:
            while not ended.wait(self._every_s):
                self._line(f"{what}: {detail}{', ' if detail else ''}{time.monotonic() - begin:.0f} s")

        self._line(f"{what} ...")
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield note
        finally:
            ended.set()
            thread.join()

    def _line(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):      # the reader is gone
            print(line, file=self._stream or sys.stderr, flush=True)
