"""Bytes to events: the HTML Standard's algorithm ("Interpreting an event stream"), for any stream that is legal.

Line by line: bytes are split at CRLF, CR and LF before they are decoded, which gives the same text as decoding first,
since in UTF-8 neither byte is ever part of another character.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from asgi_stream.errors import InvalidEventError

MAX_EVENT_BYTES = 8 * 1024 * 1024
MAX_RETRY_DIGITS = 100

_BOM = b"\xef\xbb\xbf"
_CR, _LF = b"\r\n"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event as a client sees it.

    ``id`` is the last event id at that moment: the event's own, or that of the last event before it which had one.
    ``retry`` is the reconnection time in milliseconds if the event's block set one.
    """

    data: str
    event: str = "message"
    id: str = ""
    retry: int | None = None

    def json(self) -> Any:
        """Return the data read as JSON; `msgspec.DecodeError`, a ``ValueError``, if it is none."""
        return msgspec.json.decode(self.data)


class Decoder:
    """Takes a stream in chunks of any size, and gives the events that each chunk completes.

    ``last_event_id`` is what a client would send as Last-Event-ID if the connection broke now: the id of the last block
    that was complete. ``retry`` is the reconnection time that the server set last, in milliseconds, or ``None``. A
    block without its blank line is no event yet, and at the end of the stream it is dropped, with its id.

    One decoder is for one connection: a stream's first bytes may be a byte order mark, which is skipped.

    The ``data`` lines of one event and the line that is being read may together have *max_event_bytes*. Beyond that
    `feed` raises `InvalidEventError`: at once, or, when the same chunk completed events before, the next time it is
    called. It then raises on every call.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._max_event_bytes = max_event_bytes
        self._error: InvalidEventError | None = None
        self._at_start = True
        self._after_cr = False  # an LF that comes next belongs to the CR before it
        self._line = bytearray()  # the line that is not complete yet
        self._id = b""  # outlives the block, as in the standard
        # The block that is not complete yet:
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._event = b""
        self._block_retry: int | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that *chunk* completes, in order. The time is linear in the bytes, however they are cut."""
        if self._error is not None:
            raise self._error
        if not chunk:
            return []
        if self._after_cr and chunk[0] == _LF:
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")

        # On bytes, unlike on str, splitlines() cuts at CRLF, CR and LF and at nothing else.
        lines = chunk.splitlines()
        rest = b"" if chunk.endswith((b"\n", b"\r")) or not lines else lines.pop()
        events: list[ServerSentEvent] = []
        try:
            for line in lines:
                if self._line:
                    self._line += line
                    line = bytes(self._line)
                    self._line.clear()
                if (event := self._take_line(line)) is not None:
                    events.append(event)
            self._line += rest
            self._check_size(len(self._line))
        except InvalidEventError as exc:
            self._error = exc
            if not events:
                raise
        return events

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        self._check_size(len(line))
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(line)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            if b"\0" not in value:
                self._id = value
        elif name == b"retry" and value.isdigit() and len(value) <= MAX_RETRY_DIGITS:
            self.retry = self._block_retry = int(value)
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        self.last_event_id = self._id.decode(errors="replace")
        data, event, retry = self._data, self._event, self._block_retry
        self._data, self._data_bytes, self._event, self._block_retry = [], 0, b"", None
        if not data:
            return None
        return ServerSentEvent(
            b"\n".join(data).decode(errors="replace"),
            event.decode(errors="replace") or "message",
            self.last_event_id,
            retry,
        )

    def _check_size(self, line_bytes: int) -> None:
        if self._data_bytes + line_bytes > self._max_event_bytes:
            raise InvalidEventError(
                "stream", f"an event or a line has more than max_event_bytes={self._max_event_bytes} bytes"
            )


def decode(chunks: Iterable[bytes], *, max_event_bytes: int = MAX_EVENT_BYTES) -> Iterator[ServerSentEvent]:
    """Yield the events of one stream that arrives in *chunks*; see `Decoder`."""
    decoder = Decoder(max_event_bytes=max_event_bytes)
    for chunk in chunks:
        yield from decoder.feed(chunk)
    decoder.feed(b"")  # raises what the last chunk's events came before


async def adecode(
    chunks: AsyncIterable[bytes], *, max_event_bytes: int = MAX_EVENT_BYTES
) -> AsyncIterator[ServerSentEvent]:
    """Yield the events of one stream that arrives in *chunks*; see `Decoder`."""
    decoder = Decoder(max_event_bytes=max_event_bytes)
    async for chunk in chunks:
        for event in decoder.feed(chunk):
            yield event
    decoder.feed(b"")  # raises what the last chunk's events came before
