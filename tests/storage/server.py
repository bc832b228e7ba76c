"""A real server for tests of storage: osmem-server (a wheel), an OpenSearch node, or one that runs already.

``ASGI_STREAM_OPENSEARCH`` says which: nothing for osmem-server; ``node:2.19`` or ``node:3.8`` for the Maven project in
``tests/opensearch_node``, which needs a JDK (17, or 21) and Maven; ``HOST:PORT`` for one that runs. That one's indices
whose names begin with ``test-`` are deleted.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import missing, need_module, need_program

VARIABLE = "ASGI_STREAM_OPENSEARCH"
NODE = Path(__file__).parents[1] / "opensearch_node"
HANG = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SearchServer:
    """A server of one's own, which ends with its standard input, also when the tests are killed; or one that runs."""

    def __init__(self, folder: Path) -> None:
        need_module("opensearchpy")
        self.kind = os.environ.get(VARIABLE, "osmem")
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.host, self.port = "127.0.0.1", free_port()
        if self.kind.startswith("node:"):
            self._command = node_command(self.kind.partition(":")[2], folder)
        elif self.kind == "osmem":
            binary = Path(need_module("osmem_server").__file__).parent / "bin" / "osmem-server"
            self._command = [str(binary), "-addr", "{address}"]
        else:
            self.host, _, port = self.kind.partition(":")
            self.port = int(port)
            self._command = []

    @property
    def is_node(self) -> bool:
        """Whether it is OpenSearch itself, with data streams and rollovers."""
        return self.kind != "osmem"

    @property
    def settings(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port}

    def start(self) -> None:
        if not self._command:
            return
        address = f"{self.host}:{self.port}"
        words = [word.format(address=address, port=self.port, data=self.folder / "data") for word in self._command]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder
        )
        self.wait()

    def wait(self) -> None:
        from opensearchpy import OpenSearch

        deadline = time.monotonic() + HANG
        with OpenSearch(hosts=[self.settings], max_retries=0, timeout=2) as client:
            while True:
                try:
                    client.cluster.health(wait_for_status="yellow")
                    return
                except Exception:
                    if time.monotonic() > deadline:
                        raise
                    if self.process is not None and self.process.poll() is not None:
                        raise RuntimeError(f"{self._command[0]} ended with {self.process.returncode}") from None
                    time.sleep(0.05)

    def kill(self) -> None:
        """What it has not told anybody is lost, what is on its disk is there when it is started again."""
        if self.process is None:
            pytest.skip("a server that runs already is not killed")
        self.process.kill()
        self._wait_for_end()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self._wait_for_end()

    def _wait_for_end(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.wait(HANG)
        self.process.stdin.close()
        self.process = None


def node_command(version: str, folder: Path) -> list[str]:
    """Build the node, and return how to start it."""
    maven = need_program("mvn", "apt-get install maven")
    java = _jdk(21) if version.startswith("3") else _jdk(17)
    built = NODE / "target" / ("os3" if version.startswith("3") else "os2")
    if not (built / "lib").exists():
        copied = folder / "build"
        shutil.copytree(NODE, copied, ignore=shutil.ignore_patterns("target"))
        words = [maven, "-q", "-B", *(["-Pos3"] if version.startswith("3") else []), "package"]
        subprocess.run(words, cwd=copied, env={**os.environ, "JAVA_HOME": str(java)}, check=True, timeout=600)
        shutil.copytree(copied / "target", built, dirs_exist_ok=True)
    options = ["-Xms512m", "-Xmx512m"]
    if version.startswith("3"):
        options.append("--enable-native-access=ALL-UNNAMED")
    classes = f"{built}/*:{built}/lib/*"
    return [str(java / "bin" / "java"), *options, "-cp", classes, "asgistream.testnode.OneNode", "{port}", "{data}"]


def _jdk(least: int) -> Path:
    """A JDK that is new enough: JAVA_HOME's, the PATH's, or one among Debian's."""
    homes = [os.environ.get("JAVA_HOME"), _home_of(shutil.which("javac")), *Path("/usr/lib/jvm").glob("*")]
    for home in homes:
        if home and (Path(home) / "bin" / "javac").exists():
            told = subprocess.run(
                [Path(home) / "bin" / "javac", "-version"], capture_output=True, text=True, check=False
            )
            words = (told.stdout or told.stderr).split()
            if len(words) == 2 and int(words[1].split(".")[0]) >= least:
                return Path(home)
    missing(f"a JDK {least} or newer", "set JAVA_HOME")
    raise AssertionError


def _home_of(program: str | None) -> str | None:
    return None if program is None else str(Path(program).resolve().parents[1])
