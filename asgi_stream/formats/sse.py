"""`text/event-stream`, by the HTML Standard and the profile in `asgi_stream.sse.encode` [W1]."""

from __future__ import annotations

import warnings
from typing import Any

from asgi_stream import events
from asgi_stream.events import CloseReason, StreamEvent, json_bytes
from asgi_stream.formats.base import Failure
from asgi_stream.sse.encode import PING, encode, encode_data, encode_text

_FIELDS = ("data:", "event:", "id:", "retry:", ":")


class SSE:
    """Server-sent events. A `str` is one event whose data is the text, anything but an event is JSON."""

    media_type = "text/event-stream; charset=utf-8"
    heartbeat: bytes | None = PING

    def frame(self, item: Any) -> bytes:
        if type(item) is dict:  # what most producers yield, so it is asked first
            return encode_data(json_bytes(item))
        if isinstance(item, str):
            if item.endswith("\n\n") and item.startswith(_FIELDS):
                _warn_framed()
            return encode_text(item)
        if isinstance(item, StreamEvent):
            return encode(item)
        if isinstance(item, (bytearray, memoryview, bytes)):
            return bytes(item)
        return encode_data(json_bytes(item))

    def at_boundary(self, sent: bytes) -> bool:
        return sent.endswith((b"\n\n", b"\r\n\r\n", b"\r\r", PING)) or not sent

    def complete(self, name: str, event_id: str) -> bytes:
        # Both names were checked when the response was made.
        data = b'{"success":true,"ts":%d}' % events.now_ms()
        return b"event: %b\ndata: %b\nid: %b\n\n" % (name.encode(), data, event_id.encode())

    def failed(self, failure: Failure, event_id: str | None) -> bytes | None:
        return encode(
            events.failed(failure.code, failure.message, retryable=failure.retryable, id=failure.id, event_id=event_id)
        )

    def close(self, reason: CloseReason, retry_ms: int) -> bytes | None:
        return encode(events.close(reason, retry=retry_ms))


def _warn_framed() -> None:
    # A constant place and text: Python's default filter then shows it once per process.
    warnings.warn(
        "a str that looks like a server-sent event was sent as the *data* of an event; yield bytes for what you have "
        "framed yourself, or a StreamEvent",
        UserWarning,
        stacklevel=1,
    )
