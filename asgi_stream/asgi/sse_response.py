"""`sse_response`: what is published to channels, as one response [W3] [W4] [C1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asgi_stream import events
from asgi_stream.asgi.gone import last_event_id
from asgi_stream.asgi.headers import EVENT_STREAM
from asgi_stream.asgi.shutdown import STREAMS_KEY
from asgi_stream.asgi.tasks import cancellable_task
from asgi_stream.asgi.viewer import ChannelViewer, ViewerSettings
from asgi_stream.channels.model import check_channel, parse_cursor
from asgi_stream.errors import ConfigurationError
from asgi_stream.leases.handover import Terms, open_hold, take_current
from asgi_stream.leases.limiter import StreamLease

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming


class ChannelResponse(Response):
    """Streams one or more channels, from where the client was: made by `sse_response`."""

    def __init__(
        self,
        streaming: Streaming,
        channels: Sequence[str],
        settings: ViewerSettings,
        *,
        last_event_id: str | None = None,
        lease: StreamLease | None = None,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        limit = streaming.channel_settings.max_channels_per_stream
        if not 1 <= len(set(channels)) == len(channels) <= limit:
            raise ConfigurationError(f"a stream has 1 to {limit} channels, each once; got {len(channels)}")
        for channel in channels:
            check_channel(channel)
        self._streaming = streaming
        self._channels = channels
        self._settings = settings
        self._last_event_id = last_event_id
        self._lease = take_current() if lease is None else lease
        if self._lease is not None:
            self._lease.handed_over = True
        self.status_code = status_code
        self.media_type = "text/event-stream; charset=utf-8"
        self.background = background
        self.body = b""
        self.raw_headers = list(EVENT_STREAM)
        if streaming.events_url is not None and len(channels) == 1:
            location = f"{streaming.events_url.rstrip('/')}/{quote(channels[0])}"
            self.raw_headers.append((b"location", location.encode("ascii")))
        if headers:
            given = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            names = {name for name, _ in given}
            self.raw_headers = [pair for pair in self.raw_headers if pair[0] not in names] + given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = self._cursor(scope)
        cursors = parse_cursor(told, len(self._channels))
        if scope["method"] == "HEAD":
            await self._answer(send, self.status_code, self.raw_headers)
        elif all(cursor is not None and cursor.ending for cursor in cursors):
            await self._answer(send, 204, [])  # the ending's id suffices, without a lookup
        elif told is not None and events.told_to_stay_away(told):
            await self._answer(send, 204, [])
        else:
            task = cancellable_task()
            if task is None:
                import asyncio

                task = asyncio.get_running_loop().create_task(self._stream(cursors, scope, receive, send))
                await task
            else:
                await self._stream(cursors, scope, receive, send)
        if self.background is not None:
            await self.background()

    async def _stream(self, cursors: Any, scope: Scope, receive: Receive, send: Send) -> None:
        hold, lease = open_hold(), self._lease
        if hold is not None:
            hold.claimed = hold.streaming = True
        if lease is not None:
            lease.streaming = True

        task = cancellable_task()
        assert task is not None
        viewer = ChannelViewer(
            self._streaming.hub(),
            self._channels,
            cursors,
            self._settings,
            status=self.status_code,
            headers=self.raw_headers,
            streams=scope.get(STREAMS_KEY) or self._streaming.streams,
            task=task,
            receive=receive,
            send=send,
            terms=Terms(lease, hold),
        )
        await viewer.run()

    def _cursor(self, scope: Scope) -> str | None:
        """Where the client was: what the endpoint says, else the header, else the query."""
        if self._last_event_id is not None:
            return self._last_event_id
        return last_event_id(scope)

    async def _answer(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._lease is not None:
            self._lease.release()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def sse_response(
    channel_id: str | Sequence[str],
    *,
    streaming: Streaming | None = None,
    last_event_id: str | None = None,
    lease: StreamLease | None = None,
    start_within: float = 1.0,
    heartbeat: float | None = None,
    max_age: float | None = None,
    expires_at: float | None = None,
    slow: Literal["disconnect", "drop_oldest"] = "disconnect",
    user: str | None = None,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
    background: BackgroundTask | None = None,
) -> ChannelResponse:
    """Return a response that streams what is published to *channel_id*: its history, then live, to the run's end.

    Several ids are one stream whose events say which channel they are of. It does not authorize: the endpoint that
    calls it has decided.

    The client goes on where it was: after ``last_event_id``, else the request's ``Last-Event-ID`` header, else its
    ``last_event_id`` in the query. Who has seen the end is answered 204.

    Times are in seconds. The headers leave as soon as Redis has answered, else after ``start_within``. ``heartbeat``
    is the silence after which a comment is sent (default: the channels' ``ping_interval``). ``max_age`` ends the
    connection with `close` (`max_age`); ``expires_at`` (Unix time) with `close` (`expired`). ``slow`` says what becomes
    of a client that reads so slowly that its backlog passes ``viewer_backlog_bytes``: its connection is dropped, or
    it skips to the end of the log with `reset` (`slow`). ``user`` is whom `Streaming.close(user=…)` finds it by.
    """
    if streaming is None:
        from asgi_stream.runtime import current_streaming

        streaming = current_streaming()
    if slow not in ("disconnect", "drop_oldest"):
        raise ConfigurationError(f'slow must be "disconnect" or "drop_oldest", not {slow!r}')
    channels = [channel_id] if isinstance(channel_id, str) else list(channel_id)
    if heartbeat is None:
        heartbeat = streaming.channel_settings.ping_interval
    return ChannelResponse(
        streaming,
        channels,
        ViewerSettings(start_within, heartbeat or float("inf"), max_age, expires_at, slow, user),
        last_event_id=last_event_id,
        lease=lease,
        status_code=status_code,
        headers=headers,
        background=background,
    )
