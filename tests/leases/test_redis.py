"""Leases in Redis when things go wrong [L2] [L3] [L4]."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as driver

from asgi_stream import QueueRedisConfig, StreamLease, StreamLeaseConfig, StreamLeaseLimiter, StreamLimitExceeded
from asgi_stream.errors import BackendError
from asgi_stream.redis import callers
from asgi_stream.redis.embedded import EmbeddedRedis
from tests.leases.test_stores import until, until_old
from tests.redis.proxy import FaultProxy
from tests.redis_server import REFUSALS, Refusal, start_redis

pytestmark = pytest.mark.anyio

HANG = 20.0
_names = itertools.count(1)

Make = Callable[..., StreamLeaseLimiter]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[StreamLeaseLimiter] = []
    namespace = f"fault-{os.getpid()}-{next(_names)}"

    def make(url: str, **settings: Any) -> StreamLeaseLimiter:
        config = StreamLeaseConfig(**{"key_namespace": namespace, **settings})
        made.append(StreamLeaseLimiter(config, redis=QueueRedisConfig(url)))
        return made[-1]

    yield make
    for limiter in made:
        await limiter.aclose()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server of the test's own, which keeps nothing over a restart."""
    server = start_redis()
    yield server
    server.stop()


async def take(limiter: StreamLeaseLimiter, user: str, count: int) -> list[StreamLease]:
    return [await limiter.acquire_async(user) for _ in range(count)]


async def held(limiter: StreamLeaseLimiter, user: str) -> int:
    return len(await limiter.holders_async(user))


