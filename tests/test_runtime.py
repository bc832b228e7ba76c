"""The explicit object, the process default, and their settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asgi_stream import (
    ChannelConfig,
    EventStreamResponse,
    QueueRedisConfig,
    Streaming,
    StreamLeaseConfig,
    init_channels,
    init_event_storage,
    init_lease_limiter,
    init_streaming,
    shutdown_streaming,
)
from asgi_stream.errors import ConfigurationError
from asgi_stream.runtime import current_streaming
from tests.asgi_client import Exchange, http_scope
from tests.support import need_module

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def no_default(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    await shutdown_streaming()
    yield
    await shutdown_streaming()


async def test_the_default_is_built_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASGI_STREAM_LEASE_LIMIT", "9")
    monkeypatch.setenv("REDIS_URL", "redis://localhost:6390/2")
    assert current_streaming().lease_config == StreamLeaseConfig(limit=9)
    assert current_streaming().redis == QueueRedisConfig("redis://localhost:6390/2")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ASGI_STREAM_LEASE_LIMIT", "many"),
        ("ASGI_STREAM_LEASE_TTL_SECONDS", "-1"),
        ("ASGI_STREAM_CHANNEL_MAX_EVENTS", "0"),
        ("REDIS_URL", "http://localhost"),
    ],
)
async def test_a_wrong_environment_is_an_error_that_names_the_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        init_streaming()


async def test_init_again_is_nothing_when_the_same_and_an_error_when_not() -> None:
    first = init_streaming(leases=StreamLeaseConfig(limit=3))
    assert init_streaming(leases=StreamLeaseConfig(limit=3)) is first
    with pytest.raises(ConfigurationError, match="shutdown_streaming"):
        init_streaming(leases=StreamLeaseConfig(limit=4))
    await shutdown_streaming()
    assert init_streaming(leases=StreamLeaseConfig(limit=4)).leases.limit == 4


async def test_the_limiter_may_be_refined_until_its_first_use() -> None:
    init_streaming(leases=StreamLeaseConfig(limit=3))
    assert init_lease_limiter(config=StreamLeaseConfig(limit=4)).limit == 4
    assert init_lease_limiter(config=StreamLeaseConfig(limit=4)).limit == 4
    with pytest.raises(ConfigurationError, match="too late"):
        init_lease_limiter(config=StreamLeaseConfig(limit=5))


async def test_leases_are_counted_in_memory_where_that_is_said() -> None:
    limiter = init_lease_limiter("redis://localhost:1", use_memory=True)
    assert limiter.limit == 5
    limiter.acquire("ann").release()  # asks nobody


async def test_channels_may_be_refined() -> None:
    assert init_channels(config=ChannelConfig(max_events=7)).max_events == 7


async def test_a_record_of_events_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a call, by init_streaming, or by the environment of a worker that calls neither."""
    need_module("opensearchpy")
    assert current_streaming().storage_config is None
    with pytest.raises(ConfigurationError, match="init_event_storage"):
        current_streaming().storage  # noqa: B018
    monkeypatch.setenv("OPENSEARCH_HOST", "search.example")
    monkeypatch.setenv("OPENSEARCH_FLUSH_SECONDS", "0.5")
    config = init_event_storage(index_prefix="events", flush_seconds=0.25)
    assert (config.host, config.index_prefix, config.flush_seconds) == ("search.example", "events", 0.25)
    assert current_streaming().storage.config == config
    current_streaming().broker  # noqa: B018 - now it is in use
    assert init_event_storage(index_prefix="events", flush_seconds=0.25) == config
    with pytest.raises(ConfigurationError, match="too late"):
        init_event_storage("elsewhere")
    await shutdown_streaming()

    monkeypatch.setenv("ASGI_STREAM_ENABLE_STORAGE", "yes")
    config = current_streaming().storage_config or config
    assert (config.host, config.flush_seconds) == ("search.example", 0.5)
    await shutdown_streaming()
    monkeypatch.setenv("ASGI_STREAM_ENABLE_STORAGE", "perhaps")
    with pytest.raises(ConfigurationError, match="ASGI_STREAM_ENABLE_STORAGE"):
        current_streaming()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Streaming(storage="localhost"),  # type: ignore[arg-type]
        lambda: init_event_storage(hots="localhost"),
        lambda: init_event_storage(auth_type="basic"),
        lambda: Streaming(redis="localhost:6379"),
        lambda: Streaming(redis="redis://"),
        lambda: Streaming(leases=5),  # type: ignore[arg-type]
        lambda: Streaming(identify="user"),  # type: ignore[arg-type]
        lambda: ChannelConfig(key_prefix="a b"),
    ],
)
async def test_what_cannot_work_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError):
        make()


async def test_shutdown_ends_open_streams_and_a_new_start_welcomes_new_ones() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "a"
        await asyncio.Event().wait()

    for _ in range(2):
        init_streaming()
        exchange = Exchange(EventStreamResponse(generate()), http_scope())
        await exchange.until_body(b"data: a")
        await asyncio.sleep(0)
        assert not exchange.over
        await shutdown_streaming()
        await exchange.end()
        assert exchange.events[-1].event == "close"
