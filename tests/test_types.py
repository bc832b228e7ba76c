"""What type checkers see of the public names: mypy runs over this file, and so does Python."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, assert_type

import pytest
from starlette.responses import Response

from asgi_stream import (
    EventStreamResponse,
    StreamEvent,
    Streaming,
    StreamLease,
    StreamLeaseLimiter,
    StreamLimitExceeded,
    init_streaming,
    shutdown_streaming,
    stream_lease,
)
from asgi_stream.sse import Decoder, ServerSentEvent, encode


async def tokens() -> AsyncIterator[str]:
    yield "token"


def test_events_and_wire() -> None:
    event = StreamEvent({"n": 1}, event="count", id="1", retry=1000)
    assert_type(event, StreamEvent)
    assert_type(event.event, str | None)
    assert_type(event.retry, int | None)
    assert_type(encode(event), bytes)
    assert_type(list(Decoder().feed(encode(event))), list[ServerSentEvent])


def test_responses_are_starlette_s() -> None:
    response: Response = EventStreamResponse(tokens(), format="ndjson", on_disconnect=2.5)
    assert_type(response.status_code, int)


@pytest.mark.anyio
async def test_leases() -> None:
    async with Streaming() as streaming:
        assert_type(streaming, Streaming)
        assert_type(streaming.leases, StreamLeaseLimiter)
    await shutdown_streaming()
    assert_type(init_streaming(), Streaming)
    async with stream_lease("ann") as lease:
        assert_type(lease, StreamLease)
        assert_type(lease.lost, bool)
        assert_type(await lease.refresh_async(), bool)
    assert_type(await shutdown_streaming(), None)


def test_a_refusal_tells_what_a_client_can_act_on() -> None:
    def use(refusal: StreamLimitExceeded) -> Any:
        assert_type(refusal.limit, int)
        assert_type(refusal.in_use, int)

    assert callable(use)
