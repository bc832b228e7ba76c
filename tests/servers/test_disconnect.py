"""A client that leaves closes the producer, in every framework on every server [D2] [D5]."""

from __future__ import annotations

import pytest

from tests.servers.conftest import cells
from tests.servers.harness import Client, Server, serve
from tests.support import need_module

FRAMEWORKS = ["plain", "starlette", "fastapi", "litestar", "quart"]
SERVERS = ["uvicorn httptools", "uvicorn h11", "granian", "granian rust", "hypercorn"]

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_client_that_leaves_closes_the_producer_at_once_in_its_own_task(framework: str, name: str) -> None:
    if framework != "plain":
        need_module(framework)
    with serve(name, framework) as server:
        taken = [_leave(server, how, n) for n, how in enumerate(("vanish", "close", "vanish"), start=1)]
    cells[framework, name] = min(taken)
    assert min(taken) <= 0.05


def _leave(server: Server, how: str, count: int) -> float:
    """Leave a stream; return the seconds between the server's notice and the end of the producer's `finally`."""
    client = Client(server.port, "/wait")
    client.read_until(b"data: token\n\n")
    getattr(client, how)()
    line = server.wait_for_log("closed", count)[-1]
    assert line.endswith("closed same-task kept")
    noticed = server.wait_for_log("noticed", count)[-1]
    return float(line.split()[0]) - float(noticed.split()[0])
