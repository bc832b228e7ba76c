"""Starts the demo: Redis, the model, two workers and a second web server, each a process; and serves the first page."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import webbrowser
from contextlib import ExitStack
from dataclasses import asdict, replace

import uvicorn

from asgi_stream.asgi.listener import listen
from asgi_stream.demo.app import DemoSettings, create_app
from asgi_stream.demo.processes import Child, Troupe
from asgi_stream.errors import MissingExtraError
from asgi_stream.redis.embedded import EmbeddedRedis


def run(*, host: str, port: int, browser: bool, speed: float, limit: int, redis_url: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        url = f"http://{host}:{listener.getsockname()[1]}"
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="asgi_stream-demo-", ignore_cleanup_errors=True)
        )
        redis = None if redis_url else _embedded(stack, folder)
        shared = redis_url or (redis.url if redis else None)
        troupe = Troupe(redis)
        upstream_url, local = _upstream(troupe)
        settings = DemoSettings(
            upstream_url=upstream_url,
            local_upstream=local,
            limit=limit,
            speed=speed,
            redis_url=shared,
            may_restart_redis=redis is not None,
            folder=folder,
        )
        stack.enter_context(troupe)
        if shared is not None:
            from asgi_stream.demo import worker

            for _ in range(2):
                troupe.add(Child(worker.__name__, shared))
            other = asdict(replace(settings, other_url=url, name="second"))
            web = Child("asgi_stream.demo.web", first_line=json.dumps(other), says_port=True)
            settings = replace(settings, other_url=f"http://127.0.0.1:{troupe.add(web).port}")
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
        print(f"Demo at {url}  (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server.run([listener])


def _embedded(stack: ExitStack, folder: str) -> EmbeddedRedis | None:
    try:
        return stack.enter_context(EmbeddedRedis(folder=_made(folder, "redis")))
    except MissingExtraError as exc:
        print(f"The deploy panel is off: {exc}", file=sys.stderr)
        return None


def _made(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    os.mkdir(path)
    return path


def _upstream(troupe: Troupe) -> tuple[str, bool]:
    """The base URL of an OpenAI-compatible API, and whether it is the built-in one."""
    url = os.environ.get("OPENAI_BASE_URL")
    if url:
        return url.rstrip("/"), False
    child = troupe.add(Child("asgi_stream.demo.upstream", says_port=True))
    return f"http://127.0.0.1:{child.port}/v1", True
