"""A storm on leases: is one ever given too many, is one ever lost for good?

    python benchmarks/lease_storm.py [--seconds 15] [--processes 8] [--tasks 50] [--quick]

Eight processes of fifty tasks take leases of twenty users, at most five each, and hold them for some milliseconds.

- control: nobody is disturbed.
- cancels: 30 % of the tasks are cancelled at a random moment, which may be in the midst of taking or giving back.
- kills: a process is killed (SIGKILL) twice a second, and another takes its place; leases last 3 s.

What is true is not asked of the limiter. Each process writes down, on the clock that all processes share, when a body
began and when it was about to end; the number of bodies of one user at a time is counted from that. A body of a killed
process ended with it. Leaked are the leases that Redis counts when no body runs any more: at once after the control and
the cancels, and 1.5 s after the time to live after the kills.

Peers: fastapi-stream-lease, and a counter that reads before it writes, which shows that this storm can find something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import redis as sync_driver
import redis.asyncio as driver

from asgi_stream import QueueRedisConfig, StreamLeaseConfig, StreamLeaseLimiter, StreamLimitExceeded, stream_lease
from asgi_stream.redis.embedded import EmbeddedRedis

USERS = 20
LIMIT = 5
HOLD = 0.02
CANCELLED = 0.3
ENTRY = struct.Struct("<dIHb")  # when, which process, which user, +1 or -1

Body = Callable[[str], AbstractAsyncContextManager[Any]]


def ours(url: str, ttl: int) -> tuple[Body, tuple[type[Exception], ...]]:
    limiter = StreamLeaseLimiter(
        StreamLeaseConfig(limit=LIMIT, ttl_seconds=ttl, key_namespace="storm"), redis=QueueRedisConfig(url)
    )
    return lambda user: stream_lease(user, limiter=limiter), (StreamLimitExceeded,)


def fastapi_stream_lease(url: str, ttl: int) -> tuple[Body, tuple[type[Exception], ...]]:
    from fastapi_stream_lease import LeaseConfig, StreamLeaseManager
    from fastapi_stream_lease.exceptions import StreamLeaseError

    config = LeaseConfig(max_per_user=LIMIT, max_global=10_000, lease_seconds=ttl, key_prefix="storm")
    manager = StreamLeaseManager(driver.Redis.from_url(url), config)

    @contextlib.asynccontextmanager
    async def body(user: str) -> Any:
        async with await manager.acquire(user):
            yield

    return body, (StreamLeaseError, OSError, sync_driver.RedisError)


def counter(url: str, ttl: int) -> tuple[Body, tuple[type[Exception], ...]]:
    client = driver.Redis.from_url(url)

    class FullError(Exception):
        pass

    @contextlib.asynccontextmanager
    async def body(user: str) -> Any:
        key = f"storm:{user}"
        if int(await client.get(key) or 0) >= LIMIT:
            raise FullError
        await client.incr(key)
        try:
            yield
        finally:
            await client.decr(key)

    return body, (FullError, OSError, sync_driver.RedisError)


PEERS = {"ours": ours, "fastapi-stream-lease": fastapi_stream_lease, "a counter": counter}


async def storm(peer: str, url: str, ttl: int, tasks: int, cancelled: float, log: Path) -> None:
    """One process, until its stdin is closed; then it says how often it was admitted and refused."""
    body, refusals = PEERS[peer](url, ttl)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    pid = os.getpid()
    figures: Counter[str] = Counter()
    ending = asyncio.Event()

    def note(user: int, step: int) -> None:
        os.write(file, ENTRY.pack(time.monotonic(), pid, user, step))

    async def once(user: int) -> None:
        async with body(f"user-{user}"):
            note(user, 1)
            try:
                figures["admitted"] += 1
                await asyncio.sleep(random.expovariate(1 / HOLD))
            finally:
                note(user, -1)

    async def endless() -> None:
        while not ending.is_set():
            one = asyncio.create_task(once(random.randrange(USERS)))
            if random.random() < cancelled:
                asyncio.get_running_loop().call_later(random.expovariate(1 / 0.005), one.cancel)
            try:
                await one
            except asyncio.CancelledError:
                figures["cancelled"] += 1
            except refusals:
                figures["refused"] += 1
                await asyncio.sleep(random.uniform(0, HOLD / 2))

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = [asyncio.create_task(endless()) for _ in range(tasks)]
    await reader.readline()
    ending.set()
    await asyncio.gather(*running)
    print(figures["admitted"], figures["refused"], figures["cancelled"], flush=True)
    await reader.read()


def leaked(url: str) -> int:
    """Leases that Redis counts now, whoever wrote them: members that did not expire, or the value of a counter."""
    with sync_driver.Redis.from_url(url) as client:
        seconds, micros = client.time()
        now = seconds + micros / 1e6
        found = 0
        for key in client.scan_iter(match="*storm*user*"):
            kind = client.type(key)
            if kind == b"string":
                found += int(client.get(key) or 0)
            elif kind == b"zset" and not key.endswith((b"wait", b"queue")):
                scores = [score for _, score in client.zrange(key, 0, -1, withscores=True)]
                found += sum((score / 1000 if score > 1e11 else score) > now for score in scores)
        return found


def over_admitted(log: Path, killed: dict[int, float]) -> tuple[int, int]:
    """How often a body began though five of its user's ran, and the most that ran at a time."""
    data = log.read_bytes()
    entries = list(ENTRY.iter_unpack(data[: len(data) // ENTRY.size * ENTRY.size]))
    open_bodies: Counter[tuple[int, int]] = Counter()
    for _, pid, user, step in entries:
        open_bodies[pid, user] += step
    for (pid, user), count in open_bodies.items():
        if count == 0:
            continue
        assert pid in killed, "a body did not write its end"
        entries += [(killed[pid], pid, user, -1)] * count
    entries.sort(key=lambda entry: (entry[0], entry[3]))
    running: Counter[int] = Counter()
    over, most = 0, 0
    for _, _, user, step in entries:
        running[user] += step
        over += step > 0 and running[user] > LIMIT
        most = max(most, running[user])
    return over, most


class Fleet:
    """The processes of a storm."""

    def __init__(self, arguments: list[str], count: int) -> None:
        self._arguments = arguments
        self.killed: dict[int, float] = {}
        self.members = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, "--member", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_one(self, *, replace: bool = True) -> None:
        victim = self.members.pop(0)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        self.killed[victim.pid] = time.monotonic()
        if replace:
            self.members.append(self._start())

    def finish(self) -> Counter[str]:
        """Have all bodies end; the processes live on, for what they give back in the background."""
        total: Counter[str] = Counter()
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write("\n")
            member.stdin.flush()
        for member in self.members:
            assert member.stdout is not None
            figures = (int(word) for word in member.stdout.readline().split())
            total.update(dict(zip(("admitted", "refused", "cancelled"), figures, strict=True)))
        return total

    def close(self) -> None:
        for member in self.members:
            member.communicate()


def one_storm(peer: str, kind: str, options: argparse.Namespace) -> str:
    ttl = 3 if kind == "kills" else 60
    with EmbeddedRedis() as server, tempfile.TemporaryDirectory() as folder:
        time.sleep(2.5)  # until Redis is no longer young: before, each process counts for itself
        log = Path(folder, "log")
        words = [peer, server.url, ttl, options.tasks, CANCELLED if kind == "cancels" else 0.0, log]
        fleet = Fleet([str(word) for word in words], options.processes)
        ends = time.monotonic() + options.seconds
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            if kind == "kills":
                fleet.kill_one()
        if kind == "kills":
            figures: Counter[str] = Counter()
            while fleet.members:
                fleet.kill_one(replace=False)
            time.sleep(ttl + 1.5)
        else:
            figures = fleet.finish()
            time.sleep(0.5)
        left_over = leaked(server.url)
        fleet.close()
        over, most = over_admitted(log, fleet.killed)
        bodies = log.stat().st_size // ENTRY.size // 2
    return (
        f"| {kind} | {peer} | {bodies:,} | {figures['refused']:,} | {figures['cancelled']:,} | {len(fleet.killed)} "
        f"| {over} | {most} | {left_over} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--member"]:
        peer, url, ttl, tasks, cancelled, log = sys.argv[2:]
        asyncio.run(storm(peer, url, int(ttl), int(tasks), float(cancelled), Path(log)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--peer", action="append", choices=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="a few seconds, ours alone: does it still hold?")
    parser.add_argument("--out", help="write the table to this file, too")
    options = parser.parse_args()
    peers = options.peer or list(PEERS)
    if options.quick:
        options.seconds, options.processes, peers = 0.8, 3, ["ours"]
    try:
        import fastapi_stream_lease as _  # noqa: F401
    except ImportError:
        peers = [peer for peer in peers if peer != "fastapi-stream-lease"]
    size = f"{options.processes} processes x {options.tasks} tasks, {USERS} users, limit {LIMIT}"
    lines = [
        f"### {size}, {options.seconds:.0f} s each",
        "",
        "| storm | limiter | admitted | refused | cancelled | killed | over-admitted | most at a time | leaked |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines))
    sound = True
    for kind in ("control", "cancels", "kills"):
        for peer in peers:
            line = one_storm(peer, kind, options)
            print(line, flush=True)
            lines.append(line)
            cells = line.split(" | ")
            sound = sound and (peer != "ours" or (cells[6] == "0" and cells[8].startswith("0")))
    lines.append("")
    if options.out:
        Path(options.out).write_text("\n".join(lines))
    if not sound:
        sys.exit("ours gave a lease too many, or lost one")


if __name__ == "__main__":
    main()
