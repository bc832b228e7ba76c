"""What the tests of the wire share: cutting a stream anywhere, and the standard's algorithm in its own order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st

from asgi_stream.sse import Decoder, ServerSentEvent


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    """Return *stream* in chunks that end at *places*; a place counts modulo the length, so any integers will do."""
    ends = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(ends)]


def events_of(chunks: Iterable[bytes]) -> list[ServerSentEvent]:
    decoder = Decoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def places() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 10_000), max_size=40)


def by_the_standard(stream: bytes) -> list[ServerSentEvent]:
    """Interpret a whole stream as the HTML Standard words it: decode, split, then one buffer after the other.

    It shares no step with `Decoder`, which splits bytes and decodes last.
    """
    lines = re.split(r"\r\n|\r|\n", stream.decode("utf-8", "replace").removeprefix("\ufeff"))
    events = []
    data = event_type = last_event_id = ""
    retry = None
    for line in lines[:-1]:  # the last one has no line end
        if line == "":
            if data != "":
                events.append(ServerSentEvent(data[:-1], event_type or "message", last_event_id, retry))
            data = event_type = ""
            retry = None
            continue
        if line.startswith(":"):
            continue
        field, colon, value = line.partition(":")
        if colon and value.startswith(" "):
            value = value[1:]
        if field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_event_id = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            retry = int(value)
    return events
