"""Waiting for the client to leave and for a call, at once, in one task.

A second task per open stream would cost more memory than all the rest that is kept for an idle viewer.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator
from typing import Any

_DRIVEN = (types.MethodType, types.BuiltinMethodType)


class Parking:
    """Where a stream's task waits. `call()` makes `wait()` return; so does the client's leaving, which sets ``gone``.

    A server's own ``receive`` is stepped by hand, and stays suspended between two waits. One that a middleware wrapped
    may hold a cancel scope open while it waits, which must not be left half-way: it gets a task of its own.
    """

    __slots__ = ("_called", "_held", "_loop", "_receive", "_stand_in", "_stepped", "_watcher", "gone")

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        self.gone = False
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._called = False
        self._stand_in: asyncio.Future[None] | None = None
        self._stepped: Any = None  # a `receive` under way
        self._held: Any = None  # the future it waits for
        self._watcher: asyncio.Task[None] | None = None
        if not isinstance(receive, _DRIVEN):
            self._watcher = self._loop.create_task(self._watch())

    def call(self) -> None:
        """Make the current, or else the next, `wait()` return."""
        self._called = True
        if self._stand_in is not None and not self._stand_in.done():
            self._stand_in.set_result(None)

    @types.coroutine
    def wait(self) -> Generator[Any, Any, None]:
        """Return after a call, or when the client has left."""
        while not self._called and not self.gone:
            if self._watcher is None and self._held is None and not (yield from self._step()):
                continue
            self._stand_in = stand_in = self._loop.create_future()
            try:
                yield from stand_in
            finally:
                self._stand_in = None
            if self._held is not None and self._held.done():
                self._held = None
        self._called = False

    def close(self) -> None:
        """Wait no more."""
        if self._watcher is not None:
            self._watcher.cancel()
        stepped, self._stepped = self._stepped, None
        if self._held is not None:
            self._held.remove_done_callback(self._woken)
            self._held.cancel()
            self._held = None
        if stepped is not None and hasattr(stepped, "close"):
            stepped.close()

    def _step(self) -> Generator[Any, Any, bool]:
        """Run `receive` to where it waits; False if it waits for nothing that can be waited for."""
        if self._stepped is None:
            awaitable = self._receive()
            self._stepped = awaitable if isinstance(awaitable, types.CoroutineType) else awaitable.__await__()
        try:
            held = self._stepped.send(None) if hasattr(self._stepped, "send") else next(self._stepped)
        except StopIteration as stop:
            self._stepped = None
            self.gone = stop.value["type"] == "http.disconnect"
            return False
        except Exception:
            self._stepped = None
            self.gone = True  # nobody can tell any more whether the client is there
            return False
        if held is None:
            yield None
            return False
        held._asyncio_future_blocking = False
        held.add_done_callback(self._woken)
        self._held = held
        return True

    def _woken(self, _: Any) -> None:
        if self._stand_in is not None and not self._stand_in.done():
            self._stand_in.set_result(None)

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            pass  # nobody can tell any more whether the client is there
        self.gone = True
        self._woken(None)
