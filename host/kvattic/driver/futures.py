"""`Future`: the answer to something that the device does meanwhile."""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, RLock
from typing import Any, Generic, Protocol, TypeVar

from kvattic.errors import DeviceTimeoutError, KvatticError, RequestError

__all__ = ["Driver", "Future", "all_done", "wait"]

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)

SERVE_S = 0.25
"""How long one turn of `wait` is, in seconds: Ctrl-C is heard after one."""
SLICE_S = 0.02
"""How long one turn of an awaiting asyncio task may hold the device, in seconds."""


class Driver(Protocol):
    """Who makes futures come true (`dispatcher.Dispatcher`)."""

    @property
    def lock(self) -> RLock:
        """Held by whoever changes anything."""
        ...

    def drive(self, until: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Take completions until something is the case; DeviceTimeoutError if it is not after `timeout_s`."""
        ...

    def advance(self, until: Callable[[], bool], slice_s: float) -> None:
        """The same, but give up after `slice_s` without an error."""
        ...

    def defer(self, action: Callable[[], object]) -> None:
        """Call something when the completions at hand are taken."""
        ...

    def poll(self) -> int:
        """Take the completions that are there."""
        ...


class Future(Generic[T]):
    """The answer to something that the device does meanwhile.

    Nothing runs in the background on the host: completions are taken when somebody waits for any future of the device,
    asks one whether it is `done`, or calls `Device.poll`.

    All methods may be called from any thread.  `await future` works under asyncio.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._finished = False
        self._seen = False      # somebody knows the error
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], object]] = []

    def done(self) -> bool:
        """Whether it is there, be it an error; takes completions without waiting for them."""
        with self._driver.lock:
            if not self._finished:
                with suppress(KvatticError):    # which is everybody's, and then this one's, too
                    self._driver.poll()
            return self._finished

    def result(self, timeout_s: float | None = None) -> T:
        """The answer; waits for it.

        Args:
            timeout_s: patience, in seconds of wall-clock time; afterwards the future is still good.  If None, as long
                as the device answers anything within its own patience.

        Raises:
            DeviceTimeoutError: it did not come in time.
            BaseException: what went wrong.
        """
        if error := self.exception(timeout_s):
            raise error
        return self._value  # type: ignore[return-value]

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """What went wrong, None if nothing did; waits as `result` does.

        Raises:
            DeviceTimeoutError: it did not come in time.
        """
        if not self._finished:
            try:
                self._driver.drive(lambda: self._finished, timeout_s)
            except KvatticError:
                if not self._finished:
                    raise
        self._seen = True
        return self._error

    def add_done_callback(self, callback: "Callable[[Future[T]], object]") -> None:
        """Call back with the future when it is done, soon if it is already.

        It is called in the thread that takes the completions, which holds the device's lock; what it raises ends that
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

    # For those who answer; under the driver's lock.

    def _finish(self, value: T) -> None:
        if not self._finished:
            self._value = value
            self._end()

    def _fail(self, error: BaseException) -> None:
        if not self._finished:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._finished = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._driver.defer(callback)

    def _subscribe(self, action: Callable[[], object]) -> None:
        """Call when done; not now."""
        if self._finished:
            self._driver.defer(action)
        else:
            self._callbacks.append(action)

    def _unheard(self) -> BaseException | None:
        """An error that nobody knows of; now somebody does."""
        if self._seen or self._error is None:
            return None
        self._seen = True
        return self._error


def wait(futures: Iterable[Future[Any]], timeout_s: float | None = None) -> None:
    """Wait until futures are done, be it with errors, of any devices, for all of these at once.

    Not to be called by a future's callback.

    Args:
        futures: for what to wait.
        timeout_s: patience with each device, in seconds of wall-clock time; its own if None.

    Raises:
        RequestError: something is no future.
        DeviceTimeoutError: one was not done in time.
    """
    by_driver: dict[int, list[Future[Any]]] = {}
    for future in futures:
        if not isinstance(future, Future):
            raise RequestError(f"wait takes futures, not {future!r}")
        by_driver.setdefault(id(future._driver), []).append(future)

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    stop = Event()

    def serve(group: list[Future[Any]]) -> None:
        ready = all_done(group)
        while not ready() and not stop.is_set():
            rest = SERVE_S if deadline is None else min(deadline - time.monotonic(), SERVE_S)
            if rest <= 0:
                raise DeviceTimeoutError(f"not done within {timeout_s:g} s")
            try:
                group[0]._driver.advance(ready, rest)
            except KvatticError:
                # If it was the device, they all know.
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
    """A function that says whether all are done; those that were are not asked again.

    Args:
        futures: which.
        progress: hears how many of the first ones are, and how many there are, when that changes.
    """
    done = 0

    def ready() -> bool:
        nonlocal done
        before = done
        while done < len(futures) and futures[done]._finished:
            done += 1
        if progress is not None and done > before:
            progress(done, len(futures))
        return done == len(futures)

    return ready
