"""Leases: what taking and giving back one costs, how many a second, what keeping a thousand costs.

    python benchmarks/leases.py [--rounds 5] [--quick]

- pair: acquire and release, one at a time, p50 and p99; then by fifty tasks at once.
- keeping: renewing 1,000 leases of 200 users once: wall and CPU of the client, CPU of Redis.
- waking: from a release to the start of the one who waited, p50 and p99.
- memory: a pair in this process, as `async with`, beside a count in a dict.

The floor is an EVALSHA and a ZREM over redis-py. Peers: fastapi-stream-lease, py-redis-semaphore, redis-py's Lock (of
one slot). Ours gives back without waiting for Redis; the peers wait.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis.asyncio as driver

from asgi_stream import QueueRedisConfig, StreamLeaseConfig, StreamLeaseLimiter, stream_lease
from asgi_stream.redis.embedded import EmbeddedRedis

FLOOR = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + 180000, ARGV[1])
redis.call('PEXPIRE', KEYS[1], 180000)
return 1
"""

Pair = Callable[[str], Awaitable[None]]
_numbers = itertools.count(1)
_opened: list[StreamLeaseLimiter] = []


async def ours(url: str) -> Pair:
    limiter = StreamLeaseLimiter(StreamLeaseConfig(limit=50), redis=QueueRedisConfig(url))
    _opened.append(limiter)

    async def pair(user: str) -> None:
        async with stream_lease(user, limiter=limiter):
            pass

    return pair


async def floor(url: str) -> Pair:
    client = driver.Redis.from_url(url)
    sha = await client.script_load(FLOOR)

    async def pair(user: str) -> None:
        lease = str(next(_numbers))
        await client.evalsha(sha, 1, f"floor:{user}", lease, 50)
        await client.zrem(f"floor:{user}", lease)

    return pair


async def fastapi_stream_lease(url: str) -> Pair:
    from fastapi_stream_lease import LeaseConfig, StreamLeaseManager

    manager = StreamLeaseManager(driver.Redis.from_url(url), LeaseConfig(max_per_user=50, max_global=10_000))

    async def pair(user: str) -> None:
        async with await manager.acquire(user):
            pass

    return pair


async def py_redis_semaphore(url: str) -> Pair:
    from redis_semaphore import Semaphore, SemaphoreConfig

    client = driver.Redis.from_url(url)

    async def pair(user: str) -> None:
        async with Semaphore(client, SemaphoreConfig(name=user, limit=50)):
            pass

    return pair


async def lock(url: str) -> Pair:
    client = driver.Redis.from_url(url)

    async def pair(user: str) -> None:
        async with client.lock(f"lock:{user}:{next(_numbers)}", timeout=180):
            pass

    return pair


PEERS: dict[str, Callable[[str], Awaitable[Pair]]] = {
    "floor": floor,
    "ours": ours,
    "fastapi-stream-lease": fastapi_stream_lease,
    "py-redis-semaphore": py_redis_semaphore,
    "redis-py Lock": lock,
}


