"""Coalescing, backpressure and cancellation of the hot path."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from asgi_stream import EventStreamResponse, Outcome
from tests.asgi_client import Exchange, fetch, http_scope

pytestmark = pytest.mark.anyio


def text(items: Any, **options: Any) -> EventStreamResponse:
    return EventStreamResponse(items, format="text", **options)


async def test_items_that_are_ready_leave_together_and_the_first_after_a_pause_at_once() -> None:
    """[D1]"""

    async def generate() -> AsyncIterator[str]:
        for _ in range(2):
            for letter in "abcd":
                yield letter
            await asyncio.sleep(0)

    exchange = await fetch(text(generate()))
    assert exchange.bodies == [b"a", b"bcd", b"a", b"bcd", b""]


async def test_the_first_item_leaves_before_the_producer_computes_the_next() -> None:
    """[D1]"""
    sent: list[bytes] = []

    async def generate() -> AsyncIterator[str]:
        yield "first"
        sent.append(exchange.body)
        yield "second"

    exchange = Exchange(text(generate()), http_scope())
    await exchange.end()
    assert sent == [b"first"]


async def test_an_item_that_took_long_to_compute_leaves_at_once() -> None:
    """[D1] A producer that never suspends is flushed every millisecond."""
    seen: list[bytes] = []

    async def generate() -> AsyncIterator[str]:
        for letter in "abc":
            end = time.monotonic() + 0.003
            while time.monotonic() < end:
                pass
            seen.append(exchange.body)
            yield letter

    exchange = Exchange(text(generate()), http_scope())
    await exchange.end()
    assert seen == [b"", b"a", b"ab"]


async def test_a_producer_that_never_suspends_is_flushed_every_16_kib_and_lets_others_run() -> None:
    """[D1]"""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def generate() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1024

    task = asyncio.create_task(others())
    exchange = await fetch(text(generate()))
    task.cancel()
    assert max(map(len, exchange.bodies)) <= 17 * 1024
    assert len(exchange.body) == 1000 * 1024
    assert turns > 30


async def test_what_is_ready_leaves_before_a_suspension_is_passed_on() -> None:
    """[D1]"""
    gate = asyncio.Event()

    async def generate() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        await gate.wait()
        yield "c"

    exchange = Exchange(text(generate()), http_scope())
    await exchange.until_body(b"ab")
    gate.set()
    await exchange.end()
    assert exchange.body == b"abc"


async def test_the_producer_keeps_its_task_and_context() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen: list[tuple[Any, int]] = []

    async def generate() -> AsyncIterator[str]:
        variable.set(7)
        for _ in range(3):
            await asyncio.sleep(0)
            seen.append((asyncio.current_task(), variable.get()))
            yield "x"
        seen.append((asyncio.current_task(), variable.get()))

    exchange = Exchange(text(generate()), http_scope())
    await exchange.end()
    assert seen == [(exchange.task, 7)] * 4


@pytest.mark.parametrize("burst", [1, 3])
async def test_a_timeout_of_the_producer_fires_while_the_client_does_not_read_and_nothing_is_lost(burst: int) -> None:
    """The producer's own timeout must not destroy a send that is under way."""
    timeouts = 0

    async def generate() -> AsyncIterator[str]:
        nonlocal timeouts
        yield "0"
        exchange.stop_reading()
        for item in range(burst):
            yield str(item + 1)
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            timeouts += 1
            asyncio.get_running_loop().call_soon(exchange.read_again)
        yield "end"

    exchange = Exchange(text(generate()), http_scope())
    if burst == 1:
        # A single item is sent from its yield, as under `async for`: there is no timeout to fire yet.
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, exchange.read_again)
    await exchange.end()
    assert exchange.body == b"0" + "".join(str(n + 1) for n in range(burst)).encode() + b"end"
    assert timeouts == 1


async def test_an_anyio_scope_of_the_producer_works_in_mid_burst() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        with anyio.move_on_after(0.01):
            await anyio.sleep_forever()
        yield "c"

    assert (await fetch(text(generate()))).body == b"abc"


async def test_a_producer_that_raises_while_a_burst_is_sent_slowly_loses_none_of_it() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        exchange.stop_reading()
        asyncio.get_running_loop().call_later(0.01, exchange.read_again)
        await asyncio.sleep(0)
        raise ValueError("late")

    exchange = Exchange(EventStreamResponse(generate()), http_scope())
    await exchange.end()
    assert [event.event for event in exchange.events] == ["message", "message", "failed"]


async def test_cancelling_the_request_reaches_the_producer_and_comes_out() -> None:
    """The server ends the request by cancellation: the producer's `finally` runs whole, and so does the goodbye."""
    steps: list[str] = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("closed")

    exchange = Exchange(EventStreamResponse(generate()), http_scope())
    await exchange.until_body(b"data: a\n\n")
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.end()
    assert steps == ["closed"]
    assert exchange.events[-1].event == "close"


async def test_a_middlewares_timeout_around_send_is_not_the_producers() -> None:
    outcomes: list[Outcome] = []
    steps: list[str] = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "a"
            yield "b"
            exchange.stop_reading()
            await asyncio.sleep(60)
        finally:
            steps.append("closed")

    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        async def send_in_time(message: Any) -> None:
            async with asyncio.timeout(0.02):
                await send(message)

        await text(generate(), on_finish=outcomes.append)(scope, receive, send_in_time)

    exchange = Exchange(impatient, http_scope())
    with pytest.raises(TimeoutError):
        await exchange.end()
    assert steps == ["closed"]
    assert [outcome.status for outcome in outcomes] == ["failed"]
