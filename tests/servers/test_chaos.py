"""Everything that can die dies, while two hundred viewers look on: 0 lost, 0 twice, 0 out of order [C2].

Two uvicorn processes, twenty channels, real clients that come back with their last id as an EventSource does.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from asgi_stream import AsyncStreamChannel, Streaming
from asgi_stream.redis.embedded import EmbeddedRedis
from asgi_stream.sse import Decoder
from tests.redis_server import start_redis
from tests.servers.harness import Server

pytestmark = [pytest.mark.matrix, pytest.mark.anyio, pytest.mark.timeout(300)]

CHANNELS = 20
VIEWERS = 200
RATE = 25  # events a second and channel: 5,000 deliveries a second in all
SECONDS = 12
HANG = 90.0


class Dechunker:
    """The body of a chunked response, from pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._head = True

    def feed(self, data: bytes) -> bytes:
        self._rest += data
        if self._head:
            if b"\r\n\r\n" not in self._rest:
                return b""
            head, self._rest = self._rest.split(b"\r\n\r\n", 1)
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(head.split(b"\r\n")[0].decode())
            self._head = False
        body = b""
        while b"\r\n" in self._rest:
            size, rest = self._rest.split(b"\r\n", 1)
            length = int(size, 16)
            if len(rest) < length + 2:
                break
            body += rest[:length]
            self._rest = rest[length + 2 :]
        return body


class EventSource:
    """What a browser does: reads, remembers the last id, comes back."""

    def __init__(self, channel: str, ports: list[int], chaos: random.Random) -> None:
        self.channel = channel
        self.ports = ports
        self.chaos = chaos
        self.seen: list[int] = []
        self.resets: list[int] = []  # how much had been seen
        self.last_id = ""
        self.connections = 0
        self.over = False
        self.may_cut = True

    async def run(self) -> None:
        while not self.over:
            self.connections += 1
            try:
                await self._read()
            except (OSError, ConnectionError, asyncio.IncompleteReadError):
                pass
            if not self.over:
                await asyncio.sleep(self.chaos.uniform(0.02, 0.2))

    async def _read(self) -> None:
        port = self.chaos.choice(self.ports)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"GET /view/{self.channel} HTTP/1.1\r\nHost: x\r\n"
            if self.last_id:
                head += f"Last-Event-ID: {self.last_id}\r\n"
            writer.write(f"{head}\r\n".encode())
            body, events = Dechunker(), Decoder()
            left = self.chaos.randint(2_000, 40_000) if self.may_cut else 1 << 40
            while left > 0 and (data := await reader.read(min(4096, left))):
                left -= len(data)
                for event in events.feed(body.feed(data)):
                    self._take(event)
                if self.over:
                    return
        finally:
            writer.transport.abort()

    def _take(self, event: Any) -> None:
        self.last_id = event.id or self.last_id
        if event.event == "message":
            self.seen.append(int(event.data))
        elif event.event == "reset":
            self.resets.append(len(self.seen))
        elif event.event == "complete":
            self.over = True


async def publish(streaming: Streaming, channel: str, stop: asyncio.Event) -> int:
    """Publish numbers until told to stop, then end the run; return how many."""
    publisher = AsyncStreamChannel(channel, streaming=streaming)
    count = 0
    while not stop.is_set():
        await publisher.publish(count)
        count += 1
        await asyncio.sleep(1 / RATE)
    await publisher.close()
    return count


class Stage:
    """The two web processes, and the viewers."""

    def __init__(self, redis: EmbeddedRedis) -> None:
        self.redis = redis
        self.environ = {"REDIS_URL": redis.url}
        self.servers = [Server("uvicorn httptools", "channels", self.environ) for _ in range(2)]
        self.ports = [server.port for server in self.servers]
        chaos = random.Random(7)
        self.names = [f"chaos-{os.getpid()}-{n}" for n in range(CHANNELS)]
        self.viewers = [EventSource(self.names[n % CHANNELS], self.ports, chaos) for n in range(VIEWERS)]

    async def restart_server(self, n: int) -> None:
        port = self.servers[n].port
        await asyncio.to_thread(self.servers[n].kill)
        self.servers[n] = await asyncio.to_thread(Server, "uvicorn httptools", "channels", self.environ, port)

    async def play(self, acts: Any) -> dict[str, int]:
        """Publish and view while *acts* runs; return how many events each channel had."""
        streaming = Streaming(redis=self.redis.url)
        stop = asyncio.Event()
        viewing = [asyncio.create_task(viewer.run()) for viewer in self.viewers]
        publishing = [asyncio.create_task(publish(streaming, name, stop)) for name in self.names]
        await acts
        stop.set()
        async with asyncio.timeout(HANG):
            counts = await asyncio.gather(*publishing)
            for viewer in self.viewers:
                viewer.may_cut = False
            await asyncio.gather(*viewing)
        await streaming.aclose()
        return dict(zip(self.names, counts, strict=True))

    def close(self) -> None:
        for server in self.servers:
            server.kill()
        self.redis.stop()


async def test_nothing_is_lost_twice_or_out_of_order(tmp_path: Path) -> None:
    stage = Stage(start_redis(folder=tmp_path))
    try:

        async def acts() -> None:
            await asyncio.sleep(SECONDS / 6)
            await stage.restart_server(0)
            await asyncio.sleep(SECONDS / 6)
            stage.redis.kill()
            await asyncio.sleep(0.3)
            await asyncio.to_thread(stage.redis.start)
            await asyncio.sleep(SECONDS / 6)
            await stage.restart_server(1)
            await asyncio.sleep(SECONDS / 6)

        counts = await stage.play(acts())
        assert min(counts.values()) > RATE
        for viewer in stage.viewers:
            assert viewer.seen == list(range(counts[viewer.channel]))
            assert viewer.resets == []  # Redis kept its data
        assert sum(viewer.connections for viewer in stage.viewers) > VIEWERS * 2
    finally:
        stage.close()


async def test_a_redis_that_lost_everything_is_told_and_what_comes_later_arrives() -> None:
    stage = Stage(start_redis())
    marks: dict[str, int] = {}
    try:

        async def acts() -> None:
            await asyncio.sleep(SECONDS / 6)
            for viewer in stage.viewers:
                viewer.may_cut = False  # connections that stay learn it by themselves
            stage.redis.kill()
            await asyncio.sleep(0.3)
            await asyncio.to_thread(stage.redis.start)
            for viewer in stage.viewers:
                marks[viewer.channel] = max(marks.get(viewer.channel, 0), len(viewer.seen))
            await asyncio.sleep(SECONDS / 4)

        counts = await stage.play(acts())
        for viewer in stage.viewers:
            assert viewer.seen == sorted(set(viewer.seen)), "twice, or out of order"
            missing = sorted(set(range(counts[viewer.channel])) - set(viewer.seen))
            # What was in flight when Redis died may be gone; the viewer was told once, at that place.
            assert len(viewer.resets) == 1
            assert all(n <= marks[viewer.channel] + RATE for n in missing)
            assert missing == list(range(missing[0], missing[0] + len(missing))) if missing else True
    finally:
        stage.close()
