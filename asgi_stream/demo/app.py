"""The demo's web application: what the back end of a chat and of deployments looks like with asgi_stream."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from asgi_stream import (
    EventStreamResponse,
    StreamApp,
    StreamContext,
    Streaming,
    StreamLeaseConfig,
    StreamLeaseMiddleware,
    stream_lease,
)
from asgi_stream.demo.upstream import MODEL, SPEED_HEADER
from asgi_stream.demo.worker import queue_config
from asgi_stream.errors import BackendError
from asgi_stream.job_queue import QueueManager
from asgi_stream.sse import adecode

USER_COOKIE = "asgi_stream_demo_user"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What a web process of the demo is told. ``upstream_url`` is the base of an OpenAI-compatible API."""

    upstream_url: str
    local_upstream: bool
    limit: int = 5
    speed: float = 25.0
    redis_url: str | None = None
    may_restart_redis: bool = False
    folder: str = ""
    other_url: str = ""
    name: str = "first"


class ChatRequest(BaseModel):
    """What the chat panel sends."""

    prompt: str = Field(max_length=2000)
    speed: float = Field(25.0, ge=0.1, le=1000)


class JobRequest(BaseModel):
    """What the deploy panel's buttons send."""

    job: str = Field(max_length=64)


def current_user(request: Request) -> str:
    """A cookie stands for a login here: another browser is another user."""
    return request.cookies.get(USER_COOKIE) or "nobody"


User = Annotated[str, Depends(current_user)]


def create_app(settings: DemoSettings) -> FastAPI:
    """Return the application of one web process."""
    streaming = Streaming(settings.redis_url, leases=StreamLeaseConfig(limit=settings.limit))
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    client = httpx.AsyncClient(timeout=httpx.Timeout(10, read=120))

    queue = None if settings.redis_url is None else QueueManager(queue_config(settings.redis_url), streaming=streaming)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with streaming, client:
            yield
        if queue is not None:
            await queue.aclose()

    app = FastAPI(title="asgi_stream demo", lifespan=lifespan)
    app.add_middleware(StreamLeaseMiddleware, streaming=streaming, identify=_identify)

    @app.get("/", response_class=HTMLResponse)
    async def index(request: Request) -> HTMLResponse:
        told = {
            "web": settings.name,
            "pid": os.getpid(),
            "other": settings.other_url,
            "queue": settings.redis_url is not None,
            "mayRestartRedis": settings.may_restart_redis,
        }
        text = page.replace("%SPEED%", f"{settings.speed:g}").replace("%SETTINGS%", json.dumps(told))
        response = HTMLResponse(text)
        if USER_COOKIE not in request.cookies:
            response.set_cookie(USER_COOKIE, secrets.token_urlsafe(12), httponly=True, samesite="strict")
        return response

    _add_chat(app, settings, streaming, client)
    if queue is not None:
        _add_deployments(app, settings, streaming, queue)
    return app


def _add_chat(app: FastAPI, settings: DemoSettings, streaming: Streaming, client: httpx.AsyncClient) -> None:
    @app.post("/chat")
    async def chat(request: ChatRequest, user: User) -> Response:
        async with stream_lease(user, limiter=streaming.leases):
            return EventStreamResponse(complete(request), heartbeat=2.0)

    async def complete(request: ChatRequest) -> AsyncIterator[dict[str, str]]:
        body = {
            "model": os.environ.get("OPENAI_MODEL", MODEL if settings.local_upstream else "gpt-4o-mini"),
            "messages": [{"role": "user", "content": request.prompt}],
            "stream": True,
        }
        headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        if settings.local_upstream:
            headers[SPEED_HEADER] = str(request.speed)
        # Leaving this block closes the request to the model; it is left as soon as the page's client is gone.
        url = f"{settings.upstream_url}/chat/completions"
        async with client.stream("POST", url, json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for event in adecode(answer.aiter_raw()):
                if event.data == "[DONE]":
                    return
                for choice in json.loads(event.data)["choices"]:
                    text = choice["delta"].get("content")
                    if text:
                        yield {"token": text}

    @app.get("/hold")
    async def hold(user: User) -> Response:
        """A stream that has nothing to say, to see leases and heartbeats."""

        async def nothing() -> AsyncIterator[str]:
            await asyncio.Event().wait()
            yield ""

        async with stream_lease(user, limiter=streaming.leases):
            return EventStreamResponse(nothing(), start_within=0, heartbeat=2.0, first_event_timeout=600.0)

    @app.get("/stats")
    async def stats(user: User) -> dict[str, Any]:
        upstream = None
        if settings.local_upstream:
            upstream = (await client.get(f"{settings.upstream_url.removesuffix('/v1')}/stats")).json()["open"]
        return {"open": streaming.leases.in_use(user), "limit": settings.limit, "upstream_open": upstream}


def _add_deployments(app: FastAPI, settings: DemoSettings, streaming: Streaming, queue: QueueManager) -> None:
    app.mount("/events", StreamApp(streaming, identify=_identify))

    @app.post("/deploy")
    async def deploy(user: User) -> dict[str, str]:
        ctx = StreamContext.create(user, project="asgi_stream demo", env="this machine", streaming=streaming)
        entity = {"ctx": ctx.to_dict(), "folder": settings.folder}
        try:
            job = await queue.enqueue_async(entity, processor="demo.deploy")
        except BackendError as exc:
            raise HTTPException(503, "Redis is away; try again in a moment") from exc
        return {"channel": ctx.channel_id, "job": job.id}

    @app.post("/worker/kill")
    async def kill_worker(request: JobRequest) -> dict[str, Any]:
        """Kill the process that has the job, as the kernel would."""
        status = await queue.job(request.job).status_async()
        host, _, pid = (status.worker or "").rpartition(":")
        if status.state != "running" or host != platform.node():
            raise HTTPException(409, f"no worker has this job now: it is {status.state}")
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            raise HTTPException(409, "its worker is dead already") from None
        return {"killed": int(pid)}

    @app.get("/queue")
    async def queue_stats() -> dict[str, Any]:
        stats = await queue.stats_async()
        return {"depth": stats.depth, "running": stats.running, "workers": sorted(stats.workers)}

    if settings.may_restart_redis:

        @app.post("/redis/restart")
        async def restart_redis() -> dict[str, Any]:
            """End Redis; whoever started the demo starts it again."""
            pid = await asyncio.to_thread(_redis_pid, settings.redis_url)
            os.kill(pid, signal.SIGTERM)
            return {"restarted": pid}


def _redis_pid(url: str | None) -> int:
    import redis

    made: Any = redis.Redis.from_url(url or "")
    try:
        return int(made.info("server")["process_id"])
    finally:
        made.close()


def _identify(scope: Any) -> str | None:
    return Request(scope).cookies.get(USER_COOKIE) if scope["type"] == "http" else None
