"""`StreamLeaseLimiter` gives out leases; a `StreamLease` is one of them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any, TypeVar
from weakref import ref

from asgi_stream.config import LeaseLimit, LeasePolicy, QueueRedisConfig, StreamLeaseConfig
from asgi_stream.errors import BackendError, ConfigurationError, StreamLimitExceeded
from asgi_stream.leases.memory import MemoryLeaseStore
from asgi_stream.leases.policy import GLOBAL_KEY, RetryEstimate, tenant_key, user_key
from asgi_stream.leases.store import Answer, Holder, Loss, Slot

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

FOREVER = float("inf")
ASK_AGAIN = 10.0
"""Seconds after which one who waits says that it is still there, and learns its position."""
MAX_WEIGHT = 100

OnLost = Callable[[Loss], None]
OnPosition = Callable[[int], None]


class StreamLease:
    """One of a user's slots. It is held until `release()`, or until nothing refers to it any more.

    ``key`` is what it counts under. ``lost`` turns true when the slot was taken away, and ``reason`` says why:
    ``lease_lost``, ``superseded`` or ``revoked``. Leases renew themselves: `refresh()` is never needed, and tells
    whether the lease still holds.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_limiter",
        "_since",
        "_slots",
        "_watchers",
        "handed_over",
        "key",
        "lost",
        "reason",
        "streaming",
    )

    def __init__(self, limiter: StreamLeaseLimiter, slot: Slot) -> None:
        self.key = slot.key
        self.lost = False
        self.reason: Loss | None = None
        self.handed_over = False  # a response releases it, not the block that took it
        self.streaming = False  # that response has begun
        self._limiter = limiter
        self._slots: tuple[Slot, ...] = (slot,)
        self._held = True
        self._since = monotonic()
        self._watchers: list[tuple[asyncio.AbstractEventLoop, OnLost]] = []

    @property
    def id(self) -> str:
        """What listings show it as, and `StreamLeaseLimiter.revoke` takes."""
        return self._slots[0].id

    @property
    def held(self) -> bool:
        """Whether it still counts."""
        return self._held

    @property
    def good_until(self) -> float:
        """The monotonic time after which it may be somebody else's, unless it is renewed before."""
        return min([slot.good_until for slot in self._slots])

    def on_lost(self, watcher: OnLost, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Call *watcher* with the reason, in the running event loop or *loop*, when the lease is lost."""
        self._watchers.append((loop or asyncio.get_running_loop(), watcher))
        if self.lost:
            self._tell()

    def refresh(self) -> bool:
        """Renew the lease now; return whether it still holds."""
        if self._held:
            self._limiter._refresh(self)
        return self._held

    async def refresh_async(self) -> bool:
        """`refresh()` for async code."""
        if self._held:
            await self._limiter._refresh_async(self)
        return self._held

    def release(self) -> None:
        """Give the slot back, without waiting for Redis. Calling it again does nothing."""
        if self._held:
            self._held = False
            self._limiter._released(self)

    async def release_async(self) -> None:
        """`release()` for async code."""
        self.release()

    def _lose(self, reason: Loss) -> None:
        if self._held:
            self._held = False
            self.lost, self.reason = True, reason
            self._limiter._give_back(self._slots)
            self._tell()

    def _tell(self) -> None:
        watchers, self._watchers = self._watchers, []
        assert self.reason is not None
        for loop, watcher in watchers:
            try:
                loop.call_soon_threadsafe(watcher, self.reason)
            except RuntimeError:
                pass  # that event loop is over, and its streams with it

    def __del__(self) -> None:
        # A response that was built and never sent, or a task that was dropped: its slot must not be gone for ever.
        if self._held:
            self.release()

    def __repr__(self) -> str:
        return f"<StreamLease {self.key!r} {'held' if self._held else 'lost' if self.lost else 'released'}>"


class StreamLeaseLimiter:
    """At most ``config.limit`` leases for each user: over all processes that share ``redis``, or in this one.

    ``refusal`` makes the exception of a refusal; `Streaming` gives one that is an HTTP response as well.
    """

    def __init__(
        self,
        config: StreamLeaseConfig | None = None,
        *,
        redis: QueueRedisConfig | None = None,
        refusal: Callable[..., StreamLimitExceeded] = StreamLimitExceeded,
    ) -> None:
        if config is not None and not isinstance(config, StreamLeaseConfig):
            raise ConfigurationError(f"config must be a StreamLeaseConfig, not {type(config).__name__}")
        self.config = config or StreamLeaseConfig()
        self._refusal = refusal
        self._memory = MemoryLeaseStore(self)  # with Redis, it has what this process holds there, too
        self._estimate = RetryEstimate()
        self._waiting: dict[Slot, Callable[[], None]] = {}
        self._one_scope = not (self.config.tenant_limit or self.config.global_limit)
        self._immediate = redis is None and self._one_scope and config_is_plain(self.config)
        self._redis = None
        if redis is not None:
            from asgi_stream.leases.redis import RedisLeaseStore

            self._redis = RedisLeaseStore(redis, self.config, self)

    @property
    def limit(self) -> LeaseLimit:
        """How many leases a user may hold at once, or what tells it."""
        return self.config.limit

    @property
    def is_immediate(self) -> bool:
        """Whether a lease is given or refused without any waiting: in memory, by one number."""
        return self._immediate

    def in_use_key(self, key: str) -> int:
        """`in_use()` for a key that has its type already."""
        return self._memory.in_use(key)

    # Taking

    def acquire(
        self, user_id: str, *, limit: int | None = None, weight: int = 1, tenant: str | None = None
    ) -> StreamLease:
        """Take a lease for *user_id*. Raises `StreamLimitExceeded`, and `BackendError` where Redis has to be there.

        ``limit`` replaces the configured one; ``weight``: it counts so many times; ``tenant``: whose user it is, for
        ``tenant_limit``. With the policy ``"wait"`` it blocks until it is its turn.
        """
        return self.acquire_key(user_key(user_id), limit=limit, weight=weight, tenant=tenant)

    async def acquire_async(
        self,
        user_id: str,
        *,
        limit: int | None = None,
        weight: int = 1,
        tenant: str | None = None,
        on_position: OnPosition | None = None,
    ) -> StreamLease:
        """`acquire()` for async code. A cancellation leaves no slot taken.

        With the policy ``"wait"``, ``on_position`` is told how many wait before it, now and then.
        """
        return await self.acquire_key_async(
            user_key(user_id), limit=limit, weight=weight, tenant=tenant, on_position=on_position
        )

    def acquire_key(
        self, key: str, *, limit: int | None = None, weight: int = 1, tenant: str | None = None
    ) -> StreamLease:
        """`acquire()` for a key that has its type already (see `leases.policy`)."""
        if self._redis is not None:
            redis = self._redis
            redis.admits  # noqa: B018 - starts what is needed
            return redis.call(  # type: ignore[no-any-return]
                self.acquire_key_async(key, limit=limit, weight=weight, tenant=tenant),
                self.config.wait_timeout + 10.0,
            )
        if self.is_immediate:
            slot = self._slots(key, self.config.limit if limit is None else limit, weight, tenant)[0]
            answer = self._memory.acquire(slot)
            if answer.granted:
                return self._lease([slot])
            raise self._refuse(slot, answer)
        if limit is None:
            told = self._limit_of(key)
            if inspect.isawaitable(told):
                if inspect.iscoroutine(told):
                    told.close()
                raise ConfigurationError("limit= is an async function: take leases with `async with`, or make it sync")
            limit = told
        slots = self._slots(key, limit, weight, tenant)
        taken: list[Slot] = []
        try:
            for slot in self._in_order(slots):
                answer = self._memory.acquire(slot, self._policy(slot))
                if not answer.granted and self.config.policy == "wait":
                    answer = self._wait_sync(slot, answer)
                if not answer.granted:
                    raise self._refuse(slot, answer)
                taken.append(slot)
        except BaseException:
            self._give_back(taken)
            raise
        return self._lease(slots)

    async def acquire_key_async(
        self,
        key: str,
        *,
        limit: int | None = None,
        weight: int = 1,
        tenant: str | None = None,
        on_position: OnPosition | None = None,
    ) -> StreamLease:
        """`acquire_async()` for a key that has its type already (see `leases.policy`)."""
        if limit is None:
            told = self._limit_of(key)
            limit = await told if inspect.isawaitable(told) else told
        slots = self._slots(key, limit, weight, tenant)
        taken: list[Slot] = []
        try:
            for slot in self._in_order(slots):
                taken.append(slot)  # before it is asked for: to give it back is right whatever became of that
                answer = await self._ask(slot)
                if not answer.granted and self.config.policy == "wait":
                    answer = await self._wait(slot, answer, on_position)
                if not answer.granted:
                    taken.pop()
                    raise self._refuse(slot, answer)
        except BaseException:
            self._give_back(taken)
            raise
        return self._lease(slots)

    def _limit_of(self, key: str) -> int | Awaitable[int]:
        limit = self.config.limit
        return limit(key.partition(":")[2]) if callable(limit) else limit

    def _slots(self, key: str, limit: Any, weight: int, tenant: str | None) -> list[Slot]:
        if type(limit) is not int or limit < 1:
            raise ConfigurationError(f"limit must be a whole number of at least 1, not {limit!r}")
        if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
            raise ConfigurationError(f"weight must be a whole number from 1 to {MAX_WEIGHT}, not {weight!r}")
        slots = [Slot(key, weight, limit)]
        if self._one_scope:
            return slots
        config = self.config
        if tenant is not None and config.tenant_limit is not None:
            slots.append(Slot(tenant_key(tenant), weight, config.tenant_limit, "tenant"))
        if config.global_limit is not None:
            slots.append(Slot(GLOBAL_KEY, weight, config.global_limit, "global"))
        return slots

    def _in_order(self, slots: list[Slot]) -> list[Slot]:
        """In which order to ask. Nobody's stream gives way to one that a wider scope refuses then."""
        return slots[::-1] if self.config.policy == "evict_oldest" else slots

    def _lease(self, slots: list[Slot]) -> StreamLease:
        lease = StreamLease(self, slots[0])
        if len(slots) > 1:
            lease._slots = tuple(slots)
        owner = ref(lease)
        for slot in slots:
            slot.owner = owner
        return lease

    def _refuse(self, slot: Slot, answer: Answer) -> StreamLimitExceeded:
        wait = self._estimate.retry_after(slot.limit)
        return self._refusal(slot.key, limit=slot.limit, in_use=answer.in_use, retry_after=wait, scope=slot.scope)

    def _policy(self, slot: Slot) -> LeasePolicy:
        """Nobody's stream gives way to another user's."""
        policy = self.config.policy
        return "reject" if policy == "evict_oldest" and slot.scope != "user" else policy

    async def _ask(self, slot: Slot) -> Answer:
        redis = self._redis
        if redis is None:
            return self._memory.acquire(slot, self._policy(slot))
        answer = await redis.acquire(slot, self._policy(slot))
        if answer is not None:
            if answer.granted:
                self._memory.force(slot)
            return answer
        # Redis is away.
        if self.config.fallback == "closed":
            raise BackendError(f"no stream may begin while Redis at {redis.location} is away (fallback='closed')")
        if self.config.fallback == "open":
            self._memory.force(slot)
            answer = Answer(True, 0)
        else:
            answer = self._memory.acquire(slot, self._policy(slot))
        if answer.granted:
            redis.register(slot)
        return answer

    # Waiting

    async def _wait(self, slot: Slot, answer: Answer, on_position: OnPosition | None) -> Answer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.wait_timeout
        woken = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:
                pass

        self._waiting[slot] = wake
        try:
            # Asked again: it may have been given between the first answer and the line above.
            answer = await self._ask(slot)
            while not answer.granted:
                if on_position is not None:
                    on_position(answer.position)
                left = deadline - loop.time()
                if left <= 0:
                    self._give_back([slot])
                    return answer
                try:
                    async with asyncio.timeout(min(left, ASK_AGAIN)):
                        await woken.wait()
                except TimeoutError:
                    if loop.time() < deadline:
                        answer = await self._ask(slot)
                    continue
                woken.clear()
                answer = self._given(slot)
        finally:
            self._waiting.pop(slot, None)
        return answer

    def _given(self, slot: Slot) -> Answer:
        """One who waited was told that it has its slot."""
        if self._redis is not None:
            self._memory.force(slot)
            self._redis.take(slot)
        return Answer(True, 0)

    def _wait_sync(self, slot: Slot, answer: Answer) -> Answer:
        woken = threading.Event()
        self._waiting[slot] = woken.set
        try:
            # Asked again: it may have been given between the first answer and the line above.
            if self._memory.acquire(slot, "wait").granted or woken.wait(self.config.wait_timeout):
                return Answer(True, 0)
        finally:
            self._waiting.pop(slot, None)
        self._memory.release(slot)
        return answer

    # What the stores tell

    def on_granted(self, slot: Slot) -> None:
        wake = self._waiting.get(slot)
        if wake is not None:
            wake()

    def on_lost(self, slot: Slot, reason: Loss) -> None:
        lease = None if slot.owner is None else slot.owner()
        if isinstance(lease, StreamLease):
            lease._lose(reason)
        else:
            self._give_back([slot])  # its lease is being made: it finds out when it is renewed

    # Holding

    def in_use(self, user_id: str) -> int:
        """How many leases *user_id* holds now, as far as this process knows: all of them without Redis."""
        return self._memory.in_use(user_key(user_id))

    async def holders_async(self, user_id: str) -> list[Holder]:
        """List who holds *user_id*'s slots, in all processes, the oldest first, then who waits."""
        return await self._holders(user_key(user_id))

    def holders(self, user_id: str) -> list[Holder]:
        """`holders_async()` for sync code."""
        if self._redis is None:
            return self._memory.holders(user_key(user_id))
        return self._call(self._holders(user_key(user_id)))

    async def revoke_async(self, *, user: str | None = None, lease: str | None = None) -> int:
        """Take away one lease, by its id, or all of a user's, in all processes; return how many.

        Their streams end with `close` (`revoked`). With *lease* alone its user is looked for.
        """
        if user is None and lease is None:
            raise ConfigurationError("revoke() takes user=, lease= or both")
        if user is not None:
            return await self._revoke(user_key(user), lease)
        for key in await self._keys():
            if count := await self._revoke(key, lease):
                return count
        return 0

    def revoke(self, *, user: str | None = None, lease: str | None = None) -> int:
        """`revoke_async()` for sync code."""
        if self._redis is not None:
            return self._call(self.revoke_async(user=user, lease=lease))
        if user is None and lease is None:
            raise ConfigurationError("revoke() takes user=, lease= or both")
        keys = self._memory.keys() if user is None else [user_key(user)]
        return sum(self._memory.revoke(key, lease) for key in keys)

    async def list_async(self) -> list[Holder]:
        """List every lease that is held. For people: it looks through all of Redis's keys."""
        return [holder for key in await self._keys() for holder in await self._holders(key)]

    async def _holders(self, key: str) -> list[Holder]:
        return self._memory.holders(key) if self._redis is None else await self._redis.holders(key)

    async def _revoke(self, key: str, lease: str | None) -> int:
        if self._redis is None:
            return self._memory.revoke(key, lease)
        count = await self._redis.revoke(key, lease)
        return max(count, self._memory.revoke(key, lease))  # here are those, too, that Redis does not have yet

    async def _keys(self) -> list[str]:
        return self._memory.keys() if self._redis is None else await self._redis.keys()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._redis is not None
        return self._redis.call(coroutine)  # type: ignore[no-any-return]

    def _refresh(self, lease: StreamLease) -> None:
        if self._redis is not None:
            self._call(self._refresh_async(lease))

    async def _refresh_async(self, lease: StreamLease) -> None:
        redis = self._redis
        if redis is None:
            return
        for slot in lease._slots:
            await redis.refresh(slot)

    def _released(self, lease: StreamLease) -> None:
        self._give_back(lease._slots)
        self._estimate.observe(monotonic() - lease._since)

    def _give_back(self, slots: tuple[Slot, ...] | list[Slot]) -> None:
        redis = self._redis
        for slot in slots:
            if redis is not None:
                redis.release(slot)
            self._memory.release(slot)

    def close(self) -> None:
        """Give back what is held, and close the connections. The next use opens others."""
        if self._redis is not None:
            self._redis.close()

    async def aclose(self) -> None:
        """`close()` for async code."""
        if self._redis is not None:
            await self._redis.aclose()


def config_is_plain(config: StreamLeaseConfig) -> bool:
    """Whether there is nothing to ask and nobody to wait for."""
    return not callable(config.limit) and config.policy == "reject"
