"""Channels over Sentinel and Cluster: a primary is killed, and delivery comes back [C2] [C6]."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as driver

from asgi_stream import (
    AsyncStreamChannel,
    QueueRedisConfig,
    StreamContext,
    Streaming,
    StreamLeaseConfig,
    StreamLeaseLimiter,
    StreamLimitExceeded,
    sse_response,
)
from asgi_stream.errors import BackendError
from tests.asgi_client import Exchange, http_scope
from tests.redis.topologies import Cluster, Sentinels
from tests.redis_server import start_redis

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


async def leases_live_on(url: str, kill: Callable[[], None]) -> None:
    """Forty streams of eight full users live on over a failover, and nobody gets more once it is over [L4]."""
    config = StreamLeaseConfig(limit=5)
    one, two = (StreamLeaseLimiter(config, redis=QueueRedisConfig(url)) for _ in range(2))
    users = [f"user-{n}" for n in range(8)]
    try:
        leases = [
            await limiter.acquire_async(user)
            for limiter, mine in ((one, users[:4]), (two, users[4:]))
            for user in mine
            for _ in range(5)
        ]
        await asyncio.sleep(0.3)  # the replicas have them now
        kill()

        async def admits(limiter: StreamLeaseLimiter) -> bool:
            (await limiter.acquire_async("somebody")).release()
            return limiter._redis is not None and limiter._redis.admits

        for limiter in (one, two):
            async with asyncio.timeout(HANG):
                while not await admits(limiter):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        assert all(lease.held for lease in leases)
        for user in users:
            assert len(await one.holders_async(user)) == 5
            for limiter in (one, two):
                with pytest.raises(StreamLimitExceeded):
                    await limiter.acquire_async(user)
    finally:
        await one.aclose()
        await two.aclose()


async def test_leases_over_a_sentinel_failover(tmp_path: Path) -> None:
    sentinels = await asyncio.to_thread(Sentinels, tmp_path)
    try:
        await leases_live_on(sentinels.url, sentinels.primary.kill)
    finally:
        await asyncio.to_thread(sentinels.close)


async def test_leases_over_a_cluster_failover(tmp_path: Path) -> None:
    cluster = await asyncio.to_thread(Cluster, tmp_path)
    try:
        await leases_live_on(cluster.url, cluster.servers[1].kill)
    finally:
        await asyncio.to_thread(cluster.close)


async def test_a_replica_that_lagged_behind_is_told(tmp_path: Path) -> None:
    """Its epoch is the same and its log is shorter: nothing of what it lacks is skipped in silence [C2]."""
    sentinels = await asyncio.to_thread(Sentinels, tmp_path)
    try:
        async with Streaming(redis=sentinels.url) as streaming:
            streaming.broker.patience = 30.0  # type: ignore[attr-defined]
            names = [f"lagging-{n}" for n in range(CHANNELS)]
            viewers = await viewers_of(streaming, names)
            publishers = [AsyncStreamChannel(name, streaming=streaming) for name in names]
            for channel in publishers:
                await channel.publish(0)
            await until_all_have(viewers, 0)
            await asyncio.sleep(0.2)  # the replica has it
            os.kill(sentinels.replica.pid, signal.SIGSTOP)
            primary: Any = driver.Redis(port=sentinels.primary.port)
            primary.client_kill_filter(_type="replica")  # or it would find what comes now in its socket
            primary.close()
            for channel in publishers:
                for n in range(1, 4):
                    await channel.publish(n)
            await until_all_have(viewers, 3)
            sentinels.primary.kill()
            os.kill(sentinels.replica.pid, signal.SIGCONT)
            async with asyncio.timeout(HANG):
                for channel in publishers:
                    await channel.publish(4)
            await until_all_have(viewers, 4)
            for viewer in viewers:
                seen = [int(event.data) for event in viewer.events if event.event == "message"]
                assert seen == [0, 1, 2, 3, 4]
                resets = [json.loads(event.data)["reason"] for event in viewer.events if event.event == "reset"]
                assert resets == ["epoch"]
                viewer.leave()
                await viewer.end()
    finally:
        await asyncio.to_thread(sentinels.close)


async def test_a_password_and_a_user_with_few_rights(tmp_path: Path) -> None:
    acl = tmp_path / "users.acl"
    rules = "~stream:* &stream:* +@scripting +@stream +@hash +@keyspace +@pubsub +time +ping +client +select +hello"
    acl.write_text(f"user default off\nuser ann on >secret/word {rules}\n")
    server = start_redis("--aclfile", str(acl))
    try:
        async with Streaming(redis=f"redis://ann:secret%2Fword@127.0.0.1:{server.port}/0") as streaming:
            viewers = await viewers_of(streaming, ["acl"])
            await publish_all(streaming, ["acl"], range(3))
            await until_all_have(viewers, 2)
            ctx = StreamContext.create("ann", streaming=streaming)
            await asyncio.to_thread(ctx.complete)
            viewers[0].leave()
            await viewers[0].end()
        async with Streaming(redis=f"redis://ann:wrong@127.0.0.1:{server.port}/0") as streaming:
            with pytest.raises(BackendError, match=r"WRONGPASS|invalid username-password") as caught:
                await AsyncStreamChannel("acl", streaming=streaming).publish(1)
            assert "wrong@" not in str(caught.value)
    finally:
        server.stop()
