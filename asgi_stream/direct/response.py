"""`EventStreamResponse`: items of a generator, straight to the client."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import Any, Literal

from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from asgi_stream.asgi.gone import last_event_id
from asgi_stream.asgi.headers import UNBUFFERED
from asgi_stream.asgi.shutdown import STREAMS_KEY, default_streams
from asgi_stream.direct.failures import describe
from asgi_stream.direct.outcome import OnFinish
from asgi_stream.direct.producer import as_async_generator
from asgi_stream.direct.pump import Limits, Pump
from asgi_stream.errors import ConfigurationError
from asgi_stream.events import StreamEvent, told_to_stay_away
from asgi_stream.formats import Format, resolve
from asgi_stream.leases.handover import Terms, open_hold, take_current
from asgi_stream.leases.limiter import StreamLease


class EventStreamResponse(Response):
    """Stream the items of a generator to the client as they come [D1].

    ``items`` is an async iterable, or a sync one, which then runs in a thread of its own. What may be yielded depends
    on ``format``:

    - ``"sse"``: a `StreamEvent` is that event; a `str` is one event with that text; `bytes` are framed already and go
      as they are; anything else is one event with its JSON.
    - ``"ndjson"``: one JSON line an item. ``"text"``: `str` and `bytes` as they are.

    ``lease`` is released just before the last byte; without it, a lease of the `stream_lease` block around this call
    is taken over.

    ``on_disconnect``: ``"cancel"`` closes the generator when the client leaves; ``"finish"`` lets it run to its end;
    a number is how many seconds it may go on.

    Times are in seconds, and 0 or None turns a limit off. The headers leave with the first item, or after
    ``start_within`` seconds without one (0: at once). ``heartbeat`` is the silence after which an event stream gets a
    comment. ``first_event_timeout``, ``idle_timeout`` and ``max_duration`` bound the producer; heartbeats reset none.

    ``end_event`` names the event that ends an event stream in order (None: no such event). It has an id by which an
    EventSource that comes back to the same URL is answered 204, and nothing is started again [W4].

    ``on_finish`` is called once with an `Outcome`, after the last byte.

    An exception of the generator before the headers have left is the response: its own status if it has one, else
    500. Later it is a `failed` event (a last line in NDJSON, a cut connection in text) without its text [W5].
    """

    def __init__(
        self,
        items: AsyncIterable[Any] | Iterable[Any],
        *,
        format: Literal["sse", "ndjson", "text"] | Format = "sse",
        lease: StreamLease | None = None,
        on_disconnect: Literal["cancel", "finish"] | float = "cancel",
        start_within: float = 1.0,
        heartbeat: float | None = 15.0,
        first_event_timeout: float | None = 120.0,
        idle_timeout: float | None = 300.0,
        max_duration: float | None = 3600.0,
        end_event: str | None = "complete",
        on_finish: OnFinish | None = None,
        resumable: str | None = None,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        if resumable is not None:
            raise ConfigurationError("resumable= is not part of this version; leave it out")
        if on_disconnect not in ("cancel", "finish") and not _is_seconds(on_disconnect):
            raise ConfigurationError(
                f'on_disconnect must be "cancel", "finish" or seconds of grace, not {on_disconnect!r}'
            )
        if end_event is not None and end_event != "complete":
            StreamEvent(None, end_event)  # raises for a name that no event can have
        self._format = resolve(format)
        self._items = as_async_generator(items)
        self._lease = self._take(lease)
        seconds = (start_within, heartbeat, first_event_timeout, idle_timeout, max_duration)
        self._limits = _DEFAULT_LIMITS if seconds == _DEFAULT_SECONDS else _limits(seconds)
        self._on_disconnect = on_disconnect
        self._end_event = end_event
        self._on_finish = on_finish
        # What Response.__init__ would do, less the body and its length.
        self.status_code = status_code
        self.media_type = media_type or self._format.media_type
        self.background = background
        self.body = b""
        self._set_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end_id = self._end_id(scope) if self._end_event else ""
        if scope["method"] == "GET":
            told = last_event_id(scope)
            if told is not None and ((end_id and told == end_id) or told_to_stay_away(told)):
                await self._answer_without_items(send, 204, [])
                return
        if scope["method"] == "HEAD":
            await self._answer_without_items(send, self.status_code, self.raw_headers)
            return
        hold = open_hold()
        if hold is not None:
            hold.claimed = hold.streaming = True
        lease = self._lease
        if lease is not None:
            lease.streaming = True

        terms = Terms(lease, hold)
        pump = Pump(
            self._items,
            self._format,
            self._limits,
            status=self.status_code,
            headers=self.raw_headers,
            end_event=self._end_event,
            end_id=end_id,
            on_disconnect=self._on_disconnect,
            on_finish=self._on_finish,
            release=terms.release if terms else None,
            renew=terms.renew,
            good_until=terms.good_until,
            open_streams=scope.get(STREAMS_KEY) or default_streams,
            receive=receive,
            send=send,
        )
        if terms:
            terms.watch(pump.close)
        try:
            await pump.run()
        except Exception as exc:
            if pump.headers_sent or _has_handler(scope, exc):
                raise
            failure = describe(exc)
            if failure.status == 500:
                raise
            await self._answer_failure(exc, scope, receive, send)
        if self.background is not None:
            await self.background()

    def _take(self, lease: StreamLease | None) -> StreamLease | None:
        if lease is None:
            return take_current()
        if not isinstance(lease, StreamLease):
            raise ConfigurationError(
                f"lease must be what `async with stream_lease(…) as lease` gives, not {type(lease).__name__}"
            )
        lease.handed_over = True
        return lease

    def _set_headers(self, headers: Mapping[str, str] | None) -> None:
        media_type = self.media_type or ""
        self.raw_headers = [(b"content-type", media_type.encode("latin-1")), *UNBUFFERED]
        if headers:
            given = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            names = {name for name, _ in given}
            if b"content-length" in names:
                raise ConfigurationError("a stream has no Content-Length; leave it out of headers=")
            self.raw_headers = [pair for pair in self.raw_headers if pair[0] not in names] + given

    def _end_id(self, scope: Scope) -> str:
        """The id of the ending: the same in every process, another one for another path or query."""
        target = scope["path"].encode("utf-8", "surrogatepass") + b"?" + scope.get("query_string", b"")
        return hashlib.blake2b(target, digest_size=9).hexdigest() + ".e"

    async def _answer_without_items(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._items.aclose()
        if self._lease is not None:
            self._lease.release()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer_failure(self, exc: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        failure = describe(exc)
        headers = dict(getattr(exc, "headers", None) or {}) if isinstance(exc, HTTPException) else {}
        if failure.retry_after is not None:
            headers["retry-after"] = failure.retry_after
        body = {"title": failure.message, "status": failure.status, "code": failure.code, "id": failure.id}
        response = JSONResponse(body, failure.status, headers, media_type="application/problem+json")
        await response(scope, receive, send)


_DEFAULT_SECONDS = (1.0, 15.0, 120.0, 300.0, 3600.0)
_DEFAULT_LIMITS = Limits(*_DEFAULT_SECONDS)


def _limits(seconds: tuple[float | None, ...]) -> Limits:
    names = ("start_within", "heartbeat", "first_event_timeout", "idle_timeout", "max_duration")
    for name, value in zip(names, seconds, strict=True):
        if value is not None and not _is_seconds(value):
            raise ConfigurationError(f"{name} must be seconds (0 turns it off), not {value!r}")
    return Limits(*(value or 0 for value in seconds))


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _has_handler(scope: Scope, exc: Exception) -> bool:
    """Whether the application handles this exception itself (Starlette and FastAPI)."""
    handlers = scope.get("starlette.exception_handlers")
    if handlers is None:
        return False
    if isinstance(exc, HTTPException):
        return True
    by_type = handlers[0]
    return any(kind in by_type for kind in type(exc).__mro__ if kind not in (Exception, BaseException, object))
