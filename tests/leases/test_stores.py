"""What a limiter promises, in memory and in Redis alike [L2] [L5]."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis as driver
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asgi_stream import QueueRedisConfig, StreamLease, StreamLeaseConfig, StreamLeaseLimiter, StreamLimitExceeded
from asgi_stream.errors import ConfigurationError

pytestmark = pytest.mark.anyio

HANG = 5.0
_names = itertools.count(1)

Make = Callable[..., StreamLeaseLimiter]


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Limiters of several processes, as it were: with Redis each has connections of its own."""
    namespace = f"test-{os.getpid()}-{next(_names)}"
    made: list[StreamLeaseLimiter] = []

    def make(**settings: Any) -> StreamLeaseLimiter:
        config = StreamLeaseConfig(key_namespace=namespace, **settings)
        redis = QueueRedisConfig(request.getfixturevalue("redis_url")) if request.param == "redis" else None
        made.append(StreamLeaseLimiter(config, redis=redis))
        return made[-1]

    if request.param == "redis":
        await until_old(request.getfixturevalue("redis_url"))
    yield make
    for limiter in made:
        await limiter.aclose()


async def until_old(url: str) -> None:
    """A server that has just started is given two seconds, in which each process counts for itself [L4]."""
    client: Any = driver.Redis.from_url(url)
    while client.info("server")["uptime_in_seconds"] < 3:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.1)
    client.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(HANG):
        while True:
            met = condition()
            if await met if asyncio.iscoroutine(met) else met:
                return
            await asyncio.sleep(0.005)


async def test_a_user_holds_at_most_so_many(make: Make) -> None:
    limiter = make(limit=2)
    first, _second = await limiter.acquire_async("ann"), await limiter.acquire_async("ann")
    with pytest.raises(StreamLimitExceeded) as refusal:
        await limiter.acquire_async("ann")
    assert (refusal.value.limit, refusal.value.in_use, refusal.value.scope) == (2, 2, "user")
    assert (await limiter.acquire_async("bob")).held
    first.release()
    first.release()
    third = await limiter.acquire_async("ann")
    assert third.held
    assert limiter.in_use("ann") == 2


async def test_sync_code_takes_leases_too(make: Make) -> None:
    limiter = make(limit=1)

    def work() -> str:
        held = limiter.acquire("ann")
        with pytest.raises(StreamLimitExceeded):
            limiter.acquire("ann")
        assert held.refresh()
        held.release()
        return repr(held)

    assert "released" in await asyncio.to_thread(work)
    await until(lambda: not limiter.in_use("ann"))
    again = await asyncio.to_thread(limiter.acquire, "ann")
    assert await again.refresh_async()


async def test_sync_code_takes_again_what_it_gave_back(make: Make) -> None:
    """At once, a thousand times: what is given back comes before what is asked for next."""
    limiter = make(limit=1)

    def work() -> None:
        for _ in range(1000):
            limiter.acquire("ann").release()

    await asyncio.to_thread(work)


async def test_a_lease_may_weigh_more(make: Make) -> None:
    limiter = make(limit=5)
    heavy = await limiter.acquire_async("ann", weight=3)
    light = await limiter.acquire_async("ann", weight=2)
    with pytest.raises(StreamLimitExceeded):
        await limiter.acquire_async("ann")
    assert sorted(holder.weight for holder in await limiter.holders_async("ann")) == [2, 3]
    heavy.release()
    assert (await limiter.acquire_async("ann", weight=3)).held
    assert light.held
    for weight in (0, 101, True, 1.5):
        with pytest.raises(ConfigurationError, match="weight"):
            await limiter.acquire_async("ann", weight=weight)  # type: ignore[arg-type]


async def test_tiers(make: Make) -> None:
    async def tier(user: str) -> int:
        return {"pro": 2}.get(user, 1)

    limiter = make(limit=tier)
    held = [await limiter.acquire_async("pro"), await limiter.acquire_async("pro"), await limiter.acquire_async("free")]
    for user in ("pro", "free"):
        with pytest.raises(StreamLimitExceeded):
            await limiter.acquire_async(user)
    assert all(lease.held for lease in held)


