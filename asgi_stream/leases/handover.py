"""Who releases a lease: the block that took it, the response built in it, or the request around it [L1].

The trap: leaving ``async with stream_lease(…)`` in an endpoint happens before the first byte is sent, so a lease
released there would limit nothing. It is handed over instead:

1. to a response, by ``lease=`` or because it was built inside the block (`take_current`);
2. else to the request's `Hold`, which the middleware and the dependency make;
3. else the end of the block releases it and warns.

A block inside a generator, a WebSocket handler or a running stream is simply held to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from time import monotonic
from types import FrameType, TracebackType
from typing import Literal

from asgi_stream.errors import StreamLeaseWarning, StreamLimitExceeded
from asgi_stream.leases.limiter import StreamLease, StreamLeaseLimiter
from asgi_stream.leases.store import Loss

_STEP_OF_A_TASK = asyncio.Handle._run.__code__
_GENERATOR = inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR


class Hold:
    """The leases of one request. Mutable, since a `ContextVar` set by inner code is not seen outside of it."""

    __slots__ = ("chosen", "claimed", "closed", "kind", "leases", "loop", "lost", "on_lost", "refusal", "streaming")

    def __init__(self, kind: Literal["http", "websocket"] = "http") -> None:
        self.kind = kind
        self.loop = asyncio.get_running_loop()
        self.lost: Loss | None = None  # why a lease of this request was taken away
        self.on_lost: Callable[[Loss], None] | None = None  # who ends the response then
        self.leases: list[StreamLease] = []
        self.chosen: StreamLease | None = None  # the middleware's own choice: an explicit key replaces it
        self.streaming = False  # the response has begun
        self.claimed = False  # an EventStreamResponse decides when to release
        self.closed = False  # tasks that outlive the request still see this object
        self.refusal: StreamLimitExceeded | None = None

    def find(self, key: str) -> StreamLease | None:
        for lease in self.leases:
            if lease.key == key and lease.held:
                return lease
        return None

    def add(self, lease: StreamLease) -> None:
        """Keep a lease that somebody asked for; it replaces the one that the middleware chose."""
        if self.chosen is not None:
            self.leases.remove(self.chosen)
            self.chosen.release()
            self.chosen = None
        self.leases.append(lease)
        lease.on_lost(self._lose, self.loop)

    def choose(self, lease: StreamLease) -> None:
        """Keep a lease that the middleware took because nobody had asked for one."""
        self.chosen = lease
        self.leases.append(lease)
        lease.on_lost(self._lose, self.loop)

    def watch(self, on_lost: Callable[[Loss], None]) -> None:
        """Call *on_lost*, in place of whoever was to be called, when a lease of this request is lost."""
        self.on_lost = on_lost
        if self.lost is not None:
            on_lost(self.lost)

    @property
    def good_until(self) -> float:
        """The monotonic time after which a lease of this request may be somebody else's."""
        return min([lease.good_until for lease in self.leases if lease.held], default=float("inf"))

    def _lose(self, reason: Loss) -> None:
        if not self.closed and self.lost is None:
            self.lost = reason
            if self.on_lost is not None:
                self.on_lost(reason)

    def release(self) -> None:
        """The stream is over."""
        self.closed = True
        for lease in self.leases:
            lease.release()


current_hold: ContextVar[Hold | None] = ContextVar("asgi_stream_hold", default=None)
_current_lease: ContextVar[StreamLease | None] = ContextVar("asgi_stream_lease", default=None)


def open_hold() -> Hold | None:
    """The hold of the request that this code runs in, if there is one and it is not over."""
    hold = current_hold.get()
    return hold if hold is not None and not hold.closed else None


def take_current() -> StreamLease | None:
    """Hand the lease of the block around this code over to the caller, if there is one that nobody has taken."""
    lease = _current_lease.get()
    if lease is None or not lease.held or lease.handed_over:
        return None
    lease.handed_over = True
    return lease


class Terms:
    """What a response has to do with leases: the one that was handed over to it, and those of its request."""

    __slots__ = ("_hold", "_lease")

    def __init__(self, lease: StreamLease | None, hold: Hold | None) -> None:
        self._lease = lease
        self._hold = hold

    def __bool__(self) -> bool:
        return self._lease is not None or self._hold is not None

    @property
    def good_until(self) -> float:
        """The monotonic time after which nothing may be sent without `renew`."""
        soonest = float("inf") if self._hold is None else self._hold.good_until
        return soonest if self._lease is None else min(soonest, self._lease.good_until)

    async def renew(self) -> float:
        """Ask whether the leases still hold, if they may not; return until when they do."""
        leases = [] if self._hold is None else [lease for lease in self._hold.leases if lease.held]
        if self._lease is not None and self._lease not in leases:
            leases.append(self._lease)
        for lease in leases:
            if lease.good_until <= monotonic():
                await lease.refresh_async()
        await asyncio.sleep(0)  # whoever watches for the loss has heard of it now
        return self.good_until

    def watch(self, on_lost: Callable[[Loss], None]) -> None:
        """Call *on_lost* when one of the leases is lost."""
        if self._hold is not None:
            self._hold.watch(on_lost)
        if self._lease is not None:
            self._lease.on_lost(on_lost)

    def release(self) -> None:
        """The stream is over."""
        if self._lease is not None:
            self._lease.release()
        if self._hold is not None:
            self._hold.release()


