"""Plain text: the items, and nothing else."""

from __future__ import annotations

from typing import Any

from asgi_stream.events import CloseReason, StreamEvent, lone_surrogate
from asgi_stream.formats.base import Failure


class Text:
    """`text/plain`. There is no place for an error in it: a stream that fails is cut short [W4]."""

    media_type = "text/plain; charset=utf-8"
    heartbeat: bytes | None = None

    def frame(self, item: Any) -> bytes:
        if isinstance(item, StreamEvent):
            item = item.text()
        if isinstance(item, str):
            try:
                return item.encode()
            except UnicodeEncodeError as exc:
                raise lone_surrogate("data", exc) from None
        if isinstance(item, (bytearray, memoryview, bytes)):
            return bytes(item)
        raise TypeError(
            f'format="text" takes str, bytes and StreamEvent, not {type(item).__name__}; '
            'yield str(item), or use format="ndjson" or "sse"'
        )

    def at_boundary(self, sent: bytes) -> bool:
        return True

    def complete(self, name: str, event_id: str) -> bytes:
        return b""

    def failed(self, failure: Failure, event_id: str | None) -> bytes | None:
        return None

    def close(self, reason: CloseReason, retry_ms: int) -> bytes | None:
        return None
