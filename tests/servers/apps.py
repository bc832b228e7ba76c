"""The applications that the servers of these tests run: the same streams in every framework.

What happens is appended to the file that ``TEST_LOG`` names, with the time of one clock.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from starlette.responses import Response

from asgi_stream import EventStreamResponse, StreamEvent, StreamLeaseMiddleware, stream_lease
from asgi_stream.leases.memory import MemoryLeaseStore
from asgi_stream.leases.store import Slot

_variable: ContextVar[str] = ContextVar("variable", default="unset")


def record(line: str) -> None:
    with open(os.environ["TEST_LOG"], "a") as file:
        file.write(f"{time.monotonic():.6f} {line}\n")


async def waiting() -> AsyncIterator[str]:
    """One token, then a minute of waiting for an upstream."""
    task = asyncio.current_task()
    _variable.set("kept")
    try:
        yield "token"
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.001)
        same = "same-task" if asyncio.current_task() is task else "other-task"
        record(f"closed {same} {_variable.get()}")


async def flood() -> AsyncIterator[bytes]:
    """More than any buffer holds, for a client that does not read."""
    while True:
        yield b"data: " + b"x" * 4000 + b"\n\n"
        await asyncio.sleep(0)


async def short() -> AsyncIterator[str]:
    """A stream that ends by itself soon."""
    for n in range(3):
        yield str(n)
        await asyncio.sleep(0.02)


def streams(path: str) -> EventStreamResponse:
    return EventStreamResponse(flood() if path == "/flood" else waiting())


class Probe:
    """Outermost: records when the server tells that the client has left."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/ready":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        streaming = over = False

        async def watched() -> Any:
            nonlocal over
            message = await receive()
            if message["type"] == "http.disconnect":
                record("noticed")
                if streaming and not over:
                    record("over: the client left")
                    over = True
            return message

        async def sent(message: Any) -> None:
            nonlocal streaming, over
            streaming = streaming or message.get("status") == 200
            if streaming and not over and not message.get("more_body", True):
                record("over: the last byte")
                over = True
            await send(message)

        if scope["type"] == "http" and scope["path"] != "/in_use":
            await self.app(scope, watched, sent)
        else:
            await self.app(scope, receive, send)


