"""What clients see of leases that wait, are taken away, or are refused [L3] [L5] [L6] [W4]."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_stream import (
    EventStreamResponse,
    StreamApp,
    Streaming,
    StreamLeaseConfig,
    StreamLeaseMiddleware,
    sse_response,
    stream_lease,
)
from asgi_stream.asgi.gone import last_event_id
from asgi_stream.sse import decode
from tests.asgi_client import Exchange, http_scope
from tests.leases.test_stores import until_old

pytestmark = pytest.mark.anyio

EVENTS = {"accept": "text/event-stream"}


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., tuple[Any, Streaming]]]:
    made: list[Streaming] = []

    def make(redis: str | None = None, **settings: Any) -> tuple[Any, Streaming]:
        config = StreamLeaseConfig(**{"limit": 1, "key_namespace": f"policies-{os.getpid()}-{len(made)}", **settings})
        streaming = Streaming(redis, leases=config)
        made.append(streaming)
        limiter = streaming.leases

        async def numbers() -> AsyncIterator[Any]:
            for n in range(10_000):
                yield {"n": n}
                await asyncio.sleep(0.01)

        async def ours(request: Request) -> Response:
            return EventStreamResponse(numbers())

        async def short(request: Request) -> Response:
            async def two() -> AsyncIterator[Any]:
                yield 1
                yield 2

            return EventStreamResponse(two())

        async def block(request: Request) -> Response:
            async with stream_lease("ann", limiter=limiter):
                return EventStreamResponse(numbers())

        async def foreign(request: Request) -> Response:
            async def frames() -> AsyncIterator[bytes]:
                async for item in numbers():
                    yield b"data: %d\n\n" % item["n"]

            return StreamingResponse(frames(), media_type="text/event-stream")

        async def channel(request: Request) -> Response:
            return await sse_response("a-channel", streaming=streaming)

        async def plain(request: Request) -> Response:
            return PlainTextResponse("no stream", 404)

        async def socket(websocket: WebSocket) -> None:
            await websocket.accept()
            while True:
                await websocket.receive_text()

        routes: list[Any] = [
            Route("/" + endpoint.__name__, endpoint) for endpoint in (ours, short, block, foreign, channel, plain)
        ]
        middleware = Middleware(StreamLeaseMiddleware, streaming=streaming, identify=lambda scope: "ann")
        return Starlette(routes=[*routes, WebSocketRoute("/ws", socket)], middleware=[middleware]), streaming

    yield make
    for streaming in made:
        await streaming.aclose()


def told(exchange: Exchange) -> list[str]:
    return [event.event for event in decode(exchange.bodies)]


@pytest.mark.parametrize("path", ["/ours", "/block", "/foreign", "/channel"])
async def test_the_older_stream_gives_way_and_stays_away(make: Any, path: str) -> None:
    app, streaming = make(policy="evict_oldest")
    old = Exchange(app, http_scope(path, headers=EVENTS))
    await old.until(lambda: len(old.bodies) > 0)
    new = Exchange(app, http_scope("/ours", headers=EVENTS))
    await old.end()
    last = list(decode(old.bodies))[-1]
    assert last.event == "close"
    assert json.loads(last.data)["reason"] == "superseded"
    await new.until_body(b'{"n":1}')
    # EventSource comes back with the id of the last event: it is sent away before it takes anything.
    back = await Exchange(app, http_scope(path, headers={**EVENTS, "last-event-id": str(last.id)})).end()
    assert back.status == 204
    assert streaming.leases.in_use("ann") == 1
    new.leave()
    await new.end()


@pytest.mark.parametrize("path", ["/ours", "/foreign", "/channel"])
async def test_a_revoked_stream_says_so(make: Any, redis_url: str, path: str) -> None:
    app, streaming = make(redis_url)
    exchange = Exchange(app, http_scope(path, headers=EVENTS))
    await exchange.until(lambda: len(exchange.bodies) > 0)
    assert await streaming.leases.revoke_async(user="ann") == 1
    await exchange.end()
    last = list(decode(exchange.bodies))[-1]
    assert (last.event, json.loads(last.data)["reason"]) == ("close", "revoked")
    again = Exchange(app, http_scope("/ours", headers=EVENTS))
    await again.until_body(b'{"n":1}')
    again.leave()
    await again.end()


async def test_a_websocket_whose_lease_is_lost_is_closed_with_1008(make: Any) -> None:
    app, streaming = make()
    sent: list[Any] = []
    closed = asyncio.Event()
    received: asyncio.Queue[Any] = asyncio.Queue()
    await received.put({"type": "websocket.connect"})

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "websocket.close":
            closed.set()
            await received.put({"type": "websocket.disconnect", "code": 1008})

    scope = {**http_scope("/ws"), "type": "websocket", "scheme": "ws", "subprotocols": []}
    task = asyncio.create_task(app(scope, received.get, send))
    while not sent:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert streaming.leases.revoke(user="ann") == 1
    async with asyncio.timeout(20):
        await closed.wait()
    assert sent[-1]["code"] == 1008
    await asyncio.wait([task], timeout=20)
    task.exception()


async def test_a_stream_past_its_deadline_asks_before_it_sends(make: Any, redis_url: str) -> None:
    """As after a stalled loop: the slot was taken by somebody else meanwhile, and nothing more is sent."""
    await until_old(redis_url)
    app, streaming = make(redis_url)
    exchange = Exchange(app, http_scope("/ours", headers=EVENTS))
    await exchange.until_body(b'{"n":3}')
    limiter = streaming.leases
    assert limiter._redis is not None
    (slot,) = limiter._redis.slots.values()
    import redis

    client: Any = redis.Redis.from_url(redis_url)
    key = limiter._redis.commands.keys(slot.key)[0]
    client.delete(key)
    client.zadd(key, {"0123456789:1:1:elsewhere:1": 9e12})
    seen = len(told(exchange))
    for stream in streaming.streams._loops[asyncio.get_running_loop()].streams:
        stream.good_until = slot.good_until = 0.0
    await exchange.end()
    assert told(exchange)[seen:] in (["close"], ["message", "close"])  # one may have been under way
    assert json.loads(list(decode(exchange.bodies))[-1].data)["reason"] == "lease_lost"
    client.close()


async def test_one_who_waits_is_told_its_position_in_stream(make: Any) -> None:
    app, streaming = make(policy="wait")
    first = Exchange(app, http_scope("/ours", headers=EVENTS))
    await first.until_body(b'{"n":1}')
    second = Exchange(app, http_scope("/short", headers=EVENTS))
    await second.until_body(b"event: waiting")
    assert second.status == 200
    assert json.loads(next(iter(decode(second.bodies))).data)["position"] == 0
    third = Exchange(app, http_scope("/plain", headers=EVENTS))
    await third.until_body(b'"position":1')
    fourth = Exchange(app, http_scope("/short", headers=EVENTS))
    await fourth.until_body(b'"position":2')
    fourth.leave()  # out of the line
    await fourth.end()
    first.leave()
    await first.end()
    await second.end()
    assert told(second) == ["waiting", "message", "message", "complete"]
    await third.end()
    assert told(third)[-1] == "failed"
    assert b"http_404" in third.body
    assert streaming.leases.in_use("ann") == 0


async def test_one_who_waited_too_long_is_refused(make: Any) -> None:
    app, _ = make(policy="wait", wait_timeout=0.1)
    first = Exchange(app, http_scope("/ours", headers=EVENTS))
    await first.until_body(b'{"n":1}')
    second = await Exchange(app, http_scope("/short", headers=EVENTS)).end()
    assert told(second) == ["waiting", "failed"]
    assert b"stream_limit_exceeded" in second.body
    # Who did not ask for an event stream has a status.
    third = await Exchange(app, http_scope("/short")).end()
    assert third.status == 429
    first.leave()
    await first.end()


async def test_the_forms_of_a_refusal(make: Any) -> None:
    app, _ = make(rate_limit_headers=True)
    first = Exchange(app, http_scope("/ours", headers=EVENTS))
    await first.until_body(b'{"n":1}')
    refused = await Exchange(app, http_scope("/ours", headers=EVENTS)).end()
    assert refused.status == 429
    assert refused.headers["ratelimit-policy"] == '"streams";q=1;qu="concurrent-requests"'
    assert refused.headers["ratelimit"] == '"streams";r=0'
    assert "x-should-retry" not in refused.headers
    hammering = {**EVENTS, "user-agent": "OpenAI/Python 1.60.0"}
    assert (await Exchange(app, http_scope("/ours", headers=hammering)).end()).headers["x-should-retry"] == "false"
    first.leave()
    await first.end()


async def test_a_native_eventsource_is_refused_by_a_stream(make: Any) -> None:
    app, _ = make(eventsource_refusals=True)
    first = Exchange(app, http_scope("/ours", headers=EVENTS))
    await first.until_body(b'{"n":1}')
    refused = await Exchange(app, http_scope("/ours", headers=EVENTS)).end()
    assert refused.status == 200
    (event,) = decode(refused.bodies)
    assert (event.event, json.loads(event.data)["code"]) == ("failed", "stream_limit_exceeded")
    assert event.id == ""
    assert b"retry: 30000" in refused.body
    assert (await Exchange(app, http_scope("/ours")).end()).status == 429
    first.leave()
    await first.end()


async def test_closed_without_redis_is_503(make: Any) -> None:
    app, _ = make("redis://127.0.0.1:1/0", fallback="closed")
    for path in ("/ours", "/block"):
        refused = await Exchange(app, http_scope(path, headers=EVENTS)).end()
        assert refused.status == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert int(refused.headers["retry-after"]) >= 1


async def test_expired_and_revoked_viewers_stay_away(make: Any) -> None:
    """204 for one that comes back by itself, 403 where it has no right any more."""
    streaming = Streaming(secret="a secret of sixteen bytes")
    app = StreamApp(streaming)
    ticket = streaming.ticket("some-channel", seconds=300)
    scope = http_scope("/some-channel", query_string=f"ticket={ticket}".encode())
    exchange = Exchange(app, scope)
    await exchange.until_body(b"ready")
    await streaming.close(channel="some-channel")
    await exchange.end()
    last = list(decode(exchange.bodies))[-1]
    assert json.loads(last.data)["reason"] == "revoked"
    headers = [(b"last-event-id", str(last.id).encode())]
    assert (await Exchange(app, {**scope, "headers": headers}).end()).status == 204
    await streaming.revoke_tickets("some-channel")
    assert (await Exchange(app, {**scope, "headers": headers}).end()).status == 403
    await streaming.aclose()


def test_where_a_client_says_what_it_has_seen() -> None:
    assert last_event_id(http_scope()) is None
    assert last_event_id(http_scope(query_string=b"last_event_id=a.1&x=y")) == "a.1"
    assert last_event_id(http_scope(headers={"Last-Event-ID": "b.2"}, query_string=b"last_event_id=a.1")) == "b.2"
