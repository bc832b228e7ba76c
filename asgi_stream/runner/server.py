"""Runs a command, streams its output to a channel, and serves the page that shows it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from importlib.resources import files

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route

from asgi_stream.asgi.app import StreamApp
from asgi_stream.asgi.listener import listen
from asgi_stream.context import StreamContext
from asgi_stream.errors import MissingExtraError, StreamError
from asgi_stream.redis.embedded import EmbeddedRedis
from asgi_stream.runtime import Streaming

HOST = "127.0.0.1"
LINE_BYTES = 64 * 1024
"""A longer line is published in parts."""
FIRST_LOOK = 5.0
"""Seconds that a browser has to open the page of a command that is over already."""
LAST_WORDS = 2.0
"""Seconds that pages have to receive the ending before the server goes."""
TERMINATE_AFTER = 3.0
"""Seconds that the command has to end by itself after Ctrl-C."""


class Run:
    """One run of a command."""

    def __init__(self, command: list[str], streaming: Streaming) -> None:
        self.command = command
        self.streaming = streaming
        self.context = StreamContext.create("asgi-stream run", service=command[0], streaming=streaming)
        self.exit_code = 1
        self.over = asyncio.Event()

    async def go(self) -> None:
        """Run it to its end."""
        ctx = self.context
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        except OSError as exc:
            self.exit_code = 127 if isinstance(exc, FileNotFoundError) else 126
            message = f"{self.command[0]}: {exc.strerror}"
            print(message, file=sys.stderr)
            await ctx.fail_async("not_started", message)
            self.over.set()
            return
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(process.stdout, "stdout"))
                group.create_task(self._read(process.stderr, "stderr"))
            code = await process.wait()
            self.exit_code = code if code >= 0 else 128 - code  # a signal, as shells say it
            await ctx.complete_async(success=code == 0, exit_code=self.exit_code)
        except asyncio.CancelledError:
            await _end(process)
            self.exit_code = 130
            await ctx.end_cancelled_async("interrupted")
            raise
        finally:
            self.over.set()

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        echo = sys.stdout if name == "stdout" else sys.stderr
        while True:
            try:
                line = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError as exc:
                line = exc.partial
            except asyncio.LimitOverrunError as exc:
                line = await stream.readexactly(min(exc.consumed, LINE_BYTES))
            if not line:
                return
            text = line.decode("utf-8", "replace")
            # In a thread: a terminal that was stopped must not stop those who look on elsewhere.
            await asyncio.to_thread(print, text, end="", file=echo, flush=True)
            try:
                await self.context.log_async(text.rstrip("\r\n"), logger=name)
            except StreamError as exc:
                print(f"asgi-stream: {exc}", file=sys.stderr)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    try:
        async with asyncio.timeout(TERMINATE_AFTER):
            process.send_signal(signal.SIGTERM)
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    except ProcessLookupError:
        pass


def create_app(run: Run) -> Starlette:
    """The page, and the run's channel."""
    title = shlex.join(run.command)
    page = files(__package__).joinpath("page.html").read_text("utf-8")

    async def index(request: Request) -> HTMLResponse:
        from html import escape

        return HTMLResponse(
            page.replace("%TITLE%", escape(title)).replace("%CHANNEL%", run.context.channel_id),
            headers={
                "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
            },
        )

    # It listens on this machine only, and has nothing but this run.
    events = StreamApp(run.streaming, authorize=lambda request, channel, verb: channel == run.context.channel_id)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with run.streaming:
            task = asyncio.create_task(run.go())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    return Starlette(routes=[Route("/", index), Mount("/events", events)], lifespan=lifespan)


def run(command: list[str], *, redis_url: str | None, port: int, browser: bool, keep: bool) -> int:
    """Run *command* and serve its page until it is over, or until Ctrl-C; return its exit code."""
    with ExitStack() as stack:
        listener = stack.enter_context(listen(HOST, port))
        shared = redis_url
        if shared is None:
            try:
                shared = stack.enter_context(EmbeddedRedis()).url
            except MissingExtraError as exc:
                print(f"No other terminal can follow this run: {exc}", file=sys.stderr)
        this = Run(command, Streaming(shared))
        try:
            asyncio.run(_serve(this, shared, listener, browser=browser, keep=keep))
        except KeyboardInterrupt:
            pass  # told by the exit code, if the command was still running
        return this.exit_code


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)


async def _serve(this: Run, redis_url: str | None, listener: socket.socket, *, browser: bool, keep: bool) -> None:
    server = uvicorn.Server(uvicorn.Config(create_app(this), log_level="warning"))
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    print(f"Page:    {url}", file=sys.stderr)
    if redis_url is not None:
        print(
            f"Follow:  asgi-stream tail {this.context.channel_id} --redis-url {redis_url}", file=sys.stderr, flush=True
        )
    if browser:
        threading.Timer(0.3, webbrowser.open, [url]).start()

    async def stop_when_over() -> None:
        await this.over.wait()
        if keep:
            return
        if browser:  # a short command may be over before the page is there
            await _until(lambda: this.streaming.streams.count() > 0, FIRST_LOOK)
        await _until(lambda: not this.streaming.streams.count(), LAST_WORDS)
        server.should_exit = True

    stopping = asyncio.create_task(stop_when_over())
    try:
        await server.serve(sockets=[listener])
    finally:
        stopping.cancel()
