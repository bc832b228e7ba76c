"""The demo's second web process: ``python -m asgi_stream.demo.web PORT``, its settings as JSON on standard input.

It prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvicorn

from asgi_stream.asgi.listener import listen
from asgi_stream.demo.app import DemoSettings, create_app


async def serve() -> None:
    settings = DemoSettings(**json.loads(sys.stdin.readline()))
    listener = listen("127.0.0.1", int(sys.argv[1]))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
    serving = asyncio.create_task(server.serve([listener]))
    print(listener.getsockname()[1], flush=True)
    try:
        await asyncio.to_thread(sys.stdin.buffer.read)
    finally:
        server.should_exit = True
        await serving


if __name__ == "__main__":
    asyncio.run(serve())
