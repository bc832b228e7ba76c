"""What an application gives to be streamed, as the one thing the relay steps: an async generator."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator
from typing import Any

import anyio
from anyio.lowlevel import RunVar

from asgi_stream.errors import ConfigurationError

MAX_SYNC_PRODUCERS = 256
"""How many sync iterables run at once per event loop, each in a thread of its own; more wait for their turn."""

_AHEAD = 64  # items a thread may be ahead of its client

_threads: RunVar[anyio.CapacityLimiter] = RunVar("asgi_stream_sync_producers")


def as_async_generator(items: Any) -> AsyncGenerator[Any, None]:
    """Return *items* (an async or sync iterable) as an async generator."""
    if hasattr(items, "__anext__") and hasattr(items, "aclose") and hasattr(items, "athrow"):
        return items  # type: ignore[no-any-return]
    if isinstance(items, (str, bytes, bytearray, dict)):
        raise ConfigurationError(
            f"items is a {type(items).__name__}; give a generator or a list of items, such as [item]"
        )
    if isinstance(items, AsyncIterable):
        return _iterate(items)
    if isinstance(items, (list, tuple)):
        return _from_memory(items)
    if isinstance(items, Iterable):
        return _from_thread(iter(items))
    hint = "; call it: generate()" if callable(items) else ""
    raise ConfigurationError(f"items must be an async or sync iterable, not {type(items).__name__}{hint}")


async def _iterate(items: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    iterator = aiter(items)
    try:
        async for item in iterator:
            yield item
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def _from_memory(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    for item in items:
        yield item


async def _from_thread(items: Iterator[Any]) -> AsyncGenerator[Any, None]:
    """Run a blocking iterator in a thread of its own, from its first step to its ``close()``.

    One thread per stream, not one hop per item: the iterator keeps its thread and context, and the threads that
    Starlette runs ``def`` endpoints in stay free. A blocked ``next()`` cannot be interrupted: it ends at its own next
    item, in a daemon thread, and holds up nobody's shutdown.
    """
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(MAX_SYNC_PRODUCERS)
        _threads.set(limiter)
    borrower = object()
    await limiter.acquire_on_behalf_of(borrower)
    loop = asyncio.get_running_loop()
    feed = _Feed(loop, items, lambda: limiter.release_on_behalf_of(borrower))
    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(feed.run,), name="asgi_stream producer", daemon=True
    )
    try:
        thread.start()
    except BaseException:
        limiter.release_on_behalf_of(borrower)
        raise
    try:
        while True:
            while feed.ready:
                item = feed.ready.popleft()
                feed.room.release()
                yield item
            if feed.done:
                if feed.error is not None:
                    raise feed.error
                return
            await feed.wait()
    finally:
        feed.stop()


class _Feed:
    """The items that a thread has made and its client has not taken yet: at most `_AHEAD`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, items: Iterator[Any], on_end: Any) -> None:
        self.ready: deque[Any] = deque()
        self.room = threading.Semaphore(_AHEAD)
        self.done = False
        self.error: BaseException | None = None
        self._loop = loop
        self._items = items
        self._on_end = on_end
        self._stopped = False
        self._waiter: asyncio.Future[None] | None = None
        self._told = False  # a wake-up is on its way to the loop

    def run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                self.room.acquire()
                if self._stopped:
                    break
                self.ready.append(item)
                self._tell(self._wake)
        except BaseException as exc:
            error = exc
            if isinstance(exc, StopIteration):  # cannot leave a generator as it is
                error = RuntimeError("the producer raised StopIteration")
        finally:
            try:
                close = getattr(self._items, "close", None)
                if close is not None:
                    close()
            except Exception as exc:
                error = error or exc
            self._told = False
            self._tell(lambda: self._end(error))

    async def wait(self) -> None:
        self._told = False
        if self.ready or self.done:
            return
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def stop(self) -> None:
        self._stopped = True
        self.room.release()

    def _tell(self, callback: Any) -> None:
        if self._told:
            return
        self._told = True
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            self._stopped = True  # the loop is closed: nobody is there to take anything

    def _wake(self) -> None:
        self._told = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, error: BaseException | None) -> None:
        self.error = error
        self.done = True
        self._on_end()
        self._wake()
