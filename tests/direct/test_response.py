"""What a client and an application see of an `EventStreamResponse`."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from asgi_stream import EventStreamResponse, Outcome, StreamEvent
from asgi_stream.asgi.shutdown import default_streams
from asgi_stream.errors import ConfigurationError
from tests.asgi_client import Exchange, fetch, http_scope

pytestmark = pytest.mark.anyio


async def items_of(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def waits_for_ever(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item
    await asyncio.Event().wait()


async def fails(exc: BaseException, *items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item
    raise exc


def rate_limited() -> openai.RateLimitError:
    response: Any = httpx.Response(429, headers={"retry-after": "7"}, request=httpx.Request("POST", "http://upstream"))
    return openai.RateLimitError("secret text of the upstream", response=response, body=None)


class Model(BaseModel):
    n: int


@dataclass
class Data:
    n: int


# The item table of the design


@pytest.mark.parametrize(
    ("item", "sse", "ndjson", "text"),
    [
        (StreamEvent("hi", "greeting", "1"), b"event: greeting\ndata: hi\nid: 1\n\n", b'"hi"\n', b"hi"),
        (StreamEvent({"a": 1}), b'data: {"a":1}\n\n', b'{"a":1}\n', b'{"a":1}'),
        ("a\nb", b"data: a\ndata: b\n\n", b'"a\\nb"\n', b"a\nb"),
        (b"data: x\n\n", b"data: x\n\n", b"data: x\n\n", b"data: x\n\n"),
        ({"a": [1]}, b'data: {"a":[1]}\n\n', b'{"a":[1]}\n', None),
        (Model(n=1), b'data: {"n":1}\n\n', b'{"n":1}\n', None),
        (Data(n=1), b'data: {"n":1}\n\n', b'{"n":1}\n', None),
        (1.5, b"data: 1.5\n\n", b"1.5\n", None),
        (None, b"data: null\n\n", b"null\n", None),
    ],
)
async def test_every_kind_of_item_in_every_format(item: Any, sse: bytes, ndjson: bytes, text: bytes | None) -> None:
    for format, expected in (("sse", sse), ("ndjson", ndjson), ("text", text)):
        response = EventStreamResponse(items_of(item), format=format, end_event=None)  # type: ignore[arg-type]
        if expected is None:
            with pytest.raises(TypeError, match="str, bytes and StreamEvent"):
                await fetch(response)
        else:
            assert (await fetch(response)).body == expected


async def test_a_text_that_looks_like_a_frame_stays_text_and_warns() -> None:
    with pytest.warns(UserWarning, match="yield bytes"):
        exchange = await fetch(EventStreamResponse(items_of("data: x\n\n")))
    assert exchange.events[0].data == "data: x\n\n"


async def test_headers_say_that_nothing_may_be_stored_or_buffered() -> None:
    """[W3]"""
    exchange = await fetch(EventStreamResponse(items_of("x")))
    assert exchange.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store, no-transform",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
    }


async def test_headers_cookies_and_status_of_the_application_are_kept() -> None:
    response = EventStreamResponse(items_of("x"), status_code=201, headers={"X-Run": "7"}, media_type="text/x-own")
    response.set_cookie("a", "b")
    exchange = await fetch(response)
    assert exchange.status == 201
    assert exchange.headers["x-run"] == "7"
    assert exchange.headers["content-type"] == "text/x-own"
    assert exchange.headers["set-cookie"].startswith("a=b")


@pytest.mark.parametrize(
    "options",
    [
        {"on_disconnect": "stop"},
        {"on_disconnect": -1},
        {"heartbeat": -1},
        {"start_within": "1"},
        {"format": "xml"},
        {"end_event": "a\nb"},
        {"resumable": "run"},
        {"lease": object()},
        {"headers": {"Content-Length": "3"}},
    ],
)
async def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - ConfigurationError or InvalidEventError
        EventStreamResponse([], **options)


@pytest.mark.parametrize("items", ["text", b"bytes", {"a": 1}, 7, items_of])
async def test_items_that_are_no_iterable_of_items_are_refused(items: Any) -> None:
    with pytest.raises(ConfigurationError):
        EventStreamResponse(items)


# When the headers leave


async def test_headers_leave_after_start_within_seconds_of_silence_and_heartbeats_follow() -> None:
    """[W3] [D3]"""
    exchange = Exchange(EventStreamResponse(waits_for_ever(), start_within=0.01, heartbeat=0.01), http_scope())
    await exchange.until_body(b": ping\n: ping\n: ping\n")
    exchange.leave()
    await exchange.end()
    assert exchange.status == 200


async def test_headers_leave_at_once_when_asked() -> None:
    """[W3]"""
    exchange = Exchange(EventStreamResponse(waits_for_ever(), start_within=0), http_scope())
    await exchange.until(lambda: exchange.started)
    exchange.leave()
    await exchange.end()


async def test_no_heartbeat_inside_a_frame_that_the_application_has_not_finished() -> None:
    ticks = asyncio.Event()

    async def generate() -> AsyncIterator[bytes]:
        yield b"data: half"
        await ticks.wait()
        yield b" done\n\n"
        await asyncio.Event().wait()

    exchange = Exchange(EventStreamResponse(generate(), heartbeat=0.01), http_scope())
    await exchange.until_body(b"half")
    asyncio.get_running_loop().call_later(0.4, ticks.set)
    await exchange.until_body(b"done\n\n: ping\n")
    exchange.leave()
    await exchange.end()
    assert exchange.body.startswith(b"data: half done\n\n")


# Endings


async def test_a_stream_ends_with_complete_and_a_returning_eventsource_gets_204() -> None:
    """[W4] No second, paid run."""
    runs = 0

    async def generate() -> AsyncIterator[str]:
        nonlocal runs
        runs += 1
        yield "a"

    first = await fetch(EventStreamResponse(generate()), http_scope("/chat"))
    ending = first.events[-1]
    assert ending.event == "complete"
    assert ending.json()["success"] is True

    again = http_scope("/chat", headers={"Last-Event-ID": ending.id})
    assert (await fetch(EventStreamResponse(generate()), again)).status == 204
    assert runs == 1

    elsewhere = http_scope("/other", headers={"Last-Event-ID": ending.id})
    assert (await fetch(EventStreamResponse(generate()), elsewhere)).status == 200
    posted = http_scope("/chat", method="POST", headers={"Last-Event-ID": ending.id})
    assert (await fetch(EventStreamResponse(generate()), posted)).status == 200


async def test_head_gets_the_headers_and_starts_nothing() -> None:
    exchange = await fetch(EventStreamResponse(fails(AssertionError())), http_scope(method="HEAD"))
    assert (exchange.status, exchange.body) == (200, b"")


async def test_the_ending_has_the_name_that_was_asked_for_or_is_absent() -> None:
    """[W4]"""
    assert (await fetch(EventStreamResponse(items_of(), end_event="end"))).events[-1].event == "end"
    assert (await fetch(EventStreamResponse(items_of("x"), end_event=None))).body == b"data: x\n\n"


# Failures


async def test_a_failure_before_the_headers_is_a_500() -> None:
    """[W5]"""

    async def endpoint(request: Request) -> EventStreamResponse:
        return EventStreamResponse(fails(ValueError("secret")))

    app = Starlette(routes=[Route("/", endpoint)])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert "secret" not in response.text


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    ("exc", "status"), [(HTTPException(402, "pay first"), 402), (rate_limited(), 429)], ids=["HTTPException", "openai"]
)
async def test_a_failure_before_the_headers_keeps_its_own_status(exc: Exception, status: int, bare: bool) -> None:
    """[W5] An upstream's 401 or 429 reaches the client as such, without the upstream's text."""

    async def endpoint(request: Request) -> EventStreamResponse:
        return EventStreamResponse(fails(exc))

    app: Any = EventStreamResponse(fails(exc)) if bare else Starlette(routes=[Route("/", endpoint)])
    exchange = await fetch(app)
    assert exchange.status == status
    assert b"secret" not in exchange.body
    if status == 429:
        assert exchange.headers["retry-after"] == "7"
    else:
        assert b"pay first" in exchange.body


async def test_an_exception_handler_of_the_application_comes_first() -> None:
    async def endpoint(request: Request) -> EventStreamResponse:
        return EventStreamResponse(fails(rate_limited()))

    async def handle(request: Request, exc: Exception) -> EventStreamResponse:
        return EventStreamResponse(items_of("handled"), status_code=418)

    app = Starlette(routes=[Route("/", endpoint)], exception_handlers={openai.RateLimitError: handle})
    assert (await fetch(app)).status == 418


async def test_a_late_failure_is_a_framed_event_without_the_exceptions_text(caplog: pytest.LogCaptureFixture) -> None:
    """[W5] The id in the event finds the exception in the log."""
    exchange = await fetch(EventStreamResponse(fails(ValueError("secret"), "a")))
    failed = exchange.events[-1]
    assert failed.event == "failed"
    assert failed.json()["code"] == "internal_error"
    assert failed.json()["retryable"] is False
    assert b"secret" not in exchange.body
    assert exchange.over
    assert failed.json()["id"] in caplog.text
    assert "secret" in caplog.text


async def test_a_late_failure_of_an_upstream_says_whether_to_retry() -> None:
    """[W5]"""
    failed = (await fetch(EventStreamResponse(fails(rate_limited(), "a")))).events[-1].json()
    assert (failed["code"], failed["retryable"]) == ("http_429", True)


async def test_a_late_failure_in_ndjson_is_a_last_line() -> None:
    """[W4]"""
    exchange = await fetch(EventStreamResponse(fails(ValueError("secret"), 1), format="ndjson"))
    lines = exchange.body.splitlines()
    assert lines[0] == b"1"
    assert json.loads(lines[1])["error"]["code"] == "internal_error"


async def test_a_late_failure_in_text_cuts_the_response_short() -> None:
    """[W4]"""
    exchange = Exchange(EventStreamResponse(fails(ValueError("secret"), "a"), format="text"), http_scope())
    with pytest.raises(ValueError, match="secret"):
        await exchange.end()
    assert not exchange.over


async def test_an_item_that_has_no_json_ends_the_stream_and_closes_the_producer() -> None:
    closed = False

    async def generate() -> AsyncIterator[Any]:
        nonlocal closed
        try:
            yield 1
            yield object()
        finally:
            closed = True

    exchange = await fetch(EventStreamResponse(generate()))
    assert exchange.events[-1].event == "failed"
    assert closed


# Time limits


@pytest.mark.parametrize(
    ("options", "items", "code"),
    [
        ({"first_event_timeout": 0.02, "start_within": 0}, (), "first_event_timeout"),
        ({"idle_timeout": 0.02}, ("a",), "idle_timeout"),
        ({"max_duration": 0.02}, ("a",), "max_duration"),
    ],
)
async def test_time_limits_end_the_stream_though_heartbeats_run(
    options: dict[str, Any], items: tuple[str, ...], code: str
) -> None:
    """[D3]"""
    outcomes: list[Outcome] = []
    exchange = await fetch(
        EventStreamResponse(waits_for_ever(*items), heartbeat=0.005, on_finish=outcomes.append, **options)
    )
    assert exchange.events[-1].event == "failed"
    assert exchange.events[-1].json()["code"] == code
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("failed", code)]


async def test_a_first_event_that_never_comes_is_a_504_while_the_headers_are_held() -> None:
    """[W5] [D3]"""
    exchange = await fetch(EventStreamResponse(waits_for_ever(), first_event_timeout=0.01, start_within=5))
    assert exchange.status == 504


async def test_a_time_limit_ends_a_stream_whose_client_does_not_read() -> None:
    """[D3] [S4]"""
    outcomes: list[Outcome] = []
    steps: list[str] = []

    async def generate() -> AsyncIterator[str]:
        try:
            while True:
                yield "a"
                await asyncio.sleep(0)
        finally:
            steps.append("closed")

    response = EventStreamResponse(generate(), max_duration=0.05, on_finish=outcomes.append)
    exchange = Exchange(response, http_scope())
    await exchange.until_body(b"data: a\n\n")
    exchange.stop_reading()
    await exchange.end()
    assert (steps, [o.reason for o in outcomes], exchange.over) == (["closed"], ["max_duration"], False)


async def test_a_receive_that_raises_is_logged_and_the_stream_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """[O3] Every task has an owner that sees its failure."""

    async def generate() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(0.01)
        yield "b"

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        async def raises() -> Any:
            raise ValueError("no message for you")

        await EventStreamResponse(generate())(scope, raises, send)

    assert (await fetch(broken)).events[-1].event == "complete"
    assert "no message for you" in caplog.text


# The client leaves


async def test_a_client_that_leaves_closes_the_producer_in_its_own_task() -> None:
    """[D2] The `await` in its `finally` completes."""
    steps: list[Any] = []
    outcomes: list[Outcome] = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.001)
            steps.append(asyncio.current_task())

    exchange = Exchange(EventStreamResponse(generate(), on_finish=outcomes.append), http_scope())
    await exchange.until_body(b"data: a\n\n")
    exchange.leave()
    await exchange.end()
    assert steps == [exchange.task]
    assert exchange.task.cancelling() == 0
    assert [(o.status, o.reason, o.items) for o in outcomes] == [("cancelled", "disconnect", 1)]


async def test_a_producer_that_swallows_the_cancellation_is_closed_at_its_next_item() -> None:
    closed: list[bool] = []

    async def generate() -> AsyncIterator[str]:
        try:
            while True:
                try:
                    yield "a"
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        finally:
            closed.append(True)

    exchange = Exchange(EventStreamResponse(generate()), http_scope())
    await exchange.until_body(b"data: a\n\n")
    exchange.leave()
    await exchange.end()
    assert closed == [True]
    assert len(exchange.events) == 1


async def test_finish_lets_the_producer_run_to_its_end_without_the_client() -> None:
    """[D2]"""
    gate = asyncio.Event()
    outcomes: list[Outcome] = []

    async def generate() -> AsyncIterator[str]:
        yield "a"
        await gate.wait()
        yield "b"

    exchange = Exchange(
        EventStreamResponse(generate(), on_disconnect="finish", on_finish=outcomes.append), http_scope()
    )
    await exchange.until_body(b"data: a\n\n")
    exchange.leave()
    for _ in range(5):
        await asyncio.sleep(0)
    gate.set()
    await exchange.end()
    assert [(o.status, o.items) for o in outcomes] == [("complete", 2)]
    assert b"data: b" not in exchange.body


async def test_grace_ends_the_producer_after_its_seconds() -> None:
    """[D2]"""
    outcomes: list[Outcome] = []
    response = EventStreamResponse(waits_for_ever("a"), on_disconnect=0.01, on_finish=outcomes.append)
    exchange = Exchange(response, http_scope())
    await exchange.until_body(b"data: a\n\n")
    exchange.leave()
    await exchange.end()
    assert [o.status for o in outcomes] == ["cancelled"]


async def test_on_finish_is_called_once_and_its_exception_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Outcome] = []

    async def on_finish(outcome: Outcome) -> None:
        calls.append(outcome)
        raise ValueError("in on_finish")

    exchange = await fetch(EventStreamResponse(items_of("a"), on_finish=on_finish))
    assert exchange.over
    assert [(o.status, o.items, o.error) for o in calls] == [("complete", 1, None)]
    assert "in on_finish" in caplog.text


async def test_background_work_runs_after_the_response() -> None:
    done: list[bool] = []
    response = EventStreamResponse(items_of("a"), background=BackgroundTask(lambda: done.append(exchange.over)))
    exchange = Exchange(response, http_scope())
    await exchange.end()
    assert done == [True]


# Sync producers


async def test_a_sync_generator_runs_in_one_thread_of_its_own() -> None:
    threads: list[threading.Thread] = []

    def generate() -> Iterator[int]:
        try:
            for n in range(200):
                threads.append(threading.current_thread())
                yield n
        finally:
            threads.append(threading.current_thread())

    exchange = await fetch(EventStreamResponse(generate(), end_event=None))
    assert [event.json() for event in exchange.events] == list(range(200))
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()


async def test_a_sync_generator_that_raises_fails_the_stream() -> None:
    def generate() -> Iterator[int]:
        yield 1
        raise ValueError("secret")

    assert (await fetch(EventStreamResponse(generate()))).events[-1].event == "failed"


async def test_a_sync_generator_is_closed_when_the_client_leaves() -> None:
    closed = threading.Event()

    def generate() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    exchange = Exchange(EventStreamResponse(generate()), http_scope())
    await exchange.until_body(b"data: 1\n\n")
    exchange.leave()
    await exchange.end()
    await asyncio.to_thread(closed.wait, 10)
    assert closed.is_set()


# Shutdown


async def test_a_shutdown_says_goodbye_closes_the_producer_and_leaves_nothing_registered() -> None:
    """[O1]"""
    closed: list[bool] = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    exchange = Exchange(EventStreamResponse(generate()), http_scope())
    await exchange.until_body(b"data: a\n\n")
    default_streams.begin_shutdown()
    try:
        await exchange.end()
    finally:
        default_streams.reopen()
    goodbye = exchange.events[-1]
    assert (goodbye.event, goodbye.json()["reason"]) == ("close", "shutdown")
    assert goodbye.retry is not None
    assert 1000 <= goodbye.retry <= 5000
    assert closed == [True]
    assert default_streams.count() == 0


async def test_many_streams_leave_no_task_behind() -> None:
    """[O3]"""
    before = asyncio.all_tasks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            exchange = Exchange(EventStreamResponse(waits_for_ever("a")), http_scope())
            await exchange.until_body(b"data: a\n\n")
            exchange.leave()
            await exchange.end()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert default_streams.count() == 0
