"""Channels over Sentinel and Cluster: a primary is killed, and delivery comes back [C2] [C6]."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from asgi_stream import AsyncStreamChannel, StreamContext, Streaming, sse_response
from tests.asgi_client import Exchange, http_scope
from tests.redis.topologies import Cluster, Sentinels

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

CHANNELS = 12
HANG = 60.0


async def viewers_of(streaming: Streaming, names: list[str]) -> list[Exchange]:
    viewers = [Exchange(await sse_response(name, streaming=streaming), http_scope()) for name in names]
    for viewer in viewers:
        await viewer.until_body(b"ready")
    return viewers


async def publish_all(streaming: Streaming, names: list[str], numbers: range) -> None:
    async def one(name: str) -> None:
        channel = AsyncStreamChannel(name, streaming=streaming)
        for n in numbers:
            await channel.publish(n)

    async with asyncio.timeout(HANG):
        await asyncio.gather(*(one(name) for name in names))


async def until_all_have(viewers: list[Exchange], last: int) -> None:
    async with asyncio.timeout(HANG):
        for viewer in viewers:
            await viewer.until_body(b"data: %d\n" % last)


def check(viewer: Exchange, count: int) -> None:
    """In order, once, and whatever is missing was told."""
    seen = [int(event.data) for event in viewer.events if event.event == "message"]
    assert seen == sorted(set(seen)), seen
    resets = [json.loads(event.data)["reason"] for event in viewer.events if event.event == "reset"]
    if not resets:
        assert seen == list(range(count))
    assert seen[-1] == count - 1


async def test_sentinel_failover(tmp_path: Path) -> None:
    sentinels = await asyncio.to_thread(Sentinels, tmp_path)
    try:
        async with Streaming(redis=sentinels.url) as streaming:
            streaming.broker.patience = 30.0  # type: ignore[attr-defined]
            names = [f"sentinel-{n}" for n in range(CHANNELS)]
            viewers = await viewers_of(streaming, names)
            await publish_all(streaming, names, range(10))
            await until_all_have(viewers, 9)
            sentinels.primary.kill()
            await publish_all(streaming, names, range(10, 20))
            await until_all_have(viewers, 19)
            for viewer in viewers:
                check(viewer, 20)
                viewer.leave()
                await viewer.end()
            # Sync code finds the new primary, too.
            ctx = StreamContext.create("ann", streaming=streaming)
            await asyncio.to_thread(ctx.complete)
    finally:
        await asyncio.to_thread(sentinels.close)


async def test_cluster_failover(tmp_path: Path) -> None:
    cluster = await asyncio.to_thread(Cluster, tmp_path)
    try:
        async with Streaming(redis=cluster.url) as streaming:
            streaming.broker.patience = 30.0  # type: ignore[attr-defined]
            names = [f"cluster-{n}" for n in range(CHANNELS)]
            viewers = await viewers_of(streaming, names)
            await publish_all(streaming, names, range(10))
            await until_all_have(viewers, 9)
            cluster.servers[1].kill()
            await publish_all(streaming, names, range(10, 20))
            await until_all_have(viewers, 19)
            for viewer in viewers:
                check(viewer, 20)
                viewer.leave()
                await viewer.end()
            ctx = StreamContext.create("ann", streaming=streaming)
            ctx.log("from sync code")
            await asyncio.to_thread(ctx.complete)
            history = await AsyncStreamChannel(ctx.channel_id, streaming=streaming).history()
            assert [record.event for record in history] == ["log", "complete"]
    finally:
        await asyncio.to_thread(cluster.close)
