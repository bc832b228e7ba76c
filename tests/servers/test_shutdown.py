"""Servers end with streams open, and say goodbye [O1] [O3]."""

from __future__ import annotations

import re
import signal

import pytest

from tests.servers.conftest import endings
from tests.servers.harness import Client, serve

pytestmark = pytest.mark.matrix

WAYS = [
    ("uvicorn httptools", signal.SIGTERM, False),
    ("uvicorn httptools", signal.SIGINT, False),
    ("uvicorn h11", signal.SIGTERM, False),
    ("uvicorn --workers 2", signal.SIGTERM, False),
    ("uvicorn --workers 2", signal.SIGINT, True),
    ("uvicorn --reload", signal.SIGTERM, False),
    ("uvicorn --reload", signal.SIGINT, True),
    ("gunicorn", signal.SIGTERM, False),
    ("granian", signal.SIGTERM, False),
    ("hypercorn", signal.SIGTERM, False),
]


@pytest.mark.parametrize(("name", "number", "group"), WAYS)
def test_every_stream_gets_its_goodbye_and_the_server_ends(name: str, number: signal.Signals, group: bool) -> None:
    """Our streams, and Starlette's own behind the middleware; the producers are closed."""
    with serve(name, "starlette") as server:
        clients = [Client(server.port, path) for path in ("/wait", "/wait", "/wait", "/foreign")]
        for client in clients:
            client.read_until(b"data: token\n\n")
        seconds = server.stop(number, group=group)
        endings[f"{name}, {number.name}{' to the group' if group else ''}"] = seconds
        retries = set()
        for client in clients:
            received = client.read_to_end()
            assert b'event: close\ndata: {"reason":"shutdown"' in received
            found = re.search(rb"retry: (\d+)\n", received)
            assert found
            retries.add(int(found.group(1)))
        assert len(retries) > 1
        assert all(1000 <= retry <= 5000 for retry in retries)
        server.wait_for_log("closed", 4)
        assert seconds <= 3.0
        if name.startswith("uvicorn h"):
            server.wait_for_log("lifespan over")


@pytest.mark.parametrize("name", ["uvicorn httptools", "uvicorn h11", "hypercorn"])
def test_a_client_that_does_not_read_does_not_hold_up_the_server(name: str) -> None:
    with serve(name, "starlette") as server:
        idle = Client(server.port, "/flood", small_buffer=True)
        other = Client(server.port, "/wait")
        other.read_until(b"data: token\n\n")
        seconds = server.stop()
        endings[f"{name}, a client that does not read"] = seconds
        assert b"event: close" in other.read_to_end()
        assert seconds <= 3.0 if name != "hypercorn" else seconds <= 5.0  # it waits 3 s for its clients by itself
        idle.close()
