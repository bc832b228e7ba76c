"""The emitters of the earlier system, as its users call them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import asgi_stream
from asgi_stream import SyncStreamChannel, shutdown_streaming
from asgi_stream.channels.model import is_owner
from asgi_stream.compat import DeploymentEmitter, SSEEmitter, stream_lease
from asgi_stream.errors import RunEndedError


def told(channel_id: str) -> list[tuple[str, dict[str, object]]]:
    records = SyncStreamChannel(channel_id).history()
    return [(record.event, {k: v for k, v in record.data.items() if k != "ts"}) for record in records]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    yield
    asyncio.run(shutdown_streaming())


@pytest.mark.anyio
async def test_an_emitter_makes_a_channel_or_takes_one() -> None:
    emitter = SSEEmitter(workspace_id="ann")
    assert is_owner(emitter.channel_id, "ann")
    await emitter.emit_async("tick", {"n": 1})
    await SSEEmitter(emitter.channel_id).emit_async("tick", {"n": 2})
    await emitter.close_async()
    await emitter.close_async()
    assert await asyncio.to_thread(told, emitter.channel_id) == [
        ("tick", {"n": 1}),
        ("tick", {"n": 2}),
        ("complete", {"success": True}),
    ]


@pytest.mark.anyio
async def test_an_ending_may_be_emitted() -> None:
    emitter = SSEEmitter(workspace_id="ann")
    emitter.emit("complete", {"success": True, "url": "/x"})
    with pytest.raises(RunEndedError):
        emitter.emit("late", {})
    emitter.close()
    other = SSEEmitter(workspace_id="ann")
    await other.emit_async("failed", {"code": "x", "message": "y"})
    assert told(other.channel_id)[-1] == ("failed", {"code": "x", "message": "y"})


def test_a_deployment() -> None:
    emitter = DeploymentEmitter("ann", "web", "prod", "api")
    emitter.log("building")
    emitter.log("slow disk", level="warning")
    emitter.progress(50, "pushing")
    emitter.success(url="https://example.org")
    assert emitter.context.project == "web"
    assert told(emitter.channel_id) == [
        ("log", {"message": "building", "level": "info"}),
        ("log", {"message": "slow disk", "level": "warning"}),
        ("progress", {"percent": 50, "step": "pushing"}),
        ("complete", {"success": True, "url": "https://example.org"}),
    ]


@pytest.mark.anyio
async def test_a_deployment_from_async_code_that_fails() -> None:
    emitter = DeploymentEmitter("ann")
    await emitter.log_async("building")
    await emitter.progress_async(10)
    await emitter.failure_async("the image could not be pushed")
    last = told(emitter.channel_id)[-1]
    assert last[0] == "failed"
    assert last[1]["code"] == "deployment_failed"
    assert last[1]["message"] == "the image could not be pushed"
    other = DeploymentEmitter("ann")
    other.failure("no")
    await DeploymentEmitter("ann").success_async()


def test_the_lease_is_the_same() -> None:
    assert stream_lease is asgi_stream.stream_lease
