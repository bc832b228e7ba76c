"""`StreamContext`, in memory and over a real Redis, in threads, tasks, forks and other processes [C7]."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_stream import ChannelConfig, StreamContext, Streaming, SyncStreamChannel
from asgi_stream.channels import courier as courier_module
from asgi_stream.channels.model import is_owner
from asgi_stream.errors import (
    AttemptSupersededError,
    BackendError,
    ConfigurationError,
    InvalidEventError,
    RunCancelledError,
    RunEndedError,
)
from tests.redis_server import start_redis

pytestmark = pytest.mark.anyio

HANG = 20.0


@pytest.fixture(params=["memory", "redis"])
async def streaming(request: pytest.FixtureRequest) -> AsyncIterator[Streaming]:
    url = None if request.param == "memory" else request.getfixturevalue("redis_url")
    async with Streaming(redis=url, channels=ChannelConfig(producer_timeout=0.4)) as made:
        yield made


@pytest.fixture
def ctx(streaming: Streaming) -> StreamContext:
    return StreamContext.create("ann", project="shop", streaming=streaming, color="blue")


def events_of(ctx: StreamContext) -> list[tuple[str, Any]]:
    """What was published, less the times."""
    ctx_events = []
    for record in ctx.channel().history():
        data = dict(record.data)
        assert abs(data.pop("ts") / 1000 - time.time()) < 60
        ctx_events.append((record.event, data))
    return ctx_events


async def until(condition: Any) -> None:
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110 - another thread's or process's doing
            await asyncio.sleep(0.002)


async def test_the_fields_are_the_design_s(ctx: StreamContext) -> None:
    ctx.log("hello", fields={"n": 1})
    ctx.log("careful", level="warning", logger="app")
    ctx.progress(10, step="building")
    ctx.data("size", [1, 2])
    ctx.token("wo")
    ctx.emit("own", {"ts": 1_000_000_000_000} | {"ts": time.time() * 1000})
    ctx.complete(success=True, deployment_id="abc123")
    assert events_of(ctx) == [
        ("log", {"message": "hello", "level": "info", "fields": {"n": 1}}),
        ("log", {"message": "careful", "level": "warning", "logger": "app"}),
        ("progress", {"percent": 10, "step": "building"}),
        ("data", {"name": "size", "value": [1, 2]}),
        ("token", {"text": "wo"}),
        ("own", {}),
        ("complete", {"success": True, "deployment_id": "abc123"}),
    ]


async def test_the_async_forms_say_the_same(ctx: StreamContext) -> None:
    await ctx.log_async("hello")
    await ctx.progress_async(99.5)
    await ctx.data_async("n", 1)
    await ctx.token_async("wo")
    await ctx.fail_async("no_disk", "the disk is full", retryable=True)
    seen = events_of(ctx)
    assert [name for name, _ in seen] == ["log", "progress", "data", "token", "failed"]
    failed = seen[-1][1]
    assert failed.pop("id")
    assert failed == {"code": "no_disk", "message": "the disk is full", "retryable": True}


async def test_plain_and_async_verbs_keep_their_order(ctx: StreamContext) -> None:
    for n in range(30):
        ctx.token(f"plain {n}")
        if n % 3 == 0:
            await ctx.token_async(f"async {n}")
    await ctx.complete_async()
    words = [data["text"] for name, data in events_of(ctx) if name == "token"]
    expected = []
    for n in range(30):
        expected += [f"plain {n}"] + ([f"async {n}"] if n % 3 == 0 else [])
    assert words == expected


async def test_plain_verbs_leave_in_order_in_few_commands(ctx: StreamContext, streaming: Streaming) -> None:
    for n in range(2000):
        ctx.token(str(n))
    assert ctx.flush()
    assert [data["text"] for _, data in events_of(ctx)] == list(map(str, range(2000)))


async def test_threads_share_a_context(ctx: StreamContext) -> None:
    def work(n: int) -> None:
        for m in range(100):
            ctx.data(str(n), m)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    ctx.complete()
    seen = [data for name, data in events_of(ctx) if name == "data"]
    for n in range(5):
        assert [data["value"] for data in seen if data["name"] == str(n)] == list(range(100))


async def test_create_does_nothing_but_make_an_id() -> None:
    streaming = Streaming(redis="redis://127.0.0.1:1")
    ctx = StreamContext.create("ann", streaming=streaming)
    assert is_owner(ctx.channel_id, "ann")
    assert json.loads(json.dumps(ctx.to_dict()))["channel_id"] == ctx.channel_id
    with pytest.raises(ConfigurationError, match="workspace_id"):
        StreamContext.create("")


async def test_it_travels(ctx: StreamContext, streaming: Streaming) -> None:
    made = json.loads(json.dumps(ctx.to_dict()))
    again = StreamContext.from_dict(made, streaming=streaming)
    assert (again.channel_id, again.workspace_id, again.project) == (ctx.channel_id, "ann", "shop")
    assert (again.env, again.service, again.labels) == (None, None, {"color": "blue"})
    found = StreamContext.find({"config": {"n": 1}, "any": made, "other": 7}, streaming=streaming)
    assert found is not None
    assert found.channel_id == ctx.channel_id
    assert StreamContext.find({"config": 1}) is None
    assert StreamContext.find(7) is None
    StreamContext.from_dict({**made, "new_field": 1}, streaming=streaming)
    for bad in ({}, "x", {**made, "asgi_stream_context": 99}, {"asgi_stream_context": 1}):
        with pytest.raises(ConfigurationError):
            StreamContext.from_dict(bad, streaming=streaming)


async def test_memory_of_another_process_is_told() -> None:
    made = StreamContext.create("ann", streaming=Streaming()).to_dict()
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        StreamContext.from_dict(made, streaming=Streaming())


@pytest.mark.parametrize("percent", [-1, 101, "10", None, True, float("nan")])
async def test_a_wrong_percent(ctx: StreamContext, percent: Any) -> None:
    with pytest.raises(InvalidEventError, match="0 to 100"):
        ctx.progress(percent)


async def test_what_cannot_be_published(ctx: StreamContext) -> None:
    with pytest.raises(InvalidEventError, match="level"):
        ctx.log("x", level="loud")
    with pytest.raises(InvalidEventError):
        ctx.data("x", object())
    with pytest.raises(InvalidEventError, match="max_event_bytes"):
        ctx.log("x" * 2_000_000)
    with pytest.raises(InvalidEventError):
        ctx.complete(result=object())
    ctx.complete()
    assert len(events_of(ctx)) == 1


async def test_a_run_ends_once(ctx: StreamContext, streaming: Streaming) -> None:
    """[W4]"""
    other = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    ctx.complete()
    with pytest.raises(RunEndedError):
        ctx.log("late")
    with pytest.raises(RunEndedError):
        ctx.complete()
    with pytest.raises(RunEndedError):
        ctx.fail("a", "b")
    with pytest.raises(RunEndedError):
        other.complete()
    # A plain verb does not wait: the next one tells.
    late = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    late.log("lost")
    with pytest.raises(RunEndedError):
        late.flush()
    with pytest.raises(RunEndedError):
        late.log("again")
    with pytest.raises(RunEndedError):
        await late.log_async("again")


async def test_a_block_ends_the_run(streaming: Streaming, caplog: pytest.LogCaptureFixture) -> None:
    with StreamContext.create("ann", streaming=streaming) as ctx:
        ctx.log("a")
    assert [name for name, _ in events_of(ctx)] == ["log", "complete"]
    with pytest.raises(ZeroDivisionError), StreamContext.create("ann", streaming=streaming) as ctx:
        raise ZeroDivisionError("secret")
    (failed,) = [data for name, data in events_of(ctx) if name == "failed"]
    assert (failed["code"], failed["message"]) == ("ZeroDivisionError", "the task failed")
    assert failed["id"] in caplog.text
    async with StreamContext.create("ann", streaming=streaming) as ctx:
        await ctx.complete_async(success=False)
    assert [name for name, _ in events_of(ctx)] == ["complete"]
    ctx = StreamContext.create("ann", streaming=streaming)
    assert ctx.__exit__(RunCancelledError, RunCancelledError(ctx.channel_id, "user"), None)  # nobody's failure
    assert events_of(ctx) == [("cancelled", {"reason": "user"})]


async def test_cancelling_a_run_that_works(ctx: StreamContext, streaming: Streaming) -> None:
    worker = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    worker.log("begun")
    worker.flush()
    before = worker.cancelled
    assert not before
    await ctx.cancel_async("user")
    worker.log("still")
    worker.flush()
    assert worker.cancelled
    with pytest.raises(RunCancelledError, match="user"):
        worker.raise_if_cancelled()
    worker.end_cancelled("user")
    assert (await asyncio.to_thread(worker.channel().info)).state == "cancelled"


async def test_a_silent_worker_learns_it_with_its_sign_of_life(ctx: StreamContext, streaming: Streaming) -> None:
    worker = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    worker.log("begun")
    worker.flush()
    ctx.cancel("user")
    await until(lambda: worker.cancelled)


async def test_cancelling_a_run_that_waits_ends_it(ctx: StreamContext, streaming: Streaming) -> None:
    ctx.queued()
    assert ctx.cancel("user").state == "queued"
    assert [name for name, _ in events_of(ctx)] == ["queued", "cancelled"]
    worker = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    with pytest.raises(RunEndedError):
        worker.begin_attempt()


async def test_attempts(ctx: StreamContext, streaming: Streaming) -> None:
    """[C7]"""
    first = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    second = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    assert first.begin_attempt("w1") == 1
    first.log("one")
    first.flush()
    assert await second.begin_attempt_async("w2") == 2
    first.log("late")
    with pytest.raises(AttemptSupersededError):
        first.flush()
    with pytest.raises(AttemptSupersededError):
        first.complete()
    second.log("two")
    second.complete()
    assert [(name, data.get("attempt"), data.get("message")) for name, data in events_of(ctx)] == [
        ("started", 1, None),
        ("log", None, "one"),
        ("attempt_lost", 1, None),
        ("started", 2, None),
        ("log", None, "two"),
        ("complete", None, None),
    ]


async def test_signs_of_life_last_as_long_as_the_context(ctx: StreamContext, streaming: Streaming) -> None:
    """[C7]"""
    channel = SyncStreamChannel(ctx.channel_id, streaming=streaming)
    ctx.log("the one who ordered it shows none")
    ctx.flush()
    worker = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
    worker.log("begun")
    worker.flush()
    begun = time.monotonic()
    while time.monotonic() - begun < 1.0:  # more than twice the time after which it would be lost
        assert not channel.info().lost
        await asyncio.sleep(0.05)
    del worker
    await until(lambda: channel.info().lost)


async def test_track_publishes_once_per_percent(ctx: StreamContext) -> None:
    assert list(ctx.track(range(1000), step="copy")) == list(range(1000))
    assert list(ctx.track([], step="none")) == []
    assert list(ctx.track((n for n in range(4)), total=4)) == [0, 1, 2, 3]
    with pytest.raises(ConfigurationError, match="total"):
        list(ctx.track(n for n in range(4)))
    ctx.flush()
    percents = [data["percent"] for name, data in events_of(ctx)]
    assert percents == [*range(101), 100, 0, 25, 50, 75, 100]


async def test_a_full_buffer_makes_verbs_wait(ctx: StreamContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "MAX_WAITING_BYTES", 1000)
    for n in range(200):
        ctx.log("x" * 100, fields={"n": n})
    ctx.complete()
    assert [data["fields"]["n"] for name, data in events_of(ctx) if name == "log"] == list(range(200))


async def test_a_hiccup_of_redis_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    server = start_redis()
    try:
        async with Streaming(redis=server.url) as streaming:
            ctx = StreamContext.create("ann", streaming=streaming)
            ctx.log("a")
            ctx.flush()
            os.kill(server.pid, signal.SIGSTOP)
            for n in range(10):
                ctx.log(str(n))
            await asyncio.sleep(0.3)
            os.kill(server.pid, signal.SIGCONT)
            await asyncio.to_thread(ctx.complete)
            assert [data.get("message") for _, data in events_of(ctx)] == ["a", *map(str, range(10)), None]
    finally:
        server.stop()


async def test_no_redis_loses_lines_with_a_log_and_endings_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async with Streaming(redis="redis://127.0.0.1:1") as streaming:
        streaming.broker.patience = 0.2  # type: ignore[attr-defined]
        ctx = StreamContext.create("ann", streaming=streaming)
        ctx.log("lost")
        await until(lambda: "did not take 1 events" in caplog.text)
        with pytest.raises(BackendError):
            ctx.complete()
        with pytest.raises(BackendError):
            await ctx.log_async("x")
        assert ctx.ended is None


def test_a_process_that_ends_in_order_sends_what_it_said(redis_url: str) -> None:
    streaming = Streaming(redis=redis_url)
    ctx = StreamContext.create("ann", streaming=streaming)
    code = (
        "import json, sys; from asgi_stream import StreamContext\n"
        "ctx = StreamContext.from_dict(json.loads(sys.argv[1]))\n"
        "for n in range(100): ctx.log(str(n))\n"
    )
    environ = {**os.environ, "REDIS_URL": redis_url}
    subprocess.run([sys.executable, "-c", code, json.dumps(ctx.to_dict())], check=True, env=environ, timeout=HANG)
    assert [data["message"] for _, data in events_of(ctx)] == list(map(str, range(100)))
    asyncio.run(streaming.aclose())


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork_goes_on_as_another_producer(redis_url: str) -> None:
    """[O3]"""
    streaming = Streaming(redis=redis_url)
    ctx = StreamContext.create("ann", streaming=streaming)
    ctx.log("parent")
    ctx.flush()

    def child() -> None:
        ctx.log("child")
        ctx.flush()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(HANG)
    assert process.exitcode == 0
    ctx.log("parent again")
    ctx.complete()
    assert [data.get("message") for _, data in events_of(ctx)] == ["parent", "child", "parent again", None]
    asyncio.run(streaming.aclose())


async def test_log_records_become_events(ctx: StreamContext) -> None:
    from asgi_stream.telemetry import EventLogHandler

    log = logging.getLogger("library")
    handler = EventLogHandler(ctx)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        log.info("copied %d files", 3, extra={"folder": "/tmp"})
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("it failed")
        log.debug("not this")
        ctx.complete()
        log.info("after the end: lost, and nobody is hurt")
    finally:
        log.removeHandler(handler)
    seen = events_of(ctx)
    assert seen[0] == (
        "log",
        {"message": "copied 3 files", "level": "info", "logger": "library", "fields": {"folder": "/tmp"}},
    )
    assert seen[1][1]["level"] == "error"
    assert "ValueError: broken" in seen[1][1]["fields"]["exception"]
    assert len(seen) == 3
