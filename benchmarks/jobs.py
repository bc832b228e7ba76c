"""Jobs: how soon after the order a worker begins, and how many a second, through two workers.

    python benchmarks/jobs.py [--rounds 3] [--jobs 100] [--many 2000] [--quick]

- first event: from before `enqueue` in a web process to the first byte of the job's own first event at a client of the
  *other* web process; beside it the engine alone (pydocket): from before its `add` to the first line of the task.
- small jobs: no-op jobs a second, ordered before the workers start to take them.

Two web processes, two workers, one Redis, each a process of its own. The engine's workers have its own defaults, but
for one that looks for free slots as often as it may.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio as driver
from _serving import HERE, serve, uvicorn

from asgi_stream import StreamApp, StreamContext, Streaming
from asgi_stream.job_queue import QueueConfig, QueueManager, QueueWorker
from asgi_stream.redis.embedded import EmbeddedRedis

SLOTS = 8


def url() -> str:
    return os.environ["BENCH_REDIS"]


# What runs in the processes


def first(entity: dict[str, Any]) -> None:
    StreamContext.from_dict(entity["ctx"]).data("begun", time.monotonic())


async def first_async(entity: dict[str, Any]) -> None:
    await StreamContext.from_dict(entity["ctx"]).data_async("begun", time.monotonic())


async def nothing(entity: Any) -> None:
    pass


async def bare_first(name: str) -> None:
    async with driver.Redis.from_url(url()) as client:
        await client.rpush(name, str(time.monotonic()))


async def bare_nothing() -> None:
    pass


def web() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route

    streaming = Streaming(url())
    manager = QueueManager(url(), streaming=streaming)

    async def order(request: Request) -> JSONResponse:
        ctx = StreamContext(request.path_params["channel"], "bench", streaming=streaming)
        begun = time.monotonic()
        manager.enqueue({"ctx": ctx.to_dict()}, request.path_params["processor"])
        return JSONResponse(begun)

    events = StreamApp(streaming, authorize=lambda request, channel, verb: True)
    return Starlette(routes=[Route("/order/{channel}/{processor}", order), Mount("/events", events)])


async def work(kind: str) -> None:
    if kind == "ours":
        config = QueueConfig(
            url(), operations_registry={"first": first, "first_async": first_async, "nothing": nothing}
        )
        await QueueWorker(config, max_workers=SLOTS).start()
        return
    from docket import Docket, Worker

    interval = {"bare": 250, "bare-often": 20}[kind]
    async with Docket(name=kind, url=url()) as docket:
        docket.register(bare_first)
        docket.register(bare_nothing)
        async with Worker(docket, concurrency=SLOTS, minimum_check_interval=timedelta(milliseconds=interval)) as worker:
            await worker.run_forever()


@contextlib.contextmanager
def workers(kind: str) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, str(HERE / "jobs.py"), "--work", kind]) for _ in range(2)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# What is measured


async def first_event(client: httpx.AsyncClient, webs: list[int], processor: str, jobs: int) -> list[float]:
    """Seconds from the order to the first byte of the job's first event, each."""
    times = []
    for n in range(jobs):
        channel = f"bench-{processor}-{os.urandom(6).hex()}"
        async with client.stream("GET", f"http://127.0.0.1:{webs[n % 2]}/events/{channel}") as response:
            lines = response.aiter_lines()
            async for line in lines:
                if line.startswith("event: ready"):
                    break
            ordering = asyncio.create_task(
                client.get(f"http://127.0.0.1:{webs[(n + 1) % 2]}/order/{channel}/{processor}")
            )
            async for line in lines:
                if line == "event: data":
                    arrived = time.monotonic()
                    break
            times.append(arrived - float((await ordering).text))
    return times


async def bare_start(kind: str, jobs: int) -> list[float]:
    """Seconds from before `add` to the first line of the task, each."""
    from docket import Docket

    times = []
    async with Docket(name=kind, url=url()) as docket, driver.Redis.from_url(url()) as client:
        docket.register(bare_first)
        for n in range(jobs):
            name = f"begun-{n}"
            begun = time.monotonic()
            await docket.add(bare_first)(name)
            answer: Any = await client.blpop([name], timeout=30)
            times.append(float(answer[1]) - begun)
    return times


