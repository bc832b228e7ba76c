"""From a producer's exception to what the client may know of it [W5]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException

from asgi_stream.formats.base import Failure

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504, 529})


class ProducerTimeoutError(Exception):
    """The producer was stopped by one of the stream's time limits; ``code`` names it."""

    def __init__(self, code: str, *, retryable: bool) -> None:
        super().__init__(code)
        self.code = code
        self.retryable = retryable


def describe(exc: BaseException) -> Failure:
    """Say what the client is told of *exc*.

    An exception that carries a status of its own keeps it: Starlette's `HTTPException`, with its detail, which is
    written for clients, and the errors of `openai`, `anthropic` and `httpx` clients, without their text.
    """
    failure_id = uuid4().hex[:16]
    if isinstance(exc, ProducerTimeoutError):
        return Failure(exc.code, "the stream took too long", exc.retryable, failure_id, status=504)
    status = _status(exc)
    if status is None:
        if isinstance(exc, TimeoutError):
            return Failure("timeout", "the source of this stream took too long", True, failure_id)
        return Failure("internal_error", "the source of this stream failed", False, failure_id)
    if isinstance(exc, HTTPException):
        message = str(exc.detail)
    else:
        message = f"the source of this stream answered with status {status}"
    return Failure(
        f"http_{status}", message, status in RETRYABLE, failure_id, status=status, retry_after=_retry_after(exc)
    )


def _status(exc: BaseException) -> int | None:
    for owner in (exc, getattr(exc, "response", None)):
        status = getattr(owner, "status_code", None)
        if type(status) is int and 400 <= status <= 599:
            return status
    return None


def _retry_after(exc: Any) -> str | None:
    for owner in (exc, getattr(exc, "response", None)):
        headers = getattr(owner, "headers", None)
        if isinstance(headers, Mapping):
            for name, value in headers.items():
                if str(name).lower() == "retry-after" and str(value).isascii() and str(value).isprintable():
                    return str(value)[:64]
    return None
