"""Bytes to events: the vectors of the HTML Standard and of web-platform-tests, then any stream in any chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_stream.errors import InvalidEventError
from asgi_stream.sse import Decoder, ServerSentEvent, adecode, decode
from tests.sse.streams import by_the_standard, cut, events_of, places

Event = ServerSentEvent
LONG = b"x" * 2048
FIELD_NAMES = (
    b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\nda-ta:3\rdata_5\ndata:3\rdata:\r\n data:32\ndata:4\n\n"
)

# The examples of the HTML Standard's section on event streams, by their content.
STANDARD: list[tuple[str, bytes, list[Event]]] = [
    ("two-line stock quote", b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
    (
        "comment, id, id reset, leading space, no final blank line",
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
        [Event("first event", id="1"), Event("second event")],
    ),
    (
        "the same with its blank line",
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [Event("first event", id="1"), Event("second event"), Event(" third event")],
    ),
    ("empty data, two empty lines, unfinished", b"data\n\ndata\ndata\n\ndata:", [Event(""), Event("\n")]),
    ("one space after the colon is no data", b"data:test\n\ndata: test\n\n", [Event("test"), Event("test")]),
    ("named events", b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n", [
        Event("73857293", "add"),
        Event("2153", "remove"),
    ]),
]  # fmt: skip

# Each is named after the web-platform-tests file `eventsource/format-<name>` whose case it is.
WPT: list[tuple[str, bytes, list[Event]]] = [
    ("bom", b"\xef\xbb\xbfdata:1\n\n\xef\xbb\xbfdata:2\n\ndata:3\n\n", [Event("1"), Event("3")]),
    ("bom-2", b"\xef\xbb\xbf\xef\xbb\xbfdata:1\n\ndata:2\n\n", [Event("2")]),
    (
        "comments",
        b"data:1\r:\0\n:\r\ndata:2\n:" + LONG + b"\rdata:3\n:data:fail\r:" + LONG + b"\ndata:4\n\n",
        [Event("1\n2\n3\n4")],
    ),
    ("data-before-final-empty-line", b"retry:1000\ndata:1\n\nid:test\ndata:2", [Event("1", retry=1000)]),
    ("field-data", b"data:\n\ndata\ndata\n\ndata:test\n\n", [Event(""), Event("\n"), Event("test")]),
    ("field-event", b"event:test\ndata:x\n\ndata:x\n\n", [Event("x", "test"), Event("x")]),
    ("field-event, the last one counts", b"event:a\nevent:b\ndata:x\n\n", [Event("x", "b")]),
    ("field-event, without data", b"event:a\n\ndata:x\n\n", [Event("x")]),
    ("field-event-empty", b"event: \ndata:data\n\n", [Event("data")]),
    ("field-event-empty, after a name", b"event:a\nevent\ndata:data\n\n", [Event("data")]),
    ("field-id", b"id:\xe2\x80\xa6\ndata:x\n\n", [Event("x", id="…")]),
    ("field-id-2", b"id:1\ndata:x\n\ndata:y\n\n", [Event("x", id="1"), Event("y", id="1")]),
    (
        "field-id-3",
        b"id:1\ndata:a\n\nid:2\ndata:b\n\nid\ndata:c\n\ndata:d\n\n",
        [Event("a", id="1"), Event("b", id="2"), Event("c"), Event("d")],
    ),
    ("field-id, without data", b"id:1\n\ndata:x\n\n", [Event("x", id="1")]),
    ("field-id-3, with a colon", b"id:1\ndata:a\n\nid:\ndata:b\n\n", [Event("a", id="1"), Event("b")]),
    *[
        (
            "field-id-null, " + ascii(id),
            b"id:1\ndata:a\n\nid:" + id + b"\ndata:b\n\n",
            [Event("a", id="1"), Event("b", id="1")],
        )
        for id in (b"\0\0", b"x\0", b"\0x", b"x\0x", b" \0")
    ],
    (
        "field-parsing",
        FIELD_NAMES,
        [Event("\0\n 2\n1\n3\n\n4")],
    ),
    ("field-retry", b"retry:03000\ndata:x\n\n", [Event("x", retry=3000)]),
    ("field-retry-bogus", b"retry:3000\nretry:1000x\ndata:x\n\n", [Event("x", retry=3000)]),
    ("field-retry-bogus, signs", b"retry:-1\nretry:+1\nretry:1_0\nretry:1 \ndata:x\n\n", [Event("x")]),
    ("field-retry-bogus, not ASCII", "retry:٣\nretry:１\nretry:²\ndata:x\n\n".encode(), [Event("x")]),
    ("field-retry-empty", b"retry\nretry:\nretry: \ndata:test\n\n", [Event("test")]),
    (
        "field-unknown",
        b"data:test\n data\ndata\nfoobar:xxx\njustsometext\n:thisisacomment\n\n",
        [Event("test\n")],
    ),
    ("leading-space", b"data:\ttest\rdata: \ndata:test\n\n", [Event("\ttest\n\ntest")]),
    ("newlines", b"data:test\r\ndata\ndata:test\r\n\r", [Event("test\n\ntest")]),
    ("newlines, only CR", b"data:a\r\rdata:b\r\r", [Event("a"), Event("b")]),
    ("newlines, only CRLF", b"data:a\r\n\r\ndata:b\r\n\r\n", [Event("a"), Event("b")]),
    ("null-character", b"data:\0\n\n\n\n", [Event("\0")]),
    ("utf-8", "data:ok…\n\n".encode(), [Event("ok…")]),
    ("utf-8, broken", b"data:\xff\xe2\x82\ndata:\xac\xc3\n\n", [Event("\ufffd\ufffd\n\ufffd\ufffd")]),
    ("utf-8, other line ends are data", "data:a\x85b\u2028c\vd\n\n".encode(), [Event("a\x85b\u2028c\vd")]),
    ("event-data", b"data:msg\ndata: msg\n\n:\nfalsefield:msg\n\ndata:end\n\n", [Event("msg\nmsg"), Event("end")]),
]
VECTORS = [*STANDARD, *WPT]


@pytest.mark.parametrize(
    ("stream", "expected"), [vector[1:] for vector in VECTORS], ids=[vector[0] for vector in VECTORS]
)
def test_a_stream_is_read_as_the_standard_says_however_it_is_cut(stream: bytes, expected: list[Event]) -> None:
    assert by_the_standard(stream) == expected
    assert events_of([stream]) == expected
    assert events_of([stream[i : i + 1] for i in range(len(stream))]) == expected
    for place in range(len(stream)):
        assert events_of([stream[:place], b"", stream[place:]]) == expected


PIECES = [
    b"data",
    b"event",
    b"id",
    b"retry",
    b":",
    b": ",
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\0",
    b"1",
    b"x",
    b"\xef\xbb\xbf",
]
PIECES += [b"\xe2\x82", b"\xac", b"\xff", b"\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"\xc2\x85"]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join) | st.binary(max_size=60), places())
def test_any_bytes_are_read_as_the_standard_says_in_any_chunks(stream: bytes, places: list[int]) -> None:
    assert events_of(cut(stream, places)) == by_the_standard(stream)


# What a client needs to come back


def test_the_last_event_id_moves_when_a_block_is_complete_and_not_before() -> None:
    """An id whose block was cut off must not be sent back: its event would be lost."""
    decoder = Decoder()
    decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert decoder.last_event_id == "1"
    decoder.feed(b"\n")
    assert decoder.last_event_id == "2"
    decoder.feed(b"id\n\n")
    assert decoder.last_event_id == ""


def test_the_reconnection_time_is_kept_and_belongs_to_the_event_of_its_block() -> None:
    decoder = Decoder()
    seen = [
        (decoder.feed(chunk), decoder.retry) for chunk in (b"", b"retry: 50\n\ndata: a\n\n", b"retry: 70\ndata: b\n\n")
    ]
    assert seen == [([], None), ([Event("a")], 50), ([Event("b", retry=70)], 70)]


def test_a_reconnection_time_of_absurd_length_is_ignored() -> None:
    decoder = Decoder()
    decoder.feed(b"retry: 50\nretry: " + b"9" * 100_000 + b"\n")
    assert decoder.retry == 50


def test_foreign_ids_that_our_own_events_refuse_are_read() -> None:
    stream = "id: stream:é/{1} \ndata: x\n\n".encode()
    assert events_of([stream]) == [Event("x", id="stream:é/{1} ")]


def test_an_event_gives_its_data_as_json() -> None:
    assert Event('{"a": [1]}').json() == {"a": [1]}
    with pytest.raises(ValueError, match="malformed"):
        Event("hello").json()


# Whole streams


def test_decode_yields_each_event_as_soon_as_its_chunk_is_there() -> None:
    arrived = 0

    def source() -> Iterator[bytes]:
        nonlocal arrived
        for chunk in (b"data: a\n\nda", b"ta: b\n", b"\n", b"data: never ended\n"):
            arrived += 1
            yield chunk

    assert [(event.data, arrived) for event in decode(source())] == [("a", 1), ("b", 3)]


@pytest.mark.anyio
async def test_adecode_does_the_same_for_asynchronous_sources() -> None:
    async def source() -> AsyncIterator[bytes]:
        for chunk in (b"data: a\n\nda", b"ta: b\n", b"\n", b"data: never ended\n"):
            yield chunk

    assert [event.data async for event in adecode(source())] == ["a", "b"]


# Bounds


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 100,
        b"data: " + b"x" * 100 + b"\n\n",
        b"data\n" * 30,
        b"id: " + b"x" * 100 + b"\n",
        b": " + b"x" * 100 + b"\n",
        b"data: " + b"x" * 50 + b"\nevent: " + b"x" * 50 + b"\n",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_more_than_the_bound_is_refused_and_stays_refused(stream: bytes, size: int) -> None:
    decoder = Decoder(max_event_bytes=64)
    chunks = [stream[place : place + size] for place in range(0, len(stream), size)]
    with pytest.raises(InvalidEventError, match="max_event_bytes=64"):
        list(map(decoder.feed, chunks))
    with pytest.raises(InvalidEventError, match="max_event_bytes=64"):
        decoder.feed(b"\n\ndata: a\n\n")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_as_much_as_the_bound_is_read(size: int) -> None:
    stream = (b"data: " + b"x" * 58 + b"\n\n") * 3 + b": ping\n" * 100 + (b"data: " + b"x" * 26 + b"\n") * 2 + b"\n"
    chunks = [stream[place : place + size] for place in range(0, len(stream), size)]
    assert [len(event.data) for event in decode(chunks, max_event_bytes=64)] == [58, 58, 58, 53]


def test_events_before_the_bound_was_passed_are_not_lost() -> None:
    events = decode([b"data: a\n\ndata: " + b"x" * 100], max_event_bytes=64)
    assert next(events) == Event("a")
    with pytest.raises(InvalidEventError):
        next(events)


@pytest.mark.anyio
async def test_adecode_tells_of_the_bound_too() -> None:
    async def source() -> AsyncIterator[bytes]:
        yield b"data: a\n\ndata: " + b"x" * 100

    events = adecode(source(), max_event_bytes=64)
    assert await anext(events) == Event("a")
    with pytest.raises(InvalidEventError):
        await anext(events)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [1, 512])
def test_a_huge_line_in_small_chunks_takes_linear_time(size: int) -> None:
    """With quadratic time, 1 MiB byte by byte would copy half a terabyte and run into the time limit."""
    chunk = b"x" * size
    decoder = Decoder()
    decoder.feed(b"data: ")
    for _ in range(1 << 20 if size == 1 else 7 << 11):  # 1 MiB byte by byte, 7 MiB in larger pieces
        decoder.feed(chunk)
    (event,) = decoder.feed(b"\n\n")
    assert set(event.data) == {"x"}
