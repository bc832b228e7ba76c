"""The record's writer as a process of its own, and log records on their way to it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis as driver

from asgi_stream import ChannelConfig, QueueRedisConfig, StreamContext, Streaming
from asgi_stream.errors import ConfigurationError
from asgi_stream.storage import OpenSearchEventStorage, StorageConfig, archiver
from asgi_stream.storage.archiver import Archiver, waiting
from asgi_stream.telemetry import EventLogHandler
from tests.redis_server import start_redis
from tests.storage.conftest import MakeStorage
from tests.storage.front import Front
from tests.storage.server import SearchServer
from tests.storage.test_contract import every_page, refresh, until

HANG = 60.0
_names = itertools.count(1)


@pytest.fixture
def channels() -> ChannelConfig:
    return ChannelConfig(key_prefix=f"archive-{os.getpid()}-{next(_names)}:")


@pytest.fixture
def archived(storage: OpenSearchEventStorage) -> StorageConfig:
    """The settings of publishers whose events an archiver writes."""
    return StorageConfig(
        host=storage.config.host,
        port=storage.config.port,
        index_prefix=storage.config.index_prefix,
        spool_dir=storage.config.spool_dir,
        writer="archiver",
    )


@contextmanager
def following(redis_url: str, config: StorageConfig, channels: ChannelConfig) -> Iterator[Archiver]:
    one = Archiver(redis_url, config, channels)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield one
    finally:
        one.stop()
        thread.join(HANG)


@contextmanager
def process(redis_url: str, config: StorageConfig, channels: ChannelConfig) -> Iterator[subprocess.Popen[str]]:
    """``asgi-stream archiver``."""
    environ = {
        **os.environ,
        "REDIS_URL": redis_url,
        "OPENSEARCH_HOST": config.host,
        "OPENSEARCH_PORT": str(config.port),
        "OPENSEARCH_INDEX_PREFIX": config.index_prefix,
        "OPENSEARCH_SPOOL_DIR": config.spool_dir,
        "ASGI_STREAM_CHANNEL_KEY_PREFIX": channels.key_prefix,
    }
    command = [sys.executable, "-m", "asgi_stream", "archiver"]
    one = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert one.stdout is not None
    try:
        assert one.stdout.readline().startswith("writes what comes by redis://")
        yield one
    finally:
        one.kill()
        one.communicate()


def drained(redis_url: str, channels: ChannelConfig) -> bool:
    return waiting(QueueRedisConfig(redis_url), channels) == {"events": 0, "logs": 0}


def test_an_archiver_writes_what_publishers_append(
    redis_url: str, storage: OpenSearchEventStorage, archived: StorageConfig, channels: ChannelConfig
) -> None:
    streaming = Streaming(redis_url, storage=archived, channels=channels)
    ctx = StreamContext.create("ann", "shop", streaming=streaming, team="core")
    for n in range(50):
        ctx.log(str(n))
    ctx.flush()
    # An event that somebody writes who does not know whose run it is.
    asyncio.run(cancel(streaming, ctx.channel_id))
    with following(redis_url, archived, channels):
        until(lambda: drained(redis_url, channels))
    refresh(storage)
    found = every_page(storage, 20, channel=ctx.channel_id)
    assert [one.message for one in found[:50]] == [str(n) for n in range(50)]
    assert {(one.workspace, one.project, one.labels) for one in found} == {("ann", "shop", ("team=core",))}
    assert found[-1].event == "cancelled"
    with pytest.raises(AttributeError):
        streaming.broker._offer  # type: ignore[attr-defined]  # noqa: B018 - the publisher does not write


async def cancel(streaming: Streaming, channel: str) -> None:
    from asgi_stream.channels.commands import Append

    await streaming.broker.run_async(Append(channel, (b'event: cancelled\ndata: {"reason":"user"}\n',), "cancelled"))
    await streaming.aclose()


def test_archivers_that_are_killed(
    redis_url: str,
    storage: OpenSearchEventStorage,
    archived: StorageConfig,
    channels: ChannelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL in the midst of it: the next one goes on where it was, and everything is there, once."""
    monkeypatch.setattr(archiver, "TAKE_OVER_SECONDS", 0.5)
    streaming = Streaming(redis_url, storage=archived, channels=channels)
    ctx = StreamContext.create("ann", streaming=streaming)
    count = 3000
    stop = threading.Event()

    def publish() -> None:
        for n in range(count):
            ctx.log(str(n))
            time.sleep(0.001)
        stop.set()

    publisher = threading.Thread(target=publish)
    publisher.start()
    for _ in range(2):
        with process(redis_url, archived, channels) as one:
            until(lambda: every_page_count(storage, ctx.channel_id) > 0)
            one.kill()
    publisher.join()
    ctx.complete()
    with following(redis_url, archived, channels):
        until(lambda: drained(redis_url, channels))
    refresh(storage)
    logs = every_page(storage, 1000, channel=ctx.channel_id, kinds="log")
    assert [one.message for one in logs] == [str(n) for n in range(count)]
    asyncio.run(streaming.aclose())


