"""One event, its JSON, and the events that every run has: endings, `close` and `reset`.

Pure: no I/O and no clock but the `ts` of the events built here. How an event looks on the wire is
`asgi_stream.sse`'s matter; this module only refuses what no wire could carry.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import msgspec

from asgi_stream.errors import InvalidEventError

Ending = Literal["complete", "failed", "cancelled"]
"""The last event of a run is one of these, and a run has exactly one [W4]."""

CloseReason = Literal[
    "shutdown", "max_age", "idle", "slow", "lease_lost", "superseded", "expired", "revoked", "unavailable"
]
"""Why a connection ends while its run may go on."""

ResetReason = Literal["epoch", "trimmed", "slow", "expired"]
"""Why events are missing between the client's position and the next event."""

FINAL_REASONS: frozenset[str] = frozenset({"superseded", "expired", "revoked"})
"""After these a client is not to come back by itself."""

ENDINGS: frozenset[str] = frozenset(get_args(Ending))
CLOSE_REASONS: frozenset[str] = frozenset(get_args(CloseReason))
RESET_REASONS: frozenset[str] = frozenset(get_args(ResetReason))

MAX_ID_BYTES = 128
MAX_RETRY_MS = 2**31 - 1

_CR, _LF = b"\r\n"


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event, checked when it is made: an event that exists can be sent [W2].

    ``data`` is text (any ``str``) or anything JSON (see `json_bytes`). CR and CRLF in text arrive as LF. Data that
    has no JSON form is found out when it is encoded, not here.
    ``event`` is the name that the client's listener has; ``None`` means the default, ``message``.
    ``id`` is the position a returning client sends back: `[0-9A-Za-z._~-]`, at most 128 bytes, since other ids break
    the reconnects of common clients. An empty id makes the client forget its position.
    ``retry`` is how long the client waits before it reconnects, in milliseconds: 0 to 2,147,483,647, as JavaScript
    timers fire at once for more.

    Anything else raises `InvalidEventError`, whose ``field`` says which part is wrong; nothing is ever stripped.
    """

    data: Any
    event: str | None = None
    id: str | None = None
    retry: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            self._check_text("data", self.data)
        elif isinstance(self.data, (bytes, bytearray, memoryview)):
            raise InvalidEventError("data", "bytes are neither text nor JSON; decode them to str first")
        if self.event is not None:
            self._check_event(self.event)
        if self.id is not None:
            self._check_id(self.id)
        if self.retry is not None:
            self._check_retry(self.retry)

    def text(self) -> str:
        """Return the data as the text that goes on the wire: text as it is, anything else as JSON."""
        return self.data if isinstance(self.data, str) else json_bytes(self.data).decode()

    def to_json(self) -> bytes:
        """Return the event as a JSON object with ``data`` and those of ``event``, ``id`` and ``retry`` that are set.

        A string in ``data`` is the text of the wire, anything else is data that the wire has as JSON; so data such as
        a `datetime`, whose JSON is a string, is written as its text, quotes included, and reads back as that text.
        """
        data = json_bytes(self.data)
        if data.startswith(b'"') and not isinstance(self.data, str):
            data = json_bytes(data.decode())
        fields: dict[str, Any] = {"data": msgspec.Raw(data)}
        if self.event is not None:
            fields["event"] = self.event
        if self.id is not None:
            fields["id"] = self.id
        if self.retry is not None:
            fields["retry"] = self.retry
        return _encode(fields)

    @classmethod
    def from_json(cls, document: bytes | str) -> Self:
        """Read what `to_json` wrote. Unknown keys are ignored, so that newer versions may add some."""
        try:
            stored = _decode_stored(document)
        except (msgspec.DecodeError, UnicodeError) as exc:
            raise InvalidEventError("json", f"not an event written by to_json(): {exc}") from exc
        return cls(stored.data, stored.event, stored.id, stored.retry)

    def _check_text(self, field: str, text: str) -> str:
        if type(text) is not str:
            # A member of a str Enum prints as its name in some places and as its value in others; keep the value.
            text = str.__str__(text)
            object.__setattr__(self, field, text)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                raise lone_surrogate(field, exc) from None
        return text

    def _check_event(self, event: object) -> None:
        if not isinstance(event, str):
            raise InvalidEventError("event", f"must be text, not {type(event).__name__}")
        event = self._check_text("event", event)
        if not event:
            raise InvalidEventError("event", "is empty; leave it out (None) for the default name, 'message'")
        if "\n" in event or "\r" in event or "\0" in event:
            raise InvalidEventError("event", f"holds CR, LF or NUL: {event[:80]!r}; an event name is one line of text")

    def _check_id(self, id: object) -> None:
        if not isinstance(id, str):
            raise InvalidEventError("id", f"must be text, not {type(id).__name__}; write str(…) around it")
        id = self._check_text("id", id)
        if not _is_safe_id(id):
            raise InvalidEventError(
                "id",
                f"must be made of 0-9 A-Z a-z . _ ~ - only: {id[:80]!r}; other characters, above all CR, LF, NUL and "
                "non-ASCII ones, break clients when they reconnect",
            )
        if len(id) > MAX_ID_BYTES:
            raise InvalidEventError("id", f"has {len(id)} bytes; at most {MAX_ID_BYTES} survive every reconnect")

    def _check_retry(self, retry: object) -> None:
        if not isinstance(retry, int) or isinstance(retry, bool):
            raise InvalidEventError("retry", f"must be an int (milliseconds), not {type(retry).__name__}")
        if not 0 <= retry <= MAX_RETRY_MS:
            raise InvalidEventError("retry", f"must be 0 to {MAX_RETRY_MS} milliseconds")
        if type(retry) is not int:
            object.__setattr__(self, "retry", int(retry))


def json_bytes(value: Any) -> bytes:
    """Return *value* as JSON on one line: UTF-8, without CR or LF.

    Takes what msgspec takes: dict, list, tuple, set, str, numbers, bool, None, dataclasses, Structs, Enums,
    `datetime`, `UUID`, `Decimal` (as a string), bytes inside a container (as base64); and, at any depth, pydantic
    models, by their own ``model_dump_json``. NaN and the infinities become ``null``. Anything else raises
    `InvalidEventError`.
    """
    try:
        encoded = _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidEventError("data", _why_not_json(value, exc)) from exc
    # Only text that others made JSON (a model's own method, msgspec.Raw) can hold a line end; msgspec escapes its own.
    if _LF in encoded or _CR in encoded:
        try:
            return msgspec.json.format(encoded, indent=-1)
        except msgspec.DecodeError as exc:
            raise InvalidEventError("data", f"holds ready-made JSON that is not valid: {exc}") from exc
    return encoded


def lone_surrogate(field: str, error: UnicodeEncodeError) -> InvalidEventError:
    """The error for text that UTF-8, and so the event-stream format, cannot carry."""
    return InvalidEventError(
        field,
        f"has a lone surrogate at index {error.start}, which UTF-8 cannot carry; "
        "use text.encode('utf-8', 'replace').decode() if losing it is fine",
    )


def now_ms() -> int:
    """Return Unix time in milliseconds, the unit of every ``ts``."""
    return time.time_ns() // 1_000_000


def complete(
    result: Mapping[str, Any] | None = None,
    *,
    success: bool = True,
    event_id: str | None = None,
    ts: int | None = None,
) -> StreamEvent:
    """The ending of a run that came to its end in order; *success* may be false all the same.

    The keys of *result* stand beside ``success`` and ``ts`` in the data. A ``success`` among them wins over the
    argument, a ``ts`` is replaced.
    """
    return _event("complete", {"success": success, **(result or {})}, event_id, ts)


def failed(
    code: str, message: str, *, retryable: bool, id: str, event_id: str | None = None, ts: int | None = None
) -> StreamEvent:
    """The ending of a run that broke.

    *message* is for the client's eyes, never the text of an internal exception [W5]. *id* names this failure in the
    data and in the server's log; *event_id* is the position on the wire.
    """
    return _event("failed", {"code": code, "message": message, "retryable": retryable, "id": id}, event_id, ts)


def cancelled(reason: str, *, event_id: str | None = None, ts: int | None = None) -> StreamEvent:
    """The ending of a run that somebody stopped."""
    return _event("cancelled", {"reason": reason}, event_id, ts)


def close(reason: CloseReason, *, retry: int | None = None, ts: int | None = None) -> StreamEvent:
    """The goodbye to one connection. *retry*, in ms, is when to come back.

    It has no id: the client keeps the position of the last event that it has seen. Only after a reason that is final
    (`FINAL_REASONS`) it has one, by which a client that returns all the same is known (`told_to_stay_away`).
    """
    ts = now_ms() if ts is None else ts
    return _event("close", {"reason": reason}, f"{ts:x}.x" if reason in FINAL_REASONS else None, ts, retry)


def told_to_stay_away(last_event_id: str, within: float = 3600.0) -> bool:
    """Whether a client with this last event id was ended for good at most *within* seconds ago [W4]."""
    at, dot, kind = last_event_id.partition(".")
    if kind != "x" or not dot:
        return False
    try:
        return -60 <= time.time() - int(at, 16) / 1000 <= within
    except ValueError:
        return False


def reset(
    reason: ResetReason, *, missed: int | None = None, event_id: str | None = None, ts: int | None = None
) -> StreamEvent:
    """Tell of a gap that cannot be filled; *missed* is the number of events in it, where known."""
    return _event("reset", {"reason": reason} if missed is None else {"reason": reason, "missed": missed}, event_id, ts)


def _event(
    name: str, data: dict[str, Any], event_id: str | None, ts: int | None, retry: int | None = None
) -> StreamEvent:
    data["ts"] = now_ms() if ts is None else ts
    return StreamEvent(data, name, event_id, retry)


class _Stored(msgspec.Struct):
    """The fields that `StreamEvent.to_json` writes."""

    data: Any
    event: str | None = None
    id: str | None = None
    retry: int | None = None


def _encode_other(value: Any) -> Any:
    """Give msgspec something it knows for a value that it does not."""
    # Looked up on the type: on the object, a class given by mistake for its instance would have it too.
    model_dump_json = getattr(type(value), "model_dump_json", None)
    if model_dump_json is not None:
        return msgspec.Raw(model_dump_json(value).encode())
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):  # numpy.float64 is one
        return float(value)
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"JSON has no form for {type(value).__qualname__}")


def _why_not_json(value: Any, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply, or holds itself, and so is not JSON serialisable"
    if isinstance(error, UnicodeEncodeError):
        return f"holds text with a lone surrogate, which UTF-8 cannot carry: {error.object[:80]!r}"
    return (
        f"{type(value).__qualname__} is not JSON serialisable ({error}); give text, or turn it into dicts, lists, "
        "strings and numbers, a dataclass, a msgspec Struct or a pydantic model first"
    )


_is_safe_id = re.compile(r"[0-9A-Za-z._~-]*\Z").match
_encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
_decode_stored = msgspec.json.Decoder(_Stored).decode
