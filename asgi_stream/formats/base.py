"""What a format has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from asgi_stream.events import CloseReason


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure as the client may see it [W5]: never the text of an internal exception.

    ``status`` is the HTTP status it has while the headers are still held, ``id`` finds it in the server's log.
    """

    code: str
    message: str
    retryable: bool
    id: str
    status: int = 500
    retry_after: str | None = None


class Format(Protocol):
    """From items to bytes, and the bytes around them.

    What returns ``None`` has no form in this format: no heartbeat is sent then, and a stream that has to end early is
    cut short, so that nobody takes it for a whole one.
    """

    media_type: str
    heartbeat: bytes | None

    def frame(self, item: Any) -> bytes:
        """Return *item* as bytes that stand for themselves. Raises `InvalidEventError` or `TypeError`."""

    def at_boundary(self, sent: bytes) -> bool:
        """Whether an event may follow *sent*, which the application may have framed itself."""

    def complete(self, name: str, event_id: str) -> bytes:
        """What ends a stream in order; may be empty."""

    def failed(self, failure: Failure, event_id: str | None) -> bytes | None:
        """What ends a stream whose producer failed after the headers had left."""

    def close(self, reason: CloseReason, retry_ms: int) -> bytes | None:
        """The goodbye on a connection that the server ends before the stream is over."""
