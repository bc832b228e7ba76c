"""Clients that were told to stay away, and come back all the same [W4]."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.types import Scope, Send

from asgi_stream.events import told_to_stay_away


def is_gone(scope: Scope) -> bool:
    """Whether the client's stream was ended for good lately.

    An `EventSource` returns after any end of its connection. It is answered 204, which ends it, before a lease is taken
    or a run is begun for it.
    """
    told = last_event_id(scope)
    return told is not None and told_to_stay_away(told)


def last_event_id(scope: Scope) -> str | None:
    """What the client has seen last, as it says: in the header, or where it can send none in the query."""
    for name, value in scope["headers"]:
        if name == b"last-event-id":
            return bytes(value).decode("latin-1")
    query = scope.get("query_string", b"")
    if b"last_event_id=" not in query:
        return None
    return dict(parse_qsl(query.decode("latin-1"))).get("last_event_id")


async def stay_away(send: Send) -> None:
    """Answer 204."""
    await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": b""})
