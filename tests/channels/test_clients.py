"""`SyncStreamChannel` and `AsyncStreamChannel`: the same verbs, the same answers."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_stream import AsyncStreamChannel, ChannelConfig, StreamEvent, Streaming, SyncStreamChannel, shutdown_streaming
from asgi_stream.channels.model import Record
from asgi_stream.errors import ConfigurationError, InvalidEventError, RunEndedError

pytestmark = pytest.mark.anyio

_names = itertools.count(1)


@pytest.fixture
def name() -> str:
    return f"client-{os.getpid()}-{next(_names)}"


@pytest.fixture(params=["memory", "redis"])
async def streaming(request: pytest.FixtureRequest) -> AsyncIterator[Streaming]:
    url = None if request.param == "memory" else request.getfixturevalue("redis_url")
    async with Streaming(redis=url) as made:
        yield made


class InThread:
    """The sync client behind the async one's face."""

    def __init__(self, channel: SyncStreamChannel) -> None:
        self._channel = channel

    def __getattr__(self, verb: str) -> Any:
        method = getattr(self._channel, verb)
        return lambda *args, **named: asyncio.to_thread(method, *args, **named)

    async def subscribe(self, **named: Any) -> AsyncIterator[Record]:
        iterator = self._channel.subscribe(**named)
        while (record := await asyncio.to_thread(next, iterator, None)) is not None:
            yield record


@pytest.fixture(params=["sync", "async"])
def channel(request: pytest.FixtureRequest, streaming: Streaming, name: str) -> Any:
    if request.param == "sync":
        return InThread(SyncStreamChannel(name, streaming=streaming))
    return AsyncStreamChannel(name, streaming=streaming)


def test_both_have_the_same_verbs() -> None:
    """Neither side gains an option alone."""
    verbs = [verb for verb in vars(AsyncStreamChannel) if not verb.startswith("_")]
    assert verbs == [verb for verb in vars(SyncStreamChannel) if not verb.startswith("_")]
    for verb in verbs:
        sync, asynchronous = getattr(SyncStreamChannel, verb), getattr(AsyncStreamChannel, verb)
        assert inspect.signature(sync).parameters == inspect.signature(asynchronous).parameters


async def test_published_is_history(channel: Any) -> None:
    first = await channel.publish({"n": 1}, "count")
    ids = await channel.publish_many(["two", StreamEvent({"n": 3}, event="count")])
    ending = await channel.close(success=False, why="so")
    history = await channel.history()
    assert [record.id for record in history] == [first, *ids, ending]
    assert [(record.event, record.data) for record in history[:3]] == [
        ("count", {"n": 1}),
        ("message", "two"),
        ("count", {"n": 3}),
    ]
    assert history[3].event == "complete"
    assert history[3].data["success"] is False
    assert [record.id for record in await channel.history(after=first, limit=2)] == ids
    assert await channel.history(after=ending) == []
    info = await channel.info()
    assert (info.state, info.top, info.ended) == ("complete", 4, True)
    with pytest.raises(RunEndedError):
        await channel.publish("late")


async def test_an_event_with_an_ending_s_name_ends_the_run(channel: Any) -> None:
    await channel.publish({"success": True}, "complete")
    assert (await channel.info()).ended


async def test_what_no_event_can_carry(channel: Any, streaming: Streaming) -> None:
    """[S4]"""
    for bad, field in ((object(), "data"), (StreamEvent("x", id="7"), "id"), ("x" * 2_000_000, "data")):
        with pytest.raises(InvalidEventError) as caught:
            await channel.publish(bad)
        assert caught.value.field == field
    with pytest.raises(ConfigurationError, match="complete"):
        await channel.close("done")
    assert (await channel.info()).top == 0


async def test_subscribing_before_and_after(channel: Any, streaming: Streaming, name: str) -> None:
    other = AsyncStreamChannel(name, streaming=streaming)
    await other.publish_many(range(300))
    seen: list[Any] = []
    half = asyncio.Event()

    async def read() -> None:
        async for record in channel.subscribe():
            seen.append(record.data)
            if len(seen) == 300:
                half.set()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(20):
        await half.wait()
        for n in range(300, 350):
            await other.publish(n)
        await other.close()
        await reading
    assert seen[:-1] == list(range(350))
    assert seen[-1]["success"] is True


async def test_subscribing_after_an_id_or_the_end(channel: Any) -> None:
    ids = await channel.publish_many(["a", "b"])
    ending = await channel.close()
    later = [record.data async for record in channel.subscribe(after=ids[0])]
    assert later[0] == "b"
    assert [record async for record in channel.subscribe(after=ending)] == []
    lost = [record.event async for record in channel.subscribe(after="AAAAAA.5")]
    assert lost == ["reset", "message", "message", "complete"]


async def test_many_tasks_on_one_channel(streaming: Streaming, name: str) -> None:
    channel = AsyncStreamChannel(name, streaming=streaming)
    ids = await asyncio.gather(*(channel.publish(n) for n in range(500)))
    history = await channel.history()
    assert [record.data for record in history] == list(range(500))
    assert [record.id for record in history] == ids


async def test_many_threads_on_one_channel(streaming: Streaming, name: str) -> None:
    channel = SyncStreamChannel(name, streaming=streaming)

    def publish(n: int) -> None:
        for m in range(50):
            channel.publish([n, m])

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    seen = [record.data for record in await asyncio.to_thread(channel.history)]
    assert len(seen) == 400
    for n in range(8):
        assert [m for k, m in seen if k == n] == list(range(50))


async def test_a_redis_of_its_own(redis_url: str, name: str) -> None:
    config = ChannelConfig(key_prefix="own:")
    one = AsyncStreamChannel(name, redis=redis_url, config=config)
    two = SyncStreamChannel(name, redis=redis_url, config=config)
    await one.publish("a")
    assert [record.data for record in await asyncio.to_thread(two.history)] == ["a"]
    assert await AsyncStreamChannel(name, redis=redis_url).history() == []
    with pytest.raises(ConfigurationError, match="either"):
        AsyncStreamChannel(name, redis=redis_url, streaming=Streaming())
    await shutdown_streaming()
