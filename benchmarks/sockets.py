"""Tokens a second out of a real server: uvicorn (uvloop, httptools) in a process of its own, pinned to one core.
Where `go` and `node` are on the PATH, the same stream from their own HTTP servers joins, on the same core.

    python benchmarks/sockets.py [--rounds 5] [--quick]

Peers stream the same tokens; the reader counts bytes on another core. Rounds are interleaved, ratios are of medians
against the raw ASGI loop in the same run. CPU is the server's, user and system, per token.

- unpaced: the producer never suspends; all tokens are ready.
- burst of 4: four tokens are ready per suspension of the producer.
- single: one token per suspension.
- paced: each connection makes so many tokens a second; only the CPU is of interest.
- JSON: like unpaced, but the items are dicts; the raw loop encodes them with msgspec.
- one token: whole requests of one token, one after the other on a connection that stays open; with the time to the
  first byte of the body.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec
from _serving import Server, go, keep_off_the_servers_core, node, serve, uvicorn
from litestar import Litestar, get
from litestar.response import Stream

FRAME = b"data: token\n\n"
VALUE = {"choices": [{"index": 0, "delta": {"content": "token"}}]}
OURS = ("raw", "ours", "ours in FastAPI")
PYTHON = (*OURS, "Starlette", "Litestar", "sse-starlette", "FastAPI SSE")
OTHERS = ("Go", "Node")
SLOW = ("Litestar", "sse-starlette", "FastAPI SSE")  # they get fewer tokens where it is the cost of one that counts

Producer = Callable[[str, int, float], AsyncIterator[bytes]]


async def produce_json(count: int) -> AsyncIterator[dict[str, Any]]:
    for _ in range(count):
        yield VALUE


async def produce(kind: str, count: int, rate: float) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    if kind == "unpaced":
        for _ in range(count):
            yield FRAME
    elif kind == "paced":
        begun = loop.time()
        for n in range(count):
            await asyncio.sleep(max(begun + n / rate - loop.time(), 0))
            yield FRAME
    else:
        group = 4 if kind == "burst of 4" else 1
        for n in range(count):
            if n % group == 0:
                ready = loop.create_future()
                loop.call_soon(ready.set_result, None)
                await ready
            yield FRAME


def build_app() -> Callable[[Any, Any, Any], Awaitable[None]]:
    """The server's application: /PEER?kind=…&count=…&rate=…"""
    from fastapi import FastAPI
    from fastapi.sse import EventSourceResponse as FastAPISSE
    from sse_starlette.sse import EventSourceResponse as SSEStarlette
    from starlette.responses import StreamingResponse

    from asgi_stream import EventStreamResponse

    framework = FastAPI()

    @framework.get("/ours in FastAPI")
    async def ours_in_fastapi(kind: str, count: int, rate: float) -> EventStreamResponse:
        return EventStreamResponse(produce_json(count) if kind == "JSON" else produce(kind, count, rate))

    @framework.get("/Starlette")
    async def starlette(kind: str, count: int, rate: float) -> StreamingResponse:
        return StreamingResponse(produce(kind, count, rate), media_type="text/event-stream")

    @framework.get("/sse-starlette")
    async def sse_starlette(kind: str, count: int, rate: float) -> SSEStarlette:
        return SSEStarlette(produce(kind, count, rate))

    @framework.get("/FastAPI SSE", response_class=FastAPISSE)
    async def fastapi_sse(kind: str, count: int, rate: float) -> AsyncIterator[str]:
        async for _ in produce(kind, count, rate):
            yield "token"

    @get("/Litestar")
    async def litestar(kind: str, count: int, rate: float) -> Stream:
        return Stream(produce(kind, count, rate), media_type="text/event-stream")

    litestar_app = Litestar([litestar])
    encode_json = msgspec.json.Encoder().encode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/raw", "/ours"):
            await (litestar_app if scope.get("path") == "/Litestar" else framework)(scope, receive, send)
            return
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        kind, count, rate = query["kind"], int(query["count"]), float(query["rate"])
        if scope["path"] == "/ours":
            items = produce_json(count) if kind == "JSON" else produce(kind, count, rate)
            await EventStreamResponse(items)(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if kind == "JSON":
            async for value in produce_json(count):
                body = b"data: " + encode_json(value) + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            async for item in produce(kind, count, rate):
                await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def read_stream(port: int, path: str) -> int:
    """Return how many tokens came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    count, rest = 0, b""
    while block := await reader.read(1 << 18):
        rest += block
        count += rest.count(b"token")
        rest = rest[-4:] if not rest.endswith(b"token") else b""
    writer.close()
    return count


async def round_of(server: Server, peer: str, kind: str, conns: int, count: int, rate: float) -> tuple[float, float]:
    """Return tokens a second, and seconds of CPU a token."""
    path = f"/{peer}?kind={kind}&count={count}&rate={rate}".replace(" ", "%20")
    before, begun = server.cpu(), time.perf_counter()
    counts = await asyncio.gather(*(read_stream(server.port, path) for _ in range(conns)))
    seconds, cpu = time.perf_counter() - begun, server.cpu() - before
    if min(counts) < count:
        raise SystemExit(f"{peer} lost tokens: {min(counts)} of {count}")
    total = conns * count
    return total / seconds, cpu / total


async def requests_of(server: Server, peer: str, requests: int) -> tuple[float, float]:
    """Return the median time to the first byte of a body, and seconds of CPU a request."""
    path = f"/{peer}?kind=single&count=1&rate=1".replace(" ", "%20")
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    times = []
    before = server.cpu()
    for _ in range(requests):
        begun = time.perf_counter()
        writer.write(request)
        await reader.readuntil(b"token")
        times.append(time.perf_counter() - begun)
        await reader.readuntil(b"\r\n0\r\n\r\n")
    cpu = server.cpu() - before
    writer.close()
    return statistics.median(times), cpu / requests


Servers = dict[str, Server]


def lines_of(results: dict[str, list[tuple[float, float]]], columns: tuple[str, str], show: Any) -> list[str]:
    base = [statistics.median(column) for column in zip(*results["raw"], strict=True)]
    lines = [
        f"| peer | {columns[0]} | x raw | {columns[1]} | x raw | every round |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for peer, pairs in results.items():
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        every = " ".join("{} ({})".format(*show(*pair)) for pair in pairs)
        ratios = first / base[0], second / base[1] if base[1] else 0.0
        a, b = show(first, second)
        lines.append(f"| {peer} | {a} | {ratios[0]:.2f} | {b} | {ratios[1]:.2f} | {every} |")
    return [*lines, ""]


async def table(
    servers: Servers, kind: str, conns: int, count: int, rounds: int, peers: tuple[str, ...], rate: float = 1.0
) -> list[str]:
    results: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers if peer in servers}
    for _ in range(rounds):
        for peer, rows in results.items():
            share = 10 if kind in ("unpaced", "JSON") and peer in SLOW and count >= 1000 else 1
            rows.append(await round_of(servers[peer], peer, kind, conns, count // share, rate))
    pace = f", {rate:g} tokens/s each" if kind == "paced" else ""
    columns = ("tokens/s", "CPU us/token")
    shown = lines_of(results, columns, lambda speed, cpu: (f"{speed:,.0f}", f"{cpu * 1e6:.2f}"))
    return [f"### {kind}, {conns} connections{pace}", "", *shown]


async def one_token(servers: Servers, requests: int, rounds: int) -> list[str]:
    results: dict[str, list[tuple[float, float]]] = {peer: [] for peer in servers}
    for _ in range(rounds):
        for peer, rows in results.items():
            rows.append(await requests_of(servers[peer], peer, requests))
    columns = ("first byte us", "CPU us/request")
    shown = lines_of(results, columns, lambda first, cpu: (f"{first * 1e6:,.0f}", f"{cpu * 1e6:.0f}"))
    return ["### one token a request", "", *shown]


async def run(rounds: int, quick: bool) -> list[str]:
    lines = ["## Over sockets", "", f"Python {sys.version.split()[0]}, uvicorn with uvloop and httptools", ""]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        python = stack.enter_context(serve(uvicorn("sockets:build_app")))
        servers = dict.fromkeys(PYTHON, python)
        for peer, command in (("Go", go(folder)), ("Node", node())):
            if command is not None:
                servers[peer] = stack.enter_context(serve(command))
        keep_off_the_servers_core()
        peers = (*PYTHON, *OTHERS)
        for peer, server in servers.items():  # warm up
            await round_of(server, peer, "single", 1, 100, 1.0)
        if quick:
            lines += await table(servers, "JSON", 2, 500, 1, OURS)
            lines += await one_token(servers, 20, 1)
            return lines + await table(servers, "unpaced", 2, 500, 1, peers)
        fast = (*PYTHON[:4], *OTHERS)
        lines += await table(servers, "unpaced", 1, 400_000, rounds, peers)
        lines += await table(servers, "unpaced", 200, 3_000, rounds, peers)
        lines += await table(servers, "JSON", 1, 200_000, rounds, OURS)
        lines += await table(servers, "JSON", 200, 2_000, rounds, OURS)
        lines += await table(servers, "burst of 4", 200, 2_000, rounds, fast)
        lines += await table(servers, "single", 200, 2_000, rounds, fast)
        lines += await table(servers, "paced", 100, 200, rounds, peers, 50.0)
        lines += await table(servers, "paced", 500, 400, rounds, fast, 100.0)
        lines += await one_token(servers, 1_000, rounds)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    lines = asyncio.run(run(options.rounds, options.quick))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
