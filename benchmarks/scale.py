"""One web process with 1,000 users: 1,000 queued viewers and 200 direct streams at once, and what each costs.

    python benchmarks/scale.py [--rounds 3] [--seconds 10] [--viewers 1000] [--direct 200] [--quick]

A hundred channels have two events a second each, for ten viewers each; each direct stream has ten tokens a second;
every stream counts against its user's limit. Events and tokens carry the time at which they were made: lag is from
there to the client. Beside it what people write first: a Redis connection for each viewer, and a counter in Redis for
each user.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import redis.asyncio as driver
import uvloop
from _serving import Server, keep_off_the_servers_core, serve, uvicorn
from _viewers import lines_of_machine, raise_file_limit

from asgi_stream.redis.embedded import EmbeddedRedis

TOKENS_A_SECOND = 10
EVENTS_A_SECOND = 2
VIEWERS_A_CHANNEL = 10
LIMIT = 5
TIME = re.compile(rb'"at":\s?([0-9.]+)')


async def tokens() -> AsyncIterator[dict[str, Any]]:
    due = time.monotonic()
    while True:
        due += 1 / TOKENS_A_SECOND
        await asyncio.sleep(due - time.monotonic())
        yield {"at": time.time(), "token": "word"}


def user_of(scope: Any) -> str:
    return str(next(value.decode() for name, value in scope["headers"] if name == b"x-user"))


def build_ours() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from asgi_stream import EventStreamResponse, StreamLeaseMiddleware, init_streaming, sse_response

    async def direct(request: Request) -> Response:
        return EventStreamResponse(tokens())

    async def queued(request: Request) -> Response:
        return await sse_response(request.path_params["name"])

    init_streaming(os.environ["BENCH_REDIS"])
    app = Starlette(routes=[Route("/direct/{name}", direct), Route("/queued/{name}", queued)])
    app.add_middleware(StreamLeaseMiddleware, identify=user_of)
    return app


def build_naive() -> Any:
    import json

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    client = driver.Redis.from_url(os.environ["BENCH_REDIS"], max_connections=100_000)

    async def limited(request: Request, items: AsyncIterator[str]) -> Response:
        key = f"streams:{user_of(request.scope)}"
        if await client.incr(key) > LIMIT:
            await client.decr(key)
            return Response(status_code=429)

        async def body() -> AsyncIterator[str]:
            try:
                async for item in items:
                    yield f"data: {item}\n\n"
            finally:
                await client.decr(key)

        return StreamingResponse(body(), media_type="text/event-stream")

    async def direct(request: Request) -> Response:
        async def items() -> AsyncIterator[str]:
            async for token in tokens():
                yield json.dumps(token)

        return await limited(request, items())

    async def queued(request: Request) -> Response:
        async def items() -> AsyncIterator[str]:
            pubsub = client.pubsub()
            await pubsub.subscribe(request.path_params["name"])
            yield "ready"
            async for message in pubsub.listen():
                if message["type"] == "message":
                    yield message["data"].decode()

        return await limited(request, items())

    return Starlette(routes=[Route("/direct/{name}", direct), Route("/queued/{name}", queued)])


class Client(asyncio.Protocol):
    """One open stream, which notes how late everything is."""

    def __init__(self, path: str, user: str, lags: list[float]) -> None:
        self.path = path
        self.user = user
        self.lags = lags
        self.open = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(f"GET {self.path} HTTP/1.1\r\nHost: x\r\nX-User: {self.user}\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        if not self.open.done():
            self.open.set_result(data.startswith(b"HTTP/1.1 200"))
        now = time.time()
        self.lags += [now - float(at) for at in TIME.findall(data)]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.open.done():
            self.open.set_result(False)


async def connect(server: Server, paths: list[str], lags: list[float]) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    for begin in range(0, len(paths), 50):
        made = []
        for n, path in enumerate(paths[begin : begin + 50], begin):
            client = Client(path, f"user-{n}", lags)
            await loop.create_connection(lambda client=client: client, "127.0.0.1", server.port)  # type: ignore[misc]
            made.append(client)
        assert all(await asyncio.gather(*(client.open for client in made)))
        clients += made
    return clients


async def publish(name: str, url: str, channels: list[str], seconds: float) -> int:
    """Publish to all channels in turn; return how many events."""
    from asgi_stream import AsyncStreamChannel, Streaming

    async with contextlib.AsyncExitStack() as stack:
        send: Any
        if name == "ours":
            streaming = await stack.enter_async_context(Streaming(redis=url))
            made = {channel: AsyncStreamChannel(channel, streaming=streaming) for channel in channels}

            async def send(channel: str) -> None:
                await made[channel].publish({"at": time.time(), "line": "x" * 80})

        else:
            client = driver.Redis.from_url(url)
            stack.push_async_callback(client.aclose)

            async def send(channel: str) -> None:
                await client.publish(channel, f'{{"at": {time.time()}, "line": "{"x" * 80}"}}')

        rate = len(channels) * EVENTS_A_SECOND
        begun = time.monotonic()
        for n in range(int(seconds * rate)):
            await asyncio.sleep(max(begun + n / rate - time.monotonic(), 0.0))
            await send(channels[n % len(channels)])
    return int(seconds * rate)


Figures = dict[str, float]


async def measure(name: str, options: argparse.Namespace) -> Figures:
    """One round: a Redis and a web process of their own."""
    with EmbeddedRedis("--maxclients", "15000") as redis:
        os.environ["BENCH_REDIS"] = redis.url
        await asyncio.sleep(
            0 if options.quick else 2.5
        )  # until Redis is no longer young: before, leases count for each process
        with serve([*uvicorn(f"scale:build_{name}"), "--timeout-graceful-shutdown", "1"]) as server:
            keep_off_the_servers_core()
            client: Any = driver.Redis.from_url(redis.url)
            channels = [f"c{n}" for n in range(max(options.viewers // VIEWERS_A_CHANNEL, 1))]
            queued_lags: list[float] = []
            direct_lags: list[float] = []
            before = server.rss()
            queued = [f"/queued/{channels[n % len(channels)]}" for n in range(options.viewers)]
            clients = await connect(server, queued, queued_lags)
            clients += await connect(server, ["/direct/x"] * options.direct, direct_lags)
            await asyncio.sleep(1.0)
            queued_lags.clear()
            direct_lags.clear()
            cpu, redis_cpu = server.cpu(), await cpu_of(client)
            begun = time.monotonic()
            count = await publish(name, redis.url, channels, options.seconds)
            took = time.monotonic() - begun
            figures = {
                "server CPU %": (server.cpu() - cpu) / took * 100,
                "Redis CPU %": (await cpu_of(client) - redis_cpu) / took * 100,
                "KiB a stream": (server.rss() - before) / len(clients) / 1024,
                "connections": float((await client.info("clients"))["connected_clients"]),
            }
            await asyncio.sleep(1.0)
            for kind, lags in (("event", queued_lags), ("token", direct_lags)):
                lags.sort()
                figures[f"{kind} p50 ms"] = lags[len(lags) // 2] * 1e3
                figures[f"{kind} p99 ms"] = lags[int(len(lags) * 0.99)] * 1e3
            figures["lost"] = float(count * options.viewers // len(channels) - len(queued_lags))
            for one in clients:
                one.transport.abort()
            await client.aclose()
    return figures


async def cpu_of(client: Any) -> float:
    told = await client.info("cpu")
    return float(told["used_cpu_user"] + told["used_cpu_sys"])


async def run(options: argparse.Namespace) -> list[str]:
    rounds: dict[str, list[Figures]] = {"ours": [], "naive": []}
    for _ in range(options.rounds):
        for name, rows in rounds.items():
            rows.append(await measure(name, options))
    title = f"## {options.viewers:,} queued viewers and {options.direct} direct streams on one web process"
    lines = [title, "", *lines_of_machine()]
    lines += ["| | ours | naive | ours / naive | every round: ours; naive |", "| --- | ---: | ---: | ---: | --- |"]
    for figure in rounds["ours"][0]:
        ours, naive = (statistics.median(row[figure] for row in rounds[name]) for name in ("ours", "naive"))
        every = "; ".join(" ".join(f"{row[figure]:.1f}" for row in rounds[name]) for name in rounds)
        lines.append(f"| {figure} | {ours:.1f} | {naive:.1f} | {ours / naive if naive else 0:.2f} | {every} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--viewers", type=int, default=1000)
    parser.add_argument("--direct", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does everything still work?")
    parser.add_argument("--out", help="write the table to this file, too")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.viewers, options.direct = 1, 0.5, 20, 5
    raise_file_limit()
    lines = uvloop.run(run(options))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
