"""One direct stream: its headers, heartbeats, time limits, the watch for its client, and its one ending.

The generator runs in the request's own task. Beside it are, once it has waited for the first time, one task that
watches ``receive`` and one timer; a stream that never waits costs neither.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

from asgi_stream.asgi.shutdown import OpenStreams, abort_connection
from asgi_stream.asgi.tasks import cancellable_task
from asgi_stream.direct.failures import ProducerTimeoutError, describe
from asgi_stream.direct.outcome import OnFinish, Outcome, report
from asgi_stream.direct.relay import SendError, relay
from asgi_stream.errors import StreamError
from asgi_stream.events import CloseReason
from asgi_stream.formats import Format

logger = logging.getLogger("asgi_stream")

REPEAT_CANCEL = 10.0
"""Seconds a producer has for its `finally` before it is cancelled again, then twice as long, and so on."""


@dataclass(slots=True, frozen=True)
class Limits:
    """Seconds; None or 0 turns a limit off. Heartbeats reset none of them [D3]."""

    start_within: float
    heartbeat: float | None
    first_event: float | None
    idle: float | None
    total: float | None


class Pump:
    """Runs one stream from its first item to its last byte. Used once."""

    __slots__ = (
        "_begun",
        "_cancels",
        "_close_reason",
        "_goodbye",
        "_headers",
        "_limits",
        "_loop",
        "_on_disconnect",
        "_on_finish",
        "_receive",
        "_release",
        "_renew",
        "_running",
        "_sent_at",
        "_status",
        "_task",
        "_timer",
        "_watcher",
        "busy",
        "detached",
        "end_event",
        "end_id",
        "format",
        "good_until",
        "headers_sent",
        "items",
        "last_body",
        "last_item",
        "open_streams",
        "send",
        "sending",
        "source",
        "stop_reason",
        "waiting",
    )

    def __init__(
        self,
        source: AsyncGenerator[Any, None],
        format: Format,
        limits: Limits,
        *,
        status: int,
        headers: list[tuple[bytes, bytes]],
        end_event: str | None,
        end_id: str,
        on_disconnect: Literal["cancel", "finish"] | float,
        on_finish: OnFinish | None,
        release: Callable[[], None] | None,
        renew: Callable[[], Awaitable[float]] | None = None,
        good_until: float = float("inf"),
        open_streams: OpenStreams,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Any],
    ) -> None:
        self.source = source
        self.format = format
        self._limits = limits
        self._status = status
        self._headers = headers
        self.end_event = end_event
        self.end_id = end_id
        self._on_disconnect = on_disconnect
        self._on_finish = on_finish
        self._release = release
        self._renew = renew  # renews the lease, and returns until when it is good
        self.good_until = good_until  # monotonic: nothing is sent later without asking whether the lease still holds
        self.open_streams = open_streams
        self._receive = receive
        self.send = send
        self.headers_sent = False
        self.stop_reason: str | None = None
        self.detached = False
        self.waiting = False
        self.sending = False
        self.busy: asyncio.Future[None] | None = None
        self.last_item = 0.0
        self.last_body = b""
        self.items = 0
        self._begun = monotonic()
        self._sent_at = self._begun
        self._close_reason: CloseReason | None = None
        self._cancels = 0
        self._running = False
        self._goodbye = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Stream to the end. Raises only what still has a response to become: the headers have not left then."""
        task = cancellable_task()
        if task is None:
            await asyncio.get_running_loop().create_task(self.run())
            return
        self._task = task
        error: BaseException | None = None
        try:
            if self._limits.start_within <= 0:
                await self.start()
            self._running = True
            await relay(self.source, self.format.frame, self)
        except asyncio.CancelledError as exc:
            if self.stop_reason is None:  # not ours: the server or a timeout around us ends this request
                self._close_reason, self.stop_reason = "shutdown", "cancelled"
                self._running = False
                try:
                    await self._finish(exc)
                except Exception as failure:
                    logger.debug("no goodbye in a cancelled request: %r", failure)
                raise
        except SendError as exc:
            error = exc.__cause__
        except Exception as exc:
            error = exc
        finally:
            self._running = False
        while self._cancels:
            self._cancels -= 1
            task.uncancel()
        await self._finish(error)

    # What ends a stream early

    def shutdown(self) -> None:
        """The server goes: say goodbye, close the producer, end the response [O1]."""
        self.close("shutdown")

    def close(self, reason: CloseReason) -> None:
        """End this connection with a `close` event; the stream is not over, it is cut off."""
        if self._close_reason is None and self.stop_reason is None:
            self._close_reason = reason
            if self.headers_sent and not self.sending and self.busy is None and not self.detached:
                # Before the producer is closed, since its `finally` may take its time.
                goodbye = self._goodbye_bytes()
                if goodbye:
                    self._send_aside(goodbye)
                    self._goodbye = True
            self._stop(reason)

    async def ask_leave(self) -> None:
        """The lease may be somebody else's by now, since it could not be renewed in time: go on only if it is not."""
        if self._renew is not None:
            self.good_until = await self._renew()

    def cut(self) -> None:
        """Drop the connection of a client that does not read."""
        abort_connection(self.send)
        if self._task is not None and self._running:
            self._cancels += 1
            self._task.cancel()

    def _client_left(self) -> None:
        if self.detached or self.stop_reason is not None:
            return
        if self._on_disconnect == "cancel":
            self.detached = True
            self._let_go()
            self._stop("disconnect")
            return
        self.detached = True
        if self._on_disconnect != "finish":
            self._loop_now().call_later(self._on_disconnect, self._stop, "disconnect")

    def _stop(self, reason: str) -> None:
        """Take nothing more from the producer, and wake it if it waits."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._cancel_producer(REPEAT_CANCEL)

    def _cancel_producer(self, patience: float) -> None:
        if self._running and self._task is not None:
            self._cancels += 1
            self._task.cancel()
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop_now().call_later(patience, self._cancel_again, patience)

    def _cancel_again(self, patience: float) -> None:
        if self._running:
            logger.warning(
                "a producer still runs %.0f s after its stream ended (%s); it seems to swallow cancellation",
                patience,
                self.stop_reason,
            )
            self._cancel_producer(patience * 2)

    def _loop_now(self) -> asyncio.AbstractEventLoop:
        assert self._task is not None
        return self._task.get_loop()

    # While the producer waits

    def begin_waiting(self) -> None:
        """The producer suspended for the first time: from now on time passes and the client can leave."""
        self.waiting = True
        assert self._task is not None
        loop = self._task.get_loop()
        self._watcher = loop.create_task(self._watch())
        self.open_streams.add(self)
        self._arm(loop, monotonic())

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            logger.exception("`receive` raised: nobody can tell any more whether this stream's client has left")
            return
        self._client_left()

    def _arm(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        limits = self._limits
        due: list[float] = []
        if not self.headers_sent:
            due.append(self._begun + limits.start_within)
        elif limits.heartbeat and self.format.heartbeat is not None and not self.detached:
            due.append(max(self._sent_at, self.last_item) + limits.heartbeat)
        if limits.first_event and not self.last_item:
            due.append(self._begun + limits.first_event)
        if limits.idle and self.last_item:
            due.append(self.last_item + limits.idle)
        if limits.total:
            due.append(self._begun + limits.total)
        if due:
            delay = min(due) - now
            # Overdue: it could not be sent just now, since a send is under way or a frame is unfinished.
            self._timer = loop.call_later(delay if delay > 0 else 0.25, self._tick)

    def _tick(self) -> None:
        loop = self._loop_now()
        now = monotonic()
        limits = self._limits
        self._timer = None
        if self.stop_reason is not None:
            return
        if limits.total and now >= self._begun + limits.total:
            self._stop("max_duration")
            return
        if limits.first_event and not self.last_item and now >= self._begun + limits.first_event:
            self._stop("first_event_timeout")
            return
        if limits.idle and self.last_item and now >= self.last_item + limits.idle:
            self._stop("idle_timeout")
            if self.sending:
                abort_connection(self.send)  # it is the client that does not read
            return
        if not self.sending and self.busy is None and not self.detached:
            if not self.headers_sent:
                if now >= self._begun + limits.start_within:
                    self._send_aside(self.format.heartbeat or b"")
            elif (
                limits.heartbeat
                and self.format.heartbeat is not None
                and now >= max(self._sent_at, self.last_item) + limits.heartbeat
                and self.format.at_boundary(self.last_body)
            ):
                self._send_aside(self.format.heartbeat)
        self._arm(loop, now)

    def _send_aside(self, body: bytes) -> None:
        """Send from a short task of its own while the producer waits; the relay waits for `busy`."""
        loop = self._loop_now()
        done = self.busy = loop.create_future()
        self._sent_at = monotonic()

        async def send_aside() -> None:
            try:
                if self._sent_at >= self.good_until and self._close_reason is None:
                    await self.ask_leave()
                    if self.stop_reason is not None:
                        return
                if not self.headers_sent:
                    await self.start()
                await self.send({"type": "http.response.body", "body": body, "more_body": True})
            except Exception as exc:
                logger.debug("the client left: %r", exc)
                self._client_left()
            finally:
                self.busy = None
                done.set_result(None)

        task = loop.create_task(send_aside())
        _aside.add(task)
        task.add_done_callback(_aside.discard)

    async def start(self) -> None:
        self.headers_sent = True
        await self.send({"type": "http.response.start", "status": self._status, "headers": self._headers})

    # The end

    async def _finish(self, error: BaseException | None) -> None:
        """Close the producer, send the one ending, release the lease just before the last byte [L1] [W4]."""
        if self._timer is not None:
            self._timer.cancel()
        late: BaseException | None = None
        try:
            await self.source.aclose()
        except Exception as exc:
            if isinstance(exc, RuntimeError) and "GeneratorExit" in str(exc):
                logger.warning("a producer yielded after it had been closed: %r", self.source)
            elif error is None and self.stop_reason is None:
                error = exc
            else:
                late = exc
        if late is not None:
            logger.error("a producer raised while it was closed", exc_info=late)
        outcome = self._outcome(error)
        try:
            await self._end(outcome)
        finally:
            self._let_go()
            if self._watcher is not None:
                self._watcher.cancel()
            if self.waiting:
                self.open_streams.discard(self)
            if self._on_finish is not None:
                await report(self._on_finish, outcome)

    def _outcome(self, error: BaseException | None) -> Outcome:
        reason = self.stop_reason
        duration = monotonic() - self._begun
        if reason in ("first_event_timeout", "idle_timeout", "max_duration"):
            error = ProducerTimeoutError(reason, retryable=reason != "max_duration")
            return Outcome("failed", reason, self.items, error, duration)
        if self._close_reason is not None and reason is not None:
            return Outcome("closed", reason, self.items, None, duration)
        if reason is not None:
            return Outcome("cancelled", reason, self.items, None, duration)
        if error is not None:
            # How servers report a lost client in `send`. A TimeoutError is an OSError too, but a middleware's.
            if isinstance(error, OSError) and not isinstance(error, TimeoutError) and self.sending:
                return Outcome("cancelled", "disconnect", self.items, error, duration)
            return Outcome("failed", type(error).__name__, self.items, error, duration)
        return Outcome("complete", None, self.items, None, duration)

    async def _end(self, outcome: Outcome) -> None:
        if outcome.status == "cancelled" or (self.detached and outcome.status != "failed"):
            return
        error = outcome.error
        if outcome.status == "failed" and error is not None:
            if self.sending:  # nothing more gets out
                if isinstance(error, ProducerTimeoutError):  # the client does not read
                    abort_connection(self.send)
                    return
                raise error  # what a `send` below us raised
            if not self.headers_sent:
                self._let_go()
                raise error
            failure = describe(error)
            logger.error("stream failed (id %s): %r", failure.id, error, exc_info=error)
            if self.detached:
                return
            body = self.format.failed(failure, self.end_id if self.end_event else None)
            if body is None:
                self._let_go()
                raise error  # the server cuts the response short: no client takes it for a whole one
        elif outcome.status == "closed":
            ending = b"" if self._goodbye else self._goodbye_bytes()
            if ending is None or self.sending:
                self._let_go()
                if self.sending or abort_connection(self.send):
                    return
                raise StreamError(f"the connection was ended early ({outcome.reason})")
            body = ending
        else:
            body = self.format.complete(self.end_event, self.end_id) if self.end_event else b""
        if self.busy is not None:
            await asyncio.shield(self.busy)
        if not self.headers_sent:
            await self.start()
        self._let_go()
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _goodbye_bytes(self) -> bytes | None:
        """The `close` event; None where the format has no form for it, and only a cut tells the client."""
        if not self.format.at_boundary(self.last_body):
            return b""  # the application stopped in the middle of a frame of its own
        # Between one and five seconds, so that the clients of a server that restarts do not come back together.
        return self.format.close(self._close_reason or "shutdown", random.randint(1000, 5000))

    def _let_go(self) -> None:
        """Release the lease; calling it again does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


_aside: set[asyncio.Task[None]] = set()  # a task without a reference may be collected before it has run