async def test_tenants_and_all_together(make: Make) -> None:
    limiter = make(limit=2, tenant_limit=3, global_limit=4)
    held = [await limiter.acquire_async(user, tenant="acme") for user in ("ann", "ann", "bob")]
    with pytest.raises(StreamLimitExceeded) as refusal:
        await limiter.acquire_async("cid", tenant="acme")
    assert refusal.value.scope == "tenant"
    held.append(await limiter.acquire_async("cid", tenant="other"))
    with pytest.raises(StreamLimitExceeded) as refusal:
        await limiter.acquire_async("dan", tenant="third")
    assert refusal.value.scope == "global"
    # What was refused by one limit holds nothing under the others.
    await until(lambda: not limiter.in_use("dan"))
    assert await limiter.holders_async("cid")
    held.pop().release()
    await until(lambda: not limiter.in_use("cid"))
    assert (await limiter.acquire_async("dan", tenant="third")).held


async def test_those_who_wait_get_their_turn_in_order(make: Make) -> None:
    limiter = make(limit=1, policy="wait")
    held = await limiter.acquire_async("ann")
    order: list[int] = []
    positions: dict[int, int] = {}

    async def wait(n: int) -> None:
        lease = await limiter.acquire_async("ann", on_position=lambda position: positions.__setitem__(n, position))
        order.append(n)
        await asyncio.sleep(0)
        lease.release()

    tasks = []
    for n in range(5):
        tasks.append(asyncio.create_task(wait(n)))
        await until(functools.partial(lambda n: positions.get(n) == n, n))
    assert [holder.waiting for holder in await limiter.holders_async("ann")] == [False] + [True] * 5
    held.release()
    async with asyncio.timeout(HANG):
        await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    await until(lambda: limiter.in_use("ann") == 0)


async def test_one_who_waits_too_long_or_leaves_is_forgotten(make: Make) -> None:
    limiter = make(limit=1, policy="wait", wait_timeout=0.2)
    held = await limiter.acquire_async("ann")
    with pytest.raises(StreamLimitExceeded):
        await limiter.acquire_async("ann")
    leaving = asyncio.create_task(limiter.acquire_async("ann"))
    staying = asyncio.create_task(limiter.acquire_async("ann"))

    async def waiting() -> bool:
        return sum(holder.waiting for holder in await limiter.holders_async("ann")) == 2

    await until(waiting)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    held.release()
    assert (await staying).held


async def test_sync_code_waits_too(make: Make) -> None:
    limiter = make(limit=1, policy="wait")
    held = await limiter.acquire_async("ann")
    waiting = asyncio.create_task(asyncio.to_thread(limiter.acquire, "ann"))

    async def in_line() -> bool:
        return any(holder.waiting for holder in await limiter.holders_async("ann"))

    await until(in_line)
    held.release()
    assert (await waiting).held


async def test_the_oldest_gives_way(make: Make) -> None:
    here, there = make(limit=2, policy="evict_oldest"), make(limit=2, policy="evict_oldest")
    if here._redis is None:
        there = here
    lost: list[str] = []
    first = await here.acquire_async("ann")
    first.on_lost(lost.append)
    await asyncio.sleep(0.002)  # the order is by the clock of each process, in ms
    second = await here.acquire_async("ann")
    third = await there.acquire_async("ann")
    await until(lambda: lost == ["superseded"])
    assert (first.lost, first.reason, first.held) == (True, "superseded", False)
    assert second.held
    assert third.held
    assert not await first.refresh_async()
    assert len(await here.holders_async("ann")) == 2


async def test_leases_are_listed_and_revoked(make: Make) -> None:
    limiter = make(limit=3)
    leases = [await limiter.acquire_async("ann") for _ in range(3)]
    other = await limiter.acquire_async("bob {tricky} %41 ü")
    holders = await limiter.holders_async("ann")
    assert [holder.lease for holder in holders] == [lease.id for lease in leases]
    assert {holder.pid for holder in holders} == {os.getpid()}
    assert {holder.key for holder in await limiter.list_async()} == {"user:ann", "user:bob {tricky} %41 ü"}
    assert await limiter.revoke_async(lease=leases[1].id) == 1
    await until(lambda: leases[1].reason == "revoked")
    assert [lease.held for lease in leases] == [True, False, True]
    assert await limiter.revoke_async(user="ann") == 2
    await until(lambda: not any(lease.held for lease in leases))
    assert other.held
    assert await limiter.revoke_async(lease="nobody:1:2:x:3") == 0
    with pytest.raises(ConfigurationError, match="user="):
        await limiter.revoke_async()


async def test_a_dropped_lease_gives_its_slot_back(make: Make) -> None:
    import gc

    limiter = make(limit=1)
    lease: Any = await limiter.acquire_async("ann")
    del lease
    gc.collect()
    await until(lambda: not limiter.in_use("ann"))

    async def free() -> bool:
        return not await limiter.holders_async("ann")

    await until(free)


