"""The demo's web application: what a chat back end looks like with asgi_stream."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from asgi_stream import EventStreamResponse, Streaming, StreamLeaseConfig, StreamLeaseMiddleware, stream_lease
from asgi_stream.demo.upstream import MODEL, SPEED_HEADER
from asgi_stream.sse import adecode

USER_COOKIE = "asgi_stream_demo_user"


class ChatRequest(BaseModel):
    """What the page sends."""

    prompt: str = Field(max_length=2000)
    speed: float = Field(25.0, ge=0.1, le=1000)


def current_user(request: Request) -> str:
    """A cookie stands for a login here: another browser is another user."""
    return request.cookies.get(USER_COOKIE) or "nobody"


User = Annotated[str, Depends(current_user)]


def create_app(upstream_url: str, *, local_upstream: bool, limit: int = 5, speed: float = 25.0) -> FastAPI:
    """Return the application. *upstream_url* is the base of an OpenAI-compatible API."""
    streaming = Streaming(leases=StreamLeaseConfig(limit=limit))
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    client = httpx.AsyncClient(timeout=httpx.Timeout(10, read=120))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with streaming, client:
            yield

    app = FastAPI(title="asgi_stream demo", lifespan=lifespan)
    app.add_middleware(StreamLeaseMiddleware, streaming=streaming, identify=_identify)

    @app.get("/", response_class=HTMLResponse)
    async def index(request: Request) -> HTMLResponse:
        response = HTMLResponse(page.replace("%SPEED%", f"{speed:g}"))
        if USER_COOKIE not in request.cookies:
            response.set_cookie(USER_COOKIE, secrets.token_urlsafe(12), httponly=True, samesite="strict")
        return response

    @app.post("/chat")
    async def chat(request: ChatRequest, user: User) -> Response:
        async with stream_lease(user, limiter=streaming.leases):
            return EventStreamResponse(complete(request), heartbeat=2.0)

    async def complete(request: ChatRequest) -> AsyncIterator[dict[str, str]]:
        body = {
            "model": os.environ.get("OPENAI_MODEL", MODEL if local_upstream else "gpt-4o-mini"),
            "messages": [{"role": "user", "content": request.prompt}],
            "stream": True,
        }
        headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        if local_upstream:
            headers[SPEED_HEADER] = str(request.speed)
        # Leaving this block closes the request to the model; it is left as soon as the page's client is gone.
        async with client.stream("POST", f"{upstream_url}/chat/completions", json=body, headers=headers) as answer:
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
        if local_upstream:
            upstream = (await client.get(f"{upstream_url.removesuffix('/v1')}/stats")).json()["open"]
        return {"open": streaming.leases.in_use(user), "limit": limit, "upstream_open": upstream}

    return app


def _identify(scope: Any) -> str | None:
    return Request(scope).cookies.get(USER_COOKIE) if scope["type"] == "http" else None
