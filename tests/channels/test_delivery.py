"""From a channel to its viewers, without a server between: order, gaps, endings, slow clients [C1] [C2] [C4] [C5]."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_stream import ChannelConfig, Streaming
from asgi_stream.asgi import viewer as viewer_module
from asgi_stream.asgi.sse_response import sse_response
from asgi_stream.channels import hub as hub_module
from asgi_stream.channels.commands import Append, Read, Touch
from asgi_stream.channels.model import Position, new_channel_id
from asgi_stream.errors import ConfigurationError
from asgi_stream.sse import ServerSentEvent
from tests.asgi_client import Exchange, fetch, http_scope
from tests.redis_server import start_redis

pytestmark = pytest.mark.anyio

_names = itertools.count(1)


def new_name() -> str:
    return f"view-{os.getpid()}-{next(_names)}"


@pytest.fixture(params=["memory", "redis"])
async def streaming(request: pytest.FixtureRequest) -> AsyncIterator[Streaming]:
    url = None if request.param == "memory" else request.getfixturevalue("redis_url")
    async with Streaming(redis=url) as made:
        yield made


@pytest.fixture
def name() -> str:
    return new_name()


async def publish(streaming: Streaming, name: str, *texts: object, ending: str | None = None, **more: Any) -> None:
    frames = tuple(f"data: {text}\n".encode() for text in texts)
    if ending:
        frames = (*frames[:-1], f"event: {ending}\n".encode() + frames[-1])
    await streaming.broker.run_async(Append(name, frames, ending=ending, **more))


async def view(streaming: Streaming, *names: str, last: str | None = None, query: str = "", **options: Any) -> Exchange:
    response = await sse_response(list(names), streaming=streaming, **options)
    headers = {} if last is None else {"Last-Event-ID": last}
    return Exchange(response, http_scope(headers=headers, query_string=query.encode()))


def texts(events: list[ServerSentEvent]) -> list[str]:
    return [event.data for event in events if event.event not in ("ready", "reset", "close")]


async def heard(streaming: Streaming, name: str, top: int) -> None:
    """Wait until this process has heard of so many events."""
    async with asyncio.timeout(20):
        while streaming.hub()._channels[name].top < top:  # noqa: ASYNC110 - it tells its viewers only
            await asyncio.sleep(0.001)


async def test_what_was_published_before_half_before_and_after(streaming: Streaming, name: str) -> None:
    """[C1] [W4]"""
    await publish(streaming, name, *range(10))
    early = await view(streaming, name)
    await early.until_body(b"data: 9\n")
    await publish(streaming, name, *range(10, 20))
    await early.until_body(b"data: 19\n")
    await publish(streaming, name, "over", ending="complete")
    await early.end()
    late = await view(streaming, name)
    for viewer in (early, late):
        await viewer.end()
        assert viewer.over
        assert texts(viewer.events) == [*map(str, range(20)), "over"]
        assert viewer.events[0].event == "ready"
        assert viewer.events[-1].event == "complete"
        assert viewer.events[-1].id.endswith(".e")
    assert json.loads(late.events[0].data)["state"] == "complete"
    assert early.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_the_first_event_says_where_the_client_stands(streaming: Streaming, name: str) -> None:
    viewer = await view(streaming, name)
    await viewer.until_body(b"event: ready")
    ready = viewer.events[0]
    data = json.loads(ready.data)
    assert {key: data[key] for key in ("v", "channel", "state")} == {"v": 1, "channel": name, "state": "waiting"}
    assert Position.parse(ready.id) is not None
    viewer.leave()
    await viewer.end()
    # A drop before the first event is resumable, too.
    await publish(streaming, name, "a", "b", state="queued")
    again = await view(streaming, name, last=ready.id)
    await again.until_body(b"data: b\n")
    assert texts(again.events) == ["a", "b"]
    again.leave()
    await again.end()


async def test_a_client_goes_on_where_it_was(streaming: Streaming, name: str) -> None:
    await publish(streaming, name, *range(5))
    first = await view(streaming, name)
    await first.until_body(b"data: 4\n")
    first.leave()
    await first.end()
    ids = [event.id for event in first.events if event.event == "message"]
    await publish(streaming, name, "end", ending="failed")
    for n, last in enumerate(ids):
        by_header = await (await view(streaming, name, last=last)).end()
        assert texts(by_header.events) == [*map(str, range(n + 1, 5)), "end"]
        assert by_header.events[0].id == last
        by_query = await (await view(streaming, name, query=f"last_event_id={last}")).end()
        assert texts(by_query.events) == texts(by_header.events)


async def test_who_has_seen_the_end_is_answered_204(streaming: Streaming, name: str) -> None:
    """[W4]"""
    await publish(streaming, name, "a", "end", ending="complete")
    whole = await (await view(streaming, name)).end()
    ending = whole.events[-1].id
    again = await (await view(streaming, name, last=ending)).end()
    assert (again.status, again.body) == (204, b"")
    # Some clients lose the mark of the ending's id; the log tells.
    again = await (await view(streaming, name, last=ending.removesuffix(".e"))).end()
    assert again.status == 204
    # The id suffices: no lookup is made, and nothing has to be left of the channel.
    unknown = await (await view(streaming, new_name(), last="AAAAAA.5.e")).end()
    assert unknown.status == 204


async def test_head_has_the_headers_only(streaming: Streaming, name: str) -> None:
    response = await sse_response(name, streaming=streaming)
    answer = await fetch(response, http_scope(method="HEAD"))
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_cursor_of_a_lost_log_is_reset(streaming: Streaming, name: str) -> None:
    """[C2]"""
    await publish(streaming, name, "a", "b", ending="complete")
    viewer = await (await view(streaming, name, last="AAAAAA.9")).end()
    kinds = [(event.event, event.data) for event in viewer.events]
    assert [kind for kind, _ in kinds] == ["ready", "reset", "message", "complete"]
    assert json.loads(kinds[1][1])["reason"] == "epoch"


async def test_history_that_was_trimmed_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[C2]"""
    monkeypatch.setattr(hub_module, "RING_FRAMES", 3)  # a process that looked on has some of it in memory still
    async with Streaming(channels=ChannelConfig(max_events=5)) as streaming:
        await publish(streaming, name, 0)
        first = await view(streaming, name)
        await first.until_body(b"data: 0\n")
        first.leave()
        last = (await first.end()).events[-1].id
        await publish(streaming, name, *range(1, 21), ending="complete")
        await heard(streaming, name, 21)
        again = await (await view(streaming, name, last=last)).end()
        assert [event.event for event in again.events[:2]] == ["ready", "reset"]
        reset = json.loads(again.events[1].data)
        assert (reset["reason"], reset["missed"]) == ("trimmed", 15)
        assert texts(again.events) == list(map(str, range(16, 21)))
        # Whoever asks for nothing in particular has missed nothing.
        fresh = await (await view(streaming, name)).end()
        assert texts(fresh.events) == list(map(str, range(16, 21)))
        assert "reset" not in [event.event for event in fresh.events]