class LeaseBlock:
    """``async with`` (or ``with``) around a lease. It is made by `stream_lease()`."""

    __slots__ = ("_key", "_lease", "_limit", "_limiter", "_place", "_tenant", "_token", "_weight")

    def __init__(
        self,
        limiter: Callable[[], StreamLeaseLimiter],
        key: str,
        limit: int | None,
        *,
        weight: int = 1,
        tenant: str | None = None,
    ) -> None:
        self._limiter = limiter
        self._key = key
        self._limit = limit
        self._weight = weight
        self._tenant = tenant
        self._lease: StreamLease | None = None
        self._place: Literal["block", "dependency", "generator"] = "block"
        self._token: Token[StreamLease | None] | None = None

    async def __aenter__(self) -> StreamLease:
        place = _place(sys._getframe(1))
        hold = open_hold()
        shared = self._shared(hold)
        if shared is not None:
            return shared
        limiter = self._limiter()
        try:
            if limiter.is_immediate:
                lease = limiter.acquire_key(self._key, limit=self._limit, weight=self._weight)
            else:
                lease = await limiter.acquire_key_async(
                    self._key, limit=self._limit, weight=self._weight, tenant=self._tenant
                )
        except StreamLimitExceeded as exc:
            if hold is not None:
                hold.refusal = exc
            raise
        return self._entered(lease, place, hold)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._exit(exc_type, sys._getframe(1))

    def __enter__(self) -> StreamLease:
        place = _place(sys._getframe(1))
        hold = open_hold()
        shared = self._shared(hold)
        if shared is not None:
            return shared
        try:
            lease = self._limiter().acquire_key(self._key, limit=self._limit, weight=self._weight, tenant=self._tenant)
        except StreamLimitExceeded as exc:
            if hold is not None:
                hold.refusal = exc
            raise
        return self._entered(lease, place, hold)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._exit(exc_type, sys._getframe(1))

    def _shared(self, hold: Hold | None) -> StreamLease | None:
        """The lease that the request has under the same key."""
        shared = None if hold is None else hold.find(self._key)
        if shared is not None and hold is not None and shared is hold.chosen:
            hold.chosen = None  # asked for now: another key no longer replaces it
        return shared

    def _entered(
        self, lease: StreamLease, place: Literal["block", "dependency", "generator"], hold: Hold | None
    ) -> StreamLease:
        self._lease = lease
        self._place = place
        if hold is not None and (hold.kind == "websocket" or hold.streaming):
            self._place = "generator"
        if self._place == "generator":
            if hold is not None:
                lease.on_lost(hold._lose, hold.loop)
        else:
            if hold is not None:
                hold.add(lease)
            self._token = _current_lease.set(lease)
        return lease

    def _exit(self, exc_type: type[BaseException] | None, frame: FrameType) -> None:
        lease, self._lease = self._lease, None
        if self._token is not None:
            try:
                _current_lease.reset(self._token)
            except ValueError:  # left in another context than entered, as sync dependencies are
                _current_lease.set(None)
            self._token = None
        if lease is None:  # shared with the request, which releases it
            return
        if self._place == "generator" or (exc_type is not None and not lease.streaming):
            lease.release()
            return
        if lease.handed_over or open_hold() is not None:
            return
        lease.release()
        if exc_type is None and self._place == "block" and _in_http_request(frame):
            _warn_released(frame)


def _place(frame: FrameType | None) -> Literal["block", "dependency", "generator"]:
    """Where the block stands: in a generator that is itself the stream, in a dependency of FastAPI, or elsewhere.

    A generator under ``@asynccontextmanager`` is a block of its caller. FastAPI wraps its dependencies so, and leaves
    them after the response's body.
    """
    if frame is None or not frame.f_code.co_flags & _GENERATOR:
        return "block"
    caller = frame.f_back
    wrapped = False
    while caller is not None and caller.f_code.co_filename == contextlib.__file__:
        wrapped = True
        caller = caller.f_back
    if not wrapped:
        return "generator"
    of_fastapi = caller is not None and str(caller.f_globals.get("__name__", "")).startswith("fastapi.")
    return "dependency" if of_fastapi else "block"


def _in_http_request(frame: FrameType | None) -> bool:
    """Whether an HTTP request is being served here: only there does a block's end come before the stream.

    It looks for the server's ``scope`` among the callers: the block has no other way to tell a request from a worker
    or a WebSocket. Only reached when a lease is released by its block, never on the way of a stream that limits.
    """
    if asyncio._get_running_loop() is None and threading.current_thread().name.startswith("AnyIO worker thread"):
        return True  # a `def` endpoint; its caller is in another thread
    while frame is not None:
        code = frame.f_code
        if code is _STEP_OF_A_TASK:
            return False  # beyond it is the event loop, which serves everybody
        if "scope" in code.co_varnames or "scope" in code.co_freevars:  # to read a frame's variables costs more
            scope = frame.f_locals.get("scope")
            if isinstance(scope, dict) and "type" in scope:
                return bool(scope["type"] == "http")
        frame = frame.f_back
    return False


def _warn_released(frame: FrameType) -> None:
    warnings.warn_explicit(
        "this lease was released at the end of its block, before the response began to stream, so it limits nothing. "
        "Add `app.add_middleware(StreamLeaseMiddleware)`, or return `EventStreamResponse(generate(), lease=lease)`",
        StreamLeaseWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        registry=_warned,
    )


_warned: dict[tuple[str, type[Warning], int] | str, int] = {}
