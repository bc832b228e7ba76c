"""Viewers of channels, and the servers that feed them: ours and its peers, all over one Redis.

Every peer is given ``publish(channel, payloads)`` and a path to view a channel. What a viewer counts is the mark ``#``,
of which every payload has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import redis.asyncio as driver
from _serving import Server, serve, uvicorn
from litestar import Litestar, get
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.redis import RedisChannelsPubSubBackend
from litestar.response import Stream

MARK = b"#"
PAYLOAD = "#" + "x" * 119
PYTHON = ("ours", "naive", "sse-starlette", "Litestar")
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


def build_ours() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from asgi_stream import init_streaming, sse_response

    async def view(request: Request) -> Response:
        return await sse_response(request.path_params["channel"])

    init_streaming(os.environ["BENCH_REDIS"])
    return Starlette(routes=[Route("/{channel}", view)])


def build_naive() -> Any:
    """What people write first: a pub/sub connection per viewer."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    client = driver.Redis.from_url(os.environ["BENCH_REDIS"], max_connections=100_000)

    async def listen(channel: str) -> AsyncIterator[str]:
        pubsub = client.pubsub()
        await pubsub.subscribe(channel)
        yield ": ready\n\n"
        async for message in pubsub.listen():
            if message["type"] == "message":
                yield f"data: {message['data'].decode()}\n\n"

    async def view(request: Request) -> StreamingResponse:
        return StreamingResponse(listen(request.path_params["channel"]), media_type="text/event-stream")

    return Starlette(routes=[Route("/{channel}", view)])


def build_sse_starlette() -> Any:
    from sse_starlette.sse import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Route

    client = driver.Redis.from_url(os.environ["BENCH_REDIS"], max_connections=100_000)

    async def listen(channel: str) -> AsyncIterator[Any]:
        pubsub = client.pubsub()
        await pubsub.subscribe(channel)
        yield {"comment": "ready"}
        async for message in pubsub.listen():
            if message["type"] == "message":
                yield {"data": message["data"].decode()}

    async def view(request: Request) -> EventSourceResponse:
        return EventSourceResponse(listen(request.path_params["channel"]))

    return Starlette(routes=[Route("/{channel}", view)])


def build_litestar() -> Any:
    client: Any = driver.Redis.from_url(os.environ["BENCH_REDIS"])
    plugin = ChannelsPlugin(RedisChannelsPubSubBackend(redis=client), arbitrary_channels_allowed=True)

    @get("/{channel:str}")
    async def view(channel: str) -> Stream:
        async def listen() -> AsyncIterator[bytes]:
            async with plugin.start_subscription([channel]) as subscriber:
                yield b": ready\n\n"
                async for event in subscriber.iter_events():
                    yield b"data: %b\n\n" % event

        return Stream(listen(), media_type="text/event-stream")

    return Litestar([view], plugins=[plugin])


class Peer:
    """A running server, and how to publish to those who view it."""

    def __init__(self, name: str, server: Server, publish: Callable[[str, int], Awaitable[None]]) -> None:
        self.name = name
        self.server = server
        self.publish = publish  # channel and number of payloads, sent without waiting for one another


def publisher(name: str, url: str) -> Callable[[str, int], Awaitable[None]]:
    """How a Python peer's events are published: ours durably, with epoch and offset; the others by a bare PUBLISH."""
    if name == "ours":
        from asgi_stream import AsyncStreamChannel, Streaming

        streaming = Streaming(redis=url)
        channels: dict[str, AsyncStreamChannel] = {}

        async def publish_ours(channel: str, count: int) -> None:
            known = channels.get(channel) or channels.setdefault(
                channel, AsyncStreamChannel(channel, streaming=streaming)
            )
            if count == 1:
                await known.publish(PAYLOAD)
            else:
                await known.publish_many([PAYLOAD] * count)

        return publish_ours
    client = driver.Redis.from_url(url, single_connection_client=True)

    async def publish(channel: str, count: int) -> None:
        if count == 1:
            await client.publish(channel, PAYLOAD)
            return
        pipeline = client.pipeline(transaction=False)
        for _ in range(count):
            pipeline.publish(channel, PAYLOAD)
        await pipeline.execute()

    return publish