async def throughput(kind: str, jobs: int) -> float:
    """Jobs a second, from the first one that is done to the last."""
    if kind == "ours":
        manager = QueueManager(url())
        for begin in range(0, jobs, 500):
            await asyncio.gather(*(manager.enqueue_async(n, "nothing") for n in range(begin, min(begin + 500, jobs))))

        async def left() -> int:
            stats = await manager.stats_async()
            return stats.depth + stats.running

        close = manager.aclose
    else:
        from docket import Docket

        docket = await Docket(name=kind, url=url()).__aenter__()
        docket.register(bare_nothing)
        await docket.add_many([docket.call(bare_nothing)() for _ in range(jobs)])

        async def left() -> int:
            async with docket.redis() as client:
                return await client.xlen(docket.stream_key)

        async def close() -> None:
            await docket.__aexit__(None, None, None)

    with workers(kind):
        while (at_first := await left()) >= jobs:  # noqa: ASYNC110 - other processes do it
            await asyncio.sleep(0.005)
        begun = time.monotonic()
        while await left():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        took = time.monotonic() - begun
    await close()
    return at_first / took


async def run(options: argparse.Namespace) -> list[str]:
    quick = options.quick
    jobs, rounds, many = (5, 1, 100) if quick else (options.jobs, options.rounds, options.many)
    results: dict[str, list[list[float]]] = {"engine alone": [], "sync function": [], "async function": []}
    with serve(uvicorn("jobs:web")) as one, serve(uvicorn("jobs:web")) as two, workers("ours"), workers("bare"):
        webs = [one.port, two.port]
        async with httpx.AsyncClient(timeout=30) as client:
            for _ in range(3):  # the workers must be there
                await first_event(client, webs, "first", 1)
                await bare_start("bare", 1)
            for _ in range(rounds):
                results["engine alone"].append(await bare_start("bare", jobs))
                results["sync function"].append(await first_event(client, webs, "first", jobs))
                results["async function"].append(await first_event(client, webs, "first_async", jobs))
    middle = {name: statistics.median(statistics.median(times) for times in rows) for name, rows in results.items()}
    lines = [
        "### from the order to the first event at a client of the other web process",
        "",
        "| what | p50 ms | more than the engine, ms | p99 ms | p50 of every round |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, rows in results.items():
        p99 = statistics.median(sorted(times)[int(len(times) * 0.99)] for times in rows)
        every = " ".join(f"{statistics.median(times) * 1e3:.2f}" for times in rows)
        more = (middle[name] - middle["engine alone"]) * 1e3
        lines.append(f"| {name} | {middle[name] * 1e3:.2f} | {more:.2f} | {p99 * 1e3:.2f} | {every} |")
    rates: dict[str, list[float]] = {"ours": [], "bare": [], "bare-often": []}
    for _ in range(rounds):
        for kind, rate in rates.items():
            rate.append(await throughput(kind, many if kind == "ours" or quick else many // 4))
    lines += [
        "",
        f"### no-op jobs a second, two workers with {SLOTS} slots each",
        "",
        "| what | jobs/s | x engine | every round |",
        "| --- | ---: | ---: | --- |",
    ]
    base = statistics.median(rates["bare"])
    names = {"ours": "ours", "bare": "engine, its defaults", "bare-often": "engine, looking every 20 ms"}
    for kind, rate in rates.items():
        rate_middle = statistics.median(rate)
        every = " ".join(f"{value:.0f}" for value in rate)
        lines.append(f"| {names[kind]} | {rate_middle:.0f} | {rate_middle / base:.1f} | {every} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=100, help="for one measurement of the first event")
    parser.add_argument("--many", type=int, default=4000, help="small jobs")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does everything still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        asyncio.run(work(options.work))
        return
    with EmbeddedRedis() as server:
        os.environ["BENCH_REDIS"] = server.url
        lines = asyncio.run(run(options))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
