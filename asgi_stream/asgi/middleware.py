"""`StreamLeaseMiddleware`: counts the streams of an application, whoever makes them.

Pure ASGI. Requests that do not stream pass with two wrapped callables and no lease.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_stream import events
from asgi_stream.asgi.identity import Identify, Identity, authenticated_name, identify, warn_refused_by_address
from asgi_stream.asgi.refusal import retry_after_seconds, send_problem
from asgi_stream.asgi.shutdown import STREAMS_KEY, OpenStreams, ShutdownWatch, abort_connection
from asgi_stream.asgi.tasks import cancellable_task
from asgi_stream.errors import ConfigurationError, StreamLimitExceeded
from asgi_stream.formats import SSE
from asgi_stream.leases.handover import Hold, current_hold
from asgi_stream.runtime import Streaming, current_streaming
from asgi_stream.sse import encode

STREAMING_TYPES = (
    b"text/event-stream",
    b"application/x-ndjson",
    b"application/ndjson",
    b"application/jsonl",
    b"application/json-seq",
    b"application/stream+json",
    b"multipart/x-mixed-replace",
)
"""Content types that say of a response that it streams."""


class StreamLeaseMiddleware:
    """At most ``limit`` open streams for each user, over every route: ``app.add_middleware(StreamLeaseMiddleware)``.

    A response counts when its content type says that it streams, or when it is an `EventStreamResponse`. Whose it is:
    ``identify(scope)``, else the authenticated user, else the client's address [L7]. The decision falls when the
    response starts. It falls before the endpoint runs where that is known to be right: the request asks for an event
    stream (``Accept``) and the user is already known or ``identify`` is given, or its path matches one of ``paths``
    (regular expressions, matched in full). A lease that the endpoint or a dependency took itself takes the place of
    the middleware's choice: one request holds one slot.

    A refusal is 429 with problem details [L6]; a WebSocket is closed with 1008. At shutdown every counted stream is
    ended, Starlette's own too [O1].
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        identify: Identify | None = None,
        paths: Iterable[str] | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self.app = app
        if isinstance(paths, str):
            raise ConfigurationError('paths is a list of patterns, such as ["/chat/.*"]')
        try:
            self._paths = [re.compile(path) for path in paths or ()]
        except re.error as exc:
            raise ConfigurationError(f"paths holds something that is no regular expression: {exc}") from exc
        self._identify = identify
        self._streaming = streaming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            with ShutdownWatch((self._streaming or current_streaming()).streams):
                await self.app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        streaming = self._streaming or current_streaming()
        request = _Request(scope, receive, send, streaming, self._identify or streaming.identify)
        token = current_hold.set(request.hold)
        try:
            early = self._early(scope, request)
            if early and not await request.admit():
                return
            if kind == "http":
                await request.run(self.app)
            else:
                await request.run_websocket(self.app)
        finally:
            current_hold.reset(token)
            request.close()

    def _early(self, scope: Scope, request: _Request) -> bool:
        if any(path.fullmatch(scope["path"]) for path in self._paths):
            return True
        if request.identify is None and authenticated_name(scope) is None:
            return False
        if scope["type"] == "websocket":
            return True
        return any(name == b"accept" and b"text/event-stream" in value for name, value in scope["headers"])


class _RefusedError(OSError):
    """Raised by ``send`` after a late refusal: the application's response goes nowhere."""


