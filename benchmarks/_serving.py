"""Servers under measurement: each a process of its own, on the first core; the script keeps to the others."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Server:
    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        times = self.process.cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        """Bytes of memory."""
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def serve(command: list[str], port: int = 0) -> Iterator[Server]:
    """Start *command*, with ``{port}`` filled in; wait until it listens; stop it at the end."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    process = subprocess.Popen([part.replace("{port}", str(port)) for part in command])
    try:
        server = Server(port, psutil.Process(process.pid))
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            server.process.cpu_affinity(cores[:1])
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} did not start") from None
                time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def uvicorn(factory: str) -> list[str]:
    """The command that serves ``module:function`` of this folder on its own port."""
    command = [sys.executable, "-m", "uvicorn", "--factory", factory, "--port", "{port}"]
    return [*command, "--log-level", "critical", "--app-dir", str(HERE)]


def go(folder: str) -> list[str] | None:
    """The command of the Go peer, built into *folder*; None without a Go toolchain."""
    if shutil.which("go") is None:
        return None
    binary = os.path.join(folder, "stream")
    subprocess.run(["go", "build", "-o", binary, str(HERE / "peers" / "stream.go")], check=True)
    return [binary, "{port}"]


def node() -> list[str] | None:
    """The command of the Node peer; None without Node."""
    return ["node", str(HERE / "peers" / "stream.mjs"), "{port}"] if shutil.which("node") else None


def keep_off_the_servers_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[1:])
