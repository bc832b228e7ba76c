"""No text from outside ever adds a field, an event or a reconnect to a stream [W2].

The first tests are the holes that server libraries had, in one field or another: CVE-2026-33128 and
GHSA-4hxc-9384-m385 (h3), CVE-2026-29085 and honojs/hono#5299 (Hono), CVE-2026-35515 (NestJS), CVE-2026-22735 (Spring),
CVE-2026-44214 (eventsource-encoder), CVE-2026-44217 (sse-channel), fanout/django-eventstream#185,
singingwolfboy/flask-sse#40, mpetrunic/fastify-sse-v2#110, fastapi/fastapi#15187.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_stream.errors import InvalidEventError
from asgi_stream.events import StreamEvent, json_bytes
from asgi_stream.sse import ServerSentEvent, decode, encode
from asgi_stream.sse.encode import PING, comment, encode_data, encode_text
from tests.sse.streams import by_the_standard

LINE_ENDS = ["\n", "\r", "\r\n"]
PAYLOADS = ["data: evil", "\ndata: evil\n", "event: evil", "id: evil", "retry: 1", ""]
BREAKS = [f"a{end}{payload}" for end in LINE_ENDS for payload in PAYLOADS] + ["\n", "\r", "\na"]


@pytest.mark.parametrize("name", [*BREAKS, "a\0b"], ids=ascii)
def test_a_line_end_or_nul_in_the_event_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent("x", event=name)
    assert caught.value.field == "event"


@pytest.mark.parametrize("id", BREAKS, ids=ascii)
def test_a_line_end_in_the_id_is_refused(id: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent("x", id=id)
    assert caught.value.field == "id"


@pytest.mark.parametrize("id", ["\0", "1\0", "\0001"], ids=ascii)
def test_a_nul_in_the_id_is_refused_since_browsers_would_ignore_the_id_and_lose_their_place(id: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent("x", id=id)
    assert caught.value.field == "id"


@pytest.mark.parametrize(
    "retry", ["1\ndata: evil\n\n", "1", "", b"1", 1.5, float("nan"), True, -1, [1], "1\r"], ids=ascii
)
def test_a_retry_that_is_no_number_of_milliseconds_is_refused(retry: Any) -> None:
    """Text is refused even when it is a number: a check that is there for injections must not guess."""
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent("x", retry=retry)
    assert caught.value.field == "retry"


@pytest.mark.parametrize("data", BREAKS, ids=ascii)
def test_line_ends_in_data_the_bare_cr_too_stay_in_data(data: str) -> None:
    """A client ends a line at a bare CR as well; an encoder that splits at LF alone lets it begin a field."""
    expected = ServerSentEvent(data.replace("\r\n", "\n").replace("\r", "\n"))
    assert by_the_standard(encode(StreamEvent(data))) == [expected]
    assert by_the_standard(encode_text(data)) == [expected]


@pytest.mark.parametrize("text", [*BREAKS, "a\0"], ids=ascii)
def test_a_line_end_or_nul_in_a_comment_is_refused(text: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        comment(text)
    assert caught.value.field == "comment"


@pytest.mark.parametrize("key", ["event", "id"])
@pytest.mark.parametrize("value", BREAKS, ids=ascii)
def test_an_event_read_from_storage_is_checked_again(key: str, value: str) -> None:
    stored = json_bytes({"data": "x", key: value})
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent.from_json(stored)
    assert caught.value.field == key


class Sneaky(str):
    """Text that tells every check it is harmless."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return False

    def encode(self, *_: Any) -> bytes:
        return b"a\n\nevent: evil\ndata: x"


def test_a_subclass_of_str_cannot_talk_its_way_past_the_checks() -> None:
    with pytest.raises(InvalidEventError):
        StreamEvent("x", event=Sneaky("a\nb"))
    with pytest.raises(InvalidEventError):
        StreamEvent("x", id=Sneaky("a\nb"))
    assert encode(StreamEvent(Sneaky("x"), event=Sneaky("y"), id=Sneaky("z"))) == b"event: y\ndata: x\nid: z\n\n"


HOSTILE = st.lists(
    st.sampled_from(
        ["\r", "\n", "\0", ":", " ", "data: ", "event: evil", "id: 9", "retry: 1", "\ufeff", "\u2028", "\x85"]
    )
    | st.text(max_size=5),
    max_size=10,
).map("".join)


@given(data=HOSTILE, event=st.none() | HOSTILE, id=st.none() | HOSTILE)
def test_hostile_strings_are_refused_or_give_the_one_event_they_were_in(
    data: str, event: str | None, id: str | None
) -> None:
    try:
        made = StreamEvent(data, event, id)
    except InvalidEventError:
        return
    before, after = encode(StreamEvent("before", id="1")), encode(StreamEvent("after", event="after"))
    seen = by_the_standard(before + PING + encode(made) + PING + after)
    last_event_id = "1" if id is None else id
    lines = data.replace("\r\n", "\n").replace("\r", "\n")
    assert seen == [
        ServerSentEvent("before", id="1"),
        ServerSentEvent(lines, event or "message", last_event_id),
        ServerSentEvent("after", "after", last_event_id),
    ]


@given(HOSTILE)
def test_a_hostile_token_is_one_event_with_only_data(text: str) -> None:
    try:
        block = encode_text(text)
    except InvalidEventError:
        return
    assert list(decode([block])) == [ServerSentEvent(text.replace("\r\n", "\n").replace("\r", "\n"))]


@given(st.dictionaries(HOSTILE, HOSTILE | st.lists(HOSTILE)))
def test_hostile_strings_in_json_stay_in_one_line_of_data(value: dict[str, Any]) -> None:
    try:
        encoded = json_bytes(value)
    except InvalidEventError:
        return  # a lone surrogate
    (event,) = decode([encode_data(encoded)])
    assert (event.event, event.id, event.retry, event.json()) == ("message", "", None, value)


@given(HOSTILE)
def test_a_hostile_comment_is_refused_or_seen_by_nobody(text: str) -> None:
    try:
        line = comment(text)
    except InvalidEventError:
        return
    assert list(decode([line + b"data: x\n\n"])) == [ServerSentEvent("x")]
