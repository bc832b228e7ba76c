"""Holds leases in a process of its own: ``python -m tests.leases.holder URL NAMESPACE USER COUNT TTL LIMIT``.

Prints ``held N`` once it has as many as it could get, then each loss, until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys

from asgi_stream import QueueRedisConfig, StreamLease, StreamLeaseConfig, StreamLeaseLimiter, StreamLimitExceeded


async def main() -> None:
    url, namespace, user, count, ttl, limit = sys.argv[1:]
    config = StreamLeaseConfig(limit=int(limit), ttl_seconds=float(ttl), key_namespace=namespace)
    limiter = StreamLeaseLimiter(config, redis=QueueRedisConfig(url))
    held: list[StreamLease] = []
    for _ in range(int(count)):
        try:
            lease = await limiter.acquire_async(user)
        except StreamLimitExceeded:
            break
        lease.on_lost(lambda reason: print(f"lost {reason}", flush=True))
        held.append(lease)
    print(f"held {len(held)}", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await limiter.aclose()


if __name__ == "__main__":
    asyncio.run(main())
