"""One search server for all tests of storage; those that kill it have one of their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asgi_stream.config import StorageConfig
from asgi_stream.storage import OpenSearchEventStorage
from tests.storage.server import SearchServer

_names = itertools.count(1)

MakeStorage = Callable[..., OpenSearchEventStorage]


@pytest.fixture(scope="session")
def search_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    server = SearchServer(tmp_path_factory.mktemp("opensearch"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[SearchServer]:
    server = SearchServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_storage(tmp_path: Path) -> Iterator[MakeStorage]:
    made: list[OpenSearchEventStorage] = []

    def make(server: SearchServer, **settings: object) -> OpenSearchEventStorage:
        defaults = {
            **server.settings,
            "index_prefix": f"test-{os.getpid()}-{next(_names)}",
            "spool_dir": str(tmp_path / "spool"),
            "flush_seconds": 0.02,
        }
        made.append(OpenSearchEventStorage(StorageConfig(**{**defaults, **settings})))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


@pytest.fixture
def storage(search_server: SearchServer, make_storage: MakeStorage) -> OpenSearchEventStorage:
    return make_storage(search_server)
