"""`StreamApp`: channels over HTTP, mountable: ``app.mount("/events", stream_app)`` [S1] [S3].

| request | answer |
| --- | --- |
| ``GET /{channel}`` | an event stream: history after ``Last-Event-ID`` (or ``?last_event_id=``), then live |
| ``GET /?channel=a&channel=b`` | several channels on one stream |
| ``GET /{channel}/history`` | what is kept, as JSON; ``?after=`` an id, ``?limit=`` events |
| ``GET /{channel}/history?source=archive`` | the record in OpenSearch: ``q``, ``kind`` (repeatable), ``level``, |
| | ``since``, ``until``, ``after``, ``limit``; its ``cursor`` is the ``last_event_id`` to go on live |
| ``GET /{channel}/poll`` | the same, but waits up to ``?wait=`` seconds (25) for something to come |
| ``DELETE /{channel}`` | asks the run to stop |
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from asgi_stream.asgi.identity import Identify, authenticated_owner
from asgi_stream.asgi.sse_response import sse_response
from asgi_stream.asgi.tickets import Ticket, check
from asgi_stream.channels.client import AsyncStreamChannel
from asgi_stream.channels.commands import RevokedAt
from asgi_stream.channels.model import Record, check_channel, is_owner
from asgi_stream.context import cancel_run
from asgi_stream.errors import BackendError, ConfigurationError
from asgi_stream.events import json_bytes

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming

Authorize = Callable[[Request, str, str], bool | Awaitable[bool]]
"""From a request, a channel and a verb (``read`` or ``cancel``) to whether it may."""
Workspaces = Callable[[Scope], str | Iterable[str] | None]
"""From a scope to the workspaces whose channels its user owns."""

logger = logging.getLogger("asgi_stream")

MAX_POLL = 60.0
MAX_EVENTS = 1000

_PROBLEM = "application/problem+json"
_HELP = (
    "To the developer: a channel of a StreamContext may be read by its workspace's user (set AuthenticationMiddleware, "
    "or identify= or workspaces= of StreamApp), or with a ticket (?ticket=, from Streaming.ticket()); channels with "
    "names of your own need authorize=."
)


@dataclass(frozen=True, slots=True)
class _Right:
    """Why somebody may."""

    user: str | None
    expires_at: float | None = None


class StreamApp:
    """The mountable application. It is closed by default: only a channel's owner, or who has a ticket, gets in.

    ``streaming``: whose channels; by default the process's. ``authorize(request, channel, verb)`` decides alone where
    it is given; it may be async. ``workspaces(scope)`` names the workspaces that a request's user owns, ``identify``
    the user itself; by default the authenticated user's ``identity`` or ``username``. ``cors``: origins that may read
    across sites, with credentials, such as ``["https://app.example"]``.

    Whoever may not gets 403, whether the channel exists or not.
    """

    def __init__(
        self,
        streaming: Streaming | None = None,
        *,
        authorize: Authorize | None = None,
        identify: Identify | None = None,
        workspaces: Workspaces | None = None,
        cors: Sequence[str] | None = None,
    ) -> None:
        if isinstance(cors, str):
            raise ConfigurationError('cors is a list of origins, such as ["https://app.example"]')
        self._streaming = streaming
        self._authorize = authorize
        self._identify = identify
        self._workspaces = workspaces
        middleware = []
        if cors:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(cors),
                    allow_credentials="*" not in cors,
                    allow_methods=["GET", "HEAD", "DELETE"],
                    allow_headers=["Last-Event-ID", "Authorization", "Cache-Control"],
                    expose_headers=["Retry-After"],
                )
            )
        self._app = Starlette(
            routes=[
                Route("/", self._several, methods=["GET"]),
                Route("/{channel}", self._stream, methods=["GET"]),
                Route("/{channel}", self._cancel, methods=["DELETE"]),
                Route("/{channel}/history", self._history, methods=["GET"]),
                Route("/{channel}/poll", self._poll, methods=["GET"]),
            ],
            middleware=middleware,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    @property
    def streaming(self) -> Streaming:
        """Whose channels these are."""
        if self._streaming is not None:
            return self._streaming
        from asgi_stream.runtime import current_streaming

        return current_streaming()

    # Endpoints

    async def _stream(self, request: Request) -> Response:
        return await self._view(request, [request.path_params["channel"]])

    async def _several(self, request: Request) -> Response:
        channels = list(dict.fromkeys(request.query_params.getlist("channel")))
        limit = self.streaming.channel_settings.max_channels_per_stream
        if not 1 <= len(channels) <= limit:
            return _problem(400, "Which channels?", f"ask for 1 to {limit}: ?channel=a&channel=b")
        return await self._view(request, channels)

    async def _view(self, request: Request, channels: list[str]) -> Response:
        rights = [await self._right(request, channel, "read") for channel in channels]
        if not all(rights):
            return _forbidden()
        expiries = [right.expires_at for right in rights if right is not None and right.expires_at is not None]
        user = next((right.user for right in rights if right is not None and right.user is not None), None)
        return await sse_response(
            channels if len(channels) > 1 else channels[0],
            streaming=self.streaming,
            expires_at=min(expiries) if expiries else None,
            user=user,
        )

    async def _history(self, request: Request) -> Response:
        source = request.query_params.get("source", "channel")
        if source == "archive":
            return await self._search(request)
        if source != "channel":
            return _problem(400, "Which source?", "source is channel or archive")
        return await self._read(request, 0.0)

    async def _search(self, request: Request) -> Response:
        """The record of one channel, for those who may read it."""
        name, asked = request.path_params["channel"], request.query_params
        if await self._right(request, name, "read") is None:
            return _forbidden()
        if self.streaming.storage_config is None:
            return _problem(404, "No archive", "this application keeps no record of events (enable_storage)")
        try:
            limit = int(asked.get("limit", 100))
        except ValueError:
            limit = 0
        try:
            page = await self.streaming.storage.search_async(
                channel=name,
                kinds=asked.getlist("kind") or None,
                level=asked.get("level"),
                text=asked.get("q"),
                since=asked.get("since"),
                until=asked.get("until"),
                after=asked.get("after"),
                limit=limit,
            )
        except ConfigurationError as exc:
            return _problem(400, "Search for what?", str(exc))
        except BackendError as exc:
            logger.warning("%s", exc)
            return _problem(503, "Unavailable", "the archive cannot be read at the moment", {"retry-after": "5"})
        events = [{"id": one.id, "event": one.event, "data": one.data, "time": one.time} for one in page.events]
        body = {"channel": name, "events": events, "after": page.after, "cursor": page.cursor}
        return Response(json_bytes(body), media_type="application/json", headers={"cache-control": "no-store"})

    async def _poll(self, request: Request) -> Response:
        try:
            wait = float(request.query_params.get("wait", "25"))
        except ValueError:
            wait = -1.0
        if not 0 <= wait <= MAX_POLL:
            return _problem(400, "How long?", f"wait is a number of seconds from 0 to {MAX_POLL:.0f}")
        return await self._read(request, wait)

    async def _read(self, request: Request, wait: float) -> Response:
        name = request.path_params["channel"]
        if await self._right(request, name, "read") is None:
            return _forbidden()
        try:
            limit = int(request.query_params.get("limit", MAX_EVENTS))
        except ValueError:
            limit = 0
        if not 1 <= limit <= MAX_EVENTS:
            return _problem(400, "How many?", f"limit is a number of events from 1 to {MAX_EVENTS}")
        channel = AsyncStreamChannel(name, streaming=self.streaming)
        after = request.query_params.get("after") or request.headers.get("last-event-id")
        try:
            if wait > 0:
                await _until_something(channel, after, wait)
            records = await channel.history(after=after, limit=limit)
            info = await channel.info()
        except BackendError:
            return _problem(503, "Unavailable", "the channel cannot be read at the moment", {"retry-after": "2"})
        cursor = records[-1].id if records else after
        body = {
            "channel": name,
            "state": info.state,
            "events": [_as_json(record) for record in records],
            "cursor": cursor,
            "more": bool(records) and records[-1].position.offset < info.top,
        }
        return Response(json_bytes(body), media_type="application/json", headers={"cache-control": "no-store"})

    async def _cancel(self, request: Request) -> Response:
        name = request.path_params["channel"]
        if await self._right(request, name, "cancel") is None:
            return _forbidden()
        try:
            status = await cancel_run(self.streaming, name, "user")
        except BackendError:
            return _problem(503, "Unavailable", "the run cannot be reached at the moment", {"retry-after": "2"})
        return Response(json_bytes({"channel": name, "state": status.state}), 202, media_type="application/json")

    # Who may

    async def _right(self, request: Request, channel: str, verb: str) -> _Right | None:
        streaming = self.streaming
        try:
            check_channel(channel)
        except ConfigurationError:
            return None
        user = self._user(request.scope)
        ticket = self._ticket(request, channel, verb)
        if ticket is not None:
            try:
                revoked_at = await streaming.broker.run_async(RevokedAt(channel))
            except BackendError:
                return None  # whether it still holds cannot be known
            if ticket.issued_at > revoked_at:
                return _Right(ticket.user or user, ticket.expires_at)
        authorize = self._authorize or streaming.authorize
        if authorize is not None:
            allowed = authorize(request, channel, verb)
            if inspect.isawaitable(allowed):
                allowed = await allowed
            return _Right(user) if allowed is True else None
        return _Right(user) if any(is_owner(channel, name) for name in self._owned(request.scope, user)) else None

    def _user(self, scope: Scope) -> str | None:
        identify = self._identify or self.streaming.identify
        return identify(scope) if identify is not None else authenticated_owner(scope)

    def _owned(self, scope: Scope, user: str | None) -> list[str]:
        workspaces = self._workspaces or self.streaming.workspaces
        if workspaces is None:
            return [] if user is None else [user]
        named = workspaces(scope)
        if named is None:
            return []
        return [named] if isinstance(named, str) else [name for name in named if name]

    def _ticket(self, request: Request, channel: str, verb: str) -> Ticket | None:
        given = request.query_params.getlist("ticket")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(token.strip())
        for text in given[: self.streaming.channel_settings.max_channels_per_stream]:
            ticket = check(self.streaming.secrets, text)
            if ticket is not None and ticket.channel == channel and verb in ticket.verbs:
                return ticket
        return None


async def _until_something(channel: AsyncStreamChannel, after: str | None, wait: float) -> None:
    records = channel.subscribe(after=after)
    try:
        async with asyncio.timeout(wait):
            async for _ in records:
                return
    except TimeoutError:
        pass
    finally:
        await cast(Any, records).aclose()


def _as_json(record: Record) -> dict[str, Any]:
    return {"id": record.id, "event": record.event, "data": record.data}


def _forbidden() -> Response:
    return _problem(403, "Not yours", _HELP)


def _problem(status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    body = json_bytes({"title": title, "status": status, "detail": detail})
    return Response(body, status, {"cache-control": "no-store", **(headers or {})}, media_type=_PROBLEM)


stream_app = StreamApp()
"""The process default's channels, ready to be mounted."""