def every_page_count(storage: OpenSearchEventStorage, channel: str) -> int:
    refresh(storage)
    return len(storage.search(channel=channel, limit=1).events)


def test_what_another_archiver_took_is_taken_over(
    redis_url: str,
    storage: OpenSearchEventStorage,
    archived: StorageConfig,
    channels: ChannelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archiver, "TAKE_OVER_SECONDS", 0.3)
    streaming = Streaming(redis_url, storage=archived, channels=channels)
    ctx = StreamContext.create("ann", streaming=streaming)
    ctx.log("taken, and never written")
    ctx.complete()
    with driver.Redis.from_url(redis_url) as client:
        stream = f"{channels.key_prefix}archive"
        client.xgroup_create(stream, archiver.GROUP, id="0")
        assert client.xreadgroup(archiver.GROUP, "dead", {stream: ">"})
    with following(redis_url, archived, channels):
        until(lambda: drained(redis_url, channels))
    refresh(storage)
    assert len(storage.search(channel=ctx.channel_id).events) == 2
    asyncio.run(streaming.aclose())


def test_opensearch_and_redis_are_away_for_a_while(
    search_server: SearchServer,
    make_storage: MakeStorage,
    archived: StorageConfig,
    channels: ChannelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream waits; an archiver that is told to stop ends, and what it had is written by the next."""
    monkeypatch.setattr(archiver, "TAKE_OVER_SECONDS", 0.5)
    server = start_redis()
    front = Front(*search_server.settings.values())
    with front.running():
        port = front.port
    storage = make_storage(search_server, index_prefix=archived.index_prefix)
    config = StorageConfig(
        host=archived.host,
        port=port,
        index_prefix=archived.index_prefix,
        spool_dir=archived.spool_dir,
        writer="archiver",
    )
    streaming = Streaming(server.url, storage=config, channels=channels)
    ctx = StreamContext.create("ann", streaming=streaming)
    ctx.log("one")
    ctx.flush()
    with following(server.url, config, channels) as one:
        until(lambda: "cannot be reached" in one._told)
    assert one.written == 0
    with following(server.url, config, channels) as one, front.running(port=port):
        until(lambda: drained(server.url, channels))
        server.kill()
        server.start()
        ctx.log("two")
        ctx.complete()
        until(lambda: drained(server.url, channels))
        refresh(storage)
        assert {each.message for each in storage.search(workspace="ann").events} >= {"one", "two"}
    asyncio.run(streaming.aclose())
    server.stop()


def test_log_records(
    redis_url: str,
    storage: OpenSearchEventStorage,
    archived: StorageConfig,
    channels: ChannelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """logger.info → Redis → archiver → OpenSearch: fields, exception, trace ids; not the archiver's own."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    streaming = Streaming(redis_url, channels=channels)
    handler = EventLogHandler(level="INFO", service="billing", workspace="ann", streaming=streaming)
    library = logging.getLogger("library.of.theirs")
    library.setLevel(logging.DEBUG)
    library.addHandler(handler)
    try:
        context = trace.SpanContext(0xABC, 0xDEF, is_remote=False)
        with trace.use_span(trace.NonRecordingSpan(context)):
            library.info("paid %s", 42, extra={"order": 7, "items": ["a"], "long": "x" * 100_000})
        library.debug("left out")
        try:
            raise ValueError("of theirs")
        except ValueError:
            library.exception("it broke")
        logging.getLogger("asgi_stream").error("of ours")
        handler.flush()
    finally:
        library.removeHandler(handler)
    with following(redis_url, archived, channels):
        until(lambda: drained(redis_url, channels))
    refresh(storage)
    info, error = storage.search(workspace="ann").events
    assert (info.message, info.level, info.event, info.service) == ("paid 42", "info", "log", "billing")
    assert info.more["fields"]["order"] == 7
    assert info.more["fields"]["items"] == "['a']"
    assert len(info.more["fields"]["long"]) == 32 * 1024
    assert (info.more["trace_id"], info.more["span_id"]) == (f"{0xABC:032x}", f"{0xDEF:016x}")
    assert info.more["logger"] == "library.of.theirs"
    assert "ValueError: of theirs" in error.more["exception"]
    assert [one.message for one in storage.search(workspace="ann", level="error").events] == ["it broke"]
    handler.close()


def test_logging_never_waits_for_redis(channels: ChannelConfig) -> None:
    """Redis is away: records wait, the oldest go, nobody is slowed, and afterwards they are sent."""
    server = start_redis()
    streaming = Streaming(server.url, channels=channels)
    handler = EventLogHandler(streaming=streaming)
    logger = logging.Logger("x")
    logger.addHandler(handler)
    logger.info("before")
    handler.flush()
    server.kill()
    begun = time.monotonic()
    for n in range(12_000):
        logger.info("while it is away %d", n)
    assert time.monotonic() - begun < 10.0
    until(lambda: handler.dropped > 1000)
    server.start()
    assert handler._shipper is not None
    assert handler._shipper.flush(HANG)
    assert 1000 < handler.dropped <= 2600
    assert waiting(QueueRedisConfig(server.url), channels)["logs"] >= 12_000 - handler.dropped
    handler.close()
    server.stop()


def test_what_cannot_be(redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        EventLogHandler(streaming=Streaming())
    with pytest.raises(ConfigurationError, match="no cluster"):
        Archiver("redis+cluster://a,b")
    with pytest.raises(ConfigurationError, match="no cluster"):
        Streaming("redis+cluster://a,b", storage=StorageConfig(writer="archiver")).broker  # noqa: B018
    with pytest.raises(ConfigurationError, match="another process"):
        Streaming(storage=StorageConfig(writer="archiver")).broker  # noqa: B018


def test_commands(
    redis_url: str, storage: OpenSearchEventStorage, archived: StorageConfig, channels: ChannelConfig
) -> None:
    """``asgi-stream archiver`` and ``asgi-stream storage`` as operators use them."""
    environ = {
        **os.environ,
        "OPENSEARCH_HOST": archived.host,
        "OPENSEARCH_PORT": str(archived.port),
        "OPENSEARCH_INDEX_PREFIX": archived.index_prefix,
        "ASGI_STREAM_CHANNEL_KEY_PREFIX": channels.key_prefix,
        "REDIS_URL": redis_url,
    }

    def run(*words: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "asgi_stream", "storage", *words],
            env={**environ, **more},
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert run("setup") == (0, f"installed: index template {archived.index_prefix}\n")
    streaming = Streaming(redis_url, storage=archived, channels=channels)
    ctx = StreamContext.create("ann", streaming=streaming)
    ctx.emit("old", {"ts": 1})
    ctx.complete()
    code, told = run("status")
    assert code == 0
    assert "events: 0\n" in told
    assert "waiting for an archiver: 2 appends, 0 log records" in told
    with process(redis_url, archived, channels) as one:
        until(lambda: drained(redis_url, channels))
        one.send_signal(signal.SIGTERM)
        assert one.wait(HANG) == 0
        assert one.stdout is not None
        assert one.stdout.read() == "2 written (0 had been before), 0 refused\n"
    refresh(storage)
    assert "events: 2, from " in run("status")[1]
    assert run("prune", "--days", "30") == (0, "deleted: nothing\n")
    code, told = run("prune")
    assert (code, "OPENSEARCH_RETENTION_DAYS" in told) == (1, True)
    code, told = run("status", OPENSEARCH_PORT="1")
    assert (code, "cannot be reached" in told) == (1, True)
    code, told = run("status", OPENSEARCH_AUTH_TYPE="magic")
    assert (code, "OPENSEARCH_AUTH_TYPE='magic'" in told) == (1, True)
    asyncio.run(streaming.aclose())


def test_a_worker_that_archives(
    redis_url: str, storage: OpenSearchEventStorage, archived: StorageConfig, channels: ChannelConfig
) -> None:
    """``asgi-stream worker --archive`` does both."""
    streaming = Streaming(redis_url, storage=archived, channels=channels)
    ctx = StreamContext.create("ann", streaming=streaming)
    ctx.log("one")
    ctx.complete()
    environ = {
        **os.environ,
        "REDIS_URL": redis_url,
        "OPENSEARCH_HOST": archived.host,
        "OPENSEARCH_PORT": str(archived.port),
        "OPENSEARCH_INDEX_PREFIX": archived.index_prefix,
        "OPENSEARCH_SPOOL_DIR": archived.spool_dir,
        "ASGI_STREAM_CHANNEL_KEY_PREFIX": channels.key_prefix,
    }
    words = [sys.executable, "-m", "asgi_stream", "worker", "tests.job_queue.operations:registry", "--archive"]
    worker = subprocess.Popen(
        [*words, "--queue", channels.key_prefix.strip(":")], env=environ, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: drained(redis_url, channels))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(HANG) == 0
    finally:
        worker.kill()
        worker.wait()
    refresh(storage)
    assert [one.event for one in storage.search(channel=ctx.channel_id).events] == ["log", "complete"]
    asyncio.run(streaming.aclose())
