"""An event loop in a thread of its own, for sync code that uses an async library."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads, and other event loops. It starts with the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run *coroutine* there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Its event loop, once it runs."""
        return self._loop

    @property
    def is_current(self) -> bool:
        """Whether it is the caller's own thread, which cannot wait for itself."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    @property
    def in_parent(self) -> bool:
        """Whether it stayed in the process that this one was forked from [O3]."""
        return self._loop is not None and self._pid != os.getpid()

    def stop(self) -> None:
        """End the thread. The next `submit` starts another."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None and self._pid == os.getpid():
                loop.call_soon_threadsafe(loop.stop)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop = loop = asyncio.new_event_loop()
                self._pid = os.getpid()
                threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True).start()
            return self._loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.01))  # transports close in the loop's next rounds
        finally:
            loop.close()
