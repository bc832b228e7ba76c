"""``asgi-stream leases list`` and ``revoke``."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, replace
from typing import TextIO

from asgi_stream.config import QueueRedisConfig, StreamLeaseConfig
from asgi_stream.leases.limiter import StreamLeaseLimiter
from asgi_stream.leases.store import Holder


def show(user: str | None, *, redis_url: str, namespace: str | None, as_json: bool, out: TextIO | None = None) -> None:
    """Print who holds which leases: a table, or one JSON object a line."""
    out = sys.stdout if out is None else out

    async def read() -> list[Holder]:
        limiter = _limiter(redis_url, namespace)
        try:
            return await (limiter.list_async() if user is None else limiter.holders_async(user))
        finally:
            await limiter.aclose()

    holders = asyncio.run(read())
    if as_json:
        for holder in holders:
            print(json.dumps(asdict(holder), ensure_ascii=False), file=out)
        return
    rows = [("USER", "OPEN FOR", "PROCESS", "LEASE"), *(_row(holder) for holder in holders)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]), file=out)


def revoke(user: str | None, lease: str | None, *, redis_url: str, namespace: str | None) -> int:
    """Take leases away; return how many there were."""

    async def act() -> int:
        limiter = _limiter(redis_url, namespace)
        try:
            return await limiter.revoke_async(user=user, lease=lease)
        finally:
            await limiter.aclose()

    return asyncio.run(act())


def _limiter(redis_url: str, namespace: str | None) -> StreamLeaseLimiter:
    config = StreamLeaseConfig.from_env()
    if namespace is not None:
        config = replace(config, key_namespace=namespace)
    return StreamLeaseLimiter(config, redis=QueueRedisConfig(redis_url))


def _row(holder: Holder) -> tuple[str, str, str, str]:
    kind, _, name = holder.key.partition(":")
    shown = name if kind == "user" else f"{name} ({kind})"
    weight = f" x{holder.weight}" if holder.weight > 1 else ""
    seconds = max(int(time.time() - holder.since), 0)
    age = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    # What users call themselves must not move the cursor of who looks at it.
    shown = "".join(character if character.isprintable() else "?" for character in shown)
    return f"{shown}{weight}", "waiting" if holder.waiting else age, f"{holder.host}/{holder.pid}", holder.lease
