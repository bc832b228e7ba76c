"""Everybody comes back at once: how soon has everyone what they missed, and what does it cost?

    python benchmarks/storm.py [--viewers 2000] [--rounds 3] [--quick]

All viewers are cut, miss 20 events, and come back together with their last id while events go on: first many viewers of
one channel, then half as many with a channel each. Peer: nchan with the same Redis, where nginx has it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from typing import Any

import redis
import uvloop
from _serving import keep_off_the_servers_core
from _viewers import Audience, Peer, Viewer, has_nchan, lines_of_machine, nchan_peer, python_peer, raise_file_limit
from channels import Results, table

from asgi_stream.redis.embedded import EmbeddedRedis

MISSED = 20


def last_id(viewer: Viewer) -> str:
    """The last id in what the viewer was sent last."""
    begin = viewer.tail.rfind(b"id: ")
    return viewer.tail[begin + 4 :].split(b"\n")[0].strip().decode() if begin >= 0 else ""


def commands(client: Any) -> int:
    """How many commands Redis has done that were not publishing or asking for this."""
    stats = client.info("commandstats")
    return sum(value["calls"] for name, value in stats.items() if name not in ("cmdstat_info", "cmdstat_publish"))


async def storm(peer: Peer, viewers: int, channels: int, tag: str, client: Any) -> tuple[float, float, float]:
    """Return seconds until all are complete, the server's CPU seconds, and Redis's commands a viewer."""
    names = [f"{tag}{n % channels}" for n in range(viewers)]
    audience = Audience(peer.server.port)
    await audience.fill(names)
    for attempt in range(2):  # the first may come before the subscription
        came = audience.expect(viewers)
        for channel in dict.fromkeys(names):
            await peer.publish(channel, 1)
        try:
            async with asyncio.timeout(10):
                await came
        except TimeoutError:
            if attempt:
                raise
    ids = [last_id(viewer) for viewer in audience.viewers]
    audience.close()
    await asyncio.sleep(0.5)
    for channel in dict.fromkeys(names):
        await peer.publish(channel, MISSED)
    await asyncio.sleep(1.0)  # the server has heard it all
    before, cpu = commands(client), peer.server.cpu()
    back = Audience(peer.server.port)
    came = back.expect(viewers * MISSED)
    begun = time.perf_counter()
    await asyncio.gather(*(back.join(name, id) for name, id in zip(names, ids, strict=True)))
    async with asyncio.timeout(60):
        await came
    took = time.perf_counter() - begun
    if back.seen > viewers * MISSED:
        raise SystemExit(f"{peer.name} sent something twice: {back.seen} of {viewers * MISSED}")
    asked = commands(client) - before
    spent = peer.server.cpu() - cpu
    back.close()
    await asyncio.sleep(0.5)
    return took, spent, asked / viewers


async def run(rounds: int, viewers: int) -> list[str]:
    lines = ["## Reconnect storms", "", *lines_of_machine()]
    with EmbeddedRedis("--maxclients", "15000") as server, contextlib.ExitStack() as stack:
        client = redis.Redis.from_url(server.url)
        stack.callback(client.close)
        peers = [stack.enter_context(python_peer("ours", server.url))]
        if has_nchan():
            peers.append(stack.enter_context(nchan_peer(server.url)))
        keep_off_the_servers_core()
        for count, channels in ((viewers, 1), (viewers // 2, viewers // 2)):
            results: Results = {peer.name: [] for peer in peers}
            for n in range(rounds):
                for peer in peers:
                    results[peer.name].append(await storm(peer, count, channels, f"s{channels}-{n}-", client))
            lines += table(
                f"{count} viewers of {channels} channels, back at once after {MISSED} events",
                ["s until complete", "server CPU s", "Redis commands a viewer"],
                results,
                "nchan",
                [".2f", ".2f", ".3f"],
                [1, 1, 1],
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does every peer still work?")
    parser.add_argument("--out", help="write the tables to this file, too")
    options = parser.parse_args()
    raise_file_limit()
    rounds, viewers = (1, 40) if options.quick else (options.rounds, options.viewers)
    lines = uvloop.run(run(rounds, viewers))
    print("\n".join(lines))
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
