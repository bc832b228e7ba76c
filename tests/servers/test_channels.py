"""The hub's delivery under every server, and through middleware that gets in its way [C4] [C5]."""

from __future__ import annotations

import re
import signal

import pytest

from tests.servers.conftest import endings
from tests.servers.harness import Client, Server, serve

pytestmark = pytest.mark.matrix

VIEWERS = 8


def texts(received: bytes) -> list[str]:
    """The data of the events without a name."""
    body = re.sub(rb"\r\n[0-9a-fA-F]+\r\n", b"", received.replace(b"\r\n\r\n", b"\r\n\r\n\r\n", 1))
    return [block.split(b"\n")[0][6:].decode() for block in body.split(b"\n\n") if block.startswith(b"data: ")]


def get(server: Server, path: str) -> bytes:
    client = Client(server.port, path, headers="Connection: close\r\n")
    assert client.status == 200
    received = client.read_to_end()
    client.close()
    return received


CELLS = [
    (name, middleware)
    for name in ("uvicorn httptools", "uvicorn h11", "granian", "granian rust", "hypercorn")
    for middleware in ("", "asyncio", "anyio", "base", "leases")
    # BaseHTTPMiddleware itself does not work there: anyio finds no task.
    if (name, middleware) != ("granian rust", "base")
]


@pytest.mark.parametrize(("name", "middleware"), CELLS)
def test_every_viewer_gets_everything_once_and_in_order(name: str, middleware: str, redis_url: str) -> None:
    environ = {"REDIS_URL": redis_url, "TEST_MIDDLEWARE": middleware}
    channel = f"{name}-{middleware}".replace(" ", "-")
    with serve(name, "channels", environ) as server:
        get(server, f"/publish/{channel}?first=0&last=50")
        viewers = [Client(server.port, f"/view/{channel}") for _ in range(VIEWERS)]
        for viewer in viewers[: VIEWERS // 2]:
            viewer.read_until(b"data: 49\n")
        get(server, f"/publish/{channel}?first=50&last=300")
        viewers[0].vanish()
        get(server, f"/publish/{channel}?first=300&last=400&end=1")
        for viewer in viewers[1:]:
            assert texts(viewer.read_to_end()) == [str(n) for n in range(400)]
            assert b"event: complete" in viewer.received
            viewer.close()


@pytest.mark.parametrize("name", ["uvicorn httptools", "uvicorn --workers 2", "granian", "hypercorn"])
def test_the_server_ends_with_viewers_open(name: str, redis_url: str) -> None:
    """[O1]"""
    with serve(name, "channels", {"REDIS_URL": redis_url}) as server:
        viewers = [Client(server.port, "/view/quiet") for _ in range(4)]
        for viewer in viewers:
            viewer.read_until(b"event: ready")
        seconds = server.stop(signal.SIGTERM)
        endings[f"{name}, viewers of a channel"] = seconds
        for viewer in viewers:
            assert b'event: close\ndata: {"reason":"shutdown"' in viewer.read_to_end()
        assert seconds <= 3.0
