"""Leases in Redis, shared by all processes, and what happens while Redis is away.

Each event loop asks over one pipelined connection of its own. One thread a process, the keeper, renews all leases in
batches, hears what other processes tell, and watches its connection for its end. When that ends, leases are checked:
new ones wait a moment for the outcome, those that are held go on. If Redis stays away the limiter counts in memory;
when it is back, the keeper registers what is held before new leases are asked for there [L3] [L4].
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import random
import threading
from enum import Enum
from time import monotonic
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import hiredis
from redis import exceptions

from asgi_stream.config import LeasePolicy, QueueRedisConfig, StreamLeaseConfig
from asgi_stream.errors import BackendError
from asgi_stream.leases.redis_commands import SCRIPTS, Commands, unescape
from asgi_stream.leases.store import Answer, Holder, Listener, Loss, Slot, boot_id
from asgi_stream.loop_thread import LoopThread
from asgi_stream.redis.callers import ClusterCaller, PipeCaller, ask, may_pass
from asgi_stream.redis.locate import Location, OpenConnection, close, connect, connect_to_node
from asgi_stream.redis.pipe import ReplyError, UnavailableError, pack
from asgi_stream.redis.scripts import Call

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

ANSWER_SECONDS = 1.0
"""How long one acquire waits for Redis, and for the outcome of a check, before it counts as away."""
CONNECT_SECONDS = 2.0
CALL_SECONDS = 5.0
PROBE_SECONDS = 0.2
REGISTER_SECONDS = 2.0
"""For so long after Redis came back empty, or another one in its place, processes register what they hold [L4]."""
DRAIN_SECONDS = 2.0
FOREVER = float("inf")


class State(Enum):
    """What is known of Redis."""

    CHECKING = 0
    UP = 1
    AWAY = 2


class RedisLeaseStore:
    """Leases of all processes that share a Redis. Nothing is opened before the first use."""

    def __init__(self, redis: QueueRedisConfig, config: StreamLeaseConfig, listener: Listener) -> None:
        self.commands = Commands(config)
        self.location = Location(redis)
        self._ttl = config.ttl_seconds
        self._listener = listener
        self._thread = LoopThread("asgi_stream leases")
        self._lock = threading.Lock()
        self._fresh()
        _stores.add(self)

    def _fresh(self) -> None:
        self.slots: dict[str, Slot] = {}
        self._waiting: dict[str, Slot] = {}
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, PipeCaller | ClusterCaller] = WeakKeyDictionary()
        self._keeper: _Keeper | None = None
        self._pid = os.getpid()
        self._state = State.CHECKING
        self._settled: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._registering_until = 0.0  # a monotonic time; 0: what is held is registered, everywhere
        self._known: set[bytes] = set()  # the servers whose leases are registered
        self._told = False

    # Asking

    async def acquire(self, slot: Slot, policy: LeasePolicy) -> Answer | None:
        """Ask for *slot*; None while Redis is away.

        After a cancellation the caller releases it, whatever became of it.
        """
        for _ in range(3):
            if not self.admits:
                await self._until_settled()
                if not self.admits:
                    return None
            asked = monotonic()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = self.commands.acquire(slot, policy)
                    got = answer.read(await self._link().evaluate(answer))
            except (UnavailableError, ReplyError, exceptions.RedisError, OSError, TimeoutError) as exc:
                if not may_pass(exc):
                    raise BackendError(f"Redis at {self.location}: {exc}") from exc
                # Whatever became of it. By another name, or what gives it back might come after what takes it again.
                self.release(slot.abandon())
                if isinstance(exc, TimeoutError):
                    self._link().drop()
                self.suspect(exc)
                continue
            if got.granted:
                self.keep(slot, asked)
            elif policy == "wait":
                self._waiting[slot.id] = slot
            return got
        return None

    @property
    def admits(self) -> bool:
        """Whether new leases are asked for in Redis now."""
        if self._pid != os.getpid():
            self._fresh()
        if self._keeper is None:
            self._start()
        return self._state is State.UP and not self._registering_until

    def keep(self, slot: Slot, since: float) -> None:
        """Renew *slot* from now on; Redis has it since the monotonic time *since* at the latest."""
        slot.good_until = since + self._ttl
        self.slots[slot.id] = slot

    def take(self, slot: Slot) -> None:
        """Keep *slot*, which was given to one who waited, and is good for a short time only."""
        self.slots[slot.id] = slot
        self._thread.submit(self.refresh_here(slot))

    def register(self, slot: Slot) -> None:
        """Keep *slot*, which was given while Redis was away: it is registered when that is back."""
        self.slots[slot.id] = slot

    def release(self, slot: Slot) -> None:
        """Give *slot* back. It leaves before anything else that this loop sends, and is sent again until it arrives."""
        self.slots.pop(slot.id, None)
        self._waiting.pop(slot.id, None)
        if self._pid != os.getpid():
            return  # the parent's
        try:
            link = self._links.get(asyncio.get_running_loop())
        except RuntimeError:
            link = None
        sent = None if link is None else link.post(self.commands.release(slot.key, [slot]))
        if sent is None:
            if link is not None or not self._release_by_keeper(slot):
                self._release_later(slot)
            return

        def check(future: asyncio.Future[Any]) -> None:
            if future.cancelled() or future.exception() is not None:
                self._release_later(slot)

        sent.add_done_callback(check)

    def _release_by_keeper(self, slot: Slot) -> bool:
        """For sync code: what it asks for next goes through the same thread, and comes after this."""
        loop = self._thread.loop
        if loop is None or self._keeper is None or self._thread.is_current:
            return False
        try:
            loop.call_soon_threadsafe(self.release, slot)
        except RuntimeError:
            return False  # it has ended
        return True

    def _release_later(self, slot: Slot) -> None:
        keeper = self._keeper
        if keeper is not None:
            keeper.release(slot)

    async def refresh(self, slot: Slot) -> bool:
        """Renew *slot* now; False if it is lost. While Redis is away it is not."""
        await self.call_async(self.refresh_here(slot))
        return slot.id in self.slots

    async def refresh_here(self, slot: Slot) -> None:
        """`refresh` in the keeper's loop."""
        try:
            await self._refresh([slot])
        except (UnavailableError, ReplyError, exceptions.RedisError, OSError) as exc:
            self.suspect(exc)

    async def holders(self, key: str) -> list[Holder]:
        return await self._insist(self.commands.holders(key))

    async def revoke(self, key: str, lease_id: str | None) -> int:
        return await self._insist(self.commands.revoke(key, lease_id))

    async def keys(self) -> list[str]:
        """The keys of all users that hold a lease: by SCAN, for listings. Raises `BackendError`."""
        client = self.location.async_client()
        try:
            if self.location.kind == "cluster":
                await client.initialize()
            names = [name async for name in client.scan_iter(match=self.commands.pattern(), count=1000)]
        except (exceptions.RedisError, OSError) as exc:
            raise BackendError(f"Redis at {self.location}: {exc}") from exc
        finally:
            await close(client)
        found = (name.decode().partition("{")[2] for name in names)
        return sorted({unescape(name[:-1]) for name in found if name.endswith("}")})

    async def _insist(self, call: Call[T]) -> T:
        """Do what may be done twice. Raises `BackendError` when Redis stays away."""
        if not self.admits:
            await self._until_settled()
        deadline = monotonic() + CALL_SECONDS
        while True:
            try:
                return call.read(await self._link().evaluate(call))
            except (UnavailableError, ReplyError, exceptions.RedisError, OSError) as exc:
                if not may_pass(exc) or monotonic() > deadline:
                    raise BackendError(f"Redis at {self.location}: {exc}") from exc
            await asyncio.sleep(0.1)

    # Between threads

    def call(self, coroutine: Any, seconds: float = CALL_SECONDS) -> Any:
        """Run *coroutine* in the keeper's loop and wait for it, from sync code."""
        future = self._thread.submit(coroutine)
        try:
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise BackendError(f"Redis at {self.location} did not answer within {seconds:.0f} s") from None

    async def call_async(self, coroutine: Any) -> Any:
        return await asyncio.wrap_future(self._thread.submit(coroutine))

    async def _until_settled(self) -> None:
        settled = self._settled
        if not settled.done():
            waiting = asyncio.wrap_future(settled)
            await asyncio.wait({waiting}, timeout=ANSWER_SECONDS)

    def _link(self) -> PipeCaller | ClusterCaller:
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            client = self.location.async_client()
            if self.location.kind == "cluster":
                link = ClusterCaller(client)
            else:
                link = PipeCaller(client, SCRIPTS.values(), on_open=self._check_server)
            self._links[loop] = link
        return link

    async def _check_server(self, connection: OpenConnection) -> None:
        """A connection to a server whose leases are not registered yet must not be asked for new ones."""
        if asyncio.get_running_loop() is self._thread.loop:
            return  # it is the keeper's own, which registers them
        run_id, _ = await greet(connection)
        if run_id not in self._known:
            raise UnavailableError("another Redis than before: what is held is registered first")

    def _start(self) -> None:
        with self._lock:
            if self._keeper is None:
                atexit.unregister(_close_all)
                atexit.register(_close_all)
                self._keeper = _Keeper(self)
                self._thread.submit(self._keeper.start())

    # What the keeper finds out

    def suspect(self, why: object) -> None:
        """Something went wrong: have the keeper look before anything else is asked."""
        with self._lock:
            if self._state is not State.UP:
                return
            self._state = State.CHECKING
            self._settled = concurrent.futures.Future()
        logger.info("leases: Redis at %s is checked: %s", self.location, why)
        if self._keeper is not None:
            self._keeper.check()

    def set_up(self, servers: set[bytes], *, empty: bool) -> None:
        """What is held is registered. ``empty``: others may still be doing so."""
        with self._lock:
            self._registering_until = monotonic() + REGISTER_SECONDS if empty else 0.0
            self._known = servers
            self._state = State.UP
            self._settle()
        if self._told:
            self._told = False
            logger.warning("leases: Redis at %s is back; %d leases are registered", self.location, len(self.slots))

    def set_away(self, why: object) -> None:
        """Redis could not be asked: what is held goes on, however long that takes [L4]."""
        with self._lock:
            self._state = State.AWAY
            self._settle()
        for slot in list(self.slots.values()):
            slot.good_until = FOREVER
        if not self._told:
            self._told = True
            logger.warning("leases: Redis at %s is away: %s", self.location, why)

    def _settle(self) -> None:
        if not self._settled.done():
            self._settled.set_result(None)

    async def _refresh(self, slots: list[Slot]) -> None:
        """Renew *slots*; tell of those that are lost. Raises when Redis is away. In the keeper's loop."""
        link = self._link()
        for batch, call in self.commands.refresh(slots, one_key=self.location.kind == "cluster"):
            asked = monotonic()
            results = call.read(await link.evaluate(call))
            for slot, result in zip(batch, results, strict=True):
                if slot.id not in self.slots:
                    self._release_later(slot)  # it was given back meanwhile, and may have been taken again
                elif result > 0:
                    slot.good_until = asked + self._ttl
                else:
                    self.lose(slot.id, "lease_lost")

    def lose(self, lease_id: str, reason: Loss) -> None:
        """Forget a lease that was taken away, and tell."""
        slot = self.slots.pop(lease_id, None)
        if slot is not None:
            self._listener.on_lost(slot, reason)

    def grant(self, lease_id: str) -> None:
        """One who waited has its slot, for a short time at first."""
        slot = self._waiting.pop(lease_id, None)
        if slot is not None:
            self._listener.on_granted(slot)

    # The end

    async def aclose(self) -> None:
        """Send what is to be given back, for at most 2 s, and close the connections. The next use opens others."""
        if self._pid != os.getpid():
            return
        link = self._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            await link.aclose()
        if self._keeper is not None:
            await asyncio.to_thread(self.close)

    def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None or self._pid != os.getpid():
            return
        try:
            self._thread.submit(keeper.stop()).result(DRAIN_SECONDS + 1.0)
        except Exception as exc:
            logger.warning("leases: the connections did not close in order: %r", exc)
        self._thread.stop()
        self._fresh()


