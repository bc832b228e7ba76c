"""Lua scripts, and calls of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Script:
    """A script's source, and the name that Redis knows it by."""

    source: bytes
    sha: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call of a script: its keys are in one slot, and ``read`` turns the reply into the result."""

    script: Script
    keys: tuple[str, ...]
    arguments: tuple[bytes | str | int, ...]
    read: Callable[[Any], T]

    def words(self, *, whole: bool = False) -> tuple[bytes | str | int, ...]:
        """The command to send: by the script's name, or *whole*, for a Redis that does not know it yet."""
        begin = ("EVAL", self.script.source) if whole else ("EVALSHA", self.script.sha)
        return (*begin, len(self.keys), *self.keys, *self.arguments)


@cache
def load(package: str, *names: str) -> Script:
    """Return the script that the files ``lua/<name>.lua`` of *package* make, one after the other."""
    folder = files(package) / "lua"
    source = b"".join((folder / f"{name}.lua").read_bytes() for name in names)
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())
