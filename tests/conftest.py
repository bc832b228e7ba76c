"""What every test shares."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from tests.redis_server import redis_url

__all__ = ["redis_url"]

# A slow machine is no failure; pytest's own time limit catches what hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {}
