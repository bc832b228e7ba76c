r"""Events to bytes.

The format is the HTML Standard's ("Parsing an event stream"), narrowed where correct output breaks clients that are
widely used [W1]:

- ``retry:`` is the first line of a block and ``id:`` the last: some clients take an id when its line arrives, and
  would lose the event whose block was cut after it;
- a block always has a ``data:`` line: some clients make an empty event of a block without;
- a heartbeat is one line with one line end: with a blank line after it, some clients repeat the last id's event empty.
"""

from __future__ import annotations

from asgi_stream.errors import InvalidEventError
from asgi_stream.events import StreamEvent, json_bytes, lone_surrogate

PING = b": ping\n"
"""The heartbeat. It may stand between any two events."""


def encode(event: StreamEvent) -> bytes:
    """Return *event* as one block of an event stream, blank line included.

    CR, LF and CRLF in text each start a new ``data:`` line, so a client reads them all back as LF. UTF-8, no BOM.
    Raises `InvalidEventError` for data that has no JSON form.
    """
    value = event.data
    block = encode_text(value) if isinstance(value, str) else encode_data(json_bytes(value))
    if event.event is not None:
        block = b"event: %b\n%b" % (event.event.encode(), block)
    if event.retry is not None:
        block = b"retry: %d\n%b" % (event.retry, block)
    if event.id is not None:
        block = b"%bid: %b\n\n" % (block[:-1], event.id.encode())
    return block


def encode_block(event: StreamEvent) -> bytes:
    """Return *event* without its id and without the blank line: what a channel's log puts its own id under."""
    return encode(event if event.id is None else StreamEvent(event.data, event.event, None, event.retry))[:-1]


def encode_text(text: str) -> bytes:
    """Return one event that has only data: *text*, in as many ``data:`` lines as it has lines.

    This runs once per token of a language model.
    """
    try:
        if "\n" in text or "\r" in text:
            # Not splitlines(), which also cuts at U+2028, U+0085, VT, FF and others: they are data [W2].
            text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\ndata: ")
        return b"data: %b\n\n" % text.encode()
    except UnicodeEncodeError as exc:
        raise lone_surrogate("data", exc) from None


def encode_data(data: bytes) -> bytes:
    """Return one event that has only *data*: UTF-8 without CR and LF, such as `json_bytes` makes. It is not checked."""
    return b"data: %b\n\n" % data


def comment(text: str) -> bytes:
    """Return a comment, which clients skip: one line with one line end, for between two events.

    Raises `InvalidEventError` for CR, LF or NUL in *text*.
    """
    if "\n" in text or "\r" in text or "\0" in text:
        raise InvalidEventError("comment", f"holds CR, LF or NUL: {text[:80]!r}; a comment is one line of text")
    try:
        return b": %b\n" % text.encode()
    except UnicodeEncodeError as exc:
        raise lone_surrogate("comment", exc) from None
