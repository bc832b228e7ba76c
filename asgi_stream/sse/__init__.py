"""The event-stream format of the HTML Standard: events to bytes, and bytes to events."""

from __future__ import annotations

from asgi_stream.sse.decode import Decoder, ServerSentEvent, adecode, decode
from asgi_stream.sse.encode import encode

__all__ = ["Decoder", "ServerSentEvent", "adecode", "decode", "encode"]
