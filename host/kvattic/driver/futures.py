"""`Future`: the answer to a command or task that is under way."""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, RLock
from typing import Any, Generic, Protocol, TypeVar

from kvattic.driver.accounts import Passage
from kvattic.errors import DeviceTimeoutError, KvatticError, RequestError

__all__ = ["Driver", "Future", "all_done", "wait"]

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)

SERVE_S = 0.25
"""Seconds of one turn of `wait`: Ctrl-C takes effect after one."""
SLICE_S = 0.02
"""Seconds that one turn of an awaiting asyncio task may hold the device."""


class Driver(Protocol):
    """Completes futures (`dispatcher.Dispatcher`)."""

    @property
    def lock(self) -> RLock:
        """Held while anything changes."""
        ...

    def drive(self, until: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Take completions until a condition holds; DeviceTimeoutError if it does not within `timeout_s`."""
        ...

    def advance(self, until: Callable[[], bool], slice_s: float) -> None:
        """The same, but give up after `slice_s` without an error."""
        ...

    def defer(self, action: Callable[[], object]) -> None:
        """Call `action` once the completions at hand are taken."""
        ...

    def poll(self) -> int:
        """Take the completions that have come."""
        ...


class Future(Generic[T]):
    """The answer to a command or task that is under way.

    Nothing runs in the background on the host: completions are taken when somebody waits for any future of the device,
    asks one whether it is `done`, or calls `Device.poll`.

    All methods may be called from any thread.  `await future` works under asyncio.

    Attributes:
        passage: when its command was under way; None: it has none, or has not completed.  For this library.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.passage: Passage | None = None
        self._finished = False
        self._retrieved = False     # somebody has seen the error
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], object]] = []

    def done(self) -> bool:
        """Whether the answer, or an error, is there; takes completions without waiting for them."""
        with self._driver.lock:
            if not self._finished:
                with suppress(KvatticError):    # an error of the device fails this future, too
                    self._driver.poll()
            return self._finished

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the answer and return it.

        Args:
            timeout_s: seconds of wall-clock time to wait; the future can be waited for again afterwards.  If None, as
                long as the device answers anything within its own timeout.

        Raises:
            DeviceTimeoutError: the answer did not come in time.
            BaseException: what went wrong.
        """
        if error := self.exception(timeout_s):
            raise error
        return self._value  # type: ignore[return-value]

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """What went wrong, None if nothing did; waits as `result` does.

        Raises:
            DeviceTimeoutError: the answer did not come in time.
        """
        if not self._finished:
            try:
                self._driver.drive(lambda: self._finished, timeout_s)
            except KvatticError:
                if not self._finished:
                    raise
        self._retrieved = True
        return self._error

    def add_done_callback(self, callback: "Callable[[Future[T]], object]") -> None:
        """Call `callback` with the future when it is done; at once if it is already.

        It runs in the thread that takes the completions, which holds the device's lock; what it raises ends that
        thread's call.
        """
        with self._driver.lock:
            if self._finished:
                callback(self)
            else:
                self._callbacks.append(lambda: callback(self))

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        # Short turns in a thread, so that other asyncio tasks get theirs, and the device's lock.
        while not self._finished:
            await asyncio.to_thread(self._driver.advance, lambda: self._finished, SLICE_S)
        return self.result()

    # For the driver, under its lock.

    @property
    def driver(self) -> Driver:
        """What completes it."""
        return self._driver

    @property
    def finished(self) -> bool:
        """Whether the answer, or an error, is known; unlike `done`, takes no completions."""
        return self._finished

    @property
    def value(self) -> T | None:
        """The answer; None if it is not known, or an error."""
        return self._value

    @property
    def error(self) -> BaseException | None:
        """What went wrong, as far as is known; does not count as retrieved."""
        return self._error

    def set_result(self, value: T) -> None:
        """Complete the future; later answers are dropped."""
        if not self._finished:
            self._value = value
            self._end()

    def set_exception(self, error: BaseException) -> None:
        """Complete the future with an error; later answers are dropped."""
        if not self._finished:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._finished = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._driver.defer(callback)

    def subscribe(self, action: Callable[[], object]) -> None:
        """Call `action` when done, but never during this call."""
        if self._finished:
            self._driver.defer(action)
        else:
            self._callbacks.append(action)

    def take_unretrieved_error(self) -> BaseException | None:
        """The error if nobody has seen it yet; it counts as retrieved then."""
        if self._retrieved or self._error is None:
            return None
        self._retrieved = True
        return self._error


def wait(futures: Iterable[Future[Any]], timeout_s: float | None = None) -> None:
    """Wait until all futures are done, or have failed; they may belong to several devices.

    Do not call it from a future's callback.

    Args:
        futures: to wait for.
        timeout_s: seconds of wall-clock time that each device has; its own timeout if None.

    Raises:
        RequestError: an item is not a future.
        DeviceTimeoutError: one was not done in time.
    """
    by_driver: dict[int, list[Future[Any]]] = {}
    for future in futures:
        if not isinstance(future, Future):
            raise RequestError(f"wait takes futures, not {future!r}")
        by_driver.setdefault(id(future.driver), []).append(future)

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    stop = Event()

    def serve(group: list[Future[Any]]) -> None:
        ready = all_done(group)
        while not ready() and not stop.is_set():
            rest = SERVE_S if deadline is None else min(deadline - time.monotonic(), SERVE_S)
            if rest <= 0:
                raise DeviceTimeoutError(f"not done within {timeout_s:g} s")
            try:
                group[0].driver.advance(ready, rest)
            except KvatticError:
                # An error of the device has failed them all.
                if not ready():
                    raise

    groups = list(by_driver.values())
    if len(groups) == 1:
        serve(groups[0])
    elif groups:
        # Each device moves on while it is waited for, a simulated one only then.
        with ThreadPoolExecutor(len(groups)) as threads:
            served = [threads.submit(serve, group) for group in groups]
            try:
                for one in served:
                    one.result()
            finally:
                stop.set()


def all_done(futures: Sequence[Future[Any]],
             progress: Callable[[int, int], object] | None = None) -> Callable[[], bool]:
    """A function that says whether all futures are done; it does not look at finished ones again.

    Args:
        futures: to look at.
        progress: called with the number of finished futures at the front, and of all, when that changes.
    """
    done = 0

    def ready() -> bool:
        nonlocal done
        before = done
        while done < len(futures) and futures[done].finished:
            done += 1
        if progress is not None and done > before:
            progress(done, len(futures))
        return done == len(futures)

    return ready
