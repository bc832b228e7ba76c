"""One limit over two web processes [L1] [L2]."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import redis as driver

from tests.servers.harness import Client, serve

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(180)]

ROUNDS = 10_000


def until_old(url: str) -> None:
    client: Any = driver.Redis.from_url(url)
    while client.info("server")["uptime_in_seconds"] < 3:
        time.sleep(0.1)
    client.close()


@pytest.mark.parametrize("path", ["/once", "/task"])
def test_a_slot_is_free_with_the_last_byte_in_the_other_process_too(redis_url: str, path: str) -> None:
    """Limit 1: open, read to the end, open again at once in the other process: never refused."""
    until_old(redis_url)
    environ = {
        "REDIS_URL": redis_url,
        "ASGI_STREAM_LEASE_LIMIT": "1",
        "ASGI_STREAM_LEASE_KEY_NAMESPACE": f"servers-{os.getpid()}-{path[1:]}",
    }
    rounds = ROUNDS if path == "/once" else 20
    with (
        serve("uvicorn httptools", "shared_leases", environ) as one,
        serve("uvicorn httptools", "shared_leases", environ) as two,
    ):
        for server in (one, two):  # both have found Redis
            Client(server.port, path).read_to_end()
        refused = 0
        for n in range(rounds):
            client = Client(one.port if n % 2 else two.port, path)
            refused += client.status != 200
            client.read_to_end()
            client.close()
        assert refused == 0
        holding = Client(one.port, "/hold")
        assert holding.status == 200
        assert Client(two.port, path).status == 429
        holding.vanish()
