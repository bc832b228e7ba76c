"""The hot path: from an async generator to the socket, with nothing between that an item does not need.

The generator is stepped by hand, because only so can one see whether it *suspended* or had its next item ready.
Items that are ready join into one ``send``; an item that is not there yet is never waited for [D1]:

- the first item after a pause leaves at once;
- what follows without a pause leaves when the generator suspends, before that suspension is passed on;
- a generator that never suspends is flushed every 16 KiB or 1 ms, and lets the event loop run after each flush.

The generator runs in the caller's task and context, and it sees cancellations and timeouts as under ``async for``.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, Callable, Generator
from time import monotonic
from typing import Any, Protocol

FLUSH_BYTES = 16 * 1024
FLUSH_SECONDS = 0.001


class SendError(Exception):
    """``send`` raised: the ``__cause__`` is the transport's or a middleware's exception, not the producer's."""


class Sink(Protocol):
    """What the relay needs of the stream it works for."""

    send: Callable[[dict[str, Any]], Any]
    headers_sent: bool  # before the first body, `start()` has to run
    stop_reason: str | None  # set: take no further item
    detached: bool  # the client left and the run goes on: drop the bytes
    waiting: bool  # `begin_waiting()` has run
    sending: bool  # a send of the relay is under way
    busy: asyncio.Future[None] | None  # a send from elsewhere (a heartbeat) is under way
    last_item: float  # monotonic seconds
    last_body: bytes
    items: int
    good_until: float  # monotonic seconds; later nothing is sent before `ask_leave()`

    def ask_leave(self) -> Any: ...

    def start(self) -> Any: ...

    def begin_waiting(self) -> None: ...


@types.coroutine
def relay(source: AsyncGenerator[Any, None], frame: Callable[[Any], bytes], sink: Sink) -> Generator[Any, Any, None]:
    """Send every item of *source*; return when it is exhausted or ``sink.stop_reason`` is set.

    One loop on purpose: a call or a generator less per token is what this module is for.

    Exceptions of the generator and of *frame* come out as they are, those of ``send`` as `SendError`.
    """
    step = source.__anext__
    send = sink.send
    parts: list[bytes] = []
    size = 0
    lead = True  # the next item is the first after a pause
    deadline = 0.0
    count = 0
    try:
        while True:
            pending = step()
            try:
                held = pending.send(None)
            except StopIteration as stop:
                item = stop.value
            else:
                # The producer waits. What is ready leaves before its suspension is passed on to the event loop.
                if not sink.waiting:
                    sink.begin_waiting()
                item = _NOTHING
                if parts:
                    body = b"".join(parts)
                    parts.clear()
                    size = 0
                    held, item = yield from _send_held(sink, body, pending, held)
                while item is _NOTHING:
                    try:
                        yield held
                    except BaseException as exc:
                        try:
                            held = pending.throw(exc)
                        except StopIteration as stop:
                            item = stop.value
                    else:
                        try:
                            held = pending.send(None)
                        except StopIteration as stop:
                            item = stop.value
                lead = True

            count += 1
            now = monotonic()
            sink.last_item = now
            if now >= sink.good_until:
                yield from sink.ask_leave().__await__()
            if sink.stop_reason is not None:
                return
            data = item if type(item) is bytes else frame(item)
            if lead:
                lead = False
                deadline = now + FLUSH_SECONDS
                if sink.detached:
                    continue
                if sink.busy is None and sink.headers_sent:
                    sink.sending = True
                    try:
                        sent = send({"type": "http.response.body", "body": data, "more_body": True})
                        # A coroutine, as nearly always, needs no iterator made for it.
                        yield from sent if type(sent) is types.CoroutineType else sent.__await__()  # type: ignore[misc]
                    except Exception as exc:
                        raise SendError from exc
                    sink.sending = False
                    sink.last_body = data
                else:
                    yield from _send(sink, data)
                continue
            parts.append(data)
            size += len(data)
            if size >= FLUSH_BYTES or now >= deadline:
                if not sink.detached:
                    yield from _send(sink, b"".join(parts))
                parts.clear()
                size = 0
                # Let the others run: without this a generator that never suspends would starve the event loop, and
                # nobody could tell it that its client has left.
                if not sink.waiting:
                    sink.begin_waiting()
                yield None
                if sink.stop_reason is not None:  # set by another task meanwhile
                    return  # type: ignore[unreachable]
                deadline = monotonic() + FLUSH_SECONDS
    except StopAsyncIteration:
        pass
    finally:
        sink.items += count
    if parts and not sink.detached:
        yield from _send(sink, b"".join(parts))


_NOTHING: Any = object()


def _send(sink: Sink, body: bytes) -> Generator[Any, Any, None]:
    sink.sending = True
    try:
        while sink.busy is not None:
            yield from asyncio.shield(sink.busy).__await__()
        if not sink.headers_sent:
            yield from sink.start().__await__()
        yield from sink.send({"type": "http.response.body", "body": body, "more_body": True}).__await__()
    except Exception as exc:
        raise SendError from exc
    sink.sending = False
    sink.last_body = body


def _send_held(sink: Sink, body: bytes, pending: Any, held: Any) -> Generator[Any, Any, tuple[Any, Any]]:
    """Send *body* while the producer is inside an ``await`` (*held* is what it waits for).

    Return what it waits for afterwards, and its next item if a cancellation made it yield one. Normally the send
    finishes without suspending. When it suspends (a slow client, some servers), a cancellation that arrives is first
    the producer's: it alone may be inside a timeout of its own. If the producer handles it, the send goes on
    untouched; a plain ``await`` would let the cancellation destroy the send, and the items with it.
    """
    if sink.detached:
        return held, _NOTHING
    sending = _send(sink, body)
    try:
        waits_for = sending.send(None)
    except StopIteration:
        return held, _NOTHING
    item: Any = _NOTHING
    failure: BaseException | None = None
    while True:
        try:
            yield _proxy(waits_for)
            waits_for = sending.send(None)
        except asyncio.CancelledError as exc:
            if item is _NOTHING and failure is None:
                try:
                    held = _cancel(pending, held, exc)
                except StopIteration as stop:
                    item = stop.value
                except BaseException as raised:
                    failure = raised  # told after the send, whose items came first
                if sink.stop_reason is None and not isinstance(failure, asyncio.CancelledError):
                    continue
            try:
                waits_for = _cancel(sending, waits_for, exc)
            except (asyncio.CancelledError, StopIteration):
                if failure is None and sink.stop_reason is None:
                    raise
                break
        except StopIteration:
            break
    if failure is not None:
        raise failure
    return held, item


def _cancel(waiting: Any, waits_for: Any, exc: asyncio.CancelledError) -> Any:
    """Throw *exc* into a suspended awaitable as a task would: what it waits for is cancelled first."""
    if waits_for is not None:
        waits_for.cancel()
    return waiting.throw(exc)


def _proxy(waits_for: Any) -> Any:
    """Stand in for a future: a cancellation of the task then cancels the stand-in and leaves the future alone."""
    if waits_for is None:
        return None
    future = asyncio.get_running_loop().create_future()

    def finish(_: Any) -> None:
        if not future.done():
            future.set_result(None)

    waits_for._asyncio_future_blocking = False
    waits_for.add_done_callback(finish)
    future._asyncio_future_blocking = True
    return future
