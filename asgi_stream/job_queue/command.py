"""``asgi-stream worker module:name``."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from asgi_stream.errors import ConfigurationError
from asgi_stream.job_queue.config import QueueConfig
from asgi_stream.job_queue.worker import QueueWorker


def run(registry: str, *, redis_url: str | None, queue: str, max_workers: int, archive: bool = False) -> None:
    """Find what *registry* names, and work."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("docket").setLevel(logging.WARNING)
    found = _find(registry)
    if isinstance(found, QueueWorker):
        worker = found
    elif isinstance(found, QueueConfig):
        worker = QueueWorker(found, max_workers, archive=archive)
    elif isinstance(found, Mapping):
        config = QueueConfig(redis_url, queue=queue, operations_registry=dict(found))
        worker = QueueWorker(config, max_workers, archive=archive)
    else:
        raise ConfigurationError(
            f"{registry} is a {type(found).__name__}; a worker takes a dict of operations, a QueueConfig or a "
            "QueueWorker"
        )
    asyncio.run(worker.start())


def _find(named: str) -> Any:
    module_name, colon, attribute = named.partition(":")
    if not colon or not attribute:
        raise ConfigurationError(f"{named!r}: name a module and what is in it, such as app.jobs:registry")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise  # found, but it imports something that is not there
        raise ConfigurationError(f"there is no module {module_name!r} here") from exc
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigurationError(f"module {module_name} has no {attribute!r}") from None
