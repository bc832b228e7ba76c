"""One command connection of one event loop. What is called in one tick of the loop leaves as one write.

Sixty-four tasks that publish at once cost one round trip, not sixty-four connections; and any number of viewers needs
no pool [C4].
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import hiredis

from asgi_stream.redis.locate import COMMAND_TIMEOUT, OpenConnection

logger = logging.getLogger("asgi_stream")

MAX_WAITING = 100_000


def pack(*words: bytes | str | int | float) -> bytes:
    """Return a command as it goes to Redis."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub knows commands of one word
    return packed


class UnavailableError(Exception):
    """Redis could not be asked, or did not answer: the command may be sent again."""


class ReplyError(Exception):
    """Redis answered with an error."""


RETRYABLE = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "MISCONF", "OOM")
"""How answers begin that another time, or another connection, may not give."""


class Pipe:
    """Commands of one event loop over one connection, which is opened when it is needed."""

    def __init__(self, connect: Callable[[], Awaitable[OpenConnection]]) -> None:
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._connection: OpenConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._replies = hiredis.Reader()

    def call(self, *words: bytes | str | int | float) -> asyncio.Future[Any]:
        """Send a command; the future is its reply, a `ReplyError`, or `UnavailableError`."""
        future = self._loop.create_future()
        if self._closed or len(self._waiting) + len(self._outbox) >= MAX_WAITING:
            future.set_exception(UnavailableError("closed" if self._closed else "too many commands are waiting"))
            return future
        packed = pack(*words)
        if self._connection is not None and not self._waiting and not self._outbox:
            # Nothing is under way: what is alone need not wait for others.
            self._connection.write(packed)
            self._sent(future, monotonic())
            return future
        self._outbox.append((packed, future))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return future

    def post(self, *words: bytes | str | int | float) -> asyncio.Future[Any] | None:
        """Send a command before anything else that this tick of the loop sends; None while not connected."""
        if self._connection is None or self._closed:
            return None
        if self._outbox:
            self._flush()
        future = self._loop.create_future()
        self._connection.write(pack(*words))
        self._sent(future, monotonic())
        return future

    def drop(self) -> None:
        """Give the connection up: what waits for an answer fails, and the next command opens another one."""
        if self._connection is not None:
            self._connection.abort()

    async def aclose(self) -> None:
        """Close the connection; what is not answered yet fails."""
        self._closed = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._fail(UnavailableError("closed"))

    def _flush(self) -> None:
        if self._connection is None:
            if self._task is None and not self._closed:
                self._task = self._loop.create_task(self._run())
            return  # the task sends it once it is connected
        self._flushing = False
        if not self._outbox:
            return  # it left before with something urgent
        # Who was cancelled before it was sent must not be heard behind what undoes it, over another connection.
        outbox = [command for command in self._outbox if not command[1].cancelled()]
        self._outbox = []
        if not outbox:
            return
        self._connection.write(b"".join([packed for packed, _ in outbox]))
        now = monotonic()
        for _, future in outbox:
            self._sent(future, now)

    def _sent(self, future: asyncio.Future[Any], now: float) -> None:
        self._waiting.append((future, now))
        if self._timer is None:
            self._timer = self._loop.call_later(COMMAND_TIMEOUT, self._check)

    def _check(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        late = monotonic() - self._waiting[0][1]
        if late < COMMAND_TIMEOUT:
            self._timer = self._loop.call_later(COMMAND_TIMEOUT - late, self._check)
        elif self._connection is not None:
            logger.warning("Redis did not answer for %.0f s; the connection is given up", late)
            self._connection.abort()

    async def _run(self) -> None:
        """Connect, and stay until the connection is lost."""
        error: Exception = UnavailableError("closed")
        try:
            self._connection = connection = await self._connect()
            self._replies = hiredis.Reader(protocolError=UnavailableError, replyError=ReplyError)
            connection.listen(self._receive)
            if self._outbox:
                self._flush()
            await connection.lost
            error = UnavailableError("Redis closed the connection")
        except Exception as exc:
            error = UnavailableError(f"{type(exc).__name__}: {exc}")
            error.__cause__ = exc
        finally:
            self._task = None
            connection_now, self._connection = self._connection, None
            if connection_now is not None:
                connection_now.abort()
            self._fail(error)

    def _receive(self, data: bytes) -> None:
        replies = self._replies
        replies.feed(data)
        while (reply := replies.gets()) is not False:
            future, _ = self._waiting.popleft()
            if future.done():
                continue  # its caller was cancelled
            if isinstance(reply, ReplyError):
                future.set_exception(reply)
                if str(reply).startswith(("READONLY", "LOADING")) and self._connection is not None:
                    self._connection.abort()  # the next connection may find another primary
            else:
                future.set_result(reply)

    def _fail(self, error: Exception) -> None:
        self._flushing = False
        futures = [future for future, _ in self._waiting] + [future for _, future in self._outbox]
        self._waiting.clear()
        self._outbox.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits is told; nobody else needs to hear of it
