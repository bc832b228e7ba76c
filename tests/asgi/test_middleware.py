"""Leases in requests: who holds, who is counted, who releases."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_stream import (
    EventStreamResponse,
    StreamLease,
    StreamLeaseConfig,
    StreamLeaseMiddleware,
    StreamLeaseWarning,
    StreamLimitExceeded,
    init_streaming,
    shutdown_streaming,
    stream_lease,
)
from asgi_stream.asgi import identity
from asgi_stream.fastapi import stream_lease_dep, stream_lease_for
from asgi_stream.runtime import current_streaming
from tests.asgi_client import Exchange, fetch, http_scope

pytestmark = pytest.mark.anyio

LIMIT = 2

OF_ANN = stream_lease_for(lambda: "ann")


@pytest.fixture(autouse=True)
async def streaming() -> AsyncIterator[None]:
    await shutdown_streaming()
    identity._said.clear()
    init_streaming(leases=StreamLeaseConfig(limit=LIMIT))
    yield
    await shutdown_streaming()


def in_use(user: str = "ann") -> int:
    return current_streaming().leases.in_use(user)


async def tokens() -> AsyncIterator[str]:
    yield "data: a\n\n"
    await asyncio.Event().wait()


async def frames() -> AsyncIterator[bytes]:
    yield b"data: a\n\n"
    await asyncio.Event().wait()


class ByHeader(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        name = conn.headers.get("x-user")
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


def starlette_stream() -> Response:
    return StreamingResponse(tokens(), media_type="text/event-stream")


def our_stream(lease: StreamLease | None = None) -> Response:
    return EventStreamResponse(frames(), lease=lease)


# Ways to hold a lease as long as the stream lasts. Each is an application that limits "ann".


def block_with_middleware() -> Any:
    async def endpoint(request: Request) -> Response:
        try:
            async with stream_lease("ann"):
                return starlette_stream()
        except StreamLimitExceeded:
            raise HTTPException(429, "Too many concurrent streams") from None

    return Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])


def block_with_our_response() -> Any:
    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            return our_stream()

    return Starlette(routes=[Route("/", endpoint)])


def lease_handed_over() -> Any:
    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann") as lease:
            pass_on = lease
            return our_stream(pass_on)

    return Starlette(routes=[Route("/", endpoint)])


def dependency_with_our_response() -> Any:
    app = FastAPI()

    @app.get("/")
    async def endpoint(lease: StreamLease = Depends(OF_ANN)) -> Response:
        return our_stream()

    return app


def dependency_with_starlettes_response() -> Any:
    app = FastAPI()

    @app.get("/")
    async def endpoint(lease: StreamLease = Depends(OF_ANN)) -> Response:
        return starlette_stream()

    return app


def inside_the_generator() -> Any:
    async def generate() -> AsyncIterator[bytes]:
        async with stream_lease("ann"):
            async for frame in frames():
                yield frame

    async def endpoint(request: Request) -> Response:
        return EventStreamResponse(generate())

    return Starlette(routes=[Route("/", endpoint)])


def sync_endpoint_with_middleware() -> Any:
    def endpoint(request: Request) -> Response:
        with stream_lease("ann"):
            return starlette_stream()

    return Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])


def own_context_manager_with_middleware() -> Any:
    @asynccontextmanager
    async def limited() -> AsyncIterator[None]:
        async with stream_lease("ann"):
            yield

    async def endpoint(request: Request) -> Response:
        async with limited():
            return starlette_stream()

    return Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])


def all_together() -> Any:
    app = FastAPI()

    @app.get("/")
    async def endpoint(lease: StreamLease = Depends(OF_ANN)) -> Response:
        async with stream_lease("ann") as inner:
            return our_stream(inner)

    app.add_middleware(StreamLeaseMiddleware, identify=lambda scope: "ann")
    return app


def base_http_middleware_inside_and_outside() -> Any:
    async def pass_on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            return our_stream()

    around = Middleware(BaseHTTPMiddleware, dispatch=pass_on)
    return Starlette(routes=[Route("/", endpoint)], middleware=[around, Middleware(StreamLeaseMiddleware), around])


WAYS = [
    block_with_middleware,
    block_with_our_response,
    lease_handed_over,
    dependency_with_our_response,
    dependency_with_starlettes_response,
    inside_the_generator,
    sync_endpoint_with_middleware,
    own_context_manager_with_middleware,
    all_together,
    base_http_middleware_inside_and_outside,
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_lease_lasts_exactly_as_long_as_its_stream(way: Any) -> None:
    """[L1] One slot a request; a refusal is 429; a client that leaves frees its slot."""
    app = way()
    open_streams = []
    for _ in range(LIMIT):
        exchange = Exchange(app, http_scope())
        await exchange.until_body(b"data: a\n\n")
        open_streams.append(exchange)
    assert in_use() == LIMIT

    refused = await fetch(app)
    assert refused.status == 429
    assert b"a" in refused.body

    open_streams[0].leave()
    await open_streams[0].end()
    assert in_use() == LIMIT - 1
    again = Exchange(app, http_scope())
    await again.until_body(b"data: a\n\n")
    for exchange in (open_streams[1], again):
        exchange.leave()
        await exchange.end()
    assert in_use() == 0


async def test_the_block_around_starlettes_response_without_middleware_warns_with_the_line_to_add() -> None:
    """[L1] The trap: such a lease limits nothing."""

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            return StreamingResponse(iter(["a"]), media_type="text/event-stream")

    app = Starlette(routes=[Route("/", endpoint)])
    with pytest.warns(StreamLeaseWarning, match=r"app\.add_middleware\(StreamLeaseMiddleware\)"):
        await fetch(app)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        await fetch(app)
        await fetch(app)
    assert in_use() == 0
    assert len(caught) <= 1


async def test_a_block_in_a_worker_is_simply_held_and_does_not_warn() -> None:
    async with stream_lease("ann"):
        assert in_use() == 1
    assert in_use() == 0


async def test_the_slot_is_free_with_the_last_byte_and_background_work_holds_none() -> None:
    """[L1]"""
    during: list[int] = []

    async def few() -> AsyncIterator[str]:
        yield "data: a\n\n"

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            task = BackgroundTask(lambda: during.append(in_use()))
            return StreamingResponse(few(), media_type="text/event-stream", background=task)

    await fetch(Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)]))
    assert during == [0]


async def test_a_response_that_is_never_sent_gives_its_slot_back() -> None:
    """[L1]"""

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            our_stream()
        return JSONResponse({})

    assert (await fetch(Starlette(routes=[Route("/", endpoint)]))).status == 200
    assert in_use() == 0


async def test_finish_keeps_the_slot_with_the_producer() -> None:
    """[L1]"""
    gate = asyncio.Event()

    async def generate() -> AsyncIterator[str]:
        yield "a"
        await gate.wait()

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            return EventStreamResponse(generate(), on_disconnect="finish")

    for middleware in ([], [Middleware(StreamLeaseMiddleware)]):
        gate.clear()
        exchange = Exchange(Starlette(routes=[Route("/", endpoint)], middleware=middleware), http_scope())
        await exchange.until_body(b"data: a\n\n")
        exchange.leave()
        for _ in range(10):
            await asyncio.sleep(0)
        assert in_use() == 1
        gate.set()
        await exchange.end()
        assert in_use() == 0


async def test_a_refusal_is_problem_details_with_a_time_to_retry() -> None:
    """[L6]"""

    async def endpoint(request: Request) -> Response:
        return starlette_stream()

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(StreamLeaseMiddleware, identify=lambda scope: "ann")],
    )
    held = [current_streaming().leases.acquire("ann") for _ in range(LIMIT)]
    refused = await fetch(app)
    assert refused.status == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) >= 1
    problem = json.loads(refused.body)
    assert problem["limit"] == problem["in_use"] == len(held)
    assert (problem["status"], problem["scope"]) == (429, "user")


@pytest.mark.parametrize("raised_in", ["starlette", "fastapi"])
async def test_an_uncaught_refusal_is_a_429_without_the_middleware_too(raised_in: str) -> None:
    """[L6]"""

    async def endpoint(request: Request) -> Response:
        async with stream_lease("ann"):
            return our_stream()

    app: Any = FastAPI() if raised_in == "fastapi" else Starlette()
    app.add_route("/", endpoint)
    held = [current_streaming().leases.acquire("ann") for _ in range(LIMIT)]
    refused = await fetch(app)
    assert (refused.status, len(held)) == (429, LIMIT)
    assert int(refused.headers["retry-after"]) >= 1


async def test_requests_that_do_not_stream_are_not_counted() -> None:
    async def endpoint(request: Request) -> Response:
        return JSONResponse({"in_use": in_use()})

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(StreamLeaseMiddleware, identify=lambda scope: "ann")],
    )
    held = [current_streaming().leases.acquire("ann") for _ in range(LIMIT)]
    assert json.loads((await fetch(app)).body) == {"in_use": len(held)}


# Whose streams are counted [L7]


@pytest.mark.parametrize("order", ["authentication outside", "authentication inside"])
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
async def test_the_authenticated_user_is_counted(order: str, accept: str) -> None:
    async def endpoint(request: Request) -> Response:
        return starlette_stream()

    middleware = [Middleware(AuthenticationMiddleware, backend=ByHeader()), Middleware(StreamLeaseMiddleware)]
    if order == "authentication inside":
        middleware.reverse()
    app = Starlette(routes=[Route("/", endpoint)], middleware=middleware)
    exchange = Exchange(app, http_scope(headers={"X-User": "ann", "Accept": accept}))
    await exchange.until_body(b"data: a\n\n")
    assert in_use("ann") == 1
    exchange.leave()
    await exchange.end()
    assert in_use("ann") == 0


async def test_fastapis_current_user_is_counted_by_a_dependency_made_of_it() -> None:
    def current_user(request: Request) -> dict[str, str]:
        return {"id": request.headers["x-user"]}

    app = FastAPI()
    app.add_middleware(StreamLeaseMiddleware)
    of_user = stream_lease_for(current_user, key=lambda user: str(user["id"]))

    @app.get("/")
    async def endpoint(lease: StreamLease = Depends(of_user)) -> Response:
        return starlette_stream()

    exchange = Exchange(app, http_scope(headers={"X-User": "bob"}))
    await exchange.until_body(b"data: a\n\n")
    limiter = current_streaming().leases
    assert limiter.in_use("bob") == 1
    assert limiter.in_use_key("addr:192.0.2.7") == 0  # one request, one slot
    exchange.leave()
    await exchange.end()


async def test_a_proxys_address_has_a_limit_of_its_own_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(request: Request) -> Response:
        return starlette_stream()

    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])
    scope = http_scope(client=("10.0.0.5", 1), headers={"X-Forwarded-For": "198.51.100.1"})
    exchanges = [Exchange(app, scope) for _ in range(LIMIT + 3)]
    for exchange in exchanges:
        await exchange.until_body(b"data: a\n\n")
    assert "--forwarded-allow-ips" in caplog.text
    for exchange in exchanges:
        exchange.leave()
        await exchange.end()


async def test_the_first_refusal_by_address_says_what_to_set(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(request: Request) -> Response:
        return starlette_stream()

    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])
    exchanges = [Exchange(app, http_scope(client=("198.51.100.7", 1))) for _ in range(LIMIT)]
    for exchange in exchanges:
        await exchange.until_body(b"data: a\n\n")
    refused = await fetch(app, http_scope(client=("198.51.100.7", 1)))
    assert refused.status == 429
    assert "identify=" in caplog.text
    for exchange in exchanges:
        exchange.leave()
        await exchange.end()


async def test_paths_decide_before_the_endpoint_runs() -> None:
    """[L7]"""
    ran: list[str] = []

    async def endpoint(request: Request) -> Response:
        ran.append(request.url.path)
        return starlette_stream()

    app = Starlette(
        routes=[Route("/chat/{name}", endpoint)],
        middleware=[Middleware(StreamLeaseMiddleware, identify=lambda scope: "ann", paths=["/chat/.*"])],
    )
    held = [current_streaming().leases.acquire("ann") for _ in range(LIMIT)]
    assert (await fetch(app, http_scope("/chat/x"))).status == 429
    assert (ran, len(held)) == ([], LIMIT)


# WebSockets


class Socket:
    """Enough of a WebSocket client to see what it gets."""

    def __init__(self, app: Any) -> None:
        self.sent: list[Any] = []
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        self._changed = asyncio.Event()
        scope = {**http_scope(), "type": "websocket", "subprotocols": []}
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self._changed.set()

    async def first(self) -> Any:
        await asyncio.wait_for(self._changed.wait(), 10)
        return self.sent[0]

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await asyncio.wait_for(self.task, 10)


@pytest.mark.parametrize("explicit", [True, False])
async def test_websockets_are_counted_and_refused_with_1008(explicit: bool) -> None:
    """[L6]"""

    async def endpoint(websocket: WebSocket) -> None:
        if explicit:
            async with stream_lease("ann"):
                await websocket.accept()
                await websocket.receive()
        else:
            await websocket.accept()
            await websocket.receive()

    identify = None if explicit else (lambda scope: "ann")
    app = Starlette(
        routes=[WebSocketRoute("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware, identify=identify)]
    )
    sockets = [Socket(app) for _ in range(LIMIT)]
    for socket in sockets:
        assert (await socket.first())["type"] == "websocket.accept"
    assert in_use() == LIMIT
    refused = await Socket(app).first()
    assert (refused["type"], refused["code"]) == ("websocket.close", 1008)
    for socket in sockets:
        await socket.leave()
    assert in_use() == 0


# Shutdown


async def test_starlettes_own_stream_says_goodbye_at_shutdown() -> None:
    """[O1]"""
    closed: list[bool] = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "data: a\n\n"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(generate(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(StreamLeaseMiddleware)])
    exchange = Exchange(app, http_scope())
    await exchange.until_body(b"data: a\n\n")
    current_streaming().begin_shutdown()
    try:
        await exchange.end()
    finally:
        current_streaming().streams.reopen()
    assert exchange.events[-1].event == "close"
    assert exchange.over
    assert closed == [True]


async def test_a_raw_application_that_watches_nothing_is_ended_at_shutdown_too() -> None:
    """[O1]"""

    async def raw(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
        await asyncio.sleep(60)

    exchange = Exchange(StreamLeaseMiddleware(raw), http_scope())
    await exchange.until_body(b"data: a\n\n")
    current_streaming().begin_shutdown()
    try:
        await exchange.end()
    finally:
        current_streaming().streams.reopen()
    assert exchange.events[-1].event == "close"


async def test_dependency_counts_the_request_s_own_user() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(lease: StreamLease = Depends(stream_lease_dep)) -> Response:
        return our_stream(lease)

    exchange = Exchange(app, http_scope(client=("198.51.100.7", 1)))
    await exchange.until_body(b"data: a\n\n")
    assert current_streaming().leases.in_use_key("addr:198.51.100.7") == 1
    exchange.leave()
    await exchange.end()
    assert current_streaming().leases.in_use_key("addr:198.51.100.7") == 0
