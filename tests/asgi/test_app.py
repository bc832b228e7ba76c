"""`StreamApp`: who may read what, and what is answered [S1] [S2] [S3]."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_stream import (
    AsyncStreamChannel,
    StreamApp,
    StreamContext,
    Streaming,
    init_streaming,
    shutdown_streaming,
    sse_response,
    stream_app,
)
from asgi_stream.asgi import tickets
from asgi_stream.errors import ConfigurationError
from tests.asgi_client import Exchange, fetch, http_scope

pytestmark = pytest.mark.anyio

SECRET = "a secret of sixteen bytes or more"


class User:
    """What AuthenticationMiddleware puts into the scope."""

    is_authenticated = True

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.display_name = identity


@pytest.fixture(params=["memory", "redis"])
async def streaming(request: pytest.FixtureRequest) -> AsyncIterator[Streaming]:
    url = None if request.param == "memory" else request.getfixturevalue("redis_url")
    async with Streaming(redis=url, secret=SECRET) as made:
        yield made


@pytest.fixture
def app(streaming: Streaming) -> Any:
    return Starlette(routes=[Mount("/events", StreamApp(streaming))])


@pytest.fixture
async def ctx(streaming: Streaming) -> StreamContext:
    context = StreamContext.create("ann", streaming=streaming)
    await context.log_async("one")
    return context


def ask(path: str, user: str | None = None, *, method: str = "GET", headers: Any = None, query: str = "") -> Any:
    more = {} if user is None else {"user": User(user)}
    return http_scope(f"/events{path}", method=method, headers=headers or {}, query_string=query.encode(), **more)


async def test_the_owner_reads_and_nobody_else(app: Any, ctx: StreamContext) -> None:
    await ctx.complete_async()
    seen = await fetch(app, ask(f"/{ctx.channel_id}", "ann"))
    assert seen.status == 200
    assert [event.event for event in seen.events] == ["ready", "log", "complete"]
    refusals = []
    for path, user in (
        (f"/{ctx.channel_id}", "bob"),
        (f"/{ctx.channel_id}", None),
        (f"/{StreamContext.create('ann').channel_id}", "bob"),  # unknown
        ("/some-name", "ann"),
        (f"/{ctx.channel_id[:-1]}{'x' if ctx.channel_id[-1] != 'x' else 'y'}", "ann"),  # forged
        ("/" + "x" * 500, "ann"),
        ("/a%2Fb", "ann"),
    ):
        for more, method in (("", "GET"), ("", "HEAD"), ("/history", "GET"), ("/poll", "GET"), ("", "DELETE")):
            answer = await fetch(app, ask(path + more, user, method=method))
            assert answer.status == 403, (path, user, more, method)
            refusals.append((answer.headers["content-type"], answer.headers["cache-control"]))
            if method == "GET":
                assert b"authorize=" in answer.body
                assert ctx.channel_id.encode() not in answer.body
    assert set(refusals) == {("application/problem+json", "no-store")}


async def test_a_shown_name_or_an_address_owns_nothing(app: Any) -> None:
    class Shown:
        is_authenticated = True
        display_name = "ann"

    ctx = StreamContext.create("ann")
    for user in (Shown(), None):
        scope = http_scope(f"/events/{ctx.channel_id}", user=user)
        assert (await fetch(app, scope)).status == 403
    by_address = StreamContext.create("192.0.2.7")
    assert (await fetch(app, http_scope(f"/events/{by_address.channel_id}"))).status == 403


async def test_the_owner_who_comes_first_waits(app: Any, streaming: Streaming) -> None:
    ctx = StreamContext.create("ann", streaming=streaming)
    viewer = Exchange(app, ask(f"/{ctx.channel_id}", "ann"))
    await viewer.until_body(b'"state":"waiting"')
    await ctx.log_async("begun")
    await ctx.complete_async()
    await viewer.end()
    assert [event.event for event in viewer.events] == ["ready", "log", "complete"]


async def test_workspaces_and_identify(streaming: Streaming, ctx: StreamContext) -> None:
    await ctx.complete_async()
    path = f"/{ctx.channel_id}"
    for app, allowed in (
        (StreamApp(streaming, workspaces=lambda scope: ["other", "ann"]), True),
        (StreamApp(streaming, workspaces=lambda scope: "ann"), True),
        (StreamApp(streaming, workspaces=lambda scope: None), False),
        (StreamApp(streaming, workspaces=lambda scope: ["other"]), False),
        (StreamApp(streaming, identify=lambda scope: "ann"), True),
        (StreamApp(streaming, identify=lambda scope: None), False),
    ):
        assert (await fetch(app, http_scope(path))).status == (200 if allowed else 403)


async def test_authorize_decides_alone(streaming: Streaming) -> None:
    asked: list[tuple[str, str]] = []

    async def authorize(request: Any, channel: str, verb: str) -> bool:
        asked.append((channel, verb))
        return channel == "news" and verb == "read"

    app = StreamApp(streaming, authorize=authorize)
    await AsyncStreamChannel("news", streaming=streaming).close()
    assert (await fetch(app, http_scope("/news"))).status == 200
    assert (await fetch(app, http_scope("/news", method="DELETE"))).status == 403
    assert (await fetch(app, http_scope("/other"))).status == 403
    assert asked == [("news", "read"), ("news", "cancel"), ("other", "read")]
    sync = StreamApp(streaming, authorize=lambda request, channel, verb: 1)  # type: ignore[arg-type, return-value]
    assert (await fetch(sync, http_scope("/news"))).status == 403  # only True is a yes


async def test_a_ticket_opens_its_channel_for_its_verbs(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    await ctx.complete_async()
    ticket = streaming.ticket(ctx.channel_id)
    path = f"/{ctx.channel_id}"
    assert (await fetch(app, ask(path, query=f"ticket={ticket}"))).status == 200
    assert (await fetch(app, ask(path, headers={"Authorization": f"Bearer {ticket}"}))).status == 200
    assert (await fetch(app, ask(f"{path}/history", query=f"ticket={ticket}"))).status == 200
    other = StreamContext.create("ann", streaming=streaming)
    for wrong in (
        ask(path, query=f"ticket={ticket[:-2]}"),
        ask(path, query=f"ticket=x{ticket}"),
        ask(path, query="ticket="),
        ask(path, query="ticket=ä.b"),
        ask(path, method="DELETE", query=f"ticket={ticket}"),  # another verb
        ask(f"/{other.channel_id}", query=f"ticket={ticket}"),  # another channel
        ask(path, query=f"ticket={tickets.issue([b'x' * 16], ctx.channel_id)}"),  # another secret
    ):
        assert (await fetch(app, wrong)).status == 403
    cancelling = streaming.ticket(ctx.channel_id, verbs=["cancel"])
    assert (await fetch(app, ask(path, method="DELETE", query=f"ticket={cancelling}"))).status == 202


async def test_a_stream_ends_with_its_ticket(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    ticket = streaming.ticket(ctx.channel_id, seconds=1.0)
    viewer = await fetch(app, ask(f"/{ctx.channel_id}", query=f"ticket={ticket}"))
    assert json.loads(viewer.events[-1].data)["reason"] == "expired"
    assert (await fetch(app, ask(f"/{ctx.channel_id}", query=f"ticket={ticket}"))).status == 403


async def test_revoking_ends_streams_and_tickets(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    ticket = streaming.ticket(ctx.channel_id)
    viewer = Exchange(app, ask(f"/{ctx.channel_id}", query=f"ticket={ticket}"))
    await viewer.until_body(b"event: log")
    await asyncio.sleep(0.002)  # a ticket's time is in milliseconds
    await streaming.revoke_tickets(ctx.channel_id)
    await viewer.end()
    assert json.loads(viewer.events[-1].data)["reason"] == "revoked"
    assert (await fetch(app, ask(f"/{ctx.channel_id}", query=f"ticket={ticket}"))).status == 403
    await asyncio.sleep(0.002)
    await ctx.complete_async()
    again = streaming.ticket(ctx.channel_id)
    assert (await fetch(app, ask(f"/{ctx.channel_id}", query=f"ticket={again}"))).status == 200


async def test_closing_the_streams_of_a_user_in_all_processes(redis_url: str) -> None:
    async with Streaming(redis=redis_url) as one, Streaming(redis=redis_url) as two:
        anns, bobs = StreamContext.create("ann", streaming=one), StreamContext.create("bob", streaming=one)
        viewers = [
            Exchange(StreamApp(streaming), http_scope(f"/{ctx.channel_id}", user=User(ctx.workspace_id)))
            for streaming in (one, two)
            for ctx in (anns, bobs)
        ]
        for viewer in viewers:
            await viewer.until_body(b"ready")
        await one.close(user="ann")
        for viewer in viewers[::2]:
            await viewer.end()
            assert json.loads(viewer.events[-1].data)["reason"] == "revoked"
        await one.close(channel=bobs.channel_id)
        for viewer in viewers[1::2]:
            await viewer.end()
            assert json.loads(viewer.events[-1].data)["reason"] == "revoked"
        with pytest.raises(ConfigurationError, match="either"):
            await one.close()


async def test_history_as_json(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    for n in range(5):
        await ctx.data_async("n", n)
    path = f"/{ctx.channel_id}/history"
    page = json.loads((await fetch(app, ask(path, "ann", query="limit=2"))).body)
    assert [event["event"] for event in page["events"]] == ["log", "data"]
    assert (page["state"], page["more"], page["channel"]) == ("running", True, ctx.channel_id)
    rest = json.loads((await fetch(app, ask(path, "ann", query=f"after={page['cursor']}"))).body)
    assert [event["data"]["value"] for event in rest["events"]] == [1, 2, 3, 4]
    assert rest["more"] is False
    # From the page to the live stream without a hole: the cursor is the stream's id.
    await ctx.complete_async()
    live = await fetch(app, ask(f"/{ctx.channel_id}", "ann", query=f"last_event_id={rest['cursor']}"))
    assert [event.event for event in live.events] == ["ready", "complete"]
    for wrong in ("limit=0", "limit=x", "limit=5000"):
        assert (await fetch(app, ask(path, "ann", query=wrong))).status == 400


async def test_long_polling(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    path = f"/{ctx.channel_id}/poll"
    first = json.loads((await fetch(app, ask(path, "ann"))).body)
    assert len(first["events"]) == 1
    waiting = Exchange(app, ask(path, "ann", query=f"after={first['cursor']}"))
    await asyncio.sleep(0.05)
    assert not waiting.started
    await ctx.log_async("two")
    await waiting.end()
    assert [event["data"]["message"] for event in json.loads(waiting.body)["events"]] == ["two"]
    begun = time.monotonic()
    nothing = await fetch(app, ask(path, "ann", query=f"after={json.loads(waiting.body)['cursor']}&wait=0.2"))
    assert time.monotonic() - begun >= 0.2
    assert json.loads(nothing.body)["events"] == []
    assert (await fetch(app, ask(path, "ann", query="wait=1000"))).status == 400


async def test_several_channels(app: Any, streaming: Streaming) -> None:
    one, two = (StreamContext.create("ann", streaming=streaming) for _ in range(2))
    bobs = StreamContext.create("bob", streaming=streaming)
    for ctx in (one, two, bobs):
        await ctx.complete_async()
    query = f"channel={one.channel_id}&channel={two.channel_id}"
    seen = await fetch(app, ask("/", "ann", query=query))
    assert [json.loads(event.data)["channel"] for event in seen.events if event.event == "complete"] == [
        one.channel_id,
        two.channel_id,
    ]
    assert (await fetch(app, ask("/", "ann", query=f"{query}&channel={bobs.channel_id}"))).status == 403
    assert (await fetch(app, ask("/", "ann"))).status == 400
    assert (await fetch(app, ask("/", "ann", query="&".join(f"channel=c{n}" for n in range(9))))).status == 400


async def test_a_cursor_selects_no_channel(app: Any, streaming: Streaming) -> None:
    """[S2]"""
    mine, bobs = StreamContext.create("ann", streaming=streaming), StreamContext.create("bob", streaming=streaming)
    await bobs.log_async("bob's secret")
    (record,) = await asyncio.to_thread(bobs.channel().history)
    await mine.complete_async()
    seen = await fetch(app, ask(f"/{mine.channel_id}", "ann", headers={"Last-Event-ID": record.id}))
    assert [event.event for event in seen.events] == ["ready", "reset", "complete"]
    assert b"secret" not in seen.body


async def test_cancelling(app: Any, streaming: Streaming, ctx: StreamContext) -> None:
    answer = await fetch(app, ask(f"/{ctx.channel_id}", "ann", method="DELETE"))
    assert (answer.status, json.loads(answer.body)["state"]) == (202, "running")
    await ctx.log_async("learns it")
    assert ctx.cancelled


async def test_cors(streaming: Streaming, ctx: StreamContext) -> None:
    await ctx.complete_async()
    app = StreamApp(streaming, identify=lambda scope: "ann", cors=["https://app.example"])
    path = f"/{ctx.channel_id}"
    allowed = await fetch(app, http_scope(path, headers={"Origin": "https://app.example"}))
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert allowed.headers["access-control-allow-credentials"] == "true"
    foreign = await fetch(app, http_scope(path, headers={"Origin": "https://evil.example"}))
    assert "access-control-allow-origin" not in foreign.headers
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "last-event-id",
    }
    assert (await fetch(app, http_scope(path, method="OPTIONS", headers=preflight))).status == 200
    with pytest.raises(ConfigurationError, match="list"):
        StreamApp(cors="https://app.example")


async def test_the_process_default_and_its_location(monkeypatch: pytest.MonkeyPatch) -> None:
    await shutdown_streaming()
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("ASGI_STREAM_SECRET", f"{SECRET},the secret before this one")
    streaming = init_streaming(events_url="/events/")
    ctx = StreamContext.create("ann")
    await ctx.complete_async()
    posted = await fetch(await sse_response(ctx.channel_id), http_scope(method="POST"))
    assert posted.headers["location"] == f"/events/{ctx.channel_id}"
    app = Starlette(routes=[Mount("/events", stream_app)])
    old = tickets.issue([b"the secret before this one"], ctx.channel_id)
    for ticket in (streaming.ticket(ctx.channel_id), old):
        assert (await fetch(app, ask(f"/{ctx.channel_id}", query=f"ticket={ticket}"))).status == 200
    await shutdown_streaming()


async def test_tickets_need_a_secret_worth_the_name() -> None:
    with pytest.raises(ConfigurationError, match="ASGI_STREAM_SECRET"):
        Streaming().ticket("x")
    with pytest.raises(ConfigurationError, match="16 bytes"):
        Streaming(secret="short")
    streaming = Streaming(secret=SECRET)
    mistakes: list[dict[str, Any]] = [{"verbs": []}, {"verbs": ["write"]}, {"seconds": 0}, {"seconds": 10**6}]
    for wrong in mistakes:
        with pytest.raises(ConfigurationError):
            streaming.ticket("x", **wrong)


@given(st.text(max_size=300))
def test_no_text_is_a_ticket(text: str) -> None:
    assert tickets.check([SECRET.encode()], text) is None