class _Keeper:
    """Lives in the store's thread: renews, gives back, hears, watches."""

    def __init__(self, store: RedisLeaseStore) -> None:
        self._store = store
        self._returned: dict[str, tuple[Slot, float]] = {}  # to be given back, and until when
        self._lock = threading.Lock()
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._suspected = False
        self._client: Any = None
        self._watched: list[OpenConnection] = []
        self._beat_at = 0.0
        self._reader = hiredis.Reader()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._client = self._store.location.async_client()
        self._task = asyncio.create_task(self._run())

    def check(self) -> None:
        """Look whether Redis is there. From any thread."""
        self._suspected = True
        self._call_up()

    def release(self, slot: Slot) -> None:
        """Give *slot* back, now or as soon as Redis is there. From any thread."""
        with self._lock:
            self._returned[slot.id] = slot, monotonic() + self._store._ttl
        self._call_up()

    def _call_up(self) -> None:
        if self._loop is not None and self._wake is not None:
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                pass  # it has ended

    async def stop(self) -> None:
        """Give back what is to be given back, then end."""
        for slot in list(self._store.slots.values()):
            self.release(slot)
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._give_back()
        except Exception as exc:
            logger.warning("leases: some are free only when they expire: %r", exc)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for connection in self._watched:
            connection.abort()
        if self._watched:
            await asyncio.wait([connection.lost for connection in self._watched])
        link = self._store._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            await link.aclose()
        if self._client is not None:
            await close(self._client)

    async def _run(self) -> None:
        """Connect, register what is held, keep it; again when that fails."""
        store = self._store
        first = True
        while True:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    servers, young = await self._connect()
                async with asyncio.timeout(CALL_SECONDS):
                    await self._give_back()
                    await store._refresh(list(store.slots.values()))
                store.set_up(servers, empty=young or not (first or servers <= store._known))
                first = False
                store.suspect(await self._keep())
            except asyncio.CancelledError:
                raise
            except Exception as exc:
                if not isinstance(exc, UnavailableError | ReplyError | exceptions.RedisError | OSError):
                    logger.exception("leases: the keeper met an error, and begins anew")
                store.set_away(f"{type(exc).__name__}: {exc}")
            for connection in self._watched:
                connection.abort()
            self._watched = []
            if store._state is State.AWAY:
                await asyncio.sleep(random.uniform(PROBE_SECONDS / 2, PROBE_SECONDS))

    async def _connect(self) -> tuple[set[bytes], bool]:
        """Open what is watched; return the servers' ids, and whether one is young."""
        self._suspected = False
        if self._store.location.kind == "cluster":
            # A new client looks at the cluster anew: an old one remembers the primary that has died.
            old, self._client = self._client, self._store.location.async_client()
            await close(old)
            await self._client.initialize()
            for node in self._client.get_primaries():
                self._watched.append(await connect_to_node(node))  # one by one: the next may fail
        else:
            self._watched.append(await connect(self._client))
        servers, young = set(), False
        for connection in self._watched:
            run_id, uptime = await greet(connection)
            servers.add(run_id)
            young = young or uptime < REGISTER_SECONDS
        self._reader = hiredis.Reader()
        self._watched[0].listen(self._receive)
        self._watched[0].write(pack("SUBSCRIBE", self._store.commands.channels + boot_id()))
        return servers, young

    async def _keep(self) -> str:
        """Renew and give back until something is wrong; return what."""
        assert self._wake is not None
        store = self._store
        self._beat_at = store._registering_until or monotonic() + self._interval()
        await self._register()
        lost: list[asyncio.Future[Any]] = [connection.lost for connection in self._watched]
        while True:
            waking: asyncio.Future[Any] = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait(
                    [waking, *lost],
                    timeout=max(self._beat_at - monotonic(), 0.0),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                waking.cancel()
            self._wake.clear()
            if any(one.done() for one in lost):
                return "a connection was lost"
            if self._suspected:
                return "an answer did not come"
            async with asyncio.timeout(CALL_SECONDS):
                await self._give_back()
                if monotonic() >= self._beat_at:
                    self._beat_at = monotonic() + self._interval()
                    await store._refresh(list(store.slots.values()))
                    await self._register()

    async def _register(self) -> None:
        """Register what was given without Redis, and only then, when all had time for that, ask there again."""
        store = self._store
        if store._registering_until > monotonic():
            return
        while unregistered := [slot for slot in list(store.slots.values()) if slot.good_until == FOREVER]:
            await store._refresh(unregistered)
        store._registering_until = 0.0

    def _interval(self) -> float:
        return self._store._ttl / 3 * random.uniform(0.8, 1.0)

    async def _give_back(self) -> None:
        with self._lock:
            now = monotonic()
            returned = [slot for slot, until in self._returned.values() if until > now]
            self._returned = {slot.id: self._returned[slot.id] for slot in returned}
        by_key: dict[str, list[Slot]] = {}
        for slot in returned:
            by_key.setdefault(slot.key, []).append(slot)
        link = self._store._link()
        keys = list(by_key)
        for begin in range(0, len(keys), 200):
            batch = keys[begin : begin + 200]
            await asyncio.gather(*(link.evaluate(self._store.commands.release(key, by_key[key])) for key in batch))
            with self._lock:
                for key in batch:
                    for slot in by_key[key]:
                        self._returned.pop(slot.id, None)

    def _receive(self, data: bytes) -> None:
        self._reader.feed(data)
        while (message := self._reader.gets()) is not False:
            if not isinstance(message, list) or message[0] != b"message":
                continue
            verb, _, lease_id = message[2].decode().partition(" ")
            if verb == "granted":
                self._store.grant(lease_id)
            elif verb in ("superseded", "revoked"):
                self._store.lose(lease_id, verb)


async def greet(connection: OpenConnection) -> tuple[bytes, float]:
    """Ask a server who it is: its run id, and since how many seconds it runs."""
    try:
        (info,) = await ask(connection, [("INFO", "server")])
    except ReplyError as exc:
        if str(exc).startswith("NOPERM"):
            return b"", 0.0  # nobody tells: taken for another one each time
        raise
    facts = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    return facts.get(b"run_id", b""), float(facts.get(b"uptime_in_seconds", b"0"))


_stores: WeakSet[RedisLeaseStore] = WeakSet()


def _close_all() -> None:
    for store in list(_stores):
        store.close()