async def pairs(pair: Pair, count: int) -> tuple[float, float, float]:
    """Return p50 and p99 of one at a time, in us, and pairs a second by fifty tasks."""
    for _ in range(20):
        await pair("warm")
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        await pair("ann")
        times.append(time.perf_counter() - begun)
    times.sort()

    async def many(n: int) -> None:
        for _ in range(count // 10):
            await pair(f"user-{n % 20}")

    begun = time.perf_counter()
    await asyncio.gather(*(many(n) for n in range(50)))
    rate = 50 * (count // 10) / (time.perf_counter() - begun)
    return times[len(times) // 2] * 1e6, times[int(len(times) * 0.99)] * 1e6, rate


async def keeping(url: str, leases: int) -> dict[str, tuple[float, float, float]]:
    """Return for each the wall, the client's CPU and Redis's CPU of renewing all once, in ms."""
    client = driver.Redis.from_url(url)

    async def measure(act: Callable[[], Awaitable[Any]]) -> tuple[float, float, float]:
        async def cpu() -> float:
            info = await client.info("cpu")
            return float(info["used_cpu_user"] + info["used_cpu_sys"])

        before, wall, own = await cpu(), time.perf_counter(), time.process_time()
        await act()
        wall, own = time.perf_counter() - wall, time.process_time() - own
        return wall * 1e3, own * 1e3, (await cpu() - before) * 1e3

    limiter = StreamLeaseLimiter(StreamLeaseConfig(limit=5), redis=QueueRedisConfig(url))
    held = [await limiter.acquire_async(f"keep-{n % (leases // 5)}") for n in range(leases)]
    store = limiter._redis
    assert store is not None
    results = {"ours": await measure(lambda: store.call_async(store._refresh(list(store.slots.values()))))}

    sha = await client.script_load("return redis.call('ZADD', KEYS[1], 'XX', ARGV[1], ARGV[2])")

    async def one_by_one() -> None:
        for n in range(leases):
            await client.evalsha(sha, 1, f"floor:{n % (leases // 5)}", 9e12, str(n))

    results["one by one, floor"] = await measure(one_by_one)
    try:
        from fastapi_stream_lease import LeaseConfig, StreamLeaseManager
    except ImportError:
        pass
    else:
        manager = StreamLeaseManager(driver.Redis.from_url(url), LeaseConfig(max_per_user=50, max_global=10_000))
        theirs = [await manager.acquire(f"keep-{n % (leases // 5)}") for n in range(leases)]

        async def renew() -> None:
            for their in theirs:
                await their.renew()

        results["fastapi-stream-lease"] = await measure(renew)
        for their in theirs:
            await their.release()
    for lease in held:
        lease.release()
    await limiter.aclose()
    await client.aclose()
    return results


async def waking(url: str, count: int) -> list[float]:
    """Seconds from a release to the start of the one who waited, over two limiters."""
    config = StreamLeaseConfig(limit=1, policy="wait", key_namespace="wake")
    one, two = (StreamLeaseLimiter(config, redis=QueueRedisConfig(url)) for _ in range(2))
    times = []
    held = await one.acquire_async("ann")
    for n in range(count):
        told = asyncio.Event()
        waiting = asyncio.create_task(
            (two, one)[n % 2].acquire_async("ann", on_position=lambda _, told=told: told.set())  # type: ignore[misc]
        )
        await told.wait()
        await asyncio.sleep(0.002)
        begun = time.perf_counter()
        held.release()
        held = await waiting
        times.append(time.perf_counter() - begun)
    held.release()
    await one.aclose()
    await two.aclose()
    return times


class DictCounter:
    """The least that limits: a count for each user, as an application might write it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: dict[str, int] = {}

    @asynccontextmanager
    async def hold(self, user: str) -> AsyncIterator[None]:
        if self.counts.get(user, 0) >= self.limit:
            raise RuntimeError("too many")
        self.counts[user] = self.counts.get(user, 0) + 1
        try:
            yield
        finally:
            self.counts[user] -= 1
            if not self.counts[user]:
                del self.counts[user]


class BareDictCounter(DictCounter):
    """The same in a class of its own, without `asynccontextmanager`."""

    def hold(self, user: str) -> Any:
        self.user = user
        return self

    async def __aenter__(self) -> None:
        if self.counts.get(self.user, 0) >= self.limit:
            raise RuntimeError("too many")
        self.counts[self.user] = self.counts.get(self.user, 0) + 1

    async def __aexit__(self, *exc: object) -> None:
        self.counts[self.user] -= 1
        if not self.counts[self.user]:
            del self.counts[self.user]


async def in_memory(count: int) -> dict[str, float]:
    """Microseconds of a pair as ``async with``."""
    limiter = StreamLeaseLimiter()
    ours = functools.partial(stream_lease, limiter=limiter)
    took: dict[str, float] = {}
    for name, hold in (
        ("ours", ours),
        ("dict counter", BareDictCounter(5).hold),
        ("dict counter, asynccontextmanager", DictCounter(5).hold),
    ):
        begun = time.perf_counter()
        for _ in range(count):
            async with hold("ann"):
                pass
        took[name] = (time.perf_counter() - begun) / count * 1e6
    return took


async def run(url: str, rounds: int, quick: bool) -> list[str]:
    await asyncio.sleep(3)  # until Redis is no longer young: before, each process counts for itself
    count = 50 if quick else 1000
    made: dict[str, Pair] = {}
    for name, make in PEERS.items():
        try:
            made[name] = await make(url)
        except ImportError:
            print(f"{name} is not installed: pip install -e '.[bench]'")
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, pair in made.items():
            results[name].append(await pairs(pair, count))
    base = [statistics.median(column) for column in zip(*results["floor"], strict=True)]
    lines = [
        "### one lease taken and given back",
        "",
        "| peer | p50 us | x floor | p99 us | pairs/s, 50 tasks | x floor | every round: p50 (pairs/s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, rows in results.items():
        p50, p99, rate = (statistics.median(column) for column in zip(*rows, strict=True))
        every = " ".join(f"{row[0]:.0f} ({row[2]:,.0f})" for row in rows)
        lines.append(
            f"| {name} | {p50:.0f} | {p50 / base[0]:.2f} | {p99:.0f} | {rate:,.0f} | {rate / base[2]:.2f} | {every} |"
        )
    leases = 50 if quick else 1000
    kept: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for name, values in (await keeping(url, leases)).items():
            kept.setdefault(name, []).append(values)
    lines += [
        "",
        f"### {leases} leases renewed once",
        "",
        "| peer | wall ms | client CPU ms | Redis CPU ms | every round: wall |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, rows in kept.items():
        wall, own, server = (statistics.median(column) for column in zip(*rows, strict=True))
        every = " ".join(f"{row[0]:.1f}" for row in rows)
        lines.append(f"| {name} | {wall:.1f} | {own:.1f} | {server:.1f} | {every} |")
    times = sorted(await waking(url, 20 if quick else 500))
    p50, p99 = times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3
    lines += ["", f"Waking one who waits: p50 {p50:.2f} ms, p99 {p99:.2f} ms", ""]
    rounds_in_memory = [await in_memory(200 if quick else 10_000) for _ in range(rounds)]
    lines += [
        "### in memory, as `async with`",
        "",
        "| | us | x dict counter | every round |",
        "| --- | ---: | ---: | --- |",
    ]
    least = statistics.median(took["dict counter"] for took in rounds_in_memory)
    for name in rounds_in_memory[0]:
        column = [took[name] for took in rounds_in_memory]
        middle = statistics.median(column)
        every = " ".join(f"{took:.2f}" for took in column)
        lines.append(f"| {name} | {middle:.2f} | {middle / least:.1f} | {every} |")
    lines.append("")
    for limiter in _opened:
        await limiter.aclose()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    with EmbeddedRedis() as server:
        lines = asyncio.run(run(server.url, 1 if options.quick else options.rounds, options.quick))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