class HolderProcess:
    """``python -m tests.leases.holder``."""

    def __init__(self, url: str, namespace: str, user: str, count: int, ttl: float, limit: int = 5) -> None:
        command = [sys.executable, "-m", "tests.leases.holder", url, namespace, user, str(count), str(ttl), str(limit)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.held = int(self.line().split()[1])

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


async def test_cancelled_at_any_tick_nothing_is_left(redis_url: str, make: Make) -> None:
    """Step the loop, and cancel after k ticks, for all k: no ghost, and the cancellation comes out."""
    await until_old(redis_url)
    limiter = make(redis_url, limit=1)
    (await limiter.acquire_async("ann")).release()
    cancelled = finished = 0
    for ticks in range(40):
        for _ in range(10):
            task = asyncio.create_task(limiter.acquire_async("ann"))
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                cancelled += 1
            else:
                task.result().release()
                finished += 1
            # What follows goes over the same connection: a ghost would refuse it.
            (await limiter.acquire_async("ann")).release()
    assert cancelled > 50
    assert finished > 0
    await until(lambda: limiter.in_use("ann") == 0)
    assert await held(limiter, "ann") == 0


async def test_cancelled_before_the_connection_is_there_it_is_never_asked_for(
    redis_url: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What undoes an acquire then goes over another connection, and may come first."""
    await until_old(redis_url)
    limiter = make(redis_url, limit=1)
    may_connect = asyncio.Event()
    test_loop, connect = asyncio.get_running_loop(), callers.connect  # type: ignore[attr-defined]

    async def late(client: Any) -> Any:
        if asyncio.get_running_loop() is test_loop:
            await may_connect.wait()
        return await connect(client)

    monkeypatch.setattr(callers, "connect", late)
    store = limiter._redis
    assert store is not None
    await until(lambda: store.admits)
    task = asyncio.create_task(limiter.acquire_async("ann"))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await until(lambda: store._keeper is not None and not store._keeper._returned)  # it was given back
    may_connect.set()
    (await limiter.acquire_async("ann")).release()


@pytest.mark.parametrize("fault", ["close", "silence"])
@pytest.mark.parametrize("policy", ["reject", "wait"])
async def test_an_answer_that_is_lost_leaves_no_slot_taken(redis_url: str, make: Make, fault: Any, policy: str) -> None:
    """What was done is not known; the slot is asked for again, and the first one is given back."""
    await until_old(redis_url)
    async with FaultProxy(redis_url).running() as proxy:
        limiter = make(proxy.url, limit=2, policy=policy)
        (await limiter.acquire_async("ann")).release()
        for round_ in range(1, 4):
            proxy.drop_reply_to("{user:ann}", fault)
            lease = await limiter.acquire_async("ann")
            assert proxy.dropped == round_
            await until(lambda: limiter._redis is not None and limiter._redis.admits)
            assert await lease.refresh_async()
            await until_held(limiter, "ann", 1)
            lease.release()
            await until_held(limiter, "ann", 0)


async def until_held(limiter: StreamLeaseLimiter, user: str, count: int) -> None:
    async with asyncio.timeout(HANG):
        while await held(limiter, user) != count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_a_cancelled_block_and_a_cancelled_wait_leave_nothing(redis_url: str, make: Make) -> None:
    from asgi_stream import stream_lease

    await until_old(redis_url)
    limiter = make(redis_url, limit=1, policy="wait")

    async def block() -> None:
        async with stream_lease("ann", limiter=limiter):
            await asyncio.sleep(0)

    for ticks in range(30):
        first, second = asyncio.create_task(block()), asyncio.create_task(block())
        for _ in range(ticks):
            await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        await asyncio.wait([first, second])
    async with asyncio.timeout(HANG):
        (await limiter.acquire_async("ann")).release()
    await until(lambda: limiter.in_use("ann") == 0)


async def test_the_slots_of_a_process_that_was_killed_are_back_with_the_ttl(redis_url: str, make: Make) -> None:
    await until_old(redis_url)
    limiter = make(redis_url, ttl_seconds=2.0)
    holder = HolderProcess(redis_url, limiter.config.key_namespace, "ann", 5, 2.0)
    try:
        assert holder.held == 5
        await asyncio.sleep(2.5)  # longer than the TTL: it renews them
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async("ann")
        holder.signal(signal.SIGKILL)
        begun = time.monotonic()

        async def free() -> bool:
            try:
                (await limiter.acquire_async("ann")).release()
            except StreamLimitExceeded:
                return False
            return True

        await until(free)
        assert time.monotonic() - begun < 2.0 + 1.5
    finally:
        holder.stop()


@pytest.mark.parametrize("taken", [True, False])
async def test_a_process_that_slept_longer_than_the_ttl(redis_url: str, make: Make, taken: bool) -> None:
    """It loses what somebody else has by now, and only that."""
    await until_old(redis_url)
    limiter = make(redis_url, ttl_seconds=1.0, limit=2)
    holder = HolderProcess(redis_url, limiter.config.key_namespace, "ann", 2, 1.0, 2)
    try:
        holder.signal(signal.SIGSTOP)

        async def gone() -> bool:
            return await held(limiter, "ann") == 0

        await until(gone)
        mine = await take(limiter, "ann", 2) if taken else []
        holder.signal(signal.SIGCONT)
        if taken:
            assert await asyncio.to_thread(holder.line) == "lost lease_lost"
            assert await asyncio.to_thread(holder.line) == "lost lease_lost"
        else:
            await until(lambda: _count(limiter, "ann", 2))
        assert all(lease.held for lease in mine)
    finally:
        holder.stop()


async def _count(limiter: StreamLeaseLimiter, user: str, count: int) -> bool:
    return await held(limiter, user) == count


async def test_redis_comes_back_empty_under_forty_streams(own_redis: EmbeddedRedis, make: Make) -> None:
    await until_old(own_redis.url)
    one, two = make(own_redis.url, limit=5), make(own_redis.url, limit=5)
    leases = [lease for n in range(4) for lease in await take(one, f"user-{n}", 5)]
    leases += [lease for n in range(4, 8) for lease in await take(two, f"user-{n}", 5)]
    own_redis.kill()
    own_redis.start()
    for limiter in (one, two):

        async def back(limiter: StreamLeaseLimiter = limiter) -> bool:
            return bool(limiter._redis and limiter._redis.admits)

        await until(back)
    assert all(lease.held for lease in leases)
    for n in range(8):
        assert await held(one, f"user-{n}") == 5
        for limiter in (one, two):
            with pytest.raises(StreamLimitExceeded):
                await limiter.acquire_async(f"user-{n}")


async def test_while_redis_is_away_each_process_counts_for_itself(own_redis: EmbeddedRedis, make: Make) -> None:
    await until_old(own_redis.url)
    one, two = make(own_redis.url, limit=2), make(own_redis.url, limit=2)
    running = [*(await take(one, "ann", 1)), *(await take(two, "ann", 1))]
    own_redis.stop()
    more = [await one.acquire_async("ann"), await two.acquire_async("ann")]
    for limiter in (one, two):
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async("ann")
    begun = time.monotonic()
    assert await running[0].refresh_async()
    own_redis.start()
    # All four are registered; two are one too many each, and end.
    await until(lambda: sum(lease.held for lease in running + more) == 2)
    assert [lease.reason for lease in running + more].count("lease_lost") == 2

    async def admits() -> bool:
        return await held(one, "ann") == 2

    await until(admits)
    assert time.monotonic() - begun < HANG


async def test_redis_that_hangs_costs_a_second_then_nothing(own_redis: EmbeddedRedis, make: Make) -> None:
    await until_old(own_redis.url)
    limiter = make(own_redis.url, limit=3)
    (await limiter.acquire_async("ann")).release()
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(HANG):
            leases = await take(limiter, "ann", 3)
            with pytest.raises(StreamLimitExceeded):
                await limiter.acquire_async("ann")
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    await until(lambda: _count(limiter, "ann", 3))
    assert all(lease.held for lease in leases)


@pytest.mark.parametrize("fallback", ["memory", "open", "closed"])
async def test_redis_was_never_there(make: Make, fallback: str) -> None:
    limiter = make("redis://127.0.0.1:1/0", limit=1, fallback=fallback)
    if fallback == "closed":
        with pytest.raises(BackendError, match="fallback"):
            await limiter.acquire_async("ann")
        return
    lease = await limiter.acquire_async("ann")
    if fallback == "open":
        assert (await limiter.acquire_async("ann")).held
    else:
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async("ann")
    assert await lease.refresh_async()
    lease.release()
    sync = await asyncio.to_thread(limiter.acquire, "bob")
    assert sync.held


async def test_scripts_that_redis_forgot(redis_url: str, make: Make) -> None:
    await until_old(redis_url)
    limiter = make(redis_url, limit=1)
    client: Any = driver.Redis.from_url(redis_url)
    for _ in range(3):
        client.script_flush()
        lease = await limiter.acquire_async("ann")
        client.script_flush()
        lease.release()  # with a script that is not there: sent again by the keeper
        await until(lambda: _count(limiter, "ann", 0))
    client.close()


async def test_a_server_that_became_a_replica(own_redis: EmbeddedRedis, make: Make) -> None:
    """READONLY: as if it were away, until it is a primary again."""
    await until_old(own_redis.url)
    limiter = make(own_redis.url, limit=1)
    lease = await limiter.acquire_async("ann")
    client: Any = driver.Redis.from_url(own_redis.url)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StreamLimitExceeded):
        await limiter.acquire_async("ann")
    other = await limiter.acquire_async("bob")
    client.execute_command("REPLICAOF", "NO", "ONE")
    await until(lambda: _count(limiter, "bob", 1))
    assert lease.held
    assert other.held
    client.close()


@pytest.mark.parametrize("skew", [-100_000.0, 100_000.0])
async def test_a_process_whose_clock_is_wrong(
    redis_url: str, make: Make, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """Redis's clock counts, in both directions."""
    await until_old(redis_url)
    right, wrong = make(redis_url, limit=2, ttl_seconds=60), make(redis_url, limit=2, ttl_seconds=60)
    first = await right.acquire_async("ann")
    clock = time.time
    monkeypatch.setattr("asgi_stream.leases.store.time.time", lambda: clock() + skew)
    second = await wrong.acquire_async("ann")
    assert await first.refresh_async()
    assert await second.refresh_async()
    for limiter in (right, wrong):
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async("ann")
        assert await held(limiter, "ann") == 2
    second.release()
    await until_held(right, "ann", 1)


@pytest.mark.parametrize("kind", REFUSALS)
async def test_a_redis_that_takes_no_writes_is_as_good_as_away(own_redis: EmbeddedRedis, make: Make, kind: str) -> None:
    await until_old(own_redis.url)
    limiter = make(own_redis.url, limit=2)
    held_ = [await limiter.acquire_async("ann")]
    refusal = Refusal(own_redis, kind)
    await asyncio.to_thread(refusal.begin)
    async with asyncio.timeout(HANG):
        held_.append(await limiter.acquire_async("ann"))
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async("ann")
    await asyncio.to_thread(refusal.end)
    await until(lambda: limiter._redis is not None and limiter._redis.admits)
    await until_held(limiter, "ann", 2)
    assert all(lease.held for lease in held_)


async def test_every_key_expires(redis_url: str, make: Make) -> None:
    await until_old(redis_url)
    limiter = make(redis_url, limit=1, policy="evict_oldest")
    first, _second = await limiter.acquire_async("ann"), await limiter.acquire_async("ann")
    await until(lambda: first.lost)
    waiting = make(redis_url, limit=1, policy="wait")
    task = asyncio.create_task(waiting.acquire_async("ann"))
    client: Any = driver.Redis.from_url(redis_url)
    pattern = f"{limiter.config.key_namespace}:*"
    await until(lambda: len(client.keys(pattern)) == 4)
    assert all(0 < client.pttl(key) <= 180_000 for key in client.keys(pattern))
    task.cancel()
    await asyncio.wait([task])
    client.close()


async def test_a_forked_process_has_leases_of_its_own(redis_url: str, make: Make) -> None:
    await until_old(redis_url)
    code = (
        "import os, sys, asyncio\n"
        "from asgi_stream import *\n"
        "limiter = StreamLeaseLimiter(StreamLeaseConfig(limit=2, key_namespace=sys.argv[2]), "
        "redis=QueueRedisConfig(sys.argv[1]))\n"
        "mine = limiter.acquire('ann')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    theirs = limiter.acquire('ann')\n"
        "    ok = theirs.id.rpartition(':')[2] == str(os.getpid()) and len(limiter.holders('ann')) == 2\n"
        "    theirs.release()\n"
        "    limiter.close()\n"
        "    os._exit(0 if ok else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(limiter.holders('ann')))\n"
    )
    namespace = f"fork-{os.getpid()}"
    command = [sys.executable, "-W", "ignore", "-c", code, redis_url, namespace]
    said = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=HANG, check=False)
    assert said.stdout.split() == ["0", "1"], said
    # The process gave its lease back as it ended.
    assert await held(make(redis_url, key_namespace=namespace), "ann") == 0
