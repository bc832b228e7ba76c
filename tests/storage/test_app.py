"""The record over HTTP: ``GET /{channel}/history?source=archive``, for those who may read the channel [S1]."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_stream import StreamApp, StreamContext, Streaming
from asgi_stream.config import StorageConfig
from asgi_stream.storage import OpenSearchEventStorage
from tests.storage.test_contract import refresh

pytestmark = pytest.mark.anyio

SECRET = "a secret for tests only"


@pytest.fixture
async def streaming(storage: OpenSearchEventStorage) -> AsyncIterator[Streaming]:
    async with Streaming(storage=storage.config, secret=SECRET, identify=user_of) as made:
        yield made


def user_of(scope: Any) -> str | None:
    return next((value.decode() for name, value in scope["headers"] if name == b"x-user"), None)


def client(streaming: Streaming, user: str | None) -> httpx.AsyncClient:
    app = Starlette(routes=[Mount("/events", StreamApp(streaming))])
    headers = {} if user is None else {"x-user": user}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/events", headers=headers)


async def recorded(streaming: Streaming, storage: OpenSearchEventStorage, owner: str, *lines: str) -> StreamContext:
    ctx = StreamContext.create(owner, streaming=streaming)
    for line in lines:
        await ctx.log_async(line)
    assert await streaming.storage.flush_async(30)
    refresh(storage)
    return ctx


async def test_search_scroll_and_follow(streaming: Streaming, storage: OpenSearchEventStorage) -> None:
    ctx = await recorded(streaming, storage, "ann", "pull", "build failed", "build", "push")
    async with client(streaming, "ann") as ann:
        path = f"/{ctx.channel_id}/history"
        page = (await ann.get(path, params={"source": "archive", "limit": 3})).json()
        assert [event["data"]["message"] for event in page["events"]] == ["pull", "build failed", "build"]
        rest = (await ann.get(path, params={"source": "archive", "limit": 3, "after": page["after"]})).json()
        assert [event["data"]["message"] for event in rest["events"]] == ["push"]
        assert (rest["after"], rest["cursor"]) == (None, page["cursor"])
        found = (await ann.get(path, params={"source": "archive", "q": "BUILD", "kind": "log"})).json()
        assert [event["data"]["message"] for event in found["events"]] == ["build failed", "build"]
        await ctx.complete_async()
        live = await ann.get(f"/{ctx.channel_id}", params={"last_event_id": found["cursor"]})
        names = [line for line in live.text.splitlines() if line.startswith("event: ")]
        assert names == ["event: ready", "event: complete"]


async def test_only_the_owner_and_tickets(streaming: Streaming, storage: OpenSearchEventStorage) -> None:
    mine = await recorded(streaming, storage, "ann", "mine")
    theirs = await recorded(streaming, storage, "bob", "theirs")
    path = f"/{theirs.channel_id}/history"
    for user in ("ann", None):
        async with client(streaming, user) as other:
            for params in (
                {},
                {"q": "theirs"},
                {"workspace": "bob"},
                {"channel": theirs.channel_id, "kind": "log"},
                {"ticket": streaming.ticket(mine.channel_id)},
            ):
                answer = await other.get(path, params={"source": "archive", **params})
                assert answer.status_code == 403
                assert "theirs" not in answer.text
    async with client(streaming, "ann") as ann:
        # Parameters that name something else change nothing.
        more = {"source": "archive", "workspace": "bob", "channel": theirs.channel_id}
        page = (await ann.get(f"/{mine.channel_id}/history", params=more)).json()
        assert [event["data"]["message"] for event in page["events"]] == ["mine"]
        ticket = streaming.ticket(theirs.channel_id)
        answer = await ann.get(path, params={"source": "archive", "ticket": ticket})
        assert [event["data"]["message"] for event in answer.json()["events"]] == ["theirs"]


@pytest.mark.parametrize(
    "params",
    [
        {"source": "elsewhere"},
        {"source": "archive", "limit": "x"},
        {"source": "archive", "limit": "5000"},
        {"source": "archive", "after": "x"},
        {"source": "archive", "since": "yesterday"},
        {"source": "archive", "level": "loud"},
    ],
)
async def test_bad_requests(streaming: Streaming, params: dict[str, str]) -> None:
    ctx = StreamContext.create("ann", streaming=streaming)
    async with client(streaming, "ann") as ann:
        answer = await ann.get(f"/{ctx.channel_id}/history", params=params)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"


async def test_no_archive_and_one_that_is_away() -> None:
    for streaming, status in (
        (Streaming(identify=user_of), 404),
        (Streaming(identify=user_of, storage=StorageConfig(port=1)), 503),
    ):
        ctx = StreamContext.create("ann", streaming=streaming)
        async with client(streaming, "ann") as ann:
            answer = await ann.get(f"/{ctx.channel_id}/history", params={"source": "archive"})
        assert answer.status_code == status
        await streaming.aclose()
