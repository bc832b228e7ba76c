"""`StreamEvent`, its JSON, and the events that every run has."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import subprocess
import sys
import time
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_stream import events
from asgi_stream.errors import InvalidEventError, StreamError
from asgi_stream.events import StreamEvent, json_bytes


class Colour(enum.Enum):
    RED = "red"


class Kind(str, enum.Enum):  # noqa: UP042 - the older spelling, which prints differently from StrEnum
    TOKEN = "token"


class Milliseconds(enum.IntEnum):
    SECOND = 1000


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Size(msgspec.Struct):
    width: int


class Answer(pydantic.BaseModel):
    text: str
    at: datetime.datetime | None = None


class PrettyAnswer(Answer):
    def model_dump_json(self, **options: Any) -> str:
        return super().model_dump_json(**(options | {"indent": 2}))


class BrokenAnswer(Answer):
    def model_dump_json(self, **options: Any) -> str:
        return "1\n\nevent: evil\ndata: x"


class NumpyLikeFloat(float):
    pass


class BigId(int):
    pass


class Markup(str):
    __slots__ = ()


MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
NUMBER = uuid.UUID(int=1)


# Construction


def test_an_event_is_frozen_and_has_no_other_attributes() -> None:
    event = StreamEvent("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.data = "b"  # type: ignore[misc]
    assert not hasattr(event, "__dict__")


def test_data_alone_is_enough_and_events_with_equal_fields_are_equal() -> None:
    assert StreamEvent("a") == StreamEvent(data="a", event=None, id=None, retry=None)
    assert StreamEvent("a") != StreamEvent("a", id="1")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"event": ""}, "event"),
        ({"event": 5}, "event"),
        ({"event": b"token"}, "event"),
        ({"event": "\udc00"}, "event"),
        ({"id": 5}, "id"),
        ({"id": "é"}, "id"),
        ({"id": "a b"}, "id"),
        ({"id": "stream:1"}, "id"),
        ({"id": "1\N{FULLWIDTH DIGIT ONE}"}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"id": "x" * 129}, "id"),
        ({"retry": True}, "retry"),
        ({"retry": 1.0}, "retry"),
        ({"retry": "1000"}, "retry"),
        ({"retry": -1}, "retry"),
        ({"retry": 2**31}, "retry"),
        ({"data": "\ud83d"}, "data"),
        ({"data": b"framed"}, "data"),
        ({"data": bytearray(b"framed")}, "data"),
    ],
)
def test_a_field_that_no_client_could_read_is_refused_by_name(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent(**({"data": "x"} | fields))
    assert caught.value.field == wrong
    assert str(caught.value).startswith(f"{wrong}: ")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, StreamError)


@pytest.mark.parametrize(
    "fields",
    [
        {"event": "message"},
        {"event": " näme: with a colon"},
        {"id": ""},
        {"id": "x" * 128},
        {"id": "1763835600000-0"},
        {"id": "azAZ09._~-"},
        {"retry": 0},
        {"retry": 2**31 - 1},
        {"data": ""},
        {"data": "line\r\n\0 line \N{LINE SEPARATOR}\ufeff"},
        {"data": None},
        {"data": {"a": [1, 2.5, None]}},
    ],
)
def test_a_field_that_clients_read_is_kept_as_it_is(fields: dict[str, Any]) -> None:
    event = StreamEvent(**({"data": "x"} | fields))
    for name, value in fields.items():
        assert getattr(event, name) == value


def test_members_of_str_and_int_enums_stand_for_their_values() -> None:
    event = StreamEvent(Kind.TOKEN, event=Kind.TOKEN, id=Kind.TOKEN, retry=Milliseconds.SECOND)
    assert event == StreamEvent("token", "token", "token", 1000)
    assert [type(value) for value in dataclasses.astuple(event)] == [str, str, str, int]


def test_a_long_hostile_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent("x", event="\n" + "y" * 10_000)
    assert len(str(caught.value)) < 250


# JSON of values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1, "b": [True, None, "x"]}, {"a": 1, "b": [True, None, "x"]}),
        ((1, 2), [1, 2]),
        ({1}, [1]),
        (Point(1, 2), {"x": 1, "y": 2}),
        (Size(3), {"width": 3}),
        (Colour.RED, "red"),
        (Kind.TOKEN, "token"),
        (MOMENT, "2026-01-02T03:04:05Z"),
        (NUMBER, str(NUMBER)),
        (Decimal("1.50"), "1.50"),
        (2**70, 2**70),
        (Answer(text="é", at=MOMENT), {"text": "é", "at": "2026-01-02T03:04:05Z"}),
        ([{"deep": Answer(text="a")}], [{"deep": {"text": "a", "at": None}}]),
        ([Point(1, 2), Answer(text="a")], [{"x": 1, "y": 2}, {"text": "a", "at": None}]),
        (pydantic.RootModel[list[int]]([1, 2]), [1, 2]),
        ([Markup("<b>"), NumpyLikeFloat(1.5), BigId(7)], ["<b>", 1.5, 7]),
        ({"bytes": b"x"}, {"bytes": "eA=="}),
        ([float("nan"), float("inf"), -float("inf")], [None, None, None]),
        ("text\r\n", "text\r\n"),
    ],
    ids=repr,
)
def test_json_takes_what_msgspec_and_pydantic_take(value: Any, expected: Any) -> None:
    assert json.loads(json_bytes(value)) == expected


def test_a_pydantic_model_is_written_by_its_own_method() -> None:
    class Loud(pydantic.BaseModel):
        text: str

        def model_dump_json(self, **options: Any) -> str:
            return json.dumps({"text": self.text.upper()})

    assert json.loads(json_bytes({"inner": Loud(text="a")})) == {"inner": {"text": "A"}}


@pytest.mark.parametrize(
    "value",
    [PrettyAnswer(text="a"), {"deep": PrettyAnswer(text="a")}, msgspec.Raw(b'{"a":\r\n1}'), msgspec.Raw(b"[1,\r2]")],
    ids=repr,
)
def test_ready_made_json_is_put_on_one_line(value: Any) -> None:
    encoded = json_bytes(value)
    assert b"\n" not in encoded
    assert b"\r" not in encoded
    assert json.loads(encoded)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "object is not JSON serialisable"),
        ([{"deep": object()}], "no form for object"),
        (Answer, "is not JSON serialisable"),
        (1 + 2j, "complex"),
        (iter([1]), "list_iterator"),
        ({(1, 2): 3}, "tuple"),
        (CYCLE, "nested too deeply"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"\ud800": 1}, "lone surrogate"),
        (BrokenAnswer(text="a"), "not valid"),
        (msgspec.Raw(b'"a\nb"'), "not valid"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_without_a_json_form_is_refused_as_data(value: Any, says: str) -> None:
    with pytest.raises(InvalidEventError, match=says) as caught:
        json_bytes(value)
    assert caught.value.field == "data"


def test_the_refusal_of_a_value_says_what_to_do() -> None:
    with pytest.raises(InvalidEventError, match="turn it into dicts, lists"):
        StreamEvent(object()).text()


# Events as JSON


def test_text_stays_text_and_anything_else_becomes_json() -> None:
    assert StreamEvent('{"a": 1}').text() == '{"a": 1}'
    assert StreamEvent({"a": 1}).text() == '{"a":1}'
    assert StreamEvent(None).text() == "null"


def test_json_holds_the_fields_that_are_set_and_no_others() -> None:
    assert json.loads(StreamEvent("a").to_json()) == {"data": "a"}
    full = StreamEvent({"a": 1}, "token", "7", 5)
    assert json.loads(full.to_json()) == {"data": {"a": 1}, "event": "token", "id": "7", "retry": 5}


@pytest.mark.parametrize("text", ["", "a", "1", "null", '{"a": 1}', '"quoted"', "a\r\nb\rc\n", "é\N{LINE SEPARATOR}\0"])
def test_text_that_looks_like_json_comes_back_as_text(text: str) -> None:
    assert StreamEvent.from_json(StreamEvent(text).to_json()) == StreamEvent(text)


@pytest.mark.parametrize("value", [MOMENT, NUMBER, Colour.RED, Decimal("1.5"), Point(1, 2), Answer(text="a"), 2**70])
def test_data_of_any_type_has_the_same_wire_text_after_a_round_trip(value: Any) -> None:
    event = StreamEvent(value, "e", "1")
    assert StreamEvent.from_json(event.to_json()).text() == event.text()


def test_from_json_takes_text_too_and_ignores_unknown_keys() -> None:
    assert StreamEvent.from_json('{"data":[1],"later":true}') == StreamEvent([1])


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (b"", "json"),
        (b"[]", "json"),
        (b"{}", "json"),
        (b'{"data":1,"retry":"5"}', "json"),
        (b'{"data":1,"retry":1.5}', "json"),
        (b'{"data":1,"retry":true}', "json"),
        (b'{"data":1,"id":5}', "json"),
        (b'{"data":"\xff"}', "json"),
        (b'{"data":"a"} {"data":"b"}', "json"),
        ('{"data":"\ud800"}', "json"),
        (b'{"data":"\\ud800"}', "json"),
        (b'{"data":1,"retry":-5}', "retry"),
        (b'{"data":1,"event":"a\\nid: 1"}', "event"),
        (b'{"data":1,"id":"a\\u0000"}', "id"),
    ],
)
def test_a_stored_event_is_checked_like_a_new_one(document: bytes | str, field: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        StreamEvent.from_json(document)
    assert caught.value.field == field


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(
    data=json_values,
    event=st.none() | st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), min_size=1),
    id=st.none() | st.from_regex(r"[0-9A-Za-z._~-]{0,128}", fullmatch=True),
    retry=st.none() | st.integers(0, 2**31 - 1),
)
def test_every_event_is_equal_after_a_round_trip_through_json(
    data: Any, event: str | None, id: str | None, retry: int | None
) -> None:
    before = StreamEvent(data, event, id, retry)
    assert StreamEvent.from_json(before.to_json()) == before
    assert StreamEvent.from_json(before.to_json().decode()) == before


# The events of every run


def test_the_vocabulary_is_the_documented_one() -> None:
    assert {"complete", "failed", "cancelled"} == events.ENDINGS
    assert {"epoch", "trimmed", "slow", "expired"} == events.RESET_REASONS
    assert {
        *("shutdown", "max_age", "idle", "slow", "lease_lost", "superseded", "expired", "revoked", "unavailable")
    } == events.CLOSE_REASONS


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (events.complete(ts=5), StreamEvent({"success": True, "ts": 5}, "complete")),
        (
            events.complete({"url": "x"}, success=False, event_id="1.e", ts=5),
            StreamEvent({"url": "x", "success": False, "ts": 5}, "complete", "1.e"),
        ),
        (events.complete({"success": False}, ts=5), StreamEvent({"success": False, "ts": 5}, "complete")),
        (
            events.failed("upstream", "Try again.", retryable=True, id="f1", event_id="2.e", ts=5),
            StreamEvent(
                {"code": "upstream", "message": "Try again.", "retryable": True, "id": "f1", "ts": 5}, "failed", "2.e"
            ),
        ),
        (
            events.cancelled("by the user", event_id="3.e", ts=5),
            StreamEvent({"reason": "by the user", "ts": 5}, "cancelled", "3.e"),
        ),
        (
            events.close("shutdown", retry=700, ts=5),
            StreamEvent({"reason": "shutdown", "ts": 5}, "close", None, 700),
        ),
        (events.reset("epoch", ts=5), StreamEvent({"reason": "epoch", "ts": 5}, "reset")),
        (
            events.reset("trimmed", missed=0, event_id="9.1", ts=5),
            StreamEvent({"reason": "trimmed", "missed": 0, "ts": 5}, "reset", "9.1"),
        ),
    ],
    ids=lambda value: value.event,
)
def test_an_event_of_every_run_has_its_documented_fields(built: StreamEvent, expected: StreamEvent) -> None:
    assert built == expected


def test_an_event_of_every_run_is_stamped_in_unix_milliseconds() -> None:
    before = time.time()
    stamp = events.cancelled("x").data["ts"]
    assert isinstance(stamp, int)
    assert int(before * 1000) <= stamp <= time.time() * 1000


def test_building_an_ending_leaves_the_result_untouched() -> None:
    result = {"a": 1}
    events.complete(result)
    assert result == {"a": 1}


# Layers


def test_events_and_wire_load_no_optional_package_and_no_framework() -> None:
    code = (
        "import sys, asgi_stream.events, asgi_stream.sse;"
        "print({'redis', 'starlette', 'fastapi', 'pydantic', 'anyio', 'asyncio'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