async def test_an_old_id_of_which_nothing_is_left_is_told_and_done(streaming: Streaming) -> None:
    """[W4]"""
    old = new_channel_id("ann", now=1_600_000_000)
    viewer = await (await view(streaming, old)).end()
    assert [event.event for event in viewer.events] == ["ready", "reset"]
    assert json.loads(viewer.events[1].data)["reason"] == "expired"
    again = await (await view(streaming, old, last=viewer.events[1].id)).end()
    assert again.status == 204
    fresh = await view(streaming, new_channel_id("ann"))
    await fresh.until_body(b"ready")
    fresh.leave()
    await fresh.end()


async def test_several_channels_on_one_stream(streaming: Streaming) -> None:
    """[C2]"""
    one, two = new_name(), new_name()
    await streaming.broker.run_async(Append(one, (b'data: {"n":1}\n', b'data: {"n":2}\n')))
    viewer = await view(streaming, one, two)
    await viewer.until_body(b'"n":2')
    await streaming.broker.run_async(Append(two, (b'data: {"n":3}\n',)))
    await viewer.until_body(b'"n":3')
    viewer.leave()
    await viewer.end()
    events = [event for event in viewer.events if event.event == "message"]
    assert [json.loads(event.data) for event in events] == [
        {"n": 1, "channel": one},
        {"n": 2, "channel": one},
        {"n": 3, "channel": two},
    ]
    assert [event.data.count("channel") for event in viewer.events if event.event == "ready"] == [1, 1]
    await publish(streaming, one, "end", ending="complete")
    again = await view(streaming, one, two, last=events[1].id)
    await again.until_body(b'"n":3')
    await again.until_body(b"data: end")
    assert not again.over
    await publish(streaming, two, "end", ending="failed")
    await again.end()
    seen = [event.data for event in again.events if event.event != "ready"]
    assert sorted(seen) == sorted([json.dumps({"n": 3, "channel": two}, separators=(",", ":")), "end", "end"])
    assert (await (await view(streaming, one, two, last=again.events[-1].id)).end()).status == 204


