"""Limits over real sockets, again and again [L1] [L6]."""

from __future__ import annotations

import json
import time

import pytest

from tests.servers.conftest import slots
from tests.servers.harness import Client, Server, serve

pytestmark = pytest.mark.matrix

LIMIT = 5
ROUNDS = 60


def in_use(server: Server) -> int:
    client = Client(server.port, "/in_use")
    client.read_until(b"\r\n\r\n")
    length = int(client.received.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(client.received.split(b"\r\n\r\n", 1)[1]) < length:
        client.received += client.socket.recv(100)
    client.close()
    return int(json.loads(client.received.split(b"\r\n\r\n", 1)[1]))


def until_free(server: Server, count: int) -> None:
    deadline = time.monotonic() + 10
    while in_use(server) != count:
        assert time.monotonic() < deadline, f"{in_use(server)} slots in use, not {count}"


@pytest.mark.parametrize(
    ("app", "path", "middleware"),
    [
        ("leases", "as_written", True),
        ("leases", "ours", False),
        ("leases", "ours", True),
        ("leases", "handed_over", False),
        ("leases", "in_generator", False),
        ("leases_fastapi", "dependency", False),
        ("leases_fastapi", "dependency_foreign", False),
        ("leases_fastapi", "dependency_foreign", True),
        ("leases_fastapi", "all_together", True),
    ],
)
def test_five_stream_and_the_sixth_is_refused_many_times_over(app: str, path: str, middleware: bool) -> None:
    environ = {"TEST_MIDDLEWARE": "1"} if middleware else {}
    with serve("uvicorn httptools", app, environ) as server:
        for n in range(ROUNDS):
            clients = [Client(server.port, f"/{path}") for _ in range(LIMIT)]
            for client in clients:
                assert client.status == 200
            refused = Client(server.port, f"/{path}")
            assert refused.status == 429
            refused.close()
            if n % 3 == 0:
                clients.pop().vanish()
            elif n % 3 == 1:
                clients.pop().close()
            for client in clients:
                assert b"data: 2\n\n" in client.read_to_end()
                client.close()
            until_free(server, 0)
        ends = sorted(float(line.split()[0]) for line in server.log if "over" in line)
        freed = sorted(float(line.split()[0]) for line in server.log if "freed" in line)
        assert len(ends) == len(freed) == ROUNDS * LIMIT
        # The n-th slot is free this long after the server learned of the n-th end; negative: just before the last byte.
        delays = [slot - end for end, slot in zip(ends, freed, strict=True)]
        slots[f"{app} {path}{' + middleware' if middleware else ''}"] = max(delays)
        # And clients that vanish before their first byte; last, since the server may read their requests late.
        for _ in range(ROUNDS * 3):
            Client(server.port, f"/{path}").vanish()
        until_free(server, 0)


def test_the_block_without_middleware_warns_and_limits_nothing() -> None:
    with serve("uvicorn httptools", "leases") as server:
        clients = [Client(server.port, "/as_written") for _ in range(LIMIT + 1)]
        assert [client.status for client in clients] == [200] * (LIMIT + 1)
        for client in clients:
            client.read_to_end()
            client.close()
        assert server.output.count("StreamLeaseWarning") == 1
        assert "app.add_middleware(StreamLeaseMiddleware)" in server.output
