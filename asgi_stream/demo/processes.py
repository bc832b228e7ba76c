"""The demo's other processes: started together, ended together, and started again when they die.

Each of them ends when its standard input does, so none outlives the demo, however that ends.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from asgi_stream.errors import StreamError
from asgi_stream.redis.embedded import EmbeddedRedis

logger = logging.getLogger("asgi_stream")

LOOK_EVERY = 0.1
REST = 0.5
"""Seconds that what died stays away: long enough to be seen."""
PATIENCE = 5.0


class Child:
    """One process, ``python -m module``; with ``says_port`` it prints its port once it listens.

    Such a one is given the port, 0 at first, as its argument: it comes back where it was.
    """

    def __init__(self, module: str, *arguments: str, first_line: str = "", says_port: bool = False) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._first_line = first_line
        self._says_port = says_port
        self.port = 0

    def start(self) -> Self:
        self.process = subprocess.Popen(
            [*self._command, *([str(self.port)] if self._says_port else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; we end it after the streams that use it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self._first_line:
            self.process.stdin.write(f"{self._first_line}\n".encode())
            self.process.stdin.flush()
        if self._says_port:
            said = self.process.stdout.readline().strip()
            if not said:
                raise StreamError(f"{self._command[2]} did not start; its error is above")
            self.port = int(said)
        return self

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def release(self) -> None:
        """Tell it to end."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already

    def join(self) -> None:
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Troupe:
    """Children and a Redis that come back when they die."""

    def __init__(self, redis: EmbeddedRedis | None) -> None:
        self._redis = redis
        self._children: list[Child] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="demo processes", daemon=True)

    def add(self, child: Child) -> Child:
        self._children.append(child.start())
        return child

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        for child in self._children:
            child.release()
        for child in self._children:
            child.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            try:
                if self._redis is not None and not self._redis.is_running and not self._over.wait(REST):
                    self._redis.stop()
                    self._redis.start()
                for child in list(self._children):
                    if not child.is_running and not self._over.wait(REST):
                        child.release()
                        child.join()
                        child.start()
            except Exception:
                logger.exception("a process of the demo could not be started again")
                return