async def test_a_stream_has_a_bounded_number_of_channels(streaming: Streaming) -> None:
    """[S4]"""
    for names in ([], ["a", "a"], [str(n) for n in range(9)]):
        with pytest.raises(ConfigurationError, match="1 to 8"):
            await sse_response(names, streaming=streaming)
    with pytest.raises(ConfigurationError, match="name"):
        await sse_response("a/b", streaming=streaming)


async def test_heartbeats_and_max_age(streaming: Streaming, name: str) -> None:
    viewer = await view(streaming, name, heartbeat=0.5, max_age=2.0)
    await viewer.end()
    assert viewer.body.count(b": ping\n") >= 1
    assert json.loads(viewer.events[-1].data)["reason"] == "max_age"
    assert 1000 <= (viewer.events[-1].retry or 0) <= 5000


async def test_shutdown_says_goodbye(streaming: Streaming, name: str) -> None:
    """[O1]"""
    viewers = [await view(streaming, name) for _ in range(3)]
    for viewer in viewers:
        await viewer.until_body(b"ready")
    streaming.begin_shutdown()
    for viewer in viewers:
        await viewer.end()
        assert json.loads(viewer.events[-1].data)["reason"] == "shutdown"


class Stalling:
    """A middleware whose `send` takes time, so that no write finishes at once."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def slowly(message: Any) -> None:
            await asyncio.sleep(0)
            await send(message)

        await self.app(scope, receive, slowly)


class Checkpoints(Stalling):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def checked(message: Any) -> None:
            with anyio.fail_after(10):
                await anyio.lowlevel.checkpoint()
                await send(message)

        await self.app(scope, receive, checked)


class TimeLimit(Stalling):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def limited(message: Any) -> None:
            async with asyncio.timeout(10):
                await send(message)

        await self.app(scope, receive, limited)


@pytest.mark.parametrize("middleware", [Stalling, Checkpoints, TimeLimit])
async def test_viewers_behind_middleware_lose_nothing_and_disturb_nobody(
    streaming: Streaming, name: str, middleware: Any
) -> None:
    viewers = []
    for n in range(6):
        response: Any = await sse_response(name, streaming=streaming)
        viewers.append(Exchange(middleware(response) if n % 2 else response, http_scope()))
    for n in range(100):
        await publish(streaming, name, n, ending="complete" if n == 99 else None)
    for viewer in viewers:
        await viewer.end()
        assert texts(viewer.events) == list(map(str, range(100)))


async def test_an_expiring_timeout_around_send_ends_its_own_viewer_only(streaming: Streaming, name: str) -> None:
    """The hub writes for everybody: what cancels one write must not cancel the hub."""

    class Expiring(Stalling):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def limited(message: Any) -> None:
                async with asyncio.timeout(0.2):
                    await send(message)

            await self.app(scope, receive, limited)

    response: Any = Expiring(await sse_response(name, streaming=streaming))
    stalled = Exchange(response, http_scope())
    other = await view(streaming, name)
    for viewer in (stalled, other):
        await viewer.until_body(b"ready")
    stalled.stop_reading()
    await publish(streaming, name, "a")
    with pytest.raises(TimeoutError):
        await stalled.end()
    await publish(streaming, name, "b", "c", ending="complete")
    await other.end()
    assert texts(other.events) == ["a", "b", "c"]


async def test_a_client_that_does_not_read_misses_nothing_and_slows_nobody(streaming: Streaming, name: str) -> None:
    """[C5]"""
    slow, quick = await view(streaming, name), await view(streaming, name)
    for viewer in (slow, quick):
        await viewer.until_body(b"ready")
    slow.stop_reading()
    count = hub_module.RING_FRAMES * 3
    for n in range(count):
        await publish(streaming, name, n)
    await quick.until_body(b"data: %d\n" % (count - 1))
    assert len(slow.bodies) <= 2
    slow.read_again()
    await publish(streaming, name, "end", ending="complete")
    for viewer in (slow, quick):
        await viewer.end()
        assert texts(viewer.events) == [*map(str, range(count)), "end"]


async def test_a_client_that_is_too_slow_is_dropped(
    streaming: Streaming, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C5]"""
    monkeypatch.setattr(viewer_module, "STUCK_AFTER", 0.5)
    viewer = await view(streaming, name, heartbeat=1.0)
    await viewer.until_body(b"ready")
    viewer.stop_reading()
    for n in range(6):
        await publish(streaming, name, "x" * 60_000)
        await heard(streaming, name, n + 1)
    cut = asyncio.Event()
    monkeypatch.setattr(viewer_module, "abort_connection", lambda send: cut.set())
    async with asyncio.timeout(20):
        await cut.wait()
    viewer.read_again()  # as a write to a dropped connection does, the one under way returns
    await viewer.end()
    assert len(texts(viewer.events)) == 1


