"""A local server that speaks OpenAI's chat protocol, so that the demo's tokens come from a real upstream.

Run as ``python -m asgi_stream.demo.upstream PORT`` (0 is any): it prints its port, and ends when its standard input
does, so that it cannot outlive the demo, however that ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asgi_stream import EventStreamResponse
from asgi_stream.asgi.listener import listen

MODEL = "demo-passages"
SPEED_HEADER = "x-demo-tokens-per-second"

PASSAGES = {
    ("lease", "limit", "429", "slot", "many"): (
        "Every stream you open here holds a lease: one of your slots. Five are yours; the sixth request is answered "
        "with 429 before a single token is made, and the answer says when to try again. A slot comes back just before "
        "the last byte of its stream, or as soon as the server notices that you are gone."
    ),
    ("heartbeat", "ping", "silent", "idle"): (
        "A stream that has nothing to say sends a comment now and then: one line that clients skip. Proxies see that "
        "the connection lives, and a client that hears nothing at all knows that it does not. Heartbeats never count "
        "as events, and they reset none of the time limits."
    ),
    ("cut", "disconnect", "stop", "leave", "close"): (
        "When you cut the connection, nobody says goodbye. The server notices, closes the generator in the task it "
        "ran in, and the generator's finally block closes the request to the model behind it. Look at the number of "
        "open upstream requests: it falls at once, and so would the bill."
    ),
    ("sse", "event", "format", "wire", "protocol"): (
        "Server-sent events are lines of text. Each event is a few fields and a blank line: data, perhaps a name, "
        "perhaps an id. A browser reads them with EventSource, a program with any line reader. The stream you are "
        "reading ends with an event named complete, so that nobody takes a cut stream for a whole one."
    ),
}
DEFAULT = (
    "These words are tokens. They come from a server that speaks the protocol of OpenAI's chat completions, one chunk "
    "at a time, and pass through the demo's web process straight to your page: no queue between, nothing stored. Ask "
    "about leases, heartbeats, disconnects or the wire format, and the answer follows your question."
)

open_requests = 0


def answer(prompt: str) -> str:
    """The passage whose keywords the prompt has most of."""
    words = prompt.lower()
    best = max(PASSAGES, key=lambda keys: sum(key in words for key in keys))
    return PASSAGES[best] if any(key in words for key in best) else DEFAULT


def tokens(text: str) -> list[str]:
    """Cut *text* into pieces of about a word, spaces kept."""
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


async def completions(request: Request) -> Response:
    try:
        body = await request.json()
        prompt = str(body["messages"][-1]["content"])
        speed = float(request.headers.get(SPEED_HEADER, "25"))
        if not 0.1 <= speed <= 1000:
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError):
        error = {"message": "send messages with content", "type": "invalid_request_error", "code": None}
        return JSONResponse({"error": error}, 400)
    text = answer(prompt)
    head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": MODEL}
    if not body.get("stream"):
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return JSONResponse({**head, "object": "chat.completion", "choices": [message]})

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    async def generate() -> AsyncIterator[Any]:
        global open_requests
        open_requests += 1
        try:
            yield chunk({"role": "assistant", "content": ""})
            for token in tokens(text):
                await asyncio.sleep(1 / speed)
                yield chunk({"content": token})
            yield chunk({}, "stop")
            yield "[DONE]"
        finally:
            open_requests -= 1

    return EventStreamResponse(generate(), end_event=None)


async def stats(request: Request) -> Response:
    return JSONResponse({"open": open_requests})


app = Starlette(
    routes=[Route("/v1/chat/completions", completions, methods=["POST"]), Route("/stats", stats)],
)


async def serve() -> None:
    listener = listen("127.0.0.1", int(sys.argv[1]))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve([listener]))
    print(listener.getsockname()[1], flush=True)
    try:
        await asyncio.to_thread(sys.stdin.buffer.read)  # until the demo closes its end, or dies
    finally:
        server.should_exit = server.force_exit = True
        await serving


if __name__ == "__main__":
    asyncio.run(serve())
