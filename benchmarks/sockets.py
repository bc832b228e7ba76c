"""Tokens a second out of a real server: uvicorn (uvloop, httptools) in a process of its own, pinned to one core.

    python benchmarks/sockets.py [--rounds 5] [--quick]

Peers stream the same tokens; the reader counts bytes on another core. Rounds are interleaved, ratios are of medians
against the raw ASGI loop in the same run. CPU is the server's, user and system, per token.

- unpaced: the producer never suspends; all tokens are ready.
- burst of 4: four tokens are ready per suspension of the producer.
- single: one token per suspension.
- paced: each connection makes so many tokens a second; only the CPU is of interest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import psutil

FRAME = b"data: token\n\n"
PEERS = ("raw", "ours", "ours in FastAPI", "Starlette", "sse-starlette", "FastAPI SSE")

Producer = Callable[[str, int, float], AsyncIterator[bytes]]


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
        return EventStreamResponse(produce(kind, count, rate))

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

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/raw", "/ours"):
            await framework(scope, receive, send)
            return
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        items = produce(query["kind"], int(query["count"]), float(query["rate"]))
        if scope["path"] == "/ours":
            await EventStreamResponse(items)(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for item in items:
            await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


@contextlib.contextmanager
def server() -> Any:
    """Start uvicorn; yield its port and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "sockets:build_app", "--port", str(port)]
    command += ["--log-level", "warning", "--app-dir", os.path.dirname(os.path.abspath(__file__))]
    process = subprocess.Popen(command)
    try:
        handle = psutil.Process(process.pid)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            handle.cpu_affinity(cores[:1])
            os.sched_setaffinity(0, cores[1:])
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.05)
        yield port, handle
    finally:
        process.terminate()
        process.wait(20)


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


async def round_of(port: int, handle: psutil.Process, peer: str, kind: str, conns: int, count: int, rate: float) -> Any:
    path = f"/{peer}?kind={kind}&count={count}&rate={rate}".replace(" ", "%20")
    before, begun = handle.cpu_times(), time.perf_counter()
    counts = await asyncio.gather(*(read_stream(port, path) for _ in range(conns)))
    seconds, after = time.perf_counter() - begun, handle.cpu_times()
    if min(counts) < count:
        raise SystemExit(f"{peer} lost tokens: {min(counts)} of {count}")
    cpu = after.user + after.system - before.user - before.system
    total = conns * count
    return total / seconds, cpu / total


async def table(
    port: int,
    handle: psutil.Process,
    kind: str,
    conns: int,
    count: int,
    rate: float,
    rounds: int,
    peers: tuple[str, ...],
) -> list[str]:
    results: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            share = 10 if kind == "unpaced" and peer in ("sse-starlette", "FastAPI SSE") and count >= 1000 else 1
            results[peer].append(await round_of(port, handle, peer, kind, conns, count // share, rate))
    base = [statistics.median(column) for column in zip(*results["raw"], strict=True)]
    pace = f", {rate:g} tokens/s each" if kind == "paced" else ""
    lines = [
        f"### {kind}, {conns} connections{pace}",
        "",
        "| peer | tokens/s | x raw | CPU us/token | x raw | every round: tokens/s (CPU us) |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for peer, pairs in results.items():
        speed, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        every = " ".join(f"{s:,.0f} ({c * 1e6:.2f})" for s, c in pairs)
        ratios = speed / base[0], cpu / base[1] if base[1] else 0.0
        lines.append(f"| {peer} | {speed:,.0f} | {ratios[0]:.2f} | {cpu * 1e6:.2f} | {ratios[1]:.2f} | {every} |")
    return [*lines, ""]


async def run(rounds: int, quick: bool) -> list[str]:
    lines = ["## Over sockets", "", f"Python {sys.version.split()[0]}, uvicorn with uvloop and httptools", ""]
    with server() as (port, handle):
        for peer in PEERS:  # warm up
            await round_of(port, handle, peer, "single", 1, 100, 1.0)
        if quick:
            return lines + await table(port, handle, "unpaced", 2, 500, 1.0, 1, PEERS)
        fast = PEERS[:4]
        lines += await table(port, handle, "unpaced", 1, 400_000, 1.0, rounds, PEERS)
        lines += await table(port, handle, "unpaced", 200, 3_000, 1.0, rounds, PEERS)
        lines += await table(port, handle, "burst of 4", 200, 2_000, 1.0, rounds, fast)
        lines += await table(port, handle, "single", 200, 2_000, 1.0, rounds, fast)
        lines += await table(port, handle, "paced", 100, 200, 50.0, rounds, PEERS)
        lines += await table(port, handle, "paced", 500, 400, 100.0, rounds, fast)
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
