"""For FastAPI: dependencies that hold a stream slot, and a lifespan that ends streams at shutdown."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from asgi_stream.asgi.identity import identify, warn_refused_by_address
from asgi_stream.errors import ConfigurationError, StreamLimitExceeded, require
from asgi_stream.leases.handover import LeaseBlock
from asgi_stream.leases.limiter import StreamLease
from asgi_stream.runtime import Streaming, current_streaming, stream_lease

require("fastapi", extra="fastapi")

from fastapi import Depends  # noqa: E402 - after the check above, whose error names the extra
from starlette.requests import HTTPConnection  # noqa: E402


async def stream_lease_dep(connection: HTTPConnection) -> AsyncIterator[StreamLease]:
    """Hold a slot of the request's user: ``lease: StreamLease = Depends(stream_lease_dep)``.

    The user is found as in `StreamLeaseMiddleware`. Raises `StreamLimitExceeded`, which is a 429. Without the
    middleware, and with a response other than `EventStreamResponse`, the slot is held until FastAPI leaves the
    dependency, so that background tasks hold it too.
    """
    streaming = current_streaming()
    who = identify(connection.scope, streaming.identify)
    limiter = streaming.leases
    block = LeaseBlock(lambda: limiter, who.key, limiter.config.proxied_limit if who.proxied else None)
    try:
        lease = await block.__aenter__()
    except StreamLimitExceeded:
        if not who.by_user:
            warn_refused_by_address(who.key)
        raise
    try:
        yield lease
    finally:
        await block.__aexit__(None, None, None)


def stream_lease_for(
    dependency: Callable[..., Any], *, key: Callable[[Any], str] = str, limit: int | None = None
) -> Callable[..., AsyncIterator[StreamLease]]:
    """Make a dependency that holds a slot of the user that *dependency* finds.

    ``Depends(stream_lease_for(get_current_user, key=lambda user: str(user.id)))``. ``key`` makes the user's id, and
    ``limit`` replaces the configured limit.
    """
    if not callable(dependency):
        raise ConfigurationError("stream_lease_for takes the dependency itself, such as get_current_user, not a call")

    async def lease_for(user: Any = Depends(dependency)) -> AsyncIterator[StreamLease]:
        async with stream_lease(key(user), limit=limit) as lease:
            yield lease

    return lease_for


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """``FastAPI(lifespan=lifespan)``: end open streams when the server stops, even those opened by nothing of ours."""
    streaming: Streaming = current_streaming()
    async with streaming:
        yield


__all__ = ["lifespan", "stream_lease_dep", "stream_lease_for"]
