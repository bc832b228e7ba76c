"""A TCP proxy in front of a Redis that does what networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["close", "silence"]


class FaultProxy:
    """Passes everything on, until `drop_reply_to()`: then what answers the next such command is swallowed.

    The command itself arrives. ``"close"``: both sides are cut then; ``"silence"``: nothing more comes through.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._word: bytes | None = None
        self._fault: Fault = "close"
        self._pumps: set[asyncio.Task[None]] = set()
        self.dropped = 0
        self.url = ""

    def drop_reply_to(self, word: str, fault: Fault) -> None:
        self._word, self._fault = word.encode(), fault

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        try:
            yield self
        finally:
            server.close()
            for pump in self._pumps:
                pump.cancel()
            if self._pumps:
                await asyncio.wait(self._pumps)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        server_reader, server_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        broken = asyncio.Event()

        async def to_server() -> None:
            while data := await reader.read(65536):
                if self._word is not None and self._word in data:
                    self._word = None
                    self.dropped += 1
                    broken.set()
                server_writer.write(data)

        async def to_client() -> None:
            while data := await server_reader.read(65536):
                if not broken.is_set():
                    writer.write(data)
                elif self._fault == "close":
                    return  # the answer is here, so the command was done

        try:
            both = [asyncio.create_task(to_server()), asyncio.create_task(to_client())]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in both:
                    one.cancel()
                await asyncio.wait(both)
        except asyncio.CancelledError:
            pass
        finally:
            for each in (server_writer, writer):
                each.close()
                with contextlib.suppress(OSError):
                    await each.wait_closed()
            self._pumps.discard(task)
