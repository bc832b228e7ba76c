"""Events to bytes: the HTML Standard's format, and the profile that widely used clients need [W1] [W2]."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_stream.errors import InvalidEventError
from asgi_stream.events import StreamEvent
from asgi_stream.sse import ServerSentEvent, decode, encode
from asgi_stream.sse.encode import PING, comment, encode_data, encode_text
from tests.sse.streams import by_the_standard, cut, events_of, places

VECTORS: list[tuple[str, StreamEvent, bytes]] = [
    ("text", StreamEvent("hello"), b"data: hello\n\n"),
    ("empty text", StreamEvent(""), b"data: \n\n"),
    ("leading space", StreamEvent(" hello"), b"data:  hello\n\n"),
    ("UTF-8", StreamEvent("é€😀"), "data: é€😀\n\n".encode()),
    ("LF", StreamEvent("a\nb"), b"data: a\ndata: b\n\n"),
    ("CR", StreamEvent("a\rb"), b"data: a\ndata: b\n\n"),
    ("CRLF is one line end", StreamEvent("a\r\nb"), b"data: a\ndata: b\n\n"),
    ("LF CR is two", StreamEvent("a\n\rb"), b"data: a\ndata: \ndata: b\n\n"),
    ("only a line end", StreamEvent("\n"), b"data: \ndata: \n\n"),
    ("line end at the end", StreamEvent("a\n"), b"data: a\ndata: \n\n"),
    ("empty lines", StreamEvent("\n\na"), b"data: \ndata: \ndata: a\n\n"),
    ("NUL in data", StreamEvent("a\0b"), b"data: a\0b\n\n"),
    ("BOM in data", StreamEvent("\ufeffa"), b"data: \xef\xbb\xbfa\n\n"),
    ("a token that looks like a frame", StreamEvent("data: x\n\n"), b"data: data: x\ndata: \ndata: \n\n"),
    ("JSON", StreamEvent({"a": [1, None]}), b'data: {"a":[1,null]}\n\n'),
    ("JSON with line ends in it", StreamEvent({"a": "\r\n"}), b'data: {"a":"\\r\\n"}\n\n'),
    ("null", StreamEvent(None), b"data: null\n\n"),
    ("name", StreamEvent("x", event="token"), b"event: token\ndata: x\n\n"),
    ("name with a space in front", StreamEvent("x", event=" a:b"), b"event:  a:b\ndata: x\n\n"),
    ("id is last", StreamEvent("x", id="7"), b"data: x\nid: 7\n\n"),
    ("empty id", StreamEvent("x", id=""), b"data: x\nid: \n\n"),
    ("retry is first", StreamEvent("x", retry=0), b"retry: 0\ndata: x\n\n"),
    (
        "everything",
        StreamEvent("a\nb", event="token", id="1.e", retry=1500),
        b"retry: 1500\nevent: token\ndata: a\ndata: b\nid: 1.e\n\n",
    ),
    ("everything, empty", StreamEvent("", "e", "", 1), b"retry: 1\nevent: e\ndata: \nid: \n\n"),
]


@pytest.mark.parametrize(
    ("event", "expected"), [vector[1:] for vector in VECTORS], ids=[vector[0] for vector in VECTORS]
)
def test_an_event_is_encoded_as_one_block(event: StreamEvent, expected: bytes) -> None:
    assert encode(event) == expected


@pytest.mark.parametrize("separator", list("\v\f\x1c\x1d\x1e\x85\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"), ids=ascii)
def test_what_str_splitlines_takes_for_a_line_end_is_data(separator: str) -> None:
    text = f"a{separator}b"
    assert encode(StreamEvent(text)) == b"data: " + text.encode() + b"\n\n"
    assert encode_text(text) == b"data: " + text.encode() + b"\n\n"


def test_data_without_a_json_form_is_refused_when_it_is_encoded() -> None:
    event = StreamEvent(object())
    with pytest.raises(InvalidEventError) as caught:
        encode(event)
    assert caught.value.field == "data"


def test_a_heartbeat_is_one_comment_line_with_one_line_end() -> None:
    """[W1]: with a blank line after it, it would repeat the event before as an empty one in some clients."""
    assert PING == b": ping\n"
    assert comment("ping") == PING


def test_comments_between_events_are_never_seen() -> None:
    stream = PING + encode(StreamEvent("a", id="1")) + comment("data: é") + PING + encode(StreamEvent("b"))
    assert [event.data for event in decode([stream])] == ["a", "b"]


@pytest.mark.parametrize("text", ["a\nb", "\r", "a\0", "\ud800"])
def test_a_comment_is_one_line_of_text(text: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        comment(text)
    assert caught.value.field == "comment"


@pytest.mark.parametrize("text", ["\ud800", "a\udfff\nb"])
def test_a_lone_surrogate_in_a_token_is_refused_as_data(text: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        encode_text(text)
    assert caught.value.field == "data"


def test_json_bytes_are_framed_as_they_are() -> None:
    assert encode_data(b'{"a":1}') == b'data: {"a":1}\n\n'


@given(st.text(st.characters(codec="utf-8")))
def test_a_token_is_encoded_like_an_event_that_has_only_data(text: str) -> None:
    assert encode_text(text) == encode(StreamEvent(text))


# Whatever is encoded decodes to itself

json_data: st.SearchStrategy[Any] = st.none() | st.integers() | st.dictionaries(st.text(), st.text(), max_size=3)
stream_events = st.builds(
    StreamEvent,
    data=st.text(st.characters(codec="utf-8")) | st.text("ab: \r\n\0\ufeff\x85\N{LINE SEPARATOR}") | json_data,
    event=st.none() | st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), min_size=1, max_size=20),
    id=st.none() | st.text("09azAZ._~-", max_size=10),
    retry=st.none() | st.integers(0, 2**31 - 1),
)


def as_seen(events: list[StreamEvent]) -> list[ServerSentEvent]:
    """What a client makes of *events*: names and ids have their defaults, line ends are LF."""
    seen, last_event_id = [], ""
    for event in events:
        last_event_id = last_event_id if event.id is None else event.id
        data = event.text().replace("\r\n", "\n").replace("\r", "\n")
        seen.append(ServerSentEvent(data, event.event or "message", last_event_id, event.retry))
    return seen


@given(st.lists(stream_events, max_size=5), places(), st.booleans())
def test_whatever_is_encoded_decodes_to_itself_under_any_chunking(
    events: list[StreamEvent], places: list[int], heartbeats: bool
) -> None:
    """[W2]: CR and CRLF in data read back as LF, everything else as it was."""
    stream = (PING if heartbeats else b"").join([b"", *map(encode, events), b""])
    assert events_of(cut(stream, places)) == as_seen(events) == by_the_standard(stream)


@given(stream_events)
def test_every_block_keeps_the_profile(event: StreamEvent) -> None:
    """[W1]: at least one data line, retry first, id last, one blank line, no BOM in front."""
    block = encode(event)
    lines = block.split(b"\n")
    assert lines[-2:] == [b"", b""]
    names = [line.partition(b": ")[0] for line in lines[:-2]]
    expected = ["retry"] * (event.retry is not None) + ["event"] * (event.event is not None)
    expected += ["data"] * names.count(b"data") + ["id"] * (event.id is not None)
    assert [name.decode() for name in names] == expected
    assert b"data" in names
    assert b"\r" not in block