async def test_or_skips_what_it_missed(name: str) -> None:
    """[C5]"""
    async with Streaming(channels=ChannelConfig(viewer_backlog_bytes=10_000)) as streaming:
        viewer = await view(streaming, name, slow="drop_oldest")
        await viewer.until_body(b"ready")
        viewer.stop_reading()
        for n in range(30):
            await publish(streaming, name, f"{n}-" + "x" * 1000)
            await heard(streaming, name, n + 1)
        viewer.read_again()
        await viewer.until_body(b"event: reset")
        await publish(streaming, name, "end", ending="complete")
        await viewer.end()
        reset = next(json.loads(event.data) for event in viewer.events if event.event == "reset")
        seen = texts(viewer.events)
        assert reset["reason"] == "slow"
        assert reset["missed"] >= 15
        assert reset["missed"] + len(seen) == 31
        assert seen[-1] == "end"


async def test_a_run_whose_worker_was_lost_is_ended_by_who_notices(
    streaming: Streaming, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C7]"""
    monkeypatch.setattr(hub_module, "CHECK_AFTER", 0.02)
    await publish(streaming, name, "a")
    await streaming.broker.run_async(Touch(name, 0.001))
    viewer = await (await view(streaming, name)).end()
    assert viewer.events[-1].event == "failed"
    assert json.loads(viewer.events[-1].data)["code"] == "worker_lost"


async def test_a_silent_channel_is_closed_at_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "CHECK_AFTER", 0.02)
    async with Streaming(channels=ChannelConfig(max_idle_time=0.2)) as streaming:
        viewer = await (await view(streaming, name)).end()
        assert json.loads(viewer.events[-1].data)["reason"] == "idle"


async def test_a_frame_that_was_lost_on_the_way_is_fetched(streaming: Streaming, name: str) -> None:
    """[C2]"""
    viewer = await view(streaming, name)
    await viewer.until_body(b"ready")
    hub = streaming.hub()
    deliver, hub.on_frames = hub.on_frames, _nothing  # type: ignore[method-assign]
    await publish(streaming, name, "a", "b")
    await asyncio.sleep(0.1)
    hub.on_frames = deliver  # type: ignore[method-assign]
    await publish(streaming, name, "c", ending="complete")
    await viewer.end()
    assert texts(viewer.events) == ["a", "b", "c"]


async def _nothing(frames: Any) -> None:
    pass


async def test_a_client_that_has_seen_more_than_this_process_has_heard(streaming: Streaming, name: str) -> None:
    """It was at another process, a little faster than this one."""
    first = await view(streaming, name)
    await publish(streaming, name, "a")
    await first.until_body(b"data: a\n")
    hub = streaming.hub()
    deliver, hub.on_frames = hub.on_frames, _nothing  # type: ignore[method-assign]
    await publish(streaming, name, "b", "c")
    await asyncio.sleep(0.05)
    hub.on_frames = deliver  # type: ignore[method-assign]
    last = (await streaming.broker.run_async(Read(name))).records[-1].id
    ahead = await view(streaming, name, last=last)
    await ahead.until_body(b"ready")
    await publish(streaming, name, "d", ending="complete")
    for viewer in (first, ahead):
        await viewer.end()
    assert texts(ahead.events) == ["d"]
    assert texts(first.events) == ["a", "b", "c", "d"]


async def test_what_strangers_publish_is_left_out(redis_url: str, name: str) -> None:
    import redis as driver

    client: Any = driver.Redis.from_url(redis_url)
    async with Streaming(redis=redis_url) as streaming:
        viewer = await view(streaming, name)
        await viewer.until_body(b"ready")
        for stranger in (b"", b"hello", b"id: x\n\n", b"data: x\nid: AAAAAA.!\n\n"):
            client.publish(f"stream:{{{name}}}", stranger)
        await publish(streaming, name, "a", ending="complete")
        await viewer.end()
        assert texts(viewer.events) == ["a"]
    client.close()


async def test_one_subscription_and_one_read_for_a_thousand_viewers(redis_url: str, name: str) -> None:
    """[C4]"""
    import redis as driver

    client = driver.Redis.from_url(redis_url)
    async with Streaming(redis=redis_url) as streaming:
        await publish(streaming, name, "a")
        before: Any = client.info("commandstats")
        connections = len(client.client_list())
        viewers = [await view(streaming, name) for _ in range(1000)]
        for viewer in viewers:
            await viewer.until_body(b"data: a\n")
        after: Any = client.info("commandstats")
        scripts = after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"]
        assert scripts <= 2
        assert len(client.client_list()) - connections == 1  # the subscription; commands had theirs before
        await publish(streaming, name, "b", ending="complete")
        for viewer in viewers:
            await viewer.end()
            assert texts(viewer.events) == ["a", "b"]
    client.close()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(
        st.one_of(
            st.tuples(st.just("publish"), st.integers(1, 40)),
            st.tuples(st.just("come"), st.integers(0, 3)),
            st.tuples(st.just("leave"), st.integers(0, 3)),
            st.tuples(st.just("pause"), st.integers(0, 3)),
            st.tuples(st.just("resume"), st.integers(0, 3)),
            st.tuples(st.just("tick"), st.integers(0, 3)),
        ),
        max_size=40,
    )
)
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_any_order_of_coming_leaving_and_publishing(schedule: list[tuple[str, int]], kind: str, redis_url: str) -> None:
    """Everything, in order, once, whenever a viewer comes, leaves, comes back or reads slowly [C1]."""

    async def run() -> None:
        name = new_name()
        async with Streaming(redis=redis_url if kind == "redis" else None) as streaming:
            seen: list[list[str]] = [[] for _ in range(4)]
            last: list[str | None] = [None] * 4
            open_now: dict[int, Exchange] = {}
            count = 0

            def note(n: int, exchange: Exchange) -> None:
                seen[n] += texts(exchange.events)
                with_id = [event.id for event in exchange.events if event.id]
                last[n] = with_id[-1] if with_id else last[n]

            for verb, n in schedule:
                if verb == "publish":
                    await publish(streaming, name, *range(count, count + n))
                    count += n
                elif verb == "come" and n not in open_now:
                    open_now[n] = await view(streaming, name, last=last[n])
                elif verb == "leave" and n in open_now:
                    exchange = open_now.pop(n)
                    exchange.read_again()
                    exchange.leave()
                    await exchange.end()
                    note(n, exchange)
                elif verb == "pause" and n in open_now:
                    open_now[n].stop_reading()
                elif verb == "resume" and n in open_now:
                    open_now[n].read_again()
                else:
                    await asyncio.sleep(0.001 * n)
            await publish(streaming, name, "end", ending="complete")
            for n in range(4):
                exchange = open_now.get(n) or await view(streaming, name, last=last[n])
                exchange.read_again()
                await exchange.end()
                note(n, exchange)
                assert seen[n] == [*map(str, range(count)), "end"]

    asyncio.run(run())


class TestRestart:
    """Redis dies and comes back; viewers stay connected [C2]."""

    async def test_back_empty(self, name: str) -> None:
        server = start_redis()
        try:
            async with Streaming(redis=server.url) as streaming:
                viewers = [await view(streaming, name) for _ in range(3)]
                await publish(streaming, name, "before")
                for viewer in viewers:
                    await viewer.until_body(b"before")
                server.kill()
                await asyncio.to_thread(server.start)
                for n in range(20):
                    await publish(streaming, name, n, ending="complete" if n == 19 else None)
                for viewer in viewers:
                    await viewer.end()
                    assert texts(viewer.events) == ["before", *map(str, range(20))]
                    assert [event.event for event in viewer.events].count("reset") == 1
                    reset = next(json.loads(event.data) for event in viewer.events if event.event == "reset")
                    assert reset["reason"] == "epoch"
        finally:
            server.stop()

    async def test_back_with_its_data(self, name: str, tmp_path: Any) -> None:
        server = start_redis(folder=tmp_path)
        try:
            async with Streaming(redis=server.url) as streaming:
                viewers = [await view(streaming, name) for _ in range(3)]
                await publish(streaming, name, "before")
                for viewer in viewers:
                    await viewer.until_body(b"before")
                server.kill()
                await asyncio.to_thread(server.start)
                for n in range(20):
                    await publish(streaming, name, n, ending="complete" if n == 19 else None)
                for viewer in viewers:
                    await viewer.end()
                    assert texts(viewer.events) == ["before", *map(str, range(20))]
                    assert "reset" not in [event.event for event in viewer.events]
        finally:
            server.stop()

    async def test_a_redis_that_is_frozen_and_goes_on(self, name: str) -> None:
        server = start_redis()
        try:
            async with Streaming(redis=server.url) as streaming:
                viewer = await view(streaming, name)
                await viewer.until_body(b"ready")
                os.kill(server.pid, signal.SIGSTOP)
                writing = asyncio.create_task(publish(streaming, name, "a"))
                await asyncio.sleep(0.2)
                os.kill(server.pid, signal.SIGCONT)
                await writing
                await publish(streaming, name, "b", ending="complete")
                await viewer.end()
                assert texts(viewer.events) == ["a", "b"]
        finally:
            server.stop()

    async def test_no_redis_when_a_viewer_comes(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The stream opens, waits with heartbeats, then says that it is unavailable [C6]."""
        monkeypatch.setattr(viewer_module, "AVAILABLE_WITHIN", 0.5)
        async with Streaming(redis="redis://127.0.0.1:1") as streaming:
            viewer = await (await view(streaming, name, start_within=0.1)).end()
            assert viewer.status == 200
            assert viewer.bodies[0] == b": ping\n"
            assert json.loads(viewer.events[-1].data)["reason"] == "unavailable"

    async def test_redis_that_comes_up_after_the_viewer(self, name: str) -> None:
        server = start_redis()
        server.stop()
        try:
            async with Streaming(redis=server.url) as streaming:
                viewer = await view(streaming, name, start_within=0.05)
                await viewer.until_body(b": ping\n")
                await asyncio.to_thread(server.start)
                await viewer.until_body(b"ready")
                await publish(streaming, name, "a", ending="complete")
                await viewer.end()
                assert texts(viewer.events) == ["a"]
        finally:
            server.stop()

    async def test_a_thousand_channels_are_back_soon(self) -> None:
        server = start_redis()
        names = [new_name() for _ in range(1000)]
        try:
            async with Streaming(redis=server.url) as streaming:
                viewers = [await view(streaming, name) for name in names]
                for viewer in viewers:
                    await viewer.until_body(b"ready")
                server.kill()
                await asyncio.to_thread(server.start)
                for name in names:
                    await publish(streaming, name, "a", ending="complete")
                for viewer in viewers:
                    await viewer.end()
                    assert texts(viewer.events) == ["a"]
        finally:
            server.stop()


async def test_reading_the_page_of_a_channel_is_shared(streaming: Streaming, name: str) -> None:
    await publish(streaming, name, *range(5))
    hub = streaming.hub()
    pages = await asyncio.gather(*(hub.read(name, None) for _ in range(10)))
    assert all(page is pages[0] for page in pages)
    assert (await streaming.broker.run_async(Read(name))).records == pages[0].records
