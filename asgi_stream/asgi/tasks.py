"""The task that a request runs in, if it is one."""

from __future__ import annotations

import asyncio
from typing import Any


def cancellable_task() -> asyncio.Task[Any] | None:
    """Return the current task; None where a server runs requests in something that only looks like one.

    granian's experimental Rust tasks are such: instances of a subclass that was never initialised, on which every
    method raises and which cannot be cancelled.
    """
    task = asyncio.current_task()
    if task is None:
        return None
    try:
        task.get_loop()
    except (AttributeError, RuntimeError):
        return None
    return task
