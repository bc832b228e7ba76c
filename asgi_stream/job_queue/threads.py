"""A sync job in a thread: its result for the event loop, and a way to stop it.

Daemon threads, not an executor's: a worker that is told to end must not wait for a job that does not.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import threading
from collections.abc import Callable
from typing import Any


class JobInterrupted(BaseException):
    """The job is to stop now: raised in its thread, at the next line of Python that it runs.

    Like KeyboardInterrupt it is not for ``except Exception``.
    """


class JobThread:
    """Runs ``function(entity)`` in a new thread; ``future`` has what comes of it."""

    def __init__(self, function: Callable[[Any], Any], entity: Any, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def settle(result: Any, error: BaseException | None) -> None:
            if self.future.done():
                return  # given up
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = context.run(function, entity)
            except BaseException as exc:
                error = _as_exception(exc)
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                pass  # the worker has ended without us

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def interrupt(self) -> None:
        """Raise `JobInterrupted` in it. A thread that waits inside C code meets it when it comes back."""
        ident = self._thread.ident
        if ident is not None and self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(JobInterrupted))


class JobExited(Exception):  # noqa: N818 - what it tells is that the job did, not that we failed
    """The job called `sys.exit()`, or was interrupted."""


def _as_exception(exc: BaseException) -> BaseException:
    """A future cannot carry StopIteration, and the event loop must not meet SystemExit."""
    if isinstance(exc, Exception) and not isinstance(exc, StopIteration):
        return exc
    told = JobExited(f"{type(exc).__name__}: {exc}")
    told.__cause__ = exc
    return told


async def guarded(function: Callable[[Any], Any], entity: Any) -> Any:
    """Await an async job. Its SystemExit must not end the worker."""
    try:
        return await function(entity)
    except (SystemExit, KeyboardInterrupt) as exc:
        raise JobExited(f"{type(exc).__name__}: {exc}") from exc