class _Request:
    """One request: its hold, its wrapped callables, and its end."""

    __slots__ = (
        "_cancelled",
        "_client_send",
        "_foreign",
        "_interrupted",
        "_last_body",
        "_message_over",
        "_reading",
        "_receive",
        "_refused",
        "_registered",
        "_sse",
        "_stopped",
        "_streams",
        "_task",
        "hold",
        "identify",
        "scope",
        "streaming",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, streaming: Streaming, identify: Identify | None
    ) -> None:
        self.hold = Hold(scope["type"])
        self.streaming = streaming
        self.identify = identify
        # A copy that inner middlewares write to: this is where an authentication inside leaves its user.
        self.scope: Scope = {**scope, STREAMS_KEY: streaming.streams}
        self._streams: OpenStreams = streaming.streams
        self._receive = receive
        self._client_send = send
        self._task: asyncio.Task[Any] | None = None
        self._reading: asyncio.Task[Any] | None = None  # waits for the client's next message
        self._interrupted = False  # `shutdown()` has cancelled the wait for the client's next message
        self._foreign = False  # a stream that is not ours to end otherwise
        self._registered = False
        self._sse = False
        self._last_body = b""
        self._message_over = False
        self._refused = False
        self._stopped = False
        self._cancelled = 0

    async def run(self, app: ASGIApp) -> None:
        self._task = cancellable_task()
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
        except StreamLimitExceeded as exc:
            if self.hold.streaming or self._refused:
                raise
            await self._refuse(exc)
        except Exception:
            if not self._refused and not self._stopped:
                raise
        finally:
            if self._task is not None:
                while self._cancelled:
                    self._cancelled -= 1
                    self._task.uncancel()
        if self._stopped and not self._message_over:
            await self._end()

    async def admit(self) -> bool:
        """Take the lease that nobody has asked for; False after a refusal."""
        who = identify(self.scope, self.identify)
        try:
            self.hold.choose(self._acquire(who))
        except StreamLimitExceeded as exc:
            await self._refuse(exc)
            return False
        return True

    def _acquire(self, who: Identity) -> Any:
        limiter = self.streaming.leases
        try:
            return limiter.acquire_key(who.key, limit=limiter.config.proxied_limit if who.proxied else None)
        except StreamLimitExceeded:
            if not who.by_user:
                warn_refused_by_address(who.key)
            raise

    async def _refuse(self, exc: StreamLimitExceeded) -> None:
        self._refused = self._message_over = True
        if self.hold.kind == "websocket":
            await self._client_send({"type": "websocket.close", "code": 1008, "reason": "too many streams"})
        else:
            await send_problem(self._client_send, exc)

    async def receive(self) -> Message:
        if self._stopped or self._refused:
            return {"type": "http.disconnect"}
        self._reading = cancellable_task()
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if self._interrupted and self._reading is not None:
                self._interrupted = False
                self._reading.uncancel()
                return {"type": "http.disconnect"}
            raise
        finally:
            self._reading = None
        if message["type"] == "http.disconnect" and not self.hold.claimed:
            self.hold.release()
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._refused:
            raise _RefusedError("the stream was refused")
        if self._stopped and self._foreign:
            raise _RefusedError("the server shuts down")
        if kind == "http.response.body":
            if not message.get("more_body", False):
                self._message_over = True
                self.hold.release()
                self._unregister()
            elif self._foreign:
                self._last_body = message.get("body", b"") or self._last_body
        elif kind == "http.response.start":
            await self._on_start(message)
            if self._refused:
                raise _RefusedError("the stream was refused")
            if self._message_over:
                return
        await self._client_send(message)

    async def _on_start(self, message: Message) -> None:
        content_type, retry_after = b"", b""
        for name, value in message.get("headers", ()):
            lowered = name.lower()
            if lowered == b"content-type":
                content_type = value.lower()
            elif lowered == b"retry-after":
                retry_after = value
        refusal = self.hold.refusal
        if refusal is not None and message["status"] == 429 and retry_after == b"%d" % retry_after_seconds(refusal):
            # Nobody caught it: the framework's plain answer becomes problem details.
            await self._refuse(refusal)
            return
        streams = self.hold.claimed or content_type.startswith(STREAMING_TYPES)
        if not streams or message["status"] >= 300:
            return
        self.hold.streaming = True
        if not any(lease.held for lease in self.hold.leases) and not await self.admit():
            return
        if not self.hold.claimed:
            self._foreign = True
            self._sse = content_type.startswith(b"text/event-stream")
            self._registered = True
            self._streams.add(self)

    async def run_websocket(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self._receive, self.send_websocket)
        except StreamLimitExceeded as exc:
            if not self._refused:
                await self._refuse(exc)

    async def send_websocket(self, message: Message) -> None:
        kind = message["type"]
        if self._refused:
            return
        if kind == "websocket.http.response.start" and self.hold.refusal is not None and not self._can_deny():
            await self._refuse(self.hold.refusal)
            return
        if kind == "websocket.accept" and not self.hold.leases and not await self.admit():
            return
        if kind in ("websocket.close", "websocket.http.response.start"):
            self.hold.release()
        await self._client_send(message)

    def _can_deny(self) -> bool:
        """Whether the server can answer a handshake with an HTTP response (ASGI's extension for it)."""
        return "websocket.http.response" in (self.scope.get("extensions") or {})

    # An OpenStream: what shutdown asks of a stream that somebody else makes

    def shutdown(self) -> None:
        """Tell the application that its client has left: what waits for the client's next message gets that."""
        if self._stopped or self._message_over:
            return
        self._stopped = True
        if self._reading is not None:
            self._interrupted = True
            self._reading.cancel()
            asyncio.get_running_loop().call_later(0.5, self._cancel)
        else:
            self._cancel()

    def cut(self) -> None:
        """Drop the connection of a client that does not read."""
        abort_connection(self._client_send)
        self._cancel()

    def _cancel(self) -> None:
        if self._task is not None and self._registered and not self._message_over:
            self._cancelled += 1
            self._task.cancel()

    async def _end(self) -> None:
        body = b""
        if self._sse and SSE().at_boundary(self._last_body):
            body = encode(events.close("shutdown", retry=random.randint(1000, 5000)))
        self._message_over = True
        self.hold.release()
        self._unregister()
        await self._client_send({"type": "http.response.body", "body": body, "more_body": False})

    def _unregister(self) -> None:
        if self._registered:
            self._registered = False
            self._streams.discard(self)

    def close(self) -> None:
        """The application has returned: nothing of this request holds a slot any more."""
        self.hold.release()
        self._unregister()