async def _plain(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        record("lifespan over")
        await send({"type": "lifespan.shutdown.complete"})
        return
    await streams(scope["path"])(scope, receive, send)


def _starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def endpoint(request: Request) -> Any:
        return streams(request.url.path)

    async def foreign(request: Request) -> Any:
        return StreamingResponse(foreign_stream(), media_type="text/event-stream")

    async def foreign_stream() -> AsyncIterator[str]:
        try:
            yield "data: token\n\n"
            await asyncio.sleep(60)
        finally:
            record("closed")  # no `await` here: under Starlette's own response it would be cancelled again

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        record("lifespan over")

    routes = [Route("/wait", endpoint), Route("/flood", endpoint), Route("/foreign", foreign)]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_middleware(StreamLeaseMiddleware, identify=lambda scope: str(id(scope)))
    return app


def _fastapi() -> Any:
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/wait")
    async def wait() -> EventStreamResponse:
        return streams("/wait")

    return app


def _litestar() -> Any:
    from litestar import Litestar, asgi

    @asgi("/wait")
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await streams("/wait")(scope, receive, send)

    return Litestar([wait])


def _quart() -> Any:
    from quart import Quart

    app = Quart(__name__)
    inner = app.asgi_app

    async def with_streams(scope: Any, receive: Any, send: Any) -> None:
        # Quart's way to put an ASGI application beside its own routes: wrap `asgi_app`.
        if scope["type"] == "http" and scope["path"] == "/wait":
            await streams("/wait")(scope, receive, send)
        else:
            await inner(scope, receive, send)

    app.asgi_app = with_streams  # type: ignore[method-assign]
    return app


class _RecordingStore(MemoryLeaseStore):
    def release(self, slot: Slot) -> bool:
        record("freed")
        return super().release(slot)


def _record_releases() -> None:
    from asgi_stream.runtime import current_streaming

    current_streaming().leases._memory = _RecordingStore()


def _leases() -> Any:
    _record_releases()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    from asgi_stream import StreamLimitExceeded
    from asgi_stream.runtime import current_streaming

    async def frames() -> AsyncIterator[str]:
        async for token in short():
            yield f"data: {token}\n\n"

    async def as_written(request: Request) -> Any:
        try:
            async with stream_lease("ann"):
                return StreamingResponse(frames(), media_type="text/event-stream")
        except StreamLimitExceeded:
            raise HTTPException(429, "Too many concurrent streams") from None

    async def ours(request: Request) -> Any:
        async with stream_lease("ann"):
            return EventStreamResponse(short())

    async def handed_over(request: Request) -> Any:
        async with stream_lease("ann") as lease:
            return EventStreamResponse(short(), lease=lease)

    async def in_generator(request: Request) -> Any:
        async def generate() -> AsyncIterator[str]:
            async with stream_lease("ann"):
                async for token in short():
                    yield token

        return EventStreamResponse(generate())

    async def in_use(request: Request) -> Any:
        return JSONResponse(current_streaming().leases.in_use("ann"))

    endpoints = [as_written, ours, handed_over, in_generator, in_use]
    app = Starlette(routes=[Route(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints])
    if os.environ.get("TEST_MIDDLEWARE"):
        app.add_middleware(StreamLeaseMiddleware)
    return app


def _shared_leases() -> Any:
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.requests import Request
    from starlette.routing import Route

    async def two() -> AsyncIterator[Any]:
        yield 1
        yield 2

    async def forever() -> AsyncIterator[Any]:
        yield 1
        await asyncio.Event().wait()

    async def once(request: Request) -> Any:
        return EventStreamResponse(two())

    async def task(request: Request) -> Any:
        return EventStreamResponse(two(), background=BackgroundTask(asyncio.sleep, 2.0))

    async def hold(request: Request) -> Any:
        return EventStreamResponse(forever(), start_within=0)

    routes = [Route("/" + endpoint.__name__, endpoint) for endpoint in (once, task, hold)]
    app = Starlette(routes=routes)
    app.add_middleware(StreamLeaseMiddleware, identify=lambda scope: "ann")
    return app


def _leases_fastapi() -> Any:
    _record_releases()
    from fastapi import Depends, FastAPI
    from starlette.responses import StreamingResponse

    from asgi_stream import StreamLease
    from asgi_stream.fastapi import stream_lease_dep, stream_lease_for
    from asgi_stream.runtime import current_streaming

    app = FastAPI()
    if os.environ.get("TEST_MIDDLEWARE"):
        app.add_middleware(StreamLeaseMiddleware)

    async def ann() -> str:  # not `def`: from a thread, it would take its slot after the test has looked
        return "ann"

    of_ann = stream_lease_for(ann)

    async def frames() -> AsyncIterator[str]:
        async for token in short():
            yield f"data: {token}\n\n"

    @app.get("/dependency")
    async def dependency(lease: StreamLease = Depends(stream_lease_dep)) -> EventStreamResponse:
        return EventStreamResponse(short())

    @app.get("/dependency_foreign")
    async def dependency_foreign(lease: StreamLease = Depends(of_ann)) -> StreamingResponse:
        return StreamingResponse(frames(), media_type="text/event-stream")

    @app.get("/all_together")
    async def all_together(lease: StreamLease = Depends(of_ann)) -> EventStreamResponse:
        async with stream_lease("ann") as inner:
            return EventStreamResponse(short(), lease=inner)

    @app.get("/in_use")
    async def in_use() -> int:
        limiter = current_streaming().leases
        return limiter.in_use("ann") + limiter.in_use_key("addr:127.0.0.1")

    return app


async def _chat_completions(scope: Any, receive: Any, send: Any) -> None:
    """OpenAI's protocol, with ids and heartbeats between the chunks: what breaks clients if it is not done right."""

    async def generate() -> AsyncIterator[StreamEvent]:
        for n, word in enumerate(["Hel", "lo"]):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            yield StreamEvent(chunk, id=str(n))
            await asyncio.sleep(0.3)
        yield StreamEvent("[DONE]")

    await EventStreamResponse(generate(), heartbeat=0.05, end_event=None)(scope, receive, send)


async def _event_source(scope: Any, receive: Any, send: Any) -> None:
    """A page whose EventSource reads a stream to its end, and comes back by itself."""
    if scope["path"] != "/stream":
        await Response("<!doctype html><title>page</title>", media_type="text/html")(scope, receive, send)
        return

    async def generate() -> AsyncIterator[StreamEvent]:
        record("began")
        yield StreamEvent("word", retry=10)
        await asyncio.sleep(0.1)
        yield StreamEvent({"words": 2}, "sum")

    await EventStreamResponse(generate(), heartbeat=0.03)(scope, receive, send)


class _AroundSend:
    """A middleware that has a time limit around its `send`: asyncio's or anyio's."""

    def __init__(self, app: Any, limit: Any) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def limited(message: Any) -> None:
            manager = self.limit(20)
            if hasattr(manager, "__aenter__"):
                async with manager:
                    await send(message)
            else:
                with manager:
                    await send(message)

        await self.app(scope, receive, limited)


def _channels() -> Any:
    import anyio
    from starlette.applications import Starlette
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request
    from starlette.routing import Mount, Route

    from asgi_stream import AsyncStreamChannel, StreamApp, init_streaming, sse_response

    async def publish(request: Request) -> Response:
        channel = AsyncStreamChannel(request.path_params["channel"])
        first, last = int(request.query_params["first"]), int(request.query_params["last"])
        for n in range(first, last):
            await channel.publish(n)
        if "end" in request.query_params:
            await channel.close()
        return Response("published")

    async def view(request: Request) -> Response:
        return await sse_response(request.path_params["channel"])

    class Base(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            return await call_next(request)  # type: ignore[no-any-return]

    init_streaming()
    stream_app = StreamApp(authorize=lambda request, channel, verb: True)
    app = Starlette(
        routes=[Route("/publish/{channel}", publish), Route("/view/{channel}", view), Mount("/e", stream_app)]
    )
    wrapper = os.environ.get("TEST_MIDDLEWARE")
    if wrapper == "base":
        app.add_middleware(Base)
    elif wrapper == "asyncio":
        app.add_middleware(_AroundSend, limit=asyncio.timeout)
    elif wrapper == "anyio":
        app.add_middleware(_AroundSend, limit=anyio.fail_after)
    elif wrapper == "leases":
        app.add_middleware(StreamLeaseMiddleware, identify=lambda scope: str(id(scope)))
    return app


_MAKERS = {
    "channels": _channels,
    "event_source": lambda: _event_source,
    "chat": lambda: _chat_completions,
    "plain": lambda: _plain,
    "starlette": _starlette,
    "fastapi": _fastapi,
    "litestar": _litestar,
    "quart": _quart,
    "leases": _leases,
    "shared_leases": _shared_leases,
    "leases_fastapi": _leases_fastapi,
}

if "TEST_APP" in os.environ:  # one process loads one framework
    app = Probe(_MAKERS[os.environ["TEST_APP"]]())
