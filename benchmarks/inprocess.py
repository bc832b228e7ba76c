"""What one token costs in the process: CPU per token and per request against a `send` that does nothing.

    python benchmarks/inprocess.py [--rounds 5] [--quick]

Every peer streams the same tokens through the same hand-driven ASGI call. Rounds are interleaved (A B C, A B C, …), the
ratios are of medians, against the raw ASGI loop in the same run. Nothing is written to a socket here: joining tokens
into fewer sends, which is where `EventStreamResponse` gains, cannot show.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse as FastAPISSE
from sse_starlette.sse import EventSourceResponse as SSEStarlette
from starlette.responses import StreamingResponse

from asgi_stream import EventStreamResponse

App = Callable[[Any, Any, Any], Awaitable[None]]
FRAME = b"data: token\n\n"
VALUE = {"token": "word"}
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "GET",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "root_path": "",
    "headers": [],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2),
    "scheme": "http",
}


async def frames(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield FRAME


async def values(count: int) -> AsyncIterator[dict[str, str]]:
    for _ in range(count):
        yield VALUE


def raw(count: int) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for frame in frames(count):
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def raw_json(count: int) -> App:
    encode = msgspec.json.Encoder().encode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for value in values(count):
            body = b"data: " + encode(value) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def ours(count: int) -> App:
    return EventStreamResponse(frames(count))


def ours_json(count: int) -> App:
    return EventStreamResponse(values(count))


def starlette(count: int) -> App:
    return StreamingResponse(frames(count), media_type="text/event-stream")


def sse_starlette(count: int) -> App:
    return SSEStarlette(frames(count))


def fastapi_sse(count: int) -> App:
    app = FastAPI()

    @app.get("/", response_class=FastAPISSE)
    async def stream() -> AsyncIterator[dict[str, str]]:
        async for value in values(count):
            yield value

    app.build_middleware_stack()
    return app


PEERS: dict[str, Callable[[int], App]] = {
    "raw ASGI loop": raw,
    "EventStreamResponse": ours,
    "raw loop, JSON": raw_json,
    "EventStreamResponse, JSON": ours_json,
    "Starlette StreamingResponse": starlette,
    "sse-starlette": sse_starlette,
    "FastAPI SSE, JSON": fastapi_sse,
}


async def serve(app: App) -> int:
    """Run one request; return the bytes it sent."""
    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    never = asyncio.get_running_loop().create_future()

    async def receive() -> Any:
        await never

    await app(dict(SCOPE), receive, send)
    return sent


async def measure(make: Callable[[int], App], tokens: int, requests: int) -> float:
    """CPU seconds per token."""
    apps = [make(tokens) for _ in range(requests)]
    begun = time.process_time()
    for app in apps:
        if await serve(app) < tokens * 10:
            raise SystemExit("a peer lost tokens")
    return (time.process_time() - begun) / (tokens * requests)


async def table(title: str, tokens: int, requests: int, rounds: int, unit: float, baseline: str) -> list[str]:
    results: dict[str, list[float]] = {name: [] for name in PEERS}
    await asyncio.gather(*(measure(make, 10, 1) for make in PEERS.values()))  # warm up
    for _ in range(rounds):
        for name, make in PEERS.items():
            # The slow peers get fewer tokens: it is the cost of one that counts.
            share = 20 if name in ("FastAPI SSE, JSON", "sse-starlette") and tokens > 1000 else 1
            results[name].append(await measure(make, max(tokens // share, 1), requests))
    base = statistics.median(results[baseline])
    lines = [f"### {title}", "", "| peer | median | x raw | every round |", "| --- | ---: | ---: | --- |"]
    for name, times in results.items():
        middle = statistics.median(times)
        every = " ".join(f"{value * unit:.2f}" for value in times)
        lines.append(f"| {name} | {middle * unit:.2f} | {middle / base:.2f} | {every} |")
    return [*lines, ""]


def machine() -> str:
    names = ("starlette", "fastapi", "sse-starlette", "msgspec")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {sys.version.split()[0]}, {packages}"


async def run(rounds: int, quick: bool) -> list[str]:
    tokens, requests = (2_000, 50) if quick else (50_000, 2_000)
    lines = ["## In process", "", machine(), ""]
    lines += await table("ns of CPU per token, never suspending", tokens, 1, rounds, 1e9, "raw ASGI loop")
    lines += await table("us of CPU per request of one token", 1, requests, rounds, 1e6, "raw ASGI loop")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    lines = asyncio.run(run(2 if options.quick else options.rounds, options.quick))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
