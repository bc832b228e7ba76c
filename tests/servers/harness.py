"""Real servers in processes of their own, and a client that sees every byte and can vanish."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import need_module

HANG = 30.0

SERVERS: dict[str, list[str]] = {
    "uvicorn httptools": ["uvicorn", "--loop", "uvloop", "--http", "httptools", "--log-level", "warning"],
    "uvicorn h11": ["uvicorn", "--loop", "asyncio", "--http", "h11", "--log-level", "warning"],
    "granian": ["granian", "--interface", "asgi", "--no-ws", "--log-level", "warning"],
    "granian rust": ["granian", "--interface", "asgi", "--no-ws", "--task-impl", "rust", "--log-level", "warning"],
    "hypercorn": ["hypercorn", "-w", "0"],
    "uvicorn --workers 2": ["uvicorn", "--workers", "2", "--log-level", "warning"],
    "uvicorn --reload": ["uvicorn", "--reload", "--log-level", "warning"],
    "gunicorn": ["gunicorn", "-k", "uvicorn_worker.UvicornWorker", "--log-level", "warning"],
}


class Server:
    """A running server. ``log`` holds what the application recorded, one line each."""

    def __init__(self, name: str, app: str, environ: dict[str, str] | None = None, port: int = 0) -> None:
        need_module(SERVERS[name][0])
        self.folder = tempfile.TemporaryDirectory()
        self.log_path = Path(self.folder.name) / "log"
        self.log_path.touch()
        self.output_path = Path(self.folder.name) / "output"
        self.port = port or _free_port()
        program = SERVERS[name][0]
        place = {
            "uvicorn": ["--port", str(self.port)],
            "granian": ["--host", "127.0.0.1", "--port", str(self.port)],
            "hypercorn": ["--bind", f"127.0.0.1:{self.port}"],
            "gunicorn": ["--bind", f"127.0.0.1:{self.port}"],
        }[program]
        if "--reload" in SERVERS[name]:
            place += ["--reload-dir", self.folder.name]
        env = {**os.environ, "TEST_APP": app, "TEST_LOG": str(self.log_path), **(environ or {})}
        with open(self.output_path, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *SERVERS[name], *place, "tests.servers.apps:app"],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + HANG
        while True:
            try:
                if Client(self.port, "/ready").status == 200:
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the server did not start:\n{self.output}") from None
                time.sleep(0.02)

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    @property
    def log(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def wait_for_log(self, word: str, count: int = 1) -> list[str]:
        """Wait until *count* lines hold *word*; return them."""
        deadline = time.monotonic() + HANG
        while True:
            lines = [line for line in self.log if word in line]
            if len(lines) >= count:
                return lines
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(lines)} of {count} lines with {word!r}: {self.log}\n{self.output}")
            time.sleep(0.002)

    def stop(self, number: int = signal.SIGTERM, *, group: bool = False) -> float:
        """Send a signal; return the seconds until the process has ended."""
        begun = time.monotonic()
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        try:
            self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {HANG} s:\n{self.output}") from None
        return time.monotonic() - begun

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(HANG)
        self.folder.cleanup()


@contextmanager
def serve(name: str, app: str, environ: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(name, app, environ)
    try:
        yield server
    finally:
        server.kill()


class Client:
    """One HTTP/1.1 request over a plain socket."""

    def __init__(self, port: int, path: str, *, small_buffer: bool = False, headers: str = "") -> None:
        self.socket = socket.socket()
        self.socket.settimeout(HANG)
        if small_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        self.received = b""

    @property
    def status(self) -> int:
        """Wait for the status line."""
        self.read_until(b"\r\n\r\n")
        return int(self.received.split(b" ", 2)[1])

    def read_until(self, part: bytes) -> bytes:
        while part not in self.received:
            block = self.socket.recv(65536)
            if not block:
                raise AssertionError(f"the server closed before {part!r}: {self.received!r}")
            self.received += block
        return self.received

    def read_to_end(self) -> bytes:
        """Read to the end of the chunked body, or of the connection."""
        while not self.received.endswith(b"0\r\n\r\n"):
            try:
                block = self.socket.recv(65536)
            except ConnectionError:
                break
            if not block:
                break
            self.received += block
        return self.received

    def vanish(self) -> None:
        """Reset the connection, as a client that lost its network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close in order."""
        self.socket.close()

    def __del__(self) -> None:
        self.socket.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
