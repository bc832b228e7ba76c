"""Queued streaming: how late, how many deliveries, at which cost, from a publisher through Redis to viewers.

    python benchmarks/channels.py [--rounds 3] [--seconds 2] [--quick] [--only latency,fan-out,many,stalled,memory]

- latency: 100 events a second to one viewer, from before `publish` to the first byte at the viewer.
- fan-out: one event to 1,000 viewers; the next when all have it, or sixteen at a time.
- many: 1,000 channels with one viewer and one event a second each.
- stalled: one of 1,000 viewers does not read; how late are the others?
- memory: idle viewers with a channel each; growth of the server's memory, and its CPU while nothing happens.

Peers: a raw subscriber of Redis (the floor), pub/sub per viewer with Starlette and with sse-starlette, Litestar's
channels, and nchan with the same Redis where nginx has it. broadcaster 0.3.1 is left out: it delivers nothing with a
current redis-py. Our events are durable, with epoch and offset; the Python peers' are a bare PUBLISH.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import time
from typing import Any

import uvloop
from _serving import keep_off_the_servers_core
from _viewers import (
    PAYLOAD,
    PYTHON,
    Audience,
    Peer,
    has_nchan,
    lines_of_machine,
    nchan_peer,
    python_peer,
    raise_file_limit,
)

from asgi_stream import AsyncStreamChannel, Streaming
from asgi_stream.redis.embedded import EmbeddedRedis
from asgi_stream.redis.pipe import pack


class Floor:
    """A subscriber that speaks to Redis itself: no HTTP between."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def latencies(self, seconds: float, rate: float) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        sender_reader, sender = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(pack("SUBSCRIBE", "floor"))
        await reader.read(1000)
        times = []
        due = time.perf_counter()
        for _ in range(int(seconds * rate)):
            due += 1 / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            begun = time.perf_counter()
            sender.write(pack("PUBLISH", "floor", PAYLOAD))
            await reader.read(10_000)
            times.append(time.perf_counter() - begun)
            await sender_reader.read(100)
        writer.close()
        sender.close()
        return times


async def latencies(peer: Peer, seconds: float, rate: float, channel: str) -> list[float]:
    audience = Audience(peer.server.port)
    await audience.join(channel)
    await peer.publish(channel, 1)
    await asyncio.sleep(0.2)
    times = []
    due = time.perf_counter()
    for _ in range(int(seconds * rate)):
        due += 1 / rate
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        came = audience.expect(1)
        begun = time.perf_counter()
        sending = asyncio.ensure_future(peer.publish(channel, 1))
        await came
        times.append(time.perf_counter() - begun)
        await sending
    audience.close()
    return times


async def fan_out(peer: Peer, audience: Audience, channel: str, at_once: int, seconds: float) -> tuple[float, float]:
    """Return deliveries a second, and seconds of the server's CPU a delivery."""
    viewers = len(audience.viewers)
    count = 0
    cpu, begun = peer.server.cpu(), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        came = audience.expect(viewers * at_once)
        await peer.publish(channel, at_once)
        async with asyncio.timeout(30):
            await came
        count += viewers * at_once
    took = time.perf_counter() - begun
    return count / took, (peer.server.cpu() - cpu) / count


async def many(peer: Peer, channels: int, seconds: float, tag: str) -> tuple[list[float], float, int]:
    """Return latencies, the server's CPU in percent, and how many events did not come within 10 s."""
    audiences = []
    for n in range(channels):
        audience = Audience(peer.server.port)
        audiences.append(audience)
        if n % 50 == 49:
            await asyncio.gather(*(a.join(f"{tag}{m}") for m, a in enumerate(audiences[n - 49 : n + 1], n - 49)))
    await asyncio.sleep(2.0)  # some answer before they have subscribed
    times: list[float] = []
    lost: list[int] = []

    async def one(n: int) -> None:
        came = audiences[n].expect(1)
        begun = time.perf_counter()
        await peer.publish(f"{tag}{n}", 1)
        try:
            async with asyncio.timeout(10):
                await came
        except TimeoutError:
            lost.append(n)
            return
        times.append(time.perf_counter() - begun)

    cpu, begun = peer.server.cpu(), time.perf_counter()
    tasks = []
    for n in range(int(seconds * channels)):
        await asyncio.sleep(max(begun + n / channels - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(n % channels)))
    await asyncio.gather(*tasks)
    percent = (peer.server.cpu() - cpu) / (time.perf_counter() - begun) * 100
    for audience in audiences:
        audience.close()
    return times, percent, len(lost)


