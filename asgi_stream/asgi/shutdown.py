"""Open streams and how they end when the server does [O1].

Servers wait for open responses and tell nobody: ``receive`` does not wake, and ``lifespan.shutdown`` comes after the
wait. So the signal is chained: by the lifespan helper, by the middleware's lifespan, or by the first open stream. The
handler before ours is always called, and put back when the last user of ours is gone. Nothing is patched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

logger = logging.getLogger("asgi_stream")

CUT_AFTER = 2.0
"""Seconds until a client that does not read its goodbye is cut off."""


class OpenStream(Protocol):
    """A stream that can be told to end."""

    def shutdown(self) -> None:
        """Say goodbye, close the producer, end the response."""

    def cut(self) -> None:
        """The goodbye did not get out: drop the connection."""


class _Loop:
    """The open streams of one event loop."""

    def __init__(self) -> None:
        self.streams: set[OpenStream] = set()
        self.closing = False


class OpenStreams:
    """The open streams of one application, on however many event loops."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = WeakKeyDictionary()

    def add(self, stream: OpenStream) -> None:
        """Register a stream of the running loop. During a shutdown it is told at once."""
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            state = self._loops[loop] = _Loop()
        if not state.streams:
            _signals.use(self)
        state.streams.add(stream)
        if state.closing:
            loop.call_soon(stream.shutdown)

    def discard(self, stream: OpenStream) -> None:
        """The stream is over."""
        state = self._loops.get(asyncio.get_running_loop())
        if state is None or stream not in state.streams:
            return
        state.streams.discard(stream)
        if not state.streams:
            _signals.leave(self)

    def reopen(self) -> None:
        """A server starts on the running loop: streams are welcome (again)."""
        self._loops.setdefault(asyncio.get_running_loop(), _Loop()).closing = False

    def count(self) -> int:
        """How many streams are open that have waited at least once."""
        return sum(len(state.streams) for state in list(self._loops.values()))

    def begin_shutdown(self) -> None:
        """End every stream, from any thread; return at once. New streams are ended as they open."""
        self._on_every_loop(closing=True)

    def end_all(self) -> None:
        """End every stream that is open now, from any thread; return at once."""
        self._on_every_loop(closing=False)

    def _on_every_loop(self, *, closing: bool) -> None:
        for loop in list(self._loops):
            try:
                loop.call_soon_threadsafe(self._end, loop, closing)
            except RuntimeError:
                pass  # that loop is closed, and its streams with it

    def _end(self, loop: asyncio.AbstractEventLoop, closing: bool) -> None:
        state = self._loops.get(loop)
        if state is None or state.closing:
            return
        state.closing = closing
        if not state.streams:
            return
        streams = list(state.streams)
        for stream in streams:
            stream.shutdown()
        loop.call_later(CUT_AFTER, self._cut, state, streams)

    def _cut(self, state: _Loop, streams: list[OpenStream]) -> None:
        for stream in streams:
            if stream in state.streams:
                stream.cut()


class _Signals:
    """SIGINT and SIGTERM, chained while anybody needs them. Main thread only, as Python demands."""

    def __init__(self) -> None:
        self._users: dict[OpenStreams, int] = {}
        self._before: dict[int, Any] = {}
        self._lock = threading.RLock()

    def use(self, streams: OpenStreams) -> None:
        with self._lock:
            self._users[streams] = self._users.get(streams, 0) + 1
            if threading.current_thread() is threading.main_thread():
                self._install()

    def leave(self, streams: OpenStreams) -> None:
        with self._lock:
            count = self._users.get(streams, 0) - 1
            if count > 0:
                self._users[streams] = count
                return
            self._users.pop(streams, None)
            if not self._users and threading.current_thread() is threading.main_thread():
                self._give_back()

    def _install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            # None: a handler that is not Python's cannot be chained. Ignored signals are to stay ignored.
            if before is None or before is signal.SIG_IGN or before == self._handle:
                continue
            self._before[number] = before
            signal.signal(number, self._handle)

    def _give_back(self) -> None:
        for number, before in list(self._before.items()):
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
            del self._before[number]

    def _handle(self, number: int, frame: Any) -> None:
        before = self._before.get(number)
        for streams in list(self._users):
            streams.begin_shutdown()
        if callable(before):
            before(number, frame)
        elif before is signal.SIG_DFL:
            self._die_later(number)

    def _die_later(self, number: int) -> None:
        """The default action is death: let the goodbyes out, then die of the same signal."""

        def die() -> None:
            deadline.cancel()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        def look() -> None:
            if any(streams.count() for streams in list(self._users)):
                loop.call_later(0.02, look)
            else:
                die()

        deadline = threading.Timer(CUT_AFTER + 0.5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        deadline.daemon = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            die()
            return
        deadline.start()
        loop.call_soon_threadsafe(loop.call_later, 0.02, look)


_signals = _Signals()


default_streams = OpenStreams()
"""The streams of applications that made no `Streaming` of their own."""

STREAMS_KEY = "asgi_stream.streams"
"""Where the middleware puts the `OpenStreams` of its application into the scope."""


class ShutdownWatch:
    """Holds the signals for as long as a lifespan lasts, whether or not a stream is open."""

    def __init__(self, streams: OpenStreams) -> None:
        self._streams = streams

    def __enter__(self) -> ShutdownWatch:
        self._streams.reopen()
        _signals.use(self._streams)
        return self

    def __exit__(self, *exc: object) -> None:
        _signals.leave(self._streams)


def abort_connection(send: Callable[..., Any]) -> bool:
    """Drop the connection that *send* writes to; False where it cannot be found.

    ASGI has no verb for it. The server's own transport is found by following what the wrappers around its ``send``
    refer to: bound methods, partials and closures, a few levels deep. It is only called, nothing is changed.
    """
    for candidate in _behind(send, depth=12):
        transport = getattr(candidate, "transport", None) or getattr(candidate, "_transport", None)
        abort = getattr(transport, "abort", None)
        if callable(abort):
            abort()
            return True
    return False


def _behind(function: Any, depth: int) -> Iterator[Any]:
    if depth == 0:
        return
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield owner
        inner = getattr(owner, "send", None)
        if callable(inner) and inner != function:
            yield from _behind(inner, depth - 1)
    for name in ("func", "__wrapped__"):
        inner = getattr(function, name, None)
        if callable(inner):
            yield from _behind(inner, depth - 1)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue  # not filled yet
        if callable(content):
            yield from _behind(content, depth - 1)
