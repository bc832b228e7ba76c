"""Parts that a machine may lack: a skip says what to install; under CI=true it is a failure."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from typing import Any

import pytest


def missing(what: str, install: str) -> None:
    """Skip, or fail in CI, for want of *what*."""
    reason = f"{what} is needed: {install}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def need_module(name: str) -> Any:
    """Import a module that the extra `test` brings."""
    try:
        return import_module(name)
    except ImportError:
        missing(name, "pip install -e '.[test]'")


def need_program(name: str, install: str) -> str:
    """Find a program on the PATH."""
    path = shutil.which(name)
    if path is None:
        missing(name, install)
    return str(path)
