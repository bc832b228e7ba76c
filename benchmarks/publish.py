"""What publishing costs: durably, with epoch, offset, history and expiry, against a bare PUBLISH.

    python benchmarks/publish.py [--rounds 4] [--seconds 0.5] [--quick]

Latency of one publisher that waits for each, and events a second of 64 tasks of one process: redis-py's own pool
against channels that share one pipelined connection.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis
import redis.asyncio
import uvloop

from asgi_stream import AsyncStreamChannel, Streaming, SyncStreamChannel
from asgi_stream.redis.embedded import EmbeddedRedis

PAYLOAD = "x" * 120
TASKS = 64


def sync_rate(publish: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Return the median time of one, and how many a second."""
    times = []
    begun = time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        publish()
        times.append(time.perf_counter() - now)
    return statistics.median(times), len(times) / (time.perf_counter() - begun)


async def async_rate(publish: Callable[[], Awaitable[Any]], seconds: float) -> tuple[float, float]:
    times = []
    begun = time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        await publish()
        times.append(time.perf_counter() - now)
    return statistics.median(times), len(times) / (time.perf_counter() - begun)


async def many_rate(publishers: list[Callable[[], Awaitable[Any]]], seconds: float) -> tuple[float, float]:
    rates = await asyncio.gather(*(async_rate(publish, seconds) for publish in publishers))
    return statistics.median(middle for middle, _ in rates), sum(rate for _, rate in rates)


async def run(rounds: int, seconds: float) -> list[str]:
    results: dict[str, list[tuple[float, float]]] = {}
    with EmbeddedRedis() as server:
        plain = redis.Redis.from_url(server.url)
        pooled = redis.asyncio.Redis.from_url(server.url)
        single = redis.asyncio.Redis.from_url(server.url, single_connection_client=True)
        async with Streaming(redis=server.url) as streaming:
            sync_channel = SyncStreamChannel("sync", streaming=streaming)
            async_channel = AsyncStreamChannel("async", streaming=streaming)
            channels = [AsyncStreamChannel(f"many{n}", streaming=streaming) for n in range(TASKS)]

            def transaction() -> None:
                pipeline = plain.pipeline()
                pipeline.xadd("log", {"f": PAYLOAD}, maxlen=10_000)
                pipeline.pexpire("log", 3_600_000)
                pipeline.publish("log", PAYLOAD)
                pipeline.execute()

            for _ in range(rounds):
                for name, rate in (
                    ("sync PUBLISH", sync_rate(lambda: plain.publish("x", PAYLOAD), seconds)),
                    ("sync MULTI: XADD, PEXPIRE, PUBLISH", sync_rate(transaction, seconds)),
                    ("SyncStreamChannel.publish", sync_rate(lambda: sync_channel.publish(PAYLOAD), seconds)),
                    ("async PUBLISH", await async_rate(lambda: single.publish("x", PAYLOAD), seconds)),
                    ("AsyncStreamChannel.publish", await async_rate(lambda: async_channel.publish(PAYLOAD), seconds)),
                    (
                        f"{TASKS} tasks: PUBLISH over redis-py's pool",
                        await many_rate([lambda: pooled.publish("x", PAYLOAD)] * TASKS, seconds),
                    ),
                    (
                        f"{TASKS} tasks: AsyncStreamChannel.publish",
                        await many_rate(
                            [lambda channel=channel: channel.publish(PAYLOAD) for channel in channels],  # type: ignore[misc]
                            seconds,
                        ),
                    ),
                ):
                    results.setdefault(name, []).append(rate)
        await pooled.aclose()
        await single.aclose()
        plain.close()
    bases = {"sync": "sync PUBLISH", "Sync": "sync PUBLISH", "asyn": "async PUBLISH", "Asyn": "async PUBLISH"}
    lines = [
        "## Publishing",
        "",
        f"Python {sys.version.split()[0]}, redis-py {redis.__version__} with hiredis",
        "",
        "| | p50 us | x PUBLISH | events/s | x PUBLISH | every round: us (events/s) |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, rows in results.items():
        base = results[bases.get(name[:4], f"{TASKS} tasks: PUBLISH over redis-py's pool")]
        middle, rate = (statistics.median(column) for column in zip(*rows, strict=True))
        base_middle, base_rate = (statistics.median(column) for column in zip(*base, strict=True))
        every = " ".join(f"{m * 1e6:.0f} ({r:,.0f})" for m, r in rows)
        lines.append(
            f"| {name} | {middle * 1e6:.0f} | {middle / base_middle:.2f} "
            f"| {rate:,.0f} | {rate / base_rate:.2f} | {every} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.5, help="for one measurement")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does everything still work?")
    parser.add_argument("--out", help="write the table to this file, too")
    options = parser.parse_args()
    rounds, seconds = (1, 0.05) if options.quick else (options.rounds, options.seconds)
    lines = uvloop.run(run(rounds, seconds))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