async def test_many_at_once_in_one_tick(make: Make) -> None:
    limiter = make(limit=400)
    leases = await asyncio.gather(*(limiter.acquire_async("ann") for _ in range(400)))
    with pytest.raises(StreamLimitExceeded):
        await limiter.acquire_async("ann")
    for lease in leases:
        lease.release()

    async def free() -> bool:
        return not await limiter.holders_async("ann")

    async with asyncio.timeout(HANG):
        await until(free)


# The same program does the same in memory and in Redis.


async def test_nobody_gives_way_to_one_that_is_refused_by_a_wider_limit(make: Make) -> None:
    limiter = make(limit=1, global_limit=2, policy="evict_oldest")
    first, other = await limiter.acquire_async("ann"), await limiter.acquire_async("bob")
    with pytest.raises(StreamLimitExceeded) as caught:
        await limiter.acquire_async("ann")
    assert caught.value.scope == "global"
    assert first.held
    other.release()
    newer = await limiter.acquire_async("ann")
    await until(lambda: first.lost)
    assert newer.held


class Differential(RuleBasedStateMachine):
    """Leases are taken, given back, revoked and evicted in both at once."""

    url = ""
    policy = "reject"

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.limiters: list[StreamLeaseLimiter] = []
        self.held: list[tuple[str, list[StreamLease]]] = []

    @initialize(policy=st.sampled_from(["reject", "evict_oldest"]), total=st.sampled_from([None, 4]))
    def begin(self, policy: Any, total: int | None) -> None:
        config = StreamLeaseConfig(
            limit=3, policy=policy, global_limit=total, key_namespace=f"diff-{os.getpid()}-{next(_names)}"
        )
        self.limiters = [StreamLeaseLimiter(config), StreamLeaseLimiter(config, redis=QueueRedisConfig(self.url))]

    def each(self, act: Callable[[StreamLeaseLimiter, int], Any]) -> list[Any]:
        async def both() -> list[Any]:
            results = []
            for n, limiter in enumerate(self.limiters):
                try:
                    results.append(await act(limiter, n))
                except StreamLimitExceeded as exc:
                    results.append(("refused", exc.limit, exc.in_use, exc.scope))
            await asyncio.sleep(0.002)
            return results

        return self.loop.run_until_complete(both())

    @rule(user=st.sampled_from(["ann", "bob"]), weight=st.integers(1, 3), limit=st.sampled_from([None, 1, 2]))
    def acquire(self, user: str, weight: int, limit: int | None) -> None:
        results = self.each(lambda limiter, n: limiter.acquire_async(user, weight=weight, limit=limit))
        if all(isinstance(result, StreamLease) for result in results):
            self.held.append((user, results))
        else:
            assert results[0] == results[1]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        _, pair = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))

        async def give_back(limiter: StreamLeaseLimiter, n: int) -> None:
            pair[n].release()
            if limiter._redis is not None:  # what follows is asked over the same connection: it comes after
                await limiter.holders_async("ann")

        self.each(give_back)

    @rule(user=st.sampled_from(["ann", "bob"]))
    def revoke(self, user: str) -> None:
        results = self.each(lambda limiter, n: limiter.revoke_async(user=user))
        assert results[0] == results[1]
        self._settle()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def refresh(self, data: Any) -> None:
        _, pair = data.draw(st.sampled_from(self.held))
        results = self.each(lambda limiter, n: pair[n].refresh_async())
        assert results[0] == results[1]

    def _settle(self) -> None:
        async def settled() -> None:
            try:
                await until(lambda: all(a.held == b.held for _, (a, b) in self.held))
            except TimeoutError:
                raise AssertionError([(user, a, b) for user, (a, b) in self.held]) from None

        self.loop.run_until_complete(settled())

    @invariant()
    def same(self) -> None:
        if not self.limiters:
            return
        self._settle()
        for user in ("ann", "bob"):
            memory, redis = self.each(lambda limiter, n: limiter.holders_async(user))  # noqa: B023
            assert [holder.weight for holder in memory] == [holder.weight for holder in redis]
            assert sum(holder.weight for holder in memory) <= 3

    def teardown(self) -> None:
        for _, pair in self.held:
            for lease in pair:
                lease.release()
        for limiter in self.limiters:
            self.loop.run_until_complete(limiter.aclose())
        self.loop.close()


async def test_memory_and_redis_do_the_same(redis_url: str) -> None:
    await until_old(redis_url)
    Differential.url = redis_url
    await asyncio.to_thread(
        run_state_machine_as_test,
        Differential,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
