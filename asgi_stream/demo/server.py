"""Starts the demo: the upstream in a process of its own, then the web server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from asgi_stream.asgi.listener import listen
from asgi_stream.demo.app import create_app
from asgi_stream.errors import StreamError


def run(*, host: str, port: int, browser: bool, speed: float, limit: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    listener = listen(host, port)
    url = f"http://{host}:{listener.getsockname()[1]}"
    with _upstream() as (upstream_url, local):
        app = create_app(upstream_url, local_upstream=local, limit=limit, speed=speed)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        print(f"Demo at {url}  (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server.run([listener])


@contextmanager
def _upstream() -> Iterator[tuple[str, bool]]:
    """The base URL of an OpenAI-compatible API, and whether it is the built-in one."""
    url = os.environ.get("OPENAI_BASE_URL")
    if url:
        yield url.rstrip("/"), False
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "asgi_stream.demo.upstream"],
        stdin=subprocess.PIPE,  # it ends when this pipe does: at our exit, and at our death
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us; we end it after the streams that use it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise StreamError("the demo's upstream server did not start; its error is above")
        yield f"http://127.0.0.1:{int(port)}/v1", True
    finally:
        process.stdin.close()
        process.wait(5)
