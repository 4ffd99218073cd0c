"""Calling somebody else's function under a time limit.

Synchronous functions run in the caller's thread and are interrupted by SIGALRM: that is the one thing that ends a
busy loop, a sleep or a runaway regular expression (which holds the interpreter's lock, so no second thread could even
notice). The exception derives from BaseException, past the function's own `except Exception`, and the signal repeats
once a second against a bare `except`. `math_verify` and others use the same timer for limits of their own and switch
it off afterwards; a watchdog thread sends the signal again, unless the function's own handler is in place.

Signals reach the main thread only. In another thread, and on Windows, the function runs in a daemon thread that is
abandoned at the limit: neither the run nor its exit waits for it, but what it does goes on until it returns.
Not interruptible in either way: native code that never comes back to the interpreter.

Asynchronous functions share one event loop in a daemon thread, so that they run at the same time; at the limit
they are cancelled, and a loop that does not answer (blocked by a synchronous call) is abandoned for a fresh one.
"""

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 1.0
"""Seconds between reminders to a function that ignores its limit."""


class TimeLimit(BaseException):
    """The function ran into its time limit."""


def call(function: Callable[[], Any], seconds: float) -> Any:
    """`function()`, or `TimeLimit` after `seconds`."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            return function()
    return _in_daemon_thread(function, seconds)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    over = threading.Event()

    def interrupt(*_: Any) -> None:
        if not over.is_set():
            raise TimeLimit

    previous = signal.signal(signal.SIGALRM, interrupt)
    outer_timer = signal.setitimer(signal.ITIMER_REAL, seconds, GRACE)
    threading.Thread(target=_remind, args=(over, seconds, interrupt), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, *outer_timer)
        signal.signal(signal.SIGALRM, previous)


def _remind(over: threading.Event, seconds: float, handler: Any) -> None:
    main = threading.main_thread().ident
    over.wait(seconds)
    while not over.wait(GRACE):
        # Under any other handler the signal would hit the function's own code, or end the process.
        if main is not None and signal.getsignal(signal.SIGALRM) is handler:
            signal.pthread_kill(main, signal.SIGALRM)


def _in_daemon_thread(function: Callable[[], Any], seconds: float) -> Any:
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # carried over to the caller, whatever it is
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="reward").start()
    return _result(outcome, seconds)


def _result(outcome: "concurrent.futures.Future[Any]", seconds: float) -> Any:
    done, _ = concurrent.futures.wait([outcome], timeout=seconds)
    if not done:
        raise TimeLimit
    return outcome.result()


class EventLoop:
    """The event loop in its thread, started on first use."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "concurrent.futures.Future[Any]":
        """Start the coroutine."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="async rewards").start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def result(self, outcome: "concurrent.futures.Future[Any]", seconds: float) -> Any:
        """The coroutine's result, or `TimeLimit` after `seconds` more."""
        try:
            return _result(outcome, seconds)
        except TimeLimit:
            outcome.cancel()
            self._abandon_if_blocked()
            raise

    def _abandon_if_blocked(self) -> None:
        assert self._loop is not None
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        if not answered.wait(GRACE):
            self._loop = None


EVENT_LOOP = EventLoop()
