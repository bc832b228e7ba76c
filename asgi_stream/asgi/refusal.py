"""A refusal as HTTP [L6]: 429, problem details (RFC 9457), `Retry-After`."""

from __future__ import annotations

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Send

from asgi_stream.errors import StreamLimitExceeded
from asgi_stream.events import json_bytes

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


async def send_problem(send: Send, exc: StreamLimitExceeded) -> None:
    """Answer a request with the 429."""
    headers, body = problem(exc)
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