async def idle(peer: Peer, count: int, tag: str) -> tuple[float, float]:
    """Return KiB a viewer, and the idle server's CPU in percent."""
    audience = Audience(peer.server.port)
    await audience.fill([f"{tag}w{n}" for n in range(20)])
    before = peer.server.rss()
    await audience.fill([f"{tag}{n}" for n in range(count)])
    await asyncio.sleep(1.0)
    grown = (peer.server.rss() - before) / count / 1024
    cpu, begun = peer.server.cpu(), time.perf_counter()
    await asyncio.sleep(5.0 if count > 100 else 0.1)
    percent = (peer.server.cpu() - cpu) / (time.perf_counter() - begun) * 100
    audience.close()
    return grown, percent


async def stalled(
    peer: Peer, viewers: int, seconds: float, tag: str, *, one_stalls: bool
) -> tuple[float, float, float]:
    """Return the median and p99 time until all who read have an event, and KiB by which the server grew."""
    idler = socket.socket()
    idler.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    idler.connect(("127.0.0.1", peer.server.port))
    idler.sendall(f"GET /{tag} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    reading = None if one_stalls else asyncio.get_running_loop().run_in_executor(None, _read_all, idler)
    await asyncio.sleep(0.2)
    # More than the kernel takes for somebody who does not read. The others come after it.
    async with Streaming(redis=os.environ["BENCH_REDIS"]) as streaming:
        channel = AsyncStreamChannel(tag, streaming=streaming)
        for _ in range(40):
            position = (await channel.publish_many(["x" * 16_000] * 10))[-1]
    audience = Audience(peer.server.port)
    for begin in range(0, viewers - 1, 50):
        await asyncio.gather(*(audience.join(tag, position) for _ in range(min(50, viewers - 1 - begin))))
    await asyncio.sleep(0.2)
    before = peer.server.rss()
    times = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        came = audience.expect(viewers - 1)
        sent = time.perf_counter()
        await peer.publish(tag, 1)
        async with asyncio.timeout(30):
            await came
        times.append(time.perf_counter() - sent)
    grown = (peer.server.rss() - before) / 1024
    audience.close()
    idler.shutdown(socket.SHUT_RDWR)
    if reading is not None:
        await reading
    idler.close()
    return statistics.median(times), p99(times), grown


def _read_all(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


Results = dict[str, list[tuple[float, ...]]]


def table(
    title: str, columns: list[str], results: Results, base: str, shown: list[str], scale: list[float]
) -> list[str]:
    """Medians, with the ratio of each to *base*'s."""
    lines = [
        f"### {title}",
        "",
        "| peer | " + " | ".join(f"{column} | x {base}" for column in columns) + " | every round |",
        "| --- |" + " ---: | ---: |" * len(columns) + " --- |",
    ]
    if base not in results:
        base = next(iter(results))
    bases = [statistics.median(column) for column in zip(*results[base], strict=True)]
    for peer, rows in results.items():
        cells = []
        for n, column in enumerate(zip(*rows, strict=True)):
            middle = statistics.median(column)
            ratio = middle / bases[n] if bases[n] else 0.0
            cells.append(f"{format(middle * scale[n], shown[n])} | {ratio:.2f}")
        every = " ".join(
            "(" + ", ".join(format(v * s, f) for v, s, f in zip(row, scale, shown, strict=True)) + ")" for row in rows
        )
        lines.append(f"| {peer} | " + " | ".join(cells) + f" | {every} |")
    return [*lines, ""]


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


async def run(options: argparse.Namespace) -> list[str]:
    quick = options.quick
    rounds, seconds = (1, 0.2) if quick else (options.rounds, options.seconds)
    viewers, channels = (20, 50) if quick else (1000, 1000)
    only = options.only.split(",")
    lines = ["## Channels", "", *lines_of_machine()]
    with EmbeddedRedis("--maxclients", "15000") as redis, contextlib.ExitStack() as stack:
        names = PYTHON[:2] if quick else PYTHON
        peers = [stack.enter_context(python_peer(name, redis.url)) for name in names]
        if has_nchan():
            peers.append(stack.enter_context(nchan_peer(redis.url)))
        keep_off_the_servers_core()
        if "latency" in only:
            results: Results = {"Redis itself": [], **{peer.name: [] for peer in peers}}
            for n in range(rounds):
                times = await Floor(redis.port).latencies(seconds, 100)
                results["Redis itself"].append((statistics.median(times), p99(times)))
                for peer in peers:
                    times = await latencies(peer, seconds, 100, f"latency{n}")
                    results[peer.name].append((statistics.median(times), p99(times)))
            lines += table(
                "latency, 100 events/s, one viewer",
                ["p50 ms", "p99 ms"],
                results,
                "Redis itself",
                [".3f", ".2f"],
                [1e3, 1e3],
            )
        if "fan-out" in only:
            for at_once in (1, 16):
                results = {peer.name: [] for peer in peers}
                for n in range(rounds):
                    for peer in peers:
                        audience = Audience(peer.server.port)
                        await audience.fill([f"fan{n}-{at_once}"] * viewers)
                        await asyncio.sleep(0.3)
                        results[peer.name].append(await fan_out(peer, audience, f"fan{n}-{at_once}", at_once, seconds))
                        audience.close()
                        await asyncio.sleep(0.3)
                lines += table(
                    f"fan-out to {viewers} viewers, {at_once} at a time",
                    ["deliveries/s", "CPU us/delivery"],
                    results,
                    "nchan",
                    [",.0f", ".2f"],
                    [1, 1e6],
                )
        if "many" in only:
            results = {peer.name: [] for peer in peers}
            for n in range(rounds):
                for peer in peers:
                    times, percent, lost = await many(peer, channels, seconds, f"many{n}-")
                    results[peer.name].append((statistics.median(times), p99(times), percent, lost))
            lines += table(
                f"{channels} channels with one viewer and one event/s each",
                ["p50 ms", "p99 ms", "CPU %", "lost"],
                results,
                "Litestar",
                [".3f", ".2f", ".1f", ".0f"],
                [1e3, 1e3, 1, 1],
            )
        if "stalled" in only:
            ours = peers[0]
            results = {"all read": [], "one does not": []}
            for n in range(rounds):
                for name, rows in results.items():
                    tag = f"stalled{n}{name[:3]}"
                    rows.append(await stalled(ours, viewers, seconds, tag, one_stalls=name != "all read"))
            lines += table(
                f"one of {viewers} viewers does not read (ours)",
                ["p50 ms until the others have it", "p99 ms", "KiB grown"],
                results,
                "all read",
                [".2f", ".2f", ",.0f"],
                [1e3, 1e3, 1],
            )
    if "memory" in only:
        count = 20 if quick else options.idle
        results = {}
        with EmbeddedRedis("--maxclients", "15000") as redis:
            makers: dict[str, Any] = {name: python_peer for name in names if name != "sse-starlette"}
            for name, maker in makers.items():
                with maker(name, redis.url) as peer:
                    results[name] = [await idle(peer, count, "idle")]
            if has_nchan():
                with nchan_peer(redis.url) as peer:
                    results["nchan"] = [await idle(peer, count, "idle")]
        lines += table(
            f"{count} idle viewers with a channel each",
            ["KiB a viewer", "CPU %"],
            results,
            "nchan",
            [".1f", ".1f"],
            [1, 1],
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one measurement")
    parser.add_argument("--idle", type=int, default=5000, help="how many idle viewers")
    parser.add_argument("--only", default="latency,fan-out,many,stalled,memory")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    raise_file_limit()
    lines = uvloop.run(run(options))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