@contextlib.contextmanager
def python_peer(name: str, url: str) -> Iterator[Peer]:
    os.environ["BENCH_REDIS"] = url
    factory = name.replace("-", "_").lower()
    with serve([*uvicorn(f"_viewers:build_{factory}"), "--timeout-graceful-shutdown", "1"]) as server:
        yield Peer(name, server, publisher(name, url))


@contextlib.contextmanager
def nchan_peer(url: str) -> Iterator[Peer]:
    """nginx with nchan and the same Redis: Debian's packages nginx and libnginx-mod-nchan."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"

        def write(port: int) -> None:
            config.write_text(
                f"""
                load_module {NCHAN_MODULE};
                daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; user root;
                events {{ worker_connections 20000; }}
                http {{
                  access_log off; client_body_temp_path {folder}; keepalive_requests 1000000;
                  upstream store {{ nchan_redis_server {url}; }}
                  server {{
                    listen 127.0.0.1:{port} backlog=8192;
                    location ~ ^/pub/(.+)$ {{
                      nchan_publisher; nchan_channel_id $1; nchan_redis_pass store; nchan_message_buffer_length 100;
                    }}
                    location ~ ^/(.+)$ {{
                      nchan_subscriber eventsource; nchan_channel_id $1; nchan_redis_pass store;
                      nchan_subscriber_first_message newest;
                    }}
                  }}
                }}"""
            )

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        write(port)
        with serve(["nginx", "-c", str(config), "-p", folder, "-e", f"{folder}/error.log"], port=port) as master:
            worker = master.process.children()[0]
            yield Peer("nchan", Server(port, worker), _nchan_publisher(port))


def _nchan_publisher(port: int) -> Callable[[str, int], Awaitable[None]]:
    connection: list[Any] = []
    sending = asyncio.Lock()

    async def publish(channel: str, count: int) -> None:
        async with sending:
            await send(channel, count)

    async def send(channel: str, count: int) -> None:
        if not connection:
            connection.extend(await asyncio.open_connection("127.0.0.1", port))
        reader, writer = connection
        body = PAYLOAD.encode()
        request = b"POST /pub/%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
            channel.encode(),
            len(body),
            body,
        )
        writer.write(request * count)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)

    return publish


def has_nchan() -> bool:
    return shutil.which("nginx") is not None and NCHAN_MODULE.exists()


class Audience:
    """Viewers of one server, in this process."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.viewers: list[Viewer] = []
        self.seen = 0
        self.wanted = 0
        self.enough: asyncio.Future[None] | None = None

    async def join(self, path: str, last_event_id: str = "") -> Viewer:
        loop = asyncio.get_running_loop()
        _, viewer = await loop.create_connection(lambda: Viewer(self, path, last_event_id), "127.0.0.1", self.port)
        self.viewers.append(viewer)
        await viewer.open
        return viewer

    async def fill(self, paths: list[str]) -> None:
        for begin in range(0, len(paths), 50):
            await asyncio.gather(*(self.join(path) for path in paths[begin : begin + 50]))

    def expect(self, count: int) -> asyncio.Future[None]:
        """A future that is done when so many marks more have come."""
        self.wanted = self.seen + count
        self.enough = asyncio.get_running_loop().create_future()
        return self.enough

    def came(self, count: int) -> None:
        self.seen += count
        if self.seen >= self.wanted and self.enough is not None and not self.enough.done():
            self.enough.set_result(None)

    def close(self) -> None:
        for viewer in self.viewers:
            if viewer.transport is not None:
                viewer.transport.abort()
        self.viewers.clear()


class Viewer(asyncio.Protocol):
    """One connection that counts marks."""

    def __init__(self, audience: Audience, path: str, last_event_id: str) -> None:
        self.audience = audience
        self.request = f"GET /{path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        if last_event_id:
            self.request += f"Last-Event-ID: {last_event_id}\r\n"
        self.open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.tail = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(f"{self.request}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        if not self.open.done():
            self.open.set_result(None)
        self.tail = data
        count = data.count(MARK)
        if count:
            self.audience.came(count)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.open.done():
            self.open.set_exception(ConnectionError("closed before the first byte"))


def lines_of_machine() -> list[str]:
    return [f"Python {sys.version.split()[0]}, uvicorn with uvloop and httptools, one process a role", ""]


def raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
