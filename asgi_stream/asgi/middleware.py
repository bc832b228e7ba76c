"""`StreamLeaseMiddleware`: counts the streams of an application, whoever makes them.

Pure ASGI. Requests that do not stream pass with two wrapped callables and no lease.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Iterable
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_stream import events
from asgi_stream.asgi.gone import is_gone, stay_away
from asgi_stream.asgi.identity import Identify, authenticated_name, identify, warn_refused_by_address
from asgi_stream.asgi.refusal import retry_after_seconds, send_refusal, send_unavailable, wants_events
from asgi_stream.asgi.shutdown import STREAMS_KEY, OpenStreams, ShutdownWatch, abort_connection
from asgi_stream.asgi.tasks import cancellable_task
from asgi_stream.asgi.waiting import WaitingLine
from asgi_stream.errors import BackendError, ConfigurationError, StreamLimitExceeded
from asgi_stream.events import CloseReason
from asgi_stream.formats import SSE
from asgi_stream.leases.handover import Hold, Terms, current_hold
from asgi_stream.leases.store import Loss
from asgi_stream.runtime import Streaming, current_streaming
from asgi_stream.sse import encode

logger = logging.getLogger("asgi_stream")

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
            if kind == "http" and is_gone(scope):
                await stay_away(send)  # before it takes anybody's slot
                return
            early = self._early(scope, request)
            if early and not await request.admit(early=True):
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
        return wants_events(scope)


class _RefusedError(OSError):
    """Raised by ``send`` after a late refusal: the application's response goes nowhere."""


class _Request:
    """One request: its hold, its wrapped callables, and its end."""

    __slots__ = (
        "_aside",
        "_cancelled",
        "_client_send",
        "_end_reason",
        "_foreign",
        "_good_until",
        "_interrupted",
        "_last_body",
        "_message_over",
        "_queue",
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
        self._queue: WaitingLine | None = None
        self._aside: asyncio.Future[None] | None = None  # kept: a task that nothing refers to may be collected
        self._end_reason: CloseReason = "shutdown"
        self._good_until = float("inf")
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
        except BackendError as exc:
            if self.hold.streaming or self._refused or self.hold.leases:
                raise
            await self._refuse_without_redis(exc)
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

    async def admit(self, *, early: bool = False) -> bool:
        """Take the lease that nobody has asked for; False after a refusal."""
        who = identify(self.scope, self.identify)
        limiter = self.streaming.leases
        limit = limiter.config.proxied_limit if who.proxied else None
        try:
            if early and self.hold.kind == "http" and limiter.config.policy == "wait" and wants_events(self.scope):
                self._queue = WaitingLine(self._client_send)
                acquiring = limiter.acquire_key_async(who.key, limit=limit, on_position=self._queue.tell)
                lease = await self._queue.until(acquiring, self._receive)
                if lease is None:
                    return False  # the client left the line
            else:
                lease = await limiter.acquire_key_async(who.key, limit=limit)
        except StreamLimitExceeded as exc:
            if not who.by_user:
                warn_refused_by_address(who.key)
            await self._refuse(exc)
            return False
        except BackendError as exc:
            await self._refuse_without_redis(exc)
            return False
        self.hold.choose(lease)
        self.hold.watch(self._on_lost)
        return True

    async def _refuse(self, exc: StreamLimitExceeded) -> None:
        self._refused = self._message_over = True
        if self.hold.kind == "websocket":
            await self._client_send({"type": "websocket.close", "code": 1008, "reason": "too many streams"})
        elif self._queue is not None and self._queue.begun:
            await self._queue.refuse(exc)
        else:
            await send_refusal(self._client_send, exc, self.scope, self.streaming.leases.config)

    async def _refuse_without_redis(self, exc: BackendError) -> None:
        logger.error("a stream was refused: %s", exc)
        self._refused = self._message_over = True
        if self.hold.kind == "websocket":
            await self._client_send({"type": "websocket.close", "code": 1013, "reason": "try again later"})
        else:
            await send_unavailable(self._client_send)

    def _on_lost(self, reason: Loss) -> None:
        """A lease of this request was taken away; whoever else watches for that ends the response."""
        if self.hold.kind == "websocket":
            if not self._refused:
                self._refused = True
                closing = self._client_send({"type": "websocket.close", "code": 1008, "reason": reason})
                self._aside = asyncio.ensure_future(closing)
        elif self._foreign:
            self._end_reason = reason
            self.shutdown()

    async def receive(self) -> Message:
        if self._stopped or self._refused:
            return {"type": "http.disconnect"}
        if self._queue is not None and self._queue.received:
            return self._queue.received.pop(0)
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
        if self._foreign and monotonic() >= self._good_until:
            self._good_until = await Terms(None, self.hold).renew()
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
            if self._queue is not None and self._queue.begun:
                if not await self._queue.begin_response(message):
                    self._refused = self._message_over = True
                    raise _RefusedError("it answered with something else than the stream that had begun")
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
            # Nobody caught it: the framework's plain answer becomes ours.
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
            self._good_until = self.hold.good_until
            self.hold.watch(self._on_lost)
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
        if kind == "websocket.accept":
            if not self.hold.leases and not await self.admit():
                return
            self.hold.watch(self._on_lost)
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
            body = encode(events.close(self._end_reason, retry=random.randint(1000, 5000)))
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
