"""Real-time event delivery for ASGI applications. The public names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from asgi_stream.asgi.app import StreamApp, stream_app
    from asgi_stream.asgi.middleware import StreamLeaseMiddleware
    from asgi_stream.asgi.sse_response import sse_response
    from asgi_stream.channels.client import AsyncStreamChannel, SyncStreamChannel
    from asgi_stream.config import ChannelConfig, QueueRedisConfig, StreamLeaseConfig
    from asgi_stream.context import StreamContext
    from asgi_stream.direct.outcome import Outcome
    from asgi_stream.direct.response import EventStreamResponse
    from asgi_stream.errors import StreamError, StreamLeaseWarning, StreamLimitExceeded
    from asgi_stream.events import StreamEvent
    from asgi_stream.leases.limiter import StreamLease, StreamLeaseLimiter
    from asgi_stream.runtime import (
        Streaming,
        init_channels,
        init_event_storage,
        init_lease_limiter,
        init_streaming,
        shutdown_streaming,
        stream_lease,
    )

_HOMES = {
    "AsyncStreamChannel": "channels.client",
    "ChannelConfig": "config",
    "EventStreamResponse": "direct.response",
    "Outcome": "direct.outcome",
    "QueueRedisConfig": "config",
    "StreamApp": "asgi.app",
    "StreamContext": "context",
    "StreamError": "errors",
    "StreamEvent": "events",
    "StreamLease": "leases.limiter",
    "StreamLeaseConfig": "config",
    "StreamLeaseLimiter": "leases.limiter",
    "StreamLeaseMiddleware": "asgi.middleware",
    "StreamLeaseWarning": "errors",
    "StreamLimitExceeded": "errors",
    "Streaming": "runtime",
    "SyncStreamChannel": "channels.client",
    "init_channels": "runtime",
    "init_event_storage": "runtime",
    "init_lease_limiter": "runtime",
    "init_streaming": "runtime",
    "shutdown_streaming": "runtime",
    "sse_response": "asgi.sse_response",
    "stream_app": "asgi.app",
    "stream_lease": "runtime",
}

__all__ = [
    "AsyncStreamChannel",
    "ChannelConfig",
    "EventStreamResponse",
    "Outcome",
    "QueueRedisConfig",
    "StreamApp",
    "StreamContext",
    "StreamError",
    "StreamEvent",
    "StreamLease",
    "StreamLeaseConfig",
    "StreamLeaseLimiter",
    "StreamLeaseMiddleware",
    "StreamLeaseWarning",
    "StreamLimitExceeded",
    "Streaming",
    "SyncStreamChannel",
    "init_channels",
    "init_event_storage",
    "init_lease_limiter",
    "init_streaming",
    "shutdown_streaming",
    "sse_response",
    "stream_app",
    "stream_lease",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
