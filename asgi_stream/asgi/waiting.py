"""The line before a stream: a client that asked for an event stream is told its position in it, in-stream.

The stream begins while the client waits, with `waiting` events, so the status is 200 before the endpoint has run: what
the endpoint then answers is the rest of that stream, or, where it is something else, becomes its `failed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.types import Message

from asgi_stream import events
from asgi_stream.asgi.headers import EVENT_STREAM
from asgi_stream.asgi.refusal import refusal_event
from asgi_stream.errors import StreamLimitExceeded
from asgi_stream.events import StreamEvent
from asgi_stream.leases.limiter import StreamLease
from asgi_stream.sse import encode
from asgi_stream.sse.encode import PING

PING_SECONDS = 15.0


class WaitingLine:
    """One client that waits for its slot."""

    def __init__(self, send: Callable[[Message], Awaitable[None]]) -> None:
        self._send = send
        self._position: int | None = None
        self._changed = asyncio.Event()
        self.begun = False
        self.received: list[Message] = []
        """What the client has sent meanwhile, for the endpoint."""

    def tell(self, position: int) -> None:
        """So many are before it now."""
        if position != self._position:
            self._position = position
            self._changed.set()

    async def until(
        self, acquiring: Coroutine[Any, Any, StreamLease], receive: Callable[[], Awaitable[Message]]
    ) -> StreamLease | None:
        """Wait for the lease, and say where the client stands; None if the client leaves before."""
        turn = asyncio.ensure_future(acquiring)
        left: asyncio.Future[Message] | None = asyncio.ensure_future(receive())
        try:
            while True:
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    waited: list[asyncio.Future[Any]] = [turn, changed] if left is None else [turn, changed, left]
                    await asyncio.wait(waited, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if turn.done():
                    return turn.result()
                if left is not None and left.done():
                    message = left.result()
                    if message["type"] == "http.disconnect":
                        return None
                    self.received.append(message)
                    # More of a body is not read here: it would have to be kept.
                    left = None if message.get("more_body", False) else asyncio.ensure_future(receive())
                if self._changed.is_set():
                    self._changed.clear()
                    await self._say()
                elif self.begun:
                    await self._body(PING)
        finally:
            if not turn.done():
                turn.cancel()
                await asyncio.wait([turn])
            if left is not None:
                left.cancel()

    async def begin_response(self, message: Message) -> bool:
        """The endpoint's response begins; False, and the stream has its ending, if it is no event stream."""
        headers = {name.lower(): value for name, value in message.get("headers", ())}
        if message["status"] == 200 and headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            return True
        failed = events.failed(
            f"http_{message['status']}", "the stream could not begin", retryable=message["status"] >= 500, id="waiting"
        )
        await self._send({"type": "http.response.body", "body": encode(failed), "more_body": False})
        return False

    async def refuse(self, exc: StreamLimitExceeded) -> None:
        """Nobody made room in time."""
        await self._send({"type": "http.response.body", "body": refusal_event(exc), "more_body": False})

    async def _say(self) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        await self._body(encode(StreamEvent({"position": self._position, "ts": events.now_ms()}, "waiting")))

    async def _body(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
