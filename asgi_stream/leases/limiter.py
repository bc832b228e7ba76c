"""`StreamLeaseLimiter` gives out leases; a `StreamLease` is one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import monotonic

from asgi_stream.config import StreamLeaseConfig
from asgi_stream.errors import ConfigurationError, StreamLimitExceeded
from asgi_stream.leases.memory import MemoryLeaseStore
from asgi_stream.leases.policy import RetryEstimate, user_key
from asgi_stream.leases.store import LeaseStore

_next_id = itertools.count(1).__next__


class StreamLease:
    """One of a user's slots. It is held until `release()`, or until nothing refers to it any more.

    ``key`` is what it counts under, ``lost`` turns true when the slot was taken away. Leases renew themselves:
    `refresh()` is never needed, and tells whether the lease still holds.
    """

    __slots__ = ("__weakref__", "_held", "_id", "_limiter", "_since", "handed_over", "key", "lost", "streaming")

    def __init__(self, limiter: StreamLeaseLimiter, key: str, lease_id: int) -> None:
        self.key = key
        self.lost = False
        self.handed_over = False  # a response releases it, not the block that took it
        self.streaming = False  # that response has begun
        self._limiter = limiter
        self._id = lease_id
        self._held = True
        self._since = monotonic()

    @property
    def held(self) -> bool:
        """Whether it still counts."""
        return self._held

    def refresh(self) -> bool:
        """Renew the lease now; return whether it still holds."""
        if self._held and not self._limiter._store.refresh(self.key, self._id):
            self._held, self.lost = False, True
        return self._held

    async def refresh_async(self) -> bool:
        """`refresh()` for async code."""
        return self.refresh()

    def release(self) -> None:
        """Give the slot back. Calling it again does nothing."""
        if self._held:
            self._held = False
            self._limiter._released(self)

    async def release_async(self) -> None:
        """`release()` for async code."""
        self.release()

    def __del__(self) -> None:
        # A response that was built and never sent, or a task that was dropped: its slot must not be gone for ever.
        if self._held:
            self.release()

    def __repr__(self) -> str:
        return f"<StreamLease {self.key!r} {'held' if self._held else 'lost' if self.lost else 'released'}>"


class StreamLeaseLimiter:
    """At most ``config.limit`` leases for each user.

    ``refusal`` makes the exception of a refusal; `Streaming` gives one that is an HTTP response as well.
    """

    def __init__(
        self,
        config: StreamLeaseConfig | None = None,
        *,
        refusal: Callable[..., StreamLimitExceeded] = StreamLimitExceeded,
    ) -> None:
        if config is not None and not isinstance(config, StreamLeaseConfig):
            raise ConfigurationError(f"config must be a StreamLeaseConfig, not {type(config).__name__}")
        self.config = config or StreamLeaseConfig()
        self._refusal = refusal
        self._store: LeaseStore = MemoryLeaseStore()
        self._estimate = RetryEstimate()

    @property
    def limit(self) -> int:
        """How many leases a user may hold at once."""
        return self.config.limit

    def acquire(self, user_id: str, *, limit: int | None = None) -> StreamLease:
        """Take a lease for *user_id*; ``limit`` replaces the configured one. Raises `StreamLimitExceeded`."""
        return self.acquire_key(user_key(user_id), limit=limit)

    async def acquire_async(self, user_id: str, *, limit: int | None = None) -> StreamLease:
        """`acquire()` for async code."""
        return self.acquire(user_id, limit=limit)

    def acquire_key(self, key: str, *, limit: int | None = None) -> StreamLease:
        """`acquire()` for a key that has its type already (see `leases.policy`)."""
        if limit is None:
            limit = self.config.limit
        elif type(limit) is not int or limit < 1:
            raise ConfigurationError(f"limit must be a whole number of at least 1, not {limit!r}")
        lease_id = _next_id()
        in_use = self._store.acquire(key, lease_id, limit)
        if in_use is None:
            return StreamLease(self, key, lease_id)
        raise self._refusal(key, limit=limit, in_use=in_use, retry_after=self._estimate.retry_after(limit))

    def in_use(self, user_id: str) -> int:
        """How many leases *user_id* holds now."""
        return self._store.in_use(user_key(user_id))

    def _released(self, lease: StreamLease) -> None:
        if self._store.release(lease.key, lease._id):
            self._estimate.observe(monotonic() - lease._since)
