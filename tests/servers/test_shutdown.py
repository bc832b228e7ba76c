"""Servers end with streams open, and say goodbye [O1] [O3]."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from asgi_stream import EventStreamResponse, init_streaming, shutdown_streaming
from tests.servers.conftest import endings
from tests.servers.harness import HANG, Client, serve

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


@pytest.mark.parametrize("name", ["uvicorn httptools", "uvicorn h11", "granian", "hypercorn"])
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


def test_a_changed_file_reloads_a_server_with_streams_open() -> None:
    with serve("uvicorn --reload", "starlette") as server:
        clients = [Client(server.port, path) for path in ("/wait", "/foreign")]
        for client in clients:
            client.read_until(b"data: token\n\n")
        deadline = time.monotonic() + HANG
        while "detected changes" not in server.output:  # uvicorn begins to watch some time after it has started
            assert time.monotonic() < deadline
            (Path(server.folder.name) / "changed.py").write_text(f"changed = {time.monotonic()}\n")
            time.sleep(0.05)
        for client in clients:
            assert b"event: close" in client.read_to_end()
        server.wait_for_log("closed", 2)
        server.wait_until_ready()
        again = Client(server.port, "/wait")
        again.read_until(b"data: token\n\n")
        again.vanish()


def test_a_server_in_a_thread_is_told_to_end_its_streams() -> None:
    """No signal reaches it: `begin_shutdown()` says it."""

    async def items() -> AsyncIterator[str]:
        try:
            yield "token"
            await asyncio.sleep(60)
        finally:
            closed.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStreamResponse(items())(scope, receive, send)

    closed = threading.Event()
    streaming = init_streaming()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = Client(listener.getsockname()[1], "/")
        client.read_until(b"data: token\n\n")
        streaming.begin_shutdown()
        server.should_exit = True
        assert b"event: close" in client.read_to_end()
        thread.join(HANG)
        assert not thread.is_alive()
        assert closed.is_set()
        asyncio.run(shutdown_streaming())
