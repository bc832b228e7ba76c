"""Drives an ASGI application by hand: no server, every message seen, the client leaves when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from asgi_stream.sse import ServerSentEvent, decode

Message = MutableMapping[str, Any]
HANG = 20.0  # a hang limit, never a measure


def http_scope(path: str = "/", *, method: str = "GET", headers: dict[str, str] | None = None, **more: Any) -> Any:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("192.0.2.7", 50000),
        "server": ("127.0.0.1", 80),
        **more,
    }


class Exchange:
    """One request to an ASGI application, run in a task of its own."""

    def __init__(self, app: Callable[..., Awaitable[None]], scope: Any) -> None:
        self.messages: list[Message] = []
        self.blocked = False  # the client does not read: sends wait
        self._changed = asyncio.Condition()
        self._gone = asyncio.Event()
        self._readable = asyncio.Event()
        self._readable.set()
        self._asked = False
        self.task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: Callable[..., Awaitable[None]], scope: Any) -> None:
        try:
            await app(scope, self.receive, self.send)
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self._readable.wait()
        self.messages.append(message)
        async with self._changed:
            self._changed.notify_all()

    def leave(self) -> None:
        """The client goes away."""
        self._gone.set()

    def stop_reading(self) -> None:
        self._readable.clear()

    def read_again(self) -> None:
        self._readable.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the messages to fulfil *condition*."""
        async with asyncio.timeout(HANG), self._changed:
            await self._changed.wait_for(lambda: condition() or self.task.done())
        if not condition():
            self.task.result()
            raise AssertionError(f"the response ended before: {self.messages!r}")

    async def until_body(self, part: bytes) -> None:
        await self.until(lambda: part in self.body)

    async def end(self) -> Exchange:
        """Wait for the application to return."""
        async with asyncio.timeout(HANG):
            await self.task
        return self

    @property
    def started(self) -> bool:
        return bool(self.messages)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(m["body"]) for m in self.messages if m["type"] == "http.response.body"]

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def events(self) -> list[ServerSentEvent]:
        return list(decode([self.body]))

    @property
    def over(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)


async def fetch(app: Callable[..., Awaitable[None]], scope: Any = None) -> Exchange:
    """Run one request to its end."""
    return await Exchange(app, http_scope() if scope is None else scope).end()
