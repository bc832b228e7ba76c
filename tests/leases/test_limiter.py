"""Counting, without a request around it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asgi_stream import StreamLeaseConfig, StreamLeaseLimiter, StreamLimitExceeded, stream_lease
from asgi_stream.errors import ConfigurationError
from asgi_stream.leases.policy import RetryEstimate, address_key, user_key

pytestmark = pytest.mark.anyio


@pytest.fixture
def limiter() -> StreamLeaseLimiter:
    return StreamLeaseLimiter(StreamLeaseConfig(limit=2))


def test_a_user_holds_at_most_so_many_and_others_are_not_touched(limiter: StreamLeaseLimiter) -> None:
    first, _second = limiter.acquire("ann"), limiter.acquire("ann")
    with pytest.raises(StreamLimitExceeded) as refusal:
        limiter.acquire("ann")
    assert (refusal.value.limit, refusal.value.in_use, refusal.value.key) == (2, 2, "user:ann")
    assert 0 < refusal.value.retry_after < 80
    assert limiter.acquire("bob").held
    first.release()
    first.release()
    assert limiter.in_use("ann") == 1
    assert limiter.acquire("ann").held


def test_a_limit_may_be_given_for_one_acquire(limiter: StreamLeaseLimiter) -> None:
    held = [limiter.acquire("ann", limit=3) for _ in range(3)]
    with pytest.raises(StreamLimitExceeded):
        limiter.acquire("ann", limit=3)
    assert len(held) == limiter.in_use("ann")


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3"])
def test_a_limit_that_is_no_count_is_refused(limiter: StreamLeaseLimiter, limit: Any) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        limiter.acquire("ann", limit=limit)


@pytest.mark.parametrize("user_id", ["", None, 7])
def test_a_user_id_that_would_be_shared_or_is_no_text_is_refused(user_id: Any) -> None:
    with pytest.raises(ConfigurationError, match="user id"):
        stream_lease(user_id)


def test_a_dropped_lease_gives_its_slot_back(limiter: StreamLeaseLimiter) -> None:
    """[L2] Such as that of a response that was built and never sent."""
    lease: Any = limiter.acquire("ann")
    del lease
    gc.collect()
    assert limiter.in_use("ann") == 0


async def test_refresh_tells_whether_a_lease_still_holds(limiter: StreamLeaseLimiter) -> None:
    lease = limiter.acquire("ann")
    assert lease.refresh()
    assert await lease.refresh_async()
    lease.release()
    assert not lease.refresh()
    assert not lease.lost


async def test_a_block_counts_while_it_runs_and_an_exception_ends_it(limiter: StreamLeaseLimiter) -> None:
    async with stream_lease("ann", limiter=limiter) as lease:
        assert lease.held
        with stream_lease("ann", limiter=limiter):
            assert limiter.in_use("ann") == 2
    assert limiter.in_use("ann") == 0
    with pytest.raises(KeyError):
        async with stream_lease("ann", limiter=limiter):
            raise KeyError
    assert limiter.in_use("ann") == 0


async def test_cancelled_tasks_leave_nothing_behind(limiter: StreamLeaseLimiter) -> None:
    """[L2]"""

    async def hold() -> None:
        async with stream_lease("ann", limiter=limiter):
            await asyncio.sleep(60)

    for _ in range(200):
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert limiter.in_use("ann") == 0


def test_threads_never_get_more_than_the_limit(limiter: StreamLeaseLimiter) -> None:
    most, refused = 0, 0
    lock, inside = threading.Lock(), [0]

    def work() -> None:
        nonlocal most, refused
        for _ in range(300):
            try:
                with stream_lease("ann", limiter=limiter):
                    with lock:
                        inside[0] += 1
                        most = max(most, inside[0])
                    with lock:
                        inside[0] -= 1
            except StreamLimitExceeded:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 2
    assert limiter.in_use("ann") == 0


def test_long_ids_are_hashed_and_kinds_do_not_meet() -> None:
    assert len(user_key("x" * 10_000)) < 100
    assert user_key("x" * 10_000) != user_key("x" * 10_001)
    assert user_key("10.0.0.1") != address_key("10.0.0.1")


def test_retry_after_follows_the_length_of_recent_streams_and_is_jittered() -> None:
    """[L6]"""
    estimate = RetryEstimate()
    for _ in range(50):
        estimate.observe(100.0)
    values = {estimate.retry_after(limit=5) for _ in range(50)}
    assert all(15 <= value <= 25 for value in values)
    assert len(values) > 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: StreamLeaseConfig(limit=0),
        lambda: StreamLeaseConfig(ttl_seconds=0),
        lambda: StreamLeaseConfig(key_namespace="a{b}"),
        lambda: StreamLeaseConfig.from_env({"ASGI_STREAM_LEASE_LIMIT": "many"}),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        make()
