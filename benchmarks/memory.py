"""What an open, silent stream holds: growth of the server's memory per connection, and its CPU while nothing happens.

    python benchmarks/memory.py [--streams 2000] [--rounds 3] [--quick]

Each measurement is a uvicorn process of its own, in which one token has been sent on every stream and the producer
waits from then on. Heartbeats, time limits and the watch for a vanished client are on, as shipped.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from _serving import keep_off_the_servers_core, serve, uvicorn
from litestar import Litestar, get
from litestar.response import Stream

FRAME = b"data: token\n\n"
PEERS = ("raw", "ours", "ours in FastAPI", "Starlette", "Litestar", "sse-starlette", "FastAPI SSE")


async def produce() -> AsyncIterator[bytes]:
    yield FRAME
    await asyncio.get_running_loop().create_future()


def build_app() -> Callable[[Any, Any, Any], Awaitable[None]]:
    """The server's application: /PEER"""
    from fastapi import FastAPI
    from fastapi.sse import EventSourceResponse as FastAPISSE
    from sse_starlette.sse import EventSourceResponse as SSEStarlette
    from starlette.responses import StreamingResponse

    from asgi_stream import EventStreamResponse

    framework = FastAPI()

    @framework.get("/ours in FastAPI")
    async def ours_in_fastapi() -> EventStreamResponse:
        return EventStreamResponse(produce())

    @framework.get("/Starlette")
    async def starlette() -> StreamingResponse:
        return StreamingResponse(produce(), media_type="text/event-stream")

    @framework.get("/sse-starlette")
    async def sse_starlette() -> SSEStarlette:
        return SSEStarlette(produce())

    @framework.get("/FastAPI SSE", response_class=FastAPISSE)
    async def fastapi_sse() -> AsyncIterator[str]:
        async for _ in produce():
            yield "token"

    @get("/Litestar")
    async def litestar() -> Stream:
        return Stream(produce(), media_type="text/event-stream")

    litestar_app = Litestar([litestar])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/raw", "/ours"):
            await (litestar_app if scope.get("path") == "/Litestar" else framework)(scope, receive, send)
        elif scope["path"] == "/ours":
            await EventStreamResponse(produce())(scope, receive, send)
        else:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for item in produce():
                await send({"type": "http.response.body", "body": item, "more_body": True})

    return app


async def open_stream(port: int, path: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await reader.readuntil(b"token")
    return writer


async def measure(peer: str, streams: int, watch: float) -> tuple[float, float]:
    """Return KiB a stream, and the idle server's CPU in percent."""
    path = f"/{peer}".replace(" ", "%20")
    with serve([*uvicorn("memory:build_app"), "--timeout-graceful-shutdown", "1"]) as server:
        writers = [await open_stream(server.port, path) for _ in range(10)]  # what is loaded on first use
        before = server.rss()
        for begin in range(0, streams, 100):
            count = min(100, streams - begin)
            writers += await asyncio.gather(*(open_stream(server.port, path) for _ in range(count)))
        grown = (server.rss() - before) / streams / 1024
        cpu, begun = server.cpu(), time.perf_counter()
        await asyncio.sleep(watch)
        idle = (server.cpu() - cpu) / (time.perf_counter() - begun) * 100
        for writer in writers:
            writer.close()
    return grown, idle


async def run(rounds: int, streams: int, watch: float, peers: tuple[str, ...]) -> list[str]:
    keep_off_the_servers_core()
    results: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            results[peer].append(await measure(peer, streams, watch))
    base = statistics.median(kib for kib, _ in results["raw"])
    lines = [
        f"## {streams:,} open, silent streams",
        "",
        f"Python {sys.version.split()[0]}, uvicorn with uvloop and httptools",
        "",
        "| peer | KiB a stream | x raw | idle CPU % | every round: KiB (CPU %) |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for peer, pairs in results.items():
        kib, idle = (statistics.median(column) for column in zip(*pairs, strict=True))
        every = " ".join(f"{k:.1f} ({i:.1f})" for k, i in pairs)
        lines.append(f"| {peer} | {kib:.1f} | {kib / base:.2f} | {idle:.1f} | {every} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the table to this file, too")
    options = parser.parse_args()
    if options.quick:
        lines = asyncio.run(run(1, 20, 0.1, PEERS[:3]))
    else:
        lines = asyncio.run(run(options.rounds, options.streams, 3.0, PEERS))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
