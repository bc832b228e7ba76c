"""One JSON value a line (`application/x-ndjson`)."""

from __future__ import annotations

from typing import Any

from asgi_stream.events import CloseReason, StreamEvent, json_bytes
from asgi_stream.formats.base import Failure


class NDJSON:
    """JSON lines. Success adds nothing; what ends a stream early is a last ``{"error": …}`` line [W4]."""

    media_type = "application/x-ndjson"
    heartbeat: bytes | None = None

    def frame(self, item: Any) -> bytes:
        if isinstance(item, (bytearray, memoryview, bytes)):
            return bytes(item)
        return json_bytes(item.data if isinstance(item, StreamEvent) else item) + b"\n"

    def at_boundary(self, sent: bytes) -> bool:
        return sent.endswith(b"\n") or not sent

    def complete(self, name: str, event_id: str) -> bytes:
        return b""

    def failed(self, failure: Failure, event_id: str | None) -> bytes | None:
        error = {"code": failure.code, "message": failure.message, "retryable": failure.retryable, "id": failure.id}
        return json_bytes({"error": error}) + b"\n"

    def close(self, reason: CloseReason, retry_ms: int) -> bytes | None:
        error = {
            "code": reason,
            "message": "the server ended this connection",
            "retryable": True,
            "retry_after_ms": retry_ms,
        }
        return json_bytes({"error": error}) + b"\n"
