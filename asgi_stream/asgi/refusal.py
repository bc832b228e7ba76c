"""A refusal as HTTP [L6]: 429, problem details (RFC 9457), `Retry-After`."""

from __future__ import annotations

import math
import random
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Scope, Send

from asgi_stream import events
from asgi_stream.asgi.headers import EVENT_STREAM
from asgi_stream.config import StreamLeaseConfig
from asgi_stream.errors import StreamLimitExceeded
from asgi_stream.events import StreamEvent, json_bytes
from asgi_stream.sse import encode

PROBLEM_TYPE = "urn:asgi-stream:problem:stream-limit-exceeded"


class HTTPStreamLimitExceeded(StreamLimitExceeded, HTTPException):
    """`StreamLimitExceeded` that Starlette and FastAPI answer with 429 by themselves when nobody catches it."""

    def __init__(self, key: str, **facts: Any) -> None:
        StreamLimitExceeded.__init__(self, key, **facts)
        self.status_code = 429
        self.detail = str(self.args[0])
        self.headers = {"Retry-After": str(retry_after_seconds(self))}

    def __str__(self) -> str:
        return self.detail


def retry_after_seconds(exc: StreamLimitExceeded) -> int:
    """`Retry-After` takes whole seconds; rounded up, so that nobody comes too early."""
    return max(1, math.ceil(exc.retry_after))


def problem(exc: StreamLimitExceeded) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the 429."""
    seconds = retry_after_seconds(exc)
    body = json_bytes(
        {
            "type": PROBLEM_TYPE,
            "title": "Too many concurrent streams",
            "status": 429,
            "detail": str(exc.args[0]),
            "limit": exc.limit,
            "in_use": exc.in_use,
            "scope": exc.scope,
            "retry_after": seconds,
        }
    )
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % seconds),
        (b"cache-control", b"no-store"),
    ]
    return headers, body


HAMMERING = (b"openai/", b"anthropic/", b"asyncopenai/", b"asyncanthropic/")
"""How the names of clients begin that come back at once after a 429 unless they are told not to."""
LONG_RETRY = 30_000
"""Milliseconds after which an `EventSource` that was refused comes back."""


def wants_events(scope: Scope) -> bool:
    """Whether the request asks for an event stream."""
    return any(name == b"accept" and b"text/event-stream" in value for name, value in scope["headers"])


def refusal_event(exc: StreamLimitExceeded) -> bytes:
    """The refusal as the only event of a stream, for clients that take any other status for final."""
    failed = events.failed("stream_limit_exceeded", str(exc.args[0]), retryable=True, id="limit")
    retry = max(LONG_RETRY, retry_after_seconds(exc) * 1000)
    return encode(StreamEvent(failed.data, failed.event, None, retry))


async def send_refusal(send: Send, exc: StreamLimitExceeded, scope: Scope, config: StreamLeaseConfig) -> None:
    """Answer a request with the refusal, in the form that its client understands."""
    if config.eventsource_refusals and scope["method"] == "GET" and wants_events(scope):
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        await send({"type": "http.response.body", "body": refusal_event(exc)})
        return
    headers, body = problem(exc)
    if any(name == b"user-agent" and value.lower().startswith(HAMMERING) for name, value in scope["headers"]):
        headers.append((b"x-should-retry", b"false"))
    if config.rate_limit_headers:
        policy = f'"streams";q={exc.limit};qu="concurrent-requests"'
        left = f'"streams";r={max(exc.limit - exc.in_use, 0)}'
        headers += [(b"ratelimit-policy", policy.encode()), (b"ratelimit", left.encode())]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_unavailable(send: Send) -> None:
    """Answer a request with 503: the limit cannot be counted now, and no stream may begin without."""
    body = json_bytes({"title": "Streams cannot be counted now", "status": 503, "detail": "retry in a moment"})
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % random.randint(1, 5)),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
