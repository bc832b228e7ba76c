"""What the record costs whoever publishes: OpenSearch there, away, or silent, against no record at all.

    python benchmarks/storage.py [--rounds 5] [--seconds 2] [--quick]

One publisher that waits for each event: 1,000 a second, and as many as go. The server is osmem-server.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import uvloop

from asgi_stream import AsyncStreamChannel, Streaming
from asgi_stream.redis.embedded import EmbeddedRedis
from asgi_stream.storage import SinkStats, StorageConfig

RATE = 1000
CASES = ("no record", "OpenSearch is there", "OpenSearch is away", "OpenSearch is silent", "for an archiver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def opensearch() -> Iterator[int]:
    import osmem_server  # type: ignore[import-untyped]

    binary = Path(osmem_server.__file__).parent / "bin" / "osmem-server"
    port = free_port()
    process = subprocess.Popen(
        [binary, "-addr", f"127.0.0.1:{port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/").read()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


@contextmanager
def silent() -> Iterator[int]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield int(server.getsockname()[1])


async def publish(streaming: Streaming, seconds: float, rate: float | None) -> list[float]:
    channel = AsyncStreamChannel(f"c-{time.monotonic_ns()}", streaming=streaming)
    for n in range(50):
        await channel.publish({"message": f"warm {n}"}, "log")
    times: list[float] = []
    begun = time.perf_counter()
    while (before := time.perf_counter()) - begun < seconds:
        await channel.publish({"message": "Compiling bundle/asgi_stream/events.py", "level": "info", "n": 1}, "log")
        now = time.perf_counter()
        times.append(now - before)
        if rate is not None:
            await asyncio.sleep(max(begun + len(times) / rate - now, 0.0))
    return times


async def run(rounds: int, seconds: float) -> list[str]:
    lines = ["## Publishing with a record", ""]
    with EmbeddedRedis() as server, opensearch() as there, silent() as hanging, tempfile.TemporaryDirectory() as spool:
        configs = {
            "no record": None,
            "OpenSearch is there": StorageConfig(port=there, spool_dir=spool),
            "OpenSearch is away": StorageConfig(port=free_port(), spool_dir=spool, shutdown_seconds=0.1),
            "OpenSearch is silent": StorageConfig(
                port=hanging, spool_dir=spool, request_timeout=1.0, shutdown_seconds=0.1
            ),
            "for an archiver": StorageConfig(writer="archiver"),
        }
        for rate in (RATE, None):
            times: dict[str, list[list[float]]] = {case: [] for case in CASES}
            last: dict[str, SinkStats] = {}
            for _ in range(rounds):
                for case in CASES:
                    config = configs[case]
                    async with Streaming(redis=server.url, storage=config) as streaming:
                        times[case].append(await publish(streaming, seconds, rate))
                        if config is not None and config.writer == "publisher":
                            last[case] = streaming.storage.stats()
            title = f"{rate:,} events a second" if rate else "as many as go"
            lines += [
                f"### {title}",
                "",
                "| | p50 us | x none | pooled p99 us | x none | events/s | every round: p50 (p99) | dropped |",
                "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
            ]
            base = figures(times["no record"])
            for case in CASES:
                middle, high = figures(times[case])
                every = " ".join("{:.0f} ({:.0f})".format(*(f * 1e6 for f in figures([one]))) for one in times[case])
                count = statistics.median(len(one) for one in times[case]) / seconds
                dropped = last[case].dropped if case in last else 0
                lines.append(
                    f"| {case} | {middle * 1e6:.0f} | {middle / base[0]:.2f} | {high * 1e6:.0f} | {high / base[1]:.2f} "
                    f"| {count:,.0f} | {every} | {dropped} |"
                )
            lines.append("")
    return lines


def figures(rounds: list[list[float]]) -> tuple[float, float]:
    """The median of the rounds' medians, and the 99th percentile of all together."""
    pooled = sorted(one for times in rounds for one in times)
    return statistics.median(statistics.median(times) for times in rounds), pooled[int(len(pooled) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one measurement")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does everything still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    lines = uvloop.run(run(rounds, seconds))
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
